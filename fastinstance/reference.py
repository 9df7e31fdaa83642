"""The paper read aloud: one slow, literal loop over instances per equation.

"Eq. k" is equation k of Rachmadi, Byra and Skibbe, "A new family of instance-level loss functions ...",
Computers in Biology and Medicine 2024, doi 10.1016/j.compbiomed.2024.108414. Every masked image of the paper
is built here as an image, every loss is evaluated on whole images, and autograd gives the gradients. This is
the oracle that the fast code is tested against; nothing selects it for you.

A *plane* is one (batch, channel) image of shape `[*S]` (2D or 3D). It has a probability `p` per pixel,
ground-truth ids `t` (0 is background, N distinct ids otherwise) and predicted ids `q` (M distinct ids).
`A(n)` are the predicted instances that share a pixel with ground-truth instance n, `A(m)` the ground-truth
instances that share one with predicted instance m.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .terms import BlobTerms, InstanceTerms

EPS = 1e-7  # the smallest probability whose logarithm is taken
SMOOTH = 1e-5  # smoothing of numerators and denominators

Average: TypeAlias = Literal["instance", "image"]
Normalizer: TypeAlias = Literal["pred", "gt"]
Reduction: TypeAlias = Literal["mean", "sum", "none"]
# What an instance counts in a mean: 1, its size, or a function of a tensor of sizes.
WeightBy: TypeAlias = Literal["count", "size"] | Callable[[Tensor], Tensor]
# A pixel loss: a name, a name with options, or any callable `(P, G) -> scalar` on images `[1, 1, *S]`.
Loss: TypeAlias = str | tuple[str, Mapping[str, Any]] | Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Image:
    """A predicted image `[*S]`: `p`, `log p` and `log(1 - p)` per pixel; the pixels `valid` make up Ω."""

    p: Tensor
    log_p: Tensor
    log_not_p: Tensor
    valid: Tensor

    def only(self, keep: Tensor) -> "Image":
        """A copy in which every pixel outside the boolean `keep` `[*S]` is masked out: probability 0."""
        return Image(
            p=self.p.masked_fill(~keep, 0.0),
            log_p=self.log_p.masked_fill(~keep, math.log(EPS)),
            log_not_p=self.log_not_p.masked_fill(~keep, 0.0),
            valid=self.valid,
        )

    def restricted_to(self, valid: Tensor) -> "Image":
        """The image on the pixels `valid` `[*S]`: the others are masked out and do not count in |Ω|."""
        masked = self.only(valid)
        return Image(masked.p, masked.log_p, masked.log_not_p, valid)

    def spoiled(self) -> "Image":
        """NaN in every valid pixel, so that every value and gradient of the plane is NaN."""
        factor = torch.ones_like(self.p).masked_fill(self.valid, math.nan)
        return Image(self.p * factor, self.log_p * factor, self.log_not_p * factor, self.valid)

    def zero(self) -> Tensor:
        """A zero that is still connected to the graph, and NaN where the image is NaN."""
        return (self.p * 0.0).sum()


def image_from_logits(logits: Tensor) -> Image:
    """The image `[*S]` of one-channel logits; the logarithms come from the logits and are not clamped."""
    everywhere = torch.ones_like(logits, dtype=torch.bool)
    return Image(torch.sigmoid(logits), F.logsigmoid(logits), F.logsigmoid(-logits), everywhere)


def image_from_probabilities(p: Tensor) -> Image:
    """The image `[*S]` of given probabilities; log x is log(max(x, EPS)), with derivative 0 below EPS."""
    everywhere = torch.ones_like(p, dtype=torch.bool)
    return Image(p, torch.log(p.clamp(min=EPS)), torch.log((1 - p).clamp(min=EPS)), everywhere)


def dice(
    P: Image,
    G: Tensor,
    *,
    squared_pred: bool = False,
    jaccard: bool = False,
    smooth_nr: float = SMOOTH,
    smooth_dr: float = SMOOTH,
) -> Tensor:
    """Dice loss 1 - 2|PG| / (|P| + |G|).

    `squared_pred` sums p² and g² in the denominator; `jaccard` has twice the union as the denominator.
    """
    g = G.to(P.p.dtype)
    overlap = (P.p * g).sum()
    total = (P.p**2).sum() + (g**2).sum() if squared_pred else P.p.sum() + g.sum()
    denominator = 2 * (total - overlap) if jaccard else total
    return 1 - (2 * overlap + smooth_nr) / (denominator + smooth_dr)


def tversky(
    P: Image,
    G: Tensor,
    *,
    alpha: float = 0.5,
    beta: float = 0.5,
    smooth_nr: float = SMOOTH,
    smooth_dr: float = SMOOTH,
) -> Tensor:
    """Tversky loss 1 - TP / (TP + alpha FP + beta FN)."""
    g = G.to(P.p.dtype)
    true_positive = (P.p * g).sum()
    false_positive = (P.p * (1 - g)).sum()
    false_negative = ((1 - P.p) * g).sum()
    denominator = true_positive + alpha * false_positive + beta * false_negative
    return 1 - (true_positive + smooth_nr) / (denominator + smooth_dr)


def generalized_dice(
    Ps: Sequence[Image], Gs: Sequence[Tensor], *, smooth_nr: float = SMOOTH, smooth_dr: float = SMOOTH
) -> Tensor:
    """Generalized Dice (Sudre 2017) of an image with one P and one G per channel.

    Channel c weighs 1/|G_c|²; an empty one weighs as much as the heaviest of the others, 0 if there is none.
    """
    sizes = [int(G.sum()) for G in Gs]
    heaviest = max((1 / size**2 for size in sizes if size > 0), default=0.0)
    overlap, total = Ps[0].zero(), Ps[0].zero()
    for P, G, size in zip(Ps, Gs, sizes, strict=True):
        weight = 1 / size**2 if size > 0 else heaviest
        overlap = overlap + weight * (P.p * G).sum()
        total = total + weight * (P.p.sum() + size)
    return 1 - (2 * overlap + smooth_nr) / (total + smooth_dr)


def mean_over_pixels(values: Tensor, P: Image) -> Tensor:
    """The sum of `values` `[*S]` divided by |Ω|, the number of valid pixels."""
    return values.sum() / max(int(P.valid.sum()), 1)


def cross_entropy(P: Image, G: Tensor, *, softmax: bool = False) -> Tensor:
    """Mean over Ω of -log p where g = 1 and -log(1 - p) where g = 0; with `softmax` only where g = 1."""
    g = G.to(P.p.dtype)
    values = -g * P.log_p
    if not softmax:
        values = values - (1 - g) * P.log_not_p
    return mean_over_pixels(values, P)


def focal(P: Image, G: Tensor, *, gamma: float = 2.0, softmax: bool = False) -> Tensor:
    """Focal loss: the cross entropy of a pixel times (1 - p)^gamma where g = 1, and p^gamma where g = 0.

    The powers are taken as exp(gamma log ...), so that their derivative is finite for every gamma.
    """
    g = G.to(P.p.dtype)
    values = -g * torch.exp(gamma * P.log_not_p) * P.log_p
    if not softmax:
        values = values - (1 - g) * torch.exp(gamma * P.log_p) * P.log_not_p
    return mean_over_pixels(values, P)


def inverse_weighted_dice(
    P: Image, G: Tensor, ids: Tensor, *, smooth_nr: float = SMOOTH, smooth_dr: float = SMOOTH
) -> Tensor:
    """Dice in which a pixel of instance k weighs |Ω| / ((K + 1) |k|) (Shirokikh 2020).

    `ids` `[*S]` are the instances, K of them; the background (id 0) counts as one more of its own size.
    """
    g = G.to(P.p.dtype)
    instances = ids_in(ids)
    weight = torch.zeros_like(P.p)
    for k in [0, *instances]:
        pixels = (ids == k) & P.valid
        if pixels.any():
            weight[pixels] = int(P.valid.sum()) / ((len(instances) + 1) * int(pixels.sum()))
    overlap = (weight * P.p * g).sum()
    total = (weight * P.p).sum() + (weight * g).sum()
    return 1 - (2 * overlap + smooth_nr) / (total + smooth_dr)


def pixel_term(
    loss: Loss, Ps: Sequence[Image], Gs: Sequence[Tensor], ids: Sequence[Tensor], *, softmax: bool = False
) -> list[Tensor]:
    """L_seg of one image with C channels: one value per channel.

    A loss that couples the channels of an image gives each of them its one value. `softmax` says that the
    channels share one softmax: cross entropy and focal loss then only count g = 1, and cross entropy sums its
    channels. `ids` are the ground-truth instances of each channel, for the inverse-weighted Dice loss.
    """
    if callable(loss):
        images = [(P.p[None, None], G.to(P.p.dtype)[None, None]) for P, G in zip(Ps, Gs, strict=True)]
        return [loss(p, g) for p, g in images]
    name, given = (loss, {}) if isinstance(loss, str) else loss
    options = dict(given)
    channels = list(zip(Ps, Gs, strict=True))
    if name == "dice":
        return [dice(P, G, **options) for P, G in channels]
    if name == "tversky":
        return [tversky(P, G, **options) for P, G in channels]
    if name == "generalized_dice":
        return [generalized_dice(Ps, Gs, **options)] * len(channels)
    if name == "ce":
        values = [cross_entropy(P, G, softmax=softmax, **options) for P, G in channels]
        return [torch.stack(values).sum()] * len(channels) if softmax else values
    if name == "focal":
        return [focal(P, G, softmax=softmax, **options) for P, G in channels]
    if name == "inverse_weighted_dice":
        return [inverse_weighted_dice(P, G, k, **options) for (P, G), k in zip(channels, ids, strict=True)]
    if name == "dicece":
        lambda_dice, lambda_ce = options.pop("lambda_dice", 1.0), options.pop("lambda_ce", 1.0)
        dices = pixel_term(("dice", options), Ps, Gs, ids, softmax=softmax)
        entropies = pixel_term("ce", Ps, Gs, ids, softmax=softmax)
        return [lambda_dice * d + lambda_ce * e for d, e in zip(dices, entropies, strict=True)]
    if name == "gdf":
        lambda_gdl, lambda_focal = options.pop("lambda_gdl", 1.0), options.pop("lambda_focal", 1.0)
        gamma = options.pop("gamma", 2.0)
        dices = pixel_term(("generalized_dice", options), Ps, Gs, ids, softmax=softmax)
        focals = pixel_term(("focal", {"gamma": gamma}), Ps, Gs, ids, softmax=softmax)
        return [lambda_gdl * d + lambda_focal * f for d, f in zip(dices, focals, strict=True)]
    raise ValueError(f"unknown pixel loss {name!r}")


def plane_loss(loss: Loss) -> Callable[[Image, Tensor], Tensor]:
    """The pixel loss as ℓ(P, G) of a one-channel plane; the whole of G counts as one instance."""
    return lambda P, G: pixel_term(loss, [P], [G], [G.to(torch.int64)])[0]


def pixel_loss(name: str, **options: Any) -> Callable[[Image, Tensor], Tensor]:
    """ℓ(P, G) by name, with MONAI's option names: `pixel_loss("tversky", alpha=0.3, beta=0.7)`."""
    return plane_loss((name, options))


