"""What is measured: a case has inputs, our runs, those of peers, a floor, and goals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["Case", "Goal", "Inputs", "Run", "Setting", "Step", "first", "moved"]

Inputs = Any  # a named tuple of tensors, the first axis of each being the planes
Step = Callable[[], Any]


@dataclass(frozen=True)
class Setting:
    """What cases are made for.

    Args:
        device: "cpu" or "cuda".
        small: tiny inputs, to see that everything runs.
        peers: name -> path of a clone or an interpreter, for implementations that are not installed here.
    """

    device: str = "cpu"
    small: bool = False
    peers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One competitor.

    Args:
        prepare: inputs -> step; what it does is not timed. A package that is missing is recorded, not an error.
        slow: timed once, on as many planes as its time budget allows.
        graph: on a GPU also captured and timed as a CUDA graph.
        repeatable: steps on the same inputs give the same result; it returns tensors.
        elsewhere: another process does the work, so that only wall time means anything.
    """

    prepare: Callable[[Inputs], Step]
    slow: bool = False
    graph: bool = False
    repeatable: bool = True
    elsewhere: bool = False


@dataclass(frozen=True)
class Goal:
    """What the project set itself: a ratio of two medians, or bytes a pixel, at most (or at least).

    Args:
        text: for the table.
        run: whose median or memory it is.
        bound: what was asked.
        over: the run it is divided by, or several that are added; None: the same run.
        of: the case whose run it is divided by; None: the same case.
        least: whether the bound is a lower one.
        memory: bytes a pixel of `run` instead of a ratio.
    """

    text: str
    run: str
    bound: float
    over: str | tuple[str, ...] | None = None
    of: str | None = None
    least: bool = False
    memory: bool = False


@dataclass(frozen=True)
class Case:
    """One row of a results file.

    Args:
        name: unique in its suite.
        inputs: seed -> inputs, on the CPU.
        ours: name -> run of this library.
        peers: name -> run of something else.
        gate: (inputs on the device, device) -> None; raises where a result of ours is wrong, and nothing is timed.
        facts: inputs -> figures of the inputs; "pixels" and "planes" are always there.
        floor: inputs -> bytes that any implementation has to read and write; None where that means nothing.
        base: the run that ratios are to.
        share: the figures are shares of the time beyond the base, not ratios to it.
        each: times are of a plane, the mean over all of them; the planes have nothing to do with each other.
        sets: input sets that a sample goes over on a GPU, so that they are not in its cache.
        notes: figures that others published, by column.
        details: on a GPU also kernels and host synchronisations.
    """

    name: str
    inputs: Callable[[int], Inputs]
    ours: Mapping[str, Run]
    gate: Callable[[Inputs, str], None]
    facts: Callable[[Inputs], dict[str, int]]
    peers: Mapping[str, Run] = field(default_factory=dict)
    floor: Callable[[Inputs], int] | None = None
    base: str | None = None
    share: bool = False
    each: bool = False
    goals: tuple[Goal, ...] = ()
    sets: int = 3
    notes: Mapping[str, str] = field(default_factory=dict)
    details: bool = False


def first(inputs: Inputs, planes: int) -> Inputs:
    """The first planes."""
    return inputs._make(tensor[:planes] for tensor in inputs)


def moved(inputs: Inputs, device: str) -> Inputs:
    return inputs._make(tensor.to(torch.device(device)) for tensor in inputs)
