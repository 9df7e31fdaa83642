"""Stateless losses.

The arguments that all functions share are described in `instance_terms`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from .checks import check_connectivity, check_mask, check_size
from .components import label_planes
from .dispatch import evaluate
from .parallel import ProcessGroup
from .scene import plain
from .settings import Settings
from .terms import BlobTerms, InstanceTerms
from .torch_func import differentiable

__all__ = ["BlobTerms", "InstanceTerms", "blob_terms", "instance_terms", "label", "pixel_loss"]


def instance_terms(
    input: Tensor,
    target: Tensor,
    *,
    pixel_loss: object = "gdf",
    instance_loss: object = "dice",
    center_loss: object = "dice",
    average: str = "instance",
    include_background: bool = True,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: Callable[[Tensor], Tensor] | None = None,
    threshold: float = 0.5,
    connectivity: int | None = None,
    center_size: int | Sequence[int] = 3,
    min_size: int = 0,
    spacing: float | Sequence[float] | None = None,
    pred_normalizer: str = "pred",
    missed: str = "none",
    missed_weight: float = 0.3,
    mask_target: bool = True,
    proximity_reduction: str = "squared",
    weight_by: str | Callable[[Tensor], Tensor] = "count",
    reduction: str = "mean",
    max_instances: int | None = None,
    process_group: ProcessGroup = None,
    target_labels: Tensor | None = None,
    valid_mask: Tensor | None = None,
) -> InstanceTerms:
    """All terms of the instance loss family (Rachmadi, Byra, Skibbe 2024, Eqs. 2 to 10), from one pass.

    Args:
        input: `[B, C, H, W]` or `[B, C, D, H, W]`, float16, bfloat16, float32 or float64. Logits with `sigmoid` or
            `softmax`, anything with `other_act`, else probabilities. Each class of each image is a plane of its own.
        target: `[B, C, *S]`, binary of any dtype; `[B, 1, *S]` is one mask for all channels (with `softmax` there must
            be one class besides the background that is dropped), or with `to_onehot_y` class indices.
        pixel_loss: of the whole image (`seg`): a name ("dice", "ce", "dicece", "generalized_dice", "focal", "gdf",
            "tversky", "inverse_weighted_dice"), a pixel loss of this library, or any callable `(P, G) -> scalar`. P are
            probabilities, G 0 or 1, `[B, C, *S]` (`[1, 1, *S]` for each plane on its own if `reduction` is not
            "mean"); pixels that are not valid are 0 in both. MONAI's DiceLoss, TverskyLoss and GeneralizedDiceLoss
            without activation are recognised.
        instance_loss: of one instance, likewise; a callable sees `[1, 1, *S]`, 0 where P and G are masked. It must
            work under `torch.func.vmap`, and is much slower than a separable loss.
        center_loss: of the centre maps, likewise.
        average: "instance" averages `instance_gt` and `instance_pred` over all instances of the batch; "image" per
            plane, then over planes. The other terms are always averaged per plane, then over planes.
        include_background: False drops channel 0 after the activation.
        to_onehot_y: the target holds class indices.
        sigmoid: the input holds logits of independent classes.
        softmax: the input holds logits of exclusive classes.
        other_act: maps the input to probabilities.
        threshold: a pixel is predicted where its probability is at least this.
        connectivity: of the components, 4 or 8 in 2D, 6, 18 or 26 in 3D; None is full connectivity.
        center_size: side in pixels of the box that stands for an instance in the centre maps, for all or each axis.
        min_size: components with fewer pixels count as background in all instance terms.
        spacing: size of a pixel, for all or each axis, for the boxes of `proximity`; the unit cancels.
        pred_normalizer: "pred" averages `instance_pred` over predicted instances; "gt" divides the sum by the number of
            ground-truth instances, as Eq. 3 is printed.
        missed: "soft" gives the false rates a derivative where theirs vanishes: to `false_gt` it adds `missed_weight` ·
            (1 - the largest probability in the instance) for each missed instance, to `false_pred` `missed_weight` ·
            (the mean probability of the component) for each false one, averaged as the rate. The derivative of the
            largest is that of its first pixel in raster order.
        missed_weight: see `missed`; only with "soft".
        mask_target: False keeps, in `instance_gt` and through it in `proximity`, the probabilities below `threshold`
            inside of the ground-truth instance, which Eq. 2 masks out, so that what is missing of it is pulled up.
        proximity_reduction: "squared", (S_P - S_GT)² as Eq. 8 is printed, or "sum", S_P + S_GT, which grows with every
            false positive and never rewards a worse instance.
        weight_by: what an instance counts in the means of `instance_gt`, `instance_pred` and the false rates: "count",
            1; "size", its pixels; or a function, element by element, from sizes `[K]` (float64 pixels, all instances of
            a side) to weights `[K]` >= 0, of which only ratios matter. The entry of an empty side has the size 1.
            With a function, CUDA tensors take the torch path.
        reduction: "mean"; "none" for values per plane `[B, C]`; "sum" for their sum.
        max_instances: limit on the instances of a plane on either side, which makes the kernels' tables smaller; None
            has room for the most that there can be. Beyond it the terms are NaN, and the next call says so in a
            warning. The CPU needs no limit and has none.
        process_group: whose ranks share the batch: their mean of the result, and DistributedDataParallel's mean of the
            gradients, are those of the batches of all ranks together. "world" is the default group, or nothing where
            `torch.distributed` is not initialised; None averages over this rank's batch. With a group every call is a
            collective, of six integers: all ranks must make it. `reduction="sum"` is scaled by the number of ranks, for
            the same reason; "none" is not scaled.
        target_labels: `[B, C, *S]` integer ids of ground-truth instances, 0 = background, which may touch and need
            not be consecutive; None takes the connected components of the target.
        valid_mask: `[B, 1, *S]`, 1 where a pixel counts (partial annotation, ignore label).

    Returns:
        The terms, float64 for float64 input and float32 otherwise. Instance and proximity terms have their exact
        derivative with labels held fixed; false rates and centre a straight-through one. A NaN or Inf in the input
        makes all terms NaN. There is no second derivative: asking for one raises RuntimeError.

    Raises:
        ValueError: shapes, devices, names or values that do not fit (values are checked on the CPU, and on a GPU
            with `fastinstance.debug_checks(True)`); a callable that does not return a scalar.
        TypeError: wrong dtypes or kinds of arguments.
        RuntimeError: a callable that `torch.func.vmap` cannot batch.

    With a process group the errors of one rank reach the others, as RuntimeError, and ranks with different settings
    raise ValueError, always on the CPU and on a GPU in the first call with these settings.
    """
    settings = Settings(
        pixel_loss=pixel_loss,
        instance_loss=instance_loss,
        center_loss=center_loss,
        average=average,
        include_background=include_background,
        to_onehot_y=to_onehot_y,
        sigmoid=sigmoid,
        softmax=softmax,
        other_act=other_act,
        threshold=threshold,
        connectivity=connectivity,
        center_size=center_size,
        min_size=min_size,
        spacing=spacing,
        pred_normalizer=pred_normalizer,
        missed=missed,
        missed_weight=missed_weight,
        mask_target=mask_target,
        proximity_reduction=proximity_reduction,
        weight_by=weight_by,
        reduction=reduction,
        max_instances=max_instances,
        process_group=process_group,
    )
    return InstanceTerms(**evaluate(settings, InstanceTerms._fields, input, target, target_labels, valid_mask))


def pixel_loss(
    input: Tensor,
    target: Tensor,
    *,
    pixel_loss: object = "gdf",
    include_background: bool = True,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: Callable[[Tensor], Tensor] | None = None,
    connectivity: int | None = None,
    reduction: str = "mean",
    target_labels: Tensor | None = None,
    valid_mask: Tensor | None = None,
) -> Tensor:
    """A pixel loss on its own: the `seg` term of `instance_terms`, whose arguments these are.

    Ground-truth instances (`connectivity`, `target_labels`) only matter to the inverse-weighted Dice loss.
    """
    settings = Settings(
        pixel_loss=pixel_loss,
        include_background=include_background,
        to_onehot_y=to_onehot_y,
        sigmoid=sigmoid,
        softmax=softmax,
        other_act=other_act,
        connectivity=connectivity,
        reduction=reduction,
    )
    return evaluate(settings, ("seg",), input, target, target_labels, valid_mask)["seg"]


def blob_terms(
    input: Tensor,
    target: Tensor,
    *,
    pixel_loss: object = "gdf",
    instance_loss: object = None,
    include_background: bool = True,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: Callable[[Tensor], Tensor] | None = None,
    connectivity: int | None = None,
    min_size: int = 0,
    reduction: str = "mean",
    max_instances: int | None = None,
    process_group: ProcessGroup = None,
    target_labels: Tensor | None = None,
    valid_mask: Tensor | None = None,
) -> BlobTerms:
    """Blob loss (Kofler et al. 2023): the pixel loss, and its mean over ground-truth instances.

    Each instance is compared with the prediction outside of all other instances, so every false positive counts for
    every instance. The mean is over the instances of a plane, then over the planes that have one.

    Args:
        instance_loss: of one instance; None takes `pixel_loss`.

    The other arguments, the result's dtype and the errors are those of `instance_terms`.
    """
    settings = Settings(
        pixel_loss=pixel_loss,
        instance_loss=pixel_loss if instance_loss is None else instance_loss,
        include_background=include_background,
        to_onehot_y=to_onehot_y,
        sigmoid=sigmoid,
        softmax=softmax,
        other_act=other_act,
        connectivity=connectivity,
        min_size=min_size,
        reduction=reduction,
        max_instances=max_instances,
        process_group=process_group,
    )
    return BlobTerms(**evaluate(settings, BlobTerms._fields, input, target, target_labels, valid_mask))


@differentiable
def label(mask: Tensor, *, connectivity: int | None = None, min_size: int = 0) -> tuple[Tensor, Tensor]:
    """Connected components of every plane of a mask.

    Args:
        mask: `[B, C, H, W]` or `[B, C, D, H, W]` of any real dtype; foreground is where it is neither 0 nor NaN.
        connectivity: 4 or 8 in 2D, 6, 18 or 26 in 3D; None is full connectivity.
        min_size: components with fewer pixels become background.

    Returns:
        labels: int32 like `mask`, 0 = background, ids 1..K in each plane in raster order of the first pixels.
        counts: int32 `[B, C]`, the K of each plane.

    Raises:
        ValueError: a mask of another rank, a connectivity that does not fit it, a negative `min_size`.
        TypeError: a mask that is no tensor or complex.
    """
    check_mask(mask)
    check_size("min_size", min_size)
    connectivity = check_connectivity(connectivity, mask.ndim - 2)
    labels, counts = label_planes(plain(mask).detach().flatten(0, 1), None, connectivity, min_size)
    return labels.view(mask.shape), counts.view(mask.shape[:2])
