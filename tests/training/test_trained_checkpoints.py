"""Whatever a run trains, and in which data type: its checkpoint and its mask with weights are one exported model."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fit_flags
from recovered_runs import FAST, Flags, weights_in
from safetensors.torch import load_file
from tiny import byte_tokenizer, tiny_model

from leap_pl.checkpoints import layout
from leap_pl.cli.evaluate import evaluate_command
from leap_pl.cli.export import export_command
from leap_pl.cli.main import main
from leap_pl.cli.prune import prune_command
from leap_pl.evaluation.subject import load_subject
from leap_pl.masks import MaskSet

pytestmark = pytest.mark.usefixtures("eager", "event_files_in_order")

LORA = ["--model.train_weights=lora", "--model.weight_training.r=2"]
TRAINED = {
    "kept": ["--model.train_weights=kept"],
    "embeddings": ["--model.train_weights=kept", "--model.weight_training.embeddings=true"],
    "norms": ["--model.train_weights=norms"],
    "lora": LORA,
    "lora of some": [*LORA, "--model.weight_training.target_modules=[q_proj,down_proj]"],
    "low memory": ["--model.train_weights=kept", "--model.logits_dtype=bfloat16", "--model.optimizer=PackedAdamW"],
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("learned", [False, True], ids=["mask-fixed", "mask-learned"])
@pytest.mark.parametrize("kind", TRAINED)
def test_a_checkpoint_is_its_mask_and_weights(
    kind: str, learned: bool, dtype: str, recover: Flags, model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    more = [*FAST, *TRAINED[kind], f"--model.dtype={dtype}"]
    words = fit_flags(model_folder, text_file, tmp_path, *more) if learned else recover(tmp_path, *more)
    main(words)
    folder, base = tmp_path / "checkpoints", load_file(model_folder / "model.safetensors")
    export_command(str(tmp_path / "mask"), mask=str(folder / "mask.safetensors"))
    export_command(str(tmp_path / "checkpoint"), ckpt_path=str(folder / "last.ckpt"))
    found, other = (load_file(tmp_path / name / "model.safetensors") for name in ("mask", "checkpoint"))
    assert found.keys() == other.keys() == base.keys()
    assert all(torch.equal(found[name], other[name]) for name in found)
    masks, weights = MaskSet.load(folder / "mask.safetensors").masks, weights_in(tmp_path)
    assert weights
    for name, weight in weights.items():
        assert weight.dtype == getattr(torch, dtype)
        assert torch.equal(found[name], weight.to(found[name].dtype))
        assert not torch.equal(weight, base[name].to(weight.dtype) * masks.get(name, 1))
    for name, mask in masks.items():
        assert not found[name][~mask].any()
        assert name in weights or torch.equal(found[name], base[name] * mask)
    of = {"perplexity": str(text_file), "seq_length": 32, "max_tokens": 256, "dtype": dtype}
    measured = [
        evaluate_command(**named, **of)["perplexity"][str(text_file)]["value"]
        for named in ({"model": str(tmp_path / "mask")}, {"ckpt_path": str(folder / "last.ckpt")})
    ]
    assert measured[0] == pytest.approx(measured[1], rel=1e-6 if dtype == "float32" else 1e-2)


def test_a_link_that_moves_meanwhile_is_read_once(
    recovered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on points last.ckpt to its newest checkpoint: mask and weights are of the same one."""
    folder = shutil.copytree(recovered, tmp_path / "run", symlinks=True) / "checkpoints"
    last, read = folder / "last.ckpt", layout.masks_from_checkpoint
    assert last.readlink() == Path("step=4.ckpt")

    def point_to(step: str) -> None:
        last.unlink()
        last.symlink_to(step)

    def read_slowly(path: str) -> MaskSet:
        masks = read(path)
        point_to("step=4.ckpt")
        return masks

    monkeypatch.setattr(layout, "masks_from_checkpoint", read_slowly)
    point_to("step=2.ckpt")
    export_command(str(tmp_path / "of-link"), ckpt_path=str(last))
    point_to("step=2.ckpt")
    measured = load_subject(ckpt_path=str(last)).model
    export_command(str(tmp_path / "of-step"), ckpt_path=str(folder / "step=2.ckpt"))
    expected = load_file(tmp_path / "of-step" / "model.safetensors")
    later = load_file(folder / "weights.safetensors")
    assert any(not torch.equal(expected[name], tensor) for name, tensor in later.items())
    for name, tensor in load_file(tmp_path / "of-link" / "model.safetensors").items():
        assert torch.equal(tensor, expected[name])
        assert torch.equal(measured.get_parameter(name), tensor)


