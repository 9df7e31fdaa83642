"""Regions: which ground-truth component each pixel is nearest to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .backend import backend_for, operator
from .checks import check_per_axis, comparable, reads_values
from .torch_func import differentiable

__all__ = ["nearest_component", "voronoi"]


@differentiable
def voronoi(labels: Tensor, spacing: float | Sequence[float] | None = None) -> Tensor:
    """Voronoi regions of labelled components: the id of the nearest component, at every pixel.

    The distance is Euclidean, between the centres of pixels, and exact. Of equally near pixels of components the first
    in raster order counts, on the CPU and in the kernels alike; with a `spacing` that is not the same for all axes,
    distances are equal if they are in float64.

    Args:
        labels: `[B, C, H, W]` or `[B, C, D, H, W]` integer ids of components, 0 = background, such as the labels of
            `fastinstance.label`.
        spacing: size of a pixel, for all or each axis; only ratios matter.

    Returns:
        Ids like `labels`, 0 in planes without a component.

    Raises:
        ValueError: labels of another rank or with negative ids, a spacing that does not fit.
        TypeError: labels that are no tensor of an integer dtype.
        ImportError: labels on the CPU, without SciPy.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"expected labels to be a tensor, got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"expected labels of an integer dtype, got {labels.dtype}; fastinstance.label(mask) makes them")
    if labels.ndim not in (4, 5):
        raise ValueError(f"expected labels [B,C,H,W] or [B,C,D,H,W], got {tuple(labels.shape)}; add the missing axes")
    if reads_values(labels) and labels.numel() and (least := int(comparable(labels).min())) < 0:
        raise ValueError(f"expected labels >= 0, got {least}; 0 is background")
    per_axis = check_per_axis("spacing", 1.0 if spacing is None else spacing, labels.ndim - 2, integer=False)
    return nearest_component(labels.flatten(0, 1), per_axis).view(labels.shape)


@operator("fastinstance::nearest_component")
def nearest_component(labels: Tensor, spacing: Sequence[float]) -> Tensor:
    """`voronoi` of checked planes `[planes, *S]`; on a CUDA tensor without waiting for the device."""
    if len(set(spacing)) == 1:
        spacing = (1.0,) * len(spacing)  # the distances are integers then
    if labels.numel() == 0:
        return labels.clone()
    if backend_for(labels) == "triton":
        from fastinstance_kernels import nearest_label

        return nearest_label(labels.contiguous(), tuple(spacing))
    return _by_distance_transform(labels.cpu(), spacing).to(labels.device)


@nearest_component.register_fake
def _(labels: Tensor, spacing: Sequence[float]) -> Tensor:
    del spacing
    return labels.new_empty(labels.shape)


def _by_distance_transform(labels: Tensor, spacing: Sequence[float]) -> Tensor:
    """`nearest_component` with SciPy's exact transform, plane by plane."""
    try:
        from scipy.ndimage import distance_transform_edt
    except ImportError as error:
        raise ImportError(
            "Voronoi regions on the CPU need SciPy: pip install scipy, or pass regions computed elsewhere as "
            "target_regions="
        ) from error
    regions = torch.zeros_like(labels, memory_format=torch.contiguous_format)
    for plane, region in zip(labels.numpy(), regions.numpy(), strict=True):
        if plane.any():
            # Of equally near pixels SciPy takes the first in column-major order: the axes are reversed.
            index = distance_transform_edt(plane.T == 0, spacing[::-1], return_distances=False, return_indices=True)
            region[...] = plane[tuple(axis.T for axis in reversed(index))]  # pyright: ignore[reportArgumentType, reportCallIssue]
    return regions
