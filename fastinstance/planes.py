"""Activation, one-hot, background, valid mask: images [B, C, *S] -> B·C independent planes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Planes", "activate", "to_planes"]

# Logit of a pixel that is not valid: its probability, cost and slopes are exactly 0 in every dtype.
_IMPOSSIBLE = -1e4


@dataclass(frozen=True)
class Planes:
    """B·C planes of the P pixels of a grid S, in raster order."""

    values: Tensor  # [B·C, P] float32 or float64: logits, or probabilities; carries the gradient
    logits: bool
    categorical: bool  # the channels of an image are one softmax distribution
    mark: Callable[[], Tensor]  # makes `predicted`
    target: Tensor  # [B·C, *S] bool
    labels: Tensor | None  # [B·C, *S] given ground-truth ids, 0 = background
    valid: Tensor | None  # [B·C, *S] bool
    omega: Tensor  # [B·C] float64, number of valid pixels
    batch: int
    channels: int
    size: tuple[int, ...]  # S

    @property
    def predicted(self) -> Tensor:
        """[B·C, *S] bool: probability >= threshold, made for each who asks."""
        return self.mark()


def _one_against_rest(logits: Tensor) -> Tensor:
    """Softmax logits z -> binary logits u_c = z_c - log Σ_{j≠c} exp z_j, so that σ(u_c) = softmax(z)_c.

    The sum that leaves out c comes from a running sum from either side: exact where 1 - p would cancel.
    """
    edge = torch.full_like(logits[:, :1], -math.inf)
    before = torch.cat([edge, logits.logcumsumexp(1)[:, :-1]], 1)
    after = torch.cat([logits.flip(1).logcumsumexp(1).flip(1)[:, 1:], edge], 1)
    not_finite = (logits - logits).sum(1, keepdim=True)  # 0, or NaN for all classes of the pixel
    return logits - torch.logaddexp(before, after) + not_finite


def _at_least(values: Tensor, bound: float) -> Tensor:
    """values >= bound; on the CPU numpy takes a fifth of torch's time."""
    if values.device.type == "cpu" and values.dtype != torch.bfloat16 and not torch.compiler.is_compiling():
        array = values.numpy()
        return torch.from_numpy(np.greater_equal(array, array.dtype.type(bound)))
    return values >= bound


def activate(other_act: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    """`other_act(input)`, checked."""
    values = other_act(input)
    if not isinstance(values, Tensor) or not values.is_floating_point():
        got = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"expected other_act to return a tensor of probabilities, got {got}; leave other_act out")
    if values.shape != input.shape:
        raise ValueError(
            f"expected other_act to keep the shape of input, {tuple(input.shape)}, got {tuple(values.shape)}; "
            "apply it yourself and leave other_act out"
        )
    return values


def to_planes(
    input: Tensor,
    target: Tensor,
    *,
    include_background: bool,
    to_onehot_y: bool,
    sigmoid: bool,
    softmax: bool,
    other_act: Callable[[Tensor], Tensor] | None,
    threshold: float,
    target_labels: Tensor | None,
    valid_mask: Tensor | None,
) -> Planes:
    """Bring checked images [B, C, *S] into planes; the arguments are those of `functional.instance_terms`."""
    batch, channels, *size = input.shape
    wide = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
    if valid_mask is not None:
        valid_mask = valid_mask > 0
        wide = wide.where(valid_mask, wide.new_zeros(()))  # what an invalid pixel holds, even NaN, stays out
    if sigmoid:
        values = wide
        least = math.log(threshold / (1 - threshold))
    elif softmax:
        values, least = _one_against_rest(wide), threshold
    else:
        # An activation may come back in half precision, as under autocast, in which nothing is summed.
        values, least = wide if other_act is None else activate(other_act, wide).to(wide.dtype), threshold
    marked = wide.detach() if softmax else values.detach()

    if target_labels is not None:
        truth = target_labels.bool()
    elif to_onehot_y:
        classes = torch.arange(channels, device=target.device).view(1, -1, *[1] * len(size))
        truth = target == classes
    else:
        truth = target.bool().expand(-1, channels, *size)

    if not include_background:
        channels -= 1
        values, truth = values[:, 1:], truth[:, 1:]
        target_labels = None if target_labels is None else target_labels[:, 1:]

    shape = (batch * channels, *size)
    logits = sigmoid or softmax
    labels = None if target_labels is None else target_labels.reshape(shape)
    valid = None
    omega = torch.full((batch * channels,), math.prod(size), dtype=torch.float64, device=input.device)
    if valid_mask is not None:
        valid = valid_mask.expand(-1, channels, *size)
        values = values.where(valid, values.new_full((), _IMPOSSIBLE if logits else 0.0))
        truth, valid = (mask.logical_and(valid).reshape(shape) for mask in (truth, valid))
        labels = None if labels is None else labels * valid
        omega = valid.flatten(1).sum(1, dtype=torch.float64)

    def mark() -> Tensor:
        predicted = _at_least(marked.softmax(1) if softmax else marked, least)[:, -channels:].reshape(shape)
        return predicted if valid is None else predicted & valid

    return Planes(
        values=values.reshape(batch * channels, math.prod(size)),
        logits=logits,
        categorical=softmax,
        mark=mark,
        target=truth.reshape(shape),
        labels=labels,
        valid=valid,
        omega=omega,
        batch=batch,
        channels=channels,
        size=tuple(size),
    )
