"""docs/page-format.md says what the code does."""

import re
from pathlib import Path

import pytest

from diffkv.cli import main
from diffkv.layout import HALF_EMPTY_CONTEXT, PageLayout
from diffkv.quant import QuantConfig

DOCS = Path(__file__).parents[1] / "docs"
PAGE_FORMAT = (DOCS / "page-format.md").read_text(encoding="utf-8")
BLOCK = re.compile(
    r"^```console\n\$ diffkv (?P<command>[^\n]*)\n(?P<output>.*?)^```\n", re.M | re.S
)
BLOCKS = [(match["command"], match["output"]) for match in BLOCK.finditer(PAGE_FORMAT)]

# (high, low) tokens of a 6,784-byte page at head_dim 128 in the released DiffKV.
ORIGINAL = [
    (24, 24),
    (32, 32),
    (32, 32),
    (37, 37),
    (32, 52),
    (32, 60),
    (46, 46),
    (52, 52),
    (60, 60),
    (69, 69),
]


def table(header):
    """Cells of the table that begins with this header line."""
    lines = PAGE_FORMAT[PAGE_FORMAT.index(header) :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize(("command", "output"), BLOCKS, ids=[command for command, _ in BLOCKS])
def test_block_is_what_the_command_prints(capsys, command, output):
    assert main(command.split()) == 0
    assert capsys.readouterr().out == output


def test_there_are_four_blocks():
    assert len(BLOCKS) == PAGE_FORMAT.count("```console") == 4


def test_page_sizes_and_their_waste():
    rows = table("| page bytes |")
    assert len(rows) == 4
    sums = {}
    for cells in rows:
        page_bytes = int(cells[0])
        layout = PageLayout.derive(QuantConfig.parse("k8v4-k4v2"), 128, page_bytes)
        unused = max(tier.unused_share(page_bytes) for tier in layout.tiers)
        context_bytes = HALF_EMPTY_CONTEXT * min(tier.token_bytes for tier in layout.tiers)
        half_empty = len(layout.tiers) * page_bytes / 2 / context_bytes
        shares = (unused, half_empty, unused + half_empty)
        tokens = (str(tier.tokens_per_page) for tier in layout.tiers)
        assert cells[1:] == [*tokens, *(f"{100 * share:.2f}" for share in shares)]
        sums[page_bytes] = unused + half_empty
    chosen = PageLayout.derive(QuantConfig.parse("k8v4-k4v2"), 128).page_bytes
    assert chosen == min(sums, key=lambda page_bytes: sums[page_bytes])
    assert f"{HALF_EMPTY_CONTEXT:,} tokens" in PAGE_FORMAT


def test_tokens_of_the_originals_page():
    rows = table("| configuration |")
    assert sorted(tuple(map(int, row[1].split(", "))) for row in rows) == sorted(ORIGINAL)
    for text, _, here in rows:
        tiers = PageLayout.derive(QuantConfig.parse(text), 128, 6784, drops=True).tiers
        tokens = [tiers[0].tokens_per_page, tiers[-1].tokens_per_page]
        assert [int(number) for number in here.split(", ")] == tokens
    different = {row[0] for row in rows if row[1] != row[2]}
    assert different == {"k8v2", "k4v4", "k4v1"}


def test_planes():
    for cells in table("| byte |"):
        byte = int(cells[0])
        for plane, cell in enumerate(cells[1:]):
            element = int(cell.removeprefix("element "))
            num_bytes = 8 * 4 // 8
            assert (element % num_bytes, element // num_bytes) == (byte, plane)


def test_numbers_of_the_text_are_in_a_checked_place():
    checked = "\n".join(output for _, output in BLOCKS) + "".join(
        line for line in PAGE_FORMAT.splitlines(keepends=True) if line.startswith("|")
    )
    known = set(re.findall(r"\d+", checked)) | {str(HALF_EMPTY_CONTEXT)}
    prose = re.sub(r"(\d),(\d{3})", r"\1\2", BLOCK.sub("", PAGE_FORMAT))
    assert set(re.findall(r"\b\d{3,}\b", prose)) <= known
