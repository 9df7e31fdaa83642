"""The settings of a loss, checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields

from torch import Tensor, nn

from .checks import (
    CONNECTIVITIES,
    check_activation,
    check_choice,
    check_connectivity,
    check_flags,
    check_max_instances,
    check_per_axis,
    check_size,
    check_threshold,
)
from .criteria import Criterion, advise, resolve
from .parallel import ProcessGroup, check_process_group
from .pixel import SeparableLoss, check_not_negative

__all__ = ["Settings"]


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
    fixed: dict[str, SeparableLoss | Criterion] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What the losses mean that are given by name or as one of this library; other modules may change later."""
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
        check_connectivity(self.connectivity)
        several = [len(value) for value in (self.center_size, self.spacing) if isinstance(value, Sequence)]
        self.for_axes(3 if 3 in several or self.connectivity in CONNECTIVITIES[3] else 2)
        for name in ("pixel_loss", "instance_loss", "center_loss"):
            loss, resolved = getattr(self, name), self._resolve(name)
            if not isinstance(loss, nn.Module) or hasattr(loss, "separable"):
                self.fixed[name] = resolved
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

    def _resolve(self, name: str) -> SeparableLoss | Criterion:
        """The loss given as `name`; a module must not bring an activation of its own that differs from ours."""
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
        return resolved

    @property
    def pixel(self) -> SeparableLoss | Criterion:
        return self.fixed.get("pixel_loss") or resolve(self.pixel_loss, "pixel_loss")

    @property
    def instance(self) -> SeparableLoss | Criterion:
        return self.fixed.get("instance_loss") or resolve(self.instance_loss, "instance_loss")

    @property
    def center(self) -> SeparableLoss | Criterion:
        return self.fixed.get("center_loss") or resolve(self.center_loss, "center_loss")
