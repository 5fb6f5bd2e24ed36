"""Fixtures: checkpoints that transformers wrote, a tiny one of ours, drawn photos, and real ones where they can be had."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # of children too: threads that wait for each other make tiny models slow
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
os.environ["HF_HUB_OFFLINE"] = (
    "1"  # no test reaches the Hub; those of the Hub run processes of their own
)
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell's background job ignores it, and so its children would
ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))  # train.py and infer.py

from minivit import Preprocess, ViT, ViTConfig, save_pretrained  # noqa: E402


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter values of its own, norms and biases too, so that none can be mistaken for another."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        matrix = parameter.ndim > 1
        parameter.data = noise * (1.5 * parameter[0].numel() ** -0.5 if matrix else 0.1) + (
            0 if matrix else parameter.data
        )
    return model.eval()


@pytest.fixture(scope="session")
def vit_b16(tmp_path_factory) -> Path:
    """ViT-B/16 at its full size, written by transformers in the layout of google/vit-base-patch16-224."""
    from transformers import ViTConfig as HubConfig
    from transformers import ViTForImageClassification

    folder = tmp_path_factory.mktemp("vit-b16")
    labels = {i: f"thing {i}" for i in range(1000)}
    config = HubConfig(id2label=labels, label2id={v: k for k, v in labels.items()})
    randomize(ViTForImageClassification(config)).save_pretrained(folder)
    # As the Hub has it: no resample, no crop, size an int.
    preprocessor = {
        "do_normalize": True,
        "do_resize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "size": 224,
    }
    (folder / "preprocessor_config.json").write_text(
        json.dumps(preprocessor | {"image_processor_type": "ViTImageProcessor"})
    )
    return folder


DINOV2_PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 0.00392156862745098,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


@pytest.fixture(scope="session")
def dinov2_s14(tmp_path_factory) -> Path:
    """DINOv2 ViT-S/14 at its full size, random, in the layout of facebook/dinov2-small: a bare backbone."""
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dinov2-s14")
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518)
    randomize(Dinov2Model(config)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(DINOV2_PREPROCESSOR))
    return folder


@pytest.fixture(scope="session")
def real_weights() -> Path:
    """A really trained DINOv2 ViT-S/14, made once into .cache by the tool in ../shared where that can run."""
    folder, tool = ROOT / ".cache" / "dinov2-small", SHARED / "tools" / "real_weights.py"
    if not (folder / "model.safetensors").exists():
        if not tool.exists():
            pytest.skip(f"no {tool}")
        site = ROOT / ".cache" / "site"
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--disable-pip-version-check",
            "--target",
            str(site),
            "onnx",
        ]
        made = subprocess.run(pip, capture_output=True, text=True)
        if made.returncode == 0:
            path = {"PYTHONPATH": str(site)}
            made = subprocess.run(
                [sys.executable, tool, folder],
                capture_output=True,
                text=True,
                env=os.environ | path,
            )
        if made.returncode:
            pytest.skip(f"{tool} cannot run here: {made.stderr.strip()[-200:]}")
    return folder


@pytest.fixture(scope="session")
def pets3(tmp_path_factory) -> Path:
    """Real photos of three breeds, in a folder that decoded ones can be kept in."""
    folder, link = SHARED / "data" / "pets3", tmp_path_factory.mktemp("pets3")
    if not folder.exists():
        pytest.skip(f"no {folder}")
    (link / "oxford-iiit-pet").symlink_to(folder / "oxford-iiit-pet")
    return link


def draw_photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Draw a photo with edges, gradients and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    photo = np.stack([255 * x / width, 255 * y / height, 128 + 100 * np.sin(x / 7 + y / 11)], -1)
    photo[height // 4 : height // 2, width // 3 : width // 2] = rng.integers(0, 256, 3)
    return Image.fromarray((photo + rng.normal(0, 12, photo.shape)).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> list[Path]:
    """Drawn photos: landscape, portrait, square, small, panorama."""
    folder = tmp_path_factory.mktemp("photos")
    paths = []
    for i, size in enumerate([(500, 375), (333, 500), (224, 224), (60, 41), (900, 120)]):
        paths.append(folder / f"photo {i}.png")
        draw_photo(*size, seed=i).save(paths[-1])
    return paths


TINY = ViTConfig(
    img_size=(32, 32), patch_size=8, embed_dim=24, depth=12, num_heads=3, mlp_dim=48, num_classes=5
)


def make_tiny() -> ViT:
    """Return a ViT of 12 blocks small enough to train in a test."""
    model = randomize(ViT(TINY))
    model.labels = tuple(f"thing {i}" for i in range(5))
    model.preprocess = Preprocess((32, 32))
    return model


@pytest.fixture
def tiny() -> ViT:
    return make_tiny()


@pytest.fixture
def tiny_folder(tiny, tmp_path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    save_pretrained(tiny, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_saved(tmp_path_factory) -> Path:
    """The same, once for many tests; not to be written to."""
    folder = tmp_path_factory.mktemp("tiny")
    save_pretrained(make_tiny(), folder)
    return folder


def leave_figures_empty(patch):
    """Of a tiny model's time, the figures of a run or a photo take three quarters."""
    from minivit.figures import plots

    for name in ("draw_attention", "draw_confusion", "draw_curves", "draw_predictions"):
        patch.setattr(plots, name, lambda path, *_, **__: path.touch())


