"""Damaged and hostile files for what reads results, masks, records of model folders, questions and texts.

    python tests/fuzz_readers.py --inputs 10000

gives each reader so many inputs, made from a seed: values of an intact file replaced by hostile ones, keys taken away,
renamed or doubled, bytes changed, put in or cut off. What is read goes on to everything that uses it. An input is
refused (a UserError of one line that names the file), accepted, or a failure, which is kept and ends the command with
status 1.
"""

import argparse
import io
import json
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hostile_files import PROVENANCE, RESULT, TRAINED, damaged_bytes, damaged_json, masks, packed

if TYPE_CHECKING:
    from leap_pl.masks import Provenance

os.environ["HF_HUB_OFFLINE"] = "1"


@dataclass
class Reader:
    """What is fuzzed.

    Attributes:
        make: Draws an input.
        read: Reads it and uses it in every way.
        name: Of the file, in a folder of its own.
    """

    make: Callable[[random.Random], bytes]
    read: Callable[[Path], object]
    name: str


@dataclass
class Counts:
    """What became of the inputs of a reader."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[bytes, str]] = field(default_factory=list)


def of_json(value: Any) -> Callable[[random.Random], bytes]:
    """Draw damaged JSON, in three of four inputs by its structure."""

    def make(draw: random.Random) -> bytes:
        text = damaged_json(value, draw) if draw.randrange(4) else json.dumps(value)
        data = text.encode(errors="surrogatepass")
        return damaged_bytes(data, draw) if text == json.dumps(value) or draw.randrange(8) == 0 else data

    return make


def use_entries(path: Path, seen: Counter[str], every: int) -> None:
    """Compare what is in ``path`` with an intact result; draw the pictures of each ``every``-th that is accepted."""
    from leap_pl.comparison.entries import read_entries
    from leap_pl.comparison.page import make_page
    from leap_pl.comparison.pictures import draw_all
    from leap_pl.comparison.table import make_table
    from leap_pl.comparison.verdict import verdict

    rival = path.with_name("intact.json")
    if not rival.exists():
        rival.write_text(json.dumps({**RESULT, "method": "wanda"}), encoding="utf-8")
    entries = read_entries([str(path), str(rival)])
    table = make_table(entries, {"wanda"})
    table.text(80), table.text(), table.markdown().encode(), table.csv().encode()
    seen["accepted"] += 1
    if seen["accepted"] % every == 0:
        with tempfile.TemporaryDirectory() as folder:
            pictures = draw_all(entries, {"wanda"}, Path(folder))
            make_page(entries, verdict(entries, {"wanda"}), table, pictures, Path(folder)).encode()


class OfAny(NamedTuple):
    """In the place of a mask, the one that a result says it is of, made as its config says."""

    digest: str | None
    provenance: "Provenance"

    def digest_of_bits(self) -> str | None:
        """Return the digest of its bits."""
        return self.digest


def readers(every: int = 50) -> dict[str, Reader]:
    """All readers; ``every``-th accepted result or mask is drawn as well."""
    seen: Counter[str] = Counter()

    def result(path: Path) -> None:
        from leap_pl.cli.evaluate import _of_tasks, _of_text, _of_whom
        from leap_pl.cli.export import _read_results
        from leap_pl.escape import say
        from leap_pl.evaluation.record import read_result, write_result
        from leap_pl.masks import Provenance

        told = read_result(path)
        lines = [_of_whom(told), *(_of_text(*figure) for figure in told["perplexity"].items())]
        say("\n".join([*lines, *_of_tasks({"mean": None, **told})]), lines=True)
        write_result(path.with_name("again.json"), told)
        assert read_result(path.with_name("again.json")) == told
        use_entries(path, seen, every)
        made = Provenance("org/base", "f00d", "leap", config=told.get("config") or {})
        _read_results(str(path), OfAny(told["model"].get("mask_digest"), made))

    def mask(path: Path) -> None:
        from leap_pl.export.card import card_of, facts_of
        from leap_pl.masks import MaskSet

        loaded = MaskSet.load(path)
        card_of(loaded, {**facts_of(loaded, 0), "perplexity": RESULT["perplexity"]}).encode()
        again = MaskSet.load(loaded.save(path.with_name("again.safetensors")))
        assert again.provenance == loaded.provenance
        use_entries(path, seen, every)

    def packed_model(path: Path) -> None:
        from leap_pl.sparse.folder import packed_weights, read_masks

        for _, weight in packed_weights(path.parent):
            assert len(weight.values) == int(weight.starts[-1])
            weight.unpack()
        read_masks(path.parent)

    def record(path: Path) -> None:
        from leap_pl.evaluation.record import write_result
        from leap_pl.evaluation.subject import exported_record

        write_result(path.with_name("again.json"), exported_record(path.parent))

    def questions(path: Path) -> None:
        from leap_pl.evaluation.tasks import evaluate_tasks

        evaluate_tasks(*tiny(), ["piqa"], tasks_folder=path.parents[1], batch_size=4, limit=3)

    def text(path: Path) -> None:
        from leap_pl.evaluation.texts import check_text, read_text

        check_text(str(path))
        read_text(str(path), tiny()[1], seq_length=32, max_tokens=None, share="all")

    return {
        "result": Reader(of_json({**RESULT, "config": TRAINED}), result, "fuzzed.json"),
        "mask": Reader(masks, mask, "fuzzed.safetensors"),
        "packed": Reader(packed, packed_model, "model.safetensors"),
        "record": Reader(of_json({"provenance": PROVENANCE, "gated": 96}), record, "leap_pl.json"),
        "questions": Reader(_questions, questions, "tasks/piqa/validation.jsonl"),
        "text": Reader(_lines, text, "fuzzed.jsonl"),
    }


def _questions(draw: random.Random) -> bytes:
    rows = [{"goal": f"cut {n}", "sol1": "a knife", "sol2": "a spoon", "label": n % 2} for n in range(3)]
    return _rows(rows, draw)


def _lines(draw: random.Random) -> bytes:
    return _rows([{"text": f"the mask keeps weight {n}"} for n in range(6)], draw)


def _rows(rows: list[dict[str, Any]], draw: random.Random) -> bytes:
    lines = [json.dumps(row) for row in rows]
    if draw.randrange(4):
        at = draw.randrange(len(lines))
        lines[at] = damaged_json(rows[at], draw)
    data = "\n".join(lines).encode(errors="surrogatepass")
    return damaged_bytes(data, draw) if draw.randrange(3) == 0 else data


def tiny() -> tuple[Any, Any]:
    """Return a tiny model and its tokenizer, the same ones each time."""
    if not _TINY:
        import torch
        from tiny import byte_tokenizer, tiny_model

        torch.set_num_threads(1)
        _TINY.extend((tiny_model(), byte_tokenizer()))
    return _TINY[0], _TINY[1]


_TINY: list[Any] = []


# -- running ------------------------------------------------------------------------------------------------


@contextmanager
def bare_survey() -> Iterator[None]:
    """Leave out what takes seconds an input and reads none of it: lm-eval's survey of this machine."""
    from lm_eval import evaluator

    survey, evaluator.add_env_info = evaluator.add_env_info, lambda results: None
    try:
        yield
    finally:
        evaluator.add_env_info = survey


