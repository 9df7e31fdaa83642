"""Training of one network, of which nothing is lost: killed at any moment, it goes on to the same bits.

Every random number is drawn from the seed and the number of the step, and every rate follows from that number, so that
a checkpoint is weights, moments of the optimiser and what was measured so far.
"""

from __future__ import annotations

import csv
import io
import math
import os
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastinstance import files
from fastinstance.study.augment import Augmentation, Batch
from fastinstance.study.batches import Batches, check_subjects, fingerprint
from fastinstance.study.checkpoints import alone, load_checkpoint, save_checkpoint, write_safely
from fastinstance.study.config import (
    SCORES,
    RunConfig,
    TrainingConfig,
    build_loss,
    build_pixel_loss,
    named_terms,
    read_config,
)
from fastinstance.study.evaluation import PRECISIONS, mean_scores, predict, scores
from fastinstance.study.networks import SliceNetwork, build_network
from fastinstance.study.subjects import StudyError, Subject
from fastinstance.study.workers import sigterm

__all__ = ["DivergedError", "Ranks", "Step", "TrainingResult", "check_run", "load_network", "predict", "train"]

RUN_FILE = "run.toml"
COLUMNS = ("epoch", "step", "learning_rate", "loss", *SCORES)
LEAST_SCALE = 2.0**-20
"""Of the loss with fp16: after so many halvings in a row no gradient was finite, at any scale."""
DROPOUT = 3  # what random numbers of a step are for, beside those of `batches`


class DivergedError(StudyError):
    """The loss or its gradient is not finite."""


@dataclass(frozen=True)
class TrainingResult:
    """How far a training came."""

    out: Path
    finished: bool
    """False after SIGTERM: the same call goes on."""
    epochs: int
    """That are done."""
    best_epoch: int
    """0 as long as none was validated."""
    best: dict[str, float]
    """Metrics of the validation at that epoch."""
    curves: tuple[dict[str, float], ...]
    """A row for each epoch, as in `curves.csv`; metrics only of epochs that were validated."""
    seconds: float
    """Spent on the training, validation included, in all calls; of what a kill undid, only the second time counts."""
    images_per_second: float
    """Slices trained in this call, all ranks together; 0 if it had nothing to do."""


class Ranks:
    """The processes of `torchrun`, or this one alone."""

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank, self.count = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)

    def mean(self, values: Tensor) -> list[float]:
        """Of all ranks, on the host."""
        if self.count > 1:
            values = values.double()
            dist.all_reduce(values)
            values /= self.count
        return values.tolist()

    def gather(self, values: list[Any]) -> list[Any]:
        """What all ranks have, in the order of the ranks."""
        if self.count == 1:
            return values
        parts: list[Any] = [None] * self.count
        dist.all_gather_object(parts, values)
        return [value for part in parts for value in part]


