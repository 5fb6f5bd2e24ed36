"""The models that `score` and `drop` measure: the one asked for and, to compare, its base."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ... import cli
from ...errors import UserError, printable

if TYPE_CHECKING:
    from ...model import ViT


def model_names(args: argparse.Namespace) -> dict[str, str]:
    """Return the names of the "model" and, with --compare, of its "base"; say which it is."""
    names = {"model": cli.default_model(args.model)}
    if args.compare:
        names["base"] = args.compare
    print(f"model: {printable(names['model'])}", file=sys.stderr)
    return names


def load_models(names: Mapping[str, str]) -> dict[str, ViT]:
    """Load the models, keyed like `names`. Raises UserError if they see photos differently."""
    from ...checkpoints.weights import load_pretrained

    model = load_pretrained(names["model"])
    if "base" not in names:
        return {"model": model}
    # A run may have been trained at another input size than its base.
    base = load_pretrained(names["base"], img_size=model.config.img_size)
    check_same_patches(model, base, names)
    return {"model": model, "base": base}


def check_same_patches(model: ViT, base: ViT, names: Mapping[str, str]) -> None:
    """Raise UserError unless both models see the same patches of a photo, in the same values."""
    # Training keeps all of its base's preprocessing but for the rounding of margins.
    margins = model.preprocess.round_margins
    preprocess = replace(base.preprocess, round_margins=margins)
    if preprocess != model.preprocess or base.config.grid != model.config.grid:
        raise UserError(
            f"{names['base']}: its preprocessing or its patches differ from those of "
            f"{names['model']}; expected the model that it was fine-tuned from"
        )
