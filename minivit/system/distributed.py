"""Training in several processes: torchrun starts them, on the GPUs of one machine or of many.

In a single process, every function here is the identity. Photos are dealt out in turn: of n
photos, rank r of W has r, r + W, r + 2W, ...
Shapes: n photos, C classes.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from ..errors import UserError, printable
from .launch import VARIABLES, Launch, join_names, launch, say_once

Result = TypeVar("Result")

# How long a process waits for the others to start, in seconds.
START_LIMIT = 300.0
# How long a process that is done waits for others that finish no photo, in seconds.
SILENCE_LIMIT = 1800.0
# How long ranks wait for what rank 0 does alone, such as a download. If rank 0 ends they notice at
# once, so this is for a machine that vanishes.
RANK_0_LIMIT = datetime.timedelta(hours=12)
# A wait of more than so many seconds is announced.
ANNOUNCE_AFTER = 1.0
POLL_EVERY = 0.05


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_device(name: str) -> str:
    """Return the name of this process's device: torchrun gives each process a GPU of its own."""
    launched = launch()
    if launched is None or launched.local_rank is None:
        return name
    if name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    return f"cuda:{launched.local_rank}"


# Where the processes of a job tell each other how far they are; None for a single process.
_store: dist.Store | None = None
# All ranks, for waits of up to RANK_0_LIMIT.
_patient_group: Any = None


def join_others() -> None:
    """Wait until all processes that torchrun started are there; a single process does not wait.

    Raises UserError if they have not come within START_LIMIT seconds.
    """
    global _store
    launched = launch()
    if launched is None or launched.world_size == 1:
        return
    _check_address(launched)
    deadline = time.monotonic() + START_LIMIT
    message = _waiting_for(launched.world_size - 1, launched)
    try:
        if _is_server(launched):
            store: dist.Store = dist.TCPStore(
                launched.address,
                launched.port,
                launched.world_size,
                is_master=True,
                wait_for_workers=False,
                multi_tenant=True,
            )
        else:
            _wait(lambda: _answers(launched), message, deadline)
            store, _, _ = next(rendezvous("env://"))
    except RuntimeError as error:  # torch raises it for whatever goes wrong on the network.
        raise UserError(
            f"{launched.place}: cannot join the other processes ({_reason(error)})"
        ) from error
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # All processes are on this machine, so all of them count restarts alike. A restart must
        # not find the addresses that were stored before it.
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT")
        store = dist.PrefixStore(f"start {restarts}", store)
    store.add("come", 1)
    _wait(lambda: store.add("come", 0) >= launched.world_size, message, deadline)
    _store = store


def _is_server(launched: Launch) -> bool:
    """Return whether the other processes connect to this one: under torchrun, they do to that."""
    return launched.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _check_address(launched: Launch) -> None:
    """Raise UserError if there is no such machine, or if another program has the port."""
    unset = f"to run one process alone, unset {join_names(VARIABLES)}"
    try:
        socket.getaddrinfo(launched.address, launched.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"MASTER_ADDR={printable(launched.address)}: no such machine ({error}); {unset}"
        ) from error
    if _is_server(launched):
        try:
            socket.create_server(("", launched.port)).close()
        except OSError as error:
            raise UserError(
                f"MASTER_PORT={launched.port}: cannot be used ({error.strerror}); choose another "
                f"port; {unset}"
            ) from error


def _answers(launched: Launch) -> bool:
    """Return whether the process to connect to is there."""
    try:
        socket.create_connection((launched.address, launched.port), timeout=1).close()
    except OSError:
        return False
    return True


def _waiting_for(count: int, launched: Launch) -> str:
    """Return the words in which a wait for `count` processes is announced."""
    processes = "process" if count == 1 else "processes"
    return f"waiting for {count} other {processes} at {launched.place}"


