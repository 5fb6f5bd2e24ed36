"""The frozen part: its precision, its tokens kept or computed anew, and training from the tokens of a few views."""

from __future__ import annotations

import pytest
import torch
from conftest import TINY, randomize
from test_loop import TIMES, fresh, pixels, tail_of  # noqa: F401 - a fixture among them
from torch.testing import assert_close

from minivit import ViT
from minivit import model as model_module
from minivit.data.datasets import Data, Split
from minivit.errors import UserError
from minivit.model import freeze_except, trainable
from minivit.system import device
from minivit.system import distributed as parallel
from minivit.training import features as frozen
from minivit.training import step as loop
from minivit.training.state import begin, read, set_tail

CPU = torch.device("cpu")


def without_times(rows):
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def run_of(model, amp=None):
    return begin(model_module.working_copy(model, CPU, amp, train=True), amp=amp, weight_decay=0.05)


def fit(run, data, **changes):
    how = {
        "amp": None,
        "epochs": 4,
        "batch_size": 4,
        "micro_batch": 4,
        "lr": 1e-3,
        "seed": 0,
        "cut": 10,
    } | changes
    return list(loop.fit(run, data, data, **how))


def test_a_working_copy_trains_in_float32_and_holds_the_rest_in_the_compute_precision():
    model = fresh()
    copy = model_module.working_copy(model, CPU, torch.bfloat16, train=True)
    assert trainable(copy).keys() == trainable(model).keys()
    for name, parameter in copy.named_parameters():
        trains = name in trainable(model)
        assert parameter.dtype is (torch.float32 if trains else torch.bfloat16), name
        assert parameter.requires_grad == trains
    evaluated = model_module.working_copy(copy, CPU, torch.bfloat16, train=False)
    assert {p.dtype for p in evaluated.parameters()} == {torch.bfloat16}
    assert (
        evaluated.blocks[0].mlp.fc1.weight.data_ptr() == copy.blocks[0].mlp.fc1.weight.data_ptr()
    )  # once
    assert {p.dtype for p in model.parameters()} == {
        torch.float32
    }  # what is exported keeps every bit


def test_a_working_copy_in_float32_is_the_model_itself_in_memory_and_in_numbers():
    model = fresh()
    copy = model_module.working_copy(model, CPU, None, train=True)
    assert all(p.data_ptr() == q.data_ptr() for p, q in zip(copy.parameters(), model.parameters()))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(copy(images), model(images))


def test_positions_are_resampled_once():
    model = randomize(ViT(TINY.__class__(**vars(TINY) | {"pos_grid": (5, 7)}))).requires_grad_(
        False
    )  # which matmul looks at
    copy, images = model_module.working_copy(model, CPU, None, train=False), torch.randn(2, 3, 32, 32)
    assert copy.pos_grid == copy.config.grid
    assert torch.equal(copy(images), model(images))


def test_evaluation_in_low_precision_gives_infers_logits_bit_for_bit(pixels):  # noqa: F811
    """infer.py takes the whole model in that precision; training takes tokens from its frozen part, kept in memory."""
    model = fresh()
    run = run_of(model, torch.bfloat16)
    fit(run, pixels, amp=torch.bfloat16, epochs=1)
    copy = model_module.working_copy(run.model, CPU, torch.bfloat16, train=False)
    tokens = frozen.Frozen(run.model, 10, batch=4).evaluation(pixels[0], torch.arange(9), keep=True)
    found = loop.predict(copy, tokens(), cut=10)
    set_tail(model, run.tail())
    assert torch.equal(found, loop.predict_photos(model.to(torch.bfloat16), pixels[0], batch=4))


def test_tokens_are_kept_in_order_or_computed_anew_each_time(pixels, monkeypatch):  # noqa: F811
    model, calls, real = fresh(), [], frozen.Frozen.__call__
    monkeypatch.setattr(frozen.Frozen, "__call__", lambda *args: calls.append(0) or real(*args))
    own = torch.tensor([1, 3, 5, 7, 8])
    expected = model.tokens(model.preprocess.normalize(pixels[0][own]), stop=10).detach()
    for keep, computed in ((True, 3), (False, 6)):
        calls.clear()
        tokens = frozen.Frozen(model, 10, batch=2).evaluation(pixels[0], own, keep=keep)
        for _ in range(2):
            assert_close(torch.cat(list(tokens())), expected)
        assert len(calls) == computed


