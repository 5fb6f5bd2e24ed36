"""What torchrun told this process about itself and the others. Nothing here imports torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UserError, printable

# torchrun sets all of these, and LOCAL_RANK besides.
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """What torchrun told this process."""

    rank: int
    world_size: int
    local_rank: str | None  # the number of this process's GPU
    address: str  # the machine of rank 0
    port: int

    @property
    def place(self) -> str:
        return f"{self.address}:{self.port}"


def launch() -> Launch | None:
    """Return what torchrun told this process, or None if torchrun did not start it.

    Variables that an earlier job left in the shell must not change a result, so they count only if
    all are set. If only some are, they are ignored, with a line on stderr. Raises UserError for
    values that torchrun cannot have set.
    """
    values = {name: os.environ.get(name, "") for name in VARIABLES}
    local_rank = os.environ.get("LOCAL_RANK") or None
    given = [name for name, value in values.items() if value]
    missing = [name for name, value in values.items() if not value]
    if local_rank is not None:
        given.append("LOCAL_RANK")
    if missing:
        if given:
            say_once(
                f"{join_names(given)} set without {join_names(missing)}: ignored, because "
                "torchrun sets all of them"
            )
        return None
    num_processes = _whole_number("WORLD_SIZE", values["WORLD_SIZE"], 1, 1_000_000)
    own_rank = _whole_number("RANK", values["RANK"], 0, num_processes - 1)
    if local_rank is not None:
        _whole_number("LOCAL_RANK", local_rank, 0, num_processes - 1)
    port = _whole_number("MASTER_PORT", values["MASTER_PORT"], 1, 65535)
    return Launch(own_rank, num_processes, local_rank, values["MASTER_ADDR"], port)


def _whole_number(name: str, text: str, low: int, high: int) -> int:
    if not (text.isascii() and text.isdecimal() and low <= int(text) <= high):
        raise UserError(
            f"{name}={printable(text)}: expected a whole number from {low} to {high}; start with "
            f"torchrun, or unset {join_names(VARIABLES)}"
        )
    return int(text)


def join_names(names: Sequence[str]) -> str:
    """Return names as "A, B and C"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


_said: set[str] = set()


def say_once(message: str) -> None:
    """Print a line on stderr, unless it has been printed before."""
    if message not in _said:
        _said.add(message)
        print(message, file=sys.stderr, flush=True)


def launched_rank() -> int:
    """Return the rank that torchrun gave to this process, before it has joined the others."""
    launched = launch()
    return 0 if launched is None else launched.rank


def launched_world_size() -> int:
    """Return how many processes torchrun started."""
    launched = launch()
    return 1 if launched is None else launched.world_size
