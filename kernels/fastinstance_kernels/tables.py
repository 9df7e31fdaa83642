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
    slots  int32 or int64 [planes, capacity]  pairs as keys n M + m: at that place if all N M of them fit into a quarter
                 more than the target has pixels, else in a hash of so many slots; EMPTY elsewhere. A pair has a pixel
                 of the target of its own, so the hash never fills.
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
from .words import WORD, any_of, image_tile, instances_at, lowest_bit

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
FEW_PAIRS = tl.constexpr(1024)
"""Of so many instances that may share a pixel there is a place for each pair, however small the target is."""
LARGE = tl.constexpr(8 * WORD)
"""Pixels in runs of one pair that are added up before they go to a table: else one large instance gets all atomics."""
LIMIT_P = tl.constexpr(2.0)
LIMIT_V = tl.constexpr(2.0**26)
"""Sums of a run of pixels beyond these, LIMIT_P for each, make the terms NaN: p is no probability, or v overflows."""


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
def insert(slots, key, capacity, mask):
    """Put some keys into an open hash; ends, since there are more slots than keys.

    The greater of two keys that meet gets the slot, the other one goes on: a key never passes a smaller one, so none
    is there twice.
    """
    at = hash_of(key, capacity)
    entry = key.to(slots.dtype.element_ty)
    searching = mask
    while any_of(searching):
        old = tl.atomic_max(slots + at, entry, mask=searching, sem="relaxed")
        searching = searching & (old != EMPTY) & (old != entry)
        entry = tl.minimum(entry, old)
        at = tl.where(at + 1 == capacity, 0, at + 1)


@triton.jit
def pairs_of(n, m):
    """Pairs of rows of a plane, artificial ones included."""
    return tl.maximum(n, 1).to(tl.int64) * tl.maximum(m, 1)


