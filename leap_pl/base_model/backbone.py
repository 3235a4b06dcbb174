"""A causal language model in two parts: its hidden states, and the head that makes logits of them.

Legend of suffixes: B = batch, L = sequence length, C = tokens of a chunk, V = vocabulary, D = hidden size.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from leap_pl.errors import warn_once

LOOK = "find_packed_sequence_indices"  # of transformers.masking_utils, which calls it by this name

States = Callable[[Tensor], Tensor]
Head = Callable[[Tensor], Tensor]


def split_model(model: nn.Module) -> tuple[States, Head]:
    """Return ``model`` as two functions: ids (B, L) → last hidden states (B, L, D), and those (C, D) → logits (C, V).

    The second one scales and soft-caps as the families do, and is checked against the model's own logits.
    A family that makes them in yet another way is taken whole: its logits stand in for the hidden states, at
    the price of their memory, with a warning.
    """
    causal: Any = model
    projection = causal.get_output_embeddings()
    config = causal.config.get_text_config()
    times = getattr(config, "logit_scale", None) or 1.0  # Cohere
    over = getattr(config, "logits_scaling", None) or 1.0  # Granite
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2 and later

    def states(input_ids: Tensor) -> Tensor:
        with _unpacked(input_ids.device):
            return causal.base_model(input_ids=input_ids, use_cache=False).last_hidden_state

    def head(hidden_CD: Tensor) -> Tensor:
        logits_CV = projection(hidden_CD)
        if times != 1 or over != 1:
            logits_CV = logits_CV * times / over
        return logits_CV if cap is None else cap * torch.tanh(logits_CV / cap)

    if projection is not None and _agrees(causal, states, head):
        return states, head
    warnings.warn(
        f"{type(model).__name__} makes its logits in a way that is not known here: the loss is taken from its own "
        "logits, which exist whole for each micro-batch (tokens × vocabulary × 4 bytes, several times over).",
        stacklevel=2,
    )

    def logits(input_ids: Tensor) -> Tensor:
        with _unpacked(input_ids.device):
            return causal(input_ids=input_ids, use_cache=False).logits

    return logits, lambda logits_CV: logits_CV


@contextmanager
def _unpacked(device: torch.device) -> Iterator[None]:
    """Spare the look at whether positions begin anew within a sequence, for which a GPU is waited for.

    transformers does so in every forward pass without an attention mask, and with one it looks into the mask. Here
    positions are the model's own, from 0. There is no public way past it that leaves causality to the kernel of
    attention; without this one the results are the same.
    """
    from transformers import masking_utils  # no sooner: it takes seconds, and the loss alone needs none of it

    look = getattr(masking_utils, LOOK, None)
    if look is None:
        if device.type != "cpu":
            warn_once(
                f"this version of transformers has no {LOOK}: if it looks for packed sequences in another way, the "
                "device is waited for in every forward pass, and steps take longer."
            )
        yield
        return
    setattr(masking_utils, LOOK, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, LOOK, look)


@torch.no_grad()
def _agrees(causal: Any, states: States, head: Head) -> bool:
    ids = torch.arange(8, device=next(causal.parameters()).device)[None]
    was_training = causal.training
    causal.eval()
    expected = causal(input_ids=ids, use_cache=False).logits[0].float()
    try:
        found = head(states(ids)[0]).float()
    except (AttributeError, RuntimeError, TypeError):
        return False
    finally:
        causal.train(was_training)
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=0.02, atol=0.02)
