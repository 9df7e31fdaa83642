"""Pixel losses against MONAI's and kornia's, in value and gradient, exactly as far as parity is promised.

MONAI: on logits with `sigmoid=True` every loss of the same name, and Dice, Tversky and Generalized Dice on
probabilities too. With `softmax=True` MONAI's GDF still takes the sigmoid focal loss, and for several channels its
DiceCE takes the softmax cross-entropy whatever the activation; ours follow the activation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import kornia.losses
import monai.losses
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastinstance
from fastinstance import functional
from fastinstance.testing import Scene, assert_close, pattern, scenes

EXAMPLES = settings().max_examples
Loss = Callable[[Tensor, Tensor], Tensor]

EXACT = {"rtol": 1e-9, "atol": 1e-12}
# MONAI computes its focal loss, and the weights of Generalized Dice, in float32 whatever the input.
IN_FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}
TOLERANCES = {
    "DiceLoss": EXACT,
    "DiceCELoss": EXACT,
    "TverskyLoss": EXACT,
    "GeneralizedDiceLoss": {"rtol": 1e-6, "atol": 1e-7},
    "FocalLoss": IN_FLOAT32,
    "GeneralizedDiceFocalLoss": IN_FLOAT32,
}


def value_and_gradient(loss: Loss, input: Tensor, target: Tensor) -> dict[str, Tensor]:
    leaf = input.detach().requires_grad_()
    value = loss(leaf, target).flatten()
    (gradient,) = torch.autograd.grad(value @ torch.linspace(1.0, 2.0, len(value)).to(value), leaf)
    return {"value": value.detach(), "gradient": gradient}


def check_same(ours: Loss, theirs: Loss, input: Tensor, target: Tensor, **tolerances: Any) -> None:
    assert_close(value_and_gradient(ours, input, target), value_and_gradient(theirs, input, target), **tolerances)


def calm(**options: Any) -> st.SearchStrategy[Scene]:
    """Scenes whose input and target are float64, as MONAI wants them."""
    return scenes(dtypes=(torch.float64,), target_dtypes=(torch.float64,), layouts=("contiguous",), **options)


def pair(name: str, **options: Any) -> tuple[Any, Any]:
    """Our loss and MONAI's, with the same arguments."""
    return getattr(fastinstance, name)(**options), getattr(monai.losses, name)(**options)


def monai_focal(**options: Any) -> Loss:
    """MONAI's focal loss, which is spelled `use_softmax` and always takes logits."""
    options.pop("sigmoid", None)
    return monai.losses.FocalLoss(use_softmax=options.pop("softmax", False), **options)


VARIANTS = [
    ("DiceLoss", {}),
    ("DiceLoss", {"squared_pred": True}),
    ("DiceLoss", {"jaccard": True}),
    ("DiceLoss", {"jaccard": True, "squared_pred": True}),
    ("DiceLoss", {"smooth_nr": 0.0, "smooth_dr": 1.0}),
    ("GeneralizedDiceLoss", {}),
    ("GeneralizedDiceLoss", {"smooth_nr": 0.5, "smooth_dr": 0.1}),
    ("TverskyLoss", {}),
    ("TverskyLoss", {"alpha": 0.3, "beta": 0.9, "smooth_nr": 0.1}),
]
COMPOUND = [
    ("GeneralizedDiceFocalLoss", {}),
    ("GeneralizedDiceFocalLoss", {"gamma": 3.0, "lambda_gdl": 2.0, "lambda_focal": 0.7}),
]
ONE_CHANNEL = [
    ("DiceCELoss", {}),
    ("DiceCELoss", {"lambda_dice": 0.3, "lambda_ce": 2.0, "squared_pred": True}),
]


