"""`InstanceMetrics`: means, spread, confidence and size groups over subjects, alone and as a torchmetrics metric."""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastinstance
from fastinstance import InstanceMetrics, instance_metrics
from fastinstance.metrics import METRICS, VOLUME_EDGES
from fastinstance.summary import summarise
from fastinstance.testing import assert_close

ROOT = Path(__file__).parent.parent


def subjects(number: int, channels: int = 1) -> tuple[Tensor, Tensor]:
    """Masks [number, channels, 12, 13] of loose pixels; the first subject has no target."""
    chance = torch.Generator().manual_seed(number)
    pred, target = (torch.rand(number, channels, 12, 13, generator=chance) > 0.8 for _ in range(2))
    target[0] = False
    return pred, target


@pytest.fixture(params=["alone", "torchmetrics"])
def new(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class, on its own and on torchmetrics."""
    if request.param == "torchmetrics":
        pytest.importorskip("torchmetrics")
    else:
        monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.delitem(sys.modules, "fastinstance.accumulate")
    return importlib.import_module("fastinstance.accumulate").InstanceMetrics


def test_mean_and_spread_over_subjects(new: Any) -> None:
    pred, target = subjects(7, channels=2)
    metric = new(channels=2, spacing=(2, 3))
    for part in (slice(0, 3), slice(3, 4), slice(4, 7)):
        metric.update(pred[part], target[part])
    result = metric.compute()
    each = instance_metrics(pred, target, spacing=(2, 3))
    assert result["n_subjects"] == 7
    for name in METRICS:
        counted = [column[~column.isnan()].double() for column in each[name].unbind(1)]
        assert_close(result[name], torch.stack([column.mean() for column in counted]))
        assert_close(result[f"{name}_std"], torch.stack([column.std() for column in counted]))
        assert ((result[f"{name}_low"] <= result[name]) & (result[name] <= result[f"{name}_high"])).all()
    metric.reset()
    metric.update(pred[:1], target[:1])
    assert_close(metric.compute()["n_pred"], each["n_pred"][0].double())
    one = new()
    one.update(pred[:, :1], target[:, :1])
    assert_close(one.compute()["f1"], result["f1"][0])


def test_a_call_gives_the_batch_and_adds_it(new: Any) -> None:
    pred, target = subjects(5)
    metric = new(by_volume=(0.002, 0.004))
    first, second = metric(pred[:2], target[:2]), metric(pred[2:], target[2:])
    for part, result in ((slice(0, 2), first), (slice(2, 5), second), (slice(0, 5), metric.compute())):
        assert_close(result["f1"], instance_metrics(pred[part], target[part])["f1"].mean())
        assert result["volume_n_target"].sum() == instance_metrics(pred[part], target[part])["n_target"].sum()


def test_size_groups(new: Any) -> None:
    target = torch.zeros(1, 1, 6, 20, dtype=torch.bool)
    target[..., 0, 0:2] = target[..., 0, 4:8] = target[..., 2:4, 10:15] = True  # 2, 4 and 10 pixels
    pred = torch.zeros_like(target)
    pred[..., 0, 5:8] = pred[..., 2:4, 10:15] = pred[..., 5, 0] = True  # 3 of the 4, all of the 10, and a false one
    metric = new(by_volume=(0.003, 0.005))
    assert metric.volume_names == ["< 0.003", "0.003-0.005", ">= 0.005"]
    metric.update(pred, target)
    metric.update(pred, target)
    result = metric.compute()
    expected = {
        "n_target": [2, 2, 2],
        "n_found": [0, 2, 2],
        "n_missed": [2, 0, 0],
        "n_pred": [2, 2, 2],
        "n_false": [2, 0, 0],
        "sen": [0, 1, 1],
        "ppv": [0, 1, 1],
        "f1": [0, 1, 1],
        "dsc": [0, 6 / 7, 1],
    }
    for name, values in expected.items():
        assert_close(result[f"volume_{name}"].double(), torch.tensor(values, dtype=torch.float64))
    assert len(new(by_volume=VOLUME_EDGES).volume_names) == 21
    assert new().volume_names == []


def test_nan_is_left_out(new: Any) -> None:
    pred, target = subjects(4)
    metric = new(zero_division=float("nan"))
    metric.update(pred, target)
    assert_close(metric.compute()["sen"], instance_metrics(pred[1:], target[1:])["sen"].mean())
    assert_close(metric.compute()["sen_std"], instance_metrics(pred[1:], target[1:])["sen"].std())


def test_spacing_and_ids_of_a_batch(new: Any) -> None:
    pred, target = subjects(2)
    metric = new(spacing=1)
    metric.update(pred, target, spacing=(2, 2), pred_labels=pred.long(), target_labels=target.long())
    result = metric.compute()
    assert result["n_target"] == 0.5, "all pixels of a subject have one id"
    assert_close(result["vol_diff_ml"], instance_metrics(pred, target, spacing=(2, 2))["vol_diff_ml"].mean())


def test_settings_are_checked_at_once(new: Any) -> None:
    for wrong, word in (
        ({"matching": "best"}, "matching"),
        ({"threshold": 2}, "threshold"),
        ({"zero_division": 3}, "zero_division"),
        ({"by_volume": (0.1, 0.05)}, "ascending"),
        ({"by_volume": ()}, "ascending"),
        ({"confidence": 95}, "confidence"),
        ({"resamples": 0}, "resamples"),
        ({"channels": 0}, "channels"),
        ({"min_size": -1}, "min_size"),
        ({"spacing": -1}, "spacing"),
        ({"spacing": (3, 1, 0)}, "spacing"),
    ):
        with pytest.raises(ValueError, match=word):
            new(**wrong)
    with pytest.raises(ValueError, match=r"channels=1.*InstanceMetrics\(channels=2\)"):
        new().update(*subjects(2, channels=2))


def test_it_is_imported_when_asked_for() -> None:
    assert InstanceMetrics.__module__ == "fastinstance.accumulate"
    with pytest.raises(AttributeError, match="no attribute 'InstanceMetric'"):
        _ = fastinstance.InstanceMetric  # pyright: ignore[reportAttributeAccessIssue]


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    chance = torch.Generator().manual_seed(0)
    values = torch.randn(40, 400, generator=chance, dtype=torch.float64) + 3
    summary = summarise(values, confidence=0.9)
    covered = ((summary.low <= 3) & (summary.high >= 3)).double().mean().item()
    assert 0.82 < covered < 0.94
    assert_close(summary.mean, values.mean(0))
    again = summarise(values, confidence=0.9)
    assert torch.equal(summary.low, again.low)
    assert not torch.equal(summary.low, summarise(values, confidence=0.9, seed=1).low)


def test_a_large_bootstrap_is_worked_on_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.rand(50, 2, generator=torch.Generator().manual_seed(0))
    whole = summarise(values)
    monkeypatch.setattr("fastinstance.summary._PIECE", 5000)
    assert_close(summarise(values), whole)


def test_one_subject_and_none() -> None:
    one = summarise(torch.ones(1, 2))
    assert_close((one.mean, one.std, one.low), (torch.ones(2), torch.full((2,), torch.nan), torch.ones(2)), rtol=1e-6)
    none = summarise(torch.ones(0, 2))
    assert all(part.isnan().all() for part in none)


def test_in_a_collection() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    metric = InstanceMetrics(by_volume=(0.002,))
    assert isinstance(metric, torchmetrics.Metric)
    collection = torchmetrics.MetricCollection({"all": metric, "strict": InstanceMetrics(matching="iou")})
    collection.update(*subjects(3))
    result = collection.compute()
    assert any(name.endswith("volume_sen") for name in result)


WORKER = """
import sys, torch
import torch.distributed as dist
from fastinstance import InstanceMetrics
rank, port = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
pred, target = torch.load(sys.argv[3])
metric = InstanceMetrics(channels=2, by_volume=(0.002, 0.005))
part = (slice(0, 2), slice(2, 5))[rank]
metric.update(pred[part], target[part])
both = metric.compute()
metric.reset()
if rank == 0:  # now the other process has no subject
    metric.update(pred, target)
one = metric.compute()
if rank == 1:
    torch.save([both, one], sys.argv[4])
dist.destroy_process_group()
"""


def test_processes_share_their_subjects(tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    torch.save(subjects(5, channels=2), tmp_path / "subjects")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [str(ROOT), str(ROOT / "kernels"), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(port), tmp_path / "subjects", tmp_path / "result"],
            cwd=ROOT,
            env=environment,
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    found = torch.load(tmp_path / "result")
    alone = InstanceMetrics(channels=2, by_volume=(0.002, 0.005))
    alone.update(*subjects(5, channels=2))
    assert_close(found, [alone.compute()] * 2)
