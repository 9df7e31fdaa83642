"""Connected components of binary planes: run-based union-find with minimum-index roots.

Six kernels, whatever the image holds:

    initialise   foreground test, runs, and the links of the runs to the rows before them (plain stores)
    flatten      pointer jumping: the links become shallow trees
    join         the unions that `initialise` could not express as a link (atomics, few)
    flatten      every run points at its root; roots are numbered within their block and counted
    scan         exclusive sum over the blocks of a plane: where the ids of each block start
    write        run -> root -> id

`min_size` adds a pass that measures the components before they are numbered.

The forest `parents`, int32 [planes, P], P pixels in a plane, holds for pixel i of its plane:

    BACKGROUND = -1          i is background
    -1 - d, 0 < d < WORD     i lies d pixels after the first pixel (the *head*) of its piece of a run
    0 <= p <= i              i is a head and p is its parent; p = i makes it a root
    NUMBERED - k             i is a root and number k (1, 2, ...) of its block; k = 0: smaller than min_size

A run is a maximal row segment of foreground. Its pieces are its cuts at multiples of WORD, so that a piece is
found with one mask word; a piece that continues a run has the pixel on its left as parent. Heads are told by
their value alone, without the pixel's position in its row, which spares later passes a division per pixel.

Why the result is exact and the same on every run:

* Every value ever stored makes a parent <= the pixel, with equality only at a root. So climbing from a pixel
  strictly decreases an index >= 0 and ends, however stale the values that it reads, and there are no cycles.
* `initialise` and `join` link only pixels of one component, `flatten` only replaces a link by one to an
  ancestor: a tree never leaves its component.
* `join` handles every pair of touching runs that has no link. Its atomic minimum at `high` returns the parent
  `old` found there. If `old == high`, high was a root and now hangs below low. Otherwise another program was
  faster; the minimum may have replaced the link high -> old by high -> low, and the loop goes on with the
  pair (old, low): links and unfinished pairs together always connect what they connected before. When the
  kernel ends no pair is unfinished, all touching runs share a tree, and trees are components.
* The smallest pixel of a component has no smaller pixel to hang below: it is the root, whatever the order of
  the atomics. So ids given to roots in raster order are in raster order of the components' first pixels. All
  sums are of integers.

No kernel needs what another program of the same launch writes, and the kernels of a stream are ordered: all
atomics are relaxed.
"""

# Compile-time parameters are annotated tl.constexpr and take Python values; launch options are no parameters.
# pyright: reportArgumentType=false, reportCallIssue=false

import ctypes

import torch
import triton
import triton.language as tl

from . import launch

WORD = tl.constexpr(launch.WORD)
BACKGROUND = tl.constexpr(-1)
NUMBERED = tl.constexpr(-launch.WORD - 1)

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
    "pixels",
    "blocks",
    "min_size",
)


@triton.jit
def _is_foreground(value, threshold, THRESHOLD: tl.constexpr):
    """Foreground test; false for NaN. Half types are widened first."""
    if THRESHOLD:
        return value.to(tl.float32) >= threshold
    elif value.dtype.is_floating():
        wide = value if value.dtype == tl.float64 else value.to(tl.float32)
        return (wide > 0) | (wide < 0)
    else:
        return value != 0


@triton.jit
def _highest_bit(word):
    """Index of the highest set bit of a non-negative int32; -1 for 0.

    The exponent of the word as a float. Clearing each bit below a set one keeps the highest and prevents the
    conversion from rounding up to the next power of two.
    """
    power = (word & ~(word >> 1)).to(tl.float32)
    return tl.maximum((power.to(tl.int32, bitcast=True) >> 23) - 127, -1)


@triton.jit
def _lowest_bit(word):
    """Index of the lowest set bit of an int32, bit 31 included (its float is -2^31: drop the sign).

    0 gives some index in range, so that a lane that has no bit left may go on calculating.
    """
    power = (word & -word).to(tl.float32)
    return ((power.to(tl.int32, bitcast=True) >> 23) + 1) & 31


@triton.jit
def _parent(index, value):
    """Parent of a foreground pixel that holds `value` (not yet NUMBERED)."""
    return tl.where(value >= 0, value, index + value + 1)


@triton.jit
def _any(mask):
    return tl.max(mask.to(tl.int32), axis=0) > 0


