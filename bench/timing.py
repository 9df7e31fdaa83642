"""Times in one process, the competitors taken in turn so that a drifting machine hits all of them alike."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

__all__ = ["Time", "copy_bandwidth", "graphed", "machine", "peak_bytes", "rounds", "times"]


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
    return {name: _summary(values) for name, values in samples.items()}


def _summary(values: list[float]) -> Time:
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return Time(statistics.median(values), quartiles[0], quartiles[-1])


def rounds(
    runs: dict[str, list[Callable[[], object]]], *, repeats: int, seconds: float = 60, warmup: int = 3
) -> dict[str, Time]:
    """Device time of a step: a sample takes all steps of a run, one after the other, from an idle device.

    Rounds over all runs end after `repeats`, or once `seconds` have gone, but not before the fifth.
    """
    for _ in range(warmup):
        for steps in runs.values():
            for step in steps:
                step()
    samples: dict[str, list[float]] = {name: [] for name in runs}
    end = time.monotonic() + seconds
    for done in range(repeats):
        if done >= 5 and time.monotonic() > end:
            break
        for name, steps in runs.items():
            samples[name].append(_elapsed(steps) / len(steps))
    return {name: _summary(values) for name, values in samples.items()}


def _elapsed(steps: list[Callable[[], object]]) -> float:
    """Milliseconds on the device, or of the clock where there is none."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        for step in steps:
            step()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for step in steps:
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def graphed(run: Callable[[], Any]) -> Callable[[], Any]:
    """The run as a CUDA graph: what is left is the device's work. A replay returns what the run returned."""
    current = torch.cuda.current_stream()
    side = torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        run()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            result = run()
    finally:
        torch.cuda.set_stream(current)  # a capture that fails leaves its own behind

    def replay() -> Any:
        graph.replay()
        return result

    return replay


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
    return {
        "processor": model,
        "threads": torch.get_num_threads(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "commit": _commit(),
    }


def _commit() -> str:
    """What the environment says, where there is no repository, or git's."""
    if "COMMIT" in os.environ or shutil.which("git") is None:
        return os.environ.get("COMMIT", "")
    git = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
