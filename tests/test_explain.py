"""The figures, pages and arrays of infer.py: what they show, where, by which method."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, draw_photo, randomize
from PIL import Image

import infer
from minivit import (
    Preprocess,
    ViT,
    ViTConfig,
    load_pretrained,
    look,
    open_photo,
    save_pretrained,
)
from minivit import infer as infer_job
from minivit.attention import METHODS, class_relevance, query_maps, rollout
from minivit.checkpoints.hub import Origin
from minivit.data import jobs as infer_jobs
from minivit.data.prepared import LARGE, NO_PAGE, NO_PANEL, panel_shape, read_photo
from minivit.errors import UserError
from minivit.figures import panels
from minivit.figures.marks import is_ours

CPU = ["--device", "cpu", "--amp", "off"]


def run(*flags, capsys):
    code = infer.main([*map(str, flags), *CPU])
    return code, capsys.readouterr()


def answers(*flags, capsys):
    code, printed = run(*flags, "--json", capsys=capsys)
    assert code == 0, printed.err
    return [json.loads(line) for line in printed.out.splitlines()]


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def prepare(path, models, query=None, panel=LARGE) -> look.Photo:
    return read_photo(path, look.needs_of(models, query, panel=panel, page=True))


# The way back to the photo


def seeker(preprocess: Preprocess, folder: Path) -> Path:
    """Save a ViT of two blocks in which every token looks only at the reddest patch."""
    h, w = preprocess.size
    config = ViTConfig(
        img_size=(h, w), patch_size=16, embed_dim=4, depth=2, num_heads=2, mlp_dim=4, num_classes=2
    )
    model = ViT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for block in model.blocks:
            block.norm1.weight.fill_(1)
            block.attn.qkv.bias[:4] = 30  # each query is the same, and long
            block.attn.qkv.weight[4:8, 0] = 30  # a key is its token's redness
        model.patch_embed.proj.weight[0, :, :, :] = (
            torch.tensor([1.0, -0.5, -0.5]).view(3, 1, 1) / 256
        )
        # With these two the norm keeps redness apart.
        model.patch_embed.proj.bias[1] = 1
        model.patch_embed.proj.bias[2] = -1
        model.cls_token[0, 0, 1], model.cls_token[0, 0, 2] = 1, -1
    model.labels, model.preprocess = ("a", "b"), preprocess
    folder.mkdir()
    save_pretrained(model, folder)
    return folder


@pytest.mark.parametrize(
    "preprocess", [Preprocess(), Preprocess(256, (224, 224), 3)], ids=["squash", "crop"]
)
@pytest.mark.parametrize(
    "size",
    [(640, 480), (300, 500), (900, 300), (120, 360)],
    ids=["landscape", "portrait", "panorama", "tall"],
)
def test_the_map_is_brightest_on_the_object_however_exif_turns_it(
    tmp_path, capsys, preprocess, size
):
    folder, (W, H) = seeker(preprocess, tmp_path / "seeker"), size
    side = min(size) // 8
    left, top = (
        (int(W / 2 - min(size) / 4), int(H / 2 + min(size) / 8))
        if preprocess.crop
        else (W // 5, H * 2 // 3)
    )
    photo = Image.fromarray(
        np.random.default_rng(0).integers(90, 150, (H, W, 1)).repeat(3, 2).astype(np.uint8)
    )
    photo.paste((230, 20, 20), (left, top, left + side, top + side))
    # Pillow's transpositions that undo each EXIF orientation.
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    paths = []
    for orientation, transposition in undo.items():
        exif = Image.Exif()
        exif[274] = orientation
        lying = photo if transposition is None else photo.transpose(Image.Transpose(transposition))
        paths.append(tmp_path / str(orientation) / "photo.png")
        paths[-1].parent.mkdir()
        lying.save(paths[-1], exif=exif, compress_level=1)
    (h, w), model, prepared = panel_shape(size), load_pretrained(folder), []
    for path in paths:
        seen = prepare(path, [model])
        assert seen.size == size
        (answer,) = look.explain_photos(model, [seen], 0, [1])
        figure = look.attention_figure(
            seen, [answer], "attention", [1], title="", heads=False, shared_scale=False
        )
        prepared.append((seen.panel, figure.rows[0].panels[0].values))
    for panel, values in prepared:
        assert np.array_equal(panel, prepared[0][0])
        assert np.array_equal(values, prepared[0][1])

    panels.draw_attention(tmp_path / "drawn.png", figure)
    shown, over_map = (
        pixels(tmp_path / "drawn.png")[y : y + h, x : x + w]
        for x, y in (panels._lay_out(figure).position(0, column) for column in (0, 1))
    )
    assert np.array_equal(shown, seen.panel)
    pale = (over_map >= 190).all(-1)
    y, x = np.unravel_index(np.argmax(over_map[..., :2].sum(-1) * ~pale), (h, w))
    box = preprocess.box(size)
    # Each of the 14 x 14 patches is brightest in its middle.
    half_w, half_h = (box[2] - box[0]) / 28, (box[3] - box[1]) / 28
    assert left - half_w <= x * W / w <= left + side + half_w
    assert top - half_h <= y * H / h <= top + side + half_h
    outside = np.ones((h, w), bool)
    x0, y0, x1, y1 = (round(edge * w / W) for edge in box)
    outside[max(y0 - 1, 0) : y1 + 1, max(x0 - 1, 0) : x1 + 1] = False
    assert pale[outside].all()
    assert outside.any() == pale.any() == (preprocess.crop is not None)
    flags = ("--model", folder, "--layers", "1", "--out", tmp_path / "out")
    upright, turned = answers(paths[0], paths[5], *flags, capsys=capsys)
    assert np.array_equal(pixels(upright["figure"]), pixels(turned["figure"]))


def test_a_figure_shows_each_value_over_its_pixel_of_the_photo(tmp_path):
    photo = np.full((120, 200, 3), (0, 128, 0), np.uint8)
    preprocess = Preprocess((120, 200), (120, 160))  # which does not see 20 pixels at each side
    values = np.zeros((120, 160))
    values[30:40, 130:150] = 7
    rows = [
        panels.Row("photo", [panels.Panel("block 8", values), panels.Panel("block 9", values / 2)])
    ]
    box = (0.5, 0.25, 0.6, 0.5)
    figure = panels.AttentionFigure(
        photo, (200, 120), preprocess, rows, ["$title"], "caption", query_box=box
    )
    panels.draw_attention(tmp_path / "f.png", figure)
    figure = pixels(tmp_path / "f.png")
    green = (figure == (0, 128, 0)).all(-1)
    ys, xs = green.nonzero()
    top, left = ys.min(), xs.min()
    assert (ys.max() - top, xs.max() - left) == (119, 199)
    marked = ~green[top : top + 120, left : left + 200]
    assert np.array_equal(
        [edge for a in marked.nonzero() for edge in (a.min() // 4, a.max() // 4)], [6, 15, 24, 30]
    )
    bright = (
        (figure.min(-1) > 110) & (figure[..., 0] > 180) & (figure[..., 2] < 150)
    )  # the end of the colours, over grey
    for i in (1, 2):
        x = left + i * 214
        ys, xs = bright[top : top + 120, x : x + 200].nonzero()
        assert (ys.min(), ys.max(), xs.min(), xs.max()) == (30, 39, 150, 169)
        for unseen in (x, x + 180):
            assert (figure[top : top + 120, unseen : unseen + 20] > 190).all()
        assert (figure[top + 60, x + 20 : x + 180] < 30).all()


def test_a_scale_ignores_unseen_pixels_and_is_symmetric_if_signed():
    maps = [np.array([[-1.0, np.nan], [0.5, 0.0]]), np.array([[3.0, np.nan]])]
    assert panels.value_range(maps) == (-1, 3)
    assert panels.value_range(maps, signed=True) == (-3, 3)
    assert panels.value_range(maps[:1], signed=True) == (-1, 1)
    assert panels.value_range([np.full((2, 2), np.nan)]) == (0, 0)


@pytest.mark.parametrize(
    "preprocess", [Preprocess((32, 32)), Preprocess(40, (32, 32))], ids=["squash", "crop"]
)
def test_photos_of_any_size_are_drawn(tiny, tmp_path, capsys, preprocess):
    tiny.preprocess, paths = preprocess, []
    save_pretrained(tiny, tmp_path)
    for i, size in enumerate(
        [(1, 1), (1, 8000), (65_535, 1), (8000, 3), (4000, 3000), (2000, 100)]
    ):
        paths.append(tmp_path / f"{i}.png")
        Image.new("RGB", size, (90, 60, 30)).save(paths[-1])
    flags = (
        "--model",
        tmp_path,
        "--compare",
        tmp_path,
        "--layers",
        "11",
        "--html",
        "--out",
        tmp_path / "out",
    )
    all_answers = answers(*paths, *flags, capsys=capsys)
    assert len(all_answers) == 6
    for answer in all_answers:
        assert max(pixels(answer["figure"]).shape) < 4000
        assert Path(answer["html"]).stat().st_size < 3e6


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (1000, 200), (7, 7)], ids=str)
@pytest.mark.parametrize(
    "preprocess", [Preprocess((64, 96)), Preprocess(100, (64, 96))], ids=["squash", "crop"]
)
def test_a_pixels_patch_is_the_one_whose_mark_holds_it(size, preprocess):
    model = ViT(
        ViTConfig(
            img_size=(64, 96),
            patch_size=8,
            embed_dim=4,
            depth=1,
            num_heads=1,
            mlp_dim=4,
            num_classes=0,
        )
    )
    model.preprocess = preprocess
    left, top, right, bottom = preprocess.box(size)
    for x, y in np.random.default_rng(0).uniform(0, 1, (200, 2)):
        x, y = left + x * (right - left), top + y * (bottom - top)
        token = 1 + preprocess.patch_at(x, y, size, (8, 12))
        box = look.query_box(look.Photo(size, NO_PANEL, NO_PAGE, [], token), model)
        assert box[0] * size[0] - 1e-9 <= x <= box[2] * size[0] + 1e-9
        assert box[1] * size[1] - 1e-9 <= y <= box[3] * size[1] + 1e-9


@pytest.mark.parametrize("x, y", [(95, 100), (305, 100), (200, 10), (200, 190), (-1, 100)])
def test_a_pixel_that_the_crop_cut_away_has_no_patch(x, y):
    preprocess = Preprocess(64, (56, 56))
    left, top, right, bottom = preprocess.box((400, 200))
    assert 95 < left < right < 305
    assert 10 < top < bottom < 190
    with pytest.raises(
        UserError, match=f"no patch at {x},{y}: of 400 x 200 pixels, the model sees x from 1"
    ):
        preprocess.patch_at(x, y, (400, 200), (7, 7))


# What is shown


@pytest.fixture
def photo(tmp_path) -> Path:
    path = tmp_path / "photo.png"
    draw_photo(80, 60).save(path)
    return path


@pytest.fixture
def other_folder(tmp_path) -> Path:
    """Another tiny ViT of the same sizes, with other weights and classes."""
    model = randomize(ViT(TINY), seed=1)
    model.labels = ("other 0", "other 1", "other 2", "other 3", "thing 4")
    model.preprocess = Preprocess((32, 32))
    (tmp_path / "other").mkdir()
    save_pretrained(model, tmp_path / "other")
    return tmp_path / "other"


def attention_of(folder, photo):
    model = load_pretrained(folder).eval()
    images = model.preprocess(open_photo(photo))[None]
    with torch.no_grad():
        return model, images, *model.forward_with_attention(images, range(12))


@pytest.mark.usefixtures("no_figures")
def test_arrays_are_the_rows_of_the_method_and_say_what_they_are(
    tiny_folder, other_folder, photo, tmp_path, capsys
):
    model, images, logits, attn = attention_of(tiny_folder, photo)
    flags = (
        photo,
        "--model",
        tiny_folder,
        "--npz",
        "--layers",
        "3,10-11",
        "--out",
        tmp_path / "out",
    )
    relevant = class_relevance(model, images, torch.tensor([2]), [3, 10, 11])
    wanted = {
        (): torch.stack([attn[i][0, :, :1] for i in (3, 10, 11)]),
        ("--query", "79,59"): torch.stack([attn[i][0, :, 16:] for i in (3, 10, 11)]),
        ("--html",): torch.stack([attn[i][0] for i in (3, 10, 11)]),
        ("--method", "rollout"): torch.stack([rollout(attn)[i][:, :1] for i in (3, 10, 11)]),
        ("--method", "relevance", "--target", "Thing 2"): torch.stack(
            [relevant[i] for i in (3, 10, 11)]
        ),
    }
    for more, rows in wanted.items():
        (answer,) = answers(*flags, *more, "--compare", other_folder, capsys=capsys)
        with np.load(answer["npz"]) as arrays:
            torch.testing.assert_close(torch.from_numpy(arrays["rows"]), rows, rtol=1e-4, atol=1e-6)
            assert arrays["base_rows"].shape == arrays["rows"].shape
            assert abs(arrays["base_rows"] - arrays["rows"]).max() > 1e-3
            assert arrays["blocks"].tolist() == [3, 10, 11]
            assert arrays["queries"].tolist() == (
                [*range(17)] if more == ("--html",) else [16] if "--query" in more else [0]
            )
            assert (arrays["grid"].tolist(), arrays["photo_size"].tolist()) == ([4, 4], [80, 60])
            assert arrays["box"].tolist() == [0, 0, 80, 60]
            np.testing.assert_allclose(
                arrays["probabilities"], logits[0].softmax(0), rtol=1e-4, atol=1e-6
            )


@pytest.mark.usefixtures("no_figures")
def test_amp_is_the_precision_that_the_model_computes_in(tiny_folder, photo, tmp_path, capsys):
    flags = [
        photo,
        "--model",
        tiny_folder,
        "--layers",
        "11",
        "--out",
        tmp_path / "out",
        "--json",
        "--device",
        "cpu",
    ]
    model = load_pretrained(tiny_folder)
    images = model.preprocess(open_photo(photo))[None]
    for amp, dtype in (("off", torch.float32), ("bf16", torch.bfloat16)):
        assert infer.main([*map(str, flags), "--amp", amp]) == 0
        (answer,) = map(json.loads, capsys.readouterr().out.splitlines())
        with torch.no_grad():
            expected = model.to(dtype)(images).float().softmax(1)[0]
        probabilities = [top["probability"] for top in answer["predictions"]]
        assert probabilities == pytest.approx(
            expected.sort(descending=True).values[: len(probabilities)].tolist(), rel=1e-5
        )


@pytest.mark.usefixtures("no_figures")
def test_json_holds_what_the_text_says_and_the_sink_shares(
    tiny_folder, other_folder, photo, tmp_path, capsys
):
    _, _, logits, attn = attention_of(tiny_folder, photo)
    flags = (
        photo,
        "--model",
        tiny_folder,
        "--compare",
        other_folder,
        "--layers",
        "11",
        "--top-k",
        "2",
        "--out",
        tmp_path / "out",
    )
    (answer,) = answers(*flags, capsys=capsys)
    assert answer["photo"] == str(photo)
    assert answer["layers"] == [11]
    top = logits[0].softmax(0).topk(2)
    assert [p["index"] for p in answer["predictions"]] == top.indices.tolist()
    assert [p["label"] for p in answer["predictions"]] == [
        f"thing {i}" for i in top.indices.tolist()
    ]
    assert [p["probability"] for p in answer["predictions"]] == pytest.approx(
        top.values.tolist(), rel=1e-4
    )
    row = attn[11][0, :, 0].mean(0)
    assert answer["maps"]["11"]["class_token"] == pytest.approx(row[0].item(), rel=1e-4)
    assert answer["maps"]["11"]["top_patch"] == pytest.approx(
        (row[1:].max() / row[1:].sum()).item(), rel=1e-4
    )
    assert all(
        p["label"].startswith(("other", "thing 4")) for p in answer["compare"]["predictions"]
    )
    _, printed = run(*flags, capsys=capsys)
    predictions = [f"{p['probability']:.3f}  {p['label']}" for p in answer["predictions"]]
    base = [f"{p['probability']:.3f}  {p['label']}" for p in answer["compare"]["predictions"]]
    assert printed.out.splitlines() == [
        str(photo),
        str(other_folder),
        *base,
        str(tiny_folder),
        *predictions,
        str(tmp_path / "out" / "photo.png"),
    ]


def test_a_difference_is_the_second_models_share_less_the_firsts(tiny_folder, other_folder, photo):
    models = [load_pretrained(folder).eval() for folder in (other_folder, tiny_folder)]
    seen = prepare(photo, models)
    explanations = [
        look.explain_photos(model, [seen], i, [10, 11])[0] for i, model in enumerate(models)
    ]
    rows = look.figure_rows(explanations, "attention", [10, 11], heads=False)
    assert [row.signed for row in rows] == [False, False, True]
    for i, block in enumerate((10, 11)):
        maps = [
            attention_of(folder, photo)[3][block][0, :, 0, 1:].mean(0)
            for folder in (other_folder, tiny_folder)
        ]
        first, second = ((m / m.sum()).view(4, 4) for m in maps)
        wanted = 100 * (second - first)
        np.testing.assert_allclose(rows[2].panels[i].values, wanted, atol=1e-4)
    assert str(other_folder) in rows[0].label
    assert str(tiny_folder) in rows[1].label


def test_heads_have_a_panel_each_and_their_mean(tiny_folder, photo):
    model = load_pretrained(tiny_folder).eval()
    seen = prepare(photo, [model])
    rows = look.figure_rows(
        look.explain_photos(model, [seen], 0, [9, 11]), "attention", [9, 11], heads=True
    )
    attn = attention_of(tiny_folder, photo)[3]
    assert [[panel.title for panel in row.panels] for row in rows] == [
        [f"block {b}, {part}" for part in ("mean", "head 0", "head 1", "head 2")] for b in (9, 11)
    ]
    for row, block in zip(rows, (9, 11), strict=True):
        maps = query_maps(attn[block], (4, 4))[0]
        for panel, values in zip(row.panels, [maps.mean(0), *maps], strict=True):
            np.testing.assert_allclose(panel.values, 100 * values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_explains_each_photo_and_its_query_as_if_alone(tiny_folder, tmp_path, method):
    model = load_pretrained(tiny_folder).eval()
    photos = []
    for i, size in enumerate([(80, 60), (50, 90), (300, 40)]):
        draw_photo(*size, seed=i).save(tmp_path / f"{i}.png")
        query = None if method == "relevance" else (35.0, 30.0)
        photos.append(prepare(tmp_path / f"{i}.png", [model], query))
    together = look.explain_photos(model, photos, 0, [2, 11], methods=[method])
    for photo, one in zip(photos, together, strict=True):
        (alone,) = look.explain_photos(model, [photo], 0, [2, 11], methods=[method])
        assert len(one.rows[method][2][0]) == (
            1 if method == "relevance" else len({p.query for p in photos})
        )
        for block in (2, 11):
            torch.testing.assert_close(
                one.mean_and_heads(method, block)[1:],
                alone.mean_and_heads(method, block)[1:],
                rtol=1e-4,
                atol=1e-6,
            )
        torch.testing.assert_close(one.probabilities, alone.probabilities, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("no_figures")
def test_a_model_without_a_classifier_has_no_probabilities(tmp_path, photo, capsys):
    model = randomize(ViT(ViTConfig(**vars(TINY) | {"num_classes": 0})))
    model.preprocess = Preprocess((32, 32))
    (tmp_path / "bare").mkdir()
    save_pretrained(model, tmp_path / "bare")
    (answer,) = answers(
        photo,
        "--model",
        tmp_path / "bare",
        "--npz",
        "--html",
        "--out",
        tmp_path / "out",
        capsys=capsys,
    )
    assert answer["predictions"] == []
    with np.load(answer["npz"]) as arrays:
        assert arrays["probabilities"].shape == (0,)
    page = Path(answer["html"]).read_text(encoding="utf-8")
    assert '"name":"rollout"' in page and '"name":"relevance"' not in page


@pytest.mark.parametrize("all_rows", [True, False], ids=["all rows", "one row"])
def test_registers_are_no_queries_and_have_no_place_in_a_map(photo, all_rows):
    model = randomize(ViT(ViTConfig(**vars(TINY) | {"num_registers": 2})))
    model.labels = tuple("abcde")
    model.preprocess = Preprocess((32, 32))
    model.origin = Origin("registers")
    images = model.preprocess(open_photo(photo))[None]
    with torch.no_grad():
        attn = model.forward_with_attention(images, range(12))[1]
    kept = [0, *range(3, 19)]
    seen = prepare(photo, [model], (79, 59))
    (one,) = look.explain_photos(
        model, [seen], 0, [11], methods=["attention", "rollout"], all_rows=all_rows
    )
    for method, rows in (("attention", attn[11][0]), ("rollout", rollout(attn)[11])):
        torch.testing.assert_close(
            one.mean_and_heads(method, 11)[1:], rows[:, 18, kept], rtol=1e-4, atol=1e-6
        )  # the last patch's
    if all_rows:
        torch.testing.assert_close(
            one.rows["attention"][11], attn[11][0][:, kept][..., kept], rtol=1e-4, atol=1e-6
        )
        assert look.explorer_pane(seen, one, 3).attn[11].shape == (3, 17, 17)


def test_relevance_explains_the_first_prediction_or_the_target(tiny_folder, photo):
    model, images, logits, _ = attention_of(tiny_folder, photo)
    seen = prepare(photo, [model])
    for target in (None, 0, 3):
        wanted_class = None if target is None else look.Target(target)
        (one,) = look.explain_photos(
            model, [seen], 0, [11], methods=["relevance"], target=wanted_class
        )
        index = logits.argmax().item() if target is None else target
        wanted = class_relevance(model, images, torch.tensor([index]), [11])[11][0]
        torch.testing.assert_close(
            one.mean_and_heads("relevance", 11)[1:], wanted, rtol=1e-4, atol=1e-7
        )
        headline = one.headline("relevance")
        assert headline.endswith(f", relevance for thing {index}") == (index != logits.argmax())
        (row,) = look.figure_rows([one], "relevance", [11], heads=False)
        assert row.panels[0].values.sum() == pytest.approx(100, rel=1e-4)


def test_a_dominated_map_is_named_on_stderr_and_in_the_figure(tmp_path, photo, capsys):
    model = seeker(Preprocess((64, 64)), tmp_path / "seeker")
    scene = Image.new("RGB", (64, 64), "grey")
    scene.paste((255, 0, 0), (16, 16, 32, 32))
    scene.save(photo)
    code, printed = run(
        photo, "--model", model, "--layers", "1", "--out", tmp_path / "out", capsys=capsys
    )
    assert code == 0
    assert f"{photo}: one token dominates block 1 (keeps 0% · top patch 100%)" in printed.err
    seen = prepare(photo, [load_pretrained(model)])
    answered = look.explain_photos(load_pretrained(model), [seen], 0, [1])
    figure = look.attention_figure(
        seen, answered, "attention", [1], title="", heads=False, shared_scale=False
    )
    assert figure.rows[0].panels[0].warn
    panels.draw_attention(tmp_path / "a.png", figure)
    red, green, blue = np.moveaxis(pixels(tmp_path / "a.png")[-110:], 2, 0)
    assert ((red > 150) & (green < 60) & (blue < 80)).sum() > 100  # the note below the map
    Image.new("RGB", (64, 64), "grey").save(photo)
    assert (
        "one token"
        not in run(
            photo, "--model", model, "--layers", "1", "--out", tmp_path / "out", capsys=capsys
        )[1].err
    )


# What is refused


REFUSED = {
    "heads of rollout": (["--heads", "--method", "rollout"], "--method rollout has no heads"),
    "relevance of a patch": (["--query", "1,1", "--method", "relevance"], "leave --query away"),
    "a target without use": (
        ["--target", "thing 1"],
        "--target is for --method relevance or --html",
    ),
    "an unknown class": (
        ["--method", "relevance", "--target", "thing 9"],
        "no such class; expected one of the model's, as thing",
    ),
    "a contrast of attention": (["--target", "thing 1", "--against", "thing 2"], "--target is for"),
    "a contrast on the page alone": (
        ["--html", "--target", "thing 1", "--against", "thing 2"],
        "--against is for --method relevance with --target",
    ),
    "a contrast without a target": (
        ["--method", "relevance", "--against", "thing 2"],
        "--against is for --method relevance with --target",
    ),
    "a contrast with an unknown class": (
        ["--method", "relevance", "--target", "thing 1", "--against", "thing 9"],
        "--against 'thing 9': no such class; expected one of the model's, as thing",
    ),
    "a contrast of a class with itself": (
        ["--method", "relevance", "--target", "thing 1", "--against", "THING 1"],
        "--against 'THING 1': is the class of --target; name another",
    ),
    "a contrast without figures": (["--no-figures", "--against", "x"], "leave --against away"),
    "no block": (["--layers", "none"], "no block to draw"),
    "another grid": (["--compare", "GRID"], "two models that see a photo in the same patches"),
    "no such model": (["--compare", "nowhere/at-all/x"], "nowhere/at-all/x"),
    "heads without figures": (["--no-figures", "--heads"], "names only; leave --heads away"),
    "a page without figures": (["--no-figures", "--html"], "names only; leave --html away"),
    "blocks without figures": (["--no-figures", "--blocks", "3"], "leave --layers away"),
}


@pytest.mark.parametrize("flags, message", REFUSED.values(), ids=REFUSED)
def test_flags_that_would_have_no_effect_are_refused_in_one_line(
    tiny_folder, photo, tmp_path, capsys, flags, message
):
    model = randomize(
        ViT(
            ViTConfig(
                img_size=(48, 48),
                patch_size=8,
                embed_dim=24,
                depth=12,
                num_heads=3,
                mlp_dim=48,
                num_classes=2,
            )
        )
    )
    model.labels, model.preprocess = ("x", "y"), Preprocess((48, 48))
    (tmp_path / "grid").mkdir()
    save_pretrained(model, tmp_path / "grid")
    flags = [tmp_path / "grid" if flag == "GRID" else flag for flag in flags]
    code, printed = run(
        photo, "--model", tiny_folder, *flags, "--out", tmp_path / "out", capsys=capsys
    )
    assert code == 2
    assert message in printed.err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["1", "1,2,3", "a,b", ""])
def test_a_query_is_two_numbers(text, capsys):
    assert infer.main(["photo.jpg", "--query", text]) == 2
    assert "expected X,Y" in capsys.readouterr().err


@pytest.mark.usefixtures("no_figures")
def test_a_class_that_only_one_of_two_models_has_is_said(
    tiny_folder, other_folder, photo, tmp_path, capsys
):
    flags = (
        photo,
        "--model",
        tiny_folder,
        "--compare",
        other_folder,
        "--method",
        "relevance",
        "--out",
        tmp_path / "out",
    )
    code, printed = run(*flags, "--target", "thing 1", capsys=capsys)
    assert code == 0
    assert (
        f"{other_folder} has no class 'thing 1': relevance there is for its own first prediction"
        in printed.err
    )
    assert "has no class" not in run(*flags, "--target", "thing 4", capsys=capsys)[1].err
    code, printed = run(*flags, "--target", "thing 4", "--against", "thing 1", capsys=capsys)
    assert f"{other_folder} has no class 'thing 1': relevance there is for 'thing 4'" in printed.err


def test_a_contrast_is_drawn_named_and_in_the_json(tiny_folder, photo, tmp_path, capsys):
    names = ["--target", "Thing 1", "--against", "thing 3"]
    flags = [photo, "--model", tiny_folder, "--method", "relevance", *names]
    code, printed = run(*flags, "--json", "--out", tmp_path, capsys=capsys)
    assert code == 0
    answer = json.loads(printed.out)
    assert (answer["target"], answer["against"]) == ("thing 1", "thing 3")
    for found in answer["maps"].values():
        assert 0 <= found["class_token"] <= 1
    model, images, _, _ = attention_of(tiny_folder, photo)
    seen = prepare(photo, [model])
    (one,) = look.explain_photos(
        model, [seen], 0, [11], methods=["relevance"], target=look.Target(1, against=3)
    )
    wanted = class_relevance(model, images, torch.tensor([1]), [11], against=torch.tensor([3]))
    torch.testing.assert_close(
        one.mean_and_heads("relevance", 11)[1:], wanted[11][0], rtol=1e-4, atol=1e-7
    )
    assert one.headline("relevance").endswith(", relevance for thing 1 against thing 3")
    caption = look.figure_caption(seen, [one], "relevance", heads=False, shared_scale=False)
    assert "what speaks for thing 1 rather than for thing 3" in caption


@pytest.mark.usefixtures("no_figures")
def test_a_query_outside_of_a_photo_does_not_stop_the_others(tiny_folder, tmp_path, capsys):
    for name, size in (("small", (20, 20)), ("large", (200, 200))):
        draw_photo(*size).save(tmp_path / f"{name}.png")
    paths = (tmp_path / "small.png", tmp_path / "large.png")
    code, printed = run(
        *paths,
        "--model",
        tiny_folder,
        "--query",
        "100,100",
        "--out",
        tmp_path / "out",
        capsys=capsys,
    )
    assert code == 2
    assert (
        f"{paths[0]}: no patch at 100,100: of 20 x 20 pixels, "
        "the model sees x from 0 to 20 and y from 0 to 20" in printed.err
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["large.png"]


# Many photos


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    for i in range(10):
        draw_photo(60 + i, 50, seed=i).save(folder / f"{i}.png")
    (folder / "5.png").write_bytes(b"no photo")
    return folder


def test_a_folder_is_drawn_in_order_despite_an_unreadable_photo(
    tiny_folder, many, tmp_path, capsys
):
    flags = ("--model", tiny_folder, "--layers", "11")
    code, printed = run(
        many, *flags, "--workers", "2", "--out", tmp_path / "out", "--json", capsys=capsys
    )
    assert code == 2
    lines = [json.loads(line) for line in printed.out.splitlines()]
    assert [Path(line["photo"]).name for line in lines] == [f"{i}.png" for i in range(10) if i != 5]
    assert f"{many / '5.png'}: cannot be read as a photo" in printed.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        Path(line["photo"]).name for line in lines
    ]
    (alone,) = answers(many / "3.png", *flags, "--out", tmp_path / "alone", capsys=capsys)
    assert (
        abs(pixels(alone["figure"]) - pixels(tmp_path / "out" / "3.png")).mean() < 0.05
    )  # a batch rounds otherwise


def test_names_alone_are_those_of_the_figures_and_nothing_is_written(
    tiny_folder, other_folder, many, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(infer_jobs, "DRAW_IN_WORKERS_FROM", 100)
    monkeypatch.setattr("minivit.system.workers.WORTH_STARTING_BYTES", 1)
    before = sorted(tmp_path.rglob("*"))
    flags = (many, "--model", tiny_folder, "--compare", other_folder, "--workers", "2")
    answered = {}
    drawn = ("--blocks", "11", "--out", tmp_path / "out")
    for name, more in (("figures", drawn), ("names", ("--no-figures",))):
        for as_json in (["--json"], []):
            if name == "names":
                monkeypatch.setattr(ViT, "forward_with_attention", None)
            # Names are read in threads, and in processes if they are more than these.
            monkeypatch.setattr(infer_jobs, "DECODE_IN_THREADS_UP_TO", 1 if as_json else 2)
            code, printed = run(*flags, *more, *as_json, capsys=capsys)
            assert code == 2  # One photo is broken.
            assert f"{many / '5.png'}: cannot be read as a photo" in printed.err
            answered[name, bool(as_json)] = printed.out
    assert sorted(path for path in tmp_path.rglob("*") if "out" not in path.parts) == before
    text = [line for line in answered["figures", False].splitlines() if "/out/" not in line]
    assert answered["names", False].splitlines() == text
    with_figures, alone = (
        [json.loads(line) for line in answered[name, True].splitlines()]
        for name in ("figures", "names")
    )
    assert len(alone) == len(with_figures) == 9
    for one, other in zip(alone, with_figures, strict=True):
        assert one.keys() == other.keys()
        assert (one["figure"], one["method"], one["layers"], one["maps"]) == (None, None, [], {})
        for answer, reference in ((one, other), (one["compare"], other["compare"])):
            assert answer["predictions"] == [
                each | {"probability": pytest.approx(each["probability"], abs=1e-6)}
                for each in reference["predictions"]
            ]


@pytest.mark.parametrize(
    "workers, batch_size, sizes, ahead",
    [
        (3, 20, [7] * 7 + [1], 6),
        (5, 128, [8] * 6 + [2], 21),
        (16, 128, [4] * 12 + [2], 48),
        (16, 8, [1] * 50, 24),
        (4, 32, [3] * 4, 15),
    ],
)
def test_worker_processes_read_photos_in_parts_of_a_batch(
    workers, batch_size, sizes, ahead, monkeypatch
):
    class Pool(Executor):
        def submit(self, function, /, *args):
            future = Future()
            future.set_result(function(*args))
            return future

    def read(paths, needs):
        assert needs == "needs"
        read_sizes.append(len(paths))
        return paths

    read_sizes = []
    monkeypatch.setattr(infer_job, "read_photos", read)
    photos = [Path(str(i)) for i in range(sum(sizes))]
    jobs = [infer_jobs.Job(photo) for photo in photos]
    reading = infer_job.read_all(jobs, "needs", Pool(), workers, batch_size=batch_size)
    assert next(reading) == photos[0]
    assert len(read_sizes) == min(len(sizes), 1 + ahead)
    assert [photos[0], *reading] == photos
    assert read_sizes == sizes
    assert list(infer_job.read_all([], "needs", Pool(), workers, batch_size=batch_size)) == []


def test_photos_are_listed_and_processes_started_before_torch_is_imported(many, tmp_path):
    code = (
        "import multiprocessing, sys\n"
        "from minivit import commands\n"
        "from minivit.system import torch_start\n"
        "def import_torch():\n"
        "    print(len(multiprocessing.active_children()), 'torch' in sys.modules)\n"
        "    raise KeyboardInterrupt\n"
        "torch_start.import_torch = import_torch\n"
        "sys.exit(commands.infer(sys.argv[1:]))"
    )
    flags = ("--device", "cpu", "--workers", "3", "--out", tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", code, many, *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (130, "3 False\n"), done.stderr
    nothing = subprocess.run(
        [sys.executable, "-c", code, tmp_path, *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert (nothing.returncode, nothing.stdout) == (2, "")
    assert "no photos in this folder" in nothing.stderr


def test_a_disk_that_is_full_for_a_figure_ends_with_one_line(tiny_folder, many, tmp_path, capsys):
    (tmp_path / "out" / "3.png").mkdir(parents=True)  # what a figure cannot replace
    flags = ("--model", tiny_folder, "--layers", "11", "--workers", "1", "--out", tmp_path / "out")
    code, printed = run(many, *flags, capsys=capsys)
    assert code == 2
    assert "Traceback" not in printed.err
    assert "directory" in printed.err.splitlines()[-1].lower()


def test_an_interrupt_leaves_no_process_and_no_half_figure(tiny_folder, many, tmp_path):
    paths = [many / "0.png"] * 200
    flags = ["--model", tiny_folder, "--workers", "1", "--out", tmp_path / "out", *CPU]
    command = [sys.executable, ROOT / "infer.py", *paths, *flags]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all of them
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        raise AssertionError("a process is left")
    assert [path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".png"] == []


def test_torchrun_shares_the_photos_out_and_waits_for_all(tiny_folder, many, tmp_path):
    """The first of two processes ends before the other has drawn anything.

    It has only photos that cannot be read.
    """
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\nif os.environ.get('RANK') == '1': time.sleep(3)"
    )
    paths = [many / f"{i}.png" for i in (5, 0, 5, 1, 5, 2)]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    flags = ["--model", tiny_folder, "--layers", "11", "--out", tmp_path / "out", "--json", *CPU]
    command = list(map(str, [*torchrun, ROOT / "infer.py", *paths, *flags]))
    late = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=late)
    photos = [Path(json.loads(line)["photo"]).name for line in done.stdout.splitlines()]
    assert photos == ["0.png", "1.png", "2.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == photos
    assert done.returncode == 1  # torchrun's own, where a process ended with 2
    assert done.stderr.count("model: ") == 1
    assert done.stderr.count("5.png: cannot be read") == 3


# Files of the user's


def test_no_file_takes_the_place_of_one_that_is_not_minivits(tiny_folder, photo, tmp_path, capsys):
    """Whichever of the three is there, all three of that photo get another name."""
    out = tmp_path / "out"
    out.mkdir()
    flags = ("--model", tiny_folder, "--layers", "11", "--html", "--npz", "--out", out)
    theirs = [out / "photo.png", out / "photo-2.html", out / "photo-3.npz"]
    for number, path in enumerate(theirs, start=2):
        path.write_text("mine")
        (answer,) = answers(photo, *flags, capsys=capsys)
        written = [Path(answer[name]) for name in ("figure", "html", "npz")]
        assert written == [out / f"photo-{number}{kind}" for kind in (".png", ".html", ".npz")]
        for file in written:
            file.unlink()
    assert sorted(out.iterdir()) == sorted(theirs)
    assert [path.read_text() for path in theirs] == ["mine"] * 3


def test_minivits_own_files_are_written_again(tiny_folder, photo, tmp_path, capsys):
    flags = ("--model", tiny_folder, "--layers", "11", "--html", "--npz", "--out", tmp_path / "out")
    first = answers(photo, *flags, capsys=capsys)
    assert answers(photo, *flags, capsys=capsys) == first
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_photos_of_one_stem_get_figures_of_their_own(tiny_folder, tmp_path, capsys):
    """On a disk that does not tell apart A and a, the second would replace the first."""
    paths = [tmp_path / name / f"{stem}.png" for name, stem in (("1", "cat"), ("2", "Cat"))]
    for path in paths:
        path.parent.mkdir()
        draw_photo(30, 20).save(path)
    flags = ("--model", tiny_folder, "--layers", "11", "--out", tmp_path / "out")
    written = [Path(answer["figure"]).name for answer in answers(*paths, *flags, capsys=capsys)]
    assert written == ["cat.png", "Cat-2.png"]


@pytest.mark.parametrize("suffix", [".png", ".html", ".npz", ".txt"])
def test_a_broken_file_is_the_users_own_and_an_empty_one_is_not(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"\x89PNG broken")
    assert not is_ours(path)
    path.write_bytes(b"")
    assert is_ours(path)
