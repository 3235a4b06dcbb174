"""Weights of a base model: find those that can be gated or pruned, and compute the model's fingerprint."""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from leap_pl.errors import UserError, listing, warn_once

MANY_ZEROS = 0.25  # share of zeros of a pruned model
QUANTISED_ZEROS = 0.2  # more than quantisation to 3 or 4 bits alone gives
FINGERPRINT_SAMPLES = 4096  # elements hashed of each tensor: all of a tiny one, evenly spaced in a large one
# Attribute of a model in float16, which loses the small bits of other types: its fingerprints → those of its files.
STORED = "_fingerprint_as_stored"
ROUNDED = "_some_weights_rounded"  # where not all of a model's weights are stored in the data type of most


@dataclass(frozen=True)
class Weight:
    """Prunable weight tensor of a base model.

    Attributes:
        name: Parameter name, as in ``model.named_parameters()``.
        module: Module that owns the tensor.
        tensor: Attribute name of the tensor in the module.
        layer: Index of the decoder block, or None outside the blocks.
        projection: Name within the block: ``self_attn.q_proj``, ``mlp.experts.down_proj``.
        input_dim: Input dimension of the tensor: 1 for ``nn.Linear`` (out, in), 0 for ``Conv1D`` (in, out), 2 for
            stacked experts (expert, out, in), or 1 where the model family stores these transposed.
        block: The decoder block itself, or None outside the blocks.
    """

    name: str
    module: nn.Module
    tensor: str
    layer: int | None
    projection: str
    input_dim: int
    block: nn.Module | None = None

    @property
    def parameter(self) -> nn.Parameter:
        """Return the weight itself; under a gate, the frozen weight."""
        if parametrize.is_parametrized(self.module, self.tensor):
            frozen: Any = self.chain.original
            return frozen
        return getattr(self.module, self.tensor)

    @property
    def chain(self) -> parametrize.ParametrizationList:
        """Return torch's module of the parametrizations of a gated weight, with the frozen weight as ``original``."""
        chains: Any = self.module.parametrizations
        return chains[self.tensor]


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of the decoder blocks of a causal language model.

    Raises:
        UserError: The model has no list of ``num_hidden_layers`` modules.
    """
    causal: Any = model
    depth = getattr(causal.config.get_text_config(), "num_hidden_layers", None)
    decoder = causal.get_decoder() if hasattr(model, "get_decoder") else model
    for root in (decoder, model):
        lists = [m for m in root.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
        if lists:
            name = next(n for n, m in model.named_modules() if m is lists[0])
            return name, lists[0]
    raise UserError(
        f"{type(model).__name__}: no list of {depth} decoder blocks was found, so leap_pl does not know "
        "what to prune. Use a decoder-only causal language model."
    )


def find_weights(
    model: nn.Module, targets: Sequence[str] | None = None, ignore: Sequence[str] = (), *, once: bool = False
) -> dict[str, Weight]:
    r"""Return the weights to gate or prune, in the order of the model's own parameters.

    Args:
        model: A causal language model.
        targets: Weights to select. None: every ``nn.Linear`` and ``Conv1D`` weight, and every tensor of stacked
            experts, inside the decoder blocks (never embeddings, norms, routers or the head). Otherwise each entry is
            a class name (``Linear``), the name of a parameter, or of a module for all in it, or ``re:`` followed by a
            regular expression that matches a module or parameter name from its start, such as ``re:.*\.mlp\..*``.
        ignore: Entries of the same form; matching weights stay dense.
        once: Return a tensor that several layers share under its first name, to be counted and not gated.

    Returns:
        Parameter name → :class:`Weight`.

    Raises:
        UserError: Nothing matches (the message lists the available names), an entry of ``targets`` matches nothing, or
            a matching weight is shared with another module, as a head tied to the embeddings.
    """
    for given in (targets, ignore):
        if isinstance(given, str):
            raise UserError(f"targets and ignore are lists of names, and {given!r} is one name. Give [{given!r}].")
    prefix, blocks = decoder_blocks(model)
    of_text = is_of_text(model)
    experts = _numbers_of_experts(model)
    found: dict[str, Weight] = {}
    candidates: dict[str, Weight] = {}
    owners: dict[int, list[str]] = {}
    for name, module, tensor, parameter in _weights_of(model):
        owners.setdefault(id(parameter), []).append(name)
        candidate = _describe(name, module, tensor, parameter, prefix, blocks)
        if candidate is None or not of_text(name):
            continue
        candidates[name] = candidate
        wanted = (
            candidate.layer is not None and _is_projection(candidate, parameter, experts)
            if targets is None
            else _matches(targets, candidate)
        )
        if wanted and not _matches(ignore, candidate):
            found[name] = candidate
    if not found:
        asked = "the default (linears of the decoder blocks)" if targets is None else listing([*targets], 4)
        projections = sorted({f"re:.*{re.escape(w.projection)}" for w in candidates.values() if w.layer is not None})
        raise UserError(
            f"nothing to gate: {asked}{' without ' + ', '.join(ignore) if ignore else ''} matches no weight of "
            f"{type(model).__name__}. It has: {listing(projections, 20)}."
        )
    _check_each_matches(targets or (), ignore, candidates, type(model).__name__)
    if targets is None:
        _warn_of_other_experts([name for name in candidates if name not in found], ignore, candidates)
    if once:
        firsts = {id(weight.parameter): name for name, weight in reversed(found.items())}
        return {name: weight for name, weight in found.items() if firsts[id(weight.parameter)] == name}
    for name, weight in found.items():
        sharers = [other for other in owners[id(weight.parameter)] if other != name]
        if sharers:
            raise UserError(
                f"{name} is the same tensor as {', '.join(sharers)}: gating it would prune both. Add it to ignore."
            )
    return found


def is_of_text(model: nn.Module) -> Callable[[str], bool]:
    """Return a function that says of a parameter's name whether a text passes through it, and not an image or a sound.

    Of a model that also sees or hears it is true within the decoder, and of the head.
    """
    from transformers import PreTrainedConfig

    causal: Any = model
    config = causal.config
    text = config.get_text_config()
    # Models of other parts have configs of their own classes, and some lie within the decoder.
    configs = {name: getattr(part, "config", None) for name, part in model.named_modules()}
    own, blocks = (type(config), type(text)), decoder_blocks(model)[0]
    found = [name for name, of in configs.items() if isinstance(of, PreTrainedConfig) and type(of) not in own]
    others = tuple(f"{_apart_from(blocks, name)}." for name in found)
    if text is config:
        return lambda name: not name.startswith(others)
    head = causal.get_output_embeddings()
    within = (
        f"{blocks.rpartition('.')[0]}.",
        *(f"{name}." for name, module in model.named_modules() if module is head),
    )
    return lambda name: name.startswith(within) and not name.startswith(others)


def _apart_from(blocks: str, part: str) -> str:
    """Return the name of the largest module with ``part`` in it that does not have the decoder blocks in it."""
    above = part.rpartition(".")[0]
    while above and not f"{blocks}.".startswith(f"{above}.") and not above.startswith(f"{blocks}."):
        part, above = above, above.rpartition(".")[0]
    return part


def _check_each_matches(
    targets: Sequence[str], ignore: Sequence[str], candidates: Mapping[str, Weight], model: str
) -> None:
    """Refuse an entry of ``targets`` that selects nothing, and warn of one of ``ignore``, as for several families."""
    idle, spared = (
        [one for one in entries if not any(_matches([one], weight) for weight in candidates.values())]
        for entries in (targets, ignore)
    )
    if idle:
        raise UserError(
            f"targets: {listing(idle, 4)} matches no weight of {model}. Name a class (Linear), a module or "
            f"parameter ({next(iter(candidates))}), or re: and an expression that matches its name from the start "
            "(re:.*q_proj)."
        )
    if spared:
        warn_once(f"ignore: {listing(spared, 4)} matches no weight of {model}, and nothing stays dense by it.")


def _warn_of_other_experts(left: Sequence[str], ignore: Sequence[str], candidates: Mapping[str, Weight]) -> None:
    """Warn of weights of experts in a form that the default does not know, such as DBRX': they are most of a model."""
    dense = [
        name
        for name in left
        if "experts" in candidates[name].projection.split(".")
        and not re.search("bias|scale", candidates[name].tensor)
        and not _matches(ignore, candidates[name])
        and candidates[name].parameter.ndim == 2
        and not isinstance(candidates[name].module, nn.Linear)
    ]
    if dense:
        warn_once(
            f"{listing(dense, 2)}: weights of experts that are neither linear layers nor stacks of matrices. They stay "
            "dense, and the sparsity is that of the other weights."
        )


