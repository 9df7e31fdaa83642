"""What a call on a GPU does on the host, seen without one: images on the meta device take the kernels' path."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from fastinstance_kernels import launch
from torch import nn
from torch.overrides import TorchFunctionMode

import fastinstance
from bench import aot, sanitize
from fastinstance import backend, components, dispatch, fused, regions, segments
from fastinstance.functional import InstanceTerms

READ = {"__bool__", "__int__", "__float__", "__index__", "item", "tolist", "numpy", "cpu"}
SIZED = {"nonzero", "unique", "masked_select", "bincount"}
"""Of a shape that depends on values."""
COPIED = {"tensor", "as_tensor", "new_tensor", "from_numpy"}
"""From the host, which a CUDA graph cannot capture either; `new_full` fills on the device."""


class Waits(TorchFunctionMode):
    """Collects the names of the functions called inside that wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READ | SIZED | COPIED:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


LOSSES: dict[str, Callable[..., nn.Module]] = {
    "all terms": lambda **options: fastinstance.InstanceLoss(**dict.fromkeys(InstanceTerms._fields, 1.0), **options),
    "detection": fastinstance.DetectionLoss,
    "blob": fastinstance.BlobLoss,
    "inverse-weighted": fastinstance.InverseWeightedDiceLoss,
    "CC": fastinstance.CCLoss,
    "Tversky": fastinstance.ComponentTverskyLoss,
    "MIL": fastinstance.ComponentMILLoss,
    "recall": fastinstance.LesionRecallLoss,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "sigmoid": {"sigmoid": True},
    "softmax": {"softmax": True, "to_onehot_y": True},
    "without background": {"sigmoid": True, "include_background": False},
    "other_act": {"other_act": torch.sigmoid},
    "small components": {"sigmoid": True, "min_size": 3},
}


@pytest.mark.parametrize("operators", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_waits_for_the_device(
    name: str, options: str, operators: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if options == "small components" and name in ("CC", "inverse-weighted"):
        options = "sigmoid"  # they have no `min_size`
    loss = LOSSES[name](**OPTIONS[options])
    for module in (components, dispatch, regions):
        monkeypatch.setattr(module, "backend_for", lambda tensor: "triton")
    for module in (backend, fused, segments):
        monkeypatch.setattr(module, "by_operators", lambda tensor: operators)
    onehot = OPTIONS[options].get("to_onehot_y", False)
    input = torch.empty(2, 3, 12, 33, device="meta", requires_grad=True)
    target = torch.empty(2, 1 if onehot else 3, 12, 33, device="meta")
    labels = torch.empty(2, 3, 12, 33, dtype=torch.int64, device="meta")
    valid = torch.empty(2, 1, 12, 33, dtype=torch.bool, device="meta")
    launched = []
    monkeypatch.setattr(launch, "check_device", lambda x: None)
    with Waits() as waits, aot.intercepted(lambda kernel, *_: launched.append(kernel)):
        for given in ({}, {"valid_mask": valid}, {"target_labels": labels}):
            loss(input, target, **given).backward()
    assert input.grad is not None
    assert waits.found == []
    assert bool(launched) != operators


def test_counts_are_awaited_on_their_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event of the current device would say nothing of a copy from another one."""
    counts = mock.Mock(is_cuda=True, device=torch.device("cuda", 1))
    monkeypatch.setattr(torch, "empty", mock.Mock())
    monkeypatch.setattr(fused, "_pending", [])
    event = mock.Mock(**{"query.return_value": False})
    with mock.patch.multiple(
        torch.cuda,
        Event=lambda: event,
        current_stream=lambda device=None: ("stream", device),
        is_current_stream_capturing=lambda: False,
    ):
        fused.report(counts, 5)
    event.record.assert_called_once_with(("stream", counts.device))
    assert fused._pending


def test_two_threads_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts that one thread has seen arrive are not taken from it by another."""
    few = torch.ones(1, dtype=torch.int32)
    other = threading.Thread(target=fused.report, args=(few, 5))

    def query() -> bool:
        if other.ident is None:
            other.start()
            other.join(0.2)
        return True

    monkeypatch.setattr(fused, "_pending", [(mock.Mock(query=query), few, 5)])
    fused.report(few, 5)
    other.join()
    assert fused._pending == []


def test_the_sanitizer_sees_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launches are only recorded, so the figures that are printed mean nothing."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # too late for Triton: lets the CPU tensors through
    with fastinstance.use_backend("triton"), aot.recorded("") as seen:
        sanitize.main()
    variants = *aot.label_variants(), *aot.engine_variants(), *aot.region_variants(), *aot.segment_variants()
    assert {variant.kernel for variant in seen} == {variant.kernel for variant in variants}
