"""Plots of results files; needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["draw"]

_AXES = {
    "instances": ("N", "true instances in the batch"),
    "pixels": ("pixels", "pixels"),
    "planes": ("planes", "planes"),
}


def draw(result: dict[str, Any], folder: Path, prefix: str = "") -> list[Path]:
    """Draw what a results file has into PNG files of a folder: scaling, roofline, table3, training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    suites = result["suites"]
    made = []
    with plt.rc_context({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "figure.dpi": 120}):
        for name, figure in (
            ("scaling", _scaling(suites["scaling"]) if "scaling" in suites else None),
            ("roofline", _roofline(suites)),
            ("table3", _bars(suites["table3"]) if "table3" in suites else None),
            ("training", _shares(suites["training"]) if "training" in suites else None),
        ):
            if figure is not None:
                path = folder / f"{prefix}{name}.png"
                figure.savefig(path, bbox_inches="tight")
                plt.close(figure)
                made.append(path)
    return made


def _device(suite: dict[str, Any]) -> str:
    machine = suite["machine"]
    if machine["device"] != "cpu":
        return machine["device"]
    return f"{machine['processor']}, threads: {machine['threads']}"


def _scaling(suite: dict[str, Any]) -> Any:
    """Time against instances, pixels and planes, both axes logarithmic; the band is between the quartiles."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    for plot, (series, (key, label)) in zip(axes, _AXES.items(), strict=True):
        rows = [row for row in suite["rows"] if row["notes"].get("series") == series and row["milliseconds"]]
        for name in dict.fromkeys(name for row in rows for name in row["milliseconds"]):
            points = [(row[key], row["milliseconds"][name]) for row in rows if name in row["milliseconds"]]
            x = [point[0] for point in points]
            (line,) = plot.plot(x, [time["median"] for _, time in points], "o-", markersize=3, label=name)
            low, high = ([time[end] for _, time in points] for end in ("low", "high"))
            plot.fill_between(x, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
        if rows:
            x = [row[key] for row in rows]
            start = min(time["median"] for time in rows[0]["milliseconds"].values())
            plot.plot(x, [start * value / x[0] for value in x], ":", color="grey", linewidth=1, label="proportional")
            plot.set_ylim(bottom=start / 3)
        plot.set(xscale="log", yscale="log", xlabel=label, ylabel="ms a step", title=f"time against {series}")
    drawn = [plot for plot in axes if plot.lines]
    if drawn:
        drawn[0].legend(fontsize=7)
    figure.suptitle(_device(suite))
    return figure


def _roofline(suites: dict[str, Any]) -> Any:
    """Bytes that must move over the time it takes, below the measured bandwidth of a copy."""
    import matplotlib.pyplot as plt

    shown = {
        name: [row for row in suite["rows"] if "floor_bytes" in row and "ours" in row["milliseconds"]]
        for name, suite in suites.items()
    }
    shown = {name: rows for name, rows in shown.items() if rows}
    if not shown:
        return None
    figure, plot = plt.subplots(figsize=(6.5, 4.2), constrained_layout=True)
    for name, rows in shown.items():
        for run, marker in (("ours", "o"), ("ours, graph", "^")):
            done = [row for row in rows if run in row["milliseconds"]]
            if done:
                x = [row["floor_bytes"] for row in done]
                y = [row["floor_bytes"] / row["milliseconds"][run]["median"] / 1e6 for row in done]
                plot.plot(x, y, marker, markersize=4, alpha=0.8, label=name + run.removeprefix("ours"))
    bandwidth = max(suites[name]["copy_bytes_per_second"] for name in shown) / 1e9
    plot.axhline(bandwidth, color="black", linewidth=1, label=f"copy, {bandwidth:.0f} GB/s")
    plot.set(xscale="log", yscale="log", xlabel="bytes that must be read and written", ylabel="GB/s achieved")
    plot.legend(fontsize=7)
    plot.set_title(_device(next(iter(suites.values()))))
    return figure


def _bars(suite: dict[str, Any]) -> Any:
    """Time of each loss in each implementation; a step on a part of the batch is a bound, drawn hatched."""
    import matplotlib.pyplot as plt

    rows = [row for row in suite["rows"] if row["milliseconds"]]
    names = list(dict.fromkeys(name for row in rows for name in row["milliseconds"]))
    figure, plot = plt.subplots(figsize=(9, 4), constrained_layout=True)
    width = 0.8 / max(len(names), 1)
    partial = []
    for index, name in enumerate(names):
        places = [place for place, row in enumerate(rows) if name in row["milliseconds"]]
        times = [rows[place]["milliseconds"][name] for place in places]
        bars = plot.bar([place + index * width for place in places], [t["median"] for t in times], width, label=name)
        for bar, place, time in zip(bars, places, times, strict=True):
            if time.get("planes", rows[place]["planes"]) < rows[place]["planes"]:
                partial.append(bar)
    plot.set_xticks([place + 0.4 for place in range(len(rows))], [row["case"] for row in rows], rotation=30)
    plot.set(yscale="log", ylabel="ms a step", title=f"{_device(suite)} (hatched: a part of the batch)")
    plot.legend(fontsize=7)
    for bar in partial:  # after the legend, which would show it
        bar.set_hatch("///")
    return figure


def _shares(suite: dict[str, Any]) -> Any:
    """Share of each loss in a training step."""
    import matplotlib.pyplot as plt

    rows = [row for row in suite["rows"] if row["base"] in row["milliseconds"]]
    if not rows:
        return None
    figure, plot = plt.subplots(figsize=(9, 4), constrained_layout=True)
    names = [name for name in rows[0]["milliseconds"] if name != rows[0]["base"] and not name.endswith(", graph")]
    width = 0.8 / len(rows)
    for index, row in enumerate(rows):
        base = row["milliseconds"][row["base"]]["median"]
        done = [(place, row["milliseconds"][name]) for place, name in enumerate(names) if name in row["milliseconds"]]
        shares = [100 * (1 - base / time["median"]) for _, time in done]
        plot.bar([place + index * width for place, _ in done], shares, width, label=row["case"])
    plot.set_xticks([place + 0.4 for place in range(len(names))], names, rotation=30)
    plot.set(ylabel="share of the step, %", title=_device(suite))
    plot.legend(fontsize=7)
    return figure
