"""The model card of a finished run: README.md as the Hub reads it, its front matter with the measured results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from ..errors import printable

# What the makers of these checkpoints state on the Hub; of any other base, its own licence holds.
APACHE = (
    "google/vit-",
    "facebook/deit-",
    "facebook/dino-",
    "facebook/dinov2-",
    "timm/vit_",
    "timm/deit_",
)
PETS = "https://www.robots.ox.ac.uk/~vgg/data/pets/"
METRICS = {"accuracy": "accuracy", "macro_f1": "f1", "precision": "precision", "recall": "recall"}


def model_card(
    summary: Mapping, pairs: Sequence[tuple[str, str, int]] = (), *, name: str, pets: bool
) -> str:
    """Write a card from summary.json's values: links, how it was trained, metrics as model-index, figures, limits, licence.

    `pairs` are the classes confused most: (true, predicted, photos).
    """
    base, settings, classes = summary["base"], summary["settings"], summary["classes"]
    on_hub, apache = summary["base_commit"] is not None, base.startswith(APACHE)
    data = "Oxford-IIIT Pet" if pets else "photos in class folders"
    said = json.dumps  # a JSON string is a YAML string
    front = [
        "---",
        "library_name: transformers",
        "pipeline_tag: image-classification",
        "license: apache-2.0" if apache else "license: other\nlicense_name: that-of-the-base-model",
        *([f"base_model: {said(base)}"] if on_hub else []),
        "tags: [vit, minivit, image-classification]",
        "model-index:",
        f"- name: {said(name)}",
        "  results:",
        "  - task: {type: image-classification}",
        f"    dataset: {{name: {said(data)}, type: {said('oxford-iiit-pet' if pets else 'imagefolder')}, split: test}}",
        "    metrics:",
        *(
            f"    - {{type: {kind}, name: {said(key)}, value: {summary[f'test_{key}']:.6f}}}"
            for key, kind in METRICS.items()
        ),
        "---",
    ]
    link = _code(base.split("/")[-1])
    if on_hub:
        link = f"[{base}](https://huggingface.co/{base}) at commit `{summary['base_commit']}`"
    shown = ", ".join([*map(_code, classes[:50]), *["..."][: len(classes) > 50]])
    confused = "".join(
        f"\n- {_code(true)} taken for {_code(predicted)}: {n}" for true, predicted, n in pairs
    )
    text = f"""
# {printable(name)}

A Vision Transformer that tells {len(classes)} classes apart, fine-tuned with minivit from {link} on
{f"[{data}]({PETS})" if pets else data}.

| on {summary["test_photos"]:,} test photos | |
|---|---|
| accuracy | {summary["test_accuracy"]:.4f} |
| macro F1 | {summary["test_macro_f1"]:.4f} |
| precision, recall (weighted) | {summary["test_precision"]:.4f}, {summary["test_recall"]:.4f} |

The test photos were used once, at the end; the epoch ({summary["best_epoch"]}) was chosen on a validation tenth of the rest.
Training: {summary["verdict"]}. Each class's precision and recall are in classes.csv.{" Confused most:" if pairs else ""}
{confused}

## How it was trained

Blocks {settings["blocks"]}, the final norm and the head: {summary["trainable_parameters"]:,} of {summary["total_parameters"]:,}
parameters; the rest is as in the base. {settings["epochs"]} epochs, {settings["batch_size"]} photos a step, peak learning rate
{settings["lr"]:g}, seed {settings["seed"]}, {summary["precision"]} on {summary["device"]}, {summary["seconds"]:.0f} s.

## Use

    python infer.py photo.jpg --model {name}    # minivit; transformers' pipeline("image-classification", "{name}") reads it too

![Loss and accuracy by epoch](curves.png)
![Which classes are taken for which](confusion.png)
![Right and wrong predictions](predictions.png)

## Limits

It names one of its classes for any photo, also for photos of nothing it knows, and its probabilities are not calibrated.
It was measured on photos like those that it was trained on; others may be harder. Classes: {shown}.

## Licence

{"Apache-2.0, as the base model." if apache else "That of the base model."}
{"The photos are under CC BY-SA 4.0." if pets else ""}
"""
    return "\n".join(front) + "\n" + text


def _code(text: str) -> str:
    """Names are data: shown as code, they are no markup."""
    return "`" + printable(text).replace("`", "'") + "`"
