"""Push a finished run to the Hub with its model card, and describe models and data sets."""

from __future__ import annotations

import json

import pytest
import yaml
from checkpoints import fine_tune
from conftest import assert_one_line, run_python, run_train
from hub_server import COMMIT, TOKEN

from minivit import load_pretrained
from minivit.errors import UserError
from minivit.tools import describe, export
from minivit.training import model_card as card
from minivit.training import run_folder as runs

SUMMARY = {
    "base": "google/vit-base-patch16-224",
    "base_commit": COMMIT,
    "classes": ["Abyssinian", 'a "quoted": name'],
    "test_accuracy": 0.9,
    "test_macro_f1": 0.8,
    "test_precision": 0.7,
    "test_recall": 0.6,
    "test_photos": 298,
    "best_epoch": 4,
    "trainable_parameters": 14_205_733,
    "total_parameters": 86_567_656,
    "verdict": "no overfitting: so far",
    "seconds": 61.2,
    "device": "cpu",
    "precision": "float32",
    "settings": {"blocks": "10-11", "epochs": 5, "batch_size": 64, "lr": 1e-4, "seed": 0},
}


def front_matter(text: str) -> dict:
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


@pytest.mark.parametrize("pets", [True, False], ids=["pets", "class-folders"])
def test_the_card_says_what_is_in_the_summary(pets):
    text = card.model_card(SUMMARY, name='me/a "b": c', pets=pets)
    front = front_matter(text)
    (entry,) = front["model-index"]
    (result,) = entry["results"]
    assert entry["name"] == 'me/a "b": c'
    assert {m["name"]: m["value"] for m in result["metrics"]} == {
        "accuracy": 0.9,
        "macro_f1": 0.8,
        "precision": 0.7,
        "recall": 0.6,
    }
    assert result["dataset"]["name"] == ("Oxford-IIIT Pet" if pets else "photos in class folders")
    assert (front["base_model"], front["license"]) == ("google/vit-base-patch16-224", "apache-2.0")
    for part in (
        COMMIT,
        "14,205,733 of 86,567,656",
        "Blocks 10-11",
        "## Limits",
        "## Licence",
        "curves.png",
        "confusion.png",
    ):
        assert part in text
    assert (card.PETS in text) == ("CC BY-SA 4.0" in text) == pets


def test_the_card_of_a_local_base_claims_no_licence_and_tells_no_folders():
    text = card.model_card(
        SUMMARY | {"base": "/home/me/secret/vit", "base_commit": None}, name="run", pets=False
    )
    assert front_matter(text)["license"] == "other"
    assert "base_model" not in front_matter(text)
    assert "secret" not in text


def test_hub_reads_the_card_as_it_is_meant():
    from huggingface_hub import ModelCard

    results = ModelCard(card.model_card(SUMMARY, name="me/cats", pets=True)).data.eval_results
    assert {r.metric_name: r.metric_value for r in results}["accuracy"] == 0.9


TRAIN = """
import shutil, sys, torch, train
from minivit import load_pretrained
cache, out, *flags = sys.argv[1:]
flags += ["--epochs", "1", "--device", "cpu", "--amp", "off", "--workers", "1"]
code = train.main([*flags, "--out", out])
if code: sys.exit(code)
shutil.rmtree(cache)  # so the tail's base is fetched again
tail, whole = load_pretrained(out + "/tail.safetensors"), load_pretrained(out)
assert tail.origin.commit
images = torch.randn(2, 3, 32, 32)
assert torch.equal(tail(images), whole(images))
"""


def test_a_run_is_pushed_with_its_card_and_what_was_recorded(hub, shapes_data, tmp_path):
    args = [
        "-c",
        TRAIN,
        tmp_path / "cache",
        tmp_path / "run",
        "--model",
        "owner/tiny",
        "--data",
        shapes_data,
    ]
    done = run_python(
        [*args, "--push-to-hub", "owner/new"], hub, tmp_path / "cache", HF_TOKEN=TOKEN
    )
    assert done.returncode == 0, done.stderr
    assert f"pushed: {hub.url}/owner/new/commit/{COMMIT}" in done.stderr
    assert done.stdout.splitlines()[-1].startswith("test accuracy")
    assert sorted(hub.uploaded) == sorted(runs.RUN_FILES)
    for name, data in hub.uploaded.items():
        assert data == (tmp_path / "run" / name).read_bytes(), name
    summary = json.loads(hub.uploaded["summary.json"])
    assert (summary["base"], summary["base_commit"]) == ("owner/tiny", COMMIT)
    assert front_matter(hub.card)["base_model"] == "owner/tiny"


PUSH = """
import sys
from pathlib import Path
from minivit.errors import UserError
from minivit.checkpoints.hub import prepare_push, push
repo, folder = sys.argv[1:]
try:
    prepare_push(repo)
    print("may", flush=True)
    push(Path(folder), repo, ["config.json"])
except UserError as error:
    sys.exit(str(error))
"""


