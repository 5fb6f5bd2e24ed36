"""Read and write timm's config.json, which holds sizes, preprocessing and class names."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace

from PIL import Image

from ..data.preprocess import Preprocess
from ..errors import UserError, first_few
from ..model import ViT, ViTConfig
from .configs import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    SIZES,
    CheckpointSpec,
    class_names,
    find_head_problem,
    find_size_note,
    height_and_width,
    mlp_ratio,
    patch_grid,
    patch_side,
)
from .families import TIMM, TIMM_DINOV2, TIMM_REGISTERS, Family

TIMM_NAME = rf"(?:vit|deit)_({'|'.join(SIZES)})_patch(\d+)_(?:(reg4)_)?(\d+|dinov2)"
# Arguments of timm's VisionTransformer, in a config's model_args. These are read,
TIMM_SIZES = {
    "img_size",
    "patch_size",
    "embed_dim",
    "depth",
    "num_heads",
    "mlp_ratio",
    "qkv_bias",
    "num_classes",
}
# these may have only this value,
TIMM_FIXED = {
    "global_pool": "token",
    "in_chans": 3,
    "qk_norm": False,
    "scale_attn_norm": False,
    "scale_mlp_norm": False,
    "proj_bias": True,
    "class_token": True,
    "pos_embed": "learn",
    "pre_norm": False,
    "final_norm": True,
    "fc_norm": False,
    "pool_include_prefix": False,
}
# and these do not change what a trained model computes.
TIMM_IRRELEVANT = {"dynamic_img_size", "dynamic_img_pad", "weight_init", "fix_init"}
TIMM_DROP_RATES = {
    "drop_rate",
    "pos_drop_rate",
    "patch_drop_rate",
    "proj_drop_rate",
    "attn_drop_rate",
    "drop_path_rate",
}
# The keys of timm's PretrainedCfg. Those that are not read do not change what is computed.
TIMM_PRETRAINED = {
    *("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "architecture"),
    *("tag", "custom_load", "input_size", "test_input_size", "min_input_size"),
    *("fixed_input_size", "interpolation", "crop_pct", "test_crop_pct", "crop_mode", "mean"),
    *("std", "num_classes", "label_offset", "label_names", "label_descriptions", "pool_size"),
    *("test_pool_size", "first_conv", "classifier", "license", "description", "origin_url"),
    *("paper_name", "paper_ids", "notes"),
}


def spec_from_timm(config: dict) -> CheckpointSpec:
    """Read the config.json of timm.

    The architecture's name gives the sizes, and model_args changes them.
    """
    architecture = config["architecture"]
    # Like timm, take null for an argument that was left out.
    all_args = config.get("model_args") or {}
    args = {key: value for key, value in all_args.items() if value is not None}
    pool = args.get("global_pool", config.get("global_pool", "token"))
    name = re.fullmatch(TIMM_NAME, architecture)
    if name is None or pool != "token":
        raise UserError(
            f"config.json: architecture {architecture!r} with global_pool {pool!r} "
            "is not a plain ViT; expected global_pool 'token' and an architecture like "
            "vit_base_patch16_224, deit_small_patch16_224 or vit_base_patch14_reg4_dinov2"
        )
    size_name, patch_in_name, registers, variant = name.groups()
    size = SIZES[size_name]
    dinov2 = variant == "dinov2"
    num_registers = 4 if registers else 0
    _check_timm_args(args, layer_scale=dinov2, num_registers=num_registers)
    # In older files the keys of pretrained_cfg lie in the config itself.
    pretrained = config["pretrained_cfg"] if "pretrained_cfg" in config else _old_pretrained(config)
    _check_timm_pretrained(pretrained)
    num_classes = pretrained.get("num_classes", 1000)
    num_classes = int(args.get("num_classes", config.get("num_classes", num_classes)))
    if dinov2 and num_classes:
        raise UserError(
            "config.json: timm's head for a DINOv2 reads the class token only, "
            "but minivit's reads the patches too"
        )
    img_size = args.get("img_size")
    fixed = pretrained.get("fixed_input_size", False) and not args.get("dynamic_img_size")
    preprocess = _timm_preprocess(pretrained, img_size if fixed else None)
    patch_size = patch_side(args.get("patch_size", int(patch_in_name)))
    embed_dim = args.get("embed_dim", size.embed_dim)
    sizes = ViTConfig(
        img_size=preprocess.size,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=args.get("depth", size.depth),
        num_heads=args.get("num_heads", size.num_heads),
        mlp_dim=int(embed_dim * args.get("mlp_ratio", 4)),
        num_classes=num_classes,
        eps=1e-6,
        qkv_bias=args.get("qkv_bias", True),
        layer_scale=dinov2,
        pool="cls+mean" if dinov2 else "cls",
        pos_grid=patch_grid(img_size or preprocess.size, patch_size),
        pos_antialias=True,
        num_registers=num_registers,
    )
    labels, notes = class_names(_timm_labels(config, pretrained), num_classes)
    size_note = find_size_note(sizes, "pretrained_cfg")
    head_problem = find_head_problem(num_classes)
    drop_rates = tuple(f"{key} {args[key]}" for key in sorted(TIMM_DROP_RATES) if args.get(key))
    return CheckpointSpec(sizes, preprocess, labels, notes, size_note, head_problem, drop_rates)


def _check_timm_args(args: dict, *, layer_scale: bool, num_registers: int) -> None:
    """Raise UserError for an argument of timm's with which a ViT computes something else."""
    fixed = TIMM_FIXED | {"reg_tokens": num_registers, "no_embed_class": num_registers > 0}
    for key, value in args.items():
        if key in TIMM_SIZES | TIMM_DROP_RATES | TIMM_IRRELEVANT:
            continue
        if key == "init_values" and layer_scale:  # It only says how LayerScale began.
            continue
        if key not in fixed:
            raise UserError(
                f"config.json: model_args has {key} {value!r}, which this ViT does not have"
            )
        if value != fixed[key]:
            raise UserError(
                f"config.json: {key} in model_args is {value!r}; "
                f"for this architecture minivit supports only {fixed[key]!r}"
            )


