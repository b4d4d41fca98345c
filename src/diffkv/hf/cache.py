"""The cache itself: a pool for a batch, and its steps."""

import copy
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from diffkv import ops
from diffkv.cache import DiffKVCache, Step
from diffkv.hf.attention import IMPLEMENTATION
from diffkv.hf.rows import SequenceRows, paddings
from diffkv.layout import PageLayout
from diffkv.policies import PAPER, Policy, parse
from diffkv.policy import MOST_TOKENS, WINDOW, Thresholds
from diffkv.pool import contents, create, restore
from diffkv.quant import DEFAULT_QUANT, ConfigError, QuantConfig
from diffkv.rotation import choose, signs_of
from diffkv.segments import SEGMENT
from diffkv.shape import PoolShape
from diffkv.state import PoolState
from diffkv.uploads import on_device
from diffkv.use import CacheUse

__all__ = ["DiffKVHFCache", "PoolOptions", "feed"]

DEFAULT_MAX_TOKENS = 4096


class _Layer(CacheLayerMixin):
    """One layer's entry in the list that transformers keeps: hands keys to the pool's owner."""

    def __init__(self, cache: "DiffKVHFCache", index: int) -> None:
        super().__init__()
        self._cache = weakref.ref(cache)
        self._index = index
        self.num_seen = 0  # stored: a pass that is refused leaves it as it was

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Mark the keys with their cache: the attention function that follows stores them."""
        key_states.diffkv = (self._cache(), self._index)  # type: ignore[attr-defined]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.num_seen

    def get_max_length(self) -> int:
        cache = self._cache()
        assert cache is not None, "a layer outlived its cache"
        return cache.max_tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise NotImplementedError("pages belong to one sequence: beam search is not supported")


@dataclass(frozen=True)
class PoolOptions:
    """Size of a page and of a segment, and kernels.

    Attributes:
        page_bytes: bytes of a page; None: the size that wastes least.
        kernels: "reference" for the plain torch operations; None for the device's kernels.
        segment: tokens after which a prompt is decided, see `diffkv.segments`; 0: prompts are decided
            whole; None: that of `diffkv.segments`, where the policy goes by thresholds.
        drops: whether sums and positions of all tokens are kept, also where nothing is dropped.

    Raises:
        ConfigError: a negative segment.
    """

    page_bytes: int | None = None
    kernels: str | None = None
    segment: int | None = None
    drops: bool = False

    def __post_init__(self) -> None:
        if self.segment is not None and self.segment < 0:
            raise ConfigError(f"segment must be 0 or more tokens, got {self.segment}")


DEFAULT_POOL = PoolOptions()


class DiffKVHFCache(Cache):
    """Keys and values of a batch of sequences, in pages.

    Args:
        model: a causal language model of transformers, already passed to `attach`.
        quant: formats of the tiers, as text or parsed.
        policy: policy of prompts, as text (`diffkv.policies`) or parsed, as those of
            `diffkv.lab.evaluation.baselines`.
        thresholds: alpha_high and alpha_low; None: the defaults for the formats.
        window: recent tokens that always stay high.
        max_tokens: most tokens of a sequence, answer included; None: the model's limit, at most 4096.
        rotate: "hadamard" rotates keys and values before they are quantised, "none" does not; None
            takes what goes with the formats.
        pool: size of a page and of a segment, and kernels.

    Raises:
        ConfigError: formats, a policy or a model that cannot be combined.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        quant: str | QuantConfig = DEFAULT_QUANT,
        policy: str | Policy = PAPER,
        thresholds: Thresholds | None = None,
        window: int = WINDOW,
        max_tokens: int | None = None,
        rotate: str | None = None,
        pool: PoolOptions = DEFAULT_POOL,
    ) -> None:
        config = model.config.get_text_config(decoder=True)
        _check(model, config, window)
        self.quant = QuantConfig.parse(quant) if isinstance(quant, str) else quant
        self.policy = parse(policy) if isinstance(policy, str) else policy
        self.policy.check(self.quant)
        self.thresholds = (
            (Thresholds.choose(self.quant) if thresholds is None else thresholds)
            if self.policy.uses_thresholds
            else Thresholds()
        )
        limit = getattr(config, "max_position_embeddings", DEFAULT_MAX_TOKENS)
        self.max_tokens = max_tokens or min(limit, DEFAULT_MAX_TOKENS)
        self._num_layers, self._num_q_heads = config.num_hidden_layers, config.num_attention_heads
        self._num_kv_heads = getattr(config, "num_key_value_heads", None) or self._num_q_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // self._num_q_heads
        self._dtype, self._device, self._window = model.dtype, model.device, window
        self._layout = PageLayout.derive(
            self.quant,
            head_dim,
            pool.page_bytes,
            model.dtype.itemsize,
            self.thresholds.drops or pool.drops,
        )
        self._signs = signs_of(choose(rotate, self.quant), head_dim, self._device)
        chosen = SEGMENT if self.policy.uses_thresholds else 0
        self._segment = chosen if pool.segment is None else pool.segment
        self._kernels, self._ops = pool.kernels, ops.load(self._device.type, pool.kernels)
        self._shape: PoolShape | None = None
        self._pages: DiffKVCache | None = None
        self._step: Step | None = None
        self._first: list[int] = []
        self._rows: list[SequenceRows] = []
        self._scale, self._is_whole = 0.0, True
        super().__init__(layers=[_Layer(self, i) for i in range(self._num_layers)])

    def __getstate__(self) -> dict[str, Any]:
        """What a copy (`copy.deepcopy`, pickle) is made of: tables and held pages, in new tensors."""
        left_out = ("layers", "_ops", "_pages", "_step")
        values = {name: value for name, value in vars(self).items() if name not in left_out}
        copied = None if self._pages is None else contents(self._pages.state)
        return {**values, "num_seen": self.get_seq_length(), "contents": copied}

    def __setstate__(self, values: dict[str, Any]) -> None:
        """Become a copy, with a pool of its own."""
        num_seen, copied = values.pop("num_seen"), values.pop("contents")
        self.__dict__.update(values)
        self._ops = ops.load(self._device.type, self._kernels)
        self._pages, self._step = None, None
        self.layers = [_Layer(self, i) for i in range(self._num_layers)]
        for layer in self.layers:
            layer.num_seen = num_seen
        if copied is None:
            return
        self._pages = self._make(len(self._first), self._scale)
        for rows in self._rows:
            rows.reopen(self._pages, int(copied["prompt_lens"][rows.slot]), self.thresholds)
        restore(self._pages.state, copied)

    def __copy__(self) -> "DiffKVHFCache":
        """As `copy.deepcopy`: two caches never have pages in common."""
        return copy.deepcopy(self)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is stored yet."""
        return self._pages is None

    def use(self, row: int | None = None) -> CacheUse:
        """Use of all sequences, or of one of them.

        Raises:
            ValueError: nothing is stored yet.
        """
        if self._pages is None or self._shape is None:
            raise ValueError("the cache is empty: nothing has been stored yet")
        state = self._pages.state
        some = slice(None) if row is None else slice(row, row + 1)
        lengths = [self.get_seq_length() - first for first in self._first[some]]
        rows = [slot for sequence in self._rows[some] for slot in sequence.rows]
        num_heads = self._shape.num_heads
        high, low = state.num_tokens[rows].sum((0, 1, 2)).tolist()
        num_pages = int(state.num_pages_held[rows].sum())
        elements = 2 * self._layout.head_dim
        bits = sum(
            count * tier.format.nominal_bits
            for count, tier in zip((high, low), self._layout.tiers, strict=False)
        )
        return CacheUse(
            tokens=sum(lengths),
            high=high / num_heads,
            low=low / num_heads,
            pages=num_pages,
            num_bytes=self._shape.spent_bytes(num_pages, len(rows)),
            bf16_bytes=sum(lengths) * self._shape.bf16_bytes_per_token,
            nominal_bytes=bits * elements / 8,
        )

    def next_positions(self) -> Tensor:
        """[batch, 1] int64: the position of each sequence's next token, padding not counted."""
        first = torch.tensor(self._first, device=self._device)
        return (self.get_seq_length() - first)[:, None]

    def reset(self) -> None:
        """Forget all sequences and give their memory back."""
        self._pages, self._shape, self._step = None, None, None
        self._first, self._rows, self._is_whole = [], [], True
        for layer in self.layers:
            layer.num_seen = 0

    def crop(self, max_length: int) -> None:
        """Refused: what was demoted or dropped for later tokens does not come back."""
        raise NotImplementedError("a compressed cache cannot be cut back to an earlier length")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused: pages are not shared."""
        raise NotImplementedError("pages belong to one sequence: repeat the prompts instead")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refused: pages are not shared."""
        raise NotImplementedError("pages belong to one sequence: select the prompts instead")

    @property
    def state(self) -> PoolState:
        """The pool: what it holds is documented there. Only to be read.

        Raises:
            ValueError: nothing is stored yet.
        """
        if self._pages is None:
            raise ValueError("the cache is empty: nothing has been stored yet")
        return self._pages.state

    def _attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        mask: Tensor | None,
    ) -> Tensor:
        """Store one layer's keys and values, and attend: [batch, tokens, num_q_heads, head_dim]."""
        batch, num_q_heads, num_tokens, head_dim = query.shape
        if layer == 0:
            self._step = self._begin(batch, num_tokens, scale, mask)
        assert self._step is not None and self._pages is not None, "layers come in order"
        if scale != self._scale:
            raise ValueError(
                f"layer {layer} scales its scores by {scale:g}, the first by {self._scale:g}: only "
                "models whose layers are alike are supported"
            )
        query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        output = torch.zeros_like(query)
        self._pages.attend(layer, self._step, query, key, value, output)
        self.layers[layer].num_seen += num_tokens
        self._is_whole = layer == self._num_layers - 1
        return output.view(batch, num_tokens, num_q_heads, head_dim)

    def _begin(self, batch: int, num_tokens: int, scale: float, mask: Tensor | None) -> Step:
        """Plan a step of all layers, or refuse it and change nothing."""
        if not self._is_whole:
            raise ValueError(
                "a forward pass has ended with an error after it had stored some of its tokens: reset()"
            )
        seen = self.get_seq_length() + num_tokens
        if seen > self.max_tokens:
            raise ValueError(
                f"the cache is for {self.max_tokens} tokens a sequence, got {seen}: raise max_tokens"
            )
        if self._pages is None:
            self._first = paddings(mask, batch, num_tokens)
            self._pages, self._scale = self._make(batch, scale), scale
            self._is_whole = False
            for rows, first in zip(self._rows, self._first, strict=True):
                rows.open(self._pages, seen - first, self.thresholds)
            return self._plan_prompts(num_tokens, seen)
        if batch != len(self._first):
            raise ValueError(f"the cache holds {len(self._first)} sequences, got {batch}")
        if mask is not None and paddings(mask, batch, seen) != self._first:
            raise ValueError("attention_mask differs from the prompt's in tokens that are stored")
        if num_tokens > 1:
            stored = seen - num_tokens
            for rows, first in zip(self._rows, self._first, strict=True):
                rows.check_turn(self._pages, stored - first, seen - first)
            self._is_whole = False
            for rows, first in zip(self._rows, self._first, strict=True):
                rows.turn(self._pages, stored - first, seen - first, self.thresholds)
            return self._plan_prompts(num_tokens, seen)
        problem = self._pages.range_problem()
        if problem is not None:
            warnings.warn(problem, stacklevel=2)
        slots = on_device([rows.slot for rows in self._rows], torch.int32, self._device)
        lengths = torch.tensor([seen - first for first in self._first], dtype=torch.int32)
        self._is_whole = False
        return self._pages.plan((), slice(0, batch), slots, lengths.to(self._device))

    def _plan_prompts(self, num_tokens: int, seen: int) -> Step:
        """Plan the latest `num_tokens` tokens of all sequences as prompts, but for padding."""
        assert self._pages is not None
        prompts = []
        for row, (rows, first) in enumerate(zip(self._rows, self._first, strict=True)):
            padding = max(0, num_tokens - (seen - first))
            span = slice(row * num_tokens + padding, (row + 1) * num_tokens)
            stored = max(0, seen - num_tokens - first)
            prompts.append(rows.chunk(self._pages, span, stored, seen - first))
        none = torch.empty(0, dtype=torch.int32, device=self._device)
        return self._pages.plan(prompts, none.long(), none, none)

    def _make(self, batch: int, scale: float) -> DiffKVCache:
        """A pool that holds the longest sequences, however their tokens are tiered."""
        sizes = self._layout, self._num_layers, self._num_kv_heads
        one = PoolShape(*sizes, 1, self.max_tokens, 0, segment=self._segment)
        most = 1 + one.chain_width
        half_empty = one.half_empty_leaves * (one.chain_width - one.max_rows)  # a row a turn
        num_pages = batch * (one.request_pages(1.0) + half_empty)
        shape = replace(one, num_slots=batch * most, num_pages=num_pages)
        buffer = torch.empty(
            shape.table_bytes + shape.num_pages * self._layout.page_bytes,
            dtype=torch.uint8,
            device=self._device,
        )
        if not self._rows:
            self._rows = [SequenceRows(list(range(i * most, (i + 1) * most))) for i in range(batch)]
        self._shape = shape
        state = create(shape, buffer, self._dtype, self._window)
        return DiffKVCache(
            state, self._ops, scale, self.policy, signs=self._signs, segment=self._segment
        )


