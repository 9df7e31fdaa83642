"""Voronoi regions in Triton's interpreter: SciPy's exact transform, with the same choice among the equally near."""

from __future__ import annotations

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


def test_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the sides are so long that squared distances have no place in float32."""
    from fastinstance_kernels import regions

    monkeypatch.setattr(regions, "EXACT_IN_FLOAT32", 0)
    check(fastinstance.label(pattern("specks", (9, 33))[None, None])[0])
