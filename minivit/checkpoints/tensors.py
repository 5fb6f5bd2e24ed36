"""Files of tensors: read without executing anything of them, written whole or not at all."""

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
from ..system.files import dict_of_once, whole_file


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a file's tensors by name: safetensors, npz, or a pickle of nothing but tensors. Executes nothing of it.

    Those of safetensors stay in the file until they are used. Raises UserError, also if one is not finite.
    """
    tensors = _read(path)
    for name, tensor in tensors.items():
        if (
            path.suffix == ".safetensors"
        ):  # by a mapping of its own, which goes at once: this one would keep all in memory
            with safe_open(path, "pt") as file:
                tensor = file.get_tensor(name)
        # A sum tells in half the time, but where finite numbers overflow it.
        if (
            tensor.is_floating_point()
            and not tensor.sum(dtype=torch.float32).isfinite()
            and not tensor.isfinite().all()
        ):
            raise UserError(f"{path}: {name} holds NaN or infinity; get the file again")
    return tensors


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            with path.open(
                "rb"
            ) as file:  # whose header's length safetensors has found good; not so names given twice
                json.loads(
                    file.read(int.from_bytes(file.read(8), "little")),
                    object_pairs_hook=dict_of_once,
                )
            return tensors
        if path.suffix == ".npz":
            return _read_npz(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: holds more than tensors, which could execute code, or is damaged; save the model alone, as safetensors"
        ) from error
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: cannot be read as {path.suffix[1:]} ({error}); is the file complete?"
        ) from error
    except Exception as error:  # broken zips and pickles raise anything
        raise UserError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); is the file complete?"
        ) from error
    plain = isinstance(tensors, dict) and all(
        isinstance(n, str) and isinstance(t, Tensor) for n, t in tensors.items()
    )
    if not plain or not all(
        t.device.type == "cpu" and t.layout is torch.strided for t in tensors.values()
    ):
        raise UserError(
            f"{path}: expected a state dict, names to tensors; save model.state_dict() alone"
        )
    return tensors


def _read_npz(path: Path) -> dict[str, Tensor]:
    """Read a Flax ViT's arrays, turned to how torch has them: Flax multiplies from the left, and splits heads."""
    with zipfile.ZipFile(path) as archive:
        if sum(part.file_size for part in archive.infolist()) > 2 * path.stat().st_size:
            raise ValueError("packed more than twofold")
    turn = {"embedding": lambda k: k.permute(3, 2, 0, 1), "out": lambda k: k.flatten(0, 1).T}
    tensors = {}
    with np.load(path, allow_pickle=False) as arrays:
        for name in arrays.files:
            tensor, (*_, layer, leaf) = torch.from_numpy(arrays[name]), f"/{name}".split("/")
            if leaf == "kernel":
                tensor = turn.get(layer, lambda k: k.flatten(1).T)(tensor)
            elif layer in ("query", "key", "value"):
                tensor = tensor.flatten()
            tensors[name] = tensor.contiguous()
    if (
        tensors.pop("pre_logits/kernel", None) is not None
    ):  # the layer before the head of in21k's checkpoints
        for name in ("pre_logits/bias", "head/kernel", "head/bias"):
            tensors.pop(name, None)
        print(
            f"{path}: its head reads a layer that minivit's ViT has not; taken: the backbone, without",
            file=sys.stderr,
        )
    return tensors


def tail_metadata(path: Path) -> dict[str, str] | None:
    """Return the metadata of a file that save_tail wrote; None for anything else."""
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: cannot be read as safetensors ({error}); is the file complete?"
        ) from error
    return metadata if "base" in metadata else None


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


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors' names, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
