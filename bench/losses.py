"""`python -m bench losses`: every loss on its own, beside MONAI's losses and SciPy's distance transform.

Also its gradient on four toy scenes; `python -m bench docs` writes both into the table of docs/losses.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastinstance as fi
from fastinstance import reference

from . import results
from .case import Case, Goal, Run, Setting, Step
from .scenes import PAPER, Scene, balls
from .steps import Loss, facts, gate, monai_loss, step

__all__ = ["LOSSES", "cases", "documented", "gradients", "toy_scenes", "write_docs"]

DOCS = results.ROOT / "docs" / "losses.md"
BEGIN, END = "<!-- table: python -m bench docs -->", "<!-- end of table -->"


@dataclass(frozen=True)
class Entry:
    """A row of the table; `loss` has only the term in question, and `truth` is the same by the loop reference."""

    name: str
    loss: Callable[..., Tensor]
    truth: Loss
    source: str
    formula: str
    sees: str


def term(weights: dict[str, float], **options: Any) -> tuple[fi.InstanceLoss, Loss]:
    """The loss, and its truth."""

    def truth(logits: Tensor, target: Tensor) -> Tensor:
        found = reference.instance_terms(logits, target, sigmoid=True, **options)._asdict()
        return torch.stack([weight * found[name] for name, weight in weights.items()]).sum()

    return fi.InstanceLoss(**{"seg": 0.0, **weights}, sigmoid=True, **options), truth


def pixels(name: str) -> Loss:
    return lambda x, y: reference.instance_terms(x, y, pixel_loss=name, sigmoid=True).seg


def of_plane(value: Callable[[reference.Plane], Tensor]) -> Loss:
    """The truth on a batch of one plane."""

    def truth(logits: Tensor, target: Tensor) -> Tensor:
        ((plane,),) = reference.planes_of(
            logits,
            target,
            include_background=True,
            to_onehot_y=False,
            sigmoid=True,
            softmax=False,
            other_act=None,
            threshold=0.5,
            connectivity=None,
            min_size=0,
            target_labels=None,
            valid_mask=None,
        )
        return value(plane)

    return truth


def recall(plane: reference.Plane) -> Tensor:
    return torch.stack(reference.lesion_recall(plane)).mean() + torch.stack(reference.false_part(plane)).mean()


FALSE = {"false_gt": 1.0, "false_pred": 1.0}
LOSSES = [
    Entry("`DiceLoss`", fi.DiceLoss(sigmoid=True), pixels("dice"), "Milletari 2016", "ℓ(P, G)", "pixels"),
    Entry("`DiceCELoss`", fi.DiceCELoss(sigmoid=True), pixels("dicece"), "", "ℓ(P, G)", "pixels"),
    Entry(
        "`GeneralizedDiceFocalLoss`",
        fi.GeneralizedDiceFocalLoss(sigmoid=True),
        pixels("gdf"),
        "Sudre 2017, Lin 2017",
        "ℓ(P, G)",
        "pixels",
    ),
    Entry(
        "`InverseWeightedDiceLoss`",
        fi.InverseWeightedDiceLoss(sigmoid=True),
        pixels("inverse_weighted_dice"),
        "Shirokikh 2020",
        "Dice of pixels weighted 1/\\|n\\|",
        "pixels, by size of the true component",
    ),
    Entry(
        "`instance_gt`",
        *term({"instance_gt": 1.0}),
        "Rachmadi 2024, Eq. 2",
        "mean_n L_GT(n)",
        "a true component and what touches it",
    ),
    Entry(
        "`instance_gt`, `mask_target=False`",
        *term({"instance_gt": 1.0}, mask_target=False),
        "ours",
        "mean_n L_GT(n), n not masked",
        "the same, and what lies below the threshold",
    ),
    Entry(
        "`instance_pred`",
        *term({"instance_pred": 1.0}),
        "Rachmadi 2024, Eq. 3",
        "mean_m L_P(m)",
        "a predicted component and what it touches",
    ),
    Entry("`center`", *term({"center": 1.0}), "Rachmadi 2024, Eq. 4", "ℓ(map_P, map_G)", "boxes at centroids"),
    Entry(
        "`false_gt` + `false_pred`",
        *term(FALSE),
        "Rachmadi 2024, Eqs. 5, 6",
        "missed/N + false/M",
        "found components (straight-through)",
    ),
    Entry(
        'the same, `missed="soft"`',
        *term(FALSE, missed="soft"),
        "ours",
        "+ w(1 − max p)/N + w·mean p/M",
        "missed and false ones too",
    ),
    Entry(
        "`proximity`",
        *term({"proximity": 1.0}),
        "Rachmadi 2024, Eqs. 7–10",
        "(S_P − S_GT)²",
        "components, by distance of boxes",
    ),
    Entry(
        '`proximity`, `proximity_reduction="sum"`',
        *term({"proximity": 1.0}, proximity_reduction="sum"),
        "ours",
        "S_P + S_GT",
        "the same",
    ),
    Entry(
        "`BlobLoss`, blob term",
        fi.BlobLoss(pixel_weight=0, pixel_loss="dice", sigmoid=True),
        lambda x, y: reference.blob_terms(x, y, pixel_loss="dice", sigmoid=True).blob,
        "Kofler 2023",
        "mean_n ℓ(P without other n, n)",
        "a true component and all false positives",
    ),
    Entry(
        "`CCLoss`",
        fi.CCLoss(sigmoid=True),
        lambda x, y: reference.cc_loss(x, y, sigmoid=True),
        "Jaus 2024, Bouteille 2025",
        "mean_n ℓ(P\\|R_n, G\\|R_n)",
        "Voronoi regions",
    ),
    Entry(
        '`CCLoss("inverse_weighted_dice")`',
        fi.CCLoss(pixel_loss="inverse_weighted_dice", sigmoid=True),
        lambda x, y: reference.cc_loss(x, y, pixel_loss="inverse_weighted_dice", sigmoid=True),
        "Kundu 2026",
        "the same, pixels weighted by size",
        "Voronoi regions",
    ),
    Entry(
        "`ComponentTverskyLoss`",
        fi.ComponentTverskyLoss(sigmoid=True),
        of_plane(reference.component_tversky),
        "Luu 2026 (CATMIL)",
        "Tversky of pixels weighted 1/(\\|n\\| + 5)",
        "pixels, by size of the true component",
    ),
    Entry(
        "`ComponentMILLoss`",
        fi.ComponentMILLoss(sigmoid=True),
        of_plane(lambda plane: torch.stack(reference.component_mil(plane)).mean()),
        "Luu 2026 (CATMIL)",
        "mean_n −log max p",
        "the most likely pixel of a true component",
    ),
    Entry(
        "`LesionRecallLoss`",
        fi.LesionRecallLoss(sigmoid=True),
        of_plane(recall),
        "ours",
        "1 − mean_n mean p + mean_m Σ_FP p/\\|m\\|",
        "true components, false parts of predicted ones",
    ),
]
CC = "`CCLoss`"


def toy_scenes() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Logits, target and where to go (1 up, -1 down, 0 elsewhere) of four objects beside a large lesion that is found.

    The large one is 10 × 10, the object 4 × 4; it is found where the logit is 1 or more.
    """
    scenes = {}
    for name in ("missed", "false", "under-segmented", "displaced"):
        logits, target = torch.full((32, 32), -3.0, dtype=torch.float64), torch.zeros(32, 32, dtype=torch.float64)
        wanted = torch.zeros(32, 32, dtype=torch.float64)
        logits[4:14, 4:14], target[4:14, 4:14] = 2.0, 1.0
        target[20:24, 20:24] = float(name != "false")
        logits[20:24, 20:24] = 1.0 if name == "false" else -1.0
        if name in ("missed", "false"):
            wanted[20:24, 20:24] = 1.0 if name == "missed" else -1.0
        else:
            logits[20:24, 22:24] = 1.0
            wanted[20:24, 20:22] = 1.0
        if name == "displaced":
            logits[20:24, 24:26] = 1.0
            wanted[20:24, 24:26] = -1.0
        scenes[name] = logits[None, None], target[None, None], wanted[None, None]
    return scenes


