"""Each command in the README is one that minivit takes; its ten lines of Python run in test_commands.py."""

from __future__ import annotations

import re
import shlex

import pytest
from conftest import ROOT

from minivit import __main__, cli

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
STANDS_FOR = {"AMP": "off", "SEED": "0", "BLOCKS": "10-11", "MODEL": "demo"}
FENCED = re.compile(r"(?s)```\w*\n(.*?)```")
CODE = [line for block in FENCED.findall(TEXT) for line in block.splitlines()]
CODE += [re.sub(r"\s+", " ", code) for code in re.findall(r"`([^`]+)`", FENCED.sub("", TEXT))]


def commands() -> set[str]:
    """Find what is given to train, infer and python -m minivit."""
    found = set()
    for code in CODE:
        if match := re.search(r"(?:python |torchrun .*)(?:-m minivit (\w+)|(train|infer)\.py)(.*)", code):
            command, script, flags = match.groups()
            if (command or script) in __main__.COMMANDS and "--help" not in flags:
                found.add(f"{command or script}{flags.partition('#')[0].partition(' > ')[0]}")
    return found


@pytest.mark.parametrize("command", sorted(commands()))
def test_each_command_is_one_that_minivit_takes(command, monkeypatch):
    monkeypatch.setattr(cli, "run", lambda job, parser, argv: parser.parse_args(argv) and 0)
    name, *flags = [STANDS_FOR.get(word, word) for word in shlex.split(command)]
    needed = ["photo"] if name == "infer" and not any(not flag.startswith("-") for flag in flags[:1]) else []
    assert __main__.main([name, *needed, *flags]) == 0


def test_the_readme_names_every_command_flag_and_target_as_it_is():
    targets = set(re.findall(r"(?m)^([a-z]+):.*##", (ROOT / "Makefile").read_text()))
    assert {code.split()[1] for code in CODE if re.match(r"make [a-z]+", code)} <= targets
    for name in __main__.COMMANDS:
        assert f"python -m minivit {name}" in TEXT or f"python {name}.py" in TEXT, name
    for path in re.findall(r"`((?:tests|benchmarks|docs|minivit)/[\w./]+)`|\]\(((?:docs|benchmarks)/[\w./]+)\)", TEXT):
        assert (ROOT / "".join(path)).exists(), path
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    for name in re.findall(r"`(test_\w+)`", TEXT):
        assert f"def {name}(" in sources, name
