"""Models of random weights: the shapes of those that are measured, and tiny ones for a machine without a GPU."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.scaling import SHAPES, Shape
from leap_pl.base_model.backbone import checkpoint_activations

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Model:
    """A model by its sizes.

    Attributes:
        shape: Sizes.
        head: Size of an attention head.
        family: Qwen2, or Llama, whose queries, keys and values have no bias.
    """

    shape: Shape
    head: int
    family: str = "Llama"

    def config(self) -> "PreTrainedConfig":
        """Return the configuration for transformers."""
        import transformers

        shape = self.shape
        return getattr(transformers, f"{self.family}Config")(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.hidden // self.head,
            num_key_value_heads=shape.key_value // self.head,
            tie_word_embeddings=shape.tied,
            max_position_embeddings=1 << 17,
        )

    def random(self, device: torch.device, *, checkpointing: bool = False) -> "PreTrainedModel":
        """Return the model with random weights in bfloat16, made on ``device`` without passing through the host."""
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        with torch.device(device):
            model: Any = AutoModelForCausalLM.from_config(self.config(), dtype=torch.bfloat16)
        if checkpointing:
            checkpoint_activations(model)
        return model


MODELS = {
    "qwen2.5-0.5b": Model(SHAPES["qwen2.5-0.5b"], 64, "Qwen2"),
    "llama-3.2-1b": Model(SHAPES["llama-3.2-1b"], 64),
    "llama-3.1-8b": Model(SHAPES["llama-3.1-8b"], 128),
}

TINY = {
    "qwen2.5-0.5b": Model(Shape(2, 32, 48, 16, 260, tied=True, biased=True), 8, "Qwen2"),
    "llama-3.2-1b": Model(Shape(2, 32, 64, 16, 260, tied=True), 8),
    "llama-3.1-8b": Model(Shape(2, 64, 112, 32, 260), 16),
}
