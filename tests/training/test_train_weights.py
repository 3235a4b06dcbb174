"""Runs that train weights: under a fixed mask and with a learned one, resumed and exported."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import Run, failing, fit_flags, refused
from hub_stand_in import Hub
from recovered_runs import FAST, Flags, exact_zeros, weights_in
from safetensors.torch import load_file, save, save_file
from stopped_runs import curves, differences, outcome
from tiny import tiny_model
from torch import Tensor

from leap_pl import LeapModule, MaskSet, TextDataModule, UserError
from leap_pl.base_model.weights import find_weights
from leap_pl.checkpoints.layout import load_checkpoint, masks_from_checkpoint
from leap_pl.cli.evaluate import evaluate_command
from leap_pl.cli.export import export_command
from leap_pl.cli.main import main
from leap_pl.cli.prune import prune_command
from leap_pl.comparison.entries import read_entries
from leap_pl.export.method import decisive_settings
from leap_pl.gates import calls, gate, trained
from leap_pl.masks.bits import pack
from leap_pl.masks.kept_weights import for_other_weights
from leap_pl.training.checkpoint_weights import weights_from_checkpoint
from leap_pl.training.weights import Placed, WeightTraining, parameters_of

pytestmark = pytest.mark.usefixtures("eager", "event_files_in_order")


# -- what a run learns, and leaves --------------------------------------------------------------------------


def test_the_mask_stays_and_what_it_keeps_moves(recovered: Path, finished_run: Run, model_folder: Path) -> None:
    mask, made = MaskSet.load(finished_run.mask), MaskSet.load(recovered / "checkpoints" / "mask.safetensors")
    assert made.digest_of_bits() == mask.digest_of_bits()
    assert (made.provenance.method, made.provenance.sparsity) == ("leap", 0.5)
    config = made.provenance.config
    assert config["mask"] == {"method": "leap", "sparsity": 0.5, "config": mask.provenance.config}
    training = {
        "kind": "kept",
        "lr": 0.01,
        "warmup_steps": 1,
        "weight_decay": 0.0,
        "embeddings": False,
        "compact": False,
    }
    assert config["train_weights"] == training
    assert "train_weights" not in mask.provenance.config
    base, weights = load_file(model_folder / "model.safetensors"), weights_in(recovered)
    exact_zeros(weights, mask)
    norms = {name for name in base if "norm" in name}
    assert weights.keys() == {*mask.masks} | norms
    for name, weight in weights.items():
        kept = mask.masks.get(name, torch.ones_like(weight, dtype=torch.bool))
        assert (weight[kept] != base[name][kept]).float().mean() > 0.9
    drawn = curves(recovered / "tensorboard")
    assert drawn["perplexity/hard"][4] < 0.8 * drawn["perplexity/hard"][0]
    name = "model.layers.0.mlp.up_proj.weight"
    one = [(weights[n] - base[n])[mask.masks[n]].norm() ** 2 for n in (name, name.replace("0", "1"))]
    all_of = [base[n].norm() ** 2 for n in (name, name.replace("0", "1"))]
    assert drawn["moved/by_projection/mlp.up_proj"][4] == pytest.approx(float((sum(one) / sum(all_of)) ** 0.5))
    assert 0 < drawn["moved/by_layer/000"][1] < drawn["moved/by_layer/000"][4]
    assert {"moved/all", "moved/by_layer/other", "moved/by_projection/model.norm"} <= drawn.keys()
    checkpoint = load_checkpoint(recovered / "checkpoints" / "last.ckpt")
    assert {key.partition(".")[0] for key in checkpoint["state_dict"]} == {"bits", "trained"}
    (groups,) = (state["param_groups"] for state in checkpoint["optimizer_states"])
    assert [group["weight_decay"] for group in groups] == [0.0]


def test_weights_that_are_fitted_again_are_not_those_that_were_trained(
    recovered: Path, model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """The mask is used alone: of the run's weights, and of figures measured with them, its record says nothing."""
    mask = recovered / "checkpoints" / "mask.safetensors"
    settings = {"method": "admm", "mask": str(mask), "seq_length": 32, "sequences": 4, "device": "cpu"}
    made = prune_command(str(model_folder), str(tmp_path / "out"), str(text_file), **settings).masks
    assert made.digest_of_bits() == MaskSet.load(mask).digest_of_bits()
    assert made.provenance.config["weight_update"]["method"] == "admm"
    assert not {"train_weights", "perplexity", "perplexity_of"} & made.provenance.config.keys()
    facts = export_command(str(tmp_path / "sparse"), mask=str(tmp_path / "out" / "mask.safetensors"))
    assert facts["mask_digest"] == made.digest_of_bits()


