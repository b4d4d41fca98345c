"""Write down what a vLLM has under the names that DiffKV relies on: signatures, fields, values.

    python tools/vllm_surface.py                # the vLLM of this environment
    python tools/vllm_surface.py vllm-*.whl     # a wheel, or a folder that has the package in it

The names are those of `vllm_names`. Python files are read, not imported: a wheel for GPUs does as well
on a machine without one. The result is tests/data/vllm/<minor version>.json; a name that vLLM does not
have is null there.
"""

import argparse
import ast
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

from vllm_names import all_names, inside_names, moved

__all__ = ["DATA", "Surface", "read", "reader", "write"]

DATA = Path(__file__).parents[1] / "tests" / "data" / "vllm"

PACKAGE = "vllm"
LONGEST = 100
"""Characters of an assignment; what is assigned is left out of longer ones."""

Function = ast.FunctionDef | ast.AsyncFunctionDef
Read = Callable[[str], str | None]
"""Text of a file of the wheel or folder, by its path in there; None if there is no such file."""


def reader(source: Path) -> Read:
    """How to read the files of a wheel, or of a folder that has the package in it."""
    if source.suffix == ".whl":
        wheel = ZipFile(source)
        names = set(wheel.namelist())
        return lambda path: wheel.read(path).decode() if path in names else None
    return lambda path: (source / path).read_text("utf-8") if (source / path).is_file() else None


def installed() -> Path:
    """The folder that the vLLM of this environment is in."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit("no vLLM is installed here: name a wheel, or a folder that has it")
    return Path(spec.origin).parents[1]


@dataclass(frozen=True)
class Module:
    """A file of Python: the package that its relative imports start from, its text and statements."""

    package: str
    text: str
    body: list[ast.stmt]


@dataclass(frozen=True)
class Place:
    """A definition and where it is: its module, and the class and name there."""

    module: str
    qualname: str
    node: ast.stmt


class Surface:
    """The definitions of one vLLM, by their names."""

    def __init__(self, read_file: Read) -> None:
        self._read = read_file
        self._module = cache(self._parse)

    def version(self) -> str:
        """That of the files."""
        found = re.search(r"version = '([^']+)'", self._read(f"{PACKAGE}/_version.py") or "")
        if found is None:
            raise SystemExit(f"there is no {PACKAGE}/_version.py with a version")
        return found[1]

    def find(self, name: str) -> Place | None:
        """The definition of `module:name` or `module:Class.name`, through imports and base classes."""
        module, _, qualname = name.partition(":")
        first, _, member = qualname.partition(".")
        place = self._in_module(module, first)
        if place is None or not member:
            return place
        return self._in_class(place, member)

    def _parse(self, name: str) -> Module | None:
        path = name.replace(".", "/")
        parent = name.rpartition(".")[0]
        for package, file in ((name, f"{path}/__init__.py"), (parent, f"{path}.py")):
            text = self._read(file)
            if text is not None:
                return Module(package, text, ast.parse(text).body)
        return None

    def _in_module(
        self, module: str, name: str, asked: frozenset[tuple[str, str]] = frozenset()
    ) -> Place | None:
        """The first definition of a name in a module, or in the one that it is imported from.

        Args:
            module: the module's full name.
            name: a name at its top.
            asked: what led here, since modules may import from each other.
        """
        parsed = self._module(module)
        if parsed is None or (module, name) in asked:
            return None
        asked |= {(module, name)}
        for node in _statements(parsed.body):
            if name in _defined(node):
                return Place(module, name, node)
            for target, original in _imported(node, name, parsed.package):
                place = self._in_module(target, original, asked)
                if place is not None:
                    return place
        return None

    def _in_class(self, place: Place, member: str) -> Place | None:
        for cls, node in self._classes(place):
            qualname = f"{cls.qualname}.{member}"
            for inside in _statements(node.body):
                if member in _defined(inside) and "overload" not in _decorators(inside):
                    return Place(cls.module, qualname, inside)
            for deeper in ast.walk(node):
                if isinstance(deeper, ast.stmt) and f"self.{member}" in _defined(deeper):
                    return Place(cls.module, qualname, deeper)
        return None

    def _classes(self, place: Place) -> Iterator[tuple[Place, ast.ClassDef]]:
        """A class and its bases, as far as they are vLLM's."""
        if not isinstance(place.node, ast.ClassDef):
            return
        yield place, place.node
        for base in place.node.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            parent = self._in_module(place.module, ast.unparse(base))
            if parent is not None:
                yield from self._classes(parent)

    def describe(self, name: str, place: Place | None, with_inside: bool) -> dict[str, str] | None:
        """What is there under a name of the list; None if nothing is.

        Args:
            name: as the list has it.
            place: what `find` found, under that name or the one that this version has for it.
            with_inside: whether to add `body` or `members`.

        Returns:
            `is`, the definition without what it does; and where that says something, `at`: the name
            under which it is defined, `how`: decorators, `alias`: member of an enumeration with the same
            value, `body`: a digest of what a function does, `members`: names in a class and its bases,
            `abstract`: those that a class made of it must have.
        """
        if place is None:
            return None
        facts = {"is": _declaration(place.node)}
        at = f"{place.module}:{place.qualname}"
        if at != name:
            facts["at"] = at
        if decorators := _decorators(place.node):
            facts["how"] = " ".join(decorators)
        if alias := self._alias(place):
            facts["alias"] = alias
        if with_inside and isinstance(place.node, ast.ClassDef):
            facts |= self._members(place)
        elif with_inside:
            module = self._module(place.module)
            assert module is not None, f"{place.module} was read before"
            facts["body"] = _digest(place.node, module.text)
        return facts

    def _members(self, place: Place) -> dict[str, str]:
        """Names that a class is looked into for, without private ones; and its abstract methods."""
        abstract: dict[str, bool] = {}
        for _, node in self._classes(place):
            for inside in _statements(node.body):
                for name in _defined(inside):
                    abstract.setdefault(name, "abstractmethod" in _decorators(inside))
        public = sorted(name for name in abstract if not name.startswith("_"))
        members = {"members": " ".join(public)}
        if missing := " ".join(name for name in sorted(abstract) if abstract[name]):
            members["abstract"] = missing
        return members

    def _alias(self, place: Place) -> str | None:
        """The member of an enumeration that this one is another name of."""
        owner, _, member = place.qualname.rpartition(".")
        parent = self._in_module(place.module, owner) if owner else None
        if parent is None or not isinstance(parent.node, ast.ClassDef):
            return None
        if not any(ast.unparse(base).endswith("Enum") for base in parent.node.bases):
            return None
        values: dict[str, str] = {}
        for node in parent.node.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                (first,) = _defined(node)
                original = values.setdefault(ast.unparse(node.value), first)
                if first == member and original != member:
                    return original
        return None


