"""The ranks of tests/test_parallel.py on GPUs of their own, with NCCL."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fastinstance
from tests.test_parallel import CASES, RANKS, SCENES, check_case, message_of, part, scene, spawn, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs two GPUs"),
]


def worker(rank: int, store: str, out: str) -> None:
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    dist.init_process_group(
        "nccl", f"file://{store}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=120), device_id=device
    )
    found = train(rank, "cuda")
    image, target = (part(tensor, rank).cuda() for tensor in scene("usual"))

    def call(**options: float) -> torch.Tensor:
        return fastinstance.ICILoss(process_group="world", sigmoid=True, **options)(image, target)  # pyright: ignore[reportArgumentType]

    found["error"] = message_of(lambda: call(threshold=(0.3, 0.4)[rank]))
    call()
    torch.cuda.set_sync_debug_mode("error")
    found["other weights"] = call(seg=1.0 + rank)
    torch.cuda.set_sync_debug_mode("default")

    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        value = call()
    graph.replay()
    torch.cuda.synchronize()
    found["graph"], found["eager"] = value.clone(), call()
    found = {key: value if isinstance(value, str | dict) else value.cpu() for key, value in found.items()}
    for key, value in found.items():
        if isinstance(value, dict):
            found[key] = {name: tensor.cpu() for name, tensor in value.items()}
    torch.save(found, f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_two_gpus(tmp_path: Path) -> None:
    found = spawn(worker, tmp_path)
    for case in CASES:
        for name in SCENES:
            check_case(found, case, name)
    for rank in found:
        assert rank["error"].startswith("ValueError: expected the same loss on all 2 ranks")
        assert rank["other weights"].isnan()  # known settings are not read back
        assert torch.equal(rank["graph"], rank["eager"])
