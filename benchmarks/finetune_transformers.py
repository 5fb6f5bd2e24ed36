"""What a user of transformers writes to fine-tune blocks 10 and 11 of a ViT on the photos in DATA/train and DATA/test.

The flags tune it: mixed precision, larger batches, more workers that stay between epochs, photos made small before they are
turned, and only one evaluation. Prints a line of JSON at the end.
"""

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
from transformers import Trainer, TrainingArguments, ViTForImageClassification, ViTImageProcessor


def freeze(model: nn.Module) -> None:
    """Let only blocks 10 and 11, the final norm and the classifier train, whatever version or library named them."""
    for name, parameter in model.named_parameters():
        block = re.search(r"\b(?:layers?|blocks)\.(\d+)\.", name)
        last = name.startswith(("vit.layernorm.", "classifier.", "norm.", "head."))
        parameter.requires_grad_(last or bool(block and int(block[1]) in (10, 11)))


def collate(examples: list) -> dict[str, torch.Tensor]:
    images, labels = zip(*examples, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}


def accuracy(predicted) -> dict[str, float]:
    return {"accuracy": float((predicted.predictions.argmax(1) == predicted.label_ids).mean())}


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
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument(
        "--persistent", action="store_true", help="workers stay from one epoch to the next"
    )
    parser.add_argument(
        "--resize-first", action="store_true", help="turn small photos, not large ones"
    )
    parser.add_argument(
        "--eval-once", action="store_true", help="evaluate at the end only, not after each epoch"
    )
    args = parser.parse_args()

    processor = ViTImageProcessor.from_pretrained(args.model)
    resize = Resize((processor.size["height"], processor.size["width"]))
    to_tensor = [ToTensor(), Normalize(processor.image_mean, processor.image_std)]
    augment = [RandomHorizontalFlip(), RandomRotation(10)]
    augment = [resize, *augment] if args.resize_first else [*augment, resize]
    train = ImageFolder(f"{args.data}/train", Compose([*augment, *to_tensor]))
    test = ImageFolder(f"{args.data}/test", Compose([resize, *to_tensor]))
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
    found = trainer.evaluate()
    trainer.save_model()
    peak = torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else None
    print(json.dumps({"accuracy": found["eval_accuracy"], "peak_gib": peak}))


if __name__ == "__main__":
    main()
