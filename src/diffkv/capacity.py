"""Requests that fit a GPU's memory in each cache format, and whether compressing the cache pays.

Arithmetic on sizes only: nothing is loaded or measured. A rank of tensor parallelism is one GPU.
"""

from dataclasses import dataclass
from itertools import pairwise

from diffkv.layout import PageLayout, bf16_bytes_per_token
from diffkv.model_config import ModelConfig
from diffkv.policy import WINDOW
from diffkv.quant import ConfigError, QuantConfig
from diffkv.segments import SEGMENT, RowEnds
from diffkv.shape import FIXED_BYTES, PoolShape

__all__ = [
    "DENSE_BITS",
    "HIGH_SHARE",
    "FormatPlan",
    "Mix",
    "Rank",
    "Verdict",
    "plan_dense",
    "plan_format",
    "rank_of",
    "verdict",
]

DENSE_BITS = {"bf16": 16, "fp8": 8}
"""Caches of vLLM itself, and bits of an element."""
DENSE_BLOCK_TOKENS = 16

HIGH_SHARE = 0.1
"""Share of the tokens outside the window that a pair keeps high: more than the default keeps of a real
model's prose (docs/results/real-model), less than it would at the published alpha_high of 1 to 3."""

KV_BOUND = 0.5
"""Share of a decode step's bytes from which KV is what binds it."""

PAYS, PAYS_LITTLE = 1.3, 1.1
"""Ratios of bytes read for a generated token, from which compression pays, or pays a little."""


