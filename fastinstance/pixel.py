"""Separable pixel losses: ℓ(P, G) = R(Σ φ(P_i, G_i), |Ω|).

A pixel loss looks at two images only through four sums and the number of pixels. A loss is the data that say which
sums it takes and what R makes of them, its `Form`: torch and the GPU kernels evaluate the same one, and it serves the
whole image, every instance, blob loss and the centre maps.

The pointwise feature of cross-entropy and focal loss is a function of `w = |P - G|`, the probability given to the
wrong answer, and of its cost `c = -log(1 - w)`, which comes from the logit where there is one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_flags

__all__ = [
    "EPS",
    "NAMES",
    "CrossEntropy",
    "Dice",
    "Focal",
    "Form",
    "GeneralizedDice",
    "InverseWeightedDice",
    "Pointwise",
    "Ratio",
    "SeparableLoss",
    "Sums",
    "Tversky",
    "WeightedSum",
    "check_not_negative",
    "cost_of",
    "inverse_weights",
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

    def slope_needs_cost(self, logits: bool) -> bool:
        return self.gamma > 0 or not logits

    def slope(self, wrong: Tensor, cost: Tensor | None, logits: bool) -> Tensor:
        """dv/ds for s the logit of the wrong answer, or dv/dw for given probabilities."""
        if cost is None:
            return wrong
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


def inverse_weights(size: Tensor, omega: Tensor, instances: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of a pixel in an instance of `size`, and in a background of |Ω| - size: |Ω| / ((K + 1)·size)."""
    share = omega / (instances + 1)
    return share / size.clamp(min=1), share / (omega - size).clamp(min=1)


class Ratio(NamedTuple):
    """weight · (1 - (a·I + nr) / (b·I + c·P + d·G + dr)), I, P, G the sums Σ P·G, Σ P^k, Σ G of weighted pixels.

    The weights are 1 ("plain"), 1/|G|² and 0 if G is empty ("generalized"), or those of `inverse_weights` with G as
    the one instance ("inverse").
    """

    nr: float
    dr: float
    a: float = 2
    b: float = 0
    c: float = 1
    d: float = 1
    weighting: str = "plain"
    weight: float = 1

    def __call__(self, intersection: Tensor, pred: Tensor, target: Tensor) -> Tensor:
        denominator = self.b * intersection + self.c * pred + self.d * target + self.dr
        return self.weight * (1 - (self.a * intersection + self.nr) / denominator)


_WEIGHTINGS = ("plain", "generalized", "inverse")


class Form(NamedTuple):
    """R as data: the sum of the `ratios`, plus the two weights times the mean over Ω of v = w^gamma · c."""

    ratios: tuple[Ratio, ...] = ()
    pointwise_weight: float = 0
    joined_weight: float = 0  # the same, but channels that are one softmax distribution are summed
    gamma: float | None = None  # None: no pointwise part
    squared: bool = False  # k = 2

    @property
    def numbers(self) -> tuple[float, ...]:
        """R as the kernels take it: the two pointwise weights, then eight numbers for each ratio."""
        numbers = [float(self.pointwise_weight), float(self.joined_weight)]
        for ratio in self.ratios:
            numbers += map(float, (ratio.weight, ratio.a, ratio.nr, ratio.b, ratio.c, ratio.d, ratio.dr))
            numbers.append(float(_WEIGHTINGS.index(ratio.weighting)))
        return tuple(numbers)


class SeparableLoss:
    """Base of the separable losses: which sums are needed, and the reduction R, of the loss's `form`."""

    @cached_property
    def form(self) -> Form:
        raise TypeError(f"{type(self).__name__} does not define its form")

    @property
    def squared(self) -> bool:
        return self.form.squared

    @property
    def pointwise(self) -> Pointwise | None:
        return None if self.form.gamma is None else Pointwise(self.form.gamma)

    def reduce(self, sums: Sums, omega: Tensor) -> Tensor:
        """R for independent one-channel planes: `sums` and `omega` (pixels per plane) broadcast to the result."""
        return self._reduce(sums, omega, image=False, categorical=False)

    def reduce_channels(self, sums: Sums, omega: Tensor, *, categorical: bool) -> Tensor:
        """R for the pixel term of images [B, C].

        The channels share each "generalized" ratio, in which an empty one takes the largest weight of its image.
        `categorical` says that the channels are one softmax distribution, so that `sums.pointwise` counts G = 1 only.
        """
        return self._reduce(sums, omega, image=True, categorical=categorical)

    def _reduce(self, sums: Sums, omega: Tensor, *, image: bool, categorical: bool) -> Tensor:
        form, value = self.form, torch.zeros_like(sums.target)
        for ratio in form.ratios:
            intersection, pred, target, _ = sums
            if ratio.weighting == "generalized":
                weight = (target > 0) / target.clamp(min=1).square()
                if image:
                    weight = weight.where(target > 0, weight.amax(1, keepdim=True))
                columns = torch.stack((intersection, pred, target)) * weight
                intersection, pred, target = columns.sum(2, keepdim=True) if image else columns
            elif ratio.weighting == "inverse":
                inside, outside = inverse_weights(target, omega, (target > 0).to(omega.dtype))
                pred = inside * intersection + outside * (pred - intersection)
                intersection, target = inside * intersection, inside * target
            value = value + ratio(intersection, pred, target)
        if form.gamma is not None:
            mean = sums.pointwise / omega.clamp(min=1)
            joined = mean.sum(1, keepdim=True) if categorical else mean
            value = value + form.pointwise_weight * mean + form.joined_weight * joined
        return value


def check_not_negative(**values: float) -> None:
    for name, value in values.items():
        if not isinstance(value, Real) or not 0 <= value < math.inf:
            raise ValueError(f"expected {name} to be a finite number >= 0, got {value!r}")


