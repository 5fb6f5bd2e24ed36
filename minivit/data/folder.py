"""What lies in a folder: its photos, and what is not read as a photo, with the reason.

This module does not import torch, so that processes that only read photos start quickly.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..figures.marks import SOFTWARE, is_ours
from .photos import FORMATS, holds_photo, needs_package

# Files with these names are photos, and so are files without an extension that hold one. What
# format they are in is decided by their content.
SUFFIXES: tuple[str, ...] = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".webp")
SUFFIXES += (".tif", ".tiff", ".bmp", ".ppm", ".pgm", ".pbm", ".pnm", ".mpo")
# Photos in formats that are not read: cameras' raw files, and the like.
UNREAD_SUFFIXES: tuple[str, ...] = (".jxl", ".jxr", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx")
UNREAD_SUFFIXES += (".dng", ".raw", ".arw", ".cr2")
UNREAD_SUFFIXES += (".cr3", ".crw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".sr2", ".srw")
UNREAD_SUFFIXES += (".x3f", ".3fr", ".iiq", ".psd", ".psb", ".xcf", ".tga", ".dds", ".qoi", ".ico")
UNREAD_SUFFIXES += (".dib", ".pcx", ".sgi", ".ras", ".svg", ".eps", ".exr", ".hdr", ".pfm", ".dcm")
UNREAD_SUFFIXES += (".fits",)
# Photos of phones, which are read if Pillow is new enough, or has another package beside it.
PACKAGE_SUFFIXES: tuple[str, ...] = ()
for _format, _suffixes in (
    ("AVIF", (".avif", ".avifs")),
    ("HEIF", (".heic", ".heif", ".hif", ".heics", ".heifs")),
):
    if _format in FORMATS:
        SUFFIXES += _suffixes
    else:
        PACKAGE_SUFFIXES += _suffixes
# There may be one of these beside every photo. Their content need not be looked at.
SIDECAR_SUFFIXES = (".txt", ".xml", ".json", ".csv", ".md", ".npy", ".xmp", ".aae")
# What operating systems leave in folders.
SYSTEM_FILES = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r")
SYSTEM_FOLDERS = ("__macosx", "@eadir", "lost+found", "$recycle.bin", "system volume information")
# What iCloud leaves of "photo.jpg" while it is not downloaded: ".photo.jpg.icloud".
ICLOUD = ".icloud"

# What people call the folders of the splits, in lower or upper case.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}

# What an entry of a folder is.
PHOTO = "photo"
FOLDER = "folder"
BROKEN = "broken"  # It is named as a photo, and is no file, or one that iCloud stands in for.
FORMAT = "format"  # It is a photo in a format that is not read.
HEIC = "heic"  # It is a HEIC, and there is no package that reads it.
AVIF = "avif"  # It is an AVIF, and Pillow is too old for it.
MISNAMED = "misnamed"  # It holds a photo, but has the extension of something else.
HIDDEN = "hidden"  # It is named as a photo, behind a dot.
OWN = "own"  # minivit wrote it.
OTHER = "other"  # It is no photo.
IGNORED = "ignored"  # It is hidden, or an operating system left it there.

# Photos, although none that are read.
UNREAD_PHOTOS = (FORMAT, HEIC, AVIF, MISNAMED)
# What every figure that minivit draws has in its PNG, before the pixels.
FIGURE_MARK = f"tEXtSoftware\0{SOFTWARE}".encode()
# Files that lie together only where minivit wrote them: the folder of a run, or of a command.
_OWN_FOLDERS = (
    {"metrics.jsonl", "summary.json"},
    {"metrics.jsonl", "state.safetensors"},
    {"score.csv", "score.json"},
    {"drop.csv", "drop.json"},
    {"study.csv", "study.json"},
    {"review.csv", "review.json"},
)
# The figures in such folders. Those of earlier versions do not say who drew them.
_OWN_FIGURES: tuple[str, ...] = ("predictions.png", "confusion.png", "curves.png")
_OWN_FIGURES += ("calibration.png", "score.png", "gallery.png", "study.png")


@dataclass(frozen=True)
class FolderContents:
    """The names of what lies directly in a folder, sorted, without what systems leave there."""

    photos: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)  # named as photos, with what they are
    unread: dict[str, str] = field(default_factory=dict)  # other files, with the reason
    folders: list[str] = field(default_factory=list)  # without hidden ones

    def names(self, *reasons: str) -> list[str]:
        """Return the files that are not read for one of these reasons."""
        return [name for name, reason in self.unread.items() if reason in reasons]

    def like_photos(self) -> list[str]:
        """Return what is a photo, or would be if it could be read."""
        return [*self.photos, *self.broken, *self.names(*UNREAD_PHOTOS, HIDDEN)]


def read_folder(folder: str | os.PathLike[str]) -> FolderContents:
    """Say of everything that lies directly in a folder what it is.

    No photo is opened, except for the first bytes of PNG files, which tell whether minivit drew
    them, and for files whose names do not say what they are. Raises OSError if there is no such
    folder, or if it may not be read.
    """
    with os.scandir(folder) as entries:
        listed = sorted(entries, key=_name)
    contents = FolderContents()
    is_marked = _is_marked({entry.name for entry in listed})
    for entry in listed:
        kind = _kind(entry, is_marked)
        if kind == PHOTO:
            contents.photos.append(entry.name)
        elif kind == BROKEN:
            contents.broken[entry.name] = _describe_special_file(entry)
        elif kind == FOLDER:
            contents.folders.append(entry.name)
        elif kind != IGNORED:
            contents.unread[entry.name] = kind
    return contents


def photos_below(folder: Path) -> Iterator[Path]:
    """Yield what is a photo, or would be if it could be read, in a folder and all folders in it.

    If the folder is a link, which could lead in a circle, only what lies directly in it counts.
    Other links to folders are not followed.
    """
    for path, folders, _ in os.walk(folder, onerror=_raise):
        if folder.is_symlink():
            folders.clear()
        folders[:] = sorted(
            name for name in folders if name[0] != "." and not _is_left_by_system(name, True)
        )
        for name in read_folder(path).like_photos():
            yield Path(path, name)


def is_split_name(name: str) -> bool:
    return any(name.lower() in spellings for spellings in SPLIT_NAMES.values())


def is_own_folder(folder: Path) -> bool:
    """Return whether minivit wrote a folder: it, or a folder in it, has the marks of that.

    Photos of other origin below the folder make it the user's.
    """
    is_marked = False
    for path, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if name[0] != "."]
        contents = read_folder(path)
        if contents.like_photos():
            return False
        if _is_marked(set(files)) or contents.names(OWN):
            is_marked = True
    return is_marked


def count_extensions(names: Iterable[str]) -> str:
    """Return how many of these files have each extension: "12 .heic and 3 .cr2"."""
    counts = Counter(Path(name).suffix.lower() or "extensionless" for name in names)
    return " and ".join(f"{n:,} {extension}" for extension, n in sorted(counts.items()))


def _raise(error: OSError) -> None:
    raise error


def has_suffix(name: str, suffixes: tuple[str, ...]) -> bool:
    """Return whether a file name ends in one of these, in lower or upper case."""
    return name.lower().endswith(suffixes)


def _name(entry: os.DirEntry[str]) -> str:
    return entry.name


def _is(test: Callable[[], bool]) -> bool:
    """Return the answer of a directory entry: no if a link leads in a circle, or out of reach."""
    try:
        return test()
    except OSError:
        return False


def _is_left_by_system(name: str, is_folder: bool) -> bool:
    if is_folder:
        return name.lower() in SYSTEM_FOLDERS
    # macOS writes `._photo.jpg` beside photos on foreign disks.
    return name.lower() in SYSTEM_FILES or name.startswith("._")


def _kind(entry: os.DirEntry[str], is_in_marked_folder: bool) -> str:
    """Return what an entry is: one of the constants above."""
    name = entry.name
    is_folder = _is(entry.is_dir)
    if _is_left_by_system(name, is_folder):
        return IGNORED
    if is_folder:
        return IGNORED if name.startswith(".") else FOLDER
    if name.startswith(".") and name.endswith(ICLOUD):
        return BROKEN if _is_named_as_photo(name.removesuffix(ICLOUD)) else IGNORED
    if name.startswith("."):
        return HIDDEN if _is_named_as_photo(name) else IGNORED
    if has_suffix(name, UNREAD_SUFFIXES):
        return FORMAT
    is_file = _is(entry.is_file)
    if has_suffix(name, PACKAGE_SUFFIXES):
        return _kind_of_unread(entry.path) if is_file else FORMAT
    if has_suffix(name, SUFFIXES):
        if not is_file:
            return BROKEN
        is_own = is_in_marked_folder and name in _OWN_FIGURES
        return OWN if is_own or is_own_figure(entry.path) else PHOTO
    if is_file and has_suffix(name, (".html", ".npz")):
        return OWN if is_ours(Path(entry.path)) else OTHER
    if not is_file or has_suffix(name, SIDECAR_SUFFIXES):
        return OTHER
    return _kind_by_content(entry.path)


def _is_named_as_photo(name: str) -> bool:
    return has_suffix(name, SUFFIXES + UNREAD_SUFFIXES + PACKAGE_SUFFIXES)


def _kind_of_unread(path: str) -> str:
    """Return what a file is that is named as a HEIC or AVIF where these are not read."""
    kind = _kind_by_content(path)
    return FORMAT if kind == OTHER else kind


def _kind_by_content(path: str) -> str:
    """Return what a file is whose name does not say it."""
    if holds_photo(path):
        has_extension = bool(Path(path).suffix)
        return MISNAMED if has_extension else PHOTO
    missing = needs_package(_first_bytes(path, 12))
    return {"HEIC": HEIC, "AVIF": AVIF}.get(missing, OTHER)


def _describe_special_file(entry: os.DirEntry[str]) -> str:
    if entry.name.endswith(ICLOUD):
        return "is still in iCloud: download it"
    if _is(entry.is_symlink) and not Path(entry.path).exists():
        return "is a link that leads nowhere"
    return "is not a file"


def is_own_figure(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is a figure that minivit drew.

    This is marks.is_ours for class folders of many PNG files: it reads only their first bytes.
    """
    return has_suffix(os.fspath(path), (".png",)) and FIGURE_MARK in _first_bytes(path, 512)


def _first_bytes(path: str | os.PathLike[str], n: int) -> bytes:
    """Return the first bytes of a file: none if it may not be read."""
    try:
        with io.FileIO(path) as file:
            return file.read(n)
    except OSError:
        return b""


def _is_marked(names: set[str]) -> bool:
    return any(marks <= names for marks in _OWN_FOLDERS)
