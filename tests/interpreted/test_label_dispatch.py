"""`fastinstance.label` on the Triton kernels, in the interpreter."""

import pytest
import torch

import fastinstance


@pytest.mark.parametrize(("shape", "connectivity"), [((2, 2, 9, 33), 4), ((2, 1, 11, 40), 8), ((1, 2, 4, 5, 6), 18)])
@pytest.mark.parametrize("min_size", [0, 3])
def test_triton_equals_torch(shape: tuple[int, ...], connectivity: int, min_size: int) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.55
    results = []
    for backend in ("triton", "torch"):
        with fastinstance.use_backend(backend):
            results.append(fastinstance.label(mask, connectivity=connectivity, min_size=min_size))
    for triton, plain in zip(*results, strict=True):
        assert torch.equal(triton, plain)
