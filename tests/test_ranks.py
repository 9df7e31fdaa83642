"""Ranks of methods: the paper's Table 1(A), ties, and what is missing."""

import math

import numpy as np
import pytest
import torch

from fastinstance import instance_metrics, rank_methods
from fastinstance.metrics import METRICS

NAMES = ("pq", "dsc", "vol_diff", "fdr", "fnr", "ppv", "sen", "f1")
TABLE_1A = {
    "GDF": (0.1610, 0.5635, -1.53, 0.5576, 0.4199, 0.4038, 0.5801, 0.4436),
    "blob-GDF": (0.1689, 0.5740, -2.14, 0.5084, 0.4285, 0.4337, 0.5715, 0.4653),
    "ICI": (0.1667, 0.5735, -1.30, 0.5720, 0.4312, 0.3972, 0.5688, 0.4340),
    "False": (0.1653, 0.5633, -1.36, 0.5592, 0.3963, 0.4015, 0.6037, 0.4449),
    "Proximity": (0.1626, 0.5573, -1.90, 0.5275, 0.4190, 0.4336, 0.5810, 0.4604),
}
METHODS = {method: dict(zip(NAMES, row, strict=True)) for method, row in TABLE_1A.items()}


def column(name, **options):
    return [result[name] for result in rank_methods(METHODS, **options).values()]


def test_table_1a_of_the_paper():
    assert column("RA") == [3.4, 2.3, 3.8, 2.8, 2.9]
    assert column("RG") == [3.0, 3.0, 1.5, 3.0, 4.5]
    assert column("RI") == [3.2, 2.2, 5.0, 2.6, 2.0]
    ranks = column("ranks")
    assert [mine["pq"] for mine in ranks] == [5, 1, 2, 3, 4]
    assert [mine["vol_diff"] for mine in ranks] == [3, 5, 1, 2, 4]
    assert [mine["fnr"] for mine in ranks] == [3, 4, 5, 1, 2]
    assert all(list(mine) == list(NAMES) for mine in ranks)


def test_exact_means():
    assert column("RA", digits=None) == [3.375, 2.25, 3.75, 2.75, 2.875]
    assert column("RA", digits=2) == [3.38, 2.25, 3.75, 2.75, 2.88]


def test_ties_share_the_mean_of_their_ranks():
    found = rank_methods({"a": {"f1": 0.5}, "b": {"f1": 0.7}, "c": {"f1": 0.5}, "d": {"f1": 0.5}})
    assert [result["ranks"]["f1"] for result in found.values()] == [3, 1, 3, 3]
    found = rank_methods({"a": {"vol_diff": -1.0}, "b": {"vol_diff": 1.0}})
    assert [result["RG"] for result in found.values()] == [1.5, 1.5]


def test_missing_metrics_are_left_out():
    found = rank_methods({"a": {"pq": 0.1, "sen": math.nan, "f1": 0.2}, "b": {"pq": 0.2, "f1": None}, "c": {}})
    assert found["a"] == {"ranks": {"pq": 2, "f1": 1}, "RA": 1.5, "RG": pytest.approx(math.nan, nan_ok=True), "RI": 1.0}
    assert found["b"]["RA"] == 1
    assert math.isnan(found["c"]["RA"])


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ({}, "expected methods with at least one"),
        ({"a": {"dice": 1}}, "got dice of 'a'"),
        ({"a": {"n_target": 4, "f1": 1, "n_pred": 3}}, "got n_pred, n_target of 'a'; leave out"),
        ({"a": {1: 2, None: 3}}, "got 1, None of 'a'"),
        ({"a": {"f1": math.inf}}, "finite number, got inf"),
        ({"a": {"f1": "0.5"}}, "finite number, got '0.5'"),
    ],
)
def test_errors(methods, words):
    with pytest.raises(ValueError, match=words):
        rank_methods(methods)


def test_numbers_of_numpy():
    found = rank_methods({"a": {"pq": np.float32(0.5)}, "b": {"pq": 0.25}})
    assert [type(found[name]["ranks"]["pq"]) for name in "ab"] == [float, float]


@pytest.mark.parametrize("digits", [-1, 1.5, True, "1", math.nan])
def test_digits(digits):
    with pytest.raises(ValueError, match="expected digits to be an integer >= 0 or None, got"):
        rank_methods(METHODS, digits=digits)


@pytest.mark.parametrize("methods", [None, 3, "x", [], {"a": 1}, {"a": None}])
def test_no_methods(methods):
    with pytest.raises(TypeError, match="expected methods to map each method to its values by metric, got"):
        rank_methods(methods)


def test_every_metric_has_a_direction():
    """A perfect prediction is best in all that `instance_metrics` returns and that has an order."""
    target = torch.zeros(1, 1, 8, 8)
    target[..., :3, :3] = target[..., 5:, 5:] = target[..., 0, 6] = 1
    wrong = torch.zeros_like(target)
    wrong[..., :3, 1:5] = wrong[..., 6, :3] = 1
    found = {name: instance_metrics(pred, target) for name, pred in {"right": target, "wrong": wrong}.items()}
    means = {
        name: {k: v.item() for k, v in of.items() if k not in ("n_target", "n_pred")} for name, of in found.items()
    }
    ranks = rank_methods(means)
    assert set(ranks["right"]["ranks"]) == set(METRICS) - {"n_target", "n_pred"}
    assert set(ranks["right"]["ranks"].values()) == {1}
    assert set(ranks["wrong"]["ranks"].values()) == {2}


def test_further_metrics_are_not_in_the_means():
    further = {"sq": 0.5, "rq": 0.5, "n_missed": 3, "n_false": 2, "vol_diff_ml": 4, "vol_diff_percent": 9}
    more = {method: {**metrics, **further} for method, metrics in METHODS.items()}
    for mean in ("RA", "RG", "RI"):
        assert [result[mean] for result in rank_methods(more).values()] == column(mean)
    in_ml = {m: {"vol_diff_ml" if k == "vol_diff" else k: v for k, v in of.items()} for m, of in METHODS.items()}
    for mean in ("RA", "RG", "RI"):
        assert [result[mean] for result in rank_methods(in_ml).values()] == column(mean)
