"""Training: it learns, and whatever stops it, nothing is lost and nothing changes."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
import resource
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastinstance.__main__ import main
from fastinstance.study import checkpoints, data, training
from fastinstance.study.checkpoints import load_checkpoint, save_checkpoint, write_safely
from fastinstance.study.config import SCORES, RunConfig
from fastinstance.study.evaluation import mean_scores, scores
from fastinstance.study.subjects import StudyError, Subject
from fastinstance.study.training import DivergedError, TrainingResult, learning_rate, load_network, predict, train
from fastinstance.testing import assert_close
from tests.scans import scan

ROOT = Path(__file__).parent.parent
TRAIN = [scan(i) for i in range(4)]
VALIDATION = [scan(i) for i in (10, 11)]
TABLE: dict[str, dict[str, Any]] = {
    "network": {"channels": [4, 8], "dropout": 0.2},
    "loss": {"name": "FalseLoss", "warm_up": 0.4},
    "training": {
        "epochs": 6,
        "subjects_per_batch": 2,
        "slices_per_subject": 3,
        "optimizer": "adamw",
        "learning_rate": 0.01,
        "schedule": "cosine",
        "rate_warm_up": 0.1,
        "threads": 1,
        "device": "cpu",
        "validate_every": 2,
    },
    "augmentation": {"rotation": 10, "flip": "horizontal", "scale": 0.1, "shift": 0.1},
}
FILES = ("best.pt", "last.pt", "curves.csv", "run.toml")


Whole = tuple[TrainingResult, dict[str, Any]]


def config(**changes: dict[str, Any]) -> RunConfig:
    names = dict.fromkeys((*TABLE, *changes))
    return RunConfig.from_table({name: TABLE.get(name, {}) | changes.get(name, {}) for name in names})


def go(out: Path, settings: RunConfig | None = None, **options: Any) -> TrainingResult:
    return train(settings or config(), TRAIN, VALIDATION, out, **{"progress": False, **options})


def bits(value: Any) -> Any:
    """Tensors as bytes; the order of a pickle is not the same for equal values."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [bits(one) for one in value]
    return repr(value)


