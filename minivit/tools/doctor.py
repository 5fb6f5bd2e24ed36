"""The doctor: find what is wrong or odd in a folder of photos, before hours go into training.

It reads every photo and mask, and changes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageStat

from .. import cli
from ..data.datasets import split_data
from ..data.listing import UNLISTED, ListedPhoto, list_data
from ..data.own_masks import check_own_masks
from ..data.photos import PhotoError, open_photo, open_undecoded
from ..data.survey import Finding, Problems, describe_problems, survey
from ..errors import UserError, first_few
from ..system.progress import progress_bar
from ..system.workers import read_ahead
from .score.masks import PET, mask_path, read_mask

DESCRIPTION = (
    "The doctor: find what is wrong or odd in a folder of photos, before hours go into "
    "training. It reads every photo and mask, and changes nothing."
)
MD5_OF_ARCHIVES = {
    "images.tar.gz": "5c4f3ee8e5d25df40f4fd59a7f44e54c",
    "annotations.tar.gz": "95a8c909bbe2e81eed6a22bccdf3f68f",
}
HUGE_PIXELS = 25_000_000
TINY_SIDE = 64  # pixels
# In steps of 255. The palest of 895 real photos has 19, and a scene of 12 bits in 16 has about 3.
LEAST_STANDARD_DEVIATION = 4
THUMBNAIL_SIZE = (12, 12)
# Of real pets, copies that were recompressed, resized or cropped by a hundredth correlate by 0.97
# or more, and no other pair by more than 0.6.
COPY_CORRELATION = 0.93
COMPARED_AT_ONCE = 512  # photos, each with all photos before it
LEAST_FOR_A_LEAK = 20  # photos, both of the class and of all others


class Problem(NamedTuple):
    """What is wrong with one photo or its mask."""

    kind: str
    name: str
    detail: str = ""


@dataclass(frozen=True)
class ReadPhoto:
    """What reading one photo shows. A photo that cannot be read has only problems."""

    photo: ListedPhoto
    problems: list[Problem]
    md5: str = ""
    thumbnail: Image.Image | None = None
    # Properties that should not depend on the class, such as the camera.
    clues: Mapping[str, str] = field(default_factory=dict)


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser("doctor", description=DESCRIPTION)
    parser.add_argument(
        "--data",
        default="data",
        metavar="DIR",
        help="the folder of the data, as --data of train.py",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object that names every file"
    )
    parser.add_workers("threads that read photos")
    return cli.run(report, parser, argv)


def report(args: argparse.Namespace) -> int:
    """Print the findings and the verdict; return 0 if training could start, else 2."""
    started = time.perf_counter()
    photos, findings = check(args.data, workers=args.workers)
    seconds = time.perf_counter() - started
    num_classes = len({photo.class_name for photo in photos})
    counts = Counter(finding.severity for finding in findings)
    can_train = counts["error"] == 0
    if args.json:
        result = {
            "data": args.data,
            "photos": len(photos),
            "classes": num_classes,
            "seconds": seconds,
            "ok": can_train,
            "findings": [asdict(finding) for finding in findings],
        }
        print(json.dumps(result))
    else:
        for finding in findings:
            print(finding)
        severities = ("error", "warning", "note")
        tally = ", ".join(
            f"{counts[name]} {name}{'' if counts[name] == 1 else 's'}" for name in severities
        )
        verdict = "training can start" if can_train else "training would fail"
        print(
            f"{len(photos):,} photos of {num_classes} classes checked in {seconds:.1f} s: "
            f"{tally}; {verdict}"
        )
    return 0 if can_train else 2


def check(root: str | os.PathLike[str], *, workers: int) -> tuple[list[ListedPhoto], list[Finding]]:
    """Read every photo and mask of a data folder: (the listed photos, the findings).

    Raises UserError if `root` is not a data folder.
    """
    listing = list_data(root)
    problems = survey(listing)
    if not any(finding.severity == "error" for finding in describe_problems(problems)):
        try:
            split_data(listing, seed=0)
        except UserError as error:
            problems["layout"][str(error)] = ""
    candidates = [photo for photo in listing.photos() if not photo.problem]
    if listing.folder.pets is None:
        try:
            check_own_masks(listing.folder.root, (photo.path for photo in candidates))
        except UserError as error:
            problems["unclear-mask"][str(error)] = ""
    else:
        _check_archives(listing.folder.pets, problems)
        # A photo that no listing names does not stop training, but other tools may read it.
        candidates += [ListedPhoto(path.name, path) for path in listing.unused[UNLISTED]]
    pending = [photo for photo in candidates if photo.name not in problems["unreadable"]]
    readable: list[ReadPhoto] = []
    reading = read_ahead(_read_photo, pending, workers)
    for read in progress_bar(reading, total=len(pending), unit="photo"):
        for kind, name, detail in read.problems:
            problems[kind][name] = detail
        if read.photo.split and read.thumbnail is not None:
            readable.append(read)
    if readable:
        _find_copies(readable, problems)
        _find_leaks(readable, problems)
    return listing.photos(), describe_problems(problems)


def _check_archives(pets: Path, problems: Problems) -> None:
    for name, expected in MD5_OF_ARCHIVES.items():
        archive = pets / name
        if not archive.is_file():
            continue
        md5 = file_md5(archive)
        if md5 != expected:
            problems["archive"][name] = f" has MD5 {md5}"


def file_md5(path: Path) -> str:
    md5 = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            md5.update(block)
    return md5.hexdigest()


def make_thumbnail(pixels: Image.Image) -> Image.Image:
    """Return the photo in the few pixels by which group_copies tells copies."""
    return pixels.resize(THUMBNAIL_SIZE, Image.Resampling.BOX)


def _read_photo(photo: ListedPhoto) -> ReadPhoto:
    path = photo.path
    try:
        pixels = open_photo(path)
    except PhotoError as error:
        reason = str(error).removeprefix(str(path))
        problems = [Problem("unreadable", photo.name, reason)] if photo.split else []
        return ReadPhoto(photo, problems)
    with open_undecoded(path) as image:
        file_format = str(image.format)
        mode = image.mode
        size = f"{image.width} x {image.height}"
        camera, orientation = _read_exif(image)
    problems = []
    # A file of several JPEGs is called MPO, and a file without an extension has no wrong one.
    expected = Image.registered_extensions().get(path.suffix.lower(), file_format)
    if file_format != expected.replace("MPO", "JPEG"):
        problems.append(Problem("wrong-extension", photo.name, f" is {file_format}"))
    if max(ImageStat.Stat(pixels).stddev) < LEAST_STANDARD_DEVIATION:
        problems.append(Problem("one-colour", photo.name))
    if mode != "RGB":
        problems.append(Problem("mode", photo.name, f" is {mode}"))
    if orientation in range(2, 9):
        problems.append(Problem("exif-rotation", photo.name, " is rotated"))
    if min(pixels.size) < TINY_SIDE:
        problems.append(Problem("tiny", photo.name, f" is {size}"))
    if pixels.width * pixels.height > HUGE_PIXELS:
        problems.append(Problem("huge", photo.name, f" is {size}"))
    problems += _check_mask(path, pixels.size)
    clues = {"file format": file_format, "size": size, "colour mode": mode, "camera": camera}
    return ReadPhoto(photo, problems, file_md5(path), make_thumbnail(pixels), clues)


def _read_exif(image: Image.Image) -> tuple[str, object]:
    """Return a photo's camera and orientation."""
    camera = "not named"
    orientation = None
    # To look for EXIF behind a PNG's pixels, Pillow would decode it once more.
    if image.format != "PNG" or "exif" in image.info:
        with contextlib.suppress(Exception):  # EXIF may be broken.
            exif = image.getexif()
            camera = str(exif.get(ExifTags.Base.Model, camera)).strip()
            orientation = exif.get(ExifTags.Base.Orientation)
    return camera, orientation


