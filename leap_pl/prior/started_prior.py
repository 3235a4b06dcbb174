"""Recovery of the prior that a resumed run started from, verified by its digest.

A resumed run takes its logits from the checkpoint and needs no prior to learn, but the curve of changes since the prior
and readers of ``prior.safetensors`` do. It must be exactly the mask that the run started from, whatever the current
settings are. A checkpoint therefore stores the digest of each prior (:meth:`leap_pl.masks.MaskSet.digest_of_bits`), by
its form.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from leap_pl.errors import UserError, listing, one_line
from leap_pl.masks import MaskSet
from leap_pl.prior.settings import NO_METHOD, Prior

DIGESTS = "prior_digests"  # key in a checkpoint's settings


def prior_file(form: str) -> str:
    """Return the name of the file in which a run keeps its prior of ``form``, as ``prior`` or ``inner``."""
    return "prior.safetensors" if form == "prior" else f"prior-{form}.safetensors"


def started_prior(
    stored: Mapping[str, Any],
    forms: Iterable[str],
    folders: Iterable[Path],
    cache_dir: str | None,
    make: Callable[[Prior], Mapping[str, MaskSet]],
) -> dict[str, MaskSet]:
    """Return the masks that a run started from, by form, omitting unavailable ones with one warning.

    Args:
        stored: Settings of the run in its checkpoint: ``prior``, and the digests of the masks it resulted in.
        forms: Forms that the gates start from (:meth:`leap_pl.gates.Gates.prior_forms`).
        folders: Folders to search for the run's files: reading one takes seconds, recomputing the prior minutes.
        cache_dir: Folder of the cache of one-shot masks in this run; None: there is none.
        make: Function that recomputes a prior; called only if some mask is in none of ``folders``.
    """
    digests = stored.get(DIGESTS)
    if not isinstance(digests, dict):
        if isinstance(stored.get("prior"), dict) and stored["prior"].get("method") != NO_METHOD:
            _warn_unavailable("the checkpoint is of a version that stored no digest of it")
        return {}
    wanted = {form: digests[form] for form in forms if form in digests}
    found: dict[str, MaskSet] = {}
    for form, digest in wanted.items():
        for folder in folders:
            mask = _read(folder / prior_file(form))
            if mask is not None and mask.digest_of_bits() == digest:
                found[form] = mask
                break
    if len(found) == len(wanted):
        return found
    try:
        known = signature(Prior).parameters
        settings = Prior(**{key: value for key, value in stored["prior"].items() if key in known})
        made = make(replace(settings, graded=False, cache_dir=cache_dir))  # only signs are needed: grades are in logits
        made = {form: made[form].packed() for form in wanted if form in made}
        found |= {form: mask for form, mask in made.items() if mask.digest_of_bits() == wanted[form]}
    except (UserError, ValueError, TypeError, KeyError, AttributeError) as error:
        _warn_unavailable(one_line(error))
        return found
    missing = [form for form in wanted if form not in found]
    if missing:
        files = listing([prior_file(form) for form in missing], 2)
        _warn_unavailable(f"{files} next to the checkpoint is missing or different, and the recomputed one differs too")
    return found


def _read(path: Path) -> MaskSet | None:
    try:
        return MaskSet.load(path) if path.is_file() else None
    except UserError:
        return None


def _warn_unavailable(reason: str) -> None:
    rank_zero_warn(
        f"the prior that this run started from is not available ({reason}): its file is left unchanged, and the curve "
        "mask/changed_from_prior is omitted. Learning does not need it."
    )
