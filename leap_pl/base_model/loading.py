"""Find and load base models and tokenizers: by hub id, from a folder or from a GGUF file."""

import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError

from leap_pl.base_model.gguf_structure import GgufFile, read_structure
from leap_pl.base_model.model_sizes import check_settings, check_skeleton
from leap_pl.base_model.stored_weights import PACKED_METHOD, StoredWeights, check_sizes, read_settings, read_shapes
from leap_pl.base_model.tokenizer_files import copy_tokenizer
from leap_pl.base_model.weights import STORED, model_fingerprint
from leap_pl.errors import UserError, listing
from leap_pl.inputs.hub import check_reachable, fetch_optional, gated, is_hub_id
from leap_pl.inputs.paths import expanded
from leap_pl.inputs.plain_values import shown
from leap_pl.inputs.register import exists, note_input

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Memory = Literal["auto", "packed", "dense"]

DEQUANTIZED = ("fp8", "mxfp4", "mxfp8", "compressed-tensors")  # formats that transformers can turn into plain weights
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
HUB_KERNELS = ("sonicmoe", "deepgemm")  # names of kernels that transformers fetches from the hub
FLASH = re.compile(r"(?:paged\|)?flash_attention_(\w+)")
_CLEAR_ERRORS = OSError | ValueError | RuntimeError | SafetensorError  # messages that need no class name


