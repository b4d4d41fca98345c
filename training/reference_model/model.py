"""The Llama of the reference model, for training: parameter names are those of transformers.

`transformers.LlamaForCausalLM` computes the same logits; `export.py` checks that. This one is
shorter and faster on a CPU.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model."""

    vocab_size: int
    hidden_size: int = 256
    num_layers: int = 3
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 512
    rope_theta: float = 5e5
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 4096

    @property
    def heads_per_kv_head(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def inverse_frequencies(self) -> Tensor:
        """RoPE frequencies in radians per token, [head_dim / 2] fp32, the fastest first."""
        exponents = torch.arange(0, self.head_dim, 2).float() / self.head_dim
        return 1.0 / self.rope_theta**exponents


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to [batch, heads, num_tokens, head_dim]; cos and sin [num_tokens, head_dim]."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], -1) * sin


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in fp32."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        """Start with unit weights."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return F.rms_norm(hidden.float(), self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Causal grouped-query attention with RoPE."""

    def __init__(self, config: ModelConfig) -> None:
        """Create the four projections."""
        super().__init__()
        self.config = config
        query_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend within [batch, num_tokens, hidden_size]."""
        batch_size, num_tokens, _ = hidden.shape
        by_head = (batch_size, num_tokens, -1, self.config.head_dim)
        query = self.q_proj(hidden).view(by_head).transpose(1, 2)
        key = self.k_proj(hidden).view(by_head).transpose(1, 2)
        value = self.v_proj(hidden).view(by_head).transpose(1, 2)
        cos, sin = cos.to(query.dtype), sin.to(query.dtype)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        key = key.repeat_interleave(self.config.heads_per_kv_head, 1)
        value = value.repeat_interleave(self.config.heads_per_kv_head, 1)
        context = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(context.transpose(1, 2).reshape(batch_size, num_tokens, -1))


class MLP(nn.Module):
    """Gated SiLU feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        """Create the three projections."""
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map [..., hidden_size] to the same shape."""
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and added to its input."""

    def __init__(self, config: ModelConfig) -> None:
        """Create the parts."""
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map [batch, num_tokens, hidden_size] to the same shape."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cos, sin)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class ReferenceModel(nn.Module):
    """Decoder with tied embeddings; `state_dict` lacks only the prefix `model.` of transformers."""

    def __init__(self, config: ModelConfig) -> None:
        """Create the layers and draw the weights from torch's global generator."""
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        positions = torch.arange(config.max_position_embeddings).float()
        angles = positions[:, None] * config.inverse_frequencies.repeat(2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        initialize(self)

    def forward(self, token_ids: Tensor, selected: Tensor | None = None) -> Tensor:
        """Compute logits.

        Args:
            token_ids: [batch, num_tokens] int64.
            selected: [batch, num_tokens] bool, positions whose logits are wanted; None: all.

        Returns:
            [num_selected, vocab_size], or [batch, num_tokens, vocab_size] where None.
        """
        num_tokens = token_ids.shape[1]
        cos, sin = self.cos[:num_tokens], self.sin[:num_tokens]
        hidden = self.embed_tokens(token_ids)
        for layer in self.layers:
            hidden = layer(hidden, cos, sin)
        hidden = self.norm(hidden)
        if selected is not None:
            hidden = hidden[selected]
        return F.linear(hidden, self.embed_tokens.weight)


@torch.no_grad()
def initialize(model: ReferenceModel) -> None:
    """Draw all weights, then give layer 0 its previous-token heads. In place."""
    for name, weight in model.named_parameters():
        if weight.dim() != 2:
            continue
        is_embedding = "embed_tokens" in name
        nn.init.normal_(weight, std=0.04 if is_embedding else 0.5 / math.sqrt(weight.shape[1]))
        if "o_proj" in name or "down_proj" in name:
            weight.mul_(0.5)
    add_previous_token_heads(model)


@torch.no_grad()
def add_previous_token_heads(model: ReferenceModel) -> None:
    """Let the first heads of layer 0 look 1, 1, 2 and 3 tokens back from the start. In place.

    Coordinate 0 of every embedding is the same constant. The keys of KV head 0 read it into the
    fastest RoPE pairs, and its query heads read it turned back by their offset, so that the
    score is largest at that distance. Retrieval forms in minutes with these heads; they are only
    a start, and training changes them.
    """
    config = model.config
    constant, score_scale, num_pairs, noise_scale = 0.16, 7.0 / 3.9, 6, 0.1
    head_dim, half = config.head_dim, config.head_dim // 2
    frequencies = config.inverse_frequencies[:num_pairs]
    model.embed_tokens.weight[:, 0] = constant
    query = model.layers[0].self_attn.q_proj.weight
    key = model.layers[0].self_attn.k_proj.weight
    key[:head_dim] *= noise_scale
    key[:num_pairs, 0] = score_scale
    for head, offset in enumerate([1, 1, 2, 3][: config.heads_per_kv_head]):
        start = head * head_dim
        query[start : start + head_dim] *= noise_scale
        query[start : start + num_pairs, 0] = score_scale * torch.cos(offset * frequencies)
        query[start + half : start + half + num_pairs, 0] = -score_scale * torch.sin(
            offset * frequencies
        )
