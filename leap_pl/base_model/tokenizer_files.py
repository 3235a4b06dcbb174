"""Files of a base model's tokenizer, copied into an exported folder as they are."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from leap_pl.errors import UserError
from leap_pl.inputs.hub import is_hub_id, local_folder
from leap_pl.inputs.paths import expanded
from leap_pl.inputs.register import note_input, real_path

SETTINGS, MERGES, SENTENCEPIECE = "tokenizer_config.json", "merges.txt", "tokenizer.model"
VOCABULARIES = {"tokenizer.json", SENTENCEPIECE, "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"}
OTHERS = {"added_tokens.json", "special_tokens_map.json", "tekken.json", "chat_template.jinja", "chat_template.json"}
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}  # suffixes of files that are never copied
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
    more = {name for name in names if Path(name).name == name and Path(name).suffix not in WEIGHTS}
    known = sorted({SETTINGS, MERGES, *VOCABULARIES, *OTHERS, *more})
    found = [name for name in known if (place / name).is_file()]
    settings = json.loads((place / SETTINGS).read_text(encoding="utf-8")) if SETTINGS in found else {}
    if not _is_plain(settings) or not VOCABULARIES & {*found}:
        return False
    found += [f"{TEMPLATES}/{path.name}" for path in sorted((place / TEMPLATES).glob("*.jinja"))]
    for name in found:
        note_input(place / name)
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(place / name, folder / name)
    return True


def _is_plain(settings: Any) -> bool:
    """Return whether a tokenizer's settings name neither code nor a path of the machine that they were written on."""
    if not isinstance(settings, dict) or {"auto_map", "name_or_path"} & {*settings}:
        return False
    paths = [value for key, value in settings.items() if str(key).endswith(("_file", "_path"))]
    kinds = (PurePosixPath, PureWindowsPath)
    return not any(isinstance(path, str) and kind(path).is_absolute() for path in paths for kind in kinds)


def check_links(model: str) -> None:
    """Check that all files in a model's folder but weights are its own, and not links to any file of the user's.

    What they contain goes into an export, which may be published; which of them a tokenizer reads, its settings say.
    Of a model of the hub, and of a folder in a cache of the hub, they are links into that cache.

    Raises:
        UserError: One is a link out of the folder.
    """
    from huggingface_hub import constants

    folder = expanded(model)
    if is_hub_id(model) or not folder.is_dir():
        return
    home = folder.resolve()
    homes = [home, Path(constants.HF_HUB_CACHE).resolve()]
    homes += [home.parents[1] / "blobs"] if home.parent.name == "snapshots" else []
    for file in sorted((*folder.iterdir(), *(folder / TEMPLATES).glob("*"))):
        place = real_path(file)
        own = file.suffix in WEIGHTS or file.is_dir() or any(place.is_relative_to(home) for home in homes)
        if not own:
            raise UserError(
                f"{file} is a link to {place}, outside the model's folder, and would be copied into what is written. "
                "Name the folder that has the files themselves, or put a copy there."
            )
