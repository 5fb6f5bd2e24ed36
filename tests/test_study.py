"""The command `study`: its grid, its runs compared with train.py's, resuming, and its output."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import signal

import pytest
import torch
from conftest import run_train

from minivit import __main__, load_pretrained
from minivit.data.datasets import load_data
from minivit.data.store import Pixels
from minivit.model import freeze_except, working_copy
from minivit.settings import TrainSettings
from minivit.tools.study import grid, summary
from minivit.tools.study.features import StudyFeatures
from minivit.training import step as step_module
from minivit.training.features import FeatureExtractor


def run(model, data, out, *flags):
    fixed = ["--device", "cpu", "--amp", "off", "--lr", "0.003"]
    places = ["--model", model, "--data", data, "--out", out]
    return __main__.main(["study", *map(str, [*places, *fixed, *flags])])


def rows_of(out):
    with (out / "study.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


SHOTS = ("--shots", "3", "all")
BLOCKS = ("--blocks", "none", "10-11", "all")
GRID = (*SHOTS, *BLOCKS, "--seeds", "2", "--epochs", "3", "--views", "2")


@pytest.fixture(scope="module")
def whole(tiny_saved, shapes_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    assert run(tiny_saved, shapes_data, out, *GRID) == 0
    return out


def test_every_cell_of_the_grid_is_run_and_told(whole):
    rows = rows_of(whole)
    assert {(r["shots"], r["blocks"], r["seed"]) for r in rows} == {
        (shots, blocks, seed)
        for shots in ("3", "all")
        for blocks in ("none", "10-11", "all")
        for seed in "01"
    }
    assert {r["photos"] for r in rows if r["shots"] == "3"} == {"9"}
    assert {r["photos"] for r in rows if r["shots"] == "all"} == {"33"}
    assert (whole / "study.png").stat().st_size > 10_000


def test_a_cell_is_train_pys_run_with_the_same_settings(whole, tiny_saved, shapes_data, tmp_path):
    """The photos, their order and the learning rate are the same.

    Only the views are drawn differently, which makes no difference for three colours.
    """
    for blocks in ("none", "10-11", "all"):
        out = tmp_path / blocks
        flags = ("--epochs", "3", "--batch-size", "16", "--cache-views", "2", "--seed", "1")
        assert run_train(tiny_saved, shapes_data, out, "--blocks", blocks, *flags) == 0
        (cell,) = (
            row
            for row in rows_of(whole)
            if (row["shots"], row["blocks"], row["seed"]) == ("all", blocks, "1")
        )
        result = json.loads((out / "summary.json").read_text())
        epochs = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        best = epochs[result["best_epoch"] - 1]
        assert float(cell["test_accuracy"]) == pytest.approx(result["test_accuracy"], abs=2 / 12)
        assert float(cell["train_accuracy"]) == pytest.approx(best["train_accuracy"], abs=3 / 33)


def test_features_at_each_cut_are_those_of_the_model(tiny_saved, shapes_data):
    model = working_copy(load_pretrained(tiny_saved), torch.device("cpu"), None, train=False)
    pixels = torch.randint(256, (9, 3, 32, 32), dtype=torch.uint8)
    paths = load_data(shapes_data, seed=0).paths()[:9]
    photos = Pixels(paths, model.preprocess, 1, pixels, torch.arange(9))
    features = StudyFeatures(model, photos, paths[2:6], 2, batch=4)
    for cut in (0, 3, 12):
        features.advance(cut)
        expected = FeatureExtractor(model, cut, batch=9)(pixels)
        torch.testing.assert_close(features.tables[0], expected, rtol=1e-4, atol=1e-5)
        (batch,) = features.batches([paths[5], paths[3]])
        torch.testing.assert_close(batch, expected[[5, 3]], rtol=1e-4, atol=1e-5)
        assert features.view(1, paths[4:6]).shape == (2, 1 if cut == 12 else 17, 24)
    first, second = (features.view(i, paths[4:6]) for i in range(2))
    assert not torch.equal(first, second)


def test_fewer_shots_are_among_more_and_every_class_has_as_many(shapes_data):
    splits = [load_data(shapes_data, seed=seed) for seed in range(2)]
    settings = TrainSettings(batch_size=16)
    planned = grid.plan(splits, {"none": 12}, ["2", "5", "all"], None, settings)
    cells = {(cell.settings.seed, cell.shots): cell for cell in planned}
    for seed in range(2):
        two, five, everything = (set(cells[seed, count].train.paths) for count in ("2", "5", "all"))
        assert two < five < everything
        assert sorted(cells[seed, "2"].train.labels) == [0, 0, 1, 1, 2, 2]
    assert cells[0, "2"].train.paths != cells[1, "2"].train.paths
    assert cells[0, "2"].settings.epochs == 60  # of one step
    assert cells[0, "all"].settings.epochs == 20  # of three steps


def test_shots_that_the_photos_do_not_allow_are_left_out_and_said(shapes_data, capsys):
    splits = [load_data(shapes_data, seed=0)]
    cells = grid.plan(splits, {"none": 12}, ["5", "11", "50", "all"], None, TrainSettings())
    assert [cell.shots for cell in cells] == ["5", "all"]
    message = "left out: 11, 50 photos per class; the smallest class has 11 to train on"
    assert message in capsys.readouterr().err


def test_an_interrupted_study_resumes_and_a_finished_one_runs_nothing(
    whole, tiny_saved, shapes_data, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "study"
    train_step = step_module.train_step
    steps = []

    def interrupted_step(*args, **kwargs):
        steps.append(0)
        if len(steps) == 20:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(step_module, "train_step", interrupted_step)
        assert run(tiny_saved, shapes_data, out, *GRID) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert 0 < len(rows_of(out)) < 12
    assert run(tiny_saved, shapes_data, out, *GRID) == 0
    assert rows_of(out) == rows_of(whole)
    monkeypatch.setattr(grid, "run_cell", None)
    assert run(tiny_saved, shapes_data, out, *GRID) == 0


def test_a_study_of_other_settings_is_refused_by_name(whole, tiny_saved, shapes_data, capsys):
    assert run(tiny_saved, shapes_data, whole, *GRID, "--views", "3") == 2
    assert "holds another study: views was 2, now 3; give another --out" in capsys.readouterr().err


def test_a_dry_run_says_how_long_and_writes_nothing(tiny_saved, shapes_data, tmp_path, capsys):
    assert run(tiny_saved, shapes_data, tmp_path / "out", *GRID, "--dry-run") == 0
    assert re.fullmatch(r"12 runs, about \d+ minutes on cpu\n", capsys.readouterr().out)
    assert not (tmp_path / "out").exists()


def test_more_tokens_than_allowed_are_refused(tiny_saved, shapes_data, tmp_path, capsys):
    assert run(tiny_saved, shapes_data, tmp_path / "out", *GRID, "--cache-gib", "1e-6") == 2
    assert (
        "more than --cache-gib 1e-06; allow more, or keep fewer than 2 --views"
        in capsys.readouterr().err
    )


def test_an_estimate_counts_steps_evaluations_and_the_test(tiny_saved, shapes_data, monkeypatch):
    model = load_pretrained(tiny_saved)
    data = load_data(shapes_data, seed=0)
    cell = grid.Cell("all", 11, data.train, TrainSettings(blocks="11", epochs=10))
    # Each call comes a second later, so that a forward pass of 32 photos takes a second.
    monkeypatch.setattr(grid.time, "perf_counter", itertools.count().__next__)
    n, val, test = (len(split) for split in (data.train, data.val, data.test))
    features = (n + val + test + 4 * n) * (model.flops() - model.flops(11))
    # A backward pass takes as long as two forward passes.
    work = model.flops(11) * (10 * 3 * n + 5 * val + n + test)
    seconds = grid.estimate_seconds(model, [cell], [data], num_views=4)
    assert seconds == pytest.approx((features + work) / (32 * model.flops()))


def test_the_model_is_left_as_it_was_and_the_best_epoch_is_one_of_five(
    tiny_saved, shapes_data, monkeypatch
):
    model = load_pretrained(tiny_saved, labels=["a", "b", "c"])
    before = {name: p.clone() for name, p in model.named_parameters()}
    data = load_data(shapes_data, seed=0)
    low_model = working_copy(model, torch.device("cpu"), None, train=False)
    photos = Pixels(data.paths(), model.preprocess, 1)
    features = StudyFeatures(low_model, photos, data.train.paths, 1, batch=64)
    settings = TrainSettings(blocks="11", epochs=10, batch_size=16, lr=0.01, cache_views=1)
    cell = grid.Cell("all", freeze_except(model, [11]), data.train, settings)
    train_epoch, accuracy = grid.train_epoch, grid.accuracy
    epochs = []
    evaluated = []

    def counted_epoch(state, *args):
        epochs.append(state.epoch)
        train_epoch(state, *args)

    def noted_accuracy(model, split, features):
        evaluated.append((epochs[-1], split))
        return accuracy(model, split, features)

    monkeypatch.setattr(grid, "train_epoch", counted_epoch)
    monkeypatch.setattr(grid, "accuracy", noted_accuracy)
    features.advance(11)
    assert grid.run_cell(cell, model, data, features, None)["photos"] == 33
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert epochs == list(range(1, 11))
    assert [epoch for epoch, split in evaluated if split is data.val] == [2, 4, 6, 8, 10]
    assert [split for _, split in evaluated[5:]] == [data.train, data.test]


def rows(cells):
    names = ("blocks", "shots", "seed", "photos", "test_accuracy")
    fixed = {"train_accuracy": "1.0", "val_accuracy": "0.9"}
    return [fixed | dict(zip(names, map(str, cell))) for cell in cells]


def test_the_advice_follows_from_the_table():
    table = summary.summarize(
        rows(
            [
                ("10-11", "5", 0, 10, 0.70),
                ("10-11", "5", 1, 10, 0.72),
                ("10-11", "all", 0, 60, 0.90),
                ("10-11", "all", 1, 60, 0.92),
                ("none", "5", 0, 10, 0.60),
                ("none", "5", 1, 10, 0.62),
                ("none", "all", 0, 60, 0.70),
                ("none", "all", 1, 60, 0.71),
            ]
        )
    )
    assert table["blocks 10-11"]["all"].test.mean == pytest.approx(0.91)
    assert summary.advice(table) == (
        "with all photos per class train blocks 10-11: test accuracy 0.910; +20.0 points since "
        "5 photos, so more photos would still help; training is 10.0 points above validation there"
    )
    last_line = list(summary.format_table(table))[-1]
    assert re.fullmatch(
        r"the head alone +0\.610 \(0\.600-0\.620\) +0\.705 \(0\.700-0\.710\)", last_line
    )


def test_the_advice_names_equals_and_photos_that_do_not_help():
    runs = [("11", "5", 0, 10, 0.9), ("11", "all", 0, 60, 0.9), ("none", "all", 0, 60, 0.9)]
    sentence = summary.advice(summary.summarize(rows(runs)))
    equals = "the head alone as good within the seeds' spread"
    assert f"train block 11: test accuracy 0.900 ({equals})" in sentence
    assert "so more photos would help little" in sentence
