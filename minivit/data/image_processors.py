"""Read the settings of an image processor as transformers 5 does.

Files differ in what they leave out, and each class of transformers fills that in its own way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image

from ..errors import UserError

MAX_SIDE = 65_536  # A larger size in a file means that it is broken.
HALF = (0.5, 0.5, 0.5)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Size = tuple[int, int] | int  # (height, width), or the length of the shortest edge


class Steps(NamedTuple):
    """The steps from a photo to a model's input; Preprocess explains them."""

    resize: Size
    crop: tuple[int, int] | None
    resample: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class ImageProcessor:
    """What a class of transformers does where the file says nothing."""

    size: Size = (224, 224)
    crop_size: tuple[int, int] | None = None
    center_crop: bool = False
    resample: int = 3  # Pillow's filters: 2 is bilinear, 3 bicubic
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    number_is_edge: bool = False  # A size of one number is the shortest edge, not a square.


_CLIP = ImageProcessor(
    size=224,
    crop_size=(224, 224),
    center_crop=True,
    mean=CLIP_MEAN,
    std=CLIP_STD,
    number_is_edge=True,
)
CONVNEXT = "ConvNextImageProcessor"
# The classes whose steps Preprocess has. Older files name the same classes with another ending.
IMAGE_PROCESSORS = {
    "ViTImageProcessor": ImageProcessor(resample=2),
    "DeiTImageProcessor": ImageProcessor((256, 256), (224, 224), center_crop=True),
    "BitImageProcessor": _CLIP,
    "CLIPImageProcessor": _CLIP,
    "SiglipImageProcessor": ImageProcessor(number_is_edge=True),
    CONVNEXT: ImageProcessor(384, number_is_edge=True),
}
# transformers' choice for a file that names no class, by the model_type in config.json.
CLASS_OF_MODEL = {"vit": "ViTImageProcessor", "dinov2": "BitImageProcessor"}
# Steps that Preprocess has, and one that only concerns segmentation maps.
KNOWN_STEPS = {
    "do_resize",
    "do_center_crop",
    "do_rescale",
    "do_normalize",
    "do_convert_rgb",
    "do_reduce_labels",
}


def read_steps(settings: Mapping, model_type: str) -> Steps:
    """Read the steps from the content of a preprocessor_config.json.

    Raises UserError for a class and for steps that minivit does not have, and for values that make
    no sense. Its message does not name the file.
    """
    name = _class_name(settings, model_type)
    processor = IMAGE_PROCESSORS[name]
    _refuse_other_steps(settings)
    number_is_edge = not settings.get("default_to_square", not processor.number_is_edge)
    resize = processor.size
    if "size" in settings:
        resize = _read_size("size", settings["size"], number_is_edge)
    crop = None
    if settings.get("do_center_crop", processor.center_crop):
        crop = _read_crop(settings, processor)
    if name == CONVNEXT:
        crop_pct = _number("crop_pct", settings.get("crop_pct", 224 / 256))
        resize, crop = _convnext_sizes(resize, crop, crop_pct)
    _check_crop(resize, crop)
    resample = settings.get("resample", processor.resample)
    if resample not in list(Image.Resampling):
        raise UserError(f"resample is {resample!r}; expected one of Pillow's filters, 0 to 5")
    mean, std = _read_normalization(settings, processor)
    return Steps(resize, crop, int(resample), mean, std)


def _class_name(settings: Mapping, model_type: str) -> str:
    """Return the class that the settings are for, without the endings of other versions."""
    key = "image_processor_type"
    if settings.get(key) is None:
        key = "feature_extractor_type"
    if settings.get(key) is None:
        if model_type not in CLASS_OF_MODEL:
            raise UserError(
                "it names no image_processor_type, and transformers has none for the model_type "
                f"{model_type}; add one of {', '.join(IMAGE_PROCESSORS)}"
            )
        return CLASS_OF_MODEL[model_type]
    name = str(settings[key]).replace("FeatureExtractor", "ImageProcessor")
    name = name.removesuffix("Fast").removesuffix("Pil")
    if name not in IMAGE_PROCESSORS:
        raise UserError(
            f"{key} is {settings[key]!r}; minivit knows only {', '.join(IMAGE_PROCESSORS)}"
        )
    return name


