"""Priors: masks alone, and their cache."""

import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fit_flags
from tiny import tiny_model

from leap_pl.base_model.weights import find_weights
from leap_pl.cli.main import main
from leap_pl.errors import UserError
from leap_pl.masks import MaskSet
from leap_pl.masks.patterns import NM, Unstructured
from leap_pl.oneshot.fisher import FisherOptions
from leap_pl.oneshot.methods import METHODS
from leap_pl.oneshot.options import SparseGPTOptions
from leap_pl.oneshot.prune import prune
from leap_pl.prior import Prior
from leap_pl.prior import cache as prior_module
from leap_pl.prior.cache import one_shot_prior
from leap_pl.prior.settings import Calibration


class Block:
    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens


class Stream:
    def __init__(self, seed: int, seq_length: int) -> None:
        self.seed, self.seq_length, self.read = seed, seq_length, 0

    def blocks(self) -> Iterator[Block]:
        g = torch.Generator().manual_seed(self.seed)
        while True:
            self.read += 1
            yield Block(torch.randint(0, 256, (self.seq_length,), generator=g).tolist())


class Data:
    """What the data module shows of itself to the prior."""

    def __init__(self, seed: int = 0, seq_length: int = 40) -> None:
        self.stream = Stream(seed, seq_length)


def make(cache_dir: Path | None, *, model: Any = None, data: Data | None = None, **changes: Any) -> Any:
    model = tiny_model() if model is None else model
    settings = {"method": "wanda", "sparsity": 0.6, "sequences": 5, **changes}
    method, sparsity = settings.pop("method"), settings.pop("sparsity")
    weights = settings.pop("weights", None) or find_weights(model)
    return one_shot_prior(
        model, weights, method, sparsity, base_model="tiny", data=data or Data(), cache_dir=cache_dir, **settings
    )


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparseswaps", "sparsegpt", "admm"])
def test_the_prior_leaves_the_model_bit_identical(method: str, tmp_path: Path) -> None:
    model = tiny_model("mixtral").to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mask = make(tmp_path, model=model, method=method)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    mask.check(model, find_weights(model))
    assert mask.provenance.base_model == "tiny"
    tokens = torch.tensor([b.tokens for b, _ in zip(Data().stream.blocks(), range(5), strict=False)])
    expected = prune(model, tokens, method=method, pattern=0.6, progress=False).masks
    assert all(torch.equal(mask.masks[name], expected.masks[name]) for name in expected.masks)


def with_norms(factor: float) -> Any:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.mul_(factor)
    return model


def test_the_cache_is_hit_and_tells_runs_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return prune(*args, **kwargs)

    monkeypatch.setattr(prior_module, "prune", counted)
    first = make(tmp_path)
    data = Data()
    again = make(tmp_path, data=data)
    assert len(calls) == 1
    assert data.stream.read == 5  # the sequences to calibrate on, by whose tokens the cache goes
    assert all(torch.equal(first.masks[name], again.masks[name]) for name in first.masks)
    model = tiny_model()
    for number, changes in enumerate(
        (
            {"sparsity": 0.5},
            {"sparsity": NM(2, 4)},
            {"method": "sparsegpt"},
            {"sequences": 4},
            {"data": Data(seed=1)},
            {"model": tiny_model(seed=1)},
            {"model": with_norms(1.5)},  # as recover --model.train_weights norms leaves the other weights
            {"model": tiny_model(rope_theta=5000.0)},
            {"model": model, "weights": find_weights(model, ignore=["re:.*mlp"])},
        ),
        start=2,
    ):
        make(tmp_path, **changes)
        assert len(calls) == number, changes
    assert len(list(tmp_path.iterdir())) == len(calls)


@pytest.mark.parametrize("damage", [b"", b"junk", None])
def test_a_damaged_cache_file_is_made_anew(
    damage: bytes | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = make(tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-7] if damage is None else damage)
    with caplog.at_level(logging.WARNING):
        again = make(tmp_path)
    assert "recomputed" in caplog.text
    assert all(torch.equal(first.masks[name], again.masks[name]) for name in first.masks)
    assert MaskSet.load(file).masks.keys() == first.masks.keys()


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        assert make(tmp_path / "file").masks
    assert "not cached" in caplog.text
    assert make(None).masks


