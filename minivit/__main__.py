"""All commands: python -m minivit COMMAND."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from . import cli

COMMANDS = {
    "demo": (
        "tools.demo.command",
        "the whole story on drawings, without network: fine-tune, then see where attention went",
    ),
    "train": (
        "train",
        "fine-tune the last blocks on Oxford-IIIT Pet, or on your own folders of photos: train.py",
    ),
    "infer": ("infer", "name what is in photos, and draw where each block looks: infer.py"),
    "doctor": ("tools.doctor", "check a folder of photos before hours are spent on it"),
    "describe": (
        "tools.describe",
        "what a model and a data set are, and where each fact comes from",
    ),
    "score": (
        "tools.score.command",
        "does it look at the pet? its attention against masks, in numbers, before and after fine-tuning",
    ),
    "study": (
        "tools.study.command",
        "how many photos, how many blocks? accuracy over a grid of both",
    ),
    "export": ("tools.export", "write a run under the names that timm reads"),
    "selfcheck": ("tools.selfcheck", "numerical self-tests on this machine's own device"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Hand the arguments to the command's own module, which is named like it; only that one is imported."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in COMMANDS:
        return import_module(f".{COMMANDS[argv[0]][0]}", __package__).main(argv[1:])
    asked = not argv or argv[0] in ("-h", "--help")
    lines = ["usage: python -m minivit COMMAND ...; each command has --help", ""]
    lines += [f"  {name:9}  {what}" for name, (_, what) in COMMANDS.items()]
    if not asked:
        lines = [
            f"python -m minivit: no command {cli.printable(argv[0])}; expected one of {', '.join(COMMANDS)}"
        ]
    print("\n".join(lines), file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


if __name__ == "__main__":
    cli.start(main)
