"""The main job, `python -m fastinstance demo`: what does an instance loss change?

The same small U-Net is trained twice on generated brain lesions, from the same initial weights and on the same batches:
once with the pixel loss alone, once with an instance loss. Everything is then measured lesion by lesion on subjects
that neither network saw; a lesion is an 8-connected component of a slice.
"""

from __future__ import annotations

import csv
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from monai.losses.dice import GeneralizedDiceFocalLoss as MonaiGDF
from monai.networks.nets.unet import UNet
from numpy.typing import NDArray
from torch import Tensor, nn

import fastinstance
from fastinstance import functional, overlay, reference
from fastinstance.files import part_of, progress, replacing
from fastinstance.matching import match_instances
from fastinstance.metrics import plane_metrics, volume_sums
from fastinstance.overlay import FALSE, FOUND, MISSED
from fastinstance.study import brain

BATCH = 8
MIN_SIZE = 2  # pixels; the generated lesions have at least as many, smaller predictions are dropped
THRESHOLD = 0.5
SWEEP = (0.02, *(step / 20 for step in range(1, 20)), 0.98)  # thresholds of the precision-matched comparison
SIZE_EDGES = (0.0, 0.02, 0.05, 0.1, 1.0, math.inf)  # mL; a slice is 3 mm thick
SIZE_NAMES = ("< 0.02 mL", "0.02-0.05 mL", "0.05-0.1 mL", "0.1-1 mL", ">= 1 mL")
SMALL = 2  # the first groups, below 0.05 mL
METRICS = {"sensitivity": "SEN", "precision": "PPV", "f1": "F1", "panoptic_quality": "PQ", "dice": "Dice"}
UNTRAINED, PIXEL = "before training", "pixel loss"
STAGES = ("before", "after")

GREY = (-2.5, 3.5)  # intensities shown black and white
HEAD = -2.9  # intensities above it belong to the head


class DemoError(Exception):
    """Something that the user can understand and mend; its text is the one line that is shown."""


class Choice(NamedTuple):
    """An instance loss that `--loss` offers."""

    name: str
    what: str
    expect: str
    build: Callable[[], nn.Module]
    warm_up: float = 0.0  # share of the steps that are trained with the pixel loss first


MORE_FOUND = "more small lesions found, at the price of more false ones"
CHOICES = {
    "detection": Choice(
        "DetectionLoss",
        "the pixel loss and the rates of missed and of false instances, with a gradient on those too",
        MORE_FOUND,
        lambda: fastinstance.DetectionLoss(sigmoid=True),
    ),
    "false": Choice(
        "FalseLoss",
        "the pixel loss and the rates of missed and of false instances (Eq. 13)",
        MORE_FOUND,
        lambda: fastinstance.FalseLoss(sigmoid=True),
    ),
    "ici": Choice(
        "ICILoss",
        "the pixel loss, the instance loss and the centre loss (Eq. 12)",
        f"{MORE_FOUND}; it does not converge from every seed",
        lambda: fastinstance.ICILoss(sigmoid=True),
    ),
    "proximity": Choice(
        "ProximityLoss",
        "the pixel loss and the distance between predicted and true instances (Eq. 14)",
        "little difference on these lesions",
        lambda: fastinstance.ProximityLoss(sigmoid=True),
        warm_up=0.5,
    ),
    "blob": Choice(
        "BlobLoss",
        "the pixel loss and the loss of every true instance by itself (Kofler et al. 2023)",
        "no gain on these lesions",
        lambda: fastinstance.BlobLoss(sigmoid=True),
    ),
    "instance": Choice(
        "InstanceLoss",
        "the pixel loss and the loss of every true instance (Eq. 2)",
        MORE_FOUND,
        lambda: fastinstance.InstanceLoss(seg=1, instance_gt=1, sigmoid=True),
    ),
}


