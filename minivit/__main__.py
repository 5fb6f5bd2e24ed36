"""Run any of minivit's commands: python -m minivit COMMAND."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pkgutil import resolve_name

from . import cli

# Each command's function, and what --help says about it.
COMMANDS = {
    "demo": (
        "minivit.tools.demo.command:main",
        "fine-tune on drawn animals and show how attention moved; needs no network",
    ),
    "train": (
        "minivit.commands:train",
        "fine-tune the last blocks on Oxford-IIIT Pet or on your own photos, like train.py",
    ),
    "infer": (
        "minivit.commands:infer",
        "name what is in photos and draw where each block looks, like infer.py",
    ),
    "doctor": (
        "minivit.tools.doctor:main",
        "check a folder of photos before you spend hours on training",
    ),
    "describe": (
        "minivit.tools.describe:main",
        "describe a model and a data set, and say where each fact comes from",
    ),
    "score": (
        "minivit.tools.score.command:main",
        "measure how much of the attention is on the pet, before and after fine-tuning",
    ),
    "drop": (
        "minivit.tools.drop.command:main",
        "leave the pet or the background out, and see whether the answer stays",
    ),
    "review": (
        "minivit.tools.review.command:main",
        "find the photos that a run gets wrong and the labels that are hard to believe",
    ),
    "study": (
        "minivit.tools.study.command:main",
        "compare accuracies over numbers of photos and of trained blocks",
    ),
    "serve": (
        "minivit.tools.serve.command:main",
        "serve a page to drop a photo on, with its names and where the model looks",
    ),
    "export": (
        "minivit.tools.export:main",
        "write a run's weights under the names that timm reads",
    ),
    "selfcheck": (
        "minivit.tools.selfcheck.command:main",
        "check the numerics of training and attention on this machine",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names with the others, and return its exit code.

    Only that command's module is imported.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m minivit COMMAND ...; each command has --help\n")
        for name, (_, summary) in COMMANDS.items():
            print(f"  {name:9}  {summary}")
        return 0
    name, *flags = argv
    if name not in COMMANDS:
        expected = ", ".join(COMMANDS)
        print(
            f"python -m minivit: no command {cli.printable(name)}; expected one of {expected}",
            file=sys.stderr,
        )
        return 2
    function, _ = COMMANDS[name]
    return resolve_name(function)(flags)


if __name__ == "__main__":
    cli.start(main)
