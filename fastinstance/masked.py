"""Any callable as the loss of an instance: it is called on the masked images of Eqs. 2 and 3, many at a time.

`torch.func.vmap` batches the calls; chunks of rows bound the memory. The backward pass evaluates each chunk again, so
that nothing but the planes themselves is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .criteria import Criterion
from .fused import OnlyOnce
from .partition import Partition, Side

__all__ = [
    "CriterionError",
    "blob_entries",
    "checked",
    "image_value",
    "instance_entries",
    "label_map",
    "plane_values",
    "row_values",
]

_CHUNK = 1 << 21  # pixels of the masked images that are evaluated together


class Pairs(NamedTuple):
    """Masked pairs (P, G) of some rows: P = factor · p, seen from the row's plane."""

    plane: Tensor  # [K] int64
    factor: Tensor | None  # [K, P] of the plane's values, None for 1
    target: Tensor  # [K, P] bool, or with other channels than P


class CriterionError(ValueError):
    """A criterion returned something other than a scalar."""


def checked(criterion: Criterion, value: object, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"{type(value).__name__} {value!r}"
        raise CriterionError(f"expected {criterion.argument}={criterion.name} to return a floating tensor, got {got}")
    if value.ndim:
        raise CriterionError(
            f"expected {criterion.argument}={criterion.name} to return a scalar for a pair of images {shape}, "
            f"got shape {tuple(value.shape)}; average over the pixels, for example with reduction='mean'"
        )
    return value


def _call(criterion: Criterion, P: Tensor, G: Tensor) -> Tensor:
    """The criterion on each of a batch of pairs [K, 1, C, *S]; [K]."""
    shape = tuple(P.shape[1:])

    def one(P: Tensor, G: Tensor) -> Tensor:
        return checked(criterion, criterion.function(P, G), shape)

    try:
        return torch.func.vmap(one)(P, G)
    except CriterionError:
        raise
    except Exception as error:
        raise RuntimeError(
            f"expected {criterion.argument}={criterion.name} to work on P and G {shape} under torch.func.vmap, got "
            f"{type(error).__name__}: {error}. Write it without .item(), branches on values, boolean indexing, random "
            "numbers and in-place changes, or take a separable loss; fastinstance.reference calls it instance by "
            "instance, slowly"
        ) from error


class MaskedLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, p: Tensor, criterion: Criterion, number: int, image: tuple[int, ...], pairs: Callable[..., Pairs]
    ) -> Tensor:
        ctx.save_for_backward(p)
        ctx.request = criterion, number, image, pairs
        values = [p.new_empty(0, dtype=torch.float64)]
        for rows in _chunks(number, p):
            plane, factor, target = pairs(rows)
            P = p[plane] if factor is None else p[plane] * factor
            values.append(
                _call(criterion, P.view(-1, 1, *image), target.view(len(plane), 1, -1, *image[1:]).to(p.dtype)).double()
            )
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (p,) = ctx.saved_tensors
        gradient = MaskedLosses._gradient(p.detach(), upstream[0].detach(), *ctx.request)
        return OnlyOnce.apply(gradient, p, *upstream), None, None, None, None

    @staticmethod
    def _gradient(
        p: Tensor,
        upstream: Tensor,
        criterion: Criterion,
        number: int,
        image: tuple[int, ...],
        pairs: Callable[..., Pairs],
    ) -> Tensor:
        gradient = torch.zeros_like(p)
        for rows in _chunks(number, p):
            plane, factor, target = pairs(rows)
            with torch.enable_grad():
                P = (p[plane] if factor is None else p[plane] * factor).requires_grad_()
                values = _call(criterion, P.view(-1, 1, *image), target.view(len(plane), 1, -1, *image[1:]).to(p.dtype))
                # A criterion that does not depend on P has a gradient of zero.
                (slope,) = torch.autograd.grad(values + 0 * P[:, 0], P, upstream[rows].to(values.dtype))
            gradient.index_add_(0, plane, slope if factor is None else slope * factor)
        return gradient


