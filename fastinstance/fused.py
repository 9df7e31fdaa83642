"""The losses on the Triton kernels, as registered operators: one for the terms, one for their gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["fused_terms"]

_RESULTS = 17
"""`found`, `total` and the fields of `fastinstance_kernels.engine.Saved`."""


def _terms(
    values: Tensor, target: Tensor, predicted: Tensor | None, valid: Tensor | None, given: bool, request: str
) -> tuple[Tensor, ...]:
    from fastinstance_kernels import engine

    found, total, saved = engine.forward(
        values, target, predicted, valid, engine.Request.decode(request), given=given
    )
    return found, total, *saved


terms_op = torch.library.custom_op(
    "fastinstance::terms",
    _terms,
    mutates_args=(),
    schema="(Tensor values, Tensor target, Tensor? predicted, Tensor? valid, bool given, str request) -> ("
    + ", ".join(["Tensor"] * _RESULTS)
    + ")",
)


@terms_op.register_fake
def _(
    values: Tensor, target: Tensor, predicted: Tensor | None, valid: Tensor | None, given: bool, request: str
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
    given: bool,
    request: str,
) -> Tensor:
    from fastinstance_kernels import engine

    return engine.backward(
        to_found, to_total, values, valid, engine.Saved(*saved), engine.Request.decode(request), given=given
    )


gradient_op = torch.library.custom_op(
    "fastinstance::terms_gradient",
    _gradient,
    mutates_args=(),
    schema="(Tensor? to_found, Tensor? to_total, Tensor values, Tensor? valid, Tensor[] saved, bool given, str request)"
    " -> Tensor",
)


@gradient_op.register_fake
def _(
    to_found: Tensor | None,
    to_total: Tensor | None,
    values: Tensor,
    valid: Tensor | None,
    saved: list[Tensor],
    given: bool,
    request: str,
) -> Tensor:
    return torch.empty_like(values)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    values, _, _, valid, ctx.given, ctx.request = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(values, valid, *output[2:])


def _backward(ctx: Any, to_found: Tensor | None, to_total: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    values, valid, *saved = ctx.saved_tensors
    gradient = None
    if to_found is not None or to_total is not None:
        given = [None if g is None else g.contiguous() for g in (to_found, to_total)]
        gradient = gradient_op(*given, values, valid, saved, ctx.given, ctx.request)
    return gradient, None, None, None, None, None


terms_op.register_autograd(_backward, setup_context=_save)


def _no_second_derivative(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError(
        "fastinstance losses have no second derivative; detach the gradient, or use fastinstance.reference, "
        "which is slow and differentiable any number of times"
    )


gradient_op.register_autograd(_no_second_derivative)


def fused_terms(
    values: Tensor, target: Tensor, predicted: Tensor | None, valid: Tensor | None, given: bool, request: str
) -> tuple[Tensor, Tensor]:
    """All terms and their weighted sum; arguments and results as `fastinstance_kernels.engine.forward`."""
    found, total, *_ = terms_op(values, target, predicted, valid, given, request)
    return found, total
