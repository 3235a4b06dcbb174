"""The prior that a resumed run started from: found, and told from any other by its digest.

A resumed run takes its logits from the checkpoint and needs no prior to learn; the curve of what has changed since the
prior does, and so does whoever reads ``prior.safetensors``. It must be the very mask the run started from, whatever is
typed now. So a checkpoint holds the digest of each (:meth:`leap_pl.masks.MaskSet.digest_of_bits`), by its form.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from leap_pl.errors import UserError, listing
from leap_pl.masks import MaskSet
from leap_pl.prior.settings import NO_METHOD, Prior

DIGESTS = "prior_digests"  # of a checkpoint's settings


def prior_file(form: str) -> str:
    """Return the name of the file in which a run keeps its prior of ``form``, ``prior`` or ``inner``."""
    return "prior.safetensors" if form == "prior" else f"prior-{form}.safetensors"


def started_prior(
    told: Mapping[str, Any],
    forms: Iterable[str],
    folders: Iterable[Path],
    cache_dir: str,
    make: Callable[[Prior], Mapping[str, MaskSet]],
) -> dict[str, MaskSet]:
    """Return the masks that a run started from, by form, as far as they can be had; one warning names the others.

    Args:
        told: The settings of the run in its checkpoint: ``prior``, and the digests of what that made.
        forms: Those that the gates start from (:meth:`leap_pl.gates.Gate.prior_forms`).
        folders: Where the run may have left its files. Reading one takes seconds, making the prior minutes.
        cache_dir: Where masks are kept, here and now, that methods made.
        make: Makes a prior anew; called only for what is in none of ``folders``.
    """
    digests = told.get(DIGESTS)
    if not isinstance(digests, dict):
        if isinstance(told.get("prior"), dict) and told["prior"].get("method") != NO_METHOD:
            _say_without("the checkpoint is of a version that kept no digest of it")
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
        known = {field.name for field in fields(Prior)}
        settings = Prior(**{key: value for key, value in told["prior"].items() if key in known})
        made = make(replace(settings, graded=False, cache_dir=cache_dir))  # the grades are in the logits
        found |= {form: made[form] for form in wanted if form in made and made[form].digest_of_bits() == wanted[form]}
    except (UserError, ValueError, TypeError, KeyError, AttributeError) as error:
        _say_without(" ".join(str(error).split()))
        return found
    missing = [form for form in wanted if form not in found]
    if missing:
        files = listing([prior_file(form) for form in missing], 2)
        _say_without(f"{files} beside the checkpoint is another one or not there, and made anew it is another one too")
    return found


def _read(path: Path) -> MaskSet | None:
    try:
        return MaskSet.load(path) if path.is_file() else None
    except UserError:
        return None


def _say_without(reason: str) -> None:
    rank_zero_warn(
        f"the prior that this run started from cannot be had ({reason}): its file is left as it is, and the curve "
        "mask/changed_from_prior is left out. Learning does not need it."
    )
