"""The gradient: a coefficient for every row of the tables, then one pass over the pixels that looks them up.

    base  float [planes, BASE]                of every pixel, by whether G = 1
    rows  float [rows, 2, K]              of the pixels of an instance that the other side does not have, then has

A pixel's gradient is the sum over its features of dφ/dx times the coefficients of its plane, of its instance on either
side: a gather, without atomics.
"""

# Compile-time parameters are annotated tl.constexpr and take Python values; launch options are no parameters.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

import triton
import triton.language as tl

from .losses import MISSED as MISSED_COST
from .losses import channel_slopes, features, form_slopes, joint_sums, joint_upstream, pointwise_slope, slopes
from .pack import COLUMNS, wide
from .tables import area_of, areas_of, counts_of, first_row, peak_index, weight_of
from .terms import (
    DRAWN,
    FIXED_D,
    HIT,
    PARTS,
    PULL_GT,
    PULL_PRED,
    SLOPE,
    STRAY,
    WEIGHED,
    WEIGHT_GT,
    WEIGHT_PRED,
    center_sums,
    inverse_sums,
    load_exact,
    load_nearest,
    row_sums,
)
from .words import WORD, any_of, image_tile, instances_at

BASE = tl.constexpr(8)
"""Columns of `base`: ∂/∂p where G = 1, where G = 0; the same for p², v of the pixel term; v of blob loss, NaN or 0."""


@triton.jit
def _upstream(
    to_total, to_terms, term, weight, plane, planes, inside,
    TOTAL: tl.constexpr, TERMS: tl.constexpr, AVERAGED: tl.constexpr, NONE: tl.constexpr,
):  # fmt: skip
    """Derivative by the value of a term in a plane or a block of them, without averages over instances; float64.

    AVERAGED: the term is averaged over planes.
    """
    at = plane if NONE else plane * 0
    result = (plane * 0).to(tl.float64)
    if TOTAL:
        result += weight * tl.load(to_total + at, mask=inside, other=0.0).to(tl.float64)
    if TERMS:
        first = term * planes if NONE else term
        result += tl.load(to_terms + first + at, mask=inside, other=0.0).to(tl.float64)
    return result / planes if AVERAGED else result


