"""The terms of the loss family on tables, one function per equation of Rachmadi, Byra, Skibbe (2024).

The tables have one row per instance of either side; `Features` are the sums over pixels that carry the gradient. All of
it is ordinary differentiable torch on small float64 tensors: what touches pixels is in `ops`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .boxes import nearest_boxes
from .partition import Partition, Side
from .pixel import Dice, InverseWeightedDice, SeparableLoss, Sums, cost_of, inverse_weights

__all__ = [
    "BlobTerms",
    "CenterBoxes",
    "Features",
    "InstanceTerms",
    "average",
    "blob_entries",
    "blob_sums",
    "center_boxes",
    "center_maps",
    "center_sums",
    "false_rates",
    "instance_entries",
    "instance_weights",
    "inverse_weighted_dice",
    "matched_sums",
    "plane_mean",
    "plane_sum",
    "proximity",
    "proximity_from",
    "reduce_planes",
    "soft_alone",
]


_BLOCK = 1 << 16  # pixels of boxes worked on at once: the temporaries stay in cache


class InstanceTerms(NamedTuple):
    """The terms of Eq. 11, each a scalar, or `[B, C]` for `reduction="none"`."""

    seg: Tensor
    instance_gt: Tensor
    instance_pred: Tensor
    center: Tensor
    false_gt: Tensor
    false_pred: Tensor
    proximity: Tensor


class BlobTerms(NamedTuple):
    """The two parts of blob loss, each a scalar, or `[B, C]` for `reduction="none"`."""

    seg: Tensor
    blob: Tensor


class Features(NamedTuple):
    """Sums of Σp, then Σp² for a `squared` loss, then Σv for a pointwise one; float64, last axis the columns."""

    target: Tensor  # [N, 2, columns]: pixels of n where nothing is predicted, and where something is
    pred: Tensor  # [M, 2, columns]: pixels of m outside and inside the ground truth
    target_area: Tensor  # [N, 2] float64 pixels of the same parts
    pred_area: Tensor  # [M, 2]

    @classmethod
    def of(cls, part: Partition, table: Tensor) -> Features:
        """From the sums over the cells, `[cells, columns]`."""
        return cls(*part.by_side(table), *part.areas)


def _pad(table: Tensor, rows: int) -> Tensor:
    """Zero rows for the artificial instances, which have no pixels."""
    return torch.cat([table, table.new_zeros((rows - len(table), *table.shape[1:]))])


def _gather_sum(source: Tensor, source_row: Tensor, row: Tensor, rows: int) -> Tensor:
    """For each row, the sum of the linked rows of `source`."""
    return source.new_zeros((rows, *source.shape[1:])).index_add(0, row, source[source_row])


def _sums(loss: SeparableLoss, inside: Tensor, outside: Tensor, target: Tensor, missed: Tensor) -> Sums:
    """Sums of a masked pair from the columns inside and outside of the target and the missed pixels' number."""
    total = inside + outside
    pointwise = total.new_zeros(len(total))
    if loss.pointwise is not None:
        pointwise = total[:, -1] + missed * loss.pointwise.missed
    return Sums(inside[:, 0], total[:, 1 if loss.squared else 0], target, pointwise)


def matched_sums(
    part: Partition, features: Features, loss: SeparableLoss, mask_target: bool = True
) -> tuple[Sums, Sums]:
    """Sums of the masked pairs of Eqs. 2 and 3, for every row (with the artificial ones) of either side.

    Without `mask_target` the prediction of Eq. 2 is not masked inside of the ground-truth instance.
    """
    truth, pred = part.target, part.pred
    n, m = part.linked
    outside = _pad(features.pred[:, 0], pred.rows)
    hit = _pad(features.target[:, 1] if mask_target else features.target.sum(1), truth.rows)
    missed = _pad(features.target_area[:, 0], truth.rows) * mask_target
    gt_side = _sums(loss, hit, _gather_sum(outside, m, n, truth.rows), truth.padded_count, missed)
    inside = _pad(features.pred[:, 1], pred.rows)
    union = _gather_sum(truth.padded_count, n, m, pred.rows)
    missed = union - _pad(features.pred_area[:, 1], pred.rows)
    return gt_side, _sums(loss, inside, outside, union, missed)


