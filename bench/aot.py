"""Compile every kernel ahead of time and say what the machine code needs. No GPU and no driver are involved.

`rows()` gives one row per kernel, variant and target, `run()` the same for a results file. The numbers are of
the compiled code: instructions are counted once each, however often a loop runs them.
"""

import collections
import contextlib
import dataclasses
import itertools
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from fastinstance_kernels import engine, given, label, launch, regions, segments
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from fastinstance import pixel
from fastinstance.triton_backend import as_numbers

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
    types: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of arguments that differ from `signature`
    registers: int | None = None  # of a thread, at most
    aligned: frozenset[str] | None = None  # arguments that are known to be multiples of 16; None: all pointers

    def signature(self) -> dict[str, str]:
        """Argument -> type, for the kernel's arguments in their order."""
        types = {**dict.fromkeys(_POINTERS, "*i32"), "image": "*fp32", "threshold": "fp32", **self.types}
        types |= dict.fromkeys(self.constants, "constexpr")
        return {argument: types.get(argument, "i32") for argument in self.kernel.arg_names}

    def numbers(self) -> list[Any]:
        """The kernel's parameters that are numbers at run time."""
        types = self.signature()
        return [parameter for parameter in self.kernel.params if types[parameter.name] in ("i32", "fp32")]


def label_variants() -> Iterator[Variant]:
    """The labelling kernels as `label_planes` launches them, for every connectivity and kind of input."""
    rows = {"ROWS": launch.TILE_ROWS}
    tile = launch.TILE_ROWS * launch.WORD
    for name, image in {"": "*fp32", " float16": "*fp16", " bfloat16": "*bf16"}.items():
        yield Variant(f"pack{name}", label.pack_mask, {"THRESHOLD": True, **rows}, 1, tile, {"image": image})
    for name, image in {"mask": "*u8", "int64": "*i64", "nonzero float": "*fp32", "float64": "*fp64"}.items():
        yield Variant(f"pack {name}", label.pack_mask, {"THRESHOLD": False, **rows}, 1, tile, {"image": image})

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


SQUARED = pixel.WeightedSum(((1.0, pixel.Dice(squared_pred=True)), (1.0, pixel.Focal())))
"""The loss that needs the most features: p, p² and v."""


def specialised(
    name: str, kernel: Any, arguments: Mapping[str, Any], warps: int, registers: int | None = None
) -> Variant:
    """What Triton would compile for these arguments: it knows multiples of 16, and takes 1 as a constant."""
    constants, types, aligned = {}, {}, set()
    for parameter in kernel.params:
        value = arguments[parameter.name]
        fixed = parameter.is_constexpr or value is None
        if fixed or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            constants[parameter.name] = value
            continue
        types[parameter.name] = mangle_type(value)
        number = value.data_ptr() if isinstance(value, torch.Tensor) else value
        loose = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
        if type(number) is int and number % 16 == 0 and not loose:
            aligned.add(parameter.name)
    pixels = constants.get("ROWS", 0) * launch.WORD
    return Variant(name, kernel, constants, warps, pixels, types, registers, frozenset(aligned))


@contextlib.contextmanager
def intercepted(take: Callable[..., None]) -> Iterator[None]:
    """Kernels launched inside are not run: `take` gets kernel, grid, arguments by name, warps and registers instead."""

    def launcher(kernel: Any, grid: tuple[int, ...]) -> Any:
        def call(*arguments: Any, num_warps: int = 4, maxnreg: int | None = None, **named: Any) -> None:
            take(kernel, grid, named | dict(zip(kernel.arg_names, arguments, strict=False)), num_warps, maxnreg)

        return call

    with mock.patch.object(JITFunction, "__getitem__", launcher):
        yield


@contextlib.contextmanager
def recorded(name: str) -> Iterator[list[Variant]]:
    """Collect the kernels that are launched inside, in their order, and run none; tensors may be on any device."""
    variants: list[Variant] = []

    def take(kernel: Any, _grid: tuple[int, ...], *launched: Any) -> None:
        variants.append(specialised(f"{kernel.fn.__name__}, {name}", kernel, *launched))

    with intercepted(take), mock.patch.object(launch, "check_device"):
        yield variants


def _loss(loss: Any) -> engine.Loss | None:
    """A loss by name in the words of the kernels."""
    return None if loss is None else as_numbers(pixel.resolve(loss, "loss"))


