"""What all command lines share: flags in common, types of flags, and how a command ends.

Nothing slow is imported here.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from .errors import UserError, printable
from .settings import AUTO, BASE_MODEL, RUN_DIR
from .system.cores import cores
from .system.home import ensure_home
from .system.signals import end_on_signals


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show the default of each flag that has one; other flags say in words what is done."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == AUTO:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports what is wrong in one line and knows the shared flags."""

    def __init__(self, command: str, **kwargs) -> None:
        prog = Path(sys.argv[0]).name
        if prog not in (f"{command}.py", f"minivit-{command}"):
            prog = f"python -m minivit {command}"
        super().__init__(prog=prog, formatter_class=HelpFormatter, **kwargs)

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
            help="precision; auto is bf16 where the device is good at it, fp16 on older GPUs, "
            "else float32 (off)",
        )

    def add_workers(self, what: str) -> None:
        self.add_argument("--workers", type=at_least(1), default=cores(), help=what)

    def add_model_flags(self, compare: str) -> None:
        """Add --model and --compare, whose help is `compare`."""
        self.add_argument(
            "--model",
            metavar="ID|DIR|demo",
            help=f"as in train.py; without it, {RUN_DIR} if it exists, else {BASE_MODEL}",
        )
        self.add_argument("--compare", metavar="BASE", help=compare)

    def add_measuring_flags(self, command: str) -> None:
        """Add the flags that score and drop share; `command` is the one of the two."""
        self.add_model_flags("the model before fine-tuning, which is measured too")
        self.add_argument(
            "--data",
            default="data",
            metavar="DIR",
            help="the folder of Oxford-IIIT Pet with its annotations, or class folders with masks/",
        )
        self.add_device_flags()
        self.add_workers("processes that decode photos")
        self.add_argument(
            "--out",
            type=folder,
            default=command,
            metavar="DIR",
            help=f"the folder for {command}.csv, {command}.json, {command}.png and the gallery",
        )


def default_model(model: str | None) -> str:
    """Return the model that was asked for, else the last run if there is one, else the base."""
    if model:
        return model
    return RUN_DIR if Path(RUN_DIR, "config.json").exists() else BASE_MODEL


def folder(text: str) -> str:
    """Parse an argument: a folder. The shell leaves `~` alone in the middle of --out=~/run."""
    return os.path.expanduser(text)


def at_least(low: int) -> Callable[[str], int]:
    """Return an argparse type: a whole number of at least `low`."""

    def parse(text: str) -> int:
        if not text.lstrip("-").isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least {low}, found {text!r}"
            )
        return int(text)

    return parse


def views(text: str) -> int:
    """Parse an argument: a number of views, or auto."""
    return AUTO if text == "auto" else at_least(0)(text)


def positive(text: str) -> float:
    """Parse an argument: a number above 0."""
    number = _number(text)
    if number is None or not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")
    return number


def between(low: float, high: float) -> Callable[[str], float]:
    """Return an argparse type: a number from `low` to `high`."""

    def parse(text: str) -> float:
        number = _number(text)
        if number is None or not low <= number <= high:
            raise argparse.ArgumentTypeError(
                f"expected a number from {low:g} to {high:g}, found {text!r}"
            )
        return number

    return parse


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def image_size(text: str) -> tuple[int, int]:
    """Parse an argument: pixels as 384, or height x width as 384x512."""
    sides = text.lower().split("x")
    sound = all(side.isdecimal() and 0 < int(side) <= 65_536 for side in sides)
    if len(sides) > 2 or not sound:
        raise argparse.ArgumentTypeError(
            f"expected pixels as 384, or height x width as 384x512, found {text!r}"
        )
    return int(sides[0]), int(sides[-1])


def pixel(text: str) -> tuple[float, float]:
    """Parse an argument: X,Y in a photo's pixels."""
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected X,Y as 250,130, found {text!r}") from None
    return x, y


