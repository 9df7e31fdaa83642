"""What every loss checks before any work: settings, shapes, dtypes, devices, and values where reading them is free.

Each message says which argument, what was expected, what came, and what to do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "CONNECTIVITIES",
    "MAX_ID",
    "check_activation",
    "check_binary",
    "check_choice",
    "check_connectivity",
    "check_flags",
    "check_floating",
    "check_id_range",
    "check_images",
    "check_labels",
    "check_mask",
    "check_mask_pair",
    "check_mask_values",
    "check_max_instances",
    "check_not_empty",
    "check_per_axis",
    "check_probabilities",
    "check_size",
    "check_threshold",
    "check_values",
    "check_volumes",
    "comparable",
    "debug_checks",
    "reads_values",
]

CONNECTIVITIES = {2: (4, 8), 3: (6, 18, 26)}  # by number of axes; the last one is full connectivity, the default
MAX_ID = 2**31 - 1
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_WIDE_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # torch computes little with these

_PIECE = 1 << 17

_debug = False


def debug_checks(enabled: bool = True) -> None:
    """Check values on a GPU too (binary targets, probabilities in [0, 1], ids), which reads them back and waits.

    On the CPU these checks are always on.
    """
    global _debug
    check_flags(enabled=enabled)
    _debug = bool(enabled)


def reads_values(tensor: Tensor) -> bool:
    """Whether the values of `tensor` may be read by a check: on the CPU or with `debug_checks(True)`, untraced."""
    return (tensor.device.type == "cpu" or _debug) and not torch.compiler.is_compiling()


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"expected {name} to be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_flags(**flags: object) -> None:
    """Switches are booleans (or 0 and 1): any text is true, even "False"."""
    for name, value in flags.items():
        if not isinstance(value, int | np.bool_) or value not in (0, 1):
            raise TypeError(f"expected {name} to be True or False, got {value!r}")


def check_threshold(name: str, value: object) -> None:
    if not isinstance(value, int | float) or not 0 < value < 1:
        raise ValueError(f"expected {name} strictly between 0 and 1, got {value!r}")


def check_size(name: str, value: object, of: str = "pixels") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"expected {name} to be an integer >= 0 (a number of {of}), got {value!r}")


def check_max_instances(value: object) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"expected max_instances to be an integer >= 1 or None, got {value!r}")


def check_activation(*, sigmoid: bool, softmax: bool, other_act: object) -> None:
    if other_act is not None and not callable(other_act):
        raise TypeError(f"expected other_act to be callable or None, got {type(other_act).__name__}")
    if bool(sigmoid) + bool(softmax) + (other_act is not None) > 1:
        raise ValueError(
            f"incompatible values: expected at most one of sigmoid, softmax and other_act, "
            f"got sigmoid={sigmoid}, softmax={softmax}, other_act={other_act}"
        )


def check_connectivity(connectivity: int | None, axes: int | None = None) -> int:
    """The connectivity to use for images of `axes` axes; None stands for full connectivity.

    Without `axes` it is checked that there are images which it fits.
    """
    several = CONNECTIVITIES if axes is None else {axes: CONNECTIVITIES[axes]}
    if connectivity is None:
        return several[min(several)][-1]
    fits = isinstance(connectivity, int | np.integer) and any(connectivity in choices for choices in several.values())
    if not fits:
        known = ", ".join(f"in {choices} for {axes}D images" for axes, choices in several.items())
        raise ValueError(f"expected connectivity {known}, or None for full connectivity, got {connectivity!r}")
    return int(connectivity)


def check_per_axis(name: str, value: object, axes: int, *, integer: bool) -> tuple[Any, ...]:
    """One positive number for each axis, from one number or a sequence of them."""
    values: tuple[Any, ...] = (
        tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,) * axes
    )
    kinds = (int, np.integer) if integer else (int, float, np.number)
    fits = len(values) == axes and all(isinstance(v, kinds) and not isinstance(v, bool) for v in values)
    if not fits or not all(0 < v < math.inf for v in values):
        kind = "integer" if integer else "number"
        raise ValueError(f"expected {name} to be a positive {kind} or {axes} of them (one per axis), got {value!r}")
    return tuple((int if integer else float)(v) for v in values)


def check_volumes(name: str, edges: object, least: int = 0) -> tuple[float, ...]:
    """Edges of size groups, at least so many."""
    try:
        values = (math.nan,) if isinstance(edges, str | bytes) else tuple(map(float, edges))  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        values = (math.nan,)
    if len(values) < least or not all(low < high for low, high in pairwise((0.0, *values, math.inf))):
        raise ValueError(f"expected {name} to be ascending volumes above 0 in mL, got {edges!r}")
    return values


def check_mask(mask: Tensor) -> None:
    """Rank and kind of the mask of `label`."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"expected mask to be a tensor, got {type(mask).__name__}")
    if mask.is_complex():
        raise TypeError(f"expected mask of a real dtype, got {mask.dtype}")
    if mask.ndim not in (4, 5):
        raise ValueError(f"expected mask [B,C,H,W] or [B,C,D,H,W], got {_shape(mask)}; add the missing axes")


