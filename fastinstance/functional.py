"""Stateless losses: checks, planes, partition, sums, terms.

The arguments that all functions share are described in `instance_terms`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from . import masked
from . import terms as tm
from .backend import backend_for
from .checks import (
    CONNECTIVITIES,
    check_activation,
    check_choice,
    check_connectivity,
    check_flags,
    check_images,
    check_mask,
    check_max_instances,
    check_per_axis,
    check_probabilities,
    check_size,
    check_threshold,
    check_values,
    comparable,
    reads_values,
)
from .components import foreground, label_planes
from .criteria import Criterion, advise, resolve
from .fused import fused_terms
from .ops import DenseSums, InstanceSums, instance_sums
from .parallel import ProcessGroup, check_process_group, global_factors, report_failure, resolve_group
from .partition import Partition, partition
from .pixel import Dice, InverseWeightedDice, SeparableLoss, Sums, check_not_negative
from .planes import Planes, activate, to_planes
from .terms import BlobTerms, InstanceTerms
from .torch_func import differentiable

__all__ = ["BlobTerms", "InstanceTerms", "blob_terms", "instance_terms", "label", "pixel_loss"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of a loss, checked; the fields are the keyword arguments of `instance_terms`."""

    pixel_loss: object = "gdf"
    instance_loss: object = "dice"
    center_loss: object = "dice"
    average: str = "instance"
    include_background: bool = True
    to_onehot_y: bool = False
    sigmoid: bool = False
    softmax: bool = False
    other_act: Callable[[Tensor], Tensor] | None = None
    threshold: float = 0.5
    connectivity: int | None = None
    center_size: int | Sequence[int] = 3
    min_size: int = 0
    spacing: float | Sequence[float] | None = None
    pred_normalizer: str = "pred"
    missed: str = "none"
    missed_weight: float = 0.3
    mask_target: bool = True
    proximity_reduction: str = "squared"
    weight_by: str | Callable[[Tensor], Tensor] = "count"
    reduction: str = "mean"
    max_instances: int | None = None
    process_group: ProcessGroup = None
    words: str = field(default="", init=False, repr=False, compare=False)
    """With a process group: the settings as every rank would write them, without addresses."""

    def __post_init__(self) -> None:
        flags = ("include_background", "to_onehot_y", "sigmoid", "softmax", "mask_target")
        check_flags(**{name: getattr(self, name) for name in flags})
        check_activation(sigmoid=self.sigmoid, softmax=self.softmax, other_act=self.other_act)
        check_choice("average", self.average, ("instance", "image"))
        check_choice("pred_normalizer", self.pred_normalizer, ("pred", "gt"))
        check_choice("reduction", self.reduction, ("mean", "sum", "none"))
        check_choice("missed", self.missed, ("none", "soft"))
        check_not_negative(missed_weight=self.missed_weight)
        if self.missed == "none" and self.missed_weight != Settings.missed_weight:
            raise ValueError(
                f"expected missed='soft' with a missed_weight, got missed='none', missed_weight={self.missed_weight}; "
                "set missed='soft', or leave missed_weight out"
            )
        check_choice("proximity_reduction", self.proximity_reduction, ("squared", "sum"))
        if not callable(self.weight_by):
            check_choice("weight_by", self.weight_by, ("count", "size"))
        check_threshold("threshold", self.threshold)
        check_size("min_size", self.min_size)
        check_max_instances(self.max_instances)
        check_process_group(self.process_group)
        several = [len(value) for value in (self.center_size, self.spacing) if isinstance(value, Sequence)]
        self.for_axes(3 if 3 in several or self.connectivity in CONNECTIVITIES[3] else 2)
        for name in ("pixel_loss", "instance_loss", "center_loss"):
            self._check_nested(name)
        if self.process_group is not None:
            losses = {"pixel_loss": self.pixel, "instance_loss": self.instance, "center_loss": self.center}
            shown = {**self.changed, **losses}
            del shown["process_group"]
            object.__setattr__(self, "words", re.sub(r" at 0x[0-9a-fA-F]+", "", f"settings {shown}"))

    def for_axes(self, axes: int) -> tuple[int, tuple[int, ...], tuple[float, ...]]:
        """`connectivity`, `center_size` and `spacing` for images of so many axes; ValueError if they do not fit."""
        return (
            check_connectivity(self.connectivity, axes),
            check_per_axis("center_size", self.center_size, axes, integer=True),
            check_per_axis("spacing", 1.0 if self.spacing is None else self.spacing, axes, integer=False),
        )

    @property
    def changed(self) -> dict[str, object]:
        """The settings that differ from the defaults."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init and getattr(self, f.name) != f.default}

    def _check_nested(self, name: str) -> None:
        """A module given as a pixel loss must not bring an activation of its own that differs from ours."""
        loss = getattr(self, name)
        resolved = resolve(loss, name)
        inner = getattr(loss, "settings", None)
        if isinstance(inner, Settings):
            if isinstance(resolved, Criterion):
                raise TypeError(f"expected {name} to be a loss of pixels, got {loss!r}, which is one of instances")
            for option in ("sigmoid", "softmax", "other_act"):
                if getattr(inner, option) and getattr(inner, option) != getattr(self, option):
                    raise ValueError(
                        f"expected {name} without an activation of its own, got {option}={getattr(inner, option)}; "
                        f"set {option} on the outer loss only"
                    )
        if isinstance(resolved, Criterion):
            advise(resolved)

    @property
    def pixel(self) -> SeparableLoss | Criterion:
        return resolve(self.pixel_loss, "pixel_loss")

    @property
    def instance(self) -> SeparableLoss | Criterion:
        return resolve(self.instance_loss, "instance_loss")

    @property
    def center(self) -> SeparableLoss | Criterion:
        return resolve(self.center_loss, "center_loss")


def _plain(tensor: Tensor) -> Tensor:
    """A subclass, such as MONAI's MetaTensor, as the tensor that it is; the gradient flows back to it."""
    return tensor if type(tensor) is Tensor else tensor.as_subclass(Tensor)


