"""The model card of a finished run: a README.md whose front matter tells the Hub the results."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml  # type: ignore[import-untyped]  # huggingface-hub brings it.

from ..errors import printable

# The makers of these checkpoints publish them under Apache-2.0 on the Hub. Any other base model
# keeps its own licence.
APACHE = (
    "google/vit-",
    "facebook/deit-",
    "facebook/dino-",
    "facebook/dinov2-",
    "timm/vit_",
    "timm/deit_",
)
PETS = "https://www.robots.ox.ac.uk/~vgg/data/pets/"
# The Hub's name for each metric of summary.json.
METRICS = {
    "accuracy": "accuracy",
    "macro_f1": "f1",
    "precision": "precision",
    "recall": "recall",
}
MAX_CLASSES = 50  # The card lists no more.


def model_card(
    summary: Mapping, pairs: Sequence[tuple[str, str, int]] = (), *, name: str, pets: bool
) -> str:
    """Return the model card of a run.

    `summary` is what summary.json holds, `pairs` are the classes confused most often (true,
    predicted, number of photos), `name` is what the card calls the model, and `pets` says whether
    the photos are those of Oxford-IIIT Pet.
    """
    settings, classes = summary["settings"], summary["classes"]
    base = _code(Path(summary["base"]).name)
    hub_id = hub_base(summary)
    if hub_id is not None:
        link = f"https://huggingface.co/{hub_id}"
        base = f"[{hub_id}]({link}) at commit `{summary['base_commit']}`"
    data = "photos in class folders"
    licence = "The base model's licence applies."
    if pets:
        data = f"[Oxford-IIIT Pet]({PETS})"
    if _is_apache(summary):
        licence = "Apache-2.0, like the base model."
    if pets:
        licence += " The photos are under CC BY-SA 4.0."
    confused = ""
    for true, predicted, count in pairs:
        confused += f"- {_code(true)} taken for {_code(predicted)}: {count}\n"
    if pairs:
        confused = f"\nConfused most often, with the number of photos:\n\n{confused}"
    shown_name = printable(name)
    pipeline = f'pipeline("image-classification", {json.dumps(shown_name, ensure_ascii=False)})'
    class_list = ", ".join(_code(label) for label in classes[:MAX_CLASSES])
    if len(classes) > MAX_CLASSES:
        class_list += ", ..."
    share = f"{summary['trainable_parameters']:,} of {summary['total_parameters']:,} parameters"
    how = f"The seed was {settings['seed']}. "
    if summary["best_epoch"] == 0:
        trained = "The head alone was fitted to the frozen model by logistic regression"
        if settings["blocks"] == "none":
            trained += f":\n{share}."
        else:
            trained += f",\nbecause training blocks {settings['blocks']} gave nothing better."
    else:
        trained = f"Blocks {settings['blocks']}, the final norm and the head were trained:\n"
        trained += f"{share}."
        how = (
            f"The settings were {settings['epochs']} epochs,\n{settings['batch_size']} photos per "
            f"step, a peak learning rate of {settings['lr']:g} ({settings['head_lr']:g} for the "
            f"head)\nand seed {settings['seed']}. "
        )
    return f"""{_front_matter(summary, name, pets)}
# {shown_name}

A Vision Transformer that distinguishes {len(classes)} classes. It was fine-tuned with minivit from
{base} on {data}.

| on {summary["test_photos"]:,} test photos | |
|---|---|
| accuracy | {summary["test_accuracy"]:.4f} |
| macro F1 | {summary["test_macro_f1"]:.4f} |
| precision (weighted) | {summary["test_precision"]:.4f} |
| recall (weighted) | {summary["test_recall"]:.4f} |
{_calibration_row(summary)}
The test photos were used once, at the end; which epoch to keep was chosen on the validation photos.
Training: {summary["verdict"]}.
The file classes.csv has the precision and recall of each class.
{confused}
## How it was trained

{trained}
The others are those of the base model. {how}Training took {summary["seconds"]:.0f} seconds in
{summary["precision"]} on {summary["device"]}.

