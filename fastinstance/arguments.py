"""The arguments of the commands that work on files; light, so that --help and a wrong flag answer at once."""

from __future__ import annotations

import argparse
import math
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["add_commands", "add_study", "add_train", "whole"]

STUDY_PACKAGES = ("monai", "scipy", "matplotlib", "tqdm")  # what the study needs whatever its data
EXIT_CODES = (
    "exit codes: 0 all done; 1 nothing done, for the one reason shown; 2 bad arguments; "
    "3 done, but some pairs were reported and skipped; 130 after Ctrl-C"
)


def whole(least: int):
    """An argparse type: a whole number that is at least `least`."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not least <= value < 2**31:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} on, got {text!r}")
        return value

    return convert


def _number(what: str, least: float, below: float = math.inf, *, open_end: bool = True):
    """An argparse type: a number in an interval; `open_end` leaves `least` itself out."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value < below or (open_end and value == least):
            raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}")
        return value

    return convert


def _zero_one_nan(text: str) -> float:
    if text not in ("0", "1", "nan"):
        raise argparse.ArgumentTypeError(f"expected 0, 1 or nan, got {text!r}")
    return float(text)


_MILLIMETRES = _number("a size above 0 in mm", 0)
_MILLILITRES = _number("a volume above 0 in mL", 0)


def _run(name: str):
    """Runs a command of `fastinstance.commands`, imported only now."""

    def run(arguments: argparse.Namespace) -> int:
        from fastinstance import commands, files

        try:
            return getattr(commands, name)(arguments)
        except files.FileError as error:
            print(f"fastinstance: error: {error}", file=sys.stderr)
            return 1

    return run


def _study(name: str, module: str = "commands"):
    """Runs a command of a module of `fastinstance.study`, imported only now."""

    def run(arguments: argparse.Namespace) -> int:
        missing = [package for package in STUDY_PACKAGES if find_spec(package) is None]
        if missing:
            print(
                f"fastinstance: error: the study needs {', '.join(missing)}: pip install 'fastinstance[study]'",
                file=sys.stderr,
            )
            return 1
        from fastinstance.files import FileError
        from fastinstance.study.subjects import StudyError

        commands = import_module(f"fastinstance.study.{module}")
        try:
            return getattr(commands, name)(arguments)
        except (StudyError, FileError) as error:
            print(f"fastinstance: error: {error}", file=sys.stderr)
            return 1

    return run


def _command(commands: Any, name: str, summary: str, description: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, allow_abbrev=False, help=summary, description=description, epilog=EXIT_CODES + "."
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(run=_run(name))
    return parser


def _batch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", type=whole(1), default=1, metavar="N", help="processes (default: 1)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--spacing",
        type=_MILLIMETRES,
        nargs="+",
        metavar="MM",
        help="pixel size along each axis, or one for all; for a 2D image also its thickness first. Without it that of "
        "the NIfTI header, 1 mm in other formats; with it headers are not compared",
    )
    parser.add_argument(
        "--connectivity",
        type=whole(4),
        choices=(4, 8, 6, 18, 26),
        metavar="K",
        help="of the instances: 4 or 8 in 2D, 6, 18 or 26 in 3D (default: full)",
    )


def add_commands(commands: Any) -> None:
    """Adds evaluate, rank, ensemble and overlay to the subparsers of a parser."""
    evaluate = _command(
        commands,
        "evaluate",
        "instance-level metrics of predicted masks, file by file",
        "Compares masks in two folders, matched by name: NIfTI, TIFF, PNG or npy. A row for each pair goes to --out, "
        "the mean over the pairs is printed. Rows that are there already are kept unless files or settings changed.",
    )
    evaluate.add_argument("pred", type=Path, metavar="PRED", help="folder (or file) of predicted masks")
    evaluate.add_argument("target", type=Path, metavar="TARGET", help="folder (or file) of true masks")
    evaluate.add_argument("--out", type=Path, metavar="TABLE.csv", help="table to write, or to go on with")
    evaluate.add_argument(
        "--matching",
        choices=("overlap", "iou", "dice"),
        default="overlap",
        help="found is what shares a pixel, or one to one by a score above --threshold (default: overlap)",
    )
    evaluate.add_argument(
        "--threshold",
        type=_number("a score from 0 on and below 1", 0, 1, open_end=False),
        default=0.5,
        metavar="SCORE",
        help="of iou and dice (default: 0.5)",
    )
    evaluate.add_argument(
        "--min-size", type=whole(0), default=0, metavar="PIXELS", help="smaller instances are ignored"
    )
    evaluate.add_argument(
        "--zero-division",
        type=_zero_one_nan,
        default=0.0,
        metavar="0|1|nan",
        help="score of a side without instances; nan leaves it out of means (default: 0)",
    )
    kind = evaluate.add_mutually_exclusive_group()
    kind.add_argument(
        "--label",
        type=whole(1),
        nargs="+",
        metavar="N",
        help="a row for each of these values; default: all but 0 is one",
    )
    kind.add_argument("--instances", action="store_true", help="the values are instance ids, not classes")
    _images(evaluate)
    _batch(evaluate)

    rank = _command(
        commands,
        "rank",
        "rank methods by their tables",
        "Ranks methods metric by metric, as the tables of the paper: RA is the mean of all ranks, RG that of DSC and "
        "|Vol.Diff|, RI that of FDR, FNR, PPV, SEN and F1.",
    )
    rank.add_argument(
        "tables",
        nargs="+",
        metavar="[NAME=]TABLE.csv",
        help="of `evaluate`, one for each method; or one with a column `method` and a row for each",
    )
    rank.add_argument("--out", type=Path, metavar="RANKS.csv", help="table to write")

    ensemble = _command(
        commands,
        "ensemble",
        "combine the masks of several models",
        "Small instances from one model, large ones from another, and so on for more models and thresholds; or what "
        "most of them predict. Files, or folders matched by name; header, affine and dtype are those of the first.",
    )
    ensemble.add_argument(
        "paths",
        type=Path,
        nargs="+",
        metavar="SMALL LARGE OUT",
        help="masks from the small instances' model on; output",
    )
    how = ensemble.add_mutually_exclusive_group()
    how.add_argument(
        "--threshold-ml",
        type=_MILLILITRES,
        nargs="+",
        default=[0.05],
        metavar="ML",
        help="volume from which the next model is used, one less than models (default: 0.05)",
    )
    how.add_argument("--majority", action="store_true", help="what more than half of the models predict")
    _images(ensemble)
    _batch(ensemble)

    overlay = _command(
        commands,
        "overlay",
        "draw found, missed and false instances",
        "Draws maximum-intensity projections with found instances green, missed ones blue and false ones red.",
    )
    overlay.add_argument("image", type=Path, metavar="IMAGE", help="the image that was segmented")
    overlay.add_argument("pred", type=Path, metavar="PRED", help="predicted mask")
    overlay.add_argument("target", type=Path, metavar="TARGET", help="true mask")
    overlay.add_argument("--out", type=Path, required=True, metavar="PICTURE.png", help="picture to write")
    overlay.add_argument("--min-size", type=whole(0), default=0, metavar="PIXELS", help="smaller instances are ignored")
    _images(overlay)


