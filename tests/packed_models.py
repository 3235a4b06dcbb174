"""Packed folders of tiny models, for the tests of several rooms."""

from pathlib import Path

import torch
from tiny import byte_tokenizer, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from leap_pl.base_model.weights import find_weights, model_fingerprint
from leap_pl.export.hugging_face import export_model
from leap_pl.masks import MaskSet, Provenance


def sparse_folder(path: Path, family: str = "llama", *, density: float = 0.4, dtype=torch.bfloat16) -> MaskSet:
    """Write a tiny base model into ``path``, and return a random mask of it; one row of each mask is empty."""
    model = tiny_model(family).to(dtype)
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    base = AutoModelForCausalLM.from_pretrained(path)
    generator = torch.Generator().manual_seed(3)
    masks = {n: torch.rand(w.parameter.shape, generator=generator) < density for n, w in find_weights(base).items()}
    for mask in masks.values():
        mask.view(-1, mask.shape[-1])[1] = False
    return MaskSet(masks, Provenance(str(path), model_fingerprint(base), "random", 1 - density))


def packed_folder(path: Path, family: str = "llama", **options: object) -> tuple[Path, MaskSet]:
    """Write a base model and a packed one of it in ``path``, and return the packed folder and its mask."""
    masks = sparse_folder(path / "base", family, **options)  # type: ignore[arg-type]
    export_model(masks, path / "packed", str(path / "base"), format="packed")
    return path / "packed", masks


def masked_base(path: Path, masks: MaskSet) -> PreTrainedModel:
    """The base model in ``path`` under the masks, with zeros."""
    model = AutoModelForCausalLM.from_pretrained(path / "base", dtype="auto")
    masks.apply_(model)
    return model
