"""What a checkpoint's config asks is done as its library does it, or refused by name."""

from __future__ import annotations

import importlib
import inspect
import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from checkpoints import SQUASH, needs_timm
from conftest import TINY, draw_photo, randomize
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from minivit import Preprocess, ViT, ViTConfig, load_pretrained, save_pretrained
from minivit.checkpoints import configs, timm_configs
from minivit.checkpoints.weights import differences, read_configs
from minivit.errors import UserError

# transformers and timm have deprecation warnings of their own.
pytestmark = pytest.mark.filterwarnings("default")
HUB_KINDS = {
    "vit": "ViT",
    "dinov2": "Dinov2",
    "dinov2_with_registers": "Dinov2WithRegisters",
}


def edit_config(folder: Path, *without: str, **values) -> Path:
    """Change a folder's config.json, and leave some of its keys out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: config[key] for key in config if key not in without}))
    return folder


def edit_tensors(folder: Path, change) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def logits_of_transformers(folder: Path, photo) -> torch.Tensor:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(folder)
    pixels = AutoImageProcessor.from_pretrained(folder, backend="pil")(photo, return_tensors="pt")
    with torch.no_grad():
        return model(**pixels).logits


@pytest.mark.parametrize("kind", configs.HUB_DEFAULTS)
def test_what_a_config_leaves_out_has_the_defaults_of_transformers(kind):
    import transformers

    theirs = getattr(transformers, HUB_KINDS[kind] + "Config")()
    ours = configs.HUB_DEFAULTS[kind]
    assert ours == {key: getattr(theirs, key) for key in ours}
    # All of their sizes are among ours. What is left does not change what a trained model computes.
    irrelevant = {"initializer_range", "encoder_stride", "pooler_output_size", "pooler_act"}
    irrelevant |= {"layerscale_value", "apply_layernorm", "reshape_hidden_states"}
    irrelevant |= {"use_mask_token", "_out_features", "_out_indices"}
    common = {field.name for field in fields(transformers.PreTrainedConfig)}
    assert {field.name for field in fields(theirs)} - common - ours.keys() <= irrelevant


@pytest.mark.parametrize("kind", configs.HUB_DEFAULTS)
def test_a_config_of_its_kind_alone_gives_the_sizes_of_transformers(kind):
    import transformers

    with torch.device("meta"):
        hub_class = getattr(transformers, HUB_KINDS[kind] + "ForImageClassification")
        theirs = hub_class(hub_class.config_class())
        config = {"model_type": kind, "architectures": [hub_class.__name__]}
        spec = configs.spec_from_hub(config, Preprocess(), None)
        ours = ViT(spec.sizes)
    assert spec.labels == ("LABEL_0", "LABEL_1")
    unused = theirs.num_parameters() - sum(p.numel() for p in ours.parameters())
    assert unused == (768 if kind != "vit" else 0)  # the mask token
    assert ours.norm.eps == theirs.config.layer_norm_eps


LEFT_OUT = [("num_attention_heads", "layer_norm_eps", "qkv_bias", "hidden_act"), ()]


@pytest.mark.parametrize("without", LEFT_OUT, ids=["keys left out", "without biases"])
def test_a_config_gives_the_logits_of_transformers(without, tmp_path):
    # 12 heads are the default.
    config = ViTConfig((32, 32), 8, 48, 2, 12, 96, 5, qkv_bias=bool(without))
    model = randomize(ViT(config))
    model.labels, model.preprocess = tuple("abcde"), Preprocess((32, 32))
    save_pretrained(model, tmp_path)
    edit_config(tmp_path, *without)
    photo = draw_photo(50, 40)
    theirs = logits_of_transformers(tmp_path, photo)
    ours = load_pretrained(tmp_path)
    with torch.no_grad():
        assert_close(ours(ours.preprocess(photo)[None]), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architectures", [None, []], ids=str)
def test_without_architectures_the_tensors_tell_whether_there_is_a_head(
    architectures, tiny_folder, capsys
):
    expected = load_pretrained(tiny_folder)
    edit_config(tiny_folder, architectures=architectures)
    capsys.readouterr()
    assert differences(load_pretrained(tiny_folder), expected) == []
    said = "config.json names no architecture; the weights have a classifier"
    assert capsys.readouterr().err == f"{tiny_folder}: {said}\n"

    edit_config(tiny_folder, "architectures")
    edit_tensors(tiny_folder, lambda t: (t.pop("classifier.weight"), t.pop("classifier.bias")))
    backbone = load_pretrained(tiny_folder)
    assert backbone.labels == ()
    assert torch.equal(backbone.norm.weight, expected.norm.weight)
    assert "the weights have no classifier" in capsys.readouterr().err


def test_describe_tells_the_head_from_the_config_alone(tiny_folder):
    edit_config(tiny_folder, "architectures")
    spec, _ = read_configs(str(tiny_folder), None)
    assert len(spec.labels) == 5
    edit_config(tiny_folder, "id2label")
    spec, _ = read_configs(str(tiny_folder), None)
    assert spec.labels == ()


LABELS = {
    "num_labels alone": ({"num_labels": 5}, [f"LABEL_{i}" for i in range(5)]),
    "num_labels beside names": (
        {"num_labels": 5, "id2label": {str(i): f"c{i}" for i in range(5)}},
        [f"c{i}" for i in range(5)],
    ),
    "num_labels beside fewer names": (
        {"num_labels": 5, "id2label": {"0": "cat", "1": "dog"}},
        [f"LABEL_{i}" for i in range(5)],
    ),
    "names that are null": ({"num_labels": 5, "id2label": None}, [f"LABEL_{i}" for i in range(5)]),
}


@pytest.mark.parametrize("change, labels", LABELS.values(), ids=LABELS)
def test_labels_left_to_transformers_are_its_own(change, labels, tiny_folder):
    from transformers import AutoConfig

    edit_config(edit_config(tiny_folder, "id2label", "label2id"), **change)
    assert list(AutoConfig.from_pretrained(tiny_folder).id2label.values()) == labels
    assert list(load_pretrained(tiny_folder).labels) == labels


def test_two_labels_are_the_default(tiny_folder):
    edit_config(tiny_folder, "id2label", "label2id")
    edit_tensors(tiny_folder, lambda t: t.update({n: t[n][:2].clone() for n in HEAD}))
    assert load_pretrained(tiny_folder).labels == ("LABEL_0", "LABEL_1")


HEAD = ("classifier.weight", "classifier.bias")
SIZES_AS_LISTS = {
    "patch_size": {"patch_size": [8, 8]},
    "image_size": {"image_size": [32, 32]},
    "both": {"patch_size": [8, 8], "image_size": [32, 32]},
}


@pytest.mark.parametrize("change", SIZES_AS_LISTS.values(), ids=SIZES_AS_LISTS)
def test_sizes_may_be_lists(change, tiny_folder):
    expected = load_pretrained(tiny_folder)
    edit_config(tiny_folder, **change)
    photo = draw_photo(50, 40)
    found = load_pretrained(tiny_folder)
    assert differences(found, expected) == []
    with torch.no_grad():
        ours = found(found.preprocess(photo)[None])
        assert_close(ours, logits_of_transformers(tiny_folder, photo), rtol=0, atol=1e-5)


REFUSED = {
    "gelu_new": ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'; .* supports only 'gelu'"),
    "quick_gelu": ({"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
    "gelu_pytorch_tanh": ({"hidden_act": "gelu_pytorch_tanh"}, "hidden_act"),
    "one channel": ({"num_channels": 1}, "num_channels is 1"),
    "SwiGLU": ({"use_swiglu_ffn": True}, "use_swiglu_ffn is True"),
    "quantized": ({"quantization_config": {"load_in_8bit": True}}, "has a quantization_config"),
    "heterogeneous": ({"per_layer_config": {"0": {"num_attention_heads": 1}}}, "per_layer_config"),
    "pruned": ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
    "wide heads": ({"head_dim": 12}, "head_dim is 12; .* hidden_size / num_attention_heads"),
    "oblong patches": ({"patch_size": [8, 4]}, r"patch_size is \[8, 4\]; .*square"),
    "multi-label": (
        {"problem_type": "multi_label_classification"},
        "problem_type is 'multi_label_classification'; minivit's heads choose one of several",
    ),
    "regression": ({"problem_type": "regression"}, "problem_type is 'regression'"),
    "another head": (
        {"architectures": ["ViTForMaskedImageModeling"]},
        r"architectures is \['ViTForMaskedImageModeling'\]; expected ViTForImageClassification",
    ),
    "another model": ({"model_type": "deit"}, "model_type 'deit'; expected one of vit, dinov2"),
    "no model": (
        {"model_type": None},
        r"neither transformers' model_type \(vit, dinov2, dinov2_with_registers\) nor timm's",
    ),
}


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED)
def test_what_a_vit_of_ours_does_not_do_is_refused_by_name(change, message, tiny_folder):
    edit_config(tiny_folder, **change)
    with pytest.raises(UserError, match=message) as error:
        load_pretrained(tiny_folder)
    assert str(error.value).startswith(str(tiny_folder))


HARMLESS = {
    "attention_probs_dropout_prob": 0.1,
    "encoder_stride": 8,
    "pooler_act": "relu",
    "layerscale_value": 0.5,
    "apply_layernorm": False,
    "reshape_hidden_states": False,
    "pruned_heads": {},
    "quantization_config": None,
    "head_dim": 8,
    "problem_type": "single_label_classification",
    "_name_or_path": "google/vit-base-patch16-224",
    "dtype": "float16",
    "torch_dtype": "bfloat16",
    "chunk_size_feed_forward": 0,
    "transformers_version": "4.12.0.dev0",
}


def test_settings_that_change_nothing_are_read_over(tiny_folder, capsys):
    expected = load_pretrained(tiny_folder)
    edit_config(tiny_folder, **HARMLESS)
    assert differences(load_pretrained(tiny_folder), expected) == []
    assert capsys.readouterr().err == ""


def test_a_head_of_one_output_is_refused_until_it_is_replaced(tiny_folder, capsys):
    with pytest.raises(UserError, match="a head for one class, 'class 0', has nothing to choose"):
        load_pretrained(tiny_folder, num_classes=1)
    edit_config(tiny_folder, id2label={"0": "defect"}, label2id={"defect": 0})
    edit_tensors(tiny_folder, lambda t: t.update({n: t[n][:1].clone() for n in HEAD}))
    with pytest.raises(UserError, match="the head has a single output; .* training on your"):
        load_pretrained(tiny_folder)
    assert load_pretrained(tiny_folder, labels=("good", "bad")).labels == ("good", "bad")


@pytest.mark.parametrize("labels", [("good", "bad"), tuple(f"thing {i}" for i in range(5))])
def test_training_replaces_a_multi_label_head_of_whatever_names(labels, tiny_folder, tmp_path):
    edit_config(tiny_folder, problem_type="multi_label_classification")
    model = load_pretrained(tiny_folder, labels=labels)
    assert not model.head.weight.any()
    (tmp_path / "run").mkdir()
    save_pretrained(model, tmp_path / "run")
    assert "problem_type" not in json.loads((tmp_path / "run" / "config.json").read_text())
    assert load_pretrained(tmp_path / "run").labels == labels


def test_dropout_that_training_leaves_out_is_named(tiny_folder, capsys):
    edit_config(tiny_folder, hidden_dropout_prob=0.1, drop_path_rate=0.2)
    load_pretrained(tiny_folder)
    assert capsys.readouterr().err == ""
    load_pretrained(tiny_folder, labels=("good", "bad"))
    said = "its config has hidden_dropout_prob 0.1, drop_path_rate 0.2; minivit trains without"
    assert said in capsys.readouterr().err


def test_a_config_for_another_size_than_the_photos_get_is_named(tiny_folder, capsys):
    set_preprocessor(tiny_folder, SQUASH | {"size": 48})
    model = load_pretrained(tiny_folder)
    assert (model.preprocess.size, model.pos_grid) == ((48, 48), (4, 4))
    assert capsys.readouterr().err == (
        f"{tiny_folder}: config.json is for images of 32x32 pixels, preprocessor_config.json makes "
        "them 48x48; the positions are resampled to that; --img-size 32x32 takes the former\n"
    )
    # transformers refuses these photos; with the positions resampled it agrees.
    with pytest.raises(ValueError, match="doesn't match model"):
        logits_of_transformers(tiny_folder, draw_photo(50, 40))
    capsys.readouterr()
    assert load_pretrained(tiny_folder, img_size=(32, 32)).config.grid == (4, 4)
    assert capsys.readouterr().err == ""


def test_dinov2_resamples_its_positions_without_a_word(tmp_path, capsys):
    sizes = ViTConfig((28, 28), 14, 24, 2, 3, 96, layer_scale=True, pool="cls+mean", num_classes=0)
    model = randomize(ViT(sizes))
    model.preprocess = Preprocess((28, 28))
    save_pretrained(model, tmp_path)
    set_preprocessor(tmp_path, SQUASH | {"size": 42})
    assert load_pretrained(tmp_path).config.grid == (3, 3)
    assert capsys.readouterr().err == ""


def set_preprocessor(folder: Path, settings: dict) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("mlp_dim", [49, 50, 84, 85])
def test_an_mlp_ratio_that_is_no_whole_number_comes_back(mlp_dim, tmp_path, capsys):
    sizes = ViTConfig((28, 28), 14, 24, 2, 3, mlp_dim, 3, layer_scale=True, pool="cls+mean")
    model = randomize(ViT(sizes))
    model.labels, model.preprocess = tuple("abc"), Preprocess((28, 28))
    save_pretrained(model, tmp_path)
    assert "transformers 4 read it, transformers 5 does not" in capsys.readouterr().err
    assert differences(load_pretrained(tmp_path), replace_eps(model, 1e-12)) == []


def replace_eps(model: ViT, eps: float) -> ViT:
    model.config = replace(model.config, eps=eps)
    return model


def test_weights_in_double_precision_are_rounded_with_a_word(tiny_folder, tiny, capsys):
    edit_tensors(tiny_folder, lambda t: t.update({n: t[n].double() for n in t}))
    assert differences(load_pretrained(tiny_folder), tiny) == []
    assert "float64" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_in_half_precision_are_read_exactly(dtype, tiny_folder, capsys):
    edit_tensors(tiny_folder, lambda t: t.update({n: t[n].to(dtype) for n in t}))
    halves = load_file(tiny_folder / "model.safetensors")
    model = load_pretrained(tiny_folder)
    assert model.head.weight.dtype == torch.float32
    assert torch.equal(model.head.weight, halves["classifier.weight"].float())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.complex64], ids=str)
def test_weights_of_another_type_are_named(dtype, tiny_folder):
    edit_tensors(tiny_folder, lambda t: t.update({n: t[n].to(dtype) for n in HEAD[1:]}))
    with pytest.raises(UserError, match=rf"classifier.bias: expected \(5,\), found .* {dtype}"):
        load_pretrained(tiny_folder)


PRETRAINED = {
    "input_size": [3, 32, 32],
    "fixed_input_size": True,
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "num_classes": 5,
    "first_conv": "patch_embed.proj",
    "classifier": "head",
}
TINY_ARGS = {"patch_size": 8, "embed_dim": 24, "num_heads": 3, "mlp_ratio": 2}
TIMM = {
    "architecture": "vit_tiny_patch16_224",
    "num_classes": 5,
    "model_args": TINY_ARGS,
    "pretrained_cfg": PRETRAINED,
}


def timm_config(args: dict | None = None, pretrained: dict | None = None, **config) -> dict:
    changed = {"model_args": TINY_ARGS | (args or {})}
    changed["pretrained_cfg"] = PRETRAINED | (pretrained or {})
    return TIMM | changed | config


REFUSED_BY_TIMM = {
    "no class token": (timm_config({"class_token": False}), "class_token in model_args is False"),
    "registers": (timm_config({"reg_tokens": 4}), "reg_tokens in model_args is 4; .* only 0"),
    "no position of the class": (timm_config({"no_embed_class": True}), "no_embed_class"),
    "LayerScale": (timm_config({"init_values": 1e-5}), "has init_values 1e-05, which this ViT"),
    "another norm": (timm_config({"norm_layer": "rmsnorm"}), "norm_layer 'rmsnorm'"),
    "another activation": (timm_config({"act_layer": "quick_gelu"}), "act_layer 'quick_gelu'"),
    "a norm before": (timm_config({"pre_norm": True}), "pre_norm in model_args is True"),
    "no norm after": (timm_config({"final_norm": False}), "final_norm"),
    "a norm of the pool": (timm_config({"fc_norm": True}), "fc_norm in model_args is True"),
    "no positions": (timm_config({"pos_embed": "none"}), "pos_embed in model_args is 'none'"),
    "normalized queries": (timm_config({"qk_norm": True}), "qk_norm"),
    "average pool": (timm_config({"global_pool": "avg"}), "with global_pool 'avg' is not a plain"),
    "one channel": (timm_config({"in_chans": 1}), "in_chans in model_args is 1"),
    "one channel of photos": (timm_config(pretrained={"input_size": [1, 32, 32]}), "1 channels"),
    "unknown argument": (timm_config({"rotary": True}), "model_args has rotary True"),
    "unknown setting": (timm_config(pretrained={"invert": True}), "pretrained_cfg has invert"),
    "shifted labels": (timm_config(pretrained={"label_offset": 1}), "label_offset is 1"),
    "borders": (timm_config(pretrained={"crop_mode": "border"}), "crop_mode border"),
    "chance": (timm_config(pretrained={"interpolation": "random"}), "interpolation random"),
    "enlarged crop": (timm_config(pretrained={"crop_pct": 1.2}), "do not reach beyond the photo"),
    "another ViT": (
        timm_config(architecture="vit_base_patch16_clip_224"),
        "'vit_base_patch16_clip_224' .* is not a plain ViT",
    ),
}


@pytest.mark.parametrize("config, message", REFUSED_BY_TIMM.values(), ids=REFUSED_BY_TIMM)
def test_what_timm_does_and_we_do_not_is_refused_by_name(config, message):
    assert timm_configs.spec_from_timm(TIMM).sizes.grid == (4, 4)
    with pytest.raises(UserError, match=message):
        timm_configs.spec_from_timm(config)


def test_arguments_of_timm_that_change_nothing_are_read_over():
    expected = timm_configs.spec_from_timm(TIMM)
    args = dict.fromkeys(("norm_layer", "init_values", "img_size", "reg_tokens", "depth"))
    args |= {"dynamic_img_size": True, "dynamic_img_pad": True, "class_token": True}
    args |= {"in_chans": 3, "num_classes": 5, "global_pool": "token", "reg_tokens": 0}
    args |= {"fix_init": True, "fc_norm": False, "drop_path_rate": 0.1}
    found = timm_configs.spec_from_timm(timm_config(args))
    assert found.drop_rates == ("drop_path_rate 0.1",)
    assert replace(found, drop_rates=()) == expected


def test_what_a_pretrained_cfg_leaves_out_has_the_defaults_of_timm():
    spec = timm_configs.spec_from_timm(
        {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {}}
    )
    assert len(spec.labels) == 1000
    assert spec.preprocess == Preprocess(
        256, (224, 224), 3, configs.IMAGENET_MEAN, configs.IMAGENET_STD, round_margins=True
    )
    # Old files have no pretrained_cfg: its keys lie in the config itself.
    old = PRETRAINED | {"architecture": "vit_tiny_patch8_224", "labels": list("abcde")}
    spec = timm_configs.spec_from_timm(old | {"num_features": 192})
    assert (spec.labels, spec.sizes.img_size) == (tuple("abcde"), (32, 32))


def test_a_saved_image_size_of_timm_is_that_of_the_photos():
    args = {"img_size": [48, 48]}
    assert timm_configs.spec_from_timm(timm_config(args)).preprocess.size == (48, 48)
    spec = timm_configs.spec_from_timm(timm_config(args, {"fixed_input_size": False}))
    assert (spec.preprocess.size, spec.sizes.pos_grid) == ((32, 32), (6, 6))
    assert "config.json is for images of 48x48 pixels, pretrained_cfg makes" in spec.size_note


@needs_timm
def test_all_arguments_and_settings_of_timm_are_known():
    from timm.models import PretrainedCfg
    from timm.models.vision_transformer import VisionTransformer

    assert {field.name for field in fields(PretrainedCfg)} <= timm_configs.TIMM_PRETRAINED
    parameters = inspect.signature(VisionTransformer.__init__).parameters
    by_architecture = {"init_values", "reg_tokens", "no_embed_class"}
    read = timm_configs.TIMM_SIZES | timm_configs.TIMM_IRRELEVANT | timm_configs.TIMM_DROP_RATES
    assert read | timm_configs.TIMM_FIXED.keys() <= parameters.keys()
    always_refused = parameters.keys() - read - timm_configs.TIMM_FIXED.keys() - by_architecture
    assert {name for name in always_refused if not name.endswith(("_layer", "_fn"))} == {
        "self",
        "device",
        "dtype",
    }
    for name, value in timm_configs.TIMM_FIXED.items():
        if name != "fc_norm":  # None stands for False where the class token is read.
            assert parameters[name].default == value, name


@needs_timm
def test_a_config_of_timm_in_a_folder_has_the_logits_of_timm(tmp_path):
    timm = importlib.import_module("timm")
    args = TINY_ARGS | {"depth": 2, "img_size": (32, 48), "qkv_bias": False, "num_classes": 5}
    theirs = randomize(timm.create_model("vit_tiny_patch16_224", **args))
    timm.models.save_for_hf(theirs, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"]["crop_mode"] = "squash"  # the only one for photos that are no square
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = load_pretrained(tmp_path)
    data = timm.data.resolve_model_data_config(theirs, pretrained_cfg=config["pretrained_cfg"])
    photo = draw_photo(101, 67)
    pixels = ours.preprocess(photo)
    assert_close(pixels, timm.data.create_transform(**data)(photo), rtol=0, atol=1e-5)
    with torch.no_grad():
        assert_close(ours(pixels[None]), theirs(pixels[None]), rtol=0, atol=1e-5)


def test_a_config_of_timm_with_one_class_is_refused(tmp_path):
    model = randomize(ViT(replace(TINY, num_classes=1)))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(timm_config(num_classes=1)))
    with pytest.raises(UserError, match="the head has a single output"):
        load_pretrained(tmp_path)
