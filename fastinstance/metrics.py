"""Instance-level metrics of binary predictions, all instances of all planes at once (sections 3.5, 4.1 of the paper).

Both sides become tables (`match_instances`): how many pixels each instance has, which pairs share how many, and which
of the pairs count. Every metric is a sum over these tables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import (
    check_choice,
    check_connectivity,
    check_mask_pair,
    check_mask_values,
    check_per_axis,
    check_size,
    reads_values,
)
from .partition import partition

__all__ = [
    "METRICS",
    "VOLUME_EDGES",
    "VOLUME_SUMS",
    "Instances",
    "Matches",
    "check_matching",
    "check_zero_division",
    "instance_metrics",
    "least_pixels",
    "match_instances",
    "plane_metrics",
    "volume_sums",
    "voxel_volume",
]

METRICS = (
    "dsc",
    "vol_diff_ml",
    "vol_diff_percent",
    "sen",
    "fnr",
    "ppv",
    "fdr",
    "f1",
    "pq",
    "sq",
    "rq",
    "n_target",
    "n_pred",
    "n_missed",
    "n_false",
)
VOLUME_SUMS = ("n_target", "found", "dice", "n_pred", "hit")
VOLUME_EDGES = tuple(step / 20 for step in range(1, 21))  # mL, between the size groups of Figs. 8, 9 and 12
MATCHINGS = ("overlap", "iou", "dice")
_UNIQUE = {"iou": 1 / 2, "dice": 2 / 3}  # an instance has at most one partner above this


class Instances(NamedTuple):
    """One side, numbered over all planes."""

    pixels: Tensor  # [K] int64
    plane: Tensor  # [K] int64
    matched: Tensor  # [K] bool: found (of the target), or not false (of the prediction)


class Matches(NamedTuple):
    """Instances of both sides and the pairs that overlap."""

    batch: int
    channels: int
    target: Instances
    pred: Instances
    n: Tensor  # [A] int64 row of `target` of each pair
    m: Tensor  # [A] int64 row of `pred`
    shared: Tensor  # [A] int64 pixels
    linked: Tensor  # [A] bool: detects, many to many with "overlap", one to one otherwise
    one_to_one: Tensor  # [A] bool: a true positive of PQ


def check_matching(matching: str, threshold: float, min_size: int) -> None:
    """The settings of `match_instances` that do not depend on the images."""
    check_choice("matching", matching, MATCHINGS)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold < 1:
        raise ValueError(f"expected threshold in [0, 1), got {threshold!r}")
    check_size("min_size", min_size)


def check_zero_division(value: float) -> None:
    if value not in (0, 1) and value == value:
        raise ValueError(f"expected zero_division to be 0, 1 or NaN, got {value!r}")


def voxel_volume(spacing: float | Sequence[float] | None, axes: int) -> float:
    """Volume of a pixel in mL (1000 mm³); `spacing` in mm as in `instance_metrics`."""
    if spacing is None:
        return 1e-3
    if axes == 2 and isinstance(spacing, Sequence) and len(spacing) == 3:
        axes = 3  # a slice and its thickness
    return math.prod(check_per_axis("spacing", spacing, axes, integer=False)) * 1e-3


def least_pixels(volume_ml: float, voxel_ml: float) -> int:
    """Pixels of the smallest instance that is not below a volume, as far as a spacing in float32 can tell."""
    return math.ceil(volume_ml / voxel_ml * (1 - 1e-6))


def _greatest_first(score: Tensor, n: Tensor, m: Tensor, rows: tuple[int, int], candidates: Tensor) -> Tensor:
    """One-to-one pairs among the candidates: the greatest score first, equal ones in the order of n, then of m.

    In each round every open pair that is the first of both its instances is taken, and the pairs that share an
    instance with it are closed: what going through the sorted pairs one by one would give.
    """
    order = score.argsort(descending=True, stable=True)  # the pairs come in the order of n and m
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    last = len(order)
    taken = torch.zeros_like(candidates)
    candidates = candidates.clone()
    while candidates.any():
        open_rank = torch.where(candidates, rank, last)
        first = candidates
        for row, count in zip((n, m), rows, strict=True):
            best = rank.new_full((count,), last).scatter_reduce_(0, row, open_rank, "amin")
            first = first & (best[row] == rank)
        taken |= first
        for row, count in zip((n, m), rows, strict=True):
            candidates &= ~_any_of(row, first, count)[row]
    return taken


def _any_of(row: Tensor, flag: Tensor, count: int) -> Tensor:
    """[count] bool: whether any entry of a row is set."""
    return torch.zeros(count, dtype=torch.int64, device=row.device).index_add_(0, row, flag.long()) > 0


def _binary(name: str, mask: Tensor, labels: Tensor | None) -> Tensor:
    """The mask as bool `[planes, *S]`, checked where its values may be read."""
    mask = mask.detach().flatten(0, 1)
    if not reads_values(mask):
        return mask.bool()
    check_mask_values(name, mask, None if labels is None else labels.flatten(0, 1))
    return mask.view(torch.bool) if mask.dtype == torch.uint8 else mask.bool()  # 0 and 1 need no copy


def match_instances(
    pred: Tensor,
    target: Tensor,
    *,
    connectivity: int | None = None,
    matching: str = "overlap",
    threshold: float = 0.5,
    min_size: int = 0,
    pred_labels: Tensor | None = None,
    target_labels: Tensor | None = None,
) -> Matches:
    """The tables behind `instance_metrics`, with its arguments and errors."""
    check_matching(matching, threshold, min_size)
    check_mask_pair(pred, target, pred_labels, target_labels)
    connectivity = check_connectivity(connectivity, pred.ndim - 2)
    pred_mask, target_mask = _binary("pred", pred, pred_labels), _binary("target", target, target_labels)
    part = partition(
        target_mask,
        pred_mask,
        labels=None if target_labels is None else target_labels.flatten(0, 1),
        pred_labels=None if pred_labels is None else pred_labels.flatten(0, 1),
        connectivity=connectivity,
        min_size=min_size,
    )
    n, m = part.pairs
    shared = part.shared
    rows = part.target.real, part.pred.real
    both = (part.target.count[n] + part.pred.count[m]).double()  # a quotient of integers would be float32
    everything = torch.ones_like(shared, dtype=torch.bool)
    if matching == "overlap":
        linked = everything
        one_to_one = _greatest_first(2 * shared / both, n, m, rows, everything)
    else:
        score = 2 * shared / both if matching == "dice" else shared / (both - shared)
        linked = score > threshold
        if threshold < _UNIQUE[matching]:
            linked = _greatest_first(score, n, m, rows, linked)
        one_to_one = linked
    return Matches(
        pred.shape[0],
        pred.shape[1],
        Instances(part.target.count, part.target.plane[: rows[0]], _any_of(n, linked, rows[0])),
        Instances(part.pred.count, part.pred.plane[: rows[1]], _any_of(m, linked, rows[1])),
        n,
        m,
        shared,
        linked,
        one_to_one,
    )


def plane_metrics(matches: Matches, *, voxel_ml: float = 1e-3, zero_division: float = 0.0) -> dict[str, Tensor]:
    """`instance_metrics` from its tables."""
    shape = matches.batch, matches.channels

    def per_plane(plane: Tensor, values: Tensor) -> Tensor:
        return values.new_zeros(math.prod(shape)).index_add_(0, plane, values).view(shape)

    none_wrong = zero_division * 0.0  # 0, or NaN: with nothing to find none is missed

    def ratio(numerator: Tensor, denominator: Tensor, otherwise: float = zero_division) -> Tensor:
        return torch.where(denominator == 0, otherwise, numerator.double() / denominator)

    target, pred, of_pair = matches.target, matches.pred, matches.target.plane[matches.n]
    n_target, n_pred = (per_plane(side.plane, torch.ones_like(side.plane)) for side in (target, pred))
    found, hit = (per_plane(side.plane, side.matched.long()) for side in (target, pred))
    true, predicted = (per_plane(side.plane, side.pixels) for side in (target, pred))
    dice = 2 * matches.shared.double() / (target.pixels[matches.n] + pred.pixels[matches.m])
    quality = per_plane(of_pair, dice * matches.one_to_one)
    pairs = per_plane(of_pair, matches.one_to_one.long())
    sen, ppv = ratio(found, n_target), ratio(hit, n_pred)
    some_hit = found > 0  # then both rates are numbers above 0
    f1 = torch.where(some_hit, 2 * sen * ppv / (sen + ppv), torch.where(n_target + n_pred > 0, 0.0, zero_division))
    return {
        "dsc": ratio(2 * per_plane(of_pair, matches.shared), true + predicted),
        "vol_diff_ml": (predicted - true).double() * voxel_ml,
        "vol_diff_percent": ratio(100 * (predicted - true), true, none_wrong),
        "sen": sen,
        "fnr": ratio(n_target - found, n_target, none_wrong),
        "ppv": ppv,
        "fdr": ratio(n_pred - hit, n_pred, none_wrong),
        "f1": f1,
        "pq": ratio(2 * quality, n_target + n_pred),  # TP + FP/2 + FN/2 is half of all instances
        "sq": ratio(quality, pairs),
        "rq": ratio(2 * pairs, n_target + n_pred),
        "n_target": n_target,
        "n_pred": n_pred,
        "n_missed": n_target - found,
        "n_false": n_pred - hit,
    }


def volume_sums(matches: Matches, edges_ml: Sequence[float], voxel_ml: float) -> Tensor:
    """Sums over the instances of each size group, every instance in the group of its own volume.

    Args:
        edges_ml: ascending; the groups are below the first, from each edge to the next, and from the last on.

    Returns:
        `[B, C, groups, 5]` float64, as `VOLUME_SUMS` names them: true instances, those found, the sum of the Dice
        coefficients of each with the union of its partners (0 if missed); predicted instances, those that hit.
    """
    target, pred, n, m = matches.target, matches.pred, matches.n, matches.m
    edges = target.pixels.new_tensor([least_pixels(edge, voxel_ml) for edge in edges_ml])
    groups = len(edges_ml) + 1
    shared, partners = (
        torch.zeros_like(target.pixels).index_add_(0, n, pixels * matches.linked)
        for pixels in (matches.shared, pred.pixels[m])
    )
    dice = 2 * shared.double() / (target.pixels + partners)

    def table(side: Instances, *columns: Tensor) -> Tensor:
        row = side.plane * groups + torch.bucketize(side.pixels, edges, right=True)
        values = torch.stack([torch.ones_like(side.pixels), side.matched, *columns], 1).double()
        return values.new_zeros(matches.batch * matches.channels * groups, values.shape[1]).index_add_(0, row, values)

    sums = torch.cat([table(target, dice), table(pred)], 1)
    return sums.view(matches.batch, matches.channels, groups, len(VOLUME_SUMS))


def instance_metrics(
    pred: Tensor,
    target: Tensor,
    *,
    connectivity: int | None = None,
    matching: str = "overlap",
    threshold: float = 0.5,
    spacing: float | Sequence[float] | None = None,
    min_size: int = 0,
    pred_labels: Tensor | None = None,
    target_labels: Tensor | None = None,
    zero_division: float = 0.0,
) -> dict[str, Tensor]:
    """Instance-level metrics of every image and channel (sections 3.5 and 4.1 of the paper).

    N true instances, of which `found` are matched, and M predicted ones, of which `hit` are matched:

        dsc               Dice coefficient of all pixels of instances (Eq. 1)
        vol_diff_ml       predicted minus true volume in mL
        vol_diff_percent  the same in per cent of the true volume
        sen, fnr          found / N, and (N - found) / N
        ppv, fdr          hit / M, and (M - hit) / M
        f1                harmonic mean of ppv and sen
        pq                sum of the Dice coefficients of the TP pairs / (TP + FP/2 + FN/2) (Eq. 15)
        sq, rq            mean Dice coefficient of these pairs; TP / (TP + FP/2 + FN/2); pq = sq · rq
        n_target, n_pred, n_missed, n_false   N, M, N - found, M - hit

    Args:
        pred: binary `[B, C, H, W]` or `[B, C, D, H, W]` of any real dtype; bool is fastest.
        target: the same shape.
        connectivity: of the instances: 4 or 8 in 2D, 6, 18 or 26 in 3D; None is full connectivity.
        matching: "overlap": matched is what shares a pixel with the other side, many to many; the pairs of `pq` are
            then one to one among all that overlap, the greatest Dice coefficient first. "iou", "dice": one to one, the
            greatest score first, among pairs with a score above `threshold`. Equal scores are taken in the order of
            the true ids, then of the predicted ids.
        threshold: in [0, 1); not used with "overlap".
        spacing: pixel size in mm, a number or one for each axis; None is 1 mm. An image [H, W] is a slice of 1 mm, or
            of the thickness given first: (thickness, y, x).
        min_size: instances with fewer pixels are background, on both sides and in all metrics.
        pred_labels: integer ids like `pred`, 0 = background, in place of its connected components; `pred` is
            `pred_labels > 0`.
        target_labels: the same of the target.
        zero_division: what a score is that has nothing to count (dsc, sen, ppv, f1, pq, sq, rq of an empty side): 0, as
            in the paper's tables, 1 or NaN. An error (fnr, fdr, vol_diff_percent) is then 0, or NaN if this is NaN. So
            `fnr` = 1 - `sen` and `fdr` = 1 - `ppv` wherever the side has instances, and with 1 everywhere.

    Returns:
        The 15 metrics, each `[B, C]` on the device of `pred`; numbers of instances in int64, the others in float64.
        On a GPU making the tables waits for the device a few times: their sizes depend on the data, and so does the
        number of rounds of the one-to-one matching. No metric is copied to the host.

    Raises:
        TypeError: masks that are no tensors or complex, ids that are not integers.
        ValueError: shapes or devices that differ, settings out of range; on the CPU (on a GPU after
            `debug_checks(True)`) masks that are not binary, and ids that are negative or differ from the mask.
    """
    check_zero_division(zero_division)
    matches = match_instances(
        pred,
        target,
        connectivity=connectivity,
        matching=matching,
        threshold=threshold,
        min_size=min_size,
        pred_labels=pred_labels,
        target_labels=target_labels,
    )
    return plane_metrics(matches, voxel_ml=voxel_volume(spacing, pred.ndim - 2), zero_division=zero_division)
