"""Where training of weights starts: a sparse model, with or without the dense one, and weights of ADMM."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, refused
from recovered_runs import Flags, exact_zeros, weights_in
from safetensors.torch import load_file, save_file
from stopped_runs import curves
from tiny import tiny_folder

from leap_pl import LeapModule, MaskSet
from leap_pl.base_model.loading import load_model
from leap_pl.cli.export import export_command
from leap_pl.cli.main import main
from leap_pl.cli.prune import prune_command
from leap_pl.evaluation.subject import load_subject
from leap_pl.export.method import decisive_settings
from leap_pl.gates import FixedGate
from leap_pl.masks.mask_set import TRAINED
from leap_pl.prior import Prior

pytestmark = pytest.mark.usefixtures("eager", "event_files_in_order")


def test_a_recovered_model_is_recovered_again(recovered: Path, recover: Flags, tmp_path: Path):
    """From an unpacked folder, on another text, every zero is kept; and from weights of ADMM for its own mask."""
    export_command(
        str(tmp_path / "packed"), mask=str(recovered / "checkpoints" / "mask.safetensors"), format="packed", force=True
    )
    export_command(str(tmp_path / "model"), model=str(tmp_path / "packed"))
    other = tmp_path / "other.txt"
    other.write_text("".join(f"Step {n}: stir {n * n} spoons of it.\n\n" for n in range(400)), encoding="utf-8")
    words = [word for word in recover(tmp_path / "again") if not word.startswith(("--model.mask", "--data.text"))]
    words += [f"--model.mask={tmp_path / 'model'}", f"--model.weights={tmp_path / 'model'}", f"--data.text={other}"]
    main([*words, "--model.prior.method=none"])  # the default, typed
    masks = MaskSet.load(tmp_path / "again" / "checkpoints" / "mask.safetensors")
    assert masks.digest_of_bits() == MaskSet.load(recovered / "checkpoints" / "mask.safetensors").digest_of_bits()
    exact_zeros(weights_in(tmp_path / "again"), masks)
    assert masks.provenance.config["train_weights"]["start"] == str(tmp_path / "model")
    told, first = (decisive_settings(MaskSet.load(run).provenance) for run in (tmp_path / "again", recovered))
    assert (told["text"], told["text that the mask was made with"]) == ("other.txt", first["text"])
    drawn = curves(tmp_path / "again" / "tensorboard")
    assert drawn["loss/lm"][4] < drawn["loss/lm"][1]
    before = curves(recovered / "tensorboard")["moved/all"][4]
    assert drawn["moved/all"][1] == pytest.approx(before, rel=0.3)  # it starts where the other run has ended


def test_a_sparse_model_is_a_base_model_of_its_own_mask(
    recovered: Path, recover: Flags, finished_run: Run, tmp_path: Path, capsys
) -> None:
    """Nothing of the dense model is needed: its zeros are kept, and the export of what was trained is complete."""
    sparse, run = tmp_path / "sparse", tmp_path / "run"
    export_command(str(sparse), mask=str(recovered / "checkpoints" / "mask.safetensors"))
    words = [word for word in recover(run) if not word.startswith(("--model.mask", "--model.base_model"))]
    words += [f"--model.base_model={sparse}", "--force"]
    with pytest.warns(UserWarning, match=rf"is sparse already: 50.0% .* Distillation.* --model.weights {sparse}"):
        main([*words, f"--model.mask={sparse}"])
    made = MaskSet.load(run / "checkpoints" / "mask.safetensors")
    assert made.digest_of_bits() == MaskSet.load(finished_run.mask).digest_of_bits()
    assert made.provenance.base_model == str(sparse)
    weights, start = weights_in(run), load_file(sparse / "model.safetensors")
    exact_zeros(weights, made)
    assert not any(torch.equal(weights[name], start[name]) for name in made.masks)
    drawn = curves(run / "tensorboard")["perplexity/hard"]
    assert drawn[0] == pytest.approx(curves(recovered / "tensorboard")["perplexity/hard"][4], rel=1e-5)
    assert drawn[4] < drawn[0]
    export_command(str(tmp_path / "again"), ckpt_path=str(run / "checkpoints" / "last.ckpt"))
    exported = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(exported[name], weight.to(exported[name].dtype)) for name, weight in weights.items())
    again = recover(tmp_path / "resumed", f"--ckpt_path={run / 'checkpoints' / 'step=2.ckpt'}")
    main([word for word in again if not word.startswith(("--model", "--data"))])
    assert (tmp_path / "resumed" / "checkpoints" / "weights.safetensors").read_bytes() == (
        run / "checkpoints" / "weights.safetensors"
    ).read_bytes()
    flipped = {name: ~mask for name, mask in made.masks.items()}
    MaskSet(flipped, MaskSet.load(finished_run.mask).provenance).save(tmp_path / "flipped.safetensors")
    line = refused([*words, f"--model.mask={tmp_path / 'flipped.safetensors'}"], capsys)
    assert "or a model that it was applied to" in line
    torch.manual_seed(0)  # a sparser model, whose zeros the run would fill
    sparser = {name: x * (torch.rand(x.shape) < 0.7) if name in made.masks else x for name, x in start.items()}
    save_file(sparser, sparse / "model.safetensors", {"format": "pt"})
    line = refused([*words, f"--model.mask={finished_run.mask}"], capsys)
    assert "or a model that it was applied to" in line


def test_a_mask_that_keeps_a_little_more_than_the_sparse_model_is_not_its_mask(
    recovered: Path, recover: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Too few of what it keeps are 0 to tell by; the model's record does."""
    sparse = tmp_path / "sparse"
    export_command(str(sparse), mask=str(recovered / "checkpoints" / "mask.safetensors"))
    own = MaskSet.load(sparse / "mask.safetensors")
    generator = torch.Generator().manual_seed(0)
    more = {name: mask | (torch.rand(mask.shape, generator=generator) < 0.05) for name, mask in own.masks.items()}
    larger = MaskSet(more, own.provenance)
    assert own.kept < larger.kept < 1.1 * own.kept
    assert larger.is_applied_to(load_model(str(sparse)))
    file = larger.save(tmp_path / "larger.safetensors")
    words = recover(tmp_path / "run", "--trainer.max_steps=1")
    words = [word for word in words if not word.startswith(("--model.mask", "--model.base_model"))]
    words += [f"--model.base_model={sparse}"]
    said = f"mask {file} is not the mask of base model {sparse}, whose zeros it would fill. Give the mask in that"
    assert said in refused([*words, f"--model.mask={file}"], capsys)
    assert not list((tmp_path / "run").rglob("*.safetensors"))
    main([*words, f"--model.mask={own.save(tmp_path / 'own.safetensors')}", "--force"])  # by another name


