"""`fastinstance evaluate | rank | ensemble | overlay`: metrics, ranks, ensembles and pictures of files.

Exit codes: 0 all done; 1 nothing was done, for the one reason that is shown; 2 bad arguments; 3 done, but some pairs
were reported and skipped; 130 after Ctrl-C. What is complete is kept in every case.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import __version__
from .ensemble import band_ensemble, majority_vote
from .files import (
    FileError,
    Volume,
    fingerprint,
    integers,
    match,
    progress,
    read,
    replacing,
    require_same_grid,
    require_writable,
    spacing_of,
    write,
)
from .metrics import METRICS, instance_metrics
from .overlay import draw, paint
from .ranks import RANKED, rank_methods
from .summary import summarise

__all__ = ["SKIPPED", "ensemble", "evaluate", "overlay", "rank"]

SKIPPED = 3
SAVE_EVERY = 5.0  # seconds
COUNTS = {name for name in METRICS if name.startswith("n_")}
COLUMNS = ("name", "label", *METRICS, "inputs")
MOST_CLASSES = 255
VOL_DIFF = "vol_diff_ml"  # the column that is ranked as vol_diff


@dataclass(frozen=True)
class Options:
    """Of `instance_metrics`, and how files become masks."""

    matching: str = "overlap"
    threshold: float = 0.5
    connectivity: int | None = None
    min_size: int = 0
    zero_division: float = 0.0
    spacing: tuple[float, ...] | None = None
    labels: tuple[int, ...] = ()
    instances: bool = False


Result = list[dict[str, Any]]  # the rows of a pair


def _say(text: str, bar: Any = None) -> None:
    """A line on stderr, above the progress bar."""
    if bar is None:
        print(text, file=sys.stderr)
    else:
        bar.write(text, file=sys.stderr)


def _alone() -> None:
    """One process of several: uses one thread, and leaves Ctrl-C to the first."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Attempt:
    """A job that returns its result, or why there is none; unlike a function in a function it can be sent."""

    def __init__(self, job: Callable[..., Any], *arguments: Any) -> None:
        self.job, self.arguments = job, arguments

    def __call__(self) -> tuple[Any, str | None]:
        try:
            return self.job(*self.arguments), None
        except FileError as error:
            return None, str(error)
        except Exception as error:  # whatever it is, the other pairs go on
            return None, f"{type(error).__name__}: {error}"


def _done(attempts: Mapping[str, _Attempt], jobs: int) -> Iterator[tuple[str, Any, str | None]]:
    """Name, result and error of each, as they finish."""
    if jobs == 1 or len(attempts) < 2:
        for name, attempt in attempts.items():
            yield name, *attempt()
        return
    pool = ProcessPoolExecutor(min(jobs, len(attempts)), mp_context=get_context("spawn"), initializer=_alone)
    try:
        waiting = {pool.submit(attempt): name for name, attempt in attempts.items()}
        for future in as_completed(waiting):
            try:
                yield waiting[future], *future.result()
            except Exception as error:  # the process was killed, for want of memory perhaps
                yield waiting[future], None, f"its process ended ({type(error).__name__}); try fewer --jobs"
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _mask(array: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))[None, None]


def evaluate_pair(name: str, pred: Path, target: Path, options: Options) -> Result:
    """The rows of one pair, one for each label.

    Raises:
        FileError: a file cannot be used, or the two do not fit.
    """
    volumes = read(pred), read(target)
    require_same_grid(volumes, spacing_given=options.spacing is not None)
    settings = asdict(options)
    labels, instances = settings.pop("labels"), settings.pop("instances")
    settings["spacing"] = spacing_of(volumes, options.spacing)
    values = [integers(volume) for volume in volumes]
    rows = []
    for label in labels or (None,):
        masks = [_mask(value != 0 if label is None else value == label) for value in values]
        ids: dict[str, Tensor] = {}
        if instances:
            ids = {side: _mask(value.astype(np.int64)) for side, value in zip(("pred", "target"), values, strict=True)}
            ids = {f"{side}_labels": value for side, value in ids.items()}
        metrics = instance_metrics(*masks, **ids, **settings)
        rows.append({"name": name, "label": label, **{key: value.item() for key, value in metrics.items()}})
    return rows


