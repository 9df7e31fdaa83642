"""What the losses are compared by: the sensitivity for small instances at equal precision, and the usual metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastinstance.study.measure import THRESHOLDS
from fastinstance.study.results import Results, mean_by_subject, numbers
from fastinstance.study.statistics import Interval, bootstrap_mean, holm, wilcoxon_signed_rank

__all__ = ["OUTCOMES", "Comparison", "collapses", "compare", "mean_curves", "outcome", "precision_position", "ratio"]

Values = NDArray[np.float64]
Subjects = dict[tuple[str, str], float]  # by person and subject
_HALF = THRESHOLDS.index(0.5)

OUTCOMES = {
    "small_at_precision": "sensitivity for small instances at the precision of the baseline",
    "small": "sensitivity for small instances at threshold 0.5",
    "f1": "F1 at the tuned threshold",
    "pq": "PQ at the tuned threshold",
    "dsc": "DSC at the tuned threshold",
    "vol_diff_ml": "absolute volume difference in mL at the tuned threshold",
}
"""The first is the primary outcome; of the last less is better."""


def ratio(numerator: Any, denominator: Any, otherwise: float = np.nan) -> Values:
    """`otherwise` where the denominator is 0."""
    top, bottom = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    return np.divide(top, bottom, out=np.full(np.broadcast(top, bottom).shape, otherwise), where=bottom > 0)


def _small_sensitivity(cell: Mapping[str, Any]) -> Values:
    """[subjects, thresholds]; NaN for a subject without small instances."""
    curve = cell["curve"]
    return ratio(curve["found_small"], np.array(curve["small"])[:, None])


def _precision(cell: Mapping[str, Any]) -> Values:
    """[thresholds], the mean over the subjects; 0 where nothing is predicted, as in the tables."""
    return ratio(cell["curve"]["hit"], cell["curve"]["n_pred"], 0.0).mean(0)


def mean_curves(cell: Mapping[str, Any]) -> tuple[Values, Values]:
    """Sensitivity for small instances and precision by threshold, means over the subjects of a cell."""
    small = _small_sensitivity(cell)
    there = ~np.isnan(small[:, 0])
    return (small[there].mean(0) if there.any() else np.full(small.shape[1], np.nan)), _precision(cell)


def precision_position(precision: Values, wanted: float, start: int = _HALF) -> float | None:
    """Where on a curve over rising thresholds the precision is `wanted`, as a fraction of an index.

    The way there begins at `start` (the threshold 0.5): up as long as the precision is lower, down as long as it is
    not. What lies beyond is not looked at: at very low thresholds "everything is a lesion" has a high precision again.

    Returns:
        None if no threshold above `start` is as precise.
    """
    index = start
    if precision[index] < wanted:
        reached = np.flatnonzero(precision[start:] >= wanted)
        if len(reached) == 0:
            return None
        index = start + int(reached[0])
    while index > 0 and precision[index - 1] >= wanted:
        index -= 1
    if index == 0 or precision[index] == precision[index - 1]:
        return float(index)
    return index - float((precision[index] - wanted) / (precision[index] - precision[index - 1]))


def _at(curves: Values, position: float) -> Values:
    """[subjects] at a fraction of an index of [subjects, thresholds]."""
    low = int(np.floor(position))
    share = position - low
    return curves[:, low] if share == 0 else (1 - share) * curves[:, low] + share * curves[:, low + 1]


def _matched(results: Results, data: str, loss: str) -> tuple[list[tuple[Mapping[str, Any], Values]], int]:
    """Small sensitivity of each subject at the precision of the baseline's cell of the same seed and fold.

    Cells without a baseline, or whose baseline hits nothing, are left out for every loss; who never gets that precise
    finds nothing there.
    """
    baselines = {tuple(cell["cell"][2:]): cell for cell in results.of(data, results.baseline)}
    rows: list[tuple[Mapping[str, Any], Values]] = []
    unreached = 0
    for cell in results.of(data, loss):
        baseline = baselines.get(tuple(cell["cell"][2:]))
        if baseline is None or (wanted := float(_precision(baseline)[_HALF])) == 0:
            continue
        position = precision_position(_precision(cell), wanted)
        small = _small_sensitivity(cell)
        unreached += position is None
        rows.append((cell, np.where(np.isnan(small[:, 0]), np.nan, 0.0) if position is None else _at(small, position)))
    return rows, unreached


def _rows(results: Results, data: str, loss: str, name: str) -> list[tuple[Mapping[str, Any], Values]]:
    """Each cell with its subjects' values of an outcome."""
    if name == "small_at_precision":
        return _matched(results, data, loss)[0]
    if name == "small":
        return [(cell, _small_sensitivity(cell)[:, _HALF]) for cell in results.of(data, loss)]
    rows = [(cell, numbers(cell["at"]["tuned"]["metrics"][name])) for cell in results.of(data, loss)]
    return [(cell, np.abs(values)) for cell, values in rows] if name == "vol_diff_ml" else rows


