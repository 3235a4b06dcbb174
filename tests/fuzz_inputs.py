"""Damage files in thousands of ways, and count what the readers make of them.

    python tests/fuzz_inputs.py gguf --inputs 10000

Each input is read in a process that is watched. Counted is what it takes, what it refuses in one line (a
``UserError``), what ends in a traceback (any other exception) or in a crash of the process, and what hangs. The same
seed makes the same inputs.
"""

import argparse
import json
import multiprocessing
import os
import random
import struct
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

STARTS = 600.0  # seconds in which a process must have imported what it needs: this is no input's doing
HANGS = 120.0  # seconds without an answer to an input; a loaded machine is slow
INTERESTING = [
    0,
    1,
    2,
    7,
    8,
    31,
    127,
    128,
    255,
    256,
    65535,
    1 << 20,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    1 << 62,
    (1 << 64) - 1,
]


def damaged(whole: bytes, draw: random.Random, head: int) -> bytes:
    """``whole`` with one to four damages, most of them in the first ``head`` bytes, where the structure is."""
    data = bytearray(whole)
    for _ in range(draw.choice((1, 1, 2, 4))):
        place = draw.randrange(min(head, len(data)) if draw.random() < 0.9 and data else max(len(data), 1))
        kind = draw.randrange(7)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[place : place + 1] = bytes([draw.randrange(256)])
        elif kind == 2:
            form = draw.choice(("<I", "<Q"))
            number = draw.choice(INTERESTING) & (0xFFFFFFFF if form == "<I" else 0xFFFFFFFFFFFFFFFF)
            data[place : place + struct.calcsize(form)] = struct.pack(form, number)
        elif kind == 3:
            del data[place : place + draw.randrange(1, 64)]
        elif kind == 4:
            data[place:place] = draw.randbytes(draw.randrange(1, 64))
        elif kind == 5:
            other = draw.randrange(max(len(data), 1))
            data[place : place + 16] = data[other : other + 16]
        elif draw.random() < 0.2:
            del data[place:]
    return bytes(data)


# -- what is read -----------------------------------------------------------------------------------------------


def gguf_inputs(folder: Path) -> tuple[Callable[[random.Random], Path], Callable[[Path], Any]]:
    """A GGUF file, as base model and tokenizer."""
    from tiny_gguf import tiny_gguf

    from leap_pl.base_model.loading import load_model
    from leap_pl.base_model.tokenizer import load_tokenizer

    whole = tiny_gguf(folder / "whole.gguf").read_bytes()
    file = folder / "damaged.gguf"

    def make(draw: random.Random) -> Path:
        file.write_bytes(damaged(whole, draw, 9_000))
        return file

    def read(path: Path) -> None:
        load_tokenizer(str(path)).encode("the mask")
        load_model(str(path))  # and its settings

    return make, read


def model_inputs(folder: Path) -> tuple[Callable[[random.Random], Path], Callable[[Path], Any]]:
    """A model folder: the settings, the tokenizer or the header of the weights."""
    from tiny import tiny_folder

    from leap_pl.base_model.loading import load_model
    from leap_pl.base_model.tokenizer import load_tokenizer

    place = tiny_folder(folder / "model")
    wholes = {name: (place / name).read_bytes() for name in ("config.json", "tokenizer.json", "model.safetensors")}

    def make(draw: random.Random) -> Path:
        name = draw.choice(sorted(wholes))
        for other, whole in wholes.items():
            (place / other).write_bytes(whole)
        if name == "config.json" and draw.random() < 0.7:
            told = json.loads(wholes[name])
            strange = [-1, 0, 3, 10**6, 10**12, 1.5, "text", None, [], {}, [[]], {"a": 1}, True, float("inf")]
            told[draw.choice(sorted(told))] = draw.choice(strange)
            (place / name).write_text(json.dumps(told))
        else:
            (place / name).write_bytes(damaged(wholes[name], draw, 3_000))
        return place

    def read(path: Path) -> None:
        load_tokenizer(str(path)).encode("the mask")
        load_model(str(path))

    return make, read


