"""The drawings of the demo: animals, rooms, masks, and the data set made from them."""

from __future__ import annotations

import hashlib
import sys
import xml.etree.ElementTree as ET
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image, ImageChops

from minivit.data.datasets import load_data
from minivit.tools.demo import scenes
from minivit.tools.demo.animals import BREEDS as ALL_BREEDS
from minivit.tools.demo.drawings import BREEDS, draw_pets

sys.path.insert(0, str(ROOT / "benchmarks"))
from pretrain_demo import PATTERNS, random_breed


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    root = tmp_path_factory.mktemp("pets")
    draw_pets(root, per_breed=(4, 2), seed=5, workers=2)
    return root


@pytest.mark.parametrize("thing", scenes.OBJECTS)
def test_a_thing_is_drawn_where_it_stands_and_nowhere_else(thing):
    furnished = scenes.draw_scene(np.random.default_rng(2), thing, None, size=(200, 150))
    empty = scenes.draw_scene(np.random.default_rng(2), None, None, size=(200, 150))
    assert furnished.photo.size == (200, 150)
    assert furnished.head is None
    assert set(np.unique(furnished.mask)) == {scenes.BACKGROUND}
    assert ImageChops.difference(furnished.photo, empty.photo).getbbox() is not None


@pytest.mark.parametrize("breed", ALL_BREEDS)
def test_an_animal_is_under_its_mask_and_its_head_in_the_box(breed):
    for seed in range(6):
        rng = np.random.default_rng(seed)
        photo, mask, head = scenes.draw_scene(rng, "sofa", ALL_BREEDS[breed])
        values = np.asarray(mask)
        left, top, right, bottom = head
        assert photo.size == mask.size
        assert set(np.unique(values)) == {scenes.PET, scenes.BACKGROUND, scenes.BORDER}
        pet = values == scenes.PET
        assert 0.01 < pet.mean() < 0.4
        assert 0 <= left < right <= photo.width
        assert 0 <= top < bottom <= photo.height
        inside = pet[top:bottom, left:right]
        assert inside.mean() > 0.35  # The ears leave corners empty.
        assert inside.sum() < pet.sum()  # The body continues below the head.
        # The border lies around the pet: no pet pixel lies outside of it.
        ys, xs = np.nonzero(values == scenes.BORDER)
        assert xs.min() - 1 <= np.nonzero(pet)[1].min()
        assert xs.max() + 1 >= np.nonzero(pet)[1].max()
        assert ys.min() <= np.nonzero(pet)[0].min()


def test_the_animals_pixels_change_with_the_breed_only_inside_its_mask():
    light = scenes.draw_scene(np.random.default_rng(7), None, ALL_BREEDS["Siamese"])
    dark = scenes.draw_scene(np.random.default_rng(7), None, ALL_BREEDS["Tuxedo_Cat"])
    differs = np.abs(np.asarray(light.photo, np.int16) - np.asarray(dark.photo)).max(-1) > 25
    assert differs.any()
    assert (np.asarray(light.mask) != scenes.BACKGROUND)[differs].mean() > 0.95


def test_a_scale_gives_the_same_scene_in_more_pixels():
    size = (200, 150)
    small = scenes.draw_scene(np.random.default_rng(3), "bed", None, size=size, scale=1)
    large = scenes.draw_scene(np.random.default_rng(3), "bed", None, size=size, scale=2)
    assert large.photo.size == (400, 300)
    assert np.abs(np.asarray(large.photo.reduce(2), np.int16) - np.asarray(small.photo)).mean() < 8


def test_random_animals_are_many_and_valid():
    rng = np.random.default_rng(0)
    breeds = [random_breed(rng) for _ in range(40)]
    assert len(set(breeds)) == 40
    assert {breed.pattern for breed in breeds} == set(PATTERNS)
    for breed in breeds[:8]:
        assert (np.asarray(scenes.draw_scene(rng, None, breed).mask) == scenes.PET).any()


def test_drawn_pets_are_in_the_originals_layout(pets):
    folder = pets / "oxford-iiit-pet"
    data = load_data(pets, seed=0)
    assert data.classes == tuple(name.replace("_", " ") for name in BREEDS)
    assert [len(split) for split in (data.train, data.val, data.test)] == [18, 6, 12]
    for path in data.test.paths:
        with (
            Image.open(folder / "annotations" / "trimaps" / f"{path.stem}.png") as mask,
            Image.open(path) as photo,
        ):
            assert mask.size == photo.size
            assert (np.asarray(mask) == scenes.PET).any()
    boxes = sorted((folder / "annotations" / "xmls").iterdir())
    assert Counter(path.stem.rsplit("_", 1)[0] for path in boxes) == dict.fromkeys(BREEDS, 4)
    tree = ET.parse(folder / "annotations" / "xmls" / "Husky_1.xml")
    assert tree.findtext("object/name") == "dog"
    assert int(tree.findtext("object/bndbox/xmax")) > int(tree.findtext("object/bndbox/xmin"))


def test_torchvision_reads_drawn_pets(pets):
    from torchvision.datasets import OxfordIIITPet

    test = OxfordIIITPet(
        pets, split="test", target_types=["category", "segmentation"], download=False
    )
    assert len(test) == 12
    photo, (label, mask) = test[11]
    with mask:
        assert photo.size == mask.size
    assert label == 5


def test_one_seed_gives_one_data_set_whatever_the_number_of_workers(pets, tmp_path):
    def digest(root):
        files = sorted(path for path in root.rglob("*") if path.is_file())
        return [
            (path.relative_to(root), hashlib.sha256(path.read_bytes()).hexdigest())
            for path in files
        ]

    draw_pets(tmp_path / "same", per_breed=(4, 2), seed=5, workers=1)
    draw_pets(tmp_path / "other", per_breed=(1, 0), seed=6, workers=1)
    assert digest(tmp_path / "same") == digest(pets)
    others = [file for file in digest(tmp_path / "other") if file[0].suffix == ".jpg"]
    assert len(others) == len(BREEDS)
    assert not set(others) & set(digest(pets))


def test_drawing_again_replaces_the_earlier_drawing_as_a_whole(tmp_path):
    for per_breed in ((2, 2), (1, 1)):
        draw_pets(tmp_path, per_breed=per_breed, seed=0, workers=1)
    assert len(list((tmp_path / "oxford-iiit-pet" / "images").iterdir())) == 2 * len(BREEDS)
    assert [path.name for path in tmp_path.iterdir()] == ["oxford-iiit-pet"]


def test_a_drawing_that_is_interrupted_leaves_the_earlier_one(tmp_path, monkeypatch):
    draw_pets(tmp_path, per_breed=(1, 1), seed=0, workers=1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(scenes, "draw_scene", interrupt)
    with pytest.raises(KeyboardInterrupt):
        draw_pets(tmp_path, per_breed=(2, 1), seed=0, workers=1)
    pets = tmp_path / "oxford-iiit-pet"
    assert {path: path.read_bytes() for path in pets.rglob("*") if path.is_file()} == before
