"""Checkpoints for several test modules: as other libraries write them, and a fine-tuned one."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomize

from minivit import load_pretrained, save_pretrained
from minivit.checkpoints.weights import save_tail
from minivit.model import freeze_except

needs_timm = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None, reason="timm is not installed"
)

SQUASH = {
    "image_processor_type": "ViTImageProcessor",
    "size": 224,
    "resample": 2,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
DEIT = {  # from facebook's repository; it is so old that its size is a number
    "feature_extractor_type": "DeiTFeatureExtractor",
    "crop_size": 224,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "size": 256,
}
SMALL = {
    "hidden_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
}
TUNED_LABELS = ("Abyssinian", "boxer", "Egyptian Mau")


def write_by_transformers(folder: Path, kind: str, sizes: dict, preprocessor: dict):
    """Write a random checkpoint as transformers does, and return the model."""
    import transformers

    model_class = getattr(transformers, kind)
    settings = dict(sizes)
    if not kind.startswith("ViT"):
        settings.pop("intermediate_size", None)
    if "Classification" in kind:
        settings["id2label"] = {i: f"thing {i}" for i in range(1000)}
    config = model_class.config_class(**settings)
    model = randomize(model_class._from_config(config, attn_implementation="eager"))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return model


def google_npz(hub: dict[str, torch.Tensor], num_heads: int) -> dict[str, np.ndarray]:
    """Return the tensors of a ViT from transformers in the layout of Google's Flax code.

    Its kernels are transposed, and its heads have an axis of their own.
    """
    hub = {name.removeprefix("vit."): tensor for name, tensor in hub.items()}
    D = hub["embeddings.cls_token"].shape[-1]
    heads = (num_heads, D // num_heads)
    projection = "embeddings.patch_embeddings.projection"
    flax = {
        "cls": hub["embeddings.cls_token"],
        "Transformer/posembed_input/pos_embedding": hub["embeddings.position_embeddings"],
        "embedding/kernel": hub[f"{projection}.weight"].permute(2, 3, 1, 0),
        "embedding/bias": hub[f"{projection}.bias"],
        "Transformer/encoder_norm/scale": hub["layernorm.weight"],
        "Transformer/encoder_norm/bias": hub["layernorm.bias"],
        "head/kernel": hub["classifier.weight"].T,
        "head/bias": hub["classifier.bias"],
    }
    depth = len({name.split(".")[2] for name in hub if name.startswith("encoder.layer.")})
    for i in range(depth):
        layer = f"encoder.layer.{i}"
        block = f"Transformer/encoderblock_{i}"
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for part in ("query", "key", "value"):
            weight = hub[f"{layer}.attention.attention.{part}.weight"]
            bias = hub[f"{layer}.attention.attention.{part}.bias"]
            flax[f"{attention}/{part}/kernel"] = weight.T.reshape(D, *heads)
            flax[f"{attention}/{part}/bias"] = bias.reshape(heads)
        out_weight = hub[f"{layer}.attention.output.dense.weight"]
        flax[f"{attention}/out/kernel"] = out_weight.T.reshape(*heads, D)
        flax[f"{attention}/out/bias"] = hub[f"{layer}.attention.output.dense.bias"]
        for flax_name, name in (("Dense_0", "intermediate"), ("Dense_1", "output")):
            flax[f"{block}/MlpBlock_3/{flax_name}/kernel"] = hub[f"{layer}.{name}.dense.weight"].T
            flax[f"{block}/MlpBlock_3/{flax_name}/bias"] = hub[f"{layer}.{name}.dense.bias"]
        for flax_name, name in (("LayerNorm_0", "before"), ("LayerNorm_2", "after")):
            flax[f"{block}/{flax_name}/scale"] = hub[f"{layer}.layernorm_{name}.weight"]
            flax[f"{block}/{flax_name}/bias"] = hub[f"{layer}.layernorm_{name}.bias"]
    return {name: tensor.contiguous().numpy() for name, tensor in flax.items()}


def add_noise(model) -> None:
    """Change the trainable weights of a model, as training does."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def fine_tune(base, folder, labels=TUNED_LABELS, **options):
    """Write the checkpoint and the tail of a model whose last two blocks changed, and return it."""
    model = load_pretrained(base, labels=labels, **options).eval()
    freeze_except(model, [model.config.depth - 2, model.config.depth - 1])
    add_noise(model)
    folder.mkdir()
    save_pretrained(model, folder)
    save_tail(model, folder / "tail.safetensors")
    return model
