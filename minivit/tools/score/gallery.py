"""The gallery: the scored photos that are most worth a look, as a picture and as an HTML page.

File names and class names are untrusted data. The page, whose frame is gallery.html, has no script,
loads nothing, and shows names as text.
"""

from __future__ import annotations

import html
import itertools
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from ...data.photos import open_photo
from ...data.preprocess import Preprocess
from ...errors import printable
from ...figures.canvas import Canvas, fit, text_height, wrap
from ...figures.pages import data_url, encode_jpeg, write_page
from ...figures.panels import HEAT, overlay, value_range
from .masks import PET, read_mask
from .measure import Measured

LONGER_SIDE = 240  # of each panel in a strip, in pixels
GAP = 4  # between the panels of a strip, in pixels
MOST_COLUMNS = 3  # of strips in gallery.png
# Measures of gallery.png, in pixels, and of its texts, in points.
COLUMN = 440
MARGIN = 12
TITLE, HEADING, CAPTION = 9, 10, 8
CHARACTER = 7  # the width of an average one of the title


class CaptionedStrip(NamedTuple):
    image: Image.Image
    caption: str


def choose_photos(measured: Measured, right: np.ndarray | None, count: int) -> dict[str, list[int]]:
    """Return the rows of up to `count` photos of each kind, the most telling photos first.

    `right` (n,) says whether each prediction is right; without it, there are no such kinds.
    """
    times_chance = measured.times_chance["model"]

    def pick(sort_key: np.ndarray, allowed: np.ndarray) -> list[int]:
        """Return the rows of up to `count` allowed photos, those of the lowest key first."""
        sorted_rows = np.argsort(sort_key, kind="stable")
        is_allowed = allowed[sorted_rows]
        return sorted_rows[is_allowed][:count].tolist()

    kinds = {}
    if right is not None:
        kinds["wrong and confident"] = pick(-measured.probability, ~right)
        kinds["right, but looking elsewhere (below chance)"] = pick(
            times_chance, right & (times_chance < 1)
        )
    if "base" in measured.times_chance:
        change = times_chance - measured.times_chance["base"]
        kinds["most improved by fine-tuning"] = pick(-change, change > 0)
        kinds["most worsened by fine-tuning"] = pick(change, change < 0)
    return kinds


def photo_captions(
    measured: Measured,
    paths: Sequence[Path],
    true_names: Sequence[str],
    predicted_names: Sequence[str] | None,
) -> list[str]:
    """Return three lines about each photo: its file, its prediction, the attention on the pet."""
    captions = []
    for row, (path, true_name) in enumerate(zip(paths, true_names)):
        answer = printable(true_name)
        if predicted_names is not None:
            predicted_name = predicted_names[row]
            answer = f"{printable(predicted_name)} {measured.probability[row]:.2f}"
            if predicted_name != true_name:
                answer += f" (true: {printable(true_name)})"
        looks = f"{measured.times_chance['model'][row]:.2f} times chance on the pet"
        if "base" in measured.times_chance:
            looks = f"{measured.times_chance['base'][row]:.2f} → {looks}"
        captions.append(f"{printable(path.name)}\n{answer}\n{looks}")
    return captions


def write_gallery(
    out: Path,
    kinds: Mapping[str, Sequence[int]],
    measured: Measured,
    paths: Sequence[Path],
    captions: Sequence[str],
    preprocess: Preprocess,
    block: int,
) -> None:
    """Write gallery.png and gallery.html into `out`, with a strip for each photo of each kind.

    `kinds` has the rows of photos as choose_photos returns them. `paths` and `captions` are those
    of all n photos. `block` is the block whose maps were measured.
    """
    models = [model for model in ("base", "model") if model in measured.maps]
    sections: dict[str, list[CaptionedStrip]] = {}
    for kind, rows in kinds.items():
        sections[kind] = []
        for row in rows:
            maps = [measured.maps[model][row] for model in models]
            strip = draw_strip(paths[row], maps, preprocess)
            sections[kind].append(CaptionedStrip(strip, captions[row]))
    explanation = (
        f"Each strip shows the photo with the pet outlined, then where block {block} looks"
    )
    if "base" in models:
        explanation += " before and after fine-tuning"
    explanation += ".\nThe brighter, the more attention (mean of the heads)."
    if preprocess.crop:
        explanation += " Pale areas are outside of what the model sees."
    write_sections(out, sections, explanation)


def write_sections(
    out: Path, sections: Mapping[str, Sequence[CaptionedStrip]], explanation: str
) -> None:
    """Write gallery.png and gallery.html into `out`, with a section for each kind of photo."""
    draw_gallery(out / "gallery.png", sections, explanation)
    write_page(out / "gallery.html", gallery_page(sections, explanation))


