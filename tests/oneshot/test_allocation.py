"""OWL against its formula, and sparsities that are read from files."""

import math
import os
from pathlib import Path

import pytest
import torch
from matrices import tokens
from tiny import tiny_model
from torch import Tensor, nn

from leap_pl.base_model.weights import find_weights
from leap_pl.errors import UserError
from leap_pl.oneshot.allocation import OwlOptions, owl_sparsities, read_layer_sparsities
from leap_pl.oneshot.prune import by_block
from leap_pl.oneshot.walk import Walk, WalkOptions

BLOCKS = tokens(4, 24)


def shares_by_hooks(model: nn.Module, threshold: float) -> list[float]:
    """Of each decoder block, the share of its Wanda scores above ``threshold`` times their mean."""
    inputs: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda module, args, output, name=name: inputs.__setitem__(name, args[0].detach().double())
            )
    with torch.no_grad():
        model(input_ids=BLOCKS, use_cache=False)
    shares = []
    for layer in range(len(model.model.layers)):
        scores = []
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name.startswith(f"model.layers.{layer}."):
                norm = inputs[name].flatten(0, 1).square().mean(0).sqrt()
                scores.append((module.weight.detach().double().abs() * norm).flatten())
        every = torch.cat(scores)
        shares.append(float((every > threshold * every.mean()).double().mean()))
    return shares


def test_blocks_with_equal_shares_of_outliers_are_equally_sparse() -> None:
    model = tiny_model()
    with Walk(model, BLOCKS, WalkOptions(keep=True)) as walk:
        found = owl_sparsities(walk, by_block(model, find_weights(model)), 0.6, OwlOptions(threshold=1e9))
    assert found == pytest.approx([0.6, 0.6])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"spread": -0.08}, "spread of -0.08: give a number from 0"),
        ({"spread": math.nan}, "spread of nan"),
        ({"threshold": 0.0}, "threshold of 0: give a number above 0"),
        ({"threshold": math.inf}, "threshold of inf"),
    ],
)
def test_settings_of_owl_that_turn_it_round(settings: dict[str, float], says: str) -> None:
    with pytest.raises(UserError, match=f"OWL with a {says}"):
        OwlOptions(**settings)


@pytest.mark.parametrize("threshold", [3.0, 5.0])
def test_owl_is_its_formula(threshold: float) -> None:
    """Block by block s + mean(u) − u, with u = 2λ·(D − min D)/(max D − min D), for more than two blocks."""
    model = tiny_model(num_hidden_layers=4)
    with torch.no_grad():
        for layer, outliers in enumerate((0, 40, 15, 90)):
            model.model.layers[layer].mlp.up_proj.weight.flatten()[: 16 * outliers : 16] *= 40
    found_weights = find_weights(model)
    options = OwlOptions(threshold=threshold, spread=0.06)
    with Walk(model, BLOCKS, WalkOptions(keep=True)) as walk:
        found = owl_sparsities(walk, by_block(model, found_weights), 0.6, options)
    shares = torch.tensor(shares_by_hooks(model, threshold), dtype=torch.float64)
    above = 2 * 0.06 * (shares - shares.min()) / (shares.max() - shares.min())
    assert found == pytest.approx((0.6 + above.mean() - above).tolist(), abs=1e-4)
    middle = sorted(above.tolist())[1:3]
    assert all(1e-3 < share < 2 * 0.06 - 1e-3 for share in middle)
    # A block without weights to prune has no share of outliers, not one of 0.
    some = find_weights(model, ["re:.*layers.[013].*"])
    with Walk(model, BLOCKS, WalkOptions(keep=True)) as walk:
        found = owl_sparsities(walk, by_block(model, some), 0.6, options)
    known = shares[[0, 1, 3]]
    above = 2 * 0.06 * (known - known.min()) / (known.max() - known.min())
    assert [found[0], found[1], found[3]] == pytest.approx((0.6 + above.mean() - above).tolist(), abs=1e-4)
    assert found[2] == 0.6


def test_sparsities_of_a_file_that_never_ends(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("/dev/zero", "is a device"), (tmp_path / "pipe", "is a pipe")):
        with pytest.raises(UserError, match=f"--layer_sparsity {name} {message}"):
            read_layer_sparsities(name)
    (tmp_path / "long").write_bytes(b"0.5\n" * (1 << 19))
    with pytest.raises(UserError, match="far more than such a file has"):
        read_layer_sparsities(tmp_path / "long")
    (tmp_path / "deep").write_text("[" * 100_000)
    with pytest.raises(UserError, match="does not hold layer sparsities"):
        read_layer_sparsities(tmp_path / "deep")
    (tmp_path / "good").write_text("0.25 0.75\n")
    assert read_layer_sparsities(tmp_path / "good") == [0.25, 0.75]


def test_owl_has_the_overall_sparsity_whatever_the_sizes_of_blocks() -> None:
    model = tiny_model(num_hidden_layers=3)
    with torch.no_grad():
        for layer, outliers in enumerate((0, 40, 15)):
            model.model.layers[layer].self_attn.q_proj.weight.flatten()[: 16 * outliers : 16] *= 40
    blocks = by_block(model, find_weights(model, ignore=["re:.*layers.1.mlp.*"]))
    with Walk(model, BLOCKS, WalkOptions(keep=True)) as walk:
        found = owl_sparsities(walk, blocks, 0.6, OwlOptions(spread=0.06))
    sizes = [sum(m.view(m.weight.parameter).numel() for m in block) for block in blocks]
    assert len(set(sizes)) == 2
    assert max(found) - min(found) == pytest.approx(0.12)
    assert sum(s * n for s, n in zip(found, sizes, strict=True)) / sum(sizes) == pytest.approx(0.6, abs=1e-9)
