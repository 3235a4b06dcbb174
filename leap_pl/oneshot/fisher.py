"""Fisher allocation: sparsities of matrices and of their rows by the effect of their weights on the loss.

Layer-wise methods make all matrices equally sparse, although some can be pruned far more than others. To second order,
removing the weight from input j to output i increases the loss by W_ij²/2 times the weight's Fisher information. With x
the inputs, and g the gradient of the loss with respect to the outputs, that information is E[x_j²·g_i²], or
E[x_j²]·E[g_i²] if the two are independent (the diagonal of K-FAC, https://arxiv.org/abs/1503.05671). Such costs, in
nats, are comparable over the whole model: one threshold on all of them gives the density of each matrix, and of each
row. An allocation moves only part of the way towards these densities, because each cost is that of removing a single
weight from the dense model.

Shapes: N sequences, T tokens, O outputs, I inputs.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from leap_pl.base_model.backbone import evaluating, split_model
from leap_pl.errors import UserError, listing
from leap_pl.losses.language import language_losses
from leap_pl.losses.objective import Objective
from leap_pl.masks.patterns import ByRow
from leap_pl.masks.top_k import exact_top_k
from leap_pl.oneshot.inputs import Matrix, Part, ProductWatch
from leap_pl.oneshot.walk import WalkOptions, eager_experts, on_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS_OF_WHOLE_MODEL = 4096  # in a batch that keeps the activations of all blocks
_TINY = torch.finfo(torch.float32).tiny  # lower bound of a factor, whose logarithm is taken


def whole_model_batch(seq_length: int) -> int:
    """Return the sequences in a batch that keeps the activations of all blocks: no more than keep a device busy."""
    return min(WalkOptions().batch_size, max(1, TOKENS_OF_WHOLE_MODEL // seq_length))


@dataclass(frozen=True)
class FisherOptions:
    """Settings of :func:`fisher_allocation`; docs/oneshot.md measures them.

    Attributes:
        strength: Strength in (0, 1], between the same sparsity for every matrix (0) and the densities that the
            threshold gives (1): a factor of their log-odds.
        row_strength: Likewise for the rows of a matrix, from 0 to 1, for methods whose weights compete within a row.
        sequences: Largest number of calibration sequences to run forward and backward.
    """

    strength: float = 0.5
    row_strength: float = 0.25
    sequences: int = 32

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise UserError(f"Fisher allocation of strength {self.strength:g}: give a number above 0 and at most 1.")
        if not 0 <= self.row_strength <= 1:
            raise UserError(f"Fisher allocation of row strength {self.row_strength:g}: give a number from 0 to 1.")
        if self.sequences < 1:
            raise UserError(f"Fisher allocation from {self.sequences} sequences: give at least 1.")


class Moments:
    """Second moments of one matrix's inputs and output gradients, summed over tokens.

    Attributes:
        input_square_I: Σ x_j², float32.
        gradient_square_O: Σ g_i², float32, with g the gradient of the cross-entropy summed over tokens, in nats.
        count: Number of tokens that the matrix saw: of an expert, those that were routed to it.
    """

    def __init__(self) -> None:
        """Start with zero tokens."""
        self.input_square_I, self.gradient_square_O = torch.zeros((), device="cpu"), torch.zeros((), device="cpu")
        self.count = 0

    def add_inputs(self, x: Tensor) -> None:
        """Add inputs (…, I)."""
        self.input_square_I = self.input_square_I.to(x.device) + _square_sum(x)
        self.count += x.numel() // x.shape[-1]

    def add_gradients(self, g: Tensor) -> None:
        """Add gradients (…, O)."""
        self.gradient_square_O = self.gradient_square_O.to(g.device) + _square_sum(g)


def fisher_allocation(
    model: "PreTrainedModel",
    matrices: Sequence[Matrix],
    blocks_NT: Tensor,
    sparsity: float,
    options: FisherOptions | None = None,
    walk: WalkOptions | None = None,
    progress: bool = False,
) -> dict[str, ByRow]:
    """Allocate ``sparsity`` over ``matrices``, and over their rows, by the Fisher information of their weights.

    Unlike a walk, this needs the whole model on the compute device, with the activations of ``walk.batch_size``
    sequences. No gradients of weights are computed.

    Args:
        model: Dense base model without gates; it is not changed.
        matrices: All matrices that will be pruned.
        blocks_NT: Calibration tokens, LongTensor.
        sparsity: Sparsity over all matrices together, above 0 and below 1.
        options: Settings; None: the defaults.
        walk: Batch size and device.
        progress: Show a progress bar.

    Returns:
        Matrix name → its sparsity, and the number of weights that each row keeps, within half a weight of the row's
        share. A matrix that no token reached has about the overall density, in every row.

    Raises:
        UserError: A matrix got no gradient, or its moments are not finite.
    """
    options = options or FisherOptions()
    moments = measure_moments(model, matrices, blocks_NT[: options.sequences], walk, progress)
    tokens = blocks_NT[: options.sequences].numel()
    costs = _LogCosts([matrix for matrix in matrices if matrix.name in moments], moments, tokens)
    shapes = {matrix.name: matrix.view(matrix.weight.parameter).shape for matrix in matrices}
    kept = round((1 - sparsity) * sum(shapes[matrix.name].numel() for matrix in costs.matrices))
    # Log-odds of the densities that the threshold gives: of each matrix, and of each of its rows.
    odds = dict.fromkeys(shapes, torch.tensor(1 - sparsity, dtype=torch.float64, device="cpu").logit())
    row_odds = {name: torch.zeros(shape[0], dtype=torch.float64, device="cpu") for name, shape in shapes.items()}
    for matrix, cost_OI, cut in zip(costs.matrices, costs, exact_top_k(costs, kept), strict=True):
        mask_OI = cut.mask(cost_OI)
        odds[matrix.name] = _log_odds(mask_OI.sum().cpu().double(), mask_OI.numel())
        row_odds[matrix.name] = _log_odds(mask_OI.sum(1).cpu().double(), mask_OI.shape[1])
    sizes = torch.tensor([shape.numel() for shape in shapes.values()], dtype=torch.float64, device="cpu")
    densities = balanced(options.strength * torch.stack(list(odds.values())), sizes, 1 - sparsity)
    allocated = {}
    for (name, shape), density in zip(shapes.items(), densities.tolist(), strict=True):
        row_sizes = torch.full((shape[0],), shape[1], dtype=torch.float64, device="cpu")
        of_rows = balanced(options.row_strength * row_odds[name], row_sizes, density)
        allocated[name] = ByRow(1 - density, (of_rows * shape[1]).round().long())
    return allocated


def log_cost(weight_OI: Tensor, moments: Moments, tokens: int) -> Tensor:
    """Return ``log(W_ij²·E[x_j²]·Σg_i²/tokens)``, float32 (O, I): the logarithm of twice a weight's cost.

    The cost is in nats a token of the text. The mean of x_j² is over the tokens that the matrix saw, and that of g_i²
    over all ``tokens``: a weight of an expert costs nothing on tokens that are routed to others.
    """
    # In logarithms: the product of three factors as small as these would underflow in float32.
    x_I, g_O = moments.input_square_I / moments.count, moments.gradient_square_O / tokens
    weight = 2 * weight_OI.float().abs().clamp_min(_TINY).log()
    return weight + x_I.clamp_min(_TINY).log() + g_O.clamp_min(_TINY).log()[:, None]


def balanced(log_odds: Tensor, sizes: Tensor, density: float) -> Tensor:
    """Return the densities with these log-odds, shifted by one constant so that the overall density is ``density``.

    Args:
        log_odds: Log-odds of G groups of elements, (G,), float64.
        sizes: Number of elements of each group, (G,), float64.
        density: Density over all elements, above 0 and below 1.
    """
    reach = float(log_odds.abs().max()) + abs(math.log(density / (1 - density))) + 1
    low, high = -reach, reach
    for _ in range(60):  # bisection to the precision of float64
        middle = (low + high) / 2
        found = float((torch.sigmoid(log_odds + middle) * sizes).sum() / sizes.sum())
        low, high = (middle, high) if found < density else (low, middle)
    return torch.sigmoid(log_odds + middle)


def _log_odds(kept: Tensor, size: int) -> Tensor:
    """Return the log-odds of the density ``kept`` / ``size``, finite also if none or all are kept."""
    return ((kept + 0.5) / (size - kept + 0.5)).log()


def measure_moments(
    model: "PreTrainedModel",
    matrices: Sequence[Matrix],
    blocks_NT: Tensor,
    walk: WalkOptions | None = None,
    progress: bool = False,
) -> dict[str, Moments]:
    """Measure the moments of each matrix's inputs and output gradients.

    Returns:
        Matrix name → moments, without the matrices that no token reached.

    Raises:
        UserError: A weight got no gradient, or moments are not finite.
    """
    walk = walk or WalkOptions(batch_size=whole_model_batch(blocks_NT.shape[1]))
    moments: dict[str, Moments] = {}

    def see(matrix: Matrix, inputs: Tensor, output: Tensor, part: Part) -> None:
        if not inputs.numel() or not output.requires_grad:
            return
        own = moments.setdefault(matrix.name, Moments())
        own.add_inputs(inputs.detach())
        output.register_hook(lambda g: own.add_gradients(_of_part(g, part)))

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(eager_experts(model))
        stack.enter_context(_frozen(model))
        device = next(model.parameters()).device if walk.device is None else torch.device(walk.device)
        stack.enter_context(on_device(model, device, keep=True))
        states, head = split_model(model)
        stack.enter_context(_with_gradients(model))
        with torch.enable_grad():
            batches = blocks_NT.to(device).split(walk.batch_size)
            for ids_BT in tqdm(batches, "Fisher information", unit="batch", disable=not progress, dynamic_ncols=True):
                with ProductWatch(matrices, see):
                    hidden_TD = states(ids_BT)[:, walk.first_target - 1 : -1].flatten(0, 1)
                loss, _, _ = language_losses(hidden_TD, ids_BT[:, walk.first_target :].flatten(), head, Objective())
                (loss * len(hidden_TD)).backward()
    seen = {matrix.weight.name for matrix in matrices if matrix.name in moments}
    unseen = [matrix.weight.name for matrix in matrices if matrix.weight.name not in seen]
    if unseen:
        raise UserError(
            f"{listing(unseen, 3)}: no product with it was seen in the forward pass, so its Fisher information is "
            "unknown. Give --fisher null, or leave it out with --ignore."
        )
    for name, own in moments.items():
        if not (own.input_square_I.isfinite().all() and own.gradient_square_O.isfinite().all()):
            raise UserError(f"{name}: its inputs or gradients are not finite. Load the model in another --dtype.")
    return moments


def _of_part(gradient: Tensor, part: Part) -> Tensor:
    """Return the gradient (…, O) of the outputs of one matrix in that of a product."""
    if part is None:
        return gradient
    return gradient.mT if part == "transposed" else gradient[part]


class _LogCosts(Sequence[Tensor]):
    """Sequence of the log costs of each matrix, computed on access; it cannot be sliced."""

    def __init__(self, matrices: Sequence[Matrix], moments: Mapping[str, Moments], tokens: int) -> None:
        self.matrices, self.moments, self.tokens = matrices, moments, tokens

    def __len__(self) -> int:
        return len(self.matrices)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        matrix = self.matrices[index]
        moments = self.moments[matrix.name]
        return log_cost(matrix.dense().to(moments.input_square_I.device), moments, self.tokens)


def _square_sum(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).float().square().sum(0)


@contextmanager
def _frozen(model: torch.nn.Module) -> Iterator[None]:
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)


@contextmanager
def _with_gradients(model: "PreTrainedModel") -> Iterator[None]:
    """Let gradients flow from the outputs of the embeddings on, although no parameter is trained."""
    embeddings = model.get_input_embeddings()
    assert embeddings is not None
    handle = embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())
    try:
        yield
    finally:
        handle.remove()
