"""Tests of score: each metric by hand, the geometry of masks, and the command as a user runs it."""

from __future__ import annotations

import csv
import json
import re
import shutil
import weakref
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import randomize, run_train
from PIL import Image
from torch.testing import assert_close

from minivit import Preprocess, ViT, ViTConfig, load_pretrained, query_maps, save_pretrained
from minivit.attention import METHODS, class_relevance, rollout
from minivit.data.datasets import load_data
from minivit.errors import UserError
from minivit.system import workers
from minivit.tools.score import (
    command,
    figure,
    gallery,
    masks,
    measure,
    models,
    outputs,
    report,
    statistics,
)
from minivit.tools.score.region_scores import region_scores
from minivit.training import run_photos

CROP = Preprocess(36, (32, 32), 3)
XML = (
    "<annotation><object><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax>"
    "</bndbox></object></annotation>"
)


def read_regions(path, size, preprocess, grid):
    edges = masks.patch_edges(preprocess.box(size), grid)
    regions = [read(path, size, edges) for read in (masks.read_pet_region, masks.read_head_region)]
    return torch.from_numpy(np.stack(regions))


# Metrics


def test_scores_of_a_map_by_hand():
    maps = torch.tensor([[[0.4, 0.3, 0.2, 0.1], [0.1, 0.4, 0.2, 0.3]]])
    inside = torch.tensor([[1, 0, 0.5, 0]])
    outside = torch.tensor([[0, 1, 0.25, 1]])  # A quarter of patch 2 is border.
    first, second = region_scores(maps, inside, outside)[0].tolist()
    assert first == pytest.approx(
        [0.5 / 0.95, 0.5 / 0.95 / 0.4, 1, (1 * 1 + 0.5 * 1.5 / 2.75) / 1.5]
    )
    assert second == pytest.approx(
        [0.2 / 0.95, 0.2 / 0.95 / 0.4, 0, (0.5 * 0.5 / 2.75 + 1 * 1.5 / 3.75) / 1.5]
    )


def test_a_map_all_on_the_region_scores_1_and_all_around_it_0():
    inside = torch.tensor([[0.0, 1, 1, 0, 0, 0]])
    on, off = region_scores(torch.stack([inside, 1 - inside], 1), inside, 1 - inside)[0]
    assert on.tolist() == [1, 3, 1, 1]
    assert off[:3].tolist() == [0, 0, 0]
    assert off[3] == pytest.approx(1 / 3)  # The region is found only when everything is.


def test_the_border_is_neither_inside_nor_outside():
    inside, outside = torch.tensor([[1.0, 0, 0]]), torch.tensor([[0.0, 1, 0]])
    for at_border in (0.0, 0.6):
        found = region_scores(torch.tensor([[[0.3, 0.1, at_border]]]), inside, outside)
        assert_close(found, torch.tensor([[[0.75, 1.5, 1, 1]]]))


@pytest.mark.parametrize(
    "maps", [torch.zeros(1, 1, 4), torch.full((1, 1, 4), 0.2), torch.tensor([[[0.0, 0, 0, 0.9]]])]
)
def test_an_even_map_scores_as_chance_and_so_does_an_empty_one(maps):
    inside = torch.tensor([[1.0, 0, 0.2, 0]])
    outside = torch.tensor([[0.0, 1, 0.8, 0]])  # Patch 3 is all border.
    assert_close(region_scores(maps, inside, outside), torch.tensor([[[0.4, 1, 1 / 3, 0.4]]]))


def test_a_region_without_area_has_no_scores():
    inside = torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0]])
    for outside in (1 - inside, torch.zeros(2, 4)):
        found = region_scores(torch.rand(2, 3, 4), inside, outside)
        assert found[0].isnan().all() and not found[1].isnan().any()


def average_precision(labels, values):
    """scikit-learn's definition: the sum over thresholds of (recall gained) x precision."""
    total, recall = 0, 0
    for threshold in sorted(set(values), reverse=True):
        chosen = values >= threshold
        precision, now = labels[chosen].mean(), labels[chosen].sum() / labels.sum()
        total, recall = total + (now - recall) * precision, now
    return total


@pytest.mark.parametrize("levels", [4, 10_000], ids=["many ties", "few ties"])
def test_average_precision_and_pointing_are_those_of_the_pixels(levels):
    rng = np.random.default_rng(levels)
    maps = rng.integers(0, levels, (3, 2, 16)) / np.float32(levels)
    parts = rng.integers(0, 11, (3, 2, 16))
    parts[:, :, :3] = 0  # border only
    inside = np.minimum(parts[:, 0], 10)
    outside = np.minimum(parts[:, 1], 10 - inside)  # of 10 pixels a patch
    found = region_scores(
        torch.from_numpy(maps), *(torch.from_numpy(p / np.float32(10)) for p in (inside, outside))
    )
    for b, m in np.ndindex(3, 2):
        labels = np.concatenate([[1] * i + [0] * o for i, o in zip(inside[b], outside[b])])
        values = np.repeat(maps[b, m], inside[b] + outside[b])
        assert found[b, m, 3].item() == pytest.approx(average_precision(labels, values), abs=1e-5)
        known = inside[b] + outside[b] > 0
        largest = known & (maps[b, m] == maps[b, m][known].max())
        assert found[b, m, 2].item() == pytest.approx((inside[b] > outside[b])[largest].mean())


def test_intervals_are_those_of_the_mean_over_photos():
    values = np.random.default_rng(1).normal(3, 2, (400, 2, 3)).astype(np.float32)
    mean, low, high = statistics.bootstrap(values)
    assert mean.shape == (2, 3)
    np.testing.assert_allclose(mean, values.mean(0), rtol=1e-5)
    half = 1.96 * values.std(0) / 20
    # With 1,000 resamples, each end is off by some 5%.
    np.testing.assert_allclose(mean - low, half, rtol=0.15)
    np.testing.assert_allclose(high - mean, half, rtol=0.15)
    mean, low, high = statistics.bootstrap(values[:1])
    assert (mean == values[0]).all() and np.isnan(low).all() and np.isnan(high).all()


# Masks


def write_pet(root, stem, mask, head=None, photo=None):
    """Write a photo, white where the pet is, its trimap and, if given, its head box."""
    folders = [root / "images", root / "annotations" / "trimaps", root / "annotations" / "xmls"]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    white = np.repeat(np.where(mask == 1, 255, 0).astype(np.uint8)[..., None], 3, -1)
    with (folders[0] / f"{stem}.jpg").open("wb") as file:
        (photo or Image.fromarray(white)).save(file, "PNG")
    if mask is not None:
        Image.fromarray(mask).save(folders[1] / f"{stem}.png")
    if head:
        (folders[2] / f"{stem}.xml").write_text(XML.format(*head))
    return folders[0] / f"{stem}.jpg"


