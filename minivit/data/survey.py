"""Survey a data folder: report what its listing alone shows to be wrong or odd.

Training prints these findings before it starts. The doctor adds what it finds by reading every
photo, and uses the same table of findings.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ..errors import first_few, printable
from .datasets import ListedPhoto, Listing

# What is wrong, by kind and by the name of a file or class. The detail follows the name in the
# message; a name whose detail is None is counted but not shown.
Problems = dict[str, dict[str, str | None]]


# All kinds of findings in the order in which they are shown: severity, text, and what to do.
# An error stops training, a warning may spoil it, and a note is good to know. In the texts, {n}
# is the number of names and {names} the first few of them; SINGULAR or PLURAL fills in the rest.
# The names are those of files or classes, except where they are the whole text.
KINDS = {
    "layout": ("error", "{names}", ""),
    "missing": (
        "error",
        "{n} file{s} {are} missing ({names})",
        "an archive may have been unpacked only in part, so unpack it again",
    ),
    "unreadable": (
        "error",
        "{n} photo{s} cannot be read ({names})",
        "copy {them} again or remove {them}",
    ),
    "too-few": (
        "error",
        "{n} class{es} {have} too few photos to hold any out ({names})",
        "add photos or remove the class{es}",
    ),
    "archive": (
        "warning",
        "{n} archive{s} {are} not as published ({names})",
        "unpacked files may be damaged, so download {them} again",
    ),
    "counts": (
        "warning",
        "{n} of 37 breeds {have} more or fewer photos than published ({names})",
        "the whole data set has 3,680 + 3,669, so compare results with care",
    ),
    "imbalance": (
        "warning",
        "{n} class{es} {have} less than a third of the photos of the largest ({names})",
        "look at macro F1, or add photos",
    ),
    "copies-labels": (
        "warning",
        "{n} photo{s} {are} the same (=) or nearly the same (~) under two labels ({names})",
        "keep only the one with the right label",
    ),
    "copies-splits": (
        "warning",
        "{n} photo{s} {are} the same (=) or nearly the same (~) in two splits ({names})",
        "this makes the test unfair, so keep only one",
    ),
    "leak": (
        "warning",
        "{n} class{es} can be told by something other than what the photos show ({names})",
        "save the photos of all classes in the same way",
    ),
    "wrong-extension": (
        "warning",
        "{n} photo{s} {have} the extension of another format ({names})",
        "minivit reads {them}, but other tools may not",
    ),
    "tiny": (
        "warning",
        "{n} photo{s} {have} fewer than 64 pixels on the short side ({names})",
        "too little can be seen in {them}, so look for larger ones",
    ),
    "missing-mask": (
        "warning",
        "{n} mask{s} {are} missing ({names})",
        "their photos get no attention scores; unpack annotations.tar.gz again",
    ),
    "bad-mask": (
        "warning",
        "{n} mask{s} {are} unreadable, of other values than 1 to 3, or of another size ({names})",
        "their photos get no attention scores; unpack annotations.tar.gz again",
    ),
    "part": (
        "note",
        "{names}",
        "this is not the whole of Oxford-IIIT Pet, which has 3,680 + 3,669 photos of 37 breeds",
    ),
    "unlisted": (
        "note",
        "{n} file{s} or folder{s} {are} not used ({names})",
        "training reads only listed photos, or those directly in class folders",
    ),
    "copies": (
        "note",
        "{n} photo{s} {are} the same (=) or nearly the same (~) within a class ({names})",
        "validation may repeat training photos, so keep only one",
    ),
    "mode": (
        "note",
        "{n} photo{s} {have} an unusual colour mode ({names})",
        "minivit converts {them} to RGB, with transparent areas over white",
    ),
    "exif-rotation": (
        "note",
        "{n} photo{s} {are} rotated by EXIF ({names})",
        "minivit reads {them} upright, but other tools may not",
    ),
    "huge": (
        "note",
        "{n} photo{s} {have} more than 25 million pixels ({names})",
        "large photos are slow to read, and smaller ones train just as well",
    ),
    "empty-mask": (
        "note",
        "{n} mask{s} {show} no pet ({names})",
        "their photos get no attention scores",
    ),
}

SINGULAR = {"s": "", "es": "", "are": "is", "have": "has", "show": "shows", "them": "it"}
PLURAL = {"s": "s", "es": "es", "are": "are", "have": "have", "show": "show", "them": "them"}

# Oxford-IIIT Pet has 100 photos of each breed in trainval and 100 in test, except for these.
NUM_BREEDS = 37
BREED_COUNTS = {
    "Abyssinian": (100, 98),
    "Bombay": (96, 88),
    "Egyptian_Mau": (93, 97),
    "Siamese": (99, 100),
    "boxer": (100, 99),
    "english_cocker_spaniel": (96, 100),
    "keeshond": (100, 99),
    "newfoundland": (96, 100),
    "scottish_terrier": (100, 99),
    "staffordshire_bull_terrier": (100, 89),
}


@dataclass(frozen=True)
class Finding:
    """All problems of one kind. The message names the first few of `files` (or classes)."""

    severity: str
    kind: str
    count: int
    files: list[str]
    message: str

    def __str__(self) -> str:
        return f"{self.severity:8} {self.message}"


def quick_findings(listing: Listing) -> list[Finding]:
    """Return what a listing and the size of each file show, without opening any photo."""
    return describe_problems(survey(listing))


def survey(listing: Listing) -> Problems:
    """Collect what a listing and the size of each file show, without opening any photo."""
    problems: Problems = {kind: {} for kind in KINDS}
    for photo in listing.photos():
        _check_file(photo, problems)
    root = listing.folder.root
    if listing.folder.is_pets:
        _survey_pets(listing, problems)
        problems["unlisted"] = {path.name: "" for path in listing.unused}
    else:
        unused = (path.relative_to(root).as_posix() for path in listing.unused)
        problems["unlisted"] = dict.fromkeys(unused, "")
    # One photo of each class to train on, and one for each split that has to be held out.
    needed = 3 - len({"val", "test"} & {name for name, photos in listing.splits.items() if photos})
    training_photos = listing.splits["trainval" if listing.folder.is_pets else "train"]
    sizes = Counter(photo.class_name for photo in training_photos)
    largest = max(sizes.values(), default=0)
    for name, size in sizes.items():
        if size < needed:
            problems["too-few"][name] = f" has {size} of {needed}"
        if 3 * size < largest:
            problems["imbalance"][name] = f" has {size}, the largest {largest}"
    return problems


def _check_file(photo: ListedPhoto, problems: Problems) -> None:
    if not photo.path.is_file():
        # A link that leads nowhere cannot be read, but it is not missing either.
        if os.path.lexists(photo.path):
            problems["unreadable"][photo.name] = " is not a file"
        else:
            problems["missing"][photo.name] = ""
    elif photo.path.stat().st_size == 0:
        problems["unreadable"][photo.name] = " is empty"


def _survey_pets(listing: Listing, problems: Problems) -> None:
    annotations = listing.folder.pets / "annotations"
    for split, error in listing.errors.items():
        listing_name = f"{split}.txt"
        if (annotations / listing_name).is_file():
            problems["layout"][str(error)] = ""
        else:
            problems["missing"][listing_name] = ""
    _check_breed_counts(listing, problems)
    masks = _file_stems(annotations / "trimaps")
    for photo in listing.photos():
        if photo.path.stem not in masks:
            problems["missing-mask"][f"{photo.path.stem}.png"] = ""


def _check_breed_counts(listing: Listing, problems: Problems) -> None:
    trainval, test = (
        Counter(photo.class_name for photo in listing.splits[split])
        for split in ("trainval", "test")
    )
    breeds = sorted({*trainval, *test})
    if len(breeds) < NUM_BREEDS:
        # This finding has a sentence in the place of file names.
        sentence = f"{trainval.total():,} + {test.total():,} photos of {len(breeds)} breeds"
        problems["part"][sentence] = ""
        return
    for breed in breeds:
        counts = trainval[breed], test[breed]
        if counts != BREED_COUNTS.get(breed, (100, 100)):
            problems["counts"][breed] = f" {counts[0]} + {counts[1]}"


def _file_stems(folder: Path) -> set[str]:
    if not folder.is_dir():
        return set()
    return {path.stem for path in folder.iterdir() if path.is_file()}


def describe_problems(problems: Problems) -> list[Finding]:
    """Return a finding for each kind of problem that occurs."""
    findings = []
    for kind, (severity, text, advice) in KINDS.items():
        items = sorted(problems[kind].items())
        if not items:
            continue
        shown = [printable(name + detail) for name, detail in items if detail is not None]
        words = SINGULAR if len(items) == 1 else PLURAL
        message = text.format(n=f"{len(items):,}", names=first_few(shown), **words)
        if advice:
            message += f": {advice.format(**words)}"
        files = [] if text == "{names}" else [name for name, _ in items]
        findings.append(Finding(severity, kind, len(items), files, message))
    return findings
