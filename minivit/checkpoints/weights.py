"""Load a checkpoint into a model, and save a model as a checkpoint that transformers reads."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Collection, Container, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
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
)
from .families import (
    KINDS,
    TIMM_REGISTERS,
    Family,
    backbone_prefix,
    layout,
    mismatches,
    needs_config,
    num_blocks,
    recognise,
    without_wrappers,
)
from .hub import Files, Origin, fetch, read_preprocess
from .tensors import FLOATS, TAIL_KEY, content_hash, read_tensors, save_tensors, tail_metadata
from .timm_configs import spec_from_timm


def load_pretrained(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    num_classes: int | None = None,
    labels: Sequence[str] | None = None,
    img_size: tuple[int, int] | None = None,
) -> ViT:
    """Load a ViT in float32 on the CPU.

    `source` is a Hub id, a folder in the layout of transformers or timm, "demo", a file of weights
    from such a folder, a state dict of torchvision, an npz file of Google's, or the
    tail.safetensors of a run, whose base is then found or downloaded. families.py lists the
    layouts.

    The model carries what belongs to its weights: `labels` (class names in index order),
    `preprocess` and `origin`. A checkpoint without a classifier gives a backbone without labels.
    If `labels`, or the number `num_classes`, differ from the checkpoint's, the model gets a new
    head, and a note on stderr says so. With either, the model is meant to be trained and written:
    its preprocessing becomes one that transformers has, too. `img_size` (h, w) selects another
    input size; positions are then resampled as transformers does (bicubic).

    No parameter is ever left random: raises UserError if tensors are missing, unexpected,
    misshapen or not finite, and names them. Raises UserError, too, for whatever a config asks that
    minivit does not do.
    """
    source = str(source)
    metadata = tail_metadata(Path(os.path.expanduser(source)))
    spec = None
    if metadata is None:
        model, spec = _load(source, revision, img_size)
    else:
        model = _load_with_tail(source, metadata, img_size)
    _align(model)
    wanted = None
    if labels is not None:
        wanted = tuple(labels)
    elif num_classes is not None and num_classes != len(model.labels):
        wanted = tuple(f"class {i}" for i in range(num_classes))
    head_problem = "" if spec is None else spec.head_problem
    if wanted is not None and (wanted != model.labels or head_problem):
        _replace_head(model, wanted)
    elif head_problem:
        raise UserError(f"{source}: {head_problem}")
    if labels is not None or num_classes is not None:
        _prepare_for_training(model, spec)
    return model


def read_configs(source: str, revision: str | None) -> tuple[CheckpointSpec, Files] | None:
    """Return what a checkpoint's config files say, and where they lie, without its weights.

    Returns None for a file that need not belong to a config. Raises UserError like load_pretrained.
    """
    files = fetch(source, revision, weights=False)
    if files.config is None or files.is_lone:
        return None
    config = read_json(files.config)
    kind = _kind(config, source)
    if kind not in KINDS:
        raise UserError(
            f"{source}: config.json has model_type {kind!r}; expected one of {', '.join(KINDS)}"
        )
    with _config_errors(source):
        return _read_spec(files, config, None), files


def _load(
    source: str, revision: str | None, img_size: tuple[int, int] | None
) -> tuple[ViT, CheckpointSpec]:
    """Load a model with the head that its checkpoint has, and return what its configs say."""
    files = fetch(source, revision)
    tensors = without_wrappers(_read_shards(files.weights), source)
    # What lies beside a file that needs no config belongs to something else.
    if files.config is None or (files.is_lone and not needs_config(tensors)):
        family = recognise("", tensors, source)
        with _config_errors(source):
            spec = spec_from_tensors(family, tensors)
    else:
        config = read_json(files.config)
        family = recognise(_kind(config, source), tensors, source)
        with _config_errors(source):
            spec = _read_spec(files, config, tensors)
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
    is_double = any(tensor.dtype == torch.float64 for tensor in tensors.values())
    with torch.device("meta"):
        model = ViT(sizes)
    unused = _fill(model, family, tensors, files.weights[0])
    model.labels = spec.labels
    model.preprocess = preprocess
    model.origin = Origin(source, files.commit, family.title, unused)
    notes = list(spec.notes)
    if img_size is None and spec.size_note:
        notes.append(spec.size_note)
    if is_double:
        notes.append("the weights are float64, and rounded to float32")
    for note in notes:
        print(f"{source}: {note}", file=sys.stderr)
    return model, spec


def _read_shards(paths: Sequence[Path]) -> dict[str, Tensor]:
    """Read the tensors of all files that hold a checkpoint together."""
    tensors: dict[str, Tensor] = {}
    for path in paths:
        shard = read_tensors(path)
        repeated = sorted(tensors.keys() & shard.keys())
        if repeated:
            raise UserError(f"{path}: repeats tensors of another shard: {first_few(repeated)}")
        tensors |= shard
    return tensors


def _kind(config: dict, source: str) -> str:
    """Return a config's kind, as in Family.kind."""
    if config.get("model_type"):
        return str(config["model_type"])
    if "architecture" in config:
        return "timm"
    raise UserError(
        f"{source}: config.json has neither transformers' model_type ({', '.join(KINDS[:-1])}) "
        "nor timm's architecture"
    )


