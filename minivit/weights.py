"""Checkpoints: from the Hub or a folder into a model, strictly, and back into a folder that transformers reads."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import UserError
from .files import read_json, whole_file, write_json
from .hub import fetch
from .model import ViT, ViTConfig
from .optim import trainable
from .photos import Preprocess


@dataclass(frozen=True)
class Family:
    """One layout of checkpoints: what its config is called and which of its tensors is which parameter of ours.

    In `names`, # stands for a block's number and * for weight or bias; three names are joined into one tensor.
    """

    model_type: str
    classifier: str  # the architecture with a head; its backbone's tensors then carry the prefix "model_type."
    names: dict[str, str | tuple[str, ...]]
    unused: tuple[str, ...]  # tensors of the backbone that classification does not use


_ATTENTION = "encoder.layer.#.attention."
_QKV = tuple(f"{_ATTENTION}attention.{part}.*" for part in ("query", "key", "value"))
_EMBEDDINGS = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.*": "embeddings.patch_embeddings.projection.*",
    "blocks.#.attn.qkv.*": _QKV,
    "blocks.#.attn.proj.*": f"{_ATTENTION}output.dense.*",
    "norm.*": "layernorm.*",
}
VIT = Family(
    model_type="vit",
    classifier="ViTForImageClassification",
    names={
        **_EMBEDDINGS,
        "blocks.#.norm1.*": "encoder.layer.#.layernorm_before.*",
        "blocks.#.norm2.*": "encoder.layer.#.layernorm_after.*",
        "blocks.#.mlp.fc1.*": "encoder.layer.#.intermediate.dense.*",
        "blocks.#.mlp.fc2.*": "encoder.layer.#.output.dense.*",
    },
    unused=("pooler.dense.weight", "pooler.dense.bias"),
)
DINOV2 = Family(
    model_type="dinov2",
    classifier="Dinov2ForImageClassification",
    names={
        **_EMBEDDINGS,
        "blocks.#.norm1.*": "encoder.layer.#.norm1.*",
        "blocks.#.ls1.gamma": "encoder.layer.#.layer_scale1.lambda1",
        "blocks.#.norm2.*": "encoder.layer.#.norm2.*",
        "blocks.#.mlp.fc1.*": "encoder.layer.#.mlp.fc1.*",
        "blocks.#.mlp.fc2.*": "encoder.layer.#.mlp.fc2.*",
        "blocks.#.ls2.gamma": "encoder.layer.#.layer_scale2.lambda1",
    },
    unused=("embeddings.mask_token",),
)
FAMILIES = {family.model_type: family for family in (VIT, DINOV2)}
HEAD = {"head.*": "classifier.*"}


@dataclass(frozen=True)
class Origin:
    """Where a model came from, and what its file held that classification does not use (written back untouched)."""

    family: Family = VIT
    source: str = ""  # Hub id or folder
    commit: str | None = None  # of the Hub repository
    unused: dict[str, Tensor] = field(default_factory=dict)


def load_pretrained(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    num_classes: int | None = None,
    labels: Sequence[str] | None = None,
) -> ViT:
    """Load a ViT in float32 on the CPU from a Hub id or a local folder in the Hub's layout.

    The model carries what belongs to its weights: `labels` (class names in index order), `preprocess` (a
    `Preprocess`) and `origin`. A checkpoint without a classifier gives a backbone, with no labels. Asking for other
    `labels`, or another `num_classes`, puts a fresh head on, and says so on stderr.
    Raises UserError, listing every tensor that is missing, unexpected or misshapen; nothing is ever left random.
    """
    folder, commit = fetch(str(source), revision)
    config = read_json(folder / "config.json")
    preprocess = Preprocess.from_config(read_json(folder / "preprocessor_config.json"))
    family = FAMILIES.get(config.get("model_type"))
    if family is None:
        found = config.get("model_type")
        raise UserError(f"{source}: config.json has model_type {found!r}; expected {' or '.join(FAMILIES)}")
    try:
        with torch.device("meta"):
            model = ViT(_vit_config(config, family, preprocess.size))
    except KeyError as error:
        raise UserError(f"{source}: config.json lacks {error}") from error
    unused = _fill(model, family, folder / "model.safetensors")
    model.labels, model.preprocess = _labels(config, model.config.num_classes), preprocess
    model.origin = Origin(family, str(source), commit, unused)
    if labels is not None or num_classes is not None:
        wanted = tuple(labels) if labels is not None else tuple(f"class {i}" for i in range(num_classes))
        if len(wanted) != len(model.labels) or (labels is not None and wanted != model.labels):
            had = f"the checkpoint's {len(model.labels)}" if model.labels else "none"
            print(f"new head for {len(wanted)} classes, in place of {had}", file=sys.stderr)
            model.reset_head(len(wanted))
            model.labels = wanted
    return model


def save_pretrained(model: ViT, folder: str | os.PathLike[str]) -> None:
    """Write model.safetensors, config.json and preprocessor_config.json as transformers lays them out on the Hub.

    A folder never holds half of one.
    """
    folder, origin = Path(folder), model.origin or Origin()
    classifier = model.config.num_classes > 0
    tensors = {_prefixed(name, origin.family, classifier): tensor for name, tensor in origin.unused.items()}
    layout = _layout(model, origin.family)
    for name, tensor in model.state_dict().items():
        for theirs, part in zip(layout[name], tensor.cpu().chunk(len(layout[name]))):
            tensors[theirs] = part.contiguous()
    save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    write_json(folder / "config.json", _hub_config(model, origin))
    write_json(folder / "preprocessor_config.json", model.preprocess.to_config())


def save_tail(model: ViT, path: Path) -> None:
    """Write only what trains, under our names, with what it belongs to: the base model's id and commit, and the labels."""
    metadata = {
        "base": model.origin.source,
        "commit": model.origin.commit or "",
        "labels": json.dumps(model.labels),
    }
    save_tensors(path, {name: p.detach().cpu().contiguous() for name, p in trainable(model).items()}, metadata)