@dataclass(frozen=True)
class DemoSettings:
    """What `python -m fastinstance demo` does; the defaults take two to three minutes on two cores."""

    loss: str = "detection"  # a key of CHOICES
    out: Path = Path("demo")
    seed: int = 0
    train_subjects: int = 12
    test_subjects: int = 6
    slices: int = brain.MAX_SLICES
    steps: int = 600
    timing_rounds: int = 9
    reference_rounds: int = 3


QUICK = DemoSettings(
    train_subjects=2, test_subjects=2, slices=4, steps=10, timing_rounds=3, reference_rounds=1
)  # shows that everything works; too short for the networks to learn


class Slices(NamedTuple):
    """Subjects as planes, [S*Z, 1, Y, X] each, the slices of a subject one after the other."""

    images: Tensor  # float32
    targets: Tensor  # float32, 0 or 1
    labels: Tensor  # int32, connected components of the targets


class Detection(NamedTuple):
    """What was found in one subject; the three arrays count by size group."""

    true_by_size: NDArray[np.int64]
    found_by_size: NDArray[np.int64]
    false_by_size: NDArray[np.int64]
    predicted: int  # instances
    sensitivity: float
    precision: float
    f1: float
    panoptic_quality: float
    dice: float

    @property
    def true(self) -> int:
        return int(self.true_by_size.sum())

    @property
    def found(self) -> int:
        return int(self.found_by_size.sum())

    @property
    def false(self) -> int:
        return int(self.false_by_size.sum())


def _numbered(mask: Tensor) -> Tensor:
    """Components of `mask` [Z, 1, Y, X], numbered 1, 2, ... through all slices, without those below MIN_SIZE pixels."""
    labels, counts = fastinstance.label(mask, min_size=MIN_SIZE)
    before = (counts.cumsum(0) - counts)[..., None, None]
    return torch.where(labels > 0, labels + before, 0)


def detect(prediction: Tensor, target: Tensor) -> Detection:
    """Compares the binary masks of one subject, [Z, 1, Y, X], slice by slice.

    An instance is found (not false) if it shares a pixel with the other side; panoptic quality is that of
    `fastinstance.instance_metrics`.
    """
    t, q = (_numbered(mask)[:, 0][None, None] for mask in (target, prediction))
    matches = match_instances(q > 0, t > 0, pred_labels=q, target_labels=t)
    metrics = {name: value.item() for name, value in plane_metrics(matches).items()}
    sums = volume_sums(matches, SIZE_EDGES[1:-1], brain.VOXEL_ML)[0, 0].long().numpy()
    true, found, _, predicted, hit = sums.T
    return Detection(
        true_by_size=true,
        found_by_size=found,
        false_by_size=predicted - hit,
        predicted=int(metrics["n_pred"]),
        sensitivity=metrics["sen"],
        precision=metrics["ppv"],
        f1=metrics["f1"],
        panoptic_quality=metrics["pq"],
        dice=metrics["dsc"],
    )


def _mean(detections: Sequence[Detection], metric: str) -> float:
    return statistics.fmean(getattr(d, metric) for d in detections)


def sensitivity_at_precision(sensitivity: Sequence[float], precision: Sequence[float], wanted: float) -> float | None:
    """Highest sensitivity at which the precision is `wanted`.

    Both sequences follow a rising threshold; between two thresholds they are taken as linear. None if no threshold
    gets that precise.
    """
    reached = [s for s, p in zip(sensitivity, precision, strict=True) if p >= wanted]
    curve = list(zip(sensitivity, precision, strict=True))
    for (s0, p0), (s1, p1) in pairwise(curve):
        if min(p0, p1) < wanted <= max(p0, p1):
            reached.append(s0 + (wanted - p0) / (p1 - p0) * (s1 - s0))
    return max(reached, default=None)


def _progress(total: int, what: str, unit: str) -> Any:
    return progress(total, f"{what:<28}", unit)


