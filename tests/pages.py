"""Read README.md, CONTRIBUTING.md and docs/*.md: code, commands, names, tables and prose."""

from __future__ import annotations

import ast
import errno
import os
import re
import shlex
from functools import cache
from pathlib import Path

from conftest import ROOT

README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
DOCS = ROOT / "docs"
# In the order in which a reader comes by.
ORDER = ("training", "models-and-data", "attention", "score-and-study", "troubleshooting", "faq")
FIRST = [README, *(DOCS / f"{name}.md" for name in ORDER)]
PAGES = [*FIRST, *sorted({*DOCS.glob("*.md")} - {*FIRST}), CONTRIBUTING]
FENCED = re.compile(r"(?ms)^```(\w*)\n(.*?)^```$")
PROGRAMS = ("git", "hf", "infer.py", "make", "pip", "python", "python3", "taskset", "torchrun")
PROGRAMS += ("minivit-infer", "minivit-train", "train.py", ".", ".venv/bin/pip")
PACKAGE = sorted((ROOT / "minivit").rglob("*.py"))
SOURCES = [*PACKAGE, *ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/*.py")]


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def code_blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of this language; trees and outputs have none, which is ""."""
    return [code for found, code in FENCED.findall(read(page)) if found == language]


def without_blocks(page: Path) -> str:
    return FENCED.sub("", read(page))


def inline_code(page: Path) -> list[str]:
    """Return the text of each `code` outside of fenced blocks, on one line."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", without_blocks(page))]


def is_command(code: str) -> bool:
    """Tell a command, such as `train.py --dry-run`, from the bare name of a program or file."""
    program, _, arguments = code.partition(" ")
    if program == "make":  # also a word of messages, as in "make room"
        return re.fullmatch(r"[a-z]+(?: [A-Z]+=.*)?", arguments) is not None
    return program in PROGRAMS and bool(arguments)


def commands(page: Path) -> list[str]:
    """Return each command of the page once: in its sh blocks, in the text, and as flags."""
    lines = []
    for block in code_blocks(page, "sh"):
        whole_lines = re.sub(r"\\\n\s*", "", block).splitlines()
        lines += [line.partition(" #")[0].strip() for line in whole_lines]
    lines += [code for code in inline_code(page) if is_command(code)]
    for heading, rows in tables(page):
        if heading == "Every flag":  # of infer.py, each with an example
            lines += [f"python infer.py cat.jpg {row[0].strip('`')}" for row in rows[1:]]
    return list(dict.fromkeys(lines))


def split(line: str) -> list[str]:
    """Return the words of a line as a shell splits it, with > and | as words of their own."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="><|;&")
    lexer.whitespace_split = True
    return list(lexer)


def tables(page: Path) -> list[tuple[str, list[list[str]]]]:
    """Return each table as the heading it stands under and its rows of cells, the header first."""
    found: list[tuple[str, list[list[str]]]] = []
    heading = ""
    is_table = False
    for line in without_blocks(page).splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if not line.startswith("|"):
            is_table = False
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not is_table:
            found.append((heading, [cells]))
            is_table = True
        elif not line.startswith("|--"):
            found[-1][1].append(cells)
    return found


def paragraphs(page: Path) -> list[str]:
    """Return the prose of a page: no code blocks, tables, headings, pictures or lines of origin."""
    lines = []
    for line in without_blocks(page).splitlines():
        is_prose = not line.lstrip().startswith(("|", "#", "!", "<", "    "))
        lines.append(line if is_prose else "")
    pieces = re.split(r"\n\s*\n|\n(?=\s*(?:-|\d+\.) )", "\n".join(lines))
    return [piece for piece in pieces if piece.strip()]


def sentences(page: Path) -> list[str]:
    """Return the sentences of a page's prose."""
    found = []
    for paragraph in paragraphs(page):
        text = re.sub(r"\]\([^)]*\)", "]", paragraph)
        text = re.sub(r"^\s*(?:-|\d+\.)\s", "", text)
        found += re.split(r"(?<=[.?!])\s+(?=[\"'`\[*A-Z])", " ".join(text.split()))
    return found


def headings(page: Path) -> list[str]:
    return re.findall(r"(?m)^#+ (.*)$", without_blocks(page))


def anchor(heading: str) -> str:
    """Return the name under which GitHub links to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@cache
def source_text() -> str:
    """Return all Python of the project, and the file that says what it is made of."""
    texts = [path.read_text(encoding="utf-8") for path in SOURCES]
    return "\n".join([*texts, (ROOT / "pyproject.toml").read_text(encoding="utf-8")])


@cache
def source_messages() -> list[list[str]]:
    """Return what the package can print, as lists of words, with "*" for each placeholder.

    These are its string literals without the docstrings, in the parts that a quote is cut into,
    and what the operating system says of a full disk.
    """
    found = [words_of(os.strerror(errno.ENOSPC))]
    for path in PACKAGE:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if id(node) not in docstrings:
                for part in parts_of(literal(node)):
                    found += [words_of(part), *map(words_of, part.split(";"))]
    return [words for words in found if words]


def parts_of(text: str) -> list[str]:
    """Cut a message or a quote where the code often puts messages together."""
    return re.split(r"\.\.\.|[()·]", text)


def words_of(text: str) -> list[str]:
    """Return the words without the punctuation behind them, at which a quote may end."""
    return [word.rstrip(",;:.") for word in text.split() if word.rstrip(",;:.")]


def literal(node: ast.AST) -> str:
    """Return the text of a string or an f-string, with "*" for each placeholder."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else "*" for part in node.values]
        return "".join(map(str, parts))
    return ""


def is_printed(quote: str) -> bool:
    """Tell whether the source has each part of a quote, as a whole or clause by clause."""
    for part in parts_of(quote):
        clauses = [words_of(clause) for clause in part.split(";")]
        is_whole = _is_in_a_message(words_of(part))
        if not is_whole and not all(_is_in_a_message(clause) for clause in clauses):
            return False
    return True


def _is_in_a_message(words: list[str]) -> bool:
    if not words:
        return True
    for message in source_messages():
        common = [word for word in words if word in message]
        # A message that is little but placeholders would fit anything.
        at_most_values = max(1, 2 * len(words) // 5)
        if len(words) - len(common) <= at_most_values and _begins_in(words, message):
            return True
    return False


def _begins_in(words: list[str], message: list[str]) -> bool:
    patterns = [_pattern(word) for word in message]
    for start in range(len(patterns)):
        # The quote is this word of the message, or it goes on with the next, and so on.
        nested = r"(?: \S+)?" if len(words) > len(patterns) - start else ""  # a value behind it
        for pattern in reversed(patterns[start + 1 : start + len(words)]):
            nested = f"(?: {pattern}{nested})?"
        if re.fullmatch(patterns[start] + nested, " ".join(words)):
            return True
    return False


def _pattern(word: str) -> str:
    """Return an expression for a word of a message; a placeholder is up to three words."""
    value = r"\S+(?: \S+){0,2}" if word == "*" else r"\S*(?: \S+){0,2}"
    return value.join(re.escape(part) for part in word.split("*"))