@pytest.mark.parametrize("views", [4, 3], ids=["as many as epochs", "fewer"])
def test_kept_views_change_no_epoch_in_which_they_are_new(pixels, views):  # noqa: F811
    plain, kept = fit(run_of(fresh()), pixels), fit(run_of(fresh()), pixels, cache_views=views)
    for a, b in zip(plain[:views], kept):
        assert without_times([b])[0] == pytest.approx(
            without_times([a])[0], rel=1e-5
        )  # batches of other sizes round otherwise
    assert (kept[3]["loss"] == pytest.approx(plain[3]["loss"], rel=1e-5)) == (views == 4)


def test_epochs_after_the_views_take_their_tokens_and_run_no_frozen_block(pixels, monkeypatch):  # noqa: F811
    augmented, real = [], frozen.Frozen.__call__

    def counted(self, images, draws=None):
        augmented.extend([] if draws is None else draws.tolist())
        return real(self, images, draws)

    monkeypatch.setattr(frozen.Frozen, "__call__", counted)
    rows = fit(run_of(fresh()), pixels, cache_views=2, epochs=6)
    assert len(augmented) == 2 * 9
    assert len({tuple(draws) for draws in augmented}) == 18  # another view each
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("stop", [0, 1, 4, 8, 9])
def test_a_run_from_views_that_stopped_goes_on_to_the_same_bits(
    pixels, tmp_path, monkeypatch, stop
):  # noqa: F811
    how = {"cache_views": 2, "epochs": 4}
    whole = run_of(fresh())
    rows = fit(whole, pixels, **how)
    first, real, steps = run_of(fresh()), loop.train_step, []
    with monkeypatch.context() as patch:
        patch.setattr(
            loop, "train_step", lambda *args, **named: steps.append(0) or real(*args, **named)
        )
        patch.setattr(
            parallel,
            "total",
            lambda values: values if len(values.shape) else torch.tensor(float(len(steps) >= stop)),
        )
        fit(first, pixels, **how)
    assert first.stopped
    first.save(tmp_path / "state", {})
    second = run_of(fresh())
    second.load(*read(tmp_path / "state", {}))
    fit(second, pixels, **how)
    assert without_times(second.rows) == without_times(rows)
    assert torch.equal(tail_of(second.model), tail_of(whole.model))


def test_a_view_that_is_stopped_ends_with_the_batch_under_way(pixels):  # noqa: F811
    compute, asked = frozen.Frozen(fresh(), 10, batch=2), []
    assert (
        compute.view(
            0, pixels[0], torch.full((9, 5), 0.5), lambda: asked.append(0) or len(asked) == 2
        )
        is None
    )
    assert len(asked) == 2  # of 5 batches


def test_views_that_need_more_memory_than_allowed_are_refused(pixels):  # noqa: F811
    with pytest.raises(
        UserError,
        match=r"the tokens of 3 views take .* GiB; raise --cache-gib 1e-05, or keep fewer",
    ):
        fit(run_of(fresh()), pixels, cache_views=3, cache_gib=1e-5)


def test_compiled_training_is_the_same_but_for_rounding(pixels, monkeypatch):  # noqa: F811
    real, compiled = torch.compile, []
    monkeypatch.setattr(
        torch, "compile", lambda f, **how: compiled.append(f) or real(f, backend="aot_eager")
    )
    monkeypatch.setattr(
        frozen.Tail,
        "compile",
        lambda self: setattr(self, "forward", torch.compile(self.forward)),
        raising=False,
    )
    rows = fit(run_of(fresh()), pixels, compile=True, epochs=2)
    plain = fit(run_of(fresh()), pixels, epochs=2)
    assert len(compiled) == 2
    for a, b in zip(rows, plain):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-5)


def test_nothing_is_compiled_that_was_not_asked_for(pixels, monkeypatch):  # noqa: F811
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_: asked.append(0))
    monkeypatch.setattr(torch, "compile", lambda function: asked.append(0) or function)
    fit(run_of(fresh()), pixels, epochs=1)
    assert not asked
    fit(run_of(fresh()), pixels, epochs=1, compile=True)
    assert len(asked) == 2  # what is frozen, and what trains


