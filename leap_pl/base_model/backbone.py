"""Split of a causal language model: a function for its hidden states, and the head that computes their logits.

Legend of suffixes: B = batch, L = sequence length, C = tokens of a chunk, V = vocabulary, D = hidden size.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from leap_pl.errors import UserError, warn_once

LOOK = "find_packed_sequence_indices"  # private function of transformers.masking_utils

States = Callable[[Tensor], Tensor]


class Head:
    """Function from last hidden states (C, D) to logits (C, V)."""

    def __init__(self, logits_of: Callable[[Tensor], Tensor], module: nn.Module | None = None) -> None:
        """Hold the function, and the module whose parameters it reads."""
        self._logits_of, self._module = logits_of, module

    def __call__(self, hidden_CD: Tensor) -> Tensor:
        """Return the logits (C, V)."""
        return self._logits_of(hidden_CD)

    def learned(self) -> list[nn.Parameter]:
        """Return the parameters of the head that are learned: the logits of its gate, or its trained weight."""
        return [] if self._module is None else [one for one in self._module.parameters() if one.requires_grad]


def split_model(model: nn.Module) -> tuple[States, Head]:
    """Return ``model`` as two functions: ids (B, L) → last hidden states (B, L, D), and those (C, D) → logits (C, V).

    If :func:`head_of` does not know the second, the first function returns the model's own logits instead of hidden
    states, with a warning, since they need more memory.
    """
    causal: Any = model
    head = head_of(causal)
    if head is not None:
        return lambda input_ids: _hidden(causal, input_ids), head
    warnings.warn(
        f"{type(model).__name__} computes its logits by an unknown method: the loss is computed from the model's own "
        "logits of a whole micro-batch, which need memory (several times tokens × vocabulary × 4 bytes).",
        stacklevel=2,
    )

    def logits(input_ids: Tensor) -> Tensor:
        with _unpacked(input_ids.device):
            return causal(input_ids=input_ids, use_cache=False).logits

    return logits, Head(lambda logits_CV: logits_CV)


def head_of(model: Any) -> Head | None:
    """Return the function from last hidden states (C, D) to logits (C, V).

    It scales and soft-caps logits as known model families do. None if it does not give the model's own logits.
    """
    projection = model.get_output_embeddings()
    config = model.config.get_text_config()
    times = _of_config(config, "logit_scale", "lm_head_multiplier") or 1.0  # Cohere; Falcon-H1
    over = getattr(config, "logits_scaling", None) or 1.0  # Granite
    # Gemma 2 and later; RecurrentGemma; xLSTM.
    cap = _of_config(config, "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

    def head_with(times: float, over: float) -> Head:
        def logits_of(hidden_CD: Tensor) -> Tensor:
            logits_CV = projection(hidden_CD)
            if times != 1 or over != 1:
                logits_CV = logits_CV * times / over
            return logits_CV if cap is None else cap * torch.tanh(logits_CV / cap)

        return Head(logits_of, projection)

    if projection is None:
        return None
    # HyperCLOVA X multiplies by what Granite divides by.
    heads = [head_with(times, over), *([head_with(times * over, 1.0)] if over != 1 else ())]
    return next((head for head in heads if _agrees(model, head)), None)


def _of_config(config: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def body_of(causal: Any) -> Any:
    """Return the model without its head, whose result has the last hidden states.

    Llama 4's text model has the ``base_model_prefix`` of the multimodal model, so its ``base_model`` is itself.
    """
    body = getattr(causal, "base_model", causal)
    return causal.model if body is causal and hasattr(causal, "model") else body


def _hidden(causal: Any, input_ids: Tensor) -> Tensor:
    with _unpacked(input_ids.device):
        hidden_BLD: Tensor = body_of(causal)(input_ids=input_ids, use_cache=False).last_hidden_state
    return hidden_BLD


def has_flash_attention(model: Any) -> bool:
    """Return whether the attention of ``model`` is flash attention, which takes no mask but that of padding."""
    return "flash" in str(getattr(model.config.get_text_config(), "_attn_implementation", ""))


def checkpoint_activations(model: Any) -> None:
    """Recompute each decoder block in the backward pass instead of keeping its activations, if it is in train mode."""
    check_checkpointing(model)
    # The older name, which transformers 5.17 has alone, is deprecated in later versions.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def check_checkpointing(model: Any) -> None:
    """Check that transformers can recompute the blocks of ``model``.

    Raises:
        UserError: It cannot.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(
            f"{type(model).__name__} cannot recompute its decoder blocks. Set --model.activation_checkpointing false."
        )


def set_modes(model: nn.Module, *, recomputing: bool) -> None:
    """Set eval mode for learning, and train mode for the blocks that are recomputed, which transformers asks for.

    Train mode makes some models random although no dropout is left: sampled experts (Phi-MoE), noise on routers.
    """
    for module in model.modules():
        module.training = recomputing and hasattr(module, "gradient_checkpointing")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set every module to eval mode, and restore its own mode on exit."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _unpacked(device: torch.device) -> Iterator[None]:
    """Disable the search for packed sequences, which needs a host sync on a GPU.

    transformers searches the positions in every forward pass without an attention mask, and with one it reads the mask.
    Here positions are the model's own, from 0. No public setting disables the search and keeps the attention kernel's
    own causal mask; with the search the results are the same.
    """
    from transformers import masking_utils  # here, because importing takes seconds and the loss does not need it

    look = getattr(masking_utils, LOOK, None)
    if look is None:
        if device.type != "cpu":
            warn_once(
                f"this version of transformers has no {LOOK}: if it searches for packed sequences differently, every "
                "forward pass has a host sync, and steps are slower."
            )
        yield
        return
    setattr(masking_utils, LOOK, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, LOOK, look)


@torch.no_grad()
def _agrees(causal: Any, head: Head) -> bool:
    ids = torch.arange(8, device=next(causal.parameters()).device)[None]
    with evaluating(causal):
        expected = causal(input_ids=ids, use_cache=False).logits[0].float()
        try:
            found = head(_hidden(causal, ids)[0]).float().to(expected.device)
        except (AttributeError, RuntimeError, TypeError):
            return False
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=0.02, atol=0.02)


def disable_rescaling(model: nn.Module) -> None:
    """Keep RWKV from dividing its weights in place, and its hidden states to match, on first use in eval mode.

    The division only helps float16, and would change the weights that are pruned, trained and saved.
    """
    for module in model.modules():
        if hasattr(type(module), "_rescale_layers"):
            module._rescale_layers = _nothing  # type: ignore[assignment]  # noqa: SLF001


def _nothing() -> None:
    """Do nothing."""
