"""What README.md and docs/ name exists: files, links, targets, commands, options, metrics, figures."""

import argparse
import importlib
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import real_model_tables

from diffkv.cli import COMMANDS
from diffkv.lab import rows

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "diffkv"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PAGES}
TOP = {path.name for path in (*ROOT.iterdir(), *PACKAGE.iterdir())}
OURS = {path.name for folder in ("src", "tests") for path in (ROOT / folder).rglob("*.py")}

HISTORY = "docs/decisions.md"
"""Its commands are those of the commits that it names."""

LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)")
CODE = re.compile(r"`([^`\n]+)`")
BLOCK = re.compile(r"^```.*?^```", re.M | re.S)

# Looked up in vLLM's sources: importing it would change threads and logging for other tests.
PASS_FLAGS_ON = ("bench", "calibrate", "eval", "generate", "inspect", "serve")
VLLM = find_spec("vllm")
needs_vllm = pytest.mark.skipif(VLLM is None, reason="vLLM is not installed: its sources are read")

PIP_OPTIONS = {"--extra-index-url", "--no-deps"}


@pytest.fixture(params=TEXTS, name="page")
def _page(request):
    return ROOT / request.param, TEXTS[request.param]


@pytest.fixture(params=[name for name in TEXTS if name != HISTORY], name="present_page")
def _present_page(request):
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
    path, text = page
    for name in CODE.findall(BLOCK.sub("", text)):
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", name):
            continue
        if "/" in name and name.split("/")[0] in TOP:
            assert any((place / name).exists() for place in (ROOT, PACKAGE, path.parent)), name
        elif name.endswith(".py") and "/" not in name:
            is_vllms = VLLM is None or vllm_path(name).exists()
            assert is_vllms or name in OURS or (path.parent / name).exists(), name


@needs_vllm
def test_files_of_vllm_exist():
    names = set(re.findall(r"`([\w.]+(?:/[\w.]+)*\.py)`", TEXTS["docs/vllm.md"]))
    outside = [
        name
        for name in names
        if name.split("/")[0] not in TOP
        and name not in OURS
        and not (PACKAGE / "vllm_plugin" / name).exists()
    ]
    assert len(outside) > 10
    for name in outside:
        assert vllm_path(name).exists(), name


def test_make_targets_exist(page):
    _, text = page
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = re.findall(r"(?:^|`)make ([a-z]+)(?=`|$|\s+#)", text, re.M)
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_commands_and_their_options_exist(present_page, known_options):
    _, text = present_page
    for command, rest in re.findall(r"\bdiffkv ([a-z]+)((?: +[^\s`|]+)*)", text):
        if f"diffkv {command}" not in "".join(CODE.findall(text)) + "".join(BLOCK.findall(text)):
            continue
        assert command in COMMANDS, command
        if command in PASS_FLAGS_ON:  # the others are vLLM's: see the next test
            continue
        for option in re.findall(r"(?<!\S)--[a-z-]+", rest):
            assert option in known_options[command] | {"--help"}, (command, option)


@needs_vllm
def test_every_option_is_known_to_somebody(present_page, known_options):
    _, text = present_page
    ours = set().union(*known_options.values()) | {"--help"} | PIP_OPTIONS
    rest = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - ours
    files = [
        vllm_path(name) for name in ("engine/arg_utils.py", "config/cache.py", "config/model.py")
    ]
    files += vllm_path("entrypoints").glob("*/cli_args.py")  # versions have it in different folders
    sources = "".join(path.read_text(encoding="utf-8") for path in files)
    sources += "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tools/*.py"))
    sources += "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("training/**/*.py"))
    for option in rest:
        name = option.removeprefix("--")
        names = {name, name.removeprefix("no-")}
        assert any(n in sources or n.replace("-", "_") in sources for n in names), option


def test_usage_lists_every_command():
    rows = re.findall(r"^\| `diffkv ([a-z]+)\b", TEXTS["docs/usage.md"], re.M)
    assert set(rows) == set(COMMANDS)


def test_usage_lists_the_options_of_the_cache(known_options):
    rows = re.findall(r"^\| `(--[a-z-]+)` \|", TEXTS["docs/usage.md"], re.M)
    cache = {o for o in known_options["serve"] if not o.startswith("--no-")} - {"--help", "-h"}
    assert set(rows) == cache & known_options["generate"]


@pytest.mark.parametrize(("name", "most"), [("README.md", 140), ("docs/decisions.md", 200)])
def test_page_is_short(name, most):
    assert len(TEXTS[name].splitlines()) <= most


def test_readmes_figures_were_measured():
    """Requests at once, tokens/s and bytes a token of each row are those of one run on a GPU."""
    measured = {
        tuple(f"{run[key]:,.0f}" for key in ("max_running", "tokens_per_s", "bytes_per_token"))
        for file in (ROOT / "docs" / "results" / "gpu").glob("*.jsonl")
        for row in rows.read(file)
        if (run := row.measured) and row.kind == "throughput"
    }
    table = TEXTS["README.md"].split("| KV cache |")[1].split("\n\n")[0].splitlines()[2:]
    figures = [tuple(cell.strip(" *") for cell in row.split("|")[2:5]) for row in table]
    assert len(figures) >= 3
    for row in figures:
        assert row in measured, f"{row} of README.md is in no row of docs/results/gpu"


@pytest.mark.parametrize("table", real_model_tables.TABLES, ids=lambda table: table.page)
def test_tables_of_the_real_model_are_its_results(table):
    """They are what `python tools/real_model_tables.py` writes, without a row that is missing."""
    found = real_model_tables.measured(rows.read(real_model_tables.RESULTS))
    assert table.text(found) in TEXTS[table.page]
    assert set(table.rows) <= set(found)


def test_pages_that_sources_name_exist():
    for folder in ("src", "tests", "tools", "benchmarks", "training", "examples"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix not in {".py", ".h", ".cpp", ".md"}:
                continue
            for page in re.findall(r"\bdocs/[\w/.-]+\.md\b", path.read_text(encoding="utf-8")):
                assert (ROOT / page).exists(), f"{path.relative_to(ROOT)}: {page}"


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
