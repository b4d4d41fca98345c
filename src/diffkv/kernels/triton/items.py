"""What is listed for attention: an item for each chunk, in lists of one kind each.

Low chunks are listed before high ones: each tier has code of its own, about 10 KB for its loop alone,
and programs side by side should run the same, or they read it anew all the time.
"""

import triton
import triton.language as tl

__all__ = [
    "ITEM_FIELDS",
    "LISTS",
    "ROW_FIELDS",
    "field_of",
    "item_at",
    "item_of",
    "item_of_row",
    "list_start",
    "num_items_of",
    "open_list",
    "row_at",
]

ITEM_FIELDS = 6
"""int32 fields of an item: row, its number, entry of the leaves with its first page, tokens, first tile
whose probabilities are kept. Of closed rows: row, its number, place of the first one in the chains, how
many, which part of each, and of how many."""

LISTS = 4
"""Lists of items, in the order in which they are worked on: low ones of closed rows, of open ones, and
high ones likewise. Each has room for the most items of closed, or of open rows."""

ROW_FIELDS = 4
"""int32 fields of a row: number of the open row's first item, how many it has, and of closed rows."""

_FIELDS = tl.constexpr(ITEM_FIELDS)
_ROW_FIELDS = tl.constexpr(ROW_FIELDS)


@triton.jit
def list_start(LIST: tl.constexpr, room, closed_room):
    """Where list number `LIST` begins: see `LISTS`."""
    return closed_room * ((LIST + 1) // 2) + room * (LIST // 2)


@triton.jit
def open_list(TIER: tl.constexpr):
    """Number of a tier's list of open rows; that of closed ones is before it."""
    return 3 - 2 * TIER


@triton.jit
def item_at(items_ptr, place):
    """Where the fields of what is listed at a place begin."""
    return items_ptr + place * _FIELDS


@triton.jit
def row_at(row_items_ptr, row):
    """Where the fields of a row begin."""
    return row_items_ptr + row * _ROW_FIELDS


@triton.jit
def item_of(items_ptr, at):
    """(row, number, and the two fields that follow) of what is listed at a place: see `ITEM_FIELDS`."""
    item_ptr = item_at(items_ptr, at)
    return (
        tl.load(item_ptr),
        tl.load(item_ptr + 1),
        tl.load(item_ptr + 2),
        tl.load(item_ptr + 3),
    )


@triton.jit
def field_of(items_ptr, at, FIELD: tl.constexpr):
    """One field of what is listed at a place."""
    return tl.load(item_at(items_ptr, at) + FIELD)


@triton.jit
def num_items_of(row_items_ptr, row):
    """How many items a row has, of its open row and of closed ones."""
    at = row_at(row_items_ptr, row)
    return tl.load(at + 1) + tl.load(at + 3)


@triton.jit
def item_of_row(row_items_ptr, row, each):
    """Items number `each` of a row, in the order in which they are merged."""
    at = row_at(row_items_ptr, row)
    num_open = tl.load(at + 1)
    return each + tl.where(each < num_open, tl.load(at), tl.load(at + 2) - num_open)
