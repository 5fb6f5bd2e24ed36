"""What SIGINT and SIGTERM do: they end a program at once, or a training run after its step.

Python runs signal handlers in the main thread only, and only between two instructions of Python's.
A thread therefore ends the program in case the main thread is waiting inside a call of torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from .files import remove_unfinished

SIGNALS: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM)
if sys.platform == "win32":
    SIGNALS += (signal.SIGBREAK,)  # Ctrl-Break, and what other programs end a console's with
# Seconds that the main thread has to run the handler of a signal.
HANDLER_LIMIT = 0.5
# Seconds until a run must have seen a request to stop, unless its steps take longer.
STEP_LIMIT = 1.5
# The same while several ranks evaluate, when none of them asks. torchrun kills them after 30 s.
EVALUATION_LIMIT = 15.0

_ending_thread: int | None = None
_run: StopRequests | None = None  # the requests that the run under way has received


def end_now(*_: object) -> None:
    """End this process at once, with one line, exit code 130 and no half-written file.

    This is a handler of signals. It does not raise KeyboardInterrupt, which torch swallows while
    it imports numpy and Python swallows in callbacks.
    """
    global _ending_thread
    if _ending_thread == threading.get_ident():
        return  # A second signal came while the first was being handled.
    if _ending_thread is not None:
        time.sleep(60)  # Another thread is about to end the process.
    _ending_thread = threading.get_ident()
    try:
        remove_unfinished()
        os.write(2, b"\ninterrupted\n")
        remove_unfinished()  # Another thread may have begun a file in the meantime.
    finally:  # even if the reader of stderr was interrupted first
        os._exit(130)


def end_on_signals() -> None:
    """Let SIGINT and SIGTERM end this program, whatever its main thread is doing."""
    for number in SIGNALS:
        # A shell's background job ignores SIGINT, and goes on doing so.
        if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
            signal.signal(number, end_now)
    reader, writer = os.pipe()
    if sys.platform != "win32":  # Windows neither asks for that nor, before Python 3.12, has it.
        os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()


def _watch(reader: int) -> None:
    """Follow each signal, whose number Python writes into a pipe as soon as it comes."""
    while True:
        (number,) = os.read(reader, 1)
        threading.Thread(target=_enforce, args=(number,), daemon=True).start()


def _enforce(number: int) -> None:
    """End the process if the main thread has not followed a signal in time."""
    time.sleep(HANDLER_LIMIT)
    handler = signal.getsignal(number)
    if handler is end_now:
        end_now(number, None)
    run = getattr(handler, "__self__", None)
    if isinstance(run, StopRequests):
        run.wait_until_seen()


class StopRequested(Exception):
    """A run is left in the middle of a step or of an evaluation, because a stop was requested."""


class StopRequests:
    """The requests to stop that a run has received; call it to ask whether there is one.

    All ranks get the same answer, and must ask at the same points.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self.is_seen = False
        self.is_over = False
        self.is_evaluating = False  # together with other ranks
        self.earlier_handlers = {number: signal.getsignal(number) for number in SIGNALS}
        self.asked_at: float | None = None
        self.longest_step = 0.0  # seconds between two questions

    def __call__(self) -> bool:
        import torch

        from .distributed import all_reduce_sum

        self._measure_step()
        any_rank = all_reduce_sum(torch.tensor(float(bool(self.received))))
        self.is_seen = bool(any_rank.item())
        return self.is_seen

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Remember a signal; in a single process, a second SIGINT is handled as it was before."""
        earlier = self.earlier_handlers[signal.Signals(number)]
        if self.received and number == signal.SIGINT and callable(earlier):
            from .distributed import world_size  # This imports torch.

            if world_size() == 1:
                earlier(number, frame)
        self.received.append(number)

    def stop_here(self) -> None:
        """Raise StopRequested if a stop was requested, unless other ranks would not notice."""
        from .distributed import world_size

        self._measure_step()
        if self.received and world_size() == 1:
            self.is_seen = True
            raise StopRequested

    def _measure_step(self) -> None:
        now = time.monotonic()
        if self.asked_at is not None:
            self.longest_step = max(self.longest_step, now - self.asked_at)
        self.asked_at = now

    def wait_until_seen(self) -> None:
        """End the process if the run does not ask for a request within two steps or so.

        It may be waiting for a rank that has died. What was saved last stays.
        """
        received = time.monotonic() - HANDLER_LIMIT
        while not (self.is_seen or self.is_over):
            limit = max(STEP_LIMIT, 3 * self.longest_step)
            if self.is_evaluating:
                limit = EVALUATION_LIMIT
            if time.monotonic() > received + limit:
                end_now()
            time.sleep(0.02)


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn SIGINT and SIGTERM into requests to stop, and yield a function that asks for one.

    That function returns the same answer on all ranks, which must call it at the same points. In
    between, stop_here() raises StopRequested. A signal that comes after the last question is
    handled at the end as it was before.
    """
    global _run
    requests = StopRequests()
    with _handling_signals(requests.handle):
        _run = requests
        try:
            yield requests
        finally:
            _run = None
            requests.is_over = True
    if requests.received and not requests.is_seen:
        signal.raise_signal(requests.received[0])


def stop_here() -> None:
    """Leave a run, by raising StopRequested, if it is alone and was asked to stop.

    This is called wherever a long computation can be left without harm. With several ranks, or
    without a run, it does nothing.
    """
    if _run is not None:
        _run.stop_here()


@contextlib.contextmanager
def during_evaluation() -> Iterator[None]:
    """Give a run of several ranks the time that an evaluation takes, to follow a request.

    A run that is alone calls stop_here() meanwhile.
    """
    from .distributed import world_size

    run = _run
    if run is None or world_size() == 1:
        yield
        return
    run.is_evaluating = True
    try:
        yield
    finally:
        run.is_evaluating = False
        run.asked_at = None  # An evaluation is no step.


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Ignore SIGINT and SIGTERM while a run that is about to end is saved."""

    def ignore(*_: object) -> None:
        pass

    with _handling_signals(ignore):
        yield


@contextlib.contextmanager
def _handling_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle SIGINT and SIGTERM in this way, and afterwards as before."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Only the main thread can do that.
        return
    earlier_handlers = {number: signal.getsignal(number) for number in SIGNALS}
    for number, earlier in earlier_handlers.items():
        # A shell's background jobs ignore SIGINT. None stands for a handler in C, which could not
        # be restored.
        if earlier not in (signal.SIG_IGN, None):
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in earlier_handlers.items():
            if earlier is not None:
                signal.signal(number, earlier)
