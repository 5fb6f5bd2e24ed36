"""What a run leaves on disk when it is stopped or killed or the disk is full.

A resumed run must end as if nothing had stopped it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
    ROOT,
    assert_same_end,
    leave_figures_empty,
    make_trainable,
    rows_of,
    run_train,
    start_run,
    train_epochs,
)
from safetensors import SafetensorError, safe_open

from minivit import save_pretrained, train
from minivit.checkpoints import tensors
from minivit.errors import UserError
from minivit.training import run_folder as runs
from minivit.training import step as steps
from minivit.training.state import read_state, save_state

EPOCHS = ("--epochs", "4")


@pytest.fixture(scope="module", autouse=True)
def no_figures_here():
    with pytest.MonkeyPatch.context() as patch:
        leave_figures_empty(patch)
        yield


@pytest.fixture(scope="module")
def straight(tiny_saved, shapes_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "run"
    assert run_train(tiny_saved, shapes_data, out, *EPOCHS) == 0
    return out


def stop_in_step(monkeypatch, number, then=lambda: os.kill(os.getpid(), signal.SIGTERM)):
    """Call a function once, in the middle of the step of this number."""
    real, taken = steps.train_step, []

    def step(*args, **kwargs):
        taken.append(0)
        if len(taken) == number:
            then()
        return real(*args, **kwargs)

    monkeypatch.setattr(steps, "train_step", step)


@pytest.mark.parametrize(
    "number, which", [(n, signal.SIGTERM) for n in (1, 7, 10, 20)] + [(8, signal.SIGINT)]
)
def test_a_signal_ends_the_step_and_resume_ends_as_if_it_had_never_come(
    tiny_saved, shapes_data, straight, tmp_path, monkeypatch, capsys, number, which
):
    out, handlers = tmp_path / "run", [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        stop_in_step(patch, number, lambda: os.kill(os.getpid(), which))
        assert run_train(tiny_saved, shapes_data, out, *EPOCHS) == 130
    assert (
        f"all is saved in {out}: the same command with --resume goes on"
        in capsys.readouterr().err.splitlines()[-1]
    )
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    with safe_open(out / runs.STATE, "pt") as file:
        about = json.loads(file.metadata()["state"])
    assert (about["step"], len(about["losses"])) == (
        number,
        (number - 1) % 5 + 1,
    )  # 5 steps an epoch
    assert run_train(tiny_saved, shapes_data, out, *EPOCHS, "--resume") == 0
    assert_same_end(out, straight)


def test_a_row_that_was_cut_short_is_mended(
    tiny_saved, shapes_data, straight, tmp_path, monkeypatch
):
    out = tmp_path / "run"

    def half(rows, epochs, out):
        (out / "metrics.jsonl").write_text('{"epoch": 1, "lo')
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs, "report_epoch", half)
        assert run_train(tiny_saved, shapes_data, out, *EPOCHS) == 130
    assert run_train(tiny_saved, shapes_data, out, *EPOCHS, "--resume") == 0
    assert_same_end(out, straight)


def test_a_second_interrupt_ends_at_once(tiny_saved, shapes_data, tmp_path, monkeypatch, capsys):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    stop_in_step(monkeypatch, 2, twice)
    assert run_train(tiny_saved, shapes_data, tmp_path / "run", *EPOCHS) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "python -m minivit train: interrupted"
    assert not (tmp_path / "run" / runs.STATE).exists()


def test_fp16_goes_on_with_its_scaler(pixels, tmp_path):
    settings = {"epochs": 3, "lr": 1e-2}

    def begin():
        run = start_run(make_trainable(), amp=torch.float16)
        # It overflows at first.
        run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=2)
        return run

    whole, first, second = begin(), begin(), begin()
    train_epochs(whole, pixels, **settings)
    assert whole.step < 9  # some were skipped
    train_epochs(first, pixels, **settings, stop_requested=lambda: bool(first.rows))
    save_state(tmp_path / "state", first, {})
    second.restore(*read_state(tmp_path / "state", {}))
    train_epochs(second, pixels, **settings)
    weights = whole.trainable_weights()
    assert all(torch.equal(p, weights[name]) for name, p in second.trainable_weights().items())
    assert (second.step, second.scaler.state_dict()) == (whole.step, whole.scaler.state_dict())


def test_the_best_epochs_weights_come_back_even_if_it_is_not_the_last(pixels, tmp_path):
    run = start_run(make_trainable())
    train_epochs(run, pixels, lr=1e-2, stop_requested=lambda: bool(run.rows))
    last = run.trainable_weights()
    before = {name: tensor - 1 for name, tensor in last.items()}
    sizes = []
    for best in ({}, last, before):
        run.best = best
        save_state(tmp_path / "state", run, {})
        sizes.append((tmp_path / "state").stat().st_size)
        again = start_run(make_trainable())
        again.restore(*read_state(tmp_path / "state", {}))
        assert all(torch.equal(tensor, again.best[name]) for name, tensor in (best or last).items())
    assert sizes[1] < sizes[2] - 4 * sum(tensor.numel() for tensor in last.values())


def test_a_snapshot_stays_as_it_is_while_training_goes_on(pixels):
    run = start_run(make_trainable())
    train_epochs(run, pixels, lr=1e-2, stop_requested=lambda: bool(run.rows))
    taken, _ = run.snapshot({})
    before = {name: tensor.clone() for name, tensor in taken.items()}
    train_epochs(run, pixels, lr=1e-2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in taken.items())
    after, _ = run.snapshot({})
    assert not any(
        torch.equal(after[name], before[name]) for name in before if name.endswith("exp_avg")
    )


CHANGED = {
    "--lr": (["--lr", "0.01"], "--lr was 0.003, now 0.01"),
    "--epochs": (["--epochs", "5"], "--epochs was 4, now 5"),
    "--blocks": (["--blocks", "9-11"], "--blocks was [10, 11], now [9, 10, 11]"),
    "--batch-size": (["--batch-size", "4"], "--batch-size was 8, now 4"),
    "--seed": (["--seed", "1"], "--seed was 0, now 1"),
    "precision": (["--amp", "bf16"], "precision was None, now torch.bfloat16"),
    "two at once": (
        ["--weight-decay", "0.1", "--layer-decay", "0.5"],
        "--weight-decay was 0.05, now 0.1; --layer-decay was 1.0",
    ),
}


def test_other_settings_that_change_the_mathematics_are_refused_by_name(
    tiny, tiny_saved, shapes_data, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_in_step(patch, 7)
        assert run_train(tiny_saved, shapes_data, out, *EPOCHS) == 130
    before = (out / runs.STATE).read_bytes()
    for flags, message in CHANGED.values():
        assert run_train(tiny_saved, shapes_data, out, *EPOCHS, "--resume", *flags) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    tiny.blocks[0].mlp.fc1.bias.data[0] += 1
    save_pretrained(tiny, tmp_path)
    assert run_train(tmp_path, shapes_data, out, *EPOCHS, "--resume") == 2
    assert "the checksum of the base model was" in capsys.readouterr().err.splitlines()[-1]
    fewer = tmp_path / "fewer"
    shutil.copytree(shapes_data, fewer)
    (fewer / "train" / "red" / "3.png").unlink()
    assert run_train(tiny_saved, fewer, out, *EPOCHS, "--resume") == 2
    assert "the checksum of the photos was" in capsys.readouterr().err.splitlines()[-1]
    assert (out / runs.STATE).read_bytes() == before


def test_what_changes_only_speed_may_change(
    tiny_saved, shapes_data, straight, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_in_step(patch, 7)
        assert run_train(tiny_saved, shapes_data, out, *EPOCHS) == 130
    assert (
        run_train(
            tiny_saved,
            shapes_data,
            out,
            *EPOCHS,
            "--resume",
            "--micro-batch",
            "3",
            "--workers",
            "1",
        )
        == 0
    )
    for a, b in zip(rows_of(out), rows_of(straight)):
        assert a == pytest.approx(b, rel=1e-4)


def test_a_finished_run_is_not_run_again_and_an_absent_one_begins(
    tiny_saved, shapes_data, tmp_path, capsys
):
    out = tmp_path / "run"
    assert run_train(tiny_saved, shapes_data, out, "--epochs", "1", "--resume") == 0
    printed = capsys.readouterr()
    assert f"{out}: there is no run to resume, so a new one begins" in printed.err
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert run_train(tiny_saved, shapes_data, out, "--epochs", "1", "--resume") == 0
    again = capsys.readouterr()
    assert again.out == printed.out.splitlines()[-1] + "\n"
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_without_resume_an_interrupted_run_is_moved_and_can_go_on_there(
    tiny_saved, shapes_data, straight, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_in_step(patch, 2)  # before there are metrics
        assert run_train(tiny_saved, shapes_data, out, *EPOCHS) == 130
    assert run_train(tiny_saved, shapes_data, out, *EPOCHS) == 0
    assert_same_end(out, straight)
    assert read_state(out / "earlier-1" / runs.STATE, {})[1]["step"] == 2
    assert run_train(tiny_saved, shapes_data, out / "earlier-1", *EPOCHS, "--resume") == 0
    assert_same_end(out / "earlier-1", straight)


def test_a_second_run_into_the_same_folder_is_refused_until_the_first_ends(
    tiny_saved, shapes_data, tmp_path, capsys
):
    out = tmp_path / "run"
    out.mkdir()
    hold = "import sys, time; from pathlib import Path; from minivit.system.files import locked\n"
    hold += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    path = {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", hold, out], stdout=subprocess.PIPE, env=os.environ | path
    ) as other:
        assert other.stdout.readline() == b"held\n"
        code = run_train(tiny_saved, shapes_data, out, "--epochs", "1")
        left = sorted(path.name for path in out.iterdir())
        (out / ".1.partial").write_text("left by a killed run")
        other.kill()
    assert code == 2
    assert capsys.readouterr().err == (
        f"python -m minivit train: {out}: another run is writing there;"
        " wait for its end or give another --out\n"
    )
    assert left == [".lock"]
    assert run_train(tiny_saved, shapes_data, out, "--epochs", "1") == 0
    assert not list(out.glob(".*.partial"))


def test_a_full_disk_is_one_line_and_the_last_good_state_stays(
    tiny_saved, shapes_data, straight, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    real = tensors.save_file
    saved = []

    def full(contents, path, metadata):
        saved.append(path)
        if len(saved) == 3:
            path.write_bytes(b"half")
            raise SafetensorError("No space left on device")
        real(contents, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(tensors, "save_file", full)
        assert run_train(tiny_saved, shapes_data, out, *EPOCHS) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        f"python -m minivit train: {out / runs.STATE}: cannot be written (No space left on device)"
    )
    assert sorted(path.name for path in out.iterdir()) == [".lock", "metrics.jsonl", runs.STATE]
    assert run_train(tiny_saved, shapes_data, out, *EPOCHS, "--resume") == 0
    assert_same_end(out, straight)


def test_a_folder_that_cannot_be_written_is_one_line(tiny_saved, shapes_data, capsys):
    assert run_train(tiny_saved, shapes_data, "/sys/run", "--epochs", "1") == 2
    assert capsys.readouterr().err.startswith("python -m minivit train: /sys/run: ")


def test_a_loss_that_is_not_finite_leaves_the_last_good_state(
    tiny_saved, shapes_data, tmp_path, monkeypatch, capsys
):
    out, models, real = tmp_path / "run", [], train.new_state

    def remember(model, **settings):
        models.append(model)
        return real(model, **settings)

    monkeypatch.setattr(train, "new_state", remember)
    stop_in_step(monkeypatch, 12, lambda: models[0].head.weight.data.fill_(torch.nan))
    assert run_train(tiny_saved, shapes_data, out, *EPOCHS) == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith("python -m minivit train: the loss of epoch 3 is nan; try a lower --lr")
    )
    tensors, about = read_state(out / runs.STATE, {})
    assert about["epoch"] == 3
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_a_damaged_state_is_named(tmp_path):
    (tmp_path / "state").write_bytes(b"\x08\x00")
    with pytest.raises(UserError, match="is not the state of a run"):
        read_state(tmp_path / "state", {})


KILL = """
import json, os, random, signal, sys, time
os.environ["OMP_NUM_THREADS"] = "1"
import torch, train, minivit.train
from minivit.figures import plots
torch.set_num_threads(1)
plots.draw_confusion = plots.draw_predictions = lambda path, *_, **__: path.touch()
seed, kills, flags = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
rng, died = random.Random(seed), []

