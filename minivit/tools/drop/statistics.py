"""From the answers to accuracies with intervals, four numbers, and one sentence.

Shapes: n photos, C classes, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..score.statistics import RESAMPLES, Estimate, resample_counts
from .conditions import (
    BACKGROUND_ONLY,
    BACKGROUND_OUT,
    CORE_OUT,
    EVERYTHING,
    OTHER_CLASS,
    OUTSIDE_BOX,
    PET_ONLY,
    SAME_CLASS,
)
from .measure import FRACTIONS, NO_ANSWER, Key, MapKey

# The sentence says that the background tells the class if, without the pet's box, accuracy keeps at
# least this fraction of what it is above chance with the whole photo, and that the pet is enough
# if accuracy with the pet alone keeps at least that fraction.
BACKGROUND_TELLS = 1 / 3
PET_IS_ENOUGH = 0.8


@dataclass(frozen=True)
class Result:
    """How a model answers under one condition."""

    photos: int  # of which the condition can be shown
    accuracy: Estimate | None  # the mean over classes; None if the model does not know the classes
    agreement: Estimate  # the fraction of answers that are those to the whole photo
    commonest: float  # the share of the commonest answer


@dataclass(frozen=True)
class Summary:
    """What is known of one model."""

    results: dict[Key, Result]
    numbers: dict[str, Estimate]  # the four numbers by name; none if the classes are unknown
    numbers_of_same_answers: dict[str, Estimate]  # the same, from agreement in place of accuracy
    # By method and block: agreement with the least important patches left out, minus with the most
    # important ones, averaged over FRACTIONS.
    faithfulness: dict[tuple[str, int | None], Estimate]
    chance: float | None  # the accuracy of any fixed answer; None if the classes are unknown

    def accuracy(self, key: Key) -> Estimate:
        """Return the accuracy under a condition, which the model must know the classes for."""
        accuracy = self.results[key].accuracy
        if accuracy is None:
            raise ValueError(f"{key}: the model does not know the classes")
        return accuracy


def summarize(predicted: Mapping[Key, np.ndarray], true: np.ndarray | None) -> Summary:
    """Summarise a model's answers; `true` (n,) has the right classes, if the model knows them.

    Intervals are those of 1,000 resamplings of the photos, the same for every condition.
    """
    whole = predicted[EVERYTHING]
    counts = photo_counts(len(whole))
    accuracies: dict[Key, np.ndarray] = {}
    agreements: dict[Key, np.ndarray] = {}
    results = {}
    for key, classes in predicted.items():
        valid = classes != NO_ANSWER
        if not valid.any():
            continue
        agreements[key] = resampled_mean(classes == whole, valid, counts)
        accuracy = None
        if true is not None:
            accuracies[key] = resampled_macro_accuracy(classes, true, valid, counts)
            accuracy = estimate(accuracies[key])
        answers = np.unique(classes[valid], return_counts=True)[1]
        results[key] = Result(
            int(valid.sum()), accuracy, estimate(agreements[key]), answers.max() / valid.sum()
        )
    numbers = {}
    chance = None
    if true is not None:
        numbers = four_numbers(accuracies)
        chance = 1 / len(np.unique(true))
    return Summary(results, numbers, four_numbers(agreements), faithfulness(agreements), chance)


def photo_counts(n: int) -> np.ndarray:
    """Return how often each photo counts, (1 + R, n): once each, and then in each resample."""
    return np.vstack([np.ones((1, n), np.float32), resample_counts(n)])


def resampled_mean(right: np.ndarray, valid: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the fraction of valid photos (n,) that are right, in each resample: (1 + R,)."""
    drawn = counts @ valid.astype(np.float32)
    return (counts @ (right & valid).astype(np.float32)) / np.maximum(drawn, 1)


