"""The terms of a call from the Triton kernels: its images and settings in their words."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from .components import label_planes
from .fused import fused_terms
from .parallel import Local
from .pixel import Dice, InverseWeightedDice, SeparableLoss
from .planes import activate
from .scene import Call
from .terms import BlobTerms, InstanceTerms

if TYPE_CHECKING:
    from fastinstance_kernels.engine import Loss

__all__ = ["Images", "as_numbers", "drop_small_ids", "terms", "weighted_sum"]


_DICE = Dice().form.numbers


def as_numbers(loss: SeparableLoss) -> Loss:
    """A loss in the words of the kernels."""
    from fastinstance_kernels.engine import Loss

    form = loss.form
    return Loss(form.numbers, form.squared, -1.0 if form.gamma is None else form.gamma)


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


class _Run(NamedTuple):
    """The results of one run of the kernels, for the terms it was asked for."""

    names: Collection[str]
    found: Tensor  # [7] or [7, planes]: blob loss's two terms, or all in the order of `InstanceTerms`
    total: Tensor  # their weighted sum
    entries: Tensor
    planes: int
    shape: tuple[int, ...]  # of a term

    def by_name(self) -> dict[str, Tensor]:
        order = BlobTerms._fields if "blob" in self.names else InstanceTerms._fields
        terms = zip(order, self.found.unbind(0), strict=False)
        return {name: value.view(self.shape) for name, value in terms if name in self.names}


def terms(call: Call, wanted: Collection[str]) -> Local:
    """The terms named in `wanted`, of `InstanceTerms`, or those of blob loss ("seg" and "blob")."""
    runs = _runs(call, dict.fromkeys(wanted, 0.0))
    found = {name: value for run in runs for name, value in run.by_name().items()}
    return Local(found, runs[0].planes, runs[0].entries)


def weighted_sum(call: Call, weights: Mapping[str, float]) -> Tensor:
    """The sum of weight · term."""
    first, *rest = (run.total.view(run.shape) for run in _runs(call, weights))
    return sum(rest, first)


def _runs(call: Call, weights: Mapping[str, float]) -> list[_Run]:
    """The terms named in `weights`, in one run, or two where small components stay in the pixel term alone."""
    settings, images = call.settings, Images.of(call)
    if settings.min_size <= 1:
        return [_run(call, images, weights)]
    assert images.predicted is not None

    def keep(mask: Tensor) -> Tensor:
        return label_planes(mask, None, call.connectivity, settings.min_size)[0] > 0

    kept = drop_small_ids(images.target, settings.min_size) if images.given else keep(images.target)
    rest = {name: weight for name, weight in weights.items() if name != "seg"}
    runs = [_run(call, images._replace(target=kept, predicted=keep(images.predicted)), rest)]
    if "seg" in weights:
        runs.append(_run(call, images, {"seg": weights["seg"]}))
    return runs


def _run(call: Call, images: Images, weights: Mapping[str, float]) -> _Run:
    from fastinstance_kernels.engine import Request

    settings = call.settings
    false_rates = "false_gt" in weights or "false_pred" in weights

    def loss_of(loss: object, *names: str) -> Loss | None:
        wanted = any(name in weights for name in names)
        return as_numbers(cast("SeparableLoss", loss)) if wanted else None

    request = Request(
        channels=images.channels,
        logits=images.logits,
        categorical=settings.softmax,
        threshold=images.threshold,
        connectivity=call.connectivity,
        seg=loss_of(settings.pixel, "seg"),
        own=loss_of(settings.instance, "instance_gt", "instance_pred", "proximity", "blob"),
        center=loss_of(settings.center, "center"),
        dice=_DICE,
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
        differentiable=images.values.requires_grad and torch.is_grad_enabled(),
    )
    order = BlobTerms._fields if request.blob else InstanceTerms._fields
    factors = [float(weights.get(name, 0.0)) for name in order]
    found, total, entries = fused_terms(
        images.values,
        images.target,
        images.predicted,
        images.valid,
        weights=factors + [0.0] * (len(InstanceTerms._fields) - len(order)),
        given=images.given,
        request=request.encode(),
        max_instances=settings.max_instances,
    )
    shape = (images.batch, images.channels) if settings.reduction == "none" else ()
    return _Run(weights, found, total, entries, images.batch * images.channels, shape)
