"""Which patches of a photo a model is shown: the conditions of the experiment.

This module does not import torch. Shapes: P = gh x gw patches of a photo.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

# The conditions in the order in which reports show them, and what each leaves of a photo.
EVERYTHING = "everything"
PET_ONLY = "pet only"
BACKGROUND_ONLY = "background only"
OUTSIDE_BOX = "outside the pet's box"
CORE_OUT = "without part of the pet"
BACKGROUND_OUT = "without as much background"
ANYWHERE_OUT = "without as much anywhere"
SAME_CLASS = "pet, background of its class"
OTHER_CLASS = "pet, background of another class"
CONDITIONS = (
    EVERYTHING,
    PET_ONLY,
    BACKGROUND_ONLY,
    OUTSIDE_BOX,
    CORE_OUT,
    BACKGROUND_OUT,
    ANYWHERE_OUT,
    SAME_CLASS,
    OTHER_CLASS,
)

CORE = 0.5  # A patch belongs to the core if more than this fraction of it is pet.
WHOLLY = 1 - 1e-6  # From this fraction on, a patch is background only; the rest is rounding.
PET_SHARES = (0.05, 0.8)  # the smallest and the largest share of the patches that a pet may cover
LEFT_OUT = 0.8  # k is this fraction of what core and background both have in one piece


@dataclass(frozen=True)
class PatchSets:
    """The patches of a photo, as arrays of indices in ascending order."""

    grid: tuple[int, int]
    pet: np.ndarray  # with any pixel of the pet or of its border
    core: np.ndarray  # more than half pet
    background: np.ndarray  # with no pixel of the pet or of its border
    outside_box: np.ndarray  # outside the smallest rectangle of patches that holds all of `pet`
    pet_area: np.ndarray  # (P,) the fraction of each patch that is pet


class Shown(NamedTuple):
    """The patches that are shown of a photo, and of another photo whose patches join them."""

    own: np.ndarray
    partner: int | None = None  # the other photo
    of_partner: np.ndarray = np.empty(0, int)


def patch_sets(pet: np.ndarray, background: np.ndarray, grid: tuple[int, int]) -> PatchSets:
    """Sort patches by the fractions (P,) of them that are pet and background; the rest is border.

    A patch with any border is neither core nor background for certain, and counts as pet.
    """
    is_background = background >= WHOLLY
    rows, columns = np.nonzero(~is_background.reshape(grid))
    outside = np.ones(grid, bool)
    if len(rows):
        outside[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = False
    return PatchSets(
        grid,
        pet=np.flatnonzero(~is_background),
        core=np.flatnonzero(pet > CORE),
        background=np.flatnonzero(is_background),
        outside_box=np.flatnonzero(outside),
        pet_area=pet,
    )


def reason_to_leave_out(sets: PatchSets) -> str:
    """Return why a photo is not taken, or "" if it is."""
    gh, gw = sets.grid
    smallest, largest = PET_SHARES
    share = len(sets.pet) / (gh * gw)
    if share < smallest:
        return f"pet covers less than {smallest:.0%} of the patches"
    if share > largest:
        return f"pet covers more than {largest:.0%} of the patches"
    return ""


def num_left_out(sets: PatchSets) -> int:
    """Return k: as many patches as can be left out of core and of background in one piece."""
    largest_pieces = [
        max(map(len, connected_pieces(patches, sets.grid)), default=0)
        for patches in (sets.core, sets.background)
    ]
    return int(LEFT_OUT * min(largest_pieces))


def show_own(sets: PatchSets, rng: Generator) -> dict[str, Shown]:
    """Return what each condition shows that needs no other photo. `rng` chooses the k patches.

    A condition that would show or leave out nothing is not there: nothing is outside the box of a
    pet that reaches all four sides, and k is 0 where no patch is more than half pet.
    """
    gh, gw = sets.grid
    everything = np.arange(gh * gw)
    shown = {
        EVERYTHING: Shown(everything),
        PET_ONLY: Shown(sets.pet),
        BACKGROUND_ONLY: Shown(sets.background),
    }
    if len(sets.outside_box):
        shown[OUTSIDE_BOX] = Shown(sets.outside_box)
    k = num_left_out(sets)
    if k:
        for key, patches in (
            (CORE_OUT, sets.core),
            (BACKGROUND_OUT, sets.background),
            (ANYWHERE_OUT, everything),
        ):
            left_out = contiguous(patches, k, sets.grid, rng)
            shown[key] = Shown(np.setdiff1d(everything, left_out))
    return shown


def show_joined(sets: PatchSets, partner: int, partner_sets: PatchSets) -> Shown:
    """Return a photo's pet on the background of another photo.

    Where the other photo's background lies under the pet, the pet's patch is shown, so that no
    place is shown twice.
    """
    behind = np.setdiff1d(partner_sets.background, sets.pet)
    return Shown(sets.pet, partner, behind)


def contiguous(patches: np.ndarray, k: int, grid: tuple[int, int], rng: Generator) -> np.ndarray:
    """Return k of the patches that lie together: those nearest to a random one, step by step.

    The random patch is one of the largest connected piece, which must have k patches.
    """
    largest = max(connected_pieces(patches, grid), key=len)
    start = int(rng.choice(largest))
    return np.array(spread(start, set(largest), grid)[:k], int)


def connected_pieces(patches: np.ndarray, grid: tuple[int, int]) -> list[list[int]]:
    """Return the pieces into which patches fall; the patches of a piece share sides."""
    remaining = set(patches.tolist())
    pieces = []
    while remaining:
        piece = spread(min(remaining), remaining, grid)
        remaining -= set(piece)
        pieces.append(piece)
    return pieces


def spread(start: int, allowed: set[int], grid: tuple[int, int]) -> list[int]:
    """Return the patches that can be reached from `start` through allowed ones, nearest first."""
    gh, gw = grid
    reached = [start]
    seen = {start}
    queue = deque(reached)
    while queue:
        patch = queue.popleft()
        row, column = divmod(patch, gw)
        neighbours = []
        if row > 0:
            neighbours.append(patch - gw)
        if row < gh - 1:
            neighbours.append(patch + gw)
        if column > 0:
            neighbours.append(patch - 1)
        if column < gw - 1:
            neighbours.append(patch + 1)
        for neighbour in neighbours:
            if neighbour in allowed and neighbour not in seen:
                seen.add(neighbour)
                reached.append(neighbour)
                queue.append(neighbour)
    return reached


def order_by_importance(importance: np.ndarray, rng: Generator) -> np.ndarray:
    """Return the patches from the most to the least important; equal ones in random order."""
    return np.lexsort((rng.random(len(importance)), -importance))


def spread_classes(labels: np.ndarray, rng: Generator) -> np.ndarray:
    """Return an order of the photos, (n,), in which every class is spread evenly.

    Two photos of a class always follow each other, so that the neighbours of a photo include one
    of its own class and one of another.
    """
    places = np.empty(len(labels))
    for label in np.unique(labels):
        photos = rng.permutation(np.flatnonzero(labels == label))
        pairs = np.arange(len(photos)) // 2
        places[photos] = (pairs + rng.random()) / (len(photos) / 2)
    return np.argsort(places, kind="stable")
