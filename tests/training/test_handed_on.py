"""What a run hands on to its parts, at settings other than the defaults, against what the parts compute."""

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning import Callback
from tiny import byte_tokenizer, tiny_model
from torch import Tensor, nn

from leap_pl import LeapModule, TextDataModule
from leap_pl.data import calibration_blocks
from leap_pl.data.packing import BlockStream
from leap_pl.data.source import TextSource
from leap_pl.losses.objective import Objective
from leap_pl.prior import Prior
from leap_pl.training.optimizers import PackedAdamW
from leap_pl.training.schedules import warmup_cosine
from leap_pl.training.weights import WeightTraining

pytestmark = pytest.mark.usefixtures("eager")


def trainer(*callbacks: Callback, **settings: Any) -> L.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(accelerator="cpu", callbacks=list(callbacks), **{**quiet, **settings})


def data(text_file: Path, **settings: Any) -> TextDataModule:
    return TextDataModule(
        text=str(text_file), **{"seq_length": 32, "batch_size": 2, "validation_sequences": 0, **settings}
    )


# -- the loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_loss_of_every_step_is_the_documented_sum(scope: Any, model_folder: Path, text_file: Path) -> None:
    """lm + 7·Σ|mean M − .3| − 10·(1 − t/T)·Σ‖M⊙W‖/Σ‖W‖ at 70%, from the sums of the masks and the model's weights."""
    seen: list[tuple[int, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]] = []

    class Note(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            kept, energy = ({n: x.detach().clone() for n, x in sums.items()} for sums in self.sums(pl_module))
            seen.append((trainer.global_step - 1, dict(pl_module.terms), kept, energy))

        @staticmethod
        def sums(module: LeapModule) -> tuple[Any, Any]:
            return module.gates.kept, module.gates.energy

    objective = Objective(budget_scope=scope)
    module = LeapModule(
        str(model_folder), sparsity=0.7, dtype="float32", prior=Prior(method="none"), objective=objective
    )
    trainer(Note(), max_steps=3).fit(module, data(text_file))
    dense = {name: p.detach().double() for name, p in tiny_model().named_parameters()}
    assert len(seen) == 3
    for step, terms, kept, energy in seen:
        groups: dict[str, list[str]] = {}
        for name in kept:
            found = re.match(r"model\.layers\.(\d+)\.", name)
            assert found
            groups.setdefault(found[1] if scope == "layer" else "all", []).append(name)
        assert len(groups) == (2 if scope == "layer" else 1)
        budget = sum(
            abs(sum(float(kept[n]) for n in group) / sum(dense[n].numel() for n in group) - 0.3)
            for group in groups.values()
        )
        norm = sum(float(energy[n]) ** 0.5 for n in energy) / sum(float(dense[n].norm()) for n in energy)
        assert 0.1 < norm < 0.9
        assert budget > 0.05
        total = float(terms["lm"]) + 7 * budget - 10 * (1 - step / 3) * norm
        assert float(terms["loss"]) == pytest.approx(total, rel=1e-5)


# -- the optimizer ------------------------------------------------------------------------------------------


def test_masks_and_weights_have_rates_and_decay_of_their_own(model_folder: Path, text_file: Path) -> None:
    rates: list[list[float]] = []

    class Note(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    module = LeapModule(
        str(model_folder),
        dtype="float32",
        prior=Prior(method="none"),
        train_weights="kept",
        warmup_steps=1,
        weight_training=WeightTraining(lr=2e-4, warmup_steps=3, weight_decay=0.25),
    )
    fitting = trainer(Note(), max_steps=6)
    fitting.fit(module, data(text_file))
    masks, weights = fitting.optimizers[0].param_groups
    assert {id(p) for p in masks["params"]} == {id(gate.logits) for gate in module.gates.values()}
    assert (masks["weight_decay"], weights["weight_decay"]) == (0.0, 0.25)
    expected = [
        [1e-3 * warmup_cosine(k, total=6, warmup=1), 2e-4 * warmup_cosine(k, total=6, warmup=3)] for k in range(6)
    ]
    assert rates == [pytest.approx(pair) for pair in expected]
    assert rates[1][0] / 1e-3 != pytest.approx(rates[1][1] / 2e-4)  # at which the two warm-ups differ


def test_groups_of_a_packed_step_have_rates_of_their_own() -> None:
    first, second = (nn.Parameter(torch.zeros(4, 8)) for _ in range(2))
    optimizer = PackedAdamW([{"params": [first], "lr": 1e-3}, {"params": [second], "lr": 1e-1}], weight_decay=0.0)
    for parameter in (first, second):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # Adam's first step is the rate, whatever the gradient
    torch.testing.assert_close(first.detach(), torch.full((4, 8), -1e-3), rtol=0.02, atol=0)
    torch.testing.assert_close(second.detach(), torch.full((4, 8), -1e-1), rtol=0.02, atol=0)


def test_clipping_by_value_clips_each_gradient(model_folder: Path, text_file: Path) -> None:
    """A step of SGD of rate 1 is the clipped gradient; by the norm, far fewer would be at the bound."""
    before: dict[str, Tensor] = {}
    raw: dict[str, Tensor] = {}

    class Note(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            for name, gate in pl_module.gates.items():
                before[name], raw[name] = gate.logits.detach().clone(), gate.logits.grad.clone()

    bound = 1e-5
    module = LeapModule(
        str(model_folder),
        dtype="float32",
        prior=Prior(method="none"),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
    )
    trainer(Note(), max_steps=1, gradient_clip_val=bound, gradient_clip_algorithm="value").fit(module, data(text_file))
    assert max(float(gradient.abs().max()) for gradient in raw.values()) > 2 * bound
    for name, gate in module.gates.items():
        expected = before[name] - raw[name].clamp(-bound, bound)
        torch.testing.assert_close(gate.logits.detach(), expected, rtol=0, atol=1e-8)


# -- the prior ----------------------------------------------------------------------------------------------


def test_the_prior_has_the_sparsity_of_the_run(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    module = LeapModule(
        str(model_folder), sparsity=0.7, dtype="float32", prior=Prior(method="magnitude", cache_dir=str(tmp_path))
    )
    trainer(max_steps=1).fit(module, data(text_file))
    assert module.prior is not None
    for name, mask in module.prior.masks.items():
        assert int((~mask).sum()) == pytest.approx(0.7 * mask.numel(), abs=0.5), name


# -- the text -----------------------------------------------------------------------------------------------


def test_documents_are_joined_by_the_separator_of_the_run(model_folder: Path, text_file: Path) -> None:
    tokenizer = byte_tokenizer()
    joined = {}
    for separator, end in (("blank_line", tokenizer("\n\n")["input_ids"]), ("end_token", [256])):
        module = data(text_file, separator=separator, tokenizer=str(model_folder))
        assert module.stream.end == end
        given = calibration_blocks(str(text_file), tokenizer, seq_length=32, sequences=8, separator=separator)
        source = TextSource.open(str(text_file), share="train", seed=0)
        stream = BlockStream(source, tokenizer, 32, separator, "every")
        expected = [block.tokens for block, _ in zip(stream.blocks(), range(8), strict=False)]
        assert given.tolist() == expected
        joined[separator] = given
    assert not torch.equal(joined["blank_line"], joined["end_token"])


def test_the_order_of_files_is_that_of_the_seed_of_the_run(model_folder: Path, tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(f"{number} " * 400)
    first = set()
    for seed in range(6):
        module = data(tmp_path / "*.txt", seed=seed, tokenizer=str(model_folder))
        block = next(iter(module.stream.blocks())).tokens
        first.add(block[0])
        (own,) = calibration_blocks(
            str(tmp_path / "*.txt"), str(model_folder), seq_length=len(block), sequences=1, seed=seed
        )
        assert own.tolist() == list(block)  # one-shot masks and priors see the same text
    assert len(first) > 1
