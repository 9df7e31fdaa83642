"""`python -m bench training`: a whole training step of two networks with every loss.

The share of a loss is what its step takes beyond one whose loss is the mean of the logits. The network's output moves
logits of a generated scene a little, so that the loss sees lesions and not the noise of an untrained network. In
compiled steps the network is compiled and, on a GPU, the loss on its own; a CUDA graph holds the whole step, with the
optimiser.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .case import Case, Run, Setting, Step
from .scenes import Scene, balls
from .steps import LOSSES, Loss, facts, gate, loop, monai_loss

__all__ = ["cases"]

BASE = "mean of the logits"


def _unet(dimensions: int, small: bool) -> torch.nn.Module:
    from monai.networks.nets import UNet

    channels = (4, 8) if small else (16, 32, 64, 128, 256)
    return UNet(dimensions, 1, 1, channels=channels, strides=(2,) * (len(channels) - 1), num_res_units=2)


def _swin(dimensions: int, small: bool) -> torch.nn.Module:
    from monai.networks.nets import SwinUNETR

    return SwinUNETR(1, 1, feature_size=12 if small else 24, spatial_dims=dimensions)


class _Trainer:
    """A network with its optimiser, shared by the steps of a case."""

    def __init__(self, network: Callable[[], torch.nn.Module], mode: str, device: str) -> None:
        torch.manual_seed(0)
        self.net: Any = network().to(device)
        on_gpu = device == "cuda"
        self.optimizer = torch.optim.AdamW(self.net.parameters(), 1e-6, fused=True, capturable=on_gpu)
        self.mode, self.device = mode, device
        if mode == "compiled":
            self.net = torch.compile(self.net)

    def step(self, loss: Any, scene: Scene) -> Step:
        """One step with this loss."""
        if self.mode == "compiled" and self.device == "cuda":
            loss = torch.compile(loss)

        def take() -> None:
            self.optimizer.zero_grad()
            with torch.autocast(self.device, torch.bfloat16, enabled=self.mode == "autocast"):
                moved = self.net(scene.target)
            loss(torch.add(scene.logits, moved.float(), alpha=1e-3), scene.target).backward()
            self.optimizer.step()

        return take


def _mean(logits: Tensor, _: Tensor) -> Tensor:
    return logits.mean()


def cases(setting: Setting) -> list[Case]:
    """Both networks at both sizes: eager, with autocast, compiled; CUDA graphs of all eager steps on a GPU."""
    if setting.small:
        shapes = [(2, 64, 64)]  # the smallest that SwinUNETR accepts
    elif setting.device == "cpu":
        shapes = [(4, 96, 96), (1, 32, 32, 32)]
    else:
        shapes = [(48, 256, 256), (2, 96, 96, 96)]
    modes = ["eager", "autocast", *([] if setting.small else ["compiled"])]

    def case(network: str, shape: tuple[int, ...], mode: str) -> Case:
        make = functools.partial({"U-Net": _unet, "SwinUNETR": _swin}[network], len(shape) - 1, setting.small)
        trainer = functools.cache(lambda device: _Trainer(make, mode, device))

        def run(loss: Callable[[], Loss]) -> Run:
            def prepare(scene: Scene) -> Step:
                return trainer(scene.target.device.type).step(loss(), scene)

            return Run(prepare, graph=mode != "compiled", repeatable=False)

        size = f"{shape[0]}×{shape[-1]}{'²³'[len(shape) - 3]}"
        # The torch path of a loss that is not timed here would be checked for nothing: the loss of all terms has them.
        checked = {name: (LOSSES[name](), loop(name)) for name in ("all terms", "blob-GDF")}
        return Case(
            f"{network}, {size}, {mode}",
            lambda seed: balls(shape, 8, 10, (1.5, 4), seed=seed),
            {name: run(loss) for name, loss in LOSSES.items()},
            gate(checked),
            facts,
            {BASE: run(lambda: _mean), "MONAI GDF": run(lambda: monai_loss("GDF"))},
            base=BASE,
            share=True,
            sets=1,
        )

    return [
        case(network, shape, mode)
        for mode in modes
        for network in ("U-Net", "SwinUNETR")
        for shape in shapes
        # The CPU's compiler takes minutes for SwinUNETR, as do the smallest volumes that it accepts.
        if setting.device == "cuda" or network == "U-Net" or (mode != "compiled" and len(shape) == 3)
    ]
