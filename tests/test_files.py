"""Files appear whole or not at all, and JSON is read back as it was written."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import getpass
import json
import os
import pwd
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from minivit import cli
from minivit.checkpoints.weights import save_tensors
from minivit.errors import UserError
from minivit.system import files, home
from minivit.system.files import _unfinished as unfinished
from minivit.system.files import locked, read_json, remove_unfinished, whole_file, write_json


@pytest.mark.parametrize("stop", [OSError, KeyboardInterrupt])
def test_a_file_that_is_not_finished_leaves_the_old_one_and_nothing_else(tmp_path, stop):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(stop), whole_file(path) as partial:
        partial.write_text("half of the new")
        assert path.read_text() == "old"
        assert unfinished == {partial}
        raise stop
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"
    with whole_file(path) as partial:
        partial.write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "new"
    assert not unfinished


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    path = tmp_path / "a.txt"
    with pytest.raises(OSError, match="No space") as error, whole_file(path):
        raise OSError(errno.ENOSPC, "No space left on device")  # write() knows no name.
    assert error.value.filename == str(path)
    with pytest.raises(FileNotFoundError) as error, whole_file(path) as partial:
        partial.open()
    assert error.value.filename == str(path)
    with pytest.raises(FileNotFoundError) as error, whole_file(path):
        (tmp_path / "a photo").open()
    assert error.value.filename == str(tmp_path / "a photo")
    with pytest.raises(OSError, match="^says all itself$"), whole_file(path):
        raise OSError("says all itself")


def test_a_file_is_on_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, name=name, real=real: (done.append(name), real(*args))
        )
    write_json(tmp_path / "a.json", {})
    assert done == ["fsync", "replace"]


def test_the_longest_name_can_be_written(tmp_path):
    write_json(tmp_path / ("x" * 250 + ".json"), {"a": 1})
    save_tensors(tmp_path / ("é" * 121 + ".safetensors"), {"a": torch.ones(1)}, {})
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("write", [save_tensors, write_json], ids=["tensors", "json"])
def test_a_full_disk_is_an_os_error_and_leaves_nothing(tmp_path, write):
    more = {save_tensors: ({"a": torch.ones(10_000)}, {}), write_json: ({"a": "x" * 10_000},)}[
        write
    ]
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, unlimited[1]))  # stands for a full disk
    try:
        with pytest.raises(OSError, match="too large"):
            write(tmp_path / "a", *more)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert list(tmp_path.iterdir()) == []


def test_json_is_utf8_whatever_it_holds(tmp_path):
    value = {"label": "\x1b[31m\udcff <b> \N{CAT FACE} é"}
    write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_bytes().decode("utf-8")) == value
    assert "é" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert read_json(tmp_path / "a.json") == value


@pytest.mark.parametrize(
    "data, message",
    [(b"{", "expected JSON"), (b"\xff", "expected JSON"), (b"[]", "found a list")],
    ids=repr,
)
def test_what_is_no_json_object_is_refused(tmp_path, data, message):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(UserError, match=rf"a\.json: .*{message}"):
        read_json(tmp_path / "a.json")


def test_a_process_that_ends_at_once_removes_its_unfinished_files(tmp_path):
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "a.txt") as partial:
        partial.write_text("half")
        remove_unfinished()
        assert not list(tmp_path.iterdir())


def temporary_name(folder):
    """Return the path that this process writes to before a file takes its place."""
    with contextlib.suppress(InterruptedError), whole_file(folder / "a") as partial:
        raise InterruptedError
    return partial


def test_files_of_equal_process_numbers_have_names_of_their_own(tmp_path, monkeypatch):
    """Two containers, or two threads, may write to one folder and have one process number."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    assert len({temporary_name(tmp_path) for _ in range(20)}) == 20


def test_only_what_a_dead_process_left_is_removed(tmp_path, monkeypatch):
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    ours = temporary_name(tmp_path)
    dead = temporary_name(tmp_path)
    dead = dead.with_name(dead.name.replace(f"-{os.getpid()}-", f"-{process.pid}-"))
    monkeypatch.setattr(files, "_process_space", lambda: "another")
    others, abandoned = temporary_name(tmp_path), temporary_name(tmp_path)
    monkeypatch.undo()
    of_before = tmp_path / ".123.partial"  # as an earlier version called it
    for path in (ours, dead, others, abandoned, of_before):
        path.write_text("half")
    for path in (ours, abandoned, of_before):
        os.utime(path, (0, 0))
    with locked(tmp_path):
        left = {path.name for path in tmp_path.iterdir()}
    assert left == {".lock", ours.name, others.name}


