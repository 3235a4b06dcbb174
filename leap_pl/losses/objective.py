"""Training objective of a mask: a list of terms, and their weighted sum."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from leap_pl.base_model.backbone import Head
from leap_pl.errors import UserError
from leap_pl.inputs.plain_values import display
from leap_pl.inputs.ranges import check_numbers
from leap_pl.losses.budget import Budget, KeptNorm
from leap_pl.losses.language import LanguageLosses, Logits, language_losses
from leap_pl.losses.term import MicroBatch, Term

Scope = Literal["global", "layer"]
TOTAL = "loss"  # key of the weighted sum, among the terms' names
TAKEN = (TOTAL, "total", "lm", "distillation", Budget.name, KeptNorm.name)  # names that extra terms cannot have


@dataclass(frozen=True)
class LanguageTerm(Term):
    """LM or distillation loss. :func:`language_losses` computes both, weighted and with their gradients, in one pass.

    Attributes:
        name: Name of the loss, ``lm`` or ``distillation``.
        weight: Factor in that pass.
        needs_teacher: Whether the loss compares with the dense model.
    """

    name: str
    weight: float
    needs_teacher: bool = False
    measured_at_zero = True

    def value(self, batch: MicroBatch) -> Tensor:
        """Return the value that the pass computed, detached."""
        value: Tensor = getattr(batch.language, self.name)
        return value


@dataclass(frozen=True)
class Objective:
    """Weights of the terms of the training loss; the defaults are the paper's (arXiv 2605.17289).

    The loss is, with the terms of ``extra`` added::

        lm·CE + distillation·KL + budget·|mean M − ρ| − weight·(1 − t/T)·Σ‖M⊙W‖/Σ‖W‖

    Attributes:
        lm: Weight of the causal cross-entropy, in nats a token.
        distillation: Weight of KL(teacher ‖ student)·temperature², in nats a token. The teacher is the base model
            without its mask, which costs a forward pass and no memory for weights.
        temperature: Temperature of the distillation's softmaxes.
        budget: Weight of the distance of the mean mask to the target density ρ (λ_s).
        budget_scope: Scope of that mean; ``global``: one mean over all gated weights. ``layer``: one for each decoder
            block, and the distances are added.
        weight: Weight of the term that rewards masks which keep large weights (λ_w); it decays to 0 over the run.
        chunk: Number of tokens whose logits exist at the same time. They take about 4·chunk·V bytes, and twice that
            with distillation.
        extra: Further terms, of your own subclasses of :class:`leap_pl.losses.term.Term`.
    """

    lm: float = 1.0
    distillation: float = 0.0
    temperature: float = 1.0
    budget: float = 7.0
    budget_scope: Scope = "global"
    weight: float = 10.0
    chunk: int = 512
    extra: Sequence[Term] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.extra, list | tuple):
            raise UserError(f"objective.extra is {display(self.extra)}; give a list of terms.")
        object.__setattr__(self, "extra", tuple(self.extra))
        if self.budget_scope not in get_args(Scope):
            raise UserError(
                f"objective.budget_scope is {display(self.budget_scope)}; give {' or '.join(get_args(Scope))}."
            )
        check_numbers(vars(self), "model.objective.", "objective.")
        if self.lm == 0 and self.distillation == 0 and not self.extra:
            raise UserError("objective.lm and objective.distillation are both 0: nothing to learn from. Raise one.")
        self.check_extra()

    def check_extra(self) -> None:
        """Check that the extra terms are objects of :class:`Term` with valid, unique names and weights.

        Raises:
            UserError: A term is not; or there is nothing else to learn from, and the weight of each is always 0.
        """
        names = set(TAKEN)
        for term in self.extra:
            if not isinstance(term, Term):
                raise UserError(f"objective.extra holds {display(term)}; give objects of leap_pl.losses.term.Term.")
            kind, name = type(term).__name__, getattr(term, "name", None)
            if name in names or not (isinstance(name, str) and name.isidentifier()):
                reason = "is that of another term" if name in names else "is not an identifier"
                raise UserError(f"objective.extra: the name of {kind} is {display(name)}, which {reason}. Set another.")
            names.add(name)
            weight = getattr(term, "weight", None)
            if isinstance(weight, bool) or not isinstance(weight, int | float):
                raise UserError(
                    f"objective.extra: the weight of {kind} is {display(weight)}; give a number, as "
                    "super().__init__(weight) in its own __init__ does."
                )
            check_numbers({"weight": weight}, "model.objective.extra.", f"objective.extra: {kind}.")
        always_0 = [term.weight == 0 and type(term).weight_at is Term.weight_at for term in self.extra]
        if self.lm == 0 and self.distillation == 0 and always_0 and all(always_0):
            raise UserError(
                "objective.lm, objective.distillation and the weight of each extra term are 0: nothing to learn from. "
                "Raise one."
            )

    def terms(self) -> tuple[Term, ...]:
        """Return the terms in the order in which they are added."""
        language: tuple[Term, ...] = ()
        if self.lm or self.distillation:
            language = LanguageTerm("lm", self.lm), LanguageTerm("distillation", self.distillation, needs_teacher=True)
        return (*language, Budget(self.budget, self.budget_scope), KeptNorm(self.weight), *self.extra)

    def needs_teacher(self, fraction: float) -> bool:
        """Return whether a term with a weight at ``fraction`` of the run needs the dense model's hidden states."""
        return any(term.needs_teacher and term.weight_at(fraction) != 0 for term in self.terms())

    def language(
        self,
        hidden_TD: Tensor,
        targets_T: Tensor,
        head: Head,
        teacher_TD: Tensor | None,
        teacher_head: Logits,
    ) -> LanguageLosses | None:
        """Return :func:`language_losses`, or None if neither loss has a weight."""
        if not (self.lm or self.distillation):
            return None
        teacher_TD = teacher_TD if self.distillation else None
        return language_losses(hidden_TD, targets_T, head, self, teacher_TD, teacher_head, head.learned())

    def loss(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a micro-batch, and the detached values of it and of each term, unweighted, by name.

        Raises:
            UserError: A term's value is not a scalar tensor.
        """
        language = batch.language
        total = batch.hidden.new_zeros((), dtype=torch.float32) if language is None else language.weighted
        values: dict[str, Tensor] = {}
        for term in self.terms():
            weight = term.weight_at(batch.fraction)
            if weight == 0 and not term.measured_at_zero:
                continue
            with torch.set_grad_enabled(torch.is_grad_enabled() and bool(weight != 0)):
                value = term.value(batch)
            if not (isinstance(value, Tensor) and value.ndim == 0):
                found = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
                raise UserError(f"the value of the loss term {term.name} is {found}; return a scalar tensor.")
            values[term.name] = value.detach()
            if weight != 0 and not isinstance(term, LanguageTerm):
                total = total + weight * value
        if torch.is_grad_enabled() and not total.requires_grad:  # as where every term's weight still rises from 0
            total = total + 0 * batch.hidden.float().mean()
        return total, {TOTAL: total.detach(), **values}
