"""Separable pixel losses: ℓ(P, G) = R(Σ φ(P_i, G_i), |Ω|).

A pixel loss looks at two images only through four sums and the number of pixels. Written once, as the choice of
those sums and the reduction R, the same object serves the whole image, every instance, blob loss and the centre maps.

The pointwise feature of cross-entropy and focal loss is a function of `w = |P - G|`, the probability given to the
wrong answer, and of its cost `c = -log(1 - w)`, which comes from the logit where there is one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "EPS",
    "CrossEntropy",
    "Dice",
    "Focal",
    "GeneralizedDice",
    "InverseWeightedDice",
    "Pointwise",
    "SeparableLoss",
    "Sums",
    "Tversky",
    "WeightedSum",
    "check_not_negative",
    "cost_of",
    "resolve",
]

EPS = 1e-7  # the logarithm of a given probability is log(max(p, EPS))


class Sums(NamedTuple):
    """What a separable loss sees of a pair of images (P, G); tensors of one common shape, float64."""

    intersection: Tensor  # Σ P·G
    pred: Tensor  # Σ P, or Σ P² for a loss with `squared`
    target: Tensor  # Σ G
    pointwise: Tensor  # Σ v(w, c), zero for a loss without a pointwise part


def cost_of(right: Tensor) -> Tensor:
    """`-log(max(r, EPS))` of a given probability r of the right answer; its derivative is 0 below EPS."""
    return -right.clamp(min=EPS).log()


@dataclass(frozen=True)
class Pointwise:
    """v(w, c) = w^gamma · c: cross-entropy for gamma = 0, focal loss (Lin et al. 2017) for gamma > 0."""

    gamma: float

    def __call__(self, wrong: Tensor, cost: Tensor) -> Tensor:
        return cost if self.gamma == 0 else wrong**self.gamma * cost

    def slope(self, wrong: Tensor, cost: Tensor, logits: bool) -> Tensor:
        """dv/ds for s the logit of the wrong answer, or dv/dw for given probabilities."""
        power = wrong**self.gamma if self.gamma else 1.0
        if logits:
            return torch.add(wrong, torch.addcmul(cost, cost, wrong, value=-1), alpha=self.gamma).mul_(power)
        # exp(c) is 1 / (1 - w) without its cancellation; c at its limit is constant.
        slope = power * torch.where(cost < -math.log(EPS) * (1 - 1e-6), cost.exp(), 0.0)
        return slope + self.gamma * wrong ** (self.gamma - 1) * cost if self.gamma else slope

    @property
    def missed(self) -> float:
        """v of a masked-out pixel (P = 0) inside the target (G = 1)."""
        return -math.log(EPS)


class SeparableLoss:
    """Base of the separable losses: which sums are needed, and the reduction R."""

    squared: bool = False
    pointwise: Pointwise | None = None

    def reduce(self, sums: Sums, omega: Tensor) -> Tensor:
        """R for independent one-channel planes: `sums` and `omega` (pixels per plane) broadcast to the result."""
        raise TypeError(f"{type(self).__name__} does not define reduce(sums, omega)")

    def reduce_channels(self, sums: Sums, omega: Tensor, *, categorical: bool) -> Tensor:
        """R for the pixel term of images [B, C]; overridden where a loss couples the channels.

        `categorical` says that the channels are one softmax distribution, so that `sums.pointwise` counts G = 1 only.
        """
        del categorical
        return self.reduce(sums, omega)


def check_not_negative(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"expected {name} to be a finite number >= 0, got {value}")


@dataclass(frozen=True)
class Dice(SeparableLoss):
    """1 - (2ΣPG + smooth_nr) / (ΣP + ΣG + smooth_dr); MONAI's variants with `squared_pred` and `jaccard`."""

    smooth_nr: float = 1e-5
    smooth_dr: float = 1e-5
    squared_pred: bool = False
    jaccard: bool = False

    def __post_init__(self) -> None:
        check_not_negative(smooth_nr=self.smooth_nr, smooth_dr=self.smooth_dr)

    @property
    def squared(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.squared_pred

    def reduce(self, sums: Sums, omega: Tensor) -> Tensor:
        del omega
        denominator = sums.pred + sums.target
        if self.jaccard:
            denominator = 2 * (denominator - sums.intersection)
        return 1 - (2 * sums.intersection + self.smooth_nr) / (denominator + self.smooth_dr)


@dataclass(frozen=True)
class Tversky(SeparableLoss):
    """1 - (TP + smooth_nr) / (TP + alpha·FP + beta·FN + smooth_dr) (Salehi et al. 2017, as MONAI)."""

    alpha: float = 0.5
    beta: float = 0.5
    smooth_nr: float = 1e-5
    smooth_dr: float = 1e-5

    def __post_init__(self) -> None:
        check_not_negative(alpha=self.alpha, beta=self.beta, smooth_nr=self.smooth_nr, smooth_dr=self.smooth_dr)

    def reduce(self, sums: Sums, omega: Tensor) -> Tensor:
        del omega
        tp = sums.intersection
        fp, fn = sums.pred - tp, sums.target - tp
        return 1 - (tp + self.smooth_nr) / (tp + self.alpha * fp + self.beta * fn + self.smooth_dr)


@dataclass(frozen=True)
class GeneralizedDice(SeparableLoss):
    """Generalized Dice (Sudre et al. 2017) with class weights 1/|G|², as MONAI.

    An empty class takes the largest weight of its image; a plane on its own with an empty target has weight 0, hence
    value and gradient 0.
    """

    smooth_nr: float = 1e-5
    smooth_dr: float = 1e-5

    def __post_init__(self) -> None:
        check_not_negative(smooth_nr=self.smooth_nr, smooth_dr=self.smooth_dr)

    def _ratio(self, numerator: Tensor, denominator: Tensor) -> Tensor:
        return 1 - (2 * numerator + self.smooth_nr) / (denominator + self.smooth_dr)

    @staticmethod
    def _weight(target: Tensor) -> Tensor:
        return (target > 0) / target.clamp(min=1).square()

    def reduce(self, sums: Sums, omega: Tensor) -> Tensor:
        del omega
        weight = self._weight(sums.target)
        return self._ratio(weight * sums.intersection, weight * (sums.pred + sums.target))

    def reduce_channels(self, sums: Sums, omega: Tensor, *, categorical: bool) -> Tensor:
        del omega, categorical
        weight = self._weight(sums.target)
        weight = torch.where(sums.target > 0, weight, weight.amax(1, keepdim=True))
        numerator = (weight * sums.intersection).sum(1, keepdim=True)
        denominator = (weight * (sums.pred + sums.target)).sum(1, keepdim=True)
        return self._ratio(numerator, denominator).expand_as(weight)


@dataclass(frozen=True)
class CrossEntropy(SeparableLoss):
    """Mean over Ω of -log of the probability of the right answer: binary per plane, categorical under softmax."""

    pointwise = Pointwise(0.0)

    def reduce(self, sums: Sums, omega: Tensor) -> Tensor:
        return sums.pointwise / omega.clamp(min=1)

    def reduce_channels(self, sums: Sums, omega: Tensor, *, categorical: bool) -> Tensor:
        value = self.reduce(sums, omega)
        return value.sum(1, keepdim=True).expand_as(value) if categorical else value


@dataclass(frozen=True)
class Focal(SeparableLoss):
    """Mean over Ω of the focal loss w^gamma · c, without alpha (Lin et al. 2017, as MONAI)."""

    gamma: float = 2.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.gamma) and (self.gamma == 0 or self.gamma >= 1)):
            raise ValueError(
                f"expected gamma to be 0 or at least 1, got {self.gamma}; in between the slope is unbounded"
            )

    @property
    def pointwise(self) -> Pointwise:  # pyright: ignore[reportIncompatibleVariableOverride]
        return Pointwise(float(self.gamma))

    def reduce(self, sums: Sums, omega: Tensor) -> Tensor:
        return sums.pointwise / omega.clamp(min=1)


