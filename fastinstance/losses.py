"""Loss modules: they hold settings and weights."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict, Unpack

from torch import Tensor, nn

from .dispatch import evaluate, weighted_sum
from .parallel import ProcessGroup
from .pixel import (
    CrossEntropy,
    Dice,
    Focal,
    GeneralizedDice,
    InverseWeightedDice,
    SeparableLoss,
    Tversky,
    WeightedSum,
    check_not_negative,
)
from .settings import Settings
from .terms import BlobTerms, InstanceTerms

__all__ = [
    "BlobLoss",
    "DetectionLoss",
    "DiceCELoss",
    "DiceLoss",
    "FalseLoss",
    "FocalLoss",
    "GeneralizedDiceFocalLoss",
    "GeneralizedDiceLoss",
    "ICILoss",
    "InstanceLoss",
    "InverseWeightedDiceLoss",
    "ProximityLoss",
    "TverskyLoss",
]


class ImageOptions(TypedDict, total=False):
    """How images are read; see `fastinstance.functional.instance_terms`."""

    include_background: bool
    to_onehot_y: bool
    sigmoid: bool
    softmax: bool
    other_act: Callable[[Tensor], Tensor] | None
    reduction: str


class LabelledOptions(ImageOptions, total=False):
    """Settings of a pixel loss that looks at the ground-truth instances; see `fastinstance.functional.pixel_loss`."""

    connectivity: int | None


class BlobOptions(LabelledOptions, total=False):
    """Settings of blob loss; see `fastinstance.functional.blob_terms`."""

    pixel_loss: object
    instance_loss: object
    min_size: int
    max_instances: int | None
    process_group: ProcessGroup


class InstanceOptions(BlobOptions, total=False):
    """Settings of the instance losses; see `fastinstance.functional.instance_terms`."""

    center_loss: object
    average: str
    threshold: float
    center_size: int | Sequence[int]
    spacing: float | Sequence[float] | None
    pred_normalizer: str
    missed: str
    missed_weight: float
    mask_target: bool
    proximity_reduction: str
    weight_by: str | Callable[[Tensor], Tensor]


def _check_weights(weights: Mapping[str, float]) -> None:
    for name, weight in weights.items():
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"expected {name} to be a finite weight, got {weight!r}")
    if not any(weights.values()):
        raise ValueError(f"expected at least one weight other than 0, got {dict(weights)}")


class BaseLoss(nn.Module):
    settings: Settings

    def _set(self, known: Any, options: Mapping[str, Any], **own: object) -> None:
        """Make the settings, of which `options` are what the caller gave and `known` is their TypedDict.

        Raises:
            TypeError: an option that this loss does not have; `Settings` would take it and nothing would come of it.
        """
        for name in options:
            if name in known.__optional_keys__:
                continue
            mine = [p for cls in type(self).__mro__ for p in inspect.signature(cls.__init__).parameters.values()]
            names = sorted({p.name for p in mine if p.kind is p.KEYWORD_ONLY} | known.__optional_keys__)
            close = difflib.get_close_matches(name, names, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise TypeError(f"expected arguments of {type(self).__name__} among {', '.join(names)}, got {name}{hint}")
        self.settings = Settings(**own, **options)  # pyright: ignore[reportArgumentType]

    def extra_repr(self) -> str:
        """The settings that differ from the defaults."""
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.changed.items())


class _PixelLoss(BaseLoss):
    """A pixel loss as a module; also accepted as `pixel_loss=`, `instance_loss=` and `center_loss=`."""

    def __init__(self, separable: SeparableLoss, options: ImageOptions, known: Any = ImageOptions) -> None:
        super().__init__()
        self.separable = separable
        self._set(known, options, pixel_loss=separable)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        target_labels: Tensor | None = None,
        valid_mask: Tensor | None = None,
    ) -> Tensor:
        """The loss: a scalar, or `[B, C]` for `reduction="none"`. Arguments as `functional.pixel_loss`."""
        return weighted_sum(self.settings, {"seg": 1.0}, input, target, target_labels, valid_mask)


class DiceLoss(_PixelLoss):
    """Dice loss, equal to `monai.losses.DiceLoss`."""

    def __init__(
        self,
        *,
        squared_pred: bool = False,
        jaccard: bool = False,
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        **options: Unpack[ImageOptions],
    ) -> None:
        super().__init__(Dice(smooth_nr, smooth_dr, squared_pred, jaccard), options)


class DiceCELoss(_PixelLoss):
    """Dice plus cross-entropy, binary or (with `softmax`) categorical.

    Equal to `monai.losses.DiceCELoss` for one channel with `sigmoid` and for several with `softmax`; MONAI takes the
    categorical cross-entropy for several channels whatever the activation, and with the background in any case.
    """

    def __init__(
        self,
        *,
        squared_pred: bool = False,
        jaccard: bool = False,
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        lambda_dice: float = 1.0,
        lambda_ce: float = 1.0,
        **options: Unpack[ImageOptions],
    ) -> None:
        check_not_negative(lambda_dice=lambda_dice, lambda_ce=lambda_ce)
        dice = Dice(smooth_nr, smooth_dr, squared_pred, jaccard)
        super().__init__(WeightedSum(((lambda_dice, dice), (lambda_ce, CrossEntropy()))), options)


class GeneralizedDiceLoss(_PixelLoss):
    """Generalized Dice loss with weights 1/|G|², equal to `monai.losses.GeneralizedDiceLoss`."""

    def __init__(self, *, smooth_nr: float = 1e-5, smooth_dr: float = 1e-5, **options: Unpack[ImageOptions]) -> None:
        super().__init__(GeneralizedDice(smooth_nr, smooth_dr), options)


class FocalLoss(_PixelLoss):
    """Focal loss without alpha; with `softmax` it is MONAI's `FocalLoss(use_softmax=True)`, else the binary one."""

    def __init__(self, *, gamma: float = 2.0, **options: Unpack[ImageOptions]) -> None:
        super().__init__(Focal(gamma), options)


