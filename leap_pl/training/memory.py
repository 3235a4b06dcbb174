"""Memory that a run is expected to need on each device, by the formula of docs/scaling.md."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from leap_pl.base_model.weights import decoder_blocks
from leap_pl.distributed.strategy import copies_gradients

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from leap_pl.training.module import LeapModule

# Measured by benchmarks/sharded_memory.py on a CPU, with weights in bfloat16.
# Bytes a weight of one block at the peak of a backward pass, beside what is held: on one device, on one device with
# bfloat16 logits, and sharded; and with weights that are trained, in addition to a learned mask and under a fixed one.
TRANSIENT, TRANSIENT_LOW_MEMORY, TRANSIENT_SHARDED = 8, 6, 25
TRANSIENT_WEIGHTS, TRANSIENT_FIXED = 4, 6
PREFETCHED = 6  # bytes a weight of the next block, which a GPU gathers while one computes
# Bytes a token that one block keeps for its backward pass, times hidden size and intermediate size.
KEPT_HIDDEN, KEPT_INTERMEDIATE = 20, 8
CHUNK_VOCABULARY = 12  # bytes of the loss for each token of a chunk and each entry of the vocabulary


def device_bytes(device: torch.device) -> int | None:
    """Return the memory of ``device``, a GPU, in bytes; None if it is not known, as that of a host that others use."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def expected_bytes(
    module: "LeapModule",
    model: "PreTrainedModel",
    logits: int,
    tokens: int,
    ranks: int,
    trained: int = 0,
    buffers: int = 0,
) -> int:
    """Return the expected bytes of model, learning and activations, without libraries and fragmentation.

    The activations are those of a Llama with the model's dimensions. Nothing is measured.

    Args:
        module: Module that learns.
        model: Its base model, still without gates.
        logits: Number of logits; 0 for a fixed mask, whose bits are counted.
        tokens: Tokens in a micro-batch.
        ranks: Number of devices over which decoder blocks are sharded; 1 if each holds the whole model.
        trained: Number of parameters of trained weights.
        buffers: Bytes that gates which learn hold beside their logits, such as the fixed mask within tiles.
    """
    size, config = model.dtype.itemsize, model.config.get_text_config()
    blocks = decoder_blocks(model)[1]
    within = sum(parameter.numel() for block in blocks for parameter in block.parameters())
    outside = sum(parameter.numel() for parameter in model.parameters()) - within
    optimizer = module.optimizer_of([torch.nn.Parameter(torch.zeros(1, 1, dtype=module.logits_dtype, device="cpu"))])
    gradients = 2 if copies_gradients(module.attached) else 1
    learned = (1 + gradients) * module.logits_dtype.itemsize + (2 if hasattr(optimizer, "rounds_stochastically") else 8)
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    inner = max(inner) if isinstance(inner, Sequence) else inner  # of each block, as in Gemma 3n
    stored = (KEPT_HIDDEN * hidden + KEPT_INTERMEDIATE * inner) * size // 2
    activations = stored * (1 if module.activation_checkpointing else len(blocks))
    activations += hidden * size * len(blocks) if module.activation_checkpointing else 0
    loss = CHUNK_VOCABULARY * min(module.objective.chunk, tokens) * config.vocab_size
    if ranks > 1:
        transient = TRANSIENT_SHARDED + PREFETCHED
    else:
        transient = TRANSIENT_LOW_MEMORY if module.logits_dtype.itemsize == 2 else TRANSIENT
        transient = (transient + TRANSIENT_WEIGHTS * bool(trained)) if logits else TRANSIENT_FIXED
    block = transient * max(sum(p.numel() for p in block.parameters()) for block in blocks)
    bits = buffers if logits else sum(module.sizes.values()) // 8  # on every rank
    held = (size * within + learned * (logits + trained)) / ranks + size * outside + bits
    if not module.activation_checkpointing:
        # Each layer keeps its masked weight for the backward pass, on every rank all of it.
        held += size * sum(module.sizes.values())
    return int(held + activations * tokens + loss + block)
