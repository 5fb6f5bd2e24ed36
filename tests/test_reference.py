"""Photos unlike the training photos: the file of a run, and what infer.py says with it."""

from __future__ import annotations

import base64
import json
import re
import shutil

import pytest
import torch
from conftest import leave_figures_empty, run_train
from PIL import Image
from torch.testing import assert_close

import infer
from minivit import load_pretrained, open_photo
from minivit.data.datasets import load_data
from minivit.errors import UserError
from minivit.training import reference
from minivit.training.run_folder import REFERENCE


def test_the_distance_is_the_mean_to_the_two_nearest_photos():
    """By hand, on a line: from 4, the nearest of 0, 1, 5 and 9 are 5 and 1."""
    features = torch.tensor([[0.0], [1.0], [5.0], [9.0]])
    assert reference.NUM_NEIGHBOURS == 2
    assert reference.distances_to(features, torch.tensor([[4.0], [9.0]])).tolist() == [2.0, 2.0]
    assert reference.distances_to(features[:1], torch.tensor([[4.0]])).tolist() == [4.0]


@pytest.mark.parametrize("n", [1, 18, 19, 20, 30, 39, 100])
def test_a_new_photo_exceeds_the_threshold_one_time_in_twenty(n):
    """Of n + 1 distances, each is the new photo's in turn, and the others are of validation."""
    distances = torch.randperm(n + 1, generator=torch.Generator().manual_seed(0)).float()
    num_unlike = 0
    for new in range(n + 1):
        others = torch.cat([distances[:new], distances[new + 1 :]])
        threshold = reference.choose_threshold(others)
        assert threshold in others
        num_unlike += int(distances[new] > threshold)
    rate = num_unlike / (n + 1)
    assert rate <= max(0.05, 1 / (n + 1))
    assert rate > 0.05 - 1 / (n + 1)


@pytest.fixture(scope="module")
def run(tiny_saved, shapes_data, tmp_path_factory):
    data = tmp_path_factory.mktemp("data") / "shapes"
    shutil.copytree(shapes_data, data)
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        leave_figures_empty(patch)
        flags = ("--epochs", "2", "--cache-views", "0", "--keep", "best", "--calibrate", "on")
        assert run_train(tiny_saved, data, out, *flags) == 0
    return out, data


@torch.no_grad()
def read_by_head(model, paths):
    images = torch.stack([model.preprocess(open_photo(path)) for path in paths])
    return model.head_inputs(model.tokens(images))


def test_a_run_keeps_what_the_head_reads_of_its_training_photos(run):
    out, folder = run
    model = load_pretrained(out)
    found = reference.find_reference(model)
    data = load_data(folder, seed=0)
    assert found.paths == data.train.paths
    assert found.labels == [data.classes[label] for label in data.train.labels]
    # float16 keeps 11 bits.
    features = read_by_head(model, data.train.paths)
    assert_close(found.features, features, rtol=1e-3, atol=1e-3)

    summary = json.loads((out / "summary.json").read_text())["unlike_training"]
    assert summary["threshold"] == found.threshold
    for name in ("val", "test"):
        inputs = read_by_head(model, getattr(data, name).paths)
        distances = reference.distances_to(found.features, inputs)
        rate = (distances > found.threshold + 1e-4).float().mean().item()
        assert summary[f"{name}_rate"] == pytest.approx(rate)
        assert_close(torch.tensor([each.distance for each in found.compare(inputs)]), distances)
    assert summary["val_rate"] == 0  # a twentieth of 3 photos
    card = (out / "README.md").read_text()
    assert "of 0.0% of the validation photos" in card
    assert f"of {summary['test_rate']:.1%} of the test photos" in card


def test_a_photo_is_nearest_to_itself(run):
    out, _ = run
    model = load_pretrained(out)
    found = reference.find_reference(model)
    (comparison,) = found.compare(read_by_head(model, found.paths[7:8]))
    nearest = comparison.nearest
    assert len(nearest) == reference.NUM_SHOWN
    assert (nearest[0].path, nearest[0].label) == (found.paths[7], found.labels[7])
    distances = [each.distance for each in nearest]
    assert distances == sorted(distances)
    assert distances[0] < 0.05 < distances[1]  # the rounding of float16, and of the product
    assert comparison.distance == pytest.approx(sum(distances[:2]) / 2)


def ask(capsys, *arguments):
    assert infer.main([*map(str, arguments), "--device", "cpu", "--amp", "off"]) == 0
    return capsys.readouterr()


