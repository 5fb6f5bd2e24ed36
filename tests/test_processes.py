"""Work in other processes, and in a thread behind: its order, its errors, and its end."""

from __future__ import annotations

import os
import signal
import time

import pytest

from minivit.errors import UserError
from minivit.system import prefetch as ahead
from minivit.system import workers as processes


@pytest.mark.parametrize("count", [0, 2])
def test_results_come_in_the_order_of_the_jobs(count):
    jobs = ((processes.call, "builtins", "divmod", i, 3) for i in range(9))
    with processes.working(count, "minivit.data.preprocess") as begin:
        assert list(processes.in_turn(begin, jobs, ahead=4)) == [divmod(i, 3) for i in range(9)]


@pytest.mark.parametrize("count", [0, 1])
def test_no_more_is_begun_than_asked_for(count):
    begun = []
    jobs = (begun.append(i) or (processes.call, "builtins", "abs", i) for i in range(9))
    with processes.working(count, "minivit.data.preprocess") as begin:
        results = processes.in_turn(begin, jobs, ahead=3)
        assert next(results) == 0
        assert begun == [0, 1, 2, 3]


@pytest.mark.parametrize("count", [0, 1])
def test_what_a_job_raises_is_raised_and_the_next_goes_on(count):
    with processes.working(count, "minivit.data.preprocess") as begin:
        with pytest.raises(FileNotFoundError):
            begin(os.stat, "/no/such/file")()
        assert begin(abs, -1)() == 1


def test_a_killed_process_is_a_line_and_no_broken_pipe_which_would_mean_that_nobody_reads():
    with processes.working(1, "minivit.data.preprocess") as begin:
        with pytest.raises(UserError, match="was killed; if memory ran out, try fewer --workers"):
            begin(signal.raise_signal, signal.SIGKILL)()
        time.sleep(0.2)
        with pytest.raises(UserError, match="was killed"):
            begin(abs, -1)()


def test_a_process_has_imported_its_module_and_no_torch():
    for module in ("minivit.figures.plots", "minivit.data.preprocess", "minivit.tools.score.masks"):
        with processes.working(1, module) as begin:
            names = begin(eval, "set(__import__('sys').modules)")()
        assert module in names
        assert "torch" not in names


def test_what_a_write_behind_raises_is_raised_before_the_next_begins_and_at_the_end():
    written = []
    with pytest.raises(FileNotFoundError), ahead.write_behind() as begin:
        begin(written.append, 1)
        begin(os.stat, "/no/such/file")
        begin(written.append, 2)
    assert written == [1]
    with pytest.raises(FileNotFoundError), ahead.write_behind() as begin:
        begin(os.stat, "/no/such/file")


def test_processes_are_started_for_many_photos_or_large_ones_only(tmp_path):
    small, large = tmp_path / "small.jpg", tmp_path / "large.jpg"
    small.write_bytes(b"1")
    with large.open("wb") as file:
        file.truncate(2**20)
    assert processes.worth_starting([small] * 1000, workers=4) == 0
    assert processes.worth_starting([small] * 1024, workers=4) == 4
    assert processes.worth_starting([tmp_path / "gone.jpg", *[large] * 15], workers=4) == 0
    assert processes.worth_starting([large] * 15, workers=4) == 0
    assert processes.worth_starting([large] * 17, workers=4) == 2
    assert processes.worth_starting([large] * 100, workers=4) == 4
