"""Torch is imported quickly, and a CUDA device is started meanwhile, where that is right."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from minivit import __main__, commands
from minivit.errors import UserError
from minivit.system import torch_start


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
    monkeypatch.setattr(torch_start, "_torch_has_cuda", lambda: True)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("CUDA_MODULE_LOADING", "")  # so that it is put back afterwards
    monkeypatch.delenv("CUDA_MODULE_LOADING")
    return driver


def started(device: str) -> bool:
    thread = torch_start.begin_cuda(device)
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

    monkeypatch.setattr(torch_start, "begin_cuda", begin)
    monkeypatch.delitem(sys.modules, f"minivit.{program}", raising=False)
    photos = ["cat.jpg"] if program == "infer" else []
    assert getattr(commands, program)([*photos, "--device", "cuda:1"]) == 2
    assert begun == [("cuda:1", False)]


COMMANDS = {
    "train": [],
    "infer": ["cat.jpg"],
    "score": [],
    "drop": [],
    "review": ["run"],
    "study": [],
    "selfcheck": [],
    "serve": ["--port", "0"],
    "describe": [],
    "export": ["run", "--to", "timm"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_imports_torch_quickly(command, monkeypatch, capsys):
    def import_torch():
        raise UserError("imported here")

    monkeypatch.setattr(torch_start, "import_torch", import_torch)
    monkeypatch.setattr(torch_start, "begin_cuda", lambda device: None)
    assert __main__.main([command, *COMMANDS[command]]) == 2
    assert capsys.readouterr().err.endswith(": imported here\n")


IMPORT = """
import gc
from minivit.system.torch_start import import_torch
{before}
collections = []
gc.callbacks.append(lambda phase, info: collections.append(phase))
import_torch()
gc.callbacks.clear()
print(collections, gc.isenabled(), gc.get_freeze_count() > 100_000)
"""


@pytest.mark.parametrize("was_enabled", [True, False])
def test_torch_is_imported_with_the_garbage_collector_off(was_enabled):
    code = IMPORT.format(before="" if was_enabled else "gc.disable()")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == (f"[] {was_enabled} True\n", "")


def test_garbage_of_a_session_that_has_imported_torch_is_still_found():
    before = gc.get_freeze_count()
    torch_start.import_torch()
    assert gc.get_freeze_count() == before


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
        monkeypatch.setattr(torch_start, "_torch_has_cuda", lambda: False)
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
    assert not torch_start._torch_has_cuda()
    (tmp_path / "torch" / "lib" / "libtorch_cuda.so").touch()
    assert torch_start._torch_has_cuda()
