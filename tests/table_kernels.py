"""Kernels that call device functions of `fastinstance_kernels.tables`, for the interpreter."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl
from fastinstance_kernels.tables import insert


@triton.jit
def insert_all(slots, keys, n, capacity):
    """Every key in turn, as one program."""
    i = 0
    while i < n:
        insert(slots, tl.load(keys + i), capacity)
        i += 1
