#!/usr/bin/env python3
"""Break the code in small ways, one at a time, and see whether a test notices.

    python tests/mutate.py [--count 150] [--seed 0]

Each mutant changes one place in a copy of the project: a comparison or a sign is reversed, a
number is increased by one, a condition is negated, or a statement is left out. The command prints
the mutants that no test of their module notices.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
# Each module of the core, and the test modules that should notice a change in it.
TESTS = {
    "model": ["model", "attention", "parity", "families", "features"],
    "attention": ["attention", "score", "explain"],
    "train": ["loop", "resume", "commands"],
    "api": ["python"],
    "training/step": ["loop", "features", "distributed"],
    "training/features": ["features", "loop", "study"],
    "training/views": ["features", "loop", "resume"],
    "training/optimizer": ["loop", "resume"],
    "training/state": ["resume", "loop", "features"],
    "training/run_folder": ["resume", "commands"],
    "training/fingerprint": ["resume"],
    "training/metrics": ["metrics", "loop"],
    "training/publishing": ["push"],
    "checkpoints/weights": ["weights", "families", "export", "corruptions"],
    "checkpoints/configs": ["weights", "configs", "families", "export", "corruptions"],
    "checkpoints/timm_configs": ["configs", "families", "export"],
    "checkpoints/families": ["weights", "sources", "families", "export", "corruptions"],
    "checkpoints/tensors": ["weights", "sources", "families", "export", "corruptions"],
    "checkpoints/hub": ["sources", "hub"],
    "checkpoints/network": ["hub"],
    "checkpoints/upload": ["push"],
    "data/augment": ["data"],
    "data/preprocess": ["photos", "parity", "store"],
    "data/image_processors": ["image_processors"],
}
# Folders and files right in ROOT that the tests do not need.
NOT_COPIED = {".git", ".venv", ".cache", "runs", "data", "attention"}
# The operator that takes the place of each.
REVERSED = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.In: "not in",
    ast.NotIn: "in",
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.FloorDiv: "*",
    ast.And: "or",
    ast.Or: "and",
}
STATEMENTS = (ast.Assign, ast.AugAssign, ast.Expr, ast.Raise, ast.Return)


class Mutant(NamedTuple):
    """One change in one module, and the module's source with that change."""

    module: str
    line: int
    old: str
    new: str
    source: str


def node_span(source: str, node: ast.AST) -> slice:
    """Return where a node stands in the source; ast counts columns in bytes of UTF-8."""
    lines = source.splitlines(keepends=True)

    def offset(line: int, column: int) -> int:
        before = sum(map(len, lines[: line - 1]))
        return before + len(lines[line - 1].encode()[:column].decode())

    start = offset(node.lineno, node.col_offset)
    return slice(start, offset(node.end_lineno, node.end_col_offset))