def _old_pretrained(config: dict) -> dict:
    """Return the pretrained_cfg of a config from before timm had one."""
    pretrained = dict(config)
    for key in ("model_args", "num_features", "global_pool", "labels"):
        pretrained.pop(key, None)
    return pretrained


def _check_timm_pretrained(pretrained: dict) -> None:
    """Raise UserError for settings of a pretrained_cfg that minivit does not know."""
    unknown = pretrained.keys() - TIMM_PRETRAINED - {"labels"}
    if unknown:
        raise UserError(
            f"config.json: pretrained_cfg has {first_few(sorted(unknown))}, "
            "which minivit does not know"
        )
    if pretrained.get("label_offset"):
        raise UserError(
            f"config.json: label_offset is {pretrained['label_offset']}; minivit supports only 0"
        )


def _timm_preprocess(pretrained: dict, img_size: int | Sequence[int] | None) -> Preprocess:
    """Read the preprocessing from timm's pretrained_cfg, for another input size if one is given."""
    channels, height, width = pretrained.get("input_size") or (3, 224, 224)
    if channels != 3:
        raise UserError(f"config.json: input_size has {channels} channels; minivit supports only 3")
    if img_size is not None:
        height, width = height_and_width(img_size)
    crop_pct = float(pretrained.get("crop_pct") or 0.875)
    resized = math.floor(height / crop_pct), math.floor(width / crop_pct)
    mode = pretrained.get("crop_mode") or "center"
    interpolation = (pretrained.get("interpolation") or "bicubic").upper()
    resize: tuple[int, int] | int
    crop: tuple[int, int] | None = (height, width)
    if mode == "squash":
        resize = resized
        if resized == crop:
            crop = None
    else:
        resize = resized[0]
    supported = mode == "squash" or (mode == "center" and height == width)
    if not supported or interpolation not in Image.Resampling.__members__:
        raise UserError(
            f"config.json: minivit cannot preprocess with crop_mode {mode} and interpolation "
            f"{interpolation.lower()} to {height} x {width} pixels"
        )
    if crop is not None and (resized[0] < height or resized[1] < width):
        raise UserError(
            f"config.json: crop_pct is {crop_pct}; minivit's crops do not reach beyond the photo"
        )
    return Preprocess(
        resize,
        crop,
        Image.Resampling[interpolation].value,
        tuple(map(float, pretrained.get("mean") or IMAGENET_MEAN)),
        tuple(map(float, pretrained.get("std") or IMAGENET_STD)),
        round_margins=True,
    )