def draw_strip(path: Path, maps: Sequence[np.ndarray], preprocess: Preprocess) -> Image.Image:
    """Return a small photo and, beside it, each map (gh, gw) over it; all with the pet outlined."""
    photo = open_photo(path)
    scale = LONGER_SIDE / max(photo.size)
    w, h = (max(1, round(side * scale)) for side in photo.size)
    small = photo.resize((w, h))
    panels = [np.array(small)]
    for values in maps:
        heat = preprocess.to_photo(values, photo.size, (h, w))
        low, high = value_range([heat])
        panels.append(overlay(panels[0], heat, low, high, HEAT))

    is_pet = (read_mask(path, photo.size) == PET).astype(np.uint8)
    mask = Image.fromarray(is_pet).resize((w, h), Image.Resampling.NEAREST)
    inner_edge = np.asarray(mask) != np.asarray(mask.filter(ImageFilter.MinFilter(3)))
    outer_edge = np.asarray(mask) != np.asarray(mask.filter(ImageFilter.MaxFilter(3)))
    strip = Image.new("RGB", (len(panels) * (w + GAP) - GAP, h), "white")
    for i, panel in enumerate(panels):
        # A white line beside a black one can be seen on any photo.
        panel[inner_edge] = 255
        panel[outer_edge] = 0
        strip.paste(Image.fromarray(panel), (i * (w + GAP), 0))
    return strip


def gallery_page(sections: Mapping[str, Sequence[CaptionedStrip]], explanation: str) -> str:
    """Return gallery.html with its strips, each as a JPEG in the page itself."""
    lines = []
    for kind, strips in sections.items():
        none = "" if strips else ": none"
        lines += [f"<h2>{html.escape(kind)}{none}</h2>", "<section>"]
        for strip in strips:
            source = data_url(encode_jpeg(strip.image, quality=85))
            caption = html.escape(strip.caption)
            lines.append(
                f'<figure><img src="{source}" alt="{caption}">'
                f"<figcaption>{caption}</figcaption></figure>"
            )
        lines.append("</section>")
    frame = Path(__file__).with_name("gallery.html").read_text(encoding="utf-8")
    return string.Template(frame).substitute(
        explanation=html.escape(explanation), sections="\n".join(lines)
    )


def draw_gallery(path: Path, sections: Mapping[str, Sequence[CaptionedStrip]], title: str) -> str:
    """Draw the strips with their captions, section by section; return what Canvas.save returns."""
    # The title needs two columns.
    num_columns = min(max(2, *map(len, sections.values())), MOST_COLUMNS)
    width = num_columns * COLUMN + MARGIN
    lines = [
        wrap(line, width - 2 * MARGIN, TITLE, width // CHARACTER) for line in title.split("\n")
    ]
    title = "\n".join(itertools.chain(*lines))

    # Where things go, from top to bottom, and thereby how high the canvas is.
    y = MARGIN + text_height(title, TITLE)
    headings: list[tuple[int, str]] = []  # with their tops
    cells: list[tuple[int, int, CaptionedStrip]] = []  # left, the top of the image, the strip
    for kind, strips in sections.items():
        y += MARGIN
        headings.append((y, kind if strips else f"{kind}: none"))
        y += text_height(kind, HEADING) + MARGIN
        for start in range(0, len(strips), num_columns):
            row = [_shrink(strip) for strip in strips[start : start + num_columns]]
            y += max(text_height(strip.caption, CAPTION) for strip in row) + GAP
            cells += [(MARGIN + i * COLUMN, y, strip) for i, strip in enumerate(row)]
            y += max(strip.image.height for strip in row) + MARGIN

    canvas = Canvas(width, y)
    canvas.write(width / 2, MARGIN, title, TITLE, align="center")
    for top, heading in headings:
        canvas.write(MARGIN, top, heading, HEADING, bold=True)
    for left, top, strip in cells:
        canvas.paste(np.asarray(strip.image), left, top)
        caption_top = top - GAP - text_height(strip.caption, CAPTION)
        canvas.write(left, caption_top, strip.caption, CAPTION)
    return canvas.save(path)


def _shrink(strip: CaptionedStrip) -> CaptionedStrip:
    """Make a strip no wider than a column, and break the lines of its caption that are."""
    room = COLUMN - MARGIN
    image = strip.image.copy()
    image.thumbnail((room, image.height), Image.Resampling.LANCZOS)
    lines: list[str] = []
    for line in strip.caption.split("\n"):
        # Three names of breeds take two lines. A hostile name takes no more than three.
        lines += wrap(fit(line, 2 * room, CAPTION), room, CAPTION, room // CHARACTER)
    return CaptionedStrip(image, "\n".join(lines))
