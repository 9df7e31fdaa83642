"""The benchmarks run, on small inputs: their figures mean nothing here."""

import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fastinstance as fi
from bench import plots, registry, report, results, runner, steps
from bench.__main__ import main
from bench.case import Case, Goal, Run, Setting
from bench.scenes import Scene, balls, noise, specks, spread
from bench.timing import peak_bytes

ROOT = Path(__file__).parent.parent
SMALL = Setting("cpu", small=True)
QUICK = runner.Limits(repeats=1, seconds=1, slow_seconds=5)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small inputs wait for threads longer than they compute
    yield
    torch.set_num_threads(threads)


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


@pytest.mark.parametrize(
    ("suite", "only"),
    [
        ("cpu", "48×256², 15 + 20"),
        ("gpu", "noise"),
        ("label", "noise"),
        ("table3", "Proximity"),
        ("table3", "blob-Dice"),
        ("table3", "Tversky"),
        ("training", "U-Net, 2×64², eager"),
        ("scaling", "planes"),
        ("metrics", "overlap"),
        ("losses", ""),
        ("loop", "U-Net"),
    ],
)
def test_suites(suite: str, only: str) -> None:
    saved = []
    save = lambda result: saved.append(len(result["rows"]))  # noqa: E731
    result = runner.run(suite, SMALL, QUICK, only=only, memory=False, save=save)
    wanted = [case for case in registry.cases(suite, SMALL) if only in case.name]
    assert [row["case"] for row in result["rows"]] == [case.name for case in wanted]
    assert saved == list(range(1, len(wanted) + 1))
    for row, case in zip(result["rows"], wanted, strict=True):
        assert not row["errors"]
        assert {*case.ours, *case.peers} == set(row["milliseconds"])
        assert case.base in row["milliseconds"]
        assert only in report.table(result)


def test_every_suite_has_cases_with_different_names() -> None:
    for device in ("cpu", "cuda"):
        for suite in registry.suites_for(device):
            names = [case.name for case in registry.cases(suite, Setting(device))]
            assert len(names) == len(set(names)) > 0


def test_all_losses_of_table_3_are_checked_against_the_loop_reference() -> None:
    scene = balls((1, 24, 24), 3, 4, (1, 3))
    for name, loss in steps.LOSSES.items():
        steps.gate({name: (loss(), steps.loop(name))})(scene, "cpu")


