"""Instance-level metrics: against the loop reference, by hand, by their invariants, and against peers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastinstance
from fastinstance import instance_metrics, matching, metrics, reference
from fastinstance.matching import MATCHINGS, match_instances
from fastinstance.testing import Scene, assert_close, pattern, scenes
from tests.lines import lines_executed

EXAMPLES = settings().max_examples
COUNTS = ("n_target", "n_pred", "n_missed", "n_false")


def mask(*rows: str) -> Tensor:
    """A plane [1, 1, Y, X] from rows such as ".##."."""
    return torch.tensor([[character == "#" for character in row] for row in rows])[None, None]


def values(pred: Tensor, target: Tensor, **options: Any) -> dict[str, float]:
    """The metrics of one plane."""
    return {name: value.item() for name, value in instance_metrics(pred, target, **options).items()}


def predicted(scene: Scene) -> Tensor:
    return scene.input.float() >= 0


@st.composite
def options(draw: st.DrawFn, axes: int) -> dict[str, Any]:
    drawn = {
        "matching": draw(st.sampled_from(MATCHINGS)),
        "threshold": draw(st.sampled_from((0, 0.1, 0.3, 0.5, 0.6, 2 / 3, 0.9))),
        "min_size": draw(st.sampled_from((0, 0, 2, 4))),
        "connectivity": draw(st.sampled_from((None, 4, 8) if axes == 2 else (None, 6, 18, 26))),
        "zero_division": draw(st.sampled_from((0.0, 1.0, math.nan))),
        "spacing": draw(st.sampled_from((None, (0.5, 2.0, 1.5)[:axes]))),
    }
    return drawn


@settings(max_examples=2 * EXAMPLES)
@given(scenes(labels=True, extreme=False), st.data())
def test_equal_to_the_loop(scene: Scene, data: st.DataObject) -> None:
    settings = data.draw(options(scene.input.ndim - 2))
    pred, target = predicted(scene), scene.target
    labels = {"target_labels": scene.target_labels}
    if data.draw(st.booleans(), label="pred_labels"):
        width = data.draw(st.integers(1, 3))
        labels["pred_labels"] = pred * (1 + torch.arange(pred.shape[-1]) // width % 3)
    found = instance_metrics(pred, target, **labels, **settings)
    expected = reference.instance_metrics(pred, target, **labels, **settings)
    assert tuple(found) == metrics.METRICS
    assert_close(found, expected)
    assert all(found[name].dtype == torch.int64 for name in COUNTS)


class FixedTables:
    """What a GPU does, on the CPU."""

    def __enter__(self) -> None:
        self.patch = pytest.MonkeyPatch()
        greatest_first = matching._greatest_first
        self.patch.setattr(matching, "_exact_tables", matching._fixed_tables)
        self.patch.setattr(
            matching, "_greatest_first", lambda *given: greatest_first(*given[:-1], rounds=matching.ROUNDS)
        )

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


@settings(max_examples=EXAMPLES)
@given(scenes(labels=True, extreme=False), st.data())
def test_tables_of_fixed_size_give_the_same(scene: Scene, data: st.DataObject) -> None:
    settings = data.draw(options(scene.input.ndim - 2))
    pred, target = predicted(scene), scene.target
    labels = {} if scene.target_labels is None else {"target_labels": scene.target_labels}
    expected = instance_metrics(pred, target, **labels, **settings)
    with FixedTables():
        found = instance_metrics(pred, target, **labels, **settings)
        groups = metrics.volume_sums(match_instances(pred, target, **labels), (0.002, 0.004), 1e-3)
    assert all(torch.equal(found[name].nan_to_num(7), expected[name].nan_to_num(7)) for name in metrics.METRICS)
    assert torch.equal(groups, metrics.volume_sums(match_instances(pred, target, **labels), (0.002, 0.004), 1e-3))


@pytest.mark.parametrize("kind", ["overlap", "iou", "dice"])
def test_a_gpu_need_not_be_waited_for(kind: str) -> None:
    """Fake tensors have no values: whatever reads one, or a size that depends on one, raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode, FixedTables():
        pred, target = (mode.from_tensor(torch.zeros(2, 2, 6, 7, dtype=torch.bool)) for _ in range(2))
        monkeypatch = pytest.MonkeyPatch()
        monkeypatch.setattr(matching, "reads_values", lambda _: False)
        try:
            for labels in ({}, {"target_labels": target.long(), "pred_labels": pred.int()}):
                matches = match_instances(pred, target, matching=kind, threshold=0.7, min_size=2, **labels)
                found = metrics.plane_metrics(matches)
                assert {tuple(value.shape) for value in found.values()} == {(2, 2)}
                assert metrics.volume_sums(matches, (0.01, 0.02), 1e-3).shape == (2, 2, 3, 5)
        finally:
            monkeypatch.undo()


