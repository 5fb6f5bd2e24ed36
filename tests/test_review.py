"""Tests of review: what it finds in planted data, what it refuses, and its page in a browser."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import leave_figures_empty, make_pets, randomize, run_train
from PIL import Image
from test_explorer import HOSTILE, LEFT, RIGHT, browser, find, look, press, texts, too_wide

from minivit import Preprocess, ViT, ViTConfig, load_pretrained
from minivit.attention import method_rows
from minivit.errors import UserError
from minivit.tools import doctor
from minivit.tools.review import command, labels, page, pictures, report
from minivit.tools.review.measure import Measured
from minivit.training.linear_head import assign_folds, fit_linear_head

__all__ = ["browser", "look"]  # fixtures
MACHINE = ("--device", "cpu", "--amp", "off", "--workers", "1")
CHANNELS = {"red": 0, "green": 1, "blue": 2}


def draw(path: Path, class_name: str, seed: int) -> None:
    """Draw a photo that is mostly of the class's colour, with a pattern of its own."""
    rng = np.random.default_rng([seed, CHANNELS[class_name]])
    squares = rng.integers(0, 120, (8, 10, 3))
    squares[..., CHANNELS[class_name]] += 120
    photo = Image.fromarray(squares.astype(np.uint8)).resize((50, 40), Image.Resampling.NEAREST)
    path.parent.mkdir(parents=True, exist_ok=True)
    photo.save(path)


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """Class folders of 14 photos each, with one label error each of red and blue, and a copy."""
    root = tmp_path_factory.mktemp("planted") / "photos"
    for name in CHANNELS:
        for i in range(12):
            draw(root / "train" / name / f"{i:02}.png", name, i)
        for i in range(12, 16):
            draw(root / "test" / name / f"{i}.png", name, i)
    draw(root / "train" / "green" / "really red.png", "red", 90)
    draw(root / "test" / "red" / "really blue.png", "blue", 91)
    shutil.copy(root / "train" / "blue" / "03.png", root / "test" / "blue" / "a copy.png")
    return root


@pytest.fixture(scope="module")
def run(planted, tiny_saved, tmp_path_factory) -> Path:
    """A run on these photos."""
    out = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        leave_figures_empty(patch)
        assert run_train(tiny_saved, planted, out, "--epochs", "2", "--cache-views", "1") == 0
    return out


def review(run: Path, out: Path, *flags: object) -> int:
    return command.main([str(run), "--out", str(out), *MACHINE, *map(str, flags)])


