"""Share the tokenizing of one text between the processes of a run, through the store of their process group."""

import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from leap_pl.errors import UserError

T = TypeVar("T")
Numbers = npt.NDArray[np.int32]

TIMEOUT = 2.0  # seconds to wait for what another process makes, before this one makes it too


class Exchange:
    """Exchange between processes that all need the same items processed: each processes a share of them.

    Items and results are the same for every process, so an exchange saves time and never changes a result. What does
    not come within ``TIMEOUT`` seconds, because its process has ended or is busy, is processed where it is needed: no
    process depends on another.

    Results pass through the store by which the processes found one another (``MASTER_ADDR``, ``MASTER_PORT``), over a
    connection of each reader's own, since a forked data worker cannot use its parent's. Without such a store every
    process processes everything.

    Args:
        name: Name of the exchange, the same in all processes, and never used before with the same store.
        rank: Number of this process.
        ranks: Number of processes.
    """

    def __init__(self, name: str, rank: int, ranks: int) -> None:
        self.name = name
        self.rank = rank
        self.ranks = ranks
        self._store: Any = None  # connected where the items are read

    def shared(
        self, items: Iterator[T], key: Callable[[T], str], process: Callable[[T], Numbers]
    ) -> Iterator[tuple[T, Numbers]]:
        """Yield ``items``, each with its result; one of every ``ranks`` items is processed here, ahead of the others.

        Args:
            items: Items, the same in all processes.
            key: Function that returns a name of an item, unique among all that pass through the exchange.
            process: Function that returns the result of an item.

        Raises:
            UserError: Raised by ``items``, after all items that come before.
        """
        self._store = _connected()
        while True:
            group: list[T] = []
            failure: UserError | None = None
            try:
                while len(group) < self.ranks:
                    group.append(next(items))
            except StopIteration:
                pass
            except UserError as error:
                failure = error
            own = process(group[self.rank]) if self.rank < len(group) else None
            if own is not None:
                self._publish(key(group[self.rank]), own)
            for place, item in enumerate(group):
                result = own if place == self.rank else self._fetched(key(item))
                yield item, process(item) if result is None else result
            if failure:
                raise failure
            if len(group) < self.ranks:
                return

    def _publish(self, key: str, result: Numbers) -> None:
        if self._store is None:
            return
        try:
            self._store.set(f"{self.name}/{key}", result.tobytes())
        except RuntimeError:  # the store is gone, and with it the process group
            self._store = None

    def _fetched(self, key: str) -> Numbers | None:
        """Return the result that another process publishes; None if it does not come."""
        if self._store is None:
            return None
        key = f"{self.name}/{key}"
        result = None
        try:
            if self._came(key):
                result = np.frombuffer(self._store.get(key), np.int32)
            if self._store.add(f"{key}/read", 1) == self.ranks - 1:  # no other process needs it
                self._store.delete_key(key)
                self._store.delete_key(f"{key}/read")
        except RuntimeError:
            self._store = None
        return result

    def _came(self, key: str) -> bool:
        """Return whether ``key`` is in the store within ``TIMEOUT`` seconds, of which torch's own wait would warn."""
        end, pause = time.monotonic() + TIMEOUT, 0.0005
        while not self._store.check([key]):
            if time.monotonic() > end:
                return False
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        return True


def _connected() -> Any:
    """Return a connection to the store of the process group; None if there is none."""
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.TCPStore(address, port, timeout=timedelta(seconds=TIMEOUT))  # type: ignore[attr-defined]
    except (KeyError, ValueError, RuntimeError):
        return None