def connected_components(
    mask: Tensor,
    connectivity: int | None = None,
    min_size: int = 0,
) -> tuple[Tensor, Tensor]:
    """Connected components by iterated max-pooling (Appendix B), run until nothing changes.

    `mask` is boolean `[B, C, *S]`; `connectivity` is 4 or 8 in 2D, 6, 18 or 26 in 3D, the largest if None.
    Returns labels, int32 like `mask`, and counts, int32 `[B, C]`. Ids are 1..K in each plane in raster order
    of the first pixels, after components of fewer than `min_size` pixels have become background.
    """
    dimensions = mask.ndim - 2
    steps = {4: 1, 8: 2} if dimensions == 2 else {6: 1, 18: 2, 26: 3}
    axes_per_step = dimensions if connectivity is None else steps[connectivity]

    # A unique index per pixel, the largest at the first pixel: each component ends up with that of its first.
    pixels = math.prod(mask.shape[2:])
    unique = torch.arange(pixels, 0, -1, dtype=torch.float64, device=mask.device).reshape(mask.shape[2:])
    index = unique * mask
    while True:
        spread = max_over_neighbours(index, axes_per_step) * mask
        if torch.equal(spread, index):
            break
        index = spread

    labels = torch.zeros(mask.shape, dtype=torch.int32, device=mask.device)
    counts = torch.zeros(mask.shape[:2], dtype=torch.int32, device=mask.device)
    for b, c in batch_and_channel(mask):
        for first_pixel in sorted(ids_in(index[b, c]), reverse=True):
            component = index[b, c] == first_pixel
            if component.sum() >= min_size:
                counts[b, c] += 1
                labels[b, c][component] = counts[b, c]
    return labels, counts


