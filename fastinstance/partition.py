"""Both labelled sides of all planes as tables: instances, their pixels, overlapping pairs, boxes and centroids.

Instances of one side are numbered 0, 1, … over all planes, plane by plane and by id within a plane. A plane without
an instance on a side has one *artificial* instance there (section 2.1.4 of the paper); these follow the real ones.
Pairs link instances that share a pixel; an artificial instance is linked to all the other side has in its plane, so
that every sum over linked instances is right for it too.

A *cell* is what instances of both sides share, or what one has alone: every table is a sum over cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .checks import comparable
from .components import components_at, divide, drop_small, foreground

__all__ = ["Partition", "Side", "partition"]

_BLOCK = 1 << 16  # pixels worked on at once: the temporaries stay in cache


@dataclass(frozen=True)
class Side:
    """The instances of one side; K real ones, then one artificial one for each plane without any."""

    label: Tensor  # [F] int32, row + 1 of the instance that each listed pixel belongs to, 0 = background
    count: Tensor  # [K] int64 pixels
    per_plane: Tensor  # [planes] int64, real instances
    plane: Tensor  # [K + artificial] int64

    @property
    def real(self) -> int:
        return len(self.count)

    @property
    def rows(self) -> int:
        return len(self.plane)

    @cached_property
    def listed(self) -> Tensor:
        """[pixels] int64 ascending positions of the listed pixels that belong to an instance."""
        return foreground(self.label)

    @cached_property
    def entries(self) -> Tensor:
        """[planes] int64, instances with the artificial one."""
        return self.per_plane.clamp(min=1)

    @cached_property
    def artificial(self) -> Tensor:
        """[planes] int64 row of the plane's artificial instance, -1 where there is none."""
        rows = self.plane.new_full(self.per_plane.shape, -1)
        rows[self.plane[self.real :]] = torch.arange(self.real, self.rows, device=rows.device)
        return rows

    @cached_property
    def padded_count(self) -> Tensor:
        """[K + artificial] float64 pixels; an artificial instance has none."""
        return torch.cat([self.count, self.count.new_zeros(self.rows - self.real)]).double()


