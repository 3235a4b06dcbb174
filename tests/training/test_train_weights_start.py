"""Where training of weights starts: a sparse model, with or without the dense one, and weights of ADMM."""

from pathlib import Path

import pytest
import torch
from conftest import Run, refused
from recovered_runs import Flags, exact_zeros, weights_in
from safetensors.torch import load_file
from stopped_runs import curves

from leap_pl import MaskSet
from leap_pl.cli.export import export_command
from leap_pl.cli.main import main
from leap_pl.cli.prune import prune_command

pytestmark = pytest.mark.usefixtures("eager", "event_files_in_order")


def test_a_recovered_model_is_recovered_again(recovered: Path, recover: Flags, model_folder: Path, tmp_path: Path):
    """From an unpacked folder, on another text, every zero is kept; and from weights of ADMM for its own mask."""
    export_command(
        str(tmp_path / "packed"), mask=str(recovered / "checkpoints" / "mask.safetensors"), format="packed", force=True
    )
    export_command(str(tmp_path / "model"), model=str(tmp_path / "packed"))
    words = [word for word in recover(tmp_path / "again") if not word.startswith("--model.mask")]
    main([*words, f"--model.mask={tmp_path / 'model'}", f"--model.weights={tmp_path / 'model'}"])
    masks = MaskSet.load(tmp_path / "again" / "checkpoints" / "mask.safetensors")
    assert masks.digest_of_bits() == MaskSet.load(recovered / "checkpoints" / "mask.safetensors").digest_of_bits()
    exact_zeros(weights_in(tmp_path / "again"), masks)
    assert masks.provenance.config["train_weights"]["start"] == str(tmp_path / "model")
    first = curves(tmp_path / "again" / "tensorboard")["perplexity/hard"][0]
    assert first == pytest.approx(curves(recovered / "tensorboard")["perplexity/hard"][4], rel=1e-5)


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


def test_a_run_that_does_not_start_from_the_trained_weights_says_so(
    recovered: Path, recover: Flags, tmp_path: Path
) -> None:
    words = [word for word in recover(tmp_path, "--trainer.max_steps=1") if not word.startswith("--model.mask")]
    with pytest.warns(UserWarning, match=r"were trained before, and this run starts .* add --model.weights"):
        main([*words, f"--model.mask={recovered / 'checkpoints'}"])


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_weights_of_admm_are_where_it_starts(
    recover: Flags, model_folder: Path, text_file: Path, tmp_path: Path, pattern: str | None, capsys
) -> None:
    pruned = tmp_path / "pruned"
    options = {"method": "admm", "pattern": pattern, "sequences": 2, "seq_length": 32, "text": str(text_file)}
    prune_command(str(model_folder), str(pruned), **options)  # type: ignore[arg-type]
    words = [word for word in recover(tmp_path / "run") if not word.startswith("--model.mask")]
    words += ["--model.weight_training.lr=0"]
    main([*words, f"--model.mask={pruned}", f"--model.weights={pruned / 'model'}"])
    start = load_file(pruned / "model" / "model.safetensors")
    for name, weight in weights_in(tmp_path / "run").items():
        assert torch.equal(weight, start[name])
    made = MaskSet.load(tmp_path / "run" / "checkpoints" / "mask.safetensors")
    assert made.provenance.method == "admm"
    assert made.provenance.config["pattern"] == (pattern or "unstructured")
    export_command(str(tmp_path / "model"), mask=str(tmp_path / "run" / "checkpoints" / "mask.safetensors"))
    if pattern is None:  # of another mask
        line = refused([*recover(tmp_path / "no"), f"--model.weights={pruned / 'model'}"], capsys)
        assert "has other zeros than the mask" in line
