"""Checkpoints: from the Hub, a folder or a file into a model, strictly, and back into a folder that transformers reads."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..data.preprocess import Preprocess
from ..errors import UserError
from ..model import ViT, ViTConfig, trainable
from ..system.files import read_json, write_json
from .configs import (
    hub_config,
    hub_family,
    hub_sizes,
    keeps_positions,
    sizes_from_tensors,
    timm_sizes,
)
from .families import KINDS, TIMM_REGISTERS, Family, layout, listed, num_blocks, recognise
from .hub import Files, Origin, fetch
from .tensors import content_hash, read_tensors, save_tensors, tail_metadata


def load_pretrained(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    num_classes: int | None = None,
    labels: Sequence[str] | None = None,
    img_size: tuple[int, int] | None = None,
) -> ViT:
    """Load a ViT in float32 on the CPU from a Hub id, a local folder in the Hub's layout, or a file.

    Read are the layouts in families.py, torchvision's state dict and Google's npz as files, and a run's tail.safetensors,
    whose base is found or fetched. The model carries what belongs to its weights: `labels` (class names in index order),
    `preprocess` (a `Preprocess`) and `origin`. A checkpoint without a classifier gives a backbone, with no labels. Asking
    for other `labels`, or another `num_classes`, puts a fresh head on, and says so on stderr. `img_size` (h, w) asks for
    another input size; positions are then resampled as the reference does (bicubic).
    Raises UserError, naming tensors that are missing, unexpected, misshapen or not finite; nothing is ever left random.
    """
    source = str(source)
    tail = tail_metadata(Path(os.path.expanduser(source)))
    model = (
        _load(source, revision, img_size)
        if tail is None
        else _load_with_tail(source, tail, img_size)
    )
    _align(model)
    if labels is not None or num_classes is not None:
        wanted = (
            tuple(labels)
            if labels is not None
            else tuple(f"class {i}" for i in range(num_classes or 0))
        )
        if len(wanted) != len(model.labels) or (labels is not None and wanted != model.labels):
            had = f"the checkpoint's {len(model.labels)}" if model.labels else "none"
            print(f"new head for {len(wanted)} classes, in place of {had}", file=sys.stderr)
            model.reset_head(len(wanted))
            model.labels = wanted
            model.preprocess = replace(
                model.preprocess, round_margins=False
            )  # it is written for transformers
    return model


def _load(source: str, revision: str | None, img_size: tuple[int, int] | None) -> ViT:
    files = fetch(source, revision)
    tensors: dict[str, Tensor] = {}
    for path in files.weights:
        found = read_tensors(path)
        if twice := sorted(tensors.keys() & found.keys()):
            raise UserError(f"{path}: {listed((), twice)}: already in another of the files")
        tensors |= found
    config = read_json(files.config) if files.config else {}
    family = recognise(_kind(config), tensors, source)
    sizes, preprocess, labels = _understand(source, files, config, family, tensors)
    if img_size is not None:
        preprocess = preprocess.at(img_size)
        sizes = replace(sizes, img_size=img_size, pos_grid=sizes.pos_grid or sizes.grid)
    if sizes.depth != num_blocks(tensors):
        raise UserError(
            f"{source}: config.json says {sizes.depth} blocks, but the tensors are of {num_blocks(tensors)}"
        )
    with torch.device("meta"):
        model = ViT(sizes)
    model.labels, model.preprocess = labels, preprocess
    model.origin = Origin(
        source, files.commit, family.title, _fill(model, family, tensors, files.weights[0])
    )
    return model


def _align(model: ViT) -> None:
    """Move what one photo's class token alone goes through to where all memory of torch's begins, at 64 bytes.

    A product of a matrix and a vector sums in an order that depends on it, and in a file tensors lie anywhere.
    """
    for part in (*model.blocks[-1:], model.head):
        for parameter in part.parameters():
            if parameter.data_ptr() % 64:
                parameter.data = parameter.data.clone()


def read_configs(
    source: str, revision: str | None
) -> tuple[ViTConfig, Preprocess, tuple[str, ...], str, str | None] | None:
    """Return what a checkpoint's configs say without its weights: sizes, preprocessing, labels, the file of that, commit.

    None for a file, which has no config. Raises UserError as load_pretrained.
    """
    files = fetch(source, revision, weights=False)
    if files.config is None:
        return None
    config = read_json(files.config)
    if _kind(config) not in KINDS:
        raise UserError(
            f"{source}: config.json has model_type {_kind(config)!r}; expected one of {', '.join(KINDS)}"
        )
    return (
        *_understand(source, files, config, None, {}),
        (files.preprocessor or files.config).name,
        files.commit,
    )


def _kind(config: dict) -> str:
    return (
        "timm"
        if "architecture" in config and "model_type" not in config
        else str(config.get("model_type", ""))
    )


def _understand(
    source: str, files: Files, config: dict, family: Family | None, tensors: Mapping[str, Tensor]
) -> tuple[ViTConfig, Preprocess, tuple[str, ...]]:
    """Read sizes, preprocessing and labels from the configs, or the tensors where there are none."""
    try:
        if files.preprocessor:
            return hub_sizes(config, read_json(files.preprocessor))
        return (
            timm_sizes(config)
            if files.config or family is None
            else sizes_from_tensors(family, tensors, source)
        )
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    except KeyError as error:
        raise UserError(f"{source}: config.json lacks {error}") from error
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise UserError(
            f"{source}: config.json or preprocessor_config.json makes no sense ({error})"
        ) from error


def _load_with_tail(source: str, tail: Mapping[str, str], img_size: tuple[int, int] | None) -> ViT:
    """Load the base that a tail was trained on, make sure that it is the same, and put the tail in."""
    try:
        labels, preprocess = (
            tuple(json.loads(tail["labels"])),
            Preprocess.from_config(json.loads(tail["preprocess"])),
        )
        wanted, base, commit = tail["sha256"], tail["base"], tail["commit"] or None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{source}: its metadata is not that of a minivit tail ({error}); train again"
        ) from error
    try:
        model = _load(base, commit, img_size or preprocess.size)
    except UserError as error:
        raise UserError(f"{source} needs its base: {error}") from error
    model.reset_head(len(labels))
    tensors, parameters = (
        read_tensors(Path(os.path.expanduser(source))),
        dict(model.named_parameters()),
    )
    unexpected = sorted(tensors.keys() - parameters.keys())
    fitting = {(name, p.shape, p.dtype) for name, p in parameters.items()}
    misshapen = [
        name
        for name, t in tensors.items()
        if name in parameters and (name, t.shape, t.dtype) not in fitting
    ]
    missing = [
        f"head.{leaf}" for leaf in ("weight", "bias") if labels and f"head.{leaf}" not in tensors
    ]
    if missing or unexpected or misshapen:
        raise UserError(
            f"{source}: does not fit its base {base}: {listed(missing, unexpected, misshapen)}"
        )
    if content_hash({name: p for name, p in parameters.items() if name not in tensors}) != wanted:
        raise UserError(
            f"{source}: its base {base} is not the one it was trained on; its contents differ"
        )
    model.load_state_dict(model.state_dict() | tensors, assign=True)
    model.labels = labels
    model.preprocess = preprocess if img_size is None else preprocess.at(img_size)
    model.origin = replace(model.origin, source=source)
    return model


def save_pretrained(model: ViT, folder: str | os.PathLike[str]) -> None:
    """Write model.safetensors, config.json and preprocessor_config.json as transformers lays them out on the Hub.

    A folder never holds half of one.
    """
    folder, family, unused = (
        Path(folder),
        hub_family(model.config),
        (model.origin or Origin()).unused,
    )
    prefix = family.prefix if model.config.num_classes else ""
    tensors = {prefix + name: tensor for name, tensor in unused.items() if name in family.unused}
    if model.config.num_registers:  # transformers has one there always, and zeros to begin with
        tensors.setdefault(f"{prefix}embeddings.mask_token", torch.zeros(1, model.config.embed_dim))
    tensors |= tensors_as(model, family, resample=not keeps_positions(model.config))
    save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    write_json(
        folder / "config.json", hub_config(model, use_mask_token="embeddings.mask_token" in unused)
    )
    write_json(folder / "preprocessor_config.json", model.preprocess.to_config())


@torch.no_grad()
def tensors_as(model: ViT, family: Family, *, resample: bool) -> dict[str, Tensor]:
    """Return a model's tensors on the CPU under a family's names; with `resample`, positions for its own input size."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    if resample:
        state["pos_embed"] = model.resample(state["pos_embed"])
    if family is TIMM_REGISTERS:  # timm has no position for the class token
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    names = layout(model, family)
    return {
        theirs: part.contiguous()
        for name, tensor in state.items()
        for theirs, part in zip(names[name], tensor.chunk(len(names[name])))
    }


