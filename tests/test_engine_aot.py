"""Every kernel of the losses compiles for every target, without a GPU or a driver, and keeps its work in registers."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import torch
from fastinstance_kernels import engine

from bench import aot

VARIANTS = {variant.name: variant for variant in aot.engine_variants()}
LAUNCHED = {variant.kernel.fn.__name__: variant.kernel for variant in VARIANTS.values()}
ELSEWHERE = [f"{kernel}, GDF + Dice" for kernel in ("accumulate", "gather", "gradient")]
CASES = [(name, "sm_90") for name in VARIANTS] + [
    (name, target) for name in ELSEWHERE for target in aot.TARGETS if target != "sm_90"
]


@cache
def compiled(name: str, target: str) -> Any:
    return aot.compile_variant(VARIANTS[name], aot.TARGETS[target])


def test_every_kernel_is_in_the_table() -> None:
    both = {"pack", "prepare", "accumulate", "link", "instances", "gather", "coefficients", "gradient"}
    assert set(LAUNCHED) == both | {"collect", "point"}  # the last two of given ids


def test_number_of_launches() -> None:
    names = [variant.kernel.fn.__name__ for variant in aot.step("all")]
    forest = ["initialise", "flatten", "join", "flatten"]
    forward = ["pack", *forest, "prepare", "accumulate", "link", "instances", "gather"]
    assert names == [*forward, "coefficients", "gradient"]
    assert len(aot.step("given", given=True)) == len(names) + 2


@pytest.mark.parametrize("size", [(1, 1), (37, 250), (2048, 2048)])
def test_one_kernel_serves_every_size(size: tuple[int, ...]) -> None:
    for variant, other in zip(aot.step("", size), aot.step(""), strict=True):
        types = variant.types
        if "slots" in types:  # pairs of two instances need 64 bits where a plane may have more than 46340
            types = {**types, "slots": "*i64" if max(size) > 1000 else "*i32"}
        assert (variant.name, variant.kernel, variant.constants) == (other.name, other.kernel, other.constants)
        assert variant.types == types
        assert types.keys() == other.types.keys()
        assert all(types[name] == other.types[name] for name in types if name != "slots")


@pytest.mark.parametrize(
    ("size", "own", "per_pixel"),
    [((1024, 1024), "dice", 74), ((1024, 1024), "gdf", 96), ((256, 256), "dice", 69), ((128, 128, 128), "gdf", 72)],
)
def test_memory(size: tuple[int, ...], own: str, per_pixel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the forward pass allocates, none of which it frees before its end, per pixel of a plane."""
    taken = []
    empty = torch.empty

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        taken.append(empty(*args, **kwargs))
        return taken[-1]

    monkeypatch.setattr(torch, "empty", counted)
    monkeypatch.setattr(engine, "backward", lambda *_, **__: None)
    aot.step("", size, own=own)
    images, *buffers = taken
    assert sum(buffer.nbytes for buffer in buffers) <= per_pixel * images.numel()


@pytest.mark.parametrize("name", LAUNCHED)
def test_numbers_are_not_specialised(name: str) -> None:
    """Neither 1 nor a multiple of 16 gets a kernel of its own."""
    (variant, *_) = [variant for variant in VARIANTS.values() if variant.kernel is LAUNCHED[name]]
    signature = variant.signature()
    numbers = [p for p in LAUNCHED[name].params if signature[p.name] in ("i32", "fp32")]
    assert numbers
    assert all(parameter.do_not_specialize for parameter in numbers)


@pytest.mark.parametrize(("name", "target"), CASES)
def test_compiled_code(name: str, target: str) -> None:
    code = compiled(name, target)
    resources = (aot.amd_resources if target == "gfx942" else aot.nvidia_resources)(code)
    assert resources["spills"] == 0
    assert resources["shared bytes"] <= 4096
    if target == "gfx942":
        return
    # Order is asked for only where the program that ends last adds up what the others have stored.
    kernel = VARIANTS[name].kernel.fn.__name__
    atomics = re.findall(r"\b(?:atom|red)\.\S+", code.asm["ptx"])
    ordered = [atomic for atomic in atomics if ".relaxed." not in atomic]
    assert len(ordered) == (kernel == "gather")
    assert all(".acq_rel." in atomic for atomic in ordered)
