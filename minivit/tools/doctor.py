"""The doctor: what is wrong or odd in a folder of photos, found before hours are spent on training. It changes nothing."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from .. import cli
from ..errors import UserError

# All that can be found, in the order shown. An error stops training, a warning may spoil it, a note is good to know.
KINDS = {
    "layout": "error    {names}",
    "missing": "error    {n} file{s} missing ({names}), perhaps of an archive unpacked in part: unpack it again",
    "unreadable": "error    {n} photo{s} that cannot be read ({names}): copy again, or remove",
    "too-few": "error    {n} of the classes too small to set photos apart ({names}): add photos, or remove the class",
    "archive": "warning  {n} archive{s} not as published ({names}): what it held may be damaged; download it again",
    "counts": "warning  {n} of 37 breeds not of the published size, 3,680 + 3,669 in all ({names}): compare with care",
    "imbalance": "warning  {n} of the classes below a third of the largest ({names}): look at macro F1, or add photos",
    "copies-labels": "warning  {n} photos the same (=) or nearly (~) under two labels ({names}): keep the right one",
    "copies-splits": "warning  {n} photos the same (=) or nearly (~) in two splits ({names}): no fair test; keep one",
    "leak": "warning  {n} of the classes given away by more than content ({names}): save the photos of all classes alike",
    "wrong-extension": "warning  {n} photo{s} of another format than named ({names}): read all the same; other tools may fail",
    "tiny": "warning  {n} photo{s} below 64 pixels on the short side ({names}): hard to learn from; find larger ones",
    "missing-mask": "warning  {n} mask{s} missing ({names}): no attention scores there; unpack annotations.tar.gz again",
    "bad-mask": "warning  {n} mask{s} unreadable or not of the photo's size ({names}): unpack annotations.tar.gz again",
    "part": "note     {names}: not the whole of Oxford-IIIT Pet, which has 3,680 + 3,669 of 37 breeds",
    "unlisted": "note     {n} unused file{s} or folder{s} ({names}): training reads what is listed, or right in class folders",
    "copies": "note     {n} photos the same (=) or nearly (~) in a class ({names}): validation may repeat training; keep one",
    "mode": "note     {n} photo{s} of an unusual mode ({names}): read as RGB, transparency over white",
    "exif-rotation": "note     {n} photo{s} turned by EXIF ({names}): read upright; other tools may not",
    "huge": "note     {n} photo{s} of more than 25 million pixels ({names}): slow to read; smaller ones train as well",
    "empty-mask": "note     {n} mask{s} without any pet ({names}): no attention scores there",
}
ARCHIVES = {
    "images.tar.gz": "5c4f3ee8e5d25df40f4fd59a7f44e54c",
    "annotations.tar.gz": "95a8c909bbe2e81eed6a22bccdf3f68f",
}
# Oxford-IIIT Pet has 100 photos of a breed in trainval and 100 in test, but for these; 3,680 + 3,669 in all.
COUNTS = {
    "Abyssinian": (100, 98),
    "Bombay": (96, 88),
    "boxer": (100, 99),
    "Egyptian_Mau": (93, 97),
    "keeshond": (100, 99),
}
COUNTS |= {
    "english_cocker_spaniel": (96, 100),
    "newfoundland": (96, 100),
    "scottish_terrier": (100, 99),
}
COUNTS |= {"Siamese": (99, 100), "staffordshire_bull_terrier": (100, 89)}


@dataclass(frozen=True)
class Finding:
    """All that was found of one kind; the message names the first few of the `files` (or classes)."""

    severity: str
    kind: str
    count: int
    files: list[str]
    message: str

    def __str__(self) -> str:
        return f"{self.severity:8} {self.message}"


class Photo(NamedTuple):
    name: str
    path: Path
    label: str = ""
    split: str = ""  # empty: training does not use it
    md5: str = ""
    thumb: Image.Image | None = None  # 12 x 12
    clues: Mapping[str, str] = {}  # that may give the class away


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser("doctor", description=__doc__)
    parser.add_argument(
        "--data",
        default="data",
        metavar="DIR",
        help="holds oxford-iiit-pet or class folders, as for train.py",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object, which names every file"
    )
    parser.add_workers("threads that read photos")
    return cli.run(report, parser, argv)


def report(args: argparse.Namespace) -> int:
    """Print the findings and the verdict; return 0 if training could start, else 2."""
    started = time.perf_counter()
    photos, findings = check(args.data, workers=args.workers)
    seconds, num_classes = time.perf_counter() - started, len({photo.label for photo in photos})
    tally = Counter(finding.severity for finding in findings)
    if args.json:
        about = {
            "data": args.data,
            "photos": len(photos),
            "classes": num_classes,
            "seconds": seconds,
            "ok": not tally["error"],
        }
        print(json.dumps(about | {"findings": [asdict(finding) for finding in findings]}))
    else:
        counts = ", ".join(
            f"{tally[kind]} {kind}{'s' * (tally[kind] != 1)}"
            for kind in ("error", "warning", "note")
        )
        end = "training would fail" if tally["error"] else "training can start"
        verdict = f"{len(photos):,} photos of {num_classes} classes checked in {seconds:.1f} s: {counts}; {end}"
        print(*findings, verdict, sep="\n")
    return 2 if tally["error"] else 0


def quick_check(root: str | os.PathLike[str]) -> list[Finding]:
    """Find what a listing and each file's status show, decoding nothing. Raises UserError if root is no data folder."""
    return _findings(_survey(root)[-1])


