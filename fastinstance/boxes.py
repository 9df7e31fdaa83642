"""The Distance-IoU loss of boxes, and for each box its least value over the boxes of the other side.

Few pairs are all compared. For many, the boxes of each plane are cut into compact leaves of four and a tree (2^axes
children per node) is put over the leaves of either side. Both trees are descended together, all planes at once and a
level per round; a pair of nodes goes on as long as its lower bound on D is below the best value so far of some box in
it. Only pairs of leaves that survive are compared in full.

The lower bound of two nodes needs, per axis, the least distance g of their centres and the largest half lengths h:

* IoU = I / (V + V' - I) grows with the intersection I and falls with the volumes. Per axis the intersection is at most
  min(2h, 2h', h + h' - g), and the volumes are at least the smallest of either node.
* An axis of the enclosing box is max(d + h + h', 2h, 2h') for centres d apart, hence at most d + s with
  s = max(h + h', 2 max(h, h') - g). By the triangle inequality τ <= ρ + |s|, and ρ / (ρ + |s|) grows with ρ >= |g|.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["distance_iou", "nearest_boxes", "nearest_of_all"]

_LEAF = 4  # boxes of a leaf
_BLOCK = 1 << 16  # pairs compared at once: the temporaries stay in cache
_DENSE = 64  # pairs per box up to which comparing all of them is faster


def distance_iou(a: Tensor, b: Tensor) -> Tensor:
    """Eq. 7: Distance-IoU loss 1 - IoU + ρ²/τ² (Zheng et al. 2020) of boxes that broadcast.

    Args:
        a: `[2, axes, ...]` lower and upper corners.
        b: the same of the other boxes.

    Returns:
        `[...]`
    """
    shared, rho, tau = [], [], []
    for (low_a, high_a), (low_b, high_b) in zip(a.unbind(1), b.unbind(1), strict=True):
        overlap = torch.minimum(high_a, high_b).sub_(torch.maximum(low_a, low_b))  # negative: the gap
        tau.append(((high_a - low_a) + (high_b - low_b)).sub_(overlap).square_())
        rho.append(((low_a + high_a) / 2 - (low_b + high_b) / 2).square_())
        shared.append(overlap.clamp_(min=0))
    intersection = reduce(Tensor.mul_, shared)
    union = ((a[1] - a[0]).prod(0) + (b[1] - b[0]).prod(0)).sub_(intersection)
    return (1 - intersection.div_(union)).add_(reduce(Tensor.add_, rho).div_(reduce(Tensor.add_, tau)))


def _blocks(number: int, size: int, most: int = 64) -> Iterator[slice]:
    """One or more slices of about `size`, larger where there would be more than `most` of them."""
    size = max(1, size, -(-number // most))
    for begin in range(0, max(number, 1), size):
        yield slice(begin, begin + size)


@torch.no_grad()
def nearest_boxes(
    a_lower: Tensor, a_upper: Tensor, a_plane: Tensor, b_lower: Tensor, b_upper: Tensor, b_plane: Tensor, planes: int
) -> tuple[Tensor, Tensor]:
    """Least Distance-IoU loss of each box to the boxes that the other side has in the same plane.

    Args:
        a_lower: `[N, axes]` float64 corners of the boxes of one side, in any order.
        a_upper: `[N, axes]`, each above `a_lower`.
        a_plane: `[N]` int64 plane of each box. A plane with a box on one side has one on the other.
        b_lower: `[M, axes]`, the other side.
        b_upper: `[M, axes]`
        b_plane: `[M]`
        planes: number of planes.

    Returns:
        The minima over b `[N]` and over a `[M]`.
    """
    a, b = torch.stack([a_lower.T, a_upper.T]), torch.stack([b_lower.T, b_upper.T])
    if not (len(a_plane) and len(b_plane)):
        return a.new_empty(len(a_plane)), a.new_empty(len(b_plane))
    most_a, most_b = _most(a_plane, planes), _most(b_plane, planes)
    if planes * most_a * most_b <= _DENSE * (len(a_plane) + len(b_plane)):
        return _all_pairs(a, a_plane, most_a, b, b_plane, most_b, planes, distance_iou)
    return _descend(a, a_plane, b, b_plane, planes)


@torch.no_grad()
def nearest_of_all(
    a: Tensor, a_plane: Tensor, b: Tensor, b_plane: Tensor, planes: int, distance: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """As `nearest_boxes` for any symmetric distance of boxes that broadcast, by comparing every pair of a plane.

    Args:
        a: `[numbers, axes, N]` what describes the boxes of one side.
        a_plane: `[N]` int64. A plane with a box on one side has one on the other.
        b: `[numbers, axes, M]`
        b_plane: `[M]`
        planes: number of planes.
        distance: of boxes `[numbers, axes, ...]`.
    """
    return _all_pairs(a, a_plane, _most(a_plane, planes), b, b_plane, _most(b_plane, planes), planes, distance)


def _most(plane: Tensor, planes: int) -> int:
    """The most boxes that a plane has."""
    return int(torch.bincount(plane, minlength=planes).max())


def _by_plane(boxes: Tensor, plane: Tensor, most: int, planes: int) -> tuple[Tensor, Tensor]:
    """Boxes as [2, axes, planes, most], and each one's place in the flattened last two axes."""
    count = torch.bincount(plane, minlength=planes)
    begin = count.cumsum(0) - count
    position = torch.arange(max(len(plane), most), device=plane.device)
    order = plane.argsort(stable=True)
    # A slot too many repeats the plane's last box.
    member = order[(begin[:, None] + torch.minimum(position[:most], count[:, None] - 1)).clamp(min=0)]
    place = torch.empty_like(order).scatter_(0, order, position[: len(plane)])
    return _columns(boxes, member.view(-1)).unflatten(2, member.shape), place + plane * most - begin[plane]


