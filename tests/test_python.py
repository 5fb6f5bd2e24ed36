"""The calls for programs and notebooks: fine_tune, Run and explain, held against the commands."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    assert_same_end,
    draw_photo,
    leave_figures_empty,
    randomize,
    rows_of,
)
from conftest import run_train as run_train_py
from PIL import Image

import infer as infer_py
import minivit
from minivit import Run, UserError, api, explain, fine_tune, load_pretrained
from minivit.attention import query_maps
from minivit.settings import InferSettings, TrainSettings

SETTINGS = {"batch_size": 8, "lr": 0.003, "amp": "off", "device": "cpu", "workers": 1}


@pytest.fixture(scope="module")
def finished(tiny_saved, shapes_data, tmp_path_factory) -> Run:
    out = tmp_path_factory.mktemp("python") / "run"
    with pytest.MonkeyPatch.context() as patch:
        leave_figures_empty(patch)
        return fine_tune(tiny_saved, shapes_data, epochs=2, out=out, **SETTINGS)


def test_fine_tune_ends_in_the_weights_of_train_py(
    finished, tiny_saved, shapes_data, tmp_path, no_figures
):
    assert run_train_py(tiny_saved, shapes_data, tmp_path / "run", "--epochs", 2) == 0
    assert_same_end(finished.folder, tmp_path / "run")


def test_a_run_holds_its_model_scores_and_folder(finished, capfd):
    assert [row["epoch"] for row in finished.metrics] == [0, 1, 2]
    assert finished.test_accuracy == finished.summary["test_accuracy"] > 0.5
    assert finished.folder.name == "run" and (finished.folder / "model.safetensors").exists()
    assert finished.model.labels == ("blue", "green", "red")
    assert not finished.model.training and finished.model is finished.model
    assert "test accuracy" in repr(finished) and "(" in repr(finished)
    again = Run.load(str(finished.folder))
    assert again == finished
    weights = load_pretrained(finished.folder).state_dict()
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, weights[name])
    (finished.folder / "curves.png").write_bytes(b"a picture")
    assert finished._repr_png_() == b"a picture"
    (finished.folder / "curves.png").write_bytes(b"")
    assert capfd.readouterr() == ("", "")


def test_a_folder_without_a_finished_run_is_refused(finished, tmp_path):
    with pytest.raises(UserError, match="expected the folder of a run"):
        Run.load(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 0}\n')
    with pytest.raises(UserError, match="not finished; go on with it"):
        Run.load(tmp_path)


def test_a_model_may_be_a_run_or_one_that_was_loaded(
    finished, tiny_saved, shapes_data, tmp_path, no_figures
):
    model = load_pretrained(tiny_saved)
    run = fine_tune(model, shapes_data, epochs=2, out=tmp_path / "run", **SETTINGS)
    assert rows_of(run.folder) == rows_of(finished.folder)
    assert run.summary["base"] == str(tiny_saved)
    further = fine_tune(run, shapes_data, blocks="none", out=tmp_path / "further", **SETTINGS)
    assert further.summary["base"] == str(run.folder)
    with torch.no_grad():
        model.head.bias += 1
    with pytest.raises(UserError, match=r"head.bias of the model .* save_pretrained"):
        fine_tune(model, shapes_data, out=tmp_path / "changed", **SETTINGS)
    with pytest.raises(UserError, match="one that was made"):
        fine_tune(minivit.ViT(TINY), shapes_data)
    larger = load_pretrained(tiny_saved, img_size=(48, 48))
    with pytest.raises(UserError, match="sees photos in another way"):
        fine_tune(larger, shapes_data)
    with pytest.raises(TypeError, match="model: expected a Hub id, .* found int"):
        fine_tune(3, shapes_data)
    assert not (tmp_path / "changed").exists()


def test_without_out_a_run_is_named_after_its_photos(
    tiny_saved, shapes_data, tmp_path, monkeypatch, capfd, no_figures
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "red, green.v2").symlink_to(shapes_data)
    run = fine_tune(tiny_saved, "red, green.v2", blocks="none", **SETTINGS)
    assert run.folder == Path("runs", shapes_data.name)
    again = fine_tune(tiny_saved, "red, green.v2", blocks="none", seed=1, **SETTINGS)
    assert again.folder == run.folder
    assert Run.load(run.folder / "earlier-1").summary == run.summary
    printed = capfd.readouterr()
    assert str(run.folder) in printed.out.splitlines()[-1]
    assert f"{run.folder} holds an earlier run: moved to" in printed.err


WRONG = [
    ({"epochs": 0}, "argument --epochs: expected a whole number of at least 1, found '0'"),
    ({"epochs": True}, "argument --epochs: expected a whole number"),
    ({"keep": "bset"}, "argument --keep: invalid choice"),
    ({"calibrate": False}, "argument --calibrate: invalid choice"),
    ({"compile": "yes"}, "compile: expected True or False, found 'yes'"),
    ({"lr": float("nan")}, "argument --lr: expected a number above 0"),
    ({"img_size": (0, 4)}, "argument --img-size: expected pixels"),
    ({"blocks": []}, "blocks: expected a value"),
    ({"blocks": [10, 12]}, "blocks '10,12': this model has blocks 0 to 11"),
    ({"device": "gpu"}, "device 'gpu': expected auto, cpu"),
]


@pytest.mark.parametrize("settings, message", WRONG, ids=[str(wrong) for wrong, _ in WRONG])
def test_settings_are_checked_as_flags_are(settings, message, tiny_saved, shapes_data, tmp_path):
    with pytest.raises(UserError) as caught:
        fine_tune(tiny_saved, shapes_data, out=tmp_path / "run", **settings)
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_what_is_no_data_or_keyword_is_refused(tiny_saved, shapes_data, tmp_path):
    (tmp_path / "empty").mkdir()
    for data in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(UserError, match=data.name):
            fine_tune(tiny_saved, data, out=tmp_path / "run")
    for name, wrong in (("data", b"photos"), ("out", 3)):
        paths = {"data": shapes_data, "out": tmp_path / "run"} | {name: wrong}
        with pytest.raises(TypeError, match=f"{name}: expected the path of a folder"):
            fine_tune(tiny_saved, **paths)
    for name in ("epoch", "dry_run", "chosen"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'; expected one"):
            fine_tune(tiny_saved, shapes_data, out=tmp_path / "run", **{name: 1})
    with pytest.raises(TypeError, match=r"explain\(\) got an unexpected .* 'html'"):
        explain("cat.jpg", tiny_saved, html=True)


def test_the_docstrings_name_every_keyword():
    for call, settings, left_out in (
        (fine_tune, TrainSettings, api.NOT_FOR_TRAINING),
        (explain, InferSettings, api.NOT_FOR_EXPLAINING),
    ):
        for field in dataclasses.fields(settings):
            words = re.findall(r"\w+", call.__doc__)
            assert field.name in words or field.name in left_out, field.name


def test_an_interrupt_leaves_a_run_that_goes_on_to_the_same_end(
    finished, tiny_saved, shapes_data, tmp_path, no_figures, monkeypatch
):
    from minivit.training import run_folder

    report_epoch = run_folder.report_epoch

    def interrupt_after_the_first(rows, *arguments):
        report_epoch(rows, *arguments)
        if len(rows) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(run_folder, "report_epoch", interrupt_after_the_first)
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt, match="the same call with resume=True goes on"):
        fine_tune(tiny_saved, shapes_data, epochs=2, out=out, **SETTINGS)
    monkeypatch.setattr(run_folder, "report_epoch", report_epoch)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(UserError, match="not finished"):
        Run.load(out)
    run = fine_tune(tiny_saved, shapes_data, epochs=2, out=out, resume=True, **SETTINGS)
    assert_same_end(run.folder, finished.folder)


@pytest.mark.parametrize("method", ["attention", "rollout", "relevance"])
def test_explain_says_and_draws_what_infer_py_does(method, finished, tmp_path, capfd):
    draw_photo(90, 60).save(tmp_path / "cat.png")
    out = tmp_path / "out"
    flags = [
        "--model",
        str(finished.folder),
        "--layers",
        "9,11",
        "--method",
        method,
        "--top-k",
        "2",
    ]
    machine = ["--device", "cpu", "--workers", "1", "--out", str(out)]
    photo = str(tmp_path / "cat.png")
    assert infer_py.main([photo, *flags, *machine, "--json", "--npz"]) == 0
    answer = json.loads(capfd.readouterr().out)

    seen = explain(photo, finished, blocks=[9, 11], method=method, top_k=2, device="cpu")
    summary = json.loads(json.dumps(seen.summary))
    assert summary | {"photo": photo, "layers": [9, 11], "method": method} == {
        name: value for name, value in answer.items() if name not in ("figure", "npz")
    }
    assert seen.names == [(each["label"], each["probability"]) for each in answer["predictions"]]
    assert seen.blocks == answer["layers"] == [9, 11]
    arrays = np.load(out / "cat.npz")
    assert seen.maps.shape == (2, 60, 90) and seen.maps.dtype == np.float32
    for values, rows in zip(seen.maps, torch.from_numpy(arrays["rows"])):
        grid_map = query_maps(rows.mean(0)[None, None], tuple(arrays["grid"]))[0, 0]
        if method == "relevance":
            grid_map = grid_map / grid_map.sum()
        expected = finished.model.preprocess.to_photo(grid_map.reshape(4, 4), (90, 60))
        np.testing.assert_allclose(values, expected, atol=1e-6)
    assert np.array_equal(np.asarray(seen.figure), np.asarray(Image.open(out / "cat.png")))
    assert Image.open(io.BytesIO(seen._repr_png_())).size == seen.figure.size
    assert capfd.readouterr() == ("", "")


def test_a_photo_is_a_path_bytes_or_an_image(finished, tmp_path, capfd):
    path = tmp_path / "cat.png"
    image = draw_photo(90, 60).convert("RGBA")
    image.putalpha(Image.new("L", image.size, 128))
    exif = Image.Exif()
    exif[274] = 6  # It has to be turned by 90 degrees.
    image.save(path, exif=exif)
    expected = explain(path, finished, device="cpu")
    assert expected.maps.shape == (4, 90, 60)
    assert repr(expected).startswith("<cat.png: ")
    opened = Image.open(path)
    for photo in (str(path), path.read_bytes(), opened, opened):
        seen = explain(photo, finished.model, device="cpu")
        assert seen.names == expected.names
        assert np.array_equal(seen.maps, expected.maps, equal_nan=True)
    assert opened.size == (90, 60) and opened.mode == "RGBA" and opened.getexif()[274] == 6
    pixels = draw_photo(50, 40)
    before = pixels.tobytes()
    explain(pixels, finished, device="cpu")
    assert pixels.size == (50, 40) and pixels.tobytes() == before
    assert capfd.readouterr() == ("", "")


def test_what_is_no_photo_is_refused(finished, tmp_path):
    for photo, message in (
        (tmp_path / "absent.jpg", "no such photo"),
        (b"GIF89a", "photo: cannot be read as a photo"),
        (Image.new("F", (9, 9)), "floating-point numbers"),
    ):
        with pytest.raises(UserError, match=message):
            explain(photo, finished)
    with pytest.raises(TypeError, match="found ndarray; Image.fromarray"):
        explain(np.zeros((9, 9, 3), np.uint8), finished)
    with pytest.raises(TypeError, match="model: expected .* found NoneType"):
        explain(draw_photo(9, 9), None)
    with pytest.raises(UserError, match="still to be loaded"):
        explain(draw_photo(9, 9), finished, img_size=48)
    with pytest.raises(UserError, match="--target"):
        explain(draw_photo(9, 9), finished, target="red")


def test_two_models_are_drawn_and_explored_side_by_side(finished, tiny_saved):
    photo = draw_photo(90, 60)
    alone = explain(photo, finished, blocks="10-11", device="cpu")
    seen = explain(photo, finished, blocks="10-11", compare=tiny_saved, device="cpu")
    assert seen.names == alone.names
    assert seen.figure.height > 2 * alone.figure.height
    page = seen.explorer()
    assert "relevance" in page and str(tiny_saved) in page and "</html>" in page
    assert "srcdoc=" in page._repr_html_()


def test_a_model_that_was_made_has_maps_and_no_names_without_a_classifier():
    model = randomize(minivit.ViT(dataclasses.replace(TINY, num_classes=0)))
    photo = draw_photo(90, 60)
    with pytest.raises(UserError, match="give a preprocess"):
        explain(photo, model)
    model.preprocess = minivit.Preprocess((32, 32))
    seen = explain(photo, model, blocks="11", device="cpu")
    assert seen.names == [] and seen.maps.shape == (1, 60, 90)
    assert repr(seen) == "<photo: no classifier>"
    assert seen.summary["model"] == "a model" and model.origin is None
    assert "</html>" in seen.explorer()


def test_calls_work_in_a_thread_and_with_other_defaults(finished):
    photo = draw_photo(90, 60)
    expected = explain(photo, finished, device="cpu").names
    found = []
    torch.set_default_dtype(torch.float64)
    try:
        thread = threading.Thread(target=lambda: found.append(explain(photo, finished)))
        thread.start()
        thread.join()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert [name for name, _ in found[0].names] == [name for name, _ in expected]


def test_the_names_of_minivit_are_there_and_import_nothing_before_they_are_used():
    code = (
        "import sys, minivit, types\n"
        "assert not {'torch', 'matplotlib', 'minivit.api'} & set(sys.modules)\n"
        "import minivit.look, minivit.train, minivit.infer\n"
        "assert all(hasattr(minivit, name) for name in minivit.__all__)\n"
        "assert not isinstance(minivit.explain, types.ModuleType)\n"
        "from minivit import *\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"


def execute_tutorial(folder, monkeypatch, **replacements: str) -> list[str]:
    """Execute the notebook in a folder, and return what each cell of code prints and shows."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        for before, after in replacements.items():
            cell.source = cell.source.replace(before, after)
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, resources=resources, timeout=500).execute()
    return [str(cell.outputs) for cell in notebook.cells if cell.cell_type == "code"]


