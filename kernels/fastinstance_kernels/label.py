"""Connected components of binary planes: run-based union-find with minimum-index roots.

Seven kernels, whatever the image holds; all but the first and the last see packed masks only (`words`):

    pack_mask    foreground test: mask words and the heads of the pieces of runs
    initialise   the first link of every head: to a run that it touches in an earlier row (plain stores)
    flatten      pointer jumping: the links become shallow trees
    join         the unions that `initialise` could not express as a link (atomics, few)
    flatten      every head points at its root; roots are numbered within their block and counted
    scan         exclusive sum over the blocks of a plane: where the ids of each block start
    write        pixel -> head -> root -> id

`min_size` adds a pass that measures the components before they are numbered.

The forest `parents`, int32 [planes, 32 · words of a plane], has an entry for every index but holds something only
for the heads, and only those entries are ever read or written. For the head at index i of its plane:

    0 <= p <= i      p, a head, is its parent; p = i makes it a root
    NUMBERED - k     i is a root and number k (1, 2, ...) of its block; k = 0: smaller than min_size

The head of any pixel follows from one word of heads, so the links between pieces are found by bit arithmetic on
the words of two rows, and climbing needs nothing but parents. A piece that continues a run has the piece on its
left as parent.

Why the result is exact and the same on every run:

* Every value ever stored makes a parent <= the head, with equality only at a root. So climbing from a head
  strictly decreases an index >= 0 and ends, however stale the values that it reads, and there are no cycles.
* `initialise` and `join` link only heads of one component, `flatten` only replaces a link by one to an
  ancestor: a tree never leaves its component.
* `join` handles every pair of touching runs that has no link. Its atomic minimum at `high` returns the parent
  `old` found there. If `old == high`, high was a root and now hangs below low. Otherwise another program was
  faster; the minimum may have replaced the link high -> old by high -> low, and the loop goes on with the
  pair (old, low): links and unfinished pairs together always connect what they connected before. When the
  kernel ends no pair is unfinished, all touching runs share a tree, and trees are components.
* The first pixel of a component is a head and has no smaller one to hang below: it is the root, whatever the
  order of the atomics. So ids given to roots in raster order are in raster order of the components' first
  pixels. All sums are of integers.

No kernel needs what another program of the same launch writes, and the kernels of a stream are ordered: all
atomics are relaxed.
"""

# Compile-time parameters are annotated tl.constexpr and take Python values; launch options are no parameters.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import ctypes
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from . import launch
from .words import (
    NUMBERED,
    WORD,
    any_of,
    head_lane,
    heads_of,
    highest_bit,
    image_tile,
    instances_at,
    is_foreground,
    lowest_bit,
)

CONNECTIVITIES = {2: (4, 8), 3: (6, 18, 26)}
"""Numbers of neighbours that exist for each number of spatial dimensions; the last one is the default."""

# Sizes, strides and thresholds are runtime values: one compiled kernel serves all of them.
_RUNTIME = (
    "threshold",
    "depth",
    "height",
    "width",
    "row_words",
    "tiles_y",
    "stride_plane",
    "stride_z",
    "stride_y",
    "stride_x",
    "words",
    "first_plane",
    "blocks",
    "min_size",
)