def instance_entries(
    part: Partition, features: Features, omega: Tensor, loss: SeparableLoss, *, mask_target: bool = True
) -> tuple[Tensor, Tensor]:
    """Eqs. 2 and 3: the loss of every ground-truth and every predicted instance.

    The ground-truth side sees the components that touch instance n, without what lies on other instances; the
    predicted side sees component m and all ground-truth instances that it touches. An empty side has one artificial
    entry: ℓ(p on the predicted mask, 0), or ℓ(0, y). Without `mask_target` the ground-truth side keeps the
    probabilities below the threshold inside of instance n.

    Returns:
        float64 `[N + artificial]` and `[M + artificial]`.
    """
    gt_side, pred_side = matched_sums(part, features, loss, mask_target)
    return loss.reduce(gt_side, omega[part.target.plane]), loss.reduce(pred_side, omega[part.pred.plane])


def instance_weights(side: Side, weight_by: str | Callable[[Tensor], Tensor]) -> Tensor:
    """What each row of a side counts in a mean over instances, float64; an artificial instance has the size 1.

    Raises ValueError for a function whose weights are of another shape, negative or not finite.
    """
    size = side.padded_count.clamp(min=1)
    if not callable(weight_by):
        return size if weight_by == "size" else torch.ones_like(size)
    weights = torch.as_tensor(weight_by(size), device=size.device).double()
    if weights.shape != size.shape:
        raise ValueError(
            f"expected weight_by to return one weight for each of {len(size)} sizes, got shape {tuple(weights.shape)}"
        )
    if not bool((weights.isfinite() & (weights >= 0)).all()):
        raise ValueError("expected weight_by to return finite weights >= 0, got others; sizes are 1 pixel or more")
    return weights


def _positive(total: Tensor) -> Tensor:
    """A denominator; 1 where nothing counts, so that the mean is 0."""
    return total.where(total > 0, 1)


def plane_sum(values: Tensor, side: Side) -> Tensor:
    """Sum of the (first) rows of each plane; `[planes]`."""
    return values.new_zeros(len(side.per_plane)).index_add(0, side.plane[: len(values)], values)


def plane_mean(values: Tensor, side: Side, entries: Tensor) -> Tensor:
    """Sum of the rows of each plane, divided by `entries` of that plane; `[planes]`."""
    return plane_sum(values, side) / _positive(entries)


def average(values: Tensor, side: Side, entries: Tensor, *, average: str, reduction: str) -> Tensor:
    """Average one value per instance over the batch, or per plane.

    Args:
        values: one value per row of `side`, times its weight.
        side: that says to which plane a row belongs.
        entries: `[planes]` denominators, the sum of the weights of each plane.
        average: "instance", over all instances of the batch, or "image", first per plane and then over planes.
        reduction: "mean"; "none" for per-plane means `[planes]`; "sum" for their sum.
    """
    if reduction == "mean" and average == "instance":
        return values.sum() / _positive(entries.sum())
    return reduce_planes(plane_mean(values, side, entries), reduction)


def reduce_planes(values: Tensor, reduction: str) -> Tensor:
    """Per-plane values -> their mean or sum, or the values themselves."""
    return {"mean": values.mean, "sum": values.sum, "none": lambda: values}[reduction]()


