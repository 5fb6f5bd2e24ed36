"""The store of decoded photos: its contents, when it is written anew, and runs without it."""

from __future__ import annotations

import os
import resource
import shutil
import threading
import warnings

import numpy as np
import pytest
import torch
from conftest import draw_photo, make_pets

from minivit import Preprocess, open_photo
from minivit.data import preprocess, store
from minivit.data.datasets import load_data
from minivit.errors import UserError
from minivit.system import workers

PREPROCESS = Preprocess((24, 20))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return make_pets(tmp_path_factory.mktemp("drawn"), trainval=6, test=2)


@pytest.fixture
def pets(drawn, tmp_path):
    shutil.copytree(drawn, tmp_path, dirs_exist_ok=True)
    return tmp_path


def decode_all(data, preprocess=PREPROCESS, *, workers=2, cap_gib=1.0, skip_bad=False):
    data, file = store.prepare(
        data, preprocess, workers=workers, cap_gib=cap_gib, skip_bad=skip_bad
    )
    return data, store.open_splits(data, file, preprocess, workers)


def made(root):
    return sorted(path.name for path in (root / ".minivit").iterdir() if path.suffix == ".npy")


@pytest.fixture
def opened(monkeypatch):
    """The list of the photos that have been decoded."""
    seen = []
    monkeypatch.setattr(
        preprocess, "open_photo", lambda path: seen.append(path) or open_photo(path)
    )
    return seen


def assert_aligned(data, decoded):
    for (pixels, labels), split in zip(decoded, (data.train, data.val, data.test)):
        assert labels.tolist() == split.labels
        assert len(pixels) == len(split.paths) == len(split)
        for i, path in enumerate(split.paths):
            assert torch.equal(pixels[torch.tensor([i])][0], PREPROCESS.pixels(open_photo(path)))


@pytest.fixture
def two_processes(monkeypatch):
    """Decode in processes, five photos at a time, as is otherwise done only for many photos."""
    monkeypatch.setattr(workers, "WORTH_STARTING_BYTES", 1)
    monkeypatch.setattr(store, "CHUNK", 5)


def test_processes_decode_to_the_same_pixels_and_leave_out_the_same_photos(
    pets, two_processes, opened
):
    data = load_data(pets, seed=0)
    broken = [data.train.paths[i] for i in (0, 3, 4)] + [data.test.paths[-1]]
    for path in broken:
        path.write_bytes(path.read_bytes()[:100])
    kept, splits = decode_all(data, skip_bad=True)
    assert sorted(set(data.paths()) - set(kept.paths())) == sorted(broken)
    assert not opened  # in this process
    assert_aligned(kept, splits)
    (file,) = (pets / ".minivit").glob("*.npy")
    assert file.stat().st_size == 128 + (24 - len(broken)) * 3 * 24 * 20


