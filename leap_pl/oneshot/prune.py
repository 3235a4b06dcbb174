"""Prune a model in one shot, block by block."""

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from leap_pl.base_model.sequence_length import check_sequence_length
from leap_pl.base_model.vocabulary import check_tokens, vocabulary_of
from leap_pl.base_model.weights import (
    Weight,
    decoder_blocks,
    find_weights,
    model_fingerprint,
)
from leap_pl.errors import UserError, listing
from leap_pl.kernels.precision import full_float32
from leap_pl.masks.bits import PackedMasks, pack
from leap_pl.masks.kept_weights import for_other_weights
from leap_pl.masks.mask_set import MaskSet, Provenance, installed_versions
from leap_pl.masks.patterns import NM, Pattern, Unstructured, parse_pattern
from leap_pl.oneshot.allocation import OwlOptions, owl_sparsities
from leap_pl.oneshot.checks import check_blocks, check_kinds, check_settings, warn_of_zeros
from leap_pl.oneshot.damping import NotSolvableError, Solution
from leap_pl.oneshot.fisher import FisherOptions, fisher_allocation
from leap_pl.oneshot.inputs import InputStatistics, Matrix
from leap_pl.oneshot.methods import DEFAULT, FALLBACK, METHODS, Method, method_named
from leap_pl.oneshot.options import MethodOptions
from leap_pl.oneshot.walk import Walk, WalkOptions, on_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


@dataclass
class Pruned:
    """Result of :func:`prune`.

    Attributes:
        masks: Masks of all weights.
        errors: Matrix name → layer error ‖XW'ᵀ − XWᵀ‖² / ‖XWᵀ‖² on the calibration inputs in the pruned model, with
            W' as written back. Empty without a walk.
        dampings: Matrix name → damping used, for matrices where the requested damping failed.
        unseen: Names of matrices that no calibration token reached, and that were pruned by magnitude; under a given
            mask their kept weights stay what they were.
        seconds: Wall-clock time.
    """

    masks: MaskSet
    errors: dict[str, float] = field(default_factory=dict)
    dampings: dict[str, float] = field(default_factory=dict)
    unseen: list[str] = field(default_factory=list)
    seconds: float = 0.0


