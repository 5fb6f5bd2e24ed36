"""Read and write transformers' config.json, and what a file without a config has in its place.

timm_configs.py does the same for timm.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..data.preprocess import Preprocess
from ..errors import UserError
from ..model import ViT, ViTConfig
from .families import DINOV2, GOOGLE, REGISTERS, VIT, Family, num_blocks


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
    patch_size = patch_side(settings["patch_size"])
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
        pos_grid=patch_grid(settings["image_size"], patch_size),
        pos_antialias=kind == REGISTERS.kind,
        num_registers=settings["num_register_tokens"] if kind == REGISTERS.kind else 0,
    )
    if settings.get("head_dim") not in (None, embed_dim // sizes.num_heads):
        raise UserError(
            f"config.json: head_dim is {settings['head_dim']}; "
            f"minivit's ViT supports only hidden_size / num_attention_heads"
        )
    size_note = ""
    if not dinov2:
        # DINOv2's positions are always resampled; a ViT of transformers would refuse the photos.
        size_note = find_size_note(sizes, "preprocessor_config.json")
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
    architectures = config.get("architectures")
    notes: tuple[str, ...] = ()
    if architectures:
        if architectures not in ([classifier], [backbone]):
            raise UserError(
                f"config.json: architectures is {architectures}; "
                f"expected {classifier} or {backbone}"
            )
        has_head = architectures == [classifier]
    elif names is None:
        has_head = config.get("id2label") is not None or config.get("num_labels") is not None
    else:
        has_head = any(name.startswith("classifier.") for name in names)
        found = "a classifier" if has_head else "no classifier"
        notes = (f"config.json names no architecture; the weights have {found}",)
    if not has_head:
        return (), "", notes
    labels = _hub_labels(config)
    return labels, find_head_problem(len(labels), config.get("problem_type")), notes


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


def find_head_problem(num_classes: int, problem_type: object = None) -> str:
    """Say why softmax does not fit a head, or return ""."""
    advice = "minivit's heads choose one of several classes; training on your classes replaces it"
    if problem_type not in (None, "single_label_classification"):
        return f"config.json: the head's problem_type is {problem_type!r}; {advice}"
    if num_classes == 1:
        return f"the head has a single output; {advice}"
    return ""


def patch_side(patch_size: int | Sequence[int]) -> int:
    """Return the side of a patch. Raises UserError if it is not square."""
    if isinstance(patch_size, int):
        return patch_size
    height, width = patch_size
    if height != width:
        raise UserError(f"config.json: patch_size is {patch_size}; minivit's patches are square")
    return height


def find_size_note(sizes: ViTConfig, source: str) -> str:
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
    labels, notes = class_names((), num_classes)
    head_problem = find_head_problem(num_classes)
    return CheckpointSpec(sizes, preprocess, labels, (note, *notes), head_problem=head_problem)


def hub_family(config: ViTConfig) -> Family:
    """Return the family of transformers that a model is written in."""
    if config.num_registers:
        return REGISTERS
    return DINOV2 if config.layer_scale else VIT


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
        config["mlp_ratio"] = mlp_ratio(sizes)
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


def height_and_width(size: int | Sequence[int]) -> tuple[int, int]:
    """Return the height and width that a size of one or two numbers stands for."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


def patch_grid(image_size: int | Sequence[int], patch_size: int) -> tuple[int, int]:
    """Return the rows and columns of patches of an image."""
    height, width = height_and_width(image_size)
    return height // patch_size, width // patch_size


def mlp_ratio(sizes: ViTConfig) -> float:
    """Return the number by which transformers and timm multiply embed_dim to get mlp_dim.

    The product is rounded down. transformers 5 accepts whole numbers only, so these are int.
    """
    if sizes.mlp_dim % sizes.embed_dim == 0:
        return sizes.mlp_dim // sizes.embed_dim
    ratio = sizes.mlp_dim / sizes.embed_dim
    if int(sizes.embed_dim * ratio) < sizes.mlp_dim:
        ratio = math.nextafter(ratio, math.inf)
    return ratio


def class_names(
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
