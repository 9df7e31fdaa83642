"""Which backend computes a call, and its average over ranks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from . import torch_backend, triton_backend
from .backend import backend_for
from .criteria import Criterion
from .parallel import Local, global_factors, report_failure, resolve_group
from .scene import Call, Scene
from .settings import Settings
from .torch_func import differentiable

__all__ = ["evaluate", "on_kernels", "over_ranks", "weighted_sum"]


def on_kernels(settings: Settings, wanted: Collection[str], input: Tensor) -> bool:
    """Whether the kernels compute these terms; a callable (a loss, or `weight_by`) needs torch."""
    if not isinstance(input, Tensor) or callable(settings.weight_by) or backend_for(input) != "triton":
        return False
    needs = {"seg": settings.pixel, "center": settings.center}
    needs |= dict.fromkeys(("instance_gt", "instance_pred", "proximity", "blob"), settings.instance)
    return not any(isinstance(needs.get(name), Criterion) for name in wanted)


_COUNTED = {"instance_gt": 1, "blob": 1, "component": 1, "instance_pred": 2, "false_part": 2}
"""Terms that `average="instance"` does not average over planes, and which of [planes, entries] it does."""


def over_ranks(
    settings: Settings, wanted: Collection[str], input: Tensor, local: Callable[[], Local]
) -> dict[str, Tensor]:
    """The terms of `local`, scaled so that their mean over the ranks is that of the global batch."""
    group = resolve_group(settings.process_group)
    if group is None:
        return local().found
    try:
        found, planes, entries = local()
    except Exception:
        if isinstance(input, Tensor):
            report_failure(group, input.device)
        raise
    unit = 2**20 if callable(settings.weight_by) else 1  # only ratios matter, and integers do not round
    counts = (unit * torch.cat([entries.new_full((1,), planes), entries])).round().long()
    terms = f"terms {dict(wanted) if isinstance(wanted, Mapping) else list(wanted)} of {input.shape[1]} channels"
    factors = global_factors(group, counts, settings.words, terms, mean=settings.reduction == "mean")
    if settings.reduction == "none":
        return found
    place = _COUNTED if settings.average == "instance" else {}
    return {name: value * factors[place.get(name, 0)].to(value.dtype) for name, value in found.items()}


@differentiable
def evaluate(
    settings: Settings,
    wanted: Collection[str],
    input: Tensor,
    target: Tensor,
    target_labels: Tensor | None = None,
    valid_mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """The wanted terms of `InstanceTerms` or `BlobTerms` by name; what nobody wants is not computed."""
    images = input, target, target_labels, valid_mask

    def local() -> Local:
        if on_kernels(settings, wanted, input):
            return triton_backend.terms(Call(settings, *images), wanted)
        scene = Scene(settings, *images)
        return torch_backend.blob_terms(scene) if "blob" in wanted else torch_backend.instance_terms(scene, wanted)

    return over_ranks(settings, wanted, input, local)


@differentiable
def weighted_sum(
    settings: Settings,
    weights: Mapping[str, float],
    input: Tensor,
    target: Tensor,
    target_labels: Tensor | None = None,
    valid_mask: Tensor | None = None,
) -> Tensor:
    """Sum of weight · term over the named terms."""
    images = input, target, target_labels, valid_mask
    if resolve_group(settings.process_group) is None and on_kernels(settings, weights, input):
        return triton_backend.weighted_sum(Call(settings, *images), weights)
    found = evaluate(settings, weights, *images)
    first, *rest = (weight * found[name] for name, weight in weights.items())
    return sum(rest, first)
