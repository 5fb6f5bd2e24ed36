"""One optimizer step, the epochs, and the schedule."""

from __future__ import annotations

import math
import re
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    TIMES,
    TINY,
    make_trainable,
    randomize,
    start_run,
    train_epochs,
    trainable_vector,
    without_times,
)
from torch.testing import assert_close

from minivit import ViT, load_pretrained, train
from minivit.cli import parse_blocks
from minivit.errors import UserError
from minivit.model import freeze_except, trainable
from minivit.training import step as steps
from minivit.training.metrics import best_row
from minivit.training.optimizer import lr_at, parameter_groups
from minivit.training.rehearsal import rehearse
from minivit.training.state import RunState
from minivit.training.step import (
    MAX_GRAD_NORM,
    Batch,
    predict_photos,
    score_predictions,
    train_step_that_fits,
)

SCALER_OFF = torch.amp.GradScaler("cpu", enabled=False)


def batch(n=7):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(n, 3, 32, 32, generator=generator)
    return images, torch.randint(5, (n,), generator=generator)


def step(network, optimizer, images, labels, *, micro_batch, scaler=SCALER_OFF, **settings):
    """Take a step on these images; return its loss, its norm, and the micro-batch that fitted."""
    size = settings.pop("size", len(labels))
    smoothing = settings.pop("label_smoothing", 0.0)
    amp = settings.pop("amp", None)
    on_cpu = SimpleNamespace(cls_token=images)
    state = RunState(on_cpu, 10, amp, micro_batch, optimizer, scaler, **settings)
    taken = Batch(images.__getitem__, labels, size)
    return *train_step_that_fits(network, state, taken, smoothing), state.micro_batch


def sgd(model):
    return torch.optim.SGD(trainable(model).values(), lr=0.5)


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 7, 50])
def test_micro_batches_add_up_to_the_full_batch(tiny, micro_batch):
    images, labels = batch()
    freeze_except(tiny, [10, 11])
    F.cross_entropy(tiny(images), labels).backward()
    expected = {name: p.grad.clone() for name, p in trainable(tiny).items()}
    norm = torch.cat([g.flatten() for g in expected.values()]).norm()
    loss, found_norm, _ = step(tiny, sgd(tiny), images, labels, micro_batch=micro_batch)
    assert_close(loss, F.cross_entropy(randomize(ViT(TINY))(images), labels).detach())
    assert_close(found_norm, norm)
    for name, p in trainable(tiny).items():  # what remains is the clipped sum
        assert_close(
            p.grad,
            expected[name] * min(1, MAX_GRAD_NORM / (norm.item() + 1e-6)),
            rtol=1e-4,
            atol=1e-6,
        )


@pytest.mark.parametrize("blocks", [[], [11], [8, 11], list(range(12))], ids=str)
def test_only_the_chosen_blocks_norm_and_head_change(tiny, blocks):
    before = {name: p.clone() for name, p in tiny.named_parameters()}
    images, labels = batch()
    cut = freeze_except(tiny, blocks)
    assert cut == min(blocks, default=12)
    step(tiny, sgd(tiny), images, labels, micro_batch=7)
    for name, p in tiny.named_parameters():
        chosen = name.startswith("head.")
        if blocks:  # Without any, the norm stays as it was, for the head is fitted to its output.
            chosen |= name.startswith(("norm.", *(f"blocks.{i}." for i in blocks)))
        assert torch.equal(p, before[name]) != chosen, name
        assert (p.grad is not None) == chosen, name


def test_frozen_blocks_build_no_graph(tiny):
    freeze_except(tiny, [10, 11])
    saved = []
    images, labels = batch()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.shape) or t, lambda t: t
    ):
        step(tiny, sgd(tiny), images, labels, micro_batch=7)
    few = len(saved)
    freeze_except(tiny, range(12))
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.shape) or t, lambda t: t
    ):
        step(tiny, sgd(tiny), images, labels, micro_batch=7)
    assert len(saved) - few > 4 * few


