"""What attention costs beside the logits: ViT-B/16, blocks 8 to 11, a batch of 64, on a GPU if there is one.

    python benchmarks/attention_cost.py [--batch 64] [--rounds 15]

In each round every way runs three times, and the ways take turns; times are medians, ratios medians of rounds.
Weights and photos are random.
"""

import argparse
import statistics
import time

import torch

from minivit import ViT, ViTConfig
from minivit.attention import method_rows

FORWARDS = 3  # between two waits for the device
WAYS = {
    "logits alone": lambda model, x: model(x),
    "and the class token's rows": lambda model, x: model.forward_with_attention(
        x, range(8, 12), queries=[0]
    ),
    "and all rows": lambda model, x: model.forward_with_attention(x, range(8, 12)),
    "and rollout of all blocks": lambda model, x: method_rows(
        model, x, range(8, 12), method="rollout"
    ),
    "and relevance": lambda model, x: method_rows(model, x, range(8, 12), method="relevance"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    print(
        f"{time.strftime('%Y-%m-%d')}, {torch.cuda.get_device_name() if on_gpu else 'CPU'}, torch {torch.__version__}, ViT-B/16"
    )
    torch.manual_seed(0)
    model, images = (
        ViT(ViTConfig()).eval().to(device),
        torch.randn(args.batch, 3, 224, 224, device=device),
    )
    for precision in (None, torch.bfloat16, torch.float16) if on_gpu else (None,):
        model.to(
            precision or torch.float32
        )  # the last is float16, from bfloat16's rounding: no matter for random weights
        times, peaks, logits = {name: [] for name in WAYS}, {}, {}
        for i in range(args.rounds + 3):
            for name, way in WAYS.items():
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                    torch.cuda.synchronize()
                started = time.perf_counter()
                with torch.inference_mode():
                    for _ in range(FORWARDS):
                        result = way(model, images)
                if on_gpu:
                    torch.cuda.synchronize()
                    peaks[name] = torch.cuda.max_memory_allocated() / 2**30
                if i >= 3:
                    times[name].append((time.perf_counter() - started) / FORWARDS)
                logits[name] = result if name == "logits alone" else result[0]
                del result
        plain = times["logits alone"]
        for name, seconds in times.items():
            ratio = statistics.median(a / b for a, b in zip(seconds, plain))
            same = torch.equal(logits[name], logits["logits alone"])
            speed, memory = (
                args.batch / statistics.median(seconds),
                f", {peaks[name]:.2f} GiB" if on_gpu else "",
            )
            print(
                f"{str(precision or torch.float32).removeprefix('torch.'):9} {name:27} {speed:8,.1f} images/s, "
                f"{ratio:.2f} of the time{memory}, logits {'identical' if same else 'DIFFER'}"
            )


if __name__ == "__main__":
    main()
