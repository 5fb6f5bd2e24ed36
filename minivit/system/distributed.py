"""Several processes as one: what torchrun started trains together, on the GPUs of one machine or of many.

Alone, every function here is the identity. Photos are dealt out in turn: of n, rank r of W has r, r + W, r + 2W, ...
Shapes: n photos, C classes.
"""

from __future__ import annotations

import contextlib
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

T = TypeVar("T")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def own_device(name: str) -> str:
    """Return the name of this process's own device: under torchrun each has the GPU of its local rank."""
    if "LOCAL_RANK" in os.environ and name in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return name


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started, if it did; all but rank 0 are then silent. Sums of CUDA tensors go by NCCL."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, number, processes = next(rendezvous("env://"))
    if (
        os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    ):  # one machine: a restart must not find old addresses
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=processes)
    with contextlib.ExitStack() as silence:
        if rank():
            nowhere = silence.enter_context(Path(os.devnull).open("w"))
            silence.enter_context(contextlib.redirect_stdout(nowhere))
            silence.enter_context(contextlib.redirect_stderr(nowhere))
        yield
    dist.destroy_process_group()  # not after a mistake, where torch 2.6 may wait for the others forever


def from_first(compute: Callable[[], T]) -> T:
    """Return to every process what rank 0 computes; if that is a mistake of the user's, rank 0 says so and all end with 2."""
    if world() == 1:
        return compute()
    box: list = [None, None]
    if rank() == 0:
        try:
            box[0] = compute()
        except (UserError, OSError) as error:
            box[1] = error
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    if box[1]:
        if rank() == 0:
            raise box[1]
        time.sleep(5)  # as torchrun ends all as soon as one has ended, and rank 0 must have spoken
        sys.exit(2)
    return box[0]


def wrap(model: nn.Module) -> nn.Module:
    """Return what training calls: the model, its gradients averaged over all processes in the course of backward()."""
    if world() == 1:
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def shard(items: Tensor) -> Tensor:
    """Return this process's own of n >= 1 items; where there are more processes than items, the first as a stand-in."""
    return items[rank() :: world()] if rank() < len(items) else items[:1]


def gather(rows: Tensor, n: int) -> Tensor:
    """Put the rows (., C) of every process's shard of n photos together again: (n, C), none twice, no stand-in, in order."""
    if world() == 1:
        return rows
    padded = rows.new_zeros(-(-n // world()), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(world())]
    dist.all_gather(parts, padded)
    return torch.stack(parts, 1).flatten(0, 1)[:n]


def total(values: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place."""
    if world() > 1:
        dist.all_reduce(values)
    return values


def wait_for_others() -> None:
    """Wait for the other processes, since torchrun ends them all as soon as one reports an unreadable photo."""
    import datetime

    from torch import distributed

    distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    distributed.barrier()
    distributed.destroy_process_group()
