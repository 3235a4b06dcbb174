"""Method of a mask, for its model card: the settings that decide what it is, and the paper to cite."""

from typing import TYPE_CHECKING, Any

from leap_pl.export.hub import shortened
from leap_pl.masks.mask_set import BEFORE, SPARSE_BASE, TRAINED

if TYPE_CHECKING:
    from leap_pl.masks import Provenance

BLOCK_LENGTH = "block length, tokens"

PAPERS = {  # method in the provenance of a mask → name of the paper, and its number in arXiv
    "leap": ("LEAP", "2605.17289"),
    "maskllm": ("MaskLLM", "2409.17481"),
    "patch": ("PATCH", "2509.23410"),
    "magnitude": ("magnitude pruning", "1506.02626"),
    "wanda": ("Wanda", "2306.11695"),
    "sparseswaps": ("SparseSwaps", "2512.10922"),
    "sparsegpt": ("SparseGPT", "2301.00774"),
    "admm": ("ADMM", "2401.02938"),
}


def citation(method: str) -> str:
    """Return the section of a model card with the paper of ``method``; an empty string if none is known."""
    if method not in PAPERS:
        return ""
    name, number = PAPERS[method]
    return f"## Citation\n\nIf you use it, cite {name}, [arXiv:{number}](https://arxiv.org/abs/{number})."


def decisive_settings(made: "Provenance") -> dict[str, str]:
    """Return the settings that decide what a mask is, name → value, as far as its provenance has them."""
    config, stayed = made.config, _within(made.config, "mask")  # what made a mask that stayed as it was
    origin, earlier = config, []
    while isinstance(before := _within(origin, "mask", "config"), dict):  # the mask of a mask that stayed
        if TRAINED in before and (_within(origin, TRAINED, "start") or _within(origin, SPARSE_BASE)):
            earlier.append(_texts(before))
        origin = before
    of_start = _within(config, TRAINED, BEFORE)
    earlier += [_texts({"data": text}) for text in (of_start if isinstance(of_start, list) else ())]
    steps, of = _within(config, "steps"), _within(config, "max_steps")
    groups = _within(config, "optimizer", "groups")  # of masks and of weights, where both learn
    optimizer = groups[0] if isinstance(groups, list) and groups else _within(config, "optimizer")
    losses = {name: _within(config, "objective", name) for name in ("lm", "distillation")}
    settings = {
        "method": made.method,
        "pattern": _within(config, "pattern"),
        "target sparsity": made.sparsity,
        "text": _texts(config),
        "part of the text": _part(config),
        "separator of documents": _within(config, "data", "separator") or _within(config, "separator"),
        BLOCK_LENGTH: _within(config, "data", "seq_length") or _within(config, "seq_length"),
        "blocks that begin with BOS": _within(config, "data", "bos") or _within(config, "bos"),
        "tokens read": _within(config, "data", "tokens"),
        "passes over the text": _within(config, "data", "passes"),
        "calibration sequences": _within(config, "sequences"),
        "optimizer steps": steps if steps == of or of is None else f"{steps} of {of}",
        "optimizer": _within(config, "optimizer", "class"),
        "learning rate": None if stayed else _within(optimizer, "lr"),
        "trained weights": _within(config, TRAINED, "kind"),
        "embeddings and head": "trained" if _within(config, TRAINED, "embeddings") else None,
        "learning rate of weights": _within(config, TRAINED, "lr"),
        "weights that training started from": shortened(_within(config, TRAINED, "start")),
        "text that they were trained on before": ", ".join(dict.fromkeys(earlier)),
        "text that the mask was made with": _texts(origin) if stayed else None,
        "losses": ", ".join(f"{name} {weight}" for name, weight in losses.items() if weight),
        "α": None if stayed else _schedule(config, "alpha"),
        "τ": None if stayed else _schedule(config, "tau"),
        "prior": None if stayed else _prior(config),
        "seed": _within(config, "seed"),
        "fingerprint of the base model": made.fingerprint,
        "versions": ", ".join(f"{name} {version}" for name, version in made.versions.items()),
    }
    return {name: str(value) for name, value in settings.items() if value not in (None, "")}


def _part(config: Any) -> str:
    """Return configuration, split and column of the text, those that are not the usual ones."""
    usual = {"config_name": None, "split": "train", "text_column": "text"}
    found = {name: _within(config, "data", name) or _within(config, name) or value for name, value in usual.items()}
    return ", ".join(f"{name} {value}" for name, value in found.items() if value != usual[name])


def _texts(config: Any) -> str:
    texts = _within(config, "data", "text") or _within(config, "text") or []
    return ", ".join(shortened(str(text)) for text in (texts if isinstance(texts, list) else [texts]))


def _prior(config: Any) -> Any:
    prior = _within(config, "prior")
    words = ["a given mask" if _within(prior, "mask") else _within(prior, "method")]
    fisher = _within(prior, "fisher")
    words += [f"allocated by Fisher information ({fisher})"] if fisher is not None else []
    words += ["graded"] if _within(prior, "graded") is True else []
    return ", ".join(map(str, words)) if words[0] is not None else None


def _schedule(config: Any, name: str) -> str | None:
    start, end = (_within(config, "annealing", name, end) for end in ("start", "end"))
    return None if start is None else f"{start} → {end}"


def _within(config: Any, *keys: str) -> Any:
    """Return the value under nested keys; None where one is missing, as in the provenance of another version."""
    for key in keys:
        config = config.get(key) if isinstance(config, dict) else None
    return config
