"""The tables, after the paper's: numbers with their intervals, ranks, and comparisons."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastinstance.files import replacing
from fastinstance.ranks import RANKED, rank_methods
from fastinstance.study.outcomes import OUTCOMES, collapses, compare
from fastinstance.study.results import Results, mean_by_subject
from fastinstance.study.statistics import Interval, bootstrap_mean

__all__ = ["Table", "make_tables", "write_csv"]

COLUMNS = {
    "pq": "PQ", "dsc": "DSC", "vol_diff": "Vol.Diff (mL)",
    "fdr": "FDR", "fnr": "FNR", "ppv": "PPV", "sen": "SEN", "f1": "F1",
}  # fmt: skip
_MEANS = ("RA", "RG", "RI")
_STORED = {"vol_diff": "vol_diff_ml"}  # where the name of a ranked metric is another


@dataclass(frozen=True)
class Table:
    """One table, for reading and as records."""

    number: int
    part: str
    """A, B, ... where a table has several."""
    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    records: list[dict[str, Any]] = field(repr=False)
    note: str = ""

    @property
    def file(self) -> str:
        return f"table{self.number}{self.part.lower()}"

    def markdown(self) -> str:
        lines = [f"**Table {self.number}{self.part}.** {self.title}", ""]
        lines += [_line(self.header), _line(["---"] * len(self.header)), *map(_line, self.rows)]
        return "\n".join([*lines, *(["", self.note] if self.note else [])])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def write_csv(path: Path, table: Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(column for record in table.records for column in record))
    with replacing(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(table.records)


def _number(value: float, digits: int = 3) -> str:
    return "" if value != value else f"{value:.{digits}f}"


def _interval(interval: Interval, digits: int = 3, *, signed: bool = False) -> str:
    if interval.mean != interval.mean:
        return ""
    sign = "+" if signed else ""
    mean, low, high = (f"{value:{sign}.{digits}f}" for value in interval)
    return f"{mean} [{low}, {high}]"


def _ranked(methods: Mapping[str, Sequence[Any]], at: str) -> dict[str, Any]:
    """Header, rows and records of methods by metric, each with interval and rank.

    Args:
        methods: the documents of each method.
        at: "fixed" or "tuned".
    """
    values: dict[str, dict[str, Interval]] = {}
    for method, documents in methods.items():
        values[method] = {}
        for name in RANKED:
            stored = _STORED.get(name, name)
            found = mean_by_subject((one, one["at"][at]["metrics"][stored]) for one in documents)
            values[method][name] = bootstrap_mean(list(found.values()), [person for person, _ in found])
    ranked: dict[str, Any] = rank_methods({m: {n: i.mean for n, i in of.items()} for m, of in values.items()})
    rows: list[tuple[str, ...]] = []
    records: list[dict[str, Any]] = []
    for method, intervals in values.items():
        ranks = ranked[method]["ranks"]
        cells = [f"{_interval(intervals[n])} ({ranks[n]:g})" if n in ranks else "" for n in RANKED]
        rows.append((method, *cells, *(_number(ranked[method][mean], 1) for mean in _MEANS)))
        record: dict[str, Any] = {"method": method}
        for name in RANKED:
            record |= {f"{name}{suffix}": v for suffix, v in zip(("", "_low", "_high"), intervals[name], strict=True)}
            record[f"{name}_rank"] = ranks.get(name, "")
        records.append({**record, **{mean: ranked[method][mean] for mean in _MEANS}})
    return {"header": ("", *COLUMNS.values(), *_MEANS), "rows": rows, "records": records}


def _letters(count: int) -> list[str]:
    return [""] if count == 1 else [chr(ord("A") + number) for number in range(count)]


def _cross_validated(results: Results, number: int, at: str) -> list[Table]:
    """Tables 1 and 2: every loss on every data set."""
    which = "threshold 0.5" if at == "fixed" else "the threshold tuned on the validation persons"
    tables: list[Table] = []
    for part, data in zip(_letters(len(results.data)), results.data, strict=True):
        methods = {loss: results.documents(data, loss) for loss in results.losses if loss in results.begun[data]}
        if not methods:
            continue
        made = _ranked(methods, at)
        made["header"] = (*made["header"], "collapsed")
        counts = [collapses(results, data, loss) for loss in methods]
        made["rows"] = [(*row, f"{bad} / {cells}") for row, (bad, cells) in zip(made["rows"], counts, strict=True)]
        for record, (bad, cells) in zip(made["records"], counts, strict=True):
            record |= {"collapsed": bad, "cells": cells}
        failed = [name for name in results.failed if name.startswith(f"{data}/")]
        note = f"Failed, and in no mean: {', '.join(failed)}." if failed else ""
        note = " ".join(filter(None, (results.note(data), note)))
        title = f"{data}, cross-validation, {which}: mean over subjects [95 % interval] (rank)"
        tables.append(Table(number, part, title, note=note, **made))
    return tables


def _ensembles_and_votes(results: Results) -> list[Table]:
    """Table 4: volume ensembles beside the losses they are made of, and the second data set."""
    parts: list[tuple[str, dict[str, Any], str]] = []
    for data in results.data:
        ensembles = [name for name in results.ensembles_of_losses if results.documents(data, name)]
        if ensembles:
            members = [
                loss
                for loss in results.losses
                if loss == results.baseline or any(loss in members_of(results, name) for name in ensembles)
            ]
            methods = {name: found for name in (*members, *ensembles) if (found := results.documents(data, name))}
            title = f"{data}, volume ensembles in cross-validation, threshold 0.5"
            parts.append((title, _ranked(methods, "fixed"), results.note(data)))
    for data in results.data:
        votes = [vote for vote in results.votes if vote["vote"][0] == data]
        names = list(dict.fromkeys(name for vote in votes for name in vote["methods"]))
        whole = [vote for vote in votes if len(vote["methods"]) == len(names)]
        methods = {name: [{**vote, "at": {"fixed": vote["methods"][name]}} for vote in whole] for name in names}
        if methods:
            folds, other = len(votes[0]["folds"]), votes[0]["vote"][1]
            title = f"trained on {data}, tested on {other} by majority vote of {folds} folds, threshold 0.5"
            note = "" if whole == votes else f"Over {len(whole)} of {len(votes)} seeds, which every loss has."
            parts.append((title, _ranked(methods, "fixed"), note))
    tables: list[Table] = []
    for letter, (title, made, note) in zip(_letters(len(parts)), parts, strict=True):
        tables.append(Table(4, letter, f"{title}: mean over subjects [95 % interval] (rank)", note=note, **made))
    return tables


def members_of(results: Results, ensemble: str) -> tuple[str, str]:
    """The two losses of an ensemble."""
    for table, name in zip(results.plan["ensembles"], results.ensembles_of_losses, strict=True):
        if name == ensemble:
            return table["small"], table["large"]
    raise KeyError(ensemble)


def _comparisons(results: Results) -> list[Table]:
    """Table 5: every loss against the baseline, by outcome."""
    tables: list[Table] = []
    baseline = results.baseline
    for part, data in zip(_letters(len(results.data)), results.data, strict=True):
        by_loss: dict[str, list[str]] = {}
        records: list[dict[str, Any]] = []
        for name in OUTCOMES:
            for one in compare(results, data, name):
                low, high = min(one.by_seed, default=float("nan")), max(one.by_seed, default=float("nan"))
                text = f"{_interval(one.difference, signed=True)}, p {_p(one.p)}"
                if len(one.by_seed) > 1:
                    text += f", seeds {low:+.3f} to {high:+.3f}"
                if one.unreached:
                    text += f", {one.unreached} not reached"
                by_loss.setdefault(one.loss, []).append(text)
                records.append(
                    {
                        "loss": one.loss,
                        "outcome": name,
                        **dict(zip(("value", "value_low", "value_high"), one.value, strict=True)),
                        **dict(zip(("difference", "low", "high"), one.difference, strict=True)),
                        "p_holm": one.p,
                        "lowest_seed": low,
                        "highest_seed": high,
                        "unreached": one.unreached,
                    }
                )
        if not by_loss:
            continue
        small = f"below {results.small_ml[data]:g} mL"
        header = (
            "", f"SEN {small} at equal precision", f"SEN {small}", "F1, tuned", "PQ, tuned", "DSC, tuned",
            "absolute Vol.Diff (mL), tuned",
        )  # fmt: skip
        note = (
            "The first column is the primary outcome: the threshold of each network moves to where its precision is "
            f"that of {baseline} at 0.5. p: Wilcoxon's signed-rank test on persons, by Holm over the losses. "
            "Seeds: the mean difference with the least and the most favourable seed."
        )
        note = " ".join(filter(None, (note, results.note(data))))
        title = f"{data}, difference to {baseline}, paired by subject: mean [95 % interval]"
        tables.append(Table(5, part, title, header, [(loss, *cells) for loss, cells in by_loss.items()], records, note))
    return tables


def _p(p: float) -> str:
    return "-" if p != p else "< 0.001" if p < 0.001 else f"{p:.3f}"


def make_tables(results: Results) -> list[Table]:
    """Tables 1, 2, 4 and 5 (3, the times, is `python -m bench table3`)."""
    return [
        *_cross_validated(results, 1, "fixed"),
        *_cross_validated(results, 2, "tuned"),
        *_ensembles_and_votes(results),
        *_comparisons(results),
    ]
