"""Many ranks learn what one learns: real processes, gloo, a tiny model.

The runs of two ranks are made by one pair of processes, those of four by one set of four; the tests look at
what they left, and compare it with one process that accumulates as many micro-batches.
"""

import io
import os
import pickle
import re
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hostile_files import Trap
from lightning import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from rank_programs import ALL_TERMS, CLIP, SGD, failure, four_ranks, two_ranks
from ranks import run_ranks
from scaled_runs import BRIEF, Place, learn, sharded
from tiny import tiny_model
from torch import Tensor

from leap_pl import LeapModule, TextDataModule
from leap_pl.checkpoints import folder as folder_reader
from leap_pl.checkpoints.file import WholeCheckpointIO
from leap_pl.checkpoints.folder import StoredTensors, _check_on_ranks, check_folder, consolidated, state_keys
from leap_pl.checkpoints.layout import masks_from_checkpoint, path_of
from leap_pl.checkpoints.newest import newest_checkpoint
from leap_pl.cli.compare import compare_command
from leap_pl.cli.export import export_command
from leap_pl.cli.main import main
from leap_pl.distributed.strategy import sharding_mesh
from leap_pl.errors import UserError
from leap_pl.masks import MaskSet
from leap_pl.oneshot.prune import prune
from leap_pl.prior import Prior

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture(scope="module")
def one(place: Place) -> dict[str, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAP_PL_COMPILE", "0")
        return place.one("one")


@pytest.fixture(scope="module")
def two(place: Place, one: dict[str, Tensor]) -> list[dict[str, Any]]:
    return run_ranks(2, two_ranks, place, folder=place.root / "two")


@pytest.fixture(scope="module")
def four(place: Place, two: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return run_ranks(4, four_ranks, place, folder=place.root / "four-ranks")


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To the rounding of a sum in another order: the logits are about 0.04, and moved by 0.001 a step."""
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-7, msg=name)


def assert_resumed(place: Place, name: str) -> None:
    """A run from the start would end in the same bits, but write the checkpoint that this one began with."""
    assert place.checkpoint(name, "step=4.ckpt").exists()
    assert not place.checkpoint(name, "step=2.ckpt").exists()


@pytest.mark.parametrize("name", ["ddp", "sharded", "folder"])
def test_two_ranks_learn_what_one_learns(two, one, place: Place, name: str) -> None:
    for rank in two:
        assert_same(rank[name]["logits"], one)
    learned, expected = place.mask(name), place.mask("one")
    assert all(torch.equal(learned.masks[weight], expected.masks[weight]) for weight in expected.masks)
    assert learned.total - learned.kept == learned.total // 2


def test_four_ranks_learn_what_one_learns(four, one) -> None:
    for rank in four:
        assert_same(rank["four"]["logits"], one)


@pytest.mark.parametrize("name", ["ddp-sgd", "sharded-sgd"])
def test_every_term_and_the_clipping_are_of_the_whole_batch(two, place: Place, name: str) -> None:
    expected = place.one("one-sgd", "--force", *SGD, *CLIP, *BRIEF, *ALL_TERMS)
    assert_same(two[0][name]["logits"], expected)
    unclipped = place.one("one-unclipped", "--force", *SGD, *BRIEF, *ALL_TERMS)
    assert any(float((unclipped[name] - expected[name]).abs().max()) > 1e-4 for name in expected)


def test_shards_of_unequal_and_of_no_size(two, four, place: Place) -> None:
    expected = place.one("one-mixtral", *SGD, *CLIP, *BRIEF, model=place.mixtral)
    assert_same(two[0]["sharded-mixtral"]["logits"], expected)
    assert_same(four[3]["four-mixtral"]["logits"], expected)


def test_a_rank_holds_its_share(two, four) -> None:
    """Of weights and logits in the blocks; embeddings, head and norms stay whole."""
    everything = two[0]["ddp"]["held"]
    assert two[1]["ddp"]["held"] == everything
    gated = sum(logits.numel() for logits in two[0]["ddp"]["logits"].values())
    in_blocks = 2 * gated + 4 * 32  # the norms
    assert [rank["sharded"]["held"] for rank in two] == [everything - in_blocks // 2] * 2
    assert [rank["four"]["held"] for rank in four] == [everything - 3 * in_blocks // 4] * 4
    assert [rank["ddp"]["optimized"] for rank in two] == [2 * gated] * 2
    assert [rank["sharded"]["optimized"] for rank in two] == [gated] * 2
    assert [rank["four"]["optimized"] for rank in four] == [gated // 2] * 4


def test_ddp_reduces_logits_alone(two) -> None:
    assert two[0]["ddp"]["reduced"] == [path_of(name) for name in two[0]["ddp"]["logits"]]


def test_ddp_holds_the_gradients_once(two) -> None:
    """In its buckets, also those of micro-batches that are not reduced."""
    assert [max(rank["buckets"]) for rank in two] == [2, 2]


def test_other_strategies_are_refused() -> None:
    assert sharding_mesh(None) is None
    with pytest.raises(UserError, match=r"FSDPStrategy does not work with gates\. Use --trainer\.strategy ddp"):
        sharding_mesh(SimpleNamespace(strategy=FSDPStrategy()))
    for kind in (DeepSpeedStrategy, XLAStrategy):  # to Lightning, kinds of DDP; their packages are not installed
        with pytest.raises(UserError, match=rf"{kind.__name__} does not work with gates\."):
            sharding_mesh(SimpleNamespace(strategy=kind.__new__(kind)))


def test_a_walk_that_changes_nothing_puts_the_tensors_back() -> None:
    """The very ones: weights that are mapped from files are not copied."""
    model = tiny_model()
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    tokens_NT = torch.randint(0, 256, (2, 16))
    pruned = prune(model, tokens_NT, method="wanda", pattern=0.5, update=False, progress=False)
    assert pruned.masks.kept == pruned.masks.total // 2
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before


def test_validation_is_of_all_ranks(two, four, place: Place) -> None:
    expected = learn(place.flags("one-again", "--trainer.accumulate_grad_batches=4"))["metrics"]
    for found in (*(rank[name] for rank in two for name in ("ddp", "sharded")), *(rank["four"] for rank in four)):
        for name in ("perplexity/hard", "perplexity/dense"):
            assert found["metrics"][name] == pytest.approx(expected[name], rel=1e-5)


def test_the_prior_is_made_on_rank_zero(two, place: Place) -> None:
    assert [rank["ddp-sgd"]["prior"] for rank in two] == [True, False]
    place.one("one-prior", *BRIEF, *ALL_TERMS)
    for name in ("ddp-sgd", "sharded-sgd"):
        masks = [place.mask(run, "prior").masks for run in (name, "one-prior")]
        assert all(torch.equal(masks[0][weight], masks[1][weight]) for weight in masks[1])


@pytest.mark.parametrize("name", ["sharded-bf16", "sharded-mixed"])
def test_sharded_logits_stay_float32(two, place: Place, name: str) -> None:
    precision = {"sharded-bf16": "bf16-true", "sharded-mixed": "bf16-mixed"}[name]
    expected = place.one(f"one-{precision}", *BRIEF, f"--trainer.precision={precision}")
    for weight, logits in two[0][name]["logits"].items():
        assert logits.dtype == torch.float32
        # Adam's first steps are the sign of a gradient that is rounded to bfloat16.
        assert float(((logits - expected[weight]).abs() > 1e-4).float().mean()) < 0.02
    assert any(not torch.equal(x, x.bfloat16().float()) for x in two[0][name]["logits"].values())
    expected = tiny_model().model.rotary_emb.inv_freq
    assert not torch.equal(expected, expected.bfloat16().float())
    assert torch.equal(two[0][name]["frequencies"].float(), expected)


def test_top_k_of_shards_is_that_of_the_whole(two, four) -> None:
    assert all(all(rank["top-k"]) for rank in (*two, *four))


# -- checkpoints ------------------------------------------------------------------------------------------


def test_one_file_format(two, one, place: Place) -> None:
    ours, theirs = (torch.load(place.checkpoint(name), weights_only=True) for name in ("one", "sharded"))
    assert theirs.keys() == ours.keys()
    assert list(theirs["state_dict"]) == list(ours["state_dict"])
    (ours,), (theirs,) = ours["optimizer_states"], theirs["optimizer_states"]
    assert theirs["param_groups"] == ours["param_groups"]
    assert_same(
        {name: state["exp_avg"] for name, state in theirs["state"].items()},
        {name: state["exp_avg"] for name, state in ours["state"].items()},
    )


@pytest.mark.parametrize("name", ["of-folder", "of-one", "ddp-of-sharded"])
def test_two_ranks_go_on(two, one, place: Place, name: str) -> None:
    """From step 2: of a folder, of one process's file, and without shards of a sharded run's."""
    assert_resumed(place, name)
    assert_same(two[1][name]["logits"], one)


def test_resume_on_the_same_ranks_is_exact(two) -> None:
    expected = two[0]["folder"]["logits"]
    assert all(torch.equal(logits, expected[name]) for name, logits in two[0]["of-folder"]["logits"].items())
    figures = two[0]["folder"]["figures"]
    assert figures.keys() == {"hard", "dense", "prior"}
    assert two[0]["of-folder"]["figures"] == figures


def test_python_reads_a_folder_and_one_device_does_not_go_on_from_it(two, place: Place, tmp_path: Path) -> None:
    folder = place.checkpoint("folder")
    module = LeapModule.load_from_checkpoint(folder)
    for name, logits in two[0]["folder"]["logits"].items():
        assert torch.equal(module.gates[name].logits, logits)
    (row,) = compare_command([str(folder)], output_dir=str(tmp_path / "compared"))["table"]
    assert row["sparsity"] == pytest.approx(0.5)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=4,
        accumulate_grad_batches=4,
        default_root_dir=tmp_path,
        plugins=[WholeCheckpointIO()],
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False),
    )
    again = LeapModule(str(place.llama), prior=Prior(method="none"), dtype="float32")
    data = TextDataModule(text=str(place.text), seq_length=32, validation_sequences=0)
    with pytest.raises(UserError, match=r"is a distributed checkpoint.*leap_pl consolidate --ckpt_path .*last\.ckpt"):
        trainer.fit(again, data, ckpt_path=folder)


def test_four_ranks_go_on_where_two_stopped(four, one, place: Place) -> None:
    assert_resumed(place, "four-of-folder")
    assert_same(four[2]["four-of-folder"]["logits"], one)


def test_one_process_goes_on_where_two_stopped(two, one, place: Place, tmp_path: Path) -> None:
    found = place.one("one-of-sharded", f"--ckpt_path={place.checkpoint('sharded', 'step=2.ckpt')}")
    assert_resumed(place, "one-of-sharded")
    assert_same(found, one)
    from leap_pl.cli.consolidate import consolidate_command

    file = tmp_path / "one.ckpt"
    consolidate_command(str(place.checkpoint("folder", "step=2.ckpt")), str(file))
    assert_same(place.one("one-of-folder", f"--ckpt_path={file}"), one)
    assert_resumed(place, "one-of-folder")


def test_a_folder_is_exported(two, place: Place, tmp_path: Path) -> None:
    facts = export_command(str(tmp_path / "sparse"), ckpt_path=str(place.checkpoint("folder")))
    assert facts["sparsity"] == 0.5
    exported, learned = MaskSet.load(tmp_path / "sparse" / "mask.safetensors"), place.mask("folder")
    assert all(torch.equal(exported.masks[name], learned.masks[name]) for name in learned.masks)


def test_a_folder_is_exported_weight_by_weight(two, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its tensors there are never more in memory than the one at hand and the one before it."""
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    read = StoredTensors.read

    def counted(self: StoredTensors, key: str) -> Tensor:
        nonlocal most
        tensor = read(self, key)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(reference() is not None for reference in alive))
        return tensor

    monkeypatch.setattr(StoredTensors, "read", counted)
    masks = masks_from_checkpoint(place.checkpoint("folder"))
    learned = place.mask("folder")
    assert all(torch.equal(mask, learned.masks[name]) for name, mask in masks.masks.items())
    assert 4 * len(learned.masks) <= len(alive) <= 5 * len(learned.masks)  # read no oftener than is said
    assert most <= 2


def test_a_damaged_part_is_told_where_it_is_read(two, place: Place, tmp_path: Path) -> None:
    folder = shutil.copytree(place.checkpoint("folder"), tmp_path / "last.ckpt")
    part = next(folder.glob("__1_*.distcp"))
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(UserError, match="incomplete or damaged"):
        masks_from_checkpoint(folder)
    index = pickle.loads((folder / ".metadata").read_bytes())
    index.planner_data = None
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    for reader in (masks_from_checkpoint, check_folder, state_keys):
        with pytest.raises(UserError, match="Take the checkpoint before it"):
            reader(folder)


def test_a_folder_whose_tensors_are_cut_off_is_damaged(two, place: Place, tmp_path: Path) -> None:
    """Their bytes come last in a part, and only those who load them read them."""
    folders = tmp_path / "checkpoints"
    for step in (2, 4):
        shutil.copytree(place.checkpoint("folder", f"step={step}.ckpt"), folders / f"step={step}.ckpt")
    newest = max(folders.iterdir(), key=lambda each: (each / "meta.pt").stat().st_mtime_ns)
    part = next(newest.glob("__1_*.distcp"))
    content = part.read_bytes()
    for damage in (content[:-1], None):
        part.unlink()
        if damage is not None:
            part.write_bytes(damage)
        found = newest_checkpoint(folders)
        assert found is not None
        assert found[0] != newest.resolve()
        assert f"{part.name} is missing or cut off" in found[2][0]
    part.write_bytes(content)
    index = (newest / ".metadata").read_bytes()
    renamed = index.replace(b"state_dict_metadata", b"state_dict_metadatA")
    assert renamed != index
    (newest / ".metadata").write_bytes(renamed)
    with pytest.raises(UserError, match="is incomplete or damaged"):
        check_folder(newest)


def test_no_code_runs_from_a_folder(two, place: Place, tmp_path: Path) -> None:
    """A pickle in the index, and one in the place of a plain value."""
    folder = shutil.copytree(place.checkpoint("folder", "step=2.ckpt"), tmp_path / "step.ckpt")
    check_folder(folder)
    index = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    with pytest.raises(UserError, match=r"\.metadata holds more than an index does .*Path\.touch|getattr"):
        check_folder(folder)
    for cut in (0, 1, len(index) // 2, len(index) - 1):
        (folder / ".metadata").write_bytes(index[:cut])
        with pytest.raises(UserError, match=r"\.metadata"):
            check_folder(folder)
    (folder / ".metadata").write_bytes(index)
    # Nor is a class changed that an index may name.
    links, method = Path.is_symlink, b"pathlib\nPosixPath\nN}U\x0ais_symlinkccollections\nOrderedDict\ns\x86b."
    for of_class in (b"\x80\x02c" + method, b"\x80\x02ctorch.serialization\n_get_layout\n}U\x05cache}sb."):
        (folder / ".metadata").write_bytes(of_class)
        with pytest.raises(UserError, match=r"\.metadata holds more than an index does \(attributes of <"):
            check_folder(folder)
    assert Path.is_symlink is links
    with patch.object(folder_reader, "Unpickler", object), pytest.raises(UserError, match="version of Python"):
        check_folder(folder)
    (folder / ".metadata").write_bytes(index)
    metadata = pickle.loads(index)
    stored = next(place for at, place in metadata.storage_data.items() if at.fqn.endswith("param_groups.0.lr"))
    hostile = io.BytesIO()
    torch.save(Trap(tmp_path / "ran"), hostile)
    part = folder / stored.relative_path
    content = part.read_bytes()
    stored.offset, stored.length = len(content), len(hostile.getvalue())
    part.write_bytes(content + hostile.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="more than tensors and plain values"):
        check_folder(folder)
    # Lightning loads a folder by torch's reader, from the command line and from Python.
    said = failure(place.flags("hostile", *sharded(2), f"--ckpt_path={folder}"))
    assert "more than tensors and plain values" in said
    module = LeapModule(str(place.llama), dtype="float32", prior=Prior(method="magnitude"))
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    resuming = Trainer(accelerator="cpu", devices=1, strategy=strategy, max_steps=3, logger=False)
    with patch.dict(os.environ):  # in which Lightning names the port of the group, to processes of later tests too
        try:
            with pytest.raises(UserError, match="more than tensors and plain values"):
                resuming.fit(module, TextDataModule(text=str(place.text), seq_length=32), ckpt_path=str(folder))
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    with pytest.raises(UserError, match="which only ModelParallelStrategy reads"):
        Trainer(accelerator="cpu", max_steps=3, logger=False).fit(
            LeapModule(str(place.llama), dtype="float32"),
            TextDataModule(text=str(place.text), seq_length=32),
            ckpt_path=str(folder),
        )
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("absolute", [False, True])
def test_a_folder_reads_nothing_outside_itself(two, place: Place, tmp_path: Path, absolute: bool) -> None:
    """An index that names the parts of another folder, which its user can read."""
    private = place.checkpoint("folder", "step=2.ckpt")
    folder = tmp_path / "sent.ckpt"
    folder.mkdir()
    shutil.copy(private / "meta.pt", folder)
    index = pickle.loads((private / ".metadata").read_bytes())
    for stored in index.storage_data.values():
        there = private.resolve() / stored.relative_path
        stored.relative_path = str(there) if absolute else os.path.relpath(there, folder)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    for reader in (check_folder, consolidated, masks_from_checkpoint, state_keys):
        with pytest.raises(UserError, match=r"is no name of a file in it.*Take the checkpoint before it"):
            reader(folder)


def test_an_incomplete_folder_is_told(two, place: Place, tmp_path: Path) -> None:
    folder = shutil.copytree(place.checkpoint("folder", "step=2.ckpt"), tmp_path / "step.ckpt")
    part = next(folder.glob("__1_*.distcp"))
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(UserError, match="Take the checkpoint before it"):
        consolidated(folder)
    part.unlink()
    with pytest.raises(UserError, match="Take the checkpoint before it"):
        consolidated(folder)
    (folder / ".metadata").unlink()
    with pytest.raises(UserError, match="is not a complete checkpoint"):
        consolidated(folder)
    (folder / "meta.pt").unlink()
    with pytest.raises(UserError, match="no such checkpoint"):
        consolidated(folder)


def test_a_flipped_bit_of_a_tensor_is_refused(two, place: Place, tmp_path: Path) -> None:
    """By all that read it, on whichever rank it is found."""
    folder = shutil.copytree(place.checkpoint("folder"), tmp_path / "step.ckpt")
    whole = {key: tensor.clone() for key, tensor in consolidated(folder)["state_dict"].items()}
    key, logits = next((key, tensor) for key, tensor in whole.items() if tensor.numel() > 200)
    flipped = 0
    for part in folder.glob("__*.distcp"):
        content = part.read_bytes()
        place_of = content.find(logits.flatten()[:8].numpy().tobytes())
        if place_of >= 0:
            part.write_bytes(content[: place_of + 3] + bytes([content[place_of + 3] ^ 128]) + content[place_of + 4 :])
            flipped += 1
    assert flipped == 1, key
    for reader in (consolidated, masks_from_checkpoint):
        with pytest.raises(UserError, match=r"\.distcp has a wrong sum of .*Take the checkpoint before it"):
            reader(folder)

    class Rank(ModelParallelStrategy):
        """One of two, and the other one's answer."""

        global_rank, world_size = 0, 2  # type: ignore[assignment]

        def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
            self.found = decision
            return False

    ranks = [Rank(), Rank()]
    ranks[1].global_rank = 1
    for rank in ranks:
        with pytest.raises(UserError, match=r"has a wrong sum|as another rank says"):
            _check_on_ranks(folder, rank)
    assert sorted(rank.found for rank in ranks) == [False, True]


def test_the_newest_whole_folder_is_found(two, place: Place, tmp_path: Path) -> None:
    folder = shutil.copytree(place.checkpoint("folder").parent, tmp_path / "checkpoints", symlinks=True)
    assert not list(folder.glob(".*"))  # what was written aside has its name
    found, checkpoint, damaged = newest_checkpoint(folder)
    assert (found.name, checkpoint["global_step"], damaged) == ("step=4.ckpt", 4, [])
    index = (found / ".metadata").read_bytes()
    (found / ".metadata").write_bytes(index[:-10])
    found, checkpoint, damaged = newest_checkpoint(folder)
    assert (found.name, checkpoint["global_step"], len(damaged)) == ("step=2.ckpt", 2, 1)
    (folder / "step=4.ckpt" / "meta.pt").unlink()  # a kill before it was written, on a file system without renames
    assert newest_checkpoint(folder)[0].name == "step=2.ckpt"


# -- words ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("tensor-parallel", "data_parallel_size: 2, tensor_parallel_size: 1"),
        ("strategy", "invalid strategy name"),
        ("accumulation", "Set --trainer.accumulate_grad_batches 2"),
        ("folder", "leap_pl consolidate --ckpt_path"),
        ("model", "the checkpoint belongs to"),
        ("prior", "nowhere.safetensors"),
        ("head", "outside the decoder blocks"),
    ],
)
def test_what_does_not_work_is_refused_on_every_rank(two, case: str, words: str) -> None:
    for rank in two:
        assert words in rank["refused"][case]


def test_resume_in_one_process_keeps_the_batch(two, place: Place, capsys) -> None:
    with pytest.raises(SystemExit):
        main(place.flags("x", f"--ckpt_path={place.checkpoint('sharded')}"))
    assert "4 micro-batches an optimizer step (2 ranks × 2), and here it is 2 (1 × 2)" in capsys.readouterr().err


def test_progress_and_logs_are_rank_zeros(two, place: Place) -> None:
    first, second = ((place.root / "two" / f"rank-{rank}.txt").read_text() for rank in range(2))
    assert re.search(r"^step \d+ of \d+: loss/lm", first, re.MULTILINE)
    assert "step " not in second
    assert "pruning" in first
    assert "%|" not in second
    assert len(list((place.root / "ddp" / "tensorboard").glob("events.*"))) == 1
