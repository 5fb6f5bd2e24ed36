"""Compare minivit's outputs for one photo with the numbers in transformers' own tests."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.client
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ...checkpoints.hub import fetch
from ...checkpoints.network import explain_failure
from ...checkpoints.weights import load_pretrained
from ...data.photos import open_photo
from ...errors import UserError, printable
from ...model import ViT
from ...system.device import pick_device
from ...system.files import read_json, whole_file
from ...system.home import cache_folders


@dataclass(frozen=True)
class Published:
    """What transformers expects of a checkpoint, for the photo below.

    A local copy of the checkpoint is known by `kind`: the model_type, hidden_size and patch_size
    in its config.json.
    """

    model: str  # Hub id
    kind: tuple[str, int, int]
    source: str  # the file that publishes the numbers, and its version
    # The first three logits, or the first three features of the first three tokens after the
    # final norm, which transformers calls last_hidden_state.
    values: tuple[tuple[float, ...], ...]
    tolerance: float  # of the largest difference
    label: str = ""  # the name of the first prediction; "" if `values` are no logits
    img_size: tuple[int, int] | None = None  # (h, w), where it is not the checkpoint's own


# Up to version 4, transformers resizes with Pillow, as minivit does. The tests of transformers 5,
# which resizes with torchvision, have other numbers: for dinov2-base they differ by up to 0.013.
#
# The tolerance of the logits is ten times that of transformers' test. Its photo is a PNG that was
# made from the JPEG, and decoders of JPEG may differ by 1 of 255. In DINOv2 ViT-S/14, a change of
# that size in 1% or 10% of the samples moves these features by up to 0.009 or 0.017. Positions that
# are resampled by another scale, as in the tests of transformers 4.27, move those of dinov2-base by
# 0.12 and those of dino-vits8 by 0.016.
TESTS = "transformers 4.57.1, tests/models"
PUBLISHED = (
    Published(
        model="google/vit-base-patch16-224",
        kind=("vit", 768, 16),
        # The label stands in transformers 4.27.1, src/transformers/models/vit/modeling_vit.py.
        source=f"{TESTS}/vit/test_modeling_vit.py",
        values=((-0.2744, 0.8215, -0.0836),),
        tolerance=1e-3,
        label="Egyptian cat",
    ),
    Published(
        model="facebook/dino-vits8",
        kind=("vit", 384, 8),
        source=f"{TESTS}/vit/test_modeling_vit.py",
        values=((4.2325, 4.3882, -6.6678), (4.5372, 1.8933, -6.7355), (4.4454, 0.8514, -5.8747)),
        tolerance=1e-2,
        img_size=(480, 480),
    ),
    Published(
        model="facebook/dinov2-base",
        kind=("dinov2", 768, 14),
        source=f"{TESTS}/dinov2/test_modeling_dinov2.py",
        values=(
            (-2.2005, -0.4495, 1.0964),
            (-3.3959, -0.8942, -1.0315),
            (-2.9355, 1.1564, -0.7656),
        ),
        tolerance=2e-2,
    ),
    Published(
        model="facebook/dinov2-with-registers-base",
        kind=("dinov2_with_registers", 768, 14),
        source=f"{TESTS}/dinov2_with_registers/test_modeling_dinov2_with_registers.py",
        values=(
            (-0.4636, -1.4582, -0.0274),
            (-1.4738, -0.8858, 0.3002),
            (0.0714, -0.2407, -1.5940),
        ),
        tolerance=1e-2,
    ),
)

# Two cats on a sofa, from the validation photos of COCO. The photo is under a licence of its own
# (CC BY-SA 2.0), so it does not come with minivit.
PHOTO_URL = "http://images.cocodataset.org/val2017/000000039769.jpg"
PHOTO_SHA256 = "dea9e7ef97386345f7cff32f9055da4982da5471c48d575146c796ab4563b04e"
PHOTO_SIZE = (640, 480)
TIMEOUT_S = 20


def compare_published(args: argparse.Namespace) -> int:
    """Print each model's published and found numbers; return 1 if any differ.

    A model that cannot be loaded is named on stderr, and the others are compared. If all of those
    agree, 2 is returned.
    """
    started = time.perf_counter()
    if args.amp not in ("auto", "off"):
        raise UserError(
            f"--published compares numbers of float32; expected --amp off, found {args.amp}"
        )
    device = pick_device(args.device)
    pending = _choose(args.model)
    path = Path(args.photo) if args.photo else _find_photo()
    photo = _open(path)
    print(f"{path} on {device}, torch {torch.__version__}")

    failed = []
    not_loaded = []
    for source, published in pending:
        try:
            model = _load(source, published).to(device)
        except UserError as error:
            print(printable(error), file=sys.stderr)
            not_loaded.append(source)
            continue
        found, label = _compute(model, photo, published)
        if not _report(source, published, found, label):
            failed.append(source)
    if failed:
        summary = f"FAILED: {', '.join(failed)}"
    else:
        summary = f"{len(pending) - len(not_loaded)} of {len(pending)} models agree"
    if not_loaded:
        summary += f"; not loaded: {', '.join(not_loaded)}"
    print(f"\n{summary}, in {time.perf_counter() - started:.0f} s")
    if failed:
        return 1
    return 2 if not_loaded else 0


def _choose(model: str | None) -> list[tuple[str, Published]]:
    """Return the checkpoints to load, each with what is published of it.

    These are all of the table, or the one that the user names: by its id, or as a copy of it.
    """
    if model is None:
        return [(published.model, published) for published in PUBLISHED]
    for published in PUBLISHED:
        if model == published.model:
            return [(model, published)]
    config = fetch(model, None, weights=False).config
    settings = read_json(config) if config is not None else {}
    kind = tuple(settings.get(name) for name in ("model_type", "hidden_size", "patch_size"))
    for published in PUBLISHED:
        if kind == published.kind:
            return [(model, published)]
    expected = ", ".join(published.model for published in PUBLISHED)
    raise UserError(f"{model}: no numbers of this model are published; expected one of {expected}")


def _find_photo() -> Path:
    """Return the photo's path in the user's cache folder, after downloading it if needed."""
    paths = [folder / Path(PHOTO_URL).name for folder in cache_folders()]
    for path in paths:
        if path.is_file() and _is_the_photo(path.read_bytes()):
            return path
    data = _download_photo()
    for path in paths:
        with contextlib.suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with whole_file(path) as partial:
                partial.write_bytes(data)
            return path
    raise UserError(f"no cache folder can be written to; save {PHOTO_URL} and give it with --photo")


def _download_photo() -> bytes:
    """Download the photo; raise UserError if it does not come, or is not the photo."""
    try:
        with urllib.request.urlopen(PHOTO_URL, timeout=TIMEOUT_S) as answer:
            data = answer.read(1_000_000)
    except (OSError, http.client.HTTPException) as error:
        reason = explain_failure(error, PHOTO_URL)
        raise UserError(
            f"cannot download {PHOTO_URL} ({reason}); get the photo elsewhere and give it "
            "with --photo FILE"
        ) from error
    if not _is_the_photo(data):
        raise UserError(
            f"{PHOTO_URL}: expected a file of SHA-256 {PHOTO_SHA256}, found another one of "
            f"{len(data):,} bytes; get the photo elsewhere and give it with --photo FILE"
        )
    return data


def _is_the_photo(data: bytes) -> bool:
    return hashlib.sha256(data).hexdigest() == PHOTO_SHA256


def _open(path: Path) -> Image.Image:
    """Open the photo. A file that is not the one of COCO may have the same pixels: a note says so.

    Raises UserError for a photo of another size.
    """
    photo = open_photo(path)
    if photo.size != PHOTO_SIZE:
        raise UserError(
            f"{path}: expected the photo {PHOTO_URL} of {PHOTO_SIZE[0]} x {PHOTO_SIZE[1]} pixels, "
            f"found one of {photo.width} x {photo.height}"
        )
    if not _is_the_photo(path.read_bytes()):
        print(
            f"{path}: not the file {PHOTO_URL} itself; if its pixels differ, so will all numbers",
            file=sys.stderr,
        )
    return photo


def _load(source: str, published: Published) -> ViT:
    model = load_pretrained(source, img_size=published.img_size)
    if published.label and not model.labels:
        raise UserError(f"{source}: expected a copy of {published.model}, found no classifier")
    return model


@torch.no_grad()
def _compute(model: ViT, photo: Image.Image, published: Published) -> tuple[Tensor, str]:
    """Return the model's values in the place of the published ones, and its first prediction."""
    images = model.preprocess(photo)[None].to(model.cls_token.device)
    # Without cuDNN, whose convolution would round to TF32 on GPUs.
    with torch.backends.cudnn.flags(enabled=False):
        if published.label:
            output = model(images)
            label = model.labels[int(output.argmax())]
        else:
            output = model.norm(model.tokens(images, stop=model.config.depth))[0]
            label = ""
    rows = len(published.values)
    return output[:rows, : len(published.values[0])].cpu(), label


def _report(source: str, published: Published, found: Tensor, label: str) -> bool:
    """Print what was expected and found; return whether they agree."""
    expected = torch.tensor(published.values)
    largest = (found - expected).abs().max().item()
    # The comparison is False for NaN, too.
    passed = largest <= published.tolerance and label == published.label
    what = "the first logits and the name" if published.label else "the first hidden states"
    size = f" at {published.img_size[0]} x {published.img_size[1]}" if published.img_size else ""
    print(f"\n{source}{size}: {what}, from {published.source}")
    print(f"  expected  {_row(expected, published.label)}")
    print(f"  found     {_row(found, label)}")
    print(
        f"  largest difference {largest:.1e}, at most {published.tolerance:.0e}: "
        f"{'ok' if passed else 'FAILED'}",
        flush=True,
    )
    return passed


def _row(values: Tensor, label: str) -> str:
    """Return rows of numbers in one line, and the name if there is one."""
    rows = [" ".join(f"{value:8.4f}" for value in row) for row in values.tolist()]
    return " |".join([*rows, f" {printable(label)}"] if label else rows)
