"""The tiny Llama and the byte tokenizer in one GGUF file, and the parts of such a file as bytes."""

import struct
from pathlib import Path

import gguf
from tiny import tiny_model
from tokenizers import pre_tokenizers

PARTS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
}


def tiny_gguf(path: Path, *, tied: bool = False, parts: int = 1, **changes: int) -> Path:
    """A GGUF file of ``tiny_model()``; ``changes`` are of its settings: ``block_count``, ``embedding_length`` …

    ``tied``: it has no head of its own. ``parts``: of how many files it says that it is one.
    """
    model = tiny_model()
    config = model.config
    settings = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.dimension_count": config.hidden_size // config.num_attention_heads,
        "vocab_size": config.vocab_size,
    }
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    for key, value in {**settings, **changes}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    if parts > 1:
        writer.add_uint16("split.count", parts)
    # As many as the model has, the bytes first, as in byte_tokenizer().
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|end|>", "ab", "cd", "<|a|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3, 1, 1, 3])
    writer.add_token_merges(["a b", "c d"])  # two: some readers take a list of one for its only item
    writer.add_eos_token_id(256)
    writer.add_bos_token_id(256)
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        for part, short in PARTS.items():
            name = name.replace(part, short)
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_header(*, tensors: int = 0, keys: int = 0, version: int = 3) -> bytes:
    """The start of a file that declares so many tensors and keys."""
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def gguf_string(text: bytes, length: int | None = None) -> bytes:
    """A string, with another length than its own if ``length`` is given."""
    return struct.pack("<Q", len(text) if length is None else length) + text


def gguf_tensor(name: bytes = b"a", shape: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    """The description of a tensor."""
    return gguf_string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
