"""Check the settings of a base model against the weights in its files, before a model is built from them."""

import copy
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from leap_pl.base_model.stored_weights import StoredWeights
from leap_pl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MOST_COUNTED = 1 << 16  # of things not bounded by the shape of a weight, such as the labels of a classifier
MOST_BUFFERED = 1 << 28  # numbers in the buffers of a model, such as GPT-2's causal masks
_SLACK = 2  # head and embedding may be tied in the files, and separate in the settings

# Settings of the text model only, which is what is gated; other parts are rarely as large.
_LAYERS = re.compile(r"^(n_layers?|num_layers|num_hidden_layers|block_count)$")
_DIMENSIONS = re.compile(
    r"^(hidden_size|n_embd|d_model|embedding_size|word_embed_proj_dim|intermediate_size|moe_intermediate_size"
    r"|shared_expert_intermediate_size|ffn_dim|d_ff|n_inner|inner_dim|vocab_size|head_dim|n_heads?|q_lora_rank|kv_lora_rank"
    r"|(num|n)_\w*(heads|experts)|embedding_length|feed_forward_length|expert_feed_forward_length|expert_count"
    r"|attention\.(head_count|head_count_kv|key_length|value_length))$"
)
_COUNTS = re.compile(r"^(num|n)_(?!\w*(position|ctx|token|param|step|sample|frame))\w+$")
_PARTS = ("text_config", "decoder", "llm_config")


def check_settings(settings: Mapping[str, Any], stored: StoredWeights | None, name: str) -> None:
    """Check that the counts and dimensions in a model's settings are consistent with its weights.

    Readers trust the settings: 10¹² layers create a list of as many names before anything is loaded.

    Args:
        settings: Content of ``config.json``, or the keys of a GGUF file without the prefix of its architecture.
        stored: Shapes in the files; None if unknown, in which case only fixed limits are checked.
        name: Name of the base model, for messages.

    Raises:
        UserError: A setting is not a number, is negative, or is larger than the weights allow.
    """
    bounds: list[tuple[re.Pattern[str], int, str]] = []
    if stored is not None and stored.shapes:
        largest = max(stored.largest_dimension, stored.numbered)
        layers = stored.numbered or len(stored.shapes)
        bounds = [
            (_LAYERS, layers, f"the names of the weights count to {layers}"),
            (_DIMENSIONS, largest, f"the largest dimension of a weight is {largest}"),
        ]
    bounds += [(_LAYERS, MOST_COUNTED, ""), (_DIMENSIONS, 1 << 31, ""), (_COUNTS, MOST_COUNTED, "")]
    for key, value in _flat(settings):
        for pattern, most, why in bounds:
            if not pattern.match(key):
                continue
            for number in value if isinstance(value, list | tuple) else [value]:
                if number is None:
                    continue
                if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < float("inf"):
                    raise UserError(
                        f"base model {name}: its settings give {key} as {str(number)[:60]!r}, which is not a count. "
                        "Fetch the model again."
                    )
                if number > most:
                    raise UserError(
                        f"base model {name}: its settings give {key} as {str(number)[:60]}, and "
                        f"{why or f'at most {most} is accepted'}. Check that config.json belongs to the weights."
                    )


def _flat(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and key in _PARTS:
            yield from _flat(value)
        elif not isinstance(value, Mapping):
            yield str(key), value


def check_skeleton(
    config: "PreTrainedConfig", stored: StoredWeights | None, name: str, *, trust_remote_code: bool = False
) -> None:
    """Check that the model of ``config``, built on the meta device, has no more weights than the files.

    Raises:
        UserError: It has more weights, or buffers that would fill the memory.
    """
    from transformers import AutoModelForCausalLM

    if stored is None or not stored.shapes:
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    weights = sum(parameter.numel() for parameter in model.parameters())
    if weights > _SLACK * stored.elements:
        raise UserError(
            f"base model {name}: its settings ask for {weights:,} weights, and its files contain {stored.elements:,}. "
            "Check that config.json belongs to them."
        )
    tables = sum(buffer.numel() for buffer in model.buffers())
    if tables > max(MOST_BUFFERED, stored.elements):
        raise UserError(
            f"base model {name}: its settings ask for tables of {tables:,} numbers in addition to the weights. "
            "Check that config.json belongs to them."
        )