def test_who_may_not_push_learns_why_and_how_to_go_on(hub, tiny_folder, tmp_path):
    refused = {
        "owner/new": ({}, "hf auth login", ""),
        "a/b/c": ({"HF_TOKEN": TOKEN}, "owner/name", ""),
        "owner/full": (
            {"HF_TOKEN": TOKEN},
            "try again, or later with `hf upload owner/full",
            "may\n",
        ),
    }
    hub.fault = "commit 500"
    for repo, (environment, advice, may) in refused.items():
        done = run_python(["-c", PUSH, repo, tiny_folder], hub, tmp_path / "cache", **environment)
        assert_one_line(done, f"{repo}: cannot push to {hub.url}", advice)
        assert done.stdout == may


@pytest.mark.usefixtures("no_figures")
def test_a_refused_push_trains_nothing_and_a_failed_one_leaves_the_run(
    tiny_folder, shapes_data, tmp_path, monkeypatch, capsys
):
    def refuse(*_):
        raise UserError("refused")

    for done, (first, last) in enumerate([(refuse, None), (lambda repo: None, refuse)]):
        monkeypatch.setattr("minivit.checkpoints.hub.prepare_push", first)
        monkeypatch.setattr("minivit.checkpoints.hub.push", last)
        assert (
            run_train(
                tiny_folder,
                shapes_data,
                tmp_path / "run",
                "--epochs",
                "1",
                "--push-to-hub",
                "owner/new",
            )
            == 2
        )
        assert capsys.readouterr().err.splitlines()[-1] == "python -m minivit train: refused"
        assert (tmp_path / "run" / "summary.json").exists() == done
    assert load_pretrained(tmp_path / "run").labels == ("blue", "green", "red")


def described(capsys, *args) -> str:
    assert describe.main(list(args)) == 0
    return capsys.readouterr().out


def described_rows(capsys, *args) -> dict[str, str]:
    lines = described(capsys, *args).splitlines()
    return {line[:18].strip(): line[19:] for line in lines}


def test_describe_tells_a_model_by_its_config_alone(hub, tmp_path, tiny_folder):
    done = run_python(["-m", "minivit", "describe", "owner/tiny"], hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"commit {COMMIT}" in done.stdout
    assert not any("model.safetensors" in path for _, path in hub.requests)
    model = load_pretrained(tiny_folder)
    assert f"{sum(p.numel() for p in model.parameters()):,}" in done.stdout
    for fact in (
        "12 of 3 heads, 24 wide, MLP 48",
        "32 x 32 pixels: 4 x 4 patches of 8",
        "mean 0.5, 0.5, 0.5",
        "5: thing 0, thing 1",
    ):
        assert fact in done.stdout


def test_describe_counts_google_vits_parameters_and_those_that_train(vit_b16, capsys):
    description = described(capsys, str(vit_b16))
    assert "86,567,656" in description
    # This counts the checkpoint's head of 1,000 classes, not one of 37.
    assert "14,946,280 with blocks 10-11, norm and head" in description


def test_describe_tells_files_by_their_tensors(tiny_folder, tmp_path, capsys):
    fine_tune(tiny_folder, tmp_path / "run")
    assert "3: Abyssinian, boxer, Egyptian Mau" in described(
        capsys, str(tmp_path / "run" / "tail.safetensors")
    )


def test_describe_says_which_of_a_folders_files_it_has_a_fact_from(tiny_folder, tmp_path, capsys):
    assert export.main([str(tiny_folder), "--to", "timm", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    for folder, source in ((tiny_folder, "preprocessor_config.json"), (tmp_path, "config.json")):
        rows = described_rows(capsys, str(folder))
        assert rows["resizing"].endswith(f"; bilinear  ({source})")
        assert rows["blocks"].endswith("MLP 48  (config.json)")


def test_describe_tells_a_data_set(shapes_data, capsys):
    rows = described_rows(capsys, "demo", "--data", str(shapes_data))
    assert rows["photos"].startswith("33 training, 3 validation, 12 test")
    assert rows["width"].startswith("50 to 50 pixels, median 50")
    assert rows["formats"].startswith("48 PNG")
    assert rows["licence"] == "not stated in class folders"
    assert rows["red"].split() == ["11", "1", "4"]


def test_describe_tells_pets_cats_from_dogs(pets3, capsys):
    rows = described_rows(capsys, "demo", "--data", str(pets3))
    assert rows["cats and dogs"].startswith("398 cats, 200 dogs")
    assert rows["licence"].startswith("CC BY-SA 4.0")


def test_describe_refuses_what_is_not_there(tmp_path, capsys):
    assert describe.main(["demo", "--data", str(tmp_path)]) == 2
    assert "expected oxford-iiit-pet/" in capsys.readouterr().err
    assert describe.main([str(tmp_path)]) == 2
    assert "no config.json in this folder" in capsys.readouterr().err
