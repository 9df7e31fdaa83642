"""What the launchers share: tile sizes, size limits, and the checks that come before a launch."""

from collections.abc import Hashable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton import knobs

INTERPRETED = bool(knobs.runtime.interpret)
"""Whether this process runs kernels in Triton's interpreter (`TRITON_INTERPRET=1` before the import)."""

WORD = 32
"""Pixels of a row that share one mask word, and the largest length of a run piece. A word is one int32."""

TILE_ROWS = 8
"""Mask words, one above the other, per program of the kernels that go over images."""

DENSE_ROWS = 16
"""The same of the kernels that go over every pixel's value."""

LANES = 32
"""Mask words, one above the other, per program of the kernel that goes over the runs in them: a word per lane."""

BLOCK_WORDS = 64
"""Consecutive mask words of a plane per program of the kernels that see words only, and per block of numbers.

One for each lane of the widest warp (AMD's), none held twice.
"""

SCAN_BLOCK = 4096
SCAN_WARPS = 16
"""`scan` is one program per plane: large steps, so that it takes few of them."""

ALL_REGISTERS = {} if torch.version.hip else {"maxnreg": 255}
"""Launch option of kernels on tables: else ptxas may spill to seat more programs at a time than there are."""

MAX_PLANE_PIXELS = 2**31 - 4096
"""Of rows rounded up to words: indices inside a plane are int32 and run up to one block beyond the plane's end."""

MAX_PROGRAMS = 2**31 - 1
"""The largest x extent of a CUDA grid. (y and z end at 65535 and are never used.)"""


def check_device(x: Tensor) -> None:
    """Raise ValueError where the kernels cannot run on the tensor's device."""
    if not (x.is_cuda or (INTERPRETED and x.device.type == "cpu")):
        raise ValueError(
            f"expected a CUDA tensor, got one on {x.device}; move it with .cuda(), "
            "or set TRITON_INTERPRET=1 before the first import to interpret the kernels on the CPU"
        )


def check_plane(rows: int, width: int, shape: Sequence[int]) -> None:
    """Raise ValueError where a plane of so many rows is too large for indices of 32 bits."""
    pixels = rows * -(-width // WORD) * WORD
    if pixels > MAX_PLANE_PIXELS:
        raise ValueError(
            f"expected planes of at most 2^31 - 4096 = {MAX_PLANE_PIXELS} pixels, got {pixels} in each plane of shape "
            f"{tuple(shape)} (rows rounded up to multiples of {WORD}); crop the image or work on its parts"
        )


def cdiv(number: int, size: int) -> int:
    """Parts of `size` that hold `number`. (Triton's own is for kernels too, and takes the host a microsecond.)"""
    return -(-number // size)


def empty(like: Tensor, *shape: int, dtype: torch.dtype) -> Tensor:
    """Memory on the device of `like`. (A shape in one tuple takes the host twice as long.)"""
    if not shape:
        return torch.empty((), dtype=dtype, device=like.device)
    return torch.empty(*shape, dtype=dtype, device=like.device)


def programs(planes: int, per_plane: int) -> tuple[int]:
    """The grid of a kernel with `per_plane` programs for each plane; ValueError if no device can have it."""
    total = planes * per_plane
    if total > MAX_PROGRAMS:
        raise ValueError(
            f"expected at most {MAX_PROGRAMS} tiles in a call, got {total} ({planes} planes of {per_plane}): "
            "label fewer planes at a time"
        )
    return (total,)


class Step:
    """Launches kernels one after the other; those of a step like an earlier one without Triton's search.

    Triton looks for the compiled kernel of each launch by all of its arguments, which takes the host longer (8 to 40
    µs) than most of these kernels take a GPU. Here the step says once what all its launches depend on.
    Profilers see the launches as ever; a change of Triton's debug setting or of its hooks before a run comes too late.

    Args:
        key: what decides which kernels the step launches, with which constants, integers and kinds of tensors. A
            tensor stands for its dtype, layout and device.
        others: more tensors, whose dtype and device follow from the key.
    """

    def __init__(self, *key: Hashable, others: Iterable[Tensor | None] = ()) -> None:
        addresses = 0
        for part in (*key, *others):
            if isinstance(part, Tensor):
                addresses |= part.data_ptr()
        # Kernels are compiled for addresses that are multiples of 16, which all are, but for views of a caller.
        self._launches = {} if addresses % 16 else _launches(tuple(map(_kind, key)))
        self._next = 0

    def __call__(self, kernel: Any, grid: tuple[int], *arguments: Any, **constants: Any) -> None:
        """Launch `kernel[grid]`, a kernel of `triton.jit`; `constants` are its last parameters, and launch options."""
        known = self._launches.get(self._next)
        if known is not None:
            compiled, constants_in_order = known
            compiled[(*grid, 1, 1)](*arguments, *constants_in_order)
        else:
            compiled = kernel[grid](*arguments, **constants)
            if compiled is not None:  # the interpreter compiles nothing
                names = kernel.arg_names[len(arguments) :]
                self._launches[self._next] = compiled, tuple(constants[name] for name in names)
        self._next += 1


def _kind(part: Hashable) -> Hashable:
    return (part.dtype, part.shape, part.stride(), part.device) if isinstance(part, Tensor) else part


@lru_cache(maxsize=1024)
def _launches(key: Hashable) -> dict[int, tuple[Any, tuple[Any, ...]]]:
    """By their place in a step of this key: the compiled kernel, and its constants in the order of its parameters."""
    del key
    return {}
