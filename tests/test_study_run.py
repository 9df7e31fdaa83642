"""`fastinstance study` from plan to figures, on four little persons; stopped, killed, changed, and failing cells."""

import csv
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import redirect_stdout
from multiprocessing import active_children
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from scipy import ndimage

from fastinstance import __main__ as command_line
from fastinstance import arguments
from fastinstance.study import cells, commands
from fastinstance.study.checkpoints import alone
from fastinstance.study.plan import Cell, read_plan
from fastinstance.study.results import read_results
from fastinstance.study.subjects import StudyError
from fastinstance.study.workers import Outcome, Stopped, Task, work
from tests.test_demo import WARNINGS

ROOT = Path(__file__).parent.parent
PLAN = """
name = "tiny"
seeds = [0]
folds = 2
validation = 0.4
[data.little]
source = "nifti"
folder = "{folder}/main"
images = "*/flair.nii.gz"
masks = "*/mask.nii.gz"
test_on = "other"
[data.other]
source = "nifti"
folder = "{folder}/other"
images = "*/flair.nii.gz"
masks = "*/mask.nii.gz"
[losses.GDF]
name = "GeneralizedDiceFocalLoss"
[losses.Detection]
name = "DetectionLoss"
[network]
channels = [4, 8]
[training]
epochs = 1
steps_per_epoch = 2
slices_per_subject = 2
learning_rate = 1e-2
threads = 1
device = "cpu"
[evaluation]
min_size = 2
[[ensembles]]
small = "Detection"
large = "GDF"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two data sets of four and two persons, bright discs on noise."""
    place = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for data, persons in (("main", 4), ("other", 2)):
        for number in range(persons):
            image = rng.normal(size=(32, 32, 4)).astype(np.float32)
            mask = np.zeros((32, 32, 4), np.uint8)
            for x, y, radius in ((8, 8, 3), (22, 20, 5), (8, 24, 2)):
                xs, ys = np.ogrid[:32, :32]
                mask[(xs - x - number) ** 2 + (ys - y) ** 2 <= radius**2] = 1
            mask[..., 3] = 0
            one = place / data / f"person{number}"
            one.mkdir(parents=True)
            affine = np.diag([1.0, 1.0, 3.0, 1.0])
            nibabel.Nifti1Image(image + 4 * mask, affine).to_filename(one / "flair.nii.gz")
            nibabel.Nifti1Image(mask, affine).to_filename(one / "mask.nii.gz")
    return place