class GeneralizedDiceFocalLoss(_PixelLoss):
    """Generalized Dice plus focal loss (GDF), the paper's pixel loss.

    Equal to `monai.losses.GeneralizedDiceFocalLoss` with `sigmoid`; with `softmax` the focal part is the softmax one.
    """

    def __init__(
        self,
        *,
        gamma: float = 2.0,
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        lambda_gdl: float = 1.0,
        lambda_focal: float = 1.0,
        **options: Unpack[ImageOptions],
    ) -> None:
        check_not_negative(lambda_gdl=lambda_gdl, lambda_focal=lambda_focal)
        parts = ((lambda_gdl, GeneralizedDice(smooth_nr, smooth_dr)), (lambda_focal, Focal(gamma)))
        super().__init__(WeightedSum(parts), options)


class TverskyLoss(_PixelLoss):
    """Tversky loss, `alpha` for false positives and `beta` for false negatives, equal to `monai.losses.TverskyLoss`."""

    def __init__(
        self,
        *,
        alpha: float = 0.5,
        beta: float = 0.5,
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        **options: Unpack[ImageOptions],
    ) -> None:
        super().__init__(Tversky(alpha, beta, smooth_nr, smooth_dr), options)


class InverseWeightedDiceLoss(_PixelLoss):
    """Dice with each pixel weighted by 1/size of its ground-truth instance (Shirokikh et al. 2020)."""

    def __init__(self, *, smooth_nr: float = 1e-5, smooth_dr: float = 1e-5, **options: Unpack[LabelledOptions]) -> None:
        super().__init__(InverseWeightedDice(smooth_nr, smooth_dr), options, LabelledOptions)


class InstanceLoss(BaseLoss):
    """Weighted sum of the pixel term and the instance terms (Eq. 11); a term of weight 0 is not computed.

    The weights are α, β, γ, λ, σ, ω, δ of the paper in this order. Settings are those of `functional.instance_terms`.

    Example:
        >>> loss = InstanceLoss(seg=1, instance_gt=1, sigmoid=True)
        >>> loss(logits, target).backward()
    """

    def __init__(
        self,
        *,
        seg: float = 1.0,
        instance_gt: float = 0.0,
        instance_pred: float = 0.0,
        center: float = 0.0,
        false_gt: float = 0.0,
        false_pred: float = 0.0,
        proximity: float = 0.0,
        **options: Unpack[InstanceOptions],
    ) -> None:
        super().__init__()
        self.weights = InstanceTerms(seg, instance_gt, instance_pred, center, false_gt, false_pred, proximity)  # pyright: ignore[reportArgumentType]
        _check_weights(self.weights._asdict())
        self._set(InstanceOptions, options)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        target_labels: Tensor | None = None,
        valid_mask: Tensor | None = None,
    ) -> Tensor:
        """The weighted sum: a scalar, or `[B, C]` for `reduction="none"`. Arguments as `functional.instance_terms`."""
        weights = {name: weight for name, weight in self.weights._asdict().items() if weight}
        return weighted_sum(self.settings, weights, input, target, target_labels, valid_mask)

    def terms(
        self,
        input: Tensor,
        target: Tensor,
        *,
        target_labels: Tensor | None = None,
        valid_mask: Tensor | None = None,
    ) -> InstanceTerms:
        """All seven terms, unweighted and with gradients, whatever their weights."""
        return InstanceTerms(**evaluate(self.settings, self.weights._fields, input, target, target_labels, valid_mask))

    def extra_repr(self) -> str:
        weights = ", ".join(f"{name}={weight:g}" for name, weight in self.weights._asdict().items() if weight)
        return ", ".join(filter(None, (weights, super().extra_repr())))