def test_a_mask_of_the_hub(recovered: Path, recover: Flags, finished_run: Run, hub: Hub, tmp_path: Path) -> None:
    """It is trained under, and resumed, as its file is."""
    hub.files["alice/half"] = {"mask.safetensors": finished_run.mask.read_bytes()}
    bits, weights = MaskSet.load(finished_run.mask).digest_of_bits(), weights_in(recovered)
    main([*recover(tmp_path / "run")[:-1], "--model.mask=alice/half"])
    step = tmp_path / "run" / "checkpoints" / "step=2.ckpt"
    words = recover(tmp_path / "resumed", f"--ckpt_path={step}")
    main([word for word in words if not word.startswith(("--model", "--data"))])
    for run in ("run", "resumed"):
        folder = tmp_path / run / "checkpoints"
        assert MaskSet.load(folder / "mask.safetensors").digest_of_bits() == bits
        found = weights_in(tmp_path / run)  # in a file whose header names the mask's record, which has its other name
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], weight) for name, weight in weights.items())


def test_a_run_resumes_bit_for_bit(recovered: Path, recover: Flags, tmp_path: Path) -> None:
    step = recovered / "checkpoints" / "step=2.ckpt"
    words = [word for word in recover(tmp_path, f"--ckpt_path={step}") if not word.startswith(("--model", "--data"))]
    main(words)  # with the settings of the checkpoint alone
    ends = [load_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (tmp_path, recovered)]
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "leap_pl"):
        assert list(differences(ends[0][part], ends[1][part])) == []
    for file in ("mask.safetensors", "weights.safetensors"):
        assert (tmp_path / "checkpoints" / file).read_bytes() == (recovered / "checkpoints" / file).read_bytes()


@pytest.mark.parametrize("kind", ["kept", "lora"])
def test_mask_and_weights_in_one_run(model_folder: Path, text_file: Path, tmp_path: Path, kind: str) -> None:
    """Two parameter groups with rates of their own; a resumed run ends as the one that was not stopped."""
    words = [*FAST, f"--model.train_weights={kind}", "--model.objective.distillation=0.5"]
    main(fit_flags(model_folder, text_file, tmp_path / "whole", *words))
    again = [*words, f"--ckpt_path={tmp_path / 'whole' / 'checkpoints' / 'step=2.ckpt'}"]
    main(fit_flags(model_folder, text_file, tmp_path / "again", *again))
    whole, resumed = outcome(tmp_path / "whole"), outcome(tmp_path / "again")
    for part in ("state_dict", "optimizer_states"):
        assert list(differences(whole.checkpoint[part], resumed.checkpoint[part])) == []
    assert whole.mask == resumed.mask
    masks = MaskSet.load(tmp_path / "whole" / "checkpoints" / "mask.safetensors")
    assert masks.kept == masks.total // 2
    exact_zeros(weights_in(tmp_path / "whole"), masks)
    groups = whole.checkpoint["optimizer_states"][0]["param_groups"]
    assert [group["initial_lr"] for group in groups] == [1e-3, 1e-2]
    drawn = curves(tmp_path / "whole" / "tensorboard")
    rates = [drawn[f"schedule/learning_rate{of}"] for of in ("", "_of_weights")]
    assert rates[0][1] == pytest.approx(1e-3 / 5)  # of the step itself, the first of five of warm-up
    assert rates[1][1] == pytest.approx(1e-2)
    after = curves(tmp_path / "again" / "tensorboard")
    for name in ("moved/all", "moved/by_layer/000"):
        assert {step: drawn[name][step] for step in (3, 4)} == {step: after[name][step] for step in (3, 4)}
    config = masks.provenance.config
    told = decisive_settings(masks.provenance)
    assert (told["learning rate"], told["learning rate of weights"], told["trained weights"]) == ("0.001", "0.01", kind)
    assert "text that the mask was made with" not in told
    assert config["train_weights"]["kind"] == kind
    assert ("r" in config["train_weights"]) == (kind == "lora")
    assert len(config["optimizer"]["groups"]) == 2


