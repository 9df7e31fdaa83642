"""The compiled kernels, run by the emulator: equal to the CPU's results, whatever the order of warps and programs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from fastinstance_kernels import launch as limits
from torch import Tensor

import fastinstance
from bench.emulator import EmulationError, Launch, Schedule, emulated
from bench.ptx import UnknownInstructionError, computation
from bench.scenes import WEIGHTS, balls, noise
from fastinstance import use_backend
from fastinstance.testing import assert_close
from tests.memory import poisoned_memory as poisoned_memory

SCHEDULES = [Schedule(), Schedule(resident=3, seed=1)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["lockstep", "drawn"])
@pytest.mark.parametrize(("shape", "connectivity"), [((2, 1, 40, 70), 8), ((1, 1, 40, 70), 4), ((1, 1, 5, 9, 40), 26)])
def test_labels(shape: tuple[int, ...], connectivity: int, schedule: Schedule) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.6
    with emulated(schedule), use_backend("triton"):
        found = fastinstance.label(mask, connectivity=connectivity)
    for one, other in zip(found, fastinstance.label(mask, connectivity=connectivity), strict=True):
        assert torch.equal(one, other)


def step(loss: torch.nn.Module, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    value = loss(leaf, target)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


LOSSES = {
    "all terms": fastinstance.InstanceLoss(**WEIGHTS, sigmoid=True),
    "soft modes": fastinstance.InstanceLoss(**WEIGHTS, sigmoid=True, missed="soft", instance_loss="dicece"),
    "blob": fastinstance.BlobLoss(sigmoid=True),
    "regions": fastinstance.CCLoss(sigmoid=True),
    "peaks": fastinstance.ComponentMILLoss(sigmoid=True),
}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["lockstep", "drawn"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str, schedule: Schedule) -> None:
    scene = balls((2, 48, 64), 5, 6, (1, 4))
    with emulated(schedule) as launches, use_backend("triton"):
        value, gradient = step(LOSSES[name], *scene)
    expected, slope = step(LOSSES[name], *scene)
    assert_close(value, expected, rtol=1e-5)
    assert_close(gradient, slope, rtol=1e-4, atol=1e-6 * float(slope.abs().max()))
    assert all(launch.instructions for launch in launches)
    assert launches


def test_volumes_and_noise() -> None:
    loss = LOSSES["all terms"]
    for scene in (balls((1, 12, 16, 40), 6, 6, (1, 3)), noise(balls((1, 40, 64), 4, 4, (1, 4)), shift=-1)):
        with emulated(), use_backend("triton"):
            value, gradient = step(loss, *scene)
        expected, slope = step(loss, *scene)
        assert_close(value, expected, rtol=1e-5)
        assert_close(gradient, slope, rtol=1e-4, atol=1e-6 * float(slope.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    loss, scene = fastinstance.FalseLoss(sigmoid=True), balls((1, 8, 40), 1, 1, (1, 2))
    logits = scene.logits.to(dtype)
    with emulated(), use_backend("triton"):
        value, gradient = step(loss, logits, scene.target)
    expected, slope = step(loss, logits, scene.target)
    assert_close(value, expected, rtol=1e-5)
    assert_close(gradient, slope, rtol=1e-2, atol=1e-6)


def test_a_matrix_at_the_start_of_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a register for its address: in small tiles of float64."""
    monkeypatch.setattr(limits, "DENSE_ROWS", 4)
    loss, scene = fastinstance.FalseLoss(sigmoid=True), balls((1, 8, 40), 1, 1, (1, 2))
    with emulated(), use_backend("triton"), torch.no_grad():
        value = loss(scene.logits.double(), scene.target)
    assert_close(value, loss(scene.logits.double(), scene.target), rtol=1e-6)


@triton.jit
def shift(source, target, size, BLOCK: tl.constexpr):
    """Each value goes to the next place: of one tensor, programs race for the ends of blocks."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + place + 1, tl.load(source + place, mask=place < size, other=0), mask=place < size)


def shifted(source: Tensor, target: Tensor, size: int, schedule: Schedule | None = None) -> Launch:
    with emulated(schedule) as launches:
        shift[(4,)](source, target, size, BLOCK=64, num_warps=2)
    return launches[0]


def test_counts() -> None:
    source, target = torch.arange(256, dtype=torch.int32), torch.zeros(257, dtype=torch.int32)
    launch = shifted(source, target, 256)
    assert torch.equal(target[1:], source)
    assert (launch.name, launch.programs, launch.warps, launch.atomics) == ("shift", 4, 2, 0)
    assert launch.instructions["ld.global.b32"] == 8  # of warps
    assert launch.sectors == {"ld": 8 * 4, "st": 8 * 5}  # 128 bytes a warp, stored across one more boundary


@triton.jit
def transpose(source, target, SIDE: tl.constexpr):
    place = tl.arange(0, SIDE)
    grid = place[:, None] * SIDE + place
    tl.store(target + grid, tl.trans(tl.load(source + grid)))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize(("side", "warps"), [(16, 1), (32, 1), (64, 2)])
def test_through_shared_memory(side: int, warps: int, dtype: torch.dtype) -> None:
    """Between warps, by matrices or value by value."""
    source = torch.arange(side**2).to(dtype).view(side, side)
    target = torch.zeros_like(source)
    with emulated(Schedule(seed=0)):
        transpose[(1,)](source, target, SIDE=side, num_warps=warps)
    assert torch.equal(target, source.T)


@pytest.mark.parametrize(
    "operation", ["mul.hi.u32", "shf.r.wrap.b32", "setp.ne.and.s32", "cvt.sat.u8.s32", "min.NaN.f32"]
)
def test_what_it_does_not_know_is_an_error(operation: str) -> None:
    with pytest.raises(UnknownInstructionError, match=f"does not know {operation}"):
        computation(operation.split("."))


@pytest.mark.parametrize(("name", "expected"), [("lt", [0, 0, 1]), ("ltu", [1, 1, 1]), ("nan", [1, 1, 0])])
def test_comparisons(name: str, expected: list[int]) -> None:
    sides = [1.0, math.nan, 1.0], [math.nan, 1.0, 2.0]
    assert computation(("setp", name, "f64"))(*(np.array(side).view(np.uint64) for side in sides)).tolist() == expected


def test_tensors_without_values() -> None:
    nothing = torch.zeros(4, dtype=torch.int32)[:0]  # has a storage, but no address
    assert shifted(nothing, nothing.clone(), 0).sectors.total() == 0


def test_races() -> None:
    values = torch.arange(257, dtype=torch.int32)
    races = Schedule(seed=0, races=True)
    assert shifted(values, torch.zeros_like(values), 256, races).races.total() == 0
    assert shifted(values, values, 256, races).races.total() > 0


def test_addresses_outside() -> None:
    source = torch.zeros(256, dtype=torch.int32)
    with pytest.raises(EmulationError, match=r"test_emulator.py:\d+:\d+: an address outside of the tensors"):
        shifted(source, torch.zeros(256, dtype=torch.int32), 256)
