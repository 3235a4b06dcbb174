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
from leap_pl.gates.collection import Gates
from leap_pl.gates.gate import Gate, GateState
from leap_pl.gates.groups import Groups
from leap_pl.gates.nm import confidence
from leap_pl.gates.tile_grid import FixedTiles, JointTiles, SoftTiles, TileGrid
from leap_pl.inputs.ranges import check_numbers
from leap_pl.kernels.noise import initial_noise
from leap_pl.masks.patterns import NM, Pattern, Tiled, Unstructured, follows
from leap_pl.masks.top_k import Cut, closest_top_k

PATTERN_ALPHA = "pattern_alpha"  # the schedule of the patterns' logit scale
PATTERNS = " patterns"  # suffix of a weight's name in the noise keys of its patterns


class TileGates(Gates["TileGate"]):
    """All tile gates of a model: one threshold (cut) for the logits of all tiles."""

    @property
    def form(self) -> str:
        """Return the tiled pattern, with tile size and n:m."""
        return str(self.first.tiled)

    def exact_sparsity(self, sparsity: float) -> float:
        """Return ``sparsity``, which may be at most 1 − n/m; see :meth:`.Gates.exact_sparsity`."""
        nm = self.first.tiled.nm
        if sparsity > nm.sparsity + 1e-6:  # of the share that is advised, which is rounded
            raise UserError(
                f"model.sparsity is {sparsity:g}, and tiles that are dense or {nm} remove {nm.sparsity:g} at most. "
                f"Set --model.sparsity {nm.sparsity:g} or less, or another n and m."
            )
        return min(sparsity, nm.sparsity)

    def prior_forms(self, sparsity: float) -> dict[str, Pattern]:
        """Return an unstructured prior for the tiles and an n:m prior within them; see :meth:`.Gates.prior_forms`."""
        return {"prior": Unstructured(sparsity), "inner": self.first.tiled.nm}

    def check_priors(self, priors: Mapping[str, Any]) -> None:
        """Check that tile mode has an n:m prior; see :meth:`.Gates.check_priors`."""
        if self.first.mode == "tile" and "inner" not in priors:
            raise UserError(
                f"gates in tile mode need the {self.first.tiled.nm} mask of a prior, and prior.method is none. "
                "Set --model.prior.method or --model.prior.masks.inner, or --model.gate.mode joint."
            )

    def choose(self, sparsity: float) -> None:
        """Make the tiles of the highest logits dense, ties by index, as many as come closest to ``sparsity``."""
        logits = [gathered(tiles_AB) for tiles_AB in self.held()]  # one for each tile: few
        cuts = closest_top_k(logits, self.held("removable"), round(sparsity * self.numel))
        for gate, cut in zip(self.values(), cuts, strict=True):
            gate.cut = cut

    def sample_hard_masks(self, sparsity: float, stride: int) -> dict[str, Tensor]:
        """Return samples of the hard masks, from the sampled groups only; see :meth:`.Gates.sample_hard_masks`."""
        self.choose(sparsity)
        return {name: gate.sample_hard_mask(stride) for name, gate in self.items()}

    def curves(self, stride: int) -> dict[str, float]:
        """Return the share of tiles with a logit above 0, and in joint mode the confidence of the patterns."""
        above = torch.cat([gathered(gate.logits.detach()).flatten() for gate in self.values()]) > 0
        found = {"tiles/logits_above_0": float(above.float().mean())}
        if self.first.mode == "joint":
            state = self.first.state
            # Copies: a view would hold the logits of the whole model, which a sharded run gathers one weight at a time.
            gathered_PG = (gathered(gate.pattern_logits.detach()).flatten(1) for gate in self.values())
            samples = [logits_PG[:, ::stride].clone() for logits_PG in gathered_PG]
            found["patterns/confidence"] = confidence(samples, state.slopes[PATTERN_ALPHA])
            found["schedule/pattern_alpha"] = float(state.scales[PATTERN_ALPHA])
        return found


