"""Compare two processes, as torchrun starts them over gloo on the CPU, with a single one."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, assert_same_end, rows_of, run_train

from minivit.errors import UserError
from minivit.system import distributed, launch
from minivit.training import run_folder as runs

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


EPOCHS = ("--epochs", "6", "--micro-batch", "3")


def torchrun(tiny_saved, data, out, *flags, more=()):
    known = [
        "--model",
        tiny_saved,
        "--data",
        data,
        "--out",
        out,
        "--amp",
        "off",
        "--device",
        "cpu",
        "--lr",
        "0.003",
    ]
    command = [*TORCHRUN, *more, ROOT / "train.py", *known, "--batch-size", "8", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.fixture(scope="module")
def straight(tiny_saved, shapes_data, tmp_path_factory):
    """A run of two processes that nothing disturbed, and what it printed."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    with torchrun(tiny_saved, shapes_data, folder, *EPOCHS) as process:
        out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    return folder, out


def test_two_processes_follow_the_curve_of_one(
    tiny_saved, shapes_data, straight, tmp_path, no_figures
):
    """Neither 33 training photos nor 3 validation photos divide by 2 processes or batches of 8.

    So the last batch has no photo for the second process.
    """
    folder, out = straight
    assert run_train(tiny_saved, shapes_data, tmp_path / "one", "--epochs", "6") == 0
    two, one = rows_of(folder), rows_of(tmp_path / "one")
    assert [row["epoch"] for row in two] == list(range(7))  # 0 is the head alone
    for a, b in zip(two, one):
        assert a == pytest.approx(b, rel=1e-4)
    summaries = [
        json.loads((run / "summary.json").read_text()) for run in (folder, tmp_path / "one")
    ]
    assert summaries[0]["test_accuracy"] == summaries[1]["test_accuracy"]
    assert [summary["processes"] for summary in summaries] == [2, 1]
    for line in ("12 blocks, 3 heads", "epoch 6/6", "test accuracy"):
        assert out.count(line) == 1  # Only one process prints.


def test_sigterm_to_torchrun_saves_and_resume_ends_in_the_same_bytes(
    tiny_saved, shapes_data, straight, tmp_path
):
    out = tmp_path / "run"
    with torchrun(tiny_saved, shapes_data, out, *EPOCHS) as process:
        for line in process.stdout:
            if line.startswith("epoch 1/6"):
                break
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=500)
    assert err.count(f"all is saved in {out}") == 1
    assert (out / runs.STATE).exists()
    with torchrun(tiny_saved, shapes_data, out, *EPOCHS, "--resume") as process:
        _, err = process.communicate(timeout=500)
        assert process.returncode == 0, err
    assert f"{out}: going on in epoch" in err
    assert_same_end(out, straight[0])


@pytest.mark.slow
@pytest.mark.long
def test_sigterm_to_torchrun_at_any_moment_resumes_to_the_same_bytes(
    tiny_saved, shapes_data, straight, tmp_path
):
    started, interrupted = time.perf_counter(), 0
    with torchrun(tiny_saved, shapes_data, tmp_path / "whole", *EPOCHS) as process:
        process.communicate(timeout=500)
    whole = time.perf_counter() - started
    rng = random.Random(seed := time.time_ns())
    for i in range(25):
        out = tmp_path / str(i)
        with torchrun(tiny_saved, shapes_data, out, *EPOCHS) as process:
            time.sleep(rng.uniform(0.3, 1) * whole)
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=500)
        interrupted += (out / runs.STATE).exists()
        with torchrun(tiny_saved, shapes_data, out, *EPOCHS, "--resume") as process:
            _, err = process.communicate(timeout=500)
            assert process.returncode == 0, (seed, i, err)
        assert_same_end(out, straight[0])
    assert interrupted >= 5, seed  # in the midst of training


def test_a_signal_to_one_process_stops_all_after_the_same_step(tiny_saved, shapes_data, tmp_path):
    out = tmp_path / "run"
    with torchrun(tiny_saved, shapes_data, out, "--epochs", "1000") as process:
        for line in process.stdout:
            if line.startswith("epoch 2/"):
                break
        children = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
        ).stdout.split()
        os.kill(int(children[-1]), signal.SIGTERM)
        _, err = process.communicate(timeout=500)
    assert err.count(f"all is saved in {out}") == 1
    assert "Connection" not in err


