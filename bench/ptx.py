"""PTX as Triton writes it: the parts of its text, and what instructions compute, on arrays with a value per thread.

Registers are bits: unsigned integers of 16, 32 or 64 bits, and booleans for predicates.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["REGISTERS", "TYPES", "Array", "Instruction", "UnknownInstructionError", "computation", "immediate", "parse"]

Array = NDArray[Any]
Compute = Callable[..., Any]

REGISTERS = {".pred": np.dtype("?"), ".b16": np.dtype("u2"), ".b32": np.dtype("u4"), ".b64": np.dtype("u8")}
"""Classes of registers."""

TYPES = {
    **{f"{kind}{8 * size}": np.dtype(f"{code}{size}") for kind, code in ("bu", "uu", "si") for size in (1, 2, 4, 8)},
    "pred": np.dtype("?"),
    "f16": np.dtype("f2"),
    "f32": np.dtype("f4"),
    "f64": np.dtype("f8"),
}
"""Types of instructions, and how numpy computes with them; bf16 has none."""


class UnknownInstructionError(Exception):
    """Something that this module does not understand."""


class Instruction(NamedTuple):
    """One line of PTX: `@!%p1 add.s32 %r1, %r2, 3;`"""

    guard: str | None  # register of the predicate
    negated: bool
    operation: tuple[str, ...]  # "add", "s32"
    operands: tuple[str, ...]
    line: str  # of the source

    @property
    def name(self) -> str:
        return ".".join(self.operation)


_LINE = re.compile(r"(?:@(?P<negated>!?)%(?P<guard>\w+)\s+)?(?P<operation>[a-z][\w.]*)\s*(?P<operands>[^;]*);")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^\s,|]+")
_HALF = re.compile(r"\{ \.reg \.b32 tmp; (?P<move>mov\.b64 .*;) \}")  # one half of a register, the other thrown away
_REGISTER = re.compile(r"\.reg\s+(?P<kind>\.\w+)\s+%(?P<prefix>\w+)<(?P<number>\d+)>;")


def parse(ptx: str) -> tuple[list[Instruction], dict[str, int], dict[str, np.dtype[Any]]]:
    """The instructions of the one kernel in a text, the place of each label, and the type of each register."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    registers: dict[str, np.dtype[Any]] = {}
    begin = ptx.index("\n{") + 2
    source = "?"
    for line in ptx[begin : ptx.index("\n}", begin)].splitlines():
        text, _, remark = (part.strip() for part in line.partition("//"))
        if half := _HALF.fullmatch(text):
            text = half["move"].replace("tmp", "_")
        if text.startswith(".loc"):
            source = remark.split("@")[0].strip() or source
        elif declared := _REGISTER.match(text):
            names = (f"%{declared['prefix']}{n}" for n in range(int(declared["number"])))
            registers |= dict.fromkeys(names, REGISTERS[declared["kind"]])
        elif text.endswith(":"):
            labels[text[:-1]] = len(found)
        elif line := _LINE.fullmatch(text):
            operation = tuple(line["operation"].split("."))
            guard = line["guard"] and f"%{line['guard']}"
            found.append(
                Instruction(guard, bool(line["negated"]), operation, (*_OPERAND.findall(line["operands"]),), source)
            )
        elif text.strip("{}") and text[0] != ".":
            raise UnknownInstructionError(f"cannot read {text!r}")
    return found, labels, registers


def immediate(text: str, dtype: np.dtype[Any]) -> np.generic:
    """A literal as the bits of a register; addresses in shared memory begin at 0."""
    if text[:2] in ("0f", "0d"):
        return {"0f": np.uint32, "0d": np.uint64}[text[:2]](int(text[2:], 16))
    value = 0 if text == "global_smem" else int(text.rstrip("U"), 0)
    return dtype.type(value if dtype == np.bool_ else value & ((1 << 8 * dtype.itemsize) - 1))


