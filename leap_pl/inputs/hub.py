"""Probe of the Hugging Face hub: one short request, before a client that would retry for a minute."""

from functools import cache
from typing import Literal

PATIENCE = 5.0  # seconds in which the hub answers


@cache
def check_reachable(name: str, kind: Literal["model", "dataset"] = "model", revision: str | None = None) -> None:
    """Check that the hub answers at all about the repository ``name``, once for each; what it answers is not judged.

    Nothing is requested in offline mode, or for a model in the hub's local cache.

    Raises:
        Exception: The hub client's error, if there is no connection.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, is_offline_mode, try_to_load_from_cache
    from huggingface_hub.errors import FileMetadataError, HfHubHTTPError, HFValidationError

    file = "config.json" if kind == "model" else "README.md"
    try:
        known = try_to_load_from_cache(name, file, revision=revision, repo_type=kind)
        if is_offline_mode() or isinstance(known, str):
            return
        get_hf_file_metadata(hf_hub_url(name, file, revision=revision, repo_type=kind), timeout=PATIENCE)
    except (FileMetadataError, HfHubHTTPError, HFValidationError):
        return
