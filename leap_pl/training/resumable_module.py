"""ResumableModule: GatedModule whose checkpoints contain what was learned, and how, and nothing else."""

import math
import sys
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import OnExceptionCheckpoint, Timer
from lightning.pytorch.utilities import rank_zero_warn

from leap_pl.checkpoints import layout as checkpoints
from leap_pl.checkpoints.folder import check_before_loading, not_one_file
from leap_pl.checkpoints.identity import KEY, Identity, check_micro_batches, check_same, read_identity
from leap_pl.checkpoints.plain import made_plain
from leap_pl.checkpoints.rewind import check_position, rewind
from leap_pl.checkpoints.settings import MASK_SETTINGS, Settings, check_settings, comparable, settings_to_store
from leap_pl.distributed.shards import copy_part_
from leap_pl.distributed.strategy import check_as_rank_zero, data_rank, saves_shards
from leap_pl.errors import UserError, warn_once
from leap_pl.gates import FixedGate
from leap_pl.masks.mask_set import BEFORE, STAYED, TRAINED
from leap_pl.training import run_settings
from leap_pl.training.gated_module import GatedModule
from leap_pl.training.live_settings import live_settings
from leap_pl.training.optimizers import check_state

# Lightning's keys for the arguments of a data module that saves them, which may be of any class.
OF_DATA = ("datamodule_hyper_parameters", "datamodule_hparams_name", "datamodule_hparams_type")


# Settings of the training of weights that decide how far they move, and not what they are.
RATES = ("lr", "warmup_steps", "weight_decay")


# Settings of a mask's record that say how that mask was measured.
OF_MASK = ("perplexity", "perplexity_of")

TIMER = Timer.__qualname__  # its key in a checkpoint


