"""Told to stop: what a scheduler's signals, and Ctrl-C, do to a run."""

import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_PRESS = 1.0  # seconds: a launcher and a process group may both pass one signal on


class Stopped(SystemExit):
    """The process was told to stop by a signal, and stops in order; exit status 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


class StopSignals:
    """Handlers that note a signal, for the run to heed when it is between two pieces of work.

    The first signal of a kind is noted, or, while :attr:`at_once` is true, raises :class:`Stopped` where the
    process stands. The same signal again ends the process at once, as if there were no handler.

    Attributes:
        asked: The number of the signal that was noted; None before.
        at_once: Nothing is under way that would be lost.
        word: What to say to standard error when a signal is noted.
    """

    def __init__(self, numbers: tuple[int, ...] = STOPPING) -> None:
        self.numbers = set(numbers)
        self.asked: int | None = None
        self.at_once = True
        self.word = ""
        self._active = False
        self._noted: dict[int, float] = {}
        self._before: dict[int, Any] = {}

    def install(self, *more: int) -> None:
        """Take the signals over, or take them back from whoever did meanwhile; ``more``: others to heed as well."""
        self.numbers.update(more)
        self._active = True
        for number in self.numbers:
            if number == signal.SIGINT and signal.getsignal(number) == signal.SIG_IGN:
                continue  # a job in a shell's background, which Ctrl-C is not for
            try:
                handler = signal.signal(number, self._handle)
            except ValueError:  # not the main thread, where alone signals arrive
                return
            if handler != self._handle:
                self._before.setdefault(number, handler)

    def remove(self) -> None:
        """Give the signals back."""
        self._active = False
        for number, handler in self._before.items():
            try:
                if signal.getsignal(number) == self._handle:
                    signal.signal(number, handler)
            except ValueError:
                return

    def heed(self) -> None:
        """Stop here if a signal was noted.

        Raises:
            Stopped: It was.
        """
        if self.asked is not None:
            raise Stopped(self.asked)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._active:  # somebody who had saved this handler put it back
            self._pass_on(number, frame)
            return
        now = time.monotonic()
        first = self._noted.setdefault(number, now)
        if now - first >= SAME_PRESS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if first != now:
            return
        self.asked = number
        if self.at_once:
            raise Stopped(number)
        if self.word:
            # Not print: the signal may have come amid one.
            os.write(2, f"\n{signal.Signals(number).name}: {self.word}\n".encode())

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        before: Callable[[int, FrameType | None], Any] | Any = self._before.get(number, signal.SIG_DFL)
        if callable(before):
            before(number, frame)
            return
        signal.signal(number, before)
        os.kill(os.getpid(), number)
