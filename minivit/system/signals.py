"""Requests to stop: SIGINT and SIGTERM, seen by all processes of a run at the same step."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator

import torch

from .distributed import total, world


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """While this lasts, SIGINT and SIGTERM end nothing: the function it yields says, to all processes alike, if one came.

    All processes must call it at the same points. Alone, a second SIGINT does what the first would have done before.
    """
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number, frame) -> None:
        earlier = before[number]
        if came and number == signal.SIGINT and world() == 1 and callable(earlier):
            earlier(number, frame)
        came.append(number)

    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # as for a shell's background jobs
            signal.signal(number, note)
    try:
        yield lambda: bool(total(torch.tensor(float(bool(came)))).item())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
