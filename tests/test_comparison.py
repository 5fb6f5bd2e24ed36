"""docs/comparison.md says of transformers and timm what their named versions do."""

from __future__ import annotations

import inspect
import re
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

PAGE = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")


def is_named_version(library: str) -> bool:
    """Say whether the installed version is the one that the page names."""
    named = re.search(rf"\| {library} ([\d.]+) \|", PAGE)[1]
    return f"{version(library)}.".startswith(f"{named}.")


needs_transformers = pytest.mark.skipif(
    not is_named_version("transformers"), reason="the page names another version of transformers"
)
needs_timm = pytest.mark.skipif(
    not is_named_version("timm"), reason="the page names another version of timm"
)


def tiny_vit(**attention) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=2,
        **attention,
    )
    return transformers.ViTForImageClassification(config)


def sizes(row: str) -> list[int]:
    """Return the numbers that stand in a row of the page's tables."""
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {row} |")]
    return [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", line)]


def count_lines(*paths: Path) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


@needs_transformers
def test_transformers_gives_no_attention_beside_the_fused_kernel():
    images = torch.randn(1, 3, 32, 32)
    assert tiny_vit().config._attn_implementation == "sdpa"  # footnote 1: the default
    fused = tiny_vit().eval()(images, output_attentions=True)
    assert fused.attentions == ()
    eager = tiny_vit(attn_implementation="eager").eval()(images, output_attentions=[1])
    assert len(eager.attentions) == 3  # all blocks, although one was asked for
    assert 0 < (eager.logits - fused.logits).abs().max() < 1e-6


@needs_timm
def test_timm_extracts_attention_only_without_the_fused_kernel():
    model = timm.create_model("vit_tiny_patch16_224", depth=1).eval()
    extract = timm.utils.AttentionExtract
    with pytest.raises(RuntimeError, match="No node names found"):
        extract(model, method="fx")
    with torch.no_grad():
        assert extract(model, method="hook")(torch.randn(1, 3, 224, 224)) == {}


@needs_timm
def test_timm_resumes_weights_optimizer_scaler_and_epoch():
    parameters = inspect.signature(timm.models.resume_checkpoint).parameters
    assert list(parameters)[:4] == ["model", "checkpoint_path", "optimizer", "loss_scaler"]
    assert len(timm.list_models()) == sizes("beyond minivit")[1]


@needs_transformers
def test_transformers_turns_paths_upright_but_not_images(tmp_path):
    photo = Image.fromarray(np.arange(20 * 40 * 3, dtype=np.uint8).reshape(20, 40, 3))
    exif = photo.getexif()
    exif[0x112] = 6  # orientation: a quarter turn
    path = tmp_path / "photo.png"
    photo.save(path, exif=exif)
    assert transformers.image_utils.load_image(str(path)).size == (20, 40)
    processor = transformers.ViTImageProcessor(size={"height": 8, "width": 8})
    with Image.open(path) as opened:
        of_image = processor(opened, return_tensors="pt").pixel_values
    assert torch.equal(of_image, processor(photo, return_tensors="pt").pixel_values)


def blocks_and_rest(model: torch.nn.Module) -> tuple[dict, dict]:
    """Split a state dict into the tensors of the blocks, and the others."""
    blocks = {}
    rest = {}
    for name, tensor in model.state_dict().items():
        part = blocks if re.search(r"\.layers?\.\d", name) else rest
        part[name] = tensor.clone()
    return blocks, rest


def are_equal(a: dict, b: dict) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


class AugmentedPhotos(torch.utils.data.Dataset):
    """Eight images of two classes, changed at random each time that they are read."""

    def __init__(self) -> None:
        self.images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": self.images[index] + torch.randn(1), "labels": index % 2}


@needs_transformers
@pytest.mark.filterwarnings("ignore")  # Those of Trainer are not ours to mend.
def test_trainer_resumes_a_vit_only_from_an_epochs_end_with_weights_loaded(tmp_path):
    """Footnote 6. Each epoch takes two steps, and the state is saved after each step."""
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=3,
        per_device_train_batch_size=4,
        save_strategy="steps",
        save_steps=1,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )

    def train(model: torch.nn.Module, checkpoint: str | None = None) -> tuple[dict, dict]:
        trainer = transformers.Trainer(model, settings, train_dataset=AugmentedPhotos())
        trainer.train(resume_from_checkpoint=checkpoint)
        return blocks_and_rest(model)

    straight = train(tiny_vit())
    after_epoch = tmp_path / "checkpoint-2"
    within_epoch = tmp_path / "checkpoint-3"
    for source in (after_epoch, within_epoch):
        source.rename(tmp_path / f"kept-{source.name}")
    after_epoch = str(tmp_path / f"kept-{after_epoch.name}")
    within_epoch = str(tmp_path / f"kept-{within_epoch.name}")

    fresh = tiny_vit()
    trainer = transformers.Trainer(fresh, settings, train_dataset=AugmentedPhotos())
    trainer._load_from_checkpoint(after_epoch)
    load = transformers.ViTForImageClassification.from_pretrained
    assert are_equal(blocks_and_rest(fresh)[0], blocks_and_rest(tiny_vit())[0])  # the base's
    assert are_equal(blocks_and_rest(fresh)[1], blocks_and_rest(load(after_epoch))[1])

    resumed = train(tiny_vit(), after_epoch)
    assert not are_equal(resumed[0], straight[0])
    resumed = train(load(after_epoch), after_epoch)
    assert are_equal(resumed[0], straight[0]) and are_equal(resumed[1], straight[1])
    resumed = train(load(within_epoch), within_epoch)
    assert not are_equal(resumed[0], straight[0])


@needs_transformers
@needs_timm
def test_the_numbers_of_lines_are_about_right():
    package = Path(transformers.__file__).parent
    ours = [*(ROOT / "minivit").rglob("*.py"), ROOT / "train.py", ROOT / "infer.py"]
    core = [ROOT / "minivit" / name for name in ("model.py", "attention.py", "train.py")]
    core += [
        ROOT / "minivit" / "training" / f"{name}.py" for name in ("optimizer", "features", "step")
    ]
    counted = [
        count_lines(package / "models" / "vit" / "modeling_vit.py"),
        count_lines(package / "trainer.py"),
        count_lines(Path(timm.__file__).parent / "models" / "vision_transformer.py"),
    ]
    of_minivit, of_core, *of_others = sizes("lines of Python")
    assert of_minivit == pytest.approx(count_lines(*ours), rel=0.2)  # It grows.
    assert of_core == pytest.approx(count_lines(*core), rel=0.2)
    assert of_others[: len(counted)] == pytest.approx(counted, rel=0.05)
    families = [path for path in (package / "models").iterdir() if path.is_dir()]
    assert sizes("beyond minivit")[0] == pytest.approx(len(families), rel=0.1)