def step(
    name: str,
    size: tuple[int, ...] = (256, 256),
    *,
    dtype: torch.dtype = torch.float32,
    target: torch.dtype = torch.float32,
    seg: Any = "gdf",
    own: Any = "dice",
    center: Any = "dice",
    valid: bool = False,
    given: bool = False,
    **changes: Any,
) -> list[Variant]:
    """The kernels of one loss and its gradient, of four planes: all seven terms unless some are taken away.

    Args:
        name: of the use, for the names of the variants.
        size: of a plane.
        dtype: of the logits.
        target: of the target.
        seg: the pixel loss, or None; likewise `own`, the instance loss, and `center`.
        valid: whether there is a mask of valid pixels.
        given: whether the target holds ids.
        changes: fields of `engine.Request`.
    """
    request = engine.Request(
        channels=2,
        logits=True,
        categorical=False,
        threshold=0.0,
        connectivity=8 if len(size) == 2 else 26,
        seg=_loss(seg),
        own=_loss(own),
        center=_loss(center),
        dice=pixel.Dice().form.numbers,
        inverse=seg == "inverse_weighted_dice",
        blob=False,
        false_rates=True,
        proximity=True,
        average="instance",
        reduction="mean",
        by_pred=True,
        by_size=False,
        soft=False,
        missed_weight=0.3,
        whole=False,
        summed=False,
        center_size=(3,) * len(size),
        spacing=(1.0,) * len(size),
        max_instances=None,
        differentiable=True,
    )._replace(**changes)
    values = torch.empty(4, *size, dtype=dtype, device="meta")
    mask = values.to(torch.bool) if valid else None
    weights = (1.0,) * 7
    with recorded(name) as variants:
        images = values, values.to(torch.int32 if given else target), mask if request.categorical else None, mask
        found, total, saved = engine.forward(*images, weights, request, given=given)
        # A module's loss, or the terms one by one.
        upstream = (found, None) if request.reduction == "none" else (None, total)
        engine.backward(*upstream, values, mask, saved, weights, request, given=given)
    return variants


def engine_variants() -> Iterator[Variant]:
    """The kernels of a spread of losses, none twice; those that only label are in `label_variants`."""
    nothing = {"own": None, "center": None, "false_rates": False, "proximity": False}
    uses = [
        step("GDF + Dice"),
        step(
            "3D bfloat16 GDF", (64, 128, 128), dtype=torch.bfloat16, target=torch.uint8, own="gdf", center="dicece",
            valid=True, average="image", reduction="none",
        ),
        step(
            "float64 softmax squared", dtype=torch.float64, target=torch.bool, seg="dicece", own=SQUARED,
            center="focal", categorical=True, valid=True, connectivity=4, given=True, by_pred=False,
        ),
        step(
            "blob", (64, 128, 128), seg="dicece", own=SQUARED, center=None, false_rates=False, proximity=False,
            blob=True,
        ),
        step("Dice alone", seg="dice", dtype=torch.float16, **nothing),
        step("inverse-weighted", seg="inverse_weighted_dice", **nothing),
        step("false rates", own=None, center=None, proximity=False),
        step("soft modes", own="dicece", by_size=True, soft=True, whole=True, summed=True),
    ]  # fmt: skip
    seen = set()
    for variant in itertools.chain.from_iterable(uses):
        what = variant.kernel, tuple(variant.signature().items()), tuple(sorted(variant.constants.items()))
        if variant.kernel not in vars(label).values() and what not in seen:
            seen.add(what)
            yield variant


def region_variants() -> Iterator[Variant]:
    """The kernels of Voronoi regions: exact in float32 or not, and the pass that is not the last one."""
    for name, size, spacing in (("2D", (256, 256), (1.0, 1.0)), ("3D, spacing", (64, 128, 128), (3.0, 1.0, 1.0))):
        with recorded(name) as variants:
            regions.nearest_label(torch.empty(4, *size, dtype=torch.int32, device="meta"), spacing)
        yield from (
            dataclasses.replace(variant, name=f"{variant.name}, pass {number}")
            for number, variant in enumerate(variants, 1)
        )


def segment_step(
    name: str,
    size: tuple[int, ...] = (256, 256),
    *,
    kind: str = "form",
    dtype: torch.dtype = torch.float32,
    loss: Any = None,
    sides: int = 1,
    valid: bool = False,
    outside: bool = False,
    **changes: Any,
) -> list[Variant]:
    """The kernels of one loss by component and its gradient, of four planes whose maps are there.

    Args:
        name: of the use, for the names of the variants.
        size: of a plane.
        kind: of the results; see `segments.Request`, of which `changes` are fields, as is `outside`.
        dtype: of the logits.
        loss: of a segment.
        sides: maps of each plane.
        valid: whether there is a mask of valid pixels.
    """
    request = segments.Request(
        kind=kind,
        logits=True,
        connectivity=8 if len(size) == 2 else 26,
        given=False,
        max_instances=None,
        loss=_loss(loss) or engine.Loss(),
        outside=outside,
    )._replace(**changes)
    values = torch.empty(4, *size, dtype=dtype, device="meta")
    ids = values.to(torch.int32)
    target = values.float() if kind == "form" else None
    with recorded(name) as variants:
        images = values, target, values.to(torch.bool) if valid else None, ids, ids if sides == 2 else None
        counts = torch.empty(4 * sides, dtype=torch.int32, device="meta")
        found, saved = segments.forward(*images, counts, request)
        segments.backward(found, *images, counts, saved, request)
    return variants


