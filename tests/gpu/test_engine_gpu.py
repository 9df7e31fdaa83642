"""The losses on a GPU: real sizes against the CPU, races, capture, streams, threads and compiled models.

pytest -m gpu tests/gpu/test_engine_gpu.py
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastinstance
from fastinstance.functional import InstanceTerms, blob_terms, instance_terms
from fastinstance.testing import assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
REPETITIONS = 200


def seeded(seed: int) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def noise(*shape: int, density: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits and a target of loose pixels."""
    target = torch.rand(shape, generator=seeded(seed), device=DEVICE) < density
    return torch.randn(shape, generator=seeded(seed + 1), device=DEVICE) + 2 * target - 1.5, target


def smooth(*shape: int, seed: int) -> Tensor:
    """Noise of a length of about ten pixels."""
    field = torch.randn(shape, generator=seeded(seed), device=DEVICE)
    pool = F.avg_pool2d if len(shape) == 4 else F.avg_pool3d
    for _ in range(3):
        field = pool(field, 7, stride=1, padding=3)
    return field / field.std()


def blobs(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits and a target of round objects, some of which they share."""
    truth, other = smooth(*shape, seed=seed), smooth(*shape, seed=seed + 1)
    return 3 * (truth + 0.7 * other - 1.6), truth > 1.4


def specks(side: int, step: int, shift: int = 0) -> tuple[Tensor, Tensor]:
    """A plane of single pixels, and logits of the same, shifted."""
    target = torch.zeros(1, 1, side, side, dtype=torch.bool, device=DEVICE)
    target[..., ::step, ::step] = True
    size = torch.rand(target.shape, generator=seeded(0), device=DEVICE) * 3 + 0.1
    return torch.where(target.roll(shift, -1), size, -size), target


def crowd(side: int) -> tuple[Tensor, Tensor]:
    """Thousands of predicted components against one lesion."""
    input, _ = specks(side, 4)
    target = torch.zeros_like(input, dtype=torch.bool)
    target[..., side // 8 : -side // 8, side // 8 : -side // 8] = True
    return input, target


def evaluate(function: Callable[..., Any], input: Tensor, target: Tensor, **options: Any) -> dict[str, Tensor]:
    """Every term and its own gradient, on the host."""
    leaf = input.detach().requires_grad_()
    found = {}
    for name, value in function(leaf, target, **options)._asdict().items():
        found[name] = value.detach().cpu()
        (gradient,) = torch.autograd.grad(value.sum(), leaf, retain_graph=True)
        found[f"gradient of {name}"] = gradient.cpu()
    return found


def check(input: Tensor, target: Tensor, *, function: Callable[..., Any] = instance_terms, **options: Any) -> None:
    """Equal to the float64 sums of the CPU path."""
    options["sigmoid"] = True
    found = evaluate(function, input, target, **options)
    options = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in options.items()}
    with fastinstance.use_backend("torch"):
        expected = evaluate(function, input.cpu(), target.cpu(), **options)
    for name, want in expected.items():
        assert_close(found[name], want, name=name, rtol=2e-5, atol=1e-10, relative_to="largest")


LARGE = {
    "balls": lambda: blobs(48, 1, 256, 256),
    "noise": lambda: noise(48, 1, 256, 256, density=0.02),
    "dense noise": lambda: noise(4, 1, 251, 317, density=0.3),
    "volumes": lambda: blobs(2, 1, 128, 128, 128),
    "specks": lambda: specks(1024, 4),
    "specks beside specks": lambda: specks(1024, 4, shift=2),
    "one against thousands": lambda: crowd(1024),
}


@pytest.mark.parametrize("scene", LARGE)
def test_real_sizes_equal_the_cpu(scene: str) -> None:
    check(*LARGE[scene]())


@pytest.mark.parametrize("scene", ["balls", "volumes", "specks"])
def test_other_losses_equal_the_cpu(scene: str) -> None:
    input, target = LARGE[scene]()
    check(input, target, pixel_loss="dicece", instance_loss="gdf", center_loss="ce", reduction="none", center_size=4)
    check(input, target, pixel_loss="inverse_weighted_dice", average="image", min_size=5, spacing=2.0)
    check(input, target, function=blob_terms, pixel_loss="dicece")


def test_annotated_ids_and_valid_pixels_equal_the_cpu() -> None:
    input, target = LARGE["balls"]()
    bands = torch.arange(256, device=DEVICE) // 5 * 7919 + 1
    valid = noise(48, 1, 256, 256, density=0.9, seed=5)[1]
    check(input, target, target_labels=target * bands, valid_mask=valid)


def check_one_instance(side: int) -> None:
    """Full on both sides: the loss of the one instance follows from the sum over all pixels."""
    input = torch.rand(1, 1, side, side, generator=seeded(0), device=DEVICE) * 4 + 0.1
    terms = instance_terms(input, torch.ones_like(input, dtype=torch.bool), sigmoid=True)
    total, number = input.double().sigmoid().sum().item(), side**2
    expected = 1 - (2 * total + 1e-5) / (total + number + 1e-5)
    for term in (terms.instance_gt, terms.instance_pred):
        assert term.item() == pytest.approx(expected, rel=1e-6)
    assert terms.false_gt.item() == terms.false_pred.item() == 0


def test_one_instance_of_two_to_the_24_pixels() -> None:
    check_one_instance(4096)


@pytest.mark.parametrize("function", [instance_terms, blob_terms])
@pytest.mark.parametrize("instance_loss", ["dice", "gdf"])
def test_gradient_equals_finite_differences(function: Callable[..., Any], instance_loss: str) -> None:
    input, target = noise(1, 2, 4, 9, density=0.3)
    # No component changes within a step.
    input = torch.where(input.abs() < 0.05, 0.1, input).double().requires_grad_()

    def exact(leaf: Tensor) -> Tensor:
        found = function(leaf, target, sigmoid=True, instance_loss=instance_loss)._asdict()
        straight_through = ("center", "false_gt", "false_pred")
        return torch.stack([value for name, value in found.items() if name not in straight_through])

    # Sums are multiples of 2^-32, so that steps cannot be small.
    assert torch.autograd.gradcheck(exact, (input,), eps=1e-3, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("scene", "options"),
    [
        ("balls", {"instance_loss": "gdf"}),
        ("dense noise", {"connectivity": 4, "reduction": "none"}),
        ("volumes", {"average": "image"}),
        ("one against thousands", {"instance_loss": "dicece"}),
    ],
)
def test_repetitions_are_bitwise_equal(scene: str, options: dict[str, Any]) -> None:
    check_repetitions(*LARGE[scene](), REPETITIONS, **options)


def check_repetitions(input: Tensor, target: Tensor, times: int, **options: Any) -> None:
    leaf = input.requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        terms = torch.stack(instance_terms(leaf, target, sigmoid=True, **options))
        return terms.detach(), *torch.autograd.grad(terms.sum(), leaf)

    first = run()
    differences = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(times):
        for one, other in zip(run(), first, strict=True):
            differences += (one != other).sum()
    assert first[0].isfinite().all()
    assert differences.item() == 0


def all_terms(**options: Any) -> fastinstance.InstanceLoss:
    weights = {**dict.fromkeys(InstanceTerms._fields, 1.0), "proximity": 0.01}
    return fastinstance.InstanceLoss(**weights, sigmoid=True, **options)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_no_synchronisation() -> None:
    cases = []
    for number, loss in enumerate((all_terms(), all_terms(min_size=3), fastinstance.BlobLoss(sigmoid=True))):
        input, target = blobs(2, 1, 96, 128, seed=number)
        valid = noise(2, 1, 96, 128, density=0.9)[1]
        cases += [(loss, input.requires_grad_(), target, kwargs) for kwargs in ({}, {"valid_mask": valid})]

    def run() -> None:
        for loss, input, target, kwargs in cases:
            input.grad = None
            loss(input, target, **kwargs).backward()

    run()  # compiling a kernel may synchronise
    torch.cuda.synchronize()
    previous = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode(previous)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1)).to(DEVICE)


def step(model: nn.Module, loss: nn.Module, optimizer: torch.optim.Optimizer, image: Tensor, target: Tensor) -> Tensor:
    optimizer.zero_grad(set_to_none=False)
    value = loss(model(image), target)
    value.backward()
    optimizer.step()
    return value.detach()


def test_a_whole_step_is_captured() -> None:
    """Replayed on images with other numbers of instances, none among them, it trains as the same steps in turn."""
    batches = [blobs(4, 1, 128, 128, seed=2 * k) for k in range(3)]
    batches += [noise(4, 1, 128, 128, density=density, seed=9) for density in (0.0, 0.01, 0.3, 1.0)]
    loss = all_terms()
    model = small_model()
    twin = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    optimizer, other = (torch.optim.SGD(m.parameters(), lr=1e-3) for m in (model, twin))
    image, target = (tensor.clone() for tensor in batches[0])
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(model, loss, optimizer, image, target)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            value = step(model, loss, optimizer, image, target)
        model.load_state_dict(before)
        for new_image, new_target in batches + batches[::-1]:
            image.copy_(new_image)
            target.copy_(new_target)
            graph.replay()
            expected = step(twin, loss, other, new_image, new_target)
            assert_close(value.cpu(), expected.cpu(), rtol=1e-4)
    assert_close([*model.parameters()], [*twin.parameters()], rtol=1e-3, atol=1e-5)


def test_graphed_loss() -> None:
    sample, target = blobs(2, 1, 64, 96)
    loss = all_terms()
    graphed = fastinstance.make_graphed(loss, sample.clone().requires_grad_(), target.clone())
    for density in (0.0, 0.05, 0.4):
        input, target = noise(2, 1, 64, 96, density=density)
        results = []
        for function in (graphed, loss):
            leaf = input.clone().requires_grad_()
            value = function(leaf, target)
            value.backward()
            results.append((value.detach().clone(), leaf.grad))
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    """The loss takes the model's half-precision logits and works in float32."""
    image, target = blobs(2, 1, 64, 96)
    model, loss = small_model(), all_terms()
    with torch.autocast(DEVICE, dtype=dtype):
        logits = model(image)
        value = loss(logits, target)
    assert (logits.dtype, value.dtype) == (dtype, torch.float32)
    with fastinstance.use_backend("torch"):
        expected = loss(logits.detach().float().cpu(), target.cpu())
    assert_close(value.detach().cpu(), expected, rtol=1e-4)
    value.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_side_streams() -> None:
    loss = all_terms()
    scenes = [blobs(4, 1, 128, 128, seed=2 * k) for k in range(6)]
    expected = [value_and_gradient(loss, *scene) for scene in scenes]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    results = []
    for k, scene in enumerate(scenes):
        with torch.cuda.stream(streams[k % 2]):
            results.append(value_and_gradient(loss, *scene))
    torch.cuda.synchronize()
    for found, want in zip(results, expected, strict=True):
        assert all(map(torch.equal, found, want))


def value_and_gradient(loss: nn.Module, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    leaf = input.detach().clone().requires_grad_()
    value = loss(leaf, target)
    return value.detach(), *torch.autograd.grad(value, leaf)


def test_two_threads() -> None:
    """One loss used by several threads at once, as DataParallel does."""
    check_threads([blobs(2, 1, 128, 128, seed=2 * k) for k in range(2)], times=20)


def check_threads(scenes: list[tuple[Tensor, Tensor]], times: int) -> None:
    loss = all_terms()
    expected = [value_and_gradient(loss, *scene) for scene in scenes]
    wrong: list[Any] = []
    start = threading.Barrier(len(scenes))

    def work(number: int) -> None:
        try:
            start.wait()
            for _ in range(times):
                found = value_and_gradient(loss, *scenes[number])
                wrong.extend(number for one, other in zip(found, expected[number], strict=True) if (one != other).any())
        except Exception as failure:
            wrong.append(failure)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(scenes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_compiled_model() -> None:
    check_compiled(small_model(), [blobs(2, 1, 64, 96, seed=2 * k) for k in range(3)])


def check_compiled(model: nn.Module, scenes: list[tuple[Tensor, Tensor]], **how: Any) -> None:
    loss = all_terms()

    def whole(image: Tensor, target: Tensor) -> Tensor:
        return loss(model(image), target)

    compiled = torch.compile(whole, fullgraph=True, **how)
    for image, target in scenes:
        results = []
        for function in (compiled, whole):
            model.zero_grad()
            value = function(image, target)
            value.backward()
            results.append([value.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
        # A convolution may be computed in another way, and a pixel at the threshold fall on the other side.
        assert_close(*results, rtol=1e-3, relative_to="largest")


@pytest.mark.parametrize(("size", "per_pixel"), [((2048, 2048), 96), ((256, 256, 256), 96)])
def test_peak_memory(size: tuple[int, ...], per_pixel: int) -> None:
    """Of forward and backward pass together, besides the images, per pixel."""
    input, target = noise(1, 1, *size, density=0.02)
    input.requires_grad_()
    loss = all_terms()
    loss(input, target).backward()  # what the first call alone needs
    input.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss(input, target).backward()
    assert torch.cuda.max_memory_allocated() - before <= per_pixel * input.numel() + 2**20
