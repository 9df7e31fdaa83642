"""Given ids: the forest of a target whose instances are drawn by hand.

The ids of a plane are arbitrary int32 numbers, and the pixels of one id need not touch each other. Every head gets as
parent the first head of its id in the plane, which is the first pixel of the instance, since a piece begins there. So
the trees are flat, and `label.label_forest` only numbers them.

A hash of the ids of each plane finds the first heads:

    slots  int64 [planes, capacity]  id · 2^32 + index of a head with that id, EMPTY elsewhere

A slot belongs to the id that came first for good; then the low half only falls, by atomic minima, which commute. Which
slot an id has depends on the order of the programs, what it holds in the end does not. There are more slots than
pixels, so the hash never fills.

Two kernels: `collect` fills the hash and leaves at each head the number of its slot, `point` replaces that by what the
slot holds. No program needs what another one of the same launch writes: all atomics are relaxed.
"""

# Compile-time parameters are annotated tl.constexpr and take Python values; launch options are no parameters.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from . import launch
from .label import empty_parents, label_forest, write_labels
from .tables import EMPTY, hash_of, slots_for
from .words import WORD, any_of, cuts_of, heads_of, image_tile, lowest_bit

NEVER = tl.constexpr(-2)
"""In no slot: a compare-and-swap with this does nothing."""
LOW = tl.constexpr(0xFFFFFFFF)

_RUNTIME = ("width", "row_words", "words", "pixels", "blocks", "capacity")


@triton.jit(do_not_specialize=["rows", "width", "row_words", "row_tiles"])
def pack_ids(ids, masks, heads, rows, width, row_words, row_tiles, ROWS: tl.constexpr):
    """One [ROWS, WORD] tile of one plane, slices one below the other: its mask words and their heads."""
    plane, _, y, column = image_tile(1, row_words, row_tiles, ROWS)
    lane = tl.arange(0, WORD)[None, :]
    x = column * WORD + lane
    offset = plane * rows * width + y * width + x
    number = tl.load(ids + offset, mask=(y < rows) & (x < width), other=0)
    positive = number != 0
    word = tl.sum(positive.to(tl.int32) << lane, axis=1, keep_dims=True)
    words = (plane * rows + y) * row_words + column
    tl.store(masks + words, word, mask=y < rows)
    tl.store(heads + words, heads_of(word) | cuts_of(ids, offset, number, positive, lane), mask=y < rows)


