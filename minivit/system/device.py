"""Which device to use, in which precision, for how many photos at once, and in how much memory."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.utils.deterministic

from ..errors import UserError
from .cores import cores

# GiB of a CUDA device's memory that CUDA itself takes, with its kernels and libraries.
CONTEXT_GIB = 0.7
# What is kept on a CUDA device between epochs may take this share of the memory that is left.
SHARE_TO_KEEP = 0.5
# Photos at once on a CPU. With more, the activations of a block no longer fit into its caches.
CPU_BATCH = 8
# torch's threads while worker processes or a GPU do most of the work.
MAX_FEW_THREADS = 4
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}


def pick_device(name: str) -> torch.device:
    """Return the device of that name; `auto` is CUDA, else Apple's mps, else the CPU.

    Raises UserError if the device is not there.
    """
    if name == "auto":
        name = _best_device_name()
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"device {name!r}: expected auto, cpu, mps, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device {name}: this torch ({torch.__version__}) sees "
            f"{torch.cuda.device_count()} CUDA devices; use --device cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device mps: this torch has no Metal device; use --device cpu")
    return device


def _best_device_name() -> str:
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def pick_amp(name: str, device: torch.device) -> torch.dtype | None:
    """Return autocast's dtype; None means plain float32.

    `auto` is bf16 where the device multiplies it in hardware (CUDA from Ampere on, CPUs with AMX
    or AVX512-BF16), fp16 on older CUDA devices, and float32 elsewhere. Raises UserError for a
    precision that the device does not have.
    """
    if device.type == "mps":
        _check_amp_of_mps(name)
    older_gpu = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8
    if name == "auto":
        if device.type == "cuda":
            name = "fp16" if older_gpu else "bf16"
        else:
            name = "bf16" if device.type == "cpu" and _cpu_has_bf16() else "off"
    if name == "bf16" and older_gpu:
        raise UserError(
            "amp bf16: this GPU is older than Ampere and would emulate it; use --amp fp16"
        )
    return DTYPES[name]


def _check_amp_of_mps(name: str) -> None:
    """Raise UserError for a precision in which torch does not train on Apple's mps.

    torch 2.6 cannot scale gradients there, and later versions made fp16 gradients 0.
    Sources: https://github.com/pytorch/pytorch/issues/142397, .../pull/184286
    """
    if name == "fp16":
        raise UserError("amp fp16: torch's gradient scaler is not sound on mps; use --amp bf16")
    if name == "bf16" and not torch.backends.mps.is_macos_or_newer(14, 0):
        raise UserError("amp bf16: expected macOS 14 or newer, which has it on mps; use --amp off")


@functools.cache
def product_flops(device: torch.device, amp: torch.dtype | None) -> float:
    """Measure the floating-point operations a second of large matrix products on the device."""
    if device.type == "cuda":
        side, products = 4096, 10
    else:
        side, products = 1024, 1
    best_seconds = math.inf
    begun = time.perf_counter()
    with torch.inference_mode():
        # Random numbers, because a product of zeros is faster.
        matrix = torch.randn(side, side, device=device, dtype=amp or torch.float32)
        for _ in range(6):  # The first round warms up.
            started = time.perf_counter()
            for _ in range(products):
                product = matrix @ matrix
            product[0, 0].item()  # Wait for the device.
            best_seconds = min(best_seconds, time.perf_counter() - started)
            if time.perf_counter() - begun > 1:  # The CPU emulates this precision.
                break
    return products * 2 * side**3 / best_seconds


def cpu_batch(amp: torch.dtype | None) -> int:
    """Return the number of photos at once that is fastest on a CPU; low precision fits twice."""
    return CPU_BATCH * 2 if amp else CPU_BATCH


def pick_micro_batch(
    requested: int | None, batch_size: int, device: torch.device, amp: torch.dtype | None
) -> int:
    """Return the number of photos per forward pass in training.

    That is the number requested, else on a CPU the fastest one, else the whole batch.
    """
    if requested is None:
        requested = cpu_batch(amp) if device.type == "cpu" else batch_size
    return min(requested, batch_size)


def eval_batch(
    device: torch.device, batch_size: int, micro_batch: int, amp: torch.dtype | None
) -> int:
    """Return the number of photos per forward pass where no graph takes memory.

    On a GPU these are many, unless micro-batches were asked for because memory is small.
    """
    if device.type == "cpu":
        return cpu_batch(amp)
    return micro_batch if micro_batch < batch_size else 128


def peak_gib(device: torch.device) -> float:
    """Return the most memory used so far, in GiB: the CUDA device's, else this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return _peak_bytes_on_windows() / 2**30
    import resource

    units_per_gib = 2**30 if sys.platform == "darwin" else 2**20  # bytes on macOS, else KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units_per_gib


