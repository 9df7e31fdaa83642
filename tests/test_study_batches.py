"""What a step sees: augmentation, batches, networks of any size; and how a validation is scored."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from fastinstance.study.augment import Augmentation, Batch, Changes
from fastinstance.study.batches import Batches, check_subjects, fingerprint, split
from fastinstance.study.config import AugmentationConfig, SwinUNETRConfig, TrainingConfig, UNetConfig
from fastinstance.study.evaluation import mean_scores, numbered, predict, scores
from fastinstance.study.networks import build_network
from fastinstance.study.subjects import StudyError, Subject
from fastinstance.testing import assert_close
from tests.scans import scan

CPU = torch.device("cpu")
EVERYTHING = AugmentationConfig(rotation=25, flip="both", scale=0.1, shift=0.1)


def changes(count: int, **given: Any) -> Changes:
    """None, but for those given."""
    none = {"angles": 0, "horizontal": False, "vertical": False, "gains": 1, "shifts": 0}
    kinds = {"horizontal": bool, "vertical": bool}
    return Changes(**{k: np.full(count, given.get(k, v), kinds.get(k, np.float32)) for k, v in none.items()})


def batch_of(subject: Subject) -> Batch:
    valid = None if subject.valid is None else subject.valid[:, None]
    return Batch(subject.image.transpose(0, 1), subject.labels[:, None], valid)


def test_a_quarter_turn_moves_every_pixel_of_all_images():
    subject = scan(0, size=(21, 21), channels=2, valid=torch.rand(4, 21, 21) > 0.3)
    before = batch_of(subject)
    after = Augmentation(AugmentationConfig(rotation=90))(before, changes(4, angles=90))
    assert_close(after.images, before.images.rot90(1, (-2, -1)), atol=1e-4)
    assert torch.equal(after.labels, before.labels.rot90(1, (-2, -1)))
    assert after.valid is not None
    assert before.valid is not None
    assert torch.equal(after.valid, before.valid.rot90(1, (-2, -1)))


@pytest.mark.parametrize(("flip", "axis"), [("horizontal", -1), ("vertical", -2)])
def test_flips(flip: str, axis: int):
    before = batch_of(scan(1, channels=2))
    augmentation = Augmentation(AugmentationConfig(flip=flip))
    after = augmentation(before, changes(4, **{flip: [True, False, True, False]}))
    for old, new in zip(before[:2], after[:2], strict=True):
        assert torch.equal(new[::2], old.flip(axis)[::2])
        assert torch.equal(new[1::2], old[1::2])
    assert after.valid is None


def test_labels_follow_the_image_at_any_angle():
    subject = scan(2, size=(64, 48))
    before = batch_of(subject)._replace(images=subject.target[:, None].float())
    after = Augmentation(EVERYTHING)(before, changes(4, angles=[-25, 13, 160, 2], vertical=True, horizontal=True))
    seen, true = after.images > 0.5, after.labels > 0
    assert float((seen & true).sum() / (seen | true).sum()) > 0.85
    assert after.labels.dtype == torch.int32


def test_instances_keep_their_ids():
    """Also where a turn tears a thin one apart, or lets two touch; ids are not mixed by interpolation."""
    labels = torch.zeros(1, 1, 33, 33, dtype=torch.int32)
    labels[0, 0, 3:28, 6], labels[0, 0, 3:28, 8] = 7, 2_000_003  # annotated, one pixel between them
    labels[0, 0, 20, 10:30] = 11
    turned = Augmentation(EVERYTHING)
    torn = False
    for angle in range(-25, 26, 5):
        after = turned(Batch(torch.zeros(1, 1, 33, 33), labels, None), changes(1, angles=angle))
        assert set(after.labels.unique().tolist()) == {0, 7, 11, 2_000_003}
        torn |= ndimage.label(after.labels[0, 0].numpy() == 7)[1] > 1
    assert torn  # otherwise this test would say nothing


def test_what_is_turned_in_from_outside_does_not_count():
    before = Batch(torch.randn(1, 1, 32, 32), torch.ones(1, 1, 32, 32, dtype=torch.int32), None)
    after = Augmentation(EVERYTHING)(before, changes(1, angles=45))
    assert after.valid is not None
    assert torch.equal(after.valid, after.labels > 0)
    assert not after.valid[0, 0, 0, 0]
    assert 0.75 < after.valid.float().mean() < 0.9  # an octagon: 0.83
    assert after.images.isfinite().all()


def test_intensities():
    before = batch_of(scan(3, channels=2))
    augmentation = Augmentation(AugmentationConfig(scale=0.2, shift=0.1))
    after = augmentation(before, changes(4, gains=[1, 2, 0.5, 1], shifts=[0, 1, 0, -3]))
    expected = torch.stack([before.images[0], 2 * before.images[1] + 1, before.images[2] / 2, before.images[3] - 3])
    assert_close(after.images, expected, rtol=1e-6)
    assert after.labels is before.labels


def test_what_is_drawn():
    drawn = Augmentation(EVERYTHING).draw(np.random.default_rng(0), 4000)
    assert abs(drawn.angles).max() <= 25
    assert abs(drawn.angles).max() > 24.9
    for coins in (drawn.horizontal, drawn.vertical):
        assert 0.45 < coins.mean() < 0.55
    assert drawn.gains.mean() == pytest.approx(1, abs=0.01)
    assert drawn.gains.std() == pytest.approx(0.1, abs=0.01)
    assert drawn.shifts.std() == pytest.approx(0.1, abs=0.01)
    none = Augmentation(AugmentationConfig()).draw(np.random.default_rng(0), 4)
    assert [one.tolist() for one in none] == [one.tolist() for one in changes(4)]


def test_kornia_is_asked_for_only_where_it_is_needed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fastinstance.study.augment.find_spec", lambda _: None)
    Augmentation(AugmentationConfig(scale=0.1))
    with pytest.raises(StudyError, match="needs kornia: pip install"):
        Augmentation(EVERYTHING)


def batches(subjects: list[Subject], augmentation: AugmentationConfig | None = None, **settings: Any) -> Batches:
    return Batches(subjects, TrainingConfig(**settings), Augmentation(augmentation or AugmentationConfig()), CPU)


def owners(batches: Batches, step: int) -> list[int]:
    """The subject of each slice of a step."""
    return [next(i for i, own in enumerate(batches.slices) if s in own) for s in batches.chosen(step)]


def test_every_subject_once_a_round_in_an_order_of_its_own():
    found = batches([scan(i) for i in range(5)], subjects_per_batch=2, slices_per_subject=1)
    assert found.steps_per_epoch == 3
    seen = [owner for step in range(10) for owner in owners(found, step)]
    rounds = [seen[i : i + 5] for i in range(0, 20, 5)]
    assert all(sorted(one) == list(range(5)) for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1


def test_slices_of_a_subject_differ_until_it_has_no_more():
    found = batches([scan(0, 3), scan(1, 5)], subjects_per_batch=2, slices_per_subject=24)
    assert found.size == 10  # no subject has more than five
    drawn = found.chosen(0)
    for own in found.slices:
        counts = np.bincount(drawn[np.isin(drawn, own)] - own[0], minlength=len(own))
        assert counts.sum() == 5
        assert counts.max() - counts.min() <= 1
    assert not np.array_equal(drawn, found.chosen(1))


def test_slices_with_instances_only():
    subjects = [scan(0), scan(1), scan(2, target=torch.zeros(4, 32, 24).bool(), labels=torch.zeros(4, 32, 24).int())]
    found = batches(subjects, subjects_per_batch=1, slices_per_subject=2, with_lesions=True)
    assert found.steps_per_epoch == 2
    for step in range(6):
        assert found.draw(step).labels.flatten(1).any(1).all()


def test_a_step_is_drawn_from_its_number_and_ranks_share_it():
    subjects = [scan(i) for i in range(3)]
    first, second = (batches(subjects, EVERYTHING, slices_per_subject=3) for _ in range(2))
    for step in (5, 0):
        whole = first.draw(step)
        parts = [second.draw(step, rank, 2) for rank in range(2)]
        for name in Batch._fields:
            assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))
    other = batches(subjects, EVERYTHING, slices_per_subject=3, seed=1)
    assert not torch.equal(other.draw(5).images, first.draw(5).images)


def test_slices_of_several_sizes_are_continued_and_not_valid_there():
    valid = torch.rand(4, 16, 24) > 0.2
    small, large = scan(0, size=(16, 24), valid=valid), scan(1, size=(32, 20))
    found = batches([small, large], subjects_per_batch=2, slices_per_subject=4)
    images, labels, known = found.batch
    assert images.shape == (8, 1, 32, 24)
    assert known is not None
    assert torch.equal(images[:4, 0, :16], small.image[0])
    assert torch.equal(images[:4, 0, 16:], small.image[0][:, 15:16].expand(-1, 16, -1))
    assert torch.equal(known[:4, 0, :16], valid)
    assert torch.equal(labels[:4, 0, :16], small.labels * valid)
    assert not known[:4, 0, 16:].any()
    assert torch.equal(known[4:, 0], torch.arange(24).expand(4, 32, 24) < 20)
    assert batches([scan(0), scan(1)]).batch.valid is None


EMPTY = {"target": torch.zeros(4, 32, 24).bool(), "labels": torch.zeros(4, 32, 24).int()}
FULL = {"target": torch.ones(4, 32, 24).bool(), "labels": torch.ones(4, 32, 24).int()}
BAD: dict[str, tuple[list[Subject], list[Subject], str]] = {
    "nothing": ([], [scan(1)], "at least one subject for training, got none"),
    "no validation": ([scan(0)], [], "at least one subject for validation, got none"),
    "empty": ([scan(0, **EMPTY)], [scan(1)], "instances in the training subjects, got none: every mask is empty"),
    "empty validation": ([scan(0)], [scan(1, **EMPTY)], "instances in the validation subjects"),
    "full": ([scan(0, **FULL)], [scan(1)], "background in the training subjects"),
    "one person": ([scan(0)], [scan(1, person="person-0")], "got person-0 in both"),
    "channels": ([scan(0)], [scan(1, channels=2)], "expected 1 channels as scan-0 has, got 2 of scan-1"),
    "NaN": ([scan(0)], [scan(1, image=torch.full((1, 4, 32, 24), math.nan))], "scan-1: expected finite intensities"),
    "labels": ([scan(0, labels=EMPTY["labels"])], [scan(1)], "scan-0: expected labels above 0 on the target"),
}


@pytest.mark.parametrize("name", BAD)
def test_subjects_that_cannot_be_used(name: str):
    train, validation, text = BAD[name]
    with pytest.raises(StudyError, match=text):
        check_subjects(train, validation)


def test_persons_stay_on_one_side():
    subjects = [scan(10 * person + visit, person=f"p{person}") for person in range(10) for visit in range(3)]
    train, validation = split(subjects, 0.2, seed=0)
    assert len(validation) == 6
    assert {s.person for s in train} | {s.person for s in validation} == {f"p{person}" for person in range(10)}
    check_subjects(train, validation)
    assert split(subjects, 0.2, seed=1)[1] != validation
    assert len(split(subjects, 0.001, seed=0)[1]) == 3
    assert len(split(subjects, 0.999, seed=0)[0]) == 3
    with pytest.raises(StudyError, match="at least two persons"):
        split(subjects[:3], 0.2, seed=0)


def test_the_fingerprint_changes_with_everything_that_is_trained_on():
    subject = scan(0)
    image = subject.image.clone()
    image[0, 0, 0, 0] += 1e-3
    others = [
        scan(0, name="x"),
        scan(0, person="x"),
        scan(0, image=image),
        scan(0, labels=2 * subject.labels),
        scan(0, valid=subject.target),
    ]
    prints = [fingerprint([one], [scan(1)]) for one in (subject, *others)]
    prints += [fingerprint([], [subject, scan(1)]), fingerprint([subject, scan(1)], [])]
    assert len(set(prints)) == len(prints)
    assert fingerprint([scan(0)], [scan(1)]) == prints[0]


@pytest.mark.parametrize("config", [UNetConfig(channels=(4, 8, 16)), SwinUNETRConfig(feature_size=12)])
def test_networks_take_slices_of_any_size(config: UNetConfig | SwinUNETRConfig):
    network = build_network(config, 2)
    for size in ((1, 1), (4, 4), (33, 20), (64, 64)):
        assert network(torch.randn(2, 2, *size)).shape == (2, 1, *size)


def test_slices_are_continued_by_their_last_rows_and_columns():
    network = build_network(UNetConfig(channels=(4, 8)), 1)
    images = torch.randn(1, 1, 33, 20)
    padded = torch.cat([images, images[:, :, -1:]], 2)
    assert torch.equal(network(images), network.network(padded)[:, :, :33])
    assert torch.equal(network(padded), network.network(padded))


def test_networks_are_the_same_for_the_same_seed():
    state = torch.get_rng_state()
    one, same, other = (build_network(UNetConfig(channels=(4, 8)), 1, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    weights = [torch.cat([p.flatten() for p in network.parameters()]) for network in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "monai.networks.nets.unet", None)
    with pytest.raises(StudyError, match=r"the network unet needs monai.*pip install 'fastinstance\[study\]'"):
        build_network(UNetConfig(), 1)


def test_predictions_are_those_of_the_network():
    network = build_network(UNetConfig(channels=(4, 8), dropout=0.5), 2)
    subject = scan(0, 5, size=(30, 22), channels=2)
    found = predict(network, subject.image, batch=2)
    network.eval()
    with torch.no_grad():
        expected = torch.cat([network(subject.image[:, z][None]) for z in range(5)])[:, 0].sigmoid()
    assert found.dtype == torch.float32
    assert_close(found, expected, atol=1e-6)
    assert_close(predict(network, subject.image, precision="bf16"), expected, atol=0.05)


def literal(subject: Subject, predicted: NDArray[np.bool_], min_size: int) -> dict[str, float]:
    """Slice by slice, instance by instance."""
    valid = np.ones(predicted.shape, bool) if subject.valid is None else subject.valid.numpy()
    counts = dict.fromkeys(("true", "found", "predicted", "hit", "shared", "pixels"), 0)
    for labels, mask, known in zip(subject.labels.numpy(), predicted, valid, strict=True):
        found, number = ndimage.label(mask & known, np.ones((3, 3)))
        true = [(labels == i) & known for i in np.unique(labels[labels > 0])]
        pred = [found == i for i in range(1, number + 1)]
        true, pred = ([one for one in side if one.sum() >= max(1, min_size)] for side in (true, pred))
        t, p = (np.any([*side, np.zeros_like(known)], axis=0) for side in (true, pred))
        counts["true"] += len(true)
        counts["predicted"] += len(pred)
        counts["found"] += sum(bool((one & p).any()) for one in true)
        counts["hit"] += sum(bool((one & t).any()) for one in pred)
        counts["shared"] += int((t & p).sum())
        counts["pixels"] += int(t.sum() + p.sum())
    sensitivity, precision = counts["found"] / counts["true"], counts["hit"] / counts["predicted"]
    return {
        "dice": 2 * counts["shared"] / counts["pixels"],
        "sensitivity": sensitivity,
        "precision": precision,
        "f1": 2 * sensitivity * precision / (sensitivity + precision),
    }


@pytest.mark.parametrize("min_size", [0, 4])
@pytest.mark.parametrize("number", range(4))
def test_scores_are_those_of_instances_in_slices(number: int, min_size: int):
    subject = scan(number)
    chance = torch.Generator().manual_seed(number)
    if number == 1:
        subject = dataclasses.replace(subject, valid=torch.rand(4, 32, 24, generator=chance) > 0.1)
    if number == 2:  # annotated ids that touch
        labels = (torch.arange(24).expand(4, 32, 24) // 5 + 1).int() * subject.target
        subject = dataclasses.replace(subject, labels=labels)
    probability = torch.where(subject.target, 0.8, 0.2) + 0.35 * torch.randn(4, 32, 24, generator=chance)
    found = scores(subject, probability, threshold=0.6, min_size=min_size)
    expected = literal(subject, (probability >= 0.6).numpy(), min_size)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert 0 < found["panoptic_quality"] <= 1


def test_scores_without_anything_to_count_are_left_out_of_means():
    empty = scores(scan(0, **EMPTY), torch.zeros(4, 32, 24))
    assert all(math.isnan(value) for value in empty.values())
    missed = scores(scan(0), torch.zeros(4, 32, 24))
    assert missed["f1"] == missed["sensitivity"] == missed["dice"] == 0
    assert math.isnan(missed["precision"])
    perfect = scores(scan(0), scan(0).target.float())
    assert set(perfect.values()) == {1.0}
    mean = mean_scores([empty, missed, perfect])
    assert mean["f1"] == 0.5
    assert mean["precision"] == 1.0
    assert math.isnan(mean_scores([empty])["f1"])


def test_numbers_that_no_two_slices_share():
    labels = torch.tensor([[[0, 1, 2]], [[0, 0, 0]], [[3, 0, 1]]], dtype=torch.int32)
    found: Tensor = numbered(labels)
    assert found.tolist() == [[[0, 1, 2]], [[0, 0, 0]], [[5, 0, 3]]]