def _timm_labels(config: dict, pretrained: dict) -> tuple[str, ...]:
    """Return the class names in timm's config, or their descriptions where it has them."""
    labels: Sequence | dict = ()
    # Later entries take precedence.
    for names in (
        config.get("labels"),
        pretrained.get("labels"),
        config.get("label_names"),
        pretrained.get("label_names"),
    ):
        if names:
            labels = names
    if isinstance(labels, dict):
        labels = [labels[key] for key in sorted(labels, key=int)]
    descriptions = config.get("label_descriptions") or pretrained.get("label_descriptions") or {}
    return tuple(str(descriptions.get(label, label)) for label in labels)


def timm_family(config: ViTConfig) -> Family:
    """Return the family of timm that a model is written in."""
    if config.num_registers:
        return TIMM_REGISTERS
    return TIMM_DINOV2 if config.layer_scale else TIMM


def timm_config(model: ViT) -> dict:
    """Return timm's config.json for a model: the inverse of spec_from_timm.

    Raises UserError if timm has no such model.
    """
    sizes = model.config
    if sizes.layer_scale and sizes.num_classes:
        raise UserError(
            "timm's ViT has no such head: it reads the class token only, "
            "but that of a DINOv2 here reads the patches' mean too"
        )
    if not sizes.qkv_bias or sizes.num_registers not in (0, 4):
        raise UserError(
            f"timm has no ViT with qkv_bias {sizes.qkv_bias} and {sizes.num_registers} registers"
        )
    # timm builds the model that the architecture's name stands for, with the sizes of model_args.
    size_name = "base"
    for name, size in SIZES.items():
        if size.embed_dim == sizes.embed_dim:
            size_name = name
    patch_size = 14 if sizes.layer_scale or size_name == "huge" else 16
    side = 518 if sizes.layer_scale else 224
    variant = str(side)
    if sizes.num_registers:
        variant = "reg4_dinov2"
    elif sizes.layer_scale:
        variant = "dinov2"
    built = {
        "patch_size": patch_size,
        "img_size": [side, side],
        **SIZES[size_name]._asdict(),
        "mlp_ratio": 4,
    }
    wanted = {
        "patch_size": sizes.patch_size,
        "img_size": list(sizes.img_size),
        "embed_dim": sizes.embed_dim,
        "depth": sizes.depth,
        "num_heads": sizes.num_heads,
        "mlp_ratio": mlp_ratio(sizes),
    }
    config = {
        "architecture": f"vit_{size_name}_patch{patch_size}_{variant}",
        "num_classes": sizes.num_classes,
        "num_features": sizes.embed_dim,
        "global_pool": "token",
        "model_args": {key: value for key, value in wanted.items() if value != built[key]},
        "pretrained_cfg": _timm_pretrained(model),
    }
    if model.labels:
        config["label_names"] = list(model.labels)
    return config


def _timm_pretrained(model: ViT) -> dict:
    """Return timm's pretrained_cfg, which holds the preprocessing.

    The inverse of _timm_preprocess. Raises UserError if timm has no such preprocessing.
    """
    preprocess = model.preprocess
    height, width = preprocess.size
    if isinstance(preprocess.resize, tuple):
        crop_mode = "squash"
        resized = preprocess.resize
    else:
        crop_mode = "center"
        resized = (preprocess.resize, preprocess.resize)
        if height != width:
            raise UserError(
                f"timm cannot crop {height} x {width} pixels from a photo "
                f"whose shortest edge is {preprocess.resize}"
            )
    crop_pct = 1.0
    if preprocess.crop and preprocess.crop != resized:
        crop_pct = height / (resized[0] + 0.01)  # timm rounds height / crop_pct down
    pretrained = {
        "input_size": [3, *model.config.img_size],
        "fixed_input_size": True,
        "interpolation": Image.Resampling(preprocess.resample).name.lower(),
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "num_classes": model.config.num_classes,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    if _timm_preprocess(pretrained, None) != as_timm_crops(preprocess):
        raise UserError(
            f"timm cannot squash photos to {resized[0]} x {resized[1]} pixels and crop "
            f"{height} x {width} of them"
        )
    return pretrained


def as_timm_crops(preprocess: Preprocess) -> Preprocess:
    """Return the preprocessing that is read from timm's config for one of ours."""
    if preprocess.crop == preprocess.resize:
        preprocess = replace(preprocess, crop=None)
    return replace(preprocess, round_margins=True)
