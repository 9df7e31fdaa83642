"""Sums over planes and instances, with their gradient: the one pass over the pixels behind all terms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .pixel import Pointwise, cost_of

__all__ = [
    "DenseSums",
    "InstanceSums",
    "OnlyOnce",
    "Segments",
    "instance_sums",
]

_BLOCK = 1 << 18  # pixels worked on at once: the temporaries stay in cache


class Segments(NamedTuple):
    """A partition of all planes into segments, as runs of consecutive pixels of one segment."""

    start: Tensor  # [R] int64, ascending flat index of the first pixel of each run, the first of them 0
    row: Tensor  # [R] int64, the segment of each run
    rows: int  # number of segments


class DenseSums(NamedTuple):
    """A request for the sums Σ P·G, Σ P^k, Σ v over each whole plane, or each of its segments."""

    target: Tensor  # [G] int64, ascending flat indices of the pixels with G = 1
    squared: bool
    pointwise: Pointwise | None
    positives_only: bool = False  # v counts where G = 1 only
    segments: Segments | None = None


class InstanceSums(NamedTuple):
    """A request for sums of p, p² and v over the instances, for a list of pixels.

    Each entry of `tables` is (rows, number of rows): the row of its table that each listed pixel adds to.
    """

    pixels: Tensor  # [F] int64, flat indices, each at most once
    target: Tensor  # [F] bool, G of each listed pixel
    squared: bool
    pointwise: Pointwise | None
    tables: tuple[tuple[Tensor, int], ...]


def instance_sums(
    values: Tensor, logits: bool, dense: tuple[DenseSums, ...], instances: InstanceSums | None
) -> tuple[list[Tensor], list[Tensor]]:
    """All sums that the terms need, in one pass over the planes and one over the listed pixels.

    Args:
        values: `[planes, P]` float32 or float64, logits or probabilities p.
        logits: whether `values` are logits.
        dense: requests over whole planes.
        instances: request over instances; its columns are Σp, then Σp² if `squared`, then Σv if `pointwise`.

    Returns:
        One `[planes, 3]` or `[segments, 3]` float64 table per dense request (columns Σ P·G, Σ P^k, Σ v) and one
        `[rows, columns]`
        float64 table per table of `instances`. The gradient with respect to `values` is analytic and gathered in one
        pass; a second derivative raises RuntimeError.
    """
    tables = _Sums.apply(values, logits, dense, instances)
    return list(tables[: len(dense)]), list(tables[len(dense) :])


class _Block(NamedTuple):
    """Consecutive pixels: whole planes, or a part of one."""

    planes: slice
    pixels: slice  # of the flattened planes
    target: Tensor  # positions of the pixels with G = 1 within the block
    target_plane: Tensor  # and the plane of each, counted from the first plane of the block

    def runs(self, segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
        """Of the runs in the block: row and length, and the run of each pixel with G = 1."""
        ends = segments.start.new_tensor([self.pixels.start + 1, self.pixels.stop])
        first, last = torch.searchsorted(segments.start, ends).tolist()
        start = segments.start[first:last] - self.pixels.start
        edges = torch.cat([start.new_zeros(1), start, start.new_tensor([self.pixels.stop - self.pixels.start])])
        return segments.row[first - 1 : last], edges.diff(), torch.searchsorted(start, self.target, right=True)

    def by_plane(self, pixels: Tensor) -> Tensor:
        return pixels.view(self.planes.stop - self.planes.start, -1)

    def sum_positives(self, values: Tensor) -> Tensor:
        """Sum over the pixels with G = 1 of each plane of the block."""
        return torch.bincount(self.target_plane, values.double(), self.planes.stop - self.planes.start)


def _blocks(planes: int, pixels: int, target: Tensor) -> Iterator[_Block]:
    """Cut all pixels into blocks of about _BLOCK, so that the temporaries stay in cache."""
    rows, columns = max(1, _BLOCK // pixels), min(pixels, _BLOCK)
    edges = [r * pixels + c for r in range(0, planes, rows) for c in range(0, pixels, columns)] + [planes * pixels]
    cuts = torch.searchsorted(target, target.new_tensor(edges)).tolist()
    for start, stop, begin, end in zip(edges, edges[1:], cuts, cuts[1:], strict=False):
        first, inside = start // pixels, target[begin:end]
        yield _Block(slice(first, -(-stop // pixels)), slice(start, stop), inside - start, inside // pixels - first)


def _wrong_and_cost(x: Tensor, target: Tensor, logits: bool, with_cost: bool) -> tuple[Tensor, Tensor | None]:
    """w = |p - G| and c = -log(1 - w) of pixels x, G = 1 at the positions `target`.

    From logits both come from the logit of the wrong answer, so that nothing cancels at either end.
    """
    positives = x.index_select(0, target)
    if not logits:
        wrong = x.scatter(0, target, 1 - positives)
        return wrong, cost_of((1 - x).scatter_(0, target, positives)) if with_cost else None
    wrong = x.sigmoid().scatter_(0, target, (-positives).sigmoid_())
    if not with_cost:
        return wrong, None
    exact_from = 20 if x.dtype == torch.float32 else 40  # softplus(x) = x to the last bit
    cost = F.softplus(x, threshold=exact_from)
    return wrong, cost.scatter_(0, target, F.softplus(-positives, threshold=exact_from))


def _sum_runs(values: Tensor, length: Tensor) -> Tensor:
    """Sums over runs of so many consecutive pixels, none of them empty; float64."""
    if values.device.type == "cpu":
        start = (length.cumsum(0) - length).numpy()
        return torch.from_numpy(np.add.reduceat(values.numpy(), start, dtype=np.float64))
    return torch.segment_reduce(values.double(), "sum", lengths=length)


def _repeat_runs(values: Tensor, length: Tensor, pixels: int) -> Tensor:
    """A value per run -> a value per pixel."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.repeat(values.numpy(), length.numpy()))
    return values.repeat_interleave(length, output_size=pixels)


