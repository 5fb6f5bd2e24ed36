"""The layout of the package: which module may import which, and the folders' docstrings.

The imports are read from the sources, with those inside functions and without those that only a
type checker follows.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache

import pytest
from conftest import ROOT

PACKAGE = ROOT / "minivit"
PATHS = sorted(PACKAGE.rglob("*.py"))


def module_name(path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PATHS}


def import_nodes(node: ast.AST):
    """Yield the import statements that run, at the top of the module or in a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        yield from import_nodes(child)


@cache
def imports(module: str) -> frozenset[str]:
    """Return the absolute names of the modules that a module imports."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    names = set()
    for node in import_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
            continue
        parents = package[: len(package) + 1 - node.level] if node.level else []
        source = ".".join([*parents, *filter(None, [node.module])])
        for alias in node.names:
            # `from . import cli` names a module, and `from .cli import main` what is in one.
            submodule = f"{source}.{alias.name}"
            names.add(submodule if submodule in MODULES else source)
    return frozenset(names)


def imports_of(module: str) -> set[str]:
    """Return the modules of minivit that a module imports."""
    return {name for name in imports(module) if name.split(".")[0] == "minivit"}


def is_in(module: str, *packages: str) -> bool:
    names = [f"minivit.{package}" for package in packages]
    return any(module == name or module.startswith(f"{name}.") for name in names)


def assert_no_import(importers, *packages: str) -> None:
    """Check that none of these modules imports one of these packages."""
    for module in importers:
        wrong = [name for name in imports_of(module) if is_in(name, *packages)]
        assert not wrong, f"{module} imports {wrong}"


def test_the_imports_of_a_module_are_read_as_python_resolves_them():
    assert "minivit.tools.score.masks" in imports_of("minivit.tools.doctor")
    assert "minivit.cli" in imports_of("minivit.tools.score.command")  # from ... import cli
    assert "minivit.train" in imports_of("minivit.commands")  # inside a function
    assert "minivit.data.preprocess" not in imports_of("minivit.model")  # for the type checker


def test_nothing_outside_tools_imports_tools():
    assert_no_import([name for name in MODULES if not is_in(name, "tools")], "tools")


def test_the_model_imports_errors_and_attention_the_model():
    assert imports_of("minivit.model") == {"minivit.errors"}
    assert imports_of("minivit.attention") == {"minivit.errors", "minivit.model"}


def test_the_rooms_import_only_what_lies_below_them():
    rooms = ("checkpoints", "data", "figures")
    assert_no_import([name for name in MODULES if is_in(name, *rooms)], "training")
    above = (*rooms, "training", "tools")
    assert_no_import([name for name in MODULES if is_in(name, "system")], *above)


def test_no_imports_go_round_in_a_circle():
    finished = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " imports ".join([*path[path.index(module) :], module])
        if module not in finished:
            for name in sorted(imports_of(module)):
                visit(name, (*path, module))
            finished.add(module)

    for module in MODULES:
        visit(module, ())


def test_at_most_a_dozen_modules_lie_right_in_the_package():
    assert len(list(PACKAGE.glob("*.py"))) <= 12


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_no_module_imports_a_library_that_only_tests_need(library):
    for module in MODULES:
        assert library not in {name.split(".")[0] for name in imports(module)}, module


def test_importing_minivit_loads_neither_torch_nor_matplotlib():
    code = "import sys, minivit; sys.exit(bool({'torch', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_programs_and_workers_import_no_charts_until_they_draw_some():
    code = "import sys, minivit.infer, minivit.train; sys.exit('matplotlib.figure' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_stream_is_entered_on_its_own_device():
    """Otherwise torch goes back to a stream of the device that was current, and starts that one."""
    for path in PATHS:
        for line in path.read_text(encoding="utf-8").splitlines():
            if "torch.cuda.stream(" in line:
                assert "with torch.cuda.device(device), torch.cuda.stream(" in line, path


def test_the_init_file_of_every_folder_is_one_sentence():
    folders = {path.parent for path in PATHS} - {PACKAGE}
    for folder in sorted(folders):
        (statement,) = ast.parse((folder / "__init__.py").read_text(encoding="utf-8")).body
        sentence = ast.literal_eval(statement.value)
        assert sentence.endswith(".") and sentence.count(". ") == 0, folder