def test_peers_are_read_from_clones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "losses").mkdir()
    (tmp_path / "losses" / "InstanceLoss.py").write_text(
        "class InstanceLoss:\n"
        "    def __init__(self, *losses, **options): self.max = options['max_cc_out']\n"
        "    def __call__(self, x, y, labels=None):\n"
        "        return [x.sum() * n for n in range(1, 8)] if labels is None else [x.sum() * labels.max()] * 7\n"
    )
    (tmp_path / "blob_loss.py").write_text(
        "def compute_loss(weights, main, blob, x, y, labels): return x.sum() * labels.max() * weights['main_weight'],\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    peers = {"instance-loss": str(tmp_path), "blob_loss": str(tmp_path)}
    result = runner.run("table3", Setting("cpu", True, peers), QUICK, only="b", memory=False)  # blob-*, False is not
    for row in result["rows"]:
        assert "authors, labels given" in row["milliseconds"]
        assert not row["errors"]
    result = runner.run("table3", Setting("cpu", True, peers), QUICK, only="ICI", memory=False)
    assert {"authors", "authors, labels given"} < set(result["rows"][0]["milliseconds"])


def _case(name: str, **changes) -> Case:
    scene = balls((6, 16, 16), 2, 2, (1, 2))
    values = {
        "inputs": lambda seed: scene,
        "ours": {"ours": Run(lambda scene: lambda: (scene.logits * 2,))},
        "gate": lambda scene, device: None,
        "facts": lambda scene: {"pixels": scene.target.numel(), "planes": len(scene.target)},
        "base": "peer",
    }
    return Case(name, **{**values, **changes})


def _run(monkeypatch: pytest.MonkeyPatch, *cases: Case, **limits) -> dict:
    monkeypatch.setattr(registry, "cases", lambda suite, setting: list(cases))
    return runner.run("cpu", SMALL, runner.Limits(1, 1, **limits), memory=False)


def test_a_wrong_result_is_not_timed() -> None:
    scene = balls((1, 32, 32), 3, 4, (2, 3))
    gate = steps.gate({"all terms": (lambda x, y, target_labels=None: (x * y).mean(), steps.loop("all terms"))})
    with pytest.raises(AssertionError, match="all terms differs by"):
        gate(scene, "cpu")


def test_wrong_metrics_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = fi.instance_metrics
    wrong = lambda *args, **options: {**(found := ours(*args, **options)), "pq": found["pq"] + 1e-6}  # noqa: E731
    monkeypatch.setattr(fi, "instance_metrics", wrong)
    result = runner.run("metrics", SMALL, QUICK, only="overlap", memory=False)
    assert "wrong: pq is" in result["rows"][0]["errors"]["gate"]
    assert not result["rows"][0]["milliseconds"]


def test_the_runner_goes_on_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(seed: int) -> Scene:
        raise RuntimeError(f"no scene {seed}")

    def wrong(scene: Scene, device: str) -> None:
        raise AssertionError("wrong: 1 is not 2")

    def absent(scene: Scene) -> None:
        import no_such_package  # noqa: F401

    result = _run(
        monkeypatch,
        _case("broken", inputs=broken),
        _case("wrong", gate=wrong),
        _case("good", peers={"peer": Run(absent)}),
        _case("endless", gate=lambda scene, device: time.sleep(60)),
        case_seconds=0.5,
    )
    assert [list(row["errors"]) for row in result["rows"]] == [["case"], ["gate"], ["peer"], ["case"]]
    assert [list(row["milliseconds"]) for row in result["rows"]] == [[], [], ["ours"], []]
    text = report.table(result)
    for said in ("no scene 0", "wrong: 1 is not 2", "left out: No module named 'no_such_package'", "stopped after"):
        assert said in text
    late = _run(monkeypatch, _case("late"), deadline=-1)
    assert "not run, no time left" in report.table(late)


def test_a_slow_peer_gets_as_many_planes_as_its_time_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Run(lambda scene: lambda: time.sleep(0.05 * len(scene.logits)), slow=True)
    stuck = Run(lambda scene: lambda: time.sleep(60), slow=True)
    case = _case("slow", peers={"peer": slow, "stuck": stuck}, goals=(Goal("", "peer", 2, over="ours", least=True),))
    result = _run(monkeypatch, case, slow_seconds=0.18)
    time_of = result["rows"][0]["milliseconds"]["peer"]
    assert 1 <= time_of["planes"] <= 3
    assert result["rows"][0]["errors"]["stuck"].startswith("TimeoutError: stopped")
    assert f", {time_of['planes']} of 6 planes |" in report.table(result)
    assert "> " in report.table(result)
    assert report.goals(result) == []  # a part of the batch proves no ratio
    each = _run(monkeypatch, dataclasses.replace(case, each=True), slow_seconds=0.18)
    assert each["rows"][0]["milliseconds"]["peer"]["median"] == pytest.approx(50, rel=0.5)
    assert "> " not in report.table(each)
    assert report.goals(each)[0][-1]
    whole = _run(monkeypatch, case, slow_seconds=1)
    assert whole["rows"][0]["milliseconds"]["peer"]["planes"] == 6


def test_processor_time_does_not_count_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    case = _case("asleep", ours={"ours": Run(lambda scene: lambda: time.sleep(0.05))})
    wall, cpu = (_run(monkeypatch, case, clock=clock)["rows"][0]["milliseconds"]["ours"] for clock in ("wall", "cpu"))
    assert cpu["median"] < 25 < wall["median"]


def test_memory_is_what_a_step_takes_beside_its_result() -> None:
    def step() -> tuple[torch.Tensor]:
        large = torch.ones(1 << 24)
        return (large[: 1 << 22] * 2,)

    assert peak_bytes(step, "cpu") == pytest.approx(1 << 26, rel=0.05)


def test_memory_is_measured_in_another_process() -> None:
    result = runner.run("label", SMALL, QUICK, only="volume")
    assert set(result["rows"][0]["peak_bytes"]) == {"ours", "scipy", "cc3d"}


def _suite() -> dict:
    time_of = {"low": 9.0, "high": 11.0, "samples": 5}
    row = {
        "case": "a",
        "pixels": 1000,
        "planes": 2,
        "ours": ["ours"],
        "base": "peer",
        "share": False,
        "each": False,
        "milliseconds": {"ours": {"median": 10.0, **time_of}, "peer": {"median": 20.0, **time_of}},
        "peak_bytes": {"ours": 8000},
        "floor_bytes": 12000,
        "errors": {},
        "kernels": {"ours": [{"kernel": "pack", "launches": 1.0, "µs": 2.5}]},
        "synchronisations": {},
        "notes": {"series": "planes"},
        "goals": [vars(Goal("ours ÷ peer", "ours", 0.4, over="peer")), vars(Goal("B/px", "ours", 9, memory=True))],
        "N": 3,
    }
    other = copy.deepcopy(row) | {"case": "b", "planes": 4, "goals": [vars(Goal("growth", "ours", 1.3, of="a"))]}
    other["milliseconds"]["ours"]["median"] = 12.0
    return {"machine": results.machine("cpu"), "copy_bytes_per_second": 1e10, "rows": [row, other]}


def _file(path: Path, suite: dict, name: str = "scaling") -> Path:
    results.save(path, name, suite)
    return path


def test_report_and_plots_come_from_the_file_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _file(tmp_path / "cpu-2030-01-02.json", _suite())
    training = _suite()
    training["rows"] = [row | {"share": True} for row in training["rows"]]
    _file(path, training, "training")
    _file(path, _suite(), "table3")
    assert main(["report", str(path), "--plots", str(tmp_path / "plots")]) == 0
    text = capsys.readouterr().out
    assert "10 (×0.5)" in text
    assert "| a | ours ÷ peer | 0.5 | 0.4 | no |" in text
    assert "| a | B/px | 8 | 9 | yes |" in text
    assert "| b | growth | 1.2 | 1.3 | yes |" in text
    assert "| pack | 1.0 | 2.5 |" in text
    assert "of copy" in text
    drawn = sorted((tmp_path / "plots").iterdir())
    assert [image.stem.split("-")[-1] for image in drawn] == ["roofline", "scaling", "table3", "training"]
    assert all(5_000 < image.stat().st_size < 300_000 for image in drawn)
    assert plots.draw({"suites": {}}, tmp_path / "none") == []


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = _file(tmp_path / "a.json", _suite())

    def against(change, *options: str) -> int:
        suite = _suite()
        change(suite)
        (tmp_path / "b.json").unlink(missing_ok=True)
        return main(["compare", str(old), str(_file(tmp_path / "b.json", suite)), *options])

    def scale(suite: dict, factor: float, names: tuple[str, ...]) -> None:
        for name in names:
            suite["rows"][0]["milliseconds"][name]["median"] *= factor

    assert against(lambda suite: None) == 0
    assert against(lambda suite: scale(suite, 2, ("ours", "peer"))) == 0  # a slower machine
    assert against(lambda suite: scale(suite, 1.3, ("ours",))) == 1
    assert against(lambda suite: scale(suite, 1.3, ("ours",)), "--tolerance", "0.5") == 0
    assert against(lambda suite: suite["rows"][1]["peak_bytes"].update(ours=16000)) == 1
    assert "8.0 -> 16.0 bytes a pixel" in capsys.readouterr().out
    assert against(lambda suite: suite["rows"].pop()) == 1
    assert against(lambda suite: suite["rows"][0]["milliseconds"].pop("peer")) == 0  # milliseconds instead
    assert against(lambda suite: suite["machine"].update(device="another")) == 2
    assert "expected figures of one device" in capsys.readouterr().err


def test_errors_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old.json").write_text(json.dumps({"bench": "cpu"}))
    for command, said in (
        (["report", str(tmp_path / "old.json")], 'expected a results file of `python -m bench` with "suites"'),
        (["report", str(tmp_path / "none.json")], "expected a results file of `python -m bench`, got"),
        (["label", "--small", "--peer", "x=y"], "expected --peer NAME=PATH with a name of"),
        (["aot", "--target", "sm_1"], "expected targets out of"),
    ):
        assert main(command) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(ValueError, match="expected files with a suite in common"):
        results.compare({"suites": {"a": {}}}, {"suites": {"b": {}}})


def test_newest_files_of_each_device(tmp_path: Path) -> None:
    for name in ("cpu-2026-01-02", "cpu-2025-12-30", "nvidia-h100-2024-01-01"):
        (tmp_path / f"{name}.json").write_text("{}")
    assert [path.stem for path in results.newest(tmp_path)] == ["nvidia-h100-2024-01-01", "cpu-2026-01-02"]


def test_the_pages_have_the_figures_of_the_newest_results() -> None:
    assert results.newest()
    assert main(["readme", "--check"]) == 0
    for page in report.PAGES:
        assert report.filled((ROOT / page).read_text(), "x").count("x\n" + report.END) == 1
    with pytest.raises(ValueError, match="expected one block"):
        report.filled("no block", "x")


def test_the_readme_shows_every_goal_that_was_missed() -> None:
    everything = "\n".join(report.markdown(results.load(path)) for path in results.newest())
    missed = [line.split(" | ")[1] for line in everything.splitlines() if line.endswith("| no |")]
    shown = report.headline(results.newest())
    assert missed
    assert all(goal in shown for goal in missed)


def test_aot_rows_are_a_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    aot = pytest.importorskip("bench.aot")
    rows = [{"kernel": "scan", "target": "sm_90", "registers": 30, "instructions per pixel": None}]
    monkeypatch.setattr(aot, "rows", lambda targets: rows)
    table = report.table(aot.run())
    assert "| scan, sm_90 |  | sm_90 | 30 |" in table
    assert "| all terms | 10 forward, 2 backward |" in table


def test_gpu_sh_without_a_gpu(tmp_path: Path) -> None:
    parts = {"DRY": "1", "PARTS": "label", "PYTHON": sys.executable, "GPU_OPTIONS": "--only snakes --threads 1"}
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), str(tmp_path)]
    subprocess.run(command, env={**os.environ, **parts}, check=True, capture_output=True)
    assert json.loads((tmp_path / "results.json").read_text())["suites"]["label"]["small"]
    summary = (tmp_path / "summary.md").read_text()
    assert "| label | 0 |" in summary
    assert "| snakes | 2 |" in summary


