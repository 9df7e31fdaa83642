"""Drop-ins for the released implementations: the authors' `InstanceLoss` and `InstanceCenterLoss`, and blob loss.

Same arguments, results in the same order, same numbers; `docs/compat.md` says what each argument does here and which
defects of the originals are not repeated. Several definitions are those of the authors' code and differ from the
paper's, which the rest of the library follows: see the tables there.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from . import masked
from . import terms as tm
from .boxes import nearest_of_all
from .checks import (
    MAX_ID,
    check_binary,
    check_choice,
    check_flags,
    check_floating,
    check_id_range,
    check_not_empty,
    check_probabilities,
    check_size,
    check_threshold,
    comparable,
    reads_values,
)
from .criteria import Criterion, Recognised, advise, recognise, resolve
from .ops import DenseSums, InstanceSums, instance_sums
from .partition import Partition, Side, partition
from .pixel import Dice, Sums, check_not_negative
from .scene import Scene
from .settings import Settings
from .terms import Features
from .torch_func import differentiable

__all__ = ["InstanceCenterLoss", "InstanceLoss", "compute_blob_loss_multi"]

_CRITERIA = ("loss_function_pixel", "loss_function_instance", "loss_function_center")
_HALVES = (torch.float16, torch.bfloat16)


class _AuthorsLoss(nn.Module):
    """What the two classes share."""

    loss_function_pixel: Callable[[Tensor, Tensor], Tensor]
    loss_function_instance: Callable[[Tensor, Tensor], Tensor]
    loss_function_center: Callable[[Tensor, Tensor], Tensor]
    activation: str
    num_out_chn: int
    object_chn: int
    spatial_dims: int
    reduce: str
    instance_wise_reduce: str
    num_iterations: int
    max_cc_out: int
    min_instance_size: int
    segmentation_threshold: float
    centroid_offset: float
    mul_too_many: float
    smoother: float
    instance_wise_loss_no_tp: bool
    rate_instead_number: bool
    weighted_instance_wise: bool
    weighted_fdr: bool

    def __init__(self, parameters: dict[str, Any]) -> None:
        super().__init__()
        self._warned = False
        self._set(parameters)

    @classmethod
    def _parameters_of_original(cls) -> list[str]:
        return list(inspect.signature(cls.__init__).parameters)[1:]

    def _set(self, parameters: dict[str, Any]) -> None:
        for name, value in parameters.items():
            attribute = "reduce" if name == "reduce_segmentation" else name
            self._modules.pop(attribute, None)  # a function may take the place of a module
            setattr(self, attribute, value)
        self._check()

    def _check(self) -> None:
        check_choice("activation", self.activation, ("sigmoid", "softmax", "none"))
        check_choice("reduce_segmentation", self.reduce, ("mean", "sum"))
        check_choice("instance_wise_reduce", self.instance_wise_reduce, ("instance", "data"))
        flags = ("instance_wise_loss_no_tp", "rate_instead_number", "weighted_instance_wise", "weighted_fdr")
        check_flags(**{name: getattr(self, name) for name in flags})
        check_threshold("segmentation_threshold", self.segmentation_threshold)
        check_size("num_iterations", self.num_iterations, "iterations")
        check_size("max_cc_out", self.max_cc_out, "instances")
        check_size("min_instance_size", self.min_instance_size)
        if self.spatial_dims not in (2, 3):
            raise ValueError(f"expected spatial_dims to be 2 or 3, got {self.spatial_dims!r}")
        check_not_negative(centroid_offset=self.centroid_offset, smoother=self.smoother)
        if not isinstance(self.mul_too_many, Real) or not self.mul_too_many >= 0:
            raise ValueError(f"expected mul_too_many to be a number >= 0, got {self.mul_too_many!r}")
        if self.activation == "softmax":
            if not (self.num_out_chn > 1 and 0 <= self.object_chn < self.num_out_chn):
                raise ValueError(
                    "expected num_out_chn > 1 and object_chn among these channels with activation='softmax', "
                    f"got num_out_chn={self.num_out_chn}, object_chn={self.object_chn}"
                )
        elif (self.num_out_chn, self.object_chn) != (1, 1):
            raise ValueError(
                f"expected num_out_chn=1 and object_chn=1 with activation={self.activation!r}, got "
                f"num_out_chn={self.num_out_chn}, object_chn={self.object_chn}; pass one channel at a time, "
                "outputs[:, c:c + 1]"
            )
        for name in _CRITERIA:
            given = getattr(self, name)
            if not callable(given) or isinstance(given, type):
                raise TypeError(
                    f"expected {name} to be a function or module (outputs, labels) -> scalar, got {given!r}"
                )

    def print_parameters(self) -> None:
        """Print all parameters and their values."""
        print("\nVALUES OF PARAMETERS")
        for name in self._parameters_of_original():
            attribute = "reduce" if name == "reduce_segmentation" else name
            print(f" -> {attribute}: {getattr(self, attribute)}")

    def edit_parameters(self, **parameters: Any) -> None:
        """Change parameters of the constructor; None leaves one as it is.

        Raises:
            TypeError: a name that the constructor does not have.
            ValueError: as the constructor.
        """
        known = self._parameters_of_original()
        unknown = sorted(parameters.keys() - set(known))
        if unknown:
            raise TypeError(f"expected parameters among {', '.join(known)}, got {', '.join(unknown)}")
        given = {name: value for name, value in parameters.items() if value is not None}
        before = {name: getattr(self, "reduce" if name == "reduce_segmentation" else name) for name in given}
        try:
            self._set(given)
        except (TypeError, ValueError):
            self._set(before)
            raise

    def _activate(self, outputs: Tensor) -> Tensor:
        """What the instance terms see: probabilities, or 0 and 1 as constants of the gradient."""
        if self.activation == "none":
            return outputs
        if self.activation == "sigmoid":
            p = outputs.sigmoid()
            hard = p >= self.segmentation_threshold
        else:
            p = outputs.softmax(1)[:, self.object_chn : self.object_chn + 1]
            hard = p >= 1 / outputs.shape[1]
        if outputs.requires_grad and not self._warned:
            self._warned = True
            warnings.warn(
                f"activation={self.activation!r} thresholds the prediction, so all terms but the first have a gradient "
                "of zero, as in the original; pass probabilities with activation='none'",
                UserWarning,
                stacklevel=4,
            )
        return p.masked_fill(hard, 1).masked_fill(~hard, 0)

    @differentiable
    def _terms(self, outputs: Tensor, labels: Tensor, cc_label_batch: Tensor | None, proximity: bool) -> list[Tensor]:
        self._check()
        self._check_images(outputs, labels, cc_label_batch)
        p = self._activate(outputs)
        criterion = Criterion(self.loss_function_pixel, "loss_function_pixel")
        pixel = masked.checked(
            criterion, criterion.function(p if self.activation == "softmax" else outputs, labels), tuple(labels.shape)
        )
        ids = cc_label_batch
        if ids is not None and ids.is_floating_point():
            ids = ids.long()
        scene = Scene(Settings(threshold=self.segmentation_threshold), p, labels, ids, None, known=True)
        part = scene.partition(predicted=True)
        self._check_caps(part, given=cc_label_batch is not None)
        return [pixel, *_instance_terms(self, scene, part, proximity)]

    def _check_images(self, outputs: Tensor, labels: Tensor, ids: Tensor | None) -> None:
        for name, value in (("outputs", outputs), ("labels", labels), ("cc_label_batch", ids)):
            if not isinstance(value, Tensor) and not (name == "cc_label_batch" and value is None):
                raise TypeError(f"expected {name} to be a tensor, got {type(value).__name__}")
            _check_device(name, value, outputs)
        if outputs.ndim != self.spatial_dims + 2 or outputs.shape[1] != self.num_out_chn:
            raise ValueError(
                f"expected outputs [B,{self.num_out_chn},*S] with {self.spatial_dims} spatial axes (num_out_chn, "
                f"spatial_dims), got {tuple(outputs.shape)}"
            )
        check_floating("outputs", outputs)
        check_not_empty("outputs", outputs)
        shape = (outputs.shape[0], 1, *outputs.shape[2:])
        if labels.shape != shape:
            raise ValueError(f"expected labels [B,1,*S] = {shape}, got {tuple(labels.shape)}")
        if labels.is_complex():
            raise TypeError(f"expected labels of a real dtype, got {labels.dtype}")
        if reads_values(outputs):
            check_binary("labels", labels, "labels > 0 for a mask, cc_label_batch= for instance ids")
            if self.activation == "none":
                low, high = (bound.item() for bound in outputs.detach().aminmax())
                check_probabilities(low, high, "outputs", "set activation='sigmoid', or pass outputs.sigmoid()")
        if ids is None:
            return
        if ids.shape != shape:
            raise ValueError(f"expected cc_label_batch like labels, {shape}, got {tuple(ids.shape)}")
        if ids.dtype in _HALVES or ids.dtype == torch.bool or ids.is_complex():
            raise TypeError(
                f"expected cc_label_batch of an integer dtype, float32 or float64, got {ids.dtype}, which cannot tell "
                "many instances apart"
            )
        ids = comparable(ids)
        if reads_values(ids):
            check_id_range("cc_label_batch", ids)
        differs = (ids > 0) != (comparable(labels) > 0)
        if differs.view(torch.uint8).max():  # much faster than any() on booleans
            raise ValueError(
                f"expected cc_label_batch > 0 exactly where labels are 1, got {int(differs.sum())} pixels that "
                "differ; compute it from these labels, or leave it out"
            )
        if ids.is_floating_point() and not (ids == ids.round()).all():
            raise ValueError("expected cc_label_batch to hold whole numbers, got fractions")

    def _check_caps(self, part: Partition, given: bool) -> None:
        """Limits of the original are not needed here; one that would have changed the result is an error."""
        truth, pred = part.target, part.pred
        most = int(pred.per_plane.max())
        if 0 < self.max_cc_out < most:
            raise ValueError(
                f"expected max_cc_out={self.max_cc_out} to leave out no instance, got an image with {most} predicted "
                "instances; set max_cc_out=0, all instances cost no more here"
            )
        limit = truth.per_plane * float(self.mul_too_many)
        if ((truth.per_plane > 0) & (pred.per_plane > limit)).any():
            raise ValueError(
                f"expected mul_too_many={self.mul_too_many} to leave out no instance, got an image with more than "
                "so many predicted instances for a true one; set mul_too_many=float('inf')"
            )
        sizes = torch.cat([truth.count, pred.count])
        if self.min_instance_size and (sizes <= self.min_instance_size).any():
            raise ValueError(
                f"expected min_instance_size={self.min_instance_size} to leave out no instance, got one of "
                f"{int(sizes.min())} pixels (the original then mixes up instances); set min_instance_size=0, or take "
                "fastinstance.InstanceLoss(min_size=...)"
            )
        for side in (pred,) if given else (truth, pred):
            if not _labelled_within(part, side, self.num_iterations):
                raise ValueError(
                    f"expected num_iterations={self.num_iterations} to be enough to label every instance, got a longer "
                    "one, which the original splits; set num_iterations=10**9, labels are exact here at no cost"
                )


class InstanceLoss(_AuthorsLoss):
    """The authors' `InstanceLoss`: seven terms, unweighted. Its arguments, in its order; see `docs/compat.md`.

    Values are those of the original. The gradients of the pixel, instance and proximity terms are too; those of the
    centre and false terms, which are zero there, are the library's.
    """

    def __init__(
        self,
        loss_function_pixel: Callable[[Tensor, Tensor], Tensor],
        loss_function_instance: Callable[[Tensor, Tensor], Tensor],
        loss_function_center: Callable[[Tensor, Tensor], Tensor],
        activation: str = "sigmoid",
        num_out_chn: int = 1,
        object_chn: int = 1,
        spatial_dims: int = 3,
        reduce_segmentation: str = "mean",
        instance_wise_reduce: str = "instance",
        num_iterations: int = 350,
        max_cc_out: int = 50,
        min_instance_size: int = 0,
        segmentation_threshold: float = 0.5,
        centroid_offset: float = 5,
        mul_too_many: float = 50,
        smoother: float = 1e-07,
        instance_wise_loss_no_tp: bool = True,
        rate_instead_number: bool = False,
        weighted_instance_wise: bool = False,
        weighted_fdr: bool = False,
    ) -> None:
        super().__init__({name: value for name, value in locals().items() if name not in ("self", "__class__")})

    def forward(self, outputs: Tensor, labels: Tensor, cc_label_batch: Tensor | None = None) -> tuple[Tensor, ...]:
        """The terms.

        Args:
            outputs: `[B, num_out_chn, *S]`; probabilities for `activation="none"`, else logits.
            labels: `[B, 1, *S]`, 0 or 1.
            cc_label_batch: `[B, 1, *S]` whole numbers, the instances of `labels`; None labels them here.

        Returns:
            Scalars: pixel, instance of labels, instance of outputs, centre, false, missed, proximity.

        Raises:
            ValueError: shapes or values that do not fit; a cap that would have changed the result; a criterion that
                returns no scalar.
            TypeError: what is no tensor, or of a dtype that does not fit.
            RuntimeError: a criterion that is not separable and that `torch.func.vmap` cannot batch.
        """
        return tuple(self._terms(outputs, labels, cc_label_batch, proximity=True))


class InstanceCenterLoss(_AuthorsLoss):
    """The authors' `InstanceCenterLoss`: the terms of `InstanceLoss` without proximity; mind the order of arguments."""

    def __init__(
        self,
        loss_function_pixel: Callable[[Tensor, Tensor], Tensor],
        loss_function_instance: Callable[[Tensor, Tensor], Tensor],
        loss_function_center: Callable[[Tensor, Tensor], Tensor],
        activation: str = "sigmoid",
        num_out_chn: int = 1,
        object_chn: int = 1,
        spatial_dims: int = 3,
        reduce_segmentation: str = "mean",
        instance_wise_reduce: str = "instance",
        num_iterations: int = 350,
        segmentation_threshold: float = 0.5,
        max_cc_out: int = 50,
        mul_too_many: float = 50,
        min_instance_size: int = 0,
        centroid_offset: float = 5,
        smoother: float = 1e-07,
        instance_wise_loss_no_tp: bool = True,
        rate_instead_number: bool = False,
        weighted_instance_wise: bool = False,
        weighted_fdr: bool = False,
    ) -> None:
        super().__init__({name: value for name, value in locals().items() if name not in ("self", "__class__")})

    def forward(self, outputs: Tensor, labels: Tensor, cc_label_batch: Tensor | None = None) -> tuple[Tensor, ...]:
        """As `InstanceLoss.forward`, without the last term."""
        return tuple(self._terms(outputs, labels, cc_label_batch, proximity=False))