def test_an_fp16_overflow_skips_the_step_and_lowers_the_scale(tiny):
    images, labels = batch()
    freeze_except(tiny, [10, 11])
    before = {name: p.clone() for name, p in trainable(tiny).items()}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    optimizer = sgd(tiny)
    _, norm, _ = step(
        tiny, optimizer, images, labels, micro_batch=3, amp=torch.float16, scaler=scaler
    )
    assert not norm.isfinite()
    assert scaler.get_scale() == 2.0**59
    assert all(torch.equal(p, before[name]) for name, p in trainable(tiny).items())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    _, norm, _ = step(
        tiny, optimizer, images, labels, micro_batch=3, amp=torch.float16, scaler=scaler
    )
    assert norm.isfinite()
    assert not torch.equal(tiny.head.weight, before["head.weight"])


def test_clipping_sees_the_unscaled_gradients(tiny):
    images, labels = batch()
    freeze_except(tiny, [10, 11])
    kept = {name: p.detach().clone() for name, p in tiny.named_parameters()}
    _, expected, _ = step(tiny, sgd(tiny), images, labels, micro_batch=3)
    stepped = tiny.head.weight.detach().clone()
    tiny.load_state_dict(kept)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    _, norm, _ = step(tiny, sgd(tiny), images, labels, micro_batch=3, scaler=scaler)
    assert_close(norm, expected)
    assert_close(tiny.head.weight.detach(), stepped)


def fit(model, data, val=None, *, amp=None, micro_batch=4, **changes):
    return train_epochs(start_run(model, amp=amp, micro_batch=micro_batch), data, val, **changes)


def test_micro_batch_changes_speed_and_never_the_result(pixels):
    whole, parts = fit(make_trainable(), pixels), fit(make_trainable(), pixels, micro_batch=3)
    for a, b in zip(whole, parts):
        for key in a.keys() - TIMES:
            assert a[key] == pytest.approx(b[key], rel=1e-4), key
    columns = {"epoch", "loss", "lr", "train_accuracy", "train_loss", "val_accuracy", "val_loss"}
    columns |= {"val_precision", "val_recall", "val_f1"}
    head_alone, epoch = whole[0], whole[1]
    assert epoch.keys() >= columns | TIMES
    assert head_alone.keys() >= columns | TIMES - {"mfu"}  # Its steps are not those of training.


def test_tokens_that_are_kept_give_the_numbers_of_tokens_computed_anew(pixels):
    kept = fit(make_trainable(), pixels)
    anew = fit(make_trainable(), pixels, cache_gib=0)
    assert without_times(kept) == without_times(anew)


def test_training_metrics_are_of_photos_without_augmentation(pixels):
    model = make_trainable()
    last = fit(model, pixels)[-1]
    expected = score_predictions(predict_photos(model, pixels[0], batch=64)[0], pixels[1])
    assert last["train_loss"] == pytest.approx(expected["loss"], abs=1e-6)
    assert last["train_accuracy"] == last["val_accuracy"] == expected["accuracy"]


def test_a_skipped_step_moves_neither_schedule_nor_weights(pixels, monkeypatch):
    skipped = (torch.tensor(1.0), torch.tensor(math.inf))
    monkeypatch.setattr(steps, "train_step", lambda *_, **__: skipped)
    rows = fit(make_trainable(), pixels, amp=torch.float16)
    assert rows[-1]["lr"] == lr_at(0, peak=1e-3, total=6)


def test_the_loss_of_a_skipped_step_is_not_counted(pixels, monkeypatch):
    results = iter([(5.0, math.inf), (1.0, 1.0), (2.0, 1.0)])

    def step(*_, **__):
        loss, norm = next(results)
        return torch.tensor(loss), torch.tensor(norm)

    monkeypatch.setattr(steps, "train_step", step)
    _, row = fit(make_trainable(), pixels, amp=torch.float16, epochs=1)
    assert row["loss"] == pytest.approx((4 * 1 + 1 * 2) / 5)


def test_a_loss_that_is_not_finite_stops_with_a_clear_line(pixels):
    model = make_trainable()
    model.head.weight.data.fill_(math.nan)
    with pytest.raises(UserError, match="the loss of epoch 1 is nan; try a lower --lr than 0.001"):
        fit(model, pixels)


def test_an_epoch_of_nothing_but_skipped_steps_stops_too(pixels, monkeypatch):
    skipped = (torch.tensor(math.inf), torch.tensor(math.inf))
    monkeypatch.setattr(steps, "train_step", lambda *_, **__: skipped)
    with pytest.raises(UserError, match="the loss of epoch 1 is inf; try a lower --lr than 0.001"):
        fit(make_trainable(), pixels, amp=torch.float16)