def max_over_neighbours(index: Tensor, axes_per_step: int) -> Tensor:
    """The largest `index` `[B, C, *S]` within one step, which moves along at most `axes_per_step` axes."""
    dimensions = index.ndim - 2
    pool = F.max_pool2d if dimensions == 2 else F.max_pool3d
    largest = index
    for moved in combinations(range(dimensions), axes_per_step):
        kernel = [3 if axis in moved else 1 for axis in range(dimensions)]
        padding = [1 if axis in moved else 0 for axis in range(dimensions)]
        largest = torch.maximum(largest, pool(index, kernel, stride=1, padding=padding))
    return largest


def batch_and_channel(x: Tensor) -> list[tuple[int, int]]:
    """The (batch, channel) indices of all planes of `x` `[B, C, *S]`."""
    return [(b, c) for b in range(x.shape[0]) for c in range(x.shape[1])]


def ids_in(labels: Tensor) -> list[int]:
    """The distinct ids above 0, in ascending order."""
    return [int(k) for k in torch.unique(labels) if k > 0]


def drop_small(labels: Tensor, min_size: int) -> Tensor:
    """`labels` `[*S]` with every instance of fewer than `min_size` pixels made background."""
    kept = labels.clone()
    for k in ids_in(labels):
        if (labels == k).sum() < min_size:
            kept[labels == k] = 0
    return kept


def pixels_of(labels: Tensor, ids: Iterable[int]) -> Tensor:
    """The union of the instances `ids`, boolean `[*S]`."""
    union = torch.zeros_like(labels, dtype=torch.bool)
    for k in ids:
        union = union | (labels == k)
    return union


def instance_loss_gt(
    image: Image,
    t: Tensor,
    q: Tensor,
    loss: Callable[[Image, Tensor], Tensor],
    mask_target: bool = True,
) -> list[Tensor]:
    """Eq. 2: L_GT(n) for every ground-truth instance n.

    P keeps the predicted instances in A(n), without their pixels in other ground-truth instances; G is n.
    Without `mask_target` it also keeps what lies below the threshold inside of n.
    Without ground truth, the one entry has P = all predicted instances and an empty G.
    """
    entries = []
    for n in ids_in(t):
        touching = pixels_of(q, ids_in(q[t == n]))
        other_instances = (t > 0) & (t != n)
        kept = touching & ~other_instances
        P = image.only(kept if mask_target else kept | (t == n) & (q == 0))
        entries.append(loss(P, t == n) + image.zero())
    return entries or [loss(image.only(q > 0), t > 0) + image.zero()]


def instance_loss_pred(
    image: Image,
    t: Tensor,
    q: Tensor,
    loss: Callable[[Image, Tensor], Tensor],
) -> list[Tensor]:
    """Eq. 3: L_P(m) for every predicted instance m.

    P keeps m alone; G is the union of the ground-truth instances in A(m). Without predicted instances, the
    one entry has an empty P and G = all ground-truth instances.
    """
    entries = []
    for m in ids_in(q):
        touched = pixels_of(t, ids_in(t[q == m]))
        P = image.only(q == m)
        entries.append(loss(P, touched) + image.zero())
    return entries or [loss(image.only(q > 0), t > 0) + image.zero()]


def center_box(pixels: Tensor, size: Sequence[int]) -> tuple[slice, ...]:
    """The box of `size` pixels a side around the centroid of `pixels` `[*S]`, clipped at the border."""
    box = []
    for axis, coordinates in enumerate(pixels.nonzero().T):
        count = len(coordinates)
        centre = (2 * int(coordinates.sum()) + count) // (2 * count)
        start = centre - size[axis] // 2
        box.append(slice(max(start, 0), min(start + size[axis], pixels.shape[axis])))
    return tuple(box)


def center_loss(
    image: Image,
    t: Tensor,
    q: Tensor,
    loss: Callable[[Image, Tensor], Tensor],
    size: Sequence[int],
) -> Tensor:
    """Eq. 4: a pixel loss between the maps of the centres of the instances.

    The map of the ground truth is 1 on every box. In the predicted map the box of m has value 1 and the
    derivative of the mean of p over m. Where boxes overlap, the smallest id owns the pixel.
    """
    map_gt = torch.zeros_like(t, dtype=torch.bool)
    for n in ids_in(t):
        map_gt[center_box(t == n, size)] = True
    map_pred = image.p * 0.0
    for m in sorted(ids_in(q), reverse=True):
        mean = image.p[q == m].mean()
        map_pred[center_box(q == m, size)] = 1 + (mean - mean.detach())
    P = image_from_probabilities(map_pred).restricted_to(image.valid)
    return loss(P, map_gt & image.valid) + image.zero()


def instance_weight(size: int, weight_by: WeightBy) -> float:
    """What an instance of `size` pixels counts in a mean; the entry of an empty side has one pixel."""
    if callable(weight_by):
        return float(weight_by(torch.tensor([float(size)], dtype=torch.float64)))
    return float(size) if weight_by == "size" else 1.0