KILLED_IN_SAFETENSORS = """
import os, signal, sys
from pathlib import Path
import safetensors.torch
from minivit.checkpoints import tensors

def die_half_way(_tensors, path, _metadata):
    path.with_name(".tmpAb12").write_bytes(b"half")  # Versions from 0.8 on write such a file.
    os.kill(os.getpid(), getattr(signal, sys.argv[2]))

tensors.save_file = die_half_way
if sys.argv[2] == "SIGTERM":
    from minivit.system.signals import end_on_signals
    end_on_signals()
tensors.save_tensors(Path(sys.argv[1], "a.safetensors"), {}, {})
"""


@pytest.mark.parametrize("signal_name", ["SIGTERM", "SIGKILL"])
def test_nothing_is_left_of_what_a_library_was_writing(tmp_path, signal_name):
    command = [sys.executable, "-c", KILLED_IN_SAFETENSORS, tmp_path, signal_name]
    subprocess.run(list(map(str, command)), cwd=ROOT, stderr=subprocess.DEVNULL, check=False)
    left = list(tmp_path.rglob(".tmp*"))
    assert len(left) == (signal_name == "SIGKILL")
    with locked(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("target", ["nowhere", "link"])
def test_a_link_that_leads_nowhere_is_no_folder_to_write_to(tmp_path, target):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / target)
    with pytest.raises(UserError, match="found a link that leads nowhere; give another --out"):
        files.refuse_to_overwrite(link / "run", [])


def test_where_no_drive_is_there_is_no_folder_to_write_to(tmp_path, monkeypatch):
    """This is Windows' answer for a letter without a drive."""
    monkeypatch.setattr(os.path, "lexists", lambda _: False)
    with pytest.raises(UserError, match="there is no such drive; give another --out"):
        files.refuse_to_overwrite(tmp_path / "run", [])


@pytest.mark.parametrize("operation", ["replace", "unlink"])
def test_a_file_that_is_open_for_a_moment_is_waited_for(tmp_path, monkeypatch, operation):
    attempts = []
    real = getattr(os, operation)

    def refuse_twice(*paths):
        attempts.append(paths)
        if len(attempts) < 3:
            raise PermissionError(errno.EACCES, "Access is denied", str(paths[0]))
        return real(*paths)

    path = tmp_path / "a.json"
    path.write_text("{}")
    monkeypatch.setattr(os, operation, refuse_twice)
    if operation == "replace":
        write_json(path, {"a": 1})
        assert read_json(path) == {"a": 1}
    else:
        files.remove_file(path)
        assert not path.exists()
    assert len(attempts) == 3


@pytest.mark.parametrize(
    "stem, portable",
    [
        *[(name, name) for name in ("a cat", "a.b", "猫", "console", "com10", "nullable", ".x")],
        *[("con", "_con"), ("NUL", "_NUL"), ("aux.tar", "_aux.tar"), ("LPT1", "_LPT1")],
        *[("com¹", "_com¹"), ("prn .x", "_prn .x"), ("12:30", "12_30"), ("a. .", "a_")],
        *[('<"*?|>', "______"), ("a/b\\c", "a_b_c"), ("two\nlines", "two_lines"), ("x ", "x_")],
    ],
)
def test_a_name_that_some_system_refuses_is_changed(stem, portable):
    assert files.portable_stem(stem) == portable
    assert files.portable_stem(portable) == portable


def test_containers_and_machines_are_told_apart(monkeypatch):
    spaces = set()
    readlink, read_text = Path.readlink, Path.read_text
    for namespace, boot in (("pid:[1]", "a"), ("pid:[2]", "a"), ("pid:[1]", "b")):
        monkeypatch.setattr(Path, "readlink", lambda _, value=namespace: Path(value))
        monkeypatch.setattr(Path, "read_text", lambda _, value=boot, **__: value)
        spaces |= {files._process_space.__wrapped__() for _ in range(2)}
    assert len(spaces) == 3
    monkeypatch.setattr(Path, "readlink", readlink)
    monkeypatch.setattr(Path, "read_text", read_text)

    def absent(_):
        raise FileNotFoundError

    # Where nothing tells whose process numbers are ours, none are.
    monkeypatch.setattr(Path, "readlink", absent)
    assert len({files._process_space.__wrapped__() for _ in range(2)}) == 2