@pytest.fixture(scope="module")
def reviewed(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("review") / "review"
    assert review(run, out) == 0
    return out


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "review.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def about(out: Path) -> dict:
    return json.loads((out / "review.json").read_text(encoding="utf-8"))


def held(out: Path) -> dict:
    """Return the data in a page."""
    text = (out / "review.html").read_text(encoding="utf-8")
    script = r'<script type="application/json" id="data">(.*?)</script>'
    return json.loads(re.search(script, text, re.DOTALL)[1])


# What is found


def test_planted_label_errors_are_ranked_first(reviewed):
    suspicious = [Path(path).name for path in about(reviewed)["suspicious_labels"]]
    assert set(suspicious[:2]) == {"really red.png", "really blue.png"}
    likeness = {}
    page_data = held(reviewed)
    for suspect in page_data["suspicious"]:
        likeness[Path(suspect["path"]).name] = page_data["classes"][suspect["likeness"]]
    assert likeness["really red.png"] == "red" and likeness["really blue.png"] == "blue"


def test_an_interrupted_review_leaves_no_page_of_an_earlier_one(
    run, reviewed, tmp_path, monkeypatch
):
    shutil.copytree(reviewed, tmp_path / "review")

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(page, "write_page", interrupt)
    assert review(run, tmp_path / "review") == 130
    assert not (tmp_path / "review" / "review.html").exists()
    monkeypatch.undo()
    assert review(run, tmp_path / "review") == 0
    assert held(tmp_path / "review") == held(reviewed)


def test_a_copy_in_training_and_test_is_found(reviewed, planted):
    summary = about(reviewed)
    assert [Path(path).name for path in summary["copies_in_training"]] == ["a copy.png"]
    assert [sorted(Path(p).name for p in group) for group in summary["copies"]] == [
        ["03.png", "a copy.png"]
    ]
    assert (
        "1 of 17 validation and test photos is also in training"
        in (summary["sentences"]["nearly the same photo"])
    )
    row = next(row for row in rows_of(reviewed) if row["path"].endswith("a copy.png"))
    assert row["flags"] == "copy" and row["neighbour_1"].endswith("03.png")


def test_the_table_has_a_row_for_every_photo(reviewed, planted):
    rows = rows_of(reviewed)
    assert len(rows) == len(list(planted.rglob("*.png"))) == 3 * 16 + 3
    paths = [row["path"] for row in rows]
    assert paths == sorted(paths)
    by_split = {name: [row for row in rows if row["split"] == name] for name in ("train", "val")}
    assert all(row["run_predicted"] == "" for row in by_split["train"])
    assert all(row["run_predicted"] for row in by_split["val"])
    assert {row["fold"] for row in rows} == set("01234")
    for row in rows:
        assert 0 <= float(row["label_probability"]) <= 1
        assert row["neighbour_5"] and row["path"] not in [
            row[f"neighbour_{i}"] for i in range(1, 6)
        ]


def test_mistakes_are_those_of_the_run_most_confident_first(reviewed, run):
    wrong = [r for r in rows_of(reviewed) if r["run_predicted"] not in ("", r["label"])]
    wrong.sort(key=lambda row: -float(row["run_probability"]))
    assert [row["path"] for row in wrong] == about(reviewed)["mistakes"]
    summary = json.loads((run / "summary.json").read_text())
    assert about(reviewed)["test"]["accuracy"] == pytest.approx(summary["test_accuracy"])
    page_data = held(reviewed)
    assert len(page_data["mistakes"]) == len(wrong)
    for mistake in page_data["mistakes"]:
        assert all(uri.startswith("data:image/jpeg;base64,") for uri in mistake["maps"])
        assert mistake["maps"][0] != mistake["maps"][1]
    in_cells = [i for _, _, photos in page_data["cells"] for i in photos]
    for i in in_cells:
        assert page_data["photos"][str(i)]["picture"].startswith("data:image/jpeg;base64,")
    assert len(in_cells) == len(set(in_cells)) == about(reviewed)["held_out_photos"]


def test_no_photo_is_judged_by_a_head_that_has_seen_it():
    # Each photo is alone in its direction, so that only a head that has seen it can know its label.
    features = torch.eye(60)
    targets = torch.arange(60) % 3
    head = fit_linear_head(features, targets, 3)
    assert (features @ head.weight.T + head.bias).argmax(1).equal(targets)
    assert (head.held_out_logits.argmax(1) == targets).float().mean() < 0.7


@pytest.mark.parametrize("folds", [2, 3, 10])
def test_folds_are_stratified_whatever_their_number(folds):
    targets = torch.tensor([0] * 20 + [1] * 2 + [2] * 40)
    fold_of = assign_folds(targets, 3, folds)
    for c in (0, 2):
        counts = fold_of[targets == c].bincount(minlength=folds)
        assert counts.max() - counts.min() <= 1
    assert len(fold_of[targets == 1].unique()) == 2
    head = fit_linear_head(torch.randn(62, 8), targets, 3, folds)
    assert head.fold_of.equal(fold_of) and head.held_out_logits.shape == (62, 3)


# Parts


def test_wilsons_interval_is_that_of_the_textbook():
    # https://en.wikipedia.org/wiki/Binomial_proportion_confidence_interval, and by hand for 0.
    half = labels.measure_accuracy(torch.tensor([True] * 5 + [False] * 5))
    assert (half.low, half.high) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    none = labels.measure_accuracy(torch.zeros(10, dtype=torch.bool))
    z2 = labels.NORMAL_95**2
    assert (none.low, none.high) == pytest.approx((0, z2 / (10 + z2)))
    assert str(half) == "0.500 (5/10, 95% interval 0.237 to 0.763)"


def test_a_class_that_is_hard_to_tell_accuses_no_others():
    # Photos of class 1 are usually sure of it, at 0.9. A photo of class 0 must be as sure.
    p = torch.tensor([[0.1, 0.9], [0.1, 0.9], [0.3, 0.7], [0.05, 0.95], [0.9, 0.1]])
    targets = torch.tensor([1, 1, 0, 0, 0])
    assert labels.find_suspicious(p, targets).tolist() == [False, False, False, True, False]


def test_the_only_photo_of_a_class_is_not_suspicious():
    p = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [1.0, 0, 0], [1.0, 0, 0]])
    targets = torch.tensor([0, 1, 1, 2])
    assert labels.find_suspicious(p, targets).tolist() == [False, True, True, False]