@dataclass(frozen=True)
class Dice(SeparableLoss):
    """1 - (2ΣPG + smooth_nr) / (ΣP + ΣG + smooth_dr); MONAI's variants with `squared_pred` and `jaccard`."""

    smooth_nr: float = 1e-5
    smooth_dr: float = 1e-5
    squared_pred: bool = False
    jaccard: bool = False

    def __post_init__(self) -> None:
        check_not_negative(smooth_nr=self.smooth_nr, smooth_dr=self.smooth_dr)
        check_flags(squared_pred=self.squared_pred, jaccard=self.jaccard)

    @cached_property
    def form(self) -> Form:
        if self.jaccard:
            return Form((Ratio(self.smooth_nr, self.smooth_dr, b=-2, c=2, d=2),), squared=self.squared_pred)
        return Form((Ratio(self.smooth_nr, self.smooth_dr),), squared=self.squared_pred)


@dataclass(frozen=True)
class Tversky(SeparableLoss):
    """1 - (TP + smooth_nr) / (TP + alpha·FP + beta·FN + smooth_dr) (Salehi et al. 2017, as MONAI)."""

    alpha: float = 0.5
    beta: float = 0.5
    smooth_nr: float = 1e-5
    smooth_dr: float = 1e-5

    def __post_init__(self) -> None:
        check_not_negative(alpha=self.alpha, beta=self.beta, smooth_nr=self.smooth_nr, smooth_dr=self.smooth_dr)

    @cached_property
    def form(self) -> Form:
        both = 1 - self.alpha - self.beta  # TP + alpha·FP + beta·FN in I, P and G
        return Form((Ratio(self.smooth_nr, self.smooth_dr, a=1, b=both, c=self.alpha, d=self.beta),))


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

    @cached_property
    def form(self) -> Form:
        return Form((Ratio(self.smooth_nr, self.smooth_dr, weighting="generalized"),))


@dataclass(frozen=True)
class CrossEntropy(SeparableLoss):
    """Mean over Ω of -log of the probability of the right answer: binary per plane, categorical under softmax."""

    @cached_property
    def form(self) -> Form:
        return Form(joined_weight=1, gamma=0.0)


@dataclass(frozen=True)
class Focal(SeparableLoss):
    """Mean over Ω of the focal loss w^gamma · c, without alpha (Lin et al. 2017, as MONAI)."""

    gamma: float = 2.0

    def __post_init__(self) -> None:
        check_not_negative(gamma=self.gamma)
        if 0 < self.gamma < 1:
            raise ValueError(
                f"expected gamma to be 0 or at least 1, got {self.gamma}; in between the slope is unbounded"
            )

    @cached_property
    def form(self) -> Form:
        return Form(pointwise_weight=1, gamma=float(self.gamma))


@dataclass(frozen=True)
class InverseWeightedDice(SeparableLoss):
    """Dice with each pixel weighted by 1/size of its instance (Shirokikh et al. 2020).

    As the pixel term the instances are those of the ground truth, the background is one more of its own size, and the
    weight of a pixel is |Ω| / ((K + 1)·size): see `terms.inverse_weighted_dice`. As an instance, blob or centre loss
    the whole target mask counts as one instance, and as a part of a weighted sum.
    """

    smooth_nr: float = 1e-5
    smooth_dr: float = 1e-5

    def __post_init__(self) -> None:
        check_not_negative(smooth_nr=self.smooth_nr, smooth_dr=self.smooth_dr)

    @cached_property
    def form(self) -> Form:
        return Form((Ratio(self.smooth_nr, self.smooth_dr, weighting="inverse"),))


@dataclass(frozen=True)
class WeightedSum(SeparableLoss):
    """λ_1·ℓ_1 + λ_2·ℓ_2 + …: Dice + cross-entropy, Generalized Dice + focal (GDF)."""

    parts: tuple[tuple[float, SeparableLoss], ...]

    def __post_init__(self) -> None:
        forms = [loss.form for _, loss in self.parts]
        if len({form.gamma for form in forms if form.gamma is not None}) > 1:
            raise ValueError("expected at most one pointwise function among the parts of a weighted sum")
        if len({form.squared for form in forms if form.ratios}) > 1:
            raise ValueError("expected all parts of a weighted sum to agree on squared_pred")

    @cached_property
    def form(self) -> Form:
        forms = [(weight, loss.form) for weight, loss in self.parts]
        return Form(
            ratios=tuple(r._replace(weight=weight * r.weight) for weight, form in forms for r in form.ratios),
            pointwise_weight=sum(weight * form.pointwise_weight for weight, form in forms),
            joined_weight=sum(weight * form.joined_weight for weight, form in forms),
            gamma=next((form.gamma for _, form in forms if form.gamma is not None), None),
            squared=any(form.squared for _, form in forms),
        )


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


NAMES = tuple(_BY_NAME)


def resolve(loss: object, argument: str) -> SeparableLoss:
    """The separable loss meant by a name, by a `SeparableLoss`, or by a module that holds one as `.separable`.

    Raises ValueError for an unknown name and TypeError for anything else, naming `argument`.
    """
    if isinstance(loss, str):
        if loss not in _BY_NAME:
            raise ValueError(f"expected {argument} to be one of {', '.join(NAMES)}, got {loss!r}")
        return _BY_NAME[loss]
    separable = getattr(loss, "separable", loss)
    if not isinstance(separable, SeparableLoss):
        raise TypeError(
            f"expected {argument} to be a name ({', '.join(NAMES)}), a pixel loss of fastinstance or a function "
            f"(P, G) -> scalar, got {loss!r}"
        )
    return separable
