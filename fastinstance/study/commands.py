"""`fastinstance study run | collect | table | figures`.

Exit codes: 0 all done; 1 nothing was done, for the one reason that is shown; 2 bad arguments; 3 done, but some cells
failed or are missing; 130 after Ctrl-C. What is complete is kept in every case.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastinstance.commands import SKIPPED
from fastinstance.files import progress, replacing
from fastinstance.study.batches import fingerprint, refuse_shared_images
from fastinstance.study.cells import cell_folder, derived_of, load_subjects, run_cell, state, write_json
from fastinstance.study.checkpoints import alone
from fastinstance.study.config import RunConfig
from fastinstance.study.data import reading
from fastinstance.study.plan import Cell, DataSet, Plan, read_plan
from fastinstance.study.results import Results, collect, read_results, results_of
from fastinstance.study.splits import make_folds, split
from fastinstance.study.subjects import StudyError, Subject
from fastinstance.study.training import check_run
from fastinstance.study.workers import Stopped, Task, work

__all__ = ["collect_results", "figures", "run", "table"]


def _out(arguments: argparse.Namespace, plan: Plan) -> Path:
    return arguments.out or Path("runs") / plan.name


def _devices() -> list[str]:
    """The GPUs that may be used, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name for name in visible.split(",") if name] if visible is not None else []
    return names or [str(index) for index in range(torch.cuda.device_count())]


def _refuse_changed(plan: Plan, out: Path, cells: Sequence[Cell], digests: Mapping[str, str], *, retrain: bool) -> None:
    """Cells that were made with another plan: an error, or, if they are to be trained again, removed."""
    changed: dict[Cell, list[str]] = {}
    for cell in cells:
        stage, differences = state(plan, out, cell, digests)
        if stage == "changed":
            changed[cell] = differences
    if not changed:
        return
    if retrain:
        for cell in changed:
            shutil.rmtree(cell_folder(out, cell))
        return
    first, differences = next(iter(changed.items()))
    more = f" and {len(differences) - 1} more" if len(differences) > 1 else ""
    raise StudyError(
        f"{len(changed)} of the cells in {out} were made with other settings ({first.name}: {differences[0]}{more}); "
        "take another --out, or --retrain-changed to train them again"
    )


def _check_runs(plan: Plan, out: Path, cells: Sequence[Cell]) -> None:
    """Device, packages and network of the cells that are not done, before anything is loaded."""
    seen: list[RunConfig] = []
    for cell in cells:
        config = RunConfig.from_table({**plan.run_table(cell), "loss": {}})
        config = replace(config, training=replace(config.training, seed=0))
        if config not in seen:
            seen.append(config)
            try:
                check_run(config, out)
            except StudyError as error:
                raise StudyError(f"[data.{cell.data}] {error}") from error


def _load_all(plan: Plan, out: Path, names: Sequence[str], arguments: argparse.Namespace) -> dict[str, list[Subject]]:
    """Loads and checks the data, and every split, before anything is trained."""
    loaded: dict[str, list[Subject]] = {}
    for name in names:
        data = plan.data[name]
        with reading(f"loading {name}", quiet=arguments.quiet) as show:
            loaded[name] = load_subjects(data, out / "cache", skip_bad=arguments.skip_bad, progress=show)
        if data.trained_on:
            folds = make_folds(name, loaded[name], data.folds)
            for fold in plan.folds_of(name):
                split(name, loaded[name], folds, fold, validation=plan.validation)
    for data in plan.data.values():
        if data.test_on in loaded and data.name in loaded:
            _check_second(data, plan.data[str(data.test_on)], loaded[data.name], loaded[str(data.test_on)])
    return loaded


def _check_second(data: DataSet, other: DataSet, subjects: Sequence[Subject], others: Sequence[Subject]) -> None:
    """Whether networks of a data set can be tested on another, of which they have seen nobody."""
    ours, theirs = (len(group[0].image) for group in (subjects, others))
    if ours != theirs:
        raise StudyError(
            f"[data.{data.name}]: expected test_on with images of {ours} channels, as it has, but "
            f"{other.name} has {theirs}"
        )
    try:
        refuse_shared_images(subjects, others)
    except StudyError as error:
        raise StudyError(f"[data.{data.name}] test_on {other.name}: {error}") from error
    # Names from two places may be equal by chance; from one they are one person.
    if _place(data) == _place(other):
        shared = {subject.person for subject in subjects} & {subject.person for subject in others}
        if shared:
            raise StudyError(
                f"[data.{data.name}] test_on {other.name}: expected other persons than it is trained on, got "
                f"{min(shared)} in both" + ("; give it another seed" if data.settings["source"] == "brain" else "")
            )


def _place(data: DataSet) -> tuple[Any, ...]:
    """Where the subjects come from."""
    folder = data.settings.get("folder")
    return data.settings["source"], None if folder is None else Path(folder).expanduser().resolve()