class Call:
    """One checked call: the images, and the settings that depend on their number of axes.

    `known` says that the caller has checked the values, under names of its own.
    """

    def __init__(
        self,
        settings: Settings,
        input: Tensor,
        target: Tensor,
        target_labels: Tensor | None,
        valid_mask: Tensor | None,
        *,
        known: bool = False,
    ) -> None:
        self.settings = settings
        check_images(
            input,
            target,
            target_labels,
            valid_mask,
            include_background=settings.include_background,
            to_onehot_y=settings.to_onehot_y,
            softmax=settings.softmax,
        )
        labels, valid = (None if image is None else comparable(_plain(image)) for image in (target_labels, valid_mask))
        self.images = _plain(input), comparable(_plain(target)), labels, valid
        self.connectivity, self.center_size, self.spacing = settings.for_axes(input.ndim - 2)
        if reads_values(target) and not known:
            check_values(*self.images[1:], channels=input.shape[1], to_onehot_y=settings.to_onehot_y)

    def in_planes(self) -> Planes:
        settings = self.settings
        input, target, target_labels, valid_mask = self.images
        return to_planes(
            input,
            target,
            include_background=settings.include_background,
            to_onehot_y=settings.to_onehot_y,
            sigmoid=settings.sigmoid,
            softmax=settings.softmax,
            other_act=settings.other_act,
            threshold=settings.threshold,
            target_labels=target_labels,
            valid_mask=valid_mask,
        )


class Scene(Call):
    """A call with its planes, partition and sums, shared by all terms."""

    def __init__(self, settings: Settings, *images: Tensor | None, known: bool = False) -> None:
        super().__init__(settings, *images, known=known)  # pyright: ignore[reportArgumentType]
        self.planes = self.in_planes()
        self.poison = _poison(self.planes)

    @cached_property
    def probabilities(self) -> Tensor:
        """[planes, P], NaN in value and derivative where the input of the plane is not finite."""
        values = self.planes.values
        p = values.sigmoid() if self.planes.logits else values
        return p if self.poison is None else p * self.poison[:, None].to(p.dtype)

    def partition(self, predicted: bool) -> Partition:
        return partition(
            self.planes.target,
            self.planes.predicted if predicted else None,
            labels=self.planes.labels,
            connectivity=self.connectivity,
            min_size=self.settings.min_size,
        )

    def dense_request(self, part: Partition | None) -> DenseSums:
        loss, planes = self.settings.pixel, self.planes
        positives = foreground(planes.target) if part is None else part.pixels[foreground(part.raw_target.label)]
        return DenseSums(positives, loss.squared, loss.pointwise, planes.categorical)

    def spoil(self, values: Tensor, plane: Tensor | None = None) -> Tensor:
        """Values per plane, or per row of `plane`, NaN where the input of the plane is not finite."""
        if self.poison is None:
            return values
        return values * (self.poison if plane is None else self.poison[plane])

    def reduce(self, values: Tensor) -> Tensor:
        """Values per plane -> what the caller gets."""
        return self.finish(tm.reduce_planes(values, self.settings.reduction))

    def finish(self, value: Tensor) -> Tensor:
        planes = self.planes
        value = value.to(planes.values.dtype)
        return value.view(planes.batch, planes.channels) if self.settings.reduction == "none" else value

    def criterion_seg(self, criterion: Criterion) -> Tensor:
        """The pixel term of any callable: one call on all images, or one for each plane where planes are kept apart."""
        planes, p = self.planes, self.probabilities
        if self.settings.reduction == "mean":
            shape = (planes.batch, planes.channels, *planes.size)
            return self.finish(masked.image_value(p.view(shape), planes.target.view(shape), criterion))
        return self.reduce(masked.plane_values(p, planes.target.flatten(1), criterion, planes.size))

    def seg(self, whole: Tensor, positives: Tensor, part: Partition | None, raw_instances: Tensor | None) -> Tensor:
        """The pixel term from the sums of each plane and, for the inverse-weighted Dice, of each instance."""
        planes, loss = self.planes, self.settings.pixel
        assert isinstance(loss, SeparableLoss)
        if self.poison is not None:  # before the channels of an image are joined
            whole = whole * self.poison[:, None]
        plane = positives // planes.values.shape[1]
        number = torch.bincount(plane, minlength=len(planes.omega)).double()
        sums = Sums(whole[:, 0], whole[:, 1], number, whole[:, 2])
        if isinstance(loss, InverseWeightedDice) and part is not None and raw_instances is not None:
            value = tm.inverse_weighted_dice(loss, raw_instances, sums, part.raw_target, planes.omega)
        else:
            shape = (planes.batch, planes.channels)
            image = Sums(*(column.view(shape) for column in sums))
            value = loss.reduce_channels(image, planes.omega.view(shape), categorical=planes.categorical).flatten()
        return self.reduce(self.spoil(value))


