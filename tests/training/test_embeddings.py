"""Embeddings and head that are trained with the kept weights, and a head that has a gate."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fit_flags, refused
from lightning import Trainer
from safetensors.torch import load_file
from tiny import tiny_folder
from torch import Tensor

from leap_pl import LeapModule, MaskSet, TextDataModule, UserError
from leap_pl.base_model.loading import load_model
from leap_pl.base_model.weights import find_weights
from leap_pl.cli.export import export_command
from leap_pl.cli.main import main
from leap_pl.cli.prune import prune_command
from leap_pl.losses.objective import Objective
from leap_pl.prior import Prior
from leap_pl.training.weights import WeightTraining, parameters_of

pytestmark = pytest.mark.usefixtures("eager")

QUIET: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
TRAINING = WeightTraining(lr=0.5, warmup_steps=0, embeddings=True)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("tied", [True, False])
def test_one_step_is_that_of_plain_autograd(text_file: Path, tmp_path: Path, tied: bool, clip: float | None) -> None:
    """The LM loss of the masked model by transformers, and SGD; the export is what was trained.

    The norm that gradients are clipped by is that of all that is trained, with a gate or without one.
    """
    folder = tiny_folder(tmp_path / "model", tie_word_embeddings=tied)
    prune_command(str(folder), str(tmp_path / "mask"), method="magnitude")
    module = LeapModule(
        str(folder),
        mask=str(tmp_path / "mask"),
        dtype="float32",
        train_weights="kept",
        weight_training=TRAINING,
        objective=Objective(budget=0, weight=0, chunk=7),
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1),
    )
    seen: list[Tensor] = []
    step = module.training_step
    module.training_step = lambda batch, batch_idx: seen.append(batch["input_ids"]) or step(batch, batch_idx)  # type: ignore
    data = TextDataModule(text=str(text_file), seq_length=16, batch_size=2, validation_sequences=2)
    trainer = Trainer(accelerator="cpu", max_steps=1, gradient_clip_val=clip, default_root_dir=tmp_path, **QUIET)
    trainer.fit(module, data)

    masks, model = MaskSet.load(tmp_path / "mask" / "mask.safetensors"), load_model(str(folder), dtype="float32")
    model.eval()
    masks.apply_(model)
    model.requires_grad_(True)
    model(input_ids=seen[0], labels=seen[0]).loss.backward()
    for name, mask in masks.masks.items():
        model.get_parameter(name).grad.masked_fill_(~mask, 0)  # type: ignore[union-attr]
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))
    assert clip is None or norm > 2 * clip
    module.save_mask(tmp_path / "mask.safetensors")
    module.save_weights(tmp_path / "weights.safetensors", tmp_path / "mask.safetensors")
    found = load_file(tmp_path / "weights.safetensors")
    ends = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    assert ends < found.keys()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        moved = parameter.detach() - 0.5 * parameter.grad
        mask = masks.masks.get(name)
        expected = moved if mask is None else moved.masked_fill(~mask, 0)
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)
    names = find_weights(model)
    assert parameters_of("kept", TRAINING, names, model) == sum(one.numel() for one in model.parameters())

    export_command(str(tmp_path / "exported"), mask=str(tmp_path / "mask.safetensors"))
    exported = load_model(str(tmp_path / "exported"), dtype="float32")
    assert (exported.get_output_embeddings().weight is exported.get_input_embeddings().weight) == tied
    for name, parameter in exported.named_parameters():
        assert torch.equal(parameter, found[name])


@pytest.mark.parametrize("tied", [True, False])
def test_a_run_resumes_and_keeps_its_teacher(text_file: Path, tmp_path: Path, tied: bool) -> None:
    folder = tiny_folder(tmp_path / "model", tie_word_embeddings=tied)
    words = ["--model.train_weights=kept", "--model.weight_training.embeddings=true", "--model.weight_training.lr=1e-2"]
    words += ["--model.objective.distillation=0.5", "--trainer.max_steps=4"]
    main(fit_flags(folder, text_file, tmp_path / "whole", *words))
    half = tmp_path / "whole" / "checkpoints" / "step=2.ckpt"
    main(fit_flags(folder, text_file, tmp_path / "again", *words, f"--ckpt_path={half}"))
    for file in ("mask", "weights"):
        ends = [tmp_path / run / "checkpoints" / f"{file}.safetensors" for run in ("whole", "again")]
        assert ends[0].read_bytes() == ends[1].read_bytes()
    module = LeapModule.load_from_checkpoint(tmp_path / "whole" / "checkpoints" / "last.ckpt")
    base, ids = load_model(str(folder), dtype="float32").eval(), torch.arange(24)[None]
    with torch.no_grad(), module.state.passing("dense"):
        assert torch.equal(module._dense_head(module.states(ids)), base(input_ids=ids).logits)
    weights = load_file(tmp_path / "whole" / "checkpoints" / "weights.safetensors")
    module.choose_hard_masks()
    with torch.no_grad(), module.state.passing("hard"):
        for ends_of in ("embed_tokens", "lm_head"):
            layer = module.model.get_submodule(f"model.{ends_of}" if ends_of != "lm_head" else ends_of)
            name = "model.embed_tokens.weight" if tied else f"{'model.' * (ends_of != 'lm_head')}{ends_of}.weight"
            assert torch.equal(layer.weight, weights[name])


def test_a_gate_of_the_head_learns_and_the_teacher_has_none(text_file: Path, tmp_path: Path) -> None:
    """Its gradient is that of the losses over all logits at once, by plain autograd."""
    folder = tiny_folder(tmp_path / "model", tie_word_embeddings=False)
    module = LeapModule(
        str(folder),
        dtype="float32",
        targets=["Linear"],
        objective=Objective(lm=0.5, distillation=0.5, budget=0, weight=0, chunk=7),
        prior=Prior(method="none"),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    )
    seen: dict[str, Any] = {}

    def compare(step: Callable[..., Tensor], batch: dict[str, Tensor], index: int) -> Tensor:
        ids, model = batch["input_ids"], module.model
        loss = step(batch, index)
        assert model is not None
        with torch.no_grad(), module.state.passing("dense"):
            dense = model(input_ids=ids).logits[:, :-1].flatten(0, 1).log_softmax(-1)
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        ce = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        kl = torch.nn.functional.kl_div(logits.log_softmax(-1), dense, reduction="batchmean", log_target=True)
        learned = module.gates["lm_head.weight"].logits
        (seen["grad"],) = torch.autograd.grad(0.5 * ce + 0.5 * kl, learned)
        seen["losses"] = loss.detach(), 0.5 * ce.detach() + 0.5 * kl.detach()
        return loss

    step = module.training_step
    module.training_step = lambda batch, batch_idx: compare(step, batch, batch_idx)  # type: ignore[method-assign]
    module.on_before_optimizer_step = lambda _: seen.update(found=module.gates["lm_head.weight"].logits.grad.clone())  # type: ignore
    data = TextDataModule(text=str(text_file), seq_length=16, batch_size=2, validation_sequences=2)
    Trainer(accelerator="cpu", max_steps=1, default_root_dir=tmp_path, **QUIET).fit(module, data)
    torch.testing.assert_close(*seen["losses"], rtol=1e-5, atol=1e-6)
    assert seen["grad"].abs().max() > 1e-6
    torch.testing.assert_close(seen["found"], seen["grad"], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("targets", ["Linear", "lm_head"])
def test_a_gated_head_also_has_the_gradient_of_its_budget(text_file: Path, tmp_path: Path, targets: str) -> None:
    """Gradients add up: those of both losses and the budget, less the budget's, are those of the losses."""
    folder = tiny_folder(tmp_path / "model", tie_word_embeddings=False)
    gradients: dict[tuple[float, float], Tensor] = {}
    for scale, budget in ((1.0, 0.0), (1.0, 7.0), (2.0, 7.0)):
        module = LeapModule(
            str(folder),
            dtype="float32",
            targets=[targets],
            objective=Objective(lm=0.5 * scale, distillation=0.5 * scale, budget=budget, weight=budget, chunk=7),
            prior=Prior(method="none"),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        )

        def keep(_: Any, module: LeapModule = module, place: tuple[float, float] = (scale, budget)) -> None:
            gradients[place] = module.gates["lm_head.weight"].logits.grad.double()

        module.on_before_optimizer_step = keep  # type: ignore[method-assign]
        data = TextDataModule(text=str(text_file), seq_length=16, batch_size=2, validation_sequences=0)
        Trainer(accelerator="cpu", max_steps=1, default_root_dir=tmp_path, **QUIET).fit(module, data)
    losses = gradients[2.0, 7.0] - gradients[1.0, 7.0]
    assert losses.abs().max() > 1e-6
    torch.testing.assert_close(losses, gradients[1.0, 0.0], rtol=1e-3, atol=1e-7)
    assert (gradients[1.0, 7.0] - gradients[1.0, 0.0]).abs().max() > 1e-6  # of the budget and the weights


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", [None, ["Linear"]])
@pytest.mark.parametrize("kind", ["kept", "lora", "norms", "none"])
def test_every_trained_weight_is_counted_once(kind: str, targets: list[str] | None, tied: bool, tmp_path: Path) -> None:
    """As the plan of a run counts them, and as the run trains them."""
    if tied and targets:
        pytest.skip("a gate of a tied head is refused")
    folder = str(tiny_folder(tmp_path / "model", tie_word_embeddings=tied))
    training = WeightTraining(r=2, embeddings=kind == "kept" or (kind != "none" and targets is None))
    module = LeapModule(
        folder,
        dtype="float32",
        targets=targets,
        prior=Prior(method="none"),
        train_weights=kind,
        weight_training=training,
    )
    module.configure_model()
    trained = [parameter for weight in module.trained.values() for parameter in weight.parameters()]
    model = load_model(folder, dtype="float32")
    counted = parameters_of(kind, training, find_weights(model, targets), model)
    assert counted == sum({id(parameter): parameter.numel() for parameter in trained}.values())


