"""Connected components of every plane: the label operator, and what it does on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from .backend import backend_for, operator

__all__ = ["components_at", "divide", "drop_small", "foreground", "label_planes"]

# Where joining runs is faster than labelling the image: at most one pixel in so many is foreground, and starts a run.
_FEW, _SPARSE = 8, 64


def foreground(mask: Tensor) -> Tensor:
    """Ascending flat indices of what is not zero; int64."""
    if mask.device.type == "cpu":
        array = mask.numpy()
        return torch.from_numpy(np.flatnonzero(array if array.dtype == bool else array != 0))  # twice as fast
    return mask.flatten().nonzero().squeeze(1)


def divide(values: Tensor, by: int) -> Tensor:
    """Quotients of integers, rounded down; on the CPU torch takes three times as long as numpy."""
    if values.device.type == "cpu":
        return torch.from_numpy(values.numpy() // by)
    return values // by


def components_at(mask: Tensor, pixels: Tensor, connectivity: int) -> tuple[Tensor, Tensor]:
    """Connected components of each plane, seen at some pixels only.

    Args:
        mask: bool `[planes, *S]`, 2D or 3D.
        pixels: `[F]` int64 ascending flat indices that include all true pixels.
        connectivity: 4 or 8 in 2D; 6, 18 or 26 in 3D.

    Returns:
        label: int32 `[F]`, 1, 2, … over all planes in raster order of each component's first pixel, 0 = background.
        counts: int64 `[planes]`, components of each plane.
    """
    if mask.device.type == "cpu" and backend_for(mask) == "torch":
        return _components_at(mask, pixels, connectivity)
    labels, counts = label_planes(mask, None, connectivity, 0)
    counts = counts.long()
    label = labels.view(-1).index_select(0, pixels)
    before = (counts.cumsum(0) - counts)[pixels // math.prod(mask.shape[1:])]
    return torch.where(label > 0, label + before, 0).int(), counts


def _components_at(mask: Tensor, pixels: Tensor, connectivity: int) -> tuple[Tensor, Tensor]:
    """`components_at` on the CPU."""
    planes, area = len(mask), math.prod(mask.shape[1:])
    listed, dense = pixels.numpy(), mask.contiguous().numpy()
    inside = np.flatnonzero(dense.reshape(-1).take(listed))
    if len(inside) * _FEW <= mask.numel():
        runs = _Runs.of(listed[inside], mask.shape[1:])
        if len(runs.start) * _SPARSE <= mask.numel():
            of_run, first = _label_runs(runs, mask.shape[1:], connectivity)
            label = np.zeros(len(listed), np.int32)
            label[inside] = np.repeat(of_run, runs.length)
            counts = np.bincount(listed[inside[first]] // area, minlength=planes)
            return torch.from_numpy(label), torch.from_numpy(counts)
    label, counts = np.empty(len(listed), np.int32), np.zeros(planes, np.int64)
    edges, total = np.searchsorted(listed, np.arange(planes + 1) * area), 0
    for plane, begin, end in zip(range(planes), edges, edges[1:], strict=False):
        if begin == end:
            continue
        ids, counts[plane] = _label_plane(dense[plane], connectivity)
        here = ids.reshape(-1).take(listed[begin:end] - plane * area)
        np.add(here, (here > 0) * total, out=label[begin:end])
        total += counts[plane]
    return torch.from_numpy(label), torch.from_numpy(counts)


class _Runs(NamedTuple):
    """Runs of consecutive pixels of a row, in raster order, on a grid with one empty cell after each row, slice, …"""

    start: np.ndarray  # [R] int64 first and last pixel on that grid
    end: np.ndarray
    first: np.ndarray  # [R] int64 position of the first pixel in the list
    length: np.ndarray  # [R] int64

    @classmethod
    def of(cls, pixels: np.ndarray, size: Sequence[int]) -> _Runs:
        padded, rest, step = pixels.copy(), pixels, 1
        for length in reversed(size):
            rest = rest // length
            padded += rest * step
            step *= length + 1
        first = np.flatnonzero(np.diff(padded, prepend=-2) != 1)
        length = np.diff(first, append=len(pixels))
        start = padded[first]
        return cls(start, start + length - 1, first, length)


def _later_rows(size: Sequence[int], connectivity: int) -> list[tuple[int, int]]:
    """Neighbouring rows that follow a row in raster order: offset on the padded grid, and reach along the row."""
    row = size[-1] + 1
    if len(size) == 2:
        return [(row, 1 if connectivity == 8 else 0)]
    plane = row * (size[-2] + 1)
    straight, oblique = (1, 1) if connectivity == 26 else (1, 0) if connectivity == 18 else (0, 0)
    below = [(row, straight), (plane, straight)]
    return below if connectivity == 6 else [*below, (plane - row, oblique), (plane + row, oblique)]


def _label_runs(runs: _Runs, size: Sequence[int], connectivity: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels 1..K of the runs in raster order, and the position of each component's first pixel.

    Runs that touch are edges of a graph. In each round every root with a smaller neighbour is hung below it, and all
    paths are then shortened to their root, so every round joins components until no edge is open.
    """
    number = np.arange(len(runs.start))
    uppers, lowers = [], []
    for offset, reach in _later_rows(size, connectivity):
        low = np.searchsorted(runs.end, runs.start + (offset - reach))
        several = np.searchsorted(runs.start, runs.end + (offset + reach), side="right") - low
        uppers.append(np.repeat(number, several))
        lowers.append(np.repeat(low - (several.cumsum() - several), several) + np.arange(len(uppers[-1])))
    upper, lower, root = np.concatenate(uppers), np.concatenate(lowers), number
    while True:
        upper, lower = root[upper], root[lower]
        (apart,) = np.nonzero(upper != lower)
        if len(apart) == 0:
            break
        upper, lower = upper[apart], lower[apart]
        root = root.copy()
        np.minimum.at(root, np.maximum(upper, lower), np.minimum(upper, lower))
        while not np.array_equal(parent := root[root], root):
            root = parent
    first = root == number  # the smallest run of a component is its root
    return first.cumsum()[root], runs.first[first]


