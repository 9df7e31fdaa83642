"""Run compiled kernels without a GPU: an emulator of the PTX that Triton makes of them for sm_90.

Triton's interpreter runs the source, one program after the other. Here runs what the compiler made of it, with its
shuffles, shared memory, barriers and atomics, and with all programs of a launch at once: a register is an array with
a value per thread, and each round the warps at one block of instructions run it. A `Schedule` says which.

    with emulated(Schedule(seed=0)) as launches, use_backend("triton"):
        loss(logits, target).backward()  # on the CPU

What a GPU would fault at, or leave undefined, raises an error: addresses outside of the tensors or not aligned, and
shuffles and barriers that some threads never reach. With `races=True` it lists what two programs of a launch do to one
address without atomics. Memory is sequentially consistent here, on a GPU it is not.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
import math
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from fastinstance_kernels import launch as limits

from . import aot
from .ptx import TYPES, Array, Instruction, computation, immediate, parse

__all__ = ["EmulationError", "Launch", "Schedule", "emulated"]

_WARP = 32
_SPACE = 40  # bits of an address within the memory of a tensor; the bits above are the number of that memory
_SECTOR = 32  # bytes that a GPU moves at least
_ACCESSES = "ld", "st", "atom", "ldmatrix", "stmatrix"


class EmulationError(Exception):
    """What would fault, hang or be undefined on a GPU."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which programs run side by side, and which of their warps go on in a round."""

    resident: int = 8192
    """Programs at a time; the others follow when these have ended."""
    seed: int | None = None
    """None: all warps in lockstep, those that are behind first. Else programs start in a drawn order, and a drawn part
    of the warps goes on to the next access to memory."""
    races: bool = False
    """Whether to look for races."""


@dataclasses.dataclass
class Launch:
    """A launch and what it issued."""

    name: str
    programs: int
    warps: int
    """Of a program."""
    instructions: Counter[str] = dataclasses.field(default_factory=Counter)
    """Of warps."""
    sectors: Counter[str] = dataclasses.field(default_factory=Counter)
    """Of 32 bytes of global memory, of all warps, by "ld", "st" and "atom"."""
    atomics: int = 0
    """Of threads."""
    races: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    """An access and an earlier one of another program to the same address, one of them a store: their source lines."""


Step = Callable[["_Threads"], None]


class _Block(NamedTuple):
    """Instructions that a warp runs without a turn of others, and where it goes then."""

    steps: list[Step]
    names: list[str]  # of all instructions
    condition: tuple[str, bool] | None  # predicate, and its value for the other way
    target: int  # block after a branch that is taken
    barrier: bool


class _Kernel:
    """A compiled kernel, cut into blocks: at branches, barriers and labels, and in `fine` ones at memory accesses."""

    def __init__(self, ptx: str, name: str, warps: int, shared: int, fine: bool) -> None:
        self.name, self.warps, self.shared = name, warps, shared
        code, labels, self.types = parse(ptx)
        self.used = Counter(word for one in code for operand in one.operands for word in operand.strip("{[]}").split())
        edges = {0, *labels.values()}
        for place, one in enumerate(code, 1):
            access = one.operation[0] in _ACCESSES and "param" not in one.operation
            if one.operation[0] in ("bra", "ret") or one.name == "bar.sync" or (fine and access):
                edges.add(place)
        starts = sorted(edges - {len(code)})
        numbers = {start: number for number, start in enumerate(starts)} | {len(code): len(starts)}
        self.blocks = []
        for number, (start, stop) in enumerate(itertools.pairwise([*starts, len(code)])):
            last = code[stop - 1]
            target = number + 1
            if last.operation[0] == "ret":
                target = len(starts)
            elif last.operation[0] == "bra":
                target = numbers[labels[last.operands[0]]]
            steps = [_step(self, one) for one in code[start:stop] if one.operation[0] not in ("bra", "ret", "bar")]
            condition = (last.guard, last.negated) if last.guard and last.operation[0] in ("bra", "ret") else None
            names = [one.name for one in code[start:stop]]
            self.blocks.append(_Block(steps, names, condition, target, last.name == "bar.sync"))


