"""Models with recurrent states beside full attention: between its layers, or in the same ones."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make
from conftest import engine, greedy, random_prompts
from stepping import check_empty, manager
from test_models import MAX_DRIFT, THRESHOLDS, WINDOW_ONLY, Answer, decode, drift

from diffkv.quant import ConfigError

NEW_TOKENS = 60
PROMPTS = random_prompts(10, 700)
LITTLE_BYTES = {"granite_hybrid": 4_000_000, "falcon_h1": 6_000_000}
"""By families, so that requests are preempted."""


@dataclass(frozen=True)
class Case:
    """A family's checkpoint and what vLLM's own cache makes of it."""

    family: str
    model: Path
    token_ids: list[list[int]]
    answers: list[Answer]

    def settings(self, **others: Any) -> dict[str, Any]:
        return {**settings(self.model), "enable_prefix_caching": None, **others}


def settings(model: Path) -> dict[str, Any]:
    return {
        "model": str(model),
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 32 << 20,
    }


@pytest.fixture(scope="module", params=LITTLE_BYTES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    model = make(request.param, tmp_path_factory.mktemp(request.param))
    with engine(**settings(model)) as llm:
        return Case(request.param, model, greedy(llm, PROMPTS, NEW_TOKENS).token_ids, decode(llm))


def test_lossless_tokens_equal_stock(case: Case) -> None:
    """With preemptions, and prompts in chunks."""
    little = {
        "kv_cache_memory_bytes": LITTLE_BYTES[case.family],
        "max_num_batched_tokens": 96,
    }
    with engine("k16v16", **case.settings(**little)) as llm:
        run = greedy(llm, PROMPTS, NEW_TOKENS)
        assert run.token_ids == case.token_ids
        llm.llm_engine.step()  # the workers hear of the last end
        check_empty(llm)
        division = manager(llm)._division
    assert run.preemptions > 0
    assert (division.num_layers, division.num_others) == (2, 2)


def test_tokens_of_two_ranks_in_several_processes_equal_stock(
    monkeypatch: pytest.MonkeyPatch, case: Case, two_ranks: dict[str, Any]
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with engine("k16v16", **case.settings(**two_ranks)) as llm:
        assert greedy(llm, PROMPTS[:4], 16).token_ids == [
            tokens[:16] for tokens in case.token_ids[:4]
        ]


def test_lossy_drift_is_bounded(case: Case) -> None:
    with engine("k8v4-k4v2", THRESHOLDS, **case.settings()) as llm:
        lossy = drift(case.answers, decode(llm, diffkv="off"))
        window_only = drift(case.answers, decode(llm, **WINDOW_ONLY))
        llm.llm_engine.step()
        check_empty(llm)
    assert lossy < MAX_DRIFT
    assert lossy < window_only


def test_prefix_caching_is_refused(case: Case) -> None:
    with (
        pytest.raises(ConfigError, match="leave out --enable-prefix-caching") as refused,
        engine("k16v16", **case.settings(enable_prefix_caching=True)),
    ):
        pass
    assert "\n" not in str(refused.value)
