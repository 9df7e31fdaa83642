"""The losses on the Triton kernels: a function for eager code, and two registered operators for what compiles it."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .backend import by_operators

__all__ = ["OnlyOnce", "fused_terms", "no_second_derivative", "report", "tables_of"]

_RESULTS = 18
"""`found`, `total` and the fields of `fastinstance_kernels.engine.Saved`."""
_COUNTS = 4
"""Which of these fields are the instances of each plane."""


@contextmanager
def tables_of(what: str) -> Iterator[None]:
    """Says what to do where the memory does not suffice for the tables of what a plane can hold at most."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"{error} The tables of the {what} have room for the most that there can be: limit them with "
            "max_instances=, pass fewer planes at a time, or choose fastinstance.use_backend('torch')."
        ) from error


def _terms(
    values: Tensor,
    target: Tensor,
    predicted: Tensor | None,
    valid: Tensor | None,
    weights: list[float],
    given: bool,
    request: str,
) -> tuple[Tensor, ...]:
    from fastinstance_kernels import engine

    with tables_of("instances"):
        found, total, saved = engine.forward(
            values, target, predicted, valid, weights, engine.Request.decode(request), given=given
        )
    return found, total, *saved


terms_op = torch.library.custom_op(
    "fastinstance::terms",
    _terms,
    mutates_args=(),
    schema="(Tensor values, Tensor target, Tensor? predicted, Tensor? valid, float[] weights, bool given, str request)"
    + " -> ("
    + ", ".join(["Tensor"] * _RESULTS)
    + ")",
)


@terms_op.register_fake
def _(
    values: Tensor,
    target: Tensor,
    predicted: Tensor | None,
    valid: Tensor | None,
    weights: list[float],
    given: bool,
    request: str,
) -> tuple[Tensor, ...]:
    from fastinstance_kernels import engine

    results = engine.shapes(engine.Request.decode(request), tuple(values.shape), values.dtype, given)
    return tuple(values.new_empty(shape, dtype=dtype) for shape, dtype in results.values())


def _gradient(
    to_found: Tensor | None,
    to_total: Tensor | None,
    values: Tensor,
    valid: Tensor | None,
    saved: list[Tensor],
    weights: list[float],
    given: bool,
    request: str,
) -> Tensor:
    from fastinstance_kernels import engine

    return engine.backward(
        to_found, to_total, values, valid, engine.Saved(*saved), weights, engine.Request.decode(request), given=given
    )


gradient_op = torch.library.custom_op(
    "fastinstance::terms_gradient",
    _gradient,
    mutates_args=(),
    schema="(Tensor? to_found, Tensor? to_total, Tensor values, Tensor? valid, Tensor[] saved, float[] weights, "
    "bool given, str request)"
    " -> Tensor",
)


@gradient_op.register_fake
def _(to_found: Tensor | None, to_total: Tensor | None, values: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(values)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    values, _, _, valid, *ctx.settings = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(values, valid, *output[2:])


def _by_values(gradient: Callable[..., Tensor], ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    """The derivatives by all inputs of `fastinstance::terms`, with `gradient` in place of `_gradient`."""
    if all(g is None for g in upstream):
        return (None,) * 7
    values, valid, *saved = ctx.saved_tensors  # a checkpoint hands them out only once
    given = [None if g is None else g.contiguous() for g in upstream]
    found = gradient(*given, values, valid, saved, *ctx.settings)
    return OnlyOnce.apply(found, values, *upstream) if torch.is_grad_enabled() else found, *[None] * 6


def no_second_derivative(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError(
        "fastinstance losses have no second derivative; detach the gradient, or use fastinstance.reference, "
        "which is slow and differentiable any number of times"
    )


terms_op.register_autograd(lambda ctx, *upstream: _by_values(gradient_op, ctx, *upstream[:2]), setup_context=_save)
gradient_op.register_autograd(no_second_derivative)


class OnlyOnce(torch.autograd.Function):
    """Identity on a finished gradient, so that a second derivative is an error and not a silent zero."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *upstream: Tensor | None) -> Tensor:
        return gradient

    backward = staticmethod(no_second_derivative)


class InstanceTerms(torch.autograd.Function):
    """`found`, `total`, the counts and entries of `terms_op`, for a third of what an operator takes the host."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        found, total, *saved = _terms(*inputs)
        _save(ctx, inputs, (found, total, *saved))
        return found, total, saved[_COUNTS], saved[-1]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        return _by_values(_gradient, ctx, *upstream[:2])


_pending: list[tuple[torch.cuda.Event | None, Tensor, int]] = []
"""Instance counts on their way to the host, with the event that says that they have come, and their limit."""
_pending_lock = threading.Lock()


def report(counts: Tensor, limit: int) -> None:
    """Send the largest count to the host without waiting for it, and warn of earlier ones that were too large."""
    if torch.compiler.is_compiling() or (counts.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    most, event = counts.amax(), None
    if counts.is_cuda:
        most = torch.empty((), dtype=most.dtype, device="cpu", pin_memory=True).copy_(most, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(counts.device))  # not of the current device
    arrived = []
    with _pending_lock:
        _pending.append((event, most, limit))
        while _pending and (_pending[0][0] is None or _pending[0][0].query()):
            arrived.append(_pending.pop(0))
    for _, most, limit in arrived:
        if most > limit:
            warnings.warn(
                f"a plane had {int(most)} instances, more than max_instances={limit}: the loss of that call is NaN; "
                f"set max_instances to at least {int(most)}, or to None",
                RuntimeWarning,
                stacklevel=2,
            )


def fused_terms(
    values: Tensor,
    target: Tensor,
    predicted: Tensor | None,
    valid: Tensor | None,
    weights: list[float],
    given: bool,
    request: str,
    max_instances: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """All terms, their weighted sum, and `Saved.entries`; arguments as `fastinstance_kernels.engine.forward`."""
    inputs = values, target, predicted, valid, weights, given, request
    if by_operators(values):
        found, total, *saved = terms_op(*inputs)
        counts, entries = saved[_COUNTS], saved[-1]
    else:
        found, total, counts, entries = InstanceTerms.apply(*inputs)
    if max_instances is not None and counts.numel():
        report(counts, max_instances)
    return found, total, entries
