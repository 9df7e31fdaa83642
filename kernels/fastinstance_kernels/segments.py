"""Sums over the segments of a map, what a loss makes of each segment, and the gradient.

A map has an id at every pixel: 1..K of its plane for a segment, such as a component or the region nearest to one, and
0 for none. One or two maps lie on the same values, *side* 0 and 1. Map number s · planes + p is that of plane p on side
s; its rows are numbered by id, row 0 included. [rows] are those of all maps: `bound` rows for each map of side 0, then
`bound_pred` for each of side 1.

    sums   int64 [rows, 2 K + 1]       as in `tables`: K features outside of the split, then inside; numbers of pixels
    peaks  int64 [rows]                `tables.peak_key` of the most likely pixel
    flags  int32 [planes]              not 0 where the plane's results are NaN
    parts  float64 [maps, groups, PARTS]

The split is the target, or on side 1 the other map; without either, all is outside. There are three kinds of results,
summed over the segments of a map:

    "form"      the separable loss of each segment; the whole plane is one where there is none
    "weighted"  w Σp with w = (|n| + OFFSET)^-POWER, p outside of the split
    "peak"      -log of the largest probability

Everything that programs share is an integer and every update commutes: results are bitwise the same on every run.
"""

# Compile-time parameters are annotated tl.constexpr and take Python values; launch options are no parameters.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .engine import Loss, Plan, as_text, fields_of
from .losses import features, form_slopes, form_value, pointwise, pointwise_slope, power, slopes
from .pack import wide
from .tables import FIXED_P, LIMIT_P, LIMIT_V, NO_PEAK, area_of, areas_of, clear, fixed, peak_index, peak_key
from .words import WORD, any_of, image_tile, is_foreground

__all__ = ["PARTS", "Request", "Saved", "backward", "forward", "shapes"]

PARTS = tl.constexpr(4)
# Columns of `parts`, of a map: the sum of the results, the number of results, Σ w |n|, and Σp of row 0.
VALUE = tl.constexpr(0)
NUMBER = tl.constexpr(1)
SIZE = tl.constexpr(2)
REST = tl.constexpr(3)
MOST_ROWS = 2**30
"""Of a map: id and split share 32 bits."""


@triton.jit
def _first_row(number, planes, bound, bound_pred):
    """Row 0 of a map."""
    return tl.minimum(number, planes) * bound + tl.maximum(number - planes, 0) * bound_pred


@triton.jit
def _segments_of(counts, number, planes, bound, bound_pred):
    """Segments of a map, as far as the tables go."""
    return tl.minimum(tl.load(counts + number), tl.where(number < planes, bound, bound_pred) - 1)


