"""``leap_pl generate``: the continuation of a prompt by any model, with its speed and its memory."""

import sys
from typing import Any, Literal

from leap_pl.cli.command import check_used, command
from leap_pl.errors import UserError
from leap_pl.escape import say, write_out


@command
def generate_command(
    model: str,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    memory: Literal["auto", "packed", "dense"] | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Continue a prompt, and show how fast the model does it and how much memory its weights take.

    The model is dense, sparse with zeros, or packed; all three give the same text for the same weights, up to the
    rounding of sums, and of int8 values where they are unpacked. The text is written to standard output, the figures to
    standard error: the time to the first token, in which the prompt is read, and the rate of those after it.

    Args:
        model: Hub id, local folder or GGUF file.
        prompt: Text to continue, as it is: no chat template is applied.
        max_new_tokens: Maximum number of tokens to generate; the end token ends the text earlier.
        temperature: Temperature of sampling; 0 takes the most likely token each time.
        seed: Seed of sampling.
        memory: Form of packed weights in memory: packed, dense (unpacked once, while loading), or auto, for each
            weight the one that decodes faster, which on a GPU is dense. By default as the folder's config says, or
            auto. Other models are dense.
        dtype: Type of the weights in memory and of the computation; auto: the type they are stored in.
        device: Device to run on; auto: the first GPU, or the CPU without one.
        revision: Branch, tag or commit of the model on the hub; a local model has none.
        trust_remote_code: Run code that comes with the model.

    Returns:
        The text and the figures.
    """
    from leap_pl.base_model.config import is_packed_config, load_config
    from leap_pl.base_model.loading import load_model
    from leap_pl.base_model.tokenizer import load_tokenizer
    from leap_pl.cli.device import check_device, device_name, move_to_device
    from leap_pl.evaluation.generation import bytes_in_memory, continue_prompt

    check_used({"seed": seed}, generate_command, temperature == 0, "at --temperature 0 nothing is drawn")
    check_device(device)
    config = load_config(model, revision=revision, trust_remote_code=trust_remote_code)
    if memory == "packed" and not is_packed_config(config):
        raise UserError(
            f"--memory packed: {model} is not packed. Pack it with leap_pl export --model {model} --format packed "
            "--output_dir FOLDER, or leave --memory out."
        )
    if memory is None:
        memory = (config.quantization_config if is_packed_config(config) else {}).get("memory", "auto")
    tokenizer = load_tokenizer(model, revision=revision, trust_remote_code=trust_remote_code)
    if memory == "auto" and not device_name(device).startswith("cpu"):
        memory = "dense"  # packed weights were measured on CPUs alone, and a model is loaded on the CPU
    loaded = load_model(model, revision=revision, dtype=dtype, memory=memory, trust_remote_code=trust_remote_code)
    where = move_to_device(loaded, device)
    made = continue_prompt(loaded, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    size = bytes_in_memory(loaded)
    write_out(made.text)
    rate = "" if made.tokens_per_second is None else f", the others at {made.tokens_per_second:.1f} tokens a second"
    say(
        f"{made.tokens} tokens: the first after {made.first_seconds:.2f} s{rate}; the weights take "
        f"{size / 1e6:,.0f} MB of memory ({where}, {str(loaded.dtype).removeprefix('torch.')})",
        sys.stderr,
    )
    return {
        "text": made.text,
        "prompt_tokens": made.prompt_tokens,
        "tokens": made.tokens,
        "first_seconds": made.first_seconds,
        "tokens_per_second": made.tokens_per_second,
        "bytes": size,
    }
