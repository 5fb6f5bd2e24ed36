"""The command `doctor`: each defect that it finds in a folder of photos."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from minivit.data import survey
from minivit.data.listing import list_data
from minivit.errors import UserError
from minivit.tools import doctor
from minivit.tools.demo.drawings import draw_pets


def photo(seed, size=(96, 72)):
    """Return a photo whose texture no other photo has."""
    blobs = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(blobs).resize(size, Image.Resampling.BICUBIC)


def save_photos(folder, seed, n, suffix=".jpg", size=(96, 72), **kwargs):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        photo(seed + i, size).save(folder / f"{i}{suffix}", **kwargs)


@pytest.fixture
def folder(tmp_path):
    """Class folders of cats and dogs without defects: 6 photos train, 2 validate, 2 test."""
    for s, (split, n) in enumerate((("train", 6), ("val", 2), ("test", 2))):
        for c, name in enumerate(("cat", "dog")):
            save_photos(tmp_path / split / name, 1000 * s + 100 * c, n)
    return tmp_path


@pytest.fixture
def pets(tmp_path):
    """Oxford-IIIT Pet's layout with masks: 4 training and 2 test photos of each of 3 breeds."""
    folder = tmp_path / "oxford-iiit-pet"
    (folder / "images").mkdir(parents=True)
    (folder / "annotations" / "trimaps").mkdir(parents=True)
    for s, (split, n) in enumerate((("trainval", 4), ("test", 2))):
        lines = []
        for label, breed in enumerate(("Abyssinian", "beagle", "Bengal"), 1):
            for i in range(s * 10, s * 10 + n):
                photo(100 * label + i).save(folder / "images" / f"{breed}_{i}.jpg")
                mask = np.full((72, 96), 2, np.uint8)
                mask[20:50, 30:60] = 1
                Image.fromarray(mask).save(folder / "annotations" / "trimaps" / f"{breed}_{i}.png")
                lines.append(f"{breed}_{i} {label} 1 1")
        (folder / "annotations" / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def found(root):
    """Return the names in the doctor's findings by kind."""
    return {finding.kind: finding.files for finding in doctor.check(root, workers=2)[1]}


def quick_findings(root):
    return survey.quick_findings(list_data(root))


def message(root, kind):
    return next(
        finding.message for finding in doctor.check(root, workers=2)[1] if finding.kind == kind
    )


def test_a_sound_folder_has_no_findings(folder):
    photos, findings = doctor.check(folder, workers=2)
    assert findings == quick_findings(folder) == []
    assert len(photos) == 20


def test_class_folders_right_in_the_folder_are_read_too(folder, capsys):
    photos, findings = doctor.check(folder / "train", workers=2)
    assert findings == []
    assert {photo.name for photo in photos} == {
        f"{name}/{i}.jpg" for name in ("cat", "dog") for i in range(6)
    }


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])


