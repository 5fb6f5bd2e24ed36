"""SIGINT and SIGTERM end every command within two seconds, in every phase, with what it promises.

One process imports torch and forks a child for each command. A child sends itself the signal at a
moment of its own: when it opens or renames a file, calls a function, or waits in one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import ROOT, draw_photo
from safetensors.torch import load_file
from test_distributed import free_port

from minivit.errors import UserError
from minivit.system import files, signals
from minivit.tools.demo.drawings import draw_pets
from minivit.training import run_folder
from minivit.training.features import FeatureExtractor

LIMIT = 2.0  # seconds from a signal to the end
CPU = ["--device", "cpu", "--amp", "off"]

# A moment is [event, what, n]: the n-th time that an audit event's path ends in `what`, or that
# the function `what` is called ("call"), or half a second after that ("in").
HARNESS = """
import json, os, signal, sys, threading, time, traceback
from pkgutil import resolve_name
import torch, minivit.figures.plots, minivit.train, minivit.infer, minivit.tools.demo.command
import minivit.tools.score.figure, minivit.tools.study.figure
from minivit import __main__, cli

def strike(job):
    with open(job["name"] + ".time", "w") as file:
        file.write(str(time.monotonic()))
    os.kill(os.getpid(), job["number"])

def prepare(job):
    event, what, n = job["moment"]
    count = 0
    def happens():
        nonlocal count
        count += 1
        if count == n:
            strike(job)
    if event in ("call", "in"):
        owner, _, name = what.rpartition(".")
        owner = resolve_name(owner)
        function = getattr(owner, name)
        def called(*args, **kwargs):
            if event == "in":
                threading.Timer(0.5, happens).start()
            else:
                happens()
            return function(*args, **kwargs)
        setattr(owner, name, called)
    else:
        def hook(name, arguments):
            if name == event and any(str(part).endswith(what) for part in arguments[:2]):
                happens()
        sys.addaudithook(hook)

def run(job):
    os.setsid()
    os.chdir(job["cwd"])
    sys.stdout, sys.stderr = open(job["name"] + ".out", "w", 1), open(job["name"] + ".err", "w", 1)
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stderr.fileno(), 2)
    os.environ.update(job["env"])
    minivit.system.distributed.ANNOUNCE_AFTER = 0.1
    minivit.tools.demo.command.PER_BREED = (12, 4)
    minivit.train.SECONDS_BETWEEN_SAVES = 0
    sys.argv = ["minivit", *job["argv"]]
    if job["moment"]:
        prepare(job)
    cli.start(lambda: __main__.main(job["argv"]))

def be_peer(port):
    # Come, and never do anything.
    store = torch.distributed.TCPStore("127.0.0.1", port, 2, False)
    store.add("come", 1)
    time.sleep(60)

for line in sys.stdin:
    job = json.loads(line)
    if job["peer"]:
        peer = os.fork()
        if peer == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            be_peer(job["peer"])
    child = os.fork()
    if child == 0:
        try:
            run(job)
        except BaseException:
            traceback.print_exc()
        os._exit(99)
    _, status = os.waitpid(child, 0)
    ended = time.monotonic()
    if job["peer"]:
        os.kill(peer, signal.SIGKILL)
        os.waitpid(peer, 0)
    alive = True
    while alive and time.monotonic() < ended + 3:
        try:
            os.killpg(child, 0)
            time.sleep(0.02)
        except ProcessLookupError:
            alive = False
    print(json.dumps([os.waitstatus_to_exitcode(status), ended, alive]), flush=True)
