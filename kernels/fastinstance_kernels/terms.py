"""From the tables to the terms: the loss of every instance, distances of boxes, centre maps, averages.

Sums come as integers, are worked on in float64, and are added up in a fixed order or in fixed point. In between, what
belongs to a row is kept in float32 (float64 for float64 input).

    losses  float [rows]                     L of Eqs. 2 and 3 (blob loss: of each ground-truth instance)
    slopes  float [target rows, OWN + APART] ∂L/∂Σ P^k, and the same of the false rate's Dice if that is another loss
    nearest int32 or int64 [rows]            least Distance-IoU loss to the other side, as the bits of a float
    owners  int32 [sides, planes, pixels]    smallest row whose centre box covers the pixel; written only under boxes
    owned   int32 [predicted rows, 2]        pixels of centre boxes outside and inside the true ones
    back    int64 [predicted rows, BACK]     sums over the partners, for the gradient: of the slopes, of
                                             D·∂L/∂Σ P^k and, if the loss is pointwise, of 1 and of D
    parts   float64 [planes, groups, PARTS]  this group's share of the sums over the instances of a plane
    planar  float64 [planes, PARTS]          the sums, for the gradient
"""

# Compile-time parameters are annotated tl.constexpr and take Python values; launch options are no parameters.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

import triton
import triton.language as tl

from .losses import MISSED as MISSED_COST
from .losses import channel_value, features, form_slopes, form_value, joint_sums
from .pack import COLUMNS, wide
from .tables import (
    FIXED_P,
    NO_PEAK,
    UNDRAWN,
    area_of,
    areas_of,
    box_pixel,
    center_of,
    counts_of,
    first_row,
    pair_at,
    peak_index,
    slots_used,
    weight_of,
)
from .words import any_of

FINE = tl.constexpr(2.0**60)
COARSE = tl.constexpr(2.0**20)
FIXED_D = tl.constexpr(2.0**31)
"""Unit of sums of distances, each at most 2 and of at most 2^31 pairs."""
SLACK = tl.constexpr(1e-5)
"""More than rounding does to a Distance-IoU loss, if coordinates are small."""
ROUNDING = tl.constexpr(3e-7)
"""More than float32 rounds of a coordinate, in a difference of two centres."""
PARTS = tl.constexpr(16)
TERMS = tl.constexpr(8)

# Columns of `parts` and `planar`.
SUM_GT = tl.constexpr(0)  # Σ weight · L over the target rows, then over the predicted ones
SUM_PRED = tl.constexpr(1)
PULL_GT = tl.constexpr(2)  # Σ D·L
PULL_PRED = tl.constexpr(3)
MISSED = tl.constexpr(4)  # Σ weight over missed and over false rows, with their soft terms
FALSE = tl.constexpr(5)
DRAWN = tl.constexpr(6)  # pixels of the true centre map, of the predicted one inside and outside of it
HIT = tl.constexpr(7)
STRAY = tl.constexpr(8)
SLOPE = tl.constexpr(9)  # Σ ∂L/∂Σ P^k over the target rows: what every pixel of the background gets in blob loss
WEIGHED = tl.constexpr(10)  # Σ over the target rows of Σp / |n|, for the inverse-weighted Dice
WEIGHT_GT = tl.constexpr(11)  # Σ weight over the target rows, then over the predicted ones, the artificial one included
WEIGHT_PRED = tl.constexpr(12)


@triton.jit
def _from_fixed(total, unit):
    return total.to(tl.float64) / unit


