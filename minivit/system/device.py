"""Which device, which precision on it, how many photos at once, and in how much memory."""

from __future__ import annotations

import functools
import math
import os
import re
import sys
import time
from pathlib import Path

import torch
import torch.utils.deterministic

from ..errors import UserError

CONTEXT_GIB = 0.7  # of a CUDA device are taken by CUDA itself, its kernels and its libraries
CPU_BATCH = 8  # photos at once on a CPU: of more, what they make of a block leaves the caches; in bf16 twice as many fit
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}


def pick_device(name: str) -> torch.device:
    """Return the device asked for; `auto` is CUDA, else Apple's mps, else the CPU. Raises UserError if it is not there.

    On CUDA, attention is then not cuDNN's, which on Hopper is a little faster once it has planned, for 0.1 s, for each shape.
    """
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"device {name!r}: expected auto, cpu, mps, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device {name}: this torch ({torch.__version__}) sees {torch.cuda.device_count()} CUDA devices; use --device cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device mps: this torch has no Metal device; use --device cpu")
    torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def pick_amp(name: str, device: torch.device) -> torch.dtype | None:
    """Return autocast's dtype, None for plain float32.

    `auto` is bf16 where the device multiplies it in hardware (CUDA from Ampere on, CPUs with AMX or AVX512-BF16), fp16
    on older CUDA devices, and float32 elsewhere. Raises UserError for a precision that the device does not have.
    """
    cuda_major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else None
    if name == "auto":
        if cuda_major is not None:
            name = "bf16" if cuda_major >= 8 else "fp16"
        else:
            name = "bf16" if device.type == "cpu" and _cpu_has_bf16() else "off"
    if name == "bf16" and cuda_major is not None and cuda_major < 8:
        raise UserError(
            "amp bf16: this GPU is older than Ampere and would emulate it; use --amp fp16"
        )
    return DTYPES[name]


@functools.cache
def product_flops(device: torch.device, amp: torch.dtype | None) -> float:
    """Return how many floating-point operations a second the device does in large matrix products: the best of a few."""
    side, products, best = (4096, 10, math.inf) if device.type == "cuda" else (1024, 1, math.inf)
    with torch.inference_mode():
        a, begun = (
            torch.randn(side, side, device=device, dtype=amp or torch.float32),
            time.perf_counter(),
        )  # zeros are faster
        for _ in range(6):  # the first warms up
            started = time.perf_counter()
            for _ in range(products):
                c = a @ a
            c[0, 0].item()  # waits for the device
            best = min(best, time.perf_counter() - started)
            if time.perf_counter() - begun > 1:  # a precision that a CPU emulates
                break
    return products * 2 * side**3 / best


def cpu_batch(amp: torch.dtype | None) -> int:
    """Return how many photos at once are fastest on a CPU."""
    return CPU_BATCH * 2 if amp else CPU_BATCH


def pick_micro_batch(
    asked: int | None, batch_size: int, device: torch.device, amp: torch.dtype | None
) -> int:
    """Return how many photos go through at once in training: as asked, else all of a batch, on a CPU what is fastest there."""
    return min(asked or (cpu_batch(amp) if device.type == "cpu" else batch_size), batch_size)


def eval_batch(
    device: torch.device, batch_size: int, micro_batch: int, amp: torch.dtype | None
) -> int:
    """Return how many photos go through at once where no graph takes memory: many, unless micro-batches are asked for."""
    return (
        cpu_batch(amp) if device.type == "cpu" else micro_batch if micro_batch < batch_size else 128
    )


def peak_gib(device: torch.device) -> float:
    """Return the most memory used so far, in GiB: of a CUDA device by torch, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**30 if sys.platform == "darwin" else 2**20
    )


def be_deterministic() -> None:
    """From here on give the same bits each time, on CUDA too (https://pytorch.org/docs/stable/notes/randomness.html)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property: a slow aid
    torch.use_deterministic_algorithms(True)


def limit_memory(device: torch.device, gib: float) -> None:
    """Let this process take no more than `gib` of a CUDA device's memory: torch then finds it full before it is."""
    if device.type != "cuda":
        raise UserError(
            f"--memory-gib limits a CUDA device, found {device}; there, choose --micro-batch"
        )
    if gib <= CONTEXT_GIB:
        raise UserError(
            f"--memory-gib {gib:g}: expected more than {CONTEXT_GIB}, which CUDA itself takes"
        )
    index = torch.cuda.current_device() if device.index is None else device.index
    total = torch.cuda.get_device_properties(index).total_memory / 2**30
    torch.cuda.set_per_process_memory_fraction(min(1.0, (gib - CONTEXT_GIB) / total), index)


def _cpu_has_bf16() -> bool:
    cpuinfo = Path("/proc/cpuinfo")  # Linux; torch has no public answer before 2.12
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return bool(flags & {"amx_bf16", "avx512_bf16"})
