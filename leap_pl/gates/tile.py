"""PATCH's gate: one Bernoulli variable for each tile of a weight, which is dense or n:m.

Paper: https://arxiv.org/abs/2509.23410. Legend of suffixes: O, I = outputs (all dimensions but the inputs') and
inputs of one weight, inputs last; A, B = rows and columns of its tiles.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from leap_pl.base_model.weights import Weight
from leap_pl.distributed.shards import gathered
from leap_pl.errors import UserError
from leap_pl.gates.gate import Gate, GateState
from leap_pl.gates.groups import Groups
from leap_pl.gates.nm import confidence
from leap_pl.gates.tile_grid import FixedTiles, JointTiles, SoftTiles, TileGrid
from leap_pl.inputs.ranges import check_numbers
from leap_pl.kernels.noise import noise_keys
from leap_pl.masks.patterns import NM, Pattern, Tiled, Unstructured, follows
from leap_pl.masks.top_k import Cut, exact_top_k

PATTERNS = " patterns"  # what a weight's name has behind it where the noise of its patterns is meant


class TileGate(Gate):
    """T = σ((α·θ + g)/τ) for each tile, M = T + (1 − T)·m, W̃ = M ⊙ W, with m of n:m form.

    .. code-block:: yaml

        model:
          sparsity: 0.45
          gate:
            class_path: TileGate
            init_args: {n: 2, m: 4, tile: 128, mode: joint}
          annealing:
            alpha: {start: 25, end: 350}             # of the tiles
            pattern_alpha: {start: 100, end: 500}    # of the patterns, in joint mode
            tau: {start: 4, end: 0.05}

    In ``tile`` mode m is the fixed n:m mask of the prior, and one logit for each tile is all that is learned. In
    ``joint`` mode m is relaxed and learned as by :class:`leap_pl.gates.NMGate`, along with the tiles. Tiles at
    the edges of a weight that 128 does not divide are smaller. The hard mask makes the tiles of the highest
    logits dense, over all weights together, as many as bring the sparsity closest to the asked one: it differs
    by half a tile at most. Any sparsity up to 1 − n/m can be had.
    """

    method: ClassVar[str] = "patch"

    removable: Tensor
    inner: Tensor

    def __init__(
        self,
        weight: Weight,
        state: GateState,
        n: int = 2,
        m: int = 4,
        tile: int = 128,
        mode: Literal["tile", "joint"] = "joint",
        spread: float = 0.014,
        strength: float = 3.0,
        pattern_spread: float = 0.01,
    ) -> None:
        """Make a gate for ``weight``.

        Args:
            weight: The weight to gate.
            state: The state that the gates of the model share.
            n: Weights kept of each group, where a tile is not dense.
            m: Consecutive inputs that make a group.
            tile: Rows and columns of a tile. In joint mode a multiple of m.
            mode: ``tile``: the n:m mask of the prior is fixed. ``joint``: it is learned too.
            spread: Standard deviation of the tiles' logits at the start.
            strength: How far the priors move a logit at the start, in units of its spread.
            pattern_spread: Standard deviation of the patterns' logits at the start.
        """
        super().__init__(weight, state)
        if min(spread, pattern_spread) <= 0 or strength < 0:
            raise UserError(
                f"spread {spread} and pattern_spread {pattern_spread} must be above 0, strength {strength} not below 0."
            )
        self.n, self.m, self.mode = n, m, mode
        self.spread, self.strength, self.pattern_spread = spread, strength, pattern_spread
        self.tiled = Tiled(NM(n, m), tile)
        check_numbers({"n": n, "m": m, "tile": tile, "spread": spread, "strength": strength}, "model.gate.")
        check_numbers({"pattern_spread": pattern_spread}, "model.gate.")
        if mode == "joint" and tile % m:
            raise UserError(f"tile {tile} is no multiple of {m}: a {n}:{m} group would lie in two tiles. Make it one.")
        self.groups = Groups(n, m, self.shape, self.input_dim)
        self.grid = TileGrid(self.groups, tile)
        device = weight.parameter.device
        self.logits = nn.Parameter(torch.zeros(self.grid.shape, dtype=torch.float32, device=device))
        inner = torch.zeros(self.shape, dtype=torch.bool, device=device)
        if mode == "joint":
            logits = torch.zeros(self.groups.logits_shape, dtype=torch.float32, device=device)
            self.pattern_logits = nn.Parameter(self.groups.forbid_(logits))
            inner = self.groups.best(logits)
        else:
            self.register_buffer("inner", inner)
        # How many weights of each tile go where it is not dense. In joint mode any choice of patterns has as many.
        self.register_buffer("removable", self.grid.count(~inner))
        self.cut = Cut(0.0, 0)

    def settings(self) -> dict[str, Any]:
        """See :meth:`Gate.settings`."""
        told = {"n": self.n, "m": self.m, "tile": self.tiled.size, "mode": self.mode, "spread": self.spread}
        return told | {"strength": self.strength, "pattern_spread": self.pattern_spread}

    def exact_sparsity(self, sparsity: float) -> float:
        """Any up to 1 − n/m; see :meth:`Gate.exact_sparsity`."""
        most = self.tiled.nm.sparsity
        if sparsity > most + 1e-9:
            raise UserError(
                f"model.sparsity is {sparsity:g}, and tiles that are dense or {self.tiled.nm} remove {most:g} at most. "
                f"Set --model.sparsity {most:g} or less, or another n and m."
            )
        return sparsity

    def prior_forms(self, sparsity: float) -> dict[str, Pattern]:
        """Unstructured, for the tiles, and n:m, within them; see :meth:`Gate.prior_forms`."""
        return {"prior": Unstructured(sparsity), "inner": NM(self.n, self.m)}

    def check_priors(self, priors: Mapping[str, Any]) -> None:
        """See :meth:`Gate.check_priors`."""
        if self.mode == "tile" and "inner" not in priors:
            raise UserError(
                f"gates in tile mode keep the {self.tiled.nm} mask of the prior, and prior.method is none. "
                "Set --model.prior.method or --model.prior.inner_mask, or --model.gate.mode joint."
            )

    @classmethod
    def form(cls, settings: Mapping[str, Any]) -> str:
        """See :meth:`Gate.form`."""
        return str(Tiled(NM(settings["n"], settings["m"]), settings["tile"]))

    # -- soft ---------------------------------------------------------------------------------------------

    def soften(self, weight: Tensor, key_0: Tensor, key_1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`Gate.soften`."""
        state = self.state
        soft_AB = SoftTiles.apply(self.logits, key_0, key_1, state.slope, state.sharpness)
        if self.mode == "joint":
            noise = *self.keys(PATTERNS), state.pattern_slope, state.sharpness
            masked, energy = JointTiles.apply(soft_AB, self.pattern_logits, weight, self.grid, *noise)
        else:
            masked, energy = FixedTiles.apply(soft_AB, weight, self.inner, self.grid)
        always = weight.numel() - self.removable.sum()
        return masked, always + (soft_AB * self.removable).sum(), energy

    # -- the start ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def start_from(self, prior: Tensor | None, seed: int, inner: Tensor | None = None) -> None:
        """θ = N(0, spread²) + strength·spread·(2t − 1), with t the T that gives a tile the density of ``prior``.

        A tile of density d has t = (d − n/m)/(1 − n/m), between 0 and 1. ``inner`` is the n:m mask: kept in tile
        mode, and what the patterns lean towards in joint mode.
        """
        generator = torch.Generator().manual_seed(noise_keys(seed, -1, 0, self.name)[0])
        start_AB = torch.randn(self.logits.shape, generator=generator, dtype=torch.float32).mul_(self.spread)
        if prior is not None:
            density_AB = self.grid.count(prior.cpu()) / self.grid.count(torch.ones_like(prior, device="cpu"))
            least = self.n / self.m
            share_AB = ((density_AB - least) / (1 - least)).clamp(0, 1)
            start_AB += (share_AB * 2 - 1) * (self.strength * self.spread)
        self.logits.copy_(start_AB)
        if self.mode == "joint":
            generator.manual_seed(noise_keys(seed, -1, 0, self.name + PATTERNS)[0])
            start = self.groups.start(inner, self.pattern_spread, self.strength, generator)
            self.pattern_logits.copy_(start)
        elif inner is not None:
            if not follows(inner, self.input_dim, self.tiled.nm):
                raise UserError(f"prior.inner_mask is not {self.tiled.nm} in {self.name}. Give one that prune made so.")
            self.inner.copy_(inner)
            self.removable.copy_(self.grid.count(~self.inner))

    # -- hard ---------------------------------------------------------------------------------------------

    def hard_mask(self) -> Tensor:
        """See :meth:`Gate.hard_mask`."""
        dense_OI = self.grid.over_elements(self.cut.mask(gathered(self.held())))
        return self.inner_mask() | dense_OI.movedim(-1, self.input_dim)

    def inner_mask(self) -> Tensor:
        """The n:m mask of the tiles that are not dense."""
        return self.held("inner") if self.mode == "tile" else self.groups.best(gathered(self.held("pattern_logits")))

    @classmethod
    def choose(cls, gates: Mapping[str, Any], sparsity: float) -> None:
        """Make dense the tiles of the highest logits, ties by index, until the sparsity is closest to the asked one."""
        logits = [gathered(gate.held()) for gate in gates.values()]  # one a tile: few
        removable = torch.cat([gate.held("removable").flatten() for gate in gates.values()]).to(torch.int64)
        order = torch.cat([tiles_AB.flatten() for tiles_AB in logits]).argsort(descending=True, stable=True)
        left = removable.sum() - torch.cat([removable.new_zeros(1), removable[order].cumsum(0)])
        asked = round(sparsity * sum(gate.shape.numel() for gate in gates.values()))
        nearest = (left - asked).abs()
        dense = int((nearest == nearest.min()).nonzero()[0])
        cuts = exact_top_k(logits, dense)
        for gate, cut in zip(gates.values(), cuts, strict=True):
            gate.cut = cut

    @classmethod
    def sample_hard_masks(cls, gates: Mapping[str, Any], sparsity: float, stride: int) -> dict[str, Tensor]:
        """See :meth:`Gate.sample_hard_masks`; only the sampled groups are looked at."""
        cls.choose(gates, sparsity)
        return {name: gate.sample_hard_mask(stride) for name, gate in gates.items()}

    def sample_hard_mask(self, stride: int) -> Tensor:
        """Every ``stride``-th element of :meth:`hard_mask`, flattened."""
        if self.mode == "joint":
            inner = self.groups.sample_best(gathered(self.pattern_logits.detach()), stride)
        else:
            inner = self.inner.reshape(-1)[::stride]
        *stacked, row, column = self.groups.coordinates(
            torch.arange(0, self.shape.numel(), stride, device=inner.device)
        )
        dense_AB = self.cut.mask(gathered(self.logits.detach()))
        return inner | dense_AB[*stacked, row // self.tiled.size, column // self.tiled.size]

    @classmethod
    def curves(cls, gates: Mapping[str, Any], stride: int) -> dict[str, float]:
        """The share of tiles whose logit is above 0; and how decided the patterns are, where they are learned."""
        above = torch.cat([gathered(gate.logits.detach()).flatten() for gate in gates.values()]) > 0
        found = {"tiles/logits_above_0": float(above.float().mean())}
        first = next(iter(gates.values()))
        if first.mode == "joint":
            samples = [gathered(gate.pattern_logits.detach()).flatten(1)[:, ::stride] for gate in gates.values()]
            found["patterns/confidence"] = confidence(samples, first.state.pattern_slope)
            found["schedule/pattern_alpha"] = float(first.state.pattern_alpha)
        return found

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"{tuple(self.shape)}, {self.tiled}, {self.mode} mode"