@triton.jit
def row_sums(
    sums, linked, dense, row, inside, scale_v,
    TARGET: tl.constexpr, BLOB: tl.constexpr, WHOLE: tl.constexpr, SQUARED: tl.constexpr, GAMMA: tl.constexpr,
    K: tl.constexpr, AXES: tl.constexpr,
):  # fmt: skip
    """What a loss sees of the masked pair of some rows: Σ P·G, Σ P, Σ P^k, Σ G, Σ v, all float64.

    Target rows are seen with the components that touch them, predicted rows with all instances that they touch (Eqs. 2
    and 3), blob rows with all that is outside of the target. WHOLE target rows are not masked where they are missed.
    """
    W: tl.constexpr = 2 * K + 1 + AXES
    alone = sums + row * W
    shared = alone + K
    area, hit = areas_of(alone, inside, K)
    inner = _from_fixed(tl.load(shared, mask=inside, other=0), FIXED_P)
    outer = _from_fixed(tl.load(alone, mask=inside, other=0), FIXED_P)
    power = inner * 0.0
    v = inner * 0.0
    if SQUARED:
        power = _from_fixed(tl.load(shared + 1, mask=inside, other=0), FIXED_P)
        outer_power = _from_fixed(tl.load(alone + 1, mask=inside, other=0), FIXED_P)
    if GAMMA >= 0:
        v = _from_fixed(tl.load(shared + K - 1, mask=inside, other=0), scale_v)
        outer_v = _from_fixed(tl.load(alone + K - 1, mask=inside, other=0), scale_v)
    if BLOB:
        inner += outer
        total = inner + tl.load(dense + 6)
        if SQUARED:
            power += outer_power + tl.load(dense + 6)
        if GAMMA >= 0:
            v += outer_v + tl.load(dense + 7)
        number = (area + hit).to(tl.float64)
    elif TARGET:
        if WHOLE:
            inner += outer
        total = inner + _from_fixed(tl.load(linked + row * K, mask=inside, other=0), FIXED_P)
        if SQUARED:
            if WHOLE:
                power += outer_power
            power += _from_fixed(tl.load(linked + row * K + 1, mask=inside, other=0), FIXED_P)
        if GAMMA >= 0:
            v += _from_fixed(tl.load(linked + row * K + K - 1, mask=inside, other=0), scale_v)
            v += outer_v if WHOLE else area.to(tl.float64) * MISSED_COST
        number = (area + hit).to(tl.float64)
    else:
        total = inner + outer
        if SQUARED:
            power += outer_power
        union = tl.load(linked + row * K, mask=inside, other=0)
        if GAMMA >= 0:
            v += outer_v + (union - hit).to(tl.float64) * MISSED_COST
        number = union.to(tl.float64)
    return inner, total, power if SQUARED else total, number, v


@triton.jit
def _ends(boxes, row, axis, AXES: tl.constexpr):
    """Lower and upper end [lower, upper) of the boxes of some rows along an axis, in pixels."""
    at = boxes + row * (2 * AXES) + 2 * axis
    return -tl.load(at), tl.load(at + 1) + 1


@triton.jit
def distance_iou(boxes, row_a, row_b, spacing_z, spacing_y, spacing_x, AXES: tl.constexpr, REAL: tl.constexpr):
    """1 - IoU + ρ²/τ² (Zheng et al. 2020) of the boxes of rows a and b, which broadcast; at least 0."""
    overlap, volume_a, volume_b, near, far = 1.0, 1.0, 1.0, 0.0, 0.0
    for axis in tl.static_range(AXES):
        spacing = spacing_x if axis == AXES - 1 else spacing_y if axis == AXES - 2 else spacing_z
        low_a, high_a = _ends(boxes, row_a, axis, AXES)
        low_b, high_b = _ends(boxes, row_b, axis, AXES)
        low_a, high_a = low_a.to(REAL) * spacing, high_a.to(REAL) * spacing
        low_b, high_b = low_b.to(REAL) * spacing, high_b.to(REAL) * spacing
        overlap = overlap * tl.maximum(tl.minimum(high_a, high_b) - tl.maximum(low_a, low_b), 0.0)
        volume_a = volume_a * (high_a - low_a)
        volume_b = volume_b * (high_b - low_b)
        apart = (low_a + high_a - low_b - high_b) * 0.5
        near = near + apart * apart
        across = tl.maximum(high_a, high_b) - tl.minimum(low_a, low_b)
        far = far + across * across
    return tl.maximum(1.0 - overlap / (volume_a + volume_b - overlap) + near / far, 0.0)


