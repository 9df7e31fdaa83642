"""Any callable as a loss: equal to the separable loss that it spells out, and to the reference where there is none."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import monai
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastinstance
from fastinstance import compat, criteria, dispatch, functional, masked, reference
from fastinstance.pixel import Sums
from fastinstance.testing import Scene, assert_close, scenes
from tests.criteria_cases import lovasz
from tests.lines import lines_executed

EXAMPLES = settings().max_examples
pytestmark = pytest.mark.filterwarnings("ignore:.*is called on :UserWarning")

SCENE = Scene(
    input=torch.randn(2, 1, 9, 10, generator=torch.Generator().manual_seed(3), dtype=torch.float64) - 0.7,
    target=torch.rand(2, 1, 9, 10, generator=torch.Generator().manual_seed(4)) > 0.75,
)


def spelt_out_dice(P: Tensor, G: Tensor) -> Tensor:
    axes = tuple(range(2, P.ndim))
    overlap, total = (P * G).sum(axes), P.sum(axes) + G.sum(axes)
    return (1 - (2 * overlap + 1e-5) / (total + 1e-5)).mean()


def positional(P: Tensor, G: Tensor) -> Tensor:
    """Every pixel counts differently, and neighbours interact."""
    weight = torch.linspace(0.1, 2, P.numel(), dtype=P.dtype).view_as(P)
    return (weight * (P - G) ** 2).sum() + (weight * P * P.roll(1, -1)).mean()


def values_and_gradients(function: Callable[..., Any], scene: Scene, options: dict[str, Any]) -> dict[str, Tensor]:
    leaf = scene.leaf()
    found = {}
    for name, value in function(leaf, scene.target, **options, **scene.kwargs)._asdict().items():
        upstream = torch.linspace(1.0, 2.0, value.numel()).to(value).view_as(value)
        found[name] = value.detach()
        (found[f"gradient of {name}"],) = torch.autograd.grad(value, leaf, upstream, retain_graph=True)
    return found


def check(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(found[name], value, name=name)


@st.composite
def cases(draw: st.DrawFn, *, blob: bool, softmax: bool = True) -> tuple[Scene, dict[str, Any]]:
    scene = draw(scenes(channels=(1, 2), dtypes=(torch.float64,), layouts=("contiguous",), labels=True, valid=True))
    options: dict[str, Any] = {
        "min_size": draw(st.sampled_from((0, 2))),
        "reduction": draw(st.sampled_from(("mean", "none", "sum"))),
    }
    if not blob:
        options["average"] = draw(st.sampled_from(("instance", "image")))
        options["pred_normalizer"] = draw(st.sampled_from(("pred", "gt")))
    channels = scene.input.shape[1]
    activation = draw(
        st.sampled_from(("sigmoid", "probabilities", "softmax" if softmax and channels > 1 else "sigmoid"))
    )
    if activation == "probabilities":
        scene = dataclasses.replace(scene, input=scene.input.sigmoid())
    else:
        options[activation] = True
    if channels > 1:
        options["include_background"] = draw(st.booleans())
    return scene, options


def losses(loss: object, *, blob: bool) -> dict[str, object]:
    return dict.fromkeys(
        ("pixel_loss", "instance_loss") if blob else ("pixel_loss", "instance_loss", "center_loss"), loss
    )


@pytest.mark.parametrize("blob", [False, True])
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_dice_spelt_out_is_dice(blob: bool, data: st.DataObject) -> None:
    scene, options = data.draw(cases(blob=blob))
    function = functional.blob_terms if blob else functional.instance_terms
    found = values_and_gradients(function, scene, options | losses(spelt_out_dice, blob=blob))
    check(found, values_and_gradients(function, scene, options | losses("dice", blob=blob)))


@pytest.mark.parametrize("blob", [False, True])
@pytest.mark.parametrize("loss", [lovasz, positional])
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_other_callables_equal_the_reference(loss: Callable[..., Tensor], blob: bool, data: st.DataObject) -> None:
    # A kink of the Lovász loss lies where two errors are equal, as the classes' are up to rounding under softmax.
    scene, options = data.draw(cases(blob=blob, softmax=loss is not lovasz))
    name = "blob_terms" if blob else "instance_terms"
    options |= losses(loss, blob=blob)
    found = values_and_gradients(getattr(functional, name), scene, options)
    check(found, values_and_gradients(getattr(reference, name), scene, options))


def test_a_callable_mixes_with_separable_losses() -> None:
    options = {"sigmoid": True, "pixel_loss": "gdf", "instance_loss": lovasz, "center_loss": "dice"}
    found = values_and_gradients(functional.instance_terms, SCENE, options)
    check(found, values_and_gradients(reference.instance_terms, SCENE, options))
    options = {"sigmoid": True, "pixel_loss": lovasz, "instance_loss": "gdf"}
    found = values_and_gradients(functional.blob_terms, SCENE, options)
    check(found, values_and_gradients(reference.blob_terms, SCENE, options))


@pytest.mark.parametrize("pixels", [1, 300])
def test_chunks_change_nothing(pixels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"sigmoid": True, **losses(lovasz, blob=False)}
    whole = values_and_gradients(functional.instance_terms, SCENE, options)
    monkeypatch.setattr(masked, "_CHUNK", pixels)
    check(values_and_gradients(functional.instance_terms, SCENE, options), whole)


def test_no_python_iteration_over_instances() -> None:
    def step(instances: int) -> None:
        target = torch.zeros(1, 1, 40, 40)
        target.view(-1)[torch.arange(instances) * 80] = 1
        functional.instance_terms(target * 8 - 4, target, sigmoid=True, **losses(spelt_out_dice, blob=False))
        functional.blob_terms(target * 8 - 4, target, sigmoid=True, pixel_loss=spelt_out_dice)

    step(2)  # whatever happens only once
    assert lines_executed(lambda: step(3)) == lines_executed(lambda: step(19))


def test_the_pixel_term_sees_all_images_at_once() -> None:
    seen = []

    def watch(P: Tensor, G: Tensor) -> Tensor:
        seen.append((tuple(P.shape), tuple(G.shape), P.dtype, G.dtype))
        return (P - G).abs().mean()

    x = SCENE.input.float().expand(-1, 3, -1, -1)
    functional.pixel_loss(
        x, SCENE.target.expand(-1, 3, -1, -1), softmax=True, pixel_loss=watch, include_background=False
    )
    assert seen == [((2, 2, 9, 10), (2, 2, 9, 10), torch.float32, torch.float32)]


def test_a_loss_that_writes_into_its_images_changes_nothing_else() -> None:
    def clamped(P: Tensor, G: Tensor) -> Tensor:
        return -(G * P.clamp_(0.3, 0.7).log()).mean()

    p = SCENE.input.sigmoid()
    before = p.clone()
    terms = functional.instance_terms(p, SCENE.target, pixel_loss=clamped, instance_loss=spelt_out_dice)
    plain = functional.instance_terms(before, SCENE.target, instance_loss=spelt_out_dice)
    assert torch.equal(p, before)
    assert torch.equal(terms.instance_gt, plain.instance_gt)


def test_a_module_trains_with_any_callable() -> None:
    logits = SCENE.leaf()
    loss = fastinstance.InstanceLoss(seg=1, instance_gt=1, sigmoid=True, pixel_loss=lovasz, instance_loss=lovasz)
    before = loss(logits, SCENE.target)
    before.backward()
    with torch.no_grad():
        assert loss(logits - 0.1 * logits.grad, SCENE.target) < before


def test_what_is_not_finite_makes_the_terms_nan() -> None:
    x = SCENE.input.clone()
    x[0, 0, 4, 4] = float("nan")
    found = values_and_gradients(
        functional.instance_terms,
        dataclasses.replace(SCENE, input=x),
        {"sigmoid": True, "reduction": "none", **losses(lovasz, blob=False)},
    )
    for name, value in found.items():
        image = value.flatten(1).isnan()
        assert image[0].all(), name
        assert not image[1].any(), name


def test_a_criterion_that_ignores_the_prediction_has_gradient_zero() -> None:
    def constant(P: Tensor, G: Tensor) -> Tensor:
        return G.mean()

    found = values_and_gradients(
        functional.instance_terms, SCENE, {"sigmoid": True, "instance_loss": constant, "pixel_loss": constant}
    )
    for name in ("seg", "instance_gt", "instance_pred"):
        assert found[name] > 0
        assert not found[f"gradient of {name}"].any()


def test_callables_use_torch_where_others_use_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"sigmoid": True, **losses(lovasz, blob=False)}
    expected = values_and_gradients(functional.instance_terms, SCENE, options)
    monkeypatch.setattr(dispatch, "backend_for", lambda tensor: "triton")
    check(values_and_gradients(functional.instance_terms, SCENE, options), expected)
    blob = functional.blob_terms(SCENE.input, SCENE.target, sigmoid=True, pixel_loss=lovasz)
    assert_close(blob.blob, reference.blob_terms(SCENE.input, SCENE.target, sigmoid=True, pixel_loss=lovasz).blob)


def test_a_second_derivative_is_an_error() -> None:
    logits = SCENE.leaf()
    terms = functional.instance_terms(logits, SCENE.target, sigmoid=True, instance_loss=lovasz)
    (gradient,) = torch.autograd.grad(terms.instance_gt, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


def branches(P: Tensor, G: Tensor) -> Tensor:
    return P.sum() if P.sum() > 1 else G.sum()


BAD: dict[str, tuple[Callable[..., Any], type[Exception], list[str]]] = {
    "an image": (lambda P, G: P - G, ValueError, ["to return a scalar", "(1, 1, 9, 10)", "reduction='mean'"]),
    "one value in a list": (lambda P, G: (P - G).mean().view(1), ValueError, ["to return a scalar", "shape (1,)"]),
    "a number": (lambda P, G: 0.5, ValueError, ["to return a floating tensor", "float 0.5"]),
    "an integer tensor": (lambda P, G: P.long().sum(), ValueError, ["to return a floating tensor", "int64"]),
    "reduction none": (nn.BCELoss(reduction="none"), ValueError, ["=BCELoss", "to return a scalar"]),
    "a branch on values": (branches, RuntimeError, ["=branches", "torch.func.vmap", "branches on values", "separable"]),
    "boolean indexing": (lambda P, G: P[G > 0].sum(), RuntimeError, ["torch.func.vmap", "boolean indexing"]),
    "random numbers": (
        lambda P, G: nn.functional.dropout(P).mean(),
        RuntimeError,
        ["torch.func.vmap", "random numbers"],
    ),
    "its own mistake": (lambda P, G: P @ G, RuntimeError, ["torch.func.vmap", "Expected size", "reference"]),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("argument", ["instance_loss", "center_loss"])
def test_bad_criteria_say_what_to_do(case: str, argument: str) -> None:
    function, kind, words = BAD[case]
    with pytest.raises(kind) as raised:
        functional.instance_terms(SCENE.input, SCENE.target, sigmoid=True, **{argument: function})
    for word in (argument, *words):
        assert word in str(raised.value)


@pytest.mark.parametrize("case", ["an image", "a number"])
def test_bad_pixel_criteria_say_what_to_do(case: str) -> None:
    function, kind, words = BAD[case]
    with pytest.raises(kind, match=f"expected pixel_loss=<lambda> {words[0]}"):
        functional.pixel_loss(SCENE.input, SCENE.target, sigmoid=True, pixel_loss=function)


def test_the_warning_comes_once_and_names_the_separable_loss(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(criteria, "_advised", set())
    for _ in range(2):
        fastinstance.InstanceLoss(instance_gt=1, instance_loss=monai.losses.DiceLoss(sigmoid=True))
        fastinstance.InstanceLoss(instance_gt=1, center_loss=lovasz)
        fastinstance.InstanceLoss(pixel_loss=torch.nn.BCELoss())
    first, second, third = (str(warning.message) for warning in recwarn)
    assert first.startswith(
        "instance_loss=DiceLoss is called on a masked image for every instance, whose probabilities it takes for "
        "logits (sigmoid=True); "
    )
    assert first.endswith("instance_loss='dice'")
    assert second.startswith("center_loss=lovasz is called on a pair of maps")
    assert "one of dice, ce, dicece" in second
    assert third.startswith("pixel_loss=BCELoss is called on whole images")
    assert third.endswith("pixel_loss='ce'")


def test_the_drop_ins_name_what_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criteria, "_advised", set())
    y = (SCENE.target[:, :1] > 0).float()
    with pytest.warns(UserWarning, match=r"^criterion=lovasz is .* masked image .* criterion=a pixel loss of fastinst"):
        compat.compute_blob_loss_multi(lovasz, y, y)


@pytest.mark.filterwarnings("error")
def test_monai_losses_of_probabilities_are_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criteria, "_advised", set())
    given = {
        "dice": monai.losses.DiceLoss(batch=True),
        "tversky": monai.losses.TverskyLoss(),
        "generalized_dice": monai.losses.GeneralizedDiceLoss(),
    }
    for name, loss in given.items():
        options = {"sigmoid": True, "instance_loss": loss, "center_loss": loss}
        found = values_and_gradients(functional.instance_terms, SCENE, options)
        options = {"sigmoid": True, "instance_loss": name, "center_loss": name}
        check(found, values_and_gradients(functional.instance_terms, SCENE, options))


def test_a_recognised_loss_may_change_later() -> None:
    module = monai.losses.TverskyLoss(alpha=0.5)
    loss = fastinstance.ICILoss(sigmoid=True, instance_loss=module)
    module.alpha = 0.1
    expected = fastinstance.ICILoss(sigmoid=True, instance_loss=monai.losses.TverskyLoss(alpha=0.1))
    assert torch.equal(loss(SCENE.input, SCENE.target), expected(SCENE.input, SCENE.target))


def test_dice_over_the_batch_stays_so_as_the_pixel_loss() -> None:
    loss = monai.losses.DiceLoss(batch=True)
    p = SCENE.input.sigmoid()
    found = functional.pixel_loss(p, SCENE.target, pixel_loss=loss)
    assert_close(found, loss(p, SCENE.target.double()))
    assert abs(found - functional.pixel_loss(p, SCENE.target, pixel_loss="dice")) > 1e-4


RECOGNISED = {
    "DiceLoss": lambda **options: monai.losses.DiceLoss(smooth_nr=0.5, smooth_dr=0.7, **options),
    "DiceLoss squared": lambda **options: monai.losses.DiceLoss(squared_pred=True, **options),
    "DiceLoss jaccard": lambda **options: monai.losses.DiceLoss(jaccard=True, **options),
    "GeneralizedDiceLoss": monai.losses.GeneralizedDiceLoss,
    "TverskyLoss": lambda **options: monai.losses.TverskyLoss(alpha=0.3, beta=0.8, **options),
    "DiceCELoss": lambda **options: monai.losses.DiceCELoss(lambda_ce=0.3, **options),
    "DiceFocalLoss": lambda **options: monai.losses.DiceFocalLoss(lambda_dice=0.4, gamma=3.0, **options),
    "GeneralizedDiceFocalLoss": lambda **options: monai.losses.GeneralizedDiceFocalLoss(lambda_gdl=0.4, **options),
    "FocalLoss": lambda sigmoid: monai.losses.FocalLoss(gamma=1.5),
    "BCEWithLogitsLoss": lambda sigmoid: nn.BCEWithLogitsLoss(),
}


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("name", RECOGNISED)
def test_what_is_recognised_is_the_loss_itself(name: str, sigmoid: bool) -> None:
    criterion = RECOGNISED[name](sigmoid=sigmoid)
    known = criteria.recognise(criterion)
    assert known is not None
    assert known.sigmoid == (sigmoid or name in ("FocalLoss", "BCEWithLogitsLoss"))
    generator = torch.Generator().manual_seed(0)
    P = torch.rand(1, 1, 7, 8, generator=generator, dtype=torch.float64)
    G = (torch.rand(1, 1, 7, 8, generator=generator) > 0.6).double()
    p = P.sigmoid() if known.sigmoid else P
    sums = Sums((p * G).sum(), (p**2 if known.loss.squared else p).sum(), G.sum(), torch.zeros(()))
    if known.loss.pointwise is not None:
        wrong = torch.where(G > 0, 1 - P.sigmoid(), P.sigmoid())
        sums = sums._replace(pointwise=known.loss.pointwise(wrong, -torch.log1p(-wrong)).sum())
    assert_close(known.loss.reduce(sums, torch.tensor(56.0)), criterion(P, G).double(), rtol=1e-6)


@pytest.mark.parametrize(
    "criterion",
    [
        monai.losses.DiceLoss(reduction="sum"),
        monai.losses.DiceLoss(softmax=True),
        monai.losses.DiceLoss(other_act=torch.tanh),
        monai.losses.DiceLoss(soft_label=True),
        monai.losses.DiceLoss(weight=2.0),
        monai.losses.DiceLoss(include_background=False),
        monai.losses.DiceLoss(smooth_nr=-1),
        monai.losses.GeneralizedDiceLoss(w_type="simple"),
        monai.losses.FocalLoss(alpha=0.25),
        monai.losses.FocalLoss(gamma=0.5),
        monai.losses.FocalLoss(use_softmax=True),
        monai.losses.DiceFocalLoss(to_onehot_y=True),
        monai.losses.DiceCELoss(weight=torch.tensor([2.0])),
        monai.losses.MaskedDiceLoss(),
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0)),
        nn.BCELoss(),
        spelt_out_dice,
    ],
    ids=lambda loss: getattr(loss, "__name__", None) or str(loss),
)
def test_other_settings_are_not_mistaken_for_it(criterion: Any) -> None:
    assert criteria.recognise(criterion) is None


def test_a_loss_that_is_trained_itself_is_for_whole_images_only() -> None:
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, P: Tensor, G: Tensor) -> Tensor:
            return self.scale * (P - G).square().mean()

    loss = Learned()
    with pytest.raises(ValueError, match="instance_loss without parameters that are trained, got Learned"):
        fastinstance.InstanceLoss(instance_gt=1, instance_loss=loss)
    with pytest.warns(UserWarning, match="Learned"):
        fastinstance.InstanceLoss(pixel_loss=loss)(SCENE.input.sigmoid(), SCENE.target).backward()
    assert loss.scale.grad is not None
    fastinstance.InstanceLoss(instance_gt=1, instance_loss=loss.requires_grad_(False))