def _poison(planes: Planes) -> Tensor | None:
    """1 for planes of finite values and NaN, in value and derivative, for others; None if all are finite.

    Labels turn NaN into background, so without this a NaN would vanish from every instance term.
    """
    values = planes.values
    if reads_values(values):
        low, high = (bound.item() for bound in values.detach().aminmax())
        if not planes.logits:
            check_probabilities(low, high)
        if math.isfinite(low) and math.isfinite(high):
            return None
    finite = values.detach().isfinite().all(1, keepdim=True)
    factor = torch.zeros_like(values[:, :1]).masked_fill(~finite, math.nan)
    return 1 + (values * factor).nan_to_num(nan=math.nan, posinf=0, neginf=0).sum(1).double()


def _as_numbers(loss: SeparableLoss | Criterion, wanted: bool) -> tuple[tuple[float, ...], bool, float] | None:
    """A loss in the words of the kernels."""
    if not wanted or isinstance(loss, Criterion):
        return None
    form = loss.form
    return form.numbers, form.squared, -1.0 if form.gamma is None else form.gamma


def on_kernels(settings: Settings, wanted: Collection[str], input: Tensor) -> bool:
    """Whether the kernels compute these terms; a callable (a loss, or `weight_by`) needs torch."""
    if not isinstance(input, Tensor) or callable(settings.weight_by) or backend_for(input) != "triton":
        return False
    needs = {"seg": settings.pixel, "center": settings.center}
    needs |= dict.fromkeys(("instance_gt", "instance_pred", "proximity", "blob"), settings.instance)
    return not any(isinstance(needs.get(name), Criterion) for name in wanted)


def drop_small_ids(ids: Tensor, min_size: int) -> Tensor:
    """Ids `[planes, *S]`, 0 where their plane holds them fewer than `min_size` times; does not wait for a device."""
    flat = ids.flatten(1).contiguous()
    ordered = flat.sort(1).values
    count = torch.searchsorted(ordered, flat, right=True) - torch.searchsorted(ordered, flat)
    return ids * (count >= min_size).view(ids.shape)


class Images(NamedTuple):
    """The images of a call as the kernels take them: planes `[B·C, *S]`, contiguous."""

    values: Tensor
    target: Tensor  # of any real dtype, or the given ids, int32
    predicted: Tensor | None  # bool; None: where `values >= threshold`
    valid: Tensor | None  # bool
    given: bool  # `target` holds ids
    logits: bool
    threshold: float
    batch: int
    channels: int

    @classmethod
    def of(cls, call: Call) -> Images:
        settings = call.settings
        input, target, labels, valid_mask = call.images
        batch, channels, *size = input.shape
        logits, threshold = settings.sigmoid or settings.softmax, settings.threshold
        predicted = valid = None
        if settings.softmax or settings.to_onehot_y or not settings.include_background or settings.min_size > 1:
            planes = call.in_planes()
            channels = planes.channels
            values, truth, predicted, valid = planes.values, planes.target, planes.predicted, planes.valid
            labels = planes.labels
        else:
            values, truth = input, target.expand(-1, channels, *size)
            if valid_mask is not None:
                valid = (valid_mask > 0).expand(-1, channels, *size)
            if settings.other_act is not None:
                if valid is not None:  # NaN would come back with the slope of the activation
                    values = values.where(valid, values.new_zeros(()))
                values = activate(settings.other_act, values)
            if settings.sigmoid:
                threshold = math.log(threshold / (1 - threshold))
        given = labels is not None
        if labels is not None:
            truth = labels.int()
        shape = (batch * channels, *size)
        values, truth = (image.reshape(shape).contiguous() for image in (values, truth))
        predicted, valid = (
            None if image is None else image.reshape(shape).contiguous() for image in (predicted, valid)
        )
        return cls(values, truth, predicted, valid, given, logits, threshold, batch, channels)