def _wait(is_over: Callable[[], bool], message: str, deadline: float) -> None:
    """Poll until a wait is over, and print the message if it is not short.

    Ctrl-C and SIGTERM end it at once, as no call of torch would let them. Raises UserError at the
    deadline, a time of time.monotonic().
    """
    announce_at = time.monotonic() + ANNOUNCE_AFTER
    while not is_over():
        now = time.monotonic()
        if now > announce_at:
            say_once(message)
        if now > deadline:
            raise UserError(
                f"{message}: gave up after {START_LIMIT / 60:g} minutes; start them, or to run one "
                f"process alone, unset {join_names(VARIABLES)}"
            )
        time.sleep(POLL_EVERY)


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Set up the process group if torchrun started this process; else do nothing.

    Inside the context, only rank 0 prints. The group is taken down when the context ends.
    """
    launched = launch()
    join_others()
    if launched is None or launched.world_size == 1:
        yield
        return
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend, store=_store, rank=launched.rank, world_size=launched.world_size
    )
    global _patient_group
    _patient_group = dist.new_group(backend="gloo", timeout=RANK_0_LIMIT)
    with contextlib.ExitStack() as silence:
        if launched.rank != 0:
            devnull = silence.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            silence.enter_context(contextlib.redirect_stdout(devnull))
            silence.enter_context(contextlib.redirect_stderr(devnull))
        try:
            yield
        except RuntimeError as error:
            if not _lies_with_others(error):
                raise
            raise UserError(
                f"another process has ended or cannot be reached ({_reason(error)}); what was "
                "saved last stays, and --resume goes on"
            ) from error
    # This is not reached after an error: torch 2.6 may wait for the other processes forever.
    dist.destroy_process_group()


def _reason(error: RuntimeError) -> str:
    """Return the first sentence of an error of torch's, without its place in the sources."""
    sentence = str(error).partition("\n")[0].partition(". ")[0]
    return printable(re.sub(r"^\[\S*:\d+\] ", "", sentence))


def _lies_with_others(error: RuntimeError) -> bool:
    """Return whether an error of torch's is that the connection to another process is lost."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def on_rank_0(compute: Callable[[], Result]) -> Result:
    """Run a function on rank 0 and return its result on all ranks.

    If it raises UserError or OSError, rank 0 raises that error and the other ranks exit with 2.
    """
    if world_size() == 1:
        return compute()
    outcome: list = [None, None]  # the result and the error
    if rank() == 0:
        try:
            outcome[0] = compute()
        except (UserError, OSError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, device=torch.device("cpu"), group=_patient_group)
    result, failure = outcome
    if failure is None:
        return result
    if rank() == 0:
        raise failure
    # torchrun ends all processes as soon as one has ended, and rank 0 must have printed its line.
    time.sleep(5)
    sys.exit(2)


def report_progress() -> None:
    """Tell the other processes that this one is at work: it has finished a photo."""
    if _store is not None:
        # Without rank 0 or torchrun there is nobody to tell.
        with contextlib.suppress(RuntimeError):
            _store.add("progress", 1)


def wait_for_all_ranks() -> None:
    """Wait until every process gets here.

    torchrun ends all processes as soon as one exits with an error code, as infer does for a photo
    that cannot be read. Others may have hours of work left, so there is no limit while they report
    progress. Raises UserError if they do not within SILENCE_LIMIT seconds.
    """
    launched = launch()
    if _store is None or launched is None:
        return
    announce_at = time.monotonic() + ANNOUNCE_AFTER
    latest = 0
    latest_at = time.monotonic()
    # The store is gone when rank 0 has seen that all have finished, and has ended.
    with contextlib.suppress(RuntimeError):
        _store.add("done", 1)
        while (done := _store.add("done", 0)) < launched.world_size:
            now = time.monotonic()
            progress = done + _store.add("progress", 0)
            if progress > latest:
                latest = progress
                latest_at = now
            message = _waiting_for(launched.world_size - done, launched)
            if now > announce_at:
                say_once(f"{message} to finish")
                announce_at = math.inf
            if now > latest_at + SILENCE_LIMIT:
                raise UserError(
                    f"{message}: gave up, because they have finished no photo for "
                    f"{SILENCE_LIMIT / 60:g} minutes"
                )
            time.sleep(POLL_EVERY)


def wrap(module: nn.Module) -> nn.Module:
    """Return the module that training calls: backward() averages its gradients over all ranks."""
    if world_size() == 1:
        return module
    return DistributedDataParallel(module, gradient_as_bucket_view=True)


def shard(items: Tensor) -> Tensor:
    """Return this rank's share of n >= 1 items.

    A rank for which no item is left gets the first item as a stand-in.
    """
    if rank() >= len(items):
        return items[:1]
    return items[rank() :: world_size()]


def gather(rows: Tensor, n: int) -> Tensor:
    """Collect the rows (., C) of every rank's shard of n photos: (n, C), in the photos' order."""
    if world_size() == 1:
        return rows
    largest_shard = -(-n // world_size())
    padded = rows.new_zeros(largest_shard, *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    # Row i of rank r belongs to photo i * W + r. Padding and stand-ins end up behind row n.
    return torch.stack(parts, 1).flatten(0, 1)[:n]


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values
