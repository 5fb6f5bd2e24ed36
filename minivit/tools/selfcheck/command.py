"""The command line of `selfcheck`. The checks are in checks.py and published.py."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from ... import cli
from ...errors import UserError
from ...system import torch_start


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(
        "selfcheck", description="Check the numerics of attention and training on this machine."
    )
    parser.add_argument(
        "--model",
        metavar="ID|DIR|demo",
        help="the checkpoint to run the checks on (default: demo); with --published, one of those "
        "with published numbers, or a copy of it (default: all)",
    )
    parser.add_argument(
        "--published",
        action="store_true",
        help="compare the real weights' outputs for a photo with the numbers in transformers' "
        "tests; downloads 1.1 GB once",
    )
    parser.add_argument(
        "--photo",
        metavar="FILE",
        help="with --published: the photo, COCO's val2017/000000039769.jpg (default: download it)",
    )
    parser.add_device_flags()
    return cli.run(selfcheck, parser, argv)


def selfcheck(args: argparse.Namespace) -> int:
    """Print a table of the checks, and return 1 if a difference exceeds its bound.

    That is a defect of minivit, or of the libraries that compute on this device.
    """
    torch_start.start(args.device)
    if args.published:
        from .published import compare_published

        return compare_published(args)
    if args.photo:
        raise UserError("--photo is the photo of --published; expected both, or neither")

    import torch

    from ...checkpoints.weights import load_pretrained
    from ...system.device import be_deterministic, pick_amp, pick_device
    from .checks import CLASSES, run_checks

    started = time.perf_counter()
    device = pick_device(args.device)
    amp = pick_amp(args.amp, device)
    be_deterministic()
    torch.manual_seed(0)
    source = args.model or "demo"
    model = load_pretrained(source, labels=CLASSES).to(device)
    # A new head is all zeros, and with logits of zeros there is nothing to compare.
    torch.nn.init.trunc_normal_(model.get_parameter("head.weight"), std=0.02)
    images = torch.randn(7, 3, *model.config.img_size, device=device)

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device
    print(f"{source} on {name}, torch {torch.__version__}\n")
    print(f"{'':58} {'measured':>9} {'bound':>9}")
    num_failed = 0
    for description, measured, bound in run_checks(model, images, amp):
        passed = measured <= bound  # This is False for NaN, too.
        if not passed:
            num_failed += 1
        result = "ok" if passed else "FAILED"
        print(f"{description:58} {measured:9.1e} {bound:9.0e}  {result}", flush=True)
    summary = f"{num_failed} FAILED" if num_failed else "all within their bounds"
    print(f"\n{summary}, in {time.perf_counter() - started:.0f} s")
    return 1 if num_failed else 0
