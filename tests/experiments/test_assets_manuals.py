"""GNOME Help out of a Debian package: what a page says, and a mirror on loopback."""

from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from package_registry import answering, debian_package, lines

from experiments.assets import manuals
from leap_pl.errors import UserError

SPACES = 'xmlns="http://projectmallard.org/1.0/" xmlns:if="http://projectmallard.org/if/1.0/"'
CONNECT = """
<info><desc>Get on the internet.</desc><title type="link">Wi-Fi</title></info>
<title>Connect to a network</title>
<p>You can connect to a network that is
   <em>within range</em>, see <link xref="other"/> or <link xref="other#part">more help</link>.</p>
<!-- nobody reads this -->
<steps>
  <item><p>Press <keyseq><key>Ctrl</key><key>N</key></keyseq>, then
    <guiseq><gui>Settings</gui> <gui><media src="a.svg"/> Wi-Fi</gui></guiseq>.</p></item>
  <item><p>Type <cmd>ls</cmd>.</p><screen>$ ls</screen><note><p>Wait a while.</p></note></item>
</steps>
<if:choose><if:when test="classic"><p>Classic.</p></if:when>
  <p>The icon changes when the computer is connected.</p></if:choose>
<section id="part"><title>It fails</title><p>Ask the person who administers the wireless network for the password.</p>
<table><tr><td><p>cell</p></td></tr></table></section>
<links type="topic"/>
"""
TEXT = """Connect to a network

You can connect to a network that is within range, see Another page or more help.

Press Ctrl+N, then Settings > Wi-Fi. Type ls. Wait a while.

The icon changes when the computer is connected.

It fails

Ask the person who administers the wireless network for the password."""


def page(name: str, of: str) -> bytes:
    return f'<page {SPACES} id="{name}">{of}</page>'.encode()


PAGES = {"connect": page("connect", CONNECT), "other": page("other", "<title>Another page</title><p>Short.</p>")}


def test_a_page_becomes_what_a_reader_sees() -> None:
    assert list(manuals.texts_of(PAGES)) == [TEXT]  # the other page is too short to learn from


def test_a_damaged_page_is_one_line() -> None:
    with pytest.raises(UserError, match=r"gnome-user-docs=48.2-1: page connect cannot be read \(.*\)\.$"):
        list(manuals.texts_of({"connect": PAGES["connect"][:-9]}))


def test_the_manuals_of_a_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pages in English alone; a second call fetches nothing."""
    files = {f"./usr/share/help/C/gnome-help/{name}.page": content for name, content in PAGES.items()}
    files |= {"./usr/share/help/de/gnome-help/connect.page": b"<", "../../escape.page": b"<"}
    data = debian_package(files | {"./usr/share/help/C/gnome-help/link.page": b"-> /etc/passwd"})
    monkeypatch.setattr(manuals, "GNOME", replace(manuals.GNOME, sha256=sha256(data).hexdigest()))
    with answering(monkeypatch, "DEBIAN_MIRROR", data) as asked:
        folder = manuals.make_manuals(tmp_path)
        manuals.make_manuals(tmp_path)
    assert asked == ["/pool/main/g/gnome-user-docs/gnome-user-docs_48.2-1_all.deb"]
    assert [row["text"] for row in lines(folder / "train.jsonl")] == [TEXT]
    assert "CC BY-SA 3.0" in (folder / "SOURCES.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manuals"]


@pytest.mark.parametrize(
    ("data", "status", "says"),
    [
        (b"another", 200, "gnome-user-docs=48.2-1 has SHA-256"),
        (b"", 404, r"could not be fetched \(HTTP Error 404.*name a mirror of Debian in DEBIAN_MIRROR"),
        (b"!<arch>\n", 200, r"has no data\.tar"),
    ],
)
def test_a_mirror_without_the_package_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: bytes, status: int, says: str
) -> None:
    if data.startswith(b"!"):
        monkeypatch.setattr(manuals, "GNOME", replace(manuals.GNOME, sha256=sha256(data).hexdigest()))
    with answering(monkeypatch, "DEBIAN_MIRROR", data, status), pytest.raises(UserError, match=says):
        manuals.make_manuals(tmp_path)
    assert not list(tmp_path.iterdir())
