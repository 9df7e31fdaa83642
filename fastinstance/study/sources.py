"""Where a data set comes from: what each source can be told, which subjects it has, and how one is read.

Every source is a dataclass whose fields are the keys of a TOML table. Reading gives what the files hold; what all
subjects have in common (checks, components, normalisation, cache) is in `data.py`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastinstance import files
from fastinstance.files import FileError, Volume
from fastinstance.study.subjects import StudyError

__all__ = ["SOURCES", "Item", "Scan", "Source"]

_NUMBER = (int, float)
ORIENTATIONS = {"axial": (2, 1, 0), "coronal": (1, 2, 0), "sagittal": (0, 2, 1)}
"""Axes of a right-anterior-superior volume in the order slice, row, column."""


class Scan(NamedTuple):
    """What the files of one subject hold."""

    image: NDArray[Any]
    """`[C, Z, Y, X]` intensities."""
    truth: NDArray[Any]
    """`[Z, Y, X]` integers: 0, and 1 or the ids of instances."""
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Voxel size (slice, row, column) in mm."""
    valid: NDArray[np.bool_] | None = None
    """`[Z, Y, X]`; None where the annotation covers all."""


@dataclass(frozen=True)
class Item:
    """A subject before it is read."""

    name: str
    person: str
    files: tuple[Path, ...] = ()
    """What it is read from, or generated with."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What else decides what comes out, as JSON can hold it."""
    read: Callable[[], Scan] | None = None
    """None where there is a problem."""
    problem: str | None = None
    """Why it cannot be read, where that is plain before."""
    instances: bool = False
    """The truth holds ids: nothing is labelled."""
    allow_empty: bool = False
    """The truth may be all background, or all instance."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What all sources can be told."""

    size: Sequence[int] | None = None
    """Rows and columns: every slice is cut or padded around its centre."""

    packages: ClassVar[tuple[str, ...]] = ()
    """What reading imports."""

    def __post_init__(self) -> None:
        if self.size is not None and not (_all_of(self.size, int, 2) and min(self.size) >= 1):
            raise StudyError(f"data: expected size = [rows, columns], two whole numbers of at least 1, got {self.size}")

    def items(self) -> list[Item]:
        """All subjects, in the order of their names; nothing is read yet.

        Raises:
            StudyError: there is nothing to read.
        """
        raise NotImplementedError


def _all_of(value: object, kind: type | tuple[type, ...], count: int | None = None) -> bool:
    """Whether `value` is a list of such values, so many of them."""
    if isinstance(value, str) or not isinstance(value, Sequence) or count not in (None, len(value)):
        return False
    return all(isinstance(one, kind) and not isinstance(one, bool) for one in value)


