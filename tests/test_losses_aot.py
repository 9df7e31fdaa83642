"""The device functions of the losses compile for both makers, without a GPU, and keep everything in registers."""

from __future__ import annotations

from typing import Any

import pytest
import triton
from triton.compiler import ASTSource

from bench import aot
from fastinstance.pixel import Dice, Focal, GeneralizedDice, InverseWeightedDice, WeightedSum
from tests.loss_kernels import of_channels, of_pixels, of_planes

FORM = WeightedSum(((0.5, GeneralizedDice()), (1.0, Focal()), (2.0, Dice()), (1.0, InverseWeightedDice()))).form.numbers
PIXELS = {"GAMMA": 2.0, "BLOCK": 128}
PLANES = {"FORM": FORM, "BLOCK": 128}
KERNELS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "logits": (of_pixels, "*fp32", {"LOGITS": True, **PIXELS}),
    "logits, any power": (of_pixels, "*fp32", {"LOGITS": True, **PIXELS, "GAMMA": 2.5}),
    "probabilities": (of_pixels, "*fp32", {"LOGITS": False, **PIXELS}),
    "float64": (of_pixels, "*fp64", {"LOGITS": True, **PIXELS, "GAMMA": 2.5}),
    "planes": (of_planes, "*fp64", PLANES),
    "channels": (of_channels, "*fp64", {"CATEGORICAL": True, **PLANES}),
}


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("name", KERNELS)
def test_compiles(name: str, target: str) -> None:
    kernel, kind, constants = KERNELS[name]
    types = {"target": "*u8", "n": "i32", "images": "i32", "C": "i32"} | dict.fromkeys(constants, "constexpr")
    signature = {argument: types.get(argument, kind) for argument in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs=constants)
    compiled = triton.compile(source, target=aot.TARGETS[target], options={"num_warps": 4})
    resources = (aot.amd_resources if target == "gfx942" else aot.nvidia_resources)(compiled)
    assert resources["spills"] == 0
    assert resources["registers"] <= 128
    assert resources["shared bytes"] == 0