def run(out, moment=None, during_save=None):
    pid = os.fork()
    if pid == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        if during_save is not None:
            nth, after = during_save
            real, seen = os.replace, []
            def replace(*names):
                seen.append(0)
                if len(seen) == nth:
                    if after: real(*names)
                    os.kill(os.getpid(), signal.SIGKILL)
                real(*names)
            os.replace = replace
        os._exit(train.main([*flags, "--out", out, "--resume"]))
    if moment is not None:
        time.sleep(moment)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]

started = time.perf_counter()
assert run("straight") == 0
whole = time.perf_counter() - started
for i in range(kills):
    if i % 2:
        died.append(run(f"run{i}", during_save=(rng.randint(1, 8), rng.random() < 0.5)))
    else:
        died.append(run(f"run{i}", moment=rng.uniform(0.3, 0.95) * whole))
    assert run(f"run{i}") == 0, i
print(json.dumps(died))
"""


@pytest.mark.parametrize("kills", [4, pytest.param(25, marks=[pytest.mark.slow, pytest.mark.long])])
def test_runs_killed_at_any_moment_go_on_to_the_same_bytes(
    tiny_saved, shapes_data, tmp_path, kills
):
    """Kill half of the runs at random times and half in the middle of a save.

    All are forked from one process that has imported torch, which saves seconds for each.
    """
    flags = [
        "--model",
        tiny_saved,
        "--data",
        shapes_data,
        "--amp",
        "off",
        "--device",
        "cpu",
        "--workers",
        "1",
    ]
    flags += ["--batch-size", "8", "--lr", "0.003", *EPOCHS]
    command = [sys.executable, "-c", KILL, str(time.time_ns() % 2**32), str(kills), *flags]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (command, done.stderr)
    assert json.loads(done.stdout).count(signal.SIGKILL) >= kills // 2  # the rest had already ended
    for i in range(kills):
        assert_same_end(tmp_path / f"run{i}", tmp_path / "straight")
