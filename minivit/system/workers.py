"""Work beside the main thread: worker processes, reading ahead in threads, writing behind.

Workers are separate processes because Python threads would wait for each other at the global
interpreter lock. They import only the module that their jobs need, which is never torch.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import NoReturn, TypeVar

from ..errors import UserError
from .files import remove_unfinished

Item = TypeVar("Item")
Result = TypeVar("Result")

# From this many bytes of photos on, decoding takes longer than starting worker processes.
WORTH_STARTING_BYTES = 16 * 2**20
# A smaller photo counts as this many bytes, because it too has to be opened and resized.
LEAST_PHOTO_BYTES = 2**14
# Windows waits for no more at a time.
MAX_PROCESSES_ON_WINDOWS = 61
# Small photos that are read ahead, so that a device that takes many at once never waits.
READ_AHEAD = 16


def processes_worth_starting(paths: Sequence[Path], workers: int) -> int:
    """Return how many worker processes to decode photos in.

    The answer is 0 where this process is done before workers would have started, and never more
    than one worker for every eight photos.
    """
    sizes = (_file_size(path) for path in paths)
    # accumulate() is lazy: sizes are read from the disk only until they are enough.
    is_much = any(total >= WORTH_STARTING_BYTES for total in itertools.accumulate(sizes))
    return min(workers, len(paths) // 8) if is_much else 0


def _file_size(path: Path) -> int:
    try:
        return max(LEAST_PHOTO_BYTES, path.stat().st_size)
    except OSError:  # The photo has vanished; whoever decodes it will say so.
        return LEAST_PHOTO_BYTES


@contextlib.contextmanager
def worker_pool(num_processes: int, module: str) -> Iterator[Executor]:
    """Yield an executor with `num_processes` worker processes; with 0, jobs run in this process.

    Workers import `module` as soon as they start. They leave Ctrl-C to this process, and they end
    when it ends, even if it is killed. Raises UserError if a worker is killed.
    """
    if num_processes == 0:
        yield InlineExecutor()
        return
    _start_resource_tracker()
    # A forked process would inherit torch's threads with their locks held.
    context = multiprocessing.get_context("spawn")
    if sys.platform == "win32":
        num_processes = min(num_processes, MAX_PROCESSES_ON_WINDOWS)
    pool = ProcessPoolExecutor(num_processes, context, _start_worker, (module,))
    try:
        with _starting_processes():
            for _ in range(num_processes):
                pool.submit(_do_nothing)  # The pool starts a process for each job until it is full.
        yield pool
    except BrokenProcessPool:
        message = "a worker process was killed; if memory ran out, try fewer --workers"
        raise UserError(message) from None
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    # All jobs are done. Workers that exit take half a second, for which nobody needs to wait.
    pool.shutdown(wait=False)


@contextlib.contextmanager
def silent_process(function: Callable[..., object], *args: object) -> Iterator[BaseProcess]:
    """Run function(*args) in a process of its own, which ends with the context at the latest.

    It may have workers itself. Nothing that it prints or raises is shown. It leaves Ctrl-C to this
    process, and it ends when this one ends, even if that is killed.
    """
    _start_resource_tracker()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_run_silently, args=(function, *args))
    with _starting_processes():
        process.start()
    try:
        yield process
    finally:
        process.terminate()
        process.join()


def _run_silently(function: Callable[..., object], *args: object) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # Workers inherit them, and may end before they have wholly started.
        os.dup2(nowhere, stream)
    _follow_parent()
    try:
        function(*args)
    finally:
        os._exit(0)  # Its workers end when it ends. A normal exit might wait for them forever.


@contextlib.contextmanager
def _starting_processes() -> Iterator[None]:
    """Hide the main module, and block Ctrl-C, from processes that are started meanwhile.

    They would run a user's script again from its beginning, although they need nothing of it, and
    a script that comes from stdin or a notebook cannot be run again. Ctrl-C reaches all processes
    of a terminal. Each ignores it as soon as it runs our code, but before that it would end with a
    traceback. What is blocked here is blocked in a new process, too.
    """
    main_module = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    if sys.platform != "win32":
        blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        if sys.platform != "win32":
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)
        sys.modules["__main__"] = main_module


class InlineExecutor(Executor):
    """An executor that runs each job at once, in the calling thread."""

    def submit(self, function: Callable[..., Result], /, *args, **kwargs) -> Future[Result]:
        future: Future[Result] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def _start_worker(module: str) -> None:
    _follow_parent()
    # A module that cannot be imported is the first job's to report: an error here would look as if
    # the worker had been killed.
    with contextlib.suppress(Exception):
        import_module(module)


def _follow_parent() -> None:
    """Let this process end when its parent ends, and leave Ctrl-C to that one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _exit_at_once)
    if sys.platform == "win32":
        signal.signal(signal.SIGBREAK, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """End this worker when its parent ends: a pool's own workers would wait for jobs forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        _exit_at_once()


def _exit_at_once(*_) -> NoReturn:
    try:
        remove_unfinished()
    finally:
        os._exit(1)


def _do_nothing() -> None:
    pass


def _start_resource_tracker() -> None:
    """Start Python's resource tracker, which cleans up after this process, without a word.

    If this process ends at once, as on Ctrl-C, the tracker removes the semaphores of the pool.
    It would also print a warning about them, below the one line that was meant to be the last.
    """
    silence = "ignore:resource_tracker:UserWarning"
    filters = os.environ.get("PYTHONWARNINGS", "")
    if silence not in filters:
        os.environ["PYTHONWARNINGS"] = f"{filters},{silence}" if filters else silence
    if sys.platform != "win32":
        from multiprocessing import resource_tracker

        # Python would start it with the first process, and unblock Ctrl-C behind it.
        resource_tracker.ensure_running()


def map_ahead(
    executor: Executor, function: Callable[..., Result], jobs: Iterable[tuple], ahead: int
) -> Iterator[Result]:
    """Yield function(*job) for each job in order, while the next `ahead` jobs are under way."""
    pending: deque[Future[Result]] = deque()
    try:
        for job in jobs:
            pending.append(executor.submit(function, *job))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def read_ahead(
    read: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """Yield read(item) for each item in order, read in threads and never far ahead.

    Threads do for photos, because Pillow releases the interpreter lock while it decodes.
    """
    # Warning filters belong to the whole process. If each thread changed and restored them, one
    # thread would restore what another had set; so they are changed once, around all threads.
    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:
        warnings.simplefilter("ignore")
        jobs = ((item,) for item in items)
        yield from map_ahead(pool, read, jobs, ahead=2 * workers + READ_AHEAD)


@contextlib.contextmanager
def write_behind() -> Iterator[Callable[..., Future]]:
    """Yield a function write_later(write, *args) that calls write(*args) in a thread.

    It first waits for the call before, raises what that one raised, and returns a Future.
    """
    with ThreadPoolExecutor(1) as pool:
        pending: Future | None = None

        def write_later(write: Callable[..., object], *args: object) -> Future:
            nonlocal pending
            if pending is not None:
                pending.result()
            pending = pool.submit(write, *args)
            return pending

        yield write_later
        if pending is not None:
            pending.result()
