"""What the command lines share: their flags in common, and how they end. Imports nothing slow."""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from .errors import UserError, printable
from .system.files import unfinished

BASE_MODEL = "google/vit-base-patch16-224"
RUN_DIR = "runs/pets"
LR, WEIGHT_DECAY, STORE_GIB, MIN_STEPS = (
    1e-4,
    0.05,
    32.0,
    60,
)  # of train.py and study; fewer steps teach little


class Parser(argparse.ArgumentParser):
    """argparse that shows defaults in --help and says what is wrong in one line."""

    def __init__(self, command: str, **kwargs) -> None:
        script = Path(sys.argv[0]).name
        prog = (
            script
            if script in (f"{command}.py", f"minivit-{command}")
            else f"python -m minivit {command}"
        )
        super().__init__(
            prog=prog, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {printable(message)}; see {self.prog} --help\n")

    def add_device_flags(self) -> None:
        self.add_argument(
            "--device",
            default="auto",
            help="auto, cpu, mps, cuda or cuda:N; auto takes a GPU if there is one",
        )
        self.add_argument(
            "--amp",
            choices=("auto", "bf16", "fp16", "off"),
            default="auto",
            help="precision; auto: bf16 where the device is good at it, fp16 on older GPUs, else float32 (off)",
        )

    def add_workers(self, what: str) -> None:
        self.add_argument("--workers", type=at_least(1), default=cores(), help=what)


def cores() -> int:
    """Return how many cores this process may use: fewer than there are under Slurm, taskset or Docker's --cpuset-cpus."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_model(asked: str | None) -> str:
    """Return the model asked for, else the last run's, else the base."""
    return asked or (RUN_DIR if Path(RUN_DIR, "config.json").exists() else BASE_MODEL)


def at_least(low: int) -> Callable[[str], int]:
    """Return an argparse type: a whole number of at least `low`."""

    def parse(text: str) -> int:
        if not text.lstrip("-").isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least {low}, found {text!r}"
            )
        return int(text)

    return parse


def positive(text: str) -> float:
    """An argparse type: a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")
    return value


def between(low: float, high: float) -> Callable[[str], float]:
    """Return an argparse type: a number from `low` to `high`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"expected a number from {low:g} to {high:g}, found {text!r}"
            )
        return value

    return parse


def image_size(text: str) -> tuple[int, int]:
    """An argparse type: pixels as 384, or height x width as 384x512."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and 0 < int(side) <= 65_536 for side in sides):
        raise argparse.ArgumentTypeError(
            f"expected pixels as 384, or height x width as 384x512, found {text!r}"
        )
    return int(sides[0]), int(sides[-1])


def parse_blocks(text: str, depth: int) -> list[int]:
    """Read a range of blocks, 0-based and inclusive: `8-11`, `10,11`, `all`, `none`."""
    if text in ("all", "none"):
        return list(range(depth)) if text == "all" else []
    blocks: set[int] = set()
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise UserError(
                f"blocks {text!r}: expected numbers and ranges as 8-11 or 10,11, or all, or none"
            )
        if int(last) >= depth:
            raise UserError(f"blocks {text!r}: this model has blocks 0 to {depth - 1}")
        blocks.update(range(int(first), int(last) + 1))
    return sorted(blocks)


def run(
    job: Callable[[argparse.Namespace], int], parser: Parser, argv: Sequence[str] | None
) -> int:
    """Parse, do the job, and return its exit code: what a user can mend ends in one line and 2, an interrupt in 130."""
    args = parser.parse_args(argv)
    try:
        code = job(args)
        print(end="", flush=True)
        return code
    except UserError as error:
        message = str(error)
    except BrokenPipeError:  # who read our output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is still to be flushed
        return 141  # as programs end that do not handle SIGPIPE
    except OSError as error:  # a full disk, a folder that cannot be written, a file that vanished
        message = (
            f"{error.filename}: {error.strerror}"
            if error.filename and error.strerror
            else str(error)
        )
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
            raise
        message = f"out of device memory: {str(error).partition('. ')[0]}; free some, or try smaller batches or fewer blocks"
    except KeyboardInterrupt:
        print(f"\n{parser.prog}: interrupted", file=sys.stderr)
        return 130
    print(f"{parser.prog}: {printable(message)}", file=sys.stderr)
    return 2


def start(main: Callable[[], int]) -> NoReturn:
    """Run main as a script: from here on Ctrl-C (and SIGTERM) ends it at once, with one line, exit code 130 and no half file.

    Not by KeyboardInterrupt, which torch swallows while it imports numpy, and Python inside of callbacks.
    """

    def stop(*_) -> NoReturn:
        try:
            for path in unfinished:
                path.unlink(missing_ok=True)
            os.write(2, b"\ninterrupted\n")
        finally:  # even if stderr's reader was interrupted first
            os._exit(130)

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # an old terminal's encoding lacks what names may hold
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) in (
            signal.default_int_handler,
            signal.SIG_DFL,
        ):  # else ignored, as in the background
            signal.signal(number, stop)
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is written
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError):  # nobody reads on
            stream.flush()
    os._exit(
        code or 0
    )  # taking torch down takes time, and now and then aborts, which torchrun takes for a failure
