"""Arrangement of answers in rows, so that tokens which several of them begin with are computed once.

The answers of a question begin with the same context. A row holds that context once, and the rest of each answer as a
branch after it; attention within the row is that of a tree, in which a branch does not see another.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# A sequence joins a row if that saves at least this share of its tokens: otherwise, attention over the other branches
# costs more than a few common tokens are worth.
LEAST_SAVED = 0.25
# A row may be this much longer than its longest answer alone, which takes a forward pass of its own anyway.
MOST_ADDED = 1.25


@dataclass(frozen=True)
class Answer:
    """Tokens of a context and its continuation, of which the continuation is scored.

    Attributes:
        index: Place of the answer in the given order.
        tokens: Context and continuation.
        scored: Number of tokens of the continuation.
    """

    index: int
    tokens: tuple[int, ...]
    scored: int

    @property
    def inputs(self) -> tuple[int, ...]:
        """Return the tokens that the model reads: all but the last, which is only predicted."""
        return self.tokens[:-1]


@dataclass(frozen=True)
class Row:
    """A prefix and the branches after it.

    Attributes:
        answers: Answers of the row.
        shared: Number of input tokens that all of them begin with.
    """

    answers: list[Answer]
    shared: int

    @property
    def length(self) -> int:
        """Return the number of tokens of the row."""
        return self.shared + sum(len(answer.inputs) - self.shared for answer in self.answers)

    def tokens(self) -> list[int]:
        """Return the prefix and all branches."""
        prefix = self.answers[0].inputs[: self.shared]
        return [*prefix, *(token for answer in self.answers for token in answer.inputs[self.shared :])]

    def positions(self) -> list[int]:
        """Return the position of each token in its own sequence: those of each branch go on after the prefix."""
        branches = (range(self.shared, len(answer.inputs)) for answer in self.answers)
        return [*range(self.shared), *(position for branch in branches for position in branch)]

    def branches(self) -> list[int]:
        """Return the branch of each token, from 1 on; 0 is the prefix."""
        numbers = ([number] * (len(answer.inputs) - self.shared) for number, answer in enumerate(self.answers, 1))
        return [0] * self.shared + [number for branch in numbers for number in branch]

    def scored(self) -> Iterator[tuple[Answer, list[int]]]:
        """Yield each answer with the places in the row whose outputs predict its continuation."""
        start = self.shared
        for answer in self.answers:
            end = len(answer.inputs)
            within = range(end - answer.scored, end)
            yield answer, [at if at < self.shared else start + at - self.shared for at in within]
            start += end - self.shared


def arrange(answers: Sequence[Answer], longest: int | None) -> list[Row]:
    """Return rows that hold all ``answers``, the longest row first.

    Args:
        answers: In any order.
        longest: Number of tokens up to which answers are joined to a row; beyond it, those that make the row at most
            :data:`MOST_ADDED` times as long as one of them alone. None: only those without a branch.
    """
    rows: list[Row] = []
    # In lexicographic order, sequences with a common prefix are neighbours, whatever task or question they are of.
    for answer in sorted(answers, key=lambda answer: answer.tokens):
        if rows and (joined := _joined(rows[-1], answer, longest)) is not None:
            rows[-1] = joined
        else:
            rows.append(Row([answer], len(answer.inputs)))
    return sorted(rows, key=lambda row: -row.length)


def _joined(row: Row, answer: Answer, longest: int | None) -> Row | None:
    """Return ``row`` with ``answer``, if that saves enough tokens; otherwise None."""
    shared = _common(row.answers[0].inputs[: row.shared], answer.inputs)
    joined = Row([*row.answers, answer], shared)
    alone = len(answer.inputs)
    saved = row.length + alone - joined.length
    most = 0.0 if longest is None else max(longest, MOST_ADDED * max(alone, *(len(one.inputs) for one in row.answers)))
    fits = joined.length <= most or joined.length == joined.shared  # answers of one token add none to their context
    return joined if shared and saved >= LEAST_SAVED * alone and fits else None


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common prefix."""
    for at, (first, second) in enumerate(zip(one, other, strict=False)):
        if first != second:
            return at
    return min(len(one), len(other))


def batches(rows: Sequence[Row], tokens: int) -> Iterator[Sequence[Row]]:
    """Yield the ``rows``, sorted by descending length, in batches of at most ``tokens`` padded tokens, or one row."""
    at = 0
    while at < len(rows):
        count = max(1, tokens // max(rows[at].length, 1))
        yield rows[at : at + count]
        at += count
