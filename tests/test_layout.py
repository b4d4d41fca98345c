"""Pages: sizes, offsets and counts, as literal tables and as invariants of every format."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffkv.layout import MIN_TOKENS_PER_PAGE, PageLayout
from diffkv.quant import BITS, GROUPS, ConfigError, Format, QuantConfig
from diffkv.tier import TierLayout

HEAD_DIMS = range(8, 257, 8)
ALL_FORMATS = [
    Format(k_bits, v_bits, k_groups, v_groups)
    for k_bits in BITS
    for v_bits in BITS
    for k_groups in (GROUPS if k_bits != 16 else (1,))
    for v_groups in (GROUPS if v_bits != 16 else (1,))
]

# (page bytes, tokens of a page in each tier). Pages that were written with other numbers cannot be read.
EXPECTED = {
    "k16v16": {
        64: (4096, 16),
        80: (5120, 16),
        96: (6144, 16),
        128: (8192, 16),
        256: (16384, 16),
    },
    "k8v8": {
        64: (2176, 16),
        80: (2688, 16),
        96: (3200, 16),
        128: (4224, 16),
        256: (8320, 16),
    },
    "k8v4": {
        64: (1664, 16),
        80: (2048, 16),
        96: (2432, 16),
        128: (3200, 16),
        256: (6272, 16),
    },
    "k4v4": {
        64: (1152, 16),
        80: (1408, 16),
        96: (1664, 16),
        128: (2176, 16),
        256: (4224, 16),
    },
    "k4v2": {
        64: (896, 16),
        80: (1088, 16),
        96: (1280, 16),
        128: (1664, 16),
        256: (3200, 16),
    },
    "k8v4-k4v2": {
        64: (1792, 16, 32),
        80: (2176, 16, 32),
        96: (2560, 16, 32),
        128: (3328, 16, 32),
        256: (6400, 16, 32),
    },
    "k8v4g1x2-k4v2g2x4": {
        64: (2112, 18, 29),
        80: (2528, 18, 30),
        96: (2624, 16, 27),
        128: (3392, 16, 28),
        256: (6496, 16, 30),
    },
    "k16v16-k8v4": {
        64: (4512, 17, 43),
        80: (5280, 16, 41),
        96: (6688, 17, 44),
        128: (8864, 17, 44),
        256: (16512, 16, 42),
    },
    "k8v2-k2v1g1x4": {
        64: (1568, 16, 35),
        80: (1888, 16, 37),
        96: (2464, 18, 44),
        128: (2816, 16, 41),
        256: (5376, 16, 46),
    },
}

# The same where generated tokens may push others out: every tier has sums and positions.
EXPECTED_WITH_DROPS = {
    "k16v16": {
        64: (4224, 16),
        80: (5248, 16),
        96: (6272, 16),
        128: (8320, 16),
        256: (16512, 16),
    },
    "k8v8": {
        64: (2304, 16),
        80: (2816, 16),
        96: (3328, 16),
        128: (4352, 16),
        256: (8448, 16),
    },
    "k8v4": {
        64: (1792, 16),
        80: (2176, 16),
        96: (2560, 16),
        128: (3328, 16),
        256: (6400, 16),
    },
    "k4v4": {
        64: (1280, 16),
        80: (1536, 16),
        96: (1792, 16),
        128: (2304, 16),
        256: (4352, 16),
    },
    "k4v2": {
        64: (1024, 16),
        80: (1216, 16),
        96: (1408, 16),
        128: (1792, 16),
        256: (3328, 16),
    },
    "k8v4-k4v2": {
        64: (1792, 16, 28),
        80: (2464, 18, 32),
        96: (2752, 17, 31),
        128: (3584, 17, 32),
        256: (6464, 16, 31),
    },
    "k8v4g1x2-k4v2g2x4": {
        64: (1856, 16, 23),
        80: (2240, 16, 24),
        96: (2624, 16, 25),
        128: (3840, 18, 30),
        256: (6528, 16, 29),
    },
    "k16v16-k8v4": {
        64: (4512, 17, 40),
        80: (5632, 17, 41),
        96: (6272, 16, 39),
        128: (8320, 16, 40),
        256: (17600, 17, 44),
    },
    "k8v2-k2v1g1x4": {
        64: (1536, 16, 29),
        80: (1856, 16, 32),
        96: (2208, 16, 34),
        128: (3360, 19, 44),
        256: (5376, 16, 43),
    },
}

# Tokens of a 6,784-byte page at head_dim 128, in the released DiffKV and here. It pads values to pairs
# of tokens and regions to 32 or 128 bytes: one token less in three of its formats.
ORIGINAL_PAGE_BYTES = 6784
ORIGINAL = {
    "k8v8": (24, 24),
    "k8v4g1x2": (32, 32),
    "k8v4": (32, 32),
    "k8v2": (37, 38),
    "k4v4": (46, 47),
    "k4v2g2x4": (52, 52),
    "k4v2": (60, 60),
    "k4v1": (69, 70),
}


def derive(text, head_dim=128, page_bytes=None, element_bytes=2, drops=False):
    return PageLayout.derive(QuantConfig.parse(text), head_dim, page_bytes, element_bytes, drops)


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("text", EXPECTED)
def test_chosen_pages(text, drops):
    expected = (EXPECTED_WITH_DROPS if drops else EXPECTED)[text]
    chosen = {}
    for head_dim in expected:
        layout = derive(text, head_dim, drops=drops)
        tokens = (tier.tokens_per_page for tier in layout.tiers)
        chosen[head_dim] = (layout.page_bytes, *tokens)
    assert chosen == expected


@pytest.mark.parametrize(
    ("text", "drops", "tracked"),
    [
        ("k8v4", False, [False]),
        ("k8v4", True, [True]),
        ("k8v4-k4v2", False, [True, False]),
        ("k8v4-k4v2", True, [True, True]),
    ],
)
def test_a_tier_keeps_sums_only_for_victims(text, drops, tracked):
    """A high token may be demoted; a low one, or one of a single tier, only dropped."""
    layout, with_drops = derive(text, drops=drops), derive(text, drops=True)
    assert [tier.tracked for tier in layout.tiers] == tracked
    assert layout.drops == drops
    for tier, other in zip(layout.tiers, with_drops.tiers, strict=True):
        assert (
            tier.token_bytes
            == tier.vector_bytes + 8 * tier.tracked
            == (other.token_bytes - 8 * (not tier.tracked))
        )
        if not tier.tracked:
            assert tier.regions["sums"][1] == tier.regions["positions"][1] == 0


@pytest.mark.parametrize(("text", "tokens"), ORIGINAL.items())
def test_original_page(text, tokens):
    page = derive(text, page_bytes=ORIGINAL_PAGE_BYTES, drops=True)
    assert page.high.tokens_per_page == tokens[1]


def test_the_two_pairs_of_the_original():
    plain = derive("k8v4-k4v2", page_bytes=ORIGINAL_PAGE_BYTES, drops=True)
    assert [tier.tokens_per_page for tier in plain.tiers] == [32, 60]
    grouped = derive("k8v4g1x2-k4v2g2x4", page_bytes=ORIGINAL_PAGE_BYTES, drops=True)
    assert [tier.tokens_per_page for tier in grouped.tiers] == [32, 52]


def test_offsets_of_one_page_by_hand():
    # 17 tokens of k8v4: 128 + 4 + 64 + 4 + 4 + 4 bytes each, every region but the last at 16 bytes.
    high = derive("k8v4-k4v2", page_bytes=3584).high
    assert high.regions == {
        "k_codes": (0, 2176),
        "k_meta": (2176, 68),
        "v_codes": (2256, 1088),  # 2176 + 68 = 2244, rounded up
        "v_meta": (3344, 68),
        "sums": (3424, 68),
        "positions": (3492, 68),
    }
    assert high.end == 3560
    assert high.token_bytes == 208
    assert high.unused_share(3584) == pytest.approx(1 - 17 * 208 / 3584)


def test_sixteen_bits_store_the_models_dtype_and_no_scale():
    half, single = derive("k16v16").high, derive("k16v16", element_bytes=4).high
    assert (half.k_code_bytes, single.k_code_bytes) == (256, 512)
    assert (half.token_bytes, single.token_bytes) == (2 * 256, 2 * 512)
    assert half.regions["k_meta"][1] == half.regions["v_meta"][1] == 0


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_format_lies_inside_its_page(head_dim, drops):
    for fmt in ALL_FORMATS:
        page_bytes = -(-TierLayout.place(fmt, head_dim, 2, drops, 17).end // 32) * 32
        layout = PageLayout.derive(QuantConfig(fmt), head_dim, page_bytes, drops=drops)
        tier = layout.high
        spans = list(tier.regions.values())

        assert spans[0][0] == 0
        for (offset, num_bytes), (following, _) in pairwise(spans):
            assert offset + num_bytes <= following, f"{fmt}: regions overlap"
            assert following - (offset + num_bytes) < 16, f"{fmt}: a gap is wider than its padding"
        assert all(offset % 16 == 0 for offset, _ in spans[:-1]), f"{fmt}: a region is not aligned"
        assert spans[-1][0] == sum(spans[-2]), f"{fmt}: positions do not follow the sums"
        assert sum(spans[-1]) == tier.end <= page_bytes
        assert tier.tokens_per_page >= 17

        used = sum(num_bytes for _, num_bytes in spans)
        assert used == tier.tokens_per_page * tier.token_bytes
        one_more = TierLayout.place(fmt, head_dim, 2, drops, tier.tokens_per_page + 1)
        assert one_more.end > page_bytes, f"{fmt}: one more token would have fitted"


@pytest.mark.parametrize("head_dim", [8, 64, 72, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("low", [None, *ORIGINAL])
@pytest.mark.parametrize("high", ORIGINAL)
def test_chosen_page_wastes_little(high, low, head_dim):
    try:
        layout = derive(high if low is None else f"{high}-{low}", head_dim)
    except ConfigError:
        assert low is not None  # a pair whose low tier is not lower, see test_quant
        return
    tokens = [tier.tokens_per_page for tier in layout.tiers]
    assert layout.page_bytes % 32 == 0
    assert MIN_TOKENS_PER_PAGE <= min(tokens) < 2 * MIN_TOKENS_PER_PAGE + 1
    limit = 0.05 if head_dim == 8 else 0.025  # padding is a larger share of a small page
    assert max(tier.unused_share(layout.page_bytes) for tier in layout.tiers) < limit


def most_new_pages(tokens_per_page, num_tokens):
    """By trying every split over the tiers, and every fill of the last page of each."""

    def most_in_tier(per_page, num):
        return max(-(-(held + num) // per_page) - -(-held // per_page) for held in range(per_page))

    if len(tokens_per_page) == 1:
        return most_in_tier(tokens_per_page[0], num_tokens)
    return max(
        most_in_tier(tokens_per_page[0], high) + most_in_tier(tokens_per_page[1], num_tokens - high)
        for high in range(num_tokens + 1)
    )


@pytest.mark.parametrize("text", ["k8v4", "k8v4-k4v2", "k8v8-k4v1", "k8v4g1x2-k8v4"])
@pytest.mark.parametrize("page_bytes", [96, 128, 192, 320])
def test_max_new_pages_is_the_worst_case_exactly(text, page_bytes):
    layout = derive(text, 8, page_bytes)
    per_page = [tier.tokens_per_page for tier in layout.tiers]
    for num_tokens in range(30):
        worst = most_new_pages(per_page, num_tokens)
        assert layout.max_new_pages(num_tokens) == worst, (
            f"{num_tokens} tokens, pages of {per_page}"
        )
        assert layout.max_pages(num_tokens) == worst


@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_max_new_pages_covers_steps_taken_apart(first, second):
    layout = derive("k8v4-k4v2")
    together = layout.max_new_pages(first + second)
    assert together <= layout.max_new_pages(first) + layout.max_new_pages(second)


def test_bytes_per_token_spread_the_whole_page():
    layout = derive("k8v4-k4v2")
    assert layout.page_token_bytes(0) == 3328 / 16
    assert layout.page_token_bytes(1) == 3328 / 32


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"head_dim": 0}, "head_dim must be a positive multiple of 8, got 0"),
        ({"head_dim": -64}, "head_dim must be a positive multiple of 8, got -64"),
        ({"head_dim": 100}, "head_dim must be a positive multiple of 8, got 100"),
        ({"page_bytes": 100}, "page_bytes must be a multiple of 32 up to 1048576, got 100"),
        ({"page_bytes": 0}, "page_bytes must be a multiple of 32 up to 1048576, got 0"),
        ({"page_bytes": -32}, "page_bytes must be a multiple of 32 up to 1048576, got -32"),
        (
            {"page_bytes": 2**20 + 32},
            "page_bytes must be a multiple of 32 up to 1048576, got 1048608",
        ),
        (
            {"page_bytes": 256},
            "no k8v8 token fits a page of 256 bytes at head_dim 128: one token needs 296 bytes",
        ),
    ],
)
def test_page_is_refused(kwargs, message):
    with pytest.raises(ConfigError) as error:
        derive("k8v8-k8v4", **kwargs)
    assert str(error.value) == message


def test_low_tokens_must_not_be_larger_than_high_ones():
    with pytest.raises(ConfigError, match=r"low tier k8v4g1x2 takes 204 bytes.* more than 200"):
        PageLayout.derive(QuantConfig.parse("k8v4-k8v4g1x2"), 128)
    with pytest.raises(ConfigError, match="use fewer groups or bits in the low tier"):
        PageLayout.derive(QuantConfig.parse("k4v2-k4v1g4x4"), 64)