@pytest.fixture
def plan(folder, tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(PLAN.format(folder=folder))
    return path


def work_here(tasks, jobs, devices=()):
    """`work` in this process, which spares the start of others."""
    for task in tasks:
        try:
            task.call(*task.arguments)
            yield Outcome(task.name, None)
        except Exception as error:
            yield Outcome(task.name, str(error))


@pytest.fixture
def here(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(commands, "work", work_here)
    cells._loaded.cache_clear()
    yield
    torch.set_num_threads(threads)


def study(*words):
    return command_line.main(["study", *map(str, words)])


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A study that two processes began, that was killed and then finished: plan, folder, cells before, output."""
    place = tmp_path_factory.mktemp("finished")
    plan, out = place / "plan.toml", place / "out"
    plan.write_text(PLAN.format(folder=folder))
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    command = [sys.executable, *WARNINGS, "-m", "fastinstance", "study", "run", str(plan), "--out", str(out)]
    process = subprocess.Popen(
        [*command, "--jobs", "2", "--quiet"],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 300
    while not list(out.rglob("result.json")) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()
    printed, errors = process.communicate()  # returns when no process of it holds the pipes any more
    assert process.returncode == -signal.SIGKILL, printed + errors
    done = len(list(out.rglob("result.json")))
    with pytest.MonkeyPatch.context() as patch, io.StringIO() as output, redirect_stdout(output):
        patch.setattr(commands, "work", work_here)
        assert study("run", plan, "--out", out, "--quiet") == 0
        return plan, out, done, output.getvalue()


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of that study to spoil."""
    out = tmp_path / "out"
    shutil.copytree(finished[1], out)
    return out


def documents(out):
    """The results of a study by cell, without what differs from run to run."""
    found = {str(path.relative_to(out)): json.loads(path.read_text()) for path in sorted(out.rglob("seed*.json"))}
    for path in sorted(out.rglob("result.json")):
        found[str(path.relative_to(out))] = {**json.loads(path.read_text()), "seconds": None}
    return {name: {**one, "inputs": None} for name, one in found.items()}


def test_every_cell_leaves_its_result(finished):
    plan, out, before, printed = finished
    assert 1 <= before < 4
    assert f"4 of 4 cells done in {out} ({before} of them before), 0 failed." in printed
    names = {cell.name for cell in read_plan(plan).cells()}
    assert names == {f"little/{loss}/seed0-fold{fold}" for loss in ("GDF", "Detection") for fold in (0, 1)}
    tested = []
    for name in names:
        document = json.loads((out / "cells" / name / "result.json").read_text())
        assert document["train"] + document["validation"] + len(document["subjects"]) == 4
        tested += document["subjects"]
        curve = document["curve"]
        half = curve["thresholds"].index(0.5)
        for place, found in enumerate(document["at"]["fixed"]["metrics"]["n_pred"]):
            assert curve["n_pred"][place][half] == found
        assert document["at"]["fixed"]["metrics"]["n_target"] == [9] * len(document["subjects"])
        assert np.array(document["at"]["fixed"]["by_size"])[:, 0].sum() == 9 * len(document["subjects"])
    assert sorted(tested) == sorted([f"person{number}" for number in range(4)] * 2)


def test_killed_and_shared_among_processes_it_finds_the_same(finished, plan, here, tmp_path):
    assert study("run", plan, "--out", tmp_path / "out", "--quiet") == 0
    assert documents(tmp_path / "out") == documents(finished[1])


def test_votes_and_ensembles(finished):
    _, out, *_ = finished
    vote = json.loads((out / "votes" / "little" / "seed0.json").read_text())
    assert vote["subjects"] == ["person0", "person1"]
    assert list(vote["methods"]) == ["GDF", "Detection", "Detection < 0.05 mL <= GDF"]
    bits = []
    for fold in (0, 1):
        with np.load(out / "cells" / "little" / "GDF" / f"seed0-fold{fold}" / "predictions.npz") as file:
            bits.append(np.unpackbits(file["second/person0"]).reshape(4, 32, 32))
    both = ndimage.label(bits[0] & bits[1], np.ones((3, 3, 3)) * [[[0]], [[1]], [[0]]])[0]
    pixels = np.bincount(both.ravel())[1:]
    agreed = 3e-3 * pixels[pixels >= 2].sum()  # mL; two votes of two
    found = vote["methods"]["GDF"]["metrics"]["vol_diff_ml"][0] + vote["volume_ml"][0]
    assert found == pytest.approx(agreed, abs=2e-6)
    files = sorted(path.name for path in (out / "ensembles" / "little" / "Detection + GDF, 0.05 mL").iterdir())
    assert files == ["seed0-fold0.json", "seed0-fold1.json"]


def test_what_is_done_is_not_done_again(finished, copied, here, capsys, monkeypatch):
    def never(*_):
        raise AssertionError("a finished cell was run again")

    monkeypatch.setattr(commands, "run_cell", never)
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*.json")}
    assert study("run", finished[0], "--out", copied, "--quiet") == 0
    assert "4 of 4 cells done" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("*.json")} == before


def test_a_half_finished_cell_goes_on(finished, copied, here, monkeypatch):
    """Its training is complete, its test is not: only that is done."""
    expected = documents(copied)
    half = copied / "cells" / "little" / "GDF" / "seed0-fold1"
    trained = (half / "run" / "best.pt").stat().st_mtime_ns
    (half / "result.json").unlink()
    assert study("run", finished[0], "--out", copied, "--quiet") == 0
    assert (half / "run" / "best.pt").stat().st_mtime_ns == trained
    assert documents(copied) == expected


def test_a_cell_that_fails_is_named_and_stops_nothing(plan, here, tmp_path, capsys, monkeypatch):
    from fastinstance.study import training

    train = training.train

    def diverges(config, *rest, **options):
        if config.loss.name == "DetectionLoss":
            raise training.DivergedError("training stopped at step 1: the loss is nan")
        return train(config, *rest, **options)

    monkeypatch.setattr(training, "train", diverges)
    out = tmp_path / "out"
    assert study("run", plan, "--out", out, "--quiet") == 3
    printed = capsys.readouterr()
    assert "2 of 4 cells done" in printed.out
    last = printed.err.strip().splitlines()[-2:]
    assert [line.split(":")[0] for line in last] == [f"failed little/Detection/seed0-fold{fold}" for fold in (0, 1)]
    assert study("table", plan, "--out", out) == 3
    printed = capsys.readouterr()
    assert "Failed, and in no mean: little/Detection/seed0-fold0, little/Detection/seed0-fold1." in printed.out
    assert "the loss is nan" in printed.err
    monkeypatch.setattr(training, "train", train)
    assert study("run", plan, "--out", out, "--quiet") == 0
    assert not list(out.rglob("failed.json"))


def test_another_plan_is_not_mixed_in(finished, copied, plan, here, capsys):
    plan.write_text(plan.read_text().replace("learning_rate = 1e-2", "learning_rate = 2e-2"))
    for command in (("run", plan, "--quiet"), ("table", plan)):
        assert study(*command, "--out", copied) == 1
        line = only_line(capsys.readouterr().err)
        assert "training.learning_rate: 0.01 -> 0.02" in line
    trained = (copied / "cells" / "little" / "GDF" / "seed0-fold0" / "run" / "best.pt").stat().st_mtime_ns
    assert study("run", plan, "--out", copied, "--quiet", "--retrain-changed") == 0
    assert (copied / "cells" / "little" / "GDF" / "seed0-fold0" / "run" / "best.pt").stat().st_mtime_ns > trained
    capsys.readouterr()
    assert study("table", plan, "--out", copied) == 0


def test_what_changes_nothing_keeps_the_cells(finished, copied, plan, here, capsys):
    """A default that is written out, another loss, another order."""
    text = plan.read_text().replace("[training]\n", "[training]\nsubjects_per_batch = 2\n")
    plan.write_text(text.replace("[network]", '[losses.CE]\nname = "DiceCELoss"\n[network]'))
    assert study("run", plan, "--out", copied, "--dry-run") == 0
    assert "6 cells in" in (printed := capsys.readouterr().out)
    assert "4 done" in printed
    assert "2 new" in printed


def test_another_evaluation_trains_nothing(finished, copied, plan, here):
    path = copied / "cells" / "little" / "GDF" / "seed0-fold0"
    trained = (path / "run" / "best.pt").stat().st_mtime_ns
    before = json.loads((path / "result.json").read_text())
    plan.write_text(plan.read_text().replace("min_size = 2", "min_size = 2\nsmall_ml = 0.03"))
    assert study("run", plan, "--out", copied, "--quiet") == 0
    assert (path / "run" / "best.pt").stat().st_mtime_ns == trained
    after = json.loads((path / "result.json").read_text())
    assert after["at"] == before["at"]
    assert after["curve"]["small"] < before["curve"]["small"]


def test_other_scans_are_noticed(finished, copied, plan, here, folder, tmp_path, capsys):
    other = tmp_path / "scans"
    shutil.copytree(folder, other)
    path = other / "main" / "person0" / "mask.nii.gz"
    image = nibabel.Nifti1Image.from_filename(path)
    mask = np.asarray(image.dataobj).copy()
    mask[0, 0, 0] = 1
    nibabel.Nifti1Image(mask, image.affine).to_filename(path)
    swapped = folder / "main" / "person0" / "mask.nii.gz"
    original = swapped.read_bytes()
    try:
        swapped.write_bytes(path.read_bytes())
        assert study("run", plan, "--out", copied, "--quiet") == 1
    finally:
        swapped.write_bytes(original)
    assert "the subjects of little" in only_line(capsys.readouterr().err)


def test_other_scans_to_test_on_are_noticed(finished, copied, plan, here, folder, monkeypatch):
    """What was trained stays; the votes are those on the new scans."""
    path = folder / "other" / "person1" / "mask.nii.gz"
    original = path.read_bytes()
    image = nibabel.Nifti1Image.from_filename(path)
    mask = np.asarray(image.dataobj).copy()
    mask[0, 0, 0] = 1
    trained = {path: path.stat().st_mtime_ns for path in copied.rglob("best.pt")}
    before = json.loads((copied / "votes" / "little" / "seed0.json").read_text())
    try:
        nibabel.Nifti1Image(mask, image.affine).to_filename(path)
        assert study("run", plan, "--out", copied, "--quiet") == 0
    finally:
        path.write_bytes(original)
    after = json.loads((copied / "votes" / "little" / "seed0.json").read_text())
    assert after["volume_ml"][1] == pytest.approx(before["volume_ml"][1] + 3e-3)
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("best.pt")} == trained


