"""Generated inputs of stated sizes, instance numbers and foreground."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["PAPER", "WEIGHTS", "Scene", "balls", "noise", "specks", "spread"]

WEIGHTS = {
    "seg": 1.0,
    "instance_gt": 1.0,
    "instance_pred": 1.0,
    "center": 1.0,
    "false_gt": 1.0,
    "false_pred": 1.0,
    "proximity": 0.1,
}
PAPER = (48, 256, 256)  # the paper's mini-batch: 2 subjects × 24 slices


class Scene(NamedTuple):
    """One batch."""

    logits: Tensor  # [B, 1, *S] float32
    target: Tensor  # [B, 1, *S] float32, 0 or 1


def _draw(mask: np.ndarray, centers: np.ndarray, radii: np.ndarray) -> None:
    """Fill discs (balls) into a boolean image."""
    for center, radius in zip(centers, radii, strict=True):
        low = np.maximum(np.floor(center - radius), 0).astype(int)
        high = np.minimum(np.ceil(center + radius) + 1, mask.shape).astype(int)
        grid = np.ogrid[tuple(map(slice, low, high))]
        distance = sum((axis - c) ** 2 for axis, c in zip(grid, center, strict=True))
        mask[tuple(map(slice, low, high))] |= distance <= radius**2


def _logits(predicted: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Noisy logits, at least 0.1 from the threshold on the side that `predicted` says."""
    size = np.abs(rng.normal(np.where(predicted, 2.0, 4.0), 0.6)).clip(min=0.1)
    return np.where(predicted, size, -size).astype(np.float32)


def balls(
    shape: tuple[int, ...], instances: int, predicted: int, radius: tuple[float, float], *, seed: int = 0
) -> Scene:
    """Discs or balls: about `instances` true ones in each plane of `shape` [B, *S], `predicted` predicted ones.

    Four in five true ones are found, displaced by about a pixel; the other predicted ones are false.
    """
    rng = np.random.default_rng(seed)
    size = np.array(shape[1:])
    target, mask = np.zeros(shape, bool), np.zeros(shape, bool)
    hits = min(predicted, round(0.8 * instances))
    for plane in range(shape[0]):
        centers = rng.uniform(0, size, (instances, len(size)))
        radii = rng.uniform(*radius, instances)
        _draw(target[plane], centers, radii)
        moved = centers[:hits] + rng.normal(0, 1, (hits, len(size)))
        _draw(mask[plane], moved, radii[:hits] * rng.uniform(0.7, 1.2, hits))
        false = rng.uniform(0, size, (predicted - hits, len(size)))
        _draw(mask[plane], false, rng.uniform(*radius, predicted - hits))
    return Scene(torch.from_numpy(_logits(mask, rng)[:, None]), torch.from_numpy(target[:, None].astype(np.float32)))


def noise(scene: Scene, *, shift: float = 0, seed: int = 0) -> Scene:
    """The target of `scene` with noise for logits: half of the pixels are foreground, fewer with a negative `shift`."""
    generator = torch.Generator().manual_seed(seed)
    return scene._replace(logits=torch.randn(scene.logits.shape, generator=generator) + shift)


def spread(shape: tuple[int, ...], instances: int, foreground: float, *, seed: int = 0) -> Scene:
    """Exactly `instances` separate discs in the batch of `shape` [B, H, W] that fill a share of it, all of them found.

    The predicted ones are displaced by up to a pixel.
    """
    rng = np.random.default_rng(seed)
    planes, *size = shape
    target, mask = np.zeros(shape, bool), np.zeros(shape, bool)
    radius = np.sqrt(foreground * np.prod(shape) / instances / np.pi)
    ends = instances * np.arange(planes + 1) // planes
    for plane, number in enumerate(np.diff(ends)):
        side = int(np.ceil(np.sqrt(number)))
        cells = rng.permutation(side**2)[:number]
        cell = np.array(size) / max(side, 1)
        room = np.maximum(cell / 2 - radius - 2.5, 0)
        centers = (np.stack([cells // max(side, 1), cells % max(side, 1)], 1) + 0.5) * cell
        centers = (centers + rng.uniform(-room, room, centers.shape)).round()
        radii = np.full(number, radius)
        _draw(target[plane], centers, radii)
        _draw(mask[plane], centers + rng.integers(-1, 2, centers.shape), radii)
    return Scene(torch.from_numpy(_logits(mask, rng)[:, None]), torch.from_numpy(target[:, None].astype(np.float32)))


def specks(side: int, *, seed: int = 0) -> Scene:
    """One plane with a pixel in every 4×4 square, on both sides; a fifth of the predicted ones miss by a pixel."""
    rng = np.random.default_rng(seed)
    target, mask = np.zeros((side, side), bool), np.zeros((side, side), bool)
    target[1::4, 1::4] = True
    rows, columns = target.nonzero()
    mask[rows, columns + (rng.random(len(rows)) < 0.2)] = True
    logits = torch.from_numpy(_logits(mask, rng))
    return Scene(logits[None, None], torch.from_numpy(target.astype(np.float32))[None, None])
