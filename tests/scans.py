"""Small subjects for tests of training: bright blobs on noise, one or several channels."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

import fastinstance
from fastinstance.study.subjects import Subject


def scan(
    number: int, slices: int = 4, size: tuple[int, int] = (32, 24), *, channels: int = 1, **changes: Any
) -> Subject:
    """The same for the same number; the last of several slices is empty."""
    chance = torch.Generator().manual_seed(number)
    smooth = functional.avg_pool2d(torch.randn(slices, 1, *size, generator=chance), 5, 1, 2)
    target = smooth[:, 0] > 0.3
    if slices > 1:
        target[-1] = False
    image = 2 * target.float() + 0.7 * torch.randn(channels, slices, *size, generator=chance)
    image = (image - image.mean()) / image.std()
    parts: dict[str, Any] = {
        "name": f"scan-{number}",
        "person": f"person-{number}",
        "image": image,
        "target": target,
        "labels": fastinstance.label(target[:, None])[0][:, 0],
        "valid": None,
        "spacing": (3.0, 1.0, 1.0),
    }
    return Subject(**(parts | changes))
