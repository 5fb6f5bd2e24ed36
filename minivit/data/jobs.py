"""What infer.py is asked to do: its photos, the path of each figure, and the workers that help.

commands.py calls this before infer.py. Nothing here imports torch, so that the workers can start
while torch is imported.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError, first_few, printable
from ..figures.marks import is_ours
from ..settings import InferSettings
from ..system.files import portable_stem, refuse_to_overwrite
from ..system.launch import launched_rank, launched_world_size
from ..system.workers import processes_worth_starting, worker_pool
from .folder import SUFFIXES, UNREAD_PHOTOS, FolderContents, has_suffix, read_folder
from .survey import describe_unread

# Figures of fewer photos are drawn before worker processes would have started.
DRAW_IN_WORKERS_FROM = 8
# So many threads decode as fast as processes, which have to send what they decode. More threads
# would wait for each other at the interpreter lock, which decoding holds a third of its time.
DECODE_IN_THREADS_UP_TO = 4
# Bytes that a file name can have, less some for a number and an extension.
MAX_STEM_BYTES = 240


@dataclass(frozen=True)
class Job:
    """A photo, and the path of its figure, if it gets one."""

    photo: Path
    figure: Path | None = None


def list_jobs(settings: InferSettings) -> tuple[list[Job], int]:
    """Return this process's jobs, and the number of files that cannot be read.

    Under torchrun, the processes share the photos out.
    """
    if not settings.no_figures:
        refuse_to_overwrite(Path(settings.out), [])  # No name is: figures give way to other files.
    photos, num_unread = find_photos(settings.photos)
    jobs = list(place_figures(photos, settings))
    return jobs[launched_rank() :: launched_world_size()], num_unread


def start_workers(
    jobs: Sequence[Job], settings: InferSettings
) -> contextlib.AbstractContextManager[Executor]:
    """Start the processes that decode photos and draw figures, where they are worth starting."""
    if settings.no_figures:
        num_processes = 0
        if settings.workers > DECODE_IN_THREADS_UP_TO:
            num_processes = processes_worth_starting([job.photo for job in jobs], settings.workers)
        return worker_pool(num_processes, "minivit.data.prepared")
    num_processes = min(settings.workers, len(jobs)) if len(jobs) >= DRAW_IN_WORKERS_FROM else 0
    return worker_pool(num_processes, "minivit.figures.panels")


def find_photos(arguments: Iterable[str]) -> tuple[list[Path], int]:
    """Return the photos that are meant, and the number of others that cannot be read.

    A folder stands for the photos directly inside it; what else it holds is named on stderr.
    Raises UserError for a folder without photos.
    """
    photos: list[Path] = []
    num_unread = 0
    for argument in arguments:
        if not argument:  # Path would take it for the working directory.
            raise UserError("expected the name of a photo or folder, found an empty one")
        path = Path(argument)
        try:
            contents = read_folder(path)
        except OSError:  # This is not a folder. If it is no photo either, open_photo says why.
            photos.append(path)
            continue
        inner = [name for name in contents.folders if read_folder(path / name).like_photos()]
        named_as_photos = [name for name in contents.folders if has_suffix(name, SUFFIXES)]
        broken = [*contents.broken, *(set(named_as_photos) - set(inner))]
        names = sorted([*contents.photos, *broken])  # open_photo says what is broken.
        left_out = describe_left_out(contents, inner)
        if not names:
            found = "".join(f"; {text}" for text in left_out)
            raise UserError(
                f"{path}: no photos in this folder{found}; "
                f"expected files ending in {', '.join(SUFFIXES)}"
            )
        if launched_rank() == 0:
            for text in left_out:
                print(printable(f"{path}: {text}"), file=sys.stderr, flush=True)
        photos += [path / name for name in names]
        num_unread += len(contents.names(*UNREAD_PHOTOS))
    return photos, num_unread


def describe_left_out(contents: FolderContents, inner: Sequence[str]) -> list[str]:
    """Say how many files in a folder are left out, and which `inner` folders of photos, and why."""
    left_out = [finding.message for finding in describe_unread(contents)]
    if inner:
        left_out.append(f"photos in folders inside it are left out ({first_few(inner)})")
    return left_out


def place_figures(photos: Sequence[Path], settings: InferSettings) -> Iterator[Job]:
    """Yield a job for each photo. Figures are named cat.png, cat-2.png and so on.

    None of the files that are written takes the place of a photo, of another photo's files, or of
    a file that minivit did not write.
    """
    if settings.no_figures:
        yield from map(Job, photos)
        return
    out = Path(settings.out)
    suffixes = written_suffixes(settings)
    taken = {_path_key(path) for path in photos}
    for path in photos:
        stem = portable_stem(path.stem)
        while len(os.fsencode(stem)) > MAX_STEM_BYTES:
            stem = stem[:-1]
        figure = out / f"{stem}.png"
        for number in itertools.count(2):
            files = [figure.with_suffix(suffix) for suffix in suffixes]
            if not any(_path_key(file) in taken or _is_the_users(file) for file in files):
                break
            figure = out / f"{stem}-{number}.png"
        taken.update(_path_key(file) for file in files)
        yield Job(path, figure)


def _path_key(path: Path) -> str:
    """Return the same for all names of one file, also where letters of both cases are the same."""
    return unicodedata.normalize("NFC", os.path.realpath(path)).casefold()


def _is_the_users(path: Path) -> bool:
    """Return whether there is a file, or a link, that must not be overwritten."""
    return (path.is_file() or path.is_symlink()) and not is_ours(path)


def written_suffixes(settings: InferSettings) -> list[str]:
    """Return the suffixes of the files that are written for each photo."""
    suffixes = [".png"]
    if settings.html:
        suffixes.append(".html")
    if settings.npz:
        suffixes.append(".npz")
    return suffixes
