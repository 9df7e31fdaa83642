"""How many lines of the package a call executes: the same for few instances and many, if nothing loops over them."""

import sys
from collections.abc import Callable
from typing import Any


def lines_executed(run: Callable[[], object]) -> int:
    lines = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal lines
        if "fastinstance" not in frame.f_code.co_filename:
            return None
        lines += event == "line"
        return trace

    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(None)
    return lines
