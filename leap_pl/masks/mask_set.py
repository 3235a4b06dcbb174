"""MaskSet: the hard masks of a base model's weights, with provenance. Everything that makes or uses a mask uses it.

On disk a MaskSet is one safetensors file. It has one uint8 tensor for every weight, of the same name: the mask,
flattened in row-major order, eight elements a byte, the first in the lowest bit, the last byte padded
with zeros. The header's metadata has

===================  ====================================================================================
``format``           ``leap_pl.MaskSet``
``format_version``   ``1``
``shapes``           JSON: weight name → shape
``provenance``       JSON: the fields of :class:`Provenance`
``digest``           SHA-256 of the shapes, the provenance and the packed bits, in hexadecimal
===================  ====================================================================================

A kept element is a one. A mask takes one bit a weight: a sixteenth of a bfloat16 model. The same MaskSet always gives
the same bytes.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
from torch import Tensor, nn

from leap_pl.errors import UserError, listing
from leap_pl.files import atomic_file
from leap_pl.files.tensor_file import damage_in_one_line, tensor_bytes, write_tensors
from leap_pl.inputs.hub import fetch_file, repository_of
from leap_pl.inputs.paths import expanded
from leap_pl.inputs.plain_values import MOST_BYTES, plain, shown
from leap_pl.inputs.records import MASK, MASK_FORMAT, mask_in
from leap_pl.inputs.register import note_input
from leap_pl.masks.bits import PackedMasks, count, pack
from leap_pl.masks.weight_groups import shares, split_name

Model = TypeVar("Model", bound=nn.Module)

if TYPE_CHECKING:
    from leap_pl.base_model.weights import Weight
    from leap_pl.masks.patterns import Pattern, Tiled

FORMAT = MASK_FORMAT
FORMAT_VERSION = 1
ZEROS_AMONG_KEPT = 0.15  # most, of a model that a mask was applied to; 4-bit quantisation alone gives a tenth

# Keys in the config of a provenance: how weights were trained; the provenance of the mask that a run left as it was;
# and that the base model was sparse before the run.
TRAINED, STAYED, SPARSE_BASE = "train_weights", "mask", "sparse_base_model"
BEFORE = "texts_before"  # in TRAINED: settings of the texts that the weights were trained on before this run


@dataclass(frozen=True)
class Provenance:
    """Provenance of a mask: its base model, method and settings.

    Attributes:
        base_model: Name of the base model: hub id, folder or GGUF file.
        fingerprint: Fingerprint of the base model's weights (:func:`leap_pl.base_model.weights.model_fingerprint`).
        method: Method that made the mask: ``magnitude``, ``wanda``, ``leap`` …
        sparsity: Requested sparsity; None for methods without one.
        revision: Revision of the base model on the hub.
        config: Settings of the method, plain JSON values.
        versions: Package name → version.
    """

    base_model: str
    fingerprint: str
    method: str
    sparsity: float | None = None
    revision: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


class MaskSet:
    """Boolean masks by weight name (True: kept), with their provenance.

    >>> mask = MaskSet.load("mask.safetensors")  # or of the hub: "USER/NAME"  # doctest: +SKIP
    >>> mask.apply_(AutoModelForCausalLM.from_pretrained(mask.provenance.base_model))  # doctest: +SKIP
    """

    def __init__(self, masks: Mapping[str, Tensor], provenance: Provenance) -> None:
        """Hold ``masks``: parameter name → bool tensor of the weight's shape.

        Raises:
            ValueError: ``masks`` is empty, or a mask is not of dtype bool.
        """
        if not masks:
            raise ValueError("a MaskSet needs at least one mask")
        self.masks: Mapping[str, Tensor] = masks
        if not isinstance(masks, PackedMasks):
            for name, mask in masks.items():
                if not isinstance(mask, Tensor):
                    raise ValueError(f"the mask of {name} is a {type(mask).__name__}, not a bool tensor")
                if mask.dtype != torch.bool:
                    raise ValueError(f"the mask of {name} is {mask.dtype}, not bool")
            self.masks = dict(masks)
        self.provenance = provenance

    def __repr__(self) -> str:
        """Return what the mask is: method, base model and sparsity, with the number of weights."""
        made = self.provenance
        return (
            f"MaskSet({shown(made.method)} of {shown(made.base_model)}, fingerprint {shown(made.fingerprint)}: "
            f"sparsity {self.sparsity:.6f}, {self.kept:,} of {self.total:,} weights kept, {len(self.masks)} tensors)"
        )

    # -- properties ---------------------------------------------------------------------------------------

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each mask, which is that of its weight."""
        if isinstance(self.masks, PackedMasks):
            return dict(self.masks.shapes)
        return {name: tuple(mask.shape) for name, mask in self.masks.items()}

    @property
    def total(self) -> int:
        """Return the total number of masked elements, kept and removed."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def counts(self) -> dict[str, tuple[int, int]]:
        """Return the numbers of kept elements, and of all, of each mask; bits are counted as they are."""
        if isinstance(self.masks, PackedMasks):
            return {name: (count(self.masks.packed[name], of), math.prod(of)) for name, of in self.masks.shapes.items()}
        return {name: (int(mask.sum()), mask.numel()) for name, mask in self.masks.items()}

    @property
    def kept(self) -> int:
        """Return the number of kept elements."""
        return sum(kept for kept, _ in self.counts().values())

    @property
    def sparsity(self) -> float:
        """Return the realised sparsity: removed over total."""
        return 1 - self.kept / self.total

    def densities(self, by: str = "layer") -> dict[str, float]:
        """Return the density, kept over all, for each ``weight``, ``layer`` (decoder block) or ``projection``.

        Raises:
            UserError: ``by`` is none of these.
        """
        if by not in ("weight", "layer", "projection"):
            raise UserError(f"densities by {shown(repr(by))}: give weight, layer or projection.")

        def key(name: str) -> tuple[str]:
            layer, projection = split_name(name)
            return ({"weight": name, "layer": str(layer), "projection": projection}[by],)

        return shares(self.counts(), key)

    def check(
        self, model: nn.Module, weights: Mapping[str, "Weight"] | None = None, *, or_applied: bool = False
    ) -> bool:
        """Check that this mask belongs to ``model`` and, if given, to exactly these ``weights``.

        Args:
            model: Model to check.
            weights: Gated weights of ``model``.
            or_applied: Accept also a model that this mask was applied to: all weights that it removes are 0 there,
                and those that it keeps may be others than the base model's.

        Returns:
            Whether the mask was made for ``model``; False: ``model`` is one that it can have been applied to.

        Raises:
            UserError: The fingerprint of the model differs, or the model lacks some of the weights, or the names or
                shapes of ``weights`` differ.
        """
        from leap_pl.base_model.weights import model_fingerprint

        found = model_fingerprint(model)
        made_for = found == self.provenance.fingerprint
        if not made_for and not (or_applied and self.is_applied_to(model)):
            own = self.shapes
            halved = any(p.dtype == torch.float16 for name, p in model.named_parameters() if name in own)
            rounded = " float16 rounds small weights: load it with dtype='auto', apply the mask, and convert it then."
            raise UserError(
                f"this mask was made for {shown(self.provenance.base_model, 400)} with fingerprint "
                f"{shown(self.provenance.fingerprint)}, and the given model has {found}. "
                "Give the base model it was made for (unpruned, the same revision)"
                + (", or a model that it was applied to." if or_applied else ".")
                + (rounded if halved else "")
            )
        if weights is None:
            existing = {name: parameter.shape for name, parameter in model.named_parameters()}
            unknown = [name for name, mask in self.masks.items() if existing.get(name) != mask.shape]
            if unknown:
                raise UserError(
                    f"the model has no weight {listing([repr(shown(name, 200)) for name in unknown], 3)} of the shape "
                    "that this mask is for. Give the base model it was made for."
                )
            return made_for
        shapes, own = {name: tuple(weight.parameter.shape) for name, weight in weights.items()}, self.shapes
        wrong = [n for n in {**shapes, **own} if shapes.get(n) != own.get(n)]
        if wrong:
            raise UserError(
                f"this mask covers {len(self.masks)} weights, and {len(shapes)} are gated; they differ in "
                f"{listing([shown(name, 200) for name in sorted(wrong)], 4)}. Use the targets and ignore that the mask "
                "was made with."
            )
        return made_for

    @torch.no_grad()
    def is_applied_to(self, model: nn.Module) -> bool:
        """Return whether ``model`` has all weights of this mask, and of these 0 are those that it removes.

        A few of those that it keeps may be 0 as well: one-shot methods set those to 0 whose inputs are 0.
        """
        parameters, shapes = dict(model.named_parameters()), self.shapes
        if any(name not in parameters or tuple(parameters[name].shape) != shapes[name] for name in shapes):
            return False
        kept = zeros = 0
        for name, mask in self.masks.items():
            parameter = parameters[name]
            here = mask.to(parameter.device)
            nonzero = parameter != 0
            if bool((nonzero & ~here).any()):
                return False
            kept += int(here.sum())
            zeros += int((here & ~nonzero).sum())
        return zeros <= ZEROS_AMONG_KEPT * kept

    # -- operations ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def apply_(self, model: Model, *, check: bool = True) -> Model:
        """Set the removed weights of ``model`` to zero in place, and return it; kept weights stay bit-identical.

        Args:
            model: Base model of this mask.
            check: Check that it is, and that this run trained no weights beside the mask.

        Raises:
            UserError: ``model`` is not the base model of this mask (see :meth:`check`); or the weights under it were
                trained, and it does not have them.
        """
        if check:
            if TRAINED in self.provenance.config:
                raise UserError(
                    "weights were trained under this mask, which does not have them. Export the run (leap_pl export), "
                    "and load that folder; apply_(model, check=False) applies the mask alone."
                )
            self.check(model)
        parameters = dict(model.named_parameters())
        missing = [name for name in self.masks if name not in parameters]
        if missing:
            named = listing([shown(name, 200) for name in missing], 3)
            raise UserError(f"the model has no weight {named}, which this mask is for.")
        for name, mask in self.masks.items():
            parameters[name].masked_fill_(~mask.to(parameters[name].device), 0)
        return model

    def digest_of_bits(self) -> str:
        """Return the SHA-256 of names, shapes and bits without provenance, the same for equal masks."""
        digest = hashlib.sha256(f"{json.dumps(self.shapes, sort_keys=True)}\n\n".encode())
        for name in sorted(self.masks):
            _add_to_digest(digest, name, pack(self.masks[name]))
        return digest.hexdigest()

    def packed(self) -> Self:
        """Return the same masks as bits, an eighth of the memory of bool tensors; each access unpacks a mask."""
        masks = self.masks if isinstance(self.masks, PackedMasks) else PackedMasks.of(self.masks.items())
        return type(self)(masks, self.provenance)

    def with_provenance(self, **changes: Any) -> Self:
        """Return the same masks with some fields of the provenance changed."""
        return type(self)(self.masks, replace(self.provenance, **changes))

    def form(self) -> "Pattern | Tiled":
        """Return the form that is recorded for the masks: n:m, tiled or unstructured."""
        from leap_pl.masks.patterns import Unstructured, read_form

        return read_form(str(self.provenance.config.get("pattern", "unstructured"))) or Unstructured(0.0)

    def check_form(self, weights: "Mapping[str, Weight]") -> None:
        """Check that every mask follows the form that is recorded.

        Args:
            weights: Name → weight, of all masks.

        Raises:
            UserError: One does not.
        """
        from leap_pl.masks.patterns import follows

        form = self.form()
        wrong = [name for name, mask in self.masks.items() if not follows(mask, weights[name].input_dim, form)]
        if wrong:
            raise UserError(
                f"the mask is recorded as {form}, and {listing(wrong, 3)} is not. Make the mask again, or use another "
                "copy of the file."
            )

    # -- on disk ------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write the file ``path`` atomically; the same masks and provenance give the same bytes.

        Raises:
            UserError: The file cannot be written.
        """
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        write_masks(path, shapes, self.masks.__getitem__, self.provenance)
        return expanded(path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a MaskSet file, or the ``mask.safetensors`` of a repository of the Hugging Face hub.

        Args:
            path: The file, or the folder of an export, of ``prune`` or of a run that has it; or, as a string that names
                no local path, ``USER/NAME`` of a model repository, or ``USER/NAME@REVISION`` for a branch, tag or
                commit of it.

        Raises:
            UserError: The file does not exist, or is not a MaskSet, of a newer format, truncated or damaged; or the hub
                has no such mask, or cannot be reached.
        """
        from safetensors import safe_open

        from leap_pl.masks.provenance_schema import parse_provenance, parse_shapes

        repository = repository_of(path) if isinstance(path, str) else None
        if repository is not None:
            path = fetch_file(repository[0], MASK, repository[1], what=f"mask {path} is no local file, and")
        path = mask_in(path)
        if path.suffix == ".ckpt":
            raise UserError(
                f"{path} is a checkpoint, not a MaskSet. Use --ckpt_path (export, evaluate), or the run's {MASK}; "
                "leap_pl export --format mask --ckpt_path makes one of any checkpoint."
            )
        if path.is_dir():
            raise UserError(f"{path} is a folder without a {MASK}. Name a MaskSet file, or a folder that has one.")
        if not path.is_file():
            raise UserError(f"{path}: there is no such MaskSet file. Give the path of a {MASK}.")
        note_input(path)
        remedy = "Make the mask again, or use another copy of the file."
        with damage_in_one_line(path, remedy), safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_format(path, metadata)
            if any(len(text) > MOST_BYTES for text in metadata.values()):
                raise ValueError(f"its metadata is larger than {MOST_BYTES >> 20} MiB")
            packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if metadata["digest"] != _digest(metadata["shapes"], metadata["provenance"], packed):
                raise ValueError("its digest does not match its content")
            shapes = parse_shapes(metadata["shapes"])
            provenance = Provenance(**parse_provenance(metadata["provenance"]))
            if set(shapes) != set(packed):
                raise ValueError("its shapes and its bits are of different weights")
            return cls(PackedMasks({name: packed[name] for name in shapes}, shapes), provenance)


def write_masks(
    path: str | Path, shapes: Mapping[str, list[int]], mask: Callable[[str], Tensor], provenance: Provenance
) -> tuple[int, int]:
    """Write a MaskSet file from masks that are computed one at a time.

    Args:
        path: File to write, atomically.
        shapes: Weight name → shape.
        mask: Weight name → its bool mask; called once for each, in the order of sorted names.
        provenance: Provenance of the masks.

    Returns:
        Number of kept elements, and number of all elements.

    Raises:
        UserError: The file cannot be written, or a field of the provenance is of another type than it is read as.
    """
    recorded = plain(asdict(provenance))
    _check_readable(path, recorded)
    shapes_json, provenance_json = json.dumps(shapes), json.dumps(recorded)
    digest = hashlib.sha256(f"{shapes_json}\n{provenance_json}\n".encode())
    kept = 0

    def packed() -> Iterator[tuple[str, Tensor]]:
        nonlocal kept
        for name in sorted(shapes):
            chosen = mask(name)
            kept += int(chosen.sum())
            bits = pack(chosen)
            _add_to_digest(digest, name, bits)
            yield name, bits

    def metadata() -> dict[str, str]:
        return {
            "digest": digest.hexdigest(),
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "shapes": shapes_json,
            "provenance": provenance_json,
        }

    layout = {name: (torch.uint8, [(math.prod(shapes[name]) + 7) // 8]) for name in sorted(shapes)}
    with atomic_file(expanded(path)) as temporary:
        write_tensors(temporary, layout, packed(), metadata)
    return kept, sum(math.prod(shape) for shape in shapes.values())


def _check_readable(path: str | Path, provenance: Any) -> None:
    """Check that :meth:`MaskSet.load` can read ``provenance`` back, where pydantic, which reads it, is installed."""
    if find_spec("pydantic") is None:  # on a machine that only learns, such as that of benchmarks.gpu
        return
    from leap_pl.masks.provenance_schema import provenance_fields

    try:
        provenance_fields(provenance)
    except ValueError as error:  # the file would be written, and never read
        raise UserError(f"{path} was not written: in the provenance of the mask, {error}") from error


def installed_versions() -> dict[str, str]:
    """Return the versions of this package and of the packages that determine its numerical results."""
    from importlib.metadata import version

    from leap_pl.version import __version__

    return {"leap_pl": __version__} | {name: version(name) for name in ("torch", "lightning", "transformers")}


def _check_format(path: Path, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is a safetensors file but not a MaskSet. Give a {MASK} of leap_pl.")
    version = metadata.get("format_version", "")
    if version != str(FORMAT_VERSION):
        raise UserError(
            f"{path} is a MaskSet of format version {shown(version, 20)}, and this leap_pl reads version "
            f"{FORMAT_VERSION}. Update leap_pl: pip install --upgrade leap_pl"
        )


def _digest(shapes: str, provenance: str, packed: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(f"{shapes}\n{provenance}\n".encode())
    for name in sorted(packed):
        _add_to_digest(digest, name, packed[name])
    return digest.hexdigest()


def _add_to_digest(digest: "hashlib._Hash", name: str, bits: Tensor) -> None:
    digest.update(name.encode() + b"\n")
    digest.update(tensor_bytes(bits))
