"""A plain Vision Transformer, from pixels to logits, that gives its attention as a return value.

Shapes: B images, N tokens (1 class token, then R registers if any, then the patches row by row), D embed_dim, H heads,
        K = D / H, Q query tokens. Parameter names are the ones timm and DINO share.
Sources: ViT, Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929
         LayerScale, Touvron et al. 2021, https://arxiv.org/abs/2103.17239
         registers, Darcet et al. 2024, https://arxiv.org/abs/2309.16588
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError

if TYPE_CHECKING:
    from .checkpoints.hub import Origin
    from .data.preprocess import Preprocess

MAX_SIZE = 65_536  # of anything in a config: what is larger is a broken file


@dataclass(frozen=True)
class ViTConfig:
    """The sizes of a plain ViT; the defaults are google/vit-base-patch16-224's."""

    img_size: tuple[int, int] = (224, 224)  # pixels, height before width
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    num_classes: int = 1000  # 0: no head
    eps: float = 1e-12  # of every LayerNorm: 1e-12 in Google's checkpoints, 1e-6 in timm's, torchvision's, DINOv2's
    qkv_bias: bool = True
    layer_scale: bool = False
    pool: str = (
        "cls"  # what the head reads: "cls", or "cls+mean" of the patches (DINOv2's classifier)
    )
    pos_grid: tuple[int, int] | None = (
        None  # patches that pos_embed was trained on; None: those of img_size
    )
    pos_antialias: bool = False  # how pos_embed is resampled to another grid: with antialiasing by timm and with registers
    num_registers: int = 0  # tokens that are no patches, between the class token and those

    def __post_init__(self) -> None:
        counts = {
            "patch_size": self.patch_size,
            "embed_dim": self.embed_dim,
            "mlp_dim": self.mlp_dim,
        }
        counts |= {
            "num_heads": self.num_heads,
            "img_size": min(self.img_size),
            "width": max(self.img_size),
        }
        for name, count in counts.items():
            if type(count) is not int or not 1 <= count <= MAX_SIZE:
                raise UserError(
                    f"{name} is {count!r}; expected a whole number from 1 to {MAX_SIZE:,}"
                )
        if not 0 < self.eps < 1:
            raise UserError(f"eps is {self.eps!r}; expected a number between 0 and 1")
        if self.embed_dim % self.num_heads:
            raise UserError(
                f"embed_dim {self.embed_dim} does not divide into num_heads {self.num_heads}"
            )
        if any(side % self.patch_size for side in self.img_size):
            raise UserError(
                f"img_size {self.img_size} is not a whole number of patches of {self.patch_size} pixels"
            )
        if self.pool not in ("cls", "cls+mean"):
            raise UserError(f'pool is "cls" or "cls+mean", not {self.pool!r}')

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of one image, rows before columns."""
        return self.img_size[0] // self.patch_size, self.img_size[1] // self.patch_size

    @property
    def num_tokens(self) -> int:
        """N: the class token, registers and patches."""
        return 1 + self.num_registers + self.grid[0] * self.grid[1]


class PatchEmbed(nn.Module):
    """Cuts images into patches and projects each to a token."""

    def __init__(self, c: ViTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, c.embed_dim, kernel_size=c.patch_size, stride=c.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).mT  # (B, N - 1, D)


class Attention(nn.Module):
    """Multi-head self-attention whose weights can be had beside the fused kernel's output."""

    def __init__(self, c: ViTConfig) -> None:
        super().__init__()
        self.num_heads = c.num_heads
        self.qkv = nn.Linear(c.embed_dim, 3 * c.embed_dim, bias=c.qkv_bias)
        self.proj = nn.Linear(c.embed_dim, c.embed_dim)

    def forward(self, x: Tensor, only_cls: bool = False) -> Tensor:
        """Return the output (B, N, D), or the class token's alone, (B, 1, D): all that is read of a last block's."""
        return self._mix(*self._qkv(x, only_cls))

    def forward_with_attention(
        self, x: Tensor, queries: Tensor | None = None, only_cls: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return forward's own output and the weights (B, H, Q, N) behind it, in float32; `queries` (Q,), None for all.

        Where there is a graph, the output's gradient passes through the weights, unless they are of chosen queries only.
        """
        q, k, v = self._qkv(x, only_cls)
        asking = self._project(x if queries is None else x[:, queries], 0, 1)[0] if only_cls else q
        attn = self._weights(asking if queries is None or only_cls else q[:, :, queries], k)
        return self._mix(
            q, k, v, attn[:, :, : q.shape[2]] if queries is None and attn.requires_grad else None
        ), attn

    def _qkv(self, x: Tensor, only_cls: bool) -> tuple[Tensor, ...]:
        return (
            self._project(x[:, :1], 0, 1) + self._project(x, 1, 3)
            if only_cls
            else self._project(x, 0, 3)
        )

    def _project(self, x: Tensor, start: int, stop: int) -> tuple[Tensor, ...]:
        """Return some of q, k and v, those from `start` to `stop`, each (B, H, N, K)."""
        B, N, D = x.shape
        whole, own = stop - start == 3, slice(start * D, stop * D)
        weight, bias = [
            p if whole or p is None else p[own] for p in (self.qkv.weight, self.qkv.bias)
        ]
        parts = F.linear(x, weight, bias).view(
            B, N, stop - start, self.num_heads, D // self.num_heads
        )
        return parts.permute(2, 0, 3, 1, 4).unbind(0)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, attn: Tensor | None = None) -> Tensor:
        x = F.scaled_dot_product_attention(q, k, v)  # (B, H, N, K)
        if attn is not None:
            with torch.autocast(q.device.type, enabled=False):
                product = attn @ v.to(attn.dtype)
            x = x.detach() - (product.detach() - product).to(
                x.dtype
            )  # minus exactly 0, with the product's gradient
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, N, D)

    def _weights(self, q: Tensor, k: Tensor) -> Tensor:
        # The fused kernel keeps its scores in float32 whatever the precision of q and k, so these do too.
        dtype = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            q, k = q.to(dtype) * q.shape[-1] ** -0.5, k.to(dtype)
            few = 4 * q.shape[2] < k.shape[2]  # for few rows cuBLAS is faster the other way round
            return ((k @ q.mT).mT if few else q @ k.mT).softmax(dim=-1)  # (B, H, Q, N)


class MLP(nn.Module):
    def __init__(self, c: ViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(c.embed_dim, c.mlp_dim)
        self.fc2 = nn.Linear(c.mlp_dim, c.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(
            F.gelu(self.fc1(x))
        )  # exact (erf) GELU, as all the checkpoints were trained


class LayerScale(nn.Module):
    def __init__(self, c: ViTConfig) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(c.embed_dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block: attention, then MLP, each added to its input."""

    def __init__(self, c: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(c.embed_dim, eps=c.eps)
        self.attn = Attention(c)
        self.ls1 = LayerScale(c) if c.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(c.embed_dim, eps=c.eps)
        self.mlp = MLP(c)
        self.ls2 = LayerScale(c) if c.layer_scale else nn.Identity()

    def forward(self, x: Tensor, only_cls: bool = False) -> Tensor:
        return self._add(x, self.attn(self.norm1(x), only_cls))

    def forward_with_attention(
        self, x: Tensor, queries: Tensor | None = None, only_cls: bool = False
    ) -> tuple[Tensor, Tensor]:
        mixed, attn = self.attn.forward_with_attention(self.norm1(x), queries, only_cls)
        return self._add(x, mixed), attn

    def _add(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x[:, : mixed.shape[1]] + self.ls1(mixed)
        return x + self.ls2(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """A Vision Transformer for images (B, 3, *img_size), normalised as its checkpoint asks."""

    labels: tuple[
        str, ...
    ] = ()  # class names in index order; like the next two, set with the weights (weights.py)
    preprocess: Preprocess = None  # type: ignore[assignment]  # None only before that, for a model without weights
    origin: Origin = None  # type: ignore[assignment]  # likewise

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        c = self.config = config
        self.pos_grid = c.pos_grid or c.grid
        self.patch_embed = PatchEmbed(c)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.embed_dim))
        self.pos_embed = nn.Parameter(
            torch.zeros(1, 1 + self.pos_grid[0] * self.pos_grid[1], c.embed_dim)
        )
        self.reg_token = (
            nn.Parameter(torch.zeros(1, c.num_registers, c.embed_dim)) if c.num_registers else None
        )
        self.blocks = cast(Sequence[Block], nn.ModuleList(Block(c) for _ in range(c.depth)))
        self.norm = nn.LayerNorm(c.embed_dim, eps=c.eps)
        self.head = self._new_head()
        for (
            name,
            parameter,
        ) in self.named_parameters():  # weights of std 0.02 and biases of 0, as timm starts a ViT
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif (
                "norm" not in name and "ls" not in name and not parameter.is_meta
            ):  # or torch 2.11 imports its compiler
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, num_classes); without a head, the features it would read (B, D or 2 D)."""
        return self.logits(self.tokens(images))

    def forward_with_attention(
        self, images: Tensor, blocks: Iterable[int], queries: Sequence[int] | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Return forward's own logits, bit for bit, and the attention of the blocks asked for.

        The attention of a block is (B, H, N, N) in float32: row i says how token i spreads its attention, and sums
        to 1. With `queries` (0 is the class token) only those rows are computed: (B, H, Q, N). Where autograd records
        (frozen blocks: if the images require a gradient), a block's whole attention is on the way to the logits, so that
        torch.autograd.grad(logits[i, c], attn[block]) is true; not so chosen rows, nor what torch.compile returns.
        Raises UserError for a block or token that the model does not have.
        """
        blocks = sorted(set(blocks))
        self._check_index("block", blocks, self.config.depth)
        self._check_index("token", queries or (), self.config.num_tokens)
        # On the device once: indexing by a list would make each block wait for a copy.
        index = (
            None
            if queries is None
            else torch.tensor(list(queries), dtype=torch.long, device=images.device)
        )
        x, start, attn = self.embed(images), 0, {}
        for i in blocks:
            x = self.run(x, start, i)
            x, attn[i] = self.blocks[i].forward_with_attention(x, index, only_cls=self._is_last(i))
            start = i + 1
        return self.logits(x, start), attn

    def tokens(self, images: Tensor, stop: int = 0, *, only_read: bool = False) -> Tensor:
        """Return the tokens (B, N, D) that enter block `stop`: 0 gives the embeddings, `depth` all blocks' output.

        With `only_read`, those of all blocks' output that the head reads: (B, 1, D) where that is the class token.
        """
        self._check_index("stop", [stop], self.config.depth + 1)
        return self.run(self.embed(images), 0, stop, only_read)

    def logits(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Return the logits (B, num_classes) from the tokens (B, N, D) that enter block `start`."""
        self._check_index("start", [start], self.config.depth + 1)
        x = self.run(tokens, start, self.config.depth, only_read=True)
        if self.config.pool == "cls":
            return self.head(self.norm(x[:, 0]))
        x = self.norm(x)
        return self.head(
            torch.cat([x[:, 0], x[:, 1 + self.config.num_registers :].mean(dim=1)], dim=1)
        )

    def embed(self, images: Tensor) -> Tensor:
        """Return the embeddings (B, N, D) of images (B, 3, *img_size): class token, registers, placed patches."""
        h, w = self.config.img_size
        if images.ndim != 4 or images.shape[1:] != (3, h, w):
            raise UserError(f"expected images (B, 3, {h}, {w}), found {tuple(images.shape)}")
        patches = self.patch_embed(images.to(self.patch_embed.proj.weight.dtype))
        x = (
            torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1)
            + self.positions()
        )  # (B, N - R, D)
        if self.reg_token is None:
            return x
        return torch.cat(
            [x[:, :1], self.reg_token.expand(len(images), -1, -1), x[:, 1:]], dim=1
        )  # (B, N, D)

    def _is_last(self, i: int) -> bool:
        """Say whether of block i's output only the class token is read."""
        return i == self.config.depth - 1 and self.config.pool == "cls"

    def flops(self, start: int = 0) -> int:
        """Return the floating-point operations of an image's matrix products, from block `start` on; from 0, embeddings too."""
        c, N, D = self.config, self.config.num_tokens, self.config.embed_dim
        asking = [1 if self._is_last(i) else N for i in range(start, c.depth)]
        blocks = sum(
            4 * N * D * D + 2 * Q * (2 * D * D + 2 * D * c.mlp_dim) + 4 * Q * N * D for Q in asking
        )
        return blocks + (2 * (N - 1) * 3 * c.patch_size**2 * D if start == 0 else 0)

    def positions(self) -> Tensor:
        """Return pos_embed (1, N - R, D), resampled to the grid of img_size as the reference does: bicubic, in float32."""
        return self.resample(self.pos_embed)

    def resample(self, pos_embed: Tensor) -> Tensor:
        if self.pos_grid == self.config.grid:
            return pos_embed
        patches = (
            pos_embed[:, 1:].unflatten(1, self.pos_grid).permute(0, 3, 1, 2).float()
        )  # (1, D, gh, gw)
        patches = F.interpolate(
            patches, self.config.grid, mode="bicubic", antialias=self.config.pos_antialias
        )
        return torch.cat([pos_embed[:, :1], patches.flatten(2).mT.to(pos_embed.dtype)], dim=1)

    def reset_head(self, num_classes: int) -> None:
        """Put a fresh head on, all zeros as in the ViT paper's fine-tuning; 0 takes the head off."""
        self.config = replace(self.config, num_classes=num_classes)
        self.head = self._new_head().to(self.cls_token.device)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def _new_head(self) -> nn.Module:
        width = self.config.embed_dim * (2 if self.config.pool == "cls+mean" else 1)
        return (
            nn.Linear(width, self.config.num_classes) if self.config.num_classes else nn.Identity()
        )

    def run(self, x: Tensor, start: int, stop: int, only_read: bool = False) -> Tensor:
        """Run the blocks from `start` to before `stop`; see tokens."""
        for i in range(start, stop):
            x = self.blocks[i](x, only_cls=only_read and self._is_last(i))
        return x

    @staticmethod
    def _check_index(name: str, indices: Iterable[int], count: int) -> None:
        if wrong := [i for i in indices if not 0 <= i < count]:
            raise UserError(f"{name} {wrong[0]} is out of range: this model has 0 to {count - 1}")


def freeze_except(model: ViT, blocks: Sequence[int]) -> int:
    """Let only these blocks, the final norm and the head train; return the cut, the first block that needs a graph.

    Without blocks the cut is the model's depth: what comes before it is frozen and may be computed once.
    """
    model.requires_grad_(False)
    for module in (*(model.blocks[i] for i in blocks), model.norm, model.head):
        module.requires_grad_(True)
    return min(blocks, default=len(model.blocks))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what trains, by name: the tail."""
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }


@torch.no_grad()
def working_copy(
    model: ViT, device: torch.device, dtype: torch.dtype | None, *, train: bool
) -> ViT:
    """Return the model on a device, in the precision `dtype` (None: float32), its positions resampled once and for all.

    To `train` it, what trains stays in float32, for autocast. Memory is shared wherever nothing changes.
    """
    with torch.device("meta"):
        copy = ViT(replace(model.config, pos_grid=None))
    tensors = dict(model.named_parameters()) | {"pos_embed": model.positions()}
    trains = {
        name for name, parameter in model.named_parameters() if parameter.requires_grad and train
    }
    there = {
        n: t.detach().to(device, torch.float32 if n in trains else dtype or torch.float32)
        for n, t in tensors.items()
    }
    copy.load_state_dict(there, assign=True)
    for name, parameter in copy.named_parameters():
        parameter.requires_grad_(name in trains)
    copy.labels, copy.preprocess, copy.origin = model.labels, model.preprocess, model.origin
    return copy


@torch.no_grad()
def follow(copy: ViT, model: ViT) -> None:
    """Bring what trains of a model over into a working copy of it."""
    for ours, theirs in zip(copy.parameters(), model.parameters()):
        if theirs.requires_grad:
            ours.copy_(theirs)  # which does nothing where they share memory
