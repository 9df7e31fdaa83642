"""The main job from end to end, its measurements on cases worked out by hand, and its one-line errors."""

import csv
import functools
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import fastinstance
from fastinstance import __main__ as command_line
from fastinstance.study import brain, demo

COLUMNS = {
    "loss", "stage", "threshold", "subject", "true", "found", "missed", "predicted", "false",
    "sensitivity", "precision", "f1", "panoptic_quality", "dice", "sensitivity_at_pixel_precision",
    "true_0_0.02_ml", "found_0.02_0.05_ml", "false_1_inf_ml",
}  # fmt: skip

WARNINGS = "-W", "error", "-W", "ignore:`torch.jit:DeprecationWarning"  # the latter for what MONAI imports


def run(*arguments, **options):
    """`python -m fastinstance` with these arguments, with every warning an error."""
    command = [sys.executable, *WARNINGS, "-m", "fastinstance", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A quick run: what it printed, and the folder it wrote."""
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    done = run("demo", "--quick", "--threads", 1, "--out", out)
    assert done.returncode == 0, done.stderr
    return done.stdout, out


def test_quick_run_prints_every_part(quick):
    printed, out = quick
    for term in ("seg", "instance_gt", "instance_pred", "center", "false_gt", "false_pred", "proximity"):
        (line,) = (line for line in printed.splitlines() if line.split()[:1] == [term])
        assert all(math.isfinite(float(number)) for number in line.split()[1:])
    for part in ("found / true", "missed", "false", "SEN", "PPV", "F1", "PQ", "Dice", "SEN at the pixel loss's PPV"):
        assert any(line.strip().startswith(part) for line in printed.splitlines()), part
    for part in ("MONAI GeneralizedDiceFocalLoss", "fastinstance DetectionLoss", "loop reference, all seven terms"):
        assert part in printed
    assert "more small lesions found, at the price of more false ones" in printed
    assert f"Wrote {out / 'overlay.png'}" in printed


def test_quick_run_writes_a_picture_and_a_table_and_nothing_else(quick):
    _, out = quick
    assert sorted(path.name for path in out.iterdir()) == ["overlay.png", "results.csv"]
    picture = (out / "overlay.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 50_000
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) >= COLUMNS
    keys = [(row["loss"], row["stage"], row["subject"]) for row in rows]
    networks = [(loss, stage) for loss in ("pixel loss", "DetectionLoss") for stage in ("before", "after")]
    assert keys == [(*network, subject) for network in networks for subject in ("0", "1", "all")]
    for row in rows:
        assert int(row["found"]) + int(row["missed"]) == int(row["true"]) > 0
        for what in ("true", "found", "false"):
            groups = [int(row[name]) for name in row if name.startswith(f"{what}_")]
            assert sum(groups) == int(row[what])
        assert all(0 <= float(row[name]) <= 1 for name in demo.METRICS)
    before = [[row[name] for name in rows[0] if name != "loss"] for row in rows if row["stage"] == "before"]
    assert before[:3] == before[3:], "both losses start from the same weights"


GENERATE = functools.cache(brain.generate)
TINY = demo.DemoSettings(train_subjects=1, test_subjects=1, slices=1, steps=2, timing_rounds=1, reference_rounds=1)


@pytest.fixture
def same_subjects(monkeypatch):
    """Generates a subject once for all tests; one thread, which is fastest for so little work."""
    monkeypatch.setattr(demo.brain, "generate", GENERATE)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", demo.CHOICES)
def test_every_loss_trains(name, same_subjects, tmp_path, capsys):
    demo.run(replace(TINY, loss=name, out=tmp_path))
    printed = capsys.readouterr().out
    assert demo.CHOICES[name].what in printed
    assert ("first 50% of its steps are trained with the pixel loss" in printed) == (name == "proximity")
    assert (tmp_path / "overlay.png").exists()


def test_the_seed_decides_everything(same_subjects, tmp_path):
    state = torch.random.get_rng_state()
    for folder, seed in (("a", 5), ("b", 5), ("c", 6)):
        demo.run(replace(TINY, seed=seed, out=tmp_path / folder))
    a, b, c = ((tmp_path / folder / "results.csv").read_bytes() for folder in "abc")
    assert a == b != c
    assert (tmp_path / "a" / "overlay.png").read_bytes() == (tmp_path / "b" / "overlay.png").read_bytes()
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random state was touched"


def test_the_command_line_offers_the_losses_there_are():
    assert tuple(demo.CHOICES) == command_line.DEMO_LOSSES
    assert command_line.DEMO_LOSSES[0] == demo.DemoSettings().loss


def mask(*rows):
    """A slice [1, 1, Y, X] from rows such as ".##."."""
    return torch.tensor([[character == "#" for character in row] for row in rows])[None, None]


def test_detection_by_hand():
    target = mask("##....##", "##....##", "........", "..###...")
    predicted = mask("##......", "........", "#.......", "#.###.##")
    result = demo.detect(predicted, target)
    assert (result.true, result.found, result.predicted, result.false) == (3, 2, 4, 2)
    assert result.sensitivity == pytest.approx(2 / 3)
    assert result.precision == pytest.approx(1 / 2)
    assert result.f1 == pytest.approx(4 / 7)
    assert result.dice == pytest.approx(2 * 5 / (11 + 9))
    assert result.panoptic_quality == pytest.approx((2 * 2 / 6 + 1) / (2 + 2 / 2 + 1 / 2))
    np.testing.assert_array_equal(result.true_by_size, [3, 0, 0, 0, 0])


def test_single_pixels_are_not_predictions():
    result = demo.detect(mask("#..#", "...."), mask("##..", "...."))
    assert (result.predicted, result.found) == (0, 0)


def test_a_prediction_that_joins_two_lesions_matches_one_of_them():
    result = demo.detect(mask("#######"), mask("###.###"))
    assert (result.found, result.false, result.predicted) == (2, 0, 1)
    assert result.panoptic_quality == pytest.approx(2 * 3 / 10 / 1.5)


def test_slices_do_not_join():
    plane = mask("##..")
    result = demo.detect(torch.cat([plane, plane]), torch.cat([plane, torch.zeros_like(plane)]))
    assert (result.true, result.found, result.predicted, result.false) == (1, 1, 2, 1)


def test_nothing_predicted_and_nothing_there():
    empty = mask("....")
    nothing = demo.detect(empty, mask("##.."))
    assert (nothing.sensitivity, nothing.precision, nothing.f1, nothing.panoptic_quality) == (0, 0, 0, 0)
    assert demo.detect(empty, empty).dice == 0


def test_sensitivity_at_precision():
    sensitivity, precision = [0.9, 0.7, 0.4], [0.2, 0.6, 0.8]
    assert demo.sensitivity_at_precision(sensitivity, precision, 0.6) == pytest.approx(0.7)
    assert demo.sensitivity_at_precision(sensitivity, precision, 0.4) == pytest.approx(0.8)
    assert demo.sensitivity_at_precision(sensitivity, precision, 0.1) == pytest.approx(0.9)
    assert demo.sensitivity_at_precision(sensitivity, precision, 0.9) is None


def test_the_overlay_counts_and_colours():
    target, predicted = (m[0, 0] for m in (mask("##....##", "........"), mask(".#......", ".#.##...")))
    overlay = demo.paint(torch.zeros(2, 8), predicted, target)
    assert (overlay.found, overlay.missed, overlay.false) == (1, 1, 1)
    strongest = overlay.picture.argmax(-1)
    coloured = overlay.picture.max(-1) > overlay.picture.min(-1)
    np.testing.assert_array_equal(np.where(coloured, strongest, -1)[0], [1, 1, -1, -1, -1, -1, 2, 2])
    np.testing.assert_array_equal(np.where(coloured, strongest, -1)[1], [-1, 1, -1, 0, 0, -1, -1, -1])


def test_the_picture_shows_the_busiest_slice_of_each_subject_first():
    counts = [1, 5, 4, 0, 2, 3]  # lesions in the slices of two subjects
    labels = torch.tensor(counts)[:, None, None, None]
    assert demo.pick_slices(labels, slices=3) == [1, 5, 2]


def only_line(text):
    (line,) = text.strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["demo", "--loss", "best"], "invalid choice: 'best'"),
        (["demo", "--steps", "0"], "expected a whole number from 1 on, got '0'"),
        (["demo", "--seed", "-1"], "expected a whole number from 0 on, got '-1'"),
        (["demo", "--threads", "two"], "expected a whole number from 1 on, got 'two'"),
        (["demo", "--subjects", "3"], "expected 2 arguments"),
        (["demo", "--fast"], "unrecognized arguments: --fast"),
        (["dance"], "invalid choice: 'dance'"),
        ([], "required: COMMAND"),
    ],
)
def test_bad_flags_give_one_line(flags, expected, capsys):
    with pytest.raises(SystemExit) as stopped:
        command_line.main(flags)
    assert stopped.value.code == 2
    assert expected in only_line(capsys.readouterr().err)


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        command_line.main(["--version"])
    assert capsys.readouterr().out == f"fastinstance {fastinstance.__version__}\n"


def test_missing_extras_name_the_pip_command(monkeypatch, capsys):
    monkeypatch.setattr(command_line, "find_spec", lambda name: None if name in ("monai", "tqdm") else name)
    assert command_line.main(["demo", "--quick"]) == 1
    line = only_line(capsys.readouterr().err)
    assert "monai, tqdm" in line
    assert "pip install 'fastinstance[demo]'" in line


@pytest.fixture
def no_work(monkeypatch):
    """Fails a test that gets as far as making data."""

    def generate(*arguments, **options):
        raise AssertionError("the folder must be checked before any work")

    monkeypatch.setattr(demo.brain, "generate", generate)


def test_a_file_in_place_of_the_folder_gives_one_line(no_work, tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    for out in (tmp_path / "taken", tmp_path / "taken" / "below"):
        assert command_line.main(["demo", "--quick", "--out", str(out)]) == 1
        captured = capsys.readouterr()
        assert f"cannot write to --out {out}" in only_line(captured.err)
        assert captured.out == ""


def test_a_folder_in_place_of_the_picture_gives_one_line(no_work, tmp_path, capsys):
    (tmp_path / "overlay.png").mkdir()
    assert command_line.main(["demo", "--quick", "--out", str(tmp_path)]) == 1
    assert "overlay.png is a folder" in only_line(capsys.readouterr().err)


def test_a_read_only_folder_gives_one_line(no_work, tmp_path, capsys, monkeypatch):
    def refuse(self, *arguments, **options):  # a mode bit would not stop the superuser
        raise OSError(30, "Read-only file system", str(self))

    monkeypatch.setattr(demo.Path, "touch", refuse)
    assert command_line.main(["demo", "--quick", "--out", str(tmp_path)]) == 1
    assert f"cannot write to --out {tmp_path}: Read-only file system" in only_line(capsys.readouterr().err)


def test_divergence_gives_one_line(same_subjects, tmp_path, capsys, monkeypatch):
    class Diverging(torch.nn.Module):
        def forward(self, logits, target, *, target_labels):
            return logits.sum() * math.nan

    monkeypatch.setitem(demo.CHOICES, "detection", demo.CHOICES["detection"]._replace(build=Diverging))
    flags = ["demo", "--quick", "--subjects", "1", "1", "--steps", "1", "--threads", "1", "--out", str(tmp_path)]
    assert command_line.main(flags) == 1
    assert "training diverged: the loss is nan at step 0" in capsys.readouterr().err.strip().splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("old")

    def fail():
        with demo.replacing(path) as part:
            part.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("results.csv", "old")]


def test_ctrl_c_gives_one_line_and_leaves_no_files(tmp_path):
    command = [sys.executable, "-m", "fastinstance", "demo", "--threads", "1", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    process.stdout.readline()  # it has begun
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip().splitlines()[-1] == "fastinstance: interrupted"
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []
