"""Command line of recover: that of fit, with a mask that stays as it is and weights that are trained."""

from typing import Any, ClassVar

from leap_pl.cli.fit import LeapCLI, is_fixed
from leap_pl.cli.fit import run as run_fit
from leap_pl.errors import UserError
from leap_pl.gates import FixedGate


class RecoverCLI(LeapCLI):
    """Command line of fit with the defaults of recover."""

    name, fixes = "recover", True
    defaults: ClassVar[dict[str, Any]] = {
        **LeapCLI.defaults,
        "model.gate": {"class_path": f"{FixedGate.__module__}.{FixedGate.__qualname__}"},
        "model.train_weights": "kept",
        "model.prior.method": "none",
        # The terms of a mask are constants.
        "model.objective.lm": 0.5,
        "model.objective.distillation": 0.5,
        "model.objective.budget": 0.0,
        "model.objective.weight": 0.0,
    }

    def check_kind(self, settings: Any) -> None:
        """Check that the settings of a run fix the mask.

        Raises:
            UserError: They do not.
        """
        if not is_fixed(settings):
            raise UserError(
                "leap_pl recover leaves a mask as it is, and model.gate learns one. Leave --model.gate out, or learn "
                "mask and weights together: leap_pl fit --model.train_weights kept."
            )


def run(words: list[str]) -> LeapCLI | None:
    """Train weights under a fixed mask; return None if the run was already finished.

    Raises:
        UserError: As :func:`leap_pl.cli.fit.run`.
    """
    return run_fit(["fit", *words[1:]], RecoverCLI)
