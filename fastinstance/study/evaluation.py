"""What a network says about a subject, and how good that is; an instance is a component of a slice."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

import fastinstance
from fastinstance.matching import Matches, match_instances
from fastinstance.metrics import plane_metrics
from fastinstance.study.config import SCORES
from fastinstance.study.subjects import Subject

__all__ = ["PRECISIONS", "mean_scores", "numbered", "predict", "scores", "slice_matches"]

PRECISIONS = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def predict(network: nn.Module, image: Tensor, *, batch: int = 8, precision: str = "float32") -> Tensor:
    """Probabilities of every pixel of an image.

    Args:
        network: from `load_network`; it stays on its device, in evaluation mode.
        image: `[C, Z, Y, X]` of any size, as `Subject.image`: the channels of the training, mean 0 and variance 1 each.
        batch: slices at a time.
        precision: "float32", "bf16" or "fp16" (autocast).

    Returns:
        `[Z, Y, X]` float32, on the CPU.
    """
    device = next(network.parameters()).device
    dtype = PRECISIONS[precision]
    network.eval()
    parts = []
    with torch.inference_mode(), torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        for slices in image.transpose(0, 1).split(batch):
            logits = network(slices.to(device, non_blocking=True))
            parts.append(logits[:, 0].float().sigmoid().cpu())
    return torch.cat(parts)


def numbered(labels: Tensor) -> Tensor:
    """Instances of slices `[Z, Y, X]`, each numbered from 1, with numbers that no two slices share; int32."""
    most = labels.flatten(1).amax(1)
    before = (most.cumsum(0) - most)[:, None, None]
    return torch.where(labels > 0, labels + before, 0).int()


def slice_matches(subject: Subject, predicted: Tensor, *, min_size: int = 0) -> Matches:
    """Instances of all slices of a subject, as one plane, and which of them overlap.

    Args:
        subject: its labels are the true instances.
        predicted: `[Z, Y, X]` bool; its instances are the 8-connected components of each slice.
        min_size: instances with fewer pixels are background.
    """
    labels = subject.labels
    if subject.valid is not None:
        labels, predicted = labels * subject.valid, predicted & subject.valid
    found, _ = fastinstance.label(predicted[:, None])
    true, pred = (numbered(one)[None, None] for one in (labels, found[:, 0]))
    return match_instances(pred > 0, true > 0, pred_labels=pred, target_labels=true, min_size=min_size)


def scores(subject: Subject, probability: Tensor, *, threshold: float = 0.5, min_size: int = 0) -> dict[str, float]:
    """The metrics of `SCORES` of one subject, from `predict`; NaN where there is nothing to count."""
    matches = slice_matches(subject, probability >= threshold, min_size=min_size)
    found = plane_metrics(matches, zero_division=math.nan)
    return {name: float(found[metric]) for name, metric in SCORES.items()}


def mean_scores(subjects: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Means over subjects, each over those where it is a number; NaN where there is none."""
    rows = list(subjects)
    numbers = {name: [row[name] for row in rows if not math.isnan(row[name])] for name in SCORES}
    return {name: math.fsum(found) / len(found) if found else math.nan for name, found in numbers.items()}
