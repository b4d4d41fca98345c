"""Agents: conversations that share a system prompt and grow by turns; most of a prompt is known."""

import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

from diffkv.lab.bench.child import in_rounds, started
from diffkv.lab.bench.engine import Job, Load
from diffkv.lab.bench.throughput import STOCK, Setting, add_rows, label
from diffkv.lab.bench.throughput import settings as engines
from diffkv.lab.rows import Row, Writer
from diffkv.quant import ConfigError

__all__ = ["EXACT", "TRACE", "Chats", "check", "compared", "run"]

FIGURES = {
    "tokens_per_s": "vs_stock_",
    "mean_ttft_ms": "ttft_vs_stock_",
    "decode_tokens_per_s": "decode_vs_stock_",
}
"""What engines are compared by, and how the ratios begin."""

EXACT = "k16v16"
"""The format that stores what the model computed: with it, tokens must be those of vLLM's own cache."""

SHOWN_TURNS = 6
"""Turns of which a reader is told at once; the rows have all."""


@dataclass(frozen=True)
class Chats:
    """Conversations that all begin at once; each asks again as soon as it has its answer.

    Attributes:
        conversations: how many.
        turns: of each.
        system_len: tokens that all begin with.
        turn_len: tokens that each turn adds.
        answer_len: tokens that are generated in each turn.
    """

    conversations: int
    turns: int
    system_len: int
    turn_len: int
    answer_len: int

    @property
    def longest(self) -> int:
        """Tokens of a conversation at its end."""
        return self.system_len + self.turns * (self.turn_len + self.answer_len)

    @property
    def num_given(self) -> int:
        """Tokens of all conversations that are not generated, the shared ones counted once."""
        return self.system_len + self.conversations * self.turns * self.turn_len

    def scaled(self, divisor: int) -> "Chats":
        """The same with every length divided."""
        lengths = {
            name: -(-value // divisor)
            for name, value in asdict(self).items()
            if name.endswith("_len")
        }
        return Chats(**{**asdict(self), **lengths})

    def load(self, tokens: Sequence[int], message_end: int | None = None) -> Load:
        """What an engine runs, cut out of `num_given` tokens.

        Args:
            tokens: of all messages.
            message_end: put in place of each message's last token, as chat templates end messages.
        """
        rest = iter(tokens)

        def message(length: int) -> list[int]:
            own = [next(rest) for _ in range(length)]
            return own if message_end is None else [*own[:-1], message_end]

        system = message(self.system_len)
        chats = [
            [message(self.turn_len) for _ in range(self.turns)] for _ in range(self.conversations)
        ]
        for turns in chats:
            turns[0] = [*system, *turns[0]]
        return chats, [self.answer_len] * self.conversations

    def random_load(self, vocabulary: int, message_end: int | None = None, seed: int = 0) -> Load:
        """The same of random tokens."""
        tokens = random.Random(seed).choices(range(3, vocabulary), k=self.num_given)
        return self.load(tokens, message_end)


TRACE = Chats(conversations=8, turns=30, system_len=12000, turn_len=1900, answer_len=350)
"""What published traces of coding agents are like: 12 K tokens grow to 80 K in some thirty turns, and
there are 131 prompt tokens for each that is generated."""


def compared(
    caches: Sequence[str], without: Sequence[str], options: Sequence[dict[str, Any]]
) -> list[Setting]:
    """The engines: every cache with prefix caching, then some without.

    Args:
        caches: names in `STOCK`, and formats of DiffKV.
        without: those that run once more, with prefix caching off.
        options: DiffKV's for each of its formats.
    """
    ours = {each["quant"]: each for each in options}

    def setting(name: str, caching: bool) -> Setting:
        (found,) = engines([], [name]) if name in STOCK else engines([ours[name]], [])
        return replace(found, engine={**found.engine, "enable_prefix_caching": caching})

    return [setting(each, True) for each in caches] + [setting(each, False) for each in without]


def run(
    engine: dict[str, Any],
    chats: Chats,
    load: Load,
    budgets: Sequence[int],
    settings: Sequence[Setting],
    rounds: tuple[int, bool],
    writer: Writer,
    facts: dict[str, Any],
) -> list[Row]:
    """Run every setting with every budget; engines of a budget take turns, each in a process of its own.

    Args:
        engine: arguments of vLLM's engine that all settings share, the model among them.
        chats: the conversations.
        load: their tokens.
        budgets: KV bytes, tables included.
        settings: see `compared`.
        rounds: how often, and whether one engine at a time.
        writer: gets a row for each setting and budget.
        facts: settings that belong into every row.

    Returns:
        The rows.

    Raises:
        ConfigError: no setting could run.
    """
    added: list[Row] = []
    for kv_bytes in budgets:
        writer.note(f"{kv_bytes / 1e6:.1f} MB of KV")
        jobs = [_job(engine, chats, load, kv_bytes, setting, turns=True) for setting in settings]
        found = [[each[0] for each in done] for done in in_rounds(jobs, *rounds, writer.note)]
        case = {**facts, "kv_bytes": kv_bytes, **asdict(chats), "repeats": rounds[0]}
        rows = add_rows(writer, "agent", case, settings, found, _text, FIGURES)
        for line in _by_turn([row for row in rows if row.error is None]):
            writer.note(line)
        added += rows
    if all(row.error is not None for row in added):
        raise ConfigError(f"no engine could run: {added[0].error}")
    return added


def _job(
    engine: dict[str, Any],
    chats: Chats,
    load: Load,
    kv_bytes: int,
    setting: Setting,
    **wanted: bool,
) -> Job:
    shared = {"max_model_len": chats.longest + 1, "max_num_seqs": chats.conversations}
    return Job({**shared, **engine, **setting.engine}, setting.options, kv_bytes, [load], **wanted)


def _text(row: Row) -> str:
    name = f"  {label(row)}"
    if row.error is not None:
        return f"{name:24} did not run: {row.error}"
    text = (
        f"{name:24} {row['seconds']:6.1f} s, {row['tokens_per_s']:.1f} tokens/s, hits "
        f"{row['hit_rate']:.1%}, first token after {row['mean_ttft_ms']:.0f} ms (p50 "
        f"{row['p50_ttft_ms']:.0f}, p95 {row['p95_ttft_ms']:.0f}), at once {row['max_running']:.0f}, "
        f"{row['preemptions']:.0f} preempted, {row['bytes_per_token']:.0f} B/token"
    )
    for code in STOCK:
        whole, first, decode = (row.get(name + code) for name in FIGURES.values())
        if whole is not None and row["engine"] != f"stock {code}":
            text += f"; {whole:.2f}x of {code}, first token {first:.2f}x, decoding {decode:.2f}x"
    return text


def _by_turn(rows: Sequence[Row]) -> list[str]:
    """Medians of times to first token at some turns, from the first to the last: a line for each row."""
    if not rows:
        return []
    lengths = rows[0]["prompt_tokens_by_turn"]
    step = max(1, -(-(len(lengths) - 1) // (SHOWN_TURNS - 1)))
    turns = [*range(0, len(lengths) - 1, step), len(lengths) - 1]
    places = ", ".join(f"{turn + 1} ({lengths[turn]:.0f})" for turn in turns)
    lines = [f"  ms to the first token (p50) at turn (tokens of its prompt) {places}:"]
    for row in rows:
        values = ", ".join(f"{row['p50_ttft_ms_by_turn'][turn]:.0f}" for turn in turns)
        lines.append(f"    {label(row):24} {values}")
    return lines


def check(
    engine: dict[str, Any],
    chats: Chats,
    load: Load,
    kv_bytes: int,
    options: dict[str, Any],
    writer: Writer,
    facts: dict[str, Any],
) -> bool:
    """Whether DiffKV without loss gives the tokens of vLLM's own cache, in float32, in every turn.

    Args:
        engine: as of `run`.
        chats: the conversations.
        load: their tokens.
        kv_bytes: KV budget of tokens in 16 bits; these take twice as many.
        options: DiffKV's with `EXACT`.
        writer: gets a row.
        facts: settings that belong into it.

    Raises:
        ConfigError: one of the two engines could not run.
    """
    exact, settings = {**engine, "dtype": "float32"}, compared(["bf16", EXACT], [], [options])
    jobs = [
        _job(exact, chats, load, 2 * kv_bytes, setting, turns=True, answers=True)
        for setting in settings
    ]
    with ExitStack() as stack:
        results = [child.run(0) for child in started(stack, jobs)]
    for setting, result in zip(settings, results, strict=True):
        if "error" in result:
            raise ConfigError(f"{setting.label} in float32 did not run: {result['error']}")
    stock, ours = results
    wrong = _first_difference(stock["answers"], ours["answers"])
    num_tokens = chats.conversations * chats.turns * chats.answer_len
    measured = {
        "tokens": num_tokens,
        "equal": wrong is None,
        "hit_rate": ours["hit_rate"],
        "stock_hit_rate": stock["hit_rate"],
    }
    hits = f"hits {ours['hit_rate']:.1%}, vLLM's {stock['hit_rate']:.1%}"
    text = f"  check: {EXACT} in float32 gives vLLM's {num_tokens} tokens ({hits})"
    if wrong is not None:
        text = f"  check: {EXACT} in float32 does not give vLLM's tokens from {wrong} on ({hits})"
    case = {**facts, **asdict(chats), **options, "dtype": "float32"}
    writer.add("agent_check", case, measured, text)
    return wrong is None


def _first_difference(expected: list[Any], found: list[Any]) -> str | None:
    """Where answers of conversations begin to differ: "turn 2, token 3 of conversation 1"."""
    for number, (right, mine) in enumerate(zip(expected, found, strict=True), 1):
        for turn, (tokens, others) in enumerate(zip(right, mine, strict=True), 1):
            for place, (token, other) in enumerate(zip(tokens, others, strict=True), 1):
                if token != other:
                    return f"turn {turn}, token {place} of conversation {number}"
    return None
