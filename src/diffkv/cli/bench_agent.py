"""`diffkv bench agent`: conversations that share a system prompt and grow by turns."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from diffkv.cli import prompts
from diffkv.cli.arguments import Joined, Listed, num_bytes, num_tokens, positive
from diffkv.cli.bench_engines import (
    add_model,
    add_thresholds,
    engine_flags,
    find_model,
    make_writer,
    model_facts,
    options_by_quant,
    room_for,
)
from diffkv.cli.engine_options import REFERENCE
from diffkv.quant import DEFAULT_QUANT, ConfigError

__all__ = ["add_arguments", "run"]

SCALE = 20
"""Divisor of the trace's lengths: a conversation then ends within the bundled model's 4096 tokens."""

SMOKE = {
    "conversations": 3, "turns": 3, "system_len": 600, "turn_len": 90, "answer_len": 8, "repeats": 1,
    "segment": 256, "check": True,
}  # fmt: skip
"""Segments are short, so that conversations as short share rows of their system prompt."""
CHECK_FAILED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_model(parser, REFERENCE)
    parser.add_argument(
        "--cache", action=Joined, default=f"bf16,fp8,{DEFAULT_QUANT}", metavar="CACHES",
        help="caches, separated by commas: bf16 and fp8, vLLM's own, and formats of ours, all with "
        "prefix caching (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--uncached", action=Joined, default="", metavar="CACHES",
        help="those, separated by commas, that run once more with prefix caching off",
    )  # fmt: skip
    add_thresholds(parser)
    parser.add_argument(
        "--scale", type=positive, default=SCALE,
        help="what the lengths of traces of agents are divided by (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--conversations", type=positive, help="how many at once (default: 8)")
    parser.add_argument("--turns", type=positive, help="of each (default: 30)")
    for name, text in (
        ("--system-len", "tokens that all begin with (default: 12000 / scale)"),
        ("--turn-len", "tokens that each turn adds (default: 1900 / scale)"),
        ("--answer-len", "tokens of each answer (default: 350 / scale)"),
    ):
        parser.add_argument(name, type=num_tokens, help=text)
    parser.add_argument(
        "--text", type=Path, metavar="FILE",
        help="a text that prompts are cut out of (default: random tokens)",
    )  # fmt: skip
    parser.add_argument(
        "--kv-bytes", nargs="+", action=Listed, type=num_bytes,
        help="KV budgets (default: all conversations in bf16, and a quarter of that)",
    )  # fmt: skip
    parser.add_argument("--repeats", type=positive, default=1)
    parser.add_argument(
        "--apart", action="store_true", help="one engine at a time, where memory does not hold all"
    )
    parser.add_argument(
        "--check", action="store_true",
        help="first see that k16v16 in float32 gives the tokens of vLLM's own cache in every turn",
    )  # fmt: skip
    parser.add_argument("--plot", type=Path, help="a PNG of the time to first token by turn")


def run(args: argparse.Namespace) -> int:
    """Measure; status 1 if tokens were wrong."""
    from diffkv.lab.bench import agent, pages

    prompts.silence_engine()
    if args.smoke:
        vars(args).update(SMOKE)
    caches, without, options = _caches(args)
    chats = _chats(args)
    writer = make_writer(args, prompts.device())
    if args.model is None and args.random_weights is None:
        args.model = REFERENCE
    with tempfile.TemporaryDirectory(prefix="diffkv-bench-") as folder:
        name, engine, config = find_model(args, Path(folder))
        _check_length(args, chats, config)
        budgets = args.kv_bytes or _budgets(config, chats, args.smoke)
        load = _load(args, chats, name, config)
        flags = engine_flags(args)
        if "enable_prefix_caching" in flags:
            raise ConfigError("caches run with prefix caching: name those without in --uncached")
        engine |= {"model": name, **flags}
        facts = {**model_facts(args, engine), "text": args.text.name if args.text else "random"}
        writer.note(
            f"{chats.conversations} conversations of {chats.turns} turns, {chats.system_len} to "
            f"{chats.longest} tokens"
        )
        is_right = True
        if args.check:
            (exact,) = options_by_quant(args, [agent.EXACT])
            is_right = agent.check(engine, chats, load, max(budgets), exact, writer, facts)
        settings = agent.compared(caches, without, options)
        rounds = args.repeats, args.apart
        rows = agent.run(engine, chats, load, budgets, settings, rounds, writer, facts)
    if args.plot:
        pages.draw_agent(rows, args.plot)
    return 0 if is_right else CHECK_FAILED


def _caches(args: argparse.Namespace) -> tuple[list[str], list[str], list[dict[str, Any]]]:
    """The caches, those that run without prefix caching too, and DiffKV's options for its formats."""
    from diffkv.lab.bench.throughput import STOCK

    caches, without = (
        list(dict.fromkeys(name for name in names.split(",") if name))
        for names in (args.cache, args.uncached)
    )
    if not caches:
        raise ConfigError(
            f"--cache names no cache: take {', '.join(STOCK)} or formats such as {DEFAULT_QUANT}"
        )
    if args.smoke and "fp8" in caches:
        caches.remove("fp8")  # for its time
    ours = [name for name in dict.fromkeys([*caches, *without]) if name not in STOCK]
    try:
        return caches, without, options_by_quant(args, ours)
    except ConfigError as error:
        raise ConfigError(
            f"--cache takes {', '.join(STOCK)} and formats such as {DEFAULT_QUANT}: {error}"
        ) from None


def _chats(args: argparse.Namespace) -> Any:
    """The conversations: those of the trace, scaled, but for what is given."""
    from dataclasses import replace

    from diffkv.lab.bench.agent import TRACE

    given = {name: getattr(args, name) for name in vars(TRACE) if getattr(args, name) is not None}
    return replace(TRACE.scaled(args.scale), **given)


def _check_length(args: argparse.Namespace, chats: Any, config: dict[str, Any]) -> None:
    most = config.get("max_position_embeddings")
    if most is not None and chats.longest > most:
        raise ConfigError(
            f"--scale {args.scale}: conversations grow to {chats.longest:,} tokens, and the model takes "
            f"{most:,}: raise it, or give shorter lengths or fewer turns"
        )


def _budgets(config: dict[str, Any], chats: Any, smoke: bool) -> list[int]:
    num, longest = chats.conversations, chats.longest
    ample = room_for(num, config, longest)
    return [ample] if smoke else [ample, room_for(-(-num // 4), config, longest)]


def _load(args: argparse.Namespace, chats: Any, model: str, config: dict[str, Any]) -> Any:
    """Tokens of all conversations. Messages end as the model's own do, like those of a chat template."""
    ends = config.get("eos_token_id")
    end = ends[0] if isinstance(ends, list) else ends
    if args.text is None:
        return chats.random_load(config.get("vocab_size", 512), end)
    from diffkv.lab.bench.throughput import tokenizer

    tokens = tokenizer(model).encode(prompts.read_text(args.text, "--text")).ids
    if len(tokens) < chats.num_given:
        raise ConfigError(
            f"--text {args.text} has {len(tokens):,} tokens, and the conversations take "
            f"{chats.num_given:,}: take a longer one, or fewer or shorter turns"
        )
    return chats.load(tokens, end)
