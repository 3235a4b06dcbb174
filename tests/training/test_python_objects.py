"""From Python: objects where names are meant, data of one's own, and masks of modules that were not fitted."""

import json
import pickle
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from conftest import Run
from python_runs import again, data, trainer
from random_masks import random_mask
from tiny import byte_tokenizer, tiny_folder, tiny_model
from torch.utils.data import DataLoader, IterableDataset

from leap_pl import LeapModule, MaskSet, TextDataModule, UserError
from leap_pl.base_model.weights import find_weights
from leap_pl.callbacks import Checkpoints, MaskExport, ValidationTimes
from leap_pl.checkpoints.layout import masks_from_checkpoint
from leap_pl.cli.compare import compare_command
from leap_pl.cli.evaluate import evaluate_command
from leap_pl.cli.export import export_command
from leap_pl.gates import NMGate
from leap_pl.oneshot.fisher import FisherOptions, measure_moments
from leap_pl.oneshot.prune import prune
from leap_pl.prior import Prior
from leap_pl.training.weights import WeightTraining

pytestmark = pytest.mark.usefixtures("eager")


# -- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"base_model": tiny_model()}, "base_model is an object, a LlamaForCausalLM; give its hub id or its folder"),
        ({"mask": object()}, "mask is an object, a object; save it first, and give the file"),
        ({"ignore": "re:.*down_proj"}, r"ignore is one name, 're:\.\*down_proj'; give a list: \['re:"),
        ({"targets": "Linear"}, "targets is one name, 'Linear'; give a list"),
        ({"targets": 3}, "targets is 3; give a list of names"),
        ({"dtype": torch.bfloat16}, r"dtype is torch\.bfloat16; give one of 'auto', 'float32'"),
        ({"logits_dtype": torch.bfloat16}, r"logits_dtype is torch\.bfloat16; give one of 'float32', 'bfloat16'"),
        ({"logits_dtype": "float16"}, "logits_dtype is 'float16'; give one of"),
        ({"prior": "wanda"}, r"prior is 'wanda'; give Prior\(\.\.\.\)"),
        ({"prior": None}, r"prior is None; give Prior\(\.\.\.\)"),
        ({"objective": None}, r"objective is None; give Objective\(\.\.\.\)"),
        ({"annealing": 3}, r"annealing is 3; give Annealing\(\.\.\.\)"),
        ({"gate": "NMGate"}, "gate is 'NMGate'; give a class of gates"),
        ({"warmup_steps": 0.1}, r"model\.warmup_steps is 0\.1; give a whole number"),
    ],
)
def test_what_is_no_name(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        LeapModule(**{"base_model": "some/model", **settings})


def test_one_name_is_no_list_of_letters() -> None:
    for given in ({"targets": "Linear"}, {"ignore": "lm_head"}):
        with pytest.raises(UserError, match="are lists of names"):
            find_weights(tiny_model(), **given)  # type: ignore[arg-type]


def test_a_module_is_pickled(model_folder: Path) -> None:
    module = pickle.loads(pickle.dumps(LeapModule(str(model_folder), sparsity=0.25)))
    assert (module.base_model, module.sparsity) == (str(model_folder), 0.25)
    optimizer = module.make_optimizer([torch.nn.Parameter(torch.zeros(2))])
    assert (type(optimizer), optimizer.defaults["lr"], optimizer.defaults["betas"]) == (
        torch.optim.AdamW, 1e-3, (0.9, 0.95),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"weight_training": {"rate": 1}}, "weight_training has no setting rate. It has lr, warmup_steps, "),
        ({"prior": {"methods": "wanda"}}, "prior has no setting methods. It has "),
        ({"annealing": {"beta": {}}}, "annealing has no setting beta. It has alpha, tau, "),
        ({"objective": {"kl": 1.0}}, "objective has no setting kl. It has lm, distillation, "),
    ],
)
def test_a_setting_that_does_not_exist(settings: dict[str, Any], says: str, model_folder: Path) -> None:
    with pytest.raises(UserError, match=says):
        LeapModule(str(model_folder), **settings)