class _Memory:
    """The tensors of a launch; each has addresses of its own."""

    def __init__(self, launch: Launch, races: bool) -> None:
        self.launch = launch
        self.bytes: list[Array] = []
        self.known: dict[int, int] = {}  # address on the host -> number
        self.history: list[dict[str, Array]] | None = [] if races else None
        self.lines: list[str] = []

    def address(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        host, size = storage.data_ptr(), storage.nbytes()
        if host not in self.known:
            self.known[host] = len(self.bytes)
            array = (ctypes.c_uint8 * size).from_address(host) if size else ()
            self.bytes.append(np.asarray(array, np.uint8))
            if self.history is not None:  # program + 1 and line of the last store, load and atomic of each address
                self.history.append({what: np.zeros((2, size), np.int32) for what in ("st", "ld", "atom")})
        return (self.known[host] + 1 << _SPACE) + tensor.storage_offset() * tensor.element_size()

    def parts(self, at: Array, size: int, where: str) -> Iterator[tuple[int, Array, Array]]:
        """Of some addresses: number of a memory, which threads mean it, and the first byte for each of these."""
        number = (at >> np.uint64(_SPACE)).astype(np.int64) - 1
        first = (at & np.uint64((1 << _SPACE) - 1)).astype(np.int64)
        if (first % size).any():
            raise EmulationError(f"{where}: an address that is not a multiple of {size}")
        for one in np.unique(number).tolist():
            threads = np.flatnonzero(number == one)
            if not (0 <= one < len(self.bytes) and (first[threads] + size <= len(self.bytes[one])).all()):
                raise EmulationError(f"{where}: an address outside of the tensors")
            yield one, threads, first[threads]

    def note(self, what: str, number: int, first: Array, program: Array, line: str) -> None:
        """Look for races, and remember this access."""
        if self.history is None:
            return
        if line not in self.lines:
            self.lines.append(line)
        for other, seen in self.history[number].items():
            if what == other != "st" or "st" not in (what, other):
                continue
            before, place = seen[:, first]
            (racing,) = np.nonzero((before != 0) & (before != program + 1))
            for earlier in place[racing].tolist():
                self.launch.races[f"{what} {line}", f"{other} {self.lines[earlier]}"] += 1
        self.history[number][what][:, first] = program + 1, np.full(len(first), self.lines.index(line))


class _Group:
    """Programs that run side by side: their registers and shared memory, and where each thread is."""

    def __init__(
        self,
        kernel: _Kernel,
        programs: Array,
        memory: _Memory,
        parameters: Mapping[str, np.generic],
        schedule: Schedule,
    ) -> None:
        self.kernel, self.memory, self.parameters = kernel, memory, parameters
        self.random = np.random.default_rng(schedule.seed)
        self.lockstep = schedule.seed is None
        self.size = kernel.warps * _WARP  # threads of a program
        thread = np.arange(len(programs) * self.size)
        self.program = programs.repeat(self.size)
        self.registers = {
            "%ctaid.x": self.program.astype(np.uint32),
            "%tid.x": (thread % self.size).astype(np.uint32),
        }
        self.shared = np.zeros(len(programs) * kernel.shared, np.uint8)
        self.shared_start = thread // self.size * kernel.shared
        self.block = np.zeros(len(thread), np.int64)
        self.waiting = np.zeros(len(thread), bool)  # at a barrier, to go on with their block
        self.executed = [0] * len(kernel.blocks)  # by how many warps

    def register(self, name: str) -> Array:
        if name not in self.registers:
            self.registers[name] = np.zeros(len(self.block), self.kernel.types[name])
        return self.registers[name]

    def run(self) -> None:
        """Until all threads have ended."""
        end = len(self.kernel.blocks)
        while True:
            at = np.where(self.waiting, end, self.block).reshape(-1, _WARP).min(1)  # of each warp
            ready = np.flatnonzero(at < end)
            if not len(ready):
                if self.waiting.any():
                    raise EmulationError(f"{self.kernel.name}: a barrier that some threads of a program never reach")
                break
            if self.lockstep:
                number = at[ready].min()
            else:
                some = ready[self.random.random(len(ready)) < self.random.choice((0.1, 0.5, 1.0))]
                ready = some if len(some) else ready
                number = self.random.choice(at[ready])
            self.step(int(number), ready[at[ready] == number])
        for block, warps in zip(self.kernel.blocks, self.executed, strict=True):
            for name in block.names:
                self.memory.launch.instructions[name] += warps

    def step(self, number: int, warps: Array) -> None:
        """Run a block, with the threads of these warps that are there."""
        block = self.kernel.blocks[number]
        of_warps = (warps[:, None] * _WARP + np.arange(_WARP)).reshape(-1)
        threads = _Threads(self, of_warps[(self.block[of_warps] == number) & ~self.waiting[of_warps]], len(warps))
        for step in block.steps:
            step(threads)
        threads.end()
        self.executed[number] += len(warps)
        following = block.target
        if block.condition is not None:
            predicate, otherwise = block.condition
            following = np.where(threads.get(predicate) != otherwise, block.target, number + 1)
        self.block[threads.index] = following
        if block.barrier:
            self.waiting[threads.index] = True
            arrived = self.waiting | (self.block == len(self.kernel.blocks))
            self.waiting[arrived.reshape(-1, self.size).all(1).repeat(self.size)] = False


class _Threads:
    """The threads that run a block, and their registers until it ends."""

    def __init__(self, group: _Group, index: Array, warps: int) -> None:
        self.group, self.index = group, index
        self.whole = len(index) == warps * _WARP  # no warp lacks a thread
        self.all = len(index) == len(group.block)
        self.values: dict[str, Array] = {}
        self.changed: set[str] = set()

    def get(self, name: str) -> Array:
        if name not in self.values:
            register = self.group.register(name)
            self.values[name] = register if self.all else register[self.index]
        return self.values[name]

    def set(self, name: str, value: Any, guard: Array | None = None) -> None:
        dtype = self.group.kernel.types[name]
        value = np.broadcast_to(value, self.index.shape)
        if value.dtype.itemsize == dtype.itemsize:
            value = np.ascontiguousarray(value).view(dtype)
        else:  # the low bits, or with the sign or zeros above
            value = value.astype(dtype)
        self.values[name] = value if guard is None else np.where(guard, value, self.get(name))
        self.changed.add(name)

    def end(self) -> None:
        for name in self.changed:
            if self.all:
                self.group.registers[name] = self.values[name].copy()  # no two registers share an array
            else:
                self.group.register(name)[self.index] = self.values[name]

    def by_warp(self, values: Any, where: str) -> Array:
        """[warps, 32], for what all threads of a warp do together."""
        if not self.whole:
            raise EmulationError(f"{where}: not all threads of a warp take part")
        return np.broadcast_to(values, self.index.shape).reshape(-1, _WARP)


def _source(text: str, dtype: np.dtype[Any]) -> Callable[[_Threads], Any]:
    """What reads an operand."""
    if text.startswith("%"):
        return lambda threads: threads.get(text)
    value = immediate(text, dtype)
    return lambda threads: value


def _guard(one: Instruction) -> Callable[[_Threads], Array | None]:
    guard = one.guard
    return lambda threads: None if guard is None else threads.get(guard) != one.negated


def _step(kernel: _Kernel, one: Instruction) -> Step:
    """What does an instruction."""
    name = one.operation[0]
    makers: dict[str, Callable[[_Kernel, Instruction], Step]] = {
        "ld": _load, "st": _store, "atom": _atomic, "shfl": _shuffle, "redux": _reduce,
        "ldmatrix": _matrices, "stmatrix": _matrices,
    }  # fmt: skip
    if name in makers:
        return makers[name](kernel, one)
    if name == "mov" and "{" in "".join(one.operands):
        return _unpack(one) if one.operands[0].startswith("{") else _pack(one)
    if name in ("cvt", "setp") and {"f16x2", "bf16x2"}.intersection(one.operation):
        return _halves(one)
    compute, guard, kind = computation(one.operation), _guard(one), one.operation[-1]
    dtype = kernel.types[one.operands[0]] if name in ("mov", "selp") else _bits(kind)
    dtypes = [dtype] * (len(one.operands) - 1)
    if name in ("shl", "shr"):
        dtypes[1] = np.dtype("u4")
    elif name == "selp":
        dtypes[2] = np.dtype("?")
    elif name == "mad" and "wide" in one.operation:
        dtypes[2] = np.dtype("u8")
    sources = [_source(text, dtype) for text, dtype in zip(one.operands[1:], dtypes, strict=True)]
    return lambda threads: threads.set(one.operands[0], compute(*(get(threads) for get in sources)), guard(threads))


def _bits(kind: str) -> np.dtype[Any]:
    """The registers for a type."""
    return np.dtype("?") if kind == "pred" else np.dtype(f"u{int(kind.strip('bfsu')) // 8}")


def _parts(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{}").split(",")]


def _unpack(one: Instruction) -> Step:
    """`mov.b64 {%r1, %r2}, %rd1;`"""
    whole = _bits(one.operation[-1])
    half, guard, source = np.dtype(f"u{whole.itemsize // 2}"), _guard(one), _source(one.operands[1], whole)

    def step(threads: _Threads) -> None:
        for place, name in enumerate(_parts(one.operands[0])):
            if name != "_":
                part = source(threads) >> whole.type(place * 8 * half.itemsize)
                threads.set(name, part.astype(half), guard(threads))

    return step


def _pack(one: Instruction) -> Step:
    """`mov.b64 %rd1, {%r1, %r2};`"""
    whole = _bits(one.operation[-1])
    half, guard = np.dtype(f"u{whole.itemsize // 2}"), _guard(one)
    low, high = (_source(part, half) for part in _parts(one.operands[1]))

    def step(threads: _Threads) -> None:
        upper = high(threads).astype(whole) << whole.type(8 * half.itemsize)
        threads.set(one.operands[0], upper | low(threads).astype(whole), guard(threads))

    return step


def _halves(one: Instruction) -> Step:
    """Two numbers of 16 bits in a register: `cvt.rn.f16x2.f32` makes one, `setp.ge.f16x2` compares them."""
    guard, word = _guard(one), np.dtype("u4")
    if one.operation[0] == "cvt":
        *modes, pair, source = one.operation
        high, low = (_source(text, word) for text in one.operands[1:])
        to_half = computation((*modes, pair.removesuffix("x2"), source))

        def convert(threads: _Threads) -> None:
            upper, lower = (to_half(get(threads)).view(np.uint16).astype(word) for get in (high, low))
            threads.set(one.operands[0], upper << np.uint32(16) | lower, guard(threads))

        return convert
    compare = computation((*one.operation[:-1], one.operation[-1].removesuffix("x2")))
    sources = [_source(text, word) for text in one.operands[2:]]

    def step(threads: _Threads) -> None:
        words = [get(threads) for get in sources]
        for place, name in enumerate(one.operands[:2]):
            threads.set(name, compare(*((w >> np.uint32(16 * place)).astype("u2") for w in words)), guard(threads))

    return step


def _reduce(kernel: _Kernel, one: Instruction) -> Step:
    """`redux.sync`"""
    source, dtype = _source(one.operands[1], np.dtype("u4")), TYPES[one.operation[-1]]
    reduce = {"add": np.add, "min": np.minimum, "max": np.maximum}[one.operation[2]].reduce
    where = f"{kernel.name}, {one.line}"

    def step(threads: _Threads) -> None:
        result = reduce(threads.by_warp(source(threads), where).view(dtype), axis=1, dtype=dtype)
        threads.set(one.operands[0], result.repeat(_WARP))

    return step


def _shuffle(kernel: _Kernel, one: Instruction) -> Step:
    """`shfl.sync`"""
    source, by = (_source(text, np.dtype("u4")) for text in one.operands[1:3])
    lane, where = np.arange(_WARP), f"{kernel.name}, {one.line}"
    partner = {
        "bfly": lambda amount: lane ^ amount,
        "up": lambda amount: np.where(lane >= amount, lane - amount, lane),
        "idx": lambda amount: amount % _WARP,
    }[one.operation[2]]

    def step(threads: _Threads) -> None:
        words, amount = (threads.by_warp(get(threads), where) for get in (source, by))
        threads.set(one.operands[0], np.take_along_axis(words, partner(amount.astype(np.int64)), 1).reshape(-1))

    return step


class _Access:
    """What loads, stores and atomics share: who takes part, and where."""

    def __init__(self, kernel: _Kernel, one: Instruction, width: int, number: int) -> None:
        self.kernel, self.what, self.width, self.number = kernel, one.operation[0], width, number
        (address,) = (operand for operand in one.operands if operand.startswith("["))
        base, _, offset = (part.strip() for part in address.strip("[]").partition("+"))
        self.base, self.offset = _source(base, np.dtype("u4")), int(offset or 0)
        self.shared = "shared" in one.operation
        self.guard, self.line, self.where = _guard(one), one.line, f"{kernel.name}, {one.line}"

    def active(self, threads: _Threads) -> Array:
        """Which threads take part, by their place in `threads`."""
        guard = self.guard(threads)
        return np.arange(len(threads.index)) if guard is None else np.flatnonzero(guard)

    def cells(self, threads: _Threads, active: Array) -> Iterator[tuple[Array, Array, Array]]:
        """Memory in cells of the width, and which of `active` mean which cell of it."""
        dtype, size = np.dtype(f"u{self.width}"), self.width * self.number
        index = threads.index[active]
        if self.shared:
            at = np.broadcast_to(self.base(threads), threads.index.shape)[active].astype(np.int64) + self.offset
            if (at % size).any() or (at < 0).any() or (at + size > self.kernel.shared).any():
                raise EmulationError(f"{self.where}: an address that is not in shared memory, or not aligned")
            memory = threads.group.shared
            yield memory.view(dtype), (threads.group.shared_start[index] + at) // self.width, np.arange(len(active))
            return
        at = self.base(threads)[active] + np.uint64(self.offset % 2**64)
        memory, launch = threads.group.memory, threads.group.memory.launch
        sectors = (index // _WARP).astype(np.uint64) << np.uint64(44) ^ at // np.uint64(_SECTOR)
        launch.sectors[self.what] += len(np.unique(sectors))
        for number, which, first in memory.parts(at, size, self.where):
            memory.note(self.what, number, first, threads.group.program[index[which]], self.line)
            array = memory.bytes[number]
            yield array[: len(array) - len(array) % self.width].view(dtype), first // self.width, which


def _load(kernel: _Kernel, one: Instruction) -> Step:
    kind, names = one.operation[-1], _parts(one.operands[0])
    dtype = TYPES[kind]
    if "param" in one.operation:
        parameter = one.operands[1].strip("[]")
        return lambda threads: threads.set(names[0], threads.group.parameters[parameter].view(dtype))
    access = _Access(kernel, one, dtype.itemsize, len(names))

    def step(threads: _Threads) -> None:
        active = access.active(threads)
        results = np.zeros((len(names), len(threads.index)), dtype)
        for memory, cell, which in access.cells(threads, active):
            for place, result in enumerate(results):
                result[active[which]] = memory[cell + place].view(dtype)
        for name, result in zip(names, results, strict=True):
            threads.set(name, result, access.guard(threads))

    return step


def _store(kernel: _Kernel, one: Instruction) -> Step:
    dtype = _bits(one.operation[-1])
    sources = [_source(name, dtype) for name in _parts(one.operands[1])]
    access = _Access(kernel, one, dtype.itemsize, len(sources))

    def step(threads: _Threads) -> None:
        active = threads.group.random.permutation(access.active(threads))  # of stores to one address any may be last
        values = [np.broadcast_to(get(threads), threads.index.shape)[active].astype(dtype) for get in sources]
        for memory, cell, which in access.cells(threads, active):
            for place, value in enumerate(values):
                memory[cell + place] = value[which]

    return step


def _atomic(kernel: _Kernel, one: Instruction) -> Step:
    kind, name = one.operation[-1], one.operation[-2]
    dtype = TYPES[kind]
    target, _, *texts = one.operands
    sources = [_source(text, _bits(kind)) for text in texts]
    access = _Access(kernel, one, dtype.itemsize, 1)
    wanted = kernel.used[target] > 1  # something reads the old value
    apply = {"add": np.add, "min": np.minimum, "max": np.maximum, "cas": None}[name]

    def step(threads: _Threads) -> None:
        active = threads.group.random.permutation(access.active(threads))
        threads.group.memory.launch.atomics += len(active)
        given = [np.broadcast_to(get(threads), threads.index.shape)[active].view(dtype) for get in sources]
        result = np.zeros(len(threads.index), dtype)
        for cells, cell, which in access.cells(threads, active):
            memory = cells.view(dtype)
            if apply is not None and not wanted:
                apply.at(memory, cell, given[0][which])
                continue
            left = np.arange(len(cell))
            while len(left):  # a turn takes one thread of each address
                _, first = np.unique(cell[left], return_index=True)
                turn = left[first]
                old, mine = memory[cell[turn]], [value[which[turn]] for value in given]
                result[active[which[turn]]] = old
                memory[cell[turn]] = np.where(old == mine[0], mine[1], old) if apply is None else apply(old, mine[0])
                left = np.delete(left, first)
        threads.set(target, result, access.guard(threads))

    return step


def _matrices(kernel: _Kernel, one: Instruction) -> Step:
    """`ldmatrix` and `stmatrix` of 8 × 8 values of 16 bits: thread 8k + r has the address of row r of matrix k."""
    load, word, half = one.operation[0] == "ldmatrix", np.dtype("u4"), np.dtype("u2")
    names = _parts(one.operands[not load])
    sources = [_source(name, word) for name in names]
    access = _Access(kernel, one, 16, 1)
    lane = np.arange(_WARP)
    places = [(lane // 4, lane % 4 * 2 + upper) for upper in (0, 1)]  # row and column, for both halves of a register
    if "trans" in one.operation:
        places = [(column, row) for row, column in places]

    def step(threads: _Threads) -> None:
        at = np.asarray(access.base(threads)).astype(np.int64) + access.offset
        rows = threads.by_warp(at, access.where)[:, : 8 * len(names)]
        if (rows % 16).any() or (rows < 0).any() or (rows + 16 > kernel.shared).any():
            raise EmulationError(f"{access.where}: an address that is not in shared memory, or not aligned")
        rows = rows + threads.by_warp(threads.group.shared_start[threads.index], access.where)[:, :1]
        memory = threads.group.shared.view(half)
        for matrix, (name, source) in enumerate(zip(names, sources, strict=True)):
            low, high = (rows[:, 8 * matrix + row] // 2 + column for row, column in places)
            if load:
                threads.set(name, (memory[high].astype(word) << np.uint32(16) | memory[low]).reshape(-1))
            else:
                values = threads.by_warp(source(threads), access.where)
                memory[low], memory[high] = values.astype(half), (values >> np.uint32(16)).astype(half)

    return step


_kernels: dict[str, _Kernel] = {}


def _kernel(variant: aot.Variant, fine: bool) -> _Kernel:
    """Compiled and cut into blocks, once."""
    fields = (variant.signature(), variant.constants, variant.warps, variant.registers, sorted(variant.aligned or ()))
    key = repr((variant.kernel.fn.__module__, variant.name, fields, fine))
    if key not in _kernels:
        compiled = aot.compile_variant(variant, aot.TARGETS["sm_90"])
        metadata = compiled.metadata
        _kernels[key] = _Kernel(compiled.asm["ptx"], metadata.name, variant.warps, metadata.shared, fine)
    return _kernels[key]


def _argument(value: Any, kind: str, memory: _Memory) -> np.generic:
    """The bits of a kernel's parameter."""
    if isinstance(value, torch.Tensor):
        return np.uint64(memory.address(value))
    if kind == "fp32":
        return np.uint32(struct.unpack("I", struct.pack("f", value))[0])
    return np.uint64(value % 2**64) if kind == "i64" else np.uint32(value % 2**32)


def _run(kernel: Any, grid: Sequence[int], arguments: Mapping[str, Any], warps: int, schedule: Schedule) -> Launch:
    variant = aot.specialised(kernel.fn.__name__, kernel, arguments, warps)
    code = _kernel(variant, schedule.seed is not None)
    launch = Launch(code.name, math.prod(grid), warps)
    memory = _Memory(launch, schedule.races)
    types = {name: kind for name, kind in variant.signature().items() if kind != "constexpr"}
    values = [_argument(arguments[name], kind, memory) for name, kind in types.items()]
    scratch = [np.uint64(0)] * 2  # Triton's own memory: these kernels have none
    parameters = {f"{code.name}_param_{n}": value for n, value in enumerate([*values, *scratch])}
    programs = np.arange(launch.programs)
    if schedule.seed is not None:
        np.random.default_rng(schedule.seed).shuffle(programs)
    with np.errstate(all="ignore"):
        for start in range(0, len(programs), schedule.resident):
            _Group(code, programs[start : start + schedule.resident], memory, parameters, schedule).run()
    return launch


@contextlib.contextmanager
def emulated(schedule: Schedule | None = None) -> Iterator[list[Launch]]:
    """Inside, kernels launched on CPU tensors are compiled for sm_90 and run here; collects their launches.

    Raises (from a launch):
        EmulationError: something that would fault, hang or be undefined on a GPU.
    """
    launches: list[Launch] = []

    def take(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], warps: int, *_: Any) -> None:
        launches.append(_run(kernel, grid, arguments, warps, schedule or Schedule()))

    with (
        aot.intercepted(take),
        mock.patch.object(limits, "INTERPRETED", True),
        mock.patch.dict("os.environ", {"TRITON_INTERPRET": "1"}),
    ):
        yield launches
