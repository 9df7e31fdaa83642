"""Random changes of slices, on the device where they lie; labels follow, and keep their ids."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastinstance.study.config import AugmentationConfig
from fastinstance.study.subjects import StudyError

__all__ = ["Augmentation", "Batch", "Changes"]


class Batch(NamedTuple):
    """Slices for a step."""

    images: Tensor
    """`[B, C, Y, X]` float32."""
    labels: Tensor
    """`[B, 1, Y, X]` int32, the true instances of each slice; 0 is background."""
    valid: Tensor | None
    """`[B, 1, Y, X]` bool, False where the annotation says nothing; None where it covers all."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """`change` of each."""
        return Batch(change(self.images), change(self.labels), None if self.valid is None else change(self.valid))


class Changes(NamedTuple):
    """What happens to each of B slices."""

    angles: NDArray[np.float32]
    """Degrees, counter-clockwise."""
    horizontal: NDArray[np.bool_]
    vertical: NDArray[np.bool_]
    gains: NDArray[np.float32]
    shifts: NDArray[np.float32]

    def part(self, where: slice) -> Changes:
        """Those of some of the slices."""
        return Changes(*(one[where] for one in self))  # pyright: ignore[reportArgumentType]


class Augmentation:
    """Rotation, flips, and intensity scale and shift of each slice.

    An instance keeps its id, also where the rotation tears a thin one apart or lets two touch: it is the same lesion.
    What is turned in from outside of the image is not valid, so that it counts nowhere.

    Args:
        config: of `[augmentation]`.

    Raises:
        StudyError: kornia is needed and missing.
    """

    def __init__(self, config: AugmentationConfig) -> None:
        self.config = config
        self.geometric = bool(config.rotation) or config.flip != "none"
        if self.geometric and find_spec("kornia") is None:
            raise StudyError("augmentation needs kornia: pip install 'fastinstance[study]'")

    def draw(self, rng: np.random.Generator, count: int) -> Changes:
        """Random changes of `count` slices."""
        config = self.config
        flips = rng.random((2, count)) < 0.5
        angles, noise = rng.uniform(-1, 1, count), rng.standard_normal((2, count))
        return Changes(
            angles=(config.rotation * angles).astype(np.float32),
            horizontal=flips[0] & (config.flip in ("horizontal", "both")),
            vertical=flips[1] & (config.flip in ("vertical", "both")),
            gains=(1 + config.scale * noise[0]).astype(np.float32),
            shifts=(config.shift * noise[1]).astype(np.float32),
        )

    def __call__(self, batch: Batch, changes: Changes) -> Batch:
        """The changed slices."""
        if self.geometric:
            batch = _move(batch, changes, rotate=bool(self.config.rotation))
        if not self.config.scale and not self.config.shift:
            return batch
        device = batch.images.device
        gains, shifts = (torch.from_numpy(one).to(device).view(-1, 1, 1, 1) for one in (changes.gains, changes.shifts))
        return batch._replace(images=torch.addcmul(shifts, batch.images, gains))


def _move(batch: Batch, changes: Changes, *, rotate: bool) -> Batch:
    from kornia.geometry import transform

    for flip, coins in ((transform.hflip, changes.horizontal), (transform.vflip, changes.vertical)):
        if coins.any():
            coin = torch.from_numpy(coins).to(batch.images.device).view(-1, 1, 1, 1)
            batch = batch.map(lambda one, flip=flip, coin=coin: torch.where(coin, flip(one), one))
    if not rotate:
        return batch
    images, labels, valid = batch
    count, _, height, width = images.shape
    centre = images.new_tensor([[(width - 1) / 2, (height - 1) / 2]]).expand(count, -1)
    angles = torch.from_numpy(changes.angles).to(images.device)
    matrix = transform.get_rotation_matrix2d(centre, angles, torch.ones_like(centre))
    size = (height, width)
    # Ids are exact in float32 up to 2^24. What is outside of the image arrives as 0: no instance, not valid.
    known = torch.ones_like(labels) if valid is None else valid
    sharp = transform.warp_affine(torch.cat([labels, known], 1).float(), matrix, size, mode="nearest")
    return Batch(
        transform.warp_affine(images, matrix, size, padding_mode="border"),
        sharp[:, :1].int(),
        sharp[:, 1:] > 0,
    )
