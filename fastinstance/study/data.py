"""Data sets of the study: a table of settings -> checked, normalised subjects with their true instances.

A table names its `source` and says what that source needs; `sources.py` reads, and this module does what all subjects
have in common. Instances are numbered slice by slice: annotated ids where there are some, otherwise the 8-connected
components of the true mask.

With a cache a subject is read, labelled and normalised once. It lies in a file named after the contents of the files
that it was made from and all that was done to them, so that a changed file or setting is simply another name.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastinstance.files import FileError, progress, replacing
from fastinstance.functional import label
from fastinstance.study.sources import SOURCES, Item, Scan, Source
from fastinstance.study.subjects import StudyError, Subject

__all__ = ["check", "load", "reading"]

VERSION = 1
"""Raised when the same files and settings give other subjects than before."""


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


@contextmanager
def reading(what: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, as what `load` takes as `progress`."""
    with progress(0, what, "subject", quiet=quiet) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def check(settings: Mapping[str, Any]) -> None:
    """Whether a data set can be loaded, as far as that shows without reading an image.

    Args:
        settings: as `load`.

    Raises:
        StudyError: an unknown source or key, a value that makes no sense, a missing package, folder or file.
    """
    _items(_source(settings))


def load(
    settings: Mapping[str, Any],
    *,
    cache: Path | None = None,
    skip_bad: bool = False,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = _to_stderr,
) -> list[Subject]:
    """The subjects of a data set, sorted by name.

    Args:
        settings: a TOML table: `source`, and the keys that this source takes (docs/study.md). Paths are relative to
            the working directory.
        cache: a folder for what was read before; made if need be, and may be shared by data sets and processes.
        skip_bad: leave out what cannot be used, with a line that names it, instead of refusing the data set.
        progress: called after every subject with the number of those done and of all.
        say: takes the lines about what was skipped.

    Returns:
        Subjects of which no two share a name or an image; every image has mean 0 and variance 1 in each channel.

    Raises:
        StudyError: as `check`; a subject that is unreadable, constant, not finite, of mismatched shape or affine, or a
            duplicate, or whose truth is empty or covers all that is annotated (where that is not allowed); no
            instance in all subjects; a cache that cannot be written.
    """
    source = _source(settings)
    items = _items(source)
    digests: dict[Path, str] = {}
    names: set[str] = set()
    images: dict[str, str] = {}
    subjects = []
    for done, item in enumerate(items, start=1):
        try:
            if item.name in names:
                raise StudyError("expected one subject of this name, got several")
            names.add(item.name)
            subject = _subject(item, source, cache, digests)
            twin = images.setdefault(_digest(subject.image), item.name)
            if twin != item.name:
                raise StudyError(f"has the same image as {twin}; remove one of them")
        except (FileError, StudyError) as error:
            if not skip_bad:
                raise StudyError(f"{item.name}: {error}") from error
            say(f"skipped {item.name}: {error}")
        else:
            subjects.append(subject)
        if progress is not None:
            progress(done, len(items))
    if not subjects:
        raise StudyError(f"data: none of the {len(items)} subjects can be used")
    if not any(subject.target.any() for subject in subjects):
        raise StudyError(f"data: expected instances to learn, got none in all {len(subjects)} subjects")
    return subjects


def _source(settings: Mapping[str, Any]) -> Source:
    """The source that a table describes."""
    settings = dict(settings)
    name = settings.pop("source", None)
    if name is None:
        raise StudyError(f"data: expected source = one of {', '.join(SOURCES)}, got none")
    if not isinstance(name, str) or name not in SOURCES:
        raise StudyError(f"data: expected source = one of {', '.join(SOURCES)}, got {name!r}{_nearest(name, SOURCES)}")
    kind = SOURCES[name]
    keys = {field.name: field for field in dataclasses.fields(kind)}
    for key in settings:
        if key not in keys:
            near = _nearest(key, keys) or f"; it takes {', '.join(keys)}"
            raise StudyError(f"data: source {name} takes no key {key!r}{near}")
    missing = [
        key
        for key, field in keys.items()
        if field.default is field.default_factory is dataclasses.MISSING and key not in settings
    ]
    if missing:
        raise StudyError(f"data: source {name} needs the key {' and '.join(missing)}")
    absent = [package for package in kind.packages if find_spec(package) is None]
    if absent:
        raise StudyError(f"data: source {name} needs {', '.join(absent)}: pip install 'fastinstance[study]'")
    return kind(**settings)


