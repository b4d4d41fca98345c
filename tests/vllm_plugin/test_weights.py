"""Every weight format, on tiny checkpoints in bfloat16: the cache does not care what weights are made of.

In bfloat16 two ways to sum attention differ in the last bits, so answers may part where two tokens are
about as likely. Until then their logits must agree.
"""

from pathlib import Path

import pytest
import test_models
from conftest import engine
from test_models import arguments, decode, drift, token_ids, totals

from checkpoints import FORMATS, make, make_quantised  # isort: skip
from diffkv.quant import ConfigError

MAX_DRIFT = 0.1
"""Mean, in nats. Bfloat16 has 8 bits of precision, logits here go up to 16."""
SAME_TOKENS = 8


@pytest.fixture(params=FORMATS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_quantised("llama3", request.param, tmp_path)


def test_format_is_served_as_by_stock(model: Path) -> None:
    args = arguments(model, dtype="bfloat16")
    with engine(**args) as llm:
        stock = decode(llm)
    with engine("k16v16", **args) as llm:
        ours = decode(llm)
        used = totals(llm)
    assert used["num_requests"] == len(test_models.PROMPTS)
    assert used["num_pages"] > 0
    assert used["pages_held"] == 0
    assert drift(stock, ours) < MAX_DRIFT
    same = [a[:SAME_TOKENS] == b[:SAME_TOKENS] for a, b in zip(token_ids(stock), token_ids(ours))]
    assert sum(same) >= len(same) - 1


def test_quantising_online_to_fp8_is_refused_by_vllm_in_one_line(tmp_path: Path) -> None:
    model = make("llama3", tmp_path)
    args = arguments(model, dtype="bfloat16", quantization="fp8")
    with pytest.raises((ConfigError, AttributeError)), engine("k16v16", **args):
        pass
