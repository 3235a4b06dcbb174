"""Trained weights on two ranks: what one process trains, and the same bits after a resume."""

from pathlib import Path

import pytest
from conftest import Run, fit_flags
from ranks import run_ranks
from safetensors.torch import load_file
from scaled_runs import BRIEF, ddp, sharded
from stopped_runs import curves
from tiny import tiny_folder

from leap_pl.checkpoints.folder import consolidated
from leap_pl.cli.export import export_command
from leap_pl.cli.main import main
from leap_pl.masks import MaskSet

# SGD, and a clip that bites: Adam would hide a gradient that is wrong by a factor.
SGD = ["--model.optimizer=SGD", "--model.optimizer.fused=false", "--model.optimizer.lr=0.05"]
SGD += ["--model.weight_training.lr=0.05", "--model.weight_training.warmup_steps=1", "--trainer.gradient_clip_val=0.2"]
SGD += ["--model.warmup_steps=1", "--model.objective.distillation=0.5"]
COMPACT, EMBEDDINGS = (f"--model.weight_training.{name}=true" for name in ("compact", "embeddings"))
RECOMPUTED = "--model.activation_checkpointing=true"  # as in the recipe fsdp2
# As the recipe ddp: gradients are there before a checkpoint's masters are, and are views of buckets.
BUCKETS = [*ddp(2)[:-1], "--trainer.strategy=DDPStrategy", "--trainer.strategy.gradient_as_bucket_view=true"]
LOW = ["--model.logits_dtype=bfloat16", "--model.optimizer=PackedAdamW", "--model.weight_training.lr=1e-2"]

# Run → strategies that it runs under, besides one process.
WAYS = {
    "kept": ("ddp", "sharded", "folder"),
    "both": ("ddp", "sharded"),
    "embeddings": ("ddp",),
    "lora": ("ddp", "sharded"),
    "norms": ("ddp", "sharded"),
    "compact": ("ddp",),
}


def fit_all(rank: int, runs: list[list[str]]) -> None:
    for words in runs:
        main(words)


def test_two_ranks(
    finished_run: Run, model_folder: Path, text_file: Path, tmp_path: Path, eager: None, event_files_in_order: None
) -> None:
    def flags(name: str, kind: str, *more: str) -> list[str]:
        more = (*BRIEF, "--checkpoint.every_n_train_steps=1", f"--model.train_weights={kind}", *more)
        words = fit_flags(model_folder, text_file, tmp_path / name, *more)
        if name.startswith("both"):
            return words
        words = [word for word in words if not word.startswith(("--model.prior.method", "--model.warmup_steps"))]
        return ["recover", *words[1:], f"--model.mask={finished_run.mask}"]

    def end(name: str) -> Path:
        return tmp_path / name / "checkpoints" / "weights.safetensors"

    before = [end(name).with_name("step=1.ckpt") for name in ("kept-folder", "low-folder", "compact-ddp")]
    runs = [
        flags("kept-ddp", "kept", *SGD, *ddp(2)),
        flags("kept-sharded", "kept", *SGD, *sharded(2)),
        flags("kept-folder", "kept", *SGD, RECOMPUTED, *sharded(2, folder=True)),
        flags("kept-resumed", "kept", *SGD, RECOMPUTED, *sharded(2, folder=True), f"--ckpt_path={before[0]}"),
        flags("both-ddp", "kept", *SGD, *ddp(2)),
        flags("both-sharded", "kept", *SGD, RECOMPUTED, *sharded(2)),
        flags("embeddings-ddp", "kept", EMBEDDINGS, *SGD, *ddp(2)),
        flags("lora-ddp", "lora", *SGD, *ddp(2)),
        flags("lora-sharded", "lora", *SGD, *sharded(2)),
        flags("norms-ddp", "norms", *SGD, *ddp(2)),
        flags("norms-sharded", "norms", *SGD, *sharded(2)),
        flags("compact-ddp", "kept", COMPACT, *SGD, *BUCKETS),
        flags("compact-resumed", "kept", COMPACT, *SGD, *BUCKETS, f"--ckpt_path={before[2]}"),
        flags("low-folder", "kept", *LOW, *sharded(2, folder=True)),
        flags("low-resumed", "kept", *LOW, *sharded(2, folder=True), f"--ckpt_path={before[1]}"),
    ]
    run_ranks(2, fit_all, runs, folder=tmp_path / "said", seconds=300)
    base = load_file(model_folder / "model.safetensors")
    for run, ways in WAYS.items():
        more = [*SGD, "--trainer.accumulate_grad_batches=4"]
        more += [COMPACT] * (run == "compact") + [EMBEDDINGS] * (run == "embeddings")
        main(flags(f"{run}-one", run if run in ("lora", "norms") else "kept", *more))
        drawn = curves(tmp_path / f"{run}-one" / "tensorboard")["moved/all"]
        one, mask = load_file(end(f"{run}-one")), MaskSet.load(end(f"{run}-one").with_name("mask.safetensors"))
        assert any(name.endswith("model.norm.weight") for name in one) == (run != "lora")  # it is in no block
        for way in ways:
            found = load_file(end(f"{run}-{way}"))
            assert found.keys() == one.keys()
            assert curves(tmp_path / f"{run}-{way}" / "tensorboard")["moved/all"] == pytest.approx(drawn, rel=0.02)
            assert MaskSet.load(end(f"{run}-{way}").with_name("mask.safetensors")).digest_of_bits() == (
                mask.digest_of_bits()
            )
            for name, weight in found.items():
                kept = mask.masks.get(name, base[name] == base[name])
                moved = (one[name] - base[name])[kept].norm()
                assert moved > 1e-6
                assert (weight - one[name]).norm() < 1e-4 * moved, (run, way, name)
    for run, way in (("kept", "folder"), ("low", "folder"), ("compact", "ddp")):
        assert end(f"{run}-{way}").read_bytes() == end(f"{run}-resumed").read_bytes()
        assert not end(f"{run}-resumed").with_name("step=1.ckpt").exists()  # not from the start
    assert load_file(end("low-folder"))["model.norm.weight"].ne(base["model.norm.weight"]).any()
    # A folder as one file, and exported from, is what the ranks wrote at their end.
    last = end("kept-folder").with_name("last.ckpt")
    assert any(key.startswith("trained.master.") for key in consolidated(last)["state_dict"])
    export_command(str(tmp_path / "model"), ckpt_path=str(last))
    model = load_file(tmp_path / "model" / "model.safetensors")
    for name, weight in load_file(end("kept-folder")).items():
        assert model[name].equal(weight)


