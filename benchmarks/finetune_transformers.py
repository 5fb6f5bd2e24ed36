"""What a user of transformers writes to fine-tune blocks 10 and 11 of a ViT on class folders.

It trains on the photos in DATA/train and evaluates those in DATA/test. The flags tune it: mixed
precision, larger batches, more workers that stay between epochs, photos resized before they are
rotated, and only one evaluation. It prints a line of JSON at the end.
"""

from __future__ import annotations

import argparse
import json
import re

import torch
from torch import nn
from torchvision.datasets import ImageFolder
from torchvision.transforms import (
    Compose,
    Normalize,
    RandomHorizontalFlip,
    RandomRotation,
    Resize,
    ToTensor,
)
from transformers import (
    EvalPrediction,
    Trainer,
    TrainingArguments,
    ViTForImageClassification,
    ViTImageProcessor,
)


def freeze(model: nn.Module) -> None:
    """Freeze all but blocks 10 and 11, the final norm and the classifier.

    It knows the names of all versions of transformers, and timm's.
    """
    for name, parameter in model.named_parameters():
        block = re.search(r"\b(?:layers?|blocks)\.(\d+)\.", name)
        is_last_block = block is not None and int(block[1]) in (10, 11)
        is_after_blocks = name.startswith(("vit.layernorm.", "classifier.", "norm.", "head."))
        parameter.requires_grad_(is_last_block or is_after_blocks)


def collate(examples: list) -> dict[str, torch.Tensor]:
    images, labels = zip(*examples, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    is_right = prediction.predictions.argmax(1) == prediction.label_ids
    return {"accuracy": float(is_right.mean())}


def load_photos(
    data: str, processor: ViTImageProcessor, resize_first: bool
) -> tuple[ImageFolder, ImageFolder]:
    """Return the training photos, with augmentation, and the test photos."""
    resize = Resize((processor.size["height"], processor.size["width"]))
    to_tensor = [ToTensor(), Normalize(processor.image_mean, processor.image_std)]
    augment = [RandomHorizontalFlip(), RandomRotation(10)]
    augment = [resize, *augment] if resize_first else [*augment, resize]
    train = ImageFolder(f"{data}/train", Compose([*augment, *to_tensor]))
    test = ImageFolder(f"{data}/test", Compose([resize, *to_tensor]))
    return train, test


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, default=4)
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--bf16", action="store_true")
    precision.add_argument("--fp16", action="store_true")
    parser.add_argument(
        "--persistent", action="store_true", help="keep the workers from one epoch to the next"
    )
    parser.add_argument(
        "--resize-first", action="store_true", help="rotate small photos, not large ones"
    )
    parser.add_argument(
        "--eval-once", action="store_true", help="evaluate at the end only, not after each epoch"
    )
    args = parser.parse_args()

    processor = ViTImageProcessor.from_pretrained(args.model)
    train, test = load_photos(args.data, processor, args.resize_first)
    model = ViTForImageClassification.from_pretrained(
        args.model, num_labels=len(train.classes), ignore_mismatched_sizes=True
    )
    freeze(model)
    training = TrainingArguments(
        output_dir=args.out,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=args.batch,
        learning_rate=1e-4,
        bf16=args.bf16,
        fp16=args.fp16,
        eval_strategy="no" if args.eval_once else "epoch",
        save_strategy="epoch",
        dataloader_num_workers=args.workers,
        dataloader_persistent_workers=args.persistent,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=args.device == "cpu",
    )
    trainer = Trainer(
        model,
        training,
        data_collator=collate,
        train_dataset=train,
        eval_dataset=test,
        processing_class=processor,
        compute_metrics=accuracy,
    )
    trainer.train()
    scores = trainer.evaluate()
    trainer.save_model()
    peak_gib = torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else None
    print(json.dumps({"accuracy": scores["eval_accuracy"], "peak_gib": peak_gib}))


if __name__ == "__main__":
    main()