def test_neighbours_are_the_nearest_by_cosine(monkeypatch):
    monkeypatch.setattr(labels, "COMPARED_AT_ONCE", 3)
    features = torch.randn(8, 5)
    unit = torch.nn.functional.normalize(features - features.mean(0))
    similarity = (unit @ unit.T).fill_diagonal_(-2)
    assert labels.nearest_neighbours(features).equal(similarity.topk(5).indices)
    assert labels.nearest_neighbours(features[:3]).shape == (3, 2)


def test_the_two_maps_of_a_mistake_are_relevance_for_its_two_classes():
    config = ViTConfig((32, 32), 8, 24, 3, 3, 48, num_classes=5, num_registers=2)
    model = randomize(ViT(config)).requires_grad_(False)
    model.preprocess = Preprocess((32, 32))
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    maps = pictures.relevance_maps(model, photo, [3, 1])
    for values, target in zip(maps, (3, 1)):
        image = model.preprocess(photo)[None]
        targets = torch.tensor([target])
        _, rows = method_rows(model, image, [2], method="relevance", targets=targets)
        torch.testing.assert_close(values.flatten(), rows[2][0, 0, 0, 3:])


def test_a_page_of_noise_keeps_its_pictures_small():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (900, 900, 3), np.uint8))
    for size in (pictures.LARGE, pictures.SMALL):
        uri = pictures.to_uri(pictures.shrink(noise, size.side), size.limit)
        assert len(uri) < 1.4 * size.limit
    maps_and_photos = page.MOST_LISTED * 4 * 1.4 * pictures.LARGE.limit
    small = page.MOST_IN_CELLS + page.MOST_LISTED * (labels.NEIGHBOURS + page.MOST_OF_A_GROUP)
    assert maps_and_photos + small * 1.4 * pictures.SMALL.limit < 26e6


# Data


def test_blocks_are_retrained_without_each_fold(run, planted, tmp_path, capsys):
    assert review(run, tmp_path / "out", "--blocks", "11", "--folds", "2") == 0
    assert "blocks 11 are retrained for 2 folds in 2 epochs each, which takes about " in (
        capsys.readouterr().err
    )
    summary = about(tmp_path / "out")
    assert summary["cross_validation"]["model"].endswith(" with retrained blocks 11")
    assert len(summary["cross_validation"]["folds"]) == 2
    assert len(rows_of(tmp_path / "out")) == 51


def test_blocks_that_need_too_much_memory_are_refused(run, tmp_path, capsys):
    assert review(run, tmp_path / "out", "--blocks", "11", "--cache-gib", "1e-6") == 2
    assert "more than --cache-gib 1e-06" in capsys.readouterr().err


def test_pets_are_reviewed_too(tiny_saved, tmp_path, no_figures, capsys):
    make_pets(tmp_path / "data", trainval=12, test=4)
    assert run_train(tiny_saved, tmp_path / "data", tmp_path / "run", "--blocks", "none") == 0
    assert review(tmp_path / "run", tmp_path / "out") == 0
    assert len(rows_of(tmp_path / "out")) == 3 * 16
    names = [photo["name"] for photo in held(tmp_path / "out")["photos"].values()]
    assert not any("images" in name for name in names)
    # The photos of a breed are those of the others, so every one has copies.
    assert "validation and test photos are also in training" in capsys.readouterr().out


