"""Offline throughput: the same prompts and the same KV budget, vLLM's own cache and DiffKV's in turn."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffkv.lab.bench.child import Child, medians, started
from diffkv.lab.bench.engine import Job, Load
from diffkv.lab.rows import Row, Writer
from diffkv.layout import bf16_bytes_per_token
from diffkv.quant import ConfigError

__all__ = [
    "OURS",
    "STOCK",
    "Setting",
    "Workload",
    "add_rows",
    "bf16_bytes",
    "label",
    "random_workload",
    "room_for",
    "run",
    "settings",
    "text_workload",
    "tokenizer",
]

OURS = "diffkv"
STOCK = ("bf16", "fp8")
"""Dtypes of vLLM's own cache that others are compared with.

Engines in rows are `OURS`, or "stock " with a dtype.
"""

COMPARED = {
    "tokens_per_s": "vs_stock_",
    "decode_tokens_per_s": "decode_vs_stock_",
    "prefill_tokens_per_s": "prefill_vs_stock_",
}
"""Figures of a run, and how their ratios to a stock engine's begin; of times in ms the inverse."""
NO_PREFIXES = ", no prefix caching"
BLOCK_TOKENS = 128
"""Tokens of a block of vLLM's own cache on CPUs; one block is never given to a request."""


def room_for(requests: int, config: dict[str, Any], longest: int) -> int:
    """A KV budget in which vLLM's own bf16 cache holds so many requests of a length, and no more."""
    blocks = requests * -(-longest // BLOCK_TOKENS) + 2
    return blocks * BLOCK_TOKENS * bf16_bytes(config)


def bf16_bytes(config: dict[str, Any]) -> int:
    """Bytes of a token in vLLM's own cache, by a `config.json` that may lack head_dim and KV heads."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    kv_heads = config.get("num_key_value_heads", heads)
    return bf16_bytes_per_token(config["num_hidden_layers"] * kv_heads, head_dim)


@dataclass(frozen=True)
class Setting:
    """One engine: vLLM's own cache in a dtype, or DiffKV's.

    Attributes:
        name: name in its rows: "stock " with a dtype, or `OURS`.
        quant: format of the cache; None if it is not known.
        options: DiffKV's; None for vLLM's own.
        engine: arguments of vLLM's engine that make it so.
    """

    name: str
    quant: str | None
    options: dict[str, Any] | None
    engine: dict[str, Any]

    @property
    def case(self) -> dict[str, Any]:
        """What its rows say of it."""
        quant = {} if self.quant is None else {"quant": self.quant}
        caching = self.engine.get("enable_prefix_caching")
        found = {} if caching is None else {"prefix_caching": caching}
        return {"engine": self.name, **(self.options or {}), **quant, **found}

    @property
    def label(self) -> str:
        """Its name for readers."""
        return _label(self.case)


def label(row: Row) -> str:
    """Name of a row's engine, or of its kernel, for readers."""
    return _label({**row.measured, **row.case})


def _label(case: dict[str, Any]) -> str:
    name = f"{OURS} {case['quant']}" if case["engine"] == OURS else str(case["engine"])
    tiers = f", {case['tiers']}" if case.get("tiers") else ""
    return name + tiers + (NO_PREFIXES if case.get("prefix_caching") is False else "")


def settings(options: Sequence[dict[str, Any]], stock: Sequence[str] = STOCK) -> list[Setting]:
    """vLLM's own cache in each dtype of `stock`, then DiffKV with each set of options."""
    others = [
        Setting(f"stock {dtype}", dtype, None, {} if dtype == "bf16" else {"kv_cache_dtype": dtype})
        for dtype in stock
    ]
    return others + [Setting(OURS, each["quant"], each, {}) for each in options]


@dataclass(frozen=True)
class Workload:
    """Prompts, and how many tokens to generate for each."""

    name: str
    prompts: list[list[int]]
    max_tokens: list[int]

    @property
    def longest(self) -> int:
        """Tokens of the longest request with its answer."""
        return max(len(p) + n for p, n in zip(self.prompts, self.max_tokens, strict=True))

    @property
    def load(self) -> Load:
        """What an engine runs."""
        return [[prompt] for prompt in self.prompts], self.max_tokens


def random_workload(
    num: int, input_len: int, output_len: int, range_ratio: float, vocabulary: int, seed: int = 0
) -> Workload:
    """Prompts of random tokens; lengths are uniform within a share of the mean, as in vLLM's own."""
    rng = random.Random(seed)

    def length(mean: int) -> int:
        spread = int(mean * range_ratio)
        return max(1, rng.randint(mean - spread, mean + spread))

    prompts = [rng.choices(range(3, vocabulary), k=length(input_len)) for _ in range(num)]
    name = f"random {input_len} in, {output_len} out"
    return Workload(name, prompts, [length(output_len) for _ in range(num)])


def text_workload(path: Path, model: str, num: int | None, output_len: int) -> Workload:
    """Prompts from JSON lines with "prompt", in the tokens of a model's folder.

    Raises:
        ConfigError: the file or the tokenizer cannot be read.
    """
    encode = tokenizer(model).encode
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        texts = [str(json.loads(line)["prompt"]) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f'{path} is no file of JSON lines with "prompt": {error}') from None
    if not texts:
        raise ConfigError(f"{path} holds no prompt")
    texts = [texts[i % len(texts)] for i in range(num or len(texts))]
    prompts = [encode(text).ids for text in texts]
    return Workload(path.name, prompts, [output_len] * len(prompts))


def tokenizer(model: str) -> Any:
    """The tokenizer of a model's folder.

    Raises:
        ConfigError: there is none.
    """
    path = Path(model) / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"a workload of texts needs a model folder with tokenizer.json: {model}")
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path))