def test_one_name_where_a_list_is_meant() -> None:
    with pytest.raises(UserError, match=r"target_modules is one name, 'q_proj'; give a list: \['q_proj'\]"):
        WeightTraining(target_modules="q_proj")  # type: ignore[arg-type]


def test_the_strength_of_an_allocation_alone() -> None:
    tokens = torch.arange(64).view(2, 32) % 200
    masks = [
        prune(tiny_model(), tokens, fisher=fisher, progress=False).masks  # type: ignore[arg-type]
        for fisher in (0.5, FisherOptions(0.5))
    ]
    assert masks[0].digest_of_bits() == masks[1].digest_of_bits()
    for given in ({"owl": True}, {"fisher": True}, {"owl": 0.1}):
        with pytest.raises(UserError, match=r"give (Owl|Fisher)Options\(\), or leave it out"):
            prune(tiny_model(), tokens, progress=False, **given)
    with pytest.raises(UserError, match="densities by 'layers': give weight, layer or projection"):
        masks[0].densities("layers")


def test_a_model_in_float16_is_told_what_it_rounded(tmp_path: Path) -> None:
    import transformers

    model = tiny_model().to(torch.bfloat16)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(1e-7)
    model.save_pretrained(tmp_path / "model")
    masks = prune(model, None, method="magnitude", update=False, progress=False).masks
    halved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float16)
    with pytest.raises(UserError, match=r"float16 rounds small weights: load it with dtype='auto'"):
        masks.apply_(halved)
    masks.apply_(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto"))


# -- masks that nobody learned, and those of checkpoints -----------------------------------------------------------


def test_a_module_that_was_not_fitted_has_no_mask(module: LeapModule, text_file: Path) -> None:
    """Its logits are noise around 0."""
    with pytest.raises(UserError, match="has no mask before a fit"):
        trainer().validate(module, data(text_file), verbose=False)
    with pytest.raises(UserError, match="has no mask before a fit"):
        module.mask_set()
    fresh = again(module)
    fresh.configure_model()
    with pytest.raises(UserError, match="has no mask before a fit"):
        fresh.mask_set()


def test_a_mask_of_a_checkpoint_says_of_which_run_it_is(module: LeapModule, text_file: Path, tmp_path: Path) -> None:
    """Whatever it is validated with."""
    saved = Checkpoints(str(tmp_path / "run"), every_n_train_steps=1, save_top_k=-1)
    trainer(saved, max_steps=3, gradient_clip_val=0.7).fit(module, data(text_file))
    first = min((tmp_path / "run").glob("step=1.ckpt"))
    expected = masks_from_checkpoint(first)
    assert (expected.provenance.config["steps"], expected.provenance.config["max_steps"]) == (1, 3)
    loaded = LeapModule.load_from_checkpoint(first)
    assert loaded.mask_set().provenance == expected.provenance
    other = tmp_path / "other.jsonl"
    other.write_text(text_file.read_text())
    trainer().validate(loaded, data(other), verbose=False)
    assert loaded.mask_set().provenance == expected.provenance
    assert loaded.mask_set().digest_of_bits() == expected.digest_of_bits()
    trainer(max_steps=3, gradient_clip_val=0.7).fit(loaded, data(text_file), ckpt_path=str(first))
    assert loaded.mask_set().provenance.config["steps"] == 3


def test_a_mask_at_another_sparsity_says_that_it_was_not_measured(
    module: LeapModule, text_file: Path, tmp_path: Path
) -> None:
    trainer(Checkpoints(str(tmp_path / "run")), max_steps=1).fit(module, data(text_file))
    path = tmp_path / "run" / "last.ckpt"
    same, other = (LeapModule.load_from_checkpoint(path, **more).mask_set() for more in ({}, {"sparsity": 0.25}))
    assert (same.sparsity, same.provenance.sparsity) == (0.5, 0.5)
    assert (other.sparsity, other.provenance.sparsity) == (0.25, 0.25)
    assert "perplexity" in same.provenance.config
    assert not {"perplexity", "perplexity_of"} & other.provenance.config.keys()


def test_a_mask_that_was_written_stays_so(module: LeapModule, text_file: Path, tmp_path: Path) -> None:
    export = MaskExport(str(tmp_path))
    run = trainer(export, max_steps=1)
    run.fit(module, data(text_file))
    written = export.written
    assert written is not None
    run.validate(module, data(text_file), verbose=False)
    assert export.written == written


def test_a_program_is_told_what_a_program_can_do(module: LeapModule, text_file: Path, tmp_path: Path) -> None:
    trainer(Checkpoints(str(tmp_path)), max_steps=1).fit(module, data(text_file))
    with pytest.raises(
        UserError, match=r"holds another run .*Resume it with trainer\.fit\(\.\.\., ckpt_path=FILE\)"
    ) as told:
        trainer(Checkpoints(str(tmp_path)), max_steps=1).fit(again(module), data(text_file))
    assert "--" not in str(told.value)


# -- data of one's own ---------------------------------------------------------------------------------------------


class Own(L.LightningDataModule):
    """Blocks of its own, with arguments that only a pickle could hold."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.vocabulary = {"a": 0}

    def train_dataloader(self) -> Any:
        return DataLoader([{"input_ids": torch.arange(16)}] * 4, batch_size=2)  # type: ignore[arg-type]


def test_a_checkpoint_holds_no_arguments_of_the_data(model_folder: Path, tmp_path: Path) -> None:
    module = LeapModule(str(model_folder), dtype="float32", prior=Prior(method="magnitude"))
    text = Own(tmp_path, byte_tokenizer())
    run = trainer(max_steps=1)
    run.fit(module, text)
    assert text.vocabulary == {"a": 0}
    run.save_checkpoint(tmp_path / "a.ckpt")
    loaded = LeapModule.load_from_checkpoint(tmp_path / "a.ckpt")
    assert loaded.mask_set().digest_of_bits() == module.mask_set().digest_of_bits()


def test_text_is_checked_against_the_model_that_reads_it(text_file: Path, tmp_path: Path) -> None:
    """And not against the one that it was used with before."""
    small, large = tiny_folder(tmp_path / "small"), tiny_folder(tmp_path / "large", vocab_size=400)
    text = data(text_file)
    checkpoints = {}
    for folder in (large, small):
        module = LeapModule(str(folder), dtype="float32", prior=Prior(method="magnitude"))
        run = trainer(max_steps=1)
        run.fit(module, text)
        run.save_checkpoint(tmp_path / f"{folder.name}.ckpt")
        checkpoints[folder.name] = tmp_path / f"{folder.name}.ckpt"
    vocabulary = text.vocabulary
    trainer().validate(LeapModule.load_from_checkpoint(checkpoints["large"]), text, verbose=False)
    assert (vocabulary, text.vocabulary) == (small_vocabulary(small), 400)
    long = data(text_file, seq_length=4096)
    with pytest.raises(UserError, match=r"--data\.seq_length 128"):
        trainer().validate(LeapModule.load_from_checkpoint(checkpoints["large"]), long, verbose=False)


def small_vocabulary(folder: Path) -> int:
    import json

    return int(json.loads((folder / "config.json").read_text())["vocab_size"])


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([{"input_ids": torch.arange(16)}] * 2)


@pytest.mark.parametrize("endless", [False, True])
def test_loaders_of_ones_own_are_validated_at_the_end(model_folder: Path, endless: bool) -> None:
    """Also if the run reads them several times."""
    module = LeapModule(str(model_folder), dtype="float32", prior=Prior(method="magnitude"))
    blocks: Any = [{"input_ids": torch.arange(16)}] * 4
    validation: Any = Endless() if endless else blocks
    trainer(ValidationTimes(), max_steps=10).fit(
        module, DataLoader(blocks, batch_size=1), DataLoader(validation, batch_size=1)
    )
    assert module.validation.hard_step == 10


def test_a_module_is_loaded_without_running_its_model(
    module: LeapModule, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is on its device: kernels for a GPU alone do not run on the CPU."""
    run = trainer(max_steps=1)
    run.fit(module, data(text_file))
    run.save_checkpoint(tmp_path / "a.ckpt")
    with monkeypatch.context() as patch:
        patch.setattr("leap_pl.training.gated_module.split_model", lambda model: pytest.fail("it was run"))
        loaded = LeapModule.load_from_checkpoint(tmp_path / "a.ckpt", map_location="cpu")
        assert loaded.mask_set().digest_of_bits() == module.mask_set().digest_of_bits()
    ids = torch.arange(64).view(2, 32)
    assert torch.equal(loaded.head(loaded.states(ids).flatten(0, 1)), module.head(module.states(ids).flatten(0, 1)))


def test_a_weight_that_is_not_used_has_a_gradient(model_folder: Path, text_file: Path) -> None:
    """DDP waits for one of every parameter, also where no term of the mask reads it."""
    from leap_pl.gates import NMGate
    from leap_pl.losses.objective import Objective

    module = LeapModule(
        str(model_folder),
        gate=NMGate,
        dtype="float32",
        prior=Prior(method="none"),
        objective=Objective(budget=0, weight=0),
    )

    class Skips(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            layer = module.model.model.layers[1]  # type: ignore[union-attr]
            layer.mlp.forward = lambda hidden: hidden

        def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
            self.without = [name for name, gate in module.gates.items() if gate.logits.grad is None]

    skips = Skips()
    trainer(skips, max_steps=1).fit(module, data(text_file, validation_sequences=0))
    assert skips.without == []


def test_a_share_is_no_number_of_blocks() -> None:
    with pytest.raises(UserError, match=r"data\.validation_sequences is 0\.05; give a whole number"):
        TextDataModule(text="a.txt", validation_sequences=0.05)  # type: ignore[arg-type]


def test_a_checkpoint_is_loaded_by_the_class(finished: Run) -> None:
    module = LeapModule.load_from_checkpoint(finished.checkpoint)
    with pytest.raises(UserError, match="returns a new module, and leaves this instance as it is"):
        module.load_from_checkpoint(finished.checkpoint)


def test_the_home_folder_in_the_name_of_a_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Run) -> None:
    masks = MaskSet.load(finished.mask)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert masks.save("~/m.safetensors") == tmp_path / "home" / "m.safetensors"
    assert MaskSet.load("~/m.safetensors").digest_of_bits() == masks.digest_of_bits()
    assert not Path("~").exists()
    with pytest.raises(ValueError, match="is a ndarray, not a bool tensor"):
        MaskSet({"a": torch.ones(2).bool().numpy()}, masks.provenance)  # type: ignore[dict-item]


def test_the_best_perplexity_is_the_lowest(tmp_path: Path) -> None:
    assert Checkpoints(str(tmp_path), monitor="perplexity/hard").mode == "min"
    assert Checkpoints(str(tmp_path), monitor="perplexity/hard", mode="max").mode == "max"
    assert Checkpoints(str(tmp_path)).mode == "max"  # of the step


class Lengths(L.LightningDataModule):
    """Data of one's own, with numbers of other types."""

    seq_length, batch_size, seed = np.int64(32), 2.0, "none"

    def __init__(self, text: Path) -> None:
        super().__init__()
        self.blocks = [{"input_ids": torch.arange(32)} for _ in range(8)]

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.blocks, batch_size=2)  # type: ignore[arg-type]


