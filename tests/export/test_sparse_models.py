"""A model that is sparse already, whoever pruned it: measured, fine-tuned, and its mask read off."""

import weakref
from pathlib import Path

import pytest
import torch
from conftest import refused
from random_masks import random_mask
from recovered_runs import FAST, Flags, exact_zeros, weights_in
from tiny import byte_tokenizer, tiny_folder, tiny_model

from leap_pl import MaskSet
from leap_pl.base_model.loading import load_model
from leap_pl.base_model.weights import find_weights
from leap_pl.cli.evaluate import evaluate_command
from leap_pl.cli.export import export_command
from leap_pl.cli.main import main
from leap_pl.export.method import decisive_settings
from leap_pl.export.sparse_model import masks_of
from leap_pl.masks import Provenance
from leap_pl.masks.bits import PackedMasks

pytestmark = pytest.mark.usefixtures("eager", "event_files_in_order")


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """A model with 40% zeros, and nothing that says why."""
    model, folder = tiny_model("llama"), tmp_path / "foreign"
    with torch.no_grad():
        for weight in find_weights(model).values():
            flat = weight.parameter.flatten()
            flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(1))[: int(0.4 * len(flat))]] = 0
            weight.parameter.copy_(flat.view_as(weight.parameter))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_it_is_not_measured_as_dense(sparse: Path, text_file: Path, model_folder: Path) -> None:
    settings = {"perplexity": str(text_file), "seq_length": 32, "max_tokens": 256}
    assert evaluate_command(model=str(sparse), **settings)["method"] == "unknown"
    assert evaluate_command(model=str(model_folder), **settings)["method"] == "dense"


def test_its_mask_is_read_off_and_stays(
    sparse: Path, text_file: Path, recover: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        word for word in recover(tmp_path / "run", *FAST) if not word.startswith(("--model.mask", "--model.base_model"))
    ]
    words += [f"--model.base_model={sparse}"]
    line = refused([*words, f"--model.mask={sparse}"], capsys)
    assert f"leap_pl export --model {sparse} --format mask --output_dir FOLDER" in line
    main(["export", f"--model={sparse}", "--format=mask", f"--output_dir={tmp_path / 'mask'}"])
    masks = MaskSet.load(tmp_path / "mask")
    assert masks.sparsity == pytest.approx(0.4, abs=0.01)
    model = tiny_model("llama")  # pruned lightly, more than quantisation does
    with torch.no_grad():
        for weight in find_weights(model).values():
            weight.parameter[:, ::5] = 0
    model.save_pretrained(tmp_path / "light")
    main(["export", f"--model={tmp_path / 'light'}", "--format=mask", f"--output_dir={tmp_path / 'light-mask'}"])
    assert MaskSet.load(tmp_path / "light-mask").sparsity == pytest.approx(0.2, abs=0.02)
    capsys.readouterr()
    main([*words, f"--model.mask={tmp_path / 'mask'}"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert "(base model " in last  # it is not dense
    assert "dense" not in last
    exact_zeros({name: tensor for name, tensor in weights_in(tmp_path / "run").items() if name in masks.masks}, masks)
    main(["export", f"--mask={tmp_path / 'run'}", f"--output_dir={tmp_path / 'model'}"])
    assert " of the base model, which is sparse." in (tmp_path / "model" / "README.md").read_text()


def test_every_text_that_weights_were_trained_on_is_named() -> None:
    """Trained on B under a mask made with A, and then, from those weights, on C."""

    def config(text: str, **more: object) -> dict[str, object]:
        return {"data": {"text": text}, **more}

    def mask(of: dict[str, object]) -> dict[str, object]:
        return {"method": "wanda", "config": of}

    first = config("a.jsonl")
    second = config("b.jsonl", train_weights={"kind": "kept"}, mask=mask(first))
    trained = {"kind": "kept", "start": "SPARSE"}
    third = config("c.jsonl", train_weights=trained, mask=mask(second))
    again = decisive_settings(Provenance("m", "f", "wanda", config=third))
    assert (again["text"], again["text that they were trained on before"]) == ("c.jsonl", "b.jsonl")
    assert again["text that the mask was made with"] == "a.jsonl"
    apart = config("c.jsonl", train_weights={"kind": "kept"}, mask=mask(second))  # from the base model's weights
    assert "text that they were trained on before" not in decisive_settings(Provenance("m", "f", "wanda", config=apart))


def test_masks_are_unpacked_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_folder(tmp_path / "base")
    random_mask(base, tmp_path / "mask.safetensors")
    export_command(str(tmp_path / "out"), mask=str(tmp_path / "mask.safetensors"))
    living: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()
    unpack, most = PackedMasks.__getitem__, []

    def counted(self: PackedMasks, name: str) -> torch.Tensor:
        mask = unpack(self, name)
        living[id(mask)] = mask
        most.append(len(living))
        return mask

    monkeypatch.setattr(PackedMasks, "__getitem__", counted)
    masks_of(str(tmp_path / "out"), load_model(str(tmp_path / "out")))
    assert len(most) > 14
    assert max(most) <= 2