def resampled_macro_accuracy(
    classes: np.ndarray, true: np.ndarray, valid: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """Return the mean of the classes' accuracies in each resample: (1 + R,).

    A model that gives one answer to everything has 1 / C, however many photos that class has.
    Classes that a resample has not drawn do not count in it.
    """
    of_class = (true[:, None] == np.unique(true)) & valid[:, None]  # (n, C)
    drawn = counts @ of_class.astype(np.float32)  # (1 + R, C)
    right = counts @ (of_class & (classes == true)[:, None]).astype(np.float32)
    accuracy = right / np.maximum(drawn, 1)
    return accuracy.sum(1) / np.maximum((drawn > 0).sum(1), 1)


def estimate(resampled: np.ndarray) -> Estimate:
    """Return the value of the photos as they are, and the 95% interval of the resamples."""
    low, high = np.quantile(resampled[1:], (0.025, 0.975))
    return Estimate(float(resampled[0]), float(low), float(high))


def four_numbers(values: Mapping[Key, np.ndarray]) -> dict[str, Estimate]:
    """Return the four numbers from the resampled accuracy (1 + R,) under each condition."""
    numbers = {}
    if CORE_OUT in values:
        numbers["needs the pet"] = values[BACKGROUND_OUT] - values[CORE_OUT]
    numbers["the pet is enough"] = values[PET_ONLY] / np.maximum(values[EVERYTHING], 1e-9)
    numbers["the background alone"] = values[background_condition(values)]
    if SAME_CLASS in values and OTHER_CLASS in values:
        numbers["background gap"] = values[SAME_CLASS] - values[OTHER_CLASS]
    return {name: estimate(resampled) for name, resampled in numbers.items()}


def background_condition(values: Mapping[Key, object]) -> Key:
    """Return the condition that shows the background alone: outside the box, where it can be.

    Without the box there is no hole that has the pet's outline.
    """
    return OUTSIDE_BOX if OUTSIDE_BOX in values else BACKGROUND_ONLY


def faithfulness(agreements: Mapping[Key, np.ndarray]) -> dict[tuple[str, int | None], Estimate]:
    """Return for each map how much more its least important patches can be spared.

    Source: the difference of the two orders, Bluecher et al. 2024, https://arxiv.org/abs/2401.06654
    """
    maps = dict.fromkeys((key.method, key.block) for key in agreements if isinstance(key, MapKey))
    differences = {}
    for method, block in maps:
        total = np.zeros(1 + RESAMPLES)
        for fraction in FRACTIONS:
            least_first = agreements[MapKey(method, block, False, fraction)]
            total += least_first - agreements[MapKey(method, block, True, fraction)]
        differences[method, block] = estimate(total / len(FRACTIONS))
    return differences


def one_sentence(summary: Summary, base: Summary | None = None) -> str:
    """Say in a sentence where the answer comes from.

    If the model, or the one before fine-tuning, does not know the classes, a sentence says how many
    of the answers stay, which can be said of both.
    """
    sentences = []
    if summary.chance is not None:
        sentences.append(sentence_of_accuracy(summary, summary.chance))
    if summary.chance is None or (base is not None and base.chance is None):
        sentences.append(sentence_of_agreement(summary, base))
    return " ".join(sentences)


def sentence_of_accuracy(summary: Summary, chance: float) -> str:
    """Say where the right answers come from."""
    whole = summary.accuracy(EVERYTHING)
    pet = summary.accuracy(PET_ONLY)
    background = summary.accuracy(background_condition(summary.results))
    if whole.low <= chance:
        return (
            f"The model is right on {whole.mean:.0%} of the whole photos, which is not above "
            f"chance ({chance:.0%}), so there is nothing to explain."
        )
    above_chance = whole.mean - chance
    background_share = (background.mean - chance) / above_chance
    pet_share = (pet.mean - chance) / above_chance
    if background.low > chance and background_share >= BACKGROUND_TELLS:
        return (
            f"The background alone gives {background.mean:.0%} (chance {chance:.0%}, whole photos "
            f"{whole.mean:.0%}): the surroundings tell the class."
        )
    outside = f"without it {background.mean:.0%} are right (chance {chance:.0%})"
    if pet_share >= PET_IS_ENOUGH:
        return (
            f"The answer comes from the pet: {outside}, "
            f"with the pet alone {pet.mean:.0%} (whole photos {whole.mean:.0%})."
        )
    return (
        f"The answer needs the pet and its surroundings: {outside}, "
        f"with the pet alone {pet.mean:.0%} (whole photos {whole.mean:.0%})."
    )


def sentence_of_agreement(summary: Summary, base: Summary | None) -> str:
    """Say how many of the answers stay without the background, and without the pet."""
    sentence = (
        f"Of the answers, {stays(summary, PET_ONLY)} stay with the pet alone, "
        f"and {stays(summary, background_condition(summary.results))} with the background alone"
    )
    if base is None:
        return f"{sentence}."
    return (
        f"{sentence}; before fine-tuning, {stays(base, PET_ONLY)} "
        f"and {stays(base, background_condition(base.results))}."
    )


def stays(summary: Summary, key: Key) -> str:
    return f"{summary.results[key].agreement.mean:.0%}"
