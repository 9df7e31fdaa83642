"""The losses where MONAI's are used: deep supervision, MetaTensor, engines, sliding windows, arguments and errors."""

from __future__ import annotations

import inspect
from typing import Any

import monai.losses
import pytest
import torch
from monai.data.meta_tensor import MetaTensor
from monai.inferers.utils import sliding_window_inference
from monai.losses.ds_loss import DeepSupervisionLoss
from monai.networks.nets.unet import UNet
from monai.utils.enums import LossReduction
from torch import Tensor, nn
from torch.nn.functional import interpolate

import fastinstance
from fastinstance.scene import Call
from fastinstance.testing import assert_close

SAME_NAME = ("DiceLoss", "DiceCELoss", "GeneralizedDiceLoss", "FocalLoss", "GeneralizedDiceFocalLoss", "TverskyLoss")
INSTANCE_LOSSES = ("InstanceLoss", "ICILoss", "FalseLoss", "ProximityLoss", "BlobLoss")
LOSSES = (*SAME_NAME, "InverseWeightedDiceLoss", *INSTANCE_LOSSES)


def example(*shape: int) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(0)
    target = (torch.rand(shape, generator=chance) > 0.8).float()
    return torch.randn(shape, generator=chance) + 2 * target - 1, target


def gradient(value: Tensor, leaf: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(value, leaf)
    return found


@pytest.mark.parametrize("name", LOSSES)
def test_meta_tensors(name: str) -> None:
    """The result is a plain tensor, with the value of plain ones; the gradient reaches the MetaTensor."""
    loss = getattr(fastinstance, name)(sigmoid=True)
    input, target = example(2, 1, 12, 12)
    leaf = input.clone().requires_grad_()
    expected = loss(leaf, target)
    for wrapped in ((MetaTensor(input), MetaTensor(target)), (MetaTensor(input), target), (input, MetaTensor(target))):
        leaf_in = wrapped[0].requires_grad_()
        value = loss(leaf_in, wrapped[1])
        assert type(value) is Tensor
        assert_close(value, expected)
        assert_close(gradient(value, leaf_in).as_subclass(Tensor), gradient(loss(leaf, target), leaf))


def test_meta_tensors_everywhere() -> None:
    input, target = example(2, 2, 12, 12)
    target = target[:, :1]
    labels, counts = fastinstance.label(MetaTensor(target.expand(-1, 2, -1, -1)))
    assert type(labels) is type(counts) is Tensor
    valid = (torch.arange(12) < 10).float().expand(2, 1, 12, 12)
    loss = fastinstance.InstanceLoss(instance_gt=1, center=1, proximity=0.1, sigmoid=True)
    expected = loss(input, target, target_labels=labels, valid_mask=valid)
    wrapped = [MetaTensor(tensor) for tensor in (input, target, labels, valid)]
    assert_close(loss(*wrapped[:2], target_labels=wrapped[2], valid_mask=wrapped[3]), expected)
    # The kernels get plain tensors too.
    call = Call(loss.settings, *wrapped)
    assert all(type(image) is Tensor for image in call.images)


@pytest.mark.parametrize("weight_mode", ["exp", "same", "two"])
@pytest.mark.parametrize("name", INSTANCE_LOSSES)
def test_deep_supervision(name: str, weight_mode: str) -> None:
    loss = getattr(fastinstance, name)(softmax=True, to_onehot_y=True, include_background=False)
    outputs = [example(2, 3, size, size)[0].requires_grad_() for size in (16, 8, 4)]
    target = (3 * example(2, 1, 16, 16)[0].sigmoid()).floor().clamp(max=2)
    total = DeepSupervisionLoss(loss, weight_mode=weight_mode)(outputs, target)
    weights = {"exp": (1.0, 0.5, 0.25), "same": (1.0,) * 3, "two": (1.0, 0.5, 0.5)}[weight_mode]
    parts = [
        weight * loss(output, interpolate(target, output.shape[2:], mode="nearest-exact"))
        for weight, output in zip(weights, outputs, strict=True)
    ]
    assert_close(total, sum(parts))
    total.backward()
    assert all(output.grad is not None and output.grad.isfinite().all() for output in outputs)


@pytest.mark.filterwarnings("ignore")  # of ignite and MONAI
def test_supervised_trainer() -> None:
    pytest.importorskip("ignite")
    from monai.engines.trainer import SupervisedTrainer

    torch.manual_seed(0)
    net = UNet(2, 1, 1, (4, 8), (2,))
    before = torch.cat([p.detach().clone().flatten() for p in net.parameters()])
    image, target = example(4, 1, 16, 16)
    batches = [{"image": MetaTensor(image[i : i + 2]), "label": MetaTensor(target[i : i + 2])} for i in (0, 2)]
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=batches,
        network=net,
        optimizer=torch.optim.Adam(net.parameters(), 1e-2),
        loss_function=fastinstance.ICILoss(sigmoid=True, reduction=LossReduction.MEAN),
        decollate=False,
    )
    trainer.run()
    assert trainer.state.iteration == 2
    assert torch.cat([p.detach().flatten() for p in net.parameters()]).sub(before).norm() > 1e-2
    assert trainer.state.output["loss"].isfinite()


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning")
def test_sliding_window_inference() -> None:
    """A loss of what the windows were put together to, for validation, and through the windows, for training."""
    net = nn.Conv2d(1, 1, 3, padding=1)
    image, target = example(1, 1, 24, 20)
    whole = sliding_window_inference(MetaTensor(image), (16, 16), 2, net, overlap=0.25, mode="gaussian")
    assert isinstance(whole, Tensor)
    loss = fastinstance.ProximityLoss(sigmoid=True)
    value = loss(whole, MetaTensor(target))
    assert_close(value, loss(whole.as_subclass(Tensor), target))
    value.backward()
    assert net.weight.grad is not None
    assert net.weight.grad.norm() > 0


@pytest.mark.parametrize("name", SAME_NAME)
def test_arguments_have_the_names_and_defaults_of_monai(name: str) -> None:
    """Of all that both have, besides `smooth_nr` and `smooth_dr`, which are MONAI's too."""
    ours = inspect.signature(getattr(fastinstance, name).__init__).parameters
    theirs = inspect.signature(getattr(monai.losses, name).__init__).parameters
    own = {key: parameter.default for key, parameter in ours.items() if key not in ("self", "options")}
    assert own.items() <= {key: parameter.default for key, parameter in theirs.items()}.items()
    forward = inspect.signature(getattr(fastinstance, name).forward).parameters
    assert list(forward)[:3] == list(inspect.signature(getattr(monai.losses, name).forward).parameters)


@pytest.mark.parametrize("reduction", list(LossReduction))
def test_reductions_of_monai(reduction: LossReduction) -> None:
    input, target = example(2, 1, 12, 12)
    expected = fastinstance.ICILoss(sigmoid=True, reduction=str(reduction))(input, target)
    assert_close(fastinstance.ICILoss(sigmoid=True, reduction=reduction)(input, target), expected)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"sigmoid": True, "softmax": True}, ValueError, "(?i)incompatible values: .*sigmoid=True, softmax=True"),
        ({"other_act": 3}, TypeError, "other_act .*callable.* int"),
        ({"reduction": "median"}, ValueError, "'median'"),
    ],
)
def test_the_same_errors(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    for make in (monai.losses.DiceLoss, fastinstance.DiceLoss, fastinstance.ICILoss):
        with pytest.raises(error, match=message):
            make(**wrong)
