"""Fixtures and helpers that several test modules share.

Checkpoints as transformers writes them, a tiny one of ours, drawn photos, and real photos and
weights where this machine has them.
"""

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
from hub_server import serve
from PIL import Image

# Tiny models are slow with several threads, because these wait for each other. The variable
# also reaches the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
if sys.platform == "win32":
    # These modules fork, kill, or use POSIX's locks, pipes and limits throughout.
    modules = ("ahead", "data_folders", "files", "fuzz", "hub", "serve", "signals", "store")
    collect_ignore = [f"test_{name}.py" for name in (*modules, "workers")]
# No test may reach the Hub. Tests of downloads start processes that ask a local server instead.
os.environ["HF_HUB_OFFLINE"] = "1"
# A shell's background job ignores SIGINT, and so would every process that a test starts from it.
signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))  # Tests import train.py and infer.py.

from minivit import Preprocess, ViT, ViTConfig, save_pretrained  # noqa: E402


def process_state() -> dict[str, object]:
    """Return what belongs to the whole process, so that all later tests would inherit it."""
    state: dict[str, object] = {
        "working directory": Path.cwd(),
        "torch's threads": torch.get_num_threads(),
        "torch's default dtype": torch.get_default_dtype(),
        "gradients are on": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "signal handlers": [signal.getsignal(number) for number in signal.valid_signals()],
    }
    if hasattr(os, "nice"):
        state["priority"] = os.nice(0)
    return state


@pytest.fixture(autouse=True)
def process_stays_as_it_is():
    """Fail a test that changes the process for good, as one did by lowering its priority."""
    before = process_state()
    yield
    assert process_state() == before


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Set every parameter to random values and return the model in eval mode.

    Norms and biases get random values too, so that a test notices when two tensors are swapped.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = noise * (1.5 * parameter[0].numel() ** -0.5)
        else:
            parameter.data = noise * 0.1 + parameter.data
    return model.eval()


@pytest.fixture(scope="session")
def vit_b16(tmp_path_factory) -> Path:
    """A random ViT-B/16 of full size, written by transformers like google/vit-base-patch16-224."""
    from transformers import ViTConfig as HubConfig
    from transformers import ViTForImageClassification

    folder = tmp_path_factory.mktemp("vit-b16")
    labels = {i: f"thing {i}" for i in range(1000)}
    config = HubConfig(id2label=labels, label2id={v: k for k, v in labels.items()})
    randomize(ViTForImageClassification(config)).save_pretrained(folder)
    # The file on the Hub has no resample and no crop either, and its size is an int.
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
    """A random DINOv2 ViT-S/14 of full size, like facebook/dinov2-small: it has no classifier."""
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dinov2-s14")
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518)
    randomize(Dinov2Model(config)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(DINOV2_PREPROCESSOR))
    return folder


@pytest.fixture(scope="session")
def real_weights() -> Path:
    """A trained DINOv2 ViT-S/14, which .ci/run writes before the tests where it can."""
    folder = ROOT / ".cache" / "dinov2-small"
    if not (folder / "model.safetensors").exists():
        pytest.skip(
            f"no {folder}; to write it: pip install onnx,"
            f" then python ../shared/tools/real_weights.py {folder}"
        )
    return folder


@pytest.fixture(scope="session")
def pets3(tmp_path_factory) -> Path:
    """Real photos of three breeds, in a folder where the store of decoded photos may be written."""
    folder = SHARED / "data" / "pets3"
    if not folder.exists():
        pytest.skip(f"no {folder}")
    link = tmp_path_factory.mktemp("pets3")
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
    """Drawn photos: landscape, portrait, square, small and a panorama."""
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
    """The checkpoint of tiny_folder, written once for many tests, which must not write to it."""
    folder = tmp_path_factory.mktemp("tiny")
    save_pretrained(make_tiny(), folder)
    return folder


def leave_figures_empty(patch):
    """Write empty files for figures, which take three quarters of the time of a tiny run."""
    from minivit.figures import panels, plots

    for module, name in (
        (panels, "draw_attention"),
        (panels, "draw_predictions"),
        (plots, "draw_confusion"),
        (plots, "draw_curves"),
        (plots, "draw_calibration"),
    ):
        patch.setattr(module, name, lambda path, *_, **__: path.touch())


@pytest.fixture
def no_figures(monkeypatch):
    leave_figures_empty(monkeypatch)


