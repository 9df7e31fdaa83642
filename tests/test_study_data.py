"""Data sets of the study: what every source reads, what all subjects hold, the cache, and the one-line errors."""

import itertools
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from nibabel import affines, orientations
from PIL import Image
from scipy import ndimage

from fastinstance.study import brain, data
from fastinstance.study.subjects import StudyError

AXIAL = np.diag([1.0, 1.2, 3.0, 1.0])  # x, y, z of a file that already lies as the subjects do


def save_nifti(path, array, affine=AXIAL):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def save_picture(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def scan(seed, shape=(12, 10, 4)):
    """Intensities, and a mask with a few components, in the order x, y, z."""
    rng = np.random.default_rng(seed)
    image = rng.normal(300, 50, shape).astype(np.float32)
    mask = ndimage.uniform_filter(rng.random(shape), 2) > 0.62
    assert mask.any()
    return image, mask.astype(np.uint8)


def pairs(folder, names=("a", "b", "c")):
    """A folder `<name>/flair.nii.gz`, `<name>/mask.nii.gz`, and its settings."""
    for seed, name in enumerate(names):
        image, mask = scan(seed)
        save_nifti(folder / name / "flair.nii.gz", image)
        save_nifti(folder / name / "mask.nii.gz", mask)
    return {"source": "nifti", "folder": str(folder), "images": "*/flair.nii.gz", "masks": "*/mask.nii.gz"}


def assert_whole(subjects):
    """What every subject promises, whatever it was read from."""
    assert len({subject.name for subject in subjects}) == len(subjects)
    for subject in subjects:
        size = subject.target.shape
        assert subject.image.shape[1:] == subject.labels.shape == size
        assert (subject.image.dtype, subject.target.dtype, subject.labels.dtype) == (
            torch.float32,
            torch.bool,
            torch.int32,
        )
        for channel in subject.image.double():
            assert abs(channel.mean()) < 1e-5
            assert abs(channel.var(correction=0) - 1) < 1e-5
        torch.testing.assert_close(subject.labels > 0, subject.target)
        for plane in subject.labels:
            ids = plane[plane > 0].unique()
            torch.testing.assert_close(ids, torch.arange(1, len(ids) + 1, dtype=torch.int32))
        if subject.valid is not None:
            assert subject.valid.shape == size
            assert subject.valid.dtype == torch.bool
            assert not (subject.target & ~subject.valid).any()
        assert len(subject.spacing) == 3


def assert_same(some, others):
    for one, other in zip(some, others, strict=True):
        assert (one.name, one.person, one.spacing) == (other.name, other.person, other.spacing)
        torch.testing.assert_close(one.image, other.image, rtol=0, atol=0)
        torch.testing.assert_close(one.labels, other.labels)
        torch.testing.assert_close(one.target, other.target)
        assert (one.valid is None) == (other.valid is None)
        if one.valid is not None:
            torch.testing.assert_close(one.valid, other.valid)


def refused(settings, match, **options):
    """Loading, and nothing before it, says in one line what is wrong."""
    data.check(settings)
    with pytest.raises(StudyError, match=match) as caught:
        data.load(settings, **options)
    assert "\n" not in str(caught.value)


# brain


def test_brain_subjects_are_the_generated_ones(tmp_path):
    settings = {"source": "brain", "subjects": 2, "seed": 5, "slices": 3}
    data.check(settings)
    subjects = data.load(settings, cache=tmp_path)
    assert_whole(subjects)
    assert [subject.name for subject in subjects] == ["brain-5-000", "brain-5-001"]
    assert [subject.person for subject in subjects] == ["brain-5-000", "brain-5-001"]
    assert subjects[0].spacing == brain.SPACING
    made = brain.generate((5, 1), slices=3)
    np.testing.assert_array_equal(subjects[1].target.numpy(), made.lesions)
    assert np.corrcoef(subjects[1].image.numpy().ravel(), made.image.ravel())[0, 1] > 1 - 1e-6
    assert_same(data.load(settings, cache=tmp_path), subjects)


def test_visits_of_a_person_share_the_person():
    subjects = data.load({"source": "brain", "subjects": 1, "visits": 3, "slices": 4})
    assert_whole(subjects)
    assert [subject.name for subject in subjects] == [f"brain-0-000-visit-{k}" for k in (1, 2, 3)]
    assert {subject.person for subject in subjects} == {"brain-0-000"}
    first, second, third = (subject.target for subject in subjects)
    assert first.sum() < second.sum() < third.sum()
    (alone,) = data.load({"source": "brain", "subjects": 1, "slices": 4})
    torch.testing.assert_close(alone.image, subjects[0].image, rtol=0, atol=0)


def test_a_recipe_changes_the_lesions():
    few = {"small_count": [9, 9], "large_count": 0.0}
    base = {"source": "brain", "subjects": 1, "slices": 4}
    (usual,), (fewer,) = data.load(base), data.load(base | {"recipe": few})
    assert fewer.labels.amax() < usual.labels.amax()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "source brain needs the key subjects"),
        ({"subjects": 0}, "expected subjects as a whole number of at least 1, got 0"),
        ({"subjects": True}, "expected subjects as a whole number of at least 1, got True"),
        ({"subjects": 2, "visits": 1.5}, "expected visits as a whole number"),
        ({"subjects": 2, "slices": 23}, "expected slices as a whole number in 1 to 22, got 23"),
        ({"subjects": 2, "slice": 3}, "takes no key 'slice'; did you mean 'slices'"),
        ({"subjects": 2, "size": [64]}, "expected size = .rows, columns."),
        ({"subjects": 2, "recipe": 3}, "expected recipe as a table"),
        ({"subjects": 2, "recipe": {"lode": [1, 2]}}, "unknown key 'lode', expected some of load,"),
        ({"subjects": 2, "recipe": {"load": [2, 1]}}, "expected load as .low, high."),
        ({"subjects": 2, "recipe": {"load": float("nan")}}, "expected load as .low, high."),
        ({"subjects": 2, "recipe": {"small_volume": [0, 1]}}, "expected small_volume as .median in mL"),
        ({"subjects": 2, "recipe": {"large_count": -1}}, "expected large_count as a number of at least 0, got -1"),
    ],
)
def test_brain_settings_are_checked(settings, message):
    for attempt in (data.check, data.load):
        with pytest.raises(StudyError, match=message):
            attempt({"source": "brain"} | settings)


