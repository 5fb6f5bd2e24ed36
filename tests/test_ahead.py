"""Photos that are decoded in another process while the one that trains imports torch."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, draw_photo, make_pets
from test_workers import is_running

from minivit import Preprocess
from minivit import train as train_job
from minivit.checkpoints.hub import DEMO
from minivit.data import preprocess, store
from minivit.data.datasets import load_data
from minivit.errors import UserError
from minivit.settings import TrainSettings
from minivit.system.files import locked
from minivit.training import ahead

PREPROCESS = Preprocess()  # the demo's


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """Two classes of photos that are large enough for processes to start."""
    folder = tmp_path_factory.mktemp("drawn")
    draw_photo(760, 500).save(folder / "photo.bmp")
    for split, count in (("train", 6), ("val", 2), ("test", 4)):
        for name in ("cat", "dog"):
            (folder / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                os.link(folder / "photo.bmp", folder / "data" / split / name / f"{i}.bmp")
    return folder / "data"


@pytest.fixture
def data(drawn, tmp_path) -> Path:
    return shutil.copytree(drawn, tmp_path / "data", copy_function=os.link)


@pytest.fixture
def opened(monkeypatch) -> list[Path]:
    """The photos that this process has decoded."""
    seen = []
    monkeypatch.setattr(preprocess, "open_photo", seen.append)
    return seen


@pytest.fixture
def beside_torch(monkeypatch):
    """Let photos be decoded ahead although torch has been imported."""
    monkeypatch.setattr(ahead, "sys", SimpleNamespace(modules={}))


def settings_for(data, **changes) -> TrainSettings:
    return TrainSettings(**{"model": "demo", "data": str(data), "workers": 2, **changes})


def decode(data, **changes) -> list[int]:
    """Decode ahead, but in this process; return what was sent to the one that waits."""
    sent: list[int] = []
    sender = SimpleNamespace(send=sent.append)
    with contextlib.suppress(UserError, OSError):  # The process that trains runs into them, too.
        ahead._decode(settings_for(data, **changes), sender)
    return sent


def files_of_store(data) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (data / ".minivit").iterdir()}


def prepare(data, **changes):
    wanted = {"workers": 2, "cap_gib": 1.0} | changes
    return store.prepare(load_data(data, seed=0), PREPROCESS, **wanted)


# The process as a whole


def test_the_process_decodes_all_photos_and_training_none(data, beside_torch, opened):
    with ahead.decode_ahead(settings_for(data)) as wait_for_photos:
        wait_for_photos()
        prepare(data)
    assert opened == []
    assert sorted(path.suffix for path in (data / ".minivit").iterdir()) == ["", ".json", ".npy"]


def wait_until_begun(data) -> None:
    """Wait until the process has begun to write the store."""
    deadline = time.monotonic() + 20
    while not list(data.glob(".minivit/.*.partial")):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_process_that_is_not_waited_for_ends_and_leaves_nothing(data, beside_torch):
    with pytest.raises(UserError), ahead.decode_ahead(settings_for(data)):
        wait_until_begun(data)
        raise UserError("a mistake in another flag")
    assert not (data / ".minivit").exists()


def test_a_folder_that_was_there_before_stays(data, beside_torch):
    (data / ".minivit").mkdir()
    (data / ".minivit" / ".lock").touch()
    with ahead.decode_ahead(settings_for(data)):
        pass
    assert (data / ".minivit" / ".lock").exists()


NOT_WORTH_IT = {
    "a dry run": {"dry_run": True},
    "a run that goes on": {"resume": True},
}


@pytest.mark.parametrize("changes", NOT_WORTH_IT.values(), ids=NOT_WORTH_IT)
def test_no_process_starts_for(changes, data, beside_torch, monkeypatch):
    monkeypatch.setattr(ahead, "silent_process", None)
    with ahead.decode_ahead(settings_for(data, **changes)) as wait_for_photos:
        assert wait_for_photos is None


def test_no_process_starts_for_another_rank_or_beside_torch(data, monkeypatch):
    monkeypatch.setattr(ahead, "silent_process", None)
    with ahead.decode_ahead(settings_for(data)) as wait_for_photos:
        assert wait_for_photos is None
    monkeypatch.setattr(ahead, "sys", SimpleNamespace(modules={}))
    monkeypatch.setenv("RANK", "1")
    with ahead.decode_ahead(settings_for(data)) as wait_for_photos:
        assert wait_for_photos is None


PARENT = """
import os, sys, time
from minivit.settings import TrainSettings
from minivit.training import ahead
settings = TrainSettings(model="demo", data=sys.argv[1], workers=2)
with ahead.decode_ahead(settings):
    print(os.getpid(), flush=True)
    time.sleep(60)
