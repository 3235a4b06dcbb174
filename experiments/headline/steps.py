"""The steps of a cell: each one command of leap_pl, with a digest of all that it depends on."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.headline.digests import digest, identity
from experiments.headline.experiment import ROLES, SHOWN, Cell, Experiment, laid_over
from leap_pl.errors import UserError
from leap_pl.oneshot.methods import DEFAULT, method_named

# Settings of a model that are of learning a mask alone: recover has its own, or none.
OF_MASKS = ("gate", "annealing", "prior", "objective")
# Settings of a fit that leave its mask as it is.
SILENT = ("checkpoint", "mask_export", "sparsity_log", "progress")
SILENT_TRAINER = ("logger", "log_every_n_steps", "val_check_interval", "limit_val_batches", "num_sanity_val_steps")


@dataclass(frozen=True)
class Step:
    """One thing to do for a cell.

    What goes into ``digest`` decides what is done again: a change there makes every finished cell new.

    Attributes:
        name: Unique within the cell.
        digest: Of its settings and of what it reads.
        words: The command, as it is typed after ``leap_pl``.
        output: The file that is there once it is done.
        settings: What the command does, as plain values: the options of prune and evaluate, the config of fit.
        work: (instead of words) A function that writes ``output``.
    """

    name: str
    digest: str
    output: Path
    words: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    work: Callable[[], None] | None = None


class Steps:
    """Where the cells of an experiment are in ``folder``, and the steps each of them takes."""

    def __init__(self, experiment: Experiment, folder: Path) -> None:
        """Take the experiment and the folder that holds one folder a cell."""
        self.experiment, self.folder = experiment, folder

    def place(self, cell: Cell) -> Path:
        """The folder of ``cell``."""
        return self.folder / cell.name

    def mask(self, cell: Cell) -> Path:
        """The mask of ``cell``, once it is made."""
        return self.place(cell) / "made" / "mask.safetensors"

    def config(self, cell: Cell) -> Path:
        """The config of ``cell`` that ``leap_pl fit`` or ``leap_pl recover`` reads."""
        return self.place(cell) / f"{self._verb(cell)}.yaml"

    @staticmethod
    def _verb(cell: Cell) -> str:
        return "fit" if cell.mask is None else "recover"

    def checkpoint(self, cell: Cell) -> Path | None:
        """The newest checkpoint of a learned cell that is not finished; None where nothing is saved.

        Not simply ``last.ckpt``: for a moment, while the next one is saved, that link leads nowhere.
        """
        saved = [path for path in (self.place(cell) / "checkpoints").glob("*.ckpt") if path.exists()]
        return max(saved, key=lambda path: (path.stat().st_mtime_ns, path.name), default=None)

    # -- making -------------------------------------------------------------------------------------------

    def make(self, cell: Cell, kept: Cell | None = None) -> Step | None:
        """The step that makes the mask of ``cell``; None for the dense model.

        Args:
            cell: What is made.
            kept: The cell whose mask is kept, where ``cell`` is the best of others.
        """
        if cell.fit is not None:
            return self._fit(cell)
        return None if cell.prune is None else self._prune(cell, cell.prune, kept)

    def _prune(self, cell: Cell, options: dict[str, Any], kept: Cell | None) -> Step:
        options = {"model": cell.model.base_model, **options}
        options |= {} if options.get("pattern") else {"sparsity": cell.sparsity}
        told = dict(options)
        if kept is not None:
            options.pop("sparsity", None)
            told = options | {"mask": self._digest_of_mask(kept)}
            options |= {"mask": str(self.mask(kept))}
        for name in ("model", "text", "layer_sparsity", *(["mask"] if kept is None else [])):
            if name in told:
                told[name] = identity(told[name])
        words = ["prune", *_flags(options), "--output_dir", str(self.mask(cell).parent), "--force"]
        return Step("make", digest(["prune", told]), self.mask(cell), words, options)

    def _fit(self, cell: Cell) -> Step:
        config, told = self.fit_config(cell), self.fit_config(cell, silent=True)
        told["model"]["base_model"] = identity(told["model"]["base_model"])
        if "annealing" in told["model"]:
            # Where it used to be: cells that were finished then are still known by their digests.
            told["annealing"] = told["model"].pop("annealing")
        for name in ("text", "validation_text"):
            if told["data"].get(name):
                told["data"][name] = identity(told["data"][name])
        prior = told["model"].get("prior", {})
        if cell.prior is not None:
            prior["mask"] = self._digest_of_mask(self.experiment.cells[cell.prior])
        elif prior.get("mask"):
            prior["mask"] = identity(prior["mask"])
        if prior.get("masks"):
            prior["masks"] = {form: identity(mask) for form, mask in prior["masks"].items()}
        if cell.mask is not None:
            kept = self.experiment.cells[cell.mask]
            told["model"]["mask"] = self._digest_of_mask(kept)
            if self._updates(kept):
                told["model"].pop("weights", None)  # of that cell too
        if told["model"].get("weights"):
            told["model"]["weights"] = identity(told["model"]["weights"])
        verb = self._verb(cell)
        words = [verb, "--config", str(self.config(cell))]
        return Step("make", digest([verb, told]), self.mask(cell), words, config)

    def _digest_of_mask(self, cell: Cell) -> str:
        step = self.make(cell)
        assert step is not None
        return step.digest

    def fit_config(self, cell: Cell, *, silent: bool = False) -> dict[str, Any]:
        """The whole config of a learned cell; with ``silent``, without what does not change its mask or weights."""
        experiment = self.experiment
        shared = dict(experiment.learn)
        if cell.mask is not None:
            shared["model"] = {key: value for key, value in shared.get("model", {}).items() if key not in OF_MASKS}
        config = laid_over(shared, cell.fit or {})
        model, data, trainer = (config.setdefault(part, {}) for part in ("model", "data", "trainer"))
        model["base_model"] = cell.model.base_model
        if cell.mask is None:
            model.setdefault("sparsity", cell.sparsity)
        else:
            kept = experiment.cells[cell.mask]
            model["mask"] = str(self.mask(kept))
            if self._updates(kept):
                model["weights"] = str(self.mask(kept).parent / "model")
        if cell.prior is not None:
            model["prior"] = {**model.get("prior", {}), "mask": str(self.mask(experiment.cells[cell.prior]))}
        if "seq_length" not in data:
            raise UserError(f"the config of {cell.name} lacks data.seq_length, and its steps follow from that. Add it.")
        trainer["max_steps"] = max(cell.tokens // self.tokens_of_step(config), 1)
        if silent:
            left = {part: value for part, value in config.items() if part not in SILENT}
            return left | {"trainer": {k: v for k, v in trainer.items() if k not in SILENT_TRAINER}}
        place = self.place(cell)
        trainer.setdefault(
            "logger",
            {
                "class_path": "TensorBoardLogger",
                "init_args": {"save_dir": str(place), "name": "", "version": "log", "default_hp_metric": False},
            },
        )
        every = max(experiment.checkpoint_tokens // self.tokens_of_step(config), 1)
        config["checkpoint"] = {
            "every_n_train_steps": every,
            **config.get("checkpoint", {}),
            "dirpath": str(place / "checkpoints"),
        }
        config["mask_export"] = {"folder": str(self.mask(cell).parent)}
        return config

    @staticmethod
    def tokens_of_step(config: dict[str, Any]) -> int:
        """Tokens of one optimizer step of ``leap_pl fit`` with ``config``."""
        data, trainer = config["data"], config.get("trainer", {})
        return int(data["seq_length"] * data.get("batch_size", 1) * trainer.get("accumulate_grad_batches", 1))

    # -- measuring ----------------------------------------------------------------------------------------

    def measures(self, cell: Cell, made: str | None) -> list[Step]:
        """The steps that measure ``cell``, whose mask has the digest ``made``: perplexities first."""
        experiment = self.experiment
        roles = SHOWN if cell.fit is None else ROLES
        by_length: dict[int | None, list[str]] = {}
        for role in roles:
            text = experiment.texts[role]
            by_length.setdefault(text.max_tokens, []).append(text.text)
        steps = [
            self._evaluate(cell, made, f"perplexity-{most or 'all'}", {"perplexity": texts, "max_tokens": most}, texts)
            for most, texts in by_length.items()
        ]
        for role in cell.texts:
            text = experiment.texts[role]
            what = {"perplexity": [text.text], "max_tokens": text.max_tokens}
            steps.append(self._evaluate(cell, made, f"text-{role}-{text.max_tokens or 'all'}", what, [text.text]))
        by_limit: dict[int | None, list[str]] = {}
        for task, limit in experiment.tasks.items() if cell.tasks else ():
            by_limit.setdefault(limit, []).append(task)
        for limit, tasks in by_limit.items():
            folder = cell.model.evaluate.get("tasks_folder")
            data = [] if folder is None else [str(Path(folder, task)) for task in tasks]
            steps.append(self._evaluate(cell, made, f"tasks-{limit or 'all'}", {"tasks": tasks, "limit": limit}, data))
        return steps

    def _evaluate(self, cell: Cell, made: str | None, name: str, what: dict[str, Any], reads: list[str]) -> Step:
        options = {key: value for key, value in what.items() if value is not None}
        options |= {key: value for key, value in cell.model.evaluate.items() if self._fits(key, what)}
        told = ["evaluate", options, made or identity(cell.model.base_model), [identity(item) for item in reads]]
        output = self.place(cell) / "measured" / f"{name}.json"
        words = ["evaluate", *self.subject(cell), *_flags(options), "--output", str(output)]
        return Step(name, digest(told), output, words, options)

    @staticmethod
    def _fits(option: str, what: dict[str, Any]) -> bool:
        """Whether an option of evaluate speaks of what is measured: no task has a seq_length."""
        of_texts = ("seq_length", "stride", "share", "max_tokens", "text_column", "config_name", "split")
        of_tasks = ("tasks_folder", "num_fewshot", "limit", "seed")
        return option not in (of_tasks if "perplexity" in what else of_texts)

    def subject(self, cell: Cell) -> list[str]:
        """The flags that say what is evaluated: the model with new weights, a mask over the base model, or that."""
        if cell.prune is None and cell.fit is None:
            return ["--model", cell.model.base_model]
        if self._updates(cell):
            return ["--model", str(self.mask(cell).parent / "model")]
        return ["--model", cell.model.base_model, "--mask", str(self.mask(cell))]

    @staticmethod
    def _updates(cell: Cell) -> bool:
        """Whether ``cell`` changes the weights that it keeps, once and for all: whether it writes a model."""
        return cell.prune is not None and bool(method_named(cell.prune.get("method", DEFAULT)).updates)


def _flags(options: dict[str, Any]) -> list[str]:
    words = []
    for name, value in options.items():
        if isinstance(value, list):
            value = ",".join(map(str, value)) if name in ("perplexity", "tasks") else str(value)
        words += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    return words
