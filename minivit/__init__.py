"""minivit: fine-tune the last blocks of a Vision Transformer, and see what it looks at."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .attention import query_maps
    from .checkpoints.weights import load_pretrained, save_pretrained
    from .data.photos import open_photo
    from .data.preprocess import Preprocess
    from .model import ViT, ViTConfig

__version__ = "0.1.0"
__all__ = [
    "Preprocess",
    "ViT",
    "ViTConfig",
    "load_pretrained",
    "open_photo",
    "query_maps",
    "save_pretrained",
]

_HOMES = {
    "attention": ("query_maps",),
    "checkpoints.weights": ("load_pretrained", "save_pretrained"),
    "data.photos": ("open_photo",),
    "data.preprocess": ("Preprocess",),
    "model": ("ViT", "ViTConfig"),
}


def __getattr__(
    name: str,
) -> object:  # torch takes a second to import, and `--help` does not need it
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
