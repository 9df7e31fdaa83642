"""Which instances of a prediction match which of the target: tables of both sides and of the pairs that overlap."""

from __future__ import annotations

import math
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import (
    check_choice,
    check_connectivity,
    check_mask_pair,
    check_mask_values,
    check_size,
    reads_values,
)
from .components import label_planes
from .partition import partition

__all__ = ["MATCHINGS", "Instances", "Matches", "check_matching", "match_instances"]

MATCHINGS = ("overlap", "iou", "dice")
ROUNDS = 32  # of the one-to-one matching where the device is not asked whether it is done
_UNIQUE = {"iou": 1 / 2, "dice": 2 / 3}  # an instance has at most one partner above this


class Instances(NamedTuple):
    """One side, numbered over all planes. A row of 0 pixels is no instance."""

    pixels: Tensor  # [K] int64
    plane: Tensor  # [K] int64
    matched: Tensor  # [K] bool: found (of the target), or not false (of the prediction)


class Matches(NamedTuple):
    """Instances of both sides and the pairs that overlap. A pair that shares 0 pixels is none."""

    batch: int
    channels: int
    target: Instances
    pred: Instances
    n: Tensor  # [A] int64 row of `target` of each pair
    m: Tensor  # [A] int64 row of `pred`
    shared: Tensor  # [A] int64 pixels
    linked: Tensor  # [A] bool: detects, many to many with "overlap", one to one otherwise
    one_to_one: Tensor  # [A] bool: a true positive of PQ
    undecided: Tensor  # [A] bool: may be one to one, but the rounds were too few; nowhere on the CPU


class _Tables(NamedTuple):
    """Pixels and plane of each row of both sides, and the pairs, in the order of n and m."""

    target: tuple[Tensor, Tensor]
    pred: tuple[Tensor, Tensor]
    n: Tensor
    m: Tensor
    shared: Tensor


class _Masks(NamedTuple):
    """Both sides as planes."""

    pred: Tensor  # bool [planes, *S]
    target: Tensor
    pred_labels: Tensor | None  # integer [planes, *S]
    target_labels: Tensor | None


def check_matching(matching: str, threshold: float, min_size: int) -> None:
    """The settings of `match_instances` that do not depend on the images."""
    check_choice("matching", matching, MATCHINGS)
    if isinstance(threshold, bool) or not isinstance(threshold, Real) or not 0 <= threshold < 1:
        raise ValueError(f"expected threshold in [0, 1), got {threshold!r}")
    check_size("min_size", min_size)


def _exact_tables(masks: _Masks, connectivity: int, min_size: int) -> _Tables:
    """Tables of as many rows as there are instances and pairs: their sizes are read from the device."""
    part = partition(
        masks.target,
        masks.pred,
        labels=masks.target_labels,
        pred_labels=masks.pred_labels,
        connectivity=connectivity,
        min_size=min_size,
    )
    target, pred = ((side.count, side.plane[: side.real]) for side in (part.target, part.pred))
    return _Tables(target, pred, *part.pairs, part.shared)


