"""What a run says beyond its accuracy, measured: unknown photos, probabilities, class weights.

    python benchmarks/own_photos.py --model MODEL --pets3 DIR --pets37 DIR [--out FILE]

`choose` leaves twelve of pets37's breeds out of training, and tells their training photos from
validation photos of the others by several distances: by it, minivit's distance was chosen.
`unknown` trains on two of the breeds of pets3; the test photos of the third, and 200 drawings of
rooms without a pet, are unknown. The area under the ROC curve says how often an unknown photo lies
behind a test photo of a known breed. `calibration` and `weights` measure what --calibrate and
--class-weights change on the test photos; for `weights`, one breed keeps a tenth of its training
photos. Each measurement is a line of JSON. No file is written but --out. With `--blocks none` it
takes minutes on a CPU.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from results import ROOT, commit_name, installed_versions, machine_name
from torch import Tensor

sys.path.insert(0, str(ROOT))

from minivit.checkpoints.weights import load_pretrained
from minivit.cli import parse_blocks
from minivit.data.datasets import Split, load_data
from minivit.data.photos import open_photo
from minivit.data.preprocess import Preprocess
from minivit.model import ViT, freeze_except, working_copy
from minivit.settings import TrainSettings, batch_size_for, epochs_for
from minivit.system import device as devices
from minivit.system.cores import cores
from minivit.tools.demo.scenes import OBJECTS, draw_scene
from minivit.train import choose_weights, run_epochs
from minivit.training import calibration, reference
from minivit.training.metrics import confusion_matrix, summarize
from minivit.training.state import new_state, set_trainable
from minivit.training.step import predict_photos

NUM_DRAWINGS = 200
LEFT_OUT = 12  # breeds of pets37
BATCH = 64
PARTS = ("choose", "unknown", "calibration", "weights")


@dataclass
class Photos:
    """Decoded photos of a split, uint8 (n, 3, h, w), and their labels (n,)."""

    pixels: Tensor
    labels: Tensor

    def where(self, is_taken: Tensor) -> Photos:
        return Photos(self.pixels[is_taken], self.labels[is_taken])

    def of_classes(self, classes: Sequence[int]) -> Photos:
        """Return the photos of some classes, with their labels counted among these."""
        new_label = torch.full((int(self.labels.max()) + 1,), -1)
        new_label[list(classes)] = torch.arange(len(classes))
        photos = self.where(new_label[self.labels] >= 0)
        return Photos(photos.pixels, new_label[photos.labels])


@dataclass
class Trained:
    """A fine-tuned model, and what its head reads of its training photos (n, D)."""

    model: ViT
    inputs: Tensor

    def predict(self, photos: Photos) -> tuple[Tensor, Tensor]:
        return predict_photos(self.model, photos.pixels, batch=BATCH)


class DataSet:
    """The decoded photos of a folder, by split; validation depends on the seed."""

    def __init__(self, name: str, folder: str, preprocess: Preprocess) -> None:
        self.name = name
        self.folder = folder
        paths = load_data(folder, seed=0).paths()
        with ThreadPoolExecutor(cores()) as pool:
            decoded = pool.map(lambda path: preprocess.pixels(open_photo(path)), paths)
            self.pixels = dict(zip(paths, decoded))

    def split(self, seed: int) -> tuple[Photos, Photos, Photos]:
        data = load_data(self.folder, seed=seed)
        self.classes = data.classes
        return self._take(data.train), self._take(data.val), self._take(data.test)

    def _take(self, split: Split) -> Photos:
        pixels = torch.stack([self.pixels[path] for path in split.paths])
        return Photos(pixels, torch.tensor(split.labels))


def fine_tune(
    args: argparse.Namespace,
    train: Photos,
    val: Photos,
    seed: int,
    num_classes: int,
    class_weights: str = "none",
) -> Trained:
    """Train as train.py does by default, and return the model that it would keep."""
    device = devices.pick_device(args.device)
    amp = devices.pick_amp("auto", device)
    torch.manual_seed(seed)
    model = load_pretrained(args.model, labels=[f"class {i}" for i in range(num_classes)])
    cut = freeze_except(model, parse_blocks(args.blocks, model.config.depth))
    settings = TrainSettings(seed=seed, class_weights=class_weights, cache_views=0)
    settings = settings.choose(batch_size=batch_size_for(len(train.labels)))
    settings = settings.choose(epochs=epochs_for(settings.steps_per_epoch(len(train.labels))))
    state = new_state(
        working_copy(model, device, amp, train=True),
        cut=cut,
        amp=amp,
        micro_batch=devices.pick_micro_batch(None, settings.batch_size, device, amp),
        weight_decay=settings.weight_decay,
        head_scale=settings.head_lr / settings.lr,
    )
    evaluation = run_epochs(
        state, (train.pixels, train.labels), (val.pixels, val.labels), settings, lambda: False
    )
    kept, weights = choose_weights(state, settings, len(val.labels))
    inputs = evaluation.read_by_head(state, kept, weights)
    set_trainable(state.model, weights)
    return Trained(working_copy(state.model, device, amp, train=False), inputs)


def area_under_roc(known: Tensor, unknown: Tensor) -> float:
    """Return how often a score of `unknown` is above one of `known`; ties count half."""
    above = (unknown[:, None] > known).double() + 0.5 * (unknown[:, None] == known).double()
    return above.mean().item()


def distance(name: str, k: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function of training features and others' to the mean distance to the k nearest."""

    def measure(features: Tensor, inputs: Tensor) -> Tensor:
        if name == "cosine":
            features = F.normalize(features, dim=1)
            inputs = F.normalize(inputs, dim=1)
        if name == "centred cosine":
            mean = features.mean(0)
            features = F.normalize(features - mean, dim=1)
            inputs = F.normalize(inputs - mean, dim=1)
        found = torch.cdist(inputs, features)
        return found.topk(min(k, len(features)), largest=False).values.mean(1)

    return measure