def contents(out: Path) -> dict[str, Any]:
    """All that a run leaves but its log and the time it took, to the bit."""
    files = {name: out / name for name in FILES}
    return {
        name: bits(load_checkpoint(path) | {"seconds": 0}) if path.suffix == ".pt" else path.read_text()
        for name, path in files.items()
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole")
    return go(out), contents(out)


def test_a_network_learns(tmp_path: Path):
    settings = config(
        training={"epochs": 10, "steps_per_epoch": 8}, network={"channels": [8, 16], "dropout": 0.0}, augmentation={}
    )
    result = go(tmp_path, settings)
    assert result.finished
    assert result.best["dice"] > 0.55
    assert result.best["f1"] > 0.45
    untrained = [predict(training.build_network(settings.network, 1).eval(), one.image) for one in VALIDATION]
    assert mean_scores(map(scores, VALIDATION, untrained))["dice"] < 0.3


def test_what_a_run_leaves(whole: Whole):
    result, _ = whole
    assert result.finished
    assert result.epochs == 6
    assert result.images_per_second > 0
    with (result.out / "curves.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == list(range(1, 7))
    assert [int(row["step"]) for row in rows] == [2, 4, 6, 8, 10, 12]
    assert [bool(row["f1"]) for row in rows] == [False, True] * 3
    best = max((row for row in rows[2:] if row["f1"]), key=lambda row: float(row["f1"]))
    assert result.best_epoch == int(best["epoch"])  # of those after the warm-up, which ends in the third
    for name in SCORES:
        assert result.best[name] == pytest.approx(float(best[name]), nan_ok=True)
    log = (result.out / "log.txt").read_text()
    assert log.count("images/s") == 6
    state = load_checkpoint(result.out / "best.pt")
    assert state["epoch"] == result.best_epoch
    network = load_network(result.out)
    again = mean_scores(scores(one, predict(network, one.image)) for one in VALIDATION)
    assert again == pytest.approx(result.best, nan_ok=True)
    last = [load_network(result.out, "last"), load_checkpoint(result.out / "last.pt")["network"]]
    assert all(torch.equal(value, last[1][name]) for name, value in last[0].network.state_dict().items())


def test_the_same_call_again_has_nothing_to_do(whole: Whole):
    first, files = whole
    again = go(first.out)
    assert again.images_per_second == 0
    assert dataclasses.replace(again, images_per_second=first.images_per_second) == first
    assert contents(first.out) == files


def test_the_callers_generators_and_threads_are_as_before(tmp_path: Path):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    handler = signal.getsignal(signal.SIGTERM)
    go(tmp_path, config(training={"epochs": 1}))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert signal.getsignal(signal.SIGTERM) is handler


CHILD = """
import sys
from pathlib import Path
from tests.test_training import config, go
go(Path(sys.argv[1]), config(training={"epochs": 20}))
"""


def wait_for(child: subprocess.Popen[str], log: Path, text: str) -> None:
    """Until the log says it."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise AssertionError(f"ended with {child.returncode}: {child.communicate()}")
        if log.exists() and text in log.read_text():
            return
        time.sleep(0.002)
    raise AssertionError(f"no {text!r} in time")


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def test_a_run_that_was_killed_is_the_run_that_never_was(tmp_path: Path):
    settings = config(training={"epochs": 20})
    go(tmp_path / "whole", settings)
    killed = tmp_path / "killed"
    command = [sys.executable, "-c", CHILD, str(killed)]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True) as child:
        wait_for(child, killed / "log.txt", "epoch 3:")
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    assert 2 <= load_checkpoint(killed / "last.pt")["epoch"] < 20
    (killed / ".1.part.last.pt").write_text("half of a file")
    assert go(killed, settings).finished
    assert contents(killed) == contents(tmp_path / "whole")
    assert not list(killed.glob(".*"))


class Crash(BaseException):
    """As sudden as SIGKILL, but for this process."""


@pytest.mark.parametrize(("precision", "write"), [*(("float32", n) for n in range(2, 16)), ("fp16", 4), ("fp16", 7)])
def test_a_crash_at_any_write_changes_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: Whole,
    write: int,
    precision: str,
):
    """Before a file is written: curves.csv and last.pt of each epoch, and best.pt where one is better."""
    settings = config(training={"precision": precision})
    count = 0

    def counted(path: Path, content: bytes) -> None:
        nonlocal count
        count += 1
        if count == write:
            raise Crash
        write_safely(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_safely", counted)
        patch.setattr(training, "write_safely", counted)
        with pytest.raises(Crash):
            go(tmp_path / "crashed", settings)
    go(tmp_path / "crashed", settings)
    expected = whole[1]
    if precision != "float32":
        go(tmp_path / "whole", settings)
        expected = contents(tmp_path / "whole")
    assert contents(tmp_path / "crashed") == expected


@pytest.mark.parametrize("step", [0, 3, 4])
def test_sigterm_saves_after_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Whole, step: int):
    """Also in the middle of an epoch."""
    draw = training.Batches.draw

    def drawn(self: Any, number: int, *ranks: int) -> Any:
        if number == step:
            signal.raise_signal(signal.SIGTERM)
        return draw(self, number, *ranks)

    with monkeypatch.context() as patch:
        patch.setattr(training.Batches, "draw", drawn)
        result = go(tmp_path)
    assert not result.finished
    assert load_checkpoint(tmp_path / "last.pt")["step"] == step + 1
    assert 0 < result.seconds == load_checkpoint(tmp_path / "last.pt")["seconds"]
    assert f"stopped by SIGTERM after step {step + 1}" in (tmp_path / "log.txt").read_text()
    save_checkpoint(tmp_path / "last.pt", load_checkpoint(tmp_path / "last.pt") | {"seconds": 1000.0})
    again = go(tmp_path)
    assert again.finished
    assert 1000 < again.seconds < 2000
    assert contents(tmp_path) == whole[1]


RUN_FILE = """
[data]
source = "brain"
subjects = 3
slices = 2
validation = 0.34
[network]
channels = [4, 8]
[training]
epochs = 12
subjects_per_batch = 1
slices_per_subject = 2
threads = 1
device = "cpu"
"""


def test_the_command_saves_on_sigterm_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file, out, cache = tmp_path / "run.toml", tmp_path / "out", tmp_path / "cache"
    file.write_text(RUN_FILE)
    arguments = ["train", str(file), "--out", str(out), "--cache", str(cache)]
    command = [sys.executable, "-m", "fastinstance", *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment(), **pipes) as child:
        wait_for(child, out / "log.txt", "epoch 1:")
        child.terminate()
        printed, shown = child.communicate(timeout=60)
    assert child.returncode == 0, shown
    assert "the same command goes on" in printed
    assert "images/s" in shown
    stopped = load_checkpoint(out / "last.pt")
    assert 0 < stopped["epoch"] < 12
    assert main(arguments) == 0
    assert "best f1 0." in capsys.readouterr().out
    assert "goes on after step" in (out / "log.txt").read_text()
    assert main(["train", str(file), "--out", str(tmp_path / "whole"), "--cache", str(cache), "--quiet"]) == 0
    assert contents(out) == contents(tmp_path / "whole")
    captured = capsys.readouterr()
    assert captured.err == ""

    file.write_text(RUN_FILE.replace("epochs = 12", "epochs = 13"))
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "holds another run ([training] epochs is 12 there, not 13)" in error
    assert error.count("\n") == 1


def test_sigterm_while_subjects_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(data, "load", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    file = tmp_path / "run.toml"
    file.write_text(RUN_FILE)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        main(["train", str(file), "--out", str(tmp_path / "out"), "--quiet"])
    assert not stop.value.code
    assert "the same command goes on" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[loss]\nname = 'FalseLos'", "did you mean FalseLoss?"),
        ("", "expected a table [data]"),
        ("[data]\nsource = 'brains'", "did you mean 'brain'?"),
        ("[data]\nsource = 'wmh'\nfolder = 'nowhere'", "nowhere"),
        ("[data]\nsource = 'brain'\nsubjects = 2\n[training]\ngraph = true\ndevice = 'cpu'", "set graph = false"),
        ("[data]\nsource = 'brain'\nsubjects = 1\nslices = 1", "expected at least two persons"),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str):
    file = tmp_path / "run.toml"
    file.write_text(text)
    assert main(["train", str(file), "--out", str(tmp_path / "out"), "--quiet"]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert error.startswith("fastinstance: error: ")
    assert not (tmp_path / "out").exists()


def test_another_run_is_refused(whole: Whole):
    out = whole[0].out
    with pytest.raises(StudyError, match=r"\[loss\] warm_up is 0.4 there, not 0.5"):
        go(out, config(loss={"warm_up": 0.5}))
    with pytest.raises(StudyError, match="holds a run on other subjects"):
        train(config(), TRAIN[:3], VALIDATION, out, progress=False)
    assert contents(out) == whole[1]


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Whole):
    """The kernel itself refuses the end of a file, as it does where there is no space."""
    good: dict[str, bytes] = {}
    finish = training._Run._finish_epoch

    def limited(self: Any, *arguments: Any) -> None:
        if self.epoch == 3:
            good.update({name: (tmp_path / name).read_bytes() for name in ("last.pt", "curves.csv")})
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(good["last.pt"]) - 1000, resource.RLIM_INFINITY))
        finish(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "_finish_epoch", limited)
        try:
            with pytest.raises(StudyError, match=r"cannot write .*last.pt: .*; the one before is as it was"):
                go(tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert (tmp_path / "last.pt").read_bytes() == good["last.pt"]
    assert not list(tmp_path.glob(".*"))
    assert load_checkpoint(tmp_path / "last.pt")["epoch"] == 3
    go(tmp_path)
    assert contents(tmp_path) == whole[1]


class Evil:
    ran = False

    def __reduce__(self) -> Any:
        return setattr, (Evil, "ran", True)


def test_checkpoints_hold_no_code_and_damage_is_named(tmp_path: Path):
    path = tmp_path / "last.pt"
    with pytest.raises(StudyError, match="no such checkpoint"):
        load_checkpoint(path)
    torch.save({"evil": Evil()}, path)
    with pytest.raises(StudyError, match="cannot be read"):
        load_checkpoint(path)
    assert not Evil.ran
    save_checkpoint(path, {"tensor": torch.arange(3)})
    assert load_checkpoint(path)["tensor"].tolist() == [0, 1, 2]
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(StudyError, match="cannot be read"):
        load_checkpoint(path)
    with pytest.raises(StudyError, match=r"cannot write .*: No such file"):
        write_safely(tmp_path / "nowhere" / "x", b"")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match=r"cannot write to .*file"):
        go(tmp_path / "file" / "out")


def test_a_loss_that_is_not_finite_names_its_term(tmp_path: Path):
    settings = config(loss={"name": "ProximityLoss", "options": {"proximity": 3e38}, "warm_up": 0.25}, augmentation={})
    with pytest.raises(DivergedError, match="the loss is inf; of its terms proximity is inf") as error:
        go(tmp_path, settings)
    assert "\n" not in str(error.value)
    assert "training stopped at step 3 (epoch 2)" in str(error.value)  # the first after the warm-up
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 2
    failed = load_checkpoint(tmp_path / "failed.pt")
    assert failed["step"] == 3
    assert failed["images"].shape == (6, 1, 32, 24)
    network = load_network(tmp_path, "failed")
    loss: Any = training.build_loss(settings.loss)
    labels = failed["labels"]
    value = loss(network(failed["images"]), labels > 0, target_labels=labels, valid_mask=failed["valid"])
    assert not value.isfinite()
    with pytest.raises(DivergedError, match="at step 3"):  # and so it does when it goes on
        go(tmp_path, settings)


def test_a_network_that_explodes_is_named(tmp_path: Path):
    settings = config(training={"learning_rate": 1e38, "schedule": "constant", "rate_warm_up": 0.0})
    with pytest.raises(DivergedError, match=r"network's output is not finite|weights of the network are not finite"):
        go(tmp_path, settings)


def test_a_gradient_that_is_not_finite_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Root(torch.nn.Module):
        """Finite at 0, its slope is not."""

        def forward(self, input: torch.Tensor, target: torch.Tensor, **images: Any) -> torch.Tensor:
            del target, images
            return (input - input).abs().sqrt().sum()

    monkeypatch.setattr(training, "build_loss", lambda *_, **__: Root())
    with pytest.raises(DivergedError, match="the loss is 0; the gradient of Root is not finite"):
        go(tmp_path, config(loss={"warm_up": 0}))


def test_fp16_without_any_finite_gradient_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The first overflows only lower the scale; a gradient that is not finite at any scale is no overflow."""

    class Root(torch.nn.Module):
        def forward(self, input: torch.Tensor, target: torch.Tensor, **images: Any) -> torch.Tensor:
            del target, images
            return (input - input).abs().sqrt().sum()

    monkeypatch.setattr(training, "build_loss", lambda *_, **__: Root())
    settings = config(loss={"warm_up": 0}, training={"precision": "fp16", "epochs": 30, "validate_every": 30})
    with pytest.raises(DivergedError, match=r"stopped at step 37 .*the gradient of Root is not finite"):
        go(tmp_path, settings)
    assert (tmp_path / "failed.pt").exists()


def test_one_training_at_a_time(tmp_path: Path):
    with checkpoints.alone(tmp_path, "training"), pytest.raises(StudyError, match="another training is at work"):
        go(tmp_path)


def test_the_best_epoch_is_one_of_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What was best while the pixel loss alone was trained is not the network of this loss."""
    values = iter([0.9, 0.3, 0.5, 0.4])
    monkeypatch.setattr(training._Run, "_validate", lambda _: dict.fromkeys(SCORES, next(values)))
    result = go(tmp_path, config(loss={"warm_up": 0.25}, training={"epochs": 4, "validate_every": 1}))
    assert (result.best_epoch, result.best["f1"]) == (3, 0.5)
    assert [row["f1"] for row in result.curves] == [0.9, 0.3, 0.5, 0.4]
    monkeypatch.setattr(training._Run, "_validate", lambda _: dict.fromkeys(SCORES, 0.5))
    warm = go(tmp_path / "warm", config(loss={"warm_up": 1}, training={"epochs": 2, "validate_every": 1}))
    assert warm.best_epoch == 1


def test_learning_rates():
    settings = config(training={"learning_rate": 0.5, "rate_warm_up": 0.1}).training
    rates = [learning_rate(settings, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.05)
    assert rates[50] == pytest.approx(0.25)
    assert rates[-1] < 0.001
    assert max(rates) == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi * 0.09)))
    constant = dataclasses.replace(settings, schedule="constant", rate_warm_up=0.0)
    assert {learning_rate(constant, step, 100) for step in range(100)} == {0.5}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_what_float32_does(tmp_path: Path, precision: str):
    losses = {}
    for kind in ("float32", precision):
        result = go(tmp_path / kind, config(training={"precision": kind}, network={"dropout": 0.0}))
        losses[kind] = [row["loss"] for row in result.curves]
    assert losses[precision] != losses["float32"]
    assert losses[precision] == pytest.approx(losses["float32"], rel=0.05)


def test_what_fails_in_a_step_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n2 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(training.Step, "_eager", full)
        with pytest.raises(StudyError, match=r"cpu has too little memory for 6 slices a step; lower") as error:
            go(tmp_path)
    assert "\n" not in str(error.value)

    def no_compiler(*_: Any) -> Any:
        raise RuntimeError("No working C++ compiler found")

    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network: compile_with(network, backend=no_compiler))
    with pytest.raises(StudyError, match=r"compile: .*No working C\+\+ compiler found.*; set compile = false") as error:
        go(tmp_path / "compiled", config(training={"compile": True}))
    assert "\n" not in str(error.value)


def test_a_compiled_network_learns_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Traced, but not by the C++ compiler, which takes a minute."""
    compile_with, calls, losses = torch.compile, [], []

    def traced(network: torch.nn.Module) -> Any:
        calls.append(network)
        return compile_with(network, backend="eager")

    monkeypatch.setattr(torch, "compile", traced)
    for compiled in (False, True):
        settings = config(
            training={"compile": compiled, "epochs": 2}, network={"channels": [2, 4], "dropout": 0.0}, augmentation={}
        )
        losses.append([row["loss"] for row in go(tmp_path / str(compiled), settings).curves])
    assert len(calls) == 1
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_what_this_machine_cannot_do_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(StudyError, match="expected a CUDA device for a CUDA graph, got cpu; set graph = false"):
        go(tmp_path, config(training={"graph": True}))
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(StudyError, match='expected one that is here, got "cuda:1": torch finds no GPU'):
            go(tmp_path, config(training={"device": "cuda:1"}))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(StudyError, match="tensorboard needs the package: pip install tensorboard"):
            go(tmp_path, config(training={"tensorboard": True}))
    assert not list(tmp_path.iterdir())


def test_tensorboard_has_the_curves(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = go(tmp_path, config(training={"tensorboard": True, "epochs": 2}))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {f"validation/{name}" for name in SCORES} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("training/loss")] == [1, 2]
    assert events.Scalars("training/loss")[1].value == pytest.approx(result.curves[1]["loss"])
    assert events.Scalars("validation/dice")[0].value == pytest.approx(result.best["dice"])


def test_progress_says_images_per_second(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    go(tmp_path, config(training={"epochs": 1}), progress=True)
    shown = capsys.readouterr().err
    assert "training: 100%" in shown
    assert "images/s" in shown


def uneven() -> list[Subject]:
    """Many instances in some subjects, one in the others: a mean of the ranks' means would be another."""
    stripe = (torch.arange(24) < 3).expand(4, 32, 24).contiguous()
    return [scan(0), *(scan(i, target=stripe, labels=stripe.int()) for i in (1, 2)), scan(3)]


def many(out: Path) -> TrainingResult:
    settings = config(network={"dropout": 0.0}, loss={"name": "ICILoss", "warm_up": 0.2}, training={"epochs": 2})
    return train(settings, uneven(), VALIDATION, out, progress=False)


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=120))
    many(Path(folder) / "two")
    dist.destroy_process_group()


def test_two_processes_are_one_with_all_of_every_batch(tmp_path: Path):
    """Averages over instances are global, and so are the metrics; only rank 0 writes."""
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    one = many(tmp_path / "one")
    two = load_checkpoint(tmp_path / "two" / "last.pt")
    for mine, theirs in zip(one.curves, two["rows"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, nan_ok=True)
    alone, shared = (load_network(tmp_path / name, "last") for name in ("one", "two"))
    for subject in VALIDATION:
        assert_close(predict(shared, subject.image), predict(alone, subject.image), atol=2e-3)
    assert many(tmp_path / "two").finished  # one process reads what two have written
