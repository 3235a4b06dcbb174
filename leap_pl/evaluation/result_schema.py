"""Schema of a result file: every key that leap_pl writes, with its type and range.

Unknown keys, which a newer leap_pl may write, are dropped, except for numbers among the metrics of a task.
"""

import math
import re
from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator, ConfigDict, FailFast, Field
from typing_extensions import TypedDict

from leap_pl.base_model.prefix import Bos
from leap_pl.inputs.plain_values import checked, shown
from leap_pl.masks.provenance_schema import Config, Count, Finite, Name, Share, Word

MOST_WEIGHTS = 1 << 17  # a hundred layers with 256 experts that are stored one by one have 77,000
MOST_PERPLEXITY = 1.1e304  # a broken model's perplexity is written as exp(700)
SHARES = ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr")  # metrics that leap_pl computes with

Positive = Annotated[int, Field(ge=1, lt=1 << 53)]
Number = Annotated[float, Field(ge=-1e300, le=1e300, allow_inf_nan=False)]
Error = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Shares = Annotated[dict[Name, Share], Field(max_length=MOST_WEIGHTS)]
Names = Annotated[list[Name], Field(max_length=4096)]


def _answers(text: str) -> str:
    if re.search("[^01]", text):
        raise ValueError("should be a digit, 0 or 1, for each question")
    return text


def _scalar(value: Any) -> Any:
    if isinstance(value, dict | list) or (isinstance(value, str) and len(value) > 256):
        raise ValueError("should be a number or a short string")
    return value


Model = TypedDict(
    "Model",
    {
        "name": Name,
        "base_model": Name,
        "fingerprint": Word | None,
        "mask": Name | None,
        "mask_digest": NotRequired[Word | None],
        "ckpt_path": NotRequired[Name | None],
        "revision": NotRequired[Name | None],
        "class": NotRequired[Word],
        "dtype": NotRequired[Word],
        "parameters": NotRequired[Count],
    },
)

Sparsity = TypedDict(
    "Sparsity",
    {
        "global": Share,
        "weights": Shares,
        "layers": NotRequired[Shares],
        "projections": NotRequired[Shares],
        "counted": NotRequired[Count],
        "asked": NotRequired[Share | None],
    },
)


class Tokenizer(TypedDict):
    """Identity of a tokenizer."""

    vocabulary: Count
    digest: Word


class _Perplexity(TypedDict):
    """Perplexity with its protocol."""

    value: Annotated[float, Field(ge=1, le=MOST_PERPLEXITY, allow_inf_nan=False)]
    stderr: Error | None
    nll: Annotated[float, Field(ge=0, le=1e300, allow_inf_nan=False)]
    nll_stderr: NotRequired[Error | None]
    seq_length: Positive
    stride: Positive
    tokens: Positive
    predicted: NotRequired[Positive]
    max_tokens: NotRequired[Positive | None]
    share: NotRequired[Word]
    text_column: NotRequired[Word]
    config_name: NotRequired[Word | None]  # of a text by its hub id
    split: NotRequired[Word]
    text_digest: Word
    tokenizer: Tokenizer
    bos: NotRequired[Bos]
    window_nll: NotRequired[Annotated[list[Number], FailFast()]]


def _is_exp(perplexity: Any) -> Any:
    """Return ``perplexity``, checking that its value is that of its nll."""
    found, expected = perplexity["value"], math.exp(min(perplexity["nll"], 700.0))
    if not math.isclose(found, expected, rel_tol=1e-3):
        raise ValueError(f"should have the value exp(nll), {expected:.6g}, and not {found:.6g}")
    return perplexity


Perplexity = Annotated[_Perplexity, AfterValidator(_is_exp)]


class _Task(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    split: Word | None
    limit: Positive | None
    num_fewshot: Count | None
    version: Annotated[Any, AfterValidator(_scalar)]
    samples: Count
    source: NotRequired[Word]
    bos: NotRequired[Bos]
    correct: NotRequired[Annotated[str, AfterValidator(_answers)]]
    questions_digest: NotRequired[Word]


def _metrics(task: dict[str, Any]) -> dict[str, Any]:
    """Return ``task`` without unknown entries that are not numbers, checking that accuracies are from 0 to 1."""
    kept = {key: value for key, value in task.items() if key in _Task.__annotations__}
    for key, value in task.items():
        if key in SHARES and value is not None:
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(f"should have {key} from 0 to 1, and not {shown(repr(value), 40)}")
            kept[key] = float(value)
        elif key not in kept and isinstance(value, int | float) and not isinstance(value, bool) and len(key) <= 256:
            kept[key] = value
    return kept


Task = Annotated[_Task, AfterValidator(_metrics)]


class Mean(TypedDict):
    """Mean accuracy over tasks."""

    value: Share
    stderr: Share | None
    tasks: Names
    paper: bool


class Hardware(TypedDict):
    """Hardware of the measurement."""

    device: Word
    machine: Word
    processor: Word
    cores: Count | None
    threads: Count
    gpu: NotRequired[Word]


class Times(TypedDict):
    """Start and durations of the measurements."""

    started: Word
    seconds: dict[Name, Finite]


class Result(TypedDict):
    """Contents of a result file."""

    format: Word
    format_version: Count
    model: Model
    method: Word
    config: NotRequired[Config]
    sparsity: Sparsity
    seed: NotRequired[int]
    batch_size: NotRequired[Positive]
    perplexity: Annotated[dict[Name, Perplexity], Field(max_length=1024)]
    tasks: Annotated[dict[Name, Task], Field(max_length=4096)]
    mean: NotRequired[Mean | None]
    versions: NotRequired[dict[Word, Word]]
    commit: NotRequired[Word | None]
    hardware: NotRequired[Hardware]
    times: NotRequired[Times]
    unfinished: NotRequired[bool]  # whether something failed after the figures that are here
    cell: NotRequired[dict[Name, Any]]  # cell of an experiment, which has its own schema


def checked_result(values: Any) -> dict[str, Any]:
    """Return the plain ``values`` of a result file, validated and without unknown keys.

    Raises:
        ValueError: If an entry is missing or has another type or range; the message is one line that names it.
    """
    result: dict[str, Any] = checked(Result, values)
    return result
