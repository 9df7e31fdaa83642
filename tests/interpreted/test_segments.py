"""The losses by component on the Triton kernels, in the interpreter, equal the reference and torch."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from fastinstance_kernels import number_ids
from fastinstance_kernels import segments as kernels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastinstance
from fastinstance import reference, segments
from fastinstance.testing import assert_close
from tests.interpreted.test_engine import images
from tests.test_componentwise import ALL_OPTIONS, LOSSES, cc_cases, value_and_gradient
from tests.test_modes import untied
from tests.test_terms import Case, cases

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning")

EXAMPLES = settings().max_examples
MODULES = {
    "CC": fastinstance.CCLoss,
    "CC, given": fastinstance.CCLoss,
    "Tversky": fastinstance.ComponentTverskyLoss,
    "MIL": fastinstance.ComponentMILLoss,
    "recall": fastinstance.LesionRecallLoss,
}
AVERAGED = [name for name in MODULES if name != "Tversky"]


def compare(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    """Sums are multiples of 2^-32, and float32 keeps few digits of a saturated pixel's slope."""
    tolerances = {"atol": 1e-5 * (1 + float(expected[0].abs().amax()))}
    if dtype == torch.float64:
        tolerances = {"rtol": 1e-6, "atol": 1e-8}
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, relative_to="largest", **tolerances)


def evaluate(loss: nn.Module, input: Tensor, target: Tensor, backend: str, **call: Any) -> tuple[Tensor, Tensor]:
    """Value, and the gradient of an uneven sum of values."""
    leaf = input.detach().requires_grad_()
    with fastinstance.use_backend(backend):
        value = loss(leaf, target, **call)
    upstream = torch.linspace(1, 2, value.numel()).to(value).view_as(value)
    return value.detach(), *torch.autograd.grad(value, leaf, upstream)


def check(loss: nn.Module, input: Tensor, target: Tensor, **call: Any) -> None:
    """On the kernels as in torch."""
    found = evaluate(loss, input, target, "triton", **call)
    assert found[0].dtype == (torch.float64 if input.dtype == torch.float64 else torch.float32)
    compare(found, evaluate(loss, input, target, "torch", **call), input.dtype)


