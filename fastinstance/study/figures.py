"""The figures, after the paper's Figs. 8 to 12, and two more: the curves and the differences."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from fastinstance.files import replacing
from fastinstance.metrics import VOLUME_EDGES, VOLUME_SUMS
from fastinstance.overlay import FALSE, FOUND, MISSED, colour, paint
from fastinstance.study.outcomes import OUTCOMES, compare, mean_curves, ratio
from fastinstance.study.results import Results
from fastinstance.study.statistics import bootstrap_mean

__all__ = ["FIGURES"]

GROUPS = (
    f"< {VOLUME_EDGES[0]:g}",
    *(f"{low:g}–{high:g}" for low, high in pairwise(VOLUME_EDGES)),
    f"≥ {VOLUME_EDGES[-1]:g}",
)
_COLOURS = (
    "#1f77b4",
    "#ff7f0e",
    "#2ca02c",
    "#d62728",
    "#9467bd",
    "#8c564b",
    "#e377c2",
    "#17becf",
    "#bcbd22",
    "#7f7f7f",
)
_MARKERS = "osD^v<>PXh"
Values = NDArray[np.float64]


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, NDArray[Any]]:
    """A figure of panels of so many inches, [rows, columns]."""
    figure = Figure((columns * width, rows * height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as part:
        figure.savefig(part, format="png")


def _legend(figure: Figure, axes: Axes) -> None:
    """Of one panel, for all of them, beside them."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper", fontsize=8)


def _style(results: Results, loss: str) -> dict[str, Any]:
    """The same colour and marker for a loss everywhere; the baseline is black."""
    if loss == results.baseline:
        return {"color": "black", "marker": "o", "linewidth": 2.0, "zorder": 3}
    number = [name for name in results.losses if name != results.baseline].index(loss)
    return {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKERS[number % len(_MARKERS)], "linewidth": 1.2}


def _sums(results: Results, data: str, loss: str) -> dict[str, Values]:
    """`VOLUME_SUMS` by size group at threshold 0.5, means over the seeds."""
    cells = list(results.of(data, loss))
    seeds = len({cell["cell"][2] for cell in cells})
    table = np.sum([np.array(cell["at"]["fixed"]["by_size"], np.float64) for cell in cells], axis=0) / max(seeds, 1)
    return dict(zip(VOLUME_SUMS, table.T, strict=True))


def _losses(results: Results, data: str) -> list[str]:
    return [loss for loss in results.losses if any(True for _ in results.of(data, loss))]


def _size_axis(axes: Axes, used: Sequence[int]) -> None:
    axes.set_xticks(range(len(used)), [GROUPS[group] for group in used], rotation=60, ha="right", fontsize=8)
    axes.set_xlabel("volume of the instance (mL)")
    axes.grid(alpha=0.3)


def instances_by_size(results: Results, path: Path) -> None:
    """Fig. 8: how many instances of each size there are to find."""
    figure, panels = _figure(1, len(results.data), 6.5, 4)
    for axes, data in zip(panels[0], results.data, strict=True):
        losses = _losses(results, data)
        counts = _sums(results, data, losses[0])["n_target"] if losses else np.zeros(len(GROUPS))
        drawn = axes.bar(range(len(GROUPS)), counts, color="#4477aa")
        axes.bar_label(drawn, [f"{count:.0f}" if count else "" for count in counts], fontsize=7)
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylabel("true instances in the slices of the test subjects")
        axes.set_title(data)
        _size_axis(axes, range(len(GROUPS)))
    _save(figure, path)


def _lines(results: Results, axes: Axes, data: str, of: Callable[[dict[str, Values]], Values], used: list[int]) -> None:
    for loss in _losses(results, data):
        values = of(_sums(results, data, loss))[used]
        axes.plot(range(len(used)), values, label=loss, markersize=4, **_style(results, loss))
    _size_axis(axes, used)


def found_by_size(results: Results, path: Path) -> None:
    """Fig. 9: sensitivity and overlap of the true instances of each size, by loss."""
    figure, panels = _figure(len(results.data), 2, 6.5, 4)
    for row, data in zip(panels, results.data, strict=True):
        losses = _losses(results, data)
        there = _sums(results, data, losses[0])["n_target"] > 0 if losses else np.zeros(len(GROUPS), bool)
        used = [int(group) for group in np.flatnonzero(there)]
        _lines(results, row[0], data, lambda sums: ratio(sums["found"], sums["n_target"]), used)
        _lines(results, row[1], data, lambda sums: ratio(sums["dice"], sums["n_target"]), used)
        row[0].set_ylabel("sensitivity")
        row[1].set_ylabel("mean Dice with what overlaps (missed: 0)")
        for axes in row:
            axes.set_title(data)
            axes.set_ylim(-0.02, 1.02)
    _legend(figure, panels[0, 0])
    _save(figure, path)


