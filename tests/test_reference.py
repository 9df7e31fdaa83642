"""The loop reference against arithmetic done by hand, MONAI, scipy, kornia and the authors' own values."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from fastinstance.reference import (
    Box,
    blob_terms,
    connected_components,
    distance_iou_loss,
    image_from_probabilities,
    instance_terms,
    pixel_loss,
)

E = 1e-5  # the smoothing of every loss below
EMPTY = 1 - E / (1 + E)  # Dice loss of an empty image against one pixel
GOLDEN = Path(__file__).parent / "golden"


def line(*values: float) -> Tensor:
    """A plane of one row, `[1, 1, 1, n]`."""
    return torch.tensor(values, dtype=torch.float64).reshape(1, 1, 1, -1)


def grid(*rows: tuple[float, ...]) -> Tensor:
    """A plane `[1, 1, H, W]`."""
    return torch.tensor(rows, dtype=torch.float64)[None, None]


def spots(shape: tuple[int, ...], values: dict[tuple[int, ...], float]) -> Tensor:
    """A plane `[1, 1, *shape]` of zeros with the given pixels."""
    x = torch.zeros(shape, dtype=torch.float64)
    for pixel, value in values.items():
        x[pixel] = value
    return x[None, None]


def gradient(value: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(value, x, retain_graph=True)[0]


def scene(seed: int, *shape: int, density: float = 0.2) -> tuple[Tensor, Tensor]:
    """Logits and target in which instances are hit, missed, joined and false."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(shape, generator=generator, dtype=torch.float64) < density
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (2.0 * target - 1.3 + noise).requires_grad_(), target


# One predicted instance joins the two true ones, a second one is false:
#   target   1  0  1  0  0  0    instances n1 = {0}, n2 = {2}
#   p       .9 .8 .7  0  0 .6    instances m1 = {0, 1, 2}, m2 = {5}
L_GT = [
    1 - (2 * 0.9 + E) / (0.9 + 0.8 + 1 + E),  # n1 sees m1 without the pixel of n2
    1 - (2 * 0.7 + E) / (0.8 + 0.7 + 1 + E),  # n2 sees m1 without the pixel of n1
]
L_P = [
    1 - (2 * (0.9 + 0.7) + E) / (0.9 + 0.8 + 0.7 + 2 + E),  # m1 against n1 and n2
    1 - E / (0.6 + E),  # m2 against nothing
]


def bridge() -> tuple[Tensor, Tensor]:
    return line(0.9, 0.8, 0.7, 0, 0, 0.6).requires_grad_(), line(1, 0, 1, 0, 0, 0)


def test_instance_losses():
    terms = instance_terms(*bridge())
    assert terms.instance_gt.item() == pytest.approx(sum(L_GT) / 2, abs=1e-14)
    assert terms.instance_pred.item() == pytest.approx(sum(L_P) / 2, abs=1e-14)


def test_predicted_instance_is_compared_with_all_of_what_it_touches():
    terms = instance_terms(line(0.9, 0.2, 0.1, 0), line(1, 1, 1, 0))
    expected = 1 - (2 * 0.9 + E) / (0.9 + 3 + E)
    assert terms.instance_pred.item() == pytest.approx(expected, abs=1e-14)
    assert terms.instance_gt.item() == pytest.approx(expected, abs=1e-14)


def test_instance_losses_with_a_pointwise_loss():
    terms = instance_terms(*bridge(), instance_loss="ce")
    n1 = -math.log(0.9) - math.log(1 - 0.8)
    n2 = -math.log(0.7) - math.log(1 - 0.8)
    m1 = -math.log(0.9) - math.log(0.7) - math.log(1 - 0.8)
    m2 = -math.log(1 - 0.6)
    assert terms.instance_gt.item() == pytest.approx((n1 + n2) / 6 / 2, abs=1e-14)
    assert terms.instance_pred.item() == pytest.approx((m1 + m2) / 6 / 2, abs=1e-14)


def test_masked_out_pixels_have_probability_zero():
    # The pixel of the missed instance is not predicted: φ(0, 1) = -log 1e-7, and the others φ(0, 0) = 0.
    logits = line(-1.0, -9.0, 2.0)
    terms = instance_terms(logits, line(1, 0, 0), sigmoid=True, instance_loss="focal")
    assert terms.instance_gt.item() == pytest.approx(-math.log(1e-7) / 3, abs=1e-14)


def test_seg():
    seg = instance_terms(*bridge(), pixel_loss="dice").seg
    assert seg.item() == pytest.approx(1 - (2 * 1.6 + E) / (3.0 + 2 + E), abs=1e-14)


def test_false_rates():
    terms = instance_terms(*bridge())
    assert terms.false_gt.item() == 0
    assert terms.false_pred.item() == 1 / 2
    terms = instance_terms(line(0.9, 0, 0, 0, 0.1, 0), line(1, 0, 1, 0, 1, 0))
    assert terms.false_gt.item() == 2 / 3
    assert terms.false_pred.item() == 0


def test_center():
    # Boxes of three: n1 at 0 -> {0, 1}, n2 at 2 -> {1, 2, 3}; m1 at 1 -> {0, 1, 2}, m2 at 5 -> {4, 5}.
    center = instance_terms(*bridge()).center
    assert center.item() == pytest.approx(1 - (2 * 3 + E) / (5 + 4 + E), abs=1e-14)
    # Boxes of one pixel: {0, 2} and {1, 5}.
    center = instance_terms(*bridge(), center_size=1).center
    assert center.item() == pytest.approx(1 - E / (2 + 2 + E), abs=1e-14)


def test_center_of_even_size_and_half_way_centroid():
    # The target has rows 0 and 1: their mean 0.5 rounds up to 1, and two rows from 1 - 1 on are 0 and 1.
    y = grid((1, 0, 0), (1, 0, 0), (0, 0, 0))
    p = grid((0, 0, 0), (0, 0, 0), (0.8, 0, 0))  # two rows from 2 - 1 on: 1 and 2
    center = instance_terms(p, y, center_size=(2, 1)).center
    assert center.item() == pytest.approx(1 - (2 * 1 + E) / (2 + 2 + E), abs=1e-14)


