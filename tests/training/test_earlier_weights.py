"""Weights that were trained before: their texts, their runs in one folder, and masks that they do not belong to."""

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import Run, refused
from python_runs import data, trainer
from recovered_runs import Flags, weights_in
from safetensors.torch import load_file

from leap_pl import LeapModule, MaskSet, UserError
from leap_pl.callbacks import MaskExport
from leap_pl.cli.export import export_command
from leap_pl.cli.main import main
from leap_pl.cli.prune import prune_command
from leap_pl.export.method import decisive_settings
from leap_pl.gates import FixedGate
from leap_pl.masks import Provenance
from leap_pl.masks.exported import texts_of_weights
from leap_pl.masks.kept_weights import KeptWeights
from leap_pl.masks.trained_text import why_not_held_out
from leap_pl.prior import Prior
from leap_pl.training.weights import WeightTraining

pytestmark = pytest.mark.usefixtures("eager", "event_files_in_order")


def one_shot(model: Path, folder: Path, *, pattern: str | None = None, sparsity: float = 0.5) -> Path:
    shape = {"sparsity": sparsity} if pattern is None else {"pattern": pattern}
    prune_command(str(model), str(folder), method="magnitude", device="cpu", **shape)
    return folder / "mask.safetensors"


def of_mask(model: Path, mask: Path, **settings: object) -> LeapModule:
    return LeapModule(str(model), dtype="float32", mask=str(mask), train_weights="kept", **settings)  # type: ignore[arg-type]


def test_a_text_that_weights_were_trained_on_before_is_known(
    recovered: Path, recover: Flags, model_folder: Path, tmp_path: Path
) -> None:
    """Under another mask whose record says nothing of it: the weights' own does."""
    exported, run = tmp_path / "exported", tmp_path / "run"
    export_command(str(exported), mask=str(recovered / "checkpoints" / "mask.safetensors"))
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "another text of some words, again and again"}\n' * 400)
    mask = MaskSet.load(recovered / "checkpoints" / "mask.safetensors")
    MaskSet(mask.masks, replace(mask.provenance, method="wanda", config={})).save(tmp_path / "plain.safetensors")
    words = [word for word in recover(run) if not word.startswith(("--model.mask", "--data.text"))]
    words += [f"--model.mask={tmp_path / 'plain.safetensors'}", f"--model.weights={exported}", f"--data.text={other}"]
    main(words)
    made = MaskSet.load(run / "checkpoints" / "mask.safetensors").provenance
    first = mask.provenance.config["data"]["text"]
    told = decisive_settings(made)
    assert (told["text"], told["text that they were trained on before"]) == ("other.jsonl", Path(first).name)
    made.config["train_weights"]["texts_before"][0]["held_out"] = False
    assert "held out no part of" in str(why_not_held_out([first], made.config))
    # A resumed run says the same.
    again = [word.replace(str(run), str(tmp_path / "resumed")) for word in words]
    main([*again, f"--ckpt_path={run / 'checkpoints' / 'step=2.ckpt'}"])
    resumed = MaskSet.load(tmp_path / "resumed" / "checkpoints" / "mask.safetensors").provenance.config["train_weights"]
    assert [Path(text["text"]).name for text in resumed["texts_before"]] == [Path(first).name]


