"""train.py and infer.py as a user runs them: what they write, print and refuse."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, draw_photo, make_tiny, rows_of, run_train
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import infer
import train
from minivit import __main__, cli, commands, load_pretrained, save_pretrained, settings
from minivit import train as train_job
from minivit.checkpoints import tensors
from minivit.data.datasets import load_data
from minivit.data.photos import open_photo
from minivit.training import metrics
from minivit.training import run_folder as runs


def open_size(path):
    with Image.open(path) as image:
        image.load()
        return image.size


@pytest.fixture(scope="module")
def run(shapes_data, tmp_path_factory):
    """A finished run of tiny_folder's model, which no test may write to, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("finished"), io.StringIO()
    (folder / "tiny").mkdir()
    save_pretrained(make_tiny(), folder / "tiny")
    with contextlib.redirect_stdout(printed):
        assert run_train(folder / "tiny", shapes_data, folder / "run", "--epochs", "6") == 0
    return folder / "run", printed.getvalue()


def test_a_run_learns_and_writes_all_it_promises(run, tiny_folder):
    out, printed = run
    assert sorted(path.name for path in out.iterdir()) == sorted([".lock", *runs.RUN_FILES])
    summary = json.loads((out / "summary.json").read_text())
    assert summary["test_accuracy"] >= 0.9
    wanted = {
        "test_precision",
        "test_recall",
        "test_f1",
        "test_macro_f1",
        "trainable_parameters",
        "total_parameters",
        "seconds",
    }
    assert summary.keys() >= wanted
    accuracy = summary["test_accuracy"]
    assert printed.splitlines()[-1] == (
        f"test accuracy {accuracy:.4f} ({round(accuracy * 12)}/12)"
        f" · macro F1 {summary['test_macro_f1']:.4f}"
        f" · best epoch {summary['best_epoch']} · {out}"
    )
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    assert summary["best_epoch"] == 6
    assert "epoch 6 was kept, the last: none before it is better" in summary["verdict"]
    assert summary["head_alone_val_accuracy"] == rows[0]["val_accuracy"]
    assert re.search(r"^the head alone · training \d\.\d{4} \(loss ", printed, re.MULTILINE)
    for name in ("curves", "confusion", "predictions"):
        assert open_size(out / f"{name}.png")[0] > 300
    before = load_file(tiny_folder / "model.safetensors")
    after = load_file(out / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    trained = ("vit.encoder.layer.10.", "vit.encoder.layer.11.", "vit.layernorm", "class")
    assert moved == {name for name in before if name.startswith(trained)}
    model = load_pretrained(out)
    tail = load_file(out / "tail.safetensors")
    assert model.labels == ("blue", "green", "red")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in tail.items())


def test_a_dry_run_says_what_would_train_and_writes_nothing(
    tiny_folder, shapes_data, tmp_path, capsys
):
    assert (
        run_train(tiny_folder, shapes_data, tmp_path / "run", "--dry-run", "--micro-batch", "3")
        == 0
    )
    out = capsys.readouterr().out
    assert "33 training, 3 validation, 12 test" in out
    assert re.search(r"^up to \d\.\d\d GiB of memory, with 3 photos at a time$", out, re.MULTILINE)
    assert "epoch 1/" not in out
    assert not (tmp_path / "run").exists()


def test_two_kept_views_train_as_well_and_too_little_cache_is_refused(
    tiny_folder, shapes_data, tmp_path
):
    out = tmp_path / "run"
    assert run_train(tiny_folder, shapes_data, out, "--epochs", "8", "--cache-views", "2") == 0
    assert json.loads((out / "summary.json").read_text())["test_accuracy"] == 1.0
    assert (
        run_train(
            tiny_folder,
            shapes_data,
            tmp_path / "x",
            "--epochs",
            "3",
            "--cache-views",
            "2",
            "--cache-gib",
            "1e-6",
        )
        == 2
    )


def test_photos_beyond_the_cap_are_streamed_to_the_same_result(
    run, tiny_folder, shapes_data, tmp_path, capsys
):
    out, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(shapes_data, data, ignore=shutil.ignore_patterns(".minivit"))
    assert (
        run_train(
            tiny_folder, data, out, "--epochs", "6", "--store-gib", "1e-9", "--cache-gib", "1e-9"
        )
        == 0
    )
    assert "each epoch decodes them anew" in capsys.readouterr().err
    assert load_file(out / "tail.safetensors")["head.weight"].equal(
        load_file(run[0] / "tail.safetensors")["head.weight"]
    )


