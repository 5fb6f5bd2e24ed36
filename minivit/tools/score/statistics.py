"""From each photo's scores to means over groups of photos, with bootstrap intervals.

Shapes: n photos, M maps of each (measure.py), 2 regions, 4 metrics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...data.pets import read_listing

REGIONS = ("pet", "head box")
METRICS = ("mass", "times_chance", "pointing", "average_precision")
RESAMPLES = 1000


class ScoreKey(NamedTuple):
    """What a score is about. The fields are the first columns of score.csv."""

    model: str  # "model", "base", or "change" for the difference between the two
    region: str  # one of REGIONS
    group: str  # the photos: see group_photos
    method: str
    block: int
    head: int | str  # "mean" for the mean over heads


class Estimate(NamedTuple):
    """A mean over photos and the ends of its 95% interval, which are NaN for a single photo."""

    mean: float
    low: float
    high: float

    def columns(self, name: str) -> dict[str, float | None]:
        """Return the columns of a table: `name`, and the same with _low and _high."""
        values = zip((name, f"{name}_low", f"{name}_high"), self)
        return {column: None if math.isnan(value) else value for column, value in values}


@dataclass(frozen=True)
class Score:
    """How one map falls on a region, averaged over a group of photos."""

    photos: int
    mass: Estimate
    times_chance: Estimate
    pointing: Estimate
    average_precision: Estimate


def group_photos(
    true_names: Sequence[str], predicted_names: Sequence[str] | None
) -> dict[str, np.ndarray]:
    """Return a boolean array (n,) for each group of photos: the photos that belong to it.

    The groups have the order in which reports show them. Without predicted names there are no
    groups "right" and "wrong": the model has other classes.
    """
    groups = {"all": np.ones(len(true_names), bool)}
    if predicted_names is not None:
        right = np.array([name == true for name, true in zip(predicted_names, true_names)])
        groups |= {"right": right, "wrong": ~right}
    return groups


def cats_and_dogs(paths: Sequence[Path], listing: str) -> dict[str, np.ndarray]:
    """Return the two groups of Oxford-IIIT Pet, by its listing that the photos are in."""
    listed = read_listing(paths[0].parents[1], listing)
    cat_stems = {stem for stem, _, species in listed if species == "cat"}
    cats = np.array([path.stem in cat_stems for path in paths])
    return {"cats": cats, "dogs": ~cats}


def summarize(
    scores: Mapping[str, np.ndarray],
    map_keys: Sequence[tuple[str, int, int | str]],
    groups: Mapping[str, np.ndarray],
) -> dict[ScoreKey, Score]:
    """Average each model's scores (n, M, 2, 4) over each group of photos that has any.

    `map_keys` names the M maps by method, block and head. With a "base" beside the "model", the
    difference of the two on each photo is averaged in the same way, as "change".
    """
    scores = dict(scores)
    if "base" in scores:
        scores["change"] = scores["model"] - scores["base"]
    summary = {}
    for model, values in scores.items():
        for r, region in enumerate(REGIONS):
            for group, members in groups.items():
                selected = values[members, :, r]  # (n, M, 4)
                selected = selected[~np.isnan(selected[:, 0, 0])]  # without a head box: NaN
                if len(selected) == 0:
                    continue
                estimates = np.stack(bootstrap(selected), -1).tolist()  # (M, 4, 3)
                for map_key, of_map in zip(map_keys, estimates):
                    key = ScoreKey(model, region, group, *map_key)
                    metrics = [Estimate(*estimate) for estimate in of_map]
                    summary[key] = Score(len(selected), *metrics)
    return summary


def bootstrap(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the mean over n photos of values (n, ...) and the two ends of its 95% interval.

    The interval is the percentile bootstrap's. For a single photo its ends are NaN.
    Source: Efron 1979, https://doi.org/10.1214/aos/1176344552
    """
    n = len(values)
    shape = values.shape[1:]
    flat = values.reshape(n, -1)
    mean = flat.mean(0).reshape(shape)
    if n == 1:
        unknown = np.full(shape, np.nan)
        return mean, unknown, unknown
    low, high = np.quantile(resample_counts(n) @ flat / n, (0.025, 0.975), axis=0)
    return mean, low.reshape(shape), high.reshape(shape)


def resample_counts(n: int) -> np.ndarray:
    """Return how often each resample draws each of n photos, (RESAMPLES, n); always the same."""
    rng = np.random.default_rng(0)
    counts = np.empty((RESAMPLES, n), np.float32)
    for row in counts:
        row[:] = np.bincount(rng.integers(n, size=n), minlength=n)
    return counts
