"""Sums over the segments of a map on the Triton kernels, as registered operators."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .fused import no_second_derivative, report, tables_of

__all__ = ["Found", "number_ids", "segment_sums"]

_IMAGES = "Tensor values, Tensor? target, Tensor? valid, Tensor segments, Tensor? others, Tensor counts"


class Found(NamedTuple):
    """Sums over the segments of each map, float64 `[maps]`; see `fastinstance_kernels.segments`."""

    value: Tensor
    number: Tensor
    size: Tensor
    rest: Tensor


@torch.library.custom_op("fastinstance::number_ids", mutates_args=())
def number_ids(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Ids int32 `[planes, *S]` -> 1..K of each plane in raster order of the first pixel of each, and K `[planes]`."""
    from fastinstance_kernels import number_ids as launch

    return launch(ids)


@number_ids.register_fake
def _(ids: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(ids), ids.new_empty(ids.shape[:1])


def _sums(
    values: Tensor,
    target: Tensor | None,
    valid: Tensor | None,
    segments: Tensor,
    others: Tensor | None,
    counts: Tensor,
    request: str,
) -> tuple[Tensor, ...]:
    from fastinstance_kernels import segments as kernels

    decoded = kernels.Request.decode(request)
    with tables_of("components"):
        found, saved = kernels.forward(values, target, valid, segments, others, counts, decoded)
    return found, *saved


sums_op = torch.library.custom_op(
    "fastinstance::segment_sums",
    _sums,
    mutates_args=(),
    schema=f"({_IMAGES}, str request) -> (Tensor, Tensor, Tensor, Tensor)",
)


@sums_op.register_fake
def _(
    values: Tensor,
    target: Tensor | None,
    valid: Tensor | None,
    segments: Tensor,
    others: Tensor | None,
    counts: Tensor,
    request: str,
) -> tuple[Tensor, ...]:
    from fastinstance_kernels import segments as kernels

    sides = 1 if others is None else 2
    results = kernels.shapes(kernels.Request.decode(request), tuple(values.shape), sides)
    return tuple(values.new_empty(shape, dtype=dtype) for shape, dtype in results.values())


def _gradient(
    upstream: Tensor,
    values: Tensor,
    target: Tensor | None,
    valid: Tensor | None,
    segments: Tensor,
    others: Tensor | None,
    counts: Tensor,
    saved: list[Tensor],
    request: str,
) -> Tensor:
    from fastinstance_kernels import segments as kernels

    images = values, target, valid, segments, others, counts
    return kernels.backward(upstream, *images, kernels.Saved(*saved), kernels.Request.decode(request))


gradient_op = torch.library.custom_op(
    "fastinstance::segment_sums_gradient",
    _gradient,
    mutates_args=(),
    schema=f"(Tensor upstream, {_IMAGES}, Tensor[] saved, str request) -> Tensor",
)


@gradient_op.register_fake
def _(upstream: Tensor, values: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(values)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *images, ctx.request = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*images, *output[1:])


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    images, saved = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
    gradient = None
    if upstream is not None:
        gradient = gradient_op(upstream.contiguous(), *images, [*saved], ctx.request)
    return gradient, *[None] * 6


sums_op.register_autograd(_backward, setup_context=_save)
gradient_op.register_autograd(no_second_derivative)


def segment_sums(
    values: Tensor,
    target: Tensor | None,
    valid: Tensor | None,
    maps: tuple[tuple[Tensor, Tensor], ...],
    request: str,
    max_instances: int | None,
) -> list[Found]:
    """The sums of each of one or two maps, given as (ids, counts); else as `fastinstance_kernels.segments.forward`."""
    (segments, counts), *rest = maps
    others = None
    if rest:
        ((others, more),) = rest
        counts = torch.cat([counts, more])
    found, *_ = sums_op(values, target, valid, segments, others, counts, request)
    if max_instances is not None:
        report(counts, max_instances)
    return [Found(*side.unbind(1)) for side in found.split(len(values))]
