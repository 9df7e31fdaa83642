"""Losses by ground-truth component beyond the paper's: CC loss, and those of found and missed components.

The arguments that all losses share are described in `functional.instance_terms`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Unpack, cast

import torch
from torch import Tensor

from . import terms as tm
from .components import foreground
from .criteria import resolve
from .functional import Scene, Settings
from .losses import BaseLoss, ImageOptions
from .ops import DenseSums, InstanceSums, Segments, instance_sums
from .partition import Side
from .pixel import Pointwise, SeparableLoss, Sums, check_not_negative
from .planes import Planes
from .regions import nearest_component

__all__ = ["CCLoss", "CCOptions", "ComponentMILLoss", "ComponentOptions", "ComponentTverskyLoss", "LesionRecallLoss"]


class CCOptions(ImageOptions, total=False):
    """Settings of CC loss; see `fastinstance.functional.instance_terms`."""

    average: str
    connectivity: int | None
    spacing: float | Sequence[float] | None


class CCLoss(BaseLoss):
    """A pixel loss of every component alone in its surroundings: CC-Metrics as a loss (CC-DiceCE).

    Every pixel belongs to the region R_n of its nearest ground-truth component n (`fastinstance.voronoi`), and the loss
    is the mean over components of the pixel loss on these |R_n| pixels alone: L = mean_n ℓ(P|R_n, G|R_n). So every
    component counts as much as any other, whatever its size, and a false positive counts once, for the component that
    it is nearest to. A plane without a component has one region, the whole plane.

    Jaus et al. 2024 (arXiv 2410.18684) for the metric, Bouteille et al. 2025 (arXiv 2511.17146) for the loss;
    `pixel_loss="inverse_weighted_dice"` is the per-component inverse-weighted Dice of Kundu et al. 2026 (arXiv
    2604.24276).

    Args:
        pixel_loss: of a region: a name, or a pixel loss of this library.
        average: "instance", the mean over all components of the batch, or "image", per plane, then over planes.
        spacing: size of a pixel, for all or each axis, for the regions; only ratios matter.

    CUDA tensors take the torch path for the sums, which waits for the device; labels and regions come from the kernels.
    """

    def __init__(self, *, pixel_loss: object = "dicece", **options: Unpack[CCOptions]) -> None:
        super().__init__()
        if not isinstance(resolve(pixel_loss, "pixel_loss"), SeparableLoss):
            raise TypeError(
                f"expected pixel_loss of CCLoss to be a name or a pixel loss of fastinstance, got {pixel_loss!r}: "
                "any other callable sees whole images, not regions"
            )
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
        scene = Scene(self.settings, input, target, target_labels, valid_mask)
        planes, loss = scene.planes, cast("SeparableLoss", self.settings.pixel)
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


class ComponentOptions(ImageOptions, total=False):
    """Settings of the losses below; see `fastinstance.functional.instance_terms`."""

    connectivity: int | None
    min_size: int


class AveragedOptions(ComponentOptions, total=False):
    """The same, with `average`."""

    average: str


class _ComponentLoss(BaseLoss):
    """A loss of the components of a plane. CUDA tensors take the torch path, which waits for the device."""

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        target_labels: Tensor | None = None,
        valid_mask: Tensor | None = None,
    ) -> Tensor:
        """The loss: a scalar, or `[B, C]` for `reduction="none"`. Arguments as `functional.instance_terms`."""
        return self._evaluate(Scene(self.settings, input, target, target_labels, valid_mask))

    def _evaluate(self, scene: Scene) -> Tensor:
        raise NotImplementedError

    def _average(self, scene: Scene, values: Tensor, side: Side) -> Tensor:
        """Values per real instance of a side -> their mean, 0 without any."""
        settings, plane = self.settings, side.plane[: side.real]
        how = {"average": settings.average, "reduction": settings.reduction}
        poison = values.new_zeros(len(side.per_plane)) if scene.poison is None else scene.poison - 1
        # A plane without an instance passes on NaN as well.
        if settings.reduction == "mean" and settings.average == "instance":
            return scene.finish(tm.average(scene.spoil(values, plane), side, side.per_plane, **how) + poison.sum())
        means = tm.plane_mean(values, side, side.per_plane) + poison
        return scene.finish(tm.reduce_planes(means, settings.reduction))


class ComponentTverskyLoss(_ComponentLoss):
    """Tversky loss with each pixel weighted by the size of its component (CATMIL, Luu & Pavlovskiy 2026, 2604.08015).

    1 - (TP + s) / (TP + alpha·FP + beta·FN + s), TP = Σ w·p·y, FP = Σ w·p·(1 - y), FN = Σ w·(1 - p)·y, with
    w = (|n| + size_offset)^(-gamma) in component n and w = background_weight elsewhere; per plane, then their mean.

    Their objective is `DiceCELoss` + 0.3·`ComponentTverskyLoss` + 0.2·`ComponentMILLoss`, each alone as released.

    Args:
        alpha: of false positives.
        beta: of false negatives.
        gamma: 0 weighs all pixels of components alike, 1 (nearly) all components.
        size_offset: pixels, so that the tiniest components do not rule.
        background_weight: of a pixel outside of all components; with `min_size`, small components are outside.
        smooth: s.
    """

    def __init__(
        self,
        *,
        alpha: float = 0.3,
        beta: float = 0.7,
        gamma: float = 1.0,
        size_offset: float = 5.0,
        background_weight: float = 0.1,
        smooth: float = 1e-5,
        **options: Unpack[ComponentOptions],
    ) -> None:
        super().__init__()
        self.parameters_of_tversky = {
            "alpha": alpha,
            "beta": beta,
            "gamma": gamma,
            "size_offset": size_offset,
            "background_weight": background_weight,
            "smooth": smooth,
        }
        check_not_negative(**self.parameters_of_tversky)
        self.settings = Settings(**options)

    def _evaluate(self, scene: Scene) -> Tensor:
        alpha, beta, gamma, size_offset, background_weight, smooth = self.parameters_of_tversky.values()
        part, planes = scene.partition(predicted=False), scene.planes
        truth = part.target
        instances = InstanceSums(part.pixels, foreground(truth.label), False, None, ((truth.label, truth.real + 1),))
        positives = part.pixels[foreground(truth.label)]
        dense = DenseSums(positives, squared=False, pointwise=None)
        (whole,), (table,) = instance_sums(planes.values, planes.logits, (dense,), instances)
        size, found = truth.count.double(), table[1:, 0]
        weight = (size + size_offset) ** -gamma
        hit, missed = (tm.plane_sum(weight * values, truth) for values in (found, size - found))
        false = background_weight * (whole[:, 1] - whole[:, 0])
        value = 1 - (hit + smooth) / (hit + alpha * false + beta * missed + smooth)
        return scene.reduce(scene.spoil(value))

    def extra_repr(self) -> str:
        own = ", ".join(f"{name}={value:g}" for name, value in self.parameters_of_tversky.items())
        return ", ".join(filter(None, (own, super().extra_repr())))


class ComponentMILLoss(_ComponentLoss):
    """Every component is a bag that should hold one sure pixel: mean_n -log max p over n (CATMIL, 2604.08015).

    The term of Luu & Pavlovskiy 2026, whose released code gives it no gradient. Here it has its exact one, that of the
    most likely pixel of each component (of equal ones the first in raster order): a missed component is pulled up
    where it is nearest to being found. It says nothing of false positives: add it to a loss that does. 0 without
    components.

    Args:
        average: "instance", the mean over all components of the batch, or "image", per plane, then over planes.
    """

    def __init__(self, **options: Unpack[AveragedOptions]) -> None:
        super().__init__()
        self.settings = Settings(**options)

    def _evaluate(self, scene: Scene) -> Tensor:
        part, planes = scene.partition(predicted=False), scene.planes
        truth = part.target
        every = torch.ones(truth.real, dtype=torch.bool, device=planes.values.device)
        peaks = part.peaks(planes.values.detach(), every), truth.real + 1
        request = InstanceSums(part.pixels, foreground(truth.label), False, Pointwise(0.0), (peaks,))
        _, (table,) = instance_sums(planes.values, planes.logits, (), request)
        return self._average(scene, table[1:, 1], truth)


class LesionRecallLoss(_ComponentLoss):
    """Lesion-wise recall and a penalty on the false part of each predicted component, one to one.

    recall·(1 - mean_n Σ_{t=n} p / |n|) + false_positive·mean_m Σ_{q=m, t=0} p / |m|: the mean probability inside of
    each true component, found or not, and the probability outside of the ground truth of each predicted component, a
    share of its pixels. A side without components adds 0. The definition is ours.

    Args:
        recall: weight of the first part.
        false_positive: weight of the second part.
        average: "instance", means over all components of the batch, or "image", per plane, then over planes.
        threshold: a pixel is predicted where its probability is at least this.
    """

    def __init__(
        self,
        *,
        recall: float = 1.0,
        false_positive: float = 1.0,
        threshold: float = 0.5,
        **options: Unpack[AveragedOptions],
    ) -> None:
        super().__init__()
        check_not_negative(recall=recall, false_positive=false_positive)
        self.recall, self.false_positive = float(recall), float(false_positive)
        self.settings = Settings(threshold=threshold, **options)

    def _evaluate(self, scene: Scene) -> Tensor:
        part, planes = scene.partition(predicted=True), scene.planes
        truth, pred = part.target, part.pred
        request = InstanceSums(part.pixels, foreground(truth.label), False, None, ((part.cell, part.cells),))
        inside, found = part.by_side(instance_sums(planes.values, planes.logits, (), request)[1][0][:, 0])
        lacking = 1 - inside.sum(1) / truth.count
        false = found[:, 0] / pred.count
        return self.recall * self._average(scene, lacking, truth) + self.false_positive * self._average(
            scene, false, pred
        )

    def extra_repr(self) -> str:
        own = f"recall={self.recall:g}, false_positive={self.false_positive:g}"
        return ", ".join(filter(None, (own, super().extra_repr())))
