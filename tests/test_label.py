"""Connected components: `fastinstance.label` against scipy, in every dimension, connectivity, shape and dtype."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor

import fastinstance
from fastinstance.testing import LAYOUTS, PATTERNS, masks, pattern, with_layout

EXAMPLES = settings().max_examples
# How many axes one step may move along.
STEPS = {(2, 4): 1, (2, 8): 2, (3, 6): 1, (3, 18): 2, (3, 26): 3}


def expected(mask: Tensor, connectivity: int | None, min_size: int = 0) -> tuple[Tensor, Tensor]:
    """scipy's components of each plane, the small ones dropped, numbered by their first pixel."""
    ndim = mask.ndim - 2
    steps = ndim if connectivity is None else STEPS[ndim, connectivity]
    structure = ndimage.generate_binary_structure(ndim, steps)
    labels = torch.zeros(mask.shape, dtype=torch.int32)
    counts = torch.zeros(mask.shape[:2], dtype=torch.int32)
    for b in range(mask.shape[0]):
        for c in range(mask.shape[1]):
            found, _ = ndimage.label(mask[b, c].numpy(), structure)
            ids, first, size = np.unique(found, return_index=True, return_counts=True)
            kept = [(first, k) for k, first, size in zip(ids, first, size, strict=True) if k and size >= min_size]
            for new, (_, k) in enumerate(sorted(kept), start=1):
                labels[b, c][torch.from_numpy(found == k)] = new
            counts[b, c] = len(kept)
    return labels, counts


def check(mask: Tensor, connectivity: int | None, min_size: int = 0) -> None:
    labels, counts = fastinstance.label(mask, connectivity=connectivity, min_size=min_size)
    want_labels, want_counts = expected(mask != 0, connectivity, min_size)
    assert labels.dtype == counts.dtype == torch.int32
    assert torch.equal(labels, want_labels)
    assert torch.equal(counts, want_counts)


@st.composite
def labellings(draw: st.DrawFn) -> tuple[Tensor, int | None, int]:
    ndim = draw(st.sampled_from((2, 3)))
    shape = tuple(draw(st.integers(1, 14 if ndim == 2 else 6)) for _ in range(ndim))
    size = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    planes = [draw(masks(shape)) for _ in range(size[0] * size[1])]
    connectivity = draw(st.sampled_from([None, *(c for d, c in STEPS if d == ndim)]))
    return torch.stack(planes).view(*size, *shape), connectivity, draw(st.integers(0, 4))


@settings(max_examples=4 * EXAMPLES)
@given(labellings())
def test_components_are_those_of_scipy(case: tuple[Tensor, int | None, int]) -> None:
    check(*case)


@pytest.mark.parametrize(("ndim", "connectivity"), STEPS)
@pytest.mark.parametrize("name", PATTERNS)
def test_large_patterns(name: str, ndim: int, connectivity: int) -> None:
    mask = pattern(name, (130, 67) if ndim == 2 else (17, 34, 21))
    check(torch.stack([mask, ~mask, mask.flip(-1)])[None], connectivity)


@pytest.mark.parametrize(("ndim", "connectivity"), STEPS)
def test_as_many_components_as_fit(ndim: int, connectivity: int) -> None:
    """Specks and checkerboards of every small shape: labellers reserve room for as many labels as they think fit."""
    for shape in itertools.product(range(1, 8 if ndim == 2 else 5), repeat=ndim):
        densest = torch.stack([pattern(name, shape) for name in ("specks", "checkerboard")])
        check(densest[None], connectivity)
        check(densest[:1, None], connectivity)


def test_thousands_of_specks() -> None:
    mask = pattern("specks", (160, 160))[None, None]
    labels, counts = fastinstance.label(mask)
    assert counts.item() == 6400
    assert torch.equal(labels[mask], torch.arange(1, 6401, dtype=torch.int32))


def test_ids_follow_the_first_pixel_and_not_the_labeller() -> None:
    # A deep U on the right starts in row 0, the small ones on the left start later but are finished earlier.
    mask = torch.zeros(1, 1, 7, 12, dtype=torch.bool)
    mask[..., 0:7, 5], mask[..., 6, 5:12], mask[..., 0:7, 11] = True, True, True
    mask[..., 1, 0], mask[..., 2, 8], mask[..., 3, 2] = True, True, True
    labels, counts = fastinstance.label(mask)
    assert counts.item() == 4
    assert [int(labels[0, 0, y, x]) for y, x in ((0, 11), (1, 0), (2, 8), (3, 2))] == [1, 2, 3, 4]


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (1, 1, 1), (1, 1, 5), (5, 1, 1), (1, 6, 7), (3, 1, 4)])
def test_thin_shapes(shape: tuple[int, ...]) -> None:
    for name in PATTERNS:
        for connectivity in (c for d, c in STEPS if d == len(shape)):
            check(pattern(name, shape)[None, None], connectivity)


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(dtype: torch.dtype, layout: str) -> None:
    masks = torch.stack([pattern(name, (12, 9)) for name in ("spiral", "specks", "diagonals", "comb")]).view(
        2, 2, 12, 9
    )
    check(with_layout(masks.to(dtype), layout), None)


def test_the_mask_is_left_alone_and_the_planes_apart() -> None:
    mask = torch.ones(3, 2, 4, 5, dtype=torch.bool)
    labels, counts = fastinstance.label(mask)
    assert mask.all()
    assert (labels == 1).all()
    assert (counts == 1).all()


def test_min_size_counts_pixels() -> None:
    mask = torch.zeros(1, 1, 3, 9, dtype=torch.bool)
    mask[0, 0, 0, 0] = mask[0, 0, 0, 3:5] = mask[0, 0, :, 7] = True
    for min_size, ids in ((0, [1, 2, 3]), (1, [1, 2, 3]), (2, [0, 1, 2]), (3, [0, 0, 1]), (4, [0, 0, 0])):
        labels, counts = fastinstance.label(mask, min_size=min_size)
        assert labels[0, 0, 0, [0, 3, 7]].tolist() == ids
        assert counts.item() == max(ids)


def test_no_pixels_and_no_planes() -> None:
    for shape in ((0, 1, 4, 4), (2, 0, 4, 4), (1, 1, 0, 4)):
        labels, counts = fastinstance.label(torch.zeros(shape, dtype=torch.bool))
        assert labels.shape == shape
        assert counts.shape == shape[:2]
        assert not counts.any()