def _all_pairs(
    a: Tensor,
    a_plane: Tensor,
    n: int,
    b: Tensor,
    b_plane: Tensor,
    m: int,
    planes: int,
    distance: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """The minima by comparing every pair of a plane; n and m are the most boxes that a plane has on a side."""
    if n > m:  # the longer side runs along the last axis
        minima_b, minima_a = _all_pairs(b, b_plane, m, a, a_plane, n, planes, distance)
        return minima_a, minima_b
    a, place_a = _by_plane(a, a_plane, n, planes)
    b, place_b = _by_plane(b, b_plane, m, planes)
    best_a, best_b = a.new_full((planes, n), math.inf), a.new_full((planes, m), math.inf)
    for plane in _blocks(planes, _BLOCK // (n * m)):
        for row in _blocks(n, _BLOCK // m, 8):
            between = distance(a[:, :, plane, row, None], b[:, :, plane, None])  # [planes, rows, m]
            best_a[plane, row] = between.amin(2)
            best_b[plane] = torch.minimum(best_b[plane], between.amin(1))
    return best_a.view(-1).gather(0, place_a), best_b.view(-1).gather(0, place_b)


class _Level(NamedTuple):
    """Nodes of one level of a tree, as the children of the P nodes above; F children each."""

    child: Tensor  # [F, P] int64 numbers of the children, 0 for a missing one
    bounds: Tensor  # [S, F, P] of the children, -inf for a missing one
    parent: Tensor  # [children] int64

    def at(self, node: Tensor) -> tuple[Tensor, Tensor]:
        """The children [F, K] and their bounds [S, F, K] of the nodes [K]."""
        return _columns(self.child, node), _columns(self.bounds, node)


class _Tree(NamedTuple):
    """Leaves of all planes of a side, and the levels above from the leaves up; the last one's parents are planes."""

    member: Tensor  # [4, leaves] int64 box of each slot; a leaf repeats its last box when it has fewer
    boxes: Tensor  # [2, axes, 4, leaves]
    center: Tensor  # [axes, leaves]
    levels: list[_Level]


def _columns(table: Tensor, index: Tensor) -> Tensor:
    """Columns of the last axis."""
    flat = table.flatten(0, -2)
    return flat.gather(1, index.expand(len(flat), -1)).unflatten(0, table.shape[:-1])


def _cut(center: Tensor, plane: Tensor, planes: int) -> tuple[Tensor, Tensor]:
    """Cut every plane along each axis in turn into strips with as many boxes, so that a last strip is a leaf.

    Args:
        center: `[axes, K]`
        plane: `[K]`
        planes: number of planes.

    Returns:
        `[4, leaves]` boxes of each leaf, and `[axes, leaves]` strips, the leaf's cell in the grid of its plane.
    """
    axes, number = center.shape
    group, order, strips = plane, plane, []
    count = torch.bincount(plane, minlength=planes)
    first = count.cumsum(0) - count
    position = torch.arange(number, device=plane.device)
    low, high = center.amin(1, keepdim=True), center.amax(1, keepdim=True)
    rank = ((center - low) * ((1 << 30) / (high - low).clamp(min=1e-200))).long()
    for axis in range(axes):
        leaves = (count + _LEAF - 1) // _LEAF
        cuts = (leaves.double() ** (1 / (axes - axis)) - 1e-9).ceil().long().clamp(min=1)
        boxes = (leaves + cuts - 1) // cuts * _LEAF  # of a strip
        order = ((group << 31) + rank[axis]).argsort()
        group = group[order]
        strip = (position - first[group]) // boxes[group]
        key = group * number + strip
        begins = torch.cat([key.new_ones(1, dtype=torch.bool), key[1:] != key[:-1]])
        first = begins.nonzero().squeeze(1)
        count = torch.diff(first, append=first.new_tensor([number]))
        group = torch.empty_like(order).scatter_(0, order, begins.cumsum(0) - 1)
        strips.append(torch.empty_like(order).scatter_(0, order, strip))
    slot = torch.arange(_LEAF, device=plane.device)[:, None]
    member = order[first + torch.minimum(slot, count - 1)]
    return member, torch.stack(strips)[:, member[0]]


def _tree(boxes: Tensor, plane: Tensor, member: Tensor, strip: Tensor, depth: int) -> _Tree:
    """Put `depth` levels over the leaves of `_cut`: a node has the leaves of 2^level strips of each axis."""
    axes, children = boxes.shape[1], 1 << boxes.shape[1]
    code = plane[member[0]] << (depth * axes)
    for bit in range(depth):
        for axis in range(axes):
            code |= (strip[axis] >> bit & 1) << (bit * axes + axis)
    code, order = code.sort()
    member = member[:, order]
    leaves = _columns(boxes, member.view(-1)).unflatten(2, member.shape)
    half = (leaves[1] - leaves[0]) / 2
    center = (leaves[0] + leaves[1]) / 2
    low, high = center.amin(1), center.amax(1)
    # Everything that a bound is made of is a maximum over the node.
    bounds = torch.cat([-low, high, half.amax(1), -(2 * half).prod(0).amin(0, keepdim=True)])
    levels = []
    for _ in range(depth):
        slot, number = code & (children - 1), torch.arange(len(code), device=code.device)
        code, parent = torch.unique_consecutive(code >> axes, return_inverse=True)
        at = slot * len(code) + parent
        child = at.new_zeros(children * len(code)).scatter_(0, at, number)
        nodes = bounds.new_full((len(bounds), children * len(code)), -math.inf)
        nodes.scatter_(1, at.expand(len(bounds), -1), bounds)
        nodes = nodes.unflatten(1, (children, len(code)))
        levels.append(_Level(child.view(children, -1), nodes, parent))
        bounds = nodes.amax(1)
    return _Tree(member, leaves, (low + high) / 2, levels)


def _lower_bound(a: Tensor, b: Tensor) -> Tensor:
    """Lower bound on D of nodes that broadcast; not a number where one is missing.

    Args:
        a: `[3 * axes + 1, ...]` bounds: -least and greatest centre, greatest half length, -least volume.
        b: the same of the other nodes.
    """
    axes = len(a) // 3
    shared, rho, spread = [], [], []
    for axis in range(axes):
        gap = torch.maximum(-a[axis] - b[axes + axis], -b[axis] - a[axes + axis]).clamp_(min=0)
        half_a, half_b = a[2 * axes + axis], b[2 * axes + axis]
        length_a, length_b = 2 * half_a, 2 * half_b
        both = half_a + half_b
        shared.append(torch.minimum(torch.minimum(length_a, length_b), both - gap).clamp_(min=0))
        spread.append(torch.maximum(torch.maximum(length_a, length_b).sub_(gap), both).square_())
        rho.append(gap.square_())
    intersection, near, far = reduce(Tensor.mul_, shared), reduce(Tensor.add_, rho), reduce(Tensor.add_, spread)
    union = (-a[-1] - b[-1]).sub_(intersection)
    iou = intersection.div_(torch.maximum(union, intersection))
    total = (near * far).sqrt_().mul_(2).add_(near).add_(far)  # (ρ + |s|)²
    return near.div_(total).add_(1).sub_(iou)


def _near_leaf(a: _Tree, b: _Tree) -> Tensor:
    """A leaf of b close to each leaf of a, for its size, by always going to the best child; [leaves of a]."""
    axes = len(a.center)
    node = torch.arange(a.member.shape[1], device=a.member.device)
    for level in a.levels:
        node = level.parent[node]
    for level in reversed(b.levels):
        child, bounds = level.at(node)
        rho, tau = [], []
        for axis, center in enumerate(a.center):
            away = (bounds[axes + axis] - bounds[axis]).div_(2).sub_(center).abs_()
            tau.append((away + bounds[2 * axes + axis]).square_())
            rho.append(away.square_())
        ratio = reduce(Tensor.add_, rho).div_(reduce(Tensor.add_, tau))  # [F, leaves], nan for a missing child
        node, least = child[0], ratio[0].nan_to_num_(nan=math.inf)
        for here, value in zip(child[1:], ratio[1:], strict=True):
            better = value < least
            node, least = torch.where(better, here, node), torch.where(better, value, least)
    return node


def _limits(best: Tensor, tree: _Tree) -> list[Tensor]:
    """The largest of the best values of each node's boxes, from the leaves to the planes."""
    limits = [best.amax(0)]
    for level in tree.levels:
        limit = best.new_full((level.child.shape[1],), -math.inf)
        limits.append(limit.scatter_reduce_(0, level.parent, limits[-1], "amax"))
    return limits


def _descend(a: Tensor, a_plane: Tensor, b: Tensor, b_plane: Tensor, planes: int) -> tuple[Tensor, Tensor]:
    """The minima by a descent of two trees."""
    cut_a, cut_b = _cut(a.mean(0), a_plane, planes), _cut(b.mean(0), b_plane, planes)
    depth = max(1, max(int(strip.max()) for _, strip in (cut_a, cut_b)).bit_length())
    tree_a, tree_b = _tree(a, a_plane, *cut_a, depth), _tree(b, b_plane, *cut_b, depth)
    best_a, best_b = (torch.full_like(tree.boxes[0, 0], math.inf) for tree in (tree_a, tree_b))  # [4, leaves]
    slot = torch.arange(_LEAF, device=a.device)[:, None]

    def compare(i: Tensor, j: Tensor, most: int) -> None:
        """Compare the boxes of leaves i of a with those of leaves j of b, in at most so many blocks."""
        for block in _blocks(len(i), _BLOCK // _LEAF**2, most):
            of_a, of_b = _columns(tree_a.boxes, i[block]), _columns(tree_b.boxes, j[block])
            distance = distance_iou(of_a[:, :, :, None], of_b[:, :, None])  # [4, 4, pairs]
            for best, leaf, axis in ((best_a, i[block], 1), (best_b, j[block], 0)):
                place = slot * best.shape[1] + leaf
                best.view(-1).scatter_reduce_(0, place.view(-1), distance.amin(axis).view(-1), "amin")

    def survivors(i: Tensor, j: Tensor, level: int, limit_a: Tensor, limit_b: Tensor) -> tuple[Tensor, Tensor]:
        """The pairs of children of nodes i of a and j of b that can hold a new minimum."""
        child_a, bounds_a = tree_a.levels[level].at(i)
        child_b, bounds_b = tree_b.levels[level].at(j)
        bound = _lower_bound(bounds_a[:, :, None], bounds_b[:, None])  # [F, F, pairs]
        limit = torch.maximum(limit_a[child_a][:, None], limit_b[child_b])
        slots, pair = (bound < limit).flatten(0, 1).nonzero(as_tuple=True)
        return child_a[slots // len(child_a), pair], child_b[slots % len(child_b), pair]

    near_b, near_a = _near_leaf(tree_a, tree_b), _near_leaf(tree_b, tree_a)
    compare(torch.arange(len(near_b), device=a.device), near_b, 64)
    compare(near_a, torch.arange(len(near_a), device=a.device), 64)

    limits_a, limits_b = _limits(best_a, tree_a), _limits(best_b, tree_b)
    i = j = torch.arange(tree_a.levels[-1].child.shape[1], device=a.device)  # the planes with boxes
    size = _BLOCK >> (2 * a.shape[1])
    for level in reversed(range(1, depth)):
        found = [
            survivors(i[block], j[block], level, limits_a[level], limits_b[level]) for block in _blocks(len(i), size)
        ]
        i, j = (torch.cat(side) for side in zip(*found, strict=True))
    for block in _blocks(len(i), size):  # each sees what the ones before have found
        compare(*survivors(i[block], j[block], 0, best_a.amax(0), best_b.amax(0)), most=8)
    minima_a, minima_b = (
        best.new_full((boxes.shape[2],), math.inf).scatter_reduce_(0, tree.member.view(-1), best.view(-1), "amin")
        for best, boxes, tree in ((best_a, a, tree_a), (best_b, b, tree_b))
    )
    return minima_a, minima_b
