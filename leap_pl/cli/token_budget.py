"""Length of a run as a number of tokens: ``--tokens 10M``."""

import os
import re
from collections.abc import Mapping
from typing import Any

import torch

from leap_pl.errors import UserError
from leap_pl.inputs.ranges import check_numbers

SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def take_tokens(settings: Any, words: list[str], configs: Mapping[str, Mapping[Any, Any]]) -> None:
    """Convert ``tokens`` in the settings of fit to the ``trainer.max_steps`` that the run has.

    A ``trainer.max_steps`` overrides ``tokens`` if it comes later: typed after all configs, or in a later config.

    Args:
        settings: Settings of fit, which are changed.
        words: Words of the command line.
        configs: Name of each file of settings → its settings, in their order.

    Raises:
        UserError: Both are typed, or a config follows ``trainer.max_steps``; or ``tokens`` is not a number.
    """
    if settings.tokens is None:
        return
    typed = [word.partition("=")[0] for word in words]
    given = "--tokens" in typed
    if "--trainer.max_steps" in typed:
        after = words[len(typed) - typed[::-1].index("--trainer.max_steps") :]
        later = {*typed[len(typed) - len(after) :]} | {word.partition("=")[2] or word for word in after}
        if given or later & {"--config", "-c", *configs}:  # a file that comes later has the last word
            raise UserError("--tokens and --trainer.max_steps both set the length of the run. Leave one of them out.")
        settings.tokens = None
        return
    last = None if given else _last_of(configs)
    if last == "max_steps" and any(one.get("tokens") is not None for one in configs.values()):
        settings.tokens = None
        return
    check_numbers(settings.as_dict())  # the number of steps is computed from others
    settings.trainer.max_steps, settings.tokens = steps_of(str(settings.tokens), settings), None


def _last_of(configs: Mapping[str, Mapping[Any, Any]]) -> str | None:
    """Return which of ``tokens`` and ``max_steps`` the last config that has one gives; ``tokens`` if it has both."""
    last = None
    for settings in configs.values():
        trainer = settings.get("trainer")
        if settings.get("tokens") is not None:
            last = "tokens"
        elif isinstance(trainer, Mapping) and trainer.get("max_steps") is not None:
            last = "max_steps"
    return last


def steps_of(tokens: str, settings: Any) -> int:
    """Return the number of optimizer steps that read ``tokens`` tokens, rounded to the nearest, at least 1.

    Args:
        tokens: Number with an optional suffix K, M, B or T: ``10M``.
        settings: Settings of fit.

    Raises:
        UserError: ``tokens`` is not such a number.
    """
    data, trainer = settings.data, settings.trainer
    a_step = data.batch_size * data.seq_length * trainer.accumulate_grad_batches * ranks_of(trainer)
    return max(1, round(number_of(tokens) / a_step))


def number_of(tokens: str) -> float:
    """Return the number that ``tokens`` spells.

    Raises:
        UserError: It spells none above 0.
    """
    found = re.fullmatch(r"(\d[\d_]*\.?\d*(?:e\d{1,2})?)\s*([kmbt]?)", tokens.strip().lower())
    number = float(found[1].replace("_", "")) * SUFFIXES[found[2]] if found else 0.0
    if number < 1:
        raise UserError(f"--tokens is {tokens}; give a number of tokens such as 500K, 10M or 1.5B.")
    return number


def ranks_of(trainer: Any) -> int:
    """Return the number of processes that the settings of a trainer start, or that a launcher has started."""
    if os.environ.get("WORLD_SIZE", "").isdigit():
        return int(os.environ["WORLD_SIZE"])
    devices = trainer.devices
    if isinstance(devices, str) and "," in devices:
        devices = [device for device in devices.split(",") if device.strip()]
    if isinstance(devices, list):
        count = len(devices)
    elif str(devices).isdigit():
        count = int(devices)
    else:  # auto, or -1 for all
        count = torch.cuda.device_count() if trainer.accelerator in ("auto", "cuda", "gpu") else 1
    return max(1, count) * trainer.num_nodes