@triton.jit(do_not_specialize=_RUNTIME)
def collect(ids, heads, parents, slots, width, row_words, words, pixels, blocks, capacity, WORDS: tl.constexpr):
    """One mask word per lane: every head enters its id and itself into the hash, and notes the slot.

    The number of a slot is stored as the low 32 bits of it, without a sign.
    """
    program = tl.program_id(0)
    plane = (program // blocks).to(tl.int64)
    ids += plane * pixels
    parents += plane * words * WORD
    slots += plane * capacity
    at = (program % blocks) * WORDS + tl.arange(0, WORDS)
    first_index = at * WORD
    first_pixel = (at // row_words) * width + (at % row_words) * WORD
    pending = tl.load(heads + plane * words + at, mask=at < words, other=0)
    bit = pending & 0
    key = pending.to(tl.int64) & 0
    slot = tl.minimum(at, words - 1).to(tl.int64)  # lanes without a head swap nothing there, each at a place of its own
    busy = pending != 0
    searching = busy & (bit != 0)
    # One slot of one head per lane and turn. Ends: a slot, once taken, keeps its id, and there are more slots than
    # ids, so a search finds its id or a free slot; then the lane takes the next head.
    while any_of(busy):
        fetch = busy & ~searching
        bit = tl.where(fetch, lowest_bit(pending), bit)
        pending = tl.where(fetch, pending & (pending - 1), pending)
        instance = tl.load(ids + first_pixel + bit, mask=fetch, other=0).to(tl.int64)
        key = tl.where(fetch, (instance << 32) | (first_index + bit), key)
        slot = tl.where(fetch, hash_of(instance, capacity), slot)

        old = tl.load(slots + slot, mask=busy, other=EMPTY, cache_modifier=".cg")
        free = busy & (old == EMPTY)
        if any_of(free):
            empty = tl.full([WORDS], EMPTY, tl.int64)
            seen = tl.atomic_cas(slots + slot, tl.where(free, empty, NEVER), key, sem="relaxed")
            old = tl.where(free, tl.where(seen == EMPTY, key, seen), old)
        mine = busy & ((old >> 32) == (key >> 32))
        tl.atomic_min(slots + slot, key, mask=mine & (key < old), sem="relaxed")
        tl.store(parents + first_index + bit, slot.to(tl.int32), mask=mine)
        searching = busy & ~mine
        slot = tl.where(searching, tl.where(slot + 1 == capacity, 0, slot + 1), slot)
        busy = searching | (pending != 0)


@triton.jit(do_not_specialize=_RUNTIME)
def point(heads, parents, slots, words, blocks, capacity, WORDS: tl.constexpr):
    """One mask word per lane: the first head of its id becomes the parent of every head."""
    program = tl.program_id(0)
    plane = (program // blocks).to(tl.int64)
    parents += plane * words * WORD
    slots += plane * capacity
    at = (program % blocks) * WORDS + tl.arange(0, WORDS)
    pending = tl.load(heads + plane * words + at, mask=at < words, other=0)
    # Ends: each turn takes a bit off `pending`.
    while any_of(pending != 0):
        busy = pending != 0
        parent = parents + at * WORD + lowest_bit(pending)
        slot = tl.load(parent, mask=busy, other=0).to(tl.int64) & LOW
        first = tl.load(slots + slot, mask=busy, other=0) & LOW
        tl.store(parent, first.to(tl.int32), mask=busy)
        pending = pending & (pending - 1)


def given_forest(
    step: launch.Step,
    ids: torch.Tensor,
    heads: torch.Tensor,
    parents: torch.Tensor,
    slots: torch.Tensor,
    planes: int,
    size: Sequence[int],
) -> None:
    """Write the parents of all heads of planes of ids.

    Args:
        step: that launches the kernels, of a key that says dtypes and layouts.
        ids: `[planes, *size]` contiguous, int32.
        heads: their words, in which a piece ends where the id changes.
        parents: from `label.empty_parents`; the first `planes` planes are written.
        slots: int64 memory of at least `planes · slots_for(pixels of a plane)`; what it holds is lost.
        planes: how many there are.
        size: (H, W) or (D, H, W).
    """
    pixels = math.prod(size)
    row_words = launch.cdiv(size[-1], launch.WORD)
    words = math.prod(size[:-1]) * row_words
    blocks = launch.cdiv(words, launch.BLOCK_WORDS)
    capacity = slots_for(pixels)
    grid = launch.programs(planes, blocks)
    with torch.cuda.device_of(ids):
        slots[: planes * capacity].fill_(EMPTY.value)
        # One warp per program: loops end for a warp's own pixels, without a barrier.
        step(
            collect, grid,
            ids, heads, parents, slots, size[-1], row_words, words, pixels, blocks, capacity,
            WORDS=launch.BLOCK_WORDS, num_warps=1,
        )  # fmt: skip
        step(point, grid, heads, parents, slots, words, blocks, capacity, WORDS=launch.BLOCK_WORDS, num_warps=1)


def number_ids(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of any value -> 1..K of each plane, in raster order of the first pixel of each; 0 stays 0.

    Args:
        ids: `[planes, *S]`, 2D or 3D, contiguous int32.

    Returns:
        numbers: int32 like `ids`.
        counts: int32 `[planes]`, K of each plane.
    """
    launch.check_device(ids)
    planes, *size = ids.shape
    rows, width = math.prod(size[:-1]), size[-1]
    launch.check_plane(rows, width, ids.shape)
    row_words, row_tiles = launch.cdiv(width, launch.WORD), launch.cdiv(rows, launch.TILE_ROWS)
    masks, heads = (launch.empty(ids, planes, rows * row_words, dtype=torch.int32) for _ in range(2))
    parents = empty_parents(ids, planes, size)
    slots = launch.empty(ids, planes * slots_for(rows * width), dtype=torch.int64)
    step = launch.Step("numbers", ids)
    with torch.cuda.device_of(ids):
        step(
            pack_ids, launch.programs(planes, row_tiles * row_words),
            ids, masks, heads, rows, width, row_words, row_tiles, ROWS=launch.TILE_ROWS, num_warps=1,
        )  # fmt: skip
        given_forest(step, ids, heads, parents, slots, planes, size)
        # No component is looked for: any connectivity will do.
        _, block_counts, _ = label_forest(step, masks, heads, planes, size, 0, parents=parents, first_given=planes)
    return write_labels(step, masks, heads, parents, block_counts, planes, size)