def test_a_recipe_that_has_no_place_is_named():
    recipe = {"small_count": [1e6, 1e6]}
    refused({"source": "brain", "subjects": 1, "recipe": recipe}, "^brain-0-000: cannot be generated with this recipe")


def test_no_lesions_at_all_are_refused():
    recipe = {"small_count": [0, 0], "large_count": 0, "medium_per_small": 0, "load": [0, 0]}
    refused({"source": "brain", "subjects": 2, "slices": 2, "recipe": recipe}, "expected instances to learn, got none")


def test_a_missing_template_is_one_line(monkeypatch):
    monkeypatch.setattr(brain, "find_spec", lambda name: None)
    with pytest.raises(StudyError, match="pip install nilearn"):
        data.check({"source": "brain", "subjects": 1})


# nuclei


@pytest.fixture
def stardist(tmp_path, monkeypatch):
    """A package with the images of the wheel that must not be imported; its image has 70 rows and 100 columns."""
    if "stardist" in sys.modules:
        pytest.skip("stardist is imported")
    images = tmp_path / "site" / "stardist" / "data" / "images"
    images.mkdir(parents=True)
    (tmp_path / "site" / "stardist" / "__init__.py").write_text("raise RuntimeError('imported')")
    rng = np.random.default_rng(0)
    ids = np.zeros((70, 100), np.uint16)
    y, x = np.mgrid[:70, :100]
    for number, (row, column) in enumerate(itertools.product(range(8, 70, 12), range(8, 100, 12)), start=1):
        ids[(y - row) ** 2 + (x - column) ** 2 < 37] = 3 * number  # each touches its neighbours
    save_picture(images / "img2d.tif", (rng.random(ids.shape) * 50 + 100 * (ids > 0)).astype(np.uint16))
    save_picture(images / "mask2d.tif", ids)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return images


def test_nuclei_keep_their_ids_in_tiles(stardist, tmp_path):
    settings = {"source": "nuclei", "tile": 32}
    data.check(settings)
    subjects = data.load(settings, cache=tmp_path / "cache")
    assert_whole(subjects)
    assert [subject.name for subject in subjects] == [f"nuclei-{r:02}-{c:02}" for r in range(2) for c in range(3)]
    assert [subject.person for subject in subjects] == [subject.name for subject in subjects]
    ids = np.array(Image.open(stardist / "mask2d.tif"))
    assert subjects[4].target.shape == (1, 32, 32)
    cut = ids[3 + 32 : 3 + 64, 2 + 32 : 2 + 64]  # 6 rows and 4 columns are left over, half of them before
    np.testing.assert_array_equal(subjects[4].target[0].numpy(), cut > 0)
    for number in np.unique(cut[cut > 0]):  # one id a nucleus, though they touch
        assert len(np.unique(subjects[4].labels[0].numpy()[cut == number])) == 1
    assert subjects[4].labels.max() == len(np.unique(cut[cut > 0]))
    assert subjects[4].labels.max() > ndimage.label(cut > 0, np.ones((3, 3)))[1]
    assert_same(data.load(settings, cache=tmp_path / "cache"), subjects)
    assert "stardist" not in sys.modules


