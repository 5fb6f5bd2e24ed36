"""The command `study`: its grid, its runs compared with train.py's, resuming, and its output."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import re
import shutil
import signal

import pytest
import torch
from conftest import run_train
from PIL import Image

from minivit import Preprocess, __main__, cli, load_pretrained, save_pretrained
from minivit.data.datasets import load_data
from minivit.data.store import Pixels
from minivit.errors import UserError
from minivit.model import freeze_except, working_copy
from minivit.settings import MIN_STEPS, TrainSettings
from minivit.tools.study import command, grid, summary
from minivit.tools.study.features import StudyFeatures
from minivit.training import metrics, run_photos
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
    # The 24 photos that 3 of each class leave over validate, too.
    assert {(r["shots"], r["val_photos"]) for r in rows} == {("3", "27"), ("all", "3")}
    assert {r["test_photos"] for r in rows} == {"12"}
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
        best = epochs[result["best_epoch"]]
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
    assert cells[0, "2"].settings.epochs == MIN_STEPS  # of one step
    assert cells[0, "all"].settings.epochs == MIN_STEPS // 3  # of three steps


def test_shots_for_which_photos_lack_are_left_out_and_said(shapes_data, capsys):
    splits = [load_data(shapes_data, seed=0)]
    cells = grid.plan(splits, {"none": 12}, ["5", "11", "50", "all"], None, TrainSettings())
    assert [cell.shots for cell in cells] == ["5", "all"]
    message = "left out: 11, 50 photos per class; the smallest class has 11 to train on"
    assert message in capsys.readouterr().err


def test_an_interrupted_study_resumes_and_a_finished_one_rests(
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
    first, second = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"12 runs, about \d+ minutes on cpu", first)
    assert second == (
        "each validates on 3 photos and on the training photos that it leaves; "
        "12 photos are the test"
    )
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
    few = data.train.take(range(12))
    cells = [
        grid.Cell(shots, 11, train, TrainSettings(blocks="11", epochs=10))
        for shots, train in (("all", data.train), ("4", few))
    ]
    # Each call comes a second later, so that a forward pass of 32 photos takes a second.
    monkeypatch.setattr(grid.time, "perf_counter", itertools.count().__next__)
    n, val, test = (len(split) for split in (data.train, data.val, data.test))
    features = (n + val + test + 4 * n) * (model.flops() - model.flops(11))
    # A backward pass takes as long as two forward passes.
    # The head alone comes first, and the kept weights are evaluated last.
    work = model.flops(11) * (n + val + 10 * 3 * n + 5 * val + n + val + test)
    # These are judged by the training photos that fewer shots leave over, too.
    work += model.flops(11) * (12 + val + 10 * 3 * 12 + 5 * val + 12 + val + (n - 12) + test)
    seconds = grid.estimate_seconds(model, cells, [data], num_views=4)
    assert seconds == pytest.approx((features + work) / (32 * model.flops()))


def test_the_model_stays_as_it_was_and_five_epochs_are_evaluated(
    tiny_saved, shapes_data, monkeypatch
):
    model = load_pretrained(tiny_saved, labels=["a", "b", "c"])
    before = {name: p.clone() for name, p in model.named_parameters()}
    data = load_data(shapes_data, seed=0)
    low_model = working_copy(model, torch.device("cpu"), None, train=False)
    photos = Pixels(data.paths(), model.preprocess, 1)
    features = StudyFeatures(low_model, photos, data.train.paths, 1, batch=64)
    settings = TrainSettings(blocks="11", epochs=10, batch_size=16, lr=0.01, cache_views=1)
    few = data.train.take(range(0, 33, 3))
    cell = grid.Cell("few", freeze_except(model, [11]), few, settings)
    train_epoch, accuracy = grid.train_epoch, grid.accuracy
    fit_linear_head = grid.fit_linear_head
    epochs = [0]  # the head alone
    evaluated = []
    num_trained = []

    def counted_epoch(state, layers, photos, *args):
        epochs.append(state.epoch)
        num_trained.append(len(photos.labels))
        view = features.view(0, few.paths)
        assert torch.equal(photos.source, view)
        train_epoch(state, layers, photos, *args)

    def noted_fit(inputs, labels, num_classes):
        num_trained.append(len(labels))
        return fit_linear_head(inputs, labels, num_classes)

    def noted_accuracy(model, split, features):
        evaluated.append((epochs[-1], split))
        return accuracy(model, split, features)

    monkeypatch.setattr(grid, "train_epoch", counted_epoch)
    monkeypatch.setattr(grid, "fit_linear_head", noted_fit)
    monkeypatch.setattr(grid, "accuracy", noted_accuracy)
    features.advance(11)
    row = grid.run_cell(cell, model, data, features, None)
    assert (row["photos"], row["val_photos"], row["test_photos"]) == (11, 25, 12)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert epochs == list(range(11))
    # The validation photos alone choose which weights are kept, as in train.py.
    assert [epoch for epoch, split in evaluated if split is data.val] == [0, 2, 4, 6, 8, 10]
    assert num_trained == 11 * [11]
    (judged_by, trained, tested) = (split for _, split in evaluated[6:])
    assert (trained, tested) == (few, data.test)
    left_over = {*data.train.paths} - {*few.paths}
    assert len(judged_by) == 25 and {*judged_by.paths} == {*data.val.paths} | left_over
    label_of = dict(zip(data.train.paths + data.val.paths, data.train.labels + data.val.labels))
    assert judged_by.labels == [label_of[path] for path in judged_by.paths]


@pytest.mark.parametrize("by_row, kept", [([0.1, 0.9, 0.2], 1), ([0.9, 0.1, 0.2], 0)], ids=str)
def test_a_cell_tests_the_weights_that_train_py_would_keep(
    tiny_saved, shapes_data, monkeypatch, by_row, kept
):
    model = load_pretrained(tiny_saved, labels=["a", "b", "c"])
    data = load_data(shapes_data, seed=0)
    low_model = working_copy(model, torch.device("cpu"), None, train=False)
    photos = Pixels(data.paths(), model.preprocess, 1)
    features = StudyFeatures(low_model, photos, data.train.paths, 1, batch=64)
    features.advance(11)
    settings = TrainSettings(blocks="11", epochs=2, batch_size=16, lr=0.01, cache_views=1)
    cell = grid.Cell("all", freeze_except(model, [11]), data.train, settings)
    heads_at_start = []
    evaluated = []
    train_epoch = grid.train_epoch

    def noting_epoch(state, *args):
        heads_at_start.append(state.model.head.weight.detach().clone())
        train_epoch(state, *args)

    def scripted_accuracy(model, split, features):
        evaluated.append(model.head.weight.detach().clone())
        return by_row[min(len(evaluated), len(by_row)) - 1]

    monkeypatch.setattr(grid, "train_epoch", noting_epoch)
    monkeypatch.setattr(grid, "accuracy", scripted_accuracy)
    monkeypatch.setattr(metrics, "CLEARLY", 0.1)  # With 3 photos, nothing is clear otherwise.
    before = model.head.weight.detach().clone()
    grid.run_cell(cell, model, data, features, None)
    assert torch.equal(heads_at_start[0], before)  # and not the fitted one
    head_alone, first, second, *of_kept = evaluated
    assert not torch.equal(first, second) and not torch.equal(head_alone, first)
    assert all(torch.equal(head, evaluated[kept]) for head in of_kept)


def table_of(cells, num_val=180, val_photos=()):
    """Summarize runs: blocks, shots, seed, training, validation and test accuracy of each.

    Each run validates on 90 photos, or on as many as `val_photos` has for its shots.
    """
    names = ("blocks", "shots", "seed", "train_accuracy", "val_accuracy", "test_accuracy")
    fixed = {"photos": "60", "test_photos": "400"}
    rows = []
    for cell in cells:
        row = fixed | dict(zip(names, map(str, cell)))
        row["val_photos"] = str(dict(val_photos).get(row["shots"], 90))
        rows.append(row)
    return summary.summarize(rows, dict.fromkeys((row["shots"] for row in rows), num_val))


def advice_of(table):
    return " ".join(summary.advice(table))


def test_the_advice_is_chosen_by_validation_and_reports_the_test():
    table = table_of(
        [
            ("none", "5", 0, 0.9, 0.50, 0.60),
            ("none", "all", 0, 0.9, 0.60, 0.99),  # The test would choose this.
            ("10-11", "5", 0, 1.0, 0.70, 0.71),
            ("10-11", "5", 1, 1.0, 0.70, 0.71),
            ("10-11", "all", 0, 1.0, 0.92, 0.90),
            ("10-11", "all", 1, 1.0, 0.90, 0.92),
        ]
    )
    val_error = math.sqrt(165 / 182 * 17 / 182 / 180 + 0.0002 / 2)
    test_error = math.sqrt(365 / 402 * 37 / 402 / 400 + 0.0002 / 2)
    assert table["blocks 10-11"]["all"].val_error == pytest.approx(val_error, rel=1e-2)
    assert table["blocks 10-11"]["all"].test_error == pytest.approx(test_error, rel=1e-2)
    assert summary.advice(table) == (
        "With all photos per class, train blocks 10-11: "
        "test accuracy 0.910 ± 0.018 (one standard error)",
        "on 400 photos, with 2 seeds. Chosen with all photos per class, where 90 others validate "
        "each run: validation accuracy 0.910 ± 0.024. These are few; smaller numbers for --shots "
        "would leave more to validate on. More photos helped: +21.0 ± 4.2 points from 5 to all "
        "per class. Training is 9.0 points above validation.",
    )
    last_line = list(summary.format_table(table, "test"))[-1]
    assert re.fullmatch(
        r"blocks 10-11 +0\.710 \(0\.710-0\.710\) +0\.910 \(0\.900-0\.920\)", last_line
    )
    header, _, first_line, _ = summary.format_table(table, "validation")
    assert header == "validation accuracy (lowest to highest seed) by photos per class"
    assert "0.600 (0.600-0.600)" in first_line


def test_within_the_error_the_fewest_trained_blocks_are_advised():
    accuracies = {"all": 0.92, "8-11": 0.90, "10-11": 0.90, "11": 0.91, "none": 0.80}
    runs = [(blocks, "5", 0, 1.0, val, 0.5) for blocks, val in accuracies.items()]
    # With 90 photos, one standard error of 0.92 is 0.029.
    chosen, as_good = summary.choose_blocks(
        {blocks: row["5"] for blocks, row in table_of(runs).items()}
    )
    assert chosen == "block 11"
    assert as_good == ["blocks 10-11", "blocks 8-11", "all blocks"]
    equals = "blocks 10-11 (0.900), blocks 8-11 (0.900), all blocks (0.920)"
    assert f"; also within one error of the best: {equals}" in advice_of(table_of(runs))
    # Three more seeds make the error smaller.
    runs = [(*run[:2], seed, *run[3:]) for run in runs for seed in range(20)]
    table = table_of(runs, num_val=1800)
    chosen, as_good = summary.choose_blocks({blocks: row["5"] for blocks, row in table.items()})
    assert (chosen, as_good) == ("all blocks", [])


def test_an_accuracy_of_1_has_an_error_and_equals_train_least():
    runs = [("10-11", "5", 0, 1.0, 1.0, 1.0), ("none", "5", 0, 1.0, 1.0, 0.9)]
    sentence = advice_of(table_of(runs, num_val=9))
    assert "train the head alone: test accuracy 0.900" in sentence
    assert "validation accuracy 1.000 ± 0.096" in sentence


def test_the_error_counts_photos_that_several_seeds_share_once():
    runs = [("11", "5", seed, 1.0, 0.9, 0.9) for seed in range(3)]
    errors = [table_of(runs, num_val)["block 11"]["5"].val_error for num_val in (90, 270)]
    assert errors[0] == pytest.approx(errors[1] * 3**0.5, rel=0.03)


def test_photos_that_do_not_help_are_told():
    runs = [("11", "5", 0, 1.0, 0.90, 0.5), ("11", "all", 0, 1.0, 0.92, 0.9)]
    sentence = advice_of(table_of(runs))
    assert "More photos helped little: +2.0 ± 4.4 points from 5 to all per class." in sentence
    runs += [("11", "20", 0, 1.0, 0.80, 0.7), ("11", "10", 0, 1.0, 0.70, 0.7)]
    # The few photos that validate with all shots say nothing.
    of_20 = advice_of(table_of(runs, val_photos={"10": 300, "20": 200, "all": 9}))
    assert "More photos helped: +10.0 ± 4.6 points from 10 to 20 per class. Training is 20" in of_20
    only = advice_of(table_of(runs[:1]))
    assert "More photos" not in only


def test_blocks_are_chosen_where_enough_photos_validate_and_never_by_the_test():
    runs = []
    accuracies = {"none": (0.80, 0.85, 0.99), "10-11": (0.70, 0.95, 0.92), "all": (0.70, 0.94, 0.5)}
    for blocks, (with_5, with_50, test) in accuracies.items():
        runs.append((blocks, "5", 0, 1.0, with_5, test))
        runs.append((blocks, "50", 0, 1.0, with_50, test))
    # With 30 photos, one standard error of 0.90 is 0.06.
    runs += [("none", "all", 0, 1.0, 0.90, 0.70), ("10-11", "all", 0, 1.0, 0.85, 0.60)]
    runs += [("all", "all", 0, 1.0, 0.86, 0.99)]
    photos = {"5": 285, "50": 150, "all": 30}
    headline, reasons = summary.advice(table_of(runs, val_photos=photos))
    assert headline.startswith("With all photos per class, train blocks 10-11: test accuracy 0.600")
    assert "Chosen with 50 photos per class, where 150 others validate each run" in reasons
    assert "; also within one error of the best: all blocks (0.940)" in reasons
    assert "Training is 5.0 points above validation" in reasons and "few" not in reasons
    # Where a hundred photos validate runs with all photos, too, these decide.
    headline, reasons = summary.advice(table_of(runs, val_photos=photos | {"all": 100}))
    assert "train the head alone: test accuracy 0.700" in headline
    assert "Chosen with all photos per class, where 100 others" in reasons
    assert "few" not in reasons
    # So do they where nothing else was run.
    only_all = [run for run in runs if run[1] == "all"]
    headline, reasons = summary.advice(table_of(only_all, val_photos=photos))
    assert "train the head alone" in headline
    assert "where 30 others validate each run" in reasons
    assert "These are few; smaller numbers for --shots" in reasons


@pytest.mark.parametrize(
    "val_photos, chosen",
    [
        ({"5": 45, "10": 30, "all": 6}, "10"),
        ({"5": 110, "10": 55, "all": 54}, "10"),
        ({"5": 300, "10": 99, "all": 30}, "5"),
        ({"5": 300, "10": 100, "all": 30}, "10"),
        ({"5": 3000, "10": 2000, "all": 368}, "all"),
    ],
    ids=str,
)
def test_blocks_are_compared_with_the_most_shots_that_leave_enough(val_photos, chosen):
    runs = [("11", shots, 0, 1.0, 0.9, 0.9) for shots in val_photos]
    runs.append(("none", "20", 0, 1.0, 0.9, 0.9))  # without a run with all photos
    table = table_of(runs, val_photos=val_photos)
    assert summary.choose_shots(table, "all") == chosen
    # A number of shots that not all choices of blocks have compares nothing.
    runs += [("10-11", shots, 0, 1.0, 0.9, 0.9) for shots in ("5", "all")]
    table = table_of(runs, val_photos=val_photos)
    assert summary.choose_shots(table, "all") == (chosen if chosen == "all" else "5")


def test_photos_that_validate_several_seeds_count_once(shapes_data):
    splits = [load_data(shapes_data, seed=seed) for seed in range(2)]
    val = {path for data in splits for path in data.val.paths}
    assert grid.count_unseen(splits, "all") == len(val) > len(splits[0].val)
    cells = grid.plan(splits, {"none": 12}, ["10"], None, TrainSettings())
    assert len(cells) == 2
    trained_by_both = set(cells[0].train.paths) & set(cells[1].train.paths)
    photos = {*splits[0].train.paths, *splits[0].val.paths}
    assert grid.count_unseen(splits, "10") == len(photos - trained_by_both)


def test_the_error_of_a_study_counts_these_photos(whole, tiny_saved, shapes_data, monkeypatch):
    counts = []
    summarize = summary.summarize

    def noted(rows, num_val):
        counts.append(num_val)
        return summarize(rows, num_val)

    monkeypatch.setattr(command, "summarize", noted)
    assert run(tiny_saved, shapes_data, whole, *GRID) == 0
    splits = [load_data(shapes_data, seed=seed) for seed in range(2)]
    assert counts == [{shots: grid.count_unseen(splits, shots) for shots in ("3", "all")}]


@pytest.mark.parametrize(
    "text, spelling",
    [("11,10", "10-11"), ("0,2-3,2,5", "0,2-3,5"), ("0-11", "all"), ("none", "none"), ("7", "7")],
)
def test_blocks_have_one_spelling_however_they_are_named(text, spelling):
    assert grid.spell_blocks(cli.parse_blocks(text, 12), 12) == spelling


def test_the_same_blocks_named_twice_are_one_choice(tiny_saved, shapes_data, tmp_path, capsys):
    flags = ("--blocks", "10-11", "11,10", "10,11", "--shots", "all", "all", "--seeds", "1")
    assert run(tiny_saved, shapes_data, tmp_path, *flags, "--dry-run") == 0
    assert capsys.readouterr().out.startswith("1 runs, ")


def test_shots_of_which_none_is_possible_are_refused(tiny_saved, shapes_data, tmp_path, capsys):
    assert run(tiny_saved, shapes_data, tmp_path, "--shots", "11", "50") == 2
    message = "expected fewer than the photos that the smallest class has to train on, 11, or all"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["study.csv", "study.png", "study.json"])
def test_files_that_no_study_wrote_are_kept(tiny_saved, shapes_data, tmp_path, capsys, name):
    (tmp_path / name).write_text('{"my": "own"}')
    assert run(tiny_saved, shapes_data, tmp_path, *GRID) == 2
    assert f"{tmp_path}: holds {name}, which minivit did not write" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == '{"my": "own"}'


def test_a_table_with_other_columns_is_not_read_as_runs(whole, tmp_path):
    (tmp_path / "study.csv").write_text("date,hours\n1,2\n")
    with pytest.raises(UserError, match="found 'date,hours'; give another --out"):
        summary.read_rows(tmp_path / "study.csv")
    assert len(summary.read_rows(whole / "study.csv")) == 12


def test_a_model_that_was_trained_on_these_photos_is_refused(
    tiny_saved, shapes_data, tmp_path, capsys
):
    model = shutil.copytree(tiny_saved, tmp_path / "model")
    photos = run_photos.photos_checksum(load_data(shapes_data, seed=7))
    for checksum, code in ((photos, 2), ("12345678", 0)):
        settings = {"seed": 7, "data": "shapes"}
        summary = {"settings": settings, "base": "demo", "photos_checksum": checksum}
        (model / "summary.json").write_text(json.dumps(summary))
        assert run(model, shapes_data, tmp_path / "out", *GRID, "--dry-run") == code
    message = f"{model}: was trained on these photos, so that few of them are new to it"
    assert message in capsys.readouterr().err


def test_seeds_share_one_test_and_train_on_no_other_split(tmp_path):
    for name in ("red", "green"):
        (tmp_path / name).mkdir()
        for i in range(20):
            Image.new("RGB", (8, 8), name).save(tmp_path / name / f"{i}.png")
    splits = [load_data(tmp_path, seed=seed) for seed in range(3)]
    (tested,) = {tuple(data.test.paths) for data in splits}
    for cell in grid.plan(splits, {"none": 12}, ["2", "all"], None, TrainSettings()):
        validated = splits[cell.settings.seed].val.paths
        assert not set(cell.train.paths) & {*validated, *tested}
        assert not set(validated) & set(tested)


def test_a_study_of_other_weights_or_photos_is_refused(
    whole, tiny, tiny_saved, shapes_data, tmp_path, capsys
):
    model = shutil.copytree(tiny_saved, tmp_path / "model")
    data = shutil.copytree(shapes_data, tmp_path / "data")
    out = shutil.copytree(whole, tmp_path / "study")

    def refusal():
        assert run(model, data, out, *GRID) == 2
        return capsys.readouterr().err

    settings = json.loads((out / "study.json").read_text())
    (out / "study.json").write_text(json.dumps(settings | {"model": str(model)}))
    assert run(model, data, out, *GRID, "--dry-run") == 0
    photos = settings["the checksum of the photos"]
    (data / "train" / "red" / "0.png").rename(data / "test" / "red" / "from train.png")
    assert f"the checksum of the photos was {photos}, now" in refusal()
    (data / "test" / "red" / "from train.png").rename(data / "train" / "red" / "0.png")
    # An earlier version measured validation accuracy on other photos.
    earlier = settings | {"model": str(model)}
    del earlier["the version of the study"]
    study_json = (out / "study.json").read_text()
    (out / "study.json").write_text(json.dumps(earlier))
    assert "holds another study: the version of the study was None, now 2" in refusal()
    (out / "study.json").write_text(study_json)
    tiny.preprocess = Preprocess((32, 32), mean=(0.1, 0.1, 0.1))
    save_pretrained(tiny, model)
    assert "holds another study: its preprocessing was" in refusal()
    tiny.preprocess = Preprocess((32, 32))
    tiny.pos_embed.data += 1
    save_pretrained(tiny, model)
    assert "holds another study: the checksum of the weights was" in refusal()
