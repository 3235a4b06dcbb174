"""Cells of measurements: steps of each variant and shape, evaluation, pruning; each ends in rows of one table."""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.device import allocated, clocked, fitting, launches, peak_allocated, release, reset_peak
from benchmarks.gpu.shapes import Model
from benchmarks.memory import paper_bytes
from benchmarks.report import Row, one_line, sequences
from benchmarks.variants import Step, makers
from leap_pl.evaluation.perplexity import perplexity
from leap_pl.gates import Gate
from leap_pl.oneshot.prune import prune
from leap_pl.sparse.packed_linear import PackedLinear
from leap_pl.sparse.packed_weight import PackedWeight

VARIANTS = ("dense", "leap_pl", "low_memory", "published")
ON_PAPER = ("leap_pl", "low_memory")
WARM_UP = 2  # steps: kernels are compiled, and the optimizer has its state
NO_MEMORY = "out of memory"
COLUMNS = (
    *("cell", "model", "tokens", "variant", "checkpointing", "ms", "of dense", "tokens/s", "peak GiB", "on paper GiB"),
    *("launches", "operators", "turns", "note"),
)


@dataclass(frozen=True)
class Bench:
    """Settings that all cells are measured with.

    Attributes:
        device: Device.
        models: Models by name.
        seq_length: Number of tokens in a sequence.
        repeats: Number of turns of the variants; fewer where the time is up.
        until: End of the time, by the monotonic clock.
        report: Function that prints a line.
    """

    device: torch.device
    models: dict[str, Model]
    seq_length: int
    repeats: int
    until: float
    report: Callable[[str], None] = print

    def over(self) -> bool:
        """Return whether the time is up."""
        return time.monotonic() > self.until

    def ids(self, model: Any, tokens: int) -> Tensor:
        """Return random tokens (B, L) for ``model``, of sequences of at most ``seq_length``."""
        draw, shape = torch.Generator().manual_seed(0), sequences(tokens, self.seq_length)
        return torch.randint(0, model.config.vocab_size, shape, generator=draw).to(self.device)


@dataclass(frozen=True)
class Steps:
    """Time and memory of the steps of several variants, which take turns.

    Attributes:
        model: Name of the model.
        tokens: Number of tokens in a step.
        variants: Names of the variants, as in :mod:`benchmarks.variants`.
        seconds: Time that it takes on an H100, by an estimate that is meant to be high.
        checkpointing: Whether each decoder block is recomputed in the backward pass.
    """

    model: str
    tokens: int
    seconds: float
    variants: tuple[str, ...] = VARIANTS
    checkpointing: bool = False

    @property
    def name(self) -> str:
        """Return the name by which it is reported as skipped."""
        return f"steps of {self.model} at {self.tokens} tokens"

    def measure(self, bench: Bench) -> list[Row]:
        """Return a row for each variant; those that do not fit together into the memory are measured apart."""
        rows = {variant: self._row(bench, variant) for variant in self.variants}
        left = list(self.variants)
        while left:
            left = self._together(bench, left, rows)
            release()
        dense = rows.get("dense", {}).get("ms")
        for row in rows.values():
            if dense and row.get("ms"):
                row["of dense"] = row["ms"] / dense
        return list(rows.values())

    def _row(self, bench: Bench, variant: str) -> Row:
        row: Row = {"cell": "step", "model": self.model, "tokens": self.tokens, "variant": variant}
        row["checkpointing"] = "yes" if self.checkpointing else ""
        if self.checkpointing and variant in ON_PAPER:
            parts = paper_bytes(bench.models[self.model].shape, self.tokens, variant)
            row["on paper GiB"] = (sum(parts.values()) - parts["outside"]) / 2**30
        return row

    def _together(self, bench: Bench, variants: list[str], rows: dict[str, Row]) -> list[str]:
        """Measure the first of ``variants``, and with it as many others as fit; return those that do not."""
        running: dict[str, _Running] = {}  # the only place that holds them: one that is dropped is gone
        later: list[str] = []

        def begin(variant: str) -> bool:
            running[variant] = self._begin(bench, variant, rows[variant])
            return True

        def drop(variant: str) -> None:
            running.pop(variant, None)
            release()
            if running:
                later.append(variant)
            else:
                rows[variant]["note"] = NO_MEMORY

        for variant in variants:
            try:
                if not fitting(partial(begin, variant)):
                    drop(variant)
            except Exception as error:  # of one variant, which must not take the others' figures away
                rows[variant]["note"] = one_line(error)
            release()
        found: dict[str, list[float]] = {variant: [] for variant in running}
        for turn in range(bench.repeats):
            if turn and bench.over():
                break
            for variant in list(running):
                taken = fitting(partial(clocked, running[variant].take, bench.device))
                if taken is None:  # it fitted when fewer others were there
                    drop(variant)
                else:
                    found[variant].append(taken)
        for variant, each in running.items():
            median = statistics.median(found[variant])
            rows[variant] |= {"ms": median * 1e3, "tokens/s": self.tokens / median, "turns": len(found[variant])}
            rows[variant] |= fitting(partial(launches, each.take, bench.device)) or {}
            bench.report(f"        {self.name}, {variant}: {median * 1e3:.1f} ms")
        return later

    def _begin(self, bench: Bench, variant: str, row: Row) -> "_Running":
        """Make a variant, and take its first steps; note the memory that it needs beside what is held by others."""
        others = allocated(bench.device)
        model = bench.models[self.model].random(bench.device, checkpointing=self.checkpointing)
        running = _Running(makers(start=random_logits)[variant](model), bench.ids(model, self.tokens))
        reset_peak(bench.device)
        for _ in range(WARM_UP):
            running.take()
        peak = peak_allocated(bench.device)
        if peak is not None:
            row["peak GiB"] = (peak - others) / 2**30
        return running


