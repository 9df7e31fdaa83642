"""Benchmarks: measure suites into results files, and read those."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from . import results
from .case import Setting
from .registry import SUITES, suites_for
from .timing import CLOCKS

ROOT = results.ROOT
PEERS = ("instance-loss", "blob_loss", "panoptica")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--small", action="store_true", help="tiny inputs, to see that all of it runs; not kept")
    common.add_argument("--only", default="", help="cases whose name has this")
    common.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    common.add_argument("--repeats", type=int, help="samples of each run (default 15, on a GPU 50)")
    common.add_argument("--seconds", type=float, help="of samples a case, after the fifth (default 20, on a GPU 8)")
    common.add_argument("--slow-seconds", type=float, default=20, help="of a slow peer's step (default 20)")
    common.add_argument("--case-seconds", type=float, default=300, help="of a case (default 300)")
    common.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: processor time, where others use the machine too"
    )
    common.add_argument("--deadline", type=float, default=3600, help="seconds after which no case begins")
    common.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a clone of the authors' instance-loss or blob_loss, or an interpreter that has panoptica",
    )
    common.add_argument("--trace", type=Path, help="a folder for profiler traces, on a GPU")
    common.add_argument(
        "--out", type=Path, help="results file to write or add to (default bench/results/DEVICE-DATE.json)"
    )
    for name, what in SUITES.items():
        commands.add_parser(name, parents=[common], help=what, description=what)
    commands.add_parser("all", parents=[common], help="all suites of this device, and aot")
    aot = commands.add_parser("aot", parents=[common], help="what the compiled kernels need, without a GPU")
    aot.add_argument("--target", action="append", help="sm_80, sm_90, sm_100, gfx942 (default: all of them)")

    aot.add_argument("--report", action="store_true", help="only the table of bench/NOTES.md, of sm_90")

    compare = commands.add_parser("compare", help="fail if figures of B are worse than those of A")
    compare.add_argument("old", type=Path, metavar="A.json")
    compare.add_argument("new", type=Path, metavar="B.json")
    compare.add_argument("--tolerance", type=float, default=0.15, help="what counts as worse (default 0.15: 15 %%)")
    report = commands.add_parser("report", help="tables and plots of results files")
    report.add_argument("files", type=Path, nargs="+", metavar="FILE.json")
    report.add_argument("--plots", type=Path, help="a folder for PNG files")
    commands.add_parser("docs", help="write the figures of the losses into docs/losses.md")
    readme = commands.add_parser(
        "readme", help="write the figures of the newest results files into README.md and docs/figures.md"
    )
    readme.add_argument("--check", action="store_true", help="only fail if they are not up to date")
    return parser


def _measure(options: argparse.Namespace) -> None:
    from . import runner

    torch.set_num_threads(options.threads)
    names = [options.command]
    if options.command == "all":
        names = [*suites_for("cuda" if torch.cuda.is_available() else "cpu"), "aot"]
    peers = dict(peer.split("=", 1) for peer in options.peer)
    if unknown := peers.keys() - set(PEERS):
        raise ValueError(f"expected --peer NAME=PATH with a name of {PEERS}, got {sorted(unknown)}")
    if options.trace is not None:
        options.trace.mkdir(parents=True, exist_ok=True)
    for name in names:
        device = "cuda" if torch.cuda.is_available() and name not in ("cpu", "aot") else "cpu"
        out = options.out or (None if options.small else results.default_path(device))
        if name == "aot":
            from . import aot

            suite = aot.run(getattr(options, "target", None))
        else:
            repeats = options.repeats or (50 if device == "cuda" else 15)
            seconds = options.seconds or (8 if device == "cuda" else 20)
            suite = runner.run(
                name,
                Setting(device, options.small, peers),
                runner.Limits(
                    repeats, seconds, options.slow_seconds, options.case_seconds, options.deadline, options.clock
                ),
                only=options.only,
                memory=not options.small,
                trace=options.trace,
                save=lambda suite, name=name, out=out: results.save(out, name, suite) if out else None,
            )
        if out:
            results.save(out, name, suite)
        from .report import markdown

        print("\n" + markdown({"suites": {name: suite}}))


def main(argv: list[str] | None = None) -> int:
    """Run a command; the result is the exit status."""
    options = _parser().parse_args(argv)
    try:
        if options.command == "compare":
            old, new = (results.load(path) for path in (options.old, options.new))
            lines, regressions = results.compare(old, new, tolerance=options.tolerance)
            print("\n".join(lines))
            print(f"\n{len(regressions)} of {len(lines)} worse by more than {options.tolerance:.0%}")
            print(*regressions, sep="\n")
            return bool(regressions)
        if options.command == "report":
            from .report import markdown

            for path in options.files:
                print(markdown(results.load(path)))
                if options.plots:
                    from .plots import draw

                    print(*draw(results.load(path), options.plots, f"{path.stem}-"), sep="\n")
        elif options.command == "docs":
            from . import losses

            losses.DOCS.write_text(losses.write_docs())
        elif options.command == "readme":
            from .report import PAGES, filled

            for page, block in PAGES.items():
                text = (ROOT / page).read_text()
                wanted = filled(text, block(results.newest()))
                if options.check and wanted != text:
                    raise ValueError(f"{page} lacks the figures of the newest results; run `python -m bench readme`")
                if not options.check:
                    (ROOT / page).write_text(wanted)
        elif options.command == "aot" and options.report:
            from .aot import report

            print(report())
        else:
            _measure(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
