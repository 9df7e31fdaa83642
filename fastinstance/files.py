"""Masks and images in files: NIfTI, TIFF, PNG, npy; what belongs together by name; writing that leaves nothing half."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "SUFFIXES",
    "FileError",
    "Volume",
    "find",
    "fingerprint",
    "integers",
    "match",
    "need",
    "part_of",
    "read",
    "replacing",
    "require_same_grid",
    "require_writable",
    "spacing_of",
    "write",
]

SUFFIXES = (".nii.gz", ".nii", ".tiff", ".tif", ".png", ".npy")
_MILLIMETRES = {"mm": 1.0, "unknown": 1.0, "meter": 1e3, "micron": 1e-3}
# Tags that say how a TIFF's pixels lie in the file, which the writer decides; all others are copied.
_LAYOUT_TAGS = {254, 255, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 317, 320, 322, 323, 324, 325, 338, 339}


class FileError(Exception):
    """A file that cannot be used; the text is the one line that is shown."""


@dataclass(frozen=True)
class Volume:
    """What a file holds."""

    path: Path
    data: NDArray[Any]  # [*S], 2D or 3D; of a NIfTI file x, y, z; of a TIFF page, row, column
    spacing: tuple[float, ...] | None = None  # mm along each axis, where the format has it
    affine: NDArray[np.float64] | None = None
    source: Any = None  # the nibabel or Pillow image it came from


def need(package: str, what: str) -> Any:
    """An optional package."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise FileError(f"{what} needs {package.split('.')[0]}: pip install 'fastinstance[commands]'") from error


def progress(total: int, what: str, unit: str, *, quiet: bool = False, done: int = 0) -> Any:
    """A bar of tqdm on stderr; into a file it writes a line now and then instead of ten a second."""
    often = 0.1 if sys.stderr.isatty() else 10.0
    tqdm = need("tqdm", "the progress bar").tqdm
    return tqdm(total=total, initial=done, desc=what, unit=unit, mininterval=often, file=sys.stderr, disable=quiet)


def _suffix(path: Path) -> str | None:
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)


