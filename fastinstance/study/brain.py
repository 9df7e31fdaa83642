"""Brain slices with generated white-matter lesions, whose true outlines are therefore known.

The anatomy is the MNI152 template (T1, grey- and white-matter maps, 1 mm) that the nilearn wheel ships. It is read
from the installed wheel, without importing nilearn and without downloading anything. Every subject bends that anatomy
differently, gives it a FLAIR-like contrast (grey matter bright, fluid dark) and grows lesions in the white matter:
caps and thin rims along the lateral ventricles, a few large blobs near them, and many small ones. Most connected
components of a slice are far below 0.05 mL and a few exceed 1 mL, as in the ADNI lesions of Rachmadi et al. (2024,
Fig. 8). Bright spots that are not lesions make false detections possible. At later visits of a subject its lesions
are still there, some have grown and new ones have appeared.

What it is not: a substitute for patients. There is one template brain, lesions do not depend on each other, and the
outlines are exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from nibabel.nifti1 import Nifti1Image
from numpy.typing import NDArray
from scipy import ndimage

FloatArray = NDArray[np.floating]
BoolArray = NDArray[np.bool_]

SPACING = (3.0, 1.0, 1.0)
"""Voxel size (slice, row, column) of a subject in mm."""
VOXEL_ML = math.prod(SPACING) / 1000
"""Volume of one voxel of a subject in mL."""
VERSION = 1
"""Raised when the same seed gives another subject than before."""
MAX_SLICES = 22
"""Slices a subject has at most."""

_SLAB = 3  # template slices (1 mm) averaged into one slice of a subject
_FRAME = np.s_[36:144, 21:213, 19:179]  # template voxels (z, y, x) kept while tissues are told apart
_LESION_LAYERS = np.s_[16:92]  # layers of that frame, 20 mm below to 56 mm above the anterior commissure, that are used
_IN_LATERAL_VENTRICLE = (22, -20, 18)  # a point in MNI coordinates (z, y, x), mm
_BACKGROUND = -3.0  # intensity outside the head
_COARSE = 2  # mm: lesion centres and distances to the ventricles live on a grid of this spacing


class Subject(NamedTuple):
    """One generated subject; the arrays have the shape [slices, 192, 160] and voxels of `SPACING` mm."""

    image: FloatArray
    """FLAIR-like: mean 0 and standard deviation 1 in the brain, then cut off at -3 and 5; -3 outside."""
    lesions: BoolArray
    """True lesion mask; in every slice its 8-connected components have at least two pixels."""
    white: FloatArray
    """Fraction of white matter in each voxel, had there been no lesion."""


@dataclass(frozen=True)
class LesionRecipe:
    """How many lesions a subject gets and how they look.

    Ranges are uniform; a volume is log-normal, given by its median in mL and the standard deviation of its logarithm.
    Contrast is added to white matter at 0.78 on a scale where grey matter is 1.
    """

    load: tuple[float, float] = (0.5, 1.8)  # multiplies the number of lesions and the width of the rims
    small_count: tuple[float, float] = (50, 170)
    small_volume: tuple[float, float] = (0.022, 0.6)
    small_contrast: tuple[float, float] = (0.12, 0.48)
    medium_per_small: float = 0.2
    medium_volume: tuple[float, float] = (0.10, 0.7)
    medium_contrast: tuple[float, float] = (0.20, 0.50)
    large_count: float = 4.0  # mean of a Poisson distribution, before the load
    large_volume: tuple[float, float] = (0.90, 0.8)
    large_contrast: tuple[float, float] = (0.32, 0.65)
    rim_contrast: tuple[float, float] = (0.30, 0.50)
    faint_count: tuple[float, float] = (20, 60)  # soft spots in white matter that are not lesions
    noise: tuple[float, float] = (0.035, 0.060)  # standard deviation of the Rician noise
    growing: float = 0.5  # share of the lesions that grow from visit to visit
    growth: tuple[float, float] = (0.1, 0.4)  # mm by which the surface of such a lesion moves outwards between visits
    new_count: float = 6.0  # mean of a Poisson distribution: small lesions that appear between two visits


@dataclass(frozen=True)
class _Anatomy:
    """The template, or a subject's bent copy of it; arrays [Z, Y, X] on the 1 mm grid."""

    flair: FloatArray  # contrast like FLAIR without lesions, grey matter about 1
    white: FloatArray  # fraction of white matter
    ventricles: BoolArray  # the lateral ventricles
    brain: FloatArray  # 1 inside the head's brain mask
    midline: FloatArray  # distance to the plane between the hemispheres, mm


