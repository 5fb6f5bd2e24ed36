"""Painting shapes on images: what the drawings of rooms, things and animals have in common.

scenes.json holds the shapes. Each one is [kind, colour, number, ...]: the kind is "oval", "box",
"poly" or "line", and the numbers are coordinates x, y, x, y, ... in per cent of the image's width
and height. A line has its thickness before the coordinates. A colour is either a name in the
palette or a literal such as "#d9722c". Shapes are painted in their order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageColor, ImageDraw, ImageFilter

T = TypeVar("T")
Shape = Sequence
Colour = tuple[int, ...]
Palette = Mapping[str, Colour]

SHAPES = json.loads(Path(__file__).with_name("scenes.json").read_text("utf-8"))
# Sprites are painted at twice their size and then reduced, which gives smooth edges.
ZOOM = 2


def pick(rng: Generator, choices: Sequence[T]) -> T:
    """Return one of the choices, all equally likely."""
    return choices[int(rng.integers(len(choices)))]


def jitter(rng: Generator, colour: str, deviation: float) -> Colour:
    """Return a colour near the given one: each channel varies with this standard deviation."""
    channels = np.add(ImageColor.getrgb(colour), rng.normal(0, deviation, 3))
    return tuple(channels.clip(0, 255).astype(int).tolist())


def scale_colour(colour: Colour, factor: float) -> Colour:
    """Return a darker (factor < 1) or lighter (factor > 1) colour."""
    return tuple(int(factor * channel) for channel in colour)


def to_image(pixels: np.ndarray) -> Image.Image:
    """Return an image of float pixels (h, w, 3), cut off at 0 and 255."""
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def paint(
    image: Image.Image,
    shapes: Sequence[Shape],
    palette: Palette,
    origin: tuple[float, float] = (0, 0),
    unit: tuple[float, float] | None = None,
) -> None:
    """Paint shapes on an image.

    Coordinates count from `origin`, in per cent of `unit` (width, height), by default the image's.
    """
    draw = ImageDraw.Draw(image)
    if unit is None:
        unit = image.size
    for kind, colour, *numbers in shapes:
        fill = palette.get(colour, colour)
        thickness = 0.0
        if kind == "line":
            thickness = numbers.pop(0)
        points = []
        for x, y in zip(numbers[::2], numbers[1::2]):
            points.append((origin[0] + x * unit[0] / 100, origin[1] + y * unit[1] / 100))
        if kind == "oval":
            draw.ellipse(points, fill)
        elif kind == "box":
            (left, top), (right, bottom) = points
            draw.rounded_rectangle(points, 0.12 * min(right - left, bottom - top), fill)
        elif kind == "poly":
            draw.polygon(points, fill)
        else:
            _paint_line(draw, points, fill, max(1, round(thickness * unit[1] / 100)))


def _paint_line(
    draw: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]], fill: Colour, width: int
) -> None:
    """Paint a line with round ends."""
    draw.line(points, fill, width, joint="curve")
    radius = width / 2
    for x, y in (points[0], points[-1]):
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill)


def shade(sprite: Image.Image, depth: float) -> Image.Image:
    """Darken a sprite towards its outline and its foot, so that it looks solid.

    `depth` is how far the dark outline reaches inwards, as a fraction of the sprite's height.
    """
    alpha = sprite.getchannel("A")
    blurred = alpha.filter(ImageFilter.GaussianBlur(max(1, depth * sprite.height)))
    inside = np.asarray(blurred, np.float32) / 255
    downwards = np.linspace(1.05, 0.9, sprite.height, dtype=np.float32)
    light = (0.62 + 0.42 * inside) * downwards[:, None]
    shaded = to_image(np.asarray(sprite.convert("RGB"), np.float32) * light[..., None])
    shaded.putalpha(alpha)
    return shaded
