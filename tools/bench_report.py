"""Make the tables and plots of docs/results/cpu from its JSON lines, and the README's table of results.

python tools/bench_report.py          # after make bench, which calls it
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffkv.lab.bench.gain_map import RATIOS, begins
from diffkv.lab.bench.plots import label, plot_attention, plot_map, plot_serving

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "cpu"
README = ROOT / "README.md"
BEGIN, END = "<!-- results: tools/bench_report.py -->", "<!-- end of results -->"

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]


def read(name: str) -> list[Row]:
    """Rows of a file; none if it was not made."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def commands() -> dict[str, str]:
    """What made each file: the targets of `make bench`."""
    lines = (ROOT / "Makefile").read_text().splitlines()
    made = [line.strip() for line in lines if "diffkv bench " in line]
    found = {}
    for line in made:
        words = line.removeprefix("$(BIN)/").split()
        out = next(word for word in words if word.startswith("$(RESULTS)/"))
        name = out.removeprefix("$(RESULTS)/").removesuffix(".jsonl")
        cut = words.index("--out")
        found[name] = " ".join(words[:cut])
    return found


def number(key: str, digits: int = 1, unit: float = 1.0) -> Callable[[Row], str]:
    """A column's figure, or a dash."""
    return lambda row: "—" if row.get(key) is None else f"{row[key] / unit:,.{digits}f}"


def times(key: str) -> Callable[[Row], str]:
    """A column's ratio, or a dash."""
    return lambda row: "—" if row.get(key) is None else f"{row[key]:.2f}x"


def span(key: str, digits: int = 1) -> Callable[[Row], str]:
    """A column's median with its least and most in brackets."""

    def text(row: Row) -> str:
        low, high = row[f"{key}_min"], row[f"{key}_max"]
        return f"{row[key]:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"

    return text


ATTENTION: list[Column] = [
    ("kernel", label),
    ("tokens", lambda row: f"{row['ctx']:,}"),
    ("requests", lambda row: f"{row['batch']}{', ragged' if row['ragged'] else ''}"),
    ("group", lambda row: str(row["group"])),
    ("ms (20 % to 80 %)", lambda r: f"{r['ms']:.3f} ({r['ms_p20']:.3f} to {r['ms_p80']:.3f})"),
    ("GB/s", number("gb_per_s")),
    ("of read", lambda row: f"{row['read_bandwidth_share']:.0%}"),
    ("faster than bf16", times("vs_stock_bf16")),
    ("than fp8", times("vs_stock_fp8")),
]
MANAGER: list[Column] = [
    ("operation", lambda row: row["op"]),
    ("requests", lambda row: str(row["num_requests"])),
    ("tokens", lambda row: f"{row['ctx']:,}"),
    ("layers x heads", lambda row: f"{row['num_layers']} x {row['num_kv_heads']}"),
    ("ms", number("ms", 3)),
    ("share", lambda row: "—" if row["op"].startswith("host") else f"{row['share']:.0%}"),
    ("of plan_decode", times("vs_plan_decode")),
]
EXPONENTS: list[Column] = [
    ("operation", lambda row: row["op"]),
    ("grows with", lambda row: row["sweep"]),
    ("from, to", lambda row: f"{row['sizes'][0]:,} to {row['sizes'][-1]:,}"),
    ("exponent", number("exponent", 2)),
]
OVERHEAD: list[Column] = [
    ("max_model_len", lambda row: f"{row['max_model_len']:,}"),
    ("tables", lambda row: f"{row['tables']:.2%}"),
    ("ring", lambda row: f"{row['ring']:.2%}"),
    ("half-empty pages", lambda row: f"{row['half_empty_pages']:.2%}"),
    ("sum", lambda row: f"{row['overhead']:.2%}"),
]
THROUGHPUT: list[Column] = [
    ("engine", label),
    ("tokens/s", span("tokens_per_s")),
    ("decoding, tokens/s", span("decode_tokens_per_s")),
    ("prefill, tokens/s", number("prefill_tokens_per_s", 0)),
    ("requests at once", number("max_running", 0)),
    ("preempted", number("preemptions", 0)),
    ("KV bytes a token", number("bytes_per_token", 0)),
    ("high", lambda row: "—" if row.get("high_share") is None else f"{row['high_share']:.0%}"),
    ("peak memory, GB", number("peak_memory_bytes", 2, 1e9)),
    ("of bf16", times("vs_stock_bf16")),
    ("decoding, of bf16", times("decode_vs_stock_bf16")),
    ("decoding, of fp8", times("decode_vs_stock_fp8")),
    ("prefill, of bf16", times("prefill_vs_stock_bf16")),
]
MAP: list[Column] = [
    ("KV, MB", number("kv_bytes", 0, 1e6)),
    ("prompt tokens", lambda row: f"{row['ctx']:,}"),
    ("requests", lambda row: str(row["requests"])),
    ("engine", label),
    ("decoding, tokens/s", number("decode_tokens_per_s")),
    ("whole run, tokens/s", number("tokens_per_s")),
    ("requests at once", number("max_running", 0)),
    *((words, times(key)) for key, words in RATIOS.items()),
]
PROMPT: list[Column] = [
    ("formats", lambda row: row["quant"]),
    ("prompt tokens", lambda row: f"{row['ctx']:,}"),
    ("significance, ms", number("significance_ms")),
    ("store, ms", number("store_prompt_ms")),
    ("vLLM's own prefill, ms", number("stock_prefill_ms", 0)),
    ("share", lambda row: f"{row['share']:.1%}"),
]
SERVING: list[Column] = [
    ("engine", label),
    ("requests/s", number("rate", 2)),
    ("tokens/s", number("output_throughput")),
    *(
        (f"{metric} p50 / p95 / p99 ms", lambda row, m=metric: percentiles(row, m))
        for metric in ("ttft", "tpot", "itl", "e2el")
    ),
    ("good requests/s", number("request_goodput", 2)),
]
SHORT = (
    "engine",
    "decoding, tokens/s",
    "requests at once",
    "KV bytes a token",
    "decoding, of bf16",
)


