"""What programs and notebooks call: fine_tune does what train.py does, explain what infer.py does.

Their keywords are the flags of the two programs, read by the same parsers.
"""

from __future__ import annotations

import argparse
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from . import cli, infer, look
from .checkpoints.hub import Origin
from .checkpoints.weights import load_pretrained
from .commands import infer_parser, train_parser
from .data.layout import is_default_folder
from .data.photos import from_pillow, open_photo, open_sent_photo
from .data.prepared import LARGE, SMALL, Photo, prepare_photo
from .errors import UserError
from .figures.explorer import Page
from .figures.panels import compose_attention
from .look import Explanation
from .model import ViT, working_copy
from .settings import RUN_DIR, InferSettings, TrainSettings, flag
from .system import device as devices
from .system.files import portable_stem, read_json
from .system.home import ensure_home
from .system.launch import launched_world_size
from .train import train
from .training import run_folder
from .training.reference import find_reference

INTERRUPTED = 130  # the exit code of a run that was stopped
# The flags of the two programs that are no keywords here.
NOT_FOR_TRAINING = ("model", "data", "chosen", "dry_run")
NOT_FOR_EXPLAINING = (
    "photos",
    "model",
    "layers",
    "out",
    "html",
    "npz",
    "no_figures",
    "json",
    "workers",
)


@dataclass(frozen=True)
class Run:
    """A finished run: its model, its scores and its folder. A notebook shows its curves.

    `metrics` has a row for each epoch, as metrics.jsonl; row 0 is the head alone, which fine-tuning
    has to beat. `summary` is summary.json: test scores, settings, classes and versions.
    """

    folder: Path
    metrics: list[dict[str, float]]
    summary: dict[str, Any]

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Run:
        """Read the finished run in a folder. Raises UserError if there is none."""
        folder = Path(os.path.expanduser(folder))
        if not run_folder.files_of_run(folder):
            raise UserError(f"{folder}: expected the folder of a run, found none there")
        if not (folder / run_folder.SUMMARY).exists():
            raise UserError(
                f"{folder}: holds a run that is not finished; go on with it by fine_tune(..., "
                "resume=True), or train.py --resume"
            )
        rows = (folder / run_folder.ROWS).read_text(encoding="utf-8").splitlines()
        metrics = [json.loads(row) for row in rows]
        return cls(folder, metrics, read_json(folder / run_folder.SUMMARY))

    @cached_property
    def model(self) -> ViT:
        """The fine-tuned model, in float32 on the CPU, ready for inference."""
        model = load_pretrained(self.folder).eval()
        model.reference = find_reference(model)
        return model

    @property
    def test_accuracy(self) -> float:
        return self.summary["test_accuracy"]

    def __repr__(self) -> str:
        photos = self.summary["test_photos"]
        right = round(self.test_accuracy * photos)
        return f"<Run in {self.folder}: test accuracy {self.test_accuracy:.4f} ({right}/{photos})>"

    def _repr_png_(self) -> bytes | None:
        """Return the picture that a notebook shows: loss and accuracy by epoch, and the verdict."""
        curves = self.folder / "curves.png"
        return curves.read_bytes() if curves.exists() else None


@dataclass(frozen=True)
class ExplainedPhoto:
    """What a model makes of a photo. A notebook shows the figure that infer.py draws.

    With `compare`, `explanations` has the other model's first. `photo` is prepared for the models;
    the names and maps are those of the model itself.
    """

    title: str
    photo: Photo
    explanations: Sequence[Explanation]
    plan: infer.Plan
    settings: InferSettings

    @property
    def names(self) -> list[tuple[str, float]]:
        """The likeliest classes and their probabilities; none for a model without a classifier."""
        top = self.explanations[-1].predictions(self.settings.top_k)
        return [(label, probability) for label, _, probability in top]

    @property
    def blocks(self) -> list[int]:
        return list(self.plan.blocks)

    @cached_property
    def maps(self) -> np.ndarray:
        """Where the model looks: float32 (blocks, H, W) in the photo's own pixels.

        Each is the mean of the heads, one value for the patch at each pixel's place, smoothed. The
        patches of a map sum to 1. Pixels that were cropped away and not seen are NaN.
        """
        explanation = self.explanations[-1]
        preprocess = explanation.model.preprocess
        maps = look.patch_maps(explanation, self.settings.method, self.blocks, heads=False)
        return np.stack([preprocess.to_photo(values, self.photo.size) for _, values, _ in maps])

    @property
    def summary(self) -> dict[str, Any]:
        """What `infer.py --json` prints of the model: predictions, and shares of its maps."""
        return look.summary(self.explanations[-1], self.settings.top_k, self.settings.method)

    @cached_property
    def figure(self) -> Image.Image:
        """The figure that infer.py draws: the photo, and a map for each block."""
        figure = look.attention_figure(
            self.photo,
            self.explanations,
            self.settings.method,
            self.blocks,
            title=self.title,
            heads=self.settings.heads,
            shared_scale=self.settings.scale == "row",
        )
        return Image.fromarray(compose_attention(figure).pixels)

    def explorer(self) -> Page:
        """Return the page of `infer.py --html`: point at any patch, in any of the blocks and heads.

        It is a str of HTML, to be written into a file; a notebook shows it in the cell. All rows of
        attention are computed for it, by all methods.
        """
        models = self.plan.models
        with devices.own_defaults():
            plan = infer.Plan(
                models, self.plan.targets, self.plan.blocks, infer.possible_methods(models)
            )
            [explanations] = infer.explain_batch([self.photo], plan, all_rows=True)
            return look.explorer_page(self.photo, explanations, self.settings.top_k, self.title)

    def __repr__(self) -> str:
        if not self.names:
            return f"<{self.title}: no classifier>"
        names = ", ".join(f"{name} {probability:.3f}" for name, probability in self.names[:2])
        return f"<{self.title}: {names}>"

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.figure.save(file, "PNG")
        return file.getvalue()


