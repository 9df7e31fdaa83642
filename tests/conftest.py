"""Hypothesis profiles: "ci" (the default, the same examples every time) and "night" (many, random).

Choose with `--hypothesis-profile=night` or the environment variable HYPOTHESIS_PROFILE. Tests take their
number of examples from the profile: `settings().max_examples`, or a fraction of it.
"""

import os

import torch
from hypothesis import HealthCheck, settings

# How long an example takes says nothing on a shared machine.
settings.register_profile(
    "ci",
    max_examples=30,
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("night", settings.get_profile("ci"), derandomize=False, max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

torch.set_num_threads(2)
