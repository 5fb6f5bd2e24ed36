"""What the page shows for a photo: names, notes and the explorer, computed one photo at a time."""

from __future__ import annotations

import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from ... import infer, look
from ...data.photos import open_sent_photo
from ...errors import printable
from ...figures.pages import thumbnail_url
from ...model import working_copy
from ...settings import InferSettings
from ...system import device as devices
from ...system.files import portable_stem, whole_file

NUM_BLOCKS = 4  # the last ones, which the explorer shows
TOP_K = 5
# Photos that are being sent or that wait for their turn. More are refused for a moment.
MAX_PHOTOS = 8
THUMBNAIL_SIDE = 256  # pixels
KEPT_NAME = 40  # characters of a photo's name, the last ones, which any file system takes


class Answers:
    """The models, a thread that computes, and the places of the photos that wait for it."""

    def __init__(
        self, model: str | None, compare: str | None, device: str, amp: str, keep: str | None
    ) -> None:
        self.folder = None  # in which photos are kept
        if keep is not None:
            self.folder = Path(keep)
            self.folder.mkdir(parents=True, exist_ok=True)
        settings = InferSettings(photos=(), model=model, compare=compare, device=device, amp=amp)
        self.places = threading.BoundedSemaphore(MAX_PHOTOS)
        # One thread computes for all requests. It also keeps torch's own threads, which would
        # otherwise be started for each request.
        self.worker = ThreadPoolExecutor(1)
        self.plan = self.worker.submit(make_plan, settings).result()
        self.worker.submit(self._warm_up).result()

    def answer(self, data: bytes, name: str) -> dict:
        """Return the answer to a photo of these bytes, as JSON for the page.

        Waits for its turn. Raises PhotoError for a photo that cannot be read.
        """
        return self.worker.submit(self._compute, data, name).result()

    def _compute(self, data: bytes, name: str) -> dict:
        with devices.own_defaults():
            image = open_sent_photo(data, name)
            answer = explain_image(image, name, self.plan)
        if self.folder is not None:
            keep_photo(self.folder, data, answer)
        return answer

    def _warm_up(self) -> None:
        """Answer once without a photo, so that the first one need not wait for libraries."""
        with devices.own_defaults():
            explain_image(Image.new("RGB", (640, 480)), "", self.plan)


def make_plan(settings: InferSettings) -> infer.Plan:
    """Load the models and plan to explain their last blocks by all methods."""
    with devices.own_defaults():
        device = devices.pick_device(settings.device)
        amp = devices.pick_amp(settings.amp, device)
        loaded = infer.load_models(settings)
        models = [working_copy(model, device, amp, train=False) for model in loaded]
        depth = min(model.config.depth for model in models)
        blocks = range(max(0, depth - NUM_BLOCKS), depth)
        return infer.Plan(models, [None] * len(models), blocks, infer.possible_methods(models))


def explain_image(image: Image.Image, name: str, plan: infer.Plan) -> dict:
    """Return names, notes, a small copy of the photo, and the explorer's page."""
    photo = look.prepare_photo(image, plan.models)
    [explanations] = infer.explain_batch([photo], plan, all_rows=True)
    return {
        "photo": name,
        "size": photo.size,
        "thumbnail": thumbnail_url(photo.page_image, THUMBNAIL_SIDE),
        "models": [describe(each) for each in explanations],
        "page": look.explorer_page(photo, explanations, TOP_K, name),
    }


def describe(explanation: look.Explanation) -> dict:
    """Return a model's names, and sentences about them that the page shows as `notes`."""
    summary = look.summary(explanation, TOP_K, "attention")
    notes = []
    if not explanation.model.labels:
        notes.append("This model has no classifier, so it gives no names.")
    if summary.get("unlike_training"):
        notes.append(f"{look.describe_comparison(explanation.comparison)}.")
    return {"model": summary["model"], "predictions": summary["predictions"], "notes": notes}


def keep_photo(folder: Path, data: bytes, answer: dict) -> None:
    """Write a photo and its answer into a folder, under a new name that any system takes."""
    now = f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9:09}"
    path = folder / f"{now}-{portable_stem(answer['photo'])[-KEPT_NAME:]}"
    kept = {key: answer[key] for key in ("photo", "size", "models")}
    try:
        with whole_file(path) as partial:
            partial.write_bytes(data)
        with whole_file(path.with_name(f"{path.name}.json")) as partial:
            partial.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        message = f"The photo could not be kept ({error.strerror or error})."
        print(printable(f"{path}: {message}"), file=sys.stderr)
        answer["models"][-1]["notes"].append(message)
