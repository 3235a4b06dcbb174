"""ValidatedModule: module that measures the perplexity of its hard mask, and that of the dense model."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from leap_pl.gates.gate import Mode
from leap_pl.losses.objective import Objective
from leap_pl.training.batch import check_length, check_token_ids, input_ids_of
from leap_pl.training.resumable_module import ResumableModule
from leap_pl.training.validation import describe_sequences, precision_of


class ValidatedModule(ResumableModule):
    """Base class of modules that learn a mask, or weights, or both: their validation.

    What is measured, and on what, is in :attr:`validation`.

    Attributes:
        objective: Loss, which says of how many tokens logits are computed at once.
    """

    objective: Objective
    _tokens_checked = False  # the first ones of a stage

    @abstractmethod
    def _harden(self, fraction: float) -> None:
        """Set α and τ to their values at ``fraction`` of the run."""

    def tokens_of(self, batch: Any) -> Tensor:
        """Return the tokens of a micro-batch (:func:`.input_ids_of`), which the base model takes.

        Raises:
            UserError: They are something else. A GPU has to be waited for to look at their numbers: of training, and of
                each validation, those of the first micro-batch are looked at.
        """
        input_ids = input_ids_of(batch)
        assert self.model is not None
        check_length(input_ids, self.model, self.base_model)
        if not self.looks_later or not self._tokens_checked:
            check_token_ids(input_ids, self.model, self.base_model)
            self._tokens_checked = True
        return input_ids

    @property
    def looks_later(self) -> bool:
        """Return whether reading a number takes a host sync; numbers are then checked at log steps only."""
        return self.device.type != "cpu"

    def on_train_start(self) -> None:
        """Set the modes of learning; the first tokens are still to be checked, which validation has not read."""
        self._tokens_checked = False
        super().on_train_start()

    def on_validation_start(self) -> None:
        """Set α and τ, since a run may validate before it trains; outside a fit they keep the checkpoint's values."""
        self._tokens_checked = False
        if self._fitting():
            self._harden(self.global_step / self.trainer.max_steps)

    def on_validation_epoch_start(self) -> None:
        """Choose the hard mask at exactly the target sparsity for the validation."""
        self.choose_hard_masks()
        self.validation.begin()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Measure the perplexity of the hard mask and, unless it is already known, of the dense model."""
        input_ids = self.tokens_of(batch)
        for mode in self.validation.wanted:
            self._measure(mode, input_ids)
        self.validation.batches.append(input_ids)
        self.log(
            "perplexity/hard", self.validation.hard_metric, on_epoch=True, prog_bar=True, logger=not self._fitting()
        )

    def _measure(self, mode: Mode, input_ids: Tensor) -> None:
        with self.state.passing(mode):
            hidden = self.states(input_ids)[:, self.first_target - 1 : -1]
            targets = input_ids[:, self.first_target :]
            self.validation.update(mode, hidden, targets, self.head, self.objective.chunk)

    def on_validation_epoch_end(self) -> None:
        """Record the perplexities with their provenance; recompute the dense model's if its provenance has changed.

        Those of a sanity check that reads a part of the validation text are of another text than the curves.
        """
        if self.trainer.sanity_checking:
            whole = self.trainer.num_sanity_val_batches == self.trainer.num_val_batches
            if not self.trainer.strategy.reduce_boolean_decision(whole, all=True):
                return
        total = self.validation.measured_tokens().to(self.trainer.strategy.root_device)
        total = self.trainer.strategy.reduce(total, reduce_op="sum")
        of = self._measured_model()
        known = self.validation.dense
        if known is not None and known.of != describe_sequences(total) | of:
            self.validation.dense = None
            with self.trainer.precision_plugin.val_step_context():
                for input_ids in self.validation.batches:
                    self._measure("dense", input_ids)
        finished = self.validation.finish(total, self.global_step, of, fitting=self._fitting())
        hard, dense = (measured.value for measured in finished)
        # Already equal on all ranks; without sync_dist Lightning warns.
        self.log("perplexity/dense", dense, sync_dist=True, logger=not self._fitting())
        # In a fit Lightning would log nothing before the first step, at which the curves begin, and a constant epoch.
        for logger in self.loggers if self._fitting() else ():
            logger.log_metrics({"perplexity/hard": hard, "perplexity/dense": dense}, step=self.global_step)

    def _measured_model(self) -> dict[str, str]:
        """Return the provenance of a perplexity except for the text; see :class:`.Measured` for its keys."""
        dtype = str(self._dtype_of_model()).removeprefix("torch.")
        precision = precision_of(self.trainer.precision)
        return {"fingerprint": self.fingerprint, "rest": self.rest, "dtype": dtype, "precision": precision}

    def _dtype_of_model(self) -> torch.dtype | None:
        return None if self.model is None else self.model.dtype
