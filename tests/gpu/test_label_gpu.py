"""`fastinstance_kernels.label_planes` on a GPU: real sizes, races, capture, streams and devices.

pytest -m gpu tests/gpu/test_label_gpu.py
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastinstance_kernels import label_planes
from scipy import ndimage
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# connectivity: (spatial dimensions, axes that one step may move along)
STEPS = {4: (2, 1), 8: (2, 2), 6: (3, 1), 18: (3, 2), 26: (3, 3)}
REPETITIONS = 200


def expected(foreground: Tensor, connectivity: int, min_size: int = 0) -> tuple[Tensor, Tensor]:
    """scipy's components of each plane, those smaller than `min_size` dropped, numbered by their first pixel."""
    structure = ndimage.generate_binary_structure(*STEPS[connectivity])
    labels, counts = [], []
    for plane in foreground.cpu().numpy():
        found, count = ndimage.label(plane, structure)
        flat = found.ravel()
        first = np.empty(count + 1, np.int64)
        first[flat[::-1]] = np.arange(flat.size)[::-1]  # of equal indices the last assignment stays: the first pixel
        kept = np.bincount(flat, minlength=count + 1) >= min_size
        kept[0] = False
        ids = np.flatnonzero(kept)
        new = np.zeros(count + 1, np.int32)
        new[ids[np.argsort(first[ids])]] = np.arange(1, len(ids) + 1)
        labels.append(torch.from_numpy(new[found]))
        counts.append(len(ids))
    return torch.stack(labels), torch.tensor(counts, dtype=torch.int32)


def check(mask: Tensor, connectivity: int, min_size: int = 0) -> None:
    labels, counts = label_planes(mask, connectivity=connectivity, min_size=min_size)
    want_labels, want_counts = expected(mask, connectivity, min_size)
    assert torch.equal(counts.cpu(), want_counts)
    assert torch.equal(labels.cpu(), want_labels)


