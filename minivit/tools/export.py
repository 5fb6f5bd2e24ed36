"""Export: a finished run under the names that another library reads."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import cli


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser("export", description=__doc__)
    parser.add_argument("model", metavar="DIR", help="a run, or any model that minivit reads")
    parser.add_argument(
        "--to", choices=("timm",), required=True, help="whose names; written into DIR/timm"
    )
    parser.add_argument("--out", metavar="DIR", help="where else to write; none: DIR/timm")
    return cli.run(export, parser, argv)


def export(args: argparse.Namespace) -> int:
    from ..checkpoints import weights
    from ..checkpoints.configs import timm_config, timm_family
    from ..checkpoints.tensors import save_tensors
    from ..errors import UserError
    from ..system.files import write_json

    if not args.out and not Path(args.model).is_dir():
        raise UserError(f"{args.model}: not a folder to write into; say where with --out DIR")
    model, out = weights.load_pretrained(args.model), Path(args.out or Path(args.model, args.to))
    config, c, path = timm_config(model), model.config, out / "model.safetensors"
    out.mkdir(parents=True, exist_ok=True)
    save_tensors(path, weights.tensors_as(model, timm_family(c), resample=True), {"format": "pt"})
    write_json(out / "config.json", config)
    if c.eps != 1e-6:
        agree = "logits agree to about 1e-5 of their size"
        print(f"timm's norms have an eps of 1e-6, this model's {c.eps}: {agree}", file=sys.stderr)
    more = "".join(f", {key}={value!r}" for key, value in config["model_args"].items())
    print(
        f"timm.create_model({config['architecture']!r}, num_classes={c.num_classes}{more}, checkpoint_path={str(path)!r})"
    )
    return 0