def test_too_few_rounds_are_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    chain, apart = chain_of_rising_scores(12), torch.zeros_like(chain_of_rising_scores(12))
    apart[..., :3] = 1
    both = torch.cat([chain, apart])
    ids = {"target_labels": both[:, :1], "pred_labels": both[:, 1:]}
    arguments = ids["pred_labels"] > 0, ids["target_labels"] > 0
    exact = instance_metrics(*arguments, **ids)
    for rounds, enough in ((32, True), (12, True), (3, False)):
        monkeypatch.setattr(matching, "ROUNDS", rounds)
        with FixedTables():
            found = instance_metrics(*arguments, **ids)
        assert_close({**found, **{name: exact[name] for name in ("pq", "sq", "rq")}}, exact)
        for name in ("pq", "sq", "rq"):
            assert_close(found[name][1], exact[name][1])
            assert found[name][0].isnan() == (not enough)


@settings(max_examples=EXAMPLES)
@given(scenes(extreme=False), st.data())
def test_size_groups_equal_the_loop(scene: Scene, data: st.DataObject) -> None:
    pred, target = predicted(scene), scene.target.bool()
    edges, voxel_ml = (0.003, 0.005, 0.01), 1e-3
    settings = {"matching": data.draw(st.sampled_from(MATCHINGS)), "threshold": 0.1}
    found = metrics.volume_sums(match_instances(pred, target, **settings), edges, voxel_ml)
    t, q = (reference.connected_components(side)[0] for side in (target, pred))
    for b, c in itertools.product(*map(range, pred.shape[:2])):
        loop = reference.metrics_by_volume(t[b, c], q[b, c], edges, voxel_ml=voxel_ml, **settings)
        rows = [[group[name] for name in metrics.VOLUME_SUMS] for group in loop]
        expected = torch.tensor(rows, dtype=torch.float64)
        assert_close(found[b, c], expected)


@settings(max_examples=EXAMPLES)
@given(scenes(extreme=False), st.data())
def test_invariants(scene: Scene, data: st.DataObject) -> None:
    pred, target = predicted(scene), scene.target
    settings = {"matching": data.draw(st.sampled_from(MATCHINGS)), "threshold": 0.2}
    x = instance_metrics(pred, target, zero_division=1.0, **settings)
    for one, other in (("sen", "fnr"), ("ppv", "fdr")):
        assert_close(x[one] + x[other], torch.ones_like(x[one]))
    low, high = torch.minimum(x["ppv"], x["sen"]), torch.maximum(x["ppv"], x["sen"])
    assert ((x["f1"] >= low - 1e-12) & (x["f1"] <= high + 1e-12)).all()
    assert_close(x["pq"], x["sq"] * x["rq"])
    assert all(((x[name] >= 0) & (x[name] <= 1)).all() for name in ("dsc", "sen", "ppv", "f1", "pq", "sq", "rq"))
    plain = instance_metrics(pred, target, **settings)
    assert (plain["sen"] + plain["fnr"] == (plain["n_target"] > 0)).all()
    assert (plain["ppv"] + plain["fdr"] == (plain["n_pred"] > 0)).all()


@settings(max_examples=EXAMPLES)
@given(scenes(extreme=False), st.sampled_from(MATCHINGS), st.randoms(use_true_random=False))
def test_ids_do_not_matter(scene: Scene, matching: str, random: Any) -> None:
    pred, target = predicted(scene), scene.target != 0
    target_labels, pred_labels = (fastinstance.label(side)[0].long() for side in (target, pred))
    # With a score that decides every pair; equal scores are taken in the order of the ids.
    settings = {"matching": matching, "threshold": 0.7}
    names = [name for name in metrics.METRICS if matching != "overlap" or name not in ("pq", "sq", "rq")]
    expected = instance_metrics(pred, target, **settings)
    ids = list(range(1, 200))
    random.shuffle(ids)
    other = torch.tensor([0, *ids])
    found = instance_metrics(
        pred, target, target_labels=other[target_labels], pred_labels=other[pred_labels] * 7, **settings
    )
    assert_close({name: found[name] for name in names}, {name: expected[name] for name in names})