def test_a_damaged_result_is_made_anew(finished, copied, here):
    expected = documents(copied)
    path = copied / "cells" / "little" / "GDF" / "seed0-fold0" / "result.json"
    path.write_bytes(path.read_bytes()[:100])
    assert study("run", finished[0], "--out", copied, "--quiet") == 0
    assert documents(copied) == expected


def test_nobody_is_tested_on_who_was_trained_on(plan, here, folder, tmp_path, capsys):
    scans = tmp_path / "scans"
    shutil.copytree(folder / "main", scans)
    for name in ("person2", "person3"):  # came again: another image of the same person
        image = nibabel.Nifti1Image.from_filename(scans / name / "flair.nii.gz")
        again = np.asarray(image.dataobj) + np.random.default_rng(1).normal(size=image.shape).astype(np.float32)
        nibabel.Nifti1Image(again, image.affine).to_filename(scans / name / "later.nii.gz")
    text = plan.read_text()
    first, second = text.replace(f"{folder}/main", str(scans)).split("[data.other]")
    second = second.replace(f"{folder}/other", str(scans)).replace("*/flair", "*/later")
    for changed, words in (
        (text.replace(f"{folder}/other", str(scans)), "expected other images than are trained on, but person0 has the"),
        (f"{first}[data.other]{second}", "expected other persons than it is trained on, got person2 in both"),
    ):
        plan.write_text(changed)
        assert study("run", plan, "--out", tmp_path / "out", "--quiet", "--skip-bad") == 1
        assert f"[data.little] test_on other: {words}" in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "out" / "cells").exists()


