"""Signal handling: save a checkpoint and exit cleanly on SIGTERM, SIGUSR1 or Ctrl-C."""

import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_PRESS = 1.0  # seconds: one signal may arrive twice, from a launcher and from the process group


class Stopped(SystemExit):
    """Orderly exit after a stop signal, with status 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


class StopSignals:
    """Handlers that record a stop signal, for the run to act on between two units of work.

    The first signal of a kind is recorded or, while :attr:`at_once` is true, raises :class:`Stopped` immediately. The
    same signal a second time ends the process immediately, as without a handler.

    Attributes:
        asked: Number of the recorded signal; None if there was none.
        at_once: Whether to stop immediately, since no work would be lost.
        message: Text for standard error when a signal is recorded.
    """

    def __init__(self) -> None:
        self.numbers: set[int] = set(STOPPING)
        self.asked: int | None = None
        self.at_once = True
        self.message = ""
        self._active = False
        self._noted: dict[int, float] = {}
        self._before: dict[int, Any] = {}

    def install(self, *more: int) -> None:
        """Install the handlers, or reinstall them over others; ``more`` are additional signals to handle."""
        self.numbers.update(more)
        self._active = True
        for number in self.numbers:
            if number == signal.SIGINT and signal.getsignal(number) == signal.SIG_IGN:
                continue  # a background job of a shell ignores Ctrl-C
            try:
                handler = signal.signal(number, self._handle)
            except ValueError:  # only the main thread can install handlers
                return
            if handler != self._handle:
                self._before.setdefault(number, handler)

    def remove(self) -> None:
        """Restore the previous handlers."""
        self._active = False
        for number, handler in self._before.items():
            try:
                if signal.getsignal(number) == self._handle:
                    signal.signal(number, handler)
            except ValueError:
                return

    def raise_pending(self) -> None:
        """Raise :class:`Stopped` if a signal was recorded.

        Raises:
            Stopped: If so.
        """
        if self.asked is not None:
            raise Stopped(self.asked)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._active:  # other code had saved this handler and restored it
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
        if self.message:
            # Not print, which is not reentrant: the signal may interrupt a print.
            os.write(2, f"\n{signal.Signals(number).name}: {self.message}\n".encode())

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        before: Callable[[int, FrameType | None], Any] | Any = self._before.get(number, signal.SIG_DFL)
        if callable(before):
            before(number, frame)
            return
        signal.signal(number, before)
        os.kill(os.getpid(), number)
