"""Drawing an empty room: wallpaper, perhaps a window or a picture, floorboards and a rug."""

from __future__ import annotations

import numpy as np
from numpy.random import Generator
from PIL import Image

from .painting import ZOOM, Colour, Shape, jitter, paint, pick, scale_colour

WALLS = (
    "#d9cfc0",
    "#c3d0d6",
    "#d8c3b8",
    "#bfcdb8",
    "#e3dcc6",
    "#b9b3c6",
    "#cfd3d6",
)
FLOORS = (
    "#a9825a",
    "#8a6f55",
    "#c4a57d",
    "#9a9c9f",
    "#b7a99a",
    "#77706b",
)
# What is seen through a window or in a picture.
VIEWS = (
    "#bfe0f2",
    "#f2cfa8",
    "#34405c",
    "#a7bf9c",
    "#c98f8a",
)
RUGS = (
    "#a3473f",
    "#4a6d8c",
    "#c9b487",
    "#6f7f5c",
    "#8a7aa0",
)
FRAME = "#efebe2"
SKIRTING = "#f1ede4"


def draw_room(rng: Generator, width: int, height: int, floor: float) -> Image.Image:
    """Draw a room in which the floor begins at `floor` pixels from the top.

    Shapes have coordinates in per cent of the room's width and height.
    """
    wall = jitter(rng, pick(rng, WALLS), 10)
    wood = jitter(rng, pick(rng, FLOORS), 10)
    pale_wall = tuple(channel + 9 for channel in wall)
    dark_wood = scale_colour(wood, 0.84)
    horizon = 100 * floor / height
    shapes = _wallpaper(rng, pale_wall, horizon, width / height)
    if rng.random() < 0.6:
        shapes += _window_or_picture(rng, pale_wall, dark_wood)
    shapes.append(("box", scale_colour(wood, 1.06), -5, horizon, 105, 110))
    shapes.append(("poly", wood, 0, horizon, 100, horizon, 100, 100, 0, 100))
    if rng.random() < 0.7:
        # The gaps between floorboards run towards the viewer and spread around the middle.
        for x in np.arange(-20, 121, rng.uniform(9, 16)):
            shapes.append(("line", dark_wood, 0.5, x, horizon, 50 + (x - 50) * 1.9, 100))
    if rng.random() < 0.45:
        rug = jitter(rng, pick(rng, RUGS), 8)
        x = rng.uniform(15, 55)
        shapes.append(("oval", rug, x, horizon + 10, x + 55, horizon + 32))
        inner = scale_colour(rug, 0.85)
        shapes.append(("oval", inner, x + 5, horizon + 12, x + 50, horizon + 30))
    shapes.append(("line", SKIRTING, 2.2, -5, horizon, 105, horizon))
    room = Image.new("RGB", (width * ZOOM, height * ZOOM), wall)
    paint(room, shapes, {})
    return room.resize((width, height), Image.Resampling.BOX)


def _wallpaper(rng: Generator, colour: Colour, horizon: float, aspect: float) -> list[Shape]:
    """Return stripes or dots for the wall above the horizon, or no shapes for a plain wall.

    `aspect` is the room's width / height, which makes the dots round.
    """
    kind = pick(rng, ("plain", "stripes", "dots"))
    step = rng.uniform(5, 12)
    shapes: list[Shape] = []
    if kind == "stripes":
        for x in np.arange(0, 100, step):
            shapes.append(("box", colour, x, -5, x + step / 2, horizon))
    elif kind == "dots":
        for x in np.arange(2, 100, step):
            for y in np.arange(3, horizon, step):
                shapes.append(("oval", colour, x, y, x + 2, y + 2 * aspect))
    return shapes


def _window_or_picture(rng: Generator, pale_wall: Colour, dark_wood: Colour) -> list[Shape]:
    """Return a frame on the wall around a view: a window with bars, or a picture of a mountain."""
    left = rng.uniform(5, 70)
    width = rng.uniform(14, 28)
    top = rng.uniform(4, 14)
    height = rng.uniform(18, 30)
    right = left + width
    bottom = top + height
    view = jitter(rng, pick(rng, VIEWS), 8)
    shapes: list[Shape] = [
        ("box", FRAME, left - 1.5, top - 2, right + 1.5, bottom + 2),
        ("box", view, left, top, right, bottom),
    ]
    if rng.random() < 0.6:  # a window: a vertical and a horizontal bar across the view
        middle = left + width / 2
        centre = top + height / 2
        shapes.append(("line", FRAME, 1.2, middle, top, middle, bottom))
        shapes.append(("line", FRAME, 1.2, left, centre, right, centre))
    else:  # a picture: a mountain, and a sun in the colours of the room
        peak = (left + width / 3, top + height / 3)
        shapes.append(("poly", dark_wood, left, bottom, *peak, right, bottom))
        shapes.append(("oval", pale_wall, left + width * 0.6, top + 2, left + width * 0.8, top + 7))
    return shapes
