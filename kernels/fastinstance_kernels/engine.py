"""Launchers of the losses: ten kernels forward and two backward, whatever the images hold."""

# Launch options are no parameters of the kernels.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import launch
from .backward import BASE, coefficients, gradient
from .given import given_forest
from .label import label_forest
from .pack import COLUMNS, pack
from .tables import accumulate, link, prepare, slots_for
from .terms import PARTS, gather, instances

__all__ = ["Request", "Saved", "backward", "forward", "shapes"]


class Loss(NamedTuple):
    """A separable loss: its reduction as `losses.FORM` numbers, and the features it needs."""

    form: tuple[float, ...] = ()
    squared: bool = False
    gamma: float = -1.0  # of the pointwise part; below 0 there is none


_text_of = lru_cache(maxsize=256)(json.dumps)


@torch.compiler.assume_constant_result
def as_text(fields: tuple[object, ...]) -> str:
    return _text_of(fields)


def fields_of(text: str) -> list[Any]:
    """What `as_text` was given, with tuples for its sequences."""

    def frozen(value: object) -> object:
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    return [*map(frozen, json.loads(text))]


class Request(NamedTuple):
    """What is asked of one call, besides the images."""

    channels: int
    logits: bool
    categorical: bool
    threshold: float  # of the values, logits or probabilities
    connectivity: int
    seg: Loss | None  # None: the term is not wanted
    own: Loss | None  # instance terms, proximity; in blob loss, the loss of a blob
    center: Loss | None
    dice: tuple[float, ...]  # the form of the Dice loss, of which the false rates have their derivative
    inverse: bool  # the pixel loss is the inverse-weighted Dice
    blob: bool
    false_rates: bool
    proximity: bool
    average: str
    reduction: str
    by_pred: bool
    by_size: bool  # what an instance counts in a mean: its pixels, or 1
    soft: bool  # missed and false instances have soft terms
    missed_weight: float  # of these
    whole: bool  # a ground-truth instance is not masked where nothing is predicted
    summed: bool  # the proximity is a sum, not a squared difference
    center_size: tuple[int, ...]
    spacing: tuple[float, ...]
    max_instances: int | None
    differentiable: bool

    def encode(self) -> str:
        """As text: what an operator can take."""
        return as_text(tuple(self))

    @staticmethod
    @lru_cache(maxsize=256)
    def decode(text: str) -> Request:
        request = Request(*fields_of(text))
        losses = {name: Loss(*getattr(request, name)) for name in ("seg", "own", "center") if getattr(request, name)}
        return request._replace(**losses)

    @property
    def sides(self) -> int:
        """2: target and prediction are labelled; 1: the target; 0: neither."""
        if self.blob:
            return 1
        if self.own or self.center or self.false_rates:
            return 2
        return 1 if self.inverse else 0

    @property
    def features(self) -> int:
        return 1 + (self.own is not None and (self.own.squared + (self.own.gamma >= 0)))

    @property
    def apart(self) -> bool:
        """Whether the false rates have their derivative of another loss than the instance terms."""
        other = self.own is None or self.own.squared or self.own.form != self.dice or self.whole
        return self.false_rates and other

    @property
    def slopes(self) -> int:
        """Losses of which the derivative by Σ P^k is kept for the partners."""
        return (self.own is not None) + self.apart

    @property
    def back(self) -> int:
        """Columns of the sums over partners that the gradient needs."""
        if not self.differentiable or self.sides < 2:
            return 0
        pointwise = self.own is not None and self.own.gamma >= 0
        return 2 * self.slopes + 2 * self.proximity + pointwise * (1 + self.proximity)


class Saved(NamedTuple):
    """What the gradient needs of the forward pass; the kernels' files say what is in each."""

    masks: Tensor
    heads: Tensor
    parents: Tensor
    block_starts: Tensor
    counts: Tensor
    sums: Tensor
    linked: Tensor
    dense: Tensor
    whole: Tensor
    omega: Tensor
    nearest: Tensor
    peaks: Tensor
    owned: Tensor
    back: Tensor
    planar: Tensor
    entries: Tensor