def _segment_sums(block: _Block, w: Tensor, c: Tensor | None, request: DenseSums, table: Tensor) -> None:
    """Add the sums of one block to the rows of its segments."""
    assert request.segments is not None
    row, length, run = block.runs(request.segments)
    missed = w.index_select(0, block.target)
    power = 2 if request.squared else 1

    def over_positives(values: Tensor) -> Tensor:
        return torch.bincount(run, values.double(), len(row))

    columns = [
        over_positives(1 - missed),
        _sum_runs(w if power == 1 else w.square(), length) + over_positives((1 - missed) ** power - missed**power),
    ]
    if request.pointwise is not None and c is not None:
        columns.append(_sum_runs(request.pointwise(w, c), length))
    for column, sums in zip(table.unbind(1), columns, strict=False):
        column += torch.bincount(row, sums, len(table))


class _DensePart(NamedTuple):
    """What the gradient of a dense request needs of one block."""

    block: _Block
    wrong: Tensor
    cost: Tensor | None


def _dense_sums(values: Tensor, logits: bool, request: DenseSums, keep: bool) -> tuple[Tensor, list[_DensePart]]:
    """The sums of one dense request, and what its gradient needs if that is to be kept."""
    planes, pixels = values.shape
    segments = request.segments
    table = values.new_zeros((planes if segments is None else segments.rows, 3), dtype=torch.float64)
    power = 2 if request.squared else 1
    parts = []
    for block in _blocks(planes, pixels, request.target):
        x = values.view(-1)[block.pixels]
        w, c = _wrong_and_cost(x, block.target, logits, request.pointwise is not None)
        if keep:
            parts.append(_DensePart(block, w, c))
        if segments is not None:
            _segment_sums(block, w, c, request, table)
            continue
        missed = w.index_select(0, block.target)  # w where G = 1, where p = 1 - w
        rows = table[block.planes]
        rows[:, 0] += block.sum_positives(1 - missed)
        rows[:, 1] += block.by_plane(w if power == 1 else w.square()).sum(1)
        rows[:, 1] += block.sum_positives((1 - missed) ** power - missed**power)
        if request.pointwise is not None and c is not None:
            if request.positives_only:
                rows[:, 2] += block.sum_positives(request.pointwise(missed, c.index_select(0, block.target)))
            else:
                rows[:, 2] += block.by_plane(request.pointwise(w, c)).sum(1)
    return table, parts


def _dense_gradient(
    gradient: Tensor, logits: bool, request: DenseSums, upstream: Tensor, parts: list[_DensePart]
) -> None:
    """Write upstream [planes, 3] · ∂(sums)/∂values into `gradient` [planes · P]."""
    to_sums = upstream.to(gradient.dtype)
    for block, w, c in parts:
        out = gradient[block.pixels]
        if request.segments is None:
            rows, of_positive = to_sums[block.planes], block.target_plane
            _, to_pred, to_pointwise = rows[:, :, None].unbind(1)
        else:
            row, length, of_positive = block.runs(request.segments)
            rows = to_sums.index_select(0, row)
            to_pred, to_pointwise = (
                block.by_plane(_repeat_runs(column, length, len(out))) for column in rows[:, 1:].T.contiguous()
            )
        dp = w - w.square() if logits else torch.ones_like(w)
        dv = None
        if request.pointwise is not None and c is not None:
            dv = request.pointwise.slope(w, c, logits)
        torch.mul(block.by_plane(dp), to_pred, out=block.by_plane(out))
        if request.squared:
            out *= 2 * w
        if dv is not None and not request.positives_only:
            block.by_plane(out).addcmul_(block.by_plane(dv), to_pointwise)

        to_intersection, to_pred, to_pointwise = rows.index_select(0, of_positive).unbind(1)
        missed = w.index_select(0, block.target)
        to_p = to_intersection + to_pred * (2 - 2 * missed if request.squared else 1)
        slope = to_p * dp.index_select(0, block.target)
        if dv is not None:
            slope -= to_pointwise * dv.index_select(0, block.target)
        out.scatter_(0, block.target, slope)


