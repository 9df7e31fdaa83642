"""Memory that was never written, for tests that kernels do not read it."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what `torch.empty` returns with values that look like parents, counts and ids, but are wrong."""
    empty = torch.empty
    generator = torch.Generator().manual_seed(0)

    @torch.no_grad()  # torch itself makes some that require a gradient
    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        memory = empty(*args, **kwargs)
        low, high = (0, 2) if memory.dtype == torch.bool else (-64, 64)
        return memory if memory.is_meta else memory.random_(low, high, generator=generator)

    monkeypatch.setattr(torch, "empty", poisoned)
