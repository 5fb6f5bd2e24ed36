"""A finished run goes up to the Hub with its card; and what describe says of models and data."""

from __future__ import annotations

import json

import pytest
import yaml
from hub_server import COMMIT, TOKEN, serve
from test_hub import run_python

import train
from minivit import card, describe, load_pretrained

TRAIN = ["train.py", "--epochs", "1", "--device", "cpu", "--amp", "off", "--workers", "1"]
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
    for part in (COMMIT, "14,205,733 of 86,567,656", "Blocks 10-11", "## Limits", "## Licence", "curves.png", "confusion.png"):
        assert part in text
    assert (card.PETS in text) == ("CC BY-SA 4.0" in text) == pets


def test_the_card_of_a_local_base_claims_no_licence_and_tells_no_folders():
    text = card.model_card(SUMMARY | {"base": "/home/me/secret/vit", "base_commit": None}, name="run", pets=False)
    assert front_matter(text)["license"] == "other"
    assert "base_model" not in front_matter(text)
    assert "secret" not in text


def test_hub_reads_the_card_as_it_is_meant():
    from huggingface_hub import ModelCard

    results = ModelCard(card.model_card(SUMMARY, name="me/cats", pets=True)).data.eval_results
    assert {r.metric_name: r.metric_value for r in results}["accuracy"] == 0.9


@pytest.fixture
def hub(tiny_folder):
    with serve(tiny_folder) as state:
        yield state


def test_a_run_is_pushed_with_its_card_and_what_was_recorded(hub, shapes_data, tmp_path):
    args = [*TRAIN, "--model", "owner/tiny", "--data", str(shapes_data), "--out", str(tmp_path / "run")]
    done = run_python([*args, "--push-to-hub", "owner/new"], hub, tmp_path / "cache", HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert f"pushed: {hub.url}/owner/new/commit/{COMMIT}" in done.stderr
    assert done.stdout.splitlines()[-1].startswith("test accuracy")
    assert sorted(hub.uploaded) == sorted(train.RUN_FILES)
    for name, data in hub.uploaded.items():
        assert data == (tmp_path / "run" / name).read_bytes(), name
    summary = json.loads(hub.uploaded["summary.json"])
    assert (summary["base"], summary["base_commit"]) == ("owner/tiny", COMMIT)
    assert front_matter(hub.card)["base_model"] == "owner/tiny"
    tail = run_python(["-c", FROM_TAIL, str(tmp_path / "run")], hub, tmp_path / "elsewhere")  # the base is fetched again
    assert tail.stdout == "True\n", tail.stderr


FROM_TAIL = """
import sys, torch
from minivit import load_pretrained
tail, whole = load_pretrained(sys.argv[1] + "/tail.safetensors"), load_pretrained(sys.argv[1])
assert tail.origin.commit
images = torch.randn(2, 3, 32, 32)
print(torch.equal(tail(images), whole(images)))
"""


def test_who_may_not_push_learns_it_before_training(hub, shapes_data, tmp_path):
    args = [*TRAIN, "--model", "owner/tiny", "--data", str(shapes_data), "--out", str(tmp_path / "run")]
    for repo, environment in (("owner/new", {}), ("a/b/c", {"HF_TOKEN": TOKEN})):
        done = run_python([*args, "--push-to-hub", repo], hub, tmp_path / "cache", **environment)
        assert done.returncode == 2
        assert f"{repo}: cannot push to {hub.url}" in done.stderr.splitlines()[-1]
        assert ("hf auth login" if repo == "owner/new" else "owner/name") in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_push_that_fails_leaves_the_run_and_says_how_to_go_on(hub, shapes_data, tmp_path):
    hub.fault = "commit 500"
    args = [*TRAIN, "--model", "owner/tiny", "--data", str(shapes_data), "--out", str(tmp_path / "run")]
    hub.fault = "commit 500"
    done = run_python([*args, "--push-to-hub", "owner/new"], hub, tmp_path / "cache", HF_TOKEN=TOKEN)
    assert done.returncode == 2
    assert "hf upload owner/new" in done.stderr.splitlines()[-1]
    assert load_pretrained(tmp_path / "run").labels == ("blue", "green", "red")


def described(capsys, *args) -> str:
    assert describe.main(list(args)) == 0
    return capsys.readouterr().out


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
    said = described(capsys, str(vit_b16))
    assert "86,567,656" in said
    assert "14,946,280 with blocks 10-11, norm and head" in said  # with its own head of 1,000, not 37


def test_describe_tells_files_by_their_tensors(tiny_folder, tmp_path, capsys):
    from test_export import fine_tune

    fine_tune(tiny_folder, tmp_path / "run")
    assert "3: Abyssinian, boxer, Egyptian Mau" in described(capsys, str(tmp_path / "run" / "tail.safetensors"))


def test_describe_tells_a_data_set(shapes_data, capsys):
    said = described(capsys, "demo", "--data", str(shapes_data))
    rows = {line[:18].strip(): line[19:] for line in said.splitlines()}
    assert rows["photos"].startswith("33 training, 3 validation, 12 test")
    assert rows["width"].startswith("50 to 50 pixels, median 50")
    assert rows["formats"].startswith("48 PNG")
    assert rows["licence"] == "not stated in class folders"
    assert rows["red"].split() == ["11", "1", "4"]


def test_describe_tells_pets_cats_from_dogs(pets3, capsys):
    rows = {line[:18].strip(): line[19:] for line in described(capsys, "demo", "--data", str(pets3)).splitlines()}
    assert rows["cats and dogs"].startswith("398 cats, 200 dogs")
    assert rows["licence"].startswith("CC BY-SA 4.0")


def test_describe_refuses_what_is_not_there(tmp_path, capsys):
    assert describe.main(["demo", "--data", str(tmp_path)]) == 2
    assert "no data here to describe" in capsys.readouterr().err
    assert describe.main([str(tmp_path)]) == 2
    assert "no config.json in this folder" in capsys.readouterr().err