"""


def children(pid: int) -> list[int]:
    """Return the processes that a process has started, and those that they have."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *children(int(child))]
    return found


def niceness(pid: int) -> int:
    return os.getpriority(os.PRIO_PROCESS, pid)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="asks Linux for processes")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_parent_leaves_no_process_and_no_file(data, number):
    command = [sys.executable, "-c", PARENT, str(data)]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, env=environ) as parent:
        pid = int(parent.stdout.readline())
        wait_until_begun(data)
        deadline = time.monotonic() + 10
        started = children(pid)
        assert max(map(niceness, started)) == niceness(pid) + ahead.NICENESS
        parent.send_signal(number)
        while alive := [process for process in started if is_running(process)]:
            assert time.monotonic() < deadline, alive
            time.sleep(0.02)
        assert parent.stderr.read() == ""
    assert len(started) >= 2
    assert not list(data.glob(".minivit/.*.partial"))


def test_the_process_imports_no_torch(data):
    code = f"""
import sys
from types import SimpleNamespace
from minivit.settings import TrainSettings
from minivit.training import ahead
print({{"numpy", "PIL", "torch"}} & set(sys.modules))
settings = TrainSettings(model="demo", data={str(data)!r}, workers=2)
ahead._decode(settings, SimpleNamespace(send=print))
print("torch" in sys.modules)
"""
    command = [sys.executable, "-c", code]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    assert (done.stdout.split(), done.stderr) == (["set()", "24", "16", "8", "False"], "")


FLAGS = ["--model", "demo", "--device", "cpu", "--epochs", "1", "--workers", "2"]


def test_the_command_reports_a_bad_photo_that_the_process_has_found(data, tmp_path):
    bad = data / "test" / "cat" / "0.bmp"
    bad.unlink()
    bad.write_text("no photo")
    code = f"""
import sys
from minivit import commands
from minivit.data import store
store._decode_all = None  # The process that trains has nothing to decode.
sys.exit(commands.train({[*FLAGS, "--data", str(data), "--out", str(tmp_path / "run")]!r}))
"""
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        f"python -m minivit train: 1 of 24 photos cannot be read: {bad}: cannot be read as a photo"
    )
    assert done.stderr.count("cannot be read as a photo") == 1
    assert not (tmp_path / "run").exists()


def test_ctrl_c_while_torch_is_imported_ends_both_processes(data, tmp_path):
    command = [sys.executable, ROOT / "train.py", *FLAGS, "--data", data, "--out", tmp_path / "run"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, start_new_session=True) as run:
        wait_until_begun(data)
        deadline = time.monotonic() + 10
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does
        out, err = run.communicate(timeout=10)  # until all have closed these
    assert (run.returncode, out, err) == (130, "", "\ninterrupted\n")
    while list(data.glob(".minivit/.*.partial")):
        assert time.monotonic() < deadline
        time.sleep(0.02)


# What the process does


def test_the_store_is_the_one_that_training_would_write(data, tmp_path):
    assert decode(data) == [24, 16, 8]
    ours = files_of_store(data)
    shutil.rmtree(data / ".minivit")
    prepare(data)
    assert files_of_store(data) == ours
    assert decode(data) == []  # There is a store now.


