"""The modules: weights, presets and terms, what a training does to them, gradients, dtypes, NaN and Inf."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastinstance
from fastinstance import functional
from fastinstance.testing import FLOATS, PATTERNS, Scene, assert_close, check_loss, pattern, scenes

EXAMPLES = settings().max_examples
PIXEL_LOSSES = (
    "DiceLoss",
    "DiceCELoss",
    "GeneralizedDiceLoss",
    "FocalLoss",
    "GeneralizedDiceFocalLoss",
    "TverskyLoss",
    "InverseWeightedDiceLoss",
)
INSTANCE_LOSSES = ("InstanceLoss", "ICILoss", "FalseLoss", "ProximityLoss", "BlobLoss")
LOSSES = (*PIXEL_LOSSES, *INSTANCE_LOSSES)
TERMS = fastinstance.InstanceTerms._fields
NAN, INF = float("nan"), float("inf")


def make(name: str, **options: Any) -> torch.nn.Module:
    return getattr(fastinstance, name)(**{"sigmoid": True, **options})


def example(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits with hits, misses and false ones, none near the threshold, and their target."""
    chance = torch.Generator().manual_seed(seed)
    shape = shape or (2, 1, 12, 14)
    noise = torch.nn.functional.avg_pool2d(torch.randn(2, *shape, generator=chance).flatten(0, 2), 3, 1, 1)
    truth, score = noise.view(2, *shape)
    logits = 6 * (truth + 0.5 * score)
    return torch.where(logits >= 0, logits + 0.2, logits - 0.2).to(dtype), (truth > 0.2).to(dtype)


def gradient_of(value: Tensor, leaf: Tensor, **options: Any) -> Tensor:
    (gradient,) = torch.autograd.grad(value, leaf, **options)
    return gradient


# Weights and presets


WEIGHTS = {
    "InstanceLoss": {"seg": 1},
    "ICILoss": {"seg": 0.25, "instance_gt": 0.5, "instance_pred": 0, "center": 0.25},
    "FalseLoss": {"seg": 1, "false_gt": 1, "false_pred": 1},
    "ProximityLoss": {"seg": 1, "proximity": 0.1},
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_presets_are_equations_12_to_14(name: str) -> None:
    input, target = example()
    terms = functional.instance_terms(input, target, sigmoid=True)
    expected = sum(weight * getattr(terms, term) for term, weight in WEIGHTS[name].items())
    assert_close(make(name)(input, target), expected)
    assert_close(make(name).terms(input, target), terms)


def test_equation_11_weighs_every_term() -> None:
    input, target = example(dtype=torch.float64)
    weights = dict(zip(TERMS, (0.5, 1.5, -2.0, 0.25, 3.0, 0.75, 0.01), strict=True))
    leaf = input.requires_grad_()
    for reduction in ("mean", "sum", "none"):
        terms = functional.instance_terms(leaf, target, sigmoid=True, reduction=reduction)
        expected = sum(weights[term] * value for term, value in terms._asdict().items())
        found = make("InstanceLoss", reduction=reduction, **weights)(leaf, target)
        assert_close(found, expected, name=reduction)
        assert_close(gradient_of(found.sum(), leaf), gradient_of(expected.sum(), leaf), name=reduction)


def test_blob_loss_weighs_two_to_one() -> None:
    input, target = example()
    terms = functional.blob_terms(input, target, sigmoid=True)
    assert_close(make("BlobLoss")(input, target), 2 * terms.seg + terms.blob)
    assert_close(make("BlobLoss").terms(input, target), terms)
    other = make("BlobLoss", pixel_weight=0.5, blob_weight=3, pixel_loss="ce", instance_loss="dice")
    terms = functional.blob_terms(input, target, pixel_loss="ce", instance_loss="dice", sigmoid=True)
    assert_close(other(input, target), 0.5 * terms.seg + 3 * terms.blob)


def test_settings_reach_the_engine() -> None:
    input, target = example(2, 2, 9, 8)
    target[..., :2, :2] = torch.eye(2)  # a diagonal, so that the connectivity matters
    labels, _ = fastinstance.label(target, connectivity=4)
    options: dict[str, Any] = {
        "pixel_loss": "dicece",
        "instance_loss": "gdf",
        "center_loss": "tversky",
        "average": "image",
        "include_background": False,
        "threshold": 0.6,
        "connectivity": 4,
        "center_size": (1, 2),
        "min_size": 2,
        "spacing": (1.0, 3.0),
        "pred_normalizer": "gt",
        "reduction": "none",
    }
    tensors = {"target_labels": labels, "valid_mask": torch.arange(8) < torch.tensor([6])}
    tensors["valid_mask"] = tensors["valid_mask"].expand(2, 1, 9, 8)
    expected = functional.instance_terms(input, target, sigmoid=True, **options, **tensors)
    assert_close(make("ICILoss", **options).terms(input, target, **tensors), expected)
    plain = functional.instance_terms(input, target, sigmoid=True)
    for name, value in options.items():
        changed = functional.instance_terms(input, target, sigmoid=True, **{name: value})
        same = [one.shape == other.shape and torch.equal(one, other) for one, other in zip(changed, plain, strict=True)]
        assert not all(same), f"{name} changes nothing"


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("dice", fastinstance.DiceLoss()),
        ("dicece", fastinstance.DiceCELoss()),
        ("generalized_dice", fastinstance.GeneralizedDiceLoss()),
        ("focal", fastinstance.FocalLoss()),
        ("gdf", fastinstance.GeneralizedDiceFocalLoss()),
        ("tversky", fastinstance.TverskyLoss()),
        ("inverse_weighted_dice", fastinstance.InverseWeightedDiceLoss(sigmoid=True)),
    ],
)
def test_a_loss_object_is_its_name(name: str, module: torch.nn.Module) -> None:
    input, target = example()
    for role in ("pixel_loss", "instance_loss", "center_loss"):
        by_name = functional.instance_terms(input, target, sigmoid=True, **{role: name})
        assert_close(functional.instance_terms(input, target, sigmoid=True, **{role: module}), by_name)
    assert_close(
        make(type(module).__name__)(input, target),
        functional.instance_terms(input, target, sigmoid=True, pixel_loss=name).seg,
    )


