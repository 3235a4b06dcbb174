"""Runs with gates of tiles: fit, checkpoint, export, resuming, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bare_gates import is_exact
from conftest import fit_flags, refused
from tiny import tiny_folder, tiny_model

from leap_pl.base_model.weights import find_weights
from leap_pl.checkpoints.layout import masks_from_checkpoint
from leap_pl.cli.main import main
from leap_pl.gates import TileGate
from leap_pl.masks import MaskSet
from leap_pl.masks.patterns import NM, Tiled, follows

pytestmark = pytest.mark.usefixtures("eager")

# -- the whole run ----------------------------------------------------------------------------------------


def tile_flags(mode: str, sparsity: float = 0.3) -> list[str]:
    return ["--model.gate=TileGate", "--model.gate.tile=8", f"--model.gate.mode={mode}", f"--model.sparsity={sparsity}"]


@pytest.fixture(scope="module", params=["tile", "joint"])
def tile_run(request, model_folder: Path, text_file: Path, tmp_path_factory) -> tuple[str, Path]:
    """A finished run in each mode."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAP_PL_COMPILE", "0")
        main(fit_flags(model_folder, text_file, folder, *tile_flags(request.param)))
    return request.param, folder


def test_fit_checkpoint_export_and_reading_back(tile_run: tuple[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    mode, folder = tile_run
    learned = MaskSet.load(folder / "checkpoints" / "mask.safetensors")
    prior = MaskSet.load(folder / "checkpoints" / "prior.safetensors")
    inner = MaskSet.load(folder / "checkpoints" / "prior-inner.safetensors")
    assert learned.provenance.method == "patch"
    assert learned.provenance.config["pattern"] == "8x8 tiles, dense or 2:4"
    assert learned.provenance.config["annealing"]["pattern_alpha"]["end"] == 500
    assert all(is_exact(mask, 1, 2, 4) for mask in inner.masks.values())
    assert prior.provenance.config["pattern"] == "unstructured"
    assert abs((learned.total - learned.kept) - round(0.3 * learned.total)) <= 16  # half of what a tile loses
    assert all(follows(mask, 1, Tiled(NM(2, 4), 8)) for mask in learned.masks.values())
    assert (mode == "tile") == all(bool((learned.masks[n] | ~inner.masks[n]).all()) for n in inner.masks)
    checkpoint = folder / "checkpoints" / "last.ckpt"
    again = masks_from_checkpoint(checkpoint)
    assert all(torch.equal(again.masks[name], mask) for name, mask in learned.masks.items())
    facts = main(["export", f"--ckpt_path={checkpoint}", f"--output_dir={tmp_path / 'model'}"])
    assert facts["removed"] == learned.total - learned.kept
    assert "8x8 tiles, dense or 2:4" in (tmp_path / "model" / "README.md").read_text()
    weights = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "model").named_parameters())
    assert all(follows(weights[name] != 0, 1, Tiled(NM(2, 4), 8)) for name in learned.masks)


