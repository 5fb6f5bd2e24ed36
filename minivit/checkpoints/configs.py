"""Read and write the config files of checkpoints: sizes, preprocessing and class names."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from ..data.preprocess import Preprocess
from ..errors import UserError, first_few
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
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# The names of transformers' classes begin with these.
HUB_CLASSES = {VIT.kind: "ViT", DINOV2.kind: "Dinov2", REGISTERS.kind: "Dinov2WithRegisters"}
_HUB_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "image_size": 224,
    "num_channels": 3,
    "qkv_bias": True,
}
_DINOV2_DEFAULTS = _HUB_DEFAULTS | {
    "mlp_ratio": 4,
    "layer_norm_eps": 1e-6,
    "use_swiglu_ffn": False,
    "drop_path_rate": 0.0,
}
# What transformers takes, by model_type, for the keys that a config.json leaves out.
HUB_DEFAULTS: dict[str, dict] = {
    VIT.kind: _HUB_DEFAULTS
    | {"patch_size": 16, "intermediate_size": 3072, "layer_norm_eps": 1e-12},
    DINOV2.kind: _DINOV2_DEFAULTS | {"patch_size": 14},
    REGISTERS.kind: _DINOV2_DEFAULTS | {"patch_size": 16, "num_register_tokens": 4},
}
HUB_FIXED = {"hidden_act": "gelu", "num_channels": 3, "use_swiglu_ffn": False}
# Settings with which transformers computes something else, unless they are empty.
HUB_REFUSED = ("quantization_config", "per_layer_config", "pruned_heads")
HUB_DROP_RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate")


@dataclass(frozen=True)
class CheckpointSpec:
    """What a checkpoint's config files say about its model."""

    sizes: ViTConfig
    preprocess: Preprocess
    labels: tuple[str, ...]  # class names in index order; empty without a head
    notes: tuple[str, ...] = ()  # what was assumed, for stderr
    size_note: str = ""  # that photos get another size than the positions are for, or ""
    # Why the head's outputs are not the logits of classes that exclude each other, or "".
    head_problem: str = ""
    # What the checkpoint's library would do in training and minivit does not, such as dropout.
    drop_rates: tuple[str, ...] = ()