@pytest.mark.parametrize("reason", ["ENOSYS", "EOPNOTSUPP", "ENOLCK"])
def test_without_locks_a_run_goes_on_and_says_so(tmp_path, monkeypatch, capsys, reason):
    def no_locks(*_):
        raise OSError(getattr(errno, reason), "no locks here")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with locked(tmp_path), locked(tmp_path, wait=True):
        assert list(tmp_path.iterdir()) == []
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"{tmp_path}: its file system has no locks")


WAIT = """
import sys
from pathlib import Path
from minivit import cli
from minivit.system.files import locked

def wait():
    with locked(Path(sys.argv[1]), wait=True):
        print("got it")

cli.start(wait)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, None], ids=["INT", "TERM", "end"])
def test_a_process_that_waits_for_a_lock_says_so_and_can_be_ended(tmp_path, how):
    command = [sys.executable, "-c", WAIT, str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    with locked(tmp_path):
        process = subprocess.Popen(command, **pipes)
        said = process.stderr.readline()
        if how is not None:
            process.send_signal(how)
            process.wait(10)
    output, _ = process.communicate(timeout=10)
    assert said == f"waiting for another process to release {tmp_path / '.lock'}\n"
    assert (process.returncode, output) == ((0, "got it\n") if how is None else (130, ""))


@pytest.fixture
def homeless(tmp_path, monkeypatch):
    """A process with a number of its own, as in a container: no HOME, and no such user."""

    def unknown(_):
        raise KeyError("no such user")

    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")  # so that it is restored whether it was set or not
        monkeypatch.delenv(name)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.chdir(tmp_path)


def command_of_a_job(job):
    return cli.run(job, cli.Parser("doctor"), [])


def test_without_a_home_a_temporary_folder_takes_its_place(homeless, tmp_path, capsys):
    temporary = tmp_path / "tmp" / f"minivit-{os.getuid()}"
    assert os.path.expanduser("~/x") == "~/x"  # What would become a folder of that name.
    assert home.cache_folders() == [temporary]

    def job(_):
        Path(os.path.expanduser("~/.cache")).mkdir()
        assert getpass.getuser() == temporary.name  # torch.compile asks.
        return 0

    for _ in range(2):
        assert command_of_a_job(job) == 0
        (temporary / ".cache").rmdir()
    assert (temporary.stat().st_mode & 0o777, temporary.stat().st_uid) == (0o700, os.getuid())
    assert home.cache_folders() == [temporary / ".cache" / "minivit", temporary]
    assert not (tmp_path / "~").exists()
    # The second command has inherited what the first one set.
    assert capsys.readouterr().err == (
        f"HOME is not set; what is kept for later runs goes into {temporary}\n"
    )


def test_a_temporary_folder_of_somebody_else_is_not_used(homeless, tmp_path, capsys):
    temporary = tmp_path / "tmp" / f"minivit-{os.getuid()}"
    temporary.symlink_to(tmp_path)
    assert home.cache_folders() == []
    assert command_of_a_job(lambda _: 0) == 0
    chosen = Path(os.environ["HOME"])
    assert chosen.parent == tmp_path / "tmp"
    assert chosen != temporary
    assert str(chosen) in capsys.readouterr().err


def test_a_home_that_may_not_be_written_to_stays_and_says_nothing(tmp_path, monkeypatch, capfd):
    """It may hold models. matplotlib alone would complain, in each process."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", "/proc")
    monkeypatch.setenv("MPLCONFIGDIR", "")
    monkeypatch.delenv("MPLCONFIGDIR")
    monkeypatch.setattr(os, "access", lambda *_: False)  # Root may write anywhere.
    assert command_of_a_job(lambda _: 0) == 0
    assert os.environ["MPLCONFIGDIR"] == f"{tmp_path}/minivit-{os.getuid()}/matplotlib"
    assert os.environ["HOME"] == "/proc"
    assert capfd.readouterr() == ("", "")
