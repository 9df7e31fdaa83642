"""Sums over planes and instances, with their gradient: the one pass over the pixels behind all terms."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .fused import OnlyOnce
from .pixel import Pointwise, cost_of

__all__ = [
    "DenseSums",
    "InstanceSums",
    "Segments",
    "instance_sums",
]

_BLOCK = 1 << 18  # pixels worked on at once: the temporaries stay in cache


class Segments(NamedTuple):
    """A partition of all planes into segments, as runs of consecutive pixels of one segment."""

    start: Tensor  # [R] int64, ascending flat index of the first pixel of each run, the first of them 0
    row: Tensor  # [R] int64, the segment of each run
    target_row: Tensor  # [G] int64, the segment of each pixel with G = 1
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
        `[rows, columns]` float64 table per table of `instances`. The gradient with respect to `values` is analytic and
        gathered in one pass; a second derivative raises RuntimeError.
    """
    anchor = values[:1, :1].clone()  # for a second derivative to find, without keeping `values`
    tables = PixelSums.apply(values, anchor, logits, dense, instances)
    return list(tables[: len(dense)]), list(tables[len(dense) :])


class _Runs(NamedTuple):
    """The runs of a block, which may begin before it and end after it."""

    listed: slice  # of all runs
    start: Tensor  # first pixel within the block
    length: Tensor  # pixels within the block


class _Block(NamedTuple):
    """Consecutive pixels: whole planes, or a part of one."""

    planes: slice
    pixels: slice  # of the flattened planes
    target: Tensor  # positions of the pixels with G = 1 within the block
    listed: slice  # and which of all these they are
    runs: _Runs | None  # of the segments
    row: Tensor  # of the table, of each plane or run

    def by_plane(self, pixels: Tensor) -> Tensor:
        return pixels.view(self.planes.stop - self.planes.start, -1)

    def sums(self, values: Tensor) -> Tensor:
        """Of a value per pixel, over each plane or run."""
        return self.by_plane(values).sum(1) if self.runs is None else _sum_runs(values, self.runs)

    def spread(self, column: Tensor) -> Tensor:
        """A value per plane, or per run of all planes -> one for each plane of the block, or for each of its pixels."""
        if self.runs is None:
            return column[self.planes, None]
        return self.by_plane(_repeat_runs(column[self.runs.listed], self.runs, self.pixels.stop - self.pixels.start))


