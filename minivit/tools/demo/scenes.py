"""Drawn photos: a room, a household object, and somewhere in it a cat or a dog, with the animal's mask and head box.

All of it is our own drawing, so a demo needs no download and has no licence to mind. scenes.json holds the shapes, each
[kind, colour, coordinates in per cent of the sprite's width and height], painted in order; a colour is a name of the
sprite's palette or a literal. A head's coordinates are per cent of its radius, from its centre. Every drawing follows from
a NumPy generator alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFilter

T = TypeVar("T")
Shape = Sequence  # [kind, colour, numbers…]; a line's first number is its width
PATTERNS = ("plain", "stripes", "spots", "patches", "saddle")  # of coats
PET, BACKGROUND, BORDER = 1, 2, 3  # a mask's values, Oxford-IIIT Pet's
SIZES = ((320, 240), (320, 240), (240, 320), (272, 272))  # W, H
ZOOM = 2  # painted so much larger, then reduced: smooth edges


@dataclass(frozen=True)
class Breed:
    """A cat's or dog's looks: the ears' shape, the coat's pattern, and the colour of each part."""

    species: str  # cat, dog
    ears: str  # pointed, floppy
    pattern: str  # plain, stripes, spots, patches, saddle: in colour `second` on `fur`
    fur: str
    second: str
    face: str  # equal to fur: patterned as well
    ear: str
    muzzle: str
    chest: str
    paw: str
    tail: str
    eye: str


@dataclass(frozen=True)
class Thing:
    """What stands in a room: width / height, height as a share of the room's, main colours, shapes."""

    aspect: float
    height: float
    colours: Sequence[str]
    shapes: Sequence[Shape]

    def draw(self, rng: np.random.Generator, unit: float) -> Image.Image:
        """Draw it in one of its colours ("a", with "b" darker and "c" lighter), a room's height being `unit` pixels."""
        a = _jitter(rng, _pick(rng, self.colours), 9)
        tints = {"a": a, "b": _times(0.76, a), "c": tuple(int(v + 0.35 * (255 - v)) for v in a)}
        w, h = (
            max(2, round(side)) for side in (self.height * unit * self.aspect, self.height * unit)
        )
        sprite = Image.new("RGBA", (w * ZOOM, h * ZOOM))
        _paint(sprite, self.shapes, tints)
        return _round(sprite.resize((w, h), Image.Resampling.BOX), 0.04)


_SHAPES = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))
OBJECTS = {name: Thing(**thing) for name, thing in _SHAPES["objects"].items()}
CLUTTER = [
    Thing(**thing) for thing in _SHAPES["clutter"].values()
]  # in the way of animals, and never named
BREEDS = {name: Breed(**breed) for name, breed in _SHAPES["breeds"].items()}


class Scene(NamedTuple):
    """A drawn photo; its mask (PET, BACKGROUND, BORDER) and the head's box (left, top, right, bottom), None without animal."""

    photo: Image.Image
    mask: Image.Image
    head: tuple[int, int, int, int] | None


def random_breed(rng: np.random.Generator) -> Breed:
    """Return an animal of no breed: parts and colours at random, furs and fantasies alike."""
    mixed = [astuple(_pick(rng, list(BREEDS.values())))[i] for i in range(12)]
    colours = ["#" + bytes(rng.integers(20, 250, 3).tolist()).hex() for _ in range(9)]
    mixed[2] = _pick(rng, PATTERNS)
    return Breed(*mixed[:3], *(c if rng.random() < 0.3 else m for c, m in zip(colours, mixed[3:])))