@dataclass(frozen=True)
class InverseWeightedDice(SeparableLoss):
    """Dice with each pixel weighted by 1/size of its instance (Shirokikh et al. 2020).

    As the pixel term the instances are those of the ground truth, the background is one more of its own size, and the
    weight of a pixel is |Ω| / ((K + 1)·size): see `terms.inverse_weighted_dice`. As an instance, blob or centre loss
    the whole target mask counts as one instance.
    """

    smooth_nr: float = 1e-5
    smooth_dr: float = 1e-5

    def __post_init__(self) -> None:
        check_not_negative(smooth_nr=self.smooth_nr, smooth_dr=self.smooth_dr)

    def reduce(self, sums: Sums, omega: Tensor) -> Tensor:
        inside, outside = self.weights(sums.target, omega, (sums.target > 0).to(omega.dtype))
        return self.ratio(
            inside * sums.intersection,
            inside * (sums.intersection + sums.target) + outside * (sums.pred - sums.intersection),
        )

    def ratio(self, intersection: Tensor, total: Tensor) -> Tensor:
        return 1 - (2 * intersection + self.smooth_nr) / (total + self.smooth_dr)

    @staticmethod
    def weights(size: Tensor, omega: Tensor, instances: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of a pixel in an instance of `size`, and in a background of |Ω| - size."""
        share = omega / (instances + 1)
        return share / size.clamp(min=1), share / (omega - size).clamp(min=1)


@dataclass(frozen=True)
class WeightedSum(SeparableLoss):
    """λ_1·ℓ_1 + λ_2·ℓ_2 + …: Dice + cross-entropy, Generalized Dice + focal (GDF)."""

    parts: tuple[tuple[float, SeparableLoss], ...]

    def __post_init__(self) -> None:
        if len({loss.pointwise for _, loss in self.parts if loss.pointwise}) > 1:
            raise ValueError("expected at most one pointwise function among the parts of a weighted sum")
        if len({loss.squared for _, loss in self.parts if not isinstance(loss, CrossEntropy | Focal)}) > 1:
            raise ValueError("expected all parts of a weighted sum to agree on squared_pred")

    @property
    def squared(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(loss.squared for _, loss in self.parts)

    @property
    def pointwise(self) -> Pointwise | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return next((loss.pointwise for _, loss in self.parts if loss.pointwise), None)

    def reduce(self, sums: Sums, omega: Tensor) -> Tensor:
        return torch.stack([weight * loss.reduce(sums, omega) for weight, loss in self.parts]).sum(0)

    def reduce_channels(self, sums: Sums, omega: Tensor, *, categorical: bool) -> Tensor:
        values = [w * loss.reduce_channels(sums, omega, categorical=categorical) for w, loss in self.parts]
        return torch.stack(values).sum(0)


_BY_NAME: dict[str, SeparableLoss] = {
    "dice": Dice(),
    "ce": CrossEntropy(),
    "dicece": WeightedSum(((1.0, Dice()), (1.0, CrossEntropy()))),
    "generalized_dice": GeneralizedDice(),
    "focal": Focal(),
    "gdf": WeightedSum(((1.0, GeneralizedDice()), (1.0, Focal()))),
    "tversky": Tversky(),
    "inverse_weighted_dice": InverseWeightedDice(),
}


def resolve(loss: object, argument: str) -> SeparableLoss:
    """The separable loss meant by a name, by a `SeparableLoss`, or by a module that holds one as `.separable`.

    Raises ValueError for an unknown name and TypeError for anything else, naming `argument`.
    """
    if isinstance(loss, str):
        if loss not in _BY_NAME:
            raise ValueError(f"expected {argument} to be one of {', '.join(_BY_NAME)}, got {loss!r}")
        return _BY_NAME[loss]
    separable = getattr(loss, "separable", loss)
    if not isinstance(separable, SeparableLoss):
        raise TypeError(
            f"expected {argument} to be a name ({', '.join(_BY_NAME)}) or a pixel loss of fastinstance, got {loss!r}"
        )
    return separable