def run(
    engine: dict[str, Any],
    workloads: Sequence[Workload],
    kv_bytes: int,
    compared: Sequence[Setting],
    repeats: int,
    writer: Writer,
    facts: dict[str, Any],
    profile: bool = False,
    together: bool = False,
) -> None:
    """Run every setting `repeats` times, in turn, each in a process of its own; a row for each setting.

    Engines that are there together serve all loads and repeats; else each run starts its own. They have
    room for the longest request, and as many at once as the largest load has.

    Args:
        engine: arguments of vLLM's engine that all settings share, the model among them.
        workloads: what to generate.
        kv_bytes: KV budget, tables included, the same for all.
        compared: settings; ratios are to those named stock.
        repeats: runs of each setting.
        writer: gets the rows.
        facts: settings that belong into every row.
        profile: print the first repeat's profile of each setting to standard error.
        together: keep all engines, if there is memory for them.

    Raises:
        ConfigError: no setting could run.
    """
    shared = {
        "max_model_len": max(each.longest for each in workloads) + 1,
        "max_num_seqs": max(len(each.prompts) for each in workloads),
        **engine,
    }
    cells = [each.load for each in workloads]
    jobs = [Job({**shared, **each.engine}, each.options, kv_bytes, cells) for each in compared]
    added = []
    with ExitStack() as stack:
        kept = started(stack, jobs) if together else None
        for cell, workload in enumerate(workloads):
            case = {"kv_bytes": kv_bytes, "workload": workload.name}
            case |= {"requests": len(workload.prompts), "repeats": repeats}
            writer.note(f"{workload.name}, {case['requests']} requests, {kv_bytes} bytes of KV")
            results: list[list[dict[str, Any]]] = [[] for _ in compared]
            for repeat in range(repeats):
                for index, (setting, done) in enumerate(zip(compared, results, strict=True)):
                    if done and "error" in done[-1]:
                        continue
                    if kept is not None:
                        done.append(kept[index].run(cell))
                    else:
                        with Child(replace(jobs[index], profile=profile and repeat == 0)) as child:
                            done.append(child.run(cell))
                    writer.note(f"  {repeat + 1} of {repeats}, {_progress(setting, done[-1])}")
            added += add_rows(writer, "throughput", {**facts, **case}, compared, results, _text)
    if all(row.error is not None for row in added):
        raise ConfigError(f"no engine could run: {added[0].error}")


