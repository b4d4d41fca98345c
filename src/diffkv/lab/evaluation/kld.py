"""The suite `kld`: how far next-token distributions are from those of the full-precision cache."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from diffkv.lab.evaluation.engine import CacheSpec
from diffkv.lab.evaluation.hf_runs import Batch, HFModel
from diffkv.lab.evaluation.results import KldScore
from diffkv.quant import ConfigError
from diffkv.use import CacheUse

__all__ = ["MODES", "Text", "read_texts", "score"]

MODES = ("forced", "free")

FORCED_SHARE = 0.25
"""Share of a text, at its end, that is read token by token; the rest is the prompt."""

MIN_TOKENS = 32
"""Fewest tokens of a text that can be compared."""


@dataclass(frozen=True)
class Text:
    """A text to read; `prompt` is where a free continuation starts, None: where the forced one does."""

    text: str
    prompt: str | None = None


def read_texts(content: str) -> list[Text]:
    """One text a line, or JSON lines with "text", or with "prompt" and "answer".

    Raises:
        ConfigError: a line that is neither, or no line at all.
    """
    texts = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        if not line.startswith("{"):
            texts.append(Text(line))
            continue
        try:
            row = json.loads(line)
            if "text" in row:
                texts.append(Text(str(row["text"])))
            else:
                texts.append(Text(f"{row['prompt']} {row['answer']}", str(row["prompt"])))
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f'line {number} is no JSON object with "text", or with "prompt" and "answer"'
            ) from None
    if not texts:
        raise ConfigError("there is no text: give one a line, or JSON lines")
    return texts


@torch.no_grad()
def _trace(model: HFModel, cache: Cache, batch: Batch, steps: int) -> Tensor:
    """Read the prompts, then the batch's questions if it has any, else the cache's own greedy tokens.

    Returns:
        [batch, steps, vocabulary]: log-probabilities after each step. Those that follow the prompt are
        left out: they come from exact attention.
    """
    is_token, more = batch.is_token, torch.ones(len(batch.numbers), 1, dtype=torch.bool)
    logits = model.forward(cache, batch.prompts, is_token)
    log_probs = []
    forced = batch.questions if batch.questions.shape[1] else None
    for step in range(steps):
        following = (
            logits[:, -1].argmax(-1, keepdim=True).cpu() if forced is None else forced[:, [step]]
        )
        is_token = torch.cat([is_token, more], 1)
        logits = model.forward(cache, following, is_token)
        log_probs.append(logits[:, -1].float().log_softmax(-1).cpu())
    return torch.stack(log_probs, 1)


def _batches(
    model: HFModel, texts: Sequence[Text], mode: str, max_steps: int
) -> tuple[list[Batch], int]:
    """Token ids of all texts, and steps to compare."""
    ids = [model.encode(text.text) for text in texts]
    for number, row in enumerate(ids, 1):
        if len(row) < MIN_TOKENS:
            raise ConfigError(
                f"text {number} has {len(row)} tokens: a comparison needs at least {MIN_TOKENS}"
            )
    steps = min(max_steps, *(int(len(row) * FORCED_SHARE) for row in ids))
    if mode == "forced":
        rows = [(row[:-steps], row[-steps:]) for row in ids]
    else:
        rows = [
            (row[:-steps] if text.prompt is None else model.encode(text.prompt), [])
            for row, text in zip(ids, texts, strict=True)
        ]
    return model.batched(rows), steps


def score(
    model: HFModel, texts: Sequence[Text], cache: CacheSpec, mode: str, max_steps: int
) -> KldScore:
    """Compare a compressed cache with the full one, over given texts or over own continuations.

    Args:
        model: reads them.
        texts: to read.
        cache: the compressed one.
        mode: one of `MODES`.
        max_steps: most compared steps of a text.

    Raises:
        ConfigError: a text that is too short.
    """
    batches, steps = _batches(model, texts, mode, max_steps)
    klds: list[np.ndarray] = []
    same: list[np.ndarray] = []
    first: list[int] = []
    use = CacheUse()
    for batch in batches:
        full = _trace(model, model.full_cache(), batch, steps)
        compressed = model.make_cache(cache, batch.prompts.shape[1] + steps)
        ours = _trace(model, compressed, batch, steps)
        use += compressed.use()
        kld = (full.exp() * (full - ours)).sum(-1).clamp(min=0)
        agree = full.argmax(-1) == ours.argmax(-1)
        for row in range(len(batch.numbers)):
            different = (~agree[row]).nonzero()
            first.append(int(different[0]) if len(different) else steps)
            # Of own continuations, those steps whose tokens before are the same
            end = steps if mode == "forced" else min(steps, first[-1] + 1)
            klds.append(kld[row, :end].numpy())
            same.append(agree[row, :end].numpy())
    values = np.concatenate(klds)
    return KldScore(
        mode=mode,
        n=len(first),
        steps=len(values),
        kld_mean=float(values.mean()),
        kld_median=float(np.median(values)),
        kld_p999=float(np.quantile(values, 0.999)),
        same_top1=float(np.concatenate(same).mean()),
        first_divergence=float(np.mean(first)),
        diverged=float(np.mean([step < steps for step in first])),
        **use.per_token(),
    )
