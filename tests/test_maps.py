"""A page that says what is where names every file, once, and none that is gone."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "src" / "diffkv" / "vllm_plugin"


def named(page: str, heading: str) -> list[str]:
    """Names in the first column of the tables below a heading of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    _, found, below = text.partition(f"# {heading}\n")
    assert found, f"{page} has no heading {heading!r}"
    cells = re.findall(r"^\| (`[^|]*) \|", re.split(r"^#", below, flags=re.M)[0], re.M)
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def test_vllm_page_names_every_file_of_the_plugin() -> None:
    files = [path.relative_to(PLUGIN).as_posix() for path in PLUGIN.rglob("*.py")]
    wings = [name for name in files if name.endswith("/__init__.py")]  # a line of text each
    assert sorted(named("docs/vllm.md", "Files")) == sorted(set(files) - set(wings))
