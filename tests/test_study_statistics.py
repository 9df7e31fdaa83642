"""Statistics, folds and outcomes of the study, on cases worked out by hand or by brute force."""

import csv
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastinstance.metrics import VOLUME_EDGES, instance_metrics
from fastinstance.overlay import paint
from fastinstance.study import cells, outcomes, results
from fastinstance.study.config import Evaluation
from fastinstance.study.figures import FIGURES
from fastinstance.study.measure import CURVE, THRESHOLDS, binary, curve_of, measure
from fastinstance.study.splits import make_folds, split
from fastinstance.study.statistics import bootstrap_mean, holm, person_means, wilcoxon_signed_rank
from fastinstance.study.subjects import StudyError, Subject
from fastinstance.study.tables import make_tables, write_csv


def test_the_mean_is_over_images_and_its_interval_over_persons():
    values, persons = [1.0, 1.0, 4.0, math.nan], ["a", "a", "b", "c"]
    mean, low, high = bootstrap_mean(values, persons, resamples=4000)
    assert mean == 2
    assert (low, high) == (1, 4)  # both draws of two persons that are the same happen a quarter of the time
    assert bootstrap_mean(values, persons) == bootstrap_mean(values, persons)
    one = bootstrap_mean([3.0, 5.0], ["a", "a"])
    assert one == (4, 4, 4)
    assert all(map(math.isnan, bootstrap_mean([math.nan], ["a"])))
    with pytest.raises(ValueError, match="a person for each of 2 values, got 1"):
        bootstrap_mean([1.0, 2.0], ["a"])


def test_the_interval_is_that_of_a_literal_bootstrap():
    rng = np.random.default_rng(1)
    persons = [f"p{number // 2}" for number in range(24)]
    values = rng.normal(0.3, 1, 24)
    _, low, high = bootstrap_mean(values, persons)
    groups = [values[2 * number : 2 * number + 2] for number in range(12)]
    means = [np.concatenate([groups[i] for i in rng.integers(0, 12, 12)]).mean() for _ in range(10_000)]
    np.testing.assert_allclose([low, high], np.quantile(means, [0.025, 0.975]), atol=0.03)


def test_person_means():
    np.testing.assert_array_equal(person_means(np.array([1, 3, math.nan, 5]), ["b", "b", "c", "a"]), [5, 2])


def test_wilcoxon_is_the_share_of_signs_that_are_as_extreme():
    differences = np.array([0.3, -0.1, 0.5, 0.7, 0.2, 0.9])
    ranks = np.array([3, 1, 4, 5, 2, 6])
    seen = ranks[differences > 0].sum()
    sums = [ranks[list(signs)].sum() for signs in map(np.array, itertools.product([False, True], repeat=6))]
    extreme = max(seen, 21 - seen)
    expected = np.mean([total >= extreme or total <= 21 - extreme for total in sums])
    assert wilcoxon_signed_rank(differences, list("abcdef")) == pytest.approx(expected)
    assert wilcoxon_signed_rank([0.0, 0.0], ["a", "b"]) == 1
    assert math.isnan(wilcoxon_signed_rank([], []))


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9))
def test_wilcoxon_is_exact_with_zeros_and_ties(values: list[int]):
    ranks = np.array([sum(abs(b) < abs(a) for b in values) + (values_like(a, values) + 1) / 2 for a in values])
    there = np.array(values) != 0
    sums = [(ranks[there] * signs).sum() for signs in itertools.product([0, 1], repeat=int(there.sum()))]
    seen = ranks[np.array(values) > 0].sum()
    expected = min(1, 2 * min(np.mean(np.array(sums) <= seen), np.mean(np.array(sums) >= seen)))
    persons = [str(number) for number in range(len(values))]
    # 0.1 + 0.2 is not 0.3: ties of means are ties up to rounding.
    assert wilcoxon_signed_rank([value * 0.1 for value in values], persons) == pytest.approx(expected)


