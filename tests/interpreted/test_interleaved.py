"""The kernels with their programs in drawn orders, interleaved, and reading stale memory.

The interpreter runs one program after the other, which hides races. Here the programs of a launch are threads of
which one runs at a time; before each memory access the one that goes on is drawn. A load may return any value that
its address has held since the launch began, later loads older ones too: more disorder than a GPU allows. The
labels must be exact all the same, and the losses the same to the last bit.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import random
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from fastinstance_kernels import label_planes, launch, words
from torch import Tensor
from triton.runtime import interpreter

from fastinstance import use_backend
from fastinstance.functional import instance_terms
from fastinstance.testing import assert_close, pattern

ORDERED = ("gather", "coefficients")
"""Kernels that read what others of the launch wrote, after a ticket, or they themselves, after a barrier."""

builder = interpreter.interpreter_builder
memory = interpreter._interpreter


class Program(threading.Thread):
    """One program of a launch. It runs when its turn is released."""

    def __init__(self, grid: Launch, position: tuple[int, ...], body: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.grid, self.position, self.body = grid, position, body
        self.turn = threading.Semaphore(0)

    def run(self) -> None:
        self.turn.acquire()
        builder.grid_idx = self.position  # read at the start of each kernel, before its first memory access
        try:
            self.body()
        except BaseException as failure:
            self.grid.failures.append(failure)
        self.grid.running.remove(self)
        self.grid.go_on()


class Launch:
    """The programs of one launch, and what memory held since it began."""

    def __init__(self, draw: random.Random, ordered: bool) -> None:
        self.draw = draw
        self.ordered = ordered
        self.running: list[Program] = []
        self.failures: list[BaseException] = []
        self.finished = threading.Event()
        self.held: defaultdict[int, list[float]] = defaultdict(list)  # address -> earlier values

    def go_on(self) -> None:
        if self.running:
            self.draw.choice(self.running).turn.release()
        else:
            self.finished.set()

    def run(self) -> None:
        for program in self.running:
            program.start()
        self.go_on()
        self.finished.wait()
        if self.failures:
            raise self.failures[0]


def switch() -> Launch:
    """Let a drawn program of the launch run until it is this one's turn."""
    program = threading.current_thread()
    assert isinstance(program, Program)
    program.grid.go_on()
    program.turn.acquire()
    return program.grid


def remember(grid: Launch, addresses: np.ndarray, mask: np.ndarray, kind: np.dtype) -> None:
    """Keep the values that a store or an atomic is about to replace."""
    old = memory.load(addresses, mask, np.zeros(addresses.shape, kind), kind)
    for address, value in zip(addresses[mask].tolist(), old[mask].tolist(), strict=True):
        grid.held[address].append(value)


