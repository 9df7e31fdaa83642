"""Command line: `python -m bench NAME [--repeats N] [--out FILE.json]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from . import cpu
from .timing import machine


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("name", choices=["cpu"], help="what to measure")
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds (default 9)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--no-loop", action="store_true", help="leave the slow loop reference out")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = cpu.run(repeats=options.repeats, loop=not options.no_loop)
    result["machine"] = machine()
    print(", ".join(f"{key} {value}" for key, value in result["machine"].items()), end="\n\n")
    print(cpu.table(result))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