def name_of_model(typed: str | None, recorded: str, *, trust_remote_code: bool) -> str:
    """Return the base model to load: the ``typed`` one, or else the one ``recorded`` in a mask or checkpoint.

    Raises:
        UserError: Only the recorded name is known, and it is a path of nothing; or code of the model is to be run. A
            file of unknown origin must not choose whose code runs.
    """
    if typed is None and trust_remote_code:
        raise UserError(
            "--trust_remote_code runs code of the base model, whose name comes only from a file: "
            f"{shown(recorded)}. Confirm it with --model NAME."
        )
    if typed is None and _looks_local(recorded) and not exists(expanded(recorded)):
        raise UserError(
            f"the base model is recorded as {shown(recorded)}, which is not there from this folder. Give its place "
            "with --model."
        )
    return recorded if typed is None else typed


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
        dtype: Data type of the weights; ``auto`` is the one they are stored in (bfloat16 for a GGUF file).
        dropout: False sets every dropout probability of the model to 0. Learning a mask of frozen weights needs
            this, since the dense teacher must be deterministic.
        memory: Form in memory of weights that are packed in the files (leap_pl.sparse): dense, packed, or whichever
            decodes faster. Only dense ones can be gated, pruned or saved.
        trust_remote_code: Run code that comes with the model.

    Raises:
        UserError: The model does not exist, cannot be reached or read, or is quantised in a format that transformers
            does not turn into plain weights.
    """
    load = _load_float16 if dtype == "float16" else partial(_load, dtype=dtype)
    return load(name, revision=revision, dropout=dropout, memory=memory, trust_remote_code=trust_remote_code)


def _load(
    name: str, *, revision: str | None, dtype: Dtype, dropout: bool, memory: Memory, trust_remote_code: bool
) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM, GgufConfig

    folder, gguf_file = _locate(name)
    config = load_config(name, revision=revision, trust_remote_code=trust_remote_code)
    _check_causal(config, name)
    if not dropout:
        _disable_dropout(config)
    if is_packed_config(config):
        config.quantization_config["memory"] = memory
    stored = getattr(config, "quantization_config", None)
    if isinstance(stored, dict) and stored.get("quant_method") in DEQUANTIZED:
        stored["dequantize"] = True  # on every host alike
    with _reading("base model", name):
        check_skeleton(config, _stored(folder, gguf_file), name, trust_remote_code=trust_remote_code)
        if gguf_file is None:
            model, found = AutoModelForCausalLM.from_pretrained(
                folder,
                revision=revision,
                config=config,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
            _check_complete(found, name)
            if getattr(model, "is_quantized", False) and not is_packed_config(config):
                method = (getattr(config, "quantization_config", None) or {}).get("quant_method", "of some kind")
                raise UserError(
                    f"base model {name}: its weights are quantised ({shown(str(method))}), so that they cannot be "
                    "gated, pruned or measured as they are. Give the model that it was made from."
                )
        else:
            resolved = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
            quantised, found = AutoModelForCausalLM.from_pretrained(
                folder,
                gguf_file=gguf_file,
                quantization_config=GgufConfig(dequantize=True),
                dtype=resolved,
                output_loading_info=True,
            )
            _check_complete(found, name)
            # transformers refuses to save a model loaded from a GGUF file, so its weights move to an ordinary model:
            # one without weights of its own, since initialising and copying them takes twice the memory and a while.
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=resolved)
            model.load_state_dict(quantised.state_dict(), assign=True)
            _take_buffers(model, quantised)
            model.tie_weights()
            model.generation_config = quantised.generation_config
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


def _load_float16(name: str, **options: Any) -> "PreTrainedModel":
    """Load a model in float16, with the fingerprint of its weights as they are stored.

    float16 rounds what is small in bfloat16, so that the fingerprint of the rounded weights would be another model's.
    """
    model = _load(name, dtype="auto", **options)
    if model.dtype == torch.float16:
        return model
    fingerprint = model_fingerprint(model)
    del model  # do not hold two
    model = _load(name, dtype="float16", **options)
    setattr(model, STORED, {model_fingerprint(model): fingerprint})
    return model


def is_packed_config(config: "PreTrainedConfig") -> bool:
    """Return whether the model of ``config`` is stored with packed weights (leap_pl.sparse)."""
    given = getattr(config, "quantization_config", None)
    return isinstance(given, dict) and given.get("quant_method") == PACKED_METHOD


def load_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> "PreTrainedConfig":
    """Load the configuration of the base model ``name``; raises as :func:`load_model` does."""
    from transformers import AutoConfig

    folder, gguf_file = _locate(name)
    extra = {} if gguf_file is None else {"gguf_file": gguf_file}
    _check_description(name, folder, gguf_file)
    with _reading("base model", name):
        _check_in_reach(folder, revision)
        config = AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=trust_remote_code, **extra)
    if not trust_remote_code:
        _check_plain(name, folder, revision, config)
    if gguf_file is not None and hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _check_plain(name: str, folder: str, revision: str | None, config: "PreTrainedConfig") -> None:
    """Check that the model consists only of weights for a class of transformers.

    Without this check transformers would load without asking: an adapter, which names another model as its base, and
    attention kernels from the hub, which are code.

    Raises:
        UserError: The model is an adapter, or asks for kernels from the hub.
    """
    from transformers.utils import find_adapter_config_file

    with _reading("base model", name):
        adapter = find_adapter_config_file(folder, revision=revision)
    if adapter is not None:
        raise UserError(
            f"base model {name} is an adapter (adapter_config.json) of another model. Merge the two with peft's "
            "merge_and_unload, and give the merged model."
        )
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
            if not _has_attention(kernel):
                raise UserError(
                    f"the config.json of base model {name} asks for {shown(kernel)}, which is not installed, and "
                    f"transformers may fetch it from the hub. {remove}"
                )


def _has_attention(kernel: str) -> bool:
    """Return whether a kind of attention needs nothing, or flash attention that is installed and runs here."""
    from transformers.utils import import_utils

    found = FLASH.match(kernel)
    available = None if found is None else getattr(import_utils, f"is_flash_attn_{found[1]}_available", None)
    return found is None or (available is not None and bool(available()))


def _parts_of(config: "PreTrainedConfig") -> "Iterator[PreTrainedConfig]":
    """Yield ``config`` and those of the model's parts, such as a vision tower, which are built too."""
    from transformers import PreTrainedConfig

    yield config
    # Values as they are stored: of a setting that differs by layer, getattr raises.
    for part in list(vars(config).values()):
        if isinstance(part, PreTrainedConfig):
            yield from _parts_of(part)


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> "PreTrainedTokenizerBase":
    """Load the tokenizer that belongs to the base model ``name``; raises as :func:`load_model` does."""
    from transformers import AutoTokenizer

    folder, gguf_file = _locate(name)
    extra = {} if gguf_file is None else {"gguf_file": gguf_file}
    _check_description(name, folder, gguf_file)  # transformers reads it for a tokenizer, too
    with _reading("tokenizer", name):
        _check_in_reach(folder, revision)
        return AutoTokenizer.from_pretrained(folder, revision=revision, trust_remote_code=trust_remote_code, **extra)


def save_tokenizer(
    name: str, folder: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> None:
    """Write the tokenizer of the base model ``name`` into ``folder``, and the processors of a multimodal model.

    Raises:
        UserError: As :func:`load_model` does.
    """
    tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=trust_remote_code)
    source, gguf_file = _locate(name)
    names = tokenizer.vocab_files_names.values()
    if gguf_file is not None or not copy_tokenizer(source, Path(folder), revision, names):
        tokenizer.save_pretrained(folder)
    config = load_config(name, revision=revision, trust_remote_code=trust_remote_code)
    several = gguf_file is None and any(hasattr(config, f"{kind}_config") for kind in ("vision", "audio", "video"))
    for file in PROCESSORS if several else ():
        found = fetch_optional(source, file, revision) if is_hub_id(source) else Path(source) / file
        if found is not None and found.is_file():
            note_input(found)
            shutil.copyfile(found, Path(folder) / file)


