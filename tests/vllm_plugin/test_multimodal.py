"""Prompts that are not tokens alone: images of a vision-language model, and embeddings."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import engine, metric
from stepping import check_idle
from test_models import MAX_DRIFT, THRESHOLDS, WINDOW_ONLY, Answer, answer, drift, token_ids
from test_prefix_caching import words
from vision_checkpoint import IMAGE, SIDE, image, make

from diffkv.layout import PageLayout
from diffkv.quant import QuantConfig
from diffkv.shape import PoolShape
from diffkv.vllm_plugin.scheduler.side import limit_steps

NEW_TOKENS = 16
SEGMENT = 128
TAIL = 16
BEFORE = 100
"""Tokens before an image; a row ends within the image then."""


@dataclass(frozen=True)
class Told:
    """What came of a prompt: its length, the tokens of it that were found, the answer."""

    num_tokens: int
    num_cached: int
    answer: Answer


def arguments(model: Path, **others: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "max_model_len": 1024,
        "max_num_seqs": 4,
        "kv_cache_memory_bytes": 32 << 20,
        "limit_mm_per_prompt": {"image": 2},
        **others,
    }


def tell(llm: Any, prompt: dict[str, Any], **settings: Any) -> Told:
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=20, extra_args=settings
    )
    (output,) = llm.generate(prompt, params, use_tqdm=False)
    num_tokens = len(output.prompt_token_ids or prompt["prompt_embeds"])
    return Told(num_tokens, output.num_cached_tokens, answer(output))


def about(seed: int, after: int = 60, *more: int) -> dict[str, Any]:
    """A prompt with a picture of two tiles; pictures of other seeds have the same text around them."""
    tokens = [1, *words(BEFORE - 1, 0), IMAGE, *words(after, 1), *more]
    return {"prompt_token_ids": tokens, "multi_modal_data": {"image": image(seed, 2 * SIDE)}}


def two_pictures(seed: int) -> dict[str, Any]:
    tokens = [IMAGE, *words(20, 2), IMAGE, *words(9, 3)]
    pictures = [image(seed), image(seed + 1, SIDE, 2 * SIDE)]
    return {"prompt_token_ids": tokens, "multi_modal_data": {"image": pictures}}


def prompts() -> list[dict[str, Any]]:
    return [about(1), about(2), about(1, 61), two_pictures(3), two_pictures(5)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("idefics3"))


@pytest.fixture(scope="module")
def stock(model: Path) -> tuple[list[Answer], Answer]:
    """Answers of vLLM's own cache, and that of a second turn."""
    with engine(**arguments(model)) as llm:
        answers = [tell(llm, prompt).answer for prompt in prompts()]
        next_turn = about(1, 60, *answers[0].token_ids, *words(30, 4))
        return answers, tell(llm, next_turn).answer


def test_pictures_change_answers(stock: tuple[list[Answer], Answer]) -> None:
    cat, dog, _, one, other = token_ids(stock[0])
    assert cat != dog and one != other


def test_tokens_equal_stock_and_only_the_same_picture_is_found(
    model: Path, stock: tuple[list[Answer], Answer]
) -> None:
    chunks = arguments(model, max_num_batched_tokens=96)
    with engine("k16v16", {"segment": SEGMENT}, **chunks) as llm:
        hits = metric(llm, "vllm:prefix_cache_hits")
        first = [tell(llm, prompt) for prompt in prompts()]
        again = [tell(llm, prompt) for prompt in prompts()]
        turn = tell(llm, about(1, 60, *first[0].answer.token_ids, *words(30, 4)))
        assert token_ids([told.answer for told in first]) == token_ids(stock[0])
        assert token_ids([told.answer for told in again]) == token_ids(stock[0])
        assert turn.answer.token_ids == stock[1].token_ids
        hits = metric(llm, "vllm:prefix_cache_hits") - hits
        llm.llm_engine.step()  # the workers hear of the last end
        check_idle(llm)
    rest = first[0].num_tokens - 1
    assert [told.num_cached for told in first] == [0, 0, rest // TAIL * TAIL, 0, 0]
    assert [told.num_cached for told in again] == [
        (told.num_tokens - 1) // TAIL * TAIL for told in first
    ]
    assert turn.num_cached == first[0].num_tokens + NEW_TOKENS - 1
    assert hits == sum(told.num_cached for told in [*first, *again, turn])


def test_a_picture_that_is_not_to_be_cut_fits_a_step() -> None:
    """vLLM computes it in one step, and has made sure that it fits the limit that was given."""
    layout = PageLayout.derive(QuantConfig.parse("k16v16"), 64)
    shape = PoolShape.fit(4 << 20, layout, 2, 2, 512, 4, SEGMENT)
    limits = []
    for is_whole in (False, True):
        config = SimpleNamespace(
            enable_chunked_prefill=True,
            disable_chunked_mm_input=is_whole,
            max_num_batched_tokens=8192,
            max_num_seqs=4,
        )
        limit_steps(config, shape)
        limits.append(config.max_num_batched_tokens)
    assert 4 < limits[0] < limits[1] == 8192


def test_lossy_drift_is_bounded(model: Path, stock: tuple[list[Answer], Answer]) -> None:
    with engine("k8v4-k4v2", THRESHOLDS, **arguments(model)) as llm:
        lossy = [tell(llm, prompt, diffkv="off").answer for prompt in prompts()]
        forgotten = [tell(llm, prompt, **WINDOW_ONLY).answer for prompt in prompts()]
    assert drift(stock[0], lossy) < MAX_DRIFT
    assert drift(stock[0], lossy) < drift(stock[0], forgotten)


def embeddings(seed: int, num: int = 150) -> dict[str, Any]:
    """A prompt of embeddings; those of all seeds begin alike, to the middle of a block."""
    shared, rest = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    parts = torch.randn(100, 256, generator=shared), torch.randn(num - 100, 256, generator=rest)
    return {"prompt_embeds": 0.05 * torch.cat(parts)}


def test_prompts_of_embeddings_equal_stock(model: Path) -> None:
    given = [embeddings(1), embeddings(2), embeddings(1), embeddings(1, 151)]
    small = {"max_model_len": 512, "enable_prompt_embeds": True}
    with engine(**small) as llm:
        expected = [tell(llm, prompt) for prompt in given]
    with engine("k16v16", {"segment": SEGMENT}, **small) as llm:
        told = [tell(llm, prompt) for prompt in given]
    assert expected[0].answer.token_ids != expected[1].answer.token_ids
    assert token_ids([t.answer for t in told]) == token_ids([t.answer for t in expected])
    assert [t.num_cached for t in told] == [0, 0, 144, 144]