def _read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets put a mark in front
            rows: list[dict[Any, str]] = list(csv.DictReader(file, restval=""))
    except (UnicodeDecodeError, csv.Error) as error:
        raise FileError(f"{path}: not a CSV file ({error})") from error
    for number, row in enumerate(rows, start=1):
        if None in row:
            raise FileError(
                f"{path}: expected {len(row) - 1} cells in a row, as in the first, got more in row {number}"
            )
    return rows


def _write_table(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    with replacing(path) as part, part.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _known_rows(path: Path) -> dict[str, Result]:
    """The rows of a table that an earlier run left, by name."""
    if not path.exists():
        return {}
    rows = _read_table(path)
    if rows and set(rows[0]) != set(COLUMNS):
        raise FileError(f"{path}: not a table of `fastinstance evaluate`; remove it, or choose another --out")
    known: dict[str, Result] = {}
    try:
        for row in rows:
            numbers = {key: (int if key in COUNTS else float)(row[key]) for key in METRICS}
            label = int(row["label"]) if row["label"] else None
            known.setdefault(row["name"], []).append({**row, "label": label, **numbers})
    except (TypeError, ValueError) as error:
        raise FileError(f"{path}: damaged ({error}); remove it, or choose another --out") from error
    return known


def evaluate(arguments: argparse.Namespace) -> int:
    """Metrics of all pairs, a row each, and their mean over pairs."""
    options = Options(
        arguments.matching,
        arguments.threshold,
        arguments.connectivity,
        arguments.min_size,
        arguments.zero_division,
        None if arguments.spacing is None else tuple(arguments.spacing),
        tuple(dict.fromkeys(arguments.label or ())),
        arguments.instances,
    )
    pairs, failed = match([arguments.pred, arguments.target])
    known: dict[str, Result] = {}
    if arguments.out is not None:
        require_writable(arguments.out)
        known = _known_rows(arguments.out)
    prints = {name: fingerprint(paths, [__version__, asdict(options)]) for name, paths in pairs.items()}
    rows = {name: known[name] for name in pairs if name in known and known[name][0]["inputs"] == prints[name]}
    reused = len(rows)

    def save() -> None:
        if arguments.out is not None:
            _write_table(arguments.out, COLUMNS, [row for name in sorted(rows) for row in rows[name]])

    todo = {name: _Attempt(evaluate_pair, name, *paths, options) for name, paths in pairs.items() if name not in rows}
    for name, reason in failed.items():
        _say(f"skipped {name}: {reason}")
    saved = time.monotonic()
    changed = not todo
    try:
        with progress(len(todo), "evaluate", "pair", quiet=arguments.quiet) as bar:
            for name, result, error in _done(todo, arguments.jobs):
                changed = True
                if error is None:
                    rows[name] = [{**row, "inputs": prints[name]} for row in result]
                else:
                    failed[name] = error
                    _say(f"skipped {name}: {error}", bar)
                bar.update()
                if time.monotonic() - saved > SAVE_EVERY:
                    save()
                    saved = time.monotonic()
    finally:
        if changed:  # a table made with other settings outlives a slip that is stopped at once
            save()
    every = [row for name in sorted(rows) for row in rows[name]]
    summary = {"all" if label is None else str(label): _summary(every, label) for label in options.labels or (None,)}
    if arguments.json:
        plain = [{key: value for key, value in row.items() if key != "inputs"} for row in every]
        _print_json(
            {
                "computed": len(rows) - reused,
                "reused": reused,
                "failed": failed,
                "table": arguments.out,
                "summary": summary,
                "rows": plain,
            }
        )
    else:
        for label, metrics in summary.items():
            _print_summary(label, metrics, len(rows))
        if arguments.out is not None:
            print(f"{len(rows)} pairs in {arguments.out} ({reused} of them from before), {len(failed)} skipped.")
    return SKIPPED if failed else 0


def _summary(rows: Result, label: int | None) -> dict[str, dict[str, float]]:
    """Mean, deviation and interval of each metric over the pairs."""
    values = [[row[name] for name in METRICS] for row in rows if row["label"] == label]
    parts = summarise(torch.tensor(values, dtype=torch.float64).view(-1, len(METRICS)))
    return {
        name: {part: getattr(parts, part)[column].item() for part in parts._fields}
        for column, name in enumerate(METRICS)
    }


def _print_summary(label: str, metrics: Mapping[str, Mapping[str, float]], pairs: int) -> None:
    title = f"{pairs} pairs" if label == "all" else f"{pairs} pairs, label {label}"
    print(f"{title:<19}{'mean':>10}{'std':>10}   95 % of the mean")
    for name, value in metrics.items():
        numbers = (f"{value[part]:.4f}" for part in ("mean", "std", "low", "high"))
        mean, std, low, high = numbers
        print(f"  {name:<17}{mean:>10}{std:>10}   {low} to {high}")


def _print_json(document: Mapping[str, Any]) -> None:
    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [plain(part) for part in value]
        if isinstance(value, float) and not math.isfinite(value):
            return None  # JSON has no NaN
        return str(value) if isinstance(value, Path) else value

    print(json.dumps(plain(document), indent=1))


def _methods(tables: Sequence[str]) -> dict[str, dict[str, float]]:
    """Values by method, from tables of `evaluate` (one method each) or a table with a row for each method."""
    methods: dict[str, dict[str, float]] = {}
    subjects: dict[str, set[tuple[str, str]]] = {}
    for table in tables:
        given, _, rest = table.partition("=")
        path = Path(rest) if rest and not Path(table).exists() else Path(table)
        if not path.is_file():
            raise FileError(f"{path}: no such file")
        rows = _read_table(path)
        if not rows:
            raise FileError(f"{path}: no rows")
        if "method" in rows[0]:
            found = {row["method"]: [row] for row in rows}
            if len(found) < len(rows) or "" in found:
                raise FileError(f"{path}: expected one row for each method, and its name in each")
        else:
            found = {given if path != Path(table) else path.stem: rows}
        for method, mine in found.items():
            if method in methods:
                raise FileError(f"expected a name for each method, got {method} twice: write NAME={path}")
            methods[method] = _means(path, mine)
            if "name" in mine[0]:
                subjects[method] = {(row["name"], row.get("label") or "") for row in mine}
    _require_same_subjects(subjects)
    return methods


def _means(path: Path, rows: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """Mean of each ranked metric over the rows where it is there."""
    columns = {name: VOL_DIFF if name == "vol_diff" and name not in rows[0] else name for name in RANKED}
    means = {}
    for name, column in columns.items():
        if column not in rows[0]:
            continue
        try:
            values = [float(row[column]) for row in rows if row[column]]
        except ValueError as error:
            raise FileError(f"{path}: {column}: {error}") from error
        values = [value for value in values if not math.isnan(value)]
        if any(map(math.isinf, values)):
            raise FileError(f"{path}: {column}: expected finite numbers, got an infinite one")
        if values:
            means[name] = math.fsum(values) / len(values)
    if not means:
        raise FileError(f"{path}: expected columns among {', '.join((*RANKED, VOL_DIFF))}, got {', '.join(rows[0])}")
    return means


def _require_same_subjects(subjects: Mapping[str, set[tuple[str, str]]]) -> None:
    everyone = set().union(*subjects.values())
    for method, mine in subjects.items():
        if lacking := sorted(everyone - mine):
            raise FileError(
                f"expected the same subjects in every table, {method} lacks {len(lacking)} of {len(everyone)}, "
                f"such as {lacking[0][0]}; evaluate them, or leave them out of the others"
            )


def _require_other(out: Path, inputs: Sequence[Path]) -> None:
    if out.exists() and any(path.is_file() and out.samefile(path) for path in inputs):
        raise FileError(f"{out}: expected an output that is not one of the inputs")


def rank(arguments: argparse.Namespace) -> int:
    """Ranks of methods by their tables."""
    methods = _methods(arguments.tables)
    if arguments.out is not None:
        require_writable(arguments.out)
        for table in arguments.tables:
            _require_other(arguments.out, [Path(table), Path(table.partition("=")[2])])
    ranked = rank_methods(methods)
    means = ("RA", "RG", "RI")
    rows: list[dict[str, Any]] = []
    for method, result in ranked.items():
        ranks: Any = result["ranks"]
        values = {name: methods[method].get(name, "") for name in RANKED}
        places = {f"rank_{name}": ranks.get(name, "") for name in RANKED}
        rows.append({"method": method, **values, **places, **{name: result[name] for name in means}})
    if arguments.out is not None:
        _write_table(arguments.out, tuple(rows[0]), rows)
    if arguments.json:
        _print_json({method: {"values": methods[method], **result} for method, result in ranked.items()})
        return 0
    width = max(len("method"), *map(len, methods))
    print(f"{'method':<{width}}" + "".join(f"{name:>16}" for name in RANKED) + "".join(f"{n:>6}" for n in means))
    for row in rows:
        cells = (f"{row[n]:.4f} ({row[f'rank_{n}']:g})" if row[n] != "" else "" for n in RANKED)
        print(
            f"{row['method']:<{width}}"
            + "".join(f"{cell:>16}" for cell in cells)
            + "".join(f"{row[name]:>6.1f}" for name in means)
        )
    return 0


def combine(paths: Sequence[Path], out: Path, edges_ml: Sequence[float] | None, options: Options) -> None:
    """The ensemble of some files, by volume with edges and by majority without; values, header and dtype of the first.

    Every value but 0 is a class of its own; where two classes overlap, the smaller value stays.

    Raises:
        FileError: a file cannot be used, or they do not fit.
    """
    volumes = [read(path) for path in paths]
    require_same_grid(volumes, spacing_given=options.spacing is not None)
    values = [integers(volume) for volume in volumes]
    held = [{int(value) for value in np.unique(array)} - {0} for array in values]
    classes = sorted(set().union(*held), reverse=True)
    if len(classes) == 2 and classes[0] == MOST_CLASSES and max(map(len, held)) == 1:
        raise FileError(
            f"{paths[0]}: expected one value of the foreground, got {classes[1]} in some files and {MOST_CLASSES} in "
            "others; save all masks with the same"
        )
    if len(classes) > MOST_CLASSES:
        raise FileError(f"{paths[0]}: expected classes, got {len(classes)} values: binarise instance ids first")
    first = volumes[0].data
    outside = [value for value in classes if np.array(value).astype(first.dtype) != value]
    if outside:
        raise FileError(f"{paths[0]}: its dtype {first.dtype} cannot hold {outside[0]} of another file")
    spacing = spacing_of(volumes, options.spacing)
    result = np.zeros(first.shape, first.dtype)
    for value in classes:
        masks = [_mask(array == value) for array in values]
        if edges_ml is None:
            chosen = majority_vote(masks)
        else:
            chosen = band_ensemble(masks, edges_ml, spacing=spacing, connectivity=options.connectivity)
        result[chosen[0, 0].numpy()] = value
    write(out, result, volumes[0])


def ensemble(arguments: argparse.Namespace) -> int:
    """Ensembles of files or folders of masks."""
    *places, out = arguments.paths
    if len(places) < 2:
        raise FileError("expected at least two masks (or folders) and the output")
    edges = None if arguments.majority else tuple(arguments.threshold_ml)
    if edges is not None and len(edges) != len(places) - 1:
        raise FileError(
            f"expected {len(places) - 1} numbers as --threshold-ml for {len(places)} models, got {len(edges)}"
        )
    if edges is not None and sorted(set(edges)) != list(edges):
        raise FileError(f"expected ascending --threshold-ml, got {' '.join(f'{edge:g}' for edge in edges)}")
    spacing = None if arguments.spacing is None else tuple(arguments.spacing)
    options = Options(connectivity=arguments.connectivity, spacing=spacing)
    groups, failed = match(places)
    single = places[0].is_file()
    record = out / "ensemble.json"
    made: dict[str, str] = {} if single else _record(record)
    outputs = {name: out if single else out / paths[0].relative_to(places[0]) for name, paths in groups.items()}
    for name, output in outputs.items():
        _require_other(output, groups[name])
    if not single and any(out.resolve().is_relative_to(place.resolve()) for place in places):
        raise FileError(f"{out}: expected an output that is not inside of an input")
    prints = {name: fingerprint(paths, [__version__, asdict(options), edges]) for name, paths in groups.items()}
    current = {name for name in groups if made.get(name) == prints[name] and outputs[name].exists()}
    for name, reason in failed.items():
        _say(f"skipped {name}: {reason}")
    made = {name: prints[name] for name in current}
    todo = {
        name: _Attempt(combine, paths, outputs[name], edges, options)
        for name, paths in groups.items()
        if name not in current
    }

    def save() -> None:
        if not single and made:
            with replacing(record) as part:
                part.write_text(json.dumps(made, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    try:
        with progress(len(todo), "ensemble", "pair", quiet=arguments.quiet) as bar:
            for name, _, error in _done(todo, arguments.jobs):
                if error is None:
                    made[name] = prints[name]
                else:
                    failed[name] = error
                    old = f"; {outputs[name]} is of an earlier run" if outputs[name].exists() else ""
                    _say(f"skipped {name}: {error}{old}", bar)
                bar.update()
    finally:
        save()
    counts = {"computed": len(made) - len(current), "reused": len(current)}
    if arguments.json:
        _print_json({**counts, "failed": failed, "out": out})
    else:
        print(f"{len(made)} masks in {out} ({counts['reused']} of them from before), {len(failed)} skipped.")
    return SKIPPED if failed else 0


def _record(path: Path) -> dict[str, str]:
    """What an earlier run made, by name; nothing if the record is damaged, so that all is made anew."""
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return made if isinstance(made, dict) else {}


def overlay(arguments: argparse.Namespace) -> int:
    """A picture of found, missed and false instances."""
    if arguments.out.suffix.lower() != ".png":
        raise FileError(f"{arguments.out}: expected a name that ends in .png")
    _require_other(arguments.out, [arguments.image, arguments.pred, arguments.target])
    image = read(arguments.image, grey=True)
    volumes: list[Volume] = [read(arguments.pred), read(arguments.target)]
    require_same_grid([image, *volumes], spacing_given=arguments.spacing is not None)
    require_writable(arguments.out)
    pred, target = (integers(volume) != 0 for volume in volumes)
    spacing = spacing_of([image, *volumes], arguments.spacing)
    try:
        picture = paint(image.data, pred, target, connectivity=arguments.connectivity, min_size=arguments.min_size)
        draw(arguments.out, picture, spacing=spacing, affine=image.affine)
    except ValueError as error:  # a connectivity for other images, or a header with impossible sizes
        raise FileError(f"{arguments.image}: {error}") from error
    counts = {"found": picture.found, "missed": picture.missed, "false": picture.false}
    if arguments.json:
        _print_json({**counts, "picture": arguments.out})
    else:
        print(f"found {picture.found}, missed {picture.missed}, false {picture.false}: {arguments.out}")
    return 0
