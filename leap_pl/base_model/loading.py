"""Base models: found by name and loaded, in the type that the hardware multiplies fast."""

import pickle
import re
import time
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError

from leap_pl.base_model.gguf_structure import GgufFile, read_structure
from leap_pl.base_model.model_sizes import check_settings, check_skeleton
from leap_pl.base_model.stored_weights import StoredWeights, check_sizes, read_shapes, told_by
from leap_pl.errors import UserError, listing
from leap_pl.inputs.plain_values import shown
from leap_pl.inputs.register import note_input

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

_TELLING = OSError | ValueError | RuntimeError | SafetensorError  # whose message says enough without their name


def name_of_model(typed: str | None, recorded: str, *, trust_remote_code: bool) -> str:
    """Return which base model is loaded: the ``typed`` one, or the one that a mask or checkpoint has ``recorded``.

    Raises:
        UserError: Only the recorded one is there, and code of the model is to be run: whose, a file that somebody else
            may have written is not to choose.
    """
    if typed is None and trust_remote_code:
        raise UserError(
            "--trust_remote_code runs code of the base model, and only a file says which that is: "
            f"{shown(recorded)}. Type its name, too: --model NAME."
        )
    return recorded if typed is None else typed


def load_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: Dtype = "auto",
    dropout: bool = True,
    trust_remote_code: bool = False,
) -> "PreTrainedModel":
    """Load the causal language model ``name``, in eval mode, on the CPU.

    Args:
        name: Hub id, local folder, or local GGUF file (its quantised blocks are turned into ``dtype``).
        revision: Branch, tag or commit on the hub; None is the newest.
        dtype: Type of the weights; ``auto`` is the one they are stored in (bfloat16 for a GGUF file).
        dropout: False sets every dropout probability of the model to 0, which learning a mask of frozen
            weights wants: the dense teacher must give one answer.
        trust_remote_code: Run code that comes with the model.

    Raises:
        UserError: There is no such model, or it cannot be reached or read.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    folder, gguf_file = _locate(name)
    config = load_config(name, revision=revision, trust_remote_code=trust_remote_code)
    if not dropout:
        _disable_dropout(config)
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
            # A model that came out of a GGUF file refuses to be saved; an ordinary one takes over its weights.
            model = AutoModelForCausalLM.from_config(config, dtype=resolved)
            model.load_state_dict(quantised.state_dict())
            model.generation_config = quantised.generation_config
    return model.eval()


def load_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> "PreTrainedConfig":
    """Load the configuration of the base model ``name``; raises as :func:`load_model` does."""
    from transformers import AutoConfig

    folder, gguf_file = _locate(name)
    extra = {} if gguf_file is None else {"gguf_file": gguf_file}
    _check_description(name, folder, gguf_file)
    with _reading("base model", name):
        config = AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=trust_remote_code, **extra)
    if not trust_remote_code:
        _check_plain(name, folder, revision, config)
    if gguf_file is not None and hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _check_plain(name: str, folder: str, revision: str | None, config: "PreTrainedConfig") -> None:
    """Make sure that the model is nothing but weights of a class that transformers has.

    What transformers would otherwise follow without asking: an adapter, which names another model as its base, and
    kernels of attention on the hub, which are code.

    Raises:
        UserError: It asks for more.
    """
    from transformers.utils import find_adapter_config_file

    with _reading("base model", name):
        adapter = find_adapter_config_file(folder, revision=revision)
    if adapter is not None:
        raise UserError(
            f"base model {name} is an adapter (adapter_config.json) of another model. Merge the two (merge_and_unload "
            "of peft), and give the merged model."
        )
    for part in (config, config.get_text_config()):
        for key in ("_attn_implementation", "_experts_implementation"):
            kernel = getattr(part, key, None)
            if isinstance(kernel, str) and "/" in kernel:
                raise UserError(
                    f"the config.json of base model {name} asks for kernels from the hub ({shown(kernel)}), which are "
                    f"code. Take {key.removeprefix('_')} out of it, or type --trust_remote_code."
                )


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> "PreTrainedTokenizerBase":
    """Load the tokenizer that belongs to the base model ``name``; raises as :func:`load_model` does."""
    from transformers import AutoTokenizer

    folder, gguf_file = _locate(name)
    extra = {} if gguf_file is None else {"gguf_file": gguf_file}
    _check_description(name, folder, gguf_file)  # which transformers reads for a tokenizer, too
    with _reading("tokenizer", name):
        return AutoTokenizer.from_pretrained(folder, revision=revision, trust_remote_code=trust_remote_code, **extra)


def fast_dtype(device: torch.device) -> Dtype:
    """bfloat16 where ``device`` multiplies it fast (a CPU: faster than float32, which is measured), else float32."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device.type == "cpu":
        amx = torch.cpu.get_capabilities().get("amx_tile", False)
        return "bfloat16" if amx or _cpu_gains_by_bfloat16() else "float32"
    return "float32"


