"""`python -m bench table3`: every loss of the paper's Table 3, forward and backward, in all implementations.

Each row is one loss on the paper's mini-batch. The loop reference and the authors' code compute all terms whatever the
weights. Components by pooling are kornia's alone, of the sides that the loss labels.
"""

from __future__ import annotations

from typing import Any

import fastinstance as fi

from .case import Case, Run, Setting, Step
from .peers import blob_loss, instance_loss
from .scenes import PAPER, Scene, balls
from .steps import LOSSES, facts, gate, loop, monai_loss, step, with_labels

__all__ = ["cases"]

# What the paper states for an A100: of a pixel loss and of an instance loss, not of each.
_PAPER = dict.fromkeys(("Dice", "DiceCE", "GenDice", "Focal", "Tversky", "GDF"), "21 ms")
_PAPER |= dict.fromkeys(("ICI", "False", "Proximity"), "18–25 s")


def _pooling(pred: bool) -> Run:
    def prepare(scene: Scene) -> Step:
        from kornia.contrib import connected_components

        masks = [scene.target, *([(scene.logits >= 0).to(scene.target.dtype)] if pred else [])]
        return lambda: [connected_components(mask) for mask in masks]

    return Run(prepare, slow=True)


def _peers(name: str, module: Any, paths: dict[str, str]) -> dict[str, Run]:
    if name in ("Dice", "DiceCE", "GenDice", "Focal", "Tversky", "GDF"):
        return {"MONAI": Run(lambda scene: step(monai_loss(name), scene), graph=True)}
    found = {
        "loop reference": Run(lambda scene: step(loop(name), scene), slow=True),
        "kornia components": _pooling(not name.startswith("blob")),
    }
    if name.startswith("blob") and "blob_loss" in paths:

        def authors(scene: Scene) -> Step:
            labels, _ = fi.label(scene.target)
            return step(blob_loss(paths["blob_loss"], name.removeprefix("blob-"), labels), scene)

        found["authors, labels given"] = Run(authors, slow=True)
    elif not name.startswith("blob") and "instance-loss" in paths:
        path, weights = paths["instance-loss"], module.weights._asdict()
        found["authors"] = Run(lambda scene: step(instance_loss(path, weights), scene), slow=True)
        found["authors, labels given"] = Run(
            lambda scene: step(instance_loss(path, weights, fi.label(scene.target)[0]), scene), slow=True
        )
    return found


def cases(setting: Setting) -> list[Case]:
    """One case a loss; those of instances first."""
    shape = (2, 32, 32) if setting.small else PAPER

    def scene(seed: int) -> Scene:
        return balls(shape, *((3, 4) if setting.small else (15, 20)), (2, 3 if setting.small else 7), seed=seed)

    def case(name: str) -> Case:
        loss: Any = LOSSES[name]()
        runs = {"ours": Run(lambda scene: step(loss, scene), graph=True)}
        if hasattr(loss, "weights"):
            runs["labels given"] = Run(lambda scene: step(with_labels(loss, scene), scene), graph=True)
        return Case(
            name,
            scene,
            runs,
            gate({name: (loss, loop(name))}),
            facts,
            _peers(name, loss, dict(setting.peers)),
            lambda scene: 2 * scene.logits.nbytes + scene.target.nbytes,
            base="ours",
            notes={"paper, A100": _PAPER[name]} if name in _PAPER else {},
        )

    instance = ("ICI", "False", "Proximity", "blob-GDF", "blob-Dice")
    return [case(name) for name in (*instance, *(name for name in LOSSES if name not in (*instance, "all terms")))]