def _check_mask(path: Path, size: tuple[int, int]) -> list[Problem]:
    """Check the mask of a photo of `size`, if there is one: the survey reports missing masks."""
    mask = mask_path(path)
    if not mask.is_file():
        return []
    try:
        shows_a_pet = (read_mask(path, size) == PET).any()
    except UserError:
        return [Problem("bad-mask", mask.name)]
    return [] if shows_a_pet else [Problem("empty-mask", mask.name)]


def _find_copies(photos: Sequence[ReadPhoto], problems: Problems) -> None:
    md5s = [read.md5 for read in photos]
    thumbnails = [read.thumbnail for read in photos if read.thumbnail is not None]
    for indices in group_copies(md5s, thumbnails):
        group = [photos[i] for i in indices]
        if len({read.photo.class_name for read in group}) > 1:
            kind = "copies-labels"
        elif len({read.photo.split for read in group}) > 1:
            kind = "copies-splits"
        else:
            kind = "copies"
        are_same_bytes = len({read.md5 for read in group}) == 1
        sign = " = " if are_same_bytes else " ~ "
        names = sorted(read.photo.name for read in group)
        # The message shows the whole group behind its first name.
        problems[kind].update(dict.fromkeys(names))
        problems[kind][names[0]] = sign + first_few(names[1:], limit=2, separator=sign)


