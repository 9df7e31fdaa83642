"""Trainers for nnU-Net v2 (needs `nnunetv2`); see docs/integrations.md for how nnU-Net finds them."""

from fastinstance.integrations.nnunet.trainers import (
    PixelAndInstanceLoss,
    nnUNetTrainerBlob,
    nnUNetTrainerFalse,
    nnUNetTrainerICI,
    nnUNetTrainerInstance,
    nnUNetTrainerProximity,
)

__all__ = [
    "PixelAndInstanceLoss",
    "nnUNetTrainerBlob",
    "nnUNetTrainerFalse",
    "nnUNetTrainerICI",
    "nnUNetTrainerInstance",
    "nnUNetTrainerProximity",
]