def test_nuclei_errors(stardist):
    with pytest.raises(StudyError, match="expected tile of at most 70, got 128"):
        data.check({"source": "nuclei"})
    save_picture(stardist / "mask2d.tif", np.zeros((70, 99), np.uint16))
    refused({"source": "nuclei", "tile": 32}, "^nuclei-00-00: expected one shape, got")
    (stardist / "img2d.tif").write_bytes(b"no picture")
    with pytest.raises(StudyError, match=r"img2d\.tif: cannot be read"):
        data.check({"source": "nuclei", "tile": 32})
    (stardist / "mask2d.tif").unlink()
    with pytest.raises(StudyError, match=r"no annotated nuclei at .*mask2d\.tif"):
        data.check({"source": "nuclei", "tile": 32})


def test_without_stardist_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("fastinstance.study.sources.find_spec", lambda name: None)
    with pytest.raises(StudyError, match="pip install --no-deps stardist"):
        data.check({"source": "nuclei"})


@pytest.mark.skipif(find_spec("stardist") is None, reason="stardist is not installed")
def test_the_nuclei_of_the_wheel():
    subjects = data.load({"source": "nuclei"})
    assert_whole(subjects)
    assert len(subjects) == 16
    (whole,) = data.load({"source": "nuclei", "tile": 512})
    assert whole.labels.max() == 125
    assert ndimage.label(whole.target[0].numpy(), np.ones((3, 3)))[1] < 125


# nifti


def test_nifti_pairs(tmp_path):
    settings = pairs(tmp_path)
    data.check(settings)
    subjects = data.load(settings)
    assert_whole(subjects)
    assert [subject.name for subject in subjects] == ["a", "b", "c"]
    image, mask = scan(1)
    assert subjects[1].spacing == pytest.approx((3.0, 1.2, 1.0))
    assert subjects[1].valid is None
    np.testing.assert_array_equal(subjects[1].target.numpy(), mask.transpose(2, 1, 0) > 0)
    expected = (image - image.mean()) / image.std()
    np.testing.assert_allclose(subjects[1].image[0].numpy(), expected.transpose(2, 1, 0), atol=1e-4)
    for plane, labels in zip(mask.transpose(2, 1, 0), subjects[1].labels, strict=True):
        found, count = ndimage.label(plane, np.ones((3, 3)))
        assert labels.max() == count
        assert len(np.unique(np.stack([found.ravel(), labels.numpy().ravel()]), axis=1).T) == count + 1


def test_every_orientation_gives_the_same_subject(tmp_path):
    image, mask = scan(0)
    expected = data.load(pairs(tmp_path / "straight", ["a"]))[0]
    for axes in itertools.permutations(range(3)):
        for flips in itertools.product((1, -1), repeat=3):
            turned = np.array(list(zip(axes, flips, strict=True)))
            volumes = [orientations.apply_orientation(volume, turned) for volume in (image, mask)]
            affine = AXIAL @ orientations.inv_ornt_aff(turned, image.shape)
            assert affines.voxel_sizes(affine) == pytest.approx(np.array([1.0, 1.2, 3.0])[np.argsort(axes)])
            for name, volume in zip(("flair", "mask"), volumes, strict=True):
                save_nifti(tmp_path / "turned" / "a" / f"{name}.nii.gz", volume, affine)
            settings = pairs(tmp_path / "straight", ["a"]) | {"folder": tmp_path / "turned"}
            (subject,) = data.load(settings)
            assert_same([subject], [expected])


def test_an_orientation_of_choice(tmp_path):
    settings = pairs(tmp_path, ["a"])
    _, mask = scan(0)
    for name, order, spacing in (("coronal", (1, 2, 0), (1.2, 3, 1)), ("sagittal", (0, 2, 1), (1, 3, 1.2))):
        (subject,) = data.load(settings | {"orientation": name})
        np.testing.assert_array_equal(subject.target.numpy(), mask.transpose(order) > 0)
        assert subject.spacing == pytest.approx(spacing)


