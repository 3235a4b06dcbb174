"""Self-contained HTML page of a comparison, which opens from disk and fetches nothing."""

import base64
from collections.abc import Sequence
from pathlib import Path

from leap_pl.comparison.drawing import Picture
from leap_pl.comparison.entries import Entry
from leap_pl.comparison.table import Table
from leap_pl.escape import html

PIXELS = 105  # per inch of a picture

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #444; --line: #ccc; --paper: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --soft: #b0b0b0; --line: #444; --paper: #161616; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 76rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.wide { overflow-x: auto; margin: 1.5rem 0; }
table { border-collapse: separate; border-spacing: 0; font: .9rem/22px system-ui, sans-serif;
        font-variant-numeric: tabular-nums; }
th, td { padding: 6px .5rem; border-bottom: 1px solid var(--line); text-align: right; max-width: 12rem; }
th { border-bottom: 2px solid var(--ink); vertical-align: bottom; overflow-wrap: break-word; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
td:first-child { overflow-wrap: anywhere; min-width: 9rem; }
.verdict { font-size: 1.1rem; }
figure { margin: 1.5rem 0; break-inside: avoid; } img { max-width: 100%; height: auto; }
figcaption, .notes { color: var(--soft); font-size: .9rem; }
h1, p, li, figcaption, code { overflow-wrap: anywhere; }
@media print {
  @page { margin: 15mm; }
  :root { color-scheme: light; --ink: #1a1a1a; --soft: #444; --line: #ccc; --paper: #fff; }
  body { font-size: 12px; margin: 0; padding: 0; }
  h2 { break-after: avoid; } tr { break-inside: avoid; }
  .wide { overflow: visible; } table { font-size: 9px; line-height: 1.4; }
  th, td { padding: .2rem .25rem; } th { overflow-wrap: anywhere; } td:first-child { min-width: 6rem; }
}
"""


def make_page(entries: Sequence[Entry], verdict: str, table: Table, pictures: Sequence[Picture], folder: Path) -> str:
    """Return the page as HTML, with the ``verdict`` at its top and the pictures in ``folder`` embedded."""
    models = sorted({entry.model for entry in entries})
    title = f"Pruning {', '.join(models)}: a comparison"
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html(title)}</h1>",
        f'<p class="verdict">{html(verdict)}</p>' if verdict else "",
        *(_table(headings, rows) for headings, *rows in table.tables()),
        '<div class="notes">',
        *(f"<p>{html(note)}</p>" for note in table.notes),
        "</div>",
        "<h2>Pictures</h2>" if pictures else "",
        *(_figure(picture, folder) for picture in pictures),
        "<h2>Sources</h2>",
        "<ul>",
        *(f"<li>{html(e.label)}: {_sources(e)}, {_identity(e)}</li>" for e in entries),
        "</ul></body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _table(headings: list[str], rows: list[list[str]]) -> str:
    head = "".join(f'<th scope="col">{_heading(heading)}</th>' for heading in headings)
    body = "\n".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _heading(text: str) -> str:
    """Return a heading that breaks between the folders of a path."""
    return html(text).replace("/", "/<wbr>")


def _cell(text: str) -> str:
    """Return a cell in which a figure and its error stay in one line."""
    return html(text).replace(" ± ", "&nbsp;±&nbsp;")


def _figure(picture: Picture, folder: Path) -> str:
    data = base64.b64encode((folder / picture.file).read_bytes()).decode()
    caption = html(picture.caption)
    # The same scale for all pictures, so that their text has the same size.
    image = f'<img alt="{caption}" width="{round(picture.width * PIXELS)}" src="data:image/svg+xml;base64,{data}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _sources(entry: Entry) -> str:
    return ", ".join(f"<code>{html(source)}</code>" for source in (entry.source, *entry.also))


def _identity(entry: Entry) -> str:
    return f"base model <code>{html(entry.base_model)}</code>, fingerprint {html(entry.fingerprint)}"
