"""The command `selfcheck` passes on this machine and finds each planted defect."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import socket
import threading
from dataclasses import asdict, replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import draw_photo, randomize, run_python
from hub_server import serve
from safetensors.torch import load_file, save_file

from minivit import __main__
from minivit.model import Attention
from minivit.tools.selfcheck import checks, published
from minivit.tools.selfcheck.published import Published
from minivit.training.state import RunState


def selfcheck(capsys, *flags):
    code = __main__.main(["selfcheck", "--device", "cpu", *flags])
    lines = capsys.readouterr().out.splitlines()
    return code, [line for line in lines if line.endswith(("ok", "FAILED"))]


@pytest.fixture(autouse=True)
def deterministic_only_here():
    yield
    torch.use_deterministic_algorithms(False)


def test_every_check_is_within_its_bound(tiny_folder, capsys):
    code, lines = selfcheck(capsys, "--model", str(tiny_folder), "--amp", "bf16")
    assert code == 0
    assert len(lines) == 7
    assert all(line.endswith("ok") for line in lines)


def inexact_attention(forward):
    return lambda self, *args: forward(self, *args) * (1 + 1e-4)


def inexact_gradients_of_single_photos(train_step):
    def step(network, *args, micro_batch, **kwargs):
        result = train_step(network, *args, micro_batch=micro_batch, **kwargs)
        if micro_batch == 1:
            network.head.weight.grad *= 1.001
        return result

    return step


def forgets_its_step(restore):
    return lambda self, tensors, about: restore(self, tensors, about | {"step": 0})


DEFECTS = {
    "attention": (Attention, "forward", inexact_attention, "fused against explicit"),
    "accumulation": (
        checks,
        "train_step",
        inexact_gradients_of_single_photos,
        "micro-batches of 1 ",
    ),
    "resume": (RunState, "restore", forgets_its_step, "interrupted and resumed"),
}


@pytest.mark.parametrize("owner, name, broken, check", DEFECTS.values(), ids=DEFECTS)
def test_a_defect_is_found(tiny_folder, capsys, monkeypatch, owner, name, broken, check):
    monkeypatch.setattr(owner, name, broken(getattr(owner, name)))
    code, lines = selfcheck(capsys, "--model", str(tiny_folder), "--amp", "off")
    assert code == 1
    assert any(check in line for line in lines if line.endswith("FAILED"))
    assert any(line.endswith("ok") for line in lines)


# Against published numbers, here those of transformers for small checkpoints of its own


def publish(folder: Path, model, processor, photo, **options) -> Published:
    """Write a checkpoint as transformers does, and return what transformers makes of a photo."""
    from transformers import AutoImageProcessor

    randomize(model).save_pretrained(folder)
    processor.save_pretrained(folder)
    size = {}
    if "img_size" in options:
        size = {"size": dict(zip(("height", "width"), options["img_size"]))}
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **size)
    inputs = processor(photo, return_tensors="pt")
    if size:
        inputs["interpolate_pos_encoding"] = True
    with torch.no_grad():
        output = model(**inputs)
    config = model.config
    if "logits" in output:
        values = output.logits[:, :3]
        options["label"] = config.id2label[output.logits.argmax().item()]
    else:
        values = output.last_hidden_state[0, :3, :3]
    return Published(
        model=str(folder),
        kind=(config.model_type, config.hidden_size, config.patch_size),
        source="this test",
        values=tuple(map(tuple, values.tolist())),
        tolerance=1e-4,
        **options,
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, list[Published]]:
    """A photo, and small checkpoints of each kind with transformers' outputs for the photo."""
    import transformers as hf

    folder = tmp_path_factory.mktemp("published")
    photo = draw_photo(*published.PHOTO_SIZE)
    photo.save(folder / "photo.png")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vit = sizes | {"intermediate_size": 64, "image_size": 32}
    names = {str(i): f"class {i}" for i in range(7)}
    square = hf.ViTImageProcessor(size={"height": 32, "width": 32})
    crop = hf.BitImageProcessor(
        size={"shortest_edge": 36}, crop_size={"height": 28, "width": 28}, resample=3
    )
    classifier = hf.ViTForImageClassification(hf.ViTConfig(**vit, patch_size=8, id2label=names))
    registers = hf.Dinov2WithRegistersConfig(**sizes, image_size=56, patch_size=7)
    table = [
        publish(folder / "vit", classifier, square, photo),
        publish(
            folder / "dino",
            hf.ViTModel(hf.ViTConfig(**vit, patch_size=4), add_pooling_layer=False),
            square,
            photo,
            img_size=(48, 48),
        ),
        publish(
            folder / "dinov2",
            hf.Dinov2Model(hf.Dinov2Config(**sizes, image_size=56, patch_size=7)),
            crop,
            photo,
        ),
        publish(folder / "registers", hf.Dinov2WithRegistersModel(registers), crop, photo),
    ]
    return folder, table


