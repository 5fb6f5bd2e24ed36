"""Devices that this machine may not have, as torch describes them."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from minivit.commands import train_parser
from minivit.errors import UserError
from minivit.system import device


def test_only_a_cuda_device_becomes_the_current_one(monkeypatch):
    entered = []

    class Current:
        def __init__(self, chosen):
            self.chosen = chosen

        def __enter__(self):
            entered.append(str(self.chosen))

        def __exit__(self, *_):
            entered.append("left")

    monkeypatch.setattr(torch.cuda, "device", Current)
    for name in ("cuda:1", "cpu", "mps"):
        with device.current(torch.device(name)):
            entered.append(name)
    assert entered == ["cuda:1", "cuda:1", "left", "cpu", "mps"]


def test_a_device_that_does_not_start_is_left_to_its_first_use(monkeypatch, capsys):
    started = []

    def fail(*_, device, dtype):
        started.append((str(device), dtype))
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "zeros", fail)
    for name in ("cpu", "cuda:1"):
        device.begin_warm_up(torch.device(name), torch.bfloat16).join()
    assert started == [("cuda:1", torch.bfloat16)]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name, index", [("cuda", 3), ("cuda:1", 1)])
def test_a_memory_limit_is_a_share_of_that_device_without_cudas_own(monkeypatch, name, index):
    limits = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda i: SimpleNamespace(total_memory=(10 + i) * 2**30),
    )
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, i: limits.append((share, i))
    )
    device.limit_memory(torch.device(name), 4)
    device.limit_memory(torch.device(name), 400)
    assert limits == [(pytest.approx((4 - device.CONTEXT_GIB) / (10 + index)), index), (1.0, index)]


def test_a_memory_limit_that_cannot_be_is_refused():
    with pytest.raises(UserError, match="limits a CUDA device, found cpu"):
        device.limit_memory(torch.device("cpu"), 4)
    with pytest.raises(UserError, match="expected more than 0.7"):
        device.limit_memory(torch.device("cuda"), 0.5)


@pytest.mark.parametrize(
    "major, expected",
    [(6, torch.float16), (7, torch.float16), (8, torch.bfloat16), (9, torch.bfloat16)],
)
def test_gpus_before_ampere_get_fp16_by_themselves_and_are_refused_bf16(
    monkeypatch, major, expected
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, 0))
    assert device.pick_amp("auto", torch.device("cuda")) is expected
    if major < 8:
        with pytest.raises(UserError, match="older than Ampere"):
            device.pick_amp("bf16", torch.device("cuda"))


@pytest.mark.parametrize("amp, expected", [(None, 8), (torch.bfloat16, 16)])
def test_a_cpu_computes_few_photos_at_once_and_more_in_bf16(amp, expected):
    cpu = torch.device("cpu")
    assert (
        device.pick_micro_batch(None, 64, cpu, amp)
        == device.eval_batch(cpu, 64, 64, amp)
        == expected
    )
    assert device.pick_micro_batch(None, 4, cpu, amp) == 4
    assert device.pick_micro_batch(32, 64, cpu, amp) == 32


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no taskset here")
def test_as_many_workers_as_this_process_may_use_cores():
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert train_parser().parse_args([]).workers == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert train_parser().parse_args([]).workers == len(allowed)