def test_data_of_ones_own_is_recorded_as_a_mask_can(module: LeapModule, text_file: Path, tmp_path: Path) -> None:
    trainer(max_steps=1).fit(module, Lengths(text_file))
    module.save_mask(tmp_path / "m")
    assert MaskSet.load(tmp_path / "m").provenance.config["data"] == {"seq_length": 32, "batch_size": 2}


def test_settings_of_a_mask_that_stays_are_said_to_be_unused(
    finished: Run, model_folder: Path, text_file: Path
) -> None:
    made = partial(torch.optim.AdamW, lr=1e-5)
    given: dict[str, Any] = {"mask": str(finished.mask), "train_weights": "kept", "dtype": "float32"}
    with pytest.warns(UserWarning, match=r"not used: gate, prior, since mask .* stays as it is"):
        LeapModule(str(model_folder), gate=NMGate, prior=Prior(method="wanda", fisher=0.5), **given)
    fitted = LeapModule(str(model_folder), optimizer=made, **given)
    with pytest.warns(UserWarning, match=r"lr 1e-05, .* trained at 2e-05: .* weight_training=WeightTraining\(lr="):
        trainer(max_steps=1).fit(fitted, data(text_file))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="not used")
        named = LeapModule(str(model_folder), weight_training=WeightTraining(lr=1e-5), **given)
        trainer(max_steps=1).fit(named, data(text_file))
        trainer(max_steps=1).fit(LeapModule(str(model_folder), optimizer=made, dtype="float32"), data(text_file))


