"""Which photos to score: validation photos must be new to the model, and its run says which are."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from ...data.datasets import Data, Split, split_data
from ...data.listing import list_data
from ...data.own_masks import check_own_masks
from ...data.survey import unread_photos
from ...errors import UserError, printable
from ...training.run_photos import Run, runs_behind, was_trained_on
from .masks import mask_path

SPLITS_BY_SEED = ("train", "val")  # The others are the same for every seed.


def run_that_split(root: str, name: str, names: Mapping[str, str]) -> Run | None:
    """Return the run that wrote the model, whose seed splits off the photos to score.

    Returns None if no run is known, and for a split that is the same for every seed. Raises
    UserError if the run was trained on other photos than those in `root`, and if some of its
    validation photos were trained on by a run before it, or by one behind the "base".
    """
    if name not in SPLITS_BY_SEED:
        return None
    runs = runs_behind(names["model"])
    if not runs:
        return None
    run = runs[0]
    if not was_trained_on(run, root):
        raise UserError(
            f"{root}: which of these photos are the {name} split of {run.folder} is not known, as "
            f"it was trained on others ({run.data}); expected --split test or trainval"
        )
    others = runs[1:]
    if "base" in names:
        others += runs_behind(names["base"])
    for other in others:
        if name == "val" and other.seed != run.seed and was_trained_on(other, root):
            raise UserError(
                f"{other.folder}: was trained, with seed {other.seed}, on photos that "
                f"{run.folder} validates on, with seed {run.seed}; expected --split test"
            )
    return run


def load_masked_split(root: str, name: str, run: Run | None) -> tuple[Data, Split]:
    """Return a data set, and its split called `name` as the run splits it.

    Photos that are not read for their format or extension are named on stderr.
    Of Oxford-IIIT Pet, only the photos of this split need to be there. Raises UserError if none of
    them has a mask, and if a mask could be that of two photos.
    """
    listing = list_data(root, download=True)
    data = split_data(listing, seed=run.seed if run else 0, only=name)
    for finding in unread_photos(listing):
        print(finding, file=sys.stderr)
    if name == "trainval":
        split = Split(data.train.paths + data.val.paths, data.train.labels + data.val.labels)
    else:
        split = getattr(data, name)
    if not any(mask_path(path).is_file() for path in split.paths):
        raise UserError(
            f"{root}: no photo of the {name} split has a mask; expected Oxford-IIIT Pet with its "
            "annotations/trimaps, or masks/ beside class folders"
        )
    if not data.is_pets:
        check_own_masks(data.root, data.paths())
    return data, split


def describe_split(name: str, run: Run | None, model: str, knows_classes: bool) -> str:
    """Say how a split was made: "" for one that is the same for every seed.

    Raises UserError if the model may have been trained on these photos, nobody knows on which.
    """
    if name not in SPLITS_BY_SEED:
        return ""
    if run is not None:
        return f"the {name} split is that of {printable(run.folder)}, made with seed {run.seed}"
    if knows_classes:
        raise UserError(
            f"{model}: knows these classes, and no summary.json beside it says which of the photos "
            "it was trained on; expected --split test or trainval"
        )
    return f"the {name} split is that of seed 0; no run trained this model on these classes"
