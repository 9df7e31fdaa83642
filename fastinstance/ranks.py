"""Ranks of methods over metrics, as the tables of the paper print them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real

__all__ = ["RANKED", "rank_methods"]

RANKED = {"pq": 1, "dsc": 1, "vol_diff": 0, "fdr": -1, "fnr": -1, "ppv": 1, "sen": 1, "f1": 1}
"""The metrics that are ranked: 1 where more is better, -1 where less is, 0 where nearer to zero is."""

_OVERALL = ("dsc", "vol_diff")
_INSTANCE = ("fdr", "fnr", "ppv", "sen", "f1")


def rank_methods(
    methods: Mapping[str, Mapping[str, float | None]], *, digits: int | None = 1
) -> dict[str, dict[str, object]]:
    """Ranks of each method and their means (Tables 1 to 5 of the paper).

    Args:
        methods: values by method and metric: "pq", "dsc", "vol_diff", "fdr", "fnr", "ppv", "sen", "f1". The best has
            rank 1; of "vol_diff" the smallest absolute value. Equal values share the mean of their ranks. A metric that
            a method lacks, or has as None or NaN, is not ranked for it and left out of its means.
        digits: decimals of the means, halves rounded up as in the paper's tables; None for the exact means.

    Returns:
        For each method "ranks" (by metric), "RA", the mean of all its ranks, "RG", that of "dsc" and "vol_diff", and
        "RI", that of the five instance-level metrics ("pq" is in RA alone). A mean of no ranks is NaN.

    Raises:
        ValueError: no method, an unknown metric, a value that is no number or infinite.
    """
    if not methods:
        raise ValueError("expected at least one method, got none")
    for method, metrics in methods.items():
        unknown = sorted(set(metrics) - set(RANKED))
        if unknown:
            raise ValueError(f"expected metrics among {', '.join(RANKED)}, got {', '.join(unknown)} of {method!r}")
        for name, value in metrics.items():
            number = isinstance(value, Real) and not isinstance(value, bool)
            if value is not None and (not number or math.isinf(value)):
                raise ValueError(f"expected {name} of {method!r} to be a finite number, got {value!r}")
    ranks: dict[str, dict[str, float]] = {method: {} for method in methods}
    for name, sign in RANKED.items():
        given = {method: metrics.get(name) for method, metrics in methods.items()}
        values = {method: float(v) for method, v in given.items() if v is not None and not math.isnan(v)}
        cost = {method: -sign * v if sign else abs(v) for method, v in values.items()}
        for method, value in cost.items():
            better = sum(other < value for other in cost.values())
            equal = sum(other == value for other in cost.values())
            ranks[method][name] = better + (equal + 1) / 2
    return {
        method: {
            "ranks": mine,
            "RA": _mean(mine, tuple(RANKED), digits),
            "RG": _mean(mine, _OVERALL, digits),
            "RI": _mean(mine, _INSTANCE, digits),
        }
        for method, mine in ranks.items()
    }


def _mean(ranks: Mapping[str, float], names: tuple[str, ...], digits: int | None) -> float:
    there = [ranks[name] for name in names if name in ranks]
    if not there:
        return math.nan
    mean = sum(there) / len(there)
    # Sums of ranks are multiples of a half, so a mean that ends in a half is found by a tiny margin.
    return mean if digits is None else math.floor(mean * 10**digits + 0.5 + 1e-9) / 10**digits
