"""What one rank has no memory for, two learn; and all learn in one type."""

import os
from pathlib import Path

import pytest
from ranks import run_ranks
from scaled_runs import BRIEF, Place, ddp, sharded
from tiny import byte_tokenizer, tiny_model

from leap_pl.cli.main import main

pytestmark = pytest.mark.usefixtures("eager")


LIMIT = 360 << 20  # bytes, beyond what a process has that has imported everything


def within(rank: int, flags: list[str]) -> int:
    """Learn with no more than LIMIT bytes of memory, which the kernel sees to; the weights removed."""
    import ctypes
    import resource

    # M_MMAP_THRESHOLD: what is freed goes back to the system at once, for the limit is on what is needed; and by the
    # variable fit leaves it at that (leap_pl.callbacks.allocator).
    ctypes.CDLL(None).mallopt(-3, 1 << 16)
    os.environ["MALLOC_TRIM_THRESHOLD_"] = "131072"
    pages = int(Path("/proc/self/statm").read_text().split()[5])  # data and stack, which RLIMIT_DATA is about
    limit = pages * resource.getpagesize() + LIMIT
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    cli = main(flags)
    return cli.model.save_mask(Path(cli.trainer.default_root_dir) / f"{rank}.safetensors")[0]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """17 million gated weights in 16 blocks: 20 bytes each make 320 MiB, and in two halves 160."""
    folder = tmp_path_factory.mktemp("large")
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_key_value_heads": 4, "num_hidden_layers": 16}
    model = tiny_model("llama", **shape)
    model.save_pretrained(folder, max_shard_size="8MB")  # as large models are stored
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_model_too_large_for_one_rank_learns_on_two(large: Path, place: Place) -> None:
    more = ["--trainer.max_steps=1", "--trainer.accumulate_grad_batches=1", "--data.validation_sequences=0"]
    more += ["--checkpoint.save_top_k=0", "--checkpoint.save_last=false", "--model.activation_checkpointing=true"]
    more += ["--trainer.logger=false"]  # whose pictures take some MiB

    def flags(name: str, *strategy: str) -> list[str]:
        folder = place.root / name
        return place.flags(name, *more, f"--trainer.default_root_dir={folder}", *strategy, model=large)

    with pytest.raises(AssertionError, match=r"can't allocate memory|MemoryError"):
        run_ranks(1, within, flags("large-one"), folder=place.root / "large-one-rank")
    kept = run_ranks(2, within, flags("large-two", *sharded(2, folder=True)), folder=place.root / "large-two-ranks")
    mask = place.mask("large-two")
    assert kept == [mask.kept, mask.kept]
    assert mask.kept == mask.total // 2 > 8_000_000


def learn_with_types_that_differ(rank: int, words: list[str]) -> list[str]:
    """The type that this rank measured to be the faster, and the one that it learned in."""
    measured = ["bfloat16", "float32"][rank]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("leap_pl.training.gated_module.fast_dtype", lambda device: measured)
        cli = main(words)
    return [measured, str(cli.model.model.dtype)]


def test_all_ranks_learn_in_the_type_that_rank_zero_measured(place: Place) -> None:
    words = place.flags("types", *BRIEF, "--model.dtype=auto", *ddp(2))
    told = run_ranks(2, learn_with_types_that_differ, words, folder=place.root / "types-ranks")
    assert told == [["bfloat16", "torch.bfloat16"], ["float32", "torch.bfloat16"]]