def make_slices(seed: int, subjects: Iterable[int], slices: int, bar: Any) -> Slices:
    """Generates the subjects with these numbers; advances `bar` by one each."""
    images, lesions = [], []
    for number in subjects:
        subject = brain.generate((seed, number), slices=slices)
        images.append(torch.from_numpy(subject.image))
        lesions.append(torch.from_numpy(subject.lesions))
        bar.update()
    targets = torch.cat(lesions)[:, None]
    labels, _ = fastinstance.label(targets)
    return Slices(torch.cat(images)[:, None], targets.float(), labels)


def new_network(seed: int) -> nn.Module:
    """MONAI's U-Net in its smallest useful form, without residual units (with them it needs many more steps)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet(spatial_dims=2, in_channels=1, out_channels=1, channels=(16, 32, 64), strides=(2, 2))


def train(
    network: nn.Module, loss_at: Callable[[int], nn.Module], data: Slices, steps: int, seed: int, what: str
) -> float:
    """Trains `network` in place on slices that have lesions; returns the seconds it took.

    `loss_at(step)` gives the loss module of a step. Batches and augmentation depend on `seed` alone.

    Raises:
        DemoError: the loss is not finite.
    """
    start = time.perf_counter()
    rng = np.random.default_rng(seed)
    with_lesions = data.labels.flatten(1).any(1).nonzero()[:, 0].numpy()
    size = min(BATCH, len(with_lesions))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-4)
    network.train()
    with _progress(steps, what, "step") as bar:
        for step in range(steps):
            share = step / steps
            rate = 3e-3 * min(1, share / 0.05) * 0.5 * (1 + math.cos(math.pi * share))  # warm-up, then cosine
            for group in optimizer.param_groups:
                group["lr"] = max(rate, 1e-5)
            chosen = torch.from_numpy(rng.choice(with_lesions, size, replace=False))
            image, target, labels = (x[chosen] for x in data)
            if rng.random() < 0.5:
                image, target, labels = (x.flip(-1) for x in (image, target, labels))
            gain, shift = rng.normal((1, 0), 0.1, (size, 2)).astype(np.float32).T
            image = image * torch.from_numpy(gain).view(-1, 1, 1, 1) + torch.from_numpy(shift).view(-1, 1, 1, 1)
            loss = loss_at(step)(network(image), target, target_labels=labels)
            value = loss.item()
            if not math.isfinite(value):
                raise DemoError(f"training diverged: the loss is {value} at step {step}; try another --seed or --loss")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.set_postfix(loss=f"{value:.3f}", refresh=False)
            bar.update()
    return time.perf_counter() - start


def predict(network: nn.Module, images: Tensor) -> Tensor:
    """Logits [S*Z, 1, Y, X]."""
    network.eval()
    with torch.no_grad():
        return torch.cat([network(part) for part in images.split(BATCH)])


def evaluate(logits: Tensor, data: Slices, slices: int, threshold: float = THRESHOLD) -> list[Detection]:
    """One Detection a subject."""
    predicted = logits >= math.log(threshold / (1 - threshold))
    pairs = zip(predicted.split(slices), (data.targets > 0).split(slices), strict=True)
    return [detect(p, t) for p, t in pairs]


def term_table(logits: Tensor, data: Slices) -> dict[str, tuple[float, float]]:
    """Value, and norm of the gradient with respect to the logits, of each of the seven terms."""
    logits = logits.clone().requires_grad_()
    terms = functional.instance_terms(logits, data.targets, sigmoid=True, target_labels=data.labels)
    table = {}
    for name, value in terms._asdict().items():
        (gradient,) = torch.autograd.grad(value, logits, retain_graph=True)
        table[name] = value.item(), gradient.norm().item()
    return table


def made_logits(targets: Tensor, seed: int) -> Tensor:
    """Predictions for timing, about as good as a trained network's, whatever came out of the training."""
    noise = torch.randn(targets.shape, generator=torch.Generator().manual_seed(seed))
    return F.avg_pool2d(8 * targets + 2.5 * noise, 3, stride=1, padding=1) - 3


