"""Maps of the code in README, CONTRIBUTING and docs/architecture.md name all that there is."""

import re
import sys
from pathlib import Path

import pytest

from diffkv.ops import Ops
from diffkv.state import TENSORS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "diffkv"
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
    "importlinter"
]

OPENED = ("kernels", "lab")
"""Packages whose members have rows of their own in the table of modules."""
UNNAMED = ("__init__.py", "__main__.py", "__pycache__", "py.typed")

LAYERS = {
    container: contract["layers"]
    for contract in CONTRACTS["contracts"]
    if contract["type"] == "layers"
    for container in contract["containers"]
}


def same(page: str, found: set[str], expected: set[str]) -> None:
    """Fail with the names that are missing from a page, and those that it has too many."""
    missing, extra = sorted(expected - found), sorted(found - expected)
    assert not missing and not extra, f"{page}: missing {missing}, to be taken out {extra}"


def rows(text: str, header: str) -> list[str]:
    """First cells of the table that begins with this header."""
    assert header in text, f"there is no table {header!r}"
    lines = text[text.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [line.split("|")[1] for line in lines]


def names(cells: list[str]) -> set[str]:
    """What stands in backquotes."""
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def members(folder: Path) -> set[str]:
    """Modules and packages of a folder, as the table names them."""
    found = set()
    for path in folder.iterdir():
        name = str(path.relative_to(PACKAGE))
        if path.name in UNNAMED:
            continue
        if path.is_dir() and name in OPENED:
            found |= members(path)
        elif path.is_dir() and any(path.rglob("*.*")):
            found.add(f"{name}/")
        elif path.suffix == ".py":
            found.add(name)
    return found


def test_modules_of_architecture():
    table = names(rows(ARCHITECTURE, "| module of `src/diffkv` |"))
    same("table of modules in docs/architecture.md", table, members(PACKAGE))


def test_operations_of_architecture():
    operations = {name for name in vars(Ops) if not name.startswith("_")}
    (sentence,) = re.findall(r"^The operations are (.*?)\.", ARCHITECTURE, re.M | re.S)
    same("operations in docs/architecture.md", names([sentence]), operations)


def test_tensors_of_architecture():
    same("tensors in docs/architecture.md", names(rows(ARCHITECTURE, "| tensor |")), set(TENSORS))


@pytest.mark.parametrize("container", LAYERS)
def test_stacks_of_contributing(container):
    rendered = "\n".join(re.sub(r"[()]", "", layer) for layer in LAYERS[container])
    stack = re.search(rf"^`{re.escape(container)}`:\n\n```\n(.*?)\n```$", CONTRIBUTING, re.M | re.S)
    assert stack, f"CONTRIBUTING.md has no stack of `{container}`; it is\n\n{rendered}"
    same(
        f"stack of {container} in CONTRIBUTING.md",
        set(re.split(r"[\s|]+", stack[1])),
        set(re.split(r"[\s|]+", rendered)),
    )
    assert stack[1] == rendered, f"CONTRIBUTING.md: the stack of {container} is now\n\n{rendered}"


def test_every_page_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    linked = {target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", readme)}
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    missing = sorted(pages - linked)
    assert not missing, f"README.md does not link {missing}"
