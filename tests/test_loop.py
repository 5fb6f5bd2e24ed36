from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, randomize
from torch.testing import assert_close

from minivit import Preprocess, ViT, loop
from minivit.errors import UserError
from minivit.optim import freeze_except, lr_at, parameter_groups, parse_blocks, trainable
from minivit.state import begin

CPU_SCALER_OFF = torch.amp.GradScaler("cpu", enabled=False)


def batch(n=7):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, 32, 32, generator=generator), torch.randint(5, (n,), generator=generator)


def sgd(model):
    return torch.optim.SGD(trainable(model).values(), lr=0.5)


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 7, 50])
def test_micro_batches_add_up_to_the_full_batch(tiny, micro_batch):
    images, labels = batch()
    freeze_except(tiny, [10, 11])
    F.cross_entropy(tiny(images), labels).backward()
    expected = {name: p.grad.clone() for name, p in trainable(tiny).items()}
    norm = torch.cat([g.flatten() for g in expected.values()]).norm()
    loss, found_norm, _ = loop.train_step(tiny, sgd(tiny), CPU_SCALER_OFF, images, labels, micro_batch=micro_batch, amp=None)
    assert_close(loss, F.cross_entropy(randomize(ViT(TINY))(images), labels).detach())
    assert_close(found_norm, norm)
    for name, p in trainable(tiny).items():  # what remains is the clipped sum
        assert_close(p.grad, expected[name] * min(1, loop.MAX_GRAD_NORM / (norm.item() + 1e-6)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("blocks", [[], [11], [8, 11], list(range(12))], ids=str)
def test_only_the_chosen_blocks_norm_and_head_change(tiny, blocks):
    before = {name: p.clone() for name, p in tiny.named_parameters()}
    images, labels = batch()
    cut = freeze_except(tiny, blocks)
    assert cut == min(blocks, default=12)
    loop.train_step(tiny, sgd(tiny), CPU_SCALER_OFF, images, labels, micro_batch=7, amp=None)
    for name, p in tiny.named_parameters():
        chosen = name.split(".")[0] in ("norm", "head") or any(name.startswith(f"blocks.{i}.") for i in blocks)
        assert torch.equal(p, before[name]) != chosen, name
        assert (p.grad is not None) == chosen, name


def test_frozen_blocks_build_no_graph(tiny):
    freeze_except(tiny, [10, 11])
    saved = []
    images, labels = batch()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        loop.train_step(tiny, sgd(tiny), CPU_SCALER_OFF, images, labels, micro_batch=7, amp=None)
    few = len(saved)
    freeze_except(tiny, range(12))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        loop.train_step(tiny, sgd(tiny), CPU_SCALER_OFF, images, labels, micro_batch=7, amp=None)
    assert len(saved) - few > 4 * few


def test_an_fp16_overflow_skips_the_step_and_lowers_the_scale(tiny):
    images, labels = batch()
    freeze_except(tiny, [10, 11])
    before = {name: p.clone() for name, p in trainable(tiny).items()}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    optimizer = sgd(tiny)
    _, norm, _ = loop.train_step(tiny, optimizer, scaler, images, labels, micro_batch=3, amp=torch.float16)
    assert not norm.isfinite()
    assert scaler.get_scale() == 2.0**59
    assert all(torch.equal(p, before[name]) for name, p in trainable(tiny).items())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    _, norm, _ = loop.train_step(tiny, optimizer, scaler, images, labels, micro_batch=3, amp=torch.float16)
    assert norm.isfinite()
    assert not torch.equal(tiny.head.weight, before["head.weight"])


def test_clipping_sees_the_unscaled_gradients(tiny):
    images, labels = batch()
    freeze_except(tiny, [10, 11])
    kept = {name: p.detach().clone() for name, p in tiny.named_parameters()}
    _, expected, _ = loop.train_step(tiny, sgd(tiny), CPU_SCALER_OFF, images, labels, micro_batch=3, amp=None)
    stepped = tiny.head.weight.detach().clone()
    tiny.load_state_dict(kept)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    _, norm, _ = loop.train_step(tiny, sgd(tiny), scaler, images, labels, micro_batch=3, amp=None)
    assert_close(norm, expected)
    assert_close(tiny.head.weight.detach(), stepped)


def fit(model, data, val=None, **changes):
    settings = {"amp": None, "epochs": 2, "batch_size": 4, "micro_batch": 4, "lr": 1e-3, "seed": 0, "cut": 10} | changes
    run = begin(model, amp=settings["amp"], weight_decay=0.05)
    return list(loop.fit(run, data, val or data, **settings))


@pytest.fixture
def pixels():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (9, 3, 32, 32), generator=generator, dtype=torch.uint8), torch.arange(9) % 5


def fresh():
    model = randomize(ViT(TINY))
    model.preprocess = Preprocess((32, 32))
    freeze_except(model, [10, 11])
    return model


TIMES = {"images_per_s", "seconds", "peak_gib"}


def test_micro_batch_changes_speed_and_never_the_result(pixels):
    whole, parts = fit(fresh(), pixels), fit(fresh(), pixels, micro_batch=3)
    for a, b in zip(whole, parts):
        for key in a.keys() - TIMES:
            assert a[key] == pytest.approx(b[key], rel=1e-4), key
    assert whole[0].keys() >= {"epoch", "loss", "lr", "train_accuracy", "train_loss", "val_accuracy", "val_loss"} | TIMES
    assert whole[0].keys() >= {"val_precision", "val_recall", "val_f1"}


def test_tokens_that_are_kept_give_the_numbers_of_tokens_computed_anew(pixels, monkeypatch):
    kept = fit(fresh(), pixels)
    monkeypatch.setattr(loop, "TOKEN_CACHE_GIB", 0)
    anew = fit(fresh(), pixels)
    assert [{k: row[k] for k in row.keys() - TIMES} for row in kept] == [
        {k: row[k] for k in row.keys() - TIMES} for row in anew
    ]


def test_training_metrics_are_of_photos_without_augmentation(pixels):
    model = fresh()
    last = fit(model, pixels)[-1]
    expected = loop.score(loop.predict_photos(model, pixels[0], amp=None), pixels[1])
    assert last["train_loss"] == pytest.approx(expected["loss"], abs=1e-6)
    assert last["train_accuracy"] == last["val_accuracy"] == expected["accuracy"]


def test_a_skipped_step_moves_neither_schedule_nor_weights(pixels, monkeypatch):
    monkeypatch.setattr(loop, "train_step", lambda *_, **__: (torch.tensor(1.0), torch.tensor(math.inf), 4))
    rows = fit(fresh(), pixels, amp=torch.float16)
    assert rows[-1]["lr"] == lr_at(0, peak=1e-3, total=6)


def test_a_loss_that_is_not_finite_stops_with_a_clear_line(pixels):
    model = fresh()
    model.head.weight.data.fill_(math.nan)
    with pytest.raises(UserError, match="the loss of epoch 1 is nan; try a lower --lr than 0.001"):
        fit(model, pixels)


def test_the_learning_rate_warms_up_and_ends_at_0():
    rates = [lr_at(step, peak=1.0, total=40) for step in range(41)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[22] == pytest.approx(0.5)
    assert rates[40] == pytest.approx(0)
    assert all(a >= b for a, b in zip(rates[4:], rates[5:]))


def test_matrices_decay_and_the_rest_does_not(tiny):
    freeze_except(tiny, [11])
    groups = {group["weight_decay"]: group["params"] for group in parameter_groups(tiny, 0.05)}
    assert groups.keys() == {0.05, 0.0}
    decayed, spared = groups[0.05], groups[0.0]
    assert len(decayed) == 5
    assert all(p.ndim == 2 for p in decayed)
    assert len(spared) == len(trainable(tiny)) - 5


@pytest.mark.parametrize(
    "text, expected",
    [("8-11", [8, 9, 10, 11]), ("10,11", [10, 11]), ("0, 3-4,3", [0, 3, 4]), ("all", list(range(12))), ("none", [])],
)
def test_ranges_of_blocks_are_from_0_and_inclusive(text, expected):
    assert parse_blocks(text, 12) == expected


@pytest.mark.parametrize("text", ["12", "11-12", "-1", "", "a", "3-2", "1-", "8..11", "1-2-3"])
def test_other_ranges_are_refused(text):
    with pytest.raises(UserError, match="blocks"):
        parse_blocks(text, 12)