def test_center_with_focal_loss_sees_probabilities():
    # Boxes of one: the maps are 1 in {0} and in {0, 2}; where 1 stands against 0, the cost is -log(1e-7).
    center = instance_terms(line(0.9, 0, 0.8), line(1, 0, 0), center_size=1, center_loss="focal").center
    assert center.item() == pytest.approx(-math.log(1e-7) / 3, abs=1e-12)


def test_proximity():
    # Boxes along the row: n1 [0, 1), n2 [2, 3), m1 [0, 3), m2 [5, 6); all are [0, 1) across it.
    near = 1 - 1 / 3 + (1.5 - 0.5) ** 2 / (3**2 + 1)  # n1 or n2 with m1
    far = 1 + (5.5 - 2.5) ** 2 / (4**2 + 1)  # m2 with n2, which is nearer than n1
    sum_gt = near * L_GT[0] + near * L_GT[1]
    sum_pred = near * L_P[0] + far * L_P[1]
    proximity = instance_terms(*bridge()).proximity
    assert proximity.item() == pytest.approx((sum_pred - sum_gt) ** 2, abs=1e-14)


def test_proximity_with_spacing():
    # The row is 5 thick and its pixels are 2 wide.
    near = 1 - 1 / 3 + (2 * (1.5 - 0.5)) ** 2 / ((2 * 3) ** 2 + 5**2)
    far = 1 + (2 * (5.5 - 2.5)) ** 2 / ((2 * 4) ** 2 + 5**2)
    sum_gt = near * L_GT[0] + near * L_GT[1]
    sum_pred = near * L_P[0] + far * L_P[1]
    proximity = instance_terms(*bridge(), spacing=(5.0, 2.0)).proximity
    assert proximity.item() == pytest.approx((sum_pred - sum_gt) ** 2, abs=1e-14)


def test_distance_iou():
    # 2x2x2 and 4x2x2 share 1x2x2; the centres are (1, 1, 1) and (3, 1, 1); 5x2x2 encloses both.
    a, b = Box((0, 0, 0), (2, 2, 2)), Box((1, 0, 0), (5, 2, 2))
    assert distance_iou_loss(a, b) == pytest.approx(1 - 4 / (8 + 16 - 4) + 4 / (25 + 4 + 4), abs=1e-15)
    assert distance_iou_loss(a, a) == 0


def test_blob():
    terms = blob_terms(*bridge(), pixel_loss="dice")
    n1 = 1 - (2 * 0.9 + E) / (0.9 + 0.8 + 0.6 + 1 + E)  # everything but n2, the false m2 included
    n2 = 1 - (2 * 0.7 + E) / (0.8 + 0.7 + 0.6 + 1 + E)
    assert terms.blob.item() == pytest.approx((n1 + n2) / 2, abs=1e-14)
    assert terms.seg.item() == pytest.approx(1 - (2 * 1.6 + E) / (3.0 + 2 + E), abs=1e-14)


def test_blob_averages_over_planes_with_instances():
    p, y = (torch.cat([x, torch.zeros_like(x), x.flip(-1)]) for x in bridge())
    one = blob_terms(*bridge(), pixel_loss="ce", instance_loss="dice").blob.item()
    blob = blob_terms(p, y, pixel_loss="ce", instance_loss="dice").blob
    assert blob.item() == pytest.approx(one, abs=1e-14)
    rows = blob_terms(p, y, pixel_loss="ce", instance_loss="dice", reduction="none").blob
    assert rows.flatten().tolist() == pytest.approx([one, 0, one], abs=1e-14)
    blob = blob_terms(p, y, pixel_loss="ce", instance_loss="dice", reduction="sum").blob
    assert blob.item() == pytest.approx(2 * one, abs=1e-14)


def test_blob_without_any_instance():
    p = line(0.9, 0.2).requires_grad_()
    blob = blob_terms(p, line(0, 0)).blob
    assert blob.item() == 0
    assert torch.equal(gradient(blob, p), torch.zeros_like(p))


def test_a_volume():
    flat = instance_terms(*bridge())
    volume = instance_terms(*(x.detach().reshape(1, 1, 1, 6, 1) for x in bridge()))
    assert volume[:6] == flat[:6]
    # Only the diagonal of the enclosing box sees the third dimension.
    near = 1 - 1 / 3 + 1 / (3**2 + 1 + 1)
    far = 1 + 3**2 / (4**2 + 1 + 1)
    sum_gt = near * L_GT[0] + near * L_GT[1]
    sum_pred = near * L_P[0] + far * L_P[1]
    assert volume.proximity.item() == pytest.approx((sum_pred - sum_gt) ** 2, abs=1e-14)


def two_planes() -> tuple[Tensor, Tensor]:
    """The bridge, and a plane without ground truth and with one predicted instance of 0.5."""
    p, y = bridge()
    return torch.cat([p, line(0, 0, 0.5, 0, 0, 0)]), torch.cat([y, torch.zeros_like(y)])


LONE = 1 - E / (0.5 + E)  # the loss of that instance against nothing, on either side


@pytest.mark.parametrize(
    ("options", "gt", "pred"),
    [
        ({}, (sum(L_GT) + LONE) / 3, (sum(L_P) + LONE) / 3),
        ({"average": "image"}, (sum(L_GT) / 2 + LONE) / 2, (sum(L_P) / 2 + LONE) / 2),
        ({"reduction": "sum"}, sum(L_GT) / 2 + LONE, sum(L_P) / 2 + LONE),
        ({"reduction": "none"}, [[sum(L_GT) / 2], [LONE]], [[sum(L_P) / 2], [LONE]]),
    ],
)
def test_averages(options: dict[str, Any], gt: Any, pred: Any):
    terms = instance_terms(*two_planes(), **options)
    np.testing.assert_allclose(terms.instance_gt.detach(), gt, atol=1e-14)
    np.testing.assert_allclose(terms.instance_pred.detach(), pred, atol=1e-14)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, sum(L_P) / 1),
        ({"average": "image"}, sum(L_P) / 1),
        ({"reduction": "none"}, [[sum(L_P) / 1]]),
    ],
)
def test_pred_normalizer_gt_divides_by_the_ground_truth(options: dict[str, Any], expected: Any):
    p = line(0.9, 0.8, 0.7, 0, 0, 0.6)
    terms = instance_terms(p, line(1, 1, 1, 0, 0, 0), pred_normalizer="gt", **options)
    m1 = 1 - (2 * 2.4 + E) / (2.4 + 3 + E)
    m2 = L_P[1]
    np.testing.assert_allclose(terms.instance_pred, np.asarray(expected) * (m1 + m2) / sum(L_P), atol=1e-14)


