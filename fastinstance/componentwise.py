"""Losses by ground-truth component beyond the paper's: CC loss, and those of found and missed components.

The arguments that all losses share are described in `functional.instance_terms`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Unpack, cast

import numpy as np
import torch
from torch import Tensor

from . import terms as tm
from .checks import check_id_range, check_labels, comparable, reads_values
from .components import foreground, label_planes
from .criteria import resolve
from .dispatch import on_kernels, over_ranks
from .losses import BaseLoss, ImageOptions
from .ops import DenseSums, InstanceSums, Segments, instance_sums
from .parallel import Local, ProcessGroup
from .partition import Side
from .pixel import Pointwise, SeparableLoss, Sums, check_not_negative
from .planes import Planes
from .regions import nearest_component
from .scene import Call, Scene
from .segments import Found, number_ids, segment_sums
from .settings import Settings
from .torch_func import differentiable
from .triton_backend import Images, as_numbers, drop_small_ids

__all__ = ["CCLoss", "CCOptions", "ComponentMILLoss", "ComponentOptions", "ComponentTverskyLoss", "LesionRecallLoss"]


class _Options(ImageOptions, total=False):
    connectivity: int | None
    max_instances: int | None
    process_group: ProcessGroup


class CCOptions(_Options, total=False):
    """Settings of CC loss; see `fastinstance.functional.instance_terms`."""

    average: str
    spacing: float | Sequence[float] | None


class ComponentOptions(_Options, total=False):
    """Settings of the other losses; see `fastinstance.functional.instance_terms`."""

    min_size: int


class AveragedOptions(ComponentOptions, total=False):
    """The same, with `average`."""

    average: str


class _Mean(NamedTuple):
    """A part of a loss: the mean of its entries, which are components, regions or, without a number, planes."""

    total: Tensor  # [planes] float64, over the entries of each plane; NaN where the input of the plane is not finite
    number: Tensor | None  # [planes] float64 entries of each plane

    def average(self, settings: Settings) -> Tensor:
        """0 without an entry."""
        if self.number is None:
            return tm.reduce_planes(self.total, settings.reduction)
        if settings.reduction == "mean" and settings.average == "instance":
            return self.total.sum() / self.number.sum().clamp(min=1)
        return tm.reduce_planes(self.total / self.number.clamp(min=1), settings.reduction)


class _Maps:
    """The images of a call on the kernels, and maps of their components: ids `[planes, *S]` int32, and how many."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.images = Images.of(call)

    def _valid(self, image: Tensor) -> Tensor:
        return image if self.images.valid is None else image * self.images.valid

    def number(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Given ids `[planes, *S]`."""
        return number_ids(self._valid(ids.int()).contiguous())

    def true(self) -> tuple[Tensor, Tensor]:
        min_size, target = self.call.settings.min_size, self.images.target
        if not self.images.given:
            return label_planes(self._valid(target), None, self.call.connectivity, min_size)
        target = self._valid(target)
        return self.number(drop_small_ids(target, min_size) if min_size > 1 else target)

    def predicted(self) -> tuple[Tensor, Tensor]:
        values, _, mask, valid, *_ = self.images
        how = self.call.connectivity, self.call.settings.min_size
        if mask is not None:
            return label_planes(mask, None, *how)
        values = values.detach()
        if valid is not None:
            values = values.where(valid, -math.inf)
        return label_planes(values, self.images.threshold, *how)

    def sums(
        self, kind: str, *maps: tuple[Tensor, Tensor], split: bool = False, given: bool, **what: Any
    ) -> list[Found]:
        """Of the segments of one or two maps; `what` are fields of `fastinstance_kernels.segments.Request`."""
        from fastinstance_kernels.segments import Request

        values, target, _, valid, _, logits, *_ = self.images
        limit = self.call.settings.max_instances
        request = Request(kind, logits, self.call.connectivity, given, limit, **what)
        return segment_sums(values, target if split else None, valid, maps, request.encode(), limit)


class _ComponentLoss(BaseLoss):
    """A weighted sum of means over components, from sums over segments: those of torch, or of the kernels."""

    @differentiable
    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        target_labels: Tensor | None = None,
        valid_mask: Tensor | None = None,
    ) -> Tensor:
        """The loss: a scalar, or `[B, C]` for `reduction="none"`. Arguments as `functional.instance_terms`."""
        images = input, target, target_labels, valid_mask
        return self._evaluate(images, self._in_torch, self._on_kernels)

    def _evaluate(
        self,
        images: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
        in_torch: Callable[[Scene], dict[str, _Mean]],
        on_maps: Callable[[_Maps], dict[str, _Mean]],
    ) -> Tensor:
        settings = self.settings

        def local() -> Local:
            if on_kernels(settings, (), images[0]):
                maps = _Maps(Call(settings, *images))
                parts, values = on_maps(maps), maps.images.values
                shape = maps.images.batch, maps.images.channels
                dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
            else:
                scene = Scene(settings, *images)
                parts = {name: part._replace(total=scene.spoil(part.total)) for name, part in in_torch(scene).items()}
                shape, dtype = (scene.planes.batch, scene.planes.channels), scene.planes.values.dtype
            found = {name: part.average(settings).to(dtype) for name, part in parts.items()}
            if settings.reduction == "none":
                found = {name: value.view(shape) for name, value in found.items()}
            numbers = [part.total.new_ones(()) if part.number is None else part.number.sum() for part in parts.values()]
            return Local(found, math.prod(shape), torch.stack([numbers[0], numbers[-1]]))

        found = over_ranks(settings, {type(self).__name__: 1.0, **self._weights}, images[0], local)
        first, *rest = (weight * found[name] for name, weight in self._weights.items() if name in found)
        return sum(rest, first)

    @property
    def _weights(self) -> dict[str, float]:
        """Of each part by name, and whatever else the ranks of a process group have to agree on."""
        raise NotImplementedError

    def _in_torch(self, scene: Scene) -> dict[str, _Mean]:
        raise NotImplementedError

    def _on_kernels(self, maps: _Maps) -> dict[str, _Mean]:
        raise NotImplementedError


class CCLoss(_ComponentLoss):
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
        max_instances: limit on the regions of a plane, as in `functional.instance_terms`.
    """

    def __init__(self, *, pixel_loss: object = "dicece", **options: Unpack[CCOptions]) -> None:
        super().__init__()
        if not isinstance(resolve(pixel_loss, "pixel_loss"), SeparableLoss):
            raise TypeError(
                f"expected pixel_loss of CCLoss to be a name or a pixel loss of fastinstance, got {pixel_loss!r}: "
                "any other callable sees whole images, not regions"
            )
        self._set(CCOptions, options, pixel_loss=pixel_loss)

    @differentiable
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
            target_regions: `[B, C, *S]` integer ids of regions computed once beforehand, 0 = in no region; then neither
                labels nor distances are computed.

        The other arguments are those of `functional.instance_terms`.
        """
        return self._evaluate(
            (input, target, target_labels, valid_mask),
            lambda scene: self._in_torch(scene, target_regions),
            lambda maps: self._on_kernels(maps, target_regions),
        )

    @property
    def _weights(self) -> dict[str, float]:
        return {"component": 1.0}

    @property
    def _loss(self) -> SeparableLoss:
        return cast("SeparableLoss", self.settings.pixel)

    def _planes_of(self, call: Call, regions: Tensor) -> Tensor:
        """Given regions, checked, as planes `[B·C, *S]`."""
        input = call.images[0]
        check_labels("target_regions", regions, "input", input)
        if reads_values(regions):
            check_id_range("target_regions", regions)
        first = 0 if self.settings.include_background else 1
        return comparable(regions[:, first:]).reshape(-1, *input.shape[2:])

    def _in_torch(self, scene: Scene, regions: Tensor | None = None) -> dict[str, _Mean]:
        planes, loss = scene.planes, self._loss
        if regions is None:
            part = scene.partition(predicted=False)
            image = torch.zeros(planes.target.shape, dtype=torch.int32, device=planes.values.device)
            image.view(-1).scatter_(0, part.pixels, part.target.label.int())
            ids, positives = nearest_component(image, scene.spacing), part.pixels
        else:
            ids, positives = self._planes_of(scene, regions), foreground(planes.target)
        segments, side, omega = _segments(ids, planes, positives)
        sums = DenseSums(positives, loss.squared, loss.pointwise, segments=segments)
        ((table,), _) = instance_sums(planes.values, planes.logits, (sums,), None)
        number = torch.bincount(segments.target_row, minlength=segments.rows)[1:].double()
        value = loss.reduce(Sums(table[1:, 0], table[1:, 1], number, table[1:, 2]), omega)
        return {"component": _Mean(tm.plane_sum(value, side), side.per_plane.double())}

    def _on_kernels(self, maps: _Maps, regions: Tensor | None = None) -> dict[str, _Mean]:
        given = regions is not None or maps.images.given
        if regions is None:
            labels, counts = maps.true()
            segments = nearest_component(labels, maps.call.spacing), counts
        else:
            segments = maps.number(self._planes_of(maps.call, regions))
        (found,) = maps.sums("form", segments, split=True, given=given, loss=as_numbers(self._loss), outside=True)
        return {"component": _Mean(found.value, found.number)}


def _runs(flat: Tensor, pixels: int) -> Tensor:
    """Flat index of the first pixel of each run of one id; no run goes on into another plane of so many pixels."""
    begins = torch.ones(flat.shape, dtype=torch.bool, device=flat.device)
    if flat.device.type == "cpu":
        ids = flat.numpy()  # several times as fast as torch where the result is a mask
        np.not_equal(ids[1:], ids[:-1], out=begins.numpy()[1:])
    else:
        torch.ne(flat[1:], flat[:-1], out=begins[1:])
    begins[::pixels] = True
    return foreground(begins)


def _segments(regions: Tensor, planes: Planes, positives: Tensor) -> tuple[Segments, Side, Tensor]:
    """The regions of all planes as segments, and for each region its plane and its number of valid pixels.

    Segment 0 is what belongs to no region. A plane without a region is one.
    """
    pixels = math.prod(planes.size)
    if planes.valid is not None:
        regions = regions * planes.valid
    flat = regions.reshape(-1)
    start = _runs(flat, pixels)
    number = torch.arange(len(planes.omega) + 1, device=flat.device)

    def keys(place: Tensor) -> Tensor:
        several = torch.searchsorted(place, number * pixels).diff()
        plane = (number[:-1] << 32).repeat_interleave(several, output_size=len(place))
        return plane + flat.index_select(0, place).long()

    run = keys(start)
    distinct = torch.unique(run)
    owner, real = distinct >> 32, (distinct & 0xFFFFFFFF) > 0
    whole = torch.bincount(owner[real], minlength=len(planes.omega))[owner] == 0
    real |= whole
    place = real.cumsum(0) * real
    row, target_row = (place[torch.searchsorted(distinct, key)] for key in (run, keys(positives)))
    length = torch.cat([start[1:], start.new_tensor([flat.numel()])]) - start
    rows = int(real.sum()) + 1
    omega = torch.bincount(row, length.double(), rows)[1:]
    plane, whole = owner[real], whole[real]
    per_plane = torch.bincount(plane, minlength=len(planes.omega))
    side = Side(label=start.new_empty(0), count=omega.long(), per_plane=per_plane, plane=plane)
    return Segments(start, row, target_row, rows), side, omega.where(~whole, planes.omega[plane])


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
        self._set(ComponentOptions, options)

    @property
    def _weights(self) -> dict[str, float]:
        return {"tversky": 1.0, **self.parameters_of_tversky}

    def _value(self, hit: Tensor, size: Tensor, outside: Tensor) -> dict[str, _Mean]:
        """From Σ w p and Σ w over the components of each plane, and Σp outside of them."""
        alpha, beta, _, _, background_weight, smooth = self.parameters_of_tversky.values()
        hit_or_not = alpha * background_weight * outside + beta * (size - hit)
        return {"tversky": _Mean(1 - (hit + smooth) / (hit + hit_or_not + smooth), None)}

    def _in_torch(self, scene: Scene) -> dict[str, _Mean]:
        part, planes = scene.partition(predicted=False), scene.planes
        truth = part.target
        instances = InstanceSums(part.pixels, truth.listed, False, None, ((truth.label, truth.real + 1),))
        positives = part.pixels[truth.listed]
        dense = DenseSums(positives, squared=False, pointwise=None)
        (whole,), (table,) = instance_sums(planes.values, planes.logits, (dense,), instances)
        size = truth.count.double()
        weight = (size + self.parameters_of_tversky["size_offset"]) ** -self.parameters_of_tversky["gamma"]
        hit, total = (tm.plane_sum(weight * values, truth) for values in (table[1:, 0], size))
        return self._value(hit, total, whole[:, 1] - whole[:, 0])

    def _on_kernels(self, maps: _Maps) -> dict[str, _Mean]:
        offset, power = self.parameters_of_tversky["size_offset"], self.parameters_of_tversky["gamma"]
        (found,) = maps.sums(
            "weighted", maps.true(), given=maps.images.given, outside=True, offset=float(offset), power=float(power)
        )
        return self._value(found.value, found.size, found.rest)

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
        self._set(AveragedOptions, options)

    @property
    def _weights(self) -> dict[str, float]:
        return {"component": 1.0}

    def _in_torch(self, scene: Scene) -> dict[str, _Mean]:
        part, planes = scene.partition(predicted=False), scene.planes
        truth = part.target
        every = torch.ones(truth.real, dtype=torch.bool, device=planes.values.device)
        peaks = part.peaks(planes.values.detach(), every), truth.real + 1
        request = InstanceSums(part.pixels, truth.listed, False, Pointwise(0.0), (peaks,))
        _, (table,) = instance_sums(planes.values, planes.logits, (), request)
        return {"component": _Mean(tm.plane_sum(table[1:, 1], truth), truth.per_plane.double())}

    def _on_kernels(self, maps: _Maps) -> dict[str, _Mean]:
        (found,) = maps.sums("peak", maps.true(), given=maps.images.given)
        return {"component": _Mean(found.value, found.number)}


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
        self._set(AveragedOptions, options, threshold=threshold)

    @property
    def _weights(self) -> dict[str, float]:
        return {"component": self.recall, "false_part": self.false_positive}

    def _in_torch(self, scene: Scene) -> dict[str, _Mean]:
        part, planes = scene.partition(predicted=True), scene.planes
        truth, pred = part.target, part.pred
        request = InstanceSums(part.pixels, truth.listed, False, None, ((part.cell, part.cells),))
        inside, found = part.by_side(instance_sums(planes.values, planes.logits, (), request)[1][0][:, 0])
        lacking = 1 - inside.sum(1) / truth.count
        false = found[:, 0] / pred.count
        return {
            "component": _Mean(tm.plane_sum(lacking, truth), truth.per_plane.double()),
            "false_part": _Mean(tm.plane_sum(false, pred), pred.per_plane.double()),
        }

    def _on_kernels(self, maps: _Maps) -> dict[str, _Mean]:
        found, false = maps.sums("weighted", maps.true(), maps.predicted(), given=maps.images.given, power=1.0)
        return {
            "component": _Mean(found.number - found.value, found.number),
            "false_part": _Mean(false.value, false.number),
        }

    def extra_repr(self) -> str:
        own = f"recall={self.recall:g}, false_positive={self.false_positive:g}"
        return ", ".join(filter(None, (own, super().extra_repr())))
