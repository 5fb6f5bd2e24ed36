"""Drawing a cat or a dog.

A breed gives it ears, colours and the pattern of its coat; its pose is random.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from .painting import SHAPES, ZOOM, Colour, Palette, jitter, paint, pick, shade

# The parts that have a colour in a breed.
PARTS = (
    "fur",
    "second",
    "face",
    "ear",
    "muzzle",
    "chest",
    "paw",
    "tail",
    "eye",
)
# Patterns made of blobs: their number, and their smallest and largest radius as fractions of the
# sprite's side.
BLOBS = {
    "spots": (70, 0.012, 0.032),
    "patches": (7, 0.07, 0.16),
}


@dataclass(frozen=True)
class Breed:
    """What a cat or dog looks like: its ears, its coat's pattern, and the colour of each part."""

    species: str  # cat or dog
    ears: str  # pointed or floppy
    pattern: str  # plain, stripes, spots, patches or saddle: painted on the fur
    fur: str
    second: str  # the colour of the pattern
    face: str  # Where it equals `fur`, the face has the pattern too.
    ear: str
    muzzle: str
    chest: str
    paw: str
    tail: str
    eye: str


BREEDS = {name: Breed(**breed) for name, breed in SHAPES["breeds"].items()}


def draw_animal(rng: Generator, breed: Breed, height: float) -> tuple[Image.Image, Image.Image]:
    """Draw an animal of about this height in a random pose.

    Returns the sprite (RGBA), and the alpha channel of its head alone, of the same size.
    """
    pose = pick(rng, list(SHAPES["poses"].values()))
    palette = _draw_colours(rng, breed)
    side = max(24, round(height)) * ZOOM
    body = Image.new("RGBA", (side, side))
    paint(body, pose["shapes"], palette)
    head = _draw_head(rng, breed, palette, pose["head"], side)
    body.alpha_composite(head)
    _paint_coat(rng, body, breed.pattern, palette)

    stretch = rng.uniform(0.9, 1.12)
    lean = rng.uniform(-5, 5)
    mirrored = rng.random() < 0.5
    size = (max(12, round(side * stretch / ZOOM)), side // ZOOM)
    posed = []
    for image in (body, head):
        image = image.resize(size, Image.Resampling.BOX).rotate(lean, Image.Resampling.BICUBIC)
        if mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        posed.append(image)
    return shade(posed[0], 0.03), posed[1].getchannel("A")


def _draw_colours(rng: Generator, breed: Breed) -> Palette:
    """Return the palette of one animal, whose colours differ a little from its breed's."""
    palette: dict[str, Colour] = {
        "inner": (226, 160, 150),  # the inside of an ear
        "nose": (190, 96, 104),
    }
    for part in PARTS:
        palette[part] = jitter(rng, getattr(breed, part), 5)
    if breed.face == breed.fur:
        palette["face"] = palette["fur"]
    return palette


def _draw_head(
    rng: Generator,
    breed: Breed,
    palette: Palette,
    place: tuple[float, float, float],
    side: int,
) -> Image.Image:
    """Draw a tilted head on an empty sprite.

    `place` is the head's centre and its radius, in per cent of the sprite's side. The coordinates
    of ears and faces are in per cent of that radius, from that centre.
    """
    x, y, radius = (value * side / 100 for value in place)
    ears = SHAPES["ears"][breed.ears]
    face = SHAPES["faces"][breed.species]
    layers = [ears, face]
    if breed.ears == "floppy":
        # They hang over the face's first shape, which is its outline.
        layers = [face[:1], ears, face[1:]]
    head = Image.new("RGBA", (side, side))
    for shapes in layers:
        paint(head, shapes, palette, (x + rng.normal(0, 0.01) * side, y), (radius, radius))
    return head.rotate(rng.uniform(-14, 14), center=(x, y + radius))


def _paint_coat(rng: Generator, sprite: Image.Image, pattern: str, palette: Palette) -> None:
    """Paint a pattern in the palette's second colour on everything that has the colour of fur."""
    side = sprite.width
    marks = Image.new("L", sprite.size)
    draw = ImageDraw.Draw(marks)
    if pattern in BLOBS:
        count, smallest, largest = BLOBS[pattern]
        for _ in range(count):
            x, y = rng.uniform(0, side, 2)
            rx, ry = side * rng.uniform(smallest, largest, 2)
            draw.ellipse([x - rx, y - ry, x + rx, y + ry], 255)
    elif pattern == "stripes":
        for x in np.arange(0, 1.1, 0.075) + rng.uniform(0, 0.075):
            wave = []
            for y in np.linspace(0, 1, 12):
                wave.append((side * (x + 0.03 * math.sin(9 * y + 5 * x)), side * y))
            draw.line(wave, 255, max(1, round(0.028 * side)), joint="curve")
    elif pattern == "saddle":
        bottom = rng.uniform(0.6, 0.72) * side
        draw.ellipse([0.12 * side, 0.2 * side, 1.1 * side, bottom], 255)
    pixels = np.asarray(sprite)
    fur = (pixels[..., :3] == palette["fur"]).all(-1) & (pixels[..., 3] > 0)
    sprite.paste(palette["second"], mask=Image.fromarray((np.asarray(marks) > 0) & fur))