def _check_device(name: str, value: Tensor | None, outputs: Tensor) -> None:
    if value is not None and value.device != outputs.device:
        raise ValueError(f"expected {name} on the device of the outputs, {outputs.device}, got {value.device}")


def _known(given: object, argument: str) -> Recognised | Criterion:
    """A criterion as a separable loss that gives the same numbers, or as a callable."""
    known = recognise(given)
    if known is not None:
        return known
    resolved = resolve(given, argument)
    if isinstance(resolved, Criterion):
        advise(resolved)
        return resolved
    settings = getattr(given, "settings", Settings())  # a pixel loss of this library has one activation for all parts
    if settings.softmax or settings.other_act is not None:
        raise ValueError(f"expected {argument} without softmax and other_act, got {given!r}; it sees one channel")
    return Recognised(resolved, settings.sigmoid, settings.sigmoid)


def _sums(
    x: Tensor, known: Recognised, positives: Tensor | None, instances: InstanceSums | None
) -> tuple[list[Tensor], list[Tensor]]:
    """`ops.instance_sums` of what the criterion sees: x itself or its sigmoid, and not the same for all parts.

    `positives` ask for the sums over whole planes; the pixels and tables are those of `instances`.
    """
    loss = known.loss

    def take(sigmoid: bool, squared: bool, pointwise: Any) -> tuple[list[Tensor], list[Tensor]]:
        dense = () if positives is None else (DenseSums(positives, squared, pointwise),)
        asked = None if instances is None else instances._replace(squared=squared, pointwise=pointwise)
        return instance_sums(x, sigmoid, dense, asked)

    if loss.pointwise is None or known.sigmoid == known.pointwise_sigmoid:
        return take(known.sigmoid, loss.squared, loss.pointwise)
    whole, tables = take(known.sigmoid, loss.squared, None)
    whole_v, tables_v = take(known.pointwise_sigmoid, False, loss.pointwise)
    return (
        [torch.cat([w[:, :2], v[:, 2:]], 1) for w, v in zip(whole, whole_v, strict=True)],
        [torch.cat([t, v[:, 1:]], 1) for t, v in zip(tables, tables_v, strict=True)],
    )


