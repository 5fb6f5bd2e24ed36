"""Apple's mps on a machine without one: tensors that say they are there, and are on the CPU.

What mps does not take raises as it does there: float64, tensors of two devices in one call, and
functions that torch lacks there in some version from 2.6 on. Speed and rounding are the CPU's.
"""

from __future__ import annotations

import contextlib

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

MPS = torch.device("mps", 0)
LEAVES = {"cpu", "numpy", "tolist", "item", "__bool__", "__int__", "__float__", "__index__"}


class MpsTensor(torch.Tensor):
    """A tensor that says that it is on mps."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return call(function, args, kwargs or {})


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors_in(each)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def is_mps(device: object) -> bool:
    return isinstance(device, (str, torch.device)) and str(device).startswith("mps")


def mark(value, is_there: bool):
    """Return what a call returned, with its tensors on mps, or on the CPU."""
    if isinstance(value, torch.Tensor):
        if is_there and value.dtype == torch.float64:
            raise TypeError("the MPS framework doesn't support float64")
        if isinstance(value, torch.nn.Parameter) or isinstance(value, MpsTensor) == is_there:
            return value
        return value.as_subclass(MpsTensor if is_there else torch.Tensor)
    if isinstance(value, (tuple, list)):
        marked = [mark(each, is_there) for each in value]
        if hasattr(value, "_fields"):
            return type(value)(*marked)
        try:
            return type(value)(marked)
        except TypeError:  # one of torch's own named tuples
            return tuple(marked)
    return value


def call(function, args, kwargs):
    """Call a function of torch on the CPU, and check that mps would take it."""
    name = getattr(function, "__name__", "")
    given = list(tensors_in([list(args), kwargs]))
    there = [isinstance(each, MpsTensor) for each in given]
    with torch._C.DisableTorchFunction():
        if name == "__get__" and function == torch.Tensor.device.__get__:
            return MPS if there[0] else function(*args)
        if function is torch.device:
            return function(*args, **kwargs)
        target = next((each for each in (*args, *kwargs.values()) if is_mps(each)), None)
        leaves = name in LEAVES or (
            name == "to" and any(is_cpu(each) for each in (*args[1:], *kwargs.values()))
        )
        moves = name in ("to", "copy_", "__set__", "set_data", "_load_from_state_dict")
        if any(there) and not moves:
            for each, is_there in zip(given, there):
                if not is_there and each.ndim > 0 and name not in ("__getitem__", "__setitem__"):
                    raise RuntimeError(f"{name}: expected all tensors to be on mps, found a CPU's")
            refuse(function, kwargs)
        args = [torch.device("cpu") if is_mps(each) else each for each in args]
        kwargs = {
            key: torch.device("cpu") if is_mps(each) else each for key, each in kwargs.items()
        }
        result = function(*args, **kwargs)
    is_there = target is not None or (any(there[:1] if moves else there) and not leaves)
    if name == "to" and len(given) == 2:  # x.to(other)
        is_there = there[1]
    return mark(result, is_there)


def is_cpu(device: object) -> bool:
    return isinstance(device, (str, torch.device)) and str(device) == "cpu"


def refuse(function, kwargs) -> None:
    if function is F.grid_sample:
        raise NotImplementedError("grid_sample with reflection is not in every torch on mps")
    if function is F.interpolate and kwargs.get("antialias"):
        raise NotImplementedError("_upsample_bicubic2d_aa is not implemented on mps")


class Mode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return call(function, args, kwargs or {})


@contextlib.contextmanager
def simulated_mps(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *_: True)
    with Mode():
        yield