def test_settings_of_a_loss_object_are_kept() -> None:
    input, target = example(dtype=torch.float64)
    for instance_loss in (fastinstance.TverskyLoss(alpha=0.2, beta=0.9), fastinstance.DiceLoss(jaccard=True)):
        plain = functional.instance_terms(input, target, sigmoid=True)
        changed = functional.instance_terms(input, target, sigmoid=True, instance_loss=instance_loss)
        assert changed.seg == plain.seg
        assert abs(changed.instance_gt - plain.instance_gt) > 1e-3


# What a training does to a module


@pytest.mark.parametrize("name", LOSSES)
def test_copies_and_files(name: str) -> None:
    input, target = example()
    loss = make(name, reduction="sum")
    expected = loss(input, target)
    stored = io.BytesIO()
    torch.save(loss, stored)
    stored.seek(0)
    copies = [copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), torch.load(stored, weights_only=False)]
    for other in copies:
        assert torch.equal(other(input, target), expected)
        assert repr(other) == repr(loss)
    assert loss.state_dict() == {}
    assert list(loss.parameters()) == []
    loss.load_state_dict({})
    assert torch.equal(loss.train().double().to("cpu")(input, target), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_repr_names_the_settings_that_matter(name: str) -> None:
    assert repr(make(name)).startswith(f"{name}(")
    assert "sigmoid=True" in repr(make(name))
    assert "reduction='none'" in repr(make(name, reduction="none"))


def test_repr_names_the_weights() -> None:
    shown = repr(make("ICILoss", connectivity=4))
    for part in ("seg=0.25", "instance_gt=0.5", "center=0.25", "connectivity=4"):
        assert part in shown
    assert "proximity" not in shown
    assert "pixel_weight=2" in repr(make("BlobLoss"))
    assert "0.3" in repr(fastinstance.TverskyLoss(alpha=0.3))


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_of_training_lowers_the_loss(name: str) -> None:
    input, target = example(dtype=torch.float64)
    loss, leaf = make(name), input.clone().requires_grad_()
    value = loss(leaf, target)
    value.backward()
    slope = leaf.grad.square().sum()
    assert slope > 0
    # Short enough that no pixel crosses the threshold.
    step = 0.01 / leaf.grad.abs().max()
    if name not in ("ICILoss", "FalseLoss"):  # their straight-through terms do not move with a step this short
        assert loss(leaf - step * leaf.grad, target) < value
    assert leaf.grad.shape == leaf.shape


def test_reductions_have_their_shapes() -> None:
    input, target = example(2, 3, 8, 9)
    for name in LOSSES:
        assert make(name)(input, target).shape == ()
        assert make(name, reduction="sum")(input, target).shape == ()
        assert make(name, reduction="none")(input, target).shape == (2, 3)
        assert make(name, reduction="none", include_background=False)(input, target).shape == (2, 2)


# Gradients


SMOOTH_TERMS = ("seg", "instance_gt", "instance_pred", "proximity")


@pytest.mark.parametrize(
    ("pixel_loss", "activation"),
    [
        ("dice", "sigmoid"),
        ("dicece", "sigmoid"),
        ("gdf", "sigmoid"),
        ("tversky", "sigmoid"),
        ("inverse_weighted_dice", "sigmoid"),
        ("gdf", "softmax"),
        ("dicece", "probabilities"),
    ],
)
def test_gradcheck(pixel_loss: str, activation: str) -> None:
    """The exact derivatives, by finite differences in float64, away from the threshold."""
    input, target = example(1, 2, 4, 5, dtype=torch.float64, seed=3)
    options: dict[str, Any] = {"pixel_loss": pixel_loss, "instance_loss": pixel_loss}
    if activation == "probabilities":
        input = input.sigmoid()
    else:
        options[activation] = True
    labels, counts = fastinstance.label(target)
    assert counts.sum() >= 2

    def exact_terms(x: Tensor) -> tuple[Tensor, ...]:
        terms = functional.instance_terms(x, target, target_labels=labels, **options)
        blob = functional.blob_terms(x, target, target_labels=labels, **options)
        return (*(getattr(terms, name) for name in SMOOTH_TERMS), blob.blob)

    assert torch.autograd.gradcheck(exact_terms, input.requires_grad_(), eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["DiceLoss", "ProximityLoss", "ICILoss", "FalseLoss", "BlobLoss"])
def test_a_second_derivative_is_a_clear_error(name: str) -> None:
    input, target = example(dtype=torch.float64)
    leaf = input.requires_grad_()
    gradient = gradient_of(make(name)(leaf, target), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("name", LOSSES)
def test_no_gradient_where_none_is_asked_for(name: str) -> None:
    input, target = example()
    loss = make(name)
    assert not loss(input, target).requires_grad
    with torch.no_grad():
        quiet = loss(input.clone().requires_grad_(), target)
    assert not quiet.requires_grad
    with torch.inference_mode():
        assert torch.equal(loss(input, target), quiet)
    assert torch.equal(loss(input.clone().requires_grad_(), target).detach(), quiet)


@settings(max_examples=EXAMPLES // 5)
@given(scene=scenes(labels=True, valid=True), names=st.sampled_from(LOSSES))
def test_two_runs_are_bitwise_the_same(scene: Scene, names: str) -> None:
    runs = []
    for _ in range(2):
        leaf = scene.leaf()
        value = make(names)(leaf, scene.target, **scene.kwargs)
        runs.append((value.detach(), gradient_of(value, leaf)))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


def test_two_runs_on_a_large_batch_are_bitwise_the_same() -> None:
    input, target = example(3, 2, 96, 128)
    target = torch.maximum(
        target, torch.stack([pattern(name, (96, 128)) for name in PATTERNS[2:8]]).view(3, 2, 96, 128)
    )
    results = []
    for threads in (2, 1, 2):
        torch.set_num_threads(threads)
        leaf = input.clone().requires_grad_()
        terms = functional.instance_terms(leaf, target.float(), sigmoid=True)
        results.append((*(term.detach() for term in terms), gradient_of(sum(terms), leaf)))
    for again in (results[2],):
        assert all(torch.equal(one, other) for one, other in zip(results[0], again, strict=True))
    assert_close(results[1], results[0], relative_to="largest")


def test_every_scalar_is_connected() -> None:
    """Also where there is nothing: no target, no prediction, no valid pixel."""
    nothing, something = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    for low in (-3.0, 3.0):
        for target in (nothing, something):
            for valid_mask in (None, nothing, something):
                leaf = torch.full((1, 1, 4, 4), low, requires_grad=True)
                terms = functional.instance_terms(leaf, target, sigmoid=True, valid_mask=valid_mask)
                blob = functional.blob_terms(leaf, target, sigmoid=True, valid_mask=valid_mask)
                for name, value in {**terms._asdict(), **blob._asdict()}.items():
                    assert value.isfinite(), name
                    gradient = gradient_of(value, leaf, retain_graph=True)
                    assert gradient.isfinite().all(), name
                    if valid_mask is nothing:
                        assert not gradient.any(), name


# Dtypes


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", LOSSES)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    """Sums are never kept in half precision: the value is float32 or wider and exact for the rounded input."""
    input, target = example()
    leaf = input.to(dtype).requires_grad_()
    value = make(name)(leaf, target)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    gradient = gradient_of(value, leaf)
    assert gradient.dtype == dtype
    wide = leaf.detach().double().requires_grad_()
    expected = make(name)(wide, target)
    assert_close(value, expected)
    assert_close(gradient, gradient_of(expected, wide), relative_to="largest")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype: torch.dtype) -> None:
    """More pixels than float16 can count."""
    input = torch.full((1, 1, 400, 400), 2.0, dtype=dtype, requires_grad=True)
    terms = functional.instance_terms(input, torch.ones(1, 1, 400, 400, dtype=torch.bool), sigmoid=True)
    p = torch.tensor(2.0).sigmoid().item()
    assert_close(terms.instance_gt, torch.tensor(1 - 2 * p / (1 + p)), rtol=1e-4)
    assert gradient_of(sum(terms), input).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["ICILoss", "CCLoss"])
def test_an_activation_of_another_dtype(name: str, dtype: torch.dtype) -> None:
    """Only its probabilities are rounded: sums, and the result, are as wide as those of the input."""
    input, target = example(2, 1, 30, 40)
    expected = getattr(fastinstance, name)()(input.sigmoid().to(dtype).float(), target)
    leaf = input.clone().requires_grad_()
    value = getattr(fastinstance, name)(other_act=lambda x: x.sigmoid().to(dtype))(leaf, target)
    value.backward()
    assert value.dtype == torch.float32
    assert_close(value, expected)
    assert leaf.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_autocast_changes_nothing(name: str, dtype: torch.dtype) -> None:
    """Under autocast a network hands over half precision; the loss computes as it does outside."""
    input, target = example()
    leaf = input.to(dtype).requires_grad_()
    expected = make(name)(leaf, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = make(name)(leaf, target)
        of_float = make(name)(input, target)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    assert torch.equal(of_float, make(name)(input, target))
    assert torch.equal(gradient_of(value, leaf), gradient_of(expected, leaf))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("loss", ["ce", "focal", "gdf", "dicece"])
def test_slope_of_a_confident_mistake(loss: str, dtype: torch.dtype) -> None:
    """At |logit| = 80 the slope of a missed and of a false pixel is 1 / |Ω|, in half precision too."""
    input = torch.tensor([[80.0, -80.0, -80.0, -80.0]], dtype=dtype)[None, None].requires_grad_()
    target = torch.tensor([[0.0, 1.0, 0.0, 0.0]])[None, None]
    terms = functional.instance_terms(input, target, sigmoid=True, pixel_loss=loss, instance_loss=loss)
    expected = torch.tensor([[0.25, -0.25, 0, 0]], dtype=dtype)[None, None]
    assert_close(gradient_of(terms.seg, input, retain_graph=True), expected, rtol=1e-5)
    assert_close(terms.seg, torch.tensor(40.0 + (loss in ("gdf", "dicece"))), rtol=1e-5)
    # On the predicted side only the false pixel has a slope: the missed one is masked out.
    of_false = torch.tensor([[0.25, 0, 0, 0]], dtype=dtype)[None, None]
    assert_close(gradient_of(terms.instance_pred, input), of_false, rtol=1e-5)


# NaN and Inf


def spoilt(input: Tensor, value: float) -> Tensor:
    changed = input.clone()
    changed[0, 0, 1, 2] = value
    return changed


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", LOSSES)
def test_what_is_not_finite_never_passes(name: str, value: float) -> None:
    input, target = example()
    leaf = spoilt(input, value).requires_grad_()
    found = make(name)(leaf, target)
    assert found.isnan()
    assert gradient_of(found, leaf).isnan().any()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_what_is_not_finite_spoils_its_plane_alone(activation: str, value: float) -> None:
    input, target = example(2, 3, 8, 9, dtype=torch.float64)
    options: dict[str, Any] = {activation: True, "reduction": "none", "pixel_loss": "ce"}
    expected = functional.instance_terms(input, target, **options)
    leaf = spoilt(input, value).requires_grad_()
    found = functional.instance_terms(leaf, target, **options)
    blob = functional.blob_terms(leaf, target, **options)
    # The channels of a softmax image are one distribution.
    hit = torch.zeros(2, 3, dtype=torch.bool)
    hit[0, slice(None) if activation == "softmax" else 0] = True
    for name, values in {**found._asdict(), **blob._asdict()}.items():
        assert values[hit].isnan().all(), name
        assert values[~hit].isfinite().all(), name
        gradient = gradient_of(values[~hit].sum(), leaf, retain_graph=True)
        assert gradient[1].isfinite().all(), name
        of_hit = gradient_of(values[hit].sum(), leaf, retain_graph=True)
        assert of_hit[0].isnan().any(), name
    for name in TERMS:
        assert_close(getattr(found, name)[~hit], getattr(expected, name)[~hit], name=name)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("pixel_loss", ["generalized_dice", "gdf"])
def test_what_is_not_finite_spoils_a_pixel_loss_that_couples_channels(pixel_loss: str, value: float) -> None:
    input, target = example(2, 3, 8, 9)
    seg = functional.pixel_loss(spoilt(input, value), target, sigmoid=True, pixel_loss=pixel_loss, reduction="none")
    assert seg[0].isnan().all()
    assert seg[1].isfinite().all()


@settings(max_examples=EXAMPLES // 2)
@given(scene=scenes(labels=True), value=st.sampled_from((NAN, INF, -INF)), place=st.integers(0, 10**6))
def test_what_is_not_finite_makes_every_term_nan(scene: Scene, value: float, place: int) -> None:
    input = scene.input.clone(memory_format=torch.contiguous_format)
    input.view(-1)[place % input.numel()] = value
    leaf = input.requires_grad_()
    terms = functional.instance_terms(leaf, scene.target, sigmoid=True, **scene.kwargs)
    for name, found in terms._asdict().items():
        assert found.isnan(), name
        assert gradient_of(found, leaf, retain_graph=True).isnan().any(), name


@settings(max_examples=EXAMPLES // 4)
@given(scene=scenes(dtypes=(torch.float32,)), huge=st.sampled_from((88.0, 200.0, 1e4, 1e38)))
def test_huge_logits_are_finite(scene: Scene, huge: float) -> None:
    assume((scene.input != 0).any())
    leaf = (scene.input.sign() * huge).requires_grad_()
    terms = functional.instance_terms(leaf, scene.target, sigmoid=True, pixel_loss="dice")
    for name, value in terms._asdict().items():
        assert value.isfinite(), name
        assert gradient_of(value, leaf, retain_graph=True).isfinite().all(), name


# The properties that a user would check


STRAIGHT_THROUGH = {"ICILoss", "FalseLoss"}
# The centre map rounds half pixels up, and the artificial box of an even side is off its middle.
NOT_QUITE_SYMMETRIC = {"ICILoss", "ProximityLoss"}


@pytest.mark.parametrize("name", LOSSES)
def test_check_loss(name: str) -> None:
    check_loss(
        make(name),
        straight_through=name in STRAIGHT_THROUGH,
        skip={"flips"} if name in NOT_QUITE_SYMMETRIC else (),
        examples=max(4, EXAMPLES // 20),
    )


@pytest.mark.parametrize("name", ["DiceLoss", "GeneralizedDiceFocalLoss", "FalseLoss", "BlobLoss"])
def test_check_loss_on_softmax_channels(name: str) -> None:
    loss = getattr(fastinstance, name)(softmax=True)
    check_loss(
        loss,
        channels=2,
        straight_through=name in STRAIGHT_THROUGH,
        skip=("perfect",),  # a target that is not one-hot has no perfect prediction
        examples=max(4, EXAMPLES // 25),
    )


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.float32])
def test_class_indices_of_any_dtype(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    classes = logits.argmax(1, keepdim=True).roll(1, -1)
    labels = torch.stack([classes[:, 0] == number for number in range(3)], 1).long()
    loss = fastinstance.ICILoss(softmax=True, to_onehot_y=True)
    found = loss(logits, classes.to(dtype), target_labels=labels.to(torch.int32))
    assert torch.equal(found, loss(logits, classes, target_labels=labels))
    with pytest.raises(ValueError, match="expected target to hold class indices 0 to 2"):
        loss(logits, (classes + 1).to(dtype))


def test_inverse_weighted_dice_has_a_connectivity() -> None:
    """Its weights are those of the instances: here three on a diagonal, or one."""
    logits, target = torch.randn(1, 1, 3, 3, generator=torch.Generator().manual_seed(0)), torch.eye(3)[None, None]
    for connectivity in (4, 8):
        loss = fastinstance.InverseWeightedDiceLoss(sigmoid=True, connectivity=connectivity)
        options = {"pixel_loss": "inverse_weighted_dice", "sigmoid": True, "connectivity": connectivity}
        assert torch.equal(loss(logits, target), functional.pixel_loss(logits, target, **options))
    assert loss(logits, target) != fastinstance.InverseWeightedDiceLoss(sigmoid=True, connectivity=4)(logits, target)