def blob(W, H, box):
    mask = np.full((H, W), 2, np.uint8)
    left, top, right, bottom = box
    mask[top:bottom, left:right] = 1
    return mask


@pytest.mark.parametrize(
    "preprocess", [Preprocess((32, 32)), Preprocess((32, 48)), CROP], ids=["squash", "wide", "crop"]
)
@pytest.mark.parametrize(
    "size", [(50, 40), (31, 77), (300, 90)], ids=["landscape", "portrait", "strip"]
)
def test_masks_go_through_the_photos_geometry(tmp_path, preprocess, size):
    W, H = size
    mask = blob(W, H, (W // 3, H // 4, W // 3 + W // 4, H // 4 + H // 3))
    path = write_pet(tmp_path, "a", mask)
    grid = preprocess.size[0] // 8, preprocess.size[1] // 8
    pet, around = read_regions(path, size, preprocess, grid)[0]
    assert_close(pet + around, torch.ones_like(pet))
    pixels = preprocess.pixels(Image.open(path)).float().mean(0) / 255  # white is pet
    seen = pixels.unflatten(0, (grid[0], 8)).unflatten(2, (grid[1], 8)).mean((1, 3)).flatten()
    # Resampling blurs the edge across patches. Another row or column would be 0.2 off.
    assert_close(pet, seen, rtol=0, atol=0.07)
    assert pet.max() > 0.5


def test_masks_are_averaged_by_area_without_their_border(tmp_path):
    rng = np.random.default_rng(0)
    mask = rng.integers(1, 4, (41, 53)).astype(np.uint8)
    # Pixels are counted from 1, and the last row and column belong to the box.
    path = write_pet(tmp_path, "a", mask, head=(11, 5, 30.0, 20))
    regions = read_regions(path, (53, 41), Preprocess((32, 48)), (4, 6))
    assert regions.shape == (2, 2, 24) and regions.dtype == torch.float32
    for found, value in zip(regions[0], (1, 2)):
        # Each patch covers a whole number of these finer pixels.
        fine = (mask == value).repeat(4, 0).repeat(6, 1)
        assert_close(
            found.double(),
            torch.from_numpy(fine.reshape(4, 41, 6, 53).mean((1, 3))).flatten(),
            rtol=0,
            atol=1e-6,
        )
    fine = np.zeros((41 * 4, 53 * 6))
    fine[4 * 4 : 20 * 4, 10 * 6 : 30 * 6] = 1
    assert_close(
        regions[1, 0].double(),
        torch.from_numpy(fine.reshape(4, 41, 6, 53).mean((1, 3))).flatten(),
        rtol=0,
        atol=1e-6,
    )
    assert_close(regions[1].sum(0), torch.ones(24))


def test_a_head_box_that_is_absent_or_not_seen_has_no_area(tmp_path):
    path = write_pet(tmp_path, "a", blob(100, 40, (40, 10, 60, 30)), head=(1, 1, 9, 9))
    assert (read_regions(path, (100, 40), CROP, (4, 4))[1] == 0).all()
    assert (read_regions(path, (100, 40), Preprocess((32, 32)), (4, 4))[1].sum(0) == 1).all()
    path = write_pet(tmp_path, "b", blob(100, 40, (40, 10, 60, 30)))
    assert (read_regions(path, (100, 40), Preprocess((32, 32)), (4, 4))[1] == 0).all()


def test_a_head_box_is_read_as_oxford_counts_pixels(tmp_path):
    blank = blob(20, 10, (0, 0, 20, 10))
    one_pixel = write_pet(tmp_path, "a", blank, head=(7, 3, 7, 3))
    assert np.argwhere(masks.read_head_mask(one_pixel, (20, 10))).tolist() == [[2, 6]]
    whole_photo = write_pet(tmp_path, "b", blank, head=(1, 1, 20, 10))
    assert masks.read_head_mask(whole_photo, (20, 10)).all()
    # Each of two pets has a head, and a box may stick out of the photo.
    two = write_pet(tmp_path, "c", blank, head=(0, 0, 2, 2))
    xml = masks.head_box_path(two)
    second = XML.format(20, 9, 25, 12)
    xml.write_text(xml.read_text().replace("</annotation>", second.partition(">")[2]))
    rows, columns = np.nonzero(masks.read_head_mask(two, (20, 10)))
    assert list(zip(rows, columns)) == [(0, 0), (0, 1), (1, 0), (1, 1), (8, 19), (9, 19)]
    assert masks.read_head_mask(write_pet(tmp_path, "d", blank), (20, 10)) is None


SIZED = "<annotation><size><width>{}</width><height>{}</height></size></annotation>"


@pytest.mark.parametrize(
    "xml, reason",
    [
        (XML.format(1, 1, "inf", 9), "head box cannot be read"),
        (XML.format(1, 1, "", 9), "head box cannot be read"),
        (XML.replace("xmax", "right").format(1, 1, 9, 9), "head box cannot be read"),
        ("<annotation><object>", "head box cannot be read"),
        (XML.format(9, 1, 8, 9), "head box without an area in the photo"),
        (XML.format(33, 1, 40, 9), "head box without an area in the photo"),
        (XML.format(-9, 1, 0, 9), "head box without an area in the photo"),
        (SIZED.format(64, 64), "head box for another size of the photo"),
        (SIZED.format(32, 32), ""),
        ("<annotation></annotation>", ""),
    ],
)
def test_a_useless_head_box_costs_the_head_and_is_named(tmp_path, xml, reason):
    path = write_pet(tmp_path, "a", blob(32, 32, (0, 0, 8, 8)), head=(1, 1, 8, 8))
    masks.head_box_path(path).write_text(xml)
    (read,) = masks.read_pets([path], Preprocess((32, 32)), (4, 4))
    assert read.head_problem == reason
    assert read.regions[0, 0].sum() == 1 and not read.regions[1].any()


@pytest.mark.parametrize(
    "values",
    [
        blob(32, 32, (0, 0, 8, 8)) - 1,  # 0 for the pet
        255 * (blob(32, 32, (0, 0, 8, 8)) % 2),
        np.stack([blob(32, 32, (0, 0, 8, 8))] * 3, -1),
        blob(32, 32, (0, 0, 8, 8)) == 1,
    ],
    ids=["0 and 1", "0 and 255", "in colour", "one bit"],
)
def test_masks_of_other_values_are_not_guessed_at(tmp_path, values):
    path = write_pet(tmp_path, "a", blob(32, 32, (0, 0, 8, 8)))
    Image.fromarray(values).save(masks.mask_path(path))
    (reason,) = masks.read_pets([path], Preprocess((32, 32)), (4, 4))
    assert reason == "mask with values other than 1, 2 and 3"


def own_mask(tmp_path, image: Image.Image, place: str = "masks/cat/1.png") -> np.ndarray:
    """Write a photo of 6 x 4 pixels and a mask of one's own, and read the mask."""
    (tmp_path / "cat").mkdir(exist_ok=True)
    Image.new("RGB", (6, 4)).save(tmp_path / "cat" / "1.jpg")
    file = tmp_path / place
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, "PNG")
    return masks.read_mask(tmp_path / "cat" / "1.jpg", (6, 4))


GREY = np.array([[0, 127, 128, 255, 0, 0]] * 4, np.uint8)


@pytest.mark.parametrize("place", ["masks/cat/1.png", "masks/1.png"])
@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(GREY),
        Image.fromarray(np.stack([GREY] * 3, 2)),
        Image.fromarray(GREY.astype(np.uint16) * 257),
        Image.fromarray(GREY).convert("P"),
        Image.fromarray(GREY > 127),
        Image.fromarray(np.stack([np.full_like(GREY, 255)] * 3 + [GREY], 2)),
    ],
    ids=["grey", "RGB", "16 bits", "palette", "1 bit", "transparent"],
)
def test_a_mask_of_ones_own_is_pet_above_half_grey(tmp_path, image, place):
    expected = [[masks.BACKGROUND, masks.BACKGROUND, masks.PET, masks.PET, 2, 2]] * 4
    assert own_mask(tmp_path, image, place).tolist() == expected


