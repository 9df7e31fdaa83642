"""The command `fastinstance train`: a run file, its subjects, and the processes of torchrun."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastinstance.study import data
from fastinstance.study.batches import refuse_shared_images, split
from fastinstance.study.config import RunConfig, read_config
from fastinstance.study.subjects import StudyError, Subject
from fastinstance.study.training import Ranks, check_run, resolve_device, train

__all__ = ["load_subjects", "run", "torchrun"]


@contextmanager
def torchrun(device: torch.device) -> Iterator[None]:
    """Joins the processes of torchrun, where there are several."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _nothing_to_save() -> Iterator[None]:
    """SIGTERM ends the process with exit code 0, so that it is queued again like one that had begun to train."""

    def leave(*_: object) -> None:
        print("stopped by SIGTERM while the subjects were read; the same command goes on")
        sys.exit(0)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def load_subjects(
    config: RunConfig, *, cache: Path | None = None, skip_bad: bool = False, progress: bool = False
) -> tuple[list[Subject], list[Subject]]:
    """Training and validation subjects of a run.

    Raises:
        StudyError: as `data.load`; there is one person only; or an image is on both sides.
    """

    def load(settings: Mapping[str, Any], what: str) -> list[Subject]:
        with data.reading(what, quiet=not progress) as show:
            return data.load(settings, cache=cache, skip_bad=skip_bad, progress=show)

    subjects = load(config.data, "subjects")
    if not isinstance(config.validation, Mapping):
        return split(subjects, config.validation, config.training.seed)
    others = load(config.validation, "validation")
    refuse_shared_images(subjects, others)
    return subjects, others


def run(arguments: argparse.Namespace) -> int:
    """Trains as a run file says; the exit code.

    Raises:
        StudyError: anything that the user can mend, and a loss that is not finite.
    """
    out, progress = arguments.out, not arguments.quiet
    config = read_config(arguments.config)
    if not config.data:
        raise StudyError(f'{arguments.config}: expected a table [data] with a source such as "brain", got none')
    for table in (config.data, config.validation):
        if isinstance(table, Mapping):
            data.check(table)
    loading = {"cache": arguments.cache, "skip_bad": arguments.skip_bad}
    with torchrun(resolve_device(config.training.device)):
        check_run(config, out)
        first = Ranks().rank == 0
        with _nothing_to_save():
            subjects = load_subjects(config, **loading, progress=progress and first)
        result = train(config, *subjects, out, progress=progress)
    if first:
        if not result.finished:
            print(f"stopped after {result.epochs} epochs; the same command goes on")
        elif result.best_epoch:
            metric = config.training.metric
            print(f"best {metric} {result.best[metric]:.4f} at epoch {result.best_epoch}: {out / 'best.pt'}")
    return 0
