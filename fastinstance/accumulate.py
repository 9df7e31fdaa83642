"""`InstanceMetrics`: the metrics of many subjects, their mean, spread and confidence, and size groups.

Where torchmetrics is installed, this is one of its metrics; nothing else in the package imports this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checks import check_connectivity, check_volumes
from .matching import check_matching, match_instances
from .metrics import (
    METRICS,
    VOLUME_SUMS,
    check_zero_division,
    plane_metrics,
    volume_sums,
    voxel_volume,
)
from .summary import check_summary, summarise

__all__ = ["InstanceMetrics"]


class _Alone:
    """What is used of `torchmetrics.Metric`, in one process."""

    def __init__(self) -> None:
        self._defaults: dict[str, Any] = {}

    def add_state(self, name: str, default: Any, dist_reduce_fx: str) -> None:
        del dist_reduce_fx  # nothing to share
        self._defaults[name] = default
        setattr(self, name, default.copy() if isinstance(default, list) else default.clone())

    def set_dtype(self, dtype: torch.dtype) -> None:
        del dtype

    def reset(self) -> None:
        """Forget all subjects."""
        for name, default in self._defaults.items():
            setattr(self, name, default.copy() if isinstance(default, list) else default.clone())

    def __call__(self, *arguments: Any, **options: Any) -> dict[str, Tensor]:
        """Add a batch, and return the metrics of that batch."""
        before = {name: getattr(self, name) for name in self._defaults}
        self.reset()
        self.update(*arguments, **options)
        result = self.compute()
        for name, state in before.items():
            setattr(self, name, state + getattr(self, name))
        return result

    def update(self, *arguments: Any, **options: Any) -> None:
        raise NotImplementedError

    def compute(self) -> dict[str, Tensor]:
        raise NotImplementedError


if TYPE_CHECKING:
    _Base = _Alone
else:
    try:
        from torchmetrics import Metric as _Base
    except ImportError:
        _Base = _Alone


class InstanceMetrics(_Base):
    """Instance-level metrics over subjects: each subject's own, then their mean.

        metric = InstanceMetrics(spacing=(3, 1, 1), by_volume=VOLUME_EDGES)
        for logits, target in loader:
            metric.update(logits >= 0, target)
        result = metric.compute()

    With torchmetrics installed it is a `torchmetrics.Metric`, so that it works in a `MetricCollection`, and on several
    processes: the subjects' rows are gathered, the sums of the size groups added.

    Args:
        channels: C of the masks.
        connectivity, matching, threshold, spacing, min_size, zero_division: as in `instance_metrics`. NaN values are
            left out of means.
        by_volume: ascending edges in mL of groups by instance volume, for example `fastinstance.metrics.VOLUME_EDGES`
            (0.05, 0.10, ..., 1.0: Figs. 8, 9 and 12): below the first, from each edge to the next, from the last on.
        confidence: of the intervals, percentiles of a bootstrap over subjects.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        options: of `torchmetrics.Metric`.

    Raises:
        ValueError: a setting out of range.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    rows: list[Tensor]
    groups: Tensor

    def __init__(
        self,
        *,
        channels: int = 1,
        connectivity: int | None = None,
        matching: str = "overlap",
        threshold: float = 0.5,
        spacing: float | Sequence[float] | None = None,
        min_size: int = 0,
        zero_division: float = 0.0,
        by_volume: Sequence[float] | None = None,
        confidence: float = 0.95,
        resamples: int = 1000,
        seed: int = 0,
        **options: Any,
    ) -> None:
        check_matching(matching, threshold, min_size)
        check_zero_division(zero_division)
        check_summary(confidence, resamples, seed)
        check_connectivity(connectivity)
        if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
            raise ValueError(f"expected channels to be an integer >= 1, got {channels!r}")
        if spacing is not None:
            voxel_volume(spacing, len(spacing) if isinstance(spacing, Sequence) else 3)
        super().__init__(**options)
        self.channels = channels
        self.spacing = spacing
        self.zero_division = zero_division
        self.by_volume = None if by_volume is None else check_volumes("by_volume", by_volume, least=1)
        self._match: dict[str, Any] = {
            "connectivity": connectivity,
            "matching": matching,
            "threshold": threshold,
            "min_size": min_size,
        }
        self._summary: dict[str, Any] = {"confidence": confidence, "resamples": resamples, "seed": seed}
        # Flat rows and a fixed dtype: torchmetrics gathers an empty float vector from a process without subjects.
        self.add_state("rows", [], dist_reduce_fx="cat")
        groups = 0 if self.by_volume is None else len(self.by_volume) + 1
        sums = torch.zeros(channels, groups, len(VOLUME_SUMS), dtype=torch.float64, device="cpu")
        self.add_state("groups", sums, dist_reduce_fx="sum")
        self.set_dtype(torch.float64)

    def update(
        self,
        pred: Tensor,
        target: Tensor,
        *,
        spacing: float | Sequence[float] | None = None,
        pred_labels: Tensor | None = None,
        target_labels: Tensor | None = None,
    ) -> None:
        """Add the subjects of a batch; on a GPU no metric is copied to the host.

        Args:
            pred, target, pred_labels, target_labels: as in `instance_metrics`, `[B, C, *S]` with the `channels` given.
            spacing: of this batch, in place of the one that the metric was made with.

        Raises:
            ValueError, TypeError: as `instance_metrics`; another number of channels.
        """
        if isinstance(pred, Tensor) and pred.ndim > 1 and pred.shape[1] != self.channels:
            raise ValueError(
                f"expected pred with channels={self.channels}, got {tuple(pred.shape)}; "
                f"use InstanceMetrics(channels={pred.shape[1]})"
            )
        matches = match_instances(pred, target, pred_labels=pred_labels, target_labels=target_labels, **self._match)
        voxel_ml = voxel_volume(self.spacing if spacing is None else spacing, pred.ndim - 2)
        metrics = plane_metrics(matches, voxel_ml=voxel_ml, zero_division=self.zero_division)
        self.rows.append(torch.stack([metrics[name].double() for name in METRICS], -1).flatten())
        if self.by_volume is not None:
            self.groups = self.groups.to(pred.device) + volume_sums(matches, self.by_volume, voxel_ml).sum(0)

    def compute(self) -> dict[str, Tensor]:
        """Over all subjects so far.

        Returns:
            For each metric of `instance_metrics` its mean, and as `..._std`, `..._low` and `..._high` the standard
            deviation over subjects and the confidence interval of the mean, all `[C]`, scalars for `channels=1`;
            `n_subjects`. With `by_volume` also `[C, groups]` (`[groups]`), pooled over subjects: `volume_n_target`,
            `volume_n_found`, `volume_n_missed` by true and `volume_n_pred`, `volume_n_false` by predicted volume;
            `volume_sen`, `volume_ppv`, `volume_f1` from them; `volume_dsc`, the mean over the true instances of their
            Dice coefficient with the union of their partners. Before any subject the means are NaN.
        """
        rows = self.rows if isinstance(self.rows, Tensor) else torch.cat([self.groups.new_empty(0), *self.rows])
        table = rows.view(-1, self.channels, len(METRICS))
        result = {"n_subjects": torch.tensor(len(table), device=table.device)}
        for suffix, values in summarise(table, **self._summary)._asdict().items():
            for name, column in zip(METRICS, values.unbind(-1), strict=True):
                result[name if suffix == "mean" else f"{name}_{suffix}"] = self._only(column)
        if self.by_volume is not None:
            for name, value in _of_groups(self.groups, self.zero_division).items():
                result[f"volume_{name}"] = self._only(value)
        return result

    def _only(self, value: Tensor) -> Tensor:
        """Without the axis of the channels if there is one channel."""
        return value[0] if self.channels == 1 else value

    @property
    def volume_names(self) -> list[str]:
        """Names of the size groups, in mL: "< 0.05", "0.05-0.1", ..., ">= 1"."""
        edges = [f"{edge:g}" for edge in self.by_volume or ()]
        return [f"< {edges[0]}", *map("-".join, pairwise(edges)), f">= {edges[-1]}"] if edges else []


def _of_groups(sums: Tensor, zero_division: float) -> dict[str, Tensor]:
    """Counts and rates from the sums `[C, groups, 5]` of `volume_sums`."""
    n_target, found, dice, n_pred, hit = sums.unbind(-1)

    def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
        return torch.where(denominator == 0, zero_division, numerator / denominator)

    sen, ppv = ratio(found, n_target), ratio(hit, n_pred)
    nothing = torch.where(n_target + n_pred == 0, zero_division, 0.0)
    return {
        "n_target": n_target.long(),
        "n_found": found.long(),
        "n_missed": (n_target - found).long(),
        "n_pred": n_pred.long(),
        "n_false": (n_pred - hit).long(),
        "dsc": ratio(dice, n_target),
        "sen": sen,
        "ppv": ppv,
        "f1": torch.where((found > 0) & (hit > 0), 2 * sen * ppv / (sen + ppv), nothing),
    }
