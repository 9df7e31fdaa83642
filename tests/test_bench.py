"""The benchmarks run, on small inputs: their figures mean nothing here."""

import dataclasses

import pytest
import torch

from bench import cpu, label
from bench.scenes import balls, noise


def test_scenes_have_what_they_say() -> None:
    scene = balls((2, 32, 32), 3, 4, (2, 3))
    assert scene.logits.shape == scene.target.shape == (2, 1, 32, 32)
    assert scene.logits.dtype == scene.target.dtype == torch.float32
    assert set(scene.target.unique().tolist()) == {0, 1}
    assert scene.logits.abs().min() >= 0.1
    assert 0.4 < (noise(scene).logits > 0).float().mean() < 0.6


def test_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    small = dataclasses.replace(next(iter(cpu.CASES.values())), scene=lambda: balls((1, 32, 32), 3, 4, (2, 3)))
    monkeypatch.setattr(cpu, "CASES", dict.fromkeys(list(cpu.CASES)[:3], small))
    monkeypatch.setattr(cpu, "_memory_elsewhere", lambda _: 12.5)
    result = cpu.run(repeats=1)
    assert all(row["instances"] == 3 for row in result["rows"])
    assert {"monai_gdf", "ours", "ours_labels_given", "our_gdf", "loop"} == set(result["rows"][0]["milliseconds"])
    assert cpu.table(result).count("12.5") == 3


def test_a_wrong_result_is_not_timed() -> None:
    scene = balls((1, 32, 32), 3, 4, (2, 3))
    with pytest.raises(AssertionError):
        cpu._check(scene, lambda x, y: (x * y).mean(), cpu._loop(None))


def test_label(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {"small": lambda: label._random(0.5, 2, 9, 11), "snake": lambda: label._snake(1, 8, 9)}
    monkeypatch.setattr(label, "CASES", cases)
    result = label.run(repeats=1)
    assert [row["components"] for row in result["rows"]][1] == 1
    text = label.table(result)
    assert "scipy" in text
    assert "kornia" in text
