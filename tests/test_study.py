"""study: the grid, its runs from tokens against train.py's own, going on, and what it says."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import signal

import pytest
import torch
from test_commands import run_train

from minivit import __main__
from minivit import model as model_module
from minivit.data.datasets import load_data
from minivit.data.store import Pixels
from minivit.tools.study import command as study
from minivit.tools.study.tokens import KnownTokens
from minivit.training import features as frozen
from minivit.training import step as loop


def run(model, data, out, *flags):
    known = [
        "--model",
        model,
        "--data",
        data,
        "--out",
        out,
        "--device",
        "cpu",
        "--amp",
        "off",
        "--lr",
        "0.003",
    ]
    return __main__.main(["study", *map(str, [*known, *flags])])


def rows_of(out):
    with (out / "study.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


GRID = (
    "--shots",
    "3",
    "all",
    "--blocks",
    "none",
    "10-11",
    "all",
    "--seeds",
    "2",
    "--epochs",
    "3",
    "--views",
    "2",
)


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
    """The same photos, order and learning rate; views are drawn otherwise, and they make no difference to three colours."""
    for blocks in ("none", "10-11", "all"):
        out = tmp_path / blocks
        flags = (
            "--blocks",
            blocks,
            "--epochs",
            "3",
            "--batch-size",
            "16",
            "--cache-views",
            "2",
            "--seed",
            "1",
        )
        assert run_train(tiny_saved, shapes_data, out, *flags) == 0
        cell = next(
            r
            for r in rows_of(whole)
            if (r["shots"], r["blocks"], r["seed"]) == ("all", blocks, "1")
        )
        found = json.loads((out / "summary.json").read_text())
        assert float(cell["test_accuracy"]) == pytest.approx(found["test_accuracy"], abs=2 / 12)
        best = json.loads((out / "metrics.jsonl").read_text().splitlines()[found["best_epoch"] - 1])
        assert float(cell["train_accuracy"]) == pytest.approx(best["train_accuracy"], abs=3 / 33)


def test_tokens_at_each_cut_are_those_of_the_model(tiny_saved, shapes_data):
    model, split = study_model(tiny_saved), load_data(shapes_data, seed=0)
    pixels = torch.randint(256, (9, 3, 32, 32), dtype=torch.uint8)
    paths = split.paths()[:9]
    photos = Pixels(paths, model.preprocess, 1, pixels, torch.arange(9))
    tokens = KnownTokens(model, photos, paths[2:6], 2, batch=4)
    for cut in (0, 3, 12):
        tokens.advance(cut)
        expected = frozen.Frozen(model, cut, batch=9)(pixels)
        torch.testing.assert_close(tokens.tables[0], expected, rtol=1e-4, atol=1e-5)
        own = torch.tensor([2, 0])
        torch.testing.assert_close(
            next(tokens.evaluation(paths[3:8], own)()), expected[[5, 3]], rtol=1e-4, atol=1e-5
        )
        assert tokens.view(1, paths[4:6]).shape == (2, 1 if cut == 12 else 17, 24)
    assert not torch.equal(tokens.view(0, paths[4:6]), tokens.view(1, paths[4:6]))


def study_model(tiny_saved):
    from minivit import load_pretrained

    return model_module.working_copy(load_pretrained(tiny_saved), torch.device("cpu"), None, train=False)


def test_fewer_shots_are_among_more_and_every_class_has_as_many(shapes_data):
    args = study.make_parser().parse_args(["--shots", "2", "5", "all", "--seeds", "2"])
    splits = [load_data(shapes_data, seed=seed) for seed in range(2)]
    cells = {(cell.seed, cell.shots): cell for cell in study.plan(args, splits, {"none": 12})}
    for seed in range(2):
        two, five, everything = (set(cells[seed, count].train.paths) for count in ("2", "5", "all"))
        assert two < five < everything
        assert sorted(cells[seed, "2"].train.labels) == [0, 0, 1, 1, 2, 2]
    assert cells[0, "2"].train.paths != cells[1, "2"].train.paths
    assert cells[0, "2"].epochs == 60  # a step each
    assert cells[0, "all"].epochs == 20  # of 3 steps


def test_shots_that_the_photos_do_not_allow_are_left_out_and_said(shapes_data, capsys):
    args = study.make_parser().parse_args(["--shots", "5", "11", "50", "all"])
    cells = study.plan(args, [load_data(shapes_data, seed=0)], {"none": 12})
    assert [cell.shots for cell in cells] == ["5", "all"]
    assert (
        "left out: 11, 50 photos a class; the smallest class has 11 to train on"
        in capsys.readouterr().err
    )


def test_an_interrupted_study_goes_on_to_the_same_rows_and_a_finished_one_runs_nothing(
    whole, tiny_saved, shapes_data, tmp_path, monkeypatch, capsys
):
    out, real, steps = tmp_path / "study", loop.train_step, []

    def step(*args, **how):
        steps.append(0)
        if len(steps) == 20:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **how)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", step)
        assert run(tiny_saved, shapes_data, out, *GRID) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert 0 < len(rows_of(out)) < 12
    assert run(tiny_saved, shapes_data, out, *GRID) == 0
    assert rows_of(out) == rows_of(whole)
    monkeypatch.setattr(loop, "fit", None)
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
    assert "raise --cache-gib 1e-06, or lower --views 2" in capsys.readouterr().err


def test_an_estimate_counts_steps_evaluations_and_the_test(tiny_saved, shapes_data, monkeypatch):
    from minivit import load_pretrained

    low, split = load_pretrained(tiny_saved), load_data(shapes_data, seed=0)
    cell = study.Cell("all", "11", 0, 11, 10, split.train)
    monkeypatch.setattr(
        study.time, "perf_counter", itertools.count().__next__
    )  # 32 photos' forward pass in a second
    n, val, test = (len(part) for part in (split.train, split.val, split.test))
    tokens = (n + val + test + 4 * n) * (low.flops() - low.flops(11))
    work = low.flops(11) * (10 * 3 * n + 5 * val + n + test)  # a backward pass is two forward
    assert study.estimate(low, [cell], [split], views=4) == pytest.approx(
        (tokens + work) / (32 * low.flops())
    )


def test_the_model_is_left_as_it_was_and_the_best_epoch_is_one_of_five(
    tiny_saved, shapes_data, whole, monkeypatch
):
    from minivit import load_pretrained

    model = load_pretrained(tiny_saved, labels=["a", "b", "c"])
    before = {name: p.clone() for name, p in model.named_parameters()}
    split, args = (
        load_data(shapes_data, seed=0),
        study.make_parser().parse_args(["--lr", "0.01", "--views", "1"]),
    )
    low = model_module.working_copy(model, torch.device("cpu"), None, train=False)
    photos = Pixels(split.paths(), model.preprocess, 1)
    tokens = KnownTokens(low, photos, split.train.paths, 1, batch=64)
    cell, seen, fit = (
        study.Cell("all", "11", 0, model_module.freeze_except(model, [11]), 10, split.train),
        [],
        loop.fit,
    )
    monkeypatch.setattr(
        loop,
        "fit",
        lambda *args, **how: (seen.append(row["epoch"]) or row for row in fit(*args, **how)),
    )
    tokens.advance(11)
    assert study.run(cell, model, split, tokens, args, None)["photos"] == 33
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert seen == [2, 4, 6, 8, 10]


def rows(cells):
    known = {"photos": "10", "train_accuracy": "1.0", "val_accuracy": "0.9"}
    return [
        known | dict(zip(("blocks", "shots", "seed", "photos", "test_accuracy"), map(str, cell)))
        for cell in cells
    ]


def test_the_advice_follows_from_the_table():
    grid = [("10-11", "5", 0, 10, 0.70), ("10-11", "5", 1, 10, 0.72), ("10-11", "all", 0, 60, 0.90)]
    grid += [("10-11", "all", 1, 60, 0.92), ("none", "5", 0, 10, 0.60), ("none", "5", 1, 10, 0.62)]
    grid += [("none", "all", 0, 60, 0.70), ("none", "all", 1, 60, 0.71)]
    table = study.summarize(rows(grid))
    assert table["blocks 10-11"]["all"]["test"] == pytest.approx(0.91)
    assert study.advice(table) == (
        "with all photos a class train blocks 10-11: test accuracy 0.910; +20.0 points since 5 photos, so more photos would "
        "still help; training is 10.0 points above validation there"
    )
    flat = study.summarize(
        rows([("11", "5", 0, 10, 0.9), ("11", "all", 0, 60, 0.9), ("none", "all", 0, 60, 0.9)])
    )
    said = study.advice(flat)
    assert (
        "train block 11: test accuracy 0.900 (the head alone as good within the seeds' spread)"
        in said
    )
    assert "so more photos would help little" in said
    assert list(study.lay_out(table))[-1].split() == [
        "the",
        "head",
        "alone",
        "0.610",
        "(0.600-0.620)",
        "0.705",
        "(0.700-0.710)",
    ]
