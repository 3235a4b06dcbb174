"""What a run has read of its text, told by digests: any other text is refused at resume, the same one never."""

import gzip
import json
import os
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer

from leap_pl.data import TextDataModule, local
from leap_pl.data.local import LocalFiles
from leap_pl.data.packing import digest_of_text
from leap_pl.errors import UserError

TOKENIZER = byte_tokenizer()
KINDS = (".jsonl", ".jsonl.gz", ".txt", ".parquet")
DOCUMENTS = [f"document {k} " * (1 + k % 3) for k in range(24)]

in_any_folder = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(file: Path, documents: list[str]) -> Path:
    lines = "".join(json.dumps({"text": document}) + "\n" for document in documents).encode()
    if file.suffix == ".parquet":
        pq.write_table(pa.table({"text": documents}), file, row_group_size=5)
    elif file.suffix == ".gz":
        file.write_bytes(gzip.compress(lines, mtime=0))
    else:
        file.write_bytes(lines if file.suffix == ".jsonl" else "\n".join(documents).encode())
    return file


def module_for(*files: Path, **changes: Any) -> TextDataModule:
    given = {"seq_length": 16, "batch_size": 2, "seed": 4, "validation_sequences": 0, **changes}
    return TextDataModule(TOKENIZER, [str(file) for file in files], **given)  # type: ignore[arg-type]


def stopped_after(data: TextDataModule, batches: int, **ranks: int) -> dict[str, Any]:
    """The state of a run after so many micro-batches of this rank, as a checkpoint holds it."""
    for batch in islice(data.train_loader(10_000, **ranks), batches):
        data.on_before_batch_transfer(batch, 0)
    return json.loads(json.dumps(data.state_dict()))


def rest(data: TextDataModule, state: dict[str, Any], batches: int = 20) -> list[Any]:
    data.load_state_dict(state)
    return [batch["input_ids"].tolist() for batch in islice(data.train_loader(10_000), batches)]


@pytest.fixture(autouse=True)
def _short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "TEXT_PART_BYTES", 64)


@pytest.mark.parametrize("kind", [".jsonl", ".txt", ".parquet"])
def test_an_empty_file_leaves_the_digest_known(kind: str, tmp_path: Path) -> None:
    """And text that is added to it is noticed, once it was passed."""
    files = [write(tmp_path / f"{name}{kind}", DOCUMENTS * (name != "b")) for name in "abc"]
    data = module_for(*files, seed=0)
    before = stopped_after(data, 1)
    full = stopped_after(data, 80)
    assert [len(digest or "") for digest in full["position"]["digests"]] == [64] * 3
    assert digest_of_text(full["position"]) is not None
    write(files[1], ["something new"])
    rest(module_for(*files, seed=0), before, 1)
    with pytest.raises(UserError, match=rf"b\{kind}, all of which was read, has changed"):
        rest(module_for(*files, seed=0), full)


@pytest.mark.parametrize("kind", KINDS)
@in_any_folder
@given(place=st.integers(0, 23), batches=st.integers(1, 40))
def test_another_word_is_refused_wherever_it_was_read(kind: str, tmp_path: Path, place: int, batches: int) -> None:
    """Of one length, in any document; of a document behind the place, which was not read, the run goes on with it."""
    first, second = write(tmp_path / f"a{kind}", DOCUMENTS), write(tmp_path / f"b{kind}", DOCUMENTS[::-1])
    data = module_for(first, second, seed=0)
    order = data.stream.source._order(0)
    state = stopped_after(data, batches)
    other = list(DOCUMENTS)
    other[place] = other[place].replace("document", "DOCUMENT")
    place_of_first = order.index(0)
    write(first, other)
    position = state["position"]
    whole = position["number"] > 0 or position["turn"] > place_of_first
    own = position["turn"] == place_of_first
    if whole or (own and _was_read(position["state"], kind, place, other)):
        with pytest.raises(UserError, match=f"{first.name}, .* has changed since the run was stopped"):
            rest(module_for(first, second, seed=0), state)
    else:
        now = module_for(first, second, seed=0)
        fresh = [batch["input_ids"].tolist() for batch in islice(now.train_loader(10_000), batches + 20)]
        assert rest(module_for(first, second, seed=0), state) == fresh[batches:]