@pytest.mark.parametrize("name", ["specks", "spiral", "nested", "full", "comb"])
@pytest.mark.parametrize("matching", MATCHINGS)
@pytest.mark.parametrize("shape", [(8, 9), (4, 5, 6)])
def test_a_perfect_prediction(name: str, matching: str, shape: tuple[int, ...]) -> None:
    target = pattern(name, shape)[None, None]
    found = values(target, target, matching=matching)
    number = fastinstance.label(target)[1].item()
    assert [found[metric] for metric in ("dsc", "sen", "ppv", "f1", "pq", "sq", "rq")] == [1] * 7
    assert [found[metric] for metric in ("vol_diff_ml", "vol_diff_percent", "fnr", "fdr")] == [0] * 4
    assert [found[metric] for metric in COUNTS] == [number, number, 0, 0]


SCORES = ("dsc", "sen", "ppv", "f1", "pq", "sq", "rq")


@pytest.mark.parametrize("zero", [0.0, 1.0, math.nan])
def test_empty_sides(zero: float) -> None:
    something, nothing = mask("##.#"), mask("....")
    both = values(nothing, nothing, zero_division=zero)
    assert_close([both[name] for name in SCORES], [zero] * 7)
    error = math.nan if math.isnan(zero) else 0.0
    assert_close([both[name] for name in ("fnr", "fdr", "vol_diff_percent")], [error] * 3)
    missed = values(nothing, something, zero_division=zero)
    assert_close([missed[name] for name in SCORES], [0.0, 0.0, zero, 0.0, 0.0, zero, 0.0])
    assert_close([missed[name] for name in ("fnr", "fdr", "vol_diff_percent")], [1.0, error, -100.0])
    false = values(something, nothing, zero_division=zero)
    assert_close([false[name] for name in SCORES], [0.0, zero, 0.0, 0.0, 0.0, zero, 0.0])
    assert_close([false[name] for name in ("fnr", "fdr", "vol_diff_percent")], [error, 1.0, math.nan])


def test_by_hand() -> None:
    target = mask("##....##", "##....##", "........", "..###...")
    pred = mask("##......", "........", "#.......", "#.###.##")
    found = values(pred, target)
    assert [found[name] for name in COUNTS] == [3, 4, 1, 2]
    expected = {
        "dsc": 2 * 5 / 20,
        "vol_diff_ml": -0.002,
        "vol_diff_percent": -200 / 11,
        "sen": 2 / 3,
        "ppv": 1 / 2,
        "f1": 4 / 7,
        "pq": (2 * 2 / 6 + 1) / 3.5,
        "sq": (2 * 2 / 6 + 1) / 2,
        "rq": 2 / 3.5,
    }
    assert_close({name: found[name] for name in expected}, expected)
    strict = values(pred, target, matching="dice", threshold=2 / 3)
    assert [strict[name] for name in COUNTS] == [3, 4, 2, 3], "a score equal to the threshold is not above it"
    assert values(pred, target, matching="iou", threshold=0.49)["n_missed"] == 1


def test_the_greatest_score_goes_first() -> None:
    target = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0, 2, 2]])[None, None]
    pred = torch.tensor([[1, 1, 0, 0, 3, 3, 3, 3, 3, 0]])[None, None]
    found = values(
        pred > 0, target > 0, target_labels=target, pred_labels=pred, matching="dice", threshold=0, zero_division=0
    )
    # Dice: (1, 3) 6/12, (1, 1) 4/9, (2, 3) 2/7. Taking (1, 3) first leaves 1 and 2 without a partner.
    assert (found["n_missed"], found["n_false"]) == (1, 1)
    assert found["sq"] == pytest.approx(0.5)
    many = values(pred > 0, target > 0, target_labels=target, pred_labels=pred)
    assert (many["n_missed"], many["n_false"]) == (0, 0)


def test_equal_scores_are_taken_in_the_order_of_the_ids() -> None:
    target = torch.tensor([[5, 5, 0, 9, 9]])[None, None]
    pred = torch.tensor([[0, 4, 4, 4, 0]])[None, None]
    both = {"target_labels": target, "pred_labels": pred}
    for kind in MATCHINGS:
        matches = match_instances(pred > 0, target > 0, matching=kind, threshold=0.1, **both)
        assert matches.n[matches.one_to_one].tolist() == [0]


def chain_of_rising_scores(links: int) -> Tensor:
    """Ids [1, 2, 1, X] of target and prediction in which one pair a round can be taken: the last that is left.

    Each instance is as long as the last, and overlaps the next one of the other side more.
    """
    length = 4 * links
    ids = torch.zeros(1, 2, 1, 2 * links * length, dtype=torch.long)
    start = 0
    for instance in range(2 * links):
        ids[:, instance % 2, :, start : start + length] = instance // 2 + 1
        start += length - instance - 1
    return ids