def _weights_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yield each parameter of two or more dimensions: its name, module, attribute name, and the parameter itself.

    For a parametrized tensor this is the original under its name in the plain model; logits of gates are left out.
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


def check_finite_weights(model: nn.Module, what: str) -> None:
    """Check that every weight of ``model``, which messages call ``what``, is finite.

    Raises:
        UserError: A weight contains Inf or NaN; the message has its name and their number.
    """
    for parameter, weight in model.named_parameters():
        if not weight.is_floating_point() or weight.element_size() < 2:
            continue
        # aminmax propagates NaN, and allocates no memory of the weight's size.
        if not all(bool(torch.isfinite(extreme)) for extreme in weight.detach().aminmax()):
            broken = int(weight.numel() - torch.isfinite(weight).sum())
            raise UserError(
                f"{what}: {parameter} has {broken:,} values that are infinite or NaN, so that nothing can "
                "be learned or measured. Fetch the model again, or give another copy."
            )


def _describe(
    name: str, module: nn.Module, tensor: str, parameter: nn.Parameter, prefix: str, blocks: nn.ModuleList
) -> Weight | None:
    if isinstance(module, nn.Embedding):
        return None
    layer: int | None = None
    projection = name.removesuffix(".weight")
    match = re.fullmatch(rf"{re.escape(prefix)}\.(\d+)\.(.+)", name)
    if match and int(match[1]) < len(blocks):
        layer, projection = int(match[1]), match[2].removesuffix(".weight")
    if _kind(module) == "Conv1D":
        input_dim = 0
    elif parameter.ndim == 3:
        transposed = getattr(module, "is_transposed", False) or _kind(module) in _TRANSPOSED
        input_dim = 1 if transposed else 2
    else:
        input_dim = parameter.ndim - 1
    block = None if layer is None else blocks[layer]
    return Weight(name, module, tensor, layer, projection, input_dim, block)


