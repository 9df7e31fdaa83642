"""Measure a suite, whatever it is: gate, warm-up, rounds, slow peers, memory, and on a GPU graphs and kernels."""

from __future__ import annotations

import multiprocessing
import re
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import torch

from . import registry
from .case import Case, Inputs, Run, Setting, Step, first, moved
from .results import machine
from .steps import deviation
from .timing import Time, copy_bandwidth, elapsed, graphed, keep_no_memory, peak_bytes, rounds

__all__ = ["Limits", "run"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """How long things may take.

    Args:
        repeats: samples of each run.
        seconds: of samples of a case, after the fifth.
        slow_seconds: of one step of a slow peer; it gets as many planes as fit.
        case_seconds: of a case with everything.
        deadline: seconds after which no case begins.
        clock: "wall", or "cpu" for the processor time of all threads, on a CPU that others use too.
    """

    repeats: int = 15
    seconds: float = 20
    slow_seconds: float = 20
    case_seconds: float = 300
    deadline: float = 3600
    clock: str = "wall"


class _CaseOver(BaseException):
    """The time of a whole case is over: not an error of the run that happens to be measured."""


@contextmanager
def _limited(seconds: float, error: type[BaseException] = TimeoutError) -> Iterator[None]:
    """Raise an error inside the block after some seconds; blocks nest, the earlier end counts."""

    def stop(*_: object) -> None:
        raise error(f"stopped after {seconds:.0f} s")

    start = time.monotonic()
    before = signal.signal(signal.SIGALRM, stop)
    outer, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    if outer and outer < seconds:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, outer)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
        left = max(outer - (time.monotonic() - start), 1e-3) if outer else 0
        signal.setitimer(signal.ITIMER_REAL, left)


@contextmanager
def _recorded(errors: dict[str, str], name: str) -> Iterator[None]:
    """One thing that fails is a line in the results, and the others are still measured."""
    try:
        yield
    except ImportError as error:
        errors[name] = f"left out: {str(error).splitlines()[0]}"
    except (Exception, _CaseOver) as error:
        if isinstance(error, _CaseOver) and name != "case":
            raise
        kind = "" if isinstance(error, _CaseOver) else f"{type(error).__name__}: "
        errors[name] = f"{kind}{str(error).strip()[:500]}"
    if name in errors:
        print(f"  {name}: {errors[name]}", flush=True)


def _synchronisations(step: Step) -> Counter[str]:
    """Places where a step waits for the device."""
    step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "called a synchronizing" in str(w.message)]
    return Counter(f"{Path(w.filename).name}:{w.lineno}" for w in waits)