def _blocks(planes: int, pixels: int, target: Tensor, segments: Segments | None) -> Iterator[_Block]:
    """Cut all pixels into blocks of about _BLOCK, so that the temporaries stay in cache."""
    rows, columns = max(1, _BLOCK // pixels), min(pixels, _BLOCK)
    edges = [r * pixels + c for r in range(0, planes, rows) for c in range(0, pixels, columns)] + [planes * pixels]
    places = target.new_tensor(edges)
    cuts = torch.searchsorted(target, places).tolist()
    start_of = target if segments is None else segments.start
    sooner, later = (torch.searchsorted(start_of, places, right=after).tolist() for after in (False, True))
    for k, (start, stop) in enumerate(itertools.pairwise(edges)):
        listed, inside, runs = slice(cuts[k], cuts[k + 1]), slice(start // pixels, -(-stop // pixels)), None
        if segments is None:
            row = torch.arange(inside.start, inside.stop, device=target.device)
        else:
            which = slice(later[k] - 1, sooner[k + 1])
            place = (segments.start[which] - start).clamp_(min=0)
            runs = _Runs(which, place, torch.cat([place, place.new_tensor([stop - start])]).diff())
            row = segments.row[which]
        yield _Block(inside, slice(start, stop), target[listed] - start, listed, runs, row)


def _wrong_and_cost(x: Tensor, positive: bool, logits: bool, with_cost: bool) -> tuple[Tensor, Tensor | None]:
    """w = |p - G| and c = -log(1 - w) of pixels x of one G.

    From logits both come from the logit of the wrong answer, so that nothing cancels at either end.
    """
    if not logits:
        return (1 - x if positive else x.clone()), cost_of(x if positive else 1 - x) if with_cost else None
    wrong = -x if positive else x
    exact_from = 20 if x.dtype == torch.float32 else 40  # softplus(x) = x to the last bit
    return wrong.sigmoid(), F.softplus(wrong, threshold=exact_from) if with_cost else None


def _sum_runs(values: Tensor, runs: _Runs) -> Tensor:
    """Sums over runs, none of them empty, added pairwise in the type of the values."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.add.reduceat(values.numpy(), runs.start.numpy()))
    return torch.segment_reduce(values, "sum", lengths=runs.length)


def _repeat_runs(values: Tensor, runs: _Runs, pixels: int) -> Tensor:
    """A value per run -> a value per pixel."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.repeat(values.numpy(), runs.length.numpy()))
    return values.repeat_interleave(runs.length, output_size=pixels)


class _Dense(NamedTuple):
    """What the gradient of a dense request needs: w and, where the slope depends on it, c."""

    row: Tensor  # [G] of the table, of each pixel with G = 1
    missed: tuple[Tensor, Tensor | None]  # of these pixels
    blocks: list[tuple[_Block, Tensor, Tensor | None]]  # of all


def _dense_sums(values: Tensor, logits: bool, request: DenseSums, keep: bool) -> tuple[Tensor, _Dense]:
    """The sums of one dense request, and what its gradient needs if that is to be kept."""
    planes, pixels = values.shape
    segments, pointwise, flat = request.segments, request.pointwise, values.view(-1)
    row = request.target // pixels if segments is None else segments.target_row
    table = values.new_zeros((planes if segments is None else segments.rows, 3), dtype=torch.float64)
    by_cost = pointwise is not None and pointwise.slope_needs_cost(logits)
    missed, cost = _wrong_and_cost(flat.index_select(0, request.target), True, logits, pointwise is not None)

    def add_positives(column: int, positives: Tensor) -> None:
        table[:, column] += torch.bincount(row, positives.double(), len(table))

    add_positives(0, 1 - missed)
    add_positives(1, 1 - 2 * missed)  # p^k - w^k with p = 1 - w
    if request.positives_only and pointwise is not None and cost is not None:
        add_positives(2, pointwise(missed, cost))
    blocks, rows, sums = [], [], ([], [])
    for block in _blocks(planes, pixels, request.target, segments):
        w, c = _wrong_and_cost(flat[block.pixels], False, logits, pointwise is not None)
        w.scatter_(0, block.target, missed[block.listed])
        rows.append(block.row)
        sums[0].append(block.sums(w.square() if request.squared else w))
        if c is not None and cost is not None:
            c.scatter_(0, block.target, cost[block.listed])
            if pointwise is not None and not request.positives_only:
                sums[1].append(block.sums(pointwise(w, c)))
        if keep:
            blocks.append((block, w, c if by_cost else None))
    for column, found in enumerate(sums, 1):
        if found:
            table[:, column] += torch.bincount(torch.cat(rows), torch.cat(found).double(), len(table))
    return table, _Dense(row, (missed, cost if by_cost else None), blocks)


def _slopes(w: Tensor, c: Tensor | None, logits: bool, pointwise: Pointwise | None) -> tuple[Tensor, Tensor | None]:
    """dw/ds and dv/ds for s the logit of the wrong answer (dw/dw and dv/dw for probabilities)."""
    dw = torch.addcmul(w, w, w, value=-1) if logits else torch.ones_like(w)
    return dw, None if pointwise is None else pointwise.slope(w, c, logits)


def _dense_gradient(gradient: Tensor, logits: bool, request: DenseSums, upstream: Tensor, kept: _Dense) -> None:
    """Write upstream [rows, 3] · ∂(sums)/∂values into `gradient` [planes · P]."""
    to_sums = upstream.to(gradient.dtype).T.contiguous()
    _, to_pred, to_pointwise = to_sums if request.segments is None else to_sums.index_select(1, request.segments.row)
    for block, w, c in kept.blocks:
        out = block.by_plane(gradient[block.pixels])
        dp, dv = _slopes(w, c, logits, None if request.positives_only else request.pointwise)
        torch.mul(block.by_plane(dp), block.spread(to_pred), out=out)
        if request.squared:
            out *= block.by_plane(2 * w)
        if dv is not None:
            out.addcmul_(block.by_plane(dv), block.spread(to_pointwise))

    missed, cost = kept.missed
    to_intersection, to_pred, to_pointwise = to_sums.index_select(1, kept.row)
    dp, dv = _slopes(missed, cost, logits, request.pointwise)
    slope = (to_intersection + to_pred * (2 - 2 * missed if request.squared else 1)) * dp
    if dv is not None:
        slope -= to_pointwise * dv
    gradient.scatter_(0, request.target, slope)


def _instance_features(values: Tensor, logits: bool, request: InstanceSums) -> tuple[list[Tensor], list[Tensor | None]]:
    """p, p² and v of the listed pixels as asked for, and the slope of each (None: 1)."""
    x = values.view(-1).index_select(0, request.pixels)
    w, c = _wrong_and_cost(x, False, logits, request.pointwise is not None)
    missed, cost = _wrong_and_cost(x.index_select(0, request.target), True, logits, request.pointwise is not None)
    p = w.scatter(0, request.target, 1 - missed)
    w.scatter_(0, request.target, missed)
    if c is not None and cost is not None:
        c.scatter_(0, request.target, cost)
    dp = torch.addcmul(w, w, w, value=-1) if logits else None
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


class PixelSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        anchor: Tensor,
        logits: bool,
        dense: tuple[DenseSums, ...],
        instances: InstanceSums | None,
    ) -> tuple[Tensor, ...]:
        keep = ctx.needs_input_grad[0]
        values = values.contiguous()
        tables, saved = [], []
        for request in dense:
            table, kept = _dense_sums(values, logits, request, keep)
            tables.append(table)
            saved.append(kept)
        slopes: list[Tensor | None] = []
        if instances is not None:
            features, slopes = _instance_features(values, logits, instances)
            wide = [feature.double() for feature in features]
            for rows, n_rows in instances.tables:
                columns = [torch.bincount(rows, weights=column, minlength=n_rows).double() for column in wide]
                tables.append(torch.stack(columns, 1))
        ctx.save_for_backward(anchor)
        ctx.logits, ctx.dense, ctx.instances = logits, dense, instances
        ctx.saved, ctx.slopes = (saved, slopes) if keep else ([], [])
        ctx.like = values.new_empty(()).expand(values.shape)
        ctx.set_materialize_grads(False)
        return tuple(tables)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        given = [u for u in upstream if u is not None]
        if not given:
            return None, None, None, None, None
        gradient = OnlyOnce.apply(PixelSums._gradient(ctx, upstream), *ctx.saved_tensors, *given)
        return gradient, None, None, None, None

    @staticmethod
    @torch.no_grad()
    def _gradient(ctx: Any, upstream: tuple[Tensor | None, ...]) -> Tensor:
        asked = [
            (request, to_sums, kept)
            for request, to_sums, kept in zip(ctx.dense, upstream, ctx.saved, strict=False)
            if to_sums is not None
        ]
        gradient = (torch.empty if asked else torch.zeros)(ctx.like.shape, dtype=ctx.like.dtype, device=ctx.like.device)
        for n, (request, to_sums, kept) in enumerate(asked):
            share = gradient if n == 0 else torch.empty_like(gradient)
            _dense_gradient(share.view(-1), ctx.logits, request, to_sums, kept)
            if n > 0:
                gradient += share
        if ctx.instances is not None:
            _instance_gradient(gradient.view(-1), ctx.instances, upstream[len(ctx.dense) :], ctx.slopes)
        return gradient
