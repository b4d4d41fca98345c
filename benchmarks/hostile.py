"""Measures formats on models whose caches are hard to quantise, and whose answers stay the same.

    python benchmarks/hostile.py docs/results/fidelity/hostile

`reference-128` without the outliers that it ships with is rewritten into
each of `CASES`, in a temporary folder. Each case gets a file: one JSON object of `diffkv eval` a line,
one line for each method. full-precision.jsonl says how far logits of the rewritten model are from the
plain one's; a case whose full-precision answers differ ends the run.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from fidelity import Method

from diffkv.lab.evaluation import hf_runs
from diffkv.lab.evaluation.hf_runs import HFModel
from diffkv.lab.evaluation.hostile import rewrite
from diffkv.lab.evaluation.languages import LANGUAGES
from diffkv.lab.evaluation.runs import HFRun
from diffkv.lab.evaluation.synth import Plan
from diffkv.lab.evaluation.tasks import draw

MODEL = "reference-128"
OWN_OUTLIERS = ("k-outliers", 0.25)
"""Takes away the outliers of the shipped model's keys."""

PLAIN = "plain"
CASES = {
    PLAIN: None,
    "massive-tokens-16": ("massive-tokens", 16.0),  # takes longest: begins early
    "k-outliers-16": ("k-outliers", 16.0),
    "k-bias-16": ("k-bias", 16.0),
    "v-outliers-4": ("v-outliers", 4.0),
    "v-outliers-16": ("v-outliers", 16.0),
}
UNROTATED = [
    *(Method(quant, "none") for quant in ("k8v8", "k8v4", "k4v8", "k4v4", "k4v2")),
    *(
        Method(quant, "paper", 3, 0)
        for quant in ("k8v4-k4v2", "k4v8-k2v4", "k8v4g1x2-k4v2g2x4")
    ),
]  # fmt: skip
METHODS = [*UNROTATED, *(replace(method, rotate="hadamard") for method in UNROTATED)]
TASKS = "retrieval,long-chain,pair-chain"
SETTING = "hard"  # the cache is compressed before the question is known
NUM_COMPARED = 2


def load_case(name: str, folder: Path, num_samples: int) -> HFModel:
    shipped = files("diffkv") / "data" / MODEL
    model = folder / PLAIN
    rewrite(Path(str(shipped)), model, *OWN_OUTLIERS, torch.float32)
    if CASES[name] is not None:
        rewrite(model, folder / name, *CASES[name], torch.float32)
        model = folder / name
    return hf_runs.load(str(model), torch.float32, num_samples, "cpu")


@torch.no_grad()
def logits(model: HFModel, num_tokens: int) -> torch.Tensor:
    """In full precision, of a few prompts."""
    samples = draw("retrieval", LANGUAGES[MODEL], SETTING, num_tokens, NUM_COMPARED, seed=0)
    token_ids = torch.tensor([model.encode(sample.prompt) for sample in samples])
    return model.model(token_ids).logits


def compare(name: str, model: HFModel, plain: HFModel, num_tokens: int) -> dict[str, Any]:
    ours, theirs = logits(model, num_tokens), logits(plain, num_tokens)
    return {
        "case": name,
        "largest_logit": theirs.abs().max().item(),
        "largest_difference": (ours - theirs).abs().max().item(),
        "same_top1": (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
    }


def run_case(name: str, args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)  # one process a core: the model is too small to be shared out
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        plain = load_case(PLAIN, Path(folder) / "for-comparison", args.n)
        model = load_case(name, Path(folder), args.n)
    compared = compare(name, model, plain, args.tokens)
    runner = HFRun(model, f"{MODEL} {name}")
    plan = Plan.choose(LANGUAGES[MODEL], args.tasks, SETTING, args.tokens, args.n, args.seed)
    runs = [runner.tasks(method.spec, plan) for method in METHODS[: args.methods]]
    (args.out / f"{name}.json").write_text("".join(run.model_dump_json() + "\n" for run in runs))
    print(f"{time.perf_counter() - start:6.0f} s  {name}", file=sys.stderr, flush=True)
    return {**compared, "accuracy": {row.task: row.accuracy_full for row in runs[0].tasks}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n", type=int, default=4, help="samples of a task")
    parser.add_argument("--tokens", type=int, default=1024, help="of a prompt")
    parser.add_argument("--tasks", default=TASKS, help="names, separated by commas")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--methods", type=int, help="only the first so many")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    cases = list(dict.fromkeys([PLAIN, *args.cases]))
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
        compared = list(pool.map(run_case, cases, [args] * len(cases)))
    lines = [json.dumps(row) + "\n" for row in compared]
    (args.out / "full-precision.jsonl").write_text("".join(lines))
    changed = [row["case"] for row in compared if row["accuracy"] != compared[0]["accuracy"]]
    if changed:
        sys.exit(f"full precision answers otherwise: {', '.join(changed)}")


if __name__ == "__main__":
    main()
