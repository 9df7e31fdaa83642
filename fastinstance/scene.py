"""One checked call, and what its terms share on torch: planes, partition, probabilities."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from . import terms as tm
from .checks import check_images, check_probabilities, check_values, comparable, reads_values
from .partition import Partition, partition
from .planes import Planes, to_planes
from .settings import Settings

__all__ = ["Call", "Scene", "plain"]


def plain(tensor: Tensor) -> Tensor:
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
        labels, valid = (None if image is None else comparable(plain(image)) for image in (target_labels, valid_mask))
        self.images = plain(input), comparable(plain(target)), labels, valid
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
    """A call with its planes, shared by all terms."""

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