def check(root: str | os.PathLike[str], *, workers: int) -> tuple[list[Photo], list[Finding]]:
    """Read every photo and mask: (the listed photos, what is found). Raises UserError if root is no data folder."""
    from ..data.datasets import load_data
    from ..system.prefetch import read_ahead

    folder, photos, found = _survey(root)
    if not any(finding.severity == "error" for finding in _findings(found)):
        try:
            load_data(root, seed=0)
        except UserError as error:
            found["layout"][str(error)] = ""
    for archive in (folder / name for name in ARCHIVES):
        if archive.is_file() and (md5 := _md5(archive)) != ARCHIVES[archive.name]:
            found["archive"][archive.name] = f" has MD5 {md5}"
    sound = [
        photo for photo in photos if photo.path.is_file() and photo.name not in found["unreadable"]
    ]
    reading = read_ahead(lambda photo: _examine(photo, found), sound, workers)
    read = list(tqdm(reading, total=len(sound), unit="photo", leave=False, disable=None))
    if used := [photo for photo in read if photo.split and photo.md5]:
        _find_copies(used, found)
        _find_leaks(used, found)
    return [photo for photo in photos if photo.split], _findings(found)


def _findings(found: dict) -> list[Finding]:
    findings = []
    for kind, line in KINDS.items():
        if items := sorted(found[kind].items()):
            shown = [cli.printable(name + text) for name, text in items if text is not None]
            names = ", ".join(shown[:3] + ["…"] * (len(shown) > 3))
            message = line[9:].format(n=f"{len(items):,}", s="s" * (len(items) != 1), names=names)
            findings.append(
                Finding(
                    line.split()[0],
                    kind,
                    len(items),
                    [name for name, _ in items if "{n}" in line],
                    message,
                )
            )
    return findings


def _survey(root: str | os.PathLike[str]) -> tuple[Path, list[Photo], dict]:
    """List what data.py would load, going on where that refuses: where Pets would be, the photos, and what is found.

    That is, by kind, the name of each file or class, and what to add to it; None hides the name.
    """
    root = Path(os.path.expanduser(root))
    found: dict[str, dict[str, str | None]] = {kind: {} for kind in KINDS}
    if (root / "annotations" / "trainval.txt").is_file():
        root = root.resolve().parent
    pets = root / "oxford-iiit-pet"
    photos = _list_pets(pets, found) if pets.is_dir() else _list_class_folders(root, found)
    listed = [photo for photo in photos if photo.split]
    for name, path, *_ in listed:
        if not path.is_file():
            kind, text = ("unreadable", " is no file") if os.path.lexists(path) else ("missing", "")
            found[kind][name] = text
        elif not path.stat().st_size:
            found["unreadable"][name] = " is empty"
    needed = 3 - len({"val", "test"} & {photo.split for photo in listed})
    sizes = Counter(photo.label for photo in listed if photo.split.startswith("train"))
    most = max(sizes.values(), default=0)
    found["too-few"] = {label: f" has {n} of {needed}" for label, n in sizes.items() if n < needed}
    found["imbalance"] = {label: f" {n} to {most}" for label, n in sizes.items() if 3 * n < most}
    return pets, photos, found


