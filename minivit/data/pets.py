"""The layout of Oxford-IIIT Pet, its two listings, and its download.

This module does not import torch, so that processes that only read photos start quickly.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import sys
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError
from ..system.files import replace_file

PETS_FOLDER = "oxford-iiit-pet"  # as torchvision names it
SPLITS = ("trainval", "test")  # as Oxford-IIIT Pet names them
SERVER_TIMEOUT_S = 6  # for each answer of Oxford's server


class ListedPet(NamedTuple):
    """One line of a listing."""

    stem: str  # the photo's file name without its suffix
    number: int  # of the breed, from 1 on
    species: str  # "cat" or "dog"


def read_listing(pets: Path, split: str) -> list[ListedPet]:
    """Read the listing of a split, "trainval" or "test".

    Raises UserError if the file is missing or contains a line that cannot be parsed.
    """
    listing = pets / "annotations" / f"{split}.txt"
    if not listing.is_file():
        raise UserError(f"{listing}: no such file; {how_to_complete(pets, 'annotations')}")
    photos = []
    for line in listing.read_text("utf-8-sig", "backslashreplace").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        try:
            stem, number, species, _ = line.split()
            photos.append(ListedPet(stem, int(number), "cat" if species == "1" else "dog"))
        except ValueError:
            raise UserError(
                f"{listing}: expected lines like `Abyssinian_1 1 1 1`, found {line!r}"
            ) from None
    return photos


def how_to_complete(pets: Path, part: str) -> str:
    """Return what to do if something is missing in `images` or `annotations`."""
    archive = f"{part}.tar.gz"
    if (pets / part / part).is_dir():
        return f"move what is in {pets / part / part} one folder up"
    if (pets / archive).is_file():
        return f"unpack {pets / archive} there"
    return f"unpack {archive} of Oxford-IIIT Pet in {pets}"


def download_pets(root: Path) -> None:
    """Download Oxford-IIIT Pet (774 MiB) into `root`/oxford-iiit-pet with torchvision.

    torchvision checks the archives' MD5 sums. The download goes into a hidden folder that is
    renamed at the end: an interrupted download keeps its complete archives for the next attempt,
    and never leaves half-extracted photos where torchvision would take them for the data set.
    """
    from torchvision.datasets import OxfordIIITPet

    partial = root / ".download"
    print(f"{root}: downloading Oxford-IIIT Pet (774 MiB)", file=sys.stderr)
    timeout_before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SERVER_TIMEOUT_S)  # torchvision sets none.
    try:
        for name in ("images", "annotations"):
            shutil.rmtree(partial / PETS_FOLDER / name, ignore_errors=True)
        with contextlib.redirect_stdout(sys.stderr):
            OxfordIIITPet(partial, download=True)
        replace_file(partial / PETS_FOLDER, root / PETS_FOLDER)
        partial.rmdir()
    except (OSError, EOFError, RuntimeError) as error:
        raise UserError(
            f"Oxford-IIIT Pet cannot be fetched from www.robots.ox.ac.uk into {root} ({error}); "
            f"try again, or give a copy that has {PETS_FOLDER}/images and annotations "
            "with --data FOLDER"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout_before)
