"""Processes that work through tasks, and survive one that dies."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fastinstance.study.subjects import StudyError

__all__ = ["Outcome", "Stopped", "Task", "sigterm", "work"]

_GLANCE = 0.5  # seconds between two looks whether SIGTERM has come
_PATIENCE = 60.0  # seconds that a process has to save what it does when it is asked to stop


class Stopped(BaseException):
    """SIGTERM: what is done is kept, the rest is for the next time."""


@dataclass(frozen=True)
class Task:
    """A call in another process; all of it can be pickled."""

    name: str
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    log: Path
    """Where its output goes."""


@dataclass(frozen=True)
class Outcome:
    """What became of a task."""

    name: str
    error: str | None
    """One line; None if it went well."""
    trace: str = ""


def work(tasks: Sequence[Task], jobs: int, devices: Sequence[str] = ()) -> Generator[Outcome, None, None]:
    """Runs tasks in so many processes and yields their outcomes as they finish.

    A process that dies (killed, for want of memory perhaps) is the failure of its task alone: another takes its place.
    Process number i sees one device alone (as CUDA_VISIBLE_DEVICES), the i-th modulo their number. SIGTERM and Ctrl-C
    are passed on, so that trainings save their state before this raises `Stopped` or KeyboardInterrupt.
    """
    waiting = list(reversed(tasks))
    workers: list[_Worker] = []
    with sigterm() as asked:
        try:
            for number in range(min(jobs, len(tasks))):
                workers.append(_Worker(devices[number % len(devices)] if devices else None))
                workers[-1].give(waiting.pop())
            while busy := [worker for worker in workers if worker.task is not None]:
                if asked.is_set():
                    raise Stopped
                for ready in connection.wait([worker.pipe for worker in busy], _GLANCE):
                    worker = next(worker for worker in busy if worker.pipe is ready)
                    outcome = worker.outcome()
                    if outcome is None:  # it was stopped by someone else, and has saved its state
                        raise Stopped
                    yield outcome
                    if not waiting:
                        continue
                    if not worker.process.is_alive():
                        workers.remove(worker)
                        worker = _Worker(worker.device)
                        workers.append(worker)
                    worker.give(waiting.pop())
        finally:
            for worker in workers:
                worker.stop()
            for worker in workers:
                worker.join()


@contextmanager
def sigterm() -> Iterator[threading.Event]:
    """Whether SIGTERM has come; outside of the main thread it is not listened to."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


class _Worker:
    """One process, and the task it has."""

    def __init__(self, device: str | None) -> None:
        context = get_context("spawn")
        self.device = device
        self.task: Task | None = None
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, device))
        self.process.start()
        other.close()  # so that the end of the process is the end of the pipe

    def give(self, task: Task) -> None:
        self.task = task
        self.pipe.send((task.call, task.arguments, task.log))

    def outcome(self) -> Outcome | None:
        """Of the task that it has finished or died of; None if it left of its own accord."""
        assert self.task is not None
        name, self.task = self.task.name, None
        try:
            error, trace = self.pipe.recv()
        except EOFError:
            self.process.join()
            code = self.process.exitcode or 0
            if code in (0, -signal.SIGTERM):
                return None
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            hint = "; it may have run out of memory: try fewer --jobs" if code == -signal.SIGKILL else ""
            return Outcome(name, f"its process ended ({how}){hint}")
        return Outcome(name, error, trace)

    def stop(self) -> None:
        if self.task is not None and self.process.is_alive():
            self.process.terminate()
        self.pipe.close()

    def join(self) -> None:
        self.process.join(_PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _serve(pipe: Connection, device: str | None) -> None:
    """What a process does: one task after the other, until there is none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the first process, which passes it on as SIGTERM
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    while True:
        try:
            call, arguments, log = pipe.recv()
        except EOFError:
            return
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
                os.dup2(file.fileno(), stream.fileno())
            error, trace = None, ""
            try:
                call(*arguments)
            except StudyError as reason:
                error = " ".join(str(reason).split())
            except OSError as reason:  # a full disk
                error = " ".join(str(reason).split())
            except Exception as reason:  # whatever it is, the other tasks go on
                error, trace = f"{type(reason).__name__}: {' '.join(str(reason).split())}", traceback.format_exc()
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
        pipe.send((error, trace))


def _leave_with_parent() -> None:
    """Ends this process when the one that started it is gone, so that none works on unseen."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