def test_the_model_card_says_what_it_is_and_names_are_no_markup(run):
    from minivit.training.model_card import model_card

    out, _ = run
    summary = json.loads((out / "summary.json").read_text())
    card = (out / "README.md").read_text()
    assert f"| accuracy | {summary['test_accuracy']:.4f} |" in card
    assert summary["verdict"] in card
    assert "Classes: `blue`, `green`, `red`.\n" in card
    hostile = model_card(
        summary | {"classes": ["`](x)\n# <b>"]}, [("`a`", "b\n# c", 3)], name="run", pets=False
    )
    assert "- `'a'` taken for `b\\n# c`: 3\n" in hostile
    assert "Classes: `'](x)\\n# <b>`.\n" in hostile


def test_weights_that_changed_on_their_way_to_the_disk_are_named(
    tiny_saved, shapes_data, tmp_path, monkeypatch
):
    def save(model, folder):
        with torch.no_grad():
            model.head.bias[0] += 1e-6
        save_pretrained(model, folder)
        with torch.no_grad():
            model.head.bias[0] -= 1e-6

    monkeypatch.setattr("minivit.checkpoints.weights.save_pretrained", save)
    with pytest.raises(RuntimeError, match="not those that were tested: head.bias"):
        run_train(tiny_saved, shapes_data, tmp_path / "run", "--epochs", "1")
    assert (
        not (tmp_path / "run" / "summary.json").exists()
        and (tmp_path / "run" / "state.safetensors").exists()
    )


def test_where_the_tail_cannot_be_written_nothing_is_and_the_run_goes_on(
    tiny_saved, shapes_data, tmp_path, monkeypatch, capsys
):
    def fill_the_disk(model, path, base_hash):
        raise OSError(28, "No space left on device", str(path))

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("minivit.checkpoints.weights.save_tail", fill_the_disk)
        assert run_train(tiny_saved, shapes_data, out, "--epochs", "1") == 2
    assert capsys.readouterr().err.endswith("tail.safetensors: No space left on device\n")
    left = sorted(path.name for path in out.iterdir())
    assert left == [".lock", "metrics.jsonl", "state.safetensors"]
    assert run_train(tiny_saved, shapes_data, out, "--epochs", "1", "--resume") == 0


def test_a_finished_run_leaves_no_state_however_slow_the_disk_is(
    tiny_saved, shapes_data, tmp_path, monkeypatch, no_figures
):
    save_tensors = tensors.save_tensors

    def save_slowly(path, *args):
        time.sleep(0.5)
        save_tensors(path, *args)

    # The weights are not saved by this name, only the state of an epoch.
    monkeypatch.setattr(tensors, "save_tensors", save_slowly)
    assert run_train(tiny_saved, shapes_data, tmp_path / "run", "--epochs", "1") == 0
    assert not (tmp_path / "run" / "state.safetensors").exists()


@pytest.mark.parametrize("amp, by", [("off", 0.002), ("bf16", 0.1)])
def test_weights_that_do_not_validate_as_they_did_are_named(
    tiny_saved, shapes_data, tmp_path, monkeypatch, amp, by
):
    real = train_job.run_epochs

    def of_other_weights(state, *args):
        evaluation = real(state, *args)
        state.rows[-1]["val_loss"] += by * max(1, state.rows[-1]["val_loss"])
        return evaluation

    monkeypatch.setattr(train_job, "run_epochs", of_other_weights)
    with pytest.raises(RuntimeError, match="the weights of epoch 1 validate at a loss of"):
        run_train(tiny_saved, shapes_data, tmp_path / "run", "--epochs", "1", "--amp", amp)
    assert not (tmp_path / "run" / "summary.json").exists()


def test_few_photos_get_more_epochs_and_the_table_says_so(
    tiny_saved, shapes_data, tmp_path, capsys
):
    places = ["--model", tiny_saved, "--data", shapes_data, "--out", tmp_path / "run", "--dry-run"]

    batch = settings.batch_size_for(33)
    steps = math.ceil(33 / batch)
    epochs = settings.epochs_for(steps)
    few = f", to take at least {settings.MIN_STEPS} steps with few photos"

    def table(*flags):
        assert commands.train([*map(str, [*places, *flags]), "--device", "cpu"]) == 0
        return capsys.readouterr().out

    assert f"\n{epochs} epochs of {steps} steps of {batch} photos{few}\n" in table()
    assert "\n1 epoch of 17 steps of 2 photos\n" in table("--epochs", 1, "--batch-size", 2)
    alone = table("--blocks", "none")
    assert "\nthe head alone is fitted once to the frozen model, so there are no epochs\n" in alone
    assert "2 augmented views of each photo are kept for all epochs\n" in table("--cache-views", 2)
    assert "photos are augmented anew in each epoch\n" in table("--cache-views", 0)