def test_two_runs_under_one_mask_in_one_folder(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Their masks have the same bits, and each has its own weights."""
    mask, folder = one_shot(model_folder, tmp_path / "pruned"), tmp_path / "run"
    for rate in (1e-2, 1e-3):
        module = of_mask(model_folder, mask, weight_training=WeightTraining(lr=rate))
        trainer(MaskExport(str(folder)), max_steps=2).fit(module, data(text_file))
    for name, rate in (("mask-earlier", 1e-2), ("mask", 1e-3)):
        place = folder / f"{name}.safetensors"
        masks = MaskSet.load(place)
        assert masks.provenance.config["train_weights"]["lr"] == rate
        found = KeptWeights.beside(place, masks)
        assert found is not None
        own = load_file(place.with_name(place.name.replace("mask", "weights")))
        assert all(torch.equal(found.value(key, own[key]), own[key]) for key in found.names)
    (folder / "mask.safetensors").replace(folder / "x.safetensors")
    (folder / "mask-earlier.safetensors").replace(folder / "mask.safetensors")
    with pytest.raises(UserError, match="has the weights of another run than"):
        export_command(str(tmp_path / "out"), mask=str(folder / "mask.safetensors"))


def test_a_fixed_mask_that_is_given_as_a_prior_is_of_the_run(
    model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    for given in ({"sparsity": 0.6}, {"pattern": "2:4"}):
        mask = one_shot(model_folder, tmp_path / str(given), **given)  # type: ignore[arg-type]
        module = LeapModule(
            str(model_folder), dtype="float32", gate=FixedGate, prior=Prior(mask=str(mask)), train_weights="kept"
        )
        with pytest.raises(
            UserError, match=r"the mask that stays is .* and the run's unstructured with 0\.5\. Give it"
        ):
            trainer(max_steps=1).fit(module, data(text_file))
    right = partial(FixedGate, pattern="2:4")
    settings = {"dtype": "float32", "gate": right, "prior": Prior(mask=str(mask)), "train_weights": "kept"}
    trainer(max_steps=1).fit(LeapModule(str(model_folder), **settings), data(text_file))  # type: ignore[arg-type]


def test_a_fixed_mask_is_what_it_says_before_the_first_step(
    recover: Flags, model_folder: Path, tmp_path: Path, capsys
) -> None:
    mask = MaskSet.load(one_shot(model_folder, tmp_path / "pruned", pattern="2:4"))
    masks = dict(mask.masks)
    masks[name := next(iter(masks))][0, :4] = True
    MaskSet(masks, mask.provenance).save(tmp_path / "wrong.safetensors")
    words = [word for word in recover(tmp_path / "run") if not word.startswith("--model.mask")]
    message = refused([*words, f"--model.mask={tmp_path / 'wrong.safetensors'}"], capsys)
    assert f"the mask is recorded as 2:4, and {name} is not" in message
    deep: dict[str, object] = {}
    for _ in range(15):
        deep = {"mask": {"config": deep}}
    mask.with_provenance(config={"pattern": "2:4", **deep}).save(tmp_path / "deep.safetensors")
    message = refused([*words, f"--model.mask={tmp_path / 'deep.safetensors'}"], capsys)
    assert "it is nested deeper than 32 levels. Save it without: " in message


@pytest.mark.parametrize("kind", ["lora", "norms"])
def test_what_is_advised_for_trained_weights_is_taken(
    kind: str, recovered: Path, recover: Flags, tmp_path: Path
) -> None:
    """Only kept weights start from others than the base model's."""
    mask = recovered / "checkpoints" / "mask.safetensors"
    words = [word for word in recover(tmp_path / "run") if not word.startswith("--model.mask")]
    with pytest.warns(UserWarning, match=r"were trained before.* give the folder of .* as --model.base_model"):
        main([*words, f"--model.mask={mask}", f"--model.train_weights={kind}"])


def test_a_rate_that_is_typed_beside_an_optimizer_is_told(recover: Flags, tmp_path: Path) -> None:
    says = r"not used, since the mask is not learned: .*model\.optimizer\.lr.*set model\.weight_training\.lr"
    both = '{"class_path": "SGD", "init_args": {"lr": 1e-4}}'
    options = (["--model.optimizer=SGD", "--model.optimizer.lr=1e-4"], [f"--model.optimizer={both}"])
    for number, given in enumerate(options):
        with pytest.warns(UserWarning, match=says):
            main(recover(tmp_path / str(number), *given, "--trainer.max_steps=1"))


def test_a_module_of_a_checkpoint_with_another_mask(recovered: Path, model_folder: Path, tmp_path: Path) -> None:
    other = one_shot(model_folder, tmp_path / "pruned")
    checkpoint = recovered / "checkpoints" / "last.ckpt"
    with pytest.raises(UserError, match="is another mask than that of the checkpoint"):
        LeapModule.load_from_checkpoint(checkpoint, mask=str(other))
    module = LeapModule.load_from_checkpoint(checkpoint, mask=str(recovered / "checkpoints" / "mask.safetensors"))
    name = "model.norm.weight"
    assert torch.equal(module.trained[name](module.trained.frozen(name)), weights_in(recovered)[name])


def test_a_compact_state_is_loaded_by_hand(finished: Run, model_folder: Path, text_file: Path) -> None:
    settings = {"weight_training": WeightTraining(lr=1e-2, compact=True)}
    module, fresh = (of_mask(model_folder, finished.mask, **settings) for _ in range(2))
    trainer(max_steps=1).fit(module, data(text_file))
    fresh.configure_model()
    fresh.load_state_dict(module.state_dict())
    states = [{name: one.trained[name](one.trained.frozen(name)) for name in one.trained} for one in (module, fresh)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_which_texts_a_record_says_weights_were_trained_on(tmp_path: Path) -> None:
    """Those of a mask that stayed, only where training started from the weights under it; and of a one-shot update."""
    first = {"train_weights": {"kind": "kept"}, "data": {"text": "first.jsonl"}}
    update = {"text": "update.jsonl", "method": "admm"}
    cases: list[tuple[dict[str, object], list[str]]] = [
        ({"mask": {"config": first}, "train_weights": {"kind": "kept"}, "data": {"text": "second.jsonl"}}, ["second"]),
        ({"mask": {"config": first}, "train_weights": {"start": "x"}, "data": {"text": "b.jsonl"}}, ["b", "first"]),
        ({"train_weights": {"texts_before": [first["data"]]}, "data": {"text": "b.jsonl"}}, ["b", "first"]),
        ({"weight_update": update}, ["update"]),
        ({"data": {"text": "of a mask alone.jsonl"}}, []),
        ({"text": "calibration.jsonl", "method": "wanda"}, []),
        ({"text": "calibration.jsonl", "updated_by": "admm"}, ["calibration"]),
        ({"text": "of the mask.jsonl", "weight_update": update, "updated_by": "admm"}, ["update"]),
    ]
    for number, (config, texts) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        facts = {"updated_by": config.pop("updated_by")} if "updated_by" in config else {}
        provenance = Provenance("base", "f", "leap", 0.5, config=config)
        (folder / "leap_pl.json").write_text(json.dumps({"provenance": asdict(provenance), **facts}))
        assert [Path(text["text"]).stem for text in texts_of_weights(folder)] == texts
