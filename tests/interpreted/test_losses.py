"""The device functions of the losses in the interpreter equal torch: `fastinstance.pixel`, `ops`, and autograd."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastinstance import pixel
from fastinstance.ops import _wrong_and_cost
from fastinstance.testing import assert_close
from tests.loss_kernels import of_channels, of_pixels, of_planes

LOGITS = (0.0, 1e-6, 1e-3, 0.7, 5.0, 17.0, 37.0, 80.0, 1e4)
PROBABILITIES = (0.0, 1e-9, 0.9e-7, 1.1e-7, 1e-5, 0.3, 0.5, 0.9, 0.9999, 1 - 2e-7, 1.0)
NAMES = ("w", "c", "p", "dp/dx", "v", "dv/dx")


def pixels(logits: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Every extreme value in both classes: values, and G as bool."""
    values = (*LOGITS, *(-x for x in LOGITS)) if logits else PROBABILITIES
    x = torch.tensor(values, dtype=dtype)
    return x.repeat(2), torch.arange(2).repeat_interleave(len(x)) == 1


def on_pixels(x: Tensor, positive: Tensor, logits: bool, gamma: float) -> dict[str, Tensor]:
    out = torch.zeros(6, len(x), dtype=x.dtype)
    of_pixels[(3,)](x, positive, out, len(x), LOGITS=logits, GAMMA=gamma, BLOCK=16)
    return dict(zip(NAMES, out, strict=True))


def literally(x: Tensor, positive: Tensor, logits: bool, gamma: float) -> dict[str, Tensor]:
    """The same in float64, dv/dx by autograd."""
    x = x.double().requires_grad_()
    if logits:
        s = torch.where(positive, -x, x)
        w, c, p = s.sigmoid(), F.softplus(s, threshold=40), x.sigmoid()
        dp = x.sigmoid() * (-x).sigmoid()
    else:
        w = torch.where(positive, 1 - x, x)
        c, p, dp = pixel.cost_of(torch.where(positive, x, 1 - x)), x, torch.ones_like(x)
    v = pixel.Pointwise(gamma)(w, c)
    (dv,) = torch.autograd.grad(v.sum(), x)
    return {name: t.detach() for name, t in zip(NAMES, (w, c, p, dp, v, dv), strict=True)}


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 2.5, 4.0, 11.0])
@pytest.mark.parametrize("logits", [True, False])
def test_pixels_equal_float64(logits: bool, gamma: float) -> None:
    case = pixels(logits, torch.float64)
    found, wanted = on_pixels(*case, logits, gamma), literally(*case, logits, gamma)
    assert_close(found, wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 2.5, 4.0])
