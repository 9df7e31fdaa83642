"""docs/losses.md says what the code does: its table is the one that a command writes."""

from __future__ import annotations

import fastinstance
from bench import losses
from fastinstance import functional


def test_the_table_is_up_to_date() -> None:
    assert losses.DOCS.read_text() == losses.write_docs(), "run `python -m bench docs`"


def test_all_losses_are_in_the_table() -> None:
    """Those that are weighted sums of others are not."""
    text = "\n".join(entry.name for entry in losses.LOSSES)
    sums = {"ICILoss", "FalseLoss", "DetectionLoss", "ProximityLoss", "InstanceLoss"}
    pixels = {"FocalLoss", "GeneralizedDiceLoss", "TverskyLoss"}  # their relatives are
    for name in fastinstance.__all__:
        assert not name.endswith("Loss") or name in text or name in sums | pixels, name
    for name in functional.InstanceTerms._fields[1:]:
        assert f"`{name}`" in text


def test_what_the_modes_are_for() -> None:
    """Zero without them and a pull with them: what the text promises."""
    found = {entry.name: losses.gradients(entry.loss) for entry in losses.LOSSES}
    rates, soft = found["`false_gt` + `false_pred`"], found['the same, `missed="soft"`']
    for error in ("missed", "false"):
        assert abs(rates[error]) < 1e-4 < soft[error]
    masked, whole = found["`instance_gt`"], found["`instance_gt`, `mask_target=False`"]
    for error in ("missed", "under-segmented"):
        assert masked[error] == 0 < whole[error]
    assert found["`ComponentMILLoss`"]["missed"] > 0
    assert all(value > 0 for value in found["`CCLoss`"].values())
