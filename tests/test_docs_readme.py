"""What README.md and docs/ name exists: files, links, make targets, commands, options, metrics."""

import argparse
import importlib
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from diffkv.cli import COMMANDS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "diffkv"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PAGES}
TOP = {path.name for path in ROOT.iterdir()}

LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)")
CODE = re.compile(r"`([^`\n]+)`")
BLOCK = re.compile(r"^```.*?^```", re.M | re.S)

# Looked up in vLLM's sources: importing it would change threads and logging for other tests.
PASS_FLAGS_ON = ("bench", "calibrate", "eval", "generate", "inspect", "serve")
VLLM = find_spec("vllm")
needs_vllm = pytest.mark.skipif(VLLM is None, reason="vLLM is not installed: its sources are read")

PIP_OPTIONS = {"--extra-index-url"}


@pytest.fixture(params=TEXTS, name="page")
def _page(request):
    return ROOT / request.param, TEXTS[request.param]


def vllm_path(name):
    return Path(VLLM.origin).parent / name


def options(command):
    """Options that a command declares."""
    module = importlib.import_module(f"diffkv.cli.{command}")
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {
                name for sub in action.choices.values() for name in sub._option_string_actions
            }
    return found


@pytest.fixture(scope="module", name="known_options")
def _known_options():
    return {command: options(command) for command in COMMANDS}


def anchors(text):
    """Names that a page's headings can be linked by."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere(page):
    path, text = page
    for target, anchor in LINK.findall(text):
        if re.match(r"https?:", target):
            continue
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), (target, anchor)


def test_files_exist(page):
    _, text = page
    for name in CODE.findall(BLOCK.sub("", text)):
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", name):
            continue
        first = name.split("/")[0]
        if "/" in name and first in TOP:
            assert (ROOT / name).exists(), name
        elif name.endswith(".py") and "/" not in name:
            places = (PACKAGE, PACKAGE / "vllm_plugin")
            is_vllms = VLLM is None or vllm_path(name).exists()
            assert is_vllms or any((place / name).exists() for place in places), name


@needs_vllm
def test_files_of_vllm_exist():
    names = set(re.findall(r"`([\w.]+(?:/[\w.]+)*\.py)`", TEXTS["docs/vllm.md"]))
    outside = [
        name for name in names
        if name.split("/")[0] not in TOP and not (PACKAGE / "vllm_plugin" / name).exists()
    ]  # fmt: skip
    assert len(outside) > 10
    for name in outside:
        assert vllm_path(name).exists(), name


def test_make_targets_exist(page):
    _, text = page
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = re.findall(r"(?:^|`)make ([a-z]+)(?=`|$|\s+#)", text, re.M)
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_commands_and_their_options_exist(page, known_options):
    _, text = page
    for command, rest in re.findall(r"\bdiffkv ([a-z]+)((?: +[^\s`|]+)*)", text):
        if f"diffkv {command}" not in "".join(CODE.findall(text)) + "".join(BLOCK.findall(text)):
            continue
        assert command in COMMANDS, command
        if command in PASS_FLAGS_ON:  # the others are vLLM's: see the next test
            continue
        for option in re.findall(r"(?<!\S)--[a-z-]+", rest):
            assert option in known_options[command] | {"--help"}, (command, option)


@needs_vllm
def test_every_option_is_known_to_somebody(page, known_options):
    _, text = page
    ours = set().union(*known_options.values()) | {"--help"} | PIP_OPTIONS
    rest = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - ours
    sources = "".join(
        vllm_path(name).read_text(encoding="utf-8")
        for name in (
            "engine/arg_utils.py", "config/cache.py", "config/model.py",
            "entrypoints/launchers/cli_args.py",
        )
    )  # fmt: skip
    sources += "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("benchmarks/*.py"))
    sources += "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("training/**/*.py"))
    for option in rest:
        name = option.removeprefix("--")
        names = {name, name.removeprefix("no-")}
        assert any(n in sources or n.replace("-", "_") in sources for n in names), option


def test_readme_names_every_command():
    for command in COMMANDS:
        assert f"diffkv {command}" in TEXTS["README.md"]


def test_readme_lists_the_options_of_the_cache(known_options):
    rows = re.findall(r"^\| `(--[a-z-]+)` \|", TEXTS["README.md"], re.M)
    cache = {o for o in known_options["serve"] if not o.startswith("--no-")} - {"--help", "-h"}
    assert set(rows) == cache & known_options["generate"]


def test_metrics_exist():
    source = (PACKAGE / "vllm_plugin" / "metrics.py").read_text(encoding="utf-8")
    rows = "\n".join(re.findall(r"^\| `diffkv_.*$", TEXTS["docs/vllm.md"], re.M))
    named = re.findall(r"`diffkv_(\w+?)(?:_total(?=`[^\n]*counter))?`", rows)
    assert len(named) > 10
    for name in named:
        assert f'"{name}"' in source, name


def test_python_names_exist():
    """Names of our modules that docs spell out with their module."""
    for text in TEXTS.values():
        for module, name in re.findall(r"`(cache|layout|pool|policy|ops)\.([a-z_]\w+)`", text):
            if name == "py":
                continue
            source = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
            assert re.search(rf"^(?:    )?def {name}\b|^{name} = ", source, re.M), (module, name)
