"""Families of checkpoints: how each names its tensors, one explicit table each, and what its config says.

Sources: the names are those in the files on the Hub and in the code of transformers 5.24 (models/vit, models/dinov2,
models/dinov2_with_registers), timm 1.0 (models/vision_transformer.py), torchvision 0.29 (models/vision_transformer.py) and
https://github.com/google-research/vision_transformer.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from .errors import UserError
from .model import ViT


@dataclass(frozen=True, eq=False)
class Family:
    """One layout of checkpoints: which of its tensors is which parameter of ours.

    In `names`, # stands for a block's number and * for weight or bias; three names are joined into one tensor.
    """

    title: str
    kind: str  # config.json's model_type; "timm"; "" for files that come without a config
    names: dict[str, str | tuple[str, ...]]
    head: dict[str, str]
    unused: tuple[str, ...] = ()  # tensors of the backbone that classification does not use
    prefix: str = ""  # of the backbone's names where there is a head


_HEAD = {"head.*": "classifier.*"}
_EMBEDDINGS = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.*": "embeddings.patch_embeddings.projection.*",
    "norm.*": "layernorm.*",
}
_ON_DISK = {
    "blocks.#.attn.qkv.*": tuple(f"encoder.layer.#.attention.attention.{part}.*" for part in ("query", "key", "value")),
    "blocks.#.attn.proj.*": "encoder.layer.#.attention.output.dense.*",
}
_DINOV2 = {
    **_EMBEDDINGS,
    "blocks.#.norm1.*": "encoder.layer.#.norm1.*",
    "blocks.#.ls1.gamma": "encoder.layer.#.layer_scale1.lambda1",
    "blocks.#.norm2.*": "encoder.layer.#.norm2.*",
    "blocks.#.mlp.fc1.*": "encoder.layer.#.mlp.fc1.*",
    "blocks.#.mlp.fc2.*": "encoder.layer.#.mlp.fc2.*",
    "blocks.#.ls2.gamma": "encoder.layer.#.layer_scale2.lambda1",
}
_DINOV2_IN_MEMORY = {
    **_DINOV2,
    "blocks.#.attn.qkv.*": tuple(f"encoder.layer.#.attention.{part}_proj.*" for part in "qkv"),
    "blocks.#.attn.proj.*": "encoder.layer.#.attention.o_proj.*",
}
_REGISTERS = {"reg_token": "embeddings.register_tokens"}
_MASK, _POOLER = ("embeddings.mask_token",), ("pooler.dense.weight", "pooler.dense.bias")

VIT = Family(
    "transformers' vit",
    "vit",
    {
        **_EMBEDDINGS,
        **_ON_DISK,
        "blocks.#.norm1.*": "encoder.layer.#.layernorm_before.*",
        "blocks.#.norm2.*": "encoder.layer.#.layernorm_after.*",
        "blocks.#.mlp.fc1.*": "encoder.layer.#.intermediate.dense.*",
        "blocks.#.mlp.fc2.*": "encoder.layer.#.output.dense.*",
    },
    _HEAD,
    _POOLER,
    "vit.",
)
VIT_IN_MEMORY = Family(
    "transformers 5's vit in memory",
    "vit",
    {
        **_EMBEDDINGS,
        "blocks.#.attn.qkv.*": tuple(f"layers.#.attention.{part}_proj.*" for part in "qkv"),
        "blocks.#.attn.proj.*": "layers.#.attention.o_proj.*",
        "blocks.#.norm1.*": "layers.#.layernorm_before.*",
        "blocks.#.norm2.*": "layers.#.layernorm_after.*",
        "blocks.#.mlp.fc1.*": "layers.#.mlp.fc1.*",
        "blocks.#.mlp.fc2.*": "layers.#.mlp.fc2.*",
    },
    _HEAD,
    _POOLER,
    "vit.",
)
DINOV2 = Family("transformers' dinov2", "dinov2", _DINOV2 | _ON_DISK, _HEAD, _MASK, "dinov2.")
DINOV2_IN_MEMORY = Family("transformers 5's dinov2 in memory", "dinov2", _DINOV2_IN_MEMORY, _HEAD, _MASK, "dinov2.")
_WITH = "dinov2_with_registers"
REGISTERS = Family(f"transformers' {_WITH}", _WITH, _DINOV2 | _ON_DISK | _REGISTERS, _HEAD, _MASK, f"{_WITH}.")
REGISTERS_IN_MEMORY = Family(
    f"transformers 5's {_WITH} in memory", _WITH, _DINOV2_IN_MEMORY | _REGISTERS, _HEAD, _MASK, f"{_WITH}."
)
_BLOCK = tuple(f"blocks.#.{part}.*" for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"))
_TIMM = {name: name for name in ("cls_token", "pos_embed", "patch_embed.proj.*", *_BLOCK, "norm.*")}  # ours are timm's
_TIMM_SCALES = {name: name for name in ("blocks.#.ls1.gamma", "blocks.#.ls2.gamma")}
_TIMM_HEAD = {"head.*": "head.*"}
TIMM = Family("timm's vit", "timm", _TIMM, _TIMM_HEAD)
TIMM_DINOV2 = Family("timm's dinov2", "timm", _TIMM | _TIMM_SCALES, _TIMM_HEAD)
TIMM_REGISTERS = Family("timm's dinov2 with registers", "timm", _TIMM | _TIMM_SCALES | {"reg_token": "reg_token"}, _TIMM_HEAD)
_LAYER = "encoder.layers.encoder_layer_#."
TORCHVISION = Family(
    "torchvision's vit",
    "",
    {
        "cls_token": "class_token",
        "pos_embed": "encoder.pos_embedding",
        "patch_embed.proj.*": "conv_proj.*",
        "blocks.#.norm1.*": f"{_LAYER}ln_1.*",
        "blocks.#.attn.qkv.weight": f"{_LAYER}self_attention.in_proj_weight",
        "blocks.#.attn.qkv.bias": f"{_LAYER}self_attention.in_proj_bias",
        "blocks.#.attn.proj.*": f"{_LAYER}self_attention.out_proj.*",
        "blocks.#.norm2.*": f"{_LAYER}ln_2.*",
        "blocks.#.mlp.fc1.*": f"{_LAYER}mlp.0.*",
        "blocks.#.mlp.fc2.*": f"{_LAYER}mlp.3.*",
        "norm.*": "encoder.ln.*",
    },
    {"head.*": "heads.head.*"},
)
_FLAX = "Transformer/encoderblock_#/"
_FLAX_QKV = tuple(f"{_FLAX}MultiHeadDotProductAttention_1/{part}/" for part in ("query", "key", "value"))
GOOGLE = Family(
    "Google's npz",
    "",
    {
        "cls_token": "cls",
        "pos_embed": "Transformer/posembed_input/pos_embedding",
        "patch_embed.proj.weight": "embedding/kernel",
        "patch_embed.proj.bias": "embedding/bias",
        "blocks.#.norm1.weight": f"{_FLAX}LayerNorm_0/scale",
        "blocks.#.norm1.bias": f"{_FLAX}LayerNorm_0/bias",
        "blocks.#.attn.qkv.weight": tuple(f"{part}kernel" for part in _FLAX_QKV),
        "blocks.#.attn.qkv.bias": tuple(f"{part}bias" for part in _FLAX_QKV),
        "blocks.#.attn.proj.weight": f"{_FLAX}MultiHeadDotProductAttention_1/out/kernel",
        "blocks.#.attn.proj.bias": f"{_FLAX}MultiHeadDotProductAttention_1/out/bias",
        "blocks.#.norm2.weight": f"{_FLAX}LayerNorm_2/scale",
        "blocks.#.norm2.bias": f"{_FLAX}LayerNorm_2/bias",
        "blocks.#.mlp.fc1.weight": f"{_FLAX}MlpBlock_3/Dense_0/kernel",
        "blocks.#.mlp.fc1.bias": f"{_FLAX}MlpBlock_3/Dense_0/bias",
        "blocks.#.mlp.fc2.weight": f"{_FLAX}MlpBlock_3/Dense_1/kernel",
        "blocks.#.mlp.fc2.bias": f"{_FLAX}MlpBlock_3/Dense_1/bias",
        "norm.weight": "Transformer/encoder_norm/scale",
        "norm.bias": "Transformer/encoder_norm/bias",
    },
    {"head.weight": "head/kernel", "head.bias": "head/bias"},
)
HUB = (VIT, VIT_IN_MEMORY, DINOV2, DINOV2_IN_MEMORY, REGISTERS, REGISTERS_IN_MEMORY)
FAMILIES = (*HUB, TIMM, TIMM_DINOV2, TIMM_REGISTERS, TORCHVISION, GOOGLE)
_BLOCK_NUMBER = re.compile(r"(?<=[._])\d+(?=[./])")  # the first of a name
KINDS = tuple(dict.fromkeys(family.kind for family in FAMILIES if family.kind))


def recognise(kind: str, names: Collection[str], where: str) -> Family:
    """Return the family of a checkpoint from what its config says it is and from all of its tensors' names together.

    Raises UserError, naming the nearest family and what differs, if these fit none or not one another.
    """
    patterns = {family: _differences(family, names) for family in FAMILIES}
    nearest = min(FAMILIES, key=lambda family: sum(map(len, patterns[family])))
    same_kind = [family for family in FAMILIES if family.kind == kind]
    best = min(same_kind, key=lambda family: sum(map(len, patterns[family])), default=None)
    missing, unexpected = patterns[nearest]
    differs = f"nearest is {nearest.title}, from which differ: {listed(missing, unexpected)}"
    if best is None:
        raise UserError(
            f"{where}: config.json has model_type {kind!r}; expected one of {', '.join(KINDS)}; by its names {differs}"
        )
    if sum(map(len, patterns[best])) > len(missing) + len(unexpected):
        raise UserError(
            f"{where}: config.json is of {best.title}, but the tensors' names are those of {nearest.title}; "
            "one of the two files belongs to another model"
            if kind
            else f"{where}: its names are those of {nearest.title}, of which minivit reads folders, with config.json"
        )
    if not kind and (missing or unexpected):
        raise UserError(f"{where}: not a ViT that minivit reads; {differs}")
    return best


def num_blocks(names: Collection[str]) -> int:
    """Count the blocks that a checkpoint's names number."""
    return len({number[0] for name in names if (number := _BLOCK_NUMBER.search(name))})