def test_pred_normalizer_gt_over_the_batch():
    p, y = two_planes()
    y = torch.cat([line(1, 1, 1, 0, 0, 0), y[1:]])
    total = (1 - (2 * 2.4 + E) / (2.4 + 3 + E)) + L_P[1] + LONE
    by_instance = instance_terms(p, y, pred_normalizer="gt").instance_pred
    by_image = instance_terms(p, y, pred_normalizer="gt", average="image").instance_pred
    assert by_instance.item() == pytest.approx(total / 2, abs=1e-14)
    assert by_image.item() == pytest.approx((total - LONE + LONE) / 2, abs=1e-14)


def test_terms_of_planes_reduce():
    p, y = two_planes()
    for name in ("center", "false_gt", "false_pred", "proximity", "seg"):
        rows = getattr(instance_terms(p, y, reduction="none"), name)
        first = getattr(instance_terms(p[:1], y[:1]), name)
        second = getattr(instance_terms(p[1:], y[1:]), name)
        assert rows.shape == (2, 1)
        torch.testing.assert_close(rows.flatten(), torch.stack([first, second]))
        torch.testing.assert_close(getattr(instance_terms(p, y), name), rows.mean())
        torch.testing.assert_close(getattr(instance_terms(p, y, reduction="sum"), name), rows.sum())


def test_empty_prediction_and_target():
    # ℓ(0, 0) = 0 for Dice; for Tversky with smooth_nr = 0 it is 1.
    p = spots((5, 5), {(1, 1): 0.2}).requires_grad_()
    terms = instance_terms(p, torch.zeros_like(p), pixel_loss="dice")
    assert [x.item() for x in terms[1:]] == [0, 0, 0, 0, 0, 0]
    for value in terms[1:]:
        assert torch.equal(gradient(value, p), torch.zeros_like(p))
    terms = instance_terms(p, torch.zeros_like(p), instance_loss=("tversky", {"smooth_nr": 0}))
    assert (terms.instance_gt.item(), terms.instance_pred.item()) == (1, 1)


def test_empty_prediction():
    # Two pixels in opposite corners; the artificial predicted box is [1, 4) in both directions.
    p = spots((5, 5), {(1, 1): 0.2}).requires_grad_()
    y = spots((5, 5), {(0, 0): 1, (4, 4): 1})
    terms = instance_terms(p, y)
    entry_pred = 1 - E / (2 + E)  # ℓ(0, y)
    distance = 1 + 2 * (2.5 - 0.5) ** 2 / (2 * 4**2)  # of either corner from the artificial box
    assert terms.instance_gt.item() == pytest.approx(EMPTY, abs=1e-14)  # ℓ(0, n), twice
    assert terms.instance_pred.item() == pytest.approx(entry_pred, abs=1e-14)
    assert (terms.false_gt.item(), terms.false_pred.item()) == (1, 0)
    assert terms.center.item() == pytest.approx(1 - E / (2 * 4 + E), abs=1e-14)  # two clipped boxes of 2x2
    sums = distance * entry_pred - 2 * distance * EMPTY
    assert terms.proximity.item() == pytest.approx(sums**2, abs=1e-13)
    for value in terms[1:]:
        assert torch.equal(gradient(value, p), torch.zeros_like(p))


def test_empty_target():
    p = spots((5, 5), {(0, 0): 0.7, (4, 4): 0.6, (2, 2): 0.3}).requires_grad_()
    terms = instance_terms(p, torch.zeros_like(p))
    entry_gt = 1 - E / (0.7 + 0.6 + E)  # ℓ(p on q > 0, 0)
    entries_pred = [1 - E / (0.7 + E), 1 - E / (0.6 + E)]
    distance = 1 + 2 * (2.5 - 0.5) ** 2 / (2 * 4**2)
    assert terms.instance_gt.item() == pytest.approx(entry_gt, abs=1e-14)
    assert terms.instance_pred.item() == pytest.approx(sum(entries_pred) / 2, abs=1e-14)
    assert (terms.false_gt.item(), terms.false_pred.item()) == (0, 1)
    assert terms.center.item() == pytest.approx(1 - E / (2 * 4 + E), abs=1e-14)
    sums = distance * sum(entries_pred) - distance * entry_gt
    assert terms.proximity.item() == pytest.approx(sums**2, abs=1e-13)
    slope = E / (0.7 + 0.6 + E) ** 2
    expected = spots((5, 5), {(0, 0): slope, (4, 4): slope})
    torch.testing.assert_close(gradient(terms.instance_gt, p), expected, atol=1e-14, rtol=0)
    assert torch.equal(gradient(terms.false_gt, p), torch.zeros_like(p))


def test_artificial_box_of_an_odd_shape_is_not_clipped():
    # Shape 1 x 4: c = (0, 2), so the box is [-1, 2) x [1, 4). The target fills [0, 1) x [0, 1).
    terms = instance_terms(line(0, 0, 0, 0), line(1, 0, 0, 0))
    distance = 1 + ((0.5 - 0.5) ** 2 + (2.5 - 0.5) ** 2) / (3**2 + 4**2)
    assert terms.proximity.item() == pytest.approx((distance * EMPTY - distance * EMPTY) ** 2, abs=1e-14)
    terms = instance_terms(line(0, 0, 0, 0), line(1, 0, 0, 0), instance_loss="ce")
    entry = -math.log(1e-7) / 4
    assert terms.proximity.item() == pytest.approx(0, abs=1e-14)
    terms = instance_terms(line(0, 0, 0, 0), line(1, 0, 0, 1), instance_loss="ce")
    first = distance * entry
    second = (1 - 1 / 9 + ((3.5 - 2.5) ** 2) / (3**2 + 3**2)) * entry  # [0, 1) x [3, 4) lies in the box
    nearest = min(distance, second / entry) * 2 * entry
    assert terms.proximity.item() == pytest.approx((nearest - first - second) ** 2, abs=1e-12)


