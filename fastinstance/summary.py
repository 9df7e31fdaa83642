"""Mean, spread and confidence interval over subjects."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Summary", "check_summary", "summarise"]

_PIECE = 1 << 22  # numbers in one block of resampling weights


class Summary(NamedTuple):
    """Over the subjects whose value is not NaN; NaN where there is none."""

    mean: Tensor
    std: Tensor  # of the sample: divided by n - 1, NaN for one subject
    low: Tensor  # bootstrap percentiles of the mean
    high: Tensor


def check_summary(confidence: float, resamples: int, seed: int) -> None:
    if not isinstance(confidence, int | float) or not 0 < confidence < 1:
        raise ValueError(f"expected confidence strictly between 0 and 1, got {confidence!r}")
    if isinstance(resamples, bool) or not isinstance(resamples, int) or resamples < 1:
        raise ValueError(f"expected resamples to be an integer >= 1, got {resamples!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"expected seed to be an integer from 0 to 2**64 - 1, got {seed!r}")


def summarise(values: Tensor, *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0) -> Summary:
    """Mean, standard deviation and percentile bootstrap interval of `values` `[subjects, ...]`.

    The bootstrap draws whole subjects with replacement, `resamples` times, the same ones for every column.
    """
    subjects, *shape = values.shape
    flat = values.flatten(1).double()
    there = ~flat.isnan()
    flat, count = flat.nan_to_num(), there.sum(0)
    mean = flat.sum(0) / count
    spread = ((flat - mean).square() * there).sum(0)
    std = (spread / (count - 1).clamp(min=0)).sqrt()  # 0 / 0 for one subject
    if subjects == 0:
        nothing = torch.full_like(mean, float("nan")).view(shape)
        return Summary(nothing, nothing, nothing, nothing)
    generator = torch.Generator("cpu").manual_seed(seed)  # the same numbers whatever the device
    means = []
    for start in range(0, resamples, step := max(1, _PIECE // subjects)):
        size = min(step, resamples - start), subjects
        drawn = torch.randint(subjects, size, generator=generator, device="cpu")
        one = torch.ones_like(drawn, dtype=torch.float64)
        weight = torch.zeros_like(one).scatter_add_(1, drawn, one).to(flat.device)
        means.append((weight @ flat) / (weight @ there.double()))
    tail = (1 - confidence) / 2
    low, high = torch.cat(means).nanquantile(flat.new_tensor([tail, 1 - tail]), 0)
    return Summary(*(part.view(shape) for part in (mean, std, low, high)))