def time_losses(
    losses: dict[str, Callable[[Tensor], Tensor]], logits: Tensor, rounds: dict[str, int], bar: Any
) -> dict[str, float]:
    """Median seconds of forward and backward; the losses take turns, so that a busy moment does not hit one alone."""
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    for turn in range(max(rounds.values())):
        for name, loss in losses.items():
            if turn >= rounds[name]:
                continue
            leaf = logits.clone().requires_grad_()
            start = time.perf_counter()
            loss(leaf).backward()
            seconds[name].append(time.perf_counter() - start)
            bar.update()
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def prepare_folder(out: Path) -> tuple[Path, Path]:
    """Makes the folder and checks, before any work, that the picture and the table can be written there.

    Raises:
        DemoError: they cannot.
    """
    picture, table = out / "overlay.png", out / "results.csv"
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in (picture, table):
            if path.is_dir():
                raise IsADirectoryError(f"{path.name} is a folder")
            part = part_of(path)
            part.touch()
            part.unlink()
    except OSError as error:
        raise DemoError(f"cannot write to --out {out}: {error.strerror or error}") from error
    return picture, table


def write_table(path: Path, results: dict[tuple[str, str], list[Detection]], matched: dict[str, float | None]) -> None:
    """One row for each loss, stage and subject, and one for all subjects (counts added, metrics averaged).

    `results` is keyed by (loss, stage); `matched` holds the sensitivities at the pixel loss's precision after
    training, empty in all other rows.
    """
    groups = [f"{low:g}_{high:g}_ml" for low, high in pairwise(SIZE_EDGES)]
    by_size = [f"{what}_{group}" for what in ("true", "found", "false") for group in groups]
    header = ["loss", "stage", "threshold", "subject", "true", "found", "missed", "predicted", "false", *METRICS]
    rows: list[list[Any]] = [[*header, "sensitivity_at_pixel_precision", *by_size]]
    for (loss, stage), detections in results.items():
        for subject, group in [*((str(i), [d]) for i, d in enumerate(detections)), ("all", detections)]:
            true, found, false = (sum(getattr(d, what) for d in group) for what in ("true", "found", "false"))
            counts = [true, found, true - found, sum(d.predicted for d in group), false]
            sizes = [sum(getattr(d, f"{what}_by_size") for d in group) for what in ("true", "found", "false")]
            means = [f"{_mean(group, metric):.6f}" for metric in METRICS]
            at_precision = matched.get(loss) if (stage, subject) == ("after", "all") else None
            extra = "" if at_precision is None else f"{at_precision:.6f}"
            rows.append([loss, stage, THRESHOLD, subject, *counts, *means, extra, *np.concatenate(sizes)])
    with replacing(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


class Overlay(NamedTuple):
    """A slice with its instances painted over it."""

    picture: NDArray[np.float64]  # [Y, X, 3]
    found: int
    missed: int
    false: int


def paint(image: Tensor, prediction: Tensor, target: Tensor) -> Overlay:
    """Found lesions, with the predictions that hit them, green, missed ones blue, false predictions red; all [Y, X]."""
    painted = overlay.paint(image.numpy(), prediction.numpy(), (target > 0).numpy(), min_size=MIN_SIZE)
    return Overlay(overlay.colour(painted.image, painted.layer, *GREY), painted.found, painted.missed, painted.false)


def pick_slices(labels: Tensor, slices: int, count: int = 3) -> list[int]:
    """The slices with most lesions, from as many subjects as there are, top to bottom by the number of lesions."""
    lesions = labels.flatten(1).amax(1)
    order = lesions.argsort(descending=True, stable=True).tolist()
    rank: dict[int, int] = {}  # of a slice within its subject
    seen: dict[int, int] = {}
    for index in order:
        subject = index // slices
        rank[index] = seen.get(subject, 0)
        seen[subject] = rank[index] + 1
    return sorted(order, key=lambda index: rank[index])[:count]


def _around(anything: Tensor, margin: int = 3) -> slice:
    """The part of an axis from its first to its last True, and a margin; `anything` [size] has one."""
    inside = anything.nonzero()[:, 0]
    return slice(max(int(inside[0]) - margin, 0), int(inside[-1]) + 1 + margin)


def draw(path: Path, data: Slices, predictions: dict[str, Tensor], chosen: Sequence[int], slices: int) -> None:
    """Writes the picture: a row for each chosen slice; the image, then each network's prediction (as Fig. 10)."""
    head = (data.images[list(chosen), 0] > HEAD).any(0)
    crop = (_around(head.any(1)), _around(head.any(0)))
    aspect = head[crop].shape[0] / head[crop].shape[1]
    columns = 1 + len(predictions)
    width, top, caption, legend = 4.2, 0.45, 0.3, 0.55  # inches; a caption stands above every panel
    height = width * aspect + caption
    total = top + len(chosen) * height + legend
    figure = Figure((columns * width, total), dpi=110, facecolor="black")
    FigureCanvasAgg(figure)

    def write(column: int, x: float, inches_from_top: float, text: str, colour: str, size: float) -> None:
        position = ((column + x) / columns, 1 - inches_from_top / total)
        figure.text(*position, text, color=colour, size=size, ha="center", va="center")

    def panel(row: int, column: int, picture: NDArray[Any]) -> None:
        bottom = total - top - (row + 1) * height
        axes = figure.add_axes((column / columns, bottom / total, 1 / columns, (height - caption) / total))
        axes.imshow(picture[crop], origin="lower", cmap="gray", vmin=GREY[0], vmax=GREY[1], interpolation="nearest")
        axes.set_axis_off()

    for column, name in enumerate(("image", *predictions)):
        write(column, 0.5, top * 0.55, name, "white", 17)
    for row, index in enumerate(chosen):
        image, target = data.images[index, 0], data.targets[index, 0]
        middle = top + row * height + caption / 2
        panel(row, 0, image.numpy())
        write(0, 0.5, middle, f"test subject {index // slices + 1}, slice {index % slices + 1}", "white", 13)
        for column, logits in enumerate(predictions.values(), start=1):
            painted = paint(image, logits[index, 0] >= 0, target)
            panel(row, column, painted.picture)
            write(column, 0.22, middle, f"found {painted.found}", FOUND, 13)
            write(column, 0.50, middle, f"missed {painted.missed}", MISSED, 13)
            write(column, 0.78, middle, f"false {painted.false}", FALSE, 13)
    names = (("found", FOUND), ("missed", MISSED), ("false", FALSE))
    figure.legend(
        handles=[Patch(color=colour, label=name) for name, colour in names],
        loc="lower center",
        ncols=3,
        frameon=False,
        labelcolor="white",
        fontsize=14,
    )
    with replacing(path) as part:
        figure.savefig(part, format="png", facecolor="black")


def _print_row(name: str, cells: Iterable[str], width: int = 20) -> None:
    print(f"  {name:<34}" + "".join(f"{cell:>{width}}" for cell in cells))


def _print_detection(results: dict[str, list[Detection]], matched: dict[str, float | None]) -> None:
    """The table of all lesions of all test subjects; a column for each network."""

    def counts(what: str, first: int = 0, last: int = len(SIZE_NAMES)) -> list[int]:
        return [sum(int(getattr(d, what)[first:last].sum()) for d in column) for column in results.values()]

    def of(found: list[int], true: list[int]) -> Iterator[str]:
        return (f"{f} / {t}" for f, t in zip(found, true, strict=True))

    true, found, false = (counts(what) for what in ("true_by_size", "found_by_size", "false_by_size"))
    _print_row("", results)
    _print_row("found / true", of(found, true))
    for i, name in enumerate(SIZE_NAMES):
        _print_row(f"  {name}", of(counts("found_by_size", i, i + 1), counts("true_by_size", i, i + 1)))
    _print_row("missed", (str(t - f) for f, t in zip(found, true, strict=True)))
    _print_row("false", map(str, false))
    for metric, name in METRICS.items():
        _print_row(name, (f"{_mean(column, metric):.3f}" for column in results.values()))
    at_precision = ("" if name not in matched else _number(matched[name]) for name in results)
    _print_row("SEN at the pixel loss's PPV", at_precision)


def _number(value: float | None) -> str:
    return "not reached" if value is None else f"{value:.3f}"


def _match_precision(logits: dict[str, Tensor], data: Slices, slices: int, wanted: float) -> dict[str, float | None]:
    """Each network's sensitivity at the threshold where its precision is `wanted`."""
    matched: dict[str, float | None] = {}
    with _progress(len(logits) * len(SWEEP), "trying thresholds", "threshold") as bar:
        for name, values in logits.items():
            sensitivity, precision = [], []
            for threshold in SWEEP:
                detections = evaluate(values, data, slices, threshold)
                sensitivity.append(_mean(detections, "sensitivity"))
                precision.append(_mean(detections, "precision"))
                bar.update()
            matched[name] = sensitivity_at_precision(sensitivity, precision, wanted) if wanted > 0 else None
    return matched


def _print_terms(tables: dict[str, dict[str, tuple[float, float]]]) -> None:
    _print_row("", tables, width=26)
    _print_row("", ("value   |gradient|" for _ in tables), width=26)
    for term in next(iter(tables.values())):
        pairs = (table[term] for table in tables.values())
        _print_row(term, (f"{value:.4g}   {norm:10.2e}" for value, norm in pairs), width=26)


def _print_times(choice: Choice, batch: Slices, settings: DemoSettings) -> None:
    """Forward and backward of the losses on one batch, both labellings included."""
    target, logits = batch.targets, made_logits(batch.targets, settings.seed)
    chosen, monai = choice.build(), MonaiGDF(sigmoid=True)
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "MONAI GeneralizedDiceFocalLoss": lambda leaf: monai(leaf, target),
        f"fastinstance {choice.name}": lambda leaf: chosen(leaf, target),
        "fastinstance, all seven terms": lambda leaf: _all_terms(functional.instance_terms, leaf, target),
        "loop reference, all seven terms": lambda leaf: _all_terms(reference.instance_terms, leaf, target),
    }
    rounds = dict.fromkeys(losses, settings.timing_rounds)
    loop = "loop reference, all seven terms"
    rounds[loop] = settings.reference_rounds
    with _progress(sum(rounds.values()), "timing the losses", "run") as bar:
        seconds = time_losses(losses, logits, rounds, bar)
    predicted = int(fastinstance.label(logits >= 0)[1].sum())
    true = int(batch.labels.flatten(1).amax(1).sum())
    print(
        f"\nForward + backward, median of {settings.timing_rounds} ({settings.reference_rounds} for the loop), "
        f"{torch.get_num_threads()} threads, on {len(target)} slices of {target.shape[-2]} x {target.shape[-1]}, "
        f"float32,\n{true} true instances and {predicted} predicted ones (made from the truth: some lost, some false), "
        "both labelled every time:"
    )
    yardstick = seconds["MONAI GeneralizedDiceFocalLoss"]
    for name, taken in seconds.items():
        _print_row(name, (f"{taken * 1e3:.1f} ms", f"{taken / yardstick:.2f} x MONAI"))
    ratio = seconds[loop] / seconds["fastinstance, all seven terms"]
    print(f"  For the same seven terms the loop takes {ratio:.0f} times as long.")


