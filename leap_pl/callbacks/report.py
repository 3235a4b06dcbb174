"""Callback that prints the plan of a run before it learns, and its verdict at the end."""

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from leap_pl.callbacks.lightning_internals import SavingCheckpoint
from leap_pl.callbacks.mask_export import MaskExport, mask_place
from leap_pl.distributed.strategy import copies_gradients, data_rank
from leap_pl.escape import markdown, say, terminal
from leap_pl.gates import BernoulliGate, Gate, NMGate
from leap_pl.inputs.records import WEIGHTS
from leap_pl.inputs.register import running_verb
from leap_pl.kernels.compiled import can_compile
from leap_pl.oneshot.methods import METHODS
from leap_pl.prior.settings import NO_METHOD
from leap_pl.training.memory import device_bytes, expected_bytes
from leap_pl.training.module import LeapModule
from leap_pl.training.schedules import Annealing, Schedule
from leap_pl.training.validation import Measured
from leap_pl.training.weights import NONE, parameters_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FEW_TOKENS = 10_000_000  # for which the paper's schedule is too slow, as far as was measured: docs/recipes.md
FEW_STEPS = 50  # of some micro-batches each
LIBRARIES_GIB = 2  # allowance for driver, libraries, communication buffers and fragmentation; not measured
RECIPES: dict[type[Gate], str] = {BernoulliGate: "--config short", NMGate: "--config short --config 2of4"}  # for those


