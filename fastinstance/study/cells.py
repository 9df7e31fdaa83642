"""The cells of a study in their folders: run one, tell its state, and what is derived from several.

OUT/cells/<data>/<loss>/seed0-fold1/   cell.json         what decides it: data, run file, split, evaluation
                                       run/              the training, as `fastinstance train` leaves it
                                       predictions.npz   test predictions at 0.5, bits
                                       result.json       complete when it is there
                                       failed.json       why it failed the last time, log.txt beside it
OUT/votes/<data>/seed0.json                              majority of the folds on the second data set
OUT/ensembles/<data>/<ensemble>/seed0-fold1.json         volume ensemble of two losses
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
import zlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastinstance import __version__
from fastinstance.ensemble import majority_vote, volume_ensemble
from fastinstance.files import replacing
from fastinstance.metrics import METRICS
from fastinstance.study.batches import fingerprint
from fastinstance.study.config import Evaluation, RunConfig
from fastinstance.study.measure import CURVE, THRESHOLDS, binary, curve_of, measure, voxel_ml_of
from fastinstance.study.plan import Cell, DataSet, Ensemble, Plan
from fastinstance.study.splits import make_folds, split
from fastinstance.study.subjects import StudyError, Subject

__all__ = [
    "Derived",
    "cell_folder",
    "changes",
    "derived_of",
    "load_subjects",
    "read_json",
    "run_cell",
    "run_ensemble",
    "run_vote",
    "state",
    "subjects_of",
    "write_json",
]

FIXED = 0.5
"""The threshold that is not chosen."""


def cell_folder(out: Path, cell: Cell) -> Path:
    return out / "cells" / cell.name


def read_json(path: Path) -> Any:
    """What a file of ours holds; None if there is none, or if it is damaged, so that it is made anew."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_json(path: Path, document: Any) -> None:
    """Writes the file whole or not at all; NaN becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text(json.dumps(document, separators=(",", ":"), allow_nan=False) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(value, default=str))


def changes(before: Any, now: Any, where: str = "") -> list[str]:
    """What differs between two settings, such as "training.epochs: 200 -> 100"."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = [*before, *(key for key in now if key not in before)]
        return [
            line
            for key in keys
            for line in changes(before.get(key), now.get(key), f"{where}.{key}" if where else str(key))
        ]
    return [] if before == now else [f"{where}: {json.dumps(before)} -> {json.dumps(now)}"]


def state(plan: Plan, out: Path, cell: Cell, digests: Mapping[str, str] | None = None) -> tuple[str, list[str]]:
    """Where a cell stands, and, if it was made with another plan, what has changed.

    Args:
        digests: `batches.fingerprint` of the data sets as they are now; those that are not there, or all, have not
            been looked at.

    Returns:
        "new", "begun", "trained" (only the evaluation has to be done, again), "done" or "changed".
    """
    folder = cell_folder(out, cell)
    known = read_json(folder / "cell.json")
    if known is None:
        return "new", []
    differences = changes(known["training"], _plain(plan.training_key(cell)))
    digests, test_on = digests or {}, plan.data[cell.data].test_on
    if known["subjects"] != digests.get(cell.data, known["subjects"]):
        differences.append(f"the subjects of {cell.data}")
    if differences:
        return "changed", differences
    second = known.get("second")
    if known["evaluation"] != _plain(plan.evaluation_key(cell)) or second != digests.get(test_on or "", second):
        return "trained", []
    return ("begun" if read_json(folder / "result.json") is None else "done"), []


def load_subjects(
    data: DataSet, cache: Path, *, skip_bad: bool = False, progress: Callable[[int, int], None] | None = None
) -> list[Subject]:
    """The subjects of a data set of the plan.

    Raises:
        StudyError: they cannot be loaded.
    """
    from fastinstance.study import data as sources

    try:
        return sources.load(data.settings, cache=cache, skip_bad=skip_bad, progress=progress)
    except StudyError as error:
        raise StudyError(f"[data.{data.name}]: {error}") from error


@lru_cache(maxsize=2)
def _loaded(settings: str, cache: Path, skip_bad: bool) -> list[Subject]:
    from fastinstance.study import data as sources

    return sources.load(json.loads(settings), cache=cache, skip_bad=skip_bad)


def subjects_of(data: DataSet, cache: Path, skip_bad: bool) -> list[Subject]:
    """`load_subjects` once in a process for all cells that follow each other."""
    return _loaded(json.dumps(data.settings, sort_keys=True), cache, skip_bad)