def test_a_run_that_does_not_start_from_the_trained_weights_says_so(
    recovered: Path, recover: Flags, model_folder: Path, tmp_path: Path
) -> None:
    words = [word for word in recover(tmp_path, "--trainer.max_steps=1") if not word.startswith("--model.mask")]
    with pytest.warns(UserWarning, match=r"were trained before, and this run starts .* add --model.weights"):
        main([*words, f"--model.mask={recovered / 'checkpoints'}"])
    # Its prior is a mask alone: the weights beside it are those that this run has trained.
    prior = tmp_path / "checkpoints" / "prior.safetensors"
    assert TRAINED not in MaskSet.load(prior).provenance.config
    assert load_subject(mask=str(prior)).method == MaskSet.load(recovered).provenance.method
    start = dict(load_subject(mask=str(prior)).model.named_parameters())
    base = dict(load_model(str(model_folder)).named_parameters())
    for name, mask in MaskSet.load(prior).masks.items():
        assert torch.equal(start[name], base[name].masked_fill(~mask, 0))


def test_the_rate_is_small_where_weights_were_trained_before(
    recovered: Path, recover: Flags, finished_run: Run, model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """Or the mask learned: not under a one-shot mask, from the dense weights, or from those that the method updated."""

    def rate(base_model: Path, mask: Path, **settings: str) -> float | None:
        return LeapModule(str(base_model), mask=str(mask), train_weights="kept", **settings).trained.settings.lr

    pruned, sparse, again = tmp_path / "pruned", tmp_path / "sparse", tmp_path / "again"
    options = {"method": "admm", "sequences": 2, "seq_length": 32, "text": str(text_file)}
    prune_command(str(model_folder), str(pruned), **options)  # type: ignore[arg-type]
    words = [word for word in recover(again, "--trainer.max_steps=1") if not word.startswith("--model.mask")]
    main([*words, f"--model.mask={pruned}"])
    trained = again / "checkpoints" / "mask.safetensors"
    export_command(str(sparse), mask=str(trained))
    assert rate(model_folder, pruned) == rate(model_folder, pruned, weights=str(pruned / "model")) == 2e-4
    assert rate(model_folder, trained) == 2e-4
    assert rate(sparse, sparse) == rate(sparse, sparse / "mask.safetensors") == 2e-5
    assert rate(sparse, again) == rate(Path(os.path.relpath(sparse)), sparse) == 2e-5  # the same mask by another name
    assert rate(model_folder, sparse, weights=str(sparse)) == 2e-5
    # By the record of the weights, whatever that of the mask says.
    export_command(str(tmp_path / "read-off"), model=str(sparse), format="mask")
    assert rate(sparse, pruned) == rate(sparse, tmp_path / "read-off") == 2e-5
    assert rate(model_folder, pruned, weights=str(sparse)) == 2e-5
    assert rate(model_folder, trained, weights=str(pruned / "model")) == 2e-4
    assert rate(model_folder, finished_run.mask) == 2e-5

    def rate_of(base_model: Path, kind: str = "kept", **settings: Any) -> float | None:
        return LeapModule(str(base_model), train_weights=kind, **settings).trained.settings.lr  # type: ignore[arg-type]

    # Where the mask is given as a prior that stays, and where it is learned with weights that were trained before.
    assert rate_of(model_folder, gate=FixedGate, prior=Prior(mask=str(finished_run.mask))) == 2e-5
    assert rate_of(model_folder, gate=FixedGate, prior=Prior(mask=str(pruned))) == 2e-4
    assert rate_of(model_folder, gate=FixedGate, prior=Prior(method="magnitude")) == 2e-4
    assert rate_of(model_folder, prior=Prior(mask=str(finished_run.mask))) == rate_of(model_folder) == 2e-4
    assert rate_of(sparse) == rate_of(model_folder, weights=str(sparse)) == 2e-5
    assert rate_of(pruned / "model") == 2e-4


def test_weights_that_a_run_would_drop_are_refused(
    recovered: Path, recover: Flags, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sparse = tmp_path / "sparse"
    export_command(str(sparse), mask=str(recovered / "checkpoints" / "mask.safetensors"))
    tensors = load_file(sparse / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"] * 1.5
    save_file(tensors, sparse / "model.safetensors", {"format": "pt"})
    words = [*recover(tmp_path / "run", "--trainer.max_steps=1"), f"--model.weights={sparse}"]
    line = refused(words, capsys)
    assert "has other values than the base model of model.embed_tokens.weight, which this run does not train" in line
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").rglob("*.safetensors"))
    main([*words, "--model.weight_training.embeddings=true", "--model.weight_training.lr=0"])
    assert torch.equal(weights_in(tmp_path / "run")["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    # As they are, in another data type, they are the base model's.
    load_model(str(sparse)).bfloat16().save_pretrained(sparse)
    halves, dense = load_file(sparse / "model.safetensors"), load_file(model_folder / "model.safetensors")
    halves["model.embed_tokens.weight"] = dense["model.embed_tokens.weight"].bfloat16()
    save_file(halves, sparse / "model.safetensors", {"format": "pt"})
    main([*words, "--force"])


def test_tied_embeddings_of_other_weights_are_trained_as_one(text_file: Path, recover: Flags, tmp_path: Path) -> None:
    base, sparse = tiny_folder(tmp_path / "base", tie_word_embeddings=True), tmp_path / "sparse"
    prune_command(str(base), str(sparse), method="magnitude")
    changed = load_model(str(base))
    with torch.no_grad():
        changed.get_input_embeddings().weight.mul_(1.5)
        MaskSet.load(sparse / "mask.safetensors").apply_(changed, check=False)
    changed.save_pretrained(tmp_path / "changed")
    words = [word for word in recover(tmp_path / "run", "--trainer.max_steps=1") if "--model.mask" not in word]
    words = [word for word in words if not word.startswith(("--model.base_model", "--model.weight_training.lr"))]
    words += [f"--model.base_model={base}", f"--model.mask={sparse}", f"--model.weights={tmp_path / 'changed'}"]
    main([*words, "--model.weight_training.embeddings=true", "--model.weight_training.lr=0"])
    found = weights_in(tmp_path / "run")
    assert torch.equal(found["model.embed_tokens.weight"], changed.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("method", "pattern", "compact"),
    [("admm", None, False), ("admm", "2:4", True), ("sparsegpt", None, True)],
)
def test_weights_of_a_one_shot_method_are_where_it_starts(
    recover: Flags,
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    method: str,
    pattern: str | None,
    compact: bool,
    capsys,
) -> None:
    pruned = tmp_path / "pruned"
    options = {"method": method, "pattern": pattern, "sequences": 2, "seq_length": 32, "text": str(text_file)}
    prune_command(str(model_folder), str(pruned), **options)  # type: ignore[arg-type]
    words = [word for word in recover(tmp_path / "run") if not word.startswith("--model.mask")]
    words += ["--model.weight_training.lr=0", f"--model.weight_training.compact={str(compact).lower()}"]
    main([*words, f"--model.mask={pruned}", f"--model.weights={pruned / 'model'}"])
    named = {"mask": str(pruned)}, {"model": str(pruned / "model")}, {"mask": str(tmp_path / "run")}
    methods = [load_subject(**names).method for names in named]
    assert methods == [f"{method} (mask alone)", method, method]  # the first on weights that the method has not changed
    start = load_file(pruned / "model" / "model.safetensors")
    for name, weight in weights_in(tmp_path / "run").items():
        assert torch.equal(weight, start[name])
    made = MaskSet.load(tmp_path / "run" / "checkpoints" / "mask.safetensors")
    assert made.provenance.method == method
    assert made.provenance.config["pattern"] == (pattern or "unstructured")
    told = decisive_settings(made.provenance)
    assert told["text"] == told["text that the mask was made with"] == text_file.name
    assert told["weights that training started from"] == "model"
    assert (told["trained weights"], told["learning rate of weights"]) == ("kept", "0.0")
    assert not {"learning rate", "α", "τ", "prior"} & told.keys()
    export_command(str(tmp_path / "model"), mask=str(tmp_path / "run" / "checkpoints" / "mask.safetensors"))
    if pattern is None:  # of another mask, and of one that removes more
        line = refused([*recover(tmp_path / "no"), f"--model.weights={pruned / 'model'}"], capsys)
        assert "has other zeros than the mask: " in line
        assert "which the mask removes, are not 0. Give the weights that were made with this mask." in line
        superset = {name: mask | (torch.rand(mask.shape) < 0.05) for name, mask in made.masks.items()}
        MaskSet(superset, made.provenance).save(tmp_path / "superset.safetensors")
        words = [word for word in recover(tmp_path / "more") if not word.startswith("--model.mask")]
        words += [f"--model.mask={tmp_path / 'superset.safetensors'}", f"--model.weights={pruned / 'model'}"]
        assert "has a mask of its own, and the run another one" in refused(words, capsys)
        (pruned / "model" / "mask.safetensors").unlink()  # of other tools: what their zeros say
        for share in (0.05, 0.2):
            tensors = dict(start)
            for name in made.masks:
                tensors[name] = tensors[name] * (torch.rand(tensors[name].shape) > share)
            save_file(tensors, pruned / "model" / "model.safetensors", {"format": "pt"})
            words = [word for word in recover(tmp_path / f"{share}") if not word.startswith("--model.mask")]
            words += [f"--model.mask={pruned}", f"--model.weights={pruned / 'model'}"]
            if share < 0.1:
                main([*words, "--trainer.max_steps=1"])
            else:
                assert "are 0 there, and not in the base model. Give the weights" in refused(words, capsys)
