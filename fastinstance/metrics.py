"""Instance-level metrics of binary predictions, all instances of all planes at once (sections 3.5, 4.1 of the paper).

Every metric is a sum over the tables of `matching`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import check_per_axis
from .matching import Instances, Matches, match_instances
from .torch_func import differentiable

__all__ = [
    "METRICS",
    "VOLUME_EDGES",
    "VOLUME_SUMS",
    "check_zero_division",
    "instance_metrics",
    "least_pixels",
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
_UNIT = 1 << 40  # sums of Dice coefficients are kept in integers: the same on every device and in every run


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


def _dice(shared: Tensor, pixels: Tensor, other: Tensor) -> Tensor:
    """Dice coefficients in units, int64; 0 for an empty row."""
    return (2 * shared * (_UNIT / (pixels + other).clamp(min=1).double())).round().long()


def plane_metrics(matches: Matches, *, voxel_ml: float = 1e-3, zero_division: float = 0.0) -> dict[str, Tensor]:
    """`instance_metrics` from its tables."""
    shape = matches.batch, matches.channels

    def per_plane(plane: Tensor, values: Tensor) -> Tensor:
        return values.new_zeros(math.prod(shape)).index_add_(0, plane, values).view(shape)

    none_wrong = zero_division * 0.0  # 0, or NaN: with nothing to find none is missed

    def ratio(numerator: Tensor, denominator: Tensor, otherwise: float = zero_division) -> Tensor:
        return torch.where(denominator == 0, otherwise, numerator.double() / denominator)

    target, pred, of_pair = matches.target, matches.pred, matches.target.plane[matches.n]
    n_target, n_pred = (per_plane(side.plane, (side.pixels > 0).long()) for side in (target, pred))
    found, hit = (per_plane(side.plane, side.matched.long()) for side in (target, pred))
    true, predicted = (per_plane(side.plane, side.pixels) for side in (target, pred))
    dice = _dice(matches.shared, target.pixels[matches.n], pred.pixels[matches.m])
    decided = per_plane(of_pair, matches.undecided.long()) == 0
    quality = torch.where(decided, per_plane(of_pair, dice * matches.one_to_one).double() / _UNIT, math.nan)
    pairs = torch.where(decided, per_plane(of_pair, matches.one_to_one.long()).double(), math.nan)
    sen, ppv = ratio(found, n_target), ratio(hit, n_pred)
    some_hit = found > 0  # then both rates are numbers above 0
    f1 = torch.where(some_hit, 2 * sen * ppv / (sen + ppv), torch.where(n_target + n_pred > 0, 0.0, zero_division))
    return {
        "dsc": ratio(2 * per_plane(of_pair, matches.shared), true + predicted),
        "vol_diff_ml": (predicted - true).double() * voxel_ml,
        "vol_diff_percent": torch.where(
            (true == 0) & (predicted > 0), math.nan, ratio(100 * (predicted - true), true, none_wrong)
        ),
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
    least = [least_pixels(edge, voxel_ml) for edge in edges_ml]
    groups = len(least) + 1
    shared, partners = (
        torch.zeros_like(target.pixels).index_add_(0, n, pixels * matches.linked)
        for pixels in (matches.shared, pred.pixels[m])
    )

    def table(side: Instances, *columns: Tensor) -> Tensor:
        group = torch.zeros_like(side.pixels)
        for pixels in least:
            group += side.pixels >= pixels
        values = torch.stack([side.pixels > 0, side.matched, *columns], 1).long()
        sums = values.new_zeros(matches.batch * matches.channels * groups, values.shape[1])
        return sums.index_add_(0, side.plane * groups + group, values)

    sums = torch.cat([table(target, _dice(shared, target.pixels, partners)), table(pred)], 1).double()
    sums[:, VOLUME_SUMS.index("dice")] /= _UNIT
    return sums.view(matches.batch, matches.channels, groups, len(VOLUME_SUMS))


@differentiable
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
        vol_diff_percent  the same in per cent of the true volume; NaN where something is predicted and nothing is true
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
        On a GPU nothing waits for the device, but for "iou" below a threshold of 1/2 and "dice" below 2/3, where an
        instance may have several candidates: one question a round whether any is left. With "overlap" 32 rounds are
        made unasked; `pq`, `sq` and `rq` of a plane that needs more are NaN (a chain of so many instances, each
        overlapping the next one more).

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
