"""Command line of recover: that of fit, with a mask that stays as it is and weights that are trained."""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_warn

from leap_pl.cli.arguments import plain
from leap_pl.cli.configs import options_with_values, setting_of
from leap_pl.cli.fit import LeapCLI, is_fixed
from leap_pl.cli.fit import run as run_fit
from leap_pl.errors import UserError, listing
from leap_pl.gates import FixedGate
from leap_pl.inputs.register import is_typed
from leap_pl.prior.settings import NO_METHOD

# Settings of learning a mask that are not used where it stays → that of the weights.
LEARNING = {
    f"model.{name}": f"model.weight_training.{name.removeprefix('optimizer.')}"
    for name in ("optimizer.lr", "optimizer.weight_decay", "warmup_steps")
}


# Terms of the loss that depend on the mask alone.
CONSTANT = tuple(f"model.objective.{name}" for name in ("budget", "budget_scope", "weight"))


class RecoverCLI(LeapCLI):
    """Command line of fit with the defaults of recover."""

    name, fixes = "recover", True
    _rate_of_class = False  # whether a rate is typed for the class of an optimizer
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

    def check_typed(self, words: list[str]) -> None:
        """Check that no setting of learning a mask is typed.

        Raises:
            UserError: One is.
        """
        given: dict[str, str] = {}
        for word, following in zip(words, [*words[1:], ""], strict=True):
            option, _, value = word.partition("=")
            name = option.removeprefix("--").replace(".init_args", "").removesuffix(".class_path")
            if option.startswith("--"):
                given[name] = value or following
        # What is the default, or null, takes back what a config gives.
        given = {name: value for name, value in given.items() if not _is(value, self.defaults.get(name))}
        idle = {name: LEARNING.get(name) for name in given if name in LEARNING or name.startswith("model.annealing")}
        idle |= {name: None for name in given if name in CONSTANT}
        if "model.optimizer" in given:  # a class that may need a rate to be made at all, so that it is warned of
            rate = idle.pop("model.optimizer.lr", None)
            self._rate_of_class = rate is not None or re.search(r"\blr\b", given["model.optimizer"]) is not None
        if "model.mask" in given:
            of_mask = {name for name in given if name.startswith("model.prior.") or name == "model.gate.pattern"}
            idle |= dict.fromkeys(of_mask - {"model.prior.cache_dir"})
        if idle:
            instead = [f"--{name}" for name in idle.values() if name is not None]
            remedy = f"For the weights, type {listing(instead)}" if instead else "Leave out what is not meant"
            named = listing([f"--{name}" for name in sorted(idle)])
            raise UserError(f"{named} would not be used: the mask is not learned. {remedy}.")

    def check_kind(self, settings: Any) -> None:
        """Check that the settings of a run fix the mask, and say which.

        Raises:
            UserError: They do not.
        """
        given = any(settings.get(name) for name in ("model.mask", "model.prior.mask", "ckpt_path"))
        if not given and settings.get("model.prior.method") == NO_METHOD:
            raise UserError(
                "leap_pl recover trains the weights that a mask keeps, and no mask is given. Add --model.mask: a file, "
                "the folder of a run or of an exported model, or a hub id."
            )
        if settings.get("model.prior.mask") and not (settings.get("model.mask") or settings.get("ckpt_path")):
            raise UserError(
                "model.prior.mask names a mask to learn from, in fit. For a mask that stays as it is give --model.mask "
                f"{settings.get('model.prior.mask')}, from which its sparsity, its pattern and the rate follow."
            )
        if not is_fixed(settings):
            config = next((name for name, group in self._configs.items() if _has_gate(group)), None)
            remedy = "Leave --model.gate out"
            if config is not None and not is_typed("model.gate"):
                option = next(option for option, value in options_with_values(self._words) if value == config)
                remedy = f"Leave out {option} {config}, which is for fit, and type what is meant of it"
            raise UserError(
                f"leap_pl recover leaves a mask as it is, and model.gate learns one. {remedy}; or learn mask and "
                "weights together: leap_pl fit --model.train_weights kept."
            )
        self._warn_of_unused(settings)

    def _warn_of_unused(self, settings: Any) -> None:
        """Warn of settings of learning a mask that a config gives; those that are typed are refused."""
        defaults = self.parsers["fit"].get_defaults()
        keys = {name: name.replace("optimizer.", "optimizer.init_args.") for name in LEARNING}
        named = [word for config in self._configs for word in ("--config", config)]
        # Of a class that a config names, only what it also sets: the rest are defaults of the class.
        keys = {name: key for name, key in keys.items() if setting_of(named, self._configs, key) is not None}
        keys |= {name: name for name in ("model.annealing", *CONSTANT)}
        if settings.get("model.mask") is not None:
            of_config = setting_of(named, self._configs, "model.gate.init_args.pattern") is not None
            if of_config or is_typed("model.gate.pattern"):
                keys["model.gate.pattern"] = "model.gate.init_args.pattern"
            parts = [part for part in plain(defaults.get("model.prior")) if part != "cache_dir"]
            keys |= {f"model.prior.{part}": f"model.prior.{part}" for part in parts}
        idle = [name for name, key in keys.items() if plain(settings.get(key)) != plain(defaults.get(key))]
        if self._rate_of_class and "model.optimizer.lr" not in idle:
            idle.append("model.optimizer.lr")
        if idle:
            instead = [LEARNING[name] for name in idle if name in LEARNING]
            remedy = f" For the weights, set {listing(instead)}." if instead else ""
            rank_zero_warn(f"not used, since the mask is not learned: {listing(idle)}.{remedy}")


def _is(value: str, default: Any) -> bool:
    """Return whether ``value``, as it is typed, is ``default`` or null."""
    try:
        return value in ("null", str(default)) or float(value) == default
    except ValueError:
        return False


def _has_gate(config: Mapping[Any, Any]) -> bool:
    """Return whether a ``config`` sets the gate."""
    model = config.get("model")
    return isinstance(model, dict) and model.get("gate") is not None


def run(words: list[str]) -> LeapCLI | None:
    """Train weights under a fixed mask; return None if the run was already finished.

    Raises:
        UserError: As :func:`leap_pl.cli.fit.run`.
    """
    return run_fit(["fit", *words[1:]], RecoverCLI)