def _check_tensor(name: str, value: object, like: Tensor, of: str = "input") -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"expected {name} to be a tensor, got {type(value).__name__}")
    if value.device != like.device:
        raise ValueError(f"expected {name} on the device of {of}, {like.device}, got {value.device}; move one of them")
    if value.is_complex():
        raise TypeError(f"expected {name} of a real dtype, got {value.dtype}")


def check_labels(name: str, labels: Tensor, like: str, image: Tensor) -> None:
    """Shape, dtype and device of ids for the pixels of `image`, which is the argument `like`."""
    _check_tensor(name, labels, image, of=like)
    if labels.shape != image.shape:
        raise ValueError(f"expected {name} [B,C,*S] = {_shape(image)} like {like}, got {_shape(labels)}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"expected {name} of an integer dtype, got {labels.dtype}; instance ids are integers")


def check_mask_pair(pred: Tensor, target: Tensor, pred_labels: Tensor | None, target_labels: Tensor | None) -> None:
    """Shapes, dtypes and devices of what the metrics compare; reads no value."""
    for name, mask in (("pred", pred), ("target", target)):
        if not isinstance(mask, Tensor):
            raise TypeError(f"expected {name} to be a tensor, got {type(mask).__name__}")
        if mask.is_complex():
            raise TypeError(f"expected {name} of a real dtype, got {mask.dtype}")
        if mask.ndim not in (4, 5) or mask.numel() == 0:
            raise ValueError(
                f"expected {name} [B,C,H,W] or [B,C,D,H,W] with at least one pixel, got {_shape(mask)}; "
                "add the missing axes"
            )
    if pred.shape != target.shape:
        raise ValueError(f"expected pred and target of one shape, got {_shape(pred)} and {_shape(target)}")
    _check_tensor("target", target, pred, of="pred")
    for name, labels, like, image in (
        ("pred_labels", pred_labels, "pred", pred),
        ("target_labels", target_labels, "target", target),
    ):
        if labels is not None:
            check_labels(name, labels, like, image)


def check_mask_values(name: str, mask: Tensor, labels: Tensor | None) -> None:
    """A mask is binary, and its ids are in range and where it is."""
    check_binary(name, mask, f"{name} >= 0.5 for probabilities, {name} > 0 for a mask, {name}_labels= for instance ids")
    if labels is None:
        return
    check_id_range(f"{name}_labels", labels)
    differs = int((labels.bool() ^ mask.bool()).sum())
    if differs:
        raise ValueError(
            f"expected {name}_labels > 0 exactly where {name} is 1, got {differs} pixels that differ; "
            f"pass {name} = {name}_labels > 0"
        )


def check_id_range(name: str, labels: Tensor) -> None:
    """Ids that fit int32, none negative."""
    low, high = (bound.item() for bound in comparable(labels).aminmax())
    if low < 0 or high > MAX_ID:
        raise ValueError(
            f"expected {name} between 0 and {MAX_ID}, got values from {low} to {high}; "
            "0 is background, ids need not be consecutive"
        )


def check_floating(name: str, image: Tensor) -> None:
    if image.dtype not in _FLOATS:
        raise TypeError(f"expected {name} of a floating dtype, got {image.dtype}; convert it with {name}.float()")


def check_not_empty(name: str, image: Tensor) -> None:
    if image.numel() == 0:
        raise ValueError(f"expected {name} with at least one pixel, got {_shape(image)}; skip empty batches")


def check_images(
    input: Tensor,
    target: Tensor,
    target_labels: Tensor | None,
    valid_mask: Tensor | None,
    *,
    include_background: bool,
    to_onehot_y: bool,
    softmax: bool,
) -> None:
    """Shapes, dtypes and devices of the tensors of one call; reads no value."""
    if not isinstance(input, Tensor):
        raise TypeError(f"expected input to be a tensor, got {type(input).__name__}")
    check_floating("input", input)
    if input.ndim not in (4, 5):
        raise ValueError(f"expected input [B,C,H,W] or [B,C,D,H,W], got {_shape(input)}; add the missing axes")
    check_not_empty("input", input)
    _check_tensor("target", target, input)
    batch, channels, *size = input.shape
    if target.shape not in {(batch, 1, *size), (batch, channels, *size)}:
        hint = "; add a channel axis with target[:, None]" if target.shape == (batch, *size) else ""
        raise ValueError(f"expected target [B,1,*S] or [B,C,*S] for input {_shape(input)}, got {_shape(target)}{hint}")
    if channels == 1:
        for name, wrong in (
            ("softmax=True", softmax),
            ("to_onehot_y=True", to_onehot_y),
            ("include_background=False", not include_background),
        ):
            if wrong:
                raise ValueError(f"expected at least two channels with {name}, got input {_shape(input)}; leave it out")
    if softmax and not to_onehot_y and target.shape[1] == 1 and channels - (not include_background) > 1:
        raise ValueError(
            f"expected target [B,C,*S] of one mask for each class with softmax=True, got {_shape(target)} for input "
            f"{_shape(input)}; set to_onehot_y=True for class indices"
        )
    if to_onehot_y and target.shape[1] != 1:
        raise ValueError(
            f"expected target [B,1,*S] of class indices with to_onehot_y=True, got {_shape(target)}; "
            "a one-hot target needs to_onehot_y=False"
        )
    if target_labels is not None:
        check_labels("target_labels", target_labels, "input", input)
    if valid_mask is not None:
        _check_tensor("valid_mask", valid_mask, input)
        if valid_mask.shape != (batch, 1, *size):
            raise ValueError(
                f"expected valid_mask [B,1,*S] = {(batch, 1, *size)} for input {_shape(input)}, "
                f"got {_shape(valid_mask)}; one mask serves all channels"
            )


def comparable(tensor: Tensor) -> Tensor:
    """A mask or ids in a dtype that torch can compare, index and multiply."""
    return tensor.long() if tensor.dtype in _WIDE_UNSIGNED else tensor


def _not_binary(tensor: Tensor) -> bool:
    if tensor.dtype == torch.bool:
        return False
    if not tensor.is_floating_point():
        low, high = comparable(tensor).aminmax()
        return bool((low < 0) | (high > 1))
    for piece in tensor.reshape(-1).split(_PIECE):  # the temporaries stay in cache
        low, high = torch.addcmul(piece, piece, piece, value=-1).aminmax()  # x - x² is 0 for 0 and 1 only
        if not (low == 0 and high == 0):
            return True
    return False


def check_binary(name: str, mask: Tensor, instead: str) -> None:
    """`instead` says what to use for other values."""
    if _not_binary(mask):
        raise ValueError(f"expected {name} to hold only 0 and 1, got other values; use {instead}")


def check_values(
    target: Tensor, target_labels: Tensor | None, valid_mask: Tensor | None, *, channels: int, to_onehot_y: bool
) -> None:
    """Binary targets and masks, class indices in range, ids in range and in agreement with the target."""
    if valid_mask is not None:
        check_binary("valid_mask", valid_mask, "mask > 0")
    if to_onehot_y:
        low, high = (bound.item() for bound in target.aminmax())
        if not (low >= 0 and high < channels and bool((target == target.long()).all())):
            raise ValueError(
                f"expected target to hold class indices 0 to {channels - 1} with to_onehot_y=True, "
                f"got values from {low} to {high}"
            )
    else:
        check_binary(
            "target",
            target,
            "target > 0 for a mask, to_onehot_y=True for class indices, target_labels= for instance ids",
        )
    if target_labels is None:
        return
    check_id_range("target_labels", target_labels)
    truth = target.bool()
    if to_onehot_y:
        truth = target == torch.arange(channels, device=target.device).view(1, -1, *[1] * (target.ndim - 2))
    labelled, truth = target_labels.bool(), truth.expand_as(target_labels)
    if valid_mask is not None:
        labelled, truth = labelled & valid_mask.bool(), truth & valid_mask.bool()
    differs = labelled ^ truth
    if differs.view(torch.uint8).max():  # much faster than any() on booleans
        raise ValueError(
            f"expected target_labels > 0 exactly where target is 1, got {int(differs.sum())} pixels that differ; "
            "pass target = target_labels > 0"
        )


def check_probabilities(
    low: float, high: float, name: str = "input", instead: str = "set sigmoid=True or softmax=True for logits"
) -> None:
    """`low` and `high` are the extremes of what should be probabilities (NaN if any is NaN)."""
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"expected {name} to hold probabilities in [0, 1], got values from {low:.6g} to {high:.6g}; {instead}"
        )
