"""The kernels of Voronoi regions compile for every target, without a GPU, and work in registers."""

from __future__ import annotations

import pytest
import triton
from fastinstance_kernels import regions

from bench import aot

VARIANTS = {variant.name: variant for variant in aot.region_variants()}
# Triton 3.6 reads what a tile gathers by columns, and turns it round in shared memory.
BY_COLUMNS = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)


def test_every_kernel_is_in_the_table() -> None:
    assert [variant.kernel.fn.__name__ for variant in VARIANTS.values()] == [
        "along_rows",
        "along_axis",
        "along_rows",
        "along_axis",
        "along_axis",
    ]


@pytest.mark.parametrize("kernel", [regions.along_rows, regions.along_axis])
def test_numbers_are_not_specialised(kernel: object) -> None:
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
    assert resources["registers"] <= (192 if BY_COLUMNS else 96)
    assert resources["shared bytes"] <= (2048 if BY_COLUMNS else 0)
    assert resources["barriers"] == 0 or BY_COLUMNS
    assert resources["atomics"] == 0