def test_a_chain_of_rising_scores_is_matched_from_its_end() -> None:
    target, pred = chain_of_rising_scores(12).split(1, dim=1)
    settings = {"target_labels": target, "pred_labels": pred, "matching": "dice", "threshold": 0.0}
    assert_close(
        instance_metrics(pred > 0, target > 0, **settings), reference.instance_metrics(pred > 0, target > 0, **settings)
    )


def test_volumes() -> None:
    target, pred = torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 1, 4, 4, 4)
    target[..., :2], pred[..., :3] = 1, 1
    assert values(pred, target, spacing=(2, 3, 0.5))["vol_diff_ml"] == pytest.approx(16 * 3e-3)
    assert values(pred, target, spacing=2)["vol_diff_ml"] == pytest.approx(16 * 8e-3)
    assert values(pred, target)["vol_diff_percent"] == 50
    flat = values(pred[..., 0, :], target[..., 0, :], spacing=(2, 3))
    assert flat["vol_diff_ml"] == pytest.approx(4 * 6e-3), "a slice is 1 mm thick"
    thick = values(pred[..., 0, :], target[..., 0, :], spacing=(5, 2, 3))
    assert thick["vol_diff_ml"] == pytest.approx(4 * 30e-3), "or as thick as the first of three numbers says"


def test_an_instance_at_an_edge_belongs_to_the_upper_group() -> None:
    for edge, voxel in itertools.product(metrics.VOLUME_EDGES, (0.001, 0.0025, 0.0001)):
        assert metrics.least_pixels(edge, voxel) == round(edge / voxel)
    assert metrics.least_pixels(0.05, 0.003) == 17


def test_every_dtype_and_layout() -> None:
    target = pattern("comb", (6, 7)).expand(2, 2, 6, 7)
    pred = pattern("stripes", (6, 7)).expand(2, 2, 6, 7)
    expected = instance_metrics(pred, target)
    for dtype in (torch.uint8, torch.uint16, torch.uint64, torch.int64, torch.float16, torch.bfloat16, torch.float64):
        assert_close(instance_metrics(pred.to(dtype), target.to(dtype)), expected)
    assert_close(instance_metrics(pred.transpose(2, 3), target.transpose(2, 3)), expected)


def test_a_metatensor_gives_plain_tensors() -> None:
    from monai.data.meta_tensor import MetaTensor

    target, pred = mask("##.#"), mask(".#..")
    found = instance_metrics(
        MetaTensor(pred),
        MetaTensor(target),
        pred_labels=MetaTensor(pred.long()),
        target_labels=MetaTensor(target.long()),
    )
    assert {type(value) for value in found.values()} == {Tensor}
    assert_close(found, instance_metrics(pred, target, pred_labels=pred.long(), target_labels=target.long()))
    assert type(fastinstance.volume_ensemble(MetaTensor(pred), MetaTensor(target), spacing=1)) is Tensor


