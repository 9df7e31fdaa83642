"""`python -m bench metrics`: instance-level metrics of lesion masks, beside panoptica and the loop reference.

panoptica's pins (numpy < 2.3) differ from ours; `--panoptica PYTHON` names the interpreter of an environment that has
it (`python -m venv E && E/bin/pip install panoptica`). The pairs are evaluated in turns: ours, panoptica, the next one.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastinstance as fi
from fastinstance import reference

from .scenes import balls
from .timing import peak_bytes

__all__ = ["Peer", "pairs", "run", "table"]

PEER = Path(__file__).with_name("panoptica_peer.py")
MATCHINGS = {"iou > 0.5": ("iou", 0.5), "overlap": ("dice", 0.0)}  # panoptica: any overlap, the greatest Dice first
MOST = {"panoptica": 10, "loop": 100, "volumes": 3}


def pairs(number: int, shape: tuple[int, ...], lesions: int) -> Tensor:
    """Predictions and targets, uint8 `[number, 2, *shape]`: four in five lesions found, the rest of them false."""
    masks = []
    for seed in range(number):
        scene = balls((1, *shape), lesions, lesions, (1.5, 5), seed=seed)
        masks.append(torch.stack([scene.logits[0, 0] >= 0, scene.target[0, 0] > 0]))
    return torch.stack(masks).byte()


class Peer:
    """panoptica in another interpreter, which has the pairs in memory."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def __call__(self, pair: int, matching: str, threshold: float) -> tuple[float, dict[str, float]]:
        """Seconds and metrics."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = {"pair": pair, "matching": matching, "threshold": threshold}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("{"):  # it also prints who to cite
                answer = json.loads(line)
                return answer["seconds"], answer["metrics"]
        raise RuntimeError(f"panoptica ended with {self.process.wait()}; its errors are above")

    @classmethod
    @contextmanager
    def on(cls, python: str | Path, masks: Tensor) -> Iterator[Peer]:
        """The peer for these pairs."""
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        with tempfile.TemporaryDirectory() as folder:
            np.save(f"{folder}/pairs.npy", masks.numpy())
            command = [str(python), str(PEER), f"{folder}/pairs.npy"]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
            try:
                yield cls(process)
            finally:
                process.communicate()


def _ours(masks: Tensor, pair: int, matching: str, threshold: float) -> tuple[float, dict[str, float]]:
    pred, target = masks[pair, :1, None], masks[pair, 1:, None]
    start = time.perf_counter()
    found = fi.instance_metrics(pred, target, matching=matching, threshold=threshold)
    metrics = {name: value.item() for name, value in found.items()}
    return time.perf_counter() - start, metrics


def _loop(masks: Tensor, pair: int, matching: str, threshold: float) -> tuple[float, dict[str, float]]:
    pred, target = masks[pair, :1, None], masks[pair, 1:, None]
    start = time.perf_counter()
    found = reference.instance_metrics(pred, target, matching=matching, threshold=threshold)
    return time.perf_counter() - start, {name: value.item() for name, value in found.items()}


def _check(found: dict[str, float], expected: dict[str, float], who: str) -> None:
    """No time for a wrong result."""
    for name, value in expected.items():
        if not abs(found[name] - value) <= 1e-9 * max(1, abs(value)):
            raise AssertionError(f"{name} is {found[name]!r}, but {value!r} by {who}")


def _memory(shape: tuple[int, ...], lesions: int, threads: int) -> float:
    """Peak of an evaluation beside its two masks, in volumes of a byte a voxel."""
    torch.set_num_threads(threads)
    masks = pairs(1, shape, lesions)

    def prepare() -> Any:
        _ours(pairs(1, (32, 32, 8), 3), 0, "overlap", 0.5)  # code is not the volume's memory
        ctypes.CDLL(None).malloc_trim(0)  # nor is what making the masks left free
        return lambda: _ours(masks, 0, "overlap", 0.5)

    return peak_bytes(prepare) / masks[0, 0].numel()


def _memory_elsewhere(shape: tuple[int, ...], lesions: int) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_memory, (shape, lesions, torch.get_num_threads()))


def run(*, repeats: int = 15, small: bool = False, panoptica: str | Path | None = None) -> dict[str, Any]:
    """Measure; the loop reference runs once, on the first pairs only."""
    number, loops, shape, lesions = (3, 1, (48, 48, 12), 5) if small else (60, 3, (256, 256, 35), 50)
    masks = pairs(number, shape, lesions)
    rows = []
    with Peer.on(panoptica, masks) if panoptica else _nobody() as peer:
        for name, (matching, threshold) in MATCHINGS.items():
            rounds: dict[str, list[float]] = {"ours": [], "panoptica": []}
            for turn in range(-1, repeats):  # one round to warm up
                seconds: dict[str, list[float]] = {"ours": [], "panoptica": []}
                for pair in range(number):
                    taken, found = _ours(masks, pair, matching, threshold)
                    seconds["ours"].append(taken)
                    if peer is not None:
                        taken, theirs = peer(pair, matching, threshold)
                        seconds["panoptica"].append(taken)
                        _check(found, theirs, "panoptica")
                for who, each in seconds.items():
                    if turn >= 0 and each:
                        rounds[who].append(1e3 * sum(each) / number)
            slow = []
            for pair in range(loops):
                taken, expected = _loop(masks, pair, matching, threshold)
                slow.append(1e3 * taken)
                _check(_ours(masks, pair, matching, threshold)[1], expected, "the loop reference")
            medians = {who: statistics.median(each) for who, each in rounds.items() if each}
            medians["loop"] = statistics.fmean(slow)
            spread = {who: [min(each), max(each)] for who, each in rounds.items() if each}
            rows.append({"matching": name, "milliseconds": medians, "range": spread})
    return {
        "bench": "metrics",
        "pairs": number,
        "shape": shape,
        "lesions": lesions,
        "rows": rows,
        "peak_volumes": _memory_elsewhere(shape, lesions),
    }


@contextmanager
def _nobody() -> Iterator[None]:
    yield None


def table(result: dict[str, Any]) -> str:
    """Markdown: milliseconds a pair, and ratios with what was asked."""
    shape = "×".join(map(str, result["shape"]))
    lines = [
        f"{result['pairs']} pairs of {shape}, {result['lesions']} lesions each; milliseconds a pair, median of rounds",
        "",
        "| matching | ours | panoptica | × ours | asked | loop | × ours | asked |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        times = row["milliseconds"]
        peer = times.get("panoptica")
        cells = [
            row["matching"],
            f"{times['ours']:.1f}",
            "" if peer is None else f"{peer:.0f}",
            "" if peer is None else f"{peer / times['ours']:.1f}",
            MOST["panoptica"],
            f"{times['loop']:.0f}",
            f"{times['loop'] / times['ours']:.0f}",
            MOST["loop"],
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", f"Peak memory: {result['peak_volumes']:.2f} volumes of a byte a voxel (asked: {MOST['volumes']})"]
    return "\n".join(lines)
