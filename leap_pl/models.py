"""Base models: found by name, loaded, told apart, and their prunable weights listed."""

import hashlib
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.utils import parametrize

from leap_pl.errors import UserError, listing

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

FINGERPRINT_SAMPLES = 4096  # elements hashed of each tensor: all of a tiny one, evenly spaced in a large one


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
        if gguf_file is None:
            model, found = AutoModelForCausalLM.from_pretrained(
                folder,
                revision=revision,
                config=config,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
            if found["missing_keys"]:  # transformers warns, and makes up random ones
                raise UserError(
                    f"base model {name} lacks the weights {listing(sorted(found['missing_keys']), 3)}. Check that the "
                    "files are complete, and that config.json belongs to them."
                )
        else:
            resolved = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
            quantised = AutoModelForCausalLM.from_pretrained(
                folder,
                gguf_file=gguf_file,
                quantization_config=GgufConfig(dequantize=True),
                dtype=resolved,
            )
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
    with _reading("base model", name):
        config = AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=trust_remote_code, **extra)
    if gguf_file is not None and hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> "PreTrainedTokenizerBase":
    """Load the tokenizer that belongs to the base model ``name``; raises as :func:`load_model` does."""
    from transformers import AutoTokenizer

    folder, gguf_file = _locate(name)
    extra = {} if gguf_file is None else {"gguf_file": gguf_file}
    with _reading("tokenizer", name):
        return AutoTokenizer.from_pretrained(folder, revision=revision, trust_remote_code=trust_remote_code, **extra)


def fast_dtype(device: torch.device) -> Dtype:
    """bfloat16 where ``device`` multiplies it fast, else float32."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device.type == "cpu":
        # Without the instructions bfloat16 is emulated, and slower than float32.
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return "bfloat16" if fast else "float32"
    return "float32"


def longest_sequence(config: "PreTrainedConfig") -> int | None:
    """The number of tokens the model's positions reach, or None where the configuration sets no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _locate(name: str) -> tuple[str, str | None]:
    """Split ``name`` into what transformers is given, and the GGUF file inside it if it is one."""
    path = Path(name).expanduser()
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


class _reading:  # noqa: N801  (reads as a statement: with _reading("base model", name))
    """Turns what the hub client and the readers raise into one line that says what to give instead."""

    def __init__(self, what: str, name: str) -> None:
        self.what, self.name = what, name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        readers = OSError | ValueError | KeyError | RuntimeError | SafetensorError | pickle.UnpicklingError
        if not isinstance(error, readers) or isinstance(error, UserError):
            return
        if isinstance(error, torch.OutOfMemoryError):
            return
        if isinstance(error, pickle.UnpicklingError):
            raise UserError(
                f"{self.what} {self.name} is pickled, and damaged or more than tensors; leap_pl runs no code from a "
                "model's files. Give the model as safetensors."
            ) from error
        reason = " ".join(str(error).split())
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


# ---------------------------------------------------------------------------------------------------------
# The weights that can be gated


@dataclass(frozen=True)
class Weight:
    """One prunable weight tensor of a base model.

    Attributes:
        name: Its parameter name, as in ``model.named_parameters()``.
        module: The module that owns it.
        tensor: Its attribute name there.
        layer: Index of its decoder block, or None outside the blocks.
        projection: What it is within its block: ``self_attn.q_proj``, ``mlp.experts.down_proj``.
        input_dim: The dimension of the tensor that the layer's inputs run along: 1 of ``nn.Linear``
            (out, in), 0 of ``Conv1D`` (in, out), 2 (or 1, where the family stores them transposed) of
            stacked experts (expert, out, in).
    """

    name: str
    module: nn.Module
    tensor: str
    layer: int | None
    projection: str
    input_dim: int

    @property
    def parameter(self) -> nn.Parameter:
        """The weight itself; under a gate, the frozen one."""
        if parametrize.is_parametrized(self.module, self.tensor):
            chains: Any = self.module.parametrizations
            return chains[self.tensor].original
        return getattr(self.module, self.tensor)


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and the list of the decoder blocks of a causal language model.

    Raises:
        UserError: No list of ``num_hidden_layers`` modules is found.
    """
    causal: Any = model
    depth = causal.config.get_text_config().num_hidden_layers
    decoder = causal.get_decoder() if hasattr(model, "get_decoder") else model
    for root in (decoder, model):
        lists = [m for m in root.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
        if lists:
            name = next(n for n, m in model.named_modules() if m is lists[0])
            return name, lists[0]
    raise UserError(
        f"{type(model).__name__}: no list of {depth} decoder blocks was found in it, so leap_pl does not know "
        "what to prune. Name the layers with --model.targets, or use a decoder-only causal language model."
    )


def find_weights(
    model: nn.Module, targets: Sequence[str] | None = None, ignore: Sequence[str] = ()
) -> dict[str, Weight]:
    r"""The weights to gate or prune, in the order of the model's own parameters.

    Args:
        model: A causal language model.
        targets: Which weights. None: every ``nn.Linear`` and ``Conv1D`` weight, and every stacked tensor
            of experts, inside the decoder blocks (never embeddings, norms, routers or the head). Otherwise
            each entry is a class name (``Linear``), a module or parameter name, or ``re:`` and a regular
            expression that the module's or parameter's name matches from its start (as in
            ``re:.*\.mlp\..*``).
        ignore: Entries of the same form; what they match is left dense.

    Returns:
        Parameter name → :class:`Weight`.

    Raises:
        UserError: Nothing matches (the message lists what exists), or a match is shared with another
            module, as a head tied to the embeddings.
    """
    prefix, blocks = decoder_blocks(model)
    found: dict[str, Weight] = {}
    candidates: dict[str, Weight] = {}
    owners: dict[int, list[str]] = {}
    for name, module, tensor, parameter in _weights_of(model):
        owners.setdefault(id(parameter), []).append(name)
        candidate = _describe(name, module, tensor, parameter, prefix, len(blocks))
        if candidate is None:
            continue
        candidates[name] = candidate
        wanted = (
            candidate.layer is not None and _is_projection(candidate, parameter)
            if targets is None
            else _matches(targets, candidate)
        )
        if wanted and not _matches(ignore, candidate):
            found[name] = candidate
    if not found:
        asked = "the default (linears of the decoder blocks)" if targets is None else ", ".join(targets)
        projections = sorted({f"re:.*{re.escape(w.projection)}" for w in candidates.values() if w.layer is not None})
        raise UserError(
            f"nothing to gate: {asked}{' without ' + ', '.join(ignore) if ignore else ''} matches no weight of "
            f"{type(model).__name__}. It has: {listing(projections, 20)}."
        )
    for name, weight in found.items():
        sharers = [other for other in owners[id(weight.parameter)] if other != name]
        if sharers:
            raise UserError(
                f"{name} is the same tensor as {', '.join(sharers)}: gating it would prune both. Add it to ignore."
            )
    return found


def _weights_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Every tensor of two dimensions or more: its name, its module, its attribute there, and itself.

    Seen through parametrizations: the original under the name it has in the plain model, no gate's logits.
    """
    for module_name, module in model.named_modules():
        if ".parametrizations." in f".{module_name}.":
            continue
        own = dict(module.named_parameters(recurse=False))
        if parametrize.is_parametrized(module):
            chains: Any = module.parametrizations
            own |= {tensor: chain.original for tensor, chain in chains.items()}
        for tensor, parameter in own.items():
            if parameter.ndim >= 2:
                yield f"{module_name}.{tensor}", module, tensor, parameter


