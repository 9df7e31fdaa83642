"""A comparison that says which value differs, and where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["assert_close"]

# rtol, atol. Half precision: a value computed in float32 and rounded once, with room for one more rounding.
_TOLERANCES = {
    torch.float64: (1e-9, 1e-12),
    torch.float32: (1e-5, 1e-6),
    torch.float16: (2e-3, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-5),
}


def assert_close(
    actual: Any,
    expected: Any,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    relative_to: str = "each",
    name: str = "value",
) -> None:
    """Raise AssertionError, saying which term and where, unless every value is close.

    Takes tensors, numbers, None, and mappings, named tuples and sequences of them (alike on both sides).
    Allowed is `atol + rtol * |expected|`, with the expected value at the same place (`relative_to="each"`) or
    the largest finite one of its tensor ("largest": for gradients in low precision). The defaults follow the
    coarser dtype of the two: float64 1e-9 and 1e-12, float32 1e-5 and 1e-6, float16 2e-3 and 1e-5, bfloat16
    1.6e-2 and 1e-5. NaN equals NaN and an infinity equals itself.
    """
    tolerances = {"rtol": rtol, "atol": atol, "relative_to": relative_to}
    if actual is None or expected is None:
        if actual is not expected:
            raise AssertionError(f"{name}: expected {expected!r}, got {actual!r}")
        return
    if isinstance(expected, Mapping):
        if actual.keys() != expected.keys():
            raise AssertionError(f"{name}: expected the keys {sorted(expected)}, got {sorted(actual)}")
        for key in expected:
            assert_close(actual[key], expected[key], name=f"{name}[{key!r}]", **tolerances)
        return
    if isinstance(expected, tuple | list):
        if len(actual) != len(expected):
            raise AssertionError(f"{name}: expected {len(expected)} entries, got {len(actual)}")
        fields = getattr(expected, "_fields", [f"{name}[{i}]" for i in range(len(expected))])
        for field, one, other in zip(fields, actual, expected, strict=True):
            assert_close(one, other, name=field, **tolerances)
        return
    _assert_tensors_close(torch.as_tensor(actual), torch.as_tensor(expected), name, **tolerances)


def _assert_tensors_close(
    actual: Tensor, expected: Tensor, name: str, rtol: float | None, atol: float | None, relative_to: str
) -> None:
    if relative_to not in ("each", "largest"):
        raise ValueError(f"expected relative_to to be 'each' or 'largest', got {relative_to!r}")
    if actual.shape != expected.shape:
        raise AssertionError(f"{name}: expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}")
    floats = [tensor.dtype for tensor in (actual, expected) if tensor.is_floating_point()]
    default_rtol, default_atol = max((_TOLERANCES[dtype] for dtype in floats), default=(0.0, 0.0))
    rtol, atol = default_rtol if rtol is None else rtol, default_atol if atol is None else atol
    got, want = actual.detach().double(), expected.detach().double()
    size = want.abs()
    if relative_to == "largest":
        finite = size[size.isfinite()]
        size = finite.amax().expand_as(size) if finite.numel() else size
    allowed = atol + rtol * size
    distance = (got - want).abs()
    good = ((distance <= allowed) & want.isfinite()) | (got == want) | (got.isnan() & want.isnan())
    if good.all():
        return
    excess = torch.where(good, -1.0, (distance / allowed).nan_to_num(float("inf")))
    where = torch.unravel_index(excess.argmax(), excess.shape) if excess.ndim else ()
    place = [int(index) for index in where]
    a, b = got[where].item(), want[where].item()
    count = f"{int((~good).sum())} of {good.numel()} values differ, most at {place}: " if place else ""
    raise AssertionError(
        f"{name}: {count}got {a:.12g}, expected {b:.12g} "
        f"(difference {abs(a - b):.3g}, allowed {allowed[where].item():.3g})"
    )