@triton.jit(
    do_not_specialize=[
        "scale_v", "planes", "channels", "bound", "bound_pred", "groups",
        "seg", "instance_gt", "instance_pred", "center", "false_gt", "false_pred", "proximity", "missed_weight",
    ],
    do_not_specialize_on_alignment=["to_total", "to_terms"],
)  # fmt: skip
def coefficients(
    to_total, to_terms, counts, sums, linked, dense, whole, omega, nearest, owned, back, planar, entries,
    upstream, base, rows,
    scale_v, planes, channels, bound, bound_pred, groups,
    seg, instance_gt, instance_pred, center, false_gt, false_pred, proximity, missed_weight,
    TOTAL: tl.constexpr, TERMS: tl.constexpr, AVERAGE: tl.constexpr, REDUCTION: tl.constexpr, BY_PRED: tl.constexpr,
    BY_SIZE: tl.constexpr, SOFT: tl.constexpr, SUMMED: tl.constexpr, WHOLE: tl.constexpr,
    SEG: tl.constexpr, SEG_SQUARED: tl.constexpr, CATEGORICAL: tl.constexpr, INVERSE: tl.constexpr,
    FORM: tl.constexpr, SQUARED: tl.constexpr, GAMMA: tl.constexpr, DICE: tl.constexpr,
    CENTER: tl.constexpr, CENTER_SQUARED: tl.constexpr, CENTER_GAMMA: tl.constexpr,
    K: tl.constexpr, AXES: tl.constexpr, SIDES: tl.constexpr, OWN: tl.constexpr, FALSES: tl.constexpr,
    APART: tl.constexpr, BOXES: tl.constexpr, CENTERS: tl.constexpr, BACK: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """First `planes · groups` programs: the rows of a plane. The others: the planes of a block of images."""
    W: tl.constexpr = 2 * K + 1 + AXES
    NONE: tl.constexpr = REDUCTION == "none"
    MEAN: tl.constexpr = REDUCTION == "mean"
    program = tl.program_id(0)
    if program >= planes * groups:
        image = (program - planes * groups) * BLOCK + tl.arange(0, BLOCK)
        inside = image * channels < planes
        c = 0
        while c < channels:
            plane = image * channels + c
            to_seg = _upstream(to_total, to_terms, 0, seg, plane, planes, inside, TOTAL, TERMS, MEAN, NONE)
            tl.store(upstream + plane, to_seg, mask=inside)
            c += 1
        tl.debug_barrier()
        zero = tl.zeros([BLOCK], tl.float64)
        if len(SEG) > 0 and not INVERSE:
            joint = joint_sums(whole, omega, image, inside, channels)
            total = joint_upstream(upstream, image, inside, channels)
        c = 0
        while c < channels:
            plane = image * channels + c
            to = base + plane * BASE
            spoil = tl.load(dense + plane * COLUMNS + 5, mask=inside, other=0.0)
            in_p, out_p, by_power, by_v, out_power, out_v = zero, zero, zero, zero, zero, zero
            if SIDES > 0:
                n = tl.load(counts + plane, mask=inside, other=0)
                n = tl.minimum(n, bound).to(tl.float64)
                spoil += tl.load(planar + plane * PARTS + DRAWN, mask=inside, other=0.0) * 0
            if INVERSE:
                weighed = tl.load(planar + plane * PARTS + WEIGHED, mask=inside, other=0.0)
                to_seg = tl.load(upstream + plane, mask=inside, other=0.0)
                intersection, both, _, outside = inverse_sums(weighed, whole, omega, plane, n, inside)
                denominator = both + SEG[8]
                out_p = to_seg * outside * (2 * intersection + SEG[4]) / (denominator * denominator)
            elif len(SEG) > 0:
                by_i, by_p, by_v = channel_slopes(
                    whole, omega, upstream, joint, total, image, inside, c, channels, SEG, CATEGORICAL
                )  # fmt: skip
                if SEG_SQUARED:
                    by_power = by_p
                    in_p = by_i
                else:
                    in_p = by_i + by_p
                    out_p = by_p
            out_power = by_power
            if SIDES == 1 and OWN:
                pixels = tl.load(omega + plane, mask=inside, other=1.0)
                to_blob = _upstream(
                    to_total, to_terms, 1, instance_gt, plane, planes, inside, TOTAL, TERMS, False, NONE
                )  # fmt: skip
                to_blob = to_blob / tl.maximum(n, 1.0)
                if MEAN:
                    to_blob = to_blob / tl.maximum(tl.load(entries), 1.0)
                slope = to_blob * tl.load(planar + plane * PARTS + SLOPE, mask=inside, other=0.0)
                if SQUARED:
                    out_power += slope
                else:
                    out_p += slope
                out_v = to_blob * n * (FORM[0] + FORM[1]) / tl.maximum(pixels, 1.0)
            tl.store(to, in_p + spoil, mask=inside)
            tl.store(to + 1, out_p + spoil, mask=inside)
            tl.store(to + 2, by_power, mask=inside)
            tl.store(to + 3, out_power, mask=inside)
            tl.store(to + 4, by_v, mask=inside)
            tl.store(to + 5, out_v, mask=inside)
            c += 1
    elif SIDES > 0:
        plane = (program // groups).to(tl.int64)
        group = program % groups
        n, m = counts_of(counts, plane, planes, bound, bound_pred, SIDES)
        pixels = tl.load(omega + plane)
        planar += plane * PARTS
        entries_gt = tl.load(planar + WEIGHT_GT) if BY_SIZE else tl.maximum(n, 1).to(tl.float64)
        entries_pred = tl.load(planar + WEIGHT_PRED) if BY_SIZE else tl.maximum(m, 1).to(tl.float64)
        to_gt = tl.zeros([], tl.float64)
        to_pred = to_gt
        push = to_gt
        pull = to_gt
        to_missed = to_gt
        to_false = to_gt
        if OWN:
            by_v = (FORM[0] + FORM[1]) / tl.maximum(pixels, 1.0)
            ACROSS: tl.constexpr = AVERAGE == "instance" and MEAN and SIDES == 2
            BLOB: tl.constexpr = SIDES == 1
            averaged: tl.constexpr = MEAN and AVERAGE != "instance" and not BLOB
            to_gt = _upstream(
                to_total, to_terms, 1, instance_gt, plane, planes, True, TOTAL, TERMS, averaged, NONE
            )  # fmt: skip
            if BLOB and MEAN:
                to_gt = to_gt / tl.maximum(tl.load(entries), 1.0)
            to_gt = to_gt / (tl.load(entries) if ACROSS else entries_gt)
            if not BLOB:
                to_pred = _upstream(
                    to_total, to_terms, 2, instance_pred, plane, planes, True, TOTAL, TERMS, averaged, NONE
                )  # fmt: skip
                to_pred = to_pred / (tl.load(entries + 1) if ACROSS else entries_pred if BY_PRED else entries_gt)
            if BOXES:
                push = _upstream(to_total, to_terms, 6, proximity, plane, planes, True, TOTAL, TERMS, MEAN, NONE)
                if not SUMMED:
                    push = 2 * push * (tl.load(planar + PULL_PRED) - tl.load(planar + PULL_GT))
                pull = push if SUMMED else -push
        if FALSES:
            to_missed = (
                _upstream(to_total, to_terms, 4, false_gt, plane, planes, True, TOTAL, TERMS, MEAN, NONE) / entries_gt
            )
            to_missed = tl.where(n > 0, to_missed, 0.0)
            to_false = (
                _upstream(to_total, to_terms, 5, false_pred, plane, planes, True, TOTAL, TERMS, MEAN, NONE)
                / entries_pred
            )
        if CENTERS:
            to_center = _upstream(to_total, to_terms, 3, center, plane, planes, True, TOTAL, TERMS, MEAN, NONE)
            one = tl.zeros([1], tl.float64)  # as a block of one
            map_hit, map_power, map_drawn, map_v = center_sums(
                tl.load(planar + DRAWN) + one, tl.load(planar + HIT) + one, tl.load(planar + STRAY) + one
            )
            center_i, center_p, center_v = form_slopes(
                map_hit, map_power, map_drawn, map_v, pixels + one, CENTER
            )  # fmt: skip

        for side in tl.static_range(SIDES):
            count = n if side == 0 else m
            first = group * BLOCK
            while first < tl.maximum(count, 1):
                local = first + tl.arange(0, BLOCK)
                inside = local < tl.maximum(count, 1)
                real = local < count
                row = first_row(plane, planes, bound, bound_pred, side == 1) + local
                counted = weight_of(sums + row * W, real, K, BY_SIZE)
                hit, total, power, number, v = row_sums(
                    sums, linked, dense + plane * COLUMNS, row, inside, scale_v,
                    side == 0, SIDES == 1, WHOLE, SQUARED, GAMMA, K, AXES,
                )  # fmt: skip
                alone_p = tl.zeros([BLOCK], tl.float64)
                shared_p, by_power, alone_power, alone_v, shared_v = alone_p, alone_p, alone_p, alone_p, alone_p
                if OWN:
                    weight = counted * (to_gt if side == 0 else to_pred)
                    if BOXES:
                        weight += (pull if side == 0 else push) * load_nearest(nearest, row, inside, WIDE)
                    by_i, by_power, _ = form_slopes(hit, power, number, v, pixels + alone_p, FORM)
                    by_power = weight * by_power
                    shared_v = weight * by_v
                    shared_p = weight * by_i
                    if not SQUARED:
                        shared_p += by_power
                        alone_p += by_power
                if WHOLE and side == 0:  # what is missed is seen like the rest
                    alone_p = shared_p
                    alone_power = by_power
                    alone_v = shared_v
                elif SIDES == 2 and side == 0:  # a missed pixel is masked out
                    alone_p = alone_p * 0
                elif SIDES == 2:
                    alone_power = by_power
                    alone_v = shared_v
                if FALSES:
                    if WHOLE and side == 0:
                        hit, total, _, number, v = row_sums(
                            sums, linked, dense + plane * COLUMNS, row, inside, scale_v,
                            True, False, False, SQUARED, GAMMA, K, AXES,
                        )  # fmt: skip
                    by_i, by_p, _ = form_slopes(hit, total, number, v, pixels + alone_p * 0, DICE)
                    weight = tl.where(real, counted * (to_missed if side == 0 else to_false), 0.0)
                    shared_p += weight * (by_i + by_p)
                    if side == 1:
                        alone_p += weight * by_p
                    if SOFT:
                        _, shared = areas_of(sums + row * W, real, K)
                        alone = real & (shared == 0)
                        soft = tl.where(alone, weight * missed_weight, 0.0)
                        if side == 1:
                            alone_p += soft / area_of(sums + row * W, real, K)
                if SIDES == 1:
                    alone_p = shared_p
                    alone_power = by_power
                    alone_v = shared_v
                elif side == 1:
                    # The pixels outside of the target are also seen by the ground-truth instances that m touches.
                    if BACK > 0:
                        partners = back + (plane * bound_pred + local) * BACK
                        if FALSES:
                            alone_p += to_missed * load_exact(partners + (2 * OWN if APART else 0), inside)
                        if OWN:
                            seen = to_gt * load_exact(partners, inside)
                            if BOXES:
                                seen += pull * load_exact(partners + 2 * (OWN + APART), inside)
                            if GAMMA >= 0:
                                partners += 2 * (OWN + APART) + 2 * BOXES
                                seen_v = to_gt * tl.load(partners, mask=inside, other=0).to(tl.float64)
                                if BOXES:
                                    far = tl.load(partners + 1, mask=inside, other=0).to(tl.float64) / FIXED_D
                                    seen_v += pull * far
                                alone_v += by_v * seen_v
                            if SQUARED:
                                alone_power += seen
                            else:
                                alone_p += seen
                    if CENTERS:
                        stray = tl.load(owned + (plane * bound_pred + local) * 2, mask=real, other=0).to(tl.float64)
                        on = tl.load(owned + (plane * bound_pred + local) * 2 + 1, mask=real, other=0).to(tl.float64)
                        amplitude = center_i * on + center_p * (2 if CENTER_SQUARED else 1) * (on + stray)
                        if CENTER_GAMMA >= 0:
                            amplitude += center_v * stray * (CENTER_GAMMA * MISSED_COST)
                        if CENTER_GAMMA == 0:
                            amplitude -= center_v * on
                        amplitude = tl.where(real, to_center * amplitude / area_of(sums + row * W, real, K), 0.0)
                        alone_p += amplitude
                        shared_p += amplitude
                if INVERSE and side == 0:
                    to_seg = _upstream(to_total, to_terms, 0, seg, plane, planes, True, TOTAL, TERMS, MEAN, NONE)
                    intersection, both, share, _ = inverse_sums(
                        tl.load(planar + WEIGHED), whole, omega, plane, n.to(tl.float64), True
                    )
                    denominator = both + SEG[8]
                    slope = (2 * intersection + SEG[4]) / (denominator * denominator) - 2 / denominator
                    to_p = to_seg * slope * share / area_of(sums + row * W, real, K)
                    alone_p += to_p
                    shared_p += to_p
                if SOFT and side == 0:  # a missed instance shares no pixel: its place holds what its peak gets as well
                    shared_p = tl.where(alone, -soft, shared_p)
                to = rows + row * (2 * K)
                tl.store(to, alone_p, mask=inside)
                tl.store(to + K, shared_p, mask=inside)
                if SQUARED:
                    tl.store(to + 1, alone_power, mask=inside)
                    tl.store(to + K + 1, by_power, mask=inside)
                if GAMMA >= 0:
                    tl.store(to + K - 1, alone_v, mask=inside)
                    tl.store(to + 2 * K - 1, shared_v, mask=inside)
                first += groups * BLOCK


@triton.jit(
    do_not_specialize=["planes", "rows", "row_words", "row_tiles", "pixels", "blocks", "bound", "bound_pred"],
)
def gradient(
    values, masks, heads, valid, parents, block_starts, peaks, base, coefficients, result,
    planes, rows, width, row_words, row_tiles, pixels, blocks, bound, bound_pred,
    LOGITS: tl.constexpr, VALID: tl.constexpr, SEG: tl.constexpr, SEG_SQUARED: tl.constexpr, SEG_GAMMA: tl.constexpr,
    POSITIVES_ONLY: tl.constexpr, SQUARED: tl.constexpr, GAMMA: tl.constexpr, K: tl.constexpr, SIDES: tl.constexpr,
    SOFT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One [ROWS, WORD] tile of ∂loss/∂values."""
    plane, _, y, column = image_tile(1, row_words, row_tiles, ROWS)
    lane = tl.arange(0, WORD)[None, :]
    x = column * WORD + lane
    inside = (y < rows) & (x < width)
    word = y * row_words + column
    words = rows.to(tl.int64) * row_words
    offset = plane * rows * width + y * width + x
    value = wide(tl.load(values + offset, mask=inside, other=0.0))
    target = tl.load(masks + plane * words + word, mask=y < rows, other=0)
    positive = (target >> lane & 1) != 0
    base += plane * BASE

    _, _, p = features(value, positive, LOGITS)
    by_p = tl.where(positive, tl.load(base), tl.load(base + 1)) + p * 0.0
    by_power = p * 0.0
    if SEG_SQUARED or SQUARED:
        by_power = tl.where(positive, tl.load(base + 2), tl.load(base + 3)) + p * 0.0
    slope = p * 0.0
    if SEG_GAMMA >= 0:
        by_v = pointwise_slope(value, positive, LOGITS, SEG_GAMMA) * tl.load(base + 4)
        slope = tl.where(positive, by_v, 0.0) if POSITIVES_ONLY else by_v
    if GAMMA >= 0:
        by_v = p * 0.0
        if SIDES == 1:
            by_v = tl.where(positive, 0.0, tl.load(base + 5)) + by_v
    if SIDES > 0:
        other = planes.to(tl.int64) + plane
        predicted = target & 0
        if SIDES == 2:
            predicted = tl.load(masks + other * words + word, mask=y < rows, other=0)
        if any_of((target | predicted) != 0):
            for side in tl.static_range(SIDES):
                own = target if side == 0 else predicted
                image = plane if side == 0 else other
                head = tl.load(heads + image * words + word, mask=y < rows, other=0)
                ids = instances_at(own, head, word, lane, parents + image * pixels, block_starts + image * blocks)
                shared = ((predicted if side == 0 else target) >> lane & 1) != 0
                row = first_row(plane, planes, bound, bound_pred, side == 1) + ids - 1
                at = coefficients + row * (2 * K) + tl.where(shared, K, 0)
                mine = (ids > 0) & (ids <= (bound if side == 0 else bound_pred))
                by_p += tl.load(at, mask=mine, other=0.0)
                if SOFT and side == 0:
                    peak = peak_index(tl.load(peaks + row, mask=mine, other=-1)) == y * width + x
                    by_p += tl.load(at + K, mask=mine & peak, other=0.0)
                if SQUARED:
                    by_power += tl.load(at + 1, mask=mine, other=0.0)
                if GAMMA >= 0:
                    by_v += tl.load(at + K - 1, mask=mine, other=0.0)
    if GAMMA >= 0:
        slope += by_v * pointwise_slope(value, positive, LOGITS, GAMMA)
    if SEG_SQUARED or SQUARED:
        by_p += by_power * (2 * p)
    slope += by_p * slopes(value, positive, LOGITS)
    if VALID:
        slope = tl.where(tl.load(valid + offset, mask=inside, other=0) != 0, slope, 0.0)
    tl.store(result + offset, slope, mask=inside)