def _numbers(bits: Any, kind: str) -> Any:
    """Bits as numbers to compute with; of a wide register the low bits."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    dtype = TYPES[kind]
    return (bits.astype(f"u{dtype.itemsize}") if bits.dtype.itemsize > dtype.itemsize else bits).view(dtype)


def _to_bf16(values: Array) -> Array:
    """Rounded to nearest, ties to even."""
    bits = values.view(np.uint32)
    bits = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), 0x7FFF, bits).astype(np.uint16)


def _to_integer(values: Array, dtype: np.dtype[Any]) -> Array:
    """Rounded towards zero; what does not fit becomes the nearest integer that does, and NaN 0 (64 bits: the least)."""
    info = np.iinfo(dtype)
    whole = np.trunc(values.astype(np.float64))
    high, low = whole >= 2.0 ** (info.bits - (info.min < 0)), whole < info.min
    result = np.where(high | low | np.isnan(whole), 0, whole).astype(dtype)
    result = np.where(high, info.max, np.where(low, info.min, result))
    return np.where(np.isnan(whole), info.min if info.bits == 64 else 0, result).astype(dtype)


def _quotient(a: Any, b: Any) -> Any:
    """Of integers, towards zero; a device does not trap for 0."""
    b = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // b
    return quotient + ((quotient * b != a) & ((a < 0) != (b < 0))).astype(a.dtype)


def _fused(a: Any, b: Any, c: Any) -> Any:
    """a·b + c; of float64 with the 64 digits of a long double, not all of them."""
    wide = np.float64 if a.dtype == np.float32 else np.longdouble
    return (a.astype(wide) * b.astype(wide) + c.astype(wide)).astype(a.dtype)


def _reciprocal(a: Any) -> Any:
    """`rcp.approx.ftz.f64` gives the upper half of the bits."""
    return ((1 / a).view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)


def _shift(left: bool, a: Any, amount: Any) -> Any:
    """By the width or more: to 0, or to the sign."""
    bits = 8 * a.dtype.itemsize
    by = np.minimum(amount, np.uint32(bits - 1)).astype(a.dtype)
    shifted = a << by if left else a >> by
    return shifted if a.dtype.kind == "i" and not left else np.where(amount < bits, shifted, a.dtype.type(0))


def _permuted(a: Any, b: Any, selector: Any) -> Any:
    """`prmt.b32`: each byte of the result is one of the eight of (b, a), or the sign of it."""
    both = b.astype(np.uint64) << np.uint64(32) | a.astype(np.uint64)
    result = np.uint32(0)
    for place in range(0, 32, 8):
        chosen = selector >> np.uint32(place // 2)
        byte = (both >> (8 * (chosen & np.uint32(7))).astype(np.uint64) & np.uint64(255)).astype(np.uint32)
        sign = np.uint32(255) * (byte >> np.uint32(7))
        result = result | np.where(chosen & np.uint32(8), sign, byte) << np.uint32(place)
    return result


def _funnel(a: Any, b: Any, amount: Any) -> Any:
    """`shf.l.wrap`: the upper word of (b, a) shifted to the left."""
    both = b.astype(np.uint64) << np.uint64(32) | a.astype(np.uint64)
    return (both << (amount & np.uint32(31)).astype(np.uint64) >> np.uint64(32)).astype(np.uint32)


def _signed_field(a: Any, start: Any, length: Any) -> Any:
    """`bfe.s32`: the sign is that of the field."""
    above = (np.uint32(32) - length).astype(np.int32)
    return a.view(np.int32) >> start.astype(np.int32) << above >> above


_ON_BITS: dict[str, Compute] = {
    "mov": lambda a: a,
    "selp": lambda a, b, p: np.where(p, a, b),
    "prmt.b32": _permuted,
    "shf.l.wrap.b32": _funnel,
    "bfe.u32": lambda a, start, length: a >> start & (np.uint32(1) << length) - np.uint32(1),
    "bfe.s32": _signed_field,
}
_ON_NUMBERS: dict[str, Compute] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "mad": lambda a, b, c: a * b + c, "neg": np.negative,
    "abs": np.abs, "min": np.fmin, "max": np.fmax, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "not": np.invert, "popc": np.bitwise_count, "fma": _fused, "ex2": np.exp2, "lg2": np.log2, "sqrt": np.sqrt,
    "rcp": _reciprocal, "rem": lambda a, b: a - _quotient(a, b) * b, "copysign": lambda sign, a: np.copysign(a, sign),
}  # fmt: skip
_COMPARISONS: dict[str, Compute] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


def _comparison(kind: str, name: str) -> Compute:
    if name == "nan":  # either is
        return lambda a, b: np.isnan(_numbers(a, kind)) | np.isnan(_numbers(b, kind))
    compare, unordered = _COMPARISONS[name[:2]], name[2:] == "u"

    def compared(a: Any, b: Any) -> Any:
        x, y = _numbers(a, kind), _numbers(b, kind)
        if x.dtype.kind != "f":
            return compare(x, y)
        nan = np.isnan(x) | np.isnan(y)
        return compare(x, y) | nan if unordered else compare(x, y) & ~nan

    return compared


_MODIFIERS = {"rn", "ftz", "approx", "full", "lo", "wide"}  # others, such as `mul.hi`, mean something else
_ROUNDED = {"rmi": np.floor, "rpi": np.ceil, "rzi": np.trunc, "rni": np.rint}  # to an integer


def _conversion(operation: Sequence[str]) -> Compute:
    *modes, to, source = operation[1:]
    (rounded,) = [_ROUNDED[mode] for mode in modes if mode in _ROUNDED] or [lambda value: value]

    def converted(a: Any) -> Any:
        value = rounded(_numbers(a, source))
        if to == "bf16":
            return _to_bf16(value)
        if value.dtype.kind == "f" and TYPES[to].kind in "iu":
            return _to_integer(value, TYPES[to])
        return value.astype(TYPES[to])

    return converted


def _widened(kind: str) -> Compute:
    """`mul.wide` and `mad.wide`."""
    wide = np.dtype(f"{TYPES[kind].kind}{2 * TYPES[kind].itemsize}")

    def product(a: Any, b: Any, *c: Any) -> Any:
        return sum((number.view(wide) for number in c), _numbers(a, kind).astype(wide) * _numbers(b, kind).astype(wide))

    return product


def computation(operation: Sequence[str]) -> Compute:
    """What an instruction without memory or other threads makes of the bits of its sources."""
    name, kind, whole = operation[0], operation[-1], ".".join(operation)
    for known in (name, whole):
        if known in _ON_BITS:
            return _ON_BITS[known]
    if name == "setp" and len(operation) == 3:
        return _comparison(kind, operation[1])
    if name == "cvt" and _MODIFIERS.union(_ROUNDED).issuperset(operation[1:-2]):
        return _conversion(operation)
    if name == "abs" and kind in ("f16", "bf16"):
        return lambda a: a & np.uint16(0x7FFF)
    if kind in TYPES and _MODIFIERS.issuperset(operation[1:-1]):
        if "wide" in operation:
            return _widened(kind)
        if name in ("shl", "shr"):
            return lambda a, amount: _shift(name == "shl", _numbers(a, kind), amount)
        compute = (np.divide if kind[0] == "f" else _quotient) if name == "div" else _ON_NUMBERS.get(name)
        if compute is not None:
            return lambda *sources: compute(*(_numbers(source, kind) for source in sources))
    raise UnknownInstructionError(f"does not know {whole}")
