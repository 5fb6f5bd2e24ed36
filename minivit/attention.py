"""Attention tensors into maps of where a model looked, and of what spoke for a class.

Shapes: B images, H heads, N tokens (1 class token, registers if any, then gh x gw patches), Q query rows.
A dict has blocks for keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UserError

if TYPE_CHECKING:
    from .model import ViT

CLASS_TOKEN = 0
METHODS = ("attention", "rollout", "relevance")
DOMINANT_SHARE = 0.3  # of a map; Gu et al. 2024, https://arxiv.org/abs/2410.10781, call a token with more of attention a sink
FUSIONS: dict[str, Callable[..., Tensor]] = {
    "mean": Tensor.mean,
    "max": Tensor.amax,
    "min": Tensor.amin,
}


def method_rows(
    model: ViT,
    images: Tensor,
    blocks: Iterable[int],
    *,
    method: str = "attention",
    queries: Sequence[int] | None = (CLASS_TOKEN,),
    targets: Tensor | None = None,
) -> tuple[Tensor, dict[int, Tensor]]:
    """Return a ViT's logits (B, C), and for each block how `queries`, None for all tokens, spread by a method: (B, H, Q, N).

    "attention" has each head's; "rollout", from block 0 on, and "relevance", of the classes `targets` (B,) or each
    image's likeliest, have H = 1. Rollout holds the heads' mean (B, N, N) of all blocks up to the last one asked for.
    """
    if method not in METHODS:
        raise UserError(f"method is {', '.join(METHODS)}, not {method!r}")
    if method == "attention":
        return model.forward_with_attention(images, blocks, queries)
    if method == "rollout":
        x, fused = model.embed(images), {}
        for i in range(max(blocks) + 1):
            x, attn = model.blocks[i].forward_with_attention(x)
            fused[i] = attn.mean(1, keepdim=True)  # (B, 1, N, N): all that is kept of a block
        rows = {i: of_block for i, of_block in rollout(fused).items() if i in blocks}
        logits = model.logits(x, max(blocks) + 1)
        return logits, {
            i: (r if queries is None else r[:, list(queries)])[:, None] for i, r in rows.items()
        }
    logits = model(images)
    targets = logits.argmax(1) if targets is None else targets
    tokens = range(model.config.num_tokens) if queries is None else queries
    return logits, {
        i: r[:, None] for i, r in class_relevance(model, images, targets, blocks, tokens).items()
    }


def query_maps(
    attn: Tensor, grid: tuple[int, int], query: int = CLASS_TOKEN, *, num_registers: int = 0
) -> Tensor:
    """Turn a block's attention (B, H, Q, N) into maps (B, H, gh, gw): how one query spreads over the patches.

    What the query gives to the class token and to registers is left out, so a map sums to less than 1; `.mean(1)` is the
    heads' mean.
    Rollout and relevance (B, Q, N) give maps (B, gh, gw). Raises UserError if the tokens do not fill the grid.
    """
    gh, gw = grid
    if attn.shape[-1] != 1 + num_registers + gh * gw:
        others = "one class token" + (f" and {num_registers} registers" if num_registers else "")
        raise UserError(
            f"{attn.shape[-1]} tokens do not fill a grid of {gh} x {gw} patches and {others}"
        )
    return attn[..., query, 1 + num_registers :].unflatten(-1, grid)


def shares(maps: Tensor) -> Tensor:
    """Divide each map (..., gh, gw) by its own sum; one of zeros stays so."""
    total = maps.sum((-2, -1), keepdim=True)
    return maps / total.where(total != 0, 1)


def difference(maps: Tensor, others: Tensor) -> Tensor:
    """Return how two models' maps (..., gh, gw) differ: each patch's share of its map less that of the other's.

    Shares, because a map's own sum tells what the class token keeps or how steep a logit is, not where. Each patch's
    difference is from -1 to 1, and a map's sum to 0. Raises UserError if the shapes differ.
    """
    if maps.shape != others.shape:
        raise UserError(
            f"expected two maps of one shape to compare, found {tuple(maps.shape)} and {tuple(others.shape)}"
        )
    return shares(maps) - shares(others)


def sinks(attn: Tensor, *, num_registers: int = 0) -> tuple[Tensor, Tensor]:
    """Return how much of its attention the class token keeps, and the largest patch's share of its map, both (B, H).

    `attn` is (B, H, Q, N), the class token's row first. Above DOMINANT_SHARE, one patch dominates the map.
    """
    row = attn[:, :, CLASS_TOKEN, None]  # (B, H, 1, N)
    return row[..., 0, CLASS_TOKEN], shares(row[..., 1 + num_registers :]).amax((-2, -1))


@torch.no_grad()
def rollout(
    attn: Mapping[int, Tensor], *, heads: str = "mean", discard: float = 0.0
) -> dict[int, Tensor]:
    """Follow attention (B, H, N, N) from the first block given up to each: (B, N, N), of which each row sums to 1.

    A block's heads are fused by "mean", "max" or "min"; the smallest entries, a share `discard` of each image's, become
    0, but never the class token's for itself; the identity is added, for the skip connection; each row is divided by
    its sum; and the product with the blocks before is taken. Raises UserError for other arguments, missing blocks or rows.
    Sources: Abnar & Zuidema 2020, https://arxiv.org/abs/2005.00928; `discard` of https://github.com/jacobgil/vit-explain,
    which divides columns instead, and discards in a batch's first image only.
    """
    if heads not in FUSIONS or not 0 <= discard <= 1:
        raise UserError(
            f"heads is {' or '.join(FUSIONS)} and discard from 0 to 1, not {heads!r} and {discard}"
        )
    added = {}
    for i, weights in attn.items():
        fused = FUSIONS[heads](weights, dim=1).flatten(1)  # (B, N * N)
        kept = fused.scatter(1, fused.topk(int(discard * fused.shape[1]), largest=False).indices, 0)
        kept[:, 0] = fused[:, 0]
        added[i] = kept.unflatten(1, weights.shape[2:])  # (B, N, N)
    return _chain(added, normalize=True)


@torch.no_grad()
def relevance(attn: Mapping[int, Tensor], gradients: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Follow what spoke for a class from the first block given up to each: R (B, N, N), of no fixed sum.

    `gradients` are those of the class's logit by `attn`, both (B, H, N, N). R is the identity at first, and each block
    adds (the positive part of gradients * attn, mean of the heads) @ R. Raises UserError for missing blocks or rows.
    Source: Chefer et al. 2021, https://arxiv.org/abs/2103.15679, equations 5 and 6.
    """
    return _chain({i: (gradients[i] * attn[i]).clamp(min=0).mean(1) for i in attn}, normalize=False)


