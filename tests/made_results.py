"""The content of result files, made up."""

import math

from leap_pl.masks import MaskSet

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
