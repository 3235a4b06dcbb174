"""Load base models: by hub id, from a folder or from a GGUF file."""

import re
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from leap_pl.base_model.backbone import disable_rescaling
from leap_pl.base_model.config import is_packed_config, left_out, load_config
from leap_pl.base_model.hub_kernels import NO_KERNELS, without_hub_kernels
from leap_pl.base_model.model_sizes import check_skeleton
from leap_pl.base_model.place import locate, reading, stored_dtype, stored_weights
from leap_pl.base_model.stored_weights import read_shapes
from leap_pl.base_model.weights import ROUNDED, STORED, decoder_blocks, model_fingerprint, rest_fingerprint
from leap_pl.errors import UserError, listing, warn_once
from leap_pl.inputs.hub import local_folder
from leap_pl.inputs.plain_values import shown

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Memory = Literal["auto", "packed", "dense"]

_SHARED = ("k_proj", "v_proj", "k_norm", "v_norm")  # layers of blocks that use other blocks' keys and values
DEQUANTIZED = ("fp8", "mxfp4", "mxfp8", "compressed-tensors")  # formats that transformers can turn into plain weights


def load_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: Dtype = "auto",
    dropout: bool = True,
    memory: Memory = "dense",
    trust_remote_code: bool = False,
) -> "PreTrainedModel":
    """Load the causal language model ``name``, in eval mode, on the CPU.

    Args:
        name: Hub id, local folder, or local GGUF file (its quantised blocks are dequantised to ``dtype``).
        revision: Branch, tag or commit on the hub; None is the latest.
        dtype: Data type of the weights; ``auto`` is the one that most of them are stored in, whatever ``config.json``
            says, so that none is rounded; bfloat16 for a GGUF file that is quantised.
        dropout: False sets every dropout probability of the model to 0. Learning a mask of frozen weights needs
            this, since the dense teacher must be deterministic.
        memory: Form in memory of weights that are packed in the files (leap_pl.sparse): dense, packed, or whichever
            decodes faster. Only dense ones can be gated, pruned or saved.
        trust_remote_code: Run code that comes with the model.

    Raises:
        UserError: The model does not exist, cannot be reached or read, is no causal language model, lacks weights, or
            is quantised in a format that transformers does not turn into plain weights.
    """
    load = {"auto": _load_as_stored, "float16": _load_float16}.get(dtype, partial(_load, dtype=dtype))
    return load(name, revision=revision, dropout=dropout, memory=memory, trust_remote_code=trust_remote_code)


def _load(
    name: str, *, revision: str | None, dtype: Dtype, dropout: bool, memory: Memory, trust_remote_code: bool
) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM, GgufConfig

    folder, gguf_file = locate(name)
    config = load_config(name, revision=revision, trust_remote_code=trust_remote_code)
    _check_causal(config, name)
    if parts := left_out(config):
        warn_once(f"base model {name}: its text model alone is loaded, and written, without its {listing(parts)}.")
    if not dropout:
        _disable_dropout(config)
    if is_packed_config(config):
        config.quantization_config["memory"] = memory
    dequantised = _dequantise(config, name)
    kernels = nullcontext() if trust_remote_code else without_hub_kernels()
    with kernels, reading("base model", name, trusted=trust_remote_code):
        stored = stored_weights(folder, gguf_file)
        check_skeleton(config, stored, name, trust_remote_code=trust_remote_code)
        if gguf_file is None:
            as_stored = None if stored is None or dequantised or dtype != "auto" else stored.dtype
            model, found = AutoModelForCausalLM.from_pretrained(
                folder,
                revision=revision,
                config=config,
                dtype=as_stored or dtype,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **NO_KERNELS,
            )
            if getattr(model, "is_quantized", False) and not is_packed_config(config):
                raise _quantised(name, getattr(config, "quantization_config", None))
            _check_complete(found, model, name, plain=not dequantised)
        else:
            resolved = getattr(torch, stored_dtype(folder, gguf_file) if dtype == "auto" else dtype)
            quantised, found = AutoModelForCausalLM.from_pretrained(
                folder,
                gguf_file=gguf_file,
                quantization_config=GgufConfig(dequantize=True),
                dtype=resolved,
                output_loading_info=True,
                **NO_KERNELS,
            )
            _check_complete(found, quantised, name, plain=True)
            # transformers refuses to save a model loaded from a GGUF file, so its weights move to an ordinary model:
            # one without weights of its own, since initialising and copying them takes twice the memory and a while.
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=resolved)
            model.load_state_dict(quantised.state_dict(), assign=True)
            _take_buffers(model, quantised)
            model.tie_weights()
            model.generation_config = quantised.generation_config
    disable_rescaling(model)
    return model.eval()


