"""Masks and images in files: what is read, what survives writing, what belongs together, and the one-line errors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from fastinstance import files
from fastinstance.files import FileError, Volume, find, match, read, require_same_grid, write

AFFINE = np.array([[-0.9, 0.1, 0, 40], [0.1, 0.9, 0, -50], [0, 0, 3.5, -30], [0, 0, 0, 1]])


def save(path: Path, data: np.ndarray[Any, Any], **options: Any) -> Path:
    """An array in a file of any format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if ".nii" in path.name:
        nibabel.save(nibabel.Nifti1Image(data, options.get("affine", AFFINE)), path)
    elif path.suffix == ".npy":
        np.save(path, data)
    else:
        frames = [Image.fromarray(frame) for frame in (data if data.ndim == 3 else data[None])]
        more: dict[str, Any] = {"save_all": True, "append_images": frames[1:]} if data.ndim == 3 else {}
        frames[0].save(path, **more)
    return path


MASK = np.random.default_rng(0).random((3, 7, 5)) > 0.6


@pytest.mark.parametrize(
    ("name", "dtypes", "axes"),
    [
        ("a.nii.gz", (np.uint8, np.int16, np.int32, np.uint16, np.float32, np.float64), 3),
        ("a.nii", (np.uint8, np.int16), 2),
        ("a.npy", (np.bool_, np.uint8, np.int64, np.float16), 3),
        ("a.tif", (np.bool_, np.uint8, np.uint16, np.int32, np.float32), 3),
        ("a.tiff", (np.uint8,), 2),
        ("a.png", (np.bool_, np.uint8, np.uint16), 2),
    ],
)
def test_values_and_dtypes_survive(name: str, dtypes: tuple[type, ...], axes: int, tmp_path: Path) -> None:
    for dtype in dtypes:
        data = (MASK[-axes:] if axes == 3 else MASK[0]).astype(dtype) * np.array(1, dtype)
        volume = read(save(tmp_path / name, data))
        np.testing.assert_array_equal(volume.data, data)
        assert volume.data.dtype == dtype
        write(tmp_path / "new" / f"b{''.join(Path(name).suffixes)}", np.roll(data, 1), volume)
        again = read(tmp_path / "new" / f"b{''.join(Path(name).suffixes)}")
        assert again.data.dtype == dtype
        np.testing.assert_array_equal(again.data, np.roll(data, 1))
        assert [path.name[0] for path in (tmp_path / "new").iterdir()] == ["b"], "nothing is left beside it"


def test_the_nifti_header_survives(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(MASK.astype(np.int16)[..., None], AFFINE)
    image.header["descrip"] = b"model 3"
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_sform(AFFINE, code=4)
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"kept"))
    nibabel.save(image, tmp_path / "a.nii.gz")
    volume = read(tmp_path / "a.nii.gz")
    assert volume.data.shape == MASK.shape, "a fourth axis of one is left out"
    write(tmp_path / "b.nii.gz", ~MASK, volume)
    new: Any = nibabel.load(tmp_path / "b.nii.gz")
    old: Any = nibabel.load(tmp_path / "a.nii.gz")
    for key in old.header:
        np.testing.assert_array_equal(new.header[key], old.header[key], err_msg=key)
    np.testing.assert_array_equal(new.affine, old.affine)
    assert new.header.extensions[0].get_content() in (b"kept", "kept")
    np.testing.assert_array_equal(new.get_fdata()[..., 0], ~MASK)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
