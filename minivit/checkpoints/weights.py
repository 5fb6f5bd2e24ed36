"""Load a checkpoint into a model, and save a model as a checkpoint that transformers reads."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.preprocess import Preprocess
from ..errors import UserError, first_few
from ..model import ViT, trainable
from ..system.files import read_json, write_json
from .configs import (
    CheckpointSpec,
    hub_config,
    hub_family,
    keeps_positions,
    spec_from_hub,
    spec_from_tensors,
    spec_from_timm,
)
from .families import KINDS, TIMM_REGISTERS, Family, layout, mismatches, num_blocks, recognise
from .hub import Files, Origin, fetch
from .tensors import TAIL_KEY, content_hash, read_tensors, save_tensors, tail_metadata


def load_pretrained(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    num_classes: int | None = None,
    labels: Sequence[str] | None = None,
    img_size: tuple[int, int] | None = None,
) -> ViT:
    """Load a ViT in float32 on the CPU.

    `source` is a Hub id, a folder in the layout of transformers or timm, "demo", a state dict of
    torchvision, an npz file of Google's, or the tail.safetensors of a run, whose base is then found
    or downloaded. families.py lists the layouts.

    The model carries what belongs to its weights: `labels` (class names in index order),
    `preprocess` and `origin`. A checkpoint without a classifier gives a backbone without labels.
    If `labels`, or the number `num_classes`, differ from the checkpoint's, the model gets a new
    head, and a note on stderr says so. `img_size` (h, w) selects another input size; positions are
    then resampled as transformers does (bicubic).

    No parameter is ever left random: raises UserError if tensors are missing, unexpected,
    misshapen or not finite, and names them.
    """
    source = str(source)
    metadata = tail_metadata(Path(os.path.expanduser(source)))
    if metadata is None:
        model = _load(source, revision, img_size)
    else:
        model = _load_with_tail(source, metadata, img_size)
    _align(model)
    if labels is not None:
        if tuple(labels) != model.labels:
            _replace_head(model, tuple(labels))
    elif num_classes is not None and num_classes != len(model.labels):
        _replace_head(model, tuple(f"class {i}" for i in range(num_classes)))
    return model


def read_configs(source: str, revision: str | None) -> tuple[CheckpointSpec, Files] | None:
    """Return what a checkpoint's config files say, and where they lie, without its weights.

    Returns None for a file, which has no config. Raises UserError like load_pretrained.
    """
    files = fetch(source, revision, weights=False)
    if files.config is None:
        return None
    config = read_json(files.config)
    kind = _kind(config)
    if kind not in KINDS:
        raise UserError(
            f"{source}: config.json has model_type {kind!r}; expected one of {', '.join(KINDS)}"
        )
    with _config_errors(source):
        return _read_spec(files, config), files


def _load(source: str, revision: str | None, img_size: tuple[int, int] | None) -> ViT:
    files = fetch(source, revision)
    tensors: dict[str, Tensor] = {}
    for path in files.weights:
        shard = read_tensors(path)
        repeated = sorted(tensors.keys() & shard.keys())
        if repeated:
            raise UserError(f"{path}: repeats tensors of another shard: {first_few(repeated)}")
        tensors |= shard
    config = read_json(files.config) if files.config else {}
    family = recognise(_kind(config), tensors, source)
    with _config_errors(source):
        if files.config:
            spec = _read_spec(files, config)
        else:
            spec = spec_from_tensors(family, tensors, source)
    sizes = spec.sizes
    preprocess = spec.preprocess
    if img_size is not None:
        preprocess = preprocess.at(img_size)
        sizes = replace(sizes, img_size=img_size, pos_grid=sizes.pos_grid or sizes.grid)
    depth = num_blocks(tensors)
    if sizes.depth != depth:
        raise UserError(
            f"{source}: config.json says {sizes.depth} blocks, but there are tensors of {depth}"
        )
    with torch.device("meta"):
        model = ViT(sizes)
    unused = _fill(model, family, tensors, files.weights[0])
    model.labels = spec.labels
    model.preprocess = preprocess
    model.origin = Origin(source, files.commit, family.title, unused)
    return model


def _kind(config: dict) -> str:
    """Return a config's kind, as in Family.kind."""
    if "architecture" in config and "model_type" not in config:
        return "timm"
    return str(config.get("model_type", ""))


