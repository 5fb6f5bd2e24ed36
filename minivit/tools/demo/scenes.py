"""Drawn photos: a room with a household object and somewhere in it a cat or a dog.

Each comes with the animal's mask and head box. Everything is drawn by our own code, so the demo
needs no download and no licence of others. A drawing follows from its NumPy generator alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

from .animals import Breed, draw_animal
from .painting import (
    SHAPES,
    ZOOM,
    Shape,
    jitter,
    paint,
    pick,
    scale_colour,
    shade,
    to_image,
)
from .rooms import draw_room

PET, BACKGROUND, BORDER = 1, 2, 3  # the values of Oxford-IIIT Pet's masks
SIZES = ((320, 240), (320, 240), (240, 320), (272, 272))  # (W, H) of photos
OPAQUE = 128 * [0] + 128 * [255]  # a table for Image.point: which alpha values count as opaque
SHADOW = (25, 18, 12)


@dataclass(frozen=True)
class Thing:
    """A household object: width / height, height as a fraction of the room's, colours, shapes."""

    aspect: float
    height: float
    colours: Sequence[str]
    shapes: Sequence[Shape]

    def draw(self, rng: Generator, unit: float) -> Image.Image:
        """Draw the thing in one of its colours; a room is `unit` pixels high.

        The shapes call its colour "a", a darker one "b" and a lighter one "c".
        """
        colour = jitter(rng, pick(rng, self.colours), 9)
        lighter = tuple(int(channel + 0.35 * (255 - channel)) for channel in colour)
        palette = {"a": colour, "b": scale_colour(colour, 0.76), "c": lighter}
        height = self.height * unit
        w = max(2, round(height * self.aspect))
        h = max(2, round(height))
        sprite = Image.new("RGBA", (w * ZOOM, h * ZOOM))
        paint(sprite, self.shapes, palette)
        return shade(sprite.resize((w, h), Image.Resampling.BOX), 0.04)


OBJECTS = {name: Thing(**thing) for name, thing in SHAPES["objects"].items()}
# Things that may hide a part of an animal. They are never a photo's label.
CLUTTER = [Thing(**thing) for thing in SHAPES["clutter"].values()]


class Scene(NamedTuple):
    """A drawn photo with its mask (PET, BACKGROUND, BORDER) and its animal's head box."""

    photo: Image.Image
    mask: Image.Image
    head: tuple[int, int, int, int] | None  # left, top, right, bottom; None without an animal


def draw_scene(
    rng: Generator,
    thing: str | None,
    breed: Breed | None,
    *,
    size: tuple[int, int] | None = None,
    scale: float = 1,
    animal: tuple[float, float] = (0.34, 0.66),
) -> Scene:
    """Draw a room with one of OBJECTS and an animal of a breed; None leaves either out.

    The photo is `size` (W, H) times `scale` pixels large, where `size` is by default a random one
    of SIZES. `animal` is the range of its height, as a fraction of the photo's shorter side.
    """
    if size is None:
        size = pick(rng, SIZES)
    W, H = round(size[0] * scale), round(size[1] * scale)
    unit = min(W, H)
    floor = rng.uniform(0.58, 0.74) * H
    photo = draw_room(rng, W, H, floor)
    if thing:
        sprite = OBJECTS[thing].draw(rng, unit * rng.uniform(0.85, 1.25))
        x = rng.uniform(0.15, 0.85) * W
        y = floor + rng.uniform(0.06, 0.4) * (H - floor)
        _stand(photo, sprite, x, y)
    visible = Image.new("L", (W, H))  # the alpha of what the photo shows of the animal
    head = None
    if breed:
        sprite, head_alpha = draw_animal(rng, breed, unit * rng.uniform(*animal))
        x = rng.uniform(0.22, 0.78) * W
        y = floor + rng.uniform(0.3, 0.98) * (H - floor)
        corner = _stand(photo, sprite, x, y)
        visible.paste(sprite.getchannel("A"), corner)
        box = np.array(head_alpha.getbbox()) + np.tile(corner, 2)
        left, top, right, bottom = box.clip(0, (W, H, W, H)).tolist()
        head = (left, top, right, bottom)
        if rng.random() < 0.3:
            sprite = pick(rng, CLUTTER).draw(rng, unit)
            x += rng.uniform(-0.25, 0.25) * unit
            corner = _stand(photo, sprite, x, min(y + 0.04 * H, H))
            visible.paste(0, corner, sprite.getchannel("A").point(OPAQUE))
    return Scene(_light(rng, photo), _trimap(visible, 2 * scale), head)


def _stand(photo: Image.Image, sprite: Image.Image, x: float, y: float) -> tuple[int, int]:
    """Stand a sprite with its foot on (x, y) and its shadow on the floor.

    Returns where the sprite's top left corner is.
    """
    w, h = sprite.size
    shadow = Image.new("L", (round(1.3 * w), max(6, round(0.16 * w))))
    ImageDraw.Draw(shadow).ellipse([0.1 * w, 0.02 * w, 1.2 * w, 0.13 * w], 110)
    shadow = shadow.filter(ImageFilter.GaussianBlur(0.02 * w))
    photo.paste(SHADOW, (round(x - 0.65 * w), round(y - 0.07 * w)), shadow)
    corner = (round(x - w / 2), round(y - h))
    photo.paste(sprite, corner, sprite)
    return corner


def _trimap(alpha: Image.Image, width: float) -> Image.Image:
    """Return an animal's mask, whose border lies `width` pixels to both sides of its outline."""
    blurred = alpha.point(OPAQUE).filter(ImageFilter.BoxBlur(width))
    return blurred.point([BACKGROUND, *(254 * [BORDER]), PET])


def _light(rng: Generator, photo: Image.Image) -> Image.Image:
    """Light a photo from one side, in a warm or a cool tone, and add a camera's blur and noise."""
    W, H = photo.size
    angle = rng.uniform(0, 2 * math.pi)
    brightness = np.float32(rng.uniform(0.72, 1.1))
    y = np.linspace(-1, 1, H, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, W, dtype=np.float32)
    slope = math.cos(angle) * x + math.sin(angle) * y
    light = brightness * (1 + 0.16 * slope - 0.1 * (x**2 + y**2))
    tint = 1 + np.array([0.07, 0, -0.07], np.float32) * np.float32(rng.uniform(-1, 1))
    blurred = photo.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.9) * max(W, H) / 320))
    noise = rng.standard_normal((H, W, 1), np.float32) * np.float32(rng.uniform(1, 5))
    return to_image(np.asarray(blurred, np.float32) * light[..., None] * tint + noise)
