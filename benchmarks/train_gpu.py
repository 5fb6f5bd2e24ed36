#!/usr/bin/env python3
"""Measure training on CUDA: memory, its limit and its prediction, deterministic resume, and several GPUs against one.

    python benchmarks/train_gpu.py --model FOLDER --data pets3 --out runs/bench

The memory, resume and multi-GPU figures come from train.py itself, run as users run it; a random ViT-B/16 of the size of
google/vit-base-patch16-224 is made for what depends on size only, on drawn photos. Prints one line a figure.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from minivit import Preprocess, ViT, ViTConfig, save_pretrained  # noqa: E402


def make_inputs(folder: Path, photos: int) -> tuple[Path, Path]:
    """Write a random ViT-B/16 and so many noisy photos of each of two colours, once."""
    model, data = folder / "vit-b16", folder / f"photos{photos}"
    if not model.exists():
        torch.manual_seed(0)
        vit = ViT(ViTConfig())
        vit.labels, vit.preprocess = (
            tuple(f"thing {i}" for i in range(vit.config.num_classes)),
            Preprocess(),
        )
        model.mkdir(parents=True)
        save_pretrained(vit, model)
    rng = np.random.default_rng(0)
    for split, n in (("train", photos), ("val", 32), ("test", 32)):
        for channel, name in enumerate(("red", "green")):
            (data / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(n):
                photo = rng.integers(0, 120, (56, 56, 3))
                photo[..., channel] += 120
                Image.fromarray(photo.astype(np.uint8)).save(data / split / name / f"{i}.png")
    return model, data


def train(*flags: object, processes: int = 1, more: tuple[str, ...] = ()) -> subprocess.Popen:
    start = (
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), *more]
        if processes > 1
        else [sys.executable]
    )
    command = [*start, str(ROOT / "train.py"), *map(str, flags)]
    print("$", " ".join(command[1:]), flush=True)
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )


def ended(process: subprocess.Popen) -> str:
    out, err = process.communicate()
    if process.returncode:
        print(f"  exit code {process.returncode}: {err[-1500:]}")
    return out


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def memory(model: Path, data: Path, out: Path) -> None:
    """Predicted, measured and allowed GiB of ViT-B/16, blocks 10-11, batch 64."""
    for name, flags in {
        "bf16": ("--amp", "bf16"),
        "bf16, micro-batches of 8": ("--amp", "bf16", "--micro-batch", 8),
        "float32": ("--amp", "off"),
        "float32, all blocks, --memory-gib 4": (
            "--amp",
            "off",
            "--blocks",
            "all",
            "--memory-gib",
            4,
        ),
        "float32, all blocks, --memory-gib 16": (
            "--amp",
            "off",
            "--blocks",
            "all",
            "--memory-gib",
            16,
            "--batch-size",
            256,
        ),
    }.items():
        run = out / f"memory {name}"
        printed = ended(
            train("--model", model, "--data", data, "--epochs", 1, "--out", run, *flags)
        )
        predicted = next(
            (line for line in printed.splitlines() if line.startswith("up to ")), "no prediction"
        )
        print(
            f"memory, {name}: {predicted}; measured {json.loads((run / 'summary.json').read_text())['peak_gib']:.2f} GiB"
        )


def resume(model: Path, data: Path, out: Path, amp: str) -> None:
    """Stop a deterministic run with SIGTERM in its second epoch, go on, and compare the bytes."""
    flags = (
        "--model",
        model,
        "--data",
        data,
        "--epochs",
        4,
        "--batch-size",
        32,
        "--amp",
        amp,
        "--deterministic",
    )
    ended(train(*flags, "--out", out / f"straight {amp}"))
    process = train(*flags, "--out", out / f"stopped {amp}")
    for line in process.stdout:
        if line.startswith("epoch 1/"):
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            break
    process.communicate()
    ended(train(*flags, "--out", out / f"stopped {amp}", "--resume"))
    a, b = (
        (out / f"{name} {amp}" / "model.safetensors").read_bytes()
        for name in ("straight", "stopped")
    )
    print(f"resume, {amp}: exit code {process.returncode}, bytes {'equal' if a == b else 'DIFFER'}")


def several(model: Path, data: Path, out: Path, real: tuple[Path, Path] | None) -> None:
    """Loss curve, images/s and a killed rank of all GPUs against one."""
    gpus = torch.cuda.device_count()
    for batch in (64, 256):  # of each GPU
        speed = {}
        for n in (1, gpus):
            flags = (
                "--model",
                model,
                "--data",
                data,
                "--epochs",
                6,
                "--batch-size",
                batch * n,
                "--amp",
                "bf16",
            )
            ended(train(*flags, "--out", out / f"speed {batch} {n}", processes=n))
            speed[n] = statistics.median(
                row["images_per_s"] for row in rows(out / f"speed {batch} {n}")[1:]
            )
        shown = {n: round(found) for n, found in speed.items()}
        print(
            f"images/s at {batch} a GPU, by GPUs: {shown}, {speed[gpus] / speed[1]:.2f} times one GPU"
        )
    known = (
        "--model",
        real[0] if real else model,
        "--data",
        real[1] if real else data,
        "--epochs",
        6,
        "--batch-size",
        32,
    )
    for n in (1, gpus):
        ended(train(*known, "--amp", "off", "--out", out / f"curve {n}", processes=n))
    gap = max(
        abs(a["loss"] - b["loss"])
        for a, b in zip(rows(out / "curve 1"), rows(out / f"curve {gpus}"))
    )
    tests = [
        json.loads((out / f"curve {n}" / "summary.json").read_text())["test_accuracy"]
        for n in (1, gpus)
    ]
    print(
        f"loss curves of 1 and {gpus} GPUs differ by at most {gap:.1e}; test accuracy {tests[0]:.4f} and {tests[1]:.4f}"
    )
    more = ("--max-restarts", "1")
    process = train(
        *known, "--amp", "off", "--out", out / "killed", "--resume", processes=gpus, more=more
    )
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            break
    workers = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    started = time.perf_counter()
    os.kill(int(workers[-1]), signal.SIGKILL)
    last = ended(process).splitlines()[-1:]
    print(
        f"a killed rank: exit code {process.returncode} after {time.perf_counter() - started:.0f} s more; {last}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--model", type=Path, help="trained weights for the loss curves; none: the random ViT-B/16"
    )
    parser.add_argument(
        "--data", type=Path, help="real photos for the loss curves; none: drawn ones"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    print(
        f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, torch {torch.__version__}"
    )
    model, data = make_inputs(args.out, 1024 if torch.cuda.device_count() == 1 else 4096)
    if torch.cuda.device_count() == 1:
        memory(model, data, args.out)
        for amp in ("bf16", "fp16", "off"):
            resume(model, data, args.out, amp)
    else:
        several(
            model, data, args.out, (args.model, args.data) if args.model and args.data else None
        )


if __name__ == "__main__":
    main()
