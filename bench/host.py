"""`python -m bench.host`: what a step takes the host on a GPU, measured without one.

The kernels are launched on CPU tensors by a device that is not there: all is done but compiling, the driver's own part
of a launch (2 to 5 µs each) and the work. Values are not checked, as on a GPU. Processor time of one thread.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from fastinstance_kernels import engine, launch, regions, segments
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import fastinstance
from fastinstance import scene
from fastinstance.functional import InstanceTerms

__all__ = ["main", "pretended_gpu"]

KERNELS = engine, regions, segments  # imported before `use_backend` is told of an interpreter
DEVICE = 77  # no other's: Triton keeps compiled kernels by device


class Compiled:
    """Stands for a kernel that Triton compiled for `key`; its launches are told to `launched`."""

    function = packed_metadata = None

    def __init__(self, key: object, launched: Callable[..., None]) -> None:
        self.key, self.launched = key, launched

    def launch_metadata(self, *_: object) -> None: ...

    def run(self, x: int, y: int, z: int, *arguments: Any) -> None:
        self.launched(self.key, (x, y, z), arguments[6:])  # after stream, function, metadata and hooks

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: self.launched(self.key, grid, arguments)


@contextmanager
def pretended_gpu(launched: Callable[..., None] = lambda *_: None) -> Iterator[None]:
    """Inside, `use_backend("triton")` launches on CPU tensors as on an H100, but no kernel is compiled or runs.

    Args:
        launched: is told each launch: Triton's key of the kernel, the grid, and all arguments in the kernel's order.
    """
    caches = []

    def compiled(kernel: Any, key: object, _signature: object, device: int, *_: object) -> Compiled:
        caches.append(kernel.device_caches)
        kernel.device_caches[device][0][key] = result = Compiled((kernel.__name__, key), launched)
        return result

    active = SimpleNamespace(
        get_current_device=lambda: DEVICE,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    launch._launches.cache_clear()
    with (
        mock.patch.object(JITFunction, "_do_compile", compiled),
        mock.patch.object(driver, "_active", active),
        mock.patch.object(launch, "INTERPRETED", True),
        mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}),
    ):
        try:
            yield
        finally:
            for cache in caches:
                cache.pop(DEVICE, None)
            launch._launches.cache_clear()


def _microseconds(call: Callable[[], object], *, rounds: int = 40, calls: int = 20) -> float:
    """Of the fastest round: other processes and the collector only add to it."""
    samples = []
    for _ in range(rounds):
        begin = time.process_time()
        for _ in range(calls):
            call()
        samples.append((time.process_time() - begin) / calls)
    return 1e6 * min(samples)


LOSSES: dict[str, Callable[[], nn.Module]] = {
    "all terms": lambda: fastinstance.InstanceLoss(**dict.fromkeys(InstanceTerms._fields, 1.0), sigmoid=True),
    "DetectionLoss": lambda: fastinstance.DetectionLoss(sigmoid=True),
    "ICILoss": lambda: fastinstance.ICILoss(sigmoid=True),
    "CCLoss": lambda: fastinstance.CCLoss(sigmoid=True),
    "DiceCELoss": lambda: fastinstance.DiceCELoss(sigmoid=True),
}


def _rows() -> Iterator[tuple[str, int, float, float, float]]:
    """For each loss: launches, then microseconds of forward, of a step, and of a step that searches every kernel."""
    input, target = torch.randn(2, 1, 32, 32).requires_grad_(), (torch.rand(2, 1, 32, 32) > 0.8).float()
    launches = 0

    def count(*_: object) -> None:
        nonlocal launches
        launches += 1

    for name, make in LOSSES.items():
        loss = make()

        def forward(loss: nn.Module = loss) -> Tensor:
            return loss(input, target)

        def step(forward: Callable[[], Tensor] = forward) -> None:
            input.grad = None
            forward().backward()

        def search(step: Callable[[], None] = step) -> None:
            launch._launches.cache_clear()
            step()

        with pretended_gpu(count):
            step()
            launches = 0
            step()
            number = launches
            yield name, number, *map(_microseconds, (forward, step, search))


def main() -> None:
    torch.set_num_threads(1)
    print("| loss | launches | forward, µs | step, µs | step if Triton searches every kernel, µs |")
    print("|---|---|---|---|---|")
    with fastinstance.use_backend("triton"), mock.patch.object(scene, "reads_values", return_value=False):
        for name, *numbers in _rows():
            print(f"| {name} | " + " | ".join(f"{number:.0f}" for number in numbers) + " |")


if __name__ == "__main__":
    main()
