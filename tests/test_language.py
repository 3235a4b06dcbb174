"""Check the language of docstrings in leap_pl: imperative first sentences, and standard terms."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "leap_pl"

# First words of a phrase that describes a value instead of saying what the function does.
BANNED = {
    *("A", "An", "The", "Its", "Their", "This", "That", "These", "Those", "Such", "One", "Two", "Some", "Other"),
    *("All", "Any", "Each", "Every", "Everything", "Both", "No", "None", "Not", "Nothing", "Only", "True", "False"),
    *("What", "Which", "Whether", "Who", "How", "When", "Where", "While", "Why", "If", "Of", "As", "At", "By", "For"),
    *("From", "In", "Into", "On", "Over", "To", "With", "Within", "Without", "After", "Before", "It", "There", "Is"),
}
ARCHAIC = re.compile(r"(?<![a-z])(told(?![a-z])|gone on from)", re.IGNORECASE)
ENTRY = re.compile(r"^\s*\*{0,2}\w+(?: \([^)]*\))?:\s+Of\b.*", re.MULTILINE)

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def faults(source: str) -> Iterator[str]:
    """Yield a line for each violation of the rules in ``source``."""
    for number, line in enumerate(source.splitlines(), 1):
        for word in ARCHAIC.findall(line):
            yield f"{number}: {word}"
    for node in ast.walk(ast.parse(source)):
        text = ast.get_docstring(node) if isinstance(node, Documented) else None
        if text is None:
            continue
        where = f"{getattr(node, 'lineno', 1)}: {getattr(node, 'name', 'module')}"
        first = text.split(maxsplit=1)[0].rstrip(",.:;")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_verb(first):
            yield f"{where} starts with {first!r}, not with a verb"
        for entry in ENTRY.findall(text):
            yield f"{where} has the entry {entry.strip()!r}"


def is_verb(word: str) -> bool:
    """Return whether ``word`` may be an imperative: a capitalised English word that is not banned."""
    return re.fullmatch("[A-Z][a-z]+", word) is not None and word not in BANNED


def test_docstrings_are_imperative_and_use_standard_terms() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 120
    found = [
        f"{file.relative_to(PACKAGE)}:{fault}" for file in files for fault in faults(file.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ('def f():\n    """Return the mask."""', 0),
        (
            'def f():\n    """Return, for each, a mask.\n\n    Args:\n        a: Weight of a term.\n    """',
            0,
        ),
        ('class A:\n    """Masks of one model."""', 0),
        ("stolds = gold = 1", 0),
        ('def f():\n    """The mask."""', 1),
        ('async def f():\n    """What is kept."""', 1),
        ('class A:\n    def f(self):\n        """``x`` as text."""', 1),
        (
            'class A:\n    """Settings.\n\n    Args:\n        a: Of the order.\n        b (int): Of it.\n    """',
            2,
        ),
        ("told = 1", 1),
        ("def _told_by(a): ...", 1),
        ("# the checkpoint that is gone on from", 1),
    ],
)
def test_each_rule_is_checked(source: str, count: int) -> None:
    assert len(list(faults(source))) == count
