"""Greedy answers through a transformers model, with a compressed cache or the full one."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache

from diffkv import hf
from diffkv.hf import CacheUse, DiffKVHFCache
from diffkv.lab.evaluation.tasks import Sample
from diffkv.quant import ConfigError

__all__ = ["Batch", "HFModel", "MakeCache", "add_uses", "load", "vocabulary_of"]

MakeCache = Callable[[PreTrainedModel, int], DiffKVHFCache]
"""(model, most tokens of a sequence) -> an empty cache; the model is attached."""


@dataclass(frozen=True)
class Batch:
    """Samples whose questions have the same number of tokens.

    Attributes:
        numbers: of the samples.
        prompts: [batch, longest], padded on the left.
        is_token: [batch, longest] bool, False for padding.
        questions: [batch, num_question_tokens].
    """

    numbers: list[int]
    prompts: Tensor
    is_token: Tensor
    questions: Tensor


def add_uses(uses: Sequence[CacheUse]) -> CacheUse:
    """What several caches hold together."""
    totals = {f.name: sum(getattr(use, f.name) for use in uses) for f in fields(CacheUse)}
    return CacheUse(**totals)


class HFModel:
    """A model and its tokenizer, and how a batch goes through them.

    Args:
        model: a causal language model.
        tokenizer: of it.
        batch_size: most samples at once.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int
    ) -> None:
        self.model = model
        self._tokenizer = tokenizer
        self._batch_size = batch_size

    @property
    def vocabulary(self) -> Collection[str]:
        """Texts of its tokens."""
        words: Collection[str] = self._tokenizer.get_vocab().keys()
        return words

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text, with the tokenizer's own opening if `special`."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=special).input_ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of an answer, up to the end-of-sequence token."""
        ids = list(token_ids)
        if self._tokenizer.eos_token_id in ids:
            ids = ids[: ids.index(self._tokenizer.eos_token_id)]
        text: str = self._tokenizer.decode(ids)
        return text

    def batches(self, samples: Sequence[Sample]) -> list[Batch]:
        """Token ids of samples."""
        return self.batched(
            [
                (
                    self.encode(sample.prompt),
                    self.encode(sample.question, special=False) if sample.question else [],
                )
                for sample in samples
            ]
        )

    def batched(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[Batch]:
        """Sort (prompt, question) into batches by the length of the question."""
        by_length: dict[int, list[tuple[int, list[int], list[int]]]] = {}
        for number, (prompt, question) in enumerate(rows):
            by_length.setdefault(len(question), []).append((number, prompt, question))
        return [
            self._batch(same[first : first + self._batch_size])
            for same in by_length.values()
            for first in range(0, len(same), self._batch_size)
        ]

    def _batch(self, rows: list[tuple[int, list[int], list[int]]]) -> Batch:
        longest = max(len(prompt) for _, prompt, _ in rows)
        prompts = torch.zeros(len(rows), longest, dtype=torch.long)
        is_token = torch.zeros(len(rows), longest, dtype=torch.bool)
        for row, (_, prompt, _) in enumerate(rows):
            prompts[row, longest - len(prompt) :] = torch.tensor(prompt)
            is_token[row, longest - len(prompt) :] = True
        questions = torch.tensor([question for _, _, question in rows], dtype=torch.long)
        numbers = [number for number, _, _ in rows]
        return Batch(numbers, prompts, is_token, questions.view(len(rows), -1))

    @torch.no_grad()
    def forward(
        self, cache: Cache, token_ids: Tensor, is_token: Tensor, last_only: bool = True
    ) -> Tensor:
        """Add tokens to the cache.

        Args:
            cache: what came before.
            token_ids: [batch, num_tokens].
            is_token: [batch, tokens of the cache and these] bool, False for padding.
            last_only: whether only the last logits are wanted.

        Returns:
            [batch, 1 or num_tokens, vocabulary].
        """
        positions = is_token.long().cumsum(1)[:, -token_ids.shape[1] :] - 1
        out: Tensor = self.model(
            token_ids.to(self.model.device),
            attention_mask=is_token.to(self.model.device),
            position_ids=positions.clamp(min=0).to(self.model.device),
            past_key_values=cache,
            logits_to_keep=1 if last_only else 0,
        ).logits
        return out

    def greedy(self, cache: Cache, batch: Batch, num_tokens: int) -> list[list[int]]:
        """Read prompts, then questions, then continue with the likeliest tokens.

        A compressed cache reads a question token by token, as if the model had made it.
        """
        is_token = batch.is_token
        logits = self.forward(cache, batch.prompts, is_token)
        at_once = 1 if isinstance(cache, DiffKVHFCache) else max(1, batch.questions.shape[1])
        for part in batch.questions.split(at_once, 1) if batch.questions.numel() else ():
            is_token = torch.cat([is_token, torch.ones_like(part, dtype=torch.bool)], 1)
            logits = self.forward(cache, part, is_token)
        answers: list[Tensor] = []
        while len(answers) < num_tokens:
            answers.append(logits[:, -1:].argmax(-1).cpu())
            if len(answers) == num_tokens:
                break
            is_token = torch.cat([is_token, torch.ones_like(answers[-1], dtype=torch.bool)], 1)
            logits = self.forward(cache, answers[-1], is_token)
        rows: list[list[int]] = torch.cat(answers, 1).tolist()
        return rows

    def answers(
        self, samples: Sequence[Sample], num_tokens: int, make_cache: MakeCache | None
    ) -> tuple[list[str], CacheUse | None]:
        """Answer samples.

        Args:
            samples: to answer.
            num_tokens: new tokens for each.
            make_cache: a compressed cache; None: transformers' own, in the model's dtype.

        Returns:
            Texts in the order of the samples, and what the caches held at the end.
        """
        texts, uses = [""] * len(samples), []
        for batch in self.batches(samples):
            if make_cache is None:
                hf.detach(self.model)
                rows = self.greedy(DynamicCache(config=self.model.config), batch, num_tokens)
            else:
                hf.attach(self.model)
                most = batch.prompts.shape[1] + batch.questions.shape[1] + num_tokens
                cache = make_cache(self.model, most)
                rows = self.greedy(cache, batch, num_tokens)
                uses.append(cache.use())
            for number, row in zip(batch.numbers, rows, strict=True):
                texts[number] = self.decode(row)
        return texts, add_uses(uses) if uses else None

    def close(self) -> None:
        """Give the model its own attention back."""
        hf.detach(self.model)


def load(folder: str, dtype: torch.dtype, batch_size: int, device: str) -> HFModel:
    """Load a model and its tokenizer from a folder or the Hub.

    Raises:
        ConfigError: transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)
        return HFModel(model, AutoTokenizer.from_pretrained(folder), batch_size)
    except (OSError, ValueError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise ConfigError(f"transformers cannot load {folder}: {reason}") from error


def vocabulary_of(folder: str) -> Collection[str]:
    """Texts of a model's tokens, without the model."""
    from transformers import AutoTokenizer

    words: Collection[str] = AutoTokenizer.from_pretrained(folder).get_vocab()
    return words