DISTANCES = {
    f"{name}, {k} nearest": distance(name, k)
    for name in ("euclidean", "cosine", "centred cosine")
    for k in (1, 2, 3, 5, 10)
}


def choose_distance(args: argparse.Namespace, data: DataSet, seed: int) -> list[dict]:
    """Tell training photos of breeds that are left out from validation photos of the others."""
    train, val, _ = data.split(seed)
    num_classes = len(data.classes)
    left_out = random.Random(seed).sample(range(num_classes), LEFT_OUT)
    taught = [c for c in range(num_classes) if c not in left_out]
    trained = fine_tune(args, train.of_classes(taught), val.of_classes(taught), seed, len(taught))
    logits, known = trained.predict(val.of_classes(taught))
    unknown_logits, unknown = trained.predict(train.of_classes(left_out))
    areas = {
        name: area_under_roc(measure(trained.inputs, known), measure(trained.inputs, unknown))
        for name, measure in DISTANCES.items()
    }
    areas["largest probability"] = area_under_roc(doubt(logits), doubt(unknown_logits))
    return [{"data": data.name, **{f"area, {name}": area for name, area in areas.items()}}]


def doubt(logits: Tensor) -> Tensor:
    """Return how unsure each prediction is: minus its probability."""
    return -logits.softmax(1).amax(1)


def measure_unknown(args: argparse.Namespace, data: DataSet, seed: int) -> list[dict]:
    """Leave each breed out in turn; see the module."""
    train, val, test = data.split(seed)
    preprocess = load_pretrained(args.model).preprocess
    rng = np.random.default_rng(0)
    things = sorted(OBJECTS)
    scenes = [draw_scene(rng, things[i % len(things)], None) for i in range(NUM_DRAWINGS)]
    drawings = torch.stack([preprocess.pixels(scene.photo) for scene in scenes])
    rows = []
    for left_out, breed in enumerate(data.classes):
        taught = [c for c in range(len(data.classes)) if c != left_out]
        trained = fine_tune(
            args, train.of_classes(taught), val.of_classes(taught), seed, len(taught)
        )
        features = trained.inputs.half().float()
        _, val_inputs = trained.predict(val.of_classes(taught))
        threshold = reference.choose_threshold(reference.distances_to(features, val_inputs))
        logits, inputs = trained.predict(test.of_classes(taught))
        far = reference.distances_to(features, inputs)
        row = {
            "data": data.name,
            "left out": breed,
            "known test photos unlike": (far > threshold).double().mean().item(),
            "known test photos": len(far),
        }
        others = {
            "breed": test.of_classes([left_out]),
            "drawings": Photos(drawings, torch.zeros(NUM_DRAWINGS, dtype=torch.long)),
        }
        for name, photos in others.items():
            unknown_logits, unknown_inputs = trained.predict(photos)
            unknown_far = reference.distances_to(features, unknown_inputs)
            row[f"{name} unlike"] = (unknown_far > threshold).double().mean().item()
            row[f"area, {name}, distance"] = area_under_roc(far, unknown_far)
            row[f"area, {name}, largest probability"] = area_under_roc(
                doubt(logits), doubt(unknown_logits)
            )
        rows.append(row)
    return rows


