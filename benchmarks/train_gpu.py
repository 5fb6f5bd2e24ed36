#!/usr/bin/env python3
"""Measure training on CUDA: memory, deterministic resume, and several GPUs against one.

    python benchmarks/train_gpu.py --model FOLDER --data pets3 --out runs/bench

All figures come from train.py itself, run as users run it. What depends on sizes only is measured
with a random ViT-B/16, as large as google/vit-base-patch16-224, and with noisy photos. On one GPU,
these are the memory that training takes, its prediction and its limit, and the bytes of a run that
was resumed; on several, their speed, their loss curves, and what becomes of a run whose process is
killed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from results import ROOT, Figure, figure_of, parse, record
from workloads import train_gpu

from minivit import Preprocess, ViT, ViTConfig, save_pretrained

ALL_BLOCKS_IN_FLOAT32 = ("--amp", "off", "--blocks", "all")
MEMORY_CASES: dict[str, tuple[object, ...]] = {
    "bf16": ("--amp", "bf16"),
    "bf16, micro-batches of 8": ("--amp", "bf16", "--micro-batch", 8),
    "float32": ("--amp", "off"),
    "float32, all blocks, --memory-gib 4": (*ALL_BLOCKS_IN_FLOAT32, "--memory-gib", 4),
    "float32, all blocks, --memory-gib 16": (
        *ALL_BLOCKS_IN_FLOAT32,
        "--memory-gib",
        16,
        "--batch-size",
        256,
    ),
}


def write_model(folder: Path) -> None:
    """Write a random ViT-B/16."""
    torch.manual_seed(0)
    model = ViT(ViTConfig())
    model.labels = tuple(f"thing {i}" for i in range(model.config.num_classes))
    model.preprocess = Preprocess()
    folder.mkdir(parents=True)
    save_pretrained(model, folder)


def write_photos(data: Path, num_train: int) -> None:
    """Write so many noisy training photos of each of two colours, and 32 for each other split."""
    rng = np.random.default_rng(0)
    for split, n in (("train", num_train), ("val", 32), ("test", 32)):
        for channel, name in enumerate(("red", "green")):
            folder = data / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(n):
                photo = rng.integers(0, 120, (56, 56, 3))
                photo[..., channel] += 120
                Image.fromarray(photo.astype(np.uint8)).save(folder / f"{i}.png")


def start_training(
    *flags: object, processes: int = 1, launcher_flags: tuple[str, ...] = ()
) -> subprocess.Popen:
    """Start train.py, under torchrun if there is to be more than one process."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        command += launcher_flags
    command += [str(ROOT / "train.py"), *map(str, flags)]
    print("$", " ".join(command[1:]), flush=True)
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )


def wait_for_end(process: subprocess.Popen) -> str:
    """Return what the rest of a run prints; print the end of its stderr if it fails."""
    out, err = process.communicate()
    if process.returncode:
        print(f"  exit code {process.returncode}: {err[-1500:]}")
    return out


def wait_for_epoch(process: subprocess.Popen, epoch: int) -> None:
    """Read what a run prints until it reports an epoch."""
    for line in process.stdout:
        if line.startswith(f"epoch {epoch}/"):
            break