@pytest.fixture
def copies(small, tmp_path, monkeypatch) -> Path:
    """A folder with the photo and checkpoints of one's own to break."""
    folder, table = small
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    copied = [replace(row, model=str(tmp_path / Path(row.model).name)) for row in table]
    monkeypatch.setattr(published, "PUBLISHED", copied)
    return tmp_path


def compare(folder: Path, *flags: str) -> int:
    photo = () if "--photo" in flags else ("--photo", str(folder / "photo.png"))
    return __main__.main(["selfcheck", "--published", "--device", "cpu", *photo, *flags])


def test_what_transformers_computes_is_found(copies, capsys):
    assert compare(copies) == 0
    out, err = capsys.readouterr()
    assert out.count(": ok\n") == 4
    assert "4 of 4 models agree" in out
    expected = [line.split()[1:] for line in out.splitlines() if "  expected" in line]
    found = [line.split()[1:] for line in out.splitlines() if "  found" in line]
    assert expected == found
    assert [len(row) for row in expected] == [3 + 3, 9 + 2, 9 + 2, 9 + 2]  # with bars and a name
    assert "photo.png: not the file http" in err


def permute_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("value.weight"))
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change(name: str, **values):
    def edit(folder: Path) -> None:
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(settings | values))

    return edit


WRONG = {
    "a weight": ("registers", permute_a_weight),
    "mean": ("dinov2", change("preprocessor_config.json", image_mean=[0.5, 0.5, 0.5])),
    "std": ("dino", change("preprocessor_config.json", image_std=[0.48, 0.5, 0.5])),
    "filter": ("vit", change("preprocessor_config.json", resample=3)),
    "label": ("vit", change("config.json", id2label={str(i): f"other {i}" for i in range(7)})),
}


@pytest.mark.parametrize("name, damage", WRONG.values(), ids=WRONG)
def test_the_model_that_differs_is_named(copies, capsys, name, damage):
    damage(copies / name)
    assert compare(copies) == 1
    out = capsys.readouterr().out
    assert out.count(": ok\n") == 3
    assert f"FAILED: {copies / name}, in" in out.splitlines()[-1]


def test_a_copy_of_a_published_model_is_known_by_its_sizes(copies, capsys):
    (copies / "dinov2").rename(copies / "mine")
    assert compare(copies, "--model", str(copies / "mine")) == 0
    assert "1 of 1 models agree" in capsys.readouterr().out
    permute_a_weight(copies / "mine")
    assert compare(copies, "--model", str(copies / "mine")) == 1


def test_a_model_that_cannot_be_loaded_hides_no_difference(copies, capsys):
    shutil.rmtree(copies / "dino")
    assert compare(copies) == 2
    out, err = capsys.readouterr()
    assert "3 of 4 models agree" in out
    assert f"{copies / 'dino'}: " in err
    permute_a_weight(copies / "registers")
    assert compare(copies) == 1


def headless(folder: Path) -> list[str]:
    tensors = load_file(folder / "vit" / "model.safetensors")
    backbone = [name for name in tensors if name.startswith("vit.")]
    tensors = {name.removeprefix("vit."): tensors[name] for name in backbone}
    change("config.json", architectures=["ViTModel"])(folder / "vit")
    save_file(tensors, folder / "vit" / "model.safetensors", {"format": "pt"})
    return ["--model", str(folder / "vit")]


def of_another_size(folder: Path) -> list[str]:
    draw_photo(480, 640).save(folder / "tall.png")
    return ["--photo", str(folder / "tall.png")]