def fine_tune(
    model: str | os.PathLike[str] | ViT | Run,
    data: str | os.PathLike[str],
    *,
    blocks: str | Iterable[int] = "10-11",
    epochs: int | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    **settings: Any,
) -> Run:
    """Fine-tune blocks of a model on folders of photos, as train.py does, and return the run.

    `model` is a Hub id, a folder, a file or "demo", an earlier Run, or a model as load_pretrained
    gave it. `data` is a folder as for `train.py --data`. `blocks` are "8-11", [10, 11], "all" or
    "none". Without `epochs` there are 5, and for few photos more. The run is written into `out`;
    without it, into runs/NAME, where NAME is that of the folder of photos. An earlier run there is
    moved into earlier-1 and so on. What train.py prints is printed.

    Further keywords, which mean what the flags of train.py mean and have the same defaults:
    revision, img_size (pixels, or height and width), download; batch_size, micro_batch, lr,
    head_lr, weight_decay, layer_decay, label_smoothing, class_weights ("none", "balanced"),
    cache_views ("auto" or a number), patience, keep ("auto", "best", "last", "average"),
    calibrate ("auto", "on", "off"), seed; device, amp ("auto", "bf16", "fp16", "off"), memory_gib,
    cache_gib, store_gib, compile, deterministic, workers; skip_bad, push_to_hub, public.

    Raises UserError for what can be mended, TypeError for a keyword that there is not, and
    KeyboardInterrupt if it is stopped: the same call with resume=True goes on, to the same end.
    """
    if launched_world_size() > 1:
        raise UserError("fine_tune runs in one process; under torchrun, use train.py")
    data = _as_path("data", data)
    out = _default_out(data) if out is None else _as_path("out", out)
    _check_keywords("fine_tune", settings, TrainSettings, NOT_FOR_TRAINING)
    values = {"blocks": blocks, "epochs": epochs, "out": out, "resume": resume} | settings
    values["data"] = data
    values["model"], revision = _source(model)
    if revision is not None:
        values["revision"] = revision
    flags = _read_flags(train_parser(), values)
    ensure_home()
    if train(TrainSettings(**vars(flags))) == INTERRUPTED:
        raise KeyboardInterrupt(f"{out} holds all; the same call with resume=True goes on")
    return Run.load(out)


def explain(
    photo: str | os.PathLike[str] | bytes | Image.Image,
    model: str | os.PathLike[str] | ViT | Run,
    *,
    blocks: str | Iterable[int] = "8-11",
    method: str = "attention",
    target: str | None = None,
    compare: str | os.PathLike[str] | ViT | Run | None = None,
    **settings: Any,
) -> ExplainedPhoto:
    """Name what is in a photo, and show where each block of a model looks, as infer.py does.

    `photo` is the path of a file, its bytes, or an image of Pillow's. `model` is a Hub id, a
    folder, a file or "demo", which is loaded in each call, a Run, or a model. `blocks` are "8-11",
    [10, 11] or "all". `method` is "attention", "rollout", or "relevance", which says what speaks
    for the class `target` or, without it, for the first prediction. `compare` is another model,
    drawn above with the difference below: before and after.

    Further keywords, which mean what the flags of infer.py mean and have the same defaults: against
    (a class), heads, query (x and y of a pixel), scale ("own", "row"), top_k, revision, img_size,
    device, amp.

    Raises UserError for what can be mended, such as a photo that cannot be read, and TypeError for
    a keyword that there is not and for anything else in place of a photo or model.
    """
    _check_keywords("explain", settings, InferSettings, NOT_FOR_EXPLAINING)
    values = {"layers": blocks, "method": method, "target": target} | settings
    flags = _read_flags(infer_parser(), values, "photo")
    checked = InferSettings(**vars(flags) | {"photos": ()})
    title, image = _open(photo)
    ensure_home()
    with devices.own_defaults():
        sources = [model] if compare is None else [compare, model]
        device = devices.pick_device(checked.device)
        amp = devices.pick_amp(checked.amp, device)
        models = [
            working_copy(_load(source, checked), device, amp, train=False) for source in sources
        ]
        for each in models:
            if each.origin is None:  # It was made and not loaded.
                each.origin = Origin("a model")
        plan = infer.plan_for(models, checked)
        panel = SMALL if checked.heads else LARGE
        needs = look.needs_of(models, checked.query, panel=panel, page=True)
        prepared = prepare_photo(image, needs)
        [explanations] = infer.explain_batch([prepared], plan, all_rows=False)
    return ExplainedPhoto(title, prepared, explanations, plan, checked)


