"""Reading ahead and writing behind in threads, so that nothing waits for files or for copies to a device."""

from __future__ import annotations

import contextlib
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

READ_AHEAD = 16  # photos, small by then, so that a device that takes many at once never waits
Job = TypeVar("Job")
Found = TypeVar("Found")


def read_ahead(
    read: Callable[[Job], Found],
    jobs: Iterable[Job],
    workers: int,
    ahead: int | None = None,
    quiet: bool = True,
) -> Iterator[Found]:
    """Yield read(job) for each job in turn, read in threads, since Pillow lets go of the GIL, and never far ahead."""
    with (
        warnings.catch_warnings() if quiet else contextlib.nullcontext(),
        ThreadPoolExecutor(workers) as pool,
    ):
        if quiet:
            warnings.simplefilter(
                "ignore"
            )  # around all threads, since each puts back the filters that it happened to find
        reading: deque[Future[Found]] = deque()
        try:
            for job in jobs:
                reading.append(pool.submit(read, job))
                if len(reading) > 2 * workers + (READ_AHEAD if ahead is None else ahead):
                    yield reading.popleft().result()
            while reading:
                yield reading.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def write_behind() -> Iterator[Callable[..., None]]:
    """Yield what does a job, (function, *args), in a thread, after the job before it; what that one raised is raised then."""
    with ThreadPoolExecutor(1) as pool:
        writing: list[Future[None]] = []

        def begin(write: Callable[..., None], *args: object) -> None:
            while writing:
                writing.pop().result()
            writing.append(pool.submit(write, *args))

        yield begin
        while writing:
            writing.pop().result()
