"""Requests to stop: SIGINT and SIGTERM, seen by all ranks after the same step."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator

import torch

from .distributed import all_reduce_sum, world_size


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn SIGINT and SIGTERM into requests to stop, and yield a function that asks for one.

    That function returns the same answer on all ranks, which must call it at the same points. In
    a single process, a second SIGINT is handled as it was before.
    """
    received: list[int] = []
    earlier_handlers = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)
    }

    def remember(number, frame) -> None:
        earlier = earlier_handlers[number]
        if received and number == signal.SIGINT and world_size() == 1 and callable(earlier):
            earlier(number, frame)
        received.append(number)

    def stop_requested() -> bool:
        any_rank = all_reduce_sum(torch.tensor(float(bool(received))))
        return bool(any_rank.item())

    for number, handler in earlier_handlers.items():
        if handler != signal.SIG_IGN:  # A shell's background jobs ignore SIGINT.
            signal.signal(number, remember)
    try:
        yield stop_requested
    finally:
        for number, handler in earlier_handlers.items():
            signal.signal(number, handler)
