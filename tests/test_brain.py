"""The generated lesions: their sizes, where they grow, and that a seed gives one subject."""

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from scipy import ndimage

from fastinstance.study import brain

IN_SLICE = np.pad(np.ones((1, 3, 3), int), ((1, 1), (0, 0), (0, 0)))  # 8 neighbours, all in the same slice


@pytest.fixture(scope="module")
def subjects():
    return [brain.generate((0, number)) for number in range(6)]


def volumes(mask, structure):
    """Volumes in mL of the components of a mask."""
    labels, _ = ndimage.label(mask, structure)
    return np.bincount(labels.ravel())[1:] * brain.VOXEL_ML


def test_a_seed_gives_one_subject_whatever_came_before(subjects):
    again = brain.generate((0, 3))
    for one, other in zip(subjects[3], again, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(subjects[3].lesions, subjects[4].lesions)


def test_arrays(subjects):
    assert brain.SPACING == (3.0, 1.0, 1.0)
    assert pytest.approx(0.003) == brain.VOXEL_ML
    for image, lesions, white in subjects:
        assert image.shape == lesions.shape == white.shape == (brain.MAX_SLICES, 192, 160)
        assert (image.dtype, lesions.dtype, white.dtype) == (np.float32, bool, np.float32)
        inside = image[image > -3]
        assert abs(inside.mean()) < 0.2
        assert 0.7 < inside.std() < 1.05
        assert image.max() <= 5
        assert 0 <= white.min() <= white.max() <= 1
        assert not lesions[image == -3].any()


def test_most_lesions_are_tiny_and_a_few_are_large(subjects):
    in_slices = np.concatenate([volumes(s.lesions, IN_SLICE) for s in subjects])
    assert 0.70 < (in_slices < 0.05).mean() < 0.87
    assert in_slices.min() >= 0.006
    solid = np.concatenate([volumes(s.lesions, np.ones((3, 3, 3))) for s in subjects])
    assert 0.68 < (solid < 0.05).mean() < 0.85
    assert 0.005 < (solid >= 1).mean() < 0.05
    assert solid.max() < 20


def test_several_to_dozens_of_lesions_in_a_slice(subjects):
    counts = [ndimage.label(plane, np.ones((3, 3)))[1] for s in subjects for plane in s.lesions]
    assert 6 <= np.median(counts) <= 12
    assert 15 <= max(counts) <= 60
    assert 0.003 < np.mean([s.lesions.mean() for s in subjects]) < 0.012


def test_lesions_grow_in_white_matter(subjects):
    share = np.concatenate([s.white[s.lesions] for s in subjects])
    assert (share > 0.5).mean() > 0.99
    assert share.min() > 0.35


def test_lesions_are_brighter_than_the_white_matter_around_them(subjects):
    for image, lesions, white in subjects:
        healthy = (white > 0.9) & ~ndimage.binary_dilation(lesions, IN_SLICE)
        assert image[lesions].mean() > image[healthy].mean() + 0.5


def test_no_large_lesion_crosses_between_the_hemispheres(subjects):
    middle = slice(78, 82)  # the template's midline; subjects are shifted by at most 4 mm and bent by a few more
    for _, lesions, _ in subjects:
        assert lesions[:, :, middle].sum() * brain.VOXEL_ML < 0.05


def test_fewer_slices_are_the_middle_ones(subjects):
    part = brain.generate((0, 2), slices=4)
    np.testing.assert_array_equal(part.lesions, subjects[2].lesions[9:13])


@pytest.mark.parametrize("slices", [0, -1, brain.MAX_SLICES + 1])
def test_a_wrong_number_of_slices_is_refused(slices):
    with pytest.raises(ValueError, match=f"expected slices in 1 to 22, got {slices}"):
        brain.generate(0, slices=slices)


def test_the_template_is_read_without_importing_nilearn():
    code = "import sys; from fastinstance.study import brain; brain._template(); assert 'nilearn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def forget_template():
    brain._template.cache_clear()
    yield
    brain._template.cache_clear()


def test_without_nilearn_the_error_names_the_package(monkeypatch, forget_template):
    monkeypatch.setattr(brain, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install nilearn"):
        brain.generate(0)


def test_a_nilearn_without_the_template_is_named(monkeypatch, forget_template, tmp_path):
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(brain, "find_spec", lambda name: spec)
    with pytest.raises(FileNotFoundError, match="no MNI152 template"):
        brain.generate(0)


def test_a_later_visit_shows_the_same_person(subjects):
    first, visits = subjects[1], [brain.generate((0, 1), visit=visit) for visit in range(3)]
    for one, other in zip(first, visits[0], strict=True):
        np.testing.assert_array_equal(one, other)
    for before, after in pairwise(visits):
        np.testing.assert_array_equal(before.white, after.white)
        assert not (before.lesions & ~after.lesions).any(), "lesions persist"
        volume, later = (visit.lesions.sum() * brain.VOXEL_ML for visit in (before, after))
        assert 1.03 * volume < later < 1.4 * volume
        inside = before.image > -3
        noise = (after.image - before.image)[inside & ~after.lesions]
        assert 0.05 < noise.std() < 1, "it is another scan"
        assert np.corrcoef(before.image[inside], after.image[inside])[0, 1] > 0.7


def test_between_visits_lesions_grow_and_appear():
    still = brain.LesionRecipe(growing=0, new_count=0)
    growing = brain.LesionRecipe(growing=1, growth=(0.3, 0.3), new_count=0)
    appearing = brain.LesionRecipe(growing=0, new_count=15)
    first = brain.generate(3).lesions

    def added(recipe):
        """Voxels that are new, and how many of the components they belong to have nothing of the first visit."""
        later = brain.generate(3, recipe=recipe, visit=1).lesions
        assert not (first & ~later).any()
        labels, count = ndimage.label(later, np.ones((3, 3, 3)))
        old = np.unique(labels[first])
        return int(later.sum() - first.sum()), count - len(old)

    assert added(still) == (0, 0)
    voxels, appeared = added(growing)
    assert voxels > 0.1 * first.sum()
    assert appeared <= 0.2 * ndimage.label(first, np.ones((3, 3, 3)))[1]  # too small to be seen before
    voxels, appeared = added(appearing)
    assert 0 < voxels < 0.3 * first.sum()
    assert 5 <= appeared <= 30


def test_a_negative_visit_is_refused():
    with pytest.raises(ValueError, match="expected a visit of at least 0, got -1"):
        brain.generate(0, visit=-1)
