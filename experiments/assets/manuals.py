"""GNOME Help: instructions in everyday English, out of a package of Debian's."""

import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from xml.etree import ElementTree

from experiments.assets.packages import Package, deb, finished, write_texts
from experiments.assets.texts import SHUFFLE_SEED
from leap_pl.errors import UserError

GNOME = Package(
    "gnome-user-docs",
    "48.2-1",
    12,
    "94202c324aa65e87820ed0cec8872c1bbe81cfd6f238b8d62ce55a79d8cb6b82",
    "Debian package",
)
PAGE = re.compile(r"\./usr/share/help/C/[\w-]+/([\w.-]+)\.page")
SHORTEST = 200  # characters of a page's text: less is a list of links

# Elements of Mallard (http://projectmallard.org/1.0/) by what becomes of them.
PARAGRAPHS = {"title", "p"}
LISTS = {"steps", "list"}  # whose paragraphs make one: instructions read as prose
LEFT_OUT = {"info", "links", "table", "screen", "media", "comment", "when", "code", "listing", "rules", "terms"}
JOINED_BY = {"keyseq": "+", "guiseq": " > "}


def make_manuals(folder: Path) -> Path:
    """Write ``folder/manuals/train.jsonl``: the pages of GNOME Help and of its guide for administrators.

    Raises:
        UserError: The package cannot be fetched or is not the expected one, or the folder not written.
    """
    destination = folder / "manuals"
    if finished(destination, [GNOME]):
        return destination
    pages = {}
    with deb(GNOME) as archive:
        for member in archive:
            found, content = PAGE.fullmatch(member.name), archive.extractfile(member) if member.isfile() else None
            if found is not None and content is not None:
                pages[found[1]] = content.read()
    documents = list(texts_of(dict(sorted(pages.items()))))
    random.Random(SHUFFLE_SEED).shuffle(documents)
    write_texts(
        destination,
        {"train": documents},
        [GNOME],
        "GNOME Help by the GNOME Documentation Project, CC BY-SA 3.0.",
        f"Title and text of {len(documents)} pages, each list of instructions as one paragraph, without tables, "
        f"pictures, blocks of code and pages of links; shuffled with seed {SHUFFLE_SEED}.",
    )
    return destination


def texts_of(pages: Mapping[str, bytes]) -> Iterator[str]:
    """Yield the text of each of the ``pages``, name → Mallard, that has one.

    Raises:
        UserError: A page is not well-formed.
    """
    roots = {}
    for name, page in pages.items():
        try:
            roots[name] = ElementTree.fromstring(page)
        except ElementTree.ParseError as error:
            raise UserError(f"{GNOME.requirement}: page {name} cannot be read ({error}).") from error
    titles = {name: next((_words(e, {}) for e in root if _kind(e) == "title"), "") for name, root in roots.items()}
    for root in roots.values():
        text = "\n\n".join(filter(None, _paragraphs(root, titles)))
        if len(text) >= SHORTEST:
            yield text


def _paragraphs(element: ElementTree.Element, titles: Mapping[str, str]) -> Iterator[str]:
    for part in element:
        kind = _kind(part)
        if kind in PARAGRAPHS:
            yield _words(part, titles)
        elif kind in LISTS:
            yield " ".join(filter(None, _paragraphs(part, titles)))
        elif kind not in LEFT_OUT:
            yield from _paragraphs(part, titles)


def _words(element: ElementTree.Element, titles: Mapping[str, str]) -> str:
    return " ".join(_inline(element, titles).split())


def _inline(element: ElementTree.Element, titles: Mapping[str, str]) -> str:
    """Return the text inside of ``element``; a link without any has the title of its page."""
    inside = [(part, "" if _kind(part) in LEFT_OUT - {"code"} else _inline(part, titles)) for part in element]
    joint = JOINED_BY.get(_kind(element))
    if joint is not None:
        return joint.join(" ".join(text.split()) for _, text in inside if text.strip())
    text = (element.text or "") + "".join(within + (part.tail or "") for part, within in inside)
    if _kind(element) == "link" and not text.strip():
        return titles.get(element.get("xref", "").partition("#")[0], "")
    return text


def _kind(element: ElementTree.Element) -> str:
    """Return the name of an element without its namespace; a comment's tag is a function."""
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else "comment"
