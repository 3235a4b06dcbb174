"""Hugging Face hub: names of repositories, one short probe, single files, and its client's errors in one line."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

from leap_pl.errors import UserError
from leap_pl.inputs.paths import expanded
from leap_pl.inputs.plain_values import shown
from leap_pl.inputs.records import MASK
from leap_pl.inputs.register import exists

TIMEOUT = 5.0  # seconds in which the hub answers
LOG_IN = "run `hf auth login`, or set HF_TOKEN"

_REPOSITORY = re.compile(r"([\w-][\w.-]{0,95}/[\w-][\w.-]{0,95})(?:@([\w./-]{1,96}))?", re.ASCII)
_FILE_TYPES = (".safetensors", ".ckpt", ".json", ".jsonl", ".gguf", ".bin", ".pt")
# Packages whose errors do not all derive from OSError.
_NETWORK_PACKAGES = {"aiohttp", "fsspec", "httpcore", "httpx", "httpx2", "huggingface_hub", "requests", "urllib3"}


def repository_of(name: str) -> tuple[str, str | None] | None:
    """Return the hub repository that ``name`` means, and its revision; None for a local path.

    >>> repository_of("user/name"), repository_of("user/name@v1.0"), repository_of("runs/mask.safetensors")
    (('user/name', None), ('user/name', 'v1.0'), None)

    A path that exists is local, and so is the name of a file of the types that leap_pl reads.
    """
    found = _REPOSITORY.fullmatch(name)
    if found is None or name.endswith(_FILE_TYPES) or Path(name).exists():
        return None
    return found[1], found[2]


def check_revision(name: str, revision: str | None, option: str) -> None:
    """Check that a ``revision`` is not given for a model on the disk, which has none.

    Args:
        name: Hub id, folder or GGUF file.
        revision: As given with ``option``.
        option: Name of the setting, for the message.

    Raises:
        UserError: It is, and would be recorded all the same.
    """
    if revision is not None and exists(expanded(name)):
        raise UserError(
            f"{option} is {revision}, of a repository of the hub, and {name} is a local path. Leave it out."
        )


def is_hub_id(name: str) -> bool:
    """Return whether ``name`` is a hub id, ``USER/NAME``, and not a local path."""
    return repository_of(name) == (name, None)


@cache
def check_reachable(
    name: str, kind: Literal["model", "dataset"] = "model", revision: str | None = None, file: str | None = None
) -> None:
    """Check that the hub answers at all about the repository ``name``, once for each; what it answers is not judged.

    Nothing is requested in offline mode, or if ``file`` is in the hub's local cache.

    Args:
        name: Hub id of the repository.
        kind: Kind of the repository.
        revision: Branch, tag or commit.
        file: File to ask for; by default ``config.json`` of a model and ``README.md`` of a dataset.

    Raises:
        Exception: The hub client's error, if there is no connection.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, is_offline_mode, try_to_load_from_cache
    from huggingface_hub.errors import FileMetadataError, HfHubHTTPError, HFValidationError

    file = file or ("config.json" if kind == "model" else "README.md")
    try:
        known = try_to_load_from_cache(name, file, revision=revision, repo_type=kind)
        if is_offline_mode() or isinstance(known, str):
            return
        get_hf_file_metadata(hf_hub_url(name, file, revision=revision, repo_type=kind), timeout=TIMEOUT)
    except (FileMetadataError, HfHubHTTPError, HFValidationError):
        return


@contextmanager
def offline_if_unreachable(name: str, kind: Literal["model", "dataset"]) -> Iterator[None]:
    """Use the hub's local caches alone within the context if the hub does not answer, without a minute of retries.

    Args:
        name: Hub id of a repository to ask for; what is answered is not judged.
        kind: Kind of the repository.

    Raises:
        Exception: Why the hub does not answer, in place of a network error within the context.
    """
    import datasets
    from huggingface_hub import constants

    settings: tuple[Any, ...] = (datasets.config, constants)
    before, unreachable = [setting.HF_HUB_OFFLINE for setting in settings], None
    try:
        check_reachable(name, kind)
    except Exception as error:  # what the client raises without a connection depends on its version
        unreachable = error
        for setting in settings:
            setting.HF_HUB_OFFLINE = True
    try:
        yield
    except Exception as error:
        if unreachable is not None and is_network_error(error):
            raise unreachable from error
        raise
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.HF_HUB_OFFLINE = value


