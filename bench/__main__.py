"""Command line: `python -m bench cpu|gpu|label|losses|metrics|aot [--repeats N] [--out FILE.json]`, or `docs`."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

import torch

from .timing import machine


def main() -> None:
    if sys.argv[1:2] in (["aot"], ["gpu"]):  # these have options of their own
        importlib.import_module(f".{sys.argv[1]}", __package__).main(sys.argv[2:])
        return
    if sys.argv[1:] == ["docs"]:  # the tables of the documentation, from the latest figures
        losses = importlib.import_module(".losses", __package__)
        losses.DOCS.write_text(losses.write_docs())
        return
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "name",
        choices=["cpu", "gpu", "label", "losses", "metrics", "aot"],
        help="what to measure; gpu, aot: see -h after it",
    )
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds (default 15)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--small", action="store_true", help="label, metrics: tiny inputs, to see that all of it runs")
    parser.add_argument("--panoptica", metavar="PYTHON", help="metrics: the interpreter of an environment that has it")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = importlib.import_module(f".{options.name}", __package__)
    more = {key: value for key in ("small", "panoptica") if (value := getattr(options, key))}
    result = bench.run(repeats=options.repeats, **more)
    result["machine"] = machine()
    print(", ".join(f"{key} {value}" for key, value in result["machine"].items()), end="\n\n")
    print(bench.table(result))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
