"""The layouts of ViT checkpoints: one table per family translates its tensor names to ours.

The names are those in the files on the Hub and in the code of transformers 5.24 (models/vit,
models/dinov2, models/dinov2_with_registers), timm 1.0 (models/vision_transformer.py), torchvision
0.29 (models/vision_transformer.py) and https://github.com/google-research/vision_transformer.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from ..errors import UserError, first_few
from ..model import ViT

# Our parameter names and the family's. In both, "#" stands for a block's number, and "*" for
# "weight" or "bias". Where the family has several names, we concatenate these tensors.
Names = dict[str, str | tuple[str, ...]]


@dataclass(frozen=True, eq=False)
class Family:
    """A layout of checkpoints."""

    title: str
    kind: str  # config.json's model_type; "timm"; or "" for files that have no config
    names: Names  # of the backbone
    head: Names
    unused: tuple[str, ...] = ()  # tensors of the backbone that classification does not use
    prefix: str = ""  # of the backbone's names in a checkpoint that has a head


_QKV = ("query", "key", "value")

_EMBEDDINGS: Names = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.*": "embeddings.patch_embeddings.projection.*",
    "norm.*": "layernorm.*",
}
# The attention of ViT and DINOv2 in a file, then that of DINOv2 in a model of transformers 5.
_ATTENTION: Names = {
    "blocks.#.attn.qkv.*": tuple(f"encoder.layer.#.attention.attention.{part}.*" for part in _QKV),
    "blocks.#.attn.proj.*": "encoder.layer.#.attention.output.dense.*",
}
_ATTENTION_IN_MEMORY: Names = {
    "blocks.#.attn.qkv.*": tuple(f"encoder.layer.#.attention.{part}_proj.*" for part in "qkv"),
    "blocks.#.attn.proj.*": "encoder.layer.#.attention.o_proj.*",
}
_VIT: Names = {
    **_EMBEDDINGS,
    **_ATTENTION,
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

_OURS = (
    "cls_token",
    "pos_embed",
    "patch_embed.proj.*",
    "blocks.#.norm1.*",
    "blocks.#.attn.qkv.*",
    "blocks.#.attn.proj.*",
    "blocks.#.norm2.*",
    "blocks.#.mlp.fc1.*",
    "blocks.#.mlp.fc2.*",
    "norm.*",
)
_TIMM: Names = {name: name for name in _OURS}
_TIMM_DINOV2: Names = {
    **_TIMM,
    "blocks.#.ls1.gamma": "blocks.#.ls1.gamma",
    "blocks.#.ls2.gamma": "blocks.#.ls2.gamma",
}

_LAYER = "encoder.layers.encoder_layer_#"
_TORCHVISION: Names = {
    "cls_token": "class_token",
    "pos_embed": "encoder.pos_embedding",
    "patch_embed.proj.*": "conv_proj.*",
    "blocks.#.norm1.*": f"{_LAYER}.ln_1.*",
    "blocks.#.attn.qkv.weight": f"{_LAYER}.self_attention.in_proj_weight",
    "blocks.#.attn.qkv.bias": f"{_LAYER}.self_attention.in_proj_bias",
    "blocks.#.attn.proj.*": f"{_LAYER}.self_attention.out_proj.*",
    "blocks.#.norm2.*": f"{_LAYER}.ln_2.*",
    "blocks.#.mlp.fc1.*": f"{_LAYER}.mlp.0.*",
    "blocks.#.mlp.fc2.*": f"{_LAYER}.mlp.3.*",
    "norm.*": "encoder.ln.*",
}


def _flax(ours: str, theirs: str, weight: str = "kernel") -> Names:
    """Return the rows for a Flax layer, whose weight is called kernel, or scale in a norm."""
    return {f"{ours}.weight": f"{theirs}/{weight}", f"{ours}.bias": f"{theirs}/bias"}


_FLAX = "Transformer/encoderblock_#"
_FLAX_ATTENTION = f"{_FLAX}/MultiHeadDotProductAttention_1"
_GOOGLE: Names = {
    "cls_token": "cls",
    "pos_embed": "Transformer/posembed_input/pos_embedding",
    **_flax("patch_embed.proj", "embedding"),
    **_flax("blocks.#.norm1", f"{_FLAX}/LayerNorm_0", "scale"),
    "blocks.#.attn.qkv.weight": tuple(f"{_FLAX_ATTENTION}/{part}/kernel" for part in _QKV),
    "blocks.#.attn.qkv.bias": tuple(f"{_FLAX_ATTENTION}/{part}/bias" for part in _QKV),
    **_flax("blocks.#.attn.proj", f"{_FLAX_ATTENTION}/out"),
    **_flax("blocks.#.norm2", f"{_FLAX}/LayerNorm_2", "scale"),
    **_flax("blocks.#.mlp.fc1", f"{_FLAX}/MlpBlock_3/Dense_0"),
    **_flax("blocks.#.mlp.fc2", f"{_FLAX}/MlpBlock_3/Dense_1"),
    **_flax("norm", "Transformer/encoder_norm", "scale"),
}


def _transformers(
    kind: str, names: Names, unused: tuple[str, ...], in_memory: bool = False
) -> Family:
    """Return a family of transformers.

    In transformers 5 a model's state_dict() has other names than the file that save_pretrained
    writes. Both are read.
    """
    title = f"transformers 5's {kind} in memory" if in_memory else f"transformers' {kind}"
    return Family(title, kind, names, {"head.*": "classifier.*"}, unused, f"{kind}.")


_POOLER = ("pooler.dense.weight", "pooler.dense.bias")
_MASK = ("embeddings.mask_token",)
_WITH_REGISTERS = "dinov2_with_registers"
_SAME_HEAD: Names = {"head.*": "head.*"}

VIT = _transformers("vit", _VIT, _POOLER)
DINOV2 = _transformers("dinov2", _DINOV2 | _ATTENTION, _MASK)
REGISTERS = _transformers(_WITH_REGISTERS, _REGISTERS | _ATTENTION, _MASK)
TIMM = Family("timm's vit", "timm", _TIMM, _SAME_HEAD)
TIMM_DINOV2 = Family("timm's dinov2", "timm", _TIMM_DINOV2, _SAME_HEAD)
TIMM_REGISTERS = Family(
    "timm's dinov2 with registers",
    "timm",
    {**_TIMM_DINOV2, "reg_token": "reg_token"},
    _SAME_HEAD,
)
GOOGLE = Family("Google's npz", "", _GOOGLE, _flax("head", "head"))
FAMILIES = (
    VIT,
    _transformers("vit", _VIT_IN_MEMORY, _POOLER, in_memory=True),
    DINOV2,
    _transformers("dinov2", _DINOV2 | _ATTENTION_IN_MEMORY, _MASK, in_memory=True),
    REGISTERS,
    _transformers(_WITH_REGISTERS, _REGISTERS | _ATTENTION_IN_MEMORY, _MASK, in_memory=True),
    TIMM,
    TIMM_DINOV2,
    TIMM_REGISTERS,
    Family("torchvision's vit", "", _TORCHVISION, {"head.*": "heads.head.*"}),
    GOOGLE,
)
KINDS = (VIT.kind, DINOV2.kind, REGISTERS.kind, TIMM.kind)

_BLOCK_NUMBER = re.compile(r"(?<=[._])\d+(?=[./])")  # its first match in a tensor's name

# torch.compile, FSDP and activation checkpointing wrap parts of a model, too.
WRAPPED_PARTS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def without_wrappers(tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return tensors by the names that they have in the model itself, without wrappers'.

    A note on stderr says what is left out of the names. Raises UserError if two get one name.
    """
    removed = [part for part in WRAPPED_PARTS if any(part in name for name in tensors)]
    renamed = {}
    for name, tensor in tensors.items():
        for part in removed:
            name = name.replace(part, "")
        renamed[name] = tensor
    prefix = _common_wrapper(renamed)
    renamed = {name.removeprefix(prefix): tensor for name, tensor in renamed.items()}
    if prefix:
        removed.insert(0, prefix)
    if len(renamed) < len(tensors):
        raise UserError(
            f"{source}: without {' and '.join(map(repr, removed))}, some names of tensors are equal"
        )
    if removed:
        print(
            f"{source}: reading the tensors' names without {' and '.join(map(repr, removed))}",
            file=sys.stderr,
        )
    return renamed


