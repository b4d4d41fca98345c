"""Settings of a single request: what is read, what is refused, and that neighbours do not matter."""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import stepping
from conftest import engine
from stepping import Request, check_empty, drive
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from diffkv.policy import Thresholds
from diffkv.quant import ConfigError
from diffkv.vllm_plugin import Options, engine_args
from diffkv.vllm_plugin.requests import Settings
from diffkv.vllm_plugin.scheduler import side

ENGINE = Thresholds(3.0, 0.5)


@pytest.mark.parametrize(
    ("options", "settable", "refused"),
    [
        ({}, {"diffkv_alpha_high": 2}, {"diffkv_alpha_low": 0.1}),
        ({"drops": True}, {"diffkv_alpha_high": 2, "diffkv_alpha_low": 0.1}, None),
        ({"alpha_low": 0.02}, {"diffkv_alpha_high": 2, "diffkv_alpha_low": 0.1}, None),
        ({"quant": "k8v4"}, {"diffkv_alpha_low": 0}, {"diffkv_alpha_high": 0.1}),
        ({"quant": "k8v4", "drops": True}, {"diffkv_alpha_low": 0.1}, None),
    ],
)
def test_what_the_engine_keeps_no_sums_for_is_refused(
    options: dict[str, Any], settable: dict[str, Any], refused: dict[str, Any] | None
) -> None:
    """By the admission check that the engine's own arguments name."""
    args = engine_args(**options)
    (path,) = args["logits_processors"]
    module, _, name = path.partition(":")
    admission = getattr(importlib.import_module(module), name)
    engine = Options.parse(args["kv_transfer_config"]["kv_connector_extra_config"])
    assert admission.settable == engine.settable_thresholds()
    admission.validate_params(SamplingParams(extra_args=settable))
    if refused is not None:
        with pytest.raises(ConfigError, match=r"must be 0 in this engine, got 0\.1: .* --drops"):
            admission.validate_params(SamplingParams(extra_args=refused))


@pytest.mark.parametrize(
    ("extra_args", "settings"),
    [
        (None, Settings()),
        ({}, Settings()),
        ({"somebody_else": "x"}, Settings()),
        ({"diffkv": "on"}, Settings()),
        ({"diffkv": "off"}, Settings(off=True)),
        ({"diffkv_alpha_high": 2}, Settings(alpha_high=2.0)),
        ({"diffkv_alpha_low": "0.25"}, Settings(alpha_low=0.25)),
        ({"diffkv_alpha_high": 1, "diffkv_alpha_low": 1}, Settings(alpha_high=1, alpha_low=1)),
        ({"diffkv": "on", "diffkv_alpha_high": 0}, Settings(alpha_high=0.0)),
    ],
)
def test_parse(extra_args: dict[str, Any] | None, settings: Settings) -> None:
    assert Settings.parse(extra_args) == settings


@pytest.mark.parametrize(
    ("extra_args", "message"),
    [
        ({"diffkv": "of"}, 'diffkv must be "on" or "off" (all tokens high), got \'of\''),
        ({"diffkv": False}, 'diffkv must be "on" or "off" (all tokens high), got False'),
        (
            {"diffkv_alpha": 1},
            "unknown setting 'diffkv_alpha': there are diffkv, diffkv_alpha_high",
        ),
        ({"diffkv_alpha_high": -1}, "diffkv_alpha_high must be a number of 0 or more, got -1"),
        (
            {"diffkv_alpha_low": float("nan")},
            "diffkv_alpha_low must be a number of 0 or more, got nan",
        ),
        (
            {"diffkv_alpha_low": float("inf")},
            "diffkv_alpha_low must be a number of 0 or more, got inf",
        ),
        ({"diffkv_alpha_high": "a"}, "diffkv_alpha_high must be a number of 0 or more, got 'a'"),
        ({"diffkv_alpha_high": True}, "diffkv_alpha_high must be a number of 0 or more, got True"),
        ({"diffkv_alpha_high": [1]}, "diffkv_alpha_high must be a number of 0 or more, got [1]"),
        ({"diffkv_alpha_low": 10**400}, "diffkv_alpha_low must be a number of 0 or more, got 1000"),
        ({"diffkv_alpha_high": "1e39"}, "diffkv_alpha_high must be at most 3.4e+38, got '1e39'"),
        (
            {"diffkv_alpha_high": 1, "diffkv_alpha_low": 2},
            "alpha_high must be at least alpha_low, got alpha_high 1.0 < alpha_low 2.0",
        ),
        ({"diffkv": "off", "diffkv_alpha_low": 1}, 'diffkv "off" keeps all tokens high: leave the'),
    ],
)
def test_refused(extra_args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        Settings.parse(extra_args)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "has_low", "thresholds"),
    [
        (Settings(), True, ENGINE),
        (Settings(off=True), True, Thresholds()),
        (Settings(alpha_high=2), True, Thresholds(2, 0.5)),
        (Settings(alpha_high=0.2), True, Thresholds(0.2, 0.2)),
        (Settings(alpha_low=1), True, Thresholds(3, 1)),
        (Settings(alpha_low=4), True, Thresholds(4, 4)),
        (Settings(alpha_high=5, alpha_low=0), True, Thresholds(5, 0)),
        (Settings(), False, Thresholds(0.5, 0.5)),
        (Settings(off=True), False, Thresholds()),
        (Settings(alpha_high=2), False, Thresholds(2, 2)),
        (Settings(alpha_low=1), False, Thresholds(1, 1)),
        (Settings(alpha_high=2, alpha_low=1), False, Thresholds(1, 1)),
    ],
)
def test_thresholds(settings: Settings, has_low: bool, thresholds: Thresholds) -> None:
    assert settings.thresholds(ENGINE, has_low) == thresholds