def add_rows(
    writer: Writer,
    kind: str,
    case: dict[str, Any],
    compared: Sequence[Setting],
    results: Sequence[Sequence[dict[str, Any]]],
    text: Callable[[Row], str],
    figures: Mapping[str, str] = COMPARED,
) -> list[Row]:
    """Add a row for each setting: its figures, and their ratios to those of vLLM's own cache.

    Where some settings cache prefixes, vLLM's own of those without are compared with, not by.

    Args:
        writer: gets the rows.
        kind: their kind.
        case: what they have in common.
        compared: settings.
        results: what the repeats of each setting found.
        text: what a reader is shown of a row.
        figures: what is compared, as in `COMPARED`.
    """
    found = [_joined(each, figures) for each in results]
    stock = {
        code: mine
        for setting, mine in zip(compared, found, strict=True)
        for code in STOCK
        if setting.name == f"stock {code}" and "error" not in mine
        if setting.engine.get("enable_prefix_caching") is not False
    }
    added = []
    for setting, mine in zip(compared, found, strict=True):
        error = mine.get("error")
        measured = {} if error else {**mine, **_ratios(mine, stock, figures)}
        added.append(writer.add(kind, {**case, **setting.case}, measured, text, error))
    return added


def _joined(results: Sequence[dict[str, Any]], figures: Mapping[str, str]) -> dict[str, Any]:
    """Medians of a setting's repeats, with the least and the most of what is compared."""
    found = medians(results)
    if "error" in found:
        return found
    for name in figures:
        values = [result[name] for result in results]
        found[f"{name}_min"], found[f"{name}_max"] = min(values), max(values)
    return found


def _ratios(
    mine: dict[str, Any], stock: Mapping[str, dict[str, Any]], figures: Mapping[str, str]
) -> dict[str, float]:
    """How many times better a setting is than each of vLLM's own caches that ran."""
    return {
        name + code: other[figure] / mine[figure]
        if figure.endswith("_ms")
        else mine[figure] / other[figure]
        for code, other in stock.items()
        for figure, name in figures.items()
    }


def _progress(setting: Setting, result: dict[str, Any]) -> str:
    if "error" in result:
        return f"{setting.label}: {result['error']}"
    return f"{setting.label}: {_figures(result)}"


def _figures(found: Mapping[str, Any]) -> str:
    text = (
        f"{found['tokens_per_s']:8.1f} tokens/s, decoding {found['decode_tokens_per_s']:.1f}, prefill "
        f"{found['prefill_tokens_per_s']:.0f}, at once {found['max_running']:.0f}, "
        f"{found['preemptions']:.0f} preempted, {found['bytes_per_token']:.0f} B/token, "
        f"{found['peak_memory_bytes'] / 1e9:.2f} GB"
    )
    high = found.get("high_share")
    return text if high is None else f"{text}, {high:.1%} high"


def _text(row: Row) -> str:
    name = f"  {label(row)}"
    if row.error is not None:
        return f"{name:24} did not run: {row.error}"
    text = (
        f"{name:24} {_figures(row.measured)}; decoding from {row['decode_tokens_per_s_min']:.1f} to "
        f"{row['decode_tokens_per_s_max']:.1f}"
    )
    for code in STOCK:
        whole, decode, prefill = (row.get(name + code) for name in COMPARED.values())
        if whole is not None and row["engine"] == OURS:
            text += f"; {whole:.2f}x of {code}, decoding {decode:.2f}x, prefill {prefill:.2f}x"
    return text
