"""The layers hold, and files and functions stay small enough to read."""

import ast
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "diffkv"
PYTHON = sorted(PACKAGE.rglob("*.py"))
SOURCES = PYTHON + sorted(p for p in PACKAGE.rglob("csrc/*") if p.suffix in {".cpp", ".h", ".cu"})

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_KERNEL_LINES = 150


def name(path):
    return str(path.relative_to(PACKAGE))


def functions(path):
    """(name, lines without the docstring) of every function of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            documented = ast.get_docstring(node) is not None
            docstring = node.body[0].end_lineno - node.body[0].lineno + 1 if documented else 0
            yield node.name, node.end_lineno - node.lineno + 1 - docstring


def test_layers(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert lint_imports(no_cache=True) == 0


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_file_is_short(path):
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_FILE_LINES


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_functions_are_short(path):
    is_kernel = "kernels" in path.relative_to(PACKAGE).parts
    limit = MAX_KERNEL_LINES if is_kernel else MAX_FUNCTION_LINES
    too_long = {name: num for name, num in functions(path) if num > limit}
    assert not too_long