NOT_BINARY = torch.full((1, 1, 3, 3), 0.3)
M = mask("##.", "...", "..#")
WRONG: dict[str, tuple[tuple[Any, Any], dict[str, Any], type[Exception], list[str]]] = {
    "pred is a list": (([1], M), {}, TypeError, ["pred", "tensor", "list"]),
    "target is None": ((M, None), {}, TypeError, ["target", "tensor", "NoneType"]),
    "complex": ((M, M.to(torch.complex64)), {}, TypeError, ["target", "real"]),
    "no channels": ((M[0], M[0]), {}, ValueError, ["pred [B,C,H,W]", "(1, 3, 3)", "add the missing axes"]),
    "no pixels": ((M[..., :0], M[..., :0]), {}, ValueError, ["at least one pixel", "(1, 1, 3, 0)"]),
    "shapes differ": ((M, M[..., :2]), {}, ValueError, ["one shape", "(1, 1, 3, 3)", "(1, 1, 3, 2)"]),
    "devices differ": ((M, M.to("meta")), {}, ValueError, ["target", "device of pred", "meta"]),
    "probabilities": ((NOT_BINARY, M), {}, ValueError, ["pred", "0 and 1", "pred >= 0.5", "pred_labels="]),
    "a mask of 255": ((M, M.byte() * 255), {}, ValueError, ["target", "0 and 1", "target > 0"]),
    "NaN": ((M.float() * math.nan, M), {}, ValueError, ["pred", "0 and 1"]),
    "ids of floats": ((M, M), {"target_labels": M.float()}, TypeError, ["target_labels", "integer", "float32"]),
    "ids of another shape": ((M, M), {"pred_labels": M[..., 1:].long()}, ValueError, ["pred_labels", "like pred"]),
    "negative ids": ((M, M), {"pred_labels": -M.long()}, ValueError, ["pred_labels", "between 0"]),
    "ids elsewhere": (
        (M, M),
        {"pred_labels": (~M).long()},
        ValueError,
        ["pred_labels > 0", "9 pixels", "pred = pred_"],
    ),
    "matching": ((M, M), {"matching": "best"}, ValueError, ["matching", "'overlap', 'iou', 'dice'", "'best'"]),
    "threshold": ((M, M), {"threshold": 1.0}, ValueError, ["threshold in [0, 1)", "1.0"]),
    "zero_division": ((M, M), {"zero_division": 0.5}, ValueError, ["zero_division", "0, 1 or NaN", "0.5"]),
    "min_size": ((M, M), {"min_size": -1}, ValueError, ["min_size", "-1"]),
    "connectivity": ((M, M), {"connectivity": 6}, ValueError, ["connectivity in (4, 8)", "6"]),
    "spacing": ((M, M), {"spacing": (1, 1, 1, 1)}, ValueError, ["spacing", "(1, 1, 1, 1)"]),
    "no spacing": ((M, M), {"spacing": 0}, ValueError, ["spacing", "positive", "0"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_say_what_is_wrong(case: str) -> None:
    arguments, settings, kind, words = WRONG[case]
    with pytest.raises(kind) as caught:
        instance_metrics(*arguments, **settings)
    for word in words:
        assert word in str(caught.value)


def test_labels_may_be_of_any_size() -> None:
    ids = torch.tensor([[2**31 - 1, 0, 7, 7, 0, 3]])[None, None]
    for dtype in (torch.int32, torch.uint32, torch.uint64):
        found = values(ids > 0, ids > 0, target_labels=ids, pred_labels=ids.to(dtype), matching="iou")
        assert (found["n_target"], found["pq"]) == (3, 1)


def _judge(instances: int) -> None:
    target = torch.zeros(1, 1, 40, 40, dtype=torch.bool)
    target.view(-1)[torch.arange(instances) * 80] = True
    matches = match_instances(target, target)
    metrics.plane_metrics(matches)
    metrics.volume_sums(matches, (0.01,), 1e-3)
    fastinstance.volume_ensemble(target, target, spacing=None)


def test_no_python_iteration_over_instances() -> None:
    assert lines_executed(lambda: _judge(3)) == lines_executed(lambda: _judge(19))


@settings(max_examples=max(1, EXAMPLES // 2))
@given(scenes(channels=(2, 2), extreme=False, target_dtypes=(torch.float32,)))
def test_dsc_is_that_of_monai(scene: Scene) -> None:
    from monai.metrics.meandice import compute_dice

    pred = predicted(scene).float()
    found = instance_metrics(pred, scene.target, zero_division=1.0)["dsc"]
    monai = compute_dice(pred.contiguous(), scene.target.contiguous(), ignore_empty=False)
    assert_close(found, monai.double(), atol=1e-6)


@settings(max_examples=EXAMPLES)
@given(scenes(extreme=False, max_batch=1, channels=(1, 1)), st.sampled_from((0.0, 1.0)))
def test_rates_are_those_of_scikit_learn(scene: Scene, zero: float) -> None:
    """Each instance is a sample: a matched pair is a true positive, what is left over an error of its side."""
    from sklearn.metrics import f1_score, precision_score, recall_score

    pred, target = predicted(scene), scene.target
    found = values(pred, target, matching="iou", threshold=0.3, zero_division=zero)
    matched = found["n_target"] - found["n_missed"]
    truth = [1] * matched + [1] * found["n_missed"] + [0] * found["n_false"]
    guess = [1] * matched + [0] * found["n_missed"] + [1] * found["n_false"]
    if not truth:
        return
    assert found["sen"] == pytest.approx(recall_score(truth, guess, zero_division=zero))
    assert found["ppv"] == pytest.approx(precision_score(truth, guess, zero_division=zero))
    assert found["f1"] == pytest.approx(f1_score(truth, guess, zero_division=zero))
    assert found["rq"] == pytest.approx(f1_score(truth, guess, zero_division=zero))