def _was_read(state: dict[str, Any] | None, kind: str, place: int, documents: list[str]) -> bool:
    """Whether document ``place``, or any part of it, is before the end of the document (or part) at ``state``."""
    if kind == ".parquet":
        return place <= (state or {}).get("row", 0)
    if kind != ".txt":
        return place <= (state or {}).get("line", 0)
    raw = "\n".join(documents).encode()
    at = (state or {}).get("byte", 0)
    part = raw[at : at + local.TEXT_PART_BYTES]
    end = at + len(part) if at + len(part) >= len(raw) else at + local._cut(part)
    begins = len("\n".join(documents[:place]).encode()) + (place > 0)
    # A part is read to its last byte before it is cut: what counts is what was handed on.
    return begins < end


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_text_under_another_name_and_date_goes_on(kind: str, tmp_path: Path) -> None:
    file = write(tmp_path / f"text{kind}", DOCUMENTS)
    state = stopped_after(module_for(file), 5)
    expected = rest(module_for(file), state)
    (tmp_path / "elsewhere").mkdir()
    moved = file.rename(tmp_path / "elsewhere" / f"other{kind}")
    os.utime(moved, (1, 1))
    assert rest(module_for(moved), state) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_has_grown_behind_the_place(kind: str, tmp_path: Path) -> None:
    """In the first pass the run ends as one from the beginning on the longer text; later the text was read whole."""
    file = write(tmp_path / f"text{kind}", DOCUMENTS)
    early, late = stopped_after(module_for(file), 5), stopped_after(module_for(file), 40)
    assert (early["position"]["number"], late["position"]["number"] > 0) == (0, True)
    write(file, [*DOCUMENTS, "more of it " * 30])
    fresh = [batch["input_ids"].tolist() for batch in islice(module_for(file).train_loader(10_000), 25)]
    assert rest(module_for(file), early) == fresh[5:]
    with pytest.raises(UserError, match=rf"text{kind}, all of which was read, has changed since"):
        rest(module_for(file), late)


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_was_cut_off_or_is_gone(kind: str, tmp_path: Path) -> None:
    file = write(tmp_path / f"text{kind}", DOCUMENTS)
    state = stopped_after(module_for(file), 15)
    write(file, DOCUMENTS[:3])
    with pytest.raises(
        UserError, match=rf"text{kind}, whose beginning was read, as far as (line|row|byte) \d+, has changed"
    ):
        rest(module_for(file), state)
    with pytest.raises(UserError, match="is in 2 shards now and was in 1"):
        rest(module_for(file, write(tmp_path / f"more{kind}", DOCUMENTS)), state)


