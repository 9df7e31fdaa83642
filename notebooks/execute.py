"""`make notebooks`: runs the percent scripts of this folder and writes the .ipynb beside each.

`python notebooks/execute.py [NAME …]`, without names all of them. Needs the extra `notebooks`.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def execute(script: Path) -> None:
    """Run a script as a notebook from top to bottom; an error stops it and leaves the old file."""
    notebook = jupytext.read(script)
    resources = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=1800, record_timing=False, coalesce_streams=True, resources=resources).execute()
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"  # jupytext draws them at random, and every run would differ
    notebook.metadata.pop("jupytext", None)
    nbformat.write(notebook, script.with_suffix(".ipynb"))


def main(names: list[str]) -> None:
    """Run the named notebooks, or all."""
    root = FOLDER.parent
    os.environ["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    for script in sorted(FOLDER.glob("[0-9]*.py")):
        if not names or script.stem in names:
            start = time.monotonic()
            execute(script)
            print(f"{script.stem}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
