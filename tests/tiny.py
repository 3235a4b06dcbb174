"""Tiny random models and a byte tokenizer: every family's real classes, nothing fetched."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 260  # 256 bytes, the end token, and a few that never occur

_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 256,
}

FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    # Soft-capped logits, as in Gemma 2, which Gemma 3 keeps as an option.
    "gemma3": ("Gemma3", {"head_dim": 8, "sliding_window": 16, "final_logit_softcapping": 2.0}),
    "mistral": ("Mistral", {"head_dim": 8}),
    "phi3": ("Phi3", {}),
    # Scaled logits, scaled residuals.
    "granite": ("Granite", {"logits_scaling": 3.0, "residual_multiplier": 0.5}),
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 24}),
    "gpt_neox": ("GPTNeoX", {}),
    "olmo": ("Olmo", {}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    # Stacked expert tensors.
    "mixtral": ("Mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2}),
}


def tiny_model(family: str = "llama", *, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random fp32 causal LM of ``family`` (a key of FAMILIES), two decoder blocks, in eval mode."""
    stem, special = FAMILIES[family]
    small = {} if family == "gpt2" else dict(_SMALL)
    if family == "gpt2":
        small = {k: v for k, v in _SMALL.items() if k in ("vocab_size", "bos_token_id", "eos_token_id")}
    name = "Gemma3TextConfig" if family == "gemma3" else f"{stem}Config"
    config = getattr(transformers, name)(**{**small, **special, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{stem}LMHeadModel" if family == "gpt2" else f"{stem}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # The usual 0.02 leaves a network this small nearly constant: every loss would look right.
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (parameter.ndim == 1) * parameter)
    return model.eval()


def token_dependent_model() -> PreTrainedModel:
    """A model that cannot be walked: an argument of its last block depends on the tokens."""
    model = tiny_model()

    def add(module: torch.nn.Module, args: object, kwargs: dict[str, object]) -> tuple[object, dict[str, object]]:
        return args, {**kwargs, "seen": args[0].clone()}  # type: ignore[index]

    model.model.layers[1].register_forward_pre_hook(add, with_kwargs=True)
    return model


def byte_tokenizer(*, end_token: bool = True, prefix: int = 0) -> PreTrainedTokenizerFast:
    """A token a byte, ``<|end|>`` (256) unless ``end_token`` is false, and ``prefix`` tokens (from 257) put first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"eos_token": "<|end|>"} if end_token else {}
    if prefix:
        names = [f"<|begin {k}|>" for k in range(prefix)]
        tokenizer.add_special_tokens(["<|end|>", *names])
        ids = [(name, tokenizer.token_to_id(name)) for name in names]
        tokenizer.post_processor = processors.TemplateProcessing(single=[*names, "$A"], special_tokens=ids)
        special["bos_token"] = names[0]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def tiny_folder(path: Path, family: str = "llama", *, seed: int = 0, prefix: int = 0, **changes: object) -> Path:
    """An ordinary Hugging Face folder with a tiny model and the byte tokenizer in it."""
    tiny_model(family, seed=seed, **changes).save_pretrained(path)
    byte_tokenizer(prefix=prefix).save_pretrained(path)
    return path