def replacement(source: str, node: ast.AST) -> str | None:
    """Return what takes the place of an expression or statement, or None if it is left alone."""

    def text(part: ast.AST) -> str:
        return source[node_span(source, part)]

    def reverse(left: ast.AST, operator: ast.AST, right: ast.AST) -> str:
        return f"({text(left)}) {REVERSED.get(type(operator), '+')} ({text(right)})"

    if isinstance(node, ast.BinOp):
        return reverse(node.left, node.op, node.right)
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        return reverse(node.left, node.ops[0], node.comparators[0])
    if isinstance(node, ast.BoolOp):
        operator = REVERSED[type(node.op)]
        return f" {operator} ".join(f"({text(value)})" for value in node.values)
    if isinstance(node, ast.Constant):
        return other_constant(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return f"bool({text(node.operand)})"
    is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    if isinstance(node, STATEMENTS) and not is_docstring:
        return "pass"
    return None


def other_constant(value: object) -> str | None:
    """Return another number or the other truth value, or None for text and the like."""
    if isinstance(value, bool):
        return repr(not value)
    if isinstance(value, (int, float)):
        return repr(value + 1)
    return None


def not_mutated(tree: ast.AST) -> set[int]:
    """Return the ids of nodes in type annotations and f-strings, which no test need notice."""
    roots = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    for node in ast.walk(tree):
        for field in ("annotation", "returns"):
            annotation = getattr(node, field, None)
            if annotation is not None:
                roots.append(annotation)
    return {id(child) for root in roots for child in ast.walk(root)}


def mutants(module: str, source: str) -> Iterator[Mutant]:
    """Yield every mutant of a module."""
    tree = ast.parse(source)
    left_alone = not_mutated(tree)
    for node in ast.walk(tree):
        if not hasattr(node, "lineno") or id(node) in left_alone:
            continue
        if isinstance(node, (ast.IfExp, ast.If)):
            span = node_span(source, node.test)
            new = None if isinstance(node.test, ast.NamedExpr) else f"not ({source[span]})"
        else:
            span = node_span(source, node)
            new = replacement(source, node)
        old = source[span]
        if new is not None and "TYPE_CHECKING" not in old:
            changed = source[: span.start] + new + source[span.stop :]
            yield Mutant(module, node.lineno, old, new, changed)


def tests_pass(copy: Path, tests: Iterable[str]) -> bool:
    """Run test modules in a copy of the project, for ten minutes at most."""
    paths = [f"tests/test_{test}.py" for test in tests]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *paths],
            cwd=copy,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            timeout=600,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def is_noticed(copy: Path, mutant: Mutant) -> bool:
    """Run a module's tests with the mutant in its place, and then restore the module."""
    path = copy / "minivit" / f"{mutant.module}.py"
    before = path.read_text(encoding="utf-8")
    path.write_text(mutant.source, encoding="utf-8")
    try:
        return not tests_pass(copy, TESTS[mutant.module])
    finally:
        path.write_text(before, encoding="utf-8")


def copy_project(target: Path) -> Path:
    """Copy what the tests need of the project."""

    def ignore(folder: str, names: list[str]) -> set[str]:
        # minivit/data is needed, and only a folder data/ right in ROOT is not.
        return NOT_COPIED if Path(folder) == ROOT else {"__pycache__"}

    shutil.copytree(ROOT, target, ignore=ignore, symlinks=True)
    return target


def count_noticed(chosen: list[Mutant], jobs: int) -> int:
    """Test mutants in so many copies of the project, print the survivors, and count the others."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        copies: SimpleQueue[Path] = SimpleQueue()
        for i in range(jobs):
            copies.put(copy_project(Path(folder, f"{i}", "main")))

        def run(mutant: Mutant) -> bool:
            copy = copies.get()
            try:
                noticed = is_noticed(copy, mutant)
            finally:
                copies.put(copy)
            if not noticed:
                old = " ".join(mutant.old.split())[:100]
                new = " ".join(mutant.new.split())[:100]
                print(f"survived: {mutant.module}.py:{mutant.line}: {old}  ->  {new}", flush=True)
            return noticed

        # Tests that fail on the code as it is would notice every mutant.
        copy = copies.get()
        modules = {mutant.module for mutant in chosen}
        if not tests_pass(copy, sorted({test for module in modules for test in TESTS[module]})):
            sys.exit("the tests fail without any mutant, or take over ten minutes")
        copies.put(copy)
        return sum(pool.map(run, chosen))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=150, help="number of mutants")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other mutants")
    parser.add_argument("--only", choices=TESTS, help="draw mutants of this module only")
    parser.add_argument("--jobs", type=int, default=2, help="mutants tested at the same time")
    args = parser.parse_args()
    everything = []
    for module in [args.only] if args.only else TESTS:
        source = (ROOT / "minivit" / f"{module}.py").read_text(encoding="utf-8")
        everything += mutants(module, source)
    chosen = random.Random(args.seed).sample(everything, min(args.count, len(everything)))
    noticed = count_noticed(chosen, args.jobs)
    share = noticed / len(chosen)
    print(f"{noticed} of {len(chosen)} mutants noticed ({share:.0%}); {len(everything)} exist")


if __name__ == "__main__":
    main()