@triton.jit(do_not_specialize=_RUNTIME)
def pack_mask(
    image, mask, heads, threshold, depth, height, width, row_words, tiles_y,
    stride_plane, stride_z, stride_y, stride_x, THRESHOLD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One tile: mask words and heads of an image with any strides."""
    plane, z, y, column = image_tile(depth, row_words, tiles_y, ROWS)
    lane = tl.arange(0, WORD)[None, :]
    x = column * WORD + lane
    value = tl.load(
        image + plane * stride_plane + (z * stride_z + y * stride_y + x * stride_x),
        mask=(y < height) & (x < width), other=0,
    )  # fmt: skip
    foreground = is_foreground(value, threshold, THRESHOLD) & (y < height) & (x < width)
    word = tl.sum(foreground.to(tl.int32) << lane, axis=1, keep_dims=True)
    at = plane * depth * height * row_words + (z * height + y) * row_words + column
    tl.store(mask + at, word, mask=y < height)
    tl.store(heads + at, heads_of(word), mask=y < height)


@triton.jit
def _row_words(mask, at, column, row_words, inside, DIAGONAL: tl.constexpr):
    """The word at `at`, and the pixels before and after those of the word, each moved to the bit it is next to.

    Also the lane, below 0, of the piece that ends before the word, if there is one. Without DIAGONAL no
    pixels after are wanted.
    """
    straight = tl.load(mask + at, mask=inside, other=0)
    previous = tl.load(mask + at - 1, mask=inside & (column > 0), other=0)
    before = (straight << 1) | (previous >> 31 & 1)
    after = straight & 0
    if DIAGONAL:
        following = tl.load(mask + at + 1, mask=inside & (column < row_words - 1), other=0)
        after = (straight >> 1 & 0x7FFFFFFF) | (following << 31)
    return straight, before, after, highest_bit(heads_of(previous)) - WORD


@triton.jit
def _touching_lane(heads, tail, bit):
    """Lane of the piece that covers `bit` or else the pixel before it; the other arguments are of `_row_words`."""
    lane = head_lane(heads, bit)
    return tl.where(lane < 0, tail, lane)


@triton.jit
def _links_to_row(mask, at, column, row_words, start, inside, DIAGONAL: tl.constexpr):
    """The run starts that touch one earlier row, and what finds the piece there: near pixels, heads, tail."""
    straight, before, after, tail = _row_words(mask, at, column, row_words, inside, DIAGONAL)
    near = straight | before if DIAGONAL else straight
    return start & (near | after), near, heads_of(straight), tail


@triton.jit(do_not_specialize=_RUNTIME)
def initialise(
    mask, parents, first_plane, depth, height, row_words, blocks,
    VOLUME: tl.constexpr, DIAGONAL: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """One mask word per lane: a first parent for every head.

    The start of a run takes as parent a piece that it touches in the row above or, in a volume, in the same
    row of the slice before: links that cost no atomic. `join` knows which links these are.
    """
    program = tl.program_id(0)
    plane = (first_plane + program // blocks).to(tl.int64)
    words = depth * height * row_words
    mask += plane * words
    parents += plane * words * WORD
    at = (program % blocks) * WORDS + tl.arange(0, WORDS)
    row = at // row_words
    column = at % row_words

    inside = at < words
    word = tl.load(mask + at, mask=inside, other=0)
    inside = inside & (word != 0)
    previous = tl.load(mask + at - 1, mask=inside & (column > 0), other=0)
    continues = (word & (previous >> 31)) & 1
    first_index = at * WORD
    tl.store(parents + first_index, first_index - WORD + highest_bit(heads_of(previous)), mask=continues != 0)

    start = heads_of(word) & ~continues
    linked, near, heads, tail = _links_to_row(
        mask, at - row_words, column, row_words, start, inside & (row % height > 0), DIAGONAL
    )
    to_slice = start & 0
    if VOLUME:
        to_slice, slice_near, slice_heads, slice_tail = _links_to_row(
            mask, at - height * row_words, column, row_words, start, inside & (row >= height), DIAGONAL
        )
        to_slice = to_slice & ~linked
        linked = linked | to_slice

    pending = start
    # Ends: each turn takes a bit off `pending`.
    while any_of(pending != 0):
        bit = lowest_bit(pending)
        row_shift = -row_words
        if VOLUME:
            by_slice = (to_slice >> bit & 1) != 0
            row_shift = tl.where(by_slice, -height * row_words, -row_words)
            near_here = tl.where(by_slice, slice_near, near)
            lane = _touching_lane(tl.where(by_slice, slice_heads, heads), tl.where(by_slice, slice_tail, tail), bit)
        else:
            near_here = near
            lane = _touching_lane(heads, tail, bit)
        # A pixel that is touched only by its successor's side is the first of its piece.
        lane = tl.where((near_here >> bit & 1) != 0, lane, bit + 1)
        parent = first_index + tl.where((linked >> bit & 1) != 0, row_shift * WORD + lane, bit)
        tl.store(parents + first_index + bit, parent, mask=pending != 0)
        pending = pending & (pending - 1)


@triton.jit(do_not_specialize=_RUNTIME)
def flatten(
    heads, parents, block_counts, sizes, words, blocks, min_size,
    NUMBER: tl.constexpr, MEASURED: tl.constexpr, CLEAR_SIZES: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """One mask word per lane: make every head point at the root that it has now.

    NUMBER: replace each root by its number within the block of words and store how many the block has; with
    MEASURED only the roots of components of at least `min_size` pixels are numbered. CLEAR_SIZES: set the size
    of each root to 0.
    """
    program = tl.program_id(0)
    plane = (program // blocks).to(tl.int64)
    parents += plane * words * WORD
    sizes += plane * words * WORD
    at = (program % blocks) * WORDS + tl.arange(0, WORDS)
    first_index = at * WORD
    pending = tl.load(heads + plane * words + at, mask=at < words, other=0)
    index = first_index
    node = first_index
    climbing = node != index
    busy = pending != 0
    kept = pending & 0
    found = pending & 0
    # One step of one head per lane and turn. Ends: a step either moves `node` to a strictly smaller index >= 0
    # or is the last of its head; then the lane takes the next one.
    while any_of(busy):
        node = tl.where(climbing, node, first_index + lowest_bit(pending))
        index = tl.where(climbing, index, node)
        pending = tl.where(climbing, pending, pending & (pending - 1))
        parent = tl.load(parents + node, mask=busy, other=0, cache_modifier=".cg")
        climbing = busy & (parent != node) & (parent >= 0)
        # Stored at every step: the lanes that climb over this head take the short cut. Without it the runs of an
        # object form a chain as long as the object is tall.
        tl.store(parents + index, parent, mask=climbing & (node != index), cache_modifier=".cg")
        root = busy & (parent == index)
        if CLEAR_SIZES:
            tl.store(sizes + index, 0, mask=root)
        if MEASURED:
            small = root & (tl.load(sizes + index, mask=root, other=0) < min_size)
            tl.store(parents + index, NUMBERED, mask=small)
            root = root & ~small
        if NUMBER:
            kept = kept | (root.to(tl.int32) << (index % WORD))
            found += root.to(tl.int32)
        node = tl.where(climbing, parent, node)
        busy = climbing | (pending != 0)

    if NUMBER:
        count = 0
        if any_of(kept != 0):
            number = tl.cumsum(found, axis=0) - found
            # Ends: each turn takes a bit off `kept`.
            while any_of(kept != 0):
                number += 1
                tl.store(parents + first_index + lowest_bit(kept), -number + NUMBERED, mask=kept != 0)
                kept = kept & (kept - 1)
            count = tl.sum(found)
        tl.store(block_counts + program, count)


@triton.jit
def _join_row(
    mask, parents, at, column, row_words, word, start, linked, inside, row_shift,
    DIAGONAL: tl.constexpr, LINKED: tl.constexpr,
):  # fmt: skip
    """Unite the runs of one mask word per lane with those that they touch in the row `row_shift` away.

    Each pair of touching runs is met once: where the later run starts, if the other one has begun by then,
    else at the pixel of the later run that sees the other one begin. LINKED: `initialise` has linked those
    starts that touch this row and had no link to a row before (`linked`). Returns the starts linked so far.
    """
    straight, before, after, tail = _row_words(mask, at + row_shift * row_words, column, row_words, inside, DIAGONAL)
    if DIAGONAL:
        at_start = start & (straight | before)
        begins = word & after & ~straight
        if LINKED:
            by_link = start & (straight | before | after) & ~linked
            linked = linked | by_link
            at_start = at_start & ~by_link
            begins = begins & ~(by_link & ~before)
    else:
        at_start = word & straight & (start | ~before)
        begins = at_start & 0
        if LINKED:
            by_link = start & straight & ~linked
            linked = linked | by_link
            at_start = at_start & ~by_link

    heads = heads_of(word)
    other_heads = heads_of(straight)
    first_index = at * WORD
    a = first_index
    b = first_index
    busy = (at_start | begins) != 0
    # One step of one union per lane and turn. Ends: a step either strictly decreases a + b >= 0 (a parent is
    # smaller than its head, a link that came too late goes on with `old` < high) or makes a and b equal;
    # then the lane takes the next of its at most 64 bits.
    while any_of(busy):
        pending = at_start | begins
        fetch = (a == b) & (pending != 0)
        bit = lowest_bit(pending)
        here = (at_start >> bit & 1) != 0
        # A run that begins beside the pixel has its head there.
        lane = tl.where(here, _touching_lane(other_heads, tail, bit), bit + 1)
        a = tl.where(fetch, first_index + head_lane(heads, bit), a)
        b = tl.where(fetch, first_index + row_shift * row_words * WORD + lane, b)
        at_start = tl.where(fetch & here, at_start & (at_start - 1), at_start)
        begins = tl.where(fetch & ~here, begins & (begins - 1), begins)

        a_parent = tl.load(parents + a, mask=busy, other=0, cache_modifier=".cg")
        b_parent = tl.load(parents + b, mask=busy, other=0, cache_modifier=".cg")
        roots = busy & (a_parent == a) & (b_parent == b)
        low = tl.minimum(a, b)
        high = tl.maximum(a, b)
        old = tl.atomic_min(parents + high, low, mask=roots, sem="relaxed")
        a = tl.where(roots, low, tl.where(busy, a_parent, a))
        b = tl.where(roots, tl.where(old == high, low, old), tl.where(busy, b_parent, b))
        busy = (a != b) | ((at_start | begins) != 0)
    return linked


@triton.jit(do_not_specialize=_RUNTIME)
def join(
    mask, parents, first_plane, depth, height, row_words, blocks,
    VOLUME: tl.constexpr, AXIS_DIAGONAL: tl.constexpr, CORNERS: tl.constexpr, CORNER_DIAGONAL: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    """One mask word per lane: the unions that `initialise` left to do, row by row of the earlier neighbours.

    AXIS_DIAGONAL: rows one step away in y or in z are touched diagonally too. CORNERS: rows one step away in
    both y and z are neighbours, touched diagonally with CORNER_DIAGONAL.
    """
    program = tl.program_id(0)
    plane = (first_plane + program // blocks).to(tl.int64)
    words = depth * height * row_words
    mask += plane * words
    parents += plane * words * WORD
    at = (program % blocks) * WORDS + tl.arange(0, WORDS)
    row = at // row_words
    column = at % row_words
    y = row % height

    inside = at < words
    word = tl.load(mask + at, mask=inside, other=0)
    inside = inside & (word != 0)
    previous = tl.load(mask + at - 1, mask=inside & (column > 0), other=0)
    start = word & ~((word << 1) | (previous >> 31 & 1))
    linked = word & 0
    linked = _join_row(
        mask, parents, at, column, row_words, word, start, linked, inside & (y > 0), -1, AXIS_DIAGONAL, True
    )
    if VOLUME:
        behind = inside & (row >= height)
        linked = _join_row(
            mask, parents, at, column, row_words, word, start, linked, behind, -height, AXIS_DIAGONAL, True
        )
        if CORNERS:
            above = behind & (y > 0)
            below = behind & (y < height - 1)
            _join_row(
                mask, parents, at, column, row_words, word, start, linked, above, -height - 1, CORNER_DIAGONAL, False
            )
            _join_row(
                mask, parents, at, column, row_words, word, start, linked, below, 1 - height, CORNER_DIAGONAL, False
            )


@triton.jit(do_not_specialize=_RUNTIME)
def measure(mask, heads, parents, sizes, words, blocks, WORDS: tl.constexpr):
    """One mask word per lane: add the length of every piece to the size of its root.

    The forest is flat, and the sizes of its roots start at 0.
    """
    program = tl.program_id(0)
    plane = (program // blocks).to(tl.int64)
    parents += plane * words * WORD
    sizes += plane * words * WORD
    at = (program % blocks) * WORDS + tl.arange(0, WORDS)
    pending = tl.load(heads + plane * words + at, mask=at < words, other=0)
    background = ~tl.load(mask + plane * words + at, mask=at < words, other=0)
    # Ends: each turn takes a bit off `pending`.
    while any_of(pending != 0):
        bit = lowest_bit(pending)
        root = tl.load(parents + at * WORD + bit, mask=pending != 0, other=0)
        after = (pending | background) & (-2 << bit)
        length = tl.where(after != 0, lowest_bit(after), WORD) - bit
        tl.atomic_add(sizes + root, length, mask=pending != 0, sem="relaxed")
        pending = pending & (pending - 1)


@triton.jit
def start_blocks(block_counts, block_starts, blocks, BLOCK: tl.constexpr):
    """Store the ids given out before each block of a plane, and return how many there are in all."""
    total = 0
    first = 0
    # Ends: `first` grows by BLOCK. (Not `range`: with NumPy 2.4, Triton 3.6's interpreter cannot take its bound.)
    while first < blocks:
        block = first + tl.arange(0, BLOCK)
        count = tl.load(block_counts + block, mask=block < blocks, other=0)
        tl.store(block_starts + block, total + tl.cumsum(count, axis=0) - count, mask=block < blocks)
        total += tl.sum(count, axis=0)
        first += BLOCK
    return total


@triton.jit(do_not_specialize=_RUNTIME)
def scan(block_counts, block_starts, counts, blocks, BLOCK: tl.constexpr):
    """One plane: ids given out before each of its blocks, and the number of its components."""
    plane = tl.program_id(0)
    start = plane.to(tl.int64) * blocks
    tl.store(counts + plane, start_blocks(block_counts + start, block_starts + start, blocks, BLOCK))


@triton.jit(do_not_specialize=_RUNTIME)
def write(
    mask, heads, parents, block_starts, labels, height, width, row_words, tiles_y, blocks, ROWS: tl.constexpr
):  # fmt: skip
    """One tile of the label images, slices one below the other: pixel -> head -> root -> number -> id."""
    plane, _, y, column = image_tile(1, row_words, tiles_y, ROWS)
    words = height * row_words
    lane = tl.arange(0, WORD)[None, :]
    x = column * WORD + lane
    at = y * row_words + column
    word = tl.load(mask + plane * words + at, mask=y < height, other=0)
    label = tl.zeros([ROWS, WORD], tl.int32)
    if any_of(word != 0):
        head = tl.load(heads + plane * words + at, mask=y < height, other=0)
        label = instances_at(word, head, at, lane, parents + plane * words * WORD, block_starts + plane * blocks)
    tl.store(labels + plane * height * width + (y * width + x), label, mask=(y < height) & (x < width))


# One warp per program: loops end, and branches are taken, for a warp's own pixels, without a barrier.
_ONE_WARP = {"num_warps": 1}


def _empty(x: torch.Tensor, *shape: int) -> torch.Tensor:
    return launch.empty(x, *shape, dtype=torch.int32)


def empty_parents(mask: torch.Tensor, planes: int, size: Sequence[int]) -> torch.Tensor:
    """Memory for the forests of `planes` planes of `size`, on the device of their masks."""
    return _empty(mask, planes, math.prod(size[:-1]) * launch.cdiv(size[-1], launch.WORD) * launch.WORD)


def label_forest(
    step: launch.Step,
    mask: torch.Tensor,
    heads: torch.Tensor,
    planes: int,
    size: Sequence[int],
    connectivity: int,
    *,
    parents: torch.Tensor | None = None,
    first_given: int = 0,
    min_size: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Find and number the components of packed masks, in 4 launches (6 where `min_size` drops any).

    Args:
        step: that launches them, of a key that says all of this.
        mask: int32, the words of `planes` planes, contiguous.
        heads: the words of their heads; `words.heads_of` those of `mask`, except for given planes.
        planes: how many there are.
        size: (H, W) or (D, H, W).
        connectivity: one of CONNECTIVITIES.
        parents: from `empty_parents`, in which the first `first_given` planes have a parent at each head.
        first_given: planes whose components are given and only numbered: the parent of each of their heads is a
            head of the same component with an index not greater than its own, equal at the component's first pixel.
        min_size: components of fewer pixels get no number.

    Returns:
        parents: the numbered forest, int32 [planes, 32 · words of a plane].
        block_counts: int32 [planes, blocks], components whose first pixel lies in each block.
        blocks: how many blocks of `launch.BLOCK_WORDS` words a plane has.
    """
    volume = len(size) == 3
    depth, height, width = size if volume else (1, *size)
    row_words = launch.cdiv(width, launch.WORD)
    words = depth * height * row_words
    blocks = launch.cdiv(words, launch.BLOCK_WORDS)
    grid = launch.programs(planes, blocks)
    found_grid = launch.programs(planes - first_given, blocks)
    if parents is None:
        parents = empty_parents(mask, planes, size)
    block_counts = _empty(mask, planes, blocks)
    sizes = empty_parents(mask, planes, size) if min_size > 1 else parents
    diagonal = connectivity in (8, 18, 26)

    def flatten_blocks(*, number: bool) -> None:
        measured = min_size > 1
        step(
            flatten, grid,
            heads, parents, block_counts, sizes, words, blocks, min(min_size, words * launch.WORD + 1),
            NUMBER=number, MEASURED=number and measured, CLEAR_SIZES=measured and not number,
            WORDS=launch.BLOCK_WORDS, **_ONE_WARP,
        )  # fmt: skip

    with torch.cuda.device_of(mask):
        if first_given < planes:
            step(
                initialise, found_grid,
                mask, parents, first_given, depth, height, row_words, blocks,
                VOLUME=volume, DIAGONAL=diagonal, WORDS=launch.BLOCK_WORDS, **_ONE_WARP,
            )  # fmt: skip
            flatten_blocks(number=False)
            step(
                join, found_grid,
                mask, parents, first_given, depth, height, row_words, blocks,
                VOLUME=volume, AXIS_DIAGONAL=diagonal, CORNERS=connectivity in (18, 26),
                CORNER_DIAGONAL=connectivity == 26, WORDS=launch.BLOCK_WORDS, **_ONE_WARP,
            )  # fmt: skip
        if min_size > 1:
            flatten_blocks(number=False)
            step(measure, grid, mask, heads, parents, sizes, words, blocks, WORDS=launch.BLOCK_WORDS, **_ONE_WARP)
        flatten_blocks(number=True)
    return parents, block_counts, block_counts.shape[1]


def write_labels(
    step: launch.Step,
    mask: torch.Tensor,
    heads: torch.Tensor,
    parents: torch.Tensor,
    block_counts: torch.Tensor,
    planes: int,
    size: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The image of labels of a forest from `label_forest`, int32 [planes, *size], and how many each plane has."""
    rows, width = math.prod(size[:-1]), size[-1]
    row_words, row_tiles = launch.cdiv(width, launch.WORD), launch.cdiv(rows, launch.TILE_ROWS)
    blocks = block_counts.shape[1]
    labels, counts, block_starts = _empty(mask, planes, *size), _empty(mask, planes), _empty(mask, planes, blocks)
    with torch.cuda.device_of(mask):
        step(
            scan, (planes,),
            block_counts, block_starts, counts, blocks, BLOCK=launch.SCAN_BLOCK, num_warps=launch.SCAN_WARPS,
        )  # fmt: skip
        step(
            write, launch.programs(planes, row_tiles * row_words),
            mask, heads, parents, block_starts, labels, rows, width, row_words, row_tiles, blocks,
            ROWS=launch.TILE_ROWS, **_ONE_WARP,
        )  # fmt: skip
    return labels, counts


def label_planes(
    x: torch.Tensor, *, threshold: float | None = None, connectivity: int | None = None, min_size: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Label the connected components of every plane of `x`.

    Args:
        x: [planes, H, W] or [planes, D, H, W], any strides. Foreground of a bool or integer tensor: not 0; of
            a floating one: `x >= threshold`, compared in float64 for float64 and in float32 otherwise, or,
            without a threshold, not 0. NaN is background.
        threshold: for floating `x` only.
        connectivity: 4 or 8 in 2D, 6, 18 or 26 in 3D; default 8 or 26.
        min_size: components of fewer pixels become background and get no id.

    Returns:
        labels: int32, the shape of `x`, contiguous: 0 background, ids 1..K of each plane in raster order of
            the components' first pixels.
        counts: int32 [planes], K of each plane.

    Raises:
        ValueError: rank, connectivity, threshold or min_size out of range, no CUDA tensor, a plane of more
            than 2^31 - 4096 pixels, rows rounded up to multiples of 32, more than 2^31 - 1 tiles in all.
        TypeError: `x` is complex or a float type narrower than 16 bits.
    """
    launch.check_device(x)
    dims = x.ndim - 1
    if dims not in CONNECTIVITIES:
        raise ValueError(f"expected x [planes, H, W] or [planes, D, H, W], got shape {tuple(x.shape)}")
    if connectivity is None:
        connectivity = CONNECTIVITIES[dims][-1]
    if connectivity not in CONNECTIVITIES[dims]:
        known = CONNECTIVITIES[dims]
        raise ValueError(f"expected connectivity in {known} for {dims}D planes, got {connectivity}")
    if min_size < 0:
        raise ValueError(f"expected min_size >= 0, got {min_size}")
    if x.is_complex() or (x.is_floating_point() and x.element_size() < 2):
        raise TypeError(f"expected bool, integers, float16, bfloat16, float32 or float64, got {x.dtype}")
    if threshold is not None and not x.is_floating_point():
        raise ValueError(f"expected threshold=None for x of {x.dtype} (foreground is not 0), got {threshold}")
    if x.dtype == torch.bool:
        x = x.view(torch.uint8)
    elif x.dtype == torch.float64 and threshold is not None:
        # Triton passes Python floats in float32: compare before, at the price of one more launch.
        x, threshold = torch.ge(x.detach(), threshold).view(torch.uint8), None

    planes, *size = x.shape
    if x.numel() == 0:
        return _empty(x, *x.shape), torch.zeros(planes, dtype=torch.int32, device=x.device)
    volume = dims == 3
    depth, height, width = size if volume else (1, *size)
    row_words = launch.cdiv(width, launch.WORD)
    rows = depth * height
    words = rows * row_words
    launch.check_plane(rows, width, x.shape)
    extents = ((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
    if sum(extents) >= 2**31:
        x = x.contiguous()  # offsets inside a plane are int32
    stride_plane, *stride_slice, stride_y, stride_x = x.stride()
    slice_tiles = launch.cdiv(height, launch.TILE_ROWS)
    pack_grid = launch.programs(planes, depth * slice_tiles * row_words)

    mask = _empty(x, planes, words)
    heads = _empty(x, planes, words)
    step = launch.Step("label", x, threshold is None, connectivity, min_size > 1)
    with torch.cuda.device_of(x):
        step(
            pack_mask, pack_grid, x, mask, heads, 0.0 if threshold is None else ctypes.c_float(threshold).value,
            depth, height, width, row_words, slice_tiles,
            stride_plane, stride_slice[0] if volume else 0, stride_y, stride_x,
            THRESHOLD=threshold is not None, ROWS=launch.TILE_ROWS, **_ONE_WARP,
        )  # fmt: skip
        parents, block_counts, _ = label_forest(step, mask, heads, planes, size, connectivity, min_size=min_size)
    return write_labels(step, mask, heads, parents, block_counts, planes, size)