## How to use it

    python infer.py photo.jpg --model {shlex.quote(shown_name)}

The pipeline of transformers reads it as well:
{_code(pipeline)}.

![Loss and accuracy by epoch](curves.png)
![Confusion matrix](confusion.png)

## Limits

The model answers with one of its classes for any photo, even if the photo shows none of them.
{_describe_comparison(summary)}{_describe_calibration(summary)}
It was tested on photos like those it was trained on; others may be harder. Classes: {class_list}.

## Licence

{licence}
"""


def _calibration_row(summary: Mapping) -> str:
    """Return the row of the table of results; runs of before have no such error."""
    if "test_calibration_error" not in summary:
        return ""
    return f"| expected calibration error | {summary['test_calibration_error']:.4f} |\n"


def _describe_comparison(summary: Mapping) -> str:
    """Say how often photos count as unlike the training photos; runs of before did not compare."""
    if "unlike_training" not in summary:
        return ""
    rates = summary["unlike_training"]
    return (
        "With the run's reference.safetensors, minivit says which photos are unlike the training "
        f"photos. It says so\nof {rates['val_rate']:.1%} of the validation photos, which set the "
        f"threshold, and of {rates['test_rate']:.1%} of the test photos.\n"
    )


def _describe_calibration(summary: Mapping) -> str:
    """Say whether the probabilities are calibrated, and what that changed."""
    if summary.get("temperature") is None:
        return "Its probabilities are not calibrated."
    return (
        f"Its probabilities are calibrated: a temperature of {summary['temperature']:.3f}, fitted "
        f"to the {summary['val_photos']:,}\nvalidation photos, is folded into the head, which "
        "changes no prediction. On the test photos the\nexpected calibration error (15 bins of "
        f"equal width) was {summary['test_calibration_error_before']:.4f} before and is "
        f"{summary['test_calibration_error']:.4f}."
    )


def _is_apache(summary: Mapping) -> bool:
    hub_id = hub_base(summary)
    return hub_id is not None and hub_id.startswith(APACHE)


def hub_base(summary: Mapping) -> str | None:
    """Return the Hub id of the checkpoint that a run began with; None if it is local."""
    is_local = summary["base_commit"] is None
    # Earlier versions of minivit did not save which base a tail has that was trained on.
    is_unknown_tail = Path(base_checkpoint(summary)).suffix == ".safetensors"
    return None if is_local or is_unknown_tail else base_checkpoint(summary)


def base_checkpoint(summary: Mapping) -> str:
    """Return the base of a run or, if this is a tail, what it is a tail of."""
    if summary.get("tail_base") is not None:
        return summary["tail_base"]
    return summary["base"]


def _front_matter(summary: Mapping, name: str, pets: bool) -> str:
    """Return the YAML block at the top of the card, from which the Hub takes the results."""
    dataset = {"name": "photos in class folders", "type": "imagefolder", "split": "test"}
    if pets:
        dataset = {"name": "Oxford-IIIT Pet", "type": "oxford-iiit-pet", "split": "test"}
    results = []
    for key, kind in METRICS.items():
        results.append({"type": kind, "name": key, "value": round(summary[f"test_{key}"], 6)})
    result = {
        "task": {"type": "image-classification"},
        "dataset": dataset,
        "metrics": results,
    }
    front: dict[str, object] = {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
    }
    if _is_apache(summary):
        front["license"] = "apache-2.0"
    else:
        front["license"] = "other"
        front["license_name"] = "that-of-the-base-model"
    if hub_base(summary) is not None:
        front["base_model"] = hub_base(summary)
    front["tags"] = ["vit", "minivit", "image-classification"]
    front["model-index"] = [{"name": printable(name), "results": [result]}]
    block = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    return f"---\n{block}---\n"


def _code(text: str) -> str:
    """Return text as inline code, so that nothing in a name is read as markup."""
    return "`" + printable(text).replace("`", "'") + "`"
