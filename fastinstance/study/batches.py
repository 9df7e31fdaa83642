"""The slices of all training subjects, in memory, and the batches of a training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fastinstance.study.augment import Augmentation, Batch
from fastinstance.study.config import TrainingConfig
from fastinstance.study.subjects import StudyError, Subject

__all__ = ["Batches", "check_subjects", "fingerprint", "refuse_shared_images", "split"]

ORDER, SLICES, CHANGES = range(3)  # what the random numbers of a step are for


def check_subjects(train: Sequence[Subject], validation: Sequence[Subject]) -> None:
    """Whether a network can be trained on some subjects, and judged on others.

    Raises:
        StudyError: names the subject and what is wrong with it.
    """
    for what, subjects in (("training", train), ("validation", validation)):
        if not subjects:
            raise StudyError(f"expected at least one subject for {what}, got none")
        if not any(bool(subject.target.any()) for subject in subjects):
            raise StudyError(f"expected instances in the {what} subjects, got none: every mask is empty")
    if all(bool(subject.target.all()) for subject in train):
        raise StudyError("expected background in the training subjects, got none: every mask is full")
    both = {subject.person for subject in train} & {subject.person for subject in validation}
    if both:
        raise StudyError(f"expected other persons for validation than for training, got {min(both)} in both")
    channels = train[0].image.shape[0]
    for subject in (*train, *validation):
        if subject.image.shape[0] != channels:
            raise StudyError(
                f"expected {channels} channels as {train[0].name} has, got {subject.image.shape[0]} of {subject.name}"
            )
        if not bool(subject.image.isfinite().all()):
            raise StudyError(f"{subject.name}: expected finite intensities, got NaN or infinity")
        if not torch.equal(subject.target, subject.labels > 0):
            raise StudyError(f"{subject.name}: expected labels above 0 on the target and nowhere else")


def refuse_shared_images(ours: Iterable[Subject], others: Iterable[Subject]) -> None:
    """Whether no image is in both, whatever its names there.

    Raises:
        StudyError: one is.
    """
    seen = {_digest(subject.image): subject.name for subject in ours}
    for subject in others:
        if (twin := seen.get(_digest(subject.image))) is not None:
            raise StudyError(f"expected other images than are trained on, but {subject.name} has the image of {twin}")


def _digest(image: Tensor) -> bytes:
    return hashlib.blake2b(image.contiguous().numpy().data).digest()


def split(subjects: Sequence[Subject], share: float, seed: int) -> tuple[list[Subject], list[Subject]]:
    """Training and validation subjects; all visits of a person are on one side.

    Args:
        subjects: of two persons or more.
        share: of the persons that go to validation; at least one does, and one does not.
        seed: of the choice.

    Raises:
        StudyError: there is one person only.
    """
    persons = sorted({subject.person for subject in subjects})
    if len(persons) < 2:
        raise StudyError(f"expected at least two persons, one of them for validation, got {len(persons)}")
    count = min(max(1, round(share * len(persons))), len(persons) - 1)
    chosen = set(np.random.default_rng(seed).permutation(persons)[:count].tolist())
    return (
        [subject for subject in subjects if subject.person not in chosen],
        [subject for subject in subjects if subject.person in chosen],
    )


def fingerprint(*groups: Iterable[Subject]) -> str:
    """Changes with the names and the content of subjects."""
    digest = hashlib.blake2b(digest_size=16)
    for group in groups:
        for subject in group:
            digest.update(f"{subject.name}\0{subject.person}\0{tuple(subject.image.shape)}".encode())
            for tensor in (subject.image, subject.labels, subject.valid):
                if tensor is not None:
                    digest.update(tensor.contiguous().numpy().data)
        digest.update(b"\1")
    return digest.hexdigest()


def _padded(tensors: Sequence[Tensor], size: tuple[int, int], mode: str) -> Tensor:
    """Slices `[C, Z, Y, X]` of several subjects, continued below and to the right, as `[ΣZ, C, *size]`."""
    parts = []
    for tensor in tensors:
        down, right = size[0] - tensor.shape[-2], size[1] - tensor.shape[-1]
        part = tensor.transpose(0, 1)
        parts.append(F.pad(part, (0, right, 0, down), mode=mode) if down or right else part)
    return torch.cat(parts)


class Batches:
    """Slices of several subjects, from which every step draws a batch.

    All random numbers of a step are drawn from (seed, what for, number of the step): a run that goes on needs no
    memory of the steps before. Each round over the subjects has an order of its own. Slices smaller than the largest
    are continued by their last rows and columns, which are not valid.

    Args:
        subjects: checked by `check_subjects`.
        config: of `[training]`.
        augmentation: of the slices.
        device: where the batches are wanted. The slices lie there if they fit in half of what is free, else in
            pinned memory.

    Raises:
        StudyError: no slice to draw.
    """

    def __init__(
        self, subjects: Sequence[Subject], config: TrainingConfig, augmentation: Augmentation, device: torch.device
    ) -> None:
        self.config, self.augmentation, self.device = config, augmentation, device
        height, width = (max(subject.image.shape[axis] for subject in subjects) for axis in (-2, -1))
        size = height, width
        even = all(tuple(subject.image.shape[-2:]) == size for subject in subjects)
        images = _padded([subject.image for subject in subjects], size, "replicate")
        labels = _padded([subject.labels[None] for subject in subjects], size, "constant")
        valid = None
        if not even or any(subject.valid is not None for subject in subjects):
            whole = [torch.ones_like(s.target) if s.valid is None else s.valid for s in subjects]
            valid = _padded([one[None] for one in whole], size, "constant")
            labels = labels * valid
        usable = labels.flatten(1).any(1) if config.with_lesions else torch.ones(len(labels), dtype=torch.bool)
        self.slices, start = [], 0
        for subject in subjects:
            end = start + subject.image.shape[1]
            found = start + usable[start:end].nonzero()[:, 0].numpy()
            if len(found):
                self.slices.append(found)
            start = end
        if not self.slices:
            raise StudyError("expected slices with instances (with_lesions = true), got none that are valid")
        self.per_subject = min(config.slices_per_subject, max(map(len, self.slices)))
        self.size = config.subjects_per_batch * self.per_subject
        """Slices of a step."""
        self.steps_per_epoch = config.steps_per_epoch or -(-len(self.slices) // config.subjects_per_batch)
        self.batch = Batch(images, labels, valid).map(self._place)
        self._order = lru_cache(2)(lambda turn: self._rng(ORDER, turn).permutation(len(self.slices)))

    def _place(self, tensor: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return tensor
        free, _ = torch.cuda.mem_get_info(self.device)
        return tensor.to(self.device) if tensor.nbytes < free / 2 else tensor.pin_memory()

    def _rng(self, what: int, number: int) -> np.random.Generator:
        return np.random.default_rng((self.config.seed, what, number))

    def chosen(self, step: int) -> NDArray[np.int64]:
        """The slices of a step, `[B]`: each subject's are different until it has no more."""
        count, rng = len(self.slices), self._rng(SLICES, step)
        first = step * self.config.subjects_per_batch
        turns = (divmod(first + place, count) for place in range(self.config.subjects_per_batch))
        subjects = (self.slices[self._order(turn)[place]] for turn, place in turns)
        return np.concatenate([np.resize(rng.permutation(slices), self.per_subject) for slices in subjects])

    def draw(self, step: int, rank: int = 0, ranks: int = 1) -> Batch:
        """A rank's part of the batch of a step."""
        share = self.size // ranks
        part = slice(rank * share, (rank + 1) * share)
        index = torch.from_numpy(self.chosen(step)[part])
        changes = self.augmentation.draw(self._rng(CHANGES, step), self.size).part(part)

        def take(tensor: Tensor) -> Tensor:
            taken = tensor[index.to(tensor.device)]
            return taken.to(self.device, non_blocking=True)

        return self.augmentation(self.batch.map(take), changes)
