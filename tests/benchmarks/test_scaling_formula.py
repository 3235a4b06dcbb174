"""The formula of docs/scaling.md, against models' own counts and what is measured elsewhere."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from transformers import AutoModelForCausalLM

from benchmarks.gpu.shapes import MODELS, Model
from benchmarks.report import table
from benchmarks.scaling import OUTSIDE, SHAPES, Shape, need, rows, tokens_to_hide
from benchmarks.sharded_memory import kept_bytes
from leap_pl.base_model.weights import find_weights
from leap_pl.training import memory
from leap_pl.training.module import LeapModule
from leap_pl.training.optimizers import PackedAdamW

TINY = Shape(2, 32, 48, 16, 260)


@pytest.mark.parametrize("sizes", [Model(TINY, 8), *MODELS.values()])
def test_weights_are_counted_as_the_model_has_them(sizes: Model) -> None:
    shape = sizes.shape
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(sizes.config())
    gated = sum(weight.parameter.numel() for weight in find_weights(model).values())
    assert shape.gated == gated
    assert shape.others == sum(parameter.numel() for parameter in model.parameters()) - gated


def test_published_sizes() -> None:
    sizes = {name: (shape.gated + shape.others) / 1e9 for name, shape in SHAPES.items()}
    assert sizes["qwen2.5-0.5b"] == pytest.approx(0.494, abs=0.001)
    assert sizes["llama-3.1-8b"] == pytest.approx(8.03, abs=0.01)
    assert sizes["llama-3.1-70b"] == pytest.approx(70.55, abs=0.01)
    assert sizes["qwen2.5-32b"] == pytest.approx(32.76, abs=0.01)
    assert sizes["llama-3.2-3b"] == pytest.approx(3.21, abs=0.01)
    assert sizes["llama-3.2-1b"] == pytest.approx(1.24, abs=0.01)


def test_one_rank_shards_nothing_and_sends_nothing() -> None:
    one, same = (need(TINY, 1, sharded=sharded, tokens=64) for sharded in (False, True))
    assert one == same
    assert (one.sent, one.sent_step) == (0, 0)
    assert one.states == 18 * TINY.gated + 2 * TINY.others


def test_shards_divide_the_states_and_nothing_else() -> None:
    two, four = (need(TINY, ranks, sharded=True, tokens=64) for ranks in (2, 4))
    assert two.states - four.states == 18 * TINY.gated / 4
    assert (two.transient, two.activations) == (four.transient, four.activations)
    assert two.sent / four.sent == pytest.approx((1 / 2) / (3 / 4))
    assert two.sent == (2 * 6 + 4) * TINY.gated / 2
    assert need(TINY, 2, sharded=True, tokens=64, distillation=True).sent == (3 * 6 + 4) * TINY.gated / 2


def test_a_ring_reduces_the_gradients() -> None:
    assert need(TINY, 4, sharded=False, tokens=64).sent_step == 2 * 3 / 4 * 4 * TINY.gated


def test_what_a_block_keeps_is_what_the_formula_says() -> None:
    """Counted on a real block, at full attention heads; with fewer key-value heads it is less."""
    kept = kept_bytes()
    assert kept["hidden"] == pytest.approx(memory.KEPT_HIDDEN, rel=0.01)
    assert kept["intermediate"] == pytest.approx(memory.KEPT_INTERMEDIATE, rel=0.01)


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_run_announces_what_the_formula_says(ranks: int) -> None:
    """But for the allowance for what is outside, and the norms of a block, which the formula leaves out."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MODELS["llama-3.2-1b"].config(), dtype=torch.bfloat16)
    shape, module = SHAPES["llama-3.2-1b"], LeapModule("base", activation_checkpointing=True)
    announced = memory.expected_bytes(module, model, shape.gated, 4096, ranks)
    expected = need(shape, ranks, sharded=True, tokens=4096).memory - OUTSIDE
    assert announced == pytest.approx(expected, rel=1e-3)