class Interruption(L.Callback):
    """Callback that holds the identity of a fit which an exception ends: Lightning then calls no hook of the module.

    A run that has not taken a step, since it was refused or stopped before, has nothing to save on an exception: the
    checkpoint that there is may be that of the run before it.
    """

    _began: tuple[int, int] | None = None  # id of the module that learns in the last fit, and the step that it began at

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Note that nothing is learned yet, if this is a fit."""
        if stage == "fit":
            self._began = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note where learning begins."""
        self._began = (id(pl_module), trainer.global_step)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Hold the identity, and drop what was to be called in a fit that was refused."""
        if not isinstance(pl_module, ResumableModule):  # the trainer has gone on to another
            return
        pl_module.hold_identity()
        pl_module.when_loaded.clear()
        module, start = self._began or (None, 0)
        if module != id(pl_module) or trainer.global_step == start:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, OnExceptionCheckpoint):
                    _save_nothing(callback)


def _save_nothing(callback: OnExceptionCheckpoint) -> None:
    """Let ``callback`` save nothing on the exception that it is called for next: all callbacks are called in a loop."""

    def skip(*_: Any, **__: Any) -> None:
        vars(callback).pop("on_exception", None)

    callback.on_exception = skip  # type: ignore[method-assign]


class ResumableModule(GatedModule):
    """Base class of modules that learn a mask, or weights, or both: their identity and their checkpoints.

    A checkpoint contains the logits and the trained weights by the names of weights, and the settings that they were
    learned with: neither the frozen model nor a class to construct.

    Attributes:
        finished: Identity of the fit that this module was learned in, if that is over or was loaded; else None.
    """

    finished: Identity | None = None
    _learns_in: int | None = None  # id of the trainer whose fit learns, until it ends or another stage begins
    _resumed: str | None = None  # the step of the checkpoint to resume from, if that is known before the model is

    def setup(self, stage: str) -> None:
        """Note that a stage begins, in which nothing is learned yet; let the strategy check what it will load.

        The path of a checkpoint is known only when it is loaded, but on the command line.
        """
        self._learns_in = None
        if self.attached is not None:
            check_before_loading(self.trainer.strategy)

    def configure_callbacks(self) -> list[L.Callback]:
        """Return a callback that holds the identity of a fit that an exception ends; a subclass adds its own to it."""
        there = any(isinstance(callback, Interruption) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        return [] if there else [Interruption()]

    def on_fit_start(self) -> None:
        """Check that checkpoints of the run can hold the states of callbacks and of a data module of one's own.

        Raises:
            UserError: One has what they cannot hold.
        """
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if type(callback).__module__.partition(".")[0] not in ("leap_pl", "lightning"):
                with suppress(AttributeError, TypeError):  # a state that there is not yet
                    made_plain(callback.state_dict(), f"callbacks > {type(callback).__name__}")
        data: Any = getattr(self.trainer, "datamodule", None)
        if data is not None and type(data).__module__.partition(".")[0] not in ("leap_pl", "lightning"):
            with suppress(AttributeError, TypeError):
                made_plain(data.state_dict(), type(data).__qualname__)

    def on_train_start(self) -> None:
        """Set the modes of learning, and take this run for the one that the module is learned in."""
        self.finished, self._learns_in = None, id(self.trainer)
        super().on_train_start()

    def configure_model(self) -> None:
        """Check that all ranks of a fit have the same settings and resume from the same step; then load the model.

        Raises:
            UserError: A rank has others.
        """
        if self._fitting() and self.model is None:
            data = getattr(self.trainer, "datamodule", None)
            settings = comparable(self.learned_with() | run_settings.of_trainer(self.trainer, data))
            check_as_rank_zero(settings | {"checkpoint to resume from": self._resumed})
        super().configure_model()

    def check_resume(
        self, checkpoint: dict[str, Any], path: str | Path, trainer: L.Trainer, data: Any, *, fitting: bool
    ) -> None:
        """Check that this module, ``trainer`` and ``data`` have the settings that a checkpoint was learned with.

        A ``dtype`` of ``auto`` becomes the checkpoint's. The base models are compared when the model is loaded.

        Args:
            checkpoint: Contents of the checkpoint.
            path: Path of the checkpoint, for messages.
            trainer: Trainer of this run.
            data: Data module of this run, or None.
            fitting: Whether learning is resumed; else only the settings that the hard mask depends on are compared.

        Raises:
            UserError: A setting that affects what is learned differs.
        """
        identity = read_identity(checkpoint, path)
        self._resumed = f"step {checkpoint.get('global_step')}"
        stored = run_settings.read_settings(identity, checkpoint, str(path))
        self.gated_before = list(identity.shapes)
        if self.dtype_name == "auto" and self.model is None:
            self.dtype_name = stored.get("model.dtype", "auto")
        here = self.learned_with()
        self._take_name_of_mask(identity, stored, here)
        if fitting:
            check_position(checkpoint, path)
            check_state(checkpoint, path, trainer.strategy)
            run_settings.check_data_state(checkpoint, data)
            # Before max_steps, which --tokens computes from them.
            check_micro_batches(identity, data_rank(trainer)[1], trainer.accumulate_grad_batches)
            here |= run_settings.of_trainer(trainer, data) | run_settings.dtype_of_earlier(stored, here, trainer)
        else:  # the hard mask depends only on these
            run_settings.check_validated_text(checkpoint, data, identity.settings)
            here = {name: here[name] for name in MASK_SETTINGS if name in here}
            for settings in (here, stored):  # and not on how fast weights were trained
                if isinstance(training := settings.get("model.weight_training"), dict):
                    settings["model.weight_training"] = {k: v for k, v in training.items() if k not in RATES}
        check_settings(stored, here)

    def _take_name_of_mask(self, identity: Identity, stored: Settings, here: Settings) -> None:
        """Let the mask that stays as it is have another name than in the checkpoint, if it has the same bits.

        Raises:
            UserError: It has others.
        """
        prior = stored.get("model.prior")
        if isinstance(prior, dict) and self.fixed_mask is not None and self.fixed_mask.check_same(identity):
            here["model.prior"] = prior

    def identity(self) -> Identity:
        """Return the identity that this run's checkpoints contain; after a fit, that of the fit."""
        if self.finished is not None and not self._learning():
            return self.finished
        dense, data = self.validation.dense, getattr(self.attached, "datamodule", None)
        return Identity(
            base_model=self.base_model,
            revision=self.revision,
            fingerprint=self.fingerprint,
            rest=self.rest,
            gate=self.gates.describe(),
            sparsity=self.sparsity,
            targets=self.targets,
            ignore=self.ignore,
            max_steps=self.trainer.max_steps if self._fitting() else None,
            ranks=data_rank(self.trainer)[1] if self._fitting() else None,
            accumulation=self.trainer.accumulate_grad_batches if self._fitting() else None,
            shapes=self.gates.shapes,
            input_dims=self.gates.input_dims,
            dense_perplexity=None if dense is None else dense.value,
            dense_perplexity_of=None if dense is None else dense.of,
            settings=self.settings(),
            learned_with=self.learned_with() | (run_settings.of_trainer(self.trainer, data) if self._fitting() else {}),
        )

    def on_fit_end(self) -> None:
        """Hold the identity of the run, for a mask that is saved after another trainer has validated this module."""
        step, steps = self.trainer.global_step, self.trainer.max_steps
        callbacks: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        if step < steps and not any(getattr(callback, "reports_end", False) for callback in callbacks):
            fixed = isinstance(self.gates.first, FixedGate)
            what = "the weights are" if fixed else "gates are still soft, and mask_set() is"
            rank_zero_warn(
                f"the run ended at step {step} of {steps}, before its schedules did: {what} of that step. Give "
                "max_steps that the run reaches."
            )
        self.finished, self._learns_in = self.identity(), None

    def save_weights(self, path: str | Path, mask: str | Path) -> None:
        """Write the trained weights; see :meth:`.GatedModule.save_weights`.

        Raises:
            UserError: A later trainer has rounded the base model, in whose data type they are written.
        """
        was = None if self.finished is None else self.finished.settings.get("dtype")
        now = None if self.model is None else str(self.model.dtype).removeprefix("torch.")
        if None not in (was, now) and was != now:
            raise UserError(
                f"the weights were trained in {was}, and a later trainer has converted the model to {now}. Save them "
                "before, or from LeapModule.load_from_checkpoint of the run's checkpoint."
            )
        super().save_weights(path, mask)

    def hold_identity(self) -> None:
        """Hold the identity of a fit that has begun to learn, or was resumed, as it is now."""
        resumed = self._fitting() and self.trainer.ckpt_path is not None and self.trainer.global_step > 0
        if self.model is not None and ((resumed and self.finished is None) or self._learning()):
            self.finished = self.identity()

    def _learning(self) -> bool:
        return self._fitting() and self._learns_in == id(self.trainer)

    def learned_with(self) -> Settings:
        """Return the settings of the module that a resumed run takes and compares, by their full names.

        The rules are in :mod:`leap_pl.checkpoints.settings`.
        """
        found: Settings = {
            "model.base_model": self.base_model,
            "model.sparsity": self.asked_sparsity,
            "model.targets": self.targets,
            "model.ignore": self.ignore,
            "model.prior": asdict(self.run_prior.settings),
            "model.dtype": run_settings.dtype_of(self.model, self.dtype_name, self.attached),
            "model.logits_dtype": str(self.logits_dtype).removeprefix("torch."),
            "model.activation_checkpointing": self.activation_checkpointing,
            "model.revision": self.revision,
            "model.seed": self.state.seed,
            "model.train_weights": self.trained.kind,
            "model.weight_training": asdict(self.trained.settings),
            "model.weights": self.trained.start,
        }
        found |= {"model.gate": self.gates.describe()} if self.gates else {}
        if found["model.dtype"] == "auto":
            del found["model.dtype"]
        return settings_to_store(found)

    def settings(self) -> dict[str, Any]:
        """Return the settings for the provenance of a mask, as they were in effect and not as typed: plain values."""
        recorded: dict[str, Any] = {**self.run_prior.record(), "seed": self.state.seed}
        recorded["logits_dtype"] = str(self.logits_dtype).removeprefix("torch.")
        recorded["dtype"] = None if self.model is None else str(self.model.dtype).removeprefix("torch.")
        training = self.trained.describe()
        recorded |= {TRAINED: training} if training else {}
        if self.attached is None:
            return recorded
        recorded |= live_settings(self.trainer)
        return recorded | self.validation.record()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the logits by weight name and the identity of the run, without the frozen model.

        Raises:
            UserError: There is no model yet; instead, the exception that is being handled, if there is one.
        """
        if self.model is None:
            # A callback that saves on an exception: the reason of the run's end ends the save too, before it writes.
            raise sys.exc_info()[1] or UserError("there is nothing to save: the base model is not loaded yet.")
        self.check_finite(logits=True)
        checkpoint[KEY] = asdict(self.identity())
        for part in ("hyper_parameters", *OF_DATA):  # those of the module are in the identity, read by a schema
            checkpoint.pop(part, None)
        # Amid a run, which would lose more by an end than by what no checkpoint can hold.
        if isinstance(checkpoint.get("callbacks"), dict):
            checkpoint["callbacks"] = dict(checkpoint["callbacks"])
            _hold_plain(checkpoint["callbacks"], "callbacks > ")
        if isinstance(loop := checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict"), dict):
            _hold_plain(loop, "loops > ")  # loaders of one's own may have a state
        _hold_plain(checkpoint)
        rewind(self.trainer, checkpoint)
        if saves_shards(self.attached):
            return  # each rank writes its own part under this module's names, as ModelParallelStrategy reads them
        if self.mesh is None:
            state = {checkpoints.key_of(*place): tensor for place, tensor in self.stored().items()}
            numbered = checkpoints.names_of_parameters(self, self.trainer.optimizers)
        else:  # gathered on rank zero; empty on the other ranks
            state = checkpoints.by_weight(checkpoint["state_dict"])
            numbered = [name for name, _ in self.named_parameters()]
        checkpoint["state_dict"] = state
        for optimizer_state in checkpoint.get("optimizer_states", []):
            checkpoints.name_parameters(optimizer_state, numbered)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Map a checkpoint's tensors to this module's names; refuse one of another model or with other settings."""
        self.finished = None  # what is learned is now the checkpoint's
        # trainer.max_time limits each start. A timer that counted all of them would end every further start of the same
        # command, as a cluster submits it, before its first step.
        if all(type(one) is Timer or one.state_key != TIMER for one in getattr(self.attached, "callbacks", ())):
            checkpoint.get("callbacks", {}).pop(TIMER, None)
        if self.mesh is None and "state_dict" not in checkpoint:
            raise not_one_file(getattr(self.attached, "ckpt_path", None) or "FOLDER")
        found = read_identity(checkpoint)
        self.run_prior.fixed = found.settings.get(STAYED)
        training = found.settings.get(TRAINED)
        before = training.get(BEFORE) if isinstance(training, dict) else None
        self.trained.texts_before = before if isinstance(before, list) else []
        if self.attached is not None:
            data = getattr(self.trainer, "datamodule", None)
            self.check_resume(checkpoint, "the checkpoint", self.trainer, data, fitting=self._fitting())
        check_same(found, self.identity())
        self.validation.read(found.dense_perplexity, found.dense_perplexity_of, found.settings)
        if self._fitting():
            self.validation.start = None  # a report that was stored has it
            if self.run_prior.resumed is None:
                # A Trainer without the command line: the path is known only now, after the prior was made.
                made, origin = self.run_prior.masks, Path(self.trainer.ckpt_path or "")
                make = (lambda _: made) if self.trainer.is_global_zero else None
                self.run_prior.resume(found, origin, self.gates, make)
            run_settings.check_ranks_of_loaders(checkpoint, found.ranks, self.identity().ranks)
            checkpoints.count_for_ranks(checkpoint, found, self.identity())
            if self.mesh is None:  # a sharded run takes the states by name
                names = {id(parameter): name for name, parameter in self.named_parameters()}
                own = [names[id(parameter)] for parameter in self._learned().values()]
                for optimizer_state in checkpoint.get("optimizer_states", []):
                    checkpoints.order_parameters(optimizer_state, own)
        places = self.stored()
        if self.mesh is None:
            stored = checkpoint["state_dict"]
            checkpoint["state_dict"] = checkpoints.by_path(stored, places, whole=self._fitting())
            self.trained.make_room(stored)
        elif Path(path := self.trainer.ckpt_path or "").is_file():
            # From a folder Lightning has loaded each rank's part; from a file each rank takes its own part here.
            stored = checkpoints.load_checkpoint(path)["state_dict"]
            for place, tensor in places.items():
                copy_part_(tensor, stored[checkpoints.key_of(*place)])
        self.has_mask = True
        if not self._fitting():  # until a fit goes on from it, its mask is the checkpoint's, whoever validates it
            settings = {"steps": checkpoint.get("global_step"), **found.settings}
            other = not math.isclose(self.sparsity, found.sparsity) and bool(self.gates.learned())
            if other and isinstance(self.gates.first, FixedGate):
                raise UserError(
                    f"the mask of this checkpoint is fixed at sparsity {found.sparsity:g}, and sparsity "
                    f"{self.sparsity:g} was asked for. Leave sparsity out, or prune the model again."
                )
            if other:  # a caller asks for another mask than was measured, and a fixed one would stay what it is
                settings = {name: value for name, value in settings.items() if name not in OF_MASK}
                self.validation.hard = None
            self.finished = replace(
                found,
                settings=settings,
                sparsity=self.sparsity if other else found.sparsity,
                base_model=self.base_model,
                revision=self.revision,
            )


def _hold_plain(parts: dict[str, Any], where: str = "") -> None:
    """Make what a checkpoint has beside its weights plain, in place, and leave out what cannot be."""
    for part in sorted(parts.keys() - {"state_dict"}):
        try:
            parts[part] = made_plain(parts[part], f"{where}{part}", on_host=part != "optimizer_states")
        except UserError as error:
            del parts[part]
            anew = "a resumed run begins it anew" if where else "the mask can be exported from the checkpoint"
            warn_once(f"{error} It is left out: {anew}.")