@pytest.fixture
def no_figures(monkeypatch):
    leave_figures_empty(monkeypatch)


@pytest.fixture(scope="session")
def shapes_data(tmp_path_factory) -> Path:
    """Class folders that a tiny ViT can learn: photos mostly red, mostly green, mostly blue; 12 training, 4 test each."""
    root, rng = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    for split, n in (("train", 12), ("test", 4)):
        for channel, name in enumerate(("red", "green", "blue")):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                photo = rng.integers(0, 120, (40, 50, 3))
                photo[..., channel] += 120
                Image.fromarray(photo.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


# What a row of metrics.jsonl says of the machine rather than of the mathematics.
TIMES = {"images_per_s", "mfu", "seconds", "peak_gib"}


def without_times(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


@pytest.fixture
def pixels() -> tuple[torch.Tensor, torch.Tensor]:
    """Nine random images of 32 x 32 pixels as uint8, and their labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (9, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return images, torch.arange(9) % 5


def make_trainable() -> ViT:
    """Return a tiny ViT of which blocks 10-11, the final norm and the head train."""
    from minivit.model import freeze_except

    model = randomize(ViT(TINY))
    model.preprocess = Preprocess((32, 32))
    freeze_except(model, [10, 11])
    return model


def trainable_vector(model: ViT) -> torch.Tensor:
    """Return all trainable weights as one vector."""
    from minivit.model import trainable

    return torch.cat([weight.detach().flatten() for weight in trainable(model).values()])


def start_run(model: ViT, *, amp: torch.dtype | None = None, **changes):
    """Return the state of a run that trains this very model, from block 10 on."""
    from minivit.training.state import new_state

    settings = {"cut": 10, "amp": amp, "micro_batch": 4, "weight_decay": 0.05} | changes
    return new_state(model, **settings)


def train_epochs(state, train, val=None, *, stop_requested=lambda: False, **changes) -> list[dict]:
    """Train a tiny model as train.py does, without files, and return its rows."""
    from minivit.settings import TrainSettings
    from minivit.train import run_epochs

    settings = {"epochs": 2, "batch_size": 4, "lr": 1e-3, "seed": 0} | changes
    run_epochs(state, train, val or train, TrainSettings(**settings), stop_requested)
    return state.rows


def run_train(model, data, out, *flags) -> int:
    """Run train.py on the CPU in float32 and return its exit code."""
    import train

    files = ["--model", str(model), "--data", str(data), "--out", str(out)]
    machine = ["--amp", "off", "--device", "cpu"]
    return train.main([*files, *machine, "--batch-size", "8", "--lr", "0.003", *map(str, flags)])


def rows_of(out: Path) -> list[dict]:
    """Return the rows of a run, without what they say of the machine."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return without_times([json.loads(line) for line in lines])


def assert_same_end(out: Path, straight: Path) -> None:
    """Compare two finished runs: equal bytes, equal tensors in the tail, equal rows, no leftovers.

    The header of tail.safetensors has its keys in no particular order, and times differ.
    """
    for name in ("model.safetensors", "config.json", "classes.csv", "confusion.png", "curves.png"):
        assert (out / name).read_bytes() == (straight / name).read_bytes(), name
    tail = load_file(out / "tail.safetensors")
    expected = load_file(straight / "tail.safetensors")
    assert tail.keys() == expected.keys()
    assert all(torch.equal(tail[name], expected[name]) for name in expected)
    assert rows_of(out) == rows_of(straight)
    assert not list(out.glob(".*.partial"))
    assert not (out / "state.safetensors").exists()
