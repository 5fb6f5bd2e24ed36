"""The commands on Windows and macOS, simulated on Linux: see simulated/sitecustomize.py.

What is simulated: modules, functions and signals that are absent, files that cannot be replaced or
removed while they are open or mapped, a virus scanner, text mode, a console that is not UTF-8.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from minivit.checkpoints.tensors import save_tensors
from minivit.tools.demo.drawings import draw_pets
from minivit.training.state import read_state

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="files in use are read from /proc")


def run_simulated(platform, code, cwd, encoding="cp1252", **variables):
    """Run code in a process that takes this machine for one with another system."""
    path = os.pathsep.join([str(ROOT / "tests" / "simulated"), str(ROOT)])
    environment = {
        "PYTHONPATH": path,
        "SIMULATED_PLATFORM": platform,
        "SIMULATED_ROOT": str(cwd),
        "PYTHONIOENCODING": encoding,
        "PYTHONWARNDEFAULTENCODING": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=os.environ | environment | variables,
        capture_output=True,
        encoding=encoding,
        timeout=300,
    )


# Each line is run as if it stood in a module of minivit.
NOT_PORTABLE = {
    "a module of POSIX": "import fcntl",
    "a module in a function": "def f():\n    import resource\nf()",
    "a function of Linux": "import os; os.sched_getaffinity(0)",
    "a function that is imported": "from os import fork",
    "a signal": "import signal; signal.SIGHUP",
    "a signal that is sent": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "asking for a process": "import os; os.kill(os.getpid(), 0)",
    "forked workers": "import multiprocessing; multiprocessing.get_context('fork')",
    "a pipe that does not block": "import os; os.set_blocking(os.pipe()[1], False)",
    "replacing an open file": "held = open('b', 'rb'); replace('a', 'b')",
    "removing a mapped file": (
        "import mmap, pathlib\nwith open('a', 'rb') as f: m = mmap.mmap(f.fileno(), 0, prot=1)\n"
        "pathlib.Path('a').unlink()"
    ),
    "replacing a file that is scanned": "import os; os.replace('a', 'new')",
    "a text file without an encoding": "open('a')",
    "a text that is read without an encoding": "import pathlib; pathlib.Path('a').read_text()",
    "syncing a folder": "import os; os.fsync(os.open('.', 0))",
    "files of Linux": "open('/proc/cpuinfo', 'rb')",
}
PROBE = """
import json, sys
def replace(source, target):
    import os
    for _ in range(3):
        try:
            os.replace(source, target)
        except PermissionError:
            pass
        else:
            return
    raise PermissionError
results = {}
for name, line in json.loads(sys.stdin.readline()).items():
    for file in "ab":
        with open(file, "w", encoding="utf-8") as opened:
            opened.write("text")
    try:
        exec(line, {"__name__": "minivit.probe", "replace": replace})
        results[name] = "nothing"
    except (ImportError, AttributeError, OSError, ValueError, AssertionError, Warning) as error:
        results[name] = type(error).__name__
print(json.dumps(results))
"""


def test_what_is_not_portable_fails_in_the_simulation(tmp_path):
    """Otherwise the tests below would prove nothing."""
    code = PROBE.replace("sys.stdin.readline()", repr(json.dumps(NOT_PORTABLE)))
    done = run_simulated("win32", code, tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert [name for name, result in results.items() if result == "nothing"] == []
    assert results.keys() == NOT_PORTABLE.keys()


COMMANDS = """
import signal, sys
from minivit import __main__, cli
from minivit.system import signals, workers

workers.WORTH_STARTING_BYTES = 0  # Photos are decoded in processes, few as they are.
sys.argv = ["minivit"]
CPU = ["--device", "cpu", "--amp", "off"]
TRAIN = ["train", "--model", "demo", "--data", "classes", "--out", "run", *CPU]
TRAIN += ["--batch-size", "8", "--workers", "2"]
INFER = ["infer", "photos", "--out", "figures", "--layers", "11", *CPU]

def interrupt(*args):
    run_folder.report_epoch = report_epoch
    signals._run.handle(signal.SIGINT, None)
    return report_epoch(*args)

def job():
    global run_folder, report_epoch
    for argv in COMMANDS:
        expected = 0
        if argv[-1] == "INTERRUPTED":
            from minivit.training import run_folder
            report_epoch = run_folder.report_epoch
            run_folder.report_epoch = interrupt
            argv, expected = argv[:-1], 130
        code = __main__.main(argv)
        assert code == expected, (argv, code)
    return 0