class Plan(NamedTuple):
    """Sizes that follow from the shape of the images and the settings; all else is left to the kernels."""

    planes: int
    depth: int
    height: int
    width: int
    axes: int
    bound: int  # rows of the tables: instances of a plane, in the target and in the prediction
    bound_pred: int
    capacity: int
    key: torch.dtype  # of a pair

    @classmethod
    @lru_cache(maxsize=256)
    def of(cls, shape: tuple[int, ...], connectivity: int, max_instances: int | None, given: bool) -> Plan:
        planes, *size = shape
        depth, height, width = size if len(size) == 3 else (1, *size)
        pixels = depth * height * width
        launch.check_plane(depth * height, width, shape)
        quarters = math.prod((length + 1) // 2 for length in size)
        most = {8: quarters, 26: quarters, 18: 2 * quarters}.get(connectivity, (pixels + 1) // 2)
        limit = pixels if max_instances is None else max_instances
        bound, bound_pred = min(pixels if given else most, pixels, limit), min(most, pixels, limit)
        capacity = slots_for(min(bound * bound_pred, pixels))
        key = torch.int32 if bound * bound_pred < 2**31 else torch.int64
        return cls(planes, depth, height, width, len(size), bound, bound_pred, capacity, key)

    @property
    def rows(self) -> int:
        return self.depth * self.height

    @property
    def row_words(self) -> int:
        return launch.cdiv(self.width, launch.WORD)

    @property
    def words(self) -> int:
        return self.rows * self.row_words

    @property
    def blocks(self) -> int:
        return launch.cdiv(self.words, launch.BLOCK_WORDS)

    def table_rows(self, sides: int) -> int:
        """Of all planes."""
        return self.planes * ((sides > 0) * self.bound + (sides > 1) * self.bound_pred)

    def tiles(self, rows: int) -> int:
        return launch.cdiv(self.rows, rows)

    def groups(self, programs: int, most: int) -> int:
        """Programs per plane, so that there are about so many in all."""
        return max(1, min(launch.cdiv(programs, self.planes), most))

    @property
    def scale_v(self) -> float:
        """Unit of Σ v: 62 bits hold a plane of tiles with 256 sums, one for every pixel, at the limit of each."""
        tiles = self.tiles(launch.TILE_ROWS) * self.row_words
        return 2.0 ** min(32, 28 - math.ceil(math.log2(tiles)))


@lru_cache(maxsize=256)
def shapes(
    request: Request, shape: tuple[int, ...], dtype: torch.dtype, given: bool
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of each result of `forward`: `found`, `total`, then the fields of `Saved`."""
    plan = Plan.of(shape, request.connectivity, request.max_instances, given)
    sides, k = request.sides, request.features
    planes, rows = plan.planes, plan.table_rows(sides)
    pred_rows = planes * plan.bound_pred
    out = torch.float64 if dtype == torch.float64 else torch.float32
    integer = torch.int64 if dtype == torch.float64 else torch.int32
    per_plane = request.reduction == "none"
    both = max(sides, 1) * planes
    return {
        "found": ((7, planes) if per_plane else (7,), out),
        "total": ((planes,) if per_plane else (), out),
        "masks": ((both * plan.words,), torch.int32),
        "heads": ((both * plan.words,), torch.int32),
        "parents": ((sides * planes * plan.words * launch.WORD,), torch.int32),
        "block_starts": ((sides * planes * plan.blocks,), torch.int32),
        "counts": ((sides * planes,), torch.int32),
        "sums": ((rows * (2 * k + 1 + plan.axes),), torch.int64),
        "linked": (((sides == 2) * rows * k,), torch.int64),
        "dense": ((planes * COLUMNS.value,), torch.float64),
        "whole": ((planes * 4,), torch.float64),
        "omega": ((planes,), torch.float64),
        "nearest": ((request.proximity * rows,), integer),
        "peaks": ((request.soft * planes * plan.bound,), torch.int64),
        "owned": ((2 * (request.center is not None) * pred_rows,), torch.int32),
        "back": ((pred_rows * request.back,), torch.int64),
        "planar": ((planes * PARTS.value,), torch.float64),
        "entries": ((2,), torch.float64),
    }


def forward(
    values: Tensor,
    target: Tensor,
    predicted: Tensor | None,
    valid: Tensor | None,
    weights: Sequence[float],
    request: Request,
    *,
    given: bool,
) -> tuple[Tensor, Tensor, Saved]:
    """The terms, their weighted sum, and what `backward` needs.

    Args:
        values: `[planes, *S]`, 2D or 3D, contiguous float16, bfloat16, float32 or float64: logits or probabilities.
        target: `[planes, *S]` contiguous, of any real dtype: foreground, or with `given` ids of instances (int32).
        predicted: `[planes, *S]` contiguous bool, or None: where `values >= request.threshold`.
        valid: `[planes, *S]` contiguous bool, or None: everywhere.
        weights: of the seven terms in `total`.
        request: all else.
        given: whether `target` holds ids.

    Returns:
        found: `[7]`, or `[7, planes]` for `reduction="none"`: the terms in the order of `InstanceTerms`; those that
            are not wanted are not written. Blob loss: the pixel term, then the blob term.
        total: scalar or `[planes]`, the weighted sum.
        saved: for `backward`.
    """
    launch.check_device(values)
    plan = Plan.of(tuple(values.shape), request.connectivity, request.max_instances, given)
    results = {
        name: launch.empty(values, *shape, dtype=dtype)
        for name, (shape, dtype) in shapes(request, tuple(values.shape), values.dtype, given).items()
    }
    found, total = results.pop("found"), results.pop("total")
    saved = Saved(**results)
    planes, sides, k = plan.planes, request.sides, request.features
    own, seg = request.own or Loss(), request.seg or Loss()
    depth, height, width = plan.depth, plan.height, plan.width
    pixels = plan.rows * width
    center_size = (1,) * (3 - len(request.center_size)) + request.center_size
    spacing = (1.0,) * (3 - len(request.spacing)) + request.spacing
    wide = values.dtype == torch.float64
    centers, boxes = request.center is not None, request.proximity
    threshold = ctypes.c_float(request.threshold).value
    if wide and sides == 2 and predicted is None:  # a number reaches a kernel as float32
        predicted = values >= request.threshold

    dense_tiles = plan.tiles(launch.DENSE_ROWS) * plan.row_words
    partial = launch.empty(values, planes, dense_tiles, COLUMNS.value, dtype=torch.float64)
    flags = launch.empty(values, planes, dtype=torch.int32)
    ticket = launch.empty(values, 1, dtype=torch.int32)
    rows = plan.table_rows(sides)
    box = launch.empty(values, boxes * rows * 2 * plan.axes, dtype=torch.int32)
    # Of the given ids first, of the pairs later.
    slot_bytes = (
        plan.capacity * plan.key.itemsize if sides == 2 else 0,
        8 * slots_for(pixels) if given and sides else 0,
    )
    memory = launch.empty(values, planes * launch.cdiv(max(slot_bytes), 8), dtype=torch.int64)
    slots = memory.view(plan.key)
    real = torch.float64 if wide else torch.float32
    losses = launch.empty(values, (request.own is not None) * rows, dtype=real)
    slope = launch.empty(values, (sides > 0) * planes * plan.bound * request.slopes, dtype=real)
    owners = launch.empty(values, centers * 2 * planes * pixels, dtype=torch.int32)

    step = launch.Step("terms", request, values, target, predicted, valid, given)
    with torch.cuda.device_of(values):
        step(
            pack, launch.programs(planes, dense_tiles),
            values, target, predicted, valid, saved.masks, saved.heads, partial,
            threshold, planes, plan.rows, width, plan.row_words, plan.tiles(launch.DENSE_ROWS),
            LOGITS=request.logits, GIVEN=given, PREDICTED=predicted is not None, VALID=valid is not None, SIDES=sides,
            SUMS=request.seg is not None, SQUARED=seg.squared, GAMMA=seg.gamma,
            POSITIVES_ONLY=request.categorical,
            BLOB=request.blob, BLOB_SQUARED=own.squared, BLOB_GAMMA=own.gamma,
            ROWS=launch.DENSE_ROWS, num_warps=1,
        )  # fmt: skip
        block_counts = saved.counts
        if sides > 0:
            if given:
                given_forest(step, target, saved.heads, saved.parents, memory, planes, values.shape[1:])
            _, block_counts, _ = label_forest(
                step, saved.masks, saved.heads, sides * planes, values.shape[1:], request.connectivity,
                parents=saved.parents, first_given=planes if given else 0,
            )  # fmt: skip
        groups = plan.groups(1024, launch.cdiv(plan.bound, 64))
        step(
            prepare, launch.programs(planes, groups),
            partial, saved.dense, saved.whole, saved.omega, block_counts, saved.block_starts, saved.counts, saved.sums,
            box, saved.linked, saved.back, saved.nearest, saved.peaks, slots, flags, ticket,
            planes, dense_tiles, plan.blocks, plan.bound, plan.bound_pred, plan.capacity, depth, height, width, groups,
            SIDES=sides, K=k, AXES=plan.axes, BACK=request.back, BOXES=boxes, PAIRS=sides == 2, SOFT=request.soft,
            FAR=0x7FF0000000000000 if wide else 0x7F800000, BLOCK=512, num_warps=4, **launch.ALL_REGISTERS,
        )  # fmt: skip
        if sides > 0:
            step(
                accumulate, launch.programs(planes, plan.tiles(launch.LANES) * plan.row_words),
                values, saved.masks, saved.heads, saved.parents, saved.block_starts, saved.counts, saved.sums, box,
                saved.peaks, saved.dense, slots, flags, plan.scale_v, planes, plan.rows, height, width, plan.row_words,
                plan.tiles(launch.LANES), plan.words * launch.WORD, plan.blocks,
                plan.bound, plan.bound_pred, plan.capacity,
                LOGITS=request.logits, SQUARED=own.squared, GAMMA=own.gamma, K=k, AXES=plan.axes, SIDES=sides,
                BOXES=boxes, CENTERS=centers, PAIRS=sides == 2, SOFT=request.soft, ROWS=launch.LANES, num_warps=1,
            )  # fmt: skip
        groups = plan.groups(4096, launch.cdiv(plan.bound, 64))
        if sides == 2:
            step(
                link, launch.programs(planes, groups),
                saved.counts, saved.sums, saved.linked, saved.dense, slots, owners,
                planes, depth, height, width, plan.bound, plan.bound_pred, plan.capacity, *center_size, groups,
                K=k, AXES=plan.axes, CENTERS=centers, BLOCK=32, num_warps=1,
            )  # fmt: skip
        if sides == 2 or request.blob:
            step(
                instances, launch.programs(planes, groups),
                saved.counts, saved.sums, saved.linked, saved.dense, box, losses, slope, saved.nearest, owners,
                plan.scale_v, planes, depth, height, width, plan.bound, plan.bound_pred, *center_size, groups, *spacing,
                FORM=own.form, DICE=request.dice, SQUARED=own.squared, GAMMA=own.gamma, K=k, AXES=plan.axes,
                SIDES=sides, OWN=request.own is not None, APART=request.apart, WHOLE=request.whole, CENTERS=centers,
                BOXES=boxes, WIDE=wide, BLOCK=32, OTHERS=2 if wide else 8,
                num_warps=1, **launch.ALL_REGISTERS,
            )  # fmt: skip
        groups = plan.groups(1024, min(64, launch.cdiv(plan.bound, 64))) if sides else 1
        parts = launch.empty(values, planes, groups, PARTS.value, dtype=torch.float64)
        step(
            gather, launch.programs(planes, groups),
            values if request.soft else None, saved.counts, saved.sums, losses, slope, saved.nearest, owners, valid,
            saved.peaks, slots, saved.owned, saved.back,
            parts, saved.dense, saved.whole, saved.omega, flags, ticket, saved.planar, saved.entries, found, total,
            planes, request.channels, depth, height, width, plan.bound, plan.bound_pred, plan.capacity,
            *center_size, groups,
            *weights, request.missed_weight, LOGITS=request.logits,
            SEG=seg.form, CENTER=(request.center or Loss()).form, CATEGORICAL=request.categorical,
            INVERSE=request.inverse, AVERAGE=request.average, REDUCTION=request.reduction, BY_PRED=request.by_pred,
            BY_SIZE=request.by_size, SOFT=request.soft, SUMMED=request.summed,
            K=k, AXES=plan.axes, SIDES=sides, OWN=request.own is not None, APART=request.apart, GAMMA=own.gamma,
            BOXES=boxes, CENTERS=centers, VALID=valid is not None, BACK=request.back, WIDE=wide, BLOCK=32,
            num_warps=1, **launch.ALL_REGISTERS,
        )  # fmt: skip
    return found, total, saved


def backward(
    to_found: Tensor | None,
    to_total: Tensor | None,
    values: Tensor,
    valid: Tensor | None,
    saved: Saved,
    weights: Sequence[float],
    request: Request,
    *,
    given: bool,
) -> Tensor:
    """∂loss/∂values, of the dtype and shape of `values`, from the derivatives by `found` and `total` (None: zero)."""
    plan = Plan.of(tuple(values.shape), request.connectivity, request.max_instances, given)
    planes, sides, k = plan.planes, request.sides, request.features
    own, seg, center = request.own or Loss(), request.seg or Loss(), request.center or Loss()
    wide = values.dtype == torch.float64
    real = torch.float64 if wide else torch.float32
    result = torch.empty_like(values)
    upstream = launch.empty(values, planes, dtype=torch.float64)
    base = launch.empty(values, planes * BASE.value, dtype=real)
    rows = launch.empty(values, plan.table_rows(sides) * 2 * k, dtype=real)
    groups = plan.groups(2048, launch.cdiv(plan.bound, 64)) if sides else 0
    block = 32
    grid = launch.programs(1, planes * groups + launch.cdiv(planes // request.channels, block))
    step = launch.Step("gradient", request, values, valid, to_found, to_total, given, others=saved)
    with torch.cuda.device_of(values):
        step(
            coefficients, grid,
            to_total, to_found, saved.counts, saved.sums, saved.linked, saved.dense, saved.whole, saved.omega,
            saved.nearest, saved.owned, saved.back, saved.planar, saved.entries, upstream, base, rows,
            plan.scale_v, planes, request.channels, plan.bound, plan.bound_pred, groups, *weights,
            request.missed_weight, TOTAL=to_total is not None, TERMS=to_found is not None,
            AVERAGE=request.average, REDUCTION=request.reduction, BY_PRED=request.by_pred,
            BY_SIZE=request.by_size, SOFT=request.soft, SUMMED=request.summed, WHOLE=request.whole,
            SEG=seg.form, SEG_SQUARED=seg.squared, CATEGORICAL=request.categorical, INVERSE=request.inverse,
            FORM=own.form, SQUARED=own.squared, GAMMA=own.gamma, DICE=request.dice,
            CENTER=center.form, CENTER_SQUARED=center.squared, CENTER_GAMMA=center.gamma,
            K=k, AXES=plan.axes, SIDES=sides, OWN=request.own is not None, FALSES=request.false_rates,
            APART=request.apart,
            BOXES=request.proximity, CENTERS=request.center is not None, BACK=request.back, WIDE=wide,
            BLOCK=block, num_warps=1, **launch.ALL_REGISTERS,
        )  # fmt: skip
        step(
            gradient, launch.programs(planes, plan.tiles(launch.TILE_ROWS) * plan.row_words),
            values, saved.masks, saved.heads, valid, saved.parents, saved.block_starts, saved.peaks, base, rows, result,
            planes, plan.rows, plan.width, plan.row_words, plan.tiles(launch.TILE_ROWS),
            plan.words * launch.WORD, plan.blocks, plan.bound, plan.bound_pred,
            LOGITS=request.logits, VALID=valid is not None, SEG=request.seg is not None, SEG_SQUARED=seg.squared,
            SEG_GAMMA=seg.gamma, POSITIVES_ONLY=request.categorical, SQUARED=own.squared, GAMMA=own.gamma,
            K=k, SIDES=sides, SOFT=request.soft, ROWS=launch.TILE_ROWS, num_warps=2 if wide else 1,
        )  # fmt: skip
    return result