@triton.jit(do_not_specialize=["planes", "bound", "bound_pred", "groups"])
def clear_rows(
    counts, sums, peaks, flags, planes, bound, bound_pred, groups,
    W: tl.constexpr, SIDES: tl.constexpr, PEAKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One of `groups` programs of a map: clear its share of the rows that will be used."""
    program = tl.program_id(0)
    number = (program // groups).to(tl.int64)
    group = program % groups
    first = _first_row(number, planes, bound, bound_pred)
    used = _segments_of(counts, number, planes, bound, bound_pred).to(tl.int64) + 1
    if PEAKS:
        clear(peaks + first, used, NO_PEAK, group, groups, BLOCK)
    else:
        clear(sums + first * W, used * W, 0, group, groups, BLOCK)
    if (group == 0) & (number < planes):
        over = tl.load(counts + number) >= bound
        if SIDES == 2:
            over = over | (tl.load(counts + planes + number) >= bound_pred)
        tl.store(flags + number, over.to(tl.int32))


@triton.jit
def _side_of_tile(
    segments, others, offset, keep, positive, side: tl.constexpr, TARGET: tl.constexpr
):  # fmt: skip
    """Ids of a side's map in a tile, and which pixels are inside of the split."""
    segment = tl.load((segments if side == 0 else others) + offset, mask=keep, other=0)
    if TARGET:
        return segment, positive
    elif side == 1:
        return segment, keep & (tl.load(segments + offset, mask=keep, other=0) > 0)
    else:
        return segment, keep & False


@triton.jit
def _tile(
    values, target, valid, rows, width, row_words, row_tiles,
    TARGET: tl.constexpr, VALID: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One [ROWS, WORD] tile: plane, index in it and in all, what of it is image and valid, G, and the values."""
    plane, _, y, column = image_tile(1, row_words, row_tiles, ROWS)
    x = column * WORD + tl.arange(0, WORD)[None, :]
    index = y * width + x
    offset = plane * rows * width + index
    image = (y < rows) & (x < width)
    keep = image
    if VALID:
        keep = image & (tl.load(valid + offset, mask=image, other=0) != 0)
    positive = keep
    if TARGET:
        positive = keep & is_foreground(tl.load(target + offset, mask=keep, other=0), 0.0, False)
    return plane, index, offset, image, keep, positive, wide(tl.load(values + offset, mask=keep, other=0.0))


_TILES = ("planes", "rows", "width", "row_words", "row_tiles", "bound", "bound_pred")


@triton.jit
def _columns_of(me, wrong, cost, p, scale_v, SQUARED: tl.constexpr, GAMMA: tl.constexpr, K: tl.constexpr):
    """What the pixels `me` of a tile add to a row: K features in fixed point and their number; and whether one of
    these does not fit.
    """
    place = tl.arange(0, 8)
    total, over = fixed(tl.sum(tl.where(me, p, 0.0)), FIXED_P, 256 * LIMIT_P)
    columns = tl.where(place == 0, total, tl.where(place == K, tl.sum(me.to(tl.int32)), 0).to(tl.int64))
    if SQUARED:
        total, above = fixed(tl.sum(tl.where(me, p * p, 0.0)), FIXED_P, 256 * LIMIT_P)
        columns = tl.where(place == 1, total, columns)
        over = over | above
    if GAMMA >= 0:
        v = pointwise(wrong, cost, GAMMA)
        total, above = fixed(tl.sum(tl.where(me, v, 0.0)), scale_v, LIMIT_V)
        columns = tl.where(place == K - 1, total, columns)
        over = over | above
    return columns, over


@triton.jit
def _add_to_row(sums, row, shared, columns, K: tl.constexpr):
    """Add the columns of a tile (features and pixels) to a row."""
    place = tl.arange(0, 8)
    at = tl.where(shared | (place == K), K, 0) + place
    columns = tl.where(shared & (place == K), columns << 32, columns)
    tl.atomic_add(sums + row * (2 * K + 1) + at, columns, mask=place <= K, sem="relaxed")


@triton.jit(do_not_specialize=["scale_v", *_TILES], do_not_specialize_on_alignment=["values", "target", "valid"])
def add_up(
    values, target, valid, segments, others, sums, peaks, flags,
    scale_v, planes, rows, width, row_words, row_tiles, bound, bound_pred,
    LOGITS: tl.constexpr, SQUARED: tl.constexpr, GAMMA: tl.constexpr, K: tl.constexpr, SIDES: tl.constexpr,
    TARGET: tl.constexpr, VALID: tl.constexpr, PEAKS: tl.constexpr, OUTSIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One [ROWS, WORD] tile: a turn for every id in it and half of the split. OUTSIDE: row 0 counts as well."""
    plane, index, offset, _, keep, positive, value = _tile(
        values, target, valid, rows, width, row_words, row_tiles, TARGET, VALID, ROWS
    )
    if any_of(keep & ~(value - value == 0)):
        tl.store(flags + plane, 1)
    wrong, cost, p = features(value, positive, LOGITS)
    if PEAKS:
        rank = peak_key(value, index)
    place = tl.arange(0, 8)
    for side in tl.static_range(SIDES):
        segment, split = _side_of_tile(segments, others, offset, keep, positive, side, TARGET)
        limit = bound if side == 0 else bound_pred
        first = _first_row(side * planes.to(tl.int64) + plane, planes, bound, bound_pred)
        seen = keep & (segment < limit)
        if any_of(keep & (segment >= limit)):
            tl.store(flags + plane, 1)
        if not OUTSIDE:
            seen = seen & (segment > 0)
        key = tl.where(seen, segment << 1 | split.to(tl.int32), -1)
        here = tl.max(key)
        # Ends: each turn takes a key off the tile.
        while here >= 0:
            me = key == here
            row = first + (here >> 1)
            if PEAKS:
                highest = tl.max(tl.where(me, rank, NO_PEAK)) + place * 0
                tl.atomic_max(peaks + row + place, highest, mask=place == 0, sem="relaxed")
            else:
                columns, over = _columns_of(me, wrong, cost, p, scale_v, SQUARED, GAMMA, K)
                if over:
                    tl.store(flags + plane, 1)
                _add_to_row(sums, row, (here & 1) != 0, columns, K)
            key = tl.where(me, -1, key)
            here = tl.max(key)


@triton.jit
def _load_row(
    sums, row, inside, scale_v, SQUARED: tl.constexpr, GAMMA: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """What a separable loss sees of some segments: Σ P·G, Σ P^k, Σ G, Σ v, |Ω|; float64."""
    at = sums + row * (2 * K + 1)
    hit = tl.load(at + K, mask=inside, other=0).to(tl.float64) / FIXED_P
    power_at = at + 1 if SQUARED else at
    total = tl.load(power_at, mask=inside, other=0) + tl.load(power_at + K, mask=inside, other=0)
    v = hit * 0.0
    if GAMMA >= 0:
        both = tl.load(at + K - 1, mask=inside, other=0) + tl.load(at + 2 * K - 1, mask=inside, other=0)
        v = both.to(tl.float64) / scale_v
    outer, inner = areas_of(at, inside, K)
    return hit, total.to(tl.float64) / FIXED_P, inner.to(tl.float64), v, (outer + inner).to(tl.float64)


@triton.jit
def _weight(sums, row, inside, OFFSET: tl.constexpr, POWER: tl.constexpr, K: tl.constexpr):
    """The weight of some segments, and their sizes."""
    size = area_of(sums + row * (2 * K + 1), inside, K).to(tl.float64)
    return power(1 / tl.where(inside, size + OFFSET, 1.0), POWER), size


@triton.jit(do_not_specialize=["scale_v", "planes", "pixels", "bound", "bound_pred", "groups"])
def evaluate(
    values, counts, sums, peaks, flags, parts, scale_v, planes, pixels, bound, bound_pred, groups,
    KIND: tl.constexpr, FORM: tl.constexpr, OFFSET: tl.constexpr, POWER: tl.constexpr, LOGITS: tl.constexpr,
    SQUARED: tl.constexpr, GAMMA: tl.constexpr, K: tl.constexpr, OUTSIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One of `groups` programs of a map: the results of its share of the rows, added up."""
    program = tl.program_id(0)
    number = (program // groups).to(tl.int64)
    group = program % groups
    plane = tl.where(number < planes, number, number - planes)
    first_row = _first_row(number, planes, bound, bound_pred)
    n = _segments_of(counts, number, planes, bound, bound_pred)
    total = tl.zeros([BLOCK], tl.float64)
    weights = tl.zeros([BLOCK], tl.float64)
    # Row 0 stands for the whole plane if it has no segment.
    first = (tl.minimum(n, 1) if KIND == "form" else 1) + group * BLOCK
    while first <= n:
        local = first + tl.arange(0, BLOCK)
        inside = local <= n
        row = first_row + local
        if KIND == "form":
            hit, both, number_of, v, omega = _load_row(sums, row, inside, scale_v, SQUARED, GAMMA, K)
            result = form_value(hit, both, number_of, v, omega, FORM)
        elif KIND == "weighted":
            weight, size = _weight(sums, row, inside, OFFSET, POWER, K)
            result = weight * tl.load(sums + row * (2 * K + 1), mask=inside, other=0).to(tl.float64) / FIXED_P
            weights += tl.where(inside, weight * size, 0.0)
        else:
            key = tl.load(peaks + row, mask=inside, other=NO_PEAK)
            index = peak_index(key)
            value = wide(tl.load(values + plane * pixels + index, mask=key != NO_PEAK, other=0.0))
            _, result, _ = features(value, inside, LOGITS)
        total += tl.where(inside, result.to(tl.float64), 0.0)
        first += groups * BLOCK

    place = tl.arange(0, PARTS)
    part = tl.where(place == VALUE, tl.sum(total), tl.where(place == SIZE, tl.sum(weights), 0.0))
    if group == 0:
        results = tl.maximum(n, 1) if KIND == "form" else n
        part = tl.where(place == NUMBER, results.to(tl.float64), part)
        if KIND == "weighted" and OUTSIDE:
            outside = tl.load(sums + first_row * (2 * K + 1)).to(tl.float64) / FIXED_P
            part = tl.where(place == REST, outside, part)
    spoilt = (tl.load(flags + plane) != 0) & (place == VALUE)
    tl.store(parts + program.to(tl.int64) * PARTS + place, tl.where(spoilt, float("nan"), part))


@triton.jit(do_not_specialize=["scale_v", "planes", "bound", "bound_pred", "groups"])
def segment_coefficients(
    upstream, counts, sums, coefficients, scale_v, planes, bound, bound_pred, groups,
    KIND: tl.constexpr, FORM: tl.constexpr, OFFSET: tl.constexpr, POWER: tl.constexpr, SQUARED: tl.constexpr,
    GAMMA: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One of `groups` programs of a map: what each pixel of a row, outside and inside of the split, gets."""
    program = tl.program_id(0)
    number = (program // groups).to(tl.int64)
    group = program % groups
    first_row = _first_row(number, planes, bound, bound_pred)
    n = _segments_of(counts, number, planes, bound, bound_pred)
    to_value = tl.load(upstream + number * PARTS + VALUE)
    first = group * BLOCK
    while first <= n:
        local = first + tl.arange(0, BLOCK)
        inside = local <= n
        row = first_row + local
        to = coefficients + row * (2 * K)
        if KIND == "form":
            hit, both, number_of, v, omega = _load_row(sums, row, inside, scale_v, SQUARED, GAMMA, K)
            by_hit, by_power, by_v = form_slopes(hit, both, number_of, v, omega, FORM)
            scale = tl.where((local > 0) | (n == 0), to_value, 0.0)
            by_p = by_power * (0.0 if SQUARED else 1.0)
            tl.store(to, tl.where(scale == 0, 0.0, scale * by_p), mask=inside)
            tl.store(to + K, tl.where(scale == 0, 0.0, scale * (by_hit + by_p)), mask=inside)
            if SQUARED:
                tl.store(to + 1, tl.where(scale == 0, 0.0, scale * by_power), mask=inside)
                tl.store(to + K + 1, tl.where(scale == 0, 0.0, scale * by_power), mask=inside)
            if GAMMA >= 0:
                tl.store(to + K - 1, scale * by_v, mask=inside)
                tl.store(to + 2 * K - 1, scale * by_v, mask=inside)
        else:
            weight, _ = _weight(sums, row, inside & (local > 0), OFFSET, POWER, K)
            to_rest = tl.load(upstream + number * PARTS + REST)
            tl.store(to, tl.where(local > 0, weight * to_value, to_rest), mask=inside)
            tl.store(to + 1, local * 0.0, mask=inside)
        first += groups * BLOCK


@triton.jit(do_not_specialize=[*_TILES], do_not_specialize_on_alignment=["values", "target", "valid", "result"])
def segment_gradient(
    values, target, valid, segments, others, flags, peaks, upstream, coefficients, result,
    planes, rows, width, row_words, row_tiles, bound, bound_pred,
    LOGITS: tl.constexpr, SQUARED: tl.constexpr, GAMMA: tl.constexpr, K: tl.constexpr, SIDES: tl.constexpr,
    TARGET: tl.constexpr, VALID: tl.constexpr, PEAKS: tl.constexpr, OUTSIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One [ROWS, WORD] tile of the derivative by the values: a gather, without atomics."""
    plane, index, offset, image, keep, positive, value = _tile(
        values, target, valid, rows, width, row_words, row_tiles, TARGET, VALID, ROWS
    )
    _, _, p = features(value, positive, LOGITS)
    slope = tl.where(tl.load(flags + plane) != 0, float("nan"), value * 0.0)
    for side in tl.static_range(SIDES):
        segment, split = _side_of_tile(segments, others, offset, keep, positive, side, TARGET)
        number = side * planes.to(tl.int64) + plane
        row = _first_row(number, planes, bound, bound_pred) + segment
        mine = keep & (segment < (bound if side == 0 else bound_pred))
        if not OUTSIDE:
            mine = mine & (segment > 0)
        if any_of(mine):
            if PEAKS:
                peak = mine & (peak_index(tl.load(peaks + row, mask=mine, other=-1)) == index)
                by_cost = pointwise_slope(value, mine, LOGITS, 0.0) * tl.load(upstream + number * PARTS + VALUE)
                slope += tl.where(peak, by_cost, 0.0).to(slope.dtype)
            else:
                at = coefficients + row * (2 * K) + tl.where(split, K, 0)
                by_p = tl.load(at, mask=mine, other=0.0)
                if SQUARED:
                    by_p += 2 * p * tl.load(at + 1, mask=mine, other=0.0)
                slope += by_p * slopes(value, positive, LOGITS)
                if GAMMA >= 0:
                    by_v = tl.load(at + K - 1, mask=mine, other=0.0)
                    slope += by_v * pointwise_slope(value, positive, LOGITS, GAMMA)
    tl.store(result + offset, tl.where(keep, slope, 0.0), mask=image)


class Request(NamedTuple):
    """What is asked of one call, besides the images."""

    kind: str  # "form", "weighted" or "peak"
    logits: bool
    connectivity: int  # of the components behind the maps
    given: bool  # the ids of side 0 come from outside, so that there may be any number of them
    max_instances: int | None
    loss: Loss = Loss()  # of "form"
    offset: float = 0.0  # of "weighted"
    power: float = 0.0
    outside: bool = False  # row 0 counts as well

    def encode(self) -> str:
        """As text: what an operator can take."""
        return as_text(tuple(self))

    @staticmethod
    @lru_cache(maxsize=256)
    def decode(text: str) -> Request:
        request = Request(*fields_of(text))
        return request._replace(loss=Loss(*request.loss))

    @property
    def features(self) -> int:
        return 1 + self.loss.squared + (self.loss.gamma >= 0)

    @property
    def peaks(self) -> bool:
        return self.kind == "peak"


class Saved(NamedTuple):
    """What the gradient needs of the forward pass."""

    sums: Tensor
    peaks: Tensor
    flags: Tensor


class _Layout(NamedTuple):
    """Sizes that follow from the shape of the images and the request."""

    plan: Plan
    sides: int
    bound: int  # rows of a map, row 0 included
    bound_pred: int

    @classmethod
    def of(cls, shape: tuple[int, ...], request: Request, sides: int) -> _Layout:
        plan = Plan.of(shape, request.connectivity, request.max_instances, request.given)
        return cls(plan, sides, *(min(bound + 1, MOST_ROWS) for bound in (plan.bound, plan.bound_pred)))

    @property
    def maps(self) -> int:
        return self.sides * self.plan.planes

    @property
    def rows(self) -> int:
        return self.plan.planes * (self.bound + (self.sides == 2) * self.bound_pred)

    @property
    def groups(self) -> int:
        return self.plan.groups(launch.cdiv(2048, self.sides), min(64, launch.cdiv(self.bound, 32)))

    @property
    def tiles(self) -> tuple[int, ...]:
        plan = self.plan
        return launch.programs(plan.planes, plan.tiles(launch.TILE_ROWS) * plan.row_words)

    @property
    def tile_arguments(self) -> tuple[int, ...]:
        plan = self.plan
        return (
            plan.planes, plan.rows, plan.width, plan.row_words, plan.tiles(launch.TILE_ROWS),
            self.bound, self.bound_pred,
        )  # fmt: skip


def shapes(request: Request, shape: tuple[int, ...], sides: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of each result of `forward`: `found`, then the fields of `Saved`."""
    layout = _Layout.of(shape, request, sides)
    return {
        "found": ((layout.maps, PARTS.value), torch.float64),
        "sums": (((not request.peaks) * layout.rows * (2 * request.features + 1),), torch.int64),
        "peaks": ((request.peaks * layout.rows,), torch.int64),
        "flags": ((layout.plan.planes,), torch.int32),
    }


def forward(
    values: Tensor,
    target: Tensor | None,
    valid: Tensor | None,
    segments: Tensor,
    others: Tensor | None,
    counts: Tensor,
    request: Request,
) -> tuple[Tensor, Saved]:
    """The sums over the segments of each map, and what `backward` needs.

    Args:
        values: `[planes, *S]`, 2D or 3D, contiguous float16, bfloat16, float32 or float64: logits or probabilities.
        target: `[planes, *S]` contiguous, of any real dtype: the split; None: see above.
        valid: `[planes, *S]` contiguous bool, or None: everywhere.
        segments: `[planes, *S]` contiguous int32, the map of side 0.
        others: the map of side 1, or None: there is none.
        counts: int32 `[maps]`, segments of each map.
        request: all else.

    Returns:
        found: float64 `[maps, 4]`: the sum of the results (NaN where a value is not finite, or there are more segments
            than rows), their number, Σ w |n|, and Σp of the pixels outside of all segments; the last two of "weighted".
        saved: for `backward`.
    """
    launch.check_device(values)
    sides = 1 if others is None else 2
    layout = _Layout.of(tuple(values.shape), request, sides)
    plan, loss, k, groups = layout.plan, request.loss, request.features, layout.groups

    kinds = shapes(request, tuple(values.shape), sides)
    saved = Saved(*(launch.empty(values, *kinds[name][0], dtype=kinds[name][1]) for name in Saved._fields))
    parts = launch.empty(values, layout.maps, groups, PARTS.value, dtype=torch.float64)
    grid = launch.programs(layout.maps, groups)
    bounds = layout.bound, layout.bound_pred, groups
    step = launch.Step("sums", request, values, target, valid, segments, others, counts)
    with torch.cuda.device_of(values):
        step(
            clear_rows, grid,
            counts, saved.sums, saved.peaks, saved.flags, plan.planes, *bounds,
            W=2 * k + 1, SIDES=sides, PEAKS=request.peaks, BLOCK=512, num_warps=1, **launch.ALL_REGISTERS,
        )  # fmt: skip
        step(
            add_up, layout.tiles,
            values, target, valid, segments, others, saved.sums, saved.peaks, saved.flags,
            plan.scale_v, *layout.tile_arguments,
            LOGITS=request.logits, SQUARED=loss.squared, GAMMA=loss.gamma, K=k, SIDES=sides,
            TARGET=target is not None, VALID=valid is not None, PEAKS=request.peaks, OUTSIDE=request.outside,
            ROWS=launch.TILE_ROWS, num_warps=1,
        )  # fmt: skip
        step(
            evaluate, grid,
            values, counts, saved.sums, saved.peaks, saved.flags, parts,
            plan.scale_v, plan.planes, plan.rows * plan.width, *bounds,
            KIND=request.kind, FORM=loss.form, OFFSET=request.offset, POWER=request.power, LOGITS=request.logits,
            SQUARED=loss.squared, GAMMA=loss.gamma, K=k, OUTSIDE=request.outside, BLOCK=32,
            num_warps=1, **launch.ALL_REGISTERS,
        )  # fmt: skip
    return parts.sum(1), saved


def backward(
    upstream: Tensor,
    values: Tensor,
    target: Tensor | None,
    valid: Tensor | None,
    segments: Tensor,
    others: Tensor | None,
    counts: Tensor,
    saved: Saved,
    request: Request,
) -> Tensor:
    """∂loss/∂values, of the dtype and shape of `values`, from the derivatives by `found`, contiguous."""
    sides = 1 if others is None else 2
    layout = _Layout.of(tuple(values.shape), request, sides)
    plan, loss, k, groups = layout.plan, request.loss, request.features, layout.groups
    real = torch.float64 if values.dtype == torch.float64 else torch.float32
    result = torch.empty_like(values)
    coefficients = launch.empty(values, (not request.peaks) * layout.rows * 2 * k, dtype=real)
    images = values, target, valid, segments, others, counts
    step = launch.Step("gradient of sums", request, *images, upstream, others=saved)
    with torch.cuda.device_of(values):
        if not request.peaks:
            step(
                segment_coefficients, launch.programs(layout.maps, groups),
                upstream, counts, saved.sums, coefficients,
                plan.scale_v, plan.planes, layout.bound, layout.bound_pred, groups,
                KIND=request.kind, FORM=loss.form, OFFSET=request.offset, POWER=request.power, SQUARED=loss.squared,
                GAMMA=loss.gamma, K=k, BLOCK=32, num_warps=1, **launch.ALL_REGISTERS,
            )  # fmt: skip
        step(
            segment_gradient, layout.tiles,
            values, target, valid, segments, others, saved.flags, saved.peaks, upstream, coefficients, result,
            *layout.tile_arguments,
            LOGITS=request.logits, SQUARED=loss.squared, GAMMA=loss.gamma, K=k, SIDES=sides,
            TARGET=target is not None, VALID=valid is not None, PEAKS=request.peaks, OUTSIDE=request.outside,
            ROWS=launch.TILE_ROWS, num_warps=2 if real == torch.float64 else 1,
        )  # fmt: skip
    return result
