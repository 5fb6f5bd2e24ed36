"""Turn photos into a model's input, and bring maps back onto photos.

A checkpoint's preprocessor_config.json says how. torch is imported only where it is needed, so
that worker processes can decode photos without it.
Shapes: h, w pixels of the model's input; gh, gw patches of a map; W, H a photo's width and height
in pixels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ..errors import UserError
from .image_processors import read_steps
from .photos import PhotoError, open_photo

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Preprocess:
    """The steps from a photo to a model's input: resize, perhaps crop, and normalize.

    `resize` is either (h, w), to which the whole photo is squashed, or the length of the shortest
    edge. If `crop` (h, w) is given, the centre of the resized photo is taken (after squashing, in
    the case of DeiT). Resizing is antialiased with Pillow's filter `resample` (2 bilinear,
    3 bicubic). If the crop's margins are not whole numbers of pixels, transformers rounds them
    down; torchvision and timm round them to the nearest, which is `round_margins`.
    """

    resize: tuple[int, int] | int = (224, 224)
    crop: tuple[int, int] | None = None
    resample: int = 2
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # of each channel
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    round_margins: bool = False

    def __post_init__(self) -> None:
        if self.crop is None and not isinstance(self.resize, tuple):
            raise UserError("a shortest edge without a centre crop gives no fixed input size")
        three_each = len(self.mean) == len(self.std) == 3
        if (
            not three_each
            or not all(map(math.isfinite, self.mean + self.std))
            or min(self.std) <= 0
        ):
            raise UserError(
                f"mean {self.mean} and std {self.std} of the pixels: expected three numbers each, "
                "and a std above 0"
            )

    @property
    def size(self) -> tuple[int, int]:
        """The model's input (h, w) in pixels."""
        if self.crop is not None:
            return self.crop
        assert isinstance(self.resize, tuple)  # __post_init__ requires a crop with a shortest edge.
        return self.resize

    def __call__(self, photo: Image.Image) -> Tensor:
        """Return one photo as a model's input, float32 (3, h, w); stack several for a batch."""
        return self.normalize(self.pixels(photo))

    def pixels(self, photo: Image.Image) -> Tensor:
        """Return the photo resized and cropped, uint8 (3, h, w)."""
        import torch

        return torch.from_numpy(self.array(photo))

    def array(self, photo: Image.Image) -> np.ndarray:
        """Return the same pixels as a NumPy array, for processes without torch."""
        h, w = self.size
        resample = Image.Resampling(self.resample)
        if self.crop is None or max(photo.size) > 20 * min(photo.size):
            # Resize only what the model sees: the long edge of a resized strip takes gigabytes.
            resized = photo.resize((w, h), resample, box=self.box(photo.size))
        else:
            # Resize and crop in two steps, as transformers does, to round in the same places.
            left, top, resized_w, resized_h = self._crop_of_resized(photo.size)
            resized = photo.resize((resized_w, resized_h), resample)
            resized = resized.crop((left, top, left + w, top + h))
        return np.array(resized).transpose(2, 0, 1).copy()

    def normalize(self, pixels: Tensor) -> Tensor:
        """Scale pixels (..., 3, h, w) from 0..255 to float32 with the checkpoint's mean and std."""
        mean = _channels(self.mean, pixels.device)
        std = _channels(self.std, pixels.device)
        # On a CPU, the memory for another tensor would take longer than the numbers.
        images = pixels / 255
        images -= mean
        images /= std
        return images

    def box(self, photo_size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Return the part of a photo (W, H) that the model sees.

        It is given as left, top, right and bottom, in the photo's pixels.
        """
        W, H = photo_size
        if self.crop is None:
            return 0, 0, W, H
        h, w = self.crop
        left, top, resized_w, resized_h = self._crop_of_resized(photo_size)
        x = W / resized_w
        y = H / resized_h
        return left * x, top * y, min((left + w) * x, W), min((top + h) * y, H)

    def patch_at(
        self, x: float, y: float, photo_size: tuple[int, int], grid: tuple[int, int]
    ) -> int:
        """Return which of gh x gw patches, counted row by row, covers a photo's pixel (x, y).

        Raises UserError for a pixel that the model does not see because it lies outside the photo
        (W, H) or was cropped away.
        """
        left, top, right, bottom = self.box(photo_size)
        if not (left <= x < right and top <= y < bottom):
            W, H = photo_size
            raise UserError(
                f"no patch at {x:g},{y:g}: of {W} x {H} pixels, the model sees "
                f"x from {left:.0f} to {right:.0f} and y from {top:.0f} to {bottom:.0f}"
            )
        gh, gw = grid
        row = int((y - top) / (bottom - top) * gh)
        column = int((x - left) / (right - left) * gw)
        return min(row, gh - 1) * gw + min(column, gw - 1)

    def _crop_of_resized(self, photo_size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Return the crop's left and top in the resized photo, and that photo's size (w, h)."""
        if isinstance(self.resize, tuple):
            resized_h, resized_w = self.resize
        else:
            # Like transformers, round down.
            W, H = photo_size
            resized_w = int(self.resize * W / min(W, H))
            resized_h = int(self.resize * H / min(W, H))
        h, w = self.size
        round_margin = round if self.round_margins else math.floor
        left = round_margin((resized_w - w) / 2)
        top = round_margin((resized_h - h) / 2)
        return left, top, resized_w, resized_h

    def to_photo(
        self,
        values: Tensor | np.ndarray,
        photo_size: tuple[int, int],
        shape: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """Bring a map (gh, gw) back onto a photo of (W, H) pixels: float32 (H, W), upsampled.

        The result is NaN where the photo was cropped away. To draw the whole photo at another
        resolution, give its `shape` (rows, columns).
        """
        if not isinstance(values, np.ndarray):
            values = values.detach().float().cpu().numpy()
        W, H = photo_size
        rows, columns = (H, W) if shape is None else shape
        left, top, right, bottom = self.box(photo_size)
        # The centres of the pixels, where 0 and 1 are the edges of what the model sees.
        x = ((np.arange(columns) + 0.5) * W / columns - left) / (right - left)
        y = ((np.arange(rows) + 0.5) * H / rows - top) / (bottom - top)
        sampled = _sample_rows(_sample_rows(values.T, x).T, y)
        sampled = sampled.clip(values.min(), values.max())  # Bicubic may overshoot.
        sampled[(y < 0) | (y > 1)] = np.nan
        sampled[:, (x < 0) | (x > 1)] = np.nan
        return sampled

    def at(self, size: tuple[int, int]) -> Preprocess:
        """Return the same steps for another input size (h, w).

        The same fraction of the photo is cropped away; for a shortest edge, this holds for the side
        that grows most.
        """
        if self.crop is None:
            return replace(self, resize=size)
        h, w = size
        crop_h, crop_w = self.crop
        if isinstance(self.resize, tuple):
            resize_h, resize_w = self.resize
            resize = int(resize_h * h / crop_h), int(resize_w * w / crop_w)
            return replace(self, resize=resize, crop=size)
        scale = max(h / crop_h, w / crop_w)
        return replace(self, resize=int(self.resize * scale), crop=size)

    @classmethod
    def from_config(cls, config: Mapping, model_type: str = "vit") -> Preprocess:
        """Read a preprocessor_config.json in any of the forms that transformers has written.

        A file that names no image processor is read as transformers does for `model_type`. Raises
        UserError for steps that minivit does not support and for values that make no sense.
        """
        steps = read_steps(config, model_type)
        return cls(steps.resize, steps.crop, steps.resample, steps.mean, steps.std)

    def to_config(self) -> dict:
        """Return a preprocessor_config.json that transformers reads as the same steps.

        `round_margins` is left out because transformers has no such setting.
        """
        if not isinstance(self.resize, tuple):
            processor = "BitImageProcessor"
            size = {"shortest_edge": self.resize}
        else:
            processor = "DeiTImageProcessor" if self.crop else "ViTImageProcessor"
            size = _size_to_config(self.resize)
        crop_size = {"crop_size": _size_to_config(self.crop)} if self.crop else {}
        return {
            "image_processor_type": processor,
            "do_convert_rgb": True,
            "do_resize": True,
            "size": size,
            "resample": self.resample,
            "do_center_crop": self.crop is not None,
            **crop_size,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }


def decode_into(
    file: Path, offset: int, paths: Sequence[Path], preprocess: Preprocess
) -> list[str]:
    """Decode photos into a file, uint8 (3, h, w) each, from a byte offset on.

    Returns for each photo why it could not be read, or "" if it was. The bytes of a photo that
    could not be read are left as they are. Runs in worker processes.
    """
    errors = []
    with file.open("rb+") as store:
        for i, path in enumerate(paths):
            try:
                pixels = preprocess.array(open_photo(path))
            except PhotoError as error:
                errors.append(str(error))
                continue
            errors.append("")
            store.seek(offset + i * pixels.nbytes)
            store.write(pixels.data)
    return errors


def _sample_rows(values: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Interpolate rows (n, m) at positions from 0 to 1, bicubically, as torch's grid_sample does.

    Beyond the first and the last row, these are repeated.
    """
    sharpness = -0.75  # as in torch and OpenCV; Pillow and the cubic spline have -0.5
    index = positions * len(values) - 0.5
    first = np.floor(index)
    sampled = np.zeros((len(positions), values.shape[1]), np.float32)
    for neighbour in (-1, 0, 1, 2):
        t = np.abs(index - (first + neighbour))
        near = ((sharpness + 2) * t - (sharpness + 3)) * t**2 + 1
        far = sharpness * (((t - 5) * t + 8) * t - 4)
        weight = np.where(t <= 1, near, far).astype(np.float32)
        row = (first + neighbour).clip(0, len(values) - 1).astype(int)
        sampled += weight[:, None] * values[row]
    return sampled


@functools.cache
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return one number for each channel on the device, (3, 1, 1).

    The tensor is cached because every copy to the device makes the host wait.
    """
    import torch

    with torch.inference_mode(False):
        return torch.tensor(values, device=device).view(3, 1, 1)


def _size_to_config(size: tuple[int, int]) -> dict[str, int]:
    return {"height": size[0], "width": size[1]}