class ICILoss(InstanceLoss):
    """Instance segmentation and instance centre loss (Eq. 12)."""

    def __init__(
        self,
        *,
        seg: float = 0.25,
        instance_gt: float = 0.5,
        instance_pred: float = 0.0,
        center: float = 0.25,
        **options: Unpack[InstanceOptions],
    ) -> None:
        super().__init__(seg=seg, instance_gt=instance_gt, instance_pred=instance_pred, center=center, **options)


class FalseLoss(InstanceLoss):
    """Pixel loss and false instance rates (Eq. 13)."""

    def __init__(
        self,
        *,
        seg: float = 1.0,
        false_gt: float = 1.0,
        false_pred: float = 1.0,
        **options: Unpack[InstanceOptions],
    ) -> None:
        super().__init__(seg=seg, false_gt=false_gt, false_pred=false_pred, **options)


class DetectionLoss(FalseLoss):
    """`FalseLoss` with `missed="soft"`: the loss for finding lesions, and the one to begin with.

    Named for its purpose. `FalseLoss` moves the instances that are found; the soft terms also raise the most likely
    pixel of each missed instance and lower each false component, so that every error of detection has a gradient.
    """

    def __init__(
        self,
        *,
        seg: float = 1.0,
        false_gt: float = 1.0,
        false_pred: float = 1.0,
        **options: Unpack[InstanceOptions],
    ) -> None:
        options.setdefault("missed", "soft")
        super().__init__(seg=seg, false_gt=false_gt, false_pred=false_pred, **options)


class ProximityLoss(InstanceLoss):
    """Pixel loss and instance proximity (Eq. 14).

    The proximity term is the square of a difference of sums: it is not bounded, reaches millions at the start of a
    training, and pushes the ground-truth side's loss up where the predicted side's sum is larger. Train on the pixel
    loss alone for about half of the schedule first.
    """

    def __init__(self, *, seg: float = 1.0, proximity: float = 0.1, **options: Unpack[InstanceOptions]) -> None:
        super().__init__(seg=seg, proximity=proximity, **options)


class BlobLoss(BaseLoss):
    """Blob loss (Kofler et al. 2023): `pixel_weight`·ℓ + `blob_weight`·(mean ℓ over ground-truth instances).

    `instance_loss=None` takes `pixel_loss` for the instances too. Settings are those of `functional.blob_terms`.
    """

    def __init__(self, *, pixel_weight: float = 2.0, blob_weight: float = 1.0, **options: Unpack[BlobOptions]) -> None:
        super().__init__()
        _check_weights({"pixel_weight": pixel_weight, "blob_weight": blob_weight})
        self.weights = BlobTerms(pixel_weight, blob_weight)  # pyright: ignore[reportArgumentType]
        if options.get("instance_loss") is None:
            options["instance_loss"] = options.get("pixel_loss", Settings.pixel_loss)
        self._set(BlobOptions, options)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        target_labels: Tensor | None = None,
        valid_mask: Tensor | None = None,
    ) -> Tensor:
        """The weighted sum: a scalar, or `[B, C]` for `reduction="none"`. Arguments as `functional.blob_terms`."""
        return weighted_sum(self.settings, self.weights._asdict(), input, target, target_labels, valid_mask)

    def terms(
        self,
        input: Tensor,
        target: Tensor,
        *,
        target_labels: Tensor | None = None,
        valid_mask: Tensor | None = None,
    ) -> BlobTerms:
        """Both parts, unweighted and with gradients."""
        return BlobTerms(**evaluate(self.settings, self.weights._fields, input, target, target_labels, valid_mask))

    def extra_repr(self) -> str:
        weights = f"pixel_weight={self.weights.seg:g}, blob_weight={self.weights.blob:g}"
        return ", ".join(filter(None, (weights, super().extra_repr())))
