"""Which implementation works on a tensor: Triton kernels or torch."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

from torch import Tensor

__all__ = ["backend_for", "use_backend"]

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
def _triton_is_missing() -> bool:
    """Whether there is no Triton; says so once."""
    if importlib.util.find_spec("triton") is not None:
        return False
    warnings.warn(
        "fastinstance works on this CUDA tensor with torch, and labels on the CPU, since Triton is not installed: "
        "pip install triton",
        RuntimeWarning,
        stacklevel=2,
    )
    return True


def backend_for(tensor: Tensor) -> str:
    """ "triton" or "torch", for work on `tensor`."""
    chosen = _chosen.get()
    if chosen == "triton" and not (tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        raise ValueError(
            f"expected a CUDA tensor with use_backend('triton'), got one on {tensor.device}; move it with .cuda(), or "
            "set TRITON_INTERPRET=1 before the first import to interpret the kernels on the CPU"
        )
    if chosen is not None:
        return chosen
    return "triton" if tensor.is_cuda and not _triton_is_missing() else "torch"
