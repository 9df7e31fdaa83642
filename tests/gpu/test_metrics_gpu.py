"""The metrics on a GPU: equal to those of the CPU, and without waiting for the device.

pytest -m gpu tests/gpu/test_metrics_gpu.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastinstance import InstanceMetrics, instance_metrics
from fastinstance.testing import assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPES = [(4, 2, 200, 150), (2, 1, 20, 61, 70)]


def masks(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Prediction and target of round objects and specks, many of which overlap."""
    chance = torch.Generator().manual_seed(0)
    field = torch.rand(2, *shape, generator=chance)
    near = (field[0] + field[1]) / 2
    return near > 0.8, field[1] > 0.85


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"min_size": 2, "zero_division": 1.0},
        {"matching": "iou"},
        {"matching": "dice", "threshold": 0.1},
        {"connectivity": None, "spacing": 2},
    ],
)
def test_equal_to_the_cpu(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    pred, target = masks(shape)
    ids = {"pred_labels": pred * 5, "target_labels": (target * (1 + torch.arange(shape[-1]) // 9)).int()}
    for labels in ({}, ids):
        found = instance_metrics(
            pred.cuda(), target.cuda(), **{name: value.cuda() for name, value in labels.items()}, **options
        )
        assert_close(
            {name: value.cpu() for name, value in found.items()}, instance_metrics(pred, target, **labels, **options)
        )


@pytest.mark.parametrize("options", [{}, {"matching": "iou"}, {"matching": "dice", "threshold": 0.7}])
def test_nothing_waits(options: dict[str, Any]) -> None:
    pred, target = (mask.cuda() for mask in masks(SHAPES[0]))
    metric = InstanceMetrics(channels=2, by_volume=(0.002, 0.005), **options)
    metric.update(pred, target)  # compiling a kernel may wait, and so does moving the sums to the device
    torch.cuda.synchronize()
    previous = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        metric.update(pred, target)
    finally:
        torch.cuda.set_sync_debug_mode(previous)
    assert metric.compute()["n_subjects"] == 8
