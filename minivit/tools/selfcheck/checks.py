"""The checks of `selfcheck`. Each returns a relative difference, which is 0 for equal bits.

It is the Euclidean norm of the difference of two tensors, divided by the norm of the second.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from ...checkpoints.weights import load_pretrained, save_pretrained
from ...model import ViT, freeze_except, trainable, working_copy
from ...settings import TrainSettings
from ...train import run_epochs
from ...training.state import RunState, new_state, read_state, save_state
from ...training.step import Batch, train_step

CLASSES = [f"class {i}" for i in range(5)]
# The relative error that is expected of logits in low precision.
AMP_BOUNDS = {torch.bfloat16: 5e-2, torch.float16: 1e-2}


def run_checks(
    model: ViT, images: Tensor, amp: torch.dtype | None
) -> Iterator[tuple[str, float, float]]:
    """Yield for each check what it compares, the measured difference and its bound."""
    difference = asking_for_attention(model, images)
    yield "logits with and without asking for attention", difference, 0.0
    difference = explicit_attention(model, images)
    yield "fused against explicit attention, float32", difference, 1e-5
    if amp is not None:
        difference = low_precision(model, images, amp)
        precision = str(amp).removeprefix("torch.")
        yield f"logits in {precision} against float32", difference, AMP_BOUNDS[amp]
    full_batch = step_gradients(model, images, micro_batch=len(images))
    for micro_batch in (1, 3):
        gradients = step_gradients(model, images, micro_batch=micro_batch)
        difference = relative_difference(gradients, full_batch)
        yield (
            f"gradients of micro-batches of {micro_batch} against the full batch",
            difference,
            1e-5,
        )
    with tempfile.TemporaryDirectory() as folder:
        difference = write_and_reread(model, images, Path(folder))
        yield "logits of a checkpoint written and read back", difference, 0.0
        difference = stop_and_resume(model, amp, Path(folder))
        yield "weights of a run that was interrupted and resumed", difference, 0.0


def relative_difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@torch.no_grad()
def asking_for_attention(model: ViT, images: Tensor) -> float:
    """Compare the logits that come with the last block's attention with those of forward."""
    logits, _ = model.forward_with_attention(images, [model.config.depth - 1])
    return relative_difference(logits, model(images))


@torch.no_grad()
def explicit_attention(model: ViT, images: Tensor) -> float:
    """Compare the last block's fused attention with softmax(q k^T / sqrt(K)) v, written out."""
    block = model.blocks[-1]
    x = block.norm1(model.tokens(images, stop=model.config.depth - 1))
    _, attn = block.attn.forward_with_attention(x)
    _, _, v = block.attn.project_qkv(x, only_cls=False)
    explicit = block.attn.proj((attn @ v).transpose(1, 2).flatten(2))
    return relative_difference(block.attn(x), explicit)


@torch.no_grad()
def low_precision(model: ViT, images: Tensor, amp: torch.dtype) -> float:
    """Compare the logits in low precision with those in float32."""
    low = working_copy(model, images.device, amp, train=False)
    return relative_difference(low(images).float(), model(images))


def step_gradients(model: ViT, images: Tensor, *, micro_batch: int) -> Tensor:
    """Return the clipped gradients of one training step, all in one vector."""
    state = begin_run(model, amp=None)
    labels = torch.arange(len(images), device=images.device) % len(CLASSES)
    batch = Batch(images.__getitem__, labels, len(images))
    train_step(state.model, state.optimizer, state.scaler, batch, micro_batch=micro_batch, amp=None)
    parameters = trainable(state.model).values()
    return parameters_to_vector(p.grad for p in parameters if p.grad is not None)


@torch.no_grad()
def write_and_reread(model: ViT, images: Tensor, folder: Path) -> float:
    """Compare the logits of a checkpoint that was written and read back with the model's."""
    save_pretrained(model, folder)
    reread = load_pretrained(folder).to(images.device)
    return relative_difference(reread(images), model(images))


def stop_and_resume(model: ViT, amp: torch.dtype | None, folder: Path) -> float:
    """Compare the weights of a run that was stopped and resumed with those of one that was not.

    The run has two epochs of two steps. It is stopped after the first step.
    """
    size = (8, 3, *model.config.img_size)
    pixels = torch.randint(256, size, dtype=torch.uint8)
    split = pixels, torch.arange(len(pixels)) % len(CLASSES)
    settings = TrainSettings(epochs=2, batch_size=4, lr=1e-3, cache_views=0)

    uninterrupted = begin_run(model, amp)
    run_epochs(uninterrupted, split, split, settings, stop_requested=lambda: False)

    stopped = begin_run(model, amp)
    run_epochs(stopped, split, split, settings, stop_requested=lambda: True)
    path = folder / "state.safetensors"
    save_state(path, stopped, {})

    resumed = begin_run(model, amp)
    resumed.restore(*read_state(path, {}))
    run_epochs(resumed, split, split, settings, stop_requested=lambda: False)
    return relative_difference(trained(resumed), trained(uninterrupted))


def begin_run(model: ViT, amp: torch.dtype | None) -> RunState:
    """Return the state of a run that trains the last block of a copy of the model."""
    model = copy.deepcopy(model)
    cut = freeze_except(model, [model.config.depth - 1])
    model = working_copy(model, model.cls_token.device, amp, train=True)
    return new_state(model, cut=cut, amp=amp, micro_batch=4, weight_decay=0.05)


def trained(state: RunState) -> Tensor:
    """Return the trainable weights of a run in one vector."""
    return parameters_to_vector(trainable(state.model).values())
