"""Numerical self-tests on the user's own device: what is measured, against which bound.

Each check returns a relative difference, 0 for equal bits. Norms are Euclidean, over all numbers together.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .. import cli

if TYPE_CHECKING:
    import torch

    from ..model import ViT


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser("selfcheck", description=__doc__.partition(":")[0])
    parser.add_argument(
        "--model", metavar="ID|DIR|demo", default="demo", help="the checkpoint to check with"
    )
    parser.add_device_flags()
    return cli.run(check, parser, argv)


def check(args: argparse.Namespace) -> int:
    """Print the table; 1 if a bound is exceeded, which is a defect of ours or of the device's libraries."""
    import torch

    from ..checkpoints import weights
    from ..system import device

    started, on, failed = time.perf_counter(), device.pick_device(args.device), 0
    amp = device.pick_amp(args.amp, on)
    device.be_deterministic()
    torch.manual_seed(0)
    model = weights.load_pretrained(args.model, labels=[f"class {i}" for i in range(5)]).to(on)
    torch.nn.init.trunc_normal_(model.get_parameter("head.weight"), std=0.02)
    images = torch.randn(7, 3, *model.config.img_size, device=on)
    print(
        f"{args.model} on {torch.cuda.get_device_name(on) if on.type == 'cuda' else on}, torch {torch.__version__}\n"
    )
    print(f"{'':58} {'measured':>9} {'bound':>9}")
    for what, measured, bound in measure(model, images, amp):
        failed += not measured <= bound  # nor if it is not a number
        print(
            f"{what:58} {measured:9.1e} {bound:9.0e}  {'ok' if measured <= bound else 'FAILED'}",
            flush=True,
        )
    print(
        f"\n{f'{failed} FAILED' if failed else 'all as they should be'}, in {time.perf_counter() - started:.0f} s"
    )
    return 1 if failed else 0


def measure(
    model: ViT, images: torch.Tensor, amp: torch.dtype | None
) -> Iterator[tuple[str, float, float]]:
    """Yield (what, measured, bound) for each check."""
    import torch

    from ..checkpoints import weights
    from ..model import working_copy

    with torch.no_grad():
        logits, attn = model.forward_with_attention(images, [model.config.depth - 1])
        yield "logits with and without attention asked for", difference(logits, model(images)), 0.0
        yield (
            "fused against explicit attention, float32",
            explicit_attention(model, images, attn),
            1e-5,
        )
        if amp:
            low = working_copy(model, images.device, amp, train=False)
            bound = {torch.bfloat16: 5e-2, torch.float16: 1e-2}[amp]
            yield (
                f"logits in {str(amp)[6:]} against float32",
                difference(low(images).float(), logits),
                bound,
            )
    for micro_batch in (1, 3):
        what = f"gradients of micro-batches of {micro_batch} against the full batch"
        yield what, accumulation(model, images, micro_batch), 1e-5
    with tempfile.TemporaryDirectory() as folder:
        weights.save_pretrained(model, folder)
        reread = weights.load_pretrained(folder).to(images.device)
        with torch.no_grad():
            yield (
                "logits of a checkpoint written and read back",
                difference(reread(images), logits),
                0.0,
            )
        yield "weights of an interrupted run that went on", resume(model, amp, Path(folder)), 0.0


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def explicit_attention(model: ViT, images: torch.Tensor, attn: dict) -> float:
    """Compare a block's fused attention with softmax(q k) v, written out."""
    ((i, weights),) = attn.items()
    block = model.blocks[i]
    x = block.norm1(model.tokens(images, stop=i))
    B, N, D = x.shape
    v = (
        block.attn.qkv(x).view(B, N, 3, model.config.num_heads, -1)[:, :, 2].transpose(1, 2)
    )  # (B, H, N, K)
    return difference(
        block.attn(x), block.attn.proj((weights @ v).transpose(1, 2).reshape(B, N, D))
    )


def accumulation(model: ViT, images: torch.Tensor, micro_batch: int) -> float:
    """Compare the gradients (clipped) that train_step leaves for micro-batches and for the full batch."""
    import torch

    from ..model import freeze_except, trainable
    from ..training import state
    from ..training import step as loop

    labels, found = torch.arange(len(images), device=images.device) % 5, []
    for size in (len(images), micro_batch):
        twin = copy.deepcopy(model)
        freeze_except(twin, [model.config.depth - 1])
        run = state.begin(twin, amp=None, weight_decay=0.0)
        loop.train_step(
            twin, run.optimizer, run.scaler, images.__getitem__, labels, micro_batch=size, amp=None
        )
        found.append(
            torch.cat([cast(torch.Tensor, p.grad).flatten() for p in trainable(twin).values()])
        )
    return difference(found[1], found[0])


def resume(model: ViT, amp: torch.dtype | None, folder: Path) -> float:
    """Train for two epochs; the same with a stop after the first, its state written and read back: compare the weights."""
    import torch

    from ..model import freeze_except, working_copy
    from ..training import state
    from ..training import step as loop

    last = model.config.depth - 1
    photos = (
        torch.randint(256, (8, 3, *model.config.img_size), dtype=torch.uint8),
        torch.arange(8) % 5,
    )
    how: dict[str, Any] = {
        "epochs": 2,
        "batch_size": 4,
        "micro_batch": 4,
        "lr": 1e-3,
        "seed": 0,
        "amp": amp,
        "cut": last,
    }

    def begin() -> state.State:
        twin = copy.deepcopy(model)
        freeze_except(twin, [last])
        twin = working_copy(twin, model.cls_token.device, amp, train=True)
        return state.begin(twin, amp=amp, weight_decay=0.05)

    straight, stopped, resumed = begin(), begin(), begin()
    list(loop.fit(straight, photos, photos, **how))
    next(loop.fit(stopped, photos, photos, **how))
    stopped.save(folder / "state.safetensors", {})
    resumed.load(*state.read(folder / "state.safetensors", {}))
    list(loop.fit(resumed, photos, photos, **how))
    tails = [torch.cat([t.flatten() for t in run.tail().values()]) for run in (resumed, straight)]
    return difference(*tails)
