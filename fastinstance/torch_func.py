"""`torch.func.grad`, `vjp` and `grad_and_value` over this library: tensors there have no memory for numpy to read."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from .fused import no_second_derivative

__all__ = ["differentiable"]

P = ParamSpec("P")
R = TypeVar("R")


def differentiable(function: Callable[P, R]) -> Callable[P, R]:
    """`function` also under the transforms of `torch.func`: a derivative with respect to its first tensor.

    Under a transform the function runs on the tensors below it, as one step of the transform, with its own graph. Other
    tensors are constants. `vmap` and forward mode raise RuntimeError.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
            return function(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        tensors = {name: value for name, value in bound.arguments.items() if isinstance(value, Tensor)}
        if not tensors:
            return function(*args, **kwargs)

        def run(*images: Tensor) -> R:
            bound.arguments.update(zip(tensors, images, strict=True))
            return function(*bound.args, **bound.kwargs)

        graph = _Graph(run)
        return pytree.tree_unflatten(_Step.apply(graph, *tensors.values()), graph.structure)

    return wrapper


class _Graph:
    """One evaluation: its input, and its results with the graph between them."""

    input: Tensor
    results: list[Tensor]
    structure: Any

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run

    def evaluate(self, input: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        self.input = input.detach().requires_grad_(input.is_floating_point())
        with torch.enable_grad():
            found = self.run(self.input, *(image.detach() for image in others))
        self.results, self.structure = pytree.tree_flatten(found)
        return tuple(result.detach() for result in self.results)


def _not_batched(info: Any, in_dims: Any, *_: Any) -> Any:
    del info, in_dims
    raise RuntimeError(
        "expected whole batches, got tensors under torch.func.vmap (or jacrev); call it on the whole batch, a loss "
        "with reduction='none' for a value for each image, or loop over the samples"
    )


def _not_forward(ctx: Any, *_: Any) -> Any:
    del ctx
    raise RuntimeError(
        "expected a derivative in reverse mode, got a forward mode (torch.func.jvp, jacfwd, hessian), which losses of "
        "fastinstance do not have; use torch.func.grad or vjp"
    )


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(graph: _Graph, *images: Tensor) -> tuple[Tensor, ...]:
        return graph.evaluate(*images)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.graph, input, *others = inputs
        ctx.others = len(others)
        ctx.save_for_backward(input)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *(out for out, result in zip(output, ctx.graph.results, strict=True) if not result.requires_grad)
        )

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if all(one is None for one in upstream):
            return (None,) * (2 + ctx.others)
        return None, _Gradient.apply(ctx.graph, *ctx.saved_tensors, *upstream), *[None] * ctx.others

    vmap = staticmethod(_not_batched)
    jvp = staticmethod(_not_forward)


class _Gradient(torch.autograd.Function):
    """The gradient; it depends on the input, so that a second derivative is an error and not a silent zero."""

    @staticmethod
    def forward(graph: _Graph, _input: Tensor, *upstream: Tensor | None) -> Tensor:
        given = [(result, one) for result, one in zip(graph.results, upstream, strict=True) if one is not None]
        results, ones = zip(*given, strict=True)
        (gradient,) = torch.autograd.grad(results, graph.input, ones, retain_graph=True)
        return gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del ctx, inputs, output

    backward = staticmethod(no_second_derivative)
    vmap = staticmethod(_not_batched)
    jvp = staticmethod(_not_forward)