def prune(
    model: "PreTrainedModel",
    blocks_NT: Tensor | None,
    *,
    method: str = DEFAULT,
    pattern: Pattern | float | str = 0.5,
    layer_sparsity: Sequence[float] | None = None,
    owl: OwlOptions | None = None,
    fisher: FisherOptions | float | None = None,
    mask: MaskSet | None = None,
    weights: Mapping[str, Weight] | None = None,
    options: MethodOptions | None = None,
    walk: WalkOptions | None = None,
    update: bool = True,
    base_model: str | None = None,
    revision: str | None = None,
    progress: bool = True,
) -> Pruned:
    """Prune ``model`` in one shot.

    The decoder blocks are visited in order. A block's matrices are pruned on the inputs that they get when the block,
    still dense, runs on the outputs of the pruned blocks before it. A method that needs no inputs takes no walk where
    the tokens are for an allocation, so that it prunes models that cannot be walked too.

    Args:
        model: Dense base model, on one device, without gates.
        blocks_NT: Calibration tokens, LongTensor[sequences, seq_length]; None for methods that need no inputs: there
            is no walk then, and no layer errors.
        method: Name of a method in :data:`leap_pl.oneshot.methods.METHODS`.
        pattern: ``Unstructured(sparsity)`` or ``NM(n, m)``; or a sparsity, or ``2:4``.
        layer_sparsity: Sparsity for each decoder block, instead of the pattern's.
        owl: Settings to allocate the sparsity over the blocks by OWL.
        fisher: Settings to allocate the sparsity by Fisher information over the matrices and, for methods whose weights
            compete within a row, also over the rows; or their strength alone.
        mask: Mask to keep, for methods that have ``solve_kept``: only its kept weights are updated, to fit the dense
            layer's outputs on the inputs in the pruned model. ``pattern`` is not used.
        weights: Weights to prune, as :func:`leap_pl.base_model.weights.find_weights` returns them; None: its default.
        options: Settings of the method, of its own class; None: the defaults.
        walk: Batch size and device.
        update: Write masked or updated weights into ``model``. False: ``model`` is bit-identical afterwards.
        base_model: Name of the model for the MaskSet; None: the name in its config.
        revision: Revision of the base model on the hub, for the MaskSet.
        progress: Show a progress bar.

    Returns:
        The masks, the layer errors, and further facts of the run.

    Raises:
        UserError: A setting is invalid or contradicts another, the model cannot be walked, or a weight or an input is
            not finite; the message names it.
    """
    started = time.monotonic()
    if isinstance(pattern, str):
        pattern = parse_pattern(pattern, 0.0)
    elif not isinstance(pattern, Unstructured | NM):
        pattern = Unstructured(float(pattern))
    check_kinds(owl, fisher)
    fisher = FisherOptions(fisher) if isinstance(fisher, int | float) else fisher
    weights = dict(weights) if weights is not None else find_weights(model)
    asked = method_named(method)
    if fisher is not None and not asked.by_row:  # it would be recorded, and no weights compete within a row
        fisher = replace(fisher, row_strength=0.0)
    allocation = {"--layer_sparsity": layer_sparsity, "--owl": owl, "--fisher": fisher}
    given = [flag for flag, value in allocation.items() if value is not None]
    check_blocks(method, blocks_NT, given)
    check_settings(method, pattern, given, options, masked=mask is not None)
    if blocks_NT is not None:
        named = base_model or "the model"
        check_tokens(blocks_NT, vocabulary_of(model), named)
        check_sequence_length(model.config, blocks_NT.shape[1], named, "seq_length")
        first_target = max((walk or WalkOptions()).first_target, 1)
        if fisher is not None and blocks_NT.shape[1] <= first_target:
            raise UserError(
                f"Fisher allocation predicts tokens, and sequences of {blocks_NT.shape[1]} have none to predict. Give "
                f"{first_target + 1} or more with --seq_length."
            )
    matrices = by_block(model, weights)
    if mask is not None:
        mask.check(model, weights)
    elif update:
        warn_of_zeros(weights)
    provenance = Provenance(
        base_model=base_model or getattr(model.config, "name_or_path", "") or type(model).__name__,
        fingerprint=model_fingerprint(model),
        method=method,
        sparsity=pattern.sparsity,
        revision=revision,
        versions=installed_versions(),
    )
    config: dict[str, Any] = {"pattern": str(pattern)}
    if blocks_NT is not None:
        config |= {"sequences": blocks_NT.shape[0], "seq_length": blocks_NT.shape[1]}
    if asked.settings is not None:
        options = options or asked.settings()
        config |= asdict(options)

    if owl is not None:
        assert blocks_NT is not None
        of_owl = replace(walk or WalkOptions(), keep=True, instead="Give --owl false")
        with Walk(model, blocks_NT, of_owl) as dense_walk:
            layer_sparsity = owl_sparsities(dense_walk, matrices, pattern.sparsity, owl)
        config["owl"] = asdict(owl)
        logger.info("OWL sparsities: %s", ", ".join(f"{s:.4f}" for s in layer_sparsity))
    if layer_sparsity is not None:
        if len(layer_sparsity) != len(matrices):
            raise UserError(
                f"{len(layer_sparsity)} layer sparsities were given, and the model has {len(matrices)} decoder blocks."
            )
        config["layer_sparsity"] = list(layer_sparsity)
    patterns: Mapping[str, Unstructured] | None = None
    if layer_sparsity is not None:
        each = zip(layer_sparsity, matrices, strict=True)
        patterns = {matrix.name: Unstructured(sparsity) for sparsity, block in each for matrix in block}
    elif fisher is not None:
        assert blocks_NT is not None
        every = [matrix for block in matrices for matrix in block]
        patterns = fisher_allocation(model, every, blocks_NT, pattern.sparsity, fisher, walk, progress)
        config["fisher"] = asdict(fisher)
        logger.info("Fisher allocation: %s", ", ".join(f"{n} {p.sparsity:.4f}" for n, p in patterns.items()))

    run = _Run(asked, pattern, patterns, options, mask, update, weights)
    if blocks_NT is None or (asked.needs is None and (owl is not None or fisher is not None)):
        device = None if walk is None or walk.device is None else torch.device(walk.device)
        with torch.no_grad():
            for block, module in zip(bar(matrices, progress), decoder_blocks(model)[1], strict=True):
                with nullcontext() if device is None else on_device(module, device, keep=not update):
                    run.block(block, {})
    else:
        walk = replace(walk or WalkOptions(), keep=not update)
        if mask is not None:  # which no method without a walk keeps
            walk = replace(walk, instead=f"{walk.instead} without --mask")
        with Walk(model, blocks_NT, walk) as pruned_walk:
            shown = bar(pruned_walk, progress)
            for index in shown:
                statistics = pruned_walk.observe(index, matrices[index], gram=asked.needs == "gram")
                touched = {} if update else {m.weight.name: m.weight.parameter for m in matrices[index]}
                saved = [(parameter, parameter.data) for parameter in touched.values()]
                for parameter, dense in saved:
                    parameter.data = dense.clone()
                try:
                    run.block(matrices[index], statistics, shown)
                    if index < len(matrices) - 1:
                        pruned_walk.advance(index)
                finally:
                    for parameter, dense in saved:
                        parameter.data = dense
    if run.unseen:
        logger.warning(
            "No calibration token reached %s, or its inputs are all 0: %s. More sequences may reach them.",
            listing(run.unseen, 6),
            f"pruned by {FALLBACK}" if mask is None else "the weights that the mask keeps stay as they are",
        )
    if patterns is not None:
        provenance = replace(provenance, sparsity=round(MaskSet(run.masks(), provenance).sparsity, 6))
    if mask is not None:
        update_config = {"method": method, "target": "layer", **config}
        update_config.pop("pattern")
        masks = for_other_weights(mask)
        masks = masks.with_provenance(config={**masks.provenance.config, "weight_update": update_config})
    else:
        masks = MaskSet(run.masks(), replace(provenance, config=config))
    return Pruned(masks, run.errors, run.dampings, run.unseen, time.monotonic() - started)


