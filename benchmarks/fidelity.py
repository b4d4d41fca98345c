"""Runs the table of methods: every method on the same samples, three seeds, then the KL divergence.

    python benchmarks/fidelity.py docs/results/fidelity

Writes one file for each method, one JSON object of `diffkv eval` a line. What the full-precision cache
answers is computed once for each seed. Methods are named by their formats, policy and thresholds.
"""

import argparse
import multiprocessing
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

import torch

from diffkv import policies
from diffkv.lab.evaluation import hf_runs
from diffkv.lab.evaluation.kld import read_texts
from diffkv.lab.evaluation.results import Run
from diffkv.lab.evaluation.runs import CacheSpec, HFRun, language_of
from diffkv.lab.evaluation.synth import Plan
from diffkv.policy import WINDOW, Thresholds
from diffkv.quant import QuantConfig

KLD_STEPS = 64
SHIPPED = ("reference", "reference-128")


@dataclass(frozen=True)
class Method:
    """Formats, policy, and the thresholds of a policy that has them."""

    quant: str
    policy: str = "paper"
    alpha_high: float | None = None
    alpha_low: float | None = None
    rotate: str = "none"

    @property
    def name(self) -> str:
        """As a file name."""
        parts = [self.quant, self.policy]
        if self.alpha_high is not None or self.alpha_low is not None:
            parts += [f"{alpha or 0:g}" for alpha in (self.alpha_high, self.alpha_low)]
        if self.rotate != "none":
            parts.append(self.rotate)
        return re.sub(r"[^\w.=-]+", "_", "_".join(parts))

    @property
    def spec(self) -> CacheSpec:
        quant, policy = QuantConfig.parse(self.quant), policies.parse(self.policy)
        thresholds = Thresholds()
        if policy.uses_thresholds:
            thresholds = Thresholds.choose(quant, self.alpha_high, self.alpha_low)
        return CacheSpec(quant, policy, thresholds, WINDOW, rotate=self.rotate)


UNIFORM = [Method(quant, "none") for quant in ("k8v8", "k8v4", "k4v4", "k4v2")]
PAPER = [Method("k8v4-k4v2", "paper", high, low) for high, low in ((3, 0), (1, 0.02), (3, 0.1))]
WITHOUT_A_LEVEL = [
    Method("k4v8-k2v4", "paper", 3, 0),  # values get the bits that keys had
    Method("k4v4-k2v2", "paper", 3, 0),  # keys and values get the same
    Method("k8v4", "paper", None, 0.1),  # one tier: a token is kept or dropped
    Method("k8v4-k4v2", "paper-uniform", 3, 0),  # one budget for all heads of a layer
]
BASELINES = [
    Method(quant, f"{name}:keep={keep}{also}")
    for name, also in (("window", ",sinks=4"), ("topk", ""), ("random", ",sinks=4"))
    for quant, keep in (("k8v4", 0.5), ("k4v2", 0.8))
]
VARIANTS = [
    Method("k8v4", "topk-adaptive:keep=0.5"),
    Method("k8v4", "topk:keep=0.5,queries=all"),
    Method("k8v4-k4v2", "paper:queries=all", 3, 0.1),
]
DISTINCT = [Method("k8v4-k4v2", f"paper:distinct={share}", 10, 0) for share in (0.75, 0.5)]
ROTATED = [
    Method("k4v2", "none", rotate="hadamard"),
    *(
        Method("k8v4-k4v2", policy, high, 0, rotate="hadamard")
        for policy, high in (
            ("paper", 3), ("paper", 10), ("paper:distinct=0.75", 10), ("paper:distinct=0.6", 10),
            ("paper:distinct=0.5", 10),
        )
    ),
]  # fmt: skip
METHODS = {
    "reference": [*UNIFORM, *PAPER, *ROTATED, *WITHOUT_A_LEVEL, *BASELINES, *VARIANTS],
    "reference-128": [
        *UNIFORM[1:], *PAPER[:2], Method("k8v4-k4v2", "paper", 10, 0), *DISTINCT, *ROTATED,
        WITHOUT_A_LEVEL[0], *(replace(method, rotate="hadamard") for method in BASELINES[1::2]),
    ],
}  # fmt: skip


def methods_of(model: str) -> list[Method]:
    """A model of your own gets those of the first shipped one."""
    return METHODS.get(model, METHODS["reference"])


def run_method(runner: HFRun, method: Method, args: argparse.Namespace) -> list[Run]:
    own = args.model if args.model in SHIPPED else None
    language = language_of(runner.model.vocabulary, own)
    plans = [
        Plan.choose(language, args.tasks, None, args.tokens, args.n, seed) for seed in args.seeds
    ]
    runs = [runner.tasks(method.spec, plan) for plan in plans]
    if args.model == "reference":
        prompts = (files("diffkv") / "data" / "prompts.jsonl").read_text()
        runs.append(runner.kld(method.spec, read_texts(prompts), KLD_STEPS))
    return runs


def load_runner(args: argparse.Namespace) -> HFRun:
    torch.set_num_threads(1)  # one process a core: the model is too small to be shared out
    shipped = files("diffkv") / "data" / args.model
    folder = str(shipped) if (shipped / "config.json").is_file() else args.model
    return HFRun(hf_runs.load(folder, torch.float32, args.n, args.device), args.model)


def work(part: int, args: argparse.Namespace) -> None:
    """Every `args.workers`-th method."""
    runner = load_runner(args)
    start = time.perf_counter()
    methods = methods_of(args.model)[: args.methods]
    if args.resume:
        methods = [method for method in methods if not (args.out / f"{method.name}.json").exists()]
    for method in methods[part :: args.workers]:
        runs = run_method(runner, method, args)
        path = args.out / f"{method.name}.json"
        path.write_text("".join(run.model_dump_json() + "\n" for run in runs))
        print(f"{time.perf_counter() - start:6.0f} s  {path.name}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder")
    parser.add_argument("--model", default="reference", help="shipped model by name, or a folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--n", type=int, default=12, help="samples of a task, setting and seed")
    parser.add_argument("--tokens", type=int, default=1024, help="of a prompt")
    parser.add_argument("--tasks", help="names, separated by commas (default: all)")
    parser.add_argument("--methods", type=int, help="only the first so many")
    parser.add_argument("--resume", action="store_true", help="only methods without a file")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
        for done in [pool.submit(work, part, args) for part in range(args.workers)]:
            done.result()


if __name__ == "__main__":
    main()