# Experts stored as (expert, in, out) without the attribute ``is_transposed``.
_TRANSPOSED = ("Llama4TextExperts",)


def _kind(module: nn.Module) -> str:
    """Return the name of the module's class before any parametrization."""
    kind = type(module)
    return kind.__mro__[1].__name__ if parametrize.is_parametrized(module) else kind.__name__


# Layers that select experts, or the tokens that attention sees; or mix a few streams, as in Gemma 3n.
_ROUTER = re.compile(r"router|shared_expert_gate|(^|\.)gate\.|(^|\.)indexer\.|_coefs$", re.IGNORECASE)
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")  # in configs of families


def _numbers_of_experts(model: nn.Module) -> set[int]:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return {number for name in _EXPERTS if isinstance(number := getattr(text, name, None), int)}


def _is_projection(weight: Weight, parameter: nn.Parameter, experts: set[int]) -> bool:
    """Return whether the default selects ``weight``: of a linear layer that routes no tokens, or stacked experts.

    Convolutions, and gates and mixing coefficients of recurrent layers, have three dimensions as stacked experts have,
    whose class, or whose module, is called so in every family of transformers.
    """
    if parameter.ndim == 3:
        return "expert" in _kind(weight.module).lower() or "experts" in weight.projection.split(".")
    if weight.tensor != "weight" or not (isinstance(weight.module, nn.Linear) or _kind(weight.module) == "Conv1D"):
        return False
    # A linear called gate is a router if it has an output for each expert; in other models it is a projection.
    gate = weight.projection.rpartition(".")[2] == "gate" and parameter.shape[0] in experts
    return not gate and _ROUTER.search(weight.projection) is None


def _matches(patterns: Sequence[str], weight: Weight) -> bool:
    module = weight.name.removesuffix(f".{weight.tensor}")
    names = (weight.name, module)
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                expression = re.compile(pattern[3:])
            except re.error as error:
                raise UserError(f"{pattern} is not a regular expression: {error}.") from error
            if any(expression.match(name) for name in names):
                return True
        elif pattern in names or pattern == _kind(weight.module) or module.startswith(f"{pattern}."):
            return True
    return False


def share_of_zeros(weights: Mapping[str, Weight]) -> float:
    """Return the share of the elements of ``weights`` that are 0; above :data:`MANY_ZEROS` in a pruned model."""
    total = sum(weight.parameter.numel() for weight in weights.values())
    return 1 - sum(int(weight.parameter.count_nonzero()) for weight in weights.values()) / total


def is_sparse(weights: Mapping[str, Weight]) -> bool:
    """Return whether so many elements of ``weights`` are 0 that a model was pruned."""
    return share_of_zeros(weights) > MANY_ZEROS


# ---------------------------------------------------------------------------------------------------------
# Fingerprint


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Return a short hash that identifies the weights of a base model.

    It is the SHA-256 of the name, the shape and FINGERPRINT_SAMPLES evenly spaced elements of each tensor, rounded to
    bfloat16 first, so that a checkpoint has the same fingerprint loaded in float32 and in bfloat16.

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
    """Return the fingerprint of all weights (two or more dimensions) inside the decoder blocks of ``model``.

    It covers gated and other weights, each under its own name, and so does not depend on ``targets``. A model that
    :func:`leap_pl.base_model.loading.load_model` has rounded to float16 has the one of its files.
    """
    prefix, _ = decoder_blocks(model)
    weights = {name: weight for name, *_, weight in _weights_of(model) if name.startswith(f"{prefix}.")}
    return _as_stored(model, fingerprint(weights))


def rest_fingerprint(model: nn.Module) -> str:
    """Return the fingerprint of what :func:`model_fingerprint` leaves out: norms, biases, embeddings and head.

    A model whose norms or embeddings were trained differs in nothing else.

    Args:
        model: Base model, without gates.

    Returns:
        16 hexadecimal digits, as :func:`fingerprint`.
    """
    return _as_stored(model, fingerprint(dict(rest_of(model))))


def rest_of(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the name and the tensor of each parameter that :func:`model_fingerprint` leaves out."""
    prefix, _ = decoder_blocks(model)
    for name, tensor in model.named_parameters():
        if tensor.ndim < 2 or not name.startswith(f"{prefix}."):
            yield name, tensor


def _as_stored(model: nn.Module, found: str) -> str:
    stored: Mapping[str, str] = getattr(model, STORED, {})
    return stored.get(found, found)  # not where the weights were changed since