def test_bits_are_not_compared_with_a_prior_that_has_no_tiles(tile_run: tuple[str, Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tile_run[1] / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"tiles/logits_above_0", "mask/changed_since_last_log"} <= tags
    assert "mask/changed_from_prior" not in tags


def test_resumed_run_ends_bit_identical(tile_run: tuple[str, Path], model_folder, text_file, tmp_path: Path) -> None:
    mode, folder = tile_run
    earlier = folder / "checkpoints" / "step=4.ckpt"
    main(fit_flags(model_folder, text_file, tmp_path, *tile_flags(mode), f"--ckpt_path={earlier}"))
    assert not (tmp_path / "checkpoints" / "step=4.ckpt").exists()  # not from the start
    one, other = (
        torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for path in (folder, tmp_path)
    )
    assert one.keys() == other.keys()
    parts = {"logits", "removable", "inner" if mode == "tile" else "pattern_logits"}
    assert {key.partition(".")[0] for key in one} == parts
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_validate_takes_everything_from_the_checkpoint(tile_run: tuple[str, Path], text_file: Path) -> None:
    """The kind of gate, its settings and its fixed mask included."""
    mode, folder = tile_run
    flags = ["validate", f"--data.text={text_file}", "--data.seq_length=32", "--data.validation_sequences=4"]
    flags += ["--trainer.accelerator=cpu", "--trainer.logger=false"]
    cli = main([*flags, f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"])
    gate = cli.model.gates.first
    assert isinstance(gate, TileGate)
    assert (gate.mode, gate.tiled.size) == (mode, 8)
    learned = MaskSet.load(folder / "checkpoints" / "mask.safetensors")
    assert all(torch.equal(gate.hard_mask(), learned.masks[name]) for name, gate in cli.model.gates.items())


@pytest.mark.parametrize("spelling", ["masks.inner", "inner_mask"])
def test_masks_from_files_as_priors(tile_run, model_folder, text_file, tmp_path: Path, spelling: str) -> None:
    mode, folder = tile_run
    files = [f"--model.prior.mask={folder / 'checkpoints' / 'prior.safetensors'}"]
    files += [f"--model.prior.{spelling}={folder / 'checkpoints' / 'prior-inner.safetensors'}"]
    more = [*tile_flags(mode), *files, "--model.prior.method=none", "--trainer.max_steps=1"]
    main(fit_flags(model_folder, text_file, tmp_path, *more))
    assert learned_with(tmp_path)["model.prior"]["masks"] == {"inner": files[1].partition("=")[2]}
    for name in ("prior", "prior-inner"):
        one, other = (MaskSet.load(path / "checkpoints" / f"{name}.safetensors") for path in (folder, tmp_path))
        assert all(torch.equal(one.masks[key], other.masks[key]) for key in one.masks)


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_fit_and_export_where_weights_are_no_linears(family: str, text_file: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_folder(tmp_path / "m", family)
    main(fit_flags(folder, text_file, tmp_path, *tile_flags("joint"), "--trainer.max_steps=1"))
    main(["export", f"--ckpt_path={tmp_path / 'checkpoints' / 'last.ckpt'}", f"--output_dir={tmp_path / 'model'}"])
    masks = MaskSet.load(tmp_path / "model" / "mask.safetensors").masks
    weights = find_weights(tiny_model(family))
    assert masks.keys() == weights.keys()
    exported = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "model").named_parameters())
    for name, mask in masks.items():
        assert not exported[name][~mask].any()
        assert exported[name][mask].ne(0).float().mean() > 0.99
    assert all(follows(mask, weights[name].input_dim, Tiled(NM(2, 4), 8)) for name, mask in masks.items())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model.sparsity=0.6"], "Set --model.sparsity 0.5 or less"),
        (["--model.sparsity=0.3", "--model.gate.tile=0"], "model.gate.tile is 0; give 1 or more"),
        (
            ["--model.sparsity=0.3", "--model.gate.tile=10"],
            "model.gate.tile is 10, and joint mode needs a multiple of 4",
        ),
        (["--model.sparsity=0.3", "--model.gate.mode=tile", "--model.prior.method=none"], "prior.method is none"),
    ],
)
def test_nonsense_is_refused_in_one_line(model_folder, text_file, tmp_path: Path, capsys, flags, words: str) -> None:
    error = refused(fit_flags(model_folder, text_file, tmp_path, "--model.gate=TileGate", *flags), capsys)
    assert words in error
    assert not [*tmp_path.rglob("*.ckpt"), *tmp_path.rglob("*.safetensors")]


def learned_with(folder: Path) -> dict[str, Any]:
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint["leap_pl"]["learned_with"]


def test_a_checkpoint_with_the_former_name_of_the_inner_mask_resumes(
    tile_run: tuple[str, Path], model_folder, text_file, tmp_path: Path, capsys
) -> None:
    """As the setting was stored before it had a general name: taken where it is not typed, compared where it is."""
    mode, folder = tile_run
    inner, earlier = str(folder / "checkpoints" / "prior-inner.safetensors"), tmp_path / "earlier.ckpt"
    checkpoint = torch.load(folder / "checkpoints" / "step=4.ckpt", weights_only=True)
    stored = checkpoint["leap_pl"]["learned_with"]["model.prior"]
    del stored["masks"]
    stored["inner_mask"] = inner
    torch.save(checkpoint, earlier)
    flags = fit_flags(model_folder, text_file, tmp_path, *tile_flags(mode), f"--ckpt_path={earlier}")
    other = [*flags, "--model.prior.masks.inner=other.safetensors"]
    assert "model.prior.masks.inner was " in refused(other, capsys)
    main(flags)
    assert learned_with(tmp_path)["model.prior"]["masks"] == {"inner": inner}
    main([*flags, f"--model.prior.masks.inner={inner}", f"--checkpoint.dirpath={tmp_path / 'again'}"])


def test_an_inner_prior_for_gates_without_tiles_is_refused(tile_run, model_folder, text_file, tmp_path, capsys) -> None:
    inner = tile_run[1] / "checkpoints" / "prior-inner.safetensors"
    flags = fit_flags(model_folder, text_file, tmp_path, f"--model.prior.masks.inner={inner}")
    assert "prior.masks.inner: these gates start from prior alone. Leave it out." in refused(flags, capsys)
