"""What torch can do around a loss: another default device, `torch.func`, checkpoints, several backward passes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastinstance
from fastinstance import InstanceTerms, compat, functional, reference
from fastinstance.testing import assert_close

CHANCE = torch.Generator().manual_seed(0)
LOGITS = torch.randn(2, 2, 9, 11, generator=CHANCE, dtype=torch.float64)
TARGET = (torch.randn(2, 2, 9, 11, generator=CHANCE) > 0.8).float()
LABELS = fastinstance.label(TARGET)[0]
MASK = LOGITS > 0
EVERY = dict.fromkeys(InstanceTerms._fields, 1.0)


def brier(P: Tensor, G: Tensor) -> Tensor:
    return (P - G).square().mean()


def gradient(loss: Callable[..., Tensor], **tensors: Tensor) -> tuple[Tensor, Tensor]:
    leaf = LOGITS.clone().requires_grad_()
    value = loss(leaf, TARGET, **tensors)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def compat_terms(P: Tensor, G: Tensor) -> Tensor:
    loss = compat.InstanceLoss(
        fastinstance.DiceLoss(), fastinstance.DiceCELoss(), brier, "none", spatial_dims=2, mul_too_many=1e9
    )
    return torch.stack(loss(P[:, :1].sigmoid(), G[:, :1])).sum()


def metrics_by_volume() -> tuple[Any, ...]:
    metric = fastinstance.InstanceMetrics(channels=2, by_volume=(0.002, 0.01))
    metric.update(MASK, TARGET)
    before = metric.compute()
    metric.reset()
    return before, metric(MASK, TARGET), metric.compute()


ON_THE_CPU: dict[str, Callable[[], Any]] = {
    "all terms": lambda: gradient(fastinstance.InstanceLoss(**EVERY, sigmoid=True, missed="soft")),
    "given ids": lambda: gradient(fastinstance.InstanceLoss(**EVERY, sigmoid=True), target_labels=LABELS),
    "callables": lambda: gradient(
        fastinstance.InstanceLoss(**EVERY, sigmoid=True, center_loss=brier, instance_loss=brier, pixel_loss=brier)
    ),
    "softmax": lambda: gradient(lambda x, y: fastinstance.ICILoss(softmax=True, to_onehot_y=True)(x, y[:, :1])),
    "small ones": lambda: gradient(fastinstance.ProximityLoss(sigmoid=True, min_size=2, weight_by="size")),
    "blob": lambda: gradient(fastinstance.BlobLoss(sigmoid=True, pixel_loss="inverse_weighted_dice")),
    "CC": lambda: gradient(fastinstance.CCLoss(sigmoid=True)),
    "MIL": lambda: gradient(fastinstance.ComponentMILLoss(sigmoid=True)),
    "recall": lambda: gradient(fastinstance.LesionRecallLoss(sigmoid=True)),
    "Tversky": lambda: gradient(fastinstance.ComponentTverskyLoss(sigmoid=True)),
    "compat": lambda: gradient(compat_terms),
    "NaN": lambda: fastinstance.ICILoss(sigmoid=True)(LOGITS * torch.nan, TARGET),
    "metrics": lambda: fastinstance.instance_metrics(MASK, TARGET, matching="iou", threshold=0.1),
    "metric": metrics_by_volume,
    "reference": lambda: reference.instance_metrics(MASK, TARGET),
    "label": lambda: functional.label(TARGET, min_size=2)[0],
    "ensemble": lambda: fastinstance.volume_ensemble(MASK, TARGET > 0, spacing=1.0, threshold_ml=0.003),
}


@pytest.mark.filterwarnings("ignore:.*is called on:UserWarning")
@pytest.mark.parametrize("name", ON_THE_CPU)
def test_another_default_device(name: str) -> None:
    """Tensors are made where those of the caller are, not where torch makes them by default."""
    expected = ON_THE_CPU[name]()
    with torch.device("meta"):
        found = ON_THE_CPU[name]()
    assert_close(found, expected, rtol=0, atol=0)


class Head(torch.nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(2, 2, 3, padding=1, dtype=torch.float64)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "all terms": fastinstance.InstanceLoss(**EVERY, sigmoid=True, missed="soft"),
    "linear": fastinstance.FocalLoss(sigmoid=True),
    "callables": lambda x, y: fastinstance.InstanceLoss(
        sigmoid=True, seg=1, instance_gt=1, center=1, pixel_loss=brier, instance_loss=brier, center_loss=brier
    )(x, y),
    "blob": fastinstance.BlobLoss(sigmoid=True),
    "CC": fastinstance.CCLoss(sigmoid=True),
    "MIL": fastinstance.ComponentMILLoss(sigmoid=True),
    "recall": fastinstance.LesionRecallLoss(sigmoid=True),
    "Tversky": fastinstance.ComponentTverskyLoss(sigmoid=True),
    "function": lambda x, y: functional.instance_terms(x, y, sigmoid=True, target_labels=LABELS).proximity,
    "compat": compat_terms,
    "compat blob": lambda x, _: compat.compute_blob_loss_multi(
        fastinstance.DiceLoss(sigmoid=True), x[:, :1], LABELS[:, :1]
    ),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=list(LOSSES))
quiet = pytest.mark.filterwarnings("ignore:.*is called on:UserWarning")


@quiet
@every_loss
def test_grad_of_parameters(loss: Callable[..., Tensor]) -> None:
    """`functional_call` and `grad`, as in meta-learning; metrics on the way; the target as the function makes it."""
    head = Head()
    parameters = dict(head.named_parameters())

    def step(parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits = torch.func.functional_call(head, parameters, LOGITS)
        return loss(logits, (TARGET > 0).float()), fastinstance.instance_metrics(logits > 0, TARGET)["pq"]

    found, (value, pq) = torch.func.grad_and_value(step, has_aux=True)(parameters)
    logits = head(LOGITS)
    expected = loss(logits, TARGET)
    expected.backward()
    assert_close(value, expected, rtol=0, atol=0)
    assert_close(pq, fastinstance.instance_metrics(logits > 0, TARGET)["pq"], rtol=0, atol=0)
    assert_close(found, {name: parameter.grad for name, parameter in parameters.items()})


def test_ids_that_a_step_makes() -> None:
    """Labels and regions inside of the transform."""
    whole, masked = fastinstance.CCLoss(sigmoid=True), fastinstance.ICILoss(sigmoid=True)

    def step(x: Tensor) -> Tensor:
        labels, _ = fastinstance.label(TARGET)
        regions = fastinstance.voronoi(labels)
        valid = torch.ones_like(x[:, :1])
        return whole(x, TARGET, target_regions=regions) + masked(x, TARGET, target_labels=labels, valid_mask=valid)

    assert_close(torch.func.grad(step)(LOGITS), gradient(lambda x, _: step(x))[1])


def test_vjp_of_several_results() -> None:
    """Only what is asked for, any number of times."""
    terms, pull = torch.func.vjp(lambda x: functional.instance_terms(x, TARGET, sigmoid=True), LOGITS)
    nothing = torch.zeros((), dtype=torch.float64)
    for name in InstanceTerms._fields:
        ones = terms._make(nothing + (field == name) for field in InstanceTerms._fields)
        leaf = LOGITS.clone().requires_grad_()
        (expected,) = torch.autograd.grad(getattr(functional.instance_terms(leaf, TARGET, sigmoid=True), name), leaf)
        assert_close(pull(ones)[0], expected)


class Cut(torch.autograd.Function):
    """Identity without a derivative, where `detach` would leave none to ask for."""

    @staticmethod
    def forward(value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None: ...

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> None:
        return None


def test_a_step_that_nothing_is_asked_of() -> None:
    loss = LOSSES["all terms"]
    found = torch.func.grad(lambda x: Cut.apply(loss(x, TARGET)) + x.sum())(LOGITS)
    assert torch.equal(found, torch.ones_like(LOGITS))


@quiet
@every_loss
def test_no_second_derivative(loss: Callable[..., Tensor]) -> None:
    """An error, also of a loss that is linear in its sums; never a silent zero."""
    leaf = LOGITS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, TARGET), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.square().sum().backward()
    slope = torch.func.grad(lambda x: loss(x, TARGET))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.func.grad(lambda x: slope(x).square().sum())(LOGITS)


@quiet
@every_loss
def test_what_is_refused(loss: Callable[..., Tensor]) -> None:
    for transform, input in ((torch.func.vmap, LOGITS[None]), (torch.func.jacrev, LOGITS)):
        with pytest.raises(RuntimeError, match=r"got tensors under torch\.func\.vmap .*reduction='none'"):
            transform(lambda x: loss(x, TARGET))(input)
    with pytest.raises(RuntimeError, match=r"reverse mode, got a forward mode .*use torch\.func\.grad"):
        torch.func.jvp(lambda x: loss(x, TARGET), (LOGITS,), (LOGITS,))


@quiet
@every_loss
def test_graphs_that_are_kept(loss: Callable[..., Tensor]) -> None:
    """The backward pass again, after a checkpoint, and with saved tensors elsewhere."""
    _, expected = gradient(loss)
    leaf = LOGITS.clone().requires_grad_()
    value = loss(leaf, TARGET)
    for _ in range(2):
        (found,) = torch.autograd.grad(value, leaf, retain_graph=True)
        assert_close(found, expected, rtol=0, atol=0)
    for reentrant in (True, False):
        assert_close(gradient(partial(checkpoint, loss, use_reentrant=reentrant))[1], expected)
    with torch.autograd.graph.save_on_cpu():
        assert_close(gradient(loss)[1], expected)
