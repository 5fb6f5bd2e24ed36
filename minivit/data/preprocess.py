"""Photos as a model's pixels, as its checkpoint's preprocessor_config.json asks, and maps of it back on photos.

torch comes in where it is needed: processes that decode photos do without.
Shapes: h, w pixels of the model's input; gh, gw patches of a map; W, H a photo's width and height in pixels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ..errors import UserError
from .photos import PhotoError, open_photo

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Preprocess:
    """What a checkpoint's preprocessor_config.json asks: resize, perhaps crop, and normalise.

    `resize` is (h, w), the whole photo squashed to it, or the length of the shortest edge; the central `crop` (h, w) is
    then taken, if any (of a squashed photo: DeiT). Both antialias, with Pillow's filter `resample` (2 bilinear, 3 bicubic).
    Half a pixel of the crop's margin is left out by transformers, and rounded by torchvision and timm.
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
        if not (
            len(self.mean) == len(self.std) == 3
            and all(map(math.isfinite, self.mean + self.std))
            and min(self.std) > 0
        ):
            raise UserError(
                f"mean {self.mean} and std {self.std} of the pixels: expected three numbers each"
            )

    @property
    def size(self) -> tuple[int, int]:
        """The model's input (h, w) in pixels."""
        if self.crop is not None:
            return self.crop
        assert isinstance(self.resize, tuple)  # a shortest edge comes with a crop
        return self.resize

    def __call__(self, photo: Image.Image) -> Tensor:
        """Return one photo as a model's input, float32 (3, h, w); stack several for a batch."""
        return self.normalize(self.pixels(photo))

    def pixels(self, photo: Image.Image) -> Tensor:
        """Return the photo resized and cropped, uint8 (3, h, w)."""
        import torch

        return torch.from_numpy(self.array(photo))

    def array(self, photo: Image.Image) -> np.ndarray:
        """Return the same as NumPy holds it, for processes without torch."""
        (w, h), filter = self.size[::-1], Image.Resampling(self.resample)
        if self.crop is None or max(photo.size) > 20 * min(photo.size):
            resized = photo.resize(
                (w, h), filter, box=self.box(photo.size)
            )  # a strip's long edge would take gigabytes
        else:  # in the reference's two steps, so that its rounding in between is ours too
            left, top, *resized_size = self._crop_of_resized(photo.size)
            resized = photo.resize(resized_size, filter).crop((left, top, left + w, top + h))
        return np.array(resized).transpose(2, 0, 1).copy()

    def normalize(self, pixels: Tensor) -> Tensor:
        """Turn pixels (..., 3, h, w) of 0 to 255 into float32 of the checkpoint's mean and std."""
        mean, std = (_channels(values, pixels.device) for values in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std

    def box(self, photo_size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Return the part of a photo (W, H) that the model sees: left, top, right, bottom, in the photo's pixels."""
        W, H = photo_size
        if self.crop is None:
            return 0, 0, W, H
        left, top, resized_w, resized_h = self._crop_of_resized(photo_size)
        x, y = W / resized_w, H / resized_h
        return (
            left * x,
            top * y,
            min((left + self.crop[1]) * x, W),
            min((top + self.crop[0]) * y, H),
        )

    def patch_at(
        self, x: float, y: float, photo_size: tuple[int, int], grid: tuple[int, int]
    ) -> int:
        """Return which of gh x gw patches, counted row by row, sees the pixel (x, y) of a photo (W, H).

        Raises UserError where the model sees nothing: outside of the photo, or of the crop.
        """
        left, top, right, bottom = self.box(photo_size)
        if not (left <= x < right and top <= y < bottom):
            raise UserError(
                f"no patch at {x:g},{y:g}: of {photo_size[0]} x {photo_size[1]} pixels, the model sees "
                f"x from {left:.0f} to {right:.0f} and y from {top:.0f} to {bottom:.0f}"
            )
        row, column = (
            int((y - top) / (bottom - top) * grid[0]),
            int((x - left) / (right - left) * grid[1]),
        )
        return min(row, grid[0] - 1) * grid[1] + min(column, grid[1] - 1)

    def _crop_of_resized(self, photo_size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Return the crop's left and top in the resized photo, and that photo's width and height."""
        short = min(photo_size)
        if isinstance(self.resize, tuple):
            h, w = self.resize
        else:
            w, h = (
                int(self.resize * side / short) for side in photo_size
            )  # truncated, as transformers does
        whole = round if self.round_margins else math.floor
        return whole((w - self.size[1]) / 2), whole((h - self.size[0]) / 2), w, h

    def to_photo(
        self, values: Tensor, photo_size: tuple[int, int], shape: tuple[int, int] | None = None
    ) -> np.ndarray:
        """Bring a map (gh, gw) back onto a photo of (W, H) pixels: float32 (H, W), smoothly upsampled.

        What a crop cut away, the model has not seen: NaN there. `shape` (rows, columns) gives the whole photo at
        another resolution, for drawing.
        """
        import torch
        import torch.nn.functional as F

        rows, columns = shape or photo_size[::-1]
        W, H = photo_size
        left, top, right, bottom = self.box(photo_size)
        x = ((np.arange(columns) + 0.5) * W / columns - left) / (
            right - left
        ) * 2 - 1  # grid_sample's -1 to 1
        y = ((np.arange(rows) + 0.5) * H / rows - top) / (bottom - top) * 2 - 1
        ys, xs = torch.meshgrid(
            torch.from_numpy(y).float(), torch.from_numpy(x).float(), indexing="ij"
        )
        seen = (xs.abs() <= 1) & (ys.abs() <= 1)
        sampled = F.grid_sample(
            values.detach().float().cpu()[None, None],
            torch.stack([xs, ys], -1)[None],
            "bicubic",
            "border",
            align_corners=False,
        )[0, 0]
        sampled = sampled.clamp(values.min().item(), values.max().item())  # bicubic may overshoot
        return torch.where(seen, sampled, torch.nan).numpy()

    def at(self, size: tuple[int, int]) -> Preprocess:
        """Return the same for another input size (h, w): as much is cropped away, as a share of the larger side."""
        if self.crop is None:
            return replace(self, resize=size)
        scale = max(size[0] / self.crop[0], size[1] / self.crop[1])
        if not isinstance(self.resize, tuple):
            return replace(self, resize=int(self.resize * scale), crop=size)
        h, w = (int(r * side / c) for r, side, c in zip(self.resize, size, self.crop))
        return replace(self, resize=(h, w), crop=size)

    @classmethod
    def from_config(cls, config: dict) -> Preprocess:
        """Read a preprocessor_config.json in any of the forms that transformers has written.

        Raises UserError for what minivit would not do, or cannot make sense of.
        """
        deit = str(
            config.get("image_processor_type") or config.get("feature_extractor_type")
        ).startswith("DeiT")
        for step in ("do_resize", "do_rescale", "do_normalize"):
            if not config.get(step, True):
                raise UserError(
                    f"preprocessor_config.json: {step} is off; minivit always resizes, rescales and normalises"
                )
        if abs(config.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3:
            raise UserError(
                f"preprocessor_config.json: rescale_factor is {config['rescale_factor']}; expected 1/255"
            )
        size, crop = config.get("size", 256 if deit else 224), None
        if config.get(
            "do_center_crop", deit or (isinstance(size, dict) and "shortest_edge" in size)
        ):
            crop = _pair(config.get("crop_size", 224))
        edge = isinstance(size, dict) and "shortest_edge" in size
        resize: tuple[int, int] | int = int(size["shortest_edge"]) if edge else _pair(size)
        if crop and any(
            c > r for c, r in zip(crop, resize if isinstance(resize, tuple) else (resize, resize))
        ):
            kind = "size" if isinstance(resize, tuple) else "shortest edge"
            raise UserError(
                f"preprocessor_config.json: a crop of {crop} does not fit a {kind} of {resize}"
            )
        half = (0.5, 0.5, 0.5)  # Google's, where nothing is said
        mean, std = (
            tuple(map(float, config.get(f"image_{name}", half))) for name in ("mean", "std")
        )
        resample = config.get("resample", 3 if deit else 2)
        if resample not in list(Image.Resampling):
            raise UserError(
                f"preprocessor_config.json: resample is {resample!r}; expected one of Pillow's filters, 0 to 5"
            )
        return cls(resize, crop, int(resample), mean, std)

    def to_config(self) -> dict:
        """Return what transformers reads back as the same preprocessing, but for round_margins, which it does not have."""
        squashed = self.resize if isinstance(self.resize, tuple) else None
        kind = (
            "BitImageProcessor"
            if not squashed
            else "DeiTImageProcessor"
            if self.crop
            else "ViTImageProcessor"
        )
        return {
            "image_processor_type": kind,
            "do_convert_rgb": True,
            "do_resize": True,
            "size": dict(zip(("height", "width"), squashed))
            if squashed
            else {"shortest_edge": self.resize},
            "resample": self.resample,
            "do_center_crop": self.crop is not None,
            **({"crop_size": dict(zip(("height", "width"), self.crop))} if self.crop else {}),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }


def decode_into(file: Path, place: int, paths: Sequence[Path], preprocess: Preprocess) -> list[str]:
    """Write photos' pixels, uint8 (3, h, w) each, into a file from byte `place` on; return why not, for each, or ""."""
    reasons = []
    with file.open("rb+") as out:
        for i, path in enumerate(paths):
            try:
                pixels = preprocess.array(open_photo(path))
            except PhotoError as error:
                reasons.append(str(error))
            else:
                reasons.append("")
                out.seek(place + i * pixels.nbytes)
                out.write(pixels.data)
    return reasons


@functools.cache
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Put a number for each channel on the device, (3, 1, 1), once: each copy would make the host wait for it."""
    import torch

    with torch.inference_mode(False):
        return torch.tensor(values, device=device).view(3, 1, 1)


def _pair(size: int | dict) -> tuple[int, int]:
    return (
        (int(size["height"]), int(size["width"]))
        if isinstance(size, dict)
        else (int(size), int(size))
    )
