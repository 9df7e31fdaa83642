"""Averages over the batches of all ranks: one all-reduce of six integers, the same for every loss and setting."""

from __future__ import annotations

import zlib
from typing import NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import reads_values

__all__ = ["Local", "ProcessGroup", "check_process_group", "global_factors", "report_failure", "resolve_group"]

ProcessGroup: TypeAlias = "dist.ProcessGroup | str | None"


class Local(NamedTuple):
    """The terms of the batch of this rank, and the number of entries that each is the mean of."""

    found: dict[str, Tensor]
    planes: int
    entries: Tensor  # [2] float64: of `instance_gt` (or planes of `blob`), of `instance_pred`


_agreed: set[tuple[str, str]] = set()
"""Groups, and settings that all of their ranks were found to have."""


def check_process_group(value: object) -> None:
    if value is None or value == "world" or (dist.is_available() and isinstance(value, dist.ProcessGroup)):
        return
    raise TypeError(
        f"expected process_group to be None, 'world' or a torch.distributed.ProcessGroup that this rank belongs to, "
        f"got {value!r}"
    )


def resolve_group(value: ProcessGroup) -> dist.ProcessGroup | None:
    """The group to average over; None in a process that is on its own."""
    if value != "world":
        return value  # pyright: ignore[reportReturnType]
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


@torch.compiler.assume_constant_result
def _number(text: str) -> int:
    return zlib.crc32(text.encode()) & 0x7FFFFFFF


def _sum_over_ranks(group: dist.ProcessGroup, counts: Tensor, failed: bool, number: int) -> Tensor:
    """[counts, failed ranks, Σ h, Σ h²] of all ranks, h the number of the loss; exact modulo 2^64."""
    said = [counts.new_full((1,), value) for value in (failed, number, number**2)]  # no copy from the host
    total = torch.cat([counts, *said])
    dist.all_reduce(total, group=group)
    return total


def _must_not_wait(counts: Tensor) -> bool:
    return torch.compiler.is_compiling() or (counts.is_cuda and torch.cuda.is_current_stream_capturing())


def report_failure(group: dist.ProcessGroup, device: torch.device) -> None:
    """Take part in the `global_factors` of the other ranks, to tell them that this one has raised an error."""
    _sum_over_ranks(group, torch.zeros(3, dtype=torch.int64, device=device), True, 0)


def global_factors(group: dist.ProcessGroup, counts: Tensor, settings: str, terms: str, *, mean: bool) -> Tensor:
    """What a local mean (or sum) is multiplied by, so that the mean over ranks is that (or the sum) of all entries.

    It is ranks · local count / global count for means, and the number of ranks for sums. DistributedDataParallel takes
    the mean over ranks of the gradients.

    Args:
        group: of the ranks.
        counts: int64 `[3]`, entries of each local mean.
        settings: in words that are the same on every rank where the settings are.
        terms: and weights, likewise; these may change during a training.
        mean: whether the factors are for means.

    Returns:
        float64 `[3]`, NaN where the ranks differ or one has failed and no error is raised.

    Raises:
        RuntimeError: another rank raised an error.
        ValueError: the ranks differ in `settings` or `terms`. On the CPU every call raises these errors; on a GPU the
            first with these `settings`, since reading waits for the device.
    """
    ranks = dist.get_world_size(group)
    *total, failed, number, square = _sum_over_ranks(group, counts, False, _number(settings + terms)).unbind()
    differ = ranks * square != number * number  # Cauchy and Schwarz: equal if and only if all h are
    known = (group.group_name, settings)
    if reads_values(counts) or not (_must_not_wait(counts) or known in _agreed):
        rank = dist.get_rank(group)
        if failed:
            raise RuntimeError(
                f"expected a loss from every rank, but {int(failed)} of {ranks} raised an error; "
                f"see theirs (this is rank {rank} of the process group)"
            )
        if differ:
            raise ValueError(
                f"expected the same loss on all {ranks} ranks of the process group, got different ones; "
                f"give all of them the same settings. Rank {rank} has {settings}, {terms}"
            )
        _agreed.add(known)
    mine = counts.double()
    factors = ranks * (mine / torch.stack(total).clamp(min=1) if mean else torch.ones_like(mine))
    return factors.masked_fill((failed > 0) | differ, torch.nan)
