"""Each command in the README is one that minivit takes, and runs; its ten lines of Python run in test_commands.py."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from minivit import __main__, cli
from minivit.tools.demo.drawings import draw_pets

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
STANDS_FOR = {
    "AMP": "off",
    "SEED": "0",
    "BLOCKS": "10-11",
    "Bengal": "Siamese",
}  # a breed that is drawn
FENCED = re.compile(r"(?s)```\w*\n(.*?)```")
CODE = [line for block in FENCED.findall(TEXT) for line in block.splitlines()]
CODE += [re.sub(r"\s+", " ", code) for code in re.findall(r"`([^`]+)`", FENCED.sub("", TEXT))]


def commands() -> dict[str, str]:
    """Find what is given to train, infer and python -m minivit, and the line that gives it."""
    found = {}
    for code in CODE:
        if match := re.search(
            r"(?:python |torchrun .*)(?:-m minivit (\w+)|(train|infer)\.py)(.*)", code
        ):
            command, script, flags = match.groups()
            if (command or script) in __main__.COMMANDS and "--help" not in flags:
                found[f"{command or script}{flags.partition('#')[0].partition(' > ')[0]}"] = code[
                    match.start() :
                ]
    return found


@pytest.mark.parametrize("command", sorted(commands()))
def test_each_command_is_one_that_minivit_takes(command, monkeypatch):
    monkeypatch.setattr(cli, "run", lambda job, parser, argv: parser.parse_args(argv) and 0)
    name, *flags = [STANDS_FOR.get(word, word) for word in shlex.split(command)]
    needed = (
        ["photo"]
        if name == "infer" and not any(not flag.startswith("-") for flag in flags[:1])
        else []
    )
    assert __main__.main([name, *needed, *flags]) == 0


@pytest.mark.slow
def test_each_command_runs(tmp_path):
    """As it stands there, in a folder where what it names is: the demo's checkpoint, and a few drawings as photos."""
    draw_pets(tmp_path / "data", per_breed=(5, 2), seed=0, workers=2)
    images, model = (
        tmp_path / "data" / "oxford-iiit-pet" / "images",
        ROOT / "minivit" / "checkpoints" / "demo_model",
    )
    (tmp_path / "photos").mkdir()
    for photo in sorted(images.glob("*.jpg"))[::20]:
        (tmp_path / "photos" / photo.name).symlink_to(photo)
    places = {
        "cat.jpg": next(images.glob("*.jpg")),
        "train.py": ROOT / "train.py",
        "infer.py": ROOT / "infer.py",
    }
    places |= dict.fromkeys(
        ("google/vit-base-patch16-224", "path/to/vit-base-patch16-224", "DINO_FOLDER", "MODEL"),
        model,
    )
    places |= dict.fromkeys(
        ("path/to/pets", "pets3", "DIR", "FOLDER", "runs/demo/drawings"), tmp_path / "data"
    )
    places |= {"runs/demo/run": tmp_path / "runs" / "pets"}  # not there before it is trained
    for name, there in places.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(there)
    environ = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    lines = {line for name, line in commands().items() if name != "demo"}  # which test_demo.py runs
    for line in sorted(
        lines, key=lambda line: ("train.py" not in line, line)
    ):  # what trains leaves runs/pets for the others
        line = re.sub(r"--nproc-per-node 8", "--nproc-per-node 1", line).replace(
            "HOST", "127.0.0.1"
        )
        line = " ".join(STANDS_FOR.get(word, word) for word in line.split(" ") if word)
        both = (
            f"{line} --out runs/other & {line}; code=$?; wait; exit $code"
            if "--nnodes 2" in line
            else line
        )
        print(f"$ {both}", flush=True)
        assert (
            subprocess.run(["bash", "-c", both], cwd=tmp_path, env=environ, timeout=600).returncode
            == 0
        ), line


def test_the_readme_names_every_command_flag_and_target_as_it_is():
    targets = set(re.findall(r"(?m)^([a-z]+):.*##", (ROOT / "Makefile").read_text()))
    assert {code.split()[1] for code in CODE if re.match(r"make [a-z]+", code)} <= targets
    for name in __main__.COMMANDS:
        assert f"python -m minivit {name}" in TEXT or f"python {name}.py" in TEXT, name
    for path in re.findall(
        r"`((?:tests|benchmarks|docs|minivit)/[\w./]+)`|\]\(((?:docs|benchmarks)/[\w./]+)\)", TEXT
    ):
        assert (ROOT / "".join(path)).exists(), path
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    for name in re.findall(r"`(test_\w+)`", TEXT):
        assert f"def {name}(" in sources, name
