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
        types, constants = dict(variant.types), dict(variant.constants)
        if max(size) == 1 and "width" in constants:  # Triton takes a 1 as a constant: one kernel more
            assert constants.pop("width") == 1
            types["width"] = "i32"
        if "slots" in types:  # pairs of two instances need 64 bits where a plane may have more than 46340
            assert types["slots"] == ("*i64" if max(size) > 1000 else "*i32")
        assert (variant.name, variant.kernel, constants) == (other.name, other.kernel, other.constants)
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
    """Neither 1 nor a multiple of 16 gets a kernel of its own, except where a width that is one is worth it."""
    (variant, *_) = [variant for variant in VARIANTS.values() if variant.kernel is LAUNCHED[name]]
    numbers = variant.numbers()
    assert numbers
    wide = {"width"} if name in ("pack", "gradient") else set()
    assert {parameter.name for parameter in numbers if not parameter.do_not_specialize} == wide


@pytest.mark.parametrize("name", ["pack", "gradient"])
def test_four_pixels_at_a_time(name: str) -> None:
    for width, size in ((256, 16), (252, 4)):
        (variant,) = (v for v in aot.step("", (256, width)) if v.kernel is LAUNCHED[name])
        code = aot.compile_variant(variant, aot.TARGETS["sm_90"]).asm["ptx"]
        assert ("ld.global.v4.b32" in code) == (size == 16)


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


def test_report() -> None:
    pack, link = (next(v for v in aot.step("") if v.kernel is LAUNCHED[name]) for name in ("pack", "link"))
    row = aot.report_row(pack)
    assert 8 <= row["bytes, least"] <= row["once "] < 16  # logits and target are read, four words for 32 pixels written
    assert 10 < row["instructions, least"] <= row["once"]
    assert "×16" in row["accesses"]
    assert aot.report_row(link)["once"] is None
    table = aot.report([pack, link])
    assert "10 forward, 2 backward" in table
    assert table.count("\n| ") == 3


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "resident"),
    [(32, 0, 1, 32), (64, 0, 1, 32), (65, 0, 1, 28), (255, 0, 1, 8), (32, 0, 4, 64), (32, 100 << 10, 1, 2)],
)
def test_resident_warps(registers: int, shared: int, warps: int, resident: int) -> None:
    assert aot.resident_warps(registers, shared, warps) == resident


def test_shortest_way_through_a_kernel() -> None:
    code = """
.L_a:
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/              @P0  BRA `(.L_b) ;
        /*0020*/                   FADD R1, R1, R2 ;
        /*0030*/                   FADD R1, R1, R2 ;
.L_b:
        /*0040*/             @!P1  EXIT ;
        /*0050*/                   BRA `(.L_a) ;
        /*0060*/                   NOP ;
"""
    found, labels = aot.instructions(code)
    assert len(found) == 6
    assert [one.operation for one in aot.shortest(found, labels)] == ["LDG.E.128", "BRA", "EXIT"]
    assert aot.access_bytes("LDG.E.128") == 16
    assert aot.access_bytes("FADD") == 0