class Local(NamedTuple):
    """The terms of the batch of this rank, and the number of entries that each is the mean of."""

    found: dict[str, Tensor]
    planes: int
    entries: Tensor  # [2] float64: of `instance_gt` (or planes of `blob`), of `instance_pred`


def _fused(call: Call, weights: Mapping[str, float]) -> tuple[Local, Tensor]:
    """The terms named in `weights` (blob loss: "seg" and "blob") and their weighted sum, from the kernels."""
    from fastinstance_kernels.engine import Request

    settings = call.settings
    values, truth, predicted, valid, given, logits, threshold, batch, channels = Images.of(call)

    def run(
        weights: Mapping[str, float], truth: Tensor, predicted: Tensor | None, valid: Tensor | None
    ) -> tuple[Local, Tensor]:
        order = ("seg", "blob") if "blob" in weights else InstanceTerms._fields
        own = any(name in weights for name in ("instance_gt", "instance_pred", "proximity", "blob"))
        false_rates = "false_gt" in weights or "false_pred" in weights
        request = Request(
            channels=channels,
            logits=logits,
            categorical=settings.softmax,
            threshold=threshold,
            connectivity=call.connectivity,
            seg=_as_numbers(settings.pixel, "seg" in weights),  # pyright: ignore[reportArgumentType]
            own=_as_numbers(settings.instance, own),  # pyright: ignore[reportArgumentType]
            center=_as_numbers(settings.center, "center" in weights),  # pyright: ignore[reportArgumentType]
            dice=Dice().form.numbers,
            inverse="seg" in weights and isinstance(settings.pixel, InverseWeightedDice),
            blob="blob" in weights,
            false_rates=false_rates,
            proximity="proximity" in weights,
            average=settings.average,
            reduction=settings.reduction,
            by_pred=settings.pred_normalizer == "pred",
            by_size=settings.weight_by == "size",
            soft=settings.missed == "soft" and false_rates,
            missed_weight=float(settings.missed_weight),
            whole=not settings.mask_target,
            summed=settings.proximity_reduction == "sum",
            center_size=call.center_size,
            spacing=call.spacing,
            max_instances=settings.max_instances,
            differentiable=values.requires_grad and torch.is_grad_enabled(),
        ).encode()
        factors = [float(weights.get(name, 0.0)) for name in order] + [0.0] * (7 - len(order))
        found, total, entries = fused_terms(
            values,
            truth,
            predicted,
            valid,
            weights=factors,
            given=given,
            request=request,
            max_instances=settings.max_instances,
        )
        view = (batch, channels) if settings.reduction == "none" else ()
        terms = zip(order, found.unbind(0), strict=False)
        by_name = {name: value.view(view) for name, value in terms if name in weights}
        return Local(by_name, batch * channels, entries), total.view(view)

    if settings.min_size <= 1:
        return run(weights, truth, predicted, valid)
    # Components that are too small stay in the pixel term.
    assert predicted is not None

    def keep(mask: Tensor) -> Tensor:
        return label_planes(mask, None, call.connectivity, settings.min_size)[0] > 0

    kept = drop_small_ids(truth, settings.min_size) if given else keep(truth)
    rest = {name: weight for name, weight in weights.items() if name != "seg"}
    local, total = run(rest, kept, keep(predicted), valid)
    if "seg" in weights:
        seg, share = run({"seg": weights["seg"]}, truth, predicted, valid)
        local, total = local._replace(found=seg.found | local.found), total + share
    return local, total


_COUNTED = {"instance_gt": 1, "blob": 1, "component": 1, "instance_pred": 2, "false_part": 2}
"""Terms that `average="instance"` does not average over planes, and which of [planes, entries] it does."""


def over_ranks(
    settings: Settings, wanted: Collection[str], input: Tensor, local: Callable[[], Local]
) -> dict[str, Tensor]:
    """The terms of `local`, scaled so that their mean over the ranks is that of the global batch."""
    group = resolve_group(settings.process_group)
    if group is None:
        return local().found
    try:
        found, planes, entries = local()
    except Exception:
        if isinstance(input, Tensor):
            report_failure(group, input.device)
        raise
    unit = 2**20 if callable(settings.weight_by) else 1  # only ratios matter, and integers do not round
    counts = (unit * torch.cat([entries.new_full((1,), planes), entries])).round().long()
    terms = f"terms {dict(wanted) if isinstance(wanted, Mapping) else list(wanted)} of {input.shape[1]} channels"
    factors = global_factors(group, counts, settings.words, terms, mean=settings.reduction == "mean")
    if settings.reduction == "none":
        return found
    place = _COUNTED if settings.average == "instance" else {}
    return {name: value * factors[place.get(name, 0)].to(value.dtype) for name, value in found.items()}


