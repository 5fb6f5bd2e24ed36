"""Devices that this machine may not have, as torch describes them."""

from __future__ import annotations

import importlib
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, rows_of, run_train
from simulated_mps import MPS, simulated_mps
from torch.nn import functional as F

import infer
import train
from minivit import ViT
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
    monkeypatch.setattr(device, "few_threads", lambda: Current("few threads"))
    for name in ("cuda:1", "cpu", "mps"):
        with device.current(torch.device(name)):
            entered.append(name)
    few_threads = ["few threads", "cuda:1", "left"]
    assert entered == ["cuda:1", *few_threads, "left", "cpu", "mps"]


@pytest.mark.parametrize(
    "num_cores, threads, expected", [(1, 1, 1), (2, 2, 1), (8, 8, 2), (16, 16, 4), (64, 64, 4),
                                     (16, 1, 1)]
)  # fmt: skip
def test_few_threads_leave_most_cores_to_the_workers(num_cores, threads, expected, monkeypatch):
    chosen = [threads]
    monkeypatch.setattr(device, "cores", lambda: num_cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: chosen[-1])
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    with pytest.raises(KeyboardInterrupt), device.few_threads(), device.few_threads():
        assert chosen[-1] == expected
        raise KeyboardInterrupt
    assert chosen[-1] == threads


@pytest.mark.parametrize("name, program", [("train", train.main), ("infer", infer.main)])
def test_models_are_loaded_with_few_threads(
    name, program, monkeypatch, tiny_saved, shapes_data, tmp_path
):
    noted = []
    module = importlib.import_module(f"minivit.{name}")
    owner = module.weights if name == "train" else module

    def load(*_, **__):
        noted.append(torch.get_num_threads())
        raise UserError("loaded")

    monkeypatch.setattr(owner, "load_pretrained", load)
    monkeypatch.setattr(device, "cores", lambda: 4)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        flags = ["--model", str(tiny_saved), "--device", "cpu", "--out", str(tmp_path / "out")]
        if name == "train":
            assert program([*flags, "--data", str(shapes_data)]) == 2
        else:
            photo = next(Path(shapes_data).rglob("*.png"))
            assert program([*flags, str(photo)]) == 2
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert noted == [1]


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


def test_half_of_what_training_leaves_of_a_gpu_may_be_kept(monkeypatch):
    cuda = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (12 * 2**30, 16 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 2 * 2**30)
    assert device.has_much_room(cuda, 6.0)
    assert not device.has_much_room(cuda, 6.1)
    limit = 4.0 + device.CONTEXT_GIB  # of which 2 GiB are reserved
    assert device.has_much_room(cuda, 1.0, limit)
    assert not device.has_much_room(cuda, 1.1, limit)
    assert device.has_much_room(cuda, 6.0, 400.0)
    assert not device.has_much_room(torch.device("cpu"), 0.001)


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


# Apple's mps, simulated


def test_the_simulated_mps_refuses_what_mps_does(monkeypatch):
    """Otherwise the tests below would prove nothing."""
    with simulated_mps(monkeypatch):
        there = torch.zeros(1, 1, 2, 2, device="mps")
        assert there.device == MPS
        assert (there + 1).device == MPS
        assert there.cpu().device.type == "cpu"
        for refused in (
            lambda: there.double(),
            lambda: torch.tensor([1.0], dtype=torch.float64).to(MPS),
            lambda: there + torch.zeros(2),
            lambda: F.grid_sample(there, torch.zeros(1, 2, 2, 2, device="mps")),
            lambda: F.interpolate(there, (4, 4), mode="bicubic", antialias=True),
        ):
            with pytest.raises((TypeError, RuntimeError), match="mps|MPS"):
                refused()


@pytest.mark.usefixtures("no_figures")
def test_a_run_on_mps_is_that_on_the_cpu(monkeypatch, tiny_saved, shapes_data, tmp_path):
    flags = ["--batch-size", "8", "--lr", "0.003", "--epochs", "2", "--model", str(tiny_saved)]
    flags += ["--data", str(shapes_data)]
    with simulated_mps(monkeypatch):
        for views, out in (("1", "mps"), ("0", "anew")):
            kind = ["--device", "mps", "--cache-views", views, "--out", str(tmp_path / out)]
            assert train.main([*flags, *kind]) == 0
        dry = ["--device", "mps", "--dry-run", "--img-size", "48", "--out", str(tmp_path / "dry")]
        assert train.main([*flags, *dry]) == 0
    assert (
        run_train(tiny_saved, shapes_data, tmp_path / "cpu", "--epochs", "2", "--cache-views", "1")
        == 0
    )
    # Photos are evaluated in larger batches than on a CPU, which changes the rounding.
    for row, on_cpu in zip(rows_of(tmp_path / "mps"), rows_of(tmp_path / "cpu"), strict=True):
        assert row == pytest.approx(on_cpu, rel=1e-2, abs=1e-5)


def test_other_commands_run_on_mps(monkeypatch, tiny_saved, shapes_data, tmp_path):
    photo = str(shapes_data / "test" / "red" / "0.png")
    model = ["--model", str(tiny_saved), "--device", "mps"]
    with simulated_mps(monkeypatch):
        for method in ("attention", "rollout", "relevance"):
            flags = ["--method", method, "--out", str(tmp_path / method), "--html", "--npz"]
            assert infer.main([photo, *model, *flags, "--layers", "10-11"]) == 0


def test_positions_are_resampled_on_the_cpu_for_mps(monkeypatch):
    model = ViT(replace(TINY, pos_grid=(6, 6), pos_antialias=True))
    with simulated_mps(monkeypatch):
        positions = model.resample(torch.nn.Parameter(model.pos_embed.detach().to(MPS)))
        assert positions.device == MPS
        assert positions.cpu().equal(model.positions())


def test_mps_computes_in_float32_unless_asked_for_bf16(monkeypatch):
    newest = torch.backends.mps
    monkeypatch.setattr(newest, "is_macos_or_newer", lambda *_: True)
    assert device.pick_amp("auto", MPS) is None
    assert device.pick_amp("bf16", MPS) is torch.bfloat16
    with pytest.raises(UserError, match="amp fp16: .* use --amp bf16"):
        device.pick_amp("fp16", MPS)
    monkeypatch.setattr(newest, "is_macos_or_newer", lambda *_: False)
    with pytest.raises(UserError, match="expected macOS 14 or newer"):
        device.pick_amp("bf16", MPS)
