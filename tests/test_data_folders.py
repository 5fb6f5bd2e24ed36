"""What a data folder is, and that everything in it is read, refused or named."""

from __future__ import annotations

import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conftest import BREEDS, draw_photo, make_pets, run_train
from PIL import Image

from minivit import commands
from minivit.data import folder as folders
from minivit.data import photos
from minivit.data.datasets import load_data, split_data
from minivit.data.folder import read_folder
from minivit.data.jobs import find_photos
from minivit.data.listing import list_data
from minivit.data.photos import FORMATS
from minivit.data.survey import quick_findings
from minivit.errors import UserError
from minivit.figures.drawing import new_figure
from minivit.figures.drawing import save as save_figure
from minivit.settings import TrainSettings
from minivit.tools import describe, doctor
from minivit.tools.score.splits import load_masked_split
from minivit.tools.study import command as study
from minivit.train import load_data as load_to_train

PHOTO = np.asarray(draw_photo(24, 18))


def save_photo(path: Path) -> None:
    """Write a photo of a few pixels, a PNG whatever the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(PHOTO).save(path, "PNG")


HEIC_SUFFIXES = (".heic", ".heif", ".hif", ".heics", ".heifs")


@pytest.fixture
def without_heic(monkeypatch):
    """As on a machine without pillow-heif and pi-heif."""
    formats = [name for name in photos.FORMATS if name != "HEIF"]
    suffixes = [suffix for suffix in folders.SUFFIXES if suffix not in HEIC_SUFFIXES]
    monkeypatch.setattr(photos, "FORMATS", tuple(formats))
    monkeypatch.setattr(folders, "SUFFIXES", tuple(suffixes))
    monkeypatch.setattr(folders, "PACKAGE_SUFFIXES", HEIC_SUFFIXES)


def without_avif(monkeypatch) -> None:
    """Let Pillow be too old for AVIF."""
    if "AVIF" not in FORMATS:
        pytest.skip("this Pillow writes no AVIF")
    formats = [name for name in photos.FORMATS if name != "AVIF"]
    suffixes = [suffix for suffix in folders.SUFFIXES if not suffix.startswith(".avif")]
    monkeypatch.setattr(photos, "FORMATS", tuple(formats))
    monkeypatch.setattr(folders, "SUFFIXES", tuple(suffixes))
    monkeypatch.setattr(folders, "PACKAGE_SUFFIXES", (*folders.PACKAGE_SUFFIXES, ".avif", ".avifs"))


def save_heic_start(path: Path) -> None:
    """Write what a HEIC begins with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))


def make_classes(root: Path, *names: str, n: int = 4) -> Path:
    """Write n photos into a folder for each class."""
    for name in names:
        for i in range(n):
            save_photo(root / name / f"{i}.png")
    return root


def found(root: Path) -> dict[str, list[str]]:
    """Return the names in the findings that need no photo to be opened, by kind."""
    return {finding.kind: finding.files for finding in quick_findings(list_data(root))}


def draw_figure(path: Path) -> None:
    with new_figure((2, 1)) as figure:
        save_figure(figure, path)


# Which folder is read


def test_pets_under_another_name_are_read_and_not_their_neighbour(tmp_path):
    make_pets(tmp_path)
    make_pets(tmp_path / "other", trainval=5, test=2)
    clean = (tmp_path / "other" / "oxford-iiit-pet").rename(tmp_path / "pets_clean")
    data = load_data(clean, seed=0)
    assert data.root == clean
    assert len(data.paths()) == 3 * 7
    assert all(path.parent == clean / "images" for path in data.paths())


def test_pets_under_another_name_are_not_their_parents_class_folders(tmp_path):
    make_classes(tmp_path, "holiday", "family")
    make_pets(tmp_path)
    mine = (tmp_path / "oxford-iiit-pet").rename(tmp_path / "mypets")
    assert load_data(mine, seed=0).classes == ("Zorro Cat", "Alpha Dog", "Beta Cat")
    with pytest.raises(
        UserError, match="mypets: no photo of this class is read: 70 photos in a folder inside"
    ):
        load_data(tmp_path, seed=0)


def test_pets_beside_class_folders_are_read_and_these_are_named(tmp_path):
    make_classes(make_pets(tmp_path), "holiday")
    make_classes(tmp_path / "shapes" / "train", "circle")
    save_photo(tmp_path / "1.png")
    save_photo(tmp_path / "oxford-iiit-pet" / "images" / "images" / "1.png")
    assert load_data(tmp_path, seed=0).is_pets
    assert found(tmp_path)["beside"] == ["holiday", "images", "shapes"]
    assert found(tmp_path)["outside"] == ["1.png"]