def check_numbers(model: nn.Module, name: str) -> None:
    """Make sure that every weight of ``model`` is a number.

    Raises:
        UserError: One holds Inf or NaN; with its name and how many.
    """
    for parameter, weight in model.named_parameters():
        if not weight.is_floating_point() or weight.element_size() < 2:
            continue
        # The extremes propagate NaN, and take no memory of the weight's size.
        if not all(bool(torch.isfinite(extreme)) for extreme in weight.detach().aminmax()):
            broken = int(weight.numel() - torch.isfinite(weight).sum())
            raise UserError(
                f"base model {name}: {parameter} holds {broken:,} values that are infinite or NaN, and nothing can be "
                "learned or measured through it. Fetch the model again, or give another copy."
            )


def _describe(
    name: str, module: nn.Module, tensor: str, parameter: nn.Parameter, prefix: str, depth: int
) -> Weight | None:
    if isinstance(module, nn.Embedding):
        return None
    layer: int | None = None
    projection = name.removesuffix(".weight")
    match = re.fullmatch(rf"{re.escape(prefix)}\.(\d+)\.(.+)", name)
    if match and int(match[1]) < depth:
        layer, projection = int(match[1]), match[2].removesuffix(".weight")
    if _kind(module) == "Conv1D":
        input_dim = 0
    elif parameter.ndim == 3:
        transposed = getattr(module, "is_transposed", False) or _kind(module) in _TRANSPOSED
        input_dim = 1 if transposed else 2
    else:
        input_dim = parameter.ndim - 1
    return Weight(name, module, tensor, layer, projection, input_dim)


# Experts stored (expert, in, out) that do not say so, as those with a choice of implementations do.
_TRANSPOSED = ("Llama4TextExperts",)


def _kind(module: nn.Module) -> str:
    """The class of the module, seen through a parametrization."""
    kind = type(module)
    return kind.__mro__[1].__name__ if parametrize.is_parametrized(module) else kind.__name__


def _is_projection(weight: Weight, parameter: nn.Parameter) -> bool:
    linear = isinstance(weight.module, nn.Linear) or _kind(weight.module) == "Conv1D"
    return (linear and weight.tensor == "weight") or parameter.ndim == 3


def _matches(patterns: Sequence[str], weight: Weight) -> bool:
    names = (weight.name, weight.name.removesuffix(f".{weight.tensor}"))
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                expression = re.compile(pattern[3:])
            except re.error as error:
                raise UserError(f"{pattern} is not a regular expression: {error}.") from error
            if any(expression.match(name) for name in names):
                return True
        elif pattern in names or pattern == _kind(weight.module):
            return True
    return False


# ---------------------------------------------------------------------------------------------------------
# Telling models apart


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """A short hash that tells one base model's weights from another's.

    Of every tensor its name, its shape and FINGERPRINT_SAMPLES evenly spaced elements are hashed (SHA-256),
    rounded to bfloat16 first, so that one checkpoint loaded in float32 and in bfloat16 has one fingerprint.

    Args:
        weights: Names and dense tensors; their order does not matter.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach()
        flat = tensor.reshape(-1)
        if flat.numel() > FINGERPRINT_SAMPLES:
            # Integer arithmetic: the same elements on every device.
            steps = torch.arange(FINGERPRINT_SAMPLES, device=flat.device, dtype=torch.int64)
            flat = flat[steps * (flat.numel() - 1) // (FINGERPRINT_SAMPLES - 1)]
        sample = flat.to("cpu", torch.bfloat16).contiguous().view(torch.int16)
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def model_fingerprint(model: nn.Module) -> str:
    """The fingerprint of every weight (two dimensions or more) inside the decoder blocks of ``model``.

    All of them, gated or not, and each under its own name: the choice of ``targets`` does not change it.
    """
    prefix, _ = decoder_blocks(model)
    return fingerprint({name: weight for name, *_, weight in _weights_of(model) if name.startswith(f"{prefix}.")})