def test_a_model_of_another_input_size_is_read_back_as_it_was(
    tiny_saved, shapes_data, tmp_path, no_figures
):
    assert (
        run_train(
            tiny_saved,
            shapes_data,
            tmp_path / "run",
            "--epochs",
            "1",
            "--img-size",
            "40x48",
            "--amp",
            "bf16",
        )
        == 0
    )


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    "keep, by_epoch, kept",
    [
        ("auto", (0.1, 0.9, 0.2, 0.3), 1),
        ("auto", (0.99, 0.1, 0.1, 0.1), 0),
        ("best", (0.1, 0.3, 0.4, 0.2), 2),
        ("last", (0.1, 0.9, 0.2, 0.3), 3),
        ("average", (0.1, 0.9, 0.2, 0.3), None),
    ],
    ids=str,
)
def test_the_written_weights_are_those_that_the_rule_keeps(
    tiny_folder, shapes_data, tmp_path, monkeypatch, capsys, keep, by_epoch, kept
):
    heads = []
    real = train_job.Evaluation._score

    def with_accuracy(evaluation, logits):
        heads.append(evaluation.eval_model.head.weight.detach().clone())
        return real(evaluation, logits) | {"val_accuracy": by_epoch[len(heads) - 1]}

    monkeypatch.setattr(train_job.Evaluation, "_score", with_accuracy)
    monkeypatch.setattr(metrics, "CLEARLY", 0.1)  # With 3 photos, nothing is clear otherwise.
    out = tmp_path / "run"
    assert run_train(tiny_folder, shapes_data, out, "--epochs", "3", "--keep", keep) == 0
    expected = heads[kept] if kept is not None else torch.stack(heads[2:]).mean(0)
    # Calibration divides the head by a temperature.
    temperature = json.loads((out / "summary.json").read_text())["temperature"] or 1.0
    written = load_pretrained(out)
    torch.testing.assert_close(written.head.weight.detach() * temperature, expected)
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert f" · best epoch {3 if kept is None else kept} · " in last_line
    # The training photos in reference.safetensors are read with these weights, not with the last.
    data = load_data(shapes_data, seed=0)
    images = torch.stack([written.preprocess(open_photo(path)) for path in data.train.paths])
    expected = written.head_inputs(written.tokens(images)).detach()
    features = load_file(out / "reference.safetensors")["features"]
    torch.testing.assert_close(features.float(), expected, atol=2e-3, rtol=2e-3)
    if kept == 0:
        # The blocks and the norm are the checkpoint's.
        base = load_pretrained(tiny_folder)
        assert torch.equal(written.blocks[11].mlp.fc1.weight, base.blocks[11].mlp.fc1.weight)
        card = (out / "README.md").read_text()
        assert "because training blocks 10-11 gave nothing better" in " ".join(card.split())


@pytest.mark.usefixtures("no_figures")
def test_a_command_run_twice_gives_equal_metrics_and_keeps_both_runs(
    run, tiny_folder, shapes_data, tmp_path
):
    out = shutil.copytree(run[0], tmp_path / "run")
    assert run_train(tiny_folder, shapes_data, out, "--epochs", "6") == 0
    assert rows_of(out) == rows_of(out / "earlier-1")
    assert (out / "model.safetensors").read_bytes() == (
        out / "earlier-1" / "model.safetensors"
    ).read_bytes()


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_learns_too(tiny_folder, shapes_data, tmp_path, amp):
    assert run_train(tiny_folder, shapes_data, tmp_path / "run", "--epochs", "6", "--amp", amp) == 0
    # The head alone is scored with the head that was fitted, not with the one of zeros.
    assert rows_of(tmp_path / "run")[0]["train_loss"] < 0.1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["test_accuracy"] >= 0.8