def test_channels_ids_and_persons(tmp_path):
    for number, name in enumerate(("ann_1", "ann_2", "ben_1")):
        image, mask = scan(number)
        ids = np.where(mask > 0, 7 + 2 * (np.arange(12)[:, None, None] // 3), 0).astype(np.int16)
        save_nifti(tmp_path / "images" / f"{name}_0000.nii.gz", image)
        save_nifti(tmp_path / "images" / f"{name}_0001.nii", image[::-1].copy())
        save_nifti(tmp_path / "labels" / f"{name}.nii.gz", ids)
    settings = {
        "source": "nifti",
        "folder": tmp_path,
        "images": ["images/*_0000.nii.gz", "images/*_0001.nii"],
        "masks": "labels/*.nii.gz",
        "instances": True,
        "person": "^([a-z]+)_",
    }
    data.check(settings)
    subjects = data.load(settings)
    assert_whole(subjects)
    assert [subject.person for subject in subjects] == ["ann", "ann", "ben"]
    assert subjects[0].image.shape == (2, 4, 10, 12)
    torch.testing.assert_close(subjects[0].image[1], subjects[0].image[0].flip(-1))
    band = torch.arange(12) // 3
    for plane in subjects[2].labels:  # ids rise with the columns' band
        present = [int(b) for b in band.unique() if (plane[:, band == b] > 0).any()]
        for number, b in enumerate(present, start=1):
            assert set(plane[:, band == b].unique().tolist()) <= {0, number}


def test_classes_of_a_mask(tmp_path):
    settings = pairs(tmp_path, ["a"])
    _, mask = scan(0)
    mask[0], mask[1] = 5, 9
    save_nifti(tmp_path / "a" / "mask.nii.gz", mask)
    refused(settings, r"^a: .*expected 0 and one other value, got 4 values .*foreground = \[...\]")
    refused(settings | {"foreground": [1]}, r"^a: .*expected the values \[0, 1\], got \[5, 9\] as well")
    (subject,) = data.load(settings | {"foreground": [1, 5], "ignored": [9]})
    assert_whole([subject])
    turned = mask.transpose(2, 1, 0)
    np.testing.assert_array_equal(subject.target.numpy(), (turned == 1) | (turned == 5))
    np.testing.assert_array_equal(subject.valid.numpy(), turned != 9)


def test_deep_patterns_name_the_subject(tmp_path):
    for name in ("x/1", "x/2", "y/1"):
        pairs(tmp_path, [f"site/{name}"])
        image, _ = scan(name.encode()[0] * 10 + name.encode()[2])
        save_nifti(tmp_path / "site" / name / "flair.nii.gz", image)
    save_nifti(tmp_path / "site" / ".hidden" / "flair.nii.gz", image)
    settings = {"source": "nifti", "folder": tmp_path, "images": "**/flair.nii.gz", "masks": "**/mask.nii.gz"}
    assert [subject.name for subject in data.load(settings)] == ["site/x/1", "site/x/2", "site/y/1"]
    settings |= {"images": "site/*/*/flair.nii.gz", "masks": "site/*/*/mask.nii.gz"}
    assert [subject.name for subject in data.load(settings)] == ["x-1", "x-2", "y-1"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"folder": "nowhere"}, "nowhere: no such folder"),
        ({"folder": 3}, "expected folder as a path, got 3"),
        ({"images": "a/flair.nii.gz"}, "a pattern below the folder that has a . for the subject"),
        ({"images": "*/flair.png"}, "ends in .nii.gz or .nii, got"),
        ({"images": "/tmp/*.nii"}, "a pattern below the folder"),
        ({"images": []}, "expected images and masks as patterns"),
        ({"images": "*/*.nii.gz"}, "expected as many . in each pattern"),
        ({"images": "*/t1.nii.gz"}, "no file matches './t1.nii.gz'"),
        ({"masks": "*/lesions.nii.gz"}, "no file matches './lesions.nii.gz'"),
        ({"person": "(a"}, "is no regular expression"),
        ({"person": "a"}, "expected person with one group"),
        ({"foreground": 1}, "expected foreground as a list of whole numbers, got 1"),
        ({"ignored": [1.5]}, "expected ignored as a list of whole numbers"),
        ({"foreground": [1], "instances": True}, "expected either instances = true or foreground"),
        ({"instances": "yes"}, "expected instances = true or false, got 'yes'"),
        ({"allow_empty": 1}, "expected allow_empty = true or false, got 1"),
        ({"orientation": "oblique"}, "expected orientation as axial, coronal, sagittal, got 'oblique'"),
        ({"spacing": [1, 1]}, "expected spacing as three numbers above 0"),
        ({"spacing": [1, 0, 1]}, "expected spacing as three numbers above 0"),
    ],
)
def test_nifti_settings_are_checked(tmp_path, settings, message):
    settings = pairs(tmp_path, ["a"]) | settings
    for attempt in (data.check, data.load):
        with pytest.raises(StudyError, match=message):
            attempt(settings)


