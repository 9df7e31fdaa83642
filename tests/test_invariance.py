"""What must not change a loss: order of the batch, names of ids, direction of an axis, memory layout, dtypes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastinstance
from fastinstance import InstanceTerms, functional
from fastinstance.testing import FLOATS, LAYOUTS, Scene, assert_close, scenes

EXAMPLES = settings().max_examples
DOUBLE = (torch.float64,)
UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
# Neither a flip nor another order of ids moves these. The centre map rounds half pixels up, gives shared pixels to
# the smallest id, and the artificial box of an even side is not in the middle.
SYMMETRIC = ("seg", "instance_gt", "instance_pred", "false_gt", "false_pred")
Result = dict[str, Tensor]


def result(scene: Scene, names: tuple[str, ...] = InstanceTerms._fields, **options: Any) -> Result:
    """These terms on average and per plane, and the gradient of their uneven sum."""
    leaf = scene.leaf()
    options = {"sigmoid": True, "instance_loss": "gdf", "spacing": scene.spacing, **scene.kwargs, **options}
    average = functional.instance_terms(leaf, scene.target, **options)
    planes = functional.instance_terms(leaf, scene.target, reduction="none", **options)
    # Proximity reaches large values, in which the others' gradient would drown.
    total = sum(getattr(average, name) * (0.01 if name == "proximity" else 1 + k) for k, name in enumerate(names))
    (gradient,) = torch.autograd.grad(total, leaf)
    found = {name: getattr(average, name).detach() for name in names}
    found |= {f"{name} per plane": getattr(planes, name).detach() for name in names}
    return {**found, "gradient": gradient}


def mapped(found: Result, per_plane: Callable[[Tensor], Tensor], gradient: Callable[[Tensor], Tensor]) -> Result:
    """`found` as it should be after the scene was changed."""
    changed = {}
    for key, value in found.items():
        change = gradient if key == "gradient" else per_plane if key.endswith("per plane") else same
        changed[key] = change(value)
    return changed


def same(value: Tensor) -> Tensor:
    return value


@settings(max_examples=EXAMPLES // 2)
@given(scene=scenes(max_batch=3, dtypes=DOUBLE, labels=True, valid=True, spacing=True), chance=st.randoms())
def test_order_of_the_batch(scene: Scene, chance: Any) -> None:
    order = list(range(scene.input.shape[0]))
    chance.shuffle(order)
    assert_close(result(scene.reorder(order)), mapped(result(scene), lambda x: x[order], lambda x: x[order]))


@settings(max_examples=EXAMPLES // 3)
@given(scenes(channels=(2, 3), dtypes=DOUBLE, labels=True, spacing=True))
def test_channels_are_images_of_their_own(scene: Scene) -> None:
    """Instance terms never couple channels: C channels are C images of one channel."""
    apart = scene.map(lambda x: x.flatten(0, 1)[:, None])
    shape = scene.input.shape
    names = InstanceTerms._fields[1:]
    before = result(scene, names)
    expected = mapped(before, lambda x: x.reshape(-1, 1), lambda x: x.reshape(-1, 1, *shape[2:]))
    assert_close(result(apart, names), expected)


@settings(max_examples=EXAMPLES // 3)
@given(scenes(dtypes=DOUBLE, labels=True, valid=True))
def test_twice_the_same_batch_is_the_same_mean(scene: Scene) -> None:
    terms, twice = (
        functional.instance_terms(s.input, s.target, sigmoid=True, **s.kwargs)
        for s in (scene, scene.map(lambda x: torch.cat([x, x])))
    )
    assert_close(twice, terms)


@settings(max_examples=EXAMPLES // 2)
@given(scenes(dtypes=DOUBLE, labels=True), st.integers(1, 1000))
def test_only_the_order_of_ids_matters(scene: Scene, step: int) -> None:
    assume(scene.target_labels is not None)
    labels = scene.target_labels.long()
    ids = labels.unique()
    ids = ids[ids > 0]
    spread = (labels[..., None] >= ids).sum(-1) * step
    renamed = dataclasses.replace(scene, target_labels=spread)
    assert_close(result(renamed), result(scene), rtol=0.0, atol=0.0)
    backwards = dataclasses.replace(scene, target_labels=torch.where(labels > 0, 2**31 - labels, 0))
    names = (*SYMMETRIC, "proximity")  # not the centre: the smallest id owns a shared pixel
    assert_close(result(backwards, names), result(scene, names))


@settings(max_examples=EXAMPLES // 2)
@given(scenes(dtypes=DOUBLE, valid=True), st.booleans())
def test_labels_given_are_labels_computed(scene: Scene, diagonal: bool) -> None:
    connectivity = None if diagonal else 2 * (scene.input.ndim - 2)
    target = scene.target if scene.valid_mask is None else scene.target * scene.valid_mask
    labels, _ = fastinstance.label(target, connectivity=connectivity)
    scene = dataclasses.replace(scene, target=target)
    given_labels = dataclasses.replace(scene, target_labels=labels)
    assert_close(result(given_labels, connectivity=connectivity), result(scene, connectivity=connectivity), rtol=0.0)


def sides_are_alike(scene: Scene) -> bool:
    """Whether no plane has instances on one side only, so that no artificial box takes part."""
    truth, predicted = scene.target != 0, scene.input >= 0
    if scene.valid_mask is not None:
        truth, predicted = truth & scene.valid_mask, predicted & scene.valid_mask
    return torch.equal(truth.flatten(2).any(2), predicted.flatten(2).any(2))


@settings(max_examples=EXAMPLES // 2)
@given(scenes(dtypes=DOUBLE, labels=True, valid=True, spacing=True))
def test_flipping_an_axis(scene: Scene) -> None:
    names = (*SYMMETRIC, "proximity") if sides_are_alike(scene) else SYMMETRIC
    before = result(scene, names)
    for axis in range(2, scene.input.ndim):
        after = result(scene.flip([axis]), names)
        assert_close(after, mapped(before, same, lambda x, axis=axis: x.flip(axis)))


@settings(max_examples=EXAMPLES // 2)
@given(scenes(dtypes=DOUBLE, labels=True, valid=True, spacing=True))
def test_swapping_axes(scene: Scene) -> None:
    swapped = scene.map(lambda x: x.transpose(2, -1))
    if scene.spacing is not None:
        swapped = dataclasses.replace(swapped, spacing=scene.spacing[::-1])
    names = (*SYMMETRIC, "proximity")
    expected = mapped(result(scene, names), same, lambda x: x.transpose(2, -1))
    assert_close(result(swapped, names), expected)


@st.composite
def odd_boxes(draw: st.DrawFn) -> Scene:
    """Boxes of odd sides, one to each quarter: their centroids are whole pixels and their centre boxes apart."""
    input, target = torch.full((1, 1, 16, 16), -2.0, dtype=torch.float64), torch.zeros(1, 1, 16, 16)
    for top in (0, 8):
        for left in (0, 8):
            for image in (input, target):
                if draw(st.booleans()):
                    y, x = (draw(st.sampled_from((2, 3, 4))) for _ in range(2))
                    h, w = (draw(st.sampled_from((0, 1))) for _ in range(2))
                    place = (0, 0, slice(top + y - h, top + y + h + 1), slice(left + x - w, left + x + w + 1))
                    image[place] = 1.0 if image is target else 2.0
    return Scene(input, target)


@settings(max_examples=EXAMPLES // 2)
@given(odd_boxes())
def test_flipping_centres(scene: Scene) -> None:
    before = result(scene, ("center",))
    for axes in ([2], [3], [2, 3]):
        expected = mapped(before, same, lambda x, axes=axes: x.flip(axes))
        assert_close(result(scene.flip(axes), ("center",)), expected)


@settings(max_examples=EXAMPLES // 2)
@given(scenes(dims=(2,), dtypes=DOUBLE, labels=True))
def test_an_axis_of_length_one(scene: Scene) -> None:
    """2D images are flat 3D ones; only the diagonal of the boxes of `proximity` grows by the slice."""
    names = (*SYMMETRIC, "center")
    flat = scene.map(lambda x: x[:, :, None])
    for two, three in ((4, 6), (8, 26)):
        expected = mapped(result(scene, names, connectivity=two), same, lambda x: x[:, :, None])
        assert_close(result(flat, names, connectivity=three), expected)


@settings(max_examples=EXAMPLES // 2)
@given(scenes(dtypes=DOUBLE, labels=True, spacing=True), st.sampled_from((0.25, 3.0, 1000.0)))
def test_the_unit_of_spacing_cancels(scene: Scene, unit: float) -> None:
    spacing = scene.spacing or (1.0,) * (scene.input.ndim - 2)
    other = dataclasses.replace(scene, spacing=tuple(unit * side for side in spacing))
    assert_close(result(other, ("proximity",)), result(scene, ("proximity",)))


@settings(max_examples=EXAMPLES // 2)
@given(scenes(layouts=("contiguous",), labels=True, valid=True))
def test_memory_layout(scene: Scene) -> None:
    expected = result(scene)
    for layout in LAYOUTS:
        assert_close(result(scene.layout(layout)), expected, rtol=0.0, atol=0.0, name=layout)


@settings(max_examples=EXAMPLES // 5)
@given(scenes(target_dtypes=(torch.bool,), labels=True, valid=True))
def test_dtypes_of_target_labels_and_mask(scene: Scene) -> None:
    expected = result(scene)
    for dtype in (*FLOATS, *UNSIGNED, torch.int8, torch.int16, torch.int32, torch.int64):
        other = dataclasses.replace(scene, target=scene.target.to(dtype))
        if scene.valid_mask is not None:
            other = dataclasses.replace(other, valid_mask=scene.valid_mask.to(dtype))
        if scene.target_labels is not None:
            room = torch.iinfo(dtype).max if not dtype.is_floating_point else -1
            if scene.target_labels.long().max() <= room:
                other = dataclasses.replace(other, target_labels=scene.target_labels.to(dtype))
        assert_close(result(other), expected, rtol=0.0, atol=0.0, name=str(dtype))


@pytest.mark.parametrize("dtype", [*UNSIGNED, torch.int8, torch.bfloat16])
def test_dtypes_of_class_indices(dtype: torch.dtype) -> None:
    input, classes = torch.randn(2, 3, 6, 5), torch.randint(3, (2, 1, 6, 5))
    options = {"softmax": True, "to_onehot_y": True}
    expected = functional.instance_terms(input, classes, **options)
    assert_close(functional.instance_terms(input, classes.to(dtype), **options), expected, rtol=0.0, atol=0.0)


@settings(max_examples=EXAMPLES // 3)
@given(scenes(dtypes=DOUBLE, labels=True, valid=True))
def test_dtype_of_the_input(scene: Scene) -> None:
    """The drawn logits are exact in every dtype, so only rounding inside differs; half precision adds none."""
    expected = result(scene)
    full = result(scene.to(torch.float32))
    assert_close(full, expected, relative_to="largest")
    for dtype in (torch.float16, torch.bfloat16):
        half = result(scene.to(dtype))
        for name, value in full.items():
            assert half[name].dtype == (dtype if name == "gradient" else torch.float32)
            assert_close(half[name], value.to(half[name].dtype), rtol=0.0, atol=0.0, name=f"{name} in {dtype}")


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf"), 1e30])
@settings(max_examples=EXAMPLES // 5)
@given(scene=scenes(valid=True, labels=True, dtypes=DOUBLE))
def test_what_is_not_valid_does_not_matter(junk: float, scene: Scene) -> None:
    assume(scene.valid_mask is not None)
    invalid = ~scene.valid_mask
    spoilt = dataclasses.replace(scene, input=torch.where(scene.valid_mask, scene.input, junk))
    found = result(spoilt)
    assert_close(found, result(scene), rtol=0.0, atol=0.0)
    assert not (found["gradient"] * invalid).any()
    # A target or an id under the mask does not matter either.
    moved = dataclasses.replace(scene, target=torch.where(invalid, 1 - scene.target.float(), scene.target.float()))
    if scene.target_labels is not None:
        labels = torch.where(invalid & (moved.target > 0), 1, scene.target_labels.long())
        moved = dataclasses.replace(moved, target_labels=labels * (moved.target > 0))
    assert_close(result(moved), result(scene), rtol=0.0, atol=0.0)
