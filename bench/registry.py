"""All suites by name; a suite is a module whose `cases(setting)` gives its cases."""

from __future__ import annotations

import importlib

from .case import Case, Setting

__all__ = ["SUITES", "cases", "suites_for"]

SUITES = {
    "cpu": "all terms on the CPU, beside MONAI's GDF and the loop reference",
    "gpu": "all terms on a GPU: eager, as CUDA graphs, and kernel by kernel",
    "label": "connected components, beside other labellers",
    "losses": "every loss on its own, beside MONAI's",
    "metrics": "instance-level metrics, beside panoptica and the loop reference",
    "table3": "the losses of the paper's Table 3 in all implementations (the paper's figures are those of their kind)",
    "loop": "steps of `fastinstance train` with their batches, beside the network and the loss on a batch at hand",
    "training": "training steps of two networks with every loss",
    "scaling": "time against instances, pixels and planes",
}


def cases(suite: str, setting: Setting) -> list[Case]:
    """The cases of a suite."""
    return importlib.import_module(f".{suite}", __package__).cases(setting)


def suites_for(device: str) -> list[str]:
    """What `all` means on this device."""
    return [name for name in SUITES if name != ("gpu" if device == "cpu" else "cpu")]