def run_cell(plan: Plan, cell: Cell, out: Path, skip_bad: bool) -> None:
    """Trains and tests a cell; goes on where an earlier attempt stopped.

    Raises:
        StudyError: of the training, such as a loss that is not finite.
    """
    from fastinstance.study.training import load_network, predict, resolve_device, train

    folder = cell_folder(out, cell)
    data = plan.data[cell.data]
    subjects = subjects_of(data, out / "cache", skip_bad)
    folds = make_folds(cell.data, subjects, data.folds)
    parts = split(cell.data, subjects, folds, cell.fold, validation=plan.validation)
    others = [] if data.test_on is None else subjects_of(plan.data[data.test_on], out / "cache", skip_bad)
    second = fingerprint(others) if others else None
    write_json(
        folder / "cell.json",
        {
            "cell": [cell.data, cell.loss, cell.seed, cell.fold],
            "subjects": fingerprint(subjects),
            "second": second,
            "training": _plain(plan.training_key(cell)),
            "evaluation": _plain(plan.evaluation_key(cell)),
        },
    )
    (folder / "result.json").unlink(missing_ok=True)
    config = RunConfig.from_table(plan.run_table(cell))
    result = train(config, parts.train, parts.validation, folder / "run", progress=False)
    if not result.finished:  # SIGTERM; everything is saved
        raise SystemExit(0)
    trained = time.perf_counter()
    torch.set_num_threads(config.training.threads or torch.get_num_threads())
    network = load_network(folder / "run", "best", device=resolve_device(config.training.device))

    def probability(subject: Subject) -> Tensor:
        return predict(network, subject.image, precision=config.training.precision)

    tuned = tuned_threshold(parts.validation, [probability(one) for one in parts.validation], data.evaluation)
    probabilities = [probability(one) for one in parts.test]
    fixed = [binary(one, p, FIXED) for one, p in zip(parts.test, probabilities, strict=True)]
    at_tuned = [binary(one, p, tuned) for one, p in zip(parts.test, probabilities, strict=True)]
    masks = {f"test/{one.name}": mask for one, mask in zip(parts.test, fixed, strict=True)}
    for one in others:
        masks[f"second/{one.name}"] = binary(one, probability(one), FIXED)
    _write_masks(folder / "predictions.npz", masks)
    document = {
        "cell": [cell.data, cell.loss, cell.seed, cell.fold],
        "version": __version__,
        "device": _device(network),
        "train": len(parts.train),
        "validation": len(parts.validation),
        "second": second,
        "epoch": result.best_epoch,
        "seconds": {"training": round(result.seconds, 2), "test": round(time.perf_counter() - trained, 2)},
        "threshold": tuned,
        **_truth(parts.test),
        "at": {
            "fixed": judged(parts.test, fixed, data.evaluation),
            "tuned": judged(parts.test, at_tuned, data.evaluation),
        },
        "curve": _curves(parts.test, probabilities, data.evaluation),
        "picture": _picture(parts.test, fixed),
    }
    write_json(folder / "result.json", document)
    (folder / "failed.json").unlink(missing_ok=True)


def _device(network: torch.nn.Module) -> str:
    device = next(network.parameters()).device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def tuned_threshold(subjects: Sequence[Subject], probabilities: Sequence[Tensor], evaluation: Evaluation) -> float:
    """Where the mean of `evaluation.tune` over the subjects is highest; of several, the one nearest to 0.5."""
    scores = np.zeros(len(THRESHOLDS))
    for subject, probability in zip(subjects, probabilities, strict=True):
        _, values = curve_of(
            subject,
            probability,
            small_ml=evaluation.small_ml,
            min_size=evaluation.min_size,
            metric=evaluation.tune,
        )
        scores += values
    best = np.flatnonzero(scores >= scores.max() - 1e-9)
    return min((THRESHOLDS[index] for index in best), key=lambda threshold: (abs(threshold - FIXED), threshold))


def _rounded(values: Any, digits: int = 6) -> Any:
    """Nested lists of numbers, short, and with None for NaN."""
    if isinstance(values, list | tuple):
        return [_rounded(value, digits) for value in values]
    if values != values:
        return None
    value = round(float(values), digits)
    return int(value) if value == int(value) else value


def _truth(subjects: Sequence[Subject]) -> dict[str, Any]:
    """Who was tested, and how much there was to find."""
    return {
        "subjects": [subject.name for subject in subjects],
        "persons": [subject.person for subject in subjects],
        "volume_ml": _rounded([voxel_ml_of(subject) * int(subject.target.sum()) for subject in subjects]),
    }