# what cannot be used


def truncated(folder):
    path = folder / "b" / "flair.nii.gz"
    path.write_bytes(path.read_bytes()[:300])


def change(name, alter, affine=AXIAL):
    def apply(folder):
        path = folder / "b" / f"{name}.nii.gz"
        save_nifti(path, alter(np.asarray(nibabel.load(path).dataobj)), affine)

    return apply


def with_nan(image):
    image[3, 3, 3] = np.nan
    return image


BAD = {
    "truncated": (truncated, "flair.nii.gz: cannot be read"),
    "no bytes": (lambda folder: (folder / "b" / "mask.nii.gz").write_bytes(b""), "mask.nii.gz: cannot be read"),
    "missing mask": (lambda folder: (folder / "b" / "mask.nii.gz").unlink(), "no file matches './mask.nii.gz'"),
    "missing image": (lambda folder: (folder / "b" / "flair.nii.gz").unlink(), "no file matches './flair.nii.gz'"),
    "shape": (change("mask", lambda mask: mask[:-1]), r"expected one shape, got \(12, 10, 4\) of .* and \(11, 10, 4\)"),
    "affine": (change("mask", lambda mask: mask, np.diag([2.0, 1.2, 3.0, 1])), "expected one affine"),
    "axes": (change("flair", lambda image: image[..., 0]), "expected a volume with 3 axes"),
    "NaN": (change("flair", with_nan), "its image has 1 values that are NaN or infinite"),
    "constant": (change("flair", lambda image: np.full_like(image, 7)), "its image is constant"),
    "darkest": (change("flair", lambda image: np.full(image.shape, -32768, np.int16)), "its image is constant"),
    "probabilities": (change("mask", lambda mask: mask * 0.4), "expected a mask of integers"),
    "empty": (change("mask", np.zeros_like), "its truth is empty; set allow_empty"),
    "full": (change("mask", np.ones_like), "there is no background"),
}


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("what", BAD)
def test_a_bad_subject_is_refused_or_skipped_by_name(tmp_path, what, cached, capsys):
    spoil, message = BAD[what]
    settings = pairs(tmp_path / "data")
    spoil(tmp_path / "data")
    cache = tmp_path / "cache" if cached else None
    refused(settings, f"^b: .*{message}", cache=cache)
    lines, done = [], []
    subjects = data.load(
        settings, cache=cache, skip_bad=True, say=lines.append, progress=lambda n, of: done.append((n, of))
    )
    assert [subject.name for subject in subjects] == ["a", "c"]
    assert_whole(subjects)
    (line,) = lines
    assert line.startswith("skipped b: ")
    assert done == [(1, 3), (2, 3), (3, 3)]
    data.load(settings, skip_bad=True)
    assert capsys.readouterr().err == f"{line}\n"


def test_an_empty_subject_may_be_allowed(tmp_path):
    settings = pairs(tmp_path)
    BAD["empty"][0](tmp_path)
    subjects = data.load(settings | {"allow_empty": True})
    assert [bool(subject.target.any()) for subject in subjects] == [True, False, True]


def test_a_subject_without_annotation_is_refused(tmp_path):
    settings = pairs(tmp_path, ["a"])
    change("mask", lambda mask: mask * 0 + 3)(tmp_path.joinpath("a").rename(tmp_path / "b").parent)
    refused(settings | {"ignored": [3], "allow_empty": True}, "^b: nothing in it is annotated")


def test_nothing_left_is_an_error(tmp_path):
    settings = pairs(tmp_path, ["b"])
    truncated(tmp_path)
    with pytest.raises(StudyError, match="none of the 1 subjects can be used"):
        data.load(settings, skip_bad=True, say=lambda line: None)


def test_an_affine_without_directions_is_refused(tmp_path):
    settings = pairs(tmp_path, ["b"])
    flat = AXIAL.copy()
    flat[:3, 1] = flat[:3, 0]
    for name in ("flair", "mask"):
        change(name, lambda array: array, flat)(tmp_path)
    refused(settings, "^b: .*expected an affine that gives every axis a direction")


def test_a_given_spacing_lets_affines_differ(tmp_path):
    settings = pairs(tmp_path, ["b"])
    BAD["affine"][0](tmp_path)
    (subject,) = data.load(settings | {"spacing": [4, 2, 1]})
    assert subject.spacing == (4.0, 2.0, 1.0)


