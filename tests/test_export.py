"""A tail finds its base, and timm reads what is exported."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from checkpoints import (
    SMALL,
    TUNED_LABELS,
    add_noise,
    fine_tune,
    needs_timm,
    write_by_transformers,
)
from conftest import DINOV2_PREPROCESSOR, draw_photo, randomize
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from minivit import ViT, ViTConfig, load_pretrained, save_pretrained
from minivit.checkpoints import weights
from minivit.checkpoints.timm_configs import timm_config
from minivit.checkpoints.weights import check_written, differences, hash_outside_tail, save_tail
from minivit.data.preprocess import Preprocess
from minivit.errors import UserError
from minivit.model import freeze_except
from minivit.tools import export


@pytest.fixture
def run(tiny_folder, tmp_path):
    return fine_tune(tiny_folder, tmp_path / "run"), tmp_path / "run"


@pytest.mark.parametrize("img_size", [None, (48, 24)], ids=["same-size", "48x24"])
def test_a_tail_finds_its_base_and_gives_identical_logits(img_size, tiny_folder, tmp_path):
    model = fine_tune(tiny_folder, tmp_path / "run", img_size=img_size)
    tail = load_pretrained(tmp_path / "run" / "tail.safetensors").eval()
    whole = load_pretrained(tmp_path / "run").eval()
    assert tail.labels == whole.labels == TUNED_LABELS
    assert tail.preprocess == whole.preprocess == model.preprocess
    images = model.preprocess(draw_photo(90, 70))[None]
    assert torch.equal(tail(images), model(images))
    assert torch.equal(whole(images), model(images))
    names = load_file(tmp_path / "run" / "tail.safetensors").keys()
    assert {name.split(".")[1] for name in names if name.startswith("blocks")} == {"10", "11"}
    assert not any(name.startswith(("cls", "pos", "patch")) for name in names)


@pytest.mark.usefixtures("no_figures")
def test_a_tail_is_found_from_another_folder_and_by_the_commands(
    run, tmp_path, monkeypatch, capsys, photos
):
    import infer

    monkeypatch.chdir(tmp_path)
    assert (
        infer.main(
            [str(photos[0]), "--model", "run/tail.safetensors", "--layers", "11", "--amp", "off"]
        )
        == 0
    )
    by_tail = capsys.readouterr().out
    assert infer.main([str(photos[0]), "--model", "run", "--layers", "11", "--amp", "off"]) == 0
    assert [line for line in by_tail.splitlines() if "  " in line] == [
        line for line in capsys.readouterr().out.splitlines() if "  " in line
    ]


def spoil_base(folder, tail):
    tensors = load_file(folder / "model.safetensors")
    tensors["vit.encoder.layer.3.output.dense.bias"][5] += 1e-6
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def retag(tail, change):
    with safe_open(tail, "pt") as file:
        about = json.loads(file.metadata()["minivit"])
    change(about)
    save_file(load_file(tail), tail, {"minivit": json.dumps(about)})


def retensor(tail, change):
    with safe_open(tail, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(tail)
    change(tensors)
    save_file(tensors, tail, metadata)


SPOILT = {
    "another base": (spoil_base, "is not the one it was trained on"),
    "no base": (
        lambda folder, _: shutil.rmtree(folder),
        "needs its base: .*neither a folder or file here nor a Hub id",
    ),
    "no hash": (
        lambda _, tail: retag(tail, lambda m: m.pop("sha256")),
        "not that of a minivit tail",
    ),
    "labels that are no list": (
        lambda _, tail: retag(tail, lambda m: m.update(labels=7)),
        "not that of a minivit tail",
    ),
    "fewer labels": (
        lambda _, tail: retag(tail, lambda m: m.update(labels=["a"])),
        "2 misshapen",
    ),
    "no head": (
        lambda _, tail: retensor(tail, lambda t: t.pop("head.bias")),
        r"1 missing \(head.bias\)",
    ),
    "a stranger": (
        lambda _, tail: retensor(tail, lambda t: t.update(x=torch.zeros(1))),
        r"1 unexpected \(x\)",
    ),
    "fewer tensors": (
        lambda _, tail: retensor(tail, lambda t: t.pop("norm.bias")),
        "is not the one it was trained on",
    ),
    "not finite": (
        lambda _, tail: retensor(tail, lambda t: t["norm.bias"].fill_(float("nan"))),
        "norm.bias holds NaN",
    ),
    "cut": (lambda _, tail: tail.write_bytes(tail.read_bytes()[:-9]), "is the file complete"),
}


@pytest.mark.parametrize("spoil, message", SPOILT.values(), ids=SPOILT)
def test_a_tail_without_its_own_base_is_refused(spoil, message, run, tiny_folder):
    spoil(tiny_folder, run[1] / "tail.safetensors")
    with pytest.raises(UserError, match=message):
        load_pretrained(run[1] / "tail.safetensors")


def test_a_tail_is_written_in_the_same_bytes_each_time(run, tmp_path):
    model, folder = run[0], run[1]
    save_tail(model, tmp_path / "tail.safetensors")
    again = (tmp_path / "tail.safetensors").read_bytes()
    assert again == (folder / "tail.safetensors").read_bytes()
    with safe_open(tmp_path / "tail.safetensors", "pt") as file:
        assert file.metadata().keys() == {"minivit"}


def test_a_tail_of_before_with_a_key_for_each_fact_is_read(run, tmp_path):
    with safe_open(run[1] / "tail.safetensors", "pt") as file:
        about = json.loads(file.metadata()["minivit"])
    for name in ("labels", "preprocess"):
        about[name] = json.dumps(about[name])
    old = tmp_path / "old.safetensors"
    save_file(load_file(run[1] / "tail.safetensors"), old, about)
    assert torch.equal(load_pretrained(old).head.weight, run[0].head.weight)


@pytest.mark.parametrize("change", ["in place", "by its data", "replaced"])
def test_the_hash_is_that_of_the_frozen_weights_as_they_are_now(change, run):
    model = run[0]
    before = hash_outside_tail(model)
    weight = model.blocks[0].mlp.fc1.weight
    if change == "in place":
        with torch.no_grad():
            weight += 1
    elif change == "by its data":
        weight.data.add_(1)
    else:
        model.blocks[0].mlp.fc1.weight = torch.nn.Parameter(weight + 1, requires_grad=False)
    assert hash_outside_tail(model) != before


@pytest.mark.parametrize("labels", [TUNED_LABELS, ("cat", "dog")], ids=["same", "other"])
def test_a_tail_of_a_tail_has_the_first_ones_base(labels, run, tiny_folder, tmp_path):
    first = run[1] / "tail.safetensors"
    model = load_pretrained(first, labels=labels)
    freeze_except(model, [3])  # The first one trained blocks 10 and 11.
    add_noise(model)
    second = tmp_path / "second.safetensors"
    save_tail(model, second)
    names = {name.split(".")[1] for name in load_file(second) if name.startswith("blocks")}
    assert names == {"3", "10", "11"}
    shutil.rmtree(run[1])  # The first tail is not needed any more.
    again = load_pretrained(second)
    assert differences(again, model) == []
    assert again.origin.base == str(tiny_folder)
    third = tmp_path / "third.safetensors"
    freeze_except(again, [])
    save_tail(again, third)
    assert differences(load_pretrained(third), again) == []


def test_what_is_written_is_compared_as_a_whole(run):
    model, folder = run
    check_written(model, folder)


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


WRITTEN_WRONG = {
    "a frozen weight": (lambda f: spoil_base(f, None), "blocks.3.mlp.fc2.bias"),
    "labels": (
        lambda f: edit_json(f / "config.json", lambda c: c["id2label"].update({"0": "Abessinian"})),
        "those that were tested: labels",
    ),
    "an epsilon": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(layer_norm_eps=1e-6)),
        "those that were tested: eps",
    ),
    "heads": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(num_attention_heads=6)),
        "those that were tested: num_heads",
    ),
    "the mean": (
        lambda f: edit_json(
            f / "preprocessor_config.json", lambda c: c.update(image_mean=[0.4] * 3)
        ),
        "those that were tested: preprocessing",
    ),
    "the tail's labels": (
        lambda f: retag(f / "tail.safetensors", lambda m: m["labels"].reverse()),
        "tail.safetensors: read back, these are not those that were tested: labels",
    ),
    "the hash of the base": (
        lambda f: retag(f / "tail.safetensors", lambda m: m.update(sha256="0" * 64)),
        "tail.safetensors: read back, the hash of its base differs",
    ),
    "a weight of the tail": (
        lambda f: retensor(f / "tail.safetensors", lambda t: t["head.bias"].add_(1)),
        "tail.safetensors: .*: head.bias",
    ),
}


@pytest.mark.parametrize("spoil, message", WRITTEN_WRONG.values(), ids=WRITTEN_WRONG)
def test_whatever_is_written_wrong_is_noticed(spoil, message, run):
    model, folder = run
    spoil(folder)
    with pytest.raises(RuntimeError, match=message):
        check_written(model, folder)


def test_a_base_that_has_changed_is_told_but_is_no_failure(run, tiny_folder, capsys):
    model, folder = run
    spoil_base(tiny_folder, None)
    capsys.readouterr()
    check_written(model, folder)
    err = capsys.readouterr().err
    assert f"its base {tiny_folder} is not the one it was trained on" in err
    # A base of other sizes has changed, too.
    edit_json(tiny_folder / "config.json", lambda c: c.update(layer_norm_eps=1e-6))
    check_written(model, folder)
    assert "is not the one it was trained on" in capsys.readouterr().err
    # What the tail holds itself is compared all the same.
    retensor(folder / "tail.safetensors", lambda t: t["head.bias"].add_(1))
    with pytest.raises(RuntimeError, match="tail.safetensors: .*: head.bias$"):
        check_written(model, folder)


def test_a_tail_without_its_base_is_told_but_is_no_failure(run, tiny_folder, capsys):
    model, folder = run
    shutil.rmtree(tiny_folder)
    capsys.readouterr()
    check_written(model, folder)
    err = capsys.readouterr().err
    assert "tail.safetensors needs its base" in err
    assert f"{folder / 'model.safetensors'} holds the whole model" in err


def test_a_timm_model_trained_with_its_head_is_written_as_it_was_tested(
    tiny, tiny_folder, tmp_path, capsys
):
    # timm rounds a margin of half a pixel to the nearest; transformers, which is written, down.
    tiny.preprocess = Preprocess(36, (32, 32))
    (tmp_path / "base").mkdir()
    save_pretrained(tiny, tmp_path / "base")
    exported(tmp_path / "base", capsys)
    base = tmp_path / "base" / "timm"
    assert load_pretrained(base).preprocess.round_margins
    model = fine_tune(base, tmp_path / "run", labels=tiny.labels)
    assert model.head.weight.abs().max() > 0  # the base's head, trained
    assert capsys.readouterr().err == ""
    check_written(model, tmp_path / "run")
    # Written without being prepared for training, it says so.
    save_pretrained(load_pretrained(base), tmp_path / "run")
    assert "transformers rounds the margins of a crop down" in capsys.readouterr().err


def exported(folder, capsys, *args):
    assert export.main([str(folder), "--to", "timm", *args]) == 0
    return capsys.readouterr()


def test_an_export_to_timm_comes_back_the_same(run, tmp_path, capsys):
    model, folder = run
    printed = exported(folder, capsys)
    assert f"checkpoint_path='{folder / 'timm' / 'model.safetensors'}'" in printed.out
    assert "eps of 1e-6, this model's 1e-12" in printed.err
    again = load_pretrained(folder / "timm")
    assert again.labels == TUNED_LABELS
    assert again.preprocess == model.preprocess.__class__(
        **{**vars(model.preprocess), "round_margins": True}
    )
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_an_export_is_read_back(run, capsys, monkeypatch):
    read = weights.load_pretrained

    def misread(source, **options):
        model = read(source, **options)
        if str(source).endswith("timm"):
            model.labels = model.labels[::-1]
        return model

    monkeypatch.setattr(weights, "load_pretrained", misread)
    with pytest.raises(
        RuntimeError, match="timm: read back, .* not those that were tested: labels"
    ):
        exported(run[1], capsys)


@pytest.mark.parametrize(
    "preprocess, message",
    [
        (Preprocess((40, 60), (32, 32)), "timm cannot squash photos to 40 x 60 pixels"),
        (Preprocess(40, (32, 24)), "timm cannot crop 32 x 24 pixels from a photo"),
    ],
    ids=["squash", "edge"],
)
def test_preprocessing_that_timm_lacks_is_refused_by_name(preprocess, message, tiny):
    tiny.preprocess = preprocess
    tiny.config = replace(tiny.config, img_size=preprocess.size)
    with pytest.raises(UserError, match=message):
        timm_config(tiny)


def test_a_squashed_crop_of_the_whole_photo_is_exported(tiny, tmp_path, capsys):
    tiny.preprocess = Preprocess((32, 32), (32, 32))
    save_pretrained(tiny, tmp_path)
    exported(tmp_path, capsys)
    assert load_pretrained(tmp_path / "timm").preprocess.crop is None


def test_what_timm_cannot_hold_is_refused_and_nothing_is_written(tmp_path, capsys):
    config = ViTConfig((28, 28), 14, 24, 2, 3, 48, 3, layer_scale=True, pool="cls+mean")
    model = randomize(ViT(config))
    model.labels, model.preprocess = TUNED_LABELS, Preprocess(32, (28, 28))
    (tmp_path / "run").mkdir()
    save_pretrained(model, tmp_path / "run")
    assert export.main([str(tmp_path / "run"), "--to", "timm"]) == 2
    assert "reads the class token" in capsys.readouterr().err
    assert not (tmp_path / "run" / "timm").exists()
    assert export.main(["demo", "--to", "timm"]) == 2
    assert "--out DIR" in capsys.readouterr().err


@needs_timm
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("options", [{}, {"img_size": (384, 384)}], ids=["224", "384"])
def test_timm_reads_what_was_exported_with_the_same_logits(options, tmp_path, capsys):
    import timm

    base = tmp_path / "base"
    write_by_transformers(
        base, "ViTForImageClassification", SMALL | {"patch_size": 16}, {"size": 224}
    )
    model = fine_tune(base, tmp_path / "run", **options)
    call = exported(tmp_path / "run", capsys).out
    theirs = eval(call, {"timm": timm}).eval()
    images = model.preprocess(draw_photo(300, 200))[None]
    with torch.no_grad():
        assert_close(theirs(images), model(images), rtol=0, atol=1e-4)
    again = timm.create_model(f"local-dir:{tmp_path / 'run' / 'timm'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(again(images), theirs(images))
    data = timm.data.resolve_data_config(model=again)
    photo = draw_photo(333, 500)
    assert_close(
        timm.data.create_transform(**data)(photo), model.preprocess(photo), rtol=0, atol=1e-5
    )
    assert json.loads((tmp_path / "run" / "timm" / "config.json").read_text())[
        "label_names"
    ] == list(TUNED_LABELS)


@needs_timm
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["Dinov2Model", "Dinov2WithRegistersModel"])
def test_timm_reads_exported_dinov2_backbones(kind, tmp_path, capsys):
    import timm

    sizes = SMALL | {"patch_size": 14, "image_size": 518, "mlp_ratio": 4}
    write_by_transformers(tmp_path, kind, sizes, DINOV2_PREPROCESSOR)
    model = load_pretrained(tmp_path).eval()
    theirs = eval(exported(tmp_path, capsys).out, {"timm": timm}).eval()
    images = model.preprocess(draw_photo(300, 200))[None]
    with torch.no_grad():
        assert_close(
            theirs.forward_features(images),
            model.norm(model.tokens(images, model.config.depth)),
            rtol=0,
            atol=1e-4,
        )
    again = load_pretrained(tmp_path / "timm").eval()
    with torch.no_grad():
        assert_close(again(images), model(images), rtol=0, atol=1e-4)


@pytest.mark.parametrize("config", [{"qkv_bias": False}, {"num_registers": 2}], ids=str)
def test_a_model_that_timm_lacks_is_refused_by_name(config):
    sizes = {"img_size": (32, 32), "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
    model = ViT(ViTConfig(**sizes, **config))
    model.preprocess = Preprocess((32, 32))
    with pytest.raises(UserError, match="timm has no ViT with qkv_bias"):
        timm_config(model)


def test_an_export_replaces_an_earlier_one_and_no_other_files(tiny_folder, tmp_path, capsys):
    out = tmp_path / "timm"
    command = [str(tiny_folder), "--to", "timm", "--out", str(out)]
    assert export.main(command) == 0
    written = (out / "model.safetensors").read_bytes()
    assert export.main(command) == 0
    assert (out / "model.safetensors").read_bytes() == written
    (out / "config.json").write_text('{"architecture": "mine"}')
    (out / "model.safetensors").write_text("mine")
    assert export.main(command) == 2
    assert "holds model.safetensors, config.json, which minivit did not" in capsys.readouterr().err
    assert (out / "model.safetensors").read_text() == "mine"
