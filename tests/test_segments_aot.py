"""The kernels of the losses by component compile for every target, without a GPU, and work in registers."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from fastinstance_kernels import given, segments

from bench import aot
from tests.test_regions_aot import BY_COLUMNS

VARIANTS = {variant.name: variant for variant in aot.segment_variants()}
KERNELS = [
    segments.clear_rows,
    segments.add_up,
    segments.evaluate,
    segments.segment_coefficients,
    segments.segment_gradient,
]


def test_every_kernel_is_in_the_table() -> None:
    assert {variant.kernel for variant in VARIANTS.values()} == {given.pack_ids, *KERNELS}


def test_number_of_launches() -> None:
    """Beside the maps: three forward and two backward, whatever the images hold."""
    assert [variant.kernel for variant in aot.segment_step("all")] == KERNELS
    assert [variant.kernel for variant in aot.segment_step("all", kind="peak")] == [*KERNELS[:3], KERNELS[-1]]


@pytest.mark.parametrize("size", [(1, 1), (37, 250), (2048, 2048)])
def test_one_kernel_serves_every_size(size: tuple[int, ...]) -> None:
    for variant, other in zip(aot.segment_step("", size), aot.segment_step(""), strict=True):
        assert (variant.kernel, variant.constants, variant.types) == (other.kernel, other.constants, other.types)


@pytest.mark.parametrize(("changes", "per_pixel"), [({}, 15), ({"given": True}, 57), ({"max_instances": 1000}, 1)])
def test_memory(changes: dict[str, Any], per_pixel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that both passes allocate beside the gradient, of 256² with Dice and cross-entropy, per pixel."""
    taken = []
    empty = torch.empty

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        taken.append(empty(*args, **kwargs))
        return taken[-1]

    monkeypatch.setattr(torch, "empty", counted)
    aot.segment_step("", loss="dicece", outside=True, **changes)
    values, _counts, *buffers = taken
    assert sum(buffer.nbytes for buffer in buffers) <= per_pixel * values.numel()


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.fn.__name__)
def test_numbers_are_not_specialised(kernel: Any) -> None:
    """Neither 1 nor a multiple of 16 gets a kernel of its own."""
    (numbers, *_) = [variant.numbers() for variant in VARIANTS.values() if variant.kernel is kernel]
    assert numbers
    assert all(parameter.do_not_specialize for parameter in numbers)


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("name", VARIANTS)
def test_compiled_code(name: str, target: str) -> None:
    code = aot.compile_variant(VARIANTS[name], aot.TARGETS[target])
    resources = (aot.amd_resources if target == "gfx942" else aot.nvidia_resources)(code)
    assert resources["spills"] == 0
    assert resources["shared bytes"] <= (2048 if BY_COLUMNS else 32)
    gathers = "add_up" not in name
    assert (resources["atomics"] == 0) == gathers
    if target != "gfx942":
        atomics = re.findall(r"\b(?:atom|red)\.\S+", code.asm["ptx"])
        assert all(".relaxed." in atomic or ".shared." in atomic for atomic in atomics)
