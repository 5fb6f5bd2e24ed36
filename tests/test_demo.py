"""The whole of `make demo`: the slowest test, and the only one that uses every part."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from minivit import load_pretrained, open_photo, query_maps
from minivit.checkpoints.hub import DEMO
from minivit.data.datasets import load_data
from minivit.errors import UserError
from minivit.tools.demo import command as demo
from minivit.tools.demo import drawings, scenes

sys.path.insert(0, str(ROOT / "benchmarks"))
from pretrain_demo import random_breed


@pytest.fixture(scope="module", params=["a tenth", pytest.param("whole", marks=pytest.mark.slow)])
def story(request, tmp_path_factory):
    """Return the story's folder, what it printed, and whether it was the whole story.

    The whole story runs in processes, and a tenth of it in this one.
    """
    out = tmp_path_factory.mktemp("demo") / "story"
    printed = io.StringIO()
    if request.param == "whole":
        command = [sys.executable, "-m", "minivit", "demo", "--out", out]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return out, done.stdout, True
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(demo, "PER_BREED", (12, 4))
        patch.setattr(
            demo, "TRAINING", ("--epochs", "4", "--batch-size", "8", "--lr", "3e-3", "--amp", "off")
        )
        assert demo.main(["--out", str(out)]) == 0
    return out, printed.getvalue(), False


def attention_on_the_animal(model, data) -> np.ndarray:
    """Return the class token's attention on the animal in times chance: (2, test photos).

    The two rows are blocks 10 and 11. Chance is the animal's share of the photo's area.
    """
    shares = []
    for path in data.test.paths:
        with torch.inference_mode():
            _, attn = model.forward_with_attention(
                model.preprocess(open_photo(path))[None], [10, 11], queries=[0]
            )
        maps = []
        for block in (10, 11):
            maps.append(query_maps(attn[block], model.config.grid)[0].mean(0))
        trimap = path.parents[1] / "annotations" / "trimaps" / f"{path.stem}.png"
        mask = np.asarray(Image.open(trimap).resize((224, 224), Image.Resampling.NEAREST))
        pet = (mask == scenes.PET).reshape(14, 16, 14, 16).mean((1, 3))
        room = (mask == scenes.BACKGROUND).reshape(14, 16, 14, 16).mean((1, 3))
        looked = np.stack(maps)
        on_pet = (looked * pet).sum((1, 2))
        on_room = (looked * room).sum((1, 2))
        chance = pet.sum() / (pet.sum() + room.sum())
        shares.append(on_pet / (on_pet + on_room) / chance)
    return np.array(shares).T


def test_the_embedded_checkpoint_is_small_and_transformers_reads_it():
    from transformers import AutoModelForImageClassification

    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= 3_000_000
    ours = load_pretrained("demo")
    theirs = AutoModelForImageClassification.from_pretrained(DEMO, dtype=torch.float32)
    assert ours.labels == tuple(scenes.OBJECTS) == tuple(theirs.config.id2label.values())
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images).logits, rtol=0, atol=1e-4)


def test_the_embedded_checkpoint_names_objects_in_rooms_it_has_not_seen():
    model, rng = load_pretrained("demo"), np.random.default_rng(20)
    rooms = [draw_photo_of(model, rng, thing) for _ in range(3) for thing in model.labels]
    with torch.no_grad():
        predicted = model(torch.stack(rooms)).argmax(1)
    assert (predicted == torch.arange(30) % 10).float().mean() >= 0.9


def draw_photo_of(model, rng, thing):
    return model.preprocess(scenes.draw_scene(rng, thing, random_breed(rng)).photo)


def test_breeds_are_learnt_and_attention_moves_to_the_animal(story):
    out, _, whole = story
    summary = json.loads((out / "run" / "summary.json").read_text())
    assert summary["test_accuracy"] >= (0.95 if whole else 0.3)  # Chance is 0.17.
    data = load_data(out / "drawings", seed=0)
    models = load_pretrained("demo"), load_pretrained(out / "run")
    attention = [attention_on_the_animal(model, data) for model in models]
    # Measured: 2.9 and 2.0 times as much as before, and 1.8 and 1.4 after a tenth of the story.
    factors = (2, 1.5) if whole else (1.3, 1.2)
    for block, before, after, factor in zip((10, 11), *attention, factors):
        gain = after - before  # (test photos,)
        # With -s, this prints the numbers in the README.
        print(f"block {block}: {before.mean():.2f} times chance before, {after.mean():.2f} after")
        assert after.mean() >= factor * before.mean()
        assert gain.mean() - 3 * gain.std() / len(gain) ** 0.5 > 0
    images = models[0].preprocess(open_photo(data.test.paths[0]))[None]
    with torch.inference_mode():
        before, after = (model.forward_with_attention(images, range(10))[1] for model in models)
    for block in range(10):  # the frozen ones
        assert torch.equal(before[block], after[block])


def test_the_story_is_told_and_points_at_what_is_there(story):
    out, printed, whole = story
    before, rest = printed.split("$ python -m minivit train")
    training, after = rest.split("$ python -m minivit infer")
    for i, (thing, breed, _) in enumerate(demo.STORY):
        names_before = re.findall(r"^\d\.\d{3}  (.+)$", before, re.M)
        names_after = re.findall(r"^\d\.\d{3}  (.+)$", after, re.M)  # two from each model
        assert names_before[2 * i] == thing
        assert names_after[4 * i] == thing
        if whole:
            assert names_after[4 * i + 2] == breed.replace("_", " ")
        assert (out / "after" / f"{breed.replace('_', ' ')} and {thing}.html").is_file()
    assert "test accuracy" in training
    assert re.search(r"blocks 10-11 +223,680 +223,680", training)
    listed = re.findall(rf"^  ({re.escape(str(out))}\S*) ", printed, re.M)
    assert len(listed) == 7
    assert re.search(r"^block 11 of .* times chance on the pet .*: more ", after, re.M)
    # The sentence of drop, which only the whole story's model has learnt enough for.
    verdict = json.loads((out / "drop" / "drop.json").read_text())["sentence"]
    assert verdict in after
    if whole:
        assert verdict.startswith("The answer comes from the pet: ")
    for name in listed:
        figures = [out / name]
        if (out / name).is_dir():
            figures = sorted((out / name).glob("*.png"))
        assert figures
        for path in figures:
            with Image.open(path) as figure:
                assert figure.width > 300


def test_what_fails_inside_ends_the_story_with_its_exit_code(tmp_path, monkeypatch):
    codes = iter([0, 2])
    monkeypatch.setattr(demo, "PER_BREED", (1, 1))
    for name in demo.COMMANDS:
        monkeypatch.setitem(demo.COMMANDS, name, lambda flags: next(codes))
    assert demo.main(["--out", str(tmp_path / "out"), "--workers", "1"]) == 2


def test_drawings_take_the_place_of_drawings_only(tmp_path):
    pets = tmp_path / "oxford-iiit-pet"
    (pets / "annotations").mkdir(parents=True)
    (pets / "annotations" / "trainval.txt").write_text("Abyssinian_1 1 1 1\n")
    with pytest.raises(UserError, match="holds oxford-iiit-pet, which minivit did not write"):
        drawings.draw_pets(tmp_path, per_breed=(1, 1), seed=0, workers=1)
    (pets / "annotations" / "trainval.txt").write_text("Ginger_Tabby_1 1 1 1\n")
    drawings.draw_pets(tmp_path, per_breed=(1, 1), seed=0, workers=1)
    assert len(list((pets / "images").iterdir())) == 2 * len(drawings.NAMES)