def values_like(value: int, values: list[int]) -> int:
    return sum(abs(other) == abs(value) for other in values)


def test_few_persons_with_ties_are_not_significant():
    assert wilcoxon_signed_rank([1.0] * 4, list("abcd")) == 0.125  # 2 / 2^4; the normal approximation says 0.046


def test_wilcoxon_is_that_of_scipy_for_many_persons():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(0).normal(0.3, 1, 40)
    persons = [str(number) for number in range(40)]
    assert wilcoxon_signed_rank(values, persons) == pytest.approx(stats.wilcoxon(values, method="exact").pvalue)


def test_two_visits_of_a_person_count_once():
    assert wilcoxon_signed_rank([1.0, 1.0, 2.0], ["a", "a", "b"]) == wilcoxon_signed_rank([1.0, 2.0], ["a", "b"])


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1, 1]
    adjusted = holm([math.nan, 0.04])
    assert math.isnan(adjusted[0])
    assert adjusted[1] == 0.04
    assert holm([]) == []


def subject(name, person=None, *, labels=None, valid=None, spacing=(3.0, 1.0, 1.0)):
    if labels is None:
        labels = torch.zeros(1, 4, 4, dtype=torch.int32)
        labels[0, 0, 0] = 1
    image = torch.full((1, *labels.shape), 1.0)
    return Subject(name, person or name, image, labels > 0, labels, valid, spacing)


@given(
    persons=st.integers(3, 30),
    visits=st.integers(1, 3),
    folds=st.integers(2, 6),
    share=st.floats(0.05, 0.95),
    seed=st.integers(0, 3),
)
@settings(max_examples=settings().max_examples)
def test_no_person_lies_on_two_sides(persons, visits, folds, share, seed):
    subjects = [subject(f"p{p}-{visit}", f"p{p}") for p in range(persons) for visit in range(visits)]
    if persons < folds or persons - math.ceil(persons / folds) < 2:
        with pytest.raises(StudyError, match="folds are impossible"):
            make_folds("d", subjects, folds, seed=seed)
        return
    made = make_folds("d", subjects, folds, seed=seed)
    assert sorted(person for fold in made for person in fold) == sorted({one.person for one in subjects})
    assert max(map(len, made)) - min(map(len, made)) <= 1
    for fold in range(folds):
        parts = split("d", subjects, made, fold, validation=share)
        sides = [{one.person for one in part} for part in (parts.train, parts.validation, parts.test)]
        assert all(sides)
        assert sum(map(len, sides)) == persons == len(set.union(*sides))
        assert sides[2] == set(made[fold])
        assert len(parts.train) + len(parts.validation) + len(parts.test) == len(subjects)
    assert made == make_folds("d", list(reversed(subjects)), folds, seed=seed)


@pytest.mark.parametrize(
    ("folds", "words"),
    [
        (2, "2 folds are impossible with 2 persons"),
        ([["a"], ["b", "c"]], "folds name c, who is not among its persons"),
        ([["a", "b"], ["b"]], "b is in two folds"),
        ([["a"], []], "b is in no fold"),
        ([["a"], ["b"]], "two persons outside of every fold"),
    ],
)
def test_impossible_folds(folds, words):
    with pytest.raises(StudyError, match=words):
        make_folds("d", [subject("a"), subject("b")], folds)


def test_folds_may_be_given():
    assert make_folds("d", [subject(name) for name in "abcd"], [["c", "a"], ["b", "d"]]) == [["a", "c"], ["b", "d"]]


def test_a_part_of_one_class_is_refused():
    empty = [subject(name, labels=torch.zeros(1, 4, 4, dtype=torch.int32)) for name in "ab"]
    with pytest.raises(StudyError, match=r"\[data.d\] fold 0: expected instances in the .* subjects, got none"):
        split("d", [*empty, subject("c")], [["c"], ["a", "b"]], 0, validation=0.5)


