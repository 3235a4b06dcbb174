"""A package registry on this machine that answers every request alike, and what it may answer."""

import io
import json
import tarfile
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, Literal

import pytest


@contextmanager
def answering(monkeypatch: pytest.MonkeyPatch, variable: str, data: bytes, status: int = 200) -> Iterator[list[str]]:
    """A registry, whose address ``variable`` is, that answers ``data``; yields the paths asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setenv(variable, f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    try:
        yield asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def tarball(content: Mapping[str, bytes], mode: Literal["w:gz", "w:xz"] = "w:gz") -> bytes:
    """The bytes of a tarball of name → content; a content that begins with ``-> `` is a link to the rest of it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            if data.startswith(b"-> "):
                member.type, member.linkname = tarfile.SYMTYPE, data[3:].decode()
            else:
                member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def debian_package(files: Mapping[str, bytes]) -> bytes:
    """The bytes of a Debian package, an ar archive of two tarballs after a note of its version."""
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": tarball(files, "w:xz")}
    package = b"!<arch>\n"
    for name, data in parts.items():
        package += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
        )
    return package


def wheel_of(content: Mapping[str, bytes]) -> bytes:
    """The bytes of a wheel of name → content."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def lines(path: Path) -> list[Any]:
    """The rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
