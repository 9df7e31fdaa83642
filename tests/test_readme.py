"""What the README shows must run."""

import re
from pathlib import Path

import pytest
import torch

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS, ids=[f"block {n}" for n in range(len(BLOCKS))])
def test_the_readme_runs(code: str) -> None:
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), {})


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 2
