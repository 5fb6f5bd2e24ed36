"""Read and write files of tensors, without ever executing code that a file contains."""

from __future__ import annotations

import hashlib
import json
import pickle
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UserError
from ..system.files import dict_of_unique_keys, whole_file


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
        if tensor.is_floating_point() and not _is_finite(tensor):
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
        if path.suffix == ".npz":
            return _read_npz(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: holds more than tensors, which could execute code, or is damaged; "
            "save only the weights, as safetensors"
        ) from error
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, path.suffix[1:], error) from error
    except Exception as error:  # Broken zip files and pickles raise all kinds of exceptions.
        raise UserError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); is the file complete?"
        ) from error
    if not isinstance(tensors, dict) or not all(map(_is_entry, tensors.items())):
        raise UserError(
            f"{path}: expected a state dict of names and tensors; save only model.state_dict()"
        )
    return tensors


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


def _unreadable(path: Path, kind: str, error: Exception) -> UserError:
    return UserError(f"{path}: cannot be read as {kind} ({error}); is the file complete?")


def _read_npz(path: Path) -> dict[str, Tensor]:
    """Read the arrays of a Flax ViT, and lay them out as PyTorch does."""
    with zipfile.ZipFile(path) as archive:
        size = sum(part.file_size for part in archive.infolist())
    if size > 2 * path.stat().st_size:
        raise ValueError("it would unpack to more than twice its size")
    with np.load(path, allow_pickle=False) as arrays:
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
        raise _unreadable(path, "safetensors", error) from error
    is_tail = TAIL_KEY in metadata or "base" in metadata
    return metadata if is_tail else None


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file. If that fails, an earlier file of this name is kept."""
    with whole_file(path) as partial:
        # safetensors makes files that only their owner can read: restore the usual permissions.
        partial.touch()
        mode = partial.stat().st_mode
        try:
            save_file(tensors, partial, metadata)
        except SafetensorError as error:  # for example, the disk is full
            raise OSError(f"{path}: cannot be written ({error})") from error
        partial.chmod(mode)


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the names, shapes, types and bytes of tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