@pytest.mark.parametrize("way", ["slash", "link", "home", "dot"])
def test_one_folder_is_the_same_whatever_its_spelling(tmp_path, monkeypatch, way):
    root = make_classes(tmp_path / "home" / "data", "cat", "dog")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(root)
    (tmp_path / "link").symlink_to(root)
    spelling = {"slash": f"{root}/", "link": tmp_path / "link", "home": "~/data", "dot": "."}[way]
    data = load_data(spelling, seed=0)
    names = [path.relative_to(data.root) for path in data.test.paths]
    assert names == [path.relative_to(root) for path in load_data(root, seed=0).test.paths]


WRONG = {
    "absent": (lambda root: None, "no such folder"),
    "dangling link": (lambda root: root.symlink_to("nowhere"), "a link that leads nowhere"),
    "photo": (save_photo, "expected a folder, found a file"),
    "empty": (lambda root: root.mkdir(), "the folder is empty"),
    "only hidden": (lambda root: save_photo(root / ".cache" / "1.png"), "the folder is empty"),
    "photos directly": (lambda root: save_photo(root / "1.png"), r"1 photos directly in it"),
    "archive": (lambda root: save_photo(root / "images.tar.gz"), "images.tar.gz.*unpacked first"),
    "too high": (lambda root: make_classes(root / "pets", "a", "b"), r"but \S*/data/pets is one"),
    "far too high": (
        lambda root: make_classes(root / "my" / "pets", "a", "b"),
        r"photos in folders further down, as my/pets/a/0.png",
    ),
    "train a level too deep": (
        lambda root: [
            make_classes(root / name, "a", "b") for name in ("train/animals", "val", "test")
        ],
        "no class folders in train/, whose photos lie further down, as train/animals/a/0.png",
    ),
    "other split names": (
        lambda root: [make_classes(root / name, "a", "b") for name in ("fit", "check")],
        r"several data folders \(check/ and fit/\): call them train/",
    ),
    "other files": (lambda root: root.mkdir() or (root / "a.txt").touch(), "but 1 .txt files"),
}


@pytest.mark.parametrize("make, message", WRONG.values(), ids=WRONG)
def test_what_is_no_data_folder_is_one_line_that_says_what_it_is(tmp_path, make, message):
    root = tmp_path / "data"
    make(root)
    with pytest.raises(UserError, match=message) as raised:
        load_data(root, seed=0)
    assert "\n" not in str(raised.value)
    assert str(root) in str(raised.value)


def test_an_empty_name_is_not_the_working_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(make_classes(tmp_path, "cat", "dog"))
    with pytest.raises(UserError, match="expected the name of a folder"):
        load_data("", seed=0)
    for command, arguments in ((doctor, ["--data", ""]), (describe, ["demo", "--data", ""])):
        assert command.main(arguments) == 2
        assert "empty" in capsys.readouterr().err


def test_a_folder_that_may_not_be_read_is_not_taken_for_absent(tmp_path, monkeypatch, capsys):
    root = make_classes(tmp_path, "cat", "dog")
    scandir = os.scandir

    def refuse(folder):
        if Path(folder).name == "cat":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert doctor.main(["--data", str(root)]) == 2
    assert capsys.readouterr().err.endswith("/cat: Permission denied\n")


def test_a_locked_folder_beside_the_data_is_named_and_stops_nothing(tmp_path, monkeypatch):
    make_classes(make_pets(tmp_path), "private")
    scandir = os.scandir

    def refuse(folder):
        if Path(folder).name == "private":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert load_data(tmp_path, seed=0).is_pets
    assert found(tmp_path)["locked"] == ["private"]


# Download


@pytest.mark.parametrize("flags", [(), ("--dry-run",), ("--resume",), ("--dry-run", "--download")])
def test_a_mistyped_folder_creates_nothing(tmp_path, monkeypatch, capsys, flags):
    monkeypatch.setattr("minivit.data.listing.download_pets", None)
    monkeypatch.chdir(tmp_path)
    assert run_train("demo", "phtoos", "run", *flags) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_pets_are_downloaded_into_the_default_folder_or_on_demand(tmp_path, monkeypatch):
    downloads = []

    def download(root):
        downloads.append(str(root))
        make_pets(root)

    monkeypatch.setattr("minivit.data.listing.download_pets", download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="a dry run downloads nothing"):
        load_to_train(TrainSettings(dry_run=True))
    for root in ("data", "./data", "data/"):
        load_to_train(TrainSettings(data=root))
    with pytest.raises(UserError, match="no such folder"):
        load_to_train(TrainSettings(data="mine"))
    assert downloads == ["data"]
    (tmp_path / "mine").mkdir()
    load_to_train(TrainSettings(data="mine", download=True))
    assert downloads == ["data", "mine"]
    load_to_train(TrainSettings(data="mine", download=True, dry_run=True))


