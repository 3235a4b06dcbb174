"""One command of leap_pl in a process of its own: its output in a file, one line of it on the terminal."""

import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from leap_pl.errors import UserError

LINE_SECONDS = 60.0  # between two lines where the terminal cannot draw over the last one
END_SECONDS = 10.0
LEARNING = ("fit", "recover")
TAIL = 4096  # bytes of a log that hold its last line


@dataclass(frozen=True)
class Ran:
    """What a process took: wall-clock seconds, and the most memory it held, in bytes."""

    seconds: float
    peak_rss: int


def run_command(words: Sequence[str], log: Path, caption: str, keep: Sequence[int] = ()) -> Ran:
    """Run ``leap_pl words`` to its end; its output is added to ``log``.

    The process is ended with this one, whether that is interrupted or stopped. The files ``keep`` stay open in it.

    Raises:
        UserError: It failed; the message has its last line.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with log.open("ab") as output:
        output.write(f"$ leap_pl {' '.join(words)}\n".encode())
        output.flush()
        command = [sys.executable, "-m", "leap_pl", *words]
        process = subprocess.Popen(command, stdout=output, stderr=output, pass_fds=keep)
        progress = _Progress(caption, log)
        try:
            status, peak = _wait(process, progress)
        finally:
            progress.close()
            if process.returncode is None:
                _end(process, learns=words[0] in LEARNING)
    if status:
        raise UserError(f"{caption}: leap_pl {words[0]} failed: {last_line(log)} (all that it said: {log})")
    return Ran(time.monotonic() - began, peak)


def _wait(process: "subprocess.Popen[bytes]", progress: "_Progress") -> tuple[int, int]:
    peak, own, began = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    while True:
        peak = max(peak, _peak_of(process.pid))
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            unit = 1 if sys.platform == "darwin" else 1024
            exact = usage.ru_maxrss > own or not peak
            return process.returncode, usage.ru_maxrss * unit if exact else peak
        progress.show()
        time.sleep(0.2 if time.monotonic() > began + 2 else 0.02)  # a short process too is looked at near its end


def _peak_of(pid: int) -> int:
    """Most memory that a process has held so far, in bytes, by Linux's own count; 0: it is not there.

    The count of ``wait4`` is exact at the end, but begins with what the parent had held.
    """
    with suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
        found = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
        return int(found[1]) * 1024 if found else 0
    return 0


def _end(process: "subprocess.Popen[bytes]", *, learns: bool) -> None:
    """End a process; one that learns writes a checkpoint first, after its step, unless this one is stopped again."""
    process.terminate()
    if learns:
        print("waiting for a checkpoint; once more ends at once", file=sys.stderr, flush=True)
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(None if learns else END_SECONDS)
    finally:
        if process.returncode is None:
            process.kill()
            process.wait()


def last_line(log: Path) -> str:
    """The last line of a log with something in it, as a progress bar leaves it."""
    with log.open("rb") as file:
        file.seek(max(log.stat().st_size - TAIL, 0))
        text = file.read().decode("utf-8", errors="replace")
    lines = [" ".join(line.split()) for line in re.split(r"[\r\n]", text)]
    return next((line for line in reversed(lines) if line), "")


class _Progress:
    """The last line of a log, drawn again and again on a terminal, and now and then elsewhere."""

    def __init__(self, caption: str, log: Path) -> None:
        self.caption, self.log = caption, log
        self.drawn = sys.stderr.isatty()
        self.next = time.monotonic() + (1.0 if self.drawn else LINE_SECONDS)
        self.last = ""

    def show(self) -> None:
        if time.monotonic() < self.next:
            return
        self.next = time.monotonic() + (1.0 if self.drawn else LINE_SECONDS)
        line = last_line(self.log)
        if line == self.last:
            return
        self.last = line
        width = os.get_terminal_size(sys.stderr.fileno()).columns - 1 if self.drawn else None
        end = "\033[K\r" if self.drawn else "\n"
        print(f"  {self.caption}: {line}"[:width], end=end, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.drawn and self.last:
            print("\033[K", end="", file=sys.stderr, flush=True)