def text_inputs(folder: Path) -> tuple[Callable[[random.Random], Path], Callable[[Path], Any]]:
    """A text in Parquet, JSON lines or gzip."""
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    from leap_pl.data.source import TextSource

    texts = [f"document {k} of these " * (k % 7) for k in range(60)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    pq.write_table(pa.table({"id": list(range(60)), "text": texts}), folder / "whole.parquet", row_group_size=25)
    columns = (folder / "whole.parquet").read_bytes()
    wholes = {".jsonl": lines, ".jsonl.gz": gzip.compress(lines, mtime=0), ".parquet": columns, ".txt": lines}

    def make(draw: random.Random) -> Path:
        suffix = draw.choice([*sorted(wholes), ".parquet"])
        file = folder / f"damaged{suffix}"
        file.write_bytes(damaged(wholes[suffix], draw, len(wholes[suffix])))
        return file

    def read(path: Path) -> None:
        for _, document in TextSource.open(str(path)).documents(repeat=False):
            document.text.encode()

    return make, read


READERS: dict[str, Callable[[Path], tuple[Callable[[random.Random], Path], Callable[[Path], Any]]]] = {
    "gguf": gguf_inputs,
    "model": model_inputs,
    "text": text_inputs,
}

# -- the watch --------------------------------------------------------------------------------------------------


def _work(reader: str, seed: int, first: int, last: int, folder: Path, pipe: Connection) -> None:
    """Read the inputs ``first`` to ``last``, and tell of each when it is over."""
    from leap_pl.errors import UserError

    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    make, read = READERS[reader](folder)
    pipe.send((-1, "ready", ""))
    for number in range(first, last):
        path = make(random.Random(f"{reader}-{seed}-{number}"))
        try:
            read(path)
            outcome, told = "taken", ""
        except UserError as error:
            outcome, told = "refused", str(error)
            if "\n" in told or str(path) not in told:
                outcome = "badly told"
        except BaseException as error:
            outcome, told = "tracebacks", f"{type(error).__name__}: {error}"
        pipe.send((number, outcome, told[:300]))


def fuzz(reader: str, inputs: int, *, seed: int = 0, say: Callable[[str], None] = print) -> Counter[str]:
    """Read ``inputs`` damaged inputs; how many were taken, refused in one line, and ended otherwise."""
    counts: Counter[str] = Counter(
        dict.fromkeys(("taken", "refused", "badly told", "tracebacks", "crashes", "hangs"), 0)
    )
    context = multiprocessing.get_context("spawn")
    number = 0
    while number < inputs:
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(reader, seed, number, inputs, Path(folder), theirs))
            process.start()
            theirs.close()
            if not ours.poll(STARTS) or ours.recv()[1] != "ready":
                process.kill()
                raise RuntimeError(f"the process that reads had not started after {STARTS:.0f} seconds")
            while number < inputs:
                try:
                    if not ours.poll(HANGS):
                        outcome = "hangs"
                        break
                    at, outcome, told = ours.recv()
                except EOFError:
                    outcome = "crashes"
                    break
                counts[outcome] += 1
                number += 1
                if outcome not in ("taken", "refused"):
                    say(f"input {at}: {outcome}: {told}")
                if number % 1000 == 0:
                    say(f"{number}: {dict(counts)}")
            else:
                outcome = ""
            if outcome in ("hangs", "crashes"):
                counts[outcome] += 1
                say(f"input {number}: {outcome}")
                number += 1
            process.kill()
            process.join()
    return counts


def main() -> None:
    """Fuzz one reader, or all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("reader", choices=[*READERS, "all"])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    bad = 0
    for reader in READERS if asked.reader == "all" else [asked.reader]:
        counts = fuzz(reader, asked.inputs, seed=asked.seed, say=lambda line: print(line, flush=True))
        print(f"{reader}: {asked.inputs} inputs: " + ", ".join(f"{count} {what}" for what, count in counts.items()))
        bad += sum(counts.values()) - counts["taken"] - counts["refused"]
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