class _Run:
    """One pruning run: prunes the matrices block by block, and collects the results."""

    def __init__(
        self,
        method: Method,
        pattern: Pattern,
        patterns: Mapping[str, Pattern] | None,
        options: MethodOptions | None,
        mask: MaskSet | None,
        update: bool,
        weights: Mapping[str, Weight],
    ) -> None:
        self.method, self.pattern, self.patterns = method, pattern, patterns
        self.options, self.mask, self.update = options, mask, update
        self.shapes = {name: tuple(weight.parameter.shape) for name, weight in weights.items()}
        self.bits: dict[str, Tensor] = {}
        self.errors: dict[str, float] = {}
        self.dampings: dict[str, float] = {}
        self.unseen: list[str] = []

    @full_float32()
    def block(self, matrices: Sequence[Matrix], statistics: Mapping[str, InputStatistics], shown: Any = None) -> None:
        """Prune the matrices of one block and write the results into the model."""
        names = {matrix.weight.name for matrix in matrices}
        masks = {name: torch.empty(self.shapes[name], dtype=torch.bool, device="cpu") for name in names}
        given = {} if self.mask is None else {name: self.mask.masks[name] for name in names}
        for matrix in matrices:
            pattern = self.pattern if self.patterns is None else self.patterns[matrix.name]
            dense_OI = matrix.dense()
            if not bool(torch.isfinite(dense_OI).all()):
                raise UserError(
                    f"{matrix.name} holds NaN or infinity. Check the model's file, or load another --dtype."
                )
            found = statistics.get(matrix.name)
            given_OI = matrix.view(given[matrix.weight.name]).to(dense_OI.device) if given else None
            solution = self._solve(matrix, dense_OI, found, pattern, given_OI)
            matrix.view(masks[matrix.weight.name]).copy_(solution.mask)
            if not statistics and not self.update:  # no walk goes on with these weights
                continue
            place_OI = matrix.view(matrix.weight.parameter)
            if solution.weight is not dense_OI:
                place_OI.copy_(solution.weight)
                if not bool(torch.isfinite(place_OI).all()):
                    kind = str(place_OI.dtype).removeprefix("torch.")
                    raise UserError(
                        f"{matrix.name}: the method gives it weights that are too large for {kind}. Load the model in "
                        "another --dtype, bfloat16 or float32."
                    )
            # Zeros by assignment, not by a product: kept weights that the method did not change keep every bit.
            place_OI.masked_fill_(~solution.mask, 0)
            if found is not None:
                error = self.errors[matrix.name] = found.error(dense_OI, place_OI.float())
                logger.debug("%s: layer error %.5f", matrix.name, error)
                if shown is not None:
                    shown.set_postfix_str(f"{matrix.weight.projection} error {error:.4f}", refresh=sys.stderr.isatty())
        self.bits |= {name: pack(mask) for name, mask in masks.items()}

    def masks(self) -> PackedMasks:
        """Return the masks of all blocks, in the order of the weights."""
        return PackedMasks({name: self.bits[name] for name in self.shapes}, self.shapes)

    def _solve(
        self,
        matrix: Matrix,
        dense_OI: Tensor,
        found: InputStatistics | None,
        pattern: Pattern,
        given_OI: Tensor | None,
    ) -> Solution:
        unseen = self.method.needs is not None and (found is None or not found.reached())
        if unseen:
            self.unseen.append(matrix.name)
            if given_OI is not None:
                return Solution(dense_OI, given_OI, 0.0)
        method, options = (METHODS[FALLBACK], None) if unseen else (self.method, self.options)
        inputs = () if method.needs is None else (getattr(found, method.needs),)
        settings = () if options is None else (options,)
        solve = method.function(kept=given_OI is not None)
        try:
            answer = solve(dense_OI, *inputs, pattern if given_OI is None else given_OI, *settings)
        except NotSolvableError as error:
            raise UserError(
                f"{matrix.name}: {error}. Its calibration inputs are too extreme; prune it with --method {DEFAULT}."
            ) from error
        solution: Solution = answer if method.updates else Solution(dense_OI, answer, 0.0)
        asked = 0.0 if options is None else options.damping
        if solution.damping != asked:
            self.dampings[matrix.name] = solution.damping
            logger.warning("%s: damping %g failed, %g was used.", matrix.name, asked, solution.damping)
        return solution


def by_block(model: "PreTrainedModel", weights: Mapping[str, Weight]) -> list[list[Matrix]]:
    """Return the matrices of ``weights``, in one list for each decoder block.

    Raises:
        UserError: A weight is outside the decoder blocks.
    """
    from torch.nn.utils import parametrize

    outside = [name for name, weight in weights.items() if weight.layer is None]
    if outside:
        raise UserError(
            f"one-shot pruning visits only the decoder blocks, and {listing(outside, 3)} is outside them. Add it to "
            "--ignore."
        )
    gated = [name for name, w in weights.items() if parametrize.is_parametrized(w.module, w.tensor)]
    if gated:
        raise UserError(f"{listing(gated, 3)} has a gate on it. Prune a model without gates.")
    matrices: list[list[Matrix]] = [[] for _ in decoder_blocks(model)[1]]
    for weight in weights.values():
        assert weight.layer is not None
        matrices[weight.layer] += Matrix.of(weight)
    return matrices


def bar(over: Any, show: bool, what: str = "pruning") -> Any:
    """Return a progress bar over blocks."""
    return tqdm(over, desc=what, unit="block", disable=not show, dynamic_ncols=True)
