"""Cache of one-shot priors, computed once for a model and a calibration text."""

import hashlib
import inspect
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from leap_pl.base_model.sequence_length import check_sequence_length
from leap_pl.base_model.weights import Weight, model_fingerprint, rest_of
from leap_pl.errors import UserError
from leap_pl.escape import terminal
from leap_pl.files import atomic_file
from leap_pl.files.tensor_file import write_tensors
from leap_pl.inputs.paths import expanded
from leap_pl.inputs.register import exists, release_input
from leap_pl.masks import MaskSet
from leap_pl.masks.patterns import Pattern, Unstructured
from leap_pl.oneshot.fisher import FisherOptions, whole_model_batch
from leap_pl.oneshot.methods import method_named
from leap_pl.oneshot.prune import prune
from leap_pl.oneshot.walk import WalkOptions
from leap_pl.prior import grading

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEY = "cache_key"  # in a cached file's metadata or its mask's provenance: digest of what it was computed from
ALGORITHM = 4  # incremented when a method's masks change, to invalidate older cached ones

# Settings of a model's config that its inputs do not depend on.
UNRELATED = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "auto_map"}

logger = logging.getLogger(__name__)


class _Stream(Protocol):
    seq_length: int

    def blocks(self) -> Iterator[Any]: ...


class CalibrationData(Protocol):
    """Interface that calibration needs of a data module: a stream of token blocks."""

    @property
    def stream(self) -> _Stream:
        """Return a stream of blocks, each with ``seq_length`` ``tokens``."""


def one_shot_prior(
    model: "PreTrainedModel",
    weights: Mapping[str, Weight],
    method: str,
    sparsity: float | Pattern,
    *,
    base_model: str,
    data: CalibrationData | None,
    sequences: int = 128,
    fisher: FisherOptions | None = None,
    cache_dir: str | Path | None = "~/.cache/leap_pl/priors",
    device: torch.device | str | None = None,
    revision: str | None = None,
    progress: bool = True,
) -> MaskSet:
    """Return the one-shot mask of ``weights``, from the cache if possible; ``model`` is left bit-identical.

    Masks are cached in ``cache_dir`` by a hash of the model's fingerprint and dtype, of its other weights (norms,
    embeddings …) and config, of the weights' names, the calibration tokens themselves (not the text's name or size),
    the method with its settings, the sparsity and ``ALGORITHM``; for a method from elsewhere also of the file of its
    function, without which nothing is cached. The file stores the hash too; a file that is damaged, or has another hash
    or none, is recomputed with a warning.

    Args:
        model: Dense base model without gates.
        weights: Weights to prune.
        method: Name of a method in :data:`leap_pl.oneshot.methods.METHODS`.
        sparsity: Target sparsity, or a pattern.
        base_model: Name of the base model, for the MaskSet.
        data: Calibration text; a method that needs no inputs reads none, unless ``fisher`` is given.
        sequences: Number of the stream's blocks to calibrate on.
        fisher: Options to allocate the sparsity over the matrices by Fisher information; None for a uniform sparsity.
        cache_dir: Folder of the cache; None disables it.
        device: Device to compute on; by default the model's.
        revision: Revision of the base model on the hub, for the MaskSet.
        progress: Show a progress bar.

    Raises:
        UserError: If the text cannot be read, or pruning fails (see :func:`leap_pl.oneshot.prune.prune`).
    """
    pattern = Unstructured(sparsity) if isinstance(sparsity, float | int) else sparsity
    asked = method_named(method)
    calibration = data if asked.needs is not None or fisher is not None else None
    tokens_NT = None if calibration is None else _tokens(model, base_model, calibration, sequences)
    key = {
        **_key(model, weights, tokens_NT),
        "method": method,
        "settings": {} if asked.settings is None else asdict(asked.settings()),
        "pattern": [type(pattern).__name__, *asdict(pattern).values()],
    }
    if fisher is not None:
        key["fisher"] = asdict(fisher) | {"costs": "per token of the text"}  # of experts they were otherwise, before
    function, source = asked.function(), None
    if not function.__module__.startswith("leap_pl."):  # one's own method, whose code may change from run to run
        with suppress(TypeError, OSError):
            source = hashlib.sha256(Path(inspect.getfile(function)).read_bytes()).hexdigest()
        key["source"] = source
        cache_dir = cache_dir if source is not None else None
    path = None
    if cache_dir is not None:
        path = _place(cache_dir, method, key)
        cached = _cached(path, _digest(key), model, weights)
        if cached is not None:
            logger.info("The %s prior was read from %s.", method, path)
            return cached.with_provenance(base_model=base_model, revision=revision)

    pruned = prune(
        model,
        tokens_NT,
        method=method,
        pattern=pattern,
        fisher=fisher,
        weights=weights,
        walk=WalkOptions(
            WalkOptions().batch_size if fisher is None or tokens_NT is None else _fisher_batch(data, tokens_NT),
            device,
            first_target=getattr(data, "first_target", 1),
        ),
        update=False,
        base_model=base_model,
        revision=revision,
        progress=progress,
    )
    if path is not None:
        try:
            _save(pruned.masks, path, _digest(key))
        except UserError as error:  # a prior that cannot be cached is still usable
            logger.warning("The prior was not cached for the next run: %s", terminal(error))
    return pruned.masks


def _fisher_batch(data: CalibrationData | None, tokens_NT: Tensor) -> int:
    """Return the sequences in a batch of Fisher allocation: no more than learning has, which may recompute blocks."""
    return min(whole_model_batch(tokens_NT.shape[1]), getattr(data, "batch_size", 1))