def test_false_rate_gradients_are_those_of_the_dice_losses():
    p, y = bridge()
    terms = instance_terms(p, y)

    def dice_gt(x: np.ndarray) -> float:
        n1 = 1 - (2 * x[0] + E) / (x[0] + x[1] + 1 + E)
        n2 = 1 - (2 * x[2] + E) / (x[1] + x[2] + 1 + E)
        return (n1 + n2) / 2

    def dice_pred(x: np.ndarray) -> float:
        m1 = 1 - (2 * (x[0] + x[2]) + E) / (x[0] + x[1] + x[2] + 2 + E)
        m2 = 1 - E / (x[5] + E)
        return (m1 + m2) / 2

    assert_gradient(terms.false_gt, p, dice_gt)
    assert_gradient(terms.false_pred, p, dice_pred)


def test_false_rate_gradients_ignore_the_choice_of_instance_loss():
    p, y = bridge()
    dice = instance_terms(p, y).false_gt
    tversky = instance_terms(p, y, instance_loss=("tversky", {"alpha": 0.9, "smooth_dr": 1.0})).false_gt
    assert torch.equal(gradient(dice, p), gradient(tversky, p))


def test_missed_instances_have_no_false_rate_gradient():
    p = line(0.4, 0, 0, 0.9).requires_grad_()
    terms = instance_terms(p, line(1, 0, 0, 0))
    assert terms.false_gt.item() == 1
    assert torch.equal(gradient(terms.false_gt, p), torch.zeros_like(p))


def test_center_gradient_is_that_of_the_mean_of_p():
    p, y = bridge()

    def surrogate(x: np.ndarray) -> float:
        m1 = 1 + (x[0] + x[1] + x[2]) / 3 - (0.9 + 0.8 + 0.7) / 3  # on {0, 1, 2}, all inside the target's
        m2 = 1 + x[5] - 0.6  # on {4, 5}, all outside
        return 1 - (2 * 3 * m1 + E) / (3 * m1 + 2 * m2 + 4 + E)

    assert_gradient(instance_terms(p, y).center, p, surrogate)


def test_center_gradient_goes_to_the_smallest_id_that_covers_a_pixel():
    p = line(0.9, 0, 0.6).requires_grad_()

    def surrogate(x: np.ndarray) -> float:
        m1, m2 = 1 + x[0] - 0.9, 1 + x[2] - 0.6  # boxes {0, 1} and {1, 2}; the target's is {0, 1, 2}
        return 1 - (2 * (2 * m1 + m2) + E) / (2 * m1 + m2 + 3 + E)

    assert_gradient(instance_terms(p, line(1, 1, 0)).center, p, surrogate)


def assert_gradient(value: Tensor, p: Tensor, surrogate: Callable[[np.ndarray], float]) -> None:
    """d value / d p equals central differences of a function of the pixels of a line."""
    x, step = p.detach().flatten().numpy(), 1e-6
    expected = [(surrogate(x + h) - surrogate(x - h)) / (2 * step) for h in step * np.eye(len(x))]
    np.testing.assert_allclose(gradient(value, p).flatten(), expected, atol=1e-8)
    assert np.abs(expected).max() > 1e-2  # there is something to compare


@pytest.mark.parametrize("instance_loss", ["dice", "gdf", "dicece", "inverse_weighted_dice"])
def test_exact_gradients(instance_loss: str):
    logits, target = scene(0, 2, 1, 5, 6)
    # Away from the threshold the instances stay as they are when a logit moves a little.
    logits = torch.where(logits.abs() < 0.05, 0.1, logits.detach()).requires_grad_()

    def smooth(x: Tensor) -> tuple[Tensor, ...]:
        terms = instance_terms(x, target, sigmoid=True, instance_loss=instance_loss)
        blob = blob_terms(x, target, sigmoid=True, instance_loss=instance_loss).blob
        return terms.seg, terms.instance_gt, terms.instance_pred, terms.proximity, blob

    assert torch.autograd.gradcheck(smooth, logits, fast_mode=True)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("dice", {}, 1 - (2 * 1.4 + E) / (1.6 + 2 + E)),
        ("dice", {"squared_pred": True}, 1 - (2 * 1.4 + E) / (0.81 + 0.04 + 0.25 + 2 + E)),
        ("dice", {"jaccard": True}, 1 - (2 * 1.4 + E) / (2 * (1.6 + 2 - 1.4) + E)),
        ("dice", {"smooth_nr": 0, "smooth_dr": 1}, 1 - 2.8 / 4.6),
        ("tversky", {"alpha": 0.3, "beta": 0.7}, 1 - (1.4 + E) / (1.4 + 0.3 * 0.2 + 0.7 * 0.6 + E)),
        ("generalized_dice", {}, 1 - (2 * 1.4 / 4 + E) / ((1.6 + 2) / 4 + E)),
        ("ce", {}, -(math.log(0.9) + math.log(0.8) + math.log(0.5)) / 4),
        ("focal", {}, -(0.01 * math.log(0.9) + 0.04 * math.log(0.8) + 0.25 * math.log(0.5)) / 4),
        ("focal", {"gamma": 1}, -(0.1 * math.log(0.9) + 0.2 * math.log(0.8) + 0.5 * math.log(0.5)) / 4),
        # K = 1: each of the two pixels of the instance and of the background weighs 4 / (2 * 2).
        ("inverse_weighted_dice", {}, 1 - (2 * 1.4 + E) / (1.6 + 2 + E)),
    ],
)
def test_pixel_losses(name: str, options: dict[str, Any], expected: float):
    P = image_from_probabilities(torch.tensor([[0.9, 0.2], [0.5, 0.0]], dtype=torch.float64))
    G = torch.tensor([[True, False], [True, False]])
    assert pixel_loss(name, **options)(P, G).item() == pytest.approx(expected, abs=1e-14)


