"""The trainers in the real nnU-Net: found by its own search, trained on generated images, equal to their formula.

All of it happens in one process of its own, `tests/nnunet_training.py`.
"""

from __future__ import annotations

import json
import math
import os
import re
from importlib.util import find_spec
from typing import Any

import pytest

from tests.test_docs import ROOT, blocks, run

pytestmark = pytest.mark.skipif(find_spec("nnunetv2") is None, reason="needs nnunetv2")

NAMES = ("ICI", "False", "Proximity", "Blob")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """With the trainers where docs/integrations.md says that they are, and its example of one's own beside them."""
    work, own = tmp_path_factory.mktemp("nnunet"), tmp_path_factory.mktemp("own")
    (command,) = blocks("integrations.md", "bash")
    match = re.match(r'export nnUNet_extTrainer=\$\(python -c "(.*?)"\)(\S+)\n', command)
    assert match
    (own / "my_trainers.py").write_text(blocks("integrations.md")[1])
    trainers = run("-c", match[1]).strip() + match[2]
    run(ROOT / "tests" / "nnunet_training.py", work, os.pathsep.join((trainers, str(own))))
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


def test_a_trainer_of_ones_own(found: dict[str, Any]) -> None:
    for part in ("InstanceLoss(instance_gt=1, instance_pred=1, false_pred=0.5, ", "process_group='world'"):
        assert part in found["own"]
