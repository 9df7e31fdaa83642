"""Every loss on its own: its gradient on four toy scenes, its time beside MONAI, and the table in docs/losses.md.

`python -m bench losses --out FILE.json` measures the times; `python -m bench docs` writes the table anew.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monai.losses import DiceCELoss as MonaiDiceCE
from monai.losses import GeneralizedDiceFocalLoss as MonaiGDF
from torch import Tensor

import fastinstance as fi

from .scenes import PAPER, balls

__all__ = ["LOSSES", "documented", "run", "table", "write_docs"]

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs" / "losses.md"
BEGIN, END = "<!-- table: python -m bench docs -->", "<!-- end of table -->"


@dataclass(frozen=True)
class Entry:
    """A row of the table; `loss` has only the term in question."""

    name: str
    loss: Callable[[Tensor, Tensor], Tensor]
    source: str
    formula: str
    sees: str


def term(weights: dict[str, float], **options: Any) -> fi.InstanceLoss:
    return fi.InstanceLoss(**{"seg": 0.0, **weights}, sigmoid=True, **options)


FALSE = {"false_gt": 1.0, "false_pred": 1.0}
LOSSES = [
    Entry("`DiceLoss`", fi.DiceLoss(sigmoid=True), "Milletari 2016", "ℓ(P, G)", "pixels"),
    Entry("`DiceCELoss`", fi.DiceCELoss(sigmoid=True), "", "ℓ(P, G)", "pixels"),
    Entry(
        "`GeneralizedDiceFocalLoss`",
        fi.GeneralizedDiceFocalLoss(sigmoid=True),
        "Sudre 2017, Lin 2017",
        "ℓ(P, G)",
        "pixels",
    ),
    Entry(
        "`InverseWeightedDiceLoss`",
        fi.InverseWeightedDiceLoss(sigmoid=True),
        "Shirokikh 2020",
        "Dice of pixels weighted 1/\\|n\\|",
        "pixels, by size of the true component",
    ),
    Entry(
        "`instance_gt`",
        term({"instance_gt": 1.0}),
        "Rachmadi 2024, Eq. 2",
        "mean_n L_GT(n)",
        "a true component and what touches it",
    ),
    Entry(
        "`instance_gt`, `mask_target=False`",
        term({"instance_gt": 1.0}, mask_target=False),
        "ours",
        "mean_n L_GT(n), n not masked",
        "the same, and what lies below the threshold",
    ),
    Entry(
        "`instance_pred`",
        term({"instance_pred": 1.0}),
        "Rachmadi 2024, Eq. 3",
        "mean_m L_P(m)",
        "a predicted component and what it touches",
    ),
    Entry("`center`", term({"center": 1.0}), "Rachmadi 2024, Eq. 4", "ℓ(map_P, map_G)", "boxes at centroids"),
    Entry(
        "`false_gt` + `false_pred`",
        term(FALSE),
        "Rachmadi 2024, Eqs. 5, 6",
        "missed/N + false/M",
        "found components (straight-through)",
    ),
    Entry(
        'the same, `missed="soft"`',
        term(FALSE, missed="soft"),
        "ours",
        "+ w(1 − max p)/N + w·mean p/M",
        "missed and false ones too",
    ),
    Entry(
        "`proximity`",
        term({"proximity": 1.0}),
        "Rachmadi 2024, Eqs. 7–10",
        "(S_P − S_GT)²",
        "components, by distance of boxes",
    ),
    Entry(
        '`proximity`, `proximity_reduction="sum"`',
        term({"proximity": 1.0}, proximity_reduction="sum"),
        "ours",
        "S_P + S_GT",
        "the same",
    ),
    Entry(
        "`BlobLoss`, blob term",
        fi.BlobLoss(pixel_weight=0, pixel_loss="dice", sigmoid=True),
        "Kofler 2023",
        "mean_n ℓ(P without other n, n)",
        "a true component and all false positives",
    ),
    Entry(
        "`CCLoss`",
        fi.CCLoss(sigmoid=True),
        "Jaus 2024, Bouteille 2025",
        "mean_n ℓ(P\\|R_n, G\\|R_n)",
        "Voronoi regions",
    ),
    Entry(
        '`CCLoss("inverse_weighted_dice")`',
        fi.CCLoss(pixel_loss="inverse_weighted_dice", sigmoid=True),
        "Kundu 2026",
        "the same, pixels weighted by size",
        "Voronoi regions",
    ),
    Entry(
        "`ComponentTverskyLoss`",
        fi.ComponentTverskyLoss(sigmoid=True),
        "Luu 2026 (CATMIL)",
        "Tversky of pixels weighted 1/(\\|n\\| + 5)",
        "pixels, by size of the true component",
    ),
    Entry(
        "`ComponentMILLoss`",
        fi.ComponentMILLoss(sigmoid=True),
        "Luu 2026 (CATMIL)",
        "mean_n −log max p",
        "the most likely pixel of a true component",
    ),
    Entry(
        "`LesionRecallLoss`",
        fi.LesionRecallLoss(sigmoid=True),
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


def _step(loss: Callable[..., Tensor], logits: Tensor, *arguments: Tensor, **named: Tensor) -> Callable[[], None]:
    leaf = logits.clone().requires_grad_()

    def step() -> None:
        leaf.grad = None
        loss(leaf, *arguments, **named).backward()

    return step


def run(*, repeats: int = 15) -> dict[str, Any]:
    """Forward and backward of every loss on the paper's batch, beside MONAI's losses and SciPy's distance transform.

    CPU time of one thread, the competitors in turn: comparable on a machine that others use as well.
    """
    from scipy.ndimage import distance_transform_edt

    scene = balls(PAPER, 15, 20, (2, 7))
    logits, target = scene
    labels = fi.label(target)[0]

    def transform() -> None:
        for plane in labels.flatten(0, 1).numpy():
            distance_transform_edt(plane == 0, return_distances=False, return_indices=True)

    regions = fi.voronoi(labels)
    runs: dict[str, Callable[[], object]] = {
        "MONAI DiceCE": _step(MonaiDiceCE(sigmoid=True), logits, target),
        "MONAI GDF": _step(MonaiGDF(sigmoid=True), logits, target),
        "distance transform": transform,
        f"{CC}, regions given": _step(fi.CCLoss(sigmoid=True), logits, target, target_regions=regions),
    }
    runs |= {entry.name: _step(entry.loss, logits, target) for entry in LOSSES}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(3 + repeats):
        for name, step in runs.items():
            start = time.process_time()
            step()
            if number >= 3:
                samples[name].append(1e3 * (time.process_time() - start))
    torch.set_num_threads(threads)
    medians = {name: round(statistics.median(values), 2) for name, values in samples.items()}
    return {"bench": "losses", "milliseconds": medians}


def _yardstick(name: str, medians: dict[str, float]) -> tuple[str, float, float]:
    """What the time of a loss is compared with, its time, and the ratio that was asked."""
    dice_ce = medians["MONAI DiceCE"]
    if name == f"{CC}, regions given":
        return "MONAI DiceCE", dice_ce, 1.0
    if name.startswith(CC[:-1]):
        return "MONAI DiceCE + transform", dice_ce + medians["distance transform"], 1.5
    return "MONAI GDF", medians["MONAI GDF"], 1.0


def table(result: dict[str, Any]) -> str:
    """Markdown: the times and their ratios to what was asked."""
    medians = result["milliseconds"]
    lines = ["| loss | ms | beside | ratio | asked |", "|---|---|---|---|---|"]
    for name, median in medians.items():
        if name.startswith("MONAI") or name == "distance transform":
            lines.append(f"| {name} | {median:.1f} |  |  |  |")
        else:
            beside, base, asked = _yardstick(name, medians)
            lines.append(f"| {name} | {median:.1f} | {beside} | {median / base:.2f} | {asked} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    """In thousandths; what only the smoothing of a ratio leaves is "≈ 0"."""
    if abs(value) < 1e-5:
        return "0" if abs(value) < 1e-9 else "≈ 0"
    return f"{1e3 * value:.3g}".replace("-", "−")


def documented(result: dict[str, Any]) -> str:
    """The table of docs/losses.md."""
    medians = result["milliseconds"]
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
    """docs/losses.md with its table made anew, from the latest figures."""
    newest = max((ROOT / "bench" / "results").glob("losses-*.json"))
    text = DOCS.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{documented(json.loads(newest.read_text()))}\n{END}{after}"