@pytest.mark.parametrize(("name", "options"), [*VARIANTS, *COMPOUND])
@settings(max_examples=EXAMPLES // 4)
@given(scene=calm(channels=(1, 3)))
def test_monai_with_sigmoid(name: str, options: dict[str, Any], scene: Scene) -> None:
    check_same(*pair(name, sigmoid=True, **options), scene.input, scene.target, **TOLERANCES[name])


@pytest.mark.parametrize(("name", "options"), ONE_CHANNEL)
@settings(max_examples=EXAMPLES // 4)
@given(scene=calm(channels=(1, 1)))
def test_monai_dice_ce_of_one_channel(name: str, options: dict[str, Any], scene: Scene) -> None:
    check_same(*pair(name, sigmoid=True, **options), scene.input, scene.target, **TOLERANCES[name])


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 1.5, 2.0])
@settings(max_examples=EXAMPLES // 6)
@given(scene=calm(channels=(2, 3)))
def test_monai_focal(softmax: bool, gamma: float, scene: Scene) -> None:
    activation = {"softmax": True} if softmax else {"sigmoid": True}
    ours = fastinstance.FocalLoss(gamma=gamma, **activation)
    check_same(ours, monai_focal(gamma=gamma, softmax=softmax), scene.input, scene.target, **IN_FLOAT32)


@pytest.mark.parametrize(("name", "options"), [*VARIANTS, *ONE_CHANNEL])
@settings(max_examples=EXAMPLES // 6)
@given(scene=calm(channels=(2, 3)))
def test_monai_with_softmax(name: str, options: dict[str, Any], scene: Scene) -> None:
    check_same(*pair(name, softmax=True, **options), scene.input, scene.target, **TOLERANCES[name])


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@settings(max_examples=EXAMPLES // 6)
@given(scene=calm(channels=(1, 3), probabilities=True))
def test_monai_on_probabilities(name: str, options: dict[str, Any], scene: Scene) -> None:
    check_same(*pair(name, **options), scene.input, scene.target, **TOLERANCES[name])


@pytest.mark.parametrize("name", ["DiceLoss", "GeneralizedDiceLoss", "TverskyLoss"])
@settings(max_examples=EXAMPLES // 6)
@given(scene=calm(channels=(2, 3)))
def test_monai_other_act_and_background(name: str, scene: Scene) -> None:
    options = {"other_act": lambda x: torch.sigmoid(2 * x - 1), "include_background": False}
    check_same(*pair(name, **options), scene.input, scene.target, **TOLERANCES[name])


@st.composite
def classes(draw: st.DrawFn, **options: Any) -> tuple[Tensor, Tensor]:
    """Logits [B, C, *S], C of 2 or 3, and class indices [B, 1, *S]."""
    scene = draw(calm(channels=(2, 3), **options))
    number = torch.arange(scene.target.shape[1], dtype=torch.float64).view(1, -1, *[1] * (scene.target.ndim - 2))
    return scene.input, (scene.target * number).amax(1, keepdim=True)


@pytest.mark.parametrize("include_background", [True, False])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("name", ["DiceLoss", "GeneralizedDiceLoss", "TverskyLoss", "FocalLoss"])
@settings(max_examples=EXAMPLES // 8)
@given(case=classes())
def test_monai_one_hot(name: str, activation: str, include_background: bool, case: tuple[Tensor, Tensor]) -> None:
    options: dict[str, Any] = {
        activation: True,
        "to_onehot_y": True,
        "include_background": include_background,
    }
    if name == "FocalLoss":
        if activation == "softmax" and not include_background:
            return  # MONAI drops channel 0 before its softmax, we after it as MONAI's Dice does
        check_same(fastinstance.FocalLoss(**options), monai_focal(**options), *case, **IN_FLOAT32)
    else:
        check_same(*pair(name, **options), *case, **TOLERANCES[name])


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("name", ["DiceLoss", "TverskyLoss"])
@settings(max_examples=EXAMPLES // 8)
@given(scene=calm(channels=(1, 3)))
def test_monai_reductions(name: str, reduction: str, scene: Scene) -> None:
    check_same(*pair(name, sigmoid=True, reduction=reduction), scene.input, scene.target, **EXACT)


@settings(max_examples=EXAMPLES // 8)
@given(scene=calm(channels=(1, 3)))
def test_monai_focal_sum_is_over_plane_means(scene: Scene) -> None:
    ours = fastinstance.FocalLoss(sigmoid=True, reduction="sum")
    check_same(ours, monai_focal(reduction="sum"), scene.input, scene.target, **IN_FLOAT32)


@pytest.mark.parametrize(
    "name", ["DiceLoss", "DiceCELoss", "GeneralizedDiceLoss", "GeneralizedDiceFocalLoss", "TverskyLoss"]
)
def test_monai_in_float32_to_1e6(name: str) -> None:
    """The promise in the dtype that people train in, on a batch of ordinary size."""
    chance = torch.Generator().manual_seed(0)
    input = 3 * torch.randn(4, 1, 64, 64, generator=chance)
    target = (torch.rand(4, 1, 64, 64, generator=chance) < 0.1).float()
    ours, theirs = (value_and_gradient(loss, input, target) for loss in pair(name, sigmoid=True))
    assert_close(ours["value"], theirs["value"], rtol=1e-6, atol=0.0)
    # Of the largest entry; p (1 - p) of a saturated pixel has few digits in float32, hence twice 1e-6.
    assert_close(ours["gradient"], theirs["gradient"], rtol=2e-6, atol=0.0, relative_to="largest")


def test_where_the_channels_differ_from_monai() -> None:
    """The two documented differences: what MONAI's compound losses do with several channels."""
    input = torch.linspace(-3, 3, 2 * 3 * 16, dtype=torch.float64).view(2, 3, 4, 4)
    target = F.one_hot(torch.arange(32).view(2, 4, 4) % 3, 3).movedim(-1, 1).double()
    dice = monai.losses.DiceLoss(sigmoid=True)(input, target)
    ce = F.binary_cross_entropy_with_logits(input, target)
    assert_close(fastinstance.DiceCELoss(sigmoid=True)(input, target), dice + ce)
    assert abs(monai.losses.DiceCELoss(sigmoid=True)(input, target) - (dice + ce)) > 0.01

    gdl = monai.losses.GeneralizedDiceLoss(softmax=True)(input, target)
    focal = monai.losses.FocalLoss(use_softmax=True)(input, target)
    assert_close(fastinstance.GeneralizedDiceFocalLoss(softmax=True)(input, target), gdl + focal, **IN_FLOAT32)
    assert abs(monai.losses.GeneralizedDiceFocalLoss(softmax=True)(input, target) - (gdl + focal)) > 0.01


@settings(max_examples=EXAMPLES // 4)
@given(case=classes(dims=(2,)), alpha=st.sampled_from((0.3, 0.5)), beta=st.sampled_from((0.5, 0.9)))
def test_kornia_dice_and_tversky(case: tuple[Tensor, Tensor], alpha: float, beta: float) -> None:
    """kornia: softmax inside, class indices [B,H,W], eps in the denominator only, and the mean of an image is over
    the classes that its target has. kornia's "macro" Dice is the Tversky loss with 1/2 and 1/2 and half the eps."""
    input, index = case
    present = torch.stack([(index == c).flatten(1).any(1) for c in range(input.shape[1])], 1)

    def ours(loss: Loss) -> Loss:
        return lambda input, target: ((loss(input, target) * present).sum(1) / present.sum(1)).mean()

    options: dict[str, Any] = {"softmax": True, "to_onehot_y": True, "reduction": "none", "smooth_nr": 0.0}
    check_same(
        ours(fastinstance.DiceLoss(smooth_dr=1e-8, **options)),
        lambda input, target: kornia.losses.dice_loss(input, target[:, 0].long(), average="macro", eps=1e-8),
        *case,
        **EXACT,
    )
    check_same(
        ours(fastinstance.TverskyLoss(alpha=alpha, beta=beta, smooth_dr=1e-8, **options)),
        lambda input, target: kornia.losses.tversky_loss(input, target[:, 0].long(), alpha, beta, eps=1e-8),
        *case,
        **EXACT,
    )


@settings(max_examples=EXAMPLES // 4)
@given(case=classes(), gamma=st.sampled_from((1.0, 2.0, 3.5)))
def test_kornia_focal(case: tuple[Tensor, Tensor], gamma: float) -> None:
    """kornia with alpha=None and reduction="mean": over all channels, as ours; the binary one takes logits."""
    input, index = case
    check_same(
        fastinstance.FocalLoss(gamma=gamma, softmax=True, to_onehot_y=True),
        lambda input, target: kornia.losses.focal_loss(
            input, target[:, 0].long(), alpha=None, gamma=gamma, reduction="mean"
        ),
        *case,
        rtol=1e-9,
        atol=1e-12,
    )
    target = (index > 0).double()
    check_same(
        fastinstance.FocalLoss(gamma=gamma, sigmoid=True),
        lambda input, target: kornia.losses.binary_focal_loss_with_logits(
            input, target, alpha=None, gamma=gamma, reduction="mean"
        ),
        input,
        target.expand_as(input),
        rtol=1e-9,
        atol=1e-12,
    )


def pixel(name: str, **options: Any) -> Loss:
    """A pixel loss by name."""
    return lambda input, target: functional.pixel_loss(input, target, pixel_loss=name, **options)


@settings(max_examples=EXAMPLES // 4)
@given(scene=calm())
def test_cross_entropy_is_that_of_torch(scene: Scene) -> None:
    check_same(pixel("ce", sigmoid=True), F.binary_cross_entropy_with_logits, scene.input, scene.target, **EXACT)


@settings(max_examples=EXAMPLES // 4)
@given(scene=calm(probabilities=True, extreme=False))
def test_logarithms_of_probabilities(scene: Scene) -> None:
    """Where MONAI would apply a second sigmoid: plain logarithms of p and 1 - p."""

    def focal(p: Tensor, y: Tensor) -> Tensor:
        right = torch.where(y > 0, p, 1 - p)
        return ((1 - right) ** 2 * -right.log()).mean()

    check_same(pixel("ce"), F.binary_cross_entropy, scene.input, scene.target, **EXACT)
    check_same(pixel("focal"), focal, scene.input, scene.target, **EXACT)


def test_logarithms_of_probabilities_are_clamped() -> None:
    """log(max(p, 1e-7)), with derivative 0 below."""
    p = torch.tensor([0.0, 1e-9, 0.25, 1.0], dtype=torch.float64).view(1, 1, 2, 2)
    clamped = (-2 * math.log(1e-7) - math.log(0.25)) / 4
    found = value_and_gradient(pixel("ce"), p, torch.ones_like(p))
    assert_close(found["value"], torch.tensor([clamped], dtype=torch.float64))
    assert_close(found["gradient"].flatten(), torch.tensor([0, 0, -1, -0.25]).double())
    found = value_and_gradient(pixel("ce"), 1 - p, torch.zeros_like(p))
    assert_close(found["value"], torch.tensor([clamped], dtype=torch.float64))
    assert_close(found["gradient"].flatten(), torch.tensor([0, 0, 1, 0.25]).double())


@pytest.mark.parametrize("p", [1e-2, 1e-4, 1e-6, 2e-7])
def test_small_probabilities_keep_their_digits_in_float32(p: float) -> None:
    input = torch.tensor([[[[p]]]])
    missed = value_and_gradient(pixel("ce"), input, torch.ones(1, 1, 1, 1))
    assert_close(missed["value"], -input.double().log().flatten(), rtol=1e-5)
    assert_close(missed["gradient"], -1 / input.double(), rtol=1e-5)
    right = value_and_gradient(pixel("ce"), input, torch.zeros(1, 1, 1, 1))
    assert_close(right["value"], -torch.log1p(-input.double()).flatten(), rtol=1e-5, atol=1e-7)
    assert_close(right["gradient"], 1 / (1 - input.double()), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["ce", "focal", "dicece", "gdf"])
def test_logarithms_of_logits_are_not_clamped(name: str, dtype: torch.dtype) -> None:
    """A confident mistake at |logit| = 80 has a slope of 1, in half precision too."""
    input = torch.tensor([80.0, -80.0], dtype=dtype).view(1, 1, 1, 2)
    found = value_and_gradient(pixel(name, sigmoid=True), input, torch.tensor([[[[0.0, 1.0]]]]))
    dice = {"ce": 0, "focal": 0, "dicece": 1, "gdf": 1}[name]
    assert_close(found["value"], torch.tensor([80.0 + dice]).to(found["value"]), rtol=1e-5)
    assert_close(found["gradient"].flatten(), torch.tensor([0.5, -0.5]).to(dtype), rtol=1e-5)


@pytest.mark.parametrize("activation", ["sigmoid", None])
def test_generalized_dice_of_an_empty_target_is_zero(activation: str | None) -> None:
    input = torch.full((2, 1, 4, 4), 0.75, dtype=torch.float64)
    options = {activation: True} if activation else {}
    found = value_and_gradient(pixel("generalized_dice", **options), input, torch.zeros_like(input))
    assert found["value"] == 0
    assert not found["gradient"].any()


def test_inverse_weighted_dice_by_hand() -> None:
    """Two instances, of 1 and 4 pixels, on 12 pixels: weights 4, 1 and, for the 7 background pixels, 4/7."""
    y = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]], dtype=torch.float64)[None, None]
    weight = y + (1 - y) * 4 / 7
    weight[0, 0, 0, 0] = 4.0

    def by_hand(p: Tensor, y: Tensor) -> Tensor:
        return 1 - (2 * (weight * p * y).sum() + 1e-5) / ((weight * (p + y)).sum() + 1e-5)

    p = torch.linspace(0.1, 0.9, 12, dtype=torch.float64).view_as(y)
    check_same(fastinstance.InverseWeightedDiceLoss(), by_hand, p, y, **EXACT)
    one = y * 12 / (2 * 5) + (1 - y) * 12 / (2 * 7)
    labels = y.long()  # given as one instance in two pieces

    def by_hand_in_one(p: Tensor, y: Tensor) -> Tensor:
        return 1 - (2 * (one * p * y).sum() + 1e-5) / ((one * (p + y)).sum() + 1e-5)

    loss = fastinstance.InverseWeightedDiceLoss()
    check_same(lambda p, y: loss(p, y, target_labels=labels), by_hand_in_one, p, y, **EXACT)
    empty = torch.zeros_like(y)
    # The background alone: one instance, weight 1.
    check_same(loss, lambda p, y: 1 - 1e-5 / (p.sum() + 1e-5), p, empty, **EXACT)


def test_a_pixel_that_is_not_valid_is_not_there() -> None:
    """The pixel losses of a masked image are those of the image cut out."""
    chance = torch.Generator().manual_seed(1)
    input = torch.randn(2, 2, 6, 5, generator=chance, dtype=torch.float64)
    target = pattern("checkerboard", (6, 5)).double().expand(2, 2, 6, 5)
    valid = torch.zeros(2, 1, 6, 5, dtype=torch.bool)
    valid[..., 1:5, 2:4] = True
    spoilt = torch.where(valid, input, float("nan"))
    for name in ("dice", "ce", "dicece", "generalized_dice", "focal", "gdf", "tversky", "inverse_weighted_dice"):
        for options in ({"sigmoid": True}, {"softmax": True}):
            cut = pixel(name, **options)(input[..., 1:5, 2:4], target[..., 1:5, 2:4])
            assert_close(pixel(name, **options, valid_mask=valid)(spoilt, target), cut, name=name)