@pytest.mark.parametrize("folder", [False, True])
def test_low_memory_resumes_where_ranks_have_unequal_parts_of_a_norm(
    text_file: Path, tmp_path: Path, eager: None, folder: bool
) -> None:
    """Of 33 elements one rank has 17, and of their 66 bytes 34: bytes that were cut in halves have 33 each."""
    model = tiny_folder(tmp_path / "odd", "qwen3", hidden_size=33)

    def flags(name: str, *more: str) -> list[str]:
        more = (*BRIEF, "--checkpoint.every_n_train_steps=1", "--model.train_weights=kept", *LOW, *more)
        return fit_flags(model, text_file, tmp_path / name, *more, *sharded(2, folder=folder))

    first, again = (tmp_path / name / "checkpoints" for name in ("run", "resumed"))
    runs = [flags("run"), flags("resumed", f"--ckpt_path={first / 'step=1.ckpt'}")]
    run_ranks(2, fit_all, runs, folder=tmp_path / "said", seconds=300)
    base, trained = load_file(model / "model.safetensors"), load_file(first / "weights.safetensors")
    assert trained["model.norm.weight"].ne(base["model.norm.weight"]).any()
    assert (first / "weights.safetensors").read_bytes() == (again / "weights.safetensors").read_bytes()
    masks = [MaskSet.load(each / "mask.safetensors") for each in (first, again)]
    assert masks[0].digest_of_bits() == masks[1].digest_of_bits()


@pytest.mark.parametrize("folder", [False, True])
def test_one_process_goes_on_with_the_moments_of_two_that_shared_the_model(
    text_file: Path, tmp_path: Path, eager: None, folder: bool
) -> None:
    """Sharded, the norms stand in another order, and those of queries and keys have another shape than the others."""
    model = tiny_folder(tmp_path / "model", "qwen3")
    momentum = [*SGD, "--model.optimizer.momentum=0.9"]

    def flags(name: str, *more: str) -> list[str]:
        more = (*BRIEF, "--checkpoint.every_n_train_steps=1", "--model.train_weights=kept", *momentum, *more)
        return fit_flags(model, text_file, tmp_path / name, *more)

    first, again = (tmp_path / name / "checkpoints" for name in ("run", "resumed"))
    run_ranks(2, fit_all, [flags("run", *sharded(2, folder=folder))], folder=tmp_path / "said", seconds=300)
    step = first / "step=1.ckpt"
    if folder:
        main(["consolidate", f"--ckpt_path={step}", f"--output={tmp_path / 'one.ckpt'}"])
        step = tmp_path / "one.ckpt"
    main(flags("resumed", "--trainer.accumulate_grad_batches=4", f"--ckpt_path={step}"))
    base = load_file(model / "model.safetensors")
    shared, alone = (load_file(each / "weights.safetensors") for each in (first, again))
    mask = MaskSet.load(first / "mask.safetensors")
    for name, weight in shared.items():
        kept = mask.masks.get(name, base[name] == base[name])
        moved = (weight - base[name])[kept].norm()
        assert moved > 1e-6
        assert ((alone[name] - weight)[kept]).norm() < 1e-4 * moved, name
