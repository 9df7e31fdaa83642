"""Times in one process, the competitors taken in turn so that a drifting machine hits all of them alike."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .case import Step

__all__ = ["CLOCKS", "Time", "copy_bandwidth", "elapsed", "graphed", "keep_no_memory", "peak_bytes", "rounds"]


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Time(NamedTuple):
    """Milliseconds: median and quartiles."""

    median: float
    low: float
    high: float
    samples: int


def _summary(values: list[float]) -> Time:
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return Time(statistics.median(values), quartiles[0], quartiles[-1], len(values))


def rounds(
    runs: dict[str, list[Step]],
    *,
    device: str,
    repeats: int,
    seconds: float = 60,
    warmup: int = 3,
    clock: str = "wall",
) -> dict[str, Time]:
    """Time of a step: a sample takes all steps of a run, one after the other, from an idle device.

    Rounds over all runs end after `repeats`, or once `seconds` have gone, but not before the fifth. Those to warm up
    take at most a quarter of that, but one is done.
    """
    start = time.monotonic()
    for done in range(warmup):
        if done and time.monotonic() > start + seconds / 4:
            break
        for steps in runs.values():
            for step in steps:
                step()
    samples: dict[str, list[float]] = {name: [] for name in runs}
    end = time.monotonic() + seconds
    for done in range(repeats):
        if done >= 5 and time.monotonic() > end:
            break
        for name, steps in runs.items():
            samples[name].append(elapsed(steps, device, clock) / len(steps))
    return {name: _summary(values) for name, values in samples.items()}


def elapsed(steps: list[Step], device: str, clock: str = "wall") -> float:
    """Milliseconds by CUDA events, or on the CPU by one of `CLOCKS`."""
    if device == "cpu":
        now = CLOCKS[clock]
        start = now()
        for step in steps:
            step()
        return 1e3 * (now() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for step in steps:
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def graphed(run: Callable[[], Any], pool: Any = None) -> Callable[[], Any]:
    """The run as a CUDA graph: what is left is the device's work. A replay returns what the run returned.

    Graphs that share a `pool` of memory must be replayed in the order of their capture, and read before the next.
    """
    current = torch.cuda.current_stream()
    side = torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        run()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool):
            result = run()
    finally:
        torch.cuda.set_stream(current)  # a capture that fails leaves its own behind

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def copy_bandwidth(device: str, clock: str = "wall") -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.ones(1 << (28 if device == "cuda" else 26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    time = rounds({"copy": [lambda: target.copy_(source)]}, device=device, repeats=9, clock=clock)["copy"]
    return 2e3 * source.numel() / time.median


def peak_bytes(step: Step, device: str) -> int:
    """Bytes in use at the peak of a step, beside its inputs and what it returns.

    On the CPU those of the process, on Linux; exact where it does `keep_no_memory`.
    """
    step()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - _held(result)
    # The kernel's counters lag behind by some pages a thread, so the largest of a few is taken.
    return max(_growth(step) for _ in range(3))


def _held(result: Any) -> int:
    """Bytes of what a step returns."""
    tensors = result if isinstance(result, tuple | list) else ()
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))


def _growth(step: Step) -> int:
    """Growth of the process's peak memory in a step, beside what it returns."""
    ctypes.CDLL(None).malloc_trim(0)  # what is free already would not be counted again
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # start the peak anew
    before = _status("VmRSS")
    result = step()
    return _status("VmHWM") - before - _held(result)


def keep_no_memory() -> None:
    """Have glibc give every large block back when it is freed, so that the process's memory is what is in use."""
    threshold = -3  # M_MMAP_THRESHOLD
    ctypes.CDLL(None).mallopt(threshold, 1 << 16)


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(key))
    return int(line.split()[1]) * 1024