def test_two_subjects_of_one_name(tmp_path):
    settings = pairs(tmp_path, ["s/a-b/c", "s/a/b-c"])
    refused(settings | {"images": "s/*/*/flair.nii.gz", "masks": "s/*/*/mask.nii.gz"}, "^a-b-c: .*of this name")


def test_one_image_under_two_names(tmp_path):
    settings = pairs(tmp_path)
    for name in ("flair", "mask"):
        (tmp_path / "c" / f"{name}.nii.gz").write_bytes((tmp_path / "a" / f"{name}.nii.gz").read_bytes())
    refused(settings, "^c: has the same image as a; remove one")
    lines = []
    assert [s.name for s in data.load(settings, skip_bad=True, say=lines.append)] == ["a", "b"]
    assert len(lines) == 1


def test_a_name_without_the_person(tmp_path):
    settings = pairs(tmp_path, ["sub1", "other"]) | {"person": "(sub[0-9]+)"}
    refused(settings, "^other: person = .* is nowhere in the name")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "expected source = one of brain, nuclei, wmh, tnbc, nifti, got none"),
        ({"source": "brian"}, "got 'brian'; did you mean 'brain'"),
        ({"source": 3}, "expected source = one of .* got 3"),
        ({"source": ["brain"]}, "expected source = one of .* got"),
        ({"source": "nifti"}, "source nifti needs the key folder and images and masks"),
        ({"source": "nuclei", "colour": 1}, "source nuclei takes no key 'colour'; it takes size, tile"),
    ],
)
def test_sources_and_keys_are_checked(settings, message):
    with pytest.raises(StudyError, match=message):
        data.check(settings)


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    with pytest.raises(StudyError, match=r"source nifti needs nibabel: pip install 'fastinstance\[study\]'"):
        data.check(pairs(tmp_path))


# size


def test_size_cuts_and_pads_around_the_centre(tmp_path):
    settings = pairs(tmp_path, ["a"])
    _, mask = scan(0)
    mask[:1] = mask[11:] = 0
    save_nifti(tmp_path / "a" / "mask.nii.gz", mask)
    (subject,) = data.load(settings | {"size": [15, 10]})
    assert_whole([subject])
    np.testing.assert_array_equal(subject.target[:, 2:12].numpy(), mask[1:11].transpose(2, 1, 0) > 0)
    assert not subject.target[:, 12:].any()
    assert not subject.target[:, :2].any()
    torch.testing.assert_close(subject.image[:, :, 12:], subject.image.min().expand(1, 4, 3, 10))
    mask[0, 0, 0] = 1
    save_nifti(tmp_path / "a" / "mask.nii.gz", mask)
    refused(settings | {"size": [15, 10]}, r"^a: size = \[15, 10\] would cut off instances of slices of \[10, 12\]")


# wmh


def wmh(folder):
    for seed, name in enumerate(("Utrecht/0", "Utrecht/1", "Singapore/50")):
        image, mask = scan(seed)
        mask[-2:] = 2
        save_nifti(folder / name / "pre" / "FLAIR.nii.gz", image)
        save_nifti(folder / name / "pre" / "T1.nii.gz", image**2)
        save_nifti(folder / name / "orig" / "FLAIR.nii.gz", image)
        save_nifti(folder / name / "wmh.nii.gz", mask.astype(np.float32))
    return {"source": "wmh", "folder": str(folder)}


def test_wmh_leaves_out_other_pathology(tmp_path):
    settings = wmh(tmp_path / "data")
    data.check(settings)
    subjects = data.load(settings, cache=tmp_path / "cache")
    assert_whole(subjects)
    assert [subject.name for subject in subjects] == ["Singapore/50", "Utrecht/0", "Utrecht/1"]
    assert_same(data.load(settings, cache=tmp_path / "cache"), subjects)
    _, mask = scan(0)
    assert subjects[1].valid is not None
    assert not subjects[1].valid[:, :, 10:].any()
    assert subjects[1].valid[:, :, :10].all()
    np.testing.assert_array_equal(subjects[1].target[:, :, :10].numpy(), mask[:10].transpose(2, 1, 0) > 0)
    assert not subjects[1].target[:, :, 10:].any()