def resolve_device(name: str) -> torch.device:
    """The device of `[training] device`; of several ranks, each takes the GPU of its local number.

    Raises:
        StudyError: there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise StudyError(f'[training] device: expected one that is here, got "{name}": torch finds no GPU')
        index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise StudyError(f"[training] device: expected one of {torch.cuda.device_count()} GPUs, got number {index}")
        return torch.device("cuda", index)
    return device


def check_run(config: RunConfig, out: Path | None = None) -> torch.device:
    """Whether this machine can do what a run asks for, and on which device; nothing is written.

    Raises:
        StudyError: a device or package that is missing, settings that exclude each other, or another run in `out`.
    """
    device = resolve_device(config.training.device)
    _check_settings(config.training, device, Ranks())
    if out is not None and (out / RUN_FILE).exists():
        changed = _differences(read_config(out / RUN_FILE).to_table(), config.to_table())
        if changed:
            raise StudyError(f"{out} holds another run ({changed[0]}); choose another folder")
    Augmentation(config.augmentation)
    build_network(config.network, 1)
    return device


def _check_settings(config: TrainingConfig, device: torch.device, ranks: Ranks) -> None:
    if config.graph and device.type != "cuda":
        raise StudyError(f"[training] graph: expected a CUDA device for a CUDA graph, got {device}; set graph = false")
    if config.graph and ranks.count > 1:
        raise StudyError(
            f"[training] graph: expected one process for a CUDA graph, got {ranks.count}; set graph = false"
        )
    if config.tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise StudyError("[training] tensorboard needs the package: pip install tensorboard") from error


def learning_rate(config: TrainingConfig, step: int, steps: int) -> float:
    """Of step 0, 1, ... of `steps`."""
    rise = round(config.rate_warm_up * steps)
    rate = config.learning_rate * min(1.0, (step + 1) / rise if rise else 1.0)
    return rate * 0.5 * (1 + math.cos(math.pi * step / steps)) if config.schedule == "cosine" else rate


@contextmanager
def _surroundings(config: TrainingConfig, device: torch.device) -> Iterator[None]:
    """Threads, generators and cuDNN as the training needs them, and afterwards as they were."""
    threads = torch.get_num_threads()
    try:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.backends.cudnn.flags(benchmark=False, deterministic=True):
            yield
    finally:
        torch.set_num_threads(threads)


class Step:
    """Forward and backward pass; leaves the gradients in the parameters.

    Args:
        network: as it is trained, compiled or distributed.
        config: its precision, and whether a step is a CUDA graph.
        device: of the network.
        scaler: of the loss; without one it is not scaled.
    """

    def __init__(
        self, network: nn.Module, config: TrainingConfig, device: torch.device, scaler: torch.amp.GradScaler | None
    ) -> None:
        self.network, self.scaler, self.device = network, scaler, device
        self.dtype, self.compiled = PRECISIONS[config.precision], config.compile
        self.parameters = [one for one in network.parameters() if one.requires_grad]
        self.graphs: dict[nn.Module, _Graph] | None = {} if config.graph else None

    def __call__(self, loss: nn.Module, batch: Batch) -> Tensor:
        """The loss and the norm of its gradient, `[2]`; the norm is 0 with a scaler, which looks for itself.

        Raises:
            StudyError: the memory of the GPU is too small, the compiler fails, or there is no CUDA graph of this.
        """
        try:
            return self._take(loss, batch)
        except torch.OutOfMemoryError as error:
            raise StudyError(
                f"{self.device} has too little memory for {len(batch.images)} slices a step; lower subjects_per_batch "
                "or slices_per_subject, or use bf16"
            ) from error
        except RuntimeError as error:
            if not self.compiled or not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            text = " ".join(str(error).split())[:200]
            raise StudyError(f"[training] compile: the compiler fails ({text}); set compile = false") from error

    def _take(self, loss: nn.Module, batch: Batch) -> Tensor:
        if self.graphs is None:
            return self._eager(loss, batch)
        if loss not in self.graphs:
            self.graphs[loss] = _Graph(lambda batch: self._eager(loss, batch), batch, self.parameters)
        return self.graphs[loss](batch)

    def logits(self, images: Tensor) -> Tensor:
        with torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            return self.network(images).float()

    def _eager(self, loss: nn.Module, batch: Batch) -> Tensor:
        for parameter in self.parameters:
            parameter.grad = None
        images, labels, valid = batch
        value = loss(self.logits(images), labels > 0, target_labels=labels, valid_mask=valid)
        if self.scaler is not None:
            self.scaler.scale(value).backward()
            return torch.stack([value.detach(), torch.zeros_like(value)])
        value.backward()
        norm = nn.utils.get_total_norm([one.grad for one in self.parameters if one.grad is not None])
        return torch.stack([value.detach(), norm.to(value.dtype)])


class _Graph:
    """A step as a CUDA graph, with a batch and gradients of its own."""

    def __init__(self, step: Callable[[Batch], Tensor], batch: Batch, parameters: list[nn.Parameter]) -> None:
        self.batch = batch.map(torch.clone)
        self.parameters = parameters
        random = torch.cuda.get_rng_state()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(3):  # what the first calls allocate or choose must not be captured
                    step(self.batch)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.value = step(self.batch)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise StudyError(
                f"[training] graph: this step cannot be a CUDA graph ({str(error).splitlines()[0]}); set graph = false"
            ) from error
        self.gradients = [one.grad for one in parameters]
        torch.cuda.set_rng_state(random)  # as if only this step had drawn from it

    def __call__(self, batch: Batch) -> Tensor:
        for mine, new in zip(self.batch, batch, strict=True):
            if mine is not None and new is not None:
                mine.copy_(new)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.value


class _Folder:
    """The files of a run; of several ranks the first writes them."""

    def __init__(self, out: Path, config: RunConfig, ranks: Ranks) -> None:
        self.out, self.config, self.writes = out, config, ranks.rank == 0
        self.best, self.last, self.run = out / "best.pt", out / "last.pt", out / RUN_FILE

    def open(self) -> dict[str, Any] | None:
        """Where the run stands, if it was begun.

        Raises:
            StudyError: the folder cannot be written, or `last.pt` not be read.
        """
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StudyError(f"cannot write to {self.out}: {error.strerror or error}") from error
        if self.writes:
            for half in self.out.glob(".*.part.*"):  # of a process that was killed
                half.unlink(missing_ok=True)
        if self.writes and not self.run.exists():
            write_safely(self.run, self.config.to_toml().encode())
        try:
            return load_checkpoint(self.last) if self.last.exists() else None
        except StudyError as error:
            raise StudyError(f"{error}; remove it to begin anew") from error

    def log(self, text: str) -> None:
        if not self.writes:
            return
        try:
            with (self.out / "log.txt").open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        except OSError as error:
            raise StudyError(f"cannot write {self.out / 'log.txt'}: {error.strerror or error}") from error

    def write_curves(self, rows: Sequence[dict[str, float]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_safely(self.out / "curves.csv", text.getvalue().encode())


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Keys of a stored run that are not as wanted, in words."""
    differences = []
    for table in dict.fromkeys([*found, *wanted]):
        mine, theirs = wanted.get(table, {}), found.get(table, {})
        differences += [
            f"[{table}] {key} is {theirs.get(key, 'not given')!r} there, not {mine.get(key, 'not given')!r}"
            for key in dict.fromkeys([*theirs, *mine])
            if theirs.get(key) != mine.get(key)
        ]
    return differences


