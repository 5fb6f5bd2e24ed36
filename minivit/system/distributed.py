"""Training in several processes: torchrun starts them, on the GPUs of one machine or of many.

In a single process, every function here is the identity. Photos are dealt out in turn: of n
photos, rank r of W has r, r + W, r + 2W, ...
Shapes: n photos, C classes.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from ..errors import UserError

Result = TypeVar("Result")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def launched_rank() -> int:
    """Return the rank that torchrun gave to this process, before it has joined the others."""
    return int(os.environ.get("RANK", "0"))


def launched_world_size() -> int:
    """Return how many processes torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_device(name: str) -> str:
    """Return the name of this process's device: torchrun gives each process a GPU of its own."""
    local_rank = os.environ.get("LOCAL_RANK")
    if local_rank is None or name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    return f"cuda:{local_rank}"


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Set up the process group if torchrun started this process; else do nothing.

    Inside the context, only rank 0 prints. The group is taken down when the context ends.
    """
    if launched_world_size() == 1:
        yield
        return
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    store, own_rank, num_processes = next(rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # All processes are on this machine, so all of them count restarts alike. A restart must
        # not find the addresses that were stored before it.
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT")
        store = dist.PrefixStore(f"start {restarts}", store)
    dist.init_process_group(backend, store=store, rank=own_rank, world_size=num_processes)
    with contextlib.ExitStack() as silence:
        if own_rank != 0:
            devnull = silence.enter_context(Path(os.devnull).open("w"))
            silence.enter_context(contextlib.redirect_stdout(devnull))
            silence.enter_context(contextlib.redirect_stderr(devnull))
        yield
    # This is not reached after an error: torch 2.6 may wait for the other processes forever.
    dist.destroy_process_group()


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
    dist.broadcast_object_list(outcome, device=torch.device("cpu"))
    result, failure = outcome
    if failure is None:
        return result
    if rank() == 0:
        raise failure
    # torchrun ends all processes as soon as one has ended, and rank 0 must have printed its line.
    time.sleep(5)
    sys.exit(2)


def wait_for_all_ranks() -> None:
    """Wait until every process gets here.

    torchrun ends all processes as soon as one exits with an error code, as infer does for a photo
    that cannot be read.
    """
    if launched_world_size() == 1:
        return
    dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    dist.barrier()
    dist.destroy_process_group()


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
