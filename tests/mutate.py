#!/usr/bin/env python3
"""Break the code in small ways, one at a time, and see whether a test notices: python tests/mutate.py [--count 150] [--seed 0]

Each mutant is one change to one place in a copy of the project: a comparison or a sign turned round, a number one more, a
condition negated, a statement left out. Prints those that no test of their file notices.
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).parents[1]
TESTS = {
    "model": ["model", "attention", "parity", "families"],
    "attention": ["attention", "score", "explain"],
    "checkpoints/weights": ["weights", "families", "export", "corruptions"],
    "training/metrics": ["metrics", "loop"],
    "training/step": ["loop", "frozen"],
    "training/features": ["frozen", "loop", "study"],
    "training/optimizer": ["loop"],
    "training/state": ["resume", "loop"],
    "training/run_folder": ["resume", "commands"],
}
OTHER = {
    "Lt": "<=",
    "LtE": "<",
    "Gt": ">=",
    "GtE": ">",
    "Eq": "!=",
    "NotEq": "==",
    "Is": "is not",
    "IsNot": "is",
}
OTHER |= {
    "In": "not in",
    "NotIn": "in",
    "Add": "-",
    "Sub": "+",
    "Mult": "/",
    "Div": "*",
    "FloorDiv": "*",
    "And": "or",
    "Or": "and",
}
LEFT_OUT = (ast.Assign, ast.AugAssign, ast.Expr, ast.Raise, ast.Return)


def mutants(source: str) -> Iterator[tuple[int, str, str, str]]:
    """Yield (line, what was there, what takes its place, the changed source)."""
    lines = source.splitlines(keepends=True)
    starts = [sum(map(len, lines[:i])) for i in range(len(lines))]

    def place(node: ast.AST) -> tuple[int, int]:
        ends = ((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset))
        return tuple(
            starts[line - 1] + len(lines[line - 1].encode()[:column].decode())
            for line, column in ends
        )

    def text(node: ast.AST) -> str:
        return source[slice(*place(node))]

    def turned(left: ast.AST, op: ast.AST, right: ast.AST) -> str:
        return f"({text(left)}) {OTHER.get(type(op).__name__, '+')} ({text(right)})"

    tree = ast.parse(source)
    parts = [
        getattr(node, field, None) or ast.Pass()
        for node in ast.walk(tree)
        for field in ("annotation", "returns")
    ]
    parts += [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    left_alone = {id(child) for part in parts for child in ast.walk(part)}  # types, and words
    for node in ast.walk(tree):
        if not hasattr(node, "lineno") or id(node) in left_alone:
            continue
        start, end = place(node)
        old, new = source[start:end], None
        if isinstance(node, ast.BinOp):
            new = turned(node.left, node.op, node.right)
        elif isinstance(node, ast.Compare) and len(node.ops) == 1:
            new = turned(node.left, node.ops[0], node.comparators[0])
        elif isinstance(node, ast.BoolOp):
            new = f" {OTHER[type(node.op).__name__]} ".join(f"({text(v)})" for v in node.values)
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
            new = repr(
                not node.value
                if node.value in (True, False) and type(node.value) is bool
                else node.value + 1
            )
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            new = f"bool({text(node.operand)})"
        elif isinstance(node, (ast.IfExp, ast.If)) and not isinstance(node.test, ast.NamedExpr):
            start, end = place(node.test)
            old, new = source[start:end], f"not ({source[start:end]})"
        elif isinstance(node, LEFT_OUT) and not (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            new = "pass"
        if new is not None and "TYPE_CHECKING" not in old:
            yield node.lineno, old, new, source[:start] + new + source[end:]


def noticed(copy: Path, name: str, changed: str) -> bool:
    file = copy / "minivit" / f"{name}.py"
    before = file.read_text(encoding="utf-8")
    file.write_text(changed, encoding="utf-8")
    tests = [f"tests/test_{test}.py" for test in TESTS[name]]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        return bool(
            subprocess.run(
                command, cwd=copy, env=environ, capture_output=True, timeout=600
            ).returncode
        )
    except subprocess.TimeoutExpired:
        return True
    finally:
        file.write_text(before, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TESTS, help="mutants of this module alone")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    everything = []
    for name in [args.only] if args.only else TESTS:
        source = (ROOT / "minivit" / f"{name}.py").read_text(encoding="utf-8")
        everything += [(name, *mutant) for mutant in mutants(source)]
    chosen = random.Random(args.seed).sample(everything, min(args.count, len(everything)))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        copies: SimpleQueue[Path] = SimpleQueue()
        for i in range(args.jobs):
            skip = shutil.ignore_patterns(".git", ".venv", ".cache", "runs", "data", "__pycache__")
            copies.put(
                Path(
                    shutil.copytree(ROOT, Path(folder, f"{i}", "main"), ignore=skip, symlinks=True)
                )
            )

        def run(mutant: tuple) -> bool:
            name, line, old, new, changed = mutant
            copy = copies.get()
            try:
                caught = noticed(copy, name, changed)
            finally:
                copies.put(copy)
            if not caught:
                print(
                    f"survived: {name}.py:{line}: {' '.join(old.split())[:100]}  ->  {' '.join(new.split())[:100]}",
                    flush=True,
                )
            return caught

        caught = sum(pool.map(run, chosen))
    print(
        f"{caught} of {len(chosen)} mutants noticed ({caught / len(chosen):.0%}), of {len(everything)} that there are"
    )


if __name__ == "__main__":
    main()
