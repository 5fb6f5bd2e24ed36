"""A CUDA device is started beside the import of torch, where that is right."""

from __future__ import annotations

import ctypes
import os
import sys

import pytest

from minivit import commands
from minivit.errors import UserError
from minivit.system import early_cuda


class Driver:
    """Stands in for the CUDA driver, and notes what is asked of it."""

    def __init__(self, refused: str = "") -> None:
        self.refused = refused
        self.calls: list[str] = []

    def __getattr__(self, name):
        def call(*args):
            index = f" {args[1]}" if name == "cuDeviceGet" else ""
            self.calls.append(name + index)
            return 100 if name == self.refused else 0

        return call


@pytest.fixture
def driver(monkeypatch):
    """A machine with a driver and a torch for CUDA that is not imported yet."""
    driver = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    monkeypatch.setattr(early_cuda, "_torch_has_cuda", lambda: True)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("CUDA_MODULE_LOADING", "")  # so that it is put back afterwards
    monkeypatch.delenv("CUDA_MODULE_LOADING")
    return driver


def started(device: str) -> bool:
    thread = early_cuda.begin(device)
    if thread is not None:
        thread.join()
    return thread is not None


@pytest.mark.parametrize("device, index", [("auto", 0), ("cuda", 0), ("cuda:3", 3)])
def test_the_device_that_torch_will_use_is_started(device, index, driver):
    assert started(device)
    assert driver.calls == ["cuInit", f"cuDeviceGet {index}", "cuDevicePrimaryCtxRetain"]
    assert os.environ.pop("CUDA_MODULE_LOADING") == "LAZY"


@pytest.mark.parametrize("program", ["train", "infer"])
def test_a_program_starts_the_device_before_it_imports_torch(program, monkeypatch):
    begun = []

    def begin(device):
        begun.append((device, f"minivit.{program}" in sys.modules))
        raise UserError("begun")

    monkeypatch.setattr(early_cuda, "begin", begin)
    monkeypatch.delitem(sys.modules, f"minivit.{program}", raising=False)
    photos = ["cat.jpg"] if program == "infer" else []
    assert getattr(commands, program)([*photos, "--device", "cuda:1"]) == 2
    assert begun == [("cuda:1", False)]


@pytest.mark.parametrize("device", ["cpu", "mps", "cuda:", "gpu", "cuda:x"])
def test_no_other_device_is_started(device, driver):
    assert not started(device)
    assert driver.calls == []


@pytest.mark.parametrize("reason", ["torchrun", "Windows", "imported", "a torch for CPUs"])
def test_nothing_is_started_where_torch_does_it_itself(reason, driver, monkeypatch):
    if reason == "torchrun":
        monkeypatch.setenv("RANK", "1")
    elif reason == "Windows":
        monkeypatch.setattr(sys, "platform", "win32")
    elif reason == "imported":
        monkeypatch.setitem(sys.modules, "torch", ctypes)
    else:
        monkeypatch.setattr(early_cuda, "_torch_has_cuda", lambda: False)
    assert not started("auto")
    assert driver.calls == []


def test_a_machine_without_a_driver_or_a_gpu_is_left_alone(driver, monkeypatch):
    driver.refused = "cuInit"
    assert started("auto")
    driver.refused = "cuDeviceGet"
    assert started("auto")
    assert "cuDevicePrimaryCtxRetain" not in driver.calls

    def no_library(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    assert started("auto")


def test_a_torch_for_cuda_is_told_by_its_library(tmp_path, monkeypatch):
    (tmp_path / "torch" / "lib").mkdir(parents=True)
    (tmp_path / "torch" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch")
    assert not early_cuda._torch_has_cuda()
    (tmp_path / "torch" / "lib" / "libtorch_cuda.so").touch()
    assert early_cuda._torch_has_cuda()