@triton.jit
def _link_to_row(
    parent, linked, image, offset, x, index, width, pixel_shift, inside, stride_x, threshold,
    THRESHOLD: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Link the run starts that are not linked yet to the first pixel they touch in one earlier row.

    `offset` points at the pixel of that row with the same x, `pixel_shift` is its index minus the start's.
    """
    wanted = inside & ~linked
    straight = wanted & _is_foreground(tl.load(image + offset, mask=wanted, other=0), threshold, THRESHOLD)
    parent = tl.where(straight, index + pixel_shift, parent)
    linked = linked | straight
    if DIAGONAL:
        wanted = inside & ~linked & (x > 0)
        before = tl.load(image + offset - stride_x, mask=wanted, other=0)
        before = wanted & _is_foreground(before, threshold, THRESHOLD)
        parent = tl.where(before, index + pixel_shift - 1, parent)
        linked = linked | before
        wanted = inside & ~linked & (x < width - 1)
        after = tl.load(image + offset + stride_x, mask=wanted, other=0)
        after = wanted & _is_foreground(after, threshold, THRESHOLD)
        parent = tl.where(after, index + pixel_shift + 1, parent)
        linked = linked | after
    return parent, linked


@triton.jit(do_not_specialize=_RUNTIME)
def initialise(
    image, parents, words, threshold, depth, height, width, row_words, tiles_y,
    stride_plane, stride_z, stride_y, stride_x,
    THRESHOLD: tl.constexpr, VOLUME: tl.constexpr, DIAGONAL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One [ROWS, WORD] tile of one slice: mask words, piece heads, and a first parent for every head.

    The start of a run takes as parent a pixel that it touches in the row above or, in a volume, in the same
    row of the slice before: links that cost no atomic. `join` knows which links these are.
    """
    tile = tl.program_id(0)
    column = tile % row_words
    tile = tile // row_words
    tile_y = tile % tiles_y
    tile = tile // tiles_y
    z = tile % depth
    plane = (tile // depth).to(tl.int64)

    y = tile_y * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, WORD)[None, :]
    x = column * WORD + lane
    inside = (y < height) & (x < width)
    image += plane * stride_plane
    parents += plane * depth * height * width
    words += plane * depth * height * row_words
    offset = z * stride_z + y * stride_y + x * stride_x
    index = (z * height + y) * width + x

    foreground = tl.load(image + offset, mask=inside, other=0)
    foreground = inside & _is_foreground(foreground, threshold, THRESHOLD)
    word = tl.sum(foreground.to(tl.int32) << lane, axis=1, keep_dims=True)
    tl.store(words + (z * height + y) * row_words + column, word, mask=y < height)

    value = tl.full([ROWS, WORD], BACKGROUND, tl.int32)
    if tl.max(foreground.to(tl.int32)) > 0:
        # The piece of a lane begins after the last background lane before it.
        head_lane = _highest_bit(~word & ((1 << lane) - 1)) + 1
        head = foreground & (head_lane == lane)

        continues = head & (lane == 0) & (x > 0)
        left = tl.load(image + offset - stride_x, mask=continues, other=0)
        continues = continues & _is_foreground(left, threshold, THRESHOLD)
        start = head & ~continues

        parent = tl.where(continues, index - 1, index)
        linked = ~start
        parent, linked = _link_to_row(
            parent, linked, image, offset - stride_y, x, index, width, -width, start & (y > 0), stride_x,
            threshold, THRESHOLD, DIAGONAL,
        )  # fmt: skip
        if VOLUME:
            parent, linked = _link_to_row(
                parent, linked, image, offset - stride_z, x, index, width, -height * width, start & (z > 0),
                stride_x, threshold, THRESHOLD, DIAGONAL,
            )  # fmt: skip
        value = tl.where(foreground, tl.where(head, parent, head_lane - lane - 1), BACKGROUND)
    tl.store(parents + index, value, mask=inside)


@triton.jit(do_not_specialize=_RUNTIME)
def flatten(
    parents, block_counts, sizes, pixels, blocks, min_size,
    NUMBER: tl.constexpr, MEASURED: tl.constexpr, CLEAR_SIZES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one plane: make every head point at the root that it has now.

    NUMBER: replace each root by its number within the block and store how many the block has; with MEASURED
    only the roots of components of at least `min_size` pixels are numbered. CLEAR_SIZES: set the size of each
    root to 0.
    """
    program = tl.program_id(0)
    plane = (program // blocks).to(tl.int64)
    parents += plane * pixels
    index = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = index < pixels

    parent = tl.load(parents + index, mask=inside, other=BACKGROUND)
    head = parent >= 0
    climbing = head & (parent != index)
    # Ends: each turn, a lane that climbs moves its `parent` to a strictly smaller index >= 0, or stops.
    while _any(climbing):
        above = tl.load(parents + parent, mask=climbing, other=0, cache_modifier=".cg")
        climbing = climbing & (above != parent) & (above >= NUMBERED + 1)
        parent = tl.where(climbing, _parent(parent, above), parent)
        # Stored at every step: the lanes that climb over this head take the short cut. Without it the runs of
        # an object form a chain as long as the object is tall.
        tl.store(parents + index, parent, mask=climbing, cache_modifier=".cg")

    root = head & (parent == index)
    if CLEAR_SIZES:
        tl.store(sizes + plane * pixels + index, 0, mask=root)
    if NUMBER:
        count = 0
        if _any(root):
            kept = root
            if MEASURED:
                kept = root & (tl.load(sizes + plane * pixels + index, mask=root, other=0) >= min_size)
            number = tl.where(kept, tl.cumsum(kept.to(tl.int32), axis=0), 0)
            tl.store(parents + index, -number + NUMBERED, mask=root)
            count = tl.sum(kept.to(tl.int32), axis=0)
        tl.store(block_counts + program, count)


@triton.jit
def _join_row(
    parents, words, at, row, column, width, row_words, mask, left, linked, inside, row_shift,
    DIAGONAL: tl.constexpr, LINKED: tl.constexpr,
):  # fmt: skip
    """Unite the runs of one mask word per lane with those that they touch in the row `row_shift` away.

    Each pair of touching runs is met once: where the later run starts, if the other one has begun by then,
    else at the pixel of the later run that sees the other one begin. LINKED: `initialise` has linked those
    starts that touch this row and had no link to a row before (`linked`). Returns the starts linked so far.
    """
    other = words + at + row_shift * row_words
    straight = tl.load(other, mask=inside, other=0)
    start = mask & ~left
    before = (straight << 1) | (tl.load(other - 1, mask=inside & (column > 0), other=0) >> 31 & 1)
    if DIAGONAL:
        after = tl.load(other + 1, mask=inside & (column < row_words - 1), other=0)
        after = (straight >> 1 & 0x7FFFFFFF) | (after << 31)
        at_start = start & (straight | before)
        begins = mask & after & ~straight
        if LINKED:
            by_link = start & (straight | before | after) & ~linked
            linked = linked | by_link
            at_start = at_start & ~by_link
            begins = begins & ~(by_link & ~before)
    else:
        at_start = mask & straight & (start | ~before)
        begins = at_start & 0
        if LINKED:
            by_link = start & straight & ~linked
            linked = linked | by_link
            at_start = at_start & ~by_link

    first_pixel = row * width + column * WORD
    a = first_pixel
    b = first_pixel
    busy = (at_start | begins) != 0
    # One step of one union per lane and turn. Ends: a step either strictly decreases a + b >= 0 (a parent is
    # smaller than its pixel, a link that came too late goes on with `old` < high) or makes a and b equal;
    # then the lane takes the next of its at most 64 bits.
    while _any(busy):
        pending = at_start | begins
        fetch = (a == b) & (pending != 0)
        bit = _lowest_bit(pending)
        here = (at_start >> bit & 1) != 0
        aside = tl.where(here, (straight >> bit & 1) - 1, 1)
        a = tl.where(fetch, first_pixel + bit, a)
        b = tl.where(fetch, first_pixel + bit + row_shift * width + aside, b)
        at_start = tl.where(fetch & here, at_start & (at_start - 1), at_start)
        begins = tl.where(fetch & ~here, begins & (begins - 1), begins)

        a_parent = _parent(a, tl.load(parents + a, mask=busy, other=0, cache_modifier=".cg"))
        b_parent = _parent(b, tl.load(parents + b, mask=busy, other=0, cache_modifier=".cg"))
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
    parents, words, depth, height, width, row_words, blocks,
    VOLUME: tl.constexpr, AXIS_DIAGONAL: tl.constexpr, CORNERS: tl.constexpr, CORNER_DIAGONAL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One mask word per lane: the unions that `initialise` left to do, row by row of the earlier neighbours.

    AXIS_DIAGONAL: rows one step away in y or in z are touched diagonally too. CORNERS: rows one step away in
    both y and z are neighbours, touched diagonally with CORNER_DIAGONAL.
    """
    program = tl.program_id(0)
    plane = (program // blocks).to(tl.int64)
    parents += plane * depth * height * width
    words += plane * depth * height * row_words
    at = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    row = at // row_words
    column = at % row_words
    y = row % height
    inside = row < depth * height

    mask = tl.load(words + at, mask=inside, other=0)
    inside = inside & (mask != 0)
    left = (mask << 1) | (tl.load(words + at - 1, mask=inside & (column > 0), other=0) >> 31 & 1)
    linked = mask & 0
    linked = _join_row(
        parents, words, at, row, column, width, row_words, mask, left, linked, inside & (y > 0), -1,
        AXIS_DIAGONAL, True,
    )  # fmt: skip
    if VOLUME:
        behind = inside & (row >= height)
        linked = _join_row(
            parents, words, at, row, column, width, row_words, mask, left, linked, behind, -height,
            AXIS_DIAGONAL, True,
        )  # fmt: skip
        if CORNERS:
            above = behind & (y > 0)
            below = behind & (y < height - 1)
            _join_row(
                parents, words, at, row, column, width, row_words, mask, left, linked, above, -height - 1,
                CORNER_DIAGONAL, False,
            )  # fmt: skip
            _join_row(
                parents, words, at, row, column, width, row_words, mask, left, linked, below, 1 - height,
                CORNER_DIAGONAL, False,
            )  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME)
def measure(parents, sizes, pixels, blocks, BLOCK: tl.constexpr):
    """Add the length of every run piece to the size of its root (flat forest; sizes of roots start at 0)."""
    program = tl.program_id(0)
    plane = (program // blocks).to(tl.int64)
    parents += plane * pixels
    index = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = index < pixels

    value = tl.load(parents + index, mask=inside, other=BACKGROUND)
    following = tl.load(parents + index + 1, mask=index < pixels - 1, other=BACKGROUND)
    last = (value != BACKGROUND) & (following >= BACKGROUND)
    length = tl.where(value >= 0, 1, -value)
    head = index - length + 1
    root = tl.load(parents + head, mask=last, other=0)
    tl.atomic_add(sizes + plane * pixels + root, length, mask=last, sem="relaxed")


@triton.jit(do_not_specialize=_RUNTIME)
def scan(block_counts, block_starts, counts, blocks, BLOCK: tl.constexpr):
    """One plane: ids given out before each of its blocks, and the number of its components."""
    plane = tl.program_id(0)
    block_counts += plane.to(tl.int64) * blocks
    block_starts += plane.to(tl.int64) * blocks
    total = 0
    first = 0
    # Ends: `first` grows by BLOCK. (Not `range`: with NumPy 2.4, Triton 3.6's interpreter cannot take its bound.)
    while first < blocks:
        block = first + tl.arange(0, BLOCK)
        count = tl.load(block_counts + block, mask=block < blocks, other=0)
        tl.store(block_starts + block, total + tl.cumsum(count, axis=0) - count, mask=block < blocks)
        total += tl.sum(count, axis=0)
        first += BLOCK
    tl.store(counts + plane, total)


@triton.jit(do_not_specialize=_RUNTIME)
def write(parents, block_starts, labels, pixels, blocks, BLOCK: tl.constexpr):
    """One block of one plane: pixel -> head -> root -> number within the root's block -> id."""
    program = tl.program_id(0)
    plane = (program // blocks).to(tl.int64)
    parents += plane * pixels
    index = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = index < pixels

    value = tl.load(parents + index, mask=inside, other=BACKGROUND)
    foreground = value != BACKGROUND
    label = tl.zeros([BLOCK], tl.int32)
    if _any(foreground):
        behind_head = (value < BACKGROUND) & (value > NUMBERED)
        head = tl.where(behind_head, index + value + 1, index)
        value = tl.where(behind_head, tl.load(parents + head, mask=behind_head, other=0), value)
        below_root = foreground & (value >= 0)
        root = tl.where(below_root, value, head)
        value = tl.where(below_root, tl.load(parents + root, mask=below_root, other=0), value)
        number = -value + NUMBERED
        kept = foreground & (number > 0)
        start = tl.load(block_starts + plane * blocks + root // BLOCK, mask=kept, other=0)
        label = tl.where(kept, start + number, 0)
    tl.store(labels + plane * pixels + index, label, mask=inside)


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
            than 2^31 - 4096 pixels, more than 2^31 - 1 tiles in all.
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

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=x.device)

    planes = x.shape[0]
    if x.numel() == 0:
        return empty(*x.shape), torch.zeros(planes, dtype=torch.int32, device=x.device)
    depth, height, width = (1, *x.shape[1:]) if dims == 2 else x.shape[1:]
    pixels = depth * height * width
    if pixels > launch.MAX_PLANE_PIXELS:
        raise ValueError(
            f"expected planes of at most 2^31 - 4096 = {launch.MAX_PLANE_PIXELS} pixels, got {pixels} "
            f"in each plane of shape {tuple(x.shape)}; crop the image or label it in parts"
        )
    extents = ((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
    if sum(extents) >= 2**31:
        x = x.contiguous()  # offsets inside a plane are int32
    stride_plane, *stride_slice, stride_y, stride_x = x.stride()

    row_words = triton.cdiv(width, launch.WORD)
    slice_tiles = triton.cdiv(height, launch.TILE_ROWS)
    join_blocks = triton.cdiv(depth * height * row_words, launch.JOIN_WORDS)
    blocks = triton.cdiv(pixels, launch.BLOCK)
    tile_grid = launch.programs(planes, depth * slice_tiles * row_words)
    join_grid = launch.programs(planes, join_blocks)
    block_grid = launch.programs(planes, blocks)

    labels = empty(*x.shape)
    counts = empty(planes)
    parents = empty(planes, pixels)
    words = empty(planes, depth * height * row_words)
    block_counts = empty(planes, blocks)
    block_starts = empty(planes, blocks)
    volume = dims == 3
    axis_diagonal = connectivity in (8, 18, 26)
    # One warp per program: loops end, and branches are taken, for a warp's own pixels, without a barrier.
    one_warp = {"num_warps": 1}

    def flatten_blocks(sizes: torch.Tensor, *, number: bool, measured: bool) -> None:
        flatten[block_grid](
            parents, block_counts, sizes, pixels, blocks, min(min_size, pixels + 1),
            NUMBER=number, MEASURED=number and measured, CLEAR_SIZES=measured and not number,
            BLOCK=launch.BLOCK, **one_warp,
        )  # fmt: skip

    with torch.cuda.device_of(x):
        initialise[tile_grid](
            x, parents, words, 0.0 if threshold is None else ctypes.c_float(threshold).value,
            depth, height, width, row_words, slice_tiles,
            stride_plane, stride_slice[0] if volume else 0, stride_y, stride_x,
            THRESHOLD=threshold is not None, VOLUME=volume, DIAGONAL=axis_diagonal,
            ROWS=launch.TILE_ROWS, **one_warp,
        )  # fmt: skip
        flatten_blocks(parents, number=False, measured=False)
        join[join_grid](
            parents, words, depth, height, width, row_words, join_blocks,
            VOLUME=volume, AXIS_DIAGONAL=axis_diagonal, CORNERS=connectivity in (18, 26),
            CORNER_DIAGONAL=connectivity == 26, BLOCK=launch.JOIN_WORDS, **one_warp,
        )  # fmt: skip
        if min_size > 1:
            sizes = empty(planes, pixels)
            flatten_blocks(sizes, number=False, measured=True)
            measure[block_grid](parents, sizes, pixels, blocks, BLOCK=launch.BLOCK, **one_warp)
            flatten_blocks(sizes, number=True, measured=True)
        else:
            flatten_blocks(parents, number=True, measured=False)
        scan[(planes,)](
            block_counts, block_starts, counts, blocks, BLOCK=launch.SCAN_BLOCK, num_warps=launch.SCAN_WARPS
        )
        write[block_grid](parents, block_starts, labels, pixels, blocks, BLOCK=launch.BLOCK, **one_warp)
    return labels, counts
