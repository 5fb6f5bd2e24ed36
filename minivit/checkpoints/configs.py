"""Read and write the config files of checkpoints: sizes, preprocessing and class names."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from ..data.preprocess import Preprocess
from ..errors import UserError
from ..model import ViT, ViTConfig
from .families import (
    DINOV2,
    GOOGLE,
    REGISTERS,
    TIMM,
    TIMM_DINOV2,
    TIMM_REGISTERS,
    VIT,
    Family,
    num_blocks,
)


class Size(NamedTuple):
    """What the name of an architecture, such as "base", stands for."""

    embed_dim: int
    depth: int
    num_heads: int


SIZES = {
    "tiny": Size(192, 12, 3),
    "small": Size(384, 12, 6),
    "base": Size(768, 12, 12),
    "large": Size(1024, 24, 16),
    "huge": Size(1280, 32, 16),
}
TIMM_NAME = rf"(?:vit|deit)_({'|'.join(SIZES)})_patch(\d+)_(?:(reg4)_)?(\d+|dinov2)"
TIMM_ARGS = {
    "img_size",
    "patch_size",
    "embed_dim",
    "depth",
    "num_heads",
    "mlp_ratio",
    "num_classes",
    "in_chans",
    "global_pool",
}
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# The names of transformers' classes begin with these.
HUB_CLASSES = {VIT.kind: "ViT", DINOV2.kind: "Dinov2", REGISTERS.kind: "Dinov2WithRegisters"}


@dataclass(frozen=True)
class CheckpointSpec:
    """What a checkpoint's config files say about its model."""

    sizes: ViTConfig
    preprocess: Preprocess
    labels: tuple[str, ...]  # class names in index order; empty without a head


def spec_from_hub(config: dict, preprocessor: dict) -> CheckpointSpec:
    """Read the config.json and preprocessor_config.json of transformers."""
    preprocess = Preprocess.from_config(preprocessor)
    supported = {"hidden_act": "gelu", "num_channels": 3, "use_swiglu_ffn": False}
    for key, value in supported.items():
        if config.get(key, value) != value:
            raise UserError(
                f"config.json: {key} is {config[key]!r}; minivit's ViT supports only {value!r}"
            )
    kind = config["model_type"]
    classifier = HUB_CLASSES[kind] + "ForImageClassification"
    backbone = HUB_CLASSES[kind] + "Model"
    architectures = config["architectures"]
    labels: dict[int, str] = {}
    if architectures == [classifier]:
        names = config.get("id2label") or {0: "LABEL_0", 1: "LABEL_1"}  # transformers' default
        labels = {int(i): str(label) for i, label in names.items()}
    elif architectures != [backbone]:
        raise UserError(
            f"config.json: architectures is {architectures}; expected {classifier} or {backbone}"
        )
    indices = range(len(labels))
    if sorted(labels) != list(indices):
        raise UserError(
            f"config.json: id2label does not number its {len(labels)} classes "
            f"from 0 to {len(labels) - 1}"
        )

    embed_dim = config["hidden_size"]
    patch_size = config["patch_size"]
    dinov2 = kind != VIT.kind
    registers = kind == REGISTERS.kind
    sizes = ViTConfig(
        img_size=preprocess.size,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        mlp_dim=int(embed_dim * config["mlp_ratio"]) if dinov2 else config["intermediate_size"],
        num_classes=len(labels),
        eps=config["layer_norm_eps"],
        qkv_bias=config.get("qkv_bias", True),
        layer_scale=dinov2,
        pool="cls+mean" if dinov2 else "cls",
        pos_grid=_grid(config["image_size"], patch_size),
        pos_antialias=registers,
        num_registers=config["num_register_tokens"] if registers else 0,
    )
    return CheckpointSpec(sizes, preprocess, tuple(labels[i] for i in indices))


