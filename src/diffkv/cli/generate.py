"""`diffkv generate`: answer prompts with a compressed cache, and say what it cost."""

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from diffkv.cli import prompts
from diffkv.cli.engine_options import add_cache_options, cache_options

if TYPE_CHECKING:
    from diffkv.vllm_plugin.front.offline import Result
    from diffkv.vllm_plugin.options import Options

__all__ = ["PASSES_FLAGS_ON", "add_arguments", "run"]

PASSES_FLAGS_ON = True
"""Options that are not listed here are those of vLLM's engine."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    prompts.add_engine_options(parser)
    prompts.add_prompt_options(parser)
    parser.add_argument("--max-tokens", type=int, help="new tokens for each prompt (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--ignore-eos", action="store_true", help="always make --max-tokens tokens")
    parser.add_argument(
        "--compare", action="store_true", help="answer with vLLM's own cache too, and compare"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    add_cache_options(parser)
    parser.epilog = "Any other option is passed on to vLLM's engine: --dtype, --max-model-len, …"


def run(args: argparse.Namespace) -> int:
    """Generate, compare if asked to, and print."""
    if not args.verbose:
        prompts.silence_engine()
    options = cache_options(args)
    questions = prompts.questions(args)
    prompts.check_least(args, max_tokens=1)
    from diffkv.vllm_plugin.front.offline import generate

    engine = prompts.engine_arguments(args)
    sampling = [
        {
            "temperature": args.temperature,
            "max_tokens": question.max_tokens(args.max_tokens),
            "ignore_eos": args.ignore_eos,
        }
        for question in questions
    ]
    texts = [question.prompt for question in questions]
    stock = None
    if args.compare:
        plain = {**engine, "enable_prefix_caching": False}
        stock = generate(texts, plain, sampling, None, progress=not args.json)
    ours = generate(texts, engine, sampling, options, progress=not args.json)
    facts = cache_facts(ours, options)
    if args.json:
        found: dict[str, Any] = {"outputs": [asdict(each) for each in ours.answers], "cache": facts}
        if stock is not None:
            found["stock_outputs"] = [asdict(answer) for answer in stock.answers]
        print(json.dumps(found))
    else:
        from diffkv.cli.tables import print_result

        print_result([question.answer for question in questions], ours.answers, facts, stock)
    return 0


def cache_facts(result: "Result", options: "Options") -> dict[str, Any]:
    """What `--json` says of the cache; token counts are means over heads, when requests end."""
    use, thresholds = result.cache, options.thresholds()
    assert use is not None, "a run with DiffKV counts what its cache held"
    return {
        "quant": str(options.quant_config()),
        "alpha_high": thresholds.alpha_high,
        "alpha_low": thresholds.alpha_low,
        "tokens": use.tokens,
        "high": use.high,
        "low": use.low,
        "dropped": round(use.dropped, 6),
        "pages": use.pages,
        "pages_peak": result.pages_peak,
        "page_bytes": result.page_bytes,
        "running_peak": result.running_peak,
        "bytes_per_token": use.bytes_per_token,
        "bf16_bytes_per_token": use.bf16_bytes // use.tokens,
        "ratio_bf16": use.ratio_bf16,
        "ratio_fp8": use.ratio_bf16 / 2,
        "nominal_ratio_bf16": use.nominal_ratio_bf16,
        "preemptions": result.preemptions,
    }
