"""Loading of packed folders by transformers: the weights stay packed in memory, or are unpacked one at a time.

Imported when transformers is (:mod:`leap_pl.sparse.registration`). transformers builds the model without weights; this
module gives each packed weight the shapes that it has in the files; transformers loads the tensors; and this module
checks them and makes of each a :class:`PackedLinear` or a dense weight. At no time is more in memory than the loaded
weights, each in its packed or its final form, and one dense weight.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from leap_pl.base_model.stored_weights import BITMAP, PACKED_METHOD, SCALE
from leap_pl.errors import UserError, warn_once
from leap_pl.inputs.plain_values import shown
from leap_pl.sparse.packed_file import FORMAT, FORMAT_VERSION, Stored, check_sums, names_in, read_headers
from leap_pl.sparse.packed_linear import PackedLinear, worth_packing
from leap_pl.sparse.packed_weight import FLOATS, PackedWeight

MEMORY = ("auto", "packed", "dense")
INITIALISED = "_is_hf_initialized"  # how transformers marks a module whose weights are not to be initialised


@register_quantization_config(PACKED_METHOD)
class PackedConfig(QuantizationConfigMixin):
    """Contents of ``quantization_config`` in the ``config.json`` of a packed folder.

    Attributes:
        memory: Form of the weights in memory: ``packed``; ``dense``, which gives an ordinary model; or ``auto``, for
            each weight the one that decodes faster.
    """

    def __init__(
        self, memory: str = "auto", format: str = "", format_version: int | None = None, **facts: object
    ) -> None:
        """Hold the settings of a folder.

        Raises:
            UserError: The folder is of another version of the format, or ``memory`` is none of the three.
        """
        if (format, format_version) != (FORMAT, FORMAT_VERSION):
            raise UserError(
                f"the model is packed in format version {shown(str(format_version), 20)}, and this leap_pl reads "
                f"version {FORMAT_VERSION}. Update leap_pl: pip install --upgrade leap_pl"
            )
        if memory not in MEMORY:
            raise UserError(f"memory is {shown(str(memory), 60)}; give {', '.join(MEMORY)}.")
        self.quant_method = PACKED_METHOD
        self.format, self.format_version, self.memory = format, format_version, memory
        self.facts = {name: fact for name, fact in facts.items() if name != "quant_method"}
        self.dequantize = memory == "dense"  # read by transformers: the model will be an ordinary one

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as they are in ``config.json``."""
        own = {name: getattr(self, name) for name in ("quant_method", "format", "format_version", "memory")}
        return {**own, **self.facts}


