"""Ensembles of binary predictions: by the volume of instances, and by majority."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real

import torch
from torch import Tensor

from .checks import check_connectivity, check_mask, check_volumes, reads_values
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
    number = isinstance(threshold_ml, Real) and not isinstance(threshold_ml, bool)
    if not number or not 0 < threshold_ml < math.inf:
        raise ValueError(f"expected threshold_ml to be a volume above 0 in mL, got {threshold_ml!r}")
    return _merge({"small": small, "large": large}, (float(threshold_ml),), spacing, connectivity)


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
    listed, edges = _listed(masks), check_volumes("edges_ml", edges_ml)
    if len(edges) != len(listed) - 1:
        raise ValueError(f"expected edges_ml with one less than masks, got {len(edges)} for {len(listed)} masks")
    return _merge(listed, edges, spacing, connectivity)


def _merge(
    masks: Mapping[str, Tensor],
    edges_ml: Sequence[float],
    spacing: float | Sequence[float] | None,
    connectivity: int | None,
) -> Tensor:
    """`band_ensemble` of masks by the names of the arguments that they are."""
    first = _check_masks(masks)
    check_mask(first)
    axes = first.ndim - 2
    connectivity = check_connectivity(connectivity, axes)
    voxel_ml = voxel_volume(spacing, axes)
    least = [least_pixels(edge, voxel_ml) for edge in (0.0, *edges_ml)]
    union = torch.zeros(first.shape, dtype=torch.bool, device=first.device)
    for mask, low, below in zip(masks.values(), least, [*least[1:], None], strict=True):
        inside = _inside(mask).flatten(0, 1)
        pixels = foreground(inside)
        label, _ = components_at(inside, pixels, connectivity)
        size = torch.bincount(label)[label]
        kept = size >= low if below is None else (size >= low) & (size < below)
        union.view(-1)[pixels[kept]] = True
    return union.to(first.dtype)


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
    listed = _listed(masks)
    first = _check_masks(listed)
    votes = torch.zeros(first.shape, dtype=torch.int32, device=first.device)
    for mask in listed.values():
        votes += _inside(mask)
    return (2 * votes > len(listed)).to(first.dtype)


def _inside(mask: Tensor) -> Tensor:
    mask = mask.detach().as_subclass(Tensor)
    if not mask.is_floating_point():
        return mask.bool()
    if reads_values(mask) and ((mask > 0) & (mask < 1)).any():
        raise ValueError("expected masks without values between 0 and 1; use mask >= 0.5 for probabilities")
    return mask.bool() & ~mask.isnan()


def _listed(masks: object) -> dict[str, Tensor]:
    """Masks by their place in the argument `masks`."""
    if not isinstance(masks, Iterable) or isinstance(masks, str | bytes):
        raise TypeError(f"expected masks to be a list of tensors, got {type(masks).__name__}")
    return {f"masks[{place}]": mask for place, mask in enumerate(masks)}


def _check_masks(masks: Mapping[str, Tensor]) -> Tensor:
    """The first of some masks that fit each other."""
    if not masks:
        raise ValueError("expected masks with at least one, got none")
    (like, first), *_ = masks.items()
    for name, mask in masks.items():
        if not isinstance(mask, Tensor):
            raise TypeError(f"expected {name} to be a tensor, got {type(mask).__name__}")
        if mask.is_complex():
            raise TypeError(f"expected {name} of a real dtype, got {mask.dtype}")
        if mask.shape != first.shape:
            raise ValueError(f"expected {name} of the shape of {like}, {tuple(first.shape)}, got {tuple(mask.shape)}")
        if mask.device != first.device:
            raise ValueError(
                f"expected {name} on the device of {like}, {first.device}, got {mask.device}; move one of them"
            )
    return first