def soft_alone(part: Partition, features: Features, peaks: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """weight · (1 - max p) of every missed and weight · (mean p) of every false instance, 0 of others; `[N]`, `[M]`.

    Args:
        part: both sides.
        features: their sums.
        peaks: `[N]` largest probability of each missed instance.
        weight: of both.
    """
    mean = features.pred[:, 0, 0] / part.pred.count
    missed, false = (_alone(side, partners) for side, partners in _sides(part))
    return weight * missed * (1 - peaks), weight * false * mean


def _sides(part: Partition) -> tuple[tuple[Side, Tensor], tuple[Side, Tensor]]:
    return (part.target, part.pairs[0]), (part.pred, part.pairs[1])


def _alone(side: Side, partners: Tensor) -> Tensor:
    """1 for instances of a side that share no pixel with the other side, 0 for others; float64."""
    alone = torch.ones(side.real, dtype=torch.float64, device=partners.device)
    alone[partners] = 0
    return alone


def false_rates(
    part: Partition,
    features: Features,
    weights: tuple[Tensor, Tensor] | None = None,
    soft: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Eqs. 5 and 6: the share of missed ground-truth and of false predicted instances, `[planes]` each.

    The floor of the Dice loss in the paper is made exact: an instance counts when it shares no pixel. The derivative is
    straight-through: that of the mean Dice loss of the same instances, before the floor.

    Args:
        part: both sides.
        features: their sums.
        weights: of the rows of either side; None counts them.
        soft: what `missed="soft"` adds to a missed (false) instance, from `soft_alone`.
    """
    dice = Dice()
    rates = []
    pairs = zip(_sides(part), matched_sums(part, features, dice), strict=True)
    for number, ((side, partners), sums) in enumerate(pairs):
        weight = torch.ones_like(side.padded_count) if weights is None else weights[number]
        weight = weight[: side.real]
        unfloored = dice.reduce(sums, side.padded_count)[: side.real]
        value = _alone(side, partners) + (unfloored - unfloored.detach())
        if soft is not None:
            value = value + soft[number]
        rates.append(plane_mean(weight * value, side, plane_sum(weight, side)))
    return rates[0], rates[1]


def blob_entries(instances: Tensor, whole: Tensor, target: Side, omega: Tensor, loss: SeparableLoss) -> Tensor:
    """Blob loss (Kofler et al. 2023): each ground-truth instance against all but the other instances; float64 `[N]`.

    Arguments as `blob_sums`; `omega` are the pixels of each plane `[planes]`.
    """
    return loss.reduce(blob_sums(instances, whole, target, loss), omega[target.plane[: target.real]])


def blob_sums(instances: Tensor, whole: Tensor, target: Side, loss: SeparableLoss) -> Sums:
    """Sums of the masked pairs of blob loss, `[N]` each.

    Args:
        instances: `[N, columns]` columns of each instance.
        whole: `[planes, 3]` Σ P·G, Σ P^k and Σ v of each plane, with the ground truth as G.
        target: the ground-truth side.
        loss: of one instance.
    """
    plane = target.plane[: target.real]
    mine = torch.stack([instances[:, 1 if loss.squared else 0], instances[:, -1]], 1)  # Σ P^k, Σ v
    foreground = mine.new_zeros((len(whole), 2)).index_add(0, plane, mine)
    pred, pointwise = (mine + (whole[:, 1:] - foreground)[plane]).unbind(1)
    return Sums(instances[:, 0], pred, target.count.double(), pointwise)


def inverse_weighted_dice(
    loss: InverseWeightedDice, instances: Tensor, whole: Sums, target: Side, omega: Tensor
) -> Tensor:
    """Inverse-weighted Dice (Shirokikh et al. 2020) of each plane, `[planes]`.

    Args:
        loss: the smoothing.
        instances: `[N]` Σp over each ground-truth instance.
        whole: sums over each plane.
        target: the ground-truth side.
        omega: `[planes]` pixels.
    """
    plane = target.plane[: target.real]
    number = target.per_plane.double()
    inside, _ = inverse_weights(target.count.double(), omega[plane], number[plane])
    _, outside = inverse_weights(whole.target, omega, number)
    intersection = torch.zeros_like(omega).index_add(0, plane, inside * instances)
    foreground = number * omega / (number + 1)  # Σ w·G: every instance weighs the same
    rest = outside * (whole.pred - whole.intersection)
    (ratio,) = loss.form.ratios
    return ratio(intersection, intersection + rest, foreground)


def _draw_boxes(
    starts: np.ndarray, plane: np.ndarray, image: Sequence[int], window: Sequence[int], valid: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes in planes that have a margin of one window on all sides: index of each covered pixel, and its owner.

    Where boxes overlap the first one owns the pixel; each is listed once, those of the margin not at all.

    Args:
        starts: `[K, axes]` lower corners, of boxes within the margin.
        plane: `[K]`
        image: number of planes, and their size without the margin.
        window: lengths of the sides of the boxes.
        valid: `image` bool, pixels that may be drawn.
    """
    wide = _with_margin(image, window)
    base, shift, beyond = plane, np.zeros(1, np.int64), np.zeros(len(plane), dtype=bool)
    for start, length, side, pitch in zip(starts.T, image[1:], window, wide[1:], strict=True):
        base = base * pitch + (start + side)
        shift = (shift[:, None] * pitch + np.arange(side)).reshape(-1)
        beyond |= (start < 0) | (start > length - side)
    flat = (base + shift[:, None]).reshape(-1)
    row = np.tile(np.arange(len(plane), dtype=np.int32), len(shift))
    owner = np.empty(math.prod(wide), np.int32)  # only what is drawn on is touched
    owner[flat] = len(plane)
    np.minimum.at(owner, flat, row)
    at = rest = flat[np.tile(beyond, len(shift))]
    outside = np.zeros(len(at), dtype=bool)
    for length, side, pitch in zip(image[:0:-1], window[::-1], wide[:0:-1], strict=True):
        rest, position = np.divmod(rest, pitch)
        outside |= (position < side) | (position >= length + side)
    owner[at[outside]] = -1
    if valid is not None:
        owner.reshape(wide)[_inner(window)][~valid] = -1
    mine = np.flatnonzero(owner.take(flat) == row)
    return flat.take(mine), row.take(mine)


def _with_margin(image: Sequence[int], window: Sequence[int]) -> tuple[int, ...]:
    """Number and size of planes with a margin of one window on all sides."""
    return (image[0], *(length + 2 * side for length, side in zip(image[1:], window, strict=True)))


def _inner(window: Sequence[int]) -> tuple[slice, ...]:
    """The planes without that margin."""
    return (slice(None), *(slice(side, -side) for side in window))


class _Drawn(NamedTuple):
    """What is drawn of a side on some planes."""

    rows: slice  # of the side, that lie there
    flat: np.ndarray  # index of each pixel in these planes with their margin
    row: np.ndarray  # that owns it, counted from the first of `rows`


class CenterBoxes(NamedTuple):
    """Eq. 4: the boxes that stand for the instances in the centre maps; the smallest id owns where they overlap.

    The predicted map is `value` on the boxes with the derivative of the mean probability of the component
    (straight-through), the ground-truth map is 0 or `value`.
    """

    starts: tuple[Tensor, Tensor]  # [N, axes] and [M, axes] int64 lower corners of true and of predicted boxes
    window: Sequence[int]  # their length along each axis
    valid: Tensor | None  # [planes, *S] bool, pixels that may be drawn
    amplitude: Tensor  # [M] of predicted boxes
    value: float

    def draw(self, part: Partition) -> Iterator[tuple[slice, list[_Drawn]]]:
        """Some planes and both of their sides, about `_BLOCK` pixels of boxes at once: they stay in cache."""
        sides = part.target, part.pred
        first = [np.append(0, side.per_plane.cpu().numpy().cumsum()) for side in sides]
        block = (first[0] + first[1])[:-1] * math.prod(self.window) // _BLOCK
        edges = [0, *(np.flatnonzero(np.diff(block)) + 1).tolist(), len(block)]
        given = [
            (start.cpu().numpy(), side.plane.cpu().numpy()) for start, side in zip(self.starts, sides, strict=True)
        ]
        for begin, end in itertools.pairwise(edges):
            image, drawn = (end - begin, *part.size), []
            valid = None if self.valid is None else self.valid[begin:end].cpu().numpy()
            for edge, (start, plane) in zip(first, given, strict=True):
                rows = slice(int(edge[begin]), int(edge[end]))
                drawn.append(_Drawn(rows, *_draw_boxes(start[rows], plane[rows] - begin, image, self.window, valid)))
            yield slice(begin, end), drawn


def center_boxes(
    part: Partition,
    features: Features,
    valid: Tensor | None,
    window: Sequence[int],
    starts: tuple[Tensor, Tensor] | None = None,
    value: float = 1,
) -> CenterBoxes:
    """The boxes of Eq. 4 about the centroids.

    Args:
        part: the instances of both sides.
        features: Σp of each.
        valid: `[planes, *S]` bool, pixels that may be drawn.
        window: length of the boxes along each axis.
        starts: `[N, axes]` and `[M, axes]` lower corners in place of those about the centroids.
        value: of the maps inside the boxes.
    """
    if starts is None:
        half = torch.tensor([length // 2 for length in window], device=part.pixels.device)
        starts = part.centroids(part.target) - half, part.centroids(part.pred) - half
    mean = (features.pred[:, 0, 0] + features.pred[:, 1, 0]) / part.pred.count
    return CenterBoxes(starts, window, valid, value + (mean - mean.detach()), value)


def center_sums(part: Partition, boxes: CenterBoxes, loss: SeparableLoss) -> Sums:
    """Eq. 4: sums of the pair of centre maps of each plane, for ℓ_center; tensors `[planes]`."""
    amplitude, value = boxes.amplitude, boxes.value
    owned, areas = [], []
    for planes, (true, pred) in boxes.draw(part):
        on = np.zeros(math.prod(_with_margin((planes.stop - planes.start, *part.size), boxes.window)), np.int8)
        on[true.flat] = 1
        owned.append(np.bincount(true.row, minlength=true.rows.stop - true.rows.start))
        areas.append(np.bincount(2 * pred.row + on.take(pred.flat), minlength=2 * (pred.rows.stop - pred.rows.start)))
    owned, area = (torch.from_numpy(np.concatenate(counts)).to(amplitude) for counts in (owned, areas))
    outside, inside = area.view(-1, 2).unbind(1)
    target = plane_sum(owned, part.target)

    pointwise = torch.zeros_like(target)
    if loss.pointwise is not None:
        hit, miss = 1 - amplitude, amplitude
        right = inside * loss.pointwise(hit, cost_of(miss))
        wrong = outside * loss.pointwise(miss, cost_of(hit))
        pointwise = (
            plane_sum(right + wrong, part.pred) + (target - plane_sum(inside, part.pred)) * loss.pointwise.missed
        )
    return Sums(
        intersection=plane_sum(inside * amplitude, part.pred) * value,
        pred=plane_sum((outside + inside) * (amplitude.square() if loss.squared else amplitude), part.pred),
        target=target * (value**2 if loss.squared else value),
        pointwise=pointwise,
    )


def center_maps(part: Partition, boxes: CenterBoxes, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Eq. 4: the pair of centre maps, for any ℓ_center; `[planes, P]` each."""
    amplitude = boxes.amplitude.to(dtype)
    predicted, true = [], []
    for planes, drawn in boxes.draw(part):
        wide = _with_margin((planes.stop - planes.start, *part.size), boxes.window)
        blank = amplitude.new_zeros(math.prod(wide))
        on, at, row = (torch.from_numpy(array).to(blank.device) for array in (drawn[0].flat, *drawn[1][1:]))
        maps = blank.index_fill(0, on, boxes.value), blank.index_put((at,), amplitude[drawn[1].rows][row])
        for found, image in zip((true, predicted), maps, strict=True):
            found.append(image.view(wide)[_inner(boxes.window)].flatten(1))
    return torch.cat(predicted), torch.cat(true)


def proximity(
    part: Partition, loss_gt: Tensor, loss_pred: Tensor, spacing: Sequence[float], *, squared: bool
) -> Tensor:
    """Eqs. 7 to 10: (S_P - S_GT)² of each plane, `[planes]`, S the sum of D·L over the instances of a side.

    Without `squared` it is S_P + S_GT.

    D is the Distance-IoU loss to the nearest box of the other side, measured with `spacing`; it is held fixed in the
    gradient, which is exact through the instance losses L.
    """
    truth, pred = part.target, part.pred
    scale = torch.tensor(spacing, dtype=torch.float64, device=part.pixels.device)
    (lower, upper), (pred_lower, pred_upper) = (
        [corner.mul_(scale) for corner in part.boxes(side)] for side in (truth, pred)
    )
    distance_gt, distance_pred = nearest_boxes(
        lower, upper, truth.plane, pred_lower, pred_upper, pred.plane, len(truth.entries)
    )
    return proximity_from(part, loss_gt, loss_pred, distance_gt, distance_pred, squared=squared)


def proximity_from(
    part: Partition,
    loss_gt: Tensor,
    loss_pred: Tensor,
    distance_gt: Tensor,
    distance_pred: Tensor,
    *,
    squared: bool = True,
) -> Tensor:
    """Eq. 10 from the least distance of each row of either side, or without `squared` S_P + S_GT; `[planes]`."""
    sum_gt = plane_sum(distance_gt * loss_gt, part.target)
    sum_pred = plane_sum(distance_pred * loss_pred, part.pred)
    return (sum_pred - sum_gt).square() if squared else sum_pred + sum_gt
