"""The weights of a base model: those that can be gated or pruned, and the fingerprint that tells models apart."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from leap_pl.errors import UserError, listing

FINGERPRINT_SAMPLES = 4096  # elements hashed of each tensor: all of a tiny one, evenly spaced in a large one


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