def make(name: str, input: Tensor, **options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """A loss, and the regions that it is given."""
    call = {}
    if name == "CC, given":
        ids = torch.randint(4, input.shape, generator=torch.Generator().manual_seed(0))
        call = {"target_regions": ids * 100_003}
    return MODULES[name](**options), call


@settings(max_examples=EXAMPLES // 10, suppress_health_check=list(HealthCheck))
@given(cc_cases())
def test_drawn_scenes_of_cc_loss(case: Case) -> None:
    call = {name: value for name, value in case.scene.kwargs.items() if value is not None}
    if (regions := case.options.pop("target_regions", None)) is not None:
        call["target_regions"] = regions
    found = evaluate(fastinstance.CCLoss(**case.options), case.scene.input, case.scene.target, "triton", **call)
    oracle = value_and_gradient(lambda x, y: reference.cc_loss(x, y, **case.options, **call), case, torch.float64)
    compare(found, oracle, case.scene.input.dtype)


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=EXAMPLES // 15, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_drawn_scenes(name: str, data: st.DataObject) -> None:
    module, options, _ = LOSSES[name]
    case = untied(data.draw(cases()))
    kept = {key: case.options[key] for key in ALL_OPTIONS if key in case.options}
    if "tversky" not in name:
        kept["average"] = case.options["average"]
    call = {key: value for key, value in case.scene.kwargs.items() if value is not None}
    check(module(**options, **kept), case.scene.input, case.scene.target, **call)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_empty_and_full_planes(name: str, reduction: str) -> None:
    """Nothing, noise or everything to be found."""
    input, target = images(3, 1, 5, 36)
    target[0], target[2] = False, True
    loss, call = make(name, input, sigmoid=True, reduction=reduction)
    check(loss, input, target, **call)


@pytest.mark.parametrize("name", MODULES)
def test_classes_of_volumes(name: str) -> None:
    input, target = images(1, 3, 2, 3, 34, density=0.2)
    valid = images(1, 1, 2, 3, 34, density=0.8, seed=1)[1]
    loss, call = make(name, input, softmax=True, include_background=False, connectivity=6)
    check(loss, input, target, valid_mask=valid, **call)


@pytest.mark.parametrize("name", MODULES)
def test_annotated_ids(name: str) -> None:
    """Touching instances of several pieces, in several tiles; where some of a region's pixels are not valid, or all."""
    input, _ = images(2, 1, 9, 40)
    ids = torch.zeros(2, 1, 9, 40, dtype=torch.int64)
    ids[0, ..., :7, :20], ids[0, ..., :7, 20:], ids[0, ..., 8, 35:] = 2**31 - 1, 3, 2**31 - 1
    valid = torch.ones(2, 1, 9, 40)
    valid[0, ..., 30:], valid[1] = 0, 0
    options = {} if name in ("CC", "CC, given") else {"min_size": 5}
    for average in ("instance", "image") if name in AVERAGED else (None,):
        loss, call = make(name, input, sigmoid=True, **options, **({"average": average} if average else {}))
        check(loss, input, ids > 0, target_labels=ids, **call)
        check(loss, input, ids > 0, target_labels=ids, valid_mask=valid, **call)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", MODULES)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    input, target = images(2, 1, 4, 20, dtype=dtype)
    loss, call = make(name, input, sigmoid=True)
    check(loss, input, target, **call)
    p = input.float().sigmoid().to(dtype)
    check(make(name, input)[0], p, target, valid_mask=images(2, 1, 4, 20, density=0.7)[1], **call)


@pytest.mark.parametrize("shape", [(1, 1), (2, 32), (9, 33), (2, 3, 1)])
def test_sizes(shape: tuple[int, ...]) -> None:
    input, target = images(2, 1, *shape)
    for name in MODULES:
        loss, call = make(name, input, sigmoid=True)
        check(loss, input, target, **call)


@pytest.mark.parametrize(
    "pixel_loss",
    ["gdf", "inverse_weighted_dice", fastinstance.DiceCELoss(squared_pred=True, lambda_ce=0.3), "tversky"],
    ids=lambda loss: loss if isinstance(loss, str) else "squared",
)
def test_losses_of_regions(pixel_loss: Any) -> None:
    input, target = images(2, 1, 9, 40, density=0.05)
    check(fastinstance.CCLoss(pixel_loss=pixel_loss, sigmoid=True, spacing=(2.0, 1.0)), input, target)


@pytest.mark.parametrize("name", MODULES)
def test_too_many(name: str) -> None:
    """Planes with more components than `max_instances` are NaN, the others are not."""
    input, target = images(2, 1, 4, 20, density=0.0)
    target[1, 0, ::2, ::4] = True  # 10 components
    input[1] -= 9
    results = []
    for backend, bound in (("torch", 9), ("triton", 9), ("triton", 10)):
        loss = MODULES[name](sigmoid=True, reduction="none", max_instances=bound)
        call = {"target_regions": fastinstance.label(target)[0]} if name == "CC, given" else {}
        over = backend == "triton" and bound == 9
        with pytest.warns(RuntimeWarning, match="had 10 instances") if over else nullcontext():
            results.append(evaluate(loss, input, target, backend, **call))
    expected, few, enough = results
    compare(enough, expected, torch.float64)
    for nan, other in zip(few, expected, strict=True):
        assert_close(nan[0], other[0], rtol=1e-6, atol=1e-8)
        assert nan[1:].isnan().all()


@pytest.mark.parametrize("name", MODULES)
def test_what_is_not_finite_is_not_lost(name: str) -> None:
    input, target = images(3, 1, 4, 34)
    target[1] = False
    input[1, 0, 2, 33], input[2, 0, 0, 0] = float("nan"), float("inf")
    loss, call = make(name, input, sigmoid=True, reduction="none")
    value, gradient = evaluate(loss, input, target, "triton", **call)
    assert value.isnan().flatten().tolist() == [False, True, True]
    assert gradient.isnan().flatten(1).all(1).tolist() == [False, True, True]
    assert gradient[0].isfinite().all()
    valid = torch.ones(3, 1, 4, 34)
    valid[1, 0, 2, 33] = valid[2, 0, 0, 0] = 0
    check(loss, input, target, valid_mask=valid, **call)


@pytest.mark.parametrize("name", ["CC", "CC, given", "recall"])
def test_one_graph(name: str) -> None:
    """torch.compile has no break, and finds what there is without it."""
    torch._dynamo.reset()
    input, target = images(2, 2, 4, 20)
    for options in ({"sigmoid": True}, {"softmax": True, "include_background": False, "max_instances": 99}):
        loss, call = make(name, input, **options)
        expected = evaluate(loss, input, target, "triton", **call)
        compiled = torch.compile(
            lambda x, y, loss=loss, call=call: loss(x, y, **call), fullgraph=True, backend="aot_eager"
        )
        for one, other in zip(evaluate(compiled, input, target, "triton"), expected, strict=True):  # pyright: ignore[reportArgumentType]
            assert torch.equal(one, other)


def test_there_is_no_second_derivative() -> None:
    input, target = images(1, 1, 4, 20)
    leaf = input.requires_grad_()
    with fastinstance.use_backend("triton"):
        value = fastinstance.CCLoss(sigmoid=True)(leaf, target)
        (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.sum(), leaf)


def test_out_of_memory_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room.")

    monkeypatch.setattr(kernels, "forward", forward)
    with (
        fastinstance.use_backend("triton"),
        pytest.raises(torch.OutOfMemoryError, match=r"no room. The tables of the components .* max_instances="),
    ):
        fastinstance.ComponentMILLoss(sigmoid=True)(*images(1, 1, 4, 20))


def test_numbers_of_ids() -> None:
    """In raster order of the first pixel, whatever the ids."""
    ids = torch.zeros(2, 3, 40, dtype=torch.int32)
    ids[0, 0, 30:36], ids[0, 1, 5:20], ids[0, 1, 20:], ids[0, 2, 3] = 2**31 - 1, 7, 2**31 - 1, 4
    ids[1, 2, 39] = 5
    for function in (number_ids, segments.number_ids):
        numbers, counts = function(ids)
        assert counts.tolist() == [3, 1]
        assert torch.equal(
            numbers[0], sum((ids[0] == number) * k for k, number in ((1, 2**31 - 1), (2, 7), (3, 4))).int()
        )
        assert torch.equal(numbers[1], (ids[1] == 5).int())


@pytest.mark.parametrize("loss", [fastinstance.CCLoss, fastinstance.FalseLoss])
def test_what_an_invalid_pixel_holds_stays_out(loss: Any) -> None:
    """Of the gradient as well, whatever the slope of the activation is there."""
    input, target = images(1, 1, 4, 20)
    valid = torch.ones_like(input)
    input[..., 2, 3], valid[..., 2, 3] = float("nan"), 0
    check(loss(other_act=torch.sigmoid), input, target, valid_mask=valid)
