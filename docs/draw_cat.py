"""Draw docs/cat.png, the picture whose attention the README shows: python docs/draw_cat.py."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

S = 4  # drawn larger, then reduced: smooth edges
W, H = 640, 480


def ellipse(
    draw: ImageDraw.ImageDraw, x: float, y: float, rx: float, ry: float, colour: str, outline: str | None = None
) -> None:
    draw.ellipse([S * (x - rx), S * (y - ry), S * (x + rx), S * (y + ry)], colour, outline, 3 * S if outline else 0)


def polygon(draw: ImageDraw.ImageDraw, points: list[tuple[float, float]], colour: str) -> None:
    draw.polygon([(S * x, S * y) for x, y in points], colour)


def main() -> None:
    image = Image.new("RGB", (S * W, S * H), "#d9cfc0")
    draw = ImageDraw.Draw(image)
    draw.rectangle([0, S * 340, S * W, S * H], "#a9825a")
    for x in range(0, W, 80):
        draw.line([S * x, S * 340, S * (x - 60), S * H], "#8f6b47", 2 * S)
    draw.rounded_rectangle([S * 60, S * 130, S * 250, S * 370], 12 * S, "#f4f4f2", "#b8b8b4", 3 * S)  # a washing machine
    draw.rectangle([S * 63, S * 165, S * 247, S * 168], "#b8b8b4")
    ellipse(draw, 155, 265, 70, 70, "#c9ccd0", "#8a8d92")
    ellipse(draw, 155, 265, 50, 50, "#39424e")
    ellipse(draw, 140, 250, 18, 14, "#5f6e80")
    for x in (90, 115, 225):
        ellipse(draw, x, 149, 7, 7, "#8a8d92")
    ginger, dark, cream = "#d9853b", "#9c5420", "#f6e3c8"
    draw.arc([S * 480, S * 260, S * 590, S * 430], 250, 110, dark, 20 * S)  # tail
    ellipse(draw, 430, 370, 92, 84, ginger)
    ellipse(draw, 425, 395, 50, 58, cream)
    for i in range(4):
        draw.arc([S * (470 - 8 * i), S * (305 + 26 * i), S * (530 - 4 * i), S * (350 + 26 * i)], 120, 230, dark, 7 * S)
    for x in (395, 455):
        ellipse(draw, x, 447, 27, 15, cream)
    for side in (-1, 1):
        polygon(draw, [(420 + side * 72, 245), (420 + side * 62, 150), (420 + side * 10, 205)], ginger)
        polygon(draw, [(420 + side * 62, 230), (420 + side * 56, 173), (420 + side * 24, 206)], "#e9a9a0")
    ellipse(draw, 420, 255, 80, 68, ginger)
    ellipse(draw, 420, 285, 42, 32, cream)
    for x, lean in ((396, -4), (420, 0), (444, 4)):
        draw.line([S * x, S * 194, S * (x - lean), S * 218], dark, 8 * S)
    for side in (-1, 1):
        ellipse(draw, 420 + side * 32, 248, 17, 18, "#c7d94f")
        ellipse(draw, 420 + side * 32, 248, 6, 16, "#111111")
        ellipse(draw, 420 + side * 32 + 4, 241, 4, 4, "white")
        for dy in (-8, 2, 12):
            draw.line([S * (420 + side * 24), S * (282 + dy / 2), S * (420 + side * 108), S * (274 + dy)], "#fffaf0", S)
    polygon(draw, [(409, 268), (431, 268), (420, 281)], "#c9606b")
    draw.arc([S * 400, S * 274, S * 420, S * 296], 0, 140, "#5b2b1a", 2 * S)
    draw.arc([S * 420, S * 274, S * 440, S * 296], 40, 180, "#5b2b1a", 2 * S)
    small = image.resize((W, H), Image.Resampling.LANCZOS).filter(ImageFilter.GaussianBlur(0.6))
    noise = np.random.default_rng(0).normal(0, 5, (H, W, 1))
    Image.fromarray((np.asarray(small) + noise).clip(0, 255).astype(np.uint8)).save(Path(__file__).with_name("cat.png"))


if __name__ == "__main__":
    main()
