"""Connected components of every plane: the label operator, and what it does on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from .backend import backend_for

__all__ = ["components_at", "drop_small", "foreground", "label_planes"]

_SPARSE = 64  # pixels per run from which joining runs is faster than labelling the image


def foreground(mask: Tensor) -> Tensor:
    """Ascending flat indices of the true pixels of a mask; int64."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero().squeeze(1)


def components_at(mask: Tensor, pixels: Tensor, connectivity: int) -> tuple[Tensor, Tensor]:
    """Connected components of each plane, seen at some pixels only.

    Args:
        mask: bool `[planes, *S]`, 2D or 3D.
        pixels: `[F]` int64 ascending flat indices that include all true pixels.
        connectivity: 4 or 8 in 2D; 6, 18 or 26 in 3D.

    Returns:
        label: int64 `[F]`, 1, 2, … over all planes in raster order of each component's first pixel, 0 = background.
        counts: int64 `[planes]`, components of each plane.
    """
    if mask.device.type == "cpu" and backend_for(mask) == "torch":
        return _components_at(mask, pixels, connectivity)
    labels, counts = label_planes(mask, None, connectivity, 0)
    counts = counts.long()
    label = labels.view(-1).index_select(0, pixels).long()
    before = (counts.cumsum(0) - counts)[pixels // math.prod(mask.shape[1:])]
    return torch.where(label > 0, label + before, 0), counts


def _components_at(mask: Tensor, pixels: Tensor, connectivity: int) -> tuple[Tensor, Tensor]:
    """`components_at` on the CPU: no image of labels is made."""
    planes, *size = mask.shape
    inside = mask.reshape(-1).index_select(0, pixels).nonzero().squeeze(1)
    if len(inside) == 0:
        return torch.zeros_like(pixels), torch.zeros(planes, dtype=torch.int64)
    runs = _Runs.of(pixels.index_select(0, inside), size)
    found = None
    if len(runs.start) * _SPARSE > mask.numel():
        try:
            found = _label_image(mask, pixels, connectivity)
        except (ImportError, RuntimeError):  # cc3d is only faster, and reserves too few labels for the densest specks
            found = None
    if found is None:
        label, first = _label_runs(runs, size, connectivity)
        label = torch.zeros_like(pixels).index_copy_(0, inside, label.index_select(0, runs.run))
        first = pixels.index_select(0, inside).index_select(0, first)
    else:
        label, first = found
    return label, torch.bincount(first // math.prod(size), minlength=planes)


class _Runs(NamedTuple):
    """Runs of consecutive pixels of a row, in raster order, on a grid with one empty cell after each row, slice, …"""

    start: Tensor  # [R] int64 first and last pixel on that grid
    end: Tensor
    first: Tensor  # [R] int64 position of the first pixel in the list
    run: Tensor  # [F] int64 run of each listed pixel

    @classmethod
    def of(cls, pixels: Tensor, size: Sequence[int]) -> _Runs:
        padded, rest, step = pixels.clone(), pixels, 1
        for length in reversed(size):
            rest = rest // length
            padded += rest * step
            step *= length + 1
        begins = torch.ones_like(pixels, dtype=torch.bool)
        torch.ne(padded[1:], padded[:-1] + 1, out=begins[1:])
        first = begins.nonzero().squeeze(1)
        last = torch.cat([first[1:], first.new_tensor([len(pixels)])]) - 1
        return cls(padded[first], padded[last], first, begins.cumsum(0) - 1)


def _later_rows(size: Sequence[int], connectivity: int) -> list[tuple[int, int]]:
    """Neighbouring rows that follow a row in raster order: offset on the padded grid, and reach along the row."""
    row = size[-1] + 1
    if len(size) == 2:
        return [(row, 1 if connectivity == 8 else 0)]
    plane = row * (size[-2] + 1)
    straight, oblique = (1, 1) if connectivity == 26 else (1, 0) if connectivity == 18 else (0, 0)
    below = [(row, straight), (plane, straight)]
    return below if connectivity == 6 else [*below, (plane - row, oblique), (plane + row, oblique)]


def _label_runs(runs: _Runs, size: Sequence[int], connectivity: int) -> tuple[Tensor, Tensor]:
    """Labels 1..K of the runs in raster order, and the position of each component's first pixel.

    Runs that touch are edges of a graph. In each round every root with a smaller neighbour is hung below it, and all
    paths are then shortened to their root, so every round joins components until no edge is open.
    """
    number = torch.arange(len(runs.start))
    edges = []
    for offset, reach in _later_rows(size, connectivity):
        low = torch.searchsorted(runs.end, runs.start + (offset - reach))
        several = torch.searchsorted(runs.start, runs.end + (offset + reach), right=True) - low
        upper = number.repeat_interleave(several)
        within = torch.arange(len(upper)) - (several.cumsum(0) - several).index_select(0, upper)
        edges.append(torch.stack([upper, low.index_select(0, upper) + within]))
    ends, root = torch.cat(edges, 1), number
    while True:
        ends = root[ends]
        ends = ends[:, ends[0] != ends[1]]
        if ends.shape[1] == 0:
            break
        # torch.amin of two rows of integers takes hundreds of times as long
        root = root.scatter_reduce(0, torch.maximum(*ends), torch.minimum(*ends), "amin")
        while not torch.equal(parent := root[root], root):
            root = parent
    first = root == number  # the smallest run of a component is its root
    return first.cumsum(0)[root], runs.first[first]


def _label_image(mask: Tensor, pixels: Tensor, connectivity: int) -> tuple[Tensor, Tensor]:
    """Labels 1..K at the listed pixels in raster order, and each component's first pixel, from the labeller."""
    planes, *size = mask.shape
    # One empty row (slice) after each plane keeps the planes apart in a single call of the labeller.
    stacked = np.zeros((planes, size[0] + 1, *size[1:]), dtype=bool)
    stacked[:, :-1] = mask.numpy()
    found, total = _label_volume(stacked.reshape(-1, *size[1:]), connectivity)
    plane = pixels // math.prod(size)
    label = torch.from_numpy(found.reshape(-1)[(pixels + plane * math.prod(size[1:])).numpy()].astype(np.int64))
    # The labeller works by blocks of rows: its ids are not always in raster order.
    first = torch.full((total + 1,), mask.numel()).scatter_reduce_(0, label, pixels, "amin")
    first[0] = -1
    order = first.argsort()
    rank = torch.empty_like(order)
    rank[order] = torch.arange(total + 1)
    return rank[label], first[order[1:]]


def _label_volume(mask: np.ndarray, connectivity: int) -> tuple[np.ndarray, int]:
    """Ids 1..K of the components, in any order, and K.

    cc3d 4.1 labels images of odd size wrongly under 8-connectivity and fails on lines under 26; volumes one slice
    thick, and lines under 6, are right.
    """
    import cc3d  # on a GPU nothing needs it

    if mask.ndim == 2:
        mask, connectivity = mask[None], {4: 6, 8: 26}[connectivity]
    if mask.size == max(mask.shape):
        connectivity = 6
    return cc3d.connected_components(
        mask, connectivity=cast("Any", connectivity), binary_image=cast("Any", True), return_N=True
    )


@torch.library.custom_op("fastinstance::label_planes", mutates_args=())
def label_planes(mask: Tensor, threshold: float | None, connectivity: int, min_size: int) -> tuple[Tensor, Tensor]:
    """Connected components of each plane, as an image; on a CUDA tensor without waiting for the device.

    Args:
        mask: `[planes, *S]`, 2D or 3D. Foreground is `mask >= threshold`, or without a threshold what is neither 0
            nor NaN.
        threshold: for floating masks only.
        connectivity: 4 or 8 in 2D; 6, 18 or 26 in 3D.
        min_size: components with fewer pixels become background.

    Returns:
        labels: int32 `[planes, *S]`, 1..K in each plane in raster order of each component's first pixel.
        counts: int32 `[planes]`, K of each plane.
    """
    if mask.numel() == 0:
        return mask.new_zeros(mask.shape, dtype=torch.int32), mask.new_zeros(mask.shape[:1], dtype=torch.int32)
    if backend_for(mask) == "triton":
        from fastinstance_kernels import label_planes as launch

        return launch(mask, threshold=threshold, connectivity=connectivity, min_size=min_size)
    if threshold is not None:
        inside = mask >= threshold
    else:
        inside = mask.bool()
        if mask.is_floating_point():
            inside &= ~mask.isnan()
    inside = inside.cpu()
    pixels = foreground(inside)
    label, counts = _components_at(inside, pixels, connectivity)
    if min_size > 1:
        label, counts = drop_small(label, counts, min_size)
    before = (counts.cumsum(0) - counts)[pixels // math.prod(mask.shape[1:])]
    labels = torch.zeros(mask.shape, dtype=torch.int32)
    labels.view(-1)[pixels] = torch.where(label > 0, label - before, 0).int()
    return labels.to(mask.device), counts.int().to(mask.device)


@label_planes.register_fake
def _(mask: Tensor, threshold: float | None, connectivity: int, min_size: int) -> tuple[Tensor, Tensor]:
    del threshold, connectivity, min_size
    return mask.new_empty(mask.shape, dtype=torch.int32), mask.new_empty(mask.shape[:1], dtype=torch.int32)


def drop_small(label: Tensor, counts: Tensor, min_size: int) -> tuple[Tensor, Tensor]:
    """Labels over all planes `[F]` and their number per plane, without those of fewer than `min_size` pixels."""
    kept = torch.bincount(label, minlength=int(counts.sum()) + 1) >= min_size
    kept[0] = False
    plane = torch.arange(len(counts), device=label.device).repeat_interleave(counts)
    return (kept.cumsum(0) * kept)[label], torch.bincount(plane[kept[1:]], minlength=len(counts))