def fuzz(reader: Reader, inputs: int, seed: int, folder: Path) -> Counts:
    """Give ``reader`` so many ``inputs``; equal seeds make equal ones."""
    from leap_pl.errors import UserError

    found = Counts()
    path = folder / reader.name
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in range(inputs):
        data = reader.make(random.Random(f"{seed} {number}"))
        path.write_bytes(data)
        said = io.StringIO()
        try:
            with redirect_stdout(said), redirect_stderr(said):
                reader.read(path)
            outcome = "accepted"
        except UserError as error:
            outcome = "refused"
            whole = str(error)
            if len(whole.splitlines()) != 1 or not any(n in whole for n in (path.name, path.parent.name, "--tasks")):
                outcome = "failed"
                found.failures.append((data, f"not one line that names the file: {whole!r}"))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            outcome = "failed"
            found.failures.append((data, traceback.format_exc()))
        found.counts[outcome] += 1
    return found


def main() -> int:
    """Fuzz what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1000, help="for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="names of readers")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="folder for inputs that failed")
    options = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as place, bare_survey():
        os.environ["HF_DATASETS_CACHE"] = str(Path(place, "cache"))
        import datasets

        datasets.config.HF_DATASETS_CACHE = Path(place, "cache")
        for name, reader in readers().items():
            if options.only and name not in options.only:
                continue
            began = time.monotonic()
            found = fuzz(reader, options.inputs, options.seed, Path(place, name))
            counts = ", ".join(f"{found.counts[outcome]} {outcome}" for outcome in ("refused", "accepted", "failed"))
            print(f"{name}: {options.inputs} inputs: {counts}; {time.monotonic() - began:.0f} s", flush=True)
            for number, (data, trace) in enumerate(found.failures[:20]):
                options.keep.mkdir(exist_ok=True)
                (options.keep / f"{name}-{number}").write_bytes(data)
                (options.keep / f"{name}-{number}.txt").write_text(trace, encoding="utf-8", errors="replace")
            failed += len(found.failures)
    return int(failed > 0)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main())
