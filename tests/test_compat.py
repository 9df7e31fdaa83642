"""The drop-ins give the numbers of the released code (stored ones, and those of a literal loop on drawn scenes)."""

from __future__ import annotations

import dataclasses
import inspect
import math
from pathlib import Path
from typing import Any

import monai
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastinstance
from fastinstance import compat, functional, masked, reference
from fastinstance.testing import FLOATS, PATTERNS, Scene, assert_close, pattern, scenes
from tests.criteria_cases import CRITERIA, OPTIONS, lovasz
from tests.lines import lines_executed

EXAMPLES = settings().max_examples
pytestmark = pytest.mark.filterwarnings("ignore:.*is called on :UserWarning")

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.npz") if path.stem != "options")
STORED = np.load(GOLDEN / "options.npz")
TERMS = ("pixel", "instance_gt", "instance_pred", "center", "false_pred", "false_gt", "proximity")
WITH_GRADIENT = ("pixel", "instance_gt", "instance_pred", "proximity")
DICE = CRITERIA["dice"]
NO_CAPS = {"max_cc_out": 0, "mul_too_many": math.inf, "num_iterations": 10**9}


def assert_gradient(value: Tensor, leaf: Tensor, expected: np.ndarray, name: str) -> None:
    (gradient,) = torch.autograd.grad(value, leaf, retain_graph=True)
    want = torch.tensor(expected).to(gradient.dtype)
    assert_close(gradient, want, name=name, rtol=1e-5, atol=1e-9, relative_to="largest")


@pytest.mark.parametrize("case", CASES)
def test_the_authors_values_and_gradients(case: str) -> None:
    golden = np.load(GOLDEN / f"{case}.npz")
    p = torch.tensor(golden["prob"], requires_grad=True)
    loss = compat.InstanceLoss(
        DICE,
        DICE,
        DICE,
        activation="none",
        spatial_dims=p.ndim - 2,
        instance_wise_reduce=str(golden["reduce"]),
        centroid_offset=3,
        rate_instead_number=True,
        **NO_CAPS,
    )
    found = dict(zip(TERMS, loss(p, torch.tensor(golden["target"])), strict=True))
    assert list(golden["term_names"]) == list(TERMS)
    for name, expected in zip(TERMS, golden["terms"], strict=True):
        assert_close(found[name], expected, name=name, rtol=1e-5 if name == "proximity" else 1e-6)
    for name in WITH_GRADIENT:
        assert_gradient(found[name], p, golden[f"grad_{name}"], name)


@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_values_and_gradients_of_blob_loss(case: str, logits: bool) -> None:
    golden = np.load(GOLDEN / f"{case}.npz")
    p, target = torch.tensor(golden["prob"]), torch.tensor(golden["target"])
    x = (p.logit().clamp(-40, 40) if logits else p).requires_grad_()
    slope = (p * (1 - p)).detach().numpy() if logits else 1
    blob = fastinstance.BlobLoss(pixel_loss="dice", sigmoid=logits).terms(x, target).blob
    assert_close(blob, golden["blob_dice"], rtol=1e-6, atol=1e-12)
    assert_gradient(blob, x, golden["grad_blob_dice"] * slope, "blob")
    if not logits:
        ids, _ = fastinstance.label(target)
        blob = compat.compute_blob_loss_multi(DICE, x, ids)
        assert_close(blob, golden["blob_dice"], rtol=1e-6, atol=1e-12)
        assert_gradient(blob, x, golden["grad_blob_dice"], "compute_blob_loss_multi")


def stored_scene() -> tuple[Tensor, Tensor]:
    return torch.tensor(STORED["logits"]).double(), torch.tensor(STORED["labels"])