def segment_variants() -> Iterator[Variant]:
    """The kernels of the losses by component."""
    ids = torch.empty(4, 256, 256, dtype=torch.int32, device="meta")
    with recorded("given ids") as variants:
        given.number_ids(ids)
    yield next(variant for variant in variants if variant.kernel is given.pack_ids)
    yield from segment_step("CC, DiceCE", loss="dicece", outside=True)
    yield from segment_step("CC, float64 squared", (64, 128, 128), dtype=torch.float64, loss=SQUARED, outside=True)
    yield from segment_step("Tversky", kind="weighted", power=1.0, offset=5.0, outside=True)
    yield from segment_step("recall, bfloat16", kind="weighted", dtype=torch.bfloat16, power=1.0, sides=2, valid=True)
    yield from segment_step("MIL", (64, 128, 128), kind="peak")


def compile_variant(variant: Variant, target: GPUTarget) -> Any:
    """The compiled kernel; `.asm` holds every stage. Pointers are 16-byte aligned, as those of torch are."""
    signature = variant.signature()
    known = variant.aligned
    if known is None:
        known = {name for name, kind in signature.items() if kind[0] == "*"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in known}
    source = ASTSource(variant.kernel, signature, constexprs=dict(variant.constants), attrs=aligned)
    options = {"num_warps": variant.warps, "maxnreg": variant.registers}
    return triton.compile(source, target=target, options=options)


