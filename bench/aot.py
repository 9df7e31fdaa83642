"""Compile every kernel ahead of time and say what the machine code needs. No GPU and no driver are involved.

`rows()` gives one row per kernel, variant and target; `main()` prints them as a Markdown table. The numbers
are of the compiled code: instructions are counted once each, however often a loop runs them.
"""

import argparse
import collections
import dataclasses
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import triton
from fastinstance_kernels import label, launch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

Row = dict[str, Any]

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

_POINTERS = ("mask", "heads", "parents", "block_counts", "block_starts", "sizes", "counts", "labels")


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kernel with the compile-time arguments of one use."""

    name: str
    kernel: Any
    constants: Mapping[str, Any]
    warps: int
    pixels: int  # of one program; 0 where the work is not per pixel
    image: str = "*fp32"

    def signature(self) -> dict[str, str]:
        """Argument -> type, for the kernel's arguments in their order."""
        types = {**dict.fromkeys(_POINTERS, "*i32"), "image": self.image, "threshold": "fp32"}
        types |= dict.fromkeys(self.constants, "constexpr")
        return {argument: types.get(argument, "i32") for argument in self.kernel.arg_names}


def label_variants() -> Iterator[Variant]:
    """The labelling kernels as `label_planes` launches them, for every connectivity and kind of input."""
    rows = {"ROWS": launch.TILE_ROWS}
    tile = launch.TILE_ROWS * launch.WORD
    for name, image in {"": "*fp32", " float16": "*fp16", " bfloat16": "*bf16"}.items():
        yield Variant(f"pack{name}", label.pack_mask, {"THRESHOLD": True, **rows}, 1, tile, image)
    for name, image in {"mask": "*u8", "int64": "*i64", "nonzero float": "*fp32", "float64": "*fp64"}.items():
        yield Variant(f"pack {name}", label.pack_mask, {"THRESHOLD": False, **rows}, 1, tile, image)

    words = {"WORDS": launch.BLOCK_WORDS}
    pixels = launch.BLOCK_WORDS * launch.WORD
    for name, values in {
        "2D-4": (False, False),
        "2D-8": (False, True),
        "3D-6": (True, False),
        "3D-18/26": (True, True),
    }.items():
        constants = {**dict(zip(("VOLUME", "DIAGONAL"), values, strict=True)), **words}
        yield Variant(f"initialise {name}", label.initialise, constants, 1, pixels)

    flags = ("NUMBER", "MEASURED", "CLEAR_SIZES")
    for name, values in {
        "flatten": (False, False, False),
        "flatten, number": (True, False, False),
        "flatten, clear sizes": (False, False, True),
        "flatten, number by size": (True, True, False),
    }.items():
        constants = {**dict(zip(flags, values, strict=True)), **words}
        yield Variant(name, label.flatten, constants, 1, pixels)

    flags = ("VOLUME", "AXIS_DIAGONAL", "CORNERS", "CORNER_DIAGONAL")
    for name, values in {
        "2D-4": (False, False, False, False),
        "2D-8": (False, True, False, False),
        "3D-6": (True, False, False, False),
        "3D-18": (True, True, True, False),
        "3D-26": (True, True, True, True),
    }.items():
        constants = {**dict(zip(flags, values, strict=True)), **words}
        yield Variant(f"join {name}", label.join, constants, 1, pixels)

    yield Variant("measure", label.measure, words, 1, pixels)
    yield Variant("scan", label.scan, {"BLOCK": launch.SCAN_BLOCK}, launch.SCAN_WARPS, 0)
    yield Variant("write", label.write, rows, 1, tile)


def compile_variant(variant: Variant, target: GPUTarget) -> Any:
    """The compiled kernel; `.asm` holds every stage. Pointers are 16-byte aligned, as those of torch are."""
    signature = variant.signature()
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    source = ASTSource(variant.kernel, signature, constexprs=dict(variant.constants), attrs=aligned)
    return triton.compile(source, target=target, options={"num_warps": variant.warps})


def _binary(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def nvidia_resources(compiled: Any) -> Row:
    """Registers, memory and instructions of a cubin, from the tools in the Triton wheel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = os.path.join(folder, "kernel.cubin")
        Path(cubin).write_bytes(compiled.asm["cubin"])
        usage, code = (
            subprocess.run([_binary(tool), option, cubin], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    # `/*0a40*/  @!P0 LDG.E.STRONG.GPU R4, ...`: address, predicate, operation
    operations = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code, re.MULTILINE)
    kinds = collections.Counter(operation.split(".")[0] for operation in operations)

    def used(what: str) -> int:
        return int(re.findall(rf"{what}:(\d+)", usage)[-1])

    return {
        "registers": used("REG"),
        "shared bytes": compiled.metadata.shared,
        "spills": used("STACK") + used("LOCAL") + kinds["LDL"] + kinds["STL"],
        "instructions": len(operations) - kinds["NOP"],
        "loads": kinds["LDG"],
        "stores": kinds["STG"],
        "atomics": kinds["ATOMG"] + kinds["ATOM"] + kinds["RED"] + kinds["REDG"],
        "shuffles": kinds["SHFL"] + kinds["REDUX"] + kinds["CREDUX"],
        "barriers": kinds["BAR"],
    }


def amd_resources(compiled: Any) -> Row:
    """The same of AMD assembly. Registers are vector registers; those take scalar spills, without memory."""
    code = compiled.asm["amdgcn"]

    def used(pattern: str) -> int:
        return int(re.findall(pattern + r"[:\s]+(\d+)", code)[-1])

    def count(pattern: str) -> int:
        return len(re.findall(rf"^\t{pattern}", code, re.MULTILINE))

    memory = "(?:global|flat|buffer)"
    return {
        "registers": used(r"\.vgpr_count"),
        "shared bytes": compiled.metadata.shared,
        "spills": used(r"\.vgpr_spill_count") + used("ScratchSize"),
        "instructions": count(r"(?:v|s|ds|global|flat|buffer)_"),
        "loads": count(rf"{memory}_load"),
        "stores": count(rf"{memory}_store"),
        "atomics": count(rf"{memory}_atomic"),
        "shuffles": count(r"(?:ds_swizzle|ds_bpermute|v_\w+_dpp|v_permlane)"),
        "barriers": count("s_barrier"),
    }


def row(variant: Variant, target: str) -> Row:
    """What one variant needs on one target."""
    compiled = compile_variant(variant, TARGETS[target])
    resources = amd_resources(compiled) if target.startswith("gfx") else nvidia_resources(compiled)
    threads = variant.warps * TARGETS[target].warp_size
    per_pixel = resources["instructions"] * threads / variant.pixels if variant.pixels else None
    return {"kernel": variant.name, "target": target, **resources, "instructions per pixel": per_pixel}


def rows(variants: Iterable[Variant] | None = None, targets: Iterable[str] = tuple(TARGETS)) -> list[Row]:
    """One row per variant and target; all of them by default.

    "instructions per pixel" are those of one lane divided by the pixels it handles, loops counted once.
    """
    variants = list(label_variants() if variants is None else variants)
    return [row(variant, target) for variant in variants for target in targets]


def table(rows: list[Row]) -> str:
    """Rows as a Markdown table."""

    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)

    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([cell(r[name]) for name in names] for r in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: list[str] | None = None) -> None:
    """Print the table; `--target` limits it."""
    parser = argparse.ArgumentParser(prog="python -m bench aot", description=main.__doc__)
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="default: all of them")
    arguments = parser.parse_args(argv)
    print(table(rows(targets=arguments.target or TARGETS)))


if __name__ == "__main__":
    main()
