"""Attention tensors into maps.

Shapes: B images, H heads, N tokens (1 class token, then gh x gw patches), Q query rows.
"""

from __future__ import annotations

from torch import Tensor

from .errors import UserError

CLASS_TOKEN = 0


def query_maps(attn: Tensor, grid: tuple[int, int], query: int = CLASS_TOKEN) -> Tensor:
    """Turn a block's attention (B, H, Q, N) into maps (B, H, gh, gw): how one query spreads over the patches.

    What the query gives to the class token is left out, so a map sums to less than 1.
    """
    gh, gw = grid
    if attn.shape[-1] != 1 + gh * gw:
        raise UserError(f"{attn.shape[-1]} tokens do not fill a grid of {gh} x {gw} patches and one class token")
    return attn[:, :, query, 1:].unflatten(-1, grid)
