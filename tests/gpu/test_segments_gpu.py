"""The losses by component on a GPU: real sizes against the CPU, repetitions, capture, no waiting, memory.

pytest -m gpu tests/gpu/test_segments_gpu.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastinstance
from fastinstance.testing import assert_close
from tests.gpu.test_engine_gpu import blobs, noise, specks, value_and_gradient

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LOSSES = {
    "CC": fastinstance.CCLoss,
    "CC, given": fastinstance.CCLoss,
    "Tversky": fastinstance.ComponentTverskyLoss,
    "MIL": fastinstance.ComponentMILLoss,
    "recall": fastinstance.LesionRecallLoss,
}
SCENES = {
    "balls": lambda: blobs(48, 1, 256, 256),
    "noise": lambda: noise(8, 1, 251, 317, density=0.02),
    "volumes": lambda: blobs(2, 1, 128, 128, 128),
    "specks": lambda: specks(1024, 4, shift=2),
}


class Given(nn.Module):
    """CC loss of fixed regions, as large as they are for a component every 40 pixels."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        *_, height, width = input.shape
        y, x = torch.arange(height, device=input.device), torch.arange(width, device=input.device)
        regions = (y[:, None] // 40 * 1009 + x // 40 + 1).expand(input.shape)
        return self.loss(input, target, target_regions=regions)


def make(name: str, **options: Any) -> nn.Module:
    loss = LOSSES[name](sigmoid=True, **options)
    return Given(loss) if name == "CC, given" else loss


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("name", LOSSES)
def test_real_sizes_equal_the_cpu(name: str, scene: str) -> None:
    input, target = SCENES[scene]()
    loss = make(name)
    found = value_and_gradient(loss, input, target)
    with fastinstance.use_backend("torch"):
        expected = value_and_gradient(loss, input.cpu(), target.cpu())
    for one, other in zip(found, expected, strict=True):
        assert_close(one.cpu(), other, rtol=2e-5, atol=1e-10, relative_to="largest")


@pytest.mark.parametrize("name", LOSSES)
def test_repetitions_are_bitwise_equal(name: str) -> None:
    input, target = SCENES["balls"]()
    loss = make(name)
    first = value_and_gradient(loss, input, target)
    for _ in range(50):
        assert all(map(torch.equal, value_and_gradient(loss, input, target), first))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("name", LOSSES)
def test_no_synchronisation(name: str) -> None:
    input, target = blobs(2, 1, 96, 128)
    losses = [make(name), make(name, **({} if name.startswith("CC") else {"min_size": 3}), max_instances=500)]
    for loss in losses:
        value_and_gradient(loss, input, target)  # compiling a kernel may synchronise
    torch.cuda.synchronize()
    previous = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for loss in losses:
            value_and_gradient(loss, input, target)
    finally:
        torch.cuda.set_sync_debug_mode(previous)


@pytest.mark.parametrize("name", LOSSES)
def test_graphed_loss(name: str) -> None:
    """Replayed on images with other numbers of components, none among them."""
    sample, target = blobs(2, 1, 64, 96)
    loss = make(name)
    graphed = fastinstance.make_graphed(loss, sample.clone().requires_grad_(), target.clone())
    for density in (0.0, 0.05, 0.4):
        scene = noise(2, 1, 64, 96, density=density)
        for one, other in zip(value_and_gradient(graphed, *scene), value_and_gradient(loss, *scene), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("name", LOSSES)
def test_compiled(name: str) -> None:
    loss = make(name)
    compiled = torch.compile(loss, fullgraph=True)
    for seed in range(2):
        scene = blobs(2, 1, 64, 96, seed=2 * seed)
        for one, other in zip(value_and_gradient(compiled, *scene), value_and_gradient(loss, *scene), strict=True):
            assert_close(one, other, rtol=1e-5, relative_to="largest")


@pytest.mark.parametrize(("name", "per_pixel"), [("CC", 60), ("CC, given", 120), ("MIL", 40), ("recall", 56)])
def test_peak_memory(name: str, per_pixel: int) -> None:
    """Of forward and backward pass together, besides the images, per pixel."""
    input, target = noise(4, 1, 1024, 1024, density=0.02)
    loss = make(name)
    value_and_gradient(loss, input, target)  # what the first call alone needs
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value_and_gradient(loss, input, target)
    assert torch.cuda.max_memory_allocated() - before <= per_pixel * input.numel() + 2**20
