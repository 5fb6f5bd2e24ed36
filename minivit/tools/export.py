"""Export a model under the names that another library reads."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .. import cli
from ..system import torch_start

DESCRIPTION = "Export a model under the names that another library reads."


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser("export", description=DESCRIPTION)
    parser.add_argument("model", metavar="DIR", help="a run, or any model that minivit reads")
    parser.add_argument("--to", choices=("timm",), required=True, help="the library to export to")
    parser.add_argument(
        "--out", type=cli.folder, metavar="DIR", help="folder to write to; default: DIR/timm"
    )
    return cli.run(export, parser, argv)


def export(args: argparse.Namespace) -> int:
    torch_start.import_torch()
    from ..checkpoints import weights
    from ..checkpoints.tensors import save_tensors
    from ..checkpoints.timm_configs import as_timm_crops, timm_config, timm_family
    from ..errors import UserError
    from ..system.files import refuse_to_overwrite, write_json

    if args.out:
        out = Path(args.out)
    elif Path(args.model).is_dir():
        out = Path(args.model, args.to)
    else:
        raise UserError(f"{args.model}: not a folder to write to; give one with --out DIR")
    model = weights.load_pretrained(args.model)
    sizes = model.config
    config = timm_config(model)
    path = out / "model.safetensors"
    if not _holds_export(out, config):
        refuse_to_overwrite(out, ["model.safetensors", "config.json"])
    out.mkdir(parents=True, exist_ok=True)
    tensors = weights.tensors_as(model, timm_family(sizes), resample=True)
    save_tensors(path, tensors, {"format": "pt"})
    write_json(out / "config.json", config)
    # What timm does not have is read back as timm has it.
    model.config = replace(sizes, eps=1e-6)
    model.preprocess = as_timm_crops(model.preprocess)
    weights.require_same(model, weights.load_pretrained(out), out)
    if sizes.eps != 1e-6:
        print(
            f"timm's norms have an eps of 1e-6, this model's {sizes.eps}: "
            "logits agree to about 1e-5 of their size",
            file=sys.stderr,
        )
    settings = {"num_classes": sizes.num_classes, **config["model_args"]}
    settings["checkpoint_path"] = str(path)
    arguments = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    print(f"timm.create_model({config['architecture']!r}, {arguments})")
    return 0


def _holds_export(out: Path, config: dict) -> bool:
    """Return whether a folder holds an earlier export of such a model, which may be replaced."""
    try:
        before = json.loads((out / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return before == json.loads(json.dumps(config))