def save_tail(model: ViT, path: Path) -> None:
    """Write only what trains, under our names, with what it belongs to: base, commit, hash of what is frozen, labels."""
    tail, source = trainable(model), model.origin.source
    here = Path(os.path.expanduser(source))
    metadata = {
        "base": str(here.resolve()) if source != "demo" and here.exists() else source,
        "commit": model.origin.commit or "",
        "sha256": hash_frozen(model),
        "labels": json.dumps(model.labels),
        "preprocess": json.dumps(model.preprocess.to_config()),
    }
    save_tensors(path, {name: p.detach().cpu().contiguous() for name, p in tail.items()}, metadata)


def hash_frozen(model: ViT) -> str:
    """Return the hash of what does not train, computed once."""
    hashes, tail = model.origin.hashes, frozenset(trainable(model))
    if tail not in hashes:
        hashes[tail] = content_hash(
            {name: p for name, p in model.named_parameters() if name not in tail}
        )
    return hashes[tail]


def _fill(model: ViT, family: Family, tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Give every parameter of a model its tensor; return the tensors that classification does not use."""
    prefix = family.prefix if model.config.num_classes else ""
    unused = {
        name: tensors.pop(prefix + name) for name in family.unused if prefix + name in tensors
    }
    names, missing, misshapen, state = layout(model, family), [], [], {}
    if (
        family is TIMM_REGISTERS and tensors["pos_embed"].ndim == 3
    ):  # timm has no position for the class token
        tensors["pos_embed"] = torch.cat(
            [torch.zeros_like(tensors["pos_embed"][:, :1]), tensors["pos_embed"]], dim=1
        )
    for name, parameter in model.state_dict().items():
        theirs = names[name]
        shape = (parameter.shape[0] // len(theirs), *parameter.shape[1:])
        parts = []
        for part in theirs:
            tensor = tensors.pop(part, None)
            if tensor is None:
                missing.append(part)
            elif (
                tuple(tensor.shape) != shape
                or not tensor.is_floating_point()
                or tensor.layout is not torch.strided
            ):
                misshapen.append(
                    f"{part}: expected {shape}, found {tuple(tensor.shape)} {tensor.dtype}"
                )
            else:
                parts.append(tensor)
        if not missing and not misshapen:
            state[name] = (parts[0] if len(parts) == 1 else torch.cat(parts)).float()
    if missing or misshapen or tensors:
        problems = listed(missing, sorted(tensors), misshapen)
        raise UserError(
            f"{path}: does not fit {family.title} of the sizes in config.json: {problems}"
        )
    model.load_state_dict(state, assign=True)
    return unused
