"""The command line of `selfcheck`. The checks are in checks.py."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from ... import cli


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(
        "selfcheck", description="Check the numerics of attention and training on this machine."
    )
    parser.add_argument(
        "--model", metavar="ID|DIR|demo", default="demo", help="the checkpoint to run the checks on"
    )
    parser.add_device_flags()
    return cli.run(selfcheck, parser, argv)


def selfcheck(args: argparse.Namespace) -> int:
    """Print a table of the checks, and return 1 if a difference exceeds its bound.

    That is a defect of minivit, or of the libraries that compute on this device.
    """
    import torch

    from ...checkpoints.weights import load_pretrained
    from ...system.device import be_deterministic, pick_amp, pick_device
    from .checks import CLASSES, run_checks

    started = time.perf_counter()
    device = pick_device(args.device)
    amp = pick_amp(args.amp, device)
    be_deterministic()
    torch.manual_seed(0)
    model = load_pretrained(args.model, labels=CLASSES).to(device)
    # A new head is all zeros, and with logits of zeros there is nothing to compare.
    torch.nn.init.trunc_normal_(model.get_parameter("head.weight"), std=0.02)
    images = torch.randn(7, 3, *model.config.img_size, device=device)

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device
    print(f"{args.model} on {name}, torch {torch.__version__}\n")
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
