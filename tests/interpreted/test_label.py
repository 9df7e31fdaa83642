"""`fastinstance_kernels.label_planes` in the interpreter equals scipy: ids, counts, every setting and kind of input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fastinstance_kernels import label_planes, launch
from fastinstance_kernels.label import label_forest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor

from fastinstance.testing import PATTERNS, masks, pattern

# connectivity: (spatial dimensions, axes that one step may move along)
STEPS = {4: (2, 1), 8: (2, 2), 6: (3, 1), 18: (3, 2), 26: (3, 3)}
SHAPES = {2: (11, 45), 3: (3, 4, 34)}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32)


def expected(foreground: Tensor, connectivity: int, min_size: int = 0) -> tuple[Tensor, Tensor]:
    """scipy's components of each plane, those smaller than `min_size` dropped, numbered by their first pixel."""
    structure = ndimage.generate_binary_structure(*STEPS[connectivity])
    labels, counts = [], []
    for plane in foreground.numpy():
        found, _ = ndimage.label(plane, structure)
        ids, first, size = np.unique(found, return_index=True, return_counts=True)
        kept = (ids > 0) & (size >= min_size)
        new = np.zeros(ids.max() + 1, np.int32)
        new[ids[kept][np.argsort(first[kept])]] = np.arange(1, kept.sum() + 1)
        labels.append(torch.from_numpy(new[found]))
        counts.append(kept.sum())
    return torch.stack(labels), torch.tensor(counts, dtype=torch.int32)


def check(
    x: Tensor, foreground: Tensor, connectivity: int, *, min_size: int = 0, threshold: float | None = None
) -> None:
    labels, counts = label_planes(x, connectivity=connectivity, min_size=min_size, threshold=threshold)
    want_labels, want_counts = expected(foreground, connectivity, min_size)
    assert labels.dtype == counts.dtype == torch.int32
    assert labels.is_contiguous()
    assert torch.equal(labels, want_labels)
    assert torch.equal(counts, want_counts)


