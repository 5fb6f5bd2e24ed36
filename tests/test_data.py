"""Data sets: their layouts, splits, download, and augmentation."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import socket
import tarfile
import threading
import time
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import BREEDS, draw_photo, make_pets
from torch.testing import assert_close

from minivit import Preprocess
from minivit.data.augment import augment, draw_augmentation
from minivit.data.datasets import load_data, split_data
from minivit.data.listing import list_data
from minivit.data.survey import quick_findings
from minivit.errors import UserError


@pytest.fixture
def pets(tmp_path):
    return make_pets(tmp_path)


def test_pets_are_in_label_order_with_a_stratified_tenth_for_validation(pets):
    data = load_data(pets, seed=0)
    assert data.is_pets
    assert data.classes == ("Zorro Cat", "Alpha Dog", "Beta Cat")
    assert [len(split) for split in (data.train, data.val, data.test)] == [54, 6, 9]
    assert sorted(data.val.labels) == [0, 0, 1, 1, 2, 2]
    paths = [set(split.paths) for split in (data.train, data.val, data.test)]
    assert sum(map(len, paths)) == len(set.union(*paths)) == 69
    for path, label in zip(data.train.paths, data.train.labels):
        assert path.name.startswith(BREEDS[label])


def test_the_split_is_fixed_by_the_seed(pets):
    inner = load_data(pets / "oxford-iiit-pet", seed=0)
    assert load_data(pets, seed=0) == replace(inner, root=pets)
    assert load_data(pets, seed=0).val != load_data(pets, seed=1).val
    assert load_data(pets, seed=0).test == load_data(pets, seed=1).test


def test_a_listed_photo_that_is_missing_is_named(pets):
    (pets / "oxford-iiit-pet" / "images" / "alpha_dog_3.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 69 listed photos not found \(alpha_dog_3.jpg\)"):
        load_data(pets, seed=0)


@pytest.mark.parametrize(
    "line, message", [("nonsense", "expected lines like"), ("x_1 9 1 1", "expected labels 1 to 4")]
)
def test_a_bad_listing_is_refused(pets, line, message):
    listing = pets / "oxford-iiit-pet" / "annotations" / "test.txt"
    listing.write_text(f"{line}\n")
    draw_photo(4, 4).save(pets / "oxford-iiit-pet" / "images" / "x_1.jpg")
    with pytest.raises(UserError, match=message):
        load_data(pets, seed=0)


def test_class_folders_work_with_and_without_splits(shapes_data, tmp_path, capsys):
    data = load_data(shapes_data, seed=0)
    assert not data.is_pets
    assert data.classes == ("blue", "green", "red")
    assert [len(split) for split in (data.train, data.val, data.test)] == [33, 3, 12]
    assert capsys.readouterr().err == ""
    data = load_data(shapes_data / "train", seed=0)
    sizes = [len(split) for split in (data.train, data.val, data.test)]
    assert sum(sizes) == 36
    assert sizes[1] == 3
    assert 3 <= sizes[2] <= 6
    assert "no test/ folder" in capsys.readouterr().err


def test_one_listing_serves_both_the_split_and_the_findings(shapes_data, monkeypatch):
    listing = list_data(shapes_data)
    monkeypatch.setattr(os, "scandir", None)
    assert len(split_data(listing, seed=0).train) == 33
    assert quick_findings(listing) == []


def test_folders_that_cannot_be_trained_on_are_refused(tmp_path):
    (tmp_path / "one" / "cat").mkdir(parents=True)
    for i in range(5):
        draw_photo(9, 9).save(tmp_path / "one" / "cat" / f"{i}.png")
    with pytest.raises(UserError, match=r"at least 2 classes, found 1 \(cat\)"):
        load_data(tmp_path / "one", seed=0)
    (tmp_path / "one" / "dog").mkdir()
    draw_photo(9, 9).save(tmp_path / "one" / "dog" / "1.png")
    with pytest.raises(UserError, match="too few photos"):
        load_data(tmp_path / "one", seed=0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(UserError, match="found neither"):
        load_data(tmp_path / "other", seed=0)


def test_hidden_folders_are_no_classes(shapes_data, tmp_path):
    shutil.copytree(shapes_data / "train", tmp_path / "mine")
    (tmp_path / "mine" / ".thumbnails").mkdir()
    draw_photo(9, 9).save(tmp_path / "mine" / ".thumbnails" / "1.png")
    assert load_data(tmp_path / "mine", seed=0).classes == ("blue", "green", "red")


def test_a_home_that_nobody_has_is_just_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~nobody-has-this-name").touch()
    with pytest.raises(UserError, match="~nobody-has-this-name: expected a folder, found a file"):
        load_data("~nobody-has-this-name", seed=0)


def test_a_class_that_is_only_in_the_test_is_refused(tmp_path):
    for split, names in (("train", ("cat", "dog")), ("test", ("cat", "dog", "fox"))):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                draw_photo(9, 9).save(tmp_path / split / name / f"{i}.png")
    with pytest.raises(UserError, match="class 'fox' has no folder"):
        load_data(tmp_path, seed=0)


PREPROCESS = Preprocess((16, 16))


def test_a_class_folder_of_any_name_becomes_a_label(tmp_path):
    names = [b"caf\xe9", b"\x1b[31mred", "\N{CAT FACE}".encode(), b"x" * 255]
    for name in names:
        folder = tmp_path / os.fsdecode(name)
        folder.mkdir()
        for i in range(4):
            draw_photo(9, 9).save(folder / f"{i}.png")
    data = load_data(tmp_path, seed=0)
    assert sorted(data.classes) == sorted(["caf\\xe9", "\x1b[31mred", "\N{CAT FACE}", "x" * 255])
    json.dumps(data.classes, ensure_ascii=False).encode("utf-8")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local server that has the two archives, and from which torchvision downloads them."""
    from torchvision.datasets import OxfordIIITPet

    make_pets(tmp_path / "there")
    resources = []
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "there"))
    handler.log_message = lambda *_: None
    web = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    for name in ("images", "annotations"):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            archive.add(tmp_path / "there" / "oxford-iiit-pet" / name, name)
        (tmp_path / "there" / f"{name}.tar.gz").write_bytes(buffer.getvalue())
        url = f"http://127.0.0.1:{web.server_port}/{name}.tar.gz"
        resources.append((url, hashlib.md5(buffer.getvalue()).hexdigest()))
    monkeypatch.setattr(OxfordIIITPet, "_RESOURCES", tuple(resources))
    yield tmp_path / "there"
    web.shutdown()
    web.server_close()