def outcome(results: Results, data: str, loss: str, name: str) -> Subjects:
    """Mean over the seeds of an outcome, for each person and subject."""
    return mean_by_subject(_rows(results, data, loss, name))


@dataclass(frozen=True)
class Comparison:
    """A loss against the baseline in one outcome."""

    data: str
    loss: str
    outcome: str
    value: Interval
    """Of the loss."""
    difference: Interval
    """To the baseline, paired by subject."""
    p: float
    """Of the differences of the persons; adjusted by Holm over the losses of this data set and outcome."""
    by_seed: tuple[float, ...]
    """The mean difference of each seed: what another training alone changes."""
    unreached: int
    """Cells that are nowhere as precise as the baseline, and so count as 0 (primary outcome alone)."""


def _interval(values: Subjects) -> Interval:
    return bootstrap_mean(list(values.values()), [person for person, _ in values])


def _by_seed(ours: Sequence[Any], theirs: Sequence[Any]) -> tuple[float, ...]:
    """Mean difference over the subjects that both have, seed by seed."""
    means: list[float] = []
    for seed in sorted({cell["cell"][2] for cell, _ in ours}):
        mine, other = (mean_by_subject([row for row in rows if row[0]["cell"][2] == seed]) for rows in (ours, theirs))
        shared = np.array([mine[key] - other[key] for key in mine if key in other])
        shared = shared[~np.isnan(shared)]
        if len(shared):
            means.append(float(shared.mean()))
    return tuple(means)


def _paired(ours: Sequence[Any], theirs: Sequence[Any]) -> Subjects:
    """Differences of the subjects, means over the seeds that both have."""
    known = {tuple(cell["cell"][2:]): values for cell, values in theirs}
    both = [(cell, values - known[key]) for cell, values in ours if (key := tuple(cell["cell"][2:])) in known]
    return mean_by_subject(both)


def compare(results: Results, data: str, name: str) -> list[Comparison]:
    """Every other loss against the baseline."""
    theirs = _rows(results, data, results.baseline, name)
    found: list[Comparison] = []
    for loss in results.losses:
        ours = _rows(results, data, loss, name)
        if loss == results.baseline or not ours:
            continue
        differences = _paired(ours, theirs)
        p = wilcoxon_signed_rank(list(differences.values()), [person for person, _ in differences])
        unreached = _matched(results, data, loss)[1] if name == "small_at_precision" else 0
        value = _interval(mean_by_subject(ours))
        found.append(Comparison(data, loss, name, value, _interval(differences), p, _by_seed(ours, theirs), unreached))
    adjusted = holm([one.p for one in found])
    return [Comparison(**{**vars(one), "p": p}) for one, p in zip(found, adjusted, strict=True)]


def collapses(results: Results, data: str, loss: str) -> tuple[int, int]:
    """Cells whose mean Dice coefficient is below the plan's limit, and all cells, of a loss."""
    means = [np.nanmean(numbers(cell["at"]["fixed"]["metrics"]["dsc"])) for cell in results.of(data, loss)]
    return sum(bool(mean < results.collapse[data]) for mean in means), len(means)