def _check_keywords(
    call: str, given: Iterable[str], settings: type, left_out: Sequence[str]
) -> None:
    """Raise TypeError for a keyword that is no setting, or one of those that are left out."""
    names = {field.name for field in fields(settings)} - set(left_out)
    for name in given:
        if name not in names:
            raise TypeError(
                f"{call}() got an unexpected keyword argument {name!r}; expected one of "
                f"{', '.join(sorted(names))}"
            )


def _read_flags(
    parser: cli.Parser, values: Mapping[str, Any], *arguments: str
) -> argparse.Namespace:
    """Read settings as a command reads its flags, with the same checks; None is the default.

    Raises UserError for a value that a flag does not take.
    """
    parser.exit_on_error = False
    argv = []
    for name, value in values.items():
        if parser.get_default(name) is False:  # This flag has no value.
            if not isinstance(value, bool):
                raise UserError(f"{name}: expected True or False, found {value!r}")
            if value:
                argv.append(flag(name))
        elif value is not None:
            text = _as_text(name, value)
            if not text:
                raise UserError(f"{name}: expected a value, found {value!r}")
            argv.append(f"{flag(name)}={text}")
    try:
        return parser.parse_args([*arguments, *argv])
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None


def _as_text(name: str, value: Any) -> str:
    """Write a setting as it is typed behind its flag: [10, 11] as 10,11, (384, 512) as 384x512."""
    if isinstance(value, Iterable) and not isinstance(value, str):
        separator = "x" if name == "img_size" else ","
        return separator.join(str(part) for part in value)
    return str(value)


def _as_path(name: str, path: object) -> str:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{name}: expected the path of a folder, found {type(path).__name__}")
    return os.path.expanduser(path)


def _default_out(data: str) -> str:
    """Return the folder of a run on these photos: that of train.py for its own default folder."""
    if is_default_folder(data):
        return RUN_DIR
    name = Path(data).resolve().name
    return str(Path(RUN_DIR).parent / portable_stem(name or "run"))


def _source(model: str | os.PathLike[str] | ViT | Run) -> tuple[str, str | None]:
    """Return what train.py is to load, and its revision if the model knows that.

    Raises UserError for a model that is not what is stored where it came from.
    """
    if isinstance(model, Run):
        return str(model.folder), None
    if not isinstance(model, ViT):
        return _as_source(model), None
    advice = "write it by save_pretrained(model, folder), and give the folder"
    if not model.origin or not model.origin.source:
        raise UserError(f"expected a model that was loaded, found one that was made; {advice}")
    source = model.origin.source
    stored = load_pretrained(source, revision=model.origin.commit)
    weights = stored.state_dict()
    for name, tensor in model.state_dict().items():
        if name not in weights or not torch.equal(tensor.cpu(), weights[name]):
            raise UserError(f"{name} of the model is not what it is in {source}; {advice}")
    if model.preprocess != stored.preprocess:
        raise UserError(f"the model sees photos in another way than {source}; {advice}")
    return source, model.origin.commit


def _load(model: str | os.PathLike[str] | ViT | Run, settings: InferSettings) -> ViT:
    """Return a model, loaded if need be."""
    if isinstance(model, Run):
        model = model.model
    if not isinstance(model, ViT):
        source = _as_source(model)
        model = load_pretrained(source, revision=settings.revision, img_size=settings.img_size)
        model.reference = find_reference(model)
        return model
    if settings.revision is not None or settings.img_size is not None:
        raise UserError("revision and img_size are for a model that is still to be loaded")
    if model.preprocess is None:
        raise UserError("expected a model that was loaded; to one that was made, give a preprocess")
    return model


def _as_source(model: object) -> str:
    if not isinstance(model, (str, os.PathLike)):
        raise TypeError(
            "model: expected a Hub id, a folder, a file, 'demo', a Run or a ViT, found "
            f"{type(model).__name__}"
        )
    return str(model)


def _open(photo: str | os.PathLike[str] | bytes | Image.Image) -> tuple[str, Image.Image]:
    """Return a photo's name and the photo, upright in RGB, for the caller to change."""
    if isinstance(photo, Image.Image):
        name = Path(getattr(photo, "filename", "") or "photo").name
        return name, from_pillow(photo, name)
    if isinstance(photo, bytes):
        return "photo", open_sent_photo(photo, "photo")
    if not isinstance(photo, (str, os.PathLike)):
        raise TypeError(
            f"photo: expected a path, bytes or an image of Pillow's, found {type(photo).__name__}; "
            "Image.fromarray makes one of an array"
        )
    return Path(photo).name, open_photo(photo)
