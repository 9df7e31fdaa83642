"""Means with intervals and paired tests; the unit is the person, whose images are never independent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Interval", "bootstrap_mean", "holm", "person_means", "wilcoxon_signed_rank"]

Values = NDArray[np.float64]
RESAMPLES = 10_000


class Interval(NamedTuple):
    """A mean and the percentile interval of its bootstrap; NaN where there is nothing to take a mean of."""

    mean: float
    low: float
    high: float


def _sums(values: Values, persons: Sequence[str]) -> tuple[Values, Values]:
    """Sum and number of the values of each person, NaN left out."""
    if len(values) != len(persons):
        raise ValueError(f"expected a person for each of {len(values)} values, got {len(persons)}")
    _, person = np.unique(np.asarray(persons, dtype=object).astype(str), return_inverse=True)
    there = ~np.isnan(values)
    count = int(person.max()) + 1 if len(person) else 0
    sums = np.bincount(person, np.where(there, values, 0.0), count).astype(np.float64)
    return sums, np.bincount(person, there.astype(float), count).astype(np.float64)


def person_means(values: Values, persons: Sequence[str]) -> Values:
    """Mean of each person's values, in the order of the sorted persons; who has none is left out."""
    sums, counts = _sums(np.asarray(values, np.float64), persons)
    return sums[counts > 0] / counts[counts > 0]


def bootstrap_mean(
    values: Sequence[float] | Values,
    persons: Sequence[str],
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean over images, and its percentile bootstrap interval over persons.

    Whole persons are drawn with replacement, with all their images. Of paired differences this is the paired bootstrap.

    Args:
        values: [images]; NaN is left out.
        persons: [images], whose image it is.

    Raises:
        ValueError: lengths that differ.
    """
    sums, counts = _sums(np.asarray(values, np.float64), persons)
    sums, counts = sums[counts > 0], counts[counts > 0]
    people = len(sums)
    if people == 0:
        return Interval(np.nan, np.nan, np.nan)
    drawn = np.random.default_rng(seed).multinomial(people, np.full(people, 1 / people), size=resamples)
    tail = (1 - confidence) / 2
    low, high = np.quantile((drawn @ sums) / (drawn @ counts), [tail, 1 - tail])
    return Interval(float(sums.sum() / counts.sum()), float(low), float(high))


def wilcoxon_signed_rank(differences: Sequence[float] | Values, persons: Sequence[str]) -> float:
    """Two-sided p of Wilcoxon's signed-rank test on the persons' mean differences (zeros as Pratt); 1 if all are 0.

    Exact for any number of zeros and ties: the normal approximation finds too much in few persons.
    """
    means = person_means(np.asarray(differences, np.float64), persons).round(9)  # equal up to rounding is a tie
    if not len(means):
        return float("nan")
    _, place, equal = np.unique(np.abs(means), return_inverse=True, return_counts=True)
    twice = (2 * equal.cumsum() - equal + 1)[place]  # ranks, of which ties share the mean
    signed = twice[means != 0]
    chances = np.zeros(int(signed.sum()) + 1)  # of each sum of those above 0, where signs are coins
    chances[0] = 1.0
    for rank in signed:
        chances[rank:] = (chances[rank:] + chances[:-rank]) / 2
        chances[:rank] /= 2
    seen = int(twice[means > 0].sum())
    return min(1.0, 2 * float(min(chances[: seen + 1].sum(), chances[seen:].sum())))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979): p-values that may be compared with the level of the whole family.

    NaN (no test) stays NaN and does not count as a test.
    """
    given = np.asarray(p_values, np.float64)
    adjusted = np.full(len(given), np.nan)
    order = [index for index in np.argsort(given, kind="stable") if not np.isnan(given[index])]
    least = 0.0
    for done, index in enumerate(order):
        least = max(least, min(1.0, (len(order) - done) * given[index]))
        adjusted[index] = least
    return adjusted.tolist()
