"""Voronoi regions, CC loss and the losses of components equal their loop references, and values worked by hand."""

from __future__ import annotations

import builtins
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastinstance
from fastinstance import reference
from fastinstance.testing import FLOATS, assert_close, pattern, scenes
from tests.test_modes import untied
from tests.test_terms import Case, cases, dice, float64, row

EXAMPLES = settings().max_examples


@settings(max_examples=2 * EXAMPLES)
@given(scenes(labels=True, spacing=True, channels=(1, 2)), st.booleans())
def test_regions_equal_the_reference(scene: Any, components: bool) -> None:
    """Ids of components, or drawn ones that may touch; ties included."""
    labels = fastinstance.label(scene.target)[0] if components or scene.target_labels is None else scene.target_labels
    found = fastinstance.voronoi(labels, scene.spacing)
    assert found.dtype == labels.dtype
    for b, c in reference.batch_and_channel(labels):
        assert torch.equal(found[b, c], reference.voronoi(labels[b, c], scene.spacing))


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (2.5, 0.7)])
def test_regions_are_nearest_by_the_exact_transform(spacing: tuple[float, float]) -> None:
    """Every pixel is as far from its own component as SciPy's transform says that the nearest is."""
    from scipy.ndimage import distance_transform_edt

    labels, _ = fastinstance.label(torch.rand(1, 1, 60, 83, generator=torch.Generator().manual_seed(0)) > 0.97)
    regions = fastinstance.voronoi(labels, spacing)
    nearest = distance_transform_edt(labels[0, 0].numpy() == 0, spacing)
    own = np.full((60, 83), np.inf)
    for k in range(1, int(labels.max()) + 1):
        distance = distance_transform_edt(labels[0, 0].numpy() != k, spacing)
        own = np.where(regions[0, 0].numpy() == k, distance, own)
    np.testing.assert_allclose(own, nearest, rtol=1e-12)


def test_regions_on_a_line() -> None:
    """The pixel in the middle belongs to the first of its neighbours; no region reaches into another plane."""
    labels = torch.tensor([[0, 7, 0, 0, 0, 3, 0], [0, 0, 0, 0, 0, 0, 0]])[:, None, None]
    assert fastinstance.voronoi(labels).tolist() == [[[[7, 7, 7, 7, 3, 3, 3]]], [[[0] * 7]]]