@pytest.mark.parametrize("logits", [True, False])
def test_pixels_in_float32(logits: bool, gamma: float) -> None:
    case = pixels(logits, torch.float32)
    found, wanted = on_pixels(*case, logits, gamma), literally(*case, logits, gamma)
    assert_close({name: t.double() for name, t in found.items()}, wanted, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logits", [True, False])
def test_pixels_equal_the_torch_path(logits: bool, dtype: torch.dtype) -> None:
    x, positive = pixels(logits, dtype)
    sides = [
        _wrong_and_cost(part, is_true, logits, True) for part, is_true in ((x[~positive], False), (x[positive], True))
    ]
    w, c = (torch.cat([part for part in parts if part is not None]) for parts in zip(*sides, strict=True))
    function = pixel.Pointwise(2.0)
    slope = function.slope(w, c, logits)
    wanted = {"w": w, "c": c, "v": function(w, c), "dv/dx": torch.where(positive, -slope, slope)}
    found = on_pixels(x, positive, logits, 2.0)
    tolerance = 3e-6 if dtype == torch.float32 else 1e-12
    assert_close({name: found[name] for name in wanted}, wanted, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_cancels_in_logits(dtype: torch.dtype) -> None:
    """Small c, w, p and slopes of saturated logits keep their relative accuracy."""
    x = torch.tensor([-80.0, -12.0, 12.0, 80.0], dtype=dtype)
    negative, positive = torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
    small = torch.exp(torch.tensor([-80.0, -12.0], dtype=torch.float64))
    w = small / (1 + small)
    for found in (on_pixels(x, negative, True, 0.0), on_pixels(-x, positive, True, 0.0)):
        assert_close(found["w"][:2].double(), w, rtol=1e-5, atol=0.0)
        assert_close(found["c"][:2].double(), torch.log1p(small), rtol=1e-5, atol=0.0)
        assert_close(found["dv/dx"][:2].double().abs(), w, rtol=1e-5, atol=0.0)
        assert_close(found["dp/dx"].double(), torch.cat([w, w.flip(0)]) * (1 - torch.cat([w, w.flip(0)])), rtol=1e-5)
    assert_close(on_pixels(x, positive, True, 0.0)["p"][:2].double(), w, rtol=1e-5, atol=0.0)


DICE, GENERALIZED = pixel.Dice(0.3, 0.2), pixel.GeneralizedDice(0.2, 1e-5)
LOSSES = {
    "dice": pixel.Dice(),
    "squared": pixel.Dice(squared_pred=True),
    "jaccard": pixel.Dice(0.1, 0.3, jaccard=True),
    "tversky": pixel.Tversky(0.3, 0.9, 0.1, 0.2),
    "generalized": GENERALIZED,
    "ce": pixel.CrossEntropy(),
    "focal": pixel.Focal(2.5),
    "inverse": pixel.InverseWeightedDice(),
    "dicece": pixel.WeightedSum(((0.3, DICE), (2.0, pixel.CrossEntropy()))),
    "gdf": pixel.WeightedSum(((0.7, GENERALIZED), (0.1, pixel.Focal()))),
    "all": pixel.WeightedSum(
        (
            (0.3, pixel.CrossEntropy()),
            (0.2, pixel.Focal(0)),
            (0.7, DICE),
            (2.0, GENERALIZED),
            (3.0, pixel.InverseWeightedDice()),
            (0.1, pixel.WeightedSum(((5.0, pixel.Tversky(0.2, 0.1)),))),
        )
    ),
}


def drawn_sums(planes: int) -> tuple[Tensor, Tensor]:
    """Sums [planes, 4] of planes of up to 60 pixels, and |Ω|. A third of the targets is empty, one is full."""
    chance = torch.Generator().manual_seed(3)
    omega = torch.randint(30, 61, (planes,), generator=chance).double()
    share = torch.rand(planes, 4, generator=chance, dtype=torch.float64)
    target = (share[:, 2] * omega).ceil()
    target[::3] = 0
    target[1] = omega[1]
    pred = share[:, 1] * omega
    pg = share[:, 0] * torch.minimum(pred, target)
    return torch.stack([pg, pred, target, 100 * share[:, 3]], 1), omega


def expected(value: Tensor, sums: pixel.Sums, upstream: Tensor) -> Tensor:
    """[planes, 4]: the value, and the derivatives of Σ upstream · value by PG, P and V."""
    by = (sums.intersection, sums.pred, sums.pointwise)
    slopes = torch.autograd.grad((value * upstream).sum(), by, allow_unused=True)
    slopes = [torch.zeros_like(value) if slope is None else slope for slope in slopes]
    return torch.stack([value.detach(), *slopes], -1).view(-1, 4)


@pytest.mark.parametrize("name", LOSSES)
def test_planes_on_their_own(name: str) -> None:
    loss = LOSSES[name]
    sums, omega = drawn_sums(20)
    columns = pixel.Sums(*(column.clone().requires_grad_() for column in sums.unbind(1)))
    out = torch.zeros(20, 4, dtype=torch.float64)
    of_planes[(3,)](sums, omega, out, 20, FORM=loss.form.numbers, BLOCK=8)
    value = loss.reduce(columns, omega)
    assert_close(out, expected(value, columns, torch.ones_like(omega)), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", LOSSES)
def test_channels_of_an_image(name: str) -> None:
    loss = LOSSES[name]
    for (images, channels), categorical in itertools.product(((12, 1), (4, 3)), (False, True)):
        sums, omega = drawn_sums(12)
        shape = (images, channels)
        columns = pixel.Sums(*(column.reshape(shape).requires_grad_() for column in sums.clone().unbind(1)))
        upstream = torch.linspace(0.5, 2, 12).view(shape)
        out = torch.zeros(12, 4, dtype=torch.float64)
        of_channels[(5,)](
            sums, omega, upstream, out, images, channels,
            FORM=loss.form.numbers, CATEGORICAL=categorical, BLOCK=4,
        )  # fmt: skip
        value = loss.reduce_channels(columns, omega.view(shape), categorical=categorical)
        assert_close(out, expected(value, columns, upstream), rtol=1e-11, atol=1e-14)


def test_all_channels_empty() -> None:
    """Generalized Dice of an image without foreground: 0, with no slope."""
    sums = torch.tensor([[0.0, 5.0, 0.0, 0.0], [0.0, 7.0, 0.0, 0.0]], dtype=torch.float64)
    out = torch.ones(2, 4, dtype=torch.float64)
    of_channels[(1,)](
        sums, torch.full((2,), 9.0), torch.ones(2), out, 1, 2,
        FORM=pixel.GeneralizedDice().form.numbers, CATEGORICAL=False, BLOCK=2,
    )  # fmt: skip
    assert not out.any()