@pytest.fixture(scope="session")
def shapes_data(tmp_path_factory) -> Path:
    """Class folders that a tiny ViT can learn: mostly red, mostly green and mostly blue photos.

    Each class has 12 photos in train/ and 4 in test/.
    """
    root = tmp_path_factory.mktemp("shapes")
    rng = np.random.default_rng(0)
    for split, n in (("train", 12), ("test", 4)):
        for channel, name in enumerate(("red", "green", "blue")):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                photo = rng.integers(0, 120, (40, 50, 3))
                photo[..., channel] += 120
                Image.fromarray(photo.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


# In the order of their labels, which is not alphabetical.
BREEDS = ["Zorro_cat", "alpha_dog", "Beta_cat"]


def make_pets(root: Path, trainval: int = 20, test: int = 3) -> Path:
    """Write drawn photos of three breeds in the layout of Oxford-IIIT Pet, so many for each breed.

    One more photo is in no listing.
    """
    folder = root / "oxford-iiit-pet"
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for split, start, count in (("trainval", 0, trainval), ("test", trainval, test)):
        lines = []
        for label, breed in enumerate(BREEDS, 1):
            for i in range(start, start + count):
                draw_photo(40, 30, i).save(folder / "images" / f"{breed}_{i}.jpg")
                lines.append(f"{breed}_{i} {label} 1 1")
        (folder / "annotations" / f"{split}.txt").write_text("\n".join(lines) + "\n")
    draw_photo(40, 30).save(folder / "images" / "unlisted_1.jpg")
    return root


# Columns of metrics.jsonl that depend on the machine and not on the mathematics.
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
    """Return a tiny ViT whose blocks 10-11, final norm and head are trainable."""
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
    """Return the state of a new run that trains this model itself, not a copy, from block 10 on."""
    from minivit.training.state import new_state

    settings = {"cut": 10, "amp": amp, "micro_batch": 4, "weight_decay": 0.05} | changes
    return new_state(model, **settings)


def train_epochs(state, train, val=None, *, stop_requested=lambda: False, **changes) -> list[dict]:
    """Train a tiny model as train.py does, without files; return a row for each epoch from 0 on."""
    from minivit.settings import TrainSettings
    from minivit.train import run_epochs

    settings = {"epochs": 2, "batch_size": 4, "lr": 1e-3, "cache_views": 0, "seed": 0} | changes
    run_epochs(state, train, val or train, TrainSettings(**settings), stop_requested)
    return state.rows


def run_train(model, data, out, *flags) -> int:
    """Run train.py on the CPU in float32 and return its exit code."""
    import train

    files = ["--model", str(model), "--data", str(data), "--out", str(out)]
    machine = ["--amp", "off", "--device", "cpu"]
    return train.main([*files, *machine, "--batch-size", "8", "--lr", "0.003", *map(str, flags)])


def rows_of(out: Path) -> list[dict]:
    """Return the rows of a run's metrics.jsonl, without the columns that depend on the machine."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return without_times([json.loads(line) for line in lines])


def assert_same_end(out: Path, straight: Path) -> None:
    """Compare two finished runs: equal bytes, equal rows apart from times, and no leftovers."""
    weights = ("model.safetensors", "tail.safetensors")
    for name in (*weights, "config.json", "classes.csv", "confusion.png", "curves.png"):
        assert (out / name).read_bytes() == (straight / name).read_bytes(), name
    assert rows_of(out) == rows_of(straight)
    assert not list(out.glob(".*.partial"))
    assert not (out / "state.safetensors").exists()


@pytest.fixture
def hub(tiny_folder):
    """A server that speaks the Hub's protocol and has the tiny checkpoint as owner/tiny."""
    with serve(tiny_folder) as state:
        yield state


def run_python(arguments, hub, cache, **environment) -> subprocess.CompletedProcess:
    """Run Python in a process whose Hub is the server `hub`, or that URL, and return its outcome.

    huggingface-hub reads its environment only once, so tests of downloads need new processes.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    hub_settings = {
        "HF_ENDPOINT": hub if isinstance(hub, str) else hub.url,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=inherited | hub_settings | environment,
        timeout=300,
    )


def assert_one_line(done: subprocess.CompletedProcess, *parts: str) -> None:
    """Check that a process ended with exit code 1 and one line on stderr that holds these parts."""
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    for part in parts:
        assert part in last, done.stderr
