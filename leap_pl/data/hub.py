"""Stream text from a dataset on the Hugging Face hub, without downloading it as a whole."""

import errno
import gzip
import logging
import os
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from inspect import unwrap
from typing import Any, TypeVar

from leap_pl.data.documents import EMPTY, Document, Share, State, chained, digest_in, in_share, repaired
from leap_pl.data.textless import OF_CHAT, Textless
from leap_pl.errors import UserError, listing, one_line
from leap_pl.escape import terminal
from leap_pl.inputs.hub import LOG_IN, check_reachable, is_network_error
from leap_pl.inputs.plain_values import shown

T = TypeVar("T")

DEFAULT_CONFIGS = {"allenai/c4": "en"}
TRIES = 12
ALIKE = 3  # failures of the same row with the same message, while the hub answers, that are damage and no outage
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 60.0  # seconds; doubled at every further try
_ROWS = 64
NO_ACCESS = (401, 403, 404, 410)  # HTTP: what the hub answers of a file that is not there, or not for this user
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


def _escaped(record: logging.LogRecord) -> bool:
    """Escape what ``datasets`` logs: names of columns are the author's of the data."""
    record.msg, record.args = terminal(record.getMessage(), lines=True), ()
    return True


class HubDataset:
    """Split of a hub dataset, in its stored shards.

    The shards are read one at a time in an order defined by this project, without the shuffle buffer of
    ``datasets``, whose rows a resumed run would lose.

    Every state has the digest of the rows before it (:func:`.documents.chained`). The rows that a run has read are not
    fetched again for comparison: a resumed run compares dataset, config, split and the document at its position.

    Args:
        dataset: Hub id.
        config_name: Configuration; None is the only one, and ``en`` for ``allenai/c4``.
        split: Split.
        text_column: Column of the text.
        share: Part of the split to read.
        sleep: Function called with the seconds to wait before another try.
    """

    def __init__(
        self,
        dataset: str,
        config_name: str | None = None,
        split: str = "train",
        text_column: str = "text",
        share: Share = "all",
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.dataset = dataset
        self.config_name = config_name or DEFAULT_CONFIGS.get(dataset)
        self.split = split
        self.text_column = text_column
        self.share = share
        self.sleep = sleep
        self.rereadable = False
        self.name = f"{dataset} ({', '.join(filter(None, (self.config_name, split)))})"
        self._opened: tuple[int, Any] | None = None
        self._count: int | None = None  # of shards

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the open dataset: every process opens its own."""
        return {**self.__dict__, "_opened": None}

    def __len__(self) -> int:
        """Return the number of shards.

        Raises:
            UserError: The dataset cannot be reached, or has no such config, split or column.
        """
        if self._count is None:  # data workers get it too, and begin with it
            self._count = int(self._open().num_shards)
        return self._count

    def identity(self) -> str:
        """Return dataset, config and split."""
        return self.name

    def configuration(self) -> str:
        """Return the name of the configuration, which the hub knows if none was named.

        Raises:
            UserError: The dataset cannot be reached, or has no such config, split or column.
        """
        return self.config_name or str(getattr(self._open().info, "config_name", None))

    def digest(self, shard: int, until: State | None) -> None:
        """Return None: rows are never fetched a second time."""

    def shard_name(self, shard: int) -> str:
        """Return the dataset and the number of the shard."""
        return f"{self.name}, shard {shard}"

    def read(self, shard: int, state: State | None) -> Generator[Document, None, str | None]:
        """Yield the documents of ``shard`` from ``state`` on, and return the shard's digest.

        After a network error the reader retries from the same position.

        Raises:
            UserError: The network does not recover, or the data cannot be read; the message has the position.
        """
        here: State = dict(state) if state else {"reader": None, "skip": 0, "row": 0, "digest": ""}
        tries = alike = 0
        failed: tuple[int, str] | None = None  # row and message of the last failure
        textless = Textless(f"{self.name}, shard {shard}", "row")
        while True:
            try:
                for document, after in self._read_once(shard, here):
                    here, tries, alike, failed = after, 0, 0, None
                    textless.read()
                    if document is not None:
                        if document.text.strip():
                            textless.found()
                        yield document
                return EMPTY if here.get("digest") == "" else digest_in(here)
            except UserError:
                raise
            except Exception as error:
                place, short = f"{self.name}, shard {shard}, row {here['row']}", _short(error)
                alike = alike + 1 if failed == (here["row"], short) else 1
                failed = here["row"], short
                damaged = alike == ALIKE and _may_be_damage(error) and self._answers()
                if not is_network_error(error) or _is_refusal(error) or _is_final(error) or damaged:
                    raise UserError(
                        f"{place}: the data cannot be read ({short}). Give another dataset, or a local file."
                    ) from error
                tries += 1
                if tries == TRIES:
                    raise UserError(
                        f"{place}: the network failed {TRIES} times in a row ({short}). When it is back, run "
                        "the command again (fit with --ckpt_path last), or pass local files: --data.text FILE.jsonl."
                    ) from error
                pause = min(FIRST_PAUSE * 2 ** (tries - 1), LONGEST_PAUSE)
                # Of each reader, for a connection fails alone, and all ranks wait for it.
                warnings.warn(f"{place}: {short}; next try in {pause:.0f} s.", stacklevel=2)
                self.sleep(pause)

    def _answers(self) -> bool:
        """Return whether the hub answers now about the dataset."""
        try:
            unwrap(check_reachable)(self.dataset, "dataset")  # not what it answered when the run began
        except Exception as error:
            if not is_network_error(error):
                raise
            return False
        return True

    def _read_once(self, shard: int, state: State) -> Iterator[tuple[Document | None, State]]:
        """Yield the documents of the share (None for a row outside it), each with the state after it."""
        dataset = self._open()
        part = dataset.shard(num_shards=dataset.num_shards, index=shard)
        if state["reader"] is not None:
            part.load_state_dict(state["reader"])
        reader, skip, row, digest = state["reader"], state["skip"], state["row"], digest_in(state)
        # `iter` in batches, because plain iteration would split the rows once more over the data workers.
        for rows in _without_retries(part.iter(batch_size=_ROWS)):
            if self.text_column not in rows:
                raise self._no_column(list(rows))
            texts = rows[self.text_column]
            next_reader = part.state_dict()
            for index in range(skip, len(texts)):
                ordinal, row = row, row + 1
                digest = chained(digest, repr(texts[index]).encode(errors="surrogatepass"))
                last = index + 1 == len(texts)
                after = {
                    "reader": next_reader if last else reader,
                    "skip": 0 if last else index + 1,
                    "row": row,
                    "digest": digest,
                }
                if not in_share(self.share, shard, ordinal):
                    yield None, after
                    continue
                if not isinstance(texts[index], str | None):
                    found = type(texts[index]).__name__
                    chat = OF_CHAT * isinstance(texts[index], list)
                    raise UserError(f"{self.name}: column {self.text_column!r} has {found}, not text.{chat}")
                yield Document(repaired(texts[index] or "")[0], after), after
            reader, skip = next_reader, 0

    def _open(self) -> Any:
        # A worker forked from this process must not share its connections.
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), self._load())
        return self._opened[1]

    def _load(self) -> Any:
        import datasets

        if "/" not in self.dataset:  # text or json: datasets would read the files of the working directory
            raise UserError(f"{self.dataset} is no dataset of the hub. Name one as USER/NAME, such as allenai/c4.")
        for handler in logging.getLogger("datasets").handlers:
            handler.addFilter(_escaped)
        try:
            check_reachable(self.dataset, "dataset")
            dataset = datasets.load_dataset(self.dataset, self.config_name, split=self.split, streaming=True)
        except Exception as error:
            if _is_refusal(error):
                raise UserError(
                    f"The hub has no dataset {self.dataset!r}, or it is gated or private ({_short(error)}), and there "
                    f"is no local file of that name. Check the name; for a gated or private one, {LOG_IN}."
                ) from error
            if is_network_error(error) and self._count is not None:
                raise  # it was there before, perhaps in another process: read() tries again
            if is_network_error(error):
                raise UserError(
                    f"The dataset {self.dataset!r} could not be reached ({_short(error)}), and there is no local "
                    "file of that name. Pass local files instead: --data.text FILE.jsonl."
                ) from error
            raise UserError(
                f"The dataset {self.name} cannot be opened ({_short(error)}). "
                "Choose with --data.config_name and --data.split. Or pass local files: --data.text FILE.jsonl."
            ) from error
        if dataset.column_names is None:
            return dataset
        if self.text_column not in dataset.column_names:
            raise self._no_column(dataset.column_names)
        return dataset.select_columns([self.text_column])

    def _no_column(self, columns: list[str]) -> UserError:
        return UserError(
            f"{self.name} has no column {self.text_column!r}; it has: {listing([shown(c) for c in columns])}. "
            "Name the column of the text with --data.text_column."
        )


def _without_retries(batches: Iterable[T]) -> Iterator[T]:
    """Yield ``batches``, read without the retries of ``datasets``, which :meth:`HubDataset.read` makes by itself.

    Those call the read of an unpacked file again, which has lost what the failed call had unpacked: rows would be
    missing, or half a row would be taken for damaged data.
    """
    import datasets

    left = iter(batches)
    while True:
        with _set(datasets.config, "STREAMING_READ_MAX_RETRIES", 1):
            try:
                batch = next(left)
            except StopIteration:
                return
        yield batch


@contextmanager
def _set(module: Any, name: str, value: object) -> Iterator[None]:
    """Set a setting of another library within the context, if it has that one."""
    before = getattr(module, name, None)
    if before is not None:
        setattr(module, name, value)
    try:
        yield
    finally:
        if before is not None:
            setattr(module, name, before)


def _is_refusal(error: BaseException) -> bool:
    """Return whether the hub has answered that there is no such dataset, or none for this user: no use to ask again."""
    from datasets.exceptions import DatasetNotFoundError

    return isinstance(error, DatasetNotFoundError)  # others of its kind are also raised where the hub is down


def _is_final(error: BaseException) -> bool:
    """Return whether to read again is of no use: data that is damaged or refused, or a disk that takes no more."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return getattr(error.response, "status_code", None) in NO_ACCESS
    return isinstance(error, gzip.BadGzipFile) or (isinstance(error, OSError) and error.errno in NO_ROOM)


def _may_be_damage(error: BaseException) -> bool:
    """Return whether ``error`` can come from damaged or missing data as well as from the network.

    Data that ends early is taken for an answer that was cut off.
    """
    return type(error) in (OSError, FileNotFoundError) and getattr(error, "errno", None) in (None, errno.ENOENT)


def _short(error: BaseException) -> str:
    """Return the message of ``error`` as one line of bounded length."""
    text = one_line(error)
    return text if len(text) <= 300 else f"{text[:300]}..."
