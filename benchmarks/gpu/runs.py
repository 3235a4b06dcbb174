"""Runs of a LeapModule on a tiny random Llama, by a plain Trainer, as the checks compare them."""

import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.shapes import Model
from benchmarks.scaling import Shape
from leap_pl import LeapModule, TextDataModule
from leap_pl.checkpoints.layout import key_of, path_of
from leap_pl.distributed.shards import gathered
from leap_pl.gates import NMGate, TileGate
from leap_pl.losses.objective import Objective
from leap_pl.prior import Prior

WORDS = ("the", "mask", "keeps", "what", "text", "needs", "and", "drops", "a", "weight", "that", "no", "word", "misses")
END = "<|end|>"

STEPS, WINDOW = 4, 2  # optimizer steps of a run, micro-batches of a step

# Kind of gate → settings of the module.
KINDS: dict[str, dict[str, Any]] = {
    "BernoulliGate": {},
    "NMGate 2:4": {"gate": NMGate, "objective": Objective(budget=0)},
    "NMGate 4:8": {"gate": partial(NMGate, n=4, m=8), "objective": Objective(budget=0)},
    "TileGate joint": {"gate": partial(TileGate, tile=16), "sparsity": 0.4},
    "TileGate tile": {"gate": partial(TileGate, tile=16, mode="tile"), "sparsity": 0.4},
}


@dataclass(frozen=True)
class Place:
    """Device and files of the runs.

    Attributes:
        device: Device that is checked.
        model: Folder of the model and its tokenizer.
        text: File of the text.
    """

    device: torch.device
    model: Path
    text: Path

    @classmethod
    def make(cls, device: torch.device, folder: Path) -> "Place":
        """Write a model, a tokenizer and a text into ``folder``."""
        place = cls(device, folder / "model", folder / "text.txt")
        config: Any = Model(Shape(2, 64, 112, 32, 64), 16).config()
        config.initializer_range = 0.15  # the usual 0.02 leaves so small a network nearly constant
        from transformers import LlamaForCausalLM

        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(place.model)
        word_tokenizer().save_pretrained(place.model)
        draw = random.Random(0)
        place.text.write_text(" ".join(draw.choices(WORDS, k=4000)), encoding="utf-8")
        return place


def word_tokenizer() -> Any:
    """Return a tokenizer of the few words of the text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(dict.fromkeys([*WORDS, END]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def module_of(place: Place, **settings: Any) -> LeapModule:
    """Return a module that learns on the model of ``place`` from a prior by magnitude, in float32."""
    # A cache of its own: a mask that is read from a file takes pydantic.
    prior = Prior(method="magnitude", cache_dir=tempfile.mkdtemp(dir=place.model.parent))
    given = {"prior": prior, "dtype": "float32", "warmup_steps": 0}
    kind = LeapModule if find_spec("pydantic") else Unread
    return kind(str(place.model), **{**given, **settings})


class Unread(LeapModule):
    """LeapModule that resumes without reading the record of the run's settings, for a machine without pydantic."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give the stored logits this module's names."""
        stored = checkpoint["state_dict"]
        checkpoint["state_dict"] = {path_of(*place): stored[key_of(*place)] for place in self.gates.stored()}


class UnreadText(TextDataModule):
    """TextDataModule that resumes at a position that no schema has read, for a machine without pydantic."""

    def read_state(self, state_dict: dict[str, Any]) -> Any:
        """Return the state as it was stored."""
        return state_dict


class Ends(L.Callback):
    """Callback that copies what a run learned before the module leaves the device, and can stop the run.

    Attributes:
        first: Parameters of the gates before the first step, by weight and part, on the CPU.
        last: The same after the last step.
        loss: Loss of the last micro-batch.
        devices: Types of the devices that the parameters were on.
    """

    def __init__(self, stop_at: int | None = None, checkpoint: Path | None = None) -> None:
        self.stop_at, self.checkpoint = stop_at, checkpoint
        self.first: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}
        self.devices: set[str] = set()
        self.loss = float("nan")

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """See :class:`Ends`."""
        self.first = learned(module)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
        """See :class:`Ends`."""
        self.loss = float(outputs["loss"].detach())
        if trainer.global_step == self.stop_at and self.checkpoint is not None and not trainer.should_stop:
            trainer.save_checkpoint(self.checkpoint)
            trainer.should_stop = True

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """See :class:`Ends`."""
        assert isinstance(module, LeapModule)
        self.last = learned(module)
        self.devices = {parameter.device.type for parameter in module.gates.learned().values()}


class NoSyncs(L.Callback):
    """Callback that makes a host sync an error in every micro-batch, forward and backward, but the first.

    In the first, kernels are compiled, and Lightning makes the metrics that it logs to.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.micro_batches = device, 0

    def on_train_batch_start(self, *_: Any) -> None:
        """See :class:`NoSyncs`."""
        refuse_syncs(self.device, on=self.micro_batches > 0)

    def on_after_backward(self, *_: Any) -> None:
        """See :class:`NoSyncs`."""
        refuse_syncs(self.device, on=False)
        self.micro_batches += 1

    def on_exception(self, *_: Any) -> None:
        """See :class:`NoSyncs`."""
        refuse_syncs(self.device, on=False)


def refuse_syncs(device: torch.device, *, on: bool) -> None:
    """Make host syncs errors, or allow them again."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error" if on else "default")


def learned(module: L.LightningModule) -> dict[str, Tensor]:
    """Return copies of the parameters of a module's gates, complete on every rank, on the CPU."""
    assert isinstance(module, LeapModule)
    found = module.gates.learned().items()
    return {f"{name} {part}": gathered(parameter.detach()).cpu().clone() for (name, part), parameter in found}


def accelerator(device: torch.device) -> dict[str, Any]:
    """Return the settings of the trainer for a device."""
    if device.type != "cuda":
        return {"accelerator": "cpu", "devices": 1}
    return {"accelerator": "gpu", "devices": [device.index or 0]}


def fit(
    place: Place,
    module: LeapModule,
    *callbacks: L.Callback,
    ends: Ends | None = None,
    ckpt_path: Path | None = None,
    math_attention: bool = False,
    **trainer: Any,
) -> Ends:
    """Fit ``module`` on the text, and return its ends."""
    ends = ends or Ends()
    quiet = ("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger")
    given: dict[str, Any] = {**accelerator(place.device), **dict.fromkeys(quiet, False), "max_steps": STEPS}
    given |= {"accumulate_grad_batches": WINDOW, "gradient_clip_val": 1.0, **trainer}
    kind = TextDataModule if find_spec("pydantic") else UnreadText
    data = kind(text=str(place.text), seq_length=32, batch_size=2, validation_sequences=0)
    run = L.Trainer(**given, callbacks=[ends, *callbacks])
    with sdpa_kernel(SDPBackend.MATH) if math_attention else nullcontext():
        run.fit(module, data, ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
    return ends


@contextmanager
def eager() -> Iterator[None]:
    """Run the gates uncompiled within the context."""
    with _environment():
        os.environ["LEAP_PL_COMPILE"] = "0"
        yield


@contextmanager
def process_group() -> Iterator[None]:
    """Remove the process group that a run makes within the context, and its variables in the environment."""
    with _environment():
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):  # a machine may have no other network
            os.environ.setdefault(name, "lo")
        try:
            yield
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


@contextmanager
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
