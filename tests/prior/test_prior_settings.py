"""Settings of priors: files by their forms and under a former name, other sparsities, and options in messages."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import failing, fit_flags
from test_oneshot_prior import Data
from tiny import byte_tokenizer, tiny_model, token_dependent_model

from leap_pl.base_model.weights import find_weights
from leap_pl.cli.main import main
from leap_pl.cli.prune import prune_command
from leap_pl.errors import UserError
from leap_pl.inputs.plain_values import read
from leap_pl.masks.patterns import Unstructured
from leap_pl.prior import Prior
from leap_pl.prior.settings import Calibration


def test_the_former_name_of_the_inner_mask_is_taken() -> None:
    former, now = {"inner_mask": "a.safetensors"}, {"masks": {"inner": "a.safetensors"}}
    assert Prior(**former) == Prior(**now) == Prior(**former, **now) == read(former, Prior, "x")  # type: ignore[arg-type]
    assert Prior(inner_mask=None) == Prior() == read({"inner_mask": None}, Prior, "x")
    assert "inner_mask" not in asdict(Prior(**former))  # type: ignore[arg-type]
    assert replace(Prior(**former), sequences=3).masks == now["masks"]  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"prior\.inner_mask is b and prior\.masks\.inner a.safetensors, and both are"):
        Prior(**now, inner_mask="b")


def test_masks_that_no_gate_asks_for_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Give the prior itself as prior\.mask"):
        Prior(masks={"prior": "a"})
    nothing: Any = None
    with pytest.raises(UserError, match=r"prior\.masks\.inner: these gates start from prior alone"):
        Prior(masks={"inner": "a"}).make(nothing, {}, {"prior": Unstructured(0.5)}, nothing)


def prior_of(folder: Path, model_folder: Path, **options: Any) -> str:
    prune_command(str(model_folder), str(folder / "prior"), method="magnitude", **options)
    return f"--model.prior.mask={folder / 'prior'}"


@pytest.mark.usefixtures("eager")
def test_a_prior_of_another_sparsity_or_form_is_told(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    words = [prior_of(tmp_path, model_folder, sparsity=0.75), "--model.prior.method=none"]
    with pytest.warns(
        UserWarning, match=r"removes 75\.0% of the weights, and the run is to remove 50\.0%: .*--sparsity 0\.5"
    ):
        main(fit_flags(model_folder, text_file, tmp_path / "a", *words))
    gate = ["--model.gate=NMGate", "--model.gate.n=2", "--model.gate.m=4"]
    with pytest.warns(UserWarning, match=r"is unstructured, and the run learns a mask of 2:4"):
        main(fit_flags(model_folder, text_file, tmp_path / "b", *words, *gate))


@pytest.mark.usefixtures("eager")
@pytest.mark.filterwarnings("error:the prior")
def test_a_prior_of_the_same_is_not(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    words = [prior_of(tmp_path, model_folder, sparsity=0.5), "--model.prior.method=none"]
    main(fit_flags(model_folder, text_file, tmp_path / "a", *words))


@pytest.mark.usefixtures("eager")
def test_a_prior_that_cannot_be_made_names_options_of_fit(text_file: Path, tmp_path: Path, capsys) -> None:
    """One-shot pruning names those of prune."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[0] = 3e38
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    words = ["--model.prior.method=wanda", "--model.prior.sequences=2"]
    message = failing(capsys, fit_flags(tmp_path / "model", text_file, tmp_path, *words))
    assert "Load the model in another --model.dtype" in message


def test_a_model_that_cannot_be_walked_has_a_prior_by_what_the_messages_say() -> None:
    """What is typed for the method leads to no other message of the same walk."""
    model = token_dependent_model()
    calibration = Calibration("tiny", Data(), torch.device("cpu"), progress=False)
    given: Any = (model, find_weights(model))
    forms = {"prior": Unstructured(0.5)}
    for graded, more in ((False, ""), (True, r" --model\.prior\.graded false")):
        prior = Prior(graded=graded, sequences=4, cache_dir=None)
        with pytest.raises(UserError, match=rf"block by block\. Give --model\.prior\.method magnitude{more}\.$"):
            prior.make(*given, forms, calibration)
    prior = Prior(method="magnitude", fisher=0.5, graded=True, sequences=4, cache_dir=None)
    assert prior.make(*given, forms, calibration)["prior"].sparsity == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(UserError, match=r"block by block\. Give --model\.prior\.graded false\.$"):
        prior.squares(*given, calibration)