def _with_masked(sums: Sums, area: Sums, omega: Tensor, known: Recognised) -> Sums:
    """Add what a criterion with a sigmoid of its own makes of the masked pixels: probability ½, not 0.

    Args:
        sums: of masked pairs whose masked pixels add nothing, except their cost under the target.
        area: the same sums of P = 1, pixels.
        omega: pixels of the image.
        known: the criterion.
    """
    missed, hidden = area.target - area.intersection, omega - area.pred
    half = 0.5 if known.sigmoid else 0.0
    pointwise = sums.pointwise
    if known.loss.pointwise is not None and known.pointwise_sigmoid:
        cost = 0.5**known.loss.pointwise.gamma * math.log(2)
        pointwise = pointwise + hidden * cost - missed * known.loss.pointwise.missed
    return Sums(
        sums.intersection + half * missed,
        sums.pred + half ** (2 if known.loss.squared else 1) * hidden,
        sums.target,
        pointwise,
    )


def _image_losses(x: Tensor, target: Tensor, omega: Tensor, known: Recognised, value: float = 1) -> Tensor:
    """The criterion on whole planes x `[planes, P]`, where `target` [planes, P] bool has G = value; `[planes]`."""
    (whole,), _ = _sums(x, known, target.flatten().nonzero().squeeze(1), None)
    number = target.sum(1, dtype=torch.float64) * value ** (2 if known.loss.squared else 1)
    return known.loss.reduce(Sums(whole[:, 0] * value, whole[:, 1], number, whole[:, 2]), omega)


