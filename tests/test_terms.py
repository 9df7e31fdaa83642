"""Every term and gradient of the fast engine equals `fastinstance.reference`, and both equal values worked by hand."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastinstance import functional, partition, reference, terms
from fastinstance.testing import FLOATS, PATTERNS, Scene, assert_close, pattern, scenes

EXAMPLES = settings().max_examples
LOSSES = (
    "dice",
    "gdf",
    "dicece",
    "ce",
    "generalized_dice",
    "focal",
    "tversky",
    "inverse_weighted_dice",
)
SMOOTH = 1e-5
TERMS = ("seg", "instance_gt", "instance_pred", "center", "false_gt", "false_pred", "proximity")


def class_indices(scene: Scene) -> Scene:
    """The scene with class indices [B, 1, *S] for a target, and its labels made to agree."""
    channels = scene.input.shape[1]
    number = torch.arange(channels).view(1, -1, *[1] * (scene.input.ndim - 2))
    index = (scene.target.long() * number).amax(1, keepdim=True)
    labels = scene.target_labels
    if labels is not None:
        labels = (index == number) * labels.long().amax(1, keepdim=True).clamp(min=1)
    return dataclasses.replace(scene, target=index, target_labels=labels)


def shared_target(scene: Scene) -> Scene:
    """The scene with the first channel's target [B, 1, *S] for all."""
    labels = scene.target_labels
    if labels is not None:
        labels = labels[:, :1].expand(scene.input.shape)
    return dataclasses.replace(scene, target=scene.target[:, :1], target_labels=labels)


class Case(NamedTuple):
    """What a loss is called with."""

    scene: Scene
    options: dict[str, Any]

    def arguments(self) -> dict[str, Any]:
        return {**self.options, **self.scene.kwargs}


def double_sigmoid(x: Tensor) -> Tensor:
    """An activation of the user's own."""
    return torch.sigmoid(2 * x - 0.5)


@st.composite
def cases(draw: st.DrawFn, *, blob: bool = False, dtypes: tuple[torch.dtype, ...] = (torch.float64,)) -> Case:
    """Scenes with every option that the terms have."""
    scene = draw(scenes(channels=(1, 3), dtypes=dtypes, labels=True, valid=True, spacing=not blob))
    channels = scene.input.shape[1]
    options: dict[str, Any] = {
        "pixel_loss": draw(st.sampled_from(LOSSES)),
        "instance_loss": draw(st.sampled_from((*LOSSES, None) if blob else LOSSES)),
        "connectivity": draw(st.sampled_from((None, 4, 8) if scene.input.ndim == 4 else (None, 6, 18, 26))),
        "min_size": draw(st.sampled_from((0, 0, 2, 3))),
        "reduction": draw(st.sampled_from(("mean", "none", "sum"))),
    }
    if not blob:
        options["center_loss"] = draw(st.sampled_from(LOSSES))
        options["average"] = draw(st.sampled_from(("instance", "image")))
        options["pred_normalizer"] = draw(st.sampled_from(("pred", "gt")))
        options["threshold"] = draw(st.sampled_from((0.5, 0.5, 0.3, 0.7)))
        options["spacing"] = scene.spacing
        sides = st.tuples(*(st.integers(1, 4) for _ in scene.input.shape[2:]))
        options["center_size"] = draw(st.just(3) | st.integers(1, 5) | sides)
    activation = draw(st.sampled_from(("sigmoid", "softmax", "other_act", "probabilities")))
    if activation == "sigmoid" or (activation == "softmax" and channels == 1):
        options["sigmoid"] = True
    elif activation == "softmax":
        options["softmax"] = True
    elif activation == "other_act":
        options["other_act"] = double_sigmoid
    else:
        scene = dataclasses.replace(scene, input=scene.input.sigmoid())
    if channels > 1:
        options["include_background"] = draw(st.booleans())
        form = draw(st.sampled_from(("planes", "planes", "one_hot", "shared")))
        if form == "one_hot":
            scene = class_indices(scene)
            options["to_onehot_y"] = True
        elif form == "shared" and ("softmax" not in options or channels - (not options["include_background"]) == 1):
            scene = shared_target(scene)
    if scene.valid_mask is not None and draw(st.booleans()):
        scene = dataclasses.replace(scene, input=torch.where(scene.valid_mask, scene.input, float("nan")))
    return Case(scene, options)


