"""`python -m bench gpu`: steps of the losses on a GPU beside MONAI's GDF, eager and as CUDA graphs, by kernels."""

from __future__ import annotations

from functools import partial

import torch

from .case import Case, Goal, Setting
from .scenes import PAPER, Scene, balls, noise, specks, spread
from .steps import loss_case

__all__ = ["cases"]


def _spread(shape: tuple[int, ...], number: int, seed: int) -> Scene:
    return spread(shape, number, 0.03, seed=seed)


def cases(setting: Setting) -> list[Case]:
    """The paper's mini-batch in two types, noise, volumes, ten to ten thousand instances, and a dense plane."""
    small = setting.small
    shape = (2, 32, 32) if small else PAPER
    volume = (1, 12, 16, 16) if small else (2, 128, 128, 128)
    numbers = (2, 4, 8, 16) if small else (10, 100, 1000, 10000)

    def paper(seed: int) -> Scene:
        return balls(shape, *((3, 4) if small else (15, 20)), (2, 3 if small else 7), seed=seed)

    def many(number: int) -> str:
        return f"48×256², {number} + {number} in the batch, 3 % foreground"

    eager = Goal("all terms ÷ MONAI's GDF", "ours", 1.0, over="MONAI GDF")
    growth = Goal(f"time of {numbers[-1]} instances ÷ that of {numbers[0]}", "ours, graph", 1.3, of=many(numbers[0]))
    make = partial(loss_case, forward=True, details=True)
    return [
        make("48×256², 15 + 20 instances", paper, goals=(eager,)),
        make("48×256², 15 + 20 instances, bfloat16", paper, dtype=torch.bfloat16),
        make("48×256², noise, 3,000 specks a plane", lambda seed: noise(paper(seed), shift=-1.55, seed=seed)),
        make(
            "2×128³, 100 + 100 instances",
            lambda seed: balls(volume, *((2, 2) if small else (100, 100)), (2, 7), seed=seed),
        ),
        *(
            make(many(number), partial(_spread, shape, number), goals=(growth,) if number == numbers[-1] else ())
            for number in numbers
        ),
        make("1024², 65,536 + 65,536 pixels", lambda seed: specks(32 if small else 1024, seed=seed)),
    ]
