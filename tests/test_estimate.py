"""How long a run takes, as it says at its start on a CPU."""

import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from minivit import ViT, ViTConfig
from minivit.data.datasets import Data, Split
from minivit.settings import TrainSettings
from minivit.training import rehearsal


def data_of(train: int, val: int, test: int) -> Data:
    splits = [Split([Path(f"{i}.jpg") for i in range(n)], [0] * n) for n in (train, val, test)]
    return Data(("cat", "dog"), *splits, Path())


def test_every_pass_through_the_blocks_is_counted():
    data = data_of(90, 10, 20)
    anew = TrainSettings(epochs=5, batch_size=16, cache_views=0)
    # Each epoch trains on 90 photos and evaluates 100; evaluation's features are computed once.
    # The head alone is evaluated, too, and 10 and 20 photos are predicted at the end.
    others = 5 * 3 * 90 + 6 * 100 + 10 + 20
    assert rehearsal.count_images(data, anew) == (5 * 90 + 100 + 10 + 20, others)
    kept = TrainSettings(epochs=5, batch_size=16, cache_views=2)
    assert rehearsal.count_images(data, kept) == (2 * 90 + 100 + 10 + 20, others)


def test_the_products_of_a_photo_are_those_that_the_docs_give():
    """They are those of five epochs of blocks 10-11 of ViT-B/16, with a test photo for each."""
    with torch.device("meta"):
        model = ViT(ViTConfig())
    settings = TrainSettings(epochs=5, batch_size=16, cache_views=2)
    num_frozen, num_others = rehearsal.count_images(data_of(100, 10, 100), settings)
    frozen_flops = model.flops() - model.flops(10)
    ours = (num_frozen * frozen_flops + num_others * model.flops(10)) / 100

    D, N = model.config.embed_dim, model.config.num_tokens
    whole_block = 24 * N * D**2 + 4 * N**2 * D  # The Trainer computes all tokens of each block.
    forward = 12 * whole_block + 2 * (N - 1) * D**2
    step = forward + 2 * (2 * whole_block)  # The backward pass through two blocks costs twice that.
    tested_once = 5 * step + forward
    tested_each_epoch = 5 * step + 6 * forward  # and once at the end

    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    (paragraph,) = re.findall(r"For each photo to train on.*?\n\n", text, re.DOTALL)
    given = [float(number) for number in re.findall(r"\d\.\d+", paragraph)]
    ratio = tested_each_epoch / ours
    assert given == [
        round(ours / 1e12, 2),
        round(tested_each_epoch / 1e12, 2),
        round(ratio, 1),
        round(tested_once / 1e12, 2),
    ]


def test_a_long_run_says_how_long_it_takes_and_a_short_one_nothing(monkeypatch):
    model = ViT(ViTConfig(img_size=(32, 32), patch_size=16, depth=2, embed_dim=24, num_heads=2))
    settings = TrainSettings(epochs=5, batch_size=16, cache_views=0)
    assert rehearsal.describe_time(model, data_of(90, 10, 20), settings, 1, None) is None
    monkeypatch.setattr(rehearsal, "LONG_RUN_FLOPS", 0)
    seconds = iter([0.0, 1.0, 1.5, 10.0, 18.0, 20.0])  # The second batch counts: 8 s and 2 s.
    monkeypatch.setattr(rehearsal.time, "perf_counter", lambda: next(seconds))
    text = rehearsal.describe_time(model, data_of(90, 10, 20), settings, 1, None)
    # (580 images at 1 s + 1,980 at 0.25 s) = 1,075 s; the head alone, 120 images at 1.25 s.
    assert text == "about 18 minutes on cpu; --blocks none, the head alone, takes about 2 minutes"
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("seconds", "text"), [(20, "20 seconds"), (600, "10 minutes"), (9000, "2.5 hours")]
)
def test_times_have_a_unit_that_people_use(seconds, text):
    assert rehearsal.minutes(seconds) == text