def test_infer_prints_names_and_draws_a_figure_for_each_photo(run, tmp_path, capsys):
    out, _ = run
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, size in (("wide", (300, 100)), ("tall", (90, 200))):
        draw_photo(*size).save(folder / f"{name}.jpg")
    other = tmp_path / "wide.png"
    Image.new("RGB", (50, 40), (20, 20, 200)).save(other)
    figures = tmp_path / "figures"
    assert (
        infer.main(
            [
                str(folder),
                str(other),
                "--model",
                str(out),
                "--top-k",
                "2",
                "--out",
                str(figures),
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out.splitlines()
    # Photos of one colour are no noise, as the training photos are.
    lines = [line for line in printed if not line.startswith("unlike the training photos")]
    assert len(lines) == 12
    assert lines[8] == str(other)
    assert lines[9].split("  ")[1] == "blue"
    assert 1 / 3 < float(lines[9].split("  ")[0]) <= 1
    assert lines[11] == str(figures / "wide-2.png")
    assert sorted(path.name for path in figures.iterdir()) == ["tall.png", "wide-2.png", "wide.png"]


def test_inference_gives_the_logits_of_training(run, shapes_data):
    from minivit import open_photo
    from minivit.data import store
    from minivit.data.datasets import load_data
    from minivit.training.step import predict_photos

    model = load_pretrained(run[0])
    data = load_data(shapes_data, seed=0)
    data, file = store.prepare(data, model.preprocess, workers=2, cap_gib=1)
    logits, _ = predict_photos(
        model, store.open_splits(data, file, model.preprocess, workers=2)[2][0], batch=4
    )
    with torch.no_grad():
        one = model(model.preprocess(open_photo(data.test.paths[5]))[None])
    torch.testing.assert_close(one[0], logits[5], rtol=0, atol=1e-5)


def test_a_bad_photo_is_reported_and_the_rest_goes_on(tiny_folder, tmp_path, capsys):
    draw_photo(30, 30).save(tmp_path / "good.png")
    (tmp_path / "bad.jpg").write_text("no photo")
    paths = [str(tmp_path / name) for name in ("bad.jpg", "absent.jpg", "good.png")]
    assert (
        infer.main(
            [*paths, "--model", str(tiny_folder), "--out", str(tmp_path / "out"), "--device", "cpu"]
        )
        == 2
    )
    printed = capsys.readouterr()
    assert (tmp_path / "out" / "good.png").exists()
    assert "bad.jpg: cannot be read as a photo" in printed.err
    assert "absent.jpg: no such photo" in printed.err
    assert printed.out.startswith(paths[2])


@pytest.mark.usefixtures("no_figures")
def test_training_says_what_the_doctor_sees_at_a_glance(tiny_folder, shapes_data, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(shapes_data, data)
    (data / "train" / "red" / "notes.txt").touch()
    assert run_train(tiny_folder, data, tmp_path / "run", "--epochs", "1") == 0
    assert "note     1 file or folder is not used (train/red/notes.txt)" in capsys.readouterr().err


BAD_FLAGS = {
    "memory-gib": (
        ["--memory-gib", "4"],
        "--memory-gib limits a CUDA device, found cpu; there, choose --micro-batch",
    ),
    "label-smoothing": (
        ["--label-smoothing", "2"],
        "--label-smoothing: expected a number from 0 to 1, found '2'",
    ),
    "patience": (["--patience", "0"], "--patience: expected a whole number of at least 1"),
    "blocks": (["--blocks", "12"], "this model has blocks 0 to 11"),
    "batch size": (["--batch-size", "0"], "expected a whole number of at least 1, found '0'"),
    "epochs": (["--epochs", "two"], "expected a whole number"),
    "lr": (["--lr", "-1"], "expected a number above 0"),
    "device": (["--device", "cuda:99"], "this torch"),
    "unknown device": (["--device", "tpu"], "expected auto, cpu, mps, cuda or cuda:N"),
    "model": (["--model", "README.md"], "expected a Hub id, a folder, or a file ending in"),
    "not a Hub id": (["--model", "a/b/c"], "neither a folder or file here nor a Hub id"),
    "out": (["--out", "README.md/run"], "README.md: expected a folder, found a file"),
    "data": (["--data", "tests"], "expected oxford-iiit-pet/"),
    "out that safetensors cannot read": (
        ["--out", "caf\udce9"],
        "caf\\udce9: expected a name in UTF-8",
    ),
}


@pytest.mark.parametrize("flags, message", BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_a_mistake_ends_in_one_line_and_exit_code_2(
    tiny_folder, shapes_data, tmp_path, capsys, monkeypatch, flags, message
):
    monkeypatch.chdir(ROOT)
    code = run_train(tiny_folder, shapes_data, tmp_path / "run", *flags)
    err = capsys.readouterr().err
    assert code == 2
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--layers", "11-12"], "this model has blocks 0 to 11"),
        (["EMPTY"], "no photos in this folder"),
    ],
)
def test_infer_refuses_what_cannot_be(tiny_folder, tmp_path, capsys, flags, message):
    draw_photo(30, 30).save(tmp_path / "a.png")
    (tmp_path / "EMPTY").mkdir()
    flags = [str(tmp_path / flag) if flag == "EMPTY" else flag for flag in flags]
    assert (
        infer.main(
            [
                str(tmp_path / "a.png"),
                *flags,
                "--model",
                str(tiny_folder),
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 2
    )
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_infer_says_before_it_loads_a_model_that_out_is_no_folder(tmp_path, capsys):
    photo = tmp_path / "a.png"
    draw_photo(30, 30).save(photo)
    assert infer.main([str(photo), "--model", "no/such", "--out", str(photo)]) == 2
    line = f"python -m minivit infer: {photo}: expected a folder, found a file; give another --out"
    assert capsys.readouterr().err == f"{line}\n"


def test_a_full_device_is_one_line_and_other_runtime_errors_are_raised(monkeypatch, capsys):
    from minivit.system import device

    def full(_):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has 1 MiB free."
        )

    monkeypatch.setattr(device, "pick_device", full)
    assert train.main([]) == 2
    assert capsys.readouterr().err == (
        "python -m minivit train: out of device memory: CUDA out of memory;"
        " free some, or try smaller batches or fewer blocks\n"
    )
    monkeypatch.setattr(device, "pick_device", lambda _: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError):
        train.main([])


def test_an_interrupt_ends_with_130(monkeypatch, capsys):
    from minivit.system import device

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(device, "pick_device", interrupt)
    assert train.main([]) == 130
    assert capsys.readouterr().err == "\npython -m minivit train: interrupted\n"


@pytest.fixture
def odd_photos(tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    names = [
        b"a b.png",
        b"q\"'.png",
        b"new\nline.png",
        b"\x1b[31mred.png",
        b"caf\xe9.png",
        "\N{CAT FACE}.png".encode(),
        b"-x.png",
    ]
    names += [b"x" * 250 + b".png", b"x" * 250 + b".tif", "é".encode() * 125 + b".png"]
    for name in names:
        draw_photo(12, 9).save(folder / os.fsdecode(name))
    (folder / "directory.jpg").mkdir()
    (folder / "nowhere.jpg").symlink_to("nowhere")
    os.mkfifo(folder / "fifo.jpg")
    return folder


def assert_harmless(text):
    assert all(line.isprintable() for line in text.replace("\r", "\n").split("\n"))
    text.encode()


def test_photos_of_any_name_are_printed_and_drawn(tiny_folder, odd_photos, tmp_path, capsys):
    absent = "n" * 300 + ".jpg"
    out = tmp_path / "out"
    flags = [
        "--model",
        str(tiny_folder),
        "--layers",
        "11",
        "--workers",
        "1",
        "--out",
        str(out),
        "--device",
        "cpu",
    ]
    code = infer.main([str(odd_photos), "/dev/zero", absent, *flags])
    printed = capsys.readouterr()
    assert code == 2
    assert_harmless(printed.out + printed.err)
    figures = sorted(path.name for path in out.iterdir())
    stems = [
        "a b",
        "q_'",  # Windows takes no `"` in a name, and no control characters.
        "new_line",
        "_[31mred",
        "caf\udce9",
        "\N{CAT FACE}",
        "-x",
        "x" * 240,
        "x" * 240 + "-2",
        "é" * 120,
    ]
    assert figures == sorted(f"{stem}.png" for stem in stems)
    for path in out.iterdir():
        open_size(path)
    refusals = [
        line for line in printed.err.splitlines() if "cannot be read" in line or "no such" in line
    ]
    assert len(refusals) == 5
    for bad in ("directory.jpg", "nowhere.jpg", "fifo.jpg", "/dev/zero", absent):
        assert sum(f"{bad}: " in line for line in refusals) == 1


def test_a_photo_whose_name_begins_with_a_dash_is_read_after_two(
    tiny_folder, odd_photos, monkeypatch, capsys
):
    monkeypatch.chdir(odd_photos)
    assert (
        infer.main(["--model", str(tiny_folder), "--out", "out", "--device", "cpu", "--", "-x.png"])
        == 0
    )
    assert capsys.readouterr().out.splitlines()[0] == "-x.png"


def test_no_figure_takes_the_place_of_a_photo(tiny_folder, tmp_path):
    path = tmp_path / "cat.png"
    draw_photo(20, 20).save(path)
    before = path.read_bytes()
    assert (
        infer.main(
            [str(path), "--model", str(tiny_folder), "--out", str(tmp_path), "--device", "cpu"]
        )
        == 0
    )
    assert path.read_bytes() == before
    assert (tmp_path / "cat-2.png").exists()


def test_hostile_labels_reach_neither_terminal_nor_paths(tiny, photos, tmp_path, capsys):
    tiny.labels = (
        "\x1b[31mred\x1b[0m",
        "a\nb\r<script>alert(1)</script>",
        "x" * 5_000,
        "../x",
        "$\\frac{ \N{CAT FACE} \udcff",
    )
    (tmp_path / "hostile").mkdir()
    save_pretrained(tiny, tmp_path / "hostile")
    out = tmp_path / "in" / "out"
    paths = list(map(str, photos[:3]))
    assert (
        infer.main(
            [*paths, "--model", str(tmp_path / "hostile"), "--out", str(out), "--device", "cpu"]
        )
        == 0
    )
    printed = capsys.readouterr()
    assert_harmless(printed.out + printed.err)
    assert len(printed.out.splitlines()) == 3 * 7
    assert sorted(path.name for path in out.iterdir()) == [f"photo {i}.png" for i in range(3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hostile", "in"]
    assert max(open_size(path)[0] for path in out.iterdir()) < 3_000


def class_folders(root, names):
    for i, name in enumerate(names):
        folder = root / os.fsdecode(name)
        folder.mkdir(parents=True)
        for j in range(5):
            draw_photo(12, 9, 5 * i + j).save(folder / f"{j}.png")
    return root


def test_training_works_with_class_folders_of_any_name(tiny_folder, tmp_path, capsys):
    names = [b"<b>&amp;", b"\x1b[31mred", b"caf\xe9", b"x" * 255, b"new\nline", b"$\\frac{"]
    out = tmp_path / "run"
    assert (
        run_train(tiny_folder, class_folders(tmp_path / "data", names), out, "--epochs", "1") == 0
    )
    printed = capsys.readouterr()
    assert_harmless(printed.err)
    labels = set(load_pretrained(out).labels)
    assert labels == {"<b>&amp;", "\x1b[31mred", "caf\\xe9", "x" * 255, "new\nline", "$\\frac{"}
    for name in ("config.json", "summary.json"):
        json.loads((out / name).read_bytes().decode("utf-8"))
    with safe_open(out / "tail.safetensors", "pt") as tail:
        description = json.loads(tail.metadata()["minivit"])
    assert set(description["labels"]) == labels
    for name in ("confusion", "predictions"):
        assert open_size(out / f"{name}.png")[0] < 3_000


@pytest.mark.usefixtures("no_figures")
def test_unreadable_photos_stop_training_at_once_or_are_left_out(tiny_folder, tmp_path, capsys):
    data = class_folders(tmp_path / "data", [b"cat", b"dog"])
    bad = data / "dog" / "\x1b[31m.jpg"
    bad.write_text("no photo")
    assert run_train(tiny_folder, data, tmp_path / "run", "--epochs", "1") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "1 of 11 photos cannot be read" in last
    assert "dog/\\x1b[31m.jpg" in last
    assert "--skip-bad" in last
    assert not (tmp_path / "run").exists()
    assert run_train(tiny_folder, data, tmp_path / "run", "--epochs", "1", "--skip-bad") == 0
    printed = capsys.readouterr()
    assert_harmless(printed.err)
    assert sum(line.startswith("left out: ") for line in printed.err.splitlines()) == 1
    assert (tmp_path / "run" / "summary.json").exists()


def test_infer_ends_quietly_when_nobody_reads_on(tiny_folder, photos, tmp_path):
    flags = [
        *photos,
        "--model",
        tiny_folder,
        "--out",
        tmp_path / "out",
        "--device",
        "cpu",
        "--top-k",
        "1",
    ]
    command = [sys.executable, ROOT / "infer.py", *flags]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        # Close it before a line is read: a fast machine could finish all photos until then.
        process.stdout.close()
        assert process.stderr.read() == f"model: {tiny_folder}\n"
    assert process.returncode == 141


INTERRUPTED = """
import json, os, runpy, signal, sys
os.environ["OMP_NUM_THREADS"] = "1"
script, moments, flags, children = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:], []
for i, (event, what) in enumerate(moments):
    if event != "import": import torch, minivit.figures.plots  # once for all children
    children.append(os.fork())
    if children[-1] == 0:
        sys.stdout, sys.stderr = open(os.devnull, "w"), open(f"{i}.err", "w", 1)
        os.dup2(sys.stderr.fileno(), 2)
        def interrupt(happens, arguments):
            if happens == event and any(str(part).endswith(what) for part in arguments[:2]):
                os.kill(os.getpid(), signal.SIGINT)
        sys.addaudithook(interrupt)
        sys.argv = [script, *(flag.format(i=i) for flag in flags), "--out", f"out{i}"]
        runpy.run_path(script, run_name="__main__")
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""
# The names and arguments of Python's audit events. The test adds two imports: numpy's happens in
# the middle of torch's, which swallows exceptions there.
MOMENTS = {
    "train.py": [
        ("open", "red/7.png"),
        ("open", ".partial"),
        ("open", "metrics.jsonl"),
        ("os.rename", "curves.png"),
    ],
    "infer.py": [("open", "photo 1.png"), ("open", ".partial"), ("os.rename", "photo 1.png")],
}


@pytest.mark.parametrize("name", MOMENTS)
def test_an_interrupt_at_any_moment_ends_in_one_line_with_no_half_file(
    name, tiny_folder, shapes_data, photos, tmp_path
):
    moments = [("import", "torch"), ("import", "numpy"), *MOMENTS[name]]
    for i in range(len(moments) if name == "train.py" else 0):  # each decodes its own
        shutil.copytree(
            shapes_data, tmp_path / f"data{i}", ignore=shutil.ignore_patterns(".minivit")
        )
    flags = ["--data", "data{i}", "--epochs", "4"] if name == "train.py" else photos[:3]
    flags = [ROOT / name, json.dumps(moments), *flags, "--model", tiny_folder, "--device", "cpu"]
    path = {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", INTERRUPTED, *map(str, flags)]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | path
    )
    messages = [(tmp_path / f"{i}.err").read_text() for i in range(len(moments))]
    assert json.loads(done.stdout) == [130] * len(moments), messages
    for message in messages:
        assert "Traceback" not in message
        assert message.splitlines()[-1].startswith("interrupted")
    for path in tmp_path.rglob("*"):
        assert not path.name.endswith(".partial"), path
        if path.suffix == ".png":
            open_size(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            load_file(path)


STARTED = """
import os, signal
from pathlib import Path
from minivit import cli
from minivit.system import files
def main():
    {line}
cli.start(main)
"""


def started(line, cwd, preexec_fn=None):
    """Run a line as the main function of a script; return its exit code, stdout and stderr.

    It starts without torch, which would take seconds.
    """
    done = subprocess.run(
        [sys.executable, "-c", STARTED.format(line=line)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
        preexec_fn=preexec_fn,
    )
    return done.returncode, done.stdout, done.stderr


INTERRUPT_ITSELF = "os.kill(os.getpid(), signal.SIGINT); print('on')"


def test_an_interrupt_in_the_middle_of_a_file_removes_it(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    write_half = "with files.whole_file(Path('a.txt')) as partial: partial.write_text('half')"
    assert started(f"{write_half}; {INTERRUPT_ITSELF}", tmp_path) == (130, "", "\ninterrupted\n")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "old")]


def test_an_interrupt_that_was_ignored_from_the_start_stays_so(tmp_path):
    """A shell starts its background jobs like this."""

    def ignore():
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    assert started(INTERRUPT_ITSELF, tmp_path, preexec_fn=ignore) == (0, "on\n", "")


def test_names_that_the_terminals_encoding_lacks_are_printed_as_escapes(tmp_path):
    line = r"cli.run(lambda _: print('\N{CAT FACE}.png'), cli.Parser('score'), [])"
    assert started(line, tmp_path) == (0, "\\U0001f431.png\n", "")


@pytest.mark.parametrize("command", ["train", "infer", "demo", "score", "drop", "study", "export"])
def test_an_empty_out_is_refused_and_a_tilde_is_the_home(command, monkeypatch, capsys):
    """A shell leaves `~` alone in --out=~/run, and an unset variable makes --out "$OUT" empty."""
    positional = {"infer": ["a.png"], "export": ["run", "--to", "timm"]}.get(command, [])
    assert __main__.main([command, *positional, "--out", ""]) == 2
    assert "argument --out: expected a value, found an empty one;" in capsys.readouterr().err
    asked = []

    def only_parse(_job, parser, argv):
        asked.append(parser.parse_args(argv).out)

    monkeypatch.setattr(cli, "run", only_parse)
    __main__.main([command, *positional, "--out=~/run"])
    assert asked == [os.path.expanduser("~/run")]


HELP_WITHOUT_TORCH = """
import sys, socket, train, infer, minivit
from minivit.__main__ import COMMANDS, main
socket.socket.connect = None
for script in (train, infer):
    assert script.main(['--help']) == 0
slow = {'torch', 'numpy', 'PIL', 'matplotlib', 'transformers', 'torchvision', 'huggingface_hub'}
read_photos = ['doctor', 'demo']  # These commands need NumPy and Pillow.
for command in [*(COMMANDS.keys() - read_photos), *read_photos]:
    if command == 'doctor':
        slow -= {'numpy', 'PIL'}
    assert main([command, '--help']) == 0
    assert not slow & set(sys.modules), (command, slow & set(sys.modules))
from minivit import load_pretrained
import minivit.training.step
slow -= {'torch'}
assert not slow & set(sys.modules), slow & set(sys.modules)
"""


def test_help_answers_without_torch_and_import_is_quiet():
    command = [sys.executable, "-c", HELP_WITHOUT_TORCH]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("usage: ") == 2 + len(__main__.COMMANDS)
    assert done.stdout.count("(default: auto)") >= 2


@pytest.mark.parametrize("name", ["train", "infer"])
def test_each_way_to_start_a_command_is_there_and_says_its_own_name(name):
    script = Path(sys.executable).with_name(f"minivit-{name}")
    ways = {
        f"{name}.py": [ROOT / f"{name}.py"],
        f"minivit-{name}": [script],
        f"python -m minivit {name}": ["-m", "minivit", name],
    }
    for usage, way in ways.items():
        done = subprocess.run(
            [sys.executable, *way, "--device"], capture_output=True, text=True, cwd=ROOT
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"{usage}: ")
        assert done.stderr.endswith(f"see {usage} --help\n")


def test_no_command_lists_them_and_a_wrong_one_is_refused_in_a_line(capsys):
    for argv in ([], ["--help"]):
        assert __main__.main(argv) == 0
        printed = capsys.readouterr()
        assert all(f"\n  {name} " in printed.out for name in __main__.COMMANDS) and not printed.err
    assert __main__.main(["trian"]) == 2
    expected = ", ".join(__main__.COMMANDS)
    assert capsys.readouterr().err == (
        f"python -m minivit: no command trian; expected one of {expected}\n"
    )


def test_a_wheel_holds_what_minivit_reads():
    section = (
        (ROOT / "pyproject.toml")
        .read_text()
        .split("[tool.setuptools.package-data]\n")[1]
        .split("\n\n")[0]
    )
    held = set()
    for line in section.splitlines():
        package, _, patterns = (
            line.replace('"minivit.', "minivit.").replace('" =', " =").partition(" = ")
        )
        for pattern in re.findall('"([^"]+)"', patterns):
            held |= set((ROOT / package.replace(".", "/")).glob(pattern))
    everything = (ROOT / "minivit").rglob("*")
    assert held == {
        p for p in everything if p.is_file() and p.suffix != ".py" and "__pycache__" not in p.parts
    }


def test_the_product_imports_transformers_nowhere():
    for path in [*ROOT.glob("*.py"), *(ROOT / "minivit").rglob("*.py")]:
        assert "import transformers" not in path.read_text(), path
        assert "from transformers" not in path.read_text(), path


def test_real_photos_are_read_whatever_they_are(pets3, tmp_path, tiny_folder):
    """Abyssinian_5 is a PNG named .jpg, in the official test split."""
    images = pets3 / "oxford-iiit-pet" / "images"
    odd = [
        images / name for name in ("Abyssinian_5.jpg", "Bengal_1.jpg") if (images / name).exists()
    ]
    assert odd
    assert (
        infer.main(
            [*map(str, odd), "--model", str(tiny_folder), "--out", str(tmp_path), "--device", "cpu"]
        )
        == 0
    )
