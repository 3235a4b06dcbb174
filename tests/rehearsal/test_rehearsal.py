"""What runs on a GPU, run without one: on the device of device.cpp, in a process for each of three parts of the cases.

For a process has that device for good: it would be the accelerator that torch finds in every other test.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from compiling import compiler

HERE = Path(__file__).parent
PARTS = [["cases_device.py", "cases_fit.py"], ["cases_gpu.py", "cases_verbs.py"], ["cases_ranks.py"]]


def test_no_case_is_left_out() -> None:
    assert sorted(path.name for path in HERE.glob("cases_*.py")) == sorted(file for part in PARTS for file in part)


@pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler, such as apt-get install g++")
@pytest.mark.parametrize("files", PARTS, ids="-".join)
def test_on_a_device(files: list[str], tmp_path: Path) -> None:
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    words += [*(str(HERE / file) for file in files), "--basetemp", str(tmp_path / "cases")]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(words, env=kept | {"LEAP_PL_COMPILE": "0"}, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-12000:] + done.stderr[-2000:]