def _binary(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _machine_code(compiled: Any) -> tuple[str, str]:
    """Resource usage and assembly of a cubin, from the tools in the Triton wheel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = os.path.join(folder, "kernel.cubin")
        Path(cubin).write_bytes(compiled.asm["cubin"])
        usage, code = (
            subprocess.run([_binary(tool), option, cubin], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    return usage, code


class Instruction(NamedTuple):
    """One line of SASS."""

    operation: str  # with its modifiers: LDG.E.128
    guarded: bool  # it has a predicate
    goes_to: str | None  # label of a branch


# `/*0a40*/  @!P0 LDG.E.STRONG.GPU R4, ...`: address, predicate, operation; `.L_x_1:` is a label.
_SASS = re.compile(
    r"^(?P<label>\.L_\w+):|^\s+/\*[0-9a-f]+\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<operation>[A-Z][A-Z0-9_.]*)(?P<rest>.*)",
    re.MULTILINE,
)


def instructions(code: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of a disassembled kernel without padding, and where each label is among them."""
    found, labels = [], {}
    for line in _SASS.finditer(code):
        if line["label"]:
            labels[line["label"]] = len(found)
        elif not line["operation"].startswith("NOP"):
            branch = line["operation"].split(".")[0] == "BRA"
            target = re.search(r"\.L_\w+", line["rest"]) if branch else None
            found.append(Instruction(line["operation"], line["guard"] is not None, target[0] if target else None))
    return found, labels


def shortest(found: list[Instruction], labels: Mapping[str, int]) -> list[Instruction]:
    """The fewest instructions from the entry to an exit: what a program does that finds nothing to do."""
    before: dict[int, int] = {0: -1}
    queue = collections.deque([0])
    while queue:
        at = queue.popleft()
        here = found[at]
        if here.operation.startswith("EXIT"):
            path = []
            while at >= 0:
                path.append(found[at])
                at = before[at]
            return path[::-1]
        following = [] if here.goes_to and not here.guarded else [at + 1]
        following += [labels[here.goes_to]] if here.goes_to else []
        for place in following:
            if place < len(found) and place not in before:
                before[place] = at
                queue.append(place)
    raise ValueError("expected a kernel that ends")


def access_bytes(operation: str) -> int:
    """Bytes of a lane that a load, store or atomic of global memory moves; 0 for other instructions."""
    if operation.split(".")[0] not in ("LDG", "STG", "ATOMG", "ATOM", "RED", "REDG"):
        return 0
    sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((size for part, size in sizes.items() if part in operation.split(".")), 4)


def resident_warps(registers: int, shared: int, warps: int) -> int:
    """Warps that a multiprocessor of sm_90 can hold: 64, in at most 32 programs, of 64 Ki registers and 227 KiB."""
    of_warp = -(-registers * 32 // 256) * 256  # registers are given out 256 at a time, from a quarter of them each
    programs = min(32, 64 // warps, 4 * (16384 // of_warp) // warps, (227 << 10) // (shared + 1024))
    return programs * warps


def nvidia_resources(compiled: Any) -> Row:
    """Registers, memory and instructions of a cubin."""
    usage, code = _machine_code(compiled)
    operations = [instruction.operation for instruction in instructions(code)[0]]
    kinds = collections.Counter(operation.split(".")[0] for operation in operations)

    def used(what: str) -> int:
        return int(re.findall(rf"{what}:(\d+)", usage)[-1])

    return {
        "registers": used("REG"),
        "shared bytes": compiled.metadata.shared,
        "spills": used("STACK") + used("LOCAL") + kinds["LDL"] + kinds["STL"],
        "instructions": len(operations),
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
    variants = list(
        (*label_variants(), *engine_variants(), *region_variants(), *segment_variants())
        if variants is None
        else variants
    )
    return [row(variant, target) for variant in variants for target in targets]


def launches(given: bool = False) -> str:
    """Kernels of a step with all terms, whatever the images hold."""
    names = [variant.kernel.fn.__name__ for variant in step("launches", given=given)]
    back = names.index("coefficients")
    return f"{back} forward, {len(names) - back} backward"


def report_row(variant: Variant) -> Row:
    """What one kernel does on sm_90, counted in its machine code."""
    compiled = compile_variant(variant, TARGETS["sm_90"])
    usage, code = _machine_code(compiled)
    found, labels = instructions(code)
    least = shortest(found, labels)
    threads = variant.warps * 32
    pixels = variant.pixels or variant.constants.get("WORDS", 0) * launch.WORD
    registers = int(re.findall(r"REG:(\d+)", usage)[-1])
    widths = collections.Counter(access_bytes(one.operation) for one in found)

    def each_pixel(amount: int) -> float | None:
        return amount * threads / pixels if pixels else None

    return {
        "kernel": variant.kernel.fn.__name__,
        "registers": registers,
        "warps": resident_warps(registers, compiled.metadata.shared, variant.warps),
        "instructions, least": each_pixel(len(least)),
        "once": each_pixel(len(found)),
        "bytes, least": each_pixel(sum(access_bytes(one.operation) for one in least)),
        "once ": each_pixel(sum(access_bytes(one.operation) for one in found)),
        "accesses": ", ".join(f"{n}×{size}" for size, n in sorted(widths.items(), reverse=True) if size),
        "atomics": sum(one.operation.split(".")[0] in ("ATOMG", "ATOM", "RED", "REDG") for one in found),
    }


def report(variants: Iterable[Variant] | None = None) -> str:
    """Markdown: the kernels of a step with all terms, for sm_90; by default those of `step("")`.

    "least" is the shortest way through a kernel (a tile of background), "once" is every instruction once, loops too.
    Both are instructions of a lane and pixel, and bytes of all lanes, idle ones as well, and pixel. "accesses" are the
    instructions on global memory by the bytes of a lane, "warps" what a multiprocessor can hold out of 64.
    """
    rows = [report_row(variant) for variant in (step("") if variants is None else variants)]
    columns = list(rows[0])
    lines = [f"Launches of a step with all terms: {launches()}.", ""]
    lines += [f"| {' | '.join(column.strip() for column in columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = (f"{value:.3g}" if isinstance(value, float) else str(value or "") for value in row.values())
        lines.append(f"| {' | '.join(cells)} |".replace(", |", " |"))
    return "\n".join(lines)


def _row(case: str, notes: Row) -> Row:
    row = {"case": case, "ours": [], "base": None, "share": False, "each": False}
    row |= {key: {} for key in ("milliseconds", "peak_bytes", "errors", "kernels", "synchronisations")}
    return {**row, "notes": {key: value for key, value in notes.items() if value is not None}, "goals": []}


def run(targets: Iterable[str] | None = None) -> Row:
    """The rows as a suite of a results file; nothing is timed."""
    from .results import machine

    unknown = set(targets or ()) - set(TARGETS)
    if unknown:
        raise ValueError(f"expected targets out of {list(TARGETS)}, got {sorted(unknown)}")
    found = [
        _row("all terms", {"launches": launches()}),
        _row("all terms, labels given", {"launches": launches(given=True)}),
    ]
    for one in rows(targets=targets or TARGETS):
        notes = {key: round(value, 1) if isinstance(value, float) else value for key, value in one.items()}
        found.append(_row(f"{notes.pop('kernel')}, {notes['target']}", notes))
    return {"machine": machine("cpu"), "rows": found}