def _separable_entries(
    scene: Scene, part: Partition, known: Recognised, *, no_tp: bool, weighted: bool
) -> tuple[Tensor, Tensor]:
    """The criterion on every instance of either side, `[N + artificial]` and `[M + artificial]`.

    On the ground-truth side false positives count as p·stopgrad(p), or with `no_tp=False` as p, and so does what the
    same components have in other instances. `weighted` adds the loss without any of these.
    """
    x, omega, truth, pred = scene.planes.values, scene.planes.omega, part.target, part.pred
    inside = truth.listed
    request = InstanceSums(part.pixels, inside, False, None, ((part.cell, part.cells),))
    features = Features.of(part, _sums(x, known, None, request)[1][0])
    ones = [torch.stack([pixels] * (2 + known.loss.squared), 2) for pixels in part.areas]
    pixels = Features(ones[0], ones[1], *part.areas)

    def losses(features: Features, pixels: Features, side: int, excess: tuple[Tensor, Tensor] | None = None) -> Tensor:
        plane = (truth, pred)[side].plane
        sums = tm.matched_sums(part, features, known.loss)[side]
        area = tm.matched_sums(part, pixels, Dice())[side]
        if excess is not None:
            sums = sums._replace(
                pred=sums.pred - excess[0][:, 1 if known.loss.squared else 0],
                pointwise=sums.pointwise - (excess[0][:, -1] if known.loss.pointwise is not None else 0),
            )
            area = area._replace(pred=area.pred - excess[1][:, 0])
        return known.loss.reduce(_with_masked(sums, area, omega[plane], known), omega[plane])

    if no_tp:
        damped = Features.of(part, _sums(x * x.detach(), known, None, request)[1][0])
        gt_side = losses(features._replace(pred=damped.pred), pixels, 0)
    else:
        # All of a component counts, as false; then what it has in the instance itself is taken off again.
        nothing = request._replace(target=inside[:0])
        of_truth, of_pred = part.by_side(_sums(x, known, None, nothing)[1][0])
        whole, whole_area = (table.sum(1, keepdim=True).expand_as(table) for table in (of_pred, ones[1]))
        excess = [nn.functional.pad(table[:, 1], (0, 0, 0, truth.rows - truth.real)) for table in (of_truth, ones[0])]
        gt_side = losses(features._replace(pred=whole), pixels._replace(pred=whole_area), 0, (excess[0], excess[1]))
    if weighted:
        none = torch.zeros_like
        gt_side = gt_side + losses(features._replace(pred=none(features.pred)), pixels._replace(pred=none(ones[1])), 0)
    return gt_side, losses(features, pixels, 1)