def terms_and_gradients(
    function: Callable[..., Any], case: Case, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Every term, and the gradient of each under an uneven gradient from above."""
    leaf = case.scene.leaf(dtype)
    terms = function(leaf, case.scene.target, **case.arguments())
    found = {}
    for name, value in zip(terms._fields, terms, strict=True):
        found[name] = value.detach()
        upstream = torch.linspace(1.0, 2.0, value.numel()).to(value).view_as(value)
        (found[f"gradient of {name}"],) = torch.autograd.grad(value, leaf, upstream, retain_graph=True)
    return found


def check_against_reference(case: Case, *, blob: bool = False) -> None:
    name = "blob_terms" if blob else "instance_terms"
    found = terms_and_gradients(getattr(functional, name), case)
    expected = terms_and_gradients(getattr(reference, name), case, torch.float64)
    wide = case.scene.input.dtype == torch.float64
    for name in expected:
        value_dtype = torch.float64 if wide else torch.float32
        dtype = case.scene.input.dtype if name.startswith("gradient") else value_dtype
        assert found[name].dtype == dtype, name
        tolerances: dict[str, Any] = {}
        if not wide:
            # The slope of a saturated pixel is p (1 - p), of which float32 keeps few digits: an error in proportion
            # to the term, however small the gradient.
            value = expected[name.removeprefix("gradient of ")].abs().amax().item()
            tolerances = {"relative_to": "largest", "atol": 1e-5 * (1 + value)}
        assert_close(found[name], expected[name], name=name, **tolerances)


@settings(max_examples=3 * EXAMPLES)
@given(cases())
def test_instance_terms_equal_the_reference(case: Case) -> None:
    check_against_reference(case)


def mean_square(p: Tensor, g: Tensor) -> Tensor:
    """A loss that is not recognised, for which the centre maps are drawn."""
    return (p - g).square().mean()


@pytest.mark.filterwarnings("ignore:center_loss=mean_square is called")
@settings(max_examples=EXAMPLES)
@given(cases(), st.booleans(), st.integers(1, 40))
def test_the_size_of_blocks_changes_nothing(case: Case, drawn: bool, block: int) -> None:
    if drawn:
        case.options["center_loss"] = mean_square
    expected = terms_and_gradients(functional.instance_terms, case)
    with pytest.MonkeyPatch.context() as patch:
        for module in (partition, terms):
            patch.setattr(module, "_BLOCK", block)
        found = terms_and_gradients(functional.instance_terms, case)
    for name, value in expected.items():
        assert_close(found[name], value, name=name)


@settings(max_examples=3 * EXAMPLES // 2)
@given(cases(blob=True))
def test_blob_terms_equal_the_reference(case: Case) -> None:
    check_against_reference(case, blob=True)


@settings(max_examples=EXAMPLES // 2)
@given(cases(dtypes=tuple(dtype for dtype in FLOATS if dtype != torch.float64)))
def test_lower_precision_is_close_to_the_reference(case: Case) -> None:
    """float32 and half precision against the reference on the same numbers in float64."""
    if "other_act" in case.options:
        # The same float32 probabilities for both: what the activation rounds off 1 - p, no loss can know.
        narrow = {"other_act": lambda x: double_sigmoid(x.float()).to(x.dtype)}
        case = case._replace(options={**case.options, **narrow})
    check_against_reference(case)


@settings(max_examples=EXAMPLES // 2)
@given(
    case=cases(),
    value=st.sampled_from((float("nan"), float("inf"), -float("inf"))),
    place=st.integers(0, 10**6),
)
def test_what_is_not_finite_equals_the_reference(case: Case, value: float, place: int) -> None:
    """NaN in the same terms and planes; NaN in the gradients of the same images, and the others as they were."""
    assume(case.options.keys() & {"sigmoid", "softmax"})  # as a probability it is refused
    input = case.scene.input.contiguous().clone()
    input.view(-1)[place % input.numel()] = value
    case = case._replace(scene=dataclasses.replace(case.scene, input=input))
    found = terms_and_gradients(functional.instance_terms, case)
    expected = terms_and_gradients(reference.instance_terms, case)
    for name, want in expected.items():
        got = found[name]
        if name.startswith("gradient"):
            spoilt = want.flatten(1).isnan().any(1)
            assert torch.equal(got.flatten(1).isnan().any(1), spoilt), name
            got, want = got[~spoilt], want[~spoilt]
        assert_close(got, want, name=name)


@pytest.mark.parametrize("instance_loss", ["dice", "gdf"])
@pytest.mark.parametrize("shift", [0, 4, 7])
def test_patterns_equal_the_reference(shift: int, instance_loss: str) -> None:
    """Every pattern against another one (or, with shift 0, itself one pixel off), larger than the drawn scenes."""
    shape = (17, 20)
    target = torch.stack([pattern(name, shape) for name in PATTERNS])[:, None]
    predicted = target.roll(1, -1) if shift == 0 else target.roll(shift, 0)
    size = torch.rand(target.shape, generator=torch.Generator().manual_seed(shift), dtype=torch.float64) * 4
    scene = Scene(torch.where(predicted, size, -size), target)
    options = {"sigmoid": True, "instance_loss": instance_loss, "spacing": (1.0, 2.5), "reduction": "none"}
    check_against_reference(Case(scene, options))


def test_a_thousand_instances() -> None:
    """1024 specks found by predictions of p = 3/4 each: every instance loss is the same, no box is apart."""
    target = pattern("specks", (64, 64))[None, None].double()
    found = functional.instance_terms(0.75 * target, target, pixel_loss="dice")
    each = 1 - (1.5 + SMOOTH) / (1.75 + SMOOTH)
    whole = 1 - (1.5 * 1024 + SMOOTH) / (1.75 * 1024 + SMOOTH)
    # Boxes of 3 x 3 pixels on every other pixel cover everything, up to the last row and column.
    expected = {"seg": whole, "instance_gt": each, "instance_pred": each, "center": 0.0}
    expected |= {"false_gt": 0.0, "false_pred": 0.0, "proximity": 0.0}
    assert_close(found._asdict(), float64(expected), atol=1e-9)


def float64(values: Any) -> Any:
    """Exact tensors of numbers, or of a dictionary of them."""
    if isinstance(values, dict):
        return {name: float64(value) for name, value in values.items()}
    return torch.tensor(values, dtype=torch.float64)


ENGINES = pytest.mark.parametrize("engine", [functional, reference], ids=["engine", "reference"])


def row(*values: float) -> Tensor:
    """An image of one row, [1, 1, 1, W]."""
    return torch.tensor(values, dtype=torch.float64)[None, None, None]


def dice(overlap: float, pred: float, target: float) -> float:
    return 1 - (2 * overlap + SMOOTH) / (pred + target + SMOOTH)


@ENGINES
def test_worked_example(engine: Any) -> None:
    """One instance hit and overshot by a pixel, one missed, one false prediction."""
    p, y = row(0.8, 0.6, 0.7, 0, 0, 0, 0.2, 0.9), row(1, 1, 0, 0, 0, 0, 1, 0)
    leaf = p.requires_grad_()
    found = engine.instance_terms(leaf, y, pixel_loss="dice")
    hit, missed, false = dice(1.4, 2.1, 2), dice(0, 0, 1), dice(0, 0.9, 0)
    # Boxes, in x: n1 [0, 2), n2 [6, 7), m1 [0, 3), m2 [7, 8).
    n1_m1, n2_m2 = 1 - 2 / 3 + 0.5**2 / (3**2 + 1), 1 + 1 / (2**2 + 1)
    expected = {
        "seg": dice(1.6, 3.2, 3),
        "instance_gt": (hit + missed) / 2,
        "instance_pred": (hit + false) / 2,
        "center": dice(5, 5, 6),  # boxes at [0, 3) and [5, 8); [0, 3) and [6, 8)
        "false_gt": 0.5,
        "false_pred": 0.5,
        "proximity": ((n1_m1 * hit + n2_m2 * false) - (n1_m1 * hit + n2_m2 * missed)) ** 2,
    }
    assert_close(found._asdict(), float64(expected), rtol=1e-7)

    inside, outside = -2 / (4.1 + SMOOTH) + (2.8 + SMOOTH) / (4.1 + SMOOTH) ** 2, (2.8 + SMOOTH) / (4.1 + SMOOTH) ** 2
    of_hit = row(inside, inside, outside, 0, 0, 0, 0, 0)
    of_false = row(0, 0, 0, 0, 0, 0, 0, SMOOTH / (0.9 + SMOOTH) ** 2)
    box = -2 / (11 + SMOOTH) + (10 + SMOOTH) / (11 + SMOOTH) ** 2  # of one pixel of the predicted map
    gradients = {
        "instance_gt": of_hit / 2,
        "instance_pred": (of_hit + of_false) / 2,
        "center": row(box, box, box, 0, 0, 0, 0, 2 * box),
        "false_gt": of_hit / 2,
        "false_pred": (of_hit + of_false) / 2,
        "proximity": 2 * n2_m2 * (false - missed) * n2_m2 * of_false,
    }
    for name, gradient in gradients.items():
        (grad,) = torch.autograd.grad(getattr(found, name), leaf, retain_graph=True)
        assert_close(grad, gradient, rtol=1e-6, name=name)


@ENGINES
def test_worked_blob_loss(engine: Any) -> None:
    p, y = row(0.8, 0.6, 0.7, 0, 0, 0, 0.2, 0.9), row(1, 1, 0, 0, 0, 0, 1, 0)
    blob = (dice(1.4, 3.0, 2) + dice(0.2, 1.8, 1)) / 2
    expected = {"seg": float64(dice(1.6, 3.2, 3)), "blob": float64(blob)}
    # A plane without an instance does not count in the mean over instances.
    for extra, planes in ((0, 1), (1, 2)):
        many_p, many_y = torch.cat([p] + extra * [p]), torch.cat([y] + extra * [0 * y])
        found = engine.blob_terms(many_p, many_y, pixel_loss="dice", reduction="none")
        assert_close(found.blob[:1, 0], expected["blob"][None], rtol=1e-7)
        assert not found.blob[1:].any()
        found = engine.blob_terms(many_p, many_y, pixel_loss="dice")
        assert_close(found.blob, expected["blob"], rtol=1e-7)
        seg = (expected["seg"] + extra * dice(0, 3.2, 0)) / planes
        assert_close(found.seg, seg, rtol=1e-7)


# Two instances of a pixel at x = 0 and 2, a row of 5 pixels; the artificial box is [-1, 2) x [1, 4).
FAR, NEAR = 1 + 2**2 / (3**2 + 4**2), 1 - 1 / 9
EMPTY_SIDES = {
    "nothing": (row(0, 0, 0, 0, 0), row(0, 0, 0, 0, 0), {}),
    "missed": (
        row(0.2, 0, 0.3, 0, 0),
        row(1, 0, 1, 0, 0),
        {
            "instance_gt": [dice(0, 0, 1), dice(0, 0, 1)],
            "instance_pred": [dice(0, 0, 2)],
            "center": dice(0, 0, 4),  # boxes [0, 2) and [1, 4)
            "false_gt": 1.0,
            "proximity": (NEAR * dice(0, 0, 2) - (FAR + NEAR) * dice(0, 0, 1)) ** 2,
        },
    ),
    "false": (
        row(0.8, 0.1, 0.9, 0, 0),
        row(0, 0, 0, 0, 0),
        {
            "instance_gt": [dice(0, 1.7, 0)],
            "instance_pred": [dice(0, 0.8, 0), dice(0, 0.9, 0)],
            "center": dice(0, 4, 0),
            "false_pred": 1.0,
            "proximity": (FAR * dice(0, 0.8, 0) + NEAR * dice(0, 0.9, 0) - NEAR * dice(0, 1.7, 0)) ** 2,
        },
    ),
}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@ENGINES
@pytest.mark.parametrize("side", EMPTY_SIDES)
def test_empty_sides(side: str, engine: Any) -> None:
    p, y, expected = EMPTY_SIDES[side]
    found = engine.instance_terms(p.clone().requires_grad_(), y)
    for name in TERMS[1:]:
        want = expected.get(name, 0.0)
        value = getattr(found, name)
        assert value.requires_grad, name
        want = mean(want) if isinstance(want, list) else want
        assert_close(value, float64(want), rtol=1e-9, name=name)


@ENGINES
def test_averages(engine: Any) -> None:
    """The artificial entries count; "image" weighs planes alike; "gt" divides by the entries of the other side."""
    sides = EMPTY_SIDES.values()
    flat = itertools.chain.from_iterable
    p, y = torch.cat([p for p, _, _ in sides]), torch.cat([y for _, y, _ in sides])
    gt = [expected.get("instance_gt", [0.0]) for _, _, expected in sides]
    pred = [expected.get("instance_pred", [0.0]) for _, _, expected in sides]
    per_plane_gt, per_plane = [mean(entries) for entries in gt], [mean(entries) for entries in pred]
    by_gt = [sum(entries) / len(others) for entries, others in zip(pred, gt, strict=True)]
    for average, normalizer, reduction, want_gt, want_pred in (
        ("instance", "pred", "mean", mean(list(flat(gt))), mean(list(flat(pred)))),
        ("instance", "gt", "mean", mean(list(flat(gt))), sum(flat(pred)) / 4),
        ("image", "pred", "mean", mean(per_plane_gt), mean(per_plane)),
        ("image", "gt", "mean", mean(per_plane_gt), mean(by_gt)),
        ("instance", "pred", "sum", sum(per_plane_gt), sum(per_plane)),
        ("image", "gt", "sum", sum(per_plane_gt), sum(by_gt)),
        ("instance", "gt", "none", [[v] for v in per_plane_gt], [[v] for v in by_gt]),
    ):
        found = engine.instance_terms(p, y, average=average, pred_normalizer=normalizer, reduction=reduction)
        assert_close(found.instance_gt, float64(want_gt), rtol=1e-9)
        assert_close(found.instance_pred, float64(want_pred), rtol=1e-9)


@ENGINES
def test_min_size_leaves_the_pixel_term_alone(engine: Any) -> None:
    p, y = row(0.8, 0, 0.9, 0.9, 0), row(1, 0, 1, 1, 0)
    found = engine.instance_terms(p, y, pixel_loss="dice", min_size=2)
    assert_close(found.seg, float64(dice(2.6, 2.6, 3)))
    assert_close(found.instance_gt, float64(dice(1.8, 1.8, 2)))
    assert_close(found.instance_pred, float64(dice(1.8, 1.8, 2)))


@ENGINES
def test_the_smallest_id_owns_a_centre_pixel(engine: Any) -> None:
    """m1 at x = 0 and m2 at x = 2 share x = 1: it moves with m1, which has the smaller id."""
    p = row(0.8, 0, 0.9, 0, 0).requires_grad_()
    found = engine.instance_terms(p, row(1, 0, 1, 0, 0), center_size=(1, 3))
    (grad,) = torch.autograd.grad(found.center, p)
    slope = -2 / (8 + SMOOTH) + (8 + SMOOTH) / (8 + SMOOTH) ** 2  # boxes cover [0, 4)
    assert_close(grad, row(2 * slope, 0, 2 * slope, 0, 0))