def _imported(node: ast.stmt, name: str, package: str) -> Iterator[tuple[str, str]]:
    """Where a statement takes a name from: a module, and the name there."""
    if isinstance(node, ast.ImportFrom):
        parts = package.split(".")
        above = parts[: len(parts) - node.level + 1] if node.level else []
        module = ".".join([*above, node.module] if node.module else above)
        yield from ((module, a.name) for a in node.names if (a.asname or a.name) == name)
    elif "MODULE_ATTRS" in _defined(node) and isinstance(node, ast.Assign):
        # vLLM's own table of names that its package imports when they are asked for
        target, _, original = ast.literal_eval(node.value).get(name, "").partition(":")
        if original:
            yield package + target, original


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that define names here: those inside `if` and `try` too, not those inside functions."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements(node.body)
            for handler in getattr(node, "handlers", ()):
                yield from _statements(handler.body)
            yield from _statements(node.orelse)


def _defined(node: ast.stmt) -> list[str]:
    """Names that a statement defines; of `self.name = ...`, `self.name`."""
    if isinstance(node, Function | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.AnnAssign):
        return [ast.unparse(node.target)]
    if isinstance(node, ast.Assign):
        return [ast.unparse(target) for target in node.targets]
    return []


def _decorators(node: ast.stmt) -> list[str]:
    return [ast.unparse(each) for each in getattr(node, "decorator_list", ())]


def _declaration(node: ast.stmt) -> str:
    """A definition in one line, without what is inside."""
    if isinstance(node, Function):
        kind = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        return f"{kind} {node.name}({ast.unparse(node.args)}){returns}"
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in [*node.bases, *node.keywords])
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    text = ast.unparse(node)
    return text if len(text) <= LONGEST else text.partition(" = ")[0] + " = ..."


def _digest(node: ast.stmt, text: str) -> str:
    """Changes with what a function does, not with its comments, its docstring or its place."""
    assert isinstance(node, Function), "only functions have a body to compare"
    lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
    docstring = node.body[0]
    if isinstance(docstring, ast.Expr) and isinstance(docstring.value, ast.Constant):
        skipped = range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1)
    else:
        skipped = range(0)
    every = text.splitlines()
    code = [every[line - 1].strip() for line in lines if line not in skipped]
    code = [line for line in code if line and not line.startswith("#")]
    return hashlib.sha256("\n".join(code).encode()).hexdigest()[:12]


def minor(version: str) -> str:
    """The minor version, "0.33" for example."""
    return ".".join(version.split(".")[:2])


def read(source: Path) -> tuple[str, dict[str, dict[str, str] | None]]:
    """The version of a vLLM, and what it has under each name of `vllm_names`."""
    surface = Surface(reader(source))
    version = surface.version()
    elsewhere, inside = moved(minor(version)), inside_names()
    return version, {
        name: surface.describe(name, surface.find(elsewhere.get(name, name)), name in inside)
        for name in all_names()
    }


def write(folder: Path, version: str, facts: dict[str, dict[str, str] | None]) -> Path:
    """Write a version's file: a name a line, so that two files can be compared."""
    path = folder / f"{minor(version)}.json"
    lines = [f"{json.dumps(name)}: {json.dumps(fact)}" for name, fact in sorted(facts.items())]
    text = ",\n".join([f'"version": {json.dumps(version)}', *lines])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{{\n{text}\n}}\n", encoding="utf-8")
    return path


def main() -> None:
    """Read one vLLM, write its file, name what is missing."""
    parser = argparse.ArgumentParser(
        description="Write down what a vLLM has that DiffKV relies on."
    )
    parser.add_argument("source", nargs="?", type=Path, help="wheel or folder; default: installed")
    version, facts = read(parser.parse_args().source or installed())
    print(f"{write(DATA, version, facts)} written, of vLLM {version}")
    for name in (name for name, fact in facts.items() if fact is None):
        print(f"missing: {name}")


if __name__ == "__main__":
    main()