USER_ERRORS = {
    "a model of which nothing is published": (
        lambda folder: ["--model", "demo"],
        "demo: no numbers of this model are published; expected one of .*vit",
    ),
    "no classifier": (headless, "expected a copy of .*vit, found no classifier"),
    "another photo": (of_another_size, "of 640 x 480 pixels, found one of 480 x 640"),
    "no photo": (lambda folder: ["--photo", "absent.jpg"], "absent.jpg: no such photo"),
    "low precision": (lambda folder: ["--amp", "bf16"], "expected --amp off, found bf16"),
}


@pytest.mark.parametrize("prepare, message", USER_ERRORS.values(), ids=USER_ERRORS)
def test_what_the_user_can_mend_ends_with_2_and_one_line(copies, capsys, prepare, message):
    assert compare(copies, *prepare(copies)) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_photo_without_published_is_refused(copies, capsys):
    assert __main__.main(["selfcheck", "--photo", str(copies / "photo.png")]) == 2
    assert "--photo is the photo of --published" in capsys.readouterr().err


@pytest.fixture
def photo_server(copies, monkeypatch):
    """A server of the folder, from which the photo is downloaded; yields the requested paths."""
    requests = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            requests.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=copies))
    polling = {"poll_interval": 0.01}
    threading.Thread(target=server.serve_forever, kwargs=polling, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/photo.png"
    monkeypatch.setattr(published, "PHOTO_URL", url)
    digest = hashlib.sha256((copies / "photo.png").read_bytes()).hexdigest()
    monkeypatch.setattr(published, "PHOTO_SHA256", digest)
    monkeypatch.setenv("XDG_CACHE_HOME", str(copies / "cache"))
    yield requests
    server.shutdown()
    server.server_close()


def compare_downloaded(folder: Path) -> int:
    flags = ["--published", "--device", "cpu", "--model", str(folder / "vit")]
    return __main__.main(["selfcheck", *flags])


def test_the_photo_is_downloaded_once(copies, photo_server, capsys):
    for _ in range(2):
        assert compare_downloaded(copies) == 0
        assert capsys.readouterr().err == ""
    kept = copies / "cache" / "minivit" / "photo.png"
    assert photo_server == ["/photo.png"]
    kept.write_bytes(b"damaged")
    assert compare_downloaded(copies) == 0
    assert len(photo_server) == 2
    assert kept.read_bytes() == (copies / "photo.png").read_bytes()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda photo: photo.write_bytes(b"<html>log in"),
            "expected a file of SHA-256 .* 12 bytes",
        ),
        (Path.unlink, r"cannot download http.*photo.png \(HTTP Error 404.*give it with --photo"),
    ],
    ids=["another file", "no file"],
)
def test_a_photo_that_does_not_come_ends_with_2(copies, photo_server, capsys, spoil, message):
    spoil(copies / "photo.png")
    assert compare_downloaded(copies) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (copies / "cache").exists()


def test_without_a_network_the_photo_can_be_given(copies, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(copies / "cache"))
    with socket.socket() as taken:  # Nothing listens there.
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/photo.png"
        monkeypatch.setattr(published, "PHOTO_URL", url)
        assert compare_downloaded(copies) == 2
    assert "refuses the connection: nothing listens there); get" in capsys.readouterr().err


FROM_THE_HUB = """
import json, sys
from huggingface_hub import constants
from minivit import __main__
from minivit.tools.selfcheck import published
row = json.loads(sys.argv[1])
published.PUBLISHED = (published.Published(**row),)
for constants.HF_HUB_OFFLINE in (False, True):
    code = __main__.main(["selfcheck", "--published", "--device", "cpu", *sys.argv[2:]])
    print("exit code", code)
"""


def test_a_published_model_comes_from_the_hub_and_then_from_the_cache(small, tmp_path):
    folder, table = small
    row = json.dumps(asdict(replace(table[0], model="owner/tiny")))
    command = ["-c", FROM_THE_HUB, row, "--photo", str(folder / "photo.png")]
    with serve(folder / "vit") as hub:
        done = run_python(command, hub, tmp_path / "cache")
    assert done.stdout.count("1 of 1 models agree") == 2, done.stderr
    assert done.stdout.count("exit code 0") == 2
    assert hub.starts == [0]  # The weights were downloaded once, from their first byte on.
