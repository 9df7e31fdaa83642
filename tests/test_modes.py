"""The soft modes of the terms: equal to the reference, to values worked by hand, and off by default."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastinstance
from fastinstance import functional, reference
from fastinstance.testing import FLOATS, assert_close
from tests.test_terms import ENGINES, Case, cases, check_against_reference, dice, float64, row

EXAMPLES = settings().max_examples
MODES: tuple[dict[str, Any], ...] = (
    {"missed": "soft"},
    {"mask_target": False},
    {"proximity_reduction": "sum"},
    {"weight_by": "size"},
    {"missed": "soft", "missed_weight": 1.5, "mask_target": False, "proximity_reduction": "sum", "weight_by": "size"},
)


def untied(case: Case) -> Case:
    """Softmax rounds equal probabilities apart: no two pixels are equal, so that the largest is the same for all."""
    if "softmax" not in case.options:
        return case
    input = case.scene.input
    noise = torch.rand(input.shape, generator=torch.Generator().manual_seed(0)).to(input.dtype)
    return case._replace(scene=dataclasses.replace(case.scene, input=input + noise / 8))


@st.composite
def moded(draw: st.DrawFn, *, weights: bool = True, **options: Any) -> Case:
    """Cases with the modes."""
    case = untied(draw(cases(**options)))
    case.options.update(draw(st.sampled_from(MODES)))
    if weights and draw(st.booleans()):
        case.options["weight_by"] = torch.sqrt
    return case


@settings(max_examples=2 * EXAMPLES)
@given(moded())
def test_modes_equal_the_reference(case: Case) -> None:
    check_against_reference(case)


@settings(max_examples=EXAMPLES // 2)
@given(moded(dtypes=tuple(dtype for dtype in FLOATS if dtype != torch.float64)))
def test_modes_in_lower_precision(case: Case) -> None:
    if "other_act" in case.options:
        case.options["other_act"] = lambda x: torch.sigmoid(2 * x.float() - 0.5).to(x.dtype)
    check_against_reference(case)


def gradient(function: Any, input: Tensor, target: Tensor, name: str, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = input.clone().requires_grad_()
    value = getattr(function(leaf, target, **options), name)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@ENGINES
def test_missed_and_false_instances_have_a_gradient(engine: Any) -> None:
    """One instance is found, one missed; one prediction is false: the terms by hand, 0.3 and its halves."""
    p, y = row(0.8, 0, 0.2, 0.4, 0.1, 0, 0.9, 0.7), row(1, 0, 1, 1, 1, 0, 0, 0)
    plain = {name: gradient(engine.instance_terms, p, y, name) for name in ("false_gt", "false_pred")}
    soft = {name: gradient(engine.instance_terms, p, y, name, missed="soft") for name in ("false_gt", "false_pred")}
    added = {name: [a - b for a, b in zip(soft[name], plain[name], strict=True)] for name in soft}
    assert_close(added["false_gt"], [float64(0.3 * (1 - 0.4) / 2), row(0, 0, 0, -0.15, 0, 0, 0, 0)])
    assert_close(added["false_pred"], [float64(0.3 * 0.8 / 2), row(0, 0, 0, 0, 0, 0, 0.075, 0.075)])
    assert not plain["false_gt"][1][..., 2:5].any()


@ENGINES
@pytest.mark.parametrize("sigmoid", [False, True])
def test_the_first_of_equal_probabilities_moves(engine: Any, sigmoid: bool) -> None:
    """In raster order, whatever the order in memory."""
    p = row(0.1, 0.3, 0.3, 0.3, 0.2).reshape(1, 1, 5, 1)
    p = torch.cat([p, p.flip(2)], 3)
    y = torch.ones_like(p)
    for input in (p, p.transpose(2, 3).contiguous().transpose(2, 3)):
        _, grad = gradient(
            engine.instance_terms, input.logit() if sigmoid else input, y, "false_gt", missed="soft", sigmoid=sigmoid
        )
        assert grad.nonzero().tolist() == [[0, 0, 1, 0]]


@ENGINES
def test_an_instance_seen_whole(engine: Any) -> None:
    """Without the mask, what lies below the threshold inside of an instance counts, found or not."""
    p, y = row(0.8, 0.3, 0.7, 0, 0.2, 0.4), row(1, 1, 0, 0, 1, 1)
    masked, grad_masked = gradient(engine.instance_terms, p, y, "instance_gt")
    whole, grad = gradient(engine.instance_terms, p, y, "instance_gt", mask_target=False)
    # The instance at x = 0 touches the prediction at x = 0 only: that at x = 2 begins after a gap.
    assert_close(masked, float64((dice(0.8, 0.8, 2) + dice(0, 0, 2)) / 2))
    assert_close(whole, float64((dice(1.1, 1.1, 2) + dice(0.6, 0.6, 2)) / 2))
    assert not grad_masked[..., [1, 4, 5]].any()
    assert (grad[..., [1, 4, 5]] < 0).all()


@pytest.mark.parametrize(("reduction", "rewards"), [("squared", True), ("sum", False)])
def test_what_the_proximity_rewards(reduction: str, rewards: bool) -> None:
    """Eq. 8's squared difference falls when a false positive joins two misses, and lowers hits beside false positives.

    Both instances are hit by one component: nothing about them can be better than more of the same.
    """
    options = {"proximity_reduction": reduction}
    y = torch.zeros(1, 1, 9, 30, dtype=torch.float64)
    y[..., 3:6, 2:5] = y[..., 3:6, 6:9] = 1
    hits = y > 0
    p = torch.full_like(y, 0.01)
    p[..., 3:6, 2:9] = 0.8
    false = p.clone()
    false[..., 4, 14] = 0.9
    _, slope = gradient(functional.instance_terms, false, y, "proximity", **options)
    assert bool((slope[hits] > 0).all()) == rewards
    assert bool((slope[hits] < 0).all()) != rewards

    y[..., :2, 20:24:2] = 1  # missed
    before, _ = gradient(functional.instance_terms, p, y, "proximity", **options)
    after, _ = gradient(functional.instance_terms, false, y, "proximity", **options)
    assert bool(after < before) == rewards


@ENGINES
def test_weights_by_size(engine: Any) -> None:
    p, y = row(0.8, 0, 0.7, 0.9, 0, 0, 0), row(1, 0, 1, 1, 1, 0, 1)
    small, large, lost = dice(0.8, 0.8, 1), dice(1.6, 1.6, 3), dice(0, 0, 1)
    for weight_by, weights in (("count", (1, 1, 1)), ("size", (1, 3, 1)), (lambda size: 2 / size, (2, 2 / 3, 2))):
        found = engine.instance_terms(p, y, weight_by=weight_by)
        total = sum(weights)
        mean = sum(w * v for w, v in zip(weights, (small, large, lost), strict=True)) / total
        assert_close(found.instance_gt, float64(mean))
        assert_close(found.false_gt, float64(weights[2] / total))


@ENGINES
def test_weights_of_nothing(engine: Any) -> None:
    """All weights 0: the mean is 0 and connected."""
    p, y = row(0.8, 0, 0.7), row(1, 0, 0)
    leaf = p.requires_grad_()
    found = engine.instance_terms(leaf, y, weight_by=torch.zeros_like)
    for name in ("instance_gt", "instance_pred", "false_gt", "false_pred"):
        assert getattr(found, name) == 0
        assert getattr(found, name).requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"missed": "hard"}, "expected missed to be one of 'none', 'soft', got 'hard'"),
        ({"missed_weight": -0.1}, "expected missed_weight to be a finite number >= 0, got -0.1"),
        ({"missed_weight": 0.5}, "expected missed='soft' with a missed_weight, got missed='none', missed_weight=0.5"),
        ({"proximity_reduction": "mean"}, "expected proximity_reduction to be one of 'squared', 'sum', got 'mean'"),
        ({"weight_by": "volume"}, "expected weight_by to be one of 'count', 'size', got 'volume'"),
        ({"weight_by": torch.sum}, "expected weight_by to return one weight for each of 2 sizes, got shape"),
        ({"weight_by": torch.neg}, "expected weight_by to return finite weights >= 0"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    p, y = row(0.8, 0, 0.7), row(1, 0, 1)
    with pytest.raises(ValueError, match=message):
        fastinstance.InstanceLoss(instance_gt=1.0, **options)(p, y)


def test_the_preset() -> None:
    """`DetectionLoss` is the pixel loss with both false rates and the soft terms; each part can be set."""
    p, y = row(0.8, 0, 0.2, 0.4, 0.1, 0, 0.9, 0.7), row(1, 0, 1, 1, 1, 0, 0, 0)
    terms = functional.instance_terms(p, y, missed="soft")
    assert_close(fastinstance.DetectionLoss()(p, y), terms.seg + terms.false_gt + terms.false_pred)
    loss = fastinstance.DetectionLoss(seg=2, false_gt=0, missed_weight=0.1, pixel_loss="dice")
    expected = reference.instance_terms(p, y, pixel_loss="dice", missed="soft", missed_weight=0.1)
    assert_close(loss(p, y), 2 * expected.seg + expected.false_pred)
    assert "missed='soft'" in repr(loss)


def test_modes_are_off_by_default() -> None:
    p, y = row(0.8, 0, 0.2, 0.4, 0.1, 0, 0.9, 0.7), row(1, 0, 1, 1, 1, 0, 0, 0)
    off = {"missed": "none", "mask_target": True, "proximity_reduction": "squared", "weight_by": "count"}
    assert_close(functional.instance_terms(p, y), functional.instance_terms(p, y, **off), rtol=0, atol=0)


def test_the_soft_terms_have_their_exact_derivative() -> None:
    """Against finite differences: on missed and false instances the rest of the false rates is flat."""
    y = torch.zeros(1, 1, 6, 12, dtype=torch.float64)
    y[..., 1:3, 1:4] = 1
    generator = torch.Generator().manual_seed(0)
    logits = -0.5 - torch.rand(y.shape, generator=generator, dtype=torch.float64)
    logits[..., 3:5, 7:10] *= -1

    def rates(logits: Tensor) -> Tensor:
        found = functional.instance_terms(logits, y, sigmoid=True, missed="soft", missed_weight=2.0)
        return torch.stack([found.false_gt, found.false_pred])

    def smooth(logits: Tensor) -> Tensor:
        """The same without the Dice losses, whose derivative is there without a value."""
        plain = functional.instance_terms(logits, y, sigmoid=True)
        return rates(logits) - torch.stack([plain.false_gt, plain.false_pred])

    assert torch.autograd.gradcheck(smooth, (logits.requires_grad_(),))


@pytest.mark.filterwarnings("ignore:instance_loss=plain_dice is called on :UserWarning")
def test_any_callable_sees_whole_instances() -> None:
    """A loss that is called on masked images has the mode as well."""
    p, y = row(0.8, 0.3, 0.7, 0, 0.2, 0.4), row(1, 1, 0, 0, 1, 1)

    def plain_dice(P: Tensor, G: Tensor) -> Tensor:
        return 1 - (2 * (P * G).sum() + 1e-5) / (P.sum() + G.sum() + 1e-5)

    found = gradient(functional.instance_terms, p, y, "instance_gt", mask_target=False, instance_loss=plain_dice)
    assert_close(found, gradient(functional.instance_terms, p, y, "instance_gt", mask_target=False))