MIXED: tuple[dict[str, Any] | None, ...] = (
    None,
    {"diffkv": "off"},
    {"diffkv_alpha_low": 1.0},
    {"diffkv_alpha_high": 6.0, "diffkv_alpha_low": 0.0},
    {"diffkv_alpha_high": 0.7},
    {"diffkv_alpha_low": 0.1},
)
NEW_TOKENS = 24


def mixed() -> dict[str, Request]:
    """Six shipped prompts, and one of them a second time, with settings of their own."""
    prompts = stepping.shipped_prompts()
    settings = zip(prompts, MIXED, strict=False)
    requests = {f"r{i}": Request(p, NEW_TOKENS, s) for i, (p, s) in enumerate(settings)}
    requests["again"] = Request(prompts[1], NEW_TOKENS, {"diffkv_alpha_low": 1.0})
    return requests


@pytest.fixture(scope="class")
def llm() -> Iterator[Any]:
    with engine("k8v4-k4v2", {"alpha_high": 3, "alpha_low": 0.3}) as llm:
        yield llm


@pytest.fixture(scope="class")
def together(llm: Any) -> stepping.Driven:
    return drive(llm, mixed())


class TestOneEngine:
    def test_each_alone_gives_the_same(self, llm: Any, together: stepping.Driven) -> None:
        for name, request in mixed().items():
            alone = drive(llm, {name: request})
            assert alone.token_ids[name] == together.token_ids[name], name
            # rounding of another batch size may move a token across a threshold, no more
            for tier in (0, 1):
                assert alone.kept[name][tier] == pytest.approx(together.kept[name][tier], abs=12)
        check_empty(llm)

    def test_settings_matter(self, llm: Any) -> None:
        """One prompt with all settings at once."""
        prompt = stepping.shipped_prompts()[0]
        kept = drive(
            llm, {f"r{i}": Request(prompt, NEW_TOKENS, s) for i, s in enumerate(MIXED)}
        ).kept
        shape = stepping.worker().shape
        # the last new token is never fed back
        num_tokens = len(prompt.split()) + NEW_TOKENS - 1
        total = shape.num_layers * shape.num_kv_heads * num_tokens
        engine, off, drops_more, drops_none, high_more, drops_less = (
            kept[f"r{i}"] for i in range(len(MIXED))
        )
        assert off == (total, 0)
        assert sum(drops_none) == total
        assert sum(drops_more) < sum(engine) < sum(drops_less) < total
        assert high_more[0] > engine[0] > drops_none[0]

    def test_bad_settings_disturb_nobody(self, llm: Any, together: stepping.Driven) -> None:
        requests = mixed()
        good = {name: requests[name] for name in ("r0", "r1", "r2")}
        refusals = []

        def interfere(step: int) -> None:
            for setting in ({"diffkv_alpha_low": -1}, {"diffkv": "maybe"}, {"diffkv_x": 1}):
                if step in (0, 5):
                    with pytest.raises(VLLMValidationError, match="diffkv") as refusal:
                        stepping.add(llm, f"bad{step}", Request([1, 20], 4, setting))
                    refusals.append(str(refusal.value))

        driven = drive(llm, good, interfere)
        assert len(refusals) == 6
        assert driven.token_ids == {name: together.token_ids[name] for name in good}
        check_empty(llm)

    def test_a_bad_one_of_a_batch_is_refused(self, llm: Any) -> None:
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": [1, 20, 21]}] * 2
        params = [SamplingParams(max_tokens=2, extra_args=e) for e in ({}, {"diffkv": "maybe"})]
        with pytest.raises(VLLMValidationError, match='diffkv must be "on" or "off"'):
            llm.generate(prompts, params, use_tqdm=False)
        assert not llm.llm_engine.has_unfinished_requests()
        llm.llm_engine.step()
        check_empty(llm)


def test_without_the_admission_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler's side logs a bad setting, once, and takes the engine's thresholds."""
    logged: list[str] = []
    monkeypatch.setattr(side.logger, "error", logged.append)
    prompt = stepping.shipped_prompts()[0]
    requests = {"bad": Request(prompt, 4, {"diffkv_alpha_low": -1}), "plain": Request(prompt, 4)}
    with engine("k8v4-k4v2", {"alpha_high": 3, "alpha_low": 0.3}, logits_processors=None) as llm:
        driven = drive(llm, requests)
        check_empty(llm)
    assert driven.kept["bad"] == driven.kept["plain"]
    (line,) = logged
    assert "diffkv_alpha_low must be a number of 0 or more, got -1" in line
    assert "--logits-processors diffkv.vllm_plugin.front.admission:Admission" in line


def test_off_equals_an_engine_with_one_tier() -> None:
    """Pages of the two differ in size, so attention is summed in another order: float32 noise."""
    prompts = stepping.shipped_prompts()
    off = {f"r{i}": Request(p, NEW_TOKENS, {"diffkv": "off"}) for i, p in enumerate(prompts)}
    high = {f"r{i}": Request(p, NEW_TOKENS) for i, p in enumerate(prompts)}
    with engine("k8v4-k4v2", {"alpha_high": 6, "alpha_low": 1}) as llm:
        ours = drive(llm, off)
    with engine("k8v4") as llm:
        one_tier = drive(llm, high)
    assert ours.token_ids == one_tier.token_ids
    assert ours.kept == one_tier.kept
