"""Kernels that call device functions of `fastinstance_kernels.tables` and `.terms`, for the interpreter."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl
from fastinstance_kernels.tables import insert, peak_index, peak_key
from fastinstance_kernels.terms import _may_be_nearer, distance_iou


@triton.jit
def insert_all(slots, keys, n, capacity, BLOCK: tl.constexpr):
    """Every key, as one program."""
    first = 0
    while first < n:
        i = first + tl.arange(0, BLOCK)
        insert(slots, tl.load(keys + i, mask=i < n, other=0), capacity, i < n)
        first += BLOCK


@triton.jit
def peak_keys(values, index, keys, indices, n, BLOCK: tl.constexpr):
    """The key of every value and index, and the index in it."""
    i = tl.arange(0, BLOCK)
    inside = i < n
    key = peak_key(tl.load(values + i, mask=inside, other=0.0), tl.load(index + i, mask=inside, other=0))
    tl.store(keys + i, key, mask=inside)
    tl.store(indices + i, peak_index(key).to(tl.int32), mask=inside)


@triton.jit
def reach(boxes, nearest, hopeful, spacing_y, spacing_x, N: tl.constexpr):
    """Of each of N boxes: whether it may be nearer to the last one than the next number above their distance."""
    row = tl.arange(0, N)
    other = tl.full([1], N, tl.int32)
    distance = distance_iou(boxes, row, other, 1.0, spacing_y, spacing_x, 2, tl.float32)
    tl.store(nearest + row, distance.to(tl.int32, bitcast=True) + 1)
    tl.store(hopeful + row, _may_be_nearer(boxes, nearest, row, other, 1.0, spacing_y, spacing_x, 2, tl.float32))
