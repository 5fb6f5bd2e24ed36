"""The frozen blocks: their precision, features kept or computed anew, and kept views."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import (
    TINY,
    make_trainable,
    randomize,
    start_run,
    train_epochs,
    trainable_vector,
    without_times,
)
from torch.testing import assert_close

from minivit import ViT
from minivit import train as train_job
from minivit.data.datasets import Data, Split
from minivit.errors import UserError
from minivit.model import freeze_except, trainable, working_copy
from minivit.settings import TrainSettings
from minivit.system import device
from minivit.training import step as steps
from minivit.training.features import (
    FeatureExtractor,
    TrainableLayers,
    features_gib,
    gather_rows,
    host_memory_gib,
    to_device_ahead,
)
from minivit.training.state import read_state, save_state, set_trainable
from minivit.training.step import predict, predict_photos, score_predictions

CPU = torch.device("cpu")


def run_of(model, amp=None, cut=10):
    return start_run(working_copy(model, CPU, amp, train=True), amp=amp, cut=cut)


def fit(state, data, **changes):
    return train_epochs(state, data, **{"epochs": 4} | changes)


def test_a_working_copy_holds_only_trainable_weights_in_float32():
    model = make_trainable()
    copy = working_copy(model, CPU, torch.bfloat16, train=True)
    assert trainable(copy).keys() == trainable(model).keys()
    for name, parameter in copy.named_parameters():
        trains = name in trainable(model)
        assert parameter.dtype is (torch.float32 if trains else torch.bfloat16), name
        assert parameter.requires_grad == trains
    evaluated = working_copy(copy, CPU, torch.bfloat16, train=False)
    assert {p.dtype for p in evaluated.parameters()} == {torch.bfloat16}
    assert (
        evaluated.blocks[0].mlp.fc1.weight.data_ptr() == copy.blocks[0].mlp.fc1.weight.data_ptr()
    )  # once
    assert {p.dtype for p in model.parameters()} == {
        torch.float32
    }  # what is exported keeps every bit


def test_a_working_copy_in_float32_shares_the_models_weights():
    model = make_trainable()
    copy = working_copy(model, CPU, None, train=True)
    assert all(p.data_ptr() == q.data_ptr() for p, q in zip(copy.parameters(), model.parameters()))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(copy(images), model(images))


def test_positions_are_resampled_once():
    model = randomize(ViT(replace(TINY, pos_grid=(5, 7))))
    # A matrix product may take another kernel for weights that require gradients.
    model.requires_grad_(False)
    copy = working_copy(model, CPU, None, train=False)
    images = torch.randn(2, 3, 32, 32)
    assert copy.pos_grid == copy.config.grid
    assert torch.equal(copy(images), model(images))


def test_evaluation_in_low_precision_gives_infers_logits_bit_for_bit(pixels):
    """infer.py runs the whole model in that precision.

    Training evaluates with features that the frozen blocks computed and that are kept in memory.
    """
    model = make_trainable()
    run = run_of(model, torch.bfloat16)
    fit(run, pixels, epochs=1)
    copy = working_copy(run.model, CPU, torch.bfloat16, train=False)
    tokens = FeatureExtractor(run.model, 10, batch=4).evaluation(
        pixels[0], torch.arange(9), keep_on=CPU
    )
    logits, _ = predict(copy, tokens(), cut=10)
    set_trainable(model, run.trainable_weights())
    assert torch.equal(logits, predict_photos(model.to(torch.bfloat16), pixels[0], batch=4)[0])


def test_tokens_are_kept_in_order_or_computed_anew_each_time(pixels, monkeypatch):
    model = make_trainable()
    calls = []
    real = FeatureExtractor.__call__
    monkeypatch.setattr(FeatureExtractor, "__call__", lambda *args: calls.append(0) or real(*args))
    indices = torch.tensor([1, 3, 5, 7, 8])
    expected = model.tokens(model.preprocess.normalize(pixels[0][indices]), stop=10).detach()
    for keep_on, computed in ((CPU, 3), (None, 6)):
        calls.clear()
        extractor = FeatureExtractor(model, 10, batch=2)
        tokens = extractor.evaluation(pixels[0], indices, keep_on=keep_on)
        for _ in range(2):
            assert_close(torch.cat(list(tokens())), expected)
        assert len(calls) == computed


@pytest.mark.parametrize("views", [4, 3], ids=["as many as epochs", "fewer"])
def test_kept_views_change_no_epoch_in_which_they_are_new(pixels, views):
    plain = fit(run_of(make_trainable()), pixels)
    kept = fit(run_of(make_trainable()), pixels, cache_views=views)
    # Batches of different sizes round differently, hence the tolerance.
    for row, expected in zip(without_times(kept), without_times(plain[: 1 + views])):
        assert row == pytest.approx(expected, rel=1e-5)
    assert (kept[4]["loss"] == pytest.approx(plain[4]["loss"], rel=1e-5)) == (views == 4)


def test_epochs_after_the_views_take_their_tokens_and_run_no_frozen_block(pixels, monkeypatch):
    augmented, real = [], FeatureExtractor.__call__

    def counted(self, images, draws=None):
        augmented.extend([] if draws is None else draws.tolist())
        return real(self, images, draws)

    monkeypatch.setattr(FeatureExtractor, "__call__", counted)
    rows = fit(run_of(make_trainable()), pixels, cache_views=2, epochs=6)
    assert len(augmented) == 2 * 9
    assert len({tuple(draws) for draws in augmented}) == 18  # another view each
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("stop", [0, 1, 4, 8, 9])
def test_a_run_from_views_that_stopped_goes_on_to_the_same_bits(
    pixels, tmp_path, monkeypatch, stop
):
    settings = {"cache_views": 2, "epochs": 4}
    whole = run_of(make_trainable())
    rows = fit(whole, pixels, **settings)
    first, real, taken = run_of(make_trainable()), steps.train_step, []

    def counted(*args, **named):
        taken.append(0)
        return real(*args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(steps, "train_step", counted)
        fit(first, pixels, **settings, stop_requested=lambda: len(taken) >= stop)
    assert first.stopped
    save_state(tmp_path / "state", first, {})
    second = run_of(make_trainable())
    second.restore(*read_state(tmp_path / "state", {}))
    fit(second, pixels, **settings)
    assert without_times(second.rows) == without_times(rows)
    assert torch.equal(trainable_vector(second.model), trainable_vector(whole.model))


def test_a_view_that_is_stopped_ends_with_the_batch_under_way(pixels):
    extractor, asked = FeatureExtractor(make_trainable(), 10, batch=2), []

    def second_time():
        asked.append(0)
        return len(asked) == 2

    draws = torch.full((9, 5), 0.5)
    assert extractor.compute(pixels[0], torch.arange(9), draws, second_time) is None
    assert len(asked) == 2  # of 5 batches


def test_views_that_need_more_memory_than_allowed_are_refused(pixels):
    with pytest.raises(
        UserError,
        match=r"the features of 3 views take .* GiB; raise --cache-gib 1e-05, or keep fewer",
    ):
        fit(run_of(make_trainable()), pixels, cache_views=3, cache_gib=1e-5)


def test_compiled_training_is_the_same_but_for_rounding(pixels, monkeypatch):
    real, compiled = torch.compile, []
    monkeypatch.setattr(
        torch, "compile", lambda f, **_: compiled.append(f) or real(f, backend="aot_eager")
    )
    monkeypatch.setattr(
        TrainableLayers,
        "compile",
        lambda self: setattr(self, "forward", torch.compile(self.forward)),
        raising=False,
    )
    rows = fit(run_of(make_trainable()), pixels, compile=True, epochs=2)
    plain = fit(run_of(make_trainable()), pixels, epochs=2)
    assert len(compiled) == 2
    for a, b in zip(rows, plain):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-5)


def test_nothing_is_compiled_that_was_not_asked_for(pixels, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_: asked.append(0))
    monkeypatch.setattr(torch, "compile", lambda function: asked.append(0) or function)
    fit(run_of(make_trainable()), pixels, epochs=1)
    assert not asked
    fit(run_of(make_trainable()), pixels, epochs=1, compile=True)
    assert len(asked) == 2  # what is frozen, and what trains


def test_frozen_blocks_between_trainable_ones_work_in_low_precision(pixels):
    model = make_trainable()
    cut = freeze_except(model, [8, 11])
    before = {name: p.clone() for name, p in model.named_parameters()}
    run = run_of(model, torch.bfloat16, cut)
    fit(run, pixels, epochs=1)
    now = run.trainable_weights()
    assert now.keys() == trainable(model).keys()
    assert all(not torch.equal(now[name], before[name]) for name in now)


def test_what_is_read_ahead_comes_in_order_and_errors_come_through():
    pairs = list(to_device_ahead(lambda i: (torch.tensor(i), torch.tensor(-i)), range(20), CPU))
    assert pairs == [(i, -i) for i in range(20)]

    def broken(i):
        if i == 3:
            raise UserError("photo 3 has vanished")
        return (torch.tensor(i),)

    with pytest.raises(UserError, match="photo 3"):
        list(to_device_ahead(broken, range(20), CPU))


def test_flops_are_those_of_vit_b_16(tiny):
    from minivit import ViTConfig

    with torch.device("meta"):
        model = ViT(ViTConfig())
    whole = (
        2 * 197 * (4 * 768**2 + 2 * 768 * 3072) + 4 * 197**2 * 768
    )  # of a block; 12 and the embeddings make 35.1e9
    last = (
        4 * 197 * 768**2 + 2 * (2 * 768**2 + 2 * 768 * 3072) + 4 * 197 * 768
    )  # whose class token alone is read
    assert 12 * whole + 2 * 196 * 768**2 == pytest.approx(35.1e9, rel=2e-3)
    assert model.flops() == 11 * whole + last + 2 * 196 * 768**2
    assert model.flops(10) == whole + last
    assert model.flops(12) == 0


def test_low_precision_evaluates_each_epoch_with_its_own_weights(pixels):
    run = run_of(make_trainable(), torch.bfloat16)
    for epoch in (1, 2):
        fit(run, pixels, epochs=2, lr=1e-2, stop_requested=lambda e=epoch: run.epoch > e)
        copy = working_copy(run.model, CPU, torch.bfloat16, train=False)
        batch = device.cpu_batch(torch.bfloat16)
        logits, _ = predict_photos(copy, pixels[0], batch=batch)
        assert run.rows[-1]["val_loss"] == score_predictions(logits, pixels[1])["loss"]


def test_kept_views_take_memory_before_features_for_evaluation(pixels, monkeypatch):
    kept, real = [], FeatureExtractor.evaluation
    monkeypatch.setattr(
        FeatureExtractor,
        "evaluation",
        lambda *args, keep_on: kept.append(keep_on) or real(*args, keep_on=keep_on),
    )
    gib = features_gib(make_trainable(), 9, cut=10)
    for room, expected in ((3.9, None), (4.1, CPU)):  # 2 views, and the photos of both splits
        kept.clear()
        fit(run_of(make_trainable()), pixels, cache_views=2, cache_gib=room * gib, epochs=3)
        assert kept == [expected] * 2


def test_features_are_kept_on_a_device_with_much_room(monkeypatch):
    other = torch.device("meta")
    model = make_trainable().to(other)
    gib = features_gib(model, 9, cut=10)
    settings = TrainSettings(epochs=3, batch_size=4, cache_views=0, memory_gib=3.0)
    asked = []

    def has_much_room(device, gib, limit_gib):
        asked.append((device, gib, limit_gib))
        return len(asked) == 1

    monkeypatch.setattr(device, "has_much_room", has_much_room)
    assert train_job.place_for_features(model, 10, 6, 3, settings) == other
    assert train_job.place_for_features(model, 10, 6, 3, settings) == CPU
    assert asked == [(other, gib, 3.0)] * 2
    asked.clear()
    small = replace(settings, cache_gib=0.9 * gib)
    assert train_job.place_for_features(model, 10, 6, 3, small) is None
    assert asked == []


def test_rows_are_taken_as_by_an_index_from_photos_and_from_tokens(pixels):
    index = torch.tensor([3, 0, 2])
    for source in (pixels[0], torch.randn(5, 3, 2)):
        assert torch.equal(gather_rows(source, index, CPU), source[index])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replayed_kernels_give_the_very_tokens(tiny):
    model = working_copy(tiny, torch.device("cuda"), torch.bfloat16, train=False)
    compute = FeatureExtractor(model, 1, batch=8)
    replayed = []
    for size in (
        4,
        4,
        4,
        3,
        4,
        4,
        3,
        3,
        3,
    ):  # one photo's tokens and another's differ, so what is left over shows
        images = torch.randint(
            256, (size, 3, *model.config.img_size), dtype=torch.uint8, device="cuda"
        )
        draws = torch.rand(size, 5, device="cuda")
        with torch.no_grad():
            assert torch.equal(compute(images, draws), compute.extract(images, draws))
        replayed.append(compute.graph_size)
    assert replayed == [0, 4, 4, 4, 4, 4, 4, 3, 3]  # a last batch of an epoch does not take it away


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_features_kept_on_the_device_are_those_of_host_memory(tiny):
    cuda = torch.device("cuda", 0)
    model = working_copy(tiny, cuda, torch.bfloat16, train=False)
    pixels = torch.randint(256, (50, 3, *model.config.img_size), dtype=torch.uint8)
    order = torch.randperm(50)
    extractor = FeatureExtractor(model, 10, batch=8)
    kept = [
        list(extractor.evaluation(pixels, order, keep_on=keep_on)())
        for keep_on in (CPU, cuda, None)
    ]
    for in_host, on_device, anew in zip(*kept):
        assert on_device.device == cuda
        assert torch.equal(in_host, on_device) and torch.equal(on_device, anew)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_features_copied_beside_the_next_batch_are_those_of_their_photos(tiny):
    cuda = torch.device("cuda")
    model = working_copy(tiny, cuda, torch.bfloat16, train=False)
    pixels = torch.randint(256, (200, 3, *model.config.img_size), dtype=torch.uint8)
    draws = torch.rand(200, 5)
    order = torch.randperm(200)
    for given in (None, draws):
        compute = FeatureExtractor(model, 10, batch=8)
        features = compute.compute(pixels, order, given)
        assert features is not None
        for rows in order.split(8):
            augmentation = None if given is None else given[: len(rows)].to(cuda)
            expected = compute.extract(pixels[rows].to(cuda), augmentation)
            assert torch.equal(features[: len(rows)], expected.cpu())
            features = features[len(rows) :]
            given = None if given is None else given[len(rows) :]


def test_what_is_held_counts_photos_and_tokens_each_within_its_limit(tiny):
    train, rest = Split([None] * 2**20, [0] * 2**20), Split([None] * 2**19, [0] * 2**19)
    data = Data(("a", "b"), train, rest, rest, None)
    # In GiB: the pixels of 2 million photos, and the features of 1.5 million.
    photos = 2 * 3 * 32 * 32 / 2**10
    tokens = 1.5 * 17 * 24 * 4 / 2**10
    for cache_gib, store_gib, expected in (
        (4, 8, photos + tokens),
        (2, 8, photos),
        (4, 5, tokens),
        (2, 5, 0),
    ):
        assert host_memory_gib(
            tiny, data, 10, cache_gib=cache_gib, store_gib=store_gib
        ) == pytest.approx(expected)