def _common_wrapper(names: Collection[str]) -> str:
    """Return the names of wrappers that all names begin with, such as "model.module.".

    Wrappers are modules that hold a whole model: those of DistributedDataParallel, torch.compile
    and Lightning, or an attribute of any name in the user's code.
    """
    prefix = ""
    while True:
        starts = {_first_module(name.removeprefix(prefix)) for name in names}
        start = starts.pop() if len(starts) == 1 else ""
        if not _is_wrapper(start):
            return prefix
        prefix += start


def _partly_wrapped(names: Collection[str]) -> str:
    """Say that most of the names begin with a wrapper's and which do not, or return ""."""
    for start in {_first_module(name) for name in names}:
        others = [name for name in names if not name.startswith(start)]
        if others and _is_wrapper(start) and len(others) < len(names) / 2:
            return f"; most names begin with {start!r}, but not {first_few(others)}"
    return ""


def _first_module(name: str) -> str:
    """Return the first module in a tensor's name, such as "model.", or "" if there is none."""
    module, dot, _ = name.partition(".")
    return module + dot if dot else ""


def _is_wrapper(start: str) -> bool:
    """Return whether no family has names that begin so, so that another module holds the model."""
    known = {""}
    for family in FAMILIES:
        names = _patterns(family.names) | _patterns(family.head) | set(family.unused)
        known |= {_first_module(name) for name in (*names, family.prefix)}
    return start not in known


