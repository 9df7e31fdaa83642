"""The losses on the Triton kernels, in the interpreter, equal `fastinstance.reference` in value and gradient."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from triton.runtime.interpreter import InterpretedFunction

import fastinstance
from fastinstance import functional, fused, reference
from fastinstance.testing import assert_close, pattern
from tests.table_kernels import insert_all, reach
from tests.test_terms import LOSSES, Case, cases

# numpy warns of what a GPU computes in silence.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning")

EXAMPLES = settings().max_examples
SHARES = {"proximity": 0.01}
"""What a term counts in the gradient, where that is not 1: a squared sum would drown the others."""


def evaluate(function: Callable[..., Any], input: Tensor, target: Tensor, **options: Any) -> dict[str, Tensor]:
    """Every term, and the gradient of an uneven sum of them."""
    leaf = input.detach().requires_grad_()
    terms = function(leaf, target, **options)._asdict()
    upstream = []
    for place, (name, value) in enumerate(terms.items()):
        share = SHARES.get(name, 1.0) * (1 + 0.1 * place)
        upstream.append(torch.linspace(share, 2 * share, value.numel()).to(value).view_as(value))
    (gradient,) = torch.autograd.grad(list(terms.values()), leaf, upstream)
    return {**{name: value.detach() for name, value in terms.items()}, "gradient": gradient}


def on_kernels(input: Tensor, target: Tensor, *, blob: bool = False, **options: Any) -> dict[str, Tensor]:
    with fastinstance.use_backend("triton"):
        return evaluate(functional.blob_terms if blob else functional.instance_terms, input, target, **options)


def check(input: Tensor, target: Tensor, *, blob: bool = False, **options: Any) -> None:
    found = on_kernels(input, target, blob=blob, **options)
    oracle = reference.blob_terms if blob else reference.instance_terms
    expected = evaluate(oracle, input.double(), target, **options)
    wide = input.dtype == torch.float64
    largest = max((v[v.isfinite()].abs().amax().item() for v in expected.values() if v.isfinite().any()), default=0.0)
    for name, want in expected.items():
        assert found[name].dtype == (input.dtype if wide or name == "gradient" else torch.float32), name
        # Sums over instances are rounded to multiples of 2^-32; float32 keeps few digits of a saturated pixel's slope.
        tolerances = {"rtol": 1e-6, "atol": 1e-8} if wide else {"atol": 1e-5 * (1 + largest)}
        assert_close(found[name], want, name=name, relative_to="largest", **tolerances)


def images(
    *shape: int, density: float = 0.3, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Logits and a target that have much in common."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(shape, generator=generator) < density
    logits = 1.5 * torch.randn(shape, generator=generator, dtype=torch.float64) + 2.0 * target - 1.5
    return logits.to(dtype), target


def of_masks(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, 1, *S] of predicted masks [B, *S], none of them sure, and the targets."""
    size = torch.rand(predicted.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 0.1
    return torch.where(predicted, size, -size)[:, None], target[:, None]


@settings(max_examples=EXAMPLES // 6, suppress_health_check=list(HealthCheck))
@given(cases())
def test_drawn_scenes(case: Case) -> None:
    check(case.scene.input, case.scene.target, **case.arguments())


@settings(max_examples=EXAMPLES // 4, suppress_health_check=list(HealthCheck))
@given(cases(blob=True))
def test_drawn_scenes_of_blob_loss(case: Case) -> None:
    check(case.scene.input, case.scene.target, blob=True, **case.arguments())


@settings(max_examples=EXAMPLES // 10, suppress_health_check=list(HealthCheck))
@given(cases(dtypes=(torch.float32, torch.float16, torch.bfloat16)))
def test_drawn_scenes_in_low_precision(case: Case) -> None:
    # Both get the same probabilities: what the activation rounds off 1 - p, no loss can know.
    if act := case.options.pop("other_act", None):
        case = case._replace(
            scene=dataclasses.replace(case.scene, input=act(case.scene.input.float()).to(case.scene.input.dtype))
        )
    check(case.scene.input, case.scene.target, **case.arguments())


@pytest.mark.parametrize("blob", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_empty_and_full_planes(reduction: str, blob: bool) -> None:
    """Nothing, noise or everything on either side, each with each."""
    _, noise = images(1, 5, 34)
    kinds = [torch.zeros_like(noise[0]), noise[0], torch.ones_like(noise[0])]
    predicted, target = (torch.stack(side) for side in zip(*itertools.product(kinds, kinds), strict=True))
    check(*of_masks(predicted, target), blob=blob, sigmoid=True, instance_loss="gdf", reduction=reduction)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (3, 31), (2, 32), (9, 33), (3, 70), (1, 1, 1), (2, 3, 33)])
def test_sizes(shape: tuple[int, ...]) -> None:
    check(*images(2, 1, *shape), sigmoid=True, instance_loss="dicece", average="image")


@pytest.mark.parametrize(
    ("connectivity", "center_size", "spacing"),
    [(6, 2, None), (18, (9, 1, 4), (1.0, 3.0, 0.5)), (26, 3, (2.0, 1.0, 1.0))],
)
def test_volumes(connectivity: int, center_size: Any, spacing: Any) -> None:
    case = images(1, 1, 3, 4, 34, density=0.2)
    check(*case, sigmoid=True, connectivity=connectivity, center_size=center_size, spacing=spacing)


@pytest.mark.parametrize("center_size", [1, 2, (5, 4), (9, 15)])
def test_center_sizes(center_size: Any) -> None:
    check(*images(1, 1, 4, 13, density=0.15), sigmoid=True, center_size=center_size, spacing=(1.0, 2.5))


@pytest.mark.parametrize("blob", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_pixel_losses(loss: str, blob: bool) -> None:
    centers = {} if blob else {"center_loss": loss}
    check(*images(2, 1, 4, 20), blob=blob, sigmoid=True, pixel_loss=loss, instance_loss=loss, **centers)


@pytest.mark.parametrize(
    ("pixel", "instance"),
    [
        (("dice", {"squared_pred": True}), ("dice", {"squared_pred": True})),
        ("dice", ("dicece", {"squared_pred": True, "lambda_ce": 0.3})),
        (("gdf", {"gamma": 2.5}), ("focal", {"gamma": 1.0})),
        (("dice", {"jaccard": True}), ("tversky", {"alpha": 0.3, "beta": 0.7})),
    ],
)
@pytest.mark.parametrize("blob", [False, True])
def test_options_of_pixel_losses(pixel: Any, instance: Any, blob: bool) -> None:
    """Squares next to plain sums, with and without a part per pixel."""
    classes = {
        "dice": fastinstance.pixel.Dice,
        "dicece": fastinstance.DiceCELoss,
        "gdf": fastinstance.GeneralizedDiceFocalLoss,
        "focal": fastinstance.FocalLoss,
        "tversky": fastinstance.TverskyLoss,
    }

    def module(name: str | tuple[str, dict[str, Any]]) -> Any:
        return name if isinstance(name, str) else classes[name[0]](**name[1])

    input, target = images(2, 1, 4, 20)
    found = on_kernels(input, target, blob=blob, sigmoid=True, pixel_loss=module(pixel), instance_loss=module(instance))
    oracle = reference.blob_terms if blob else reference.instance_terms
    expected = evaluate(oracle, input, target, sigmoid=True, pixel_loss=pixel, instance_loss=instance)
    assert_close(found, expected, rtol=1e-6, atol=1e-8, relative_to="largest")


@pytest.mark.parametrize("softmax", [True, False])
def test_channels(softmax: bool) -> None:
    input, _ = images(2, 3, 4, 20)
    target = torch.randint(3, (2, 1, 4, 20), generator=torch.Generator().manual_seed(0))
    options = {"to_onehot_y": True, "include_background": False, "softmax": softmax, "sigmoid": not softmax}
    for reduction in ("mean", "none"):
        check(input, target, pixel_loss="gdf" if softmax else "dicece", reduction=reduction, **options)
    options["include_background"] = True
    check(input, target, pixel_loss="dicece", instance_loss="focal", blob=True, **options)


@pytest.mark.parametrize(
    ("average", "pred_normalizer", "reduction"),
    [("instance", "gt", "mean"), ("image", "gt", "mean"), ("image", "pred", "sum"), ("instance", "gt", "none")],
)
def test_averages(average: str, pred_normalizer: str, reduction: str) -> None:
    input, target = images(3, 1, 4, 20)
    target[0] = 0  # so that the planes differ in their numbers
    target[2, ..., 5:] = 0
    check(input, target, sigmoid=True, average=average, pred_normalizer=pred_normalizer, reduction=reduction)


@pytest.mark.parametrize("blob", [False, True])
@pytest.mark.parametrize("pixel_loss", ["gdf", "inverse_weighted_dice"])
def test_valid_mask(pixel_loss: str, blob: bool) -> None:
    input, target = images(2, 2, 4, 20)
    valid = images(2, 1, 4, 20, density=0.7, seed=1)[1]
    spoilt = torch.where(valid, input, float("nan"))
    check(spoilt, target, blob=blob, sigmoid=True, valid_mask=valid, pixel_loss=pixel_loss, instance_loss="ce")


@pytest.mark.parametrize("blob", [False, True])
@pytest.mark.parametrize("valid", [False, True])
def test_min_size(valid: bool, blob: bool) -> None:
    masks = {"valid_mask": images(2, 1, 5, 20, density=0.8, seed=1)[1]} if valid else {}
    thresholds = {} if blob else {"threshold": 0.4}
    check(*images(2, 1, 5, 20), blob=blob, sigmoid=True, min_size=3, **thresholds, **masks)


@pytest.mark.parametrize("connectivity", [4, 8])
def test_probabilities(connectivity: int) -> None:
    input, target = images(2, 1, 4, 20)
    p = input.sigmoid()
    p[0, 0, 0, :4] = torch.tensor([0.0, 1.0, 1e-9, 1 - 1e-9])
    p[1, 0, 1, 3] = 0.5
    check(p, target, pixel_loss="dicece", instance_loss="gdf", connectivity=connectivity)
    check(p, target, pixel_loss="dicece", instance_loss="gdf", blob=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    input, target = images(2, 1, 5, 20, dtype=dtype)
    check(input, target.to(dtype), sigmoid=True, instance_loss="gdf")
    check(input, target.to(torch.int16), sigmoid=True, blob=True)
    check(input.float().sigmoid().to(dtype), target, threshold=0.25)


def test_a_threshold_between_float32_numbers() -> None:
    """float64 values are compared with a float64 threshold."""
    input, target = images(1, 1, 3, 20)
    p = input.sigmoid()
    p[..., ::2], p[..., 1::2] = 0.7, 0.7 - 1e-12
    check(p, target, threshold=0.7)


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
@pytest.mark.parametrize("blob", [False, True])
def test_not_finite(value: float, blob: bool) -> None:
    """One plane of an image is NaN, those of other images are as they were."""
    input, target = images(2, 1, 4, 20)
    before = on_kernels(input, target, blob=blob, sigmoid=True, reduction="none")
    input[1, 0, 2, 3] = value
    found = on_kernels(input, target, blob=blob, sigmoid=True, reduction="none")
    for name, values in found.items():
        assert values[1].isnan().all(), name
        assert torch.equal(values[0], before[name][0]), name
    joined = on_kernels(input, target, blob=blob, sigmoid=True)
    assert all(values.isnan().all() for name, values in joined.items() if name != "gradient")


def test_not_finite_in_one_channel() -> None:
    """The pixel term of GDF joins the channels of an image; all else is by plane."""
    input, target = images(2, 2, 4, 20)
    input[1, 0, 2, 3] = float("nan")
    found = on_kernels(input, target, sigmoid=True, reduction="none")
    spoilt = {"seg": [[False, False], [True, True]]}
    for name in functional.InstanceTerms._fields:
        assert found[name].isnan().tolist() == spoilt.get(name, [[False, False], [True, False]]), name
    assert found["gradient"][1].isnan().all()
    assert found["gradient"][0].isfinite().all()


@pytest.mark.parametrize("relation", ["equal", "shifted", "crossing"])
def test_more_pairs_than_places(relation: str) -> None:
    """More possible pairs than slots, so that they are hashed: specks on specks, on none, next to crossing lines."""
    target = pattern("checkerboard", (6, 20))
    predicted = ~target if relation == "shifted" else target.clone()
    if relation == "crossing":
        predicted[:, :12] = pattern("stripes", (6, 12))
        target[:, :12] = pattern("stripes", (12, 6)).mT
    check(*of_masks(predicted[None], target[None]), sigmoid=True, connectivity=4, instance_loss="gdf")


@pytest.mark.parametrize("relation", ["equal", "shifted", "no target"])
def test_more_pairs_than_pixels(relation: str) -> None:
    """More possible pairs than the target has pixels, so that few slots are used; without a target, all of them."""
    target = torch.zeros(66, 64, dtype=torch.bool)
    target[1::8, 1::8] = True
    predicted = target if relation == "equal" else target.roll(1, 0)
    if relation == "no target":
        predicted = pattern("specks", (66, 64))
        target = torch.zeros_like(target)
    check(*of_masks(predicted[None], target[None]), sigmoid=True, instance_loss="gdf")


@pytest.mark.parametrize("shape", [(40, 70), (3, 24, 40)])
def test_large_instances(shape: tuple[int, ...]) -> None:
    """Tiles in which all runs are of one pair."""
    target, predicted = torch.zeros(2, 2, *shape, dtype=torch.bool)
    target[..., 1:, 2:39] = True
    predicted[0, ..., :22, 5:37] = True
    check(*of_masks(predicted, target), sigmoid=True, missed="soft", instance_loss="dicece")


@pytest.mark.parametrize(("shape", "connectivity"), [((60, 32), 4), ((24, 6, 16), 6)])
def test_boxes_that_are_out_of_reach(shape: tuple[int, ...], connectivity: int) -> None:
    """More boxes than a block has, those of the target near the first row, the others near the last."""
    density = 0.5 * torch.linspace(0, 1, shape[0]).view(-1, *[1] * (len(shape) - 1)) ** 4
    drawn = torch.rand((2, 1, *shape), generator=torch.Generator().manual_seed(0))
    masks = drawn[0] < density, drawn[1] < density.flip(0)
    spacing = (0.7, *[1.3] * (len(shape) - 1))
    loss = fastinstance.ProximityLoss(sigmoid=True, spacing=spacing, connectivity=connectivity)
    expected = loss(*of_masks(*masks))
    with fastinstance.use_backend("triton"):
        assert_close(loss(*of_masks(*masks)), expected, rtol=1e-7)


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.7, 0.3), (0.7, 0.001)])
def test_the_bound_of_boxes_allows_for_rounding(spacing: tuple[float, float]) -> None:
    """Of two boxes, far from the origin too, it is never above the distance as the kernel computes it."""
    number, generator = 1024, torch.Generator().manual_seed(0)
    for origin in (0, 40_000):
        lower = origin + torch.randint(12, (number + 1, 2), generator=generator)
        lower[:, 1] = lower[-1, 1]
        upper = lower + torch.randint(1, 3, lower.shape, generator=generator)
        boxes = torch.stack([-lower, upper - 1], -1).flatten(1).int()
        nearest, hopeful = torch.empty(number, dtype=torch.int32), torch.zeros(number, dtype=torch.bool)
        reach[(1,)](boxes, nearest, hopeful, *spacing, N=number)
        assert hopeful.all()


@pytest.mark.parametrize("seed", range(6))
def test_hash(seed: int) -> None:
    """Two thirds full, keys of more than 32 bits, each inserted twice: each is there once, past the end included."""
    capacity = 64
    keys = torch.randint(2**40, (2 * capacity // 3,), generator=torch.Generator().manual_seed(seed))
    slots = torch.full((capacity,), -1)
    insert_all[(1,)](slots, keys.repeat(2), 2 * len(keys), capacity, BLOCK=8)
    assert slots[slots >= 0].sort().values.tolist() == keys.sort().values.tolist()


def test_too_many_instances() -> None:
    """Planes with more instances than `max_instances` are NaN, the others are not."""
    input, target = of_masks(torch.zeros(3, 4, 20, dtype=torch.bool), torch.zeros(3, 4, 20, dtype=torch.bool))
    target[1, 0, ::2, ::4] = True  # 10 instances
    input[2, 0, ::2, ::4] = 1.0
    results = []
    for backend, bound in (("torch", None), ("triton", 9), ("triton", 10)):
        loss = fastinstance.InstanceLoss(
            seg=1.0, instance_gt=1.0, proximity=0.1, sigmoid=True, reduction="none", max_instances=bound
        )
        with fastinstance.use_backend(backend):
            leaf = input.clone().requires_grad_()
            with pytest.warns(RuntimeWarning, match="had 10 instances") if bound == 9 else nullcontext():
                value = loss(leaf, target)
        results.append((value.detach(), *torch.autograd.grad(value.sum(), leaf)))
    expected, few, enough = results
    for one, other, nan in zip(enough, expected, few, strict=True):
        assert_close(one, other, rtol=1e-6, atol=1e-8)
        assert_close(nan[0], other[0], rtol=1e-6, atol=1e-8)
        assert nan[1:].isnan().all()


MODULES = {
    "instance": (fastinstance.InstanceLoss, {"seg": 1.0, "instance_gt": 0.5, "center": 2.0, "false_pred": 1.0}),
    "all terms": (fastinstance.InstanceLoss, dict.fromkeys(functional.InstanceTerms._fields, 0.5)),
    "ici": (fastinstance.ICILoss, {}),
    "false": (fastinstance.FalseLoss, {}),
    "proximity": (fastinstance.ProximityLoss, {}),
    "blob": (fastinstance.BlobLoss, {"pixel_loss": "dicece"}),
    "tversky": (fastinstance.TverskyLoss, {"alpha": 0.3}),
    "inverse": (fastinstance.InverseWeightedDiceLoss, {}),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str) -> None:
    module, options = MODULES[name]
    loss = module(**options, sigmoid=True, reduction="none" if name == "all terms" else "mean")
    input, target = images(2, 1, 3, 20)
    results = []
    for backend in ("triton", "torch"):
        leaf = input.clone().requires_grad_()
        with fastinstance.use_backend(backend):
            value = loss(leaf, target)
        results.append((value.detach(), *torch.autograd.grad(value.sum(), leaf)))
    assert_close(*results, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("blob", [False, True])
def test_results_are_bitwise_equal_whatever_memory_held(blob: bool) -> None:
    input, target = images(1, 1, 9, 34)
    options = {"sigmoid": True, "instance_loss": "gdf", "connectivity": 4, "blob": blob}
    first = on_kernels(input, target, **options)
    for name, value in on_kernels(input, target, **options).items():
        assert torch.equal(value, first[name]), name


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the kernels that are launched."""
    names = []
    take = InterpretedFunction.__getitem__

    def counted(kernel: InterpretedFunction, grid: Any) -> Any:
        names.append(kernel.__name__)
        return take(kernel, grid)

    monkeypatch.setattr(InterpretedFunction, "__getitem__", counted)
    return names


def test_launches(launches: list[str]) -> None:
    """However many planes and instances there are, it takes as many kernels."""
    loss = fastinstance.InstanceLoss(**dict.fromkeys(functional.InstanceTerms._fields, 1.0), sigmoid=True)
    for shape in ((1, 1, 2, 3), (2, 2, 9, 20)):
        input, target = images(*shape)
        leaf = input.requires_grad_()
        launches.clear()
        with fastinstance.use_backend("triton"):
            value = loss(leaf, target)
        assert len(launches) == 10, launches
        launches.clear()
        value.backward()
        assert launches == ["coefficients", "gradient"]


def test_wanted_terms_only(launches: list[str]) -> None:
    """A pixel loss labels nothing."""
    input, target = images(1, 1, 3, 20)
    with fastinstance.use_backend("triton"):
        fastinstance.DiceLoss(sigmoid=True)(input.requires_grad_(), target).backward()
    assert launches == ["pack", "prepare", "gather", "coefficients", "gradient"]


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What `fastinstance::terms` is called with."""
    seen = []
    terms = fused._terms

    def recorded(*arguments: Any) -> Any:
        seen.append(arguments)
        return terms(*arguments)

    monkeypatch.setattr(fused, "_terms", recorded)
    return seen


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize(("reduction", "blob"), [("mean", False), ("none", False), ("mean", True)])
def test_operators(arguments: list[tuple[Any, ...]], reduction: str, blob: bool) -> None:
    input, target = images(1, 1, 3, 12, dtype=torch.float32)
    options = {"sigmoid": True, "reduction": reduction, "valid_mask": target | (input > -2)}
    on_kernels(input, target, blob=blob, **options)
    values, target, predicted, valid, *settings = arguments[0]
    values = values.detach().requires_grad_()
    of_terms = (values, target, predicted, valid, *settings)
    torch.library.opcheck(torch.ops.fastinstance.terms.default, of_terms, test_utils=CHECKS)
    found, total, *saved = torch.ops.fastinstance.terms(*of_terms)
    # As `instance_terms` asks for a gradient, as a module does, and both at once.
    upstream = torch.ones_like(found), torch.ones_like(total)
    for to_found, to_total in (upstream, (upstream[0], None), (None, upstream[1])):
        of_gradient = (to_found, to_total, values, valid, saved, *settings)
        torch.library.opcheck(torch.ops.fastinstance.terms_gradient.default, of_gradient, test_utils=CHECKS)


def test_no_second_derivative() -> None:
    input, target = images(1, 1, 3, 20)
    leaf = input.requires_grad_()
    with fastinstance.use_backend("triton"):
        value = fastinstance.InstanceLoss(sigmoid=True)(leaf, target)
    (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="have no second derivative; detach the gradient"):
        gradient.sum().backward()


@pytest.mark.parametrize("loss", [fastinstance.InstanceLoss, fastinstance.CCLoss])
@pytest.mark.parametrize("create_graph", [False, True])
def test_checkpoint(loss: Any, create_graph: bool) -> None:
    """What a checkpoint keeps is there only once."""
    input, target = images(1, 1, 3, 20)
    leaf = input.requires_grad_()
    with fastinstance.use_backend("triton"):
        (expected,) = torch.autograd.grad(loss(sigmoid=True)(leaf, target), leaf)
        value = checkpoint(loss(sigmoid=True), leaf, target, use_reentrant=False)
        (gradient,) = torch.autograd.grad(value, leaf, create_graph=create_graph)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("dyadic", [False, True])
def test_error_of_the_sums(arguments: list[tuple[Any, ...]], dyadic: bool) -> None:
    """Against float64: half a unit for each tile beside float32's rounding; none where nothing is rounded."""
    generator = torch.Generator().manual_seed(0)
    p = torch.rand((1, 1, 24, 96), generator=generator)
    p = (p * 64).floor() / 64 if dyadic else p * 1e-4
    target = torch.zeros_like(p)
    target[..., :11, :70] = target[..., 13:, 3:] = target[..., 12, 40] = 1
    with fastinstance.use_backend("triton"):
        functional.instance_terms(p, target, instance_loss="gdf", threshold=0.99)
    labels, counts = fastinstance.label(target)
    assert int(counts) == 2
    exact = torch.bincount(labels.flatten(), p.flatten().double())[1:]
    _, _, *saved = fused.terms_op(*arguments[0])
    rows = saved[5].view(-1, 7)[:2].double()  # two features alone, two shared, areas, two coordinates
    off = ((rows[:, 0] + rows[:, 2]) / 2.0**32 - exact).abs()
    tiles = 9  # of 8 rows of 32 pixels
    assert (off <= (0 if dyadic else tiles * 2.0**-33 + 8 * 2.0**-24 * exact)).all()


def test_compiled_model() -> None:
    """A model and its loss are one graph, in value and gradient what they are without a compiler."""
    input, target = images(2, 1, 9, 20, dtype=torch.float32)
    loss = fastinstance.InstanceLoss(**dict.fromkeys(functional.InstanceTerms._fields, 0.5), sigmoid=True)
    model = torch.nn.Conv2d(1, 1, 3, padding=1)

    def step(input: Tensor, target: Tensor) -> Tensor:
        return loss(model(input), target)

    results = []
    with fastinstance.use_backend("triton"):
        for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            model.zero_grad()
            value = run(input, target)
            value.backward()
            assert model.weight.grad is not None
            results.append((value.detach(), model.weight.grad.clone()))
    for found, expected in zip(*results, strict=True):
        assert_close(found, expected)
