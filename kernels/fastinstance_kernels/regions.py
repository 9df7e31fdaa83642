"""Voronoi regions: the nearest labelled pixel of every pixel, exactly, one axis after the other.

The nearest pixel of an image is the nearest among those that are nearest within their own lines along the last axis
that was worked on: so a pass along each axis finds it, and nothing is approximated. (Jump flooding would take more
passes, and a repair.) What is kept of a pixel is its best candidate so far:

    distance  float32 or float64 [planes, pixels]  squared, infinite where there is none
    nearest   int32 [planes, pixels]               index of the candidate in its plane, NOWHERE where there is none

Candidates are ordered by distance, then by index, which no order of work changes: the first in raster order wins.
Squared distances are integers when all axes have the same spacing, exact in float32 up to 2^24 and in float64 beyond.

The first pass walks along lines; the others look at both sides of a pixel, farther and farther, until what is left is
too far away for all pixels of the program.
"""

# Compile-time parameters are annotated tl.constexpr and take Python values; launch options are no parameters.
# pyright: reportArgumentType=false, reportCallIssue=false

import ctypes
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from . import launch

NOWHERE = tl.constexpr(2**31 - 1)
LINES = 32
PIXELS = 64
STEPS = tl.constexpr(4)
"""Offsets between two looks at whether all pixels are done."""
EXACT_IN_FLOAT32 = 2**24


@triton.jit
def _squared(offset, distance, spacing, spacing_rest):
    """Squared distance of pixels along an axis, in the type that `distance` points at."""
    real = distance.dtype.element_ty
    apart = offset.to(real) * (tl.zeros([], real) + spacing + spacing_rest)
    return apart * apart


@triton.jit(do_not_specialize=["length", "inner", "blocks", "spacing", "spacing_rest"])
def walk(labels, distance, nearest, length, inner, blocks, spacing, spacing_rest, BLOCK: tl.constexpr):
    """A block of lines along the first axis: the last labelled pixel before each, then the first one after it.

    A float64 spacing comes in two parts.
    """
    program = tl.program_id(0)
    plane = (program // blocks).to(tl.int64)
    line = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = line < inner
    here = plane * length * inner + line
    before = tl.full([BLOCK], -1, tl.int32)
    i = 0
    while i < length:
        labelled = tl.load(labels + here, mask=inside, other=0) != 0
        before = tl.where(labelled, i, before)
        tl.store(nearest + here, before, mask=inside)
        here += inner
        i += 1
    after = tl.full([BLOCK], -1, tl.int32)
    while i > 0:
        i -= 1
        here -= inner
        before = tl.load(nearest + here, mask=inside, other=-1)
        after = tl.where(before == i, i, after)
        use_after = (after >= 0) & ((before < 0) | (after - i < i - before))
        best = tl.where(use_after, after, before)
        apart = _squared(best - i, distance, spacing, spacing_rest)
        tl.store(distance + here, tl.where(best >= 0, apart, float("inf")), mask=inside)
        tl.store(nearest + here, tl.where(best >= 0, best * inner + line, NOWHERE), mask=inside)


@triton.jit
def _better(distance, nearest, best, index, at, there, added):
    """The better of a pixel's candidate and that of the pixels `at`, `added` further away."""
    other = tl.load(distance + at, mask=there, other=float("inf")) + added
    candidate = tl.load(nearest + at, mask=there & (other <= best), other=NOWHERE)
    nearer = (other < best) | ((other == best) & (candidate < index))
    return tl.where(nearer, other, best), tl.where(nearer, candidate, index)


@triton.jit(do_not_specialize=["pixels", "length", "inner", "blocks", "spacing", "spacing_rest"])
def spread(
    labels, distance, nearest, out_distance, out_nearest, regions, pixels, length, inner, blocks, spacing, spacing_rest,
    LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of pixels: the best of the candidates on their lines along an axis. LAST: its label."""
    program = tl.program_id(0)
    plane = (program // blocks).to(tl.int64)
    pixel = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    first = plane * pixels
    distance += first  # indices inside of a plane have 32 bits
    nearest += first
    place = pixel // inner % length
    best = tl.load(distance + pixel, mask=inside, other=0.0)
    index = tl.load(nearest + pixel, mask=inside, other=NOWHERE)
    offset = tl.full([], 1, tl.int32)
    added = _squared(offset, distance, spacing, spacing_rest)
    # Ends: no offset reaches beyond the line, and farther than the best nothing counts.
    while tl.max((inside & (added <= best) & (offset < length)).to(tl.int32)) > 0:
        for _ in tl.static_range(STEPS):
            lower = inside & (place >= offset)
            best, index = _better(distance, nearest, best, index, pixel - offset * inner, lower, added)
            upper = inside & (place + offset < length)
            best, index = _better(distance, nearest, best, index, pixel + offset * inner, upper, added)
            offset += 1
            added = _squared(offset, distance, spacing, spacing_rest)
    if LAST:
        label = tl.load(labels + first + index, mask=inside & (index != NOWHERE), other=0)
        tl.store(regions + first + pixel, label, mask=inside)
    else:
        tl.store(out_distance + first + pixel, best, mask=inside)
        tl.store(out_nearest + first + pixel, index, mask=inside)


def nearest_label(labels: torch.Tensor, spacing: Sequence[float]) -> torch.Tensor:
    """The label of the nearest labelled pixel at every pixel; of equally near ones the first in raster order.

    Args:
        labels: `[planes, *S]`, 2D or 3D, contiguous, of an integer dtype; 0 is background.
        spacing: size of a pixel along each axis of S.

    Returns:
        Like `labels`; 0 in planes without a label.
    """
    launch.check_device(labels)
    planes, *size = labels.shape
    pixels = math.prod(size)
    launch.check_plane(math.prod(size[:-1]), size[-1], labels.shape)
    exact = len(set(spacing)) == 1 and sum(length**2 for length in size) < EXACT_IN_FLOAT32
    real = torch.float32 if exact else torch.float64
    if exact:
        spacing = (1.0,) * len(size)

    def empty(dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(labels.shape, dtype=dtype, device=labels.device)

    regions = empty(labels.dtype)
    distance, nearest = empty(real), empty(torch.int32)
    parts = [(high := ctypes.c_float(scale).value, scale - high) for scale in spacing]
    inner = pixels // size[0]
    with torch.cuda.device_of(labels):
        blocks = triton.cdiv(inner, LINES)
        walk[launch.programs(planes, blocks)](
            labels, distance, nearest, size[0], inner, blocks, *parts[0], BLOCK=LINES, num_warps=1
        )
        blocks = triton.cdiv(pixels, PIXELS)
        for axis in range(1, len(size)):
            last = axis == len(size) - 1
            inner //= size[axis]
            found = (None, None) if last else (empty(real), empty(torch.int32))
            spread[launch.programs(planes, blocks)](
                labels, distance, nearest, *found, regions, pixels, size[axis], inner, blocks, *parts[axis],
                LAST=last, BLOCK=PIXELS, num_warps=1,
            )  # fmt: skip
            if not last:
                distance, nearest = found
    return regions
