"""What caches hold adds up, over sequences, ranks and readings of an engine."""

import pytest

from diffkv.use import CacheUse
from diffkv.vllm_plugin.front.offline import cache_use
from diffkv.vllm_plugin.front.session import Meter
from diffkv.vllm_plugin.options import Options

BF16 = 1024  # bytes of a token on a rank


def totals(num_tokens, high, low, num_bytes, bits):
    """Counts of a rank since its engine began; `bits` of an element, mean over tokens and heads."""
    return {
        "num_tokens": num_tokens,
        "high": high,
        "low": low,
        "num_pages": num_bytes // 512,
        "num_bytes": num_bytes,
        "nominal_bits": bits * num_tokens,
    }


class Engine:
    """Answers the plugin's question with what it is told."""

    def __init__(self):
        self.ranks = [totals(0, 0.0, 0.0, 0, 0)] * 2

    def collective_rpc(self, name):
        assert name == "diffkv_summary"
        return [{"totals": each, "pool": {"bf16_bytes_per_token": BF16}} for each in self.ranks]


def test_uses_add_up_and_are_shown_by_token():
    one = CacheUse(100, 30.0, 60.0, 7, 20_000, 100_000, 16_000.0)
    both = one + CacheUse(300, 90.0, 180.0, 9, 60_000, 300_000, 48_000.0)
    assert both - one == CacheUse(300, 90.0, 180.0, 9, 60_000, 300_000, 48_000.0)
    assert both.per_token() == {
        "bytes_per_token": 200.0,
        "ratio_bf16": 5.0,
        "nominal_ratio_bf16": 6.25,
        "high": 0.3,
        "low": 0.6,
        "dropped": pytest.approx(0.1),
    }


def test_bytes_of_ranks_add_up_and_tokens_are_those_of_a_head():
    engine = Engine()
    engine.ranks = [totals(100, 40.0, 60.0, 10_240, 4), totals(100, 20.0, 80.0, 10_240, 3)]
    use = cache_use(engine.collective_rpc("diffkv_summary"))
    assert (use.tokens, use.high, use.low, use.dropped) == (100, 30.0, 70.0, 0.0)
    assert (use.pages, use.num_bytes, use.bf16_bytes) == (40, 20_480, 2 * 100 * BF16)
    assert use.nominal_ratio_bf16 == pytest.approx(16 / 3.5)


def test_every_reading_of_a_meter_is_of_its_own_requests():
    engine = Engine()
    meter = Meter(engine, Options())
    assert meter.take() is None
    engine.ranks = [totals(100, 50.0, 50.0, 10_240, 4)] * 2
    first = meter.take()
    engine.ranks = [totals(300, 250.0, 50.0, 51_200, 6)] * 2
    second = meter.take()
    assert (first.tokens, first.high, first.nominal_ratio_bf16) == (100, 50.0, 4.0)
    assert (second.tokens, second.high, second.num_bytes) == (200, 200.0, 2 * 40_960)
    assert second.nominal_ratio_bf16 == pytest.approx(16 / 7)  # (6 * 300 - 4 * 100) / 200 bits


def test_vllms_own_cache_is_not_metered():
    assert Meter(None, None).take() is None
