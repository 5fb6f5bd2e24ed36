"""Survey a data folder: report what its listing alone shows to be wrong or odd.

Training prints these findings before it starts. The doctor adds what it finds by reading every
photo, and uses the same table of findings.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import first_few, printable
from .folder import UNREAD_PHOTOS, FolderContents, count_extensions, photos_below
from .listing import BESIDE, MISSING, ListedPhoto, Listing
from .photos import HOW_TO_READ

# What is wrong, by kind and by the name of a file or class. The detail follows the name in the
# message; a name whose detail is None is counted but not shown.
Problems = dict[str, dict[str, str | None]]


# All kinds of findings in the order in which they are shown: severity, text, and what to do.
# An error stops training, a warning may spoil it, and a note is good to know. In the texts, {n}
# is the number of names, {names} the first few of them, and {extensions} how many have which
# extension; SINGULAR or PLURAL fills in the rest.
# The names are those of files or classes, except where they are the whole text. What is not read
# stands under the reason that the listing gives.
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
    "format": (
        "warning",
        "{extensions} file{s} {are} not read ({names})",
        "minivit cannot open {them}, so convert {them} to JPEG",
    ),
    "heic": (
        "warning",
        "{extensions} file{s} {are} not read ({names})",
        f"to read {{them}}, {HOW_TO_READ['HEIC']}, or convert {{them}} to JPEG",
    ),
    "avif": (
        "warning",
        "{extensions} file{s} {are} not read ({names})",
        f"to read {{them}}, {HOW_TO_READ['AVIF']}, or convert {{them}} to JPEG",
    ),
    "misnamed": (
        "warning",
        "{n} photo{s} {are} not read because of the extension ({names})",
        "rename {them} to what {they} {are}, as .jpg or .png",
    ),
    "nested": (
        "warning",
        "{n} photo{s} in folders inside class folders {are} not read ({names})",
        "move {them} up into the class folders",
    ),
    "outside": (
        "warning",
        "{n} photo{s} outside of class folders {are} not read ({names})",
        "move {them} into the class folders",
    ),
    "beside": (
        "warning",
        "{n} folder{s} of photos {are} not read ({names})",
        "if {they} {are} meant, name {them} with --data",
    ),
    "locked": (
        "warning",
        "{n} folder{s} {are} not read ({names})",
        "you lack the permission to look into {them}",
    ),
    "untested": (
        "warning",
        "{n} class{es} {have} training photos, but none in another split ({names})",
        "no result will say anything of {them} there",
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
        "look at macro F1, train with --class-weights balanced, or add photos",
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
    "one-colour": (
        "warning",
        "{n} photo{s} {come} out in nearly one colour everywhere ({names})",
        "look at {them}: perhaps {they} {are} empty, or the values use a small part of their range",
    ),
    "missing-mask": (
        "warning",
        "{n} mask{s} {are} missing ({names})",
        "their photos get no attention scores; unpack annotations.tar.gz again",
    ),
    "bad-mask": (
        "warning",
        "{n} mask{s} {are} unreadable, of other values than 1 to 3, or of another size ({names})",
        "their photos get no attention scores; unpack annotations.tar.gz or draw {them} again",
    ),
    "unclear-mask": ("warning", "{names}", ""),
    "part": (
        "note",
        "{names}",
        "this is not the whole of Oxford-IIIT Pet, which has 3,680 + 3,669 photos of 37 breeds",
    ),
    "unlisted": (
        "note",
        "{n} photo{s} {are} not used ({names})",
        "the listings of Oxford-IIIT Pet do not name {them}",
    ),
    "masks": (
        "note",
        "{n} folder{s} {are} read as masks of the photos, and not as a class ({names})",
        "score and drop measure with {them}",
    ),
    "own": (
        "note",
        "{n} file{s} or folder{s} {are} left out ({names})",
        "minivit wrote {them}",
    ),
    "hidden": (
        "note",
        "{n} hidden photo{s} {are} not read ({names})",
        "rename {them} if {they} {are} meant",
    ),
    "other": (
        "note",
        "{n} file{s} or folder{s} {are} not used ({names})",
        "there is no photo in {them}",
    ),
    "case": (
        "note",
        "{n} photo{s} {have} the name of another one but for its case ({names})",
        "on many other systems one would replace the other",
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

SINGULAR = {"s": "", "es": "", "are": "is", "have": "has", "show": "shows", "come": "comes"}
SINGULAR |= {"them": "it", "they": "it"}
PLURAL = {"s": "s", "es": "es", "are": "are", "have": "have", "show": "show", "come": "come"}
PLURAL |= {"them": "them", "they": "they"}

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


def unread_photos(listing: Listing) -> list[Finding]:
    """Return a finding for each reason why photos are not read for their format or extension."""
    problems: Problems = {}
    for reason in UNREAD_PHOTOS:
        paths = listing.unused.get(reason, [])
        problems[reason] = {listing.name_of(path): "" for path in paths}
    return describe_problems(problems)


def describe_unread(contents: FolderContents) -> list[Finding]:
    """Return a finding for each reason why files of a folder are not read."""
    problems: Problems = {}
    for name, reason in contents.unread.items():
        problems.setdefault(reason, {})[name] = ""
    return describe_problems(problems)


def survey(listing: Listing) -> Problems:
    """Collect what a listing and the size of each file show, without opening any photo."""
    problems: Problems = {kind: {} for kind in KINDS}
    for photo in listing.photos():
        _check_file(photo, problems)
    for reason, paths in listing.unused.items():
        problems[reason] = {listing.name_of(path): "" for path in paths}
    if listing.folder.pets is not None:
        _survey_pets(listing, listing.folder.pets / "annotations", problems)
    else:
        _survey_class_folders(listing, problems)
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
    if photo.problem == MISSING:
        problems["missing"][photo.name] = ""
    elif photo.problem:
        problems["unreadable"][photo.name] = f" {photo.problem}"
    elif photo.path.stat().st_size == 0:
        problems["unreadable"][photo.name] = " is empty"


def _survey_class_folders(listing: Listing, problems: Problems) -> None:
    for error in listing.errors.values():
        problems["layout"][str(error)] = ""
    for path in listing.unused[BESIDE]:
        problems["beside"][listing.name_of(path)] = (
            f" with {sum(1 for _ in photos_below(path)):,} photos"
        )
    classes = {split: _classes(photos) for split, photos in listing.splits.items()}
    for split in set(classes) - {"train"}:
        for name in classes["train"] - classes[split]:
            problems["untested"][name] = f" not in {listing.folder.splits[split].name}/"
    _find_case_variants(listing, problems)


def _classes(photos: Iterable[ListedPhoto]) -> set[str]:
    return {photo.class_name for photo in photos}


def _find_case_variants(listing: Listing, problems: Problems) -> None:
    """Find photos whose names are the same on systems that do not tell case or normal forms."""
    first: dict[str, str] = {}
    for photo in listing.photos():
        key = photo.name.lower()
        if not key.isascii():
            key = unicodedata.normalize("NFC", photo.name).casefold()
        other = first.setdefault(key, photo.name)
        if other != photo.name:
            problems["case"][photo.name] = ""


def _survey_pets(listing: Listing, annotations: Path, problems: Problems) -> None:
    for error in listing.errors.values():
        problems["layout"][str(error)] = ""
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
    if not breeds:
        return  # The listings are missing, which is an error.
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
        items = sorted(problems.get(kind, {}).items())
        if not items:
            continue
        shown = [printable(name + detail) for name, detail in items if detail is not None]
        words = SINGULAR if len(items) == 1 else PLURAL
        message = text.format(
            n=f"{len(items):,}",
            names=first_few(shown),
            extensions=count_extensions(problems.get(kind, {})),
            **words,
        )
        if advice:
            message += f": {advice.format(**words)}"
        files = [] if text == "{names}" else [name for name, _ in items]
        findings.append(Finding(severity, kind, len(items), files, message))
    return findings