@torch.no_grad()
def load_tail(model: ViT, path: Path) -> None:
    """Read what trains back from save_tail's file, every tensor of it and nothing else."""
    tensors, tail = load_file(path), trainable(model)
    if tensors.keys() != tail.keys():
        raise UserError(f"{path}: holds other tensors than those that train: {', '.join(sorted(tensors.keys() ^ tail.keys()))}")
    for name, parameter in tail.items():
        parameter.copy_(tensors[name])


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all."""
    with whole_file(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        try:
            save_file(tensors, partial, metadata)
        except SafetensorError as error:  # a full disk
            raise OSError(f"{path}: cannot be written ({error})") from error
        partial.chmod(mode)  # safetensors lets only the owner read its files


def _fill(model: ViT, family: Family, path: Path) -> dict[str, Tensor]:
    """Give every parameter of a model its tensor from a file; return the tensors that classification does not use."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error}); is the file complete?") from error
    classifier = model.config.num_classes > 0
    unused = {name: tensors.pop(theirs) for name in family.unused if (theirs := _prefixed(name, family, classifier)) in tensors}
    layout, missing, misshapen, state = _layout(model, family), [], [], {}
    for name, parameter in model.state_dict().items():
        theirs = layout[name]
        shape = (parameter.shape[0] // len(theirs), *parameter.shape[1:])
        parts = [tensors.pop(part, None) for part in theirs]
        for part, tensor in zip(theirs, parts):
            if tensor is None:
                missing.append(part)
            elif tuple(tensor.shape) != shape or not tensor.is_floating_point():
                misshapen.append(f"{part}: expected {shape}, found {tuple(tensor.shape)} {tensor.dtype}")
        if not missing and not misshapen:
            state[name] = (parts[0] if len(parts) == 1 else torch.cat(parts)).float()
    problems = {"missing": missing, "unexpected": sorted(tensors), "misshapen": misshapen}
    if any(problems.values()):
        listed = "; ".join(f"{len(v)} {kind} ({', '.join(v)})" for kind, v in problems.items() if v)
        raise UserError(f"{path}: does not fit a {family.model_type} of the sizes in config.json: {listed}")
    model.load_state_dict(state, assign=True)
    return unused


def _prefixed(name: str, family: Family, classifier: bool) -> str:
    return f"{family.model_type}.{name}" if classifier and not name.startswith("classifier.") else name


def _layout(model: ViT, family: Family) -> dict[str, tuple[str, ...]]:
    """Say for each parameter of a model which tensors of the file it is joined from."""
    table, layout = family.names | HEAD, {}
    for name in model.state_dict():
        number = re.search(r"\d+", name)  # of the block
        leaf = name.rpartition(".")[2]
        pattern = re.sub(r"^blocks\.\d+\.", "blocks.#.", name)
        theirs = table.get(pattern) or table[pattern.removesuffix(leaf) + "*"]
        layout[name] = tuple(
            _prefixed(
                part.replace("#", number[0] if "#" in part else "").replace("*", leaf), family, model.config.num_classes > 0
            )
            for part in ((theirs,) if isinstance(theirs, str) else theirs)
        )
    return layout


def _vit_config(config: dict, family: Family, img_size: tuple[int, int]) -> ViTConfig:
    """Turn a Hub config.json into our sizes."""
    fixed = {"hidden_act": "gelu", "num_channels": 3, "use_swiglu_ffn": False}
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise UserError(f"config.json: {key} is {config[key]!r}; minivit's ViT has {value!r}")
    dinov2 = family is DINOV2
    width, patch, image = config["hidden_size"], config["patch_size"], config["image_size"]
    image = (image, image) if isinstance(image, int) else tuple(image)
    return ViTConfig(
        img_size=img_size,
        patch_size=patch,
        embed_dim=width,
        depth=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        mlp_dim=int(width * config["mlp_ratio"]) if dinov2 else config["intermediate_size"],
        num_classes=len(config["id2label"]) if family.classifier in config["architectures"] else 0,
        eps=config["layer_norm_eps"],
        qkv_bias=config.get("qkv_bias", True),
        layer_scale=dinov2,
        pool="cls+mean" if dinov2 else "cls",
        pos_grid=(image[0] // patch, image[1] // patch),
    )


def _hub_config(model: ViT, origin: Origin) -> dict:
    """Turn our sizes into a Hub config.json: the inverse of _vit_config."""
    c, family = model.config, origin.family
    dinov2 = family is DINOV2
    height, width = (side * c.patch_size for side in model.pos_grid)
    return {
        "architectures": [family.classifier if c.num_classes else family.classifier.replace("ForImageClassification", "Model")],
        "model_type": family.model_type,
        "image_size": height if height == width else [height, width],
        "patch_size": c.patch_size,
        "num_channels": 3,
        "hidden_size": c.embed_dim,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.num_heads,
        **({"mlp_ratio": c.mlp_dim // c.embed_dim} if dinov2 else {"intermediate_size": c.mlp_dim}),
        "hidden_act": "gelu",
        "layer_norm_eps": c.eps,
        "qkv_bias": c.qkv_bias,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        **({"use_mask_token": bool(origin.unused), "use_swiglu_ffn": False} if dinov2 else {}),
        "torch_dtype": str(model.cls_token.dtype).removeprefix("torch."),
        "id2label": {str(i): label for i, label in enumerate(model.labels)},
        "label2id": {label: i for i, label in enumerate(model.labels)},
    }


def _labels(config: dict, num_classes: int) -> tuple[str, ...]:
    """Read the class names in index order; a backbone has none."""
    if not num_classes:
        return ()
    names = {int(i): str(label) for i, label in config["id2label"].items()}
    if sorted(names) != list(range(num_classes)):
        raise UserError(f"config.json: id2label does not number its {num_classes} classes from 0 to {num_classes - 1}")
    return tuple(names[i] for i in range(num_classes))