@pytest.mark.filterwarnings("ignore:activation=:UserWarning")
@pytest.mark.parametrize(("option", "criterion"), [(o, c) for o, (_, names) in OPTIONS.items() for c in names])
def test_every_option_and_criterion(option: str, criterion: str) -> None:
    logits, ids = stored_scene()
    options: dict[str, Any] = {"activation": "none", "centroid_offset": 3, **NO_CAPS, **OPTIONS[option][0]}
    hard = options["activation"] == "sigmoid"
    x = (logits if hard else logits.sigmoid()).requires_grad_()
    pixel, other = CRITERIA["sigmoid" if hard else criterion], CRITERIA[criterion]
    loss = compat.InstanceLoss(pixel, other, other, spatial_dims=2, **options)
    found = loss(x, (ids > 0).double())
    for name, value, expected in zip(TERMS, found, STORED[f"{option}/{criterion}/values"], strict=True):
        assert_close(value, expected, name=name, rtol=1e-5 if name == "proximity" else 1e-6, atol=1e-12)
    gradients = STORED[f"{option}/{criterion}/gradients"]
    for name, expected in zip(WITH_GRADIENT, gradients, strict=True):
        assert_gradient(found[TERMS.index(name)], x, expected, name)
    without = compat.InstanceCenterLoss(pixel, other, other, spatial_dims=2, **options)(x, (ids > 0).double())
    assert torch.equal(torch.stack(without), torch.stack(found[:6]))


