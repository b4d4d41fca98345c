"""The suite `kld`: how far next-token distributions are from those of the full-precision cache."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from diffkv import hf
from diffkv.lab.evaluation.hf_runs import Batch, HFModel, MakeCache, add_uses
from diffkv.lab.evaluation.results import KldRow
from diffkv.lab.evaluation.synth import use_fields
from diffkv.quant import ConfigError

__all__ = ["Text", "kld_rows", "read_texts"]

FORCED_SHARE = 0.25
"""Of a text: so much of its end is read token by token, the rest is the prompt."""

MIN_TOKENS = 32
"""Of a text that can be compared."""


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


def kld_rows(
    model: HFModel, texts: Sequence[Text], make_cache: MakeCache, max_steps: int
) -> list[KldRow]:
    """Compare a compressed cache with the full one, over given texts and over own continuations.

    Args:
        model: that reads them.
        texts: to read.
        make_cache: the compressed cache.
        max_steps: most compared steps of a text.

    Raises:
        ConfigError: a text that is too short.
    """
    modes: tuple[Literal["forced", "free"], ...] = ("forced", "free")
    return [_row(model, texts, make_cache, mode, max_steps) for mode in modes]


def _row(
    model: HFModel,
    texts: Sequence[Text],
    make_cache: MakeCache,
    mode: Literal["forced", "free"],
    max_steps: int,
) -> KldRow:
    batches, steps = _batches(model, texts, mode, max_steps)
    klds: list[np.ndarray] = []
    same: list[np.ndarray] = []
    first: list[int] = []
    uses = []
    for batch in batches:
        hf.detach(model.model)
        full = _trace(model, DynamicCache(config=model.model.config), batch, steps)
        hf.attach(model.model)
        cache = make_cache(model.model, batch.prompts.shape[1] + steps)
        ours = _trace(model, cache, batch, steps)
        uses.append(cache.use())
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
    return KldRow(
        mode=mode,
        n=len(first),
        steps=len(values),
        kld_mean=float(values.mean()),
        kld_median=float(np.median(values)),
        kld_p999=float(np.quantile(values, 0.999)),
        same_top1=float(np.concatenate(same).mean()),
        first_divergence=float(np.mean(first)),
        diverged=float(np.mean([step < steps for step in first])),
        **use_fields(add_uses(uses)),
    )
