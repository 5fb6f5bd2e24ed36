"""Which files a source names, and what is said about those that are something else."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_photo, randomize
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import infer
from minivit import load_pretrained, open_photo
from minivit.checkpoints.weights import differences
from minivit.errors import UserError
from minivit.system.stand_ins import stand_in


@pytest.fixture
def tensors(tiny_folder) -> dict[str, torch.Tensor]:
    """The tensors of the tiny checkpoint by transformers' names."""
    return load_file(tiny_folder / "model.safetensors")


def add_one(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return other weights, to tell one file from another."""
    return {name: tensor + 1 for name, tensor in tensors.items()}


def test_a_named_file_is_that_file(tiny, tensors, tiny_folder):
    torch.save(add_one(tensors), tiny_folder / "pytorch_model.bin")
    assert differences(load_pretrained(tiny_folder), tiny) == []
    assert differences(load_pretrained(tiny_folder / "model.safetensors"), tiny) == []
    named = load_pretrained(tiny_folder / "pytorch_model.bin")
    assert torch.equal(named.head.bias, tiny.head.bias + 1)
    assert (named.labels, named.preprocess) == (tiny.labels, tiny.preprocess)


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "best.pth", "last.ckpt", "ema.pt"])
def test_a_file_of_any_name_is_read_with_the_config_beside_it(name, tiny, tensors, tiny_folder):
    if name.endswith("safetensors"):
        save_file(add_one(tensors), tiny_folder / name, {"format": "pt"})
    else:
        torch.save(add_one(tensors), tiny_folder / name)
    assert torch.equal(load_pretrained(tiny_folder / name).head.bias, tiny.head.bias + 1)


def test_an_index_that_is_named_is_read_with_its_shards(tiny, tensors, tiny_folder):
    index = tiny_folder / "model.safetensors.index.json"
    names = sorted(tensors)
    save_file({n: tensors[n] + 1 for n in names[:50]}, tiny_folder / "a.safetensors")
    save_file({n: tensors[n] + 1 for n in names[50:]}, tiny_folder / "b.safetensors")
    weight_map = dict.fromkeys(names[:50], "a.safetensors")
    weight_map |= dict.fromkeys(names[50:], "b.safetensors")
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(load_pretrained(index).head.bias, tiny.head.bias + 1)
    (tiny_folder / "b.safetensors").unlink()
    with pytest.raises(UserError, match=f"no b.safetensors in this folder; {index.name} lists it"):
        load_pretrained(index)


def test_torchvisions_file_does_not_need_the_config_beside_it(tiny_folder, capsys):
    from torchvision.models import VisionTransformer

    theirs = randomize(VisionTransformer(32, 8, 2, 3, 192, 768, num_classes=4))
    torch.save(theirs.state_dict(), tiny_folder / "vit.pth")
    model = load_pretrained(tiny_folder / "vit.pth")
    assert len(model.labels) == 4
    assert "the file does not state its preprocessing" in capsys.readouterr().err
    (tiny_folder / "preprocessor_config.json").unlink()
    assert len(load_pretrained(tiny_folder / "vit.pth").labels) == 4


def test_transformers_weights_without_their_configs_say_what_is_missing(tiny_folder, tmp_path):
    message = "names of transformers' vit, whose sizes and preprocessing stand in config.json and"
    for name in ("mine.safetensors", "model.safetensors"):
        alone = tmp_path / "alone" / name
        alone.parent.mkdir(exist_ok=True)
        shutil.copy(tiny_folder / "model.safetensors", alone)
        with pytest.raises(UserError, match=message):
            load_pretrained(alone)
    shutil.copy(tiny_folder / "config.json", alone.parent)
    with pytest.raises(UserError, match=message):
        load_pretrained(alone.with_name("mine.safetensors"))


@pytest.mark.parametrize(
    "wrapper",
    ["module.", "_orig_mod.", "model.", "net.", "ema_model.", "module._orig_mod.", "model.module."],
)
def test_a_wrapper_is_taken_off_all_names_with_a_word(wrapper, tiny, tensors, tiny_folder, capsys):
    wrapped = {wrapper + name: tensor for name, tensor in tensors.items()}
    save_file(wrapped, tiny_folder / "model.safetensors")
    assert differences(load_pretrained(tiny_folder), tiny) == []
    err = capsys.readouterr().err
    assert err.startswith(f"{tiny_folder}: reading the tensors' names without '")
    assert len(err.splitlines()) == 1
    for part in wrapper.split(".")[:-1]:
        assert f"{part}." in err


def test_a_compiled_part_of_a_model_is_read_too(tiny, tensors, tiny_folder, capsys):
    wrapped = {}
    for name, tensor in tensors.items():
        wrapped[name.replace("vit.", "vit._orig_mod.").replace("layer.", "layer.")] = tensor
    save_file(wrapped, tiny_folder / "model.safetensors")
    assert differences(load_pretrained(tiny_folder), tiny) == []
    assert "without '_orig_mod.'" in capsys.readouterr().err


def test_timms_names_and_torchvisions_may_be_wrapped_too(tiny, tmp_path, capsys):
    from torchvision.models import VisionTransformer

    theirs = randomize(VisionTransformer(32, 8, 2, 3, 192, 768, num_classes=4))
    wrapped = {f"module.{name}": tensor for name, tensor in theirs.state_dict().items()}
    torch.save(wrapped, tmp_path / "vit.pth")
    assert len(load_pretrained(tmp_path / "vit.pth").labels) == 4
    assert "reading the tensors' names without 'module.'" in capsys.readouterr().err


def test_a_wrapper_on_some_names_only_is_not_taken_off(tensors, tiny_folder):
    wrapped = {f"model.{name}": tensor for name, tensor in tensors.items()}
    wrapped["criterion.weight"] = torch.ones(5)
    save_file(wrapped, tiny_folder / "model.safetensors")
    with pytest.raises(
        UserError, match=r"most names begin with 'model\.', but not criterion\.weight"
    ) as raised:
        load_pretrained(tiny_folder)
    assert "by the tensors' names, nearest is" in str(raised.value)


def test_names_that_become_equal_are_refused(tensors, tiny_folder):
    name = "vit.embeddings.cls_token"
    both = tensors | {f"vit._orig_mod.{name[4:]}": tensors[name].clone()}
    save_file(both, tiny_folder / "model.safetensors")
    with pytest.raises(UserError, match="without '_orig_mod.', some names of tensors are equal"):
        load_pretrained(tiny_folder)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state", "teacher", "ema"])
def test_a_state_dict_in_a_trainers_file_is_read_with_a_word(
    key, tiny, tensors, tiny_folder, capsys
):
    saved = {
        "epoch": 3,
        "global_step": 10,
        "loss": torch.tensor(0.5),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]},
        key: {f"model.{name}": tensor for name, tensor in tensors.items()},
    }
    (tiny_folder / "model.safetensors").unlink()
    torch.save(saved, tiny_folder / "pytorch_model.bin")
    assert differences(load_pretrained(tiny_folder), tiny) == []
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"{tiny_folder / 'pytorch_model.bin'}: reading the state dict {key!r} in it",
        f"{tiny_folder}: reading the tensors' names without 'model.'",
    ]


def test_of_several_state_dicts_none_is_chosen(tensors, tiny_folder):
    torch.save({"model": tensors, "model_ema": tensors}, tiny_folder / "last.pth")
    with pytest.raises(UserError, match=r"several state dicts, model, model_ema; save the one"):
        load_pretrained(tiny_folder / "last.pth")
    for content in ({"epoch": 3, "model": {}}, {0: torch.zeros(2)}, [torch.zeros(2)]):
        torch.save(content, tiny_folder / "last.pth")
        with pytest.raises(UserError, match="expected a state dict of names and tensors"):
            load_pretrained(tiny_folder / "last.pth")


POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    "size 343219272\n"
)
STAND_INS = {
    "pointer": (POINTER, "a Git LFS pointer in place of the file; run `git lfs pull`"),
    "page": ("<!DOCTYPE html>\n<html>", "a web page in place of the file; download it again"),
    "page in capitals": ("\n<HTML><head>", "a web page"),
    "not found": ("Entry not found", "the Hub's answer that there is no such file"),
    "no login": ("Invalid username or password.", "the Hub's refusal .*hf auth login"),
}


@pytest.mark.parametrize("content, message", STAND_INS.values(), ids=STAND_INS)
@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "pytorch_model.bin",
        "config.json",
        "preprocessor_config.json",
        "ViT.npz",
        "tail.safetensors",
    ],
)
def test_what_stands_in_for_a_file_is_named(content, message, name, tiny_folder):
    path = tiny_folder / name
    if name == "pytorch_model.bin":
        (tiny_folder / "model.safetensors").unlink()
    path.write_text(content)
    source = path if name in ("ViT.npz", "tail.safetensors") else tiny_folder
    with pytest.raises(UserError, match=f"{name}: {message}"):
        load_pretrained(source)


def test_what_stands_in_for_a_photo_is_named(tmp_path):
    path = tmp_path / "cat.jpg"
    path.write_text(POINTER)
    with pytest.raises(UserError, match=r"cat\.jpg: a Git LFS pointer in place of the file"):
        open_photo(path)


def test_what_cannot_be_opened_is_no_stand_in_and_nothing_waits(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "nothing"):
        assert stand_in(path) == ""


def test_a_folder_of_trainers_checkpoints_names_the_latest(tiny_folder, tmp_path):
    run = tmp_path / "trainer"
    for step in (500, 1000, 90):
        shutil.copytree(tiny_folder, run / f"checkpoint-{step}")
    latest = run / "checkpoint-1000"
    os.utime(run / "checkpoint-90" / "config.json")  # copied later, but not trained for longer
    with pytest.raises(
        UserError, match=f"no config.json in this folder; 3 folders below .* latest, {latest}, or"
    ):
        load_pretrained(run)
    shutil.copytree(tiny_folder, tmp_path / "one" / "run")
    with pytest.raises(UserError, match=f"the folder {tmp_path / 'one' / 'run'} below it has one"):
        load_pretrained(tmp_path / "one")


@pytest.mark.parametrize("level", ["", "..", "../.."], ids=["model", "hub", "home"])
def test_the_hubs_cache_names_the_snapshot(level, tiny_folder, tmp_path):
    model = tmp_path / "home" / "hub" / "models--google--vit"
    commits = ("a" * 40, "b" * 40)
    for commit in commits:
        shutil.copytree(tiny_folder, model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commits[0])
    os.utime(model / "snapshots" / commits[1] / "config.json")  # later, but not main
    folder = (model / level).resolve()
    with pytest.raises(UserError, match=f"2 folders below it hold one; .*snapshots/{commits[0]}"):
        load_pretrained(folder)


def test_a_folder_without_a_config_names_its_files_of_weights(tiny_folder):
    (tiny_folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"give a file of weights itself: .*model\.safetensors"):
        load_pretrained(tiny_folder)
    (tiny_folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="expected a ViT in the layout of transformers or timm"):
        load_pretrained(tiny_folder)


def test_a_folder_without_weights_names_those_of_another_name(tiny_folder):
    (tiny_folder / "model.safetensors").rename(tiny_folder / "weights.safetensors")
    with pytest.raises(
        UserError, match=r"no model.safetensors or .* give the file itself: .*weights\.safetensors"
    ):
        load_pretrained(tiny_folder)


@pytest.mark.filterwarnings("default")  # transformers has deprecation warnings of its own
def test_a_processor_config_with_an_image_processor_comes_first(tiny_folder):
    from transformers import AutoImageProcessor

    nested = {"image_processor_type": "ViTImageProcessor", "size": 48}
    (tiny_folder / "processor_config.json").write_text(json.dumps({"image_processor": nested}))
    photo = draw_photo(50, 40)
    model = load_pretrained(tiny_folder)
    theirs = AutoImageProcessor.from_pretrained(tiny_folder, backend="pil")
    expected = torch.as_tensor(np.array(theirs(photo)["pixel_values"][0]))
    assert_close(model.preprocess(photo), expected, rtol=0, atol=1e-5)
    (tiny_folder / "preprocessor_config.json").unlink()
    assert load_pretrained(tiny_folder).preprocess == model.preprocess
    # One without an image processor belongs to a tokenizer, say.
    (tiny_folder / "processor_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no preprocessor_config\.json in this folder"):
        load_pretrained(tiny_folder)


def test_a_refusal_names_the_model_and_the_file(tiny_folder):
    (tiny_folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "SwinImageProcessor"})
    )
    name = r"tiny: preprocessor_config\.json: image_processor_type is 'SwinImageProcessor'"
    with pytest.raises(UserError, match=name):
        load_pretrained(tiny_folder)


INSTEAD = {
    "an unfinished run": ("config.json", "state.safetensors", "is not finished; go on with --res"),
    "an adapter": ("config.json", "adapter_config.json", "an adapter; merge it into its base"),
    "pickles in parts": (
        "model.safetensors",
        "pytorch_model.bin.index.json",
        "pickles in parts are not read; load and save it with transformers 5",
    ),
    "TensorFlow": ("model.safetensors", "tf_model.h5", "weights for TensorFlow are not read"),
    "Flax": ("model.safetensors", "flax_model.msgpack", "weights for Flax are not read"),
    "Trainer's state": ("model.safetensors", "optimizer.pt", "expected a ViT in the layout"),
}


@pytest.mark.parametrize("missing, there, message", INSTEAD.values(), ids=INSTEAD)
def test_what_a_folder_holds_instead_is_said(missing, there, message, tiny_folder):
    (tiny_folder / missing).unlink()
    (tiny_folder / there).touch()
    with pytest.raises(UserError, match=f"no {missing} .*{message}"):
        load_pretrained(tiny_folder)


def test_a_link_that_leads_nowhere_is_named(tiny_folder):
    (tiny_folder / "model.safetensors").unlink()
    (tiny_folder / "model.safetensors").symlink_to("../blobs/abc")
    with pytest.raises(UserError, match=r"safetensors: a link to \.\./blobs/abc, which is not"):
        load_pretrained(tiny_folder)


BASES = {
    "an id": ({"_name_or_path": "google/vit-base-patch16-224"}, "copy it from google/vit-base-pat"),
    "a path": ({"_name_or_path": "/home/x/y"}, "copy it from the checkpoint that this one was"),
    "nothing": ({}, "says how photos become pixels; copy it from the checkpoint that this one"),
}


@pytest.mark.parametrize("change, message", BASES.values(), ids=BASES)
def test_without_its_preprocessing_a_checkpoint_names_its_base(change, message, tiny_folder):
    path = tiny_folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (tiny_folder / "preprocessor_config.json").unlink()
    for source in (tiny_folder, tiny_folder / "model.safetensors"):
        with pytest.raises(UserError, match=f"no preprocessor_config.json .*{message}"):
            load_pretrained(source)
    (tiny_folder.parent / "preprocessor_config.json").touch()
    with pytest.raises(UserError, match="copy it from the folder above, which has one"):
        load_pretrained(tiny_folder)


def test_a_pipe_is_no_checkpoint(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="expected a Hub id, a folder, or a file ending in"):
        load_pretrained(tmp_path / "model.safetensors")


def test_a_file_that_holds_no_weights_is_refused_by_its_ending(tiny_folder):
    with pytest.raises(UserError, match=r"config.json: expected a Hub id, a folder, or a file end"):
        load_pretrained(tiny_folder / "config.json")


def compress(path: Path) -> None:
    """Write a zip archive anew, compressed."""
    with zipfile.ZipFile(path) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)


@pytest.mark.parametrize("name", ["bomb.pth", "bomb.bin", "bomb.tar", "bomb.ckpt", "bomb.npz"])
def test_an_archive_that_unpacks_to_far_more_is_not_unpacked(name, tmp_path):
    path = tmp_path / name
    if name.endswith("npz"):
        np.savez(path, cls=np.zeros((1000, 1000), np.float32))
    else:
        torch.save({"cls_token": torch.zeros(1000, 1000)}, path)
    compress(path)
    assert path.stat().st_size < 20_000
    with pytest.raises(UserError, match=r"bytes would unpack to 4,0\d\d,\d\d\d; save the weights"):
        load_pretrained(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_one_number_that_stands_for_a_large_tensor_is_refused(zipped, tmp_path):
    path = tmp_path / "views.pth"
    tensors = {"cls_token": torch.zeros(1).expand(60_000, 60_000)}
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    assert path.stat().st_size < 20_000
    with pytest.raises(UserError, match=r"would unpack to 14,400,000,000"):
        load_pretrained(path)


def test_the_command_says_it_in_one_line(tiny_folder, photos, tmp_path, capsys):
    (tiny_folder / "model.safetensors").write_text(POINTER)
    flags = ["--model", str(tiny_folder), "--out", str(tmp_path / "out")]
    assert infer.main([str(photos[0]), *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "run `git lfs pull`" in err.splitlines()[-1]
    assert "Traceback" not in err
