"""The command line: `fastinstance demo | evaluate | rank | ensemble | overlay | train | study`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from fastinstance import __version__
from fastinstance.arguments import add_commands, add_study, add_train, whole

DEMO_LOSSES = ("detection", "false", "ici", "proximity", "blob", "instance")
DEMO_PACKAGES = ("monai", "nilearn", "nibabel", "scipy", "matplotlib", "tqdm")  # the extra `demo`
INTERRUPTED = 130  # what a shell reports after Ctrl-C


class _Parser(argparse.ArgumentParser):
    """Reports a bad argument in one line, without the usage text around it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (try {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; each sets `run`, which takes the parsed arguments and gives the exit code."""
    parser = _Parser(
        prog="fastinstance", description="Instance-level segmentation losses and metrics.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"fastinstance {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        allow_abbrev=False,
        help="train with and without an instance loss on generated brain lesions, and compare",
        description=(
            "Trains a small U-Net on generated brain lesions twice, with the pixel loss alone and with an instance "
            "loss, compares what they find, lesion by lesion, and draws it. Two to three minutes on two cores."
        ),
    )
    demo.add_argument(
        "--loss", choices=DEMO_LOSSES, default=DEMO_LOSSES[0], help="the instance loss (default: %(default)s)"
    )
    demo.add_argument("--quick", action="store_true", help="a few seconds, to see that it works; too short to learn")
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("demo"),
        metavar="DIR",
        help="folder for overlay.png and results.csv (default: %(default)s)",
    )
    demo.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of data and training (default: 0)")
    demo.add_argument(
        "--subjects", type=whole(1), nargs=2, metavar=("TRAIN", "TEST"), help="number of subjects (default: 12 6)"
    )
    demo.add_argument("--steps", type=whole(1), metavar="N", help="training steps of each loss (default: 600)")
    demo.add_argument(
        "--threads",
        type=whole(1),
        default=2,
        metavar="N",
        help="CPU threads; the last digits of the results depend on it (default: %(default)s)",
    )
    demo.set_defaults(run=_demo)
    add_commands(commands)
    add_train(commands)
    add_study(commands)
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    missing = [name for name in DEMO_PACKAGES if find_spec(name) is None]
    if missing:
        return _fail(f"the demo needs {', '.join(missing)}: pip install 'fastinstance[demo]'")

    import torch

    from fastinstance.study import demo

    torch.set_num_threads(arguments.threads)
    settings = demo.QUICK if arguments.quick else demo.DemoSettings()
    settings = dataclasses.replace(settings, loss=arguments.loss, out=arguments.out, seed=arguments.seed)
    if arguments.subjects is not None:
        train, test = arguments.subjects
        settings = dataclasses.replace(settings, train_subjects=train, test_subjects=test)
    if arguments.steps is not None:
        settings = dataclasses.replace(settings, steps=arguments.steps)
    try:
        demo.run(settings)
    except demo.DemoError as error:
        return _fail(str(error))
    return 0


def _fail(message: str) -> int:
    print(f"fastinstance: error: {message}", file=sys.stderr)
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    0; 1 for a failure, 2 for bad arguments, 3 where pairs of files were skipped, 130 after Ctrl-C.
    """
    try:
        arguments = build_parser().parse_args(argv)
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("fastinstance: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone; nothing is left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, ImportError) as error:  # a full disk, a damaged package
        return _fail(str(error))


if __name__ == "__main__":
    sys.exit(main())