def judged(subjects: Sequence[Subject], masks: Sequence[Tensor], evaluation: Evaluation) -> dict[str, Any]:
    """Metrics of each subject, and the sums by size group over all of them."""
    measured = [
        measure(subject, mask, min_size=evaluation.min_size) for subject, mask in zip(subjects, masks, strict=True)
    ]
    return {
        "metrics": {name: _rounded([one.metrics[name] for one in measured]) for name in METRICS},
        "by_size": _rounded(np.sum([one.by_size for one in measured], axis=0).tolist(), 4),
    }


def _curves(subjects: Sequence[Subject], probabilities: Sequence[Tensor], evaluation: Evaluation) -> dict[str, Any]:
    """Counts by subject and threshold, as `measure.CURVE`; the first, of the truth, by subject alone."""
    counts = np.array(
        [
            curve_of(subject, probability, small_ml=evaluation.small_ml, min_size=evaluation.min_size)[0]
            for subject, probability in zip(subjects, probabilities, strict=True)
        ]
    )
    columns = {name: counts[..., column].tolist() for column, name in enumerate(CURVE)}
    return {"thresholds": list(THRESHOLDS), **columns, "small": counts[:, 0, 0].tolist()}


def _packed(array: np.ndarray[Any, Any]) -> str:
    return base64.b85encode(zlib.compress(array.tobytes(), 9)).decode()


def _picture(subjects: Sequence[Subject], masks: Sequence[Tensor]) -> dict[str, Any]:
    """The slice with most true instances: image, truth and prediction, packed."""
    instances = [subject.labels.flatten(1).amax(1) for subject in subjects]
    chosen = max(range(len(subjects)), key=lambda index: int(instances[index].max()))
    plane = int(instances[chosen].argmax())
    image = subjects[chosen].image[0, plane].numpy()
    low, high = np.quantile(image, [0.005, 0.995])
    grey = np.clip((image - low) / max(high - low, 1e-6), 0, 1)
    return {
        "subject": subjects[chosen].name,
        "slice": plane,
        "shape": list(image.shape),
        "image": _packed(np.rint(255 * grey).astype(np.uint8)),
        "truth": _packed(subjects[chosen].labels[plane].numpy().astype(np.uint16)),
        "prediction": _packed(np.packbits(masks[chosen][plane].numpy())),
    }


def _write_masks(path: Path, masks: Mapping[str, Tensor]) -> None:
    with replacing(path) as part, part.open("wb") as file:
        arrays: dict[str, Any] = {name: np.packbits(mask.numpy()) for name, mask in masks.items()}
        np.savez_compressed(file, **arrays)


def _read_masks(path: Path, prefix: str, subjects: Sequence[Subject]) -> list[Tensor]:
    """The stored predictions of some subjects.

    Raises:
        StudyError: they are not there, or the file is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            bits = [file[f"{prefix}/{subject.name}"] for subject in subjects]
    except Exception as error:  # each kind of damage has its own
        raise StudyError(f"{path} is damaged or incomplete ({type(error).__name__}); remove its folder") from error
    return [
        torch.from_numpy(np.unpackbits(packed, count=subject.target.numel()).astype(bool)).view(subject.target.shape)
        for packed, subject in zip(bits, subjects, strict=True)
    ]


def _by_volume(ensemble: Ensemble, small: Tensor, large: Tensor, subject: Subject) -> Tensor:
    """The ensemble of two predictions [Z, Y, X]; instances are those of the slices, as everywhere in the study."""
    # Slices as a batch: their components are two-dimensional, and their thickness counts.
    masks = (mask[:, None] for mask in (small, large))
    return volume_ensemble(*masks, threshold_ml=ensemble.threshold_ml, spacing=subject.spacing)[:, 0]


@dataclass(frozen=True)
class Derived:
    """A result that is made of cells: an ensemble, or a vote."""

    name: str
    path: Path
    inputs: tuple[Path, ...]
    """Results of the cells that it is made of, all there."""
    call: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...]
    settings: Any
    """What else decides it."""

    @property
    def digest(self) -> str:
        """Changes with the cells' results and the settings."""
        every = hashlib.blake2b(json.dumps([__version__, _plain(self.settings)]).encode(), digest_size=12)
        for path in self.inputs:
            every.update(path.read_bytes())
        return every.hexdigest()

    def read(self) -> dict[str, Any] | None:
        """The result if it is there and still that of its cells."""
        document = read_json(self.path)
        if document is None or document.pop("inputs") != self.digest:
            return None
        return document

    def make(self, plan: Plan, out: Path, skip_bad: bool) -> None:
        inputs = self.digest
        document = self.call(plan, *self.arguments, out, skip_bad)
        write_json(self.path, {**document, "inputs": inputs})


