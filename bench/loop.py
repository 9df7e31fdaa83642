"""`python -m bench loop`: what the training loop of the study adds to the network and the loss.

A step draws its slices, augments them, and trains; the base trains on one batch that is there already. Images a second
are the planes of a case divided by the time of a step.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastinstance import FalseLoss, label
from fastinstance.testing import assert_close

from .case import Case, Run, Setting
from .case import Step as Take
from .scenes import Scene, balls
from .steps import facts

__all__ = ["cases"]

AUGMENTATIONS: Mapping[str, dict[str, Any]] = {
    "no augmentation": {},
    "flips, intensities": {"flip": "both", "scale": 0.1, "shift": 0.1},
    "and rotation": {"flip": "both", "scale": 0.1, "shift": 0.1, "rotation": 10},
}


class _Loop:
    """The study's batches of a scene, a subject for each plane, and a network."""

    def __init__(self, scene: Scene, network: dict[str, Any], augmentation: dict[str, Any], precision: str) -> None:
        from fastinstance.study.augment import Augmentation
        from fastinstance.study.batches import Batches
        from fastinstance.study.config import RunConfig
        from fastinstance.study.networks import build_network
        from fastinstance.study.subjects import Subject
        from fastinstance.study.training import Step

        planes, device = len(scene.target), scene.target.device
        training = {"subjects_per_batch": planes, "slices_per_subject": 1, "optimizer": "adamw", "precision": precision}
        config = RunConfig.from_table({"network": network, "training": training, "augmentation": augmentation})
        images, target = scene.logits.cpu(), scene.target.cpu() > 0
        labels, _ = label(target)
        subjects = [
            Subject(str(n), str(n), images[n : n + 1], target[n], labels[n], None, (1.0, 1.0, 1.0))
            for n in range(planes)
        ]
        self.batches = Batches(subjects, config.training, Augmentation(config.augmentation), device)
        self.network = build_network(config.network, 1).to(device).train()
        self.optimizer = torch.optim.AdamW(self.network.parameters(), 1e-6, fused=True)
        self.step = Step(self.network, config.training, device, None)
        self.loss: nn.Module = FalseLoss(sigmoid=True)

    def take(self, number: int) -> float:
        """A step of the loop."""
        value, norm = self.step(self.loss, self.batches.draw(number)).tolist()
        self.optimizer.step()
        return value + 0 * norm

    def base(self) -> Take:
        """A step without what the loop adds."""
        images, labels, valid = self.batches.draw(0)

        def take() -> None:
            logits = self.step.logits(images)
            loss = self.loss(logits, labels > 0, target_labels=labels, valid_mask=valid)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

        return take


def _prepare(network: dict[str, Any], augmentation: dict[str, Any], precision: str, *, base: bool = False) -> Any:
    def prepare(scene: Scene) -> Take:
        loop = _Loop(scene, network, augmentation, precision)
        numbers = itertools.count()
        return loop.base() if base else lambda: loop.take(next(numbers))

    return prepare


def _gate(network: dict[str, Any]) -> Any:
    def check(scene: Scene, device: str) -> None:
        """The loss of a step is that of its images in any order."""
        del device
        loop = _Loop(scene, network, {}, "float32")
        images, target = scene.logits, scene.target
        expected = loop.loss(loop.network(images), target, target_labels=label(target)[0]).detach()
        assert_close(torch.tensor(loop.take(0)), expected.cpu(), rtol=1e-3)

    return check


def cases(setting: Setting) -> list[Case]:
    """Both networks; on a GPU also with autocast."""
    shape = (2, 64, 64) if setting.small else (8, 192, 160) if setting.device == "cpu" else (48, 256, 256)
    networks: dict[str, dict[str, Any]] = {
        "U-Net": {"name": "unet"},
        "SwinUNETR": {"name": "swinunetr", "feature_size": 12 if setting.small else 24},
    }

    def case(name: str, precision: str) -> Case:
        network = networks[name]
        runs = {
            what: Run(_prepare(network, augmentation, precision), repeatable=False)
            for what, augmentation in AUGMENTATIONS.items()
        }
        base = "batch at hand"
        return Case(
            f"{name}, {shape[0]}×{shape[1]}×{shape[2]}, {precision}",
            lambda seed: balls(shape, 8, 10, (1.5, 4), seed=seed),
            runs,
            _gate(network),
            facts,
            {base: Run(_prepare(network, {}, precision, base=True), repeatable=False)},
            base=base,
            share=True,
            sets=1,
        )

    precisions = ["float32", "bf16"] if setting.device == "cuda" else ["float32"]
    return [case(name, precision) for name in networks for precision in precisions]