def _kernels(steps: list[Step], trace: Path | None) -> list[Row]:
    """What the device does in a step: name, launches a step, µs a step; the longest first."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if trace else [ProfilerActivity.CUDA]
    for _ in range(2):  # the first profile of a process can lack events
        with profile(activities=activities) as profiled:
            for step in steps:
                step()
            torch.cuda.synchronize()
    if trace:
        profiled.export_chrome_trace(str(trace))
    count: Counter[str] = Counter()
    micros: Counter[str] = Counter()
    for event in profiled.events() or []:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            count[event.name] += 1
            micros[event.name] += event.time_range.elapsed_us()
    return [
        {"kernel": name[:160], "launches": count[name] / len(steps), "µs": round(total / len(steps), 3)}
        for name, total in micros.most_common()
    ]


def _replays(steps: list[Step], run: Run, pool: Any) -> list[Step]:
    """The steps as CUDA graphs, which give the same results."""
    replays = [graphed(step, pool) for step in steps]
    for replay, step in zip(replays, steps, strict=True):
        replay()
        if run.repeatable:
            truth = tuple(tensor.cpu() for tensor in step())
            if (error := deviation(replay(), truth)) > 1e-3:
                raise AssertionError(f"wrong: the graph's result differs by {error:.2g}")
    return replays


def _slow(run: Run, inputs: Inputs, device: str, limits: Limits, *, each: bool) -> Row:
    """One step, on as many planes as the time is likely to allow, judged by the first."""
    if run.elsewhere and limits.clock == "cpu":
        raise ValueError("another process does the work, only its wall time can be taken")
    planes = len(inputs[0])
    step = run.prepare(first(inputs, 1))
    with _limited(2 * limits.slow_seconds):
        elapsed([step], device)  # whatever is done once
        start = time.monotonic()
        value = elapsed([step], device, limits.clock)
        fit = min(planes, max(1, int(limits.slow_seconds / (time.monotonic() - start))))
        if fit > 1:
            value = elapsed([run.prepare(first(inputs, fit))], device, limits.clock)
    value /= fit if each else 1
    return {**_rounded(Time(value, value, value, 1)), "planes": fit}


def _rounded(value: Time) -> dict[str, float]:
    return {key: round(part, 5) for key, part in value._asdict().items()}


def measure(case: Case, row: Row, device: str, limits: Limits, trace: Path | None) -> None:
    """Fill the row of a case."""
    errors = row["errors"]
    sets = [moved(case.inputs(seed), device) for seed in range(case.sets if device == "cuda" else 1)]
    row |= case.facts(sets[0])
    if case.floor is not None:
        row["floor_bytes"] = case.floor(sets[0])

    # No time for a wrong result.
    with _recorded(errors, "gate"):
        case.gate(sets[0], device)
    if errors:
        return

    steps: dict[str, list[Step]] = {}
    slow: dict[str, Run] = {}
    for name, competitor in {**case.ours, **case.peers}.items():
        if competitor.slow:
            slow[name] = competitor
            continue
        with _recorded(errors, name):
            found = [competitor.prepare(inputs) for inputs in sets]
            for step in found:
                step()
            steps[name] = found
    pool = torch.cuda.graph_pool_handle() if device == "cuda" else None
    for name in list(steps) if device == "cuda" else ():
        competitor = {**case.ours, **case.peers}[name]
        row["peak_bytes"][name] = peak_bytes(steps[name][0], device)
        with _recorded(errors, f"{name}, kernels"):
            if case.details:
                file = trace / (re.sub(r"\W+", "-", f"{case.name} {name}") + ".json") if trace else None
                row["kernels"][name] = _kernels(steps[name], file)
        if competitor.graph:
            with _recorded(errors, f"{name}, graph"):
                waits = _synchronisations(steps[name][0])
                row["synchronisations"][name] = waits
                if waits:
                    raise RuntimeError(f"not captured, {waits.total()} synchronisations")
                steps[f"{name}, graph"] = _replays(steps[name], competitor, pool)
    measured = rounds(steps, device=device, repeats=limits.repeats, seconds=limits.seconds, clock=limits.clock)
    planes = row["planes"] if case.each else 1
    for name, (*values, samples) in measured.items():
        row["milliseconds"][name] = _rounded(Time(*(value / planes for value in values), samples))
    for name, competitor in slow.items():
        with _recorded(errors, name):
            row["milliseconds"][name] = _slow(competitor, sets[0], device, limits, each=case.each)


def _peaks(suite: str, name: str, setting: Setting, threads: int) -> dict[str, int]:
    """Memory of the runs of a case on the CPU, in a process that only does this."""
    keep_no_memory()
    torch.set_num_threads(threads)
    case = next(case for case in registry.cases(suite, setting) if case.name == name)
    inputs = case.inputs(0)
    found = {}
    for key, competitor in {**case.ours, **case.peers}.items():
        if not competitor.slow:
            with _recorded({}, key):
                found[key] = peak_bytes(competitor.prepare(inputs), "cpu")
    return found


def run(
    suite: str,
    setting: Setting,
    limits: Limits = Limits(),
    *,
    only: str = "",
    memory: bool = True,
    trace: Path | None = None,
    save: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure the cases of a suite whose names have `only` in them.

    Args:
        suite: a name of `registry.SUITES`.
        setting: device, size, peers.
        limits: of time.
        only: part of the names of the cases to take.
        memory: on the CPU also measure memory, in a second process.
        trace: a folder for traces of the profiler, on a GPU.
        save: gets the results so far after each case.
    """
    device = setting.device
    begin = time.monotonic()
    result: dict[str, Any] = {
        "machine": machine(device),
        "small": setting.small,
        "clock": limits.clock,
        "copy_bytes_per_second": copy_bandwidth(device, limits.clock),
        "rows": [],
    }
    spawn = multiprocessing.get_context("spawn")
    worker: Pool | None = spawn.Pool(1) if memory and device == "cpu" else None
    try:
        todo = [case for case in registry.cases(suite, setting) if only in case.name]
        while todo:
            case = todo.pop(0)  # what it made goes with it
            row: Row = {"case": case.name, "ours": list(case.ours), "base": case.base}
            row |= {key: {} for key in ("milliseconds", "peak_bytes", "errors", "kernels", "synchronisations")}
            row |= {
                "share": case.share,
                "each": case.each,
                "notes": dict(case.notes),
                "goals": [vars(goal) for goal in case.goals],
            }
            start = time.monotonic()
            with _recorded(row["errors"], "case"):
                if start - begin > limits.deadline:
                    raise TimeoutError("not run, no time left")
                with _limited(limits.case_seconds, _CaseOver):
                    measure(case, row, device, limits, None if result["rows"] else trace)  # one is enough
                    if worker is not None and row["milliseconds"]:
                        arguments = (suite, case.name, setting, torch.get_num_threads())
                        row["peak_bytes"] = worker.apply(_peaks, arguments)
            if worker is not None and row["errors"].get("case"):  # it may still be at this case
                worker.terminate()
                worker = spawn.Pool(1)
            row["seconds"] = round(time.monotonic() - start, 1)
            result["rows"].append(row)
            medians = {name: round(value["median"], 3) for name, value in row["milliseconds"].items()}
            print(f"{suite}, {case.name}: {row['seconds']} s, {medians}", flush=True)
            save(result)
    finally:
        if worker is not None:
            worker.terminate()
    return result
