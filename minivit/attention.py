"""Turn attention into maps of where a model looked, and of what spoke for a class.

Shapes: B images, H heads, C classes, Q query tokens,
        N tokens: 1 class token, then the registers if any, then the gh x gw patches.
Dictionaries are keyed by block.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UserError
from .model import ViT, check_indices

CLASS_TOKEN = 0
# "attention": the weights of one block, by head.
# "rollout": the weights of all blocks up to this one, multiplied.
# "relevance": the weights of all blocks up to this one, as far as they speak for one class.
METHODS = ("attention", "rollout", "relevance")
# A patch with a larger share of a map dominates it. Gu et al. 2024 call a token with more than this
# share of the attention a sink, https://arxiv.org/abs/2410.10781
DOMINANT_SHARE = 0.3


def method_rows(
    model: ViT,
    images: Tensor,
    blocks: Collection[int],
    *,
    method: str = "attention",
    queries: Sequence[int] | None = (CLASS_TOKEN,),
    targets: Tensor | None = None,
) -> tuple[Tensor, dict[int, Tensor]]:
    """Return the logits (B, C) and, for each block, the rows (B, H, Q, N) that a method gives.

    A row says how a query is distributed over all tokens; `queries` None means all N. Rollout and
    relevance combine the heads, so H is 1. `targets` (B,) are the classes that relevance explains;
    the default is the class that each image is predicted to be.
    """
    if method == "relevance":
        return forward_with_relevance(model, images, blocks, queries, targets)
    inputs, rows = head_inputs_and_rows(model, images, blocks, method=method, queries=queries)
    return model.head(inputs), rows


def head_inputs_and_rows(
    model: ViT,
    images: Tensor,
    blocks: Collection[int],
    *,
    method: str,
    queries: Sequence[int] | None,
) -> tuple[Tensor, dict[int, Tensor]]:
    """Return what the head reads, and the rows of method_rows for attention or rollout."""
    if method == "attention":
        return model.head_inputs_with_attention(images, blocks, queries)
    if method == "rollout":
        return head_inputs_with_rollout(model, images, blocks, queries)
    raise UserError(f"method is {method!r}; expected one of {', '.join(METHODS)}")


def forward_with_rollout(
    model: ViT, images: Tensor, blocks: Collection[int], queries: Sequence[int] | None
) -> tuple[Tensor, dict[int, Tensor]]:
    """Return the logits (B, C) and the rows (B, 1, Q, N) of rollout up to each block."""
    inputs, rows = head_inputs_with_rollout(model, images, blocks, queries)
    return model.head(inputs), rows


def head_inputs_with_rollout(
    model: ViT, images: Tensor, blocks: Collection[int], queries: Sequence[int] | None
) -> tuple[Tensor, dict[int, Tensor]]:
    """Return what the head reads, and the rows (B, 1, Q, N) of rollout up to each block."""
    last = max(blocks)
    head_means = {}
    x = model.embed(images)
    for i in range(last + 1):
        x, attn = model.blocks[i].forward_with_attention(x)
        # Keeping only the mean of the heads, (B, 1, N, N), takes H times less memory.
        head_means[i] = attn.mean(1, keepdim=True)
    rows = {}
    for i, rolled_out in rollout(head_means).items():
        if i in blocks:
            selected = rolled_out if queries is None else rolled_out[:, list(queries)]
            rows[i] = selected[:, None]
    return model.head_inputs(x, last + 1), rows


def forward_with_relevance(
    model: ViT,
    images: Tensor,
    blocks: Collection[int],
    queries: Sequence[int] | None,
    targets: Tensor | None,
) -> tuple[Tensor, dict[int, Tensor]]:
    """Return the logits (B, C) and the rows (B, 1, Q, N) of relevance up to each block."""
    logits = model(images)
    if targets is None:
        targets = logits.argmax(1)
    if queries is None:
        queries = range(model.config.num_tokens)
    relevant = class_relevance(model, images, targets, blocks, queries)
    return logits, {i: rows[:, None] for i, rows in relevant.items()}


def query_maps(
    attn: Tensor, grid: tuple[int, int], query: int = CLASS_TOKEN, *, num_registers: int = 0
) -> Tensor:
    """Return maps (B, H, gh, gw) of how one query's attention is distributed over the patches.

    `attn` is the attention (B, H, Q, N) of a block; rollout and relevance (B, Q, N) give maps
    (B, gh, gw). What the query gives to the class token and to registers is left out, so the sum
    of a map is less than 1. Raises UserError if the tokens do not fill the grid.
    """
    gh, gw = grid
    if attn.shape[-1] != 1 + num_registers + gh * gw:
        others = "one class token"
        if num_registers:
            others += f" and {num_registers} registers"
        raise UserError(
            f"{attn.shape[-1]} tokens do not fill a grid of {gh} x {gw} patches and {others}"
        )
    return attn[..., query, 1 + num_registers :].unflatten(-1, grid)


def shares(maps: Tensor) -> Tensor:
    """Divide each map (..., gh, gw) by its sum. A map of zeros stays one."""
    total = maps.sum((-2, -1), keepdim=True)
    return maps / total.where(total != 0, 1)


def difference(maps: Tensor, others: Tensor) -> Tensor:
    """Return `maps` minus `others` (..., gh, gw), after dividing every map by its own sum.

    A map's sum is left out because it does not say where a model looked. It depends on how much
    attention the class token pays to itself or, for relevance, on the size of the gradients. The
    differences lie between -1 and 1 and sum to 0 over a map. Raises UserError if the shapes differ.
    """
    if maps.shape != others.shape:
        raise UserError(
            f"expected two maps of one shape to compare,"
            f" found {tuple(maps.shape)} and {tuple(others.shape)}"
        )
    return shares(maps) - shares(others)


def class_token_and_top_patch_shares(
    attn: Tensor, *, num_registers: int = 0
) -> tuple[Tensor, Tensor]:
    """Return two shares (B, H) that say how far to trust the map of the first query.

    In the first row of `attn` (B, H, Q, N), they are the share of the attention that goes to the
    class token, and the top patch's share of what goes to patches. If the latter is above
    DOMINANT_SHARE, one patch dominates the map.
    """
    row = attn[:, :, :1]  # (B, H, 1, N)
    top_patch = shares(row[..., 1 + num_registers :]).amax((-2, -1))
    return row[..., 0, CLASS_TOKEN], top_patch


@torch.no_grad()
def rollout(attn: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Follow attention (B, H, N, N) from the first given block up to each: (B, N, N).

    The mean of a block's heads plus the identity, for the skip connection, is divided by the sum of
    each row. The result is the product of these matrices, and its rows sum to 1.
    Raises UserError if a block or a row is missing.
    Source: Abnar & Zuidema 2020, https://arxiv.org/abs/2005.00928
    """
    return _multiply_blocks({i: weights.mean(1) for i, weights in attn.items()}, normalize=True)