def test_without_trained_weights_a_run_is_what_it_was(finished: Run) -> None:
    checkpoint = load_checkpoint(finished.checkpoint)
    assert {key.partition(".")[0] for key in checkpoint["state_dict"]} == {"logits"}
    assert len(checkpoint["optimizer_states"][0]["param_groups"]) == 1
    assert not {"mask", "train_weights"} & checkpoint["leap_pl"]["settings"].keys()
    assert not (finished.folder / "checkpoints" / "weights.safetensors").exists()
    assert not any(name.startswith("moved") for name in curves(finished.folder / "tensorboard"))
    assert weights_from_checkpoint(finished.checkpoint) is None


def test_without_trained_weights_the_gates_are_called_as_they_are(
    finished: Run, model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What trains weights takes no part: the mask is, bit for bit, that of a package that cannot train them."""
    for module in (calls, gate):
        assert module.softened is trained.softened
        monkeypatch.setattr(module, "softened", lambda gates, frozen: type(gates[0]).soften_all(gates, frozen))
    main(fit_flags(model_folder, text_file, tmp_path))
    plain, whole = outcome(tmp_path), outcome(finished.folder)
    for part in ("state_dict", "optimizer_states"):
        assert list(differences(plain.checkpoint[part], whole.checkpoint[part])) == []
    masks = [MaskSet.load(folder / "checkpoints" / "mask.safetensors") for folder in (tmp_path, finished.folder)]
    assert masks[0].digest_of_bits() == masks[1].digest_of_bits()


def test_python_trains_what_the_command_line_trains(
    recovered: Path, finished_run: Run, model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    from leap_pl.losses.objective import Objective

    module = LeapModule(
        str(model_folder),
        dtype="float32",
        mask=str(finished_run.mask),
        train_weights="kept",
        weight_training=WeightTraining(lr=1e-2, warmup_steps=1),
        objective=Objective(lm=0.5, distillation=0.5, budget=0, weight=0),
    )
    data = TextDataModule(str(model_folder), str(text_file), seq_length=32, batch_size=2, validation_sequences=4)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    L.Trainer(
        max_steps=4,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        accelerator="cpu",
        default_root_dir=tmp_path,
        **options,
    ).fit(module, data)
    module.save_mask(tmp_path / "mask.safetensors")
    module.save_weights(tmp_path / "weights.safetensors", tmp_path / "mask.safetensors")
    for name, weight in weights_in(recovered).items():
        assert torch.equal(weight, load_file(tmp_path / "weights.safetensors")[name])
    loaded = LeapModule.load_from_checkpoint(recovered / "checkpoints" / "last.ckpt")
    assert {name: gate.bits for name, gate in loaded.gates.items()}.keys() == MaskSet.load(
        finished_run.mask
    ).masks.keys()
    for name, weight in loaded.trained.items():
        assert torch.equal(weight.master, module.trained[name].master)  # type: ignore[arg-type]
    assert loaded.mask_set().provenance.method == "leap"


def test_weights_that_a_later_trainer_has_rounded_are_not_saved(
    finished_run: Run, model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """Lightning converts a module for good, to measure it in another precision."""
    module = LeapModule(str(model_folder), dtype="float32", mask=str(finished_run.mask), train_weights="kept")
    text = TextDataModule(str(model_folder), str(text_file), seq_length=32, batch_size=2, validation_sequences=4)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    L.Trainer(max_steps=1, accelerator="cpu", **options).fit(module, text)
    places = tmp_path / "weights.safetensors", tmp_path / "mask.safetensors"
    module.save_mask(places[1])
    module.save_weights(*places)
    places[0].unlink()
    L.Trainer(accelerator="cpu", precision="bf16-true", **options).validate(module, text, verbose=False)
    with pytest.raises(UserError, match=r"were trained in float32, and a later trainer has converted .* to bfloat16"):
        module.save_weights(*places)
    assert not places[0].exists()


def test_the_default_rate_is_small_under_a_learned_mask(finished_run: Run, model_folder: Path, tmp_path: Path) -> None:
    prune_command(str(model_folder), str(tmp_path), method="magnitude")
    rates = {str(finished_run.mask): 2e-5, str(tmp_path): 2e-4, None: 2e-4}
    for mask, rate in rates.items():
        assert LeapModule("base", mask=mask, train_weights="kept").trained.settings.lr == rate
        given = LeapModule("base", mask=mask, train_weights="kept", weight_training=WeightTraining(lr=1e-3))
        assert given.trained.settings.lr == 1e-3


def test_the_plan_says_what_is_trained(recover: Flags, tmp_path: Path, capsys) -> None:
    main(recover(tmp_path / "run", "--trainer.max_steps=1", "--model.train_weights=lora"))
    said = " ".join(capsys.readouterr().err.split())
    assert "weights lora, AdamW with learning rate 0.01 (1 warm-up steps)" in said
    assert "50.0% of them are removed (FixedGate)" in said
    for kind, parameters in (("kept", 15_360 + 5 * 32), ("norms", 5 * 32), ("none", 0)):
        model = tiny_model()
        assert parameters_of(kind, WeightTraining(), find_weights(model), model) == parameters
    compact = parameters_of("kept", WeightTraining(compact=True), find_weights(model), model, density=0.25)
    assert compact == 15_360 / 4 + 5 * 32
    factors = sum(16 * sum(weight.parameter.shape) for weight in find_weights(model).values())
    assert parameters_of("lora", WeightTraining(), find_weights(model), model) == factors


def test_low_memory(recover: Flags, tmp_path: Path) -> None:
    """Bfloat16 masters whose updates are rounded at random; another optimizer is refused as for logits."""
    low = ["--model.logits_dtype=bfloat16", "--model.optimizer=PackedAdamW"]
    main(recover(tmp_path / "whole", *low))
    main(recover(tmp_path / "again", *low, f"--ckpt_path={tmp_path / 'whole' / 'checkpoints' / 'step=2.ckpt'}"))
    ends = [load_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt")["state_dict"] for name in ("whole", "again")]
    assert list(differences(*ends)) == []
    assert {tensor.dtype for tensor in ends[0].values()} == {torch.bfloat16, torch.uint8}
    learned = [curves(tmp_path / "whole" / "tensorboard")["perplexity/hard"][step] for step in (0, 4)]
    assert learned[1] < 0.9 * learned[0]


def test_compact_masters_learn_the_same(recovered: Path, recover: Flags, tmp_path: Path, capsys) -> None:
    """Parameters of the kept weights alone: the same weights but for the order in which gradients are summed."""
    compact = "--model.weight_training.compact=true"
    main(recover(tmp_path / "whole", compact))
    folder = tmp_path / "whole" / "checkpoints"
    main(recover(tmp_path / "again", compact, f"--ckpt_path={folder / 'step=2.ckpt'}"))
    file = "checkpoints/weights.safetensors"
    assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    masks, found, expected = MaskSet.load(folder / "mask.safetensors"), weights_in(tmp_path / "whole"), recovered
    exact_zeros(found, masks)
    for name, weight in weights_in(expected).items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)
    ends = [curves(run / "tensorboard")["moved/all"][4] for run in (tmp_path / "whole", expected)]
    assert ends[0] == pytest.approx(ends[1], rel=1e-4)
    state = load_checkpoint(folder / "last.ckpt")["state_dict"]
    masters = {key: len(state[f"trained.master.{key}"]) for key in masks.masks}
    assert masters == {key: int(mask.sum()) for key, mask in masks.masks.items()}
    export_command(str(tmp_path / "model"), ckpt_path=str(folder / "last.ckpt"))
    model = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(model[name], weight) for name, weight in found.items())
    loaded = LeapModule.load_from_checkpoint(folder / "last.ckpt")
    name = next(iter(masks.masks))
    assert loaded.trained[name].master.equal(state[f"trained.master.{name}"])  # type: ignore[operator, union-attr]
    spoilt = torch.load(folder / "last.ckpt", weights_only=True)
    spoilt["state_dict"][f"trained.master.{name}"] = torch.zeros(3)
    torch.save(spoilt, tmp_path / "spoilt.ckpt")
    words = ["export", f"--ckpt_path={tmp_path / 'spoilt.ckpt'}", f"--output_dir={tmp_path / 'no'}"]
    assert "there are 3 trained weights for" in refused(words, capsys)
    lora = recover(tmp_path / "no", compact, "--model.train_weights=lora")
    assert "compact holds the weights alone that a fixed mask keeps" in refused(lora, capsys)


@pytest.mark.parametrize("kept", [0, 1, 5, 24])
def test_kept_values_are_placed(kept: int) -> None:
    """As masked_scatter does; gradients in float64, empty and full masks too."""
    mask = torch.zeros(24, dtype=torch.bool)
    mask[torch.randperm(24, generator=torch.Generator().manual_seed(kept))[:kept]] = True
    mask, base = mask.view(4, 6), torch.randn(4, 6, dtype=torch.float64)
    values = torch.randn(kept, dtype=torch.float64, requires_grad=True)
    assert torch.equal(Placed.apply(values, pack(mask), base), base.masked_scatter(mask, values))
    assert torch.autograd.gradcheck(lambda values: Placed.apply(values, pack(mask), base), values)


def test_norms_alone(recover: Flags, model_folder: Path, tmp_path: Path) -> None:
    main(recover(tmp_path, "--model.train_weights=norms"))
    assert all("norm" in name for name in weights_in(tmp_path))
    export_command(str(tmp_path / "model"), mask=str(tmp_path / "checkpoints" / "mask.safetensors"))
    base, model = (load_file(folder / "model.safetensors") for folder in (model_folder, tmp_path / "model"))
    masks = MaskSet.load(tmp_path / "model" / "mask.safetensors").masks
    for name, weight in model.items():
        kept = masks.get(name, torch.ones_like(weight, dtype=torch.bool))
        assert torch.equal(weight[kept], base[name][kept]) != ("norm" in name)


# -- export and evaluation ----------------------------------------------------------------------------------


def test_mask_checkpoint_and_packed_exports_are_one_model(recovered: Path, text_file: Path, tmp_path: Path) -> None:
    folder = recovered / "checkpoints"
    facts = export_command(str(tmp_path / "mask"), mask=str(folder / "mask.safetensors"))
    export_command(str(tmp_path / "ckpt"), ckpt_path=str(folder / "last.ckpt"))
    export_command(str(tmp_path / "packed"), ckpt_path=str(folder / "last.ckpt"), format="packed", force=True)
    export_command(str(tmp_path / "unpacked"), model=str(tmp_path / "packed"))
    found = [load_file(tmp_path / name / "model.safetensors") for name in ("mask", "ckpt", "unpacked")]
    for name, weight in found[0].items():
        assert all(torch.equal(weight, other[name]) for other in found[1:])
    weights = weights_in(recovered)
    assert all(torch.equal(found[0][name], weight) for name, weight in weights.items())
    exact_zeros(found[0], masks_from_checkpoint(folder / "last.ckpt"))
    assert facts["sparsity"] == 0.5
    card = (tmp_path / "unpacked" / "README.md").read_text(encoding="utf-8")
    assert "**Weights were trained** (`kept`) under the mask" in card
    assert f"| text | `{text_file.name}` |" in card
    ways = {"model": tmp_path / "mask", "mask": folder / "mask.safetensors", "ckpt_path": folder / "last.ckpt"}
    said = []
    for place, (flag, path) in enumerate(ways.items()):
        result = tmp_path / f"{place}.json"
        evaluate_command(**{flag: str(path)}, perplexity=str(text_file), seq_length=32, output=str(result))  # type: ignore[arg-type]
        said.append(json.loads(result.read_text(encoding="utf-8")))
    figures = [next(iter(one["perplexity"].values()))["value"] for one in said]
    assert figures[0] == figures[1] == figures[2]
    assert {one["model"]["mask_digest"] for one in said} == {facts["mask_digest"]}
    for place in range(len(ways)):
        result = str(tmp_path / f"{place}.json")
        export_command(str(tmp_path / f"card-{place}"), mask=str(folder / "mask.safetensors"), perplexity=result)


def halved(tensors: dict[str, Tensor], raw: bytes) -> bytes:
    """The second half of the data zero, as of a copy that was cut off in a file of full length."""
    return raw[: len(raw) // 2] + bytes(len(raw) - len(raw) // 2)


def flipped(tensors: dict[str, Tensor], raw: bytes) -> bytes:
    return raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:]


def fewer(tensors: dict[str, Tensor], raw: bytes) -> bytes:
    return save({name: tensor for name, tensor in tensors.items() if "layers.1" not in name}, metadata_of(raw))


def more(tensors: dict[str, Tensor], raw: bytes) -> bytes:
    return save(tensors | {"model.embed_tokens.weight": torch.ones(260, 32)}, metadata_of(raw))


def no_list(tensors: dict[str, Tensor], raw: bytes) -> bytes:
    return save(tensors, metadata_of(raw) | {"digests": "[" * 10_000})


def metadata_of(raw: bytes) -> dict[str, str]:
    header: dict[str, Any] = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return dict(header["__metadata__"])


@pytest.mark.parametrize("damage", [halved, flipped, fewer, more, no_list])
def test_trained_weights_that_were_damaged_are_refused(
    damage: Callable[[dict[str, Tensor], bytes], bytes], recovered: Path, text_file: Path, tmp_path: Path, capsys
) -> None:
    """The mask, whose file is whole, would be measured and exported with other weights."""
    shutil.copy(recovered / "checkpoints" / "mask.safetensors", tmp_path)
    place = tmp_path / "weights.safetensors"
    raw = (recovered / "checkpoints" / "weights.safetensors").read_bytes()
    place.write_bytes(damage(load_file(recovered / "checkpoints" / "weights.safetensors"), raw))
    mask, out = f"--mask={tmp_path / 'mask.safetensors'}", tmp_path / "out"
    for words in (["export", mask, f"--output_dir={out}"], ["evaluate", mask, f"--perplexity={text_file}"]):
        said = refused(words, capsys)
        assert f"{place} is truncated or damaged" in said
        assert said.endswith("Use another copy of it, or give the run's checkpoint with --ckpt_path.")
    assert not out.exists()


def test_trained_weights_of_earlier_versions_have_no_digests(recovered: Path, tmp_path: Path) -> None:
    shutil.copy(recovered / "checkpoints" / "mask.safetensors", tmp_path)
    file = recovered / "checkpoints" / "weights.safetensors"
    metadata = metadata_of(file.read_bytes())
    del metadata["digests"]
    save_file(load_file(file), tmp_path / "weights.safetensors", metadata)
    facts = export_command(str(tmp_path / "out"), mask=str(tmp_path / "mask.safetensors"))
    assert facts["sparsity"] == MaskSet.load(tmp_path / "mask.safetensors").sparsity


def test_an_update_of_other_weights_than_the_trained_ones_says_so(
    recovered: Path, model_folder: Path, text_file: Path, tmp_path: Path, capsys
) -> None:
    mask = str(recovered / "checkpoints" / "mask.safetensors")
    options: dict[str, Any] = {"text": str(text_file), "seq_length": 32, "sequences": 4}
    prune_command(str(model_folder), str(tmp_path / "out"), method="admm", mask=mask, **options)
    said = capsys.readouterr().err
    assert (
        f"weights were trained under {mask}, and are left out: the update starts from those of {model_folder}" in said
    )


def test_the_mask_of_an_exported_model_names_the_model(
    recovered: Path, model_folder: Path, hub: Hub, tmp_path: Path, capsys
) -> None:
    """Its weights are in the model, in a folder or on the hub, and not beside the mask."""
    folder = tmp_path / "model"
    export_command(str(folder), mask=str(recovered / "checkpoints" / "mask.safetensors"))
    mask = folder / "mask.safetensors"
    hub.files["alice/trained"] = {mask.name: mask.read_bytes()}
    for given, told in {
        str(mask): f"--model {folder}",
        "alice/trained": "--model alice/trained",
        "alice/trained@v1": "--model alice/trained --revision v1",
    }.items():
        message = refused(["export", f"--mask={given}", f"--output_dir={tmp_path / 'out'}"], capsys)
        assert (
            f"trained under {given}, and the exported model that it belongs to has them. Give {told} instead" in message
        )


def test_figures_are_of_mask_and_weights(recovered: Path, finished_run: Run, text_file: Path, tmp_path: Path) -> None:
    """One mask with the base model's weights and with trained ones: two models, in cards and in a comparison."""
    masks = {"alone": finished_run.mask, "trained": recovered / "checkpoints" / "mask.safetensors"}
    results = {name: str(tmp_path / f"{name}.json") for name in masks}
    for name, mask in masks.items():
        evaluate_command(mask=str(mask), perplexity=str(text_file), seq_length=32, output=results[name])
    for mask, figures, form in (
        ("trained", "alone", "packed"),
        ("alone", "trained", "packed"),
        ("trained",) * 2 + ("mask",),
    ):
        with pytest.raises(UserError, match="measured with this mask and other weights"):
            export_command(str(tmp_path / "no"), mask=str(masks[mask]), perplexity=results[figures], format=form)
    changes: dict[str, Any] = {"objective": {"lm": 0.25}, "steps": 3, "seed": 7, "data": {"sha256": "0" * 64}}
    changes |= {"optimizer": {"betas": [0.9, 0.99]}, "gradient_clip_val": 0.5, "dtype": "bfloat16"}
    for name, change in changes.items():  # of a run that differs in its losses alone, its length, its noise, its text
        result = json.loads(Path(results["trained"]).read_text(encoding="utf-8"))
        was = result["config"][name]
        result["config"][name] = {**was, **change} if isinstance(change, dict) else change
        assert result["config"][name] != was
        (tmp_path / "other.json").write_text(json.dumps(result), encoding="utf-8")
        with pytest.raises(UserError, match="measured with this mask and other weights"):
            export_command(str(tmp_path / "no"), mask=str(masks["trained"]), perplexity=str(tmp_path / "other.json"))
    assert not (tmp_path / "no").exists()
    export_command(str(tmp_path / "mask"), mask=str(masks["trained"]), perplexity=results["alone"], format="mask")
    assert "train_weights" not in MaskSet.load(tmp_path / "mask" / "mask.safetensors").provenance.config
    assert "validation text" not in (tmp_path / "mask" / "README.md").read_text(encoding="utf-8")
    methods = [entry.method for entry in read_entries([*results.values(), str(masks["trained"])])]
    assert methods == ["leap", "leap + trained weights"]


def test_validation_is_of_the_exported_model(recovered: Path, text_file: Path, tmp_path: Path, capsys) -> None:
    """The hard mask with the weights as trained: `validate` of the checkpoint says what the run said."""
    words = ["--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu"]
    main(["validate", f"--ckpt_path={recovered / 'checkpoints' / 'last.ckpt'}", *words])
    last = curves(recovered / "tensorboard")["perplexity/hard"][4]
    assert f"{last:.4f}"[:6] in capsys.readouterr().out


def test_a_finished_run_that_has_lost_its_weights_writes_them_again(
    recovered: Path, recover: Flags, tmp_path: Path, capsys
) -> None:
    run = tmp_path / "run"
    shutil.copytree(recovered, run, symlinks=True)
    weights = run / "checkpoints" / "weights.safetensors"
    before = weights.read_bytes()
    weights.unlink()
    words = [word for word in recover(run) if not word.startswith(("--model", "--data"))]
    main([*words, "--ckpt_path=last"])
    assert weights.read_bytes() == before
    capsys.readouterr()
    main([*words, "--ckpt_path=last"])
    assert "is finished" in capsys.readouterr().err


def test_a_mask_by_another_name_is_the_same_mask(
    recovered: Path, recover: Flags, finished_run: Run, model_folder: Path, tmp_path: Path, capsys
) -> None:
    step = recovered / "checkpoints" / "step=2.ckpt"
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(finished_run.mask.read_bytes())

    def words(folder: str, mask: Path) -> list[str]:
        flags = recover(tmp_path / folder, f"--ckpt_path={step}")
        return [*(word for word in flags if not word.startswith("--model.mask")), f"--model.mask={mask}"]

    main(words("run", copy))
    ends = [load_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (tmp_path / "run", recovered)]
    assert list(differences(ends[0]["state_dict"], ends[1]["state_dict"])) == []
    prune_command(str(model_folder), str(tmp_path / "other"), method="magnitude")
    message = failing(capsys, words("another", tmp_path / "other"))
    assert "is another mask than that of the checkpoint" in message
    assert "Leave it out to resume" in message
    # Of another sparsity, and of other weights, too: neither is typed.
    prune_command(str(model_folder), str(tmp_path / "sparser"), method="magnitude", sparsity=0.6)
    sparser = tmp_path / "run-of-sparser"
    main([*(w for w in recover(sparser) if not w.startswith("--model.mask")), f"--model.mask={tmp_path / 'sparser'}"])
    prune_command(str(model_folder), str(tmp_path / "fewer"), method="magnitude", ignore=["re:.*down_proj"])
    for other in (copy, tmp_path / "fewer"):
        resumed = [w for w in recover(tmp_path / "third") if not w.startswith("--model.mask")]
        ckpt_path = f"--ckpt_path={sparser / 'checkpoints' / 'step=2.ckpt'}"
        message = failing(capsys, [*resumed, f"--model.mask={other}", ckpt_path])
        assert "is another mask than that of the checkpoint" in message
    # Also where the run is finished, which is so of the mask that it was under.
    again = [*recover(tmp_path / "run"), "--ckpt_path=last"]
    main([*again, f"--model.mask={copy}"])
    assert "is finished" in capsys.readouterr().err
    assert "is another mask than" in failing(capsys, [*again, f"--model.mask={tmp_path / 'other'}"])


def test_a_mask_that_was_recovered_twice_is_what_it_was_before(
    recovered: Path, recover: Flags, finished_run: Run, tmp_path: Path
) -> None:
    words = [word for word in recover(tmp_path / "again") if not word.startswith("--model.mask")]
    main([*words, f"--model.mask={recovered / 'checkpoints' / 'mask.safetensors'}"])
    twice = MaskSet.load(tmp_path / "again" / "checkpoints" / "mask.safetensors")
    first = MaskSet.load(finished_run.mask).provenance.config
    left = {name: value for name, value in first.items() if not name.startswith("perplexity")}
    assert dict(for_other_weights(twice).provenance.config) == left