def _chunks(number: int, p: Tensor) -> Iterator[Tensor]:
    """Rows 0 to `number` in chunks of bounded size."""
    return iter(torch.arange(number, device=p.device).split(max(1, _CHUNK // p.shape[1]))) if number else iter(())


def row_values(
    p: Tensor, criterion: Criterion, number: int, image: Sequence[int], pairs: Callable[[Tensor], Pairs]
) -> Tensor:
    """The criterion on `number` masked pairs; float64 `[number]`, with its exact gradient.

    Args:
        p: `[planes, P]` float32 or float64, carries the gradient.
        criterion: called with P and G of shape `[1, *image]`.
        number: of rows.
        image: C and the axes of an image, P pixels in all.
        pairs: the pairs of some rows, int64 `[K]`, in ascending order; a constant of the derivative.
    """
    return MaskedLosses.apply(p.contiguous(), criterion, number, tuple(image), pairs)


def image_value(P: Tensor, G: Tensor, criterion: Criterion) -> Tensor:
    """The criterion on whole images `[B, C, *S]`, as one call; a scalar."""
    # It gets a copy: a loss that clamps P in place would change the other terms, or the caller's probabilities.
    value = checked(criterion, criterion.function(P.clone(), G.to(P.dtype)), tuple(P.shape))
    return value + 0 * P.flatten()[0]  # connected, whatever the criterion does


def plane_values(p: Tensor, target: Tensor, criterion: Criterion, size: Sequence[int]) -> Tensor:
    """The criterion on every plane `[planes, P]` as an image of its own; float64 `[planes]`."""
    return row_values(p, criterion, len(p), (1, *size), lambda rows: Pairs(rows, None, target[rows]))


def label_map(part: Partition, side: Side) -> Tensor:
    """Row + 1 of the instance that each pixel belongs to, 0 = background; int32 `[planes, P]`."""
    labels = side.label.new_zeros(len(side.per_plane) * math.prod(part.size))
    return labels.scatter_(0, part.pixels, side.label).view(len(side.per_plane), -1)


class _Links:
    """For rows of `mine`, the pixels of all instances of `other` that they are linked to."""

    def __init__(self, labels: Tensor, mine: Side, other: Side, links: tuple[Tensor, Tensor]) -> None:
        first = other.per_plane.cumsum(0) - other.per_plane
        self.mine = mine
        self.local = (labels - first[:, None]).clamp(min=0) * (labels > 0)  # 1, 2, … in each plane
        self.width = int(other.per_plane.max()) + 1
        real = links[1] < other.real
        row, linked = links[0][real], links[1][real]
        self.row, order = row.sort(stable=True)
        self.linked = (linked - first[other.plane[linked]] + 1)[order]

    def pixels(self, rows: Tensor) -> Tensor:
        """bool [K, P]"""
        begin, end = torch.searchsorted(self.row, torch.stack([rows[0], rows[-1] + 1])).tolist()
        table = torch.zeros((len(rows), self.width), dtype=torch.bool, device=rows.device)
        table[self.row[begin:end] - rows[0], self.linked[begin:end]] = True
        return table.gather(1, self.local[self.mine.plane[rows]])


def instance_entries(
    part: Partition, p: Tensor, criterion: Criterion, outside: Tensor | None = None, *, mask_target: bool = True
) -> tuple[Tensor, Tensor]:
    """Eqs. 2 and 3 for any criterion: as `terms.instance_entries`, on masked images.

    Args:
        part: the instances of both sides.
        p: `[planes, P]` probabilities.
        criterion: of one instance.
        outside: `[planes, P]` factor of p on the ground-truth side outside of the instance; None keeps false
            positives and masks other instances out.
        mask_target: False keeps p inside of the ground-truth instance where nothing is predicted.

    Returns:
        float64 `[N + artificial]` and `[M + artificial]`.
    """
    truth, pred = part.target, part.pred
    true_map, pred_map = label_map(part, truth), label_map(part, pred)
    if outside is None:
        outside = (true_map == 0).to(p.dtype)
    to_pred = _Links(pred_map, truth, pred, part.linked)
    to_truth = _Links(true_map, pred, truth, (part.linked[1], part.linked[0]))

    def gt_side(rows: Tensor) -> Pairs:
        plane = truth.plane[rows]
        own = true_map[plane] == rows[:, None] + 1
        factor = to_pred.pixels(rows) * outside[plane].masked_fill(own, 1)
        return Pairs(plane, factor if mask_target else factor.masked_fill(own & (pred_map[plane] == 0), 1), own)

    def pred_side(rows: Tensor) -> Pairs:
        plane = pred.plane[rows]
        return Pairs(plane, (pred_map[plane] == rows[:, None] + 1).to(p.dtype), to_truth.pixels(rows))

    image = (1, *part.size)
    return row_values(p, criterion, truth.rows, image, gt_side), row_values(p, criterion, pred.rows, image, pred_side)


def blob_entries(labels: Tensor, target: Side, p: Tensor, criterion: Criterion, image: Sequence[int]) -> Tensor:
    """Blob loss (Kofler et al. 2023) for any criterion: as `terms.blob_entries`, on masked images.

    Args:
        labels: `[planes, P]` row + 1 of the instance of each pixel, 0 = background; one channel serves several of p.
        target: the ground-truth side.
        p: `[planes, P]`
        criterion: of one instance.
        image: C and the axes of an image.
    """

    def pairs(rows: Tensor) -> Pairs:
        plane = target.plane[rows]
        own = labels[plane] == rows[:, None] + 1
        kept = (own | (labels[plane] == 0)).view(len(rows), -1, p.shape[1] // image[0])
        return Pairs(plane, kept.expand(-1, image[0], -1).flatten(1).to(p.dtype), own)

    return row_values(p, criterion, target.real, image, pairs)