def test_a_cache_that_may_not_be_searched_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    exists, folder = Path.exists, tmp_path / "of-root"

    def denied(path: Path, **options: bool) -> bool:
        if path.parent == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return exists(path, **options)

    monkeypatch.setattr(Path, "exists", denied)
    with caplog.at_level(logging.WARNING):
        masks = make(folder)
    (said,) = caplog.messages
    assert "not cached" in said
    assert masks.digest_of_bits() == make(None).digest_of_bits()
    weights = find_weights(model := tiny_model())
    assert prior_module._cached_squares(folder / "a.safetensors", "key", weights) is None
    assert prior_module._cached(folder / "a.safetensors", "key", model, weights) is None


def test_sequences_longer_than_the_model_are_refused() -> None:
    with pytest.raises(UserError, match="128 tokens"):
        make(None, data=Data(seq_length=200))


def test_fisher_allocation_has_a_cache_entry_of_its_own(tmp_path: Path) -> None:
    even, first = make(tmp_path), make(tmp_path, fisher=FisherOptions(0.5))
    assert len(list(tmp_path.iterdir())) == 2
    assert first.provenance.config["fisher"]["strength"] == 0.5
    data = Data()
    again = make(tmp_path, data=data, fisher=FisherOptions(0.5))
    assert data.stream.read == 5  # the sequences to calibrate on, by whose tokens the cache goes
    assert all(torch.equal(again.masks[name], mask) for name, mask in first.masks.items())
    assert any(not torch.equal(even.masks[name], mask) for name, mask in first.masks.items())
    make(tmp_path, fisher=FisherOptions(1.0))
    assert len(list(tmp_path.iterdir())) == 3


def test_magnitude_reads_text_for_fisher_allocation(tmp_path: Path) -> None:
    data = Data()
    make(tmp_path, method="magnitude", data=data, fisher=FisherOptions())
    assert data.stream.read == 5