def draw_scene(
    rng: np.random.Generator,
    thing: str | None,
    breed: Breed | None,
    *,
    size: tuple[int, int] | None = None,
    scale: float = 1,
    animal: tuple[float, float] = (0.34, 0.66),
) -> Scene:
    """Draw a room with one of OBJECTS and an animal (None: without), in a photo of `size` (W, H) times `scale`.

    `animal` is the range of its height, as a share of the photo's shorter side.
    """
    W, H = (round(side * scale) for side in size or _pick(rng, SIZES))
    unit = min(W, H)
    floor = rng.uniform(0.58, 0.74) * H
    photo = _room(rng, W, H, floor)
    if thing:
        sprite = OBJECTS[thing].draw(rng, unit * rng.uniform(0.85, 1.25))
        _stand(
            photo, sprite, rng.uniform(0.15, 0.85) * W, floor + rng.uniform(0.06, 0.4) * (H - floor)
        )
    mask, head = Image.new("L", (W, H)), None
    if breed:
        body, face = _animal(rng, breed, unit * rng.uniform(*animal))
        x, y = rng.uniform(0.22, 0.78) * W, rng.uniform(0.3, 0.98) * (H - floor) + floor
        at = _stand(photo, body, x, y)
        mask.paste(body.getchannel("A"), at)
        box = face.getbbox() or (0, 0, *body.size)
        left, top, right, bottom = (
            int(min(max(v + at[i % 2], 0), (W, H)[i % 2])) for i, v in enumerate(box)
        )
        head = left, top, right, bottom
        if rng.random() < 0.3:  # something in front of the animal
            sprite = _pick(rng, CLUTTER).draw(rng, unit)
            at = _stand(photo, sprite, x + rng.uniform(-0.25, 0.25) * unit, min(y + 0.04 * H, H))
            mask.paste(0, at, sprite.getchannel("A").point(lambda a: 255 * (a > 127)))
    return Scene(_light(rng, photo), _trimap(mask, 2 * scale), head)


def _trimap(alpha: Image.Image, width: float) -> Image.Image:
    """Turn an animal's alpha into a mask whose border is `width` pixels to either side of its outline."""
    edge = alpha.point(lambda a: 255 * (a > 127)).filter(ImageFilter.BoxBlur(width))
    return edge.point(lambda v: {0: BACKGROUND, 255: PET}.get(v, BORDER))


def _pick(rng: np.random.Generator, some: Sequence[T]) -> T:
    return some[int(rng.integers(len(some)))]


def _jitter(rng: np.random.Generator, colour: str, by: float) -> tuple[int, ...]:
    return tuple(int(np.clip(v + rng.normal(0, by), 0, 255)) for v in ImageColor.getrgb(colour))


def _times(factor: float, colour: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(factor * v) for v in colour)


def _paint(
    image: Image.Image, shapes: Sequence[Shape], palette: dict, origin=(0, 0), unit=None
) -> None:
    """Paint shapes on an image, their coordinates in per cent of `unit`, the image's size, from `origin`."""
    draw, unit = ImageDraw.Draw(image), unit or image.size
    for kind, colour, *numbers in shapes:
        fill = palette.get(colour, colour)
        width = numbers.pop(0) if kind == "line" else 0
        xy = [
            (origin[0] + x * unit[0] / 100, origin[1] + y * unit[1] / 100)
            for x, y in zip(numbers[::2], numbers[1::2])
        ]
        if kind == "oval":
            draw.ellipse(xy, fill)
        elif kind == "box":
            draw.rounded_rectangle(xy, 0.12 * min(xy[1][0] - xy[0][0], xy[1][1] - xy[0][1]), fill)
        elif kind == "poly":
            draw.polygon(xy, fill)
        else:
            width = max(1, round(width * unit[1] / 100))
            draw.line(xy, fill, width, joint="curve")
            for x, y in (xy[0], xy[-1]):
                draw.ellipse([x - width / 2, y - width / 2, x + width / 2, y + width / 2], fill)


def _round(sprite: Image.Image, depth: float) -> Image.Image:
    """Darken a sprite towards its edges and its foot, as if it had a body."""
    alpha = sprite.getchannel("A")
    inner = (
        np.asarray(
            alpha.filter(ImageFilter.GaussianBlur(max(1, depth * sprite.height))), np.float32
        )
        / 255
    )
    shade = (0.62 + 0.42 * inner) * np.linspace(1.05, 0.9, sprite.height, dtype=np.float32)[:, None]
    colours = np.asarray(sprite.convert("RGB"), np.float32) * shade[..., None]
    rounded = Image.fromarray(colours.clip(0, 255).astype(np.uint8))
    rounded.putalpha(alpha)
    return rounded


