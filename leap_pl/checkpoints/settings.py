"""Rules for resuming: which settings of module, data and Trainer come from the checkpoint, and which may change.

===========  =========================================================================================================
fixed        affects what is learned: taken from the checkpoint by default; a different value is an error
same         a name: taken from the checkpoint by default; another name is accepted for the same content, which is
             compared by a fingerprint, a digest or what blocks begin with
kept         does not affect what is learned: taken from the checkpoint by default; can be overridden
free         never taken from a checkpoint
===========  =========================================================================================================

``trust_remote_code`` is free, so that no file can turn it on.
"""

import json
from collections.abc import Mapping
from typing import Any, Literal

from leap_pl.checkpoints.class_spec import same
from leap_pl.errors import UserError
from leap_pl.inputs.plain_values import display

Rule = Literal["fixed", "same", "kept", "free"]

MODEL: dict[str, Rule] = {
    "base_model": "same",
    "sparsity": "fixed",
    "gate": "fixed",
    "targets": "fixed",
    "ignore": "fixed",
    "objective": "fixed",
    "annealing": "fixed",
    "prior": "fixed",
    "optimizer": "fixed",
    "lr_scheduler": "fixed",
    "warmup_steps": "fixed",
    "dtype": "fixed",
    "logits_dtype": "fixed",
    "activation_checkpointing": "kept",
    "revision": "same",
    "trust_remote_code": "free",
    "seed": "fixed",
    "train_weights": "fixed",
    "weight_training": "fixed",
    "weights": "fixed",
    # Sets the gate, the prior, the sparsity and the targets, which are fixed.
    "mask": "free",
}

# Those of them that say whose code runs, where code of models is trusted.
CODE_OF = ("base_model", "revision", "weights")

DATA: dict[str, Rule] = {
    "tokenizer": "same",
    "text": "same",
    "config_name": "fixed",
    "split": "fixed",
    "text_column": "fixed",
    "validation_text": "kept",
    "validation_config_name": "kept",
    "validation_split": "kept",
    "seq_length": "fixed",
    "batch_size": "fixed",
    "validation_sequences": "kept",
    "num_workers": "free",
    "separator": "fixed",
    "seed": "fixed",
    "tokenizer_revision": "same",
    "bos": "same",
}

TRAINER: dict[str, Rule] = {
    "max_steps": "fixed",
    "accumulate_grad_batches": "fixed",
    "gradient_clip_val": "fixed",
    "gradient_clip_algorithm": "fixed",
    "precision": "fixed",
    # Hardware and execution.
    "accelerator": "free",
    "strategy": "free",
    "devices": "free",
    "num_nodes": "free",
    "plugins": "free",
    "sync_batchnorm": "free",
    "deterministic": "free",
    "benchmark": "free",
    "inference_mode": "free",
    "use_distributed_sampler": "free",
    "detect_anomaly": "free",
    "profiler": "free",
    "barebones": "free",
    # Length: a run is one epoch of max_steps, and settings that would cut it short are refused elsewhere.
    "max_epochs": "free",
    "min_epochs": "free",
    "min_steps": "free",
    "max_time": "free",
    "limit_train_batches": "free",
    "overfit_batches": "free",
    "fast_dev_run": "free",
    "reload_dataloaders_every_n_epochs": "free",
    # Logging, validation and output.
    "logger": "free",
    "callbacks": "free",
    "limit_val_batches": "free",
    "limit_test_batches": "free",
    "limit_predict_batches": "free",
    "val_check_interval": "free",
    "check_val_every_n_epoch": "free",
    "num_sanity_val_steps": "free",
    "log_every_n_steps": "free",
    "enable_checkpointing": "free",
    "enable_progress_bar": "free",
    "enable_model_summary": "free",
    "default_root_dir": "free",
    "enable_autolog_hparams": "free",
    "model_registry": "free",
}

RULES: dict[str, Rule] = {
    f"{group}.{name}": rule
    for group, rules in (("model", MODEL), ("data", DATA), ("trainer", TRAINER))
    for name, rule in rules.items()
}

# Parts of a fixed setting that are paths, and do not affect what is learned.
FREE_PARTS = {"model.prior": ("cache_dir",)}
FILES_OF_PRIOR = ("cache_dir", "mask", "masks")

# Settings that determine the masked model of a checkpoint: those that validation must share with the run.
MASK_SETTINGS = (
    *("model.sparsity", "model.gate", "model.targets", "model.ignore", "model.train_weights", "model.weight_training"),
)

Settings = dict[str, Any]  # "model.sparsity" → a plain value


def settings_to_store(settings: Mapping[str, Any]) -> Settings:
    """Return those of ``settings``, by their names in the table, that a checkpoint stores for a resumed run."""
    return {name: without_free_parts(name, value) for name, value in settings.items() if RULES[name] != "free"}


def without_free_parts(name: str, value: Any) -> Any:
    """Return the setting ``name`` without its :data:`FREE_PARTS`."""
    if name not in FREE_PARTS or not isinstance(value, dict):
        return value
    return {key: part for key, part in value.items() if key not in FREE_PARTS[name]}


def check_settings(stored: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Check that a run resumes with the settings it was started with.

    Args:
        stored: Settings in the checkpoint.
        here: Settings of this run. Only settings in both are compared.

    Raises:
        UserError: If a fixed setting differs; the message gives both values and what to do.
    """
    changed = []
    for name, rule in RULES.items():
        # Accumulation is compared together with the number of ranks, in leap_pl.checkpoints.identity.
        wanted = rule == "fixed" and name != "trainer.accumulate_grad_batches"
        if wanted and name in stored and name in here:
            changed += differences(name, stored[name], here[name])
    if changed:
        more = f"; and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise UserError(
            f"the checkpoint was learned with other settings: {'; '.join(changed[:4])}{more}. To resume with the "
            "checkpoint's settings, leave these out; to change them, start a new run without --ckpt_path."
        )


def differences(name: str, stored: Any, here: Any) -> list[str]:
    """Return a message for a setting that differs, or for each part of it that does; an empty list if none does."""
    stored, here = without_free_parts(name, stored), without_free_parts(name, here)
    if same(stored, here):
        return []
    if isinstance(stored, dict) and isinstance(here, dict):
        inner = [side.get("init_args") if "class_path" in side else side for side in (stored, here)]
        one_class = same({**stored, "init_args": {}}, {**here, "init_args": {}}) if "class_path" in stored else True
        if one_class and isinstance(inner[0], dict) and isinstance(inner[1], dict):
            keys = [key for key in inner[0] if key in inner[1] or "class_path" not in stored]
            keys += [key for key in inner[1] if key not in inner[0] and "class_path" not in stored]
            parts = [(key, inner[0].get(key), inner[1].get(key)) for key in keys]
            return [line for key, was, now in parts for line in differences(f"{name}.{key}", was, now)]
        stored, here = stored.get("class_path", stored), here.get("class_path", here)
    return [f"{name} was {display(stored)} and is {display(here)}"]


def comparable(settings: Settings) -> dict[str, str]:
    """Return the ``settings`` that every rank of a run must have alike, as text.

    They are those that are ``fixed``, without names of files, which a machine may have in another place.
    """
    found = {}
    for name, value in settings.items():
        if RULES[name] == "fixed" and name != "model.weights":
            if name == "model.prior":
                value = {part: of_part for part, of_part in value.items() if part not in FILES_OF_PRIOR}
            found[name] = json.dumps(value, default=lambda other: type(other).__name__, sort_keys=True)
    return found