def turn(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(7).save(path, exif=exif)


def replace(path, make):
    path.unlink()
    make(path)


CAT = "train/cat/0.jpg"
DEFECTS = {
    "truncated": (cut, "unreadable"),
    "zero bytes": (lambda p: p.write_bytes(b""), "unreadable"),
    "text": (lambda p: p.write_text("not a photo"), "unreadable"),
    "folder": (lambda p: replace(p, Path.mkdir), "unreadable"),
    "pipe": (lambda p: replace(p, os.mkfifo), "unreadable"),
    "device": (lambda p: replace(p, lambda p: p.symlink_to("/dev/zero")), "unreadable"),
    "broken link": (lambda p: replace(p, lambda p: p.symlink_to("nowhere")), "unreadable"),
    "circular link": (lambda p: replace(p, lambda p: p.symlink_to(p.name)), "unreadable"),
    "too many pixels": (lambda p: Image.new("1", (10_001, 10_000)).save(p, "PNG"), "unreadable"),
    "PNG named .jpg": (lambda p: photo(7).save(p, "PNG"), "wrong-extension"),
    "greyscale": (lambda p: photo(7).convert("L").save(p), "mode"),
    "CMYK": (lambda p: photo(7).convert("CMYK").save(p), "mode"),
    "turned": (turn, "exif-rotation"),
    "tiny": (lambda p: photo(7, (200, 63)).save(p), "tiny"),
    "huge": (lambda p: photo(7, (5001, 5000)).save(p), "huge"),
}


@pytest.mark.parametrize("plant, kind", DEFECTS.values(), ids=DEFECTS)
def test_a_defect_is_found_under_its_kind_and_nothing_else(folder, plant, kind):
    plant(folder / CAT)
    assert found(folder) == {kind: [CAT]}


@pytest.mark.parametrize(
    "mode, suffix",
    [
        ("RGBA", ".png"),
        ("LA", ".png"),
        ("P", ".png"),
        ("I;16", ".png"),
        ("P", ".gif"),
        ("1", ".bmp"),
    ],
)
def test_unusual_modes_are_named(folder, mode, suffix):
    path = folder / "train" / "cat" / f"odd{suffix}"
    if mode == "I;16":
        Image.fromarray(np.asarray(photo(7).convert("L"), np.uint16) * 257).save(path)
    else:
        photo(7).convert(mode).save(path)
    assert found(folder) == {"mode": [f"train/cat/odd{suffix}"]}
    assert f"odd{suffix} is {mode}" in message(folder, "mode")


@pytest.mark.parametrize(
    "suffix", [".jpeg", ".JPG", ".png", ".webp", ".tif", ".tiff", ".bmp", ".ppm"]
)
def test_every_suffix_that_is_read_goes_with_its_format(folder, suffix):
    photo(7).save(folder / "train" / "cat" / f"odd{suffix}")
    assert found(folder) == {}


def grey16(values):
    """Return a greyscale image of 16 bits a pixel."""
    return Image.fromarray(values.astype(np.uint16))


ONE_COLOUR = {
    "black": lambda: Image.new("RGB", (96, 72)),
    "sensor noise": lambda: Image.fromarray(
        np.random.default_rng(0).normal(9, 2, (72, 96, 3)).astype(np.uint8)
    ),
    "12 bits in 16": lambda: grey16(np.asarray(photo(7).convert("L")).astype(int) * 16),
    "8 bits in 16": lambda: grey16(np.asarray(photo(7).convert("L"))),
    "transparent": lambda: Image.merge("RGBA", (*photo(7).split(), Image.new("L", (96, 72)))),
}


@pytest.mark.parametrize("make", ONE_COLOUR.values(), ids=ONE_COLOUR)
def test_a_photo_that_comes_out_in_one_colour_is_found(folder, make):
    make().save(folder / "train" / "cat" / "odd.png")
    assert found(folder).get("one-colour") == ["train/cat/odd.png"]
    assert "1 photo comes out in nearly one colour everywhere" in message(folder, "one-colour")


def test_drawings_are_not_taken_for_one_colour(tmp_path):
    for c, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for i in range(4):
            drawn = Image.new("RGB", (96, 72), "white")
            ImageDraw.Draw(drawn).line((10 + i, 20, 60, 50 + 4 * c), "black")
            drawn.save(tmp_path / name / f"{i}.png")
    draw_pets(tmp_path / "scenes", per_breed=(1, 1), seed=0, workers=1)
    assert "one-colour" not in found(tmp_path / "scenes")
    shutil.rmtree(tmp_path / "scenes")
    assert "one-colour" not in found(tmp_path)


@pytest.mark.parametrize(
    "copy, kind",
    [
        ("train/cat/copy.jpg", "copies"),
        ("test/cat/copy.jpg", "copies-splits"),
        ("val/cat/copy.jpg", "copies-splits"),
        ("train/dog/copy.jpg", "copies-labels"),
        ("test/dog/copy.jpg", "copies-labels"),
    ],
)
@pytest.mark.parametrize("near", [False, True], ids=["exact", "near"])
def test_copies_are_told_by_what_they_spoil(folder, copy, kind, near):
    if near:  # smaller, lighter, recompressed
        Image.open(folder / CAT).resize((80, 64)).point(lambda v: 20 + v * 0.9).save(
            folder / copy, quality=60
        )
    else:
        shutil.copy(folder / CAT, folder / copy)
    assert found(folder) == {kind: sorted([CAT, copy])}
    assert (" ~ " if near else " = ").join(sorted([CAT, copy])) in message(folder, kind)


def test_flat_and_drawn_images_are_not_taken_for_copies(tmp_path):
    for c, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for i in range(8):
            flat = np.clip(
                np.random.default_rng(9 * c + i).normal(60 + 9 * i, 2, (72, 96, 3)), 0, 255
            )
            Image.fromarray(flat.astype(np.uint8)).save(tmp_path / name / f"flat{i}.png")
            x, y = np.mgrid[:72, :96]
            vignette = 4 * (np.hypot(x - 36, y - 48) > 34)[..., None] + [30 * i, 20 * c, 40]
            Image.fromarray(vignette.astype(np.uint8)).save(tmp_path / name / f"vignette{i}.png")
            sky = Image.fromarray(
                np.stack([x * 2 + 9 * i, x * 2 + 50, y + 100 * c], -1).clip(0, 255).astype(np.uint8)
            )
            sky.save(tmp_path / name / f"gradient{i}.png")
            drawn = Image.new("RGB", (96, 72), "white")
            ImageDraw.Draw(drawn).ellipse(
                (6 * i, 20 * c + 3 * i, 6 * i + 30, 20 * c + 3 * i + 20), "orange", "black"
            )
            drawn.save(tmp_path / name / f"drawn{i}.png")
    assert set(found(tmp_path)) == {"one-colour"}


def test_copies_of_a_flat_image_are_found(folder):
    for name in ("a", "b"):
        Image.new("RGB", (96, 72), "red").save(folder / "train" / "cat" / f"{name}.png")
    names = ["train/cat/a.png", "train/cat/b.png"]
    assert found(folder) == {"copies": names, "one-colour": names}


def test_copies_are_found_however_far_apart(tmp_path):
    save_photos(tmp_path / "cat", 0, 400, size=(64, 64))
    save_photos(tmp_path / "dog", 1000, 200, size=(64, 64))
    shutil.copy(tmp_path / "cat" / "0.jpg", tmp_path / "dog" / "zzz.jpg")
    assert found(tmp_path) == {"copies-labels": ["cat/0.jpg", "dog/zzz.jpg"]}


UNREAD = {
    "notes.txt": "other",
    "train/cat/notes.txt": "other",
    "holdout/cat/9.jpg": "beside",
    "extra/9.jpg": "beside",
    "9.jpg": "outside",
    "train/9.jpg": "outside",
    "train/cat/x.jxl": "format",
    "train/cat/x.CR2": "format",
    "train/cat/x.dat": "misnamed",
    "train/cat/.9.jpg": "hidden",
    "test/cat/more/9.jpg": "nested",
    "test/cat/more/of them/9.jpg": "nested",
}


@pytest.mark.parametrize("unread, kind", UNREAD.items())
def test_what_training_does_not_read_is_named_with_the_reason(folder, unread, kind):
    (folder / unread).parent.mkdir(parents=True, exist_ok=True)
    photo(7).save(folder / unread, "JPEG")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._0.jpg"):
        (folder / "train" / name).write_text("not worth a word")
    shown = unread.partition("/")[0] if kind == "beside" else unread
    assert found(folder) == {kind: [shown]}


def test_small_classes_are_found(folder):
    for i in range(2, 6):
        (folder / "train" / "cat" / f"{i}.jpg").unlink()
    assert found(folder) == {}
    save_photos(folder / "train" / "dog", 5000, 7)
    assert found(folder) == {"imbalance": ["cat"]}
    shutil.rmtree(folder / "val")
    (folder / "train" / "cat" / "1.jpg").unlink()
    assert found(folder) == {"too-few": ["cat"], "imbalance": ["cat"]}
    assert [finding.severity for finding in quick_findings(folder)] == ["error", "warning"]


def test_a_class_that_only_the_test_has_stops_training(folder):
    save_photos(folder / "test" / "owl", 5000, 2)
    assert found(folder) == {"layout": []}
    assert "owl" in message(folder, "layout")


def camera(name):
    exif = Image.Exif()
    exif[0x0110] = name
    return {"exif": exif}


@pytest.mark.parametrize(
    "clue, kwargs",
    [
        ("file format PNG", {"suffix": ".png"}),
        ("size 80 x 80", {"size": (80, 80)}),
        ("camera X100", camera("X100")),
    ],
)
def test_a_class_given_away_by_more_than_content_is_found(tmp_path, clue, kwargs):
    save_photos(tmp_path / "cat", 0, 25)
    save_photos(tmp_path / "dog", 100, 13)
    save_photos(tmp_path / "dog" / ".", 200, 12, **{"suffix": ".jpeg"} | kwargs)
    assert found(tmp_path) == {}  # fewer than half of the dogs
    save_photos(tmp_path / "dog", 200, 20, **{"suffix": ".jpeg"} | kwargs)
    assert found(tmp_path) == {"leak": ["dog"]}
    assert f"dog: {clue} in 20 of 33, elsewhere in 0 of 25" in message(tmp_path, "leak")


def test_a_handful_of_photos_gives_no_class_away_by_chance(tmp_path):
    save_photos(tmp_path / "cat", 0, 19)
    save_photos(tmp_path / "dog", 100, 19, suffix=".png", size=(80, 80))
    assert found(tmp_path) == {}


def drop_line(pets, split, stem):
    listing = pets / "oxford-iiit-pet" / "annotations" / f"{split}.txt"
    lines = listing.read_text().splitlines(keepends=True)
    listing.write_text("".join(line for line in lines if not line.startswith(f"{stem} ")))


def pets_folder(name):
    return lambda pets: shutil.rmtree(pets / "oxford-iiit-pet" / name)


MASK = "oxford-iiit-pet/annotations/trimaps/Bengal_0.png"
IMAGE = "oxford-iiit-pet/images/Bengal_0.jpg"
ALL = sorted(
    f"{breed}_{i}" for breed in ("Abyssinian", "beagle", "Bengal") for i in (0, 1, 2, 3, 10, 11)
)
PETS_DEFECTS = {
    "missing photo": (lambda p: (p / IMAGE).unlink(), "missing", ["Bengal_0.jpg"]),
    "missing folder of photos": (pets_folder("images"), "missing", [f"{stem}.jpg" for stem in ALL]),
    "missing folder of masks": (
        pets_folder("annotations/trimaps"),
        "missing-mask",
        [f"{stem}.png" for stem in ALL],
    ),
    "missing mask": (lambda p: (p / MASK).unlink(), "missing-mask", ["Bengal_0.png"]),
    "pipe for a mask": (lambda p: replace(p / MASK, os.mkfifo), "missing-mask", ["Bengal_0.png"]),
    "empty mask": (
        lambda p: Image.new("L", (96, 72), 2).save(p / MASK),
        "empty-mask",
        ["Bengal_0.png"],
    ),
    "mask of another size": (
        lambda p: Image.new("L", (72, 96), 1).save(p / MASK),
        "bad-mask",
        ["Bengal_0.png"],
    ),
    "truncated mask": (
        lambda p: (p / MASK).write_bytes((p / MASK).read_bytes()[:-60]),
        "bad-mask",
        ["Bengal_0.png"],
    ),
    "unlisted photo": (
        lambda p: drop_line(p, "trainval", "Bengal_0"),
        "unlisted",
        ["Bengal_0.jpg"],
    ),
    "file of another kind": (
        lambda p: (p / IMAGE).with_suffix(".mat").write_text("x"),
        "other",
        ["Bengal_0.mat"],
    ),
    "photo of zero bytes": (lambda p: (p / IMAGE).write_bytes(b""), "unreadable", ["Bengal_0.jpg"]),
    "other archive": (
        lambda p: (p / "oxford-iiit-pet" / "images.tar.gz").write_bytes(b"half of it"),
        "archive",
        ["images.tar.gz"],
    ),
}


@pytest.mark.parametrize("plant, kind, files", PETS_DEFECTS.values(), ids=PETS_DEFECTS)
def test_a_defect_of_pets_is_found_under_its_kind_and_nothing_else(pets, plant, kind, files):
    assert found(pets) == {"part": []}
    plant(pets)
    assert found(pets) == found(pets / "oxford-iiit-pet") == {"part": [], kind: files}


def test_a_missing_listing_is_an_error_that_says_where_it_is(pets):
    annotations = pets / "oxford-iiit-pet" / "annotations"
    (annotations / "test.txt").unlink()
    assert "test.txt: no such file; unpack annotations.tar.gz" in message(pets, "layout")
    annotations.rename(pets / "inner")
    annotations.mkdir()
    (pets / "inner").rename(annotations / "annotations")
    assert "annotations/annotations one folder up" in message(pets, "layout")
    assert "part" not in found(pets)


def test_a_photo_that_both_listings_name_is_a_copy_in_two_splits(pets):
    with (pets / "oxford-iiit-pet" / "annotations" / "test.txt").open("a") as listing:
        listing.write("Bengal_0 3 1 1\n")
    assert found(pets) == {"part": [], "copies-splits": ["Bengal_0.jpg"]}


def test_an_odd_photo_that_no_listing_names_does_not_stop_training(pets):
    images = pets / "oxford-iiit-pet" / "images"
    (images / ".hidden.jpg").write_text("no photo")
    photo(7).save(images / "Bengal_70.jpg", "GIF")
    (images / "Bengal_71.jpg").write_text("no photo")
    shutil.copy(images / "Bengal_0.jpg", images / "Bengal_72.jpg")
    assert found(pets) == {
        "part": [],
        "unlisted": ["Bengal_70.jpg", "Bengal_71.jpg", "Bengal_72.jpg"],
        "hidden": [".hidden.jpg"],
        "wrong-extension": ["Bengal_70.jpg"],
        "mode": ["Bengal_70.jpg"],
    }


@pytest.mark.parametrize(
    "line", ["Bengal_0 x 1 1", "Bengal_0 9 1 1"], ids=["no label", "a gap in the labels"]
)
def test_a_listing_that_training_refuses_is_an_error(pets, line):
    listing = pets / "oxford-iiit-pet" / "annotations" / "trainval.txt"
    listing.write_text(listing.read_text().replace("Bengal_0 3 1 1", line))
    assert found(pets)["layout"] == []


def test_a_listing_that_is_not_utf8_is_read_all_the_same(pets):
    with (pets / "oxford-iiit-pet" / "annotations" / "trainval.txt").open("ab") as listing:
        listing.write(b"caf\xe9_1 1 1 1\n")
    assert found(pets)["missing"] == ["caf\\xe9_1.jpg"]


def test_part_of_pets_is_noted_and_all_of_it_counted(pets):
    assert (
        message(pets, "part")
        == "12 + 6 photos of 3 breeds: this is not the whole of Oxford-IIIT Pet, "
        "which has 3,680 + 3,669 photos of 37 breeds"
    )
    folder = pets / "oxford-iiit-pet"
    breeds = [*survey.BREED_COUNTS, *(f"breed_{i}" for i in range(27))]
    shutil.rmtree(folder / "images")
    (folder / "images").mkdir()
    names = {"trainval": [], "test": []}
    for breed in breeds:
        start = 0
        for split, n in zip(names, survey.BREED_COUNTS.get(breed, (100, 100))):
            names[split] += [f"{breed}_{i}" for i in range(start, start + n)]
            start += n
    assert [len(stems) for stems in names.values()] == [3680, 3669]
    for split, stems in names.items():
        (folder / "annotations" / f"{split}.txt").write_text(
            "".join(f"{stem} 1 1 1\n" for stem in stems)
        )
        for stem in stems:
            (folder / "images" / f"{stem}.jpg").write_bytes(b"x")
    assert [finding.kind for finding in quick_findings(pets)] == ["missing-mask"]
    drop_line(pets, "test", "Bombay_100")
    (finding,) = (finding for finding in quick_findings(pets) if finding.kind == "counts")
    assert finding.files == ["Bombay"]
    assert "Bombay 96 + 87" in finding.message


def test_the_exact_oddities_of_real_photos_are_found(pets3):
    assert found(pets3) == {
        "copies-splits": ["Abyssinian_151.jpg", "Abyssinian_99.jpg"],
        "wrong-extension": ["Abyssinian_34.jpg", "Abyssinian_5.jpg"],
        "part": [],
        "unlisted": ["Abyssinian_34.jpg"],
        "other": ["Abyssinian_101.mat"],
        "copies": [f"Abyssinian_{i}.jpg" for i in (11, 122, 172, 177, 24, 40, 5, 56, 63, 87)],
        "mode": ["Abyssinian_34.jpg", "Abyssinian_5.jpg"],
        "empty-mask": ["Abyssinian_34.png"],
    }
    assert [finding.kind for finding in quick_findings(pets3)] == ["part", "unlisted", "other"]


def test_the_quick_findings_open_nothing(folder, monkeypatch):
    (folder / CAT).write_bytes(b"")
    cut(folder / "train" / "cat" / "1.jpg")
    monkeypatch.setattr(Image, "open", None)
    (finding,) = quick_findings(folder)
    assert (finding.severity, finding.kind, finding.files) == ("error", "unreadable", [CAT])
    assert (
        str(finding)
        == f"error    1 photo cannot be read ({CAT} is empty): copy it again or remove it"
    )


def test_the_command_prints_a_line_a_finding_and_a_verdict(folder, capsys):
    assert doctor.main(["--data", str(folder), "--workers", "1"]) == 0
    out, err = capsys.readouterr()
    assert (out.split(" checked in ")[0], out.split(" s: ")[1]) == (
        "20 photos of 2 classes",
        "0 errors, 0 warnings, 0 notes; training can start\n",
    )
    assert err == ""
    for i in range(5):
        photo(i).convert("L").save(folder / "train" / "cat" / f"{i}.jpg")
    cut(folder / "test" / "dog" / "0.jpg")
    assert doctor.main(["--data", str(folder)]) == 2
    error, note, verdict = capsys.readouterr().out.splitlines()
    assert error.startswith(
        "error    1 photo cannot be read (test/dog/0.jpg: cannot be read as a photo (image file is"
    )
    names = ", ".join(f"train/cat/{i}.jpg is L" for i in range(3))
    assert (
        note == f"note     5 photos have an unusual colour mode ({names}, ...): "
        "minivit converts them to RGB, with transparent areas over white"
    )
    assert verdict.endswith(" s: 1 error, 0 warnings, 1 note; training would fail")


def test_json_is_one_object_that_names_every_file(folder, capsys):
    for i in range(5):
        photo(i).convert("L").save(folder / "train" / "cat" / f"{i}.jpg")
    assert doctor.main(["--data", str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report.pop("seconds") > 0
    (finding,) = report.pop("findings")
    assert report == {"data": str(folder), "photos": 20, "classes": 2, "ok": True}
    assert finding.pop("message").startswith("5 photos have an unusual colour mode (")
    assert finding == {
        "severity": "note",
        "kind": "mode",
        "count": 5,
        "files": [f"train/cat/{i}.jpg" for i in range(5)],
    }
    cut(folder / "test" / "dog" / "0.jpg")
    assert doctor.main(["--data", str(folder), "--json"]) == 2
    assert not json.loads(capsys.readouterr().out)["ok"]


def test_hostile_names_neither_steer_the_terminal_nor_break_the_output(folder, capfdbinary):
    names = ["\x1b[31mred\n.jpg", os.fsdecode(b"\xff\xfe.jpg"), "{n} {0}.jpg", "猫.jpg"]
    for i, name in enumerate(names):
        photo(7 + i).convert("L").save(folder / "train" / "cat" / name)
    (folder / "train" / os.fsdecode(b"\xff\x1b")).mkdir()
    save_photos(folder / "train" / os.fsdecode(b"\xff\x1b"), 70, 1)
    assert doctor.main(["--data", str(folder)]) == 0
    text = capfdbinary.readouterr().out.decode()
    assert len(text.splitlines()) == 4
    assert all(c.isprintable() for c in text.replace("\n", ""))
    assert "\\x1b[31mred\\n.jpg" in text
    assert doctor.main(["--data", str(folder), "--json"]) == 0
    output = capfdbinary.readouterr().out
    assert b"\x1b" not in output
    report = json.loads(output.decode())
    assert sorted(report["findings"][-1]["files"]) == sorted(f"train/cat/{name}" for name in names)


@pytest.mark.parametrize("what", ["absent", "empty", "a file", "no photos"])
def test_what_is_no_data_folder_ends_in_one_line_and_downloads_nothing(
    tmp_path, what, capsys, monkeypatch
):
    monkeypatch.setattr("minivit.data.listing.download_pets", None)
    root = tmp_path / "data"
    if what == "a file":
        root.write_text("x")
    elif what != "absent":
        (root / ("train/cat" if what == "no photos" else ".")).mkdir(parents=True)
    assert doctor.main(["--data", str(root)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert str(root) in err
    assert "--data" in err
    assert root.exists() == (what != "absent")
    with pytest.raises(UserError):
        quick_findings(root)


def test_broken_exif_is_no_defect(folder):
    photo(7).save(folder / "train" / "cat" / "odd.png", exif=b"nonsense")
    photo(8).save(
        folder / "train" / "cat" / "odd.jpg",
        exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12\0\x03\xff",
    )
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert doctor.check(folder, workers=1)[1] == []
    assert not warned