@triton.jit
def _may_be_nearer(
    boxes, nearest, row, others, spacing_z, spacing_y, spacing_x, AXES: tl.constexpr, REAL: tl.constexpr
):  # fmt: skip
    """Which boxes of a block may be nearer to one of another block than to all that they have been compared with.

    Along the first axis a box is `apart` from the centres of the others. Where that parts it from the others as well,
    ρ²/τ² is at least (apart / (apart + s))², s being the diagonal of a box with the longest side along each axis.
    `nearest` is what all programs have found so far. It only falls: an earlier value excludes less, never too much.
    """
    diagonal, apart, corner, parted = 0.0, 0.0, 0.0, False
    for axis in tl.static_range(AXES):
        spacing = spacing_x if axis == AXES - 1 else spacing_y if axis == AXES - 2 else spacing_z
        low, high = _ends(boxes, row, axis, AXES)
        other_low, other_high = _ends(boxes, others, axis, AXES)
        longest = tl.max(other_high - other_low)
        side = tl.maximum(high - low, longest).to(REAL) * spacing
        diagonal += side * side
        corner += high.to(REAL) * spacing
        if axis == 0:
            center, other_center = low + high, other_low + other_high  # twice
            twice = tl.maximum(tl.min(other_center) - center, center - tl.max(other_center))
            parted = twice > high - low + longest
            apart = twice.to(REAL) * (0.5 * spacing)
    least = tl.load(nearest + row, cache_modifier=".cg").to(REAL, bitcast=True)
    reach = apart + ROUNDING * corner + tl.sqrt(diagonal)
    apart = tl.maximum(apart - ROUNDING * corner, 0.0)
    return ~(parted & (apart * apart > (least - 1 + SLACK) * reach * reach))


