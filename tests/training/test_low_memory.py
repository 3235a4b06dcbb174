"""Learning with six bytes a weight: gradients and gates of bfloat16, whole runs, and what is refused."""

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import stopped_runs as resume
import torch
from conftest import fit_flags
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from leap_pl.base_model.weights import Weight
from leap_pl.checkpoints.layout import masks_from_checkpoint
from leap_pl.cli.main import main
from leap_pl.errors import UserError
from leap_pl.gates import BernoulliGate, Gate, GateState, NMGate, TileGate
from leap_pl.masks import MaskSet
from leap_pl.masks.top_k import exact_top_k
from leap_pl.training.module import LeapModule
from leap_pl.training.optimizers import PackedAdamW, check_rounding

pytestmark = pytest.mark.usefixtures("eager", "event_files_in_order")

DATA = ["--data.seq_length=32", "--data.validation_sequences=4", "--trainer.accelerator=cpu"]
LOW = ["--model.logits_dtype=bfloat16", "--model.optimizer=PackedAdamW", "--model.optimizer.lr=2e-3"]


# -- gates ------------------------------------------------------------------------------------------------------


def gate_of(kind: type[Gate], **settings: Any) -> tuple[Gate, Tensor]:
    torch.manual_seed(0)
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(16, 32) * 0.1, requires_grad=False)
    state = GateState()
    state.anneal(50.0, 1.0, pattern_alpha=100.0)
    gate = kind(Weight("w", module, "weight", 0, "w", 1), state, **settings)
    gate.start_from(torch.rand(16, 32) > 0.5, 0)
    return gate, module.weight


KINDS: list[tuple[type[Gate], dict[str, Any]]] = [
    (BernoulliGate, {}),
    (NMGate, {"n": 2, "m": 4}),
    (NMGate, {"n": 3, "m": 6}),  # 20 patterns
    (TileGate, {"tile": 8, "mode": "joint"}),
]


@pytest.mark.parametrize(("kind", "settings_"), KINDS)
def test_a_gate_of_bfloat16_logits_is_the_same_gate(kind: type[Gate], settings_: dict[str, Any]) -> None:
    """Mask, sums and gradients are those of equal float32 logits, but that gradients are rounded at the end."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        gate, weight = gate_of(kind, **settings_)
        gate.store_as(torch.bfloat16)
        gate.store_as(dtype)
        masked, kept, energy = gate.soften(weight, *gate.keys())
        torch.manual_seed(1)
        ((masked * torch.randn_like(masked)).sum() + 0.1 * kept + energy).backward()
        gradients = {name: parameter.grad for name, parameter in gate.named_parameters()}
        assert all(gradient is not None and gradient.dtype == dtype for gradient in gradients.values())
        found.append((masked.detach(), kept.detach(), energy.detach(), gradients))
    for one, other in zip(found[0][:3], found[1][:3], strict=True):
        assert torch.equal(one, other)
    for name, gradient in found[0][3].items():
        assert torch.equal(gradient.bfloat16(), found[1][3][name]), name


@pytest.mark.parametrize(("lean", "bound"), [(0.0, 0.03), (0.1, 0.03), (1.0, 0.03)])
def test_what_adding_up_in_bfloat16_costs(lean: float, bound: float) -> None:
    """256 micro-batches, as in the paper, of gradients N(lean, 1) of the masked weights: the error of the sum."""
    sums = []
    for dtype in (torch.float32, torch.bfloat16):
        gate, weight = gate_of(BernoulliGate)
        gate.store_as(torch.bfloat16)
        gate.store_as(dtype)
        torch.manual_seed(0)
        for micro_batch in range(256):
            gate.state.micro_batch = micro_batch
            masked, *_ = gate.soften(weight, *gate.keys())
            (masked * (torch.randn_like(masked) + lean)).sum().backward()
        assert gate.logits.grad is not None
        assert gate.logits.grad.dtype == dtype
        sums.append(gate.logits.grad.double())
    exact, rounded = sums
    assert 0 < float((rounded - exact).norm() / exact.norm()) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_the_precision_of_the_rest_leaves_it_alone(dtype: torch.dtype) -> None:
    gate, _ = gate_of(BernoulliGate)
    gate.store_as(torch.bfloat16)
    before = gate.logits.detach().clone()
    gate.logits.grad = torch.ones_like(gate.logits)
    gate.to(dtype)
    assert gate.logits.dtype == gate.logits.grad.dtype == torch.bfloat16
    assert torch.equal(gate.logits.detach(), before)


@given(st.integers(0, 10_000), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_exactly_k_of_bfloat16_with_ties(seed: int, share: float) -> None:
    """Few different values: the cut falls into a tie, and the lowest indices of it stay."""
    torch.manual_seed(seed)
    logits = [(torch.randn(size) * 0.02).bfloat16().mul_(8).round_().div_(8 * 64) for size in (50, 170, 1)]
    k = round(share * 221)
    masks = [cut.mask(part) for cut, part in zip(exact_top_k(logits, k), logits, strict=True)]
    kept, values = torch.cat(masks), torch.cat(logits).double()
    assert int(kept.sum()) == k
    order = sorted(range(221), key=lambda i: (-float(values[i]), i))
    assert kept.nonzero().flatten().tolist() == sorted(order[:k])


# -- whole runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", [[], ["--model.gate=NMGate", "--model.objective.budget=0"]])
def test_a_run(model_folder: Path, text_file: Path, tmp_path: Path, gate: list[str]) -> None:
    main(fit_flags(model_folder, text_file, tmp_path, *LOW, *gate))
    stored = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert {tensor.dtype for tensor in stored["state_dict"].values()} == {torch.bfloat16}
    states = stored["optimizer_states"][0]["state"]
    assert {state["packed_moments"].dtype for state in states.values()} == {torch.uint8}
    mask = MaskSet.load(tmp_path / "checkpoints" / "mask.safetensors")
    again = masks_from_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert all(torch.equal(mask.masks[name], again.masks[name]) for name in mask.masks)
    kept, total = sum(int(m.sum()) for m in mask.masks.values()), sum(m.numel() for m in mask.masks.values())
    assert kept == total - round(0.5 * total)
    told = mask.provenance.config
    assert told["logits_dtype"] == "bfloat16"
    assert told["optimizer"]["class"] == "PackedAdamW"
    prior = MaskSet.load(tmp_path / "checkpoints" / "prior.safetensors")
    if not gate:
        assert any(not torch.equal(mask.masks[name], prior.masks[name]) for name in mask.masks)
    validate = [f"--ckpt_path={tmp_path / 'checkpoints' / 'last.ckpt'}", "--trainer.logger=false"]
    main(["validate", *fit_flags(model_folder, text_file, tmp_path)[1:3], *DATA, f"--data.text={text_file}", *validate])


@pytest.mark.parametrize("micro_batch", [3, 5])
def test_a_stopped_run_ends_bit_identical(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batch: int
) -> None:
    """Between two steps, and amid the micro-batches of one; with another state of torch's own generator."""
    main(resume.flags(model_folder, text_file, tmp_path / "whole", *LOW))
    words = resume.flags(model_folder, text_file, tmp_path / "run", *LOW, "--ckpt_path=last")
    with monkeypatch.context() as patch:
        resume.at_call(patch, "training_step", micro_batch, resume.send(signal.SIGTERM))
        resume.stopped(words)
    main([*words, "--seed_everything=17"])
    resume.same(resume.outcome(tmp_path / "run"), resume.outcome(tmp_path / "whole"))