def layout(model: ViT, family: Family) -> dict[str, tuple[str, ...]]:
    """Say for each parameter of a model which tensors of the file it is joined from."""
    table = family.names | family.head
    prefix = family.prefix if model.config.num_classes else ""
    found = {}
    for name in model.state_dict():
        number = re.search(r"\d+", name)  # of the block
        leaf = name.rpartition(".")[2]
        pattern = re.sub(r"^blocks\.\d+\.", "blocks.#.", name)
        theirs = table.get(pattern) or table[pattern.removesuffix(leaf) + "*"]
        found[name] = tuple(
            (part if name.startswith("head.") else prefix + part)
            .replace("#", number[0] if "#" in part else "")
            .replace("*", leaf)
            for part in ((theirs,) if isinstance(theirs, str) else theirs)
        )
    return found


def listed(missing: Collection[str], unexpected: Collection[str], misshapen: Collection[str] = ()) -> str:
    """Say what is wrong with a file's tensors: how many of a kind, and the first few."""
    kinds = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    return (
        "; ".join(
            f"{len(names)} {kind} ({', '.join([*list(names)[:3], '...'][: len(names)])})"
            for kind, names in kinds.items()
            if names
        )
        or "nothing"
    )


def _differences(family: Family, names: Collection[str]) -> tuple[list[str], list[str]]:
    """Return which names of a family, whatever the block, are missing and which are unexpected."""
    found = {_BLOCK_NUMBER.sub("#", name.removeprefix(family.prefix), count=1) for name in names}
    wanted, optional = _patterns(family.names), _patterns(family.head) | set(family.unused)
    return sorted(wanted - found), sorted(found - wanted - optional)


def _patterns(table: dict[str, str | tuple[str, ...]]) -> set[str]:
    parts = {part for theirs in table.values() for part in ((theirs,) if isinstance(theirs, str) else theirs)}
    return {part.replace("*", leaf) for part in parts for leaf in ("weight", "bias")}