def noise(*shape: int, density: float, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.rand(shape, generator=generator, device="cuda") < density


def blobs(*shape: int, density: float, seed: int = 0) -> Tensor:
    """Smoothed noise above the quantile that leaves `density` of the pixels."""
    generator = torch.Generator("cuda").manual_seed(seed)
    field = torch.randn(shape, generator=generator, device="cuda")[:, None]
    pool = F.avg_pool2d if len(shape) == 3 else F.avg_pool3d
    for _ in range(3):
        field = pool(field, 7, stride=1, padding=3)
    field = field[:, 0]
    some = field.flatten()[:: max(1, field.numel() // 1_000_000)]
    return field > torch.quantile(some, 1 - density)


def spiral(side: int) -> Tensor:
    """One path of one pixel's width, with gaps of one pixel, from the corner to the middle of the square."""
    plane = torch.zeros(side, side, dtype=torch.bool)
    row, column, length = 0, -1, side
    steps = [(0, 1), (1, 0), (0, -1), (-1, 0)]
    leg = 0
    while length > 0:
        down, right = steps[leg % 4]
        rows = torch.arange(1, length + 1) * down + row
        columns = torch.arange(1, length + 1) * right + column
        plane[rows, columns] = True
        row, column = int(rows[-1]), int(columns[-1])
        leg += 1
        # The first three legs use the whole side; then the room shrinks by two pixels every second leg.
        length = side - 1 if leg in (1, 2) else side - 1 - 2 * ((leg - 1) // 2)
    return plane


def comb(side: int) -> Tensor:
    plane = torch.zeros(side, side, dtype=torch.bool)
    plane[:, ::2] = True
    plane[-1] = True
    return plane


def checkerboard(*shape: int) -> Tensor:
    return sum(torch.meshgrid(*map(torch.arange, shape), indexing="ij")) % 2 == 0


def isolated(*shape: int) -> Tensor:
    """As many components as can be."""
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[tuple(slice(None, None, 2) for _ in shape)] = True
    return mask


@pytest.mark.parametrize("connectivity", [4, 8])
@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(lambda: blobs(48, 256, 256, density=0.1), id="blobs"),
        pytest.param(lambda: blobs(48, 256, 256, density=0.5), id="dense"),
        pytest.param(lambda: noise(48, 256, 256, density=0.4), id="noise"),
        pytest.param(lambda: noise(7, 251, 509, density=0.6), id="odd"),
        pytest.param(lambda: noise(1, 4096, 4096, density=0.1), id="large-10"),
        pytest.param(lambda: noise(1, 4096, 4096, density=0.5), id="large-50"),
        pytest.param(lambda: noise(1, 4096, 4096, density=0.6), id="large-60"),
        pytest.param(lambda: noise(1000, 3, 5, density=0.5), id="tiny"),
        pytest.param(lambda: noise(2, 1, 100_000, density=0.9), id="row"),
        pytest.param(lambda: noise(2, 100_000, 1, density=0.9), id="column"),
    ],
)
def test_planes_equal_scipy(mask: Callable[[], Tensor], connectivity: int) -> None:
    check(mask(), connectivity)


@pytest.mark.parametrize("connectivity", [6, 18, 26])
@pytest.mark.parametrize("density", [0.05, 0.15, 0.3, 0.6])
def test_volumes_equal_scipy(density: float, connectivity: int) -> None:
    check(blobs(2, 128, 128, 128, density=density), connectivity)
    check(noise(2, 65, 127, 129, density=density), connectivity)


def test_large_volume_equals_scipy() -> None:
    check(noise(1, 512, 512, 512, density=0.2), 26)


@pytest.mark.parametrize("connectivity", [4, 8])
@pytest.mark.parametrize(
    "plane",
    [
        pytest.param(lambda: spiral(4096), id="spiral"),
        pytest.param(lambda: comb(4096), id="comb"),
        pytest.param(lambda: checkerboard(4096, 4096), id="checkerboard"),
        pytest.param(lambda: isolated(4096, 4096), id="isolated"),
        pytest.param(lambda: torch.ones(4096, 4096, dtype=torch.bool), id="full"),
    ],
)
def test_adversarial_planes(plane: Callable[[], Tensor], connectivity: int) -> None:
    mask = plane()
    # Every way round: the same shape with its ends first, last, or on their sides.
    for turned in (mask, mask.flip(0, 1), mask.T.contiguous()):
        check(turned[None].cuda(), connectivity)


def test_the_spiral_is_one_path() -> None:
    for side in (1, 2, 3, 4, 5, 8, 64, 101):
        path = spiral(side)
        assert label_planes(path[None].cuda(), connectivity=4)[1].tolist() == [1]
        if side > 8:
            assert 0.45 < path.float().mean() < 0.55


@pytest.mark.parametrize("connectivity", [6, 18, 26])
def test_adversarial_volumes(connectivity: int) -> None:
    for volume in (checkerboard(128, 128, 128), isolated(128, 128, 128), torch.ones(128, 128, 128, dtype=torch.bool)):
        check(volume[None].cuda(), connectivity)


@pytest.mark.parametrize("min_size", [2, 5, 100])
def test_min_size(min_size: int) -> None:
    check(noise(8, 512, 512, density=0.4), 4, min_size)
    check(noise(1, 64, 128, 128, density=0.25), 6, min_size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_threshold(dtype: torch.dtype) -> None:
    x = torch.randn(4, 300, 300, generator=torch.Generator("cuda").manual_seed(0), device="cuda").to(dtype)
    x[:, ::7, ::5] = float("nan")
    for threshold in (0.1, -0.5):
        x[:, ::11] = threshold
        wide = x if dtype == torch.float64 else x.float()
        foreground = wide >= torch.tensor(threshold, dtype=wide.dtype, device="cuda")
        labels, counts = label_planes(x, threshold=threshold)
        want_labels, want_counts = expected(foreground, 8)
        assert torch.equal(labels.cpu(), want_labels)
        assert torch.equal(counts.cpu(), want_counts)
    check((x > 0).transpose(1, 2), 8)
    check((x > 0).byte()[:, ::3, 1::2], 8)


@pytest.mark.parametrize(
    ("mask", "connectivity", "min_size"),
    [
        pytest.param(lambda: noise(48, 256, 256, density=0.45), 8, 0, id="planes"),
        pytest.param(lambda: noise(1, 2048, 2048, density=0.6), 4, 3, id="large"),
        pytest.param(lambda: comb(2048).flip(0)[None].cuda(), 8, 0, id="comb"),
        pytest.param(lambda: noise(2, 96, 96, 96, density=0.3), 6, 2, id="volume"),
    ],
)
def test_repetitions_are_equal(mask: Callable[[], Tensor], connectivity: int, min_size: int) -> None:
    x = mask()
    labels, counts = label_planes(x, connectivity=connectivity, min_size=min_size)
    differences = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(REPETITIONS):
        again, again_counts = label_planes(x, connectivity=connectivity, min_size=min_size)
        differences += (again != labels).sum() + (again_counts != counts).sum()
    assert differences.item() == 0


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_no_synchronisation() -> None:
    x = torch.randn(4, 300, 300, device="cuda")
    settings = [{"threshold": 0.3}, {"threshold": 0.3, "min_size": 4}, {"connectivity": 4}]
    for dtype in (torch.float32, torch.float64):
        for setting in settings:
            label_planes(x.to(dtype), **setting)  # compiling a kernel may synchronise
    torch.cuda.synchronize()
    previous = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for dtype in (torch.float32, torch.float64):
            for setting in settings:
                label_planes(x.to(dtype), **setting)
        label_planes(x[:0])
    finally:
        torch.cuda.set_sync_debug_mode(previous)


@pytest.mark.parametrize("min_size", [0, 4])
def test_graph_replays_on_new_inputs(min_size: int) -> None:
    x = noise(8, 256, 256, density=0.5)
    label_planes(x, min_size=min_size)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        labels, counts = label_planes(x, min_size=min_size)
    inputs = [noise(8, 256, 256, density=density, seed=1) for density in (0.0, 0.2, 0.45, 0.8, 1.0)]
    for new in inputs + inputs[::-1]:
        x.copy_(new)
        graph.replay()
        want_labels, want_counts = expected(new, 8, min_size)
        assert torch.equal(labels.cpu(), want_labels)
        assert torch.equal(counts.cpu(), want_counts)


def test_second_stream() -> None:
    inputs = [noise(8, 512, 512, density=0.45, seed=seed) for seed in range(8)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    results = []
    for k, x in enumerate(inputs):
        with torch.cuda.stream(streams[k % 2]):
            results.append(label_planes(x))
    torch.cuda.synchronize()
    for x, (labels, counts) in zip(inputs, results, strict=True):
        want_labels, want_counts = expected(x, 8)
        assert torch.equal(labels.cpu(), want_labels)
        assert torch.equal(counts.cpu(), want_counts)


@pytest.mark.parametrize("device", range(max(1, torch.cuda.device_count())))
def test_every_device(device: int) -> None:
    """The tensor's device counts, not the current one, which stays as it was."""
    mask = noise(4, 200, 300, density=0.45).to(f"cuda:{device}")
    current = torch.cuda.current_device()
    labels, counts = label_planes(mask)
    assert torch.cuda.current_device() == current
    assert labels.device == counts.device == mask.device
    check(mask, 8)


def test_more_than_2_to_31_pixels() -> None:
    needed = 40 * 2**30
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free device memory, {free >> 30} GiB are free")
    planes = 2**31 // 512**2 + 3
    mask = torch.zeros(planes, 512, 512, dtype=torch.bool, device="cuda")
    checked = [0, planes // 2, planes - 4, planes - 1]  # the last four begin beyond 2^31
    for k in checked:
        mask[k] = noise(512, 512, density=0.5, seed=k)
    labels, counts = label_planes(mask)
    want_labels, want_counts = expected(mask[checked], 8)
    assert torch.equal(labels[checked].cpu(), want_labels)
    assert torch.equal(counts[checked].cpu(), want_counts)
    assert int(counts.sum()) == int(want_counts.sum())


def test_distant_pixels() -> None:
    """Offsets of more than 32 bits, between planes and inside one."""
    memory = torch.zeros(2**32 + 4096, dtype=torch.uint8, device="cuda")
    for strides in ((2**32, 60, 1), (2000, 2**32 // 29, 1)):
        x = memory.as_strided((2, 30, 60) if strides[0] == 2**32 else (1, 30, 60), strides)
        x.copy_(noise(*x.shape, density=0.5))
        assert torch.equal(label_planes(x)[0].cpu(), expected(x, 8)[0])
        memory.zero_()


def test_host_tensor_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected a CUDA tensor, got one on cpu"):
        label_planes(torch.ones(1, 4, 4))
