"""Publication of an exported folder on the Hugging Face hub, without the paths of the machine that it was made on."""

import glob
import shlex
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from leap_pl.errors import UserError
from leap_pl.inputs.hub import LOG_IN, check_reachable, hub_errors, is_hub_id
from leap_pl.inputs.plain_values import shown
from leap_pl.inputs.records import MASK, RECORD, recorded

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from leap_pl.masks import MaskSet

_PUBLIC = (
    "--push {repository} exists and is public, and --private is given. Make it private in its settings on the hub, or "
    "push to another repository."
)
_CARD, _MODEL = "README.md", "config.json"
_REPLACED = ["model*.safetensors", "model.safetensors.index.json", MASK]  # of an earlier export in other files


def check_push(repository: str, *, private: bool = False) -> None:
    """Check, before anything is computed, that a folder can be uploaded to ``repository``.

    Raises:
        UserError: The name is not ``USER/NAME``, there is no access token, or the hub cannot be reached; or the
            repository is to be ``private``, and is public.
    """
    from huggingface_hub import HfApi, get_token, hf_hub_url, is_offline_mode

    if repository.count("/") != 1:
        raise UserError(f"--push {shown(repository)} is no repository of the hub. Give USER/NAME.")
    with hub_errors(f"--push {shown(repository)}"):
        hf_hub_url(repository, _CARD)  # checks the name
    if is_offline_mode():
        raise UserError(f"--push {repository} uploads to the hub, and HF_HUB_OFFLINE is set. Unset it.")
    if get_token() is None:
        raise UserError(f"--push {repository} needs an access token of the hub that may write: {LOG_IN}.")
    with hub_errors(f"--push {repository}"):
        check_reachable(repository, file=_CARD)
        public = private and _is_public(HfApi(library_name="leap_pl"), repository)
    if public:
        raise UserError(_PUBLIC.format(repository=repository))


def _is_public(api: "HfApi", repository: str) -> bool:
    """Return whether the repository exists and anyone may read it."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return not api.repo_info(repository).private
    except RepositoryNotFoundError:
        return False


def push_folder(folder: str | Path, repository: str, *, private: bool = False) -> str:
    """Upload an exported folder to a model repository of the hub, which is created if it does not exist.

    An earlier export in the repository is replaced, its weights and mask included; other files there stay. A mask alone
    is not added to a model, which has a mask and a record of its own.

    Args:
        folder: Folder that leap_pl export wrote.
        repository: ``USER/NAME``.
        private: Create a private repository.

    Returns:
        Address of the repository.

    Raises:
        UserError: The hub refuses the upload, or cannot be reached; or the repository has a model, and the folder
            only a mask, or is public and was to be private.
    """
    from huggingface_hub import HfApi

    api, weights = HfApi(library_name="leap_pl"), (Path(folder) / _MODEL).exists()
    again = ["hf", "upload", repository, str(folder), ".", *["--private"] * private]
    replaced = list(_REPLACED) if weights else []

    def then() -> str:
        words = [*again, *(word for pattern in replaced for word in ("--delete", pattern))]
        return f"{folder} is complete: upload it later with `{shlex.join(words)}`."

    with hub_errors(f"{folder} could not be uploaded to {repository}", then=then()):
        address = api.create_repo(repository, private=private or None, exist_ok=True)
        public = private and _is_public(api, repository)
        replaces = not weights and api.file_exists(repository, _MODEL)
    if public:
        raise UserError(f"{_PUBLIC.format(repository=repository)} {folder} is complete.")
    if replaces:
        raise UserError(
            f"--push {repository} has a model, whose mask and record a mask alone would replace. Push the mask to "
            f"another repository, or the model again; {folder} is complete."
        )
    with hub_errors(f"{folder} could not be uploaded to {repository}", then=then()):
        replaced += _stale(api, repository, Path(folder)) if weights else []
    with hub_errors(f"{folder} could not be uploaded to {repository}", then=then()):
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Upload with leap_pl export",
            delete_patterns=replaced or None,
        )
    return str(address)


def _stale(api: "HfApi", repository: str, folder: Path) -> list[str]:
    """Return patterns of the files of an earlier export in ``repository``, by its record, that ``folder`` has not.

    A chat template of the base model that was exported before, for instance, would be taken for the new one's.
    """
    if not api.file_exists(repository, RECORD):
        return []
    with TemporaryDirectory() as place:
        api.hf_hub_download(repository, RECORD, local_dir=place)
        before = recorded(Path(place))
    return sorted(glob.escape(name) for name in before if not (folder / name).exists())


def without_paths(masks: "MaskSet") -> "MaskSet":
    """Return the masks with a provenance that names local files and folders by their last part only."""
    made = masks.provenance
    base = made.base_model if is_hub_id(made.base_model) else PurePath(made.base_model).name
    return masks.with_provenance(base_model=base, config=shortened(made.config))


def shortened(value: Any) -> Any:
    """Return a plain value in which every absolute path, also as a key, is replaced by its last part."""
    if isinstance(value, str):
        path = PurePath(value)
        return path.name if path.is_absolute() and path.name else value
    if isinstance(value, list):
        return [shortened(item) for item in value]
    if isinstance(value, dict):
        keys = [shortened(key) for key in value]
        keys = [key if keys.count(key) == 1 else f"{key} ({place})" for place, key in enumerate(keys, 1)]
        return dict(zip(keys, map(shortened, value.values()), strict=True))
    return value
