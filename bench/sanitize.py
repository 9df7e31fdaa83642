"""A few small steps for `compute-sanitizer`: every kernel once or more, on sizes that fit no tile."""

import torch

import fastinstance as fi

from .scenes import WEIGHTS, balls, noise


def main() -> None:
    """Label, then take steps, in 2D and 3D; with given ids and by component as well."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for shape, connectivities in (((2, 37, 45), (4, 8)), ((1, 9, 17, 35), (6, 18, 26))):
        scene = noise(balls(shape, 3, 3, (1, 3)))
        logits, target = scene.logits.to(device), scene.target.to(device)
        for connectivity in connectivities:
            fi.label(logits > 0, connectivity=connectivity, min_size=3)
            loss = fi.InstanceLoss(**WEIGHTS, sigmoid=True, connectivity=connectivity)
            step = logits.clone().requires_grad_()
            loss(step, target).backward()
            print(shape, connectivity, step.grad.abs().sum().item())
        ids = (target * (1 + torch.arange(shape[-1], device=device) // 9)).int()
        by_component = fi.CCLoss, fi.ComponentMILLoss, fi.LesionRecallLoss
        for loss in (fi.InstanceLoss(**WEIGHTS, sigmoid=True), *(kind(sigmoid=True) for kind in by_component)):
            step = logits.clone().requires_grad_()
            loss(step, target, target_labels=ids).backward()
            print(shape, type(loss).__name__, step.grad.abs().sum().item())


if __name__ == "__main__":
    main()