def test_gpu_sh_gives_each_file_of_tests_a_process(tmp_path: Path) -> None:
    """What breaks the device in one does not hide the others; status 5 is that of a file that is skipped."""
    python, files = tmp_path / "python", sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    python.write_text(
        '#!/bin/sh\n[ "$1" = -c ] && exec printf %s "-n 4"\n'  # pytest-xdist is there
        'echo "== $3 $4 $5: 1 passed"\ncase $3 in *label*) exit 134;; *training*) exit 5;; esac\n'
    )
    python.chmod(0o755)
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), str(tmp_path)]
    env = {**os.environ, "DRY": "1", "PARTS": "tests", "PYTHON": str(python)}
    subprocess.run(command, env=env, check=True, capture_output=True)
    summary = (tmp_path / "summary.md").read_text()
    assert "| tests | 134 |" in summary
    assert sorted(re.findall(r"^== (tests/gpu/\S+) -n 4: 1 passed$", summary, re.MULTILINE)) == [
        f"tests/gpu/{file.name}" for file in files
    ]


def test_host_times_every_loss(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    host = pytest.importorskip("bench.host")
    monkeypatch.setattr(host, "_microseconds", lambda call: call() is None)  # once each; a step returns nothing
    threads = torch.get_num_threads()
    host.main()
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "| all terms | 12 | 0 | 1 | 1 |" in printed
    assert "| DiceCELoss | 5 | 0 | 1 | 1 |" in printed
