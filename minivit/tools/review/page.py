"""The page of a review: one HTML file that loads nothing. Its template is review.html.

File names and class names are untrusted data. They stand in JSON, and the page shows them as text.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...figures import pages
from ...figures.text import shorten
from ...model import ViT
from .pictures import LARGE, SMALL, draw_maps, draw_photos
from .report import Findings, describe

TEMPLATE = Path(__file__).with_name("review.html")
MOST_LISTED = 60  # mistakes, suspicious labels and groups of copies
MOST_IN_CELLS = 300  # photos of the confusion matrix that are shown and not only named
MOST_OF_A_GROUP = 4  # copies
MAX_NAME = 200  # characters of any name


def write_page(path: Path, findings: Findings, model: ViT, workers: int) -> None:
    """Write the page, whole or not at all."""
    pages.write_page(path, pages.fill_template(TEMPLATE, page_data(findings, model, workers)))


def page_data(findings: Findings, model: ViT, workers: int) -> dict[str, object]:
    """Return all that the page shows; photos are referred to by their index."""
    photos = findings.photos
    mistakes = findings.mistakes[:MOST_LISTED]
    suspicious = findings.suspicious[:MOST_LISTED]
    groups = [group[:MOST_OF_A_GROUP] for group in findings.copies[:MOST_LISTED]]
    cells = cells_of(findings)
    neighbours = {i: findings.neighbours[i].tolist() for i in suspicious}

    small = set(choose_for_cells(findings.mistakes, cells))
    small.update(*neighbours.values(), *groups)
    large = {*mistakes, *suspicious}
    small_urls = draw_photos(photos.paths, small, SMALL, workers)
    large_urls = draw_photos(photos.paths, large, LARGE, workers)
    maps = draw_maps(
        model,
        [photos.paths[i] for i in mistakes],
        [int(findings.answers[i]) for i in mistakes],
        [int(photos.labels[i]) for i in mistakes],
    )
    common_folder = os.path.commonpath([path.parent for path in photos.paths])
    described = {}
    for i in sorted(small.union(large, *cells.values())):
        name = str(photos.paths[i].relative_to(common_folder))
        described[i] = {
            "name": shorten(name, MAX_NAME),
            "label": int(photos.labels[i]),
            "split": photos.splits[i],
            "picture": small_urls.get(i, ""),
        }
    return {
        "run": shorten(findings.run, MAX_NAME),
        "classes": [shorten(name, MAX_NAME) for name in photos.classes],
        "sentences": describe(findings),
        "cropped": model.preprocess.crop is not None,
        "photos": described,
        "mistakes": [
            {
                "photo": i,
                "picture": large_urls[i],
                "answer": int(findings.answers[i]),
                "answerProbability": round(float(findings.answer_probabilities[i]), 4),
                "labelProbability": round(float(findings.run_label_probabilities[i]), 4),
                "maps": maps_of_photo,
            }
            for i, maps_of_photo in zip(mistakes, maps)
        ],
        "moreMistakes": len(findings.mistakes) - len(mistakes),
        "cells": [[*cell, indices] for cell, indices in sorted(cells.items())],
        "suspicious": [
            {
                "photo": i,
                "path": str(photos.paths[i]),
                "picture": large_urls[i],
                "labelProbability": round(float(findings.label_probabilities[i]), 4),
                "likeness": int(findings.likeness[i]),
                "likenessProbability": round(float(findings.likeness_probabilities[i]), 4),
                "neighbours": neighbours[i],
            }
            for i in suspicious
        ],
        "moreSuspicious": len(findings.suspicious) - len(suspicious),
        "copies": groups,
        "moreCopies": len(findings.copies) - len(groups),
    }


def cells_of(findings: Findings) -> dict[tuple[int, int], list[int]]:
    """Return the validation and test photos of each cell (label, answer) of the confusion."""
    cells: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for i in findings.held_out:
        cells[int(findings.photos.labels[i]), int(findings.answers[i])].append(i)
    return cells


def choose_for_cells(
    mistakes: Sequence[int], cells: Mapping[tuple[int, int], Sequence[int]]
) -> list[int]:
    """Return the photos that cells show: all mistakes first, then some of each right cell."""
    chosen = list(mistakes[:MOST_IN_CELLS])
    right = [indices for (label, answer), indices in cells.items() if label == answer]
    room = MOST_IN_CELLS - len(chosen)
    each = room // max(1, len(right))
    for indices in right:
        chosen += indices[:each]
    return chosen
