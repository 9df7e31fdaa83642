"""The commands on files: tables, resuming, what is skipped, ranks, ensembles and pictures."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from fastinstance import __main__ as command_line
from fastinstance import commands, files, instance_metrics, overlay, volume_ensemble
from fastinstance.metrics import METRICS

AFFINE = np.diag([-2.0, 2.0, 5.0, 1.0])
SPACING = (2.0, 2.0, 5.0)


def draw_mask(seed: int, shape: tuple[int, ...] = (14, 12, 6)) -> np.ndarray[Any, Any]:
    return (np.random.default_rng(seed).random(shape) > 0.9).astype(np.uint8)


def save(path: Path, data: np.ndarray[Any, Any], affine: np.ndarray[Any, Any] = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if ".nii" in path.name:
        nibabel.save(nibabel.Nifti1Image(data, affine), path)
    elif path.suffix == ".npy":
        np.save(path, data)
    else:
        Image.fromarray(data).save(path)
    return path


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three pairs of NIfTI masks."""
    for number in range(3):
        for seed, side in ((0, "pred"), (10, "target")):
            save(tmp_path / side / f"case_{number}.nii.gz", draw_mask(seed + number))
    return tmp_path / "pred", tmp_path / "target"


def run(*arguments: object) -> int:
    return command_line.main([str(argument) for argument in arguments])


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def expected(pred: np.ndarray[Any, Any], target: np.ndarray[Any, Any], **options: Any) -> dict[str, float]:
    masks = (torch.from_numpy(side != 0)[None, None] for side in (pred, target))
    return {name: value.item() for name, value in instance_metrics(*masks, **options).items()}


def only_line(text: str) -> str:
    (line,) = text.strip().splitlines()
    return line