def gradients(loss: Callable[[Tensor, Tensor], Tensor]) -> dict[str, float]:
    """How strongly each error is corrected: Σ -∂L/∂logit where it should rise, Σ ∂L/∂logit where it should fall."""
    found = {}
    for name, (logits, target, wanted) in toy_scenes().items():
        leaf = logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf, target), leaf)
        found[name] = -float((gradient * wanted).sum())
    return found


def _transform(scene: Scene) -> Step:
    """SciPy's distance transform of every plane, from which regions can be read."""
    from scipy.ndimage import distance_transform_edt

    planes = fi.label(scene.target)[0].flatten(0, 1).cpu().numpy()
    return lambda: [distance_transform_edt(p == 0, return_distances=False, return_indices=True) for p in planes]


def _regions_given(scene: Scene) -> Step:
    regions = fi.voronoi(fi.label(scene.target)[0])
    loss = fi.CCLoss(sigmoid=True)
    return step(lambda x, y: loss(x, y, target_regions=regions), scene)


def _goal(name: str) -> Goal:
    """What was asked of the time of a loss."""
    if name == f"{CC}, regions given":
        return Goal(f"{name} ÷ MONAI's DiceCE", name, 1.0, over="MONAI DiceCE")
    if name.startswith(CC[:-1]):
        text = f"{name} ÷ (MONAI's DiceCE + distance transform)"
        return Goal(text, name, 1.5, over=("MONAI DiceCE", "distance transform"))
    return Goal(f"{name} ÷ MONAI's GDF", name, 1.0, over="MONAI GDF")


def cases(setting: Setting) -> list[Case]:
    """The paper's mini-batch."""
    shape = (1, 32, 32) if setting.small else PAPER

    def prepare(loss: Loss) -> Run:
        return Run(lambda scene: step(loss, scene), graph=True)

    ours = {entry.name: prepare(entry.loss) for entry in LOSSES} | {
        f"{CC}, regions given": Run(_regions_given, graph=True)
    }
    monai = {f"MONAI {name}": Run(lambda scene, name=name: step(monai_loss(name), scene)) for name in ("DiceCE", "GDF")}
    return [
        Case(
            "48×256², 15 + 20 instances",
            lambda seed: balls(shape, 15, 20, (2, 7), seed=seed),
            ours,
            gate({entry.name: (entry.loss, entry.truth) for entry in LOSSES}),
            facts,
            monai | {"distance transform": Run(_transform)},
            base="MONAI GDF",
            goals=tuple(map(_goal, ours)),
        )
    ]


def _number(value: float) -> str:
    """In thousandths; what only the smoothing of a ratio leaves is "≈ 0"."""
    if abs(value) < 1e-5:
        return "0" if abs(value) < 1e-9 else "≈ 0"
    return f"{1e3 * value:.3g}".replace("-", "−")


def documented(suite: dict[str, Any]) -> str:
    """The table of docs/losses.md, from this suite's figures."""
    (row,) = suite["rows"]
    medians = {name: time["median"] for name, time in row["milliseconds"].items()}
    lines = [
        "| loss | source | formula | what it sees | missed | false | under-segmented | displaced | cost |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in LOSSES:
        cells = [entry.name, entry.source, entry.formula, entry.sees]
        cells += [_number(value) for value in gradients(entry.loss).values()]
        cells.append(f"{medians[entry.name] / medians['MONAI GDF']:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_docs() -> str:
    """docs/losses.md with its table made anew, from the newest figures on a CPU."""
    files = sorted(results.FOLDER.glob("cpu-*.json"))
    suite = next(found for path in reversed(files) if (found := results.load(path)["suites"].get("losses")))
    text = DOCS.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{documented(suite)}\n{END}{after}"
