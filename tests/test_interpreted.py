"""Runs the files of `tests/interpreted`, each in a process of its own where Triton interprets its kernels.

Triton decides at its import whether it compiles or interprets, and other tests of this run need the compiler.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path.name for path in ROOT.glob("tests/interpreted/test_*.py"))


@pytest.mark.parametrize("name", FILES)
def test_in_the_interpreter(name: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/interpreted/{name}"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    # A kernel that does not end must not hold up the run.
    run = subprocess.run(command, cwd=ROOT, env=environment, timeout=900, capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    assert re.search(r"\b[1-9]\d* passed", run.stdout), run.stdout


def test_there_is_something_to_run() -> None:
    assert {"test_label.py", "test_losses.py", "test_engine.py", "test_interleaved.py"} <= set(FILES)
