"""Tables of both sides: sums and boxes of every instance, and the pairs of instances that share a pixel.

Rows of a side are numbered by id in their plane. Side 0, the target, has `bound` rows to a plane; side 1, the
prediction, follows with `bound_pred` rows to a plane; [rows] below is both. A plane without an instance on a side has
one *artificial* row 0 there, of no pixel.

    sums   int64 [rows, 2 K + 1 + axes]  K features in fixed point, over the pixels that the other side does not have,
                 then over those that it has; the numbers of these pixels, in the lower and the upper half of one word;
                 Σ of each coordinate
    boxes  int32 [rows, 2 axes]  -least and greatest coordinate of each axis
    linked int64 [rows, K]  over the instances of the other side that share a pixel with the row: Σ of
                 their features outside of the target (target rows), or of their pixels (predicted rows, first column)
    slots  int32 or int64 [planes, capacity]  pairs as keys n M + m: at that place while all N M of them fit, else in a
                 hash; EMPTY elsewhere. A pair has a pixel of its own, so the hash never fills.
    peaks  int64 [planes, bound]  `peak_key` of the most likely pixel of a target row that the prediction does not have;
                 only of missed instances in the end, NO_PEAK elsewhere

Everything is an integer and every update commutes: the tables are bitwise the same on every run.
"""

# Compile-time parameters are annotated tl.constexpr and take Python values; launch options are no parameters.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

import triton
import triton.language as tl

from .label import start_blocks
from .losses import features, pointwise
from .pack import COLUMNS, wide
from .words import WORD, any_of, image_tile, instances_at

EMPTY = tl.constexpr(-1)
NOWHERE = tl.constexpr(-(2**30))
"""Below -coordinate and coordinate of any pixel."""
NO_PEAK = tl.constexpr(-(2**63))
LAST = tl.constexpr(2**31 - 1)
"""Above the index of any pixel of a plane; `index ^ LAST` is LAST - index."""
UNDRAWN = tl.constexpr(2**31 - 1)
"""Owner of a pixel that no centre box covers."""
FIXED_P = tl.constexpr(2.0**32)
"""Unit of Σ p and Σ p²: 2^31 pixels fit."""
LIMIT_P = tl.constexpr(512.0)
LIMIT_V = tl.constexpr(2.0**26)
"""Sums of one tile of 256 pixels beyond these make the terms NaN: p is no probability, or v overflows."""


@triton.jit
def counts_of(counts, plane, planes, bound, bound_pred, SIDES: tl.constexpr):
    """Instances of either side of a plane, as far as the tables go; 0 on a side that is not labelled."""
    n = 0
    m = 0
    if SIDES > 0:
        n = tl.minimum(tl.load(counts + plane), bound)
    if SIDES == 2:
        m = tl.minimum(tl.load(counts + planes.to(tl.int64) + plane), bound_pred)
    return n, m


@triton.jit
def first_row(plane, planes, bound, bound_pred, PRED: tl.constexpr):
    """Row 0 of a plane on one side."""
    return planes.to(tl.int64) * bound + plane * bound_pred if PRED else plane * bound


@triton.jit
def areas_of(row_sums, inside, K: tl.constexpr):
    """Pixels of some rows that the other side does not have (1 where there is no row), and that it has; int64."""
    both = tl.load(row_sums + 2 * K, mask=inside, other=1)
    return both & 0xFFFFFFFF, both >> 32


@triton.jit
def area_of(row_sums, inside, K: tl.constexpr):
    """Pixels of some rows; 1 where there is none."""
    alone, shared = areas_of(row_sums, inside, K)
    return alone + shared


@triton.jit
def weight_of(row_sums, inside, K: tl.constexpr, BY_SIZE: tl.constexpr):
    """What some rows count in a mean over instances, float64; an artificial row has the size 1."""
    if BY_SIZE:
        return tl.maximum(area_of(row_sums, inside, K).to(tl.float64), 1.0)
    else:
        return tl.full(inside.shape, 1.0, tl.float64)


@triton.jit
def peak_key(value, index):
    """Integers in the order of values, then in falling order of the index of the pixel; values to float32's digits."""
    value = value.to(tl.float32)
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)
    order = bits ^ (bits >> 31 & 0x7FFFFFFF)
    return order.to(tl.int64) << 32 | (index ^ LAST).to(tl.int64)


