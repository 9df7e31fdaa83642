"""Training on a GPU: the CUDA graph of a step is the step, and a run that was stopped goes on to the same bits.

pytest -m gpu tests/gpu/test_training_gpu.py
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import fastinstance
from fastinstance.study import training
from fastinstance.study.config import RunConfig
from tests.test_training import config, contents, go

pytest.importorskip("monai", reason="the network is MONAI's")
pytest.importorskip("kornia", reason="needed by the augmentation")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_gpu(**changes: Any) -> RunConfig:
    return config(training={"device": "cuda", "threads": 1, **changes}, network={"dropout": 0.2})


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_graph_of_a_step_is_the_step(tmp_path: Path, precision: str, compiled: bool):
    """With the warm-up, two graphs; dropout is seeded step by step, so that it is the same, too."""
    options = {"precision": precision, "compile": compiled}
    eager, graphed = (
        [row["loss"] for row in go(tmp_path / str(graph), on_gpu(graph=graph, **options)).curves]
        for graph in (False, True)
    )
    assert graphed == pytest.approx(eager, rel=1e-3)


@pytest.mark.parametrize("graph", [False, True])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graph: bool):
    settings = on_gpu(graph=graph)
    go(tmp_path / "whole", settings)
    draw = training.Batches.draw

    def drawn(self: Any, number: int, *ranks: int) -> Any:
        if number == 8:
            signal.raise_signal(signal.SIGTERM)
        return draw(self, number, *ranks)

    with monkeypatch.context() as patch:
        patch.setattr(training.Batches, "draw", drawn)
        assert not go(tmp_path / "stopped", settings).finished
    assert go(tmp_path / "stopped", settings).finished
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_a_gpu_learns_what_a_cpu_does(tmp_path: Path):
    """Augmentation, batches and metrics are the same on both."""
    plain = {"network": {"dropout": 0.0}}
    cpu, gpu = (
        go(tmp_path / device, config(training={"device": device}, **plain)).curves for device in ("cpu", "cuda")
    )
    assert [row["loss"] for row in gpu] == pytest.approx([row["loss"] for row in cpu], rel=1e-2)


def test_a_step_that_cannot_be_captured_is_named(tmp_path: Path):
    """One that labels on the CPU; all losses can be captured on the kernels."""
    named = pytest.raises(training.StudyError, match=r"this step cannot be a CUDA graph .*; set graph = false")
    with fastinstance.use_backend("torch"), named:
        go(tmp_path, on_gpu(graph=True))
