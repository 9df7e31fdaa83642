"""Pictures of found, missed and false instances over maximum-intensity projections (as Fig. 10 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .files import need, replacing
from .functional import label
from .matching import match_instances

__all__ = ["FALSE", "FOUND", "MISSED", "Painted", "colour", "draw", "paint"]

FOUND, MISSED, FALSE = "#2ee66b", "#4da3ff", "#ff3b30"
COLOURS = (FOUND, FALSE, MISSED)  # the later ones are drawn over the earlier ones
VIEWS = ("sagittal", "coronal", "axial")  # what is seen along x, y and z of a file with an affine


class Painted(NamedTuple):
    """An image and what was made of its instances."""

    image: NDArray[Any]  # [*S]
    layer: NDArray[np.uint8]  # [*S] 0, or 1 + the position in COLOURS
    found: int
    missed: int
    false: int


def paint(
    image: NDArray[Any],
    pred: NDArray[np.bool_],
    target: NDArray[np.bool_],
    *,
    connectivity: int | None = None,
    min_size: int = 0,
    target_labels: NDArray[np.integer] | None = None,
) -> Painted:
    """Found instances, with the predictions that hit them, missed ones and false ones; all arrays `[*S]`, 2D or 3D.

    `target_labels` are annotated ids, 1, 2, ..., in place of the components of the target; all of them count.
    """
    sides = [torch.from_numpy(np.ascontiguousarray(mask))[None, None] for mask in (target, pred)]
    ids = [label(side, connectivity=connectivity, min_size=min_size)[0] for side in sides]
    if target_labels is not None:
        ids[0] = torch.from_numpy(target_labels.astype(np.int64))[None, None]
    matches = match_instances(ids[1] > 0, ids[0] > 0, target_labels=ids[0], pred_labels=ids[1])
    t, q = (side[0, 0].long().numpy() for side in ids)
    found, hit = (np.concatenate([[False], side.matched.numpy()]) for side in (matches.target, matches.pred))
    layer = np.zeros(image.shape, np.uint8)
    layer[found[t] | hit[q]] = 1 + COLOURS.index(FOUND)
    layer[(q > 0) & ~hit[q]] = 1 + COLOURS.index(FALSE)
    layer[(t > 0) & ~found[t]] = 1 + COLOURS.index(MISSED)
    return Painted(image, layer, int(found.sum()), int((~found[1:]).sum()), int((~hit[1:]).sum()))


class _Panel(NamedTuple):
    """One projection, rows from top to bottom."""

    title: str
    grey: NDArray[np.float64]
    layer: NDArray[np.uint8]
    height: float  # mm
    width: float


def _panels(picture: Painted, spacing: Sequence[float], affine: NDArray[np.float64] | None) -> list[_Panel]:
    image, layer, size = picture.image.astype(np.float64), picture.layer, list(spacing)
    image[~np.isfinite(image)] = 0
    if affine is None or not np.isfinite(affine).all() or np.linalg.det(affine) == 0:
        if image.ndim == 2:
            return [_panel("", image, layer, size[0], size[1])]
        rows, columns = (1, 0, 0), (2, 2, 1)
        return [
            _panel(f"along axis {axis}", image.max(axis), layer.max(axis), size[rows[axis]], size[columns[axis]])
            for axis in range(3)
        ]
    # Turn the axes so that x goes to the right, y to the front and z up, as far as whole turns can.
    orientations = need("nibabel.orientations", "the orientation of NIfTI files")
    image, layer = (array.reshape(*array.shape, 1) if array.ndim == 2 else array for array in (image, layer))
    size = [*size, 1.0][:3]
    turn = orientations.io_orientation(affine)
    image, layer = (orientations.apply_orientation(array, turn) for array in (image, layer))
    for old, (new, _) in enumerate(turn.astype(int)):
        size[new] = spacing[old] if old < len(spacing) else 1.0
    panels = []
    for axis in (2, 1, 0):
        if image.shape.count(1) == 1 and image.shape[axis] > 1:
            continue  # a single slice, seen from its edge
        right, up = (other for other in range(3) if other != axis)
        grey, inside = (np.flipud(array.max(axis).T) for array in (image, layer))
        panels.append(_panel(VIEWS[axis], grey, inside, size[up], size[right]))
    return panels


def _panel(title: str, grey: Any, layer: Any, row: float, column: float) -> _Panel:
    return _Panel(title, grey, layer, grey.shape[0] * row, grey.shape[1] * column)


def colour(image: NDArray[Any], layer: NDArray[np.uint8], low: float, high: float) -> NDArray[np.float64]:
    """Red, green and blue `[Y, X, 3]` of a grey image, black at `low` and white at `high`, and its instances."""
    grey = np.clip((image.astype(np.float64) - low) / max(high - low, 1e-12), 0, 1)
    pixels = 0.8 * np.repeat(grey[..., None], 3, axis=-1)  # darker than the image, so that small spots stand out
    for number, tint in enumerate(COLOURS, start=1):
        inside = layer == number
        pixels[inside] = 0.15 * pixels[inside] + 0.85 * np.array([int(tint[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return pixels


def draw(
    path: Path,
    picture: Painted,
    *,
    spacing: Sequence[float] | None = None,
    affine: NDArray[np.float64] | None = None,
) -> None:
    """Write a PNG: for a volume its three projections, for an image the image, with a legend that counts.

    Args:
        spacing: mm along each axis of the arrays, for the shape of the panels; a slice's thickness may come first.
        affine: voxels to mm to the right, front and top, as in NIfTI, which then says what is up.
    """
    need("matplotlib", "drawing")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    axes = picture.image.ndim
    panels = _panels(picture, [1.0] * axes if spacing is None else list(spacing)[-axes:], affine)
    low, high = np.percentile(np.concatenate([panel.grey.ravel() for panel in panels]), (1, 99.5))
    tallest, broadest = max(panel.height for panel in panels), sum(panel.width for panel in panels)
    scale = min(5.5 / tallest, 16 / broadest)  # inches for a millimetre
    top, bottom, gap = 0.45 if len(panels) > 1 else 0.1, 0.6, 0.15
    width = max(broadest * scale + gap * (len(panels) + 1), 5.0)
    total = tallest * scale + top + bottom
    figure = Figure((width, total), dpi=110, facecolor="black")
    FigureCanvasAgg(figure)
    left = (width - broadest * scale - gap * (len(panels) - 1)) / 2
    for panel in panels:
        w, h = panel.width * scale, panel.height * scale
        place = (left / width, (bottom + (tallest * scale - h) / 2) / total, w / width, h / total)
        drawn = figure.add_axes(place)
        drawn.imshow(colour(panel.grey, panel.layer, low, high), aspect="auto", interpolation="nearest")
        drawn.set_axis_off()
        middle, above = (left + w / 2) / width, (bottom + (tallest * scale + h) / 2 + 0.2) / total
        figure.text(middle, above, panel.title, color="white", size=13, ha="center", va="center")
        left += w + gap
    counts = ((FOUND, "found", picture.found), (MISSED, "missed", picture.missed), (FALSE, "false", picture.false))
    figure.legend(
        handles=[Patch(color=tint, label=f"{name} {count}") for tint, name, count in counts],
        loc="lower center",
        ncols=3,
        frameon=False,
        labelcolor="white",
        fontsize=13,
    )
    with replacing(path) as part:
        figure.savefig(part, format="png", facecolor="black")