@triton.jit
def peak_index(key):
    """The index of the pixel in a key; NO_PEAK has one of no pixel."""
    return (key & LAST) ^ LAST


def slots_for(keys: int) -> int:
    """Slots of an open hash of up to so many keys."""
    return max(keys + keys // 4, 64)


@triton.jit
def hash_of(key, capacity):
    """Where the search for a key begins; the product of 31 bits and a capacity below 2^32 fits."""
    mixed = (key ^ (key >> 31)) * -49064778989728563
    mixed = (mixed ^ (mixed >> 29)) & 0x7FFFFFFF
    return (mixed * capacity) >> 31


@triton.jit
def insert(slots, key, capacity):
    """Put a key into an open hash; ends, since there are more slots than keys."""
    at = hash_of(key, capacity)
    empty = tl.full([], EMPTY, slots.dtype.element_ty)
    entry = key.to(slots.dtype.element_ty)
    searching = True
    while searching:
        old = tl.atomic_cas(slots + at, empty, entry, sem="relaxed")
        searching = (old != empty) & (old != entry)
        at = tl.where(at + 1 == capacity, 0, at + 1)


@triton.jit
def slots_used(n, m, capacity):
    """How many slots of a plane there are to visit."""
    return tl.minimum(tl.maximum(n, 1).to(tl.int64) * tl.maximum(m, 1), capacity)


@triton.jit
def pair_at(slots, at, n, m, inside):
    """At some positions below `slots_used`: whether there is a pair, and its rows in the two tables."""
    key = at
    there = inside
    if (n > 0) & (m > 0):
        key = tl.load(slots + at, mask=inside, other=EMPTY).to(tl.int64)
        there = inside & (key != EMPTY)
    # Else the artificial row is linked to all that the other side has.
    width = tl.maximum(m, 1)
    row = key // width
    return there, row.to(tl.int32), (key - row * width).to(tl.int32)


@triton.jit
def clear(pointer, length, value, group, groups, BLOCK: tl.constexpr):
    """This group's share of `pointer[:length] = value`."""
    first = group.to(tl.int64) * BLOCK
    while first < length:
        at = first + tl.arange(0, BLOCK)
        tl.store(pointer + at, value, mask=at < length)
        first += groups * BLOCK


@triton.jit
def _total(block_counts, blocks, BLOCK: tl.constexpr):
    total = 0
    first = 0
    while first < blocks:
        block = first + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(block_counts + block, mask=block < blocks, other=0))
        first += BLOCK
    return total


