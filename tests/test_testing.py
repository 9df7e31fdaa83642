"""The public testing module: what the strategies draw, what assert_close says, which bugs check_loss finds."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import find, given, settings
from monai.losses.dice import GeneralizedDiceFocalLoss
from scipy import ndimage
from torch import Tensor

from fastinstance import testing
from fastinstance.testing import PROPERTIES, Scene, assert_close, check_loss, pattern, scenes, with_layout

EXAMPLES = settings().max_examples


def dice(input: Tensor, target: Tensor) -> Tensor:
    """A loss with every property."""
    wide = input if input.dtype == torch.float64 else input.float()
    return dice_of_probabilities(wide.sigmoid(), target)


def dice_of_probabilities(input: Tensor, target: Tensor) -> Tensor:
    """A loss with every property, on probabilities."""
    p = input if input.dtype == torch.float64 else input.float()
    axes = tuple(range(2, input.ndim))
    overlap, total = (p * target).sum(axes), p.sum(axes) + target.sum(axes)
    return (1 - (2 * overlap + 1e-5) / (total + 1e-5)).mean()


class _WrongSlope(torch.autograd.Function):
    """The identity with a slope of 1.1."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, upstream):
        return 1.1 * upstream


class _DeafToUpstream(torch.autograd.Function):
    """The identity; the gradient from above is taken to be 1."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, upstream):
        return torch.ones_like(upstream)


def one_value_per_image(input, target):
    return torch.stack([dice(one[None], other[None]) for one, other in zip(input, target, strict=True)])


def logarithm_of_zero(input, target):
    p = input.sigmoid()
    return -torch.where(target != 0, p, 1 - p).log().mean()


def hard_prediction(input, target):
    return ((input >= 0).to(target.dtype) - target).abs().mean()


def root_of_zero(input, target):
    return dice(input, target) + (input.sigmoid() * target).sum().sqrt()


def no_slope(input, target):
    return dice(input, target).detach() + 0.0 * input.sum()


def wrong_slope(input, target):
    return _WrongSlope.apply(dice(input, target))


def later_images_weigh_more(input, target):
    images = one_value_per_image(input, target)
    weights = torch.arange(1.0, len(images) + 1)
    return (images * weights).sum() / weights.sum()


def left_pixels_weigh_more(input, target):
    ramp = torch.arange(1.0, input.shape[-1] + 1)
    return ((input.sigmoid() - target).square() * ramp).mean()


def memory_read_as_if_contiguous(input, target):
    strides = torch.empty(input.shape).stride()
    return dice(input.as_strided(input.shape, strides), target)


def view_of_memory(input, target):
    return dice(input.view(1, 1, -1), target.reshape(1, 1, -1))


def smoothing_lost_in_half(input, target):
    p = input.sigmoid()
    return 1 - (2 * (p * target).sum() + 1e-8) / (p.sum() + target.sum() + 1e-8)


def deaf_to_upstream(input, target):
    return _DeafToUpstream.apply(dice(input, target))


def clamps_its_input(input, target):
    input.data.clamp_(-3, 3)
    return dice(input, target)


def clears_its_target(input, target):
    value = dice(input, target)
    target.zero_()
    return value


def drops_out(input, target):
    return dice(torch.nn.functional.dropout(input, 0.5), target)


def swallows_nan(input, target):
    return dice(input.nan_to_num(0.0), target)


def rewards_timidity(input, target):
    return dice(input, target) + 2.0 * input.sigmoid().mean()


def divides_by_the_target(input, target):
    return dice(input, target) * target.sum() / target.sum()


PLANTED = {
    one_value_per_image: "scalar",
    logarithm_of_zero: "scalar",
    hard_prediction: "connected",
    root_of_zero: "connected",
    no_slope: "slope",
    wrong_slope: "gradient",
    later_images_weigh_more: "batch_order",
    left_pixels_weigh_more: "flips",
    memory_read_as_if_contiguous: "layout",
    view_of_memory: "layout",
    smoothing_lost_in_half: "half",
    deaf_to_upstream: "upstream",
    clamps_its_input: "no_inplace",
    clears_its_target: "no_inplace",
    drops_out: "repeatable",
    swallows_nan: "nan",
    rewards_timidity: "perfect",
    divides_by_the_target: "empty",
}


def all_but(name: str) -> set[str]:
    return set(PROPERTIES) - {name}


def test_check_loss_accepts_good_losses() -> None:
    check_loss(dice, examples=EXAMPLES // 5)
    check_loss(GeneralizedDiceFocalLoss(sigmoid=True), examples=EXAMPLES // 10)
    check_loss(dice_of_probabilities, probabilities=True, channels=2, examples=EXAMPLES // 10)


@pytest.mark.parametrize(("loss", "name"), PLANTED.items(), ids=lambda value: getattr(value, "__name__", value))
def test_check_loss_finds_the_planted_bug(loss, name) -> None:
    with pytest.raises(AssertionError, match=f"the loss lacks the property '{name}'") as caught:
        check_loss(loss, skip=all_but(name), examples=max(50, EXAMPLES // 2))
    assert "Scene: input [" in str(caught.value)
    assert "target | input" in str(caught.value)


def test_every_property_has_a_planted_bug() -> None:
    assert set(PLANTED.values()) == set(PROPERTIES)


@pytest.mark.parametrize("loss", [later_images_weigh_more, deaf_to_upstream, rewards_timidity])
def test_a_switched_off_property_is_not_asked(loss) -> None:
    check_loss(loss, skip=(PLANTED[loss],), examples=EXAMPLES // 10)


def test_straight_through_switches_finite_differences_off() -> None:
    check_loss(wrong_slope, straight_through=True, skip=all_but("gradient"), examples=EXAMPLES // 10)


def test_check_loss_shows_the_smallest_scene() -> None:
    with pytest.raises(AssertionError) as caught:
        check_loss(later_images_weigh_more, skip=all_but("batch_order"), examples=EXAMPLES)
    assert "Scene: input [2, 1, 1, 1]" in str(caught.value)
    assert "Reversing the order of the images changed the gradient: 2 of 2 values differ" in str(caught.value)


def test_check_loss_reports_an_exception_as_a_sentence() -> None:
    with pytest.raises(AssertionError, match="It raised RuntimeError: view size is not compatible") as caught:
        check_loss(view_of_memory, examples=EXAMPLES // 5)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_check_loss_reports_a_loss_that_fails_now_and_then() -> None:
    calls = itertools.count(1)

    def moody(input, target):
        return dice(input, target) * (float("nan") if next(calls) % 7 == 0 else 1.0)

    with pytest.raises(AssertionError, match=r"'scalar' \(not on every run\)\. The loss of a finite input is nan"):
        check_loss(moody, skip=all_but("scalar"))


def test_check_loss_rejects_an_unknown_property() -> None:
    with pytest.raises(ValueError, match=r"expected skip to hold names from .*got \['flip'\]"):
        check_loss(dice, skip=("flip",))


def features(scene: Scene) -> set[str]:
    """What happens in a scene: dtypes, layouts, kinds of content, and how instances meet."""
    shape = scene.input.shape
    seen = {str(scene.input.dtype), f"{len(shape) - 2}D"}
    seen |= {name for name in ("target_labels", "valid_mask", "spacing") if getattr(scene, name) is not None}
    if not scene.input.is_contiguous():
        seen.add("not contiguous")
    if shape[2:].numel() == 1:
        seen.add("one pixel")
    if (scene.input.abs() == 80).any():
        seen.add("extreme")
    if (scene.input == 0).any():
        seen.add("at the threshold")
    for b, c in itertools.product(range(shape[0]), range(shape[1])):
        target, predicted = scene.target[b, c].numpy() != 0, (scene.input[b, c] >= 0).numpy()
        if not target.any():
            seen.add("empty target")
        if not predicted.any():
            seen.add("empty prediction")
        if target.all():
            seen.add("full target")
        ones = np.ones((3,) * target.ndim)
        t, q = ndimage.label(target, ones)[0], ndimage.label(predicted, ones)[0]
        pairs = set(zip(t[target & predicted].tolist(), q[target & predicted].tolist(), strict=True))
        if pairs:
            seen.add("hit")
        if set(t[target].tolist()) - {n for n, _ in pairs}:
            seen.add("missed")
        if set(q[predicted].tolist()) - {m for _, m in pairs}:
            seen.add("false")
        if len({n for n, _ in pairs}) < len(pairs):
            seen.add("split")
        if len({m for _, m in pairs}) < len(pairs):
            seen.add("merged")
        if scene.target_labels is not None:
            ids = scene.target_labels[b, c].unique()
            if len(ids) > 1 and int(ids.max()) >= len(ids):
                seen.add("gaps in the ids")
    return seen


def test_scenes_have_everything() -> None:
    seen: dict[str, int] = {}

    @settings(max_examples=300)
    @given(scenes(labels=True, valid=True, spacing=True))
    def draw(scene: Scene) -> None:
        for feature in features(scene):
            seen[feature] = seen.get(feature, 0) + 1

    draw()
    usual = {"hit", "missed", "false", "split", "merged", "empty target", "empty prediction", "not contiguous"}
    usual |= {"target_labels", "valid_mask", "spacing", "gaps in the ids", "extreme", "at the threshold"}
    usual |= {"2D", "3D", *map(str, testing.FLOATS)}
    assert {feature for feature in usual if seen.get(feature, 0) < 20} == set()
    assert {"one pixel", "full target"} <= set(seen)


@given(scenes(labels=True, valid=True, spacing=True))
def test_scenes_are_valid(scene: Scene) -> None:
    assert scene.input.shape == scene.target.shape
    assert scene.input.isfinite().all()
    assert ((scene.target == 0) | (scene.target == 1)).all()
    assert torch.equal(scene.to(torch.bfloat16).input.double(), scene.input.double())
    assert scene.spacing is None or len(scene.spacing) == scene.input.ndim - 2
    if scene.target_labels is not None:
        assert torch.equal(scene.target_labels != 0, scene.target != 0)
        assert int(scene.target_labels.min()) >= 0
    if scene.valid_mask is not None:
        assert scene.valid_mask.shape == (scene.input.shape[0], 1, *scene.input.shape[2:])


@given(scenes(probabilities=True, dtypes=(torch.float64,)))
def test_probabilities_are_probabilities(scene: Scene) -> None:
    assert ((scene.input >= 0) & (scene.input <= 1)).all()


@given(scenes(extreme=False))
def test_scenes_that_are_not_extreme_stay_off_the_threshold(scene: Scene) -> None:
    assert float(scene.input.abs().min()) > 0
    assert float(scene.input.abs().max()) <= 6


def test_scenes_shrink_to_one_pixel() -> None:
    calm = settings(max_examples=500, database=None)
    dark = find(scenes(), lambda scene: True, settings=calm)
    assert str(dark).splitlines() == [
        "Scene: input [1, 1, 1, 1] float32, target [1, 1, 1, 1] float32",
        "  image 0, channel 0: target | input",
        "    . |       -2",
    ]
    hit = find(scenes(), lambda scene: bool(((scene.target != 0) & (scene.input >= 0)).any()), settings=calm)
    assert hit.input.numel() == 1


def test_scene_prints_its_planes() -> None:
    input = torch.tensor([[-2.0, 80.0, 0.0], [1.5, -2.0, -2.0]])[None, None]
    labels = torch.tensor([[0, 7, 7], [12, 0, 0]])[None, None]
    scene = Scene(with_layout(input, "transposed"), labels > 0, labels, labels != 12, (1.0, 2.0))
    assert repr(scene).splitlines() == [
        "Scene: input [1, 1, 2, 3] float32, strides (6, 6, 1, 2), target [1, 1, 2, 3] bool, spacing (1.0, 2.0)",
        "  image 0, channel 0: target | input (x: not valid)",
        "    . 7 7 |       -2       80        0",
        "    x . . |      1.5       -2       -2",
    ]
    volume = Scene(torch.zeros(1, 1, 2, 1, 1), torch.ones(1, 1, 2, 1, 1))
    assert repr(volume).splitlines()[2:] == [
        "    slice (0,)",
        "    1 |        0",
        "    slice (1,)",
        "    1 |        0",
    ]
    large = Scene(torch.zeros(1, 1, 32, 32), torch.ones(1, 1, 32, 32))
    assert repr(large).splitlines()[1:] == ["  image 0, channel 0: 1024 target pixels (too large to draw)"]


def test_scene_transforms_keep_the_tensors_together() -> None:
    input = torch.arange(12.0).view(2, 1, 2, 3)
    scene = Scene(input, input > 5, (input > 5).long() * 4, input != 3)
    for changed in (scene.reorder([1, 0]), scene.flip([2, 3]), scene.layout("strided"), scene.to(torch.float64)):
        assert torch.equal(changed.target, changed.input > 5)
        assert torch.equal(changed.target_labels, changed.target * 4)
        assert torch.equal(changed.valid_mask, changed.input != 3)
    assert scene.reorder([1, 0]).input[0, 0, 0, 0] == 6
    assert scene.flip([3]).input[0, 0, 0, 0] == 2
    assert scene.kwargs.keys() == {"target_labels", "valid_mask"}
    assert Scene(input, input > 5).kwargs == {}
    leaf = scene.layout("transposed").leaf()
    assert leaf.requires_grad
    assert leaf.is_leaf
    assert not leaf.is_contiguous()


@pytest.mark.parametrize("name", testing.LAYOUTS)
def test_layouts_keep_values(name: str) -> None:
    for tensor in (torch.arange(120.0).view(2, 3, 4, 5), torch.arange(120).view(1, 2, 3, 4, 5)):
        moved = with_layout(tensor, name)
        assert torch.equal(moved, tensor)
        assert moved.is_contiguous() == (name == "contiguous")
    if name == "channels_last":
        assert with_layout(torch.zeros(2, 3, 4, 5), name).is_contiguous(memory_format=torch.channels_last)
    if name == "strided":
        gaps = with_layout(torch.zeros(1, 1, 2, 2), name).as_strided((4,), (2,), 0)
        assert gaps.isnan().all()


def test_unknown_names_are_errors() -> None:
    with pytest.raises(ValueError, match=r"expected layout to be one of .*, got 'nhwc'"):
        with_layout(torch.zeros(1, 1, 2, 2), "nhwc")
    with pytest.raises(ValueError, match=r"expected pattern to be one of .*, got 'zigzag'"):
        pattern("zigzag", (3, 3))
    with pytest.raises(ValueError, match="expected relative_to to be 'each' or 'largest', got 'all'"):
        assert_close(1.0, 1.0, relative_to="all")


@pytest.mark.parametrize("shape", [(9, 12), (1, 7), (5, 6, 7)])
def test_patterns_are_hard_to_label(shape: tuple[int, ...]) -> None:
    def components(name: str, mask: Tensor | None = None) -> int:
        mask = pattern(name, shape) if mask is None else mask
        return ndimage.label(mask.numpy(), np.ones((3,) * len(shape)))[1]

    assert components("empty") == 0
    assert components("full") == components("comb") == components("spiral") == 1
    assert components("specks") == np.prod([(side + 1) // 2 for side in shape])
    assert components("nested") == max(1, (min(shape) + 3) // 4)
    assert components("stripes") == (shape[-1] + 1) // 2
    spiral = pattern("spiral", shape)
    assert 0.4 < spiral.double().mean() / (1 if min(shape) == 1 else 0.5 ** (len(shape) - 2)) <= 1.01


class Pair(NamedTuple):
    first: Tensor
    second: Tensor | None


def test_assert_close_says_which_and_where() -> None:
    wanted = Pair(torch.tensor(1.0), torch.zeros(2, 3))
    moved = torch.zeros(2, 3)
    moved[1, 2], moved[0, 0] = 0.5, 1e-3
    message = r"second: 2 of 6 values differ, most at \[1, 2\]: got 0.5, expected 0 \(difference 0.5, allowed 1e-06\)"
    with pytest.raises(AssertionError, match=message):
        assert_close(Pair(torch.tensor(1.0), moved), wanted)
    with pytest.raises(AssertionError, match="first: got 2, expected 1"):
        assert_close(Pair(torch.tensor(2.0), moved), wanted)
    with pytest.raises(AssertionError, match="second: expected None, got tensor"):
        assert_close(wanted, Pair(wanted.first, None))
    with pytest.raises(AssertionError, match=r"loss\['a'\]: expected shape \(2,\), got \(3,\)"):
        assert_close({"a": torch.zeros(3)}, {"a": torch.zeros(2)}, name="loss")
    with pytest.raises(AssertionError, match=r"value: expected the keys \['a'\], got \['b'\]"):
        assert_close({"b": 1.0}, {"a": 1.0})
    with pytest.raises(AssertionError, match="value: expected 2 entries, got 1"):
        assert_close([1.0], [1.0, 2.0])
    with pytest.raises(AssertionError, match=r"value\[1\]: got 3, expected 2"):
        assert_close([1.0, 3.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("dtype", "near", "far"),
    [
        (torch.float64, 1 + 5e-10, 1 + 2e-9),
        (torch.float32, 1 + 5e-6, 1 + 3e-5),
        (torch.float16, 1 + 1e-3, 1 + 4e-3),
        (torch.bfloat16, 1 + 7e-3, 1 + 4e-2),
    ],
)
def test_assert_close_follows_the_coarser_dtype(dtype, near, far) -> None:
    one = torch.tensor(1.0, dtype=torch.float64)
    assert_close(torch.tensor(near, dtype=torch.float64).to(dtype), one)
    assert_close(one, torch.tensor(near, dtype=torch.float64).to(dtype))
    with pytest.raises(AssertionError):
        assert_close(torch.tensor(far, dtype=torch.float64).to(dtype), one)


def test_assert_close_on_special_values() -> None:
    nan, inf = float("nan"), float("inf")
    assert_close(torch.tensor([nan, inf, -inf, 1.0]), torch.tensor([nan, inf, -inf, 1.0]))
    assert_close(torch.zeros(0), torch.zeros(0), relative_to="largest")
    assert_close(torch.tensor([1, 2]), torch.tensor([1, 2]))
    for wrong in (nan, inf, -inf, 1.0):
        for right in {nan, inf, -inf, 1.0} - {wrong}:
            with pytest.raises(AssertionError):
                assert_close(torch.tensor(wrong), torch.tensor(right))
    with pytest.raises(AssertionError, match="got 1, expected 2"):
        assert_close(torch.tensor(1), torch.tensor(2))


def test_assert_close_relative_to_the_largest() -> None:
    gradient = torch.tensor([1000.0, 1e-3])
    nearly = torch.tensor([1000.0, 2e-3])
    assert_close(nearly, gradient, relative_to="largest")
    with pytest.raises(AssertionError, match=r"most at \[1\]"):
        assert_close(nearly, gradient)
    with pytest.raises(AssertionError):
        assert_close(nearly, gradient, relative_to="largest", rtol=1e-7, atol=0.0)