def spec_from_timm(config: dict) -> CheckpointSpec:
    """Read the config.json of timm.

    The architecture's name gives the sizes, and model_args changes them.
    """
    architecture = config["architecture"]
    args = config.get("model_args") or {}
    pool = args.get("global_pool", config.get("global_pool", "token"))
    name = re.fullmatch(TIMM_NAME, architecture)
    if name is None or args.keys() - TIMM_ARGS or pool != "token":
        raise UserError(
            f"config.json: architecture {architecture!r} with global_pool {pool!r} and model_args "
            f"{args} is not a plain ViT; expected global_pool 'token' and an architecture like "
            "vit_base_patch16_224, deit_small_patch16_224 or vit_base_patch14_reg4_dinov2"
        )
    size_name, patch_in_name, registers, variant = name.groups()
    size = SIZES[size_name]
    dinov2 = variant == "dinov2"
    pretrained = config["pretrained_cfg"]
    num_classes = int(config.get("num_classes", pretrained.get("num_classes", 0)))
    if dinov2 and num_classes:
        raise UserError(
            "config.json: timm's head for a DINOv2 reads the class token only, "
            "but minivit's reads the patches too"
        )
    preprocess = _timm_preprocess(pretrained)
    patch_size = args.get("patch_size", int(patch_in_name))
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
        layer_scale=dinov2,
        pool="cls+mean" if dinov2 else "cls",
        pos_grid=_grid(args.get("img_size", preprocess.size), patch_size),
        pos_antialias=True,
        num_registers=4 if registers else 0,
    )
    labels = _class_names(_timm_labels(config), num_classes, architecture)
    return CheckpointSpec(sizes, preprocess, labels)


def _timm_preprocess(pretrained: dict) -> Preprocess:
    """Read the preprocessing from timm's pretrained_cfg."""
    height, width = pretrained["input_size"][1:]
    crop_pct = float(pretrained.get("crop_pct") or 0.875)
    resized = math.floor(height / crop_pct), math.floor(width / crop_pct)
    mode = pretrained.get("crop_mode") or "center"
    interpolation = pretrained.get("interpolation", "bicubic").upper()
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
            f"{interpolation} to {height} x {width} pixels"
        )
    return Preprocess(
        resize,
        crop,
        Image.Resampling[interpolation].value,
        tuple(map(float, pretrained["mean"])),
        tuple(map(float, pretrained["std"])),
        round_margins=True,
    )


def _timm_labels(config: dict) -> tuple[str, ...]:
    """Return the class names in timm's config, or their descriptions where it has them."""
    pretrained = config["pretrained_cfg"]
    labels: Sequence | dict = ()
    # Later entries take precedence.
    for names in (
        pretrained.get("labels"),
        config.get("label_names"),
        pretrained.get("label_names"),
    ):
        if names:
            labels = names
    if isinstance(labels, dict):
        labels = [labels[key] for key in sorted(labels, key=int)]
    descriptions = config.get("label_descriptions") or {}
    return tuple(str(descriptions.get(label, label)) for label in labels)


def spec_from_tensors(family: Family, tensors: Mapping[str, Tensor], source: str) -> CheckpointSpec:
    """Derive the sizes from the shapes in a file without a config: torchvision's or Google's.

    The preprocessing is not in the file. The library's own is assumed, with a note on stderr.
    """
    google = family is GOOGLE
    kernel = tensors["embedding/kernel" if google else "conv_proj.weight"]
    embed_dim, _, patch_size, _ = kernel.shape
    num_tokens = tensors[str(family.names["pos_embed"])].shape[1]
    side = patch_size * math.isqrt(num_tokens - 1)
    num_classes = len(tensors.get("head/kernel" if google else "heads.head.weight", ()))
    heads = {size.embed_dim: size.num_heads for size in SIZES.values()}
    if embed_dim not in heads:
        raise UserError(
            f"the number of heads of a ViT {embed_dim} wide is not known; "
            f"expected a width of {', '.join(map(str, heads))}"
        )
    if google:
        assumed = "Google's"
        preprocess = Preprocess((side, side))
    else:
        # The weights for 224 pixels are V1's. Those for more pixels are SWAG's.
        v1 = side == 224
        assumed = f"that of torchvision's {'IMAGENET1K_V1' if v1 else 'SWAG_E2E_V1'}"
        preprocess = Preprocess(
            256 if v1 else side,
            (side, side),
            2 if v1 else 3,  # Pillow's filters: bilinear or bicubic
            IMAGENET_MEAN,
            IMAGENET_STD,
            round_margins=True,
        )
    print(
        f"{source}: the file does not state its preprocessing; assuming {assumed}, {side} pixels",
        file=sys.stderr,
    )
    sizes = ViTConfig(
        img_size=preprocess.size,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=num_blocks(tensors),
        num_heads=heads[embed_dim],
        mlp_dim=4 * embed_dim,
        num_classes=num_classes,
        eps=1e-6,
    )
    return CheckpointSpec(sizes, preprocess, _class_names((), num_classes, source))