@pytest.mark.parametrize(
    ("labels", "spacing", "error", "message"),
    [
        ([[1]], None, TypeError, "expected labels to be a tensor, got list"),
        (torch.zeros(1, 1, 2, 2), None, TypeError, "expected labels of an integer dtype, got torch.float32"),
        (torch.zeros(2, 2, dtype=torch.int32), None, ValueError, r"expected labels \[B,C,H,W\]"),
        (torch.full((1, 1, 2, 2), -1), None, ValueError, "expected labels >= 0, got -1; 0 is background"),
        (torch.zeros(1, 1, 2, 2, dtype=torch.int32), (1, 2, 3), ValueError, "expected spacing to be a positive number"),
    ],
)
def test_errors_of_voronoi(labels: Any, spacing: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastinstance.voronoi(labels, spacing)


def test_regions_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("scipy"):
            raise ImportError(name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match="pip install scipy, or pass regions computed elsewhere as target_regions="):
        fastinstance.voronoi(torch.ones(1, 1, 2, 2, dtype=torch.int32))


CC_OPTIONS = ("average", "connectivity", "spacing", "pixel_loss", "reduction")
IMAGE_OPTIONS = ("include_background", "to_onehot_y", "sigmoid", "softmax", "other_act")


@st.composite
def cc_cases(draw: st.DrawFn, **options: Any) -> Case:
    """Cases of CC loss, half of them with drawn regions, in which 0 belongs to none."""
    case = draw(cases(**options))
    kept = {name: case.options[name] for name in CC_OPTIONS + IMAGE_OPTIONS if name in case.options}
    if draw(st.booleans()):
        seed = draw(st.integers(0, 100))
        shape, few = case.scene.input.shape, draw(st.sampled_from((1, 3, 9)))
        ids = torch.randint(few, shape, generator=torch.Generator().manual_seed(seed))
        kept["target_regions"] = ids * draw(st.sampled_from((1, 100_003)))
    return Case(case.scene, kept)


def value_and_gradient(function: Any, case: Case, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    leaf = case.scene.leaf() if dtype is None else case.scene.input.detach().to(dtype).requires_grad_()
    value = function(leaf, case.scene.target)
    upstream = torch.linspace(1, 2, value.numel()).to(value).view_as(value)
    return value.detach(), torch.autograd.grad(value, leaf, upstream)[0]


def check_module(module: Any, function: Any, case: Case, call: dict[str, Any]) -> None:
    """A module with the case's options equals the loop reference in value and gradient."""
    loss = module(**case.options)
    found = value_and_gradient(lambda x, y: loss(x, y, **call), case)
    expected = value_and_gradient(lambda x, y: function(x, y, **case.options, **call), case, torch.float64)
    for got, want in zip(found, expected, strict=True):
        wide = case.scene.input.dtype == torch.float64
        tolerances = {} if wide else {"relative_to": "largest", "atol": 1e-5 * (1 + float(expected[0].abs().amax()))}
        assert_close(got, want, **tolerances)


def check_cc(case: Case) -> None:
    images = {name: value for name, value in case.scene.kwargs.items() if value is not None}
    if (regions := case.options.pop("target_regions", None)) is not None:
        images["target_regions"] = regions
    check_module(fastinstance.CCLoss, reference.cc_loss, case, images)


@settings(max_examples=EXAMPLES)
@given(cc_cases())
def test_cc_loss_equals_the_reference(case: Case) -> None:
    check_cc(case)


@settings(max_examples=EXAMPLES // 3)
@given(cc_cases(dtypes=tuple(dtype for dtype in FLOATS if dtype != torch.float64)))
def test_cc_loss_in_lower_precision(case: Case) -> None:
    if "other_act" in case.options:
        case.options["other_act"] = lambda x: torch.sigmoid(2 * x.float() - 0.5).to(x.dtype)
    check_cc(case)


def test_cc_loss_by_hand() -> None:
    """Two components and a false positive; the regions are x < 4 and x >= 4. An empty plane is one region."""
    p, y = row(0.8, 0, 0.3, 0, 0.1, 0.6, 0, 0), row(1, 0, 0, 0, 0, 0, 1, 1)
    both = [dice(0.8, 1.1, 1), dice(0, 0.7, 2)]
    loss = fastinstance.CCLoss(pixel_loss="dice")
    assert_close(loss(p, y), float64(sum(both) / 2))
    two, empty = torch.cat([p, p]), torch.cat([y, 0 * y])
    each = {"instance": (sum(both) + dice(0, 1.8, 0)) / 3, "image": (sum(both) / 2 + dice(0, 1.8, 0)) / 2}
    for average, want in each.items():
        assert_close(fastinstance.CCLoss(pixel_loss="dice", average=average)(two, empty), float64(want))


def test_cc_loss_takes_regions_as_labels() -> None:
    """Regions computed beforehand give the same; they are not computed again."""
    target = pattern("specks", (12, 40))[None, None]
    logits = torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    regions = fastinstance.voronoi(fastinstance.label(target)[0])
    loss = fastinstance.CCLoss(sigmoid=True)
    assert torch.equal(loss(logits, target), loss(logits, target, target_regions=regions))
    valid = {"valid_mask": torch.rand(target.shape) > 0.3}
    expected = loss(logits, target, target_regions=regions, **valid)
    for dtype in (torch.uint8, torch.uint16, torch.uint32, torch.uint64):
        assert torch.equal(loss(logits, target, target_regions=regions.to(dtype), **valid), expected)
        assert torch.equal(fastinstance.voronoi(regions.to(dtype)), regions.to(dtype))
    one = fastinstance.DiceCELoss(sigmoid=True)(logits, target)
    assert_close(loss(logits, target, target_regions=torch.ones_like(regions)), one)


def test_large_segments() -> None:
    """Regions that begin in one block of the sums and end in another."""
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(3, 1, 300, 1000, generator=generator) > 0.9
    logits = torch.randn(target.shape, generator=generator, dtype=torch.float64)
    regions = torch.ones_like(target, dtype=torch.int64)
    regions[1, :, 150:] = 2
    parts = [logits[0], logits[1, :, :150], logits[1, :, 150:], logits[2]]
    truths = [target[0], target[1, :, :150], target[1, :, 150:], target[2]]
    single = fastinstance.DiceCELoss(sigmoid=True)
    values = torch.stack([single(x[None], y[None]) for x, y in zip(parts, truths, strict=True)])
    assert_close(fastinstance.CCLoss(sigmoid=True)(logits, target, target_regions=regions), values.mean())


@pytest.mark.parametrize(
    ("regions", "error", "message"),
    [
        (3, TypeError, "expected target_regions to be a tensor, got int"),
        (torch.ones(1, 1, 2, 2), TypeError, "expected target_regions of an integer dtype, got torch.float32"),
        (torch.ones(1, 2, 2, dtype=torch.int32), ValueError, r"expected target_regions \[B,C,\*S\] = \(1, 1, 2, 2\)"),
        (torch.ones(1, 1, 2, 2, dtype=torch.int32, device="meta"), ValueError, "on the device of input, cpu, got meta"),
        (
            torch.full((1, 1, 2, 2), -1),
            ValueError,
            "expected target_regions between 0 and 2147483647, got values from -1",
        ),
        (torch.full((1, 1, 2, 2), 2**40), ValueError, "to 1099511627776; 0 is background"),
    ],
)
def test_errors_of_regions(regions: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastinstance.CCLoss()(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), target_regions=regions)


ALL_OPTIONS = (*IMAGE_OPTIONS, "connectivity", "min_size", "reduction")
LOSSES: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "tversky": (
        fastinstance.ComponentTverskyLoss,
        {},
        lambda batch, average, reduction: reference.reduce_planes(
            reference.per_plane(batch, reference.component_tversky), reduction
        ),
    ),
    "tversky with options": (
        fastinstance.ComponentTverskyLoss,
        {"alpha": 1.0, "beta": 0.2, "gamma": 0.5, "size_offset": 0.0, "background_weight": 2.0, "smooth": 0.1},
        lambda batch, average, reduction: reference.reduce_planes(
            reference.per_plane(
                batch,
                lambda plane: reference.component_tversky(
                    plane, alpha=1.0, beta=0.2, gamma=0.5, size_offset=0.0, background_weight=2.0, smooth=0.1
                ),
            ),
            reduction,
        ),
    ),
    "mil": (
        fastinstance.ComponentMILLoss,
        {},
        lambda batch, average, reduction: reference.mean_of_components(
            batch, reference.component_mil, average, reduction
        ),
    ),
    "recall": (
        fastinstance.LesionRecallLoss,
        {"false_positive": 0.5},
        lambda batch, average, reduction: (
            reference.mean_of_components(batch, reference.lesion_recall, average, reduction)
            + 0.5 * reference.mean_of_components(batch, reference.false_part, average, reduction)
        ),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=EXAMPLES // 2)
@given(data=st.data())
def test_losses_of_components_equal_the_reference(name: str, data: st.DataObject) -> None:
    module, options, oracle = LOSSES[name]
    lower = data.draw(st.sampled_from((False, False, True)))
    case = untied(data.draw(cases(dtypes=(torch.float32, torch.bfloat16) if lower else (torch.float64,))))
    if lower and "other_act" in case.options:
        case.options["other_act"] = lambda x: torch.sigmoid(2 * x.float() - 0.5).to(x.dtype)
    average, reduction = case.options["average"], case.options["reduction"]
    kept = {key: case.options[key] for key in ALL_OPTIONS if key in case.options}
    images = {key: value for key, value in case.scene.kwargs.items() if value is not None}
    defaults = {"include_background": True, "to_onehot_y": False, "sigmoid": False, "softmax": False, "other_act": None}
    read = {**defaults, "target_labels": None, "valid_mask": None, "threshold": 0.5, **kept, **images}
    read.pop("reduction")

    def expected(input: Tensor, target: Tensor) -> Tensor:
        return oracle(reference.planes_of(input, target, **read), average, reduction)

    loss = module(**options, **kept, **({} if "tversky" in name else {"average": average}))
    found = value_and_gradient(lambda x, y: loss(x, y, **images), case)
    want = value_and_gradient(expected, case, torch.float64)
    scale = 1e-5 * (1 + float(want[0].abs().amax()))
    for got, value in zip(found, want, strict=True):
        assert_close(got, value, **({"relative_to": "largest", "atol": scale} if lower else {}))


def test_losses_of_components_by_hand() -> None:
    p, y = row(0.8, 0.5, 0.2, 0.25, 0, 0.75, 0, 0), row(1, 1, 0, 1, 0, 0, 0, 1)
    # Components of 2, 1 and 1 pixels; predicted are {0, 1} and {5}.
    assert_close(fastinstance.LesionRecallLoss()(p, y), float64(1 - (0.65 + 0.25 + 0) / 3 + (0 + 0.75) / 2))
    mil = -(np.log(0.8) + np.log(0.25) + np.log(1e-7)) / 3
    assert_close(fastinstance.ComponentMILLoss()(p, y), float64(mil))
    hit, false, missed = 1.3 / 7 + 0.25 / 6, 0.1 * 0.95, 0.7 / 7 + 1.75 / 6
    tversky = 1 - (hit + 1e-5) / (hit + 0.3 * false + 0.7 * missed + 1e-5)
    assert_close(fastinstance.ComponentTverskyLoss()(p, y), float64(tversky))


def test_a_missed_component_is_pulled_up() -> None:
    """Where the released term has no gradient: at the most likely pixel of each component, and nowhere else."""
    p, y = row(0.8, 0.9, 0, 0.1, 0.2, 0.1), row(1, 1, 0, 1, 1, 1)
    leaf = p.requires_grad_()
    (grad,) = torch.autograd.grad(fastinstance.ComponentMILLoss()(leaf, y), leaf)
    assert_close(grad, row(0, -0.5 / 0.9, 0, 0, -0.5 / 0.2, 0))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nan_is_not_lost(name: str, reduction: str) -> None:
    """Not in a plane without a component either."""
    module, options, _ = LOSSES[name]
    x, y = torch.zeros(2, 1, 3, 4) - 1, torch.zeros(2, 1, 3, 4)
    y[0, 0, 1, 1] = 1
    x[1, 0, 2, 2] = float("nan")
    value = module(**options, sigmoid=True, reduction=reduction)(x, y)
    assert value.isnan().flatten().tolist() == ([False, True] if reduction == "none" else [True])


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (fastinstance.ComponentTverskyLoss, {"gamma": -1.0}, "expected gamma to be a finite number >= 0, got -1.0"),
        (
            fastinstance.LesionRecallLoss,
            {"recall": float("inf")},
            "expected recall to be a finite number >= 0",
        ),
        (fastinstance.ComponentMILLoss, {"average": "plane"}, "expected average to be one of 'instance', 'image'"),
    ],
)
def test_errors_of_settings(module: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_a_callable_knows_no_regions() -> None:
    with pytest.raises(TypeError, match="expected pixel_loss of CCLoss to be a name or a pixel loss of fastinstance"):
        fastinstance.CCLoss(pixel_loss=lambda P, G: (P - G).square().mean())


def test_inverse_weighted_dice_per_component() -> None:
    """Kundu 2026: the weights of a component are those of its own region."""
    p, y = row(0.8, 0, 0.3, 0, 0.1, 0.6, 0, 0), row(1, 0, 0, 0, 0, 0, 1, 1)

    def alone(p: Tensor, y: Tensor) -> Tensor:
        return fastinstance.InverseWeightedDiceLoss()(p, y)

    found = fastinstance.CCLoss(pixel_loss="inverse_weighted_dice")(p, y)
    assert_close(found, (alone(p[..., :4], y[..., :4]) + alone(p[..., 4:], y[..., 4:])) / 2)


PEER = """
import torch, fastinstance
from fastinstance.testing import pattern
generator = torch.Generator().manual_seed(0)
target = torch.rand(1, 1, 12, 14, 16, generator=generator) > 0.99
for axis in (2, 3, 4):
    target |= target.roll(1, axis)
predicted = target.roll(1, 3) | (torch.rand(target.shape, generator=generator) > 0.995)
ours = 1 - fastinstance.CCLoss(pixel_loss=fastinstance.DiceLoss(smooth_nr=0, smooth_dr=0))(predicted.double(), target)
from CCMetrics import CCDiceMetric  # turns gradients off for the whole process
metric = CCDiceMetric(cc_reduction="patient", use_caching=False)
# Axes in reverse: so it chooses among equally near components as we do.
one_hot = [torch.cat([~mask, mask], 1).permute(0, 1, 4, 3, 2).float() for mask in (predicted, target)]
metric(*one_hot)
assert fastinstance.label(target)[1] > 5
torch.testing.assert_close(ours.item(), float(metric.cc_aggregate().mean()), rtol=1e-6, atol=0)
"""


@pytest.mark.skipif(importlib.util.find_spec("CCMetrics") is None, reason="needs CCMetrics (pip install CCMetrics)")
def test_cc_loss_equals_cc_metrics() -> None:
    """On binary predictions the CC loss of Dice is 1 - CC-Dice of the metric's authors."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", PEER], check=True, cwd=Path(__file__).parent.parent)