@pytest.mark.parametrize(
    "image, reason",
    [
        (Image.fromarray(GREY[:2]), "mask not of the photo's size"),
        (Image.fromarray(GREY // 100), "mask with nothing above half grey"),
        (Image.new("RGB", (6, 4), "red"), "mask cannot be read"),
    ],
    ids=["size", "values from 0 to 2", "colour"],
)
def test_a_useless_mask_of_ones_own_has_a_reason(tmp_path, image, reason):
    with pytest.raises(UserError, match=reason):
        own_mask(tmp_path, image)


def test_real_head_boxes_lie_on_pets(pets3):
    folder = pets3 / "oxford-iiit-pet"
    on_pet = []
    for xml in sorted(folder.glob("annotations/xmls/*.xml")):
        path = folder / "images" / f"{xml.stem}.jpg"
        with Image.open(folder / "annotations" / "trimaps" / f"{xml.stem}.png") as image:
            size = image.size
        head = masks.read_head_mask(path, size)
        on_pet.append((masks.read_mask(path, size)[head] != masks.BACKGROUND).mean())
    assert len(on_pet) == 296
    assert np.mean(on_pet) > 0.85


def test_random_attention_is_chance_on_real_masks(pets3):
    folder = pets3 / "oxford-iiit-pet"
    stems = [
        line.split()[0] for line in (folder / "annotations" / "test.txt").read_text().splitlines()
    ]
    regions = []
    for stem in stems:
        with Image.open(folder / "annotations" / "trimaps" / f"{stem}.png") as mask:
            size = mask.size
        regions.append(read_regions(folder / "images" / f"{stem}.jpg", size, CROP, (8, 8))[0])
    inside, outside = torch.stack(regions).unbind(1)
    maps = (
        torch.randn(len(stems), 100, 64, generator=torch.Generator().manual_seed(0))
        .mul(2)
        .softmax(-1)
    )
    rows = region_scores(maps, inside, outside).numpy()
    mean, low, high = (part[:, 1] for part in statistics.bootstrap(rows))
    # About 95% of the intervals should contain 1, give or take 2.2%.
    assert ((low < 1) & (high > 1)).mean() > 0.88
    assert abs(mean.mean() - 1) < 0.01
    area = (inside.sum(1) / (inside + outside).sum(1)).mean().item()
    np.testing.assert_allclose(rows.mean((0, 1))[[0, 2]], area, atol=0.02)


# The command


def looking_model(sign: float) -> ViT:
    """Build a ViT whose block 0 looks evenly and whose block 1 looks at white patches.

    If `sign` is -1, block 1 looks at black patches instead. Both blocks leave the tokens as they
    are: dimensions 0 and 1 say how white a patch is, 2 and 3 which token is the class token.
    """
    model = ViT(
        ViTConfig(
            img_size=(32, 32),
            patch_size=8,
            embed_dim=8,
            depth=2,
            num_heads=2,
            mlp_dim=8,
            num_classes=2,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for block in model.blocks:
            block.norm1.weight.fill_(1)
        model.patch_embed.proj.weight[0] = 1 / 192
        model.patch_embed.proj.weight[1] = -1 / 192
        model.cls_token[0, 0, 2] = 1
        model.cls_token[0, 0, 3] = -1
        qkv = model.blocks[1].attn.qkv.weight.view(3, 2, 4, 8)
        # Queries and keys whose products are 4 x 400 / 2 for white patches, or minus that.
        qkv[0, :, 0, 2] = 20
        qkv[1, :, 0, 0] = 20 * sign
    model.labels = ("Cat Breed", "Dog Breed")
    model.preprocess = Preprocess((32, 32))
    return model


@pytest.fixture
def pets(tmp_path):
    """Write photos of 32 x 32 pixels in Oxford-IIIT Pet's layout, with a white pet on black.

    Each of the 2 breeds has 6 photos for training and 4 for testing.
    """
    folder = tmp_path / "data" / "oxford-iiit-pet"
    for split, ids in (("trainval", range(6)), ("test", range(6, 10))):
        lines = []
        for label, breed in enumerate(("cat_breed", "dog_breed"), 1):
            for i in ids:
                x, y = 8 * (i % 3), 8 * (i // 4)
                head = (x + 1, y + 1, x + 8, y + 8) if split == "trainval" else None
                write_pet(folder, f"{breed}_{i}", blob(32, 32, (x, y, x + 8, y + 16)), head)
                lines.append(f"{breed}_{i} {label} {label} 1")
        (folder / "annotations" / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def folders(tmp_path):
    for name, sign in (("white", 1), ("black", -1)):
        (tmp_path / name).mkdir()
        save_pretrained(looking_model(sign), tmp_path / name)
    return tmp_path / "white", tmp_path / "black"


def run(pets, *flags):
    known = [
        "--data",
        str(pets.parent),
        "--device",
        "cpu",
        "--amp",
        "off",
        "--workers",
        "2",
        "--out",
        str(pets.parent / "out"),
    ]
    return command.main([*known, *map(str, flags)])


def test_amp_is_the_precision_that_the_models_compute_in(pets, folders, monkeypatch, no_figure):
    dtypes = []
    measure_all = measure.measure

    def measure_and_note_dtype(models, *args, **kwargs):
        dtypes.append(models["model"].head.weight.dtype)
        return measure_all(models, *args, **kwargs)

    monkeypatch.setattr(measure, "measure", measure_and_note_dtype)
    assert run(pets, "--model", folders[0], "--amp", "bf16") == 0
    assert dtypes == [torch.bfloat16]


@pytest.fixture
def no_figure(monkeypatch):
    """Write an empty file for the figure, which takes most of the time of a tiny model."""

    def leave_empty(path, *_):
        path.touch()
        return ""

    monkeypatch.setattr(figure, "draw_scores", leave_empty)


def read_csv(pets):
    with (pets.parent / "out" / "score.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {
        tuple(row[k] for k in ("model", "region", "group", "method", "block", "head")): row
        for row in rows
    }


def test_looking_at_the_pet_scores_1_and_at_the_background_0(pets, folders, capsys):
    assert run(pets, "--model", folders[0], "--compare", folders[1], "--methods", "all") == 0
    printed, rows = capsys.readouterr().out, read_csv(pets)
    for head in ("0", "1", "mean"):
        # A pet covers 2 of 16 patches.
        for model, mass, times in (("model", 1, 8), ("base", 0, 0), ("change", 1, 8)):
            row = rows[model, "pet", "all", "attention", "1", head]
            found = [
                float(row[key])
                for key in ("mass", "mass_low", "mass_high", "times_chance", "photos")
            ]
            assert found == pytest.approx([mass, mass, mass, times, 8])
        even = rows["model", "pet", "all", "attention", "0", head]
        assert [float(even[m]) for m in statistics.METRICS] == pytest.approx(
            [1 / 8, 1, 1 / 8, 1 / 8]
        )
    # In rollout, block 0 keeps half of each token and spreads the other half evenly. Then block 1
    # gives half of the class token to the pet's two patches.
    pet = 2 * (0.25 / 17 + 0.25 / 2 + 0.25 / 17)
    rest = 14 * (0.25 / 17 + 0.25 / 17)
    assert float(rows["model", "pet", "all", "rollout", "1", "mean"]["mass"]) == pytest.approx(
        pet / (pet + rest)
    )
    # No patch that is looked at reaches the logits. So no patch is relevant: an even map.
    assert float(
        rows["model", "pet", "all", "relevance", "1", "mean"]["times_chance"]
    ) == pytest.approx(1)
    # The model always says Cat Breed.
    assert float(rows["model", "pet", "right", "attention", "1", "0"]["photos"]) == 4
    assert not any(key[1] == "head box" for key in rows)
    assert "8 photos of the test split: 4 right, 4 wrong, 4 cats, 4 dogs" in printed
    assert "block 0 has the same weights in both models and, where scored (1 of 1)" in printed
    assert "block 1 of" in printed and "puts 8.00 times chance on the pet" in printed
    assert "before tuning 0.00: more (+8.00, +8.00 to +8.00)" in printed
    summary = json.loads((pets.parent / "out" / "score.json").read_text())
    assert (
        summary["sentence"] in printed and summary["photos"] == 8 and summary["equal_blocks"] == 1
    )
    assert {row["head"] for row in summary["scores"]} == {"mean"}
    with Image.open(pets.parent / "out" / "score.png") as figure:
        assert min(figure.size) > 300


def test_head_boxes_are_scored_where_there_are_some(pets, folders, capsys):
    (pets / "annotations" / "xmls" / "cat_breed_0.xml").unlink()
    (pets / "annotations" / "xmls" / "cat_breed_1.xml").write_text("<annotation>")
    assert run(pets, "--model", folders[0], "--split", "trainval", "--blocks", "1") == 0
    rows = read_csv(pets)
    head, pet = (
        rows["model", region, "all", "attention", "1", "mean"] for region in ("head box", "pet")
    )
    assert (head["photos"], pet["photos"]) == ("10", "12")
    # The head is the upper half of the pet.
    assert [float(head[m]) for m in ("mass", "times_chance")] == pytest.approx([0.5, 8])
    printed = capsys.readouterr().out
    assert "attention on the head box, times chance, with 95% intervals over 10 photos" in printed
    message = "scored on the pet alone, head box cannot be read: 1 (cat_breed_1.jpg)"
    assert message in printed
    summary = json.loads((pets.parent / "out" / "score.json").read_text())
    assert summary["without_head"] == {"head box cannot be read": ["cat_breed_1.jpg"]}


def test_photos_without_a_pet_to_look_at_are_counted_and_named(pets, folders, capsys):
    trimaps = pets / "annotations" / "trimaps"
    (trimaps / "cat_breed_6.png").unlink()
    Image.new("L", (32, 32), 2).save(trimaps / "cat_breed_7.png")
    Image.new("L", (32, 31), 1).save(trimaps / "cat_breed_8.png")
    (trimaps / "dog_breed_6.png").write_bytes(b"\x89PNG no more")
    (pets / "images" / "dog_breed_7.jpg").write_bytes(b"no photo")
    assert run(pets, "--model", folders[0]) == 0
    printed = capsys.readouterr().out
    summary = json.loads((pets.parent / "out" / "score.json").read_text())
    assert summary["photos"] == 3
    assert summary["left_out"] == {
        "mask cannot be read": ["dog_breed_6.jpg"],
        "mask missing": ["cat_breed_6.jpg"],
        "mask not of the photo's size": ["cat_breed_8.jpg"],
        "no pet in the mask": ["cat_breed_7.jpg"],
        "photo cannot be read": ["dog_breed_7.jpg"],
    }
    assert "left out, no pet in the mask: 1 (cat_breed_7.jpg)" in printed
    rows = read_csv(pets)
    assert float(rows["model", "pet", "all", "attention", "1", "mean"]["mass"]) == 1
    # A single photo has no interval.
    one = rows["model", "pet", "cats", "attention", "1", "mean"]
    assert (one["photos"], float(one["mass"]), one["mass_low"]) == ("1", 1, "")
    alone = [row for row in summary["scores"] if (row["group"], row["block"]) == ("cats", 1)]
    assert alone[0]["mass_high"] is None


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--blocks", "none"], "expected at least one block"),
        (["--blocks", "2"], "this model has blocks 0 to 1"),
        (["--methods", "attention,gradcam"], "found 'gradcam'; see"),
        (["--compare", "WIDE"], "its embed_dim is 16, not 8; expected the model that"),
        (["--compare", "OTHER"], "its preprocessing or its patches differ from those of"),
        (
            ["--model", "BARE", "--methods", "all"],
            "relevance needs a classifier, and this model has none",
        ),
        (["--model", "BARE", "--gallery", "2"], "does not know these classes"),
        (["--gallery", "51"], "expected at most 50 photos of each kind"),
        (["--data", "SHAPES"], "no photo of the test split has a mask"),
        (["--model", "nowhere"], "nowhere"),
        (["--out", "FILE"], "expected a folder, found a file"),
    ],
)
def test_a_mistake_ends_in_one_line_and_exit_code_2(
    pets, folders, shapes_data, tmp_path, capsys, flags, message
):
    bare, other = looking_model(1), looking_model(1)
    wide = with_changes(other, embed_dim=16)
    bare.reset_head(0)
    bare.labels, other.preprocess = (), Preprocess((32, 32), mean=(0.1, 0.2, 0.3))
    places = {
        "WIDE": tmp_path / "wide",
        "OTHER": tmp_path / "other",
        "BARE": tmp_path / "bare",
        "SHAPES": shapes_data,
    }
    for name, model in (("WIDE", wide), ("OTHER", other), ("BARE", bare)):
        places[name].mkdir()
        save_pretrained(model, places[name])
    places["FILE"] = folders[0] / "config.json"
    assert run(pets, "--model", folders[0], *(places.get(flag, flag) for flag in flags)) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("python -m minivit score: ") and message in last


# Which photos


def write_summary(folder, data, *, seed, base="demo", **changes):
    """Write what a run with this seed says of itself."""
    summary = {
        "settings": {"seed": seed, "data": str(data)},
        "base": str(base),
        "photos_checksum": run_photos.photos_checksum(load_data(data, seed=seed)),
    }
    (folder / "summary.json").write_text(json.dumps(summary | changes))


@pytest.fixture
def scored(monkeypatch, no_figure):
    """Return a list that every call of score appends its photos to."""
    scored = []
    measure_all = measure.measure

    def measure_and_note_paths(models, paths, **options):
        scored.append(set(paths))
        return measure_all(models, paths, **options)

    monkeypatch.setattr(measure, "measure", measure_and_note_paths)
    return scored


def seeds_without_common_photos(data):
    """Return two seeds whose validation photos all differ, and the data as each splits it."""
    by_seed = {seed: load_data(data, seed=seed) for seed in range(9)}
    for seed, split in by_seed.items():
        if not set(split.val.paths) & set(by_seed[0].val.paths):
            return (0, seed), (by_seed[0], split)
    raise AssertionError("expected two such seeds")


def test_validation_photos_are_those_of_the_scored_run(pets, folders, scored, capsys):
    (_, seed), (_, data) = seeds_without_common_photos(pets.parent)
    write_summary(folders[0], pets.parent, seed=seed)
    for split in ("val", "train", "trainval", "test"):
        assert run(pets, "--model", folders[0], "--split", split) == 0
    trained, validated, tested = map(set, (data.train.paths, data.val.paths, data.test.paths))
    assert scored == [validated, trained, trained | validated, tested]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("the ")]
    assert lines[1] == f"the val split is that of {folders[0]}, made with seed {seed}"
    assert lines[3] == f"the train split is that of {folders[0]}, made with seed {seed}"


def test_a_run_of_train_py_says_which_photos_validate(pets, folders, tmp_path, scored, no_figures):
    (_, seed), (_, data) = seeds_without_common_photos(pets.parent)
    out = tmp_path / "run"
    flags = ("--blocks", "none", "--epochs", "1", "--seed", seed)
    assert run_train(folders[1], pets.parent, out, *flags) == 0
    moved = pets.parent.rename(tmp_path / "moved") / pets.name
    assert run(moved, "--model", out, "--compare", folders[1], "--split", "val") == 0
    assert {path.name for path in scored[0]} == {path.name for path in data.val.paths}
    assert json.loads((moved.parent / "out" / "score.json").read_text())["equal_blocks"] == 2


def test_a_model_that_knows_other_classes_has_seed_0s_split(pets, tmp_path, scored, capsys):
    model = looking_model(1)
    model.labels = ("sofa", "lamp")
    save_pretrained(model, tmp_path)
    (tmp_path / "summary.json").write_text('{"loss": 1}')  # that of another program
    assert run(pets, "--model", tmp_path, "--split", "val") == 0
    assert scored == [set(load_data(pets.parent, seed=0).val.paths)]
    printed = capsys.readouterr().out
    assert "the val split is that of seed 0; no run trained this model on these classes" in printed


def test_a_model_without_a_run_that_knows_the_breeds_is_refused(pets, folders, scored, capsys):
    for split in ("train", "val"):
        assert run(pets, "--model", folders[0], "--split", split) == 2
        assert "no summary.json beside it says which of the photos" in capsys.readouterr().err
    assert scored == []


@pytest.mark.parametrize(
    "changes, is_refused",
    [
        ({"photos_checksum": "12345678"}, True),
        ({"photos_checksum": None, "settings": {"seed": 0, "data": "elsewhere"}}, True),
        ({"photos_checksum": None}, False),
    ],
    ids=["other photos", "another folder", "a run of before"],
)
def test_a_run_on_other_photos_has_no_validation_photos_here(
    pets, folders, capsys, no_figure, changes, is_refused
):
    write_summary(folders[0], pets.parent, seed=0, **changes)
    for split, code in (("val", 2 * is_refused), ("train", 2 * is_refused), ("test", 0)):
        assert run(pets, "--model", folders[0], "--split", split) == code
    if is_refused:
        message = f"which of these photos are the train split of {folders[0]} is not known"
        assert message in capsys.readouterr().err


def test_photos_that_an_earlier_run_trained_on_do_not_validate(pets, folders, capsys, no_figure):
    (first, second), _ = seeds_without_common_photos(pets.parent)
    model, base = folders
    message = f"{base}: was trained, with seed {first}, on photos that {model} validates on"
    write_summary(model, pets.parent, seed=second)
    write_summary(base, pets.parent, seed=first)
    assert run(pets, "--model", model, "--compare", base, "--split", "val") == 2
    assert message in capsys.readouterr().err
    assert run(pets, "--model", model, "--compare", base, "--split", "train") == 0
    write_summary(model, pets.parent, seed=second, base=base)
    assert run(pets, "--model", model, "--split", "val") == 2
    assert message in capsys.readouterr().err
    write_summary(base, pets.parent, seed=first, photos_checksum="12345678")  # other photos
    assert run(pets, "--model", model, "--split", "val") == 0


def test_a_run_is_found_by_its_folder_and_by_a_file_in_it(pets, folders):
    write_summary(folders[0], pets.parent, seed=3, base=folders[1])
    write_summary(folders[1], pets.parent, seed=2, base=folders[0])
    for model in (folders[0], folders[0] / "model.safetensors"):
        assert run_photos.find_run(str(model)).seed == 3
    assert len(run_photos.runs_behind(str(folders[0]))) == run_photos.MOST_RUNS  # a circle
    assert run_photos.find_run("google/vit-base-patch16-224") is None


def test_score_needs_only_the_photos_of_its_split(pets, folders, capsys, no_figure):
    write_summary(folders[0], pets.parent, seed=0)
    test_photos = load_data(pets.parent, seed=0).test.paths
    for path in test_photos:
        path.rename(path.with_suffix(".gone"))
        masks.mask_path(path).rename(masks.mask_path(path).with_suffix(".gone"))
    for split in ("train", "val", "trainval"):
        assert run(pets, "--model", folders[0], "--split", split) == 0
    assert run(pets, "--model", folders[0]) == 2
    assert "8 of 8 listed photos not found" in capsys.readouterr().err
    for path in pets.rglob("*.gone"):
        path.rename(path.with_suffix(".jpg" if path.parent.name == "images" else ".png"))
    for path in (pets / "images").iterdir():
        if path not in test_photos:
            path.unlink()
            masks.mask_path(path).unlink()
    assert run(pets, "--model", folders[0]) == 0
    assert json.loads((pets.parent / "out" / "score.json").read_text())["photos"] == 8
    (pets / "annotations" / "trainval.txt").unlink()
    assert run(pets, "--model", folders[0]) == 0


def test_photos_in_class_folders_are_scored_with_masks_of_their_own(
    pets, folders, tmp_path, no_figure, capsys
):
    data = load_data(pets.parent, seed=0)
    for split, photos in (("train", data.train), ("test", data.test)):
        for path, label in zip(photos.paths, photos.labels):
            copy = tmp_path / "own" / split / data.classes[label] / path.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
            mask = tmp_path / "own" / "masks" / f"{path.stem}.png"
            mask.parent.mkdir(exist_ok=True)
            trimap = np.asarray(Image.open(masks.mask_path(path)))
            Image.fromarray((trimap == masks.PET).astype(np.uint8) * 255).save(mask)
    scores = []
    for root in (pets.parent, tmp_path / "own"):
        assert run(pets, "--model", folders[0], "--data", root) == 0
        scores.append(read_csv(pets))
    # It is not known of class folders which are cats.
    of_group = {key for key in scores[0] if key[2] not in ("cats", "dogs")}
    assert scores[1].keys() == of_group
    assert all(scores[1][key] == scores[0][key] for key in of_group)


# The folder of the outputs


@pytest.mark.parametrize("name", ["score.csv", "score.json", "score.png", "gallery.html"])
def test_files_that_score_did_not_write_are_kept(pets, folders, capsys, no_figure, name):
    out = pets.parent / "out"
    out.mkdir()
    (out / name).write_text('{"scores": "of the match"}')
    flags = ("--model", folders[0], "--blocks", "1")
    gallery_flags = ("--gallery", "1") if name.startswith("gallery") else ()
    assert run(pets, *flags, *gallery_flags) == 2
    assert f"{out}: holds {name}, which minivit did not write" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == [name]
    if gallery_flags:
        assert run(pets, *flags) == 0
        assert run(pets, *flags, *gallery_flags) == 2
        assert run(pets, *flags) == 0
        assert (out / name).read_text() == '{"scores": "of the match"}'


def test_nothing_of_an_earlier_score_stays_beside_a_new_one(pets, folders):
    out = pets.parent / "out"
    flags = ("--model", folders[0], "--blocks", "1")
    assert run(pets, *flags, "--gallery", "1") == 0
    visible = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    about = json.loads((out / "score.json").read_text())
    files = about.pop("files")
    assert files == outputs.output_names("score", gallery=True)
    assert visible == set(files)
    (out / "score.json").write_text(json.dumps(about))  # as earlier versions wrote it
    assert run(pets, *flags) == 0
    visible = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    assert visible == {"score.json", "score.csv", "score.png"}


def test_photos_are_grouped_by_the_species_in_the_listings(pets):
    listing = pets / "annotations" / "test.txt"
    listing.write_text(
        "# stem class species breed\n\n"
        + listing.read_text().replace("cat_breed_7 1 1", "cat_breed_7 1 2")
    )
    paths = [
        pets / "images" / f"{stem}.jpg"
        for stem in ("cat_breed_6", "cat_breed_7", "dog_breed_6", "dog_breed_0")
    ]
    (pets / "annotations" / "trainval.txt").unlink()  # Only the test photos need to be there.
    groups = statistics.group_photos(["A", "A", "B", "B"], ["A", "A", "B", "A"])
    groups |= statistics.cats_and_dogs(paths, "test")
    assert {name: list(np.flatnonzero(chosen)) for name, chosen in groups.items()} == {
        "all": [0, 1, 2, 3],
        "cats": [0],
        "dogs": [1, 2, 3],
        "right": [0, 1, 2],
        "wrong": [3],
    }
    assert "right" not in statistics.group_photos(["A", "A", "B", "B"], None)


def test_a_table_names_the_highest_head_and_what_is_the_same():
    rows = np.ones((4, 6, 2, 4), np.float32)  # 2 blocks of 2 heads and their mean
    rows[:, 1, 0, 1] = rows[:, 3, 0, 1] = 5
    base = rows.copy()
    base[:, 5] = 0
    keys = measure.map_keys([3, 7], 2, ("attention",))
    scores = statistics.summarize({"model": rows, "base": base}, keys, {"all": np.ones(4, bool)})
    first, second = (
        "\n".join(report.tables(scores, ("attention",))).split("\nblock")[1].splitlines()[1:3]
    )
    assert first.split()[0] == "3" and first.endswith("   1: 5.00") and " same " in first
    assert (
        second.split()[0] == "7"
        and second.endswith("   0: 5.00")
        and "+1.00 [+1.00, +1.00]" in second
    )


# Measuring


def test_equal_blocks_are_counted_up_to_the_first_that_differs(tiny):
    other = randomize(ViT(tiny.config))
    assert measure.count_equal_blocks(tiny, other) == 12
    other.norm.weight.data += 1
    other.head.weight.data += 1
    assert measure.count_equal_blocks(tiny, other) == 12
    other.reset_head(0)
    assert measure.count_equal_blocks(tiny, other) == 12
    other.blocks[10].mlp.fc2.bias.data[0] += 1e-3
    other.blocks[3].norm1.weight.data[0] += 1e-3
    assert measure.count_equal_blocks(tiny, other) == 3
    other.pos_embed.data[0, 0, 0] += 1e-3
    assert measure.count_equal_blocks(tiny, other) == 0


def with_changes(model, **changes):
    """Return a copy of a model with other sizes, whose weights are random."""
    other = randomize(ViT(replace(model.config, **changes)))
    other.labels, other.preprocess = model.labels, model.preprocess
    return other


@pytest.mark.parametrize("inputs", ["cls_token", "reg_token", "pos_embed", "patch_embed.proj.bias"])
def test_no_block_is_equal_if_an_input_of_block_0_differs(tiny, inputs):
    model = with_changes(tiny, num_registers=2)
    other = with_changes(tiny, num_registers=2)
    assert measure.count_equal_blocks(model, other) == 12
    other.get_parameter(inputs).data.view(-1)[-1] += 1e-3
    assert measure.count_equal_blocks(model, other) == 0


def test_weights_that_only_bf16_makes_equal_are_not_equal(pets, folders, tmp_path, no_figure):
    model = looking_model(1)
    model.blocks[0].norm1.weight.data += 1e-5
    save_pretrained(model, tmp_path)
    assert run(pets, "--model", tmp_path, "--compare", folders[0], "--amp", "bf16") == 0
    assert json.loads((pets.parent / "out" / "score.json").read_text())["equal_blocks"] == 0


def test_registers_that_differ_are_reported_and_no_error(pets, tmp_path, capsys, no_figure):
    dinov2 = {"num_registers": 2, "eps": 1e-6, "layer_scale": True, "pool": "cls+mean"}
    for name, value in (("model", 0.0), ("base", 0.1)):
        model = with_changes(looking_model(1), **dinov2, pos_antialias=True)
        model.reg_token.data.fill_(value)
        (tmp_path / name).mkdir()
        save_pretrained(model, tmp_path / name)
    assert run(pets, "--model", tmp_path / "model", "--compare", tmp_path / "base") == 0
    assert "weights of the embeddings or of block 0 differ" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_registers": 2}, "its num_registers is 2, not 0"),
        ({"patch_size": 16}, "its patch_size is 16, not 8"),
        ({"depth": 3}, "its depth is 3, not 2"),
        ({"img_size": (64, 64)}, "its img_size is (64, 64), not (32, 32)"),
        ({"eps": 1e-6}, "its eps is 1e-06, not 1e-12"),
    ],
)
def test_models_of_other_sizes_are_not_compared(changes, message):
    model = looking_model(1)
    base = with_changes(model, **changes)
    with pytest.raises(UserError, match=re.escape(message)):
        command.check_comparable(model, base, {"model": "runs/a", "base": "base"})


@pytest.mark.parametrize("preprocess", [Preprocess((32, 32), resample=3), CROP])
def test_models_of_other_preprocessing_are_not_compared(preprocess):
    model = looking_model(1)
    base = with_changes(model)
    base.preprocess = preprocess
    with pytest.raises(UserError, match="its preprocessing or its patches differ from those of"):
        models.check_same_patches(model, base, {"model": "runs/a", "base": "base"})


def test_the_base_may_store_positions_and_margins_otherwise(tiny):
    base = with_changes(tiny, pos_grid=(6, 6), pos_antialias=True)
    base.preprocess = replace(CROP, round_margins=True)
    run_of_base = with_changes(tiny)
    run_of_base.preprocess = CROP
    state = base.state_dict() | {"pos_embed": base.positions()}
    run_of_base.load_state_dict(state)
    models.check_same_patches(run_of_base, base, {})
    command.check_comparable(run_of_base, base, {})
    assert measure.count_equal_blocks(run_of_base, base) == 12


def test_a_model_compared_with_itself_has_not_changed(pets, folders, no_figure, capsys):
    flags = ("--blocks", "1,0", "--gallery", "1", "--methods", "all")
    assert run(pets, "--model", folders[0], "--compare", folders[0], *flags) == 0
    printed = capsys.readouterr().out
    assert "before tuning 8.00: no change (+0.00, +0.00 to +0.00)" in printed
    assert printed.count("    same    ") == 2 * 3  # two blocks and three methods
    page = (pets.parent / "out" / "gallery.html").read_text("utf-8")
    assert "most improved by fine-tuning: none" in page


def test_a_base_is_loaded_at_the_input_size_of_the_run(pets, folders, tmp_path, no_figure):
    run_of_base = load_pretrained(folders[0], img_size=(64, 48))
    save_pretrained(run_of_base, tmp_path)
    assert run(pets, "--model", tmp_path, "--compare", folders[0]) == 0
    assert json.loads((pets.parent / "out" / "score.json").read_text())["equal_blocks"] == 2


def test_different_maps_from_equal_weights_are_an_error(pets, folders, monkeypatch):
    honest = measure.model_maps

    def odd(model, *args):
        logits, maps = honest(model, *args)
        if model.blocks[1].attn.qkv.weight.min() < 0:  # the base
            maps = maps.clone()
            maps[-1, 1, -1] += 1e-7
        return logits, maps

    monkeypatch.setattr(measure, "model_maps", odd)
    with pytest.raises(RuntimeError, match="block 0: its maps differ, though"):
        run(pets, "--model", folders[0], "--compare", folders[1])


def test_maps_equal_those_of_query_maps_rollout_and_relevance(tiny):
    images, blocks = torch.randn(2, 3, 32, 32), [2, 5]
    with torch.inference_mode():
        logits, maps = measure.model_maps(tiny, images, blocks, METHODS)
    keys = measure.map_keys(blocks, 3, METHODS)
    assert maps.shape == (2, len(keys), 16) and len(keys) == 2 * 4 + 2 + 2
    assert_close(logits, tiny(images))
    with torch.no_grad():
        _, attn = tiny.forward_with_attention(images, range(6))
    rolled, relevant = rollout(attn), class_relevance(tiny, images, logits.argmax(1), blocks)
    for (method, block, head), found in zip(keys, maps.unbind(1)):
        full = {"attention": attn, "rollout": rolled, "relevance": relevant}[method][block]
        expected = query_maps(full, (4, 4))
        if method == "attention":
            expected = expected.mean(1) if head == "mean" else expected[:, head]
        assert_close(found, expected.flatten(1), rtol=1e-4, atol=1e-6)


def test_photos_are_read_ahead_and_scored_alike_in_any_batch(pets, folders, monkeypatch):
    model = looking_model(1)
    paths = sorted((pets / "images").iterdir())
    opened, honest = [], masks.open_photo
    monkeypatch.setattr(masks, "open_photo", lambda path: opened.append(path) or honest(path))
    whole = measure.measure({"model": model}, paths, blocks=[1], methods=("attention",), workers=2)
    monkeypatch.setattr(measure, "BATCH", 3)
    parts = measure.measure({"model": model}, paths, blocks=[1], methods=("attention",), workers=2)
    np.testing.assert_allclose(parts.scores["model"], whole.scores["model"], atol=1e-6)
    assert parts.photos == whole.photos == list(range(20))
    opened.clear()
    monkeypatch.setattr(measure, "CHUNK", 2)
    batches = measure.read_photos(paths, model, workers=1, left_out={}, without_head={})
    assert next(batches).indices == [0, 1, 2]
    # The first batch needs two chunks of two photos, and two more chunks are read ahead.
    assert len(opened) == 4 + 2 * 2
    assert [batch.indices for batch in batches][-1] == [18, 19]


def test_processes_read_the_same_and_leave_out_the_same(pets, monkeypatch):
    model, paths = looking_model(1), sorted((pets / "images").iterdir())
    (pets / "annotations" / "trimaps" / f"{paths[3].stem}.png").unlink()
    paths[5].write_bytes(b"no photo")
    options = {"blocks": [1], "methods": ("attention",), "workers": 2}
    in_threads = measure.measure({"model": model}, paths, **options)
    monkeypatch.setattr(workers, "WORTH_STARTING_BYTES", 1)
    in_processes = measure.measure({"model": model}, paths, **options)
    np.testing.assert_array_equal(in_threads.scores["model"], in_processes.scores["model"])
    left_out = {"mask missing": [paths[3].name], "photo cannot be read": [paths[5].name]}
    assert in_threads.left_out == in_processes.left_out == left_out


def test_nothing_of_a_batch_is_kept_but_its_scores_and_one_map(pets, monkeypatch):
    alive, most = set(), []

    def made(model, images, *_):
        values = np.random.default_rng(0).random((len(images), 3, 16), np.float32)
        alive.add(id(values))
        weakref.finalize(values, alive.discard, id(values))
        most.append(len(alive))
        # A view of the tensor would keep the array alive.
        return torch.zeros(len(images), 2), torch.from_numpy(values)

    monkeypatch.setattr(measure, "model_maps", made)
    monkeypatch.setattr(measure, "BATCH", 2)
    paths = sorted((pets / "images").iterdir())
    whole = measure.measure(
        {"model": looking_model(1)}, paths, blocks=[1], methods=("attention",), workers=2
    )
    assert len(most) == 10 and max(most) <= 2
    # The mean comes after the maps of the block's two heads.
    mean = np.random.default_rng(0).random((2, 3, 16), np.float32)[:, 2]
    np.testing.assert_array_equal(whole.maps["model"], np.tile(mean.reshape(2, 4, 4), (10, 1, 1)))
    np.testing.assert_array_equal(whole.times_chance["model"], whole.scores["model"][:, 2, 0, 1])


# The gallery


def measured(times_chance, base=None, probability=None):
    """Return the results of photos that have these scores and probabilities, and no maps."""
    times_chance = {"model": np.array(times_chance)}
    if base is not None:
        times_chance["base"] = np.array(base)
    n = len(times_chance["model"])
    return measure.Measured(
        photos=list(range(n)),
        left_out={},
        without_head={},
        map_keys=[],
        equal_blocks=0,
        scores={},
        maps={},
        times_chance=times_chance,
        pet_area=None,
        predicted=None,
        probability=np.array(probability or [0.5] * n),
    )


def test_each_kind_holds_its_photos_the_most_telling_first():
    right = np.array([True, False, True, False, True])
    results = measured([0.5, 2, 0.2, 1, 3], [0.6, 1, 0.9, 1, 4], [0.9, 0.6, 0.8, 0.7, 0.9])
    kinds = gallery.choose_photos(results, right, 2)
    assert list(kinds.values()) == [[3, 1], [2, 0], [1], [4, 2]]
    assert list(gallery.choose_photos(measured([0.5, 2]), None, 2)) == []
    assert len(gallery.choose_photos(measured([0.5, 2], [1, 1]), None, 2)) == 2


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


def test_the_gallery_shows_names_as_text_and_loads_nothing(pets, tmp_path, capsys):
    for path in [*pets.glob("images/dog*"), *pets.glob("annotations/*/dog*")]:
        path.rename(path.with_name(path.name.replace("dog_breed", "<b>&$dog$")))
    for listing in pets.glob("annotations/*.txt"):
        listing.write_text(listing.read_text().replace("dog_breed", "<b>&$dog$"))
    names = ("Cat Breed", "<B>&$Dog$")
    for name, sign in (("after", 1), ("base", -1)):
        model = looking_model(sign)
        model.labels = names
        model.head.bias.data = torch.tensor([0.0, sign])
        (tmp_path / name).mkdir()
        save_pretrained(model, tmp_path / name)
    assert (
        run(pets, "--model", tmp_path / "after", "--compare", tmp_path / "base", "--gallery", "3")
        == 0
    )
    page = Tags((pets.parent / "out" / "gallery.html").read_text("utf-8"))
    tags = [tag for tag, _ in page.tags]
    assert "b" not in tags and "script" not in tags
    pictures = [attrs for tag, attrs in page.tags if tag == "img"]
    # Three are wrong, none looks elsewhere, three have improved, none has worsened.
    assert len(pictures) == 3 + 0 + 3 + 0
    assert all(
        attrs["src"].startswith("data:image/jpeg;base64,") and "onerror" not in attrs
        for attrs in pictures
    )
    text = "".join(page.text)
    assert (
        "cat_breed_6.jpg\n<B>&$Dog$ 0.73 (true: Cat Breed)\n0.00 → 8.00 times chance on the pet"
        in text
    )
    assert "most worsened by fine-tuning: none" in text
    assert any(
        "default-src 'none'" in (attrs.get("content") or "")
        for tag, attrs in page.tags
        if tag == "meta"
    )
    with Image.open(pets.parent / "out" / "gallery.png") as figure:
        assert min(figure.size) > 300


def test_a_gallery_strip_is_the_photo_and_the_map_of_each_model(pets):
    path = pets / "images" / "cat_breed_6.jpg"
    after = np.eye(4, dtype=np.float32)
    before = after[:, ::-1].copy()
    strip = gallery.draw_strip(path, [before, after], Preprocess((32, 32)))
    picture = np.asarray(strip)
    assert picture.shape == (240, 3 * 240 + 2 * 4, 3)
    photo, before, after = picture[:, :240], picture[:, 244:484], picture[:, 488:]
    assert (photo[60, 30] == 255).all() and (photo[60, 200] == 0).all()
    assert (
        before[20, 220].sum() > after[20, 220].sum() + 200
        and after[20, 75].sum() < after[220, 220].sum()
    )
