"""Families of checkpoints: how each names its tensors, one explicit table each, and what its config says.

Sources: the names are those in the files on the Hub and in the code of transformers 5.24 (models/vit, models/dinov2,
models/dinov2_with_registers), timm 1.0 (models/vision_transformer.py), torchvision 0.29 (models/vision_transformer.py) and
https://github.com/google-research/vision_transformer.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from ..errors import UserError
from ..model import ViT

Names = dict[str, str | tuple[str, ...]]  # ours to theirs


@dataclass(frozen=True, eq=False)
class Family:
    """One layout of checkpoints: which of its tensors is which parameter of ours.

    In `names`, # stands for a block's number and * for weight or bias; three names are joined into one tensor.
    """

    title: str
    kind: str  # config.json's model_type; "timm"; "" for files that come without a config
    names: Names
    head: Names
    unused: tuple[str, ...] = ()  # tensors of the backbone that classification does not use
    prefix: str = ""  # of the backbone's names where there is a head


_EMBEDDINGS: Names = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.*": "embeddings.patch_embeddings.projection.*",
    "norm.*": "layernorm.*",
}
_ON_DISK: Names = {
    "blocks.#.attn.qkv.*": tuple(
        f"encoder.layer.#.attention.attention.{part}.*" for part in ("query", "key", "value")
    ),
    "blocks.#.attn.proj.*": "encoder.layer.#.attention.output.dense.*",
}
_IN_MEMORY: Names = {
    "blocks.#.attn.qkv.*": tuple(f"encoder.layer.#.attention.{part}_proj.*" for part in "qkv"),
    "blocks.#.attn.proj.*": "encoder.layer.#.attention.o_proj.*",
}
_VIT: Names = {
    **_EMBEDDINGS,
    **_ON_DISK,
    "blocks.#.norm1.*": "encoder.layer.#.layernorm_before.*",
    "blocks.#.norm2.*": "encoder.layer.#.layernorm_after.*",
    "blocks.#.mlp.fc1.*": "encoder.layer.#.intermediate.dense.*",
    "blocks.#.mlp.fc2.*": "encoder.layer.#.output.dense.*",
}
_VIT_IN_MEMORY: Names = {
    **_EMBEDDINGS,
    "blocks.#.attn.qkv.*": tuple(f"layers.#.attention.{part}_proj.*" for part in "qkv"),
    "blocks.#.attn.proj.*": "layers.#.attention.o_proj.*",
    "blocks.#.norm1.*": "layers.#.layernorm_before.*",
    "blocks.#.norm2.*": "layers.#.layernorm_after.*",
    "blocks.#.mlp.fc1.*": "layers.#.mlp.fc1.*",
    "blocks.#.mlp.fc2.*": "layers.#.mlp.fc2.*",
}
_DINOV2: Names = {
    **_EMBEDDINGS,
    "blocks.#.norm1.*": "encoder.layer.#.norm1.*",
    "blocks.#.ls1.gamma": "encoder.layer.#.layer_scale1.lambda1",
    "blocks.#.norm2.*": "encoder.layer.#.norm2.*",
    "blocks.#.mlp.fc1.*": "encoder.layer.#.mlp.fc1.*",
    "blocks.#.mlp.fc2.*": "encoder.layer.#.mlp.fc2.*",
    "blocks.#.ls2.gamma": "encoder.layer.#.layer_scale2.lambda1",
}
_REGISTERS: Names = {**_DINOV2, "reg_token": "embeddings.register_tokens"}
_BLOCK = tuple(
    f"blocks.#.{part}.*"
    for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
)
_TIMM: Names = {
    name: name for name in ("cls_token", "pos_embed", "patch_embed.proj.*", *_BLOCK, "norm.*")
}  # ours are timm's
_TIMM_DINOV2: Names = {
    **_TIMM,
    "blocks.#.ls1.gamma": "blocks.#.ls1.gamma",
    "blocks.#.ls2.gamma": "blocks.#.ls2.gamma",
}
_LAYER = "encoder.layers.encoder_layer_#."
_TORCHVISION: Names = {
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
}


def _flax(ours: str, theirs: str, weight: str = "kernel") -> Names:
    return {f"{ours}.weight": f"{theirs}/{weight}", f"{ours}.bias": f"{theirs}/bias"}


_FLAX = "Transformer/encoderblock_#"
_FLAX_ATTENTION = f"{_FLAX}/MultiHeadDotProductAttention_1"
_GOOGLE: Names = {
    "cls_token": "cls",
    "pos_embed": "Transformer/posembed_input/pos_embedding",
    **_flax("patch_embed.proj", "embedding"),
    **_flax("blocks.#.norm1", f"{_FLAX}/LayerNorm_0", "scale"),
    "blocks.#.attn.qkv.weight": tuple(
        f"{_FLAX_ATTENTION}/{part}/kernel" for part in ("query", "key", "value")
    ),
    "blocks.#.attn.qkv.bias": tuple(
        f"{_FLAX_ATTENTION}/{part}/bias" for part in ("query", "key", "value")
    ),
    **_flax("blocks.#.attn.proj", f"{_FLAX_ATTENTION}/out"),
    **_flax("blocks.#.norm2", f"{_FLAX}/LayerNorm_2", "scale"),
    **_flax("blocks.#.mlp.fc1", f"{_FLAX}/MlpBlock_3/Dense_0"),
    **_flax("blocks.#.mlp.fc2", f"{_FLAX}/MlpBlock_3/Dense_1"),
    **_flax("norm", "Transformer/encoder_norm", "scale"),
}


def _hub(
    kind: str,
    names: Names,
    unused: tuple[str, ...],
    library: str = "transformers'",
    where: str = "",
) -> Family:
    return Family(
        f"{library} {kind}{where}", kind, names, {"head.*": "classifier.*"}, unused, f"{kind}."
    )


_POOLER, _MASK = ("pooler.dense.weight", "pooler.dense.bias"), ("embeddings.mask_token",)
_NOT_SAVED = (
    "transformers 5's",
    " in memory",
)  # its state_dict() has other names than what save_pretrained writes
VIT, VIT_IN_MEMORY = _hub("vit", _VIT, _POOLER), _hub("vit", _VIT_IN_MEMORY, _POOLER, *_NOT_SAVED)
DINOV2 = _hub("dinov2", _DINOV2 | _ON_DISK, _MASK)
DINOV2_IN_MEMORY = _hub("dinov2", _DINOV2 | _IN_MEMORY, _MASK, *_NOT_SAVED)
REGISTERS = _hub("dinov2_with_registers", _REGISTERS | _ON_DISK, _MASK)
REGISTERS_IN_MEMORY = _hub("dinov2_with_registers", _REGISTERS | _IN_MEMORY, _MASK, *_NOT_SAVED)
TIMM = Family("timm's vit", "timm", _TIMM, {"head.*": "head.*"})
TIMM_DINOV2 = Family("timm's dinov2", "timm", _TIMM_DINOV2, TIMM.head)
TIMM_REGISTERS = Family(
    "timm's dinov2 with registers", "timm", _TIMM_DINOV2 | {"reg_token": "reg_token"}, TIMM.head
)
TORCHVISION = Family("torchvision's vit", "", _TORCHVISION, {"head.*": "heads.head.*"})
GOOGLE = Family("Google's npz", "", _GOOGLE, _flax("head", "head"))
FAMILIES: tuple[Family, ...] = (
    VIT,
    VIT_IN_MEMORY,
    DINOV2,
    DINOV2_IN_MEMORY,
    REGISTERS,
    REGISTERS_IN_MEMORY,
)
FAMILIES += (TIMM, TIMM_DINOV2, TIMM_REGISTERS, TORCHVISION, GOOGLE)
_BLOCK_NUMBER = re.compile(r"(?<=[._])\d+(?=[./])")  # the first of a name
KINDS = tuple(dict.fromkeys(family.kind for family in FAMILIES if family.kind))


def recognise(kind: str, names: Collection[str], where: str) -> Family:
    """Return the family of a checkpoint from what its config says it is and from all of its tensors' names together.

    Raises UserError, naming the nearest family and what differs, if these fit none or not one another.
    """
    differing = {family: _differences(family, names) for family in FAMILIES}

    def distance(family: Family) -> int:
        return sum(map(len, differing[family]))

    nearest = min(FAMILIES, key=distance)
    best = min((family for family in FAMILIES if family.kind == kind), key=distance, default=None)
    differs = f"nearest is {nearest.title}, from which differ: {listed(*differing[nearest])}"
    if best is None:
        problem = f"config.json has model_type {kind!r}; expected one of {', '.join(KINDS)}; by its names {differs}"
    elif distance(best) > distance(nearest) and kind:
        problem = (
            f"config.json is of {best.title}, but the tensors' names are those of {nearest.title}; "
        )
        problem += "one of the two files belongs to another model"
    elif distance(best) > distance(nearest):
        problem = f"its names are those of {nearest.title}, of which minivit reads folders, with config.json: "
        problem += "timm.models.save_for_hf(model, FOLDER)"
    elif not kind and distance(best):
        problem = f"not a ViT that minivit reads; {differs}"
    else:
        return best
    raise UserError(f"{where}: {problem}")


def num_blocks(names: Collection[str]) -> int:
    """Count the blocks that a checkpoint's names number."""
    return len({number[0] for name in names if (number := _BLOCK_NUMBER.search(name))})


