"""How long a run takes, as it says at its start on a CPU."""

from pathlib import Path

import pytest
import torch

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
    assert rehearsal.count_images(data, anew) == (5 * 90 + 100 + 20, 5 * (3 * 90 + 100) + 20)
    kept = TrainSettings(epochs=5, batch_size=16, cache_views=2)
    assert rehearsal.count_images(data, kept) == (2 * 90 + 100 + 20, 5 * (3 * 90 + 100) + 20)


def test_a_long_run_says_how_long_it_takes_and_a_short_one_nothing(monkeypatch):
    model = ViT(ViTConfig(img_size=(32, 32), patch_size=16, depth=2, embed_dim=24, num_heads=2))
    settings = TrainSettings(epochs=5, batch_size=16, cache_views=0)
    assert rehearsal.describe_time(model, data_of(90, 10, 20), settings, 1, None) is None
    monkeypatch.setattr(rehearsal, "LONG_RUN_FLOPS", 0)
    seconds = iter([0.0, 1.0, 1.5, 10.0, 18.0, 20.0])  # The second batch counts: 8 s and 2 s.
    monkeypatch.setattr(rehearsal.time, "perf_counter", lambda: next(seconds))
    text = rehearsal.describe_time(model, data_of(90, 10, 20), settings, 1, None)
    # (570 images at 1 s + 1,870 at 0.25 s) = 1,037 s; the head alone, 120 images at 1.25 s.
    assert text == "about 17 minutes on cpu; --blocks none, the head alone, takes about 2 minutes"
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("seconds", "text"), [(20, "20 seconds"), (600, "10 minutes"), (9000, "2.5 hours")]
)
def test_times_have_a_unit_that_people_use(seconds, text):
    assert rehearsal.minutes(seconds) == text