@differentiable
def weighted_sum(
    settings: Settings,
    weights: Mapping[str, float],
    input: Tensor,
    target: Tensor,
    target_labels: Tensor | None = None,
    valid_mask: Tensor | None = None,
) -> Tensor:
    """Sum of weight · term over the named terms, of `InstanceTerms` or ("seg", "blob") of `BlobTerms`."""
    alone = resolve_group(settings.process_group) is None
    if alone and on_kernels(settings, weights, input):
        call = Call(settings, input, target, target_labels, valid_mask)
        return _fused(call, weights)[1]
    images = input, target, target_labels, valid_mask
    blob = "blob" in weights
    found = evaluate_blob(settings, *images)._asdict() if blob else evaluate(settings, weights, *images)
    first, *rest = (weight * found[name] for name, weight in weights.items())
    return sum(rest, first)


@differentiable
def evaluate(
    settings: Settings,
    wanted: Collection[str],
    input: Tensor,
    target: Tensor,
    target_labels: Tensor | None = None,
    valid_mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """The wanted terms of `InstanceTerms` by name; what nobody wants is not computed."""
    images = input, target, target_labels, valid_mask
    return over_ranks(settings, wanted, input, lambda: _evaluate(settings, wanted, *images))


def _evaluate(
    settings: Settings,
    wanted: Collection[str],
    input: Tensor,
    target: Tensor,
    target_labels: Tensor | None,
    valid_mask: Tensor | None,
) -> Local:
    if on_kernels(settings, wanted, input):
        return _fused(Call(settings, input, target, target_labels, valid_mask), dict.fromkeys(wanted, 0.0))[0]
    scene = Scene(settings, input, target, target_labels, valid_mask)
    planes, pixel, loss = scene.planes, settings.pixel, settings.instance
    by_instance = any(name != "seg" for name in wanted)
    weighted = "seg" in wanted and isinstance(settings.pixel, InverseWeightedDice)
    soft = settings.missed == "soft" and not {"false_gt", "false_pred"}.isdisjoint(wanted)
    part = scene.partition(predicted=by_instance) if by_instance or weighted else None
    request, tables = None, []
    if part is not None:
        tables = [(part.cell, part.cells)] if by_instance else []
        if soft:  # a largest probability is a sum over one pixel
            tables.append((part.peaks(planes.values.detach(), part.missed), part.target.real + 1))
        if weighted:
            tables.append((part.raw_target.label, part.raw_target.real + 1))
        own = not {"instance_gt", "instance_pred", "proximity"}.isdisjoint(wanted)
        request = InstanceSums(
            part.pixels,
            foreground(part.target.label),
            own and loss.squared,
            loss.pointwise if own else None,
            tuple(tables),
        )
    dense = [scene.dense_request(part)] if "seg" in wanted and not isinstance(pixel, Criterion) else []
    whole, tables = instance_sums(planes.values, planes.logits, tuple(dense), request)

    result: dict[str, Tensor] = {}
    number = len(planes.omega)
    if "seg" in wanted and isinstance(pixel, Criterion):
        result["seg"] = scene.criterion_seg(pixel)
    elif "seg" in wanted:
        result["seg"] = scene.seg(whole[0], dense[0].target, part, tables[-1][1:, 0] if weighted else None)
    if part is None or not by_instance:
        return Local(result, number, planes.omega.new_zeros(2))

    features = tm.Features.of(part, tables[0])
    truth, pred = part.target, part.pred
    weight_gt, weight_pred = (tm.instance_weights(side, settings.weight_by) for side in (truth, pred))
    gt_entries = pred_entries = tm.plane_sum(weight_gt, truth)
    if settings.pred_normalizer == "pred":
        pred_entries = tm.plane_sum(weight_pred, pred)
    if not {"instance_gt", "instance_pred", "proximity"}.isdisjoint(wanted):
        mask = settings.mask_target
        if isinstance(loss, Criterion):
            loss_gt, loss_pred = masked.instance_entries(part, scene.probabilities, loss, mask_target=mask)
        else:
            loss_gt, loss_pred = tm.instance_entries(part, features, planes.omega, loss, mask_target=mask)
        loss_gt, loss_pred = scene.spoil(loss_gt, truth.plane), scene.spoil(loss_pred, pred.plane)
        how = {"average": settings.average, "reduction": settings.reduction}
        if "instance_gt" in wanted:
            result["instance_gt"] = scene.finish(tm.average(weight_gt * loss_gt, truth, gt_entries, **how))
        if "instance_pred" in wanted:
            result["instance_pred"] = scene.finish(tm.average(weight_pred * loss_pred, pred, pred_entries, **how))
        if "proximity" in wanted:
            squared = settings.proximity_reduction == "squared"
            result["proximity"] = scene.reduce(tm.proximity(part, loss_gt, loss_pred, scene.spacing, squared=squared))
    if "center" in wanted:
        boxes, center = tm.center_boxes(part, features, planes.valid, scene.center_size), settings.center
        if isinstance(center, Criterion):
            maps = tm.center_maps(part, boxes, planes.values.dtype)
            values = masked.plane_values(*maps, center, planes.size)
        else:
            values = center.reduce(tm.center_sums(part, boxes, center), planes.omega)
        result["center"] = scene.reduce(scene.spoil(values))
    if not {"false_gt", "false_pred"}.isdisjoint(wanted):
        soft_alone = tm.soft_alone(part, features, tables[1][1:, 0], settings.missed_weight) if soft else None
        rates = tm.false_rates(part, features, (weight_gt, weight_pred), soft_alone)
        for name, rate in zip(("false_gt", "false_pred"), rates, strict=True):
            result[name] = scene.reduce(scene.spoil(rate))
    return Local(result, number, torch.stack([gt_entries.sum(), pred_entries.sum()]))


def instance_terms(
    input: Tensor,
    target: Tensor,
    *,
    pixel_loss: object = "gdf",
    instance_loss: object = "dice",
    center_loss: object = "dice",
    average: str = "instance",
    include_background: bool = True,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: Callable[[Tensor], Tensor] | None = None,
    threshold: float = 0.5,
    connectivity: int | None = None,
    center_size: int | Sequence[int] = 3,
    min_size: int = 0,
    spacing: float | Sequence[float] | None = None,
    pred_normalizer: str = "pred",
    missed: str = "none",
    missed_weight: float = 0.3,
    mask_target: bool = True,
    proximity_reduction: str = "squared",
    weight_by: str | Callable[[Tensor], Tensor] = "count",
    reduction: str = "mean",
    max_instances: int | None = None,
    process_group: ProcessGroup = None,
    target_labels: Tensor | None = None,
    valid_mask: Tensor | None = None,
) -> InstanceTerms:
    """All terms of the instance loss family (Rachmadi, Byra, Skibbe 2024, Eqs. 2 to 10), from one pass.

    Args:
        input: `[B, C, H, W]` or `[B, C, D, H, W]`, float16, bfloat16, float32 or float64. Logits with `sigmoid` or
            `softmax`, anything with `other_act`, else probabilities. Each class of each image is a plane of its own.
        target: `[B, C, *S]`, binary of any dtype; `[B, 1, *S]` is one mask for all channels (with `softmax` there must
            be one class besides the background that is dropped), or with `to_onehot_y` class indices.
        pixel_loss: of the whole image (`seg`): a name ("dice", "ce", "dicece", "generalized_dice", "focal", "gdf",
            "tversky", "inverse_weighted_dice"), a pixel loss of this library, or any callable `(P, G) -> scalar`. P are
            probabilities, G 0 or 1, `[B, C, *S]` (`[1, 1, *S]` for each plane on its own if `reduction` is not
            "mean"); pixels that are not valid are 0 in both. MONAI's DiceLoss, TverskyLoss and GeneralizedDiceLoss
            without activation are recognised.
        instance_loss: of one instance, likewise; a callable sees `[1, 1, *S]`, 0 where P and G are masked. It must
            work under `torch.func.vmap`, and is much slower than a separable loss.
        center_loss: of the centre maps, likewise.
        average: "instance" averages `instance_gt` and `instance_pred` over all instances of the batch; "image" per
            plane, then over planes. The other terms are always averaged per plane, then over planes.
        include_background: False drops channel 0 after the activation.
        to_onehot_y: the target holds class indices.
        sigmoid: the input holds logits of independent classes.
        softmax: the input holds logits of exclusive classes.
        other_act: maps the input to probabilities.
        threshold: a pixel is predicted where its probability is at least this.
        connectivity: of the components, 4 or 8 in 2D, 6, 18 or 26 in 3D; None is full connectivity.
        center_size: side in pixels of the box that stands for an instance in the centre maps, for all or each axis.
        min_size: components with fewer pixels count as background in all instance terms.
        spacing: size of a pixel, for all or each axis, for the boxes of `proximity`; the unit cancels.
        pred_normalizer: "pred" averages `instance_pred` over predicted instances; "gt" divides the sum by the number of
            ground-truth instances, as Eq. 3 is printed.
        missed: "soft" gives the false rates a derivative where theirs vanishes: to `false_gt` it adds `missed_weight` ·
            (1 - the largest probability in the instance) for each missed instance, to `false_pred` `missed_weight` ·
            (the mean probability of the component) for each false one, averaged as the rate. The derivative of the
            largest is that of its first pixel in raster order.
        missed_weight: see `missed`; only with "soft".
        mask_target: False keeps, in `instance_gt` and through it in `proximity`, the probabilities below `threshold`
            inside of the ground-truth instance, which Eq. 2 masks out, so that what is missing of it is pulled up.
        proximity_reduction: "squared", (S_P - S_GT)² as Eq. 8 is printed, or "sum", S_P + S_GT, which grows with every
            false positive and never rewards a worse instance.
        weight_by: what an instance counts in the means of `instance_gt`, `instance_pred` and the false rates: "count",
            1; "size", its pixels; or a function, element by element, from sizes `[K]` (float64 pixels, all instances of
            a side) to weights `[K]` >= 0, of which only ratios matter. The entry of an empty side has the size 1.
            With a function, CUDA tensors take the torch path.
        reduction: "mean"; "none" for values per plane `[B, C]`; "sum" for their sum.
        max_instances: limit on the instances of a plane on either side, which makes the kernels' tables smaller; None
            has room for the most that there can be. Beyond it the terms are NaN, and the next call says so in a
            warning. The CPU needs no limit and has none.
        process_group: whose ranks share the batch: their mean of the result, and DistributedDataParallel's mean of the
            gradients, are those of the batches of all ranks together. "world" is the default group, or nothing where
            `torch.distributed` is not initialised; None averages over this rank's batch. With a group every call is a
            collective, of six integers: all ranks must make it. `reduction="sum"` is scaled by the number of ranks, for
            the same reason; "none" is not scaled.
        target_labels: `[B, C, *S]` integer ids of ground-truth instances, 0 = background, which may touch and need
            not be consecutive; None takes the connected components of the target.
        valid_mask: `[B, 1, *S]`, 1 where a pixel counts (partial annotation, ignore label).

    Returns:
        The terms, float64 for float64 input and float32 otherwise. Instance and proximity terms have their exact
        derivative with labels held fixed; false rates and centre a straight-through one. A NaN or Inf in the input
        makes all terms NaN. There is no second derivative: asking for one raises RuntimeError.

    Raises:
        ValueError: shapes, devices, names or values that do not fit (values are checked on the CPU, and on a GPU
            with `fastinstance.debug_checks(True)`); a callable that does not return a scalar.
        TypeError: wrong dtypes or kinds of arguments.
        RuntimeError: a callable that `torch.func.vmap` cannot batch.

    With a process group the errors of one rank reach the others, as RuntimeError, and ranks with different settings
    raise ValueError, always on the CPU and on a GPU in the first call with these settings.
    """
    settings = Settings(
        pixel_loss=pixel_loss,
        instance_loss=instance_loss,
        center_loss=center_loss,
        average=average,
        include_background=include_background,
        to_onehot_y=to_onehot_y,
        sigmoid=sigmoid,
        softmax=softmax,
        other_act=other_act,
        threshold=threshold,
        connectivity=connectivity,
        center_size=center_size,
        min_size=min_size,
        spacing=spacing,
        pred_normalizer=pred_normalizer,
        missed=missed,
        missed_weight=missed_weight,
        mask_target=mask_target,
        proximity_reduction=proximity_reduction,
        weight_by=weight_by,
        reduction=reduction,
        max_instances=max_instances,
        process_group=process_group,
    )
    found = evaluate(settings, InstanceTerms._fields, input, target, target_labels, valid_mask)
    return InstanceTerms(**found)


def pixel_loss(
    input: Tensor,
    target: Tensor,
    *,
    pixel_loss: object = "gdf",
    include_background: bool = True,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: Callable[[Tensor], Tensor] | None = None,
    connectivity: int | None = None,
    reduction: str = "mean",
    target_labels: Tensor | None = None,
    valid_mask: Tensor | None = None,
) -> Tensor:
    """A pixel loss on its own: the `seg` term of `instance_terms`, whose arguments these are.

    Ground-truth instances (`connectivity`, `target_labels`) only matter to the inverse-weighted Dice loss.
    """
    settings = Settings(
        pixel_loss=pixel_loss,
        include_background=include_background,
        to_onehot_y=to_onehot_y,
        sigmoid=sigmoid,
        softmax=softmax,
        other_act=other_act,
        connectivity=connectivity,
        reduction=reduction,
    )
    return evaluate(settings, ("seg",), input, target, target_labels, valid_mask)["seg"]


@differentiable
def evaluate_blob(
    settings: Settings,
    input: Tensor,
    target: Tensor,
    target_labels: Tensor | None = None,
    valid_mask: Tensor | None = None,
) -> BlobTerms:
    """Both parts of blob loss."""
    images = input, target, target_labels, valid_mask
    return BlobTerms(**over_ranks(settings, ("seg", "blob"), input, lambda: _evaluate_blob(settings, *images)))


def _evaluate_blob(
    settings: Settings, input: Tensor, target: Tensor, target_labels: Tensor | None, valid_mask: Tensor | None
) -> Local:
    if on_kernels(settings, BlobTerms._fields, input):
        call = Call(settings, input, target, target_labels, valid_mask)
        return _fused(call, {"seg": 0.0, "blob": 0.0})[0]
    scene = Scene(settings, input, target, target_labels, valid_mask)
    planes, loss = scene.planes, settings.instance
    part = scene.partition(predicted=False)
    truth, raw = part.target, part.raw_target
    weighted = isinstance(settings.pixel, InverseWeightedDice)

    seg_sums = scene.dense_request(part)
    outside_sums = DenseSums(seg_sums.target, loss.squared, loss.pointwise)
    if truth is not raw:
        outside_sums = outside_sums._replace(target=part.pixels[foreground(truth.label)])
    shared = truth is raw and outside_sums[1:] == seg_sums[1:]
    request = InstanceSums(
        part.pixels,
        foreground(truth.label),
        loss.squared,
        loss.pointwise,
        ((truth.label, truth.real + 1), (raw.label, raw.real + 1))[: 1 + weighted],
    )
    whole, tables = instance_sums(
        planes.values, planes.logits, (seg_sums,) if shared else (seg_sums, outside_sums), request
    )
    if isinstance(settings.pixel, Criterion):
        seg = scene.criterion_seg(settings.pixel)
    else:
        seg = scene.seg(whole[0], seg_sums.target, part, tables[-1][1:, 0] if weighted else None)

    if isinstance(loss, Criterion):
        labels = masked.label_map(part, truth)
        values = masked.blob_entries(labels, truth, scene.probabilities, loss, (1, *planes.size))
    else:
        values = tm.blob_entries(tables[0][1:], whole[-1], truth, planes.omega, loss)
    per_plane = scene.spoil(tm.plane_mean(values, truth, truth.per_plane))
    filled = (truth.per_plane > 0).sum()
    # The mean is over the planes that have an instance.
    mean = settings.reduction == "mean"
    blob = scene.finish(per_plane.sum() / filled.clamp(min=1)) if mean else scene.reduce(per_plane)
    return Local({"seg": seg, "blob": blob}, len(planes.omega), torch.stack([filled, filled]).double())


def blob_terms(
    input: Tensor,
    target: Tensor,
    *,
    pixel_loss: object = "gdf",
    instance_loss: object = None,
    include_background: bool = True,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: Callable[[Tensor], Tensor] | None = None,
    connectivity: int | None = None,
    min_size: int = 0,
    reduction: str = "mean",
    max_instances: int | None = None,
    process_group: ProcessGroup = None,
    target_labels: Tensor | None = None,
    valid_mask: Tensor | None = None,
) -> BlobTerms:
    """Blob loss (Kofler et al. 2023): the pixel loss, and its mean over ground-truth instances.

    Each instance is compared with the prediction outside of all other instances, so every false positive counts for
    every instance. The mean is over the instances of a plane, then over the planes that have one.

    Args:
        instance_loss: of one instance; None takes `pixel_loss`.

    The other arguments, the result's dtype and the errors are those of `instance_terms`.
    """
    settings = Settings(
        pixel_loss=pixel_loss,
        instance_loss=pixel_loss if instance_loss is None else instance_loss,
        include_background=include_background,
        to_onehot_y=to_onehot_y,
        sigmoid=sigmoid,
        softmax=softmax,
        other_act=other_act,
        connectivity=connectivity,
        min_size=min_size,
        reduction=reduction,
        max_instances=max_instances,
        process_group=process_group,
    )
    return evaluate_blob(settings, input, target, target_labels, valid_mask)


@differentiable
def label(mask: Tensor, *, connectivity: int | None = None, min_size: int = 0) -> tuple[Tensor, Tensor]:
    """Connected components of every plane of a mask.

    Args:
        mask: `[B, C, H, W]` or `[B, C, D, H, W]` of any real dtype; foreground is where it is neither 0 nor NaN.
        connectivity: 4 or 8 in 2D, 6, 18 or 26 in 3D; None is full connectivity.
        min_size: components with fewer pixels become background.

    Returns:
        labels: int32 like `mask`, 0 = background, ids 1..K in each plane in raster order of the first pixels.
        counts: int32 `[B, C]`, the K of each plane.

    Raises:
        ValueError: a mask of another rank, a connectivity that does not fit it, a negative `min_size`.
        TypeError: a mask that is no tensor or complex.
    """
    check_mask(mask)
    check_size("min_size", min_size)
    connectivity = check_connectivity(connectivity, mask.ndim - 2)
    labels, counts = label_planes(_plain(mask).detach().flatten(0, 1), None, connectivity, min_size)
    return labels.view(mask.shape), counts.view(mask.shape[:2])