def add_train(commands: Any) -> None:
    """Adds train to the subparsers of a parser."""
    train = commands.add_parser(
        "train",
        allow_abbrev=False,
        help="train a network with a loss, as a run file says",
        description="Trains a network as RUN.toml says, and keeps run, curves and checkpoints in DIR. Killed or "
        "stopped at any moment, the same command goes on to the same bits. Several GPUs: "
        "torchrun --nproc-per-node N -m fastinstance train ...",
        epilog="exit codes: 0 done, or stopped by SIGTERM and saved; 1 for the one reason shown; 2 bad arguments; "
        "130 after Ctrl-C.",
    )
    train.add_argument("config", type=Path, metavar="RUN.toml", help="what to train; docs/study.md has all keys")
    train.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of this run alone")
    train.add_argument("--cache", type=Path, metavar="DIR", help="folder of prepared subjects, for many runs")
    train.add_argument("--skip-bad", action="store_true", help="leave out subjects that cannot be used, naming them")
    train.add_argument("--quiet", action="store_true", help="no progress bars")
    train.set_defaults(run=_study("run", "runs"))


def add_study(commands: Any) -> None:
    """Adds study, with its own commands, to the subparsers of a parser."""
    study = commands.add_parser(
        "study",
        allow_abbrev=False,
        help="compare losses by cross-validation: run a plan, print its tables, draw its figures",
        description="Sections 3 and 4 of the paper: losses × data sets × seeds × folds, from one TOML file.",
    )
    parts = study.add_subparsers(title="commands", required=True, metavar="COMMAND")
    codes = "exit codes: 0 all done; 1 nothing done, for the one reason shown; 2 bad arguments; "
    codes += "3 done, but some cells failed or are missing; 130 after Ctrl-C."

    def part(name: str, function: str, summary: str, description: str) -> argparse.ArgumentParser:
        parser = parts.add_parser(name, allow_abbrev=False, help=summary, description=description, epilog=codes)
        parser.add_argument("plan", type=Path, metavar="PLAN.toml", help="the study; docs/study.md says what is in it")
        parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the study (default: runs/NAME)")
        parser.set_defaults(run=_study(function))
        return parser

    run = part(
        "run",
        "run",
        "train and test every cell",
        "Trains and tests every cell (data set × loss × seed × fold) that is not done. Cells that were stopped go on; "
        "a cell that fails is named at the end and tried again the next time.",
    )
    run.add_argument(
        "--jobs", type=whole(1), metavar="N", help="processes, each with training.threads (default: the GPUs, or 1)"
    )
    run.add_argument("--collect", type=Path, metavar="FILE.json", help="then write all results into one file")
    run.add_argument("--retrain-changed", action="store_true", help="train cells whose settings changed again")
    run.add_argument("--skip-bad", action="store_true", help="leave out subjects that cannot be read")
    run.add_argument("--dry-run", action="store_true", help="list the cells and where they stand")
    run.add_argument("--quiet", action="store_true", help="no progress bar")

    collect = part(
        "collect",
        "collect_results",
        "write all results into one small file",
        "From this file, tables and figures can be made without the cells.",
    )
    collect.add_argument("file", type=Path, metavar="FILE.json", help="to write")

    table = part("table", "table", "print the tables", "Prints the tables as Markdown, and writes them as CSV.")
    figures = part("figures", "figures", "draw the figures", "Draws the figures as PNG.")
    for parser, kind in ((table, "tables"), (figures, "figures")):
        parser.add_argument("--results", type=Path, metavar="FILE.json", help="of `collect`, in place of the cells")
        parser.add_argument("--to", type=Path, metavar="DIR", help=f"folder to write to (default: {kind} in --out)")
    table.add_argument("--only", type=whole(1), metavar="N", help="this table alone")
