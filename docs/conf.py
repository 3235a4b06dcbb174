"""Settings of the documentation site: ``make docs`` builds it into ``build/site``.

Its sources are the documents of the whole repository, so that each link between them is checked.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sphinx.addnodes import pending_xref

from leap_pl.version import __version__

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "leap_pl"
release = __version__
copyright = "the authors of leap_pl"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

root_doc = "docs/index"
include_patterns = ["*.md", "configs/*.md", "dev/*.md", "docs/*.md", "docs/results/*.md", "docs/tasks_in_full/*.md"]
# Folders that need not be searched.
exclude_patterns = [".*", "assets", "build", "docs/results/*/*", "docs/tasks_in_full/*/*", "leap_pl", "runs", "tests"]

html_theme = "furo"
html_title = "leap_pl"
html_extra_path = ["site"]  # the first page, which leads to docs/index.html
html_static_path = ["static"]
html_css_files = ["tables.css"]

myst_heading_anchors = 4  # links to headings, by GitHub's rules

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # in the signature they would hide it; each argument is described
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False


def unlink_folders(app: "Sphinx", doctree: Any) -> None:
    """Replace links to folders of the repository, of which a site has no pages, by their text."""
    here = Path(doctree["source"]).parent
    for link in list(doctree.findall(pending_xref)):
        page = link.get("refdomain") == "doc"  # its target is without .md, as docs/results, which is a folder too
        if link.get("reftype") == "myst" and not page and (here / link["reftarget"]).is_dir():
            link.replace_self(link.children)


def setup(app: "Sphinx") -> None:
    """Connect what this file adds to Sphinx."""
    app.connect("doctree-read", unlink_folders)