@register_quantizer(PACKED_METHOD)
class PackedQuantizer(HfQuantizer):
    """Loader of packed weights, called by ``from_pretrained``."""

    requires_calibration = True  # transformers refuses to pack a dense model while loading it
    quantization_config: PackedConfig

    def __init__(self, quantization_config: PackedConfig, **options: Any) -> None:
        """Prepare to load one model."""
        super().__init__(quantization_config, **options)
        self.stored: dict[str, Stored] = {}  # by the name in the model
        self.dtypes: dict[str, torch.dtype] = {}  # of the dense weight

    def is_serializable(self, *args: object, **options: object) -> bool:
        """Return False: ``leap_pl export`` writes packed folders, and ordinary ones from them."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Return False: packed weights have no gradients."""
        return False

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **options: Any
    ) -> None:
        """Give each packed weight the shapes that its tensors have in the files."""
        files = [Path(file) for file in checkpoint_files or []]
        for file in files:
            check_sums(file)
        names = names_in(files)
        for stored_name, stored in read_headers(files)[0].items():
            name, owner, tensor = _find(model, stored_name)
            dense = getattr(owner, tensor)
            if tuple(dense.shape) != stored.shape:
                raise UserError(
                    f"the packed weight {shown(name)} has the shape {list(stored.shape)}, and by config.json it has "
                    f"{list(dense.shape)}. Check that config.json belongs to the files."
                )
            if dense.dtype not in FLOATS:
                raise UserError(
                    f"packed weights cannot be loaded in {str(dense.dtype).removeprefix('torch.')}. Load the model in "
                    "float32, bfloat16 or float16, or unpack it: leap_pl export --model PACKED --format huggingface "
                    "--output_dir FOLDER."
                )
            self.stored[name], self.dtypes[name] = stored, dense.dtype
            for suffix, (dtype, shape) in stored.parts(dense.dtype).items():
                empty = torch.empty(shape, dtype=dtype, device="meta")
                if suffix:
                    owner.register_buffer(f"{tensor}{suffix}", empty)
                else:
                    setattr(owner, tensor, nn.Parameter(empty, requires_grad=False))
            # transformers initialises what is not marked, and some models read shapes for it that packed weights lack.
            place = stored_name.rpartition(".")[0]
            if all(f"{place}.{sibling}" in names for sibling, _ in owner.named_parameters(recurse=False)):
                setattr(owner, INITIALISED, True)

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """Return the bytes of an element of a loaded tensor, for a device map, which is made before it is unpacked."""
        stored = self.stored.get(param_name)
        if stored is None or self.quantization_config.memory == "packed":
            return param.element_size()
        return math.prod(stored.shape) * self.dtypes[param_name].itemsize / max(param.numel(), 1)

    def postprocess_model(self, model: Any, **options: Any) -> Any:
        """Check the loaded weights, and bring each into its final form."""
        packed, places = 0, _places(model)
        for name, stored in self.stored.items():
            _, owner, tensor = _find(model, name)
            shared = places[id(getattr(owner, tensor))]  # by layers of which some models have several that are one
            weight = _taken(name, owner, tensor, stored.shape)
            if all(self._stays_packed(name, layer, its, weight) for _, layer, its in shared):
                layers: dict[nn.Module, PackedLinear] = {}
                for place, layer, _ in shared:
                    if layer not in layers:
                        bias: Any = layer.bias
                        layers[layer] = PackedLinear(weight, bias, dtype=self.dtypes[name]).train(layer.training)
                    model.set_submodule(place, layers[layer])
                packed += 1
            else:
                dense = nn.Parameter(weight.unpack(self.dtypes[name]))
                for _, layer, its in shared:
                    setattr(layer, its, dense)
        self._report(model, packed)
        self.quantization_config.dequantize = packed == 0
        return super().postprocess_model(model, **options)

    def _stays_packed(self, name: str, owner: nn.Module, tensor: str, weight: PackedWeight) -> bool:
        if self.quantization_config.memory == "dense" or type(owner) is not nn.Linear or tensor != "weight":
            return False
        rows, columns = weight.shape
        return self.quantization_config.memory == "packed" or worth_packing(
            rows, columns, weight.density, self.dtypes[name], weight.values.device
        )

    def _report(self, model: nn.Module, packed: int) -> None:
        if self.quantization_config.memory != "dense" and packed < len(self.stored):
            warn_once(
                f"{len(self.stored) - packed} of {len(self.stored)} packed weights of {type(model).__name__} are dense "
                "in memory: of their size, or in their kind of layer, packed ones are not faster."
            )

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Unpack all weights of a loaded model."""
        for name, layer in list(model.named_modules()):
            if isinstance(layer, PackedLinear):
                dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
                dense.weight = nn.Parameter(layer.packed.unpack(dtype or self.dtypes[f"{name}.weight"]))
                bias: Any = layer.bias
                dense.bias = bias
                model.set_submodule(name, dense.train(layer.training))
        return model


def _find(model: Any, name: str) -> tuple[str, nn.Module, str]:
    """Return the name in ``model`` of a stored weight, its module, and the name of its tensor in that.

    Raises:
        UserError: The model has no such weight.
    """
    prefix = model.base_model_prefix  # a model without a head lacks it, and one with a head may be stored without
    for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        place, _, tensor = candidate.rpartition(".")
        try:
            owner = model.get_submodule(place)
        except AttributeError:
            continue
        if isinstance(getattr(owner, tensor, None), nn.Parameter):
            return candidate, owner, tensor
    raise UserError(
        f"the model of config.json has no weight {shown(name)}. Check that config.json belongs to the files."
    )


def _places(model: nn.Module) -> dict[int, list[tuple[str, nn.Module, str]]]:
    """Return for each parameter, by its identity, all names of the modules that have it, these, and its name there."""
    places: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for tensor, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(id(parameter), []).append((name, module, tensor))
    return places


def _taken(name: str, owner: nn.Module, tensor: str, shape: tuple[int, ...]) -> PackedWeight:
    """Return the loaded tensors of a packed weight, checked, and take them out of their module."""
    values = getattr(owner, tensor).detach()
    if values.is_meta:
        raise UserError(
            f"device_map puts {shown(name)} on the CPU or the disk, from where a layer is copied when it runs, and a "
            "packed weight cannot be. Load the model on devices that hold it, or unpack it: leap_pl export --model "
            "PACKED --format huggingface --output_dir FOLDER."
        )
    setattr(owner, tensor, None)
    bitmap, scale = (dict(owner.named_buffers(recurse=False)).get(f"{tensor}{suffix}") for suffix in (BITMAP, SCALE))
    for suffix in (BITMAP, SCALE) if scale is not None else (BITMAP,):
        delattr(owner, f"{tensor}{suffix}")
    assert bitmap is not None
    try:
        return PackedWeight.of(bitmap, values, scale, shape)
    except UserError as error:
        raise UserError(f"the packed weight {shown(name)} is damaged: {error}. Export the model again.") from error
