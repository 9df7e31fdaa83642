"""The two operators on pixels: connected components, and sums over planes and instances with their gradient.

Everything that touches all pixels is here; what follows works on tables with one row per plane or instance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import cc3d
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .pixel import EPS, Pointwise, cost_of

__all__ = ["DenseSums", "InstanceSums", "instance_sums", "label_planes"]

_BLOCK = 1 << 17  # pixels worked on at once: the temporaries stay in cache


@torch.library.custom_op("fastinstance::label_planes", mutates_args=(), device_types="cpu")
def label_planes(mask: Tensor, connectivity: int, min_size: int) -> tuple[Tensor, Tensor]:
    """Connected components of each plane.

    Args:
        mask: bool `[planes, *S]`, 2D or 3D.
        connectivity: 4 or 8 in 2D; 6, 18 or 26 in 3D.
        min_size: components with fewer pixels become background.

    Returns:
        labels: int32 `[planes, *S]`, 1..K in each plane in raster order of each component's first pixel.
        counts: int32 `[planes]`, K of each plane.
    """
    planes, *size = mask.shape
    if mask.numel() == 0:
        return torch.zeros(mask.shape, dtype=torch.int32), torch.zeros(planes, dtype=torch.int32)
    # One empty row (slice) after each plane keeps the planes apart in a single call of the labeller.
    stacked = np.zeros((planes, size[0] + 1, *size[1:]), dtype=bool)
    stacked[:, :-1] = mask.numpy()
    volume = stacked.reshape(-1, *size[1:])
    found, total = cc3d.connected_components(volume, connectivity=connectivity, binary_image=True, return_N=True)
    found = found.astype(np.int32, copy=False).reshape(stacked.shape)[:, :-1]
    labels = torch.from_numpy(np.ascontiguousarray(found))
    return _rank(labels, total, min_size)


def _rank(labels: Tensor, total: int, min_size: int) -> tuple[Tensor, Tensor]:
    """Distinct positive labels of all planes (in place) -> ids 1..K per plane in raster order, and K per plane."""
    planes, pixels = labels.shape[0], math.prod(labels.shape[1:])
    flat = labels.view(-1)
    where = flat.nonzero().squeeze(1)
    label = flat[where].long() - 1
    first = torch.full((total,), labels.numel()).scatter_reduce_(0, label, where, "amin")
    kept = torch.arange(total)
    if min_size > 1:
        kept = kept[torch.bincount(label, minlength=total) >= min_size]
    order = kept[first[kept].argsort()]  # the labeller works by blocks: not always in raster order
    plane = first[order] // pixels
    counts = torch.bincount(plane, minlength=planes)
    rank = torch.zeros(total, dtype=torch.int32)
    rank[order] = (torch.arange(len(order)) - (counts.cumsum(0) - counts)[plane] + 1).int()
    flat[where] = rank[label]
    return labels, counts.int()


@label_planes.register_fake
def _(mask: Tensor, connectivity: int, min_size: int) -> tuple[Tensor, Tensor]:
    del connectivity, min_size
    return mask.new_empty(mask.shape, dtype=torch.int32), mask.new_empty(mask.shape[:1], dtype=torch.int32)


class DenseSums(NamedTuple):
    """A request for the sums Σ P·G, Σ P^k, Σ v over each whole plane."""

    target: Tensor  # [planes, P] bool, G
    squared: bool
    pointwise: Pointwise | None
    positives_only: bool = False  # v counts where G = 1 only


class InstanceSums(NamedTuple):
    """A request for sums of p, p² and v over the instances, for a list of pixels.

    Each entry of `tables` is (rows, number of rows): the row of its table that each listed pixel adds to.
    """

    pixels: Tensor  # [F] int64, indices into the flattened planes, each at most once
    target: Tensor  # [F] bool, G of each listed pixel
    squared: bool
    pointwise: Pointwise | None
    tables: tuple[tuple[Tensor, int], ...]

    @property
    def columns(self) -> int:
        return 1 + self.squared + (self.pointwise is not None)


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
        One `[planes, 3]` float64 table per dense request (columns Σ P·G, Σ P^k, Σ v) and one `[rows, columns]`
        float64 table per table of `instances`. The gradient with respect to `values` is analytic and gathered in one
        pass; a second derivative raises RuntimeError.
    """
    tables = _Sums.apply(values, logits, dense, instances)
    return list(tables[: len(dense)]), list(tables[len(dense) :])