def read_rows(run: Path) -> list[dict]:
    """Return the rows of a run's epochs, without that of the head alone."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["epoch"] > 0]


def read_summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def measure_memory(model: Path, data: Path, out: Path) -> dict[str, Figure]:
    """Print and return the GiB that ViT-B/16 needs by prediction and by measurement."""
    figures = {}
    for name, flags in MEMORY_CASES.items():
        run = out / f"memory {name}"
        process = start_training(
            "--model", model, "--data", data, "--epochs", 1, "--out", run, *flags
        )
        prediction = re.search(r"(?m)^up to ([\d.]+) GiB.*", wait_for_end(process))
        said = "no prediction"
        if prediction is not None:
            said = prediction[0]
            figures[f"memory, {name}, predicted"] = figure_of([float(prediction[1])], "GiB")
        measured = figure_of([read_summary(run)["peak_gib"]], "GiB")
        figures[f"memory, {name}, measured"] = measured
        print(f"memory, {name}: {said}; measured {measured.median:.2f} GiB")
    return figures


def compare_resumed(model: Path, data: Path, out: Path, amp: str) -> dict[str, Figure]:
    """Stop a deterministic run with SIGTERM in its second epoch, resume it, compare the bytes."""
    straight = out / f"straight {amp}"
    stopped = out / f"stopped {amp}"
    flags = ("--model", model, "--data", data, "--epochs", 4, "--batch-size", 32)
    flags += ("--amp", amp, "--deterministic")
    wait_for_end(start_training(*flags, "--out", straight))
    process = start_training(*flags, "--out", stopped)
    wait_for_epoch(process, 1)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    wait_for_end(start_training(*flags, "--out", stopped, "--resume"))
    weights = "model.safetensors"
    is_equal = (straight / weights).read_bytes() == (stopped / weights).read_bytes()
    print(
        f"resume, {amp}: exit code {process.returncode}, bytes {'equal' if is_equal else 'DIFFER'}"
    )
    share = figure_of([float(is_equal)], "fraction")
    return {f"resume, {amp}, runs that ended in the same bytes": share}


def compare_speed(model: Path, data: Path, out: Path, gpus: int) -> dict[str, Figure]:
    """Print and return the images a second of one GPU and of all, at two batch sizes."""
    figures = {}
    for batch in (64, 256):  # of each GPU
        speed = {}
        for n in (1, gpus):
            run = out / f"speed {batch} {n}"
            flags = ("--model", model, "--data", data, "--epochs", 6, "--batch-size", batch * n)
            flags += ("--amp", "bf16", "--out", run)
            wait_for_end(start_training(*flags, processes=n))
            speeds = [row["images_per_s"] for row in read_rows(run)[1:]]
            speed[n] = statistics.median(speeds)
            figures[f"{batch} photos a GPU, {n} GPUs, speed"] = figure_of(speeds, "images/s")
        gain = figure_of([speed[gpus] / speed[1]], "times")
        figures[f"{batch} photos a GPU, speed against one GPU"] = gain
        rounded = {n: round(images_per_s) for n, images_per_s in speed.items()}
        print(f"images/s at {batch} a GPU, by GPUs: {rounded}, {gain.median:.2f} times one GPU")
    return figures


def compare_curves(model: Path, data: Path, out: Path, gpus: int) -> dict[str, Figure]:
    """Measure how far the loss curves of one GPU and of all differ, and what a killed rank does."""
    flags = ("--model", model, "--data", data, "--epochs", 6, "--batch-size", 32, "--amp", "off")
    runs = {n: out / f"curve {n}" for n in (1, gpus)}
    for n, run in runs.items():
        wait_for_end(start_training(*flags, "--out", run, processes=n))
    pairs = zip(read_rows(runs[1]), read_rows(runs[gpus]))
    gap = max(abs(a["loss"] - b["loss"]) for a, b in pairs)
    accuracy = {n: read_summary(run)["test_accuracy"] for n, run in runs.items()}
    print(
        f"loss curves of 1 and {gpus} GPUs differ by at most {gap:.1e}; "
        f"test accuracy {accuracy[1]:.4f} and {accuracy[gpus]:.4f}"
    )
    process = start_training(
        *flags,
        "--out",
        out / "killed",
        "--resume",
        processes=gpus,
        launcher_flags=("--max-restarts", "1"),
    )
    wait_for_epoch(process, 2)
    children = ["pgrep", "-P", str(process.pid)]
    ranks = subprocess.run(children, capture_output=True, text=True).stdout.split()
    started = time.perf_counter()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    last_line = wait_for_end(process).splitlines()[-1:]
    seconds = time.perf_counter() - started
    print(f"a killed rank: exit code {process.returncode} after {seconds:.0f} s more; {last_line}")
    return {
        "largest difference of the losses of an epoch": figure_of([gap], "times"),
        "test accuracy, 1 GPU": figure_of([accuracy[1]], "fraction"),
        "test accuracy, all GPUs": figure_of([accuracy[gpus]], "fraction"),
        "a killed process, time to the end": figure_of([seconds], "s"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        type=Path,
        help="trained weights for the loss curves; default: the random ViT-B/16",
    )
    parser.add_argument(
        "--data", type=Path, help="real photos for the loss curves; default: noisy ones"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    args = parse(parser)
    gpus = torch.cuda.device_count()
    if gpus == 0:
        sys.exit("no GPU found: this benchmark needs at least one CUDA device")
    print(f"{gpus} x {torch.cuda.get_device_name()}, torch {torch.__version__}")
    num_train = 1024 if gpus == 1 else 4096
    model = args.out / "vit-b16"
    data = args.out / f"photos{num_train}"
    if not model.exists():
        write_model(model)
    write_photos(data, num_train)
    if gpus == 1:
        figures = measure_memory(model, data, args.out)
        for amp in ("bf16", "fp16", "off"):
            figures |= compare_resumed(model, data, args.out, amp)
    else:
        figures = compare_speed(model, data, args.out, gpus)
        has_own = args.model is not None and args.data is not None
        curve_model = args.model if has_own else model
        curve_data = args.data if has_own else data
        figures |= compare_curves(curve_model, curve_data, args.out, gpus)
    workload = train_gpu(gpus)
    record(args, torch.device("cuda"), workload, figures)


if __name__ == "__main__":
    main()
