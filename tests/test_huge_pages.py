"""What a pool's memory is backed with."""

import sys
from pathlib import Path

import pytest
import torch

from diffkv import huge_pages

SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def flags_at(address: int) -> set[str]:
    """Flags of the mapping of this process that an address lies in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            first, end = (int(part, 16) for part in words[0].split("-"))
            inside = first <= address < end
        elif inside and words[0] == "VmFlags:":
            return set(words[1:])
    return set()


@pytest.mark.skipif(sys.platform != "linux" or not SWITCH.exists(), reason="no huge pages here")
def test_whole_huge_pages_of_a_buffer_are_asked_for() -> None:
    size = huge_pages.HUGE_PAGE_BYTES
    buffer = torch.ones(3 * size, dtype=torch.uint8)
    huge_pages.use(buffer)
    first = -buffer.data_ptr() % size
    inside = slice(first, first + 2 * size)
    assert "hg" in flags_at(buffer.data_ptr() + first)
    assert not buffer[inside].any()  # given back, to come anew
    assert buffer[:first].all()  # what shares a page with others is left alone
    assert buffer[inside.stop :].all()


def test_a_buffer_without_a_whole_huge_page_is_left_alone() -> None:
    buffer = torch.ones(1000, dtype=torch.uint8)
    huge_pages.use(buffer)
    assert buffer.all()