def hub_family(config: ViTConfig) -> Family:
    """Return the family of transformers that a model is written in."""
    if config.num_registers:
        return REGISTERS
    return DINOV2 if config.layer_scale else VIT


def timm_family(config: ViTConfig) -> Family:
    """Return the family of timm that a model is written in."""
    if config.num_registers:
        return TIMM_REGISTERS
    return TIMM_DINOV2 if config.layer_scale else TIMM


def keeps_positions(config: ViTConfig) -> bool:
    """Return whether transformers resamples a model's positions as we do.

    For DINOv2 it always resamples them, for ViT only if it is asked to.
    """
    return config.layer_scale and config.pos_antialias == bool(config.num_registers)


def hub_config(model: ViT, *, use_mask_token: bool) -> dict:
    """Return the config.json of transformers for a model: the inverse of spec_from_hub."""
    sizes = model.config
    kind = hub_family(sizes).kind
    is_dinov2 = kind != VIT.kind
    # image_size tells transformers which grid the positions are for. They are written as they were
    # learned if transformers resamples them as we do, and resampled to this input size if not.
    rows, columns = model.pos_grid if keeps_positions(sizes) else sizes.grid
    height, width = rows * sizes.patch_size, columns * sizes.patch_size
    config: dict = {
        "architectures": [
            HUB_CLASSES[kind] + ("ForImageClassification" if sizes.num_classes else "Model")
        ],
        "model_type": kind,
        "image_size": height if height == width else [height, width],
        "patch_size": sizes.patch_size,
        "num_channels": 3,
        "hidden_size": sizes.embed_dim,
        "num_hidden_layers": sizes.depth,
        "num_attention_heads": sizes.num_heads,
    }
    if is_dinov2:
        config["mlp_ratio"] = sizes.mlp_dim // sizes.embed_dim
    else:
        config["intermediate_size"] = sizes.mlp_dim
    if sizes.num_registers:
        config["num_register_tokens"] = sizes.num_registers
    config |= {
        "hidden_act": "gelu",
        "layer_norm_eps": sizes.eps,
        "qkv_bias": sizes.qkv_bias,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    if is_dinov2:
        config |= {"use_mask_token": use_mask_token, "use_swiglu_ffn": False}
    return config | {
        "torch_dtype": str(model.cls_token.dtype).removeprefix("torch."),
        "id2label": {str(i): label for i, label in enumerate(model.labels)},
        "label2id": {label: i for i, label in enumerate(model.labels)},
    }


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
        "mlp_ratio": sizes.mlp_dim / sizes.embed_dim,
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
    return {
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


def _grid(image_size: int | Sequence[int], patch_size: int) -> tuple[int, int]:
    """Return the rows and columns of patches of an image."""
    if isinstance(image_size, int):
        image_size = (image_size, image_size)
    height, width = image_size
    return height // patch_size, width // patch_size


def _class_names(labels: tuple[str, ...], num_classes: int, source: str) -> tuple[str, ...]:
    """Return the labels after checking their number, or make up a name for each class.

    If there are 1,000 classes without names, ImageNet's are assumed, with a note on stderr.
    """
    if labels:
        if len(labels) != num_classes:
            raise UserError(f"config.json: {len(labels)} label_names for {num_classes} classes")
        return labels
    if num_classes == 1000:
        from torchvision.models import ViT_B_16_Weights  # the import takes a second

        print(f"{source}: 1000 classes without names; assuming ImageNet's", file=sys.stderr)
        return tuple(ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"])
    return tuple(f"class {i}" for i in range(num_classes))