def false_by_size(results: Results, path: Path) -> None:
    """Fig. 12: false instances of each predicted size, by loss."""
    figure, panels = _figure(len(results.data), 2, 6.5, 4)
    for row, data in zip(panels, results.data, strict=True):
        used = [
            group
            for group in range(len(GROUPS))
            if any(_sums(results, data, loss)["n_pred"][group] for loss in _losses(results, data))
        ]
        first = next((list(results.of(data, loss)) for loss in _losses(results, data)), [])
        subjects = len({name for cell in first for name in cell["subjects"]}) or 1

        def false(sums: dict[str, Values], subjects: int = subjects) -> Values:
            return (sums["n_pred"] - sums["hit"]) / subjects

        _lines(results, row[0], data, false, used)
        _lines(results, row[1], data, lambda sums: ratio(sums["n_pred"] - sums["hit"], sums["n_pred"]), used)
        row[0].set_ylabel("false instances a subject")
        row[0].set_yscale("symlog", linthresh=1)
        row[0].set_ylim(bottom=0)
        row[1].set_ylabel("share of the predicted instances that is false")
        row[1].set_ylim(-0.02, 1.02)
        for axes in row:
            axes.set_title(data)
            axes.set_xlabel("volume of the predicted instance (mL)")
    _legend(figure, panels[0, 0])
    _save(figure, path)


def _unpacked(text: str, dtype: Any) -> NDArray[Any]:
    return np.frombuffer(zlib.decompress(base64.b85decode(text)), dtype)


