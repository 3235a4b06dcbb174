"""What the tokenizer puts before a text is an input of every pass, and a target of none."""

from pathlib import Path
from typing import Any

import pytest
from lightning import Trainer
from tiny import tiny_folder
from torch import Tensor

from leap_pl import LeapModule, TextDataModule
from leap_pl.gates.gate import Mode
from leap_pl.losses.objective import Objective
from leap_pl.oneshot import fisher
from leap_pl.prior import Prior
from leap_pl.training.validation import Validation

PREFIX, SEQ_LENGTH = 2, 16  # GLM's is of two tokens


def test_the_prefix_is_no_target(text_file: Path, tmp_path: Path, eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[Tensor]] = {"training": [], "validation": [], "fisher": []}
    language, losses, update = Objective.language, fisher.language_losses, Validation.update

    def of_training(self: Objective, hidden: Tensor, targets: Tensor, *rest: Any) -> Any:
        seen["training"].append(targets)
        return language(self, hidden, targets, *rest)

    def of_fisher(hidden: Tensor, targets: Tensor, *rest: Any) -> Any:
        seen["fisher"].append(targets)
        return losses(hidden, targets, *rest)

    def of_validation(self: Validation, mode: Mode, hidden: Tensor, targets: Tensor, *rest: Any) -> None:
        seen["validation"].append(targets)
        update(self, mode, hidden, targets, *rest)

    monkeypatch.setattr(Objective, "language", of_training)
    monkeypatch.setattr(fisher, "language_losses", of_fisher)
    monkeypatch.setattr(Validation, "update", of_validation)
    inputs: list[Tensor] = []
    prior = Prior(method="magnitude", fisher=0.5, sequences=4, cache_dir=str(tmp_path / "priors"))
    module = LeapModule(str(tiny_folder(tmp_path / "model", prefix=PREFIX)), prior=prior, dtype="float32")
    module.when_loaded.append(
        lambda model: model.get_input_embeddings().register_forward_hook(lambda _, given, __: inputs.extend(given))
    )
    data = TextDataModule(text=str(text_file), seq_length=SEQ_LENGTH, batch_size=2, validation_sequences=2)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    Trainer(accelerator="cpu", max_steps=1, num_sanity_val_steps=-1, **quiet).fit(module, data)
    blocks = [block for given in inputs for block in given if len(block) == SEQ_LENGTH]  # and not those of a probe
    assert all(block[:PREFIX].tolist() == [257, 258] for block in blocks)
    assert len(blocks) >= 4 + 2 + 2 * 2
    for name, targets in seen.items():
        assert targets, name
        assert all(int(one.max()) < 257 for one in targets), name
        assert {one.numel() % (SEQ_LENGTH - PREFIX) for one in targets} == {0}, name
