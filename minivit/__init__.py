"""minivit: fine-tune the last blocks of a Vision Transformer, and see what it looks at."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .api import ExplainedPhoto, Run, explain, fine_tune
    from .attention import query_maps
    from .checkpoints.weights import load_pretrained, save_pretrained
    from .data.photos import open_photo
    from .data.preprocess import Preprocess
    from .errors import UserError
    from .model import ViT, ViTConfig

__version__ = "0.1.0"
__all__ = [
    "ExplainedPhoto",
    "Preprocess",
    "Run",
    "UserError",
    "ViT",
    "ViTConfig",
    "explain",
    "fine_tune",
    "load_pretrained",
    "open_photo",
    "query_maps",
    "save_pretrained",
]

_MODULES = {
    "ExplainedPhoto": "api",
    "Preprocess": "data.preprocess",
    "Run": "api",
    "UserError": "errors",
    "ViT": "model",
    "ViTConfig": "model",
    "explain": "api",
    "fine_tune": "api",
    "load_pretrained": "checkpoints.weights",
    "open_photo": "data.photos",
    "query_maps": "attention",
    "save_pretrained": "checkpoints.weights",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used.

    Torch takes a second to import, and `--help` does not need it.
    """
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