def _label_plane(mask: np.ndarray, connectivity: int) -> tuple[np.ndarray, int]:
    """Ids 1..K of the components of one plane in raster order, as an image, and K."""
    try:
        return _label_volume(mask, connectivity)
    except (ImportError, RuntimeError):  # cc3d is only faster, and reserves too few labels for the densest specks
        pixels = np.flatnonzero(mask)
        runs = _Runs.of(pixels, mask.shape)
        of_run, first = _label_runs(runs, mask.shape, connectivity)
        ids = np.zeros(mask.shape, np.int64)
        ids.reshape(-1)[pixels] = np.repeat(of_run, runs.length)
        return ids, len(first)


def _label_volume(mask: np.ndarray, connectivity: int) -> tuple[np.ndarray, int]:
    """`_label_plane` by cc3d, whose volumes are numbered in raster order; an image is a volume one slice thick.

    Images under 8-connectivity are not (they are labelled by blocks of pixels), and cc3d 4.1 labels those of odd size
    wrongly. It fails on lines under 26; under 6 they are right.
    """
    import cc3d  # on a GPU nothing needs it

    if mask.ndim == 2:
        mask, connectivity = mask[None], {4: 6, 8: 26}[connectivity]
    if mask.size == max(mask.shape):
        connectivity = 6
    ids, number = cc3d.connected_components(
        mask, connectivity=cast("Any", connectivity), binary_image=cast("Any", True), return_N=True
    )
    return ids, number


@operator("fastinstance::label_planes")
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
    dense = inside.cpu().contiguous().numpy()
    labels, counts = np.empty(dense.shape, np.int32), np.empty(len(dense), np.int32)
    for plane, image in enumerate(dense):
        ids, counts[plane] = _label_plane(image, connectivity)
        if min_size > 1:
            kept = np.bincount(ids.reshape(-1), minlength=counts[plane] + 1) >= min_size
            kept[0] = False
            ids, counts[plane] = (kept.cumsum() * kept)[ids], kept.sum()
        labels[plane] = ids
    return torch.from_numpy(labels).to(mask.device), torch.from_numpy(counts).to(mask.device)


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