def test_tables_and_figures_need_one_file_only(finished, tmp_path, capsys):
    plan, out, *_ = finished
    results = tmp_path / "results.json"
    assert study("collect", plan, results, "--out", out) == 0
    assert f"Wrote {results}: 4 cells" in capsys.readouterr().out
    assert results.stat().st_size < 100_000
    assert study("table", plan, "--out", out, "--to", tmp_path / "a") == 0
    printed = capsys.readouterr().out
    assert study("table", plan, "--results", results, "--to", tmp_path / "b") == 0
    assert capsys.readouterr().out == printed == (tmp_path / "b" / "tables.md").read_text()
    names = ["table1.csv", "table2.csv", "table4a.csv", "table4b.csv", "table5.csv", "tables.md"]
    for place in "ab":
        assert sorted(path.name for path in (tmp_path / place).iterdir()) == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with (tmp_path / "a" / "table1.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    cell = json.loads((out / "cells" / "little" / "GDF" / "seed0-fold0" / "result.json").read_text())
    other = json.loads((out / "cells" / "little" / "GDF" / "seed0-fold1" / "result.json").read_text())
    scores = cell["at"]["fixed"]["metrics"]["dsc"] + other["at"]["fixed"]["metrics"]["dsc"]
    assert float(rows[0]["dsc"]) == pytest.approx(np.mean(scores), abs=1e-6)
    assert study("figures", plan, "--results", results, "--to", tmp_path / "figures") == 0
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert sorted(pictures) == [
        "curves.png",
        "differences.png",
        "fig08_instances_by_size.png",
        "fig09_found_by_size.png",
        "fig10_overlays.png",
        "fig11_metrics_by_load.png",
        "fig12_false_by_size.png",
    ]
    assert all(content.startswith(b"\x89PNG") and len(content) > 5000 for content in pictures.values())
    assert study("table", plan, "--results", results, "--only", 4, "--to", tmp_path / "c") == 0
    printed = capsys.readouterr().out
    assert re.findall(r"\*\*Table (\w+)\.\*\*", printed) == ["4A", "4B"]


def test_tables_need_no_data(finished, folder, tmp_path):
    (folder / "main").rename(folder / "elsewhere")
    try:
        assert study("table", finished[0], "--out", finished[1], "--to", tmp_path) == 0
        assert study("run", finished[0], "--out", tmp_path) == 1
    finally:
        (folder / "elsewhere").rename(folder / "main")


def test_a_results_file_belongs_to_its_plan(finished, plan, tmp_path, capsys):
    assert study("collect", finished[0], tmp_path / "r.json", "--out", finished[1]) == 0
    plan.write_text(plan.read_text().replace("epochs = 1", "epochs = 2"))
    assert study("table", plan, "--results", tmp_path / "r.json") == 1
    assert "was made with another plan" in only_line(capsys.readouterr().err)
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(StudyError, match="expected a file of `fastinstance study collect`"):
        read_results(tmp_path / "r.json")
    assert study("table", plan, "--results", tmp_path / "none.json") == 1
    assert "no such file" in only_line(capsys.readouterr().err)


def test_sigterm_keeps_what_there_is(finished, copied, plan, here, capsys, monkeypatch):
    plan.write_text(plan.read_text().replace("seeds = [0]", "seeds = [0, 1]"))

    def stopped(tasks, *_):
        yield from work_here(tasks[:1], 1)
        raise Stopped

    monkeypatch.setattr(commands, "work", stopped)
    assert study("run", plan, "--out", copied, "--quiet") == 0
    assert capsys.readouterr().out == "Stopped: 5 of 8 cells done, the others go on with the same command.\n"
    assert study("table", plan, "--out", copied) == 3
    assert "3 cells are missing, such as little/Detection/seed1-fold0" in capsys.readouterr().err


def test_a_process_that_dies_is_one_failure(tmp_path):
    """And another takes its place; SIGTERM ends a task that goes on, and is said."""
    tasks = [
        Task("is killed", signal.raise_signal, (signal.SIGKILL,), tmp_path / "a"),
        Task("fails", int, ("x",), tmp_path / "b"),
        Task("prints", os.system, ("echo device $CUDA_VISIBLE_DEVICES",), tmp_path / "c"),
        Task("sleeps", time.sleep, (600,), tmp_path / "d"),
    ]
    working = work(tasks, 1, ["3"])
    outcomes = {one.name: one for one in itertools.islice(working, 3)}
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Stopped):
        next(working)
    assert outcomes["is killed"].error == (
        "its process ended (killed by SIGKILL); it may have run out of memory: try fewer --jobs"
    )
    assert outcomes["fails"].error == "ValueError: invalid literal for int() with base 10: 'x'"
    assert "Traceback" in outcomes["fails"].trace
    assert outcomes["prints"].error is None
    assert (tmp_path / "c").read_text() == "device 3\n"
    assert not active_children()


