"""`python -m bench scaling`: time against instances, pixels and planes, one of them changed at a time."""

from __future__ import annotations

import dataclasses
from functools import partial

from .case import Case, Setting
from .scenes import Scene, spread
from .steps import loss_case

__all__ = ["cases"]

FOREGROUND = 0.03


def _scene(shape: tuple[int, ...], instances: int, seed: int) -> Scene:
    return spread(shape, instances, FOREGROUND, seed=seed)


def cases(setting: Setting) -> list[Case]:
    """Three series; the facts of a case say to which it belongs, and its place there."""
    small = setting.small
    planes, side = (2, 32) if small else (16, 256)
    instances = (2, 4) if small else (16, 64, 256, 1024, 4096, 16384)
    sides = (16, 32) if small else (64, 128, 256, 512, 1024, 2048)
    batches = (1, 2) if small else (1, 2, 4, 8, 16, 32, 64, 128)
    series = {
        "instances": [((planes, side, side), number) for number in instances],
        "pixels": [((1, size, size), 2 if small else 16) for size in sides],
        "planes": [((number, side, side), (2 if small else 20) * number) for number in batches],
    }
    return [
        dataclasses.replace(
            loss_case(f"{name}: {shape[0]}×{shape[1]}², {number} + {number}", partial(_scene, shape, number)),
            notes={"series": name},
        )
        for name, points in series.items()
        for shape, number in points
    ]