def recognise(kind: str, names: Collection[str], source: str) -> Family:
    """Return the family of a checkpoint from the kind in its config and its tensors' names.

    Several families may share a kind; the names decide between them. Raises UserError if the names
    belong to a family of another kind, or to none. Its message lists how they differ from the
    nearest family.
    """
    differences = {family: _differences(family, names) for family in FAMILIES}

    def distance(family: Family) -> int:
        missing, unexpected = differences[family]
        return len(missing) + len(unexpected)

    nearest = min(FAMILIES, key=distance)
    of_this_kind = [family for family in FAMILIES if family.kind == kind]
    best = min(of_this_kind, key=distance, default=None)
    mismatch = f"nearest is {nearest.title}: {mismatches(*differences[nearest])}"
    mismatch += _partly_wrapped(names)
    if best is None:
        problem = (
            f"config.json has model_type {kind!r}; expected one of {', '.join(KINDS)}; "
            f"by the tensors' names, {mismatch}"
        )
    elif distance(best) > distance(nearest) > 0 and kind:
        problem = f"config.json is that of {best.title}, but by the tensors' names, {mismatch}"
    elif distance(best) > distance(nearest) and kind:
        problem = (
            f"config.json is that of {best.title}, but the tensors have the names of "
            f"{nearest.title}; one of the two files belongs to another model"
        )
    elif distance(nearest) > 0 and not kind:
        problem = f"not a ViT that minivit reads; {mismatch}"
    elif distance(best) > distance(nearest):
        problem = f"the tensors have the names of {nearest.title}, {_how_to_add_a_config(nearest)}"
    else:
        return best
    raise UserError(f"{source}: {problem}")


def _how_to_add_a_config(family: Family) -> str:
    """Say what a file of weights lacks that lies alone but needs a config."""
    if family.kind == TIMM.kind:
        return (
            "which minivit reads from a folder with a config.json; "
            "write one with timm.models.save_for_hf(model, FOLDER)"
        )
    return (
        "whose sizes and preprocessing stand in config.json and preprocessor_config.json; "
        "put the file back beside those two, which lay in its folder"
    )


def needs_config(names: Collection[str]) -> bool:
    """Return whether a file of weights needs a config, which those of torchvision and Google lack.

    Returns True for names of no family, too.
    """
    for family in FAMILIES:
        if not family.kind and _differences(family, names) == ([], []):
            return False
    return True


def num_blocks(names: Collection[str]) -> int:
    """Return how many blocks the names of a checkpoint's tensors belong to."""
    matches = map(_BLOCK_NUMBER.search, names)
    return len({match[0] for match in matches if match})


def backbone_prefix(family: Family, names: Collection[str]) -> str:
    """Return the prefix that the names of a checkpoint's backbone have, or ""."""
    if family.prefix and any(name.startswith(family.prefix) for name in names):
        return family.prefix
    return ""


def layout(model: ViT, family: Family, prefix: str) -> dict[str, tuple[str, ...]]:
    """Return for each parameter of a model the names of the tensors that it is made of.

    The names of the backbone get a prefix.
    """
    table = family.names | family.head
    names = {}
    for ours in model.state_dict():
        match = re.match(r"blocks\.(\d+)\.", ours)
        number = match[1] if match else ""
        pattern = ours.replace(f"blocks.{number}.", "blocks.#.")
        leaf = ours.rpartition(".")[2]
        if pattern not in table:
            pattern = pattern.removesuffix(leaf) + "*"
        part_prefix = "" if ours.startswith("head.") else prefix
        names[ours] = tuple(
            part_prefix + part.replace("#", number).replace("*", leaf)
            for part in _parts(table[pattern])
        )
    return names


def mismatches(
    missing: Collection[str], unexpected: Collection[str], misshapen: Collection[str] = ()
) -> str:
    """Return a phrase that counts the tensors that do not fit, and names the first of them."""
    groups = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    phrases = []
    for kind, group in groups.items():
        if group:
            phrases.append(f"{len(group)} {kind} ({first_few(group)})")
    return "; ".join(phrases) or "nothing differs"


def _differences(family: Family, names: Collection[str]) -> tuple[list[str], list[str]]:
    """Return which of a family's names are missing and which names are not the family's.

    Block numbers are ignored.
    """
    patterns = set()
    for name in names:
        patterns.add(_BLOCK_NUMBER.sub("#", name.removeprefix(family.prefix), count=1))
    required = _patterns(family.names)
    optional = _patterns(family.head) | set(family.unused)
    return sorted(required - patterns), sorted(patterns - required - optional)


def _patterns(table: Names) -> set[str]:
    """Return all names of the family in a table, with "*" spelled out."""
    patterns = set()
    for theirs in table.values():
        for part in _parts(theirs):
            patterns |= {part.replace("*", "weight"), part.replace("*", "bias")}
    return patterns


def _parts(theirs: str | tuple[str, ...]) -> tuple[str, ...]:
    return (theirs,) if isinstance(theirs, str) else theirs