def fetch_file(name: str, file: str, revision: str | None = None, *, what: str) -> Path:
    """Return the path of ``file`` of a model repository in the hub's local cache, downloaded if it is not the latest.

    Args:
        name: Hub id of the repository.
        file: Name of the file in it.
        revision: Branch, tag or commit; None is the latest.
        what: Beginning of an error message: what is fetched.

    Raises:
        UserError: The hub has no such repository, revision or file, refuses it, or cannot be reached.
    """
    from huggingface_hub import hf_hub_download

    with hub_errors(f"{what} could not be fetched from the hub", file):
        check_reachable(name, revision=revision, file=file)
        return Path(hf_hub_download(name, file, revision=revision, etag_timeout=TIMEOUT))


def fetch_optional(name: str, file: str, revision: str | None = None) -> Path | None:
    """Return the path of ``file`` of a model repository as :func:`fetch_file` does, or None if there is none.

    None as well if the hub refuses the repository or cannot be reached, which loading its model reports; with a warning
    if the local cache has that model, since it is then loaded without the file.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError

    try:
        return fetch_file(name, file, revision, what=f"{file} of {name}")
    except UserError as error:
        if not isinstance(error.__cause__, RemoteEntryNotFoundError | HFValidationError):
            absent = try_to_load_from_cache(name, file, revision=revision) is not None  # the hub has said so before
            if not absent and try_to_load_from_cache(name, "config.json", revision=revision) is not None:
                warnings.warn(f"{error} The model is used without it.", stacklevel=2)
        return None


def local_folder(name: str, *files: str, revision: str | None = None) -> Path:
    """Return the folder of the model ``name``: of a hub id, that in the hub's local cache.

    Args:
        name: Folder, or hub id of a model repository.
        files: Files, beside ``config.json``, that a hub id's folder has if its repository has them. What else it has
            was fetched before, such as the weights by loading the model.
        revision: Branch, tag or commit on the hub.

    Raises:
        UserError: The hub has no such model, refuses it, or cannot be reached.
    """
    if not is_hub_id(name):
        return expanded(name)
    for file in files:
        fetch_optional(name, file, revision)
    return fetch_file(name, "config.json", revision, what=f"base model {name}").parent


@contextmanager
def hub_errors(failed: str, file: str = "file", then: str = "") -> Iterator[None]:
    """Convert the errors of the hub's client into one line that says what to do.

    Only the client may be called inside, so that no bug of this package is reported as a failure of the hub.

    Args:
        failed: Beginning of the message: what failed.
        file: Name of the file that is asked for.
        then: Sentence to end the message with.

    Raises:
        UserError: The client raises any exception.
    """
    try:
        yield
    except Exception as error:
        raise UserError(" ".join(filter(None, (f"{failed}: {_reason(error, file)}", then)))) from error


def gated(error: BaseException) -> str | None:
    """Return reason and remedy if ``error``, or one that it was raised from, says that a repository is gated.

    Libraries raise errors of their own from those of the hub's client.
    """
    from huggingface_hub.errors import GatedRepoError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, GatedRepoError):
            return _reason(cause, "file")
        cause = cause.__cause__ or cause.__context__
    return None


def _reason(error: Exception, file: str) -> str:
    """Return the reason of an error of the hub's client, and the remedy."""
    from huggingface_hub import errors, is_offline_mode

    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        if is_offline_mode():
            return "it is not in the local cache, and HF_HUB_OFFLINE is set. Name a local copy, or unset the variable."
        error = error.__cause__ if isinstance(error.__cause__, Exception) else error
    if isinstance(error, errors.HFValidationError):
        return "that is no name of a repository. Give USER/NAME, of letters, digits, and single - _ . within."
    if isinstance(error, errors.GatedRepoError):
        return f"its owner must grant access. Ask for it on the repository's page, and {LOG_IN}."
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no such repository, or it is private. Check the name; for a private one, {LOG_IN}."
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision. Check the branch, tag or commit after @."
    if isinstance(error, errors.EntryNotFoundError):
        remedy = "Check the name."
        if file == MASK:
            remedy = "A sparse model's is read off: leap_pl export --model NAME --format mask --output_dir FOLDER."
        return f"the repository has no {file}. {remedy}"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        said = f"{status}: {error.server_message or error.response.reason_phrase}"
        remedy = f"With a token that may do this, {LOG_IN}." if status in (401, 403) else "Try later."
        return f"the hub answers {shown(' '.join(said.split()), 300).removesuffix('.')}. {remedy}"
    said = shown(" ".join(str(error).split()), 300)
    named = said if said and is_network_error(error) else f"{type(error).__name__} {said}".strip()
    return f"{named}. Check the network, and the disk of the local cache."


def is_network_error(error: BaseException) -> bool:
    """Return whether ``error`` can come from the network, or from a client of it."""
    if isinstance(error, OSError | EOFError):
        return True
    return any(base.__module__.partition(".")[0] in _NETWORK_PACKAGES for base in type(error).__mro__)
