"""A program that uses leap_pl as a library finds its process as it was; the command line's own does not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# What a fit in Python finds before leap_pl is imported, during and after; the libraries under it are there already.
PROGRAM = """
import json, logging, os, signal, sys, threading, warnings
import datasets, lightning, pydantic, safetensors, tokenizers, torch, torchmetrics, transformers, yaml
import jsonargparse.typing, lightning.pytorch.cli, torch._inductor.compile_fx, torch.distributed.fsdp
from lightning.pytorch.strategies import ModelParallelStrategy
from transformers import AutoModelForCausalLM, AutoTokenizer, masking_utils

model, text, workers, told = *sys.argv[1:3], int(sys.argv[3]), sys.argv[4]
AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)

def flushed():
    return not bool((torch.full((100_000,), 1e-30) * 1e-10).any())

def handlers():
    numbers = sorted(signal.valid_signals())
    return {str(number): repr(signal.getsignal(number)) for number in numbers}

def loggers():
    named = {"": logging.root} | logging.root.manager.loggerDict
    return {name: [logger.level, repr(logger.handlers), repr(logger.filters), logger.propagate, logger.disabled]
            for name, logger in named.items() if isinstance(logger, logging.Logger)}

def process():
    return {
        "matmul precision": torch.get_float32_matmul_precision(),
        "tf32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
        "denormals flushed": flushed(),
        "warnings": [*map(repr, warnings.filters), repr(warnings.showwarning), repr(warnings.formatwarning)],
        "environment": dict(os.environ),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "determinism": [torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic,
                        torch.backends.cudnn.benchmark],
        "defaults": [str(torch.get_default_dtype()), str(torch.get_default_device()), torch.is_grad_enabled()],
        "signals": handlers(),
        "logging": loggers(),
        "hooks": [repr(sys.excepthook), repr(threading.excepthook), sys.getrecursionlimit()],
        "transformers": repr(masking_utils.find_packed_sequence_indices),
        "working directory": os.getcwd(),
    }

class Look(lightning.Callback):
    def on_train_batch_end(self, *_):
        during.append([flushed(), torch.get_float32_matmul_precision(), os.environ.get("TOKENIZERS_PARALLELISM")])

before, during = process(), []
from leap_pl import LeapModule, TextDataModule
from leap_pl.prior import Prior

trainer = lightning.Trainer(accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False,
                            enable_model_summary=False, enable_progress_bar=False, callbacks=[Look()])
data = TextDataModule(model, text=text, seq_length=32, batch_size=2, validation_sequences=2, num_workers=workers)
module = LeapModule(model, prior=Prior(method="wanda", sequences=2, cache_dir=told + ".priors"))
trainer.fit(module, datamodule=data)
module.mask_set()
after = process()
# A logger that is new is nobody's yet.
after["logging"] = {name: after["logging"][name] for name in before["logging"]}
ours = sorted(name for name in sys.modules if name.startswith("leap_pl.callbacks"))
json.dump({"before": before, "during": during, "after": after, "callbacks": ours}, open(told, "w"))
"""


def told_by(program: str, *arguments: object) -> Any:
    told = Path(str(arguments[-1]))
    environment = os.environ | {"LEAP_PL_COMPILE": "0", "OMP_NUM_THREADS": "1"}
    environment.pop("TOKENIZERS_PARALLELISM", None)
    subprocess.run([sys.executable, "-c", program, *map(str, arguments)], env=environment, check=True)
    return json.loads(told.read_text())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fit_in_python_leaves_the_process_as_it_was(model_folder, text_file, tmp_path: Path, workers: int) -> None:
    told = told_by(PROGRAM, model_folder, text_file, workers, tmp_path / "told.json")
    for what, before in told["before"].items():
        assert told["after"][what] == before, what
    assert told["during"] == [[False, "highest", None]] * 2
    # Where what sets the allocator and the arithmetic lives.
    assert told["callbacks"] == []


COMMAND_LINE = """
import json, sys
import torch
from leap_pl.callbacks import ProcessSettings
from leap_pl.cli.fit import LeapModule
from leap_pl.cli.main import main

during, train = [], LeapModule.on_before_zero_grad
def look(self, *arguments):
    during.append([not bool((torch.full((100_000,), 1e-30) * 1e-10).any()), torch.get_float32_matmul_precision()])
    return train(self, *arguments)
LeapModule.on_before_zero_grad = look
told = sys.argv.pop()
cli = main(sys.argv[1:])
added = sum(isinstance(callback, ProcessSettings) for callback in cli.trainer.callbacks)
json.dump({"during": during, "added": added}, open(told, "w"))
"""


def test_the_command_line_sets_its_process_for_speed(model_folder, text_file, tmp_path: Path) -> None:
    import torch
    from conftest import fit_flags

    told = told_by(COMMAND_LINE, *fit_flags(model_folder, text_file, tmp_path), tmp_path / "told.json")
    assert told["added"] == 1
    assert told["during"]
    assert {tuple(look) for look in told["during"]} == {(torch.set_flush_denormal(False), "high")}