def test_torchrun_restarts_after_a_killed_rank_and_the_run_ends(tiny_saved, shapes_data, tmp_path):
    out = tmp_path / "run"
    with torchrun(
        tiny_saved, shapes_data, out, *EPOCHS, "--resume", more=["--max-restarts", "1"]
    ) as process:
        for line in process.stdout:
            if line.startswith("epoch 2/6"):  # by then the state after the first is on disk
                break
        children = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
        ).stdout.split()
        os.kill(int(children[-1]), signal.SIGKILL)
        output, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    assert f"{out}: going on in epoch" in err
    assert output.splitlines()[-1].startswith("test accuracy ")
    assert [row["epoch"] for row in rows_of(out)] == list(range(7))


@pytest.mark.slow
def test_two_machines_follow_the_curve_of_one(tiny_saved, shapes_data, straight, tmp_path):
    """Two torchruns on this machine find each other as they would on two machines."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    more = [
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--rdzv-endpoint",
        f"127.0.0.1:{port}",
        "--rdzv-id",
        "two",
    ]
    machines = [
        torchrun(tiny_saved, shapes_data, tmp_path / "run", *EPOCHS, more=more) for _ in range(2)
    ]
    outs = [machine.communicate(timeout=500)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0]
    assert sorted(out.count("test accuracy") for out in outs) == [0, 1]
    assert_same_end(tmp_path / "run", straight[0])


def test_a_mistake_is_said_once_by_all_processes_together(tiny_saved, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").touch()
    with torchrun(
        tiny_saved, tmp_path / "data", tmp_path / "run", "--resume", "--epochs", "1"
    ) as process:
        _, err = process.communicate(timeout=500)
    assert process.returncode != 0
    assert err.count("expected oxford-iiit-pet/") == 1
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT) not in err


@pytest.mark.parametrize("n", [1, 2, 5, 6, 7])
def test_rows_dealt_out_come_back_each_once_and_in_order(n, monkeypatch):
    import torch

    rows, W = torch.arange(2 * n).view(n, 2).float(), 3
    shares = []
    monkeypatch.setattr(distributed, "world_size", lambda: W)
    for rank in range(W):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(distributed.shard(rows))
    assert all(len(share) for share in shares)  # a stand-in where there is none

    def all_gather(parts, padded):
        for part, share in zip(parts, shares):
            assert padded.shape == (-(-n // W), 2)
            part.zero_()[: len(share)] = share

    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    assert torch.equal(distributed.gather(shares[0], n), rows)


@pytest.fixture
def shell(monkeypatch):
    """A function that sets torchrun's variables, of which none is set before."""
    for name in (*launch.VARIABLES, "LOCAL_RANK", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launch, "_said", set())
    monkeypatch.setattr(distributed, "_store", None)

    def set_variables(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return set_variables


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


PLACE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_under_torchrun_each_process_has_the_gpu_of_its_local_rank(monkeypatch, shell):
    import torch

    assert distributed.local_device("auto") == "auto"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    shell(LOCAL_RANK=3)
    assert distributed.local_device("auto") == "auto"  # Another job has left it in the shell.
    shell(RANK=3, WORLD_SIZE=4, **PLACE)
    assert [distributed.local_device(name) for name in ("auto", "cuda", "cuda:1", "cpu")] == [
        "cuda:3",
        "cuda:3",
        "cuda:1",
        "cpu",
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.local_device("auto") == "auto"


@pytest.mark.parametrize(
    "variables, given",
    [
        ({"RANK": 1}, "RANK"),
        ({"WORLD_SIZE": 2}, "WORLD_SIZE"),
        ({"RANK": "x", "WORLD_SIZE": 2, "LOCAL_RANK": 0}, "RANK, WORLD_SIZE and LOCAL_RANK"),
        (PLACE, "MASTER_ADDR and MASTER_PORT"),
        ({"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "a", "MASTER_PORT": ""}, "RANK, WORLD_SIZE"),
    ],
)
def test_some_of_torchruns_variables_alone_are_ignored_with_a_word(variables, given, shell, capsys):
    shell(**variables)
    for _ in range(2):  # It is said once.
        assert launch.launched_rank() == 0
        assert launch.launched_world_size() == 1
    message = capsys.readouterr().err
    assert message.startswith(given)
    assert message.count("ignored, because torchrun sets all of them\n") == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"RANK": "one"},
        {"RANK": 2},
        {"RANK": -1},
        {"WORLD_SIZE": 0},
        {"MASTER_PORT": "http"},
        {"MASTER_PORT": 70000},
        {"LOCAL_RANK": "cuda"},
    ],
)
def test_variables_that_cannot_be_are_refused_by_name(wrong, shell):
    shell(**{"RANK": 1, "WORLD_SIZE": 2} | PLACE | wrong)
    ((name, value),) = wrong.items()
    with pytest.raises(UserError, match=f"{name}={value}: expected a whole number from"):
        distributed.join_others()


def test_a_process_alone_waits_for_nobody(shell):
    shell(RANK=0, WORLD_SIZE=1, MASTER_ADDR="no-such-machine.invalid", MASTER_PORT=1)
    distributed.join_others()
    distributed.report_progress()
    distributed.wait_for_all_ranks()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_wait_for_others_is_announced_and_given_up(rank, shell, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "ANNOUNCE_AFTER", 0.1)
    monkeypatch.setattr(distributed, "START_LIMIT", 0.5)
    port = free_port()
    shell(RANK=rank, WORLD_SIZE=3, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    waiting = f"waiting for 2 other processes at 127.0.0.1:{port}"
    with pytest.raises(UserError, match=f"^{waiting}: gave up after"):
        distributed.join_others()
    assert capsys.readouterr().err == f"{waiting}\n"


def test_a_machine_that_is_not_there_is_named(shell):
    shell(RANK=1, WORLD_SIZE=2, MASTER_ADDR="no-such-machine.invalid", MASTER_PORT=1)
    with pytest.raises(UserError, match="MASTER_ADDR=no-such-machine.invalid: no such machine"):
        distributed.join_others()


def test_a_port_that_another_program_has_is_named(shell):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        shell(RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        with pytest.raises(UserError, match=f"MASTER_PORT={port}: cannot be used"):
            distributed.join_others()


class Counters:
    """A store in this process alone."""

    def __init__(self, **counts: int) -> None:
        self.counts = counts

    def add(self, name: str, amount: int) -> int:
        self.counts[name] = self.counts.get(name, 0) + amount
        return self.counts[name]


def test_a_wait_goes_on_while_others_report_progress(shell, monkeypatch, capsys):
    """The other process finishes a photo whenever it is asked, 30 in all, and then is done."""
    for name, value in (("ANNOUNCE_AFTER", 0.05), ("SILENCE_LIMIT", 0.3), ("POLL_EVERY", 0.02)):
        monkeypatch.setattr(distributed, name, value)

    class AtWork(Counters):
        def add(self, name, amount):
            if name == "progress" and super().add("progress", 1) == 30:
                super().add("done", 1)
            return super().add(name, amount)

    monkeypatch.setattr(distributed, "_store", AtWork())
    shell(RANK=0, WORLD_SIZE=2, **PLACE)
    distributed.wait_for_all_ranks()
    assert capsys.readouterr().err == ("waiting for 1 other process at 127.0.0.1:29500 to finish\n")


def test_a_wait_for_others_that_report_nothing_is_given_up(shell, monkeypatch):
    monkeypatch.setattr(distributed, "SILENCE_LIMIT", 0.2)
    monkeypatch.setattr(distributed, "_store", Counters(progress=7))
    shell(RANK=0, WORLD_SIZE=2, **PLACE)
    with pytest.raises(UserError, match="gave up, because they have finished no photo for"):
        distributed.wait_for_all_ranks()


def test_a_store_that_is_gone_means_that_all_have_finished(shell, monkeypatch):
    class Gone:
        def add(self, name, amount):
            raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(distributed, "_store", Gone())
    shell(RANK=1, WORLD_SIZE=2, **PLACE)
    distributed.report_progress()
    distributed.wait_for_all_ranks()


class Silent:
    """torch.distributed without other processes."""

    def __init__(self, **kept) -> None:
        vars(self).update(kept)

    def __getattr__(self, name):
        return lambda *_, **__: None


@pytest.mark.parametrize("lost", [True, False])
def test_a_lost_connection_is_one_line_and_a_defect_is_raised(lost, shell, monkeypatch):
    import torch

    monkeypatch.setattr(distributed, "join_others", lambda: None)
    monkeypatch.setattr(distributed, "dist", Silent(DistError=torch.distributed.DistError))
    shell(RANK=0, WORLD_SIZE=2, **PLACE)
    text = "mat1 and mat2 shapes cannot be multiplied"
    if lost:
        text = "[/src/gloo/transport/tcp/pair.cc:545] Read error: Connection reset. Check the logs"
    expected = UserError if lost else RuntimeError
    message = r"cannot be reached \(Read error: Connection reset\); what was" if lost else "^mat1"
    with (
        pytest.raises(expected, match=message),
        distributed.process_group(torch.device("cpu")),
    ):
        raise RuntimeError(text)
