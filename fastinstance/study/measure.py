"""What a network finds in one subject: metrics, counts by size, and the curve over thresholds.

Instances are those of the slices, as in `evaluation`; all slices of a subject count together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastinstance.metrics import METRICS, VOLUME_EDGES, least_pixels, plane_metrics, volume_sums, voxel_volume
from fastinstance.study.evaluation import slice_matches
from fastinstance.study.subjects import Subject

__all__ = ["CURVE", "THRESHOLDS", "Measured", "binary", "curve_of", "measure", "voxel_ml_of"]

THRESHOLDS = (0.02, *(step / 20 for step in range(1, 20)), 0.98)
"""Of the curve, and of the choice on the validation subjects; 0.5 is among them."""
CURVE = ("small", "found_small", "found", "n_pred", "hit")
"""What the curve counts: true instances below a volume, those found, all found; predicted instances, those that hit."""


@dataclass(frozen=True)
class Measured:
    """One binary prediction of one subject."""

    metrics: dict[str, float]
    """By name, as `fastinstance.metrics.METRICS`."""
    by_size: NDArray[np.float64]
    """[groups, 5]: the sums `metrics.VOLUME_SUMS` in the groups between `VOLUME_EDGES`."""


def voxel_ml_of(subject: Subject) -> float:
    return voxel_volume(subject.spacing, 3)


def binary(subject: Subject, probability: Tensor, threshold: float) -> Tensor:
    """The prediction [Z, Y, X] bool, nowhere outside of what is annotated."""
    mask = probability >= threshold
    return mask if subject.valid is None else mask & subject.valid


def measure(subject: Subject, mask: Tensor, *, min_size: int = 0) -> Measured:
    """Metrics and counts of a binary prediction [Z, Y, X]; instances with fewer pixels than `min_size` do not count."""
    voxel_ml = voxel_ml_of(subject)
    matches = slice_matches(subject, mask, min_size=min_size)
    values = plane_metrics(matches, voxel_ml=voxel_ml)
    sums = volume_sums(matches, VOLUME_EDGES, voxel_ml)[0, 0]
    return Measured({name: float(values[name]) for name in METRICS}, sums.numpy())


def curve_of(
    subject: Subject,
    probability: Tensor,
    *,
    small_ml: float,
    min_size: int = 0,
    thresholds: Sequence[float] = THRESHOLDS,
    metric: str | None = None,
) -> tuple[NDArray[np.int64], list[float]]:
    """Counts at each threshold, [thresholds, 5] as `CURVE`, and there the value of `metric` if one is asked for."""
    least = least_pixels(small_ml, voxel_ml_of(subject))
    rows: list[list[int]] = []
    values: list[float] = []
    for threshold in thresholds:
        matches = slice_matches(subject, probability >= threshold, min_size=min_size)
        target, pred = matches.target, matches.pred
        small = (target.pixels > 0) & (target.pixels < least)
        counts: tuple[Any, ...] = (
            small.sum(),
            (small & target.matched).sum(),
            target.matched.sum(),
            (pred.pixels > 0).sum(),
            pred.matched.sum(),
        )
        rows.append([int(count) for count in counts])
        if metric is not None:
            values.append(float(plane_metrics(matches)[metric]))
    return np.array(rows, np.int64).reshape(-1, len(CURVE)), values
