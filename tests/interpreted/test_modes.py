"""The soft modes on the Triton kernels, in the interpreter, equal the reference in value and gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastinstance_kernels import tables
from hypothesis import HealthCheck, given, settings
from torch import Tensor

import fastinstance
from fastinstance import functional
from fastinstance.testing import assert_close
from tests.interpreted.test_engine import check, images, of_masks, on_kernels
from tests.test_modes import MODES, moded
from tests.test_terms import Case

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning")

EXAMPLES = settings().max_examples


@settings(max_examples=EXAMPLES // 10, suppress_health_check=list(HealthCheck))
@given(moded(weights=False))
def test_drawn_scenes(case: Case) -> None:
    check(case.scene.input, case.scene.target, **case.arguments())


@pytest.mark.parametrize(
    ("modes", "loss", "average", "reduction"),
    [
        (MODES[0], "gdf", "instance", "mean"),
        (MODES[1], "dice", "image", "mean"),
        (MODES[2], "dice", "instance", "sum"),
        (MODES[3], "gdf", "instance", "mean"),
        (MODES[4], "gdf", "instance", "mean"),
        (MODES[4], "inverse_weighted_dice", "image", "none"),
    ],
)
def test_modes(modes: dict[str, Any], loss: str, average: str, reduction: str) -> None:
    input, target = images(3, 1, 4, 20)
    target[0] = 0
    target[2, ..., 5:] = 0
    options = {"pixel_loss": loss, "instance_loss": loss, "average": average, "reduction": reduction}
    check(input, target, sigmoid=True, **options, **modes)


def test_squares() -> None:
    """A loss with p, p² and v, of which the reference has no name."""
    loss = fastinstance.DiceCELoss(squared_pred=True)
    input, target = images(2, 1, 4, 20)
    found = []
    for backend in ("triton", "torch"):
        leaf = input.clone().requires_grad_()
        with fastinstance.use_backend(backend):
            terms = functional.instance_terms(leaf, target, sigmoid=True, instance_loss=loss, **MODES[-1])
        total = terms.instance_gt + terms.instance_pred + terms.false_gt + terms.false_pred + 0.01 * terms.proximity
        found.append((torch.stack(terms).detach(), torch.autograd.grad(total, leaf)[0]))
    assert_close(*found, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    input, target = images(2, 1, 4, 20, dtype=dtype)
    check(input, target, sigmoid=True, instance_loss="gdf", **MODES[-1])
    check(input.float().sigmoid().to(dtype), target, missed="soft")


def test_volumes() -> None:
    input, target = images(1, 2, 2, 3, 34, density=0.2)
    valid = images(1, 1, 2, 3, 34, density=0.8, seed=1)[1]
    check(input, target, sigmoid=True, connectivity=26, valid_mask=valid, min_size=2, **MODES[-1])


def test_given_ids() -> None:
    """Touching instances, of which one has several pieces in several tiles."""
    input, _ = images(1, 1, 12, 70)
    ids = torch.zeros(1, 1, 12, 70, dtype=torch.int64)
    ids[..., :9, :40] = 7
    ids[..., :9, 40:] = 3
    ids[..., 11, 60:] = 7
    input -= 4 * (ids == 7)
    check(input, ids > 0, sigmoid=True, target_labels=ids, **MODES[-1])


def test_the_first_of_equal_probabilities_moves() -> None:
    """In raster order, in whatever tile: the largest at two rows of two tiles, then zeros of both signs."""
    target = torch.ones(1, 1, 20, 70, dtype=torch.bool)
    logits = torch.full(target.shape, -3.0)
    logits[..., 11, 50] = logits[..., 11, 66] = logits[..., 12, 2] = -1.0
    options = {"sigmoid": True, "missed": "soft"}
    plain = on_kernels(logits, target, sigmoid=True)["gradient"]
    assert (on_kernels(logits, target, **options)["gradient"] - plain).nonzero().tolist() == [[0, 0, 11, 50]]
    p = torch.zeros(target.shape)
    p[..., 3, 5] = -0.0
    zeros = on_kernels(p, target, missed="soft")["gradient"] - on_kernels(p, target)["gradient"]
    assert zeros.nonzero().tolist() == [[0, 0, 0, 0]]


def test_the_found_have_no_peak() -> None:
    """An instance that is found by its least pixel is left alone, and its neighbour is not."""
    target = torch.zeros(4, 40, dtype=torch.bool)
    target[1:3, 2:8] = target[1:3, 30:38] = True
    predicted = torch.zeros_like(target)
    predicted[2, 7] = True
    input, target = of_masks(predicted[None], target[None])
    soft, plain = (on_kernels(input, target, sigmoid=True, missed=missed)["gradient"] for missed in ("soft", "none"))
    ((*_, x),) = (soft - plain).nonzero().tolist()
    assert x >= 30


def test_tables_of_the_default_have_no_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody asks for takes no memory."""
    from fastinstance_kernels import engine

    sizes = []
    forward = engine.forward

    def measured(*args: Any, **kwargs: Any) -> Any:
        found, total, saved = forward(*args, **kwargs)
        sizes.append(saved.peaks.numel())
        return found, total, saved

    monkeypatch.setattr(engine, "forward", measured)
    input, target = images(1, 1, 4, 20)
    on_kernels(input, target, sigmoid=True)
    on_kernels(input, target, sigmoid=True, missed="soft")
    assert sizes == [0, 20]


def test_weights_of_ones_own_take_the_torch_path() -> None:
    input, target = images(1, 1, 4, 20)
    check(input, target, sigmoid=True, weight_by=torch.sqrt)


def values_in_order() -> Tensor:
    return torch.tensor([-torch.inf, -3e38, -1.0, -1e-40, 0.0, 1e-40, 0.5, 1.0, 3e38, torch.inf])


def test_keys_are_in_the_order_of_values() -> None:
    from tests.table_kernels import peak_keys

    values = values_in_order()
    keys, indices = torch.empty(len(values), dtype=torch.int64), torch.empty(len(values), dtype=torch.int32)
    index = torch.arange(len(values), dtype=torch.int32) * 200_000_000
    peak_keys[(1,)](values, index, keys, indices, len(values), 16)
    assert keys.tolist() == sorted(set(keys.tolist()))
    assert torch.equal(indices, index)
    assert keys.min() > tables.NO_PEAK.value