def train(
    config: RunConfig,
    train: Sequence[Subject],
    validation: Sequence[Subject],
    out: Path,
    *,
    progress: bool = True,
) -> TrainingResult:
    """Trains a network, or goes on where an interrupted call has stopped.

    `out` holds `run.toml` (all settings), `curves.csv` (a row for each epoch), `best.pt` (the epoch with the best
    `metric`), `last.pt` (all that is needed to go on) and `log.txt`. SIGTERM ends the call after the step, with
    everything saved. In the processes of torchrun, each takes its part of every batch.

    Args:
        config: its `data` is not looked at.
        train: subjects to draw slices from.
        validation: subjects of other persons, for the metrics.
        out: folder of this run alone.
        progress: show a bar on stderr.

    Raises:
        StudyError: the subjects, the settings or the folder cannot be used, another process trains there, or a file
            cannot be written.
        DivergedError: the loss or its gradient is not finite; the batch is in `failed.pt`.
    """
    device, ranks = check_run(config, out), Ranks()
    check_subjects(train, validation)
    with ExitStack() as stack:
        if ranks.rank == 0:
            stack.enter_context(alone(out, "training"))
        stack.enter_context(_surroundings(config.training, device))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        termination = stack.enter_context(sigterm())
        run = _Run(config, train, validation, out, device, ranks, termination)
        return run.go_on(stack, progress)