def template_files() -> tuple[Path, Path, Path]:
    """The template's T1, white- and grey-matter maps in the nilearn wheel.

    Raises:
        ModuleNotFoundError, FileNotFoundError: nilearn, which brings the template, is missing or has none.
    """
    spec = find_spec("nilearn")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "the MNI152 template is read from the nilearn package: pip install nilearn", name="nilearn"
        )
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    t1, white, grey = (folder / f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz" for kind in ("t1", "wm", "gm"))
    for path in (t1, white, grey):
        if not path.is_file():
            raise FileNotFoundError(f"this nilearn has no MNI152 template at {path}; install nilearn 0.11 or newer")
    return t1, white, grey


def _read_map(path: Path) -> tuple[FloatArray, NDArray[np.float64]]:
    """A map of the template: values in [0, 1], [Z, Y, X], and its affine."""
    image = Nifti1Image.from_filename(path)
    values = np.asarray(image.dataobj, dtype=np.float32).transpose(2, 1, 0) / 255
    affine = image.affine
    assert affine is not None
    return values, affine


def _distance(mask: BoolArray) -> FloatArray:
    """Distance of every voxel of `mask` to the nearest one outside, in voxels."""
    return np.asarray(ndimage.distance_transform_edt(mask))


@lru_cache(maxsize=1)
def _template() -> tuple[_Anatomy, FloatArray]:
    """The template's anatomy, and a field [2, Z, Y, X] (rows, columns) that points towards the ventricles."""
    (t1, affine), (white, _), (grey, _) = map(_read_map, template_files())
    to_mm = affine[[2, 1, 0], 3] + np.array([part.start for part in _FRAME])  # MNI coordinate of the frame's voxel 0
    t1, white, grey = t1[_FRAME], white[_FRAME], grey[_FRAME]
    brain = t1 > 0.1

    # The lateral ventricles: dark and deep, sulci cut off by an opening of 2 mm.
    deep = _distance(np.asarray(ndimage.binary_fill_holes(brain), bool)) > 20
    fluid = (t1 < 0.6) & deep
    core = _distance(fluid) > 2
    opened = (_distance(~core) <= 2.5) & fluid
    components = np.zeros(opened.shape, np.int32)
    ndimage.label(opened, output=components)
    seed = tuple((np.array(_IN_LATERAL_VENTRICLE) - to_mm).astype(int))
    ventricles = components == components[seed]
    pull = ndimage.gaussian_filter(ventricles.astype(np.float32), 4)
    towards = np.stack([np.gradient(pull, axis=axis) for axis in (1, 2)])

    # Contrast: grey over white matter, dark fluid; the template's own fine structure is kept inside white matter.
    fluid_share = np.clip((0.55 - t1) / 0.25, 0, 1) * brain
    neither = np.clip(1 - white - grey, 0, None) * brain
    flair = (0.78 * white + grey * (1 - fluid_share) + 0.10 * neither) * (1 - 0.75 * fluid_share)
    flair -= 0.25 * (t1 - ndimage.gaussian_filter(t1, 3)) * (white > 0.5)

    columns = np.abs(np.arange(t1.shape[2], dtype=np.float32) + np.float32(to_mm[2]))
    layers = _LESION_LAYERS
    anatomy = _Anatomy(
        flair=flair[layers].astype(np.float32),
        white=white[layers],
        ventricles=ventricles[layers],
        brain=brain[layers].astype(np.float32),
        midline=np.broadcast_to(columns, t1[layers].shape).astype(np.float32),
    )
    return anatomy, towards[:, layers]


def _smooth_noise(rng: np.random.Generator, shape: Sequence[int], grain: float | Sequence[float]) -> FloatArray:
    """Noise of unit variance at the knots of a grid with spacing `grain` (voxels), linear in between."""
    grains = np.broadcast_to(np.asarray(grain, dtype=float), len(shape))
    knots = [max(2, round(size / g) + 1) for size, g in zip(shape, grains, strict=True)]
    values = torch.from_numpy(rng.standard_normal(knots, dtype=np.float32))
    return F.interpolate(values[None, None], size=tuple(shape), mode="trilinear", align_corners=True)[0, 0].numpy()


def _bend(template: _Anatomy, towards: FloatArray, rng: np.random.Generator) -> _Anatomy:
    """A subject's anatomy: smooth in-plane deformation, wider ventricles, another size, place and handedness."""
    height, width = template.flair.shape[1:]
    wobble = np.stack([_smooth_noise(rng, template.flair.shape, 24) for _ in range(2)]) * rng.uniform(1.0, 2.4)
    shift = wobble + rng.uniform(15, 60) * towards
    scale, offset = rng.uniform(0.94, 1.05, 2), rng.uniform(-4, 4, 2)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    rows = (y - height / 2) / scale[0] + height / 2 + offset[0] + shift[0]
    columns = (x - width / 2) / scale[1] + width / 2 + offset[1] + shift[1]
    if rng.random() < 0.5:
        columns = columns[..., ::-1]
    grid = np.stack([columns / (width - 1) * 2 - 1, rows / (height - 1) * 2 - 1], axis=-1).astype(np.float32)
    maps = [template.flair, template.white, template.ventricles, template.brain, template.midline]
    source = torch.from_numpy(np.stack(maps, axis=1).astype(np.float32))  # [Z, 5, Y, X]
    bent = F.grid_sample(source, torch.from_numpy(grid), align_corners=True).numpy()
    flair, white, ventricles, brain, midline = np.moveaxis(bent, 1, 0)
    return _Anatomy(flair, white, ventricles > 0.5, brain, midline)


@dataclass
class _Canvas:
    """Blobs painted over each other: how much of a voxel they fill, and the contrast of the one that fills most."""

    shape: tuple[int, ...]
    share: FloatArray = field(init=False)
    contrast: FloatArray = field(init=False)

    def __post_init__(self) -> None:
        self.share = np.zeros(self.shape, np.float32)
        self.contrast = np.zeros(self.shape, np.float32)

    def paint(self, where: tuple[slice, ...], share: FloatArray, contrast: float) -> None:
        """Lays a blob over what is there; it wins where it fills more of the voxel."""
        wins = share > self.share[where]
        self.contrast[where][wins] = contrast
        self.share[where][wins] = share[wins]

    def blob(
        self,
        rng: np.random.Generator,
        centre: NDArray[np.integer],
        volume: float,
        contrast: float,
        *,
        room: FloatArray | None,
        tall: float = 1.0,
        roughness: float = 0.35,
        softness: float,
        growth: float = 0.0,
    ) -> None:
        """Paints an ellipsoid of `volume` mL with an uneven surface, randomly stretched and turned.

        `room` [Z, Y, X] in [0, 1] cuts the blob off where it must not grow, `tall` stretches its first axis,
        `roughness` is the surface's unevenness in radii and `softness` the width of its edge in mm. `growth` moves
        the surface outwards by so many mm; what is drawn from `rng` does not depend on it.
        """
        radius = (3 * volume * 1000 / (4 * math.pi)) ** (1 / 3)
        stretch = np.exp(rng.normal(0, 0.28, 3))
        stretch /= np.prod(stretch) ** (1 / 3)
        stretch[0] *= tall
        turn = np.linalg.qr(rng.standard_normal((3, 3)))[0]
        reach = math.ceil(radius * stretch.max() * 1.5 + 3)
        low, high = np.maximum(centre - reach, 0), np.minimum(centre + reach + 1, self.shape)
        where = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
        exact = centre + rng.uniform(-0.5, 0.5, 3)
        axes = (np.arange(s.start, s.stop) - c for s, c in zip(where, exact, strict=True))
        offsets = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
        distance = np.linalg.norm((offsets @ turn) / (stretch * radius), axis=-1)  # 1 on the ellipsoid
        bumps = roughness * _smooth_noise(rng, distance.shape, min(max(radius * 0.55, 1.0), 5.0))
        share = _soft_step(((1 + bumps - distance) * radius + growth) / softness)
        self.paint(where, share if room is None else share * room[where], contrast)


def _soft_step(x: FloatArray) -> FloatArray:
    return 1 / (1 + np.exp(-np.clip(x, -30, 30)))


def _volumes(rng: np.random.Generator, volume: tuple[float, float], count: int, low: float, high: float) -> FloatArray:
    median, spread = volume
    return np.clip(np.exp(rng.normal(math.log(median), spread, count)), low, high).astype(np.float32)


@dataclass(frozen=True)
class _Visits:
    """What happens to a subject between its visits; drawn apart from what the first visit shows."""

    seed: int | Sequence[int]
    visit: int

    def generator(self, *key: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))

    def growth(self, recipe: LesionRecipe) -> Iterator[float]:
        """How far the surface of one lesion after the other has moved since the first visit, mm."""
        rng = self.generator(0)
        while True:
            grows, rate = rng.random() < recipe.growing, rng.uniform(*recipe.growth)
            yield self.visit * rate * grows