@triton.jit(
    do_not_specialize=[
        "planes", "tiles", "blocks", "bound", "bound_pred", "capacity", "depth", "height", "width", "groups"
    ]
)  # fmt: skip
def prepare(
    partial, dense, whole, omega, block_counts, block_starts, counts, sums, boxes, linked, back, nearest, peaks, slots,
    flags, ticket,
    planes, tiles, blocks, bound, bound_pred, capacity, depth, height, width, groups,
    SIDES: tl.constexpr, K: tl.constexpr, AXES: tl.constexpr, BACK: tl.constexpr,
    BOXES: tl.constexpr, PAIRS: tl.constexpr, SOFT: tl.constexpr, FAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One of `groups` programs of a plane: add up its tiles, start its ids, and clear the rows that will be used."""
    program = tl.program_id(0)
    plane = (program // groups).to(tl.int64)
    group = program % groups
    if program == 0:
        tl.store(ticket, 0)
    if group == 0:
        place = tl.arange(0, COLUMNS)[None, :]
        totals = tl.zeros([BLOCK // COLUMNS, COLUMNS], tl.float64)
        first = 0
        while first < tiles:
            tile = first + tl.arange(0, BLOCK // COLUMNS)[:, None]
            at = (plane * tiles + tile) * COLUMNS + place
            totals += tl.load(partial + at, mask=tile < tiles, other=0.0)
            first += BLOCK // COLUMNS
        total = tl.sum(totals, axis=0, keep_dims=True)
        tl.store(dense + plane * COLUMNS + place, total)
        poison = tl.sum(tl.where(place == 5, total, 0.0))  # 0 or NaN
        tl.store(whole + plane * 4 + place, total + poison, mask=place < 4)
        tl.store(omega + plane + place - 4, total, mask=place == 4)

    W: tl.constexpr = 2 * K + 1 + AXES
    n = 0
    m = 0
    if SIDES > 0:
        n = _total(block_counts + plane * blocks, blocks, BLOCK)
    if SIDES > 1:
        m = _total(block_counts + (planes + plane) * blocks, blocks, BLOCK)
    if group == 0:
        tl.store(flags + plane, ((n > bound) | (m > bound_pred)).to(tl.int32))
    for side in tl.static_range(SIDES):
        side_plane = side * planes.to(tl.int64) + plane
        found = n if side == 0 else m
        entries = tl.minimum(tl.maximum(found, 1), bound if side == 0 else bound_pred).to(tl.int64)
        if group == 0:
            tl.store(counts + side_plane, found)
            start_blocks(block_counts + side_plane * blocks, block_starts + side_plane * blocks, blocks, BLOCK)
        row = first_row(plane, planes, bound, bound_pred, side == 1)
        clear(sums + row * W, entries * W, 0, group, groups, BLOCK)
        if SOFT and side == 0:
            clear(peaks + row, entries, NO_PEAK, group, groups, BLOCK)
        if PAIRS:
            clear(linked + row * K, entries * K, 0, group, groups, BLOCK)
            if side == 1 and BACK > 0:
                clear(back + plane * bound_pred * BACK, entries * BACK, 0, group, groups, BLOCK)
        if BOXES:
            clear(nearest + row, entries, FAR, group, groups, BLOCK)
            if found > 0:
                clear(boxes + row * (2 * AXES), entries * (2 * AXES), NOWHERE, group, groups, BLOCK)
            elif group == 0:
                # The artificial instance is the box [c - 1, c + 2) about c = size // 2, not clipped (section 2.1.4).
                corner = tl.arange(0, 8)
                size = tl.where(corner // 2 == AXES - 1, width, tl.where(corner // 2 == AXES - 2, height, depth))
                box = tl.where(corner % 2 == 0, 1 - size // 2, size // 2 + 1)
                tl.store(boxes + row * (2 * AXES) + corner, box, mask=corner < 2 * AXES)
    if PAIRS and (n > 0) & (m > 0):
        used = slots_used(tl.minimum(n, bound), tl.minimum(m, bound_pred), capacity)
        clear(slots + plane * capacity, used, EMPTY, group, groups, BLOCK)


@triton.jit
def _fixed(total, scale, limit):
    """A sum in fixed point; beyond the limit (or not a number) 0, and True."""
    over = ~((total <= limit) & (total >= -limit))
    return (tl.where(over, 0.0, total).to(tl.float64) * scale + 0.5).to(tl.int64), over


@triton.jit
def columns_of(me, wrong, cost, p, scale_v, SQUARED: tl.constexpr, GAMMA: tl.constexpr, K: tl.constexpr):
    """What the pixels `me` of a tile add to a row: K features in fixed point and their number; and whether one of
    these does not fit.
    """
    place = tl.arange(0, 8)
    total, over = _fixed(tl.sum(tl.where(me, p, 0.0)), FIXED_P, LIMIT_P)
    columns = tl.where(place == 0, total, tl.where(place == K, tl.sum(me.to(tl.int32)), 0).to(tl.int64))
    if SQUARED:
        total, above = _fixed(tl.sum(tl.where(me, p * p, 0.0)), FIXED_P, LIMIT_P)
        columns = tl.where(place == 1, total, columns)
        over = over | above
    if GAMMA >= 0:
        v = pointwise(wrong, cost, GAMMA)
        total, above = _fixed(tl.sum(tl.where(me, v, 0.0)), scale_v, LIMIT_V)
        columns = tl.where(place == K - 1, total, columns)
        over = over | above
    return columns, over


@triton.jit(
    do_not_specialize=[
        "scale_v", "planes", "rows", "height", "row_words", "row_tiles", "pixels", "blocks", "bound", "bound_pred",
        "capacity",
    ],
)  # fmt: skip
def accumulate(
    values, masks, heads, parents, block_starts, counts, sums, boxes, peaks, slots, flags,
    scale_v, planes, rows, height, width, row_words, row_tiles, pixels, blocks, bound, bound_pred, capacity,
    LOGITS: tl.constexpr, SQUARED: tl.constexpr, GAMMA: tl.constexpr, K: tl.constexpr, AXES: tl.constexpr,
    SIDES: tl.constexpr, BOXES: tl.constexpr, CENTERS: tl.constexpr, PAIRS: tl.constexpr, SOFT: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One [ROWS, WORD] tile: a turn for every pair (t, q) of ids in it, 0 included.

    All sums of a row are updated in one instruction, as is its box.
    """
    plane, _, y, column = image_tile(1, row_words, row_tiles, ROWS)
    lane = tl.arange(0, WORD)[None, :]
    x = column * WORD + lane
    word = y * row_words + column
    words = rows.to(tl.int64) * row_words
    in_plane = y < rows
    target = tl.load(masks + plane * words + word, mask=in_plane, other=0)
    either = target
    predicted = target & 0
    other = planes.to(tl.int64) + plane
    if SIDES == 2:
        predicted = tl.load(masks + other * words + word, mask=in_plane, other=0)
        either = target | predicted
    if any_of(either != 0):
        positive = (target >> lane & 1) != 0
        head = tl.load(heads + plane * words + word, mask=in_plane, other=0)
        t = instances_at(target, head, word, lane, parents + plane * pixels, block_starts + plane * blocks)
        n = tl.load(counts + plane)
        m = 0
        key = t.to(tl.int64) << 32
        if SIDES == 2:
            head = tl.load(heads + other * words + word, mask=in_plane, other=0)
            q = instances_at(predicted, head, word, lane, parents + other * pixels, block_starts + other * blocks)
            key = key | q
            m = tl.load(counts + other)

        seen = key > 0
        value = wide(tl.load(values + plane * rows * width + y * width + x, mask=seen, other=0.0))
        wrong, cost, p = features(value, positive, LOGITS)
        if SOFT:
            rank = peak_key(value, y * width + x)
        here = tl.max(key)
        while here > 0:
            kt = (here >> 32).to(tl.int32)
            kq = (here & 0x7FFFFFFF).to(tl.int32)
            me = key == here
            place = tl.arange(0, 8)
            columns, over = columns_of(me, wrong, cost, p, scale_v, SQUARED, GAMMA, K)
            box = tl.full([8], NOWHERE, tl.int32)
            for axis in tl.static_range(AXES):
                at = x if axis == AXES - 1 else y if AXES == 2 else y % height if axis == 1 else y // height
                if CENTERS:
                    columns = tl.where(place == K + 1 + axis, tl.sum(tl.where(me, at, 0)).to(tl.int64), columns)
                if BOXES:
                    box = tl.where(place == 2 * axis, tl.max(tl.where(me, -at, NOWHERE)), box)
                    box = tl.where(place == 2 * axis + 1, tl.max(tl.where(me, at, NOWHERE)), box)
            if (kt > bound) | (kq > bound_pred) | over:
                tl.store(flags + plane, 1)
            if (kt > 0) & (kt <= bound):
                row = first_row(plane, planes, bound, bound_pred, False) + kt - 1
                add_to_row(sums, boxes, row, kq > 0, columns, box, K, AXES, BOXES, CENTERS)
                if SOFT and kq == 0:
                    highest = tl.max(tl.where(me, rank, NO_PEAK)) + place * 0
                    tl.atomic_max(peaks + row + place, highest, mask=place == 0, sem="relaxed")
            if (kq > 0) & (kq <= bound_pred):
                row = first_row(plane, planes, bound, bound_pred, True) + kq - 1
                add_to_row(sums, boxes, row, kt > 0, columns, box, K, AXES, BOXES, CENTERS)
                if PAIRS and (kt > 0) & (kt <= bound):
                    _insert_pair(
                        slots + plane * capacity, kt, kq, tl.minimum(n, bound), tl.minimum(m, bound_pred), capacity
                    )
            key = tl.where(me, 0, key)
            here = tl.max(key)


@triton.jit
def add_to_row(
    sums, boxes, row, shared, columns, box,
    K: tl.constexpr, AXES: tl.constexpr, BOXES: tl.constexpr, CENTERS: tl.constexpr,
):  # fmt: skip
    """Add the columns of a tile (features, pixels, coordinates) to a row, and widen its box."""
    place = tl.arange(0, 8)
    at = tl.where(shared | (place >= K), K, 0) + place
    columns = tl.where(shared & (place == K), columns << 32, columns)
    used = K + 1 + (AXES if CENTERS else 0)
    tl.atomic_add(sums + row * (2 * K + 1 + AXES) + at, columns, mask=place < used, sem="relaxed")
    if BOXES:
        tl.atomic_max(boxes + row * (2 * AXES) + place, box, mask=place < 2 * AXES, sem="relaxed")


@triton.jit
def _insert_pair(slots, kt, kq, n, m, capacity):
    """Remember that instances with ids kt and kq share a pixel."""
    key = (kt - 1).to(tl.int64) * m + kq - 1
    if n.to(tl.int64) * m <= capacity:
        tl.store(slots + key, key)
    else:
        insert(slots, key, capacity)


@triton.jit(
    do_not_specialize=[
        "planes",
        "depth",
        "height",
        "width",
        "bound",
        "bound_pred",
        "capacity",
        "size_z",
        "size_y",
        "size_x",
        "groups",
    ]
)
def link(
    counts, sums, linked, slots, owners,
    planes, depth, height, width, bound, bound_pred, capacity, size_z, size_y, size_x, groups,
    K: tl.constexpr, AXES: tl.constexpr, CENTERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over the partners of every row; and no owner for any pixel that a centre box will cover."""
    program = tl.program_id(0)
    plane = (program // groups).to(tl.int64)
    group = program % groups
    n, m = counts_of(counts, plane, planes, bound, bound_pred, 2)
    W: tl.constexpr = 2 * K + 1 + AXES
    used = slots_used(n, m, capacity)
    first = group.to(tl.int64) * BLOCK
    while first < used:
        at = first + tl.arange(0, BLOCK)
        there, row_t, row_q = pair_at(slots + plane * capacity, at, n, m, at < used)
        row_t += first_row(plane, planes, bound, bound_pred, False)
        row_q += first_row(plane, planes, bound, bound_pred, True)
        for k in tl.static_range(K):
            outside = tl.load(sums + row_q * W + k, mask=there, other=0)
            tl.atomic_add(linked + row_t * K + k, outside, mask=there, sem="relaxed")
        tl.atomic_add(linked + row_q * K, area_of(sums + row_t * W, there, K), mask=there, sem="relaxed")
        first += groups * BLOCK

    if CENTERS:
        for side in tl.static_range(2):
            entries = n if side == 0 else m
            first = group * BLOCK
            while first < entries:
                row = first + tl.arange(0, BLOCK)
                inside = row < entries
                cz, cy, cx = center_of(
                    sums + (first_row(plane, planes, bound, bound_pred, side == 1) + row) * W, inside, K, AXES
                )
                cell = 0
                while cell < size_z * size_y * size_x:
                    at, covered = box_pixel(cz, cy, cx, cell, depth, height, width, size_z, size_y, size_x)
                    at = plane * depth * height * width + at
                    tl.store(owners + at, UNDRAWN, mask=inside & covered)
                    if side == 1:  # is also looked up in the true map
                        pixels = planes.to(tl.int64) * depth * height * width
                        tl.store(owners + pixels + at, UNDRAWN, mask=inside & covered)
                    cell += 1
                first += groups * BLOCK


@triton.jit
def center_of(row_sums, inside, K: tl.constexpr, AXES: tl.constexpr):
    """Rounded centroids floor((2 Σx + |n|) / (2 |n|)) of some rows, in the order z, y, x."""
    area = area_of(row_sums, inside, K)
    first = 2 * K + 1
    cx = (2 * tl.load(row_sums + first + AXES - 1, mask=inside, other=0) + area) // (2 * area)
    cy = (2 * tl.load(row_sums + first + AXES - 2, mask=inside, other=0) + area) // (2 * area)
    cz = cx * 0
    if AXES == 3:
        cz = (2 * tl.load(row_sums + first, mask=inside, other=0) + area) // (2 * area)
    return cz.to(tl.int32), cy.to(tl.int32), cx.to(tl.int32)


@triton.jit
def box_pixel(cz, cy, cx, cell, depth, height, width, size_z, size_y, size_x):
    """Pixel number `cell` of the centre boxes about some centroids, and whether it lies in the image."""
    z = cz + cell // (size_y * size_x) - size_z // 2
    y = cy + cell // size_x % size_y - size_y // 2
    x = cx + cell % size_x - size_x // 2
    covered = (z >= 0) & (z < depth) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return (z * height + y) * width + x, covered
