"""The notebooks run from top to bottom, and each .ipynb is its script, executed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "notebooks").glob("[0-9]*.py"))
NAMES = [script.stem for script in SCRIPTS]


def _cells_of_script(path: Path) -> list[tuple[str, str]]:
    """Kind and text of the cells of a percent script."""
    cells: list[tuple[str, list[str]]] = []
    for line in path.read_text().splitlines():
        if line.startswith("# %%"):
            cells.append(("markdown" if "[markdown]" in line else "code", []))
        elif cells:
            kind, lines = cells[-1]
            lines.append(line.removeprefix("#").removeprefix(" ") if kind == "markdown" else line)
    return [(kind, "\n".join(lines).strip()) for kind, lines in cells]


def _cells_of_notebook(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["cells"]


def test_there_are_four() -> None:
    assert NAMES == ["01_instances", "02_profile", "03_train_lesions", "04_property_checks"]


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_the_script_runs(script: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    environment = {
        **os.environ,
        "MPLBACKEND": "Agg",
        "FASTINSTANCE_NOTEBOOKS": "tiny",
        "PYTHONWARNINGS": "ignore:Warning:UserWarning",  # "Warning: Profiler clears events", of torch 2.11
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]),
    }
    run = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "Warning" not in run.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_the_notebook_is_the_script_executed(script: Path) -> None:
    path = script.with_suffix(".ipynb")
    cells = _cells_of_notebook(path)
    found = [(cell["cell_type"], "".join(cell["source"]).strip()) for cell in cells]
    assert found == _cells_of_script(script), "run make notebooks"
    assert path.stat().st_size < 2e6

    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "/home/" not in json.dumps(outputs)
