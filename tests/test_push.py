"""Push a finished run to the Hub with its model card, and describe models and data sets."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import yaml
from checkpoints import fine_tune
from conftest import assert_one_line, run_python, run_train
from hub_server import COMMIT, TOKEN

from minivit import load_pretrained
from minivit.checkpoints import upload
from minivit.errors import UserError, printable
from minivit.tools import describe, export
from minivit.training import model_card as card
from minivit.training import publishing
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
    "settings": {
        "blocks": "10-11",
        "epochs": 5,
        "batch_size": 64,
        "lr": 1e-4,
        "head_lr": 1e-3,
        "seed": 0,
    },
}


def front_matter(text: str) -> dict:
    assert text.startswith("---\n")
    return yaml.safe_load(text.removeprefix("---\n").partition("\n---\n")[0])


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


HOSTILE = (
    "\N{CAT FACE}",
    "- no",
    "a: b",
    "\"x'y",
    "two\nlines\n---",
    "on",
    "{a}",
    "\x7f#",
    "%",
    "",
)


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_the_front_matter_is_yaml_whatever_the_names_are(name):
    from huggingface_hub import ModelCard

    summary = SUMMARY | {"classes": list(HOSTILE), "base": f"google/vit-{name}"}
    text = card.model_card(summary, [(name, "no", 3)], name=name, pets=False)
    front = front_matter(text)
    assert front["base_model"] == f"google/vit-{name}"
    assert front["model-index"][0]["name"] == printable(name)
    assert front["tags"] == ["vit", "minivit", "image-classification"]
    assert ModelCard(text).data.base_model == f"google/vit-{name}"


def test_the_card_of_a_local_base_claims_no_licence_and_tells_no_folders():
    text = card.model_card(
        SUMMARY | {"base": "google/vit-secret/vit", "base_commit": None}, name="run", pets=False
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


def test_a_run_is_pushed_with_its_card_and_without_photos_and_paths(hub, shapes_data, tmp_path):
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
    assert hub.repositories["owner/new"]  # It is private.
    said = next(line for line in done.stderr.splitlines() if line.startswith("owner/new: "))
    assert said.startswith("owner/new: a private repository, created just now. When the run is")
    listed, _, left_out = said.partition("Not uploaded:")
    assert all(name in listed for name in hub.uploaded)
    assert "predictions.png" in left_out
    assert sorted(hub.uploaded) == sorted(set(runs.RUN_FILES) - set(publishing.KEPT_HERE))
    for name, data in hub.uploaded.items():
        if name != "summary.json":
            assert data == (tmp_path / "run" / name).read_bytes(), name
        assert str(tmp_path.parent).encode() not in data
    summary = json.loads(hub.uploaded["summary.json"])
    assert (summary["base"], summary["base_commit"]) == ("owner/tiny", COMMIT)
    local = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert local["settings"]["data"] == str(shapes_data)
    assert summary["settings"] == local["settings"] | {"data": shapes_data.name, "out": "run"}
    assert front_matter(hub.card)["base_model"] == "owner/tiny"


@pytest.fixture
def no_hub(monkeypatch):
    """Keep uploads from the Hub: return what the functions of upload.py were called with."""
    calls = SimpleNamespace(checked=[], prepared=[], pushed=[], failure=None)

    def prepare(repo, *, public):
        calls.prepared.append((repo, public))
        return "a private repository, created just now"

    def push(repo, contents, *, folder):
        calls.pushed.append((repo, contents))
        if calls.failure is not None:
            raise calls.failure
        return f"https://hub/{repo}/commit/1"

    monkeypatch.setattr(upload, "check_login", lambda repo: calls.checked.append(repo))
    monkeypatch.setattr(upload, "prepare", prepare)
    monkeypatch.setattr(upload, "push", push)
    return calls


@pytest.mark.parametrize(
    "base, tail_base, commit, tail_leaves",
    [
        ("owner/tiny", None, COMMIT, True),
        ("demo", None, None, True),
        ("/home/me/base", None, None, False),
        ("/home/me/run/tail.safetensors", "owner/tiny", COMMIT, True),
        ("/home/me/run/tail.safetensors", "/home/me/base", None, False),
        ("/home/me/run/tail.safetensors", None, COMMIT, False),  # of an earlier version
    ],
)
def test_a_tail_is_uploaded_if_others_find_its_base(tmp_path, base, tail_base, commit, tail_leaves):
    (tmp_path / "tail.safetensors").write_bytes(b"")
    summary = {"base": base, "tail_base": tail_base, "base_commit": commit}
    summary["settings"] = {"model": base, "data": "/home/me/photos", "out": str(tmp_path)}
    contents = publishing.files_to_upload(tmp_path, summary)
    assert ("tail.safetensors" in contents) == tail_leaves
    assert b"/home/me" not in contents["summary.json"]
    assert str(tmp_path).encode() not in contents["summary.json"]


def as_bytes(content) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


@pytest.mark.usefixtures("no_figures")
def test_a_push_that_failed_is_made_up_for_by_resume(
    tiny_folder, shapes_data, tmp_path, no_hub, capsys
):
    """A local base stays here with the tail that needs it, and no local path leaves."""
    out = tmp_path / "run"
    flags = ("--epochs", "1", "--push-to-hub", "owner/new")
    no_hub.failure = UserError("refused")
    for resume in ((), ("--resume",)):
        assert run_train(tiny_folder, shapes_data, out, *flags, *resume) == 2
        printed = capsys.readouterr()
        assert printed.err.splitlines()[-1] == "python -m minivit train: refused"
        assert printed.out.splitlines()[-1].startswith("test accuracy")
    assert load_pretrained(out).labels == ("blue", "green", "red")
    no_hub.failure = None
    assert run_train(tiny_folder, shapes_data, out, *flags, "--resume") == 0
    printed = capsys.readouterr()
    assert "pushed: https://hub/owner/new/commit/1" in printed.err
    assert "Not uploaded: predictions.png, which shows photos; reference.safetensors" in printed.err
    assert printed.out.splitlines()[-1].startswith("test accuracy")
    _, contents = no_hub.pushed[-1]
    left_out = {"predictions.png", "reference.safetensors", "tail.safetensors"}
    assert contents.keys() == set(runs.RUN_FILES) - left_out
    for content in contents.values():
        assert str(tmp_path.parent).encode() not in as_bytes(content)
    summary = json.loads(contents["summary.json"])
    assert summary["base"] == summary["settings"]["model"] == "tiny"


@pytest.mark.usefixtures("no_figures")
def test_a_finished_run_is_pushed_by_resume_under_its_new_name(
    tiny_folder, shapes_data, tmp_path, no_hub
):
    out = tmp_path / "run"
    assert run_train(tiny_folder, shapes_data, out, "--epochs", "1") == 0
    assert "# run\n" in (out / "README.md").read_text()
    push = ("--epochs", "1", "--resume", "--public", "--push-to-hub")
    assert run_train(tiny_folder, shapes_data, out, *push, "owner/new") == 0
    assert no_hub.prepared == [("owner/new", True)]
    written = (out / "README.md").read_text()
    assert "# owner/new\n" in written
    assert as_bytes(no_hub.pushed[-1][1]["README.md"]).decode() == written
    (out / "README.md").write_text("mine")  # An edited card stays as it is.
    assert run_train(tiny_folder, shapes_data, out, *push, "owner/other") == 0
    assert as_bytes(no_hub.pushed[-1][1]["README.md"]) == b"mine"
    (out / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is not there any more, so nothing is"):
        publishing.publish(out, "owner/other")
    assert len(no_hub.pushed) == 2


def test_neither_a_dry_run_nor_a_failed_start_creates_a_repository(
    tiny_folder, shapes_data, tmp_path, no_hub, capsys
):
    out = tmp_path / "run"
    push = ("--push-to-hub", "owner/new", "--public")
    assert run_train(tiny_folder, shapes_data, out, "--dry-run", *push) == 0
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("owner/new: would be created as public if it does not exist. When")
    assert no_hub.checked == no_hub.prepared == no_hub.pushed == []
    assert not out.exists()
    # Nor does a run that cannot start.
    assert run_train(tiny_folder, tmp_path / "nothing", out, *push) == 2
    assert run_train(tmp_path / "nothing", shapes_data, out, *push) == 2
    assert no_hub.checked == ["owner/new"] * 2
    assert no_hub.prepared == no_hub.pushed == []
    capsys.readouterr()
    assert run_train(tiny_folder, shapes_data, out, "--public") == 2
    assert "--public is for --push-to-hub REPO" in capsys.readouterr().err


PUSH = """
import sys
from pathlib import Path
from minivit.errors import UserError
from minivit.checkpoints import upload
repo, folder = sys.argv[1:]
try:
    upload.check_login(repo)
    print(upload.prepare(repo, public=False), flush=True)
    upload.push(repo, {"config.json": Path(folder, "config.json")}, folder="runs/mine")