def layout(model: ViT, family: Family) -> dict[str, tuple[str, ...]]:
    """Say for each parameter of a model which tensors of the file it is joined from."""
    table, found = family.names | family.head, {}
    prefix = family.prefix if model.config.num_classes else ""
    for name in model.state_dict():
        number, leaf = (
            re.search(r"\d+", name),
            name.rpartition(".")[2],
        )  # of the block; weight, bias, gamma, ...
        pattern = re.sub(r"^blocks\.\d+\.", "blocks.#.", name)
        theirs = _parts(table.get(pattern) or table[pattern.removesuffix(leaf) + "*"])
        parts = [
            part.replace("#", number[0] if number else "").replace("*", leaf) for part in theirs
        ]
        found[name] = tuple(part if name.startswith("head.") else prefix + part for part in parts)
    return found


def listed(
    missing: Collection[str], unexpected: Collection[str], misshapen: Collection[str] = ()
) -> str:
    """Say what is wrong with a file's tensors: how many of a kind, and the first few."""
    said = []
    for kind, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)):
        if names:
            first = [*list(names)[:3], "..."][: len(names)]
            said.append(f"{len(names)} {kind} ({', '.join(first)})")
    return "; ".join(said) or "nothing"


def _differences(family: Family, names: Collection[str]) -> tuple[list[str], list[str]]:
    """Return which names of a family, whatever the block, are missing and which are unexpected."""
    found = {_BLOCK_NUMBER.sub("#", name.removeprefix(family.prefix), count=1) for name in names}
    wanted, optional = _patterns(family.names), _patterns(family.head) | set(family.unused)
    return sorted(wanted - found), sorted(found - wanted - optional)


def _patterns(table: Names) -> set[str]:
    parts = {part for theirs in table.values() for part in _parts(theirs)}
    return {part.replace("*", leaf) for part in parts for leaf in ("weight", "bias")}


def _parts(theirs: str | tuple[str, ...]) -> tuple[str, ...]:
    return (theirs,) if isinstance(theirs, str) else theirs
