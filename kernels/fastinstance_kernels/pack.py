"""The first pass of a loss: the masks of both sides as bits, and the sums over whole planes.

The image is read here and where `accumulate` finds foreground; all that labels reads the bits.
"""

# Compile-time parameters are annotated tl.constexpr and take Python values; launch options are no parameters.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

import triton
import triton.language as tl

from .losses import features, pointwise
from .words import WORD, cuts_of, heads_of, image_tile, is_foreground

COLUMNS = tl.constexpr(8)
"""Columns of the sums of a tile: Σ P·G, Σ P^k, Σ G, Σ v, |Ω|, poison, Σ P^k and Σ v where G = 0 (blob loss)."""


@triton.jit
def wide(value):
    """Half types as float32; no arithmetic is done on them."""
    return value if value.dtype == tl.float64 else value.to(tl.float32)


# Where a width and the images are multiples of 16, four pixels are loaded at a time: a sixth of the instructions less.
@triton.jit(do_not_specialize=["rows", "row_words", "row_tiles", "planes", "threshold"])
def pack(
    values, target, predicted, valid, masks, heads, partial,
    threshold, planes, rows, width, row_words, row_tiles,
    LOGITS: tl.constexpr, GIVEN: tl.constexpr, PREDICTED: tl.constexpr, VALID: tl.constexpr, SIDES: tl.constexpr,
    SUMS: tl.constexpr, SQUARED: tl.constexpr, GAMMA: tl.constexpr, POSITIVES_ONLY: tl.constexpr,
    BLOB: tl.constexpr, BLOB_SQUARED: tl.constexpr, BLOB_GAMMA: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One [ROWS, WORD] tile of one plane, slices one below the other.

    GIVEN: `target` holds ids; a run ends where the id changes. PREDICTED: the predicted mask is given and not
    `values >= threshold`. A gamma below 0 stands for no pointwise part.
    """
    program = tl.program_id(0)
    plane, _, y, column = image_tile(1, row_words, row_tiles, ROWS)
    pixels = plane * rows * width
    lane = tl.arange(0, WORD)[None, :]
    x = column * WORD + lane
    inside = (y < rows) & (x < width)
    offset = pixels + y * width + x

    value = wide(tl.load(values + offset, mask=inside, other=0.0))
    ids = tl.load(target + offset, mask=inside, other=0)
    keep = inside
    if VALID:
        keep = inside & (tl.load(valid + offset, mask=inside, other=0) != 0)
    positive = keep & is_foreground(ids, 0.0, False)
    word = tl.sum(positive.to(tl.int32) << lane, axis=1, keep_dims=True)
    head = heads_of(word)
    if GIVEN:
        head = head | cuts_of(target, offset, ids, positive, lane)
    words = (plane * rows + y) * row_words + column
    tl.store(masks + words, word, mask=y < rows)
    tl.store(heads + words, head, mask=y < rows)
    if SIDES == 2:
        if PREDICTED:
            found = keep & (tl.load(predicted + offset, mask=inside, other=0) != 0)
        else:
            found = keep & (value >= threshold)
        word = tl.sum(found.to(tl.int32) << lane, axis=1, keep_dims=True)
        words += planes.to(tl.int64) * rows * row_words
        tl.store(masks + words, word, mask=y < rows)
        tl.store(heads + words, heads_of(word), mask=y < rows)

    place = tl.arange(0, COLUMNS)
    sums = tl.where(place == 5, tl.sum(tl.where(keep, value - value, 0.0)), 0.0).to(tl.float64)
    sums = tl.where(place == 4, tl.sum(keep.to(tl.int32)), sums)
    sums = tl.where(place == 2, tl.sum(positive.to(tl.int32)), sums)
    if SUMS or BLOB:
        wrong, cost, p = features(value, positive, LOGITS)
        if SUMS:
            power = p * p if SQUARED else p
            sums = tl.where(place == 0, tl.sum(tl.where(positive, p, 0.0)), sums)
            sums = tl.where(place == 1, tl.sum(tl.where(keep, power, 0.0)), sums)
            if GAMMA >= 0:
                counted = positive if POSITIVES_ONLY else keep
                sums = tl.where(place == 3, tl.sum(tl.where(counted, pointwise(wrong, cost, GAMMA), 0.0)), sums)
        if BLOB:
            outside = keep & ~positive
            power = p * p if BLOB_SQUARED else p
            sums = tl.where(place == 6, tl.sum(tl.where(outside, power, 0.0)), sums)
            if BLOB_GAMMA >= 0:
                sums = tl.where(place == 7, tl.sum(tl.where(outside, pointwise(wrong, cost, BLOB_GAMMA), 0.0)), sums)
    tl.store(partial + program.to(tl.int64) * COLUMNS + place, sums)