def _list_pets(folder: Path, found: dict) -> list[Photo]:
    from ..data.pets import SPLITS, read_listing

    images, trimaps, photos = folder / "images", folder / "annotations" / "trimaps", []
    for split in SPLITS:
        if not (folder / "annotations" / f"{split}.txt").is_file():
            found["missing"][f"{split}.txt"] = ""
            continue
        try:
            stems = [stem for stem, *_ in read_listing(folder, split)]
        except UserError as error:
            found["layout"][str(error)] = ""
            continue
        photos += [
            Photo(f"{stem}.jpg", images / f"{stem}.jpg", stem.rsplit("_", 1)[0], split)
            for stem in stems
        ]
    numbers = Counter((photo.label, photo.split) for photo in photos)
    breeds = {label: (numbers[label, "trainval"], numbers[label, "test"]) for label, _ in numbers}
    if len(breeds) < 37:
        total = " + ".join(f"{sum(pair[i] for pair in breeds.values()):,}" for i in (0, 1))
        found["part"][f"{total} photos of {len(breeds)} breeds"] = ""
    else:
        odd = {
            label: pair for label, pair in breeds.items() if pair != COUNTS.get(label, (100, 100))
        }
        found["counts"] = {label: f" {a} + {b}" for label, (a, b) in odd.items()}
    masks = (
        {path.stem for path in trimaps.iterdir() if path.is_file()} if trimaps.is_dir() else set()
    )
    found["missing-mask"] = {
        f"{photo.path.stem}.png": "" for photo in photos if photo.path.stem not in masks
    }
    listed = {photo.name for photo in photos}
    others = (
        [path for path in images.iterdir() if path.name not in listed and path.name[0] != "."]
        if images.is_dir()
        else []
    )
    found["unlisted"] = {path.name: "" for path in others}
    return photos + [Photo(path.name, path) for path in others if path.suffix == ".jpg"]


def _list_class_folders(root: Path, found: dict) -> list[Photo]:
    from ..data.photos import list_photos

    splits = (
        [root / name for name in ("train", "val", "test")] if (root / "train").is_dir() else [root]
    )
    photos, others = [], set(root.iterdir()) - set(splits) if len(splits) > 1 else set()
    for folder in filter(Path.is_dir, splits):
        for entry in folder.iterdir():
            paths = list_photos(entry) if entry.is_dir() and entry.name[0] != "." else []
            names = {path.name for path in paths}  # whose hashes cost less than paths'
            others |= (
                {entry / name for name in os.listdir(entry) if name not in names}
                if paths
                else {entry}
            )
            split, place = (
                "train" if folder == root else folder.name,
                entry.relative_to(root).as_posix(),
            )
            photos += [Photo(f"{place}/{path.name}", path, entry.name, split) for path in paths]
    if not any(photo.split == "train" for photo in photos):
        what = (
            "oxford-iiit-pet/ or a folder of photos for each class" if root.is_dir() else "a folder"
        )
        raise UserError(f"{root}: expected {what}, found none; name another with --data")
    found["unlisted"] = {
        path.relative_to(root).as_posix(): "" for path in others if path.name[0] != "."
    }
    return photos