def percentiles(row: Row, metric: str) -> str:
    """Three percentiles of a latency."""
    values = [row.get(f"p{p}_{metric}_ms") for p in (50, 95, 99)]
    return " / ".join("—" if value is None else f"{value:,.0f}" for value in values)


def table(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """Rows in Markdown; those that did not run have their reason in the second column."""
    lines = ["| " + " | ".join(name for name, _ in columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        if "error" in row:
            rest = " |" * (len(columns) - 2)
            lines.append(f"| {label(row)} | did not run: {row['error']} |{rest}")
        else:
            lines.append("| " + " | ".join(cell(row) for _, cell in columns) + " |")
    return "\n".join(lines)


def section(title: str, command: str, rows: Sequence[Row], body: str) -> str:
    """A part of the page: what was asked, the command, the machine, the figures."""
    first = rows[0]
    machine = (
        f"{first['device']}; vLLM {first['vllm']}, torch {first['torch']}, DiffKV {first['diffkv']} "
        f"at {first['commit']}."
    )
    return f"## {title}\n\n`{command}`\n\n{machine}\n\n{body}\n"


def page() -> str:
    """docs/results/cpu/README.md."""
    made = commands()
    parts = [
        "# On a CPU\n\nWhat `make bench` measured; this page is made from the JSON lines beside it by "
        "`tools/bench_report.py`. What the figures mean, and what they do not show, is in "
        "[performance](../../performance.md).\n"
    ]
    attention = read("attention")
    if attention:
        plot_attention(attention, RESULTS / "attention.png")
        body = table(ATTENTION, attention) + "\n\n![speed by context](attention.png)"
        parts.append(section("Decode attention", made["attention"], attention, body))
    manager = read("manager")
    if manager:
        timed = [row for row in manager if "ms" in row]
        body = "\n\n".join(
            (
                table(MANAGER, timed),
                table(EXPONENTS, [row for row in manager if "exponent" in row]),
                "What of a budget is not tokens, for requests of 1024 tokens:",
                table(OVERHEAD, [row for row in manager if row["op"] == "overhead"]),
            )
        )
        parts.append(section("The pool's own work", made["manager"], manager, body))
    throughput = read("throughput")
    if throughput:
        body = table(THROUGHPUT, throughput)
        parts.append(section("Offline throughput", made["throughput"], throughput, body))
    mapped = read("map")
    gains = [row for row in mapped if row["op"] == "map"]
    if gains:
        plot_map(gains, RATIOS, RESULTS / "map.png")
        where = "\n".join(f"* {line}" for line in begins(gains))
        prompts = table(PROMPT, [row for row in mapped if row["op"] == "prompt"])
        body = "\n\n".join(
            (
                table(MAP, gains),
                where,
                "![where the gain is](map.png)",
                "What scoring and storing a prompt takes, in all layers:",
                prompts,
            )
        )
        parts.append(section("Where the gain is", made["map"], gains, body))
    serving = read("serving")
    if serving:
        plot_serving([row for row in serving if "error" not in row], RESULTS / "serving.png")
        body = table(SERVING, serving) + "\n\n![latency by rate](serving.png)"
        parts.append(section("Serving", made["serving"], serving, body))
    return "\n".join(parts)


def short_table() -> str:
    """The README's: throughput in few columns, and its command."""
    rows = read("throughput")
    if not rows:
        return "No results yet: `make bench`."
    columns = [column for column in THROUGHPUT if column[0] in SHORT]
    first = rows[0]
    return (
        f"`{commands()['throughput']}` on {first['device']}, {first['workload']} tokens, "
        f"{first['requests']} requests, {first['kv_bytes'] / 1e6:.0f} MB of KV for all:\n\n"
        f"{table(columns, rows)}"
    )


def main() -> None:
    """Write the page, the plots and the README's table."""
    (RESULTS / "README.md").write_text(page())
    text = README.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n{short_table()}\n{END}{after}")


if __name__ == "__main__":
    main()