@torch.no_grad()
def relevance(attn: Mapping[int, Tensor], gradients: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Follow what speaks for a class from the first given block up to each: (B, N, N).

    `gradients` are those of the class's logit with respect to `attn`, both (B, H, N, N). The
    positive part of gradient times attention, mean of the heads, plus the identity gives a matrix
    for each block. The result is the product of these matrices, and its rows have no fixed sum.
    Raises UserError if a block or a row is missing.
    Source: Chefer et al. 2021, https://arxiv.org/abs/2103.15679, equations 5 and 6
    """
    evidence = {i: _evidence(attn[i], gradients[i]) for i in attn}
    return _multiply_blocks(evidence, normalize=False)


def class_relevance(
    model: ViT,
    images: Tensor,
    targets: Tensor,
    blocks: Collection[int],
    queries: Sequence[int] = (CLASS_TOKEN,),
    against: Tensor | None = None,
) -> dict[int, Tensor]:
    """Return the rows (B, Q, N) of `relevance` from block 0 up to each block.

    `targets` (B,) has a class for each image. With other classes `against` (B,), relevance is that
    of the target's logit minus the other's: what speaks for the one rather than the other. In each
    block and head, the contrast keeps the positive part of gradient times attention, and the
    opposite contrast minus the negative part. Only one block's graph is in memory at a time.
    Parameters get no gradients, and may be frozen; the caller may be in no_grad or inference_mode.
    Raises UserError for a class, a block or a token that the model does not have.
    """
    config = model.config
    check_indices("block", blocks, config.depth)
    check_indices("class", targets.tolist(), config.num_classes)
    if against is not None:
        check_indices("class", against.tolist(), config.num_classes)
    check_indices("token", queries, config.num_tokens)
    with torch.inference_mode(False), torch.enable_grad():
        # Go forward, and keep the input of each block but not its graph. The clone is there because
        # autograd cannot record tensors that were made in inference mode.
        x = model.embed(images.clone())
        inputs = []
        for block in model.blocks:
            inputs.append(x.detach().requires_grad_())
            x = block(inputs[-1]).detach()
        logits = model.logits(x.requires_grad_(), config.depth)
        # The sum makes autograd begin with an elementwise product. If its thread began with the
        # head's matrix product, cuBLAS would warn that the thread has no CUDA context yet.
        one_hot = F.one_hot(targets, config.num_classes)
        if against is not None:
            one_hot = one_hot - F.one_hot(against, config.num_classes)
        (gradient,) = torch.autograd.grad((logits * one_hot.to(logits)).sum(), x)

        # Go backward, and run each block again for its graph. Relevance up to block i is a product
        # of matrices, M_i ... M_1 M_0, and only the queries' rows of it are needed. So start with
        # these rows of the identity, and multiply by one block's matrix at a time, M_i first.
        identity = torch.eye(config.num_tokens)
        rows = dict.fromkeys(sorted(blocks), identity[list(queries)])
        for i in reversed(range(config.depth)):
            block_input = inputs.pop()
            x, attn = model.blocks[i].forward_with_attention(block_input)
            # Autocast is off here, so that what ran forward in float32 also goes back in float32.
            with torch.autocast(x.device.type, enabled=False):
                gradient, by_attn = torch.autograd.grad(x, (block_input, attn), gradient)
                evidence = _evidence(attn.detach(), by_attn)
                step = evidence + identity.to(evidence)
                for last in rows:
                    if i <= last:
                        rows[last] = rows[last].to(step) @ step
    return rows


def _evidence(attn: Tensor, gradient: Tensor) -> Tensor:
    """Return what speaks for a class in a block: (B, N, N), the mean of the heads."""
    return (gradient * attn).clamp(min=0).mean(1)


def _multiply_blocks(added: Mapping[int, Tensor], *, normalize: bool) -> dict[int, Tensor]:
    """Return the product of identity + added[i] over all blocks i up to each block.

    `added` and the products are (B, N, N). A later block's factor is on the left of an earlier
    one's. With `normalize`, each row of a factor is first divided by its sum.
    """
    products: dict[int, Tensor] = {}
    for i in sorted(added):
        Q, N = added[i].shape[1:]
        if Q != N:
            raise UserError(f"expected all {N} rows of block {i}'s attention, found {Q}")
        if products and i - 1 not in products:
            raise UserError(f"expected blocks without a gap, found {sorted(added)}")
        identity = torch.eye(N).to(added[i])
        step = added[i] + identity
        if normalize:
            step = F.normalize(step, p=1, dim=-1)
        with torch.autocast(step.device.type, enabled=False):
            products[i] = step @ products.get(i - 1, identity)
    return products
