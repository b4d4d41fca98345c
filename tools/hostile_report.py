"""Make the page of docs/results/fidelity/hostile from its JSON lines.

python tools/hostile_report.py          # after make eval, which calls it
"""

import json
from pathlib import Path
from typing import Any

from diffkv.lab.report.load import read
from diffkv.lab.report.summary import Method, Score, scores

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "fidelity" / "hostile"
COMPARED = "full-precision.jsonl"

CASES = {
    "plain": "the model without outliers",
    "k-outliers-16": "two RoPE pairs of every head's keys are 16 times as large (queries take it back)",
    "k-bias-16": "a constant added to the keys of the slowest RoPE pair",
    "v-outliers-4": "four channels of every head's values are 4 times as large (the output projection "
    "takes it back)",
    "v-outliers-16": "the same, 16 times",
    "massive-tokens-16": "the first token and every stop have one huge channel in keys and in values, "
    "which nothing reads",
}
"""Cases in the order of the table, and what they are."""

FORMATS = {
    "k8v8": "",
    "k8v4": "",
    "k4v8": "the bytes of k8v4",
    "k4v4": "",
    "k4v2": "",
    "k8v4-k4v2": "the default",
    "k4v8-k2v4": "the bytes of the default",
    "k8v4g1x2-k4v2g2x4": "groups",
}

HEADER = """\
# Models that are hard to quantise

Large language models have caches with outliers: channels of keys and values that are many times
larger than the others, and single tokens that are (massive activations). A format spreads its few
levels over the whole range of a vector, so an outlier takes them from everything else. The shipped
models have few outliers, so some are made: `reference-128`, its own taken away, is rewritten so that
**full precision answers as before** and the cache has outliers
(`src/diffkv/lab/evaluation/hostile.py` says how). What a format loses here, it loses to the outliers
alone. Made by

```
python benchmarks/hostile.py docs/results/fidelity/hostile
python tools/hostile_report.py
```

which are part of `make eval`.
"""

READING = """\
Points of accuracy against full precision: the mean over the tasks {tasks} and, in brackets, the worst
of them; {samples} samples of a task, one seed. The question comes after a prompt of 1024 tokens, so
the cache is compressed before the question is known. An answer is 16 words, or up to 240 steps that
each go by the one before, whose own tokens are compressed too. *Rotated* is `--rotate hadamard`,
which is on by default; *smaller* is the ratio of bf16's bytes to real ones, pages and tables included,
in the plain model. Worth comparing:

* a format with its rotated self: what rotation gives back;
* k8v4 with k4v8, and the default with k4v8-k2v4: the same bytes, with the bits of K and V exchanged;
* the default with its groups: more scales for a vector, so that an outlier spoils only its own part;
* k4v2 with the default: whether the high tier holds what the low one cannot.

What follows from it is in [the log](../../../log.md#which-outliers-break-which-format).
"""


def points(rows: list[Score]) -> str:
    """Points lost, the mean over tasks and the worst of them."""
    lost = [100 * row.difference for row in rows]
    return f"{sum(lost) / len(lost):+.1f} ({min(lost):+.1f})"


def case_of(method: Method) -> str:
    """The case that a result is of: the last word of the model's name."""
    return method.model.split()[-1]


def table(rows: list[Score]) -> str:
    """A line for each format, without and with rotation; a column for each case."""
    found = list(dict.fromkeys(case_of(row.method) for row in rows))
    cases = [case for case in CASES if case in found]
    lines = [
        f"| formats | rotated | smaller | {' | '.join(cases)} |",
        "|---" * (3 + len(cases)) + "|",
    ]
    for rotate in ("none", "hadamard"):
        for quant, words in FORMATS.items():
            mine = [r for r in rows if (r.method.quant, r.method.rotate) == (quant, rotate)]
            by_case = [[row for row in mine if case_of(row.method) == case] for case in cases]
            ratio = sum(row.ratio_bf16 for row in by_case[0]) / len(by_case[0])
            name = f"{quant}, {words}" if words else quant
            cells = " | ".join(points(each) for each in by_case)
            yes = "yes" if rotate != "none" else "no"
            lines.append(f"| {name} | {yes} | {ratio:.2f}x | {cells} |")
    return "\n".join(lines)


def cases_table(compared: list[dict[str, Any]]) -> str:
    """What each case is, and how far its full precision is from the plain model's."""
    lines = [
        "| model | what is different | largest change of a logit | accuracy |",
        "|---|---|---|---|",
    ]
    for row in compared:
        accuracy = 100 * sum(row["accuracy"].values()) / len(row["accuracy"])
        change = f"{row['largest_difference']:.1e} of {row['largest_logit']:.0f}"
        lines.append(f"| {row['case']} | {CASES[row['case']]} | {change} | {accuracy:.1f} % |")
    return "\n".join(lines)


def page() -> str:
    """The whole page."""
    text = (RESULTS / COMPARED).read_text()
    compared = [json.loads(line) for line in text.splitlines()]
    compared.sort(key=lambda row: list(CASES).index(row["case"]))
    loaded = read([RESULTS / f"{row['case']}.json" for row in compared])
    rows = scores(loaded.runs)
    reading = READING.format(
        tasks=", ".join(dict.fromkeys(row.task for row in rows)), samples=rows[0].n
    )
    source = loaded.runs[0].provenance
    versions = ", ".join(f"{name} {version}" for name, version in source.versions.items())
    return "\n".join(
        (
            HEADER,
            "In full precision:\n",
            cases_table(compared) + "\n",
            "## What formats lose\n",
            reading,
            table(rows) + "\n",
            f"Commit {source.commit}; {source.device}; {versions}.",
        )
    )


def main() -> None:
    """Write the page."""
    (RESULTS / "README.md").write_text(page() + "\n")


if __name__ == "__main__":
    main()