def _entries(loss: _AuthorsLoss, scene: Scene, part: Partition) -> tuple[Tensor, Tensor]:
    """As `_separable_entries` for any criterion, with the loss of the unmasked image for a side without instances."""
    truth, pred, planes = part.target, part.pred, scene.planes
    known = _known(loss.loss_function_instance, "loss_function_instance")
    p, labels = scene.probabilities, planes.target.flatten(1)
    no_tp, weighted = loss.instance_wise_loss_no_tp, loss.weighted_instance_wise
    if isinstance(known, Criterion):
        outside = p.detach() * ~labels if no_tp else torch.ones_like(p)
        gt_side, pred_side = masked.instance_entries(part, p, known, outside)
        if weighted:
            gt_side = gt_side + masked.instance_entries(part, p, known, torch.zeros_like(p))[0]
    else:
        gt_side, pred_side = _separable_entries(scene, part, known, no_tp=no_tp, weighted=weighted)
    if truth.rows > truth.real or pred.rows > pred.real:
        if isinstance(known, Criterion):
            image = masked.plane_values(p, labels, known, planes.size)
        else:
            image = _image_losses(planes.values, labels, planes.omega, known)
        gt_side = torch.cat([gt_side[: truth.real], image[truth.plane[truth.real :]]])
        pred_side = torch.cat([pred_side[: pred.real], image[pred.plane[pred.real :]]])
    return scene.spoil(gt_side, truth.plane), scene.spoil(pred_side, pred.plane)


