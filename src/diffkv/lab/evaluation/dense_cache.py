"""A transformers cache of dense keys and values, exact or as another engine's format would have them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from diffkv.lab.evaluation.other_formats import OtherFormat
from diffkv.use import CacheUse

__all__ = ["DenseCache"]


class _Layer(CacheLayerMixin):
    """Keys and values of one layer, in memory for the longest sequence: a step copies nothing."""

    def __init__(self, max_tokens: int, round_trip: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self._max_tokens, self._round_trip = max_tokens, round_trip
        self.num_seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the memory."""
        batch, heads, _, head_dim = key_states.shape
        self.keys, self.values = (
            x.new_empty(batch, heads, self._max_tokens, head_dim)
            for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens. The first ones attend to each other exactly, later ones to what is stored."""
        is_prompt = not self.is_initialized
        if is_prompt:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None, "the memory was taken"
        start, self.num_seen = self.num_seen, self.num_seen + key_states.shape[2]
        for stored, given in ((self.keys, key_states), (self.values, value_states)):
            exact = self._round_trip is None
            stored[:, :, start : self.num_seen] = given if exact else self._stored(given)
        if is_prompt:
            return key_states, value_states
        return self.keys[:, :, : self.num_seen], self.values[:, :, : self.num_seen]

    def _stored(self, x: Tensor) -> Tensor:
        assert self._round_trip is not None, "an exact cache stores what it is given"
        return self._round_trip(x.float()).to(x.dtype)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.num_seen

    def get_max_length(self) -> int:
        return self._max_tokens


class DenseCache(Cache):
    """Keys and values of a batch of sequences of equal length.

    Args:
        config: of a causal language model.
        max_tokens: most tokens of a sequence.
        other: the format that they are stored in; None: exactly as they are.

    Raises:
        ConfigError: the model's vectors do not fit the format.
    """

    def __init__(
        self, config: PreTrainedConfig, max_tokens: int, other: OtherFormat | None = None
    ) -> None:
        config = config.get_text_config(decoder=True)
        num_q_heads = config.num_attention_heads
        self._head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_q_heads
        num_kv_heads = getattr(config, "num_key_value_heads", None) or num_q_heads
        self._num_heads = config.num_hidden_layers * num_kv_heads
        self._other = other
        if other is not None:
            other.vector_bytes(self._head_dim)  # refuses vectors that do not fit
        round_trip = None if other is None else other.round_trip
        super().__init__(
            layers=[_Layer(max_tokens, round_trip) for _ in range(config.num_hidden_layers)]
        )

    def use(self) -> CacheUse:
        """What the sequences would take in the format: bytes of all tokens, and no others.

        Raises:
            ValueError: the cache is exact, or nothing is stored yet.
        """
        layer = self.layers[0]
        if self._other is None or layer.keys is None:
            raise ValueError("only a cache in another format that holds tokens says what they take")
        tokens = layer.keys.shape[0] * self.get_seq_length()
        vectors = 2 * tokens * self._num_heads
        return CacheUse(
            tokens=tokens,
            high=tokens,
            num_bytes=round(vectors * self._other.vector_bytes(self._head_dim)),
            bf16_bytes=vectors * self._head_dim * torch.bfloat16.itemsize,
            nominal_bytes=vectors * self._head_dim * self._other.bits / 8,
        )
