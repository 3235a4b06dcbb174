"""Damaged and hostile files for what reads results, masks, records of model folders, questions and texts.

    python tests/fuzz_readers.py --inputs 10000

gives each reader so many inputs, made from a seed: values of an intact file replaced by hostile ones, keys taken away,
renamed or doubled, bytes changed, put in or cut off. What is read goes on to everything that uses it. An input is
refused (a UserError of one line that names the file), accepted, or a failure, which is kept and ends the command with
status 1.
"""

import argparse
import copy
import hashlib
import io
import json
import os
import random
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from leap_pl.masks import Provenance

os.environ["HF_HUB_OFFLINE"] = "1"

# What no writer of leap_pl writes, as JSON spells it; some cannot be made of Python's own values.
SPELLED = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e400",
    "-1e400",
    "1e308",
    "1e-400",
    "-0.0",
    "1" + "0" * 400,
    "-1" + "0" * 30,
    "9223372036854775807",
    "2147483648",
    "0",
    "-1",
    "0.5",
    "1",
    "true",
    "null",
    "[]",
    "{}",
    '""',
    '"' + "x" * 5000 + '"',
    '"' + "\\u0000" * 40 + '"',
    '"\\ud800"',
    '"\\u001b[2J\\n"',
    '"$\\\\frac{a_b^c$"',
    '"_legend"',
    '"<script>alert(1)</script>|`"',
    '"../../etc/passwd"',
    '"/dev/zero"',
    '"os.system"',
    '{"class_path": "os.system", "init_args": {"command": "touch ran"}}',
    '"!function os.system"',
    '"{{ 7 * 7 }}{% for x in y %}"',
    '{"a": 1, "a": 2}',
    "[" * 100 + "]" * 100,
    "[" * 5000 + "]" * 5000,
    '{"a":' * 40 + "1" + "}" * 40,
    "[" + ",".join(["1"] * 3000) + "]",
    "{" + ",".join(f'"k{n}":{n}' for n in range(3000)) + "}",
    '"99999x99999 tiles, dense or 99999:99999"',
    '"0:0"',
    '"' + "9" * 50 + ":" + "9" * 60 + '"',
)
HOLE = "\ue000"  # is replaced by what is spelled


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the keys that lead to each value inside ``value``."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield (*above, key)
        yield from places(inner, (*above, key))


def damaged_json(value: Any, draw: random.Random) -> str:
    """Return JSON of ``value`` with one to three things wrong in it."""
    value, spelled = copy.deepcopy(value), []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        found = list(places(value))
        if not found:
            break
        place = draw.choice(found)
        holder = value
        for key in place[:-1]:
            holder = holder[key]
        key, kind = place[-1], draw.randrange(8)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[draw.choice(("x", "", "é" * 3000, "$_^\\", "\x1b[2J", "__class__", "layers.99999999999."))] = (
                holder.pop(key)
            )
        elif kind == 2:
            other = value
            for step in draw.choice(found):
                if not isinstance(other, dict | list) or (isinstance(other, dict) and step not in other):
                    break
                if isinstance(other, list) and not (isinstance(step, int) and step < len(other)):
                    break
                other = other[step]
            holder[key] = copy.deepcopy(other)
        elif kind == 3 and isinstance(holder[key], int | float):
            holder[key] = draw.choice(
                (holder[key] * 10 ** draw.randrange(1, 40), -holder[key], str(holder[key]), [holder[key]])
            )
        elif kind == 4 and isinstance(holder[key], str):
            holder[key] += draw.choice(
                ("$", "_^{", "\\", "\n", "\0", "\x1b[31m", "\u202e", "é" * 300, "'", '"', "%s{}")
            )
        else:
            spelled.append(draw.choice(SPELLED))
            holder[key] = f"{HOLE}{len(spelled) - 1}{HOLE}"
    text = json.dumps(value)
    hole = json.dumps(HOLE)[1:-1]
    for number, words in enumerate(spelled):
        text = text.replace(f'"{hole}{number}{hole}"', words)
    return text


def damaged_bytes(whole: bytes, draw: random.Random) -> bytes:
    """Return ``whole`` with bytes changed, put in, taken out, doubled or cut off."""
    data = bytearray(whole)
    for _ in range(draw.choice((1, 1, 2, 5))):
        at, kind = draw.randrange(len(data) + 1), draw.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at:at] = draw.choice((b"\xff\xfe", b'"', b"{", b"]", b"\0", b",", draw.randbytes(8)))
        elif kind == 2:
            del data[at : at + draw.randrange(1, 40)]
        elif kind == 3:
            data[at:at] = data[at : at + draw.randrange(1, 200)]
        elif kind == 4 and at < len(data):
            data[at] = draw.choice(b'0123456789"{}[],:-eE.\\')
        elif kind == 5 and draw.randrange(4) == 0:
            del data[at:]
    return bytes(data)


# -- readers ------------------------------------------------------------------------------------------------

NAMES = [f"model.layers.{layer}.{projection}.weight" for layer in range(2) for projection in ("self_attn.q", "mlp.up")]
PROVENANCE = {
    "base_model": "org/base",
    "fingerprint": "f00d",
    "method": "leap",
    "sparsity": 0.5,
    "revision": None,
    "config": {
        "pattern": "unstructured",
        "data": {"text": ["a.jsonl"], "seq_length": 32, "batch_size": 2, "seed": 0},
        "gate": {"class_path": "BernoulliGate", "init_args": {"strength": 3.0}},
        "optimizer": {"class": "AdamW", "lr": 0.1},
        "perplexity": 20.5,
        "dense_perplexity": 12.0,
    },
    "versions": {"leap_pl": "0.1", "torch": "2.13"},
}
SHAPES = {name: [4, 6] for name in NAMES}
TASK = {"acc": 0.5, "acc_stderr": 0.2, "acc_norm": 0.25, "correct": "1100", "split": "validation", "limit": None}
TRAINED = {
    **PROVENANCE["config"],
    "train_weights": {"kind": "kept", "lr": 2e-5, "start": "runs/earlier"},
    "steps": 60,
    "seed": 0,
}

