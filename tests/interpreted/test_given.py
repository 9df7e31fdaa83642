"""Given ids in the interpreter: their forest, and every term and the gradient equal torch's and the reference's."""

# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastinstance_kernels import given, launch
from fastinstance_kernels.given import given_forest
from fastinstance_kernels.label import empty_parents, label_forest
from fastinstance_kernels.pack import pack
from fastinstance_kernels.tables import slots_for
from fastinstance_kernels.words import NUMBERED
from torch import Tensor

from fastinstance import InstanceLoss, functional, reference, use_backend
from fastinstance.testing import assert_close

HIGHEST = 2**31 - 1


def heads_of(ids: Tensor) -> Tensor:
    """The heads that `pack` finds in planes of ids, int32 [planes, words]."""
    planes, *size = ids.shape
    rows, width = ids[0].numel() // size[-1], size[-1]
    row_words, tiles = -(-width // 32), -(-rows // 8)
    masks, heads = torch.empty(2, planes, rows * row_words, dtype=torch.int32)
    partial = torch.empty(planes * tiles * row_words * 8, dtype=torch.float64)
    pack[(planes * tiles * row_words,)](
        torch.zeros(ids.shape), ids, None, None, masks, heads, partial, 0.0, planes, rows, width, row_words, tiles,
        LOGITS=True, GIVEN=True, PREDICTED=False, VALID=False, SIDES=1, SUMS=False, SQUARED=False, GAMMA=-1.0,
        POSITIVES_ONLY=False, BLOB=False, BLOB_SQUARED=False, BLOB_GAMMA=-1.0, ROWS=8,
    )  # fmt: skip
    assert torch.equal(masks != 0, (_padded(ids) != 0).view(planes, -1, 32).any(2))
    return heads


def _padded(ids: Tensor) -> Tensor:
    return torch.nn.functional.pad(ids, (0, -ids.shape[-1] % 32)).flatten(1)


def by_hand(ids: Tensor) -> tuple[list[dict[int, int]], list[dict[int, int]]]:
    """Of each plane, the first index of the id at every pixel, and the row of every id."""
    first, rows = [], []
    for plane in _padded(ids).tolist():
        begin: dict[int, int] = {}
        for index, number in enumerate(plane):
            if number:
                begin.setdefault(number, index)
        first.append({index: begin[number] for index, number in enumerate(plane) if number})
        rows.append({index: k for k, index in enumerate(begin.values(), 1)})
    return first, rows


def crowd(*shape: int, kinds: int, seed: int = 0) -> Tensor:
    """Touching ids all over the planes and in many pieces, from both ends of the range; some background."""
    chance = torch.Generator().manual_seed(seed)
    number = torch.randint(0, kinds + 1, shape, generator=chance)
    return torch.where(number % 2 == 1, HIGHEST - number, number).int()


FORESTS = {
    "one pixel": torch.full((1, 1, 1), HIGHEST, dtype=torch.int32),
    "empty": torch.zeros(2, 3, 5, dtype=torch.int32),
    "one id": torch.full((1, 5, 70), 7, dtype=torch.int32),
    "few ids": crowd(2, 9, 45, kinds=3),
    "all pixels differ": torch.arange(1, 2 * 7 * 40 + 1, dtype=torch.int32).view(2, 7, 40),
    "backwards": HIGHEST - torch.arange(7 * 40, dtype=torch.int32).view(1, 7, 40),
    "narrow": crowd(2, 70, 1, kinds=40),
    "volume": crowd(2, 3, 4, 37, kinds=20),
    "several blocks": crowd(1, 40, 70, kinds=30).where(torch.rand(1, 40, 70) < 0.2, 0),
}


@pytest.mark.parametrize("name", FORESTS)
def test_forest(name: str) -> None:
    ids = FORESTS[name]
    planes, *size = ids.shape
    heads = heads_of(ids)
    parents = empty_parents(ids, planes, size).view(planes, -1)
    slots = torch.empty(planes * slots_for(ids[0].numel()), dtype=torch.int64)
    given_forest(launch.Step(object()), ids, heads, parents, slots, planes, size)
    first, rows = by_hand(ids)
    lanes = (heads[:, :, None] >> torch.arange(32) & 1).view(planes, -1)
    at = [plane.nonzero().flatten().tolist() for plane in lanes]
    for plane in range(planes):
        assert {i: int(parents[plane, i]) for i in at[plane]} == {i: first[plane][i] for i in at[plane]}

    step, connectivity = launch.Step(object()), {2: 8, 3: 26}[len(size)]
    _, counts, blocks = label_forest(
        step, heads.clone(), heads, planes, size, connectivity, parents=parents, first_given=planes
    )
    starts = counts.cumsum(1) - counts
    for plane in range(planes):
        for index in at[plane]:
            root = first[plane][index]
            assert index == root or parents[plane, index] == root
            number = NUMBERED.value - int(parents[plane, root])
            block = root // (32 * launch.BLOCK_WORDS)
            assert int(starts[plane, block]) + number == rows[plane][root]
    assert counts.shape == (planes, blocks)
    assert counts.sum(1).tolist() == [len(row) for row in rows]


@pytest.mark.parametrize("place", [0, 11])
def test_searches_pass_over_other_ids(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a single place to begin at, every id but one has to be looked for, at worst around the end."""
    ids = crowd(2, 6, 40, kinds=12)
    heads = heads_of(ids)
    slots = torch.empty(2 * slots_for(240), dtype=torch.int64)
    begin = slots_for(240) - 1 if place else 0

    def everywhere_the_same(key: Any, capacity: Any) -> Any:
        return key * 0 + begin

    monkeypatch.setattr(given, "hash_of", everywhere_the_same)
    parents = empty_parents(ids, 2, (6, 40)).view(2, -1)
    given_forest(launch.Step(object()), ids, heads, parents, slots, 2, (6, 40))
    first, _ = by_hand(ids)
    lanes = (heads[:, :, None] >> torch.arange(32) & 1).view(2, -1)
    for plane, index in lanes.nonzero().tolist():
        assert parents[plane, index] == first[plane][index]


def logits_for(ids: Tensor, seed: int = 0) -> Tensor:
    """Logits whose prediction has hits, misses and false alarms."""
    chance = torch.Generator().manual_seed(seed)
    noise = torch.randn(ids.shape, generator=chance, dtype=torch.float64)
    return torch.where(ids > 0, 0.5, -1.5) + noise


def rectangles(*size: int) -> Tensor:
    """A drawn scene: touching halves, one id in two places, an id across a word, one inside another, single pixels."""
    ids = torch.zeros(size, dtype=torch.int64)
    ids[..., 1:4, 2:5] = HIGHEST
    ids[..., 1:4, 5:9] = 3
    ids[..., 5:7, 1:3] = 3
    ids[..., 2:6, 29:36] = 65_536
    ids[..., 3:5, 31:33] = HIGHEST - 1
    ids[..., 0, 37] = 12
    ids[..., 6, 20:24] = 8
    ids[..., 7, 22:26] = 9
    ids[..., 7, 39] = 12
    return ids


def scene_2d() -> Tensor:
    return torch.stack([rectangles(8, 41), crowd(8, 41, kinds=4).long() * (torch.arange(41) % 9 < 4)])[:, None]


def scene_3d() -> Tensor:
    solid = rectangles(3, 8, 41)
    solid[1, 4:6] = 77
    return torch.stack([solid, solid.flip(0, 1)])[None]


def terms(function: Callable[..., Any], x: Tensor, ids: Tensor, options: dict[str, Any]) -> list[Tensor]:
    """All terms, then the gradient of a sum that weighs them differently."""
    x = x.clone().requires_grad_()
    found = function(x, (ids > 0).double(), target_labels=ids, **options)
    found = list(found) if isinstance(found, tuple) else [found]
    total = sum((k * value.sum() for k, value in enumerate(found, 1)), torch.zeros((), dtype=x.dtype))
    return [*(value.detach() for value in found), *torch.autograd.grad(total, x)]


def check(name: str, x: Tensor, ids: Tensor, /, **options: Any) -> None:
    with use_backend("triton"):
        found = terms(getattr(functional, name), x, ids, options)
    with use_backend("torch"):
        assert_close(found, terms(getattr(functional, name), x, ids, options), rtol=1e-7, atol=1e-8)
    assert_close(found, terms(getattr(reference, name), x, ids, options), rtol=1e-7, atol=1e-8)


VALID = (torch.arange(8)[:, None] + torch.arange(41)) % 5 != 0
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "terms": ("instance_terms", {}),
    "per plane": ("instance_terms", {"reduction": "none", "pixel_loss": "dicece", "instance_loss": "gdf"}),
    "valid mask": ("instance_terms", {"valid_mask": VALID.expand(2, 1, 8, 41)}),
    "min_size": ("instance_terms", {"min_size": 5, "average": "image"}),
    "min_size and mask": ("instance_terms", {"min_size": 5, "valid_mask": VALID.expand(2, 1, 8, 41)}),
    "large boxes": ("instance_terms", {"center_size": 5, "center_loss": "dicece", "spacing": (1.0, 2.5)}),
    "blobs": ("blob_terms", {"instance_loss": "dicece"}),
    "blobs, min_size": ("blob_terms", {"instance_loss": "dice", "min_size": 4, "reduction": "none"}),
    "inverse": ("instance_terms", {"pixel_loss": "inverse_weighted_dice"}),
    "inverse, min_size": ("instance_terms", {"pixel_loss": "inverse_weighted_dice", "min_size": 5}),
    "inverse, blobs": ("blob_terms", {"pixel_loss": "inverse_weighted_dice", "instance_loss": "dice"}),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_torch_and_the_reference(name: str) -> None:
    function, options = CASES[name]
    ids = scene_2d()
    check(function, logits_for(ids), ids, sigmoid=True, **options)


def test_volume_of_two_channels() -> None:
    ids = scene_3d()
    check("instance_terms", logits_for(ids), ids, sigmoid=True, connectivity=6)


def test_background_channel_left_out() -> None:
    ids = torch.cat([scene_2d(), scene_2d().flip(3)], 1)
    ids = torch.where((ids[:, :1] > 0) & (torch.arange(2) == 1)[:, None, None], 0, ids)
    check("instance_terms", logits_for(ids), ids, softmax=True, include_background=False)


def test_owner_of_a_centre_pixel_does_not_depend_on_the_ids() -> None:
    """Boxes of neighbours overlap: other ids, in another order, make another owner but the same terms, bit by bit."""
    ids = scene_2d()[:1]
    x = logits_for(ids)
    other = torch.where(ids > 0, 2**31 - ids, 0)
    options = {"sigmoid": True, "center_size": 5}
    with use_backend("triton"):
        first = terms(functional.instance_terms, x, ids, options)
        second = terms(functional.instance_terms, x, other, options)
    assert all(map(torch.equal, first, second))
    check("instance_terms", x, ids, **options)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_integer_types_and_strides(dtype: torch.dtype) -> None:
    ids = (scene_2d() % 101).to(dtype)
    ids = ids.transpose(2, 3).contiguous().transpose(2, 3)
    x = logits_for(ids)
    with use_backend("triton"):
        found = terms(functional.instance_terms, x, ids, {"sigmoid": True, "min_size": 2})
    with use_backend("torch"):
        wanted = terms(functional.instance_terms, x, ids, {"sigmoid": True, "min_size": 2})
    assert_close(found, wanted, rtol=1e-7, atol=1e-8)


def test_module_and_float32() -> None:
    ids = scene_2d()
    loss = InstanceLoss(seg=1, instance_gt=1, instance_pred=1, center=1, false_gt=1, false_pred=1, sigmoid=True)
    results = []
    for backend in ("triton", "torch"):
        x = logits_for(ids).float().requires_grad_()
        with use_backend(backend):
            value = loss(x, (ids > 0).float(), target_labels=ids)
        results.append([value.detach(), *torch.autograd.grad(value, x)])
    assert_close(*results, rtol=1e-5, atol=1e-6)


def test_more_instances_than_rows() -> None:
    """`max_instances` bounds the tables, not the ids that are looked up: the terms are NaN, and nothing breaks."""
    ids = scene_2d()
    loss = InstanceLoss(seg=1, instance_gt=1, sigmoid=True, max_instances=2)
    with use_backend("triton"), pytest.warns(RuntimeWarning, match="max_instances=2"):
        assert loss(logits_for(ids), (ids > 0).double(), target_labels=ids).isnan()
