"""Losses as runs: a step is forward and backward, to the gradient of the logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import fastinstance as fi
from fastinstance import reference

from .case import Case, Goal, Run, Step
from .scenes import WEIGHTS, Scene

__all__ = ["LOSSES", "Loss", "deviation", "facts", "gate", "loop", "loss_case", "monai_loss", "step", "with_labels"]

Loss = Callable[[Tensor, Tensor], Tensor]

# The losses of the paper's Table 3, and all terms at once.
LOSSES: dict[str, Callable[[], nn.Module]] = {
    "Dice": lambda: fi.DiceLoss(sigmoid=True),
    "DiceCE": lambda: fi.DiceCELoss(sigmoid=True),
    "GenDice": lambda: fi.GeneralizedDiceLoss(sigmoid=True),
    "Focal": lambda: fi.FocalLoss(sigmoid=True),
    "Tversky": lambda: fi.TverskyLoss(sigmoid=True),
    "GDF": lambda: fi.GeneralizedDiceFocalLoss(sigmoid=True),
    "blob-Dice": lambda: fi.BlobLoss(pixel_loss="dice", sigmoid=True),
    "blob-GDF": lambda: fi.BlobLoss(sigmoid=True),
    "ICI": lambda: fi.ICILoss(sigmoid=True),
    "False": lambda: fi.FalseLoss(sigmoid=True),
    "Proximity": lambda: fi.ProximityLoss(sigmoid=True),
    "all terms": lambda: fi.InstanceLoss(**WEIGHTS, sigmoid=True),
}
_PIXEL = {"Dice": "dice", "DiceCE": "dicece", "GenDice": "generalized_dice", "Focal": "focal", "Tversky": "tversky"}
_PIXEL |= {"GDF": "gdf", "blob-Dice": "dice"}


def loop(name: str, connectivity: int | None = None) -> Loss:
    """A loss of `LOSSES` from the loop reference, which has all terms or those of blob loss."""
    module: Any = LOSSES[name]()
    weights = module.weights._asdict() if hasattr(module, "weights") else {"seg": 1.0}
    options: dict[str, Any] = {"pixel_loss": _PIXEL.get(name, "gdf"), "sigmoid": True, "connectivity": connectivity}
    terms = reference.blob_terms if "blob" in weights else reference.instance_terms

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        found = terms(logits, target, **options)._asdict()
        return torch.stack([weight * found[key] for key, weight in weights.items() if weight]).sum()

    return loss


def monai_loss(name: str) -> Loss:
    """MONAI's pixel loss of the same name."""
    from monai import losses

    classes = {"GenDice": "GeneralizedDice", "GDF": "GeneralizedDiceFocal"}
    options = {} if name == "Focal" else {"sigmoid": True}
    return getattr(losses, f"{classes.get(name, name)}Loss")(**options)


def step(loss: Loss, scene: Scene) -> Step:
    logits = scene.logits.clone().requires_grad_()

    def take() -> tuple[Tensor, Tensor]:
        value = loss(logits, scene.target)
        return value.detach(), torch.autograd.grad(value, logits)[0]

    return take


def with_labels(loss: Any, scene: Scene, connectivity: int | None = None) -> Loss:
    """The loss with the components of this scene's target computed beforehand."""
    labels, _ = fi.label(scene.target, connectivity=connectivity)
    return lambda logits, target: loss(logits, target, target_labels=labels)


def deviation(found: Any, truth: Any) -> float:
    """Largest deviation of any tensor, relative to the truth's largest value."""

    def relative(mine: Tensor, true: Tensor) -> float:
        mine, true = mine.detach().cpu().double(), true.detach().cpu().double()
        error = float((mine - true).abs().max() / true.abs().max().clamp(min=1e-30))
        return error if error == error else float("inf")

    return max(map(relative, found, truth))