@pytest.mark.parametrize("kind", ["logits", "probabilities", "channels"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_compute_blob_loss_multi(criterion: str, kind: str) -> None:
    key = f"blob {kind}/{criterion}"
    if f"{key}/values" not in STORED:
        return
    logits, ids = stored_scene()
    x = logits.sigmoid() if kind == "probabilities" else logits
    if kind == "channels":
        x, ids = torch.cat([x, x.flip(-1)], 1), torch.cat([ids, ids.flip(-1)], 1)
    x.requires_grad_()
    value = compat.compute_blob_loss_multi(CRITERIA[criterion], x, ids)
    assert_close(value, STORED[f"{key}/values"][0], rtol=1e-6)
    assert_gradient(value, x, STORED[f"{key}/gradients"][0], "blob")


def test_blob_labels_of_one_channel_serve_all() -> None:
    logits, ids = stored_scene()
    x = torch.cat([logits, logits.flip(-1)], 1)
    value = compat.compute_blob_loss_multi(lambda P, G: (P - G).square().mean(), x, ids)
    per_image = []
    for b in (0, 1, 3):
        blobs = []
        for n in reference.ids_in(ids[b]):
            own = ids[b] == n
            blobs.append((x[b] * (own | (ids[b] == 0)) - own.double()).square().mean())
        per_image.append(torch.stack(blobs).mean())
    assert_close(value, torch.stack(per_image).mean())


def window(center: float, offset: int, size: int) -> slice:
    c = math.ceil(center)
    return slice(max(c - offset - 1, 0), max(min(c + offset, size), 0))


def wide_box(pixels: Tensor) -> list[tuple[float, float, float]]:
    box = []
    for coordinates, size in zip(pixels.nonzero().T, pixels.shape, strict=True):
        low, high = int(coordinates.min()), int(coordinates.max())
        extent = max(high - low, 1)
        low, high = max(low - extent - 1, 0), min(high + extent, size)
        box.append((low, high, low + math.ceil((high - low) / 2)))
    return box


def distance(a: list[tuple[float, float, float]], b: list[tuple[float, float, float]]) -> float:
    shared = math.prod(max(min(x[1], y[1]) - max(x[0], y[0]), 0) for x, y in zip(a, b, strict=True))
    union = math.prod(x[1] - x[0] for x in a) + math.prod(x[1] - x[0] for x in b) - shared
    tau = sum((max(x[1], y[1]) - min(x[0], y[0])) ** 2 for x, y in zip(a, b, strict=True))
    return 1 - shared / union + sum((x[2] - y[2]) ** 2 for x, y in zip(a, b, strict=True)) / (tau + 1e-7)


def literal(p: Tensor, ids: Tensor, criterion: Any, *, no_tp: bool, offset: int, threshold: float) -> list[Tensor]:
    """Section by section what the authors' loop does with one image after the other; p `[B, 1, *S]`."""
    q_all, _ = reference.connected_components(p >= threshold)
    entries: list[list[Tensor]] = [[], []]
    rest: list[list[Tensor]] = [[], [], [], []]
    for image in range(len(p)):
        P, t, q = p[image, 0], ids[image, 0], q_all[image, 0]
        y, size = t > 0, t.shape

        def value(prediction: Tensor, target: Tensor) -> Tensor:
            return criterion(prediction[None, None], target.to(prediction.dtype)[None, None])

        maps, boxes, losses = [P * 0.0, P.detach() * 0.0], [], []
        reach = [math.ceil(length / max(size) * offset) for length in size]
        for side, labels in enumerate((q, t)):
            for k in sorted(reference.ids_in(labels), reverse=True):
                pixels = labels == k
                place = tuple(map(window, pixels.nonzero().double().mean(0).tolist(), reach, size))
                mean = P[pixels].mean()
                maps[side][place] = 1 + 1e-7 + (mean - mean.detach() if side == 0 else 0)
        for mine, other, gt in ((t, q, True), (q, t, False)):
            found, its_boxes = [], []
            for k in reference.ids_in(mine):
                own = mine == k
                linked = reference.pixels_of(other, reference.ids_in(other[own]))
                if not gt:
                    found.append(value(P * own, linked))
                elif no_tp:
                    found.append(value(P * linked * (P.detach() * ~y + own), own))
                else:
                    found.append(value(P * linked, own))
                its_boxes.append(wide_box(own))
            if not found:
                found, its_boxes = [value(P, y)], [[(s // 2 - 1, s // 2 + 1, s // 2) for s in size]]
            losses.append(found)
            boxes.append(its_boxes)
            entries[not gt] += found
        rest[0].append(value(*maps))
        pairs = ((q, t, reference.false_rate_pred), (t, q, reference.false_rate_gt))
        for k, (mine, _, rate) in enumerate(pairs):
            count = len(reference.ids_in(mine))
            rest[1 + k].append(rate(reference.image_from_probabilities(P), t, q) * count)
        pull = []
        for side in (0, 1):
            nearest = [min(distance(box, other) for other in boxes[1 - side]) for box in boxes[side]]
            pull.append(sum(d * entry for d, entry in zip(nearest, losses[side], strict=True)))
        rest[3].append((pull[1] - pull[0]) ** 2)
    means = [torch.stack(values).mean() for values in (*entries, *rest)]
    return [criterion(p, (ids > 0).to(p.dtype)), *means]


@st.composite
def drawn(draw: st.DrawFn) -> tuple[Scene, dict[str, Any]]:
    scene = draw(scenes(channels=(1, 1), dtypes=(torch.float64,), labels=True, probabilities=True))
    options = {
        "no_tp": draw(st.booleans()),
        "offset": draw(st.integers(0, 3)),
        "threshold": draw(st.sampled_from((0.5, 0.3))),
    }
    return scene, options


@pytest.mark.parametrize("criterion", ["dice", "squared sigmoid", "dicefocal", "lovasz"])
@settings(max_examples=EXAMPLES)
@given(case=drawn())
def test_a_literal_loop_gives_the_same(criterion: str, case: tuple[Scene, dict[str, Any]]) -> None:
    scene, options = case
    ids = scene.target_labels
    if ids is None:
        ids, _ = fastinstance.label(scene.target)
    function = CRITERIA[criterion]
    loss = compat.InstanceLoss(
        function,
        function,
        function,
        activation="none",
        spatial_dims=scene.input.ndim - 2,
        instance_wise_loss_no_tp=options["no_tp"],
        centroid_offset=options["offset"],
        segmentation_threshold=options["threshold"],
        **NO_CAPS,
    )
    leaf = scene.leaf()
    found = loss(leaf, scene.target.double(), scene.target_labels)
    expected = literal(leaf, ids, function, **options)
    # MONAI's focal loss works in float32.
    rough = {"rtol": 1e-5, "atol": 1e-6} if criterion == "dicefocal" else {"rtol": 1e-8, "atol": 1e-10}
    for name, value, want in zip(TERMS, found, expected, strict=True):
        assert_close(value, want, name=name, **rough)
        gradients = [torch.autograd.grad(v, leaf, retain_graph=True)[0] for v in (value, want)]
        assert_close(*gradients, name=f"gradient of {name}", relative_to="largest", **rough)


def make(kind: type = compat.InstanceLoss, **options: Any) -> Any:
    return kind(DICE, DICE, DICE, **{"activation": "none", "spatial_dims": 2, **options})


def specks(number: int, size: tuple[int, int] = (1, 1)) -> Tensor:
    """So many instances of a size in a plane [1, 1, 24, 40]."""
    image = torch.zeros(1, 1, 24, 40)
    for k in range(number):
        image[0, 0, k // 10 * 4 : k // 10 * 4 + size[0], k % 10 * 4 : k % 10 * 4 + size[1]] = 1
    return image


def test_centre_and_false_terms_train() -> None:
    """In the original their gradient is exactly zero."""
    logits, ids = stored_scene()
    p = logits.sigmoid().requires_grad_()
    terms = make(rate_instead_number=True, **NO_CAPS)(p, ids > 0)
    ours = functional.instance_terms(p, ids > 0, average="image")
    for index, name in ((4, "false_pred"), (5, "false_gt")):
        (found,) = torch.autograd.grad(terms[index], p, retain_graph=True)
        (expected,) = torch.autograd.grad(getattr(ours, name), p, retain_graph=True)
        assert expected.any()
        assert_close(found, expected, rtol=1e-6)
    (centre,) = torch.autograd.grad(terms[3], p)
    assert centre.any()


@pytest.mark.parametrize("dtype", FLOATS)
def test_any_floating_dtype(dtype: torch.dtype) -> None:
    logits, ids = stored_scene()
    p = logits.sigmoid().to(dtype).requires_grad_()
    wide = p.detach().double()
    found, expected = make(**NO_CAPS)(p, (ids > 0).to(dtype)), make(**NO_CAPS)(wide, ids > 0)
    assert_close(torch.stack([v.double() for v in found[1:]]), torch.stack(expected[1:]), rtol=1e-4, atol=1e-5)
    sum(found).backward()
    assert p.grad is not None
    assert p.grad.dtype == dtype


def test_an_instance_of_the_first_pixel_counts() -> None:
    """The original's ids are pixel indices, and index 0 is its background."""
    y = torch.zeros(1, 1, 6, 6)
    y[0, 0, 0, 0] = y[0, 0, 4, 4] = 1
    false, missed = make()(y * 0.8, y)[4:6]
    assert (false.item(), missed.item()) == (0, 0)
    missed = make()(y * 0.1, y)[5]
    assert missed.item() == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ids_do_not_depend_on_the_dtype(dtype: torch.dtype) -> None:
    """The original computes ids in the image's dtype, where many are equal."""
    y = specks(60).to(dtype)
    terms = make(max_cc_out=0)(y * 0.75, y)
    assert [term.item() for term in terms[4:6]] == [0, 0]
    missed = make(max_cc_out=0)(y * 0.25, y)[5]
    assert missed.item() == 60


def test_ids_may_be_given_in_float32_as_the_original_makes_them() -> None:
    logits, ids = stored_scene()
    p = logits.sigmoid()
    expected = make(**NO_CAPS)(p, ids > 0)
    for labels in (ids.float() * 1000, ids, ids.int()):
        assert torch.equal(torch.stack(make(**NO_CAPS)(p, ids > 0, labels)), torch.stack(expected))


CAPS: dict[str, tuple[Tensor, Tensor, dict[str, Any], dict[str, Any], list[str]]] = {
    "max_cc_out": (
        specks(51),
        specks(3),
        {},
        {"max_cc_out": 0},
        ["max_cc_out=50", "51 predicted", "set max_cc_out=0"],
    ),
    "mul_too_many": (
        specks(11),
        specks(2),
        {"mul_too_many": 5},
        {"mul_too_many": 5.5},
        ["mul_too_many=5", "set mul_too_many=float('inf')"],
    ),
    "min_instance_size": (
        specks(3, (2, 2)),
        specks(3, (1, 2)),
        {"min_instance_size": 2},
        {"min_instance_size": 1},
        ["min_instance_size=2", "2 pixels", "min_size="],
    ),
    "num_iterations": (
        specks(3, (3, 40)),
        specks(1),
        {"num_iterations": 38},
        {"num_iterations": 39},
        ["num_iterations=38", "set num_iterations=10**9"],
    ),
}


@pytest.mark.parametrize("name", CAPS)
def test_a_cap_is_an_error_where_it_would_change_the_result(name: str) -> None:
    p, y, low, enough, words = CAPS[name]
    with pytest.raises(ValueError, match=f"expected {name}") as raised:
        make(**low)(p, y)
    for word in words:
        assert word in str(raised.value)
    found = torch.stack(make(**enough)(p, y))
    assert torch.equal(found, torch.stack(make(**NO_CAPS)(p, y)))


@settings(max_examples=EXAMPLES)
@given(shape=st.tuples(st.integers(1, 14), st.integers(1, 14)), name=st.sampled_from(PATTERNS), data=st.data())
def test_iterations_needed(shape: tuple[int, int], name: str, data: st.DataObject) -> None:
    """The error comes just where max-pooling so many times would not have reached all pixels of an instance."""
    mask = pattern(name, shape)[None, None]
    steps = data.draw(st.integers(1, 60))
    index = torch.arange(1.0, mask.numel() + 1).view(mask.shape) * mask
    after = index
    for _ in range(steps):
        after = torch.nn.functional.max_pool2d(after, 3, 1, 1) * mask
    settled = torch.equal(after, torch.nn.functional.max_pool2d(after, 3, 1, 1) * mask)
    loss = make(**{**NO_CAPS, "num_iterations": steps})
    if settled:
        loss(mask * 0.9, mask)
    else:
        with pytest.raises(ValueError, match="expected num_iterations"):
            loss(mask * 0.9, mask)


Y = specks(3)
BAD_SETTINGS: dict[str, tuple[dict[str, Any], type[Exception], list[str]]] = {
    "activation": ({"activation": "relu"}, ValueError, ["activation", "'sigmoid'", "'relu'"]),
    "reduce_segmentation": ({"reduce_segmentation": "none"}, ValueError, ["reduce_segmentation", "'none'"]),
    "instance_wise_reduce": ({"instance_wise_reduce": "image"}, ValueError, ["instance_wise_reduce", "'data'"]),
    "spatial_dims": ({"spatial_dims": 4}, ValueError, ["spatial_dims", "2 or 3", "4"]),
    "threshold": ({"segmentation_threshold": 0}, ValueError, ["expected segmentation_threshold", "0"]),
    "iterations": ({"num_iterations": -1}, ValueError, ["num_iterations", "a number of iterations", "-1"]),
    "cap": ({"max_cc_out": 2.5}, ValueError, ["max_cc_out", "a number of instances", "2.5"]),
    "cap of text": ({"mul_too_many": "50"}, ValueError, ["mul_too_many", ">= 0", "'50'"]),
    "cap of NaN": ({"mul_too_many": math.nan}, ValueError, ["mul_too_many", ">= 0", "nan"]),
    "smoother": ({"smoother": math.inf}, ValueError, ["smoother", ">= 0", "inf"]),
    "no offset": ({"centroid_offset": "5"}, ValueError, ["centroid_offset", ">= 0", "'5'"]),
    "offset": ({"centroid_offset": -1}, ValueError, ["centroid_offset", ">= 0", "-1"]),
    "one channel": ({"num_out_chn": 2}, ValueError, ["num_out_chn=2", "outputs[:, c:c + 1]"]),
    "softmax of one": ({"activation": "softmax"}, ValueError, ["num_out_chn > 1", "num_out_chn=1"]),
    "softmax elsewhere": (
        {"activation": "softmax", "num_out_chn": 2, "object_chn": 2},
        ValueError,
        ["object_chn among", "object_chn=2"],
    ),
    "criterion is a name": ({"loss_function_center": "dice"}, TypeError, ["loss_function_center", "-> scalar", "dice"]),
    "criterion is a class": (
        {"loss_function_instance": monai.losses.DiceLoss},
        TypeError,
        ["loss_function_instance", "DiceLoss"],
    ),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings(case: str) -> None:
    options, kind, words = BAD_SETTINGS[case]
    criteria = dict.fromkeys(("loss_function_pixel", "loss_function_instance", "loss_function_center"), DICE)
    with pytest.raises(kind) as made:
        compat.InstanceLoss(**{**criteria, "activation": "none", "spatial_dims": 2, **options})
    loss = make()
    with pytest.raises(kind) as edited:
        loss.edit_parameters(**options)
    for word in words:
        assert word in str(made.value)
        assert word in str(edited.value)


BAD_IMAGES: dict[str, tuple[tuple[Any, ...], type[Exception], list[str]]] = {
    "outputs are 3D": ((Y[..., None], Y[..., None]), ValueError, ["outputs", "2 spatial axes", "(1, 1, 24, 40, 1)"]),
    "outputs of two channels": ((Y.expand(-1, 2, -1, -1), Y), ValueError, ["outputs [B,1,*S]", "(1, 2, 24, 40)"]),
    "outputs are logits": (
        (Y * 9, Y),
        ValueError,
        ["expected outputs to hold probabilities in [0, 1]", "0 to 9", "activation='sigmoid'"],
    ),
    "outputs of integers": ((Y.int(), Y), TypeError, ["expected outputs of a floating dtype", "outputs.float()"]),
    "outputs are complex": ((Y.cfloat(), Y), TypeError, ["expected outputs of a floating dtype", "complex64"]),
    "no outputs": ((Y[:0], Y[:0]), ValueError, ["expected outputs with at least one pixel", "(0, 1, 24, 40)"]),
    "labels are complex": ((Y, Y.cfloat()), TypeError, ["expected labels of a real dtype", "complex64"]),
    "outputs are a list": (([1.0], Y), TypeError, ["outputs", "list"]),
    "labels elsewhere": ((Y, Y.to("meta")), ValueError, ["labels", "device of the outputs, cpu", "meta"]),
    "labels of another size": ((Y, Y[..., 1:]), ValueError, ["labels [B,1,*S] = (1, 1, 24, 40)", "(1, 1, 24, 39)"]),
    "labels without channels": ((Y, Y[:, 0]), ValueError, ["labels", "(1, 24, 40)"]),
    "labels are not binary": ((Y, Y * 3), ValueError, ["expected labels to hold only 0 and 1", "cc_label_batch="]),
    "ids of another size": ((Y, Y, Y[:, 0].int()), ValueError, ["cc_label_batch", "(1, 24, 40)"]),
    "ids of another batch": ((Y, Y, Y.int().flip(-1)), ValueError, ["cc_label_batch > 0 exactly where", "6 pixels"]),
    "ids in half precision": ((Y, Y, Y.half()), TypeError, ["cc_label_batch", "integer dtype", "float16"]),
    "ids are a mask": ((Y, Y, Y > 0), TypeError, ["cc_label_batch", "torch.bool"]),
    "ids out of range": ((Y, Y, Y.long() << 40), ValueError, ["expected cc_label_batch between 0 and 2147483647"]),
    "ids with fractions": ((Y, Y, Y * 1.5), ValueError, ["cc_label_batch", "whole numbers"]),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images(case: str) -> None:
    arguments, kind, words = BAD_IMAGES[case]
    quiet = lambda outputs, labels: (outputs * 0).sum()  # noqa: E731
    loss = compat.InstanceLoss(quiet, DICE, DICE, activation="none", spatial_dims=2)
    with pytest.raises(kind) as raised:
        loss(*arguments)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int32, torch.int64, torch.float32])
def test_values_are_checked_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the names of these arguments, and ids of any dtype are the same."""
    ids = fastinstance.label(Y)[0]
    expected = make()(Y * 0.8, Y, ids)
    monkeypatch.setattr("fastinstance.scene.check_values", lambda *_, **__: pytest.fail("checked again"))
    assert_close(make()(Y * 0.8, Y, ids.to(dtype)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["loss_function_pixel", "loss_function_instance", "loss_function_center"])
def test_criteria_that_return_no_scalar(name: str) -> None:
    loss = make()
    loss.edit_parameters(**{name: monai.losses.DiceLoss(reduction="none")})
    with pytest.raises(ValueError, match=rf"expected {name}=DiceLoss to return a scalar .* reduction='mean'"):
        loss(Y * 0.8, Y)


BAD_BLOBS: dict[str, tuple[tuple[Any, Any], type[Exception], list[str]]] = {
    "outputs of integers": ((Y.int(), Y), ValueError, ["network_outputs", "floating", "int32"]),
    "outputs without channels": ((Y[0], Y), ValueError, ["network_outputs [B,C,H,W]", "(1, 24, 40)"]),
    "labels without channels": ((Y, Y[0]), ValueError, ["multi_label [B,1,*S]", "(1, 24, 40)"]),
    "labels in half precision": ((Y, Y.half()), TypeError, ["multi_label", "float16"]),
    "labels with fractions": ((Y, Y * 0.5), ValueError, ["multi_label", "whole numbers"]),
    "labels elsewhere": ((Y, Y.to("meta")), ValueError, ["multi_label", "device of the outputs, cpu", "meta"]),
    "labels below 0": ((Y, -Y), ValueError, ["multi_label", "from 0 to"]),
    "labels that do not fit 31 bits": ((Y, Y.long() << 40), ValueError, ["multi_label", "from 0 to 2147483647"]),
    "no image": ((Y[:0], Y[:0]), ValueError, ["at least one pixel", "(0, 1, 24, 40)"]),
    "labels are None": ((Y, None), TypeError, ["multi_label", "NoneType"]),
}


@pytest.mark.parametrize("case", BAD_BLOBS)
def test_bad_blobs(case: str) -> None:
    arguments, kind, words = BAD_BLOBS[case]
    with pytest.raises(kind) as raised:
        compat.compute_blob_loss_multi(DICE, *arguments)
    for word in words:
        assert word in str(raised.value)


def test_no_blob_is_a_connected_zero() -> None:
    for criterion in (DICE, lovasz):
        x = Y.clone().requires_grad_()
        value = compat.compute_blob_loss_multi(criterion, x, Y * 0)
        value.backward()
        assert value.item() == 0
        assert x.grad is not None
        assert not x.grad.any()


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_thresholded_predictions_say_that_they_do_not_train(activation: str) -> None:
    x = torch.cat([specks(2) * 0, specks(4) * 4 - 2], 1)[:, -1 if activation == "sigmoid" else 0 :].requires_grad_()
    loss = make(activation=activation, num_out_chn=x.shape[1], object_chn=1)
    with pytest.warns(UserWarning, match=rf"activation='{activation}'.*gradient of zero.*activation='none'"):
        first = loss(x, specks(3))
    hard = (specks(4) > 0).float()
    assert_close(torch.stack(first[1:]), torch.stack(make()(hard, specks(3))[1:]))
    again = loss(x, specks(3))  # no second warning, which would be an error here
    (gradient,) = torch.autograd.grad(sum(again[1:]), x)
    assert not gradient.any()
    loss(x.detach(), specks(3))


def test_arguments_stand_in_the_authors_order() -> None:
    shared = ["loss_function_pixel", "loss_function_instance", "loss_function_center", "activation", "num_out_chn"]
    shared += ["object_chn", "spatial_dims", "reduce_segmentation", "instance_wise_reduce", "num_iterations"]
    last = ["instance_wise_loss_no_tp", "rate_instead_number", "weighted_instance_wise", "weighted_fdr"]
    instance = ["max_cc_out", "min_instance_size", "segmentation_threshold", "centroid_offset", "mul_too_many"]
    center = ["segmentation_threshold", "max_cc_out", "mul_too_many", "min_instance_size", "centroid_offset"]
    caps = {compat.InstanceLoss: [*instance, "smoother"], compat.InstanceCenterLoss: [*center, "smoother"]}
    for kind, names in caps.items():
        parameters = inspect.signature(kind).parameters
        assert list(parameters) == [*shared, *names, *last]
        defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
        assert defaults == {
            **{"activation": "sigmoid", "num_out_chn": 1, "object_chn": 1, "spatial_dims": 3},
            **{"reduce_segmentation": "mean", "instance_wise_reduce": "instance", "num_iterations": 350},
            **{"max_cc_out": 50, "min_instance_size": 0, "segmentation_threshold": 0.5, "centroid_offset": 5},
            **{"mul_too_many": 50, "smoother": 1e-07, "instance_wise_loss_no_tp": True},
            **{"rate_instead_number": False, "weighted_instance_wise": False, "weighted_fdr": False},
        }


def test_parameters_are_printed_and_edited(capsys: pytest.CaptureFixture[str]) -> None:
    loss = make(max_cc_out=7)
    loss.print_parameters()
    printed = capsys.readouterr().out
    assert " -> loss_function_pixel: DiceLoss()\n" in printed
    assert " -> reduce: mean\n" in printed
    assert " -> max_cc_out: 7\n" in printed
    loss.edit_parameters(max_cc_out=0, reduce_segmentation="sum", loss_function_center=lovasz, activation=None)
    assert (loss.max_cc_out, loss.reduce, loss.activation) == (0, "sum", "none")
    assert loss.loss_function_center is lovasz
    assert make(compat.InstanceCenterLoss, max_cc_out=3).max_cc_out == 3
    with pytest.raises(TypeError, match=r"expected parameters among .*, got max_cc"):
        loss.edit_parameters(max_cc=3)
    with pytest.raises(ValueError, match="spatial_dims"):
        loss.edit_parameters(max_cc_out=5, spatial_dims=4, loss_function_center=torch.nn.MSELoss())
    assert (loss.max_cc_out, loss.spatial_dims, loss.loss_function_center) == (0, 2, lovasz), "all or nothing"


def test_pixel_losses_of_the_library_are_criteria_too() -> None:
    logits, ids = stored_scene()
    p = logits.sigmoid()
    for name in ("DiceLoss", "GeneralizedDiceFocalLoss"):
        ours = getattr(fastinstance, name)()
        found = compat.InstanceLoss(ours, ours, ours, activation="none", spatial_dims=2, **NO_CAPS)(p, ids > 0)
        only = functional.instance_terms(p[:2], ids[:2] > 0, instance_loss=ours)
        images = compat.InstanceLoss(ours, ours, ours, activation="none", spatial_dims=2, **NO_CAPS)(p[:2], ids[:2] > 0)
        assert_close(images[2], only.instance_pred)
        assert torch.stack(found).isfinite().all()


def test_pixel_losses_of_the_library_with_a_sigmoid_see_masked_logits() -> None:
    logits, ids = stored_scene()
    losses = {"sigmoid": fastinstance.DiceLoss(sigmoid=True), "focal": fastinstance.FocalLoss(gamma=1.5, sigmoid=True)}
    for name, loss in losses.items():
        value = compat.compute_blob_loss_multi(loss, logits, ids)
        assert_close(value, STORED[f"blob logits/{name}/values"][0], rtol=1e-6)
    with pytest.raises(ValueError, match="expected criterion without softmax and other_act"):
        compat.compute_blob_loss_multi(fastinstance.DiceLoss(other_act=torch.tanh), logits, ids)


def test_no_python_iteration_over_instances() -> None:
    def count(instances: int) -> int:
        y = specks(instances)
        ids, _ = fastinstance.label(y)

        def step() -> None:
            for criterion in (DICE, CRITERIA["dicefocal"], lovasz):
                loss = compat.InstanceLoss(criterion, criterion, criterion, activation="none", spatial_dims=2)
                loss(y * 0.8, y)
                compat.compute_blob_loss_multi(criterion, y, ids)

        return lines_executed(step)

    count(2)  # whatever happens only once
    assert count(3) == count(12)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, ids = stored_scene()
    loss = compat.InstanceLoss(lovasz, lovasz, lovasz, activation="none", spatial_dims=2, **NO_CAPS)
    y = (ids > 0).double()
    whole = torch.stack(loss(logits.sigmoid(), y))
    monkeypatch.setattr(masked, "_CHUNK", 250)
    assert_close(torch.stack(loss(logits.sigmoid(), y)), whole)


def test_what_is_not_finite_is_refused_or_stays() -> None:
    scene = dataclasses.replace(Scene(Y.clone(), Y))
    scene.input[0, 0, 5, 5] = math.nan
    with pytest.raises(ValueError, match="probabilities"):
        make()(scene.input, scene.target)
    assert compat.compute_blob_loss_multi(DICE, scene.input, Y).isnan()
