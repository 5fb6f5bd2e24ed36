"""The Vision Transformer: from pixels to logits, with attention as a return value.

The parameters have the names that timm and DINO share.

Shapes: B images, D embed_dim, H heads, K = D / H, C classes,
        N tokens: 1 class token, then R registers (in most models 0), then the patches row by row,
        Q query tokens: those N or a selection of them.

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
    from .training.reference import Reference

MAX_SIZE = 65_536  # A larger size in a config means that the file is broken.


@dataclass(frozen=True)
class ViTConfig:
    """The sizes of a plain ViT. The defaults are those of google/vit-base-patch16-224."""

    img_size: tuple[int, int] = (224, 224)  # pixels, height before width
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    num_classes: int = 1000  # 0: the model has no head.
    # The epsilon of every LayerNorm: 1e-12 in Google's checkpoints, 1e-6 in those of timm,
    # torchvision and DINOv2.
    eps: float = 1e-12
    qkv_bias: bool = True
    layer_scale: bool = False
    # What the head reads: "cls" is the class token, "cls+mean" the class token and the mean of the
    # patches, as in DINOv2's classifier.
    pool: str = "cls"
    # The grid of patches that pos_embed was trained on. None means the grid of img_size.
    pos_grid: tuple[int, int] | None = None
    # Whether pos_embed is resampled with antialiasing, as timm and models with registers do.
    pos_antialias: bool = False
    num_registers: int = 0  # extra learned tokens between the class token and the patches

    def __post_init__(self) -> None:
        names = ("patch_size", "embed_dim", "num_heads", "mlp_dim")
        sizes = {name: getattr(self, name) for name in names}
        sizes["image height"], sizes["image width"] = self.img_size
        for name, size in sizes.items():
            if type(size) is not int or not 1 <= size <= MAX_SIZE:
                raise UserError(
                    f"{name} is {size!r}; expected a whole number from 1 to {MAX_SIZE:,}"
                )
        if not 0 < self.eps < 1:
            raise UserError(f"eps is {self.eps!r}; expected a number between 0 and 1")
        if self.embed_dim % self.num_heads:
            raise UserError(
                f"embed_dim {self.embed_dim} does not divide into num_heads {self.num_heads}"
            )
        if any(side % self.patch_size for side in self.img_size):
            raise UserError(
                f"img_size {self.img_size} is not a whole number of patches"
                f" of {self.patch_size} pixels"
            )
        if self.pool not in ("cls", "cls+mean"):
            raise UserError(f'pool is {self.pool!r}; expected "cls" or "cls+mean"')

    @property
    def grid(self) -> tuple[int, int]:
        """The number of rows and of columns of patches in an image."""
        height, width = self.img_size
        return height // self.patch_size, width // self.patch_size

    @property
    def num_tokens(self) -> int:
        """N: the class token, the registers and the patches."""
        rows, columns = self.grid
        return 1 + self.num_registers + rows * columns


class PatchEmbed(nn.Module):
    """Cut images into patches, and project each patch to a token."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        size = config.patch_size
        self.proj = nn.Conv2d(3, config.embed_dim, kernel_size=size, stride=size)

    def forward(self, images: Tensor) -> Tensor:
        """Return the tokens (B, patches, D) of images (B, 3, h, w).

        Each pixel belongs to one patch, so the convolution is a product of the patches and its
        weight. On a GPU the product is several times faster, and nothing waits for cuDNN to start.
        """
        size = self.proj.stride[0]
        patches = images.unfold(2, size, size).unfold(3, size, size)  # (B, 3, gh, gw, size, size)
        patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention that can return its weights along with its output.

    The output always comes from PyTorch's fused kernel, which never stores the weights. When they
    are asked for, they are computed separately, so that asking does not change the output.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim, bias=config.qkv_bias)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: Tensor, only_cls: bool = False) -> Tensor:
        """Return the output (B, N, D), or with `only_cls` the class token's output (B, 1, D)."""
        q, k, v = self.project_qkv(x, only_cls)
        return self.mix_values(q, k, v)

    def forward_with_attention(
        self, x: Tensor, queries: Tensor | None = None, only_cls: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return forward's output and the attention weights (B, H, Q, N) in float32.

        `queries` (Q,) selects the tokens whose rows are computed; None means all N. Autograd sees
        the output as a function of the weights, unless only some rows were computed.
        """
        q, k, v = self.project_qkv(x, only_cls)
        if only_cls:
            # q holds the class token alone, so the other queries have to be projected here.
            asking = self.project_queries(x if queries is None else x[:, queries])
        else:
            asking = q if queries is None else q[:, :, queries]
        attn = self.attention_weights(asking, k)
        if queries is None and attn.requires_grad:
            return self.mix_values(q, k, v, attn[:, :, : q.shape[2]]), attn
        return self.mix_values(q, k, v), attn

    def project_qkv(self, x: Tensor, only_cls: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values (B, H, N, K); with `only_cls`, queries (B, H, 1, K)."""
        if only_cls:
            q = self.project_queries(x[:, :1])
            k, v = self.project_with_rows(x, slice(x.shape[2], None))
        else:
            q, k, v = self.split_heads(self.qkv(x))
        return q, k, v

    def project_queries(self, x: Tensor) -> Tensor:
        """Return the queries (B, H, N, K) of tokens (B, N, D)."""
        (q,) = self.project_with_rows(x, slice(x.shape[2]))
        return q

    def project_with_rows(self, x: Tensor, rows: slice) -> tuple[Tensor, ...]:
        """Return q, k, v, or only some of them: those that `rows` of the qkv weight compute.

        The rows of that weight (3 D, D) are the D rows for q, then those for k, then those for v.
        """
        bias = None if self.qkv.bias is None else self.qkv.bias[rows]
        return self.split_heads(F.linear(x, self.qkv.weight[rows], bias))

    def split_heads(self, projected: Tensor) -> tuple[Tensor, ...]:
        """Split one, two or three parts side by side, (B, N, parts x D), into (B, H, N, K) each."""
        B, N, width = projected.shape
        D, H = self.proj.in_features, self.num_heads
        return projected.view(B, N, width // D, H, D // H).permute(2, 0, 3, 1, 4).unbind(0)

    def attention_weights(self, q: Tensor, k: Tensor) -> Tensor:
        """Return softmax(q k^T / sqrt(K)): the weights (B, H, Q, N) of queries (B, H, Q, K)."""
        # The fused kernel keeps its scores in float32 even if q and k are in lower precision,
        # so these scores are computed in float32, too, or in float64 for a model in float64.
        dtype = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            q = q.to(dtype) * q.shape[-1] ** -0.5
            k = k.to(dtype)
            # For few queries, cuBLAS computes the transposed product faster.
            few_queries = 4 * q.shape[2] < k.shape[2]
            scores = (k @ q.mT).mT if few_queries else q @ k.mT
            return scores.softmax(dim=-1)

    def mix_values(self, q: Tensor, k: Tensor, v: Tensor, attn: Tensor | None = None) -> Tensor:
        """Return the output (B, N, D): the values, weighted by attention, of all heads.

        With the weights `attn` (B, H, N, N), the gradient of the output passes through them.
        """
        x = fused_attention(q, k, v)  # (B, H, N, K)
        if attn is not None:
            # The fused kernel knows nothing of attn, but attn @ v is the same up to rounding. So x
            # takes its value from the kernel and its gradient from the product: what is subtracted
            # is exactly 0, and has minus the product's gradient. (Adding 0 would turn -0 into 0.)
            with torch.autocast(q.device.type, enabled=False):
                product = attn @ v.to(attn.dtype)
            x = x.detach() - (product.detach() - product).to(x.dtype)
        return self.proj(x.transpose(1, 2).flatten(2))


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(K)) v, (B, H, Q, K), from one of PyTorch's fused kernels.

    cuDNN's kernel is left out: in half precision it does not give the same bits each time, and
    every new shape costs it 0.1 s of planning. It is used where the caller allows no other kernel,
    and in code that torch.compile compiles, where that planning pays.
    """
    if torch.compiler.is_compiling() or not cudnn_is_one_of_several():
        return F.scaled_dot_product_attention(q, k, v)
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        return F.scaled_dot_product_attention(q, k, v)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def cudnn_is_one_of_several() -> bool:
    """Return whether cuDNN's kernel is allowed, and another one as well."""
    cuda = torch.backends.cuda
    others = cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled() or cuda.math_sdp_enabled()
    return cuda.cudnn_sdp_enabled() and others


class MLP(nn.Module):
    """Two linear layers with a GELU between them, applied to each token."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.embed_dim, config.mlp_dim)
        self.fc2 = nn.Linear(config.mlp_dim, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        # All supported checkpoints were trained with the exact (erf) GELU, not with the tanh one.
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """Multiply each of the D dimensions by a learned factor."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(config.embed_dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """A pre-norm transformer block: attention, then MLP, each added to its input."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=config.eps)
        self.attn = Attention(config)
        self.ls1 = LayerScale(config) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=config.eps)
        self.mlp = MLP(config)
        self.ls2 = LayerScale(config) if config.layer_scale else nn.Identity()

    def forward(self, x: Tensor, only_cls: bool = False) -> Tensor:
        """Return the output (B, N, D), or with `only_cls` the class token's output (B, 1, D)."""
        return self.add_residuals(x, self.attn(self.norm1(x), only_cls))

    def forward_with_attention(
        self, x: Tensor, queries: Tensor | None = None, only_cls: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return forward's output and the attention weights; see Attention."""
        mixed, attn = self.attn.forward_with_attention(self.norm1(x), queries, only_cls)
        return self.add_residuals(x, mixed), attn

    def add_residuals(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Add the attention's output to x, and the MLP's output to the sum."""
        x = x[:, : mixed.shape[1]]  # With only_cls, attention returned the class token alone.
        x = x + self.ls1(mixed)
        return x + self.ls2(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """A Vision Transformer for images (B, 3, *img_size), normalised as its checkpoint expects."""

    # load_pretrained sets these three along with the weights. Until then, a model has none.
    labels: tuple[str, ...] = ()  # the class names in index order
    preprocess: Preprocess = None  # type: ignore[assignment]
    origin: Origin = None  # type: ignore[assignment]
    # infer.py sets it for the model of a run: the training photos that photos are compared with.
    reference: Reference | None = None

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        D = config.embed_dim
        self.config = config
        self.pos_grid = config.grid if config.pos_grid is None else config.pos_grid
        rows, columns = self.pos_grid
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + rows * columns, D))
        self.reg_token = None
        if config.num_registers:
            self.reg_token = nn.Parameter(torch.zeros(1, config.num_registers, D))
        blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.blocks = cast(Sequence[Block], blocks)  # so that mypy knows the type of blocks[i]
        self.norm = nn.LayerNorm(D, eps=config.eps)
        self.head = self.new_head()
        self.init_parameters()

    def init_parameters(self) -> None:
        """Start as timm does: weights with a standard deviation of 0.02, biases at 0."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            # LayerNorm and LayerScale keep their ones, and the class token its zeros. Tensors on
            # the meta device are left alone because torch 2.11 would import its compiler for them.
            elif parameter.ndim > 1 and name != "cls_token" and not parameter.is_meta:
                nn.init.trunc_normal_(parameter, std=0.02)

    def new_head(self) -> nn.Module:
        """Return a new classifier, or the identity for a model without classes."""
        if not self.config.num_classes:
            return nn.Identity()
        num_read = 2 if self.config.pool == "cls+mean" else 1
        return nn.Linear(num_read * self.config.embed_dim, self.config.num_classes)

    def reset_head(self, num_classes: int) -> None:
        """Replace the head by one of zeros, as in the ViT paper's fine-tuning, or 0: by none."""
        self.config = replace(self.config, num_classes=num_classes)
        self.head = self.new_head().to(self.cls_token.device)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, C); without a head, what it would read: (B, D) or (B, 2 D)."""
        return self.logits(self.tokens(images))

    def forward_with_attention(
        self, images: Tensor, blocks: Iterable[int], queries: Sequence[int] | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Return forward's logits, bit for bit, and the attention of the given blocks.

        The attention of a block is (B, H, N, N) in float32. Row i says how token i distributes its
        attention, and sums to 1. With `queries` (0 is the class token), only those rows are
        computed: (B, H, Q, N).

        torch.autograd.grad(logits[i, c], attn[block]) works if all rows were computed and autograd
        records the block: it is trainable, or the images require a gradient. It does not work for
        selected rows, nor for what torch.compile returns.

        Raises UserError for a block or a token that the model does not have.
        """
        inputs, attn = self.head_inputs_with_attention(images, blocks, queries)
        return self.head(inputs), attn

    def head_inputs_with_attention(
        self, images: Tensor, blocks: Iterable[int], queries: Sequence[int] | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Return what the head reads, as head_inputs does, and forward_with_attention's attention.

        The head's output of it is forward_with_attention's logits.
        """
        blocks = sorted(set(blocks))
        check_indices("block", blocks, self.config.depth)
        query_index = None
        if queries is not None:
            check_indices("token", queries, self.config.num_tokens)
            # Indexing with a list would copy it to the device, and wait for that, in every block.
            query_index = torch.tensor(list(queries), dtype=torch.long, device=images.device)
        attn: dict[int, Tensor] = {}
        x = self.embed(images)
        for i, block in enumerate(self.blocks):
            if i in blocks:
                x, attn[i] = block.forward_with_attention(x, query_index, self.needs_only_cls(i))
            else:
                x = block(x, self.needs_only_cls(i))
        return self.head_inputs(x, start=self.config.depth), attn

    def tokens(self, images: Tensor, stop: int = 0, *, only_read: bool = False) -> Tensor:
        """Return the tokens (B, N, D) that enter block `stop`.

        0 gives the embeddings, `depth` the output of all blocks. With `only_read`, that output is
        limited to what the head reads: (B, 1, D) if that is the class token.
        """
        check_indices("stop", [stop], self.config.depth + 1)
        return self.run_blocks(self.embed(images), 0, stop, only_read=only_read)

    def logits(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Return the logits (B, C) from the tokens (B, N, D) that enter block `start`."""
        return self.head(self.head_inputs(tokens, start))

    def head_inputs(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Return what the head reads, from the tokens (B, N, D) that enter block `start`.

        It is the class token (B, D), or with the pool "cls+mean" also the mean patch (B, 2 D).
        """
        check_indices("start", [start], self.config.depth + 1)
        x = self.run_blocks(tokens, start, self.config.depth, only_read=True)
        if self.config.pool == "cls":
            return self.norm(x[:, 0])
        x = self.norm(x)
        patches = x[:, 1 + self.config.num_registers :]
        return torch.cat([x[:, 0], patches.mean(dim=1)], dim=1)

    def embed(self, images: Tensor) -> Tensor:
        """Return the embeddings (B, N, D) of images (B, 3, *img_size)."""
        height, width = self.config.img_size
        if images.ndim != 4 or images.shape[1:] != (3, height, width):
            raise UserError(
                f"expected images (B, 3, {height}, {width}), found {tuple(images.shape)}"
            )
        B = len(images)
        patches = self.patch_embed(images.to(self.patch_embed.proj.weight.dtype))
        x = torch.cat([self.cls_token.expand(B, -1, -1), patches], dim=1) + self.positions()
        if self.reg_token is not None:
            # Registers have no positions, so they come in after the positions were added.
            x = torch.cat([x[:, :1], self.reg_token.expand(B, -1, -1), x[:, 1:]], dim=1)
        return x

    def positions(self) -> Tensor:
        """Return pos_embed for the grid of img_size, (1, N - R, D)."""
        return self.resample(self.pos_embed)

    def resample(self, pos_embed: Tensor) -> Tensor:
        """Resample positions from pos_grid to the grid of img_size.

        The interpolation is bicubic, in float32, as in the models' original code.
        """
        if self.pos_grid == self.config.grid:
            return pos_embed
        patches = pos_embed[:, 1:].unflatten(1, self.pos_grid).permute(0, 3, 1, 2)  # (1, D, gh, gw)
        if patches.device.type == "mps":  # torch 2.7 cannot do this with antialiasing there.
            patches = patches.cpu()
        patches = F.interpolate(
            patches.float(), self.config.grid, mode="bicubic", antialias=self.config.pos_antialias
        )
        return torch.cat([pos_embed[:, :1], patches.flatten(2).mT.to(pos_embed)], dim=1)

    def run_blocks(self, x: Tensor, start: int, stop: int, *, only_read: bool = False) -> Tensor:
        """Run the blocks from `start` up to, but not including, `stop`.

        For `only_read`, see tokens.
        """
        for i in range(start, stop):
            x = self.blocks[i](x, only_read and self.needs_only_cls(i))
        return x

    def needs_only_cls(self, i: int) -> bool:
        """Return whether the class token is all that is read of block i's output."""
        return i == self.config.depth - 1 and self.config.pool == "cls"

    def flops(self, start: int = 0) -> int:
        """Return the floating-point operations of an image's matrix products from a block on.

        From block 0 on, those of the patch embedding are included.
        """
        config = self.config
        N, D = config.num_tokens, config.embed_dim
        total = 0
        if start == 0:
            rows, columns = config.grid
            total += 2 * rows * columns * 3 * config.patch_size**2 * D
        for i in range(start, config.depth):
            Q = 1 if self.needs_only_cls(i) else N
            total += 4 * N * D * D  # keys and values
            total += 4 * Q * D * D  # queries and the output's projection
            total += 4 * Q * N * D  # scores, and the weighted sum of the values
            total += 4 * Q * D * config.mlp_dim
        return total


def check_indices(name: str, indices: Iterable[int], count: int) -> None:
    """Raise UserError for an index that is not from 0 to `count` - 1."""
    for index in indices:
        if not 0 <= index < count:
            raise UserError(f"{name} {index} is out of range: expected 0 <= {name} < {count}")


def freeze_except(model: ViT, blocks: Sequence[int]) -> int:
    """Freeze all but the given blocks, the final norm and the head, and return the cut.

    The cut is the first trainable block. Without any blocks it is the model's depth, and the norm
    is frozen too. What comes before the cut gives the same result in every epoch.
    """
    model.requires_grad_(False)
    for i in blocks:
        model.blocks[i].requires_grad_(True)
    model.norm.requires_grad_(len(blocks) > 0)
    model.head.requires_grad_(True)
    return min(blocks, default=model.config.depth)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name."""
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }


@torch.no_grad()
def working_copy(
    model: ViT, device: torch.device, dtype: torch.dtype | None, *, train: bool
) -> ViT:
    """Return a copy of the model to compute with, on a device and in a precision.

    `dtype` None means float32. With `train`, the trainable parameters stay trainable and in
    float32, as autocast needs them. Without it, all are frozen. Positions are resampled now rather
    than for every batch. A tensor that does not change shares its memory with the model's.
    """
    trainable_names = set(trainable(model)) if train else set()
    tensors = dict(model.named_parameters()) | {"pos_embed": model.positions()}
    state = {}
    for name, tensor in tensors.items():
        keeps_float32 = dtype is None or name in trainable_names
        state[name] = tensor.detach().to(device, torch.float32 if keeps_float32 else dtype)
    with torch.device("meta"):
        copy = ViT(replace(model.config, pos_grid=None))
    copy.load_state_dict(state, assign=True)
    for name, parameter in copy.named_parameters():
        parameter.requires_grad_(name in trainable_names)
    copy.labels = model.labels
    copy.preprocess = model.preprocess
    copy.origin = model.origin
    if model.reference is not None:
        copy.reference = model.reference.to(device)
    return copy


@torch.no_grad()
def copy_trainable(target: ViT, source: ViT) -> None:
    """Copy the trainable weights of `source` into `target`, a working copy of it."""
    for name, parameter in trainable(source).items():
        target.get_parameter(name).copy_(parameter)
