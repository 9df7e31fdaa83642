"""Losses by ground-truth component beyond the paper's: CC loss, and those of found and missed components.

The arguments that all losses share are described in `functional.instance_terms`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from . import terms as tm
from .components import foreground
from .functional import Settings, _Scene
from .losses import ImageOptions, _Loss
from .ops import DenseSums, Segments, instance_sums
from .partition import Side
from .pixel import Sums
from .planes import Planes
from .regions import nearest_component

__all__ = ["CCLoss", "CCOptions"]


class CCOptions(ImageOptions, total=False):
    """Settings of CC loss; see `fastinstance.functional.instance_terms`."""

    average: str
    connectivity: int | None
    spacing: float | Sequence[float] | None


class CCLoss(_Loss):
    """A pixel loss of every component alone in its surroundings: CC-Metrics as a loss (CC-DiceCE).

    Every pixel belongs to the region R_n of its nearest ground-truth component n (`fastinstance.voronoi`), and the loss
    is the mean over components of the pixel loss on these |R_n| pixels alone: L = mean_n ℓ(P|R_n, G|R_n). So every
    component counts as much as any other, whatever its size, and a false positive counts once, for the component that
    it is nearest to. A plane without a component has one region, the whole plane.

    Jaus et al. 2024 (arXiv 2410.18684) for the metric, Bouteille et al. 2025 (arXiv 2511.17146) for the loss, to which
    they add the loss of the whole image: `DiceCELoss()(x, y) + CCLoss()(x, y)`.

    Args:
        pixel_loss: of a region: a name, or a pixel loss of this library.
        average: "instance", the mean over all components of the batch, or "image", per plane, then over planes.
        spacing: size of a pixel, for all or each axis, for the regions; only ratios matter.

    CUDA tensors take the torch path for the sums, which waits for the device; labels and regions come from the kernels.
    """

    def __init__(self, *, pixel_loss: object = "dicece", **options: Unpack[CCOptions]) -> None:
        super().__init__()
        self.settings = Settings(pixel_loss=pixel_loss, **options)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        target_labels: Tensor | None = None,
        target_regions: Tensor | None = None,
        valid_mask: Tensor | None = None,
    ) -> Tensor:
        """The loss: a scalar, or `[B, C]` for `reduction="none"`.

        Args:
            input: as `functional.instance_terms`, as are `target`, `target_labels` and `valid_mask`.
            target: see above.
            target_labels: see above; the components whose regions are sought.
            target_regions: `[B, C, *S]` integer ids of regions computed once beforehand, 0 = in no region; then neither
                labels nor distances are computed.
            valid_mask: see above.
        """
        scene = _Scene(self.settings, input, target, target_labels, valid_mask)
        planes, loss = scene.planes, self.settings.pixel
        if target_regions is None:
            part = scene.partition(predicted=False)
            image = torch.zeros(planes.target.shape, dtype=torch.int32, device=input.device)
            image.view(-1)[part.pixels] = part.target.label.int()
            regions, positives = nearest_component(image, scene.spacing), part.pixels
        else:
            _check_regions(input, target_regions)
            first = 0 if self.settings.include_background else 1
            regions, positives = target_regions[:, first:].reshape(planes.target.shape), foreground(planes.target)
        segments, side, omega = _segments(regions, planes)
        sums = DenseSums(positives, loss.squared, loss.pointwise, segments=segments)
        ((table,), _) = instance_sums(planes.values, planes.logits, (sums,), None)
        run = torch.searchsorted(segments.start, positives, right=True) - 1
        number = torch.bincount(segments.row[run], minlength=segments.rows)[1:].double()
        value = loss.reduce(Sums(table[1:, 0], table[1:, 1], number, table[1:, 2]), omega)
        value, reduction = scene.spoil(value, side.plane), self.settings.reduction
        entries = side.per_plane.double()
        return scene.finish(tm.average(value, side, entries, average=self.settings.average, reduction=reduction))


def _check_regions(input: Tensor, regions: Tensor) -> None:
    """Shape, dtype and device of given regions."""
    if not isinstance(regions, Tensor):
        raise TypeError(f"expected target_regions to be a tensor, got {type(regions).__name__}")
    if regions.shape != input.shape:
        raise ValueError(
            f"expected target_regions [B,C,*S] = {tuple(input.shape)} like input, got {tuple(regions.shape)}"
        )
    if regions.is_floating_point() or regions.is_complex() or regions.dtype == torch.bool:
        raise TypeError(f"expected target_regions of an integer dtype, got {regions.dtype}, which voronoi() returns")
    if regions.device != input.device:
        raise ValueError(
            f"expected target_regions on the device of input, {input.device}, got {regions.device}; move one of them"
        )


def _segments(regions: Tensor, planes: Planes) -> tuple[Segments, Side, Tensor]:
    """The regions of all planes as segments, and for each region its plane and its number of valid pixels.

    Segment 0 is what belongs to no region. A plane without a region is one.
    """
    pixels = math.prod(planes.size)
    if planes.valid is not None:
        regions = regions * planes.valid
    flat = regions.reshape(-1)
    begins = torch.ones_like(flat, dtype=torch.bool)
    torch.ne(flat[1:], flat[:-1], out=begins[1:])
    begins[::pixels] = True
    start = foreground(begins)
    plane = start // pixels
    distinct, position = torch.unique((plane << 32) + flat[start].long(), return_inverse=True)
    owner = distinct >> 32
    real = (distinct & 0xFFFFFFFF) > 0
    real |= torch.bincount(owner[real], minlength=len(planes.omega))[owner] == 0
    row = (real.cumsum(0) * real)[position]
    length = torch.cat([start[1:], start.new_tensor([flat.numel()])]) - start
    rows = int(real.sum()) + 1
    omega = torch.bincount(row, length.double(), rows)[1:]
    plane = owner[real]
    whole = (distinct & 0xFFFFFFFF)[real] == 0
    per_plane = torch.bincount(plane, minlength=len(planes.omega))
    side = Side(label=start.new_empty(0), count=omega.long(), per_plane=per_plane, plane=plane)
    return Segments(start, row, rows), side, omega.where(~whole, planes.omega[plane])
