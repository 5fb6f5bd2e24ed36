"""Image processors are read as transformers does, or refused by name."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import DEIT
from conftest import DINOV2_PREPROCESSOR, draw_photo
from torch.testing import assert_close

from minivit import Preprocess, open_photo
from minivit.data.image_processors import CLASS_OF_MODEL, IMAGE_PROCESSORS
from minivit.errors import UserError

# transformers has deprecation warnings of its own.
pytestmark = pytest.mark.filterwarnings("default")
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def of(name: str, **settings) -> dict:
    return {"image_processor_type": name, **settings}


UNDERSTOOD = {
    **{f"{name}, all left out": of(name) for name in IMAGE_PROCESSORS},
    **{f"{name}Fast": of(f"{name}Fast") for name in IMAGE_PROCESSORS},
    "dinov2": DINOV2_PREPROCESSOR,
    "deit": DEIT,
    "ViTFeatureExtractor": {"feature_extractor_type": "ViTFeatureExtractor", "size": 96},
    "CLIPFeatureExtractor with a number": {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "size": 100,
        "crop_size": 96,
    },
    "Bit with a number": of("BitImageProcessor", size=120, crop_size=100, resample=2),
    "Bit without a crop, squashed": of(
        "BitImageProcessor", size={"height": 64, "width": 96}, do_center_crop=False
    ),
    "ViT with two numbers": of("ViTImageProcessor", size=[64, 96]),
    "ViT with a crop": of("ViTImageProcessor", size=120, do_center_crop=True, crop_size=[64, 96]),
    "ViT with a crop of all": of("ViTImageProcessor", size=64, do_center_crop=True, crop_size=64),
    "ViT with default_to_square off": of(
        "ViTImageProcessor", size=80, default_to_square=False, do_center_crop=True, crop_size=64
    ),
    "ViT with crop_pct, which it ignores": of("ViTImageProcessor", size=64, crop_pct=0.5),
    "DeiT with the nulls that transformers 4 wrote": of(
        "DeiTImageProcessorFast", crop_size=None, do_center_crop=None, do_pad=None
    ),
    "a null as the class": {
        "image_processor_type": None,
        "feature_extractor_type": "BitFeatureExtractor",
    },
    "a null as default_to_square": of(
        "DeiTImageProcessor", size=90, default_to_square=None, crop_size=80
    ),
    "ConvNext, small": of("ConvNextImageProcessor", size={"shortest_edge": 97}, crop_pct=0.9),
    "ConvNext, a number": of("ConvNextImageProcessor", size=200),
    "ConvNext, large": of("ConvNextFeatureExtractor", size={"shortest_edge": 400}, crop_pct=0.9)
    | {"image_processor_type": "ConvNextImageProcessor"},
    "not normalized": of("ViTImageProcessor", size=64, do_normalize=False),
    "not rescaled": of("ViTImageProcessor", size=64, do_rescale=False, image_mean=[100] * 3),
    "neither": of("ViTImageProcessor", size=64, do_rescale=False, do_normalize=False),
    "rescaled to 2": of("ViTImageProcessor", size=64, rescale_factor=2 / 255, **IMAGENET),
    "one mean for all": of("ViTImageProcessor", size=64, image_mean=0.4, image_std=0.3),
    "lanczos": of("SiglipImageProcessor", size={"height": 64, "width": 64}, resample=1),
    "no conversion to RGB": of("CLIPImageProcessor", do_convert_rgb=False),
}


@cache
def odd_photos() -> tuple:
    """Photos whose sides leave margins of half pixels, or are smaller than the input."""
    sizes = [(503, 375), (333, 501), (60, 41), (900, 121)]
    return tuple(draw_photo(*size, seed=i) for i, size in enumerate(sizes))


def write(folder: Path, preprocessor: dict, model_type: str = "vit") -> Path:
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def assert_same_pixels(preprocess: Preprocess, folder: Path) -> None:
    """Compare the input of odd photos with what transformers makes of them.

    transformers then computes in another order, so that the last bits of the numbers differ.
    """
    from transformers import AutoImageProcessor

    theirs = AutoImageProcessor.from_pretrained(folder, backend="pil")
    for photo in odd_photos():
        expected = torch.as_tensor(np.array(theirs(photo)["pixel_values"][0])).float()
        found = preprocess(photo)
        size = max(1.0, expected.abs().max().item())
        assert_close(found, expected, rtol=0, atol=1e-5 * size)  # a level of 255 is 4e-3


@pytest.mark.parametrize("preprocessor", UNDERSTOOD.values(), ids=UNDERSTOOD)
def test_pixels_are_those_of_transformers_pillow_processors(preprocessor, tmp_path):
    preprocess = Preprocess.from_config(preprocessor)
    assert_same_pixels(preprocess, write(tmp_path, preprocessor))
    written = preprocess.to_config()
    assert_same_pixels(preprocess, write(tmp_path, written))
    assert Preprocess.from_config(json.loads(json.dumps(written))) == preprocess


@pytest.mark.parametrize("model_type", CLASS_OF_MODEL)
def test_a_file_without_a_class_is_read_by_the_model_type(model_type, tmp_path):
    preprocess = Preprocess.from_config({"resample": 2}, model_type)
    assert_same_pixels(preprocess, write(tmp_path, {"resample": 2}, model_type))


def test_transformers_has_no_class_for_registers_and_neither_do_we(tmp_path):
    from transformers import AutoImageProcessor

    kind = "dinov2_with_registers"
    with pytest.raises(ValueError, match="Unrecognized image processor"):
        AutoImageProcessor.from_pretrained(write(tmp_path, {"size": 64}, kind))
    with pytest.raises(UserError, match=f"none for the model_type {kind}; add one of ViTImage"):
        Preprocess.from_config({"size": 64}, kind)


REFUSED = {
    "another class": (of("MobileViTImageProcessor"), "is 'MobileViTImageProcessor'; minivit knows"),
    "a class of ours in another case": (of("vitimageprocessor"), "is 'vitimageprocessor'"),
    "DINOv3's class": (of("DINOv3ViTImageProcessorFast"), "DINOv3"),
    "no resize": (of("ViTImageProcessor", do_resize=False), "do_resize is off"),
    "flipped channels": (
        of("ViTImageProcessor", do_flip_channel_order=True),
        "do_flip_channel_order is True; minivit has no such step",
    ),
    "padding": (of("ViTImageProcessor", do_pad=True), "do_pad is True"),
    "Kosmos' square": (of("CLIPImageProcessor", use_square_size=True), "use_square_size"),
    "an edge without a crop": (
        of("ViTImageProcessor", size={"shortest_edge": 64}),
        "without a centre crop",
    ),
    "Siglip with a number": (of("SiglipImageProcessor", size=64), "without a centre crop"),
    "two edges": (
        of("BitImageProcessor", size={"shortest_edge": 64, "longest_edge": 100}),
        "expected a height and a width, or a shortest_edge",
    ),
    "a crop of no size": (of("ViTImageProcessor", do_center_crop=True), "there is no crop_size"),
    "an edge as a crop": (
        of("BitImageProcessor", crop_size={"shortest_edge": 64}),
        "crop_size is a shortest_edge",
    ),
    "a crop that needs padding": (
        of("BitImageProcessor", size=200),
        r"crop of \(224, 224\) does not fit a shortest edge of 200",
    ),
    "ConvNext with two sides": (
        of("ConvNextImageProcessor", size={"height": 64, "width": 64}),
        "expects a shortest_edge",
    ),
    "ConvNext that crops twice": (
        of("ConvNextImageProcessor", size=224, do_center_crop=True, crop_size=200),
        "crops twice",
    ),
    "a null as the size": (of("ViTImageProcessor", size=None), "size is None"),
    "a null as the mean": (of("ViTImageProcessor", image_mean=None), "image_mean has None"),
    "a null as the filter": (of("ViTImageProcessor", resample=None), "resample is None"),
    "resizing null": (of("ViTImageProcessor", do_resize=None), "do_resize is off"),
    "a size of 0": (of("ViTImageProcessor", size=0), "size has 0; expected whole numbers from 1"),
    "a size as text": (of("ViTImageProcessor", size="224"), "size is '224'"),
    "a huge edge": (of("BitImageProcessor", size=10**9), "whole numbers from 1 to 65,536"),
    "a factor of 0": (of("ViTImageProcessor", rescale_factor=0), "expected a positive number"),
    "another filter": (of("ViTImageProcessor", resample=9), "one of Pillow's filters"),
}


@pytest.mark.parametrize("preprocessor, message", REFUSED.values(), ids=REFUSED)
def test_what_no_step_of_ours_does_is_refused_by_name(preprocessor, message):
    with pytest.raises(UserError, match=message):
        Preprocess.from_config(preprocessor)


@pytest.mark.parametrize("name", IMAGE_PROCESSORS)
@pytest.mark.parametrize("ending", ["", "Pil"])
def test_what_transformers_writes_is_read_as_its_class(name, ending, tmp_path):
    import transformers

    (path,) = getattr(transformers, name + ending)().save_pretrained(tmp_path)
    assert Path(path).name == "preprocessor_config.json"
    written = Preprocess.from_config(json.loads(Path(path).read_text()))
    assert written == Preprocess.from_config(of(name))


def test_the_defaults_of_each_class_are_those_of_transformers():
    import transformers

    for name, ours in IMAGE_PROCESSORS.items():
        theirs = getattr(transformers, name + "Pil")()
        size = dict(theirs.size)
        assert ours.size in (size.get("shortest_edge"), tuple(size.values())), name
        crop = None if theirs.crop_size is None else tuple(dict(theirs.crop_size).values())
        assert (ours.crop_size, ours.center_crop) == (crop, bool(theirs.do_center_crop)), name
        assert (ours.mean, ours.std) == (theirs.image_mean, theirs.image_std), name
        assert ours.resample == theirs.resample, name
        assert ours.number_is_edge is not theirs.default_to_square, name
        assert theirs.do_resize and theirs.do_rescale and theirs.do_normalize, name
        assert not theirs.do_pad, name
        if hasattr(theirs, "crop_pct"):
            assert theirs.crop_pct == 224 / 256


def test_a_photo_from_a_file_has_the_pixels_of_transformers(photos, tmp_path):
    from transformers import AutoImageProcessor

    theirs = AutoImageProcessor.from_pretrained(write(tmp_path, of("BitImageProcessor")))
    preprocess = Preprocess.from_config(of("BitImageProcessor"))
    for path in photos:
        photo = open_photo(path)
        expected = theirs(photo, return_tensors="pt")["pixel_values"][0]
        # torchvision's filter, transformers' default, rounds to other levels here and there.
        levels = (preprocess(photo) - expected).abs() * 255 * 0.27
        assert levels.max() <= 2.5
