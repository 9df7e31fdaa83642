"""The benchmarks run, on small inputs: their figures mean nothing here."""

import dataclasses

import pytest
import torch

import fastinstance as fi
from bench import cpu, gpu, label, metrics
from bench.scenes import Scene, balls, noise, specks, spread


def test_scenes_have_what_they_say() -> None:
    scene = balls((2, 32, 32), 3, 4, (2, 3))
    assert scene.logits.shape == scene.target.shape == (2, 1, 32, 32)
    assert scene.logits.dtype == scene.target.dtype == torch.float32
    assert set(scene.target.unique().tolist()) == {0, 1}
    assert scene.logits.abs().min() >= 0.1
    assert 0.4 < (noise(scene).logits > 0).float().mean() < 0.6


def test_scenes_have_as_many_instances_as_they_say() -> None:
    for scene, number in ((spread((3, 64, 64), 20, 0.1), 20), (spread((3, 64, 64), 2, 0.1), 2), (specks(32), 64)):
        assert fi.label(scene.target)[1].sum() == number
        assert fi.label(scene.logits >= 0)[1].sum() == number
    assert spread((3, 64, 64), 20, 0.1).target.mean() == pytest.approx(0.1, rel=0.1)


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
    monkeypatch.setattr(label, "SMALL", {name: label.SMALL[name] for name in ("noise", "snakes")})
    result = label.run(repeats=1, small=True)
    assert [row["components"] for row in result["rows"]][1] == 2
    text = label.table(result)
    assert "scipy" in text
    assert "kornia" in text


def test_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_unet", lambda *_, **__: None)
    saved = []
    result = gpu.run(repeats=1, small=True, only="noise", save=lambda result: saved.append(len(result["rows"])))
    [row] = result["rows"]
    assert {"ours", "ours, forward", "labels given", "our GDF", "MONAI GDF"} == set(row["milliseconds"])
    assert not row["errors"]
    assert saved == [1, 1, 1]
    assert "noise" in gpu.table(result)


def test_gpu_goes_on_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(seed: int) -> Scene:
        raise RuntimeError(f"no scene {seed}")

    good = gpu.Case(lambda seed: balls((1, 16, 16), 2, 2, (1, 2), seed=seed))
    monkeypatch.setattr(gpu, "cases", lambda **_: {"good": good, "bad": gpu.Case(broken), "wrong": good})
    monkeypatch.setattr(gpu, "_unet", lambda *_, **__: None)
    deviations = iter([0, 0, 0, 0, 0.5, 0])
    monkeypatch.setattr(gpu, "_deviation", lambda *_: next(deviations))
    result = gpu.run(repeats=1)
    assert [list(row["errors"]) for row in result["rows"]] == [[], ["case"], ["ours"]]
    assert result["rows"][0]["milliseconds"]
    assert not result["rows"][2]["milliseconds"]
    text = gpu.table(result)
    assert "no scene 0" in text
    assert "wrong: value or gradient differs by 0.5" in text


def test_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_memory_elsewhere", lambda *_: 1.25)
    result = metrics.run(repeats=1, small=True)
    assert [row["matching"] for row in result["rows"]] == ["iou > 0.5", "overlap"]
    assert all(set(row["milliseconds"]) == {"ours", "loop"} for row in result["rows"])
    assert "1.25 volumes" in metrics.table(result)


def test_wrong_metrics_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = metrics._loop

    def wrong(*arguments: object) -> tuple[float, dict[str, float]]:
        seconds, found = loop(*arguments)  # pyright: ignore[reportArgumentType]
        return seconds, {**found, "pq": found["pq"] + 1e-6}

    monkeypatch.setattr(metrics, "_loop", wrong)
    with pytest.raises(AssertionError, match=r"pq is .* by the loop reference"):
        metrics.run(repeats=1, small=True)