def _fixed_tables(masks: _Masks, connectivity: int, min_size: int) -> _Tables:
    """The same rows, and empty ones up to the number of pixels: no size depends on the data, so nothing waits."""
    planes, width = len(masks.target), math.prod(masks.target.shape[1:]) + 1
    plane = torch.arange(planes, device=masks.target.device)[:, None].expand(planes, width)
    sides, ids = [], []
    for mask, labels in ((masks.target, masks.target_labels), (masks.pred, masks.pred_labels)):
        if labels is None:
            rank = label_planes(mask, None, connectivity, 0)[0].flatten(1).long()
        else:
            rank = _ranks(labels.flatten(1).long())
        pixels = rank.new_zeros(planes, width).scatter_add_(1, rank, torch.ones_like(rank))
        pixels = torch.where(pixels < max(min_size, 1), 0, pixels)
        pixels[:, 0] = 0
        ids.append(rank * (pixels.gather(1, rank) > 0))
        sides.append((pixels.flatten(), plane.flatten()))
    t, q = ids
    key = (t * width + q) * ((t > 0) & (q > 0))
    pair = _ranks(key)
    shared = key.new_zeros(planes, width).scatter_add_(1, pair, torch.ones_like(key))
    shared[:, 0] = 0
    keys = key.new_zeros(planes, width).scatter_(1, pair, key)
    n, m = (plane * width + keys // width).flatten(), (plane * width + keys % width).flatten()
    return _Tables(sides[0], sides[1], n, m, shared.flatten())


def _ranks(ids: Tensor) -> Tensor:
    """Ids `[planes, P]` as 1, 2, ... in ascending order in each plane; 0 stays 0."""
    ordered, origin = ids.sort(1)
    new = ordered > 0
    new[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
    return torch.zeros_like(ids).scatter_(1, origin, new.cumsum(1))


def _greatest_first(score: Tensor, tables: _Tables, candidates: Tensor, rounds: int | None) -> tuple[Tensor, Tensor]:
    """One-to-one pairs among the candidates: the greatest score first, equal ones in the order of n, then of m.

    In each round every open pair that is the first of both its instances is taken, and the pairs that share an
    instance with it are closed: what going through the sorted pairs one by one would give.

    Returns:
        The pairs that are taken, and those that are still open after so many rounds (None: until none is).
    """
    order = score.argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    last = len(order)
    sides = (tables.n, len(tables.target[0])), (tables.m, len(tables.pred[0]))
    taken = torch.zeros_like(candidates)
    done = 0
    while candidates.any() if rounds is None else done < rounds:
        open_rank = torch.where(candidates, rank, last)
        first = candidates
        for row, count in sides:
            best = rank.new_full((count,), last).scatter_reduce_(0, row, open_rank, "amin")
            first = first & (best[row] == rank)
        taken |= first
        for row, count in sides:
            candidates = candidates & ~_any_of(row, first, count)[row]
        done += 1
    return taken, candidates


def _any_of(row: Tensor, flag: Tensor, count: int) -> Tensor:
    """[count] bool: whether any entry of a row is set."""
    return torch.zeros(count, dtype=torch.int64, device=row.device).index_add_(0, row, flag.long()) > 0


def _binary(name: str, mask: Tensor, labels: Tensor | None) -> Tensor:
    """The mask as bool `[planes, *S]`, checked where its values may be read."""
    mask = mask.detach().flatten(0, 1)
    if not reads_values(mask):
        return mask.bool()
    check_mask_values(name, mask, None if labels is None else labels.flatten(0, 1))
    return mask.view(torch.bool) if mask.dtype == torch.uint8 else mask.bool()  # 0 and 1 need no copy


def match_instances(
    pred: Tensor,
    target: Tensor,
    *,
    connectivity: int | None = None,
    matching: str = "overlap",
    threshold: float = 0.5,
    min_size: int = 0,
    pred_labels: Tensor | None = None,
    target_labels: Tensor | None = None,
) -> Matches:
    """The tables behind `instance_metrics`, with its arguments and errors."""
    check_matching(matching, threshold, min_size)
    check_mask_pair(pred, target, pred_labels, target_labels)
    pred, target = pred.as_subclass(Tensor), target.as_subclass(Tensor)  # MONAI's MetaTensor would follow every step
    connectivity = check_connectivity(connectivity, pred.ndim - 2)
    masks = _Masks(
        _binary("pred", pred, pred_labels),
        _binary("target", target, target_labels),
        None if pred_labels is None else pred_labels.as_subclass(Tensor).flatten(0, 1),
        None if target_labels is None else target_labels.as_subclass(Tensor).flatten(0, 1),
    )
    make_tables = _fixed_tables if pred.is_cuda else _exact_tables
    tables = make_tables(masks, connectivity, min_size)
    there = tables.shared > 0
    both = (tables.target[0][tables.n] + tables.pred[0][tables.m]).double()  # a quotient of integers would be float32
    score = tables.shared / (both - tables.shared if matching == "iou" else both / 2)
    undecided = torch.zeros_like(there)
    if matching == "overlap":
        linked = there
        one_to_one, undecided = _greatest_first(score, tables, there, ROUNDS if pred.is_cuda else None)
    else:
        linked = there & (score > threshold)
        if threshold < _UNIQUE[matching]:
            linked, _ = _greatest_first(score, tables, linked, None)
        one_to_one = linked
    target_side, pred_side = (
        Instances(*side, _any_of(row, linked, len(side[0])))
        for side, row in ((tables.target, tables.n), (tables.pred, tables.m))
    )
    batch, channels = pred.shape[:2]
    pairs = tables.n, tables.m, tables.shared
    return Matches(batch, channels, target_side, pred_side, *pairs, linked, one_to_one, undecided)