def test_the_scale_of_a_nifti_file_survives(dtype: type, tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(MASK.astype(dtype), AFFINE)
    image.header.set_slope_inter(3, 0)
    nibabel.save(image, tmp_path / "a.nii")
    volume = read(tmp_path / "a.nii")
    assert volume.data.max() == 3
    write(tmp_path / "b.nii", volume.data, volume)
    np.testing.assert_array_equal(files.integers(read(tmp_path / "b.nii")), volume.data)
    assert nibabel.load(tmp_path / "b.nii").get_data_dtype() == dtype  # pyright: ignore[reportAttributeAccessIssue]


def test_spacing_comes_from_the_header_in_millimetres(tmp_path: Path) -> None:
    spacing = read(save(tmp_path / "a.nii", MASK.astype(np.uint8))).spacing
    assert spacing == pytest.approx((0.9055, 0.9055, 3.5), abs=1e-3)
    image = nibabel.Nifti1Image(MASK.astype(np.uint8), np.diag([250, 250, 1000, 1]))
    image.header.set_xyzt_units("micron")
    nibabel.save(image, tmp_path / "b.nii")
    assert read(tmp_path / "b.nii").spacing == pytest.approx((0.25, 0.25, 1))
    assert read(save(tmp_path / "c.npy", MASK)).spacing is None


def test_palette_tags_and_text_survive(tmp_path: Path) -> None:
    palette = Image.fromarray(MASK[0].astype(np.uint8))
    palette.putpalette([0, 0, 0, 255, 0, 0])
    text = PngImagePlugin.PngInfo()
    text.add_text("patient", "7")
    palette.save(tmp_path / "a.png", pnginfo=text, dpi=(300, 300))
    volume = read(tmp_path / "a.png")
    assert set(np.unique(volume.data)) == {0, 1}, "indices, not colours"
    write(tmp_path / "b.png", volume.data, volume)
    with Image.open(tmp_path / "b.png") as image:
        image.load()
        assert image.mode == "P"
        assert (image.getpalette() or [])[:6] == [0, 0, 0, 255, 0, 0]
        assert image.info["patient"] == "7"
        assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
    frames = [Image.fromarray(page.astype(np.uint16)) for page in MASK]
    frames[0].save(
        tmp_path / "a.tif",
        save_all=True,
        append_images=frames[1:],
        compression="tiff_lzw",
        tiffinfo={270: "spacing=3", 282: 2.5},
    )
    volume = read(tmp_path / "a.tif")
    write(tmp_path / "b.tif", volume.data, volume)
    with Image.open(tmp_path / "b.tif") as image:
        tags: Any = image.tag_v2  # pyright: ignore[reportAttributeAccessIssue]
        assert (tags[270], tags[282], image.info["compression"]) == ("spacing=3", 2.5, "tiff_lzw")
    np.testing.assert_array_equal(read(tmp_path / "b.tif").data, MASK)


def test_colours_are_an_error_but_for_images(tmp_path: Path) -> None:
    Image.new("RGB", (4, 3), (255, 0, 0)).save(tmp_path / "a.png")
    with pytest.raises(FileError, match="expected one channel, got colours"):
        read(tmp_path / "a.png")
    assert read(tmp_path / "a.png", grey=True).data.shape == (3, 4)


def test_files_are_matched_by_name(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for path in (
        one / "a.nii.gz",
        one / "deep" / "b.v2.npy",
        one / "c.png",
        other / "a.npy",
        other / "deep" / "b.v2.npy",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for path in (one / "notes.txt", one / ".hidden.npy", other / "d.tif"):
        path.touch()
    pairs, missing = match([one, other])
    assert pairs == {
        "a": (one / "a.nii.gz", other / "a.npy"),
        "deep/b.v2": (one / "deep" / "b.v2.npy", other / "deep" / "b.v2.npy"),
    }
    assert missing == {"c": f"not in {other}", "d": f"not in {one}"}
    assert match([one / "c.png", other / "d.tif"])[0] == {"c": (one / "c.png", other / "d.tif")}


def test_errors_of_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "twice").mkdir()
    for name in ("a.nii", "a.nii.gz"):
        (tmp_path / "twice" / name).touch()
    with pytest.raises(FileError, match=r"no file that ends in \.nii\.gz"):
        find(tmp_path / "empty")
    with pytest.raises(FileError, match=r"expected one file named a, got a\.nii and a\.nii\.gz"):
        find(tmp_path / "twice")
    with pytest.raises(FileError, match="no such file or folder"):
        find(tmp_path / "nowhere")
    with pytest.raises(FileError, match="only files or only folders"):
        match([tmp_path / "twice" / "a.nii", tmp_path / "empty"])


def test_damaged_files_give_one_line(tmp_path: Path) -> None:
    good = save(tmp_path / "good.nii.gz", MASK.astype(np.uint8)).read_bytes()
    contents = {
        "half.nii.gz": good[: len(good) // 2],
        "text.nii.gz": b"not an image",
        "text.png": b"not an image",
        "text.tif": b"",
        "text.npy": b"not an array",
        "nothing.nii": b"",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FileError, match=rf"{name}: cannot be read") as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)
    np.save(tmp_path / "object.npy", np.array([None]), allow_pickle=True)
    with pytest.raises(FileError, match="cannot be read"):
        read(tmp_path / "object.npy")
    with pytest.raises(FileError, match=r"2 or 3 axes, got the shape \(4,\)"):
        read(save(tmp_path / "line.npy", np.zeros(4)))
    with pytest.raises(FileError, match="expected numbers, got complex128"):
        read(save(tmp_path / "complex.npy", np.zeros((2, 2), complex)))
    with pytest.raises(FileError, match="no such file"):
        read(tmp_path / "gone.npy")
    with pytest.raises(FileError, match=r"expected a name that ends in \.nii\.gz"):
        read(tmp_path / "scan.dcm")


def test_a_missing_package_names_the_pip_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", MASK.astype(np.uint8))
    monkeypatch.setitem(__import__("sys").modules, "nibabel", None)
    with pytest.raises(FileError, match=r"reading NIfTI files needs nibabel: pip install 'fastinstance\[commands\]'"):
        read(path)


def test_grids_must_agree(tmp_path: Path) -> None:
    data = MASK.astype(np.uint8)
    first = read(save(tmp_path / "a.nii", data))
    moved = read(save(tmp_path / "b.nii", data, affine=AFFINE + np.eye(4)[[3, 3, 3, 0]] * 0.5))
    rounded = read(save(tmp_path / "c.nii", data, affine=AFFINE * (1 + 1e-6)))
    plain = Volume(Path("d.npy"), data)
    require_same_grid([first, rounded], spacing_given=False)
    require_same_grid([first, plain], spacing_given=False)
    require_same_grid([first, moved], spacing_given=True)
    with pytest.raises(FileError, match=r"expected one affine, got others in .*a\.nii and .*b\.nii: resample"):
        require_same_grid([first, moved], spacing_given=False)
    with pytest.raises(FileError, match=r"one shape, got \(3, 7, 5\) of .*a\.nii and \(7, 5\) of d\.npy"):
        require_same_grid([first, Volume(Path("d.npy"), data[0])], spacing_given=True)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npy", MASK)
    volume = read(path)

    def fail() -> None:
        with files.replacing(path) as part:
            part.write_bytes(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    np.testing.assert_array_equal(read(path).data, MASK)
    assert os.listdir(tmp_path) == ["a.npy"]
    with pytest.raises(FileError, match=r"ends in \.npy, like a\.npy"):
        write(tmp_path / "a.png", MASK[0], volume)


def test_probabilities_are_not_a_mask() -> None:
    for values in ([[0.0, 0.37]], [[0.0, np.nan]], [[np.inf, 1]]):
        with pytest.raises(FileError, match="expected a mask of integers"):
            files.integers(Volume(Path("a.npy"), np.array(values)))
    assert files.integers(Volume(Path("a.npy"), np.array([[0.0, 2.0]]))).tolist() == [[0, 2]]


def test_upper_case_suffixes(tmp_path: Path) -> None:
    with (tmp_path / "a.NPY").open("wb") as file:
        np.save(file, MASK)
    volume = read(tmp_path / "a.NPY")
    write(tmp_path / "new" / "b.NPY", volume.data, volume)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["b.NPY"]
    np.testing.assert_array_equal(read(tmp_path / "new" / "b.NPY").data, MASK)
