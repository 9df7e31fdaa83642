"""Tests of the Triton kernels in Triton's interpreter, on CPU tensors.

The interpreter must be chosen before Triton is imported, so an ordinary run does not collect this folder:
`tests/test_interpreted.py` runs each file in a process of its own. By hand:

    TRITON_INTERPRET=1 pytest tests/interpreted
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what `torch.empty` returns with values that look like parents, counts and ids, but are wrong."""
    empty = torch.empty
    generator = torch.Generator().manual_seed(0)

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        memory = empty(*args, **kwargs)
        low, high = (0, 2) if memory.dtype == torch.bool else (-64, 64)
        return memory.random_(low, high, generator=generator)

    monkeypatch.setattr(torch, "empty", poisoned)


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