def test_evaluate_writes_a_row_for_each_pair(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    table = folders[0].parent / "new" / "table.csv"
    assert run("evaluate", *folders, "--out", table, "--matching", "iou", "--threshold", 0.2, "--min-size", 2) == 0
    rows = rows_of(table)
    assert [row["name"] for row in rows] == ["case_0", "case_1", "case_2"]
    for number, row in enumerate(rows):
        truth = expected(
            draw_mask(number), draw_mask(10 + number), matching="iou", threshold=0.2, min_size=2, spacing=SPACING
        )
        assert {name: float(row[name]) for name in METRICS} == pytest.approx(truth)
        assert all(row[name].isdigit() for name in METRICS if name.startswith("n_"))
    captured = capsys.readouterr()
    assert "3 pairs in" in captured.out
    assert "3/3" in captured.err, "a progress bar"
    assert sorted(path.name for path in table.parent.iterdir()) == ["table.csv"]


def test_json_is_for_machines(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    save(folders[0] / "case_0.nii.gz", draw_mask(0) * 0)
    assert run("evaluate", *folders, "--json", "--zero-division", "nan", "--quiet") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    found = json.loads(captured.out)
    assert (found["computed"], found["reused"], found["failed"], found["table"]) == (3, 0, {}, None)
    assert found["rows"][0]["ppv"] is None, "NaN is not JSON"
    mean = np.mean([row["ppv"] for row in found["rows"][1:]])
    assert found["summary"]["all"]["ppv"]["mean"] == pytest.approx(mean)


def test_it_goes_on_where_it_stopped(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = folders[0].parent / "table.csv"
    done: list[str] = []
    evaluate_pair = commands.evaluate_pair

    def watched(name: str, *arguments: Any) -> Any:
        done.append(name)
        return evaluate_pair(name, *arguments)

    monkeypatch.setattr(commands, "evaluate_pair", watched)
    again = ("evaluate", *folders, "--out", table, "--json")
    assert run(*again) == 0
    before = table.read_bytes()
    assert run(*again) == 0
    assert done == ["case_0", "case_1", "case_2"]
    assert table.read_bytes() == before
    save(folders[0] / "case_1.nii.gz", draw_mask(77))
    assert run(*again) == 0
    assert done[3:] == ["case_1"], "its input has changed"
    assert float(rows_of(table)[1]["dsc"]) == expected(draw_mask(77), draw_mask(11))["dsc"]
    assert run(*again, "--min-size", 3) == 0
    assert done[4:] == ["case_0", "case_1", "case_2"], "the settings have changed"
    for path in folders:
        (path / "case_0.nii.gz").unlink()
    capsys.readouterr()
    assert run(*again, "--min-size", 3) == 0
    assert json.loads(capsys.readouterr().out)["reused"] == 2
    assert [row["name"] for row in rows_of(table)] == ["case_1", "case_2"]


def test_what_is_complete_is_kept_after_ctrl_c(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    table = folders[0].parent / "table.csv"
    evaluate_pair = commands.evaluate_pair

    def interrupted(name: str, *arguments: Any) -> Any:
        if name == "case_2":
            raise KeyboardInterrupt
        return evaluate_pair(name, *arguments)

    monkeypatch.setattr(commands, "evaluate_pair", interrupted)
    assert run("evaluate", *folders, "--out", table) == 130
    assert [row["name"] for row in rows_of(table)] == ["case_0", "case_1"]
    for path in folders:
        for number in (0, 1):
            (path / f"case_{number}.nii.gz").unlink()
    assert run("evaluate", *folders, "--out", table) == 130
    assert len(rows_of(table)) == 2, "stopped before anything was done"


def test_where_nothing_can_be_written_nothing_is_done(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (folders[0].parent / "taken").write_text("")
    for out, words in ((folders[0], "it is a folder"), (folders[0].parent / "taken" / "table.csv", "exists")):
        assert run("evaluate", *folders, "--out", out) == 1
        line = only_line(capsys.readouterr().err)
        assert f"cannot write to {out}" in line
        assert words in line
    assert run("ensemble", *folders, folders[1] / "out") == 1
    assert "not inside of an input" in only_line(capsys.readouterr().err)


def test_bad_pairs_are_reported_and_skipped(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    pred, target = folders
    (pred / "case_0.nii.gz").write_bytes(b"damaged")
    save(pred / "case_1.nii.gz", draw_mask(1, (14, 12, 5)))
    save(pred / "case_3.npy", draw_mask(1))
    save(pred / "case_4.nii.gz", draw_mask(1), np.diag([1, 1, 1, 1]))
    save(target / "case_4.nii.gz", draw_mask(1))
    save(pred / "case_5.npy", np.full((3, 3), 0.5))
    save(target / "case_5.npy", np.ones((3, 3)))
    table = pred.parent / "table.csv"
    assert run("evaluate", pred, target, "--out", table) == 3
    captured = capsys.readouterr()
    for name, reason in (
        ("case_0", "cannot be read"),
        ("case_1", "expected one shape"),
        ("case_3", f"not in {target}"),
        ("case_4", "expected one affine"),
        ("case_5", "expected a mask of integers, got 0.5"),
    ):
        (line,) = (line for line in captured.err.splitlines() if f"skipped {name}:" in line)
        assert reason in line
    assert [row["name"] for row in rows_of(table)] == ["case_2"]
    assert "5 skipped" in captured.out
    assert run("evaluate", pred, target, "--out", table, "--json", "--quiet") == 3
    found = json.loads(capsys.readouterr().out)
    assert (found["reused"], sorted(found["failed"])) == (1, [f"case_{number}" for number in (0, 1, 3, 4, 5)])


def test_several_processes_give_the_same_table(folders: tuple[Path, Path]) -> None:
    one, two = (folders[0].parent / name for name in ("one.csv", "two.csv"))
    (folders[0] / "case_1.nii.gz").write_bytes(b"damaged")
    assert run("evaluate", *folders, "--out", one) == 3
    assert run("evaluate", *folders, "--out", two, "--jobs", 2) == 3
    assert one.read_bytes() == two.read_bytes()


def test_labels_instances_and_spacing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = np.array([[1, 1, 2, 0, 2, 0], [0, 0, 0, 0, 0, 0]], np.uint8)
    pred = np.array([[1, 1, 1, 0, 2, 0], [0, 0, 0, 0, 0, 0]], np.uint8)
    for side, data in (("pred", pred), ("target", target)):
        save(tmp_path / side / "a.png", data)
    both = tmp_path / "pred", tmp_path / "target"
    assert run("evaluate", *both, "--label", 1, 2, "--json", "--spacing", 3, 2, 2) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["label"], row["n_target"], row["n_missed"]) for row in rows] == [(1, 1, 0), (2, 2, 1)]
    assert rows[0]["vol_diff_ml"] == pytest.approx(0.012)
    assert run("evaluate", *both, "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["n_target"] == 2
    assert run("evaluate", *both, "--instances", "--json") == 0
    found = json.loads(capsys.readouterr().out)["rows"][0]
    assert (found["n_target"], found["n_pred"], found["label"]) == (2, 2, None), "2 is one instance in two pieces"
    assert run("evaluate", *both, "--label", 1, 2) == 0
    assert "1 pairs, label 2" in capsys.readouterr().out


def test_a_single_pair(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", folders[0] / "case_0.nii.gz", folders[1] / "case_1.nii.gz", "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["dsc"] == expected(draw_mask(0), draw_mask(11))["dsc"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a,b\n1,2\n", "not a table of `fastinstance evaluate`; remove it, or choose another --out"),
        (",".join(commands.COLUMNS) + "\n" + ",".join(["x"] * len(commands.COLUMNS)) + "\n", "damaged"),
        ("\0\xff", "table.csv"),
    ],
)
def test_another_file_is_not_overwritten(
    content: str, words: str, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    table = folders[0].parent / "table.csv"
    table.write_text(content, encoding="latin-1")
    assert run("evaluate", *folders, "--out", table) == 1
    assert words in only_line(capsys.readouterr().err)
    assert table.read_text(encoding="latin-1") == content


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluate", "nowhere", "nowhere"], "nowhere: no such file or folder"),
        (["rank", "nowhere.csv"], "nowhere.csv: no such file"),
        (["ensemble", "a", "b"], "at least two masks"),
        (["ensemble", "a", "b", "c", "d", "--threshold-ml", "2", "1"], "expected ascending --threshold-ml, got 2 1"),
        (["overlay", "a.png", "b.png", "c.png", "--out", "d.jpg"], "d.jpg: expected a name that ends in .png"),
        (["ensemble", "a", "b", "c", "d"], "expected 2 numbers as --threshold-ml for 3 models, got 1"),
        (["overlay", "a.png", "b.png", "c.png", "--out", "d.png"], "a.png: no such file"),
    ],
)
def test_nothing_to_do_gives_one_line(
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 1
    assert words in only_line(capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--matching", "best"], "invalid choice: 'best'"),
        (["--threshold", "1"], "expected a score from 0 on and below 1, got '1'"),
        (["--spacing", "0"], "expected a size above 0 in mm, got '0'"),
        (["--zero-division", "2"], "expected 0, 1 or nan, got '2'"),
        (["--jobs", "0"], "expected a whole number from 1 on, got '0'"),
        (["--label", "0"], "expected a whole number from 1 on, got '0'"),
        (["--label", "1", "--instances"], "not allowed with"),
        (["--connectivity", "5"], "invalid choice: 5"),
    ],
)
def test_bad_flags_give_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("evaluate", "a", "b", *arguments)
    assert stopped.value.code == 2
    assert words in only_line(capsys.readouterr().err)


def test_a_connectivity_that_does_not_fit_is_reported(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("evaluate", *folders, "--connectivity", 8) == 3
    assert "expected connectivity in (6, 18, 26)" in capsys.readouterr().err
    assert run("evaluate", *folders, "--spacing", 1, 2) == 3
    assert "expected 3 numbers as --spacing, got 2" in capsys.readouterr().err


def test_rank_prints_the_table_of_the_paper(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "methods.csv"
    table.write_text(
        "method,pq,dsc,vol_diff,fdr,fnr,ppv,sen,f1\n"
        "GDF,.1610,.5635,-1.53,.5576,.4199,.4038,.5801,.4436\n"
        "blob-GDF,.1689,.5740,-2.14,.5084,.4285,.4337,.5715,.4653\n"
        "ICI,.1667,.5735,-1.30,.5720,.4312,.3972,.5688,.4340\n"
        "False,.1653,.5633,-1.36,.5592,.3963,.4015,.6037,.4449\n"
        "Proximity,.1626,.5573,-1.90,.5275,.4190,.4336,.5810,.4604\n"
    )
    assert run("rank", table, "--out", tmp_path / "ranks.csv") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[-3:] for line in lines] == [
        ["RA", "RG", "RI"],
        ["3.4", "3.0", "3.2"],
        ["2.3", "3.0", "2.2"],
        ["3.8", "1.5", "5.0"],
        ["2.8", "3.0", "2.6"],
        ["2.9", "4.5", "2.0"],
    ]
    assert [row["RA"] for row in rows_of(tmp_path / "ranks.csv")] == ["3.4", "2.3", "3.8", "2.8", "2.9"]


def test_rank_takes_tables_of_evaluate(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    pred, target = folders
    root = pred.parent
    assert run("evaluate", pred, target, "--out", root / "mine.csv") == 0
    assert run("evaluate", target, target, "--out", root / "best.csv") == 0
    capsys.readouterr()
    assert run("rank", f"other={root / 'mine.csv'}", root / "best.csv", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["other", "best"]
    assert (found["best"]["RA"], found["other"]["RI"]) == (1.0, 2.0)
    differences = [float(row["vol_diff_ml"]) for row in rows_of(root / "mine.csv")]
    assert found["other"]["values"]["vol_diff"] == pytest.approx(np.mean(differences))
    (pred / "case_0.nii.gz").unlink()
    assert run("evaluate", pred, target, "--out", root / "mine.csv") == 3
    capsys.readouterr()
    assert run("rank", root / "mine.csv", root / "best.csv") == 1
    assert "mine lacks 1 of 3, such as case_0" in only_line(capsys.readouterr().err)
    assert run("rank", root / "mine.csv", root / "mine.csv") == 1
    assert "a name for each method, got mine twice" in only_line(capsys.readouterr().err)
    (root / "empty.csv").write_text("name,label\n")
    assert run("rank", root / "empty.csv") == 1
    assert "no rows" in only_line(capsys.readouterr().err)
    (root / "other.csv").write_text("name,colour\na,blue\n")
    assert run("rank", root / "other.csv") == 1
    assert "expected columns among pq, dsc" in only_line(capsys.readouterr().err)


def test_tables_of_spreadsheets_and_repeated_labels(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    table = folders[0].parent / "table.csv"
    table.write_text("method,pq\na,0.5\nb,0.25\n", encoding="utf-8-sig")
    assert run("rank", table, "--json") == 0
    assert [result["RA"] for result in json.loads(capsys.readouterr().out).values()] == [1, 2]
    assert run("evaluate", *folders, "--label", 1, 1, "--json", "--quiet") == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 3


def test_names_that_are_no_text_do_not_cost_the_table(folders: tuple[Path, Path]) -> None:
    for folder in folders:
        (folder / "case_0.nii.gz").rename(folder / os.fsdecode(b"case_\xff.nii.gz"))
    table = folders[0].parent / "table.csv"
    assert run("evaluate", *folders, "--out", table, "--quiet") == 0
    assert [row["name"] for row in rows_of(table)] == ["case_1", "case_2", r"case_\udcff"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("name,dsc\na,0.5\nb,0,5\n", "expected 2 cells in a row, as in the first, got more in row 2"),
        ("name,dsc\na,inf\n", "dsc: expected finite numbers, got an infinite one"),
        ("dsc,method\n0.5\n0.4,b\n", "expected one row for each method, and its name in each"),
    ],
)
def test_damaged_tables_give_one_line(
    content: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "table.csv").write_text(content)
    assert run("rank", tmp_path / "table.csv") == 1
    assert words in only_line(capsys.readouterr().err)


def test_ensemble_of_folders(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    small, large = folders
    out = small.parent / "out"
    save(small / "case_0.nii.gz", draw_mask(0).astype(np.int16))
    again = ("ensemble", small, large, out, "--threshold-ml", 0.06, "--json")
    assert run(*again) == 0
    for number in range(3):
        masks = (torch.from_numpy(draw_mask(seed + number))[None, None] for seed in (0, 10))
        truth = volume_ensemble(*masks, threshold_ml=0.06, spacing=SPACING)[0, 0]
        made: Any = nibabel.load(out / f"case_{number}.nii.gz")
        np.testing.assert_array_equal(np.asanyarray(made.dataobj), truth.numpy())
        np.testing.assert_array_equal(made.affine, AFFINE)
        assert made.get_data_dtype() == (np.int16 if number == 0 else np.uint8)
    assert json.loads(capsys.readouterr().out) == {"computed": 3, "reused": 0, "failed": {}, "out": str(out)}
    save(large / "case_2.nii.gz", draw_mask(50))
    (out / "case_1.nii.gz").unlink()
    (large / "case_0.nii.gz").unlink()
    assert run(*again) == 3
    assert json.loads(capsys.readouterr().out)["computed"] == 2, "one has changed, one has gone"
    assert run(*again[:-3], "--majority") == 3
    assert "2 masks in" in capsys.readouterr().out
    both = draw_mask(1) & draw_mask(11)
    np.testing.assert_array_equal(files.read(out / "case_1.nii.gz").data, both)
    assert sorted(path.name for path in out.iterdir()) == [f"case_{n}.nii.gz" for n in range(3)] + ["ensemble.json"]


def test_ensemble_of_single_files_and_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = save(tmp_path / "small.png", np.array([[3, 0, 7, 7, 7, 0, 0, 0]], np.uint8))
    large = save(tmp_path / "large.png", np.array([[0, 0, 7, 7, 7, 3, 3, 3]], np.uint8))
    out = tmp_path / "out.png"
    assert run("ensemble", small, large, out, "--threshold-ml", 0.002) == 0
    np.testing.assert_array_equal(files.read(out).data, [[3, 0, 7, 7, 7, 3, 3, 3]])
    third = save(tmp_path / "third.png", np.array([[0, 0, 0, 7, 7, 3, 0, 0]], np.uint8))
    assert run("ensemble", small, large, third, out, "--majority") == 0
    np.testing.assert_array_equal(files.read(out).data, [[0, 0, 7, 7, 7, 3, 0, 0]])
    assert run("ensemble", small, third, large, out, "--threshold-ml", 0.002, 0.003) == 0
    np.testing.assert_array_equal(files.read(out).data, [[3, 0, 7, 7, 7, 3, 3, 3]])
    capsys.readouterr()
    assert run("ensemble", small, large, small) == 1
    assert "an output that is not one of the inputs" in only_line(capsys.readouterr().err)
    assert run("ensemble", small, large, tmp_path / "out.npy") == 3
    assert "ends in .png, like small.png" in capsys.readouterr().err
    ids = save(tmp_path / "ids.npy", np.arange(300).reshape(20, 15))
    assert run("ensemble", ids, ids, tmp_path / "out.npy") == 3
    assert "expected classes, got 299 values" in capsys.readouterr().err
    one, white = (save(tmp_path / f"{n}.png", np.array([[n, 0, n, n, n, 0, 0, 0]], np.uint8)) for n in (1, 255))
    assert run("ensemble", one, white, out, "--majority") == 3
    assert "one value of the foreground, got 1 in some files and 255 in others" in capsys.readouterr().err
    wide = save(tmp_path / "wide.npy", np.array([[300, 0, 0, 0, 0, 0, 0, 0]]))
    assert run("ensemble", small, wide, out) == 3
    said = capsys.readouterr().err
    assert "uint8 cannot hold 300" in said
    assert f"{out} is of an earlier run" in said


def picture_of(path: Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as image:
        return np.array(image.convert("RGB")).astype(int)


def coloured(picture: np.ndarray[Any, Any]) -> set[str]:
    """The colours that some pixels outside of the legend have."""
    names = {"found": overlay.FOUND, "missed": overlay.MISSED, "false": overlay.FALSE}
    area = picture[: int(0.8 * len(picture))]
    wanted = {
        name: [int(tint[i : i + 2], 16) * 0.85 + 0.15 * 0.4 * 255 for i in (1, 3, 5)] for name, tint in names.items()
    }
    return {name for name, tint in wanted.items() if (np.abs(area - tint).max(-1) < 25).sum() > 20}


@pytest.mark.parametrize("kind", ["nii.gz", "npy", "png"])
def test_overlay_shows_what_there_is(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = (30, 24) if kind == "png" else (30, 24, 9)
    image = np.full(shape, 100, np.uint8)
    image[::2] = 160
    pred, target = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    target[2:6, 2:6], pred[3:7, 3:7] = 1, 1
    paths = [tmp_path / f"{name}.{kind}" for name in ("image", "pred", "target")]
    for path, data in zip(paths, (image, pred, target), strict=True):
        save(path, data)
    out = tmp_path / "new" / "picture.png"
    assert run("overlay", *paths, "--out", out) == 0
    assert f"found 1, missed 0, false 0: {out}" in capsys.readouterr().out
    assert coloured(picture_of(out)) == {"found"}
    target[20:25, 10:14], pred[10:14, 16:20] = 1, 1
    for path, data in zip(paths, (image, pred, target), strict=True):
        save(path, data)
    assert run("overlay", *paths, "--out", out, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"found": 1, "missed": 1, "false": 1, "picture": str(out)}
    assert coloured(picture_of(out)) == {"found", "missed", "false"}
    assert [path.name for path in out.parent.iterdir()] == ["picture.png"]
    save(paths[1], pred[1:])
    assert run("overlay", *paths, "--out", out) == 1
    assert "expected one shape" in only_line(capsys.readouterr().err)


def test_inputs_are_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [save(tmp_path / f"{number}.png", draw_mask(number, (9, 9))) for number in range(3)]
    (table := tmp_path / "a.csv").write_text("method,pq\na,0.5\n")
    before = [path.read_bytes() for path in (*paths, table)]
    for arguments in (
        *(("overlay", *paths, "--out", path) for path in paths),
        ("rank", table, "--out", table),
        ("rank", f"A={table}", "--out", table),
    ):
        assert run(*arguments) == 1
        assert "an output that is not one of the inputs" in only_line(capsys.readouterr().err)
    assert [path.read_bytes() for path in (*paths, table)] == before


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 1), (5, 1, 7)])
def test_overlay_of_lines_and_points(shape: tuple[int, ...], tmp_path: Path) -> None:
    mask = save(tmp_path / "mask.nii.gz", np.ones(shape, np.uint8))
    assert run("overlay", mask, mask, mask, "--out", tmp_path / "picture.png") == 0
    assert (tmp_path / "picture.png").exists()


@pytest.mark.parametrize("number", [0.0, np.nan])
def test_overlay_of_a_volume_without_a_place(number: float, tmp_path: Path) -> None:
    """Headers with a matrix that says nothing are not rare; the axes are then those of the file."""
    mask, data = tmp_path / "mask.nii", draw_mask(0)
    content = bytearray(nibabel.Nifti1Image(data, np.eye(4)).to_bytes())
    content[280:328] = np.full(12, number, np.float32).tobytes()  # srow_x, srow_y, srow_z
    content[254:256] = np.int16(1).tobytes()  # sform_code
    mask.write_bytes(content)
    assert run("overlay", mask, mask, mask, "--out", tmp_path / "picture.png") == 0
    plain = save(tmp_path / "mask.npy", data)
    assert run("overlay", plain, plain, plain, "--out", tmp_path / "plain.png") == 0
    assert (tmp_path / "picture.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


def test_overlay_says_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = save(tmp_path / "mask.npy", draw_mask(0))
    assert run("overlay", mask, mask, mask, "--out", tmp_path / "picture.png", "--connectivity", 8) == 1
    assert "expected connectivity in (6, 18, 26)" in only_line(capsys.readouterr().err)


def test_errors_are_drawn_over_what_was_found() -> None:
    """In a projection a missed instance hides what lies behind it, not the other way round."""
    target, pred = np.zeros((4, 4, 4), bool), np.zeros((4, 4, 4), bool)
    target[0, 0, 0] = pred[0, 0, 0] = True
    pred[2, 0, 0] = target[2, 2, 0] = True
    painted = overlay.paint(np.zeros((4, 4, 4)), pred, target)
    assert [overlay.COLOURS[k - 1] for k in painted.layer.max(0)[0, [0]]] == [overlay.FALSE]
    assert [overlay.COLOURS[k - 1] for k in painted.layer.max(1)[2, [0]]] == [overlay.MISSED]


def test_an_oriented_volume_has_its_front_at_the_top(tmp_path: Path) -> None:
    image = np.zeros((20, 30, 8))
    image[:, 25:] = 1  # the front, were the axis not turned round
    affine = np.diag([1.0, -1.0, 2.0, 1.0])
    turned = overlay._panels(overlay.Painted(image, np.zeros(image.shape, np.uint8), 0, 0, 0), (1, 1, 2), affine)
    assert [panel.title for panel in turned] == ["axial", "coronal", "sagittal"]
    axial, coronal, _ = turned
    assert (axial.grey.shape, axial.height, axial.width) == ((30, 20), 30, 20)
    assert (coronal.height, coronal.width) == (16, 20)
    assert axial.grey[:5].sum() == 0
    assert axial.grey[-5:].all(), "at the back, so below"


def test_a_signal_stops_the_processes_too(tmp_path: Path) -> None:
    for number in range(30):
        for seed, side in ((0, "pred"), (50, "target")):
            save(tmp_path / side / f"{number}.npy", draw_mask(seed + number, (60, 60, 30)))
    command = [sys.executable, "-m", "fastinstance", "evaluate", tmp_path / "pred", tmp_path / "target", "--jobs", "2"]
    command += ["--out", tmp_path / "table.csv"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    assert process.stderr is not None
    while "evaluate" not in process.stderr.read(20):  # the bar is there
        pass
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "fastinstance: interrupted" in errors