class _MemoryCounters(ctypes.Structure):
    """What Windows counts of a process, where `sizes` begins with the peak of the working set.

    Source: https://learn.microsoft.com/windows/win32/api/psapi/ns-psapi-process_memory_counters
    """

    _fields_ = (
        ("size_of_this", ctypes.c_uint32),
        ("page_faults", ctypes.c_uint32),
        ("sizes", ctypes.c_size_t * 8),
    )


def _peak_bytes_on_windows() -> int:
    """Return the most memory that this process has had, which Python's library does not tell."""
    kernel = ctypes.WinDLL("kernel32")  # type: ignore[attr-defined,unused-ignore]
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    size = ctypes.sizeof(_MemoryCounters)
    counters = _MemoryCounters(size)
    ask = kernel.K32GetProcessMemoryInfo
    ask.argtypes = (ctypes.c_void_p, ctypes.POINTER(_MemoryCounters), ctypes.c_uint32)
    ask(kernel.GetCurrentProcess(), ctypes.byref(counters), size)
    return counters.sizes[0]


@contextlib.contextmanager
def own_defaults() -> Iterator[None]:
    """Make new tensors in float32 on the CPU, with gradients, whatever the calling program does.

    It may have chosen other defaults of torch for its own work, to which they return.
    """
    earlier = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_default_dtype, earlier)
        torch.set_default_dtype(torch.float32)
        stack.enter_context(torch.enable_grad())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@contextlib.contextmanager
def few_threads() -> Iterator[None]:
    """Limit torch to few threads while worker processes may need the cores.

    What is computed in parallel ends when its last thread does. A thread that has to wait for a
    core gets one only after some milliseconds, so that many threads can take ten times as long.
    """
    earlier = torch.get_num_threads()
    quarter_of_cores = max(1, cores() // 4)
    torch.set_num_threads(min(earlier, quarter_of_cores, MAX_FEW_THREADS))
    try:
        yield
    finally:
        torch.set_num_threads(earlier)


@contextlib.contextmanager
def current(device: torch.device) -> Iterator[None]:
    """Make a CUDA device the current one, with few threads for what is left to the CPU.

    Otherwise torch switches from the first device to this one and back for each kernel, and some of
    what it allocates belongs to the first one. Other devices are never current.
    """
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), few_threads():
        yield


def begin_warm_up(device: torch.device, amp: torch.dtype | None) -> threading.Thread:
    """Start a CUDA device and its library of products in a thread, which takes a second.

    Wait for the thread before the device is used. An error comes up again where it is used. For
    another device, the thread does nothing.
    """

    def multiply() -> None:
        if device.type != "cuda":
            return
        with contextlib.suppress(RuntimeError), torch.inference_mode():
            matrix = torch.zeros(256, 256, device=device, dtype=amp or torch.float32)
            (matrix @ matrix).sum().item()

    thread = threading.Thread(target=multiply, daemon=True)
    thread.start()
    return thread


def be_deterministic() -> None:
    """Make torch give the same bits each time, on CUDA too.

    Source: https://pytorch.org/docs/stable/notes/randomness.html
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # CUDA reads it when it starts.
    # This slow debugging aid would be switched on as well. It is a property of the module, which
    # mypy does not know.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)


def limit_memory(device: torch.device, gib: float) -> None:
    """Limit this process to `gib` GiB of a CUDA device; torch then reports it full earlier."""
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


def has_much_room(device: torch.device, gib: float, limit_gib: float | None = None) -> bool:
    """Return whether a CUDA device has so much memory left that `gib` GiB may be kept there.

    Rehearse training first: torch then holds the memory that training needs, so that it no longer
    counts as free. `limit_gib` is the limit given to limit_memory(), if there is one. The answer
    for other devices is False, because they have no memory of their own.
    """
    if device.type != "cuda":
        return False
    left = torch.cuda.mem_get_info(device)[0]
    if limit_gib is not None:
        reserved = torch.cuda.memory_reserved(device)
        left = min(left, int((limit_gib - CONTEXT_GIB) * 2**30) - reserved)
    return gib * 2**30 <= SHARE_TO_KEEP * left


def _cpu_has_bf16() -> bool:
    try:  # torch has no public answer before 2.12.
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:  # This is not Linux.
        return False
    return bool(flags & {"amx_bf16", "avx512_bf16"})