def _grow_lesions(
    anatomy: _Anatomy, recipe: LesionRecipe, rng: np.random.Generator, visits: _Visits
) -> tuple[_Canvas, _Canvas]:
    """Lesions, and bright spots that are none, in a subject's anatomy."""
    shape = anatomy.white.shape
    coarse = (slice(None, None, _COARSE),) * 3
    white = anatomy.white[coarse]
    to_ventricle = _COARSE * _distance(~anatomy.ventricles[coarse])
    to_edge = _COARSE * _distance(white > 0.6)
    inside = np.zeros(white.shape, bool)
    inside[2:-2] = True  # no centre near the first and last layers, where half of a blob would be lost

    # Lesions stay in white matter and off the midline: they do not cross the corpus callosum.
    room = np.clip((anatomy.white - 0.35) / 0.3, 0, 1) * np.clip((anatomy.midline - 8) / 4, 0, 1)
    candidate = (white > 0.75) & inside & (anatomy.midline[coarse] > 11)
    centres = _COARSE * np.argwhere(candidate)
    near, depth = to_ventricle[candidate], to_edge[candidate]

    def pick(count: int, weight: FloatArray | BoolArray, rng: np.random.Generator = rng) -> NDArray[np.integer]:
        return centres[rng.choice(len(centres), count, replace=False, p=weight / weight.sum())]

    load = rng.uniform(*recipe.load)
    growth = visits.growth(recipe)
    lesions, others = _Canvas(shape), _Canvas(shape)

    # Rims and caps: white matter closer to the ventricles than a width that varies along them, mostly zero.
    distance = np.repeat(np.repeat(np.repeat(to_ventricle, _COARSE, 0), _COARSE, 1), _COARSE, 2)
    distance = ndimage.uniform_filter(distance[tuple(slice(size) for size in shape)], 3)
    wave = _smooth_noise(rng, shape, (18, 20, 20)) - rng.uniform(0.1, 0.8)
    rim_width = 4.5 * np.tanh(0.6 * load * wave)  # mm, thin even under a heavy load
    rim = _soft_step((rim_width + next(growth) - (distance - 1)) / 0.6) * room * ((rim_width > 0.8) & (distance > 0.5))
    lesions.paint((slice(None),) * 3, rim, rng.uniform(*recipe.rim_contrast))

    small = round(rng.uniform(*recipe.small_count) * load**0.5)
    anywhere = (depth > 2.5) * (0.25 + np.exp(-near / 14))
    beside_ventricles = (depth > 3) * np.exp(-np.abs(near - 7) / 5)
    large = rng.poisson(recipe.large_count * load)
    for centre, volume in zip(
        pick(large, beside_ventricles), _volumes(rng, recipe.large_volume, large, 0.15, 8), strict=True
    ):
        contrast = rng.uniform(*recipe.large_contrast)
        moved = next(growth)
        lesions.blob(rng, centre, volume, contrast, room=room, tall=1.3, roughness=0.4, softness=0.9, growth=moved)
    medium = round(small * recipe.medium_per_small)
    for centre, volume in zip(
        pick(medium, anywhere), _volumes(rng, recipe.medium_volume, medium, 0.02, 1), strict=True
    ):
        contrast = rng.uniform(*recipe.medium_contrast)
        lesions.blob(rng, centre, volume, contrast, room=room, tall=0.7, softness=0.6, growth=next(growth))

    def add_small(count: int, rng: np.random.Generator) -> None:
        for centre, volume in zip(
            pick(count, anywhere, rng), _volumes(rng, recipe.small_volume, count, 0.008, 0.2), strict=True
        ):
            contrast = rng.uniform(*recipe.small_contrast)
            lesions.blob(rng, centre, volume, contrast, room=room, softness=0.5, growth=next(growth))

    add_small(small, rng)

    # Not lesions: faint spots, patches of slightly bright white matter, bright cortex and vessels.
    spots = round(rng.uniform(*recipe.faint_count))
    for centre, volume in zip(pick(spots, depth > 1.5), _volumes(rng, (0.03, 0.6), spots, 0.005, 0.3), strict=True):
        others.blob(rng, centre, volume, rng.uniform(0.05, 0.22), room=room, softness=1.0)
    patches = rng.poisson(6)
    for centre, volume in zip(pick(patches, depth > 2), _volumes(rng, (1.0, 0.6), patches, 0.1, 8), strict=True):
        others.blob(rng, centre, volume, rng.uniform(0.04, 0.12), room=room, softness=2.5)
    cortex = _COARSE * np.argwhere((anatomy.flair[coarse] > 0.8) & (white < 0.3) & inside)
    bright = rng.poisson(14)
    for centre, volume in zip(rng.choice(cortex, bright), _volumes(rng, (0.015, 0.5), bright, 0.003, 0.1), strict=True):
        others.blob(rng, centre, volume, rng.uniform(0.2, 0.55), room=None, softness=0.5)

    for visit in range(1, visits.visit + 1):
        between = visits.generator(1, visit)
        add_small(between.poisson(recipe.new_count), between)
    return lesions, others