def _all_terms(instance_terms: Callable[..., Any], logits: Tensor, target: Tensor) -> Tensor:
    return torch.stack(list(instance_terms(logits, target, sigmoid=True))).sum()


def run(settings: DemoSettings) -> None:
    """Runs the demo: prints to stdout, draws progress bars on stderr, writes overlay.png and results.csv.

    Raises:
        DemoError: the folder cannot be written to, or training diverged.
    """
    began = time.perf_counter()
    picture, table = prepare_folder(settings.out)
    choice = CHOICES[settings.loss]
    slices, subjects = settings.slices, settings.train_subjects + settings.test_subjects
    print(
        f"The same small U-Net is trained twice, from the same start on the same batches:\n"
        f"  pixel loss: Generalized Dice + Focal\n"
        f"  {choice.name}: {choice.what}\n"
        f"What to expect: {choice.expect}.",
        flush=True,
    )
    if choice.warm_up:
        print(
            f"{choice.name} diverges when it starts from scratch: the first {choice.warm_up:.0%} of its steps "
            "are trained with the pixel loss."
        )
    if settings.steps < 200:
        print("So few steps are too short to learn anything: this run only shows that everything works.")

    with _progress(subjects, "growing lesions", "subject") as bar:
        train_data = make_slices(settings.seed, range(settings.train_subjects), slices, bar)
        test_data = make_slices(settings.seed, range(settings.train_subjects, subjects), slices, bar)
    instances = train_data.labels.flatten(1).amax(1)
    print(
        f"\n{settings.train_subjects} subjects to train, {settings.test_subjects} to test, {slices} slices of "
        f"{train_data.images.shape[-2]} x {train_data.images.shape[-1]} each; "
        f"{int(instances.median())} lesions a slice (median), {int(instances.max())} at most.",
        flush=True,
    )

    pixel_loss = fastinstance.GeneralizedDiceFocalLoss(sigmoid=True)
    chosen_loss = choice.build()
    warm_up = round(choice.warm_up * settings.steps)
    logits = {UNTRAINED: predict(new_network(settings.seed), test_data.images)}
    schedules: dict[str, Callable[[int], nn.Module]] = {
        PIXEL: lambda step: pixel_loss,
        choice.name: lambda step: pixel_loss if step < warm_up else chosen_loss,
    }
    for name, loss_at in schedules.items():
        network = new_network(settings.seed)
        seconds = train(network, loss_at, train_data, settings.steps, settings.seed, f"training, {name}")
        logits[name] = predict(network, test_data.images)
        print(f"Trained with {name}: {settings.steps} steps in {seconds:.0f} s.", flush=True)

    busiest = pick_slices(test_data.labels, slices, BATCH)
    batch = Slices(*(x[busiest] for x in test_data))
    print(f"\nThe seven terms on {len(busiest)} test slices, and the norm of their gradient in the logits:")
    _print_terms({name: term_table(logits[name][busiest], batch) for name in (UNTRAINED, choice.name)})

    results = {name: evaluate(values, test_data, slices) for name, values in logits.items()}
    trained = {name: logits[name] for name in schedules}
    matched = _match_precision(trained, test_data, slices, _mean(results[PIXEL], "precision"))
    print(
        f"\nLesions of the {settings.test_subjects} test subjects, threshold {THRESHOLD}; "
        "the metrics are means over the subjects:"
    )
    _print_detection(results, matched)
    small = {name: sum(int(d.found_by_size[:SMALL].sum()) for d in results[name]) for name in schedules}
    false = {name: sum(d.false for d in results[name]) for name in schedules}
    print(
        f"  {choice.name} found {small[choice.name]} lesions below 0.05 mL where the pixel loss found {small[PIXEL]}, "
        f"with {false[choice.name]} false ones instead of {false[PIXEL]}.",
        flush=True,
    )

    stages = ((name, stage, UNTRAINED if stage == "before" else name) for name in schedules for stage in STAGES)
    write_table(table, {(name, stage): results[column] for name, stage, column in stages}, matched)
    draw(picture, test_data, trained, pick_slices(test_data.labels, slices), slices)
    _print_times(choice, batch, settings)
    print(f"\nWrote {picture} and {table}. {time.perf_counter() - began:.0f} s in all.")
