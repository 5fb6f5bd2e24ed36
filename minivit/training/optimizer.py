"""Which parameters train, in which groups, how they step, and the learning rate of each step."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim.adamw import adamw

from ..model import ViT, trainable

WARMUP = 0.1  # of all steps


def parameter_groups(model: ViT, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
    """Group what trains for AdamW: matrices decay, biases and the scales of norms and LayerScale do not.

    A group's learning rate is `lr_scale` times the step's: 1 for norm and head, and for block i `layer_decay` to the power
    of how far it lies below them, as in timm and BEiT (https://arxiv.org/abs/2106.08254).
    """
    groups: dict[tuple[bool, int], dict] = {}
    for name, parameter in trainable(model).items():
        part, _, rest = name.partition(".")
        below = (
            len(model.blocks) - int(rest.partition(".")[0])
            if part == "blocks" and layer_decay != 1
            else 0
        )
        decays = parameter.ndim > 1
        group = {"params": [], "weight_decay": weight_decay if decays else 0.0}
        group |= {"lr": 0.0, "lr_scale": layer_decay**below}
        groups.setdefault((decays, below), group)["params"].append(parameter)
    return list(groups.values())


def lr_at(step: int, *, peak: float, total: int) -> float:
    """Return the learning rate of a step (0-based): linear warm-up to `peak`, then a cosine down to 0 at `total`."""
    warmup = math.ceil(WARMUP * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


class AdamW:
    """torch's AdamW by its functional form, as its class imports torch's compiler, for one to three seconds a process.

    Groups are parameter_groups', each with the `lr` of the step. `state` holds for each parameter, in the groups' order,
    step, exp_avg and exp_avg_sq. Source: https://arxiv.org/abs/1711.05101
    """

    def __init__(self, groups: list[dict]) -> None:
        self.param_groups, self.state = groups, []
        for parameter in self._parameters():
            counted = (
                parameter.device if parameter.is_cuda else None
            )  # where the fused kernel reads its step
            zeros = {
                name: torch.zeros_like(parameter, requires_grad=False)
                for name in ("exp_avg", "exp_avg_sq")
            }
            self.state.append({"step": torch.zeros((), device=counted), **zeros})

    def zero_grad(self) -> None:
        for parameter in self._parameters():
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        states = iter(self.state)
        for group in self.param_groups:
            parameters = group["params"]
            of_each = [next(states) for _ in parameters]
            steps, means, squares = (
                [state[name] for state in of_each] for name in ("step", "exp_avg", "exp_avg_sq")
            )
            how = {
                "lr": group["lr"],
                "weight_decay": group["weight_decay"],
                "fused": parameters[0].is_cuda or None,
            }
            how |= {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "amsgrad": False, "maximize": False}
            adamw(parameters, [p.grad for p in parameters], means, squares, [], steps, **how)

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]