COMMANDS = {commands}
if __name__ == "__main__":
    cli.start(job)
"""


@pytest.fixture
def place(tmp_path):
    """A working directory with class folders, Pets' layout, and photos of unusual names."""
    draw_pets(tmp_path / "pets", per_breed=(3, 1), seed=0, workers=2)
    images = sorted((tmp_path / "pets" / "oxford-iiit-pet" / "images").iterdir())
    for i, path in enumerate(images):
        folder = tmp_path / "classes" / ("猫" if i % 2 else "Dog · é")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / f"照片 {i}.jpg")
    (tmp_path / "photos").mkdir()
    for name in ("con.jpg", "what? a cat.jpg", "猫.jpg"):
        shutil.copy(images[0], tmp_path / "photos" / name)
    return tmp_path


def run_commands(platform, commands, place, encoding) -> str:
    """Run commands one after the other in a process, and return what they print on stdout."""
    done = run_simulated(platform, COMMANDS.replace("{commands}", commands), place, encoding)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not [path for path in place.rglob("*") if ".partial" in path.name]
    return done.stdout


def test_windows_without_posix_and_with_files_in_use(place):
    """A run that is resumed replaces its state, whose tensors it has read."""
    out = run_commands(
        "win32",
        """[
            ["doctor", "--data", "classes"],
            [*TRAIN, "--epochs", "2", "INTERRUPTED"],
            [*TRAIN, "--epochs", "2", "--resume"],
            [*INFER, "--model", "run", "--html", "--npz"],
            ["describe", "run", "--data", "classes"],
            ["export", "run", "--to", "timm", "--out", "exported"],
        ]""",
        place,
        "cp1252",
    )
    assert r"\u732b" in out and "Dog · é" in out
    figures = {path.stem for path in (place / "figures").iterdir()}
    assert figures == {"_con", "what_ a cat", "猫"}
    lines = (place / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["epoch"] for row in rows][-2:] == [1, 2]
    assert {row["peak_gib"] for row in rows} == {1.5}  # what the simulated system tells
    assert not (place / "run" / "state.safetensors").exists()
    assert (place / "exported" / "model.safetensors").exists()


def test_macos_without_what_only_linux_has(place):
    out = run_commands(
        "darwin", '[[*TRAIN, "--epochs", "1"], [*INFER, "--model", "run"]]', place, "ascii"
    )
    assert r"test accuracy" in out and r"Dog \xb7 \xe9" in out


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_the_other_commands_without_posix(platform, place):
    commands = """[
        ["score", "--model", "demo", "--data", "pets", "--blocks", "11", *CPU],
        ["drop", "--model", "demo", "--data", "pets", *CPU],
        ["study", "--model", "demo", "--data", "pets", "--blocks", "none", "--seeds", "1",
         "--shots", "1", "--epochs", "4", *CPU],
        ["selfcheck", "--model", "demo", "--device", "cpu"],
        ["demo"],
    ]"""
    small = "import minivit.tools.demo.command as demo\ndemo.PER_BREED = (12, 4)\n"
    run_commands(platform, f"{commands}\n{small}", place, "cp437")
    assert (place / "runs" / "demo" / "run" / "summary.json").exists()


def test_a_state_that_was_read_may_be_replaced_while_it_is_used(tmp_path):
    save_tensors(
        tmp_path / "state.safetensors", {"a": torch.ones(9)}, {"state": '{"settings": {}}'}
    )
    tensors, _ = read_state(tmp_path / "state.safetensors", {})
    assert tensors["a"].sum() == 9
    assert "state.safetensors" not in Path("/proc/self/maps").read_text()


def test_a_file_that_stays_open_is_named_in_one_line(tmp_path):
    code = """
from pathlib import Path
from minivit import cli
from minivit.system import files
files.IN_USE_LIMIT_S = 0.3
Path("a.json").write_bytes(b"{}")
def job(_):
    with Path("a.json").open("rb"):
        files.write_json(Path("a.json"), {"a": 1})
cli.start(lambda: cli.run(job, cli.Parser("score"), []))
"""
    done = run_simulated("win32", code, tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "python -m minivit score: a.json: Access is denied; if a program or a notebook has it "
        "open, close it there\n"
    )
    assert (tmp_path / "a.json").read_bytes() == b"{}"