RESULT = {
    "format": "leap_pl.evaluation",
    "format_version": 1,
    "method": "leap",
    "config": PROVENANCE["config"],
    "model": {"name": "org/base", "base_model": "org/base", "fingerprint": "f00d", "mask": None, "class": "Llama"},
    "sparsity": {"global": 0.5, "weights": dict(zip(NAMES, (0.5, 0.4, 0.6, 0.5), strict=True)), "asked": 0.5},
    "perplexity": {
        "held-out.jsonl": {
            "value": 14.0,
            "stderr": 1.5,
            "nll": 2.6,
            "seq_length": 512,
            "stride": 512,
            "tokens": 4096,
            "text_digest": "abc",
            "tokenizer": {"digest": "dad", "vocabulary": 257},
            "window_nll": [2.5, 2.7, 2.6, 2.6],
        }
    },
    "tasks": {"piqa": {**TASK, "num_fewshot": 0, "version": 1.0, "samples": 4, "source": "local"}},
    "mean": {"value": 0.5, "stderr": 0.2, "tasks": ["piqa"], "paper": False},
    "seed": 0,
    "batch_size": 4,
    "versions": {"torch": "2.13"},
    "commit": None,
    "times": {"started": "2026-01-01T00:00:00Z", "seconds": {"total": 1.5}},
}


def mask_file(shapes: str, provenance: str, *, header: Callable[[dict[str, Any]], str] = json.dumps) -> bytes:
    """Return a MaskSet file whose digest fits its metadata, whatever that says."""
    packed = {name: bytes((0b10101010, 0b11001100, 0b11110000)) for name in NAMES}
    digest = hashlib.sha256(f"{shapes}\n{provenance}\n".encode())
    told: dict[str, Any] = {}
    for number, name in enumerate(sorted(packed)):
        digest.update(name.encode() + b"\n" + packed[name])
        told[name] = {"dtype": "U8", "shape": [3], "data_offsets": [3 * number, 3 * number + 3]}
    metadata = {"format": "leap_pl.MaskSet", "format_version": "1", "shapes": shapes, "provenance": provenance}
    text = header({"__metadata__": {**metadata, "digest": digest.hexdigest()}, **told}).encode(errors="replace")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(packed[name] for name in sorted(packed))


def packed_file(shapes: str, provenance: str, draw: random.Random, *, agree: bool = True) -> bytes:
    """Return a file of packed weights with the right sums; bits and values are drawn unless they ``agree``."""
    sums, entries, data = {}, {}, b""
    for name in NAMES:
        bits = [0b101010 if agree else draw.getrandbits(draw.choice((6, 31))) for _ in range(4)]
        values = struct.pack("<12f", *range(12)) if agree else draw.randbytes(4 * draw.randrange(20))
        for part, kind, raw in ((f"{name}_bitmap", "I32", struct.pack("<4i", *bits)), (name, "F32", values)):
            shape = [4, 1] if kind == "I32" else [len(raw) // 4]
            entries[part] = {"dtype": kind, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
            sums[part] = f"{zlib.crc32(raw):08x}"
            data += raw
    told = {"packed_format": "leap_pl.packed", "packed_version": "1", "crc32": json.dumps(sums)}
    metadata = {"format": "pt", **told, "shapes": shapes, "provenance": provenance}
    text = json.dumps({"__metadata__": metadata, **entries}).encode(errors="replace")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def packed(draw: random.Random) -> bytes:
    """Draw a damaged file of packed weights: what it says, bits and values that do not agree, or its bytes."""
    shapes, provenance, kind = json.dumps(SHAPES), json.dumps(PROVENANCE), draw.randrange(4)
    if kind == 0:
        return packed_file(damaged_json(SHAPES, draw), provenance, draw)
    if kind == 1:
        return packed_file(shapes, damaged_json(PROVENANCE, draw), draw)
    if kind == 2:
        return packed_file(shapes, provenance, draw, agree=draw.randrange(4) == 0)
    return damaged_bytes(packed_file(shapes, provenance, draw), draw)


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


def masks(draw: random.Random) -> bytes:
    """Draw a damaged MaskSet file: what it says, its header, or its bytes."""
    shapes, provenance, kind = json.dumps(SHAPES), json.dumps(PROVENANCE), draw.randrange(5)
    if kind < 2:
        return mask_file(shapes, damaged_json(PROVENANCE, draw))
    if kind == 2:
        return mask_file(damaged_json(SHAPES, draw), provenance)
    if kind == 3:
        return mask_file(shapes, provenance, header=lambda header: damaged_json(header, draw))
    data = damaged_bytes(mask_file(shapes, provenance), draw)
    return data if draw.randrange(4) else struct.pack("<Q", draw.getrandbits(draw.randrange(1, 64))) + data[8:]


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
        from leap_pl.cli.evaluate import _print_summary
        from leap_pl.cli.export import _read_results
        from leap_pl.evaluation.record import read_result, write_result
        from leap_pl.masks import Provenance

        told = read_result(path)
        _print_summary({"mean": None, **told}, None)
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
