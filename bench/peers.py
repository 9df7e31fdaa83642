"""Implementations of others, from clones whose paths are given."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
from torch import Tensor

from .steps import Loss, monai_loss

__all__ = ["blob_loss", "instance_loss"]


def _module(path: str, name: str) -> Any:
    if path not in sys.path:
        sys.path.insert(0, path)
    return importlib.import_module(name)


def instance_loss(path: str, weights: dict[str, float], labels: Tensor | None = None) -> Loss:
    """The implementation of Rachmadi et al. at `path`, without its caps on the number of instances.

    It always computes all terms; `weights` are those of their sum, `labels` the components of the target.
    """
    module = _module(path, "losses.InstanceLoss")

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        authors = module.InstanceLoss(
            monai_loss("GDF"),
            _dice(),
            _dice(),
            spatial_dims=target.ndim - 2,
            max_cc_out=0,
            mul_too_many=1 << 40,
            centroid_offset=1,
            rate_instead_number=True,
        )
        found = authors(logits, target, None if labels is None else labels[: len(target)].to(target.dtype))
        names = ("seg", "instance_gt", "instance_pred", "center", "false_pred", "false_gt", "proximity")
        terms = dict(zip(names, found, strict=True))
        return torch.stack([weight * terms[name] for name, weight in weights.items() if weight]).sum()

    return loss


def _dice() -> Any:
    from monai.losses import DiceLoss

    return DiceLoss()


def blob_loss(path: str, name: str, labels: Tensor) -> Loss:
    """The implementation of Kofler et al. at `path`, which wants the components of the target.

    `name` is of MONAI's pixel loss, see `monai_loss`.
    """
    compute = _module(path, "blob_loss").compute_loss
    criterion = {name: {"name": name, "loss": monai_loss(name), "weight": 1.0, "sigmoid": False}}

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        weights = {"main_weight": 2, "blob_weight": 1}
        return compute(weights, criterion, criterion, logits, target, labels[: len(target)])[0]

    return loss