def run(arguments: argparse.Namespace) -> int:
    """Trains and tests every cell of a plan that is not done yet."""
    plan = read_plan(arguments.plan, to_run=True)
    out = _out(arguments, plan)
    cells = list(plan.cells())
    with alone(out, "`fastinstance study run`"):
        _refuse_changed(plan, out, cells, {}, retrain=arguments.retrain_changed)
        stages = {cell: state(plan, out, cell)[0] for cell in cells}
        if arguments.dry_run:
            for cell, stage in stages.items():
                print(f"{stage:<8} {cell.name}")
            counts = Counter(stages.values())
            print(f"{len(cells)} cells in {out}: {', '.join(f'{n} {stage}' for stage, n in counts.items())}")
            return 0
        _check_runs(plan, out, [cell for cell, stage in stages.items() if stage != "done"])
        used = [*plan.trained, *(str(plan.data[name].test_on) for name in plan.trained if plan.data[name].test_on)]
        loaded = _load_all(plan, out, list(dict.fromkeys(used)), arguments)
        digests = {name: fingerprint(subjects) for name, subjects in loaded.items()}
        del loaded
        _refuse_changed(plan, out, cells, digests, retrain=arguments.retrain_changed)
        with replacing(out / "plan.toml") as part:
            part.write_bytes(arguments.plan.read_bytes())
        devices = _devices()
        jobs = arguments.jobs or max(1, len(devices))
        todo = [cell for cell in cells if state(plan, out, cell, digests)[0] != "done"]
        before = len(cells) - len(todo)
        try:
            failed = _run_cells(plan, out, todo, jobs, devices, arguments)
            done = {cell for cell in cells if state(plan, out, cell)[0] == "done"}
            failed |= _derive(plan, out, done, arguments)
        except Stopped:
            done = {cell for cell in cells if state(plan, out, cell)[0] == "done"}
            print(f"Stopped: {len(done)} of {len(cells)} cells done, the others go on with the same command.")
            return 0
    print(f"{len(done)} of {len(cells)} cells done in {out} ({before} of them before), {len(failed)} failed.")
    for name, reason in failed.items():
        print(f"failed {name}: {reason}", file=sys.stderr)
    if arguments.collect is not None:
        write_json(arguments.collect, collect(plan, out))
        print(f"Wrote {arguments.collect}.")
    return SKIPPED if failed else 0


def _run_cells(
    plan: Plan, out: Path, todo: Sequence[Cell], jobs: int, devices: Sequence[str], arguments: argparse.Namespace
) -> dict[str, str]:
    """Runs the cells; returns those that failed, and why."""
    failed: dict[str, str] = {}
    tasks = [
        Task(cell.name, run_cell, (plan, cell, out, arguments.skip_bad), cell_folder(out, cell) / "log.txt")
        for cell in todo
    ]
    # Closed at once on Ctrl-C too: its processes have saved their state before this returns.
    with (
        progress(len(tasks), "cells", "cell", quiet=arguments.quiet) as bar,
        closing(work(tasks, jobs, devices)) as outcomes,
    ):
        for outcome in outcomes:
            if outcome.error is not None:
                failed[outcome.name] = outcome.error
                write_json(
                    out / "cells" / outcome.name / "failed.json", {"error": outcome.error, "trace": outcome.trace}
                )
                bar.write(f"failed {outcome.name}: {outcome.error}", file=sys.stderr)
            bar.update()
    return failed


def _derive(plan: Plan, out: Path, done: set[Cell], arguments: argparse.Namespace) -> dict[str, str]:
    """Makes the ensembles and votes that are not there yet, or whose cells have changed."""
    failed: dict[str, str] = {}
    todo = [one for one in derived_of(plan, out, done) if one.read() is None]
    if todo:
        with progress(len(todo), "ensembles", "result", quiet=arguments.quiet) as bar:
            for one in todo:
                try:
                    one.make(plan, out, arguments.skip_bad)
                except StudyError as error:
                    failed[one.name] = str(error)
                bar.update()
    return failed


def _results(arguments: argparse.Namespace) -> tuple[Results, Path]:
    """Of the plan's cells, or of --results; and the folder of the study."""
    plan = read_plan(arguments.plan)
    out = _out(arguments, plan)
    if arguments.results is not None:
        results = read_results(arguments.results)
        if results.plan != plan.table:
            raise StudyError(f"{arguments.results} was made with another plan than {arguments.plan}")
    else:
        results = results_of(collect(plan, out), str(out))
    if not results.cells:
        raise StudyError(f"no cell is done in {out}; run `fastinstance study run {arguments.plan}` first")
    return results, out


def _not_all(results: Results) -> int:
    for name, reason in results.failed.items():
        print(f"failed {name}: {reason}", file=sys.stderr)
    if results.missing:
        print(f"{len(results.missing)} cells are missing, such as {results.missing[0]}", file=sys.stderr)
    return SKIPPED if results.failed or results.missing else 0


def collect_results(arguments: argparse.Namespace) -> int:
    """Writes all results into one file."""
    plan = read_plan(arguments.plan)
    document = collect(plan, _out(arguments, plan))
    results = results_of(document, str(arguments.file))
    if not results.cells:
        raise StudyError(f"no cell is done in {_out(arguments, plan)}; run `fastinstance study run` first")
    write_json(arguments.file, document)
    print(f"Wrote {arguments.file}: {len(results.cells)} cells, {arguments.file.stat().st_size / 1e6:.2f} MB.")
    return _not_all(results)


def table(arguments: argparse.Namespace) -> int:
    """Prints the tables as Markdown and writes them as CSV."""
    from fastinstance.study.tables import make_tables, write_csv

    results, out = _results(arguments)
    folder = arguments.to or out / "tables"
    tables = make_tables(results)
    if arguments.only is not None:
        tables = [one for one in tables if one.number == arguments.only]
        if not tables:
            raise StudyError(f"there is no table {arguments.only} in this study")
    for one in tables:
        write_csv(folder / f"{one.file}.csv", one)
    text = "\n\n".join(one.markdown() for one in tables) + "\n"
    with replacing(folder / "tables.md") as part:
        part.write_text(text, encoding="utf-8")
    print(text, end="")
    return _not_all(results)


def figures(arguments: argparse.Namespace) -> int:
    """Draws the figures as PNG."""
    from fastinstance.study.figures import FIGURES

    results, out = _results(arguments)
    folder = arguments.to or out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    draw: Callable[[Results, Path], None]
    for name, draw in FIGURES.items():
        draw(results, folder / f"{name}.png")
        print(f"Wrote {folder / name}.png")
    return _not_all(results)
