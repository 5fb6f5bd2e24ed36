"""Each command in the README is one that minivit takes, and it runs.

The README's Python example runs in test_commands.py.
"""

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
# Values for the README's placeholders. The demo draws no Bengal cats, but it draws Siamese ones.
STANDS_FOR = {
    "AMP": "off",
    "SEED": "0",
    "BLOCKS": "10-11",
    "Bengal": "Siamese",
}
FENCED = re.compile(r"(?s)```\w*\n(.*?)```")
CODE = [line for block in FENCED.findall(TEXT) for line in block.splitlines()]
CODE += [re.sub(r"\s+", " ", code) for code in re.findall(r"`([^`]+)`", FENCED.sub("", TEXT))]


COMMAND = re.compile(r"(?:python |torchrun .*)(?:-m minivit (\w+)|(train|infer)\.py)(.*)")


def commands() -> dict[str, str]:
    """Map each command of the README and its flags to the line that runs it."""
    lines = {}
    for code in CODE:
        match = COMMAND.search(code)
        if match is None:
            continue
        command, script, flags = match.groups()
        name = command or script
        if name in __main__.COMMANDS and "--help" not in flags:
            flags = flags.partition("#")[0].partition(" > ")[0]
            lines[f"{name}{flags}"] = code[match.start() :]
    return lines


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
    """Each command runs as written, in a folder that holds all files and folders it names.

    Their place is taken by the demo's checkpoint and a few drawings.
    """
    draw_pets(tmp_path / "data", per_breed=(5, 2), seed=0, workers=2)
    images = tmp_path / "data" / "oxford-iiit-pet" / "images"
    model = ROOT / "minivit" / "checkpoints" / "demo_model"
    for name, breed in (("cat", "Siamese"), ("dog", "Husky")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for photo in images.glob(f"{breed}_*.jpg"):
            (tmp_path / "photos" / name / photo.name).symlink_to(photo)
    places = {
        "cat.jpg": next(images.glob("*.jpg")),
        "PHOTO": next(images.glob("*.jpg")),
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
    # The first command that trains writes this folder.
    places |= dict.fromkeys(("runs/demo/run", "RUN"), tmp_path / "runs" / "pets")
    for name, target in places.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(target)
    environ = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    # test_demo.py runs the demo. Training comes first: it writes runs/pets for the others.
    lines = {line for name, line in commands().items() if name != "demo"}
    for line in sorted(lines, key=lambda line: ("train.py" not in line, line)):
        line = re.sub(r"--nproc-per-node 8", "--nproc-per-node 1", line).replace(
            "HOST", "127.0.0.1"
        )
        line = " ".join(STANDS_FOR.get(word, word) for word in line.split(" ") if word)
        if "--nnodes 2" in line:
            line = f"{line} --out runs/other & {line}; code=$?; wait; exit $code"
        print(f"$ {line}", flush=True)
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environ, timeout=600)
        assert done.returncode == 0, line


def test_the_readme_names_every_command_flag_and_target_as_it_is():
    targets = set(re.findall(r"(?m)^([a-z]+):.*##", (ROOT / "Makefile").read_text()))
    assert {code.split()[1] for code in CODE if re.match(r"make [a-z]+", code)} <= targets
    for name in __main__.COMMANDS:
        assert f"python -m minivit {name}" in TEXT or f"python {name}.py" in TEXT, name
    for path in re.findall(
        r"`((?:tests|benchmarks|docs|minivit)/[\w./]+)`|\]\(((?:docs|benchmarks)/[\w./]+)\)", TEXT
    ):
        assert (ROOT / "".join(path)).exists(), path


def test_every_test_that_a_document_names_exists():
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        # Shorter names, such as test_accuracy, are keys of summary.json.
        for name in re.findall(r"`(test(?:_[a-z0-9]+){3,})`", path.read_text(encoding="utf-8")):
            assert f"def {name}(" in sources, f"{path.name} names {name}"


PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))


def prose_of(page):
    """Return the paragraphs of a page, without code blocks, tables, headings and figures."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    lines = []
    for line in text.splitlines():
        is_prose = not line.lstrip().startswith(("|", "#", "!", "<", "    "))
        lines.append(line if is_prose else "")
    paragraphs = re.split(r"\n\s*\n|\n(?=\s*(?:-|\d+\.) )", "\n".join(lines))
    return [paragraph for paragraph in paragraphs if paragraph.strip()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_to_files_and_headings(page):
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)#\s]*#?[^)\s]*)\)", text):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"(?m)^#+ (.*)$", file.read_text(encoding="utf-8"))
            anchors = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor in anchors, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_readable(page):
    paragraphs = prose_of(page)
    assert max(len(paragraph.split()) for paragraph in paragraphs) <= 90
    assert not re.search(r"\b20\d\d-\d\d-\d\d\b", "\n".join(paragraphs))


def test_the_readme_is_short_and_shows_python_early():
    lines = TEXT.splitlines()
    assert len(lines) <= 200
    assert len(TEXT.split()) <= 1500
    assert lines.index("```python") < 60
