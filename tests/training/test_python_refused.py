"""From Python: trainers, schedules and modules that a run cannot have, and one line that says so."""

import copy
import pickle
import re
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.tuner import Tuner
from python_runs import again, data, trainer
from tiny import tiny_model
from torch.utils.data import DataLoader

from leap_pl import LeapModule, MaskSet, TextDataModule, UserError
from leap_pl.base_model.loading import load_model
from leap_pl.base_model.weights import model_fingerprint
from leap_pl.callbacks import Checkpoints, MaskExport
from leap_pl.checkpoints.class_spec import describe
from leap_pl.checkpoints.layout import load_checkpoint
from leap_pl.checkpoints.plain import made_plain
from leap_pl.errors import warn_once
from leap_pl.gates import BernoulliGate, detach
from leap_pl.losses.objective import Objective
from leap_pl.losses.term import Term
from leap_pl.oneshot.prune import prune
from leap_pl.prior import Prior
from leap_pl.training import run_settings
from leap_pl.training.trainer_checks import check_trainer

pytestmark = pytest.mark.usefixtures("eager")


@pytest.mark.parametrize(
    ("callback", "remedy"),
    [
        (GradientAccumulationScheduler({0: 2}), "Set --trainer.accumulate_grad_batches"),
        (StochasticWeightAveraging(swa_lrs=1e-3), "Leave it out"),
    ],
)
def test_callbacks_that_change_the_run(callback: L.Callback, remedy: str, module: LeapModule, text_file: Path) -> None:
    with pytest.raises(UserError, match=rf"{type(callback).__name__} does not suit a run of leap_pl. {remedy}"):
        trainer(callback, max_steps=1).fit(module, data(text_file))


def test_precisions_that_replace_layers_and_copies_of_the_process() -> None:
    fitting = trainer(max_steps=1)
    check_trainer(fitting)
    plugin = type("TransformerEnginePrecision", (MixedPrecision,), {"__init__": lambda self: None})()
    fitting.strategy._precision_plugin = plugin
    with pytest.raises(UserError, match="TransformerEnginePrecision replaces the linear layers, which have the gates"):
        check_trainer(fitting)
    with pytest.raises(UserError, match=r"DDPStrategy by fork or spawn learns in copies of this process"):
        check_trainer(trainer(max_steps=1, strategy="ddp_fork", devices=2))
    check_trainer(L.Trainer(accelerator="cpu", barebones=True, max_steps=1))


def test_schedules_of_each_group_and_by_a_metric(model_folder: Path, text_file: Path) -> None:
    def one(step: int) -> float:
        return 1.0

    given: dict[str, Any] = {"dtype": "float32", "prior": Prior(method="none"), "train_weights": "kept"}
    pair = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=[one, one])
    module = LeapModule(str(model_folder), lr_scheduler=pair, **given)
    trainer(max_steps=1).fit(module, data(text_file))
    assert module.mask_set().sparsity == pytest.approx(0.5, abs=1e-3)
    single = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=[one])
    with pytest.raises(UserError, match=r"model.lr_scheduler does not take its settings: Expected 2 lr_lambdas"):
        trainer(max_steps=1).fit(LeapModule(str(model_folder), lr_scheduler=single, **given), data(text_file))
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    with pytest.raises(UserError, match="ReduceLROnPlateau needs a metric after every step"):
        trainer(max_steps=1).fit(LeapModule(str(model_folder), lr_scheduler=plateau, **given), data(text_file))


class Renamed(TextDataModule):
    """The text of leap_pl under another name."""


