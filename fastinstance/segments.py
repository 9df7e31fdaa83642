"""Sums over the segments of a map on the Triton kernels: a function for eager code, operators for compiled code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backend import by_operators, operator
from .fused import OnlyOnce, no_second_derivative, report, tables_of

__all__ = ["Found", "number_ids", "segment_sums"]

_IMAGES = "Tensor values, Tensor? target, Tensor? valid, Tensor segments, Tensor? others, Tensor counts"


class Found(NamedTuple):
    """Sums over the segments of each map, float64 `[maps]`; see `fastinstance_kernels.segments`."""

    value: Tensor
    number: Tensor
    size: Tensor
    rest: Tensor


@operator("fastinstance::number_ids")
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


def _by_values(gradient: Callable[..., Tensor], ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    """The derivatives by all inputs of `fastinstance::segment_sums`, with `gradient` in place of `_gradient`."""
    if upstream is None:
        return (None,) * 7
    values, target, valid, segments, others, counts, *saved = ctx.saved_tensors  # a checkpoint hands them out only once
    found = gradient(upstream.contiguous(), values, target, valid, segments, others, counts, saved, ctx.request)
    return OnlyOnce.apply(found, values, upstream) if torch.is_grad_enabled() else found, *[None] * 6


sums_op.register_autograd(lambda ctx, *upstream: _by_values(gradient_op, ctx, upstream[0]), setup_context=_save)
gradient_op.register_autograd(no_second_derivative)


class SegmentSums(torch.autograd.Function):
    """`found` of `sums_op`, for a third of what an operator takes the host."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _sums(*inputs)
        _save(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _by_values(_gradient, ctx, upstream)


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
    inputs = values, target, valid, segments, others, counts, request
    found = sums_op(*inputs)[0] if by_operators(values) else SegmentSums.apply(*inputs)
    if max_instances is not None:
        report(counts, max_instances)
    return [Found(*side.unbind(1)) for side in found.split(len(values))]