def test_the_perplexity_of_a_head_with_a_gate(text_file: Path, tmp_path: Path) -> None:
    """That of the hard mask, and of the dense head for the dense model; the head is called outside of the body."""
    folder = tiny_folder(tmp_path / "model", tie_word_embeddings=False)
    module = LeapModule(str(folder), dtype="float32", targets=["Linear"], prior=Prior(method="none"))
    data = TextDataModule(text=str(text_file), seq_length=16, batch_size=2, validation_sequences=4)
    trainer = Trainer(accelerator="cpu", max_steps=1, default_root_dir=tmp_path, **QUIET)
    trainer.fit(module, data)
    blocks = torch.cat([batch["input_ids"] for batch in data.val_dataloader()])
    found = module.validation.figures()
    for name, masked in (("dense", False), ("hard", True)):
        model = load_model(str(folder), dtype="float32")
        if masked:
            module.mask_set().apply_(model)
        with torch.no_grad():
            expected = float(model(input_ids=blocks, labels=blocks).loss.exp())
        assert found[name] == pytest.approx(expected, rel=1e-4), name


def test_refused_in_one_line(model_folder: Path, text_file: Path, tmp_path: Path, capsys) -> None:
    words = fit_flags(model_folder, text_file, tmp_path, "--model.weight_training.embeddings=true")
    assert "Add --model.train_weights kept" in refused(words, capsys)
    with pytest.raises(UserError, match="or use --trainer\\.strategy ddp"):
        LeapModule("base", train_weights="kept", weight_training=TRAINING).trained.check({}, fixed=False, sharded=True)
    compact = LeapModule("base", train_weights="kept", weight_training=WeightTraining(compact=True)).trained
    for fixed, sharded in ((True, True), (False, False)):
        with pytest.raises(UserError, match="holds the weights alone that a fixed mask keeps"):
            compact.check({}, fixed=fixed, sharded=sharded)
    compact.check({}, fixed=True, sharded=False)


@pytest.mark.parametrize("kind", [["norms"], ["lora", "--model.weight_training.target_modules=[q_proj]"]])
def test_a_gated_head_is_not_left_untrained_without_a_word(kind: list[str], text_file: Path, tmp_path, capsys) -> None:
    """Only kept trains weights of gates whole."""
    folder = tiny_folder(tmp_path / "model", tie_word_embeddings=False)
    words = ["--model.weight_training.embeddings=true", "--model.targets=[Linear]", "--model.prior.method=none"]
    said = refused(
        fit_flags(folder, text_file, tmp_path, *words, f"--model.train_weights={kind[0]}", *kind[1:]), capsys
    )
    assert "embeddings trains lm_head.weight whole, which has a gate" in said
    assert f"model.train_weights is {kind[0]}. Set --model.train_weights kept, or leave embeddings out." in said
