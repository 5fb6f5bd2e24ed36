"""What config files say: the sizes, preprocessing and class names of each family, read and written."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence

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

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CLASSES = {
    "vit": "ViT",
    "dinov2": "Dinov2",
    "dinov2_with_registers": "Dinov2WithRegisters",
}  # of transformers, less their ends
SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
NUM_HEADS = {width: heads for width, _, heads in SIZES.values()}
TIMM_NAME = rf"(?:vit|deit)_({'|'.join(SIZES)})_patch(\d+)_(?:(reg4)_)?(\d+|dinov2)"

Said = tuple[ViTConfig, Preprocess, tuple[str, ...]]  # sizes, preprocessing, class names


def hub_sizes(config: dict, preprocessor: dict) -> Said:
    """Read config.json and preprocessor_config.json as transformers writes them."""
    preprocess, kind = Preprocess.from_config(preprocessor), config["model_type"]
    fixed = {"hidden_act": "gelu", "num_channels": 3, "use_swiglu_ffn": False}
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise UserError(f"config.json: {key} is {config[key]!r}; minivit's ViT has {value!r}")
    classifier, backbone = (CLASSES[kind] + end for end in ("ForImageClassification", "Model"))
    architectures = config["architectures"]
    if architectures not in ([classifier], [backbone]):
        raise UserError(
            f"config.json: architectures is {architectures}; expected {classifier} or {backbone}"
        )
    names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # transformers' default
    labels = (
        {int(i): str(label) for i, label in names.items()} if architectures == [classifier] else {}
    )
    if sorted(labels) != list(range(len(labels))):
        raise UserError(
            f"config.json: id2label does not number its {len(labels)} classes from 0 to {len(labels) - 1}"
        )
    dinov2, width, patch = kind != "vit", config["hidden_size"], config["patch_size"]
    sizes = ViTConfig(
        img_size=preprocess.size,
        patch_size=patch,
        embed_dim=width,
        depth=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        mlp_dim=int(width * config["mlp_ratio"]) if dinov2 else config["intermediate_size"],
        num_classes=len(labels),
        eps=config["layer_norm_eps"],
        qkv_bias=config.get("qkv_bias", True),
        layer_scale=dinov2,
        pool="cls+mean" if dinov2 else "cls",
        pos_grid=_grid(config["image_size"], patch),
        pos_antialias=kind == REGISTERS.kind,
        num_registers=config["num_register_tokens"] if kind == REGISTERS.kind else 0,
    )
    return sizes, preprocess, tuple(labels[i] for i in range(len(labels)))


def timm_sizes(config: dict) -> Said:
    """Read config.json as timm writes it: sizes by the architecture's name, changed by model_args."""
    architecture, data, args = (
        config["architecture"],
        config["pretrained_cfg"],
        config.get("model_args") or {},
    )
    name = re.fullmatch(TIMM_NAME, architecture)
    known = {
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
    pool = args.get("global_pool", config.get("global_pool", "token"))
    if name is None or args.keys() - known or pool != "token":
        raise UserError(
            f"config.json: architecture {architecture!r} with global_pool {pool!r} and model_args {args} is not a plain ViT; "
            "expected one as vit_base_patch16_224, deit_small_patch16_224 or vit_base_patch14_reg4_dinov2, and token"
        )
    width, depth, heads = SIZES[name[1]]
    dinov2, patch, width = (
        name[4] == "dinov2",
        args.get("patch_size", int(name[2])),
        args.get("embed_dim", width),
    )
    labels = data.get("label_names") or config.get("label_names") or data.get("labels") or ()
    labels = (
        [labels[key] for key in sorted(labels, key=int)] if isinstance(labels, dict) else labels
    )
    described = config.get("label_descriptions") or {}
    labels = tuple(str(described.get(label, label)) for label in labels)
    num_classes = int(config.get("num_classes", data.get("num_classes", 0)))
    side, crop = tuple(data["input_size"][1:]), float(data.get("crop_pct") or 0.875)
    scaled = tuple(math.floor(length / crop) for length in side)
    mode, filter = data.get("crop_mode") or "center", data.get("interpolation", "bicubic").upper()
    squash = mode == "squash"
    if filter not in Image.Resampling.__members__ or not (
        squash or (mode == "center" and side[0] == side[1])
    ):
        raise UserError(
            f"config.json: crop_mode {mode} with {filter} to {side} is none of minivit's ways to preprocess"
        )
    preprocess = Preprocess(
        scaled if squash else scaled[0],
        None if squash and scaled == side else side,
        Image.Resampling[filter].value,
        tuple(map(float, data["mean"])),
        tuple(map(float, data["std"])),
        round_margins=True,
    )
    if dinov2 and num_classes:
        raise UserError(
            "config.json: a DINOv2 with timm's head, which reads the class token only; minivit's reads patches too"
        )
    sizes = ViTConfig(
        img_size=side,
        patch_size=patch,
        embed_dim=width,
        depth=args.get("depth", depth),
        num_heads=args.get("num_heads", heads),
        mlp_dim=int(width * args.get("mlp_ratio", 4)),
        num_classes=num_classes,
        eps=1e-6,
        layer_scale=dinov2,
        pool="cls+mean" if dinov2 else "cls",
        pos_grid=_grid(args.get("img_size", side), patch),
        pos_antialias=True,
        num_registers=4 if name[3] else 0,
    )
    return sizes, preprocess, _imagenet(labels, num_classes, architecture)


def sizes_from_tensors(family: Family, tensors: Mapping[str, Tensor], where: str) -> Said:
    """Read from the shapes of a file that comes without a config: torchvision's or Google's.

    Their preprocessing is not in the file either; what is taken for it is said on stderr.
    """
    google = family is GOOGLE
    width, _, patch, _ = tensors["embedding/kernel" if google else "conv_proj.weight"].shape
    side = patch * math.isqrt(tensors[str(family.names["pos_embed"])].shape[1] - 1)
    num_classes = len(tensors.get("head/kernel" if google else "heads.head.weight", ()))
    if width not in NUM_HEADS:
        raise UserError(
            f"{where}: {width} wide, of which the number of heads is not known; expected one of {list(NUM_HEADS)}"
        )
    if google:
        whose, preprocess = "Google's", Preprocess((side, side))
    elif side == 224:
        whose = "that of torchvision's IMAGENET1K_V1"
        preprocess = Preprocess(256, (side, side), 2, **IMAGENET, round_margins=True)
    else:
        whose = "that of torchvision's SWAG_E2E_V1"
        preprocess = Preprocess(side, (side, side), 3, **IMAGENET, round_margins=True)
    print(f"{where}: says nothing of preprocessing; taken: {whose}, {side} pixels", file=sys.stderr)
    sizes = ViTConfig(
        img_size=preprocess.size,
        patch_size=patch,
        embed_dim=width,
        depth=num_blocks(tensors),
        num_heads=NUM_HEADS[width],
        mlp_dim=4 * width,
        num_classes=num_classes,
        eps=1e-6,
    )
    return sizes, preprocess, _imagenet((), num_classes, where)


def hub_family(c: ViTConfig) -> Family:
    """Return the family of transformers that a model is written in."""
    return REGISTERS if c.num_registers else DINOV2 if c.layer_scale else VIT


def timm_family(c: ViTConfig) -> Family:
    """Return the family of timm that a model is written in."""
    return TIMM_REGISTERS if c.num_registers else TIMM_DINOV2 if c.layer_scale else TIMM


def hub_config(model: ViT, *, use_mask_token: bool) -> dict:
    """Turn our sizes into transformers' config.json: the inverse of hub_sizes."""
    c, kind = model.config, hub_family(model.config).kind
    dinov2 = kind != "vit"
    height, width = (
        side * c.patch_size for side in (model.pos_grid if keeps_positions(c) else c.grid)
    )
    return {
        "architectures": [CLASSES[kind] + ("ForImageClassification" if c.num_classes else "Model")],
        "model_type": kind,
        "image_size": height if height == width else [height, width],
        "patch_size": c.patch_size,
        "num_channels": 3,
        "hidden_size": c.embed_dim,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.num_heads,
        **({"mlp_ratio": c.mlp_dim // c.embed_dim} if dinov2 else {"intermediate_size": c.mlp_dim}),
        **({"num_register_tokens": c.num_registers} if c.num_registers else {}),
        "hidden_act": "gelu",
        "layer_norm_eps": c.eps,
        "qkv_bias": c.qkv_bias,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        **({"use_mask_token": use_mask_token, "use_swiglu_ffn": False} if dinov2 else {}),
        "torch_dtype": str(model.cls_token.dtype).removeprefix("torch."),
        "id2label": {str(i): label for i, label in enumerate(model.labels)},
        "label2id": {label: i for i, label in enumerate(model.labels)},
    }


def keeps_positions(c: ViTConfig) -> bool:
    """Whether transformers resamples a model's positions as we do: DINOv2's always, ViT's never."""
    return c.layer_scale and c.pos_antialias == bool(c.num_registers)


def timm_config(model: ViT) -> dict:
    """Turn our sizes into timm's config.json: the inverse of timm_sizes."""
    c, p = model.config, model.preprocess
    size = next((name for name, (width, _, _) in SIZES.items() if width == c.embed_dim), "base")
    patch, side = (14, 518) if c.layer_scale else (14, 224) if size == "huge" else (16, 224)
    kind = "reg4_dinov2" if c.num_registers else "dinov2" if c.layer_scale else side
    width, depth, heads = SIZES[size]
    changed = {"patch_size": (c.patch_size, patch), "img_size": (list(c.img_size), [side, side])}
    changed |= {
        "embed_dim": (c.embed_dim, width),
        "depth": (c.depth, depth),
        "num_heads": (c.num_heads, heads),
    }
    changed |= {"mlp_ratio": (c.mlp_dim / c.embed_dim, 4)}
    if c.layer_scale and c.num_classes:
        raise UserError(
            "timm's ViT has no such head: it reads the class token, a DINOv2's here the patches' mean too"
        )
    if not c.qkv_bias or c.num_registers not in (0, 4):
        raise UserError(
            f"timm has no ViT with qkv_bias {c.qkv_bias} and {c.num_registers} registers"
        )
    if isinstance(p.resize, int) and p.size[0] != p.size[1]:
        raise UserError(
            f"timm has no preprocessing that crops {p.size} from a photo of shortest edge {p.resize}"
        )
    resize = p.resize if isinstance(p.resize, tuple) else (p.resize, p.resize)
    crop = p.size[0] / (resize[0] + 0.01)  # timm rounds size / crop_pct down
    data = {
        "input_size": [3, *c.img_size],
        "fixed_input_size": True,
        "interpolation": Image.Resampling(p.resample).name.lower(),
        "crop_pct": crop if p.crop and p.crop != resize else 1.0,
        "crop_mode": "squash" if isinstance(p.resize, tuple) else "center",
        "mean": list(p.mean),
        "std": list(p.std),
        "num_classes": c.num_classes,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    return {
        "architecture": f"vit_{size}_patch{patch}_{kind}",
        "num_classes": c.num_classes,
        "num_features": c.embed_dim,
        "global_pool": "token",
        "model_args": {key: value for key, (value, default) in changed.items() if value != default},
        "pretrained_cfg": data,
        **({"label_names": list(model.labels)} if model.labels else {}),
    }


def _grid(image: int | Sequence[int], patch: int) -> tuple[int, int]:
    height, width = (image, image) if isinstance(image, int) else image
    return height // patch, width // patch


def _imagenet(labels: tuple[str, ...], num_classes: int, where: str) -> tuple[str, ...]:
    """Return class names; of 1,000 classes without, ImageNet's as torchvision has them, which is said on stderr."""
    if not labels and num_classes == 1000:
        from torchvision.models import ViT_B_16_Weights  # takes a second

        print(f"{where}: 1000 classes without names; taken: ImageNet's", file=sys.stderr)
        return tuple(ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"])
    if labels and len(labels) != num_classes:
        raise UserError(f"config.json: {len(labels)} label_names for {num_classes} classes")
    return labels or tuple(f"class {i}" for i in range(num_classes))
