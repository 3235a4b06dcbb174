"""Steps that benchmarks compare: dense fine-tuning, leap_pl, and the published formulation of the same mask.

They share model, tokens, dtype, loss function, optimizer and clipping. Each is made from a model, which it changes, and
is a function of one micro-batch of tokens (B, L): forward and backward pass, clipping and optimizer step.

dense         the weights that the others gate are trained themselves
leap_pl       they are frozen, and the logits of their gates are trained
shared        likewise, and rows and columns take steps together (SharedAdamW)
low_memory    as leap_pl, in bfloat16 by PackedAdamW; low_memory_shared: with such steps
published     likewise, the mask made as in benchmarks/published.py, or benchmarks/published_nm.py for NMGate
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.published import PublishedMasks
from benchmarks.published_nm import PublishedNM
from leap_pl import gates as kinds
from leap_pl.base_model.backbone import split_model
from leap_pl.base_model.weights import decoder_blocks, find_weights
from leap_pl.gates import Gate, GateState, attach
from leap_pl.losses.budget import kept_norm, sparsity_budget
from leap_pl.losses.language import language_losses
from leap_pl.losses.objective import Objective
from leap_pl.training.clipping import clip_by_norm
from leap_pl.training.optimizers import PackedAdamW, SharedAdamW

OBJECTIVE = Objective()
ALPHA, TAU = 200.0, 0.5

Step = Callable[[Tensor], None]
Start = Callable[[Gate], None]


def makers(gate: str = "BernoulliGate", start: Start | None = None) -> dict[str, Callable[[Any], Step]]:
    """Variant → function that makes its step from a model.

    Args:
        gate: Class of the gates of leap_pl, and of the published formulation that they are compared with.
        start: Sets the initial logits of a gate; None: as a run of leap_pl does, without a prior.
    """
    leap = partial(leap_step, kind=getattr(kinds, gate), start=start)
    return {
        "dense": dense_step,
        "leap_pl": leap,
        "shared": partial(leap, shared=0.5),
        "low_memory": partial(leap, low_memory=True),
        "low_memory_shared": partial(leap, low_memory=True, shared=0.5),
        "published": partial(leap_step, kind=PublishedNM, start=start) if gate == "NMGate" else published_step,
    }


def first_blocks(model: Any, layers: int) -> Any:
    """The model with only its first decoder blocks; all of them for 0."""
    _, blocks = decoder_blocks(model)
    assert isinstance(blocks, nn.ModuleList)
    if layers:
        del blocks[layers:]
        model.config.num_hidden_layers = len(blocks)
    return model


def _optimizer(
    parameters: list[Any], *, ours: bool = False, packed: bool = False, shared: float = 0.0
) -> Callable[[], None]:
    """Clip, step and drop the gradients; ``ours`` as a run of leap_pl does, else as one would with torch alone."""
    optimizer: torch.optim.Optimizer
    if packed:
        optimizer = PackedAdamW(parameters, lr=1e-5, rows=shared, columns=shared)
    elif shared:
        optimizer = SharedAdamW(parameters, lr=1e-5, rows=shared, columns=shared)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step() -> None:
        if ours:
            norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
            clip_by_norm(optimizer, parameters, 1.0, norm)
        else:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _language_loss(model: Any) -> Callable[[Tensor], Tensor]:
    states, head = split_model(model)

    def loss(ids_BL: Tensor) -> Tensor:
        hidden = states(ids_BL)[:, :-1].flatten(0, 1)
        return language_losses(hidden, ids_BL[:, 1:].reshape(-1), head, OBJECTIVE)[0]

    return loss


def dense_step(model: Any) -> Step:
    """Fine-tuning of the weights that the others gate."""
    weights = find_weights(model)
    loss = _language_loss(model.train())
    model.requires_grad_(False)
    parameters = [weight.parameter.requires_grad_(True) for weight in weights.values()]
    update = _optimizer(parameters)

    def step(ids_BL: Tensor) -> None:
        loss(ids_BL).backward()
        update()

    return step


def leap_step(
    model: Any,
    kind: type[Gate] = kinds.BernoulliGate,
    *,
    low_memory: bool = False,
    shared: float = 0.0,
    start: Start | None = None,
) -> Step:
    """A step of leap_pl, its objective whole, without Lightning; ``low_memory`` as the recipe has it.

    ``shared`` is the rate of the steps that rows and columns take together.
    """
    weights = find_weights(model)
    sizes = {name: weight.parameter.numel() for name, weight in weights.items()}
    norm = sum(float(weight.parameter.detach().float().norm()) for weight in weights.values())
    loss = _language_loss(model.train())
    model.requires_grad_(False)
    state = GateState()
    state.anneal(ALPHA, TAU)
    gates = attach(weights, kind, state, torch.bfloat16 if low_memory else torch.float32)
    start = start or (lambda gate: gate.start_from(None, 0))
    for each in gates.values():
        start(each)
    update = _optimizer(list(gates.learned().values()), ours=True, packed=low_memory, shared=shared)

    def step(ids_BL: Tensor) -> None:
        language = loss(ids_BL)
        budget = sparsity_budget(gates.kept, sizes, 0.5, [list(sizes)])
        size = kept_norm(gates.energy.values(), norm)
        (language + OBJECTIVE.budget * budget - OBJECTIVE.weight * size).backward()
        update()
        state.step += 1

    return step


def published_step(model: Any) -> Step:
    """The same with the mask as published."""
    weights = find_weights(model)
    loss = _language_loss(model.train())
    model.requires_grad_(False)
    masks = PublishedMasks(weights)
    update = _optimizer(list(masks.logits.values()))

    def step(ids_BL: Tensor) -> None:
        density, size = masks.sample(ALPHA, TAU)
        budget = (density - 0.5).abs()
        (loss(ids_BL) + OBJECTIVE.budget * budget - OBJECTIVE.weight * size).backward()
        update()

    return step
