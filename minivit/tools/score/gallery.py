"""The gallery: the photos most worth a look after scoring, as one picture and one page of HTML.

File names and class names are data: the page has no script, reaches nothing, and shows them as text.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageFilter

from ...data.photos import open_photo
from ...data.preprocess import Preprocess
from ...errors import printable
from ...figures.plots import HEAT, overlay, save, show, value_range
from ...system.files import whole_file
from .masks import read_mask
from .measure import Measured

SIDE = 240  # pixels of a photo's longer side
COLUMNS = 3  # of the picture
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>minivit: photos worth a look</title>
<style>
body { margin: 1rem auto; max-width: 90rem; padding: 0 1rem; font: 1rem/1.4 system-ui, sans-serif; overflow-wrap: anywhere }
section { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(28rem, 100%), 1fr)) }
figure { margin: 0 } img { width: 100%; display: block } figcaption { white-space: pre-line; font-size: .9rem }
</style>
"""


def choose(found: Measured, right: np.ndarray | None, count: int) -> dict[str, list[int]]:
    """Return up to `count` photos of each kind, as indices into found's n, the most telling first."""
    kinds, times = {}, found.times["model"]

    def pick(order: np.ndarray, allowed: np.ndarray) -> list[int]:
        return [int(i) for i in np.argsort(order, kind="stable") if allowed[i]][:count]

    if right is not None:
        kinds["wrong and confident"] = pick(-found.probability, ~right)
        kinds["right, but looking elsewhere (below chance)"] = pick(times, right & (times < 1))
    if "base" in found.times:
        change = times - found.times["base"]
        kinds["most improved by fine-tuning"] = pick(-change, change > 0)
        kinds["most worsened by fine-tuning"] = pick(change, change < 0)
    return kinds


def write_gallery(
    out: Path,
    kinds: Mapping[str, Sequence[int]],
    found: Measured,
    paths: Sequence[Path],
    truth: Sequence[str],
    names: Sequence[str],
    preprocess: Preprocess,
    block: int,
) -> None:
    """Write gallery.png and gallery.html into `out`: each photo, then where the base and the model look, pet outlined.

    `paths` and `truth` are of found's n photos; `names` are the model's classes, empty if it does not know these.
    """
    about = f"each: the photo with the pet's outline, then where block {block} looks, mean of heads, bright where most"
    about += ": before and after" * ("base" in found.maps) + (
        "; pale: not seen" if preprocess.crop else ""
    )
    sections, page = {}, f"{PAGE}<h1>Photos worth a look</h1>\n<p>{html.escape(about)}</p>\n"
    for kind, chosen in kinds.items():
        sections[kind] = [
            (strip(paths[i], found, i, preprocess), caption(paths[i], found, i, truth[i], names))
            for i in chosen
        ]
        page += f"<h2>{html.escape(kind)}{'' if chosen else ': none'}</h2>\n<section>\n"
        for picture, text in sections[kind]:
            picture.save(file := io.BytesIO(), "JPEG", quality=85)
            source, said = base64.b64encode(file.getvalue()).decode(), html.escape(text)
            page += f'<figure><img src="data:image/jpeg;base64,{source}" alt="{said}">'
            page += f"<figcaption>{said}</figcaption></figure>\n"
        page += "</section>\n"
    draw_gallery(out / "gallery.png", sections, about)
    with whole_file(out / "gallery.html") as partial:
        partial.write_text(page, encoding="utf-8")


def strip(path: Path, found: Measured, i: int, preprocess: Preprocess) -> Image.Image:
    """Return a small photo and, side by side with it, where each model looks, the pet's outline over all."""
    photo = open_photo(path)
    W, H = (max(1, round(length * SIDE / max(photo.size))) for length in photo.size)
    small = np.asarray(photo.resize((W, H)))
    looks = [found.maps[which][i] for which in ("base", "model") if which in found.maps]
    heats = [preprocess.to_photo(values, photo.size, (H, W)) for values in looks]
    panels = [small, *(overlay(small, heat, *value_range([heat]), HEAT) for heat in heats)]
    mask = Image.fromarray((read_mask(path, photo.size) == 1).astype(np.uint8)).resize(
        (W, H), Image.Resampling.NEAREST
    )
    edge = np.asarray(mask) != np.asarray(mask.filter(ImageFilter.MinFilter(3)))
    rim = np.asarray(mask) != np.asarray(mask.filter(ImageFilter.MaxFilter(3)))
    joined = Image.new("RGB", (len(panels) * (W + 4) - 4, H), "white")
    for k, panel in enumerate(panels):
        panel = np.where(
            edge[..., None], 255, np.where(rim[..., None], 0, panel)
        )  # white in black, to be seen on anything
        joined.paste(Image.fromarray(panel.astype(np.uint8)), (k * (W + 4), 0))
    return joined


def caption(path: Path, found: Measured, i: int, truth: str, names: Sequence[str]) -> str:
    """Say in three lines which photo it is, what it was taken for, and how much of the attention is on the pet."""
    answer = names[found.predicted[i]] if names else truth
    said = printable(answer) + (f" {found.probability[i]:.2f}" if names else "")
    said += "" if answer == truth else f", in truth {printable(truth)}"
    times = f"{found.times['model'][i]:.2f} times chance on the pet"
    if "base" in found.times:
        times = f"{found.times['base'][i]:.2f} → {times}"
    return f"{printable(path.name)}\n{said}\n{times}"


def draw_gallery(
    path: Path, sections: Mapping[str, Sequence[tuple[Image.Image, str]]], title: str
) -> None:
    """Draw pictures with captions, section by section."""
    lines = [math.ceil(len(shown) / COLUMNS) for shown in sections.values()]
    heights = [2.3 * n + 0.5 for n in lines]
    figure = Figure((COLUMNS * 4.4, sum(heights) + 0.5), layout="constrained", dpi=100)
    parts = figure.subfigures(len(lines), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, count, (kind, shown) in zip(parts, lines, sections.items()):
        part.suptitle(
            kind + "\n" if shown else f"{kind}: none", x=0.01, ha="left", weight="bold", fontsize=11
        )
        axes = part.subplots(count, COLUMNS, squeeze=False).ravel() if shown else []
        for ax in axes:
            ax.axis("off")
        for ax, (picture, text) in zip(axes, shown):
            show(ax, np.asarray(picture), text, size=8)
    figure.suptitle(title, fontsize=10, parse_math=False)
    save(figure, path)