def test_one_run_at_a_time(plan, tmp_path, capsys):
    with alone(tmp_path, "`fastinstance study run`"):
        assert study("run", plan, "--out", tmp_path) == 1
    assert "another `fastinstance study run` is at work" in only_line(capsys.readouterr().err)


def only_line(text):
    (line,) = text.strip().splitlines()
    return line


BAD = [
    ('name = "tiny"', 'name = "a/b"', "expected name to be a text that can name a folder"),
    ("seeds = [0]", "seeds = [0, 0]", "expected seeds without repetition"),
    ("seeds = [0]", "seeds = 3", "expected seeds to be a list of whole numbers, got 3"),
    ("seeds = [0]", "seed = [0]", "unknown key seed in the plan: did you mean seeds?"),
    ("folds = 2", "folds = 1", "expected folds to be a whole number from 2 on, got 1"),
    ("folds = 2", "folds = 2\nrun_folds = [2]", "run_folds names fold 2, but little has 2 folds"),
    ("folds = 2", 'folds = [["person0"], 3]', "expected folds to be a number or lists of the persons"),
    ("validation = 0.4", "validation = 1", "expected validation to be a number between 0 and 1"),
    ("folds = 2", 'folds = 2\nbaseline = "GFD"', "baseline names 'GFD', which is not in the plan; did you mean GDF?"),
    ('"DetectionLoss"', '"DetectoinLoss"', "little with Detection: [loss] name"),
    ('"DetectionLoss"', '"DetectionLoss"\noptions = { fales_gt = 2 }', "did you mean false_gt?"),
    (
        '[losses.GDF]\nname = "GeneralizedDiceFocalLoss"\n[losses.Detection]\nname = "DetectionLoss"',
        "",
        "[losses.<name>]",
    ),
    (
        "learning_rate = 1e-2",
        "learning_rat = 1e-2",
        "unknown key learning_rat in [training]: did you mean learning_rate?",
    ),
    ("[training]", "[training]\nseed = 3", "takes its seeds from the list `seeds`"),
    ("channels = [4, 8]", 'name = "unett"', "[network] name"),
    ('test_on = "other"', 'test_on = "othr"', "test_on in [data.little] names 'othr'"),
    ('test_on = "other"', "validation = 0.2", "[data.little] has a validation"),
    ('source = "nifti"', 'source = "nifty"', "[data.little]: data: expected source = one of"),
    ("min_size = 2", "tune = 'dice'", 'evaluation of [data.little] tune: expected "pq", "f1" or "dsc", got'),
    ("min_size = 2", "smal_ml = 2", "did you mean small_ml?"),
    (
        "min_size = 2",
        "min_size = -1",
        "evaluation of [data.little] min_size: expected a whole number from 0 on",
    ),
    (
        "min_size = 2",
        "collapse = 1",
        "evaluation of [data.little] collapse: expected a share above 0 and below 1",
    ),
    ("min_size = 2", "small_ml = 0", "evaluation of [data.little] small_ml: expected a number above 0, got 0"),
    ('small = "Detection"', 'small = "GDF"', "an ensemble takes small and large instances from GDF"),
    ('small = "Detection"', "", "an ensemble lacks small"),
    (
        '"DetectionLoss"',
        '"CCLoss"\noptions = { spacing = [1, inf] }',
        "losses.Detection.options.spacing.2: expected a finite number, got inf",
    ),
    (
        '"DetectionLoss"',
        '"DetectionLoss"\noptions = { connectivity = 26 }',
        "little with Detection: [loss] options of DetectionLoss: expected connectivity in (4, 8)",
    ),
    ("[network]", "[network", "expected TOML"),
    ("learning_rate = 1e-2", "learning_rate = nan", "training.learning_rate: expected a finite number, got nan"),
]


