"""Files of a base model's tokenizer, copied into an exported folder as they are."""

import json
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path

from leap_pl.inputs.hub import local_folder
from leap_pl.inputs.register import note_input

SETTINGS, MERGES, SENTENCEPIECE = "tokenizer_config.json", "merges.txt", "tokenizer.model"
VOCABULARIES = {"tokenizer.json", SENTENCEPIECE, "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"}
OTHERS = {"added_tokens.json", "special_tokens_map.json", "tekken.json", "chat_template.jinja", "chat_template.json"}
TEMPLATES = "additional_chat_templates"  # folder of further chat templates, by their names


def copy_tokenizer(model: str, folder: Path, revision: str | None, names: Iterable[str] = ()) -> bool:
    """Copy the files of the tokenizer of ``model``, which has been loaded, into ``folder``.

    transformers would write others, which other programs cannot read: without ``tokenizer.model`` and the settings of
    BOS and EOS, and with a class that version 4 does not have.

    Args:
        model: Folder or hub id of the base model.
        folder: Folder to copy the files into.
        revision: Branch, tag or commit on the hub.
        names: Names of further files that this kind of tokenizer reads.

    Returns:
        False, with nothing copied, if there is no vocabulary among the files, or their settings name code or a path.

    Raises:
        UserError: The hub cannot be reached.
    """
    from huggingface_hub import is_offline_mode

    # What the tokenizer needs has been fetched with it.
    place = local_folder(model, *(() if is_offline_mode() else (SENTENCEPIECE,)), revision=revision)
    known = sorted({SETTINGS, MERGES, *VOCABULARIES, *OTHERS, *(name for name in names if Path(name).name == name)})
    found = [name for name in known if (place / name).is_file() and _belongs(place / name, place)]
    settings = json.loads((place / SETTINGS).read_text(encoding="utf-8")) if SETTINGS in found else {}
    plain = isinstance(settings, dict) and not {"auto_map", "name_or_path"} & {*settings}
    if not plain or not VOCABULARIES & {*found}:
        return False
    templates = sorted((place / TEMPLATES).glob("*.jinja"))
    found += [f"{TEMPLATES}/{path.name}" for path in templates if _belongs(path, place)]
    for name in found:
        note_input(place / name)
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(place / name, folder / name)
    return True


def _belongs(file: Path, folder: Path) -> bool:
    """Return whether a file is not a link out of the model's folder, which could be to any file of the user's.

    A download of the hub consists of links into its cache. Others are left out, with a warning.
    """
    from huggingface_hub import constants

    place = file.resolve()
    if any(place.is_relative_to(Path(home).resolve()) for home in (folder, constants.HF_HUB_CACHE)):
        return True
    warnings.warn(
        f"{file} is a link to {place}, outside the model's folder, and is not copied. If it belongs to the model, put "
        "the file there.",
        stacklevel=2,
    )
    return False
