"""Two ranks give what one gives; what cannot be split is refused before a worker starts."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import test_models
from checkpoints import make
from conftest import MODEL, engine, greedy, metric
from test_models import Answer, arguments, decode, drift, token_ids
from test_prefix_caching import words

from diffkv.quant import ConfigError
from diffkv.vllm_plugin.messages import PagesHeld, ReportMessage

SHARED, NUM_CHATS, NUM_TURNS, NEW_TOKENS = 150, 3, 3, 6
SUMMATION_DRIFT = 1e-3
"""In nats: two halves of a sum are added in another order, and a code may fall on its other side."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama2", tmp_path_factory.mktemp("llama2"))


def run(
    quant: str, options: dict[str, Any] | None, model: Path, **args: Any
) -> tuple[list[Answer], list[dict[str, Any]]]:
    """Answers, and each rank's summary once all requests are over."""
    with engine(quant, options, **arguments(model, **args)) as llm:
        answers = decode(llm)
        llm.llm_engine.step()
        return answers, llm.collective_rpc("diffkv_summary")


@pytest.mark.parametrize(
    ("quant", "options"),
    [("k16v16", None), ("k8v4-k4v2", test_models.THRESHOLDS)],
    ids=["lossless", "lossy"],
)
def test_two_ranks_equal_one(
    quant: str, options: dict[str, Any] | None, model: Path, two_ranks: dict[str, Any]
) -> None:
    split, ranks = run(quant, options, model, **two_ranks)
    whole, (one,) = run(quant, options, model, tensor_parallel_size=1)
    assert token_ids(split) == token_ids(whole)
    assert drift(whole, split) < SUMMATION_DRIFT
    assert len(ranks) == 2
    for rank in ranks:
        assert rank["pool"]["pages_held"] == 0
        assert rank["totals"]["num_tokens"] == one["totals"]["num_tokens"]
    # A rank has half of the heads: its counts are means over those.
    for name in ("high", "low"):
        mean = sum(rank["totals"][name] for rank in ranks) / 2
        assert mean == pytest.approx(one["totals"][name], rel=0.01)
    assert sum(r["totals"]["num_pages"] for r in ranks) == pytest.approx(
        one["totals"]["num_pages"], rel=0.01
    )


def talk(llm: Any) -> tuple[list[list[list[int]]], int]:
    """Answers of chats that begin alike, by turn, and how many tokens of their prompts were found."""
    before = metric(llm, "vllm:prefix_cache_hits")
    chats = [[1, *words(SHARED - 1, 0)] for _ in range(NUM_CHATS)]
    answers: list[list[list[int]]] = []
    for turn in range(NUM_TURNS):
        chats = [
            [*chat, *(answers[-1][number] if answers else ()), *words(25, 10 * turn + number)]
            for number, chat in enumerate(chats)
        ]
        answers.append(greedy(llm, chats, NEW_TOKENS).token_ids)
    return answers, int(metric(llm, "vllm:prefix_cache_hits") - before)


def test_turns_of_two_ranks_equal_stock(model: Path, two_ranks: dict[str, Any]) -> None:
    args = arguments(model, **two_ranks)
    with engine(**args) as llm:
        expected, _ = talk(llm)
    args["enable_prefix_caching"] = True
    with engine("k16v16", {"segment": 128}, **args) as llm:
        answers, found = talk(llm)
        assert answers == expected
        assert found > (NUM_TURNS - 1) * NUM_CHATS * SHARED
        assert llm.reset_prefix_cache()
        assert talk(llm) == (expected, found)


def test_the_fullest_rank_decides() -> None:
    left = ReportMessage(
        {"a": PagesHeld(7, (2, 6), 30, 1, {4: 5, 5: 2}), "b": PagesHeld(1, (1, 1), 5)}
    )
    right = ReportMessage(
        {"a": PagesHeld(5, (4, 5), 29, 1, {4: 3, 5: 6}), "c": PagesHeld(9, (0, 3), 80)}
    )
    expected = {
        "a": PagesHeld(7, (4, 6), 29, 1, {4: 5, 5: 6}),
        "b": PagesHeld(1, (1, 1), 5),
        "c": PagesHeld(9, (0, 3), 80),
    }
    assert left.aggregate(right).reports == expected
    assert right.aggregate(left).reports == expected
    assert left.reports["a"].num_pages == 7 and left.reports["a"].closed[5] == 2, (
        "aggregating changed a message"
    )


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism: use --tensor-parallel-size"),
        ({"data_parallel_size": 2}, "not supported for single-process"),
    ],
    ids=["pipeline", "data"],
)
def test_other_parallelism_is_refused_in_process(argument: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused, engine("k8v4", **argument):
        pass
    assert "\n" not in str(refused.value)


def test_pipeline_parallelism_is_one_line_on_the_command_line() -> None:
    command = [
        sys.executable,
        "-m",
        "diffkv",
        "generate",
        "--model",
        MODEL,
        "--prompt",
        "a",
        "--pipeline-parallel-size",
        "2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    ours = [line for line in done.stderr.splitlines() if line.startswith("diffkv:")]
    assert ours == [
        "diffkv: DiffKV does not support pipeline parallelism: use --tensor-parallel-size instead"
    ]
