"""`python -m bench cpu`: all seven terms, forward and backward, beside MONAI's GDF and the loop reference."""

from __future__ import annotations

from .case import Case, Goal, Setting
from .scenes import PAPER, balls, noise
from .steps import loss_case

__all__ = ["cases"]


def _ratio(bound: float, run: str = "ours") -> Goal:
    text = "all terms" if run == "ours" else "all terms, labels given"
    return Goal(f"{text} ÷ MONAI's GDF", run, bound, over="MONAI GDF")


def cases(setting: Setting) -> list[Case]:
    """The paper's mini-batch, many instances, noise, and volumes."""
    shape = (2, 32, 32) if setting.small else PAPER
    volume = (1, 12, 16, 16) if setting.small else (2, 128, 128, 128)
    few = "48×256², 10 + 10, 3 % foreground"
    loop = Goal("loop reference ÷ all terms", "loop reference", 100, over="ours", least=True)
    growth = Goal("time of 1000 + 1000 instances a plane ÷ that of 10 + 10", "ours", 1.3, of=few)
    return [
        loss_case(
            "48×256², 15 + 20 instances",
            lambda seed: balls(shape, 15, 20, (2, 7), seed=seed),
            slow_loop=True,
            goals=(_ratio(0.7), _ratio(0.6, "labels given"), loop),
        ),
        loss_case(few, lambda seed: balls(shape, 10, 10, (8, 9), seed=seed)),
        loss_case(
            "48×256², 1000 + 1000, 3 % foreground",
            lambda seed: balls(shape, 1000, 1000, (0.6, 1.0), seed=seed),
            goals=(growth,),
        ),
        loss_case(
            "48×256², noise (half foreground)",
            lambda seed: noise(balls(shape, 15, 20, (2, 7), seed=seed), seed=seed),
            connectivity=4,
            goals=(_ratio(4.0), Goal("memory of all terms, B/px", "ours", 40, memory=True)),
        ),
        loss_case(
            "2×128³, 200 + 200 instances",
            lambda seed: balls(volume, 100, 100, (2, 7), seed=seed),
            goals=(_ratio(1.5),),
        ),
        # MONAI's time falls by half once the allocator keeps blocks of its temporaries' size: both are published.
        loss_case(
            "the first again, allocator warm",
            lambda seed: balls(shape, 15, 20, (2, 7), seed=seed),
            goals=(_ratio(0.7), _ratio(0.6, "labels given")),
        ),
    ]