@pytest.mark.parametrize(("old", "new", "words"), BAD, ids=[words[:30] for _, _, words in BAD])
def test_a_bad_plan_gives_one_line_before_any_work(old, new, words, plan, tmp_path, capsys):
    assert old in plan.read_text()
    plan.write_text(plan.read_text().replace(old, new, 1))
    assert study("run", plan, "--out", tmp_path / "out") == 1
    line = only_line(capsys.readouterr().err)
    assert line.startswith(f"fastinstance: error: {plan}")
    assert words in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("folds = 2", "folds = 5", "[data.little] 5 folds are impossible with 4 persons"),
        ("folds = 2", 'folds = [["person0"], ["person0"]]', "[data.little] person0 is in two folds"),
        ("folds = 2", 'folds = [["person0", "anna"], ["person1"]]', "folds name anna, who is not among its persons"),
    ],
)
def test_impossible_folds_are_found_before_training(old, new, words, plan, here, tmp_path, capsys):
    plan.write_text(plan.read_text().replace(old, new, 1))
    assert study("run", plan, "--out", tmp_path / "out", "--quiet") == 1
    assert words in only_line(capsys.readouterr().err)
    assert not (tmp_path / "out" / "cells").exists()


def test_no_plan_and_no_cells(plan, tmp_path, capsys):
    assert study("run", tmp_path / "none.toml") == 1
    assert "No such file" in only_line(capsys.readouterr().err)
    for command in (("table", plan), ("figures", plan), ("collect", plan, tmp_path / "r.json")):
        assert study(*command, "--out", tmp_path / "out") == 1
        assert "no cell is done" in only_line(capsys.readouterr().err)


def test_missing_extras_name_the_pip_command(plan, monkeypatch, capsys):
    monkeypatch.setattr(arguments, "find_spec", lambda name: None if name == "scipy" else name)
    assert study("run", plan) == 1
    assert "the study needs scipy: pip install 'fastinstance[study]'" in only_line(capsys.readouterr().err)


def test_a_data_set_may_differ_in_part(plan):
    plan.write_text(
        plan.read_text().replace(
            'test_on = "other"',
            'test_on = "other"\ntraining = { epochs = 7 }\nnetwork = { name = "swinunetr", feature_size = 12 }\n'
            "evaluation = { small_ml = 0.1 }\nfolds = 3",
            1,
        )
    )
    read = read_plan(plan)
    table = read.run_table(Cell("little", "GDF", 0, 0))
    assert table["training"]["epochs"] == 7
    assert table["training"]["steps_per_epoch"] == 2
    assert table["network"] == {"name": "swinunetr", "feature_size": 12}
    assert read.data["little"].evaluation.small_ml == 0.1
    assert read.folds_of("little") == (0, 1, 2)