def _refuse_other_steps(settings: Mapping) -> None:
    """Raise UserError for a step that minivit does not have."""
    if not settings.get("do_resize", True):
        raise UserError("do_resize is off; minivit always resizes")
    for key, value in settings.items():
        is_step = key.startswith("do_") or key == "use_square_size"
        if is_step and value and key not in KNOWN_STEPS:
            raise UserError(f"{key} is {value!r}; minivit has no such step")


def _read_size(name: str, value: object, number_is_edge: bool) -> Size:
    """Read a size in any of the forms that transformers has written."""
    if isinstance(value, int) and number_is_edge:
        return _whole(name, value)
    if isinstance(value, int):
        return _whole(name, value), _whole(name, value)
    if isinstance(value, (list, tuple)) and len(value) == 2:
        return _whole(name, value[0]), _whole(name, value[1])
    if isinstance(value, dict) and value.keys() == {"height", "width"}:
        return _whole(name, value["height"]), _whole(name, value["width"])
    if isinstance(value, dict) and value.keys() == {"shortest_edge"}:
        return _whole(name, value["shortest_edge"])
    raise UserError(f"{name} is {value!r}; expected a height and a width, or a shortest_edge")


def _whole(name: str, value: object) -> int:
    if type(value) is not int or not 1 <= value <= MAX_SIDE:
        raise UserError(f"{name} has {value!r}; expected whole numbers from 1 to {MAX_SIDE:,}")
    return value


def _read_crop(settings: Mapping, processor: ImageProcessor) -> tuple[int, int]:
    value = settings.get("crop_size", processor.crop_size)
    if value is None:
        raise UserError("do_center_crop is on, but there is no crop_size")
    crop = _read_size("crop_size", value, number_is_edge=False)
    if not isinstance(crop, tuple):
        raise UserError("crop_size is a shortest_edge; expected a height and a width")
    return crop


def _convnext_sizes(
    size: Size, crop: tuple[int, int] | None, crop_pct: float
) -> tuple[Size, tuple[int, int] | None]:
    """Return what ConvNext's image processor makes of its size.

    It crops away a part of small images, and squashes large ones.
    """
    if isinstance(size, tuple):
        raise UserError(f"size is {size}; the {CONVNEXT} expects a shortest_edge")
    square = (size, size)
    if crop not in (None, square):
        raise UserError(f"the {CONVNEXT} crops twice, to {square} and to {crop}")
    if size >= 384:
        return square, None
    if crop_pct <= 0:
        raise UserError(f"crop_pct is {crop_pct}; expected a positive number")
    return int(size / crop_pct), square


def _check_crop(resize: Size, crop: tuple[int, int] | None) -> None:
    """Raise UserError unless each photo gives an input of one size, without padding."""
    if not isinstance(resize, tuple):
        if crop is None:
            raise UserError(
                f"a shortest edge of {resize} without a centre crop gives no fixed input size"
            )
        if max(crop) > resize:
            raise UserError(f"a crop of {crop} does not fit a shortest edge of {resize}")
    elif crop is not None and (crop[0] > resize[0] or crop[1] > resize[1]):
        raise UserError(f"a crop of {crop} does not fit a size of {resize}")


def _read_normalization(
    settings: Mapping, processor: ImageProcessor
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and std to use after pixels were divided by 255.

    Any rescale_factor is part of them: (factor · x - mean) / std is the same as
    (x / 255 - mean / scale) / (std / scale) with scale = 255 · factor.
    """
    factor = 1.0
    if settings.get("do_rescale", True):
        factor = _number("rescale_factor", settings.get("rescale_factor", 1 / 255))
    scale = 255 * factor
    if not (math.isfinite(scale) and scale > 0):
        raise UserError(f"rescale_factor is {factor}; expected a positive number")
    if math.isclose(scale, 1, rel_tol=1e-9):
        scale = 1.0
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    if settings.get("do_normalize", True):
        mean = _per_channel("image_mean", settings.get("image_mean", processor.mean))
        std = _per_channel("image_std", settings.get("image_std", processor.std))
    return tuple(value / scale for value in mean), tuple(value / scale for value in std)


def _per_channel(name: str, value: object) -> tuple[float, ...]:
    """Return a number for each channel; a single number holds for all three."""
    if isinstance(value, (list, tuple)):
        return tuple(_number(name, number) for number in value)
    return (_number(name, value),) * 3


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{name} has {value!r}; expected a number")
    return float(value)