def test_unreadable_photos_hostile_names_and_small_classes(tiny_saved, tmp_path, no_figures):
    root = tmp_path / "data"
    for i in range(6):
        draw(root / "train" / "<b>red" / f"\u202e{i}&.png", "red", i)
        draw(root / "train" / "=1+1" / f"{i}'\".png", "green", i)
    (root / "train" / "=1+1" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    draw(root / "train" / "two" / "one.png", "blue", 0)
    for name, channel in (("<b>red", "red"), ("=1+1", "green"), ("two", "blue")):
        draw(root / "val" / name / "v.png", channel, 50)
        draw(root / "test" / name / "t.png", channel, 60)
    flags = ("--blocks", "none", "--skip-bad")
    assert run_train(tiny_saved, root, tmp_path / "run", *flags) == 0
    assert review(tmp_path / "run", tmp_path / "out") == 0
    rows = rows_of(tmp_path / "out")
    assert [row["flags"] for row in rows if row["path"].endswith("broken.png")] == ["unreadable"]
    assert len(rows) == 20
    assert all(row["label"] == Path(row["path"]).parent.name for row in rows)
    assert len(about(tmp_path / "out")["left_out"]) == 1
    assert "<b>red" in held(tmp_path / "out")["classes"]
    assert "<b>" not in (tmp_path / "out" / "review.html").read_text(encoding="utf-8")


def test_a_base_that_was_trained_on_these_photos_is_passed_over(run, planted, tmp_path):
    second = tmp_path / "second"
    shutil.copytree(run, second)
    summary = json.loads((run / "summary.json").read_text())
    (second / "summary.json").write_text(json.dumps(summary | {"base": str(run)}))
    found = command.find_reviewed_run(str(second))
    assert found.base == str(run)
    base = command.load_base(found, str(planted), load_pretrained(second), with_head=False)
    assert base.origin.source == summary["base"] != str(run)


# What is refused


def test_a_base_that_is_gone_is_named_with_its_run(run, planted, tmp_path):
    found = dataclasses.replace(command.find_reviewed_run(str(run)), base=str(tmp_path / "gone"))
    with pytest.raises(UserError, match=f"the model that {run} was trained from: .*gone.*train.py"):
        command.load_base(found, str(planted), load_pretrained(run), with_head=False)


def test_what_is_no_finished_run_is_refused(run, planted, tmp_path, capsys):
    assert review(tmp_path / "nothing", tmp_path / "out") == 2
    assert "expected the folder of a finished run" in capsys.readouterr().err
    shutil.copytree(run, tmp_path / "unfinished")
    (tmp_path / "unfinished" / "state.safetensors").touch()
    assert review(tmp_path / "unfinished", tmp_path / "out") == 2
    assert "not finished" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_photos_that_have_moved_are_asked_for(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    summary["settings"]["data"] = str(tmp_path / "gone")
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    assert review(tmp_path / "run", tmp_path / "out") == 2
    assert "found no such folder; say with --data where they are now" in capsys.readouterr().err


def test_photos_that_the_run_was_not_trained_on_are_refused(run, planted, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(planted, root, ignore=shutil.ignore_patterns(".minivit"))
    found = command.find_reviewed_run(str(run))
    assert len(command.load_reviewed(str(root), found).paths()) == 51  # A copy is the same.
    moved = root / "train" / "green" / "really red.png"
    moved.rename(root / "train" / "red" / moved.name)
    with pytest.raises(UserError, match="moved since; train again, then review that run"):
        command.load_reviewed(str(root), found)


def test_files_of_others_are_not_overwritten_but_those_of_a_review_are(reviewed, tmp_path):
    command.check_folder(reviewed)
    command.check_folder(tmp_path / "new")
    (tmp_path / "review.csv").write_text("mine")
    with pytest.raises(UserError, match="holds review.csv, which minivit did not write there"):
        command.check_folder(tmp_path)


def test_more_folds_than_make_sense_are_refused(run, tmp_path, capsys):
    assert review(run, tmp_path / "out", "--folds", "21") == 2
    assert "--folds 21: expected at most 20" in capsys.readouterr().err


def test_nothing_beside_the_photos_is_written_or_changed(reviewed, planted):
    found = {path.name for path in planted.rglob("*") if path.is_file()}
    assert {name for name in found if not name.endswith(".png")} <= {
        *(path.name for path in (planted / ".minivit").glob("*"))
    }
    assert (planted / "train" / "green" / "really red.png").exists()


def test_groups_of_copies_are_those_of_the_doctor():
    red, green = (Image.new("RGB", (12, 12), colour) for colour in ("red", "green"))
    assert list(doctor.group_copies(["a", "b", "a"], [red, green, red])) == [[0, 2]]


# In a browser


def fake_findings(tmp_path: Path, num_classes: int) -> report.Findings:
    """Return findings of photos in files with hostile names: two mistakes, two suspicious labels.

    Three of the photos are in validation, and the first two are copies of each other.
    """
    names = [*HOSTILE.values()][:3]
    classes = [f"class {i}" for i in range(num_classes)]
    classes[: len(names)] = names
    paths = []
    for i in range(8):
        paths.append(tmp_path / f"<img src=x onerror='window.pwned=1'> {i}.png")
        draw(paths[-1], "red", i)
    splits = ["val", "val", "test", *["train"] * 5]
    targets = torch.tensor([0, 1, 1, 0, 0, 1, 1, 0])
    logits = torch.full((8, num_classes), -5.0)
    logits[torch.arange(8), torch.tensor([1, 0, 1, 0, 0, 1, 1, 0])] = 5.0
    held_out = torch.full((8, num_classes), -5.0)
    held_out[torch.arange(8), torch.tensor([0, 1, 1, 1, 0, 0, 1, 0])] = 2.0
    features = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    measured = Measured(list(range(8)), {}, features, logits, [], [])
    folds = labels.HeldOut(torch.arange(8) % 2, held_out.softmax(1), "a head")
    photos = report.Photos(classes, paths, splits, targets)
    return report.find("runs/<b>mine", photos, measured, folds, [[0, 3]])


def test_the_sentences_say_how_many_and_what_to_do(tmp_path):
    sentences = report.describe(fake_findings(tmp_path, 3))
    assert sentences["mistakes"].startswith("2 of 3 validation and test photos are wrong, no two")
    assert (
        "1 of 3 validation and test photos is also in training"
        in (sentences["nearly the same photo"])
    )
    assert sentences["suspicious labels"].startswith("2 of 8 labels surprise a head that had not")
    assert "can hardly all be wrong" in sentences["suspicious labels"]
    accuracy = sentences["how sure the accuracy is"]
    assert "a head has an accuracy of 0.750 (6/8, 95% interval 0.409 to 0.929)" in accuracy
    assert "The run itself has 1.000 (1/1, 95% interval" in accuracy


@pytest.fixture
def page_text(tiny, tmp_path):
    tiny.requires_grad_(False)

    def write(num_classes: int = 3) -> str:
        findings = fake_findings(tmp_path, num_classes)
        page.write_page(tmp_path / "review.html", findings, tiny, workers=1)
        return (tmp_path / "review.html").read_text(encoding="utf-8")

    return write


def focused(driver) -> str:
    return driver.execute_script("return document.activeElement.textContent")


def test_the_page_shows_names_as_text_and_is_worked_by_keys(look, page_text):
    driver = look(page_text())
    assert texts(driver, "h1") == ["Review of runs/<b>mine"]
    titles = texts(driver, ".card h3")
    assert len(titles) == 4 and HOSTILE["markup"] in titles[0]
    assert driver.execute_script("return document.querySelectorAll('img[src=x], b').length") == 0
    # From card to card.
    driver.execute_script("document.querySelector('#label-cards .card').focus()")
    assert titles[2] in focused(driver)
    press(driver, RIGHT)
    assert titles[3] in focused(driver)
    press(driver, "x")
    assert texts(driver, "#copy") == ["Copy 1 ticked path"]
    press(driver, LEFT * 2)
    assert titles[2] in focused(driver)
    driver.execute_script("document.getElementById('copy').focus()")
    press(driver, "\ue007")  # enter
    chosen = driver.execute_script("return document.getElementById('list').value")
    assert chosen.endswith("5.png") and "\n" not in chosen
    assert "copied" in texts(driver, "#copied")[0] or "selected" in texts(driver, "#copied")[0]
    # From number to number of the matrix, and into a cell.
    driver.execute_script("document.querySelector('td button').focus()")
    press(driver, "\ue015")  # down
    press(driver, "\ue007")  # enter
    assert find(driver, "#cell").is_displayed()
    assert texts(driver, "#cell-photos figcaption") == [
        "<img src=x onerror='window.pwned=1'> 2.png"
    ]
    press(driver, "\ue00c")  # escape
    assert not find(driver, "#cell").is_displayed()


@pytest.mark.parametrize("num_classes", [3, 37, 120])
def test_the_page_fits_a_phone_whatever_the_number_of_classes(look, page_text, num_classes):
    text = page_text(num_classes)
    for width, height in ((390, 844), (1280, 900)):
        driver = look(text, width, height)
        assert too_wide(driver) <= 0
        if num_classes > 40:
            assert len(texts(driver, ".pairs button")) == 2
            find(driver, ".pairs button").click()
            assert find(driver, "#cell").is_displayed()
            find(driver, "#close").click()
        else:
            assert len(driver.find_elements("css selector", "tbody tr")) == num_classes


def test_what_the_keyboard_reaches_hides_behind_no_names(look, page_text):
    for width, height in ((390, 844), (844, 390)):
        driver = look(page_text(37), width, height)
        script = """
            const place = document.activeElement.getBoundingClientRect();
            const top = document.elementFromPoint(place.x + 5, place.y + 5);
            return document.activeElement.contains(top)
        """
        driver.execute_script("[...document.querySelectorAll('td button')].at(-1).focus()")
        driver.execute_script("[...document.querySelectorAll('td button')].at(-1).focus()")
        for _ in range(2):
            press(driver, LEFT)
            assert driver.execute_script(script)
        driver.execute_script("document.querySelector('#label-cards .card').focus()")
        press(driver, RIGHT)
        assert driver.execute_script(script)


def test_the_page_may_load_nothing(page_text):
    text = page_text()
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', text, re.DOTALL)[1]
    assert policy.startswith("default-src 'none'; img-src data:;") and "_HASH" not in text
    assert "SHARED_STYLE" not in text
    assert not re.search(r"@import|url\(|<link|<iframe", text)
