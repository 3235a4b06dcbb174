"""LeapModule: a frozen language model whose mask is learned."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import torch
from jsonargparse.typing import NonNegativeInt, OpenUnitInterval
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from leap_pl import checkpoint as checkpoints
from leap_pl import finite
from leap_pl.allocator import keep_freed_memory
from leap_pl.clipping import clip_by_norm
from leap_pl.denormals import flush_denormals
from leap_pl.errors import UserError
from leap_pl.gates import BernoulliGate, Gate, GateState, attach
from leap_pl.models import Dtype, fast_dtype, load_model, longest_sequence
from leap_pl.objective import Objective, budget_groups, kept_norm, language_losses, sparsity_budget, split_model
from leap_pl.optimizer import check_rounding
from leap_pl.parallel import (
    RankZero,
    as_rank_zero_has,
    check_inside_blocks,
    data_rank,
    mean_over_ranks,
    reduce_only,
    saves_shards,
    shard,
    sharding_mesh,
)
from leap_pl.prior import Calibration, Prior, SharedPrior, make_and_share
from leap_pl.rewind import rewind
from leap_pl.schedules import warmup_cosine
from leap_pl.shards import copy_part_, gathered
from leap_pl.validation import Validation
from leap_pl.weights import Weight, check_numbers, decoder_blocks, find_weights, model_fingerprint

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

    from leap_pl.masks import MaskSet


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
        logits_dtype: Literal["float32", "bfloat16"] = "float32",
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
                it faster, which is measured on a CPU, else float32.
            logits_dtype: Of the logits and their gradients, whatever the precision of the rest. ``bfloat16`` takes
                an optimizer that rounds at random (:class:`leap_pl.optimizer.PackedAdamW`): see docs/memory.md.
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
        self.logits_dtype: torch.dtype = getattr(torch, logits_dtype)
        self.activation_checkpointing = activation_checkpointing
        self.trust_remote_code = trust_remote_code
        self.strict_loading = False  # checkpoints hold logits only; on_load_checkpoint compares names and shapes
        self.state = GateState(seed=seed)
        self.model: PreTrainedModel | None = None
        self.mesh: DeviceMesh | None = None  # of the ranks that decoder blocks are sharded over
        self.gates: dict[str, Gate] = {}
        self.priors: dict[str, MaskSet] = {}  # on rank zero
        self.resumes_from: str | None = None
        self.register_state_dict_post_hook(checkpoints.keep_gates_only)
        self.validation = Validation()
        self.terms: dict[str, Tensor] = {}
        self.gradient_norm: Tensor | None = None  # of the optimizer step at hand, before it is clipped
        self.norms: list[tuple[int, Tensor]] = []  # (step, gradient norm) that were not looked at yet
        self.told: dict[str, Any] = {}  # settings of callbacks that a mask's provenance should tell

    @property
    def prior(self) -> "MaskSet | None":
        """The mask that learning starts from, once the model is loaded for a fit; on rank zero."""
        return self.priors.get("prior")

    # -- the gated model ----------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load the base model, make the prior, put the gates on. Does nothing the second time."""
        if self.model is not None:
            return
        keep_freed_memory()
        self.mesh = sharding_mesh(self._trainer)
        dtype = self.dtype_name
        if dtype == "auto":  # measured, so that two ranks may find differently
            dtype = as_rank_zero_has(fast_dtype(self._device_of_run()))
        model = load_model(
            self.base_model,
            revision=self.revision,
            dtype=dtype,
            dropout=False,
            trust_remote_code=self.trust_remote_code,
        )
        check_numbers(model, self.base_model)
        self._check_length(model)
        self.weights = find_weights(model, self.targets, self.ignore)
        if self.mesh is not None:
            check_inside_blocks(self.weights)
        self.fingerprint = model_fingerprint(model)
        self.sizes = {name: weight.parameter.numel() for name, weight in self.weights.items()}
        self.dense_norm = sum(float(weight.parameter.float().norm()) for weight in self.weights.values())
        layers = {name: weight.layer for name, weight in self.weights.items()}
        self.groups = budget_groups(layers, self.objective.budget_scope)
        prior = self._make_prior(model)
        model.requires_grad_(False)
        if self.mesh is None:
            self._put_gates(self.weights, prior)
        else:
            self._shard(model, self.mesh, prior)
        prior.close()
        with self.state.passing("dense"):
            self.states, self.head = split_model(model)
        if self.activation_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        # from_pretrained leaves it in eval mode, in which activation checkpointing is silently off. There is
        # no dropout in it: load_model removed that.
        self.model = model.train()
        reduce_only(self, {checkpoints.path_of(*place) for place in self._learned()})
        if self.mesh is not None and self.resumes_from is not None:
            # Lightning loads a sharded run's optimizer before it asks on_load_checkpoint.
            checkpoint = checkpoints.load_checkpoint(self.resumes_from)
            checkpoints.check_same(checkpoints.read_identity(checkpoint, self.resumes_from), self.identity())

    def _put_gates(self, weights: dict[str, Weight], prior: SharedPrior) -> None:
        gates = attach(weights, self.make_gate, self.state, self.logits_dtype)
        for name, gate in gates.items():
            masks = prior.of(name, weights[name])
            gate.start_from(masks.pop("prior", None), self.state.seed, **masks)
        self.gates |= gates

    def _shard(self, model: "PreTrainedModel", mesh: "DeviceMesh", prior: SharedPrior) -> None:
        def prepare(index: int, block: nn.Module) -> None:
            self._put_gates({name: weight for name, weight in self.weights.items() if weight.layer == index}, prior)
            # Lightning does so later, when FSDP2 would not notice another dtype; then nothing is left to do.
            convert(block)

        convert = self.trainer.precision_plugin.convert_module
        shard(model, decoder_blocks(model)[1], mesh, prepare)
        convert(model).to(self._device_of_run())

    def _make_prior(self, model: "PreTrainedModel") -> SharedPrior:
        """The prior, or priors, made on rank zero, whose ``self.priors`` they are."""
        # First, for a prior may take minutes: can this kind of mask be what is asked of it?
        first = self.make_gate(next(iter(self.weights.values())), self.state)
        self.sparsity = first.exact_sparsity(self.sparsity)
        if not self._fitting():
            return SharedPrior({}, RankZero())
        check_rounding(self._optimizer_of([nn.Parameter(torch.zeros(1))]), self.logits_dtype)
        calibration = Calibration(
            base_model=self.base_model,
            data=getattr(self.trainer, "datamodule", None),
            device=self._device_of_run(),
            progress=self.trainer.progress_bar_callback is not None,
        )
        shared = make_and_share(self.prior_settings, model, self.weights, first, self.sparsity, calibration)
        self.priors = dict(shared.priors)
        return shared

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

    def on_fit_start(self) -> None:
        """Nearly shut gates make denormal numbers, and those make some processors slow: they are taken for 0."""
        flush_denormals()

    def teardown(self, stage: str) -> None:
        """Denormal numbers are numbers again."""
        if stage == "fit":
            flush_denormals(False)

    # -- learning -----------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss of one micro-batch; ``batch["input_ids"]`` is (B, L) tokens."""
        windows = self.trainer.accumulate_grad_batches
        self.state.step = self.global_step
        rank, ranks = data_rank(self.trainer)
        self.state.micro_batch = (batch_idx % windows) * ranks + rank
        for gate in self.gates.values():
            gate.clear()
        loss, lm, kl = self._language_losses(batch["input_ids"])
        kept: dict[str, Tensor] = {}
        for name, gate in self.gates.items():
            if gate.kept is None:  # experts that no token was routed to
                if self.mesh is not None:
                    raise UserError(
                        f"{name} was not used by a micro-batch, and in a sharded run each is used by every one. "
                        "Leave it out with --model.ignore, or use --trainer.strategy ddp."
                    )
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
        if not self.looks_later:
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

    def mean_over_ranks(self, values: dict[str, float]) -> dict[str, float]:
        """The mean of each value over the ranks of the run, every one of which makes this call."""
        return values if self._trainer is None else mean_over_ranks(values, self.trainer)

    def check_finite(self, *, logits: bool = False) -> None:
        """Make sure that the last micro-batch's loss, the gradients since, and the logits if asked for, are numbers.

        Raises:
            NonFiniteError: A term of the loss, a gradient or a logit is infinite or NaN.
        """
        norms, self.norms = self.norms, []
        finite.check_norms(norms, self._dtype_of_model())
        finite.check_terms(self.terms, self.state.step, self._dtype_of_model())
        if logits:
            finite.check_logits(self._learned(), self.state.step)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the norm of the gradients. On a CPU, make sure that it is a number, for else all logits are spoiled.

        Elsewhere :meth:`check_finite` does so at the next log step, and before anything is saved.

        Raises:
            NonFiniteError: One is infinite or NaN.
        """
        self.gradient_norm = None
        if self.trainer.precision == "16-mixed":
            return  # its scaler meets such gradients, and leaves the step out
        self.gradient_norm = finite.norm_of_gradients(self._learned())
        if self.looks_later:
            self.norms.append((self.state.step, self.gradient_norm))
        else:
            finite.check_gradients(self._learned(), self.state.step, self._dtype_of_model(), self.gradient_norm)

    @property
    def looks_later(self) -> bool:
        """Whether to look at a number makes the host wait for the device: it is then done at log steps only."""
        return self.device.type != "cpu"

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as Lightning does, by the norm that is known already."""
        if gradient_clip_val and self.gradient_norm is not None and gradient_clip_algorithm in (None, "norm"):
            clip_by_norm(optimizer, self._learned().values(), gradient_clip_val, self.gradient_norm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def _learned(self) -> dict[tuple[str, str], nn.Parameter]:
        """What is learned: (weight name, attribute of its gate) → parameter."""
        gates = self.gates.items()
        return {(name, part): parameter for name, gate in gates for part, parameter in gate.named_parameters()}

    def _dtype_of_model(self) -> torch.dtype | None:
        return None if self.model is None else self.model.dtype

    def configure_optimizers(self) -> Any:
        """One optimizer over all logits, and its schedule, stepped once an optimizer step."""
        total = self.trainer.max_steps
        if total < 1:
            raise UserError(
                f"trainer.max_steps is {total}, and every schedule needs a number of steps. Add --trainer.max_steps N."
            )
        optimizer = self._optimizer_of(list(self._learned().values()))
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

    def _optimizer_of(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        try:
            return self.make_optimizer(parameters)
        except (ValueError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"model.optimizer does not take its settings: {reason}.") from error

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
        for mode in self.validation.wanted:
            with self.state.passing(mode):
                self.validation.update(mode, self.states(input_ids), input_ids, self.head, self.objective.chunk)
        self.log("perplexity/hard", self.validation.hard_metric, on_epoch=True, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        """Keep the perplexities: the dense model's does not change."""
        hard, dense = self.validation.finish()
        self.log("perplexity/dense", dense, sync_dist=True)  # equal already: Lightning would warn
        if self.trainer.sanity_checking:
            # Lightning keeps what is measured before the first step to itself; it is where the curves begin.
            for logger in self.loggers:
                logger.log_metrics({"perplexity/hard": hard, "perplexity/dense": dense}, step=0)

    # -- the mask -----------------------------------------------------------------------------------------

    def mask_set(self) -> "MaskSet":
        """The hard mask at exactly the target sparsity, as it is exported: whole, on every rank."""
        from leap_pl.masks import MaskSet

        self.choose_hard_masks()
        masks = {name: gathered(gate.hard_mask()).cpu() for name, gate in self.gates.items()}
        return MaskSet(masks, checkpoints.provenance(self.identity()))

    def save_mask(self, path: str | Path) -> tuple[int, int]:
        """Write :meth:`mask_set` to the MaskSet file ``path``, of which no more than one weight's mask is in memory.

        Of several ranks, each of which makes this call, the first one writes.

        Returns:
            How many gated weights are kept, and of how many.
        """
        from leap_pl.masks import write_masks

        self.choose_hard_masks()
        shapes = {name: list(gate.shape) for name, gate in self.gates.items()}
        identity = self.identity()

        def mask(name: str) -> Tensor:
            return gathered(self.gates[name].hard_mask()).cpu()

        if self._trainer is None or self.trainer.is_global_zero:
            return write_masks(path, shapes, mask, checkpoints.provenance(identity))
        counts = [(int(part.sum()), part.numel()) for part in map(mask, sorted(shapes))]
        return sum(kept for kept, _ in counts), sum(total for _, total in counts)

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
            ranks=data_rank(self.trainer)[1] if self._fitting() else None,
            accumulation=self.trainer.accumulate_grad_batches if self._fitting() else None,
            shapes={name: list(gate.shape) for name, gate in self.gates.items()},
            input_dims={name: gate.input_dim for name, gate in self.gates.items()},
            dense_perplexity=self.validation.dense,
            settings=self.settings(),
        )

    def settings(self) -> dict[str, Any]:
        """What a mask's provenance tells of how it was learned: plain values."""
        told = {"objective": asdict(self.objective), "prior": asdict(self.prior_settings), "seed": self.state.seed}
        told["logits_dtype"] = str(self.logits_dtype).removeprefix("torch.")
        told["dtype"] = None if self.model is None else str(self.model.dtype).removeprefix("torch.")
        told |= self.told
        if self._trainer is None:
            return told
        told |= checkpoints.settings_of_run(self.trainer)
        perplexities = {"perplexity": self.validation.hard, "dense_perplexity": self.validation.dense}
        return told | {name: value for name, value in perplexities.items() if value is not None}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen model out: logits by weight name, and whose they are."""
        self.check_finite(logits=True)
        checkpoint[checkpoints.KEY] = asdict(self.identity())
        rewind(self.trainer, checkpoint)
        if saves_shards(self._trainer):
            return  # each rank its own, under this module's names: ModelParallelStrategy reads them back
        if self.mesh is None:
            gates = self.gates.items()
            state = {f"{part}.{name}": tensor for name, gate in gates for part, tensor in gate.stored().items()}
            names = {id(parameter): name for name, parameter in self.named_parameters()}
            groups = [group for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
            numbered = [names[id(parameter)] for group in groups for parameter in group["params"]]
        else:  # gathered on rank zero; nothing on the others
            state = checkpoints.by_weight(checkpoint["state_dict"])
            numbered = [name for name, _ in self.named_parameters()]
        checkpoint["state_dict"] = state
        for optimizer_state in checkpoint.get("optimizer_states", []):
            checkpoints.name_parameters(optimizer_state, numbered)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model or another run; map its logits to this module's names."""
        found = checkpoints.read_identity(checkpoint)
        checkpoints.check_same(found, self.identity())
        self.validation.dense, self.validation.hard = found.dense_perplexity, found.settings.get("perplexity")
        if self._fitting():
            checkpoints.count_for_ranks(checkpoint, found, self.identity())
        places = [(name, part) for name, gate in self.gates.items() for part in gate.stored()]
        if self.mesh is None:
            stored = checkpoint["state_dict"]
            checkpoint["state_dict"] = {checkpoints.path_of(*place): stored[".".join(place[::-1])] for place in places}
        elif Path(path := self.trainer.ckpt_path or "").is_file():
            # Of a folder Lightning has loaded each rank's part; of a file each rank takes its own.
            stored = checkpoints.load_checkpoint(path)["state_dict"]
            for name, part in places:
                copy_part_(getattr(self.gates[name], part), stored[f"{part}.{name}"])
