"""Pack documents into blocks: tokenize, join with a separator and cut to one length, without padding or loss."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from leap_pl.base_model.prefix import Bos, prefix_of
from leap_pl.data.documents import Document, State, digest_in, warn
from leap_pl.data.exchange import Exchange, Numbers
from leap_pl.data.source import Here, Place, TextSource
from leap_pl.errors import UserError

Separator = Literal["end_token", "blank_line"]

PIECE_CHARACTERS = 1 << 18
# Pieces are tokenized several at a time, which is several times as fast as one by one.
CHUNK_CHARACTERS = 1 << 17
CHUNK_PIECES = 1 << 8


class Position(TypedDict):
    """Position of a token in the stream, in plain Python: everything before it has been used.

    Digests identify everything that was read: ``digests`` the shards that were read to their ends (see
    :class:`.source.Place`), the digest in ``state`` the part of the shard before the document, and ``document`` the
    document itself. They are small, and together cover every byte that was read.
    """

    number: int  # pass over the text
    turn: int  # index of the shard in the order of the pass
    state: State | None  # state of the reader at the beginning of the document
    character: int  # offset of the tokenized piece in the document
    token: int  # tokens of the piece that have been used
    shards: int  # number of shards of the text, since their order depends on it
    digests: list[str | None]  # by shard: None if not read to its end, "" if read to its end with unknown digest
    document: str  # SHA-256 of the document's text, or of the part of it that was read at once


class Block(NamedTuple):
    """Block of the stream."""

    ids: Numbers  # seq_length of them, the prefix first
    after: Position

    @property
    def tokens(self) -> list[int]:
        """Return the tokens as plain numbers."""
        return self.ids.tolist()


def stacked(blocks: Sequence[Block], seq_length: int) -> Tensor:
    """Return the tokens of ``blocks`` of ``seq_length`` each, LongTensor[blocks, seq_length]."""
    # As numbers of Python they would take ten times the memory of what is read.
    ids = np.empty((len(blocks), seq_length), dtype=np.int64)
    for row, block in zip(ids, blocks, strict=True):
        row[:] = block.ids
    return torch.from_numpy(ids)


class Mark(NamedTuple):
    """Place of a piece in the text."""

    place: Here  # of its document; with the shards that ended before it only for the first piece
    document: str  # digest of the document
    character: int  # offset of the piece in the document


class _Piece(NamedTuple):
    text: str
    mark: Mark
    ends: bool


class Chunk(NamedTuple):
    """Some consecutive pieces of the text, tokenized; the unit in which readers share the work."""

    marks: list[Mark]
    tokenized: Numbers  # how many tokens each piece has, with the separator after a document; then all these tokens


def _blank_line(tokenizer: Any) -> list[int]:
    """Return the tokens of a blank line behind a text: alone it may get a space that is put before every text."""

    def tokens(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    before, both = tokens("a"), tokens("a\n\n")
    return both[len(before) :] if both[: len(before)] == before else tokens("\n\n")


class BlockStream:
    """Deterministic sequence of blocks defined by a text, a tokenizer, a block length and a seed.

    Documents are tokenized without special tokens, each is followed by the separator, and the stream of tokens is
    cut so that each part fills a block of ``seq_length`` tokens after its prefix. The remainder of a pass over the text
    begins the next pass. A document of more than 262,144 characters is tokenized in pieces, cut before white space, so
    that its length costs time but no memory.

    Args:
        source: The text.
        tokenizer: A transformers tokenizer.
        seq_length: Tokens in a block.
        separator: ``end_token`` is the tokenizer's end token, as in pretraining; ``blank_line`` is a blank line, as in
            measurements of perplexity.
        bos: ``every`` begins each block with what the tokenizer puts before a text; ``first`` and ``none`` with
            nothing, since a block is not the beginning of a text.

    Attributes:
        prefix: Tokens that each block begins with.
        text_length: Tokens of text in a block.

    Raises:
        UserError: The tokenizer does not have the separator; or a block has no room for text.
    """

    def __init__(
        self,
        source: TextSource,
        tokenizer: Any,
        seq_length: int,
        separator: Separator = "end_token",
        bos: Bos = "every",
    ) -> None:
        if separator == "end_token" and tokenizer.eos_token_id is None:
            raise UserError(
                f"The tokenizer {tokenizer.name_or_path or 'given'} has no end token, and packed documents are "
                'separated by it. Set one in its tokenizer_config.json, such as "eos_token": "</s>", or set '
                "--data.separator blank_line."
            )
        self.source = source
        self.tokenizer = tokenizer
        self.seq_length = seq_length
        self.end: list[int] = [int(tokenizer.eos_token_id)] if separator == "end_token" else _blank_line(tokenizer)
        if separator == "blank_line" and "\n\n" not in tokenizer.decode(self.end):
            raise UserError(
                f"The tokenizer {tokenizer.name_or_path or 'given'} has no blank line: it reads {self.end or 'nothing'}"
                " for one, and documents would run together. Set --data.separator end_token."
            )
        self.prefix: Numbers = np.array(prefix_of(tokenizer) if bos == "every" else [], np.int32)
        self.text_length = seq_length - len(self.prefix)
        if self.text_length < 1:
            raise UserError(
                f"seq_length is {seq_length}, and the tokenizer puts {len(self.prefix)} tokens before a text. "
                "Give more, or set bos to none."
            )

    def blocks(self, start: Position | None = None, *, repeat: bool = True) -> Iterator[Block]:
        """Yield the blocks from ``start`` on: forever, or those of one pass, whose last incomplete block is dropped.

        Raises:
            UserError: The text cannot be read, or a whole pass does not fill one block, or ``start`` belongs to a text
                with a different number of shards.
        """
        return self.packed(self.tokenized(start, repeat=repeat), start)

    def tokenized(
        self,
        start: Position | None = None,
        *,
        repeat: bool = True,
        turn: int = 0,
        turns: int = 1,
        exchange: Exchange | None = None,
    ) -> Iterator[Chunk]:
        """Yield the chunks of the text from ``start`` on, tokenized: every one, or those of one reader among several.

        Chunks depend on the text alone, so readers that start at the same position agree on them. Each reader reads the
        whole text, and tokenizes its share, which takes many times as long.

        Args:
            start: Position from an earlier block.
            repeat: Continue with another pass after the last document, forever.
            turn: Number of this reader, whose chunks are those of index k ≡ ``turn`` (mod ``turns``).
            turns: Number of readers.
            exchange: Exchange with readers in other processes that need the same chunks.

        Raises:
            UserError: The text cannot be read. It is raised after all chunks that come before.
        """
        chunks = islice(_chunked(self._pieces(start, repeat=repeat)), turn, None, turns)
        results = (
            ((pieces, self._tokenized(pieces)) for pieces in chunks)
            if exchange is None
            else exchange.shared(chunks, _key, self._tokenized)
        )
        return (Chunk([piece.mark for piece in pieces], tokenized) for pieces, tokenized in results)

    def packed(self, chunks: Iterable[Chunk], start: Position | None = None) -> Iterator[Block]:
        """Yield the blocks that all ``chunks`` of the text from ``start`` on make, in their order.

        Raises:
            UserError: A whole pass does not fill one block, or ``start`` belongs to a text with a different number of
                shards.
        """
        shards = self._shards_of(start)
        digests: list[str | None] = [*(start.get("digests", ()) if start else ())] or [None] * shards
        parts: list[Numbers] = []
        filled, of_pass, whole_pass = 0, 0, start is None
        number, skip = (0, 0) if start is None else (start["number"], start["token"])
        for mark, ids in _pieces_of(chunks):
            if mark.place.number != number:
                self._end_of_pass(of_pass, whole_pass)
                if number == 0:
                    warn(f"{self.source.name} has been read to its end, and the run continues: the text repeats.")
                number, of_pass, whole_pass = mark.place.number, 0, True
            for shard, digest in mark.place.ended:
                digests[shard] = digest
            of_pass += len(ids)
            used, skip = skip, 0
            while used < len(ids):
                taken = ids[used : used + self.text_length - filled]
                used, filled = used + len(taken), filled + len(taken)
                parts.append(taken)
                if filled == self.text_length:
                    yield Block(np.concatenate([self.prefix, *parts]), _position(mark, used, digests))
                    parts, filled = [], 0
        self._end_of_pass(of_pass, whole_pass)

    def check_unchanged(self, position: Position) -> None:
        """Check that the text up to ``position`` is unchanged since the run read it.

        For local files everything that was read is compared, for a hub dataset the document at the position.

        Raises:
            UserError: The text or the number of its shards has changed, or it cannot be read.
        """
        self._shards_of(position)
        place = _place(position)
        self.source.check_unchanged(place)
        _, document = next(self.source.documents(place))
        if position["document"] != _digest(document):
            shard = self.source.shard_at(place)
            raise self.source.changed(shard, "in the document in which the run was stopped")

    def with_digests(self, position: Position) -> Position:
        """Return ``position``, written by an earlier version, with the digests of the current text.

        Raises:
            UserError: The number of shards has changed, or the text cannot be read.
        """
        self._shards_of(position)
        place = self.source.with_digests(_place(position))
        _, document = next(self.source.documents(place))
        added = {"state": place.state, "digests": list(place.digests), "document": _digest(document)}
        return Position(**{**position, **added})  # type: ignore[typeddict-item]

    def _shards_of(self, position: Position | None) -> int:
        """Return the number of shards; raise a UserError if it differs from that of ``position``."""
        shards = len(self.source.shards)
        if position is not None and position["shards"] != shards:
            raise UserError(
                f"{self.source.name} is in {shards} shards now and was in {position['shards']} when the run was "
                "stopped, so that the run cannot be resumed. Restore the text as it was."
            )
        return shards

    def _end_of_pass(self, tokens: int, whole: bool) -> None:
        if whole and tokens < self.text_length:
            raise UserError(
                f"{self.source.name} is too short: the part that is read makes {tokens} tokens, and one block takes "
                f"{self.text_length}. Give more text, or lower --data.seq_length."
            )

    def _pieces(self, start: Position | None, *, repeat: bool) -> Iterator[_Piece]:
        place, character = None, 0
        if start is not None:
            place, character = _place(start), start["character"]
        for here, document in self.source.documents(place, repeat=repeat):
            yield from _cut(here, document, character)
            character = 0

    def _tokenized(self, pieces: list[_Piece]) -> Numbers:
        encoded = self.tokenizer(
            [piece.text for piece in pieces],
            add_special_tokens=False,
            return_attention_mask=False,  # of token types not every tokenizer knows, such as that of mistral-common
            verbose=False,  # no warning that a document is longer than the model's context
        )["input_ids"]
        ids = [[*ids, *self.end] if piece.ends else ids for piece, ids in zip(pieces, encoded, strict=True)]
        return np.fromiter(chain(map(len, ids), *ids), np.int32)


def _chunked(pieces: Iterator[_Piece]) -> Iterator[list[_Piece]]:
    """Yield pieces in chunks; an error of the text is raised after what was read before it."""
    chunk: list[_Piece] = []
    characters = 0
    failure: UserError | None = None
    try:
        for piece in pieces:
            chunk.append(piece)
            characters += len(piece.text)
            if characters >= CHUNK_CHARACTERS or len(chunk) == CHUNK_PIECES:
                yield chunk
                chunk, characters = [], 0
    except UserError as error:
        failure = error
    if chunk:
        yield chunk
    if failure:
        raise failure


def _key(pieces: list[_Piece]) -> str:
    """Return a name of a chunk, by its place in the text and its contents."""
    number, turn, state, _ = pieces[0].mark.place
    contents = [(piece.mark.document, piece.mark.character, len(piece.text), piece.ends) for piece in pieces]
    return hashlib.sha256(json.dumps([number, turn, state, contents]).encode()).hexdigest()


def _pieces_of(chunks: Iterable[Chunk]) -> Iterator[tuple[Mark, Numbers]]:
    """Yield the pieces of all chunks: where each is, and its tokens."""
    for marks, tokenized in chunks:
        end = len(marks)
        for mark, length in zip(marks, tokenized[:end].tolist(), strict=True):
            begin, end = end, end + length
            yield mark, tokenized[begin:end]


def _position(mark: Mark, token: int, digests: list[str | None]) -> Position:
    number, turn, state, _ = mark.place
    return Position(
        number=number,
        turn=turn,
        state=state,
        character=mark.character,
        token=token,
        shards=len(digests),
        digests=[*digests],
        document=mark.document,
    )


def _place(position: Position) -> Place:
    """Return the place where the document of ``position`` begins; positions of earlier versions have no digests."""
    return Place(position["number"], position["turn"], position["state"], tuple(position.get("digests", ())))


def _digest(document: Document) -> str:
    return hashlib.sha256(document.text.encode()).hexdigest()


def digest_of_text(position: Position | None) -> str | None:
    """Return one digest of all text read up to ``position``, the SHA-256 of its digests.

    None if nothing was read, or if the digest of a part is unknown.
    """
    if position is None:
        return None
    before = digest_in(position["state"])
    digests = position.get("digests", [])
    if before is None or "" in digests or "document" not in position:
        return None
    return hashlib.sha256(json.dumps([digests, before, position["document"]]).encode()).hexdigest()


def _cut(place: Here, document: Document, character: int) -> Iterator[_Piece]:
    """Yield the pieces of ``document`` from ``character`` on, where an earlier piece of it ended."""
    text, digest = document.text, _digest(document)
    while len(text) - character > PIECE_CHARACTERS:
        # After the middle, so that every piece is long; before the white space, which belongs to the next word.
        middle, most = character + PIECE_CHARACTERS // 2, character + PIECE_CHARACTERS
        cut = text.rfind("\n", middle, most)
        cut = cut if cut > 0 else text.rfind(" ", middle, most)
        cut = cut if cut > 0 else most
        yield _Piece(text[character:cut], Mark(place, digest, character), ends=False)
        place, character = place._replace(ended=()), cut
    yield _Piece(text[character:], Mark(place, digest, character), document.ends)