def _corner(scene: Scene) -> Scene:
    """A part of the first plane that the loop reference can do."""
    side = 48 if scene.target.ndim == 4 else 16
    corner = (slice(0, 1), slice(None)) + (slice(0, side),) * (scene.target.ndim - 2)
    return Scene(scene.logits[corner].cpu().double(), scene.target[corner].cpu())


def gate(losses: Mapping[str, tuple[Any, Loss]], connectivity: int | None = None) -> Callable[[Scene, str], None]:
    """Value and gradient of each loss: on a corner the loop reference's, and on a GPU also the CPU's on the whole."""

    def agree(name: str, found: Any, truth: Any, allowed: float, whose: str) -> None:
        error = deviation(found, truth)
        if not error <= allowed:
            raise AssertionError(f"wrong: {name} differs by {error:.2g} from {whose}")

    def check(scene: Scene, device: str) -> None:
        corner = _corner(scene)
        for name, (ours, truth) in losses.items():
            expected = step(truth, corner)()
            given = {"": ours, ", labels given": with_labels(ours, corner, connectivity)}
            for kind, loss in given.items():
                agree(name + kind, step(loss, corner)(), expected, 1e-8, "the loop reference")
            if device == "cpu":
                continue
            whole = Scene(*(tensor.cpu() for tensor in scene))
            # bfloat16 rounds the gradient once.
            allowed = max(1e-4, 2 * torch.finfo(scene.logits.dtype).eps)
            expected = step(ours, whole)()
            given = {"": ours, ", labels given": with_labels(ours, scene, connectivity)}
            for kind, loss in given.items():
                agree(name + kind, step(loss, scene)(), expected, allowed, "the CPU")

    return check


def facts(scene: Scene, connectivity: int | None = None) -> dict[str, int]:
    """Pixels, planes, true and predicted instances."""
    return {
        "pixels": scene.target.numel(),
        "planes": len(scene.target),
        "N": int(fi.label(scene.target, connectivity=connectivity)[1].sum()),
        "M": int(fi.label(scene.logits >= 0, connectivity=connectivity)[1].sum()),
    }


def loss_case(
    name: str,
    scene: Callable[[int], Scene],
    *,
    dtype: torch.dtype = torch.float32,
    connectivity: int | None = None,
    slow_loop: bool = False,
    forward: bool = False,
    goals: tuple[Goal, ...] = (),
    details: bool = False,
) -> Case:
    """All terms, with and without labels given, and GDF, beside MONAI's GDF and, if wanted, the loop reference."""

    def inputs(seed: int) -> Scene:
        found = scene(seed)
        return found._replace(logits=found.logits.to(dtype))

    ours = fi.InstanceLoss(**WEIGHTS, sigmoid=True, connectivity=connectivity)
    gdf = LOSSES["GDF"]()
    runs = {
        "ours": Run(lambda scene: step(ours, scene), graph=True),
        "labels given": Run(lambda scene: step(with_labels(ours, scene, connectivity), scene), graph=True),
        "our GDF": Run(lambda scene: step(gdf, scene), graph=True),
    }
    if forward:

        def only_forward(scene: Scene) -> Step:
            logits = scene.logits.clone().requires_grad_()
            return lambda: (ours(logits, scene.target),)

        runs["ours, forward"] = Run(only_forward)
    peers = {"MONAI GDF": Run(lambda scene: step(monai_loss("GDF"), scene), graph=True)}
    truth = loop("all terms", connectivity)
    if slow_loop:
        peers["loop reference"] = Run(lambda scene: step(truth, scene), slow=True)
    return Case(
        name,
        inputs,
        runs,
        gate({"ours": (ours, truth), "our GDF": (gdf, loop("GDF"))}, connectivity),
        lambda scene: facts(scene, connectivity),
        peers,
        # Logits and target are read, the gradient is written.
        lambda scene: 2 * scene.logits.nbytes + scene.target.nbytes,
        base="MONAI GDF",
        goals=goals,
        details=details,
    )