def _center(loss: _AuthorsLoss, scene: Scene, part: Partition, features: Features) -> Tensor:
    """The centre loss of every plane: boxes `[c - off - 1, c + off)` about `c = ceil(mean)`, of 1 + smoother."""
    planes = scene.planes
    offset = [math.ceil(length / max(part.size) * loss.centroid_offset) for length in part.size]
    below = torch.tensor(offset, device=part.pixels.device) + 1

    def starts(side: Side) -> Tensor:
        count = side.count[:, None]
        return (part.coordinate_sums(side) + count - 1) // count - below

    window = [2 * reach + 1 for reach in offset]
    corners = starts(part.target), starts(part.pred)
    boxes = tm.center_boxes(part, features, None, window, corners, 1 + loss.smoother)
    known = _known(loss.loss_function_center, "loss_function_center")
    if isinstance(known, Recognised) and known.loss.pointwise is None and not known.sigmoid:
        return known.loss.reduce(tm.center_sums(part, boxes, known.loss), planes.omega)
    predicted, true = tm.center_maps(part, boxes, planes.values.dtype)
    if isinstance(known, Criterion):
        return masked.plane_values(predicted, true, known, planes.size)
    return _image_losses(predicted, true > 0, planes.omega, known, boxes.value)


def _wide_boxes(part: Partition, side: Side) -> Tensor:
    """Lower corner, upper corner and centre of the boxes of the authors' proximity term, `[3, axes, rows]` float64.

    A box is enlarged by its extent `e = max(max - min, 1)` to `[min - e - 1, max + e)` and clipped; that of an empty
    side is `[c - 1, c + 1)` about `c = floor(size / 2)`.
    """
    lower, upper = part.boxes(side)
    size = torch.tensor(part.size, dtype=lower.dtype, device=lower.device)
    last = upper - 1
    extent = (last - lower).clamp(min=1)
    low, high = (lower - extent - 1).clamp(min=0), torch.minimum(last + extent, size)
    centre = low + ((high - low) / 2).ceil()
    wide = torch.stack([low, high, centre])
    wide[:, side.real :] = torch.stack([lower, last, lower + 1])[:, side.real :]
    return wide.transpose(1, 2)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - IoU + ρ² / (τ² + 1e-7) of boxes `[3, axes, ...]` as `_wide_boxes` gives them."""
    shared = (torch.minimum(a[1], b[1]) - torch.maximum(a[0], b[0])).clamp(min=0).prod(0)
    union = (a[1] - a[0]).prod(0) + (b[1] - b[0]).prod(0) - shared
    rho = (a[2] - b[2]).square().sum(0)
    tau = (torch.maximum(a[1], b[1]) - torch.minimum(a[0], b[0])).square().sum(0)
    return 1 - shared / union + rho / (tau + 1e-7)


def _instance_terms(loss: _AuthorsLoss, scene: Scene, part: Partition, proximity: bool) -> Iterator[Tensor]:
    """Instance terms of both sides, centre, false, missed and, if asked for, proximity."""
    truth, pred, planes = part.target, part.pred, scene.planes
    request = InstanceSums(part.pixels, truth.listed, False, None, ((part.cell, part.cells),))
    features = Features.of(part, instance_sums(planes.values, False, (), request)[1][0])

    entries = _entries(loss, scene, part)
    for side, values in ((truth, entries[0]), (pred, entries[1])):
        average = "instance" if loss.instance_wise_reduce == "instance" else "image"
        number = torch.ones_like(side.entries) if average == "image" and loss.reduce == "sum" else side.entries
        yield scene.finish(tm.average(values, side, number, average=average, reduction="mean"))
    yield scene.reduce(scene.spoil(_center(loss, scene, part, features)))
    missed, false = tm.false_rates(part, features)
    for rate, number in ((false, pred.per_plane), (missed, truth.per_plane)):
        count, number = rate * number, number.double()
        yield scene.reduce(scene.spoil(count / (number + loss.smoother) if loss.rate_instead_number else count))
    if proximity:
        boxes = _wide_boxes(part, truth), _wide_boxes(part, pred)
        distances = nearest_of_all(boxes[0], truth.plane, boxes[1], pred.plane, len(truth.per_plane), _distance)
        yield scene.reduce(tm.proximity_from(part, *entries, *distances))


def _labelled_within(part: Partition, side: Side, steps: int) -> bool:
    """Whether so many steps to neighbours lead from the last pixel of every instance to all others.

    That is what the original's labelling needs. Most instances are too small to ask: a shortest path has at most two
    pixels in each cube of side 2, of which a box holds `∏⌈length / 2⌉`.
    """
    if not side.real:
        return True
    lower, upper = (corner[: side.real] for corner in part.boxes(side))
    longest = torch.minimum(side.count, 2 * ((upper - lower) / 2).ceil().prod(1)) - 1
    asked = torch.cat([longest.new_zeros(1, dtype=torch.bool), longest > steps])[side.label].nonzero().squeeze(1)
    if not len(asked):
        return True
    here = torch.arange(len(asked), device=asked.device)
    place = here.new_full((len(side.per_plane) * math.prod(part.size),), -1)
    place[part.pixels[asked]] = here
    axes = [position[asked] for position in part.coordinates]
    first = here.new_full((side.real + 1,), -1).scatter_reduce_(0, side.label[asked].long(), here, "amax")
    frontier = first[first >= 0]
    reached = torch.zeros_like(here, dtype=torch.bool)
    reached[frontier] = True
    while len(frontier) and steps > 0:
        found = []
        for move in product((-1, 0, 1), repeat=len(axes)):
            inside, shift = torch.ones_like(frontier, dtype=torch.bool), 0
            for position, length, step in zip(axes, part.size, move, strict=True):
                to = position[frontier] + step
                inside &= (to >= 0) & (to < length)
                shift = shift * length + step
            beside = place[part.pixels[asked[frontier[inside]]] + shift]
            fresh = beside[(beside >= 0) & ~reached[beside.clamp(min=0)]]
            reached[fresh] = True
            found.append(fresh)
        frontier, steps = torch.cat(found), steps - 1
    return bool(reached.all())


@differentiable
def compute_blob_loss_multi(
    criterion: Callable[[Tensor, Tensor], Tensor], network_outputs: Tensor, multi_label: Tensor
) -> Tensor:
    """Blob loss (Kofler et al. 2023) as github neuronflow/blob_loss computes it, of logits or probabilities.

    The outputs outside of an instance and the background are set to 0 before the criterion sees them, so a criterion
    with a sigmoid makes ½ of them; `fastinstance.BlobLoss(sigmoid=True)` takes them for probability 0.

    Args:
        criterion: `(outputs, labels) -> scalar` of images `[1, C, *S]`. MONAI's usual ones and `BCEWithLogitsLoss` on
            one channel need only sums; any other must work under `torch.func.vmap`, and gets labels of the outputs'
            dtype.
        network_outputs: `[B, C, *S]`
        multi_label: `[B, C, *S]` or `[B, 1, *S]` whole numbers, the instances of each image, 0 = background. An id
            that occurs in several channels is one instance.

    Returns:
        The mean over the instances of an image, then over the images that have one; a zero that is still connected
        to the graph if there is none.

    Raises:
        ValueError: shapes or ids that do not fit; a criterion that returns no scalar.
        TypeError: wrong dtypes.
        RuntimeError: a criterion that is not separable and that `torch.func.vmap` cannot batch.
    """
    x, ids = _check_blobs(network_outputs, multi_label)
    image: Sequence[int] = x.shape[1:]
    part = partition(ids > 0, None, labels=ids, connectivity=(8 if ids.ndim == 3 else 26))
    truth = part.target
    labels = masked.label_map(part, truth)
    known = _known(criterion, "criterion")
    if isinstance(known, Recognised) and image[0] == 1:
        instances = InstanceSums(
            part.pixels, torch.arange(len(part.pixels), device=x.device), False, None, ((truth.label, truth.real + 1),)
        )
        (whole,), (table,) = _sums(x.flatten(1), known, part.pixels, instances)
        sums = tm.blob_sums(table[1:], whole, truth, known.loss)
        plane = truth.plane[: truth.real]
        number = truth.count.double()
        omega = torch.full_like(number, math.prod(image))
        background = (labels == 0).sum(1).double()[plane]
        area = Sums(number, number + background, number, torch.zeros_like(number))
        values = known.loss.reduce(_with_masked(sums, area, omega, known), omega)
    else:
        function = Criterion(criterion, "criterion") if isinstance(known, Recognised) else known
        values = masked.blob_entries(labels, truth, x.flatten(1), function, image)
    per_image = tm.plane_mean(values, truth, truth.per_plane)
    return (per_image.sum() / (truth.per_plane > 0).sum().clamp(min=1)).to(x.dtype)


def _check_blobs(outputs: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs in float32 or wider, and the ids of each image as one plane `[B, C·D, ...]`."""
    for name, value in (("network_outputs", outputs), ("multi_label", ids)):
        if not isinstance(value, Tensor):
            raise TypeError(f"expected {name} to be a tensor, got {type(value).__name__}")
        _check_device(name, value, outputs)
    if not outputs.is_floating_point() or outputs.ndim not in (4, 5):
        raise ValueError(
            f"expected network_outputs [B,C,H,W] or [B,C,D,H,W] of a floating dtype, got {tuple(outputs.shape)} of "
            f"{outputs.dtype}"
        )
    if outputs.numel() == 0:
        raise ValueError(f"expected network_outputs with at least one pixel, got {tuple(outputs.shape)}")
    batch, channels, *size = outputs.shape
    if ids.shape not in {(batch, 1, *size), (batch, channels, *size)}:
        raise ValueError(
            f"expected multi_label [B,1,*S] or [B,C,*S] for network_outputs {tuple(outputs.shape)}, "
            f"got {tuple(ids.shape)}"
        )
    if ids.dtype in _HALVES:
        raise TypeError(f"expected multi_label of an integer dtype, float32 or float64, got {ids.dtype}")
    whole = ids.long()
    if (whole < 0).any() or (whole > MAX_ID).any() or (ids.is_floating_point() and (whole != ids).any()):
        raise ValueError(
            f"expected multi_label to hold whole numbers from 0 to {MAX_ID}, the instances; 0 is background"
        )
    wide = outputs.float() if outputs.dtype in _HALVES else outputs
    return wide, whole.flatten(1, 2)
