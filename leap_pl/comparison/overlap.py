"""Overlap (IoU) of two masks of one base model."""

from dataclasses import dataclass
from math import prod

from leap_pl.comparison.entries import Entry
from leap_pl.masks import split_name
from leap_pl.masks.bits import PackedMasks, count


@dataclass(frozen=True)
class Overlap:
    """Overlap of the masks of two entries.

    Attributes:
        first: Label of the first entry.
        second: Label of the second entry.
        iou: Number of weights that both keep, divided by the number that either keeps.
        chance: IoU of independent masks with the same density in each weight tensor.
        layers: Decoder block → IoU in it.
    """

    first: str
    second: str
    iou: float
    chance: float
    layers: dict[int, float]


def overlap(a: Entry, b: Entry) -> Overlap | None:
    """Return the overlap of the masks of ``a`` and ``b`` on the weights that both cover; None if there are none."""
    if a.mask is None or b.mask is None:
        return None
    both, either, expected_both, expected_either = 0, 0, 0.0, 0.0
    layers: dict[int, list[int]] = {}
    masks_a, masks_b = a.mask.packed().masks, b.mask.packed().masks
    assert isinstance(masks_a, PackedMasks)
    assert isinstance(masks_b, PackedMasks)
    for name, shape in masks_a.shapes.items():
        if masks_b.shapes.get(name) != shape:
            continue
        bits_a, bits_b, total = masks_a.packed[name], masks_b.packed[name], prod(shape)
        kept_a, kept_b, shared = (count(bits, shape) for bits in (bits_a, bits_b, bits_a & bits_b))
        joined = kept_a + kept_b - shared
        both, either = both + shared, either + joined
        expected = kept_a * kept_b / total
        expected_both, expected_either = expected_both + expected, expected_either + kept_a + kept_b - expected
        layer, _ = split_name(name)
        if layer is not None:
            counts = layers.setdefault(layer, [0, 0])
            counts[0], counts[1] = counts[0] + shared, counts[1] + joined
    if not either:
        return None
    return Overlap(
        first=a.label,
        second=b.label,
        iou=both / either,
        chance=expected_both / expected_either,
        layers={layer: shared / joined for layer, (shared, joined) in layers.items() if joined},
    )
