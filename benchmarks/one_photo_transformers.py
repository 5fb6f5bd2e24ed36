"""What a user of transformers writes to see where a ViT looks, for one photo.

It prints the five most probable classes and draws one figure of blocks 8 to 11.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, ViTForImageClassification


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photo")
    parser.add_argument("model", help="a folder in the Hub's layout")
    parser.add_argument("out", type=Path, help="the folder that figure.png is written to")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    processor = AutoImageProcessor.from_pretrained(args.model)
    model = ViTForImageClassification.from_pretrained(args.model, attn_implementation="eager")
    model.eval().to(args.device)
    photo = ImageOps.exif_transpose(Image.open(args.photo)).convert("RGB")
    with torch.no_grad():
        pixels = processor(photo, return_tensors="pt").pixel_values.to(args.device)
        outputs = model(pixels, output_attentions=True)
    top = outputs.logits[0].softmax(0).topk(5)
    for probability, index in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        print(f"{probability:.3f}  {model.config.id2label[index]}")

    figure, axes = plt.subplots(1, 5, figsize=(15, 3.6), layout="constrained", dpi=120)
    axes[0].imshow(photo)
    for ax, block in zip(axes[1:], range(8, 12), strict=True):
        row = outputs.attentions[block][0, :, 0, 1:].mean(0).view(1, 1, 14, 14)
        heat = torch.nn.functional.interpolate(row, photo.size[::-1], mode="bilinear")[0, 0].cpu()
        ax.imshow(photo)
        ax.imshow(heat, cmap="inferno", alpha=0.6)
        ax.set_title(f"block {block}")
    for ax in axes:
        ax.axis("off")
    figure.suptitle(f"{model.config.id2label[top.indices[0].item()]} {top.values[0]:.3f}")
    args.out.mkdir(exist_ok=True)
    figure.savefig(args.out / "figure.png")


if __name__ == "__main__":
    main()
