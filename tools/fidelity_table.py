"""Make the README's table of accuracy from docs/results/fidelity.

python tools/fidelity_table.py          # after make eval, which calls it
"""

from pathlib import Path

from diffkv.lab.report.load import read
from diffkv.lab.report.summary import Score, scores

ROOT = Path(__file__).parents[1]
MODEL = "reference-128"
RESULTS = ROOT / "docs" / "results" / "fidelity" / MODEL
README = ROOT / "README.md"
BEGIN, END = "<!-- fidelity: tools/fidelity_table.py -->", "<!-- end of fidelity -->"

CHOSEN = {
    "none k8v4": "K8V4",
    "none k4v2": "K4V2, without rotation",
    "none k4v2 hadamard": "K4V2",
    "paper k8v4-k4v2 alpha 3/0": "the default, without rotation",
    "paper k8v4-k4v2 alpha 3/0 hadamard": "**the default**",
    "paper k8v4-k4v2 alpha 10/0 hadamard": "`--alpha-high 10`",
    "paper:distinct=0.75 k8v4-k4v2 alpha 10/0 hadamard": "`--preset distinct`",
    "paper k8v4-k4v2 alpha 1/0.02": "the paper's thresholds for Llama-3-8B, without rotation",
    "random:keep=0.8,sinks=4 k4v2 hadamard": "a fifth dropped at random, K4V2",
    "topk:keep=0.8 k4v2 hadamard": "a fifth dropped by score (SnapKV), K4V2",
    "window:keep=0.8,sinks=4 k4v2 hadamard": "a fifth dropped by age (StreamingLLM), K4V2",
}
"""Methods of the table by their labels in the report, and what a reader may call them."""


def lost(rows: list[Score]) -> str:
    """Points lost, the mean over tasks and the worst of them."""
    points = [100 * row.difference for row in rows]
    return f"{sum(points) / len(points):+.1f} ({min(points):+.1f})"


def table() -> str:
    """Rows in the order of `CHOSEN`."""
    rows = scores(read(sorted(RESULTS.glob("*.json"))).runs)
    lines = [
        "| | smaller than bf16 | question in the prompt | question after the prompt |",
        "|---|---|---|---|",
    ]
    for name, words in CHOSEN.items():
        mine = [row for row in rows if row.method.label() == name]
        ratio = sum(row.ratio_bf16 for row in mine) / len(mine)
        easy, hard = ([row for row in mine if row.setting == s] for s in ("easy", "hard"))
        lines.append(f"| {words} | {ratio:.2f}x | {lost(easy)} | {lost(hard)} |")
    return "\n".join(lines)


def main() -> None:
    """Write the table."""
    text = README.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}")


if __name__ == "__main__":
    main()
