"""The suite `synth` through vLLM, with DiffKV's plugin and with vLLM's own cache.

A prompt is all that vLLM is given, and it is compressed with its last token: so the setting is easy.
"""

import importlib.metadata
import time
from collections.abc import Sequence
from typing import Any

import torch

from diffkv.hf import CacheUse
from diffkv.lab.evaluation import synth
from diffkv.lab.evaluation.results import Run
from diffkv.lab.evaluation.runs import CacheSpec, provenance
from diffkv.lab.evaluation.tasks import Sample
from diffkv.policies import PAPER
from diffkv.quant import ConfigError
from diffkv.vllm_plugin.front import offline
from diffkv.vllm_plugin.front.session import Session, session
from diffkv.vllm_plugin.options import Options

__all__ = ["SETTING", "run_tasks"]

SETTING = "easy"


def _options(spec: CacheSpec) -> Options:
    """What the plugin takes: `none` is the published rule with both thresholds 0.

    Raises:
        ConfigError: a policy that the plugin does not have.
    """
    return Options(
        quant=str(spec.quant),
        alpha_high=spec.thresholds.alpha_high if spec.quant.has_low else None,
        alpha_low=spec.thresholds.alpha_low,
        window=spec.window,
        policy=PAPER.text if spec.policy.keeps_all else spec.policy.text,
        page_bytes=spec.page_bytes,
        rotate=spec.rotate,
        kernels=spec.kernels,
    )


def _as_use(use: offline.CacheUse) -> CacheUse:
    """The same in the words of `diffkv.hf`."""
    bf16 = use.tokens * use.bf16_bytes_per_token
    return CacheUse(
        use.tokens, use.high, use.low, use.pages, round(use.bytes_per_token * use.tokens), bf16,
        bf16 / use.nominal_ratio_bf16,
    )  # fmt: skip


def _vllm() -> str:
    """The package that is installed: vLLM for CPUs has a name of its own."""
    installed = importlib.metadata.packages_distributions()["vllm"]
    return installed[0]


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _answerer(running: Session) -> synth.Answerer:
    def answer(samples: Sequence[Sample], num_tokens: int) -> tuple[list[str], CacheUse | None]:
        sampling = [{"temperature": 0.0, "max_tokens": num_tokens} for _ in samples]
        answers, use = running.answer([sample.prompt for sample in samples], sampling)
        return [each.text for each in answers], None if use is None else _as_use(use)

    return answer


def run_tasks(name: str, arguments: dict[str, Any], spec: CacheSpec, plan: synth.Plan) -> Run:
    """Answer with both caches, one engine after the other.

    Args:
        name: of the model, as it was named.
        arguments: of vLLM's engine, the model among them.
        spec: the compressed cache.
        plan: what is asked.

    Raises:
        ConfigError: a policy or setting that the plugin does not have, or an engine that cannot start.
    """
    options = _options(spec)
    if tuple(plan.settings) != (SETTING,):
        raise ConfigError(
            f"--engine vllm runs the setting {SETTING} only: write --settings {SETTING}"
        )
    start = time.perf_counter()
    with session(arguments, None) as running:
        full = synth.full_scores(plan, _answerer(running))
    with session(arguments, options) as running:
        rows = synth.task_rows(plan, _answerer(running), full)
    return Run(
        model=name,
        engine="vllm",
        quant=str(spec.quant),
        policy=str(spec.policy),
        alpha_high=spec.thresholds.alpha_high,
        alpha_low=spec.thresholds.alpha_low,
        window=spec.window,
        rotate=spec.rotate,
        seed=plan.seed,
        suite="synth",
        tasks=rows,
        seconds=time.perf_counter() - start,
        provenance=provenance(_device(), ("torch", "transformers", _vllm())),
    )
