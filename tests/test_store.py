"""The store of decoded photos: its contents, when it is written anew, and runs without it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import shutil
import tempfile
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_photo, make_pets
from PIL import Image

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


def test_the_disk_writes_while_photos_are_decoded(pets, two_processes, monkeypatch):
    flushed = []

    def fsync(number):
        flushed.append(Path(f"/proc/self/fd/{number}").readlink().suffix)

    monkeypatch.setattr(store, "FLUSHED_PHOTOS", 10)
    monkeypatch.setattr(os, "fsync", fsync)
    assert_aligned(*decode_all(load_data(pets, seed=0)))
    # Twice while 24 photos are decoded, at the end of that, and for the errors.
    assert flushed == [".partial"] * 4


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
    for root, seed in ((pets, 0), (pets, 1), (".", 0)):
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
    leftover = pets / ".minivit" / ".99999.partial"
    leftover.write_text("left by a killed run")
    os.utime(leftover, (0, 0))
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


def test_what_an_old_store_and_a_killed_run_take_counts_as_free(pets, monkeypatch, capsys):
    decode_all(load_data(pets, seed=0))
    leftover = pets / ".minivit" / ".1.partial"
    leftover.write_text("left by a killed run")
    os.utime(leftover, (0, 0))
    os.utime(load_data(pets, seed=0).train.paths[0], (0, 0))

    def usage(folder):
        assert not leftover.exists()
        return shutil._ntuple_diskusage(0, 0, 2 * 3 * 24 * 20)  # room for two photos

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert_aligned(*decode_all(load_data(pets, seed=0)))
    assert len(made(pets)) == 1
    assert "are free" not in capsys.readouterr().err


@pytest.fixture
def elsewhere(pets, monkeypatch):
    """The user's cache folder and the one for temporary files, where `.minivit` cannot be made."""
    (pets / ".minivit").write_text("a file stands for a folder that may not be written to")
    monkeypatch.setenv("XDG_CACHE_HOME", str(pets / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(pets / "tmp"))
    (pets / "tmp").mkdir()
    return pets / "cache" / "minivit", pets / "tmp" / f"minivit-{os.getuid()}"


def test_the_store_of_a_read_only_data_folder_is_in_the_users_cache(
    pets, elsewhere, opened, capsys
):
    for _ in range(2):
        assert_aligned(*decode_all(load_data(pets, seed=0)))
    assert len(opened) == 24
    assert len(list(elsewhere[0].glob("*/*.npy"))) == 1
    assert capsys.readouterr().err.count("cannot be written to; the decoded photos go into") == 1


def test_a_cache_that_cannot_be_written_to_is_replaced_by_a_temporary_folder(
    pets, elsewhere, opened, monkeypatch, capsys
):
    (pets / "cache").write_text("")
    for _ in range(2):
        assert_aligned(*decode_all(load_data(pets, seed=0)))
    assert len(opened) == 24
    assert len(list(elsewhere[1].glob("*/*.npy"))) == 1
    assert str(elsewhere[1]) in capsys.readouterr().err
    # Without a home there is no cache folder, and none is made that is named `~`.
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.chdir(pets)
    shutil.rmtree(elsewhere[1])
    decode_all(load_data(pets, seed=0))
    assert len(list(elsewhere[1].glob("*/*.npy"))) == 1
    assert not (pets / "~").exists()


def test_where_nothing_can_be_written_photos_are_decoded_anew(pets, elsewhere, capsys):
    (pets / "cache").write_text("")
    elsewhere[1].write_text("")
    assert_aligned(*decode_all(load_data(pets, seed=0)))
    lines = [line for line in capsys.readouterr().err.splitlines() if "decoded photos" in line]
    assert len(lines) == 1
    assert "neither beside the data nor in" in lines[0]
    with pytest.raises(UserError, match="--skip-bad needs the store"):
        decode_all(load_data(pets, seed=0), skip_bad=True)


@contextlib.contextmanager
def without_rights_of_root():
    user = os.geteuid()
    if user == 0:
        os.seteuid(65_534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("rights", [0o000, 0o555, 0o777], ids=["none", "to look", "but the lock's"])
def test_a_folder_of_somebody_else_is_left_to_them(drawn, rights, monkeypatch, capsys):
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others.
        root = Path(name)
        shutil.copytree(drawn, root / "pets")
        (root / "pets").chmod(0o755)
        theirs = root / "pets" / ".minivit"
        theirs.mkdir()
        (theirs / ".lock").touch(0o400)
        theirs.chmod(rights)
        root.chmod(0o777)
        monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        with without_rights_of_root():
            data, splits = decode_all(load_data(root / "pets", seed=0))
            assert len(splits[0][0]) == len(data.train)
        theirs.chmod(0o755)
        assert len(list((root / "cache" / "minivit").glob("*/*.npy"))) == 1
        assert [path.name for path in theirs.iterdir()] == [".lock"]
    assert f"{theirs}: cannot be written to; the decoded" in capsys.readouterr().err


def test_a_file_system_without_locks_is_used_without_and_named(pets, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert_aligned(*decode_all(load_data(pets, seed=0)))
    assert len(made(pets)) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if "no locks" in line]
    assert len(said) == 1
    assert str(pets / ".minivit") in said[0]


def two_classes(root):
    """Write class folders of equally large photos of one time: red ones and blue ones."""
    for name in ("red", "blue"):
        (root / name).mkdir()
        for i in range(10):
            path = root / name / f"{i}.bmp"
            Image.new("RGB", (24, 20), name).save(path)
            os.utime(path, (0, 0))
    return root


def swap(one, other):
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def swap_links(root):
    """Let the links to two folders change places."""
    for name in ("red", "blue"):
        (root / name).rename(root / f".{name}")
        (root / name).symlink_to(f".{name}")


def overwrite(root):
    """Let the contents of photos change places in files that keep their times."""
    for red in (root / "red").iterdir():
        blue = root / "blue" / red.name
        data = red.read_bytes(), blue.read_bytes()
        for path, content in zip((blue, red), data):
            path.write_bytes(content)
            os.utime(path, (0, 0))


SWAPS = {
    "contents": (lambda root: None, overwrite),
    "class folders": (lambda root: None, lambda root: swap(root / "red", root / "blue")),
    "photos": (lambda root: None, lambda root: swap(root / "red/1.bmp", root / "blue/1.bmp")),
    "links to folders": (swap_links, lambda root: swap(root / "red", root / "blue")),
}


@pytest.mark.parametrize("prepare, change", SWAPS.values(), ids=SWAPS)
def test_photos_that_change_places_are_decoded_anew(tmp_path, prepare, change):
    root = two_classes(tmp_path)
    prepare(root)
    assert_aligned(*decode_all(load_data(root, seed=0)))
    change(root)
    assert_aligned(*decode_all(load_data(root, seed=0)))


def test_data_sets_that_change_places_do_not_change_stores(tmp_path, monkeypatch):
    """A store in the user's cache folder is found by the path of the data set."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    roots = [tmp_path / "one", tmp_path / "other"]
    for root in roots:
        root.mkdir()
        two_classes(root)
        (root / ".minivit").touch()
    swap(roots[1] / "red", roots[1] / "blue")
    decode_all(load_data(roots[0], seed=0))
    swap(*roots)
    assert_aligned(*decode_all(load_data(roots[0], seed=0)))


def test_a_resumed_run_notices_swapped_folders_but_not_a_copy(tmp_path):
    root, copy = tmp_path / "data", tmp_path / "copy"
    root.mkdir()
    two_classes(root)

    def checksum(root):
        data = load_data(root, seed=0)
        return store.checksum(*((split.paths, split.labels) for split in (data.train, data.val)))

    before = checksum(root)
    shutil.copytree(root, copy, copy_function=shutil.copyfile)
    assert checksum(copy) == before
    swap(root / "red", root / "blue")
    assert checksum(root) != before


def test_another_version_of_what_decodes_makes_a_store_anew(pets, opened, monkeypatch):
    data = load_data(pets, seed=0)
    for name in ("PIL.__version__", "minivit.data.store.VERSION"):
        decode_all(data)
        before = made(pets)
        opened.clear()
        monkeypatch.setattr(name, "another")
        decode_all(data)
        assert len(opened) == 24
        assert len(made(pets)) == 1
        assert made(pets) != before


def test_a_photo_that_has_become_readable_is_not_left_out_again(pets, opened):
    data = load_data(pets, seed=0)
    path = data.train.paths[3]
    photo = path.read_bytes()
    os.utime(path, (0, 0))
    path.write_bytes(bytes(len(photo)))
    os.utime(path, (0, 0))  # as for a disk that answers with zeros, or not at all
    kept, _ = decode_all(data, skip_bad=True)
    assert path not in kept.train.paths
    path.write_bytes(photo)
    os.utime(path, (0, 0))
    assert_aligned(*decode_all(data))
    assert decode_all(data)[0] == data
    assert len(opened) == 2 * 24


def test_photos_that_vanish_before_they_are_decoded_are_named(pets, capsys):
    data = load_data(pets, seed=0)
    path = data.train.paths[3]
    path.unlink()
    with pytest.raises(UserError, match=f"1 of 24 photos cannot be read: .*{path.name}: no such"):
        decode_all(data)
    kept, _ = decode_all(data, skip_bad=True)
    assert len(kept.train) == len(data.train) - 1
    assert f"left out: {path}: no such photo" in capsys.readouterr().err


def test_a_rank_that_does_not_see_the_store_decodes_the_same_pixels(pets):
    data, file = store.prepare(load_data(pets, seed=0), PREPROCESS, workers=2, cap_gib=1)
    file.unlink()
    assert_aligned(data, store.open_splits(data, file, PREPROCESS, 2))


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