@triton.jit
def hash_slots(target_pixels, capacity):
    """Slots of a plane for pairs that are hashed, which they are if there may be more of them."""
    pixels = target_pixels.to(tl.int64)
    return tl.minimum(tl.maximum(pixels + pixels // 4, FEW_PAIRS), capacity)


@triton.jit
def slots_used(dense, n, m, capacity):
    """How many slots of a plane there are to visit; `dense` points at the sums of the plane."""
    pairs = pairs_of(n, m)
    hashed = hash_slots(tl.load(dense + 2), capacity)
    return tl.where((n > 0) & (m > 0), tl.minimum(pairs, hashed), pairs)


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
        used = tl.minimum(pairs_of(tl.minimum(n, bound), tl.minimum(m, bound_pred)), capacity)
        if used > tiles.to(tl.int64) * groups:  # to clear all of them takes longer than to count the target's pixels
            pixels = tl.zeros([BLOCK], tl.int32)
            first = 0
            while first < tiles:
                tile = first + tl.arange(0, BLOCK)
                at = (plane * tiles + tile) * COLUMNS + 2
                pixels += tl.load(partial + at, mask=tile < tiles, other=0.0).to(tl.int32)
                first += BLOCK
            used = tl.minimum(used, hash_slots(tl.sum(pixels), capacity))
        clear(slots + plane * capacity, used, EMPTY, group, groups, BLOCK)


@triton.jit
def fixed(total, scale, limit):
    """A sum in fixed point; beyond the limit (or not a number) 0, and True."""
    over = ~((total <= limit) & (total >= -limit))
    return (tl.where(over, 0.0, total).to(tl.float64) * scale + 0.5).to(tl.int64), over


@triton.jit(
    do_not_specialize=[
        "scale_v", "planes", "rows", "height", "width", "row_words", "row_tiles", "pixels", "blocks", "bound",
        "bound_pred", "capacity",
    ],
    do_not_specialize_on_alignment=["values"],
)  # fmt: skip
def accumulate(
    values, masks, heads, parents, block_starts, counts, sums, boxes, peaks, dense, slots, flags,
    scale_v, planes, rows, height, width, row_words, row_tiles, pixels, blocks, bound, bound_pred, capacity,
    LOGITS: tl.constexpr, SQUARED: tl.constexpr, GAMMA: tl.constexpr, K: tl.constexpr, AXES: tl.constexpr,
    SIDES: tl.constexpr, BOXES: tl.constexpr, CENTERS: tl.constexpr, PAIRS: tl.constexpr, SOFT: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One mask word per lane, one above the other: a turn for each run of pixels of one pair (t, q), 0 included."""
    plane, _, y, column = image_tile(1, row_words, row_tiles, ROWS)
    word = y * row_words + column
    words = rows.to(tl.int64) * row_words
    other = planes.to(tl.int64) + plane
    target = tl.load(masks + plane * words + word, mask=y < rows, other=0)
    predicted = target & 0
    if SIDES == 2:
        predicted = tl.load(masks + other * words + word, mask=y < rows, other=0)
    pending = target | predicted
    if any_of(pending != 0):
        target_heads = tl.load(heads + plane * words + word, mask=y < rows, other=0)
        ends = ~pending | target_heads | (target ^ (target << 1))
        if SIDES == 2:
            predicted_heads = tl.load(heads + other * words + word, mask=y < rows, other=0)
            ends = ends | predicted_heads | (predicted ^ (predicted << 1))
        n, m = counts_of(counts, plane, planes, bound, bound_pred, SIDES)
        # Ends: each turn takes a run off `pending`.
        while any_of(pending != 0):
            first = lowest_bit(pending)
            after = ends & (-2 << first)
            length = tl.where(pending != 0, tl.where(after != 0, lowest_bit(after), WORD) - first, 0)
            t = instances_at(
                target & pending, target_heads, word, first, parents + plane * pixels, block_starts + plane * blocks
            )
            q = t * 0
            if SIDES == 2:
                q = instances_at(
                    predicted & pending, predicted_heads, word, first,
                    parents + other * pixels, block_starts + other * blocks,
                )  # fmt: skip
            pending = pending & -(after & -after)

            positive = (target >> first & 1) != 0
            x = column * WORD + first
            p_sum = wide(tl.zeros([ROWS, 1], values.dtype.element_ty))
            power_sum = p_sum
            v_sum = p_sum
            peak = tl.full([ROWS, 1], NO_PEAK, tl.int64)
            step = 0
            longest = tl.max(length)
            while step < longest:
                here = step < length
                value = wide(tl.load(values + plane * rows * width + y * width + x + step, mask=here, other=0.0))
                wrong, cost, p = features(value, positive, LOGITS)
                p_sum += tl.where(here, p, 0.0)
                if SQUARED:
                    power_sum += tl.where(here, p * p, 0.0)
                if GAMMA >= 0:
                    v_sum += tl.where(here, pointwise(wrong, cost, GAMMA), 0.0)
                if SOFT:
                    peak = tl.maximum(peak, tl.where(here, peak_key(value, y * width + x + step), NO_PEAK))
                step += 1

            limit = length * LIMIT_P
            p_fixed, over = fixed(p_sum, FIXED_P, limit)
            power_fixed = p_fixed
            v_fixed = p_fixed
            if SQUARED:
                power_fixed, above = fixed(power_sum, FIXED_P, limit)
                over = over | above
            if GAMMA >= 0:
                v_fixed, above = fixed(v_sum, scale_v, LIMIT_V)
                over = over | above
            if any_of((t > bound) | (q > bound_pred) | over):
                tl.store(flags + plane, 1)

            row_t = first_row(plane, planes, bound, bound_pred, False) + t - 1
            row_q = first_row(plane, planes, bound, bound_pred, True) + q - 1
            busy = length > 0
            together = tl.sum(length) >= LARGE
            chosen = busy
            if together:
                together = _alike(t, busy) & _alike(q, busy)
                if together:
                    chosen = y == tl.min(tl.where(busy, y, LAST))
            of_t = (t > 0) & (t <= bound)
            of_q = (q > 0) & (q <= bound_pred)
            _add_runs(
                sums, boxes, row_t, of_t & chosen, together, q > 0, p_fixed, power_fixed, v_fixed, length, x, y,
                height, K, AXES, SQUARED, GAMMA, BOXES, CENTERS,
            )  # fmt: skip
            if SOFT:
                tl.atomic_max(peaks + row_t, peak, mask=of_t & (q == 0), sem="relaxed")
            if SIDES == 2:
                _add_runs(
                    sums, boxes, row_q, of_q & chosen, together, t > 0, p_fixed, power_fixed, v_fixed, length, x, y,
                    height, K, AXES, SQUARED, GAMMA, BOXES, CENTERS,
                )  # fmt: skip
            if PAIRS and any_of(of_t & of_q):
                key = (t - 1).to(tl.int64) * m + q - 1
                used = slots_used(dense + plane * COLUMNS, n, m, capacity)
                if used == pairs_of(n, m):
                    tl.store(slots + plane * capacity + key, key, mask=of_t & of_q)
                else:
                    insert(slots + plane * capacity, key, used, of_t & of_q)


@triton.jit
def _alike(ids, busy):
    """Whether the ids of all busy lanes are the same."""
    largest = tl.max(tl.where(busy, ids, 0))
    return tl.min(tl.where(busy, ids, largest)) == largest


@triton.jit
def _add(pointer, value, mask, together):
    """Add values to sums, TOGETHER those of all lanes in one."""
    if together:
        value = tl.sum(value) + value * 0
    tl.atomic_add(pointer, value, mask=mask, sem="relaxed")


@triton.jit
def _raise(pointer, value, busy, mask, together):
    """Raise maxima to values, likewise."""
    if together:
        value = tl.max(tl.where(busy, value, NOWHERE)) + value * 0
    tl.atomic_max(pointer, value, mask=mask, sem="relaxed")


@triton.jit
def _add_runs(
    sums, boxes, row, mask, together, shared, p, power, v, length, x, y, height,
    K: tl.constexpr, AXES: tl.constexpr, SQUARED: tl.constexpr, GAMMA: tl.constexpr, BOXES: tl.constexpr,
    CENTERS: tl.constexpr,
):  # fmt: skip
    """Add runs of pixels from (y, x) on to their rows: features, number, coordinates and boxes."""
    to = sums + row * (2 * K + 1 + AXES)
    half = to + tl.where(shared, K, 0)
    _add(half, p, mask, together)
    if SQUARED:
        _add(half + 1, power, mask, together)
    if GAMMA >= 0:
        _add(half + K - 1, v, mask, together)
    number = length.to(tl.int64)
    _add(to + 2 * K, tl.where(shared, number << 32, number), mask, together)
    for axis in tl.static_range(AXES):
        low = x if axis == AXES - 1 else y if AXES == 2 else y % height if axis == 1 else y // height
        high = low + length - 1 if axis == AXES - 1 else low
        if CENTERS:
            _add(to + 2 * K + 1 + axis, ((low + high) * number) >> 1, mask, together)
        if BOXES:
            box = boxes + row * (2 * AXES) + 2 * axis
            _raise(box, -low, length > 0, mask, together)
            _raise(box + 1, high, length > 0, mask, together)


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
    counts, sums, linked, dense, slots, owners,
    planes, depth, height, width, bound, bound_pred, capacity, size_z, size_y, size_x, groups,
    K: tl.constexpr, AXES: tl.constexpr, CENTERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over the partners of every row; and no owner for any pixel that a centre box will cover."""
    program = tl.program_id(0)
    plane = (program // groups).to(tl.int64)
    group = program % groups
    n, m = counts_of(counts, plane, planes, bound, bound_pred, 2)
    W: tl.constexpr = 2 * K + 1 + AXES
    used = slots_used(dense + plane * COLUMNS, n, m, capacity)
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
