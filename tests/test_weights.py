"""Checkpoints are written and read without loss, and a new head replaces one that differs."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from minivit import ViT, ViTConfig, load_pretrained, open_photo, save_pretrained
from minivit.errors import UserError


def test_a_round_trip_is_lossless(tiny, tiny_folder, tmp_path):
    again = load_pretrained(tiny_folder)
    assert again.config == tiny.config.__class__(**{**vars(tiny.config), "pos_grid": (4, 4)})
    assert again.labels == tiny.labels
    assert again.preprocess == tiny.preprocess
    for name, tensor in tiny.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_model_is_saved_into_a_folder_that_is_made_for_it(tiny, tmp_path):
    save_pretrained(tiny, tmp_path / "new" / "folder")
    assert load_pretrained(tmp_path / "new" / "folder").labels == tiny.labels


def test_a_model_without_preprocessing_is_not_saved_and_says_why(tmp_path):
    model = ViT(ViTConfig(img_size=(32, 32), depth=1, embed_dim=24, num_heads=2))
    with pytest.raises(UserError, match="set model.preprocess to a minivit.Preprocess"):
        save_pretrained(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("family", ["vit_b16", "dinov2_s14"])
def test_what_was_frozen_is_written_back_byte_for_byte(family, request, tmp_path):
    source = request.getfixturevalue(family)
    model = load_pretrained(source, num_classes=3)
    torch.nn.init.ones_(model.blocks[11].mlp.fc2.bias)
    save_pretrained(model, tmp_path)
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    prefix = "" if family == "vit_b16" else "dinov2."
    changed = [
        name
        for name, tensor in before.items()
        if prefix + name not in after or not torch.equal(after[prefix + name], tensor)
    ]
    if family == "vit_b16":
        assert changed == [
            "classifier.bias",
            "classifier.weight",
            "vit.encoder.layer.11.output.dense.bias",
        ]
    else:
        assert changed == ["encoder.layer.11.mlp.fc2.bias"]


def test_another_number_of_classes_gets_a_fresh_head_and_says_so(tiny_folder, capsys):
    assert load_pretrained(tiny_folder, num_classes=5).labels == tuple(
        f"thing {i}" for i in range(5)
    )
    assert capsys.readouterr().err == ""
    model = load_pretrained(tiny_folder, labels=("cat", "dog"))
    assert model(torch.randn(1, 3, 32, 32)).tolist() == [[0, 0]]
    assert model.labels == ("cat", "dog")
    assert capsys.readouterr().err == "new head for 2 classes, in place of the checkpoint's 5\n"


def test_as_many_classes_of_other_names_get_a_fresh_head_too(tiny_folder, capsys):
    assert not load_pretrained(tiny_folder, labels=tuple("abcde")).head.weight.any()
    assert "new head for 5 classes" in capsys.readouterr().err


def test_a_checkpoint_without_a_head_is_a_backbone(dinov2_s14):
    model = load_pretrained(dinov2_s14)
    assert model.labels == ()
    assert model.config.num_classes == 0
    assert model.pos_embed.shape == (1, 1 + 37 * 37, 384)


@pytest.mark.filterwarnings("default")
def test_transformers_pipeline_gives_our_top_5(tiny_folder, photos, tmp_path):
    from transformers import AutoImageProcessor, pipeline

    model = load_pretrained(tiny_folder, labels=[f"breed {i}" for i in range(37)])
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    save_pretrained(model, tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    classify = pipeline("image-classification", str(tmp_path), image_processor=processor)
    for path in photos[:3]:
        with torch.no_grad():
            ours = model(model.preprocess(open_photo(path))[None])[0].softmax(0).topk(5)
        theirs = classify(str(path), top_k=5)
        assert [row["label"] for row in theirs] == [model.labels[i] for i in ours.indices]
        assert_close(torch.tensor([row["score"] for row in theirs]), ours.values, rtol=0, atol=1e-4)


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def set_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


BIAS = "vit.encoder.layer.3.attention.attention.query.bias"
BAD_FOLDERS = {
    "missing tensor": (lambda f: edit(f, lambda t: t.pop(BIAS)), f"1 missing \\({BIAS}\\)"),
    "unexpected tensor": (
        lambda f: edit(f, lambda t: t.update(extra=torch.zeros(2))),
        "1 unexpected \\(extra\\)",
    ),
    "misshapen tensor": (
        lambda f: edit(f, lambda t: t.update({BIAS: torch.zeros(7)})),
        r"1 misshapen .*expected \(24,\), found \(7,\)",
    ),
    "integer tensor": (
        lambda f: edit(f, lambda t: t.update({BIAS: torch.zeros(24).int()})),
        "int32",
    ),
    "truncated": (truncate, "cannot be read as safetensors"),
    "no safetensors": (
        lambda f: (f / "model.safetensors").unlink(),
        "no model.safetensors or .* in this folder",
    ),
    "not JSON": (lambda f: (f / "config.json").write_text("{"), "expected JSON"),
    "a list": (
        lambda f: (f / "config.json").write_text("[]"),
        "expected a JSON object, found a list",
    ),
    "another family": (
        lambda f: set_config(f, model_type="swin"),
        "model_type 'swin'; expected one of vit, dinov2",
    ),
    "another activation": (lambda f: set_config(f, hidden_act="relu"), "hidden_act is 'relu'"),
    "labels not numbered": (
        lambda f: set_config(f, id2label={str(2 * i): str(i) for i in range(5)}),
        "id2label",
    ),
}


@pytest.mark.parametrize("spoil, message", BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_a_bad_folder_is_refused_by_name(tiny_folder, spoil, message):
    spoil(tiny_folder)
    with pytest.raises(UserError, match=message):
        load_pretrained(tiny_folder)


def test_nothing_is_left_half_written(tiny, tmp_path, monkeypatch):
    save_pretrained(tiny, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(_tensors, path, _metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("minivit.checkpoints.tensors.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_pretrained(tiny, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_a_folder_copied_elsewhere_still_loads(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "elsewhere")
    assert load_pretrained(tmp_path / "elsewhere").labels
