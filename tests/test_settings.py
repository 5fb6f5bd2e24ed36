"""Settings that are chosen for the photos and the device, and what `--resume` makes of them."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import make_trainable, run_train, start_run, train_epochs

from minivit import commands
from minivit import train as train_job
from minivit.settings import (
    AUTO,
    MAX_BATCH,
    MIN_BATCH,
    MIN_EPOCHS,
    MIN_STEPS,
    TrainSettings,
    batch_size_for,
    epochs_for,
)
from minivit.training import run_folder as runs
from minivit.training.views import views_for

CPU = torch.device("cpu")


def total_steps(num_photos: int) -> int:
    steps = math.ceil(num_photos / batch_size_for(num_photos))
    return steps * epochs_for(steps)


def test_few_photos_get_small_batches_and_no_fewer_steps_than_the_least():
    assert batch_size_for(1) == MIN_BATCH
    # The fewest photos with which the least epochs of the largest batch are enough, and one less.
    enough = (math.ceil(MIN_STEPS / MIN_EPOCHS) - 1) * MAX_BATCH + 1
    assert batch_size_for(enough) == MAX_BATCH
    assert batch_size_for(enough - 1) == MAX_BATCH // 2
    assert epochs_for(1) == MIN_STEPS
    assert epochs_for(math.ceil(MIN_STEPS / MIN_EPOCHS)) == MIN_EPOCHS
    assert epochs_for(10**6) == MIN_EPOCHS
    for num_photos in (1, MIN_BATCH, MIN_BATCH + 1, 90, 185, enough - 1, enough, 100_000):
        assert total_steps(num_photos) >= MIN_STEPS
        assert MIN_BATCH <= batch_size_for(num_photos) <= MAX_BATCH


def test_only_settings_that_are_auto_are_chosen_and_named():
    settings = TrainSettings(epochs=7).choose(epochs=5, batch_size=16).choose(cache_views=0)
    assert (settings.epochs, settings.batch_size, settings.cache_views) == (7, 16, 0)
    assert settings.chosen == ("batch_size", "cache_views")


def test_views_are_kept_where_frozen_blocks_are_slow():
    assert views_for(MIN_EPOCHS, CPU, 10) > 0
    assert views_for(MIN_EPOCHS, torch.device("cuda"), 10) == 0
    assert views_for(MIN_EPOCHS, torch.device("mps"), 10) == 0
    assert views_for(MIN_EPOCHS, CPU, 0) == 0  # All blocks train.


@pytest.mark.parametrize("name", ["epochs", "batch_size", "cache_views"])
def test_nothing_trains_with_settings_that_nobody_chose(pixels, name):
    with pytest.raises(ValueError, match="choose_settings"):
        train_epochs(start_run(make_trainable()), pixels, **{name: AUTO})


def test_a_mean_over_the_last_half_of_an_unknown_number_is_refused(
    tiny_saved, shapes_data, tmp_path, capsys
):
    flags = ("--keep", "average", "--patience", "2")
    assert run_train(tiny_saved, shapes_data, tmp_path / "run", *flags) == 2
    assert "--keep average takes the mean over the second half" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def train(model, data, out, *flags) -> int:
    """Run train.py on the CPU with the defaults of all settings that may be chosen."""
    places = ["--model", model, "--data", data, "--out", out, "--device", "cpu", "--amp", "off"]
    return commands.train([*map(str, places), *flags])


@pytest.mark.usefixtures("no_figures")
def test_a_run_with_chosen_settings_resumes_with_and_without_their_flags(
    tiny_saved, shapes_data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("minivit.settings.MIN_STEPS", 6)  # It is faster with fewer.
    out = tmp_path / "run"
    batch = batch_size_for(33)
    epochs = epochs_for(math.ceil(33 / batch))
    chosen = ("--epochs", str(epochs), "--batch-size", str(batch))

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_job, "finish", interrupted)
        assert train(tiny_saved, shapes_data, out) == 130
    views = runs.views_of_state(out)
    assert train(tiny_saved, shapes_data, out, "--resume", "--epochs", str(epochs + 1)) == 2
    assert f"--epochs was {epochs}, now {epochs + 1}" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        # As on another device, where others would be chosen.
        patch.setattr(train_job, "views_for", lambda *_: views + 2)
        assert train(tiny_saved, shapes_data, out, "--resume", *chosen) == 0
    settings = json.loads((out / "summary.json").read_text())["settings"]
    assert (settings["epochs"], settings["batch_size"]) == (epochs, batch)
    assert (settings["cache_views"], settings["chosen"]) == (views, ["cache_views"])

    # Now the run is finished.
    assert train(tiny_saved, shapes_data, out, "--resume", *chosen) == 0
    assert train(tiny_saved, shapes_data, out, "--resume") == 2
    message = f"--epochs was {epochs}, now auto; --batch-size was {batch}, now auto"
    assert message in capsys.readouterr().err
    settings |= {"chosen": ["epochs", "batch_size", "cache_views"]}
    summary = json.loads((out / "summary.json").read_text()) | {"settings": settings}
    (out / "summary.json").write_text(json.dumps(summary))
    for flags in ((), chosen, ("--cache-views", str(views))):
        assert train(tiny_saved, shapes_data, out, "--resume", *flags) == 0
    assert train(tiny_saved, shapes_data, out, "--resume", "--epochs", str(epochs + 1)) == 2
    assert f"--epochs was {epochs}, now {epochs + 1}" in capsys.readouterr().err