def weights_of(labels: Tensor, weight_by: WeightBy) -> list[float]:
    """The weight of every instance of `labels` `[*S]`, or of the one entry of an empty side."""
    sizes = [int((labels == k).sum()) for k in ids_in(labels)] or [1]
    return [instance_weight(size, weight_by) for size in sizes]


def weighted_mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ w·v / Σ w, 0 where all weights are."""
    total = sum(weights)
    return torch.stack([w * v for w, v in zip(weights, values, strict=True)]).sum() / (total if total > 0 else 1)


def largest(p: Tensor) -> Tensor:
    """The largest entry of `p` `[pixels]`; of equal ones, the first."""
    return next((value for value in p if (value >= p).all()), p[0])  # p[0] is NaN if nothing is largest


def false_rate_gt(
    image: Image, t: Tensor, q: Tensor, missed_weight: float = 0.0, weight_by: WeightBy = "count"
) -> Tensor:
    """Eq. 5: missed ground-truth instances / N, with the gradient of the mean of the Dice losses of Eq. 2.

    A missed instance counts 1 + missed_weight · (1 - its largest probability).
    """
    instances = ids_in(t)
    if not instances:
        return image.zero()
    values = []
    for n, dice_loss in zip(instances, instance_loss_gt(image, t, q, pixel_loss("dice")), strict=True):
        value = dice_loss - dice_loss.detach()
        if not ids_in(q[t == n]):
            value = value + 1
            if missed_weight:
                value = value + missed_weight * (1 - largest(image.p[t == n]))
        values.append(value)
    return weighted_mean(values, weights_of(t, weight_by))


def false_rate_pred(
    image: Image, t: Tensor, q: Tensor, missed_weight: float = 0.0, weight_by: WeightBy = "count"
) -> Tensor:
    """Eq. 6: false predicted instances / M, with the gradient of the mean of the Dice losses of Eq. 3.

    A false instance counts 1 + missed_weight · (its mean probability).
    """
    instances = ids_in(q)
    if not instances:
        return image.zero()
    values = []
    for m, dice_loss in zip(instances, instance_loss_pred(image, t, q, pixel_loss("dice")), strict=True):
        value = dice_loss - dice_loss.detach()
        if not ids_in(t[q == m]):
            value = value + 1
            if missed_weight:
                value = value + missed_weight * image.p[q == m].mean()
        values.append(value)
    return weighted_mean(values, weights_of(q, weight_by))


@dataclass(frozen=True)
class Box:
    """A box [lower, upper) in physical units, one number per axis."""

    lower: Sequence[float]
    upper: Sequence[float]

    def volume(self) -> float:
        return math.prod(high - low for low, high in zip(self.lower, self.upper, strict=True))

    def centre(self) -> list[float]:
        return [(low + high) / 2 for low, high in zip(self.lower, self.upper, strict=True)]


def tight_box(pixels: Tensor, spacing: Sequence[float]) -> Box:
    """The box [min, max + 1) around `pixels` `[*S]`, times the size of a pixel along each axis."""
    coordinates = pixels.nonzero()
    lower = [int(x) * s for x, s in zip(coordinates.amin(0), spacing, strict=True)]
    upper = [(int(x) + 1) * s for x, s in zip(coordinates.amax(0), spacing, strict=True)]
    return Box(lower, upper)


def artificial_box(shape: Sequence[int], spacing: Sequence[float]) -> Box:
    """The artificial instance of an empty side (section 2.1.4): three pixels a side, not clipped."""
    lower = [(size // 2 - 1) * s for size, s in zip(shape, spacing, strict=True)]
    upper = [(size // 2 + 2) * s for size, s in zip(shape, spacing, strict=True)]
    return Box(lower, upper)


def distance_iou_loss(a: Box, b: Box) -> float:
    """Eqs. 7 and 8: D = 1 - IoU + ρ²/τ².

    ρ is the distance of the centres of the two boxes, τ the diagonal of the smallest box that encloses both.
    """
    shared = Box(
        lower=[max(x, y) for x, y in zip(a.lower, b.lower, strict=True)],
        upper=[min(x, y) for x, y in zip(a.upper, b.upper, strict=True)],
    )
    enclosing = Box(
        lower=[min(x, y) for x, y in zip(a.lower, b.lower, strict=True)],
        upper=[max(x, y) for x, y in zip(a.upper, b.upper, strict=True)],
    )
    overlap = all(low < high for low, high in zip(shared.lower, shared.upper, strict=True))
    intersection = shared.volume() if overlap else 0.0
    iou = intersection / (a.volume() + b.volume() - intersection)
    rho_squared = sum((x - y) ** 2 for x, y in zip(a.centre(), b.centre(), strict=True))
    tau_squared = sum((high - low) ** 2 for low, high in zip(enclosing.lower, enclosing.upper, strict=True))
    return 1 - iou + rho_squared / tau_squared


def proximity_loss(
    image: Image,
    t: Tensor,
    q: Tensor,
    losses_gt: Sequence[Tensor],
    losses_pred: Sequence[Tensor],
    spacing: Sequence[float],
    reduction: Literal["squared", "sum"] = "squared",
) -> Tensor:
    """Eqs. 9 and 10: (S_P - S_GT)², sums of losses weighted by the distance to the nearest of the other side.

    With `reduction="sum"` it is S_P + S_GT. `losses_gt` and `losses_pred` are the entries of Eqs. 2 and 3. The
    entry of an empty side sits in its artificial box; a plane without any instance has no distance to measure.
    """
    boxes_gt = [tight_box(t == n, spacing) for n in ids_in(t)]
    boxes_pred = [tight_box(q == m, spacing) for m in ids_in(q)]
    if not boxes_gt and not boxes_pred:
        return image.zero()
    boxes_gt = boxes_gt or [artificial_box(t.shape, spacing)]
    boxes_pred = boxes_pred or [artificial_box(t.shape, spacing)]
    sum_gt, sum_pred = image.zero(), image.zero()
    for box, entry in zip(boxes_gt, losses_gt, strict=True):
        sum_gt = sum_gt + min(distance_iou_loss(box, other) for other in boxes_pred) * entry
    for box, entry in zip(boxes_pred, losses_pred, strict=True):
        sum_pred = sum_pred + min(distance_iou_loss(other, box) for other in boxes_gt) * entry
    return sum_pred + sum_gt if reduction == "sum" else (sum_pred - sum_gt) ** 2


def blob_loss(image: Image, t: Tensor, loss: Callable[[Image, Tensor], Tensor]) -> list[Tensor]:
    """Blob loss (Kofler 2023) of every ground-truth instance n.

    P keeps everything but the other ground-truth instances, every false positive included; G is n.
    """
    entries = []
    for n in ids_in(t):
        P = image.only((t == n) | (t == 0))
        entries.append(loss(P, t == n) + image.zero())
    return entries


@dataclass(frozen=True)
class Plane:
    """One (batch, channel) image: prediction, target and the ids of both sides, all `[*S]`.

    `annotated` are the ground-truth ids before `min_size`, `t` and `q` those after.
    """

    image: Image
    y: Tensor
    annotated: Tensor
    t: Tensor
    q: Tensor


def planes_of(
    input: Tensor,
    target: Tensor,
    *,
    include_background: bool,
    to_onehot_y: bool,
    sigmoid: bool,
    softmax: bool,
    other_act: Callable[[Tensor], Tensor] | None,
    threshold: float,
    connectivity: int | None,
    min_size: int,
    target_labels: Tensor | None,
    valid_mask: Tensor | None,
) -> list[list[Plane]]:
    """The planes of `input` `[B, C, *S]`: a list over the batch of lists over the channels that count."""
    if sigmoid + softmax + (other_act is not None) > 1:
        raise ValueError("expected at most one of sigmoid, softmax and other_act")
    channels = input.shape[1]
    if channels == 1 and (softmax or to_onehot_y or not include_background):
        raise ValueError("softmax, to_onehot_y and include_background=False need more than one channel")

    first = 0 if include_background else 1
    valid = torch.ones_like(input[:, :1], dtype=torch.bool) if valid_mask is None else valid_mask != 0
    x = input.to(torch.promote_types(input.dtype, torch.float32)).masked_fill(~valid, 0.0)
    finite = torch.isfinite(x)
    if sigmoid:
        above = x >= math.log(threshold / (1 - threshold))
    elif softmax:
        finite = finite.all(dim=1, keepdim=True).expand_as(x)
        above = torch.softmax(x, dim=1) >= threshold
    else:
        x = x if other_act is None else other_act(x)
        finite = finite & torch.isfinite(x)
        above = x >= threshold

    if to_onehot_y:
        y = torch.cat([target == c for c in range(channels)], dim=1) & valid
    else:
        y = (target != 0).expand(input.shape) & valid
    if target_labels is None:
        labels, _ = connected_components(y, connectivity)
    else:
        labels = target_labels.masked_fill(~valid, 0)
        if not torch.equal((labels > 0)[:, first:], y[:, first:]):
            raise ValueError("target_labels > 0 differs from target")
    predicted, _ = connected_components(above & valid, connectivity, min_size)

    batch = []
    for b in range(input.shape[0]):
        planes = []
        for c in range(first, channels):
            if sigmoid:
                image = image_from_logits(x[b, c])
            elif softmax:
                others = torch.stack([x[b, other] for other in range(channels) if other != c])
                image = image_from_logits(x[b, c] - torch.logsumexp(others, dim=0))
            else:
                image = image_from_probabilities(x[b, c])
            image = image.restricted_to(valid[b, 0])
            if not finite[b, c][valid[b, 0]].all():
                image = image.spoiled()
            t = drop_small(labels[b, c], min_size)
            planes.append(Plane(image, y[b, c], labels[b, c], t, predicted[b, c]))
        batch.append(planes)
    return batch


def reduce_planes(values: list[list[Tensor]], reduction: Reduction) -> Tensor:
    """Mean or sum of per-plane values, or all of them `[B, C']`."""
    table = torch.stack([torch.stack(row) for row in values])
    if reduction == "none":
        return table
    return table.sum() if reduction == "sum" else table.mean()


def reduce_entries(
    entries: list[list[list[Tensor]]],
    weights: list[list[list[float]]],
    divisors: list[list[float]],
    average: Average,
    reduction: Reduction,
) -> Tensor:
    """Weighted mean of the entries of each plane, `divisors` being what their weighted sums are divided by.

    `average="instance"` with `reduction="mean"` pools the entries of the batch; otherwise planes count alike.
    """
    sums = [
        [torch.stack([w * v for w, v in zip(*plane, strict=True)]).sum() for plane in zip(*rows, strict=True)]
        for rows in zip(weights, entries, strict=True)
    ]
    if reduction == "mean" and average == "instance":
        total = sum(divisor for row in divisors for divisor in row)
        return torch.stack([s for row in sums for s in row]).sum() / (total if total > 0 else 1)
    means = [
        [s / (divisor if divisor > 0 else 1) for s, divisor in zip(*rows, strict=True)]
        for rows in zip(sums, divisors, strict=True)
    ]
    return reduce_planes(means, reduction)


def seg_term(batch: list[list[Plane]], loss: Loss, softmax: bool, reduction: Reduction) -> Tensor:
    """L_seg. Any callable sees all images `[B, C', *S]` at once, or each plane on its own if planes are kept apart."""
    if callable(loss) and reduction == "mean":
        P = torch.stack([torch.stack([plane.image.p for plane in planes]) for planes in batch])
        G = torch.stack([torch.stack([plane.y for plane in planes]) for planes in batch])
        return loss(P, G.to(P.dtype)) + (P * 0.0).sum()
    return reduce_planes(pixel_terms(batch, loss, softmax), reduction)


def pixel_terms(batch: list[list[Plane]], loss: Loss, softmax: bool) -> list[list[Tensor]]:
    """L_seg per plane."""
    values = []
    for planes in batch:
        terms = pixel_term(
            loss,
            [plane.image for plane in planes],
            [plane.y for plane in planes],
            [plane.annotated for plane in planes],
            softmax=softmax,
        )
        values.append([term + plane.image.zero() for term, plane in zip(terms, planes, strict=True)])
    return values


def per_plane(batch: list[list[Plane]], term: Callable[[Plane], Any]) -> list[list[Any]]:
    """`term` of every plane, in rows over the batch."""
    return [[term(plane) for plane in planes] for planes in batch]


def instance_terms(
    input: Tensor,
    target: Tensor,
    *,
    pixel_loss: Loss = "gdf",
    instance_loss: Loss = "dice",
    center_loss: Loss = "dice",
    average: Average = "instance",
    include_background: bool = True,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: Callable[[Tensor], Tensor] | None = None,
    threshold: float = 0.5,
    connectivity: int | None = None,
    center_size: int | Sequence[int] = 3,
    min_size: int = 0,
    spacing: Sequence[float] | None = None,
    pred_normalizer: Normalizer = "pred",
    missed: Literal["none", "soft"] = "none",
    missed_weight: float = 0.3,
    mask_target: bool = True,
    proximity_reduction: Literal["squared", "sum"] = "squared",
    weight_by: WeightBy = "count",
    reduction: Reduction = "mean",
    target_labels: Tensor | None = None,
    valid_mask: Tensor | None = None,
) -> InstanceTerms:
    """All terms of Eq. 11 for `input` `[B, C, *S]` and `target` `[B, C, *S]` or `[B, 1, *S]`.

    float64 input is computed in float64, any other in float32. Each term is a scalar, or `[B, C']` with
    `reduction="none"`, C' being C without the background channel if that is excluded.
    """
    dimensions = input.ndim - 2
    size = [center_size] * dimensions if isinstance(center_size, int) else list(center_size)
    millimetres = [1.0] * dimensions if spacing is None else list(spacing)
    batch = planes_of(
        input,
        target,
        include_background=include_background,
        to_onehot_y=to_onehot_y,
        sigmoid=sigmoid,
        softmax=softmax,
        other_act=other_act,
        threshold=threshold,
        connectivity=connectivity,
        min_size=min_size,
        target_labels=target_labels,
        valid_mask=valid_mask,
    )
    loss = plane_loss(instance_loss)
    entries_gt = per_plane(batch, lambda x: instance_loss_gt(x.image, x.t, x.q, loss, mask_target))
    entries_pred = per_plane(batch, lambda x: instance_loss_pred(x.image, x.t, x.q, loss))
    weights_gt = per_plane(batch, lambda x: weights_of(x.t, weight_by))
    weights_pred = per_plane(batch, lambda x: weights_of(x.q, weight_by))
    divisor_gt = [[math.fsum(plane) for plane in row] for row in weights_gt]
    divisor_pred = [[math.fsum(plane) for plane in row] for row in weights_pred]
    if pred_normalizer == "gt":
        divisor_pred = divisor_gt
    soft = missed_weight if missed == "soft" else 0.0
    proximity = [
        [
            proximity_loss(x.image, x.t, x.q, losses_gt, losses_pred, millimetres, proximity_reduction)
            for x, losses_gt, losses_pred in zip(*rows, strict=True)
        ]
        for rows in zip(batch, entries_gt, entries_pred, strict=True)
    ]
    return InstanceTerms(
        seg=seg_term(batch, pixel_loss, softmax, reduction),
        instance_gt=reduce_entries(entries_gt, weights_gt, divisor_gt, average, reduction),
        instance_pred=reduce_entries(entries_pred, weights_pred, divisor_pred, average, reduction),
        center=reduce_planes(per_plane(batch, lambda x: center_term(x, center_loss, size)), reduction),
        false_gt=reduce_planes(
            per_plane(batch, lambda x: false_rate_gt(x.image, x.t, x.q, soft, weight_by)), reduction
        ),
        false_pred=reduce_planes(
            per_plane(batch, lambda x: false_rate_pred(x.image, x.t, x.q, soft, weight_by)), reduction
        ),
        proximity=reduce_planes(proximity, reduction),
    )


def center_term(plane: Plane, loss: Loss, size: Sequence[int]) -> Tensor:
    """Eq. 4 of a plane, with ℓ_center by name."""
    return center_loss(plane.image, plane.t, plane.q, plane_loss(loss), size)


def blob_terms(
    input: Tensor,
    target: Tensor,
    *,
    pixel_loss: Loss = "gdf",
    instance_loss: Loss | None = None,
    include_background: bool = True,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: Callable[[Tensor], Tensor] | None = None,
    connectivity: int | None = None,
    min_size: int = 0,
    reduction: Reduction = "mean",
    target_labels: Tensor | None = None,
    valid_mask: Tensor | None = None,
) -> BlobTerms:
    """The two terms of blob loss: pixels, and the mean over instances of a plane, over planes that have one.

    Arguments and shapes as in `instance_terms`; `instance_loss=None` is `pixel_loss`. A plane without ground
    truth has the value 0 in `reduction="none"` and "sum".
    """
    batch = planes_of(
        input,
        target,
        include_background=include_background,
        to_onehot_y=to_onehot_y,
        sigmoid=sigmoid,
        softmax=softmax,
        other_act=other_act,
        threshold=0.5,
        connectivity=connectivity,
        min_size=min_size,
        target_labels=target_labels,
        valid_mask=valid_mask,
    )
    loss = plane_loss(pixel_loss if instance_loss is None else instance_loss)
    entries = per_plane(batch, lambda x: blob_loss(x.image, x.t, loss))
    means = [
        [torch.stack(blobs).mean() if blobs else x.image.zero() for x, blobs in zip(*rows, strict=True)]
        for rows in zip(batch, entries, strict=True)
    ]
    if reduction == "mean":
        planes_with_blobs = sum(1 for row in entries for blobs in row if blobs)
        blob = reduce_planes(means, "sum") / max(planes_with_blobs, 1)
    else:
        blob = reduce_planes(means, reduction)
    return BlobTerms(seg=seg_term(batch, pixel_loss, softmax, reduction), blob=blob)


def matched_pairs(t: Tensor, q: Tensor, score: str, threshold: float) -> list[tuple[int, int]]:
    """One-to-one pairs (n, m) with a score, "iou" or "dice", above the threshold: greatest first, ties by n, then m."""
    candidates = []
    for n in ids_in(t):
        for m in ids_in(q[t == n]):
            shared = int(((t == n) & (q == m)).sum())
            both = int((t == n).sum()) + int((q == m).sum())
            value = 2 * shared / both if score == "dice" else shared / (both - shared)
            if value > threshold:
                candidates.append((-value, n, m))
    pairs: list[tuple[int, int]] = []
    for _, n, m in sorted(candidates):
        if all(n != other_n and m != other_m for other_n, other_m in pairs):
            pairs.append((n, m))
    return pairs


def dice_coefficient(a: Tensor, b: Tensor) -> float:
    """Eq. 1 of two boolean images that are not both empty."""
    return 2 * int((a & b).sum()) / (int(a.sum()) + int(b.sum()))


def partners(t: Tensor, q: Tensor, matching: str, threshold: float) -> list[tuple[int, int]]:
    """The pairs (n, m) that detect: all that share a pixel with "overlap", the one-to-one pairs otherwise."""
    if matching == "overlap":
        return [(n, m) for n in ids_in(t) for m in ids_in(q[t == n])]
    return matched_pairs(t, q, matching, threshold)


def plane_metrics(
    t: Tensor, q: Tensor, *, matching: str, threshold: float, voxel_ml: float, zero_division: float
) -> dict[str, float]:
    """The metrics of one plane from the ids of both sides `[*S]`."""
    error = 0.0 if zero_division == zero_division else math.nan
    N, M = len(ids_in(t)), len(ids_in(q))
    detects = partners(t, q, matching, threshold)
    found = len({n for n, _ in detects})
    hit = len({m for _, m in detects})
    true_positives = matched_pairs(t, q, "dice", 0.0) if matching == "overlap" else detects
    quality = sum(dice_coefficient(t == n, q == m) for n, m in true_positives)
    tp = len(true_positives)
    sen = found / N if N else zero_division
    ppv = hit / M if M else zero_division
    f1 = 0.0 if N or M else zero_division
    if found:
        f1 = 2 * sen * ppv / (sen + ppv)
    denominator = tp + (M - tp) / 2 + (N - tp) / 2
    true, predicted = int((t > 0).sum()), int((q > 0).sum())
    return {
        "dsc": dice_coefficient(t > 0, q > 0) if true + predicted else zero_division,
        "vol_diff_ml": (predicted - true) * voxel_ml,
        "vol_diff_percent": 100 * (predicted - true) / true if true else math.nan if predicted else error,
        "sen": sen,
        "fnr": (N - found) / N if N else error,
        "ppv": ppv,
        "fdr": (M - hit) / M if M else error,
        "f1": f1,
        "pq": quality / denominator if denominator else zero_division,
        "sq": quality / tp if tp else zero_division,
        "rq": tp / denominator if denominator else zero_division,
        "n_target": N,
        "n_pred": M,
        "n_missed": N - found,
        "n_false": M - hit,
    }


def labelled(mask: Tensor, labels: Tensor | None, connectivity: int | None, min_size: int) -> Tensor:
    """Given ids `[B, C, *S]` or the components of the mask, without the small ones."""
    if labels is None:
        return connected_components(mask != 0, connectivity, min_size)[0]
    kept = [[drop_small(plane, min_size) for plane in image] for image in labels]
    return torch.stack([torch.stack(image) for image in kept])


def instance_metrics(
    pred: Tensor,
    target: Tensor,
    *,
    connectivity: int | None = None,
    matching: str = "overlap",
    threshold: float = 0.5,
    spacing: Sequence[float] | None = None,
    min_size: int = 0,
    pred_labels: Tensor | None = None,
    target_labels: Tensor | None = None,
    zero_division: float = 0.0,
) -> dict[str, Tensor]:
    """All metrics of masks `[B, C, *S]`, each `[B, C]`; `spacing` has one number for each axis."""
    t = labelled(target, target_labels, connectivity, min_size)
    q = labelled(pred, pred_labels, connectivity, min_size)
    voxel_ml = math.prod(spacing or [1.0]) / 1000
    planes = [
        plane_metrics(
            t[b, c], q[b, c], matching=matching, threshold=threshold, voxel_ml=voxel_ml, zero_division=zero_division
        )
        for b, c in batch_and_channel(pred)
    ]
    return {
        name: pred.new_tensor([plane[name] for plane in planes], dtype=torch.float64).view(pred.shape[:2])
        for name in planes[0]
    }


def volume_group(pixels: int, voxel_ml: float, edges: Sequence[float]) -> int:
    """The size group of an instance: the number of edges, in mL, that its volume reaches."""
    return sum(1 for edge in edges if pixels * voxel_ml >= edge * (1 - 1e-6))


def metrics_by_volume(
    t: Tensor, q: Tensor, edges: Sequence[float], *, matching: str, threshold: float, voxel_ml: float
) -> list[dict[str, float]]:
    """Sums over the instances of each size group of one plane; each instance is in the group of its own volume.

    `dice` adds up, over the true instances, the Dice coefficient of each with the union of its partners.
    """
    names: list[str] = ["n_target", "found", "n_pred", "hit", "dice"]
    groups = [dict.fromkeys(names, 0.0) for _ in range(len(edges) + 1)]
    detects = partners(t, q, matching, threshold)
    for n in ids_in(t):
        group = groups[volume_group(int((t == n).sum()), voxel_ml, edges)]
        mine = [m for other, m in detects if other == n]
        group["n_target"] += 1
        group["found"] += bool(mine)
        group["dice"] += dice_coefficient(t == n, pixels_of(q, mine))
    for m in ids_in(q):
        group = groups[volume_group(int((q == m).sum()), voxel_ml, edges)]
        group["n_pred"] += 1
        group["hit"] += any(other == m for _, other in detects)
    return groups


def band_ensemble(
    masks: Sequence[Tensor], edges_ml: Sequence[float], *, voxel_ml: float, connectivity: int | None = None
) -> Tensor:
    """Section 4.2 for k masks `[B, C, *S]`: model i gives its instances between the edges i - 1 and i; their union."""
    union = torch.zeros_like(masks[0], dtype=torch.bool)
    for band, mask in enumerate(masks):
        labels, _ = connected_components(mask != 0, connectivity)
        for b, c in batch_and_channel(mask):
            for k in ids_in(labels[b, c]):
                instance = labels[b, c] == k
                if volume_group(int(instance.sum()), voxel_ml, edges_ml) == band:
                    union[b, c] |= instance
    return union


def majority_vote(masks: Sequence[Tensor]) -> Tensor:
    """Section 4.4: the pixels that more than half of the masks have."""
    votes = sum((mask != 0).long() for mask in masks)
    return torch.as_tensor(2 * votes > len(masks))


def voronoi(labels: Tensor, spacing: Sequence[float] | None = None) -> Tensor:
    """The id of the nearest component at every pixel of `labels` `[*S]`, 0 everywhere if there is none.

    Of equally near pixels of components, the first in raster order counts.
    """
    size = [1.0] * labels.ndim if spacing is None else list(spacing)
    seeds = labels.nonzero().tolist()
    regions = torch.zeros_like(labels)
    for pixel in torch.ones_like(labels).nonzero().tolist() if seeds else []:
        distances = [sum(((x - y) * s) ** 2 for x, y, s in zip(pixel, seed, size, strict=True)) for seed in seeds]
        regions[tuple(pixel)] = labels[tuple(seeds[distances.index(min(distances))])]
    return regions


def cc_entries(plane: Plane, regions: Tensor, loss: Callable[[Image, Tensor], Tensor]) -> list[Tensor]:
    """The loss on every region of a plane (Jaus 2024, Bouteille 2025); a plane without a region is one."""
    entries = []
    for k in ids_in(regions):
        image = plane.image.restricted_to(plane.image.valid & (regions == k))
        entries.append(loss(image, plane.y & (regions == k)) + plane.image.zero())
    return entries or [loss(plane.image, plane.y) + plane.image.zero()]


def cc_loss(
    input: Tensor,
    target: Tensor,
    *,
    pixel_loss: Loss = "dicece",
    average: Average = "instance",
    include_background: bool = True,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: Callable[[Tensor], Tensor] | None = None,
    connectivity: int | None = None,
    spacing: Sequence[float] | None = None,
    reduction: Reduction = "mean",
    target_labels: Tensor | None = None,
    target_regions: Tensor | None = None,
    valid_mask: Tensor | None = None,
) -> Tensor:
    """CC loss: the mean of the pixel loss over the Voronoi regions of the components. Arguments as `instance_terms`."""
    batch = planes_of(
        input,
        target,
        include_background=include_background,
        to_onehot_y=to_onehot_y,
        sigmoid=sigmoid,
        softmax=softmax,
        other_act=other_act,
        threshold=0.5,
        connectivity=connectivity,
        min_size=0,
        target_labels=target_labels,
        valid_mask=valid_mask,
    )
    entries = []
    for b, planes in enumerate(batch):
        row = []
        for c, plane in enumerate(planes, 0 if include_background else 1):
            given = target_regions
            regions = voronoi(plane.t, spacing) if given is None else given[b, c] * plane.image.valid
            row.append(cc_entries(plane, regions, plane_loss(pixel_loss)))
        entries.append(row)
    weights = [[[1.0] * len(plane) for plane in row] for row in entries]
    divisors = [[float(len(plane)) for plane in row] for row in entries]
    return reduce_entries(entries, weights, divisors, average, reduction)


def component_tversky(
    plane: Plane,
    *,
    alpha: float = 0.3,
    beta: float = 0.7,
    gamma: float = 1.0,
    size_offset: float = 5.0,
    background_weight: float = 0.1,
    smooth: float = SMOOTH,
) -> Tensor:
    """Tversky loss with pixels weighted by (|n| + size_offset)^-gamma in component n (Luu & Pavlovskiy 2026)."""
    p, y = plane.image.p, (plane.t > 0).to(plane.image.p.dtype)
    weight = torch.full_like(p, background_weight)
    for n in ids_in(plane.t):
        weight[plane.t == n] = (int((plane.t == n).sum()) + size_offset) ** -gamma
    true_positive = (weight * p * y).sum()
    false_positive = (weight * p * (1 - y)).sum()
    false_negative = (weight * (1 - p) * y).sum()
    denominator = true_positive + alpha * false_positive + beta * false_negative
    return 1 - (true_positive + smooth) / (denominator + smooth) + plane.image.zero()


def component_mil(plane: Plane) -> list[Tensor]:
    """-log of the largest probability of every component (Luu & Pavlovskiy 2026)."""
    return [-largest(plane.image.log_p[plane.t == n]) for n in ids_in(plane.t)]


def lesion_recall(plane: Plane) -> list[Tensor]:
    """What each true component lacks of a mean probability of 1."""
    return [1 - plane.image.p[plane.t == n].mean() for n in ids_in(plane.t)]


def false_part(plane: Plane) -> list[Tensor]:
    """The probability of each predicted component outside of the ground truth, over its pixels."""
    return [plane.image.p[(plane.q == m) & (plane.t == 0)].sum() / int((plane.q == m).sum()) for m in ids_in(plane.q)]


def mean_of_components(
    batch: list[list[Plane]], entries: Callable[[Plane], list[Tensor]], average: Average, reduction: Reduction
) -> Tensor:
    """Mean of the entries of all planes or of each; 0 where there is none."""
    found = [[[*entries(plane), plane.image.zero()] for plane in row] for row in batch]
    weights = [[[1.0] * len(plane) for plane in row] for row in found]
    divisors = [[float(len(plane) - 1) for plane in row] for row in found]
    return reduce_entries(found, weights, divisors, average, reduction)