def generate(
    seed: int | Sequence[int],
    *,
    slices: int = MAX_SLICES,
    recipe: LesionRecipe | None = None,
    visit: int = 0,
) -> Subject:
    """Generates one subject.

    Args:
        seed: non-negative integer, or several of them such as (seed of the study, number of the subject). The same
            seed gives the same subject, whatever was generated before.
        slices: how many neighbouring slices to keep, around the middle of the 22 there are.
        recipe: lesion counts, sizes and contrasts.
        visit: 0 is the subject's first; at each later one the same lesions, aligned and none smaller, some larger,
            and new ones, under another bias field and other noise.

    Returns:
        Image, true lesions and white matter, each [slices, 192, 160] with voxels of 3 x 1 x 1 mm.

    Raises:
        ValueError: `slices` is not in 1 to 22, or `visit` is negative.
        ModuleNotFoundError, FileNotFoundError: nilearn, which brings the template, is missing or has none.
    """
    if not 1 <= slices <= MAX_SLICES:
        raise ValueError(f"expected slices in 1 to {MAX_SLICES}, got {slices}")
    if visit < 0:
        raise ValueError(f"expected a visit of at least 0, got {visit}")
    recipe = recipe or LesionRecipe()
    rng = np.random.default_rng(seed)
    visits = _Visits(seed, visit)
    template, towards = _template()
    anatomy = _bend(template, towards, rng)
    lesions, others = _grow_lesions(anatomy, recipe, rng, visits)

    share = lesions.share
    texture = 1 + 0.18 * _smooth_noise(rng, share.shape, (4, 3, 3))
    image = anatomy.flair + others.share * others.contrast
    image = image * (1 - share) + share * (0.78 + lesions.contrast * texture)

    start = rng.integers(0, _SLAB)

    def slabs(volume: FloatArray) -> FloatArray:
        count = (len(volume) - start) // _SLAB
        thick = volume[start : start + count * _SLAB].reshape(count, _SLAB, *volume.shape[1:]).mean(1)
        first = (count - slices) // 2
        return thick[first : first + slices]

    image, share, brain, white = slabs(image), slabs(share), slabs(anatomy.brain), slabs(anatomy.white)
    image = ndimage.gaussian_filter(image, (0, 0.45, 0.45))
    if visit > 0:
        rng = visits.generator(2, visit)
    image *= np.exp(0.10 * rng.uniform(0.5, 1.3) * _smooth_noise(rng, image.shape, (12, 48, 48)))
    sigma = rng.uniform(*recipe.noise)
    noise = sigma * rng.standard_normal((2, *image.shape), dtype=np.float32)
    image = np.hypot(image + noise[0], noise[1]) * (brain > 0.5)

    head = image > 0.05
    image = np.clip((image - image[head].mean()) / image[head].std(), _BACKGROUND, 5)
    image[~head] = _BACKGROUND
    return Subject(image.astype(np.float32), _without_specks(share > 0.5), white.astype(np.float32))


def _without_specks(mask: BoolArray) -> BoolArray:
    """`mask` [Z, Y, X] without single pixels that have no neighbour in their slice."""
    neighbours = ndimage.convolve(mask.astype(np.uint8), np.ones((1, 3, 3), np.uint8), mode="constant")
    return mask & (neighbours > 1)
