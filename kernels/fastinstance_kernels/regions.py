"""Voronoi regions: the nearest labelled pixel of every pixel, exactly, one axis after the other.

The nearest pixel of an image is the nearest among those that are nearest within their own lines along the axis that
was worked on before: so a pass along each axis finds it, and nothing is approximated. (Jump flooding would take more
passes, and a repair.) What is kept of a pixel is its best candidate so far:

    distance  float32 or float64 [planes, pixels]  squared, infinite where there is none
    label     like the labels [planes, pixels]     of the candidate, 0 where there is none

The last axis comes first. So of two candidates on a line the one with the lower place is the first in raster order,
which wins if they are equally near. Squared distances are integers when all axes have the same spacing, exact in
float32 up to 2^24 and in float64 beyond.

Rows are packed into words, whose bits say what is nearest. Along the other axes a program goes over its lines, one for
each lane, and finds their *envelope*: the candidates that are the best of some pixel. Of two candidates the earlier is
the better one up to a certain place, the later from there on; so each candidate in turn takes those from a stack that
it beats where their stretch starts. Every candidate comes once and goes once at most: the work is linear, whatever the
image holds.
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
from .words import WORD, any_of, head_lane, lowest_bit

NOWHERE = tl.constexpr(2**31 - 1)
LINES = 32
STEPS = 8
"""Pixels of a line that are loaded together: one wait instead of eight."""
EXACT_IN_FLOAT32 = 2**24


@triton.jit
def _size(distance, spacing, spacing_rest):
    """The size of a pixel along an axis, which comes in two parts, in the type that `distance` points at."""
    return tl.zeros([], distance.dtype.element_ty) + spacing + spacing_rest


@triton.jit
def _squared(offset, size):
    apart = offset.to(size.dtype) * size
    return apart * apart


@triton.jit(do_not_specialize=["rows", "width", "blocks", "spacing", "spacing_rest"])
def along_rows(labels, distance, label, rows, width, blocks, spacing, spacing_rest, ROWS: tl.constexpr):
    """A block of rows of a plane: the last labelled pixel up to each, from the left; then the next one, from the right.

    The place of the former waits in `distance` for the latter.
    """
    program = tl.program_id(0)
    plane = (program // blocks).to(tl.int64) * rows * width
    labels += plane  # indices inside of a plane have 32 bits
    distance += plane
    label += plane
    row = (program % blocks) * ROWS + tl.arange(0, ROWS)[:, None]
    first = row * width
    lane = tl.arange(0, WORD)[None, :]
    size = _size(distance, spacing, spacing_rest)
    last = tl.full([ROWS, 1], -1, tl.int32)
    left = tl.full([], 0, tl.int32)
    while left < width:
        x = left + lane
        inside = (row < rows) & (x < width)
        labelled = tl.load(labels + first + x, mask=inside, other=0) != 0
        word = tl.sum(labelled.to(tl.int32) << lane, axis=1, keep_dims=True)
        before = head_lane(word, lane)
        before = tl.where(before >= 0, left + before, last)
        tl.store(distance + first + x, before.to(size.dtype), mask=inside)
        last = tl.max(before, axis=1, keep_dims=True)
        left += WORD
    following = tl.full([ROWS, 1], NOWHERE, tl.int32)
    while left > 0:
        left -= WORD
        x = left + lane
        inside = (row < rows) & (x < width)
        before = tl.load(distance + first + x, mask=inside, other=-1).to(tl.int32)
        word = tl.sum((before == x).to(tl.int32) << lane, axis=1, keep_dims=True) & -(1 << lane)
        after = tl.where(word != 0, left + lowest_bit(word), following)
        following = tl.min(after, axis=1, keep_dims=True)
        nearest = tl.where((before < 0) | (after - x < x - before), after, before)
        somewhere = inside & (nearest != NOWHERE)
        apart = tl.where(somewhere, _squared(nearest - x, size), float("inf"))
        tl.store(distance + first + x, apart, mask=inside)
        tl.store(label + first + x, tl.load(labels + first + nearest, mask=somewhere, other=0), mask=inside)


@triton.jit(do_not_specialize=["lines", "length", "inner", "blocks", "spacing", "spacing_rest"])
def along_axis(
    distance, label, below, start, out_distance, out_label, lines, length, inner, blocks, spacing, spacing_rest,
    BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """A block of lines along another axis than the last: their envelopes, then the best candidate of each pixel.

    The stack's entry for the candidate at a place lies at that place: `below`, the place of the candidate under it,
    and `start`, the first place where it is the better one, both in the type of the distances. The last pass has no
    `out_distance`.
    """
    program = tl.program_id(0)
    line = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = line < lines
    first = (program // blocks).to(tl.int64) * lines * length + line // inner * length * inner + line % inner
    step = tl.arange(0, STEPS)[:, None]
    size = _size(distance, spacing, spacing_rest)
    real = size.dtype
    slope = 0.5 / (size * size)
    last = (length - 1).to(real)

    # The top of the stack; if that is empty, a distance that nothing beats.
    top = tl.full([BLOCK], -1, real)
    top_below = top
    top_start = tl.zeros([BLOCK], real)
    top_distance = tl.full([BLOCK], float("-inf"), real)
    to_beat = top_distance  # distance of the pixel at `top_start`
    begin = tl.full([], 0, tl.int32)
    while begin < length:
        place = begin + step
        there = inside[None, :] & (place < length)
        ahead = tl.load(distance + first[None, :] + place * inner, mask=there, other=float("inf"))
        for k in range(STEPS):
            new = tl.sum(tl.where(step == k, ahead, 0.0), axis=0)
            if any_of(new < float("inf")):
                here = (begin + k).to(real)
                beaten = new + _squared(here - top_start, size) < to_beat
                while any_of(beaten):
                    top = tl.where(beaten, top_below, top)
                    at = first + top.to(tl.int32) * inner
                    held = beaten & (top >= 0)
                    top_below = tl.where(beaten, tl.load(below + at, mask=held, other=-1), top_below)
                    top_start = tl.where(beaten, tl.load(start + at, mask=held, other=0), top_start)
                    under = tl.load(distance + at, mask=held, other=float("-inf"))
                    top_distance = tl.where(beaten, under, top_distance)
                    to_beat = top_distance + _squared(top - top_start, size)
                    beaten &= new + _squared(here - top_start, size) < to_beat
                # Where both are equally far, rounded to a place: the new one is better from there or the next one on.
                middle = (here + top) * 0.5 + (new - top_distance) * slope / (here - top)
                meet = tl.minimum(tl.maximum(tl.floor(middle + 0.5), top_start), last)
                better = new + _squared(here - meet, size) < top_distance + _squared(top - meet, size)
                begins = tl.where(top < 0, 0.0, tl.where(better, meet, meet + 1.0))
                pushed = (new < float("inf")) & (begins <= last)
                at = first + (begin + k) * inner
                tl.store(below + at, top, mask=pushed)
                tl.store(start + at, begins, mask=pushed)
                top_below = tl.where(pushed, top, top_below)
                top_start = tl.where(pushed, begins, top_start)
                top_distance = tl.where(pushed, new, top_distance)
                top = tl.where(pushed, here, top)
                to_beat = top_distance + _squared(top - top_start, size)
        begin += STEPS

    while begin > 0:
        begin -= STEPS
        best = tl.full([STEPS, BLOCK], -1, real)
        for k in range(STEPS):
            best = tl.where(step == STEPS - 1 - k, top[None, :], best)
            ends = (top_start == (begin + STEPS - 1 - k).to(real)) & (top >= 0)
            top = tl.where(ends, top_below, top)
            at = first + top.to(tl.int32) * inner
            held = ends & (top >= 0)
            top_start = tl.where(ends, tl.load(start + at, mask=held, other=0), top_start)
            top_below = tl.where(ends, tl.load(below + at, mask=held, other=-1), top_below)
        place = begin + step
        there = inside[None, :] & (place < length)
        somewhere = there & (best >= 0)
        at = first[None, :] + best.to(tl.int32) * inner
        here = first[None, :] + place * inner
        tl.store(out_label + here, tl.load(label + at, mask=somewhere, other=0), mask=there)
        if out_distance is not None:
            apart = tl.load(distance + at, mask=somewhere, other=float("inf")) + _squared(best - place.to(real), size)
            tl.store(out_distance + here, apart, mask=there)


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
        return launch.empty(labels, *labels.shape, dtype=dtype)

    distance, label = empty(real), empty(labels.dtype)
    below, start = empty(real), empty(real)
    parts = [(high := ctypes.c_float(scale).value, scale - high) for scale in spacing]
    rows, width = pixels // size[-1], size[-1]
    step = launch.Step("regions", labels, real)
    with torch.cuda.device_of(labels):
        blocks = launch.cdiv(rows, launch.TILE_ROWS)
        step(
            along_rows, launch.programs(planes, blocks),
            labels, distance, label, rows, width, blocks, *parts[-1], ROWS=launch.TILE_ROWS, num_warps=1,
        )  # fmt: skip
        inner = width
        for axis in reversed(range(len(size) - 1)):
            lines = pixels // size[axis]
            blocks = launch.cdiv(lines, LINES)
            found = empty(real) if axis else None, empty(labels.dtype)
            step(
                along_axis, launch.programs(planes, blocks),
                distance, label, below, start, *found, lines, size[axis], inner, blocks, *parts[axis],
                BLOCK=LINES, STEPS=STEPS, num_warps=1,
            )  # fmt: skip
            distance, label = found
            inner *= size[axis]
    return label