SCENE = torch.tensor(
    [
        [[1, 1, 0, 0, 2, 2], [1, 1, 0, 0, 2, 2], [0, 0, 0, 0, 0, 0]],
        [[0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]],
    ],
    dtype=torch.int32,
)
PROBABILITY = torch.tensor(
    [
        [[0.9, 0.9, 0.0, 0.0, 0.3, 0.3], [0.9, 0.9, 0.0, 0.0, 0.3, 0.3], [0.0, 0.0, 0.0, 0.7, 0.0, 0.0]],
        [[0.0, 0.0, 0.0, 0.0, 0.6, 0.6], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]],
    ]
)


def test_instances_of_slices_count_together():
    one = subject("a", labels=SCENE)
    found = measure(one, binary(one, PROBABILITY, 0.5))
    assert (found.metrics["n_target"], found.metrics["n_missed"]) == (3, 2)
    assert (found.metrics["n_pred"], found.metrics["n_false"]) == (3, 2)
    assert found.metrics["dsc"] == pytest.approx(2 * 4 / (9 + 7))
    assert found.metrics["vol_diff_ml"] == pytest.approx(-2 * 0.003)
    assert found.by_size.shape == (len(VOLUME_EDGES) + 1, 5)
    assert found.by_size[0].tolist() == [3, 1, 1, 3, 1]  # all below 0.05 mL
    dropped = measure(one, binary(one, PROBABILITY, 0.5), min_size=2)
    assert (dropped.metrics["n_target"], dropped.metrics["n_false"]) == (2, 1)
    alone = instance_metrics(binary(one, PROBABILITY, 0.5)[:1, None], one.target[:1, None])
    assert alone["n_missed"].item() == 1


def test_nothing_counts_where_nothing_is_annotated():
    valid = torch.ones(2, 3, 6, dtype=torch.bool)
    valid[1] = False
    labels = SCENE * valid
    one = subject("a", labels=labels, valid=valid)
    found = measure(one, binary(one, PROBABILITY, 0.5))
    assert (found.metrics["n_target"], found.metrics["n_pred"], found.metrics["n_false"]) == (2, 2, 1)


def test_the_curve_is_the_count_at_each_threshold():
    one = subject("a", labels=SCENE)
    rows, values = curve_of(one, PROBABILITY, small_ml=0.01, metric="f1")
    assert rows.shape == (len(THRESHOLDS), len(CURVE))
    for threshold, row, value in zip(THRESHOLDS, rows, values, strict=True):
        found = measure(one, binary(one, PROBABILITY, threshold)).metrics
        counts = dict(zip(CURVE, row, strict=True))
        assert counts["small"] == 1  # of 0.003 mL; the others have 0.012
        assert counts["found_small"] == 0
        assert counts["found"] == found["n_target"] - found["n_missed"]
        assert (counts["n_pred"], counts["hit"]) == (found["n_pred"], found["n_pred"] - found["n_false"])
        assert value == pytest.approx(found["f1"])


def test_the_threshold_is_tuned_where_the_metric_is_best():
    one = subject("a", labels=SCENE)
    # Up to 0.3 there are two hits and a false one, PQ 0.63; above 0.7 one hit and none false, PQ 0.5.
    assert cells.tuned_threshold([one], [PROBABILITY], Evaluation(tune="pq")) == 0.3
    assert cells.tuned_threshold([one], [torch.zeros(2, 3, 6)], Evaluation()) == 0.5  # nothing is better than another


def test_where_the_precision_is_as_wanted():
    precision = np.array([0.9, 0.2, 0.4, 0.6, 0.8, 0.0])  # "all is lesion" first, and nothing at last
    assert outcomes.precision_position(precision, 0.6, 3) == 3
    assert outcomes.precision_position(precision, 0.5, 3) == 2.5
    assert outcomes.precision_position(precision, 0.7, 3) == 3.5
    assert outcomes.precision_position(precision, 0.3, 4) == 1.5
    assert outcomes.precision_position(precision, 0.1, 4) == 0
    assert outcomes.precision_position(precision, 0.85, 3) is None