def test_compound_pixel_losses():
    P = image_from_probabilities(torch.tensor([[0.9, 0.2], [0.5, 0.0]], dtype=torch.float64))
    G = torch.tensor([[True, False], [True, False]])
    dice, ce = (pixel_loss(name)(P, G).item() for name in ("dice", "ce"))
    weighted = pixel_loss("dicece", lambda_dice=0.25, lambda_ce=3.0)(P, G)
    assert weighted.item() == pytest.approx(0.25 * dice + 3 * ce, abs=1e-14)
    generalized, focal = pixel_loss("generalized_dice")(P, G), pixel_loss("focal", gamma=1.5)(P, G)
    weighted = pixel_loss("gdf", lambda_gdl=0.25, lambda_focal=3.0, gamma=1.5)(P, G)
    assert weighted.item() == pytest.approx(0.25 * generalized.item() + 3 * focal.item(), abs=1e-14)


def test_inverse_weighted_dice_of_instances():
    # 6 pixels, K = 2: n1 of 1 pixel weighs 6 / 3, n2 of 2 pixels 6 / 6, the background of 3 pixels 6 / 9.
    p, y = line(0.9, 0.2, 0.5, 0.7, 0, 0.3), line(1, 0, 1, 1, 0, 0)
    seg = instance_terms(p, y, pixel_loss="inverse_weighted_dice").seg
    overlap = 2 * 0.9 + 0.5 + 0.7
    total = overlap + (0.2 + 0 + 0.3) * 2 / 3 + (2 + 1 + 1)
    assert seg.item() == pytest.approx(1 - (2 * overlap + E) / (total + E), abs=1e-14)
    # The weights come from the instances before min_size.
    assert instance_terms(p, y, pixel_loss="inverse_weighted_dice", min_size=2).seg == seg


def test_generalized_dice_of_an_empty_plane_is_zero():
    p = line(0.9, 0.8).requires_grad_()
    seg = instance_terms(p, torch.zeros_like(p), pixel_loss="generalized_dice").seg
    assert seg.item() == 0
    assert torch.equal(gradient(seg, p), torch.zeros_like(p))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["ce", "focal"])
def test_logarithms_of_logits_are_not_clamped(name: str, dtype: torch.dtype):
    logits = torch.tensor([[[[80.0, -80.0]]]], dtype=dtype, requires_grad=True)
    seg = instance_terms(logits, torch.tensor([[[[0, 1]]]]), sigmoid=True, pixel_loss=name).seg
    assert seg.item() == pytest.approx(80)
    assert gradient(seg, logits).flatten().tolist() == pytest.approx([0.5, -0.5])