def test_a_prior_of_another_dtype_is_not_taken(tmp_path: Path) -> None:
    """The fingerprint is the same in every dtype, and what a method computes is not."""
    half = make(tmp_path, model=tiny_model().to(torch.bfloat16))
    full = make(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert half.digest_of_bits() == make(None, model=tiny_model().to(torch.bfloat16)).digest_of_bits()
    assert full.digest_of_bits() == make(None).digest_of_bits()


def test_a_mask_of_another_slot_is_not_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another valid mask of the same model, copied or renamed into the slot; or one that is of no slot."""
    first, other = make(tmp_path), make(tmp_path, sparsity=0.3)
    slot, strange = sorted(tmp_path.iterdir(), key=lambda file: abs(MaskSet.load(file).sparsity - 0.6))
    for bring in (lambda: slot.write_bytes(strange.read_bytes()), lambda: other.save(slot), lambda: first.save(slot)):
        bring()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            again = make(tmp_path)
        (said,) = caplog.messages
        assert "recomputed" in said
        assert "\n" not in said
        assert again.digest_of_bits() == first.digest_of_bits()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            make(tmp_path)
        assert not caplog.messages


def test_a_mask_from_the_cache_is_the_one_that_was_made_with_its_provenance(tmp_path: Path) -> None:
    made, read, uncached = make(tmp_path / "cache"), make(tmp_path / "cache"), make(None)
    files = [mask.save(tmp_path / f"{name}.safetensors") for name, mask in enumerate((made, read, uncached))]
    assert len({file.read_bytes() for file in files}) == 1


def test_a_mask_from_the_cache_is_of_the_model_as_it_is_named_now(tmp_path: Path) -> None:
    """The folder of an earlier run may be gone."""
    model, named = tiny_model(), [("here", None), ("there", "v1")]
    for name, revision in named:
        mask = one_shot_prior(
            model,
            find_weights(model),
            "magnitude",
            0.5,
            base_model=name,
            revision=revision,
            data=None,
            cache_dir=tmp_path,
        )
        assert (mask.provenance.base_model, mask.provenance.revision) == (name, revision)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("batch", "seq_length", "together"), [(None, 512, 1), (2, 512, 2), (8, 512, 4), (4, 2048, 2), (4, 8192, 1)]
)
def test_a_batch_of_the_whole_model_holds_few_tokens(batch: int | None, seq_length: int, together: int) -> None:
    data: Any = Data()
    if batch is not None:
        data.batch_size = batch
    assert prior_module._fisher_batch(data, torch.zeros(16, seq_length)) == together


@pytest.mark.usefixtures("eager")
def test_a_run_without_a_cache_resumes_and_makes_its_prior_again(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here))
    asked = ["--model.prior.method=wanda", "--model.prior.sequences=2", "--model.prior.cache_dir=null"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    main(fit_flags(model_folder, text_file, whole, *asked))
    alone = tmp_path / "step=2.ckpt"  # without the prior beside it
    shutil.copy(whole / "checkpoints" / alone.name, alone)
    main(fit_flags(model_folder, text_file, resumed, *asked, f"--ckpt_path={alone}"))
    for name in ("prior.safetensors", "mask.safetensors"):
        one, other = (MaskSet.load(folder / "checkpoints" / name) for folder in (whole, resumed))
        assert one.digest_of_bits() == other.digest_of_bits()
    assert list(here.iterdir()) == []  # null is no folder's name


@pytest.mark.parametrize("sequences", [2, 3])
def test_the_settings_of_a_prior_are_what_it_is_made_with(sequences: int, tmp_path: Path) -> None:
    """Its Fisher strength, and as many blocks of the stream as it names."""
    model, data = tiny_model(), Data()
    settings = Prior(method="wanda", fisher=0.9, sequences=sequences, cache_dir=str(tmp_path))
    calibration = Calibration("tiny", data, torch.device("cpu"), progress=False)  # type: ignore[arg-type]
    made = settings.make(model, find_weights(model), {"prior": Unstructured(0.6)}, calibration)["prior"]
    assert made.provenance.config["fisher"]["strength"] == 0.9
    assert data.stream.read == sequences
    assert made.sparsity == pytest.approx(0.6, abs=1e-3)
    data.stream.read = 0
    replace(settings, graded=True).squares(model, find_weights(model), calibration)
    assert data.stream.read == sequences


def test_the_same_tokens_in_other_blocks_are_another_prior(tmp_path: Path) -> None:
    """What a token attends to is another context."""
    numbers = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(0))

    def data(length: int) -> Any:
        found: Any = Data()
        found.stream.seq_length = length
        found.stream.blocks = lambda: (Block(part.tolist()) for part in numbers.split(length))
        return found

    make(tmp_path, data=data(40), sequences=5)
    make(tmp_path, data=data(20), sequences=10)
    assert len(list(tmp_path.iterdir())) == 2


def test_masks_of_an_earlier_algorithm_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path)
    make(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(prior_module, "ALGORITHM", prior_module.ALGORITHM + 1)
    make(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_prior_says_what_it_is_made_of(tmp_path: Path) -> None:
    """The model's revision, and the text where one is read, also where the masks are in the cache."""
    model, text = tiny_model(), {"text": "t.jsonl", "validation_text": "v.jsonl", "seed": 3}
    calibration = Calibration("tiny", Data(), torch.device("cpu"), progress=False, revision="r", record=text)  # type: ignore[arg-type]
    for method, read in (("wanda", text), ("wanda", text), ("magnitude", {})):
        settings = Prior(method=method, sequences=2, cache_dir=str(tmp_path))
        made = settings.make(model, find_weights(model), {"prior": Unstructured(0.6)}, calibration)["prior"]
        assert made.provenance.revision == "r"
        assert {key: made.provenance.config.get(key) for key in text} == {**dict.fromkeys(text), **read}
        assert made.provenance.config["pattern"]
    assert replace(settings, graded=True).squares(model, find_weights(model), calibration)


def test_of_two_masks_the_free_one_alone_has_an_allocation() -> None:
    """As of a tile gate: a mask of n:m is equally sparse everywhere."""
    model = tiny_model()
    weights, prior = find_weights(model), Prior(method="wanda", fisher=0.5, sequences=2, cache_dir=None)
    calibration = Calibration("tiny", Data(), torch.device("cpu"), progress=False)  # type: ignore[arg-type]
    made = prior.make(model, weights, {"prior": Unstructured(0.3), "inner": NM(2, 4)}, calibration)
    assert ["fisher" in made[form].provenance.config for form in ("prior", "inner")] == [True, False]
    assert made["inner"].sparsity == 0.5
    shares = {round(1 - float(mask.float().mean()), 2) for mask in made["prior"].masks.values()}
    assert len(shares) > 1


def test_other_defaults_of_a_method_are_another_prior(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a later version of leap_pl."""

    @dataclass(frozen=True)
    class Other(SparseGPTOptions):
        damping: float = 0.7

    make(tmp_path, method="sparsegpt")
    monkeypatch.setitem(METHODS, "sparsegpt", replace(METHODS["sparsegpt"], settings=Other))
    make(tmp_path, method="sparsegpt")
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