class TileGate(Gate):
    """PATCH's gate: T = σ((α·θ + g)/τ) for each tile, M = T + (1 − T)·m, W̃ = M ⊙ W, with an n:m mask m.

    .. code-block:: yaml

        model:
          sparsity: 0.45
          gate:
            class_path: TileGate
            init_args: {n: 2, m: 4, tile: 128, mode: joint}
          annealing:
            alpha: {start: 25, end: 350}             # for the tiles
            pattern_alpha: {start: 100, end: 500}    # for the patterns, in joint mode
            tau: {start: 4, end: 0.05}

    In ``tile`` mode m is the fixed n:m mask of the prior, and only one logit for each tile is learned. In ``joint``
    mode m is relaxed and learned together with the tiles, as in :class:`leap_pl.gates.NMGate`. Where the tile size
    does not divide a weight's shape, the tiles at the edges are smaller. The hard mask makes the tiles of the highest
    logits dense, over all weights together, as many as bring the sparsity closest to the target: the difference is
    at most half a tile. The sparsity is at most 1 − n/m.
    """

    collection = TileGates
    method: ClassVar[str] = "patch"
    scales: ClassVar[Mapping[str, float]] = {PATTERN_ALPHA: 100.0}

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
        """Create a gate for ``weight``.

        Args:
            weight: Weight to gate.
            state: State shared by the gates of the model.
            n: Number of weights kept in each group of a tile that is not dense.
            m: Number of consecutive inputs in a group.
            tile: Rows and columns of a tile. In joint mode a multiple of m.
            mode: ``tile``: the n:m mask of the prior is fixed. ``joint``: it is learned too.
            spread: Standard deviation of the tiles' initial logits.
            strength: Shift of an initial logit by the priors, in units of its spread.
            pattern_spread: Standard deviation of the patterns' initial logits.
        """
        super().__init__(weight, state)
        self.n, self.m, self.mode = n, m, mode
        self.spread, self.strength, self.pattern_spread = spread, strength, pattern_spread
        self.tiled = Tiled(NM(n, m), tile)
        numbers = {"n": n, "m": m, "tile": tile, "spread": spread, "strength": strength}
        check_numbers({**numbers, "pattern_spread": pattern_spread}, "model.gate.")
        if mode not in ("tile", "joint"):
            raise UserError(f"model.gate.mode is {mode!r}; give tile or joint.")
        if mode == "joint" and tile % m:
            raise UserError(
                f"model.gate.tile is {tile}, and joint mode needs a multiple of {m}: a {n}:{m} group must not span two "
                f"tiles. Set --model.gate.tile {-(-tile // m) * m}."
            )
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
        # Number of weights removed in each tile that is not dense. In joint mode it is the same for any patterns.
        self.register_buffer("removable", self.grid.count(~inner))
        self.cut = Cut(0.0, 0)

    def settings(self) -> dict[str, Any]:
        """Return n, m, tile, mode, spreads and strength; see :meth:`Gate.settings`."""
        settings = {"n": self.n, "m": self.m, "tile": self.tiled.size, "mode": self.mode, "spread": self.spread}
        return settings | {"strength": self.strength, "pattern_spread": self.pattern_spread}

    # -- soft masks ---------------------------------------------------------------------------------------

    def soften(self, weight: Tensor, key_0: Tensor, key_1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the relaxed masked weight and its sums; see :meth:`Gate.soften`."""
        state = self.state
        soft_AB = SoftTiles.apply(self.logits, key_0, key_1, state.slope, state.sharpness)
        if self.mode == "joint":
            noise = *self.keys(PATTERNS), state.slopes[PATTERN_ALPHA], state.sharpness
            masked, energy = JointTiles.apply(soft_AB, self.pattern_logits, weight, self.grid, *noise)
        else:
            masked, energy = FixedTiles.apply(soft_AB, weight, self.inner, self.grid)
        always = weight.numel() - self.removable.sum()
        return masked, always + (soft_AB * self.removable).sum(), energy

    # -- initial logits -----------------------------------------------------------------------------------

    @torch.no_grad()
    def start_from(self, prior: Tensor | None, seed: int, inner: Tensor | None = None) -> None:
        """Initialise θ = N(0, spread²) + strength·spread·(2t − 1), t the T that gives a tile the prior's density.

        A tile of density d in ``prior`` has t = (d − n/m)/(1 − n/m), clamped to 0 … 1. ``inner`` is the n:m mask: fixed
        in tile mode, the prior of the patterns in joint mode.
        """
        start_AB = initial_noise(self.logits.shape, self.spread, seed, self.name)
        if prior is not None:
            # In float32 whatever the default is, which Lightning sets to half precision in some runs.
            kept_AB = self.grid.count(prior.cpu()).to(torch.float32)
            density_AB = kept_AB / self.grid.count(torch.ones_like(prior, device="cpu"))
            least = self.n / self.m
            share_AB = ((density_AB - least) / (1 - least)).clamp(0, 1)
            start_AB += (share_AB * 2 - 1) * (self.strength * self.spread)
        self.logits.copy_(start_AB)
        if self.mode == "joint":
            start = initial_noise(self.groups.logits_shape, self.pattern_spread, seed, self.name + PATTERNS)
            self.pattern_logits.copy_(self.groups.shift_(start, inner, self.strength * self.pattern_spread))
        elif inner is not None:
            if not follows(inner, self.input_dim, self.tiled.nm):
                raise UserError(
                    f"prior.masks.inner is not {self.tiled.nm} in {self.name}. Give a mask made by leap_pl prune "
                    f"--pattern {self.tiled.nm}."
                )
            self.inner.copy_(inner)
            self.removable.copy_(self.grid.count(~self.inner))

    # -- hard masks ---------------------------------------------------------------------------------------

    def hard_mask(self) -> Tensor:
        """Return the mask with dense tiles above the cut and n:m elsewhere; see :meth:`Gate.hard_mask`."""
        dense_OI = self.grid.over_elements(self.cut.mask(gathered(self.held())))
        return self.inner_mask() | dense_OI.movedim(-1, self.input_dim)

    def inner_mask(self) -> Tensor:
        """Return the n:m mask of the tiles that are not dense."""
        return self.held("inner") if self.mode == "tile" else self.groups.best(gathered(self.held("pattern_logits")))

    def sample_hard_mask(self, stride: int) -> Tensor:
        """Return every ``stride``-th element of :meth:`hard_mask`, flattened."""
        if self.mode == "joint":
            inner = self.groups.sample_best(gathered(self.pattern_logits.detach()), stride)
        else:
            inner = self.inner.reshape(-1)[::stride]
        *stacked, row, column = self.groups.coordinates(
            torch.arange(0, self.shape.numel(), stride, device=inner.device)
        )
        dense_AB = self.cut.mask(gathered(self.logits.detach()))
        return inner | dense_AB[*stacked, row // self.tiled.size, column // self.tiled.size]

    def extra_repr(self) -> str:
        """Return the summary that is shown when the model is printed."""
        return f"{tuple(self.shape)}, {self.tiled}, {self.mode} mode"