def cell(loss, seed=0, fold=0, *, hit, found_small, dsc=0.5, pq=0.4, subjects=("s0", "s1")):
    """A cell of two subjects with ten small instances each, whose curves are steps over three thresholds."""
    metrics = {name: [0.5, 0.5] for name in ("vol_diff_ml", "fdr", "fnr", "ppv", "sen", "f1")}
    at = {"metrics": {**metrics, "dsc": [dsc, dsc], "pq": [pq, pq + 0.2]}, "by_size": np.ones((21, 5)).tolist()}
    half = THRESHOLDS.index(0.5)
    spread = lambda values: [[values[0]] * half + [values[1]] + [values[2]] * half] * 2  # noqa: E731
    return {
        "cell": ["d", loss, seed, fold],
        "subjects": list(subjects),
        "persons": list(subjects),
        "volume_ml": [1.0, 2.0],
        "at": {"fixed": at, "tuned": at},
        "curve": {
            "thresholds": list(THRESHOLDS),
            "small": [10, 10],
            "found_small": spread(found_small),
            "found": spread(found_small),
            "n_pred": spread([10, 10, 10]),
            "hit": spread(hit),
        },
    }


def made(*documents, failed=None):
    losses = list(dict.fromkeys(["base", *(one["cell"][1] for one in documents)]))
    return results.results_of(
        {
            "format": 1,
            "plan": {"name": "made", "ensembles": []},
            "losses": losses,
            "baseline": "base",
            "ensembles_of_losses": [],
            "data": ["d"],
            "min_size": {"d": 0},
            "small_ml": {"d": 0.05},
            "collapse": {"d": 0.1},
            "cells": list(documents),
            "ensembles": [],
            "votes": [],
            "failed": failed or {},
            "missing": [],
        },
        "made",
    )


BASE = {"hit": (3, 6, 9), "found_small": (8, 4, 2)}


def test_losses_are_compared_at_the_precision_of_the_baseline():
    found = made(
        cell("base", **BASE),
        cell("eager", hit=(3, 3, 9), found_small=(9, 9, 5)),  # 0.5 lies at precision 0.3; half way up it is 0.6
        cell("never", hit=(1, 2, 3), found_small=(9, 9, 9)),
        cell("same", **BASE),
    )
    comparisons = {one.loss: one for one in outcomes.compare(found, "d", "small_at_precision")}
    assert comparisons["eager"].value.mean == pytest.approx(0.7)
    assert comparisons["eager"].difference.mean == pytest.approx(0.7 - 0.4)
    assert comparisons["never"].value.mean == 0
    assert comparisons["never"].unreached == 1
    assert comparisons["same"].difference == (0, 0, 0)
    assert comparisons["same"].p == 1
    at_half = {one.loss: one.difference.mean for one in outcomes.compare(found, "d", "small")}
    assert at_half["eager"] == pytest.approx(0.5)


def test_differences_are_paired_by_seed_and_subject():
    found = made(
        cell("base", 0, **BASE, pq=0.1),
        cell("base", 1, **BASE, pq=0.3),
        cell("loss", 0, **BASE, pq=0.2),
        cell("loss", 1, **BASE, pq=0.5),
        cell("loss", 2, **BASE, pq=0.9),  # whose baseline is missing
    )
    (one,) = outcomes.compare(found, "d", "pq")
    assert one.difference.mean == pytest.approx(0.15)
    assert one.by_seed == pytest.approx((0.1, 0.2))


def test_a_baseline_that_finds_nothing_cannot_be_matched():
    nothing = {"hit": (0, 0, 0), "found_small": (0, 0, 0)}
    found = made(cell("base", **nothing), cell("loss", **BASE))
    assert outcomes.compare(found, "d", "small_at_precision") == []


def test_collapses_are_counted():
    found = made(cell("base", 0, **BASE), cell("base", 1, **BASE, dsc=0.05), cell("base", 2, **BASE, dsc=0.2))
    assert outcomes.collapses(found, "d", "base") == (1, 3)