def test_numbers_that_break_are_found(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    real = LeapModule.on_before_optimizer_step

    def break_one(self: LeapModule, optimizer: torch.optim.Optimizer) -> None:
        if self.global_step == 1:
            next(iter(self.gates.values())).logits.grad.view(-1)[3] = math.inf  # type: ignore[union-attr]
        real(self, optimizer)

    monkeypatch.setattr(LeapModule, "on_before_optimizer_step", break_one)
    with pytest.raises(SystemExit):
        main(fit_flags(model_folder, text_file, tmp_path, *LOW))
    assert "the gradients of model.layers.0" in capsys.readouterr().err


def test_an_optimizer_that_rounds_to_the_nearest_is_refused(
    model_folder: Path, text_file: Path, tmp_path: Path, capsys: Any
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(fit_flags(model_folder, text_file, tmp_path, LOW[0]))
    said = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2
    assert "model.logits_dtype is bfloat16 and AdamW rounds to nearest" in said[-1]
    assert "--model.optimizer PackedAdamW" in said[-1]
    assert not list(tmp_path.rglob("prior.safetensors"))  # before the prior is made
    check_rounding(PackedAdamW([nn.Parameter(torch.zeros(1))]), torch.bfloat16)
    check_rounding(torch.optim.AdamW([nn.Parameter(torch.zeros(1))]), torch.float32)


@pytest.mark.parametrize("betas", [(0.9, 0.8), (0.99, 0.98), (1.0, 0.95), (0.9, 1.0), (-0.1, 0.9)])
def test_betas_that_it_cannot_hold_are_refused(betas: tuple[float, float]) -> None:
    with pytest.raises(UserError, match=r"Set model\.optimizer\.init_args\.betas"):
        PackedAdamW([nn.Parameter(torch.zeros(1))], betas=betas)


def test_the_state_of_another_optimizer_is_refused() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    other = torch.optim.AdamW([parameter])
    other.step()
    with pytest.raises(UserError, match="another optimizer"):
        PackedAdamW([parameter]).load_state_dict(other.state_dict())


def test_what_the_benchmark_counts(capsys: Any) -> None:
    from benchmarks.memory import BYTES, paper

    assert sum(BYTES["low_memory"].values()) - BYTES["low_memory"]["masked weight"] == 6
    told = paper("llama-3.1-8b", 4096)
    assert told["low_memory"]["GiB"] < 74 < told["leap_pl"]["GiB"]
    json.dumps(told)