def measure_calibration(args: argparse.Namespace, data: DataSet, seed: int) -> list[dict]:
    """Compare the calibration error on the test photos before and after."""
    train, val, test = data.split(seed)
    trained = fine_tune(args, train, val, seed, len(data.classes))
    logits, _ = trained.predict(test)
    temperature = calibration.fit_temperature(trained.predict(val)[0], val.labels)
    row: dict[str, object] = {"data": data.name, "temperature": temperature}
    row["validation photos"] = len(val.labels)
    row["accuracy"] = (logits.argmax(1) == test.labels).double().mean().item()
    for name, shown in (("before", logits), ("after", logits / temperature)):
        bins = calibration.reliability(shown, test.labels)
        row[f"error, {name}"] = calibration.calibration_error(bins)
        row[f"loss, {name}"] = F.cross_entropy(shown, test.labels).item()
        assert torch.equal(shown.argmax(1), logits.argmax(1))
    return [row]


def measure_weights(args: argparse.Namespace, data: DataSet, seed: int) -> list[dict]:
    """Compare macro F1 with and without class weights, one breed cut to a tenth."""
    train, val, test = data.split(seed)
    rows = []
    for cut, breed in enumerate(data.classes):
        indices = (train.labels == cut).nonzero()[:, 0].tolist()
        kept = random.Random(seed).sample(indices, max(1, len(indices) // 10))
        is_taken = train.labels != cut
        is_taken[kept] = True
        row: dict[str, object] = {"data": data.name, "cut to a tenth": breed, "left": len(kept)}
        for weights in ("none", "balanced"):
            trained = fine_tune(args, train.where(is_taken), val, seed, len(data.classes), weights)
            predicted = trained.predict(test)[0].argmax(1)
            confusion = confusion_matrix(predicted, test.labels, len(data.classes))
            scores = summarize(confusion)
            row[f"macro F1, {weights}"] = scores["macro_f1"]
            row[f"accuracy, {weights}"] = scores["accuracy"]
            right = predicted[test.labels == cut] == cut
            row[f"recall of the cut, {weights}"] = right.double().mean().item()
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--pets3", required=True)
    parser.add_argument("--pets37", required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--blocks", default="10-11")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", default="own_photos.jsonl")
    args = parser.parse_args()
    preprocess = load_pretrained(args.model).preprocess
    pets3 = DataSet("pets3", args.pets3, preprocess)
    pets37 = DataSet("pets37", args.pets37, preprocess)
    jobs = {
        "choose": [(choose_distance, pets37)],
        "unknown": [(measure_unknown, pets3)],
        "calibration": [(measure_calibration, pets3), (measure_calibration, pets37)],
        "weights": [(measure_weights, pets3)],
    }
    device = devices.pick_device(args.device)
    about = {"blocks": args.blocks, "model": args.model, "commit": commit_name()}
    about |= {"hardware": machine_name(device), "versions": installed_versions()}
    results = defaultdict(list)
    with Path(args.out).open("w", encoding="utf-8") as out:
        for part in args.parts:
            for measure, data in jobs[part]:
                for seed in range(args.seeds):
                    for row in measure(args, data, seed):
                        row = {"part": part, "seed": seed, **row}
                        results[part, data.name].append(row)
                        out.write(json.dumps(row | about) + "\n")
                        out.flush()
    for (part, name), rows in results.items():
        print(f"\n{part}, {name}: mean (standard deviation) of {len(rows)} runs")
        for key, value in rows[0].items():
            if isinstance(value, float):
                values = [row[key] for row in rows]
                print(f"  {statistics.mean(values):8.3f} ({statistics.pstdev(values):.3f})  {key}")


if __name__ == "__main__":
    main()
