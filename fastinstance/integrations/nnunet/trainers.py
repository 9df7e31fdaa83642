"""nnU-Net trainers that add the instance terms to nnU-Net's own loss.

nnU-Net imports this file by its path (`nnUNet_extTrainer`), as a module outside of any package: hence the absolute
imports, and a folder in which there is nothing else to import.
"""

# nnU-Net's types name its own losses.
# pyright: reportIncompatibleMethodOverride=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

from typing import Any, ClassVar

import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn

from fastinstance import BlobLoss, InstanceLoss

__all__ = [
    "PixelAndInstanceLoss",
    "nnUNetTrainerBlob",
    "nnUNetTrainerFalse",
    "nnUNetTrainerICI",
    "nnUNetTrainerInstance",
    "nnUNetTrainerProximity",
]


class PixelAndInstanceLoss(nn.Module):
    """`pixel_weight`·(nnU-Net's loss) + (instance terms), for one output of the network.

    Args:
        pixel_loss: nnU-Net's loss of (output, target).
        instance_loss: a loss of this library without a pixel term; `softmax`, `to_onehot_y` and no background for
            exclusive classes, `sigmoid` for regions.
        pixel_weight: of nnU-Net's loss.
        regions: targets are boolean regions `[B, R, *S]`, with the ignored pixels as one more channel if there is an
            `ignore_label`; else class indices `[B, 1, *S]`.
        ignore_label: what ignored pixels hold in a target of class indices; None if there is no such label.

    With `active = False` it is nnU-Net's loss alone, unweighted.
    """

    def __init__(
        self,
        pixel_loss: nn.Module,
        instance_loss: nn.Module,
        *,
        pixel_weight: float,
        regions: bool,
        ignore_label: int | None,
    ) -> None:
        super().__init__()
        self.pixel_loss, self.instance_loss = pixel_loss, instance_loss
        self.pixel_weight, self.regions, self.ignore_label = pixel_weight, regions, ignore_label
        self.active = True

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        pixel = self.pixel_loss(output, target)
        if not self.active:
            return pixel
        valid = None
        if self.ignore_label is not None and self.regions:
            valid, target = target[:, -1:] == 0, target[:, :-1]
        elif self.ignore_label is not None:
            valid = target != self.ignore_label
            target = torch.where(valid, target, 0)
        return self.pixel_weight * pixel + self.instance_loss(output, target, valid_mask=valid)

    def extra_repr(self) -> str:
        return f"pixel_weight={self.pixel_weight:g}, regions={self.regions}, ignore_label={self.ignore_label}"


class nnUNetTrainerInstance(nnUNetTrainer):  # noqa: N801
    """nnU-Net with instance terms: `pixel_weight`·(nnU-Net's loss) + `instance_weights`, at every scale of the output.

    nnU-Net's loss (Dice and cross-entropy) is the pixel term. Subclasses change the class attributes, or
    `build_instance_loss`. Several GPUs average over the instances of the whole batch.
    """

    pixel_weight: ClassVar[float] = 1.0
    instance_weights: ClassVar[dict[str, float]] = {}
    """Weights of `fastinstance.InstanceLoss` other than `seg`."""
    warm_up: ClassVar[float] = 0.0
    """Share of the epochs that train on nnU-Net's loss alone first."""

    def build_instance_loss(self, **options: Any) -> nn.Module:
        """The instance terms of one output; `options` say how to read it."""
        return InstanceLoss(seg=0, **self.instance_weights, **options)

    def _build_loss(self) -> nn.Module:
        loss = super()._build_loss()
        labels = self.label_manager
        softmax = not labels.has_regions
        instance_loss = self.build_instance_loss(
            sigmoid=not softmax,
            softmax=softmax,
            to_onehot_y=softmax,
            include_background=not softmax,
            process_group="world",
        )

        def added(pixel_loss: nn.Module) -> nn.Module:
            return PixelAndInstanceLoss(
                pixel_loss,
                instance_loss,
                pixel_weight=self.pixel_weight,
                regions=labels.has_regions,
                ignore_label=labels.ignore_label,
            )

        if isinstance(loss, DeepSupervisionWrapper):
            loss.loss = added(loss.loss)
            return loss
        return added(loss)

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        active = self.current_epoch >= self.warm_up * self.num_epochs
        for module in self.loss.modules():
            if isinstance(module, PixelAndInstanceLoss) and module.active != active:
                module.active = active
                self.print_to_log_file("Instance terms are", "on" if active else "off: training on the pixel loss")


class nnUNetTrainerICI(nnUNetTrainerInstance):  # noqa: N801
    """¼ pixel + ½ instance + ¼ centre loss (Eq. 12)."""

    pixel_weight = 0.25
    instance_weights: ClassVar = {"instance_gt": 0.5, "center": 0.25}


class nnUNetTrainerFalse(nnUNetTrainerInstance):  # noqa: N801
    """Pixel loss + rates of missed and false instances (Eq. 13)."""

    instance_weights: ClassVar = {"false_gt": 1.0, "false_pred": 1.0}


class nnUNetTrainerProximity(nnUNetTrainerInstance):  # noqa: N801
    """Pixel loss + 0.1 proximity (Eq. 14), the latter in the second half of the epochs: it is not bounded."""

    instance_weights: ClassVar = {"proximity": 0.1}
    warm_up = 0.5


class nnUNetTrainerBlob(nnUNetTrainerInstance):  # noqa: N801
    """2 pixel + blob loss (Kofler et al. 2023), with Dice and cross-entropy as the loss of a blob."""

    pixel_weight = 2.0

    def build_instance_loss(self, **options: Any) -> nn.Module:
        return BlobLoss(pixel_weight=0, pixel_loss="dicece", **options)