def random_mask(*shape: int, density: float, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def snake(depth: int, height: int, width: int) -> Tensor:
    """One path of one pixel's width through a volume: along the rows, back in the next but one, slice after slice."""
    path = torch.zeros(depth, height, width, dtype=torch.bool)
    path[::2, ::2] = True
    path[::2, 1::4, -1] = True
    path[::2, 3::4, 0] = True
    path[1::4, -1, -1] = path[3::4, 0, 0] = True
    return path


@pytest.mark.parametrize("connectivity", STEPS)
@pytest.mark.parametrize("name", PATTERNS)
def test_patterns(name: str, connectivity: int) -> None:
    mask = pattern(name, SHAPES[STEPS[connectivity][0]])
    # Turned by 180 degrees, combs and spirals are closed at the other end: late unions of long trees.
    both = torch.stack([mask, mask.flip(tuple(range(mask.ndim)))]) != 0
    check(both, both, connectivity)


@pytest.mark.parametrize("connectivity", [4, 8])
@pytest.mark.parametrize("density", [0.1, 0.3, 0.45, 0.6, 0.8])
def test_noise_in_planes(density: float, connectivity: int) -> None:
    mask = random_mask(1, 32, 64, density=density)
    check(mask, mask, connectivity)


@pytest.mark.parametrize("connectivity", [6, 18, 26])
@pytest.mark.parametrize("density", [0.05, 0.15, 0.3, 0.7])
def test_noise_in_volumes(density: float, connectivity: int) -> None:
    mask = random_mask(1, 4, 6, 33, density=density)
    check(mask, mask, connectivity)


@pytest.mark.parametrize("connectivity", STEPS)
def test_extreme_shapes(connectivity: int) -> None:
    shapes = {2: [(1, 1), (1, 300), (40, 1), (2, 32), (9, 33)], 3: [(1, 1, 1), (1, 5, 37), (9, 1, 3), (4, 9, 1)]}
    for shape in shapes[STEPS[connectivity][0]]:
        mask = random_mask(2, *shape, density=0.7)
        mask[1] = True
        check(mask, mask, connectivity)


@pytest.mark.parametrize("connectivity", [6, 18, 26])
def test_snake(connectivity: int) -> None:
    path = torch.stack([snake(5, 5, 33), snake(5, 5, 33).flip((0, 1, 2))])
    check(path, path, connectivity)
    assert label_planes(path[:1], connectivity=6)[1].tolist() == [1]


def test_given_planes_are_only_numbered() -> None:
    """Their forest, not their mask, says what belongs together."""
    found = random_mask(2, 9, 40, density=0.5)
    bits = torch.nn.functional.pad(found, (0, 24)).view(2, 18, 32)
    starts = bits.clone()
    starts[..., 1:] &= ~bits[..., :-1]
    starts[0] = bits[0]  # every pixel of the given plane has an id of its own, but for the last, which has the first's

    def packed(words: Tensor) -> Tensor:
        return (words.long() << torch.arange(32)).sum(-1).int()

    parents = torch.full((2, 18 * 32), 7, dtype=torch.int32)
    indices = bits[0].flatten().nonzero()[:, 0].int()
    parents[0, indices] = indices
    parents[0, indices[-1]] = indices[0]
    step, mask, heads = launch.Step(object()), packed(bits), packed(starts)
    _, block_counts, blocks = label_forest(step, mask, heads, 2, (9, 40), 8, parents=parents, first_given=1)
    assert block_counts.shape == (2, blocks)
    assert block_counts.sum(1).tolist() == [len(indices) - 1, int(expected(found[1:], 8)[1])]
    assert parents[0, indices].tolist() == [*range(-2, -len(indices) - 1, -1), int(indices[0])]
    outside = ~starts.flatten(1)
    assert (parents[outside] == 7).all()


def test_default_connectivity_is_the_full_one() -> None:
    for shape, full in (((1, 9, 40), 8), ((1, 3, 5, 40), 26)):
        mask = random_mask(*shape, density=0.4)
        assert torch.equal(label_planes(mask)[0], expected(mask, full)[0])


@st.composite
def labellings(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    connectivity = draw(st.sampled_from(list(STEPS)))
    dims = STEPS[connectivity][0]
    shape = [draw(st.integers(1, 10 if dims == 2 else 4)) for _ in range(dims - 1)] + [draw(st.integers(1, 40))]
    planes = torch.stack([draw(masks(shape)) for _ in range(draw(st.integers(1, 2)))])
    return planes != 0, connectivity, draw(st.integers(0, 5))


@settings(max_examples=settings().max_examples // 4, suppress_health_check=list(HealthCheck))
@given(labellings())
def test_drawn_masks(case: tuple[Tensor, int, int]) -> None:
    mask, connectivity, min_size = case
    check(mask, mask, connectivity, min_size=min_size)


@pytest.mark.parametrize("min_size", [1, 2, 3, 9, 10_000, 2**40])
def test_min_size(min_size: int) -> None:
    mask = random_mask(2, 9, 40, density=0.4)
    mask[1] = True
    check(mask, mask, 4, min_size=min_size)
    volume = random_mask(1, 3, 4, 40, density=0.2)
    check(volume, volume, 6, min_size=min_size)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_not_zero(dtype: torch.dtype) -> None:
    mask = random_mask(2, 9, 40, density=0.5)
    low = -3 if dtype.is_signed else 1
    values = torch.where(random_mask(2, 9, 40, density=0.5, seed=1), low, 100)
    check((mask * values).to(dtype), mask, 8)
    if dtype == torch.int64:
        check(mask * 2**40, mask, 8)


@pytest.mark.parametrize("dtype", FLOATS)
def test_floats_not_zero(dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-7, -2.5], dtype=dtype)
    x = values[torch.randint(len(values), (2, 9, 40), generator=torch.Generator().manual_seed(0))]
    check(x, (x != 0) & ~x.isnan(), 8)


@pytest.mark.parametrize("threshold", [0.1, 0.0, -0.4, -1e300, 1e300, float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_threshold(dtype: torch.dtype, threshold: float) -> None:
    x = torch.randn(2, 9, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # 0.1 is larger than the float16 and smaller than the float32 next to it.
    for value in (threshold, float("nan"), float("inf"), -float("inf")):
        x[random_mask(*x.shape, density=0.1)] = value
        x = x.flip(1)
    x = x.to(dtype)
    wide = x if dtype == torch.float64 else x.float()
    foreground = wide >= torch.tensor(threshold, dtype=torch.float64).to(wide.dtype)
    check(x.requires_grad_(), foreground, 8, threshold=threshold)


def test_threshold_of_float64_is_not_rounded() -> None:
    threshold = 0.1 + 1e-12
    x = torch.tensor([[[0.1, threshold, 0.1 + 2e-12, 0.1 + 5e-13]]], dtype=torch.float64)
    assert label_planes(x, threshold=threshold)[0].tolist() == [[[0, 1, 1, 0]]]


@pytest.mark.parametrize("threshold", [None, -0.1])
def test_strides(threshold: float | None) -> None:
    big = torch.randn(2, 18, 44, generator=torch.Generator().manual_seed(0))
    views = [
        big[:, 3:14:2, 1::2],
        big.transpose(1, 2),
        big.permute(2, 0, 1)[:2],
        big[:1].expand(2, 18, 44)[:, :9],
        big[:1, :1].expand(1, 5, 44),
        big.as_strided((2, 3, 40), (1, 7, 3)),
    ]
    for view in views:
        check(view if threshold is not None else view > -0.1, view >= -0.1, 8, threshold=threshold)
    volume = big.view(1, 2, 18, 44)
    for view in (volume.permute(0, 2, 1, 3)[:, ::5], volume[:, :, ::3, 5::2], volume.transpose(2, 3)[:, :, :9]):
        check(view if threshold is not None else view > -0.1, view >= -0.1, 6, threshold=threshold)


def test_offsets_of_more_than_32_bits() -> None:
    # Only the pages that hold the few pixels are ever touched.
    memory = torch.zeros(1, dtype=torch.uint8).new_empty(2**31 + 64)
    x = memory.as_strided((1, 2, 40), (0, 2**31, 1))
    x.copy_(random_mask(1, 2, 40, density=0.5))
    check(x, x != 0, 8)


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0), (0, 1, 2, 3), (2, 3, 0, 4), (0, 2**20, 2**20)])
def test_no_pixels(shape: tuple[int, ...]) -> None:
    labels, counts = label_planes(torch.zeros(shape), min_size=3)
    assert labels.shape == shape
    assert counts.tolist() == [0] * shape[0]
    assert labels.dtype == counts.dtype == torch.int32


def test_errors() -> None:
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    for connectivity in (0, 5, 6, 26):
        with pytest.raises(ValueError, match=rf"expected connectivity in \(4, 8\) for 2D planes, got {connectivity}"):
            label_planes(mask, connectivity=connectivity)
    with pytest.raises(ValueError, match=r"expected connectivity in \(6, 18, 26\) for 3D planes, got 8"):
        label_planes(mask[None], connectivity=8)
    for wrong_rank in (mask[0], mask[None, None]):
        with pytest.raises(ValueError, match=r"expected x \[planes, H, W\] or \[planes, D, H, W\], got shape"):
            label_planes(wrong_rank)
    with pytest.raises(ValueError, match="expected min_size >= 0, got -1"):
        label_planes(mask, min_size=-1)
    with pytest.raises(ValueError, match=r"expected threshold=None for x of torch.bool .* got 0.5"):
        label_planes(mask, threshold=0.5)
    for dtype in (torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match="expected bool, integers, float16"):
            label_planes(mask.to(dtype))
    with pytest.raises(ValueError, match="expected a CUDA tensor, got one on meta"):
        label_planes(mask.to("meta"))


def test_too_many_pixels() -> None:
    pixel = torch.zeros(1, 1, 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"expected planes of at most 2\^31 - 4096 = \d+ pixels, got 2147483648 "):
        label_planes(pixel.expand(1, 2**16, 2**15))
    with pytest.raises(ValueError, match=r"at most \d+ tiles in a call, got \d+ .*label fewer planes at a time"):
        label_planes(pixel.expand(2**14, 2**15, 2**15))
