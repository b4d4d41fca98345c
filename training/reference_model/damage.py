"""Measures what quantising and dropping cost a reference model, without pages: fake quantisation.

    python training/reference_model/damage.py src/diffkv/data/reference-128 --tasks pairs long_chain

A sample's prompt up to its question is computed exactly; then its keys and values are quantised, and
tokens dropped, for each layer and KV head on its own, before the question comes. Question and answer are
in the cache in the high format. One pass computes a whole sample, so nothing is demoted as answers grow.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from hard_tasks import HARD_EXAMS, hard_exam
from model import ReferenceModel, rotate
from presets import PRESETS
from safetensors.torch import load_file
from tasks import ASK, COPY, SUM, TASKS, WALK, Exam
from torch import Tensor

from diffkv.layout import PageLayout
from diffkv.policy import (
    DROPPED,
    HIGH,
    LOW,
    SCORED_QUERIES,
    WINDOW,
    Thresholds,
    key_difference,
    paper_tiers,
)
from diffkv.quant import Format, QuantConfig
from diffkv.reference.quantize import dequantize, quantize
from diffkv.rotation import hadamard_matrix

Score = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(query [Hq, N, D], key [Hkv, N, D], value) of a prompt -> scores [Hkv, N], more is better."""


@dataclass(frozen=True)
class Method:
    """One way of compressing: formats, thresholds or a share of tokens to keep, and rotation."""

    quant: str
    alpha_high: float = 0.0
    alpha_low: float = 0.0
    rule: str = "last64"
    keep: float = 1.0
    rotated: bool = False

    def label(self) -> str:
        """Write the method in a word."""
        parts = [self.quant]
        if self.alpha_high or self.alpha_low:
            parts.append(f"h{self.alpha_high:g} l{self.alpha_low:g}")
        if self.keep < 1:
            parts.append(f"{self.rule} keeps {self.keep:g}")
        return " ".join(parts + ["hadamard"] * self.rotated)


def attention_sums(query: Tensor, key: Tensor, last: int) -> Tensor:
    """Mean attention of a prompt's last queries to each token, maximum over the group: [Hkv, N]."""
    group, num_tokens = len(query) // len(key), key.shape[1]
    last = min(last, num_tokens)
    scores = query[:, -last:] @ key.repeat_interleave(group, 0).mT * query.shape[-1] ** -0.5
    seen = torch.ones(last, num_tokens, dtype=torch.bool, device=key.device).tril(num_tokens - last)
    sums = scores.masked_fill(~seen, -torch.inf).softmax(-1).sum(1)
    counts = (num_tokens - torch.arange(num_tokens, device=key.device)).clamp(max=last)
    return sums.view(len(key), group, -1).amax(1) / counts


