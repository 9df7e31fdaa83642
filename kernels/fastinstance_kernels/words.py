"""Packed masks: the vocabulary that the kernels share.

A row of W pixels is RW = ceil(W / 32) int32 words, bit x % 32 of word x // 32 for pixel x. A plane has D·H·RW words,
one row after the other. The *index* of a pixel inside its plane is 32 · word + lane, so that rows begin at multiples of
32 and neither the row nor the block of a pixel costs a division; there are 32 · D·H·RW indices, of which those beyond
the end of a row belong to no pixel. Indices are in raster order.

A plane has two images of words: `mask`, its foreground, and `heads`, which marks the first pixel of every *piece*: a
run of foreground, cut at each multiple of 32 and, where ids are given, at each change of the id. Pieces are what the
labelling kernels link and number; what they know about a pixel, they know about the head of its piece.
"""

# Compile-time parameters are annotated tl.constexpr and take Python values.
# pyright: reportArgumentType=false

import triton
import triton.language as tl

from . import launch

WORD = tl.constexpr(launch.WORD)
BLOCK_WORDS = tl.constexpr(launch.BLOCK_WORDS)
NUMBERED = tl.constexpr(-1)
"""The parent of a root that has number k in its block is NUMBERED - k: below 0."""


@triton.jit
def any_of(mask):
    return tl.max(mask.to(tl.int32)) > 0


@triton.jit
def image_tile(depth, row_words, tiles_y, ROWS: tl.constexpr):
    """The tile of an image that this program handles, one word wide: plane, slice, rows [ROWS, 1], column of words."""
    tile = tl.program_id(0)
    column = tile % row_words
    tile = tile // row_words
    y = (tile % tiles_y) * ROWS + tl.arange(0, ROWS)[:, None]
    tile = tile // tiles_y
    return (tile // depth).to(tl.int64), tile % depth, y, column


@triton.jit
def is_foreground(value, threshold, THRESHOLD: tl.constexpr):
    """Foreground test; false for NaN. Half types are widened first."""
    if THRESHOLD:
        return value.to(tl.float32) >= threshold
    elif value.dtype.is_floating():
        wide = value if value.dtype == tl.float64 else value.to(tl.float32)
        return (wide > 0) | (wide < 0)
    else:
        return value != 0


@triton.jit
def heads_of(mask):
    """Heads of the pieces in a mask word. (Given ids: `|` the pixels whose id is not that of the pixel before.)"""
    return mask & ~(mask << 1)


@triton.jit
def cuts_of(ids, offset, number, positive, lane):
    """Words of the pixels whose id, `number`, is not that of the pixel before: the heads that given ids add."""
    seen = positive & (lane > 0)
    left = tl.load(ids + offset - 1, mask=seen, other=0)
    return tl.sum((seen & (left != number)).to(tl.int32) << lane, axis=1, keep_dims=True)


@triton.jit
def highest_bit(word):
    """Index of the highest set bit of an int32, bit 31 included; below 0 if there is none.

    The exponent of the word as a float. Clearing each bit below a set one keeps the highest and prevents the
    conversion from rounding up to the next power of two.
    """
    word = word.to(tl.uint32, bitcast=True)
    power = (word ^ (word & (word >> 1))).to(tl.float32)
    return (power.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def lowest_bit(word):
    """Index of the lowest set bit of an int32, bit 31 included (its float is -2^31: drop the sign).

    0 gives some index in range, so that a lane that has no bit left may go on calculating.
    """
    power = (word & -word).to(tl.float32)
    return ((power.to(tl.int32, bitcast=True) >> 23) + 1) & 31


@triton.jit
def head_lane(heads, lane):
    """Lane of the last head at or before `lane`; below 0 if there is none."""
    return highest_bit(heads & ((2 << lane) - 1))


@triton.jit
def head_index(heads, lane, index):
    """Index of the head of the foreground pixel at `index`, which is lane `lane` of the word `heads`.

    For a pixel of the background the result means nothing, and may be out of range.
    """
    return index - lane + head_lane(heads, lane)


@triton.jit
def block_of(index):
    """Number of the block, BLOCK_WORDS consecutive words of a plane, that holds a pixel."""
    return index // (BLOCK_WORDS * WORD)


@triton.jit
def instance_of(parents, block_starts, head, mask):
    """Id, from 1 on, of the component with this head in a forest that is numbered.

    `parents` and `block_starts` point at those of the plane. 0 where `mask` is false or the component was dropped.
    """
    value = tl.load(parents + head, mask=mask, other=NUMBERED)
    below_root = value >= 0
    root = tl.where(below_root, value, head)
    value = tl.where(below_root, tl.load(parents + root, mask=below_root, other=NUMBERED), value)
    number = -value + NUMBERED
    start = tl.load(block_starts + block_of(root), mask=number > 0, other=0)
    return start + number


@triton.jit
def instances_at(mask, heads, at, lane, parents, block_starts):
    """Ids of the pixels of some mask words, 0 for background: `instance_of` for the words `at` of a plane."""
    head = head_index(heads, lane, at * WORD + lane)
    return instance_of(parents, block_starts, head, (mask >> lane & 1) != 0)
