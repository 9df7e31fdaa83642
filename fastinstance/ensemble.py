"""Ensembles of binary predictions: by the volume of instances, and by majority."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .checks import check_connectivity, check_mask, reads_values
from .components import components_at, foreground
from .metrics import least_pixels, voxel_volume

__all__ = ["band_ensemble", "majority_vote", "volume_ensemble"]


def volume_ensemble(
    small: Tensor,
    large: Tensor,
    *,
    threshold_ml: float = 0.05,
    spacing: float | Sequence[float] | None,
    connectivity: int | None = None,
) -> Tensor:
    """Small instances from one model, large ones from another (section 4.2 of the paper).

    The instances of both predictions are labelled and measured; those of `small` below `threshold_ml` and those of
    `large` from it on are kept, and merged.

    Args:
        small: mask `[B, C, H, W]` or `[B, C, D, H, W]` of any real dtype; foreground is where it is neither 0 nor NaN.
        large: the same shape and device.
        threshold_ml: volume in mL.
        spacing: pixel size in mm, as in `instance_metrics`; None is 1 mm.
        connectivity: of the instances; None is full connectivity.

    Returns:
        A mask of 0 and 1 with the shape and dtype of `small`.

    Raises:
        ValueError: shapes or devices that differ, a threshold or spacing that is not above 0; on the CPU values between
            0 and 1.
        TypeError: masks that are no tensors or complex.
    """
    return band_ensemble([small, large], [threshold_ml], spacing=spacing, connectivity=connectivity)


def band_ensemble(
    masks: Sequence[Tensor],
    edges_ml: Sequence[float],
    *,
    spacing: float | Sequence[float] | None,
    connectivity: int | None = None,
) -> Tensor:
    """`volume_ensemble` for k models and k size bands.

    The first of k masks gives its instances below the first of k - 1 ascending edges (mL), the next those from there to
    the next edge, and so on. Several models may serve a band together: pass their `majority_vote`. The other arguments,
    the result and the errors are those of `volume_ensemble`.
    """
    _check_masks(masks)
    check_mask(masks[0])
    if len(edges_ml) != len(masks) - 1:
        raise ValueError(f"expected one edge less than masks, got {len(edges_ml)} edges for {len(masks)} masks")
    edges = [0.0, *edges_ml, math.inf]
    if not all(low < high for low, high in pairwise(edges)):
        raise ValueError(f"expected ascending volumes above 0 in mL, got {tuple(edges_ml)!r}")
    axes = masks[0].ndim - 2
    connectivity = check_connectivity(connectivity, axes)
    voxel_ml = voxel_volume(spacing, axes)
    least = [least_pixels(edge, voxel_ml) for edge in edges[:-1]]
    union = torch.zeros(masks[0].shape, dtype=torch.bool, device=masks[0].device)
    for mask, low, below in zip(masks, least, [*least[1:], None], strict=True):
        inside = _inside(mask).flatten(0, 1)
        pixels = foreground(inside)
        label, _ = components_at(inside, pixels, connectivity)
        size = torch.bincount(label)[label]
        kept = size >= low if below is None else (size >= low) & (size < below)
        union.view(-1)[pixels[kept]] = True
    return union.to(masks[0].dtype)


def majority_vote(masks: Sequence[Tensor] | Tensor) -> Tensor:
    """What more than half of k models predict (section 4.4 of the paper); a tie is background.

    Args:
        masks: k masks of one shape and device, or one tensor `[k, ...]`; foreground is where one is neither 0 nor NaN.

    Returns:
        A mask of 0 and 1 with the shape and dtype of the first.

    Raises:
        ValueError: no mask, shapes or devices that differ; on the CPU values between 0 and 1.
        TypeError: masks that are no tensors or complex.
    """
    masks = list(masks)
    _check_masks(masks)
    votes = torch.zeros(masks[0].shape, dtype=torch.int32, device=masks[0].device)
    for mask in masks:
        votes += _inside(mask)
    return (2 * votes > len(masks)).to(masks[0].dtype)


def _inside(mask: Tensor) -> Tensor:
    mask = mask.detach().as_subclass(Tensor)
    if not mask.is_floating_point():
        return mask.bool()
    if reads_values(mask) and ((mask > 0) & (mask < 1)).any():
        raise ValueError("expected masks without values between 0 and 1; use mask >= 0.5 for probabilities")
    return mask.bool() & ~mask.isnan()


def _check_masks(masks: Sequence[Tensor]) -> None:
    if len(masks) == 0:
        raise ValueError("expected at least one mask, got none")
    first = masks[0]
    for mask in masks:
        if not isinstance(mask, Tensor):
            raise TypeError(f"expected masks to be tensors, got {type(mask).__name__}")
        if mask.is_complex():
            raise TypeError(f"expected masks of a real dtype, got {mask.dtype}")
        if mask.shape != first.shape:
            raise ValueError(f"expected masks of one shape, got {tuple(first.shape)} and {tuple(mask.shape)}")
        if mask.device != first.device:
            raise ValueError(f"expected masks on one device, got {first.device} and {mask.device}; move one of them")
