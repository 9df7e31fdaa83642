"""Scenes drawn by Hypothesis, a comparison that says where, and `check_loss` for a loss of your own.

Needs Hypothesis (`pip install "fastinstance[test]"`). Nothing else in the package imports this module, and it
imports nothing else of the package: a checker must not share code with what it checks.

    from fastinstance.testing import check_loss
    check_loss(my_loss)                          # my_loss(input, target) -> scalar, on logits

    from hypothesis import given
    from fastinstance.testing import scenes

    @given(scenes(dims=(2,)))
    def test_mine(scene): ...
"""

from .comparison import assert_close
from .properties import PROPERTIES, check_loss
from .strategies import FLOATS, LAYOUTS, PATTERNS, Scene, masks, pattern, scenes, with_layout

__all__ = [
    "FLOATS",
    "LAYOUTS",
    "PATTERNS",
    "PROPERTIES",
    "Scene",
    "assert_close",
    "check_loss",
    "masks",
    "pattern",
    "scenes",
    "with_layout",
]
