"""panoptica as a peer. Its pins differ from ours: PANOPTICA_PYTHON names an interpreter of an environment with it."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from bench.metrics import Peer
from bench.scenes import balls
from fastinstance import instance_metrics, label

PYTHON = os.environ.get("PANOPTICA_PYTHON") or (sys.executable if find_spec("panoptica") else None)

pytestmark = pytest.mark.skipif(PYTHON is None, reason="panoptica is not installed; PANOPTICA_PYTHON may name where")


def scenes() -> Tensor:
    """Pairs [40, 2, 20, 18, 9] that overlap in every way; neither side is empty, where conventions differ."""
    drawn = []
    for seed in range(20):
        scene = balls((1, 20, 18, 9), 6, 7, (0.5, 4), seed=seed)
        drawn.append(torch.stack([scene.logits[0, 0] >= 0, scene.target[0, 0] > 0]))
    chance = torch.Generator().manual_seed(0)
    drawn += [torch.rand(2, 20, 18, 9, generator=chance) < density for density in torch.linspace(0.02, 0.2, 20)]
    return torch.stack(drawn).byte()


def test_the_same_numbers() -> None:
    masks = scenes()
    assert (label(masks)[1] > 0).all()
    compared = 0
    with Peer.on(str(PYTHON), masks) as peer:
        for pair, (pred, target) in enumerate(masks[:, :, None, None].unbind()):
            for matching, threshold in (("iou", 0.5), ("iou", 0.3), ("dice", 0.6), ("dice", 0.15), ("dice", 0.0)):
                found = instance_metrics(pred, target, matching=matching, threshold=threshold)
                _, expected = peer(pair, matching, threshold)
                if expected["n_missed"] == expected["n_target"]:  # nothing is matched: its quality is NaN
                    expected = {name: value for name, value in expected.items() if name not in ("sq", "pq")}
                for name, value in expected.items():
                    assert found[name].item() == pytest.approx(value), (pair, matching, threshold, name)
                compared += "pq" in expected
    assert compared > 150
