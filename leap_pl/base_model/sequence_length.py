"""Longest sequence that a model supports."""

from typing import TYPE_CHECKING

from leap_pl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def longest_sequence(config: "PreTrainedConfig") -> int | None:
    """Return the maximum sequence length of the model in tokens, or None if the configuration sets no limit."""
    text = config.get_text_config()
    return getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)  # the second: MPT


def check_sequence_length(config: "PreTrainedConfig", seq_length: int, model: str, setting: str) -> None:
    """Check that a model supports sequences of ``seq_length`` tokens.

    Args:
        config: Config of the model.
        seq_length: Tokens in a sequence.
        model: Name of the model, for error messages.
        setting: Name of the setting that gives the length, for error messages.

    Raises:
        UserError: If the model has fewer positions.
    """
    longest = longest_sequence(config)
    if longest is not None and seq_length > longest:
        raise UserError(
            f"{setting} is {seq_length}, and {model} supports at most {longest} tokens. "
            f"Give {setting} {longest} or less."
        )
