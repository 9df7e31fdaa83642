"""Voronoi regions in Triton's interpreter: SciPy's exact transform, with the same choice among the equally near."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import fastinstance
from fastinstance.testing import PATTERNS, pattern, scenes

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

EXAMPLES = settings().max_examples


def check(labels: torch.Tensor, spacing: Any = None) -> None:
    expected = fastinstance.voronoi(labels, spacing)
    with fastinstance.use_backend("triton"):
        found = fastinstance.voronoi(labels, spacing)
    assert found.dtype == labels.dtype
    assert torch.equal(found, expected)


@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(scenes(labels=True, spacing=True))
def test_drawn_scenes(scene: Any) -> None:
    labels = scene.target_labels
    check(fastinstance.label(scene.target)[0] if labels is None else labels, scene.spacing)


@pytest.mark.parametrize("spacing", [None, (3.25, 1.0), (0.7, 1.3)])
def test_patterns(spacing: Any) -> None:
    masks = torch.stack([pattern(name, (17, 40)) for name in PATTERNS])[:, None]
    if spacing == (0.7, 1.3):  # rounded ties may go either way
        masks = torch.rand(3, 1, 17, 40, generator=torch.Generator().manual_seed(0)) > 0.98
        apart = torch.zeros_like(masks)
        apart[..., 3, 5] = apart[..., 12, 30] = True
        masks = torch.cat([masks[:0], apart])
    check(fastinstance.label(masks)[0], spacing)


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (3, 129), (1, 1, 1), (2, 5, 33), (6, 1, 9)])
@pytest.mark.parametrize("pixels", [0, 1, 4])
def test_sizes(shape: tuple[int, ...], pixels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(2, 1, *shape, dtype=torch.int32)
    places = torch.randint(labels[0].numel(), (2, pixels), generator=generator)
    labels.view(2, -1).scatter_(1, places, torch.arange(1, pixels + 1, dtype=torch.int32).expand(2, -1))
    check(labels)
    check(labels, (2.0,) + (1.0,) * (len(shape) - 1))


@pytest.mark.parametrize("size", [(19, 33), (5, 6, 11)])
def test_every_pixel_its_own_label(size: tuple[int, ...]) -> None:
    """Which pixel it was shows, also among the equally near: dense to sparse noise, a lattice, one pixel, none."""
    pixels = math.prod(size)
    noise = torch.rand(3, pixels, generator=torch.Generator().manual_seed(0)) > torch.tensor([[0.5], [0.9], [0.98]])
    chosen = torch.zeros(7, *size, dtype=torch.bool)  # the last one stays empty
    chosen[:3] = noise.view(3, *size)
    chosen[(3, ..., *[slice(None, None, 4)] * len(size))] = True
    chosen[4].view(-1)[0] = chosen[5].view(-1)[-1] = True
    labels = (chosen.view(7, -1) * torch.arange(1, pixels + 1)).view(7, 1, *size)
    check(labels)
    check(labels, (2.5, 1.0, 0.5)[-len(size) :])


def test_columns_longer_than_the_stack_is_deep() -> None:
    """A parabola for an envelope, so that all stay on the stack; and one that the last pixel of each column clears."""
    y, x = torch.arange(33)[:, None], torch.arange(60)
    curve = (x == (y - 16) ** 2 // 5) | (x == 59) & (y == 32)
    check((torch.stack([curve, curve.flip(1)]) * (1 + y)).int()[:, None])


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int64])
def test_dtypes(dtype: torch.dtype) -> None:
    labels = torch.zeros(1, 1, 9, 35, dtype=dtype)
    labels[..., 2, 3], labels[..., 7, 34] = 5, torch.iinfo(dtype).max
    check(labels)


def test_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the sides are so long that squared distances have no place in float32."""
    from fastinstance_kernels import regions

    monkeypatch.setattr(regions, "EXACT_IN_FLOAT32", 0)
    check(fastinstance.label(pattern("specks", (9, 33))[None, None])[0])