def test_blocks_that_stay_frozen_among_those_that_train_take_part_in_low_precision(pixels):  # noqa: F811
    model = fresh()
    cut = freeze_except(model, [8, 11])
    before = {name: p.clone() for name, p in model.named_parameters()}
    run = run_of(model, torch.bfloat16)
    fit(run, pixels, amp=torch.bfloat16, cut=cut, epochs=1)
    now = run.tail()
    assert now.keys() == trainable(model).keys()
    assert all(not torch.equal(now[name], before[name]) for name in now)


def test_what_is_read_ahead_comes_in_order_and_errors_come_through():
    found = list(frozen.on_device(lambda i: (torch.tensor(i), torch.tensor(-i)), range(20), CPU))
    assert found == [(i, -i) for i in range(20)]

    def broken(i):
        if i == 3:
            raise UserError("photo 3 has vanished")
        return (torch.tensor(i),)

    with pytest.raises(UserError, match="photo 3"):
        list(frozen.on_device(broken, range(20), CPU))


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


def test_each_epoch_is_evaluated_with_that_epochs_weights_in_low_precision_too(pixels):  # noqa: F811
    run = run_of(fresh(), torch.bfloat16)
    for row in loop.fit(
        run,
        pixels,
        pixels,
        cut=10,
        amp=torch.bfloat16,
        epochs=2,
        batch_size=4,
        micro_batch=4,
        lr=1e-2,
        seed=0,
    ):
        copy = model_module.working_copy(run.model, CPU, torch.bfloat16, train=False)
        logits = loop.predict_photos(copy, pixels[0], batch=device.cpu_batch(torch.bfloat16))
        assert row["val_loss"] == loop.score(logits, pixels[1])["loss"]


def test_views_come_first_in_the_memory_allowed_and_other_tokens_are_kept_if_there_is_room(
    pixels, monkeypatch
):  # noqa: F811
    kept, real = [], frozen.Frozen.evaluation
    monkeypatch.setattr(
        frozen.Frozen, "evaluation", lambda *args, keep: kept.append(keep) or real(*args, keep=keep)
    )
    gib = frozen.token_gib(fresh(), 9)
    for room, expected in ((3.9, False), (4.1, True)):  # 2 views, and the photos of both splits
        kept.clear()
        fit(run_of(fresh()), pixels, cache_views=2, cache_gib=room * gib, epochs=1)
        assert kept == [expected] * 2


def test_rows_are_taken_as_by_an_index_from_photos_and_from_tokens(pixels):  # noqa: F811
    index = torch.tensor([3, 0, 2])
    for source in (pixels[0], torch.randn(5, 3, 2)):
        assert torch.equal(frozen.take(source, index, CPU), source[index])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replayed_kernels_give_the_very_tokens(tiny):
    model = model_module.working_copy(tiny, torch.device("cuda"), torch.bfloat16, train=False)
    compute = frozen.Frozen(model, 1, batch=8)
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
            assert torch.equal(compute(images, draws), compute.tokens(images, draws))
        replayed.append(compute.replay.size if compute.replay else 0)
    assert replayed == [0, 4, 4, 4, 4, 4, 4, 3, 3]  # a last batch of an epoch does not take it away


def test_what_is_held_counts_photos_and_tokens_each_within_its_limit(tiny):
    train, rest = Split([None] * 2**20, [0] * 2**20), Split([None] * 2**19, [0] * 2**19)
    data = Data(("a", "b"), train, rest, rest, None)
    photos, tokens = (
        2 * 3 * 32 * 32 / 2**10,
        1.5 * 17 * 24 * 4 / 2**10,
    )  # GiB, of 2 and 1.5 million photos
    for cache_gib, store_gib, expected in (
        (4, 8, photos + tokens),
        (2, 8, photos),
        (4, 5, tokens),
        (2, 5, 0),
    ):
        assert frozen.held_gib(
            tiny, data, 10, cache_gib=cache_gib, store_gib=store_gib
        ) == pytest.approx(expected)
