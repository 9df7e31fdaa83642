"""The plan of a study, one TOML file: which losses are compared on which data, how often, and how it is judged.

    name = "small-lesions"
    seeds = [0, 1, 2]
    folds = 5                         # persons are dealt into so many; every one is the test fold of a cell
    run_folds = [0, 1]                # only these (default: all)
    validation = 0.2                  # share of the other persons on whom decisions are made
    baseline = "GDF"                  # whose precision is matched (default: the first loss)

    [data.brain]                      # what `fastinstance train` takes as [data]
    source = "brain"
    subjects = 30
    test_on = "other"                 # also tested there, by majority vote of the folds
    training = { epochs = 50 }        # for what [training] says; so too network, augmentation, evaluation, folds
    [data.other]                      # named by a test_on: nothing is trained on it
    source = "nifti"
    folder = "scans"

    [losses.GDF]                      # what `fastinstance train` takes as [loss]
    name = "GeneralizedDiceFocalLoss"
    [losses.Detection]
    name = "DetectionLoss"

    [network]                         # as of `fastinstance train`
    [training]
    [augmentation]

    [evaluation]
    min_size = 2                      # pixels; smaller instances do not count (default: 0)
    small_ml = 0.05                   # mL; the primary outcome is the sensitivity below it
    tune = "pq"                       # what the threshold is tuned for on the validation persons
    collapse = 0.05                   # a Dice coefficient below it is counted as a collapse

    [[ensembles]]                     # of two losses, by the volume of instances (section 4.2)
    small = "Detection"
    large = "GDF"
    threshold_ml = 0.05

A cell is a data set × loss × seed × fold: one training, and its test.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastinstance.study.config import Evaluation, RunConfig, read_table, read_toml, refuse_unknown
from fastinstance.study.subjects import StudyError

__all__ = ["Cell", "DataSet", "Ensemble", "Plan", "read_plan"]

_KEYS = (
    "name", "seeds", "folds", "run_folds", "validation", "baseline",
    "data", "losses", "network", "training", "augmentation", "evaluation", "ensembles",
)  # fmt: skip
_RUN_TABLES = ("network", "training", "augmentation")
_OF_THE_STUDY = (*_RUN_TABLES, "evaluation", "folds", "test_on")  # keys of [data.<name>] that do not describe the data
_NAME = re.compile(r"[^\s/\\:*?\"<>|.][^/\\:*?\"<>|\n]*")  # what may be the name of a folder


@dataclass(frozen=True)
class DataSet:
    """A data set and what the plan says of it alone."""

    name: str
    settings: Mapping[str, Any]
    run: Mapping[str, Mapping[str, Any]]
    """The tables network, training and augmentation, its own keys in them."""
    evaluation: Evaluation
    folds: int | tuple[tuple[str, ...], ...]
    test_on: str | None
    trained_on: bool


@dataclass(frozen=True)
class Ensemble:
    """Instances below `threshold_ml` from one loss, the others from another."""

    small: str
    large: str
    threshold_ml: float

    @property
    def name(self) -> str:
        return f"{self.small} < {self.threshold_ml:g} mL <= {self.large}"


@dataclass(frozen=True, order=True)
class Cell:
    """One training and its test."""

    data: str
    loss: str
    seed: int
    fold: int

    @property
    def name(self) -> str:
        return f"{self.data}/{self.loss}/seed{self.seed}-fold{self.fold}"


@dataclass(frozen=True)
class Plan:
    """A plan whose every key has been checked; the data have not been looked at."""

    name: str
    seeds: tuple[int, ...]
    run_folds: tuple[int, ...] | None
    validation: float
    baseline: str
    data: Mapping[str, DataSet]
    losses: Mapping[str, Mapping[str, Any]]
    ensembles: tuple[Ensemble, ...]
    table: Mapping[str, Any]
    """The file as it was read."""

    def folds_of(self, data: str) -> tuple[int, ...]:
        """The test folds that are run."""
        folds = self.data[data].folds
        count = folds if isinstance(folds, int) else len(folds)
        return tuple(range(count)) if self.run_folds is None else self.run_folds

    @property
    def trained(self) -> list[str]:
        """The data sets that something is trained on."""
        return [name for name, data in self.data.items() if data.trained_on]

    def cells(self) -> Iterator[Cell]:
        """All cells: a data set after the other, then seed and fold, so that losses are compared early."""
        for data in self.trained:
            for seed in self.seeds:
                for fold in self.folds_of(data):
                    for loss in self.losses:
                        yield Cell(data, loss, seed, fold)

    def run_table(self, cell: Cell) -> dict[str, Any]:
        """The run file of a cell, as `fastinstance train` takes it."""
        data = self.data[cell.data]
        table: dict[str, Any] = {"data": dict(data.settings), "loss": dict(self.losses[cell.loss])}
        table |= {name: dict(part) for name, part in data.run.items() if part}
        table["training"] = {"min_size": data.evaluation.min_size, **table.get("training", {}), "seed": cell.seed}
        return table

    def training_key(self, cell: Cell) -> dict[str, Any]:
        """Everything that decides what a cell's network becomes; another value means another training."""
        data = self.data[cell.data]
        folds = data.folds if isinstance(data.folds, int) else [list(fold) for fold in data.folds]
        run = RunConfig.from_table(self.run_table(cell)).to_table()  # with the defaults
        run["data"] = dict(data.settings)
        return {**run, "fold": cell.fold, "folds": folds, "validation": self.validation}

    def evaluation_key(self, cell: Cell) -> dict[str, Any]:
        """Everything else that decides a cell's result."""
        data = self.data[cell.data]
        other = None if data.test_on is None else {data.test_on: dict(self.data[data.test_on].settings)}
        return {**asdict(data.evaluation), "test_on": other}


