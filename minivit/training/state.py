"""Where a run stands, on disk: what is needed to go on as if it had never stopped. No pickle: safetensors and JSON.

Random states are not part of it, since each epoch's order and augmentation follow from the seed and the epoch alone.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checkpoints.tensors import save_tensors
from ..errors import UserError
from ..model import ViT, trainable
from .optimizer import AdamW, parameter_groups

PLAIN = ("epoch", "step", "losses", "lr", "rows", "seconds", "spent")  # what JSON holds of a State


@dataclass
class State:
    """A run under way: the model, what trains it, and how far it has come."""

    model: ViT
    optimizer: AdamW
    scaler: torch.amp.GradScaler
    epoch: int = 1  # the one under way
    losses: list[float] = field(
        default_factory=list
    )  # of its batches so far; not finite where the scaler skipped a step
    step: int = 0  # optimiser steps taken; one that the scaler skips moves neither this nor the learning rate
    lr: float = 0.0  # of the last step
    rows: list[dict[str, float]] = field(default_factory=list)  # of metrics.jsonl
    best: dict[str, Tensor] = field(default_factory=dict)  # the best epoch's tail, on the CPU
    seconds: float = 0.0  # spent on the epoch under way
    spent: float = 0.0  # on the whole run
    stopped: bool = False  # by a signal

    def tail(self) -> dict[str, Tensor]:
        """Copy what trains to the CPU."""
        return {name: p.detach().cpu().clone() for name, p in trainable(self.model).items()}

    def free(self) -> None:
        """Give back the device's memory; training cannot go on."""
        self.model.zero_grad(set_to_none=True)
        self.model.to("meta")
        self.optimizer.state.clear()

    def snapshot(
        self, settings: Mapping[str, object], tail: dict[str, Tensor] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Copy everything to the CPU, for save_tensors: training may go on while that writes. `tail` may be there already."""
        tail = tail or self.tail()
        tensors = {f"tail.{name}": tensor for name, tensor in tail.items()}
        if not all(torch.equal(tensor, tail[name]) for name, tensor in self.best.items()):
            tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for i, of_one in enumerate(self.optimizer.state):
            tensors |= {
                f"optimizer.{i}.{key}": value.to("cpu", copy=True) for key, value in of_one.items()
            }
        plain = {name: getattr(self, name) for name in PLAIN}
        about = plain | {"settings": dict(settings), "scaler": self.scaler.state_dict()}
        return tensors, {"state": json.dumps(about)}

    def save(self, path: Path, settings: Mapping[str, object]) -> None:
        """Write everything into one file, whole or not at all: the last good state stays until then."""
        save_tensors(path, *self.snapshot(settings))

    def load(self, tensors: Mapping[str, Tensor], about: Mapping) -> None:
        """Become what `read` found."""
        parts: dict[str, dict[str, Tensor]] = {"tail": {}, "best": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        set_tail(self.model, parts["tail"])
        self.best = parts["best"] or (parts["tail"] if about["rows"] else {})
        for name, tensor in parts["optimizer"].items():
            i, _, key = name.partition(".")
            self.optimizer.state[int(i)][key].copy_(tensor)
        self.scaler.load_state_dict(about["scaler"])
        for name in PLAIN:
            setattr(self, name, about[name])


@torch.no_grad()
def set_tail(model: ViT, tensors: Mapping[str, Tensor]) -> None:
    """Give what trains of a model its weights."""
    for name, parameter in trainable(model).items():
        parameter.copy_(tensors[name])


def begin(
    model: ViT, *, amp: torch.dtype | None, weight_decay: float, layer_decay: float = 1.0
) -> State:
    """Return the state of a run that has taken no step: AdamW on what trains, and a gradient scaler for fp16."""
    device, groups = model.cls_token.device.type, parameter_groups(model, weight_decay, layer_decay)
    return State(model, AdamW(groups), torch.amp.GradScaler(device, enabled=amp is torch.float16))


def read(path: Path, settings: Mapping[str, object]) -> tuple[dict[str, Tensor], dict]:
    """Read a state's tensors and what JSON holds of it.

    Raises UserError, naming each, if settings that change the mathematics are not those the run began with.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = json.loads(file.metadata()["state"])
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise UserError(
            f"{path}: is no state of a run ({error}); without --resume, training begins anew"
        ) from error
    now, then = json.loads(json.dumps(settings)), about["settings"]
    changed = [
        f"{name} was {then.get(name)}, now {value}"
        for name, value in now.items()
        if then.get(name) != value
    ]
    if changed:
        raise UserError(f"{path}: cannot go on with other settings: {'; '.join(changed)}")
    return tensors, about


def checksum(*tensors: Tensor) -> str:
    """Return a short name for the contents of tensors."""
    crc = 0
    for tensor in tensors:
        crc = zlib.crc32(tensor.detach().cpu().contiguous().numpy().data, crc)
    return f"{crc:08x}"