def test_mfu_is_the_share_that_the_models_products_take_of_the_devices(pixels, monkeypatch):
    monkeypatch.setattr(train.devices, "product_flops", lambda *_: 1e9)
    model = make_trainable()
    _, *rows = fit(model, pixels, cache_views=1)
    for row, whole in zip(rows, (model.flops(), model.flops(10)), strict=True):
        passes = whole + 2 * model.flops(
            10
        )  # forward, and backward through what trains, which takes twice as much
        assert row["mfu"] == pytest.approx(row["images_per_s"] * passes / 1e9)


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
    [
        ("8-11", [8, 9, 10, 11]),
        ("10,11", [10, 11]),
        ("0, 3-4,3", [0, 3, 4]),
        ("all", list(range(12))),
        ("none", []),
    ],
)
def test_ranges_of_blocks_are_from_0_and_inclusive(text, expected):
    assert parse_blocks(text, 12) == expected


@pytest.mark.parametrize("text", ["12", "11-12", "-1", "", "a", "3-2", "1-", "8..11", "1-2-3"])
def test_other_ranges_are_refused(text):
    with pytest.raises(UserError, match="blocks"):
        parse_blocks(text, 12)


def test_micro_batches_change_the_update_by_rounding_only(tiny):
    images, labels = batch(9)
    freeze_except(tiny, [10, 11])
    kept = {name: p.detach().clone() for name, p in tiny.named_parameters()}
    updates = []
    for micro_batch in (9, 4, 2, 1):  # a last micro-batch of one photo for 4 and 2
        tiny.load_state_dict(kept)
        before = trainable_vector(tiny)
        step(tiny, sgd(tiny), images, labels, micro_batch=micro_batch)
        updates.append(trainable_vector(tiny) - before)
    for update in updates[1:]:  # 1e-6 is of float32's own rounding of the weights
        assert (update - updates[0]).norm() <= 1e-6 * updates[0].norm()


