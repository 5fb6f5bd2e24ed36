#!/usr/bin/env python3
"""Fine-tune the last blocks of a Vision Transformer on Oxford-IIIT Pet, or on your own folders of photos."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minivit import __version__, cli  # torch comes in with the job, so that --help and a mistyped flag answer at once

if TYPE_CHECKING:
    import torch

    from minivit import ViT
    from minivit.data import Data

NUM_SHOWN = 24  # photos in predictions.png
RUN_FILES = ("model.safetensors", "config.json", "preprocessor_config.json", "tail.safetensors", "metrics.jsonl")
RUN_FILES += ("summary.json", "curves.png", "confusion.png", "predictions.png", "README.md")


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="train.py", description=__doc__)
    add = parser.add_argument
    add("--model", default=cli.BASE_MODEL, metavar="ID|DIR|FILE|demo", help="a Hub id, a folder, a file, or what comes along")
    add("--revision", metavar="REV", help="Hub revision; none: the default branch")
    add("--img-size", type=cli.image_size, metavar="N|HxW", help="another input size than the checkpoint's, in pixels")
    add("--data", default="data", metavar="DIR", help="holds oxford-iiit-pet (downloaded there if absent) or class folders")
    add("--blocks", default="10-11", metavar="RANGE", help="blocks to train besides norm and head: 8-11, 10,11, all, none")
    add("--epochs", type=cli.at_least(1), default=5, help="more for few photos")
    add("--batch-size", type=cli.at_least(1), default=64, help="photos per optimiser step")
    add("--micro-batch", type=cli.at_least(1), help="photos per forward pass, to save memory; none: the batch size")
    add("--lr", type=cli.positive, default=1e-4, help="peak learning rate")
    parser.add_device_flags()
    add("--workers", type=cli.at_least(1), default=os.cpu_count(), help="threads that decode photos")
    add("--seed", type=cli.at_least(0), default=0, help="of the validation split, the data order and augmentation")
    add("--skip-bad", action="store_true", help="go on without photos that cannot be read")
    add("--out", default=cli.RUN_DIR, metavar="DIR", help="where everything is written")
    add("--push-to-hub", metavar="REPO", help="upload the finished folder with its model card, as owner/name")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(train, make_parser(), argv)


def train(args: argparse.Namespace) -> int:
    """The whole job: data and model in, epochs, the best one's weights written and read back, the test, figures."""
    import torch

    from minivit import card, data, doctor, files, hub, loop, optim, weights
    from minivit.device import pick_amp, pick_device
    from minivit.errors import UserError

    started, out, device = time.perf_counter(), Path(args.out), pick_device(args.device)
    amp = pick_amp(args.amp, device)
    if args.out.encode(errors="ignore").decode() != args.out:
        raise UserError(f"{out}: expected a name in UTF-8, without which safetensors reads no file")
    out.mkdir(parents=True, exist_ok=True)
    if args.push_to_hub:
        hub.prepare_push(args.push_to_hub)
    torch.manual_seed(args.seed)

    photos = data.load_data(args.data, seed=args.seed)
    for finding in doctor.quick_check(args.data):
        print(finding, file=sys.stderr)
    model = weights.load_pretrained(args.model, revision=args.revision, labels=photos.classes, img_size=args.img_size)
    cut = optim.freeze_except(model, optim.parse_blocks(args.blocks, model.config.depth))
    print(describe(model, photos, device, amp), flush=True)
    photos, (train, val, test) = data.decode_all(photos, model.preprocess, workers=args.workers, skip_bad=args.skip_bad)

    keep_earlier_run(out)
    rows, tail = [], out / "tail.safetensors"
    for row in loop.fit(
        model.to(device),
        train,
        val,
        cut=cut,
        amp=amp,
        epochs=args.epochs,
        batch_size=args.batch_size,
        micro_batch=args.micro_batch or args.batch_size,
        lr=args.lr,
        seed=args.seed,
    ):
        report_epoch(row, args.epochs, out)
        rows.append(row)
        best = max(rows, key=rank)
        if row is best:
            weights.save_tail(model, tail)
    weights.load_tail(model, tail)
    weights.save_pretrained(model, out)

    # The test is of what was written: read back from disk, and checked to validate as it did when it was best.
    reread = weights.load_pretrained(out).to(device)
    again = loop.score(loop.predict_photos(reread, val[0], amp=amp), val[1])
    if abs(again["loss"] - best["val_loss"]) > 1e-3 * max(1, best["val_loss"]):
        raise RuntimeError(f"{out}: read back, the weights validate at a loss of {again['loss']}, not {best['val_loss']}")
    logits = loop.predict_photos(reread, test[0], amp=amp)
    scores = loop.score(logits, test[1])
    draw_figures(out, rows, best["epoch"], photos, logits)
    summary = {f"test_{name}": value for name, value in scores.items()} | {
        "test_photos": len(test[1]),
        "best_epoch": best["epoch"],
        "trainable_parameters": sum(p.numel() for p in optim.trainable(model).values()),
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "seconds": time.perf_counter() - started,
        "peak_gib": loop.peak_gib(device),
        "base": model.origin.source,
        "base_commit": model.origin.commit,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": str(amp or torch.float32).removeprefix("torch."),
        "settings": vars(args),
        "classes": list(photos.classes),
        "versions": {"minivit": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    files.write_json(out / "summary.json", summary)
    pets = any(photos.train.paths[0].parent.parent.glob("annotations/trainval.txt"))
    with files.whole_file(out / "README.md") as partial:
        text = card.model_card(summary, name=args.push_to_hub or out.resolve().name, pets=pets)
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    if args.push_to_hub:
        print(f"pushed: {hub.push(out, args.push_to_hub, RUN_FILES)}", file=sys.stderr)
    right = f"{round(scores['accuracy'] * len(test[1]))}/{len(test[1])}"
    print(
        f"test accuracy {scores['accuracy']:.4f} ({right}) · macro F1 {scores['macro_f1']:.4f} · "
        f"best epoch {best['epoch']} · {out}"
    )
    return 0


def describe(model: ViT, data: Data, device: torch.device, amp: torch.dtype | None) -> str:
    """Say what trains, on which photos, and where, as a table."""
    c = model.config
    parts = {"embeddings": [model.cls_token, model.pos_embed, *model.patch_embed.parameters()]}
    for _, same in itertools.groupby(range(c.depth), lambda i: model.blocks[i].norm1.weight.requires_grad):
        run = list(same)
        name = f"blocks {run[0]}-{run[-1]}" if len(run) > 1 else f"block {run[0]}"
        parts[name] = [parameter for i in run for parameter in model.blocks[i].parameters()]
    parts |= {"norm": list(model.norm.parameters()), "head": list(model.head.parameters()), "all": list(model.parameters())}
    lines = [
        f"{model.origin.source}: {c.depth} blocks, {c.num_heads} heads, {c.embed_dim} wide, "
        f"{c.img_size[0]} x {c.img_size[1]} pixels in patches of {c.patch_size}",
        f"{len(data.classes)} classes; photos: {len(data.train):,} training, {len(data.val):,} validation, "
        f"{len(data.test):,} test",
        f"on {device}, {'mixed precision with ' + str(amp).removeprefix('torch.') if amp else 'float32'}",
        "",
        f"{'':12} {'parameters':>12} {'trained':>12}",
    ]
    for name, parameters in parts.items():
        total, trained = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
        lines.append(f"{name:12} {total:12,} {trained:12,}")
    return "\n".join(lines) + "\n"


def keep_earlier_run(out: Path) -> None:
    """Move what an earlier run wrote into out/earlier-N, so that nothing is lost when a new run begins."""
    if not (out / "metrics.jsonl").exists():
        return
    earlier = next(path for i in itertools.count(1) if not (path := out / f"earlier-{i}").exists())
    earlier.mkdir()
    for name in RUN_FILES:
        if (out / name).exists():
            (out / name).rename(earlier / name)
    print(f"{out} holds an earlier run: moved to {earlier}", file=sys.stderr)


def report_epoch(row: Mapping[str, float], epochs: int, out: Path) -> None:
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(
        f"epoch {row['epoch']}/{epochs} · loss {row['loss']:.4f} · "
        f"training {row['train_accuracy']:.4f} (loss {row['train_loss']:.4f}) · "
        f"validation {row['val_accuracy']:.4f} (loss {row['val_loss']:.4f}) · "
        f"{row['images_per_s']:.0f} images/s · {row['seconds']:.1f} s",
        flush=True,
    )


def rank(row: Mapping[str, float]) -> tuple[float, float]:
    """The best epoch has the highest validation accuracy; of equals the last, which a lower learning rate refined."""
    return row["val_accuracy"], row["epoch"]


def draw_figures(out: Path, rows: Sequence[Mapping[str, float]], best_epoch: int, data: Data, logits: torch.Tensor) -> None:
    """Draw curves.png, confusion.png and predictions.png from the test's logits (n, C)."""
    import torch

    from minivit import metrics, plots
    from minivit.photos import open_photo

    labels = torch.tensor(data.test.labels)
    confidence, predicted = logits.softmax(1).max(1)
    wrong = (predicted != labels).nonzero()[:, 0]
    right = (predicted == labels).nonzero()[:, 0]
    # The most confident mistakes, up to half of the grid, and right ones from across the classes.
    shown = wrong[confidence[wrong].argsort(descending=True)][: NUM_SHOWN // 2].tolist()
    stride = max(1, len(right) // (NUM_SHOWN - len(shown)))
    shown += right[::stride][: NUM_SHOWN - len(shown)].tolist()
    captions = [(data.classes[labels[i]], data.classes[predicted[i]], confidence[i].item()) for i in shown]
    title = f"Test photos: the most confident of {len(wrong)} wrong, and some of {len(right)} right predictions"

    plots.draw_curves(out / "curves.png", rows, best_epoch)
    confusion = metrics.confusion_matrix(predicted, labels, len(data.classes))
    plots.draw_confusion(out / "confusion.png", confusion, data.classes, f"{len(right)} of {len(labels)} test photos right")
    plots.draw_predictions(out / "predictions.png", [open_photo(data.test.paths[i]) for i in shown], captions, title)


if __name__ == "__main__":
    cli.start(main)
