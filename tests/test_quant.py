"""Formats and configurations: what can be said, what is refused, and with which words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffkv.quant import BITS, GROUPS, ConfigError, Format, QuantConfig

ALL_FORMATS = [
    Format(k_bits, v_bits, k_groups, v_groups)
    for k_bits in BITS
    for v_bits in BITS
    for k_groups in (GROUPS if k_bits != 16 else (1,))
    for v_groups in (GROUPS if v_bits != 16 else (1,))
]
formats = st.sampled_from(ALL_FORMATS)


def refusal(parse, text):
    with pytest.raises(ConfigError) as error:
        parse(text)
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("k8v4", Format(8, 4, 1, 1)),
        ("k4v2g2x4", Format(4, 2, 2, 4)),
        ("k16v16", Format(16, 16, 1, 1)),
        ("k16v1g1x4", Format(16, 1, 1, 4)),
        (" K8V4 ", Format(8, 4, 1, 1)),
        ("k8v4g1x1", Format(8, 4, 1, 1)),
    ],
)
def test_format_is_read(text, expected):
    assert Format.parse(text) == expected


def test_groups_are_written_only_where_there_are_any():
    assert str(Format(8, 4, 1, 1)) == "k8v4"
    assert str(Format(8, 4, 1, 2)) == "k8v4g1x2"


def test_there_are_169_formats():
    # 16 bits have one group, four other widths have three choices: 13 for K and 13 for V.
    assert len(ALL_FORMATS) == 169
    assert len({str(fmt) for fmt in ALL_FORMATS}) == 169


@given(formats)
def test_format_survives_its_text(fmt):
    assert Format.parse(str(fmt)) == fmt


@given(formats, formats)
def test_config_survives_its_text_or_is_refused_with_both_names(high, low):
    text = f"{high}-{low}"
    if high != low and low.k_bits <= high.k_bits and low.v_bits <= high.v_bits:
        config = QuantConfig.parse(text)
        assert config.tiers == (high, low)
        assert str(config) == text
        return
    message = refusal(QuantConfig.parse, text)
    assert str(high) in message
    assert str(low) in message


@given(st.text(max_size=20))
def test_any_text_is_a_config_or_a_config_error(text):
    try:
        config = QuantConfig.parse(text)
    except ConfigError:
        return
    assert QuantConfig.parse(str(config)) == config


def test_one_format_is_one_tier():
    config = QuantConfig.parse("k8v4")
    assert config.low is None
    assert config.tiers == (Format(8, 4),)
    assert str(config) == "k8v4"


def test_same_bits_with_other_groups_are_two_tiers():
    assert QuantConfig.parse("k8v4-k8v4g1x2").low == Format(8, 4, 1, 2)


@pytest.mark.parametrize(("text", "bits"), [("k8v4", 6.0), ("k16v16", 16.0), ("k4v1g4x4", 2.5)])
def test_nominal_bits(text, bits):
    assert Format.parse(text).nominal_bits == bits


UNKNOWN = (
    "unknown format {!r}: write k<bits>v<bits>, for example k8v4, or with groups k4v2g2x4; "
    "bits are 1, 2, 4, 8, 16, groups 1, 2, 4"
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("k3v4", "k_bits must be one of 1, 2, 4, 8, 16, got 3"),
        ("k8v0", "v_bits must be one of 1, 2, 4, 8, 16, got 0"),
        ("k8v4g3x1", "k_groups must be one of 1, 2, 4, got 3"),
        ("k8v4g1x8", "v_groups must be one of 1, 2, 4, got 8"),
        ("k16v4g2x1", "k_groups must be 1 where k_bits is 16 (nothing is scaled), got 2"),
        ("k8v16g1x4", "v_groups must be 1 where v_bits is 16 (nothing is scaled), got 4"),
        ("int8", UNKNOWN.format("int8")),
        ("", UNKNOWN.format("")),
        ("v4k8", UNKNOWN.format("v4k8")),
        ("k8v4g1", UNKNOWN.format("k8v4g1")),
        ("k8v-4", UNKNOWN.format("k8v-4")),
        ("k8v4x", UNKNOWN.format("k8v4x")),
    ],
)
def test_format_is_refused(text, message):
    assert refusal(Format.parse, text) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("k8v4-k8v4", "both tiers of k8v4-k8v4 are the same: write one format, k8v4"),
        (
            "k4v2-k8v4",
            "the low tier k8v4 has more bits than the high tier k4v2: "
            "write the higher format first, as in k8v4-k4v2",
        ),
        (
            "k8v2-k4v4",  # K falls, V rises
            "the low tier k4v4 has more bits than the high tier k8v2: "
            "write the higher format first, as in k8v4-k4v2",
        ),
        (
            "k8v8-k8v4-k4v2",
            "'k8v8-k8v4-k4v2' names 3 tiers: a configuration has one (k8v4) or two (k8v4-k4v2)",
        ),
        (
            "0:k16v16,1-:k8v4",
            "formats by layer, as in '0:k16v16,1-:k8v4', are not supported: they gain nothing over one "
            "configuration of the same bytes; name one for all layers, as in k8v4-k4v2",
        ),
        ("k8v4-", UNKNOWN.format("")),
        ("k8v4-k3v2", "k_bits must be one of 1, 2, 4, 8, 16, got 3"),
    ],
)
def test_config_is_refused(text, message):
    assert refusal(QuantConfig.parse, text) == message
