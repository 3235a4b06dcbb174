"""The real model and text, in a short form: a mask is learned, exported, evaluated."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from leap_pl.cli.main import main
from leap_pl.masks import MaskSet

ASSETS = Path(__file__).parents[2] / "assets"
MODEL, TEXT = ASSETS / "SmolLM2-135M-Instruct", ASSETS / "wikipedia"

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not (MODEL.is_dir() and TEXT.is_dir()), reason="needs `make assets`"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps of 512 tokens from a magnitude prior, whose mask breaks the model."""
    folder = tmp_path_factory.mktemp("real")
    main([
        "fit", f"--model.base_model={MODEL}", "--model.prior.method=magnitude", f"--model.prior.cache_dir={folder}",
        f"--data.text={TEXT / 'train.jsonl'}", f"--data.validation_text={TEXT / 'validation.jsonl'}",
        "--data.seq_length=256", "--data.batch_size=2", "--data.validation_sequences=4",
        "--model.annealing.alpha.start=100", "--model.annealing.tau.start=1", "--model.optimizer.init_args.lr=4e-3",
        "--trainer.accelerator=cpu", "--trainer.max_steps=8", "--trainer.val_check_interval=8",
        "--trainer.logger=TensorBoardLogger",
        f"--trainer.logger.save_dir={folder}", f"--checkpoint.dirpath={folder / 'checkpoints'}",
    ])  # fmt: skip
    return folder


def perplexity(output: Path, *flags: str) -> float:
    protocol = [f"--perplexity={TEXT / 'test.jsonl'}", "--seq_length=256", "--max_tokens=1024"]
    main(["evaluate", *flags, *protocol, f"--output={output}"])
    (result,) = json.loads(output.read_text())["perplexity"].values()
    return result["value"]


def test_learning_beats_the_prior_at_the_same_sparsity(run: Path) -> None:
    prior, learned = (run / "checkpoints" / f"{name}.safetensors" for name in ("prior", "mask"))
    for mask in (prior, learned):
        assert MaskSet.load(mask).kept == 53_084_160  # half of the 106,168,320 weights of the decoder blocks' linears
    dense = perplexity(run / "dense.json", f"--model={MODEL}")
    before, after = (perplexity(run / f"{m.stem}.json", f"--mask={m}") for m in (prior, learned))
    assert dense < after < 0.7 * before


def test_exported_checkpoint_is_an_ordinary_model(run: Path) -> None:
    folder = run / "sparse"
    main(["export", f"--mask={run / 'checkpoints' / 'mask.safetensors'}", f"--output_dir={folder}"])
    mask, base, sparse = MaskSet.load(folder / "mask.safetensors"), *(
        load_file(place / "model.safetensors") for place in (MODEL, folder)
    )  # fmt: skip
    for name, kept in mask.masks.items():
        assert torch.equal(sparse[name], torch.where(kept, base[name], torch.zeros((), dtype=base[name].dtype)))
    tokens = AutoTokenizer.from_pretrained(folder)("The capital of France is", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generate(**tokens, max_new_tokens=4, do_sample=False).shape[1] == tokens["input_ids"].shape[1] + 4


def test_wanda_prunes_the_real_model_to_exact_rows(run: Path) -> None:
    text = TEXT / "train.jsonl"
    later = r"--ignore=['re:model.layers.([4-9]|[12].)\..*']"
    calibration = [f"--text={text}", "--seq_length=128", "--sequences=2"]
    output = f"--output_dir={run / 'wanda'}"
    main(["prune", f"--model={MODEL}", *calibration, "--method=wanda", "--sparsity=0.6", later, output])
    mask = MaskSet.load(run / "wanda" / "mask.safetensors")
    assert len(mask.masks) == 4 * 7
    for kept in mask.masks.values():
        assert (kept.sum(1) == kept.shape[1] - round(0.6 * kept.shape[1])).all()
