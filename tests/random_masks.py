"""A mask of random weights of a model in a folder."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from leap_pl.base_model.weights import find_weights, model_fingerprint
from leap_pl.masks import MaskSet, Provenance


def random_mask(folder: Path, path: Path, sparsity: float = 0.5) -> MaskSet:
    model = AutoModelForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(3)
    masks = {n: torch.rand(w.parameter.shape, generator=generator) > sparsity for n, w in find_weights(model).items()}
    mask = MaskSet(masks, Provenance(str(folder), model_fingerprint(model), "random", sparsity))
    mask.save(path)
    return mask
