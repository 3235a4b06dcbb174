"""Load the tokenizer of a base model, and write it into a folder."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from leap_pl.base_model.config import left_out, load_config, other_parts
from leap_pl.base_model.place import check_description, check_in_reach, locate, reading
from leap_pl.base_model.prefix import PROBE
from leap_pl.base_model.tokenizer_files import copy_tokenizer
from leap_pl.errors import UserError
from leap_pl.inputs.hub import fetch_optional, is_hub_id
from leap_pl.inputs.register import note_input

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> "PreTrainedTokenizerBase":
    """Load the tokenizer that belongs to the base model ``name``; raises as :func:`load_model` does."""
    from transformers import AutoTokenizer

    folder, gguf_file = locate(name)
    extra = {} if gguf_file is None else {"gguf_file": gguf_file}
    check_description(name, folder, gguf_file)  # transformers reads it for a tokenizer, too
    with reading("tokenizer", name, trusted=trust_remote_code):
        check_in_reach(folder, revision)
        found = AutoTokenizer.from_pretrained(folder, revision=revision, trust_remote_code=trust_remote_code, **extra)
        tokens = set(found.encode(PROBE, add_special_tokens=False))
        has_none = tokens <= {found.unk_token_id} and not _words_of(found)
    if has_none:
        # transformers makes one of special tokens alone where the files of a vocabulary are missing.
        remedy = "Put the files of the tokenizer, such as tokenizer.json, beside the model."
        if gguf_file is not None:
            remedy = "Give the model as a Hugging Face folder, with the files of its tokenizer."
        raise UserError(f"the tokenizer of {name} has no vocabulary. {remedy}")
    if gguf_file is not None:
        found.name_or_path = name
    return found


def _words_of(tokenizer: "PreTrainedTokenizerBase") -> set[str]:
    """Return the tokens that are neither special nor added to a vocabulary."""
    added = tokenizer.get_added_vocab() if hasattr(tokenizer, "get_added_vocab") else {}
    return {*tokenizer.get_vocab()} - {*tokenizer.all_special_tokens} - {*added}


def save_tokenizer(
    name: str, folder: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> None:
    """Write the tokenizer of the base model ``name`` into ``folder``, and the processors of a multimodal model.

    Raises:
        UserError: As :func:`load_model` does.
    """
    tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=trust_remote_code)
    source, gguf_file = locate(name)
    names = tokenizer.vocab_files_names.values()
    if gguf_file is not None or not copy_tokenizer(source, Path(folder), revision, names):
        if not trust_remote_code:
            tokenizer.init_kwargs.pop("auto_map", None)  # code that was not run, and that the folder will not have
        tokenizer.save_pretrained(folder)
    config = load_config(name, revision=revision, trust_remote_code=trust_remote_code)
    several = gguf_file is None and other_parts(config) and not left_out(config)
    for file in PROCESSORS if several else ():
        found = fetch_optional(source, file, revision) if is_hub_id(source) else Path(source) / file
        if found is not None and found.is_file():
            note_input(found)
            shutil.copyfile(found, Path(folder) / file)
