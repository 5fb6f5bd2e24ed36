"""Compare every family of checkpoints with its own library, stage by stage in float32.

The models have the true width of their family, random weights and one to three blocks.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import DEIT, SMALL, SQUASH, google_npz, needs_timm, write_by_transformers
from conftest import DINOV2_PREPROCESSOR, draw_photo, randomize
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from minivit import load_pretrained, save_pretrained
from minivit.errors import UserError

# transformers and timm have deprecation warnings of their own.
pytestmark = pytest.mark.filterwarnings("default")
BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 3,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
HUGE = {
    "hidden_size": 1280,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
    "intermediate_size": 5120,
}
DINOV2 = {"image_size": 518, "patch_size": 14, "mlp_ratio": 4}
# id: class, its sizes, preprocessing
CHECKPOINTS = {
    "google/vit-base-patch32-384": (
        "ViTForImageClassification",
        BASE | {"patch_size": 32, "image_size": 384},
        SQUASH | {"size": 384},
    ),
    "google/vit-large-patch16-224": (
        "ViTForImageClassification",
        LARGE | {"patch_size": 16},
        SQUASH,
    ),
    "google/vit-huge-patch14-224-in21k": ("ViTModel", HUGE | {"patch_size": 14}, SQUASH),
    "facebook/deit-small-patch16-224": (
        "ViTForImageClassification",
        SMALL | {"patch_size": 16},
        DEIT,
    ),
    "facebook/dino-vits8": ("ViTModel", SMALL | {"patch_size": 8}, SQUASH),
    "facebook/dinov2-base": ("Dinov2Model", BASE | DINOV2, DINOV2_PREPROCESSOR),
    "facebook/dinov2-large": ("Dinov2ForImageClassification", LARGE | DINOV2, DINOV2_PREPROCESSOR),
    "facebook/dinov2-with-registers-small": (
        "Dinov2WithRegistersModel",
        SMALL | DINOV2,
        DINOV2_PREPROCESSOR,
    ),
    "a dinov2-with-registers that was fine-tuned": (
        "Dinov2WithRegistersForImageClassification",
        SMALL | DINOV2,
        DINOV2_PREPROCESSOR,
    ),
}


def agree(ours, images, hidden_states, attentions, logits=None):
    """Compare every stage with a reference: logits to 1e-4, attention to 1e-5."""
    assert len(attentions) == ours.config.depth
    with torch.no_grad():
        for stop, expected in enumerate(hidden_states):
            # Fused and eager attention round differently, in proportion to the size of the values.
            found = ours.tokens(images, stop=stop)
            size = max(1, expected.abs().max().item())
            assert_close(
                found,
                expected,
                rtol=0,
                atol=1e-5 * size,
                msg=lambda m, s=stop: f"hidden state {s}: {m}",
            )
        _, attn = ours.forward_with_attention(images, range(ours.config.depth))
        for block, expected in enumerate(attentions):
            assert_close(
                attn[block], expected, rtol=0, atol=1e-5, msg=lambda m, b=block: f"block {b}: {m}"
            )
        if logits is not None:
            assert_close(ours(images), logits, rtol=0, atol=1e-4)


def photo_batch(model) -> torch.Tensor:
    return torch.stack([model.preprocess(draw_photo(300, 260, seed)) for seed in range(1)])


def round_trip(model, folder: Path):
    """Write a model, read it again, and check that nothing changed."""
    folder.mkdir()
    save_pretrained(model, folder)
    again = load_pretrained(folder)
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(after[name], before[name]), name
    assert (again.labels, again.preprocess) == (
        model.labels,
        replace(model.preprocess, round_margins=False),
    )
    return again


@pytest.mark.parametrize("kind, sizes, preprocessor", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_transformers_families_agree_and_round_trips_are_lossless(
    kind, sizes, preprocessor, tmp_path
):
    theirs = write_by_transformers(tmp_path, kind, sizes, preprocessor)
    ours = load_pretrained(tmp_path)
    assert len(ours.labels) == (1000 if "Classification" in kind else 0)
    images = photo_batch(ours)
    with torch.no_grad():
        reference = theirs(images, output_hidden_states=True, output_attentions=True)
    agree(
        ours,
        images,
        reference.hidden_states,
        reference.attentions,
        getattr(reference, "logits", None),
    )
    round_trip(ours, tmp_path / "again")
    before = load_file(tmp_path / "model.safetensors")
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "kind", ["ViTForImageClassification", "ViTModel", "Dinov2Model", "Dinov2WithRegistersModel"]
)
def test_the_names_that_transformers_5_has_in_memory_are_read_too(kind, tmp_path):
    sizes = SMALL | {"patch_size": 14, "image_size": 28, "num_hidden_layers": 2}
    theirs = write_by_transformers(tmp_path, kind, sizes, SQUASH | {"size": 28})
    expected = load_pretrained(tmp_path).state_dict()
    in_memory = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    assert in_memory.keys() != load_file(tmp_path / "model.safetensors").keys()
    save_file(in_memory, tmp_path / "model.safetensors", {"format": "pt"})
    found = load_pretrained(tmp_path).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def shard(folder: Path, theirs) -> list[Path]:
    (folder / "model.safetensors").unlink()
    theirs.save_pretrained(folder, max_shard_size="4MB")
    return sorted(folder.glob("model-*.safetensors"))


def test_sharded_safetensors_are_read_by_their_index(tmp_path):
    sizes = SMALL | {"patch_size": 16, "image_size": 32, "num_hidden_layers": 2}
    theirs = write_by_transformers(
        tmp_path, "ViTForImageClassification", sizes, SQUASH | {"size": 32}
    )
    expected = load_pretrained(tmp_path).state_dict()
    shards = shard(tmp_path, theirs)
    assert len(shards) > 2
    found = load_pretrained(tmp_path).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    first = load_file(shards[0])
    save_file(
        first | {name: load_file(shards[1])[name] for name in list(load_file(shards[1]))[:1]},
        shards[0],
    )
    with pytest.raises(UserError, match="repeats tensors of another shard"):
        load_pretrained(tmp_path)
    shards[0].unlink()
    with pytest.raises(UserError, match=f"no {shards[0].name} in this folder"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a.bin"])
def test_an_index_points_to_safetensors_beside_it_only(name, tiny_folder):
    (tiny_folder / "model.safetensors").rename(tiny_folder.parent / "model.safetensors")
    (tiny_folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"classifier.bias": name}})
    )
    with pytest.raises(UserError, match="expected a weight_map to safetensors files beside it"):
        load_pretrained(tiny_folder)


def test_a_pickled_state_dict_of_the_hub_is_read(tiny, tiny_folder):
    torch.save(load_file(tiny_folder / "model.safetensors"), tiny_folder / "pytorch_model.bin")
    (tiny_folder / "model.safetensors").unlink()
    found = load_pretrained(tiny_folder).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in tiny.state_dict().items())


class Exploit:
    def __reduce__(self):
        return (Path.touch, (Path("exploited"),))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "vit_b_16.pth", "old.pth", "ViT-B_16.npz"])
def test_what_would_execute_code_is_refused_with_a_reason(name, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tiny_folder / "model.safetensors").unlink()
    path = tiny_folder / name
    if name.endswith("npz"):
        np.savez(path, cls=np.array([Exploit()], dtype=object))
    else:
        torch.save(
            {"class_token": Exploit()}, path, _use_new_zipfile_serialization=name != "old.pth"
        )
    with pytest.raises(
        UserError, match="allow_pickle" if name.endswith("npz") else "could execute code"
    ):
        load_pretrained(path)
    assert not Path("exploited").exists()


def hooked(modules, run):
    """Return what each module put out, or what the first one took in, while `run` ran."""
    seen: list = []
    hooks = [modules[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))]
    hooks += [
        module.register_forward_hook(lambda _, __, out: seen.append(out)) for module in modules
    ]
    with torch.no_grad():
        out = run()
    for hook in hooks:
        hook.remove()
    return out, seen


@pytest.fixture(scope="module")
def torchvision_vit():
    from torchvision.models import VisionTransformer

    return randomize(VisionTransformer(224, 16, 3, 12, 768, 3072))


def test_torchvisions_vit_b_16_agrees_stage_by_stage(torchvision_vit, tmp_path, capsys):
    path = tmp_path / "vit_b_16-c867db91.pth"
    torch.save(torchvision_vit.state_dict(), path)
    ours = load_pretrained(path)
    warnings = capsys.readouterr().err
    assert "assuming that of torchvision's IMAGENET1K_V1, 224 pixels" in warnings
    assert "1000 classes without names; assuming ImageNet's" in warnings
    assert ours.labels[281:283] == ("tabby", "tiger cat")
    images = photo_batch(ours)
    layers = list(torchvision_vit.encoder.layers)
    logits, hidden = hooked(layers, lambda: torchvision_vit(images))
    with torch.no_grad():
        attentions = [
            layer.self_attention(
                *[layer.ln_1(x)] * 3, need_weights=True, average_attn_weights=False
            )[1]
            for layer, x in zip(layers, hidden)
        ]
    agree(ours, images, hidden, attentions, logits)
    round_trip(ours, tmp_path / "again")


REFUSED = {
    "another network": (
        {"conv1.weight": (8, 3, 3, 3), "layer1.0.bn1.weight": (8,)},
        "nearest is .*: .* missing",
    ),
    "no class token": (
        {"class_token": None},
        r"not a ViT that minivit reads; nearest is torchvision's vit: 1 missing \(class_token",
    ),
    "timm's names": (
        "timm",
        "have the names of timm's vit, which minivit reads from a folder .*timm.models.save_for_hf",
    ),
}


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED)
def test_a_file_of_no_family_is_refused_with_the_nearest_family(change, message, tiny, tmp_path):
    from torchvision.models import VisionTransformer

    tensors = VisionTransformer(32, 16, 2, 3, 24, 48, num_classes=5).state_dict()
    if change == "timm":
        tensors = tiny.state_dict()
    elif "class_token" in change:
        del tensors["class_token"]
    else:
        tensors = {name: torch.zeros(shape) for name, shape in change.items()}
    torch.save(tensors, tmp_path / "model.pth")
    with pytest.raises(UserError, match=message):
        load_pretrained(tmp_path / "model.pth")


def test_what_timms_trainer_saves_is_refused_with_what_to_do(tiny, tmp_path):
    saved = {
        "state_dict": tiny.state_dict(),
        "args": argparse.Namespace(model="vit_tiny_patch16_224"),
    }
    torch.save(saved, tmp_path / "model_best.pth.tar")
    with pytest.raises(
        UserError, match="holds more than tensors, .*; save only the weights, as safetensors"
    ):
        load_pretrained(tmp_path / "model_best.pth.tar")


def test_torchvisions_own_preprocessing_is_ours(photos, torchvision_vit, tmp_path):
    from torchvision.models import ViT_B_16_Weights

    from minivit import open_photo

    torch.save(torchvision_vit.state_dict(), tmp_path / "vit_b_16.pth")
    preprocess = load_pretrained(tmp_path / "vit_b_16.pth").preprocess
    theirs = ViT_B_16_Weights.IMAGENET1K_V1.transforms()
    odd = draw_photo(503, 375)  # a margin of 59.5 pixels, which torchvision rounds up
    for photo in [odd, *map(open_photo, photos)]:
        assert_close(preprocess(photo), theirs(photo), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def vit_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit-base")
    write_by_transformers(folder, "ViTForImageClassification", BASE, SQUASH)
    return folder


def test_googles_npz_agrees_with_the_same_weights_in_transformers(vit_base, tmp_path, capsys):
    arrays = google_npz(load_file(vit_base / "model.safetensors"), num_heads=12)
    np.savez(tmp_path / "ViT-B_16.npz", **arrays)
    ours, expected = load_pretrained(tmp_path / "ViT-B_16.npz"), load_pretrained(vit_base)
    assert "assuming Google's, 224 pixels" in capsys.readouterr().err
    assert all(
        torch.equal(tensor, expected.state_dict()[name])
        for name, tensor in ours.state_dict().items()
    )
    assert ours.preprocess == expected.preprocess
    assert ours.config.eps == 1e-6  # Flax's default, where transformers has 1e-12
    round_trip(ours, tmp_path / "again")

    arrays |= {
        "pre_logits/kernel": np.zeros((768, 768), np.float32),
        "pre_logits/bias": np.zeros(768, np.float32),
    }
    np.savez(tmp_path / "in21k.npz", **arrays)
    assert load_pretrained(tmp_path / "in21k.npz").config.num_classes == 0
    assert "its head reads a layer that minivit's ViT does not have" in capsys.readouterr().err


TIMM_CONFIG = {
    "architecture": "vit_base_patch16_224",
    "num_classes": 1000,
    "num_features": 768,
    "global_pool": "token",
    "pretrained_cfg": {
        "tag": "augreg2_in21k_ft_in1k",
        "custom_load": False,
        "input_size": [3, 224, 224],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "center",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "num_classes": 1000,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
    },
}


def write_timm(folder: Path, state: dict, **config):
    folder.mkdir(exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps(TIMM_CONFIG | config))


def test_timms_layout_agrees_with_the_same_weights_in_transformers(vit_base, tmp_path):
    expected = load_pretrained(vit_base)
    labels = [f"n{i}" for i in range(1000)]
    write_timm(
        tmp_path / "timm", expected.state_dict(), label_names=labels, model_args={"depth": 3}
    )  # our names are timm's
    ours = load_pretrained(tmp_path / "timm")
    assert ours.config.eps == 1e-6
    assert ours.labels[7] == "n7"
    assert (ours.preprocess.resize, ours.preprocess.crop, ours.preprocess.resample) == (
        248,
        (224, 224),
        3,
    )
    images = photo_batch(ours)
    with torch.no_grad():
        assert_close(
            ours(images), expected(images), rtol=0, atol=1e-3
        )  # they differ by the norms' eps
    round_trip(ours, tmp_path / "again")


TIMM_MODELS = {
    "vit_base_patch16_224": {"depth": 3},
    "vit_small_patch32_384": {"depth": 3},
    "deit_tiny_patch16_224": {},
    "vit_small_patch14_dinov2": {"depth": 2, "img_size": 224},
    "vit_small_patch14_reg4_dinov2": {"depth": 2, "img_size": 224},
}


@needs_timm
@pytest.mark.parametrize("name, args", TIMM_MODELS.items(), ids=TIMM_MODELS)
def test_timms_own_models_agree_stage_by_stage(name, args, tmp_path):
    import timm

    theirs = randomize(timm.create_model(name, **args))
    folder = tmp_path / "timm"
    folder.mkdir()
    timm.models.save_for_hf(theirs, folder, model_args=args, safe_serialization=True)
    ours = load_pretrained(folder)
    images = photo_batch(ours)
    attentions = []
    for block in theirs.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_pre_hook(
            lambda _, inputs: attentions.append(inputs[0])
        )
    out, hidden = hooked(list(theirs.blocks), lambda: theirs(images))
    agree(ours, images, hidden, attentions, out if ours.labels else None)
    round_trip(ours, tmp_path / "again")


@needs_timm
def test_timms_own_preprocessing_is_ours(photos, tmp_path):
    import timm

    from minivit import open_photo
    from minivit.checkpoints.timm_configs import spec_from_timm

    for name in (
        "vit_base_patch16_224.augreg2_in21k_ft_in1k",
        "vit_base_patch14_dinov2.lvd142m",
        "deit_small_patch16_224",
    ):
        data = timm.get_pretrained_cfg(name).to_dict()
        config = {
            "architecture": data["architecture"],
            "num_classes": data["num_classes"],
            "pretrained_cfg": data,
        }
        theirs = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=data))
        for path in photos:
            photo = open_photo(path)
            assert_close(spec_from_timm(config).preprocess(photo), theirs(photo), rtol=0, atol=1e-5)


@pytest.mark.parametrize("img_size", [(384, 384), (192, 320)], ids=["384", "192x320"])
@pytest.mark.parametrize(
    "kind",
    [
        "ViTForImageClassification",
        "Dinov2ForImageClassification",
        "Dinov2WithRegistersForImageClassification",
    ],
)
def test_another_image_size_resamples_positions_as_transformers_does(kind, img_size, tmp_path):
    patch = 16 if kind.startswith("ViT") else 14
    img_size = tuple(side // 16 * patch for side in img_size)
    sizes = SMALL | {"patch_size": patch, "image_size": 14 * patch, "num_hidden_layers": 1}
    theirs = write_by_transformers(tmp_path, kind, sizes, SQUASH | {"size": 14 * patch})
    ours = load_pretrained(tmp_path, img_size=img_size)
    images = torch.randn(1, 3, *img_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        more = {"interpolate_pos_encoding": True} if kind.startswith("ViT") else {}
        reference = theirs(images, output_hidden_states=True, output_attentions=True, **more)
    agree(ours, images, reference.hidden_states, reference.attentions, reference.logits)
    # What is written must be read by transformers as it is, without a word about interpolation.
    (tmp_path / "again").mkdir()
    save_pretrained(ours, tmp_path / "again")
    again = type(theirs).from_pretrained(tmp_path / "again")
    reread = load_pretrained(tmp_path / "again")
    assert reread.preprocess.size == img_size
    with torch.no_grad():
        assert torch.equal(reread(images), ours(images))
        assert_close(again(images).logits, ours(images), rtol=0, atol=1e-4)


def test_an_image_size_that_is_no_whole_number_of_patches_is_refused(tiny_folder):
    with pytest.raises(UserError, match="whole number of patches of 8"):
        load_pretrained(tiny_folder, img_size=(36, 36))


def test_maps_leave_registers_out_and_name_them_if_they_do_not_fit():
    from minivit import ViT, ViTConfig, query_maps
    from minivit.attention import class_relevance, class_token_and_top_patch_shares

    config = ViTConfig((16, 24), 8, 24, 2, 3, 48, 5, num_registers=4)
    model, images = randomize(ViT(config)), torch.randn(2, 3, 16, 24)
    _, attn = model.forward_with_attention(images, [1])
    assert attn[1].shape == (2, 3, config.num_tokens, config.num_tokens) == (2, 3, 11, 11)
    maps = query_maps(attn[1], config.grid, num_registers=4)
    assert torch.equal(maps, attn[1][:, :, 0, 5:].reshape(2, 3, 2, 3))
    _, top_patch = class_token_and_top_patch_shares(attn[1], num_registers=4)
    assert torch.equal(top_patch, (maps / maps.sum((2, 3), keepdim=True)).amax((2, 3)))
    assert class_relevance(model, images, torch.tensor([0, 1]), [1])[1].shape == (2, 1, 11)
    with pytest.raises(
        UserError, match="11 tokens do not fill a grid of 2 x 3 patches and one class token"
    ):
        query_maps(attn[1], config.grid)