class RunReport(L.Callback):
    """Callback that prints the plan once the base model is loaded, before a prior is made, and the verdict at the end.

    The plan says what is learned, with what, on how much text, in how much memory, and where it is written. The verdict
    has the perplexities of the mask, the dense model and the prior, and the command that exports the mask. TensorBoard
    gets both as texts. A checkpoint keeps the perplexity of the prior, for the verdict of a resumed run.
    """

    def __init__(self) -> None:
        """Initialize without a plan."""
        super().__init__()
        self.plan: dict[str, str] = {}
        self._start: Measured | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Ask the module to call back when its base model is loaded."""
        assert isinstance(pl_module, LeapModule)
        if stage == "fit":
            self._start = None  # that of a checkpoint is loaded later
            pl_module.when_loaded.append(lambda model: self._print_plan(trainer, pl_module, model))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the plan."""
        _log_text(
            trainer, "plan", "\n".join(f"- {markdown(name)}: {markdown(line)}" for name, line in self.plan.items())
        )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the perplexity of the prior, which the checkpoint of a resumed run holds, and which is loaded by now."""
        assert isinstance(pl_module, LeapModule)
        pl_module.validation.start = self._start

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the perplexity of the prior, for checkpoints."""
        assert isinstance(pl_module, LeapModule)
        self._start = pl_module.validation.start

    def state_dict(self) -> dict[str, Any]:
        """Return the perplexity of the prior."""
        return {"start": None if self._start is None else asdict(self._start)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the perplexity of the prior."""
        start = state_dict["start"]
        self._start = None if start is None else Measured.read(start.get("value"), start)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print and log the verdict, if the run is finished and its mask is written."""
        assert isinstance(pl_module, LeapModule)
        pl_module.validation.start = self._start  # also of a run that was finished before, which has no first step
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if trainer.is_global_zero and isinstance(callback, MaskExport) and callback.written is not None:
                verdict = verdict_of(pl_module, *callback.written, step=trainer.global_step)
                say(f"leap_pl {running_verb()}: {verdict}")
                _log_text(trainer, "verdict", markdown(verdict))

    def _print_plan(self, trainer: L.Trainer, module: LeapModule, model: "PreTrainedModel") -> None:
        self.plan = plan_of(trainer, module, model)
        width = max(map(len, self.plan))
        lines = [f"{name:<{width}}  {terminal(line)}" for name, line in self.plan.items()]
        rank_zero_only(say)("\n".join(lines), sys.stderr, lines=True)


def plan_of(trainer: L.Trainer, module: LeapModule, model: "PreTrainedModel") -> dict[str, str]:
    """Return the plan of a run: heading → one line.

    Args:
        trainer: Trainer of the run.
        module: Module that learns, whose gated weights are found.
        model: Its base model, still without gates.
    """
    data: Any = getattr(trainer, "datamodule", None)
    steps = trainer.max_steps
    gated, total = sum(module.sizes.values()), sum(parameter.numel() for parameter in model.parameters())
    probe = module.probe()
    logits = round(gated * sum(p.numel() for p in probe.first.parameters()) / module.sizes[next(iter(probe))])
    are = "will be" if logits else "are"
    form = "" if probe.form == "unstructured" else f", {probe.form}"
    plan = {
        "model": f"{module.base_model}, {str(model.dtype).removeprefix('torch.')}: {gated:,} of {total:,} weights are "
        f"gated, {len(module.sizes)} tensors, and {module.asked_sparsity:.1%} of them {are} removed "
        f"({type(probe.first).__name__}{form})"
    }
    tokens = 0
    if hasattr(data, "seq_length") and hasattr(data, "batch_size"):
        tokens = data.batch_size * data.seq_length
        parts = f"{data.batch_size} × {data.seq_length:,} tokens"
        counts = ((trainer.accumulate_grad_batches, "micro-batches"), (data_rank(trainer)[1], "ranks"))
        parts += "".join(f" × {count} {what}" for count, what in counts if count > 1)
        a_step = tokens * trainer.accumulate_grad_batches * data_rank(trainer)[1]
        plan["text"] = f"{getattr(data, 'text', '')}: {a_step * steps:,} tokens, {a_step:,} a step ({parts})"
    plan["steps"] = f"{steps:,}, {_optimizer(module)}; {_annealing(module)}" if logits else f"{steps:,}"
    new = tokens and module.resumes_from is None and type(probe.first) in RECIPES
    if new and module.annealing == Annealing() and a_step * steps < FEW_TOKENS:
        few = f"for few, {RECIPES[type(probe.first)]} before all other options"  # which it would override
        plan["schedule"] = f"α and τ are the paper's, for 2.1 billion tokens; {few}"
    if tokens and module.resumes_from is None and steps < FEW_STEPS and trainer.accumulate_grad_batches > 1:
        plan["few steps"] = f"only {steps}; lower --trainer.accumulate_grad_batches for more of them"
    if module.trained.kind != NONE:
        plan["weights"] = _weights(module)
    plan["losses"] = _losses(module)
    if logits and isinstance(probe.first, BernoulliGate) and module.objective.budget == 0:
        plan["budget"] = "none, so that nothing holds the soft mask at the target density, at which it is cut"
    plan["prior" if logits else "mask"] = _prior(module)
    ranks = 1 if module.mesh is None else module.mesh.size()
    training = module.trained
    trained = parameters_of(training.kind, training.settings, module.weights, model, 1 - module.sparsity)
    buffers = round(gated * sum(b.nbytes for b in probe.first.buffers()) / module.sizes[next(iter(probe))])
    gib = expected_bytes(module, model, logits, tokens, ranks, trained, buffers) / 2**30
    size = f"{gib:.1f} GiB" if gib >= 1 else f"{1024 * gib:.0f} MiB"
    plan["memory"] = f"about {size} on each device, without libraries and fragmentation"
    there = device_bytes(trainer.strategy.root_device)
    if there is not None and (gib + LIBRARIES_GIB) * 2**30 > there:
        ways = ["--trainer.strategy DDPStrategy --trainer.strategy.gradient_as_bucket_view true"]
        ways *= copies_gradients(trainer)
        ways += ["--model.activation_checkpointing true"] * (not module.activation_checkpointing)
        if tokens and data.batch_size > 1:  # with more micro-batches a step, which then is the same
            windows = data.batch_size * trainer.accumulate_grad_batches
            ways += [f"--data.batch_size 1 --trainer.accumulate_grad_batches {windows}"]
        ways += ["--config low_memory"] * (module.logits_dtype != torch.bfloat16)
        ways += ["--config fsdp2 on several" if module.mesh is None else "more devices"]
        plan["memory"] += (
            f": with {LIBRARIES_GIB} GiB for those more than its {there / 2**30:.1f} GiB; add {', then '.join(ways)}"
        )
    folder, curves = mask_place(trainer), [str(logger.log_dir) for logger in trainer.loggers if logger.log_dir]
    saving = (one for one in trainer.checkpoint_callbacks if isinstance(one, SavingCheckpoint))
    saved = next((Path(one.dirpath) for one in saving if one.dirpath is not None), folder)
    files = f"prior{', weights' if module.trained.kind != NONE else ''} and mask"
    what = f"checkpoints, {files}" if saved == folder else f"checkpoints to {saved}, {files}"
    plan["writes"] = f"{what} to {folder}" + f"; curves to {', '.join(curves)}" * bool(curves)
    if can_compile(trainer.strategy.root_device):
        plan["first step"] = "takes up to some minutes longer: the gates' kernels are compiled"
    return plan


def verdict_of(module: LeapModule, mask: Path, sparsity: float, *, step: int) -> str:
    """Return the verdict of a finished run in one line: its perplexities, its mask, and the next command."""
    perplexities = module.validation.summary(step)
    perplexities += ", " if perplexities else ""
    folders = ("sparse-model", *(f"sparse-model-{number}" for number in range(2, 100)))
    free = next((folder for folder in folders if not Path(folder).exists()), folders[0])
    command = f"leap_pl export --mask {shlex.quote(str(mask))} --output_dir {free}"
    weights = f", weights {mask.with_name(WEIGHTS)}" if module.trained else ""
    return f"{perplexities}sparsity {sparsity:.6f}, mask {mask}{weights}; next: {command}"


def _optimizer(module: LeapModule) -> str:
    learned = module.learned_with()
    optimizer, scheduler = learned["model.optimizer"], learned["model.lr_scheduler"]
    curve = f"{module.warmup_steps} warm-up steps and a cosine to 0"
    if scheduler is not None:
        curve = scheduler["class_path"].rpartition(".")[2]
    rate = optimizer["init_args"].get("lr")
    return f"{optimizer['class_path'].rpartition('.')[2]} with learning rate {rate} ({curve})"


def _weights(module: LeapModule) -> str:
    training, learned = module.trained.settings, module.learned_with()
    optimizer, scheduler = learned["model.optimizer"], learned["model.lr_scheduler"]
    curve = f"{training.warmup_steps} warm-up steps"
    if scheduler is not None:  # which may set the rate too
        curve = f"by {scheduler['class_path'].rpartition('.')[2]}"
    start = "" if module.trained.start is None else f", from {module.trained.start}"
    return (
        f"{module.trained.kind}{start}, {optimizer['class_path'].rpartition('.')[2]} with learning rate {training.lr} "
        f"({curve})"
    )


def _annealing(module: LeapModule) -> str:
    def moved(schedule: Schedule) -> str:
        return f"{schedule.start:g} → {schedule.end:g}"

    return f"α {moved(module.annealing.alpha)}, τ {moved(module.annealing.tau)}"


def _losses(module: LeapModule) -> str:
    terms = [(term.name, term.weight_at(0.0), term.weight_at(1.0)) for term in module.objective.terms()]
    # The sum makes 0 of -0.
    moved = {
        name: f"{start:g}" + (f" → {end + 0:g}" if start != end else "") for name, start, end in terms if start or end
    }
    return ", ".join(f"{name} {weight}" for name, weight in moved.items())


def _prior(module: LeapModule) -> str:
    prior = module.run_prior.settings
    if module.resumes_from is not None:
        return f"as in {module.resumes_from}, which this run resumes"
    if prior.mask is not None:
        words = f"{prior.mask}"
    elif prior.method == NO_METHOD:
        return "none"
    else:
        reads = METHODS[prior.method].needs is not None
        words = f"{prior.method} of {prior.sequences} sequences" if reads else prior.method
    words += ", allocated by Fisher information" if prior.fisher is not None else ""
    return words + (", graded" if prior.graded else "")


def _log_text(trainer: L.Trainer, name: str, text: str) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero and text:
            logger.experiment.add_text(f"at_a_glance/{name}", text, trainer.global_step)
