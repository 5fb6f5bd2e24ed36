"""What the pages say can be done: commands parse and run, and all that is named is there.

The pages are README.md, docs/*.md and CONTRIBUTING.md; pages.py reads them.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shutil
import subprocess
import sys
import venv
from functools import cache
from pathlib import Path

import numpy as np
import pages
import pytest
from conftest import ROOT, draw_photo
from pages import CONTRIBUTING, DOCS, PAGES, README

from minivit import __main__, cli
from minivit.checkpoints.hub import DEMO
from minivit.settings import AUTO

EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
# Values for placeholders that a parser would not take as they are.
VALUES = {"AMP": "off", "SEED": "0", "BLOCKS": "10-11", "HOST:29500": "127.0.0.1:29500"}


class Parsed(Exception):
    """Raised in place of the job that would follow the reading of the flags."""

    def __init__(self, parser: argparse.ArgumentParser, flags: argparse.Namespace | None) -> None:
        super().__init__()
        self.parser = parser
        self.flags = flags


@pytest.fixture
def parse_only(monkeypatch):
    """Let each parser of argparse read its flags, and end the command there."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, argv=None, namespace=None):
        raise Parsed(parser, parse_args(parser, argv, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.fixture
def find_parser(monkeypatch):
    """Return a function that gives the parser of a command of minivit."""

    def stop(parser, argv=None, namespace=None):
        raise Parsed(parser, None)

    def find(name: str) -> argparse.ArgumentParser:
        with pytest.raises(Parsed) as stopped:
            __main__.main([name])
        return stopped.value.parser

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    return find


def check_command(words: list[str]) -> None:
    """Let the program that a command names read its arguments, without doing anything."""
    words = [VALUES.get(word, word) for word in words]
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    for end in (">", "|", "&&", "&"):
        if end in words:
            words = words[: words.index(end)]
    words[0] = re.sub(r"^minivit-(train|infer)$", r"\1.py", words[0])
    program, *arguments = words
    program = program.removeprefix(".venv/bin/")
    if program in ("python", "python3"):
        check_python(arguments)
    elif program in ("train.py", "infer.py"):
        check_python(words)
    elif program == "make":
        check_make(arguments)
    elif program == "torchrun":
        check_torchrun(arguments)
    elif program == "taskset":
        check_command(arguments[2:])
    elif program == "pip":
        check_pip(arguments)
    elif program == "hf":
        check_hf(*arguments)
    elif program == ".":
        assert arguments == [".venv/bin/activate"]
    else:
        assert program == "git", f"no parser known for {program}"


def check_python(arguments: list[str]) -> None:
    """Check the arguments of python: a module, one of our scripts, or a benchmark."""
    if arguments[0] == "-m":
        module, *rest = arguments[1:]
        if module == "minivit":
            check_minivit(rest)
        elif module == "pytest":
            check_pytest(rest)
        elif module == "coverage":
            check_pytest(rest[2:] if rest[0] == "run" else [])
        else:
            assert module == "venv", f"no parser known for {module}"
            with pytest.raises(Parsed):
                venv.main(rest)
        return
    script, *rest = arguments
    assert (ROOT / script).exists(), script
    if "/" not in script:
        check_minivit([Path(script).stem, *rest])
        return
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(sys, "argv", [script, *rest])
        runpy.run_path(str(ROOT / script), run_name="__main__")


def check_minivit(words: list[str]) -> None:
    if not words:
        assert __main__.main([]) == 0
        return
    if "--help" in words:
        assert __main__.main(words) == 0
        return
    with pytest.raises(Parsed) as stopped:
        __main__.main(words)
    settings = vars(stopped.value.flags)
    ranges = settings.get("blocks") or settings.get("layers") or []
    for text in [ranges] if isinstance(ranges, str) else ranges:
        cli.parse_blocks(text, 12)


def check_make(arguments: list[str]) -> None:
    """Check what make would run."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "--dry-run", "--no-print-directory", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.replace("\\\n", " ").splitlines():
        words = pages.split(line)
        if any(word.startswith(".venv/bin/py") for word in words[:2]):
            check_command([word for word in words if word])


def check_pytest(arguments: list[str]) -> None:
    """Check that the marks and names by which tests are chosen are there."""
    for option, value in zip(arguments, arguments[1:]):
        if option == "-m":
            assert f'"{value}: ' in (ROOT / "pyproject.toml").read_text(), value
        if option == "-k" and value != "NAME":
            assert re.search(rf"def test_\w*{value}", pages.source_text()), value


def check_torchrun(arguments: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    with pytest.raises(Parsed) as stopped:
        get_args_parser().parse_args(arguments)
    flags = stopped.value.flags
    check_python([flags.training_script, *flags.training_script_args])


def check_pip(arguments: list[str]) -> None:
    from packaging.requirements import Requirement
    from pip._internal.commands import create_command

    name, *rest = arguments
    options, requirements = create_command(name).parse_args(rest)
    assert requirements or options.editables
    for requirement in requirements:
        if requirement != ".":
            Requirement(requirement)


@cache
def check_hf(*arguments: str) -> None:
    module = "huggingface_hub.cli.hf"
    command = [sys.executable, "-m", module, *arguments, "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@EACH_PAGE
def test_each_command_is_one_that_its_program_takes(page, parse_only):
    for line in pages.commands(page):
        try:
            check_command(pages.split(line))
        except SystemExit:
            pytest.fail(f"not a command: {line}")


def test_wrong_commands_are_noticed(parse_only):
    check_command(pages.split("python train.py --epochs 3 > log.txt"))
    for line in (
        "python train.py --epoch-count 3",
        "python infer.py cat.jpg --method grad-cam",
        "python infer.py",
        "python -m minivit study --blocks 12",
        "python benchmarks/one_photo.py",
        "python benchmarks/no_such.py",
        "torchrun --nproc 2 --no-such train.py",
        "torchrun --nproc-per-node 2 train.py --no-such",
        "make no-such-target",
        "make train ARGS=--no-such",
        "make test ARGS='-k no_such_test_is_there'",
        ".venv/bin/pip install torch=2.6",
        "hf no-such-command",
        "wget photos.zip",
    ):
        # A command that does not parse returns 2, where Parsed was expected.
        with pytest.raises((SystemExit, AssertionError, ValueError, pytest.fail.Exception)):
            check_command(pages.split(line))


# Commands that do not run in a test, and why; they must parse all the same.
NOT_RUN = {
    r"\. ": "each command runs in a shell of its own",
    r"git ": "there is no repository in an empty folder",
    r"hf |.*--push-to-hub": "needs a login to the Hub",
    r"pip |\.venv/bin/pip |python3 -m venv|make setup": "installs gigabytes from a package index",
    r".* --download": "fetches 774 MiB from Oxford's server",
    r"make demo|python -m minivit demo": "test_demo.py runs it",
    r".* --published": "loads Google's and Meta's weights; test_selfcheck.py runs it on small ones",
    r"python -m minivit serve": "serves until Ctrl-C; test_serve.py starts it",
    r".* --compile": "takes minutes, and needs a compiler of C++",
    r"make (test|coverage|mutants|fuzz|lint|figures|bench)|python -m pytest": (
        "a suite does not run itself"
    ),
    r"(taskset .*)?python benchmarks/": "takes minutes or a GPU; test_benchmarks.py starts each",
}
# Changes to the commands that run. All else in them is the name of a file, and stands as it is.
SUBSTITUTIONS = {
    r"^(train|infer)\.py": r"python \1.py",  # as the text calls them
    r"^minivit-(train|infer)": r"python \1.py",  # the same where minivit is installed
    r"^\.venv/bin/python": "python",
    r"--nproc-per-node 8": "--nproc-per-node 1",  # one process on the CPU for each GPU
    r"HOST": "127.0.0.1",
    r"\bAMP\b": "off",
    r"\bSEED\b": "0",
    r"\bBLOCKS\b": "10-11",
    r'"Egyptian Mau"|\bSphynx\b': "Husky",
    r"\bBengal\b": "Siamese",  # The demo draws no Bengal cats, but it draws Siamese ones.
    r" --revision main": "",  # The model is a folder here, which has no revisions.
    r"minivit study": "minivit study --seeds 1 --epochs 1 --shots 2",  # 5 runs for 75
    r"(minivit study .*--data (pets\d+).*)": r"\1 --out study-\2",  # study/ is of other photos
}


def runnable(page: Path) -> list[str]:
    """Return the commands of a page that run here, with the substitutions made."""
    found = []
    for line in pages.commands(page):
        if any(re.match(pattern, line) for pattern in NOT_RUN):
            continue
        for pattern, replacement in SUBSTITUTIONS.items():
            line = re.sub(pattern, replacement, line)
        if "--nnodes 2" in line:  # Both machines are this one.
            line = f"{line} --out runs/nodes & {line} --out runs/nodes; code=$?; wait; exit $code"
        found.append(line)
    return found


def lay_out_project(folder: Path) -> None:
    """Copy the project into an empty folder, with all files that the commands name.

    The demo's checkpoint stands for the models, and drawings stand for the photos.
    """
    from minivit.tools.demo.drawings import draw_pets

    shutil.copytree(ROOT / "minivit", folder / "minivit")
    for name in ("train.py", "infer.py", "Makefile", "pyproject.toml"):
        shutil.copy2(ROOT / name, folder / name)
    # make finds an environment that is installed already: this one.
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (folder / ".venv" / "installed").touch()
    draw_pets(folder / "data", per_breed=(5, 2), seed=0, workers=2)
    images = folder / "data" / "oxford-iiit-pet" / "images"
    for name, breed in (("cat", "Siamese"), ("dog", "Husky")):
        (folder / "photos" / name).mkdir(parents=True)
        for photo in images.glob(f"{breed}_*.jpg"):
            shutil.copy(photo, folder / "photos" / name)
    for name in ("cat.jpg", "new.jpg", "PHOTO"):
        draw_photo(500, 375).save(folder / name, format="JPEG")
    (folder / "google").mkdir()
    for name in (
        "google/vit-base-patch16-224",
        "DINO_FOLDER",
        "MODEL",
        "runs/demo/run",
        "runs/head",
        "runs/head34",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(DEMO)
    for name in ("pets3", "pets34", "pets37", "DIR", "FOLDER", "runs/demo/drawings"):
        (folder / name).symlink_to(folder / "data")
    (folder / "RUN").symlink_to(folder / "runs" / "pets")


@pytest.mark.slow
def test_the_commands_run_in_order_in_an_empty_folder(tmp_path):
    lay_out_project(tmp_path)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    lines = [line for page in PAGES for line in runnable(page)]
    for line in dict.fromkeys(lines):
        print(f"$ {line}", flush=True)
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environ, timeout=600)
        assert done.returncode == 0, line


@EACH_PAGE
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    """The blocks run one after the other, as in a notebook, with the demo for all models."""
    blocks = pages.code_blocks(page, "python")
    if not blocks:
        return
    monkeypatch.chdir(tmp_path)
    (tmp_path / "google").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "google" / "vit-base-patch16-224").symlink_to(DEMO)
    (tmp_path / "runs" / "pets").symlink_to(DEMO)
    draw_photo(500, 375).save(tmp_path / "cat.jpg")
    for number in range(8):
        folder = tmp_path / "photos" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        draw_photo(40, 30, number).save(folder / f"{number}.png")
    names: dict = {}
    for block in blocks:
        # On the CPU, and at a size that it computes in a moment.
        code = block.replace('"cuda", torch.float16', '"cpu"').replace('"cuda"', '"cpu"')
        code = code.replace("epochs=5", "epochs=1").replace(
            "ViTConfig()", "ViTConfig(embed_dim=24, num_heads=3, mlp_dim=48)"
        )
        exec(compile(code, f"a block of {page.name}", "exec"), names)
    assert "False" not in capsys.readouterr().out  # The tests that the pages print come out.
    if "map11" in names:
        assert names["map11"].shape == names["model"].config.grid == (14, 14)
        assert names["overlay"].shape == names["photo"].size[::-1] == (375, 500)
    if "page" in names:
        assert "</html>" in names["page"]


def file_exists(name: str) -> bool:
    """Whether a file or folder is in the project, by its path from the root or minivit/."""
    is_module_anywhere = "/" not in name and any(path.name == name for path in pages.SOURCES)
    return (ROOT / name).exists() or (ROOT / "minivit" / name).exists() or is_module_anywhere


# Files that users have or that Google, torchvision and timm give them.
USERS_FILES = {"cat.jpg", "new.jpg", "cat.png", "cat-2.png", "answers.jsonl", "model_best.pth.tar"}
USERS_FILES |= {"vit_b_16-c867db91.pth", "ViT-B_16.npz", "vit_b_16-*.pth", "1.jpg"}


@EACH_PAGE
def test_files_and_folders_that_are_named_exist(page):
    for code in pages.inline_code(page):
        for name in re.findall(r"[\w./*{},-]*[\w*]\.(?:py|md|toml|cff)\b", code):
            _, brace, stems = name.partition("{")
            for stem in stems.partition("}")[0].split(",") if brace else [""]:
                file = name.replace("{" + stems.partition("}")[0] + "}", stem) if brace else name
                is_pattern = "*" in file or "NAME" in file
                assert file_exists(file) or is_pattern, f"{name} in {code}"
        is_ours = re.match(r"(?:minivit|tests|docs|benchmarks|tools|checkpoints)/", code)
        if is_ours and not re.search("[*{]|NAME", code):
            assert file_exists(code), code


@EACH_PAGE
def test_files_that_are_named_are_written_or_read_by_the_code(page):
    for code in pages.inline_code(page):
        name = Path(code).name
        if not re.fullmatch(r"[\w.*-]+\.(?:json|jsonl|png|csv|npz|html|safetensors)", name):
            continue
        known = name in pages.source_text() or name in USERS_FILES or (DOCS / name).exists()
        assert known, code


@EACH_PAGE
def test_names_of_the_code_that_are_named_exist(page):
    """Each `snake_case_name` or `call()` is a word of the source; a test is a test."""
    if page.name == "comparison.md":  # Most names there are those of other tools.
        return
    words = set(re.findall(r"\w+", pages.source_text()))
    for code in pages.inline_code(page):
        if re.fullmatch(r"[\w.]+_\w+(?:\(.*\))?|[\w.]+\(.*\)", code) and "/" not in code:
            name = re.match(r"[\w.]+", code).group().strip("_").split(".")[-1]
            assert name in words, code


@EACH_PAGE
def test_tests_that_are_named_exist(page):
    names = re.findall(r"`(test(?:_[a-z0-9]+){3,})`", pages.without_blocks(page))
    for paragraph in pages.paragraphs(page):
        if re.match(r"Tests?:", paragraph):
            names += re.findall(r"`(\w+)`", paragraph)
    for name in names:
        assert f"def {name}(" in pages.source_text(), name


def test_each_question_of_the_faq_names_a_test():
    text = pages.read(DOCS / "faq.md")
    for question in text.split("\n### ")[1:]:
        assert re.search(r"\nTests?: `test_", question), question.partition("\n")[0]


def test_the_maps_of_the_code_are_complete():
    for page in (README, CONTRIBUTING):
        tree = next(block for block in pages.code_blocks(page, "") if "minivit/\n" in block)
        names = set()
        for line in tree.splitlines():
            if re.match(r"\s{0,2}\S", line):
                indented = line.startswith(" ")
                for name in re.match(r"\s*([\w./]+(?:, [\w./]+)*)", line).group(1).split(", "):
                    names.add(f"minivit/{name}" if indented else name)
        assert all((ROOT / name).exists() for name in names), names
        folders = {f"minivit/{path.parent.name}/" for path in ROOT.glob("minivit/*/__init__.py")}
        assert folders <= names
    modules = {f"minivit/{path.name}" for path in ROOT.glob("minivit/[a-z]*.py")}
    assert modules <= names, "in CONTRIBUTING.md"


def test_the_readme_names_every_command():
    text = pages.read(README)
    for name in __main__.COMMANDS:
        assert f"python -m minivit {name}" in text or f"python {name}.py" in text, name


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    return set(re.findall(r"--[a-z][a-z-]+", parser.format_help()))


@EACH_PAGE
def test_flags_that_are_named_exist(page):
    folders = ("minivit", "benchmarks")
    sources = [path.read_text() for name in folders for path in (ROOT / name).rglob("*.py")]
    flags = set(re.findall(r'"(--[a-z][a-z-]+)"', "".join(sources))) | {"--help"}
    for code in pages.inline_code(page):
        if not pages.is_command(code):
            assert set(re.findall(r"--[a-z][a-z-]+", code)) <= flags, code


FLAG_TABLES = {
    "Every flag": "infer",
    "Flags of score": "score",
    "Flags of study": "study",
    "Flags of drop": "drop",
}


@pytest.mark.parametrize("heading", FLAG_TABLES)
def test_a_table_of_all_flags_has_each_flag_and_default(heading, find_parser):
    tables = [found for page in PAGES for found in pages.tables(page) if found[0] == heading]
    (_, rows), *_ = tables
    parser = find_parser(FLAG_TABLES[heading])
    named = {flag for row in rows for flag in re.findall(r"--[a-z][a-z-]+", row[0])}
    assert named == flags_of(parser) - {"--help"}
    for row in rows[1:]:
        check_default(parser, row)


def test_the_table_of_training_flags_has_the_defaults(find_parser):
    rows = next(rows for _, rows in pages.tables(DOCS / "training.md") if rows[0][0] == "flag")
    assert len(rows) > 5
    for row in rows[1:]:
        check_default(find_parser("train"), row)


def check_default(parser: argparse.ArgumentParser, row: list[str]) -> None:
    """Check a row that begins with a flag and its default; "off" stands for a flag not given."""
    for flag in re.findall(r"--([a-z][a-z-]+)", row[0]):
        default = parser.get_default(flag.replace("-", "_"))
        stated = row[1].strip("`")
        if isinstance(default, list):
            assert stated == " ".join(default), row
        elif default == AUTO:
            assert stated.startswith(("chosen", "auto")), row
        elif isinstance(default, (int, float)) and not isinstance(default, bool):
            assert stated == "one for each core" or float(stated) == default, row
        elif default in (None, False):
            assert stated == "off" or "`" not in row[1] or " or " in row[1] or " if " in row[1], row
        else:
            assert stated == default or default not in stated, row


QUOTING = [page for page in PAGES if page.name not in ("comparison.md", "benchmarks.md")]


@pytest.mark.parametrize("page", QUOTING, ids=lambda page: page.name)
def test_each_message_that_is_quoted_is_one_that_the_code_prints(page):
    quotes = [code for code in pages.inline_code(page) if is_quote(code)]
    for _, rows in pages.tables(page):
        if rows[0][0] == "it says":
            assert all("`" in row[0] for row in rows[1:])
            quotes += [code for row in rows[1:] for code in re.findall(r"`([^`]+)`", row[0])]
    for quote in quotes:
        assert pages.is_printed(quote), quote


def is_quote(code: str) -> bool:
    """Whether inline code is a message: a few words that are no command, flags or Python."""
    words = re.findall(r"\b[A-Za-z]{2,}\b", code)
    looks_like_code = re.search(r"^--\w|[{}\[\]=√]|\w\(|->", code)
    return len(words) > 2 and " " in code and not looks_like_code and not pages.is_command(code)


def test_a_message_that_is_never_printed_is_noticed():
    assert pages.is_printed("holds an earlier run: moved to ...")
    assert pages.is_printed("config.json has model_type 'swin'; expected one of ...")
    assert not pages.is_printed("holds a previous run: moved to ...")
    assert not pages.is_printed("holds an earlier run: removed ...")


@EACH_PAGE
def test_links_between_pages_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", pages.without_blocks(page)):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in map(pages.anchor, pages.headings(file)), target


@EACH_PAGE
def test_headings_and_pictures_say_what_they_are(page):
    anchors = [pages.anchor(heading) for heading in pages.headings(page)]
    assert len(anchors) == len(set(anchors)), "a link to a heading would be ambiguous"
    for caption in re.findall(r"!\[([^\]]*)\]", pages.read(page)):
        assert len(caption.split()) > 5


def test_each_page_of_docs_is_linked_and_says_what_it_is_for():
    text = pages.read(README)
    for page in DOCS.glob("*.md"):
        assert f"(docs/{page.name})" in text
        assert pages.paragraphs(page)[0].startswith("After reading this page you ")


@EACH_PAGE
def test_pages_are_readable(page):
    paragraphs = pages.paragraphs(page)
    assert max(len(paragraph.split()) for paragraph in paragraphs) <= 90
    assert not re.search(r"\b20\d\d-\d\d-\d\d\b", "\n".join(paragraphs))
    lengths = [len(sentence.split()) for sentence in pages.sentences(page)]
    assert np.mean(lengths) <= 16
    assert np.quantile(lengths, 0.9) <= 28
    for _, block in pages.FENCED.findall(pages.read(page)):
        for line in block.splitlines():
            assert len(line) <= 98, f"must be scrolled on a page 900 pixels wide: {line}"


def test_the_readme_is_short_and_shows_python_early():
    lines = pages.read(README).splitlines()
    assert len(lines) <= 200
    assert len(pages.read(README).split()) <= 1500
    assert lines.index("```python") < 60
