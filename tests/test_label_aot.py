"""Every labelling kernel compiles for every target, without a GPU or a driver, to code as lean as intended."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
from fastinstance_kernels import label
from triton.runtime.jit import JITFunction

from bench import aot

VARIANTS = {variant.name: variant for variant in aot.label_variants()}
NVIDIA = [target for target in aot.TARGETS if target.startswith("sm")]
LAUNCHED = {
    name: kernel
    for name, kernel in vars(label).items()
    if isinstance(kernel, JITFunction) and kernel.do_not_specialize  # those without are called by kernels
}


@cache
def compiled(name: str, target: str) -> Any:
    return aot.compile_variant(VARIANTS[name], aot.TARGETS[target])


def in_loops(code: str) -> list[str]:
    """The lines of Triton IR inside loops: from one that opens a loop to the line that closes it at its indent."""
    lines, ends = [], []
    for line in code.splitlines():
        indent = len(line) - len(line.lstrip())
        while ends and indent <= ends[-1] and line.lstrip().startswith("}") and " do {" not in line:
            ends.pop()
        if ends:
            lines.append(line)
        if re.search(r"= scf\.(while|for)|^\s*scf\.(while|for)", line):
            ends.append(indent)
    return lines


def test_every_kernel_is_in_the_table() -> None:
    assert {variant.kernel.fn.__name__ for variant in VARIANTS.values()} == set(LAUNCHED)
    assert len(LAUNCHED) == 7


@pytest.mark.parametrize("name", LAUNCHED)
def test_sizes_are_runtime_arguments(name: str) -> None:
    """Neither 1 nor a multiple of 16 gets a kernel of its own: one serves every image size."""
    pointers = {"image", "mask", "heads", "parents", "sizes", "block_counts", "block_starts", "counts", "labels"}
    scalars = [p for p in LAUNCHED[name].params if not p.is_constexpr and p.name not in pointers]
    assert scalars
    assert all(parameter.do_not_specialize for parameter in scalars)
    assert {p.name for p in LAUNCHED[name].params if p.is_constexpr}.isdisjoint(label._RUNTIME)


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("name", VARIANTS)
def test_compiled_code(name: str, target: str) -> None:
    code = compiled(name, target)
    resources = (aot.amd_resources if target == "gfx942" else aot.nvidia_resources)(code)
    assert resources["spills"] == 0
    assert resources["registers"] <= 96
    assert resources["shared bytes"] <= 1024
    assert not [line for line in in_loops(code.asm["ttgir"]) if "convert_layout" in line]
    if VARIANTS[name].warps == 1:
        assert resources["barriers"] == 0
    if target in NVIDIA:
        atomics = re.findall(r"\b(?:atom|red)\.\S+", code.asm["ptx"])
        assert all(".relaxed." in atomic for atomic in atomics)
        assert "fence" not in code.asm["ptx"]
        assert "membar" not in code.asm["ptx"]
    else:
        # What AMD adds for any stronger order: cache invalidation and write-back.
        assert not re.search(r"buffer_(inv|wbl2|gl\d_inv)", code.asm["amdgcn"])
        atomics = re.findall(r"\b(?:global|flat|buffer)_atomic\w+", code.asm["amdgcn"])
    assert bool(atomics) == (VARIANTS[name].kernel in (label.join, label.measure))


@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize("name", ["flatten", "flatten, number", "join 2D-8", "join 3D-26"])
def test_loops_read_parents_from_the_shared_cache(name: str, target: str) -> None:
    """A load from the first-level cache could return for long what another multiprocessor has replaced."""
    loads = [line for line in in_loops(compiled(name, target).asm["ttgir"]) if "tt.load" in line]
    assert loads
    assert all("cacheModifier = cg" in line for line in loads)
    assert "ld.global.cg" in compiled(name, target).asm["ptx"]


def test_table() -> None:
    rows = aot.rows([VARIANTS["scan"], VARIANTS["write"]], ["sm_90", "gfx942"])
    assert [(row["kernel"], row["target"]) for row in rows] == [
        ("scan", "sm_90"),
        ("scan", "gfx942"),
        ("write", "sm_90"),
        ("write", "gfx942"),
    ]
    assert rows[2]["instructions per pixel"] == rows[2]["instructions"] * 32 / VARIANTS["write"].pixels