class Full(torch.autograd.Function):
    """The identity, whose backward pass runs out of memory for more than two photos."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if len(gradient) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gradient


def test_a_step_that_ran_out_of_memory_holds_nothing_while_it_is_redone(tiny, capsys):
    images, labels = batch(8)
    freeze_except(tiny, [10, 11])
    made, alive = [], []

    def net(x):
        alive.append(sum(tensor() is not None for tensor in made))
        logits = Full.apply(tiny(x))
        made.append(weakref.ref(logits))
        return logits

    *_, micro_batch = step(net, sgd(tiny), images, labels, micro_batch=8)
    assert micro_batch == 2
    assert alive[:3] == [0, 0, 0]  # of 8 photos, of 4, of the first 2
    assert "micro-batches of 4\n" in capsys.readouterr().err


def too_much(model, most, name="forward"):
    """Make a forward pass of more than `most` photos run out of memory; return all batch sizes.

    With `most` 0, the first micro-batch succeeds and the second runs out of memory.
    """
    real = getattr(model, name)
    seen = []

    def limited(x, **options):
        seen.append(len(x))
        if len(x) > most and (most or len(seen) > 1):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(x, **options)

    setattr(model, name, limited)
    return seen


def test_out_of_memory_halves_the_micro_batch_and_redoes_the_step(tiny, capsys):
    images, labels = batch(7)
    freeze_except(tiny, [10, 11])
    kept = {name: p.detach().clone() for name, p in tiny.named_parameters()}
    expected = step(tiny, sgd(tiny), images, labels, micro_batch=1)
    stepped = trainable_vector(tiny)
    tiny.load_state_dict(kept)
    seen = too_much(tiny, 2)
    result = step(tiny, sgd(tiny), images, labels, micro_batch=64)
    assert seen == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert result[2] == 1
    assert_close(result[0], expected[0])
    assert_close(trainable_vector(tiny), stepped)
    message = "out of memory; the step is redone in micro-batches of "
    assert capsys.readouterr().err.count(message) == 2


def test_a_step_is_tried_down_to_one_photo_at_a_time(tiny):
    images, labels = batch(4)
    freeze_except(tiny, [10, 11])
    seen = too_much(tiny, 1)
    step(tiny, sgd(tiny), images, labels, micro_batch=4)
    assert seen == [4, 2, 1, 1, 1, 1]


def test_out_of_memory_in_the_middle_of_a_step_leaves_no_gradient_behind(tiny):
    images, labels = batch(7)
    freeze_except(tiny, [10, 11])
    kept = {name: p.detach().clone() for name, p in tiny.named_parameters()}
    step(tiny, sgd(tiny), images, labels, micro_batch=2)
    stepped = trainable_vector(tiny)
    tiny.load_state_dict(kept)
    real, calls = tiny.forward, []

    def third_fails(images):
        calls.append(len(images))
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return real(images)

    tiny.forward = third_fails
    step(tiny, sgd(tiny), images, labels, micro_batch=4)
    assert calls == [4, 3, 2, 2, 2, 1]
    assert_close(trainable_vector(tiny), stepped)


def test_where_not_one_photo_fits_it_says_so(tiny):
    images, labels = batch(2)
    freeze_except(tiny, [10, 11])
    too_much(tiny, 0)
    with pytest.raises(
        UserError, match="cpu: out of memory; try a lower --batch-size or --micro-batch"
    ):
        tiny.forward(images[:0])
        step(tiny, sgd(tiny), images, labels, micro_batch=2)


def test_a_stand_in_counts_neither_in_the_loss_nor_in_the_gradients(tiny):
    images, labels = batch(1)
    freeze_except(tiny, [10, 11])
    before = trainable_vector(tiny)
    loss, norm, _ = step(tiny, sgd(tiny), images, labels, micro_batch=1, size=math.inf)
    assert (loss, norm) == (0, 0)
    assert torch.equal(trainable_vector(tiny), before)


def test_label_smoothing_is_torchs(tiny):
    images, labels = batch()
    freeze_except(tiny, [10, 11])
    expected = F.cross_entropy(tiny(images), labels, label_smoothing=0.2).detach()
    loss, *_ = step(tiny, sgd(tiny), images, labels, micro_batch=3, label_smoothing=0.2)
    assert_close(loss, expected)


def test_layer_decay_lowers_the_learning_rate_block_by_block(tiny):
    freeze_except(tiny, [8, 10, 11])
    names = {id(p): name for name, p in tiny.named_parameters()}
    scale = {
        names[id(p)]: group["lr_scale"]
        for group in parameter_groups(tiny, 0.05, 0.5)
        for p in group["params"]
    }
    assert scale.keys() == trainable(tiny).keys()
    assert scale["head.weight"] == scale["norm.bias"] == 1
    assert scale["blocks.11.attn.qkv.weight"] == scale["blocks.11.norm1.bias"] == 0.5
    assert scale["blocks.10.mlp.fc1.weight"] == 0.25
    assert scale["blocks.8.mlp.fc1.weight"] == 0.0625


def test_the_head_has_a_learning_rate_of_its_own(tiny, pixels):
    freeze_except(tiny, [10, 11])
    names = {id(p): name for name, p in tiny.named_parameters()}
    groups = parameter_groups(tiny, 0.05, layer_decay=0.5, head_scale=10.0)
    scale = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert scale.keys() == trainable(tiny).keys()
    assert (scale["head.weight"], scale["head.bias"]) == (10.0, 10.0)
    assert (scale["norm.weight"], scale["blocks.11.norm1.bias"]) == (1.0, 0.5)
    assert scale["blocks.10.mlp.fc1.weight"] == 0.25
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert (decay["head.weight"], decay["head.bias"]) == (0.05, 0.0)

    state = start_run(make_trainable(), head_scale=0.0)
    before = state.trainable_weights()
    train_epochs(state, pixels, epochs=1)
    now = state.trainable_weights()
    still = {name for name, weight in now.items() if torch.equal(weight, before[name])}
    assert still == {"head.weight", "head.bias"}


def test_layer_decay_reaches_the_steps(pixels):
    moved = []
    for layer_decay in (1.0, 0.0):
        model = make_trainable()
        before = {name: p.detach().clone() for name, p in trainable(model).items()}
        state = start_run(model, layer_decay=layer_decay)
        train_epochs(state, pixels, stop_requested=lambda state=state: state.epoch > 1)
        moved.append(
            {
                name.split(".")[0]
                for name, p in trainable(model).items()
                if not torch.equal(p, before[name])
            }
        )
    assert moved == [{"blocks", "norm", "head"}, {"norm", "head"}]


@pytest.mark.parametrize(
    "accuracies, patience, epochs, best",
    [
        ([0.5, 0.7, 0.7, 0.6, 0.9], 2, 4, 3),  # Of equal epochs the last is kept.
        ([1.0] * 7, 3, 4, 4),
        ([0.5, 0.6, 0.7, 0.8], 1, 4, 4),
        ([0.5, 0.4, 0.6, 0.6, 0.6], 2, 5, 5),
    ],
    ids=str,
)
def test_patience_counts_from_the_first_epoch_that_was_the_best(
    pixels, monkeypatch, accuracies, patience, epochs, best
):
    remaining = iter([1.0, *accuracies])  # The head alone comes first, and is no epoch.

    def score(logits, labels):
        scores = score_predictions(logits, labels)
        if len(labels) == 4:  # the validation photos
            scores["accuracy"] = next(remaining)
        return scores

    monkeypatch.setattr(train, "score_predictions", score)
    rows = fit(
        make_trainable(),
        pixels,
        (pixels[0][:4], pixels[1][:4]),
        epochs=len(accuracies),
        patience=patience,
    )
    assert rows[-1]["epoch"] == epochs
    assert best_row(rows[1:])["epoch"] == best


def test_the_mean_loss_weighs_a_short_last_batch_by_its_photos(pixels, monkeypatch):
    losses = iter([1.0, 2.0, 7.0] * 2)
    monkeypatch.setattr(
        steps, "train_step", lambda *_, **__: (torch.tensor(next(losses)), torch.tensor(1.0))
    )
    assert fit(make_trainable(), pixels)[1]["loss"] == (4 * 1 + 4 * 2 + 1 * 7) / 9


def test_a_rehearsal_changes_nothing_and_says_what_fits(tiny, capsys):
    freeze_except(tiny, [10, 11])
    tiny.labels = ("a", "b")
    before = {name: p.detach().clone() for name, p in tiny.named_parameters()}
    seen = too_much(tiny, 2, "logits")
    micro_batch, gib = rehearse(tiny, cut=10, batch_size=8, micro_batch=8, amp=None)
    assert micro_batch == max(seen[-8:]) == 2
    assert 0.1 < gib < 5
    assert all(
        torch.equal(p, before[name]) and p.grad is None for name, p in tiny.named_parameters()
    )


def test_20_steps_follow_transformers_and_torchs_adamw(tiny_folder):
    """The same batches, freezing, weight decay, clipping and schedule: losses to 1e-5."""
    from transformers import ViTForImageClassification

    ours = load_pretrained(tiny_folder)
    theirs = ViTForImageClassification.from_pretrained(
        tiny_folder, attn_implementation="eager"
    ).train()
    tail = [
        (name, p)
        for name, p in theirs.named_parameters()
        if re.search(r"layers?\.1[01]\.|vit\.layernorm|classifier", name)
    ]
    theirs.requires_grad_(False)
    for _, p in tail:
        p.requires_grad_(True)
    freeze_except(ours, [10, 11])
    assert sum(p.numel() for _, p in tail) == trainable_vector(ours).numel()
    split = {True: 0.05, False: 0.0}
    groups = [
        {"params": [p for _, p in tail if (p.ndim > 1) == matrix], "weight_decay": split[matrix]}
        for matrix in split
    ]
    reference, run = torch.optim.AdamW(groups, lr=0.0), start_run(ours)
    first = None
    for i in range(20):
        generator = torch.Generator().manual_seed(i)
        images, labels = torch.randn(6, 3, 32, 32, generator=generator), torch.arange(6) % 5
        for group in (*reference.param_groups, *run.optimizer.param_groups):
            group["lr"] = lr_at(i, peak=3e-3, total=20)
        loss, *_ = step(ours, run.optimizer, images, labels, micro_batch=4, scaler=run.scaler)
        reference.zero_grad()
        expected = F.cross_entropy(theirs(pixel_values=images).logits, labels)
        expected.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in tail], 1.0)
        reference.step()
        assert_close(loss, expected.detach(), rtol=0, atol=1e-5)
        first = first or loss.item()
    assert abs(loss.item() - first) > 0.1  # they went somewhere
