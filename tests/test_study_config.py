"""Run files: what they say, and that every mistake is one line before any work."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

import fastinstance
from fastinstance.study.config import (
    LOSSES,
    LossConfig,
    RunConfig,
    SumOfLosses,
    SwinUNETRConfig,
    UNetConfig,
    build_loss,
    named_terms,
    read_config,
    to_toml,
)
from fastinstance.study.subjects import StudyError
from fastinstance.testing import assert_close

FULL = """
[data]
source = "wmh"
folder = 'C:\\scans "1"'
[validation]
source = "wmh"
folder = "é"
[network]
name = "swinunetr"
feature_size = 12
[loss]
name = "InstanceLoss"
options = { seg = 1, instance_gt = 0.5, missed = "soft", spacing = [1.0, 2.0], pixel_loss = "dicece" }
plus = [{ name = "CCLoss", weight = 0.5, options = { average = "image" } }]
warm_up = 0.25
[training]
epochs = 3
learning_rate = 1
threads = 2
precision = "bf16"
[augmentation]
rotation = 10
flip = "horizontal"
"""


def test_a_run_file_comes_back_from_what_is_written(tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text(FULL, encoding="utf-8")
    config = read_config(path)
    assert config.data == {"source": "wmh", "folder": 'C:\\scans "1"'}
    assert config.validation == {"source": "wmh", "folder": "é"}
    assert config.network == SwinUNETRConfig(feature_size=12)
    assert config.training.learning_rate == 1.0
    assert config.training.epochs == 3
    path.write_text(config.to_toml(), encoding="utf-8")
    assert read_config(path) == config


def test_an_empty_run_file_is_the_default():
    config = RunConfig.from_table({})
    assert config == RunConfig()
    assert config.validation == 0.2
    assert config.network == UNetConfig(channels=(16, 32, 64))
    assert RunConfig.from_table(tomllib.loads(config.to_toml())) == config


def test_toml_of_odd_values():
    table = {"a": {"key with space": 'line\nbreak "and" é', "n": float("inf"), "t": [True, {"x": []}], "empty": {}}}
    assert tomllib.loads(to_toml(table)) == table


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "table": ({"lss": {}}, "unknown table lss of a run: did you mean loss?"),
    "not a table": ({"loss": 3}, "[loss]: expected a table, got 3"),
    "key": ({"training": {"epoch": 1}}, "unknown key epoch in [training]: did you mean epochs?"),
    "far key": ({"augmentation": {"qqq": 1}}, "expected one of rotation, flip, scale, shift"),
    "bool for a number": ({"training": {"epochs": True}}, "[training] epochs: expected a whole number from 1 on"),
    "fraction": ({"training": {"seed": 0.5}}, "[training] seed: expected a whole number from 0 on, got 0.5"),
    "zero": ({"training": {"learning_rate": 0}}, "[training] learning_rate: expected a number above 0, got 0"),
    "text": ({"training": {"compile": "yes"}}, "[training] compile: expected true or false, got 'yes'"),
    "share": ({"loss": {"warm_up": 2}}, "[loss] warm_up: expected a share from 0 to 1, got 2"),
    "infinite": ({"augmentation": {"scale": float("inf")}}, "[augmentation] scale: expected a number from 0 on"),
    "metric": ({"training": {"metric": "f2"}}, "got 'f2'; did you mean f1?"),
    "device": ({"training": {"device": "gpu"}}, '[training] device: expected "auto", "cpu", "cuda"'),
    "loss": ({"loss": {"name": "FalsLoss"}}, "got 'FalsLoss'; did you mean FalseLoss?"),
    "option": (
        {"loss": {"options": {"misssed": "soft"}}},
        "in [loss] options of FalseLoss: did you mean missed?",
    ),
    "option's value": ({"loss": {"options": {"missed": "x"}}}, "[loss] options of FalseLoss: "),
    "option for volumes": (
        {"loss": {"options": {"connectivity": 26}}},
        "[loss] options of FalseLoss: expected connectivity in (4, 8)",
    ),
    "option of another loss": (
        {"loss": {"name": "DiceLoss", "options": {"missed": "soft"}}},
        "unknown option missed in",
    ),
    "reserved": ({"loss": {"options": {"sigmoid": True}}}, "sigmoid is set by the training; leave it out"),
    "part": ({"loss": {"plus": [{"nam": "CCLoss"}]}}, "unknown key nam in [loss] plus: did you mean name?"),
    "parts": ({"loss": {"plus": {"name": "CCLoss"}}}, "[loss] plus: expected a list of tables"),
    "network": ({"network": {"name": "unt"}}, '[network] name: expected "unet" or "swinunetr", got \'unt\''),
    "key of another network": ({"network": {"feature_size": 12}}, "unknown key feature_size in [network]"),
    "channels": ({"network": {"channels": [4]}}, "expected a list of 2 or more whole numbers from 1 on"),
    "swin": ({"network": {"name": "swinunetr", "feature_size": 10}}, "feature_size that 12 divides"),
    "heads": ({"network": {"name": "swinunetr", "heads": [5, 6, 12, 24]}}, "[network] heads: expected divisors of"),
    "validation": ({"data": {"validation": 1}}, "[data] validation: expected a share above 0 and below 1, got 1"),
    "two validations": ({"data": {"validation": 0.2}, "validation": {}}, "got both"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name: str):
    table, text = MISTAKES[name]
    with pytest.raises(StudyError) as error:
        RunConfig.from_table(table)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, b"a = ", b"\xff", b"[loss]\nname = 3", b"[training]\nlearning_rate = inf"])
def test_unreadable_files_are_named(tmp_path: Path, content: bytes | None):
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StudyError, match=r"run\.toml: ") as error:
        read_config(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_of_the_library_can_be_trained(name: str):
    loss = build_loss(LossConfig(name=name), process_group=None)
    assert type(loss) is getattr(fastinstance, name)
    logits = torch.linspace(-3, 3, 2 * 64).view(2, 1, 8, 8).requires_grad_()
    labels = torch.zeros(2, 1, 8, 8, dtype=torch.int32)
    labels[:, :, 5:7, 2:5] = 1
    loss(logits, labels > 0, target_labels=labels, valid_mask=labels < 2).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_options_reach_the_loss():
    loss: Any = build_loss(LossConfig(name="FalseLoss", options={"false_gt": 0.25, "missed": "soft"}))
    assert loss.weights.false_gt == 0.25
    assert loss.settings.missed == "soft"


def test_sums_of_losses_and_their_terms():
    config = RunConfig.from_table(
        {
            "loss": {
                "name": "DiceCELoss",
                "weight": 2,
                "plus": [{"name": "BlobLoss", "weight": 0.5}, {"name": "CCLoss", "weight": 0.25}],
            }
        }
    )
    loss = build_loss(config.loss)
    assert isinstance(loss, SumOfLosses)
    logits = torch.randn(2, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    target = logits.roll(1, -1) > 0.8
    kinds = fastinstance.DiceCELoss, fastinstance.BlobLoss, fastinstance.CCLoss
    parts = [kind(sigmoid=True) for kind in kinds]
    expected = sum(w * part(logits, target) for w, part in zip((2, 0.5, 0.25), parts, strict=True))
    assert_close(loss(logits, target), torch.as_tensor(expected), rtol=1e-6)
    terms = named_terms(loss, logits, target)
    assert list(terms) == ["DiceCELoss DiceCELoss", "BlobLoss seg", "BlobLoss blob", "CCLoss CCLoss"]
    assert_close(torch.stack(list(terms.values())).sum(), torch.as_tensor(expected), rtol=1e-6)


PIXEL_LOSSES = {
    "DiceLoss", "DiceCELoss", "GeneralizedDiceLoss", "FocalLoss", "GeneralizedDiceFocalLoss", "TverskyLoss",
    "InverseWeightedDiceLoss",
}  # fmt: skip


def test_instance_averages_are_those_of_all_processes():
    for name in LOSSES:
        loss: Any = build_loss(LossConfig(name=name), process_group="world")
        assert (loss.settings.process_group is None) is (name in PIXEL_LOSSES), name
