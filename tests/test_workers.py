"""Work in other processes and in a background thread: its order, its errors and its end."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from minivit.errors import UserError
from minivit.system.workers import (
    map_ahead,
    processes_worth_starting,
    silent_process,
    worker_pool,
    write_behind,
)

MODULE = "minivit.data.preprocess"


@pytest.mark.parametrize("count", [0, 2])
def test_results_come_in_the_order_of_the_jobs(count):
    jobs = ((i, 3) for i in range(9))
    with worker_pool(count, MODULE) as pool:
        results = list(map_ahead(pool, divmod, jobs, ahead=4))
    assert results == [divmod(i, 3) for i in range(9)]


@pytest.mark.parametrize("count", [0, 1])
def test_no_more_jobs_are_begun_than_asked_for(count):
    begun = []

    def jobs():
        for i in range(9):
            begun.append(i)
            yield (i,)

    with worker_pool(count, MODULE) as pool:
        results = map_ahead(pool, abs, jobs(), ahead=3)
        assert next(results) == 0
        assert begun == [0, 1, 2, 3]
        results.close()


@pytest.mark.parametrize("count", [0, 1])
def test_an_error_of_a_job_is_raised_and_the_next_job_runs(count):
    with worker_pool(count, MODULE) as pool:
        with pytest.raises(FileNotFoundError):
            pool.submit(os.stat, "/no/such/file").result()
        assert pool.submit(abs, -1).result() == 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs process groups")
@pytest.mark.parametrize("start", ["worker_pool(2, 'minivit.errors')", "silent_process(print)"])
def test_ctrl_c_while_processes_start_prints_nothing_of_them(start, tmp_path):
    slow = "import sys, time\nif '--multiprocessing-fork' in sys.orig_argv:\n    time.sleep(1)\n"
    (tmp_path / "sitecustomize.py").write_text(slow)
    code = (
        "import os, signal, time\n"
        "from minivit.system.workers import silent_process, worker_pool\n"
        "signal.signal(signal.SIGINT, lambda *_: os._exit(130))\n"  # as the commands do
        f"with {start}:\n"
        "    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])\n"
        "    print('started', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout.readline() == "started\n"
        time.sleep(0.3)  # Python has started in the other processes, and their own code has not.
        os.killpg(process.pid, signal.SIGINT)
        assert process.communicate() == ("", "")


@pytest.mark.parametrize("again", [False, True])
def test_a_killed_worker_is_one_clear_line(again):
    with (
        pytest.raises(UserError, match="was killed; if memory ran out, try fewer --workers"),
        worker_pool(1, MODULE) as pool,
    ):
        killed = pool.submit(signal.raise_signal, signal.SIGKILL)
        if again:  # a job after the death of the worker
            time.sleep(0.5)
            pool.submit(abs, -1)
        killed.result()


PARENT = """
import multiprocessing, sys, time
from minivit.system.workers import worker_pool
if __name__ == "__main__":
    with worker_pool(2, "minivit.data.photos") as pool:
        pool.submit(abs, 1).result()
        print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
        for _ in range(2):
            pool.submit(time.sleep, float(sys.argv[1]))
        time.sleep(60)
"""


@pytest.mark.parametrize("seconds", [0, 60], ids=["idle", "at work"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_when_their_parent_is_killed(tmp_path, number, seconds):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    command = [sys.executable, script, str(seconds)]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, env=environ) as parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        parent.send_signal(number)
        deadline = time.monotonic() + 5
        while alive := [pid for pid in workers if is_running(pid)]:
            assert time.monotonic() < deadline, alive
            time.sleep(0.05)
        assert parent.stderr.read() == ""
    assert len(workers) == 2


def is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
        return status.rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_worker_has_imported_its_module_and_no_torch():
    for module in ("minivit.figures.plots", MODULE, "minivit.tools.score.masks"):
        with worker_pool(1, module) as pool:
            names = pool.submit(eval, "set(__import__('sys').modules)").result()
        assert module in names
        assert "torch" not in names


def test_an_error_of_a_write_behind_is_raised_by_the_next_and_at_the_end():
    written = []
    with pytest.raises(FileNotFoundError), write_behind() as write_later:
        write_later(written.append, 1)
        write_later(os.stat, "/no/such/file")
        write_later(written.append, 2)
    assert written == [1]
    with pytest.raises(FileNotFoundError), write_behind() as write_later:
        write_later(os.stat, "/no/such/file")


def test_a_silent_process_has_workers_and_shows_nothing(tmp_path, capfd):
    code = f"""
from pathlib import Path
from minivit.system.workers import worker_pool
with worker_pool(1, {MODULE!r}) as pool:
    Path({str(tmp_path / "done")!r}).write_text(str(pool.submit(abs, -1).result()))
print("printed")
raise ValueError("raised")
"""
    with silent_process(exec, code) as process:
        process.join(20)
        assert process.exitcode == 0  # It ends at once, without a word to its workers.
    assert (tmp_path / "done").read_text() == "1"
    assert capfd.readouterr() == ("", "")


def test_a_silent_process_ends_with_the_context():
    with pytest.raises(UserError), silent_process(time.sleep, 60) as process:
        raise UserError
    assert not is_running(process.pid)


def test_processes_start_for_many_or_large_photos_only(tmp_path):
    small, large = tmp_path / "small.jpg", tmp_path / "large.jpg"
    small.write_bytes(b"1")
    with large.open("wb") as file:
        file.truncate(2**20)
    assert processes_worth_starting([small] * 1000, workers=4) == 0
    assert processes_worth_starting([small] * 1024, workers=4) == 4
    assert processes_worth_starting([tmp_path / "gone.jpg", *[large] * 15], workers=4) == 0
    assert processes_worth_starting([large] * 15, workers=4) == 0
    assert processes_worth_starting([large] * 17, workers=4) == 2
    assert processes_worth_starting([large] * 100, workers=4) == 4


FROM_STDIN = """
import threading, time
from minivit.system.workers import worker_pool
with worker_pool(1, "minivit.data.photos") as pool:  # without a main guard
    print(pool.submit(abs, -3).result())
# At its exit, Python 3.11 may print an error of its own if the pool's thread is just ending.
while threading.active_count() > 1:
    time.sleep(0.01)
"""


def test_workers_do_not_run_the_users_script_again(tmp_path):
    (tmp_path / "script.py").write_text(FROM_STDIN)
    for arguments, script in (([], FROM_STDIN), ([tmp_path / "script.py"], "")):
        done = subprocess.run(
            [sys.executable, *arguments],
            input=script,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")


def test_a_module_that_cannot_be_imported_is_the_jobs_error():
    with worker_pool(1, "minivit.no_such_module") as pool:
        assert pool.submit(abs, -1).result() == 1
        with pytest.raises(ModuleNotFoundError):
            pool.submit(importlib.import_module, "minivit.no_such_module").result()
