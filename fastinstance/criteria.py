"""What may be given as a pixel loss: a name, a pixel loss of this library, a MONAI loss, any callable.

A loss that only needs sums over pixels is `SeparableLoss`; MONAI's are recognised by their settings. Everything else
is a `Criterion`, which is evaluated on masked images (`masked`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from . import pixel
from .pixel import CrossEntropy, Dice, Focal, GeneralizedDice, SeparableLoss, Tversky, WeightedSum

__all__ = ["Criterion", "Recognised", "advise", "recognise", "resolve"]


@dataclass(frozen=True)
class Criterion:
    """Any `(P, G) -> scalar` on images `[B, C, *S]`, P probabilities and G 0 or 1 of the same dtype."""

    function: Callable[..., Any]
    argument: str  # as what it was given, for messages

    # It asks for no sums beyond those that other terms need.
    squared = False
    pointwise = None

    def __post_init__(self) -> None:
        trained = isinstance(self.function, nn.Module) and any(p.requires_grad for p in self.function.parameters())
        if trained and "pixel" not in self.argument:
            raise ValueError(
                f"expected {self.argument} without parameters that are trained, got {self.name}: they get a gradient "
                "from whole images only; freeze them with .requires_grad_(False)"
            )

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)


class Recognised(NamedTuple):
    """A criterion that is separable on one-channel images."""

    loss: SeparableLoss
    sigmoid: bool  # whether P is taken for logits, except in a pointwise part
    pointwise_sigmoid: bool = True  # and in a pointwise part


# Settings under which a MONAI loss of one channel is the separable one of its name.
_USUAL = {
    "include_background": True,
    "to_onehot_y": False,
    "softmax": False,
    "use_softmax": False,
    "other_act": None,
    "reduction": "mean",
    "class_weight": None,
    "weight": None,
    "pos_weight": None,
    "soft_label": False,
    "ignore_index": None,
    "w_type": "square",
}

_SIMPLE: dict[str, Callable[[Any], SeparableLoss]] = {
    "DiceLoss": lambda given: Dice(given.smooth_nr, given.smooth_dr, given.squared_pred, given.jaccard),
    "GeneralizedDiceLoss": lambda given: GeneralizedDice(given.smooth_nr, given.smooth_dr),
    "TverskyLoss": lambda given: Tversky(given.alpha, given.beta, given.smooth_nr, given.smooth_dr),
    "FocalLoss": lambda given: Focal(given.gamma),
    "BCEWithLogitsLoss": lambda given: CrossEntropy(),
}

_COMPOUND = {
    "DiceCELoss": (("lambda_dice", "dice"), ("lambda_ce", "binary_cross_entropy")),
    "DiceFocalLoss": (("lambda_dice", "dice"), ("lambda_focal", "focal")),
    "GeneralizedDiceFocalLoss": (("lambda_gdl", "generalized_dice"), ("lambda_focal", "focal")),
}

_NAMES = {
    "DiceLoss": "dice",
    "DiceCELoss": "dicece",
    "GeneralizedDiceLoss": "generalized_dice",
    "FocalLoss": "focal",
    "GeneralizedDiceFocalLoss": "gdf",
    "TverskyLoss": "tversky",
    "BCELoss": "ce",
    "BCEWithLogitsLoss": "ce",
}
"""The separable loss that stands in for a class of this name."""


def _is_usual(given: object) -> bool:
    for name, usual in _USUAL.items():
        value = getattr(given, name, usual)
        if not (value is usual or (isinstance(value, str) and value == usual)):
            return False
    return type(given).__name__ != "FocalLoss" or getattr(given, "alpha", None) is None


def recognise(given: object) -> Recognised | None:
    """The separable loss that a loss of MONAI (or torch's `BCEWithLogitsLoss`) is on one-channel images, if any."""
    kind = type(given)
    if not kind.__module__.startswith(("monai.losses.", "torch.nn.modules.loss")):
        return None
    if kind.__name__ in _COMPOUND:
        parts = [(getattr(given, weight), getattr(given, part)) for weight, part in _COMPOUND[kind.__name__]]
    else:
        parts = [(1.0, given)]
    if getattr(given, "to_onehot_y", False) or not all(
        type(part).__name__ in _SIMPLE and _is_usual(part) for _, part in parts
    ):
        return None
    try:
        losses = tuple((weight, _SIMPLE[type(part).__name__](part)) for weight, part in parts)
        loss = losses[0][1] if len(losses) == 1 else WeightedSum(losses)
    except ValueError:  # a setting that has no separable form here
        return None
    return Recognised(loss, sigmoid=getattr(parts[0][1], "sigmoid", True))


def resolve(loss: object, argument: str) -> SeparableLoss | Criterion:
    """The loss meant by a name, a `SeparableLoss`, a module that holds one as `.separable`, or a callable.

    A MONAI loss that takes probabilities is recognised; one that applies a sigmoid of its own is called as it is.
    Raises ValueError for an unknown name and TypeError for what cannot be called, naming `argument`.
    """
    if not callable(loss) or isinstance(loss, type) or hasattr(loss, "separable"):
        return pixel.resolve(loss, argument)
    known = recognise(loss)
    joins_images = argument == "pixel_loss" and getattr(loss, "batch", False)
    if known is not None and not known.sigmoid and known.loss.pointwise is None and not joins_images:
        return known.loss
    return Criterion(loss, argument)


_SEEN = {
    "pixel_loss": "whole images",
    "center_loss": "a pair of maps for every plane",
    "loss_function_center": "a pair of maps for every plane",
}
"""What a criterion is called on; any other sees a masked image for every instance."""
_advised: set[tuple[str, str]] = set()


def advise(criterion: Criterion) -> None:
    """Say once for each kind of criterion which separable loss is faster, and if it takes probabilities for logits."""
    argument, sees = criterion.argument, _SEEN.get(criterion.argument, "a masked image for every instance")
    faster = "a pixel loss of fastinstance, such as DiceLoss()"
    if argument.endswith("_loss"):  # what is an argument of `compat` sees what the original saw, and may be no name
        for activation in ("sigmoid", "softmax"):
            if getattr(criterion.function, activation, False) is True:
                sees += f", whose probabilities it takes for logits ({activation}=True)"
        separable = _NAMES.get(criterion.name)
        faster = f"one of {', '.join(pixel.NAMES)}" if separable is None else repr(separable)
    if (criterion.name, sees) in _advised:
        return
    _advised.add((criterion.name, sees))
    warnings.warn(
        f"{argument}={criterion.name} is called on {sees}; a separable loss, which needs only sums, is faster, on a "
        f"GPU by far: {argument}={faster}",
        UserWarning,
        stacklevel=2,
    )