def _blocks(planes: int, pixels: int) -> Iterator[tuple[slice, slice]]:
    """Cut [planes, pixels] into blocks of about _BLOCK elements."""
    rows = max(1, _BLOCK // max(pixels, 1))
    columns = max(1, min(pixels, _BLOCK))
    for row in range(0, planes, rows):
        for column in range(0, pixels, columns):
            yield slice(row, row + rows), slice(column, column + columns)


def _wrong_and_cost(x: Tensor, y: Tensor, logits: bool, with_cost: bool) -> tuple[Tensor, Tensor | None]:
    """w = |p - y| and c = -log(1 - w); from logits both come from the logit of the wrong answer."""
    if logits:
        wrong_logit = torch.where(y, -x, x)
        return wrong_logit.sigmoid(), -F.logsigmoid(-wrong_logit) if with_cost else None
    wrong = torch.where(y, 1 - x, x)
    return wrong, cost_of(wrong) if with_cost else None


def _slopes(
    wrong: Tensor, cost: Tensor | None, y: Tensor, logits: bool, pointwise: Pointwise | None
) -> tuple[Tensor | None, Tensor | None]:
    """dp/dx (None: 1) and dv/dx (None: no v) for x the logit or the probability."""
    dp = wrong - wrong * wrong if logits else None
    if pointwise is None or cost is None:
        return dp, None
    dv_dw, dv_dc = pointwise.slopes(wrong, cost)
    if dp is not None:
        dv = dv_dw * dp + dv_dc * wrong
    else:
        right = 1 - wrong
        dv = dv_dw + dv_dc * torch.where(right >= EPS, right.clamp(min=EPS).reciprocal(), 0.0)
    return dp, torch.where(y, -dv, dv)


def _dense_sums(values: Tensor, logits: bool, request: DenseSums, wrong: Tensor | None, cost: Tensor | None) -> Tensor:
    """The sums of one dense request; w and c are kept in `wrong` and `cost` where these are given."""
    table = values.new_zeros((values.shape[0], 3), dtype=torch.float64)
    for block in _blocks(*values.shape):
        y = request.target[block]
        w, c = _wrong_and_cost(values[block], y, logits, request.pointwise is not None)
        p = torch.where(y, 1 - w, w)
        rows = table[block[0]]
        rows[:, 0] += (p * y).sum(1)
        rows[:, 1] += (p.square() if request.squared else p).sum(1)
        if request.pointwise is not None and c is not None:
            v = request.pointwise(w, c)
            rows[:, 2] += (v * y if request.positives_only else v).sum(1)
        if wrong is not None:
            wrong[block] = w
        if cost is not None:
            cost[block] = c
    return table


def _dense_gradient(
    gradient: Tensor, logits: bool, request: DenseSums, upstream: Tensor, wrong: Tensor, cost: Tensor | None
) -> None:
    """Add upstream · ∂(sums)/∂values to `gradient` [planes, P]."""
    to_intersection, to_pred, to_pointwise = upstream.to(gradient.dtype)[:, :, None].unbind(1)
    for block in _blocks(*gradient.shape):
        rows = block[0]
        y, w = request.target[block], wrong[block]
        dp, dv = _slopes(w, None if cost is None else cost[block], y, logits, request.pointwise)
        inside, outside = to_intersection[rows] + to_pred[rows], to_pred[rows]
        if request.squared:
            p = torch.where(y, 1 - w, w)
            slope = 2 * p * outside + y * to_intersection[rows]
        else:
            slope = torch.where(y, inside, outside)
        if dp is not None:
            slope = slope * dp
        if dv is not None:
            slope = torch.addcmul(slope, dv * y if request.positives_only else dv, to_pointwise[rows])
        gradient[block] += slope


def _instance_features(values: Tensor, logits: bool, request: InstanceSums) -> tuple[list[Tensor], list[Tensor | None]]:
    """p, p² and v of the listed pixels as asked for, and the slope of each (None: 1)."""
    x, y = values.reshape(-1)[request.pixels], request.target
    w, c = _wrong_and_cost(x, y, logits, request.pointwise is not None)
    p = torch.where(y, 1 - w, w)
    dp, dv = _slopes(w, c, y, logits, request.pointwise)
    features, slopes = [p], [dp]
    if request.squared:
        features.append(p.square())
        slopes.append(2 * p if dp is None else 2 * p * dp)
    if request.pointwise is not None and c is not None:
        features.append(request.pointwise(w, c))
        slopes.append(dv)
    return features, slopes


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, logits: bool, dense: tuple[DenseSums, ...], instances: InstanceSums | None
    ) -> tuple[Tensor, ...]:
        keep = ctx.needs_input_grad[0]
        tables, saved = [], []
        for request in dense:
            wrong = torch.empty_like(values) if keep else None
            cost = torch.empty_like(values) if keep and request.pointwise else None
            tables.append(_dense_sums(values, logits, request, wrong, cost))
            saved.append((wrong, cost))
        slopes: list[Tensor | None] = []
        if instances is not None:
            features, slopes = _instance_features(values, logits, instances)
            wide = [feature.double() for feature in features]
            for rows, n_rows in instances.tables:
                columns = [torch.bincount(rows, weights=column, minlength=n_rows) for column in wide]
                tables.append(torch.stack(columns, 1))
        ctx.logits, ctx.dense, ctx.instances = logits, dense, instances
        ctx.saved, ctx.slopes = (saved, slopes) if keep else ([], [])
        ctx.shape, ctx.dtype, ctx.device = values.shape, values.dtype, values.device
        ctx.set_materialize_grads(False)
        return tuple(tables)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        given = [u for u in upstream if u is not None]
        if not given:
            return None, None, None, None
        return _OnlyOnce.apply(_Sums._gradient(ctx, upstream), *given), None, None, None

    @staticmethod
    @torch.no_grad()
    def _gradient(ctx: Any, upstream: tuple[Tensor | None, ...]) -> Tensor:
        gradient = torch.zeros(ctx.shape, dtype=ctx.dtype, device=ctx.device)
        for request, (wrong, cost), to_sums in zip(ctx.dense, ctx.saved, upstream, strict=False):
            if to_sums is not None:
                _dense_gradient(gradient, ctx.logits, request, to_sums, wrong, cost)
        request = ctx.instances
        if request is not None:
            coefficients = None
            for (rows, _), to_rows in zip(request.tables, upstream[len(ctx.dense) :], strict=True):
                if to_rows is not None:
                    gathered = to_rows.to(ctx.dtype)[rows]
                    coefficients = gathered if coefficients is None else coefficients + gathered
            if coefficients is not None:
                terms = [
                    column if slope is None else column * slope
                    for column, slope in zip(coefficients.unbind(1), ctx.slopes, strict=True)
                ]
                gradient.view(-1).index_add_(0, request.pixels, sum(terms[1:], terms[0]))
        return gradient


class _OnlyOnce(torch.autograd.Function):
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