def test_a_run_resumes_where_the_file_of_its_prior_is_gone(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    random_mask(model_folder, tmp_path / "prior")
    prior = Prior(mask=str(tmp_path / "prior"), cache_dir=None)
    whole = LeapModule(str(model_folder), dtype="float32", prior=prior)
    trainer(Checkpoints(str(tmp_path / "run"), every_n_train_steps=1, save_top_k=-1), max_steps=3).fit(
        whole, data(text_file)
    )
    (tmp_path / "prior").unlink()
    first = str(tmp_path / "run" / "step=1.ckpt")
    resumed = LeapModule.load_from_checkpoint(first)
    trainer(max_steps=3).fit(resumed, data(text_file), ckpt_path=first)
    assert resumed.mask_set().digest_of_bits() == whole.mask_set().digest_of_bits()


def test_a_fixed_mask_has_no_other_sparsity(recovered: Path) -> None:
    checkpoint = recovered / "checkpoints" / "last.ckpt"
    with pytest.raises(UserError, match=r"is fixed at sparsity 0\.5, and sparsity 0\.6 was asked for\. Leave sparsity"):
        LeapModule.load_from_checkpoint(checkpoint, sparsity=0.6)
    assert LeapModule.load_from_checkpoint(checkpoint, sparsity=0.5).mask_set().sparsity == 0.5


def test_a_state_that_is_loaded_by_hand_is_a_mask(module: LeapModule, text_file: Path) -> None:
    trainer(max_steps=2).fit(module, data(text_file))
    fresh = again(module)
    fresh.configure_model()
    with pytest.raises(UserError, match=r"of a checkpoint LeapModule\.load_from_checkpoint makes the module"):
        fresh.load_state_dict({"logits.x": torch.zeros(2)})
    fresh.load_state_dict(module.state_dict())
    assert fresh.mask_set().digest_of_bits() == module.mask_set().digest_of_bits()


def test_verbs_take_paths_and_lists(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"seq_length": 32, "max_tokens": 64}
    for name, model, text in (("a", model_folder, [str(text_file)]), ("b", str(model_folder), str(text_file))):
        evaluate_command(model=model, perplexity=text, output=tmp_path / f"{name}.json", **sizes)
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    assert first["perplexity"] == second["perplexity"]
    compare_command([tmp_path / "a.json", tmp_path / "b.json"], output_dir=tmp_path / "comparison")
    export = export_command(tmp_path / "out", model=model_folder, mask=random_mask_file(model_folder, tmp_path))
    assert export["sparsity"] > 0


def random_mask_file(model: Path, folder: Path) -> Path:
    random_mask(model, folder / "mask.safetensors")
    return folder / "mask.safetensors"


def test_the_fisher_information_of_long_sequences_is_measured_on_few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All activations of the model are held for its backward pass."""
    sizes: list[int] = []
    split = torch.Tensor.split

    def counted(self: torch.Tensor, size: Any, *more: Any) -> Any:
        if self.shape[1:] == (2048,) and isinstance(size, int):
            sizes.append(size)
        return split(self, size, *more)

    model, blocks = tiny_model(max_position_embeddings=2048), torch.randint(0, 256, (4, 2048))
    monkeypatch.setattr(torch.Tensor, "split", counted)
    measure_moments(model, [], blocks)
    assert sizes == [2]
