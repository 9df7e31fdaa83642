"""Results files: what a machine measured, suite by suite."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

__all__ = ["FOLDER", "compare", "default_path", "load", "machine", "newest", "save"]

FOLDER = Path(__file__).parent / "results"
ROOT = FOLDER.parent.parent

Result = dict[str, Any]  # {"suites": {name: {"machine": …, "rows": [{"case": …, "milliseconds": …, …}]}}}


def _said(*command: str) -> str:
    """What a command prints, or nothing."""
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT).stdout.strip()


def machine(device: str) -> dict[str, Any]:
    """What the figures are measured on."""
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), model)
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "python": sys.version.split()[0],
    }
    for package in ("torch", "triton", "numpy", "monai", "kornia", "scipy", "connected-components-3d"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device == "cuda":
        found["cuda"] = torch.version.cuda
        found["driver"] = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
    changed = "+" if _said("git", "status", "--porcelain", "--untracked-files=no") else ""
    found["commit"] = os.environ.get("COMMIT") or _said("git", "rev-parse", "--short", "HEAD") + changed
    found["date"] = datetime.date.today().isoformat()
    return found


def default_path(device: str) -> Path:
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return FOLDER / f"{slug}-{datetime.date.today().isoformat()}.json"


def load(path: Path) -> Result:
    """The results in a file.

    Raises:
        ValueError: it is not a results file.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"expected a results file of `python -m bench`, got {path}: {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get("suites"), dict):
        raise ValueError(f'expected a results file of `python -m bench` with "suites", got {path}')
    return found


def save(path: Path, name: str, suite: dict[str, Any]) -> None:
    """Put the results of a suite into a file, in place of earlier ones of this suite."""
    result = load(path) if path.exists() else {"suites": {}}
    result["suites"][name] = suite
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def newest(folder: Path = FOLDER) -> list[Path]:
    """The newest file of each device; GPUs first."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stem[-10:]):
        found[path.stem[:-11]] = path
    return sorted(found.values(), key=lambda path: (path.stem.startswith("cpu-"), path.name))


def _relative(row: dict[str, Any], name: str) -> tuple[float, str]:
    """The median of a run over that of the base in the same rounds, if it is another run; otherwise milliseconds."""
    times, base = row["milliseconds"], row.get("base")
    graph = ", graph" if name.endswith(", graph") else ""
    base = f"{base}{graph}" if f"{base}{graph}" in times else base
    if base in times and base != name and not base.startswith("ours"):
        return times[name]["median"] / times[base]["median"], f"of {base}"
    return times[name]["median"], "ms"


def compare(old: Result, new: Result, *, tolerance: float = 0.15) -> tuple[list[str], list[str]]:
    """What changed between two files of one device, and which of it is a regression.

    Compared are the runs of ours in all cases of the old file: their same-run ratio to the case's peer (milliseconds
    where it has none) and their memory. A regression is larger than the tolerance, or a case or run that is gone.

    Returns:
        lines, regressions: all comparisons as text, and those that are a regression.

    Raises:
        ValueError: the files are of different devices, or have no suite in common.
    """
    shared = [name for name in old["suites"] if name in new["suites"]]
    if not shared:
        raise ValueError(
            f"expected files with a suite in common, got {sorted(old['suites'])} and {sorted(new['suites'])}"
        )
    lines, regressions = [], []

    def add(line: str, worse: bool) -> None:
        lines.append(line)
        if worse:
            regressions.append(line)

    for suite in shared:
        before, after = old["suites"][suite], new["suites"][suite]
        devices = [side["machine"]["device"] for side in (before, after)]
        if devices[0] != devices[1]:
            raise ValueError(f"expected figures of one device, got {suite} of {devices[0]!r} and of {devices[1]!r}")
        rows = {row["case"]: row for row in after["rows"]}
        for row in before["rows"]:
            found = rows.get(row["case"], {"milliseconds": {}, "peak_bytes": {}, "errors": {}})
            for name in row["ours"]:
                where = f"{suite}, {row['case']}, {name}"
                if name not in row["milliseconds"]:
                    continue
                if name not in found["milliseconds"]:
                    add(f"{where}: gone: {found['errors'].get(name, 'not measured')}", True)
                    continue
                (was, unit), (now, other) = _relative(row, name), _relative(found, name)
                if unit != other:  # the peer is missing in one of them
                    was, now = (side["milliseconds"][name]["median"] for side in (row, found))
                    unit = "ms"
                add(f"{where}: {was:.3g} -> {now:.3g} {unit} ({now / was - 1:+.0%})", now > was * (1 + tolerance))
                if name in row["peak_bytes"] and name in found["peak_bytes"]:
                    was, now = (side["peak_bytes"][name] / side["pixels"] for side in (row, found))
                    worse = now > was * (1 + tolerance) + 0.5
                    add(f"{where}: {was:.1f} -> {now:.1f} bytes a pixel", worse)
    return lines, regressions