class _Run:
    """A training under way."""

    def __init__(
        self,
        config: RunConfig,
        train: Sequence[Subject],
        validation: Sequence[Subject],
        out: Path,
        device: torch.device,
        ranks: Ranks,
        termination: threading.Event,
    ) -> None:
        self.config, self.settings, self.device, self.ranks = config, config.training, device, ranks
        self.validation, self.termination = validation, termination
        self.batches = Batches(train, self.settings, Augmentation(config.augmentation), device)
        if self.batches.size % ranks.count:
            raise StudyError(
                f"expected a batch that {ranks.count} processes can share, got {self.batches.size} slices "
                "(subjects_per_batch x slices_per_subject)"
            )
        self.steps = self.batches.steps_per_epoch * self.settings.epochs
        self.warm_up = round(config.loss.warm_up * self.steps)
        self.loss = build_loss(config.loss, process_group="world" if ranks.count > 1 else None).to(device)
        self.pixel_loss = build_pixel_loss().to(device)
        self.channels = train[0].image.shape[0]
        self.network = build_network(config.network, self.channels, seed=self.settings.seed).to(device)
        self.optimizer = self._new_optimizer()
        self.scaler = torch.amp.GradScaler(device.type) if self.settings.precision == "fp16" else None
        self.data = fingerprint(train, validation)
        self.epoch = self.step = 0
        self.stopping = False
        self.loss_sum = 0.0
        self.seconds, self.clock = 0.0, time.perf_counter()
        self.rows: list[dict[str, float]] = []
        self.best: dict[str, Any] = {"epoch": 0, "scores": {}}
        self.folder = _Folder(out, config, ranks)
        state = self.folder.open()
        if state is not None:
            self._restore(state)

    def _new_optimizer(self) -> torch.optim.Optimizer:
        kind = torch.optim.AdamW if self.settings.optimizer == "adamw" else torch.optim.Adam
        rate, decay = self.settings.learning_rate, self.settings.weight_decay
        return kind(self.network.parameters(), rate, weight_decay=decay, fused=True)

    def _restore(self, state: dict[str, Any]) -> None:
        if state["data"] != self.data:
            raise StudyError(f"{self.folder.out} holds a run on other subjects; choose another folder")
        self.network.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step, self.loss_sum = state["epoch"], state["step"], state["loss_sum"]
        self.rows, self.best, self.seconds = state["rows"], state["best"], state["seconds"]

    def _save(self) -> None:
        """All that `_restore` reads."""
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        if not self.folder.writes:
            return
        state = {
            "config": self.config.to_toml(),
            "channels": self.channels,
            "data": self.data,
            "epoch": self.epoch,
            "step": self.step,
            "loss_sum": self.loss_sum,
            "rows": self.rows,
            "best": self.best,
            "seconds": self.seconds,
            "network": self.network.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }
        save_checkpoint(self.folder.last, state)

    def go_on(self, stack: ExitStack, progress: bool) -> TrainingResult:
        """Trains to the end, or until SIGTERM."""
        settings, begun = self.settings, self.epoch
        trained = seconds = 0.0
        if begun < settings.epochs:
            self.folder.log(
                f"{'goes on after' if self.step else 'begins at'} step {self.step} of {self.steps} on {self.device}, "
                f"{self.ranks.count} process(es), {torch.get_num_threads()} threads, torch {torch.__version__}"
            )
            take = Step(self._trained_network(), settings, self.device, self.scaler)
            writer = self._tensorboard(stack)
            bar = stack.enter_context(self._bar(progress))
            for epoch in range(begun, settings.epochs):
                images, took = self._train_epoch(take, (epoch + 1) * self.batches.steps_per_epoch, bar)
                trained, seconds = trained + images, seconds + took
                if self.step == (epoch + 1) * self.batches.steps_per_epoch:
                    self._finish_epoch(writer, images / took if took else math.nan)
                if self.stopping:
                    break
        finished = self.epoch == settings.epochs
        if not finished:
            self._save()
            self.folder.log(f"stopped by SIGTERM after step {self.step}; the same command goes on")
        return TrainingResult(
            out=self.folder.out,
            finished=finished,
            epochs=self.epoch,
            best_epoch=self.best["epoch"],
            best=self.best["scores"],
            curves=tuple(self.rows),
            seconds=self.seconds,
            images_per_second=trained / seconds if seconds else 0.0,
        )

    def _trained_network(self) -> nn.Module:
        network: Any = self.network
        if self.ranks.count > 1:
            network = DistributedDataParallel(network)
        if self.settings.compile:
            network = torch.compile(network)
        return network

    def _bar(self, shown: bool) -> Any:
        return files.progress(self.steps, "training", "step", quiet=not (shown and self.folder.writes), done=self.step)

    def _tensorboard(self, stack: ExitStack) -> Any:
        if not self.settings.tensorboard or not self.folder.writes:
            return None
        from torch.utils.tensorboard import SummaryWriter

        return stack.enter_context(SummaryWriter(str(self.folder.out / "tensorboard"), purge_step=self.epoch + 1))

    def _train_epoch(self, take: Step, end: int, bar: Any) -> tuple[int, float]:
        """Steps until `end` or SIGTERM; slices and seconds of them."""
        self.network.train()
        start, first = time.perf_counter(), self.step
        while self.step < end:
            batch = self.batches.draw(self.step, self.ranks.rank, self.ranks.count)
            loss = self.pixel_loss if self.step < self.warm_up else self.loss
            self._seed_dropout()
            found = take(loss, batch)
            stop = torch.full_like(found[:1], self.termination.is_set())
            scale = torch.ones_like(stop) if self.scaler is None else self.scaler.scale(torch.ones_like(stop))
            value, norm, stopping, scale = self.ranks.mean(torch.cat([found, stop, scale]))
            if not math.isfinite(value + norm) or scale < LEAST_SCALE:
                self._fail(take, loss, batch, value)
            rate = learning_rate(self.settings, self.step, self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            if self.scaler is None:
                self.optimizer.step()
            else:
                self.scaler.step(self.optimizer)
                self.scaler.update()
            self.loss_sum += value
            self.step += 1
            if not bar.disable:
                speed = (self.step - first) * self.batches.size / (time.perf_counter() - start)
                shown = f"loss {value:.3f}, {speed:.0f} images/s"
                best = self.best["scores"].get(self.settings.metric)
                bar.set_postfix_str(
                    shown if best is None else f"{shown}, best {self.settings.metric} {best:.3f}", False
                )
                bar.update()
            if stopping:
                self.stopping = True
                break
        return (self.step - first) * self.batches.size, time.perf_counter() - start

    def _seed_dropout(self) -> None:
        sequence = np.random.SeedSequence((self.settings.seed, DROPOUT, self.step, self.ranks.rank))
        torch.manual_seed(int(sequence.generate_state(1)[0]))

    def _finish_epoch(self, writer: Any, speed: float) -> None:
        """Validates, and saves what there is."""
        self.epoch += 1
        row: dict[str, float] = {
            "epoch": self.epoch,
            "step": self.step,
            "learning_rate": learning_rate(self.settings, self.step - 1, self.steps),
            "loss": self.loss_sum / self.batches.steps_per_epoch,
        }
        self.loss_sum = 0.0
        if self.epoch % self.settings.validate_every == 0 or self.epoch == self.settings.epochs:
            found = self._validate()
            row |= found
            # An epoch of the warm-up says nothing about the loss.
            own = self.step > self.warm_up or self.warm_up == self.steps
            now, best = found[self.settings.metric], self.best["scores"].get(self.settings.metric, math.nan)
            if own and (not self.best["epoch"] or now > best or (math.isnan(best) and not math.isnan(now))):
                self.best = {"epoch": self.epoch, "scores": found}
                self._save_best()
        self.rows.append(row)
        if self.folder.writes:
            self.folder.write_curves(self.rows)  # before last.pt: who goes on from there writes them again
        self._save()
        if not self.folder.writes:
            return
        shown = ", ".join(f"{name} {row[name]:.4f}" for name in ("loss", *SCORES) if name in row)
        self.folder.log(f"epoch {self.epoch}: {shown}; {speed:.1f} images/s")
        if writer is not None:
            for name, value in {**row, "images_per_second": speed}.items():
                if name not in ("epoch", "step"):
                    writer.add_scalar(f"{'validation' if name in SCORES else 'training'}/{name}", value, self.epoch)
            writer.flush()

    def _save_best(self) -> None:
        if self.folder.writes:
            state = {
                "config": self.config.to_toml(),
                "channels": self.channels,
                **self.best,
                "network": self.network.network.state_dict(),
            }
            save_checkpoint(self.folder.best, state)

    def _validate(self) -> dict[str, float]:
        """Means over the validation subjects, of which each rank takes its share."""
        settings = self.settings
        mine = [
            scores(
                subject,
                predict(self.network, subject.image, batch=self.batches.size, precision=settings.precision),
                min_size=settings.min_size,
            )
            for subject in self.validation[self.ranks.rank :: self.ranks.count]
        ]
        return mean_scores(self.ranks.gather(mine))

    def _fail(self, take: Step, loss: nn.Module, batch: Batch, value: float) -> None:
        """Saves what led to a loss that is not finite, and says what is wrong.

        Raises:
            DivergedError: always.
        """
        self._seed_dropout()
        take.network = self.network  # alone, as is the loss: the other ranks need not do the same
        loss = self.pixel_loss if loss is self.pixel_loss else build_loss(self.config.loss)
        reason = _what_is_not_finite(take, loss, batch)
        path = self.folder.out / (f"failed-{self.ranks.rank}.pt" if self.ranks.count > 1 else "failed.pt")
        state = {
            "config": self.config.to_toml(),
            "channels": self.channels,
            "step": self.step,
            "reason": reason,
            "slices": torch.from_numpy(self.batches.chosen(self.step)),
            **batch._asdict(),
            "network": self.network.network.state_dict(),
        }
        save_checkpoint(path, state)
        text = (
            f"training stopped at step {self.step} (epoch {self.epoch + 1}): the loss is {value:g}; {reason}. "
            f"Batch and weights are in {path}; a lower learning_rate or a longer warm_up may help"
        )
        self.folder.log(text)
        raise DivergedError(text)


def _what_is_not_finite(take: Step, loss: nn.Module, batch: Batch) -> str:
    """In words: weights, the network's output, terms of the loss, or gradients of terms."""
    images, labels, valid = batch
    if not all(bool(one.isfinite().all()) for one in take.parameters):
        return "weights of the network are not finite"
    with torch.no_grad():
        logits = take.logits(images)
    if not bool(logits.isfinite().all()):
        return "the network's output is not finite"
    logits.requires_grad_()
    terms = named_terms(loss, logits, labels > 0, target_labels=labels, valid_mask=valid)
    wrong = [f"{name} is {float(value.detach()):g}" for name, value in terms.items() if not bool(value.isfinite())]
    if wrong:
        return "of its terms " + ", ".join(wrong)
    for name, value in terms.items():
        (gradient,) = torch.autograd.grad(value, logits, retain_graph=True)
        if not bool(gradient.isfinite().all()):
            wrong.append(f"the gradient of {name} is not finite")
    return ", ".join(wrong) or "its gradient is not finite in the network"


def load_network(out: Path, which: str = "best", *, device: torch.device | str = "cpu") -> SliceNetwork:
    """The network of a run, in evaluation mode.

    Args:
        out: folder of the run.
        which: "best" or "last".
        device: to put it on.

    Raises:
        StudyError: no such checkpoint.
    """
    state = load_checkpoint(Path(out) / f"{which}.pt")
    config = RunConfig.from_table(tomllib.loads(state["config"]))
    network = build_network(config.network, state["channels"])
    network.network.load_state_dict(state["network"])
    return network.to(device).eval()
