"""Speed of decoding with packed weights, beside dense ones: layers of Llamas, and whole models.

python -m benchmarks.decode [--layers 1b 8b] [--models llama-3.2-1b FOLDER] [--density .5 .4 .3] [--rows 1 4 16]
    [--threads 1 2] [--repeats 15] [--tiny] [--output F.json]

Dense is torch's own product in bfloat16. Of each layer there are as many copies as 512 MiB of dense weights hold, one
after another in each turn, so that every weight comes from memory, as it does in a model. ``faster`` is the median over
the turns of dense over packed in the same turn. ``limit`` is the ratio of the bytes, and ``copy GB/s`` the speed at
which torch copies as many bytes as the dense weights have (those read and those written) in the same turns: neither
form can be much faster. A model generates ``--tokens`` tokens greedily for each of ``rows`` prompts of one token. Masks
are random. The variants take turns.
"""

import argparse
import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.shapes import MODELS, TINY, Model
from benchmarks.report import Row, finish, interleaved, ratio
from leap_pl.sparse.packed_linear import PackedLinear
from leap_pl.sparse.packed_weight import PackedWeight

CPU = torch.device("cpu")
LAYERS = {  # (rows, columns) of a Llama's weights
    "tiny": [(48, 64), (64, 96)],
    "135m": [(576, 576), (1536, 576), (576, 1536)],
    "1b": [(2048, 2048), (8192, 2048), (2048, 8192)],
    "3b": [(3072, 3072), (8192, 3072), (3072, 8192)],
    "8b": [(4096, 4096), (14336, 4096), (4096, 14336)],
}


@dataclass(frozen=True)
class Bench:
    """Settings of all measurements.

    Attributes:
        densities: Densities of the packed weights.
        rows: Numbers of rows of input.
        threads: Numbers of threads.
        repeats: Number of turns.
        held: Bytes of dense weights that a turn goes through.
        tokens: Number of tokens that a model generates.
    """

    densities: list[float]
    rows: list[int]
    threads: list[int]
    repeats: int
    held: int
    tokens: int


def random_packed(weight: Tensor, density: float) -> PackedWeight:
    """Return ``weight`` packed with a random mask."""
    return PackedWeight.pack(weight, torch.rand(weight.shape) < density)


def measured(variants: dict[str, Callable[[], object]], bench: Bench, threads: int) -> dict[str, list[float]]:
    """Return the seconds of each turn of each variant, by a number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            return interleaved(variants, bench.repeats, CPU)
    finally:
        torch.set_num_threads(before)


def layer_rows(name: str, shape: tuple[int, int], bench: Bench) -> list[Row]:
    """Return a row of the table for each density, number of rows and number of threads of one layer."""
    height, width = shape
    copies = max(1, bench.held // (2 * height * width))
    dense = [torch.randn(shape).bfloat16() for _ in range(copies)]
    packed = {density: [PackedLinear(random_packed(one, density)) for one in dense] for density in bench.densities}
    source = torch.cat([one.view(-1) for one in dense])
    target = torch.empty_like(source)
    found: list[Row] = []
    for threads in bench.threads:
        for rows in bench.rows:
            x = torch.randn(rows, width).bfloat16()
            variants: dict[str, Callable[[], object]] = {
                "dense": partial(_all, [partial(F.linear, x, w) for w in dense])
            }
            variants |= {str(d): partial(_all, [partial(layer, x) for layer in each]) for d, each in packed.items()}
            variants["copy"] = partial(target.copy_, source)
            seconds = measured(variants, bench, threads)
            median = {variant: statistics.median(each) for variant, each in seconds.items()}
            for density, layers in packed.items():
                size = sum(layer.packed.nbytes for layer in layers)
                found.append(
                    {
                        "of": name,
                        "shape": f"{height}×{width}",
                        "rows": rows,
                        "threads": threads,
                        "density": density,
                        "dense µs": median["dense"] / copies * 1e6,
                        "packed µs": median[str(density)] / copies * 1e6,
                        "faster": ratio(seconds, "dense", str(density)),
                        "limit": source.nbytes / size,
                        "dense GB/s": source.nbytes / median["dense"] / 1e9,
                        "packed GB/s": size / median[str(density)] / 1e9,
                        "copy GB/s": 2 * source.nbytes / median["copy"] / 1e9,
                    }
                )
    return found


def _all(calls: list[Callable[[], object]]) -> None:
    for call in calls:
        call()


def packed_model(model: Any, density: float) -> Any:
    """Return a copy of ``model`` that shares its parameters, with packed weights in its decoder blocks."""
    made = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for block in made.model.layers:
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                holder, _, last = name.rpartition(".")
                packed = PackedLinear(random_packed(layer.weight.detach(), density), layer.bias)
                setattr(block.get_submodule(holder), last, packed)
    return made


def model_rows(name: str, model: Any, bench: Bench) -> list[Row]:
    """Return a row of the table for each density, number of prompts and number of threads of one model."""
    forms = {"dense": model.eval()} | {str(density): packed_model(model, density) for density in bench.densities}
    head = sum(parameter.nbytes for parameter in model.get_output_embeddings().parameters())
    sizes = {form: head + sum(map(_bytes, made.model.layers)) for form, made in forms.items()}
    found: list[Row] = []
    for threads in bench.threads:
        for rows in bench.rows:
            ids = torch.randint(0, model.config.vocab_size, (rows, 1))
            variants: dict[str, Callable[[], object]] = {
                form: partial(generate, made, ids, bench.tokens) for form, made in forms.items()
            }
            seconds = measured(variants, bench, threads)
            median = {form: statistics.median(each) for form, each in seconds.items()}
            found += [
                {
                    "of": name,
                    "shape": "model",
                    "rows": rows,
                    "threads": threads,
                    "density": density,
                    "dense tokens/s": rows * bench.tokens / median["dense"],
                    "packed tokens/s": rows * bench.tokens / median[str(density)],
                    "faster": ratio(seconds, "dense", str(density)),
                    "limit": sizes["dense"] / sizes[str(density)],
                    "dense MB": sizes["dense"] / 1e6,
                    "packed MB": sizes[str(density)] / 1e6,
                }
                for density in bench.densities
            ]
    return found


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def generate(model: Any, ids: Tensor, tokens: int) -> Tensor:
    """Return ``tokens`` tokens behind each row of ``ids``, by greedy decoding."""
    lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **lengths)


def model_named(name: str, shapes: dict[str, Model]) -> Any:
    """Return a model of random weights of a known shape, or the one in a folder, in bfloat16."""
    if name in shapes:
        return shapes[name].random(CPU)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="*", default=["1b", "8b"], choices=LAYERS, help="sizes of Llamas")
    parser.add_argument("--models", nargs="*", default=["llama-3.2-1b"], help="shapes of random weights, or folders")
    parser.add_argument("--density", type=float, nargs="+", default=[0.5, 0.4, 0.3])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: that tests this command")
    parser.add_argument("--output")
    args = parser.parse_args(arguments)
    held = 1 << 16 if args.tiny else 1 << 29
    bench = Bench(args.density, args.rows, args.threads, args.repeats, held, args.tokens)
    torch.manual_seed(0)
    found = [row for name in args.layers for shape in LAYERS[name] for row in layer_rows(name, shape, bench)]
    for name in args.models:
        model = model_named(name, TINY if args.tiny else MODELS)
        found += model_rows(Path(name).name, model, bench)
    finish(found, args.output, density=args.density, repeats=args.repeats, tokens=args.tokens)


if __name__ == "__main__":
    main()