def _read_spec(files: Files, config: dict, names: Collection[str] | None) -> CheckpointSpec:
    """Read the config files; the tensors' names tell whether there is a head, if they are known."""
    if files.preprocessor is None:
        return spec_from_timm(config)
    preprocess = read_preprocess(files.preprocessor, config["model_type"])
    return spec_from_hub(config, preprocess, names)


@contextlib.contextmanager
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
    prefix = backbone_prefix(family, tensors)
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
    names = layout(model, family, prefix)
    for name, parameter in model.state_dict().items():
        # Several tensors, such as query, key and value, have equal parts of the first dimension.
        shape = (parameter.shape[0] // len(names[name]), *parameter.shape[1:])
        parts = []
        for part in names[name]:
            tensor = tensors.pop(part, None)
            if tensor is None:
                missing.append(part)
            elif tensor.shape != shape or tensor.dtype not in FLOATS:
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
    model, frozen_hash = _join_tail(source, metadata, img_size)
    if _hash_except(model, model.origin.tail) != frozen_hash:
        raise UserError(_say_that_base_differs(source, model.origin.base))
    return model


def _say_that_base_differs(source: str, base: str) -> str:
    return f"{source}: its base {base} is not the one it was trained on; the weights differ"


def _join_tail(
    source: str, metadata: Mapping[str, str], img_size: tuple[int, int] | None
) -> tuple[ViT, str]:
    """Join a tail to its base; return the model, and the hash that the base had in training.

    The hash is that of the base's weights, without those that the tail replaces.
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
        model, _ = _load(base, commit, img_size or preprocess.size)
    except UserError as error:
        raise UserError(f"{source} needs its base: {error}") from error
    model.reset_head(len(labels))
    model.labels = labels
    model.preprocess = preprocess if img_size is None else preprocess.at(img_size)
    tensors = read_tensors(Path(os.path.expanduser(source)))
    model.origin = replace(model.origin, source=source, base=base, tail=frozenset(tensors))

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
    model.load_state_dict(model.state_dict() | tensors, assign=True)
    return model, frozen_hash


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
    if len(labels) == 1:
        raise UserError(f"a head for one class, {labels[0]!r}, has nothing to choose from")
    old = f"the checkpoint's {len(model.labels)}" if model.labels else "none"
    print(f"new head for {len(labels)} classes, in place of {old}", file=sys.stderr)
    model.reset_head(len(labels))
    model.labels = labels


def _prepare_for_training(model: ViT, spec: CheckpointSpec | None) -> None:
    """Make a model one that can be written as it was trained, and say what training leaves out."""
    # The model will be saved for transformers, which does not round the margins of a crop.
    model.preprocess = replace(model.preprocess, round_margins=False)
    if spec is not None and spec.drop_rates:
        print(
            f"{model.origin.source}: its config has {', '.join(spec.drop_rates)}; "
            "minivit trains without dropout",
            file=sys.stderr,
        )


def save_pretrained(model: ViT, folder: str | os.PathLike[str]) -> None:
    """Write model.safetensors, config.json and preprocessor_config.json as transformers does.

    The folder is made if need be, and each file is written whole or not at all. A note on stderr
    says what transformers does not have. Raises UserError for a model without preprocessing, as one
    that was made in Python may be.
    """
    if model.preprocess is None:
        raise UserError(
            "the model does not say how photos become its images; set model.preprocess to a "
            "minivit.Preprocess, then save it"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
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
    tensors |= tensors_as(model, family, prefix=prefix, resample=not keeps_positions(config))
    use_mask_token = "embeddings.mask_token" in origin.unused
    settings = hub_config(model, use_mask_token=use_mask_token)
    if isinstance(settings.get("mlp_ratio"), float):
        print(
            f"{folder}: mlp_ratio {settings['mlp_ratio']} is no whole number; minivit and "
            "transformers 4 read it, transformers 5 does not",
            file=sys.stderr,
        )
    if model.preprocess.round_margins and model.preprocess.crop:
        print(
            f"{folder}: transformers rounds the margins of a crop down, not to the nearest as this "
            "model does; some photos are seen a pixel further to the left or the top",
            file=sys.stderr,
        )
    save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    write_json(folder / "config.json", settings)
    write_json(folder / "preprocessor_config.json", model.preprocess.to_config())


def check_written(model: ViT, folder: Path, base_hash: str | None = None) -> None:
    """Read back what save_pretrained and save_tail wrote, and compare all of it with the model.

    Raises RuntimeError if anything differs. A tail whose base cannot be read any more, or has
    changed, is no defect of what was written: a note on stderr says so. `base_hash` is
    hash_outside_tail(model), if the caller has computed it already.
    """
    tail = folder / "tail.safetensors"
    # Loading would repeat the notes on stderr that it gave when the model was loaded.
    with contextlib.redirect_stderr(io.StringIO()), ThreadPoolExecutor(1) as thread:
        loading_whole = thread.submit(load_pretrained, folder)
        problem = ""
        if tail.exists():
            if base_hash is None:
                base_hash = hash_outside_tail(model)
            problem = _check_tail(model, tail, base_hash)
        whole = loading_whole.result()
    require_same(model, whole, folder)
    if problem:
        print(f"{problem}; {folder / 'model.safetensors'} holds the whole model", file=sys.stderr)


def _check_tail(model: ViT, path: Path, base_hash: str) -> str:
    """Compare a tail, joined to its base, with the model; return what is wrong with the base.

    Raises RuntimeError if the tail differs.
    """
    metadata = tail_metadata(path)
    if metadata is None:
        raise RuntimeError(f"{path}: read back, this is no tail")
    try:
        # The weights of the base are compared themselves, so they need not be hashed once more.
        joined, written_hash = _join_tail(str(path), metadata, None)
    except UserError as error:
        return str(error)
    if written_hash != base_hash:
        raise RuntimeError(
            f"{path}: read back, the hash of its base differs from the one that was written"
        )
    # What the tail holds itself comes first; all else is the base's.
    changed = []
    if joined.labels != model.labels:
        changed.append("labels")
    if joined.preprocess != model.preprocess:
        changed.append("preprocessing")
    for name in tail_names(model):
        if not torch.equal(joined.get_parameter(name), model.get_parameter(name)):
            changed.append(name)
    _require_none(changed, path)
    if differences(model, joined):
        return _say_that_base_differs(str(path), joined.origin.base)
    return ""


def require_same(model: ViT, reread: ViT, path: Path) -> None:
    """Raise RuntimeError unless what was read back from a path is the model that was written."""
    _require_none(differences(model, reread), path)


def _require_none(changed: Collection[str], path: Path) -> None:
    if changed:
        names = ", ".join(sorted(changed))
        raise RuntimeError(f"{path}: read back, these are not those that were tested: {names}")


@torch.no_grad()
def differences(model: ViT, other: ViT) -> list[str]:
    """Return the names of what differs between two models that should be one and the same.

    Compared are weights, sizes, labels and preprocessing. Positions count as they are added to the
    tokens: after resampling, and together with the class token.
    """
    changed = []
    # Where the positions come from does not matter, because they are compared themselves.
    ours = replace(model.config, pos_grid=None, pos_antialias=False)
    theirs = replace(other.config, pos_grid=None, pos_antialias=False)
    for field in fields(ours):
        if getattr(ours, field.name) != getattr(theirs, field.name):
            changed.append(field.name)
    if model.labels != other.labels:
        changed.append("labels")
    if model.preprocess != other.preprocess:
        changed.append("preprocessing")
    if changed:
        return changed
    state = _state_as_computed(model)
    for name, tensor in _state_as_computed(other).items():
        if not torch.equal(tensor, state[name]):
            changed.append(name)
    return changed


def _state_as_computed(model: ViT) -> dict[str, Tensor]:
    """Return a model's parameters, with the positions as they are added to the tokens."""
    state: dict[str, Tensor] = dict(model.named_parameters())
    positions = model.positions()
    state["cls_token"] = state["cls_token"] + positions[:, :1]
    state["pos_embed"] = positions[:, 1:]
    return state


@torch.no_grad()
def tensors_as(
    model: ViT, family: Family, *, prefix: str = "", resample: bool
) -> dict[str, Tensor]:
    """Return a model's tensors on the CPU under a family's names, those of the backbone prefixed.

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
    for name, names in layout(model, family, prefix).items():
        for part_name, part in zip(names, state[name].chunk(len(names))):
            tensors[part_name] = part.contiguous()
    return tensors


def save_tail(model: ViT, path: Path, base_hash: str | None = None) -> None:
    """Write the trainable weights alone, under our names.

    The metadata holds what load_pretrained needs to complete the model: its base, the hash of the
    other weights, the labels and the preprocessing. The tail of a model that was loaded from a tail
    holds the weights of both, and has the same base. `base_hash` is hash_outside_tail(model),
    if the caller has computed it already.
    """
    source = model.origin.base or model.origin.source
    base = Path(os.path.expanduser(source))
    if source != "demo" and base.exists():
        source = str(base.resolve())
    names = tail_names(model)
    if base_hash is None:
        base_hash = hash_outside_tail(model)
    about = {
        "base": source,
        "commit": model.origin.commit or "",
        "sha256": base_hash,
        "labels": model.labels,
        "preprocess": model.preprocess.to_config(),
    }
    tail = {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if name in names
    }
    save_tensors(path, tail, {TAIL_KEY: json.dumps(about, sort_keys=True)})


def hash_outside_tail(model: ViT) -> str:
    """Return the hash of the weights that save_tail leaves out."""
    return _hash_except(model, tail_names(model))


def tail_names(model: ViT) -> Set[str]:
    """Return the names of what is in a model's tail: of a tail it began with, and what trains."""
    return model.origin.tail | trainable(model).keys()


def _hash_except(model: ViT, names: Container[str]) -> str:
    """Return the hash of all parameters but those named."""
    return content_hash(
        {name: tensor for name, tensor in model.named_parameters() if name not in names}
    )