def class_relevance(
    model: ViT,
    images: Tensor,
    targets: Tensor,
    blocks: Iterable[int],
    queries: Sequence[int] = (CLASS_TOKEN,),
) -> dict[int, Tensor]:
    """Return rows (B, Q, N) of `relevance` from a ViT's block 0 up to each asked for, with one class (B,) an image.

    Keeps every block's input, but one block's graph at a time. Parameters get no gradients; frozen ones, no_grad and
    inference_mode make no difference. Raises UserError for a class, block or token that the model does not have.
    """
    c, N, blocks, inputs = model.config, model.config.num_tokens, sorted(blocks), []
    rows: dict[int, Tensor] = {}
    for name, asked, count in (
        ("block", blocks, c.depth),
        ("class", targets.tolist(), c.num_classes),
        ("token", queries, N),
    ):
        if not all(0 <= i < count for i in asked):
            raise UserError(
                f"{name} {asked} is out of range: this model has {count}, counted from 0"
            )
    with torch.inference_mode(False), torch.enable_grad():
        x = model.embed(
            images.clone()
        )  # (B, N, D); images made in inference_mode cannot be part of a graph
        for block in model.blocks:
            inputs.append(x.detach().requires_grad_())
            x = block(inputs[-1]).detach()
        logits = model.logits(x.requires_grad_(), c.depth)
        (gradient,) = torch.autograd.grad(logits, x, F.one_hot(targets, c.num_classes).to(logits))
        for i in reversed(range(c.depth)):
            x, attn = model.blocks[i].forward_with_attention(inputs[i])
            with torch.autocast(
                x.device.type, enabled=False
            ):  # what ran in float32 goes back in float32
                gradient, by_attn = torch.autograd.grad(x, (inputs.pop(), attn), gradient)
                step, start = (
                    relevance({i: attn}, {i: by_attn})[i],
                    torch.eye(N)[list(queries)].to(attn),
                )
                rows = {b: rows.get(b, start) @ step for b in blocks if b >= i}  # (B, Q, N)
    return rows


def _chain(added: Mapping[int, Tensor], *, normalize: bool) -> dict[int, Tensor]:
    """Multiply each block's (identity + what is added), (B, N, N), onto the product of those before it."""
    products: dict[int, Tensor] = {}
    for i in sorted(added):
        Q, N = added[i].shape[1:]
        if Q != N or (products and i - 1 not in products):
            raise UserError(
                f"expected all rows of each block in turn; found {Q} of {N} of block {i} after {list(products)}"
            )
        identity = torch.eye(N).to(added[i])
        step = F.normalize(added[i] + identity, p=1, dim=-1) if normalize else added[i] + identity
        with torch.autocast(step.device.type, enabled=False):
            products[i] = step @ products.get(i - 1, identity)
    return products