def parse_blocks(text: str, depth: int) -> list[int]:
    """Parse a range of blocks, counted from 0 and inclusive: `8-11`, `10,11`, `all`, `none`.

    Raises UserError for anything else, and for blocks that a model of `depth` blocks lacks.
    """
    if text == "all":
        return list(range(depth))
    if text == "none":
        return []
    blocks: set[int] = set()
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not dash:
            last = first
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
    """Parse the flags, do the job, and return its exit code.

    What a user can mend ends in one line and exit code 2, an interrupt in 130. Nothing ends the
    interpreter: the caller may be a program or a notebook that goes on.
    """
    with _escaping_output():
        try:
            args = _parse(parser, argv)
        except SystemExit as ended:  # argparse ends --help and mistakes like this.
            return 2 if ended.code else 0
        return _do(job, args, parser)


def _parse(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if value == "":  # Path would take it for the working directory.
            parser.error(
                f"argument --{name.replace('_', '-')}: expected a value, found an empty one; "
                "is a variable of the shell not set?"
            )
    return args


def _do(job: Callable[[argparse.Namespace], int], args: argparse.Namespace, parser: Parser) -> int:
    """Do the job and return its exit code, after a line on stderr if it failed."""
    try:
        ensure_home()
        code = job(args)
        print(end="", flush=True)
        return code
    except UserError as error:
        message = str(error)
    except OSError as error:  # A full disk, a folder that is read-only, a file that vanished.
        if _is_broken_pipe(error):
            # The program that reads our output has seen enough, as `head` does. The exit code is
            # that of programs that SIGPIPE ends.
            return 141
        message = str(error)
        if error.filename and error.strerror:
            message = f"{error.filename}: {error.strerror}"
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; torch is not imported here.
            raise
        reason = str(error).partition(". ")[0]
        message = (
            f"out of device memory: {reason}; free some, or try smaller batches or fewer blocks"
        )
    except KeyboardInterrupt:
        print(f"\n{parser.prog}: interrupted", file=sys.stderr)
        return 130
    print(f"{parser.prog}: {printable(message)}", file=sys.stderr)
    return 2


def _is_broken_pipe(error: OSError) -> bool:
    """Return whether nobody reads our output any more.

    Windows calls that an invalid argument, of no file.
    """
    if isinstance(error, BrokenPipeError):
        return True
    return sys.platform == "win32" and error.errno == errno.EINVAL and not error.filename


@contextlib.contextmanager
def _escaping_output() -> Iterator[None]:
    """Print as escapes what the encoding of a terminal lacks, such as names in Chinese.

    stderr does so by itself.
    """
    stream = sys.stdout
    if not isinstance(stream, io.TextIOWrapper):
        yield
        return
    errors = stream.errors
    stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Nobody reads on.
            stream.reconfigure(errors=errors)


def start(main: Callable[[], int]) -> None:
    """Run main as a program, which ends with its exit code.

    Ctrl-C and SIGTERM end it at once. In a notebook or an interactive session, main is only
    called: the session goes on, and its signal handlers are left alone. Nothing is raised for a
    job that failed, which has said why, because SystemExit would end some sessions.
    """
    if _is_part_of_a_session():
        main()
        return
    _open_standard_streams()
    end_on_signals()
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Everything is written.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # Nobody reads on.
            stream.flush()
    # A normal exit takes torch down, which takes time and now and then aborts; torchrun would
    # take that for a failure.
    os._exit(code or 0)


def _is_part_of_a_session() -> bool:
    """Return whether this process goes on after the command, as a notebook's kernel does."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    return hasattr(sys, "ps1") or bool(sys.flags.interactive) or not in_main_thread


def _open_standard_streams() -> None:
    """Make sure that stdin, stdout and stderr are open, as `>&-` in a shell does not.

    Otherwise the first files that are opened would take their places, and get what is printed.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # The lowest free number is taken.
            os.set_inheritable(number, True)  # Workers need them, too.
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