def _check_causal(config: "PreTrainedConfig", name: str) -> None:
    """Check that the model continues a text, from what comes before alone.

    transformers makes a causal model of many others too: of an encoder whose tokens see those after them, and of the
    decoder of an encoder-decoder model, without its encoder.

    Raises:
        UserError: It is one of these.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    kind = ""
    if getattr(config, "is_encoder_decoder", False):
        kind = "has an encoder and a decoder"
    elif config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        kind = "fills masks: each token sees those after it"
    if kind:
        raise UserError(
            f"base model {name} ({shown(config.model_type)}) {kind}. leap_pl is for models that continue a text: give "
            "one of these, such as Qwen/Qwen2.5-0.5B."
        )


def _take_buffers(model: "PreTrainedModel", other: "PreTrainedModel") -> None:
    """Give ``model`` the buffers of ``other`` that a state dict does not have, such as the rotary frequencies."""
    stored = model.state_dict().keys()
    for name, buffer in other.named_buffers():
        if name not in stored:
            owner, _, tensor = name.rpartition(".")
            model.get_submodule(owner).register_buffer(tensor, buffer, persistent=False)


def _load_as_stored(name: str, *, revision: str | None, **options: Any) -> "PreTrainedModel":
    """Load a model in the data type that most of its weights are stored in.

    transformers' ``auto`` is that of ``config.json`` first. In it an export would round weights that it calls the base
    model's, and their fingerprint would be another than that of a run, which loads them in a type of its own.
    """
    model = _load(name, dtype="auto", revision=revision, **options)
    if locate(name)[1] is not None or getattr(model.config, "quantization_config", None):
        return model
    stored = read_shapes(local_folder(name, revision=revision))  # of the hub the files are here only now
    if stored is None or stored.dtype is None:
        return model
    if stored.dtype != model.dtype:
        del model  # do not hold two
        model = _load(name, dtype=cast(Dtype, str(stored.dtype).removeprefix("torch.")), revision=revision, **options)
    if rounded := stored.rounded_in(dict(model.named_parameters()), model.dtype, decoder_blocks(model)[0]):
        setattr(model, ROUNDED, True)
        usual = str(model.dtype).removeprefix("torch.")
        warn_once(
            f"base model {name}: most of its weights are stored in {usual}, to which {listing(rounded, 3)} are rounded."
        )
    return model


def _load_float16(name: str, **options: Any) -> "PreTrainedModel":
    """Load a model in float16, with the fingerprints of its weights as they are stored.

    float16 rounds what is small in bfloat16, so that the fingerprint of the rounded weights would be another model's.
    """
    model = _load_as_stored(name, **options)
    if model.dtype == torch.float16:
        return model
    fingerprints = model_fingerprint(model), rest_fingerprint(model)
    del model  # do not hold two
    model = _load(name, dtype="float16", **options)
    setattr(model, STORED, dict(zip((model_fingerprint(model), rest_fingerprint(model)), fingerprints, strict=True)))
    return model


def _dequantise(config: "PreTrainedConfig", name: str) -> bool:
    """Have quantised weights dequantised, on every host alike; return whether there are such.

    Raises:
        UserError: They are of another format. One that transformers does not know it would read as plain weights.
    """
    if is_packed_config(config):
        return True
    found = False
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        stored = getattr(part, "quantization_config", None)
        if not stored:
            continue
        if not (isinstance(stored, dict) and stored.get("quant_method") in DEQUANTIZED):
            raise _quantised(name, stored)
        found = stored["dequantize"] = True
    return found


def _quantised(name: str, stored: Any) -> UserError:
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    return UserError(
        f"base model {name}: its weights are quantised ({shown(str(method or 'of some kind'))}), so that they cannot "
        "be gated, pruned or measured as they are. Give the model that it was made from."
    )


def _check_complete(found: dict[str, Any], model: "PreTrainedModel", name: str, *, plain: bool) -> None:
    """Check that the model has taken all of its weights from the files, and no other model's.

    Files may contain what a causal language model does not need, such as the parts of a vision model, tables, and
    layers that predict further tokens; but nothing else of a layer that it has, such as a bias or the scale of
    quantised weights, no layers that blocks of its class do not have, and no further blocks. If they are not ``plain``,
    scales were used when they were read.

    Raises:
        UserError: They lack weights, or contain more.
    """
    if found["missing_keys"]:  # transformers warns, and initializes them at random
        raise UserError(
            f"base model {name} lacks the weights {listing(sorted(found['missing_keys']), 3)}. Check that the "
            "files are complete, and that config.json belongs to them."
        )
    unread = found["unexpected_keys"]
    if unread and (more := _of_layers(unread, model, plain=plain)):
        raise UserError(
            f"base model {name}: a {type(model).__name__} does not read {listing(more, 3)}, which its files contain, "
            "so that it would be another model. Check that config.json belongs to them and that they are not quantised."
        )


def _of_layers(keys: Iterable[str], model: "PreTrainedModel", *, plain: bool) -> list[str]:
    """Return which tensors that ``model`` has not read belong to one of its layers, or are further blocks."""
    text, within = model.config.get_text_config(), f"{model.base_model_prefix}."
    blocks, there = decoder_blocks(model)
    names = "|".join(map(re.escape, (blocks, blocks.removeprefix(within))))
    further = getattr(text, "num_nextn_predict_layers", None) or 0  # behind the others: they predict a further token
    shared = bool(getattr(text, "num_kv_shared_layers", None))
    layers = {name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))}
    found = []
    for key in sorted(keys):
        owner, _, leaf = key.rpartition(".")
        block = re.fullmatch(rf"(?:{names})\.(\d+)\..+", key)
        if block is not None and int(block[1]) >= len(there):
            belongs = int(block[1]) >= len(there) + further
        elif shared and owner.rpartition(".")[2] in _SHARED:
            belongs = False
        elif {owner, within + owner, owner.removeprefix(within)} & layers:
            belongs = plain or leaf in ("weight", "bias")
        else:
            belongs = block is not None and leaf == "weight"  # of a layer that blocks of this class do not have
        if belongs:
            found.append(key)
    return found


def _disable_dropout(config: "PreTrainedConfig") -> None:
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for key, value in part.to_dict().items():
            if "drop" in key and isinstance(value, float):
                setattr(part, key, 0.0)
