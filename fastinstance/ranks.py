"""Ranks of methods over metrics, as the tables of the paper print them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real

__all__ = ["RANKED", "rank_methods"]

RANKED = {"pq": 1, "dsc": 1, "vol_diff": 0, "fdr": -1, "fnr": -1, "ppv": 1, "sen": 1, "f1": 1}
"""The metrics of the paper's ranks: 1 where more is better, -1 where less is, 0 where nearer to zero is."""

_FURTHER = {"vol_diff_ml": 0, "vol_diff_percent": 0, "sq": 1, "rq": 1, "n_missed": -1, "n_false": -1}
"""What else `instance_metrics` returns that has an order; likewise."""
_ALL = {**RANKED, **_FURTHER}

_INSTANCE = ("fdr", "fnr", "ppv", "sen", "f1")


def rank_methods(
    methods: Mapping[str, Mapping[str, float | None]], *, digits: int | None = 1
) -> dict[str, dict[str, object]]:
    """Ranks of each method and their means (Tables 1 to 5 of the paper).

    Args:
        methods: values by method and metric: "pq", "dsc", "vol_diff", "fdr", "fnr", "ppv", "sen", "f1", and the other
            metrics of `instance_metrics` but "n_target" and "n_pred", which are neither good nor bad. The best has rank
            1; of volume differences the smallest absolute value. Equal values share the mean of their ranks. A metric
            that a method lacks, or has as None or NaN, is not ranked for it and left out of its means.
        digits: decimals of the means, halves rounded up as in the paper's tables; None for the exact means.

    Returns:
        For each method "ranks" (by metric), "RA", the mean of its ranks in the eight metrics named first, "RG", that of
        "dsc" and "vol_diff", and "RI", that of the five instance-level metrics ("pq" is in RA alone). Where no method
        has "vol_diff", "vol_diff_ml" takes its place in RA and RG. A mean of no ranks is NaN.

    Raises:
        ValueError: no method, an unknown metric, a value that is no number or infinite, `digits` that are no number of
            decimals.
        TypeError: methods that are no mapping of mappings.
    """
    if not isinstance(methods, Mapping) or not all(isinstance(metrics, Mapping) for metrics in methods.values()):
        raise TypeError(f"expected methods to map each method to its values by metric, got {methods!r:.200}")
    if not methods:
        raise ValueError("expected methods with at least one, got none")
    if digits is not None and (isinstance(digits, bool) or not isinstance(digits, int) or digits < 0):
        raise ValueError(f"expected digits to be an integer >= 0 or None, got {digits!r}")
    for method, metrics in methods.items():
        unknown = sorted(map(str, metrics.keys() - _ALL.keys()))
        if unknown:
            raise ValueError(
                f"expected metrics among {', '.join(_ALL)}, got {', '.join(unknown)} of {method!r}; leave out what is "
                "neither good nor bad, as n_target and n_pred"
            )
        for name, value in metrics.items():
            number = isinstance(value, Real) and not isinstance(value, bool)
            if value is not None and (not number or math.isinf(value)):
                raise ValueError(f"expected {name} of {method!r} to be a finite number, got {value!r}")
    ranks: dict[str, dict[str, float]] = {method: {} for method in methods}
    for name, sign in _ALL.items():
        given = {method: metrics.get(name) for method, metrics in methods.items()}
        values = {method: float(v) for method, v in given.items() if v is not None and not math.isnan(v)}
        cost = {method: -sign * v if sign else abs(v) for method, v in values.items()}
        for method, value in cost.items():
            better = sum(other < value for other in cost.values())
            equal = sum(other == value for other in cost.values())
            ranks[method][name] = better + (equal + 1) / 2
    volume = "vol_diff" if any("vol_diff" in mine for mine in ranks.values()) else "vol_diff_ml"
    overall = "dsc", volume
    return {
        method: {
            "ranks": mine,
            "RA": _mean(mine, ("pq", *overall, *_INSTANCE), digits),
            "RG": _mean(mine, overall, digits),
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