def _locate(name: str) -> tuple[str, str | None]:
    """Return the folder or hub id to pass to transformers, and the name of the GGUF file in it, if any."""
    path = expanded(name)
    note_input(path)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise UserError(f"base model {name}: there is no such GGUF file. Give the path of one that exists.")
        return str(path.parent), path.name
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                f"base model {name}: the folder holds no config.json (found: "
                f"{listing(sorted(p.name for p in path.iterdir()), 6)}). "
                "Give a Hugging Face model folder, a .gguf file or a hub id."
            )
        return str(path), None
    if path.is_file():
        flag = {".safetensors": " Give a mask with --mask.", ".ckpt": " Give a checkpoint with --ckpt_path."}
        raise UserError(
            f"base model {name} is a file. Give a Hugging Face model folder, a .gguf file or a hub id."
            f"{flag.get(path.suffix, '')}"
        )
    if _looks_local(name) or path.exists():
        raise UserError(
            f"base model {name}: there is no such folder. Give a Hugging Face model folder, a .gguf file or a hub id."
        )
    if "@" in name:  # as a mask of the hub is named
        alone, _, revision = name.partition("@")
        raise UserError(
            f"base model {name}: a revision is an option of its own. Give {alone} --revision {revision} (of fit and "
            "recover: --model.revision)."
        )
    return name, None


def _looks_local(name: str) -> bool:
    """Return whether ``name`` is a path, whatever is there, and no hub id."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def _check_in_reach(folder: str, revision: str | None) -> None:
    """Check that the hub answers, if ``folder`` is a hub id; raises the hub client's error if it does not."""
    if not Path(folder).is_dir():
        check_reachable(folder, revision=revision)


def _check_description(name: str, folder: str, gguf_file: str | None) -> None:
    """Check that the settings of a local model are plausible before anything uses them."""
    if gguf_file is not None:
        metadata = _structure(folder, gguf_file).metadata
        family = f"{metadata.get('general.architecture')}."
        settings = {key.removeprefix(family): value for key, value in metadata.items() if key.startswith(family)}
        numbers = {key: value for key, value in settings.items() if not isinstance(value, tuple)}
        check_settings(numbers, _stored(folder, gguf_file), name)
    elif Path(folder).is_dir():
        check_sizes(Path(folder))
        check_settings(read_settings(Path(folder)), _stored(folder, None), name)


def _stored(folder: str, gguf_file: str | None) -> StoredWeights | None:
    """Return the tensor shapes in the files of a local model; None for a model on the hub."""
    if gguf_file is not None:
        return _structure(folder, gguf_file).stored
    return read_shapes(Path(folder)) if Path(folder).is_dir() else None


def _structure(folder: str, gguf_file: str) -> GgufFile:
    path = Path(folder) / gguf_file
    found = path.stat()
    return _structure_of(path, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=1)
def _structure_of(path: Path, changed: int, size: int) -> GgufFile:
    return read_structure(path)


def _check_complete(found: dict[str, Any], name: str) -> None:
    if found["missing_keys"]:  # transformers warns, and initializes them at random
        raise UserError(
            f"base model {name} lacks the weights {listing(sorted(found['missing_keys']), 3)}. Check that the "
            "files are complete, and that config.json belongs to them."
        )


@contextmanager
def _reading(what: str, name: str) -> Iterator[None]:
    """Convert the errors of the hub client and the readers into one line that says what to do.

    A damaged file can make them raise any exception, so that all are attributed to the file. Only readers may be called
    inside, so that no bug of this package is reported as a damaged file.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except BaseException as error:
        panicked = type(error).__name__ == "PanicException"  # from a reader in Rust; not a subclass of Exception
        if not panicked and not isinstance(error, Exception):
            raise
        if isinstance(error, MemoryError) or re.search("can't allocate memory|not enough memory", str(error)):
            raise UserError(
                f"{what} {name}: there is not enough memory to load it. Use a smaller model, bfloat16, or a machine "
                "with more."
            ) from error
        if isinstance(error, pickle.UnpicklingError):
            raise UserError(
                f"{what} {name} is a pickle that is damaged or contains more than tensors; leap_pl runs no code from a "
                "model's files. Give the model as safetensors."
            ) from error
        if refused := gated(error):
            raise UserError(f"{what} {name} could not be fetched from the hub: {refused}") from error
        reason = " ".join(str(error).split())
        if not isinstance(error, _CLEAR_ERRORS):
            reason = f"{type(error).__name__}: {reason}"
        reason = re.sub(r" for this kind of AutoModel.*", ", which is not a causal language model.", reason)
        reason = f"{reason.removesuffix('.')}." if len(reason) <= 300 else f"{reason[:300]} …"
        local = expanded(name).exists()
        remedy = "Check that the files are complete."
        if not local:
            remedy = "Check the id and the network, or give a local folder or .gguf file."
        if not local and name.startswith("assets/"):
            remedy = f"There is no folder {name} here: in a clone of leap_pl, make assets lays it out."
        raise UserError(
            f"{what} {name} could not be {'read' if local else 'fetched from the hub'}: {reason} {remedy}"
        ) from error


def _disable_dropout(config: "PreTrainedConfig") -> None:
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for key, value in part.to_dict().items():
            if ("drop" in key) and isinstance(value, float):
                setattr(part, key, 0.0)