@pytest.fixture(params=range(2))
def disorder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Interleave all launches of the test, in small blocks; counts the switches and the stale values."""
    seen = {"switches": 0, "stale": 0}
    draw = random.Random(request.param)

    class Interleaved(interpreter.GridExecutor):
        def __init__(self, fn: Any, arg_names: Any, grid: Any, hooks: Any) -> None:
            super().__init__(fn, arg_names, grid, hooks)
            programs = Launch(draw, fn.__name__ in ORDERED)

            # The executor calls this once per program; the last call runs them all.
            def defer(**arguments: Any) -> None:
                body = functools.partial(fn, **arguments)
                programs.running.append(Program(programs, builder.grid_idx, body))
                if len(programs.running) == math.prod(grid):
                    programs.run()

            defer.__signature__ = inspect.signature(fn)
            self.fn = defer

    load, store, atomic = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw
    swap = builder.create_atomic_cas

    def stale_load(ptrs: Any, mask: Any, *rest: Any) -> Any:
        grid = switch()
        seen["switches"] += 1
        result = load(ptrs, mask, *rest)
        for position, address in np.ndenumerate(ptrs.data):
            earlier = grid.held.get(int(address))
            if earlier and not grid.ordered and mask.data[position] and draw.random() < 0.5:
                result.data[position] = draw.choice(earlier)
                seen["stale"] += 1
        return result

    def remembering_store(ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        remember(switch(), ptrs.data, mask.data, value.data.dtype)
        return store(ptrs, value, mask, *rest)

    def remembering_atomic(operation: Any, ptr: Any, value: Any, mask: Any, *rest: Any) -> Any:
        remember(switch(), ptr.data, mask.data, value.data.dtype)
        return atomic(operation, ptr, value, mask, *rest)

    def remembering_swap(ptr: Any, compared: Any, value: Any, *rest: Any) -> Any:
        remember(switch(), ptr.data, np.ones(ptr.data.shape, bool), value.data.dtype)
        return swap(ptr, compared, value, *rest)

    monkeypatch.setattr(interpreter, "GridExecutor", Interleaved)
    monkeypatch.setattr(builder, "create_masked_load", stale_load)
    monkeypatch.setattr(builder, "create_masked_store", remembering_store)
    monkeypatch.setattr(builder, "create_atomic_rmw", remembering_atomic)
    monkeypatch.setattr(builder, "create_atomic_cas", remembering_swap)
    monkeypatch.setattr(launch, "TILE_ROWS", 4)
    monkeypatch.setattr(launch, "DENSE_ROWS", 4)
    monkeypatch.setattr(launch, "BLOCK_WORDS", 2)
    monkeypatch.setattr(words, "BLOCK_WORDS", tl.constexpr(2))
    monkeypatch.setattr(launch, "SCAN_BLOCK", 8)
    return seen


def scene(name: str, shape: tuple[int, ...]) -> Tensor:
    if name == "noise":
        return torch.rand(shape, generator=torch.Generator().manual_seed(0)) < (0.55 if len(shape) == 2 else 0.35)
    # Upside down: trees that meet late, at the end that has the large indices.
    return pattern(name, shape).flip(0) != 0


def expected(plane: Tensor, connectivity: int, min_size: int) -> tuple[Tensor, int]:
    """Flood fill from each pixel in raster order."""
    steps = {4: 1, 8: 2, 6: 1, 18: 2, 26: 3}[connectivity]
    offsets = [o for o in itertools.product((-1, 0, 1), repeat=plane.ndim) if 0 < sum(map(abs, o)) <= steps]
    left = set(map(tuple, plane.nonzero().tolist()))
    labels = torch.zeros(plane.shape, dtype=torch.int32)
    count = 0
    for first in sorted(left):
        if first not in left:
            continue
        left.remove(first)
        component = [first]
        for pixel in component:  # grows as its neighbours are found
            for offset in offsets:
                other = tuple(p + o for p, o in zip(pixel, offset, strict=True))
                if other in left:
                    left.remove(other)
                    component.append(other)
        if len(component) >= min_size:
            count += 1
            labels[tuple(torch.tensor(component).T)] = count
    return labels, count


@pytest.mark.parametrize(
    ("name", "shape", "connectivity", "min_size"),
    [
        ("noise", (12, 40), 8, 0),
        ("noise", (12, 40), 4, 3),
        ("comb", (12, 40), 8, 0),
        ("spiral", (13, 40), 4, 0),
        ("checkerboard", (6, 34), 8, 0),
        ("noise", (3, 4, 34), 26, 0),
        ("noise", (3, 6, 34), 6, 2),
    ],
)
def test_labels_do_not_depend_on_the_order(
    name: str, shape: tuple[int, ...], connectivity: int, min_size: int, disorder: dict[str, int]
) -> None:
    mask = scene(name, shape)[None]
    labels, counts = label_planes(mask, connectivity=connectivity, min_size=min_size)
    assert disorder["switches"] > 100
    assert disorder["stale"] > 0
    want, count = expected(mask[0], connectivity, min_size)
    assert torch.equal(labels[0], want)
    assert counts.tolist() == [count]


@pytest.mark.parametrize(("shape", "connectivity", "density"), [((1, 1, 12, 40), 4, 0.5), ((1, 1, 2, 4, 34), 6, 0.3)])
def test_terms_do_not_depend_on_the_order(
    shape: tuple[int, ...], connectivity: int, density: float, disorder: dict[str, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(shape, generator=generator) < density
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) + 2.0 * target - 1.5
    options = {"sigmoid": True, "connectivity": connectivity, "instance_loss": "gdf", "reduction": "none"}
    results = []
    for backend in ("torch", "triton", "triton"):
        leaf = logits.clone().requires_grad_()
        with use_backend(backend):
            terms = torch.stack(instance_terms(leaf, target, **options))
        results.append((terms.detach(), *torch.autograd.grad(terms.sum(), leaf)))
    assert disorder["switches"] > 1000
    expected, one, other = results
    assert_close(one, expected, rtol=1e-6, atol=1e-8)
    assert all(map(torch.equal, one, other))