def group_copies(md5s: Sequence[str], thumbnails: Sequence[Image.Image]) -> Iterator[list[int]]:
    """Yield the groups of photos with equal bytes or similar thumbnails, as their indices."""
    edges = _edges(thumbnails)
    groups: defaultdict[int, list[int]] = defaultdict(list)  # by the first photo's index
    group_of: list[int] = []  # the group of each photo
    index_of_md5: dict[str, int] = {}
    for start in range(0, len(md5s), COMPARED_AT_ONCE):
        stop = start + COMPARED_AT_ONCE
        # Row i of these compares photo start + i with all photos before it.
        is_copy = np.tril(edges[start:stop] @ edges[:stop].T > COPY_CORRELATION, start - 1)
        for i, row in enumerate(is_copy, start):
            earlier = index_of_md5.setdefault(md5s[i], i)
            if row.any():
                earlier = int(row.argmax())
            group = i if earlier == i else group_of[earlier]
            group_of.append(group)
            groups[group].append(i)
    for members in groups.values():
        if len(members) > 1:
            yield members


def _edges(thumbnails: Sequence[Image.Image]) -> np.ndarray:
    """Return the second differences of each thumbnail as a vector of length 1: (n, values).

    The pixels themselves correlate for any two photos with a sky over dark ground. A flat thumbnail
    becomes zeros, which resemble nothing.
    """
    pixels = np.stack([np.asarray(thumbnail, np.float32) for thumbnail in thumbnails])
    down = np.diff(pixels, 2, axis=1)[:, :, 1:-1]
    across = np.diff(pixels, 2, axis=2)[:, 1:-1]
    edges = (down + across).reshape(len(pixels), -1)
    edges[edges.std(axis=1) < 5] = 0
    edges /= np.linalg.norm(edges, axis=1, keepdims=True) + 1e-6
    return edges


def _find_leaks(photos: Sequence[ReadPhoto], problems: Problems) -> None:
    """Find classes of which half the photos share a clue that at most 2% of the others have."""
    sizes = Counter(read.photo.class_name for read in photos)
    for clue in photos[0].clues:
        total = Counter(read.clues[clue] for read in photos)
        in_class = Counter((read.photo.class_name, read.clues[clue]) for read in photos)
        for (name, value), n in in_class.items():
            size = sizes[name]
            num_others = len(photos) - size
            elsewhere = total[value] - n
            is_enough = min(size, num_others) >= LEAST_FOR_A_LEAK
            if is_enough and n >= size / 2 and elsewhere <= num_others / 50:
                problems["leak"][name] = (
                    f": {clue} {value} in {n} of {size}, elsewhere in {elsewhere} of {num_others}"
                )
