"""Lines of a model card that say how an export is loaded and run."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from leap_pl.export.method import BLOCK_LENGTH, decisive_settings
from leap_pl.inputs.hub import is_hub_id
from leap_pl.inputs.records import MASK

if TYPE_CHECKING:
    from leap_pl.masks import MaskSet, Provenance

Format = Literal["huggingface", "packed", "mask"]

_MODEL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "{name}"  # or the path of the folder
tokenizer = AutoTokenizer.from_pretrained(name{code})
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto"{code})
tokens = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=32)
print(tokenizer.decode(tokens[0]))"""

_MASK = """\
from leap_pl import MaskSet
from transformers import AutoModelForCausalLM

masks = MaskSet.load("{name}")  # or the path of {file}
model = AutoModelForCausalLM.from_pretrained({base}, dtype="auto"{code})
masks.apply_(model)"""

_RUNS_CODE = "The model comes with Python code of its own, which these lines run: read it first."


def usage(
    masks: "MaskSet", facts: Mapping[str, Any], format: Format, name: str, *, trust_remote_code: bool = False
) -> str:
    """Return the section of a model card with the lines of Python that load the export, as Markdown.

    Args:
        masks: Masks of the export.
        facts: Contents of its ``leap_pl.json``.
        format: Format of the export.
        name: Repository of the hub that the lines name.
        trust_remote_code: Whether the model needs code that comes with it.
    """
    own = ", trust_remote_code=True" if trust_remote_code else ""
    if format == "mask":
        before = "With `pip install leap_pl`:"
        code = _MASK.format(name=name, file=MASK, base=_arguments(masks.provenance), code=own)
        length = decisive_settings(masks.provenance).get(BLOCK_LENGTH, "")
        windows = f" --seq_length {length}" if length.isdecimal() else ""
        after = [
            f"`leap_pl evaluate --mask {name} --perplexity wikitext2{windows}` measures it, and "
            f"`leap_pl export --mask {name} --output_dir sparse` writes the sparse model."
        ]
    elif format == "packed":
        packed = facts["packed"]
        before = (
            f"**These weights are packed**: {packed['bytes_per_weight']:.2f} bytes a weight of the decoder blocks, "
            f"dense {packed['dense_bytes_per_weight']:g}. They need leap_pl (`pip install leap_pl`), which is imported "
            "first:"
        )
        code = "import leap_pl\n" + _MODEL.format(name=name, code=own)
        after = ["`leap_pl export --model FOLDER --output_dir OTHER` makes a folder that transformers loads alone."]
    else:
        before, code, after = "With `pip install transformers`:", _MODEL.format(name=name, code=own), []
    after += [_RUNS_CODE] if trust_remote_code else []
    return "\n\n".join(["## Use", before, f"```python\n{code}\n```", *after])


def _arguments(made: "Provenance") -> str:
    """Return the base model as arguments of ``from_pretrained``; only what can be no other code is put into it."""
    if not is_hub_id(made.base_model):
        return '"BASE_MODEL"'
    known = made.revision is not None and re.fullmatch(r"[\w./-]+", made.revision, re.ASCII)
    return f'"{made.base_model}"' + (f', revision="{made.revision}"' if known else "")
