from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from conftest import DINOV2_PREPROCESSOR, draw_photo
from PIL import Image

from minivit import Preprocess, open_photo
from minivit.errors import UserError
from minivit.photos import PhotoError, list_photos

SQUASH, CROP = Preprocess(), Preprocess.from_config(DINOV2_PREPROCESSOR)


def corners(image):
    return [image.getpixel(at) for at in ((2, 2), (-3 + image.width, 2), (2, -3 + image.height))]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(tmp_path, orientation):
    upright = Image.new("RGB", (60, 40), "black")
    upright.paste("red", (0, 0, 20, 20))
    upright.paste("blue", (40, 0, 60, 20))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transposition that a camera so held amounts to
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[274] = orientation
    stored.save(tmp_path / "photo.png", exif=exif)
    photo = open_photo(tmp_path / "photo.png")
    assert photo.size == (60, 40)
    assert corners(photo) == [(255, 0, 0), (0, 0, 255), (0, 0, 0)]


@pytest.mark.parametrize(
    "mode, colour, expected",
    [
        ("L", 100, (100, 100, 100)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 100 * 257, (100, 100, 100)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("LA", (0, 0), (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, colour, expected):
    path = tmp_path / ("photo.tif" if mode == "CMYK" else "photo.png")
    Image.new(mode, (8, 8), colour).save(path)
    photo = open_photo(path)
    assert photo.mode == "RGB"
    assert photo.getpixel((4, 4)) == expected


def test_a_palette_with_a_transparent_colour_is_laid_over_white(tmp_path):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([0, 0, 0] * 256)
    image.save(tmp_path / "photo.png", transparency=0)
    assert open_photo(tmp_path / "photo.png").getpixel((4, 4)) == (255, 255, 255)


def text(path):
    path.write_text("I am not a photo")


def truncated(path):
    draw_photo(300, 200).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:3000])


def bomb(path):
    Image.new("1", (20_000, 6_000)).save(path, "PNG")


BAD_PHOTOS = {
    "absent": (lambda path: None, "no such photo"),
    "text": (text, "not a photo in a known format"),
    "empty": (lambda path: path.write_bytes(b""), "not a photo in a known format"),
    "truncated": (truncated, "truncated"),
    "bomb": (bomb, r"20000 x 6000 pixels, more than the 100,000,000"),
    "folder": (lambda path: path.mkdir(), "not a regular file"),
    "fifo": (lambda path: os.mkfifo(path), "not a regular file"),
    "float": (lambda path: Image.new("F", (4, 4)).save(path, "TIFF"), "floating-point"),
}


@pytest.mark.parametrize("make, message", BAD_PHOTOS.values(), ids=BAD_PHOTOS)
def test_what_is_not_a_whole_photo_is_refused_by_name(tmp_path, make, message):
    make(tmp_path / "photo.jpg")
    with pytest.raises(PhotoError, match=rf"photo\.jpg: .*{message}"):
        open_photo(tmp_path / "photo.jpg")


def test_a_photo_of_another_format_than_its_name_says_is_read(tmp_path):
    draw_photo(20, 20).save(tmp_path / "photo.jpg", "WEBP")
    assert open_photo(tmp_path / "photo.jpg").size == (20, 20)


def test_the_photos_of_a_folder_are_listed_by_name(tmp_path):
    assert list_photos(tmp_path) == []
    for name in ("b.JPG", "a.png", ".hidden.jpg", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in list_photos(tmp_path)] == ["a.png", "b.JPG"]


@pytest.mark.parametrize("size", [(500, 375), (333, 500), (1, 8000), (8000, 3), (1, 1)])
def test_any_shape_becomes_the_models_input(size):
    for preprocess in (SQUASH, CROP):
        image = preprocess(draw_photo(*size))
        assert image.shape == (3, 224, 224)
        assert image.dtype == torch.float32


@pytest.mark.parametrize("preprocess", [SQUASH, CROP], ids=["squash", "crop"])
@pytest.mark.parametrize("size", [(640, 480), (480, 640), (300, 300), (1000, 200)], ids=str)
def test_a_map_lands_on_the_pixels_it_came_from(preprocess, size):
    W, H = size
    left, top, right, bottom = preprocess.box(size)
    photo = Image.new("RGB", size)
    x, y = int(left + (right - left) * 0.7), int(top + (bottom - top) * 0.3)
    photo.paste("white", (x - 12, y - 12, x + 12, y + 12))
    seen = preprocess.pixels(photo).float().mean(0)
    values = torch.nn.functional.avg_pool2d(seen[None], 16)[0]  # a map that marks the white square's patches
    brought_back = preprocess.to_photo(values, size)
    assert brought_back.shape == (H, W)
    found = np.argwhere(brought_back >= np.nanmax(brought_back) - 1e-6).mean(0)
    patch = max((right - left), (bottom - top)) / 14
    assert abs(found[0] - y) <= patch
    assert abs(found[1] - x) <= patch
    inside = ~np.isnan(brought_back)
    assert inside.mean() == pytest.approx((right - left) * (bottom - top) / (W * H), abs=0.01)
    assert inside[y, x]


def test_config_goes_there_and_back():
    for preprocess in (SQUASH, CROP, Preprocess((64, 32), None, 3, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))):
        assert Preprocess.from_config(preprocess.to_config()) == preprocess
    assert Preprocess.from_config({"size": 384}).resize == (384, 384)
    with pytest.raises(UserError, match="does not fit a shortest edge"):
        Preprocess.from_config({"size": {"shortest_edge": 200}, "crop_size": 224})
    with pytest.raises(UserError, match="without a centre crop"):
        Preprocess.from_config({"size": {"shortest_edge": 200}, "do_center_crop": False})


def test_normalizing_undoes_to_the_stated_mean_and_std():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1)
    assert SQUASH.normalize(pixels).flatten().tolist() == pytest.approx([-1, -0.6, 1])
