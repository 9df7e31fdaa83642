"""Times in one process, the competitors taken in turn so that a drifting machine hits all of them alike."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

__all__ = ["Time", "copy_bandwidth", "graphed", "machine", "peak_bytes", "times"]


class Time(NamedTuple):
    """Milliseconds: median and quartiles."""

    median: float
    low: float
    high: float


def times(runs: dict[str, Callable[[], object]], *, repeats: int, warmup: int = 5) -> dict[str, Time]:
    """Wall time of each run until the device is done, in rounds over all of them."""
    for _ in range(warmup):
        for run in runs.values():
            run()
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            _wait()
            start = time.perf_counter()
            run()
            _wait()
            samples[name].append(1e3 * (time.perf_counter() - start))
    result = {}
    for name, values in samples.items():
        quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        result[name] = Time(statistics.median(values), quartiles[0], quartiles[-1])
    return result


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """The run as a CUDA graph: what is left is the device's work."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.ones(1 << (28 if device == "cuda" else 26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    time = times({"copy": lambda: target.copy_(source)}, repeats=9)["copy"]
    return 2e3 * source.numel() / time.median


def peak_bytes(prepare: Callable[[], Callable[[], object]]) -> int:
    """Growth of the process's peak memory during a run, `prepare` having made its inputs; Linux."""
    run = prepare()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # start the peak anew
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(key))
    return int(line.split()[1]) * 1024


def machine() -> dict[str, str | int]:
    """What the figures were measured on."""
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), model)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "processor": model,
        "threads": torch.get_num_threads(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "commit": commit,
    }