def _examine(photo: Photo, found: dict) -> Photo:
    from ..data.photos import FORMATS, PhotoError, open_photo
    from .score.masks import annotation, read_mask

    name, path, _, split = photo[:4]
    try:
        pixels = open_photo(path)
    except PhotoError as error:
        if split:
            found["unreadable"][name] = str(error).removeprefix(str(path))
        return photo
    camera, turn = "not named", None
    with (
        Image.open(path, formats=FORMATS) as image,
        contextlib.suppress(Exception),
    ):  # EXIF may be broken
        form, mode, size = (
            "JPEG" if image.format == "MPO" else str(image.format),
            image.mode,
            f"{image.width} x {image.height}",
        )
        if (
            form != "PNG" or "exif" in image.info
        ):  # else Pillow decodes a PNG again to look behind its pixels
            camera, turn = (
                image.getexif().get(tag, absent)
                for tag, absent in ((0x0110, camera), (0x0112, None))
            )
    odd = {
        "wrong-extension": form != Image.registered_extensions().get(path.suffix.lower())
        and f" is {form}",
        "mode": mode != "RGB" and f" is {mode}",
        "exif-rotation": turn in range(2, 9) and " is turned",
        "tiny": min(pixels.size) < 64 and f" is {size}",
        "huge": pixels.width * pixels.height > 25_000_000 and f" is {size}",
    }
    for kind in filter(odd.get, odd):
        found[kind][name] = odd[kind]
    mask = annotation(path, "trimaps", ".png")
    if mask.is_file():
        try:
            if not (read_mask(path, pixels.size) == 1).any():
                found["empty-mask"][mask.name] = ""
        except UserError:
            found["bad-mask"][mask.name] = ""
    clues = {"file format": form, "size": size, "colour mode": mode, "camera": str(camera).strip()}
    return photo._replace(
        md5=_md5(path), thumb=pixels.resize((12, 12), Image.Resampling.BOX), clues=clues
    )


def _md5(path: Path) -> str:
    md5 = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            md5.update(block)
    return md5.hexdigest()


def _find_copies(photos: list[Photo], found: dict) -> None:
    """Group photos of equal bytes, or whose thumbnails' second differences correlate by more than 0.93.

    Differences, because skies over dark ground correlate. Of real pets, copies (recompressed, resized, cropped by a
    hundredth) reach 0.97, no other pair 0.6. A flat thumbnail is like no other.
    """
    thumbs = np.stack([np.asarray(photo.thumb, np.float32) for photo in photos])
    edges = (np.diff(thumbs, 2, 1)[:, :, 1:-1] + np.diff(thumbs, 2, 2)[:, 1:-1]).reshape(
        len(photos), -1
    )
    edges[edges.std(1) < 5] = 0
    edges /= np.linalg.norm(edges, axis=1, keepdims=True) + 1e-6
    groups = defaultdict(list)  # by their first photo's index
    first: dict[str | int, int] = {}  # that of each MD5 sum, and of each photo
    for start in range(0, len(photos), 512):
        alike = np.tril(edges[start : start + 512] @ edges[: start + 512].T > 0.93, start - 1)
        for i, row in enumerate(alike, start):
            other = int(row.argmax()) if row.any() else first.setdefault(photos[i].md5, i)
            first[i] = first.get(other, i)
            groups[first[i]].append(photos[i])
    for group in (group for group in groups.values() if len(group) > 1):
        labels, splits, sums = (
            {getattr(p, field) for p in group} for field in ("label", "split", "md5")
        )
        kind = (
            "copies-labels" if len(labels) > 1 else "copies-splits" if len(splits) > 1 else "copies"
        )
        sign = " = " if len(sums) == 1 else " ~ "
        names = sorted(photo.name for photo in group)
        others = names[1:3] + ["…"] * (len(names) > 3)
        found[kind] |= dict.fromkeys(names) | {names[0]: "".join(sign + name for name in others)}


def _find_leaks(photos: list[Photo], found: dict) -> None:
    """Find classes of which half the photos share what not one in fifty of the others has; both must be 20 or more."""
    sizes = Counter(photo.label for photo in photos)
    for clue in photos[0].clues:
        total = Counter(photo.clues[clue] for photo in photos)
        for (label, value), n in Counter(
            (photo.label, photo.clues[clue]) for photo in photos
        ).items():
            size, others, other = sizes[label], len(photos) - sizes[label], total[value] - n
            if min(size, others) >= 20 and n >= size / 2 and other <= others / 50:
                found["leak"][label] = (
                    f": {clue} {value} in {n} of {size}, elsewhere in {other} of {others}"
                )
