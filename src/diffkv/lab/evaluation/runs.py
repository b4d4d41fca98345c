"""One evaluation from its settings to its result."""

import importlib.metadata
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from diffkv import __version__
from diffkv.hf import DiffKVHFCache, PoolOptions
from diffkv.lab.evaluation import kld, synth
from diffkv.lab.evaluation.hf_runs import HFModel
from diffkv.lab.evaluation.languages import LANGUAGES, English, ReferenceWords
from diffkv.lab.evaluation.results import KldRow, Provenance, Run, TaskRow
from diffkv.policies import Policy
from diffkv.policy import Thresholds
from diffkv.quant import ConfigError, QuantConfig

__all__ = ["CacheSpec", "HFRun", "language_of", "provenance"]


@dataclass(frozen=True)
class CacheSpec:
    """A cache that is compared with the full one.

    Attributes:
        quant: formats.
        policy: of prompts.
        thresholds: of the policy; both 0 for one that has none.
        window: recent tokens that stay high.
        page_bytes: of a page; None: the size that wastes least.
        kernels: "reference", or None for the device's own.
        rotate: "hadamard" or "none".
    """

    quant: QuantConfig
    policy: Policy
    thresholds: Thresholds
    window: int
    page_bytes: int | None = None
    kernels: str | None = None
    rotate: str = "none"

    def __post_init__(self) -> None:
        """Refuse formats that the policy cannot work with."""
        self.policy.check(self.quant)

    def make(self, model: PreTrainedModel, max_tokens: int) -> DiffKVHFCache:
        """An empty cache for a model of transformers."""
        return DiffKVHFCache(
            model, self.quant, self.policy.fresh(), self.thresholds, self.window,
            max_tokens, self.rotate, PoolOptions(self.page_bytes, self.kernels),
        )  # fmt: skip


def _commit() -> str | None:
    """Of the checkout that this file is in, `-dirty` if more than docs were changed; None if in none."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno", "--", ":/", ":(exclude,top)docs"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def provenance(device: str, packages: Sequence[str] = ("torch", "transformers")) -> Provenance:
    """Command, commit, versions and device of this process."""
    versions = {name: importlib.metadata.version(name) for name in packages}
    name = (
        torch.cuda.get_device_name(device)
        if device.startswith("cuda")
        else f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
    )
    return Provenance(
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        commit=_commit(),
        versions={"diffkv": __version__, "python": platform.python_version(), **versions},
        device=name,
    )


def language_of(vocabulary: Collection[str], name: str | None) -> ReferenceWords | English:
    """The language for a model: the one asked for, else the one whose words it has.

    Args:
        vocabulary: texts of its tokens.
        name: of the language asked for; None: whichever fits.

    Raises:
        ConfigError: there is no such language, or the model has not its words.
    """
    words = ReferenceWords()
    knows = all(word in vocabulary for word in (*words.keys, *words.values))
    if name is None:
        return words if knows else English()
    if name not in LANGUAGES:
        raise ConfigError(f"unknown language {name!r}: there are {', '.join(LANGUAGES)}")
    if isinstance(LANGUAGES[name], ReferenceWords) and not knows:
        raise ConfigError(
            f"this model does not know the words of the language {name}: leave it out"
        )
    return LANGUAGES[name]


class HFRun:
    """Evaluations of one model of transformers; what the full cache answers is kept for the next one.

    Args:
        model: loaded.
        name: as it was named.
    """

    def __init__(self, model: HFModel, name: str) -> None:
        self.model = model
        self._name = name
        self._full: dict[synth.Plan, synth.Scores] = {}

    def tasks(
        self, spec: CacheSpec, plan: synth.Plan, report: Callable[[TaskRow], None] = lambda _: None
    ) -> Run:
        """Run the suite `synth`."""
        start = time.perf_counter()
        if plan not in self._full:
            self._full[plan] = synth.full_scores(
                plan, lambda samples, num: self.model.answers(samples, num, None)
            )
        rows = synth.task_rows(
            plan, lambda samples, num: self.model.answers(samples, num, spec.make),
            self._full[plan], report,
        )  # fmt: skip
        return self._run(spec, plan.seed, "synth", time.perf_counter() - start, tasks=rows)

    def kld(self, spec: CacheSpec, texts: Sequence[kld.Text], max_steps: int) -> Run:
        """Run the suite `kld`."""
        start = time.perf_counter()
        rows = kld.kld_rows(self.model, texts, spec.make, max_steps)
        return self._run(spec, 0, "kld", time.perf_counter() - start, kld_rows=rows)

    def _run(
        self,
        spec: CacheSpec,
        seed: int,
        suite: str,
        seconds: float,
        tasks: Sequence[TaskRow] = (),
        kld_rows: Sequence[KldRow] = (),
    ) -> Run:
        return Run(
            model=self._name,
            engine="hf",
            quant=str(spec.quant),
            policy=str(spec.policy),
            alpha_high=spec.thresholds.alpha_high,
            alpha_low=spec.thresholds.alpha_low,
            window=spec.window,
            rotate=spec.rotate,
            seed=seed,
            suite=suite,
            tasks=list(tasks),
            kld=list(kld_rows),
            seconds=seconds,
            provenance=provenance(str(self.model.model.device)),
        )
