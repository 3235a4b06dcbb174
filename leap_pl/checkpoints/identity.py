"""Checkpoint identity: the run that a checkpoint belongs to, read by a schema and compared when resuming."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from leap_pl.checkpoints.class_spec import same
from leap_pl.errors import UserError, listing
from leap_pl.inputs.plain_values import display, read

KEY = "leap_pl"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Identity:
    """Model, gated weights and settings that a checkpoint's logits belong to.

    Attributes:
        base_model: Name of the base model.
        revision: Revision of the base model on the hub.
        fingerprint: Fingerprint of the weights in the base model's decoder blocks.
        gate: Class and settings of the gates.
        sparsity: Target sparsity.
        targets: ``targets`` of LeapModule.
        ignore: ``ignore`` of LeapModule.
        max_steps: Length T of every schedule, in optimizer steps.
        shapes: Weight name → shape of the weight.
        input_dims: Weight name → dimension that the inputs of its layer run along.
        rest: Fingerprint of the base model's norms, biases, embeddings and head; None in checkpoints of versions that
            did not store it.
        ranks: Number of processes that learned together.
        accumulation: Micro-batches per rank in an optimizer step.
        dense_perplexity: Perplexity of the dense model on the validation text, once measured.
        dense_perplexity_of: Measurement that ``dense_perplexity`` belongs to
            (:class:`leap_pl.training.validation.Measured`); it is reused for the same measurement only.
        settings: Further settings for the mask's provenance.
        learned_with: Settings that a resumed run adopts and compares, by their names in
            :mod:`leap_pl.checkpoints.settings`; empty in checkpoints of versions that did not store them.
        format_version: Version of the checkpoint format.
    """

    base_model: str
    revision: str | None
    fingerprint: str
    gate: dict[str, Any]
    sparsity: float
    targets: list[str] | None
    ignore: list[str]
    max_steps: int | None
    shapes: dict[str, list[int]]
    input_dims: dict[str, int]
    rest: str | None = None
    ranks: int | None = None
    accumulation: int | None = None
    dense_perplexity: float | None = None
    dense_perplexity_of: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    learned_with: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


def read_identity(checkpoint: dict[str, Any], path: str | Path = "the checkpoint") -> Identity:
    """Return the identity in a loaded ``checkpoint``.

    Raises:
        UserError: If the checkpoint is not of leap_pl, is of another format version, or its identity is damaged.
    """
    stored = checkpoint.get(KEY)
    if not isinstance(stored, dict):
        raise UserError(f"{path} is not a checkpoint of leap_pl fit. Give a .ckpt from a run's checkpoints folder.")
    version = stored.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} is a checkpoint of format version {version}, and this leap_pl reads version {FORMAT_VERSION}. "
            "Update leap_pl: pip install --upgrade leap_pl"
        )
    known = {f.name for f in fields(Identity)}
    identity: Identity = read({key: value for key, value in stored.items() if key in known}, Identity, f"{path}: {KEY}")
    gate, sizes = identity.gate, [size for shape in identity.shapes.values() for size in shape]
    plain_gate = isinstance(gate.get("class_path"), str) and isinstance(gate.get("init_args"), dict)
    if not (plain_gate and 0 <= identity.sparsity < 1 and min(sizes, default=0) > 0):
        raise UserError(
            f"{path} does not say whose logits it holds (gate {display(gate)}, sparsity {identity.sparsity}, "
            f"{len(identity.shapes)} weights). Take the checkpoint before it."
        )
    return identity


def check_same(found: Identity, expected: Identity) -> None:
    """Check that this run can resume from a checkpoint.

    Args:
        found: Identity in the checkpoint.
        expected: Identity of this run.

    Raises:
        UserError: If the checkpoint is of another base model, other gated weights, another gate, another number of
            steps, or another number of micro-batches in a step.
    """
    if found.fingerprint != expected.fingerprint:
        raise UserError(
            f"the checkpoint belongs to {found.base_model} with fingerprint {found.fingerprint}, and the base model "
            f"here is {expected.base_model} with {expected.fingerprint}. Give the model the checkpoint was made for."
        )
    if None not in (found.rest, expected.rest) and found.rest != expected.rest:
        raise UserError(
            f"the checkpoint belongs to {found.base_model}, and {expected.base_model} has the same weights in its "
            "decoder blocks, but other norms, biases, embeddings or head. Give the model the checkpoint was made for."
        )
    if not same(found.gate, expected.gate):
        one_class = found.gate["class_path"] == expected.gate["class_path"]
        raise UserError(
            f"the checkpoint holds logits of {_gate(found, one_class)}, and model.gate is "
            f"{_gate(expected, one_class)}. Use the same gate, or leave --model.gate out."
        )
    if found.shapes != expected.shapes:
        names = {*found.shapes, *expected.shapes}
        wrong = sorted(name for name in names if found.shapes.get(name) != expected.shapes.get(name))
        raise UserError(
            f"the checkpoint gates other weights than this run: they differ in {listing(wrong, 4)}. "
            f"It was made with targets {found.targets} and ignore {found.ignore}; use the same. One that an earlier "
            "version of leap_pl made, resume with leap_pl fit, or on what LeapModule.load_from_checkpoint returns."
        )
    if None not in (found.max_steps, expected.max_steps) and found.max_steps != expected.max_steps:
        raise UserError(
            f"the checkpoint is of a run of {found.max_steps} steps, and trainer.max_steps is {expected.max_steps}: "
            f"every schedule would change. Set --trainer.max_steps {found.max_steps}, or start a new run."
        )
    check_micro_batches(found, expected.ranks, expected.accumulation)


def check_micro_batches(found: Identity, ranks: int | None, accumulation: int | None) -> None:
    """Check that this run has as many micro-batches in an optimizer step as that of a checkpoint.

    Args:
        found: Identity in the checkpoint.
        ranks: Ranks of this run, each with micro-batches of its own; None if unknown.
        accumulation: Micro-batches of each in a step; None if unknown.

    Raises:
        UserError: It has more or fewer.
    """
    if found.ranks is None or found.accumulation is None or ranks is None or accumulation is None:
        return
    before, now = found.ranks * found.accumulation, ranks * accumulation
    if before != now:
        remedy = f"Set --trainer.accumulate_grad_batches {before // ranks}."
        raise UserError(
            f"the checkpoint is of a run of {before} micro-batches an optimizer step ({found.ranks} ranks × "
            f"{found.accumulation}), and here it is {now} ({ranks} × {accumulation}): it would be another run. "
            f"{remedy if before % ranks == 0 else f'Resume on a number of ranks that divides {before}.'}"
        )


def _gate(identity: Identity, with_settings: bool) -> str:
    gate = identity.gate
    return f"{gate['class_path']} with {gate['init_args']}" if with_settings else str(gate["class_path"])
