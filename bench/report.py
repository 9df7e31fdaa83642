"""Tables and the figures of the documentation, made from results files alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from . import results
from .registry import SUITES

__all__ = ["BEGIN", "END", "PAGES", "figures", "filled", "goals", "headline", "markdown", "table"]

Row = dict[str, Any]
_SHORT = ("threads", "load", "torch", "driver", "commit", "date")
_HEADLINES = ("gpu", "cpu")
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.3g}"


def _lines(head: Iterable[object], rows: Iterable[Iterable[object]]) -> list[str]:
    head = list(head)
    return [f"| {' | '.join(map(str, cells))} |" for cells in (head, ["---"] * len(head), *rows)]


def _base(row: Row, name: str) -> dict[str, float] | None:
    """What the ratio of a run is to: the base, as a CUDA graph if the run is one."""
    base = row.get("base")
    if not base or name in (base, f"{base}, graph"):
        return None
    times = row["milliseconds"]
    return times.get(f"{base}, graph") if name.endswith(", graph") else times.get(base)


def _cell(row: Row, name: str) -> str:
    """Median, and its relation to the base: a ratio or, of a whole step, the share beyond it."""
    time = row["milliseconds"].get(name)
    if time is None:
        error = row["errors"].get(name, "")
        return "not installed" if error.startswith("left out") else "—" if error else ""
    part = "planes" in time and time["planes"] < row["planes"]
    bound = "> " if part and not row["each"] else ""
    text = bound + _number(time["median"])
    base = _base(row, name)
    if base is not None and row["share"]:
        text += f" ({1 - base['median'] / time['median']:.0%})"
    elif base is not None:
        text += f" ({bound}×{_number(time['median'] / base['median'])})"
    return text + (f", {time['planes']} of {row['planes']} planes" if part else "")


def _names(rows: list[Row]) -> list[str]:
    """All runs in their order: ours, peers, and a graph after its run."""
    found = list(dict.fromkeys(name for row in rows for name in row["milliseconds"]))
    eager = [name for name in found if not name.endswith(", graph")]
    return [name for run in eager for name in (run, f"{run}, graph") if name in found]


def _bytes(row: Row, name: str) -> str:
    return _number(row["peak_bytes"][name] / row["pixels"]) if name in row["peak_bytes"] else ""


def table(suite: dict[str, Any]) -> str:
    """Markdown: medians in milliseconds with their ratio to the base, and what else was counted."""
    rows = suite["rows"]
    names = _names(rows)
    if len(names) > 12:
        return _transposed(rows)
    counted = [key for key in dict.fromkeys(key for row in rows for key in row) if key in ("N", "M", "components")]
    noted = list(dict.fromkeys(key for row in rows for key in row["notes"] if key != "series"))
    extra = {
        "of copy": lambda row: _of_copy(row, suite.get("copy_bytes_per_second", 0)),
        "launches": lambda row: sum(kernel["launches"] for kernel in row["kernels"].get("ours", ())) or "",
        "waits": lambda row: sum(row["synchronisations"].get("ours", {}).values()) or "",
        "B/px": lambda row: _bytes(row, "ours"),
    }
    extra = {key: value for key, value in extra.items() if any(value(row) != "" for row in rows)}
    head = ["case", *counted, *(f"{name}, ms" for name in names), *noted, *extra]
    cells = [
        [row["case"], *(row.get(key, "") for key in counted), *(_cell(row, name) for name in names)]
        + [row["notes"].get(key, "") for key in noted]
        + [value(row) for value in extra.values()]
        for row in rows
    ]
    return "\n".join([*_lines(head, cells), *_remarks(rows)])


def _of_copy(row: Row, bandwidth: float) -> str:
    """How long copying the bytes that have to move would take, beside what our run takes."""
    times = row["milliseconds"]
    best = times.get("ours, graph", times.get("ours"))
    if "floor_bytes" not in row or best is None:
        return ""
    return f"{1e3 * row['floor_bytes'] / bandwidth / best['median']:.1%}"


def _transposed(rows: list[Row]) -> str:
    """A row per loss, a column per case."""
    done = [row for row in rows if row["milliseconds"]]
    head = ["loss", *(f"{row['case']}: ms ({'share), images/s' if row['share'] else 'ratio)'}, MB" for row in done)]

    def cell(row: Row, name: str) -> str:
        time, memory = row["milliseconds"].get(name), row["peak_bytes"].get(name.removesuffix(", graph"))
        text = _cell(row, name)
        if time and row["share"]:
            text += f", {_number(1e3 * row['planes'] / time['median'])}"
        return text + (f", {memory / 1e6:,.0f}" if memory and time else "")

    cells = [[name, *(cell(row, name) for row in done)] for name in _names(done)]
    return "\n".join([*_lines(head, cells), *_remarks(rows)])


def _remarks(rows: list[Row]) -> list[str]:
    """What failed, was left out or had no time, with the runs and cases it befell."""
    said: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for row in rows:
        for name, error in row["errors"].items():
            runs, cases = said.setdefault(error.splitlines()[0], ({}, {}))
            runs[name], cases[row["case"]] = None, None
    lines = [f"- {', '.join(runs)}: {error} ({'; '.join(cases)})" for error, (runs, cases) in said.items()]
    return ["", *lines] if lines else []


def _kernels(suite: dict[str, Any]) -> list[str]:
    """The kernels of our step in the first case that has them."""
    row = next((row for row in suite["rows"] if row["kernels"].get("ours")), None)
    if row is None:
        return []
    kernels = row["kernels"]["ours"]
    cells = [[k["kernel"][:70].replace("|", "/"), f"{k['launches']:.1f}", f"{k['µs']:.1f}"] for k in kernels[:25]]
    return ["", *_lines([f"{row['case']}: kernel", "launches", "µs"], cells)]


def goals(suite: dict[str, Any]) -> list[tuple[str, str, float, float, bool]]:
    """Case, text, measured, asked, reached: of all goals that the file has the figures for."""
    rows = {row["case"]: row for row in suite["rows"]}
    found = []
    for row in suite["rows"]:
        for goal in row["goals"]:
            key = "peak_bytes" if goal["memory"] else "milliseconds"
            other = rows.get(goal["of"] or row["case"], {key: {}})
            run, over = goal["run"], goal["over"] or goal["run"]
            over = [over] if isinstance(over, str) else over
            if run not in row[key] or not {*over} <= other[key].keys():
                continue
            if goal["memory"]:
                value = row[key][run] / row["pixels"]
            else:
                if not row["each"] and row[key][run].get("planes", row["planes"]) < row["planes"]:
                    continue  # a part of the batch
                value = row[key][run]["median"] / sum(other[key][name]["median"] for name in over)
            reached = value >= goal["bound"] if goal["least"] else value <= goal["bound"]
            found.append((row["case"], goal["text"], value, goal["bound"], reached))
    return found


def _goal_lines(suite: dict[str, Any]) -> list[str]:
    found = goals(suite)
    cells = [
        [case, text, _number(value), _number(bound), "yes" if ok else "no"] for case, text, value, bound, ok in found
    ]
    head = ["case", "goal", "measured", "asked", "reached"]
    return ["", "What the project set itself:", "", *_lines(head, cells)] if cells else []


def _machine(suite: dict[str, Any], *, short: bool = False) -> str:
    """One line: device, processor, versions, commit."""
    known = dict(suite["machine"])
    device, processor = known.pop("device"), known.pop("processor")
    name = processor if device == "cpu" else f"{device} ({processor})"
    known = {key: value for key, value in known.items() if not short or key in _SHORT}
    text = f"{name}, " + ", ".join(f"{key} {value}" for key, value in known.items())
    text += "; processor time of all threads" * (suite.get("clock") == "cpu")
    if "copy_bytes_per_second" in suite:
        text += f"; copies {suite['copy_bytes_per_second'] / 1e9:.0f} GB/s"
    return text


def markdown(result: dict[str, Any]) -> str:
    """Everything in a results file."""
    lines: list[str] = []
    for name, suite in result["suites"].items():
        tiny = " Tiny inputs: the figures mean nothing." if suite.get("small") else ""
        lines += [f"## {name}", "", f"{_machine(suite)}.{tiny}", "", table(suite), *_kernels(suite)]
        lines += [*_goal_lines(suite), ""]
    return "\n".join(lines).rstrip() + "\n"


def _section(path: Path, name: str, suite: dict[str, Any], folder: str) -> list[str]:
    """The table of a suite with what it is, its machine, and the results file relative to the folder of the page."""
    base = next((row["base"] for row in suite["rows"] if row.get("base")), "")
    share = any(row["share"] for row in suite["rows"])
    what = SUITES[name] + (f"; {'share of the step beyond' if share else 'ratio to'} “{base}”" if base else "")
    where = os.path.relpath(path, results.ROOT / folder)
    on = f"On {_machine(suite, short=True)} ([{path.name}]({where}))."
    return ["", f"**`python -m bench {name}`**: {what}.", on, "", table(suite)]


def _measured(paths: Iterable[Path]) -> list[tuple[Path, str, dict[str, Any]]]:
    """All suites of these files; `aot` measures no time and has its place in bench/NOTES.md."""
    return [
        (path, name, suite) for path in paths for name, suite in results.load(path)["suites"].items() if name in SUITES
    ]


def figures(paths: Iterable[Path]) -> str:
    """All tables of some files: the block of docs/figures.md."""
    lines = []
    for path, name, suite in _measured(paths):
        lines += [*_section(path, name, suite, "docs"), *_goal_lines(suite)]
    return "\n".join(lines).strip()


def headline(paths: Iterable[Path]) -> str:
    """The block of the README: the time of all terms on each device, and every goal that was missed."""
    measured = _measured(paths)
    lines = [line for one in measured if one[1] in _HEADLINES for line in _section(*one, "")]
    missed = [(name, *goal[:-1]) for _, name, suite in measured for goal in goals(suite) if not goal[-1]]
    if missed:
        cells = [[name, case, text, _number(value), _number(bound)] for name, case, text, value, bound in missed]
        lines += ["", "Goals of our own that are missed:", ""]
        lines += _lines(["suite", "case", "goal", "measured", "asked"], cells)
    return "\n".join(lines).strip()


PAGES: dict[str, Callable[[Iterable[Path]], str]] = {"README.md": headline, "docs/figures.md": figures}
"""Pages with a block of figures, and what is in it."""


def filled(text: str, block: str) -> str:
    """A page with its block of figures replaced.

    Raises:
        ValueError: the text has no such block.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected one block between {BEGIN} and {END}")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n{block}\n{END}{after}"
