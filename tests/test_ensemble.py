"""The volume ensemble and the majority vote, against loops and by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastinstance import band_ensemble, majority_vote, reference, volume_ensemble
from fastinstance.testing import Scene, scenes

EXAMPLES = settings().max_examples


def mask(text: str) -> Tensor:
    return torch.tensor([character == "#" for character in text])[None, None, None]


@settings(max_examples=EXAMPLES)
@given(scenes(extreme=False), st.data())
def test_equal_to_the_loop(scene: Scene, data: st.DataObject) -> None:
    masks = [scene.target, scene.input.float() >= 0, scene.target.flip(-1)]
    masks = masks[: data.draw(st.integers(1, 3))]
    edges = [0.003, 0.006][: len(masks) - 1]
    connectivity = data.draw(st.sampled_from((None, 4) if scene.input.ndim == 4 else (None, 6, 18)))
    found = band_ensemble(masks, edges, spacing=None, connectivity=connectivity)
    expected = reference.band_ensemble(masks, edges, voxel_ml=1e-3, connectivity=connectivity)
    assert torch.equal(found, expected.to(scene.target.dtype))
    assert torch.equal(majority_vote(masks), reference.majority_vote(masks).to(scene.target.dtype))


def test_the_five_steps_by_hand() -> None:
    small, large = mask("#.##.###..####......"), mask("##..####..........#.")
    found = volume_ensemble(small, large, threshold_ml=0.003, spacing=1)
    assert torch.equal(found, mask("#.######............"))


def test_volume_is_measured_in_millilitres() -> None:
    small, large = mask("#.##."), mask("....#")
    assert torch.equal(volume_ensemble(small, large, threshold_ml=0.05, spacing=(5, 5)), mask("#...."))
    assert torch.equal(volume_ensemble(small, large, threshold_ml=0.05, spacing=(2, 5, 5)), mask("....#"))


def test_an_instance_at_the_threshold_comes_from_the_large_model() -> None:
    one = torch.ones(1, 1, 1, 50)
    assert torch.equal(volume_ensemble(one, one * 0, spacing=None), one * 0)
    assert torch.equal(volume_ensemble(one * 0, one, spacing=None), one)


def test_instances_are_measured_plane_by_plane() -> None:
    two = torch.stack([mask("###.")[0], mask("#.#.")[0]])
    assert torch.equal(volume_ensemble(two, two & False, threshold_ml=0.002, spacing=None)[1], mask("#.#.")[0])
    assert not volume_ensemble(two, two & False, threshold_ml=0.002, spacing=None)[0].any()


def test_majority() -> None:
    a, b, c = mask("##.#"), mask("#.##"), mask("#...")
    assert torch.equal(majority_vote([a, b, c]), mask("#..#"))
    assert torch.equal(majority_vote([a, b]), mask("#..#")), "a tie is background"
    assert torch.equal(majority_vote(torch.stack([a, b, c])), mask("#..#"))
    nan = torch.tensor([float("nan"), 2.0, 0.0])
    assert torch.equal(majority_vote([nan]), torch.tensor([0.0, 1.0, 0.0]))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.float16, torch.float64])
def test_the_dtype_survives(dtype: torch.dtype) -> None:
    one = mask("##.#").to(dtype)
    assert volume_ensemble(one, one, spacing=1).dtype == dtype
    assert majority_vote([one, one]).dtype == dtype


M = mask("##.#")
WRONG: list[tuple[Any, type[Exception], str]] = [
    (lambda: volume_ensemble(M, M[..., 1:], spacing=1), ValueError, "expected large of the shape of small"),
    (lambda: volume_ensemble(M, M.to("meta"), spacing=1), ValueError, "expected large on the device of small"),
    (lambda: volume_ensemble(M[0], M[0], spacing=1), ValueError, "add the missing axes"),
    (lambda: volume_ensemble(M, None, spacing=1), TypeError, "expected large to be a tensor, got None"),  # pyright: ignore[reportArgumentType]
    (lambda: volume_ensemble(M, M, spacing=-1), ValueError, "spacing"),
    (lambda: volume_ensemble(M, M, threshold_ml=0, spacing=1), ValueError, "threshold_ml to be a volume above 0"),
    (lambda: volume_ensemble(M, M, spacing=1, connectivity=5), ValueError, "connectivity"),
    (lambda: band_ensemble([M, M, M], [0.1], spacing=1), ValueError, "edges_ml .* got 1 for 3 masks"),
    (lambda: band_ensemble([M, M, M], [0.2, 0.1], spacing=1), ValueError, "edges_ml to be ascending"),
    (lambda: majority_vote([]), ValueError, "expected masks with at least one"),
    (lambda: majority_vote([M, M[..., :2]]), ValueError, r"masks\[1\] of the shape of masks\[0\]"),
    (lambda: majority_vote([M * 0.3]), ValueError, "mask >= 0.5 for probabilities"),
    (lambda: volume_ensemble(M, M * 0.3, spacing=1), ValueError, "mask >= 0.5 for probabilities"),
    (lambda: majority_vote([M.to(torch.complex64)]), TypeError, "real dtype"),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_errors(number: int) -> None:
    call, kind, words = WRONG[number]
    with pytest.raises(kind, match=words):
        call()
