"""Files appear whole or not at all, and JSON is read back as it was written."""

from __future__ import annotations

import json
import os
import resource

import pytest
import torch

from minivit.checkpoints.weights import save_tensors
from minivit.errors import UserError
from minivit.system.files import _unfinished as unfinished
from minivit.system.files import read_json, remove_unfinished, whole_file, write_json


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
