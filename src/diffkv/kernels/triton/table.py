"""Device functions for tables of rows: a head's centre, and where its pages are named (`PoolState`).

A head's table is a pair of pointers: to all leaves, and to its row of the directory. `TABLE` is a
`constants.Table`.
"""

import triton
import triton.language as tl

__all__ = [
    "centre_of",
    "enter_page",
    "leaf_column",
    "leaf_entry",
    "num_leaves",
    "page_where",
    "table_of",
]


@triton.jit
def centre_of(centres_ptr, row, S: tl.constexpr):
    """Where the centre of a head's keys is, or those of some; S is a side of keys."""
    return centres_ptr + row.to(tl.int64) * S.head_dim


@triton.jit
def table_of(leaves_ptr, directory_ptr, row, TABLE: tl.constexpr):
    """The table of a head, or of some heads."""
    return leaves_ptr, directory_ptr + row * TABLE.width


@triton.jit
def leaf_column(leaf, TIER: tl.constexpr, TABLE: tl.constexpr):
    """Where leaf number `leaf` of a tier is in a row of the directory: low ones from the right."""
    if TIER == 0:
        column = leaf
    else:
        column = TABLE.width - 1 - leaf
    return column


@triton.jit
def leaf_entry(directory_ptr, row, number, mask, TIER: tl.constexpr, TABLE: tl.constexpr):
    """The entry of all leaves that names page `number` of a tier, of a row, if the mask says so."""
    column = leaf_column(number // TABLE.entries, TIER, TABLE)
    leaf = tl.load(directory_ptr + row.to(tl.int64) * TABLE.width + column, mask=mask, other=0)
    return leaf * TABLE.entries + number % TABLE.entries


@triton.jit
def num_leaves(pages, TABLE: tl.constexpr):
    """Leaves that name so many pages of one tier."""
    return tl.cdiv(pages, TABLE.entries)


@triton.jit
def page_where(table, number, mask, TIER: tl.constexpr, TABLE: tl.constexpr):
    """Pages `number` of a tier, 0 where the mask says that there is none."""
    leaf = tl.load(table[1] + leaf_column(number // TABLE.entries, TIER, TABLE), mask=mask, other=0)
    return tl.load(table[0] + leaf * TABLE.entries + number % TABLE.entries, mask=mask, other=0)


@triton.jit
def enter_page(
    table, number, page, takes, new_leaf, opens, TIER: tl.constexpr, TABLE: tl.constexpr
):
    """Enter pages as number `number` of a tier where `takes`; where `opens`, in a new leaf.

    Whoever opens a leaf with a page that is not its first one leaves the directory to whoever enters
    that.
    """
    column = leaf_column(number // TABLE.entries, TIER, TABLE)
    leaf = tl.load(table[1] + column, mask=takes & ~opens, other=0)
    leaf = tl.where(opens, new_leaf, leaf)
    tl.store(table[1] + column, leaf, mask=takes & opens & (number % TABLE.entries == 0))
    tl.store(table[0] + leaf * TABLE.entries + number % TABLE.entries, page, mask=takes)
