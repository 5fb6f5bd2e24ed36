"""What a run leaves on disk when it is stopped or killed or the disk is full.

A resumed run must end as if nothing had stopped it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

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
    trainable_vector,
    without_times,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from minivit import load_pretrained, save_pretrained, train
from minivit.checkpoints import tensors
from minivit.checkpoints.weights import save_tail
from minivit.errors import UserError
from minivit.figures import plots
from minivit.model import freeze_except
from minivit.settings import TrainSettings
from minivit.system.signals import StopRequested
from minivit.system.workers import worker_pool
from minivit.training import report
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
def test_after_a_signal_resume_ends_as_if_it_had_never_come(
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
    taken = number - 1  # The step that the signal came in is left out.
    assert (about["step"], len(about["losses"])) == (taken, taken % 5)  # 5 steps an epoch
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


def test_a_state_is_saved_after_five_seconds_and_after_the_last_epoch(tmp_path, monkeypatch):
    class State:
        rows = ()

        def snapshot(self, fingerprint, current_weights):
            return {}, fingerprint | {"epoch": self.epoch}

    def write_later(save, path, contents, metadata):
        assert (save, path) == (tensors.save_tensors, tmp_path / runs.STATE)
        saved.append(metadata["epoch"])

    now, saved, reported = 0.0, [], []
    monkeypatch.setattr(train.time, "perf_counter", lambda: now)
    monkeypatch.setattr(runs, "report_epoch", lambda *_: reported.append(now))
    recorder = train.Recorder(TrainSettings(out=str(tmp_path), epochs=5), None, None, write_later)
    monkeypatch.setattr(recorder, "fingerprint", dict)
    state = State()
    for state.epoch in range(1, 7):  # first the head alone, then epochs of two seconds
        recorder.save_and_report(state, {})
        assert state.spent == now
        now += 2
    assert reported == [0, 2, 4, 6, 8, 10]
    assert saved == [1, 4, 6]


def test_a_state_is_saved_when_patience_ends_the_run(
    tiny_saved, shapes_data, tmp_path, monkeypatch
):
    def end_here(recorder, state, *_):
        recorder.write_later(len, ()).result()  # It waits for the state to be written.
        _, about = read_state(out / runs.STATE, {})
        assert about["rows"] == state.rows
        assert len(state.rows) < 30
        ended.append(about["epoch"])
        return False

    out, ended = tmp_path / "run", []
    monkeypatch.setattr(train, "finish", end_here)
    monkeypatch.setattr(train, "SECONDS_BETWEEN_SAVES", 1e9)
    monkeypatch.setattr(runs, "report_result", lambda _: None)
    assert run_train(tiny_saved, shapes_data, out, "--epochs", "40", "--patience", "1") == 0
    assert len(ended) == 1


def test_a_second_interrupt_ends_at_once(tiny_saved, shapes_data, tmp_path, monkeypatch, capsys):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    stop_in_step(monkeypatch, 2, twice)
    assert run_train(tiny_saved, shapes_data, tmp_path / "run", *EPOCHS) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "python -m minivit train: interrupted"
    with safe_open(tmp_path / "run" / runs.STATE, "pt") as file:
        about = json.loads(file.metadata()["state"])
    assert (len(about["rows"]), about["losses"]) == (1, [])  # as it was after the head alone


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
    train_epochs(first, pixels, **settings, stop_requested=lambda: first.epoch > 1)
    save_state(tmp_path / "state", first, {})
    second.restore(*read_state(tmp_path / "state", {}))
    train_epochs(second, pixels, **settings)
    weights = whole.trainable_weights()
    assert all(torch.equal(p, weights[name]) for name, p in second.trainable_weights().items())
    assert (second.step, second.scaler.state_dict()) == (whole.step, whole.scaler.state_dict())


def test_kept_weights_come_back_even_if_they_are_not_the_last(pixels, tmp_path):
    run = start_run(make_trainable())
    train_epochs(run, pixels, lr=1e-2, stop_requested=lambda: run.epoch > 1)
    last = run.trainable_weights()
    before = {name: tensor - 1 for name, tensor in last.items()}
    sizes = []
    for kept in ({}, last, before):
        run.kept = kept
        save_state(tmp_path / "state", run, {})
        sizes.append((tmp_path / "state").stat().st_size)
        again = start_run(make_trainable())
        again.restore(*read_state(tmp_path / "state", {}))
        assert all(torch.equal(tensor, again.kept[name]) for name, tensor in (kept or last).items())
    assert sizes[1] < sizes[2] - 4 * sum(tensor.numel() for tensor in last.values())


def test_the_mean_of_the_last_half_is_the_mean_also_after_resuming(pixels, tmp_path):
    settings = {"epochs": 5, "lr": 1e-2, "keep": "average"}
    whole = start_run(make_trainable())
    after_epoch = []

    def note_weights():
        if len(after_epoch) < whole.epoch - 1:
            after_epoch.append(whole.trainable_weights())
        return False

    train_epochs(whole, pixels, **settings, stop_requested=note_weights)
    for name, mean in whole.kept.items():
        expected = torch.stack([weights[name] for weights in after_epoch[2:]]).mean(0)
        torch.testing.assert_close(mean, expected)

    for num_steps in (4, 13):  # of 3 an epoch: before the mean begins, and within it
        taken = []
        first, second = start_run(make_trainable()), start_run(make_trainable())

        def stop(taken=taken, num_steps=num_steps):
            taken.append(0)
            # It is asked after each step and each epoch.
            return len(taken) >= num_steps + num_steps // 3

        train_epochs(first, pixels, **settings, stop_requested=stop)
        assert first.stopped and first.losses
        save_state(tmp_path / "state", first, {})
        second.restore(*read_state(tmp_path / "state", {}))
        train_epochs(second, pixels, **settings)
        assert all(torch.equal(mean, second.kept[name]) for name, mean in whole.kept.items())


def test_a_stop_while_the_head_alone_is_evaluated_changes_nothing(pixels, tmp_path, monkeypatch):
    """Training starts from the head as it was, not from the fitted one."""
    whole, first, second = (start_run(make_trainable()) for _ in range(3))
    train_epochs(whole, pixels)

    def stop(*_, **__):
        raise StopRequested

    with monkeypatch.context() as patch:
        patch.setattr(train, "predict", stop)
        with pytest.raises(StopRequested):
            train_epochs(first, pixels)
    save_state(tmp_path / "state", first, {})
    second.restore(*read_state(tmp_path / "state", {}))
    train_epochs(second, pixels)
    assert without_times(second.rows) == without_times(whole.rows)
    assert torch.equal(trainable_vector(second.model), trainable_vector(whole.model))


def test_a_snapshot_stays_as_it_is_while_training_goes_on(pixels):
    run = start_run(make_trainable())
    train_epochs(run, pixels, lr=1e-2, stop_requested=lambda: run.epoch > 1)
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
    "--head-lr": (["--head-lr", "0.1"], "--head-lr was 0.001, now 0.1"),
    "--keep": (["--keep", "last"], "--keep was auto, now last"),
    "precision": (["--amp", "bf16"], "precision was None, now torch.bfloat16"),
    "two at once": (
        ["--weight-decay", "0.1", "--layer-decay", "0.5"],
        "--weight-decay was 0.05, now 0.1; --layer-decay was 1.0",
    ),
    "--patience": (["--patience", "2"], "--patience was None, now 2"),
    "--img-size": (["--img-size", "48x32"], "--img-size was [32, 32], now [48, 32]"),
}


def change_config(folder, name, **changes):
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(config | changes))


def change_model(folder):
    """Yield after each change of a base in this folder what the refusal to resume must name."""
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}

    def restore():
        for name, data in whole.items():
            (folder / name).write_bytes(data)

    change_config(folder, "config.json", num_attention_heads=4)
    yield "the model's num_heads was 3, now 4"
    restore()
    change_config(folder, "config.json", layer_norm_eps=1e-5)
    yield "the model's eps was 1e-12, now 1e-05"
    restore()
    change_config(folder, "preprocessor_config.json", image_mean=[0.4, 0.5, 0.5])
    yield "the preprocessing's mean was [0.5, 0.5, 0.5], now [0.4, 0.5, 0.5]"
    restore()
    for name, what in {
        "blocks.0.mlp.fc1.bias": "the checksum of the base model was",
        "blocks.11.mlp.fc1.bias": "the checksum of the weights before training was",
    }.items():
        model = load_pretrained(folder)
        model.get_parameter(name).data[0] += 1
        save_pretrained(model, folder)
        yield what
        restore()


def test_whatever_else_the_result_depends_on_is_refused_by_name(
    tiny_folder, tiny_saved, shapes_data, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_in_step(patch, 7)
        assert run_train(tiny_saved, shapes_data, out, *EPOCHS) == 130
    before = (out / runs.STATE).read_bytes()
    for flags, message in CHANGED.values():
        assert run_train(tiny_saved, shapes_data, out, *EPOCHS, "--resume", *flags) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    for message in change_model(tiny_folder):
        assert run_train(tiny_folder, shapes_data, out, *EPOCHS, "--resume") == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    for i, (photo, name) in enumerate({"train": "photos", "test": "test photos"}.items()):
        fewer = tmp_path / str(i)
        shutil.copytree(shapes_data, fewer)
        (fewer / photo / "red" / "3.png").unlink()
        assert run_train(tiny_saved, fewer, out, *EPOCHS, "--resume") == 2
        assert f"the checksum of the {name} was" in capsys.readouterr().err.splitlines()[-1]
    assert (out / runs.STATE).read_bytes() == before


def test_a_run_on_a_tail_goes_on_only_with_the_weights_of_that_tail(
    tiny_saved, shapes_data, tmp_path, monkeypatch, capsys
):
    assert run_train(tiny_saved, shapes_data, tmp_path / "first", "--epochs", "1") == 0
    tail = tmp_path / "first" / "tail.safetensors"
    flags = (*EPOCHS, "--blocks", "11")  # Block 10, in the tail, is frozen.
    with monkeypatch.context() as patch:
        stop_in_step(patch, 7)
        assert run_train(tail, shapes_data, tmp_path / "run", *flags) == 130
    with safe_open(tail, "pt") as file:
        metadata = file.metadata()
    held = load_file(tail)
    held["blocks.10.mlp.fc1.bias"][0] += 1
    save_file(held, tail, metadata)
    capsys.readouterr()
    assert run_train(tail, shapes_data, tmp_path / "run", *flags, "--resume") == 2
    assert "the checksum of the weights before training was" in capsys.readouterr().err


def test_the_weights_before_training_are_hashed_as_they_were(
    tiny_saved, shapes_data, tmp_path, monkeypatch
):
    """On a CPU they change while they are hashed, in a thread."""

    def hash_late(model):
        is_fitted.wait(30)
        return real_hash(model)

    def fit(*args, **settings):
        head = real_fit(*args, **settings)
        # The thread goes on once the fitted head has been put in place of the untrained one.
        threading.Timer(0.2, is_fitted.set).start()
        return head

    is_fitted = threading.Event()
    real_hash = train.weights.hash_outside_tail
    real_fit = train.fit_linear_head
    flags = ("--blocks", "none")
    saved = []
    real_save = train.RunState.snapshot

    def note(state, settings, weights=None):
        saved.append(dict(settings))
        return real_save(state, settings, weights)

    monkeypatch.setattr(train.RunState, "snapshot", note)
    assert run_train(tiny_saved, shapes_data, tmp_path / "noted", *flags) == 0
    monkeypatch.setattr(train.weights, "hash_outside_tail", hash_late)
    monkeypatch.setattr(train, "fit_linear_head", fit)
    assert run_train(tiny_saved, shapes_data, tmp_path / "late", *flags) == 0
    assert is_fitted.is_set()
    assert saved[0] == saved[1]


def test_a_state_that_says_too_little_is_refused(tmp_path):
    """That of an earlier version, which compared less, might go on with another image size."""
    run = start_run(make_trainable())
    save_state(tmp_path / "state", run, {"--lr": 0.1})
    assert read_state(tmp_path / "state", {"--lr": 0.1})[1]["epoch"] == 1
    with pytest.raises(UserError, match="by an earlier version .* did not note --img-size; finish"):
        read_state(tmp_path / "state", {"--lr": 0.1, "--img-size": [32, 32]})


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
    assert "\r" not in printed.err  # Progress bars are for terminals, not for logs.
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert run_train(tiny_saved, shapes_data, out, "--epochs", "1", "--resume") == 0
    again = capsys.readouterr()
    assert again.out == printed.out.splitlines()[-1] + "\n"
    same = ("--model", f"{tiny_saved}/", "--data", f"{shapes_data}/../{shapes_data.name}")
    assert run_train(tiny_saved, shapes_data, out, "--epochs", "1", "--resume", *same) == 0
    for flags, message in {
        ("--lr", "0.01"): "--lr was 0.003, now 0.01",
        ("--img-size", "48"): "--img-size was None, now [48, 48]",
        ("--amp", "bf16"): "precision was float32, now bfloat16",
    }.items():
        assert run_train(tiny_saved, shapes_data, out, "--epochs", "1", "--resume", *flags) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert f"holds a finished run with other settings: {message};" in line
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def settle_nowhere(*flags):
    """Return the settings of a run whose model and data are not there."""
    return ["--model", "no/such", "--data", "/no/such", "--device", "cpu", *map(str, flags)]


OTHERS = {
    "README.md": "# My photos",
    "config.json": '{"mine": true}',
    "model.safetensors": "weights",
    "metrics.jsonl": '{"step": 1}',
    "summary.json": '{"best_epoch": 3}',
    runs.STATE: "mine",
    "earlier-2/cat.jpg": "a photo",
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("resume", [(), ("--resume",)], ids=["new", "resume"])
def test_files_of_others_are_refused_before_anything_is_read(tmp_path, capsys, name, resume):
    import train as command

    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(OTHERS[name])
    (tmp_path / "notes.txt").write_text("mine")  # A run writes no such file.
    before = sorted(tmp_path.rglob("*"))
    assert command.main(settle_nowhere("--out", tmp_path, *resume)) == 2
    assert capsys.readouterr().err == (
        f"python -m minivit train: {tmp_path}: holds {name.partition('/')[0]}, which minivit did "
        "not write there and would overwrite; move that away, or give another --out\n"
    )
    assert sorted(tmp_path.rglob("*")) == before
    assert path.read_text() == OTHERS[name]


def test_a_folder_that_is_needed_otherwise_is_refused(
    tiny_folder, shapes_data, tmp_path, capsys, monkeypatch
):
    model = load_pretrained(tiny_folder)
    for folder in ("run", "elsewhere"):
        (tmp_path / folder).mkdir()
        freeze_except(model, [11])
        save_tail(model, tmp_path / folder / "tail.safetensors")
        (tmp_path / folder / "metrics.jsonl").write_text("")
    link = tmp_path / "link"
    link.symlink_to(tiny_folder)
    (tmp_path / "file").write_text("mine")
    tail = tmp_path / "run" / "tail.safetensors"
    whole = [(path, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file()]
    for base, data, out, message in (
        (tiny_folder, shapes_data, tiny_folder, "--model reads files of this folder"),
        (link, shapes_data, tiny_folder, "--model reads files of this folder"),
        (tail, shapes_data, tmp_path / "run", "--model reads files of this folder"),
        (tmp_path / "elsewhere" / "tail.safetensors", shapes_data, tiny_folder, "--model reads"),
        (tiny_folder, shapes_data, shapes_data, "is the folder of the photos too"),
        (tiny_folder, shapes_data, tmp_path / "file", "expected a folder, found a file"),
        (tiny_folder, shapes_data, tmp_path / "file" / "run", "expected a folder, found a file"),
    ):
        for flags in ((), ("--resume",), ("--dry-run",)):
            assert run_train(base, data, out, *flags) == 2
            assert message in capsys.readouterr().err.splitlines()[-1]
    assert [(path, path.read_bytes()) for path, _ in whole] == whole
    # Neither a folder inside of the base's nor the earlier run of a folder is in the way.
    monkeypatch.chdir(tmp_path / "elsewhere")
    for base, out in (
        (tiny_folder, tiny_folder / "tuned"),
        (tiny_folder, "."),
        (tail, "earlier-1"),
    ):
        runs.check_inputs(TrainSettings(model=str(base), data=str(shapes_data), out=str(out)))


def test_a_failed_start_and_a_dry_run_leave_nothing(tiny_folder, shapes_data, tmp_path, capsys):
    out = tmp_path / "a" / "run"
    before = sorted(tmp_path.rglob("*"))
    assert run_train(tiny_folder, tmp_path / "nothing", out) == 2
    assert run_train(tmp_path / "nothing", shapes_data, out) == 2
    assert run_train(tiny_folder, shapes_data, out, "--blocks", "12") == 2
    assert run_train(tiny_folder, shapes_data, out, "--dry-run") == 0
    assert run_train(tiny_folder, shapes_data, out, "--dry-run", "--resume") == 0
    assert sorted(tmp_path.rglob("*")) == before


class Killed(BaseException):
    pass


def kill_at(patch, number):
    """Raise Killed in place of a change on the disk, after as many as `number`."""
    calls = []

    def counted(real):
        def call(*args, **kwargs):
            calls.append(0)
            if len(calls) > number:
                raise Killed
            return real(*args, **kwargs)

        return call

    for owner, name in (
        (os, "link"),
        (Path, "mkdir"),
        (Path, "touch"),
        (os, "replace"),
        (os, "unlink"),
        (Path, "unlink"),
        (Path, "rmdir"),
    ):
        patch.setattr(owner, name, counted(getattr(owner, name)))
    return calls


@pytest.mark.parametrize("links", [True, False], ids=["links", "copies"])
def test_a_run_that_is_moved_away_is_always_whole(tmp_path, monkeypatch, links):
    """Kill the move before each of its changes on the disk, and the move after it, too."""

    def no_links(*_, **__):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    state = {"state": "{}"}
    tensors.save_tensors(tmp_path / runs.STATE, {"a": torch.ones(1)}, state)
    saved = (tmp_path / runs.STATE).read_bytes()
    run = {name: f"the run's {name}" for name in runs.RUN_FILES}
    run["metrics.jsonl"] = '{"epoch": 1}\n'
    run["summary.json"] = '{"best_epoch": 1, "settings": {}}'
    places = set()
    for number in range(60):
        out = tmp_path / f"out{number}"
        out.mkdir()
        (out / "notes.txt").write_text("mine")
        for name, text in run.items():
            (out / name).write_text(text)
        (out / runs.STATE).write_bytes(saved)
        try:
            with monkeypatch.context() as patch:
                calls = kill_at(patch, number)
                runs.keep_earlier_run(out)
        except Killed:
            pass
        whole_run = run.keys() | {runs.STATE}
        in_place = whole_run <= {path.name for path in out.iterdir()}
        moved = (out / "earlier-1").exists()
        places.add((in_place, moved))
        assert in_place or moved
        runs.check_folder(out)  # What is left of the run is still known to be a run's.
        with contextlib.suppress(Killed), monkeypatch.context() as patch:
            kill_at(patch, number // 2)
            runs.finish_moving(out)
        runs.check_folder(out)
        runs.finish_moving(out)
        if not moved:
            assert {path.name for path in out.iterdir()} == whole_run | {"notes.txt"}
            runs.keep_earlier_run(out)
        assert sorted(path.name for path in out.iterdir()) == ["earlier-1", "notes.txt"]
        earlier = {path.name for path in (out / "earlier-1").iterdir()}
        assert earlier == whole_run
        assert all((out / "earlier-1" / name).read_text() == text for name, text in run.items())
        if len(calls) <= number:
            break
    assert places == {(True, False), (True, True), (False, True)}
    assert len(calls) <= number  # The last one was not killed.


def test_what_appears_while_a_run_trains_is_not_overwritten(
    tiny_saved, shapes_data, straight, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_in_step(patch, 20, lambda: (out / "README.md").write_text("mine"))
        assert run_train(tiny_saved, shapes_data, out, *EPOCHS) == 2
    assert "holds README.md, which minivit did not write" in capsys.readouterr().err
    assert run_train(tiny_saved, shapes_data, out, *EPOCHS, "--resume") == 2
    assert run_train(tiny_saved, shapes_data, out, *EPOCHS) == 2
    assert (out / "README.md").read_text() == "mine"
    (out / "README.md").rename(out / "notes.md")
    assert run_train(tiny_saved, shapes_data, out, *EPOCHS, "--resume") == 0
    assert_same_end(out, straight)
    assert (out / "notes.md").read_text() == "mine"


def test_a_disk_that_fills_up_at_the_end_costs_nothing(
    tiny_saved, shapes_data, straight, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    real = os.replace
    names = ("tail.safetensors", "model.safetensors", "config.json", "classes.csv", "README.md")
    for name in (*names, "summary.json"):

        def replace(source, target, name=name):
            if Path(target).name == name:
                raise OSError(errno.ENOSPC, "No space left on device", str(target))
            real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            assert run_train(tiny_saved, shapes_data, out, *EPOCHS, "--resume") == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last == f"python -m minivit train: {out / name}: No space left on device"
        assert (out / runs.STATE).exists()
        assert not list(out.glob(".*.partial"))
    assert run_train(tiny_saved, shapes_data, out, *EPOCHS, "--resume") == 0
    assert_same_end(out, straight)


def test_a_figure_that_fails_costs_a_figure(
    tiny_saved, shapes_data, straight, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    real = plots.draw_confusion

    def fail(path, *_):
        assert json.loads((path.parent / "summary.json").read_text())["best_epoch"]
        assert load_pretrained(path.parent).labels
        assert (path.parent / "README.md").exists()
        raise failure

    outside = (OSError(errno.ENOSPC, "No space left on device"), MemoryError())
    for failure in (*outside, RuntimeError("In FT2Font: Can not load face")):  # noqa: B007
        with monkeypatch.context() as patch:
            patch.setattr(plots, "draw_confusion", fail)
            assert run_train(tiny_saved, shapes_data, out, *EPOCHS, "--resume") == 0
        printed = capsys.readouterr()
        line = next(line for line in printed.err.splitlines() if "cannot be drawn" in line)
        assert line.startswith(f"{out / 'confusion.png'}: cannot be drawn (")
        assert printed.out.splitlines()[-1].startswith("test accuracy")
        assert (out / "predictions.png").exists()
        assert (out / "curves.png").exists()
        assert not (out / "confusion.png").exists()
    failure = ZeroDivisionError("a defect of ours")
    with monkeypatch.context() as patch:
        patch.setattr(plots, "draw_confusion", fail)
        with pytest.raises(ZeroDivisionError):
            run_train(tiny_saved, shapes_data, out, *EPOCHS, "--resume")
    assert plots.draw_confusion is real
    assert run_train(tiny_saved, shapes_data, out, *EPOCHS, "--resume") == 0
    assert_same_end(out, straight)


def test_figures_of_workers_that_were_killed_are_named(tmp_path, capsys):
    with worker_pool(1, "json") as pool:
        figures = {"curves.png": report.submit(pool, os._exit, 1)}
        figures["curves.png"].exception()
        figures["confusion.png"] = report.submit(pool, print, "too late")
        assert not report.wait_for_figures(figures, tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert sum("cannot be drawn" in line for line in lines) == 2


def test_without_resume_an_interrupted_run_is_moved_and_can_go_on_there(
    tiny_saved, shapes_data, straight, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_in_step(patch, 2)  # before there are metrics
        assert run_train(tiny_saved, shapes_data, out, *EPOCHS) == 130
    assert run_train(tiny_saved, shapes_data, out, *EPOCHS) == 0
    assert_same_end(out, straight)
    assert read_state(out / "earlier-1" / runs.STATE, {})[1]["step"] == 1
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
        os.utime(out / ".1.partial", (0, 0))
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
        patch.setattr(train, "SECONDS_BETWEEN_SAVES", 0)
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
    assert capsys.readouterr().err.startswith(
        "python -m minivit train: /sys/run: cannot be written to"
    )


def test_a_loss_that_is_not_finite_leaves_the_last_good_state(
    tiny_saved, shapes_data, tmp_path, monkeypatch, capsys
):
    out, models, real = tmp_path / "run", [], train.new_state

    def remember(model, **settings):
        models.append(model)
        return real(model, **settings)

    monkeypatch.setattr(train, "SECONDS_BETWEEN_SAVES", 0)
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
from minivit.figures import panels, plots
torch.set_num_threads(1)
plots.draw_confusion = panels.draw_predictions = lambda path, *_, **__: path.touch()
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
        minivit.train.SECONDS_BETWEEN_SAVES = seconds_between_saves
        os._exit(train.main([*flags, "--out", out, "--resume"]))
    if moment is not None:
        time.sleep(moment)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]

started = time.perf_counter()
seconds_between_saves = 5
assert run("straight") == 0
whole = time.perf_counter() - started
for i in range(kills):
    seconds_between_saves = rng.choice([0, 5])
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
