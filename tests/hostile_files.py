"""Files of results, masks and packed weights, intact ones and damaged ones, that a random generator draws."""

import copy
import hashlib
import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


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


# -- intact files ------------------------------------------------------------------------------------------

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
            "value": 13.463738,
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
