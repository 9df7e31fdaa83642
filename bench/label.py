"""`python -m bench label`: connected components, beside every other labeller that is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import fastinstance as fi

from .case import Case, Run, Setting
from .scenes import balls

__all__ = ["Mask", "cases"]


class Mask(NamedTuple):
    """What is labelled."""

    mask: Tensor  # [B, 1, *S] bool


def _random(share: float, *shape: int) -> Callable[[int], Tensor]:
    return lambda seed: (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share)[:, None]


def _snake(*shape: int) -> Callable[[int], Tensor]:
    """One component that fills each plane: full rows, joined at alternating ends."""
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[..., ::2, :] = True
    mask[..., 1::4, -1] = True
    mask[..., 3::4, 0] = True
    return lambda _: mask[:, None]


def _blobs(shape: tuple[int, ...], number: int, radius: tuple[float, float]) -> Callable[[int], Tensor]:
    return lambda seed: balls(shape, number, 0, radius, seed=seed).target > 0


MASKS = {
    "48×256², sparse blobs": _blobs((48, 256, 256), 15, (2, 7)),
    "48×256², dense blobs": _blobs((48, 256, 256), 250, (3, 8)),
    "48×256², noise 10 %": _random(0.1, 48, 256, 256),
    "48×256², noise 50 %": _random(0.5, 48, 256, 256),
    "48×256², noise 60 %": _random(0.6, 48, 256, 256),
    "48×256², snakes": _snake(48, 256, 256),
    "4096², noise 50 %": _random(0.5, 1, 4096, 4096),
    "2×128³, blobs": _blobs((2, 128, 128, 128), 100, (2, 7)),
}
SMALL = {
    "noise": _random(0.5, 2, 33, 47),
    "snakes": _snake(2, 8, 9),
    "volume": _random(0.3, 1, 9, 11, 35),
}


VOLUMES = ("2×128³, blobs", "volume")


def _per_plane(label: Callable[[Tensor], object]) -> Run:
    return Run(lambda inputs: lambda: [label(plane) for plane in inputs.mask[:, 0]])


def _peers(device: str, axes: int) -> dict[str, Run]:
    """The labellers for this device; full connectivity."""
    full = np.ones((3,) * axes, dtype=int)

    def scipy(plane: Tensor) -> object:
        from scipy import ndimage

        return ndimage.label(plane.numpy(), full)

    def cc3d(plane: Tensor) -> object:
        import cc3d

        return cc3d.connected_components(plane.numpy(), connectivity=8 if axes == 2 else 26)  # pyright: ignore

    def kornia(inputs: Mask) -> Callable[[], object]:
        from kornia.contrib import connected_components

        return lambda: connected_components(inputs.mask.float(), num_iterations=128)

    def cupyx(plane: Tensor) -> object:
        import cupy  # pyright: ignore[reportMissingImports]
        from cupyx.scipy import ndimage  # pyright: ignore[reportMissingImports]

        return ndimage.label(cupy.asarray(plane), cupy.ones((3,) * axes))

    def cucim(plane: Tensor) -> object:
        import cupy  # pyright: ignore[reportMissingImports]
        from cucim.skimage.measure import label  # pyright: ignore[reportMissingImports]

        return label(cupy.asarray(plane))

    found = {"scipy": scipy, "cc3d": cc3d} if device == "cpu" else {"cupyx": cupyx, "cucim": cucim}
    runs = {name: _per_plane(label) for name, label in found.items()}
    return runs | ({"kornia, 128 iterations": Run(kornia, slow=True)} if axes == 2 else {})


def _gate(inputs: Mask, device: str) -> None:
    """Ids must be scipy's, on a GPU those of the CPU."""
    labels, counts = fi.label(inputs.mask)
    if device == "cuda":
        for mine, truth in zip((labels, counts), fi.label(inputs.mask.cpu()), strict=True):
            if not torch.equal(mine.cpu(), truth):
                raise AssertionError("wrong: components differ from the CPU's")
        return
    from scipy import ndimage

    for plane, mine in zip(inputs.mask[:, 0].numpy(), labels[:, 0].numpy(), strict=True):
        truth, _ = ndimage.label(plane, np.ones((3,) * plane.ndim, dtype=int))  # pyright: ignore
        if not np.array_equal(mine, truth):
            raise AssertionError("wrong: components differ from scipy's")


def _facts(inputs: Mask) -> dict[str, int]:
    mask = inputs.mask
    return {"pixels": mask.numel(), "planes": len(mask), "components": int(fi.label(mask)[1].sum())}


def cases(setting: Setting) -> list[Case]:
    """Blobs, noise about the density where components percolate, snakes, a large image, volumes."""

    def case(name: str, make: Callable[[int], Tensor]) -> Case:
        def step(inputs: Any) -> Callable[[], object]:
            return lambda: fi.label(inputs.mask)

        return Case(
            name,
            lambda seed: Mask(make(seed)),
            {"ours": Run(step, graph=True)},
            _gate,
            _facts,
            _peers(setting.device, 3 if name in VOLUMES else 2),
            lambda inputs: 5 * inputs.mask.numel(),  # 1 byte read and 4 written
            base="ours",
        )

    return [case(name, make) for name, make in (SMALL if setting.small else MASKS).items()]
