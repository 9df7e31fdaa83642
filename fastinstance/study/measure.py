"""What a network finds in one subject: metrics, counts by size, and the curve over thresholds.

Instances are those of the slices, as the networks see slices: annotated ids or the components of the truth, and the
8-connected components of the prediction. All slices of a subject count together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..functional import label
from ..matching import Matches, match_instances
from ..metrics import METRICS, VOLUME_EDGES, least_pixels, plane_metrics, volume_sums, voxel_volume
from .subjects import Subject

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


def _through(labels: Tensor, counts: Tensor) -> Tensor:
    """Ids [Z, Y, X] that begin at 1 in every slice, numbered on from slice to slice."""
    before = (counts.cumsum(0) - counts)[:, None, None]
    return torch.where(labels > 0, labels + before, 0)


def _true_ids(subject: Subject, min_size: int) -> Tensor:
    ids = subject.labels.long()
    ids = _through(ids, ids.flatten(1).amax(1))
    if min_size > 1:
        ids = torch.where(torch.bincount(ids.flatten())[ids] < min_size, 0, ids)
    return ids


def binary(subject: Subject, probability: Tensor, threshold: float) -> Tensor:
    """The prediction [Z, Y, X] bool, nowhere outside of what is annotated."""
    mask = probability >= threshold
    return mask if subject.valid is None else mask & subject.valid


def _match(truth: Tensor, mask: Tensor, min_size: int) -> Matches:
    """Tables of one subject; `truth` and `mask` are [Z, Y, X]."""
    found, counts = label(mask[:, None], min_size=min_size)
    ids = _through(found[:, 0].long(), counts[:, 0].long())
    # One plane whose instances never touch those of another slice: what is asked for are ids, not components.
    t, q = truth[None, None], ids[None, None]
    return match_instances(q > 0, t > 0, pred_labels=q, target_labels=t)


def measure(subject: Subject, mask: Tensor, *, min_size: int = 0) -> Measured:
    """Metrics and counts of a binary prediction [Z, Y, X]; instances with fewer pixels than `min_size` do not count."""
    voxel_ml = voxel_ml_of(subject)
    matches = _match(_true_ids(subject, min_size), mask, min_size)
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
    truth = _true_ids(subject, min_size)
    least = least_pixels(small_ml, voxel_ml_of(subject))
    rows: list[list[int]] = []
    values: list[float] = []
    for threshold in thresholds:
        matches = _match(truth, binary(subject, probability, threshold), min_size)
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

