"""The state of a run, in memory and on disk: all that is needed to resume it exactly.

There is no pickle in the file, only safetensors and JSON. Random states are not part of it: the
order of photos and the augmentation of an epoch follow from the seed and the epoch alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checkpoints.tensors import save_tensors
from ..errors import UserError, first_few
from ..model import ViT, trainable
from ..settings import TrainSettings, list_changes
from . import metrics
from .optimizer import AdamW, parameter_groups

# The fields of a RunState that are saved as JSON.
JSON_FIELDS = ("epoch", "step", "losses", "skipped", "lr", "rows", "seconds", "spent")


@dataclass
class RunState:
    """A run under way: the model, what trains it, and how far it has come."""

    model: ViT  # the working copy that trains
    cut: int  # the first block that trains
    amp: torch.dtype | None  # autocast's dtype; None: float32
    micro_batch: int  # photos per forward pass, halved when memory runs out
    optimizer: AdamW
    scaler: torch.amp.GradScaler
    # From here on, what is saved.
    epoch: int = 1  # the epoch under way
    # The loss of each batch of this epoch so far, and which of these steps the scaler skipped.
    losses: list[float] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    # Optimizer steps taken. A step that the scaler skips counts neither here nor in the schedule.
    step: int = 0
    lr: float = 0.0  # of the last step
    rows: list[dict[str, float]] = field(default_factory=list)  # of metrics.jsonl
    # The trainable weights that may be kept at the end, besides the last ones: those of the best
    # epoch so far or, with --keep average, the mean so far.
    kept: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0  # spent on the epoch under way
    spent: float = 0.0  # seconds spent on the whole run
    stopped: bool = False  # by a signal; this is not saved

    @property
    def device(self) -> torch.device:
        return self.model.cls_token.device

    def trainable_weights(self) -> dict[str, Tensor]:
        """Copy the trainable weights to the CPU."""
        parameters = trainable(self.model)
        return {name: weight.detach().to("cpu", copy=True) for name, weight in parameters.items()}

    def update_kept(self, current: dict[str, Tensor], settings: TrainSettings) -> None:
        """Update `kept` after an epoch, whose row is the last, that left the weights `current`."""
        if settings.keep != "average":
            if metrics.best_row(self.rows) is self.rows[-1]:
                self.kept = current
            return
        epoch = int(self.rows[-1]["epoch"])
        count = epoch - metrics.first_averaged(settings.epochs) + 1  # epochs averaged so far
        if count == 1:
            self.kept = current
        if count > 1:
            for name, mean in self.kept.items():
                self.kept[name] = mean + (current[name] - mean) / count

    def free_device_memory(self) -> None:
        """Release the model and the optimizer's state; training cannot go on afterwards."""
        self.model.zero_grad(set_to_none=True)
        self.model.to("meta")
        self.optimizer.state.clear()

    def snapshot(
        self, settings: Mapping[str, object], weights: dict[str, Tensor] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Copy the whole state to the CPU as tensors and metadata, as save_tensors takes them.

        Training may go on while they are written. `weights` are trainable_weights(), if the
        caller has them already.
        """
        if weights is None:
            weights = self.trainable_weights()
        tensors = {f"tail.{name}": tensor for name, tensor in weights.items()}
        kept_is_current = all(
            torch.equal(tensor, weights[name]) for name, tensor in self.kept.items()
        )
        if not kept_is_current:
            tensors |= {f"kept.{name}": tensor for name, tensor in self.kept.items()}
        for i, parameter_state in enumerate(self.optimizer.state):
            for name, tensor in parameter_state.items():
                tensors[f"optimizer.{i}.{name}"] = tensor.to("cpu", copy=True)
        about: dict[str, object] = {name: getattr(self, name) for name in JSON_FIELDS}
        about["settings"] = dict(settings)
        about["scaler"] = self.scaler.state_dict()
        return tensors, {"state": json.dumps(about)}

    def restore(self, tensors: Mapping[str, Tensor], about: Mapping) -> None:
        """Restore the run from what read_state returned."""
        weights = {}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            if part == "tail":
                weights[rest] = tensor
            elif part == "kept":
                self.kept[rest] = tensor
            else:
                i, _, key = rest.partition(".")
                self.optimizer.state[int(i)][key].copy_(tensor)
        set_trainable(self.model, weights)
        if about["rows"] and not self.kept:  # They are those of the last epoch.
            self.kept = weights
        self.scaler.load_state_dict(about["scaler"])
        for name in JSON_FIELDS:
            setattr(self, name, about[name])


def new_state(
    model: ViT,
    *,
    cut: int,
    amp: torch.dtype | None,
    micro_batch: int,
    weight_decay: float,
    layer_decay: float = 1.0,
    head_scale: float = 1.0,
) -> RunState:
    """Return the state of a run that has taken no step: fresh AdamW, and a scaler for fp16."""
    optimizer = AdamW(parameter_groups(model, weight_decay, layer_decay, head_scale))
    device = model.cls_token.device.type
    scaler = torch.amp.GradScaler(device, enabled=amp is torch.float16)
    return RunState(model, cut, amp, micro_batch, optimizer, scaler)


@torch.no_grad()
def set_trainable(model: ViT, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into the trainable parameters of a model."""
    for name, parameter in trainable(model).items():
        parameter.copy_(weights[name])


def save_state(path: Path, state: RunState, settings: Mapping[str, object]) -> None:
    """Write the whole state into one file; the last good file stays until the new one is whole."""
    save_tensors(path, *state.snapshot(settings))


def read_state(path: Path, settings: Mapping[str, object]) -> tuple[dict[str, Tensor], dict]:
    """Read the tensors of a saved state, and what it holds as JSON.

    Raises UserError if the run began with other settings, naming each of them, or if it does not
    say all of them.
    """
    try:
        with safe_open(path, "pt") as file:
            # Copies, because Windows would not let the next state replace a file that is mapped.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            about = json.loads(file.metadata()["state"])
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise UserError(
            f"{path}: is not the state of a run ({error}); remove it, and training begins anew"
        ) from error
    as_json = json.loads(json.dumps(settings))  # A tuple, for example, becomes a list.
    saved = about["settings"]
    unknown = [name for name in as_json if name not in saved]
    if unknown:
        raise UserError(
            f"{path}: was saved by an earlier version of minivit, which did not note "
            f"{first_few(unknown)}; finish the run with that version, or leave --resume away"
        )
    changes = list_changes(saved, as_json)
    if changes:
        raise UserError(f"{path}: cannot go on with other settings: {'; '.join(changes)}")
    return tensors, about
