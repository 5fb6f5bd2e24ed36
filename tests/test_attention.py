"""Tests of attention, rollout and relevance: by hand, by their properties, against transformers."""

from __future__ import annotations

import contextlib
import json
import weakref
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import TINY, randomize
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from minivit import ViT, ViTConfig, load_pretrained, query_maps
from minivit import __main__ as commands
from minivit.attention import (
    DOMINANT_SHARE,
    METHODS,
    class_relevance,
    class_token_and_top_patch_shares,
    difference,
    method_rows,
    relevance,
    rollout,
    shares,
)
from minivit.errors import UserError
from minivit.model import fused_attention

TARGETS = torch.tensor([1, 3])
PRECISIONS = {
    "fp32": (torch.float32, None),
    "autocast bf16": (torch.float32, torch.bfloat16),
    "autocast fp16": (torch.float32, torch.float16),
    "bf16": (torch.bfloat16, None),
    "fp64": (torch.float64, None),
}


@pytest.fixture(autouse=True)
def the_same_random_images_in_any_order_of_tests():
    torch.manual_seed(0)


def autocast(amp):
    return torch.autocast("cpu", dtype=amp) if amp else contextlib.nullcontext()


def random_attention(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(-1)


def bits(tensor: torch.Tensor) -> list:
    return tensor.detach().view(torch.uint8).tolist()


def attention_gradients(logits, attn):
    """Return the gradients of the targets' logits with respect to each block's attention."""
    target_logits = logits.gather(1, TARGETS[:, None])
    return dict(zip(attn, torch.autograd.grad(target_logits.sum(), list(attn.values()))))


# The tensors


@pytest.mark.parametrize("dtype, amp", PRECISIONS.values(), ids=PRECISIONS)
def test_asking_for_attention_with_gradients_changes_no_bit(tiny, dtype, amp):
    model = tiny.to(dtype)
    images = torch.randn(2, 3, 32, 32, dtype=dtype)
    with autocast(amp):
        plain = model(images)
        for blocks, queries in ((range(12), None), ([3, 8], None), ([11], [0, 4])):
            logits, attn = model.forward_with_attention(images, blocks, queries)
            assert logits.dtype == plain.dtype and bits(logits) == bits(plain)
            assert all(a.requires_grad for a in attn.values())
        block, x = model.blocks[4], model.tokens(images, stop=4)
        assert bits(block.forward_with_attention(x)[0]) == bits(block(x))


def test_asking_for_attention_leaves_the_gradients_as_they_are(tiny):
    images = torch.randn(2, 3, 32, 32)
    parameters = dict(tiny.named_parameters())
    plain = torch.autograd.grad(tiny(images).square().sum(), list(parameters.values()))
    logits, _ = tiny.forward_with_attention(images, range(12))
    asked = torch.autograd.grad(logits.square().sum(), list(parameters.values()))
    for name, found, expected in zip(parameters, asked, plain):
        # Float32 sums are added up in another order: the bound is relative to the largest gradient.
        bound = 2e-5 * max(1, expected.abs().max().item())
        assert_close(found, expected, rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


def flops(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_nothing_is_computed_beyond_what_was_asked_for(tiny):
    images = torch.randn(2, 3, 32, 32)
    product = 2 * 2 * 3 * 17 * 17 * 8  # q @ k or attn @ v, for B=2, H=3, N=17, K=8
    plain = flops(lambda: tiny(images))

    def extra(queries=None):
        return flops(lambda: tiny.forward_with_attention(images, [2, 7], queries)) - plain

    assert extra() == 2 * (product + product)
    assert extra(queries=[0]) == 2 * product // 17
    with torch.no_grad():
        assert extra() == 2 * product
    tiny.requires_grad_(False)
    assert extra() == 2 * product


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("queries", [None, [0, 5]], ids=["all rows", "two rows"])
def test_attention_without_a_graph_is_the_same(tiny, mode, queries):
    images = torch.randn(2, 3, 32, 32)
    logits, attn = tiny.forward_with_attention(images, [1, 6], queries)
    with mode():
        found_logits, found = tiny.forward_with_attention(images, [1, 6], queries)
        assert torch.equal(found_logits, logits)
        for block in (1, 6):
            assert torch.equal(found[block], attn[block]) and not found[block].requires_grad


# The compiler of torch 2.11 uses what that version itself deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("queries", [None, [0, 5]], ids=["all rows", "two rows"])
def test_a_compiled_model_gives_attention_and_gradients(queries):
    model = randomize(ViT(ViTConfig(**vars(TINY) | {"depth": 2})))
    images = torch.randn(2, 3, 32, 32)
    torch.compiler.reset()
    compiled = torch.compile(model.forward_with_attention, backend="aot_eager", fullgraph=True)
    results = []
    for call in (model.forward_with_attention, compiled):
        logits, attn = call(images, [1], queries)
        gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        results.append([logits, attn[1], *gradients])
    # Float32 sums are added up in another order.
    assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    expected = class_relevance(model, images, TARGETS, [0, 1])
    compiled = torch.compile(model, backend="aot_eager")
    assert_close(class_relevance(compiled, images, TARGETS, [0, 1]), expected)


# Against transformers


@dataclass
class Reference:
    """Our model, and what transformers makes of the same file and images in float64."""

    ours: ViT
    images: torch.Tensor
    attn: dict[int, torch.Tensor]
    gradients: dict[int, torch.Tensor]


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Reference:
    from transformers import ViTConfig as HubConfig
    from transformers import ViTForImageClassification

    folder = tmp_path_factory.mktemp("small-vit")
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    config = HubConfig(**sizes, image_size=[32, 48], patch_size=8, num_labels=5)
    randomize(ViTForImageClassification(config)).save_pretrained(folder)
    preprocessor = {"size": {"height": 32, "width": 48}}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    theirs = ViTForImageClassification.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float64
    ).eval()
    images = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    output = theirs(images.double(), output_attentions=True)
    attn = dict(enumerate(output.attentions))
    gradients = attention_gradients(output.logits, attn)
    attn = {i: weights.detach() for i, weights in attn.items()}
    return Reference(load_pretrained(folder), images, attn, gradients)


@pytest.mark.parametrize("blocks", [range(5), [3]], ids=["all blocks", "one block"])
@pytest.mark.parametrize(
    # The bounds are what each precision leaves, relative to the largest gradient.
    "amp, bound",
    [(None, 1e-5), (torch.float16, 0.02), (torch.bfloat16, 0.1)],
    ids=["fp32", "autocast fp16", "autocast bf16"],
)
def test_gradients_of_attention_are_eager_attentions_in_float64(reference, blocks, amp, bound):
    with autocast(amp):
        logits, attn = reference.ours.forward_with_attention(reference.images, blocks)
    for block, found in attention_gradients(logits.float(), attn).items():
        expected = reference.gradients[block]
        assert found.dtype == torch.float32
        assert_close(found.double(), expected, rtol=0, atol=bound * expected.abs().max().item())


def numpy_rollout(attn: dict[int, torch.Tensor]) -> dict[int, np.ndarray]:
    results = {}
    for image in range(2):
        R = np.eye(25)
        for block, weights in attn.items():
            A = weights[image].numpy().mean(axis=0) + np.eye(25)
            R = np.stack([row / row.sum() for row in A]) @ R
            results.setdefault(block, []).append(R)
    return {block: np.stack(pair) for block, pair in results.items()}


@pytest.mark.parametrize("start", [0, 2])
def test_rollout_is_numpys_of_transformers_attentions(reference, start):
    with torch.no_grad():
        _, attn = reference.ours.forward_with_attention(reference.images, range(start, 5))
    before = {block: a.clone() for block, a in attn.items()}
    found = rollout(attn)
    expected = numpy_rollout({block: reference.attn[block] for block in attn})
    assert list(found) == list(range(start, 5))
    for block in found:
        assert found[block].shape == (2, 25, 25) and found[block].dtype == torch.float32
        np.testing.assert_allclose(found[block].numpy(), expected[block], rtol=0, atol=1e-5)
    assert all(torch.equal(attn[block], before[block]) for block in attn), "rollout changed attn"


def numpy_relevance(
    attn: dict[int, torch.Tensor], gradients: dict[int, torch.Tensor]
) -> dict[int, np.ndarray]:
    R = np.stack([np.eye(25)] * 2)
    results = {}
    for block in attn:
        evidence = np.maximum(gradients[block].numpy() * attn[block].numpy(), 0).mean(axis=1)
        R = R + evidence @ R
        results[block] = R
    return results


@pytest.mark.parametrize("start", [0, 2])
def test_relevance_is_numpys_of_transformers_gradients(reference, start):
    logits, attn = reference.ours.forward_with_attention(reference.images, range(start, 5))
    found = relevance(attn, attention_gradients(logits, attn))
    expected = numpy_relevance(
        {block: reference.attn[block] for block in attn}, reference.gradients
    )
    assert list(found) == list(range(start, 5))
    for block in found:
        assert found[block].shape == (2, 25, 25) and not found[block].requires_grad
        np.testing.assert_allclose(found[block].numpy(), expected[block], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "blocks, queries",
    [(range(5), [0]), ([4, 1], [7, 0]), ([2], range(25))],
    ids=["all", "two", "one"],
)
def test_class_relevance_is_numpys_of_transformers_gradients(reference, blocks, queries):
    found = class_relevance(reference.ours, reference.images, TARGETS, blocks, queries)
    expected = numpy_relevance(reference.attn, reference.gradients)
    assert list(found) == sorted(blocks)
    for block in found:
        assert found[block].shape == (2, len(queries), 25) and not found[block].requires_grad
        np.testing.assert_allclose(
            found[block].numpy(), expected[block][:, list(queries)], rtol=1e-5, atol=1e-5
        )


# By hand


def test_a_map_is_the_querys_row_over_the_grid():
    attn = torch.rand(2, 3, 7, 7)
    maps = query_maps(attn, (2, 3))
    assert maps.shape == (2, 3, 2, 3)
    assert torch.equal(maps[1, 2, 1, 0], attn[1, 2, 0, 4])
    assert torch.equal(query_maps(attn, (2, 3), query=5)[0, 0, 0, 2], attn[0, 0, 5, 3])
    # Rollout and relevance come without heads.
    assert torch.equal(query_maps(attn[:, 1], (2, 3)), maps[:, 1])
    with pytest.raises(UserError, match="7 tokens do not fill a grid of 3 x 3"):
        query_maps(attn, (3, 3))


def test_rollout_of_two_blocks_by_hand():
    attn = torch.tensor([[[[0.5, 0.5], [0.25, 0.75]]]])
    found = rollout({8: attn, 9: torch.eye(2).flip(0)[None, None]})  # block 9 swaps the two tokens
    assert_close(found[8], torch.tensor([[[0.75, 0.25], [0.125, 0.875]]]))
    assert_close(found[9], torch.tensor([[[0.4375, 0.5625], [0.4375, 0.5625]]]))


def test_rollout_takes_the_mean_of_the_heads():
    attn = {0: torch.tensor([[[[0.0, 1.0], [0.5, 0.5]], [[0.6, 0.4], [1.0, 0.0]]]])}
    assert_close(rollout(attn)[0], torch.tensor([[[1.3, 0.7], [0.75, 1.25]]]) / 2)


def test_relevance_of_two_blocks_by_hand():
    attn = torch.tensor([[[[0.5, 0.5], [0.25, 0.75]], [[0.5, 0.5], [0.5, 0.5]]]])
    gradients = torch.tensor([[[[2.0, -4.0], [8.0, 0.0]], [[0.0, 1.0], [-9.0, 0.0]]]])
    # The positive parts are [[1, 0], [2, 0]] and [[0, 0.5], [0, 0]].
    # Their mean is [[0.5, 0.25], [1, 0]].
    found = relevance({4: attn, 5: attn}, {4: gradients, 5: gradients})
    assert_close(found[4], torch.tensor([[[1.5, 0.25], [1.0, 1.0]]]))
    assert_close(
        found[5],
        torch.tensor([[[1.5 + 0.75 + 0.25, 0.25 + 0.125 + 0.25], [1.0 + 1.5, 1.0 + 0.25]]]),
    )


def test_maps_are_compared_by_their_shares():
    maps = torch.tensor([[[1.0, 3.0]], [[0.0, 0.0]]])
    others = torch.tensor([[[0.5, 0.5]], [[0.1, 0.3]]])
    assert_close(shares(maps), torch.tensor([[[0.25, 0.75]], [[0.0, 0.0]]]))
    assert_close(difference(maps, others), torch.tensor([[[-0.25, 0.25]], [[-0.25, -0.75]]]))
    maps, others = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5)
    assert_close(difference(maps, 7 * others), difference(maps, others))
    assert_close(difference(maps, others).sum((2, 3)), torch.zeros(2, 3), rtol=0, atol=1e-6)
    with pytest.raises(
        UserError, match=r"one shape to compare, found \(2, 3, 4, 5\) and \(2, 3, 5, 4\)"
    ):
        difference(maps, others.mT)


def test_shares_of_the_class_token_and_of_the_top_patch_by_hand():
    attn = torch.tensor([[[[0.6, 0.1, 0.3, 0.0]], [[1.0, 0.0, 0.0, 0.0]], [[0.1, 0.3, 0.3, 0.3]]]])
    class_token, top_patch = class_token_and_top_patch_shares(attn)
    assert_close(class_token, torch.tensor([[0.6, 1.0, 0.1]]))
    assert_close(top_patch, torch.tensor([[0.75, 0.0, 1 / 3]]))
    assert DOMINANT_SHARE == 0.3
    class_token, top_patch = class_token_and_top_patch_shares(random_attention(2, 3, 17, 17))
    assert class_token.shape == top_patch.shape == (2, 3)


@pytest.mark.parametrize(
    "call, message",
    {
        "gap": (lambda m, a: rollout({1: a[1], 3: a[1]}), r"without a gap, found \[1, 3\]"),
        "rows": (
            lambda m, a: rollout({1: a[1][:, :, :1]}),
            "expected all 17 rows of block 1's attention, found 1",
        ),
        "relevance": (
            lambda m, a: relevance({0: a[1], 2: a[1]}, {0: a[1], 2: a[1]}),
            r"without a gap, found \[0, 2\]",
        ),
        "block": (
            lambda m, a: class_relevance(m, torch.zeros(2, 3, 32, 32), TARGETS, [3, 12]),
            "block 12 is out of range: expected 0 <= block < 12",
        ),
        "negative": (
            lambda m, a: class_relevance(m, torch.zeros(2, 3, 32, 32), TARGETS, [-1]),
            "block -1 is out of range",
        ),
        "class": (
            lambda m, a: class_relevance(m, torch.zeros(2, 3, 32, 32), TARGETS + 2, [3]),
            "class 5 is out of range: expected 0 <= class < 5",
        ),
        "method": (
            lambda m, a: method_rows(m, torch.zeros(2, 3, 32, 32), [3], method="rolout"),
            "method is 'rolout'; expected one of attention, rollout, relevance",
        ),
        "token": (
            lambda m, a: class_relevance(m, torch.zeros(2, 3, 32, 32), TARGETS, [3], [17]),
            "token 17 is out of range: expected 0 <= token < 17",
        ),
    }.values(),
)
def test_what_gives_no_map_is_refused(tiny, call, message):
    with pytest.raises(UserError, match=message):
        call(tiny, {1: random_attention(2, 3, 17, 17)})


@pytest.mark.parametrize("command", ["infer", "score"])
def test_commands_offer_the_methods_that_there_are(command, capsys):
    """They keep a list of their own, so that --help does not have to import torch."""
    assert commands.main([command, "--help"]) == 0
    help_text = "".join(capsys.readouterr().out.split())
    assert ",".join(METHODS) in help_text


# Properties


def test_rows_of_a_rollout_sum_to_1_also_under_autocast():
    attn = {i: random_attention(2, 3, 17, 17, seed=i) for i in range(4)}
    with autocast(torch.bfloat16):
        under = rollout(attn)
    for block, found in rollout(attn).items():
        assert_close(found.sum(-1), torch.ones(2, 17))
        assert (found >= 0).all()
        assert torch.equal(under[block], found)


def test_the_order_of_heads_does_not_matter():
    attn = {i: random_attention(2, 4, 17, 17, seed=i) for i in range(4)}
    turned = {i: a[:, [2, 0, 3, 1]] for i, a in attn.items()}
    assert_close(query_maps(turned[0], (4, 4)).mean(1), query_maps(attn[0], (4, 4)).mean(1))
    assert_close(rollout(turned), rollout(attn))
    assert_close(relevance(turned, turned), relevance(attn, attn))


def test_rollout_of_uniform_attention_is_uniform():
    uniform = torch.full((2, 3, 17, 17), 1 / 17)
    for block, found in rollout(dict.fromkeys(range(4), uniform)).items():
        own = 0.5 ** (block + 1)  # what the skip connections alone carry
        assert_close(found, own * torch.eye(17).expand(2, 17, 17) + (1 - own) / 17)


def test_a_symmetric_model_gives_flipped_photos_flipped_maps():
    model = randomize(ViT(ViTConfig(**vars(TINY) | {"img_size": (16, 32), "depth": 3})))
    with torch.no_grad():
        model.patch_embed.proj.weight += model.patch_embed.proj.weight.flip(3)
        positions = model.pos_embed[:, 1:].unflatten(1, (2, 4))
        model.pos_embed[:, 1:] += positions.flip(2).flatten(1, 2)
    images = torch.randn(2, 3, 16, 32)
    maps = []
    for photos in (images, images.flip(3)):
        logits, attn = model.forward_with_attention(photos, range(3))
        rolled, relevant = rollout(attn), relevance(attn, attention_gradients(logits, attn))
        maps.append([query_maps(a[i], (2, 4)) for a in (attn, rolled, relevant) for i in range(3)])
    for found, expected in zip(*maps):
        assert_close(found, expected.flip(-1), rtol=1e-4, atol=1e-6)
        # A map that is symmetric itself would prove nothing.
        assert not torch.allclose(expected, expected.flip(-1), atol=1e-3)


def test_a_patch_that_cannot_reach_the_logits_has_no_relevance():
    model = randomize(ViT(ViTConfig(**vars(TINY) | {"depth": 3})))
    # Dimension 0 marks patch 6 alone, and the keys are such that no query attends to the mark.
    with torch.no_grad():
        model.patch_embed.proj.weight[0] = 0
        model.patch_embed.proj.bias[0] = 0
        model.cls_token[..., 0] = 0
        model.pos_embed[..., 0] = 0
        model.pos_embed[0, 1 + 6, 0] = 1e4
        for block in model.blocks:
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight[0] = 0
                layer.bias[0] = 0
            block.norm1.weight[0] = 1
            block.norm1.bias[0] = 0
            weight = block.attn.qkv.weight.view(3, 3, 8, 24)
            bias = block.attn.qkv.bias.view(3, 3, 8)
            # The first of the 8 dimensions of each head's queries and keys sees the mark only.
            weight[:2, :, 0] = 0
            bias[:2, :, 0] = 0
            bias[0, :, 0] = 30
            weight[1, :, 0, 0] = -3 * 8**0.5
    # The seed matters: in some images, no patch attends to patch 7.
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    changed = torch.zeros(2, 3, 32, 32, dtype=torch.bool)
    changed[:, :, 8:16, 16:24] = True  # patch 6 is in row 1, column 2
    assert torch.equal(model(images), model(images + changed))
    for row in class_relevance(model, images, TARGETS, range(3)).values():
        found = query_maps(row, (4, 4))
        assert (found[:, 1, 2] == 0).all()
        assert (found > 0).sum() > 15  # of the other 30
    assert not torch.equal(model(images), model(images + changed.roll(8, 3)))


# The contrast of two classes


def test_a_contrast_keeps_the_other_sign_of_what_its_opposite_keeps():
    """By hand: one head, two tokens; the class's logit has one gradient, the other class's another.

    Gradient times attention of the difference is [[0.5, -1], [0.25, 0]]. The contrast keeps 0.5 and
    0.25, its opposite keeps 1. So each place speaks for one of the two at most, and what one keeps
    minus what the other keeps is the whole difference, without any clamping.
    """
    attn = torch.tensor([[[[0.5, 0.5], [0.25, 0.75]]]])
    one = torch.tensor([[[[3.0, 1.0], [2.0, 5.0]]]])
    other = torch.tensor([[[[2.0, 3.0], [1.0, 5.0]]]])
    identity = torch.eye(2)
    for_one = relevance({0: attn}, {0: one - other})[0] - identity
    for_other = relevance({0: attn}, {0: other - one})[0] - identity
    assert torch.equal(for_one, torch.tensor([[[0.5, 0.0], [0.25, 0.0]]]))
    assert torch.equal(for_other, torch.tensor([[[0.0, 1.0], [0.0, 0.0]]]))
    assert torch.equal(for_one - for_other, (attn * (one - other)).mean(1))


def test_the_contrast_of_a_model_is_of_the_difference_of_its_logits(tiny):
    """In block 0, where nothing is multiplied, it is minus its opposite before it is clamped."""
    images = torch.randn(2, 3, 32, 32)
    others = torch.tensor([4, 1])
    logits, attn = tiny.forward_with_attention(images, [0])
    difference = logits.gather(1, TARGETS[:, None]) - logits.gather(1, others[:, None])
    (gradient,) = torch.autograd.grad(difference.sum(), attn[0])
    step = torch.eye(17) + (gradient * attn[0].detach()).clamp(min=0).mean(1)
    queries = range(17)
    found = class_relevance(tiny, images, TARGETS, [0, 11], queries, others)
    assert_close(found[0], step, rtol=1e-4, atol=1e-7)
    opposite = class_relevance(tiny, images, others, [0, 11], queries, TARGETS)
    whole = (gradient * attn[0].detach()).mean(1)
    assert_close(found[0] - opposite[0], whole, rtol=1e-4, atol=1e-7)
    # A class against itself has nothing that speaks for it.
    nothing = class_relevance(tiny, images, TARGETS, [0, 11], queries, TARGETS)
    for rows in nothing.values():
        assert torch.equal(rows, torch.eye(17).expand(2, 17, 17))
    with pytest.raises(UserError, match="class 5 is out of range"):
        class_relevance(tiny, images, TARGETS, [0], queries, others + 1)


# The function that runs a model


def test_class_relevance_works_in_any_mode_and_changes_nothing(tiny):
    images = torch.randn(2, 3, 32, 32)
    expected = class_relevance(tiny, images, TARGETS, [3, 11])
    for frozen in (False, True):
        tiny.requires_grad_(not frozen).head.requires_grad_(True)
        before = [p.requires_grad for p in tiny.parameters()]
        with torch.no_grad():
            assert_close(class_relevance(tiny, images, TARGETS, [3, 11]), expected)
        with torch.inference_mode():
            inside = class_relevance(tiny, images.clone(), TARGETS.clone(), [3, 11])
        assert_close(inside, expected)
        assert not any(r.is_inference() or r.requires_grad for r in inside.values())
        assert all(p.grad is None for p in tiny.parameters())
        assert [p.requires_grad for p in tiny.parameters()] == before
    assert images.grad is None and not images.requires_grad


def test_class_relevance_under_autocast_leaves_training_intact(tiny):
    images = torch.randn(2, 3, 32, 32)
    expected = class_relevance(tiny, images, TARGETS, [5, 11])
    with autocast(torch.bfloat16):
        found = class_relevance(tiny, images, TARGETS, [5, 11])
        loss = tiny(images).float().sum()
    loss.backward()
    assert all(p.grad is not None for p in tiny.parameters())
    for block in found:
        assert found[block].dtype == torch.float32
        bound = 0.1 * expected[block][..., 1:].max().item()
        assert_close(found[block], expected[block], rtol=0, atol=bound)
        assert not torch.equal(found[block], expected[block])  # it did run in bfloat16


def test_each_image_is_explained_for_its_own_class(tiny):
    images = torch.randn(1, 3, 32, 32).expand(2, -1, -1, -1)
    both = class_relevance(tiny, images, TARGETS, [11])[11]
    assert not torch.allclose(both[0], both[1], rtol=0.1)
    for i in range(2):
        assert_close(class_relevance(tiny, images[:1], TARGETS[i : i + 1], [11])[11][0], both[i])


def peak_saved(call) -> int:
    """Return the most bytes that autograd kept at one time for going backward."""
    kept = peak = 0

    class Saved:
        def __init__(self, tensor):
            nonlocal kept, peak
            self.tensor = tensor.detach()  # Attached, it would make the graph hold itself.
            kept += tensor.nbytes
            peak = max(peak, kept)
            weakref.finalize(self, release, tensor.nbytes)

    def release(size):
        nonlocal kept
        kept -= size

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        call()
    return peak


def test_class_relevance_keeps_one_blocks_graph_for_any_blocks():
    shallow, deep = (randomize(ViT(ViTConfig(**vars(TINY) | {"depth": depth}))) for depth in (1, 8))
    images = torch.randn(2, 3, 32, 32)
    one = peak_saved(lambda: class_relevance(shallow, images, TARGETS, [0]))
    assert one > 0
    for blocks in ([0], [7], range(8)):
        assert peak_saved(lambda b=blocks: class_relevance(deep, images, TARGETS, b)) == one


def test_cudnn_computes_no_attention_unless_it_is_alone(tiny, monkeypatch):
    allowed = []

    def record(q, k, v):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return v[:, :, : q.shape[2]]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    images = torch.randn(1, 3, 32, 32)
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        tiny(images)
        tiny.forward_with_attention(images, [3])
        assert torch.backends.cuda.cudnn_sdp_enabled()  # as the caller had it
    assert allowed == [False] * (2 * tiny.config.depth)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        fused_attention(*torch.randn(3, 1, 2, 5, 8))
    assert allowed[-1]
