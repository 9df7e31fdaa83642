"""The trainers in the real nnU-Net: found by its own search, trained on generated images, equal to their formula.

All of it happens in one process of its own, `tests/nnunet_training.py`.
"""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from typing import Any

import pytest

from tests.test_docs import ROOT, run

pytestmark = pytest.mark.skipif(find_spec("nnunetv2") is None, reason="needs nnunetv2")

NAMES = ("ICI", "False", "Proximity", "Blob")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    work = tmp_path_factory.mktemp("nnunet")
    run(ROOT / "tests" / "nnunet_training.py", work, ROOT / "fastinstance" / "integrations" / "nnunet")
    return json.loads((work / "found.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_training(found: dict[str, Any], name: str) -> None:
    trained = found["trained"][name]
    assert trained["bases"][:3] == [f"nnUNetTrainer{name}", "nnUNetTrainerInstance", "nnUNetTrainer"]
    assert trained["change"] > 1e-3
    assert len(trained["losses"]) == 4  # training and validation of two epochs
    assert all(map(math.isfinite, trained["losses"]))
    assert trained["checkpoint"]


def test_proximity_warms_up(found: dict[str, Any]) -> None:
    switches = {name: found["trained"][name]["switches"] for name in NAMES}
    assert switches.pop("Proximity") == ["Instance terms are off: training on the pixel loss", "Instance terms are on"]
    assert not any(switches.values())


@pytest.mark.parametrize("labels", ["softmax", "regions"])
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_its_formula(found: dict[str, Any], name: str, labels: str) -> None:
    compared = found["compared"][f"{name} {labels}"]
    assert math.isclose(compared["loss"], compared["expected"], rel_tol=1e-5)
    assert math.isclose(compared["half"], compared["expected"], rel_tol=1e-2)


@pytest.mark.parametrize("labels", ["softmax", "regions"])
@pytest.mark.parametrize("name", NAMES)
def test_patches_without_annotation(found: dict[str, Any], name: str, labels: str) -> None:
    compared = found["compared"][f"{name} {labels}"]
    assert math.isfinite(compared["all ignored"])
    assert compared["its gradient"] == 0