@dataclass(frozen=True)
class _Running:
    step: Step
    ids: Tensor

    def take(self) -> None:
        self.step(self.ids)


@dataclass(frozen=True)
class Evaluation:
    """Time of measuring the perplexity of random text."""

    model: str
    tokens: int
    seconds: float

    @property
    def name(self) -> str:
        """Return the name by which it is reported as skipped."""
        return f"evaluation of {self.model}"

    def measure(self, bench: Bench) -> list[Row]:
        """Return one row."""
        model = bench.models[self.model].random(bench.device)
        text = bench.ids(model, self.tokens).flatten().cpu()
        windows = min(bench.seq_length, 2048)
        perplexity(model, text[: 4 * windows], seq_length=windows)  # warm-up
        taken = clocked(lambda: perplexity(model, text, seq_length=windows), bench.device)
        return [_row("evaluation", self.model, self.tokens, "perplexity", taken)]


@dataclass(frozen=True)
class Pruning:
    """Time of one-shot pruning on random text, from the first block to the last."""

    model: str
    method: str
    tokens: int
    seconds: float

    @property
    def name(self) -> str:
        """Return the name by which it is reported as skipped."""
        return f"pruning of {self.model} by {self.method}"

    def measure(self, bench: Bench) -> list[Row]:
        """Return one row."""
        model = bench.models[self.model].random(bench.device)
        blocks_NT = bench.ids(model, self.tokens).cpu()
        taken = clocked(lambda: prune(model, blocks_NT, method=self.method, progress=False), bench.device)
        return [_row("pruning", self.model, self.tokens, self.method, taken)]


@dataclass(frozen=True)
class Decoding:
    """Time of one token's products with all weights of a model's blocks, dense and packed at two densities.

    Attributes:
        model: Name of the model.
        tokens: Rows of input: sequences that are decoded together.
        seconds: As in :class:`Steps`.
    """

    model: str
    tokens: int
    seconds: float

    @property
    def name(self) -> str:
        """Return the name by which it is reported as skipped."""
        return f"decoding of {self.model} with {self.tokens} rows"

    def measure(self, bench: Bench) -> list[Row]:
        """Return a row for each form of the weights, which take turns."""
        model = bench.models[self.model].random(bench.device)
        dense = [layer for layer in model.model.layers.modules() if isinstance(layer, nn.Linear)]
        forms: dict[str, list[Any]] = {"dense": dense}
        for density in (0.5, 0.3):
            forms[f"packed {density}"] = [
                PackedLinear(PackedWeight.pack(layer.weight.detach(), torch.rand_like(layer.weight) < density))
                for layer in dense
            ]
        inputs = [torch.randn(self.tokens, layer.in_features, device=bench.device).bfloat16() for layer in dense]

        def products(form: str) -> None:
            for layer, x in zip(forms[form], inputs, strict=True):
                layer(x)

        found: dict[str, list[float]] = {form: [] for form in forms}
        with torch.inference_mode():
            for turn in range(WARM_UP + bench.repeats):
                for form, times in found.items():
                    taken = clocked(partial(products, form), bench.device)
                    times += [taken] if turn >= WARM_UP else []
        rows = [_row("decoding", self.model, self.tokens, form, statistics.median(found[form])) for form in forms]
        return [row | {"of dense": row["ms"] / rows[0]["ms"]} for row in rows]


