"""The two ways to label on the CPU: runs, for sparse masks, and the image, for others."""

import sys

import numpy as np
import pytest
import torch
from scipy import ndimage

import fastinstance
from fastinstance import components, partition

STRUCTURES = {
    connectivity: ndimage.generate_binary_structure(axes, order)
    for axes, order, connectivity in ((2, 1, 4), (2, 2, 8), (3, 1, 6), (3, 2, 18), (3, 3, 26))
}


def spiral(side: int) -> torch.Tensor:
    """One pixel wide, one component that winds inwards: many rounds of joining."""
    mask = torch.zeros(side, side, dtype=torch.bool)
    y, x, dy, dx = 0, 0, 0, 1
    mask[0, 0] = True
    for length in (n for k in range(side - 1, 0, -2) for n in (k, k)):
        for _ in range(length):
            y, x = y + dy, x + dx
            mask[y, x] = True
        dy, dx = dx, -dy
    return mask


def check(mask: torch.Tensor, connectivity: int) -> None:
    """Ids and counts are scipy's, which are in raster order, seen at every second pixel of the background too."""
    flat = mask.flatten(0, 1)
    seen = flat.flatten().clone()
    seen[::2] = True
    pixels = components.foreground(seen)
    label, counts = components.components_at(flat, pixels, connectivity)
    truth, total = torch.zeros(flat.shape, dtype=torch.int64), 0
    for plane, image in enumerate(flat.numpy()):
        ids, number = ndimage.label(image, STRUCTURES[connectivity])
        truth[plane] = torch.from_numpy(ids + total * (ids > 0))
        assert int(counts[plane]) == number
        total += number
    assert torch.equal(label, truth.view(-1)[pixels])


def choose(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_FEW", "_SPARSE"):
        monkeypatch.setattr(components, name, 0 if way == "runs" else 10**9)


@pytest.mark.parametrize("way", ["runs", "image"])
@pytest.mark.parametrize("connectivity", STRUCTURES)
def test_both_equal_scipy(way: str, connectivity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(way, monkeypatch)
    rng = np.random.default_rng(connectivity)
    axes = STRUCTURES[connectivity].ndim
    for _ in range(60):
        shape = (*rng.integers(1, 3, 2), *rng.integers(1, 14 if axes == 2 else 7, axes))
        check(torch.from_numpy(rng.random(shape) < rng.random()), connectivity)


@pytest.mark.parametrize("way", ["runs", "image"])
@pytest.mark.parametrize("connectivity", [4, 8])
def test_long_components(way: str, connectivity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(way, monkeypatch)
    comb = torch.zeros(41, 41, dtype=torch.bool)
    comb[:, ::2] = True
    comb[-1] = True
    for mask in (spiral(41), spiral(41).flip(0), comb, comb.T, comb.flip(0), torch.eye(41, dtype=torch.bool)):
        check(mask[None, None], connectivity)


def test_sparse_masks_take_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.zeros(2, 1, 64, 64, dtype=torch.bool)
    mask[..., 5:9, 5:9] = True
    monkeypatch.setattr(components, "_label_plane", None)
    check(mask, 8)


@pytest.mark.parametrize("min_size", [0, 3])
def test_dense_masks_need_no_cc3d(min_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.rand(2, 1, 20, 31, generator=torch.Generator().manual_seed(0)) < 0.5
    expected = fastinstance.label(mask, min_size=min_size)
    monkeypatch.setitem(sys.modules, "cc3d", None)
    for found, truth in zip(fastinstance.label(mask, min_size=min_size), expected, strict=True):
        assert torch.equal(found, truth)
    check(mask, 8)


@pytest.mark.parametrize(
    ("dtype", "largest"),
    [
        (dtype, largest)
        for dtype in (torch.uint8, torch.uint16, torch.int32, torch.int64, torch.uint64)
        for largest in (1, 5, 59, 60, 61, 250, 2**31 - 1)
        if largest <= torch.iinfo(dtype).max
    ],
)
def test_given_ids(dtype: torch.dtype, largest: int) -> None:
    """Numbered by plane and id, whether the ids are small enough for a table (below 60) or are sorted."""
    chance = np.random.default_rng(largest)
    ids = chance.choice([0, 0, 1, largest // 2, max(largest - 1, 1), largest], size=(4, 6, 10))
    ids[1] = 0  # a plane without instances
    pixels = np.flatnonzero((ids > 0) | (chance.random(ids.shape) < 0.5))
    places = torch.from_numpy(pixels)
    label, per_plane = partition._given(torch.from_numpy(ids).to(dtype), places, places // 60)
    expected, before = np.zeros_like(ids), 0
    for plane, image in enumerate(ids):
        names = np.setdiff1d(image, [0])
        expected[plane] = np.where(image > 0, before + 1 + np.searchsorted(names, image), 0)
        before += len(names)
        assert per_plane[plane] == len(names)
    assert label.dtype == per_plane.dtype == torch.int64
    assert np.array_equal(label, expected.reshape(-1)[pixels])


def test_no_given_ids() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    label, per_plane = partition._given(torch.zeros(3, 2, 2, dtype=torch.int32), nothing, nothing)
    assert label.tolist() == []
    assert per_plane.tolist() == [0, 0, 0]
