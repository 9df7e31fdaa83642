"""What the documentation shows must run."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def blocks(page: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


def run(*command: str | Path, **environment: str) -> str:
    """What a Python program prints."""
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_torchrun_example(tmp_path: Path) -> None:
    (code,) = blocks("distributed.md")
    script = tmp_path / "train.py"
    script.write_text(code)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert re.fullmatch(r"loss \d\.\d{4}\n", run(*launcher, script))


@pytest.mark.parametrize(("block", "needs"), [(0, "ignite"), (2, "lightning")])
def test_the_integrations(block: int, needs: str, tmp_path: Path) -> None:
    if find_spec(needs) is None:
        pytest.skip(f"needs {needs}")
    script = tmp_path / "train.py"
    script.write_text(blocks("integrations.md")[block])
    run(script)