Cell = Steps | Evaluation | Pruning | Decoding


def cells(*, tiny: bool) -> list[Cell]:
    """Return all cells, the most important ones first."""
    if tiny:
        return [
            Steps("llama-3.2-1b", 64, 1),
            Steps("llama-3.1-8b", 64, 1, ("low_memory",), checkpointing=True),
            Steps("qwen2.5-0.5b", 64, 1),
            Evaluation("qwen2.5-0.5b", 256, 1),
            Pruning("qwen2.5-0.5b", "wanda", 128, 1),
            Decoding("llama-3.2-1b", 1, 1),
            Pruning("qwen2.5-0.5b", "sparsegpt", 128, 1),
            Steps("llama-3.2-1b", 128, 1, checkpointing=True),
        ]
    return [
        Steps("llama-3.2-1b", 4096, 40),  # kernels that the checks did not need are compiled in the first
        Steps("llama-3.2-1b", 16384, 40),
        Steps("llama-3.1-8b", 4096, 25, ("low_memory",), checkpointing=True),
        Steps("qwen2.5-0.5b", 4096, 20),
        Steps("qwen2.5-0.5b", 16384, 30),
        Evaluation("qwen2.5-0.5b", 131072, 15),
        Pruning("qwen2.5-0.5b", "wanda", 65536, 20),
        Decoding("llama-3.2-1b", 1, 15),
        Decoding("llama-3.2-1b", 16, 15),
        Steps("llama-3.1-8b", 32768, 60, ("low_memory",), checkpointing=True),
        Steps("llama-3.2-1b", 32768, 60, checkpointing=True),
        Pruning("qwen2.5-0.5b", "sparsegpt", 65536, 60),
        Steps("qwen2.5-0.5b", 32768, 40, checkpointing=True),
        Steps("llama-3.1-8b", 16384, 40, ("low_memory",), checkpointing=True),
    ]


def measure(wanted: Iterable[Cell], bench: Bench) -> tuple[list[Row], list[str], list[str]]:
    """Measure cells while there is time.

    Returns:
        Their rows, the names of those that were skipped, and of those that failed.
    """
    rows: list[Row] = []
    skipped: list[str] = []
    failed: list[str] = []
    for cell in wanted:
        if time.monotonic() + cell.seconds > bench.until:
            skipped.append(cell.name)
            continue
        start = time.monotonic()
        try:
            found = fitting(partial(cell.measure, bench)) or [{"cell": cell.name, "note": NO_MEMORY}]
        except Exception as error:
            found = [{"cell": cell.name, "note": one_line(error)}]
        release()
        rows += found
        if any(row.get("note", NO_MEMORY) != NO_MEMORY for row in found):
            failed.append(cell.name)
        bench.report(f"{time.monotonic() - start:7.1f} s {cell.name}{': failed' if cell.name in failed else ''}")
    used = [column for column in COLUMNS if any(column in row for row in rows)]
    return [{column: row.get(column) for column in used} for row in rows], skipped, failed


def random_logits(gate: Gate) -> None:
    """Initialise the logits on their device; a run draws them on the CPU, which takes a minute for a large model."""
    gate.logits.data.normal_(std=0.014)


def _row(cell: str, model: str, tokens: int, variant: str, seconds: float) -> Row:
    row: Row = {"cell": cell, "model": model, "tokens": tokens, "variant": variant}
    return row | {"ms": seconds * 1e3, "tokens/s": tokens / seconds}