def test_wmh_channels_and_what_is_missing(tmp_path):
    settings = wmh(tmp_path)
    two = settings | {"channels": ["FLAIR", "T1"]}
    assert data.load(two)[0].image.shape == (2, 4, 10, 12)
    (tmp_path / "Utrecht/1/pre/T1.nii.gz").unlink()
    refused(two, "^Utrecht/1: .*T1.nii.gz: no such file")
    (tmp_path / "Utrecht/0/wmh.nii.gz").unlink()
    refused(settings, "^Utrecht/0: no such file: .*wmh.nii.gz")
    (tmp_path / "Singapore/50/pre/FLAIR.nii.gz").unlink()
    assert [s.name for s in data.load(settings, skip_bad=True, say=lambda line: None)] == ["Utrecht/1"]
    for channels in ("FLAIR", [], [1]):
        with pytest.raises(StudyError, match="expected channels as a list such as"):
            data.check(settings | {"channels": channels})
    (tmp_path / "empty").mkdir()
    with pytest.raises(StudyError, match=r"expected folders with pre/FLAIR\.nii\.gz and wmh\.nii\.gz, found"):
        data.check(settings | {"folder": tmp_path / "empty"})


# tnbc


def tnbc(folder):
    rng = np.random.default_rng(0)
    for name in ("01_1", "01_2", "02_1"):
        colours = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        mask = ndimage.uniform_filter(rng.random((20, 24)), 3) > 0.55
        save_picture(folder / f"Slide_{name[:2]}" / f"{name}.png", colours)
        save_picture(folder / f"GT_{name[:2]}" / f"{name}.png", np.where(mask, 255, 0).astype(np.uint8))
    return {"source": "tnbc", "folder": str(folder)}


def test_tnbc_slides_are_persons(tmp_path):
    settings = tnbc(tmp_path)
    data.check(settings)
    subjects = data.load(settings)
    assert_whole(subjects)
    assert [(s.name, s.person) for s in subjects] == [("01_1", "01"), ("01_2", "01"), ("02_1", "02")]
    colours = np.array(Image.open(tmp_path / "Slide_01" / "01_2.png")).astype(float)
    assert subjects[1].image.shape == (3, 1, 20, 24)
    for channel in range(3):
        seen = subjects[1].image[channel, 0].numpy().ravel()
        assert np.corrcoef(seen, colours[..., channel].ravel())[0, 1] > 0.999999
    mask = np.array(Image.open(tmp_path / "GT_01" / "01_2.png"))
    np.testing.assert_array_equal(subjects[1].target[0].numpy(), mask > 0)
    assert subjects[1].labels.max() == ndimage.label(mask, np.ones((3, 3)))[1]
    assert data.load(settings | {"grey": True})[1].image.shape == (1, 1, 20, 24)


def test_tnbc_pictures_with_transparency_and_ids(tmp_path):
    settings = tnbc(tmp_path)
    plain = data.load(settings)
    for path in tmp_path.glob("*/*.png"):
        Image.open(path).convert("RGBA").save(path)
    assert_same(data.load(settings), plain)
    ids = np.repeat(np.arange(4, dtype=np.uint8), 5)[:, None].repeat(24, 1)
    save_picture(tmp_path / "GT_01" / "01_1.png", ids)
    refused(settings, "^01_1: .*expected 0 and one other value, got 4 values from 0 to 3; set instances = true")
    first = data.load(settings | {"instances": True})[0]
    np.testing.assert_array_equal(first.labels[0].numpy(), ids)


def test_tnbc_what_is_missing(tmp_path):
    settings = tnbc(tmp_path)
    (tmp_path / "Slide_01" / "01_1.png").unlink()
    (tmp_path / "GT_02" / "02_1.png").unlink()
    refused(settings, "^01_1: .*GT_01/01_1.png has no counterpart in Slide_01")
    lines = []
    assert [s.name for s in data.load(settings, skip_bad=True, say=lines.append)] == ["01_2"]
    assert len(lines) == 2
    save_picture(tmp_path / "GT_01" / "01_2.png", np.zeros((20, 23), np.uint8))
    refused(settings, "^01_1: ")
    refused_line = []
    with pytest.raises(StudyError, match="none of the 3"):
        data.load(settings, skip_bad=True, say=refused_line.append)
    assert "expected one shape, got (20, 24) of" in refused_line[1]
    (tmp_path / "Slide_01" / "01_2.png").write_bytes(b"no picture")
    with pytest.raises(StudyError, match="none of the 3"):
        data.load(settings, skip_bad=True, say=refused_line.append)
    assert "01_2.png: cannot be read" in refused_line[-2]
    (tmp_path / "empty").mkdir()
    with pytest.raises(StudyError, match=r"expected images as Slide_XX/\*.png"):
        data.check(settings | {"folder": tmp_path / "empty"})


