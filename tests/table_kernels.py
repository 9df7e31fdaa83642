"""Kernels that call device functions of `fastinstance_kernels.tables`, for the interpreter."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl
from fastinstance_kernels.tables import insert, peak_index, peak_key


@triton.jit
def insert_all(slots, keys, n, capacity):
    """Every key in turn, as one program."""
    i = 0
    while i < n:
        insert(slots, tl.load(keys + i), capacity)
        i += 1


@triton.jit
def peak_keys(values, index, keys, indices, n, BLOCK: tl.constexpr):
    """The key of every value and index, and the index in it."""
    i = tl.arange(0, BLOCK)
    inside = i < n
    key = peak_key(tl.load(values + i, mask=inside, other=0.0), tl.load(index + i, mask=inside, other=0))
    tl.store(keys + i, key, mask=inside)
    tl.store(indices + i, peak_index(key).to(tl.int32), mask=inside)