def _check(model: PreTrainedModel, config: Any, window: int) -> None:
    if config._attn_implementation != IMPLEMENTATION:
        raise ConfigError(
            f"the model attends by {config._attn_implementation}: call diffkv.hf.attach(model) first"
        )
    others = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    if others:
        raise ConfigError(
            f"{type(model).__name__} has layers of {', '.join(others)}: only models whose layers all "
            f"have full attention are supported"
        )
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise ConfigError(
            "scale_attn_by_inverse_layer_idx: only models whose layers are alike are supported"
        )
    if not 1 <= window <= MOST_TOKENS:
        raise ConfigError(f"window must be 1 to {MOST_TOKENS} tokens, got {window}")


@torch.no_grad()
def feed(model: PreTrainedModel, cache: DiffKVHFCache, token_ids: Tensor) -> Tensor:
    """Add given tokens after the prompt, one at a time, as if the model had generated them.

    Args:
        model: attached.
        cache: the cache that holds the prompts.
        token_ids: [batch, num_tokens].

    Returns:
        [batch, num_tokens, vocabulary]: logits after each of them.
    """
    logits: Sequence[Tensor] = [
        model(
            token_ids[:, i : i + 1],
            past_key_values=cache,
            position_ids=cache.next_positions(),
        ).logits
        for i in range(token_ids.shape[1])
    ]
    return torch.cat(list(logits), 1)
