"""Broken checkpoints never give a traceback or a model, but one line that names the problem."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import google_npz
from conftest import ROOT, TINY, randomize
from safetensors.torch import load_file, save_file

import infer
from minivit import Preprocess, ViT, load_pretrained, save_pretrained
from minivit.errors import UserError, printable

NUM_CORRUPTIONS = 200
HOSTILE = ["\x1b[31mred", "line\nline", "\ud800", "a" * 10_000, "", "\u202egnp.tac", "../../etc"]


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> Path:
    """One model in three formats: safetensors and pickle in folders, npz a file."""
    folder = tmp_path_factory.mktemp("valid")
    model = randomize(
        ViT(TINY.__class__(**{**vars(TINY), "depth": 2, "embed_dim": 192, "mlp_dim": 768}))
    )
    model.labels, model.preprocess = tuple(f"thing {i}" for i in range(5)), Preprocess((32, 32))
    for name in ("safetensors", "bin"):
        (folder / name).mkdir()
        save_pretrained(model, folder / name)
    tensors = load_file(folder / "bin" / "model.safetensors")
    torch.save(tensors, folder / "bin" / "pytorch_model.bin")
    (folder / "bin" / "model.safetensors").unlink()
    (folder / "npz").mkdir()
    np.savez(folder / "npz" / "ViT.npz", **google_npz(tensors, num_heads=3))
    for path in (folder / "safetensors", folder / "bin", folder / "npz" / "ViT.npz"):
        assert load_pretrained(path).labels  # valid, before it is broken
    return folder


def edit_header(path: Path, change) -> None:
    """Rewrite a safetensors file's header: change gets the JSON's text and returns another."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = change(data[8 : 8 + length].decode()).encode("utf-8", "surrogatepass")
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def edit_tensors(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def truncate(path, rng):
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def flip_header_bits(path, rng):
    data = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(data[:8], "little")
    while True:
        i = rng.randrange(end)
        if data[i] != ord(" "):  # those pad the header's end: a flip there may change nothing
            break
    data[i] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def lie_about_header_length(path, rng):
    data = path.read_bytes()
    path.write_bytes(
        rng.choice([2**63, 2**64 - 1, 10**9, 10**8 - 9, 0, 1]).to_bytes(8, "little") + data[8:]
    )


def change_dtype(path, rng):
    def change(tensors):
        name = rng.choice(sorted(tensors))
        tensors[name] = tensors[name].to(
            rng.choice([torch.int32, torch.int8, torch.bool, torch.complex64])
        )

    edit_tensors(path, change)


def swap_shapes(path, rng):
    def change(tensors):
        name = rng.choice(
            sorted(n for n, t in tensors.items() if t.ndim == 2 and t.shape[0] != t.shape[1])
        )
        tensors[name] = tensors[name].T.contiguous()

    edit_tensors(path, change)


def delete_a_key(path, rng):
    edit_tensors(path, lambda tensors: tensors.pop(rng.choice(sorted(tensors))))


def double_a_key(path, rng):
    def change(tensors):
        name = rng.choice(sorted(tensors))
        tensors[f"{name}.{rng.choice(['weight', '_copy', '0'])}"] = tensors[name].clone()

    edit_tensors(path, change)


def write_a_key_twice(path, rng):
    def change(text):
        name, value = rng.choice(
            sorted((k, v) for k, v in json.loads(text).items() if k != "__metadata__")
        )
        return text.rstrip()[:-1] + f",{json.dumps(name)}:{json.dumps(value)}}}"

    edit_header(path, change)


def put_in_nan(path, rng):
    def change(tensors):
        tensors[rng.choice(sorted(tensors))].view(-1)[-1] = rng.choice(
            [float("nan"), float("inf"), -float("inf")]
        )

    edit_tensors(path, change)


def name_not_utf8(path, rng):
    data = path.read_bytes()
    at = data.index(b"vit.")
    path.write_bytes(data[:at] + bytes([0xFF, 0xFE, 0xC3, 0x28]) + data[at + 4 :])


def edit_config(path, change) -> None:
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


WRONG = [None, -1, 0, 1.5, 10**30, "12", [], {}, True, float("nan")]


def break_a_size(path, rng):
    sizes = [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "patch_size",
        "image_size",
    ]
    edit_config(
        path.parent / "config.json", lambda c: c.update({rng.choice(sizes): rng.choice(WRONG)})
    )


def break_another_setting(path, rng):
    key, values = rng.choice(
        [
            ("layer_norm_eps", [None, -1, 0, 2, "1e-6", float("nan")]),
            ("architectures", [["SwinModel"], "ViTModel", ["ViTModel"], 7]),
            ("hidden_act", ["relu", None, 3]),
            ("id2label", [[1], {"a": "b"}, {"0": "x", "2": "y"}, {"0": "only"}, 7]),
            ("qkv_bias", [False]),
            ("num_channels", [1, 4]),
        ]
    )
    edit_config(path.parent / "config.json", lambda c: c.update({key: rng.choice(values)}))


def drop_a_setting(path, rng):
    # transformers' defaults take the place of those that are sizes, and do not fit.
    needed = ("hidden_size", "num_hidden_layers", "intermediate_size", "patch_size", "model_type")
    edit_config(path.parent / "config.json", lambda c: c.pop(rng.choice(needed)))


def config_of_another_family(path, rng):
    kind, family = rng.choice(
        [("Dinov2", "dinov2"), ("Dinov2WithRegisters", "dinov2_with_registers"), ("Swin", "swin")]
    )
    change = {
        "model_type": family,
        "architectures": [f"{kind}ForImageClassification"],
        "mlp_ratio": 4,
    }
    edit_config(
        path.parent / "config.json", lambda c: c.update(change | {"num_register_tokens": 4})
    )


def break_preprocessing(path, rng):
    key, values = rng.choice(
        [
            ("size", [0, -5, "224", {"height": 32}, {"shortest_edge": "x"}, [32], None]),
            ("image_mean", [[0.5], "half", None, [0.5, 0.5, float("nan")]]),
            ("image_std", [[0, 0, 0], [0.5] * 4, -1]),
            ("resample", [9, "bicubic", None, []]),
            ("do_resize", [False, None]),
            ("rescale_factor", [0, "x", None]),
            ("image_processor_type", ["SwinImageProcessor", 7, []]),
        ]
    )
    edit_config(
        path.parent / "preprocessor_config.json", lambda c: c.update({key: rng.choice(values)})
    )


def config_that_is_no_object(path, rng):
    text = rng.choice(
        ["", "[]", "null", "{", '{"a":' * 100_000, "\x00", '{"model_type": 1e999}', "[" * 200_000]
    )
    (path.parent / rng.choice(["config.json", "preprocessor_config.json"])).write_text(text)


def not_utf8(path, rng):
    path = path.parent / rng.choice(["config.json", "preprocessor_config.json"])
    path.write_bytes(path.read_bytes().replace(b"{", b"{\xff\xfe", 1))


def loop_of_links(path, rng):
    path = rng.choice([path, path.parent / "config.json"])
    path.unlink()
    path.symlink_to(path.name)


def a_folder_in_its_place(path, rng):
    path.unlink()
    path.mkdir()


def empty(path, rng):
    path.write_bytes(b"")


def noise(path, rng):
    path.write_bytes(rng.randbytes(rng.randrange(1, 5000)))


OF_ANY = [truncate, loop_of_links, a_folder_in_its_place, empty, noise]
OF_CONFIGS = [
    break_a_size,
    break_another_setting,
    drop_a_setting,
    config_of_another_family,
    break_preprocessing,
]
OF_CONFIGS += [config_that_is_no_object, not_utf8]
OF_SAFETENSORS = [
    flip_header_bits,
    lie_about_header_length,
    change_dtype,
    swap_shapes,
    delete_a_key,
    double_a_key,
]
OF_SAFETENSORS += [write_a_key_twice, put_in_nan, name_not_utf8]


@pytest.mark.parametrize("seed", range(NUM_CORRUPTIONS))
def test_no_corruption_gives_a_model_or_a_traceback(seed, valid, tmp_path):
    rng = random.Random(seed)
    kind = rng.choice(["safetensors"] * 4 + ["bin", "npz"])
    folder = shutil.copytree(valid / kind, tmp_path / "model")
    path = (
        folder
        / {"safetensors": "model.safetensors", "bin": "pytorch_model.bin", "npz": "ViT.npz"}[kind]
    )
    kinds = OF_ANY[: 1 if kind == "npz" else None] if kind == "npz" else OF_ANY + OF_CONFIGS
    corrupt = rng.choice(kinds + (OF_SAFETENSORS * 2 if kind == "safetensors" else []))
    corrupt(path, rng)
    with pytest.raises(UserError) as error:
        load_pretrained(path if kind == "npz" else folder)
    assert len(printable(error.value).splitlines()) == 1
    assert len(str(error.value)) < 2000
    assert "model" in str(error.value)  # which file or folder


def test_a_hostile_label_is_a_name_like_another(valid, tmp_path, photos, capsys):
    folder = shutil.copytree(valid / "safetensors", tmp_path / "model")
    edit_config(
        folder / "config.json",
        lambda c: c["id2label"].update({str(i): label for i, label in enumerate(HOSTILE)}),
    )
    edit_tensors(folder / "model.safetensors", lambda t: t.update(head_of(len(HOSTILE))))
    assert load_pretrained(folder).labels == tuple(HOSTILE)
    flags = [
        "--model",
        str(folder),
        "--layers",
        "1",
        "--top-k",
        "9",
        "--out",
        str(tmp_path / "out"),
    ]
    assert infer.main([str(photos[0]), *flags]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1 + len(HOSTILE) + 1
    assert "\x1b" not in out + err


def head_of(n: int) -> dict[str, torch.Tensor]:
    return {"classifier.weight": torch.randn(n, 192), "classifier.bias": torch.zeros(n)}


PEAK = """
import sys, torch
from minivit import load_pretrained
from minivit.errors import UserError
def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
load_pretrained("demo")
before = peak()
for folder in sys.argv[1:]:
    try: load_pretrained(folder); print("loaded")
    except UserError as error: print(error, file=sys.stderr)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_a_broken_file_takes_less_than_twice_its_size_in_memory(tmp_path):
    config = TINY.__class__(**{**vars(TINY), "depth": 2, "embed_dim": 768, "mlp_dim": 3072})
    model = randomize(ViT(config))
    model.labels, model.preprocess = tuple("abcde"), Preprocess((32, 32))
    folders = []
    for corrupt in (truncate, delete_a_key, put_in_nan, lie_about_header_length, change_dtype):
        folders.append(tmp_path / corrupt.__name__)
        folders[-1].mkdir()
        save_pretrained(model, folders[-1])
        size = (folders[-1] / "model.safetensors").stat().st_size
        corrupt(folders[-1] / "model.safetensors", random.Random(0))
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, folders)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.stderr.count("\n") == len(folders), done.stderr
    assert size > 50e6
    assert int(done.stdout) < 2 * size
