"""`diffkv calibrate`: choose thresholds for a model, by its own answers or by texts."""

import argparse
import math
import re
from pathlib import Path

from diffkv import policies
from diffkv.cli import calibrate_kl, calibrate_questions, prompts, texts
from diffkv.cli.arguments import Joined, Listed, above_zero, flag_of, num_tokens, positive
from diffkv.cli.engine_options import DEFAULT_QUANT, model_folder
from diffkv.cli.models import config_file
from diffkv.policy import WINDOW
from diffkv.quant import ConfigError, QuantConfig
from diffkv.vllm_plugin.options import Options

__all__ = ["PASSES_FLAGS_ON", "add_arguments", "run"]

PASSES_FLAGS_ON = True
"""Options that are not listed here are those of vLLM's engine."""

DEFAULT_OUT = Path("calibration.toml")

BY_QUESTIONS, BY_TEXTS = "max_loss", "max_kl"
"""The two ways, each by the limit that asks for it."""

ONLY = {
    BY_QUESTIONS: (
        *("data", "samples", "seed", "prompt_tokens", "match", "max_tokens"),
        *("kv_memory", "verbose"),
    ),
    BY_TEXTS: (
        *("max_p99", "texts", "contexts", "num_texts", "steps"),
        *("batch_size", "device", "threads"),
    ),
}
"""Options that only one of them has."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    prompts.add_engine_options(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        default=DEFAULT_OUT,
        help="the file to write (default: %(default)s)",
    )
    parser.add_argument(
        "--quant",
        nargs="+",
        action=Listed,
        default=[DEFAULT_QUANT],
        metavar="FORMATS",
        help=f"formats of the tiers; with --max-kl also several, to be searched (default: "
        f"{DEFAULT_QUANT})",
    )
    parser.add_argument(
        "--window",
        type=int,
        default=WINDOW,
        help="recent tokens that stay high (default: %(default)s)",
    )
    parser.add_argument(
        "--search",
        action=Joined,
        metavar="WHAT",
        help="what is searched, separated by commas: alpha_high, alpha_low, and distinct, the share of "
        "a prompt that stays because its keys are unlike others (default: "
        f"{calibrate_questions.SEARCH}; with --max-kl {calibrate_kl.SEARCH})",
    )
    parser.add_argument(
        "--dtype",
        help="of the model: float32, bfloat16 or float16 (default: vLLM's choice; with --max-kl "
        "float32 on a CPU, bfloat16 on a GPU)",
    )
    _add_question_options(parser)
    _add_kl_options(parser)
    parser.epilog = (
        "A run that was stopped goes on from FILE.partial. With --max-loss any other option is passed "
        "on to vLLM's engine: --max-model-len, …"
    )


def _add_question_options(parser: argparse.ArgumentParser) -> None:
    """Declare what is asked, and how answers are scored."""
    group = parser.add_argument_group("by questions, in vLLM")
    group.add_argument(
        "--max-loss",
        type=_share,
        metavar="SHARE",
        help="the loss to stay within, as 1%% or 0.01: of right words where answers are known, else of "
        "the tokens that full precision answers",
    )
    group.add_argument(
        "--data",
        metavar="FILE",
        help=f'prompts: JSON lines with "prompt" and, if known, "answer", or one text a line; or '
        f"{calibrate_questions.SYNTH}: questions about facts in the context, made for the model",
    )
    group.add_argument(
        "--samples",
        type=positive,
        metavar="N",
        help="so many of the prompts, at random (default: all; "
        f"{calibrate_questions.SYNTH_SAMPLES} of {calibrate_questions.SYNTH})",
    )
    group.add_argument("--seed", type=int, help="of the samples (default: 0)")
    group.add_argument(
        "--prompt-tokens",
        type=num_tokens,
        metavar="N",
        help=f"length of the prompts of {calibrate_questions.SYNTH} (default: "
        f"{calibrate_questions.PROMPT_TOKENS})",
    )
    group.add_argument(
        "--match",
        choices=("place", "anywhere"),
        help="how answers of a FILE are scored: each word at its place, or the whole answer anywhere "
        "in what the model says (default: place)",
    )
    group.add_argument(
        "--max-tokens",
        type=positive,
        metavar="N",
        help=f"new tokens for each prompt of a FILE (default: {prompts.DEFAULT_MAX_TOKENS})",
    )


def _add_kl_options(parser: argparse.ArgumentParser) -> None:
    """Declare what is read, and how far from full precision it may be."""
    group = parser.add_argument_group("by texts, in transformers")
    group.add_argument(
        "--max-kl",
        type=_nats,
        metavar="NATS",
        help="the mean KL divergence from full precision to stay within, of next-token distributions",
    )
    group.add_argument(
        "--max-p99", type=_nats, metavar="NATS", help="likewise its 99 %% quantile (default: any)"
    )
    texts.add_text_options(group, calibrate_kl.STEPS)
    group.add_argument(
        "--batch-size",
        type=positive,
        metavar="N",
        help=f"texts at once (default: {calibrate_kl.BATCH_SIZE})",
    )
    group.add_argument("--device", choices=("cpu", "cuda"), help="of the model (default: the GPU)")
    group.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help="CPU threads (default: 1 for the shipped model, torch's own choice for others)",
    )


def _share(text: str) -> float:
    """A share as `1%` or `0.01`."""
    match = re.fullmatch(r"(\d*\.?\d+)(%?)", text)
    value = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"a share of 0 to 1, as 1% or 0.01, got {text!r}")
    return value


def _nats(text: str) -> float:
    value = above_zero(text)
    if math.isinf(value):
        raise argparse.ArgumentTypeError(f"must be a number, got {text}")
    return value


def _way(args: argparse.Namespace) -> str:
    """Which of the two ways is asked for.

    Raises:
        ConfigError: neither, both, or options of the other one.
    """
    asked = [way for way in ONLY if getattr(args, way) is not None]
    if len(asked) != 1:
        given = "both are" if asked else "neither is"
        raise ConfigError(
            f"--max-loss asks questions and --max-kl reads texts: give one of them ({given} given)"
        )
    (way,) = asked
    (other,) = ONLY.keys() - asked
    for name in ONLY[other]:
        value = getattr(args, name)
        if value is not None and value is not False:
            raise ConfigError(f"{flag_of(name)} is for {flag_of(other)}, not for {flag_of(way)}")
    if way == BY_TEXTS and args.flags:
        raise ConfigError(f"unknown option {args.flags[0]}: only --max-loss passes some on to vLLM")
    if way == BY_QUESTIONS and args.data is None:
        raise ConfigError("--max-loss asks questions: give them as --data")
    if way == BY_QUESTIONS and len(args.quant) > 1:
        raise ConfigError(
            f"--max-loss takes one --quant, got {' and '.join(args.quant)}: --max-kl takes several"
        )
    return way


def _steps(text: str, quants: list[QuantConfig]) -> tuple[str, ...]:
    """What `--search` names."""
    from diffkv.lab.calibrate.search import ALPHA_HIGH, DISTINCT, STEPS

    named = text.split(",")
    for name in named:
        if name not in STEPS:
            raise ConfigError(f"--search cannot take {name!r}: there are {', '.join(STEPS)}")
    if DISTINCT in named:
        if ALPHA_HIGH not in named:
            raise ConfigError(
                f"--search {DISTINCT} drops low tokens, and {ALPHA_HIGH} says which are: name both"
            )
        dropping = policies.parse(policies.with_distinct(policies.PAPER.text, 0.5))
        for quant in quants:
            dropping.check(quant)
    return tuple(step for step in STEPS if step in named)


def run(args: argparse.Namespace) -> int:
    """Search, write the file, and print what was chosen."""
    way = calibrate_kl if _way(args) == BY_TEXTS else calibrate_questions
    quants = [QuantConfig.parse(text) for text in dict.fromkeys(args.quant)]
    steps = _steps(args.search or way.SEARCH, quants)
    Options(window=args.window)  # refuses a bad one before anything is loaded
    if not args.out.parent.is_dir():
        raise ConfigError(f"cannot write --out {args.out}: {args.out.parent} is no folder")
    from diffkv.lab.calibrate import file

    digest = file.model_digest(config_file(model_folder(args.model)))
    model = file.Model(name=args.model, config_sha256=digest)
    return way.calibrate(args, model, quants, steps)
