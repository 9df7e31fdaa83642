"""`python -m bench metrics`: instance-level metrics of lesion masks, beside panoptica and the loop reference.

panoptica's pins (numpy < 2.3) differ from ours; `--peer panoptica=PYTHON` names the interpreter of an environment that
has it (`python -m venv E && E/bin/pip install panoptica`). Times are of a pair, the mean over all of them.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import fastinstance as fi
from fastinstance import reference

from .case import Case, Goal, Run, Setting, Step
from .scenes import balls

__all__ = ["Pairs", "Peer", "cases", "pairs"]

PEER = Path(__file__).with_name("panoptica_peer.py")
MATCHINGS = {"iou > 0.5": ("iou", 0.5), "overlap": ("dice", 0.0)}  # panoptica: any overlap, the greatest Dice first


class Pairs(NamedTuple):
    """What is evaluated."""

    masks: Tensor  # [pairs, 2, *S] uint8, prediction and target


@functools.cache
def pairs(number: int, shape: tuple[int, ...], lesions: int) -> Pairs:
    """Four in five lesions are found, the rest of them false."""
    masks = []
    for seed in range(number):
        scene = balls((1, *shape), lesions, lesions, (1.5, 5), seed=seed)
        masks.append(torch.stack([scene.logits[0, 0] >= 0, scene.target[0, 0] > 0]))
    return Pairs(torch.stack(masks).byte())


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


def _evaluate(function: Any, pair: Tensor, matching: str, threshold: float) -> dict[str, float]:
    found = function(pair[:1, None], pair[1:, None], matching=matching, threshold=threshold)
    return {name: value.item() for name, value in found.items()}


def _check(found: Mapping[str, float], expected: Mapping[str, float], whose: str) -> None:
    for name, value in expected.items():
        if not abs(found[name] - value) <= 1e-9 * max(1, abs(value)):
            raise AssertionError(f"wrong: {name} is {found[name]!r}, but {value!r} by {whose}")


def _step(function: Any, inputs: Pairs, how: tuple[str, float]) -> Step:
    return lambda: [_evaluate(function, pair, *how) for pair in inputs.masks]


def _panoptica(python: str, inputs: Pairs, how: tuple[str, float]) -> Step:
    """Its metrics have to be ours."""
    ours = _step(fi.instance_metrics, inputs, how)()
    context = Peer.on(python, inputs.masks.cpu())  # ends with the step
    peer = context.__enter__()

    def step(_: object = context) -> None:
        for index, found in enumerate(ours):
            _check(found, peer(index, *how)[1], "panoptica")

    return step


def cases(setting: Setting) -> list[Case]:
    """One case a matching."""
    number, shape, lesions = (3, (48, 48, 12), 5) if setting.small else (60, (256, 256, 35), 50)

    def case(name: str, how: tuple[str, float]) -> Case:
        def gate(inputs: Pairs, device: str) -> None:
            pair = inputs.masks[0]
            found = _evaluate(fi.instance_metrics, pair, *how)
            _check(found, _evaluate(reference.instance_metrics, pair.cpu(), *how), "the loop reference")

        peers = {"loop reference": Run(lambda inputs: _step(reference.instance_metrics, inputs, how), slow=True)}
        if python := setting.peers.get("panoptica"):
            peers["panoptica"] = Run(lambda inputs: _panoptica(python, inputs, how), slow=True, elsewhere=True)
        return Case(
            name,
            lambda _: pairs(number, shape, lesions),
            {"ours": Run(lambda inputs: _step(fi.instance_metrics, inputs, how))},
            gate,
            lambda inputs: {"pixels": inputs.masks[0, 0].numel(), "planes": len(inputs.masks)},
            peers,
            base="ours",
            each=True,
            sets=1,
            goals=(
                Goal("panoptica ÷ ours", "panoptica", 10, over="ours", least=True),
                Goal("loop reference ÷ ours", "loop reference", 100, over="ours", least=True),
                Goal("memory, volumes of a byte a voxel", "ours", 3, memory=True),
            ),
        )

    size = "×".join(map(str, shape))
    return [case(f"{size}, {lesions} lesions, {name}", how) for name, how in MATCHINGS.items()]
