"""LeapModule: learns the mask of a language model, or trains the weights that a mask keeps, or both."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Self

import torch
from jsonargparse.typing import NonNegativeInt, OpenUnitInterval
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.compile import to_uncompiled
from torch import Tensor, nn

from leap_pl.base_model.loading import Dtype
from leap_pl.base_model.place import check_trusted
from leap_pl.base_model.weights import Weight
from leap_pl.checkpoints.identity import read_identity
from leap_pl.checkpoints.layout import load_checkpoint, tensors_of
from leap_pl.checkpoints.settings import CODE_OF, Settings, settings_to_store
from leap_pl.distributed.strategy import data_rank, has_buckets, mean_over_ranks
from leap_pl.errors import UserError
from leap_pl.gates import PART, BernoulliGate, FixedGate, Gate, GateState
from leap_pl.inputs.hub import check_revision
from leap_pl.inputs.plain_values import plain_paths
from leap_pl.inputs.ranges import check_numbers, check_whole
from leap_pl.losses.objective import Objective
from leap_pl.losses.term import MicroBatch
from leap_pl.prior import Prior
from leap_pl.training import finite, optimization, run_settings
from leap_pl.training.arguments import check_arguments
from leap_pl.training.clipping import check_clipping, clip_by_norm
from leap_pl.training.fixed_mask import FixedMask, starts_finished
from leap_pl.training.of_class import of_class
from leap_pl.training.optimizers import check_rounding
from leap_pl.training.schedules import Annealing
from leap_pl.training.trainer_checks import check_trainer, check_unused
from leap_pl.training.validated_module import ValidatedModule
from leap_pl.training.weights import NONE, WeightTraining


class LeapModule(ValidatedModule):
    """Learn one mask logit for every gated weight of a frozen causal language model (LEAP).

    >>> from lightning import Trainer
    >>> from leap_pl import LeapModule, TextDataModule
    >>> module = LeapModule("Qwen/Qwen2.5-0.5B", sparsity=0.5)
    >>> data = TextDataModule(text="text.jsonl", seq_length=2048)
    >>> Trainer(max_steps=2000, accumulate_grad_batches=32, gradient_clip_val=1.0).fit(module, data)
    >>> file = module.mask_set().save("mask.safetensors")

    Paper: https://arxiv.org/abs/2605.17289. The mask is a parametrization of the model's weights, see
    :mod:`leap_pl.gates`; the loss is :class:`leap_pl.losses.objective.Objective`; the logit scale and temperature
    follow :class:`leap_pl.training.schedules.Annealing`. Learning needs no callback.

    .. code-block:: yaml

        model:
          base_model: Qwen/Qwen2.5-0.5B
          sparsity: 0.5
          objective: {lm: 1.0, distillation: 0.0}
          annealing: {alpha: {start: 25, end: 350}, tau: {start: 4, end: 0.05}}
          prior: {method: wanda}

    The teacher for distillation is the same model with its gates disabled. Checkpoints contain what is learned, not the
    model. With ``train_weights`` the weights are trained too, with ``mask`` they alone
    (:mod:`leap_pl.training.weights`).
    """

    def __init__(
        self,
        base_model: str,
        sparsity: OpenUnitInterval = 0.5,
        gate: Callable[[Weight, GateState], Gate] = BernoulliGate,
        targets: list[str] | None = None,
        ignore: Sequence[str] = (),
        objective: Objective = Objective(),  # noqa: B008  (frozen)
        annealing: Annealing = Annealing(),  # noqa: B008  (frozen)
        prior: Prior = Prior(),  # noqa: B008  (frozen)
        optimizer: OptimizerCallable = optimization.usual_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup_steps: NonNegativeInt = 5,
        dtype: Dtype = "auto",
        logits_dtype: Literal["float32", "bfloat16"] = "float32",
        activation_checkpointing: bool = False,
        revision: str | None = None,
        trust_remote_code: bool = False,
        seed: int = 0,
        train_weights: str = NONE,
        weight_training: WeightTraining = WeightTraining(),  # noqa: B008  (frozen)
        mask: str | None = None,
        weights: str | None = None,
    ) -> None:
        """Store the settings; the model is loaded when the run starts.

        Args:
            base_model: Hub id, local folder or local GGUF file of a causal language model.
            sparsity: Share of the gated weights to remove, between 0 and 1. The exported mask has exactly that share.
            gate: Kind of gate, and so of mask.
            targets: Weights to gate: class names, module names, or ``re:`` regular expressions. By default all
                linear layers and stacked experts of the decoder blocks.
            ignore: Weights to leave dense, in the same form.
            objective: Terms of the loss and their weights.
            annealing: Schedules of the logit scale α and the temperature τ, which harden the mask.
            prior: Mask that the initial logits favour.
            optimizer: Optimizer of the logits.
            lr_scheduler: Learning rate schedule, stepped after every optimizer step. By default a linear warmup over
                ``warmup_steps``, then a cosine to 0.
            warmup_steps: Number of warmup steps of the default schedule; an ``lr_scheduler`` has its own.
            dtype: Data type of the frozen weights and of the computation; ``auto`` is bfloat16 if the hardware
                multiplies it faster, which is measured on a CPU, else float32.
            logits_dtype: Data type of the logits, of trained weights' parameters, and of the gradients of both,
                whatever the precision of the rest. ``bfloat16`` requires an optimizer with stochastic rounding
                (:class:`leap_pl.training.optimizers.PackedAdamW`), as the recipe low_memory does.
            activation_checkpointing: Recompute each decoder block in the backward pass: less memory, a third
                more time.
            revision: Revision of the base model on the hub; a local model has none.
            trust_remote_code: Run code that comes with the base model.
            seed: Seed of the noise and of the initial logits.
            train_weights: Weights to train: ``none``; ``kept``, those that the mask keeps and the norms; ``lora``,
                low-rank updates of those that the mask keeps; or ``norms`` alone.
            weight_training: Learning rate and further settings of the training of weights.
            mask: MaskSet file whose mask stays as it is, a folder that has one, or a hub id of one. It sets ``gate``,
                ``prior``, ``sparsity``, ``targets`` and ``ignore``.
            weights: Folder of a model whose weights training starts from, such as those that ``leap_pl prune`` has
                updated for the same mask.
        """
        base_model, mask, weights = map(plain_paths, (base_model, mask, weights))
        check_arguments(
            base_model=base_model,
            mask=mask,
            weights=weights,
            targets=targets,
            ignore=ignore,
            dtype=dtype,
            logits_dtype=logits_dtype,
            gate=gate,
            prior=(prior, Prior),
            objective=(objective, Objective),
            annealing=(annealing, Annealing),
            weight_training=(weight_training, WeightTraining),
        )
        # Checkpoints store settings as plain dictionaries.
        prior = Prior(**prior) if isinstance(prior, dict) else prior
        if isinstance(weight_training, dict):
            weight_training = WeightTraining(**weight_training)
        fixed = None if mask is None else FixedMask.read(mask)
        if fixed is not None:
            fixed.check_settings(sparsity, targets, ignore)
            fixed.warn_of_unused(gate, prior)
            gate, sparsity, targets, ignore = fixed.gate, fixed.sparsity, fixed.targets, ()
            prior = Prior(mask=fixed.file, cache_dir=prior.cache_dir)
        if train_weights != NONE and weight_training.lr is None:
            finished = starts_finished(base_model, weights, revision, fixed or FixedMask.of_prior(gate, prior))
            weight_training = weight_training.with_rate(finished=finished)
        weight_training = weight_training.with_rate(finished=False)
        check_numbers({"sparsity": sparsity, "warmup_steps": warmup_steps, "seed": seed}, "model.")
        check_whole({"warmup_steps": warmup_steps, "seed": seed}, "model.")
        super().__init__(
            base_model,
            # A value of a restricted type is not a plain float, and checkpoints are read with weights_only.
            float(sparsity),
            gate,
            prior=prior,
            targets=targets,
            ignore=ignore,
            dtype=dtype,
            logits_dtype=getattr(torch, logits_dtype),
            activation_checkpointing=activation_checkpointing,
            revision=revision,
            trust_remote_code=trust_remote_code,
            seed=int(seed),
            train_weights=train_weights,
            weight_training=weight_training,
            start_weights=weights,
        )
        self.save_hyperparameters(ignore=["gate", "optimizer", "lr_scheduler"], logger=False)
        self.fixed_mask = fixed
        self.objective = Objective(**objective) if isinstance(objective, dict) else objective
        self.annealing = Annealing.of(annealing) if isinstance(annealing, dict) else annealing
        self.make_optimizer, self.make_scheduler, self.warmup_steps = optimizer, lr_scheduler, int(warmup_steps)
        described_objective = run_settings.describe_objective(self.objective)
        self.hparams.update(objective=described_objective, prior=asdict(prior), ignore=self.ignore)
        self.hparams.update(annealing=asdict(self.annealing), weight_training=asdict(weight_training))
        self.hparams.update(sparsity=self.sparsity, warmup_steps=self.warmup_steps)
        self.terms: dict[str, Tensor] = {}
        self.gradient_norm: Tensor | None = None  # of the current optimizer step, before clipping
        self.rates: list[float] = []  # learning rates of that step, of masks and of weights
        self._at_start = False  # whether the logits are those that a fit begins with, of its prior
        self.norms: list[tuple[int, Tensor]] = []  # (step, gradient norm) that were not checked yet
        self._checked = 0  # completed steps at the last check
        self._harden(0.0)

    @of_class
    def load_from_checkpoint(  # type: ignore[override]  # no open files
        cls,
        checkpoint_path: str | Path,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **settings: Any,
    ) -> Self:
        """Return the module that a checkpoint was saved from, with its base model and its logits.

        Args:
            checkpoint_path: Path of a checkpoint file.
            map_location: Device of the model and the logits.
            hparams_file: Not used: a checkpoint contains its settings.
            strict: Not used: names and shapes of logits are always compared.
            weights_only: Not used: only tensors and plain values are ever read.
            settings: Settings of the module that override those of the checkpoint, such as ``base_model``; and
                ``trust_remote_code``, which is never taken from a file. With it, ``base_model`` has to be given, and
                ``revision`` and ``weights`` where the checkpoint has them.

        Raises:
            UserError: The checkpoint cannot be read, or does not belong to the base model; or only the checkpoint says
                whose code would be run.
        """
        checkpoint = load_checkpoint(checkpoint_path)
        tensors, read = tensors_of(checkpoint, checkpoint_path)
        if read is not None:
            checkpoint["state_dict"] = {key: read(key) for key in tensors}
        identity = read_identity(checkpoint, checkpoint_path)
        stored = run_settings.read_settings(identity, checkpoint, str(checkpoint_path))
        arguments = run_settings.arguments_of(stored, settings, str(checkpoint_path))
        if settings.get("trust_remote_code"):
            check_trusted({name: arguments.get(name) for name in CODE_OF if name not in settings})
        module = cls(**arguments | settings)
        if not {"targets", "ignore", "mask"} & set(settings):
            module.gated_before = list(identity.shapes)
        module._take_name_of_mask(identity, stored, {})
        module.configure_model()
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"], strict=False)
        dtype = None if "dtype" in settings else run_settings.computed_in(identity)
        module = module if dtype is None else module.to(getattr(torch, dtype))
        return module if map_location is None else module.to(map_location)

    def configure_model(self) -> None:
        """Load the base model, make the prior and attach the gates. A second call loads nothing.

        Raises:
            UserError: Settings of the trainer, the optimizer or the schedule do not suit a run.
        """
        made = self.model is None
        if self._compiler_ctx is not None:
            to_uncompiled(self)
            rank_zero_warn(
                "torch.compile of a LeapModule is taken off, since Lightning's own logging cannot be compiled; what it "
                "adds to the model is compiled anyway."
            )
        if self._fitting():  # first, since a prior may take minutes
            if self.resumes_from is None:
                check_revision(self.base_model, self.revision, "model.revision")
            check_trainer(self.trainer, type(self))
            probe = self.optimizer_of([nn.Parameter(torch.zeros(1, 1, device="cpu"))])
            check_rounding(probe, self.logits_dtype)
            one, other = ([nn.Parameter(torch.zeros(1, 1, device="cpu"))] for _ in range(2))
            kinds = (one if self.fixed_mask is None else [], other if self.trained.kind != NONE else [])
            probe_groups = optimization.groups(*kinds, self.trained.settings)
            if probe_groups:  # else there is nothing to learn, and the base class refuses it
                made_of_probes = self.optimizer_of(probe_groups)
                optimization.check_moments(self.make_scheduler, made_of_probes)
                optimization.check_steps(made_of_probes)
            check_clipping(self.trainer, probe, self.logits_dtype)
            data = getattr(self.trainer, "datamodule", None)
            run_settings.check_types(self.learned_with() | run_settings.of_trainer(self.trainer, data))
        super().configure_model()
        self._at_start = self._at_start or (made and self._fitting())

    def on_fit_start(self) -> None:
        """Check that a run which does not resume begins with a new trainer and a new module."""
        super().on_fit_start()
        if not self.trainer.strategy.restore_checkpoint_after_setup:
            self._check_unused()

    def on_train_start(self) -> None:
        """Set the modes of learning; check the same of a sharded run, whose checkpoint is only known now."""
        if self.trainer.strategy.restore_checkpoint_after_setup:
            self._check_unused()
        super().on_train_start()
        self.norms, self._checked = [], self.global_step

    def _check_unused(self) -> None:
        if self.trainer.ckpt_path is None:
            check_unused(self.trainer, at_start=self._at_start)

    def settings(self) -> dict[str, Any]:
        """Return the settings for the provenance of a mask, as plain values."""
        recorded = {"objective": run_settings.describe_objective(self.objective), "annealing": asdict(self.annealing)}
        return recorded | super().settings()

    def learned_with(self) -> Settings:
        """Return the settings that a resumed run takes and compares; see :meth:`.ResumableModule.learned_with`."""
        found: Settings = {"model.objective": run_settings.describe_objective(self.objective)}
        found["model.annealing"] = asdict(self.annealing)
        found["model.warmup_steps"] = self.warmup_steps
        return super().learned_with() | settings_to_store(found | self._described_optimizer())

    def _described_optimizer(self) -> Settings:
        make: Any = self.make_gate  # a class, a partial of one, or, from the command line, of a function and a class
        kinds = [make, getattr(make, "func", None), *getattr(make, "args", ())]
        fixed = any(isinstance(kind, type) and issubclass(kind, FixedGate) for kind in kinds)
        groups = int(not fixed) + int(self.trained.kind != NONE)  # as configure_optimizers makes them
        total = self.trainer.max_steps if self._fitting() else 1
        return optimization.describe(
            self.make_optimizer, self.make_scheduler, self.logits_dtype, max(groups, 1), max(total, 1)
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load a checkpoint and, outside a fit, set α and τ as they were in its run."""
        self._at_start = False
        super().on_load_checkpoint(checkpoint)
        steps, done = read_identity(checkpoint).max_steps, checkpoint.get("global_step")
        if not self._fitting() and steps and isinstance(done, int):
            self._harden(done / steps)

    def _harden(self, fraction: float) -> None:
        """Set α and τ to their values at ``fraction`` of the run."""
        self.state.fraction = fraction
        self.state.anneal(**self.annealing.at(fraction))

    # -- learning -----------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one micro-batch, as :meth:`.tokens_of` takes it."""
        input_ids, fraction = self.tokens_of(batch), self.global_step / self.trainer.max_steps
        windows = self.trainer.accumulate_grad_batches
        self.state.step = self.global_step
        self._harden(fraction)
        rank, ranks = data_rank(self.trainer)
        self.state.micro_batch = (batch_idx % windows) * ranks + rank
        teacher = None
        if self.objective.needs_teacher(fraction):
            with torch.no_grad(), self.state.passing("dense"):
                teacher = self._hidden(input_ids)
        self.gates.clear()
        hidden, targets = self._hidden(input_ids), input_ids[:, self.first_target :].reshape(-1)
        language = self.objective.language(hidden, targets, self.head, teacher, self._dense_head)
        idle: list[Tensor] = []
        for name in self.gates.unused:  # experts that no token was routed to
            if self.mesh is not None:
                raise UserError(
                    f"{name} was not used by a micro-batch, but in a sharded run every one must use all weights. "
                    "Exclude it with --model.ignore, or use --trainer.strategy ddp."
                )
            idle.append(self.gates[name](self.weights[name].parameter))
        passed = MicroBatch(
            input_ids=input_ids,
            hidden=hidden,
            targets=targets,
            teacher=teacher,
            head=self.head,
            language=language,
            gates=self.gates,
            kept=self.gates.kept,
            energy=self.gates.energy,
            sizes=self.sizes,
            layers=self.layers,
            density=1 - self.sparsity,
            dense_norm=self.dense_norm,
            fraction=fraction,
        )
        loss, self.terms = self.objective.loss(passed)
        # DDP waits for a gradient of every parameter. The gates of a block are computed together, used or not, and only
        # terms of the mask have a path to those that are not.
        apart = [masked.sum() for masked in idle]
        if self.mesh is None and not (self.objective.budget or self.objective.weight):
            apart += self.gates.kept.values()
        if self.mesh is None and not self.objective.weight:  # kept may have no path to a gate's second tensor
            apart += [value for name, value in self.gates.energy.items() if len([*self.gates[name].parameters()]) > 1]
        if apart:
            loss = loss + 0 * torch.stack(apart).sum()
        self.log("loss", loss.detach(), prog_bar=True, logger=False)
        if not self.looks_later:
            self.check_finite()
        return loss

    def _hidden(self, input_ids: Tensor) -> Tensor:
        """Return the last hidden states of all tokens whose next token is predicted, (T, D)."""
        return self.states(input_ids)[:, self.first_target - 1 : -1].flatten(0, 1)

    def _dense_head(self, hidden: Tensor) -> Tensor:
        """Return the logits that the head of the dense model computes from its hidden states."""
        with self.state.passing("dense"):
            return self.head(hidden)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Check the losses and gradient norms of ``trainer.log_every_n_steps`` steps, unless a callback already has.

        Raises:
            NonFiniteError: If a norm or a term of the loss is infinite or NaN.
        """
        every = self.trainer.log_every_n_steps or 50  # type: ignore[attr-defined]  # 0 in a bare-bones trainer
        if self.looks_later and self.global_step - self._checked >= every:
            self.check_finite()

    def mean_over_ranks(self, values: dict[str, float]) -> dict[str, float]:
        """Return the mean of each value over all ranks; a collective that all ranks must call."""
        return values if self.attached is None else mean_over_ranks(values, self.trainer)

    def check_finite(self, *, logits: bool = False) -> None:
        """Check that the last loss, the gradients since the last check and, if requested, the logits are finite.

        Raises:
            NonFiniteError: A term of the loss, a gradient or a logit is infinite or NaN.
        """
        norms, self.norms, self._checked = self.norms, [], self.global_step
        finite.check_norms(norms, self._dtype_of_model())
        terms = self.terms
        # Else a norm of all ranks was checked. After the run one rank alone may ask for the mask.
        if self._learning() and self.trainer.precision == "16-mixed":
            values = self.mean_over_ranks(finite.read_together(terms))
            terms = {name: torch.tensor(value, device="cpu") for name, value in values.items()}
        finite.check_terms(terms, self.state.step, self._dtype_of_model())
        super().check_finite(logits=logits)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Compute the norm of the gradients; on a CPU, check that it is finite before the step changes all logits.

        On other devices :meth:`check_finite` checks it at the next log step, and before anything is saved.

        Raises:
            NonFiniteError: A gradient is infinite or NaN.
        """
        self.gradient_norm, self._at_start = None, False
        self.rates = [group["lr"] for group in optimizer.param_groups]
        if self.trainer.precision == "16-mixed":
            return  # the gradient scaler skips steps with such gradients
        self.gradient_norm = finite.norm_of_gradients(self._learned())
        if self.looks_later:
            self.norms.append((self.state.step, self.gradient_norm))
        else:
            finite.check_gradients(self._learned(), self.state.step, self._dtype_of_model(), self.gradient_norm)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Free the gradients, or zero those that are views of DDP's buckets."""
        optimizer.zero_grad(set_to_none=not has_buckets(self.attached))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Free all gradients, or zero them likewise: Lightning calls this before a run, and before each validation."""
        super().zero_grad(set_to_none and not has_buckets(self.attached))

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients as Lightning does, using the norm that is already known."""
        # Lightning's own clipping refuses a fused optimizer, because it may unscale gradients itself; but only float16
        # gradients are scaled.
        if self.gradient_norm is None or not gradient_clip_val:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_algorithm in (None, "norm"):
            clip_by_norm(optimizer, self._learned().values(), gradient_clip_val, self.gradient_norm)
        else:
            self.trainer.precision_plugin.clip_grad_by_value(optimizer, gradient_clip_val)

    def configure_optimizers(self) -> Any:
        """Return one optimizer of all that is learned, and its schedule, stepped after every optimizer step."""
        total = self.trainer.max_steps
        if total < 1:
            raise UserError(
                f"trainer.max_steps is {total}, and every schedule needs a number of steps. Add --trainer.max_steps N."
            )
        masks, weights = self._parts()
        training = self.trained.settings
        optimizer = self.optimizer_of(optimization.groups(masks, weights, training))
        if not masks:
            optimization.warn_of_unused_rate(self.make_optimizer, optimizer, training)
        if weights:
            optimization.step_alone(optimizer.param_groups[-1], optimizer)
        warmups = {"model.warmup_steps": self.warmup_steps} if masks else {}
        warmups |= {"model.weight_training.warmup_steps": training.warmup_steps} if weights else {}
        scheduler = optimization.make_scheduler(self.make_scheduler, optimizer, warmups, total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _parts(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return the learned parameters of the masks, and those of the weights."""
        parts: tuple[list[nn.Parameter], list[nn.Parameter]] = [], []
        for (_, part), parameter in self._learned().items():
            parts[part.startswith(PART)].append(parameter)
        return parts

    def optimizer_of(self, parameters: list[Any]) -> torch.optim.Optimizer:
        """Return the optimizer of ``parameters``, or of groups of them.

        Raises:
            UserError: It refuses its settings.
        """
        return optimization.make_optimizer(self.make_optimizer, parameters)