def read(path: Path, *, grey: bool = False) -> Volume:
    """The image in a file.

    Args:
        path: its name ends in one of `SUFFIXES`.
        grey: colours become grey; without it they are an error.

    Raises:
        FileError: no such file, another format, damaged, neither 2D nor 3D, or a package that is missing.
    """
    suffix = _suffix(path)
    if suffix is None:
        raise FileError(f"{path}: expected a name that ends in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise FileError(f"{path}: no such file")
    load = {".nii.gz": _nifti, ".nii": _nifti, ".npy": _npy}.get(suffix, _pillow)
    try:
        volume = load(path, grey)
    except FileError:
        raise
    except Exception as error:  # each reader fails on damaged files in its own ways
        raise FileError(f"{path}: cannot be read ({type(error).__name__}: {' '.join(str(error).split())})") from error
    if volume.data.ndim not in (2, 3) or volume.data.size == 0:
        raise FileError(f"{path}: expected an image with 2 or 3 axes, got the shape {volume.data.shape}")
    if volume.data.dtype.kind not in "biuf":
        raise FileError(f"{path}: expected numbers, got {volume.data.dtype}")
    return volume


def _npy(path: Path, grey: bool) -> Volume:
    del grey
    return Volume(path, np.load(path, allow_pickle=False))


def _nifti(path: Path, grey: bool) -> Volume:
    del grey
    image = need("nibabel", "reading NIfTI files").load(path)
    data = np.asanyarray(image.dataobj)
    while data.ndim > 3 and data.shape[-1] == 1:
        data = data[..., 0]
    unit = _MILLIMETRES.get(image.header.get_xyzt_units()[0], 1.0)
    spacing = tuple(float(zoom) * unit for zoom in image.header.get_zooms()[: data.ndim])
    return Volume(path, data, spacing, np.asarray(image.affine, np.float64), image)


def _pillow(path: Path, grey: bool) -> Volume:
    pillow = need("PIL.Image", "reading PNG and TIFF files")
    with pillow.open(path) as image:
        frames = []
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            frame = image
            if image.mode not in ("1", "L", "P", "I", "F") and not image.mode.startswith("I;"):
                if not grey:
                    raise FileError(f"{path}: expected one channel, got colours (mode {image.mode})")
                frame = image.convert("L")
            elif grey and image.mode == "P":
                frame = image.convert("L")
            frames.append(np.array(frame))
        image.seek(0)
    return Volume(path, np.stack(frames) if len(frames) > 1 else frames[0], source=image)


def write(path: Path, data: NDArray[Any], like: Volume) -> None:
    """`data` in place of that of `like`: with its dtype, header, affine, palette and tags; the file appears complete.

    Raises:
        FileError: the name does not end as that of `like`.
    """
    suffix, expected = _suffix(path), _suffix(like.path)
    if suffix is None or suffix.split(".")[1][:3] != str(expected).split(".")[1][:3]:
        raise FileError(f"{path}: expected a name that ends in {expected}, like {like.path.name}")
    data = data.astype(like.data.dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        if suffix == ".npy":
            with part.open("wb") as file:  # to a name, it would add a suffix to .NPY
                np.save(file, data)
        elif suffix.startswith(".nii"):
            image = like.source
            slope, inter = image.dataobj.slope, image.dataobj.inter
            data = data.reshape(image.shape)
            if (slope, inter) == (1, 0):
                made = type(image)(data, None, image.header.copy())
            else:  # the scale of the file; nibabel would choose another, which is not exact
                made = type(image)(np.rint((data - inter) / slope), None, image.header.copy())
                made.header.set_slope_inter(slope, inter)
            made.to_filename(part)
        else:
            _write_pillow(part, data, like.source, suffix)


def _write_pillow(path: Path, data: NDArray[Any], source: Any, suffix: str) -> None:
    pillow = need("PIL.Image", "writing PNG and TIFF files")
    frames = [pillow.fromarray(frame) for frame in (data if data.ndim == 3 else data[None])]
    if source.mode == "P":
        for frame in frames:
            frame.putpalette(source.getpalette())
    options = {key: source.info[key] for key in ("dpi", "transparency", "compression") if key in source.info}
    if suffix == ".png":
        text = need("PIL.PngImagePlugin", "writing PNG files").PngInfo()
        for key, value in getattr(source, "text", {}).items():
            text.add_text(key, value)
        frames[0].save(path, pnginfo=text, **options)
        return
    tags = {tag: value for tag, value in source.tag_v2.items() if tag not in _LAYOUT_TAGS}
    frames[0].save(path, save_all=True, append_images=frames[1:], tiffinfo=tags, **options)


def part_of(path: Path) -> Path:
    """The name that a file has until it is complete."""
    return path.with_name(f".{os.getpid()}.part.{path.name}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to that becomes `path` only when the block ends well."""
    part = part_of(path)
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def require_writable(path: Path) -> None:
    """Makes the folder of `path`, and checks before any work that the file can be written there.

    Raises:
        FileError: it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        part = part_of(path)
        part.touch()
        part.unlink()
    except OSError as error:
        raise FileError(f"cannot write to {path}: {error.strerror or error}") from error


def find(where: Path) -> dict[str, Path]:
    """The images of a folder and those below it, by their path in it without suffix; or the one file.

    Raises:
        FileError: nothing there, or two files that differ in their suffix only.
    """
    if where.is_file():
        return {where.name[: len(where.name) - len(_suffix(where) or "")]: where}
    if not where.is_dir():
        raise FileError(f"{where}: no such file or folder")
    found: dict[str, Path] = {}
    for path in sorted(where.rglob("*")):
        suffix = _suffix(path)
        if suffix is None or path.name.startswith(".") or not path.is_file():
            continue
        name = path.relative_to(where).as_posix()[: -len(suffix)]
        if name in found:
            raise FileError(f"{where}: expected one file named {name}, got {found[name].name} and {path.name}")
        found[name] = path
    if not found:
        raise FileError(f"{where}: no file that ends in {', '.join(SUFFIXES)}")
    return found


def match(places: Sequence[Path]) -> tuple[dict[str, tuple[Path, ...]], dict[str, str]]:
    """Files of the same name in all places (a single file each: these, whatever their names), and what is missing.

    Returns:
        The paths by name, sorted; and by name the reason for what is not in all places.

    Raises:
        FileError: as `find`; files and folders mixed.
    """
    if len({place.is_file() for place in places if place.exists()}) > 1:
        raise FileError(f"expected only files or only folders, got {', '.join(map(str, places))}")
    found = [find(place) for place in places]
    if places[0].is_file():
        return {next(iter(found[0])): tuple(places)}, {}
    names = sorted(set().union(*found))
    complete = {name: tuple(files[name] for files in found) for name in names if all(name in files for files in found)}
    missing = {
        name: f"not in {', '.join(str(place) for place, files in zip(places, found, strict=True) if name not in files)}"
        for name in names
        if name not in complete
    }
    return complete, missing


def require_same_grid(volumes: Sequence[Volume], *, spacing_given: bool) -> None:
    """One shape, and, unless the spacing was given, one affine where the files have one.

    Raises:
        FileError: they differ.
    """
    first = volumes[0]
    for other in volumes[1:]:
        if other.data.shape != first.data.shape:
            raise FileError(
                f"expected one shape, got {first.data.shape} of {first.path} and {other.data.shape} of {other.path}"
            )
        if spacing_given or first.affine is None or other.affine is None:
            continue
        # As far as float32 headers can tell: a hundredth of a voxel at the far corner.
        far = np.abs(first.affine - other.affine) @ np.array([*(*first.data.shape, 1)[:3], 1])
        if far.max() > 0.01 * min(first.spacing or (1.0,)):
            raise FileError(
                f"expected one affine, got others in {first.path} and {other.path}: resample one, or give the spacing"
            )


def fingerprint(paths: Sequence[Path], settings: object) -> str:
    """Changes with the files, by size and time, and with the settings."""
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    text = json.dumps([files, settings], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def spacing_of(volumes: Sequence[Volume], given: Sequence[float] | None) -> tuple[float, ...] | None:
    """Millimetres: as given, or from the first header that has them."""
    if given is not None:
        axes = volumes[0].data.ndim
        values = tuple(given) * (axes if len(given) == 1 else 1)
        if len(values) not in ({2, 3} if axes == 2 else {3}):
            raise FileError(f"{volumes[0].path}: expected {axes} numbers as --spacing, got {len(given)}")
        return values
    return next((volume.spacing for volume in volumes if volume.spacing is not None), None)


def integers(volume: Volume) -> NDArray[Any]:
    """The values as they are, checked to be integers.

    Raises:
        FileError: fractions, NaN or infinities.
    """
    data = volume.data
    if data.dtype.kind == "f" and not (np.isfinite(data).all() and np.array_equal(data, np.rint(data))):
        wrong = data[~np.isfinite(data) | (data != np.rint(data))].flat[0]
        raise FileError(f"{volume.path}: expected a mask of integers, got {wrong:g}; threshold probabilities first")
    return data
