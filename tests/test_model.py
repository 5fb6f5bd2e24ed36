"""The model: attention as a return value, cuts, freezing, and the count of operations."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from minivit import ViT, ViTConfig
from minivit.errors import UserError
from minivit.model import freeze_except, trainable

DTYPES = {
    "fp32": (torch.float32, None),
    "autocast bf16": (torch.float32, torch.bfloat16),
    "bf16": (torch.bfloat16, None),
}


@pytest.mark.parametrize("dtype, amp", DTYPES.values(), ids=DTYPES)
@torch.no_grad()
def test_asking_for_attention_does_not_change_a_bit_of_the_logits(tiny, dtype, amp):
    model = tiny.to(dtype)
    images = torch.randn(2, 3, 32, 32, dtype=dtype)
    with torch.autocast("cpu", dtype=amp) if amp else contextlib.nullcontext():
        plain = model(images)
        for blocks, queries in (((), None), (range(12), None), ([8, 11], [0])):
            logits, attn = model.forward_with_attention(images, blocks, queries)
            assert torch.equal(logits, plain)
            assert list(attn) == list(blocks)


@torch.no_grad()
def test_attention_has_its_stated_shape_and_its_rows_sum_to_1(tiny):
    images = torch.randn(2, 3, 32, 32)
    _, attn = tiny.forward_with_attention(images, [3, 11])
    _, rows = tiny.forward_with_attention(images, [3, 11], queries=[0, 5])
    for block in (3, 11):
        assert attn[block].shape == (2, 3, 17, 17)
        assert attn[block].dtype == torch.float32
        assert_close(attn[block].sum(-1), torch.ones(2, 3, 17))
        assert_close(rows[block], attn[block][:, :, [0, 5]])


@torch.no_grad()
def test_blocks_may_be_asked_for_in_any_order_and_twice(tiny):
    images = torch.randn(2, 3, 32, 32)
    _, attn = tiny.forward_with_attention(images, [3, 11])
    for blocks in ([11, 3], [11, 3, 11], iter((11, 3))):
        logits, again = tiny.forward_with_attention(images, blocks)
        assert torch.equal(logits, tiny(images))
        assert list(again) == [3, 11]
        assert all(torch.equal(rows, attn[block]) for block, rows in again.items())


@torch.no_grad()
def test_attention_is_what_mixes_the_values(tiny):
    block = tiny.blocks[4]
    x = block.norm1(torch.randn(2, 17, 24))
    _, _, v = block.attn.project_qkv(x, only_cls=False)
    mixed, attn = block.attn.forward_with_attention(x)
    expected = block.attn.proj((attn @ v).transpose(1, 2).flatten(2))
    # The fused kernel adds up the same 17 float32 terms in another order.
    assert_close(mixed, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_logits_from_any_cut_are_the_whole_forward(tiny):
    images = torch.randn(2, 3, 32, 32)
    for cut in (0, 5, 12):
        tokens = tiny.tokens(images, stop=cut)
        assert tokens.shape == (2, 17, 24)
        assert_close(tiny.logits(tokens, start=cut), tiny(images), rtol=1e-5, atol=1e-5)
        read = tiny.tokens(images, stop=cut, only_read=True)
        assert read.shape == (2, 1 if cut == 12 else 17, 24)  # the head reads the class token alone
        assert torch.equal(tiny.logits(read, start=cut), tiny(images))


def test_a_model_without_classes_gives_features():
    model = ViT(ViTConfig(num_classes=0, depth=1, embed_dim=24, num_heads=3, mlp_dim=24))
    assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 24)


def test_the_default_fine_tuning_has_14205733_parameters():
    with torch.device("meta"):
        model = ViT(ViTConfig(num_classes=37))
    assert freeze_except(model, [10, 11]) == 10
    assert sum(p.numel() for p in trainable(model).values()) == 14_205_733
    assert sum(p.numel() for p in ViT(ViTConfig(depth=0)).parameters()) == 742_656 + 1_536 + 769_000


def test_positions_are_resampled_only_for_another_grid():
    small = ViTConfig(
        img_size=(32, 48), patch_size=8, embed_dim=24, depth=1, num_heads=3, mlp_dim=24
    )
    model = ViT(small)
    assert torch.equal(model.positions(), model.pos_embed)
    model = ViT(replace(small, pos_grid=(7, 7)))
    model.pos_embed.data[:, 1:] = 3.0
    assert model.positions().shape == (1, 25, 24)
    assert_close(model.positions()[:, 1:], torch.full((1, 24, 24), 3.0))


@pytest.mark.parametrize(
    "call, message",
    {
        "block": (
            lambda m: m.forward_with_attention(torch.zeros(1, 3, 32, 32), [12]),
            "block 12 is out of range: expected 0 <= block < 12",
        ),
        "negative": (
            lambda m: m.forward_with_attention(torch.zeros(1, 3, 32, 32), [-1]),
            "block -1 is out of range",
        ),
        "token": (
            lambda m: m.forward_with_attention(torch.zeros(1, 3, 32, 32), [0], [17]),
            "token 17 is out of range",
        ),
        "stop": (
            lambda m: m.tokens(torch.zeros(1, 3, 32, 32), stop=13),
            "stop 13 is out of range: expected 0 <= stop < 13",
        ),
        "size": (
            lambda m: m(torch.zeros(1, 3, 32, 40)),
            r"expected images \(B, 3, 32, 32\), found \(1, 3, 32, 40\)",
        ),
        "heads": (lambda _: ViTConfig(embed_dim=10, num_heads=3), "does not divide"),
        "patches": (lambda _: ViTConfig(img_size=(30, 32)), "whole number of patches"),
        "pool": (lambda _: ViTConfig(pool="max"), "pool is 'max'; expected"),
    }.values(),
)
def test_what_cannot_be_is_refused(tiny, call, message):
    with pytest.raises(UserError, match=message):
        call(tiny)


@torch.no_grad()
def test_the_last_block_computes_only_what_the_head_reads(tiny):
    images = torch.randn(2, 3, 32, 32)
    num_tokens = []

    def count_tokens(module, inputs, output):
        num_tokens.append(output.shape[1])

    tiny.blocks[11].mlp.register_forward_hook(count_tokens)
    tiny(images)
    tiny.forward_with_attention(images, [11])
    tiny.tokens(images, stop=12)
    assert num_tokens == [1, 1, 17]
    reads_patches = ViT(replace(tiny.config, pool="cls+mean"))
    reads_patches.blocks[11].mlp.register_forward_hook(count_tokens)
    reads_patches(images)
    assert num_tokens[3:] == [17]


def test_flops_are_those_of_the_matrix_products():
    """The sum for ViT-B/16 by hand. Of the last block's output, only the class token is read."""
    with torch.device("meta"):
        model = ViT(ViTConfig())
    N, D, M = 197, 768, 3072
    block = 2 * N * (4 * D * D + 2 * D * M) + 4 * N * N * D
    last = 2 * N * 2 * D * D + 2 * (2 * D * D + 2 * D * M) + 4 * N * D
    assert model.flops() == 2 * 196 * 3 * 16 * 16 * D + 11 * block + last
    assert model.flops(10) == block + last
    assert model.flops(12) == 0
    with torch.device("meta"):
        with_registers = ViT(ViTConfig(depth=0, num_registers=4))
    assert with_registers.flops() == 2 * 196 * 3 * 16 * 16 * D  # A register is no patch.
