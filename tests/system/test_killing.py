"""A short form of ``python tests/killing.py``: killed at random moments, nothing is lost."""

import json
import subprocess
import sys
from pathlib import Path


def test_nothing_is_lost_when_processes_are_killed() -> None:
    """In a process of its own, since one with running threads cannot be forked safely."""
    command = [sys.executable, str(Path(__file__).parents[1] / "killing.py"), "--faults", "20"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["lost"] == 0, done.stderr[-8000:]
    assert told["faults"] == 20
    assert told["struck"] >= 10  # the others ended before it came
