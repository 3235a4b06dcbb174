"""NMGate over a whole run: fit, checkpoint, export, resume, the curves, and what is refused."""

from pathlib import Path

import pytest
import torch
from bare_gates import is_exact, nm_gate
from conftest import fit_flags, refused
from tiny import tiny_folder, tiny_model
from torch import Tensor

from leap_pl.base_model.weights import find_weights
from leap_pl.checkpoints.layout import masks_from_checkpoint
from leap_pl.cli.main import main
from leap_pl.gates import Gates
from leap_pl.masks import MaskSet

pytestmark = pytest.mark.usefixtures("eager")


# -- the whole run ----------------------------------------------------------------------------------------

NM_FLAGS = ["--model.gate=NMGate", "--model.objective.budget=0"]


@pytest.fixture(scope="module")
def nm_folder(model_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 2:4 gates."""
    folder = tmp_path_factory.mktemp("nm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAP_PL_COMPILE", "0")
        main(fit_flags(model_folder, text_file, folder, *NM_FLAGS))
    return folder


def all_exact(masks: dict[str, Tensor], n: int, m: int) -> bool:
    return all(is_exact(mask, mask.ndim - 1, n, m) for mask in masks.values())


def test_fit_checkpoint_export_and_reading_back(nm_folder: Path, model_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    learned = MaskSet.load(nm_folder / "checkpoints" / "mask.safetensors")
    prior = MaskSet.load(nm_folder / "checkpoints" / "prior.safetensors")
    assert (learned.provenance.method, learned.provenance.sparsity) == ("maskllm", 0.5)
    assert learned.provenance.config["gate"]["init_args"]["m"] == 4
    assert prior.provenance.config["pattern"] == "2:4"
    assert all_exact(learned.masks, 2, 4)
    assert all_exact(prior.masks, 2, 4)
    changed = sum(int((learned.masks[name] != prior.masks[name]).sum()) for name in prior.masks) / prior.total
    assert 0 < changed < 0.5
    checkpoint = nm_folder / "checkpoints" / "last.ckpt"
    again = masks_from_checkpoint(checkpoint)
    assert all(torch.equal(again.masks[name], mask) for name, mask in learned.masks.items())
    facts = main(["export", f"--ckpt_path={checkpoint}", f"--output_dir={tmp_path / 'model'}"])
    assert facts["removed"] * 2 == facts["gated"]
    assert "a 2:4 sparsity of 0.500000: of every 4 cons" in (tmp_path / "model" / "README.md").read_text()
    weights = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "model").named_parameters())
    assert all_exact({name: weights[name] != 0 for name in learned.masks}, 2, 4)


def test_a_mask_that_is_not_what_it_says_is_neither_exported_nor_measured(
    nm_folder: Path, text_file: Path, tmp_path: Path, capsys
) -> None:
    mask = MaskSet.load(nm_folder / "checkpoints" / "mask.safetensors")
    masks = dict(mask.masks)
    name = next(iter(masks))
    masks[name][0, :4] = True
    MaskSet(masks, mask.provenance).save(tmp_path / "wrong.safetensors")
    flags = ["export", f"--mask={tmp_path / 'wrong.safetensors'}", f"--output_dir={tmp_path / 'model'}"]
    assert f"the mask is recorded as 2:4, and {name} is not" in refused(flags, capsys)
    evaluate = ["evaluate", flags[1], f"--perplexity={text_file}"]
    assert f"the mask is recorded as 2:4, and {name} is not" in refused(evaluate, capsys)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("stop", [2, 4])
def test_resumed_run_ends_bit_identical(nm_folder: Path, model_folder, text_file, tmp_path: Path, stop: int) -> None:
    earlier = nm_folder / "checkpoints" / f"step={stop}.ckpt"
    main(fit_flags(model_folder, text_file, tmp_path, *NM_FLAGS, f"--ckpt_path={earlier}"))
    assert not (tmp_path / "checkpoints" / f"step={stop}.ckpt").exists()  # not from the start
    one, other = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (nm_folder, tmp_path)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_logged_curves_are_those_of_the_mask(nm_folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(nm_folder / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"patterns/confidence", "mask/changed_from_prior", "density/soft", "weights_by_layer/hard/000"} <= tags
    assert "density/logits_above_0" not in tags
    assert events.Scalars("density/soft")[-1].value == 0.5
    assert events.Scalars("weights_by_layer/hard/000")[-1].value == 0.5
    assert 1 / 6 < events.Scalars("patterns/confidence")[-1].value <= 1
    assert events.Scalars("loss/budget")[-1].value == pytest.approx(0, abs=1e-6)


def test_widths_that_m_does_not_divide(text_file: Path, tmp_path: Path) -> None:
    """3:5 on inputs of 32 and 48: short groups of 2 and 3, exported right."""
    from transformers import AutoModelForCausalLM

    folder = tiny_folder(tmp_path / "m")
    more = ["--model.gate=NMGate", "--model.gate.n=3", "--model.gate.m=5", "--model.sparsity=0.4"]
    main(fit_flags(folder, text_file, tmp_path, *more, "--trainer.max_steps=2"))
    main(["export", f"--ckpt_path={tmp_path / 'checkpoints' / 'last.ckpt'}", f"--output_dir={tmp_path / 'model'}"])
    weights = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "model").named_parameters())
    masks = MaskSet.load(tmp_path / "model" / "mask.safetensors").masks
    assert {mask.shape[1] % 5 for mask in masks.values()} == {2, 3}
    assert all_exact({name: weights[name] != 0 for name in masks}, 3, 5)


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_fit_and_export_where_weights_are_no_linears(family: str, text_file: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_folder(tmp_path / "m", family)
    main(fit_flags(folder, text_file, tmp_path, *NM_FLAGS, "--trainer.max_steps=2"))
    main(["export", f"--ckpt_path={tmp_path / 'checkpoints' / 'last.ckpt'}", f"--output_dir={tmp_path / 'model'}"])
    masks = MaskSet.load(tmp_path / "model" / "mask.safetensors").masks
    weights = find_weights(tiny_model(family))
    assert masks.keys() == weights.keys()
    exported = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "model").named_parameters())
    for name, mask in masks.items():
        assert not exported[name][~mask].any()
        assert exported[name][mask].ne(0).float().mean() > 0.99
    assert all(is_exact(mask, weights[name].input_dim, 2, 4) for name, mask in masks.items())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model.gate.n=4", "--model.gate.m=4"], "pattern 4:4 is invalid"),
        (["--model.gate.n=0", "--model.gate.m=4"], "model.gate.n is 0; give 1 or more"),
        (["--model.gate.n=1", "--model.gate.m=4"], "Set --model.sparsity 0.75"),
        (["--model.sparsity=0.6"], "2:4 gates remove 0.5"),
        (["--model.gate.spread=0"], "model.gate.spread is 0; give a number above 0"),
    ],
)
def test_nonsense_is_refused_in_one_line(model_folder, text_file, tmp_path: Path, capsys, flags, words: str) -> None:
    error = refused(fit_flags(model_folder, text_file, tmp_path, "--model.gate=NMGate", *flags), capsys)
    assert words in error
    assert not [*tmp_path.rglob("*.ckpt"), *tmp_path.rglob("*.safetensors")]


def test_a_checkpoint_of_other_gates_is_refused(nm_folder: Path, model_folder, text_file, tmp_path, capsys) -> None:
    checkpoint = nm_folder / "checkpoints" / "last.ckpt"
    flags = fit_flags(model_folder, text_file, tmp_path, f"--ckpt_path={checkpoint}")
    three = ["--model.gate=NMGate", "--model.gate.n=3", "--model.gate.m=4", "--model.sparsity=0.25"]
    assert "model.sparsity was 0.5 and is 0.25" in refused([*flags, *three], capsys)
    assert "model.gate was 'NMGate' and is 'BernoulliGate'" in refused([*flags, "--model.gate=BernoulliGate"], capsys)


def test_general_sampling_agrees(nm_folder: Path) -> None:
    gate = nm_gate((20, 31))
    gate.start_from(None, seed=0)
    gates = Gates.of({"w": gate})
    general = Gates.sample_hard_masks(gates, 0.5, 7)
    assert torch.equal(general["w"], gates.sample_hard_masks(0.5, 7)["w"])
