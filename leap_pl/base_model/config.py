"""Configuration of a base model, which is refused if loading the model would run code or load another model."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from leap_pl.base_model.place import check_description, check_in_reach, locate, reading
from leap_pl.base_model.stored_weights import PACKED_METHOD
from leap_pl.errors import UserError
from leap_pl.inputs.plain_values import shown

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

HUB_KERNELS = ("sonicmoe", "deepgemm", "deepgemm_megamoe")  # names of kernels that transformers fetches from the hub
FLASH = re.compile(r"(?:paged\|)?flash_attention_(\d+)")


def load_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> "PreTrainedConfig":
    """Load the configuration of the base model ``name``; raises as :func:`load_model` does."""
    from transformers import AutoConfig

    folder, gguf_file = locate(name)
    extra = {} if gguf_file is None else {"gguf_file": gguf_file}
    check_description(name, folder, gguf_file)
    with reading("base model", name, trusted=trust_remote_code):
        check_in_reach(folder, revision)
        config = AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=trust_remote_code, **extra)
    _check_whole(name, folder, revision)
    _check_usual_weights(name, config)
    if not trust_remote_code:
        _check_plain(name, config)
        _forget_code(config)
    if gguf_file is not None:
        config.name_or_path = name
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    return config


def is_packed_config(config: "PreTrainedConfig") -> bool:
    """Return whether the model of ``config`` is stored with packed weights (leap_pl.sparse)."""
    given = getattr(config, "quantization_config", None)
    return isinstance(given, dict) and given.get("quant_method") == PACKED_METHOD


def other_parts(config: "PreTrainedConfig") -> list[str]:
    """Return the kinds of parts that a multimodal model has beside its text model."""
    return [kind for kind in ("vision", "audio", "video") if hasattr(config, f"{kind}_config")]


def left_out(config: "PreTrainedConfig") -> list[str]:
    """Return the kinds of parts that transformers leaves out where it takes the text model of a multimodal one."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    of_model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return [] if of_model is None or of_model.config_class is type(config) else other_parts(config)


def _check_whole(name: str, folder: str, revision: str | None) -> None:
    """Check that the model is no adapter, which transformers would load with the model that it names as its base.

    Raises:
        UserError: It is one.
    """
    from transformers.utils import find_adapter_config_file

    with reading("base model", name, trusted=False):  # no code is asked for
        adapter = find_adapter_config_file(folder, revision=revision)
    if adapter is not None:
        raise UserError(
            f"base model {name} is an adapter (adapter_config.json) of another model. Merge the two with peft's "
            "merge_and_unload, and give the merged model."
        )


def _check_usual_weights(name: str, config: "PreTrainedConfig") -> None:
    """Check that the weights are in files of the usual names, which the settings are compared with.

    Raises:
        UserError: The settings of the model, or of a part of it, name others, which transformers would load.
    """
    if any(getattr(part, "transformers_weights", None) is not None for part in _parts_of(config)):
        raise UserError(
            f"the config.json of base model {name} names other files of weights (transformers_weights), which its "
            "settings are not compared with. Remove it, and give the weights a usual name: model.safetensors."
        )


def _check_plain(name: str, config: "PreTrainedConfig") -> None:
    """Check that the model asks for no attention kernels from the hub, which are code, and load without asking.

    Raises:
        UserError: It does.
    """
    for part in _parts_of(config):
        for key in ("_attn_implementation", "_experts_implementation"):
            kernel = getattr(part, key, None)
            if not isinstance(kernel, str):
                continue
            remove = f"Remove {key.removeprefix('_')} from it, or add --trust_remote_code."
            if "/" in kernel or kernel in HUB_KERNELS:
                raise UserError(
                    f"the config.json of base model {name} asks for kernels from the hub ({shown(kernel)}), which are "
                    f"code. {remove}"
                )
            if not _has_attention(kernel, part):
                raise UserError(
                    f"the config.json of base model {name} asks for {shown(kernel)}, which is not installed, and "
                    f"transformers may fetch it from the hub. {remove}"
                )


def _forget_code(config: "PreTrainedConfig") -> None:
    """Remove the names of the model's code, which is not run: what is saved of the model will not have it.

    They stay where transformers has no class of its own for the model, which is refused for its code then.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) is not None:
        for part in _parts_of(config):
            vars(part).pop("auto_map", None)


def _has_attention(kernel: str, config: "PreTrainedConfig") -> bool:
    """Return whether a kind of attention needs nothing, or flash attention that is installed and runs here.

    transformers takes every word with "flash" in it for flash attention, and some models replace it by kernels of the
    hub.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.utils import import_utils

    if "flash" not in kernel:
        return True
    found = FLASH.fullmatch(kernel)
    available = None if found is None else getattr(import_utils, f"is_flash_attn_{found[1]}_available", None)
    if available is None or not available():
        return False
    instead = getattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), "_compatible_flash_implementations", None)
    return instead is None or kernel.removeprefix("paged|") in instead


def _parts_of(config: "PreTrainedConfig") -> "Iterator[PreTrainedConfig]":
    """Yield ``config`` and those of the model's parts, such as a vision tower, which are built too."""
    from transformers import PreTrainedConfig

    yield config
    # Values as they are stored: of a setting that differs by layer, getattr raises.
    for part in list(vars(config).values()):
        if isinstance(part, PreTrainedConfig):
            yield from _parts_of(part)
