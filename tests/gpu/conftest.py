"""What all tests on a GPU share."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill what `torch.empty` returns with values that look like parents, counts and ids, but are wrong."""
    empty = torch.empty

    @torch.no_grad()  # torch itself makes some that require a gradient
    def poisoned(*args: object, **kwargs: object) -> Tensor:
        return empty(*args, **kwargs).fill_(7)

    monkeypatch.setattr(torch, "empty", poisoned)
    yield
    torch.cuda.synchronize()
