"""CUDA graphs for training in eager mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

__all__ = ["make_graphed"]


def make_graphed(loss: nn.Module, sample_input: Tensor, sample_target: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss with its forward and its backward pass as CUDA graphs: the price of launching the kernels is gone.

    Args:
        loss: a loss of this library (no part of it may depend on values on the host, such as an `other_act` that does).
        sample_input: input of the shape, dtype and device of all later ones; give it `requires_grad_()` if they
            require a gradient. Its values do not matter.
        sample_target: target likewise.

    Returns:
        `graphed(input, target)`, equal to `loss(input, target)`; `loss` itself stays as it is. Each call overwrites the
        result of the one before.

    Raises:
        ValueError: the samples are not on a GPU.
        TypeError: they are no tensors.
    """
    samples = {"sample_input": sample_input, "sample_target": sample_target}
    for name, sample in samples.items():
        if not isinstance(sample, Tensor):
            raise TypeError(f"expected {name} to be a tensor, got {type(sample).__name__}")
    for name, sample in samples.items():
        if not sample.is_cuda:
            raise ValueError(f"expected {name} on a CUDA device, got {sample.device}; on the CPU call the loss itself")

    def function(input: Tensor, target: Tensor) -> Tensor:
        return loss(input, target)

    # Of a module torch would make the graph in its place, and there would be no other way to call it.
    graphed = torch.cuda.make_graphed_callables(function, (sample_input, sample_target))
    return cast("Callable[[Tensor, Tensor], Tensor]", graphed)
