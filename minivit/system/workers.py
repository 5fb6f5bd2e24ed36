"""Work in processes of their own, which need not import torch: threads would wait for each other at Python's lock."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path

from ..errors import UserError

MUCH = (
    16 * 2**20
)  # bytes of photos, from which on it takes longer to decode them than to start processes
LEAST = 2**14  # bytes: what a photo takes that is smaller, as it too is opened and resized


def worth_starting(paths: Sequence[Path], workers: int) -> int:
    """Return how many processes to decode photos in: none if that is done sooner, and never one for fewer than eight."""
    sizes = (
        max(LEAST, path.stat().st_size if path.is_file() else 0) for path in paths
    )  # asked for until they are enough
    return (
        min(workers, len(paths) // 8)
        if any(total >= MUCH for total in itertools.accumulate(sizes))
        else 0
    )


@contextlib.contextmanager
def working(processes: int, module: str) -> Iterator[Callable[..., Callable[[], object]]]:
    """Yield what begins a job, (function, *args, **kwargs), and returns what waits for its result; with 0, done right here.

    The processes import the module while they have nothing else to do. Not too many jobs may be begun before they are waited
    for: what is sent to and fro must fit into pipes. Raises UserError if a process is killed.
    """
    if not processes:
        yield lambda job, *args, **kwargs: (lambda result: lambda: result)(job(*args, **kwargs))
        return
    own, pipes = (
        multiprocessing.get_context("spawn"),
        [],
    )  # a fork would inherit the model's threads, held
    with contextlib.ExitStack() as at_end:
        for _ in range(processes):
            ours, theirs = own.Pipe()
            process = own.Process(target=work_for, args=(theirs, module), daemon=True)
            process.start()
            theirs.close()
            at_end.callback(process.join)
            pipes.append(
                at_end.enter_context(ours)
            )  # closed before it is waited for: so the process ends
        turn = itertools.cycle(pipes)

        def begin(job: Callable, *args, **kwargs) -> Callable[[], object]:
            pipe = next(turn)
            with noticing_its_end():
                pipe.send((job, args, kwargs))

            def wait() -> object:
                with noticing_its_end():
                    result, error = pipe.recv()  # a process answers in the order of its jobs
                if error is not None:
                    raise error
                return result

            return wait

        yield begin


@contextlib.contextmanager
def noticing_its_end() -> Iterator[None]:
    try:
        yield
    except (EOFError, ConnectionError):
        raise UserError(
            "a process at work was killed; if memory ran out, try fewer --workers"
        ) from None


def in_turn(
    begin: Callable[..., Callable[[], object]], jobs: Iterable[tuple], ahead: int
) -> Iterator:
    """Yield what (function, *args) give, in their order, so many begun ahead."""
    waiting: deque[Callable[[], object]] = deque()
    for job in jobs:
        waiting.append(begin(*job))
        if len(waiting) > ahead:
            yield waiting.popleft()()
    while waiting:
        yield waiting.popleft()()


def work_for(pipe: Connection, module: str) -> None:
    """Do what another process sends, and answer (result, None) or (None, exception), until that process closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for that process to handle
    import_module(module)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            job, args, kwargs = pipe.recv()
            try:
                answer: tuple[object, Exception | None] = job(*args, **kwargs), None
            except Exception as error:
                answer = None, error
            pipe.send(answer)
    os._exit(
        0
    )  # all is answered, and Python's own end takes half a second where processes are many


def call(module: str, function: str, *args, **kwargs) -> object:
    """Call a module's function: a job whose module only the process that does it need import."""
    return getattr(import_module(module), function)(*args, **kwargs)
