"""Rewrites what is made of the results of `make eval-real`.

Tables of README.md and docs/insight.md, and what presets lose, for the command line.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from diffkv import presets
from diffkv.cli.engine_options import preset_options
from diffkv.cli.eval_methods import words
from diffkv.lab import rows
from diffkv.lab.evaluation.results import ALL_TEXTS, DISTANCES, DistanceScore, scores
from diffkv.lab.page import NOTHING, number, percent, times
from diffkv.quant import DEFAULT_QUANT

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "real-model" / "results.jsonl"
LOSSES = ROOT / "src" / "diffkv" / "data" / presets.LOSSES
MODEL = "smollm2"
COLUMNS = ("KV bytes per token", "vs bf16", "mean KL", "99 %", "same first choice")


@dataclass(frozen=True)
class Table:
    """A table of a page, found by the name of its first column.

    Attributes:
        page: file, from the root of the repository.
        first: name of the first column.
        rows: what the first column says, by the name of the cache in the results.
    """

    page: str
    first: str
    rows: Mapping[str, str]

    @property
    def header(self) -> str:
        """Its first line."""
        return f"| {' | '.join((self.first, *COLUMNS))} |"

    def text(self, found: Mapping[str, DistanceScore]) -> str:
        """All of its lines, for the caches that there are results of."""
        lines = [self.header, f"|---{'|---:' * len(COLUMNS)}|"]
        for cache, first in self.rows.items():
            if cache in found:
                mark = "**" if first.startswith("**") else ""
                cells = (f"{mark}{figure}{mark}" for figure in figures(found[cache]))
                lines.append(f"| {first} | {' | '.join(cells)} |")
        return "\n".join(lines)


class PresetTable:
    """The table of presets: their settings, what each is for, and what it loses."""

    page = "docs/insight.md"
    columns = ("preset", "formats", "alpha_high", "alpha_low", "for", *COLUMNS[1:])
    header = f"| {' | '.join(columns)} |"

    def text(self, found: Mapping[str, DistanceScore]) -> str:
        """All of its lines; dashes for what was not measured."""
        lines = [self.header, f"|---|---|---:|---:|---{'|---:' * len(COLUMNS[1:])}|"]
        for preset in presets.PRESETS:
            score = found.get(cache_of(preset))
            cells = [NOTHING] * len(COLUMNS[1:]) if score is None else figures(score)[1:]
            alphas = f"{preset.alpha_high:g}", f"{preset.alpha_low:g}"
            first = f"`{preset.name}`", preset.quant, *alphas, preset.description
            lines.append(f"| {' | '.join((*first, *cells))} |")
        return "\n".join(lines)


TABLES = (
    Table(
        "README.md",
        "KV cache of a real model",
        {
            "bf16": "bf16",
            "q8_0": "llama.cpp q8_0",
            "fp8": "vLLM fp8",
            "q4_0": "llama.cpp q4_0",
            "int4_per_token_head": "vLLM int4_per_token_head",
            "k8v8-k4v4": "DiffKV, `--preset quality`",
            DEFAULT_QUANT: "**DiffKV**",
            f"{DEFAULT_QUANT} segment=0": "DiffKV, `--segment 0`",
            f"{DEFAULT_QUANT} alpha_high=30 segment=0 policy=paper:distinct=0.75": (
                "DiffKV, `--segment 0 --preset distinct`"
            ),
        },
    ),
)


def put(table: Table | PresetTable, found: Mapping[str, DistanceScore]) -> None:
    """Write a table into its page, in the place of the one that is there."""
    path = ROOT / table.page
    before, header, rest = path.read_text(encoding="utf-8").partition(table.header)
    if not header:
        sys.exit(f"{table.page} has no table that begins with {table.header}")
    _, _, after = rest.partition("\n\n")
    path.write_text(f"{before}{table.text(found)}\n\n{after}", encoding="utf-8")


def cache_of(preset: presets.Preset) -> str:
    """The name in the results of what an engine with a preset has."""
    return words(preset_options(preset, {}))


def losses(found: Mapping[str, DistanceScore]) -> str:
    """The file of what presets lose: a line for each that there are results of."""
    lines = []
    for preset in presets.PRESETS:
        if (score := found.get(cache_of(preset))) is not None:
            names = ("ratio_bf16", "kld_mean", "kld_p99", "same_top1")
            loss = {"model": MODEL, **{name: getattr(score, name) for name in names}}
            lines.append(json.dumps({"preset": preset.name, **loss}) + "\n")
    return "".join(lines)


def figures(score: DistanceScore) -> tuple[str, ...]:
    """Cells of a row, as `diffkv report` writes them too."""
    return (
        number(score.bytes_per_token, 0),
        times(score.ratio_bf16),
        f"{score.kld_mean:.4f}",
        f"{score.kld_p99:.3f}",
        percent(score.same_top1),
    )


def measured(results: Iterable[rows.Row]) -> dict[str, DistanceScore]:
    """Over all texts, by the name of the cache, in transformers: with one model for all, in float32."""
    return {
        row["cache"]: scores(row)[row["contexts"].index(ALL_TEXTS)]
        for row in results
        if row.kind == DISTANCES and row["engine"] == "hf" and row.error is None
    }


if __name__ == "__main__":
    found = measured(rows.read(RESULTS))
    for table in (*TABLES, PresetTable()):
        put(table, found)
    LOSSES.write_text(losses(found), encoding="utf-8")
