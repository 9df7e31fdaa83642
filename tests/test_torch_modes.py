"""What torch can do around a loss: another default device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

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