def test_card_says_that_weights_were_measured_before_they_were_rounded(text_file: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_model("llama").bfloat16().save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    mixed = ["--trainer.precision=bf16-mixed"]
    main(fit_flags(base, text_file, tmp_path, *FAST, *mixed, "--model.train_weights=kept", "--model.dtype=float32"))
    export_command(str(tmp_path / "out"), ckpt_path=str(tmp_path / "checkpoints" / "last.ckpt"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Measured with float32 weights and precision bf16-mixed, before the weights were rounded" in card
    for dtype, rounded in (("float32", True), ("bfloat16", False)):
        folder = tmp_path / dtype
        main(fit_flags(base, text_file, folder, *FAST, "--model.train_weights=kept", f"--model.dtype={dtype}"))
        export_command(str(folder / "out"), ckpt_path=str(folder / "checkpoints" / "last.ckpt"))
        again = folder / "packed"  # of what was exported: its record hands the fact on
        export_command(str(again), model=str(folder / "out"), format="packed")
        for card in (folder / "out" / "README.md", again / "README.md"):
            said = "Measured in float32, before the weights were rounded to the base model's type."
            assert (said in card.read_text()) == rounded
        assert {tensor.dtype for tensor in load_file(folder / "out" / "model.safetensors").values()} == {torch.bfloat16}
    mask, exported = tmp_path / "float32" / "checkpoints" / "mask.safetensors", tmp_path / "float32" / "out"
    of_text: dict[str, Any] = {"perplexity": str(text_file), "seq_length": 16, "max_tokens": 64}
    evaluate_command(model=str(base), dtype="bfloat16", output=str(tmp_path / "dense.json"), **of_text)
    rounded = "before the weights were rounded to the base model's type"
    for number, (settings, said) in enumerate(
        (
            ({"mask": mask, "dtype": "float32"}, f"float32, {rounded}, and the dense model in bfloat16"),
            ({"mask": mask, "dtype": "bfloat16"}, "bfloat16"),
            ({"model": exported, "dtype": "float32"}, "float32, and the dense model in bfloat16"),
        )
    ):
        given = {name: str(value) for name, value in settings.items()}
        evaluate_command(output=str(tmp_path / f"{number}.json"), **given, **of_text)  # type: ignore[arg-type]
        results = f"{tmp_path / f'{number}.json'},{tmp_path / 'dense.json'}"
        export_command(str(tmp_path / f"{number}"), mask=str(mask), perplexity=results)
        assert f"\n\nMeasured in {said}.\n\n" in (tmp_path / f"{number}" / "README.md").read_text()


def test_a_run_that_starts_from_other_weights_resumes_bit_for_bit(
    recover: Flags, model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """It begins with the checkpoint's weights, and asks for no others."""
    pruned = tmp_path / "pruned"
    prune_command(str(model_folder), str(pruned), method="admm", sequences=2, seq_length=32, text=str(text_file))
    words = [word for word in recover(tmp_path / "run") if not word.startswith("--model.mask")]
    main([*words, f"--model.mask={pruned}", f"--model.weights={pruned / 'model'}"])
    (pruned / "model" / "model.safetensors").unlink()
    step = tmp_path / "run" / "checkpoints" / "step=2.ckpt"
    again = recover(tmp_path / "again", f"--ckpt_path={step}")
    main([word for word in again if not word.startswith(("--model", "--data"))])
    ends = [tmp_path / run / "checkpoints" / "weights.safetensors" for run in ("run", "again")]
    assert ends[0].read_bytes() == ends[1].read_bytes()