def derived_of(plan: Plan, out: Path, done: Container[Cell]) -> Iterator[Derived]:
    """Every ensemble and vote of the plan that the cells which are done suffice for."""
    for data in plan.trained:
        judged_by = asdict(plan.data[data].evaluation)
        folds = plan.folds_of(data)
        for ensemble in plan.ensembles:
            for seed in plan.seeds:
                for fold in folds:
                    cells = [Cell(data, loss, seed, fold) for loss in (ensemble.small, ensemble.large)]
                    if all(cell in done for cell in cells):
                        folder = f"{ensemble.small} + {ensemble.large}, {ensemble.threshold_ml:g} mL"
                        yield Derived(
                            f"ensemble {data}/{ensemble.name}, seed {seed}, fold {fold}",
                            out / "ensembles" / data / folder / f"seed{seed}-fold{fold}.json",
                            tuple(cell_folder(out, cell) / "result.json" for cell in cells),
                            run_ensemble,
                            (ensemble, cells[0]),
                            judged_by,
                        )
        test_on = plan.data[data].test_on
        if test_on is None:
            continue
        for seed in plan.seeds:
            losses = [loss for loss in plan.losses if all(Cell(data, loss, seed, fold) in done for fold in folds)]
            if losses:
                yield Derived(
                    f"vote {data} on {test_on}, seed {seed}",
                    out / "votes" / data / f"seed{seed}.json",
                    tuple(
                        cell_folder(out, Cell(data, loss, seed, fold)) / "result.json"
                        for loss in losses
                        for fold in folds
                    ),
                    run_vote,
                    (data, tuple(losses), seed),
                    [asdict(plan.data[test_on].evaluation), [asdict(ensemble) for ensemble in plan.ensembles]],
                )


def run_ensemble(plan: Plan, ensemble: Ensemble, cell: Cell, out: Path, skip_bad: bool) -> dict[str, Any]:
    """The ensemble of two losses on the test fold of a cell (whose own loss does not matter)."""
    data = plan.data[cell.data]
    subjects = subjects_of(data, out / "cache", skip_bad)
    folds = make_folds(cell.data, subjects, data.folds)
    test = split(cell.data, subjects, folds, cell.fold, validation=plan.validation).test
    small, large = (
        _read_masks(cell_folder(out, Cell(cell.data, loss, cell.seed, cell.fold)) / "predictions.npz", "test", test)
        for loss in (ensemble.small, ensemble.large)
    )
    masks = [_by_volume(ensemble, s, b, subject) for s, b, subject in zip(small, large, test, strict=True)]
    return {
        "ensemble": [cell.data, ensemble.name, cell.seed, cell.fold],
        **_truth(test),
        "at": {"fixed": judged(test, masks, data.evaluation)},
    }


def run_vote(plan: Plan, data_name: str, losses: Sequence[str], seed: int, out: Path, skip_bad: bool) -> dict[str, Any]:
    """Majority vote of the folds on the second data set: these losses, and the ensembles of their votes."""
    data = plan.data[data_name]
    assert data.test_on is not None
    other = plan.data[data.test_on]
    subjects = subjects_of(other, out / "cache", skip_bad)
    votes: dict[str, list[Tensor]] = {}
    for loss in losses:
        folders = [cell_folder(out, Cell(data_name, loss, seed, fold)) for fold in plan.folds_of(data_name)]
        every = [_read_masks(folder / "predictions.npz", "second", subjects) for folder in folders]
        votes[loss] = [majority_vote(list(masks)) for masks in zip(*every, strict=True)]
    for ensemble in plan.ensembles:
        if ensemble.small in votes and ensemble.large in votes:
            pairs = zip(votes[ensemble.small], votes[ensemble.large], subjects, strict=True)
            votes[ensemble.name] = [_by_volume(ensemble, small, large, subject) for small, large, subject in pairs]
    return {
        "vote": [data_name, data.test_on, seed],
        "folds": list(plan.folds_of(data_name)),
        **_truth(subjects),
        "methods": {name: judged(subjects, masks, other.evaluation) for name, masks in votes.items()},
    }
