"""A Lightning module that trains a network with an instance loss, as it is or as an example (needs `lightning`)."""

from __future__ import annotations

from collections.abc import Mapping

import lightning
import torch
from torch import Tensor, nn

__all__ = ["InstanceSegmentation"]


class InstanceSegmentation(lightning.LightningModule):
    """Trains on `warm_up_loss` first and on `loss` then; AdamW with a one-cycle learning rate.

    Batches are mappings with "image" and "label", as MONAI's, and if they are there "target_labels" (instance ids) and
    "valid_mask", which the loss gets. Logs "train_loss" and "val_loss", averaged over ranks.

    Args:
        network: image -> logits `[B, C, *S]`.
        loss: of this library, with `sigmoid=True` or `softmax=True`; with `process_group="world"` it averages over the
            instances of all ranks.
        warm_up_loss: a pixel loss for the first `warm_up` of all steps.
        warm_up: share of the steps; 0.5 suits `ProximityLoss`.
        learning_rate: the highest of the cycle.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: nn.Module,
        *,
        warm_up_loss: nn.Module | None = None,
        warm_up: float = 0.0,
        learning_rate: float = 1e-3,
    ) -> None:
        super().__init__()
        if not 0 <= warm_up <= 1:
            raise ValueError(f"expected warm_up between 0 and 1, a share of the steps, got {warm_up}")
        if (warm_up > 0) != (warm_up_loss is not None):
            raise ValueError(
                f"expected warm_up and warm_up_loss together, got warm_up={warm_up} and warm_up_loss={warm_up_loss}"
            )
        self.network, self.loss = network, loss
        self.warm_up_loss, self.warm_up = warm_up_loss, warm_up
        self.learning_rate = learning_rate

    def forward(self, image: Tensor) -> Tensor:
        return self.network(image)

    def current_loss(self) -> nn.Module:
        """The loss of this step."""
        early = self.global_step < self.warm_up * self.trainer.estimated_stepping_batches
        return self.warm_up_loss if early and self.warm_up_loss is not None else self.loss

    def _step(self, loss: nn.Module, batch: Mapping[str, Tensor], name: str) -> Tensor:
        extra = {key: batch[key] for key in ("target_labels", "valid_mask") if key in batch}
        value = loss(self(batch["image"]), batch["label"], **extra)
        self.log(name, value, prog_bar=True, sync_dist=True, on_epoch=True, batch_size=len(batch["image"]))
        return value

    def training_step(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self._step(self.current_loss(), batch, "train_loss")

    def validation_step(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self._step(self.loss, batch, "val_loss")

    def configure_optimizers(self) -> dict[str, object]:  # pyright: ignore[reportIncompatibleMethodOverride]
        optimizer = torch.optim.AdamW(self.parameters(), self.learning_rate)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