def load_here(tmp_path):
    listing = list_data(tmp_path / "here", download=True, anywhere=True)
    return split_data(listing, seed=0)


def test_pets_are_downloaded_where_they_are_absent(server, tmp_path):
    data = load_here(tmp_path)
    assert [len(split) for split in (data.train, data.val, data.test)] == [54, 6, 9]
    assert not (tmp_path / "here" / ".download").exists()


def test_an_interrupted_download_is_made_good(server, tmp_path):
    annotations = server / "annotations.tar.gz"
    whole = annotations.read_bytes()
    annotations.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="cannot be fetched.*--data FOLDER"):
        load_here(tmp_path)
    assert not (tmp_path / "here" / "oxford-iiit-pet").exists()
    annotations.write_bytes(whole)
    assert len(load_here(tmp_path).test) == 9


@pytest.mark.parametrize("how", ["refused", "silent"])
def test_a_server_that_does_not_answer_is_one_line_within_10_seconds(how, tmp_path, monkeypatch):
    from torchvision.datasets import OxfordIIITPet

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if how == "silent":
            silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/images.tar.gz"
        monkeypatch.setattr(OxfordIIITPet, "_RESOURCES", ((url, "0"),))
        started = time.perf_counter()
        with pytest.raises(UserError, match=r"cannot be fetched from www.robots.ox.ac.uk"):
            load_here(tmp_path)
    assert time.perf_counter() - started < 10


def draws(**wanted):
    values = {"flip": 0.9, "turn": 0.5, "scale": 1.0, "x": 0.5, "y": 0.5} | wanted  # the identity
    return torch.tensor([list(values.values())])


def test_augmentation_does_what_its_draws_say():
    image = torch.rand(1, 3, 20, 30)
    assert_close(augment(image, draws()), image, rtol=0, atol=1e-5)
    assert_close(augment(image, draws(flip=0.1)), image.flip(3), rtol=0, atol=1e-5)
    ramp = torch.arange(100.0).view(1, 1, 1, 100).expand(1, 3, 100, 100)
    left = augment(ramp, draws(scale=0.0, x=0.0))
    assert_close(
        left[0, 0, 50, [0, 99]], torch.tensor([-0.1, 79.1]).clamp(min=0.1), rtol=0, atol=0.3
    )
    for share, first in ((0.0, 0), (0.5, 10), (1.0, 20)):  # A crop of 80 pixels can move by 20.
        crop = augment(ramp.mT.contiguous(), draws(scale=0.0, y=share))
        expected = torch.tensor([first - 0.1, first + 39.1, first + 78.3])
        assert_close(crop[0, 0, [0, 49, 98], 50], expected, rtol=0, atol=0.5)
    spot = torch.zeros(1, 3, 101, 201)
    spot[:, :, 49:52, 179:182] = 1  # 80 pixels right of the centre
    turned = augment(spot, draws(turn=1.0))[0, 0]
    y, x = (turned == turned.max()).nonzero()[0].tolist()
    assert abs(x - 100) == pytest.approx(80 * 0.985, abs=1.5)
    assert abs(y - 50) == pytest.approx(80 * 0.174, abs=1.5)


def test_each_photo_has_its_own_augmentation_whatever_its_batch():
    images, drawn = torch.rand(6, 3, 16, 16), draw_augmentation(6, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, draw_augmentation(6, torch.Generator().manual_seed(0)))
    assert_close(
        augment(images, drawn),
        torch.cat([augment(images[:4], drawn[:4]), augment(images[4:], drawn[4:])]),
    )
