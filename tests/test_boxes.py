"""The nearest boxes equal a comparison of all pairs, whatever the boxes, without iterating over them in Python."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastinstance import boxes as module
from fastinstance.boxes import distance_iou, nearest_boxes

EXAMPLES = settings().max_examples
KINDS = ("scattered", "giant", "equal", "concentric", "line", "clustered", "outside", "sizes", "crowded")
Side = tuple[Tensor, Tensor, Tensor]


def brute_force(a: Side, b: Side) -> tuple[Tensor, Tensor]:
    """The definition, written out for all pairs at once."""
    (low_a, high_a, plane_a), (low_b, high_b, plane_b) = (
        (low[:, None], high[:, None], plane[:, None]) if side == 0 else (low, high, plane)
        for side, (low, high, plane) in enumerate((a, b))
    )
    intersection = (torch.minimum(high_a, high_b) - torch.maximum(low_a, low_b)).clamp(min=0).prod(-1)
    union = (high_a - low_a).prod(-1) + (high_b - low_b).prod(-1) - intersection
    rho = ((low_a + high_a) / 2 - (low_b + high_b) / 2).square().sum(-1)
    tau = (torch.maximum(high_a, high_b) - torch.minimum(low_a, low_b)).square().sum(-1)
    distance = torch.where(plane_a == plane_b, 1 - intersection / union + rho / tau, math.inf)
    return distance.amin(1), distance.amin(0)


def draw_boxes(kind: str, plane: Tensor, spacing: Tensor, random: torch.Generator) -> Side:
    """Boxes on the grid of pixels, scaled by the spacing; one for each entry of `plane`."""
    shape = (len(plane), len(spacing))

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high, shape, generator=random).double()

    lower, length = integers(0, 200), integers(1, 9)
    if kind == "giant":
        length = torch.ones_like(length)
        lower[:1], length[:1] = 0, 200
    elif kind == "equal":
        lower, length = torch.full_like(lower, 7), torch.full_like(length, 3)
    elif kind == "concentric":
        lower, length = 100 - length, 2 * length
    elif kind == "line":
        lower[:, 1:] = 0
    elif kind == "clustered":
        lower = 10_000 * integers(0, 3) + integers(0, 6)
    elif kind == "outside":
        lower, length = integers(-2, 1), torch.full_like(length, 3)
    elif kind == "sizes":
        length = (2 ** (8 * torch.rand(shape, generator=random, dtype=torch.float64))).floor()
    elif kind == "crowded":
        lower, length = integers(0, 40), integers(1, 40)
    return lower * spacing, (lower + length) * spacing, plane


@st.composite
def sides(draw: st.DrawFn, most: int = 120) -> tuple[Side, Side, int]:
    """Both sides, in a random order, and the number of planes; a plane has boxes on both sides or on none."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    axes = draw(st.integers(2, 3))
    spacing = torch.tensor(draw(st.sampled_from([(1.0, 1.0, 1.0), (0.7, 1.3, 3.1), (1e-3, 1.0, 50.0)]))[:axes]).double()
    counts = st.sampled_from([1, 1, 2, 3, 4, 5, 17, most])
    number = draw(st.lists(st.one_of(st.just((0, 0)), st.tuples(counts, counts)), min_size=1, max_size=4))
    drawn = []
    for side in range(2):
        plane = torch.arange(len(number)).repeat_interleave(torch.tensor([both[side] for both in number]))
        plane = plane[torch.randperm(len(plane), generator=random)]
        drawn.append(draw_boxes(draw(st.sampled_from(KINDS)), plane, spacing, random))
    return drawn[0], drawn[1], len(number)


def assert_nearest(a: Side, b: Side, planes: int) -> None:
    found = nearest_boxes(*a, *b, planes)
    if not (len(a[2]) and len(b[2])):
        assert [len(values) for values in found] == [len(a[2]), len(b[2])]
        return
    for values, expected in zip(found, brute_force(a, b), strict=True):
        torch.testing.assert_close(values, expected, rtol=1e-14, atol=2e-15)


@pytest.mark.parametrize("dense", [0, 1 << 30], ids=["descent", "all pairs"])
@given(drawn=sides())
@settings(max_examples=EXAMPLES)
def test_nearest_boxes_equal_brute_force(dense, drawn):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_DENSE", dense)
        assert_nearest(*drawn)


@given(drawn=sides())
@settings(max_examples=EXAMPLES // 4)
def test_blocks_change_nothing(drawn):
    for dense in (0, 1 << 30):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_DENSE", dense)
            patch.setattr(module, "_BLOCK", 64)
            assert_nearest(*drawn)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axes", [2, 3])
def test_many_boxes(kind, axes):
    random = torch.Generator().manual_seed(0)
    spacing = torch.tensor([0.7, 1.3, 3.1])[:axes].double()
    a, b = (
        draw_boxes(one, torch.randint(0, 2, (900,), generator=random), spacing, random) for one in (kind, "scattered")
    )
    c = draw_boxes(kind, torch.randint(0, 2, (900,), generator=random), spacing, random)
    for other in (a, b, c):
        assert_nearest(a, other, 2)


def test_both_ways_agree_to_the_last_bit(monkeypatch):
    random = torch.Generator().manual_seed(0)
    plane = torch.zeros(700, dtype=torch.int64)
    a, b = (draw_boxes("sizes", plane, torch.tensor([0.7, 1.3]).double(), random) for _ in range(2))
    found = []
    for dense in (0, 1 << 30):
        monkeypatch.setattr(module, "_DENSE", dense)
        found.append(torch.cat(nearest_boxes(*a, *b, 1)))
    assert torch.equal(*found)


def test_the_bound_holds_for_a_small_box_beside_a_long_one(monkeypatch):
    """Disjoint, but wider together than ρ and both half diagonals: a bound that assumes the latter loses it."""
    monkeypatch.setattr(module, "_DENSE", 0)
    a = torch.tensor([[0.0, 0.0]]).double(), torch.tensor([[100.0, 1.0]]).double(), torch.tensor([0])
    small = torch.tensor([[50.0, 2.0]]).double().repeat(300, 1)
    small[1:, 0] += 60 + torch.arange(299)
    assert_nearest(a, (small, small + 1, torch.zeros(300, dtype=torch.int64)), 1)
    box_a, box_b = torch.stack([a[0], a[1]], 0)[:, 0], torch.stack([small, small + 1])[:, 0]
    assert distance_iou(box_a, box_b) == 1 + (0.5**2 + 2**2) / (100**2 + 3**2)


def lines_executed(number: int) -> int:
    random = torch.Generator().manual_seed(0)
    plane = torch.zeros(number, dtype=torch.int64)
    a, b = (draw_boxes("scattered", plane, torch.ones(2).double() * 10, random) for _ in range(2))
    lines = 0

    def trace(frame, event, _):
        nonlocal lines
        if frame.f_code.co_filename != module.__file__:
            return None
        lines += event == "line"
        return trace

    sys.settrace(trace)
    try:
        nearest_boxes(*a, *b, 1)
    finally:
        sys.settrace(None)
    return lines


def test_no_python_iteration_over_boxes(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 1)  # as many blocks as there may ever be
    lines = {number: lines_executed(number) for number in (256, 1024, 4096)}
    per_level = lines[1024] - lines[256]
    assert lines[4096] - lines[1024] <= 1.25 * per_level
