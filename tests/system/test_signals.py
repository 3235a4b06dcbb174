"""What a signal does: noted or heeded at once, passed on when it is nobody's, and deadly the second time."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from leap_pl.checkpoints.signals import STOPPING, Stopped, StopSignals


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (*STOPPING, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0)  # handlers run between two instructions


def test_a_signal_is_noted_and_heeded_later(capfd) -> None:
    signals = StopSignals()
    signals.install()
    signals.at_once, signals.message = False, "so be it."
    signals.raise_pending()
    send(signal.SIGUSR1)
    assert signals.asked == signal.SIGUSR1
    assert capfd.readouterr().err == "\nSIGUSR1: so be it.\n"
    with pytest.raises(Stopped) as caught:
        signals.raise_pending()
    assert caught.value.code == 138
    assert isinstance(caught.value, SystemExit)


def test_a_signal_is_heeded_at_once_where_nothing_is_under_way() -> None:
    signals = StopSignals()
    signals.install()
    with pytest.raises(Stopped) as caught:
        send(signal.SIGTERM)
    assert caught.value.code == 143


def test_one_signal_that_comes_twice_is_one(capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher and the process group both pass it on; and SIGTERM after SIGUSR1 is no second SIGUSR1."""
    monkeypatch.setattr("leap_pl.checkpoints.signals.SAME_PRESS", 60.0)  # however busy the machine is
    signals = StopSignals()
    signals.install()
    signals.at_once, signals.message = False, "noted."
    for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
        send(number)
    assert signals.asked == signal.SIGTERM
    assert capfd.readouterr().err.count("noted.") == 2


AGAIN = """
import os, signal, sys, time
import leap_pl.checkpoints.signals
leap_pl.checkpoints.signals.SAME_PRESS = 0.05
signals = leap_pl.checkpoints.signals.StopSignals()
signals.install()
signals.at_once = False
number = int(sys.argv[1])
os.kill(os.getpid(), number)
time.sleep(0.1)
print("still here", flush=True)
os.kill(os.getpid(), number)
time.sleep(10)
print("never", flush=True)
"""


@pytest.mark.parametrize("number", STOPPING)
def test_the_same_signal_again_ends_at_once(number: int) -> None:
    ended = subprocess.run([sys.executable, "-c", AGAIN, str(int(number))], capture_output=True, text=True, check=False)
    assert ended.stdout == "still here\n"
    assert ended.returncode == -number


def test_ctrl_c_is_not_for_a_job_in_the_background() -> None:
    """A shell that puts a command into the background lets it ignore SIGINT; SIGTERM is for it all the same."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signals = StopSignals()
    signals.install()
    send(signal.SIGINT)
    assert signals.asked is None
    with pytest.raises(Stopped):
        send(signal.SIGTERM)
    signals.remove()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_signals_are_given_back_and_taken_back() -> None:
    got: list[int] = []
    hangup = signal.getsignal(signal.SIGHUP)
    signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    mine = signal.getsignal(signal.SIGTERM)
    signals = StopSignals()
    signals.install()
    theirs = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # somebody else's, such as Lightning's
    signals.at_once = False
    signals.install(signal.SIGHUP)
    send(signal.SIGHUP)
    assert signals.asked == signal.SIGHUP
    signals.remove()
    assert signal.getsignal(signal.SIGTERM) == mine
    assert signal.getsignal(signal.SIGHUP) == hangup
    # Somebody had saved the handler and restores it: it passes on what comes.
    signal.signal(signal.SIGTERM, theirs)
    send(signal.SIGTERM)
    assert got == [signal.SIGTERM]
    assert signals.asked == signal.SIGHUP


def test_a_handler_that_was_put_back_lets_the_signal_kill() -> None:
    code = """
import os, signal, time
from leap_pl.checkpoints.signals import StopSignals
signals = StopSignals()
signals.install()
saved = signal.getsignal(signal.SIGTERM)
signals.remove()
signal.signal(signal.SIGTERM, saved)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(10)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGTERM


def test_outside_the_main_thread_there_are_no_signals() -> None:
    signals = StopSignals()
    before = signal.getsignal(signal.SIGTERM)
    for act in (signals.install, signals.remove):
        thread = threading.Thread(target=act)
        thread.start()
        thread.join()
    assert signal.getsignal(signal.SIGTERM) == before
