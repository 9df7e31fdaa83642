"""The terms of a call on torch: which sums they need, one pass over the pixels, and each term from its equation."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from . import masked
from . import terms as tm
from .components import foreground
from .criteria import Criterion
from .ops import DenseSums, InstanceSums, instance_sums
from .parallel import Local
from .partition import Partition
from .pixel import InverseWeightedDice, SeparableLoss, Sums
from .scene import Scene

__all__ = ["blob_terms", "instance_terms"]


_OWN = {"instance_gt", "instance_pred", "proximity"}
"""Terms from the loss of every instance."""
_RATES = {"false_gt", "false_pred"}


def instance_terms(scene: Scene, wanted: Collection[str]) -> Local:
    """The wanted terms of `InstanceTerms`."""
    settings, planes, loss = scene.settings, scene.planes, scene.settings.instance
    by_instance = any(name != "seg" for name in wanted)
    own, rates = (not names.isdisjoint(wanted) for names in (_OWN, _RATES))
    weighted = "seg" in wanted and isinstance(settings.pixel, InverseWeightedDice)
    soft = rates and settings.missed == "soft"
    part = scene.partition(predicted=by_instance) if by_instance or weighted else None
    request, tables = None, []
    if part is not None:
        tables = [(part.cell, part.cells)] if by_instance else []
        if soft:  # a largest probability is a sum over one pixel
            tables.append((part.peaks(planes.values.detach(), part.missed), part.target.real + 1))
        if weighted:
            tables.append((part.raw_target.label, part.raw_target.real + 1))
        request = InstanceSums(
            part.pixels,
            part.target.listed,
            own and loss.squared,
            loss.pointwise if own else None,
            tuple(tables),
        )
    dense = [_dense_sums(scene, part)] if "seg" in wanted and not isinstance(settings.pixel, Criterion) else []
    whole, tables = instance_sums(planes.values, planes.logits, tuple(dense), request)

    found: dict[str, Tensor] = {}
    if "seg" in wanted and isinstance(settings.pixel, Criterion):
        found["seg"] = _seg_of_criterion(scene, settings.pixel)
    elif "seg" in wanted:
        found["seg"] = _seg(scene, whole[0], dense[0].target, part, tables[-1][1:, 0] if weighted else None)
    if part is None or not by_instance:
        return Local(found, len(planes.omega), planes.omega.new_zeros(2))

    features = tm.Features.of(part, tables[0])
    truth, pred = part.target, part.pred
    weight_gt, weight_pred = (tm.instance_weights(side, settings.weight_by) for side in (truth, pred))
    gt_entries = pred_entries = tm.plane_sum(weight_gt, truth)
    if settings.pred_normalizer == "pred":
        pred_entries = tm.plane_sum(weight_pred, pred)
    if own:
        loss_gt, loss_pred = _losses(scene, part, features)
        how = {"average": settings.average, "reduction": settings.reduction}
        if "instance_gt" in wanted:
            found["instance_gt"] = scene.finish(tm.average(weight_gt * loss_gt, truth, gt_entries, **how))
        if "instance_pred" in wanted:
            found["instance_pred"] = scene.finish(tm.average(weight_pred * loss_pred, pred, pred_entries, **how))
        if "proximity" in wanted:
            squared = settings.proximity_reduction == "squared"
            found["proximity"] = scene.reduce(tm.proximity(part, loss_gt, loss_pred, scene.spacing, squared=squared))
    if "center" in wanted:
        found["center"] = scene.reduce(scene.spoil(_center(scene, part, features)))
    if rates:
        soft_alone = tm.soft_alone(part, features, tables[1][1:, 0], settings.missed_weight) if soft else None
        false_gt, false_pred = tm.false_rates(part, features, (weight_gt, weight_pred), soft_alone)
        found["false_gt"] = scene.reduce(scene.spoil(false_gt))
        found["false_pred"] = scene.reduce(scene.spoil(false_pred))
    return Local(found, len(planes.omega), torch.stack([gt_entries.sum(), pred_entries.sum()]))


def _losses(scene: Scene, part: Partition, features: tm.Features) -> tuple[Tensor, Tensor]:
    """The instance loss of every row of either side."""
    loss, mask = scene.settings.instance, scene.settings.mask_target
    if isinstance(loss, Criterion):
        losses = masked.instance_entries(part, scene.probabilities, loss, mask_target=mask)
    else:
        losses = tm.instance_entries(part, features, scene.planes.omega, loss, mask_target=mask)
    return scene.spoil(losses[0], part.target.plane), scene.spoil(losses[1], part.pred.plane)


def _center(scene: Scene, part: Partition, features: tm.Features) -> Tensor:
    """The centre loss of every plane."""
    planes, loss = scene.planes, scene.settings.center
    boxes = tm.center_boxes(part, features, planes.valid, scene.center_size)
    if isinstance(loss, Criterion):
        return masked.plane_values(*tm.center_maps(part, boxes, planes.values.dtype), loss, planes.size)
    return loss.reduce(tm.center_sums(part, boxes, loss), planes.omega)


def _dense_sums(scene: Scene, part: Partition | None) -> DenseSums:
    """The sums over planes that the pixel loss needs."""
    loss, planes = scene.settings.pixel, scene.planes
    positives = foreground(planes.target) if part is None else part.pixels[part.raw_target.listed]
    return DenseSums(positives, loss.squared, loss.pointwise, planes.categorical)


def _seg(
    scene: Scene, whole: Tensor, positives: Tensor, part: Partition | None, raw_instances: Tensor | None
) -> Tensor:
    """The pixel term from the sums of each plane and, for the inverse-weighted Dice, of each instance."""
    planes, loss = scene.planes, scene.settings.pixel
    assert isinstance(loss, SeparableLoss)
    if scene.poison is not None:  # before the channels of an image are joined
        whole = whole * scene.poison[:, None]
    plane = positives // planes.values.shape[1]
    number = torch.bincount(plane, minlength=len(planes.omega)).double()
    sums = Sums(whole[:, 0], whole[:, 1], number, whole[:, 2])
    if isinstance(loss, InverseWeightedDice) and part is not None and raw_instances is not None:
        value = tm.inverse_weighted_dice(loss, raw_instances, sums, part.raw_target, planes.omega)
    else:
        shape = (planes.batch, planes.channels)
        image = Sums(*(column.view(shape) for column in sums))
        value = loss.reduce_channels(image, planes.omega.view(shape), categorical=planes.categorical).flatten()
    return scene.reduce(scene.spoil(value))


def _seg_of_criterion(scene: Scene, criterion: Criterion) -> Tensor:
    """The pixel term of any callable: one call on all images, or one for each plane where planes are kept apart."""
    planes, p = scene.planes, scene.probabilities
    if scene.settings.reduction == "mean":
        shape = (planes.batch, planes.channels, *planes.size)
        return scene.finish(masked.image_value(p.view(shape), planes.target.view(shape), criterion))
    return scene.reduce(masked.plane_values(p, planes.target.flatten(1), criterion, planes.size))


def blob_terms(scene: Scene) -> Local:
    """Both terms of `BlobTerms`."""
    settings, planes, loss = scene.settings, scene.planes, scene.settings.instance
    part = scene.partition(predicted=False)
    truth, raw = part.target, part.raw_target
    weighted = isinstance(settings.pixel, InverseWeightedDice)

    seg_sums = _dense_sums(scene, part)
    outside_sums = DenseSums(seg_sums.target, loss.squared, loss.pointwise)
    if truth is not raw:
        outside_sums = outside_sums._replace(target=part.pixels[truth.listed])
    shared = truth is raw and outside_sums[1:] == seg_sums[1:]
    request = InstanceSums(
        part.pixels,
        truth.listed,
        loss.squared,
        loss.pointwise,
        ((truth.label, truth.real + 1), (raw.label, raw.real + 1))[: 1 + weighted],
    )
    whole, tables = instance_sums(
        planes.values, planes.logits, (seg_sums,) if shared else (seg_sums, outside_sums), request
    )
    if isinstance(settings.pixel, Criterion):
        seg = _seg_of_criterion(scene, settings.pixel)
    else:
        seg = _seg(scene, whole[0], seg_sums.target, part, tables[-1][1:, 0] if weighted else None)

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