def _instance_features(values: Tensor, logits: bool, request: InstanceSums) -> tuple[list[Tensor], list[Tensor | None]]:
    """p, p² and v of the listed pixels as asked for, and the slope of each (None: 1)."""
    x = values.view(-1).index_select(0, request.pixels)
    w, c = _wrong_and_cost(x, request.target, logits, request.pointwise is not None)
    missed = w.index_select(0, request.target)
    p = w.scatter(0, request.target, 1 - missed)
    dp = w - w.square() if logits else None
    features, slopes = [p], [dp]
    if request.squared:
        features.append(p.square())
        slopes.append(2 * p if dp is None else 2 * p * dp)
    if request.pointwise is not None and c is not None:
        features.append(request.pointwise(w, c))
        dv = request.pointwise.slope(w, c, logits)
        slopes.append(dv.scatter(0, request.target, -dv.index_select(0, request.target)))
    return features, slopes


def _instance_gradient(
    gradient: Tensor, request: InstanceSums, upstream: Sequence[Tensor | None], slopes: list[Tensor | None]
) -> None:
    """Add upstream [rows, columns] of each table · ∂(sums)/∂values to `gradient` [planes · P]."""
    coefficients = None
    for (rows, _), to_rows in zip(request.tables, upstream, strict=True):
        if to_rows is not None:
            gathered = to_rows.to(gradient.dtype).index_select(0, rows)
            coefficients = gathered if coefficients is None else coefficients.add_(gathered)
    if coefficients is not None:
        for column, slope in zip(coefficients.unbind(1), slopes, strict=True):
            gradient.index_add_(0, request.pixels, column if slope is None else column * slope)


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, logits: bool, dense: tuple[DenseSums, ...], instances: InstanceSums | None
    ) -> tuple[Tensor, ...]:
        keep = ctx.needs_input_grad[0]
        values = values.contiguous()
        tables, saved = [], []
        for request in dense:
            table, parts = _dense_sums(values, logits, request, keep)
            tables.append(table)
            saved.append(parts)
        slopes: list[Tensor | None] = []
        if instances is not None:
            features, slopes = _instance_features(values, logits, instances)
            wide = [feature.double() for feature in features]
            for rows, n_rows in instances.tables:
                columns = [torch.bincount(rows, weights=column, minlength=n_rows).double() for column in wide]
                tables.append(torch.stack(columns, 1))
        ctx.logits, ctx.dense, ctx.instances = logits, dense, instances
        ctx.saved, ctx.slopes = (saved, slopes) if keep else ([], [])
        ctx.like = values.new_empty(()).expand(values.shape)
        ctx.set_materialize_grads(False)
        return tuple(tables)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        given = [u for u in upstream if u is not None]
        if not given:
            return None, None, None, None
        return OnlyOnce.apply(_Sums._gradient(ctx, upstream), *given), None, None, None

    @staticmethod
    @torch.no_grad()
    def _gradient(ctx: Any, upstream: tuple[Tensor | None, ...]) -> Tensor:
        gradient = torch.zeros(ctx.like.shape, dtype=ctx.like.dtype, device=ctx.like.device)
        asked = [
            (request, to_sums, parts)
            for request, to_sums, parts in zip(ctx.dense, upstream, ctx.saved, strict=False)
            if to_sums is not None
        ]
        for n, (request, to_sums, parts) in enumerate(asked):
            share = gradient if n == 0 else torch.empty_like(gradient)
            _dense_gradient(share.view(-1), ctx.logits, request, to_sums, parts)
            if n > 0:
                gradient += share
        if ctx.instances is not None:
            _instance_gradient(gradient.view(-1), ctx.instances, upstream[len(ctx.dense) :], ctx.slopes)
        return gradient


class OnlyOnce(torch.autograd.Function):
    """Identity on a finished gradient, so that a second derivative is an error and not a silent zero."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *upstream: Tensor) -> Tensor:
        return gradient

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise RuntimeError(
            "fastinstance losses have no second derivative; detach the gradient, or use fastinstance.reference, "
            "which is slow and differentiable any number of times"
        )