def random_scores(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """No rule at all."""
    return torch.rand(key.shape[:2], generator=torch.Generator().manual_seed(0)).to(key.device)


def ranked(scores: Tensor) -> Tensor:
    """Ranks in [0, 1) of scores along the last dimension."""
    return scores.argsort(-1).argsort(-1) / scores.shape[-1]


def half_random(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The last 64 queries choose one half of what stays, chance the other."""
    by_attention = ranked(attention_sums(query, key, SCORED_QUERIES))
    return torch.maximum(by_attention, ranked(random_scores(query, key, value)))


RULES: dict[str, Score] = {
    "last64": lambda q, k, v: attention_sums(q, k, SCORED_QUERIES),
    "all": lambda q, k, v: attention_sums(q, k, k.shape[1]),
    "all*|v|": lambda q, k, v: attention_sums(q, k, k.shape[1]) * v.norm(dim=-1),
    "keydiff": lambda q, k, v: key_difference(k),
    "random": random_scores,
    "last64|random": half_random,
    "all|keydiff": lambda q, k, v: torch.maximum(
        ranked(attention_sums(q, k, k.shape[1])), ranked(key_difference(k))
    ),
}


def stored(x: Tensor, bits: int, groups: int) -> Tensor:
    """Vectors [..., D] as a cache of that format gives them back."""
    if bits == 16:
        return x
    codes, meta = quantize(x.reshape(-1, x.shape[-1]), bits, groups)
    return dequantize(codes, meta, bits, torch.float32).view(x.shape)


def as_stored(key: Tensor, value: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Keys and values as a format gives them back."""
    return stored(key, fmt.k_bits, fmt.k_groups), stored(value, fmt.v_bits, fmt.v_groups)


def choose_tiers(method: Method, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Tiers of a prompt's tokens, [Hkv, N] int8."""
    num_tokens = key.shape[1]
    if method.keep == 1.0:
        means = attention_sums(query, key, SCORED_QUERIES)
        return paper_tiers(means, Thresholds(method.alpha_high, method.alpha_low), WINDOW)
    scores = RULES[method.rule](query, key, value)
    scores[:, -WINDOW:] = torch.inf
    kept = scores.topk(max(WINDOW, round(method.keep * num_tokens)), dim=-1).indices
    low = LOW if QuantConfig.parse(method.quant).low else HIGH
    tiers = torch.full(scores.shape, DROPPED, dtype=torch.int8, device=key.device)
    tiers.scatter_(1, kept, low)
    tiers[:, -WINDOW:] = HIGH
    return tiers


class Damaged:
    """A model whose cache is compressed by a method once the prompt has been read."""

    def __init__(self, model: ReferenceModel, biases: dict[str, Tensor]) -> None:
        """Keep the model; `biases` of the projections by name, {} where it has none."""
        self.model, self.biases = model, biases
        head_dim = model.config.head_dim
        self.rotation = hadamard_matrix(head_dim).to(model.embed_tokens.weight.device)

    @torch.no_grad()
    def logits(self, token_ids: Tensor, num_prompt: int, method: Method) -> tuple[Tensor, float]:
        """Logits [num_tokens, vocabulary] of one sample, and bytes a token and head of the prompt."""
        model, config = self.model, self.model.config
        cos, sin = model.cos[: len(token_ids)], model.sin[: len(token_ids)]
        hidden, num_bytes = model.embed_tokens(token_ids), []
        for i, layer in enumerate(model.layers):
            normed, attention = layer.input_layernorm(hidden), layer.self_attn
            q, k, v = (
                F.linear(normed, getattr(attention, name).weight, self._bias(i, name))
                .view(len(token_ids), -1, config.head_dim)
                .transpose(0, 1)
                for name in ("q_proj", "k_proj", "v_proj")
            )
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            context, spent = self._attend(q, k, v, num_prompt, method)
            num_bytes.append(spent)
            context = context.transpose(0, 1).reshape(len(token_ids), -1)
            hidden = hidden + F.linear(context, attention.o_proj.weight, self._bias(i, "o_proj"))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        logits = F.linear(model.norm(hidden), model.embed_tokens.weight)
        return logits, float(np.mean(num_bytes))

    def _bias(self, layer: int, name: str) -> Tensor | None:
        return self.biases.get(f"layers.{layer}.self_attn.{name}.bias")

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, num_prompt: int, method: Method
    ) -> tuple[Tensor, float]:
        quant, group = QuantConfig.parse(method.quant), len(q) // len(k)
        prompt, tail = slice(num_prompt), slice(num_prompt, None)
        if method.rotated:
            q, k, v = q @ self.rotation, k @ self.rotation, v @ self.rotation
        wide_k, wide_v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        exact = F.scaled_dot_product_attention(
            q[:, prompt], wide_k[:, prompt], wide_v[:, prompt], is_causal=True
        )
        tiers = choose_tiers(method, q[:, prompt], k[:, prompt], v[:, prompt])
        high_k, high_v = as_stored(k, v, quant.high)
        if quant.low:
            low_k, low_v = as_stored(k[:, prompt], v[:, prompt], quant.low)
            is_low = (tiers == LOW)[..., None]
            high_k[:, prompt] = torch.where(is_low, low_k, high_k[:, prompt])
            high_v[:, prompt] = torch.where(is_low, low_v, high_v[:, prompt])
        num_tokens = k.shape[1]
        seen = torch.ones(num_tokens - num_prompt, num_tokens, dtype=torch.bool, device=k.device)
        seen = seen.tril(num_prompt).repeat(len(k), 1, 1)
        seen[:, :, prompt] &= (tiers != DROPPED)[:, None]
        late = F.scaled_dot_product_attention(
            q[:, tail],
            high_k.repeat_interleave(group, 0),
            high_v.repeat_interleave(group, 0),
            attn_mask=seen.repeat_interleave(group, 0),
        )
        context = torch.cat([exact, late], 1)
        layout = PageLayout.derive(quant, k.shape[-1])
        spent = sum(
            (tiers == tier).float().mean().item() * layout.page_token_bytes(tier)
            for tier in range(len(layout.tiers))
        )
        return context @ self.rotation.T if method.rotated else context, spent


def question_start(prompt: Sequence[int]) -> int:
    """Index of a prompt's last question."""
    start = max(i for i, token in enumerate(prompt) if token in (ASK, WALK, SUM, COPY))
    return start - (prompt[start - 1] == prompt[start])


def load(folder: Path, device: str) -> Damaged:
    """Read an exported model."""
    settings = json.loads((folder / "config.json").read_text())
    preset = "reference-128" if settings["head_dim"] == 128 else "reference"
    model = ReferenceModel(PRESETS[preset].config)
    weights = {
        name.removeprefix("model."): weight.float()
        for name, weight in load_file(folder / "model.safetensors").items()
    }
    biases = {n: weights.pop(n).to(device) for n in list(weights) if n.endswith("_proj.bias")}
    model.load_state_dict(weights)
    return Damaged(model.to(device).eval(), biases)


def measure(damaged: Damaged, exams: list[Exam], methods: list[Method]) -> list[dict[str, float]]:
    """Accuracy, share of samples without an error, KL to the full cache, and bytes, by method."""
    device = damaged.model.embed_tokens.weight.device
    rows: list[list[tuple[float, float, float, float]]] = [[] for _ in methods]
    for question in exams:
        token_ids = torch.tensor(question.prompt + question.continuation, device=device)
        num_prompt, num_answers = question_start(question.prompt), len(question.continuation)
        scored = torch.tensor(question.is_scored, device=device)
        full, _ = damaged.logits(token_ids, num_prompt, Method("k16v16"))
        full = full[-num_answers - 1 : -1][scored].log_softmax(-1)
        for row, method in zip(rows, methods, strict=True):
            logits, num_bytes = damaged.logits(token_ids, num_prompt, method)
            logits = logits[-num_answers - 1 : -1][scored].log_softmax(-1)
            right = (logits.argmax(-1) == token_ids[-num_answers:][scored]).float()
            kl = F.kl_div(logits, full, log_target=True, reduction="batchmean")
            row.append((right.mean().item(), right.amin().item(), kl.item(), num_bytes))
    names = ("accuracy", "exact", "kl", "bytes")
    return [dict(zip(names, np.mean(row, 0).tolist(), strict=True)) for row in rows]


SETS = {
    "formats": [
        Method(quant, alpha, rotated=rotated)
        for quant, alpha in (
            ("k16v16", 0), ("k8v4", 0), ("k4v4", 0), ("k4v2", 0), ("k2v2", 0), ("k8v4-k4v2", 3),
            ("k8v4-k2v2", 3), ("k8v4g1x2-k4v2g2x4", 3),
        )
        for rotated in (False, True)
    ],
    # the window, question and answer in 8 bits, and nothing else: what do the other high tokens add?
    "window": [Method("k8v4-k4v4", 1e9), Method("k8v4-k4v2", 1e9), Method("k8v4-k4v2", 3)],
    "rules": [Method("k8v4-k4v2", 3)] + [
        Method("k8v4-k4v2", rule=rule, keep=keep) for keep in (0.75, 0.5, 0.25) for rule in RULES
    ],
}  # fmt: skip


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=(*TASKS, *HARD_EXAMS), required=True)
    parser.add_argument("--methods", choices=list(SETS), default="formats")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    damaged = load(args.folder, args.device)
    print("| task | method | bytes | accuracy | exact | KL |\n|---|---|---:|---:|---:|---:|")
    for task in args.tasks:
        rng = np.random.default_rng([7, args.tokens])
        exams = [hard_exam(rng, task, args.tokens) for _ in range(args.samples)]
        methods = SETS[args.methods]
        for method, row in zip(methods, measure(damaged, exams, methods), strict=True):
            print(
                f"| {task} | {method.label()} | {row['bytes']:.0f} | {row['accuracy']:.4f} "
                f"| {row['exact']:.2f} | {row['kl']:.5f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
