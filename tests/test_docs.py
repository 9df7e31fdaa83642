"""What the documentation shows must run."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def blocks(page: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


def start(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """A Python program that has ended."""
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=600)


def run(*command: str | Path) -> str:
    """What a Python program prints that does not fail."""
    done = start(*command)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_torchrun_example(tmp_path: Path) -> None:
    (code,) = blocks("distributed.md")
    script = tmp_path / "train.py"
    script.write_text(code)
    done = start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script)
    assert re.fullmatch(r"loss \d\.\d{4}\n", done.stdout), done.stderr
    # After its last line a process can still be aborted by a thread of Gloo (pytorch/pytorch#190489).
    assert done.returncode == 0 or "terminate called without an active exception" in done.stderr, done.stderr


@pytest.mark.parametrize(("block", "needs"), [(0, "ignite"), (2, "lightning")])
def test_the_integrations(block: int, needs: str, tmp_path: Path) -> None:
    if find_spec(needs) is None:
        pytest.skip(f"needs {needs}")
    script = tmp_path / "train.py"
    script.write_text(blocks("integrations.md")[block])
    run(script)


def test_the_run_and_the_plan_of_the_study_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("monai")
    from fastinstance.study.config import RunConfig
    from fastinstance.study.plan import read_plan

    data, run_file, plan = blocks("study.md", "toml")
    assert tomllib.loads(data)["data"]["source"] == "brain"
    shown = tomllib.loads(run_file)
    assert RunConfig.from_table(shown).to_table()["training"] == shown["training"], "every key is shown"
    for number in range(3):
        for kind in ("image", "mask"):
            (tmp_path / "scans" / f"{number}").mkdir(parents=True, exist_ok=True)
            (tmp_path / "scans" / f"{number}" / f"{kind}.nii.gz").touch()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.toml").write_text(plan)
    assert len(list(read_plan(tmp_path / "plan.toml").cells())) == 1 * 2 * 3 * 2


def test_the_findings_are_those_of_the_results(tmp_path: Path) -> None:
    pytest.importorskip("monai")
    from fastinstance.__main__ import main

    folder = ROOT / "docs" / "study"
    tables = ["study", "table", folder / "plan.toml", "--results", folder / "results.json", "--to", tmp_path]
    assert main([str(one) for one in tables]) == 0
    printed = (tmp_path / "tables.md").read_text()
    differences = printed[printed.index("**Table 5A") : printed.index("**Table 5B")]
    found = (ROOT / "docs" / "study.md").read_text().split("## What was found")[1]
    rows = re.findall(r"^\| (?!loss|---)(.*) \|$", found, re.MULTILINE)
    assert len(rows) == 9
    for row in rows:
        (computed,) = re.findall(rf"^\| ({re.escape(row.split(' | ')[0])} \|.*) \|$", differences, re.MULTILINE)
        shown = [re.sub(r", p .*", "", cell) for cell in computed.split(" | ")[:6]]
        assert row.split(" | ") == shown