def test_the_tutorial_runs_in_ten_cells(tmp_path, monkeypatch):
    smaller = {'"train": 50, "test": 12': '"train": 4, "test": 2', "EPOCHS = 6": "EPOCHS = 1"}
    shown = execute_tutorial(tmp_path, monkeypatch, **smaller)
    assert len(shown) == 10
    for number, part in ((2, "image/png"), (3, "image/png"), (4, "epoch 1/1"), (4, "\\repoch 1")):
        assert part in shown[number - 1], number
    for number, part in ((5, "image/png"), (6, "image/png"), (7, "before: washing machine")):
        assert part in shown[number - 1], number
    for number, part in ((8, "image/png"), (9, "srcdoc="), (10, "Ginger_Tabby")):
        assert part in shown[number - 1], number
    assert not any("Traceback" in outputs or "Warning" in outputs for outputs in shown)


@pytest.mark.slow
def test_the_tutorial_learns_to_see_the_cat(tmp_path, monkeypatch):
    shown = execute_tutorial(tmp_path, monkeypatch)
    assert "before: washing machine" in shown[6] and "after: Ginger_Tabby" in shown[6]
    accuracy = float(re.search(r"test accuracy (0\.\d+|1\.0+)", shown[3])[1])
    assert accuracy > 0.8


def test_the_tutorial_is_stored_with_its_pictures_and_is_small():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert NOTEBOOK.stat().st_size < 400_000
    assert [cell["execution_count"] for cell in cells] == list(range(1, 11))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert sum("image/jpeg" in output.get("data", {}) for output in outputs) == 5
    assert not any(output["output_type"] == "error" for output in outputs)
    assert not any(output.get("name") == "stderr" for output in outputs)
    assert not re.search("/(?:tmp|root|home|work)/", json.dumps(notebook))