@dataclass(frozen=True)
class Rank:
    """One GPU's part of a model, and the memory it leaves for the cache.

    Attributes:
        model: the whole model.
        num_ranks: GPUs that share it.
        num_kv_heads: KV heads of a layer on this rank.
        weight_bytes: bytes of this rank's weights.
        kv_bytes: KV budget, tables included.
    """

    model: ModelConfig
    num_ranks: int
    num_kv_heads: int
    weight_bytes: int
    kv_bytes: int

    def window_bytes(self, context: int, bits: int) -> int:
        """Bytes of the layers with a sliding window for a request: vLLM's blocks, one of them begun."""
        blocks = -(-min(context, self.model.window) // DENSE_BLOCK_TOKENS) + 1
        return self.model.num_windows * blocks * self._block_bytes(bits)

    def state_bytes(self, bits: int) -> int:
        """Bytes of a request's recurrent states, each padded to whole blocks as vLLM does it."""
        states = self.model.states
        return states.num_layers * self._blocks_of_state(bits) * self._block_bytes(bits)

    def block_tokens(self, bits: int) -> int:
        """Tokens of a block of vLLM's, which has as many bytes as a layer's state."""
        return DENSE_BLOCK_TOKENS * max(1, self._blocks_of_state(bits))

    def _blocks_of_state(self, bits: int) -> int:
        num_bytes = -(-self.model.states.num_bytes // self.num_ranks)
        return -(-num_bytes // self._block_bytes(bits))

    def _block_bytes(self, bits: int) -> int:
        token_bytes = bf16_bytes_per_token(self.num_kv_heads, self.model.head_dim) * bits // 16
        return DENSE_BLOCK_TOKENS * token_bytes

    def weight_bytes_read(self, num_requests: int) -> int:
        """Weights that a decode step reads: of a mixture, the experts that some request hits.

        Each token picks `num_active_experts` of `num_experts`, taken as uniform and independent.
        """
        model = self.model
        if not model.num_experts:
            return self.weight_bytes
        missed = (1 - model.num_active_experts / model.num_experts) ** num_requests
        share = (
            model.num_layers * model.num_experts * model.expert_parameters / model.num_parameters
        )
        return int(self.weight_bytes * (1 - share * missed))


def rank_of(
    model: ModelConfig, weight_bytes: int, tensor_parallel_size: int, usable_bytes: int
) -> Rank:
    """Split a model, and give the cache what its weights leave of a GPU's usable memory.

    Raises:
        ConfigError: a split that vLLM cannot make, weights that do not fit, or layers of which DiffKV
            serves none.
    """
    if model.other_kinds:
        raise ConfigError(
            f"{model.name} has layers of {', '.join(model.other_kinds)}: their sizes are not known here"
        )
    if not model.num_full:
        raise ConfigError(f"{model.name} has no layer with full attention: DiffKV has no part")
    heads, ranks = model.num_kv_heads, tensor_parallel_size
    if ranks < 1 or model.num_q_heads % ranks or (heads % ranks and ranks % heads):
        raise ConfigError(
            f"--tensor-parallel-size must divide {model.num_q_heads} query heads and divide or be a "
            f"multiple of {heads} KV heads, got {ranks}"
        )
    weights = -(-weight_bytes // ranks)
    if weights >= usable_bytes:
        raise ConfigError(
            f"the weights of {model.name} need {weights / 2**30:.1f} GiB of each GPU, which leaves "
            f"no KV cache in {usable_bytes / 2**30:.1f} GiB: more memory, a larger "
            f"--tensor-parallel-size, or quantised weights"
        )
    return Rank(model, ranks, max(1, heads // ranks), weights, usable_bytes - weights)


@dataclass(frozen=True)
class Mix:
    """Shares of a head's tokens outside the window: high, dropped, and the rest low."""

    high: float = HIGH_SHARE
    dropped: float = 0.0
    window: int = WINDOW

    def __post_init__(self) -> None:
        """Refuse shares that are none."""
        for name in ("high", "dropped"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"--{name}-share must be in 0 .. 1, got {getattr(self, name)}")
        if self.high + self.dropped > 1:
            raise ConfigError(
                f"--high-share and --dropped-share add up to more than 1: {self.high} and {self.dropped}"
            )

    def tokens(self, quant: QuantConfig, context: int) -> tuple[int, ...]:
        """Kept tokens of a head by tier, the window among the high ones. One tier drops nothing."""
        if quant.low is None:
            return (context,)
        old = max(0, context - self.window)
        high, dropped = round(old * self.high), round(old * self.dropped)
        return context - old + high, max(0, old - high - dropped)


@dataclass(frozen=True)
class FormatPlan:
    """Cost of one kind of cache, and the requests of the context that it holds.

    Attributes:
        name: bf16, fp8, or the text form of a configuration.
        bytes_per_token: pages, half-empty ones too, and tables of one request of the whole context.
        num_requests: requests that fit at once; 0 where not even one does.
        page_bytes: size of a page; 0 for vLLM's own caches.
        table_bytes: share of the tables in the budget, with a slot for each of those requests.
        starts: whether an engine would start: it wants room for one request, a quarter of it high.
        window_bytes: bytes of those requests in vLLM's blocks, for layers with a sliding window.
        state_bytes: likewise for recurrent states.
    """

    name: str
    bytes_per_token: float
    num_requests: int
    page_bytes: int = 0
    table_bytes: int = 0
    starts: bool = True
    window_bytes: int = 0
    state_bytes: int = 0


def plan_dense(name: str, rank: Rank, context: int) -> FormatPlan:
    """Plan one of vLLM's own caches, in its blocks."""
    heads = rank.model.num_full * rank.num_kv_heads
    bits = DENSE_BITS[name]
    block = rank.block_tokens(bits)
    token_bytes = bf16_bytes_per_token(heads, rank.model.head_dim) * bits // 16
    request = -(-context // block) * block * token_bytes
    request += rank.window_bytes(context, bits) + rank.state_bytes(bits)
    num_requests = rank.kv_bytes // request
    return FormatPlan(name, request / context, num_requests, starts=num_requests > 0)


def plan_format(
    quant: QuantConfig, rank: Rank, context: int, mix: Mix, drops: bool = False
) -> FormatPlan:
    """Plan a pool of ours, its tables paid out of the budget.

    All heads are taken to keep the same numbers of tokens; the latest segment of a prompt on its way in
    needs its full size until it is complete, which is not set aside. `drops` is that of
    `PageLayout.derive`.
    """
    model = rank.model
    layout = PageLayout.derive(quant, model.head_dim, None, model.element_bytes, drops)
    one = PoolShape(layout, model.num_full, rank.num_kv_heads, 1, context, 0, segment=SEGMENT)
    bounds = [0, *RowEnds(SEGMENT, context).up_to(0, context), context]
    rows = [end - start for start, end in pairwise(bounds)]
    pages = one.num_heads * sum(
        -(-num // tier.tokens_per_page)
        for length in rows
        for num, tier in zip(mix.tokens(quant, length), layout.tiers, strict=True)
    )
    bits = 8 * model.element_bytes
    windows, states = rank.window_bytes(context, bits), rank.state_bytes(bits)
    request = one.spent_bytes(pages, len(rows)) + windows + states
    num_requests = max(0, rank.kv_bytes - FIXED_BYTES) // request
    try:
        shape = PoolShape.fit(
            rank.kv_bytes - num_requests * (windows + states),
            layout,
            model.num_full,
            rank.num_kv_heads,
            context,
            max(1, num_requests),
            SEGMENT,
        )
    except ConfigError:
        return FormatPlan(str(quant), request / context, 0, layout.page_bytes, starts=False)
    fitting = min(num_requests, shape.num_pages // pages)  # some slots stay empty
    return FormatPlan(
        str(quant),
        request / context,
        fitting,
        layout.page_bytes,
        shape.table_bytes,
        window_bytes=fitting * windows,
        state_bytes=fitting * states,
    )


@dataclass(frozen=True)
class Verdict:
    """Whether a format pays against bf16, judged by what a decode step must read.

    Attributes:
        name: text form of the format.
        batch_bf16: requests at once in bf16: what fits, or what was asked for.
        batch: likewise in the format.
        kv_share_bf16: share of the bytes of a bf16 decode step that are KV.
        kv_share: likewise of the format.
        gain: bytes read for a generated token in bf16, over those of the format: the most that
            decoding can gain where memory is its limit. Infinite where bf16 holds no request.
        text: in words.
    """

    name: str
    batch_bf16: int
    batch: int
    kv_share_bf16: float
    kv_share: float
    gain: float
    text: str


def verdict(
    rank: Rank, bf16: FormatPlan, ours: FormatPlan, context: int, num_asked: int | None
) -> Verdict:
    """Compare a format with bf16 at the batches that fit, capped by the requests that there are."""
    batch_bf16, batch = (
        plan.num_requests if num_asked is None else min(plan.num_requests, num_asked)
        for plan in (bf16, ours)
    )
    shares, costs = [], []
    for plan, num in ((bf16, batch_bf16), (ours, batch)):
        weights, kv = rank.weight_bytes_read(num), num * context * plan.bytes_per_token
        shares.append(kv / (weights + kv))
        costs.append((weights + kv) / num if num else float("inf"))
    gain = costs[0] / costs[1] if batch else 0.0
    return Verdict(
        ours.name,
        batch_bf16,
        batch,
        shares[0],
        shares[1],
        gain,
        _verdict_text(ours.name, batch_bf16, batch, shares[0], gain),
    )


def _verdict_text(name: str, batch_bf16: int, batch: int, kv_share: float, gain: float) -> str:
    if not batch:
        return f"no: {name} holds no request of this context either"
    if not batch_bf16:
        return f"yes: bf16 holds no request of this context, {name} holds {batch}"
    bound = "KV" if kv_share >= KV_BOUND else "weights"
    facts = (
        f"a bf16 decode step is {bound}-bound ({kv_share:.0%} of its bytes are KV at {batch_bf16} "
        f"requests); {name} reads {gain:.2f}x fewer bytes for a token, at {batch} requests"
    )
    if gain >= PAYS:
        return f"yes: {facts}"
    if gain >= PAYS_LITTLE:
        return f"a little: {facts}"
    return f"no: {facts}"
