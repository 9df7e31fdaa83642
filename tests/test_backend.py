"""The label operator: registered, compilable, and on the backend that was asked for."""

import builtins
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import fastinstance
from fastinstance.components import label_planes


def mask(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.6


@pytest.mark.parametrize("shape", [(3, 9, 11), (2, 4, 5, 6), (0, 4, 4), (2, 0, 4)])
def test_opcheck(shape: tuple[int, ...]) -> None:
    full = 8 if len(shape) == 3 else 26
    torch.library.opcheck(label_planes.registered, (mask(*shape), None, full, 2))
    torch.library.opcheck(label_planes.registered, (mask(*shape).float() - 0.5, 0.25, full, 0))


def test_compiles_without_a_graph_break() -> None:
    compiled = torch.compile(lambda m: fastinstance.label(m)[0] * 2, fullgraph=True, backend="aot_eager")
    image = mask(2, 1, 8, 9)
    assert torch.equal(compiled(image), fastinstance.label(image)[0] * 2)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("trace", [make_fx, lambda function: lambda image: torch.jit.trace(function, image)])
def test_a_trace_labels_other_images(trace: Any) -> None:
    def labels(image: torch.Tensor) -> torch.Tensor:
        return fastinstance.label(image)[0]

    traced = trace(labels)(mask(1, 1, 8, 9))
    image = ~mask(1, 1, 8, 9)
    assert torch.equal(traced(image), labels(image))


def test_threshold_equals_a_mask() -> None:
    logits = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(1))
    logits[0, 0, 0] = torch.nan
    for mine, other in zip(label_planes(logits, 0.3, 8, 0), label_planes(logits >= 0.3, None, 8, 0), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("shape", [(0, 1, 4, 4), (2, 0, 4, 4), (2, 1, 0, 4), (1, 1, 3, 0, 2)])
def test_nothing_to_label(shape: tuple[int, ...]) -> None:
    labels, counts = fastinstance.label(torch.ones(shape))
    assert labels.shape == shape
    assert counts.shape == shape[:2]
    assert counts.sum() == 0


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="'triton' or 'torch', got 'cuda'"), fastinstance.use_backend("cuda"):
        pass


def test_triton_needs_a_device_it_can_work_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with (
        fastinstance.use_backend("triton"),
        pytest.raises(ValueError, match=r"expected a CUDA tensor.*TRITON_INTERPRET"),
    ):
        fastinstance.label(mask(1, 1, 4, 4))
    assert fastinstance.label(mask(1, 1, 4, 4))[1] > 0  # the choice ends with the block


@pytest.mark.parametrize("error", [ImportError("no module named triton"), RuntimeError("0 active drivers")])
def test_a_missing_or_broken_triton_is_said_once(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    from fastinstance import backend

    class OnGPU:
        device = torch.device("cuda")

    original = builtins.__import__

    def broken(name: str, *rest: Any) -> Any:
        if name == "fastinstance_kernels":
            raise error
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", broken)
    backend._triton_works.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=rf"{error}.*use_backend"):
            assert backend.backend_for(OnGPU()) == "torch"  # pyright: ignore[reportArgumentType]
        assert backend.backend_for(OnGPU()) == "torch"  # pyright: ignore[reportArgumentType]
    finally:
        backend._triton_works.cache_clear()


@pytest.mark.parametrize("wrong", [0, -1, True, 2.5])
def test_max_instances_is_checked(wrong: Any) -> None:
    with pytest.raises(ValueError, match="expected max_instances to be an integer >= 1 or None"):
        fastinstance.FalseLoss(max_instances=wrong)


def test_a_loss_stays_as_it_is_beside_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch is given to replace is not the module."""

    class OnGPU(torch.Tensor):
        is_cuda = True  # pyright: ignore[reportAssignmentType]

    def graph_of(function: Any, samples: tuple[torch.Tensor, ...]) -> Any:
        function.forward = None
        return function

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graph_of)
    loss, image = fastinstance.FalseLoss(sigmoid=True), torch.rand(1, 1, 4, 4)
    graphed = fastinstance.make_graphed(loss, image.as_subclass(OnGPU), image.as_subclass(OnGPU))
    assert torch.equal(graphed(image, image.round()), loss(image, image.round()))


def test_graphs_need_a_gpu() -> None:
    image = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match=r"expected sample_input on a CUDA device, got cpu"):
        fastinstance.make_graphed(fastinstance.FalseLoss(sigmoid=True), image, image)
