"""Result files and masks, made up."""

import json
import math

import pytest
import torch

from leap_pl.masks import MaskSet, Provenance

PROJECTIONS = ("self_attn.q_proj", "mlp.up_proj")
NAMES = [f"model.layers.{layer}.{projection}.weight" for layer in range(3) for projection in PROJECTIONS]


def result(method, sparsity, value, correct="1100", *, mask=None):
    """A result file's content, with 8 windows around ``value``."""
    windows = [math.log(value) + shift for shift in (0.3, -0.3, 0.1, -0.1, 0.2, -0.2, 0.05, -0.05)]
    accuracy = correct.count("1") / len(correct)
    task = {"acc": accuracy, "acc_stderr": 0.2, "correct": correct, "split": "validation", "limit": None}
    task |= {"num_fewshot": 0, "version": 1.0, "samples": len(correct)}
    digest = None if mask is None else MaskSet.load(mask).digest_of_bits()
    model = {"name": "org/base", "base_model": "org/base", "fingerprint": "f00d", "mask": mask, "mask_digest": digest}
    return {
        "format": "leap_pl.evaluation",
        "format_version": 1,
        "method": method,
        "model": model,
        "sparsity": {"global": sparsity, "weights": dict.fromkeys(NAMES, sparsity)},
        "perplexity": {
            "held-out.jsonl": {
                "value": value,
                "stderr": 0.1 * value,
                "nll": math.log(value),
                "seq_length": 512,
                "stride": 512,
                "tokens": 4096,
                "text_digest": "abc",
                "tokenizer": {"digest": "dad", "vocabulary": 257},
                "window_nll": windows,
            }
        },
        "tasks": {"piqa": task},
    }


@pytest.fixture
def write_result(tmp_path):
    """Writes a result file: its name without ``.json``, its content → its path."""

    def write(name, content):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        return str(path)

    return write


def mask_file(path, method, seed, density=0.5):
    generator = torch.Generator().manual_seed(seed)
    masks = {name: torch.rand(16, 16, generator=generator) < density for name in NAMES}
    return str(MaskSet(masks, Provenance("org/base", "f00d", method, 1 - density)).save(path))


@pytest.fixture
def four_results(write_result, tmp_path):
    wanda, leap = (mask_file(tmp_path / f"{m}.safetensors", m, n) for n, m in enumerate(("wanda", "leap")))
    learned = result("leap", 0.501, 14.0, "1110", mask=leap)
    learned["sparsity"]["weights"] |= {NAMES[0]: 0.4, NAMES[1]: 0.602}
    return [
        write_result("dense", result("dense", 0.0, 10.0, "1111")),
        write_result("magnitude", result("magnitude", 0.5, 60.0, "1000")),
        write_result("wanda", result("wanda", 0.5, 20.0, "1100", mask=wanda)),
        write_result("leap", learned),
    ]