def test_tables_say_what_the_results_say(tmp_path):
    found = made(
        *(cell("base", seed, **BASE, pq=0.1 + seed / 10) for seed in range(2)),
        *(cell("loss", seed, **BASE, pq=0.5, dsc=0.05) for seed in range(2)),
        failed={"d/loss/seed2-fold0": "the loss is nan"},
    )
    tables = {one.number: one for one in make_tables(found)}
    assert list(tables) == [1, 2, 5]  # no ensembles and no second data set
    first = tables[1]
    assert first.rows[0][1] == "0.250 [0.150, 0.350] (2)"
    assert first.rows[1][1] == "0.600 [0.500, 0.700] (1)"
    assert [row[-1] for row in first.rows] == ["0 / 2", "2 / 2"]
    assert "Failed, and in no mean: d/loss/seed2-fold0." in first.markdown()
    assert first.records[0]["pq_rank"] == 2
    assert first.records[0]["RG"] == 1.3  # of 1 and the shared 1.5
    write_csv(tmp_path / "t.csv", first)
    with (tmp_path / "t.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[1]["pq_low"]) == pytest.approx(0.5)
    assert rows[1]["collapsed"] == "2"
    assert "+0.350 [+0.350, +0.350], p 0.500, seeds +0.300 to +0.400" in tables[5].markdown()


def test_losses_are_averaged_over_the_seeds_and_folds_that_all_have(tmp_path):
    cells = [cell("base", seed, **BASE, pq=0.1 + seed / 10) for seed in range(3)]
    cells += [cell("loss", seed, **BASE, pq=0.5 + seed / 10) for seed in range(2)]
    ensembles = [{**cell("", seed, **BASE, pq=0.7), "ensemble": ["d", "both", seed, 0]} for seed in range(3)]
    votes = [{**cell("", seed, **BASE), "vote": ["d", "o", seed], "folds": [0]} for seed in range(2)]
    for vote, methods in zip(votes, (["base", "loss"], ["base"]), strict=True):
        vote["methods"] = dict.fromkeys(methods, vote["at"]["fixed"])
    plan = {"name": "made", "ensembles": [{"small": "base", "large": "loss"}]}
    changes = {"plan": plan, "ensembles_of_losses": ("both",), "ensembles": ensembles, "votes": votes}
    found = dataclasses.replace(made(*cells), **changes)
    tables = {f"{one.number}{one.part}": one for one in make_tables(found)}
    note = "Over 2 of 3 seeds and folds, which every loss has."
    for name in "12":
        assert [row[1].split()[0] for row in tables[name].rows] == ["0.250", "0.650"]
        assert tables[name].note == note
    assert [row[-1] for row in tables["1"].rows] == ["0 / 2", "0 / 2"]
    assert [record["method"] for record in tables["4A"].records] == ["base", "loss", "both"]
    assert tables["4A"].note == note
    assert tables["4B"].note == "Over 1 of 2 seeds, which every loss has."
    assert tables["5"].note.endswith(note)
    for draw in FIGURES.values():
        draw(found, tmp_path / "figure.png")

    apart = made(*(cells[2:]))  # nothing to compare
    first, *rest = make_tables(apart)
    assert first.note == "Over 0 of 3 seeds and folds, which every loss has."
    assert [row[1] for row in first.rows] == ["", ""]
    assert {one.number for one in rest} == {2}


def test_touching_nuclei_are_told_apart_in_pictures():
    ids = np.array([[1, 1, 2, 2], [0, 0, 0, 0]])
    picture = paint(np.zeros((2, 4)), np.array([[1, 0, 0, 0], [0, 0, 0, 0]]) > 0, ids > 0, target_labels=ids)
    assert (picture.found, picture.missed, picture.false) == (1, 1, 0)
    np.testing.assert_array_equal(picture.layer[0], [1, 1, 3, 3])