def test_a_run_is_resumed_with_a_data_module_of_its_class_alone(
    module: LeapModule, text_file: Path, tmp_path: Path
) -> None:
    """Lightning would give another class no position, and the text would begin anew."""

    def renamed() -> TextDataModule:
        return Renamed(text=str(text_file), seq_length=32, batch_size=2, validation_sequences=2)

    def loader() -> DataLoader[Any]:
        return DataLoader([torch.arange(32) % 7] * 8, batch_size=2)  # type: ignore[arg-type]

    says = {
        "TextDataModule": "no position in the text of TextDataModule, but that of Renamed.",
        "Renamed": "no position in the text of Renamed, but that of TextDataModule.",
        "own": "no position in the text of {}, but none: its run had its own batches.",
    }
    kinds = {"TextDataModule": lambda: data(text_file), "Renamed": renamed, "own": loader}
    for name, made in kinds.items():
        path = tmp_path / f"{name}.ckpt"
        before = trainer(max_steps=2, limit_val_batches=0)
        before.fit(again(module), made())
        before.save_checkpoint(path)
        trainer(max_steps=2, limit_val_batches=0).fit(again(module), made(), ckpt_path=path)
        for other in ("TextDataModule", "Renamed"):
            if other != name:
                found = says["own"].format(other) if name == "own" else says[other]
                with pytest.raises(UserError, match=re.escape(found)):
                    trainer(max_steps=2, limit_val_batches=0).fit(again(module), kinds[other](), ckpt_path=path)


class Power(BernoulliGate):
    """A gate with an argument that its settings do not have."""

    def __init__(self, weight: Any, state: Any, power: float = 1.0) -> None:
        super().__init__(weight, state)
        self.power = power


def test_a_gate_whose_settings_lack_an_argument(model_folder: Path, text_file: Path) -> None:
    module = LeapModule(str(model_folder), gate=partial(Power, power=3.0), dtype="float32", prior=Prior(method="none"))
    with pytest.raises(TypeError, match=r"Power.settings\(\) lacks power"):
        trainer(max_steps=1).fit(module, data(text_file))


def test_pruning_a_pruned_model_says_so() -> None:
    model = tiny_model()
    blocks = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(0))
    masks: MaskSet = prune(model, blocks, method="wanda", pattern="2:4", progress=False).masks
    assert masks.sparsity == 0.5
    with pytest.warns(UserWarning, match=r"is sparse already: 50.0% of the weights to prune are 0.*load that again"):
        prune(model, blocks, method="wanda", pattern=0.7, progress=False)
    with pytest.raises(UserError, match="is not n:m"):
        prune(tiny_model(), blocks, pattern="half", progress=False)


def test_pickles_have_no_closures(module: LeapModule, text_file: Path) -> None:
    module.make_optimizer = partial(torch.optim.AdamW, lr=1e-3)
    assert pickle.loads(pickle.dumps(module)).base_model == module.base_model


def test_a_gated_model_is_not_saved_as_a_model(module: LeapModule, text_file: Path, tmp_path: Path) -> None:
    trainer(max_steps=1).fit(module, data(text_file))
    assert module.model is not None
    with pytest.raises(UserError, match=r"this model has gates, .* leap_pl export --mask FOLDER"):
        module.model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    copied = copy.deepcopy(module)
    detach(copied.weights)
    copied.model.save_pretrained(tmp_path / "out")
    assert model_fingerprint(load_model(str(tmp_path / "out"))) == module.fingerprint
    tokens = torch.arange(32)[None]
    assert module.states(tokens).isfinite().all()  # with the gates that it still has
    assert module.states(tokens).grad_fn is not None


def test_a_finder_of_a_tuner_is_refused_and_does_not_stay(module: LeapModule, text_file: Path) -> None:
    fitting = trainer(max_steps=1)
    with pytest.raises(UserError, match=r"LearningRateFinder does not suit a run of leap_pl\. Set --model\.optimizer"):
        Tuner(fitting).lr_find(module, data(text_file), attr_name="warmup_steps")
    trainer(max_steps=1).fit(module, data(text_file))
    assert "LearningRateFinder" not in {type(callback).__name__ for callback in fitting.callbacks}  # type: ignore[attr-defined]