def overlays(results: Results, path: Path) -> None:
    """Fig. 10: what each loss finds in one slice, the one with most instances of the first test fold."""
    drawn: dict[str, dict[str, Any]] = {}
    for data in results.data:
        cells = [cell for cell in results.cells if cell["cell"][0] == data and "picture" in cell]
        cells.sort(key=lambda cell: results.losses.index(cell["cell"][1]))
        if cells:
            drawn[data] = {"first": cells[0]["picture"], "cells": cells}
    columns = 1 + max((len(one["cells"]) for one in drawn.values()), default=0)
    across = min(columns, 5)
    rows = -(-columns // across)
    figure, panels = _figure(rows * max(len(drawn), 1), across, 3.2, 3.4)
    for axes in panels.flat:
        axes.set_axis_off()
    for number, (data, one) in enumerate(drawn.items()):
        first = one["first"]
        shape = tuple(first["shape"])
        image = _unpacked(first["image"], np.uint8).reshape(shape)
        truth = _unpacked(first["truth"], np.uint16).reshape(shape)
        places = panels[number * rows : (number + 1) * rows].flat
        axes = next(places)
        axes.imshow(image, cmap="gray", vmin=0, vmax=255)
        axes.set_title(f"{data}: {first['subject']}, slice {first['slice'] + 1}", fontsize=9)
        for axes, cell in zip(places, one["cells"], strict=False):
            bits = _unpacked(cell["picture"]["prediction"], np.uint8)
            mask = np.unpackbits(bits, count=truth.size).astype(bool).reshape(shape)
            painted = paint(image, mask, truth > 0, target_labels=truth, min_size=results.min_size[data])
            axes.imshow(colour(painted.image, painted.layer, 0, 255))
            counts = f"{painted.found} found, {painted.missed} missed, {painted.false} false"
            axes.set_title(f"{cell['cell'][1]}: {counts}", fontsize=9)
    tints = (("found", FOUND), ("missed", MISSED), ("false", FALSE))
    figure.legend(handles=[Patch(color=tint, label=name) for name, tint in tints], loc="outside lower center", ncols=3)
    _save(figure, path)


def metrics_by_load(results: Results, path: Path) -> None:
    """Fig. 11: metrics at threshold 0.5 in subjects with little, middling and much to find (thirds by true volume)."""
    names = {"dsc": "DSC", "pq": "PQ", "sen": "SEN", "ppv": "PPV", "f1": "F1"}
    figure, panels = _figure(len(results.data), len(names), 3.4, 3.4)
    for row, data in zip(panels, results.data, strict=True):
        load: dict[tuple[str, str], float] = {}
        for loss in _losses(results, data):
            for cell in results.of(data, loss):
                load |= dict(zip(zip(cell["persons"], cell["subjects"], strict=True), cell["volume_ml"], strict=True))
        limits = np.quantile(list(load.values()), [1 / 3, 2 / 3]) if load else np.zeros(2)
        for axes, (metric, title) in zip(row, names.items(), strict=True):
            losses = _losses(results, data)
            for place, loss in enumerate(losses):
                values = results.by_subject(data, loss, metric)
                middle, below, above = [], [], []
                for third in range(3):
                    mine = {key: v for key, v in values.items() if np.searchsorted(limits, load[key]) == third}
                    mean, low, high = bootstrap_mean(list(mine.values()), [person for person, _ in mine])
                    middle.append(mean)
                    below.append(mean - low)
                    above.append(high - mean)
                places = np.arange(3) + (place - (len(losses) - 1) / 2) * 0.7 / max(len(losses), 1)
                style = {**_style(results, loss), "linewidth": 1.0}
                axes.errorbar(places, middle, [below, above], label=loss, linestyle="none", markersize=4, **style)
            axes.set_xticks(range(3), [f"< {limits[0]:.2g}", "between", f"≥ {limits[1]:.2g}"])
            axes.set_xlabel("true volume of the subject (mL)")
            axes.set_ylabel(title)
            axes.set_title(data)
            axes.grid(alpha=0.3)
    _legend(figure, panels[0, 0])
    _save(figure, path)


def curves(results: Results, path: Path) -> None:
    """Sensitivity for small instances against precision, over all thresholds; the symbol is at 0.5."""
    figure, panels = _figure(1, len(results.data), 6, 5)
    for axes, data in zip(panels[0], results.data, strict=True):
        for loss in _losses(results, data):
            every = [mean_curves(cell) for cell in results.of(data, loss)]
            every = [pair for pair in every if not np.isnan(pair[0]).any()]
            if not every:
                continue  # no subject has small instances
            small, precision = np.mean(every, axis=0)
            thresholds = next(results.of(data, loss))["curve"]["thresholds"]
            style = _style(results, loss)
            half = thresholds.index(0.5)
            axes.plot(precision, small, label=loss, markevery=[half], markersize=7, **style)
        axes.set_xlabel("precision (mean over subjects)")
        axes.set_ylabel(f"sensitivity below {results.small_ml[data]:g} mL")
        axes.set_title(data)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    _save(figure, path)


def differences(results: Results, path: Path) -> None:
    """What each loss changes against the baseline, with intervals, and the seeds as dots."""
    names = [name for name in OUTCOMES if name != "vol_diff_ml"]
    figure, panels = _figure(len(results.data), len(names), 3.4, 0.4 * len(results.losses) + 1.6)
    for row, data in zip(panels, results.data, strict=True):
        for axes, name in zip(row, names, strict=True):
            found = compare(results, data, name)
            for place, one in enumerate(reversed(found)):
                mean, low, high = one.difference
                style = {**_style(results, one.loss), "linewidth": 1.5}
                axes.errorbar(mean, place, xerr=[[mean - low], [high - mean]], markersize=6, **style)
                axes.plot(one.by_seed, [place - 0.25] * len(one.by_seed), ".", color=style["color"], markersize=4)
            axes.axvline(0, color="black", linewidth=0.8)
            axes.set_yticks(range(len(found)), [one.loss for one in reversed(found)], fontsize=8)
            axes.set_ylim(-0.6, max(len(found), 1) - 0.6)
            axes.set_title(OUTCOMES[name].replace(" at ", "\nat ", 1), fontsize=8)
            axes.set_xlabel(f"{data}: difference to {results.baseline}", fontsize=8)
            axes.grid(alpha=0.3, axis="x")
    _save(figure, path)


FIGURES: Mapping[str, Callable[[Results, Path], None]] = {
    "fig08_instances_by_size": instances_by_size,
    "fig09_found_by_size": found_by_size,
    "fig10_overlays": overlays,
    "fig11_metrics_by_load": metrics_by_load,
    "fig12_false_by_size": false_by_size,
    "curves": curves,
    "differences": differences,
}