@pytest.fixture
def odd_photo(tmp_path):
    """A photo of none of the colours that the classes have."""
    path = tmp_path / "odd.png"
    Image.new("RGB", (50, 40), (255, 255, 255)).save(path)
    return path


@pytest.mark.parametrize(
    "more", [["--no-figures"], ["--method", "relevance"], ["--heads"]], ids=str
)
def test_infer_says_which_photo_is_unlike_the_training_photos(
    run, odd_photo, tmp_path, capsys, no_figures, more
):
    out, folder = run
    usual = load_data(folder, seed=0).train.paths[0]
    more = [*more, "--out", tmp_path / "out"]
    text = ask(capsys, odd_photo, usual, "--model", out, *more).out
    (line,) = [line for line in text.splitlines() if line.startswith("unlike")]
    assert re.fullmatch(r"unlike the training photos \(distance [\d.]+ over [\d.]+\)", line)
    assert text.index(line) < text.index(str(usual))
    # A tail is read with its base, and its run is the same.
    for model in (out, out / "tail.safetensors"):
        printed = ask(capsys, odd_photo, usual, "--model", model, "--json", *more).out
        odd, like = map(json.loads, printed.splitlines())
        assert (odd["unlike_training"], like["unlike_training"]) == (True, False)
        assert f"(distance {odd['distance']:.3g} over {odd['threshold']:.3g})" in line


def test_the_figure_and_the_page_say_it_too(run, odd_photo, tmp_path, capsys, monkeypatch):
    from minivit.figures import panels

    out, folder = run
    titles = []
    monkeypatch.setattr(
        panels, "draw_attention", lambda path, figure: titles.append(figure.title) or path.touch()
    )
    ask(capsys, odd_photo, "--model", out, "--html", "--layers", "11", "--out", tmp_path / "out")
    assert titles[0][1].endswith(", unlike the training photos")
    page = (tmp_path / "out" / "odd.html").read_text()
    (pane,) = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])["panes"]
    assert pane["comparison"].startswith("Unlike the training photos: distance ")
    assert [each[0] in ("red", "green", "blue") for each in pane["nearest"]] == [True] * 5
    for _, name, image in pane["nearest"]:
        assert re.fullmatch(r"\d+\.png", name)
        assert base64.b64decode(image.partition("base64,")[2])[:2] == b"\xff\xd8"  # a JPEG

    moved = folder.rename(tmp_path / "moved")
    try:
        ask(capsys, odd_photo, "--model", out, "--html", "--layers", "11", "--out", tmp_path / "2")
    finally:
        moved.rename(folder)
    page = (tmp_path / "2" / "odd.html").read_text()
    (pane,) = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])["panes"]
    assert [each[2] for each in pane["nearest"]] == [""] * 5


def test_without_the_file_or_with_another_model_nothing_is_said(
    run, tiny_saved, odd_photo, tmp_path, capsys
):
    out, _ = run
    copied = tmp_path / "copied"
    shutil.copytree(tiny_saved, copied)
    shutil.copy(out / REFERENCE, copied)  # of another model
    for model in (tiny_saved, copied):
        printed = ask(capsys, odd_photo, "--model", model, "--no-figures", "--json").out
        assert "unlike" not in printed and "distance" not in printed
    printed = ask(capsys, odd_photo, "--model", out, "--img-size", "40", "--no-figures", "--json")
    assert "unlike_training" not in printed.out
    assert f"{out / REFERENCE}: photos were compared at [32, 32] pixels" in printed.err


def test_a_damaged_file_is_named(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    path = tmp_path / "run" / REFERENCE
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=f"{REFERENCE}: cannot be read"):
        reference.find_reference(load_pretrained(tmp_path / "run"))


def test_of_many_photos_a_seeded_sample_is_kept(run, tmp_path, monkeypatch):
    out, folder = run
    monkeypatch.setattr(reference, "MAX_PHOTOS", 10)
    data = load_data(folder, seed=0)
    inputs = torch.randn(len(data.train), 24)
    model = load_pretrained(out)
    samples = []
    for seed in (1, 1, 2):
        path = tmp_path / "run" / REFERENCE
        shutil.copytree(out, tmp_path / "run", dirs_exist_ok=True)
        features, _ = reference.save_reference(path, model, data, inputs, inputs[:3], seed)
        assert features.shape == (10, 24)
        found = reference.find_reference(load_pretrained(tmp_path / "run"))
        for row, photo in zip(found.features, found.paths):
            assert_close(row, inputs[data.train.paths.index(photo)], rtol=1e-3, atol=1e-3)
        samples.append(found.paths)
    assert samples[0] == samples[1] != samples[2]
