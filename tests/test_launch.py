"""`fastinstance_kernels.launch.Step`: the kernels that it remembers are those that Triton would choose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from fastinstance_kernels import launch
from torch import Tensor
from triton.runtime.jit import JITFunction

import fastinstance
from bench import host
from fastinstance.functional import InstanceTerms, instance_terms


class Launch(NamedTuple):
    """What a compiled kernel was launched with; a tensor as its dtype and shape."""

    key: object
    grid: tuple[int, ...]
    arguments: tuple[object, ...]


def kind(argument: object) -> object:
    return (argument.dtype, argument.shape) if isinstance(argument, Tensor) else argument


@pytest.fixture
def launches() -> Iterator[list[Launch]]:
    """Collects the launches inside on CPU tensors."""
    found: list[Launch] = []

    def launched(key: object, grid: tuple[int, ...], arguments: tuple[object, ...]) -> None:
        found.append(Launch(key, grid, tuple(map(kind, arguments))))

    with host.pretended_gpu(launched), fastinstance.use_backend("triton"):
        yield found


def images(*shape: int, dtype: torch.dtype = torch.float32, offset: int = 0) -> tuple[Tensor, Tensor]:
    """Logits and a target, `offset` elements into their memory."""
    logits, noise = torch.randn(2, offset + torch.Size(shape).numel(), dtype=dtype)
    target = torch.empty(len(noise)).copy_(noise > 0.5)
    return logits[offset:].view(shape).requires_grad_(), target[offset:].view(shape)


def step(loss: Any, *shape: int, dtype: torch.dtype = torch.float32, offset: int = 0, **given: Any) -> None:
    input, target = images(*shape, dtype=dtype, offset=offset)
    value = loss(input, target, **{name: make(target) for name, make in given.items()})
    value.sum().backward()


def terms(input: Tensor, target: Tensor) -> Tensor:
    return torch.stack(instance_terms(input, target, sigmoid=True)).sum()


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
