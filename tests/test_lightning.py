"""The Lightning module trains, warms up and hands the loss all that a batch has."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fastinstance
from fastinstance.testing import assert_close

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # Lightning's advice
    pytest.mark.skipif(find_spec("lightning") is None, reason="needs lightning"),
]


class Recorded(nn.Module):
    """A loss, and the arguments of its calls."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss, self.calls = loss, []

    def forward(self, input: Tensor, target: Tensor, **extra: Tensor) -> Tensor:
        self.calls.append((input.detach(), target, extra))
        return self.loss(input, target, **extra)


def batches(extra: bool = False) -> list[dict[str, Tensor]]:
    chance = torch.Generator().manual_seed(0)
    found = []
    for _ in range(4):
        label = (torch.rand(2, 1, 12, 12, generator=chance) > 0.8).float()
        batch = {"image": label + 0.3 * torch.randn(2, 1, 12, 12, generator=chance), "label": label}
        if extra:
            batch |= {"target_labels": fastinstance.label(label)[0], "valid_mask": torch.ones(2, 1, 12, 12)}
        found.append(batch)
    return found


def fit(folder: Path, data: list[dict[str, Tensor]], loss: nn.Module, **options: Any) -> tuple[Any, Any]:
    import lightning

    from fastinstance.integrations.lightning import InstanceSegmentation

    torch.manual_seed(0)
    module = InstanceSegmentation(nn.Conv2d(1, 1, 3, padding=1), loss, **options)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=4, logger=False, default_root_dir=folder, num_sanity_val_steps=0, **quiet
    )
    trainer.fit(module, DataLoader(data, batch_size=None), DataLoader(data[:1], batch_size=None))  # pyright: ignore[reportArgumentType]
    return module, trainer


def test_training(tmp_path: Path) -> None:
    loss = Recorded(fastinstance.ICILoss(sigmoid=True))
    data = batches()
    module, trainer = fit(tmp_path, data, loss, learning_rate=1e-2)
    torch.manual_seed(0)
    start = nn.Conv2d(1, 1, 3, padding=1)
    assert (module.network.weight - start.weight).norm() > 1e-3
    values = [fastinstance.ICILoss(sigmoid=True)(input, target) for input, target, _ in loss.calls]
    assert len(values) == 5  # four steps, one of validation
    assert_close(trainer.callback_metrics["val_loss"], values[4])
    assert_close(trainer.callback_metrics["train_loss_epoch"], torch.stack(values[:4]).mean())


def test_warm_up(tmp_path: Path) -> None:
    early, late = Recorded(fastinstance.DiceCELoss(sigmoid=True)), Recorded(fastinstance.ProximityLoss(sigmoid=True))
    fit(tmp_path, batches(), late, warm_up_loss=early, warm_up=0.5)
    assert (len(early.calls), len(late.calls)) == (2, 3)


def test_labels_and_masks_reach_the_loss(tmp_path: Path) -> None:
    loss = Recorded(fastinstance.FalseLoss(sigmoid=True, process_group="world"))
    fit(tmp_path, batches(extra=True), loss)
    assert all(set(extra) == {"target_labels", "valid_mask"} for *_, extra in loss.calls)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"warm_up": 50, "warm_up_loss": nn.Identity()}, "warm_up between 0 and 1, a share of the steps, got 50"),
        ({"warm_up": 0.5}, "warm_up and warm_up_loss together, got warm_up=0.5 and warm_up_loss=None"),
    ],
)
def test_wrong_arguments(wrong: dict[str, Any], message: str) -> None:
    from fastinstance.integrations.lightning import InstanceSegmentation

    with pytest.raises(ValueError, match=message):
        InstanceSegmentation(nn.Identity(), nn.Identity(), **wrong)