@cache
def _cpu_gains_by_bfloat16() -> bool:
    """Whether bfloat16 matrices are multiplied faster than float32 ones; takes some hundredths of a second, once.

    Measured, for the instructions do not tell: with AVX512_BF16, a Zen 4 is twice as fast in bfloat16, and an Intel
    server whose AMX a hypervisor hides is twice as slow.
    """
    if not torch.cpu.get_capabilities().get("avx512_bf16", False):
        return False  # emulated

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(512, 512, dtype=dtype)
        took = []
        for _ in range(8):
            began = time.perf_counter()
            torch.mm(matrix, matrix)
            took.append(time.perf_counter() - began)
        return min(took)

    with torch.inference_mode():
        return seconds(torch.bfloat16) < seconds(torch.float32)


def longest_sequence(config: "PreTrainedConfig") -> int | None:
    """The number of tokens the model's positions reach, or None where the configuration sets no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _locate(name: str) -> tuple[str, str | None]:
    """Split ``name`` into what transformers is given, and the GGUF file inside it if it is one."""
    path = Path(name).expanduser()
    note_input(path)
    if path.suffix == ".gguf":
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
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if path.is_file():
        flag = {".safetensors": " A mask is given with --mask.", ".ckpt": " A checkpoint is given with --ckpt_path."}
        raise UserError(
            f"base model {name} is a file. Give a Hugging Face model folder, a .gguf file or a hub id."
            f"{flag.get(path.suffix, '')}"
        )
    if looks_local or path.exists():
        raise UserError(
            f"base model {name}: there is no such folder. Give a Hugging Face model folder, a .gguf file or a hub id."
        )
    return name, None


def _check_description(name: str, folder: str, gguf_file: str | None) -> None:
    """Make sure that what a local model says of itself can be so, before anything acts on it."""
    if gguf_file is not None:
        told = _structure(folder, gguf_file).told
        family = f"{told.get('general.architecture')}."
        settings = {key.removeprefix(family): value for key, value in told.items() if key.startswith(family)}
        numbers = {key: value for key, value in settings.items() if not isinstance(value, tuple)}
        check_settings(numbers, _stored(folder, gguf_file), name)
    elif Path(folder).is_dir():
        check_sizes(Path(folder))
        check_settings(told_by(Path(folder)), _stored(folder, None), name)


def _stored(folder: str, gguf_file: str | None) -> StoredWeights | None:
    """What a local model's files hold; None for one on the hub."""
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
    if found["missing_keys"]:  # transformers warns, and makes up random ones
        raise UserError(
            f"base model {name} lacks the weights {listing(sorted(found['missing_keys']), 3)}. Check that the "
            "files are complete, and that config.json belongs to them."
        )


class _reading:  # noqa: N801  (reads as a statement: with _reading("base model", name))
    """Turns what the hub client and the readers raise into one line that says what to give instead.

    A damaged file makes them raise whatever their next line happens to: all of it is told of the file. Only readers are
    called within, so that no mistake of this package's own is taken for one.
    """

    def __init__(self, what: str, name: str) -> None:
        self.what, self.name = what, name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, UserError | torch.OutOfMemoryError):
            return
        panicked = type(error).__name__ == "PanicException"  # of a reader in Rust, and no Exception
        if not panicked and not isinstance(error, Exception):
            return
        if isinstance(error, pickle.UnpicklingError):
            raise UserError(
                f"{self.what} {self.name} is pickled, and damaged or more than tensors; leap_pl runs no code from a "
                "model's files. Give the model as safetensors."
            ) from error
        reason = " ".join(str(error).split())
        if not isinstance(error, _TELLING):
            reason = f"{type(error).__name__}: {reason}"
        reason = re.sub(r" for this kind of AutoModel.*", ", which is no causal language model.", reason)
        reason = reason if len(reason) <= 300 else f"{reason[:300]} …"
        local = Path(self.name).expanduser().exists()
        remedy = (
            "Check that the files are complete."
            if local
            else "Check the id and the network, or give a local folder or .gguf file."
        )
        raise UserError(
            f"{self.what} {self.name} could not be {'read' if local else 'fetched from the hub'}: {reason} {remedy}"
        ) from error


def _disable_dropout(config: "PreTrainedConfig") -> None:
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for key, value in part.to_dict().items():
            if ("drop" in key) and isinstance(value, float):
                setattr(part, key, 0.0)