def test_a_trial_does_not_replace_a_mask(module: LeapModule, tmp_path: Path) -> None:
    loader = torch.utils.data.DataLoader([torch.arange(8)] * 2)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"trainer\.fast_dev_run would write the mask of its few steps"):
        trainer(MaskExport(str(tmp_path)), fast_dev_run=True).fit(module, loader)
    assert not list(tmp_path.glob("*.safetensors"))


class OwnObjective(Objective):
    """Objective with another sum."""

    def loss(self, passed: Any) -> Any:
        return super().loss(passed)


def test_settings_of_a_class_of_ones_own() -> None:
    says = r"objective is of a class of your own, OwnObjective, .* Terms of your own are Objective\(extra="
    with pytest.raises(UserError, match=says):
        LeapModule("some/model", objective=OwnObjective())


class Holder(L.Callback):
    """Callback with a state."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def state_dict(self) -> dict[str, Any]:
        return {"held": self.held}


def test_numbers_of_numpy_are_stored_as_plain_ones(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """What learns from numpy.logspace must be read again, without running code."""
    module = LeapModule(
        str(model_folder),
        dtype="float32",
        gate=partial(BernoulliGate, spread=np.float64(0.003)),
        optimizer=partial(torch.optim.AdamW, lr=np.float64(0.125)),
        objective=Objective(lm=np.float64(0.5)),
        prior=Prior(method="none"),
    )
    holder = Holder([np.int64(3), {"a": np.float32(0.5)}])
    run = trainer(holder, max_steps=1, gradient_clip_val=np.float64(0.5))
    run.fit(module, data(text_file))
    run.save_checkpoint(tmp_path / "a.ckpt")
    stored = load_checkpoint(tmp_path / "a.ckpt")
    assert stored["callbacks"]["Holder"] == {"held": [3, {"a": 0.5}]}
    assert stored["optimizer_states"][0]["param_groups"][0]["initial_lr"] == 0.125
    assert LeapModule.load_from_checkpoint(tmp_path / "a.ckpt").objective.lm == 0.5
    says = r"cannot hold callbacks > Holder > held > array, .* class ndarray"
    holder.held = {"array": np.zeros(2)}
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match=rf"{says}.* It is left out: a resumed run begins it anew\."):  # amid a run
        run.save_checkpoint(tmp_path / "b.ckpt")
    assert load_checkpoint(tmp_path / "b.ckpt")["callbacks"].keys() == stored["callbacks"].keys() - {"Holder"}
    fresh = LeapModule(str(model_folder), dtype="float32", prior=Prior(method="none"))
    with pytest.raises(UserError, match=says):
        trainer(holder, max_steps=1).fit(fresh, data(text_file))
    own = type("Own", (TextDataModule,), {"state_dict": lambda self: {"at": np.zeros(2)}})  # without a place of its own
    own.__module__ = "mine"
    with pytest.raises(UserError, match=r"cannot hold Own > at, .* class ndarray"):
        trainer(max_steps=1).fit(fresh, own(text=str(text_file), seq_length=16))
    for value in (np.datetime64("2026-01-01"), Path("x"), object()):
        with pytest.raises(UserError, match="cannot hold there"):
            made_plain([value], "there")


def test_what_is_learned_is_held_in_memory_and_loaded_again(module: LeapModule, text_file: Path) -> None:
    trainer(max_steps=1).fit(module, data(text_file))
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with torch.no_grad():
        for gate in module.gates.values():
            gate.logits.zero_()
    module.load_state_dict(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    name = next(iter(state))
    with pytest.raises(UserError, match=f"the state is not that of this module: it lacks, .*{re.escape(name)}"):
        module.load_state_dict({key: tensor for key, tensor in state.items() if key != name})


def test_a_module_inside_another(module: LeapModule, text_file: Path) -> None:
    class Around(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def configure_optimizers(self) -> Any:
            return self.inner.configure_optimizers()

        def training_step(self, batch: Any, index: int) -> Any:
            return self.inner.training_step(batch, index)

    with pytest.raises(UserError, match=r"there is nothing to learn: no gates are attached\. A LeapModule must be"):
        trainer(max_steps=1).fit(Around(), data(text_file, tokenizer=module.base_model))


class Passing(BernoulliGate):
    """Gate that passes on what it does not name."""

    def __init__(self, weight: Any, state: Any, power: float = 2.0, **kwargs: Any) -> None:
        super().__init__(weight, state, **kwargs)
        self.power = power

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "power": self.power}


class Starred(BernoulliGate):
    """Gate whose one argument of its own is given by its name."""

    def __init__(self, *args: Any, power: float = 2.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.power = power


class Squared(Term):
    """Term that passes its weight on."""

    name = "squared"

    def __init__(self, power: float = 2.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.power = power

    def value(self, batch: Any) -> Any:
        return batch.hidden.sum() * 0


def test_arguments_that_constructors_pass_on_are_settings_too(
    model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    assert describe(Squared(weight=0.5), {}, settings_only=True)["init_args"] == {"power": 2.0, "weight": 0.5}
    with pytest.raises(TypeError, match="lacks power"):
        trainer(max_steps=1).fit(
            LeapModule(str(model_folder), gate=Starred, prior=Prior(method="none")), data(text_file)
        )
    module = LeapModule(str(model_folder), gate=partial(Passing, power=3.0, spread=0.02), prior=Prior(method="none"))
    given = trainer(max_steps=1)
    given.fit(module, data(text_file))
    given.save_checkpoint(tmp_path / "a.ckpt")
    loaded = LeapModule.load_from_checkpoint(tmp_path / "a.ckpt", gate=partial(Passing, power=3.0, spread=0.02))
    assert loaded.gates.first.settings() == module.gates.first.settings()
    assert module.gates.first.settings()["spread"] == 0.02


class Stateful(DataLoader):  # type: ignore[type-arg]
    """As a loader that remembers its place, in an array."""

    def state_dict(self) -> dict[str, Any]:
        return {"at": np.zeros(2)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError


def test_a_loader_whose_state_no_checkpoint_can_hold_begins_anew(model_folder: Path, tmp_path: Path) -> None:
    """And the run goes on where it was."""
    warn_once.cache_clear()
    blocks: Any = [{"input_ids": torch.arange(16)}] * 4

    def made() -> LeapModule:
        return LeapModule(str(model_folder), dtype="float32", prior=Prior(method="none"))

    saved = Checkpoints(str(tmp_path), every_n_train_steps=1, save_top_k=-1)
    with pytest.warns(UserWarning, match=r"cannot hold loops > combined_loader.*resumed run begins it anew"):
        trainer(saved, max_steps=3).fit(made(), Stateful(blocks, batch_size=1))
    run = trainer(max_steps=3)
    run.fit(made(), Stateful(blocks, batch_size=1), ckpt_path=str(tmp_path / "step=2.ckpt"))
    assert run.global_step == 3
    assert run.fit_loop.epoch_loop.total_batch_idx == 2
    warn_once.cache_clear()


def test_loaders_of_ones_own_resume_on_as_many_ranks() -> None:
    """Of a text the place is that of all ranks together."""
    own = {"global_step": 4, "loops": {}}
    for ranks in (1, 3):
        with pytest.raises(UserError, match=rf"number of ranks was 2 and is {ranks}, .* Resume on 2\."):
            run_settings.check_ranks_of_loaders(own, 2, ranks)
    run_settings.check_ranks_of_loaders(own, 2, 2)
    run_settings.check_ranks_of_loaders(own, None, 2)
    run_settings.check_ranks_of_loaders({**own, "global_step": 0}, 1, 2)
    text = {"data": {}, "consumed": 3, "position": None}
    run_settings.check_ranks_of_loaders({**own, "TextDataModule": text}, 2, 1)