class _Extents(NamedTuple):
    """Where the real instances of a side lie, `[axes, K]` each."""

    lower: np.ndarray  # int32, first coordinate of a pixel
    upper: np.ndarray  # int32, last one + 1
    total: np.ndarray  # int64, Σx

    @classmethod
    def of(cls, side: Side, size: tuple[int, ...]) -> _Extents:
        """Those of a side without pixels."""
        shape = len(size), side.real
        return cls(np.full(shape, max(size), np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.int64))

    def add(self, row: np.ndarray, begin: Sequence[np.ndarray], length: np.ndarray) -> None:
        """Runs of pixels of a row: their instance, first pixel and number of pixels."""
        for axis, first in enumerate(begin):
            along = axis == len(begin) - 1
            np.minimum.at(self.lower[axis], row, first.astype(np.int32))
            np.maximum.at(self.upper[axis], row, (first + (length if along else 1)).astype(np.int32))
            np.add.at(self.total[axis], row, first * length + (length * (length - 1) // 2 if along else 0))


@dataclass(frozen=True)
class Partition:
    """Ground truth and prediction of all planes, seen through the F pixels that belong to an instance of either."""

    size: tuple[int, ...]
    pixels: Tensor  # [F] int64, ascending indices into the flattened planes
    target: Side
    pred: Side
    raw_target: Side  # the ground truth before `min_size`
    pairs: tuple[Tensor, Tensor]  # [A] int64 each: rows of target and of pred that share a pixel
    linked: tuple[Tensor, Tensor] = field(repr=False)  # pairs, then the links of artificial instances
    cell: Tensor = field(repr=False)  # [F] int32: 0 nothing, 1.. one pred alone, M + 1.. one target, M + N + 1.. a pair

    @property
    def cells(self) -> int:
        return 1 + self.pred.real + self.target.real + len(self.pairs[0])

    @cached_property
    def shared(self) -> Tensor:
        """[A] int64 pixels that each pair shares."""
        return self._cell_pixels[1 + self.pred.real + self.target.real :]

    @cached_property
    def _cell_pixels(self) -> Tensor:
        return torch.bincount(self.cell, minlength=self.cells)

    @cached_property
    def areas(self) -> tuple[Tensor, Tensor]:
        """float64 `[N, 2]` and `[M, 2]`, pixels of each instance where the other side has none, and where it has."""
        return self.by_side(self._cell_pixels.double())

    def by_side(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over cells `[cells, ...]` -> `[N, 2, ...]` and `[M, 2, ...]`, split as `areas`."""
        _, *alone, both = table.split([1, self.pred.real, self.target.real, len(self.pairs[0])])
        return tuple(  # pyright: ignore[reportReturnType]
            torch.stack([mine, torch.zeros_like(mine).index_add(0, row, both)], 1)
            for mine, row in zip(reversed(alone), self.pairs, strict=True)
        )

    @cached_property
    def coordinates(self) -> tuple[Tensor, ...]:
        """[F] int64 of each axis."""
        return _coordinates(self.pixels, self.size)

    @cached_property
    def _extents(self) -> tuple[_Extents, _Extents]:
        """Of target and of pred, from runs of pixels of a row that are in one cell."""
        sides = self.target, self.pred
        found = _Extents.of(self.target, self.size), _Extents.of(self.pred, self.size)
        pixels, cell, *labels = (a.cpu().numpy() for a in (self.pixels, self.cell, *(side.label for side in sides)))
        for block in range(0, len(pixels), _BLOCK):  # a run that is cut is two
            listed = slice(block, block + _BLOCK)
            at, within = pixels[listed], cell[listed]
            line = at // self.size[-1]
            begins = np.ones(len(at), dtype=bool)
            begins[1:] = (at[1:] != at[:-1] + 1) | (within[1:] != within[:-1]) | (line[1:] != line[:-1])
            first = np.flatnonzero(begins)
            length = np.diff(first, append=len(at))
            begin = [axis.numpy() for axis in _coordinates(torch.from_numpy(at[first]), self.size)]
            for extents, label in zip(found, labels, strict=True):
                row = label[listed][first]
                own = np.flatnonzero(row)
                extents.add(row[own] - 1, [axis[own] for axis in begin], length[own])
        return found

    def boxes(self, side: Side) -> tuple[Tensor, Tensor]:
        """Tight boxes [lower, upper) of all rows of a side, two float64 tensors [K + artificial, axes].

        The box of an artificial instance is [c - 1, c + 2) about c = floor(size / 2), not clipped.
        """
        corners = torch.empty((2, len(self.size), side.rows), dtype=torch.float64, device=self.pixels.device)
        extents = self._extents[side is self.pred]
        corners[:, :, : side.real] = torch.from_numpy(np.stack(extents[:2]))
        center = torch.tensor(self.size, device=corners.device)[:, None] // 2
        corners[0, :, side.real :], corners[1, :, side.real :] = center - 1, center + 2
        lower, upper = corners.transpose(1, 2)
        return lower, upper

    @cached_property
    def missed(self) -> Tensor:
        """[N] bool, ground-truth instances that share no pixel with a predicted one."""
        missed = torch.ones(self.target.real, dtype=torch.bool, device=self.pixels.device)
        missed[self.pairs[0]] = False
        return missed

    def peaks(self, values: Tensor, wanted: Tensor) -> Tensor:
        """[F] int64, row + 1 of each wanted ground-truth instance at its pixel of the largest value, else 0.

        Args:
            values: `[planes, P]` that grow with the probability. Of equal ones the first in raster order counts.
            wanted: `[N]` bool.
        """
        wanted = torch.cat([wanted.new_zeros(1), wanted])
        (place,) = torch.where(wanted[self.target.label])
        row = self.target.label[place].long()
        value = values.reshape(-1).index_select(0, self.pixels[place])
        largest = value.new_full((len(wanted),), -math.inf).scatter_reduce_(0, row, value, "amax")
        first = place.new_full((len(wanted),), len(self.pixels))  # beyond the list: the others have none
        first.scatter_reduce_(0, row, torch.where(value == largest[row], place, len(self.pixels)), "amin")
        peaks = self.pixels.new_zeros(len(self.pixels) + 1)
        peaks[first] = torch.arange(len(wanted), device=row.device)
        return peaks[:-1]

    def coordinate_sums(self, side: Side) -> Tensor:
        """Σx of each instance along each axis; int64 [K, axes]."""
        return torch.from_numpy(self._extents[side is self.pred].total).to(self.pixels.device).T

    def centroids(self, side: Side) -> Tensor:
        """Pixel nearest to the centroid, floor((2Σx + n) / 2n) in integers; int64 [K, axes]."""
        count = side.count[:, None]
        return (2 * self.coordinate_sums(side) + count) // (2 * count)


def _coordinates(pixels: Tensor, size: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Coordinates along each axis of flat indices, int64."""
    axes = []
    for length in reversed(size):
        rest = divide(pixels, length)
        axes.append(torch.sub(pixels, rest, alpha=length))
        pixels = rest
    return tuple(reversed(axes))


def _unique(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted distinct keys and where each key is among them; neighbours are often equal, so those merge first."""
    runs, run_of = torch.unique_consecutive(keys, return_inverse=True)
    distinct, position = torch.unique(runs, return_inverse=True)
    return distinct, position[run_of]


def _side(label: Tensor, per_plane: Tensor) -> Side:
    """Side of the listed pixels' labels, which count over all planes."""
    planes = torch.arange(len(per_plane), device=label.device)
    plane = planes.repeat_interleave(per_plane)
    count = torch.bincount(label, minlength=len(plane) + 1)[1:]
    return Side(label.int(), count, per_plane, torch.cat([plane, planes[per_plane == 0]]))


def _given(labels: Tensor, pixels: Tensor, plane: Tensor) -> tuple[Tensor, Tensor]:
    """Dense labels of the listed pixels and instances per plane, from given ids [planes, P]."""
    ids = comparable(labels).reshape(-1).index_select(0, pixels).long()  # a tenth of the time of [pixels]
    low, high = (int(bound) for bound in ids.aminmax()) if len(ids) else (-1, -1)
    width = high + 1
    if low >= 0 and len(labels) * width <= labels.numel():  # a table of all ids is no larger than the planes
        key = torch.add(ids, plane, alpha=width)
        there = torch.zeros(len(labels) * width, dtype=torch.bool, device=ids.device)
        there[key] = True
        there[::width] = False
        return (there.cumsum(0) * there).index_select(0, key), there.view(len(labels), width).sum(1)
    distinct, position = _unique((plane << 32) + ids)
    real = (distinct & 0xFFFFFFFF) > 0
    per_plane = torch.bincount((distinct >> 32)[real], minlength=len(labels))
    return (real.cumsum(0) * real)[position], per_plane


def _links(target: Side, pred: Side, pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    to_target = target.artificial[pred.plane[: pred.real]]  # [M] artificial partner of each predicted instance
    to_pred = pred.artificial[target.plane[: target.real]]  # [N]
    (alone_pred,) = torch.where(to_target >= 0)
    (alone_target,) = torch.where(to_pred >= 0)
    return (
        torch.cat([pairs[0], to_target[alone_pred], alone_target]),
        torch.cat([pairs[1], alone_pred, to_pred[alone_target]]),
    )


def partition(
    target: Tensor,
    predicted: Tensor | None,
    *,
    labels: Tensor | None = None,
    pred_labels: Tensor | None = None,
    connectivity: int,
    min_size: int = 0,
) -> Partition:
    """Label both sides and build the tables.

    Args:
        target: bool `[planes, *S]`.
        predicted: bool `[planes, *S]`, or None where only the ground truth is of interest.
        labels: integer `[planes, *S]`, given ground-truth ids (0 = background) in place of the components of `target`.
        pred_labels: the same of `predicted`.
        connectivity: of the components.
        min_size: components with fewer pixels become background.
    """
    size = target.shape[1:]
    pixels = foreground(target if predicted is None else target | predicted)
    if labels is None:
        truth = components_at(target, pixels, connectivity)
    else:
        truth = _given(labels, pixels, pixels // math.prod(size))
    if predicted is None:
        found = torch.zeros_like(truth[0]), torch.zeros_like(truth[1])
    elif pred_labels is not None:
        found = _given(pred_labels, pixels, pixels // math.prod(size))
    else:
        found = components_at(predicted, pixels, connectivity)
    raw = side = _side(*truth)
    if min_size > 1:
        side, found = _side(*drop_small(*truth, min_size)), drop_small(*found, min_size)
    pred = _side(*found)

    stride = max(pred.real, 1)
    in_target = side.listed
    found = pred.label[in_target]
    both = foreground(found)
    shared = in_target[both]
    keys, pair_of = _unique((side.label[shared].long() - 1) * stride + found[both] - 1)
    pairs = keys // stride, keys % stride
    cell = pred.label.clone()
    cell[in_target] = side.label[in_target] + pred.real
    cell[shared] = (pair_of + (1 + pred.real + side.real)).int()
    return Partition(tuple(size), pixels, side, pred, raw, pairs, _links(side, pred, pairs), cell)