def test_a_store_in_the_cache_of_the_user_is_used(data, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (data / ".minivit").write_text("a file stands for a folder that may not be written to")
    prepare(data)
    (data / ".minivit").unlink()
    assert decode(data) == []
    assert not (data / ".minivit").exists()


def test_a_model_in_the_cache_of_the_hub_is_known_ahead(data, tmp_path, monkeypatch):
    repository = tmp_path / "hub" / "models--owner--name"
    for folder, size in (("snapshots/abc", 224), ("snapshots/def", 48)):
        shutil.copytree(DEMO, repository / folder)
        config = json.loads((DEMO / "preprocessor_config.json").read_text())
        config["size"] = {"height": size, "width": size}
        (repository / folder / "preprocessor_config.json").write_text(json.dumps(config))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    (repository / "refs" / "small").write_text("def")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    decode(data, model="owner/name")
    assert list(data.glob(".minivit/224x224-*"))
    decode(data, model="owner/name", revision="small")
    assert list(data.glob(".minivit/48x48-*"))


def test_another_input_size_is_known_ahead(data):
    decode(data, img_size=(32, 48))
    assert list(data.glob(".minivit/32x48-*.npy"))


def test_a_photo_that_cannot_be_read_is_left_to_training_to_report(data):
    bad = data / "test" / "cat" / "0.bmp"
    bad.unlink()
    bad.write_text("no photo")
    assert decode(data) == [24, 16, 8]
    with pytest.raises(UserError, match="1 of 24 photos cannot be read: .*0.bmp: cannot be read"):
        prepare(data)
    kept, _ = prepare(data, skip_bad=True)
    assert len(kept.test) == 7


def no_config(data):
    (data.parent / "model").mkdir()
    return {"model": str(data.parent / "model")}


def one_class(data):
    shutil.rmtree(data / "train" / "cat")
    return {}


def no_rights(data):
    (data / ".minivit" / ".lock").mkdir(parents=True)  # A folder stands for somebody else's file.
    return {}


LEFT_TO_TRAINING = {
    "a model without a config": no_config,
    "a model that must be downloaded": lambda data: {"model": "owner/name"},
    "too little room": lambda data: {"store_gib": 1e-9},
    "no such folder": lambda data: {"data": str(data / "none")},
    "a data set that cannot be split": one_class,
    "a folder that cannot be written to": no_rights,
}


@pytest.mark.parametrize("change", LEFT_TO_TRAINING.values(), ids=LEFT_TO_TRAINING)
def test_what_is_in_the_way_is_left_to_training_without_a_word(change, data, opened):
    changes = change(data)
    assert decode(**{"data": data} | changes) == []
    assert not list(data.glob(".minivit/*.npy"))
    assert opened == []


def test_few_small_photos_are_left_to_training(tmp_path):
    make_pets(tmp_path, trainval=6, test=2)
    assert decode(tmp_path) == []
    assert not (tmp_path / ".minivit").exists()


def test_the_lock_of_another_run_and_a_lack_of_locks_are_left_to_training(
    data, capsys, monkeypatch
):
    (data / ".minivit").mkdir()
    with locked(data / ".minivit"):
        assert decode(data) == []
    monkeypatch.setattr(store, "has_locks", lambda folder: False)
    assert decode(data) == []


def test_a_full_disk_is_left_to_training_and_leaves_nothing(data, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.np.lib.format, "write_array_header_1_0", full)
    decode(data)
    assert [path.name for path in (data / ".minivit").iterdir()] == [".lock"]


# What waits for it


def test_training_waits_for_the_photos_before_it_looks_for_them(data):
    waited = []

    def wait_for_photos():
        waited.append(decode(data))

    model = SimpleNamespace(preprocess=PREPROCESS)
    settings = settings_for(data)
    loaded = load_data(data, seed=0)
    _, train_split, _, _ = train_job.decode_photos(settings, loaded, model, wait_for_photos)
    assert waited == [[24, 16, 8]]
    assert train_split[0].stored is not None
