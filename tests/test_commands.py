"""train.py and infer.py from the outside: what they write, say, and refuse."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, draw_photo
from PIL import Image
from safetensors.torch import load_file

import infer
import train
from minivit import load_pretrained


def run_train(tiny_folder, data, out, *flags):
    known = ["--model", str(tiny_folder), "--data", str(data), "--out", str(out), "--amp", "off", "--device", "cpu"]
    return train.main([*known, "--batch-size", "8", "--lr", "0.003", *flags])


@pytest.fixture
def run(tiny_folder, shapes_data, tmp_path, capsys):
    assert run_train(tiny_folder, shapes_data, tmp_path / "run", "--epochs", "6") == 0
    return tmp_path / "run", capsys.readouterr()


def test_a_run_learns_and_writes_all_it_promises(run, tiny_folder):
    out, printed = run
    assert sorted(path.name for path in out.iterdir()) == sorted(train.RUN_FILES)
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
    right = round(summary["test_accuracy"] * 12)
    last = f"test accuracy {summary['test_accuracy']:.4f} ({right}/12) · macro F1 {summary['test_macro_f1']:.4f}"
    assert printed.out.splitlines()[-1] == f"{last} · best epoch {summary['best_epoch']} · {out}"
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert max(row["val_accuracy"] for row in rows) == rows[summary["best_epoch"] - 1]["val_accuracy"]
    for name in ("curves", "confusion", "predictions"):
        assert Image.open(out / f"{name}.png").width > 300
    before, after = load_file(tiny_folder / "model.safetensors"), load_file(out / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {
        n for n in before if n.startswith(("vit.encoder.layer.10.", "vit.encoder.layer.11.", "vit.layernorm", "class"))
    }
    assert load_pretrained(out).labels == ("blue", "green", "red")
    tail = load_file(out / "tail.safetensors")
    assert all(torch.equal(tensor, load_pretrained(out).state_dict()[name]) for name, tensor in tail.items())


def test_the_written_weights_are_the_best_epochs_not_the_last(tiny_folder, shapes_data, tmp_path, monkeypatch):
    from minivit import loop

    kept, real = [], loop.fit

    def worsening(model, *args, **kwargs):
        for row in real(model, *args, **kwargs):
            kept.append(model.head.weight.detach().clone())
            yield row | {"val_accuracy": 1 - row["epoch"] / 10} if row["epoch"] > 1 else row | {"val_accuracy": 1.0}

    monkeypatch.setattr(loop, "fit", worsening)
    run_train(tiny_folder, shapes_data, tmp_path / "run", "--epochs", "3")
    assert torch.equal(load_pretrained(tmp_path / "run").head.weight, kept[0])
    assert not torch.equal(kept[0], kept[2])


def test_the_same_command_twice_gives_the_same_metrics_and_keeps_the_earlier_run(run, tiny_folder, shapes_data):
    out, _ = run
    assert run_train(tiny_folder, shapes_data, out, "--epochs", "6") == 0
    timing = {"images_per_s", "seconds", "peak_gib"}
    now, then = (
        [
            {k: v for k, v in json.loads(line).items() if k not in timing}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in (out, out / "earlier-1")
    )
    assert now == then
    assert (out / "model.safetensors").read_bytes() == (out / "earlier-1" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_learns_too(tiny_folder, shapes_data, tmp_path, amp):
    assert run_train(tiny_folder, shapes_data, tmp_path / "run", "--epochs", "6", "--amp", amp) == 0
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
        infer.main([str(folder), str(other), "--model", str(out), "--top-k", "2", "--out", str(figures), "--device", "cpu"])
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    assert lines[8] == str(other)
    assert lines[9].split("  ")[1] == "blue"
    assert 0.5 < float(lines[9].split("  ")[0]) <= 1
    assert lines[11] == str(figures / "wide-2.png")
    assert sorted(path.name for path in figures.iterdir()) == ["tall.png", "wide-2.png", "wide.png"]


def test_inference_gives_the_logits_of_training(run, shapes_data):
    from minivit import open_photo
    from minivit.data import decode_all, load_data
    from minivit.loop import predict_photos

    model = load_pretrained(run[0])
    data = load_data(shapes_data, seed=0)
    logits = predict_photos(model, decode_all(data, model.preprocess, workers=2)[2][0], amp=None)
    with torch.no_grad():
        one = model(model.preprocess(open_photo(data.test.paths[5]))[None])
    torch.testing.assert_close(one[0], logits[5], rtol=0, atol=1e-5)


def test_a_bad_photo_is_reported_and_the_rest_goes_on(tiny_folder, tmp_path, capsys):
    draw_photo(30, 30).save(tmp_path / "good.png")
    (tmp_path / "bad.jpg").write_text("no photo")
    paths = [str(tmp_path / name) for name in ("bad.jpg", "absent.jpg", "good.png")]
    assert infer.main([*paths, "--model", str(tiny_folder), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    printed = capsys.readouterr()
    assert (tmp_path / "out" / "good.png").exists()
    assert "bad.jpg: cannot be read as a photo" in printed.err
    assert "absent.jpg: no such photo" in printed.err
    assert printed.out.startswith(paths[2])


BAD_FLAGS = {
    "blocks": (["--blocks", "12"], "this model has blocks 0 to 11"),
    "batch size": (["--batch-size", "0"], "expected a whole number of at least 1, found '0'"),
    "epochs": (["--epochs", "two"], "expected a whole number"),
    "lr": (["--lr", "-1"], "expected a number above 0"),
    "device": (["--device", "cuda:99"], "this torch"),
    "unknown device": (["--device", "tpu"], "expected auto, cpu, mps, cuda or cuda:N"),
    "model": (["--model", "README.md"], "expected a Hub id or a folder, found a file"),
    "not a Hub id": (["--model", "a/b/c"], "neither a folder here nor a Hub id"),
    "out": (["--out", "README.md/run"], "README.md/run: Not a directory"),
    "data": (["--data", "tests"], "expected oxford-iiit-pet/"),
}


@pytest.mark.parametrize("flags, message", BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_a_mistake_ends_in_one_line_and_exit_code_2(tiny_folder, shapes_data, tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(ROOT)
    try:
        code = run_train(tiny_folder, shapes_data, tmp_path / "run", *flags)
    except SystemExit as stop:  # argparse
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "flags, message", [(["--layers", "11-12"], "this model has blocks 0 to 11"), (["EMPTY"], "no photos in this folder")]
)
def test_infer_refuses_what_cannot_be(tiny_folder, tmp_path, capsys, flags, message):
    draw_photo(30, 30).save(tmp_path / "a.png")
    (tmp_path / "EMPTY").mkdir()
    flags = [str(tmp_path / flag) if flag == "EMPTY" else flag for flag in flags]
    assert infer.main([str(tmp_path / "a.png"), *flags, "--model", str(tiny_folder), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_an_interrupt_ends_with_130(monkeypatch, capsys):
    from minivit import device

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(device, "pick_device", interrupt)
    assert train.main([]) == 130
    assert capsys.readouterr().err == "\ntrain.py: interrupted\n"


def test_help_answers_at_once_and_import_is_quiet():
    for script in ("train.py", "infer.py"):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0
        assert "default:" in done.stdout
        assert time.perf_counter() - started < 1
    code = (
        "import sys, socket; socket.socket.connect = None; import minivit; assert 'torch' not in sys.modules;"
        "from minivit import load_pretrained; import minivit.loop;"
        "bad = {'matplotlib', 'transformers', 'torchvision', 'huggingface_hub'} & set(sys.modules); assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_product_imports_transformers_nowhere():
    for path in [*ROOT.glob("*.py"), *(ROOT / "minivit").glob("*.py")]:
        assert "import transformers" not in path.read_text(), path
        assert "from transformers" not in path.read_text(), path


def test_real_photos_are_read_whatever_they_are(pets3, tmp_path, tiny_folder):
    """Abyssinian_5 is a PNG named .jpg, in the official test split."""
    images = pets3 / "oxford-iiit-pet" / "images"
    odd = [images / name for name in ("Abyssinian_5.jpg", "Bengal_1.jpg") if (images / name).exists()]
    assert odd
    assert infer.main([*map(str, odd), "--model", str(tiny_folder), "--out", str(tmp_path), "--device", "cpu"]) == 0


def test_the_readmes_ten_lines_run(vit_b16, photos):
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace("google/vit-base-patch16-224", str(vit_b16)).replace("cat.jpg", str(photos[0]))
    names: dict = {}
    exec(code, names)
    assert names["images"].shape == (1, 3, 224, 224)
    assert names["attn"][11].shape == (1, 12, 197, 197)
    assert names["map11"].shape == (14, 14)
    assert names["overlay"].shape == names["photo"].size[::-1]
