"""Every weight format, on tiny checkpoints: the cache does not care what weights are made of.

In 16 bits two ways to sum attention differ in the last bits, and 8-bit activations make more of that. So
answers may part, but only where vLLM's own run finds two tokens about as likely; until then the logits
must agree. A CPU runs the 4-bit formats in 16 bits only.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from checkpoints import FORMATS, make, make_quantised
from conftest import engine
from test_models import PROMPTS, Answer, arguments, decode, drift, totals

from diffkv.quant import ConfigError

DTYPES = {"gptq": "float16", "awq": "float16", "fp8": "bfloat16", "int8": "bfloat16"}
MAX_DRIFT = {"gptq": 0.01, "awq": 0.01, "fp8": 0.2, "int8": 0.2}
"""In nats, several times what is seen: 0.003 in float16, 0.05 to 0.1 with 8-bit activations."""
ABOUT_AS_LIKELY = 0.5
"""In nats: eight steps of bfloat16 for a logit of 8 to 16. Half of all steps have a wider margin."""
ALWAYS_SAME = 8
"""Tokens at the beginning of each answer, where nothing but the cache's sums is rounded differently."""
INT4 = ("gptq", "awq")
HAS_INT4 = torch.cpu._is_avx512_supported()
"""vLLM's CPU build without AVX-512 has no kernel for them."""


def partings(stock: Sequence[Answer], ours: Sequence[Answer]) -> list[tuple[int, float]]:
    """Step at which each answer parts from stock's, and by how much stock preferred its own token."""
    found = []
    for ref, answer in zip(stock, ours, strict=True):
        for step, logprobs in enumerate(ref.logprobs):
            if ref.token_ids[step] != answer.token_ids[step]:
                second, first = sorted(logprobs.values())[-2:]
                found.append((step, first - second))
                break
    return found


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=pytest.mark.skipif(name in INT4 and not HAS_INT4, reason="needs AVX-512")
        )
        for name in FORMATS
    ],
)
def test_format_is_served_as_by_stock(name: str, tmp_path: Path) -> None:
    model = make_quantised("llama3", name, tmp_path, getattr(torch, DTYPES[name]))
    args = arguments(model, dtype=DTYPES[name])
    with engine(**args) as llm:
        stock = decode(llm)
    with engine("k16v16", **args) as llm:
        ours = decode(llm)
        used = totals(llm)
    assert used["num_requests"] == len(PROMPTS)
    assert used["num_pages"] > 0
    assert used["pages_held"] == 0
    assert drift(stock, ours) < MAX_DRIFT[name]
    parted = partings(stock, ours)
    assert all(margin < ABOUT_AS_LIKELY for _, margin in parted)
    if DTYPES[name] == "float16":
        assert all(step >= ALWAYS_SAME for step, _ in parted)


@pytest.mark.parametrize(
    ("family", "name", "words"),
    [
        pytest.param(
            "qwen3_moe",
            "awq",
            "No WNA16 MoE backend" if HAS_INT4 else "int4 weights, on a CPU without AVX-512",
            id="awq experts",
            marks=pytest.mark.skipif(
                torch.cpu._is_amx_tile_supported(), reason="vLLM runs them on a CPU with AMX"
            ),
        ),
        pytest.param("llama3", None, "static_scaled_fp8_quant", id="fp8 from unquantised"),
    ],
)
def test_what_vllm_cannot_run_on_a_cpu_is_one_line(
    family: str, name: str | None, words: str, tmp_path: Path
) -> None:
    if name is None:
        model, others = make(family, tmp_path), {"quantization": "fp8"}
    else:
        model, others = make_quantised(family, name, tmp_path), {}
    args = arguments(model, dtype="bfloat16", **others)
    with pytest.raises(ConfigError, match=words) as refused, engine("k16v16", **args):
        pass
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", INT4)
def test_int4_without_avx512_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cpu._is_avx512_supported", lambda: False)
    args = arguments(make_quantised("llama3", name, tmp_path, torch.float16), dtype="float16")
    with (
        pytest.raises(ConfigError, match="int4 weights, on a CPU without AVX-512: "),
        engine("k16v16", **args),
    ):
        pass
