"""What a data set is made of, whatever it was read from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["StudyError", "Subject"]


class StudyError(Exception):
    """Something that the user can understand and mend; its text is the one line that is shown."""


@dataclass(frozen=True)
class Subject:
    """One image with its truth. A 2D image is a volume of one slice."""

    name: str
    """Unique in its data set."""
    person: str
    """Whose image it is: visits of one person share it, and never lie on both sides of a split."""
    image: Tensor
    """`[C, Z, Y, X]` float32, mean 0 and variance 1 in every channel."""
    target: Tensor
    """`[Z, Y, X]` bool."""
    labels: Tensor
    """`[Z, Y, X]` int32, the true instances, 1, 2, ... in every slice; 0 is background."""
    valid: Tensor | None
    """`[Z, Y, X]` bool, False where the annotation says nothing; None where it covers all."""
    spacing: tuple[float, float, float]
    """Voxel size (slice, row, column) in mm."""