def _require_whole(source: Source, name: str, least: int, most: int | None = None) -> None:
    value = getattr(source, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        limits = f"of at least {least}" if most is None else f"in {least} to {most}"
        raise StudyError(f"data: expected {name} as a whole number {limits}, got {value!r}")


def _require_flag(source: Source, name: str) -> None:
    if not isinstance(getattr(source, name), bool):
        raise StudyError(f"data: expected {name} = true or false, got {getattr(source, name)!r}")


def _folder(value: object) -> Path:
    if not isinstance(value, str | Path):
        raise StudyError(f"data: expected folder as a path, got {value!r}")
    path = Path(value).expanduser()
    if not path.is_dir():
        raise StudyError(f"data: {path}: no such folder")
    return path


@dataclass(frozen=True, kw_only=True)
class Brain(Source):
    """Generated lesions in a real brain (`brain.py`)."""

    subjects: int
    """Persons; each has so many subjects as `visits`."""
    seed: int = 0
    visits: int = 1
    slices: int = 22
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `brain.LesionRecipe` that differ from its defaults."""

    packages = ("nilearn", "nibabel", "scipy")

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_whole(self, "subjects", 1)
        _require_whole(self, "seed", 0)
        _require_whole(self, "visits", 1)
        _require_whole(self, "slices", 1, 22)
        if not isinstance(self.recipe, Mapping):
            raise StudyError(f"data: expected recipe as a table, got {self.recipe!r}")

    def _recipe(self) -> Any:
        from fastinstance.study.brain import LesionRecipe

        defaults = {one.name: one.default for one in dataclasses.fields(LesionRecipe)}
        for name, value in self.recipe.items():
            if name not in defaults:
                raise StudyError(f"data.recipe: unknown key {name!r}, expected some of {', '.join(defaults)}")
            if not isinstance(defaults[name], tuple):
                right, expected = _all_of([value], _NUMBER) and 0 <= value < math.inf, "a number of at least 0"
            elif name.endswith("_volume"):
                right = _all_of(value, _NUMBER, 2) and 0 < value[0] < math.inf and 0 <= value[1] < math.inf
                expected = "[median in mL, standard deviation of the logarithm]"
            else:
                right = _all_of(value, _NUMBER, 2) and 0 <= value[0] <= value[1] < math.inf
                expected = "[low, high], numbers of at least 0"
            if not right:
                raise StudyError(f"data.recipe: expected {name} as {expected}, got {value!r}")
        given: dict[str, Any] = {n: tuple(v) if isinstance(v, Sequence) else v for n, v in self.recipe.items()}
        return LesionRecipe(**given)

    def items(self) -> list[Item]:
        from fastinstance.study import brain

        recipe = self._recipe()
        try:
            template = brain.template_files()
        except (FileNotFoundError, ModuleNotFoundError) as error:
            raise StudyError(f"data: {error}") from error
        width = max(3, len(str(self.subjects - 1)))

        def generate(number: int, visit: int) -> Scan:
            try:
                made = brain.generate((self.seed, number), slices=self.slices, recipe=recipe, visit=visit)
            except ValueError as error:  # more lesions than there are places
                raise StudyError(f"cannot be generated with this recipe: {error}") from error
            return Scan(made.image[None], made.lesions.astype(np.uint8), brain.SPACING)

        def item(number: int, visit: int) -> Item:
            person = f"brain-{self.seed}-{number:0{width}}"
            options = {"version": brain.VERSION, "seed": [self.seed, number], "visit": visit, "slices": self.slices}
            return Item(
                name=person if self.visits == 1 else f"{person}-visit-{visit + 1}",
                person=person,
                files=template,
                options=options | {"recipe": dataclasses.asdict(recipe)},
                read=partial(generate, number, visit),
                allow_empty=True,
            )

        return [item(number, visit) for number in range(self.subjects) for visit in range(self.visits)]


@dataclass(frozen=True, kw_only=True)
class Nuclei(Source):
    """The annotated fluorescence image of the stardist wheel, cut into tiles that each stand for a person.

    Its ids are kept: nuclei that touch are told apart. What does not fill a tile is left out on all sides alike.
    """

    tile: int = 128
    """Rows and columns of a tile; the image has 512 of each."""

    packages = ("PIL",)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_whole(self, "tile", 8)

    def items(self) -> list[Item]:
        spec = find_spec("stardist")
        if spec is None or not spec.submodule_search_locations:
            raise StudyError(
                "data: source nuclei is read from the stardist package: pip install --no-deps stardist "
                "(nothing of it is imported)"
            )
        folder = Path(spec.submodule_search_locations[0]) / "data" / "images"
        image, mask = folder / "img2d.tif", folder / "mask2d.tif"
        for path in (image, mask):
            if not path.is_file():
                raise StudyError(f"data: this stardist has no annotated nuclei at {path}; install stardist 0.9.2")
        pillow = files.need("PIL.Image", "reading TIFF files")
        try:
            with pillow.open(image) as opened:
                width, height = opened.size
        except OSError as error:
            raise StudyError(f"data: {image}: cannot be read ({error})") from error
        down, across = height // self.tile, width // self.tile
        if not down or not across:
            raise StudyError(f"data: expected tile of at most {min(height, width)}, got {self.tile}")
        top, left = (height - down * self.tile) // 2, (width - across * self.tile) // 2

        def item(row: int, column: int) -> Item:
            name = f"nuclei-{row:02}-{column:02}"
            y, x = top + row * self.tile, left + column * self.tile
            return Item(
                name=name,
                person=name,
                files=(image, mask),
                options={"y": y, "x": x, "tile": self.tile},
                read=partial(_cut, image, mask, np.s_[y : y + self.tile, x : x + self.tile]),
                instances=True,
                allow_empty=True,
            )

        return [item(row, column) for row in range(down) for column in range(across)]


def _cut(image: Path, mask: Path, where: tuple[slice, slice]) -> Scan:
    """A tile of a plane and of its ids."""
    volumes = files.read(image), files.read(mask)
    files.require_same_grid(volumes, spacing_given=True)
    return Scan(volumes[0].data[where][None, None], files.integers(volumes[1])[where][None])


@dataclass(frozen=True, kw_only=True)
class Tnbc(Source):
    """Stained breast-cancer tissue: `Slide_XX/*.png` and masks of the same name in `GT_XX/`; XX is the person."""

    folder: str | Path
    grey: bool = False
    """One channel instead of red, green and blue."""
    instances: bool = False
    """The masks hold ids; otherwise nuclei that touch are one instance."""
    allow_empty: bool = False

    packages = ("PIL",)

    def __post_init__(self) -> None:
        super().__post_init__()
        _folder(self.folder)
        for name in ("grey", "instances", "allow_empty"):
            _require_flag(self, name)

    def items(self) -> list[Item]:
        folder = _folder(self.folder)
        images = {(path.parent.name[6:], path.name): path for path in sorted(folder.glob("Slide_*/*.png"))}
        masks = {(path.parent.name[3:], path.name): path for path in sorted(folder.glob("GT_*/*.png"))}
        if not images:
            raise StudyError(f"data: {folder}: expected images as Slide_XX/*.png and masks as GT_XX/*.png, found none")
        made = []
        for key in sorted({*images, *masks}):
            slide, file = key
            image, mask = images.get(key), masks.get(key)
            stem = file[: -len(".png")]
            name = stem if stem.startswith(f"{slide}_") else f"{slide}_{stem}"
            if image is None or mask is None:
                lacking = f"Slide_{slide}" if image is None else f"GT_{slide}"
                made.append(Item(name, slide, problem=f"{image or mask} has no counterpart in {lacking}"))
            else:
                made.append(
                    Item(
                        name=name,
                        person=slide,
                        files=(image, mask),
                        options={"grey": self.grey},
                        read=partial(self._read, image, mask),
                        instances=self.instances,
                        allow_empty=self.allow_empty,
                    )
                )
        return made

    def _read(self, image: Path, mask: Path) -> Scan:
        colours = _colours(image)
        truth = files.integers(files.read(mask, grey=True))
        if truth.shape != colours.shape[:2]:
            raise FileError(f"expected one shape, got {colours.shape[:2]} of {image} and {truth.shape} of {mask}")
        if not self.instances:
            truth = _two_values(truth, mask)
        channels = np.moveaxis(colours, -1, 0)
        if self.grey:
            channels = files.read(image, grey=True).data[None]
        return Scan(channels[:, None], truth[None])


def _colours(path: Path) -> NDArray[np.uint8]:
    """Red, green and blue `[Y, X, 3]` of a picture; what it says about transparency is dropped."""
    pillow = files.need("PIL.Image", "reading PNG files")
    try:
        with pillow.open(path) as image:
            return np.array(image.convert("RGB"))
    except Exception as error:  # each decoder fails on damaged files in its own ways
        raise FileError(f"{path}: cannot be read ({type(error).__name__}: {' '.join(str(error).split())})") from error


def _two_values(truth: NDArray[Any], path: Path) -> NDArray[np.uint8]:
    """0 and 1 from a mask whose foreground has any one value."""
    values = np.unique(truth)
    if len(values) > 2 or (len(values) == 2 and values[0] != 0):
        raise FileError(
            f"{path}: expected 0 and one other value, got {len(values)} values from {values[0]} to {values[-1]}; "
            "set instances = true if they are ids of instances"
        )
    return (truth != 0).astype(np.uint8)


class _Values(NamedTuple):
    """What the values of a mask mean."""

    foreground: Sequence[int] | None = None
    """Those of the lesions; None is any one value."""
    ignored: Sequence[int] = ()
    """Those of what is not annotated."""
    instances: bool = False
    """All others are ids of instances."""

    def truth(self, annotation: NDArray[Any], path: Path) -> NDArray[Any]:
        """Ids, or 1 for lesions, from an annotation without what is ignored."""
        if self.instances:
            if annotation.min() < 0:
                raise FileError(f"{path}: expected ids of instances of at least 0, got {annotation.min()}")
            return annotation.astype(np.int64)
        if self.foreground is None:
            try:
                return _two_values(annotation, path)
            except FileError as error:
                raise FileError(f"{error}, or name the classes as foreground = [...] and ignored = [...]") from error
        known = {0, *self.foreground, *self.ignored}
        other = sorted(set(np.unique(annotation).tolist()) - known)
        if other:
            raise FileError(f"{path}: expected the values {sorted(known)}, got {other[:5]} as well")
        return np.isin(annotation, self.foreground).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class _Nifti(Source):
    """What the sources that read NIfTI files can be told."""

    folder: str | Path
    orientation: str = "axial"
    """The slices: "axial", "coronal" or "sagittal"."""
    spacing: Sequence[float] | None = None
    """Voxel size (slice, row, column) in mm instead of the headers'; affines may then differ."""
    allow_empty: bool = False

    packages = ("nibabel",)

    def __post_init__(self) -> None:
        super().__post_init__()
        _folder(self.folder)
        _require_flag(self, "allow_empty")
        if self.orientation not in ORIENTATIONS:
            raise StudyError(f"data: expected orientation as {', '.join(ORIENTATIONS)}, got {self.orientation!r}")
        sizes = self.spacing
        if sizes is not None and not (_all_of(sizes, _NUMBER, 3) and min(sizes) > 0 and max(sizes) < math.inf):
            raise StudyError(f"data: expected spacing as three numbers above 0, in mm, got {self.spacing!r}")

    def _item(self, name: str, person: str, images: Sequence[Path], mask: Path, values: _Values) -> Item:
        return Item(
            name=name,
            person=person,
            files=(*images, mask),
            options={"orientation": self.orientation, "spacing": self.spacing, "values": values},
            read=partial(self._read, images, mask, values),
            instances=values.instances,
            allow_empty=self.allow_empty,
        )

    def _read(self, images: Sequence[Path], mask: Path, values: _Values) -> Scan:
        """The channels and the mask on one grid, slices first.

        Axes are flipped and exchanged, by the affine of the first image, so that slices go to the head, rows to the
        front and columns to the person's right (axial); nothing is resampled.
        """
        volumes = [files.read(path) for path in (*images, mask)]
        for volume in volumes:
            if volume.data.ndim != 3:
                raise FileError(f"{volume.path}: expected a volume with 3 axes, got the shape {volume.data.shape}")
        files.require_same_grid(volumes, spacing_given=self.spacing is not None)
        order, flipped = _to_anatomy(volumes[0], ORIENTATIONS[self.orientation])

        def turn(data: NDArray[Any]) -> NDArray[Any]:
            return np.flip(data.transpose(order), flipped)

        image = np.stack([turn(volume.data) for volume in volumes[:-1]])
        annotation = turn(files.integers(volumes[-1]))
        skipped = np.isin(annotation, values.ignored)
        truth = values.truth(np.where(skipped, 0, annotation), mask)
        if self.spacing is not None:
            spacing = tuple(map(float, self.spacing))
        else:
            sizes = volumes[0].spacing
            assert sizes is not None
            spacing = tuple(sizes[axis] for axis in order)
        if not (min(spacing) > 0 and max(spacing) < math.inf):
            raise FileError(f"{volumes[0].path}: expected voxel sizes above 0, got {spacing}; set spacing")
        return Scan(image, truth, (spacing[0], spacing[1], spacing[2]), ~skipped if skipped.any() else None)


def _to_anatomy(volume: Volume, wanted: tuple[int, int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The file's axes in the order slice, row, column, and which of the three must then be reversed."""
    orientations = files.need("nibabel.orientations", "reading NIfTI files")
    affine = volume.affine
    assert affine is not None
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise FileError(f"{volume.path}: expected an affine that gives every axis a direction, got {affine.tolist()}")
    found = orientations.io_orientation(affine)
    axis_of = {int(anatomical): axis for axis, (anatomical, _) in enumerate(found)}
    order = tuple(axis_of[anatomical] for anatomical in wanted)
    return order, tuple(i for i, axis in enumerate(order) if found[axis, 1] < 0)


@dataclass(frozen=True, kw_only=True)
class Wmh(_Nifti):
    """The WMH Segmentation Challenge: folders, at any depth, with `pre/FLAIR.nii.gz` and `wmh.nii.gz`.

    Label 1 is the lesions; label 2, other pathology, is left out of all that is computed.
    """

    channels: Sequence[str] = ("FLAIR",)
    """Scans in `pre/`, such as "FLAIR" and "T1"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _all_of(self.channels, str) or not self.channels:
            raise StudyError(f'data: expected channels as a list such as ["FLAIR", "T1"], got {self.channels!r}')

    def items(self) -> list[Item]:
        folder = _folder(self.folder)
        masks = {path.parent: path for path in folder.glob("**/wmh.nii.gz")}
        scans = {path.parents[1]: path for path in folder.glob(f"**/pre/{self.channels[0]}.nii.gz")}
        if not masks:
            raise StudyError(
                f"data: {folder}: expected folders with pre/{self.channels[0]}.nii.gz and wmh.nii.gz, found none"
            )
        made = []
        for place in sorted({*masks, *scans}):
            name = place.relative_to(folder).as_posix()
            if place not in masks:
                made.append(Item(name, name, problem=f"no such file: {place / 'wmh.nii.gz'}"))
                continue
            images = [place / "pre" / f"{channel}.nii.gz" for channel in self.channels]
            made.append(self._item(name, name, images, masks[place], _Values([1], [2])))
        return made


@dataclass(frozen=True, kw_only=True)
class NiftiPairs(_Nifti):
    """Images and masks by pattern; what `*` stands for is the same on both sides, and names the subject."""

    images: str | Sequence[str]
    """A pattern below the folder, or several, one a channel: `*/flair.nii.gz`."""
    masks: str
    person: str | None = None
    """A regular expression whose group is the person in a name: `(sub-[^_]+)`; without it a subject is a person."""
    instances: bool = False
    """The masks hold ids of instances."""
    foreground: Sequence[int] | None = None
    """The values of the mask that are lesion; needed where it has several."""
    ignored: Sequence[int] = ()
    """The values of the mask that mark what is not annotated."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_flag(self, "instances")
        patterns = [*self._channels(), self.masks]
        if not _all_of(patterns, str) or len(patterns) < 2:
            raise StudyError(f"data: expected images and masks as patterns such as '*/flair.nii.gz', got {patterns!r}")
        for pattern in patterns:
            if Path(pattern).is_absolute() or "*" not in pattern or not pattern.endswith((".nii.gz", ".nii")):
                raise StudyError(
                    "data: expected a pattern below the folder that has a * for the subject and ends in .nii.gz or "
                    f".nii, got {pattern!r}"
                )
        stars = {pattern: len(_expression(pattern).groupindex) for pattern in patterns}
        if len(set(stars.values())) > 1:
            raise StudyError(f"data: expected as many * in each pattern, got {' and '.join(map(repr, stars))}")
        if self.person is not None:
            try:
                groups = re.compile(self.person).groups
            except (re.error, TypeError) as error:
                raise StudyError(f"data: person = {self.person!r} is no regular expression: {error}") from error
            if groups != 1:
                raise StudyError(f"data: expected person with one group (...), got {self.person!r}")
        for name in ("foreground", "ignored"):
            value = getattr(self, name)
            if value is not None and not _all_of(value, int):
                raise StudyError(f"data: expected {name} as a list of whole numbers, got {value!r}")
        if self.instances and self.foreground is not None:
            raise StudyError("data: expected either instances = true or foreground = [...], got both")

    def _channels(self) -> list[str]:
        return [self.images] if isinstance(self.images, str) else list(self.images)

    def items(self) -> list[Item]:
        folder = _folder(self.folder)
        channels = self._channels()
        found = [_matching(folder, pattern) for pattern in (*channels, self.masks)]
        for pattern, here in zip((*channels, self.masks), found, strict=True):
            if not here:
                raise StudyError(f"data: {folder}: no file matches {pattern!r}")
        made = []
        for key in sorted(set().union(*found)):
            name = "-".join(filter(None, key))
            person = self._person(name)
            lacking = [p for p, here in zip((*channels, self.masks), found, strict=True) if key not in here]
            several = [here[key] for here in found if len(here.get(key, ())) > 1]
            if lacking:
                problem = f"no file matches {' or '.join(map(repr, lacking))}"
            elif several:
                problem = f"expected one file, got {' and '.join(map(str, several[0]))}"
            elif person is None:
                problem = f"person = {self.person!r} is nowhere in the name"
            else:
                paths = [here[key][0] for here in found]
                values = _Values(self.foreground, self.ignored, self.instances)
                made.append(self._item(name, person, paths[:-1], paths[-1], values))
                continue
            made.append(Item(name, person or name, problem=problem))
        return made

    def _person(self, name: str) -> str | None:
        if self.person is None:
            return name
        match = re.search(self.person, name)
        return match[1] if match else None


def _expression(pattern: str) -> re.Pattern[str]:
    """A file pattern as a regular expression with a group for each wildcard."""
    number = iter(range(len(pattern)))
    parts = re.split(r"(\*\*/|\*|\?)", pattern)
    wild = {"**/": r"(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    text = "".join(f"(?P<_{next(number)}>{wild[part]})" if part in wild else re.escape(part) for part in parts)
    return re.compile(text)


def _matching(folder: Path, pattern: str) -> dict[tuple[str, ...], list[Path]]:
    """The files that match, by what the wildcards stand for."""
    expression = _expression(pattern)
    found: dict[tuple[str, ...], list[Path]] = {}
    for path in sorted(folder.glob(pattern)):
        place = path.relative_to(folder)
        match = expression.fullmatch(place.as_posix())
        hidden = any(part.startswith(".") for part in place.parts)
        if match is not None and path.is_file() and not hidden:
            found.setdefault(tuple(part.strip("/") for part in match.groups()), []).append(path)
    return found


SOURCES: dict[str, type[Source]] = {
    "brain": Brain,
    "nuclei": Nuclei,
    "wmh": Wmh,
    "tnbc": Tnbc,
    "nifti": NiftiPairs,
}
