"""`python -m bench cpu`: all seven terms, forward and backward, beside MONAI's GDF and the loop reference."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from monai.losses import GeneralizedDiceFocalLoss as MonaiGDF
from torch import Tensor

import fastinstance as fi
from fastinstance import reference

from .scenes import PAPER, WEIGHTS, Scene, balls, noise
from .timing import Time, peak_bytes, times

__all__ = ["CASES", "run", "table"]

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """Inputs and what is asked of them; ratios are to MONAI's GDF on the same batch."""

    scene: Callable[[], Scene]
    connectivity: int | None = None
    at_most: float | None = None
    at_most_given: float | None = None


CASES = {
    "48×256², 15 + 20 instances": Case(lambda: balls(PAPER, 15, 20, (2, 7)), None, 0.7, 0.6),
    "48×256², 10 + 10, 3 % foreground": Case(lambda: balls(PAPER, 10, 10, (8, 9))),
    "48×256², 1000 + 1000, 3 % foreground": Case(lambda: balls(PAPER, 1000, 1000, (0.6, 1.0))),
    "48×256², noise (half foreground)": Case(lambda: noise(balls(PAPER, 15, 20, (2, 7))), 4, 4.0),
    "2×128³, 200 + 200 instances": Case(lambda: balls((2, 128, 128, 128), 100, 100, (2, 7)), None, 1.5),
    # MONAI's time falls by half once the allocator keeps blocks of its temporaries' size: both are published.
    "the first again, allocator warm": Case(lambda: balls(PAPER, 15, 20, (2, 7)), None, 0.7, 0.6),
}


def _step(loss: Loss, scene: Scene) -> Callable[[], None]:
    logits = scene.logits.clone().requires_grad_()

    def step() -> None:
        logits.grad = None
        loss(logits, scene.target).backward()

    return step


def _loop(connectivity: int | None) -> Loss:
    def loss(logits: Tensor, target: Tensor) -> Tensor:
        terms = reference.instance_terms(logits, target, sigmoid=True, connectivity=connectivity)
        return torch.stack([WEIGHTS[name] * value for name, value in terms._asdict().items()]).sum()

    return loss


def _check(scene: Scene, ours: Loss, loop: Loss) -> None:
    """No time for a wrong result: value and gradient against the loop reference, on a corner of one plane."""
    side = 48 if scene.target.ndim == 4 else 16
    corner = (slice(0, 1), slice(None)) + (slice(0, side),) * (scene.target.ndim - 2)
    found = []
    for loss in (ours, loop):
        logits = scene.logits[corner].double().requires_grad_()
        value = loss(logits, scene.target[corner])
        found.append((value.detach(), torch.autograd.grad(value, logits)[0]))
    for mine, truth in zip(*found, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-8, atol=1e-10)


def _memory(name: str, threads: int) -> float:
    """Bytes per pixel at the peak of one step, without input, target and gradient."""
    torch.set_num_threads(threads)
    case = CASES[name]
    scene = case.scene()
    ours = fi.InstanceLoss(**WEIGHTS, sigmoid=True, connectivity=case.connectivity)

    def prepare() -> Callable[[], object]:
        small = Scene(*(tensor[:1].clone() for tensor in scene))
        _step(ours, small)()  # code and thread pools are not the batch's memory
        return _step(ours, scene)

    pixels = scene.target.numel()
    return (peak_bytes(prepare) - 4 * pixels) / pixels


def _memory_elsewhere(name: str) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_memory, (name, torch.get_num_threads()))


def _milliseconds(time: Time) -> dict[str, float]:
    return {key: round(value, 3) for key, value in time._asdict().items()}


def run(*, repeats: int = 15) -> dict[str, Any]:
    """Measure all cases; the loop reference is timed once, on the first case."""
    rows = []
    for name, case in CASES.items():
        scene = case.scene()
        ours = fi.InstanceLoss(**WEIGHTS, sigmoid=True, connectivity=case.connectivity)
        slow = _loop(case.connectivity)
        _check(scene, ours, slow)
        labels, counts = fi.label(scene.target, connectivity=case.connectivity)

        def given(logits: Tensor, target: Tensor, ours: Any = ours, labels: Tensor = labels) -> Tensor:
            return ours(logits, target, target_labels=labels)

        losses: dict[str, Loss] = {
            "monai_gdf": MonaiGDF(sigmoid=True),
            "ours": ours,
            "ours_labels_given": given,
            "our_gdf": fi.GeneralizedDiceFocalLoss(sigmoid=True),
        }
        measured = times({key: _step(loss, scene) for key, loss in losses.items()}, repeats=repeats)
        if not rows:
            measured |= times({"loop": _step(slow, scene)}, repeats=1, warmup=0)
        rows.append(
            {
                "case": name,
                "instances": int(counts.sum()),
                "predicted": int(fi.label(scene.logits >= 0, connectivity=case.connectivity)[1].sum()),
                "milliseconds": {key: _milliseconds(time) for key, time in measured.items()},
                "bytes_per_pixel": round(_memory_elsewhere(name), 1),
                "at_most": case.at_most,
                "at_most_given": case.at_most_given,
            }
        )
    return {"bench": "cpu", "rows": rows}


def table(result: dict[str, Any]) -> str:
    """Markdown: medians, ratios to MONAI's GDF with what was asked, and memory."""
    lines = [
        "| case | N | M | MONAI GDF, ms | our GDF, ms | all terms, ms | ratio | asked | labels given | asked | B/px |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        medians = {key: value["median"] for key, value in row["milliseconds"].items()}
        base = medians["monai_gdf"]
        cells = [
            row["case"],
            row["instances"],
            row["predicted"],
            f"{base:.1f}",
            f"{medians['our_gdf']:.1f}",
            f"{medians['ours']:.1f}",
            f"{medians['ours'] / base:.2f}",
            row["at_most"] or "",
            f"{medians['ours_labels_given'] / base:.2f}",
            row["at_most_given"] or "",
            row["bytes_per_pixel"],
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    medians = [{k: v["median"] for k, v in row["milliseconds"].items()} for row in result["rows"]]
    lines += ["", f"From 10 to 1000 instances a plane: ×{medians[2]['ours'] / medians[1]['ours']:.2f} (asked: 1.3)"]
    lines.append(
        f"Loop reference on the first case: {medians[0]['loop'] / 1e3:.1f} s, "
        f"×{medians[0]['loop'] / medians[0]['ours']:.0f} ours (asked: 100)"
    )
    return "\n".join(lines)
