"""Tests of the Triton kernels in Triton's interpreter, on CPU tensors.

The interpreter must be chosen before Triton is imported, so an ordinary run does not collect this folder:
`tests/test_interpreted.py` runs each file in a process of its own. By hand:

    TRITON_INTERPRET=1 pytest tests/interpreted
"""

import ctypes
import os

import pytest

from tests.memory import poisoned_memory as poisoned_memory

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True, scope="session")
def patch_once() -> None:
    """Let the interpreter prepare each function once, not at every call from a kernel: half of the time goes there."""
    from triton.runtime.interpreter import InterpretedFunction

    call = InterpretedFunction.__call__
    prepared = set()

    def call_prepared(self: InterpretedFunction, *args: object, **kwargs: object) -> object:
        if self.fn in prepared:
            return self.rewrite()(*args, **kwargs)
        prepared.add(self.fn)
        return call(self, *args, **kwargs)

    InterpretedFunction.__call__ = call_prepared


@pytest.fixture(autouse=True, scope="session")
def round_numbers() -> None:
    """Let a number reach a kernel as the float32 that a launch on a device makes of it."""
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def converted(argument: object) -> object:
        return ctypes.c_float(argument).value if isinstance(argument, float) else convert(argument)

    interpreter._implicit_cvt = converted
