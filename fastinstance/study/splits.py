"""Folds by person: nested cross-validation in which no person lies on two sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastinstance.study.batches import check_subjects
from fastinstance.study.subjects import StudyError, Subject

__all__ = ["Split", "make_folds", "split"]


@dataclass(frozen=True)
class Split:
    """The subjects of one fold, in the order of the data set."""

    train: list[Subject]
    validation: list[Subject]
    test: list[Subject]


def make_folds(
    data: str, subjects: Sequence[Subject], folds: int | Sequence[Sequence[str]], *, seed: int = 0
) -> list[list[str]]:
    """The persons of each fold.

    Args:
        data: name of the data set, for messages.
        folds: how many, of sizes that differ by at most one person, drawn from `seed`; or the persons of each.

    Raises:
        StudyError: too few persons, or folds that do not hold every person once.
    """
    persons = sorted({subject.person for subject in subjects})
    if isinstance(folds, int):
        # The test fold leaves at least one person to train on and one to validate on.
        if folds < 2 or len(persons) < max(folds, 3) or len(persons) - -(-len(persons) // folds) < 2:
            raise StudyError(
                f"[data.{data}] {folds} folds are impossible with {len(persons)} persons; expected at least 2 folds "
                "and in every one a person to test on, and two others to train on and to validate on"
            )
        order = np.random.default_rng(seed).permutation(len(persons))
        return [sorted(persons[index] for index in order[start::folds]) for start in range(folds)]
    given = [person for fold in folds for person in fold]
    if unknown := sorted(set(given) - set(persons)):
        raise StudyError(f"[data.{data}] folds name {unknown[0]}, who is not among its persons ({persons[0]}, ...)")
    if twice := sorted({person for person in given if given.count(person) > 1}):
        raise StudyError(f"[data.{data}] {twice[0]} is in two folds; expected every person in one")
    if lacking := sorted(set(persons) - set(given)):
        raise StudyError(f"[data.{data}] {lacking[0]} is in no fold; expected every person in one")
    if len(folds) < 2 or not all(folds) or len(persons) - max(map(len, folds)) < 2:
        raise StudyError(
            f"[data.{data}] expected at least 2 folds, none empty, and two persons outside of every fold "
            f"to train on and to validate on, got folds of {', '.join(str(len(fold)) for fold in folds)}"
        )
    return [sorted(fold) for fold in folds]


def split(
    data: str,
    subjects: Sequence[Subject],
    folds: Sequence[Sequence[str]],
    fold: int,
    *,
    validation: float,
    seed: int = 0,
) -> Split:
    """Fold number `fold` is for testing; of the other persons the share `validation` (at least one) is for decisions.

    Raises:
        StudyError: a part has no instance (or nothing else), or subjects do not fit each other.
    """
    rest = [person for number, persons in enumerate(folds) if number != fold for person in persons]
    count = min(max(1, round(validation * len(rest))), len(rest) - 1)
    order = np.random.default_rng((seed, fold)).permutation(len(rest))
    held = {rest[index] for index in order[:count]}
    test = set(folds[fold])
    parts = Split(
        [subject for subject in subjects if subject.person not in held | test],
        [subject for subject in subjects if subject.person in held],
        [subject for subject in subjects if subject.person in test],
    )
    for part in (parts.validation, parts.test):
        try:
            check_subjects(parts.train, part)
        except StudyError as error:
            raise StudyError(f"[data.{data}] fold {fold}: {error}") from error
    return parts
