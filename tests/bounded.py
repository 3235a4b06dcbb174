"""Calls in a process of their own, to measure the memory that each takes and to end what never ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

SECONDS = 240  # of a loaded machine, and for all calls together; what hangs never ends

_PREAMBLE = """
import json, resource, sys, warnings
warnings.simplefilter("ignore")
from leap_pl.errors import UserError
def told(call):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        message = "no error: " + repr(call())[:200]
    except UserError as error:
        message = str(error)
    except BaseException as error:
        message = "TRACEBACK " + repr(error)[:300]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    print(json.dumps([message, grown]), flush=True)
"""


def measured(code: str, *arguments: object) -> list[tuple[str, int]]:
    """For each ``told(call)`` in ``code``: what the call was refused with, and MiB that it made the process grow by."""
    root = Path(__file__).parent.parent
    process = subprocess.run(
        [sys.executable, "-c", _PREAMBLE + code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}"},
        stdout=subprocess.PIPE,
        timeout=SECONDS,
        text=True,
        check=True,
    )
    return [tuple(json.loads(line)) for line in process.stdout.splitlines() if line.startswith("[")]
