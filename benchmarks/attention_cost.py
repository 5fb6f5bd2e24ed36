"""What attention costs on top of the logits: ViT-B/16, blocks 8 to 11, on a GPU if there is one.

    python benchmarks/attention_cost.py [--batch 64] [--rounds 15]

In each round every variant runs three times, one variant after the other. Times are medians, and
ratios are medians over the rounds. Weights and images are random.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from results import Figure, dtype_name, figure_of, parse, record
from torch import Tensor
from workloads import attention_cost

from minivit import ViT, ViTConfig
from minivit.attention import method_rows

FORWARDS = 3  # between two waits for the device
WARM_UP = 3  # rounds that do not count
BLOCKS = range(8, 12)


def logits_alone(model: ViT, images: Tensor) -> tuple[Tensor, None]:
    return model(images), None


def class_token_rows(model: ViT, images: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    return model.forward_with_attention(images, BLOCKS, queries=[0])


def all_rows(model: ViT, images: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    return model.forward_with_attention(images, BLOCKS)


def rollout(model: ViT, images: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    return method_rows(model, images, BLOCKS, method="rollout")


def relevance(model: ViT, images: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    return method_rows(model, images, BLOCKS, method="relevance")


VARIANTS = {
    "logits alone": logits_alone,
    "class token's rows": class_token_rows,
    "all rows": all_rows,
    "rollout of all blocks": rollout,
    "relevance": relevance,
}


def measure(compute: Callable, model: ViT, images: Tensor) -> tuple[float, float, Tensor]:
    """Return the seconds of a forward pass, the GPU's peak memory in GiB, and the logits."""
    if images.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    started = time.perf_counter()
    with torch.inference_mode():
        for _ in range(FORWARDS):
            result = compute(model, images)
    peak_gib = 0.0
    if images.is_cuda:
        torch.cuda.synchronize()
        peak_gib = torch.cuda.max_memory_allocated() / 2**30
    seconds = (time.perf_counter() - started) / FORWARDS
    return seconds, peak_gib, result[0]


def compare(model: ViT, images: Tensor, rounds: int) -> dict[str, Figure]:
    """Measure all variants in turn; print a line for each, and return the figures."""
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    peaks: dict[str, float] = {}
    logits: dict[str, Tensor] = {}
    for i in range(WARM_UP + rounds):
        for name, compute in VARIANTS.items():
            seconds, peaks[name], logits[name] = measure(compute, model, images)
            if i >= WARM_UP:
                times[name].append(seconds)
    precision = dtype_name(model.cls_token.dtype)
    figures = {}
    for name in VARIANTS:
        ratios = [a / b for a, b in zip(times[name], times["logits alone"])]
        speed = figure_of([len(images) / seconds for seconds in times[name]], "images/s")
        ratio = figure_of(ratios, "times")
        gap = (logits[name] - logits["logits alone"]).abs().max().item()
        key = f"{precision}, {name}"
        figures[f"{key}, speed"] = speed
        figures[f"{key}, time against logits alone"] = ratio
        figures[f"{key}, largest difference of a logit"] = figure_of([gap], "logits")
        memory = ""
        if images.is_cuda:
            figures[f"{key}, device memory"] = figure_of([peaks[name]], "GiB")
            memory = f", {peaks[name]:.2f} GiB"
        print(
            f"{precision:9} {name:22} {speed.median:8,.1f} images/s, "
            f"{ratio.median:.2f} of the time{memory}, "
            f"logits {'identical' if gap == 0 else f'differ by up to {gap:.1e}'}"
        )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    args = parse(parser)
    device = torch.device("cpu")
    dtypes = [torch.float32]
    if torch.cuda.is_available():
        device = torch.device("cuda")
        dtypes += [torch.bfloat16, torch.float16]
    torch.manual_seed(0)
    model = ViT(ViTConfig()).eval().to(device)
    images = torch.randn(args.batch, 3, 224, 224, device=device)
    figures: dict[str, Figure] = {}
    for dtype in dtypes:
        # The weights in float16 are rounded to bfloat16 before, which is no matter for random ones.
        model.to(dtype)
        figures |= compare(model, images, args.rounds)
    record(args, device, attention_cost(args.batch, device.type), figures)


if __name__ == "__main__":
    main()