except UserError as error:
    sys.exit(str(error))
"""


def test_who_may_not_push_learns_why_and_how_to_go_on(hub, tiny_folder, tmp_path):
    token = {"HF_TOKEN": TOKEN}
    created = "a private repository, created just now\n"
    hub.repositories["owner/read"] = True
    for fault, repo, environment, parts, said in (
        ("", "owner/new", {}, ["`hf auth login` or HF_TOKEN", "nothing was trained"], ""),
        ("", "a/b/c", token, ["expected --push-to-hub owner/name"], ""),
        ("push 403", "owner/new", token, ["403", "a user who may write there"], ""),
        ("push 403", "owner/read", token, ["403", "a user who may write there"], ""),
        ("commit 500", "owner/full", token, ["it answers 500", "with --resume uploads"], created),
    ):
        hub.fault = fault
        done = run_python(["-c", PUSH, repo, tiny_folder], hub, tmp_path / "cache", **environment)
        assert_one_line(done, f"{repo}: ", *parts)
        assert done.stdout == said


VISIBILITY = """
import sys
from minivit.checkpoints import upload
for repo, public in (("new", False), ("shown", True), ("old", False), ("hidden", True)):
    print(upload.prepare(f"owner/{repo}", public=public))
"""


def test_a_repository_is_private_unless_asked_and_never_changed(hub, tmp_path):
    hub.repositories |= {"owner/old": False, "owner/hidden": True}
    done = run_python(["-c", VISIBILITY], hub, tmp_path / "cache", HF_TOKEN=TOKEN)
    kept = "which exists and is left as it is"
    warning = ": everybody can read what is uploaded"
    assert done.stdout.splitlines() == [
        "a private repository, created just now",
        f"a public repository, created just now{warning}",
        f"a public repository, {kept}{warning}",
        f"a private repository, {kept}",
    ], done.stderr
    private = {"owner/new": True, "owner/shown": False, "owner/old": False, "owner/hidden": True}
    assert hub.repositories == {"owner/tiny": False} | private


@pytest.mark.usefixtures("no_figures")
def test_a_refused_push_trains_nothing(
    tiny_folder, shapes_data, tmp_path, monkeypatch, no_hub, capsys
):
    def refuse(*_, **__):
        raise UserError("refused")

    push = ("--push-to-hub", "owner/new")
    for name in ("prepare", "check_login"):
        monkeypatch.setattr(upload, name, refuse)
        assert run_train(tiny_folder, shapes_data, tmp_path / "run", *push) == 2
        printed = capsys.readouterr()
        assert printed.err.splitlines()[-1] == "python -m minivit train: refused"
        assert not (tmp_path / "run").exists()
    assert printed.out == ""  # Nobody was logged in, so nothing was loaded.


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