def test_a_download_never_lands_among_other_photos(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("minivit.data.listing.download_pets", None)
    make_classes(tmp_path, "cat", "dog")
    assert run_train("demo", tmp_path, tmp_path / "run", "--download") == 2
    assert "only into an absent or empty folder" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# Splits


@pytest.mark.parametrize(
    "train, val, test",
    [
        ("train", "valid", "test"),
        ("train", "validation", "test"),
        ("Train", "Val", "Test"),
        ("Training", "Validation", "Testing"),
    ],
)
def test_splits_are_known_by_all_usual_names(tmp_path, train, val, test):
    for name, n in ((train, 3), (val, 2), (test, 1)):
        make_classes(tmp_path / name, "cat", "dog", n=n)
    data = load_data(tmp_path, seed=0)
    assert [len(split) for split in (data.train, data.val, data.test)] == [6, 4, 2]
    assert found(tmp_path) == {}


def test_two_folders_for_one_split_are_refused_by_name(tmp_path):
    for name in ("train", "valid", "validation", "test"):
        make_classes(tmp_path / name, "cat", "dog")
    with pytest.raises(UserError, match="found valid/ and validation/; merge them"):
        load_data(tmp_path, seed=0)
    shutil.rmtree(tmp_path / "valid")
    (tmp_path / "valid").mkdir()
    assert len(load_data(tmp_path, seed=0).val) == 8
    assert found(tmp_path) == {"other": ["valid"]}


@pytest.mark.parametrize("other", ["test1", "Testing", "val"])
def test_splits_without_class_folders_are_not_taken_for_classes(tmp_path, other):
    make_classes(tmp_path / "images", "train", other)
    for root in (tmp_path / "images", tmp_path):
        with pytest.raises(UserError, match="images: .* hold photos directly, so the classes"):
            load_data(root, seed=0)
    make_classes(tmp_path / "images", "bus")
    assert len(load_data(tmp_path / "images", seed=0).classes) == 3


def test_a_class_may_be_called_train_val_or_test(tmp_path):
    make_classes(tmp_path, "bus", "car", "train", "test", "val")
    assert load_data(tmp_path, seed=0).classes == ("bus", "car", "test", "train", "val")


def test_train_with_photos_and_folders_is_ambiguous_beside_classes(tmp_path):
    make_classes(tmp_path, "bus", "train", "train/steam", "train/diesel")
    with pytest.raises(UserError, match=r"train/ holds photos and folders of photos.*beside bus/"):
        load_data(tmp_path, seed=0)


def test_a_split_of_an_unusual_name_is_not_left_out(tmp_path):
    for name in ("train", "dev", "test"):
        make_classes(tmp_path / name, "cat", "dog")
    with pytest.raises(UserError, match=r"dev: looks like a split.*call it val/, or move it away"):
        load_data(tmp_path, seed=0)
    make_classes(tmp_path / "val", "cat", "dog")
    load_data(tmp_path, seed=0)
    assert found(tmp_path) == {"beside": ["dev"]}


def test_a_split_without_class_folders_is_refused(tmp_path):
    make_classes(tmp_path / "train", "cat", "dog")
    make_classes(tmp_path, "test")
    with pytest.raises(UserError, match="test: no photos in its class folders, 4 outside of them"):
        load_data(tmp_path, seed=0)


# Classes


def test_names_are_compared_in_one_normal_form(tmp_path):
    decomposed = unicodedata.normalize("NFD", "café")
    make_classes(tmp_path / "train", decomposed, "zoo")
    make_classes(tmp_path / "val", "café", "zoo")
    make_classes(tmp_path / "test", decomposed, "zoo")
    data = load_data(tmp_path, seed=0)
    assert data.classes == ("café", "zoo")
    assert data.train.labels == data.val.labels == [0] * 4 + [1] * 4


@pytest.mark.parametrize(
    "other, shown",
    [
        (unicodedata.normalize("NFD", "café"), r"(written 'cafe\u0301')"),
        ("Café", r"'Café'"),
        ("café ", "'café '"),
    ],
    ids=["normal form", "case", "space"],
)
def test_two_folders_that_could_be_one_class_are_refused(tmp_path, other, shown):
    make_classes(tmp_path, "café", other, "zoo")
    with pytest.raises(UserError, match="one folder for each class") as raised:
        load_data(tmp_path, seed=0)
    assert shown in str(raised.value)


def test_a_class_that_differs_by_case_between_splits_is_named(tmp_path):
    make_classes(tmp_path / "train", "Cat", "dog")
    make_classes(tmp_path / "test", "cat", "dog")
    with pytest.raises(UserError, match="class 'cat' has no folder in .*; expected 'Cat'"):
        load_data(tmp_path, seed=0)


LOST = {
    "heic": (
        lambda folder: [save_heic_start(folder / name) for name in ("1.HEIC", "2.heif")],
        r"1 .heic and 1 .heif, so pip install 'minivit\[heic\]', or convert to JPEG",
    ),
    "heic without an extension": (
        lambda folder: save_heic_start(folder / "1"),
        r"1 extensionless, so pip install 'minivit\[heic\]'",
    ),
    "avif": (
        lambda folder: save_as(folder / "1.avif"),
        "1 .avif, so upgrade Pillow to 11.3, or convert to JPEG",
    ),
    "jpeg xl": (
        lambda folder: save_photo(folder / "1.JXL"),
        "1 .jxl in a format that cannot be opened",
    ),
    "raw": (
        lambda folder: [save_photo(folder / f"{i}.{s}") for i in "12" for s in ("cr2", "nef")],
        "2 .cr2 and 2 .nef in a format that cannot be opened",
    ),
    "other extension": (
        lambda folder: save_photo(folder / "1.dat"),
        "1 photo with another extension",
    ),
    "hidden": (lambda folder: save_photo(folder / ".1.png"), "1 photo hidden by a dot"),
    "nested": (
        lambda folder: save_photo(folder / "a" / "b" / "1.png"),
        r"1 photo in a folder inside .*a/b/1",
    ),
    "empty": (lambda folder: folder.mkdir(), "an empty folder where a class is expected"),
    "empty inside": (lambda folder: (folder / "a").mkdir(parents=True), "an empty folder where"),
}


@pytest.mark.parametrize("make, message", LOST.values(), ids=LOST)
@pytest.mark.parametrize("place", ["", "train", "test"])
def test_no_class_gets_lost_without_a_word(
    tmp_path, without_heic, monkeypatch, place, make, message
):
    if message.startswith("1 .avif"):
        without_avif(monkeypatch)
    for split in ("train", "test") if place else ("",):
        make_classes(tmp_path / split, "cat", "dog", "fox")
    shutil.rmtree(tmp_path / place / "fox")
    make(tmp_path / place / "fox")
    with pytest.raises(UserError, match=f"fox: .*{message}"):
        load_data(tmp_path, seed=0)
    (layout,) = (f for f in quick_findings(list_data(tmp_path)) if f.kind == "layout")
    assert "fox" in layout.message


def test_folders_without_any_photo_are_no_classes(tmp_path):
    make_classes(tmp_path, "cat", "dog")
    for name in ("labels/1.txt", "videos/1.mp4", "__MACOSX/._1.jpg", "@eaDir/1.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    assert load_data(tmp_path, seed=0).classes == ("cat", "dog")
    assert found(tmp_path) == {"other": ["labels", "videos"]}


def test_a_class_without_test_photos_is_named(tmp_path):
    make_classes(tmp_path / "train", "cat", "dog", "fox")
    make_classes(tmp_path / "test", "cat", "dog")
    load_data(tmp_path, seed=0)
    assert found(tmp_path) == {"untested": ["fox"]}


def test_odd_class_names_are_classes_like_any_other(tmp_path):
    names = ("\N{CAT FACE}", "a cat", "st.png", "0")
    assert load_data(make_classes(tmp_path, *names), seed=0).classes == tuple(sorted(names))


# Files


SUFFIXES = ["jpg", "JPEG", "jpe", "jfif", "png", "apng", "gif", "webp", "tif", "TIFF", "bmp"]
SUFFIXES += ["ppm", "pgm", "pbm", "pnm", "mpo", "avif", "heic", "HEIF", "hif"]


def save_as(path: Path) -> None:
    """Write a photo in the format that a file's name stands for, black and white if it must be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    formats = Image.registered_extensions()
    mode = {"pgm": "L", "pbm": "1"}.get(path.suffix[1:], "RGB")
    name = formats[path.suffix.lower()]
    Image.fromarray(PHOTO).convert(mode).save(path, {"MPO": "JPEG"}.get(name, name))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_still_format_that_pillow_reads_is_read(tmp_path, suffix):
    if suffix == "avif" and "AVIF" not in FORMATS:
        pytest.skip("this Pillow has no AVIF")
    if f".{suffix}".lower() in HEIC_SUFFIXES and "HEIF" not in Image.SAVE:
        pytest.skip("needs pillow-heif")
    make_classes(tmp_path, "cat", "dog", n=3)
    save_as(tmp_path / "cat" / f"more.{suffix}")
    assert len(load_data(tmp_path, seed=0).paths()) == 7
    kinds = {finding.kind for finding in doctor.check(tmp_path, workers=1)[1]}
    assert not kinds & {"unreadable", "wrong-extension", "format", "misnamed"}


def test_files_without_an_extension_are_known_by_their_content(tmp_path, without_heic):
    make_classes(tmp_path, "cat", "dog", n=3)
    save_photo(tmp_path / "cat" / "a3f9")
    save_photo(tmp_path / "cat" / "Mr. Whiskers")
    save_heic_start(tmp_path / "cat" / "b")
    (tmp_path / "cat" / "Makefile").write_text("all:")
    assert [path.name for path in load_data(tmp_path, seed=0).paths() if not path.suffix] == [
        "a3f9"
    ]
    assert found(tmp_path) == {
        "heic": ["cat/b"],
        "misnamed": ["cat/Mr. Whiskers"],
        "other": ["cat/Makefile"],
    }


def test_files_that_are_not_read_are_counted_by_extension(tmp_path, without_heic):
    make_classes(tmp_path, "cat", "dog")
    for i in range(12):
        save_heic_start(tmp_path / "cat" / f"{i}.heic")
        save_photo(tmp_path / "cat" / f"{i}.jxl")
    save_photo(tmp_path / "dog" / "9.cr2")
    other, heic = quick_findings(list_data(tmp_path))
    assert str(other) == (
        "warning  1 .cr2 and 12 .jxl files are not read (cat/0.jxl, cat/1.jxl, cat/10.jxl, ...): "
        "minivit cannot open them, so convert them to JPEG"
    )
    assert str(heic) == (
        "warning  12 .heic files are not read (cat/0.heic, cat/1.heic, cat/10.heic, ...): "
        "to read them, pip install 'minivit[heic]', or convert them to JPEG"
    )
    assert (len(other.files), len(heic.files)) == (13, 12)


def test_what_is_named_heic_is_judged_by_its_content_without_pillow_heif(tmp_path, without_heic):
    make_classes(tmp_path, "cat", "dog")
    save_heic_start(tmp_path / "cat" / "1.heic")
    save_photo(tmp_path / "cat" / "2.HEIC")
    (tmp_path / "cat" / "3.heif").write_text("damaged")
    (tmp_path / "cat" / "4.hif").symlink_to("nowhere")
    (tmp_path / "cat" / ".5.heic").touch()
    assert found(tmp_path) == {
        "heic": ["cat/1.heic"],
        "misnamed": ["cat/2.HEIC"],
        "format": ["cat/3.heif", "cat/4.hif"],
        "hidden": ["cat/.5.heic"],
    }


SPECIAL = {
    "dangling link": (lambda path: path.symlink_to("nowhere"), "is a link that leads nowhere"),
    "circular link": (lambda path: path.symlink_to(path.name), "is a link that leads nowhere"),
    "link to a folder": (lambda path: path.symlink_to(path.parent.parent), "is a folder"),
    "folder": (Path.mkdir, "is a folder"),
    "pipe": (os.mkfifo, "is not a file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is not a file"),
}


@pytest.mark.parametrize("make, problem", SPECIAL.values(), ids=SPECIAL)
def test_what_is_no_file_is_refused_or_left_out_by_name(tmp_path, capsys, make, problem):
    make_classes(tmp_path, "cat", "dog")
    make(tmp_path / "cat" / "odd.jpg")
    with pytest.raises(UserError, match=rf"1 of 9 photos cannot be read \(cat/odd.jpg {problem}\)"):
        load_data(tmp_path, seed=0)
    assert found(tmp_path) == {"unreadable": ["cat/odd.jpg"]}
    data = split_data(list_data(tmp_path), seed=0, skip_bad=True)
    assert len(data.paths()) == 8
    assert f"left out: {tmp_path}/cat/odd.jpg: {problem}" in capsys.readouterr().err


def test_a_photo_that_is_still_in_icloud_is_missing_and_not_hidden(tmp_path):
    make_classes(tmp_path, "cat", "dog")
    photo = "cat/.1.JPG.icloud"
    (tmp_path / photo).write_bytes(b"bplist00")
    (tmp_path / "cat" / ".notes.txt.icloud").write_bytes(b"bplist00")
    with pytest.raises(UserError, match=r"\.1\.JPG\.icloud is still in iCloud: download it"):
        load_data(tmp_path, seed=0)
    assert found(tmp_path) == {"unreadable": [photo]}
    assert len(split_data(list_data(tmp_path), seed=0, skip_bad=True).paths()) == 8
    photos, _ = find_photos([str(tmp_path / "cat")])
    assert tmp_path / photo in photos


def test_a_dangling_link_is_left_out_of_training_on_demand(tmp_path, capsys, no_figures):
    data = make_classes(tmp_path / "data", "cat", "dog")
    (data / "cat" / "odd.jpg").symlink_to("nowhere")
    flags = ("--epochs", "1", "--blocks", "none")
    assert run_train("demo", data, tmp_path / "run", *flags) == 2
    assert "add --skip-bad" in capsys.readouterr().err
    assert run_train("demo", data, tmp_path / "run", *flags, "--skip-bad") == 0
    assert "odd.jpg: is a link that leads nowhere" in capsys.readouterr().err


def test_skip_bad_does_not_lose_a_class(tmp_path):
    make_classes(tmp_path, "cat", "dog")
    (tmp_path / "fox").mkdir()
    (tmp_path / "fox" / "1.jpg").symlink_to("nowhere")
    with pytest.raises(UserError, match="no photos are left of fox"):
        split_data(list_data(tmp_path), seed=0, skip_bad=True)


def test_photos_whose_names_differ_in_case_alone_are_noted(tmp_path):
    make_classes(tmp_path, "cat", "dog")
    save_photo(tmp_path / "cat" / "0.PNG")
    assert len(load_data(tmp_path, seed=0).paths()) == 9
    assert found(tmp_path) == {"case": ["cat/0.png"]}


@pytest.mark.parametrize("other", ["alpha_dog_3.JPG", "Alpha_dog_3.jpg", "alpha_dog_3.png"])
def test_a_photo_of_pets_under_another_name_is_named(tmp_path, other):
    images = make_pets(tmp_path) / "oxford-iiit-pet" / "images"
    (images / "alpha_dog_3.jpg").rename(images / other)
    with pytest.raises(UserError, match=f"alpha_dog_3.jpg is there as {other}: rename it"):
        load_data(tmp_path, seed=0)


# What minivit itself has written


def test_figures_of_ours_are_no_class_and_no_photos(tmp_path):
    make_classes(tmp_path, "cat", "dog")
    for name in ("attention/0.png", "cat/0-2.png", "runs/mine/curves.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        draw_figure(tmp_path / name)
    data = load_data(tmp_path, seed=0)
    assert data.classes == ("cat", "dog")
    assert len(data.paths()) == 8
    assert found(tmp_path) == {"own": ["attention", "cat/0-2.png", "runs"]}


def test_a_folder_is_ours_by_its_marks_and_not_by_its_name(tmp_path):
    make_classes(tmp_path, "attention", "runs", "score")
    assert load_data(tmp_path, seed=0).classes == ("attention", "runs", "score")
    draw_figure(tmp_path / "runs" / "9.png")
    assert found(tmp_path) == {"own": ["runs/9.png"]}


def test_a_run_of_an_earlier_version_is_no_class(tmp_path):
    make_classes(tmp_path, "cat", "dog")
    for name in ("curves.png", "predictions.png"):
        save_photo(tmp_path / "mine" / name)
    for name in ("metrics.jsonl", "summary.json"):
        (tmp_path / "mine" / name).write_text("{}")
    assert load_data(tmp_path, seed=0).classes == ("cat", "dog")
    assert found(tmp_path) == {"own": ["mine"]}


def test_a_run_inside_its_own_data_changes_nothing(tmp_path, no_figures):
    data = make_classes(tmp_path, "cat", "dog")
    flags = ("--epochs", "1", "--blocks", "none")
    before = load_data(data, seed=0)
    assert run_train("demo", data, data / "mine", *flags) == 0
    assert load_data(data, seed=0) == before
    assert found(data) == {"own": ["mine"]}


# Folders of photos for infer.py


def test_infer_names_what_it_leaves_out_of_a_folder(tmp_path, capsys, without_heic):
    for name in ("b.JFIF", "a.png", "1.jxl", "2.jxl", "x.dat", "inside/1.png"):
        save_photo(tmp_path / name)
    save_heic_start(tmp_path / "3.heic")
    (tmp_path / "notes.txt").touch()
    (tmp_path / "Thumbs.db").touch()
    (tmp_path / "dangling.jpg").symlink_to("nowhere")
    (tmp_path / "folder.jpg").mkdir()
    draw_figure(tmp_path / "a-2.png")
    photos, num_unread = find_photos([str(tmp_path), str(tmp_path / "a-2.png"), "absent.jpg"])
    names = ["a.png", "b.JFIF", "dangling.jpg", "folder.jpg", "a-2.png", "absent.jpg"]
    assert [path.name for path in photos] == names
    assert num_unread == 4
    assert capsys.readouterr().err.splitlines() == [
        f"{tmp_path}: {line}"
        for line in (
            "2 .jxl files are not read (1.jxl, 2.jxl): "
            "minivit cannot open them, so convert them to JPEG",
            "1 .heic file is not read (3.heic): "
            "to read it, pip install 'minivit[heic]', or convert it to JPEG",
            "1 photo is not read because of the extension (x.dat): "
            "rename it to what it is, as .jpg or .png",
            "1 file or folder is left out (a-2.png): minivit wrote it",
            "1 file or folder is not used (notes.txt): there is no photo in it",
            "photos in folders inside it are left out (inside)",
        )
    ]


@pytest.mark.parametrize("other, code", [("notes.txt", 0), ("1.jxl", 2), ("1.dat", 2)])
def test_infer_ends_with_2_if_a_photo_cannot_be_read(
    tmp_path, tiny_saved, no_figures, capsys, other, code
):
    save_photo(tmp_path / "photos" / "a.png")
    save_photo(tmp_path / "photos" / other)
    flags = ["--model", str(tiny_saved), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert commands.infer([str(tmp_path / "photos"), *flags]) == code
    assert other in capsys.readouterr().err


def test_an_empty_name_of_a_photo_is_not_the_working_directory(tmp_path, monkeypatch):
    save_photo(tmp_path / "1.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="name of a photo or folder, found an empty one"):
        find_photos([""])


def test_a_folder_of_unreadable_photos_is_refused_with_the_reason(tmp_path, without_heic):
    save_heic_start(tmp_path / "1.heic")
    with pytest.raises(UserError, match="no photos in this folder; 1 .heic file is not read"):
        find_photos([str(tmp_path)])


# The test split


def names_of(split) -> set[str]:
    return {f"{path.parent.name}/{path.name}" for path in split.paths}


def test_the_test_split_does_not_depend_on_the_seed_or_the_place(tmp_path):
    make_classes(tmp_path / "a", "cat", "dog", n=30)
    shutil.copytree(tmp_path / "a", tmp_path / "b" / "c")
    first = load_data(tmp_path / "a", seed=0)
    for root, seed in (("a", 1), ("a", 7), ("b/c", 0)):
        other = load_data(tmp_path / root, seed=seed)
        assert names_of(other.test) == names_of(first.test)
    assert names_of(load_data(tmp_path / "a", seed=1).val) != names_of(first.val)


def test_a_photo_that_is_added_moves_no_other_one(tmp_path):
    make_classes(tmp_path, "cat", "dog", n=60)
    before = load_data(tmp_path, seed=0)
    for i in range(20):
        save_photo(tmp_path / "cat" / f"new {i}.png")
    after = load_data(tmp_path, seed=0)
    added = names_of(after.test) - names_of(before.test)
    assert names_of(before.test) <= names_of(after.test)
    assert all(name.startswith("cat/new ") for name in added)


def test_about_a_tenth_of_each_class_is_tested(tmp_path):
    names = [f"class {i}" for i in range(6)]
    data = load_data(make_classes(tmp_path, *names, n=40), seed=0)
    sizes = [data.test.labels.count(label) for label in range(6)]
    assert all(1 <= size <= 8 for size in sizes)
    assert 12 <= sum(sizes) <= 36
    small = load_data(make_classes(tmp_path / "small", "a", "b", n=3), seed=0)
    assert [small.test.labels.count(label) for label in range(2)] == [1, 1]
    assert [small.val.labels.count(label) for label in range(2)] == [1, 1]


# Oxford-IIIT Pet


def test_one_split_of_pets_can_be_read_without_the_other(tmp_path):
    pets = make_pets(tmp_path) / "oxford-iiit-pet"
    whole = load_data(tmp_path, seed=0)
    for i in range(20):
        (pets / "images" / f"{BREEDS[0]}_{i}.jpg").unlink()
    test = load_data(tmp_path, seed=0, only="test")
    assert (test.test, test.classes) == (whole.test, whole.classes)
    (pets / "annotations" / "trainval.txt").unlink()
    assert load_data(tmp_path, seed=0, only="test").test == whole.test
    with pytest.raises(UserError, match=r"trainval.txt: no such file; unpack annotations.tar.gz"):
        load_data(tmp_path, seed=0)


INCOMPLETE = {
    "no listings": (lambda pets: [p.unlink() for p in (pets / "annotations").iterdir()], "no such"),
    "no annotations": (lambda pets: shutil.rmtree(pets / "annotations"), "annotations is missing"),
    "no images": (lambda pets: shutil.rmtree(pets / "images"), "69 of 69 listed photos not found"),
    "packed": (
        lambda pets: shutil.rmtree(pets / "images") or (pets / "images.tar.gz").touch(),
        "unpack .*images.tar.gz there",
    ),
    "a level too deep": (
        lambda pets: (
            (pets / "images").rename(pets / "x")
            and (pets / "images").mkdir() is None
            and (pets / "x").rename(pets / "images" / "images")
        ),
        "move what is in .*images/images one folder up",
    ),
}


@pytest.mark.parametrize("make, message", INCOMPLETE.values(), ids=INCOMPLETE)
def test_incomplete_pets_are_refused_with_what_to_do(tmp_path, make, message):
    pets = make_pets(tmp_path) / "oxford-iiit-pet"
    make(pets)
    with pytest.raises(UserError, match=message):
        load_data(pets, seed=0)


def test_a_folder_is_read_as_names_and_kinds(tmp_path):
    make_classes(tmp_path, "cat", n=1)
    for name in ("b.JPG", "a.png", "a.jxl"):
        save_photo(tmp_path / name)
    (tmp_path / "c.jpg").symlink_to("nowhere")
    contents = read_folder(tmp_path)
    assert contents.photos == ["a.png", "b.JPG"]
    assert contents.folders == ["cat"]
    assert contents.unread == {"a.jxl": "format"}
    assert contents.broken == {"c.jpg": "is a link that leads nowhere"}


# Masks of one's own


def save_masks(root: Path, *names: str) -> None:
    """Write masks, white on black, under these names in masks/."""
    mask = np.zeros(PHOTO.shape[:2], np.uint8)
    mask[4:9, 5:12] = 255
    for name in names:
        (root / "masks" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(root / "masks" / name)


@pytest.mark.parametrize(
    "names",
    [("cat/0.png", "cat/1.png", "dog/3.png"), ("0.png", "2.png")],
    ids=["in folders of classes", "all in one folder"],
)
@pytest.mark.parametrize(
    "split, place", [("", ""), ("train", "train"), ("train", "")], ids=["no splits", "in", "beside"]
)
def test_masks_are_no_class_and_no_split(tmp_path, split, place, names):
    make_classes(tmp_path / split, "cat", "dog")
    if split:
        save_photo(tmp_path / split / "stray.png")  # It alone does not make train/ a class.
    save_masks(tmp_path / place, *names)
    assert load_data(tmp_path, seed=0).classes == ("cat", "dog")
    assert found(tmp_path)["masks"] == [f"{place}/masks".lstrip("/")]
    assert not {"other", "nested", "beside", "layout"} & set(found(tmp_path))


def test_splits_without_classes_are_refused_beside_masks_too(tmp_path):
    for name in ("train/0.png", "test/1.png"):
        (tmp_path / name).parent.mkdir()
        save_photo(tmp_path / name)
    save_masks(tmp_path, "0.png", "1.png")
    with pytest.raises(UserError, match="hold photos directly, so the classes are not known"):
        load_data(tmp_path, seed=0)


def test_photos_in_a_folder_called_masks_beside_train_are_not_taken_for_masks(tmp_path):
    make_classes(tmp_path / "train", "cat", "dog")
    make_classes(tmp_path / "masks", "cat", "dog")
    with pytest.raises(UserError, match="masks: looks like a split"):
        load_data(tmp_path, seed=0)


@pytest.mark.parametrize(
    "change",
    [
        lambda masks: save_photo(masks / "1.png"),
        lambda masks: shutil.copy(masks / "0.png", masks / "another.png"),
        lambda masks: Image.fromarray(PHOTO.mean(2).astype(np.uint8)).save(masks / "0.png"),
        lambda masks: shutil.copytree(masks, masks / "bird"),
    ],
    ids=["a photo in colour", "a name of no photo", "a photo in grey", "a folder of no class"],
)
def test_a_class_that_is_called_masks_stays_one(tmp_path, change):
    make_classes(tmp_path, "cat", "dog")
    save_masks(tmp_path, "0.png", "2.png", "3.png")
    change(tmp_path / "masks")
    assert "masks" in load_data(tmp_path, seed=0).classes
    assert "masks" not in found(tmp_path)


def test_photos_that_are_not_read_explain_why_a_class_is_too_small(tmp_path, without_heic):
    make_classes(tmp_path, "cat", "dog")
    for i in (1, 2, 3):
        (tmp_path / "cat" / f"{i}.png").unlink()
        save_heic_start(tmp_path / "cat" / f"{i}.heic")
    message = r"cat: a class has too few photos; .* found 1, and 3 .heic that cannot be read"
    with pytest.raises(UserError, match=message):
        load_data(tmp_path, seed=0)


def test_measuring_tools_name_the_photos_that_are_not_read(tmp_path, without_heic, capsys):
    make_classes(tmp_path, "cat", "dog")
    save_masks(tmp_path, *(f"{name}/{i}.png" for name in ("cat", "dog") for i in range(4)))
    save_heic_start(tmp_path / "cat" / "9.heic")
    save_photo(tmp_path / "cat" / "9.dat")
    (tmp_path / "cat" / "notes.txt").touch()
    flags = ["--model", "demo", "--data", str(tmp_path), "--device", "cpu"]
    load_masked_split(str(tmp_path), "test", None)
    of_score = capsys.readouterr().err
    assert study.main([*flags, "--dry-run", "--shots", "1", "--seeds", "1"]) == 0
    of_study = capsys.readouterr().err
    for lines in (of_score, of_study):
        assert "1 .heic file is not read (cat/9.heic): to read it, pip install" in lines
        assert "1 photo is not read because of the extension (cat/9.dat)" in lines
        assert "notes.txt" not in lines
