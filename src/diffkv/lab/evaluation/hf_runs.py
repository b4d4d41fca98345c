"""Greedy answers through a transformers model, with a compressed cache or the full one."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from diffkv import hf
from diffkv.hf import DiffKVHFCache
from diffkv.lab.evaluation import baselines
from diffkv.lab.evaluation.dense_cache import DenseCache
from diffkv.lab.evaluation.engine import CacheSpec, Compared
from diffkv.lab.evaluation.tasks import Sample, Setting
from diffkv.quant import ConfigError
from diffkv.use import CacheUse

__all__ = ["Batch", "HFModel", "load", "tokenizer_of", "vocabulary_of"]


@dataclass(frozen=True)
class Batch:
    """Samples whose questions have the same number of tokens.

    Attributes:
        numbers: indices of the samples.
        prompts: [batch, longest], padded on the left.
        is_token: [batch, longest] bool, False for padding.
        questions: [batch, num_question_tokens].
    """

    numbers: list[int]
    prompts: Tensor
    is_token: Tensor
    questions: Tensor


class HFModel:
    """A model and its tokenizer, and how a batch goes through them.

    Args:
        model: a causal language model.
        tokenizer: the model's.
        batch_size: most samples at once.
    """

    name = "hf"

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int
    ) -> None:
        self.model = model
        self._tokenizer = tokenizer
        self.batch_size = batch_size

    @property
    def dtype(self) -> str:
        """The model's, by name."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def vocabulary(self) -> Collection[str]:
        """Texts of its tokens."""
        words: Collection[str] = self._tokenizer.get_vocab().keys()
        return words

    @property
    def longest(self) -> int:
        """Most tokens that the model reads."""
        tokens: int = self.model.config.get_text_config(decoder=True).max_position_embeddings
        return tokens

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text, with the tokenizer's own opening if `special`."""
        # verbose: a text may be longer than the model's context before it is cut
        ids: list[int] = self._tokenizer(text, add_special_tokens=special, verbose=False).input_ids
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
        return [
            self._batch([(number, *rows[number]) for number in numbers])
            for numbers in self.together([len(question) for _, question in rows])
        ]

    def together(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Numbers of what is read together: of equal length, at most `batch_size`."""
        by_length: dict[int, list[int]] = {}
        for number, length in enumerate(lengths):
            by_length.setdefault(length, []).append(number)
        for same in by_length.values():
            for first in range(0, len(same), self.batch_size):
                yield same[first : first + self.batch_size]

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
    def forward(self, cache: Cache, token_ids: Tensor, is_token: Tensor | None = None) -> Tensor:
        """Add tokens to the cache.

        Args:
            cache: what came before.
            token_ids: [batch, num_tokens].
            is_token: [batch, tokens of the cache and these] bool, False for padding; None: no padding.

        Returns:
            [batch, 1, vocabulary]: the last logits.
        """
        positions = None
        if is_token is not None:
            positions = is_token.long().cumsum(1)[:, -token_ids.shape[1] :] - 1
            positions = positions.clamp(min=0).to(self.model.device)
            is_token = is_token.to(self.model.device)
        out: Tensor = self.model(
            token_ids.to(self.model.device),
            attention_mask=is_token,
            position_ids=positions,
            past_key_values=cache,
            logits_to_keep=1,
        ).logits
        return out

    def greedy(self, cache: Cache, batch: Batch, num_tokens: int) -> list[list[int]]:
        """Read prompts, then questions, then continue with the likeliest tokens."""
        logits, is_token = self._read(cache, batch)
        answers: list[Tensor] = []
        while len(answers) < num_tokens:
            answers.append(logits[:, -1:].argmax(-1).cpu())
            if len(answers) == num_tokens:
                break
            is_token = torch.cat([is_token, torch.ones_like(answers[-1], dtype=torch.bool)], 1)
            logits = self.forward(cache, answers[-1], is_token)
        rows: list[list[int]] = torch.cat(answers, 1).tolist()
        return rows

    def choose(self, cache: Cache, batch: Batch, choices: Sequence[Sequence[str]]) -> list[str]:
        """Read prompts, then questions, and take the likeliest of the words that each may go on with.

        Args:
            cache: an empty one.
            batch: what is read.
            choices: words of each sample, whose first tokens differ.

        Returns:
            The word that each chose.
        """
        logits, _ = self._read(cache, batch)
        chosen = []
        for row, words in zip(logits[:, -1], choices, strict=True):
            first = [self.encode(f" {word}", special=False)[0] for word in words]
            if len(set(first)) < len(first):
                raise ValueError(f"first tokens of choices must differ: {', '.join(words)}")
            chosen.append(words[int(row[first].argmax())])
        return chosen

    def _read(self, cache: Cache, batch: Batch) -> tuple[Tensor, Tensor]:
        """Read prompts, then questions: the last logits, and which tokens are no padding.

        A cache of ours reads a question token by token, as if the model had made it.
        """
        is_token = batch.is_token
        logits = self.forward(cache, batch.prompts, is_token)
        at_once = 1 if isinstance(cache, DiffKVHFCache) else max(1, batch.questions.shape[1])
        for part in batch.questions.split(at_once, 1) if batch.questions.numel() else ():
            is_token = torch.cat([is_token, torch.ones_like(part, dtype=torch.bool)], 1)
            logits = self.forward(cache, part, is_token)
        return logits, is_token

    def check(self, cache: Compared, settings: Sequence[Setting]) -> None:
        """Every cache and setting can be evaluated."""

    def make_cache(self, cache: Compared, max_tokens: int) -> DiffKVHFCache | DenseCache:
        """An empty cache for so many tokens a sequence, padding included; the model gets what it needs.

        Raises:
            ConfigError: the model's vectors do not fit the formats.
        """
        if not isinstance(cache, CacheSpec):
            hf.detach(self.model)
            return DenseCache(self.model.config, max_tokens, cache)
        return DiffKVHFCache(
            hf.attach(self.model),
            cache.quant,
            baselines.parse(cache.policy.text),
            cache.thresholds,
            cache.window,
            max_tokens,
            cache.rotate,
            hf.PoolOptions(cache.page_bytes, cache.kernels, cache.segment, cache.drops),
        )

    def full_cache(self, max_tokens: int) -> DenseCache:
        """The same, of the model's own dtype."""
        hf.detach(self.model)
        return DenseCache(self.model.config, max_tokens)

    def answer(
        self, samples: Sequence[Sample], num_tokens: int, cache: Compared | None
    ) -> tuple[list[str], CacheUse | None]:
        """Answer samples; see `engine.Engine`."""
        texts, use = [""] * len(samples), CacheUse()
        for batch in self.batches(samples):
            most = batch.prompts.shape[1] + batch.questions.shape[1] + num_tokens
            mine = self.full_cache(most) if cache is None else self.make_cache(cache, most)
            choices = [samples[number].choices for number in batch.numbers]
            if any(choices):
                said = self.choose(mine, batch, choices)
            else:
                said = [self.decode(row) for row in self.greedy(mine, batch, num_tokens)]
            if cache is not None:
                use += mine.use()
            for number, text in zip(batch.numbers, said, strict=True):
                texts[number] = text
        return texts, use if use.tokens else None


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


def tokenizer_of(folder: str) -> PreTrainedTokenizerBase:
    """A model's tokenizer, without the model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def vocabulary_of(folder: str) -> Collection[str]:
    """Texts of a model's tokens, without the model."""
    words: Collection[str] = tokenizer_of(folder).get_vocab()
    return words