def _read_spec(files: Files, config: dict) -> CheckpointSpec:
    if files.preprocessor:
        return spec_from_hub(config, read_json(files.preprocessor))
    return spec_from_timm(config)


@contextmanager
def _config_errors(source: str) -> Iterator[None]:
    """Turn any error that a broken config can cause into a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    except KeyError as error:
        raise UserError(f"{source}: config.json lacks {error}") from error
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise UserError(
            f"{source}: config.json or preprocessor_config.json makes no sense ({error})"
        ) from error


def _fill(model: ViT, family: Family, tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Give every parameter of a model its tensor, which is taken out of `tensors`.

    Returns the tensors that classification does not use, by their names without the prefix.
    Raises UserError if tensors are missing, misshapen or left over; `path` is for the message.
    """
    prefix = family.prefix if model.config.num_classes else ""
    unused = {}
    for name in family.unused:
        if prefix + name in tensors:
            unused[name] = tensors.pop(prefix + name)
    positions = tensors.get("pos_embed")
    if family is TIMM_REGISTERS and positions is not None and positions.ndim == 3:
        # timm has no position for the class token: put zeros in front.
        tensors["pos_embed"] = F.pad(positions, (0, 0, 1, 0))

    state: dict[str, Tensor] = {}
    missing = []
    misshapen = []
    names = layout(model, family)
    for name, parameter in model.state_dict().items():
        # Several tensors, such as query, key and value, have equal parts of the first dimension.
        shape = (parameter.shape[0] // len(names[name]), *parameter.shape[1:])
        parts = []
        for part in names[name]:
            tensor = tensors.pop(part, None)
            if tensor is None:
                missing.append(part)
            elif tensor.shape != shape or not tensor.is_floating_point():
                misshapen.append(
                    f"{part}: expected {shape}, found {tuple(tensor.shape)} {tensor.dtype}"
                )
            else:
                parts.append(tensor)
        if not missing and not misshapen:
            # torch.cat would copy a single tensor, too.
            whole = parts[0] if len(parts) == 1 else torch.cat(parts)
            state[name] = whole.float()
    if missing or misshapen or tensors:
        problems = mismatches(missing, sorted(tensors), misshapen)
        raise UserError(
            f"{path}: does not fit {family.title} of the sizes in config.json: {problems}"
        )
    model.load_state_dict(state, assign=True)
    return unused


def _load_with_tail(
    source: str, metadata: Mapping[str, str], img_size: tuple[int, int] | None
) -> ViT:
    """Load the base that a tail was trained on, and replace the weights that the tail holds.

    Raises UserError if the base cannot be loaded, or if it is not the same as in training.
    """
    try:
        about = _tail_description(metadata)
        base = about["base"]
        commit = about["commit"] or None
        frozen_hash = about["sha256"]
        labels = tuple(about["labels"])
        preprocess = Preprocess.from_config(about["preprocess"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{source}: its metadata is not that of a minivit tail ({error}); train again"
        ) from error
    try:
        model = _load(base, commit, img_size or preprocess.size)
    except UserError as error:
        raise UserError(f"{source} needs its base: {error}") from error
    model.reset_head(len(labels))
    model.labels = labels
    model.preprocess = preprocess if img_size is None else preprocess.at(img_size)
    model.origin = replace(model.origin, source=source)

    tensors = read_tensors(Path(os.path.expanduser(source)))
    parameters = dict(model.named_parameters())
    missing = [name for name in parameters if name.startswith("head.") and name not in tensors]
    unexpected = sorted(tensors.keys() - parameters.keys())
    misshapen = []
    for name in sorted(tensors.keys() & parameters.keys()):
        tensor = tensors[name]
        parameter = parameters[name]
        if tensor.shape != parameter.shape or tensor.dtype != parameter.dtype:
            misshapen.append(name)
    if missing or unexpected or misshapen:
        problems = mismatches(missing, unexpected, misshapen)
        raise UserError(f"{source}: does not fit its base {base}: {problems}")
    if _hash_except(model, tensors) != frozen_hash:
        raise UserError(
            f"{source}: its base {base} is not the one it was trained on; the weights differ"
        )
    model.load_state_dict(model.state_dict() | tensors, assign=True)
    return model


def _tail_description(metadata: Mapping[str, str]) -> dict:
    """Return what a tail's metadata says of it: base, commit, sha256, labels, preprocess."""
    if TAIL_KEY in metadata:
        return json.loads(metadata[TAIL_KEY])
    # Tails of minivit before 2026-11-28 have a key for each of these.
    about: dict = dict(metadata)
    for name in ("labels", "preprocess"):
        about[name] = json.loads(metadata[name])
    return about


def _align(model: ViT) -> None:
    """Move the parameters of the last block and the head to memory that is aligned to 64 bytes.

    Only the class token passes through these layers. For a single image that is a product of a
    matrix and a vector, whose order of summation depends on the alignment. In a file, tensors may
    lie anywhere: without this, a loaded model could differ from the saved one in the last bits.
    """
    for module in (*model.blocks[-1:], model.head):
        for parameter in module.parameters():
            if parameter.data_ptr() % 64:
                parameter.data = parameter.data.clone()  # torch allocates with this alignment


def _replace_head(model: ViT, labels: tuple[str, ...]) -> None:
    """Give a model a new head for other classes, and say so on stderr."""
    old = f"the checkpoint's {len(model.labels)}" if model.labels else "none"
    print(f"new head for {len(labels)} classes, in place of {old}", file=sys.stderr)
    model.reset_head(len(labels))
    model.labels = labels
    # The model will be saved for transformers, which does not round the margins of a crop.
    model.preprocess = replace(model.preprocess, round_margins=False)


def save_pretrained(model: ViT, folder: str | os.PathLike[str]) -> None:
    """Write model.safetensors, config.json and preprocessor_config.json as transformers does.

    Each file is written whole or not at all.
    """
    folder = Path(folder)
    config = model.config
    family = hub_family(config)
    prefix = family.prefix if config.num_classes else ""
    origin = model.origin or Origin()
    tensors = {}
    for name in family.unused:
        if name in origin.unused:
            tensors[prefix + name] = origin.unused[name]
    if config.num_registers:
        # transformers expects a mask token here. It starts as zeros.
        mask_token = torch.zeros(1, config.embed_dim)
        tensors.setdefault(f"{prefix}embeddings.mask_token", mask_token)
    tensors |= tensors_as(model, family, resample=not keeps_positions(config))
    use_mask_token = "embeddings.mask_token" in origin.unused
    save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    write_json(folder / "config.json", hub_config(model, use_mask_token=use_mask_token))
    write_json(folder / "preprocessor_config.json", model.preprocess.to_config())


@torch.no_grad()
def tensors_as(model: ViT, family: Family, *, resample: bool) -> dict[str, Tensor]:
    """Return a model's tensors on the CPU under a family's names.

    With `resample`, the positions are those of the model's own input size.
    """
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    positions = state["pos_embed"]
    if resample:
        positions = model.resample(positions)
    if family is TIMM_REGISTERS:
        # timm has no position for the class token: add it to the token.
        state["cls_token"] = state["cls_token"] + positions[:, :1]
        positions = positions[:, 1:]
    state["pos_embed"] = positions
    tensors = {}
    for name, names in layout(model, family).items():
        for part_name, part in zip(names, state[name].chunk(len(names))):
            tensors[part_name] = part.contiguous()
    return tensors


def save_tail(model: ViT, path: Path) -> None:
    """Write the trainable weights alone, under our names.

    The metadata holds what load_pretrained needs to complete the model: its base, the hash of the
    frozen weights, the labels and the preprocessing.
    """
    source = model.origin.source
    base = Path(os.path.expanduser(source))
    if source != "demo" and base.exists():
        source = str(base.resolve())
    about = {
        "base": source,
        "commit": model.origin.commit or "",
        "sha256": hash_frozen(model),
        "labels": model.labels,
        "preprocess": model.preprocess.to_config(),
    }
    tail = {name: tensor.detach().cpu().contiguous() for name, tensor in trainable(model).items()}
    save_tensors(path, tail, {TAIL_KEY: json.dumps(about, sort_keys=True)})


def hash_frozen(model: ViT) -> str:
    """Return the hash of the frozen weights; it is computed once for each set of trainable ones."""
    hashes = model.origin.hashes
    tail = frozenset(trainable(model))
    if tail not in hashes:
        hashes[tail] = _hash_except(model, tail)
    return hashes[tail]


def _hash_except(model: ViT, names: Container[str]) -> str:
    """Return the hash of all parameters but those named."""
    return content_hash(
        {name: tensor for name, tensor in model.named_parameters() if name not in names}
    )
