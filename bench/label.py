"""`python -m bench label`: connected components, beside every other labeller that is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastinstance as fi

from .scenes import balls
from .timing import Time, copy_bandwidth, graphed, times

__all__ = ["CASES", "run", "table"]

Labeller = Callable[[Tensor], object]


def _random(share: float, *shape: int) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(0)) < share)[:, None]


def _snake(*shape: int) -> Tensor:
    """One component that fills each plane: full rows, joined at alternating ends."""
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[..., ::2, :] = True
    mask[..., 1::4, -1] = True
    mask[..., 3::4, 0] = True
    return mask[:, None]


CASES: dict[str, Callable[[], Tensor]] = {
    "48×256², sparse blobs": lambda: balls((48, 256, 256), 15, 20, (2, 7)).target > 0,
    "48×256², dense blobs": lambda: balls((48, 256, 256), 250, 0, (3, 8)).target > 0,
    "48×256², noise 10 %": lambda: _random(0.1, 48, 256, 256),
    "48×256², noise 50 %": lambda: _random(0.5, 48, 256, 256),
    "48×256², noise 60 %": lambda: _random(0.6, 48, 256, 256),
    "48×256², snakes": lambda: _snake(48, 256, 256),
    "4096², noise 50 %": lambda: _random(0.5, 1, 4096, 4096),
    "2×128³, blobs": lambda: balls((2, 128, 128, 128), 100, 0, (2, 7)).target > 0,
}
SMALL: dict[str, Callable[[], Tensor]] = {
    "noise": lambda: _random(0.5, 2, 33, 47),
    "snakes": lambda: _snake(2, 8, 9),
    "volume": lambda: _random(0.3, 1, 9, 11, 35),
}


def _per_plane(label: Callable[[Any], object]) -> Labeller:
    return lambda mask: [label(plane) for plane in mask[:, 0]]


def _peers(device: str, axes: int) -> dict[str, Labeller]:
    """The labellers that work on this device, if they are installed; full connectivity."""
    found: dict[str, Labeller] = {}
    full = np.ones((3,) * axes, dtype=int)

    def scipy(plane: Tensor) -> object:
        from scipy import ndimage

        return ndimage.label(plane.numpy(), full)

    def cc3d(plane: Tensor) -> object:
        import cc3d

        return cc3d.connected_components(plane.numpy(), connectivity=8 if axes == 2 else 26)  # pyright: ignore

    def kornia(mask: Tensor) -> object:
        from kornia.contrib import connected_components

        return connected_components(mask.float(), num_iterations=128)

    def cupyx(plane: Tensor) -> object:
        import cupy  # pyright: ignore[reportMissingImports]
        from cupyx.scipy import ndimage  # pyright: ignore[reportMissingImports]

        return ndimage.label(cupy.asarray(plane), cupy.ones((3,) * axes))

    def cucim(plane: Tensor) -> object:
        import cupy  # pyright: ignore[reportMissingImports]
        from cucim.skimage.measure import label  # pyright: ignore[reportMissingImports]

        return label(cupy.asarray(plane))

    if device == "cpu":
        found |= {"scipy": _per_plane(scipy), "cc3d": _per_plane(cc3d)}
    if axes == 2:
        found["kornia, 128 iterations"] = kornia
    if device == "cuda":
        found |= {"cupyx": _per_plane(cupyx), "cucim": _per_plane(cucim)}
    return found


def _check(mask: Tensor) -> int:
    """Components in all planes; no time for a wrong result: ids must be scipy's where it is installed."""
    labels, counts = fi.label(mask)
    if importlib.util.find_spec("scipy"):
        from scipy import ndimage

        for plane, mine in zip(mask[:, 0].cpu().numpy(), labels[:, 0].cpu().numpy(), strict=True):
            truth, _ = ndimage.label(plane, np.ones((3,) * plane.ndim, dtype=int))
            np.testing.assert_array_equal(mine, truth)
    return int(counts.sum())


def _working(runs: dict[str, Callable[[], object]], errors: dict[str, str]) -> dict[str, Callable[[], object]]:
    """Those of the runs that do not fail."""
    found = {}
    for name, run in runs.items():
        try:
            run()
            found[name] = run
        except Exception as error:
            errors[name] = _said(error)
    return found


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:500]}"


def run(*, repeats: int = 15, small: bool = False) -> dict[str, Any]:
    """Time `fastinstance.label` and the peers on CUDA if there is a device, else on the CPU.

    `small` inputs only show that everything runs.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bandwidth = copy_bandwidth(device)
    rows = []
    for name, make in SMALL.items() if small else CASES.items():
        mask = make().to(device)
        row: dict[str, Any] = {"case": name, "pixels": mask.numel(), "milliseconds": {}, "errors": {}}
        errors: dict[str, str] = row["errors"]
        rows.append(row)
        try:
            row["components"] = _check(mask)
        except Exception as error:
            errors["ours"] = _said(error)
            continue
        runs: dict[str, Callable[[], object]] = {"ours": lambda mask=mask: fi.label(mask)}
        if device == "cuda":
            try:
                runs["ours, graph"] = graphed(runs["ours"])
            except Exception as error:
                errors["ours, graph"] = _said(error)
        measured = times(runs, repeats=repeats)
        peers = {key: lambda peer=peer, mask=mask: peer(mask) for key, peer in _peers(device, mask.ndim - 2).items()}
        slow = {key: peers.pop(key) for key in list(peers) if key.startswith("kornia")}
        measured |= times(_working(peers, errors), repeats=repeats)
        if mask.numel() <= 48 * 256**2:
            measured |= times(_working(slow, errors), repeats=1, warmup=0)
        row["milliseconds"] = {key: {k: round(v, 4) for k, v in t._asdict().items()} for key, t in measured.items()}
        print(name, {key: value["median"] for key, value in row["milliseconds"].items()}, errors, flush=True)
    return {"bench": "label", "device": device, "copy_bytes_per_second": bandwidth, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """Markdown: medians, throughput, share of the copy bandwidth (1 byte read and 4 written a pixel), ratios."""
    names = list(dict.fromkeys(key for row in result["rows"] for key in row["milliseconds"]))
    peers = [name for name in names if not name.startswith("ours")]
    graph = "ours, graph" in names
    head = ["case", "components", "ours, ms", *(["graph, ms"] if graph else []), "Gpx/s", "of copy", *peers]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in result["rows"]:
        time = {key: Time(**value) for key, value in row["milliseconds"].items()}
        if "ours" not in time:
            lines.append(f"| {row['case']} | {row['errors']['ours'].splitlines()[0]} |")
            continue
        best = time.get("ours, graph", time["ours"]).median
        cells = [row["case"], row["components"], f"{time['ours'].median:.3f}"]
        cells += [f"{best:.3f}" if "ours, graph" in time else "—"] if graph else []
        cells += [
            f"{row['pixels'] / best / 1e6:.2f}",
            f"{5e3 * row['pixels'] / best / result['copy_bytes_per_second']:.1%}",
        ]
        cells += [f"{time[p].median:.1f} ms (×{time[p].median / best:.1f})" if p in time else "" for p in peers]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(
        [*lines, "", f"copy bandwidth {result['copy_bytes_per_second'] / 1e9:.1f} GB/s, on {result['device']}"]
    )
