"""The results of a study: collected from its cells, or read from the one file that was made of them."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastinstance import __version__
from fastinstance.study.cells import cell_folder, derived_of, read_json, state
from fastinstance.study.plan import Cell, Plan
from fastinstance.study.subjects import StudyError

__all__ = ["Results", "collect", "read_results"]

FORMAT = 1
Values = NDArray[np.float64]
Place = tuple[int, int]
"""Seed and fold."""


@dataclass(frozen=True)
class Results:
    """What a study found.

    `cells`, `ensembles` and `votes` are the documents that `cells` writes; `failed` and `missing` name cells.
    """

    name: str
    plan: Mapping[str, Any]
    losses: tuple[str, ...]
    baseline: str
    ensembles_of_losses: tuple[str, ...]
    data: tuple[str, ...]
    min_size: Mapping[str, int]
    small_ml: Mapping[str, float]
    collapse: Mapping[str, float]
    cells: Sequence[Mapping[str, Any]]
    ensembles: Sequence[Mapping[str, Any]]
    votes: Sequence[Mapping[str, Any]]
    failed: Mapping[str, str]
    missing: Sequence[str]

    @cached_property
    def begun(self) -> Mapping[str, Mapping[str, set[Place]]]:
        """Of each data set, the losses that have results, and for which seeds and folds."""
        places: dict[str, dict[str, set[Place]]] = {data: {} for data in self.data}
        for cell in self.cells:
            data, loss, seed, fold = cell["cell"]
            places[data].setdefault(loss, set()).add((seed, fold))
        return places

    @cached_property
    def shared(self) -> Mapping[str, set[Place]]:
        """Of each data set, the seeds and folds that every loss has that has results.

        Nothing else counts in tables and figures, so that losses are compared on the same subjects while a study is
        not complete.
        """
        return {data: set.intersection(*places.values()) if places else set() for data, places in self.begun.items()}

    def note(self, data: str) -> str:
        """Says what was left out, if anything."""
        every = set().union(*self.begun[data].values())
        shared = len(self.shared[data])
        return "" if shared == len(every) else f"Over {shared} of {len(every)} seeds and folds, which every loss has."

    def of(self, data: str, loss: str) -> Iterator[Mapping[str, Any]]:
        """The cells of a loss whose seed and fold are `shared`, in the order of seeds and folds."""
        for cell in self.cells:
            if cell["cell"][:2] == [data, loss] and tuple(cell["cell"][2:]) in self.shared[data]:
                yield cell

    def documents(self, data: str, method: str) -> list[Mapping[str, Any]]:
        """The cells of a loss, or of an ensemble, whose seed and fold are `shared`."""
        if method in self.losses:
            return list(self.of(data, method))
        found = (one for one in self.ensembles if one["ensemble"][:2] == [data, method])
        return [one for one in found if tuple(one["ensemble"][2:]) in self.shared[data]]

    def by_subject(self, data: str, method: str, metric: str, at: str = "fixed") -> dict[tuple[str, str], float]:
        """Mean over the seeds of a metric for each (person, subject); `at` is "fixed" or "tuned"."""
        return mean_by_subject((one, one["at"][at]["metrics"][metric]) for one in self.documents(data, method))


def numbers(values: Sequence[float | None]) -> Values:
    """With NaN for null."""
    return np.array([np.nan if value is None else value for value in values], np.float64)


def mean_by_subject(rows: Any) -> dict[tuple[str, str], float]:
    """Mean of each subject's values over documents; `rows` are pairs of a document and its subjects' values."""
    found: dict[tuple[str, str], list[float]] = {}
    for document, values in rows:
        for person, subject, value in zip(document["persons"], document["subjects"], numbers(values), strict=True):
            found.setdefault((person, subject), []).append(float(value))
    means: dict[tuple[str, str], float] = {}
    for key, values in sorted(found.items()):
        there = [value for value in values if value == value]
        means[key] = sum(there) / len(there) if there else float("nan")
    return means


def collect(plan: Plan, out: Path) -> dict[str, Any]:
    """All results in one document, without the folders they come from.

    Raises:
        StudyError: cells were made with another plan.
    """
    cells: list[Any] = []
    failed: dict[str, str] = {}
    missing: list[str] = []
    pictured: dict[str, list[Any]] = {}
    for cell in plan.cells():
        folder = cell_folder(out, cell)
        stage, differences = state(plan, out, cell)
        if stage == "changed":
            raise StudyError(f"{folder} was made with another plan ({differences[0]}); run the study again")
        document = read_json(folder / "result.json") if stage == "done" else None
        if document is None:
            reason = read_json(folder / "failed.json")
            if reason is None:
                missing.append(cell.name)
            else:
                failed[cell.name] = reason["error"]
            continue
        # One seed and fold is drawn; image and truth are those of every loss.
        of_figure = pictured.setdefault(cell.data, [cell.seed, cell.fold])
        if of_figure != [cell.seed, cell.fold]:
            document = {key: value for key, value in document.items() if key != "picture"}
        elif any("picture" in other and other["cell"][0] == cell.data for other in cells):
            document["picture"] = {"prediction": document["picture"]["prediction"]}
        cells.append(document)
    done = {Cell(*document["cell"]) for document in cells}
    derived = [document for one in derived_of(plan, out, done) if (document := one.read()) is not None]
    return {
        "format": FORMAT,
        "version": __version__,
        "made_with": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "machine": f"{platform.system()} {platform.machine()}",
            "devices": sorted({cell["device"] for cell in cells}),
        },
        "plan": plan.table,
        "losses": list(plan.losses),
        "baseline": plan.baseline,
        "ensembles_of_losses": [ensemble.name for ensemble in plan.ensembles],
        "data": plan.trained,
        "min_size": {name: data.evaluation.min_size for name, data in plan.data.items()},
        "small_ml": {name: data.evaluation.small_ml for name, data in plan.data.items()},
        "collapse": {name: data.evaluation.collapse for name, data in plan.data.items()},
        "cells": cells,
        "ensembles": [one for one in derived if "ensemble" in one],
        "votes": [one for one in derived if "vote" in one],
        "failed": failed,
        "missing": missing,
    }


def results_of(document: Mapping[str, Any], where: str) -> Results:
    """The results of a document of `collect`.

    Raises:
        StudyError: it is something else, or of another version.
    """
    if not isinstance(document, Mapping) or document.get("format") != FORMAT:
        raise StudyError(f"{where}: expected a file of `fastinstance study collect` of this version")
    return Results(
        name=document["plan"]["name"],
        plan=document["plan"],
        losses=tuple(document["losses"]),
        baseline=document["baseline"],
        ensembles_of_losses=tuple(document["ensembles_of_losses"]),
        data=tuple(document["data"]),
        min_size=document["min_size"],
        small_ml=document["small_ml"],
        collapse=document["collapse"],
        cells=document["cells"],
        ensembles=document["ensembles"],
        votes=document["votes"],
        failed=document["failed"],
        missing=document["missing"],
    )


def read_results(path: Path) -> Results:
    """The results of a file.

    Raises:
        StudyError: no such file, or no such content.
    """
    if not path.is_file():
        raise StudyError(f"{path}: no such file")
    return results_of(read_json(path), str(path))
