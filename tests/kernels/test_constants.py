"""Constants of kernels are equal, and hash alike, where all of their fields are."""

import dataclasses

import pytest

pytest.importorskip("triton")
from diffkv.kernels.triton.constants import Table, tiers_of
from diffkv.layout import PageLayout
from diffkv.quant import QuantConfig


def tiers(quant, head_dim=128):
    return tiers_of(PageLayout.derive(QuantConfig.parse(quant), head_dim))


def test_two_pools_of_one_layout_have_the_same_kernels():
    assert tiers("k8v4-k4v2") == tiers("k8v4-k4v2")
    assert hash(tiers("k8v4-k4v2")) == hash(tiers("k8v4-k4v2"))


def test_any_field_makes_a_difference():
    seen = {tiers("k8v4-k4v2"), tiers("k8v4-k4v1"), tiers("k8v4"), tiers("k8v4-k4v2", 64)}
    assert len(seen) == 4
    high, _ = tiers("k8v4-k4v2")
    for changed in ({"sums": 1}, {"tracked": False}, {"k": high.v}):
        other = dataclasses.replace(high, **changed)
        assert other != high and hash(other) != hash(high)
    assert Table(2, 4) != Table(4, 2) and Table(2, 4) != (2, 4)