def input_squares(
    model: "PreTrainedModel",
    weights: Mapping[str, Weight],
    *,
    base_model: str,
    data: CalibrationData | None,
    sequences: int = 128,
    cache_dir: str | Path | None = "~/.cache/leap_pl/priors",
    device: torch.device | str | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Return the result of :func:`.grading.measure_input_squares` on the dense model, from the cache if possible.

    Arguments and caching are those of :func:`one_shot_prior`; the cached file has one number an input.

    Raises:
        UserError: If the text cannot be read, or the model cannot be walked.
        ValueError: If ``data`` is None.
    """
    if data is None:
        raise ValueError("mean squares of inputs are measured on calibration text, and data is None")
    tokens_NT = _tokens(model, base_model, data, sequences)
    path, key = None, {**_key(model, weights, tokens_NT), "method": "squares"}
    if cache_dir is not None:
        path = _place(cache_dir, "squares", key)
        cached = _cached_squares(path, _digest(key), weights)
        if cached is not None:
            logger.info("The mean squares of the inputs were read from %s.", path)
            return cached
    squares = grading.measure_input_squares(model, weights, tokens_NT, WalkOptions(device=device), progress)
    if path is not None:
        try:
            with atomic_file(path) as temporary:
                layout = {name: (square.dtype, square.shape) for name, square in squares.items()}
                metadata = {KEY: _digest(key), "digest": _digest_of_squares(squares)}
                write_tensors(temporary, layout, squares.items(), lambda: metadata)
        except UserError as error:
            logger.warning("The mean squares of the inputs were not cached for the next run: %s", terminal(error))
    return squares


def _key(model: "PreTrainedModel", weights: Mapping[str, Weight], tokens_NT: Tensor | None) -> dict[str, Any]:
    """Return the part of the cache key that all methods share: model, weights, and N sequences of T tokens."""
    tokens = None
    if tokens_NT is not None:
        tokens = [list(tokens_NT.shape), hashlib.sha256(tokens_NT.contiguous().numpy().tobytes()).hexdigest()]
    return {
        "algorithm": ALGORITHM,
        "fingerprint": model_fingerprint(model),  # of the stored weights, and the same in every dtype
        "rest": _digest_of_rest(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": sorted(weights),
        "tokens": tokens,
    }


def _digest_of_rest(model: "PreTrainedModel") -> str:
    """Return a digest of what the fingerprint leaves out: norms, biases, embeddings, head and config.

    The inputs of the weights depend on them, and models whose norms or embeddings were trained differ in nothing else.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(rest_of(model)):
        whole = tensor.detach().to("cpu").contiguous()
        digest.update(f"{name} {whole.dtype} {tuple(whole.shape)}\n".encode())
        digest.update(whole.view(-1).view(torch.uint8).numpy().data)
    written = json.loads(model.config.to_json_string(use_diff=False))
    settings = {key: value for key, value in written.items() if key not in UNRELATED}
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()


def _digest(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()


def _place(cache_dir: str | Path, name: str, key: dict[str, Any]) -> Path:
    return expanded(cache_dir) / f"{name}-{_digest(key)[:24]}.safetensors"


def _save(mask: MaskSet, path: Path, key: str) -> None:
    """Cache ``mask`` with its ``key``, which reading removes: a cached mask is identical to a recomputed one."""
    mask.with_provenance(config={**mask.provenance.config, KEY: key}).save(path)


def _cached(path: Path, key: str, model: "PreTrainedModel", weights: Mapping[str, Weight]) -> MaskSet | None:
    if not exists(path):
        return None
    release_input(path)
    try:
        mask = MaskSet.load(path)
        mask.check(model, weights)
    except UserError as error:
        logger.warning("The cached prior is recomputed: %s", terminal(error))
        return None
    config = dict(mask.provenance.config)
    found = config.pop(KEY, None)
    if found != key:
        logger.warning("The cached prior is recomputed: %s %s.", path, _other_key(found))
        return None
    return mask.with_provenance(config=config)


def _other_key(found: Any) -> str:
    if found is None:
        return "does not say what it was computed from"
    return "was computed from another model, text or method than its name says"


def _cached_squares(path: Path, key: str, weights: Mapping[str, Weight]) -> dict[str, Tensor] | None:
    if not exists(path):
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            squares = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        logger.warning("The mean squares of the inputs in %s are recomputed: %s", terminal(path), terminal(error))
        return None
    if metadata.get(KEY) != key:
        logger.warning("The mean squares of the inputs are recomputed: %s %s.", path, _other_key(metadata.get(KEY)))
        return None
    if metadata.get("digest") != _digest_of_squares(squares):
        logger.warning("The mean squares of the inputs in %s are recomputed: they do not match their digest.", path)
        return None
    for name, weight in weights.items():
        found, shape = squares.get(name), weight.parameter.shape
        expected = (*shape[:-2], shape[weight.input_dim])
        if found is None or found.dtype != torch.float32 or found.shape != expected or not bool((found >= 0).all()):
            logger.warning(
                "The mean squares of the inputs in %s are recomputed: those of %s are damaged.",
                terminal(path),
                terminal(name),
            )
            return None
    return {name: squares[name] for name in weights}


def _digest_of_squares(squares: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(squares):
        digest.update(f"{name} {squares[name].dtype} {tuple(squares[name].shape)}\n".encode())
        digest.update(squares[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _tokens(model: "PreTrainedModel", base_model: str, data: CalibrationData, sequences: int) -> Tensor:
    check_sequence_length(model.config, data.stream.seq_length, base_model, "seq_length")
    return torch.tensor([list(block.tokens) for block in islice(data.stream.blocks(), sequences)], device="cpu")
