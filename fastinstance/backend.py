"""Which implementation works on a tensor: Triton kernels or torch."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, update_wrapper
from typing import Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = ["Operator", "backend_for", "by_operators", "operator", "use_backend"]

_chosen: ContextVar[str | None] = ContextVar("fastinstance_backend", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the implementation inside a `with` block; without it, Triton for CUDA tensors and torch for others.

    Args:
        name: "triton", for CUDA tensors, and for CPU tensors where `TRITON_INTERPRET=1` was set before the first import
            of triton; "torch", for all devices: on a GPU the components are then labelled on the CPU.

    Raises:
        ValueError: another name, or (at the first use inside the block) "triton" for a tensor that it cannot work on.
    """
    if name not in ("triton", "torch"):
        raise ValueError(f"expected the backend to be 'triton' or 'torch', got {name!r}")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


@cache
def _triton_works() -> bool:
    """Whether the kernels can be imported; says once why not."""
    try:
        import fastinstance_kernels  # noqa: F401
    except Exception as error:  # a broken Triton fails in many ways
        warnings.warn(
            "fastinstance works on this CUDA tensor with torch, and labels on the CPU, since its Triton kernels cannot "
            f"be imported ({type(error).__name__}: {error}); install a Triton that fits this torch (pip install "
            "triton), or choose torch yourself with fastinstance.use_backend('torch')",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


@torch.compiler.assume_constant_result
def _backend(device: str) -> str:
    chosen = _chosen.get()
    if chosen == "triton" and not (device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"):
        raise ValueError(
            f"expected a CUDA tensor with use_backend('triton'), got one on {device}; move it with .cuda(), or "
            "set TRITON_INTERPRET=1 before the first import to interpret the kernels on the CPU"
        )
    if chosen is not None:
        return chosen
    return "triton" if device == "cuda" and _triton_works() else "torch"


def backend_for(tensor: Tensor) -> str:
    """ "triton" or "torch", for work on `tensor`."""
    return _backend(tensor.device.type)


def by_operators(tensor: Tensor) -> bool:
    """Whether work on `tensor` goes through registered operators: in code that is compiled or traced, or has no memory.

    Elsewhere the functions behind them are called, since the dispatch of a custom operator takes the host longer.
    """
    return (
        torch.compiler.is_compiling()
        or tensor.is_meta
        or type(tensor) is not Tensor
        or torch._C._len_torch_dispatch_stack() > 0  # make_fx, FlopCounterMode and other modes that see operators only
        or torch._C._is_tracing()  # torch.jit.trace
    )


P = ParamSpec("P")
R = TypeVar("R")


class Operator(Generic[P, R]):
    """A function whose first argument is a tensor, registered as an operator for where `by_operators` asks for one."""

    def __init__(self, function: Callable[P, R], name: str) -> None:
        self.function = function
        self.registered = torch.library.custom_op(name, function, mutates_args=())
        self.register_fake = self.registered.register_fake
        update_wrapper(self, function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return (self.registered if by_operators(args[0]) else self.function)(*args, **kwargs)  # pyright: ignore[reportArgumentType]


def operator(name: str) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Decorates a function that neither changes nor returns its arguments, and has no derivative."""
    return lambda function: Operator(function, name)
