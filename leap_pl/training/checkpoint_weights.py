"""Trained weights of a checkpoint, read without the model."""

from pathlib import Path

import torch
from torch import Tensor

from leap_pl.checkpoints.identity import read_identity
from leap_pl.checkpoints.layout import load_checkpoint, tensors_of
from leap_pl.errors import UserError, listing
from leap_pl.gates import PART
from leap_pl.masks.kept_weights import KeptWeights
from leap_pl.training.run_settings import read_settings
from leap_pl.training.weights import NONE, Master, WeightTraining, kind_of

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def weights_from_checkpoint(path: str | Path) -> KeptWeights | None:
    """Return the trained weights in the checkpoint ``path``; None if its run trains none.

    Those of a folder are read one at a time.

    Raises:
        UserError: The checkpoint cannot be read, or lacks trained weights.
    """
    checkpoint = load_checkpoint(path)
    identity = read_identity(checkpoint, path)
    learned_with = read_settings(identity, checkpoint, str(path))
    kind = learned_with.get("model.train_weights", NONE)
    if kind == NONE:
        return None
    settings = WeightTraining(**learned_with.get("model.weight_training", {}))
    tensors, reader = tensors_of(checkpoint, path)
    read = reader or tensors.__getitem__
    parts: dict[str, list[str]] = {}
    for key in tensors:
        if key.startswith(PART):
            part, _, name = key.removeprefix(PART).partition(".")
            parts.setdefault(name, []).append(part)

    gated = kind_of(kind, settings)
    wanted = [name for name in identity.shapes if gated is not None and gated.takes(name, settings)]
    missing = [name for name in wanted if name not in parts]
    if missing or not parts:
        which = listing(missing, 3) if missing else "the norms"
        raise UserError(f"{path} lacks the trained weights of {which}. Take the checkpoint before it.")

    def value(name: str, base: Tensor) -> Tensor:
        made = gated if name in identity.shapes else None
        found = {part: read(f"{PART}{part}.{name}") for part in parts[name]}
        found |= {"bits": read(f"bits.{name}")} if made is not None and made.reads_bits else {}
        return (made or Master).value(base, found, settings)

    return KeptWeights(list(parts), value, _DTYPES.get(str(identity.settings.get("dtype"))))
