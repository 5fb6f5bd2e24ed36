"""Import torch quickly, and start a CUDA device meanwhile.

Importing torch takes more than a second, and then the device takes half a second more. The driver
can do its part beside the import: a program has one primary context for each device, which torch
uses if it is there.
Source: https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__PRIMARY__CTX.html
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import os
import re
import sys
import threading
from pathlib import Path


def start(device: str) -> None:
    """Start the device of this name in a thread, if it is CUDA's, and import torch."""
    begin_cuda(device)
    import_torch()


def import_torch() -> None:
    """Import torch with Python's garbage collector switched off.

    The import creates several hundred thousand objects, and none of them is garbage. The collector
    would search them again and again meanwhile, and again later, so they are left out of later
    searches, too. If torch has been imported before, nothing happens.
    Source: https://docs.python.org/3/library/gc.html#gc.freeze
    """
    if "torch" in sys.modules:
        return
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        import torch  # noqa: F401

        gc.freeze()
    finally:
        if was_enabled:
            gc.enable()


def begin_cuda(device: str) -> threading.Thread | None:
    """Start the CUDA device of this name in a thread, if torch will use one; return the thread.

    Nothing is reported: torch finds the same obstacles again. On Windows, and under torchrun, where
    each process has a device of its own, torch starts the device itself.
    """
    name = re.fullmatch(r"auto|cuda(?::(\d+))?", device)
    if name is None or sys.platform != "linux" or "RANK" in os.environ or "torch" in sys.modules:
        return None
    if not _torch_has_cuda():
        return None
    # Newer drivers do so by themselves. Older ones would load the kernels of all libraries at once.
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    thread = threading.Thread(target=_start_cuda, args=(int(name[1] or 0),), daemon=True)
    thread.start()
    return thread


def _torch_has_cuda() -> bool:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    return Path(spec.origin).with_name("lib").joinpath("libtorch_cuda.so").exists()


def _start_cuda(index: int) -> None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:  # This machine has no GPU, or no driver for it.
        return
    if driver.cuInit(0) != 0:
        return
    device = ctypes.c_int()
    context = ctypes.c_void_p()
    if driver.cuDeviceGet(ctypes.byref(device), index) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