# cache


def reads(monkeypatch):
    """Names of the subjects that are made anew from now on."""
    made, original = [], data._made

    def counted(item, scan, size):
        made.append(item.name)
        return original(item, scan, size)

    monkeypatch.setattr(data, "_made", counted)
    return made


def test_the_cache_is_used_until_something_changes(tmp_path, monkeypatch):
    settings, cache = pairs(tmp_path / "data"), tmp_path / "cache"
    made = reads(monkeypatch)
    first = data.load(settings, cache=cache)
    assert made == ["a", "b", "c"]
    assert_same(data.load(settings, cache=cache), first)
    assert made == ["a", "b", "c"]
    assert len(list(cache.iterdir())) == 3, "nothing is left beside the subjects"

    path = tmp_path / "data" / "b" / "mask.nii.gz"
    old = path.stat()
    _, mask = scan(8)
    save_nifti(path, mask)
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))  # the contents decide, not the time
    made.clear()
    changed = data.load(settings, cache=cache)
    assert made == ["b"]
    np.testing.assert_array_equal(changed[1].target.numpy(), mask.transpose(2, 1, 0) > 0)

    made.clear()
    other = [{"size": [16, 16]}, {"orientation": "coronal"}, {"spacing": [1, 1, 1]}, {"instances": True}]
    for more in other:
        data.load(settings | more, cache=cache)
    assert made == ["a", "b", "c"] * len(other)
    made.clear()
    monkeypatch.setattr(data, "VERSION", data.VERSION + 1)
    data.load(settings, cache=cache)
    assert made == ["a", "b", "c"]


def test_names_and_persons_are_not_part_of_what_is_stored(tmp_path, monkeypatch):
    settings, cache = pairs(tmp_path / "data", ["x1", "x2"]), tmp_path / "cache"
    data.load(settings, cache=cache)
    made = reads(monkeypatch)
    (tmp_path / "data" / "x1").rename(tmp_path / "data" / "y1")
    again = data.load(settings | {"person": "^(.)"}, cache=cache)
    assert made == []
    assert [(s.name, s.person) for s in again] == [("x2", "x"), ("y1", "y")]


def test_a_damaged_cache_is_made_anew(tmp_path, monkeypatch):
    settings, cache = pairs(tmp_path / "data"), tmp_path / "cache"
    first = data.load(settings, cache=cache)
    stored = sorted(cache.iterdir())
    stored[0].write_bytes(stored[0].read_bytes()[:100])
    stored[1].write_bytes(b"")
    body = bytearray(stored[2].read_bytes())
    body[len(body) // 2] ^= 255
    stored[2].write_bytes(bytes(body))
    made = reads(monkeypatch)
    assert_same(data.load(settings, cache=cache), first)
    assert sorted(made) == ["a", "b", "c"]
    made.clear()
    data.load(settings, cache=cache)
    assert made == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    settings = pairs(tmp_path / "data")
    (tmp_path / "file").write_text("")
    refused(settings, "cannot write to the cache .*file", cache=tmp_path / "file")

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    refused(settings, "cannot write to the cache .*: No space left on device", cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == [], "nothing half is left"


def test_a_brain_of_another_version_is_made_anew(tmp_path, monkeypatch):
    settings = {"source": "brain", "subjects": 1, "slices": 2}
    data.load(settings, cache=tmp_path)
    made = reads(monkeypatch)
    for more in ({"seed": 1}, {"slices": 3}, {"recipe": {"new_count": 1}}):
        data.load(settings | more, cache=tmp_path)
    monkeypatch.setattr(brain, "VERSION", brain.VERSION + 1)
    data.load(settings, cache=tmp_path)
    assert made == ["brain-1-000", "brain-0-000", "brain-0-000", "brain-0-000"]


# ids


@given(arrays.arrays(np.int32, arrays.array_shapes(min_dims=3, max_dims=3, max_side=6), elements=st.integers(0, 5)))
def test_ids_are_numbered_anew_in_every_slice(ids):
    found = data._renumbered(ids).numpy()
    for before, after in zip(ids, found, strict=True):
        ranks = {number: rank for rank, number in enumerate(sorted(set(before[before > 0].tolist())), start=1)}
        np.testing.assert_array_equal(after, np.vectorize(lambda v, ranks=ranks: ranks.get(int(v), 0))(before))


def test_paths_may_start_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = pairs(tmp_path / "scans", ["a"]) | {"folder": "~/scans"}
    assert Path("~/scans").expanduser() == tmp_path / "scans"
    assert len(data.load(settings)) == 1
