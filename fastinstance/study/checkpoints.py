"""Files of a run that are complete or not there: a run that is killed at any moment goes on from the last one."""

from __future__ import annotations

import fcntl
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastinstance.files import replacing
from fastinstance.study.subjects import StudyError

__all__ = ["alone", "load_checkpoint", "save_checkpoint", "write_safely"]


@contextmanager
def alone(out: Path, what: str) -> Iterator[None]:
    """Holds a folder, made if need be; the system lets go of it when the process ends, however it ends.

    Raises:
        StudyError: another process holds it as `what`; or it cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / "lock").open("w")
    except OSError as error:
        raise StudyError(f"cannot write to {out}: {error.strerror or error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StudyError(f"another {what} is at work in {out}") from None
        except OSError:
            pass  # a file system without locks
        yield


def write_safely(path: Path, content: bytes) -> None:
    """Replaces a file in one step, on the disk when this returns; after an error the old one is as it was.

    Raises:
        StudyError: the disk is full, or the file cannot be written for another reason.
    """
    try:
        with replacing(path) as part, part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too
        finally:
            os.close(folder)
    except OSError as error:
        kept = "the one before is as it was" if path.exists() else "there is none yet"
        raise StudyError(f"cannot write {path}: {error.strerror or error}; {kept}") from error


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes tensors and plain values, as `write_safely`."""
    buffer = io.BytesIO()  # torch.save to a file turns a full disk into errors of its own
    torch.save(state, buffer)
    write_safely(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote, on the CPU; no code in it is run.

    Raises:
        StudyError: no such file, or not such a checkpoint.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise StudyError(f"{path}: no such checkpoint") from error
    except Exception as error:  # a damaged archive fails in many ways
        raise StudyError(f"{path}: expected a checkpoint of fastinstance train, cannot be read ({error})") from error