def read_plan(path: Path, *, to_run: bool = False) -> Plan:
    """Reads and checks a plan.

    Args:
        path: of the TOML file.
        to_run: check that it could be run here too: data settings, losses, networks; nothing is loaded. Without it
            tables can be made where the data are not.

    Raises:
        StudyError: one line that says what is wrong.
    """
    table = read_toml(path)
    try:
        plan = _plan_of(table)
        if to_run:
            _check_runs(plan)
    except StudyError as error:
        raise StudyError(f"{path}: {error}") from error
    return plan


def _whole(value: Any, least: int, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise StudyError(f"expected {what} to be a whole number from {least} on, got {value!r}")
    return value


def _number(value: Any, low: float, high: float, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < high:
        bounds = f"between {low:g} and {high:g}" if high < math.inf else f"above {low:g}"
        raise StudyError(f"expected {what} to be a number {bounds}, got {value!r}")
    return float(value)


def _numbers(value: Any, what: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise StudyError(f"expected {what} to be a list of whole numbers, got {value!r}")
    numbers = tuple(_whole(number, 0, f"each of {what}") for number in value)
    if len(set(numbers)) < len(numbers):
        raise StudyError(f"expected {what} without repetition, got {value!r}")
    return numbers


def _tables(table: Mapping[str, Any], key: str) -> dict[str, dict[str, Any]]:
    """The tables [key.<name>], at least one."""
    tables = table.get(key)
    if not isinstance(tables, dict) or not tables:
        raise StudyError(f"expected at least one table [{key}.<name>], got {'none' if tables is None else tables!r}")
    for name, inner in tables.items():
        if not isinstance(inner, dict):
            raise StudyError(f"expected {key}.{name} to be a table, got {inner!r}")
        if not _NAME.fullmatch(name):
            raise StudyError(f"expected names of {key} that can name a folder, got {name!r}")
    lower = [name.lower() for name in tables]
    if len(set(lower)) < len(lower):
        raise StudyError(f"expected names of {key} that differ in more than case, got {', '.join(tables)}")
    return tables


def _table(table: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    inner = table.get(key, {})
    if not isinstance(inner, dict):
        raise StudyError(f"expected {where} to be a table, got {inner!r}")
    return inner


def _one_of(name: Any, names: Sequence[str], what: str) -> str:
    if name not in names:
        near = difflib.get_close_matches(str(name), names, 1)
        hint = f"; did you mean {near[0]}?" if near else f"; expected one of {', '.join(names)}"
        raise StudyError(f"{what} names {name!r}, which is not in the plan{hint}")
    return name


def _folds(value: Any, what: str) -> int | tuple[tuple[str, ...], ...]:
    if isinstance(value, list):
        if not all(isinstance(fold, list) and all(isinstance(person, str) for person in fold) for fold in value):
            raise StudyError(f"expected {what} to be a number or lists of the persons of each fold, got {value!r}")
        return tuple(tuple(fold) for fold in value)
    return _whole(value, 2, what)


def _plan_of(table: Mapping[str, Any]) -> Plan:
    refuse_unknown(table, _KEYS, "in the plan")
    name = table.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise StudyError(f"expected name to be a text that can name a folder, got {name!r}")
    losses = _tables(table, "losses")
    baseline = _one_of(table.get("baseline", next(iter(losses))), list(losses), "baseline")
    folds = _folds(table.get("folds", 5), "folds")
    tables = _tables(table, "data")
    targets = {inner["test_on"] for inner in tables.values() if isinstance(inner.get("test_on"), str)}
    data = {key: _data_set(key, inner, table, folds, targets, list(tables)) for key, inner in tables.items()}
    if not any(one.trained_on for one in data.values()):
        raise StudyError("every data set is named by a test_on: there is none to train on")
    run_folds = None if table.get("run_folds") is None else _numbers(table["run_folds"], "run_folds")
    for one in data.values():
        count = one.folds if isinstance(one.folds, int) else len(one.folds)
        if one.trained_on and run_folds is not None and max(run_folds) >= count:
            raise StudyError(
                f"run_folds names fold {max(run_folds)}, but {one.name} has {count} folds, 0 to {count - 1}"
            )
    return Plan(
        name=name,
        seeds=_numbers(table.get("seeds", [0]), "seeds"),
        run_folds=run_folds,
        validation=_number(table.get("validation", 0.2), 0, 1, "validation"),
        baseline=baseline,
        data=data,
        losses=losses,
        ensembles=_ensembles(table.get("ensembles", []), list(losses)),
        table=table,
    )


def _data_set(
    name: str,
    inner: Mapping[str, Any],
    table: Mapping[str, Any],
    folds: int | tuple[tuple[str, ...], ...],
    targets: set[str],
    names: Sequence[str],
) -> DataSet:
    where = f"[data.{name}]"
    run: dict[str, dict[str, Any]] = {}
    for part in _RUN_TABLES:
        common, own = _table(table, part, f"[{part}]"), _table(inner, part, f"{part} in {where}")
        run[part] = {**({} if part == "network" and "name" in own else common), **own}
    if "seed" in run["training"]:
        raise StudyError("training has a seed, but a study takes its seeds from the list `seeds`")
    judged = {**_table(table, "evaluation", "[evaluation]"), **_table(inner, "evaluation", f"evaluation in {where}")}
    test_on = inner.get("test_on")
    if test_on is not None:
        _one_of(test_on, [other for other in names if other != name], f"test_on in {where}")
        if name in targets:
            raise StudyError(f"{where} has a test_on, but is itself the test_on of another data set")
    if "validation" in inner:
        raise StudyError(f"{where} has a validation, but a study holds out `validation`, a share of the persons")
    return DataSet(
        name=name,
        settings={key: value for key, value in inner.items() if key not in _OF_THE_STUDY},
        run=run,
        evaluation=read_table(Evaluation, judged, f"evaluation of {where}"),
        folds=_folds(inner["folds"], f"folds in {where}") if "folds" in inner else folds,
        test_on=test_on,
        trained_on=name not in targets,
    )


def _ensembles(value: Any, losses: Sequence[str]) -> tuple[Ensemble, ...]:
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise StudyError(f"expected ensembles to be a list of tables, got {value!r}")
    ensembles: dict[str, Ensemble] = {}
    for table in value:
        refuse_unknown(table, ("small", "large", "threshold_ml"), "in ensembles")
        for key in ("small", "large"):
            if key not in table:
                raise StudyError(f"an ensemble lacks {key}, the loss that its {key} instances come from")
        one = Ensemble(
            _one_of(table["small"], losses, "ensembles.small"),
            _one_of(table["large"], losses, "ensembles.large"),
            _number(table.get("threshold_ml", 0.05), 0, math.inf, "ensembles.threshold_ml"),
        )
        if one.small == one.large:
            raise StudyError(f"an ensemble takes small and large instances from {one.small}; expected two losses")
        if one.name in ensembles:
            raise StudyError(f"the ensemble {one.name} is there twice")
        ensembles[one.name] = one
    return tuple(ensembles.values())


def _check_runs(plan: Plan) -> None:
    """Every data set and every run that the plan asks for, as `fastinstance train` would check them."""
    from fastinstance.study import data as sources

    for data in plan.data.values():
        try:
            sources.check(data.settings)
        except StudyError as error:
            raise StudyError(f"[data.{data.name}]: {error}") from error
    checked: set[str] = set()
    for cell in plan.cells():
        table = plan.run_table(cell)
        text = json.dumps({**table, "training": {**table["training"], "seed": 0}}, sort_keys=True, default=str)
        if text in checked:
            continue
        checked.add(text)
        try:
            RunConfig.from_table(table)
        except StudyError as error:
            raise StudyError(f"{cell.data} with {cell.loss}: {error}") from error
