"""Read and write files of tensors, without ever executing code that a file contains."""

from __future__ import annotations

import hashlib
import json
import pickle
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TypeGuard

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UserError, first_few
from ..system.files import dict_of_unique_keys, replace_file, scratch_folder, whole_file
from ..system.stand_ins import stand_in

# The types that weights may have in a file. All are computed with in float32, which holds each
# number of the first three exactly.
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_INFLATION = 2  # how much larger than its file a state dict may be


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a file's tensors by name: safetensors, npz, or a pickled state dict.

    The tensors of a safetensors file stay on the disk until they are used. Raises UserError if the
    file is damaged, holds anything but tensors, or if a tensor is not finite.
    """
    tensors = _read(path)
    for name, tensor in tensors.items():
        if path.suffix == ".safetensors":
            # Reading a mapped tensor keeps its pages in memory. A second mapping, which is closed
            # right away, keeps the peak low.
            with safe_open(path, "pt") as file:
                tensor = file.get_tensor(name)
        if tensor.dtype in FLOATS and not _is_finite(tensor):
            raise UserError(f"{path}: {name} holds NaN or infinity; get the file again")
    return tensors


def _is_finite(tensor: Tensor) -> bool:
    # The sum takes half the time, but it can overflow although every number is finite.
    if tensor.sum(dtype=torch.float32).isfinite():
        return True
    return bool(tensor.isfinite().all())


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            _check_header(path)
            return tensors
        _check_archive(path)
        if path.suffix == ".npz":
            return _read_npz(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Broken zip files and pickles raise all kinds of exceptions.
        raise UserError(f"{path}: {_why_unreadable(path, error)}") from error
    tensors = _state_dict(content, path)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if size > MAX_INFLATION * path.stat().st_size:  # for example, views of one number
        raise UserError(f"{path}: {_inflation(size, path)}")
    return tensors


def _why_unreadable(path: Path, error: Exception) -> str:
    """Say why a file of tensors could not be read, and what to do."""
    explanation = stand_in(path)
    if explanation:
        return explanation
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, pickle.UnpicklingError):
        return (
            "holds more than tensors, which could execute code, or is damaged; "
            "save only the weights, as safetensors"
        )
    if isinstance(error, (SafetensorError, OSError)):
        return f"cannot be read as {path.suffix[1:]} ({error}); is the file complete?"
    return f"cannot be read ({type(error).__name__}: {error}); is the file complete?"


def _check_archive(path: Path) -> None:
    """Raise UserError if a zip archive would unpack to much more than its size.

    npz files and those of torch.save are such archives.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        size = sum(part.file_size for part in archive.infolist())
    if size > MAX_INFLATION * path.stat().st_size:
        raise UserError(_inflation(size, path))


def _inflation(size: int, path: Path) -> str:
    return (
        f"{path.stat().st_size:,} bytes would unpack to {size:,}; "
        "save the weights without compression, as safetensors"
    )


def _state_dict(content: object, path: Path) -> dict[str, Tensor]:
    """Return the state dict that a file holds, alone or as an entry, as trainers save it.

    If it is an entry, a note on stderr names it. Raises UserError if there is none or several.
    """
    if _is_state_dict(content):
        return content
    found = {}
    if isinstance(content, dict):
        found = {str(key): value for key, value in content.items() if _is_state_dict(value)}
    if not found:
        raise UserError(
            f"{path}: expected a state dict of names and tensors; save only model.state_dict()"
        )
    if len(found) > 1:
        raise UserError(
            f"{path}: holds several state dicts, {first_few(found)}; "
            "save the one that you want by itself, as safetensors"
        )
    ((key, tensors),) = found.items()
    print(f"{path}: reading the state dict {key!r} in it", file=sys.stderr)
    return tensors


def _is_state_dict(content: object) -> TypeGuard[dict[str, Tensor]]:
    """Return whether this is a dict, not empty, of names and dense tensors on the CPU."""
    return isinstance(content, dict) and bool(content) and all(map(_is_entry, content.items()))


def _is_entry(item: tuple[object, object]) -> bool:
    """Return whether an item of a state dict maps a name to a dense tensor on the CPU."""
    name, tensor = item
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        return False
    return tensor.device.type == "cpu" and tensor.layout is torch.strided


def _check_header(path: Path) -> None:
    """Raise ValueError if the header of a safetensors file names a tensor twice.

    safetensors would silently keep the last of them. The file must have been opened by safetensors
    before, which checks the length of the header.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        json.loads(file.read(length), object_pairs_hook=dict_of_unique_keys)


def _read_npz(path: Path) -> dict[str, Tensor]:
    """Read the arrays of a Flax ViT, and lay them out as PyTorch does."""
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        tensors = {name: _from_flax(name, arrays[name]) for name in arrays.files}
    if "pre_logits/kernel" in tensors:
        # Google's checkpoints from ImageNet-21k have another layer in front of the head.
        for name in ("pre_logits/kernel", "pre_logits/bias", "head/kernel", "head/bias"):
            tensors.pop(name, None)
        print(
            f"{path}: its head reads a layer that minivit's ViT does not have; "
            "loading the backbone without a head",
            file=sys.stderr,
        )
    return tensors


def _from_flax(name: str, array: np.ndarray) -> Tensor:
    """Lay an array of a Flax ViT out as PyTorch does.

    Flax multiplies by a kernel from the right, and its attention has a dimension for the heads.
    """
    tensor = torch.from_numpy(array)
    *_, layer, leaf = f"/{name}".split("/")
    if leaf == "kernel":
        if layer == "embedding":
            tensor = tensor.permute(3, 2, 0, 1)  # (h, w, 3, D) to (D, 3, h, w)
        elif layer == "out":
            tensor = tensor.flatten(0, 1).T  # (H, K, D) to (D, D)
        else:
            tensor = tensor.flatten(1).T  # (D, H, K) or (in, out) to (out, in)
    elif layer in ("query", "key", "value"):
        tensor = tensor.flatten()  # a bias, (H, K) to (D,)
    return tensor.contiguous()


# The key of a tail's metadata. safetensors writes several keys in random order, which would give
# the same tail other bytes each time.
TAIL_KEY = "minivit"


def tail_metadata(path: Path) -> dict[str, str] | None:
    """Return the metadata of a file that save_tail wrote, or None for any other file."""
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: {_why_unreadable(path, error)}") from error
    is_tail = TAIL_KEY in metadata or "base" in metadata
    return metadata if is_tail else None


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file. If that fails, an earlier file of this name is kept."""
    with whole_file(path) as partial, scratch_folder(path) as folder:
        # safetensors makes files that only their owner can read: restore the usual permissions.
        partial.touch()
        mode = partial.stat().st_mode
        written = folder / path.name
        try:
            save_file(tensors, written, metadata)
        except SafetensorError as error:  # for example, the disk is full
            raise OSError(f"{path}: cannot be written ({error})") from error
        written.chmod(mode)
        replace_file(written, partial)


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the names, shapes, types and bytes of tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
