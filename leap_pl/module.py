"""LeapModule: a frozen language model whose mask is learned."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from jsonargparse.typing import NonNegativeInt, OpenUnitInterval
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics.text import Perplexity

from leap_pl import checkpoint as checkpoints
from leap_pl.errors import UserError, listing
from leap_pl.gates import BernoulliGate, Gate, GateState, attach
from leap_pl.models import (
    Dtype,
    Weight,
    check_numbers,
    decoder_blocks,
    find_weights,
    load_model,
    longest_sequence,
    model_fingerprint,
)
from leap_pl.objective import Objective, kept_norm, language_losses, sparsity_budget, split_model
from leap_pl.prior import Prior
from leap_pl.rewind import rewind
from leap_pl.schedules import warmup_cosine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from leap_pl.masks import MaskSet


class NonFiniteError(UserError):
    """A term of the loss, or a logit, is infinite or NaN: says at which step, and where."""

    def __init__(self, step: int, where: str, dtype: torch.dtype | None = None) -> None:
        remedy = "Lower the learning rate (model.optimizer.init_args.lr), or set trainer.gradient_clip_val."
        if dtype == torch.float16:
            remedy = "float16 ends at 65504, which activations can pass: set --model.dtype bfloat16 or float32."
        told = f"learning broke at step {step}: {where}. The run stops, and the checkpoints before that step stand."
        super().__init__(f"{told} {remedy}")


class LeapModule(L.LightningModule):
    """Learn one mask logit for every gated weight of a frozen causal language model (LEAP).

    Paper: https://arxiv.org/abs/2605.17289. The mask is a parametrization of the model's weights, see
    :mod:`leap_pl.gates`; the loss is :class:`leap_pl.objective.Objective`; the temperature and logit scale
    are moved by the :class:`leap_pl.callbacks.Annealing` callback.

    .. code-block:: yaml

        model:
          base_model: Qwen/Qwen2.5-0.5B
          sparsity: 0.5
          objective: {lm: 1.0, distillation: 0.0}
          prior: {method: wanda}

    The teacher of distillation is the same model with its gates off. Checkpoints hold the logits, not the
    model.
    """

    def __init__(
        self,
        base_model: str,
        sparsity: OpenUnitInterval = 0.5,
        gate: Callable[[Weight, GateState], Gate] = BernoulliGate,
        targets: list[str] | None = None,
        ignore: Sequence[str] = (),
        objective: Objective = Objective(),  # noqa: B008  (frozen)
        prior: Prior = Prior(),  # noqa: B008  (frozen)
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(
            parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        ),
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup_steps: NonNegativeInt = 5,
        dtype: Dtype = "auto",
        activation_checkpointing: bool = False,
        revision: str | None = None,
        trust_remote_code: bool = False,
        seed: int = 0,
    ) -> None:
        """Take the settings; the model is loaded when the run begins.

        Args:
            base_model: Hub id, local folder or local GGUF file of a causal language model.
            sparsity: Share of the gated weights to remove, between 0 and 1; the exported mask has exactly it.
            gate: The kind of mask.
            targets: Weights to gate: class names, module names, or ``re:`` regular expressions. By default all
                linears and stacked experts of the decoder blocks.
            ignore: Weights to leave dense, in the same form.
            objective: The terms of the loss and their weights.
            prior: The mask that the logits lean towards at the start.
            optimizer: Of the logits.
            lr_scheduler: Stepped once an optimizer step. By default ``warmup_steps`` up, then a cosine to 0.
            warmup_steps: Of the default schedule.
            dtype: Of the frozen weights and the computation; ``auto`` is bfloat16 where the hardware multiplies
                it fast, else float32. Logits are float32 always.
            activation_checkpointing: Recompute each decoder block in the backward pass: less memory, a third
                more time.
            revision: Of the base model on the hub.
            trust_remote_code: Run code that comes with the base model.
            seed: Of the noise and of the logits' start.
        """
        super().__init__()
        self.save_hyperparameters(ignore=["gate", "optimizer", "lr_scheduler"], logger=False)
        # From a checkpoint they come as plain dictionaries, and into one they go as such.
        self.objective = Objective(**objective) if isinstance(objective, dict) else objective
        self.prior_settings = Prior(**prior) if isinstance(prior, dict) else prior
        self.hparams.update(objective=asdict(self.objective), prior=asdict(self.prior_settings), ignore=list(ignore))
        # Values of restricted types are no plain numbers, and a checkpoint is read with weights_only.
        self.hparams.update(sparsity=float(sparsity), warmup_steps=int(warmup_steps))
        self.base_model, self.revision, self.sparsity = base_model, revision, float(sparsity)
        self.targets, self.ignore = targets, list(ignore)
        self.make_gate, self.make_optimizer, self.make_scheduler = gate, optimizer, lr_scheduler
        self.warmup_steps, self.dtype_name = int(warmup_steps), dtype
        self.activation_checkpointing = activation_checkpointing
        self.trust_remote_code = trust_remote_code
        self.strict_loading = False  # checkpoints hold logits only; on_load_checkpoint compares names and shapes
        self.state = GateState(seed=seed)
        self.model: PreTrainedModel | None = None
        self.prior: MaskSet | None = None
        self.dense_perplexity: float | None = None
        self.hard_perplexity: float | None = None  # of the last validation
        self.hard_metric, self.dense_metric = Perplexity(), Perplexity()
        self.terms: dict[str, Tensor] = {}
        self.told: dict[str, Any] = {}  # settings of callbacks that a mask's provenance should tell

    # -- the gated model ----------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load the base model, make the prior, put the gates on. Does nothing the second time."""
        if self.model is not None:
            return
        model = load_model(
            self.base_model,
            revision=self.revision,
            dtype=fast_dtype(self._device_of_run()) if self.dtype_name == "auto" else self.dtype_name,
            dropout=False,
            trust_remote_code=self.trust_remote_code,
        )
        check_numbers(model, self.base_model)
        self._check_length(model)
        self.weights = find_weights(model, self.targets, self.ignore)
        self.fingerprint = model_fingerprint(model)
        self.sizes = {name: weight.parameter.numel() for name, weight in self.weights.items()}
        self.dense_norm = sum(float(weight.parameter.float().norm()) for weight in self.weights.values())
        self.groups = list(self._groups(model))
        self.states, self.head = split_model(model)
        if self._fitting():
            self.prior = self.prior_settings.make(
                model,
                self.weights,
                base_model=self.base_model,
                sparsity=self.sparsity,
                data=getattr(self.trainer, "datamodule", None),
                device=self._device_of_run(),
            )
        model.requires_grad_(False)
        self.gates = attach(self.weights, self.make_gate, self.state)
        for name, gate in self.gates.items():
            gate.start_from(self.prior.masks[name] if self.prior else None, self.state.seed)
        if self.activation_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        # from_pretrained leaves it in eval mode, in which activation checkpointing is silently off. There is
        # no dropout in it: load_model removed that.
        self.model = model.train()

    def _groups(self, model: nn.Module) -> Iterator[list[str]]:
        """The names of the weights that share a mean in the sparsity budget."""
        if self.objective.budget_scope == "global":
            yield list(self.weights)
            return
        layers: list[int | None] = [*range(len(decoder_blocks(model)[1])), None]
        for layer in layers:
            names = [name for name, weight in self.weights.items() if weight.layer == layer]
            if names:
                yield names

    def _fitting(self) -> bool:
        return self._trainer is not None and self.trainer.state.fn == "fit"

    def _device_of_run(self) -> torch.device:
        return self.trainer.strategy.root_device if self._trainer is not None else torch.device("cpu")

    def _check_length(self, model: nn.Module) -> None:
        data = getattr(self._trainer, "datamodule", None)
        asked, longest = getattr(data, "seq_length", None), longest_sequence(model.config)
        if asked and longest and asked > longest:
            raise UserError(
                f"data.seq_length is {asked} and {self.base_model} has positions for {longest} tokens. "
                f"Set --data.seq_length {longest} or less."
            )

    # -- learning -----------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss of one micro-batch; ``batch["input_ids"]`` is (B, L) tokens."""
        windows = self.trainer.accumulate_grad_batches
        self.state.step = self.global_step
        self.state.micro_batch = (batch_idx % windows) * self.trainer.world_size + self.trainer.global_rank
        for gate in self.gates.values():
            gate.clear()
        loss, lm, kl = self._language_losses(batch["input_ids"])
        kept: dict[str, Tensor] = {}
        for name, gate in self.gates.items():
            if gate.kept is None:  # experts that no token was routed to
                gate(self.weights[name].parameter)
            assert gate.kept is not None
            kept[name] = gate.kept
        budget = sparsity_budget(kept, self.sizes, 1 - self.sparsity, self.groups)
        norm = kept_norm((gate.energy for gate in self.gates.values()), self.dense_norm)
        fading = 1 - self.global_step / self.trainer.max_steps
        loss = loss + self.objective.budget * budget - self.objective.weight * fading * norm
        self.terms = {"loss": loss.detach(), "lm": lm, "distillation": kl, "budget": budget.detach()}
        self.terms["kept_norm"] = norm.detach()
        self.log("loss", loss.detach(), prog_bar=True, logger=False)
        if loss.device.type == "cpu":  # elsewhere a look at the number would make the host wait at every step
            self.check_finite()
        return loss

    def _language_losses(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        targets = input_ids[:, 1:].reshape(-1)
        teacher = None
        if self.objective.distillation:
            with torch.no_grad(), self.state.passing("dense"):
                teacher = self.states(input_ids)[:, :-1].flatten(0, 1)
        hidden = self.states(input_ids)[:, :-1].flatten(0, 1)
        return language_losses(hidden, targets, self.head, self.objective, teacher)

    def check_finite(self, *, logits: bool = False) -> None:
        """Make sure that the last micro-batch's loss, and the logits if asked for, are numbers.

        Raises:
            NonFiniteError: A term of the loss or a logit is infinite or NaN.
        """
        values = {name: float(value) for name, value in self.terms.items()}
        broken = [f"{name} = {value:g}" for name, value in values.items() if not math.isfinite(value)]
        if broken:
            raise NonFiniteError(self.state.step, ", ".join(broken), self._dtype_of_model())
        if logits:
            for name, gate in self.gates.items():
                if not bool(torch.isfinite(gate.logits).all()):
                    raise NonFiniteError(self.state.step, f"the logits of {name} are infinite or NaN")

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Make sure that the gradients are numbers: a step with one that is not would spoil every logit.

        Raises:
            NonFiniteError: One is infinite or NaN.
        """
        if self.trainer.precision == "16-mixed":  # its scaler meets such gradients, and leaves the step out
            return
        gradients = {name: gate.logits.grad for name, gate in self.gates.items() if gate.logits.grad is not None}
        norm = nn.utils.get_total_norm(list(gradients.values()))
        if not math.isfinite(float(norm)):  # one look at the device
            broken = [name for name, gradient in gradients.items() if not bool(torch.isfinite(gradient).all())]
            where = f"the gradients of {listing(broken, 2)} are infinite or NaN" if broken else "the gradients overflow"
            raise NonFiniteError(self.state.step, where, self._dtype_of_model())

    def _dtype_of_model(self) -> torch.dtype | None:
        return None if self.model is None else self.model.dtype

    def configure_optimizers(self) -> Any:
        """One optimizer over all logits, and its schedule, stepped once an optimizer step."""
        total = self.trainer.max_steps
        if total < 1:
            raise UserError("trainer.max_steps is not set, and every schedule needs it. Add --trainer.max_steps N.")
        optimizer = self.make_optimizer([gate.logits for gate in self.gates.values()])
        if self.trainer.precision != "16-mixed":
            # A fused optimizer says that it unscales gradients itself, and Lightning then refuses to clip them;
            # without float16 there is no scale.
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        if self.make_scheduler is not None:
            scheduler = self.make_scheduler(optimizer)
        else:
            factor = partial(warmup_cosine, total=total, warmup=self.warmup_steps)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # -- validation ---------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Choose the hard mask of exactly the target sparsity, which is what is validated."""
        self.choose_hard_masks()

    def choose_hard_masks(self) -> None:
        """Give every gate its hard mask at exactly the target sparsity."""
        self.check_finite(logits=True)
        type(next(iter(self.gates.values()))).choose(self.gates, self.sparsity)

    def validation_step(self, batch: dict[str, Any] | Tensor, batch_idx: int) -> None:
        """Perplexity of the hard mask, and, once in a run, of the dense model."""
        input_ids = batch["input_ids"] if isinstance(batch, dict) else batch
        with self.state.passing("hard"):
            self._measure(self.hard_metric, input_ids)
        self.log("perplexity/hard", self.hard_metric, on_epoch=True, prog_bar=True)
        if self.dense_perplexity is None:
            with self.state.passing("dense"):
                self._measure(self.dense_metric, input_ids)

    def _measure(self, metric: Perplexity, input_ids: Tensor) -> None:
        hidden = self.states(input_ids)[:, :-1].flatten(0, 1)
        targets = input_ids[:, 1:].flatten()
        for start in range(0, len(targets), self.objective.chunk):
            part = slice(start, start + self.objective.chunk)
            metric.update(self.head(hidden[part]).float()[None], targets[None, part])

    def on_validation_epoch_end(self) -> None:
        """Keep the perplexities: the dense model's does not change."""
        self.hard_perplexity = float(self.hard_metric.compute())
        if self.dense_perplexity is None:
            self.dense_perplexity = float(self.dense_metric.compute())
        self.log("perplexity/dense", self.dense_perplexity)
        if self.trainer.sanity_checking:
            # Lightning keeps what is measured before the first step to itself; it is where the curves begin.
            start = {"perplexity/hard": self.hard_perplexity, "perplexity/dense": self.dense_perplexity}
            for logger in self.loggers:
                logger.log_metrics(start, step=0)

    # -- the mask -----------------------------------------------------------------------------------------

    def mask_set(self) -> "MaskSet":
        """The hard mask at exactly the target sparsity, as it is exported."""
        from leap_pl.masks import MaskSet

        self.choose_hard_masks()
        masks = {name: gate.hard_mask().cpu() for name, gate in self.gates.items()}
        return MaskSet(masks, checkpoints.provenance(self.identity()))

    # -- checkpoints --------------------------------------------------------------------------------------

    def identity(self) -> checkpoints.Identity:
        """What this run's checkpoints say of themselves."""
        return checkpoints.Identity(
            base_model=self.base_model,
            revision=self.revision,
            fingerprint=self.fingerprint,
            gate=checkpoints.describe_gate(next(iter(self.gates.values()))),
            sparsity=self.sparsity,
            targets=self.targets,
            ignore=self.ignore,
            max_steps=self.trainer.max_steps if self._fitting() else None,
            shapes={name: list(gate.shape) for name, gate in self.gates.items()},
            input_dims={name: gate.input_dim for name, gate in self.gates.items()},
            dense_perplexity=self.dense_perplexity,
            settings=self.settings(),
        )

    def settings(self) -> dict[str, Any]:
        """What a mask's provenance tells of how it was learned: plain values."""
        told = {"objective": asdict(self.objective), "prior": asdict(self.prior_settings), "seed": self.state.seed}
        told |= self.told
        if self._trainer is None:
            return told
        told["accumulate_grad_batches"] = self.trainer.accumulate_grad_batches
        data = getattr(self.trainer, "datamodule", None)
        if data is not None:
            keys = ("text", "validation_text", "seq_length", "batch_size", "seed")
            told["data"] = {key: getattr(data, key) for key in keys if hasattr(data, key)}
        for optimizer in self.trainer.optimizers[:1]:
            plain = {k: v for k, v in optimizer.defaults.items() if isinstance(v, bool | int | float)}
            told["optimizer"] = {"class": type(optimizer).__name__, **plain}
        if self.hard_perplexity is not None:
            told["perplexity"] = self.hard_perplexity
        if self.dense_perplexity is not None:
            told["dense_perplexity"] = self.dense_perplexity
        return told

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen model out: logits by weight name, and whose they are."""
        self.check_finite(logits=True)
        checkpoint["state_dict"] = {
            checkpoints.PREFIX + name: gate.logits.detach() for name, gate in self.gates.items()
        }
        checkpoint[checkpoints.KEY] = asdict(self.identity())
        rewind(self.trainer, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model or another run; map its logits to this module's names."""
        found = checkpoints.read_identity(checkpoint)
        checkpoints.check_same(found, self.identity())
        self.dense_perplexity, self.hard_perplexity = found.dense_perplexity, found.settings.get("perplexity")
        paths = {id(module): path for path, module in self.named_modules()}
        checkpoint["state_dict"] = {
            f"{paths[id(gate)]}.logits": checkpoint["state_dict"][checkpoints.PREFIX + name]
            for name, gate in self.gates.items()
        }


def fast_dtype(device: torch.device) -> Dtype:
    """bfloat16 where ``device`` multiplies it fast, else float32."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device.type == "cpu":
        # Without the instructions bfloat16 is emulated, and slower than float32.
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return "bfloat16" if fast else "float32"
    return "float32"