def test_a_disk_that_is_full_in_a_process_leaves_nothing_behind(pets, two_processes):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))  # a photo takes 3,072 bytes
    try:
        with pytest.raises(OSError, match="File too large"):
            decode_all(load_data(pets, seed=0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (pets / ".minivit").iterdir()] == [".lock"]


@pytest.mark.parametrize("cap_gib", [1, 1e-9], ids=["from the store", "decoded anew"])
def test_decoding_gives_inference_pixels(pets, cap_gib, capsys):
    data = load_data(pets, seed=0)
    decoded = decode_all(data, cap_gib=cap_gib)
    assert decoded[0] == data
    assert_aligned(*decoded)
    train = decoded[1][0][0]
    assert torch.equal(train[2:4], train[torch.tensor([2, 3])])
    assert len(made(pets)) == (cap_gib == 1)
    assert ("each epoch decodes them anew" in capsys.readouterr().err) == (cap_gib < 1)


def test_a_second_run_with_another_split_or_path_decodes_nothing(pets, opened, monkeypatch):
    decode_all(load_data(pets, seed=0))
    assert len(opened) == 24
    opened.clear()
    monkeypatch.chdir(pets)
    for root, seed in ((pets, 0), (pets, 1), (".", 0), (pets / "oxford-iiit-pet", 0)):
        assert_aligned(*decode_all(load_data(root, seed=seed)))
    assert opened == []


def replaced(path):
    draw_photo(41, 30, 7).save(path)


CHANGES = {
    "contents": replaced,
    "time of change": lambda path: os.utime(path, (0, 0)),
    "name": lambda path: path.rename(path.with_name("Beta_cat_77.jpg")),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_store_is_made_anew_when_a_photo_changes_and_the_old_one_goes(pets, opened, change):
    decode_all(load_data(pets, seed=0))
    before = made(pets)
    path = pets / "oxford-iiit-pet" / "images" / "Beta_cat_7.jpg"
    change(path)
    listing = pets / "oxford-iiit-pet" / "annotations" / "test.txt"
    if not path.exists():
        listing.write_text(listing.read_text().replace("Beta_cat_7 ", "Beta_cat_77 "))
    opened.clear()
    assert_aligned(*decode_all(load_data(pets, seed=0)))
    assert len(opened) == 24
    assert len(made(pets)) == 1
    assert made(pets) != before


def test_models_that_see_photos_otherwise_have_stores_of_their_own(pets, opened):
    data = load_data(pets, seed=0)
    ways = [
        PREPROCESS,
        Preprocess((20, 24)),
        Preprocess(28, (24, 20)),
        Preprocess((24, 20), resample=3),
    ]
    for way in ways * 2:
        decode_all(data, way)
    assert len(made(pets)) == 4
    assert len(opened) == 4 * 24


def test_a_store_that_was_not_finished_is_none(pets, opened, monkeypatch):
    data = load_data(pets, seed=0)
    with monkeypatch.context() as patch:
        patch.setattr(
            store,
            "write_json",
            lambda *_: os.kill(os.getpid(), 0) or (_ for _ in ()).throw(KeyboardInterrupt),
        )
        with pytest.raises(KeyboardInterrupt):
            decode_all(data)
    (pets / ".minivit" / ".99999.partial").write_text("left by a killed run")
    opened.clear()
    assert_aligned(*decode_all(data))
    assert len(opened) == 24
    assert sorted(path.suffix for path in (pets / ".minivit").iterdir()) == [
        "",
        ".json",
        ".npy",
    ]  # .lock, and the store


def test_two_runs_at_once_make_one_store(pets, opened):
    data, errors = load_data(pets, seed=0), []

    def run():
        try:
            assert_aligned(*decode_all(data))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(opened) == 24


def test_a_full_disk_leaves_nothing_behind(pets, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np.lib.format, "write_array_header_1_0", full)
        with pytest.raises(OSError, match="No space"):
            decode_all(load_data(pets, seed=0))
    assert [path.name for path in (pets / ".minivit").iterdir()] == [".lock"]


def test_where_too_little_is_free_photos_are_decoded_anew(pets, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 100))
    assert_aligned(*decode_all(load_data(pets, seed=0)))
    assert made(pets) == []
    assert "0.0 are free" in capsys.readouterr().err
    with pytest.raises(UserError, match="--skip-bad needs the store"):
        decode_all(load_data(pets, seed=0), skip_bad=True)


def test_the_store_of_a_read_only_data_folder_is_in_the_users_cache(
    pets, opened, monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(
        os, "access", lambda *_: False
    )  # tests may run as root, who may write anywhere
    for _ in range(2):
        assert_aligned(*decode_all(load_data(pets, seed=0)))
    assert len(opened) == 24
    assert len(list((tmp_path / "cache" / "minivit").glob("*/*.npy"))) == 1
    assert capsys.readouterr().err.count("cannot be written to; the decoded photos go into") == 1


def test_a_photo_that_vanishes_is_named_where_there_is_no_store(pets):
    data, decoded = decode_all(load_data(pets, seed=0), cap_gib=1e-9)
    data.train.paths[1].unlink()
    with pytest.raises(UserError, match=f"{data.train.paths[1].name}: no such photo"):
        decoded[0][0][0:3]


def test_the_checksum_is_of_names_sizes_and_labels(pets):
    data = load_data(pets, seed=0)
    train, val = ((split.paths, split.labels) for split in (data.train, data.val))
    before = store.checksum(train, val)
    os.utime(data.train.paths[0], (0, 0))  # as when a data set is copied
    assert store.checksum(train, val) == before != store.checksum(val, train)
    assert store.checksum((train[0], train[1][::-1]), val) != before
    replaced(data.train.paths[0])
    assert store.checksum(train, val) != before


@pytest.mark.parametrize("num_bad", [1, 3, 4])
def test_all_unreadable_photos_are_counted_and_the_first_named(pets, num_bad):
    data = load_data(pets, seed=0)
    bad = [data.train.paths[7], data.train.paths[3], data.val.paths[0], data.test.paths[-1]][
        :num_bad
    ]
    for path in bad:
        path.write_text("no photo")
    with pytest.raises(UserError, match=f"{num_bad} of 24 photos cannot be read") as raised:
        decode_all(data, workers=2)
    message = str(raised.value)
    assert sum(path.name in message for path in bad) == min(num_bad, 3)
    assert ("; ...;" in message) == (num_bad > 3)
    assert "--skip-bad" in message
    assert "python -m minivit doctor --data DIR" in message


def test_unreadable_photos_can_be_left_out_of_data_pixels_and_labels_alike(pets, opened, capsys):
    data = load_data(pets, seed=0)
    bad = [data.train.paths[0], data.train.paths[10], data.val.paths[-1], data.test.paths[4]]
    for path in bad:
        path.write_text("no photo")
    kept, decoded = decode_all(data, workers=3, skip_bad=True)
    assert [len(split) for split in (kept.train, kept.val, kept.test)] == [13, 2, 5]
    assert kept.train.paths == [p for i, p in enumerate(data.train.paths) if i not in (0, 10)]
    assert kept.test.paths == data.test.paths[:4] + data.test.paths[5:]
    assert_aligned(kept, decoded)
    assert_aligned(*decode_all(data, workers=3, skip_bad=True))
    assert len(opened) == 24  # once
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out: ")]
    assert [line.split(": ")[1] for line in lines] == sorted(map(str, bad)) * 2


LOST = {
    "class": (
        lambda data: [p for p, label in zip(data.train.paths, data.train.labels) if label == 1],
        "of Alpha Dog",
    ),
    "validation": (lambda data: data.val.paths, "for validation"),
    "test": (lambda data: data.test.paths, "for the test"),
}


@pytest.mark.parametrize("which, message", LOST.values(), ids=LOST)
def test_too_many_unreadable_photos_cannot_be_left_out(pets, which, message):
    data = load_data(pets, seed=0)
    for path in which(data):
        path.write_text("no photo")
    with pytest.raises(UserError, match=f"no photos are left {message}"):
        decode_all(data, workers=2, skip_bad=True)


def test_odd_metadata_gives_no_warning_and_keeps_the_warning_filters(pets, monkeypatch):
    """Pillow warns of such a palette.

    Threads must not let that warning through, nor leave other warning filters behind.
    """
    data = load_data(pets, seed=0)
    image = draw_photo(40, 30).quantize(200)
    for path in data.train.paths:
        image.save(path, "PNG", transparency=bytes(range(200)))
    before = list(warnings.filters)
    decode_all(data, workers=8)
    assert warnings.filters == before

    def open_loudly(path):  # as when another thread has put the filters back in the meantime
        warnings.warn("Pillow finds this odd", stacklevel=1)
        return open_photo(path)

    monkeypatch.setattr("minivit.data.preprocess.open_photo", open_loudly)
    decode_all(data, workers=2)