@pytest.mark.parametrize("kind", KINDS)
@in_any_folder
@given(at=st.integers(0, 60))
def test_the_digest_of_a_reader_that_went_on_is_that_of_one_that_did_not(kind: str, tmp_path: Path, at: int) -> None:
    """And the one that is read again without parsing, up to every place and to the end."""
    files = LocalFiles([write(tmp_path / f"text{kind}", [*DOCUMENTS, "", "last"])], share="train")

    def drained(state: Any) -> tuple[list[Any], str | None]:
        reader, states = files.read(0, state), []
        while True:
            try:
                states.append(next(reader).after)
            except StopIteration as end:
                return states, end.value

    states, whole = drained(None)
    state = states[min(at, len(states) - 1)]
    assert drained(state)[1] == whole == files.digest(0, None)
    assert files.digest(0, state) == state["digest"]


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 3), (2, 0), (2, 2)])
def test_the_digest_does_not_depend_on_ranks_and_workers(ranks: int, workers: int, tmp_path: Path) -> None:
    """Every rank says the same of what all of them have read, and what one process says that reads as much."""
    files = [write(tmp_path / f"{k}.jsonl", DOCUMENTS[k:]) for k in range(3)]
    expected = stopped_after(module_for(*files), 6)
    for rank in range(ranks):
        data = module_for(*files, num_workers=workers)
        assert stopped_after(data, 6 // ranks, rank=rank, world_size=ranks) == expected
        assert data.record()["tokens"] == 6 * 2 * 16
        assert data.record()["sha256"] == expected_digest(files)


def expected_digest(files: list[Path]) -> str:
    data = module_for(*files)
    stopped_after(data, 6)
    digest = data.record()["sha256"]
    assert len(digest) == 64
    return digest


def test_passes_over_the_text_are_counted(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.jsonl", DOCUMENTS) for name in "ab"]
    data, found = module_for(*files), []
    assert data.record()["passes"] == 0
    for batch in islice(data.train_loader(10_000), 120):
        data.on_before_batch_transfer(batch, 0)
        found.append((data.record()["passes"], data.record()["tokens"]))
    whole = sum(len(TOKENIZER(text)["input_ids"]) + 1 for text in DOCUMENTS) * 2
    assert found[0][0] == 1 < found[-1][0]
    assert all(abs(passes - (1 + (tokens - 1) // whole)) <= (tokens % whole < 64) for passes, tokens in found)


def test_the_record_tells_texts_apart_and_not_their_names(tmp_path: Path) -> None:
    def sha256(name: str, documents: list[str], batches: int = 5) -> str:
        data = module_for(write(tmp_path / name, documents))
        assert data.record()["sha256"] is None  # of nothing
        stopped_after(data, batches)
        return data.record()["sha256"]

    assert sha256("a.jsonl", DOCUMENTS) == sha256("b.jsonl", DOCUMENTS)
    assert sha256("a.jsonl", DOCUMENTS) != sha256("a.jsonl", DOCUMENTS, batches=9)
    assert sha256("a.jsonl", DOCUMENTS) != sha256("a.jsonl", ["Document 0", *DOCUMENTS[1:]])


def test_a_checkpoint_of_the_format_without_digests_goes_on(tmp_path: Path) -> None:
    """It is compared by name and size, which one line says, and what is written from then on has digests."""
    files = [write(tmp_path / f"{k}.jsonl", DOCUMENTS[k:]) for k in range(3)]
    for batches in (5, 30, 80):
        new = stopped_after(module_for(*files), batches)
        old = json.loads(json.dumps(new)) | {"format": 1}
        del old["rereadable"], old["position"]["digests"], old["position"]["document"]
        if old["position"]["state"]:
            del old["position"]["state"]["digest"]
        data = module_for(*files)
        with pytest.warns(UserWarning, match="kept no digest of the text"):
            resumed = rest(data, old)
        assert resumed == rest(module_for(*files), new)
        assert data.state_dict() == new
        with pytest.raises(UserError, match=r"text was '0\.jsonl .* and is '3\.jsonl"):
            rest(module_for(*[write(tmp_path / f"{k}.jsonl", DOCUMENTS) for k in (3, 4, 5)]), old)
    assert rest(module_for(*files), stopped_after(module_for(*files), 0))  # nothing was read yet


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub dataset of one shard, in a file that a test may change."""
    real, file = datasets.load_dataset, write(tmp_path / "hub.jsonl", [f"hub {k:03}" for k in range(400)])

    def load(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        return real("json", data_files=[str(file)], split="train", streaming=streaming, cache_dir=str(tmp_path))

    monkeypatch.setattr(datasets, "load_dataset", load)
    return file


def test_a_hub_dataset_is_compared_at_the_document_it_goes_on_with(hub: Path) -> None:
    def data() -> TextDataModule:
        return TextDataModule(TOKENIZER, "some/text", seq_length=16, batch_size=2, validation_sequences=0)

    whole = data()
    state = stopped_after(whole, 20)
    assert whole.record()["sha256"]
    expected = rest(data(), state)
    row = state["position"]["state"]["row"]
    write(hub, [f"hub {k:03}" for k in range(row + 1)] + [f"HUB {k:03}" for k in range(row + 1, 400)])
    assert rest(data(), state) != expected  # what was not read
    write(hub, [f"hub {k:03}" for k in range(row)] + [f"HUB {k:03}" for k in range(row, 400)])
    with pytest.raises(UserError, match=r"some/text \(train\), shard 0, in the document in which the run was stopped"):
        rest(data(), state)
    old = json.loads(json.dumps(state)) | {"format": 1}
    del old["rereadable"], old["position"]["digests"], old["position"]["document"], old["position"]["state"]["digest"]
    write(hub, [f"hub {k:03}" for k in range(400)])
    again = data()
    with pytest.warns(UserWarning, match="kept no digest"):
        assert rest(again, old) == expected
    assert again.record()["sha256"] is None  # of what came before nothing is known