def test_logarithms_of_probabilities_are_clamped():
    p = line(0.0, 1.0, 0.5).requires_grad_()
    seg = instance_terms(p, line(1, 0, 1), pixel_loss="ce").seg
    assert seg.item() == pytest.approx((-2 * math.log(1e-7) - math.log(0.5)) / 3, abs=1e-9)
    assert gradient(seg, p).flatten().tolist() == pytest.approx([0, 0, -2 / 3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_are_at_least_float32(dtype: torch.dtype):
    logits, target = scene(1, 1, 1, 6, 7)
    logits = logits.detach().to(dtype)
    seen = []

    def act(x: Tensor) -> Tensor:
        seen.append(x.dtype)
        return torch.sigmoid(x)

    for terms in (
        instance_terms(logits, target, sigmoid=True),
        instance_terms(logits, target, other_act=act),
    ):
        assert {x.dtype for x in terms} == {torch.float32}
        expected = instance_terms(logits.double(), target, sigmoid=True)
        torch.testing.assert_close(torch.stack(terms).double(), torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert seen == [torch.float32]


def test_callables_see_the_masked_images():
    logits, target = scene(2, 2, 2, 6, 7)
    seen = set()

    def dice(P: Tensor, G: Tensor) -> Tensor:
        assert P.shape == G.shape
        seen.add(P.shape)
        return (1 - (2 * (P * G).sum((2, 3)) + E) / ((P + G).sum((2, 3)) + E)).mean()

    losses = {"pixel_loss": dice, "instance_loss": dice, "center_loss": dice}
    for reduction, shapes in (("mean", {(2, 2, 6, 7), (1, 1, 6, 7)}), ("none", {(1, 1, 6, 7)})):
        ours = instance_terms(logits, target, sigmoid=True, reduction=reduction, **losses)
        named = instance_terms(logits, target, sigmoid=True, reduction=reduction, **dict.fromkeys(losses, "dice"))
        torch.testing.assert_close(torch.stack(ours), torch.stack(named))
        assert seen == shapes
        seen.clear()


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown pixel loss 'dicee'"):
        instance_terms(*bridge(), instance_loss="dicee")


def seg_of(logits: Tensor, target: Tensor, loss: Any, **options: Any) -> Tensor:
    return instance_terms(logits, target, pixel_loss=loss, **options).seg


def assert_same_loss(ours: Tensor, theirs: Tensor, logits: Tensor) -> None:
    torch.testing.assert_close(ours, theirs.double(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradient(ours, logits), gradient(theirs, logits), atol=1e-6, rtol=1e-6)


SHAPES = [(2, 1, 7, 6), (1, 3, 7, 6), (2, 1, 4, 5, 3)]
MONAI_BINARY = [
    ("dice", "DiceLoss", {}),
    ("dice", "DiceLoss", {"squared_pred": True}),
    ("dice", "DiceLoss", {"jaccard": True}),
    ("dice", "DiceLoss", {"squared_pred": True, "jaccard": True, "smooth_nr": 0.1, "smooth_dr": 0.2}),
    ("tversky", "TverskyLoss", {}),
    ("tversky", "TverskyLoss", {"alpha": 0.3, "beta": 0.7, "smooth_nr": 0.1, "smooth_dr": 0.2}),
    ("generalized_dice", "GeneralizedDiceLoss", {}),
    ("generalized_dice", "GeneralizedDiceLoss", {"smooth_nr": 0.1, "smooth_dr": 0.2}),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "monai_name", "options"), MONAI_BINARY)
def test_monai_overlap_losses(name: str, monai_name: str, options: dict[str, float], shape: tuple[int, ...]):
    losses = pytest.importorskip("monai.losses")
    logits, target = scene(3, *shape)
    theirs = getattr(losses, monai_name)(sigmoid=True, **options)(logits, target.double())
    assert_same_loss(seg_of(logits, target, (name, options), sigmoid=True), theirs, logits)
    p = torch.sigmoid(logits).detach().requires_grad_()
    theirs = getattr(losses, monai_name)(**options)(p, target.double())
    assert_same_loss(seg_of(p, target, (name, options)), theirs, p)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_monai_focal_losses(gamma: float, shape: tuple[int, ...]):
    losses = pytest.importorskip("monai.losses")
    logits, target = scene(4, *shape)
    theirs = losses.FocalLoss(gamma=gamma)(logits, target.double())
    assert_same_loss(seg_of(logits, target, ("focal", {"gamma": gamma}), sigmoid=True), theirs, logits)
    options = {"gamma": gamma, "lambda_gdl": 0.7, "lambda_focal": 1.5}
    theirs = losses.GeneralizedDiceFocalLoss(sigmoid=True, **options)(logits, target.double())
    assert_same_loss(seg_of(logits, target, ("gdf", options), sigmoid=True), theirs, logits)


@pytest.mark.parametrize("shape", [(2, 1, 7, 6), (2, 1, 4, 5, 3)])
def test_monai_dice_ce(shape: tuple[int, ...]):
    losses = pytest.importorskip("monai.losses")
    logits, target = scene(5, *shape)
    options = {"lambda_dice": 0.7, "lambda_ce": 1.5, "squared_pred": True}
    theirs = losses.DiceCELoss(sigmoid=True, **options)(logits, target.double())
    assert_same_loss(seg_of(logits, target, ("dicece", options), sigmoid=True), theirs, logits)


@pytest.mark.parametrize("include_background", [True, False])
@pytest.mark.parametrize(
    ("name", "monai_name"),
    [("dice", "DiceLoss"), ("tversky", "TverskyLoss"), ("generalized_dice", "GeneralizedDiceLoss")],
)
def test_monai_overlap_losses_with_softmax(name: str, monai_name: str, include_background: bool):
    losses = pytest.importorskip("monai.losses")
    logits, classes = scene(6, 2, 3, 7, 6)[0], torch.randint(0, 3, (2, 1, 7, 6))
    classes[0] = classes[0].clamp(max=1)  # class 2 is empty in the first image
    options = {"softmax": True, "to_onehot_y": True, "include_background": include_background}
    theirs = getattr(losses, monai_name)(**options)(logits, classes)
    assert_same_loss(seg_of(logits, classes, name, **options), theirs, logits)


def test_monai_pointwise_losses_with_softmax():
    losses = pytest.importorskip("monai.losses")
    logits, classes = scene(7, 2, 3, 7, 6)[0], torch.randint(0, 3, (2, 1, 7, 6))
    options = {"softmax": True, "to_onehot_y": True}
    theirs = losses.DiceCELoss(**options)(logits, classes)
    assert_same_loss(seg_of(logits, classes, "dicece", **options), theirs, logits)
    theirs = losses.FocalLoss(use_softmax=True, to_onehot_y=True)(logits, classes)
    assert_same_loss(seg_of(logits, classes, "focal", **options), theirs, logits)


def test_a_value_that_couples_channels_is_repeated():
    logits, target = scene(8, 2, 3, 6, 5)
    rows = instance_terms(logits, target, sigmoid=True, pixel_loss="generalized_dice", reduction="none").seg
    assert rows.shape == (2, 3)
    assert torch.equal(rows, rows[:, :1].expand(2, 3))
    assert rows[0, 0] != rows[1, 0]


def test_two_softmax_channels_are_one_sigmoid_plane():
    logits, target = scene(9, 2, 2, 6, 5)
    classes = target[:, 1:].long()
    options: dict[str, Any] = {"pixel_loss": "dice", "instance_loss": "dicece", "center_loss": "ce"}
    classwise: dict[str, Any] = {"softmax": True, "to_onehot_y": True, "include_background": False}
    softmax = instance_terms(logits, classes, **classwise, **options)
    sigmoid = instance_terms(logits[:, 1:] - logits[:, :1], classes, sigmoid=True, **options)
    for ours, expected in zip(softmax, sigmoid, strict=True):
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(gradient(ours, logits), gradient(expected, logits))


def test_each_channel_is_its_own_set_of_planes():
    logits, target = scene(10, 2, 3, 6, 5)
    options: dict[str, Any] = {"sigmoid": True, "pixel_loss": "dice", "reduction": "none"}
    together = instance_terms(logits, target, **options)
    for c in range(3):
        alone = instance_terms(logits[:, c : c + 1], target[:, c : c + 1], **options)
        for a, b in zip(together, alone, strict=True):
            assert torch.equal(a[:, c : c + 1], b)
    without = instance_terms(logits, target, include_background=False, **options)
    for a, b in zip(together, without, strict=True):
        assert torch.equal(a[:, 1:], b)


def test_one_target_serves_every_channel():
    logits, target = scene(11, 2, 3, 6, 5)
    shared = instance_terms(logits, target[:, :1], sigmoid=True)
    expanded = instance_terms(logits, target[:, :1].expand(2, 3, 6, 5), sigmoid=True)
    assert shared == expanded


@pytest.mark.parametrize("option", ["softmax", "to_onehot_y"])
def test_one_channel_cannot_be_a_set_of_classes(option: str):
    with pytest.raises(ValueError, match="more than one channel"):
        instance_terms(*bridge(), **{option: True})


def test_threshold():
    logits = torch.tensor([[[[math.log(0.3 / 0.7), -5.0, -0.9]]]], dtype=torch.float64)
    y = torch.tensor([[[[0, 0, 0]]]])
    assert instance_terms(logits, y, sigmoid=True).false_pred.item() == 0
    assert instance_terms(logits, y, sigmoid=True, threshold=0.3).false_pred.item() == 1
    assert instance_terms(line(0.5), line(0)).false_pred.item() == 1  # p = threshold is foreground


def test_min_size_removes_small_instances_from_either_side():
    p = line(0.9, 0.8, 0, 0.7, 0, 0, 0.6)  # instances of 2, 1 and 1
    y = line(1, 1, 0, 0, 0, 1, 0)  # instances of 2 and 1
    terms = instance_terms(p, y, min_size=2)
    entry = 1 - (2 * 1.7 + E) / (1.7 + 2 + E)
    assert terms.instance_gt.item() == pytest.approx(entry, abs=1e-14)
    assert terms.instance_pred.item() == pytest.approx(entry, abs=1e-14)
    assert (terms.false_gt.item(), terms.false_pred.item()) == (0, 0)
    assert terms.seg == instance_terms(p, y).seg
    blob = blob_terms(p, y, pixel_loss="dice", min_size=2).blob
    assert blob.item() == pytest.approx(1 - (2 * 1.7 + E) / (1.7 + 0.7 + 0.6 + 2 + E), abs=1e-14)


def test_given_labels_may_touch_and_have_any_ids():
    p, y = line(0.9, 0.8, 0, 0), line(1, 1, 1, 0)
    labels = torch.tensor([[[[70, 70, 5, 0]]]])
    terms = instance_terms(p, y, target_labels=labels)
    hit = 1 - (2 * 1.7 + E) / (1.7 + 2 + E)
    assert terms.instance_gt.item() == pytest.approx((hit + EMPTY) / 2, abs=1e-14)
    assert terms.false_gt.item() == 0.5
    blob = blob_terms(p, y, pixel_loss="dice", target_labels=labels).blob
    assert blob.item() == pytest.approx((hit + EMPTY) / 2, abs=1e-14)


def test_given_labels_equal_computed_ones():
    logits, target = scene(12, 2, 2, 8, 9)
    labels, _ = connected_components(target)
    assert instance_terms(logits, target, sigmoid=True, target_labels=7 * labels) == instance_terms(
        logits, target, sigmoid=True
    )


def test_given_labels_must_agree_with_the_target():
    p, y = bridge()
    with pytest.raises(ValueError, match="target_labels"):
        instance_terms(p, y, target_labels=torch.ones_like(y, dtype=torch.int64))


@pytest.mark.parametrize("options", [{"sigmoid": True}, {"softmax": True}, {"other_act": torch.sigmoid}])
def test_invalid_pixels_are_as_good_as_cropped(options: dict[str, Any]):
    logits, target = scene(13, 2, 2, 8, 5)
    logits = logits.detach()
    logits[:, :, :, 3:] = -4.0
    target[:, :, :, 3:] = False
    valid = torch.zeros(2, 1, 8, 5, dtype=torch.bool)
    valid[:, :, :, :3] = True
    cropped = logits[..., :3].clone().requires_grad_()
    dirty = torch.where(valid, logits, math.nan).requires_grad_()
    garbage = torch.where(valid, target.long(), 255)
    options = {"pixel_loss": "gdf", "instance_loss": "dicece", "center_loss": "ce", **options}
    masked = instance_terms(dirty, garbage, valid_mask=valid, **options)
    expected = instance_terms(cropped, target[..., :3], **options)
    for ours, theirs in zip(masked, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
        slope = gradient(ours, dirty)
        assert torch.equal(slope[..., 3:], torch.zeros(2, 2, 8, 2, dtype=torch.float64))
        torch.testing.assert_close(slope[..., :3], gradient(theirs, cropped))


def test_labels_of_invalid_pixels_do_not_count():
    p, y = bridge()
    valid, labels = line(1, 1, 1, 1, 1, 0), torch.tensor([[[[3, 0, 4, 0, 0, 9]]]])
    given = instance_terms(p, y, target_labels=labels, valid_mask=valid)
    assert given == instance_terms(p, y, valid_mask=valid)
    assert given.false_pred.item() == 0


def test_connectivity_of_either_side():
    diagonal = grid((1, 0, 0), (0, 1, 0), (0, 0, 0))
    hit = 0.9 * grid((1, 0, 0), (0, 0, 0), (0, 0, 0))
    for connectivity, missed in ((8, 0), (4, 0.5)):
        assert instance_terms(hit, diagonal, connectivity=connectivity).false_gt.item() == missed
        assert instance_terms(0.9 * diagonal, hit > 0, connectivity=connectivity).false_pred.item() == missed
    assert blob_terms(hit, diagonal, connectivity=8, pixel_loss="dice").blob.item() == pytest.approx(
        1 - (2 * 0.9 + E) / (0.9 + 2 + E), abs=1e-14
    )
    assert blob_terms(hit, diagonal, connectivity=4, pixel_loss="dice").blob.item() == pytest.approx(
        (1 - (2 * 0.9 + E) / (0.9 + 1 + E) + EMPTY) / 2, abs=1e-14
    )


def test_threshold_of_softmax_is_a_probability():
    logits = torch.tensor([0.3, 0.7], dtype=torch.float64).log().reshape(1, 2, 1, 1)
    y = torch.zeros(1, 2, 1, 1)
    rows = [
        instance_terms(logits, y, softmax=True, threshold=t, reduction="none").false_pred.flatten().tolist()
        for t in (0.2, 0.5, 0.8)
    ]
    assert rows == [[1, 1], [0, 1], [0, 0]]


def test_a_plane_without_valid_pixels_is_empty():
    p, y = bridge()
    terms = instance_terms(p, y, valid_mask=torch.zeros_like(y))
    assert [x.item() for x in terms] == [0] * 7
    for value in terms:
        assert torch.equal(gradient(value, p), torch.zeros_like(p))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{"sigmoid": True}, {"softmax": True}, {"other_act": torch.sigmoid}])
def test_no_nan_or_inf_passes_silently(poison: float, options: dict[str, Any]):
    logits, target = scene(14, 2, 2, 6, 5)
    logits = logits.detach()
    logits[0, 0, 2, 3] = poison
    logits.requires_grad_()
    terms = [*instance_terms(logits, target, **options), *blob_terms(logits, target, **options)]
    for value in terms:
        assert value.isnan()
        assert gradient(value, logits)[0, 0].isnan().all()
    dice = instance_terms(logits, target, pixel_loss="dice", reduction="none", **options)
    for rows in dice:
        assert rows[0, 0].isnan()
        assert rows[0, 1].isnan() or "softmax" not in options  # whose channels share their logits
        assert rows[1].isfinite().all()


@pytest.mark.parametrize("poison", [math.nan, -math.inf])
def test_nan_and_inf_do_not_hide_behind_the_masks(poison: float):
    # Nothing is predicted: every masked image is 0, and only the plane as a whole knows of the NaN.
    logits = line(-1.0, poison, -1.0).requires_grad_()
    for value in instance_terms(logits, line(1, 0, 0), sigmoid=True):
        assert value.isnan()
        assert gradient(value, logits).isnan().all()


def staircase(height: int, width: int) -> Tensor:
    """A snake that fills the plane: every second row, joined at alternate ends."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[::2] = True
    mask[1::4, -1] = True
    mask[3::4, 0] = True
    return mask


def masks(*shape: int) -> Tensor:
    """Planes `[6, 1, *shape]` from empty to full."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(6, 1, *shape, generator=generator)
    return noise < torch.tensor([0.0, 0.1, 0.3, 0.5, 0.7, 1.0]).reshape(6, 1, *[1] * len(shape))


def scipy_labels(mask: Tensor, connectivity: int) -> tuple[np.ndarray, int]:
    order = {4: 1, 8: 2, 6: 1, 18: 2, 26: 3}[connectivity]
    return ndimage.label(mask.numpy(), ndimage.generate_binary_structure(mask.ndim, order))


def in_raster_order(labels: np.ndarray) -> np.ndarray:
    """The same instances with ids 1..K in raster order of their first pixels."""
    ids, first = np.unique(labels, return_index=True)
    order = [k for _, k in sorted(zip(first, ids, strict=True)) if k > 0]
    renumbered = np.zeros_like(labels)
    for new, old in enumerate(order, start=1):
        renumbered[labels == old] = new
    return renumbered


@pytest.mark.parametrize(
    ("shape", "connectivity"),
    [
        *(((7, 9), k) for k in (4, 8)),
        *(((1, 12), k) for k in (4, 8)),
        ((1, 1), 8),
        *(((5, 6, 4), k) for k in (6, 18, 26)),
        *(((1, 6, 5), k) for k in (6, 18, 26)),
    ],
)
def test_components_equal_scipy(shape: tuple[int, ...], connectivity: int):
    mask = masks(*shape)
    labels, counts = connected_components(mask, connectivity)
    assert (labels.dtype, counts.dtype) == (torch.int32, torch.int32)
    for b in range(len(mask)):
        expected, count = scipy_labels(mask[b, 0], connectivity)
        assert counts[b, 0] == count
        np.testing.assert_array_equal(labels[b, 0], in_raster_order(expected))


def test_components_of_a_snake():
    mask = staircase(15, 11)
    for connectivity in (4, 8):
        labels, counts = connected_components(mask[None, None], connectivity)
        assert counts.item() == 1
        assert torch.equal(labels[0, 0], mask.int())


@pytest.mark.parametrize(("shape", "full"), [((7, 9), 8), ((5, 6, 4), 26)])
def test_components_default_to_full_connectivity(shape: tuple[int, ...], full: int):
    mask = masks(*shape)
    for default, explicit in zip(connected_components(mask), connected_components(mask, full), strict=True):
        assert torch.equal(default, explicit)


def test_components_equal_kornia():
    kornia = pytest.importorskip("kornia.contrib")
    mask = torch.cat([masks(11, 13), staircase(11, 13)[None, None]])
    labels, _ = connected_components(mask)
    theirs = kornia.connected_components(mask.float(), num_iterations=11 * 13)
    for b in range(len(mask)):
        np.testing.assert_array_equal(labels[b, 0], in_raster_order(theirs[b, 0].long().numpy()))


def test_component_ids_follow_the_first_pixels():
    # The second component begins later and ends earlier; the diagonal joins only with 8 neighbours.
    mask = torch.tensor([[1, 0, 0, 1], [1, 0, 0, 1], [0, 1, 0, 0]], dtype=torch.bool)[None, None]
    labels, counts = connected_components(mask, 8)
    assert labels[0, 0].tolist() == [[1, 0, 0, 2], [1, 0, 0, 2], [0, 1, 0, 0]]
    assert counts.tolist() == [[2]]
    labels, counts = connected_components(mask, 4)
    assert labels[0, 0].tolist() == [[1, 0, 0, 2], [1, 0, 0, 2], [0, 3, 0, 0]]
    labels, counts = connected_components(mask, 8, min_size=3)
    assert labels[0, 0].tolist() == [[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]]
    assert counts.tolist() == [[1]]
    labels, _ = connected_components(mask.flip(-1), 8, min_size=3)
    assert labels[0, 0].tolist() == [[0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 1, 0]]  # ids stay without gaps


@pytest.mark.parametrize("case", ["empty", "plane", "volume"])
def test_pixel_and_blob_equal_the_authors(case: str):
    """What agrees with the released code by definition, in value and gradient."""
    golden = np.load(GOLDEN / f"{case}.npz")
    p = torch.tensor(golden["prob"], requires_grad=True)
    target = torch.tensor(golden["target"])
    seg, blob = blob_terms(p, target, pixel_loss="dice")
    values = dict(zip(golden["term_names"], golden["terms"], strict=True))
    assert seg.item() == pytest.approx(values["pixel"], abs=1e-12)
    assert blob.item() == pytest.approx(golden["blob_dice"].item(), abs=1e-12)
    np.testing.assert_allclose(gradient(seg, p), golden["grad_pixel"], rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(gradient(blob, p), golden["grad_blob_dice"], rtol=1e-6, atol=1e-12)
    rates = instance_terms(p, target)
    assert rates.false_gt.item() == pytest.approx(values["false_gt"], abs=1e-6)
    assert rates.false_pred.item() == pytest.approx(values["false_pred"], abs=1e-6)


def test_predicted_side_equals_the_authors_where_both_sides_have_instances():
    golden = np.load(GOLDEN / "plane.npz")
    p = torch.tensor(golden["prob"], requires_grad=True)
    value = instance_terms(p, torch.tensor(golden["target"])).instance_pred
    values = dict(zip(golden["term_names"], golden["terms"], strict=True))
    assert value.item() == pytest.approx(values["instance_pred"], abs=1e-12)
    np.testing.assert_allclose(gradient(value, p), golden["grad_instance_pred"], rtol=1e-6, atol=1e-12)
