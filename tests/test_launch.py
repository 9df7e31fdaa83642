"""`fastinstance_kernels.launch.Step`: the kernels that it remembers are those that Triton would choose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from fastinstance_kernels import engine, launch, regions, segments
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import fastinstance
from fastinstance.functional import InstanceTerms, instance_terms


class Launch(NamedTuple):
    """What a compiled kernel was launched with; a tensor as its dtype and shape."""

    key: object
    grid: tuple[int, ...]
    arguments: tuple[object, ...]


class Compiled:
    """Stands for a kernel that Triton compiled for `key`."""

    function = packed_metadata = None

    def __init__(self, key: object, launches: list[Launch]) -> None:
        self.key, self.launches, self.searched = key, launches, 0

    def launch_metadata(self, *_: object) -> None: ...

    def _record(self, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        kinds = (((x.dtype, x.shape) if isinstance(x, Tensor) else x) for x in arguments)
        self.launches.append(Launch(self.key, grid, tuple(kinds)))

    def run(self, x: int, y: int, z: int, *arguments: Any) -> None:
        self.searched += 1
        self._record((x, y, z), arguments[6:])  # after stream, function, metadata and hooks

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: self._record(grid, arguments)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """Collects the launches inside on CPU tensors, by an H100 that is not there: nothing is compiled or run."""
    found: list[Launch] = []

    def compiled(kernel: Any, key: object, _signature: object, device: int, *_: object) -> Compiled:
        kernel.device_caches[device][0][key] = result = Compiled((kernel.__name__, key), found)
        return result

    device = SimpleNamespace(
        get_current_device=lambda: 77,  # no other test's
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    monkeypatch.setattr(JITFunction, "_do_compile", compiled)
    monkeypatch.setattr(launch, "INTERPRETED", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(driver, "_active", device)
    launch._launches.cache_clear()
    with fastinstance.use_backend("triton"):
        yield found
    launch._launches.cache_clear()


def images(*shape: int, dtype: torch.dtype = torch.float32, offset: int = 0) -> tuple[Tensor, Tensor]:
    """Logits and a target, `offset` elements into their memory."""
    number = torch.Size(shape).numel()
    logits = (
        torch.randn(number + offset)[offset:].to(dtype) if dtype == torch.float32 else torch.randn(number).to(dtype)
    )
    return logits.view(shape).requires_grad_(), (torch.rand(number + offset)[offset:] > 0.7).float().view(shape)


def step(loss: Any, *shape: int, dtype: torch.dtype = torch.float32, offset: int = 0, **given: Any) -> None:
    input, target = images(*shape, dtype=dtype, offset=offset)
    value = loss(input, target, **{name: make(target) for name, make in given.items()})
    value.sum().backward()


def terms(input: Tensor, target: Tensor) -> Tensor:
    return torch.stack(instance_terms(input, target, sigmoid=True)).sum()


KERNELS = engine, regions, segments  # imported before the interpreter is asked for
ALL = fastinstance.InstanceLoss(**dict.fromkeys(InstanceTerms._fields, 1.0), sigmoid=True)
SOFT = fastinstance.DetectionLoss(sigmoid=True)
NONE = fastinstance.FalseLoss(sigmoid=True, reduction="none")
CC, MIL = fastinstance.CCLoss(sigmoid=True), fastinstance.ComponentMILLoss(sigmoid=True)
RECALL, BLOB = fastinstance.LesionRecallLoss(sigmoid=True), fastinstance.BlobLoss(sigmoid=True)
SOFTMAX = fastinstance.ICILoss(softmax=True, include_background=False)

CALLS: dict[str, Callable[[], object]] = {
    "all terms": lambda: step(ALL, 2, 1, 9, 33),
    "wide rows": lambda: step(ALL, 2, 1, 9, 48),
    "one pixel wide": lambda: step(ALL, 2, 1, 9, 1),
    "one plane": lambda: step(ALL, 1, 1, 9, 33),
    "volumes": lambda: step(ALL, 1, 1, 4, 9, 33),
    "float64": lambda: step(ALL, 2, 1, 9, 33, dtype=torch.float64),
    "bfloat16": lambda: step(ALL, 2, 1, 9, 48, dtype=torch.bfloat16),
    "elsewhere in memory": lambda: step(ALL, 2, 1, 9, 48, offset=1),
    "valid": lambda: step(ALL, 2, 1, 9, 33, valid_mask=lambda target: target > -1),
    "given": lambda: step(ALL, 2, 1, 9, 33, target_labels=lambda target: target.int()),
    "integers": lambda: ALL(images(2, 1, 9, 33)[0], images(2, 1, 9, 33)[1].int()).backward(),
    "soft": lambda: step(SOFT, 2, 1, 9, 33),
    "none": lambda: step(NONE, 2, 1, 9, 33),
    "softmax": lambda: step(SOFTMAX, 2, 3, 9, 33),
    "by term": lambda: step(terms, 2, 1, 9, 33),
    "blob": lambda: step(BLOB, 2, 1, 9, 33),
    "CC": lambda: step(CC, 2, 1, 9, 33),
    "CC, volumes": lambda: step(CC, 1, 1, 4, 9, 33),
    "CC, given": lambda: step(CC, 2, 1, 9, 33, target_regions=lambda target: target.int() + 1),
    "MIL": lambda: step(MIL, 2, 1, 9, 33),
    "recall": lambda: step(RECALL, 2, 1, 9, 33),
    "label": lambda: fastinstance.label(images(2, 1, 9, 33)[1]),
    "label, strided": lambda: fastinstance.label(images(2, 1, 33, 9)[1].transpose(2, 3)),
    "label, integers": lambda: fastinstance.label(images(2, 1, 9, 33)[1].long()),
    "label, large ones": lambda: fastinstance.label(images(2, 1, 9, 33)[1], min_size=4),
    "label, connectivity": lambda: fastinstance.label(images(2, 1, 9, 33)[1], connectivity=4),
    "regions": lambda: fastinstance.voronoi(images(2, 1, 9, 33)[1].int(), 2.0),
    "regions, spacing": lambda: fastinstance.voronoi(images(2, 1, 9, 33)[1].int(), (1.0, 2.0)),
}


def launched(call: Callable[[], object], launches: list[Launch]) -> list[Launch]:
    launches.clear()
    call()
    return launches.copy()


def test_remembered_kernels_are_those_that_triton_chooses(launches: list[Launch]) -> None:
    expected = {}
    for name, call in CALLS.items():
        launch._launches.cache_clear()
        expected[name] = launched(call, launches)
        assert expected[name]
    launch._launches.cache_clear()
    for _ in range(2):  # what one call leaves behind must not reach another
        for name, call in CALLS.items():
            assert launched(call, launches) == expected[name], name


def test_a_step_like_an_earlier_one_searches_nothing(launches: list[Launch]) -> None:
    for name, call in CALLS.items():
        call()
        with mock.patch.object(JITFunction, "run", side_effect=AssertionError) as search:
            if name == "elsewhere in memory":  # where no kernel is remembered
                with pytest.raises(AssertionError):
                    call()
            else:
                call()
                assert not search.called


def test_the_key_tells_kinds_of_tensors_apart() -> None:
    base = torch.empty(2, 8, 16)
    like = torch.empty(2, 8, 16)
    others = (base.double(), base.transpose(1, 2), base[:1], base.to("meta"), None)
    kinds = [launch.Step("name", x)._launches for x in (base, *others)]
    assert launch.Step("name", like)._launches is kinds[0]
    assert len({id(kind) for kind in kinds}) == len(kinds)
    assert launch.Step("other name", base)._launches is not kinds[0]


def test_addresses_that_are_no_multiples_of_16_are_not_remembered() -> None:
    memory = torch.empty(17)
    for key, others in (((memory[1:],), ()), (("name",), (memory[:16], memory[1:]))):
        assert launch.Step(*key, others=others)._launches is not launch.Step(*key, others=others)._launches