def spec_from_hub(
    config: dict, preprocess: Preprocess, names: Collection[str] | None
) -> CheckpointSpec:
    """Read the config.json of transformers.

    The names of the tensors tell whether there is a head if the config does not; None means that
    they are not known.
    """
    kind = config["model_type"]
    settings = HUB_DEFAULTS[kind] | config
    _refuse_other_models(settings)
    labels, head_problem, notes = _hub_head(config, kind, names)
    embed_dim = settings["hidden_size"]
    patch_size = _square_patch(settings["patch_size"])
    dinov2 = kind != VIT.kind
    mlp_dim = int(embed_dim * settings["mlp_ratio"]) if dinov2 else settings["intermediate_size"]
    sizes = ViTConfig(
        img_size=preprocess.size,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=settings["num_hidden_layers"],
        num_heads=settings["num_attention_heads"],
        mlp_dim=mlp_dim,
        num_classes=len(labels),
        eps=settings["layer_norm_eps"],
        qkv_bias=settings["qkv_bias"],
        layer_scale=dinov2,
        pool="cls+mean" if dinov2 else "cls",
        pos_grid=_grid(settings["image_size"], patch_size),
        pos_antialias=kind == REGISTERS.kind,
        num_registers=settings.get("num_register_tokens", 0) if kind == REGISTERS.kind else 0,
    )
    if settings.get("head_dim") not in (None, embed_dim // sizes.num_heads):
        raise UserError(
            f"config.json: head_dim is {settings['head_dim']}; "
            f"minivit's ViT supports only hidden_size / num_attention_heads"
        )
    size_note = ""
    if not dinov2:
        # DINOv2's positions are always resampled; a ViT of transformers would refuse the photos.
        size_note = _note_on_size(sizes, "preprocessor_config.json")
    drop_rates = tuple(f"{key} {settings[key]}" for key in HUB_DROP_RATES if settings.get(key))
    return CheckpointSpec(sizes, preprocess, labels, notes, size_note, head_problem, drop_rates)


def _refuse_other_models(settings: dict) -> None:
    """Raise UserError for a setting of transformers with which a model computes something else."""
    for key, value in HUB_FIXED.items():
        if settings.get(key, value) != value:
            raise UserError(
                f"config.json: {key} is {settings[key]!r}; minivit's ViT supports only {value!r}"
            )
    for key in HUB_REFUSED:
        if settings.get(key):
            raise UserError(f"config.json has a {key}, which minivit's ViT does not support")


def _hub_head(
    config: dict, kind: str, names: Collection[str] | None
) -> tuple[tuple[str, ...], str, tuple[str, ...]]:
    """Return the labels, what is wrong with the head, and what was assumed about it."""
    classifier = HUB_CLASSES[kind] + "ForImageClassification"
    backbone = HUB_CLASSES[kind] + "Model"
    architectures = config.get("architectures") or None
    notes: tuple[str, ...] = ()
    if architectures == [backbone]:
        return (), "", notes
    if architectures is None and names is None:
        if config.get("id2label") is None and config.get("num_labels") is None:
            return (), "", notes
    elif architectures is None:
        assert names is not None
        if not any(name.startswith("classifier.") for name in names):
            note = "config.json names no architecture; the weights have no classifier"
            return (), "", (note,)
        notes = ("config.json names no architecture; the weights have a classifier",)
    elif architectures != [classifier]:
        raise UserError(
            f"config.json: architectures is {architectures}; expected {classifier} or {backbone}"
        )
    labels = _hub_labels(config)
    return labels, _head_problem(len(labels), config.get("problem_type")), notes


def _hub_labels(config: dict) -> tuple[str, ...]:
    """Return the class names; a config without names has LABEL_0 and so on, as many as it says."""
    id2label = config.get("id2label")
    num_labels = config.get("num_labels", 2 if id2label is None else len(id2label))
    if id2label is None or len(id2label) != num_labels:
        return tuple(f"LABEL_{i}" for i in range(num_labels))
    labels = {int(i): str(label) for i, label in id2label.items()}
    indices = range(len(labels))
    if sorted(labels) != list(indices):
        raise UserError(
            f"config.json: id2label does not number its {len(labels)} classes "
            f"from 0 to {len(labels) - 1}"
        )
    return tuple(labels[i] for i in indices)


def _head_problem(num_classes: int, problem_type: object = None) -> str:
    """Say why softmax does not fit a head, or return ""."""
    advice = "minivit's heads choose one of several classes; training on your classes replaces it"
    if problem_type not in (None, "single_label_classification"):
        return f"config.json: the head's problem_type is {problem_type!r}; {advice}"
    if num_classes == 1:
        return f"the head has a single output; {advice}"
    return ""


def _square_patch(patch_size: int | Sequence[int]) -> int:
    """Return the side of a patch. Raises UserError if it is not square."""
    if isinstance(patch_size, int):
        return patch_size
    height, width = patch_size
    if height != width:
        raise UserError(f"config.json: patch_size is {patch_size}; minivit's patches are square")
    return height


def _note_on_size(sizes: ViTConfig, source: str) -> str:
    """Return a note if photos get another size than the positions are for, else ""."""
    if sizes.pos_grid in (None, sizes.grid):
        return ""
    rows, columns = sizes.pos_grid
    learned = f"{rows * sizes.patch_size}x{columns * sizes.patch_size}"
    height, width = sizes.img_size
    return (
        f"config.json is for images of {learned} pixels, {source} makes them {height}x{width}; "
        f"the positions are resampled to that; --img-size {learned} takes the former"
    )


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
    patch_size = _square_patch(args.get("patch_size", int(patch_in_name)))
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
        pos_grid=_grid(img_size or preprocess.size, patch_size),
        pos_antialias=True,
        num_registers=num_registers,
    )
    labels, notes = _class_names(_timm_labels(config, pretrained), num_classes)
    size_note = _note_on_size(sizes, "pretrained_cfg")
    head_problem = _head_problem(num_classes)
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
        height, width = _sides(img_size)
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


def spec_from_tensors(family: Family, tensors: Mapping[str, Tensor]) -> CheckpointSpec:
    """Derive the sizes from the shapes in a file without a config: torchvision's or Google's.

    The preprocessing is not in the file. The library's own is assumed, with a note.
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
    note = f"the file does not state its preprocessing; assuming {assumed}, {side} pixels"
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
    labels, notes = _class_names((), num_classes)
    head_problem = _head_problem(num_classes)
    return CheckpointSpec(sizes, preprocess, labels, (note, *notes), head_problem=head_problem)


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
        config["mlp_ratio"] = _mlp_ratio(sizes)
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
        "mlp_ratio": _mlp_ratio(sizes),
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


def _sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Return the height and width that a size of one or two numbers stands for."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


def _grid(image_size: int | Sequence[int], patch_size: int) -> tuple[int, int]:
    """Return the rows and columns of patches of an image."""
    height, width = _sides(image_size)
    return height // patch_size, width // patch_size


def _mlp_ratio(sizes: ViTConfig) -> float:
    """Return the number by which transformers and timm multiply embed_dim to get mlp_dim.

    The product is rounded down. transformers 5 accepts whole numbers only, so these are int.
    """
    if sizes.mlp_dim % sizes.embed_dim == 0:
        return sizes.mlp_dim // sizes.embed_dim
    ratio = sizes.mlp_dim / sizes.embed_dim
    if int(sizes.embed_dim * ratio) < sizes.mlp_dim:
        ratio = math.nextafter(ratio, math.inf)
    return ratio


def _class_names(
    labels: tuple[str, ...], num_classes: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the labels after checking their number, or a made-up name for each class; and notes.

    If there are 1,000 classes without names, ImageNet's are assumed, with a note.
    """
    if labels:
        if len(labels) != num_classes:
            raise UserError(f"config.json: {len(labels)} label_names for {num_classes} classes")
        return labels, ()
    if num_classes == 1000:
        from torchvision.models import ViT_B_16_Weights  # the import takes a second

        categories = ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"]
        return tuple(categories), ("1000 classes without names; assuming ImageNet's",)
    return tuple(f"class {i}" for i in range(num_classes)), ()