def test_a_run_announces_the_bytes_of_trained_weights() -> None:
    """As benchmarks/sharded_memory.py measures them held: 18.13 bytes a weight with the mask fixed, 34.01 with both."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MODELS["llama-3.2-1b"].config(), dtype=torch.bfloat16)
    gated, module = SHAPES["llama-3.2-1b"].gated, LeapModule("base", train_weights="kept")
    module.sizes = {"all": gated}
    block = gated / len(model.model.layers)
    fixed, both = (memory.expected_bytes(module, model, logits, 64, 1, trained=gated) for logits in (0, gated))
    mask = memory.expected_bytes(module, model, gated, 64, 1)
    assert both - mask == pytest.approx(16 * gated + memory.TRANSIENT_WEIGHTS * block, rel=1e-3)
    assert both - fixed == pytest.approx((16 - 1 / 8) * gated + (8 + 4 - 6) * block, rel=1e-3)


@pytest.mark.parametrize("low_memory", [False, True])
def test_training_weights_holds_so_many_bytes(low_memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a gated weight in bfloat16, no block recomputed: at most 22 with the mask fixed, 36 with both; or half."""
    for name in ("TRANSIENT", "TRANSIENT_FIXED", "TRANSIENT_WEIGHTS", "TRANSIENT_LOW_MEMORY"):
        monkeypatch.setattr(memory, name, 0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MODELS["llama-3.2-1b"].config(), dtype=torch.bfloat16)
    gated = SHAPES["llama-3.2-1b"].gated
    low: Any = {"logits_dtype": "bfloat16", "optimizer": PackedAdamW} if low_memory else {}
    module = LeapModule("base", train_weights="kept", **low)
    module.sizes = {"all": gated}
    frozen = memory.expected_bytes(module, model, 0, 64, 1)  # with bits, and a masked weight beside the base model's
    fixed, both = (
        (memory.expected_bytes(module, model, logits, 64, 1, trained=gated) - frozen) / gated + 1 / 8 + 2 + 2
        for logits in (0, gated)
    )
    assert (fixed, both) == pytest.approx((10.125, 16) if low_memory else (20.125, 36), abs=1e-3)


def test_a_run_announces_the_buckets_of_ddp(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MODELS["llama-3.2-1b"].config(), dtype=torch.bfloat16)
    gated, module, found = SHAPES["llama-3.2-1b"].gated, LeapModule("base", activation_checkpointing=True), []
    for strategy in (DDPStrategy(gradient_as_bucket_view=True), SingleDeviceStrategy("cpu"), DDPStrategy()):
        trainer = SimpleNamespace(strategy=strategy)
        monkeypatch.setattr(LeapModule, "attached", trainer)
        found.append(memory.expected_bytes(module, model, gated, 64, 1))
    assert found[1] == found[0]
    assert found[2] - found[0] == 4 * gated


def test_a_run_announces_the_masked_weights_that_are_not_recomputed() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MODELS["llama-3.2-1b"].config(), dtype=torch.bfloat16)
    gated, config = SHAPES["llama-3.2-1b"].gated, model.config
    whole, recomputed = LeapModule("base"), LeapModule("base", activation_checkpointing=True)
    for module in (whole, recomputed):
        module.sizes = {"all": gated}
    found = [memory.expected_bytes(module, model, gated, 64, 8) for module in (whole, recomputed)]
    hidden, layers = config.hidden_size, config.num_hidden_layers
    block = memory.KEPT_HIDDEN * hidden + memory.KEPT_INTERMEDIATE * config.intermediate_size
    kept = 64 * (block * (layers - 1) - 2 * hidden * layers)
    assert found[0] - found[1] == pytest.approx(2 * gated + kept, rel=1e-6)


def test_the_wall_of_the_tables() -> None:
    """What docs/scaling.md says fits."""

    def memory(name: str, ranks: int, *, sharded: bool) -> float:
        return need(SHAPES[name], ranks, sharded=sharded, tokens=4096).memory / 2**30

    assert memory("llama-3.2-3b", 1, sharded=False) < 70
    assert 80 < memory("llama-3.1-8b", 8, sharded=False) < 141
    assert memory("llama-3.1-8b", 2, sharded=True) < 80
    assert memory("qwen2.5-32b", 8, sharded=True) > 80 > memory("qwen2.5-32b", 16, sharded=True)
    assert memory("llama-3.1-70b", 16, sharded=True) > 80 > memory("llama-3.1-70b", 32, sharded=True)
    assert [row["GPUs"] for row in rows("llama-3.1-8b", [1, 64], 4096)] == [1, 64]
    assert tokens_to_hide(300e9, 400e12) == pytest.approx(2667, abs=1)


def test_the_table_is_what_the_benchmark_prints() -> None:
    """Every row of docs/scaling.md, and 8B and 70B over 1 to 64 GPUs among them."""
    shown = Path(__file__).parents[2].joinpath("docs", "scaling.md").read_text(encoding="utf-8").lower()
    counts = {
        "qwen2.5-0.5b": [1, 8],
        "llama-3.2-1b": [1, 8],
        "llama-3.2-3b": [1, 8],
        "llama-3.1-8b": [1, 2, 4, 8, 16, 32, 64],
        "qwen2.5-32b": [1, 8, 16, 32, 64],
        "llama-3.1-70b": [1, 2, 4, 8, 16, 32, 64],
    }
    for name, ranks in counts.items():
        for row in rows(name, ranks, 4096):
            assert table([row]).splitlines()[-1] in shown
        assert shown.count(f"| {name} |") == len(ranks)