"""


@dataclass
class Ended:
    """How a command ended."""

    code: int
    seconds: float | None  # from the signal to the end; None: the moment did not come
    out: str
    err: str


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """A function that runs a command in a child process, with a signal at some moment."""
    folder = tmp_path_factory.mktemp("signals")
    harness = subprocess.Popen(
        [sys.executable, "-c", HARNESS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    count = 0

    def run(argv, cwd, moment=None, number=signal.SIGTERM, peer=None, **variables) -> Ended:
        nonlocal count
        count += 1
        name = str(folder / str(count))
        job = {"argv": list(map(str, argv)), "cwd": str(cwd), "number": number, "moment": moment}
        job |= {"name": name, "peer": peer, "env": variables}
        harness.stdin.write(json.dumps(job) + "\n")
        harness.stdin.flush()
        code, ended, has_orphans = json.loads(harness.stdout.readline())
        out, err = (Path(f"{name}.{stream}").read_text() for stream in ("out", "err"))
        assert not has_orphans, err
        struck = Path(f"{name}.time")
        seconds = ended - float(struck.read_text()) if struck.exists() else None
        return Ended(code, seconds, out, err)

    with harness:
        yield run
        harness.stdin.close()


def assert_interrupted(ended: Ended, cwd: Path) -> None:
    """Check that a command ended in time, in one line and without half-written files."""
    assert ended.seconds is not None, ended.out + ended.err
    assert (ended.code, ended.seconds < LIMIT) == (130, True), ended
    assert "Traceback" not in ended.err
    assert ended.err.splitlines()[-1].startswith("interrupted")
    for path in cwd.rglob("*"):
        assert not path.name.endswith(".partial"), path


# Training


@pytest.fixture
def data(shapes_data, tmp_path) -> Path:
    """A folder of its own, so that its photos are decoded."""
    return shutil.copytree(
        shapes_data, tmp_path / "data", ignore=shutil.ignore_patterns(".minivit")
    )


def training(tiny_saved, data, *flags) -> list:
    known = ["--model", tiny_saved, "--data", data, "--out", "run", *CPU, "--epochs", "3"]
    return ["train", *known, "--batch-size", "8", "--lr", "0.003", *flags]


@pytest.fixture(scope="module")
def straight(command, tiny_saved, shapes_data, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    assert command(training(tiny_saved, shapes_data), folder).code == 0
    return folder / "run"


FEATURES = "minivit.training.features.FeatureExtractor.compute"
# The moment, and where the run then goes on; None: it has not begun.
TRAINING = {
    "loading": (["open", "model.safetensors", 1], None),
    "decoding": (["open", "red/7.png", 1], None),
    "first evaluation": (["call", FEATURES, 1], "epoch 1, after 0 of its steps"),
    "the head alone": (
        ["call", "minivit.train.fit_linear_head", 1],
        "epoch 1, after 0 of its steps",
    ),
    "a step": (["call", "minivit.training.step.train_step", 2], "epoch 1, after 1 of its steps"),
    # The head alone is evaluated on both splits before.
    "evaluation": (["call", "minivit.train.predict", 3], "epoch 1, after 5 of its steps"),
    "saving": (["os.rename", "state.safetensors", 3], "epoch 2, after"),  # two for each file
    "testing": (["call", "minivit.train.predict_photos", 1], "epoch 4, after 0 of its steps"),
    "writing weights": (["os.rename", "tail.safetensors", 1], "epoch 4, after 0 of its steps"),
    "drawing": (["os.rename", "confusion.png", 1], "epoch 4, after 0 of its steps"),
}


@pytest.mark.parametrize("phase", TRAINING)
def test_training_ends_in_time_and_resumes_to_the_same_bytes(
    phase, command, tiny_saved, data, straight, tmp_path
):
    moment, where = TRAINING[phase]
    number = signal.SIGINT if phase in ("a step", "decoding", "drawing") else signal.SIGTERM
    ended = command(training(tiny_saved, data), tmp_path, moment, number)
    assert_interrupted(ended, tmp_path)
    assert (tmp_path / "run" / run_folder.STATE).exists() == (where is not None)
    resumed = command(training(tiny_saved, data, "--resume"), tmp_path)
    assert resumed.code == 0, resumed.err
    if where is not None:
        assert f"going on in {where}" in resumed.err
    for name in ("model.safetensors", "tail.safetensors"):
        ours, expected = load_file(tmp_path / "run" / name), load_file(straight / name)
        assert all(ours[key].equal(tensor) for key, tensor in expected.items())


def test_an_interrupted_step_or_evaluation_says_how_to_go_on(command, tiny_saved, data, tmp_path):
    moment, _ = TRAINING["a step"]
    ended = command(training(tiny_saved, data, "--micro-batch", "2"), tmp_path, moment)
    assert_interrupted(ended, tmp_path)
    assert ended.err.splitlines()[-1] == (
        "interrupted; all is saved in run: the same command with --resume goes on"
    )
    assert ended.out.count("epoch 1/3") == 0


# The other commands


@pytest.fixture(scope="module")
def drawings(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("drawings")
    draw_pets(root, per_breed=(5, 2), seed=0, workers=2)
    return root


@pytest.fixture(scope="module")
def twenty(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(20):
        draw_photo(60, 50, i).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def places(drawings, twenty, tiny_saved) -> dict[str, Path]:
    """What the words in capitals below stand for."""
    return {"DRAWINGS": drawings, "PHOTOS": twenty, "TINY": tiny_saved}


SCORE = ["score", "--model", "TINY", "--data", "DRAWINGS", *CPU, "--blocks", "11"]
DROP = ["drop", "--model", "TINY", "--data", "DRAWINGS", *CPU]
SERVE = ["serve", "--model", "TINY", "--port", "0", *CPU]
STUDY = ["study", "--model", "TINY", "--data", "DRAWINGS", *CPU, "--blocks", "11", "--seeds", "1"]
STUDY += ["--shots", "2", "--epochs", "4"]
INFER = ["infer", "PHOTOS", "--model", "TINY", "--layers", "11", *CPU, "--workers", "2"]
OTHERS = {
    "infer, loading": (INFER, ["open", "model.safetensors", 1], signal.SIGTERM),
    "infer, decoding": (INFER, ["open", "3.png", 1], signal.SIGINT),
    "infer, printing": (INFER, ["call", "minivit.infer.report", 2], signal.SIGTERM),
    "score, reading masks": (SCORE, ["open", "Beagle_6.png", 1], signal.SIGINT),
    "score, writing": (SCORE, ["os.rename", "score.json", 1], signal.SIGTERM),
    "drop, reading masks": (DROP, ["open", "Beagle_6.png", 1], signal.SIGTERM),
    "serve, loading": (SERVE, ["open", "model.safetensors", 1], signal.SIGINT),
    "serve, waiting": (
        SERVE,
        ["in", "minivit.tools.serve.server.Server.serve_forever", 1],
        signal.SIGTERM,
    ),
    "study, features": (STUDY, ["call", "minivit.model.ViT.run_blocks", 3], signal.SIGTERM),
    "study, a step": (STUDY, ["call", "minivit.training.step.train_step", 2], signal.SIGINT),
    "study, writing": (STUDY, ["os.rename", "study.csv", 1], signal.SIGTERM),
    "demo, drawing": (
        ["demo"],
        ["call", "minivit.tools.demo.scenes.draw_scene", 9],
        signal.SIGTERM,
    ),
    "demo, a step": (["demo"], ["call", "minivit.training.step.train_step", 3], signal.SIGTERM),
}


@pytest.mark.parametrize("phase", OTHERS)
def test_every_command_ends_in_time(phase, command, places, tmp_path):
    argv, moment, number = OTHERS[phase]
    argv = [places.get(word, word) for word in argv]
    assert_interrupted(command(argv, tmp_path, moment, number), tmp_path)
    if phase == "demo, a step":
        assert (tmp_path / "runs" / "demo" / "run" / run_folder.STATE).exists()
    for path in tmp_path.rglob("*.json"):
        json.loads(path.read_text())


# Waiting for other processes


@pytest.mark.parametrize("argv", [INFER, ["train", "--model", "demo"]], ids=["infer", "train"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_wait_for_processes_that_do_not_come_ends_in_time(argv, rank, command, places, tmp_path):
    """This is what happens with the variables that an earlier job has left in the shell."""
    argv = [places.get(word, word) for word in argv]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    moment = ["in", "minivit.system.distributed.join_others", 1]
    number = (signal.SIGINT, signal.SIGTERM)[rank]
    ended = command(argv, tmp_path, moment, number, RANK=str(rank), WORLD_SIZE="2", **place)
    assert_interrupted(ended, tmp_path)
    waiting = f"waiting for 1 other process at 127.0.0.1:{place['MASTER_PORT']}\n"
    assert ended.err == f"{waiting}\ninterrupted\n"


WAITS = {
    "at the end of infer": (INFER, "minivit.system.distributed.wait_for_all_ranks"),
    "inside torch": (["train", "--model", "demo"], "torch.distributed.init_process_group"),
}


@pytest.mark.parametrize("where", WAITS)
def test_a_wait_for_a_process_that_hangs_ends_in_time(where, command, twenty, places, tmp_path):
    argv, function = WAITS[where]
    if argv[0] == "infer":
        argv = ["infer", *(twenty / f"{i}.png" for i in range(4)), *argv[2:]]
    argv = [places.get(word, word) for word in argv]
    port = free_port()
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ended = command(
        argv, tmp_path, ["in", function, 1], peer=port, RANK="0", WORLD_SIZE="2", **place
    )
    assert_interrupted(ended, tmp_path)
    if argv[0] == "infer":
        assert ended.out.count(".png\n") == 4  # its own two photos and their figures
        assert f"waiting for 1 other process at 127.0.0.1:{port} to finish\n" in ended.err


# What is not a command

PROGRAM = """
import hashlib, os, signal, sys, threading, time
from minivit import cli
from minivit.errors import UserError
from minivit.system import files, signals
def wait_in_c():
    print("waiting", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
def main():
    {line}
    return 0
cli.start(main)
"""


def end_program(line, cwd, number=signal.SIGTERM) -> tuple[int, str, float]:
    """Send a signal to a program once it has printed a line; return how and when it ended."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(line=line)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as process:
        process.stdout.readline()
        sent = time.monotonic()
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    return process.returncode, err, time.monotonic() - sent


@pytest.mark.parametrize(
    "line", ["wait_in_c()", "with signals.stop_requests(): wait_in_c()"], ids=["at once", "a run"]
)
def test_a_call_that_python_cannot_interrupt_is_ended(line, tmp_path):
    code, err, seconds = end_program(line, tmp_path)
    assert (code, err) == (130, "\ninterrupted\n")
    assert seconds < LIMIT


def test_a_request_after_the_last_question_is_not_lost(tmp_path):
    line = "with signals.stop_requests(): print(1, flush=True); time.sleep(1)"
    code, err, _ = end_program(line, tmp_path)
    assert (code, err) == (130, "\ninterrupted\n")


def test_a_signal_is_held_back_while_a_run_is_saved(tmp_path):
    line = "with signals.held_back(): print(1, flush=True); time.sleep(1)"
    assert end_program(line, tmp_path)[:2] == (0, "")


def test_a_run_in_another_thread_leaves_signals_alone():
    handlers = [signal.getsignal(number) for number in signals.SIGNALS]
    answers = []

    def run():
        with signals.stop_requests() as stop_requested:
            answers.append(stop_requested())
            answers.append([signal.getsignal(number) for number in signals.SIGNALS])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert answers == [False, handlers]


def test_a_run_restores_the_handlers_that_were_there():
    handlers = [signal.getsignal(number) for number in signals.SIGNALS]
    with signals.stop_requests() as stop_requested:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_requested()
        with pytest.raises(signals.StopRequested):
            signals.stop_here()
    assert [signal.getsignal(number) for number in signals.SIGNALS] == handlers
    signals.stop_here()  # There is no run.


def test_ranks_that_evaluate_together_have_more_time_than_a_step(monkeypatch):
    ended = []
    monkeypatch.setattr(signals, "end_now", lambda *_: ended.append(time.monotonic()))
    monkeypatch.setattr(signals, "EVALUATION_LIMIT", 0.8)
    monkeypatch.setattr(signals, "STEP_LIMIT", 0.5)
    monkeypatch.setattr("minivit.system.distributed.world_size", lambda: 2)
    with signals.stop_requests() as run:
        started = time.monotonic()
        with signals.during_evaluation():
            watch = threading.Thread(target=run.wait_until_seen)
            watch.start()
            while not ended:
                time.sleep(0.01)
            run.is_seen = True
            watch.join()
    assert ended[0] - started == pytest.approx(0.8 - signals.HANDLER_LIMIT, abs=0.15)


def test_a_wait_for_the_lock_of_another_process_is_bounded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "LOCK_LIMIT_S", 0.2)
    holder = f"""
from pathlib import Path
from minivit.system.files import locked
with locked(Path({str(tmp_path)!r})):
    print(1, flush=True)
    input()
"""
    command = [sys.executable, "-c", holder]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, **pipes, text=True, env=environ) as process:
        process.stdout.readline()
        with (
            pytest.raises(UserError, match="still held by another process after"),
            files.locked(tmp_path, wait=True),
        ):
            pass
        process.communicate("\n")
    assert capsys.readouterr().err.startswith("waiting for another process to release")


def test_features_are_left_in_the_middle(tiny, pixels):
    with signals.stop_requests():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(signals.StopRequested):
            FeatureExtractor(tiny, 10, batch=2).compute(pixels[0], torch.arange(9))
