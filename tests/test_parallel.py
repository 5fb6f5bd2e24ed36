"""Two processes as torchrun starts them, over gloo on the CPU, against one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT
from test_commands import run_train
from test_resume import assert_same_end, rows_of

import train
from minivit import parallel

TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--nproc-per-node",
    "2",
    "--master-port",
    "0",
    "--rdzv-backend",
    "c10d",
]
TORCHRUN += ["--rdzv-endpoint", "localhost:0"]


def torchrun(tiny_folder, data, out, *flags, more=()):
    known = ["--model", tiny_folder, "--data", data, "--out", out, "--amp", "off", "--device", "cpu", "--lr", "0.003"]
    command = [*TORCHRUN, *more, ROOT / "train.py", *known, "--batch-size", "8", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_two_processes_follow_the_curve_of_one(tiny_folder, shapes_data, tmp_path):
    """33 photos to train and 3 to validate divide neither by 2 nor by 8: the last batch leaves the second without a photo."""
    with torchrun(tiny_folder, shapes_data, tmp_path / "two", "--epochs", "4", "--micro-batch", "3") as process:
        out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    assert run_train(tiny_folder, shapes_data, tmp_path / "one", "--epochs", "4") == 0
    two, one = rows_of(tmp_path / "two"), rows_of(tmp_path / "one")
    assert len(two) == 4
    for a, b in zip(two, one):
        assert a == pytest.approx(b, rel=1e-4)
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("two", "one")]
    assert summaries[0]["test_accuracy"] == summaries[1]["test_accuracy"]
    assert [summary["processes"] for summary in summaries] == [2, 1]
    assert out.count("12 blocks, 3 heads") == out.count("epoch 4/4") == out.count("test accuracy") == 1  # only one speaks


def test_sigterm_to_torchrun_saves_and_resume_ends_in_the_same_bytes(tiny_folder, shapes_data, tmp_path):
    epochs = ("--epochs", "16")
    with torchrun(tiny_folder, shapes_data, tmp_path / "straight", *epochs) as process:
        _, err = process.communicate(timeout=500)
        assert process.returncode == 0, err
    out = tmp_path / "run"
    with torchrun(tiny_folder, shapes_data, out, *epochs) as process:
        for line in process.stdout:
            if line.startswith("epoch 2/16"):
                break
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=500)
    assert err.count(f"all is saved in {out}") == 1
    assert (out / train.STATE).exists()
    with torchrun(tiny_folder, shapes_data, out, *epochs, "--resume") as process:
        _, err = process.communicate(timeout=500)
        assert process.returncode == 0, err
    assert f"{out}: going on in epoch" in err
    assert_same_end(out, tmp_path / "straight")


def test_a_signal_to_one_process_stops_all_after_the_same_step(tiny_folder, shapes_data, tmp_path):
    out = tmp_path / "run"
    with torchrun(tiny_folder, shapes_data, out, "--epochs", "1000") as process:
        for line in process.stdout:
            if line.startswith("epoch 2/"):
                break
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(children[-1]), signal.SIGTERM)
        _, err = process.communicate(timeout=500)
    assert err.count(f"all is saved in {out}") == 1
    assert "Connection" not in err


def test_torchrun_restarts_after_a_killed_rank_and_the_run_ends(tiny_folder, shapes_data, tmp_path):
    out = tmp_path / "run"
    with torchrun(tiny_folder, shapes_data, out, "--epochs", "16", "--resume", more=["--max-restarts", "1"]) as process:
        for line in process.stdout:
            if line.startswith("epoch 2/16"):
                break
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(children[-1]), signal.SIGKILL)
        output, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    assert f"{out}: going on in epoch" in err
    assert output.splitlines()[-1].startswith("test accuracy ")
    assert [row["epoch"] for row in rows_of(out)] == list(range(1, 17))


def test_a_mistake_is_said_once_by_all_processes_together(tiny_folder, tmp_path):
    with torchrun(tiny_folder, tmp_path / "absent" / "x", tmp_path / "run", "--resume", "--epochs", "1") as process:
        (tmp_path / "absent" / "x").mkdir(parents=True)
        (tmp_path / "absent" / "x" / "file").touch()
        _, err = process.communicate(timeout=500)
    assert process.returncode != 0
    assert err.count("expected oxford-iiit-pet/") == 1
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT) not in err


@pytest.mark.parametrize("n", [1, 2, 5, 6, 7])
def test_rows_dealt_out_come_back_each_once_and_in_order(n, monkeypatch):
    import torch

    rows, W = torch.arange(2 * n).view(n, 2).float(), 3
    shares = []
    monkeypatch.setattr(parallel, "world", lambda: W)
    for rank in range(W):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        shares.append(parallel.shard(rows))
    assert all(len(share) for share in shares)  # a stand-in where there is none

    def all_gather(parts, padded):
        for part, share in zip(parts, shares):
            assert padded.shape == (-(-n // W), 2)
            part.zero_()[: len(share)] = share

    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    assert torch.equal(parallel.gather(shares[0], n), rows)


def test_under_torchrun_each_process_has_the_gpu_of_its_local_rank(monkeypatch):
    import torch

    assert parallel.own_device("auto") == "auto"
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [parallel.own_device(name) for name in ("auto", "cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:3", "cuda:1", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parallel.own_device("auto") == "auto"
