"""Plots of the attention rows of gpu.sh: `python benchmarks/gpu_plots.py DIR [--stem gpu]`."""

import argparse
import json
import sys
from pathlib import Path

QUANTS = {
    "vllm fa3 bf16": "vLLM flash-attention 3, bf16",
    "vllm fa3 fp8": "vLLM flash-attention 3, fp8",
    "vllm turboquant_k8v4": "vLLM TurboQuant k8v4",
    "vllm turboquant_4bit_nc": "vLLM TurboQuant 4 bit",
    "bf16 sdpa flash": "torch flash-attention, bf16",
    "k8v8": "diffkv k8v8",
    "k8v4": "diffkv k8v4",
    "k8v4-k4v2": "diffkv k8v4-k4v2, a fifth high",
    "k4v2": "diffkv k4v2",
}
GROUP, HIGH = 4, 0.2
MAIN, BATCH = (32, 16384), 8
BASE = "bf16 sdpa flash"


def read(path: Path) -> dict[tuple[str, int, int], dict]:
    """Rows of attention by (quant, batch, context), uniform requests, launched as by default.

    A row whose 80th percentile is twice its 20th was disturbed and is left out.
    """
    found: dict[tuple[str, int, int], dict] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        usual = row.get("kind") == "uniform" and row.get("high", HIGH) == HIGH
        usual = usual and row["ms_p80"] < 2 * row["ms_p20"]
        if row.get("op") == "attend" and usual and row["group"] == GROUP and row["quant"] in QUANTS:
            found.setdefault((row["quant"], row["batch"], row["context"]), row)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stem", default="gpu", help="of the rows' file and of the plots")
    args = parser.parse_args()
    try:
        import matplotlib
    except ImportError:
        print("no plots: matplotlib is not installed")
        return 0
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read(args.folder / f"{args.stem}.jsonl")
    if not any(key[1:] == MAIN for key in rows):
        print(f"no plots: no rows of {MAIN[0]} requests of {MAIN[1]} tokens")
        return 0
    device = next(iter(rows.values()))["device"]
    bars = {title: rows[key]["ms"] for q, title in QUANTS.items() if (key := (q, *MAIN)) in rows}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 4.5))
    drawn = left.barh(list(bars), list(bars.values()))
    left.bar_label(drawn, fmt="%.2f", padding=2)
    left.set(xlabel="ms", title=f"{MAIN[0]} requests of {MAIN[1] >> 10} K tokens, {device}")
    left.invert_yaxis()
    contexts = sorted({context for _, batch, context in rows if batch == BATCH})
    for quant, title in QUANTS.items():
        points = [
            (context, rows[BASE, BATCH, context]["ms"] / rows[quant, BATCH, context]["ms"])
            for context in contexts
            if {(BASE, BATCH, context), (quant, BATCH, context)} <= rows.keys()
        ]
        if points:
            right.plot(*zip(*points, strict=True), marker="o", markersize=4, label=title)
    right.set(
        xscale="log", yscale="log", xlabel=f"tokens of each of {BATCH} requests",
        ylabel=f"times as fast as {QUANTS[BASE]}",
        title="decode attention, 8 KV heads x 4, head_dim 128",
    )  # fmt: skip
    right.set_xticks(contexts, [f"{context >> 10} K" for context in contexts])
    ratios = (0.1, 0.2, 0.5, 1, 2, 3)
    right.set_yticks(ratios, map(str, ratios))
    right.minorticks_off()
    right.grid(alpha=0.3)
    if right.lines:  # without vLLM there is nothing to compare with
        right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(args.folder / f"{args.stem}-attention.png", dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main())
