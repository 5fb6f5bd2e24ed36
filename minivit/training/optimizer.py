"""The optimizer: parameter groups, the learning rate of each step, and AdamW."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim.adamw import adamw

from ..model import ViT, trainable

WARMUP = 0.1  # fraction of all steps


def parameter_groups(
    model: ViT, weight_decay: float, layer_decay: float = 1.0, head_scale: float = 1.0
) -> list[dict]:
    """Group the trainable parameters for AdamW.

    Weight matrices decay; biases and the scales of norms and LayerScale do not. The learning rate
    of a group is `lr_scale` times that of the step: `head_scale` for the head, 1 for the final
    norm, and `layer_decay` to the power of a block's distance from them, as in timm and BEiT
    (https://arxiv.org/abs/2106.08254).
    """
    groups: dict[tuple[bool, float], dict] = {}
    for name, parameter in trainable(model).items():
        is_matrix = parameter.ndim > 1
        lr_scale = 1.0
        if name.startswith("head."):
            lr_scale = head_scale
        if name.startswith("blocks."):
            block = int(name.split(".")[1])
            lr_scale = layer_decay ** (len(model.blocks) - block)
        if (is_matrix, lr_scale) not in groups:
            groups[is_matrix, lr_scale] = {
                "params": [],
                "weight_decay": weight_decay if is_matrix else 0.0,
                "lr": 0.0,
                "lr_scale": lr_scale,
            }
        groups[is_matrix, lr_scale]["params"].append(parameter)
    return list(groups.values())


def lr_at(step: int, *, peak: float, total: int) -> float:
    """Return the learning rate of a step, counted from 0.

    It warms up linearly to `peak` and then follows a cosine down to 0 at step `total`.
    """
    warmup = math.ceil(WARMUP * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


class AdamW:
    """AdamW by torch's functional form.

    torch's own class imports torch's compiler, which takes one to three seconds in each process.
    Groups are those of parameter_groups, with `lr` set for each step. `state` holds for each
    parameter, in the order of the groups, its step, exp_avg and exp_avg_sq.
    Source: Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101
    """

    def __init__(self, groups: list[dict]) -> None:
        self.param_groups = groups
        self.state: list[dict[str, torch.Tensor]] = []
        for parameter in self.parameters():
            # The fused CUDA kernel reads the step on the device, the others on the CPU.
            step_device = parameter.device if parameter.is_cuda else None
            self.state.append(
                {
                    "step": torch.zeros((), device=step_device),
                    "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                    "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
                }
            )

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def zero_grad(self) -> None:
        for parameter in self.parameters():
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        first = 0
        for group in self.param_groups:
            parameters = group["params"]
            states = self.state[first : first + len(parameters)]
            first += len(parameters)
            adamw(
                parameters,
                [parameter.grad for parameter in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],  # max_exp_avg_sqs, which only AMSGrad has
                [state["step"] for state in states],
                fused=parameters[0].is_cuda or None,
                amsgrad=False,
                beta1=0.9,
                beta2=0.999,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=1e-8,
                maximize=False,
            )