def _animal(
    rng: np.random.Generator, breed: Breed, height: float
) -> tuple[Image.Image, Image.Image]:
    """Draw an animal in some pose: its sprite, and the alpha of its head alone."""
    pose = _pick(rng, list(_SHAPES["poses"].values()))
    x, y, r = pose["head"]
    colours = {k: v for k, v in vars(breed).items() if str(v).startswith("#")}
    palette = {name: _jitter(rng, colour, 5) for name, colour in colours.items()}
    palette |= {"inner": (226, 160, 150), "nose": (190, 96, 104)}
    if breed.face == breed.fur:
        palette["face"] = palette["fur"]
    side = max(24, round(height)) * ZOOM
    body, head = Image.new("RGBA", (side, side)), Image.new("RGBA", (side, side))
    _paint(body, pose["shapes"], palette)
    ears, face, unit = (
        _SHAPES["ears"][breed.ears],
        _SHAPES["faces"][breed.species],
        [r * side / 100] * 2,
    )
    for part in (ears, face) if breed.ears == "pointed" else (face[:1], ears, face[1:]):
        _paint(
            head, part, palette, (x * side / 100 + rng.normal(0, 0.01) * side, y * side / 100), unit
        )
    tilt = rng.uniform(-14, 14)
    head = head.rotate(tilt, center=(x * side / 100, y * side / 100 + unit[1]))
    body.alpha_composite(head)
    _coat(rng, body, breed.pattern, palette)
    stretch, lean, mirror = rng.uniform(0.9, 1.12), rng.uniform(-5, 5), rng.random() < 0.5
    small = (max(12, round(side * stretch / ZOOM)), side // ZOOM)

    def finish(image: Image.Image) -> Image.Image:
        image = image.resize(small, Image.Resampling.BOX).rotate(lean, Image.Resampling.BICUBIC)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else image

    return _round(finish(body), 0.03), finish(head).getchannel("A")


def _coat(rng: np.random.Generator, sprite: Image.Image, pattern: str, palette: dict) -> None:
    """Paint a pattern in the colour "second" on everything of the colour "fur"."""
    side = sprite.width
    marks = Image.new("L", sprite.size)
    draw = ImageDraw.Draw(marks)
    if pattern in ("spots", "patches"):
        for _ in range(70 if pattern == "spots" else 7):
            x, y = rng.uniform(0, side, 2)
            rx, ry = side * (
                rng.uniform(0.012, 0.032, 2) if pattern == "spots" else rng.uniform(0.07, 0.16, 2)
            )
            draw.ellipse([x - rx, y - ry, x + rx, y + ry], 255)
    elif pattern == "stripes":
        for x in np.arange(0, 1.1, 0.075) + rng.uniform(0, 0.075):
            bend = [
                (side * (x + 0.03 * math.sin(9 * t + 5 * x)), side * t)
                for t in np.linspace(0, 1, 12)
            ]
            draw.line(bend, 255, max(1, round(0.028 * side)), joint="curve")
    elif pattern == "saddle":
        draw.ellipse([0.12 * side, 0.2 * side, 1.1 * side, rng.uniform(0.6, 0.72) * side], 255)
    pixels = np.asarray(sprite)
    fur = (pixels[..., :3] == palette["fur"]).all(-1) & (pixels[..., 3] > 0)
    sprite.paste(palette["second"], mask=Image.fromarray((np.asarray(marks) > 0) & fur))


def _stand(photo: Image.Image, sprite: Image.Image, x: float, y: float) -> tuple[int, int]:
    """Put a sprite's foot on (x, y), with its shadow on the floor; return where its top left corner is."""
    w, h = sprite.size
    shadow = Image.new("L", (round(1.3 * w), max(6, round(0.16 * w))))
    ImageDraw.Draw(shadow).ellipse([0.1 * w, 0.02 * w, 1.2 * w, 0.13 * w], 110)
    shadow = shadow.filter(ImageFilter.GaussianBlur(0.02 * w))
    photo.paste((25, 18, 12), (round(x - 0.65 * w), round(y - 0.07 * w)), shadow)
    at = round(x - w / 2), round(y - h)
    photo.paste(sprite, at, sprite)
    return at


def _room(rng: np.random.Generator, W: int, H: int, floor: float) -> Image.Image:
    wall = _jitter(
        rng,
        _pick(rng, ["#d9cfc0", "#c3d0d6", "#d8c3b8", "#bfcdb8", "#e3dcc6", "#b9b3c6", "#cfd3d6"]),
        10,
    )
    wood = _jitter(
        rng, _pick(rng, ["#a9825a", "#8a6f55", "#c4a57d", "#9a9c9f", "#b7a99a", "#77706b"]), 10
    )
    dark, light, faint = _times(0.84, wood), _times(1.06, wood), tuple(v + 9 for v in wall)
    photo, y = Image.new("RGB", (W * ZOOM, H * ZOOM), wall), 100 * floor / H
    shapes: list[Shape] = []
    paper, step = _pick(rng, ("plain", "stripes", "dots")), rng.uniform(5, 12)
    if paper == "stripes":
        shapes += [("box", faint, x, -5, x + step / 2, y) for x in np.arange(0, 100, step)]
    elif paper == "dots":
        shapes += [
            ("oval", faint, x, v, x + 2, v + 2 * W / H)
            for x in np.arange(2, 100, step)
            for v in np.arange(3, y, step)
        ]
    if rng.random() < 0.6:  # a window or a picture
        x, w, t, h = (
            rng.uniform(5, 70),
            rng.uniform(14, 28),
            rng.uniform(4, 14),
            rng.uniform(18, 30),
        )
        sky = _jitter(rng, _pick(rng, ["#bfe0f2", "#f2cfa8", "#34405c", "#a7bf9c", "#c98f8a"]), 8)
        shapes += [
            ("box", "#efebe2", x - 1.5, t - 2, x + w + 1.5, t + h + 2),
            ("box", sky, x, t, x + w, t + h),
        ]
        if rng.random() < 0.6:
            shapes.append(("line", "#efebe2", 1.2, x + w / 2, t, x + w / 2, t + h))
            shapes.append(("line", "#efebe2", 1.2, x, t + h / 2, x + w, t + h / 2))
        else:
            shapes.append(("poly", dark, x, t + h, x + w / 3, t + h / 3, x + w, t + h))
            shapes.append(("oval", faint, x + w * 0.6, t + 2, x + w * 0.8, t + 7))
    shapes += [("box", light, -5, y, 105, 110), ("poly", wood, 0, y, 100, y, 100, 100, 0, 100)]
    if rng.random() < 0.7:
        shapes += [
            ("line", dark, 0.5, x, y, 50 + (x - 50) * 1.9, 100)
            for x in np.arange(-20, 121, rng.uniform(9, 16))
        ]
    if rng.random() < 0.45:
        rug, x = (
            _jitter(rng, _pick(rng, ["#a3473f", "#4a6d8c", "#c9b487", "#6f7f5c", "#8a7aa0"]), 8),
            rng.uniform(15, 55),
        )
        shapes += [
            ("oval", rug, x, y + 10, x + 55, y + 32),
            ("oval", _times(0.85, rug), x + 5, y + 12, x + 50, y + 30),
        ]
    shapes += [("line", "#f1ede4", 2.2, -5, y, 105, y)]
    _paint(photo, shapes, {})
    return photo.resize((W, H), Image.Resampling.BOX)


def _light(rng: np.random.Generator, photo: Image.Image) -> Image.Image:
    """Light a photo from one side, warm or cool, bright or dim, with a camera's softness and noise."""
    W, H = photo.size
    angle, gain = rng.uniform(0, 2 * math.pi), np.float32(rng.uniform(0.72, 1.1))
    y, x = np.linspace(-1, 1, H, dtype=np.float32)[:, None], np.linspace(-1, 1, W, dtype=np.float32)
    field = gain * (1 + 0.16 * (math.cos(angle) * x + math.sin(angle) * y) - 0.1 * (x**2 + y**2))
    tint = 1 + np.array([0.07, 0, -0.07], np.float32) * np.float32(rng.uniform(-1, 1))
    soft = photo.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.9) * max(W, H) / 320))
    noise = rng.standard_normal((H, W, 1), np.float32) * np.float32(rng.uniform(1, 5))
    pixels = np.asarray(soft, np.float32) * field[..., None] * tint + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