@triton.jit
def _compare(
    boxes, nearest, pred, targets, first, n, spacing_z, spacing_y, spacing_x,
    AXES: tl.constexpr, REAL: tl.constexpr, BLOCK: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """Distances of a block of predicted rows to a block of the n target rows, for both, if any may be the least."""
    row = targets + tl.minimum(first + tl.arange(0, BLOCK), n - 1)
    hopeful = _may_be_nearer(boxes, nearest, pred, row, spacing_z, spacing_y, spacing_x, AXES, REAL)
    hopeful |= _may_be_nearer(boxes, nearest, row, pred, spacing_z, spacing_y, spacing_x, AXES, REAL)
    if any_of(hopeful):
        BITS: tl.constexpr = nearest.dtype.element_ty
        least = tl.full([BLOCK], float("inf"), REAL).to(BITS, bitcast=True)
        last = tl.minimum(first + BLOCK, n)
        while first < last:
            other = targets + tl.minimum(first + tl.arange(0, OTHERS)[None, :], n - 1)
            distance = distance_iou(
                boxes, tl.expand_dims(pred, 1), other, spacing_z, spacing_y, spacing_x, AXES, REAL
            )  # fmt: skip
            bits = distance.to(BITS, bitcast=True)  # in the order of the numbers, as these are at least 0
            least = tl.minimum(least, tl.min(bits, axis=1))
            tl.atomic_min(nearest + other, tl.min(bits, axis=0, keep_dims=True), sem="relaxed")
            first += OTHERS
        tl.atomic_min(nearest + pred, least, sem="relaxed")


@triton.jit(
    do_not_specialize=[
        "scale_v", "planes", "depth", "height", "width", "bound", "bound_pred", "size_z", "size_y", "size_x", "groups",
        "spacing_z", "spacing_y", "spacing_x",
    ]
)  # fmt: skip
def instances(
    counts, sums, linked, dense, boxes, losses, slopes, nearest, owners,
    scale_v, planes, depth, height, width, bound, bound_pred, size_z, size_y, size_x, groups,
    spacing_z, spacing_y, spacing_x,
    FORM: tl.constexpr, DICE: tl.constexpr, SQUARED: tl.constexpr, GAMMA: tl.constexpr, K: tl.constexpr,
    AXES: tl.constexpr, SIDES: tl.constexpr, OWN: tl.constexpr, APART: tl.constexpr, WHOLE: tl.constexpr,
    CENTERS: tl.constexpr, BOXES: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """One of `groups` programs of a plane: losses of its rows, their centre boxes, and box distances of its pairs.

    With one side it is blob loss. No pair of boxes is measured twice: it counts for both of its rows.
    """
    program = tl.program_id(0)
    plane = (program // groups).to(tl.int64)
    group = program % groups
    n, m = counts_of(counts, plane, planes, bound, bound_pred, SIDES)
    dense += plane * COLUMNS
    omega = tl.load(dense + 4)

    for side in tl.static_range(SIDES):
        count = n if side == 0 else m
        entries = tl.maximum(count, 1) if SIDES == 2 else count
        side_plane = side * planes.to(tl.int64) + plane
        first = group * BLOCK
        while first < entries:
            local = first + tl.arange(0, BLOCK)
            inside = local < entries
            row = first_row(plane, planes, bound, bound_pred, side == 1) + local
            if OWN or (APART and side == 0):
                hit, total, power, number, v = row_sums(
                    sums, linked, dense, row, inside, scale_v, side == 0, SIDES == 1, WHOLE, SQUARED, GAMMA, K, AXES
                )  # fmt: skip
                if OWN:
                    tl.store(losses + row, form_value(hit, power, number, v, omega, FORM), mask=inside)
                if side == 0:
                    if OWN:
                        _, by_power, _ = form_slopes(hit, power, number, v, omega, FORM)
                        tl.store(slopes + row * (OWN + APART), by_power, mask=inside)
                    if APART:
                        if WHOLE:
                            hit, total, _, number, v = row_sums(
                                sums, linked, dense, row, inside, scale_v, True, False, False, SQUARED, GAMMA, K, AXES
                            )  # fmt: skip
                        _, by_total, _ = form_slopes(hit, total, number, v, omega, DICE)
                        tl.store(slopes + row * (OWN + APART) + OWN, by_total, mask=inside)
            if CENTERS:
                real = local < count
                cz, cy, cx = center_of(sums + row * (2 * K + 1 + AXES), real, K, AXES)
                cell = 0
                while cell < size_z * size_y * size_x:
                    at, covered = box_pixel(cz, cy, cx, cell, depth, height, width, size_z, size_y, size_x)
                    owner = owners + side_plane * depth * height * width + at
                    tl.atomic_min(owner, local, mask=real & covered, sem="relaxed")
                    cell += 1
            first += groups * BLOCK

    if BOXES:
        n = tl.maximum(n, 1)
        m = tl.maximum(m, 1)
        across = tl.cdiv(m, BLOCK).to(tl.int64)
        down = tl.cdiv(n, BLOCK)
        tile = group.to(tl.int64)
        while tile < down * across:
            # Ids are in raster order: the blocks in the same place of both sides come first, then those around them.
            column = tile % across
            turn = (tile // across).to(tl.int32)
            offset = tl.where(turn % 2 == 0, down - turn // 2, turn // 2 + 1)
            first = ((column * down // across).to(tl.int32) + offset) % down * BLOCK
            local = tl.minimum(column.to(tl.int32) * BLOCK + tl.arange(0, BLOCK), m - 1)
            _compare(
                boxes, nearest, first_row(plane, planes, bound, bound_pred, True) + local,
                first_row(plane, planes, bound, bound_pred, False), first, n,
                spacing_z, spacing_y, spacing_x, AXES, tl.float64 if WIDE else tl.float32, BLOCK, OTHERS,
            )  # fmt: skip
            tile += groups


@triton.jit
def load_nearest(nearest, row, inside, WIDE: tl.constexpr):
    """The least distance of some rows, float64."""
    bits = tl.load(nearest + row, mask=inside, other=0)
    return bits.to(tl.float64 if WIDE else tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def _add_exact(pointer, value, mask):
    """Add to a sum of two integers, coarse and fine, that loses nothing above 2^-61 and holds 2^42."""
    coarse = (value * COARSE).to(tl.int64)
    fine = ((value - coarse.to(tl.float64) / COARSE) * FINE).to(tl.int64)
    tl.atomic_add(pointer, coarse, mask=mask, sem="relaxed")
    tl.atomic_add(pointer + 1, fine, mask=mask, sem="relaxed")


@triton.jit
def load_exact(pointer, mask):
    coarse = tl.load(pointer, mask=mask, other=0).to(tl.float64) / COARSE
    return coarse + tl.load(pointer + 1, mask=mask, other=0).to(tl.float64) / FINE


@triton.jit
def _column(columns, which, values):
    """`columns` with the sum of some values added to one of them."""
    return columns + tl.where(tl.arange(0, PARTS) == which, tl.sum(values.to(tl.float64)), 0.0)


@triton.jit
def _pixels_owned(
    owners, target_owners, valid, row_sums, local, real, depth, height, width, size_z, size_y, size_x,
    K: tl.constexpr, AXES: tl.constexpr, VALID: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """Pixels of their centre boxes that some rows own: all, and those on the true map."""
    cz, cy, cx = center_of(row_sums, real, K, AXES)
    cz, cy, cx = tl.expand_dims(cz, 1), tl.expand_dims(cy, 1), tl.expand_dims(cx, 1)
    owned = local * 0
    hit = local * 0
    first = 0
    while first < size_z * size_y * size_x:
        cell = first + tl.arange(0, CELLS)[None, :]
        at, covered = box_pixel(cz, cy, cx, cell, depth, height, width, size_z, size_y, size_x)
        covered = covered & tl.expand_dims(real, 1) & (cell < size_z * size_y * size_x)
        on = tl.load(target_owners + at, mask=covered, other=UNDRAWN) != UNDRAWN
        counted = tl.load(owners + at, mask=covered, other=UNDRAWN) == tl.expand_dims(local, 1)
        if VALID:
            counted = counted & (tl.load(valid + at, mask=covered, other=0) != 0)
        owned += tl.sum(counted.to(tl.int32), axis=1)
        hit += tl.sum((counted & on).to(tl.int32), axis=1)
        first += CELLS
    return owned, hit


@triton.jit(
    do_not_specialize=[
        "planes", "channels", "depth", "height", "width", "bound", "bound_pred", "capacity",
        "size_z", "size_y", "size_x", "groups",
        "seg", "instance_gt", "instance_pred", "center", "false_gt", "false_pred", "proximity", "missed_weight",
    ],
    do_not_specialize_on_alignment=["values"],
)  # fmt: skip
def gather(
    values, counts, sums, losses, slopes, nearest, owners, valid, peaks, slots, owned, back, parts,
    dense, whole, omega, flags, ticket, planar, entries, found, total,
    planes, channels, depth, height, width, bound, bound_pred, capacity, size_z, size_y, size_x, groups,
    seg, instance_gt, instance_pred, center, false_gt, false_pred, proximity, missed_weight,
    LOGITS: tl.constexpr, SEG: tl.constexpr, CENTER: tl.constexpr, CATEGORICAL: tl.constexpr, INVERSE: tl.constexpr,
    AVERAGE: tl.constexpr, REDUCTION: tl.constexpr, BY_PRED: tl.constexpr, BY_SIZE: tl.constexpr,
    SOFT: tl.constexpr, SUMMED: tl.constexpr,
    K: tl.constexpr, AXES: tl.constexpr, SIDES: tl.constexpr, OWN: tl.constexpr, APART: tl.constexpr,
    GAMMA: tl.constexpr, BOXES: tl.constexpr, CENTERS: tl.constexpr, VALID: tl.constexpr, BACK: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One of `groups` programs of a plane: its share of the sums over instances, and over the partners of each.

    The program that ends last turns the sums into the terms.
    """
    program = tl.program_id(0)
    plane = (program // groups).to(tl.int64)
    group = program % groups
    n, m = counts_of(counts, plane, planes, bound, bound_pred, SIDES)
    pixels = depth.to(tl.int64) * height * width
    if VALID:
        valid += plane * pixels
    W: tl.constexpr = 2 * K + 1 + AXES
    columns = tl.zeros([PARTS], tl.float64)
    for side in tl.static_range(SIDES):
        count = n if side == 0 else m
        listed = tl.maximum(count, 1) if SIDES == 2 else count
        side_plane = side * planes.to(tl.int64) + plane
        first = group * BLOCK
        while first < listed:
            local = first + tl.arange(0, BLOCK)
            inside = local < listed
            real = local < count
            row = first_row(plane, planes, bound, bound_pred, side == 1) + local
            weight = weight_of(sums + row * W, real, K, BY_SIZE)
            _, shared = areas_of(sums + row * W, real, K)
            alone = real & (shared == 0)
            count_as = tl.where(alone, weight, 0.0)
            if SOFT and side == 0:
                key = tl.load(peaks + row, mask=alone, other=0)
                tl.store(peaks + row, NO_PEAK, mask=real & ~alone)
                peak = wide(tl.load(values + plane * pixels + peak_index(key), mask=alone, other=0.0))
                lacking, _, _ = features(peak, local >= 0, LOGITS)
                count_as += count_as * missed_weight * lacking
            elif SOFT:
                p = _from_fixed(tl.load(sums + row * W, mask=alone, other=0), FIXED_P)
                count_as += count_as * missed_weight * p / area_of(sums + row * W, real, K)
            columns = _column(columns, MISSED + side, count_as)
            if BY_SIZE:
                columns = _column(columns, WEIGHT_GT + side, tl.where(inside, weight, 0.0))
            if OWN:
                loss = tl.load(losses + row, mask=inside, other=0.0).to(tl.float64)
                columns = _column(columns, SUM_GT + side, weight * loss)
                if BOXES:
                    columns = _column(columns, PULL_GT + side, load_nearest(nearest, row, inside, WIDE) * loss)
            if side == 0 and INVERSE:
                p = tl.load(sums + row * W, mask=real, other=0) + tl.load(sums + row * W + K, mask=real, other=0)
                columns = _column(columns, WEIGHED, _from_fixed(p, FIXED_P) / area_of(sums + row * W, real, K))
            if SIDES == 1 and OWN:
                columns = _column(columns, SLOPE, tl.load(slopes + row, mask=inside, other=0.0))
            if CENTERS:
                drawn, hit = _pixels_owned(
                    owners + side_plane * pixels, owners + plane * pixels, valid, sums + row * W, local, real,
                    depth, height, width, size_z, size_y, size_x, K, AXES, VALID, 16,
                )  # fmt: skip
                if side == 0:
                    columns = _column(columns, DRAWN, drawn)
                else:
                    columns = _column(columns, HIT, hit)
                    columns = _column(columns, STRAY, drawn - hit)
                    tl.store(owned + (plane * bound_pred + local) * 2, drawn - hit, mask=real)
                    tl.store(owned + (plane * bound_pred + local) * 2 + 1, hit, mask=real)
            first += groups * BLOCK
    tl.store(parts + program.to(tl.int64) * PARTS + tl.arange(0, PARTS), columns)

    if BACK > 0:
        used = slots_used(dense + plane * COLUMNS, n, m, capacity)
        first_slot = group.to(tl.int64) * BLOCK
        while first_slot < used:
            at = first_slot + tl.arange(0, BLOCK)
            there, row_t, row_q = pair_at(slots + plane * capacity, at, n, m, at < used)
            row_t += first_row(plane, planes, bound, bound_pred, False)
            to = back + (plane * bound_pred + row_q) * BACK
            KEPT: tl.constexpr = OWN + APART
            weight = weight_of(sums + row_t * W, there, K, BY_SIZE)
            for i in tl.static_range(KEPT):
                slope = tl.load(slopes + row_t * KEPT + i, mask=there, other=0.0)
                _add_exact(to + 2 * i, weight * slope.to(tl.float64), there)
            if BOXES:
                distance = load_nearest(nearest, row_t, there, WIDE)
                slope = tl.load(slopes + row_t * KEPT, mask=there, other=0.0).to(tl.float64)
                _add_exact(to + 2 * KEPT, distance * slope, there)
            if GAMMA >= 0:
                to += 2 * KEPT + 2 * BOXES
                tl.atomic_add(to, weight.to(tl.int64), mask=there, sem="relaxed")
                if BOXES:
                    tl.atomic_add(to + 1, (distance * FIXED_D).to(tl.int64), mask=there, sem="relaxed")
            first_slot += groups * BLOCK

    tl.debug_barrier()  # the stores of all threads come before the ticket
    if tl.atomic_add(ticket, 1, sem="acq_rel") == planes * groups - 1:
        tl.debug_barrier()
        _finish(
            counts, parts, dense, whole, omega, flags, planar, entries, found, total,
            planes, channels, bound, bound_pred, groups,
            seg, instance_gt, instance_pred, center, false_gt, false_pred, proximity,
            SEG, CENTER, CATEGORICAL, INVERSE, AVERAGE, REDUCTION, BY_PRED, BY_SIZE, SUMMED, SIDES, OWN, BOXES, CENTERS,
            BLOCK,
        )  # fmt: skip


@triton.jit
def _pick(columns, which):
    """One column of [planes, PARTS]."""
    return tl.sum(tl.where(tl.arange(0, PARTS)[None, :] == which, columns, 0.0), axis=1)


@triton.jit
def center_sums(drawn, hit, stray):
    """Σ P·G, Σ P^k, Σ G, Σ v of pairs of centre maps, from the columns of `planar`."""
    return hit, hit + stray, drawn, (stray + drawn - hit) * MISSED_COST


@triton.jit
def inverse_sums(weighed, whole, omega, plane, number, inside):
    """Σ w·P·G and Σ w·(P + G) of the inverse-weighted Dice, and the weights times |n| inside, and outside."""
    sum_pg = tl.load(whole + plane * 4, mask=inside, other=0.0)
    sum_p = tl.load(whole + plane * 4 + 1, mask=inside, other=0.0)
    sum_g = tl.load(whole + plane * 4 + 2, mask=inside, other=0.0)
    pixels = tl.load(omega + plane, mask=inside, other=1.0)
    share = pixels / (number + 1)
    outside = share / tl.maximum(pixels - sum_g, 1.0)
    intersection = share * weighed
    return intersection, intersection + number * share + outside * (sum_p - sum_pg), share, outside


@triton.jit
def _put(found, term, plane, planes, values, inside, result, REDUCTION: tl.constexpr):
    """Values per plane of one term: stored for "none", else their sum added to `result`, one number per term."""
    if REDUCTION == "none":
        tl.store(found + term * planes + plane, values, mask=inside)
    return result + tl.where(tl.arange(0, TERMS) == term, tl.sum(tl.where(inside, values, 0.0)), 0.0)


@triton.jit
def _finish(
    counts, parts, dense, whole, omega, flags, planar, entries, found, total,
    planes, channels, bound, bound_pred, groups,
    seg, instance_gt, instance_pred, center, false_gt, false_pred, proximity,
    SEG: tl.constexpr, CENTER: tl.constexpr, CATEGORICAL: tl.constexpr, INVERSE: tl.constexpr,
    AVERAGE: tl.constexpr, REDUCTION: tl.constexpr, BY_PRED: tl.constexpr, BY_SIZE: tl.constexpr, SUMMED: tl.constexpr,
    SIDES: tl.constexpr, OWN: tl.constexpr, BOXES: tl.constexpr, CENTERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All planes: sums over instances -> terms, and what the gradient needs of them."""
    place = tl.arange(0, PARTS)[None, :]
    result = tl.zeros([TERMS], tl.float64)  # sums over planes
    zero = tl.zeros([], tl.float64)
    entries_gt, entries_pred, sum_gt, sum_pred, images_with = zero, zero, zero, zero, zero
    first = 0
    while first < planes:
        plane = first + tl.arange(0, BLOCK)
        inside = plane < planes
        spoil = tl.load(dense + plane * COLUMNS + 5, mask=inside, other=0.0)  # 0 or NaN
        if SIDES > 0:
            spoil += tl.where(tl.load(flags + plane, mask=inside, other=0) != 0, float("nan"), 0.0)
            columns = tl.zeros([BLOCK, PARTS], tl.float64)
            group = 0
            while group < groups:
                part = parts + (plane[:, None].to(tl.int64) * groups + group) * PARTS + place
                columns += tl.load(part, mask=inside[:, None], other=0.0, cache_modifier=".cg")
                group += 1
            columns += spoil[:, None]
            tl.store(planar + plane[:, None].to(tl.int64) * PARTS + place, columns, mask=inside[:, None])
            n = tl.minimum(tl.load(counts + plane, mask=inside, other=0), bound).to(tl.float64)
            if INVERSE:
                intersection, both, _, _ = inverse_sums(_pick(columns, WEIGHED), whole, omega, plane, n, inside)
                value = 1 - (2 * intersection + SEG[4]) / (both + SEG[8])
                result = _put(found, 0, plane, planes, value, inside, result, REDUCTION)
            if SIDES == 1:
                rows_gt = tl.maximum(n, 1.0)
                images_with += tl.sum(tl.where(inside & (n > 0), zero + 1, zero))
                if OWN:
                    result = _put(found, 1, plane, planes, _pick(columns, SUM_GT) / rows_gt, inside, result, REDUCTION)
            else:
                m = tl.minimum(tl.load(counts + planes + plane, mask=inside, other=0), bound_pred).to(tl.float64)
                rows_gt = _pick(columns, WEIGHT_GT) if BY_SIZE else tl.maximum(n, 1.0)
                rows_pred = _pick(columns, WEIGHT_PRED) if BY_SIZE else tl.maximum(m, 1.0)
                if OWN:
                    gt = _pick(columns, SUM_GT)
                    pred = _pick(columns, SUM_PRED)
                    by = rows_pred if BY_PRED else rows_gt
                    result = _put(found, 1, plane, planes, gt / rows_gt, inside, result, REDUCTION)
                    result = _put(found, 2, plane, planes, pred / by, inside, result, REDUCTION)
                    sum_gt += tl.sum(tl.where(inside, gt, 0.0))
                    sum_pred += tl.sum(tl.where(inside, pred, 0.0))
                    entries_gt += tl.sum(tl.where(inside, rows_gt, 0.0))
                    entries_pred += tl.sum(tl.where(inside, by, 0.0))
                    if BOXES:
                        pull = _pick(columns, PULL_PRED) - _pick(columns, PULL_GT)
                        push = _pick(columns, PULL_PRED) + _pick(columns, PULL_GT) if SUMMED else pull * pull
                        result = _put(found, 6, plane, planes, push, inside, result, REDUCTION)
                if CENTERS:
                    hit, power, drawn, v = center_sums(
                        _pick(columns, DRAWN), _pick(columns, HIT), _pick(columns, STRAY)
                    )
                    pixels = tl.load(omega + plane, mask=inside, other=1.0)
                    value = form_value(hit, power, drawn, v, pixels, CENTER)
                    result = _put(found, 3, plane, planes, value, inside, result, REDUCTION)
                missed = _pick(columns, MISSED) / rows_gt
                false = _pick(columns, FALSE) / rows_pred
                result = _put(found, 4, plane, planes, missed, inside, result, REDUCTION)
                result = _put(found, 5, plane, planes, false, inside, result, REDUCTION)
        first += BLOCK

    if len(SEG) > 0 and not INVERSE:
        first = 0
        while first * channels < planes:
            image = first + tl.arange(0, BLOCK)
            inside = image * channels < planes
            joint = joint_sums(whole, omega, image, inside, channels)
            c = 0
            while c < channels:
                value = channel_value(whole, omega, joint, image, inside, c, channels, SEG, CATEGORICAL)
                result = _put(found, 0, image * channels + c, planes, value, inside, result, REDUCTION)
                c += 1
            first += BLOCK

    term = tl.arange(0, TERMS)
    weights = tl.where(term == 0, seg, tl.where(term == 1, instance_gt, tl.where(term == 2, instance_pred, 0.0)))
    weights = tl.where(term == 3, center, tl.where(term == 4, false_gt, weights))
    weights = tl.where(term == 5, false_pred, tl.where(term == 6, proximity, weights)).to(tl.float64)
    if SIDES == 1:
        tl.store(entries, images_with)
    else:
        tl.store(entries, entries_gt)
        tl.store(entries + 1, entries_pred)
    if REDUCTION == "none":
        tl.debug_barrier()
        first = 0
        while first < planes:
            plane = first + tl.arange(0, BLOCK)
            inside = plane < planes
            sum_of = tl.zeros([BLOCK], tl.float64)
            for i in tl.static_range(7):
                weight = tl.sum(tl.where(term == i, weights, 0.0))
                value = tl.load(found + i * planes + plane, mask=inside, other=0.0).to(tl.float64)
                sum_of += tl.where(weight != 0, weight * value, 0.0)
            tl.store(total + plane, sum_of, mask=inside)
            first += BLOCK
    else:
        if REDUCTION == "mean":
            result = result / planes
            if AVERAGE == "instance" and SIDES == 2 and OWN:
                result = tl.where(term == 1, sum_gt / entries_gt, tl.where(term == 2, sum_pred / entries_pred, result))
            if SIDES == 1:
                result = tl.where(term == 1, result * planes / tl.maximum(images_with, 1.0), result)
        tl.store(found + term, result, mask=term < 7)
        tl.store(total, tl.sum(tl.where(weights != 0, weights * result, 0.0)))
