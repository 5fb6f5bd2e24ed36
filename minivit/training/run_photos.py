"""Which photos a run was trained on: what its summary.json says of them, and what that tells later.

A validation photo must be new to the model. Which photos are new depends on the seed of the run
that wrote the model, and on the runs that wrote its base.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from ..data.datasets import Data, load_data
from ..system.files import read_json

MOST_RUNS = 20  # one after the other; more must be a circle


@dataclass(frozen=True)
class Run:
    """A run, and which photos it was trained on."""

    folder: Path
    seed: int
    data: str  # the data folder, as the run was given it
    photos: str | None  # photos_checksum of its data; runs of before do not say
    base: str  # the model that was trained


def find_run(model: str) -> Run | None:
    """Return the run that wrote a model, a folder or a file in it; None if no run is known.

    Raises UserError if the run's summary.json cannot be read.
    """
    if model == "demo":
        return None
    path = Path(os.path.expanduser(model))
    folder = path.parent if path.is_file() else path
    if not (folder / "summary.json").is_file():
        return None
    summary = read_json(folder / "summary.json")
    try:
        settings = summary["settings"]
        photos = summary.get("photos_checksum")
        return Run(folder, int(settings["seed"]), settings["data"], photos, summary["base"])
    except (KeyError, TypeError, ValueError):
        return None  # Another program wrote this file.


def runs_behind(model: str) -> list[Run]:
    """Return the run that wrote a model, the run that wrote this one's base, and so on."""
    runs: list[Run] = []
    run = find_run(model)
    while run is not None and len(runs) < MOST_RUNS:
        runs.append(run)
        run = find_run(run.base)
    return runs


def photos_checksum(data: Data) -> str:
    """Return a digest of the training and the validation photos, wherever they lie.

    Of a photo, its folder's name, its own name, its size and its label count. Photos that cannot be
    read count, too: they take part in splitting the data, and are left out later.
    """
    splits = []
    for split in (data.train, data.val):
        names = [(path.parent.name, path.name, path.stat().st_size) for path in split.paths]
        splits.append([*names, *split.labels])
    return hashlib.sha256(repr(splits).encode(errors="surrogateescape")).hexdigest()[:16]


def was_trained_on(run: Run, root: str) -> bool:
    """Return whether the photos in `root`, as the run's seed splits them, are those of the run."""
    if run.photos is None:
        folders = {os.path.realpath(os.path.expanduser(path)) for path in (run.data, root)}
        return len(folders) == 1
    return photos_checksum(load_data(root, seed=run.seed, only="trainval")) == run.photos
