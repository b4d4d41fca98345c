"""Every model family, on tiny checkpoints, against vLLM's own cache."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from checkpoints import DIVIDED, FAMILIES, make
from conftest import engine, random_prompts
from drift import LIKELIEST_KEPT, Answer, answer, drift

from diffkv.quant import ConfigError

NEW_TOKENS = 24
MAX_DRIFT = 0.3
"""Of k8v4, in nats. These models, with logits of standard deviation 4, drift by 0.13 to 0.23."""
FORGETTING = 1.25
"""A cache that forgets all but its window drifts by so many times more; 1.5 to 3.3 are seen."""
THRESHOLDS = {"alpha_high": 2.0, "alpha_low": 1.0}
WINDOW_ONLY = {"diffkv_alpha_high": 1e6, "diffkv_alpha_low": 1e6}
PROMPTS = random_prompts(5, 150)
SUPPORTED = [name for name in FAMILIES if name not in ("mistral_window", *DIVIDED)]


def arguments(model: Path, **others: Any) -> dict[str, Any]:
    """A small engine on a tiny checkpoint."""
    return {
        "model": str(model),
        "max_model_len": 512,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 32 << 20,
        "enable_prefix_caching": False,
        **others,
    }


def decode(llm: Any, new_tokens: int = NEW_TOKENS, **settings: Any) -> list[Answer]:
    """Answer PROMPTS greedily, with per-request settings."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0,
        max_tokens=new_tokens,
        ignore_eos=True,
        logprobs=LIKELIEST_KEPT,
        extra_args=settings,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    return [answer(output) for output in llm.generate(prompts, params, use_tqdm=False)]


def token_ids(answers: Sequence[Answer]) -> list[list[int]]:
    return [each.token_ids for each in answers]


def totals(llm: Any) -> dict[str, float]:
    """Of all requests so far. A step without tokens makes the worker hear of the last that ended."""
    llm.llm_engine.step()
    (summary,) = llm.collective_rpc("diffkv_summary")
    return {**summary["totals"], "pages_held": summary["pool"]["pages_held"]}


@dataclass(frozen=True)
class Case:
    """A family's checkpoint and what vLLM's own cache makes of it."""

    model: Path
    stock: list[Answer]


@pytest.fixture(scope="module", params=SUPPORTED)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    model = make(request.param, tmp_path_factory.mktemp(request.param))
    with engine(**arguments(model)) as llm:
        yield Case(model, decode(llm))


def test_checkpoint_does_not_repeat_itself(case: Case) -> None:
    for each in case.stock:
        assert len(set(each.token_ids)) >= NEW_TOKENS // 3


def test_lossless_tokens_equal_stock(case: Case) -> None:
    with engine("k16v16", **arguments(case.model, max_num_batched_tokens=64)) as llm:
        answers = decode(llm)
    assert token_ids(answers) == token_ids(case.stock)
    assert drift(case.stock, answers) < 1e-4


def test_lossy_drift_is_bounded_and_counts_are_right(case: Case) -> None:
    with engine("k8v4-k4v2", THRESHOLDS, **arguments(case.model)) as llm:
        all_high = decode(llm, diffkv="off")
        high_only = totals(llm)
        decode(llm)
        both = totals(llm)
        window_only = decode(llm, **WINDOW_ONLY)
        held = totals(llm)["pages_held"]
    num_tokens = sum(len(prompt) + NEW_TOKENS - 1 for prompt in PROMPTS)
    assert high_only["num_tokens"] == high_only["high"] == num_tokens
    assert high_only["low"] == 0
    low, high = both["low"], both["high"] - high_only["high"]
    assert low > 0
    assert num_tokens - high - low > 0
    assert held == high_only["pages_held"] == both["pages_held"] == 0
    lossy = drift(case.stock, all_high)
    assert lossy < MAX_DRIFT
    assert FORGETTING * lossy < drift(case.stock, window_only)


def test_sliding_window_is_refused_unless_disabled(tmp_path: Path) -> None:
    model = make("mistral_window", tmp_path)
    with (
        pytest.raises(ConfigError, match="--disable-sliding-window") as refused,
        engine("k16v16", **arguments(model)),
    ):
        pass
    assert "\n" not in str(refused.value)
    short = arguments(model, max_model_len=128, disable_sliding_window=True)
    prompt = {"prompt_token_ids": PROMPTS[0][:40]}
    answers = []
    for quant in (None, "k16v16"):
        with engine(quant, **short) as llm:
            from vllm import SamplingParams

            params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
            (output,) = llm.generate(prompt, params, use_tqdm=False)
            answers.append(list(output.outputs[0].token_ids))
    assert answers[0] == answers[1]