def _nearest(name: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _items(source: Source) -> list[Item]:
    return sorted(source.items(), key=lambda item: item.name)


def _subject(item: Item, source: Source, cache: Path | None, digests: dict[Path, str]) -> Subject:
    """One subject, from the cache if it lies there.

    Raises:
        FileError, StudyError: it cannot be used.
    """
    if item.read is None:
        raise StudyError(item.problem)
    if cache is None:
        subject = _made(item, item.read(), source.size)
    else:
        path = cache / f"{_key(item, source, digests)}.npz"
        subject = _restored(item, path)
        if subject is None:
            subject = _made(item, item.read(), source.size)
            _store(subject, path)
    annotated = subject.target if subject.valid is None else subject.target[subject.valid]
    if annotated.numel() == 0:
        raise StudyError("nothing in it is annotated")
    if not item.allow_empty and not annotated.any():
        raise StudyError("its truth is empty; set allow_empty = true to use it nevertheless")
    if not item.allow_empty and annotated.all():
        raise StudyError("its truth covers all that is annotated: there is no background")
    return subject


def _made(item: Item, scan: Scan, size: Sequence[int] | None) -> Subject:
    """A subject from what its files hold."""
    if not np.isfinite(scan.image).all():
        raise StudyError(f"its image has {int((~np.isfinite(scan.image)).sum())} values that are NaN or infinite")
    image, truth, valid = scan.image, scan.truth, scan.valid
    if size is not None:
        if np.count_nonzero(_fitted(truth, size, 0)) < np.count_nonzero(truth):
            raise StudyError(f"size = {list(size)} would cut off instances of slices of {list(truth.shape[1:])}")
        image = np.stack([_fitted(channel, size, channel.min()) for channel in image])
        truth = _fitted(truth, size, 0)
        valid = None if valid is None else _fitted(valid, size, True)
    mask = torch.from_numpy(truth > 0)
    labels = _renumbered(truth) if item.instances else label(mask[:, None])[0][:, 0]
    return Subject(
        name=item.name,
        person=item.person,
        image=torch.from_numpy(_standardised(image)),
        target=mask,
        labels=labels,
        valid=None if valid is None else torch.from_numpy(np.ascontiguousarray(valid)),
        spacing=scan.spacing,
    )


def _fitted(volume: NDArray[Any], size: Sequence[int], fill: Any) -> NDArray[Any]:
    """`volume` [Z, Y, X] with slices of that size, cut or padded around the centre."""
    out = np.full((len(volume), *size), fill, dtype=volume.dtype)
    source, target = [slice(None)], [slice(None)]
    for have, want in zip(volume.shape[1:], size, strict=True):
        kept = min(have, want)
        source.append(slice((have - kept) // 2, (have - kept) // 2 + kept))
        target.append(slice((want - kept) // 2, (want - kept) // 2 + kept))
    out[tuple(target)] = volume[tuple(source)]
    return out


def _standardised(image: NDArray[Any]) -> NDArray[np.float32]:
    """Every channel of `image` [C, Z, Y, X] with mean 0 and variance 1."""
    values = image.astype(np.float64)
    largest = np.abs(values).max(axis=(1, 2, 3), keepdims=True)
    values -= values.mean(axis=(1, 2, 3), keepdims=True)
    deviation = values.std(axis=(1, 2, 3), keepdims=True)
    constant = np.flatnonzero(deviation <= 1e-9 * largest)  # no more than rounding
    if len(constant):
        which = "its image" if len(image) == 1 else f"channel {constant[0] + 1} of its image"
        raise StudyError(f"{which} is constant")
    return (values / deviation).astype(np.float32)


def _renumbered(ids: NDArray[Any]) -> Tensor:
    """Ids [Z, Y, X] as 1, 2, ... in every slice, int32, in the order of the ids."""
    out = np.zeros(ids.shape, np.int32)
    for plane, numbers in zip(ids, out, strict=True):
        present, position = np.unique(plane, return_inverse=True)
        numbers[:] = position.reshape(plane.shape) + (present[0] != 0)
    return torch.from_numpy(out)


def _key(item: Item, source: Source, digests: dict[Path, str]) -> str:
    """Changes with the contents of the files and with all that is done to them."""
    for path in item.files:
        if path not in digests:
            try:
                with path.open("rb") as file:
                    digests[path] = hashlib.file_digest(file, "blake2b").hexdigest()
            except OSError as error:
                raise FileError(f"{path}: cannot be read ({error.strerror or error})") from error
    made_from = [VERSION, type(source).__name__, [digests[path] for path in item.files]]
    text = json.dumps([*made_from, item.options, source.size, item.instances], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _digest(image: Tensor) -> str:
    return hashlib.blake2b(image.numpy().tobytes(), digest_size=16).hexdigest() + str(tuple(image.shape))


def _store(subject: Subject, path: Path) -> None:
    labels = subject.labels.numpy()
    arrays: dict[str, Any] = {
        "image": subject.image.numpy(),
        "labels": labels.astype(np.min_scalar_type(int(labels.max()))),
        "spacing": np.array(subject.spacing),
    }
    if subject.valid is not None:
        arrays["valid"] = subject.valid.numpy()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part, part.open("wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise StudyError(f"cannot write to the cache {path.parent}: {error.strerror or error}") from error


def _restored(item: Item, path: Path) -> Subject | None:
    """What was stored there; None if there is nothing, or it is damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            labels = torch.from_numpy(arrays["labels"].astype(np.int32))
            z, y, x = arrays["spacing"].tolist()
            return Subject(
                name=item.name,
                person=item.person,
                image=torch.from_numpy(arrays["image"]),
                target=labels > 0,
                labels=labels,
                valid=torch.from_numpy(arrays["valid"]) if "valid" in arrays else None,
                spacing=(z, y, x),
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
